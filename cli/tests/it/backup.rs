//! All objects saved elsewhere while they are used, and brought back to another node.

use std::collections::HashMap;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rusqlite::Connection;
use serde_json::{Value, json};

use crate::bucket::Bucket;
use crate::operator::Admin;
use crate::support::{Process, call, dev, dormouse, gateway, node};

fn backup(args: &[&str], of: Option<&Process>, bucket: Option<&Bucket>) -> Command {
    let mut command = dormouse();
    command.arg("backup").args(args);
    if let Some(process) = of {
        command.env("DORMOUSE_ADMIN", &process.admin);
    }
    if let Some(bucket) = bucket {
        bucket.give_to(&mut command);
    }
    command
}

#[track_caller]
fn run(mut command: Command) -> Value {
    let output = command.arg("--json").output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[track_caller]
fn refused(mut command: Command, want: &str) {
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{command:?} should fail");
    assert!(error.contains(want), "{error:?} should say {want:?}");
}

/// Each object has two tables that one transaction always changes together, while the backup is made.
#[test]
fn a_backup_under_load_has_every_object_at_one_point() {
    const OBJECTS: usize = 40;
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("backups");
    let place = place.to_str().unwrap();
    let from = Process::start(&mut node(&dir.path().join("from"), "2"));
    let front = Process::start(&mut gateway(&from));
    let exec = |path: &str, sql: &str| call(&front.url, path, &json!([sql]));
    for object in 0..OBJECTS {
        exec(
            &format!("Sql/o-{object}/exec"),
            "CREATE TABLE a (n); CREATE TABLE b (n); INSERT INTO a VALUES (0); INSERT INTO b VALUES (0)",
        );
    }
    let written: Vec<AtomicU64> = (0..OBJECTS).map(|_| AtomicU64::new(0)).collect();
    let stop = AtomicBool::new(false);
    let at_least: Vec<u64> = std::thread::scope(|scope| {
        for writer in 0..4 {
            let (written, stop, exec) = (&written, &stop, &exec);
            scope.spawn(move || {
                for object in (writer..OBJECTS).step_by(4).cycle() {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    exec(
                        &format!("Sql/o-{object}/exec"),
                        "UPDATE a SET n = n + 1; UPDATE b SET n = n + 1",
                    );
                    written[object].fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        while written
            .iter()
            .any(|count| count.load(Ordering::Relaxed) < 3)
        {
            std::thread::yield_now();
        }
        let before = written.iter().map(|count| count.load(Ordering::Relaxed));
        let before = before.collect();
        let made = run(backup(&["create", place], Some(&front), None));
        assert_eq!(made["objects"], OBJECTS);
        stop.store(true, Ordering::Relaxed);
        before
    });
    run(backup(&["verify", place], None, None));
    // Onto an empty node of another shape.
    let to = Process::start(&mut dev(&dir.path().join("to")));
    let back = run(backup(&["restore", place], Some(&to), None));
    assert_eq!(back["objects"], OBJECTS);
    for (object, at_least) in at_least.iter().enumerate() {
        let path = format!("Sql/o-{object}/exec");
        let found = call(&to.url, &path, &json!(["SELECT a.n, b.n FROM a, b"]));
        let (a, b) = (&found["rows"][0][0], &found["rows"][0][1]);
        assert_eq!(a, b, "object {object} is torn");
        assert!(
            a.as_u64().unwrap() >= *at_least,
            "object {object}: {a} < {at_least}"
        );
    }
    let listed = Admin::of(&to).json(&["objects", "ls", "--limit", "1000"]);
    assert_eq!(listed["objects"].as_array().unwrap().len(), OBJECTS);
    refused(
        backup(&["restore", place], Some(&to), None),
        "there are objects already",
    );
}

/// What has not changed is not copied again, what was deleted is gone, and what no backup needs is removed.
#[test]
fn backups_are_incremental_and_can_be_pruned() {
    let bucket = Bucket::start();
    let place = "s3://keep/backups-of-a-test";
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let process = Process::start(&mut dev(&data));
    for object in 0..20 {
        call(
            &process.url,
            &format!("Counter/c-{object}/increment"),
            &json!([object + 1]),
        );
    }
    // Larger than what shares a file with others.
    let large = dir.path().join("large.db");
    Connection::open(&large)
        .unwrap()
        .execute_batch("CREATE TABLE t (v); INSERT INTO t VALUES (randomblob(9000000))")
        .unwrap();
    Admin::of(&process).run(&["objects", "import", "Sql", "large", large.to_str().unwrap()]);
    let first = run(backup(&["create", place], Some(&process), Some(&bucket)));
    assert_eq!(
        (&first["objects"], &first["new_objects"]),
        (&json!(21), &json!(21))
    );
    // Files of long ago are known not to have changed; what is younger than the slack of a clock may be
    // copied again.
    process.signal("TERM");
    assert!(process.wait().success());
    for file in walk(&data.join("shards")) {
        let file = std::fs::File::open(file).unwrap();
        let modified = file.metadata().unwrap().modified().unwrap();
        file.set_modified(modified - Duration::from_secs(600))
            .unwrap();
    }
    let process = Process::start(&mut dev(&data));
    call(&process.url, "Counter/c-3/increment", &json!([100]));
    Admin::of(&process).run(&["objects", "delete", "Counter", "c-4", "--yes"]);
    let second = run(backup(&["create", place], Some(&process), Some(&bucket)));
    assert_eq!(
        (&second["objects"], &second["new_objects"]),
        (&json!(20), &json!(1))
    );
    let full = run(backup(
        &["create", place, "--full"],
        Some(&process),
        Some(&bucket),
    ));
    assert_eq!(
        (&full["objects"], &full["new_objects"]),
        (&json!(20), &json!(20))
    );
    let listed = run(backup(&["ls", place], None, Some(&bucket)));
    assert_eq!(listed["backups"].as_array().unwrap().len(), 3);
    let name = second["name"].as_str().unwrap();
    run(backup(
        &["verify", place, "--backup", name],
        None,
        Some(&bucket),
    ));
    // The second one needs the data of the first.
    let to = Process::start(&mut dev(&dir.path().join("to")));
    run(backup(
        &["restore", place, "--backup", name],
        Some(&to),
        Some(&bucket),
    ));
    let expected: HashMap<usize, u64> = (0..20)
        .map(|object| {
            (
                object,
                object as u64 + 1 + if object == 3 { 100 } else { 0 },
            )
        })
        .collect();
    for (object, value) in expected.into_iter().filter(|(object, _)| *object != 4) {
        let path = format!("Counter/c-{object}/value");
        assert_eq!(call(&to.url, &path, &json!([])), value, "object {object}");
    }
    let bytes = call(
        &to.url,
        "Sql/large/exec",
        &json!(["SELECT length(v) FROM t"]),
    );
    assert_eq!(bytes["rows"][0][0], 9_000_000);
    // One object alone, back from the first.
    let name = first["name"].as_str().unwrap();
    let args = [
        "restore", place, "--backup", name, "--class", "Counter", "--name", "c-4",
    ];
    run(backup(&args, Some(&to), Some(&bucket)));
    assert_eq!(call(&to.url, "Counter/c-4/value", &json!([])), 5);
    let pruned = run(backup(
        &["prune", place, "--keep", "1"],
        None,
        Some(&bucket),
    ));
    assert_eq!(pruned["removed"].as_array().unwrap().len(), 2);
    run(backup(&["verify", place], None, Some(&bucket)));
    assert_eq!(bucket.files(".pack").len(), 1);
    refused(
        backup(&["verify", place, "--backup", name], None, Some(&bucket)),
        "there is no backup",
    );
    // Damage is found.
    let pack = &bucket.files(".pack")[0];
    let mut bytes = std::fs::read(pack).unwrap();
    bytes[5000] ^= 1;
    std::fs::write(pack, bytes).unwrap();
    refused(
        backup(&["verify", place], None, Some(&bucket)),
        "does not match its checksum",
    );
    refused(
        backup(&["restore", "/nowhere/at-all"], Some(&to), None),
        "is no directory",
    );
}

fn walk(directory: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    let found = paths.flat_map(|path| {
        if path.is_dir() {
            walk(&path)
        } else {
            vec![path]
        }
    });
    found.collect()
}
