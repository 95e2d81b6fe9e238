//! One process takes over from another while clients go on.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls_pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, ClientConnection, StreamOwned};

use crate::support::read_head;
use crate::upstream_tls::Authority;

/// A gateway process; killed when dropped.
struct Running {
    child: Child,
    /// What it printed when it was ready; empty if it never was.
    ready: String,
}

impl Running {
    fn start(file: &Path, socket: &Path, upgrade: bool) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gateway"));
        command.arg("--config").arg(file);
        command.arg("--upgrade-socket").arg(socket);
        if upgrade {
            command.arg("--upgrade");
        }
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut ready = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut ready)
            .unwrap();
        Self { child, ready }
    }

    fn address(&self, word: usize) -> SocketAddr {
        let url = self.ready.split_whitespace().nth(word).unwrap();
        url.split_once("//").unwrap().1.parse().unwrap()
    }

    fn ended(mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    fn runs(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A config on free ports, with TLS, that answers `body`.
fn site(dir: &Path, body: &str, threads: u16) -> String {
    let toml = format!(
        "listen = '127.0.0.1:0'\ntls_listen = '127.0.0.1:0'\nadmin_listen = '127.0.0.1:0'\n\
         nodes = []\nthreads = {threads}\ndrain_max = '20s'\n\
         certificates = [{{ cert_file = {:?}, key_file = {:?} }}]\n\
         [[routes]]\nname = 'a'\npath = '/*'\nrespond = {{ body = '{body}' }}\n",
        dir.join("site.pem"),
        dir.join("site.key"),
    );
    std::fs::write(dir.join("gateway.toml"), &toml).unwrap();
    toml
}

fn certificate(dir: &Path) -> Arc<ClientConfig> {
    let authority = Authority::new();
    let (cert, key) = authority.files("localhost");
    std::fs::copy(cert, dir.join("site.pem")).unwrap();
    std::fs::copy(key, dir.join("site.key")).unwrap();
    let config = ClientConfig::builder()
        .with_root_certificates(authority.roots())
        .with_no_client_auth();
    Arc::new(config)
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    stream
}

/// Sends a request and reads its answer. Whether the connection goes on.
fn exchange(stream: &mut (impl Read + Write), path: &str) -> bool {
    write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
    assert!(head.starts_with("http/1.1 200"), "{head}");
    let length = head.split("content-length: ").nth(1).unwrap();
    let length: usize = length.split("\r\n").next().unwrap().parse().unwrap();
    stream.read_exact(&mut vec![0; length]).unwrap();
    !head.contains("connection: close")
}

type Sender = http2::SendRequest<Empty<Bytes>>;

async fn open_h2(address: SocketAddr) -> Sender {
    let stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
    let (sender, connection) = handshake.await.unwrap();
    tokio::spawn(connection);
    sender
}

/// One request. Whether the connection goes on: a server that leaves says so (GOAWAY).
async fn ask_h2(sender: &mut Sender) -> bool {
    if sender.ready().await.is_err() {
        return false;
    }
    let request = http::Request::get("http://localhost/").body(Empty::new());
    match sender.send_request(request.unwrap()).await {
        Ok(answer) => {
            assert_eq!(answer.status(), 200);
            answer.into_body().collect().await.unwrap();
            true
        }
        // It was told before this request was sent.
        Err(error) => {
            assert!(error.is_canceled(), "{error}");
            false
        }
    }
}

/// Clients that ask without a pause, each in its own way. Whatever goes wrong is a panic of theirs.
struct Load {
    stop: Arc<AtomicBool>,
    asked: Arc<AtomicU64>,
    clients: Vec<JoinHandle<()>>,
}

impl Load {
    fn on(gateway: &Running, tls: &Arc<ClientConfig>) -> Self {
        let (plain, admin, secure) = (gateway.address(1), gateway.address(3), gateway.address(5));
        let mut load = Self {
            stop: Arc::default(),
            asked: Arc::default(),
            clients: Vec::new(),
        };
        for _ in 0..3 {
            load.client(move || {
                let mut stream = connect(plain);
                Box::new(move || exchange(&mut stream, "/"))
            });
        }
        // A connection for each.
        load.client(move || {
            Box::new(move || {
                exchange(&mut connect(plain), "/");
                false
            })
        });
        load.client(move || {
            let mut stream = connect(admin);
            Box::new(move || exchange(&mut stream, "/healthz"))
        });
        let tls = Arc::clone(tls);
        load.client(move || {
            let name = ServerName::try_from("localhost").unwrap();
            let session = ClientConnection::new(Arc::clone(&tls), name).unwrap();
            let mut stream = StreamOwned::new(session, connect(secure));
            Box::new(move || exchange(&mut stream, "/"))
        });
        load.client(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            let mut sender = runtime.block_on(open_h2(plain));
            Box::new(move || runtime.block_on(ask_h2(&mut sender)))
        });
        load
    }

    /// `open` gives a connection, which is used as long as it goes on.
    fn client(&mut self, open: impl Fn() -> Box<dyn FnMut() -> bool> + Send + 'static) {
        let (stop, asked) = (Arc::clone(&self.stop), Arc::clone(&self.asked));
        self.clients.push(std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let mut ask = open();
                let mut goes_on = true;
                while goes_on && !stop.load(Ordering::Relaxed) {
                    goes_on = ask();
                    asked.fetch_add(1, Ordering::Relaxed);
                }
            }
        }));
    }

    /// Waits until so many more were answered.
    fn go_on(&self, more: u64) {
        let until = self.asked.load(Ordering::Relaxed) + more;
        while self.asked.load(Ordering::Relaxed) < until {
            assert!(
                !self.clients.iter().any(JoinHandle::is_finished),
                "a client failed"
            );
            std::thread::yield_now();
        }
    }

    /// How many requests were answered; all of them were.
    fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            client.join().unwrap();
        }
        self.asked.load(Ordering::Relaxed)
    }
}

