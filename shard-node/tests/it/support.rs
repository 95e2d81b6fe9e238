//! A node on free ports, and requests as a gateway would route them.

use std::io::Read;
use std::path::Path;
use std::time::Duration;

use protocol::{ClassName, Home, ObjectId, ObjectName, headers};
use serde_json::Value;
use shard_node::config::Config;
use shard_node::node::Node;

use crate::classes;

/// A node in a directory of its own.
pub(crate) struct TestNode {
    pub(crate) node: Node,
    _dir: tempfile::TempDir,
    agent: ureq::Agent,
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: http::HeaderMap,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("{self:?} is not JSON"))
    }

    pub(crate) fn code(&self) -> &str {
        self.headers
            .get(headers::ERROR)
            .map_or("-", |code| code.to_str().unwrap())
    }

    pub(crate) fn detail(&self) -> String {
        self.json()["detail"].as_str().unwrap().to_owned()
    }
}

pub(crate) fn config(dir: &Path) -> Config {
    Config {
        listen: "127.0.0.1:0".to_owned(),
        data_dir: dir.to_owned(),
        workers: 1,
        ..Config::default()
    }
}

impl TestNode {
    pub(crate) fn start() -> Self {
        Self::with(|_| {})
    }

    pub(crate) fn with(change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(dir.path());
        change(&mut config);
        Self {
            node: Node::start(&config, &classes::all()).unwrap(),
            _dir: dir,
            agent: agent(),
        }
    }

    /// A node on a directory that somebody else owns.
    pub(crate) fn reopen(config: &Config) -> Self {
        Self {
            node: Node::start(config, &classes::all()).unwrap(),
            _dir: tempfile::tempdir().unwrap(),
            agent: agent(),
        }
    }

    /// The same again, after a clean stop.
    pub(crate) fn restart(self) -> Self {
        let Self { node, _dir, agent } = self;
        node.shut_down();
        Self {
            node: Node::start(&config(_dir.path()), &classes::all()).unwrap(),
            _dir,
            agent,
        }
    }

    pub(crate) fn id(&self, class: &str, name: &str) -> ObjectId {
        let class: ClassName = class.parse().unwrap();
        let name: ObjectName = name.parse().unwrap();
        ObjectId::named(&class, Home::Global, &name)
    }

    /// The address of the worker that owns the object.
    pub(crate) fn owner(&self, id: ObjectId) -> String {
        let ring = self.node.ring();
        ring.owner(id.home(), ring.shard_of(id))
            .unwrap()
            .address
            .clone()
    }

    pub(crate) fn request(
        &self,
        method: &str,
        class: &str,
        name: &str,
        path: &str,
    ) -> http::request::Builder {
        let id = self.id(class, name);
        let owner = self.owner(id);
        http::Request::builder()
            .method(method)
            .uri(format!("http://{owner}{path}"))
            .header(headers::CLASS, class)
            .header(headers::OBJECT, id.to_string())
            .header(
                headers::NAME,
                &*headers::encode_name(&name.parse().unwrap()),
            )
            .header(headers::EPOCH, "1")
            .header(headers::REQUEST, "0123456789abcdef")
    }

    pub(crate) fn send(&self, request: http::request::Builder, body: impl AsRef<[u8]>) -> Answer {
        let request = request.body(body.as_ref().to_vec()).unwrap();
        let response = self.agent.run(request).unwrap();
        let (head, body) = response.into_parts();
        let mut bytes = Vec::new();
        body.into_reader().read_to_end(&mut bytes).unwrap();
        Answer {
            status: head.status.as_u16(),
            headers: head.headers,
            body: bytes,
        }
    }

    pub(crate) fn fetch(
        &self,
        method: &str,
        class: &str,
        name: &str,
        path: &str,
        body: impl AsRef<[u8]>,
    ) -> Answer {
        self.send(self.request(method, class, name, path), body)
    }

    pub(crate) fn call(&self, class: &str, name: &str, method: &str, args: Value) -> Answer {
        let request = self
            .request("POST", class, name, "/")
            .header(headers::METHOD, method);
        self.send(request, args.to_string())
    }

    /// The result of a call that must succeed.
    #[track_caller]
    pub(crate) fn result(&self, class: &str, name: &str, method: &str, args: Value) -> Value {
        let answer = self.call(class, name, method, args);
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()
    }

    pub(crate) fn metrics(&self) -> String {
        self.node.registry().handle().render()
    }

    /// The value of one line of the metrics; 0 if it is not there.
    pub(crate) fn metric(&self, line: &str) -> f64 {
        let metrics = self.metrics();
        let value = metrics
            .lines()
            .find_map(|found| found.strip_prefix(line)?.strip_prefix(' '));
        value.map_or(0.0, |value| value.parse().unwrap())
    }
}

pub(crate) fn agent() -> ureq::Agent {
    ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(Duration::from_secs(60)))
        .build()
        .into()
}

/// Waits for something that happens soon, at the latest within 10 seconds.
#[track_caller]
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let patience = std::sync::mpsc::sync_channel::<()>(1);
    for _ in 0..1000 {
        if holds() {
            return;
        }
        // Nobody sends: this only waits.
        patience
            .1
            .recv_timeout(Duration::from_millis(10))
            .unwrap_err();
    }
    panic!("not within 10 seconds: {what}");
}
