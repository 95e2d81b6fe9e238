//! A gateway on a free port, and servers that do what a test tells them.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use gateway::config::Config;
use gateway::server::{Gateway, RingFrom};
use http::{Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use protocol::RingVersion;
use protocol::headers;
use protocol::ring::{RingDocument, RingNode};
use tokio::runtime::Runtime;

pub(crate) type Body = BoxBody<Bytes, hyper::Error>;

/// A request as a server saw it.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) method: String,
    pub(crate) uri: String,
    pub(crate) headers: http::HeaderMap,
    pub(crate) body: Bytes,
}

/// What a scripted server does with a request.
pub(crate) enum Act {
    Answer(Response<Full<Bytes>>),
    /// The request's own body, as it comes.
    Echo,
    /// Closes the connection without a word.
    HangUp,
    /// Never answers.
    Silence,
}

pub(crate) fn ok(body: &str) -> Act {
    Act::Answer(Response::new(Full::new(Bytes::copy_from_slice(
        body.as_bytes(),
    ))))
}

pub(crate) fn refusal(status: u16, code: &'static str) -> Act {
    let mut response = Response::new(Full::new(Bytes::from_static(b"{}")));
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    response
        .headers_mut()
        .insert(headers::ERROR, code.parse().unwrap());
    Act::Answer(response)
}

/// A path, and what is always done there.
type Fixed = (String, fn() -> Act);

/// A server that follows a script and remembers what it saw.
#[derive(Clone)]
pub(crate) struct Scripted {
    pub(crate) address: SocketAddr,
    script: Arc<Mutex<VecDeque<Act>>>,
    answers: Arc<Mutex<Vec<Fixed>>>,
    seen: Arc<Mutex<Vec<Seen>>>,
    count: Arc<AtomicUsize>,
    cancels: Arc<AtomicUsize>,
    ring: Arc<Mutex<Option<RingDocument>>>,
    /// Whether it speaks links as workers do, or is older.
    links: bool,
}

impl Scripted {
    pub(crate) fn start(runtime: &Runtime) -> Self {
        Self::with(runtime, true)
    }

    /// One that knows HTTP/1.1 only.
    pub(crate) fn without_links(runtime: &Runtime) -> Self {
        Self::with(runtime, false)
    }