#[test]
fn restarts_in_a_row_fail_no_request() {
    let dir = tempfile::tempdir().unwrap();
    let (file, socket) = (dir.path().join("gateway.toml"), dir.path().join("upgrade"));
    let tls = certificate(dir.path());
    site(dir.path(), "0", 2);
    let mut running = Running::start(&file, &socket, false);
    let ready = running.ready.clone();
    let load = Load::on(&running, &tls);
    load.go_on(200);
    // Also with more and with fewer threads than there are sockets.
    for (round, threads) in [2, 3, 1, 2, 1].into_iter().enumerate() {
        site(dir.path(), &round.to_string(), threads);
        let next = Running::start(&file, &socket, true);
        assert_eq!(next.ready, ready, "the same ports");
        let before = std::mem::replace(&mut running, next);
        assert!(before.ended().success());
        load.go_on(200);
    }
    assert!(load.end() > 1000);
}

#[test]
fn a_successor_that_fails_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (file, socket) = (dir.path().join("gateway.toml"), dir.path().join("upgrade"));
    let tls = certificate(dir.path());
    let good = site(dir.path(), "good", 1);
    let mut running = Running::start(&file, &socket, false);
    let load = Load::on(&running, &tls);
    // One whose file is wrong, one whose files are missing, and two that fail when they have the sockets.
    let missing = dir.path().join("missing/access.log");
    for bad in [
        good.replace("'/*'", "'*'"),
        good.replace("site.pem", "nowhere.pem"),
        format!("access_log.file = {missing:?}\n{good}"),
        format!(
            "admin_listen = '192.0.2.1:1'\nadmin_token = 'x'\n{}",
            good.replace("admin_listen", "colo = 'SFO' #")
        ),
    ] {
        std::fs::write(&file, bad).unwrap();
        let failed = Running::start(&file, &socket, true);
        assert_eq!(failed.ready, "");
        assert!(!failed.ended().success());
        load.go_on(50);
        assert!(running.runs());
    }
    std::fs::write(&file, good).unwrap();
    let next = Running::start(&file, &socket, true);
    assert_eq!(next.ready, running.ready);
    assert!(running.ended().success());
    load.go_on(50);
    load.end();
}

