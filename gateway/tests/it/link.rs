//! Links to workers that are old, slow, rude or gone.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::Duration;

use gateway::server::RingFrom;
use protocol::link::{
    self, HEADER_BYTES, HELLO_BYTES, Header, Hello, Kind, STREAMS_MAX, Verdict, WINDOW_BYTES,
    Welcome,
};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::support::{
    Act, Front, Scripted, config, ok, read_head, refusal, resident_bytes, ring, runtime,
};

/// A worker's end of a link.
pub(crate) struct Worker(TcpStream);

impl Worker {
    /// Takes the next connection and shakes hands.
    pub(crate) fn accept(listener: &TcpListener, verdict: Verdict) -> Self {
        let (mut stream, _) = listener.accept().unwrap();
        let patience = Some(Duration::from_secs(20));
        stream.set_read_timeout(patience).unwrap();
        let mut hello = [0; HELLO_BYTES];
        stream.read_exact(&mut hello).unwrap();
        let token = Hello::read(&hello).unwrap().token_bytes;
        stream.read_exact(&mut vec![0; token as usize]).unwrap();
        let welcome = Welcome {
            version: u16::from(verdict == Verdict::Accepted),
            verdict,
            streams_max: STREAMS_MAX,
        };
        stream.write_all(&welcome.write()).unwrap();
        Self(stream)
    }

    /// `None` when the gateway closed the link.
    fn read(&mut self) -> Option<(Header, Vec<u8>)> {
        let mut header = [0; HEADER_BYTES];
        self.0.read_exact(&mut header).ok()?;
        let header = Header::read(&header).unwrap().unwrap();
        let mut payload = vec![0; header.payload_bytes];
        self.0.read_exact(&mut payload).ok()?;
        Some((header, payload))
    }

    /// The stream of the next request.
    #[track_caller]
    fn request(&mut self) -> u32 {
        self.asked().0
    }

    /// The stream of the next request, and the frame's payload.
    #[track_caller]
    pub(crate) fn asked(&mut self) -> (u32, Vec<u8>) {
        let (header, payload) = self.read().expect("the link closed");
        assert_eq!(header.kind, Kind::Request);
        (header.stream, payload)
    }

    /// Takes the word that nobody waits for a request any more.
    #[track_caller]
    pub(crate) fn cancelled(&mut self) {
        let (header, _) = self.read().expect("the link closed");
        assert_eq!(header.kind, Kind::Cancel);
    }

    pub(crate) fn send(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        let mut frames = Vec::new();
        write(&mut frames);
        self.0.write_all(&frames).unwrap();
    }

    pub(crate) fn answer(&mut self, stream: u32, body: &str) {
        self.send(|out| head(out, stream, true, body.as_bytes()));
    }
}

fn head(out: &mut Vec<u8>, stream: u32, end: bool, body: &[u8]) {
    let lines = [(&b"x-own"[..], &b"kept"[..])];
    assert!(link::response(
        out,
        stream,
        end,
        200,
        lines.into_iter(),
        body
    ));
}

fn data(out: &mut Vec<u8>, stream: u32, end: bool, body: &[u8]) {
    link::frame(out, Kind::Data, end, stream, |out| {
        out.extend_from_slice(body)
    });
}

/// A gateway before a worker that a test plays itself.
fn before_listener() -> (Front, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let ring = RingFrom::Document(ring(1, listener.local_addr().unwrap()));
    (Front::start(runtime(), &config(), ring), listener)
}

pub(crate) fn client(front: &Front) -> TcpStream {
    let client = TcpStream::connect(front.gateway.address()).unwrap();
    let patience = Some(Duration::from_secs(20));
    client.set_read_timeout(patience).unwrap();
    client
}

