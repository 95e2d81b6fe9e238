//! Flags, files, exit codes.

use std::net::TcpListener;

use crate::support::{Process, dev, dormouse};

/// Runs a command that must fail; its exit code and what it said.
fn fails(args: &[&str]) -> (i32, String) {
    let output = dormouse().args(args).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    (output.status.code().unwrap(), said)
}

#[track_caller]
fn says(said: &str, want: &[&str]) {
    for want in want {
        assert!(said.contains(want), "{said:?} should say {want:?}");
    }
    assert!(!said.contains("stack backtrace"), "{said}");
}

#[test]
fn a_typo_in_a_config_file_is_named_with_line_and_key() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("node.toml");
    let path = file.to_str().unwrap();
    std::fs::write(&file, "workers = 1\nidle_after = '1s'\n").unwrap();
    for command in ["node", "gateway"] {
        let (code, said) = fails(&[command, "--config", path]);
        assert_eq!(code, 2);
        says(&said, &["node.toml", "is not valid", "unknown field"]);
    }
    let (_, said) = fails(&["node", "--config", path]);
    says(&said, &["line 2", "idle_after"]);
    std::fs::write(&file, "[mailbox]\nwait_max = 'soon'\n").unwrap();
    let (code, said) = fails(&["node", "--config", path, "--check"]);
    assert_eq!(code, 2);
    says(&said, &["line 2", "wait_max"]);
    std::fs::write(&file, "colo = 'sfo'\n").unwrap();
    let (code, said) = fails(&["node", "--config", path, "--check"]);
    assert_eq!(code, 2);
    says(&said, &["\"sfo\" must be three upper-case letters"]);
    let (code, said) = fails(&["gateway", "--config", "/nowhere.toml"]);
    assert_eq!(code, 2);
    says(&said, &["/nowhere.toml", "No such file"]);
}

#[test]
fn check_validates_and_does_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    for args in [
        vec!["node", "--check", "--data-dir", data.to_str().unwrap()],
        vec!["gateway", "--check"],
        vec!["dev", "--check"],
    ] {
        let output = dormouse().args(&args).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(
            String::from_utf8(output.stdout).unwrap(),
            "the configuration is valid\n"
        );
    }
    assert!(!data.exists());
}

#[test]
fn wrong_usage_exits_with_2() {
    assert_eq!(fails(&["dev", "--nonsense"]).0, 2);
    let (code, said) = fails(&["node", "--listen", "0.0.0.0:0"]);
    assert_eq!(code, 2);
    says(&said, &["0.0.0.0:0", "needs a cluster token"]);
    let (code, said) = fails(&["gateway", "--admin-listen", "0.0.0.0:0"]);
    assert_eq!(code, 2);
    says(&said, &["needs an admin token"]);
}

#[test]
fn a_data_directory_has_one_owner() {
    let dir = tempfile::tempdir().unwrap();
    let first = Process::dev(dir.path());
    let second = dev(dir.path()).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    says(
        &String::from_utf8(second.stderr).unwrap(),
        &["belongs to a running node (process "],
    );
    first.kill();
    // The lock ends with its process, however it ends.
    Process::dev(dir.path());
}

#[test]
fn a_taken_port_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().to_str().unwrap();
    let listen = ["--listen", &address, "--admin-listen", "127.0.0.1:0"];
    for (command, what) in [
        (["dev", "--data-dir", data], "the gateway cannot listen on"),
        (["node", "--data-dir", data], "worker 0 cannot listen on"),
        (["gateway", "--colo", "SFO"], "the gateway cannot listen on"),
    ] {
        let (code, said) = fails(&[&command[..], &listen[..]].concat());
        assert_eq!(code, 1);
        says(&said, &[what, &address, "Address already in use"]);
    }
    let (code, said) = fails(&[
        "dev",
        "--data-dir",
        data,
        "--listen",
        "127.0.0.1:0",
        "--admin-listen",
        &address,
    ]);
    assert_eq!(code, 1);
    says(&said, &["the admin listener cannot listen on", &address]);
}

#[test]
fn a_terminated_process_ends_well() {
    let dir = tempfile::tempdir().unwrap();
    for signal in ["TERM", "INT"] {
        let process = Process::dev(dir.path());
        process.signal(signal);
        assert!(process.wait().success());
    }
}
