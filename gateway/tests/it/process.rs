//! The binary: its checks, and how it takes changes of its file.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use crate::support::Scripted;

fn gateway() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gateway"));
    command.env("DORMOUSE_ADMIN_LISTEN", "127.0.0.1:0");
    command.env("DORMOUSE_LISTEN", "127.0.0.1:0");
    command
}

fn check(toml: &str) -> (Option<i32>, String) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), toml).unwrap();
    let Output {
        status,
        stdout,
        stderr,
    } = gateway()
        .arg("--check")
        .arg("--config")
        .arg(file.path())
        .output()
        .unwrap();
    let said = String::from_utf8([stdout, stderr].concat()).unwrap();
    (status.code(), said)
}

#[test]
fn a_check_names_line_key_value_and_rule() {
    let refused = |toml: &str, want: &[&str]| {
        let (code, said) = check(toml);
        assert_eq!(code, Some(2), "{said}");
        for want in want {
            assert!(said.contains(want), "{said} should say {want:?}");
        }
    };
    refused("threads = 1\nthread = 2\n", &["line 2", "thread"]);
    refused("\nthreads = 'x'\n", &["line 2", "threads", "'x'"]);
    refused(
        "\n[[routes]]\nname = 'a'\npath = 'x'\nrespond = {}\n",
        &["line 4: routes[0].path = \"x\" must begin with /"],
    );
    refused(
        "[upstreams.app]\nservers = [\n  '127.0.0.1:1',\n  'nowhere',\n]\n",
        &["line 4: upstreams.app.servers[1].address = \"nowhere\" must be host:port"],
    );
    refused(
        "[[routes]]\nname = 'a'\npath = '/'\nrespond.headers = { te = 'gzip' }\n",
        &["te = \"gzip\" is said by the gateway"],
    );
    refused(
        "retry.tries_max = 0\n",
        &["line 1: retry.tries_max = 0 must be at least 1"],
    );
    let (code, said) = check(
        "[[routes]]\nname = 'a'\npath = '/x'\nrespond = {}\nshard = { by = '{query.k}', count = 5000 }\n",
    );
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said.contains("warning: route \"a\": shard.count = 5000: from 10 to 1000 are advised"),
        "{said}"
    );
    assert!(said.contains("the configuration is valid"), "{said}");
}

/// A running gateway; killed when dropped.
struct Running {
    child: Child,
    url: String,
    admin: String,
    log: std::sync::mpsc::Receiver<String>,
}

impl Running {
    fn start(file: &Path) -> Self {
        Self::begin(gateway(), file)
    }

    fn begin(mut command: Command, file: &Path) -> Self {
        let mut child = command
            .env("DORMOUSE_ADMIN_LISTEN", "127.0.0.1:0")
            .env("DORMOUSE_LISTEN", "127.0.0.1:0")
            .arg("--config")
            .arg(file)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = String::new();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        out.read_line(&mut ready).unwrap();
        let word = |number| ready.split_whitespace().nth(number).unwrap().to_owned();
        let (url, admin) = (word(1), word(3));
        let (tell, log) = std::sync::mpsc::sync_channel(1000);
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        std::thread::spawn(move || {
            lines
                .map_while(Result::ok)
                .try_for_each(|line| tell.send(line))
        });
        Self {
            child,
            url,
            admin,
            log,
        }
    }

    fn get(&self, path: &str) -> String {
        let mut answer = ureq::get(format!("{}{path}", self.url)).call().unwrap();
        let mut text = String::new();
        answer
            .body_mut()
            .as_reader()
            .read_to_string(&mut text)
            .unwrap();
        text
    }