    fn with(runtime: &Runtime, links: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let server = Self {
            address: listener.local_addr().unwrap(),
            script: Arc::default(),
            answers: Arc::default(),
            count: Arc::default(),
            cancels: Arc::default(),
            seen: Arc::default(),
            ring: Arc::default(),
            links,
        };
        let this = server.clone();
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let this = this.clone();
                tokio::spawn(async move {
                    let mut first = [1];
                    drop(stream.peek(&mut first).await);
                    if first[0] == protocol::link::MAGIC[0] && this.links {
                        return crate::scripted_link::serve(stream, this).await;
                    }
                    let service = service_fn(move |request| this.clone().act(request));
                    // A script that hangs up ends a connection with an error.
                    drop(
                        http1::Builder::new()
                            .serve_connection(TokioIo::new(stream), service)
                            .with_upgrades()
                            .await,
                    );
                });
            }
        });
        server
    }

    /// What to do with the requests to come, in this order; afterwards `200 ok`.
    pub(crate) fn script(&self, acts: impl IntoIterator<Item = Act>) {
        self.script.lock().unwrap().extend(acts);
    }

    /// What to do with all requests for this path, or all calls of this method, outside of the script.
    pub(crate) fn answer(&self, path: &str, act: fn() -> Act) {
        self.answers.lock().unwrap().push((path.to_owned(), act));
    }

    /// Forgets what is left of the script, and what was seen.
    pub(crate) fn clear(&self) {
        self.script.lock().unwrap().clear();
        self.seen();
    }

    /// Requests since the start.
    pub(crate) fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    pub(crate) fn note_cancel(&self) {
        self.cancels.fetch_add(1, Ordering::Relaxed);
    }

    /// Requests over links that were cancelled since the start.
    pub(crate) fn cancels(&self) -> usize {
        self.cancels.load(Ordering::Relaxed)
    }

    /// The ring that this server shows, if it is asked as a node.
    pub(crate) fn show_ring(&self, document: RingDocument) {
        *self.ring.lock().unwrap() = Some(document);
    }

    /// What it saw since the last look.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }

    fn pop_act(&self, path: &str, headers: &http::HeaderMap) -> Act {
        let method = headers.get(headers::METHOD);
        let fixed = {
            let answers = self.answers.lock().unwrap();
            let fixed = answers
                .iter()
                .find(|(known, _)| known == path || method.is_some_and(|method| method == known));
            fixed.map(|(_, act)| act())
        };
        fixed
            .or_else(|| self.script.lock().unwrap().pop_front())
            .unwrap_or_else(|| ok("ok"))
    }

    /// Remembers a request that came whole; what to do with it.
    pub(crate) fn next_act(&self, seen: Seen) -> Act {
        self.count.fetch_add(1, Ordering::Relaxed);
        let act = self.pop_act(&seen.uri, &seen.headers);
        self.seen.lock().unwrap().push(seen);
        act
    }

    async fn act(self, request: Request<Incoming>) -> Result<Response<Body>, Silence> {
        if request.uri().path() == headers::RING_PATH {
            let ring = self.ring.lock().unwrap().clone();
            let body = serde_json::to_vec(&ring).unwrap();
            return Ok(Response::new(full(Full::new(body.into()))));
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        let act = self.pop_act(request.uri().path(), request.headers());
        let (head, body) = request.into_parts();
        let mut seen = Seen {
            method: head.method.to_string(),
            uri: head.uri.to_string(),
            headers: head.headers,
            body: Bytes::new(),
        };
        match act {
            Act::Echo => {
                self.seen.lock().unwrap().push(seen);
                Ok(Response::new(body.boxed()))
            }
            Act::Answer(response) => {
                seen.body = body
                    .collect()
                    .await
                    .map(|body| body.to_bytes())
                    .unwrap_or_default();
                self.seen.lock().unwrap().push(seen);
                Ok(response.map(full))
            }
            Act::HangUp => {
                self.seen.lock().unwrap().push(seen);
                Err(Silence)
            }
            Act::Silence => {
                self.seen.lock().unwrap().push(seen);
                std::future::pending().await
            }
        }
    }
}

fn full(body: Full<Bytes>) -> Body {
    body.map_err(|never: Infallible| match never {}).boxed()
}

#[derive(Debug, thiserror::Error)]
#[error("the script says to hang up")]
pub(crate) struct Silence;

/// A gateway before some scripted servers.
pub(crate) struct Front {
    pub(crate) gateway: Arc<Gateway>,
    pub(crate) runtime: Runtime,
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
    pub(crate) fn code(&self) -> &str {
        self.headers
            .get(headers::ERROR)
            .map_or("-", |code| code.to_str().unwrap())
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("{self:?} is not JSON"))
    }
}

pub(crate) fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

/// A ring of one node with one worker.
pub(crate) fn ring(version: u64, worker: SocketAddr) -> RingDocument {
    RingDocument {
        version: RingVersion(version.try_into().unwrap()),
        shards: 128,
        nodes: vec![RingNode {
            name: "n".to_owned(),
            weight: 1,
            colo: None,
            workers: vec![worker.to_string()],
        }],
    }
}

/// One thread and short times, so that tests are quick.
pub(crate) fn config() -> Config {
    let mut config = Config {
        listen: "127.0.0.1:0".to_owned(),
        colo: "SFO".to_owned(),
        threads: 1,
        nodes: Vec::new(),
        ..Config::default()
    };
    config.retry.pause = Duration::from_millis(5);
    config.retry.ring_refresh = Duration::from_secs(3600);
    config.requests.silence_max = Duration::from_secs(5);
    config
}