#[test]
fn many_clients_share_one_connection() {
    let (front, listener) = before_listener();
    let worker = std::thread::spawn(move || {
        let mut worker = Worker::accept(&listener, Verdict::Accepted);
        let streams: Vec<u32> = (0..50).map(|_| worker.request()).collect();
        // All are under way; answered in another order.
        for stream in streams.iter().rev() {
            worker.answer(*stream, &stream.to_string());
        }
        listener.set_nonblocking(true).unwrap();
        assert!(listener.accept().is_err(), "one connection, no more");
        worker
    });
    let clients: Vec<TcpStream> = (0..50)
        .map(|_| {
            let mut client = client(&front);
            write!(client, "GET /objects/Kv/a HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
            client
        })
        .collect();
    for mut client in clients {
        let head = read_head(&mut client).to_lowercase();
        assert!(
            head.starts_with("http/1.1 200 ") && head.contains("x-own: kept"),
            "{head}"
        );
    }
    front.eventually("gateway_links", 1.0);
    drop(worker.join().unwrap());
    front.eventually("gateway_links", 0.0);
}

#[test]
fn an_older_worker_gets_http1() {
    let runtime = runtime();
    let worker = Scripted::without_links(&runtime);
    let ring = RingFrom::Document(ring(1, worker.address));
    let front = Front::start(runtime, &config(), ring);
    assert_eq!(front.post("/rpc/Counter/a/increment", "[1]").status, 200);
    assert_eq!(front.get("/objects/Kv/a/b").status, 200);
    let seen = worker.seen();
    assert_eq!(seen[0].headers["dormouse-method"], "increment");
    assert_eq!(
        &seen[0].body[..],
        b"[1]",
        "read for a link, and sent after all"
    );
    assert_eq!(seen[1].uri, "/b");
    // It is as careful there.
    worker.script([Act::HangUp, refusal(421, "not_owner"), ok("moved")]);
    let broken = front.post("/rpc/Counter/a/increment", "");
    assert_eq!((broken.status, broken.code()), (503, "unavailable"));
    let moved = front.post("/rpc/Counter/a/increment", "");
    assert_eq!(moved.body, b"moved");
}

#[test]
fn links_can_be_switched_off() {
    let runtime = runtime();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut config = config();
    config.requests.links = false;
    let ring = RingFrom::Document(ring(1, listener.local_addr().unwrap()));
    let front = Front::start(runtime, &config, ring);
    let worker = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let head = read_head(&mut stream);
        write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").unwrap();
        head
    });
    assert_eq!(front.get("/objects/Kv/a/b").status, 200);
    assert!(worker.join().unwrap().starts_with("GET /b HTTP/1.1"));
}

#[test]
fn a_refused_token_is_the_gateways_own_fault() {
    let (front, listener) = before_listener();
    let worker = std::thread::spawn(move || Worker::accept(&listener, Verdict::Token).read());
    let answer = front.post("/rpc/Counter/a/increment", "");
    assert_eq!((answer.status, answer.code()), (500, "internal"));
    let detail = answer.json()["detail"].to_string();
    assert!(detail.contains("cluster token"), "{detail}");
    assert!(worker.join().unwrap().is_none(), "nothing was sent");
}

#[test]
fn what_a_stopping_worker_did_not_take_goes_elsewhere_and_nothing_runs_twice() {
    let (front, listener) = before_listener();
    let worker = std::thread::spawn(move || {
        let mut first = Worker::accept(&listener, Verdict::Accepted);
        let (taken, not_taken) = (first.request(), first.request());
        first.send(|out| link::retire(out, 1));
        let mut second = Worker::accept(&listener, Verdict::Accepted);
        let again = second.request();
        second.answer(again, "second");
        first.answer(taken, "first");
        // The gateway closes a link that has nothing more to bring.
        assert!(first.read().is_none());
        assert_ne!(taken, not_taken);
    });
    // Calls, which nobody may repeat without being sure.
    let bodies: Vec<Vec<u8>> = std::thread::scope(|scope| {
        let call = || front.post("/rpc/Counter/a/increment", "").body;
        let calls = [scope.spawn(call), scope.spawn(call)];
        calls.map(|call| call.join().unwrap()).into()
    });
    worker.join().unwrap();
    assert!(bodies.contains(&b"first".to_vec()) && bodies.contains(&b"second".to_vec()));
    front.eventually("gateway_retries_total", 1.0);
}