    /// Waits for a line of the log.
    fn logged(&self, want: &str) -> String {
        loop {
            let line = self.log.recv_timeout(Duration::from_secs(30));
            let line = line.unwrap_or_else(|_| panic!("nothing logged like {want:?}"));
            if line.contains(want) {
                return line;
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[test]
fn a_limit_that_there_is_no_memory_for_changes_nothing() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "nodes = []").unwrap();
    // Four GB of address space.
    let mut command = Command::new("sh");
    let script = "ulimit -v 4000000; exec \"$0\" \"$@\"";
    command.args(["-c", script, env!("CARGO_BIN_EXE_gateway")]);
    let running = Running::begin(command, file.path());
    let limit = "key = '{client.ip}'\nlimit = 1\nperiod = '1s'\nalgorithm = 'sliding_window'";
    let many = "keys_max = 100000000";
    let route = "[[routes]]\nname = 'a'\npath = '/'\nrespond.body = 'here'";
    let config =
        |more: &str| format!("nodes = []\n{route}\nlimits = ['l']\n[limits.l]\n{limit}\n{more}");
    replace(file.path(), &config(many));
    let refused = running.logged("keys_max");
    assert!(
        refused.contains("needs more memory than the system gives"),
        "{refused}"
    );
    replace(file.path(), &config(""));
    running.logged("config reloaded");
    assert_eq!(running.get("/"), "here");
}

/// What any client can do at no cost writes no line each.
#[test]
fn nobody_can_fill_the_log_with_http_2() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "nodes = []").unwrap();
    let running = Running::start(file.path());
    let address = running.url.strip_prefix("http://").unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    let patience = Some(Duration::from_secs(20));
    stream.set_read_timeout(patience).unwrap();
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    stream.write_all(preface).unwrap();
    // Answers to a PING that nobody sent, and a PING at last.
    let ack = b"\0\0\x08\x06\x01\0\0\0\0nobody's";
    stream.write_all(&ack.repeat(1000)).unwrap();
    stream.write_all(b"\0\0\x08\x06\0\0\0\0\0the last").unwrap();
    let mut read = Vec::new();
    while !read.windows(8).any(|part| part == b"the last") {
        let mut bytes = [0; 1000];
        let count = stream.read(&mut bytes).unwrap();
        assert!(count > 0, "closed");
        read.extend_from_slice(&bytes[..count]);
    }
    std::fs::write(file.path(), "nodes = []\ndrain_max = '1s'").unwrap();
    let until_then = std::iter::from_fn(|| running.log.recv_timeout(Duration::from_secs(30)).ok());
    let lines: Vec<String> = until_then
        .take_while(|line| !line.contains("config"))
        .collect();
    assert!(lines.len() < 10, "{} lines, as {:?}", lines.len(), lines[9]);
}

/// Puts a file in the place of another at once: never is there half of it.
fn replace(file: &Path, text: &str) {
    let beside = file.with_extension("new");
    std::fs::write(&beside, text).unwrap();
    std::fs::rename(&beside, file).unwrap();
}

fn route(body: &str) -> String {
    format!(
        "nodes = []\nwatch_every = '20ms'\n[[routes]]\nname = 'a'\npath = '/*'\nrespond = {{ body = '{body}' }}\n"
    )
}

#[test]
fn a_change_of_the_file_is_taken_and_a_bad_one_is_not() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), route("one")).unwrap();
    let running = Running::start(file.path());
    assert_eq!(running.get("/"), "one");
    replace(file.path(), &route("two"));
    running.logged("config reloaded");
    assert_eq!(running.get("/"), "two");
    replace(file.path(), &route("three").replace("'/*'", "'*'"));
    let line = running.logged("reload refused");
    assert!(
        line.contains("line 5: routes[0].path = \"*\" must begin with /"),
        "{line}"
    );
    assert_eq!(running.get("/"), "two");
    replace(file.path(), &format!("threads = 3\n{}", route("four")));
    let line = running.logged("take effect at the next start");
    assert!(line.contains("threads"), "{line}");
    assert_eq!(running.get("/"), "four");
}

#[test]
fn a_change_of_a_file_that_is_named_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let schema = dir.path().join("schema.json");
    std::fs::write(&schema, "{}").unwrap();
    let file = dir.path().join("gateway.toml");
    let rules = format!("{}validate.schema_file = {schema:?}\n", route("fine"));
    std::fs::write(&file, rules).unwrap();
    let running = Running::start(&file);
    let post = || {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .build();
        let agent: ureq::Agent = agent.into();
        let request = agent.post(&running.url).content_type("application/json");
        request.send("7").unwrap().status().as_u16()
    };
    assert_eq!(post(), 200);
    replace(&schema, r#"{"type": "string"}"#);
    running.logged("config reloaded");
    assert_eq!(post(), 400);
    replace(&schema, "nonsense");
    let line = running.logged("reload refused");
    assert!(line.contains("routes[0].validate.schema_file"), "{line}");
    assert_eq!(post(), 400);
}

#[test]
fn without_nodes_a_gateway_serves_apps_at_once() {
    let runtime = crate::support::runtime();
    let app = Scripted::start(&runtime);
    let file = tempfile::NamedTempFile::new().unwrap();
    let toml = format!(
        "nodes = []\nroutes = [{{ name = 'a', path = '/*', upstream = 'app' }}]\nupstreams.app.servers = ['{}']",
        app.address
    );
    std::fs::write(file.path(), toml).unwrap();
    let running = Running::start(file.path());
    assert_eq!(running.get("/x"), "ok");
    assert_eq!(app.seen()[0].uri, "/x");
    let mut answer = ureq::get(format!("{}/upstreams", running.admin))
        .call()
        .unwrap();
    let state: serde_json::Value =
        serde_json::from_str(&answer.body_mut().read_to_string().unwrap()).unwrap();
    let want =
        serde_json::json!({ "address": app.address, "weight": 1, "available": true, "well": true });
    assert_eq!(state, serde_json::json!({ "app": [want] }));
}