impl Front {
    pub(crate) fn start(runtime: Runtime, config: &Config, ring: RingFrom) -> Self {
        let gateway = runtime.block_on(Gateway::start(config, ring)).unwrap();
        Self {
            gateway: Arc::new(gateway),
            runtime,
            agent: ureq::Agent::config_builder()
                .http_status_as_error(false)
                .timeout_global(Some(Duration::from_secs(60)))
                .build()
                .into(),
        }
    }

    /// A gateway without nodes, with the routes and upstreams of `toml`.
    pub(crate) fn of_apps(toml: &str) -> Self {
        let given: Config = toml::from_str(toml).unwrap();
        let config = Config {
            routes: given.routes,
            upstreams: given.upstreams,
            ..config()
        };
        Self::start(runtime(), &config, RingFrom::Nodes)
    }

    /// A gateway before one scripted worker.
    pub(crate) fn before_worker() -> (Self, Scripted) {
        let runtime = runtime();
        let worker = Scripted::start(&runtime);
        let ring = RingFrom::Document(ring(1, worker.address));
        (Self::start(runtime, &config(), ring), worker)
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.gateway.address())
    }

    pub(crate) fn request(&self, method: &str, path: &str) -> http::request::Builder {
        Request::builder().method(method).uri(self.url(path))
    }

    pub(crate) fn send(&self, request: http::request::Builder, body: impl AsRef<[u8]>) -> Answer {
        let response = self
            .agent
            .run(request.body(body.as_ref().to_vec()).unwrap())
            .unwrap();
        let (head, body) = response.into_parts();
        let mut bytes = Vec::new();
        body.into_reader().read_to_end(&mut bytes).unwrap();
        Answer {
            status: head.status.as_u16(),
            headers: head.headers,
            body: bytes,
        }
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        self.send(self.request("GET", path), "")
    }

    pub(crate) fn post(&self, path: &str, body: &str) -> Answer {
        self.send(self.request("POST", path), body)
    }

    /// What comes back for these bytes, until the gateway closes the connection.
    pub(crate) fn raw(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(self.gateway.address()).unwrap();
        let wait = Some(Duration::from_secs(30));
        stream.set_read_timeout(wait).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// A line of the metrics, now.
    pub(crate) fn metric(&self, line: &str) -> f64 {
        let metrics = self.gateway.render_metrics();
        let found = metrics
            .lines()
            .find_map(|found| found.strip_prefix(line)?.strip_prefix(' '));
        found.map_or(0.0, |value| value.parse().unwrap())
    }

    pub(crate) fn pause(&self, time: Duration) {
        self.runtime
            .block_on(async { tokio::time::sleep(time).await });
    }

    /// Waits until it is so.
    #[track_caller]
    pub(crate) fn until(&self, what: &str, is_so: impl Fn() -> bool) {
        for _ in 0..4000 {
            if is_so() {
                return;
            }
            self.pause(Duration::from_millis(5));
        }
        panic!("never: {what}");
    }

    /// Waits until a line of the metrics has this value: requests are counted after their answer left.
    #[track_caller]
    pub(crate) fn eventually(&self, line: &str, value: f64) {
        let found = || {
            let metrics = self.gateway.render_metrics();
            let found = metrics
                .lines()
                .find_map(|found| found.strip_prefix(line)?.strip_prefix(' '));
            found.map_or(0.0, |value| value.parse().unwrap())
        };
        self.runtime.block_on(async {
            for _ in 0..1000 {
                if found() == value {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        assert_eq!(found(), value, "{line}");
    }
}

/// The next head of an answer or a request, with the empty line.
pub(crate) fn read_head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    String::from_utf8(head).unwrap()
}

/// Memory of this process that is in RAM.
pub(crate) fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        * 1024
}