#[test]
fn a_client_that_hangs_up_cancels_its_request_and_no_other() {
    let (front, listener) = before_listener();
    let mut worker = std::thread::scope(|scope| {
        let worker = scope.spawn(|| Worker::accept(&listener, Verdict::Accepted));
        let mut leaving = client(&front);
        write!(leaving, "GET /objects/Kv/a HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        let mut worker = worker.join().unwrap();
        let left = worker.request();
        let mut staying = client(&front);
        write!(staying, "GET /objects/Kv/a HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        let stays = worker.request();
        leaving.shutdown(Shutdown::Both).unwrap();
        let (cancel, _) = worker.read().unwrap();
        assert_eq!((cancel.kind, cancel.stream), (Kind::Cancel, left));
        worker.send(|out| link::frame(out, Kind::Broken, true, left, |_| {}));
        worker.answer(stays, "ok");
        assert!(read_head(&mut staying).starts_with("HTTP/1.1 200 "));
        worker
    });
    // The number is used again.
    let asking = std::thread::spawn(move || {
        let answer = front.get("/objects/Kv/a");
        (front, answer.body)
    });
    let stream = worker.request();
    worker.answer(stream, "again");
    let (front, body) = asking.join().unwrap();
    assert_eq!(body, b"again");
    front.eventually(
        "gateway_requests_total{route=\"objects\",code=\"client_gone\"}",
        1.0,
    );
}

#[test]
fn a_slow_reader_holds_up_nobody_and_fills_no_memory() {
    const BYTES: usize = 100 << 20;
    let (front, listener) = before_listener();
    let worker = std::thread::spawn(move || {
        let mut worker = Worker::accept(&listener, Verdict::Accepted);
        let slow = worker.request();
        worker.send(|out| head(out, slow, false, b""));
        let (mut left, mut window) = (BYTES, WINDOW_BYTES as usize);
        let part = [7; 32 << 10];
        while left > 0 {
            while window > 0 && left > 0 {
                let bytes = part.len().min(window).min(left);
                worker.send(|out| data(out, slow, false, &part[..bytes]));
                (left, window) = (left - bytes, window - bytes);
            }
            let (header, payload) = worker.read().unwrap();
            match header.kind {
                Kind::Credit => window += link::read_credit(&payload).unwrap() as usize,
                // A quick one in between.
                Kind::Request => worker.answer(header.stream, "quick"),
                other => panic!("{other:?}"),
            }
            assert!(window <= WINDOW_BYTES as usize, "more credit than was used");
        }
        worker.send(|out| data(out, slow, true, b""));
        worker
    });
    let before = resident_bytes();
    let mut slow = client(&front);
    write!(slow, "GET /objects/Kv/slow HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    let head = read_head(&mut slow).to_lowercase();
    assert!(head.contains("transfer-encoding: chunked"), "{head}");
    // It reads nothing, yet others have their answers.
    for _ in 0..20 {
        assert_eq!(front.get("/objects/Kv/quick").body, b"quick");
    }
    let (mut sevens, mut most) = (0, 0);
    let mut buffer = vec![0; 1 << 16];
    while sevens < BYTES {
        let read = slow.read(&mut buffer).unwrap();
        assert!(read > 0, "closed after {sevens} bytes");
        sevens += buffer[..read].iter().filter(|&&byte| byte == 7).count();
        most = most.max(resident_bytes().saturating_sub(before));
    }
    drop(worker.join().unwrap());
    assert!(most < 50 << 20, "memory grew by {most} bytes");
}

#[test]
fn an_answer_that_breaks_off_is_not_taken_for_a_whole_one() {
    let (front, listener) = before_listener();
    let worker = std::thread::spawn(move || {
        let mut worker = Worker::accept(&listener, Verdict::Accepted);
        let stream = worker.request();
        worker.send(|out| {
            head(out, stream, false, b"");
            data(out, stream, false, b"half");
            link::frame(out, Kind::Broken, true, stream, |_| {});
        });
        let stream = worker.request();
        worker.answer(stream, "whole");
    });
    let mut client = client(&front);
    write!(client, "GET /objects/Kv/a HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).unwrap();
    let answer = String::from_utf8(answer).unwrap();
    assert!(
        answer.contains("half") && !answer.ends_with("0\r\n\r\n"),
        "{answer}"
    );
    assert_eq!(front.get("/objects/Kv/a").body, b"whole");
    worker.join().unwrap();
}

#[test]
fn an_answer_that_never_begins_is_not_asked_for_again() {
    let (front, listener) = before_listener();
    let worker = std::thread::spawn(move || {
        let mut worker = Worker::accept(&listener, Verdict::Accepted);
        let stream = worker.request();
        worker.send(|out| link::frame(out, Kind::Broken, true, stream, |_| {}));
        let stream = worker.request();
        worker.answer(stream, "the next request");
    });
    let answer = front.get("/objects/Kv/a");
    assert_eq!((answer.status, answer.code()), (503, "unavailable"));
    assert_eq!(front.get("/objects/Kv/a").body, b"the next request");
    worker.join().unwrap();
}

#[test]
fn no_bytes_of_a_worker_harm_a_gateway() {
    let seed = rand::rng().random();
    eprintln!("seed {seed}");
    let (front, listener) = before_listener();
    let worker = std::thread::spawn(move || {
        let mut random = SmallRng::seed_from_u64(seed);
        // Links that say nonsense; then one that answers.
        for _ in 0..100 {
            let mut worker = Worker::accept(&listener, Verdict::Accepted);
            let stream = worker.request();
            let mut frames = Vec::new();
            head(&mut frames, stream, false, b"x");
            data(&mut frames, stream, random.random(), b"more");
            link::retire(&mut frames, random.random());
            head(&mut frames, stream + 1, true, b"x");
            for _ in 0..random.random_range(1..8) {
                let at = random.random_range(0..frames.len());
                frames[at] = random.random();
            }
            frames.truncate(random.random_range(0..frames.len()));
            worker.0.write_all(&frames).unwrap();
        }
        let mut worker = Worker::accept(&listener, Verdict::Accepted);
        let stream = worker.request();
        worker.answer(stream, "sense");
    });
    // However a request ends, it ends; and the next one finds a new link.
    for _ in 0..1000 {
        let mut client = client(&front);
        write!(
            client,
            "POST /rpc/Counter/a/increment HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        )
        .unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).unwrap();
        if answer.ends_with(b"sense") {
            return worker.join().unwrap();
        }
    }
    panic!("the gateway never got over it");
}
