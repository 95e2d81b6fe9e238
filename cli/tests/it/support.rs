//! Processes of the real binary, and requests to them.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use loadtest::process::loopback_host;
use serde_json::Value;

pub(crate) fn dormouse() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dormouse"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("DORMOUSE_")) {
        command.env_remove(name);
    }
    command.stdin(Stdio::null());
    command
}

/// A process that has printed its ready line. Killed when dropped.
pub(crate) struct Process {
    child: Child,
    pub(crate) url: String,
    pub(crate) admin: String,
}

impl Process {
    /// Starts `command` and waits for its ready line.
    #[track_caller]
    pub(crate) fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready = lines.next().expect("it ended before it was ready").unwrap();
        // Whatever else it prints must not block it.
        std::thread::spawn(move || lines.for_each(drop));
        let mut words = ready.split(' ');
        let mut word = |want: Option<&str>| {
            let word = words
                .next()
                .unwrap_or_else(|| panic!("{ready:?} is no ready line"));
            assert!(
                want.is_none_or(|want| want == word),
                "{ready:?} is no ready line"
            );
            word.to_owned()
        };
        word(Some("ready"));
        let url = word(None);
        word(Some("admin"));
        let admin = word(None);
        Self { child, url, admin }
    }

    pub(crate) fn dev(data_dir: &Path) -> Self {
        Self::start(dev(data_dir).stderr(Stdio::inherit()))
    }

    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill")
            .args([&format!("-{name}"), &self.child.id().to_string()])
            .status()
            .unwrap();
        assert!(sent.success());
    }

    /// kill -9.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn wait(mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A free port of a host that no other process has: while what listens there is dead, nobody else gets its port,
/// and with that what its clients send.
pub(crate) fn free_port() -> String {
    format!("{}:0", loopback_host())
}

/// `dormouse dev` on free ports.
pub(crate) fn dev(data_dir: &Path) -> Command {
    serving("dev", data_dir, &free_port())
}

/// `dormouse node` with some workers on free ports.
pub(crate) fn node(data_dir: &Path, workers: &str) -> Command {
    node_at(data_dir, workers, &free_port())
}

pub(crate) fn node_at(data_dir: &Path, workers: &str, listen: &str) -> Command {
    let mut command = serving("node", data_dir, listen);
    command.args(["--workers", workers]);
    command
}

/// `dormouse gateway` on free ports, before a node.
pub(crate) fn gateway(node: &Process) -> Command {
    let mut command = dormouse();
    let worker = node.url.trim_start_matches("http://");
    command.args([
        "gateway",
        "--listen",
        &free_port(),
        "--admin-listen",
        &free_port(),
        "--nodes",
        worker,
    ]);
    command
}

fn serving(name: &str, data_dir: &Path, listen: &str) -> Command {
    let mut command = dormouse();
    command
        .args([
            name,
            "--listen",
            listen,
            "--admin-listen",
            &free_port(),
            "--data-dir",
        ])
        .arg(data_dir);
    command
}

pub(crate) fn agent() -> ureq::Agent {
    ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(Duration::from_secs(60)))
        .build()
        .into()
}

/// Status and body.
pub(crate) fn request(
    agent: &ureq::Agent,
    method: &str,
    url: &str,
    body: &str,
) -> Result<(u16, String), ureq::Error> {
    let request = ureq::http::Request::builder()
        .method(method)
        .uri(url)
        .body(body.to_owned())
        .unwrap();
    let response = agent.run(request)?;
    let status = response.status().as_u16();
    let mut text = String::new();
    response
        .into_body()
        .into_reader()
        .read_to_string(&mut text)?;
    Ok((status, text))
}

/// The result of a call that must succeed.
#[track_caller]
pub(crate) fn call(url: &str, path: &str, args: &Value) -> Value {
    let (status, body) = request(
        &agent(),
        "POST",
        &format!("{url}/rpc/{path}"),
        &args.to_string(),
    )
    .unwrap();
    assert_eq!(status, 200, "{path}: {body}");
    serde_json::from_str(&body).unwrap()
}

/// Waits for something that happens soon, at the latest within 10 seconds.
#[track_caller]
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let (_never, pause) = std::sync::mpsc::sync_channel::<()>(1);
    for _ in 0..200 {
        if holds() {
            return;
        }
        // Nobody sends: this only waits.
        pause.recv_timeout(Duration::from_millis(50)).unwrap_err();
    }
    panic!("not within 10 seconds: {what}");
}

/// The sum of a metric over its labels; 0 if it is not there.
#[track_caller]
pub(crate) fn metric(admin: &str, name: &str) -> f64 {
    let (status, text) = request(&agent(), "GET", &format!("{admin}/metrics"), "").unwrap();
    assert_eq!(status, 200, "{text}");
    let of_name = text.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let (labels, value) = rest.rsplit_once(' ')?;
        (labels.is_empty() || labels.starts_with('{')).then(|| value.parse::<f64>().unwrap())
    });
    of_name.sum()
}
