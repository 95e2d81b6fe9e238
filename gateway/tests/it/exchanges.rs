//! Requests for apps: every form an answer can have, and what becomes of the connection it came on.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use gateway::config::Config;
use gateway::server::RingFrom;

use crate::support::{Front, config, read_head, runtime};

const LARGE: usize = 300_000;

/// An app that answers with bytes, by path.
struct Bytes {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
    /// Each connection that ended after it was asked for `/never`.
    ended: Receiver<()>,
}

impl Bytes {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&connections);
        let (end, ended) = sync_channel(16);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                count.fetch_add(1, Ordering::Relaxed);
                let end = end.clone();
                std::thread::spawn(move || answer_all(stream.unwrap(), &end));
            }
        });
        Self {
            address,
            connections,
            ended,
        }
    }

    fn front(&self) -> Front {
        let given: Config = toml::from_str(&format!(
            "upstreams.app = {{ servers = ['{}'], retry.tries_max = 1 }}
             routes = [{{ name = 'app', path = '/*', upstream = 'app' }}]",
            self.address
        ))
        .unwrap();
        let config = Config {
            routes: given.routes,
            upstreams: given.upstreams,
            threads: 1,
            ..config()
        };
        Front::start(runtime(), &config, RingFrom::Nodes)
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

/// Serves one connection until it ends.
fn answer_all(mut stream: TcpStream, end: &SyncSender<()>) {
    let mut byte = [0];
    while matches!(stream.peek(&mut byte), Ok(1)) {
        let head = read_head(&mut stream);
        let path = head.split(' ').nth(1).unwrap();
        let answer = match path {
            "/chunks" => {
                "200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"
            }
            "/end" => "200 OK\r\n\r\nhello",
            "/hints" => {
                "103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"
            }
            "/more" => "200 OK\r\ncontent-length: 5\r\n\r\nhelloHTTP/1.1 200 OK\r\n\r\n",
            "/close" => "200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhello",
            "/nothing" => "204 No Content\r\n\r\n",
            "/upgrade" => "101 Switching Protocols\r\nupgrade: x\r\n\r\n",
            "/never" => {
                drop(stream.read(&mut byte));
                return end.send(()).unwrap();
            }
            "/large" => {
                let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {LARGE}\r\n\r\n");
                stream.write_all(head.as_bytes()).unwrap();
                stream.write_all(&vec![b'x'; LARGE]).unwrap();
                continue;
            }
            _ => "200 OK\r\ncontent-length: 5\r\nx-a: 1\r\nX-A: 2\r\n\r\nhello",
        };
        let answer = format!("HTTP/1.1 {answer}");
        if path == "/pieces" {
            for byte in answer.as_bytes() {
                stream.write_all(&[*byte]).unwrap();
            }
        } else {
            stream.write_all(answer.as_bytes()).unwrap();
        }
        if matches!(path, "/end" | "/close") {
            return;
        }
    }
}

#[test]
fn every_form_of_an_answer_passes_and_connections_are_kept_that_can_be() {
    let app = Bytes::start();
    let front = app.front();
    for (path, is_kept) in [
        ("/length", true),
        ("/pieces", true),
        ("/chunks", true),
        ("/hints", true),
        ("/end", false),
        ("/more", false),
        ("/close", false),
        ("/length", true),
    ] {
        let answer = front.get(path);
        assert_eq!(
            (answer.status, &answer.body[..]),
            (200, &b"hello"[..]),
            "{path}"
        );
        let before = app.connections();
        assert_eq!(front.get("/length").body, b"hello");
        let opened = app.connections() - before;
        assert_eq!(opened, usize::from(!is_kept), "{path}");
    }
    let answer = front.get("/length");
    let values: Vec<_> = answer.headers.get_all("x-a").iter().collect();
    assert_eq!(values, ["1", "2"]);
    let answer = front.get("/nothing");
    assert_eq!((answer.status, answer.body.len()), (204, 0));
    let before = app.connections();
    let large = front.get("/large").body;
    assert!(large.len() == LARGE && large.iter().all(|byte| *byte == b'x'));
    assert_eq!(front.get("/length").body, b"hello");
    assert_eq!(app.connections(), before, "all of it was read");
    assert_eq!(front.get("/upgrade").status, 503, "nobody asked for one");
}

#[test]
fn a_server_hears_that_nobody_waits_for_its_answer() {
    let app = Bytes::start();
    let front = app.front();
    let mut client = TcpStream::connect(front.gateway.address()).unwrap();
    client
        .write_all(b"GET /never HTTP/1.1\r\nhost: x\r\n\r\n")
        .unwrap();
    front.until("the server is asked", || app.connections() == 1);
    drop(client);
    app.ended.recv().unwrap();
}

#[test]
fn requests_in_one_piece_are_answered_in_turn() {
    let front = Bytes::start().front();
    let one = "GET /length HTTP/1.1\r\nhost: x\r\n\r\n";
    let last = "GET /chunks HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let answers = front.raw(&format!("{one}{one}{last}"));
    assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 3, "{answers}");
    assert_eq!(answers.matches("hello").count(), 2, "{answers}");
    assert!(answers.ends_with("0\r\n\r\n"), "{answers}");
}