#[test]
fn a_request_under_way_ends_where_it_began() {
    let dir = tempfile::tempdir().unwrap();
    let (file, socket) = (dir.path().join("gateway.toml"), dir.path().join("upgrade"));
    let app = TcpListener::bind("127.0.0.1:0").unwrap();
    let toml = format!(
        "listen = '127.0.0.1:0'\nadmin_listen = '127.0.0.1:0'\nnodes = []\nthreads = 1\n\
         upstreams.app.servers = ['{}']\n\
         routes = [{{ name = 'a', path = '/*', upstream = 'app' }}, {{ name = 'h', path = '/here', respond = {{}} }}]\n",
        app.local_addr().unwrap()
    );
    std::fs::write(&file, toml).unwrap();
    let before = Running::start(&file, &socket, false);
    let mut idle = connect(before.address(1));
    let mut client = connect(before.address(1));
    client
        .write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        .unwrap();
    let (mut upstream, _) = app.accept().unwrap();
    read_head(&mut upstream);
    let next = Running::start(&file, &socket, true);
    assert_eq!(next.ready, before.ready);
    upstream
        .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nlate")
        .unwrap();
    read_head(&mut client);
    let mut body = [0; 4];
    client.read_exact(&mut body).unwrap();
    assert_eq!(&body, b"late");
    // A connection that has said nothing yet is answered too, and told when the old gateway ends.
    while exchange(&mut idle, "/here") {}
    drop((client, upstream));
    assert!(before.ended().success());
}

/// An app that counts what it is asked, in its answers, and keeps writers waiting until it is told.
fn counting_app() -> (SocketAddr, SyncSender<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (tell, told) = sync_channel(1);
    std::thread::spawn(move || {
        let told = Arc::new(Mutex::new(told));
        for (number, stream) in listener.incoming().enumerate() {
            let (mut stream, told) = (stream.unwrap(), Arc::clone(&told));
            std::thread::spawn(move || {
                let lines = match read_head(&mut stream).starts_with("POST") {
                    true => {
                        told.lock().unwrap().recv().unwrap();
                        "dormouse-purge: page"
                    }
                    false => "cache-tag: page",
                };
                let body = number.to_string();
                let length = body.len();
                let answer = format!(
                    "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n{lines}\r\n\r\n{body}"
                );
                stream.write_all(answer.as_bytes()).unwrap();
            });
        }
    });
    (address, tell)
}

#[test]
fn what_the_last_requests_purge_is_dropped_by_the_successor() {
    let dir = tempfile::tempdir().unwrap();
    let (file, socket) = (dir.path().join("gateway.toml"), dir.path().join("upgrade"));
    let (app, write) = counting_app();
    let toml = format!(
        "listen = '127.0.0.1:0'\nadmin_listen = '127.0.0.1:0'\nnodes = []\nthreads = 1\n\
         upstreams.app.servers = ['{app}']\n\
         routes = [{{ name = 'a', path = '/*', upstream = 'app', cache = {{ default_ttl = '1h' }} }}]\n"
    );
    std::fs::write(&file, toml).unwrap();
    let before = Running::start(&file, &socket, false);
    let mut writer = connect(before.address(1));
    writer
        .write_all(
            b"POST /write HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
        )
        .unwrap();
    let page = |gateway: &Running| {
        let mut stream = connect(gateway.address(1));
        stream
            .write_all(b"GET /page HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.split("\r\n\r\n").nth(1).unwrap().to_owned()
    };
    // The request of the writer is with the app when the page is asked for: it was accepted first.
    let mut kept = page(&before);
    let next = Running::start(&file, &socket, true);
    // While the old one may still accept, a page may be asked for twice.
    while page(&next) != kept {
        kept = page(&next);
    }
    write.send(()).unwrap();
    writer.read_to_string(&mut String::new()).unwrap();
    // The old one has ended when the successor knows all that it purged.
    assert!(before.ended().success());
    assert!((0..10_000).any(|_| page(&next) != kept));
}

#[test]
fn without_a_predecessor_an_upgrade_is_a_start_and_two_do_not_share_a_socket() {
    let dir = tempfile::tempdir().unwrap();
    let (file, socket) = (dir.path().join("gateway.toml"), dir.path().join("upgrade"));
    std::fs::write(
        &file,
        "listen = '127.0.0.1:0'\nadmin_listen = '127.0.0.1:0'\nnodes = []",
    )
    .unwrap();
    let first = Running::start(&file, &socket, true);
    assert!(first.ready.starts_with("ready http://"));
    let second = Running::start(&file, &socket, false);
    assert!(
        !second.ended().success(),
        "it would take the place of the first"
    );
    drop(first);
    // It was killed: what it left behind is in nobody's way.
    let third = Running::start(&file, &socket, false);
    assert!(third.ready.starts_with("ready http://"));
}
