//! Links, as a gateway uses them and as it must not.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use protocol::link::{
    self, Ask, HEADER_BYTES, Header, Hello, Kind, Request, Response, Routed, STREAMS_MAX, Verdict,
    WELCOME_BYTES, WINDOW_BYTES, Welcome,
};
use protocol::trace::TraceParent;
use protocol::{Home, ObjectId, headers};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

use crate::support::{TestNode, eventually};

/// A gateway's end of a link.
struct Link(TcpStream);

/// A frame of a worker.
#[derive(Debug)]
struct Frame {
    stream: u32,
    kind: Kind,
    end: bool,
    payload: Vec<u8>,
}

impl Frame {
    #[track_caller]
    fn response(&self) -> Response<'_> {
        assert_eq!(self.kind, Kind::Response, "{self:?}");
        Response::read(&self.payload).unwrap()
    }

    #[track_caller]
    fn json(&self) -> Value {
        assert!(self.end, "{self:?}");
        serde_json::from_slice(self.response().body).unwrap()
    }

    #[track_caller]
    fn header(&self, wanted: &str) -> Option<String> {
        let mut headers = self.response().headers;
        let (_, value) = headers.find(|(name, _)| *name == wanted.as_bytes())?;
        Some(String::from_utf8(value.to_vec()).unwrap())
    }
}

impl Link {
    fn open(node: &TestNode) -> Self {
        let (link, welcome) = Self::greet(node, &Hello::write(b"").unwrap());
        assert_eq!(welcome.verdict, Verdict::Accepted);
        assert_eq!(welcome.streams_max, STREAMS_MAX);
        link
    }

    fn greet(node: &TestNode, hello: &[u8]) -> (Self, Welcome) {
        let mut stream = TcpStream::connect(node.node.addresses()[0]).unwrap();
        let patience = Some(Duration::from_secs(20));
        stream.set_read_timeout(patience).unwrap();
        stream.write_all(hello).unwrap();
        let mut welcome = [0; WELCOME_BYTES];
        stream.read_exact(&mut welcome).unwrap();
        (Self(stream), Welcome::read(&welcome).unwrap())
    }

    fn send(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        let mut frames = Vec::new();
        write(&mut frames);
        self.0.write_all(&frames).unwrap();
    }

    /// `None` when the worker closed the link.
    fn read(&mut self) -> Option<Frame> {
        let mut header = [0; HEADER_BYTES];
        self.0.read_exact(&mut header).ok()?;
        let header = Header::read(&header).unwrap().unwrap();
        let mut payload = vec![0; header.payload_bytes];
        self.0.read_exact(&mut payload).ok()?;
        Some(Frame {
            stream: header.stream,
            kind: header.kind,
            end: header.end,
            payload,
        })
    }

    #[track_caller]
    fn next(&mut self) -> Frame {
        self.read().expect("the link closed")
    }

    /// One exchange, alone on the link.
    #[track_caller]
    fn call(&mut self, class: &str, method: &str, args: &Value) -> Frame {
        self.send(|out| call(out, 0, class, "a", method, args));
        self.next()
    }
}

fn routed<'a>(class: &'a str, name: &'a str) -> Routed<'a> {
    Routed {
        id: ObjectId::named(
            &class.parse().unwrap(),
            Home::Global,
            &name.parse().unwrap(),
        ),
        epoch: 1,
        timeout_ms: None,
        trace: TraceParent {
            trace: 0xabc,
            span: 0xdef,
            flags: 1,
        },
        colo: "SFO",
        request: "0123456789abcdef",
        class,
        name: Some(name),
    }
}

fn call(out: &mut Vec<u8>, stream: u32, class: &str, name: &str, method: &str, args: &Value) {
    let ask = Ask::Call { method };
    let none = std::iter::empty();
    let body = args.to_string();
    assert!(link::request(
        out,
        stream,
        &routed(class, name),
        &ask,
        none,
        body.as_bytes()
    ));
}

fn fetch(out: &mut Vec<u8>, stream: u32, method: &str, path_and_query: &str, body: &[u8]) {
    let ask = Ask::Fetch {
        method,
        path_and_query,
    };
    let lines = [
        (&b"x-mine"[..], &b"1"[..]),
        (b"set-cookie", b"a"),
        (b"set-cookie", b"b"),
    ];
    assert!(link::request(
        out,
        stream,
        &routed("Probe", "a"),
        &ask,
        lines.into_iter(),
        body
    ));
}

#[test]
fn many_calls_on_one_link_are_answered_each_and_serially() {
    let node = TestNode::start();
    let mut link = Link::open(&node);
    link.send(|out| {
        (0..1000).for_each(|stream| call(out, stream, "Probe", "a", "read_add_write", &json!([])));
    });
    let mut seen = [false; 1000];
    for _ in 0..1000 {
        let frame = link.next();
        // One caller: what it asked first runs first.
        assert_eq!(frame.json(), u64::from(frame.stream) + 1);
        assert!(!std::mem::replace(&mut seen[frame.stream as usize], true));
    }
    assert_eq!(
        link.call("Probe", "read_add_write", &json!([])).json(),
        1001
    );
}

#[test]
fn a_slow_call_holds_up_nobody() {
    let node = TestNode::start();
    let mut link = Link::open(&node);
    link.send(|out| {
        call(out, 1, "Probe", "slow", "wait", &json!([300]));
        call(out, 2, "Probe", "quick", "instance", &json!([]));
    });
    assert_eq!((link.next().stream, link.next().stream), (2, 1));
}

#[test]
fn a_request_whose_deadline_is_over_is_answered_before_its_turn() {
    let node = TestNode::with(|config| config.mailbox.in_flight_max = 1.try_into().unwrap());
    let mut link = Link::open(&node);
    link.send(|out| {
        call(out, 1, "Probe", "a", "wait", &json!([1500]));
        let hasty = Routed {
            timeout_ms: std::num::NonZeroU32::new(50),
            ..routed("Probe", "a")
        };
        let ask = Ask::Call { method: "write" };
        let none = std::iter::empty();
        assert!(link::request(out, 2, &hasty, &ask, none, b"[\"hasty\"]"));
        call(out, 3, "Probe", "a", "written", &json!([]));
    });
    let late = link.next();
    assert_eq!((late.stream, late.response().status), (2, 504));
    assert_eq!(late.header("dormouse-error").as_deref(), Some("timed_out"));
    assert_eq!(late.json()["retryable"], true, "nothing ran");
    assert_eq!(link.next().stream, 1);
    let last = link.next();
    assert_eq!((last.stream, last.json()), (3, json!(null)));
}

#[test]
fn an_object_sees_the_same_request_as_over_http1() {
    let node = TestNode::start();
    let mut link = Link::open(&node);
    link.send(|out| fetch(out, 0, "PATCH", "/a%20b?x=%2F", b"body"));
    let frame = link.next();
    let seen = frame.json();
    assert_eq!(frame.response().status, 418);
    assert_eq!(frame.header("x-own").as_deref(), Some("kept"));
    assert_eq!(
        frame.header("dormouse-error"),
        None,
        "classes cannot forge it"
    );
    assert_eq!(
        (&seen["method"], &seen["path"], &seen["query"]),
        (&json!("PATCH"), &json!("/a%20b"), &json!("x=%2F"))
    );
    let id = node.id("Probe", "a");
    let want = json!({
        "dormouse-class": "Probe",
        "dormouse-object": id.to_string(),
        "dormouse-name": "a",
        "dormouse-shard": id.shard(128).to_string(),
        "dormouse-epoch": "1",
        "dormouse-colo": "SFO",
        "dormouse-request": "0123456789abcdef",
        "traceparent": "00-00000000000000000000000000000abc-0000000000000def-01",
        "x-mine": "1",
        "set-cookie": "b",
    });
    assert_eq!(seen["headers"], want);
}

#[test]
fn refusals_have_their_code_and_leave_the_link_alone() {
    let node = TestNode::start();
    let mut link = Link::open(&node);
    let answer = link.call("Counter", "nothing", &json!([]));
    assert_eq!(answer.response().status, 404);
    assert_eq!(
        answer.header("dormouse-error").as_deref(),
        Some("not_found")
    );
    let json = answer.json();
    assert_eq!(json["instance"], "urn:dormouse:request:0123456789abcdef");
    let mut newer = routed("Counter", "a");
    newer.epoch = 2;
    let increment = Ask::Call {
        method: "increment",
    };
    let none = std::iter::empty;
    link.send(|out| {
        assert!(link::request(out, 0, &newer, &increment, none(), b""));
    });
    let refused = link.next();
    assert_eq!(
        refused.header("dormouse-error").as_deref(),
        Some("not_owner")
    );
    assert_eq!(
        refused.header(headers::EPOCH.as_str()).as_deref(),
        Some("1")
    );
    let mut misnamed = routed("Counter", "asleep");
    misnamed.name = Some("b");
    link.send(|out| {
        assert!(link::request(out, 0, &misnamed, &increment, none(), b""));
    });
    assert_eq!(link.next().response().status, 400);
    assert_eq!(link.call("Counter", "value", &json!([])).json(), 0);
}

#[test]
fn a_new_id_is_made_over_a_link_too() {
    let node = TestNode::start();
    let mut link = Link::open(&node);
    let none = std::iter::empty();
    link.send(|out| {
        assert!(link::request(
            out,
            0,
            &routed("Kv", "a"),
            &Ask::Create,
            none,
            b""
        ));
    });
    let created = link.next();
    assert_eq!(created.response().status, 201);
    assert_eq!(created.json()["id"], node.id("Kv", "a").to_string());
}

#[test]
fn the_token_is_asked_for_when_a_link_begins() {
    let node = TestNode::with(|config| config.token = "secret".to_owned());
    let verdict = |token: &[u8]| Link::greet(&node, &Hello::write(token).unwrap()).1.verdict;
    assert_eq!(verdict(b""), Verdict::Token);
    assert_eq!(verdict(b"Secret"), Verdict::Token);
    assert_eq!(verdict(b"secret"), Verdict::Accepted);
    let (mut refused, _) = Link::greet(&node, &Hello::write(b"wrong").unwrap());
    // Closed, with nothing answered; the write may still succeed.
    let mut frames = Vec::new();
    call(&mut frames, 0, "Counter", "a", "increment", &json!([]));
    drop(refused.0.write_all(&frames));
    assert!(refused.read().is_none());
    let (mut accepted, _) = Link::greet(&node, &Hello::write(b"secret").unwrap());
    assert_eq!(accepted.call("Counter", "value", &json!([])).json(), 0);
}

#[test]
fn a_version_that_nobody_speaks_is_refused_by_name() {
    let node = TestNode::start();
    let mut hello = Hello::write(b"").unwrap();
    hello[8..12].copy_from_slice(&[9, 0, 12, 0]);
    let (mut link, welcome) = Link::greet(&node, &hello);
    assert_eq!((welcome.version, welcome.verdict), (0, Verdict::Version));
    assert!(link.read().is_none());
    hello[8..12].copy_from_slice(&[1, 0, 12, 0]);
    let (mut link, welcome) = Link::greet(&node, &hello);
    assert_eq!((welcome.version, welcome.verdict), (1, Verdict::Accepted));
    assert_eq!(link.call("Counter", "value", &json!([])).json(), 0);
}

#[test]
fn a_hundred_megabytes_come_as_fast_as_they_are_taken_and_no_faster() {
    const BYTES: usize = 100 << 20;
    let node = TestNode::start();
    let mut link = Link::open(&node);
    link.send(|out| fetch(out, 3, "GET", &format!("/long?{BYTES}"), b""));
    let head = link.next();
    assert_eq!(head.response().status, 200);
    assert!(!head.end);
    // Nobody takes: a window comes, and no byte more. Others are answered.
    let (mut received, mut untaken) = (0, 0);
    while untaken < WINDOW_BYTES as usize {
        let frame = link.next();
        assert_eq!((frame.stream, frame.kind), (3, Kind::Data));
        untaken += frame.payload.len();
    }
    assert_eq!(untaken, WINDOW_BYTES as usize);
    for _ in 0..3 {
        let frame = link.call("Counter", "increment", &json!([]));
        assert_eq!((frame.stream, frame.end), (0, true), "{frame:?}");
    }
    received += untaken;
    loop {
        link.send(|out| link::credit(out, 3, u32::try_from(untaken).unwrap()));
        let frame = link.next();
        assert_eq!((frame.stream, frame.kind), (3, Kind::Data));
        assert!(frame.payload.iter().all(|byte| *byte == 7));
        untaken = frame.payload.len();
        received += untaken;
        if frame.end {
            break;
        }
    }
    assert_eq!(received, BYTES);
    // The number is free again.
    link.send(|out| fetch(out, 3, "GET", "/", b""));
    assert_eq!(link.next().response().status, 418);
}

#[test]
fn what_is_cancelled_ends_and_lets_its_object_go() {
    let node = TestNode::with(|config| config.objects.idle_after = Duration::from_millis(50));
    let awake = || node.metric("shard_objects_awake{class=\"Probe\"}");
    let mut link = Link::open(&node);
    link.send(|out| fetch(out, 5, "GET", "/long?1000000000", b""));
    assert!(!link.next().end);
    assert_eq!(awake(), 1.0);
    link.send(|out| link::frame(out, Kind::Cancel, false, 5, |_| {}));
    let last = loop {
        let frame = link.next();
        if frame.end {
            break frame;
        }
    };
    assert_eq!((last.stream, last.kind), (5, Kind::Broken));
    eventually("the object sleeps", || awake() == 0.0);
    // So does everything when the gateway is gone.
    link.send(|out| fetch(out, 5, "GET", "/long?1000000000", b""));
    assert!(!link.next().end);
    assert_eq!(awake(), 1.0);
    drop(link);
    eventually("the object sleeps", || awake() == 0.0);
}

#[test]
fn a_call_that_is_cancelled_before_its_turn_never_runs() {
    let node = TestNode::with(|config| config.mailbox.in_flight_max = 1.try_into().unwrap());
    let mut link = Link::open(&node);
    link.send(|out| {
        call(out, 0, "Probe", "a", "wait", &json!([200]));
        call(out, 1, "Probe", "a", "read_add_write", &json!([]));
    });
    link.send(|out| link::frame(out, Kind::Cancel, false, 1, |_| {}));
    let cancelled = link.next();
    assert_eq!((cancelled.stream, cancelled.kind), (1, Kind::Broken));
    assert_eq!(link.next().stream, 0);
    assert_eq!(link.call("Probe", "read_add_write", &json!([])).json(), 1);
}

#[test]
fn a_body_that_breaks_off_says_so() {
    let node = TestNode::start();
    let mut link = Link::open(&node);
    link.send(|out| fetch(out, 2, "GET", "/panic_while_streaming", b""));
    assert!(!link.next().end);
    assert_eq!(link.next().payload, b"first");
    let last = link.next();
    assert_eq!((last.kind, last.end), (Kind::Broken, true));
    // 101 to a request that offered nothing.
    link.send(|out| fetch(out, 2, "GET", "/upgrade", b""));
    assert_eq!(link.next().kind, Kind::Broken);
}

#[test]
fn an_answer_to_head_has_a_length_and_no_body() {
    let node = TestNode::start();
    let mut link = Link::open(&node);
    link.send(|out| fetch(out, 0, "HEAD", "/", b""));
    let frame = link.next();
    let length: usize = frame.header("content-length").unwrap().parse().unwrap();
    assert!(frame.end && frame.response().body.is_empty() && length > 100);
}

#[test]
fn a_stopping_worker_answers_what_it_took_and_says_where_it_stopped() {
    let node = TestNode::start();
    let mut link = Link::open(&node);
    link.send(|out| call(out, 0, "Probe", "a", "instance", &json!([])));
    assert_eq!(link.next().stream, 0);
    link.send(|out| call(out, 7, "Probe", "a", "wait", &json!([500])));
    // Taken for sure once a later one is answered.
    link.send(|out| call(out, 8, "Probe", "b", "instance", &json!([])));
    assert_eq!(link.next().stream, 8);
    let stopping = std::thread::spawn(move || node.node.shut_down());
    let retire = link.next();
    assert_eq!((retire.kind, retire.stream), (Kind::Retire, 0));
    assert_eq!(link::read_retire(&retire.payload), Ok(3));
    // Too late: nobody answers it.
    link.send(|out| call(out, 9, "Probe", "a", "instance", &json!([])));
    let last = link.next();
    assert_eq!((last.stream, last.response().status), (7, 200));
    assert!(link.read().is_none());
    drop(link);
    stopping.join().unwrap();
}

/// A request, damaged at a few places.
fn damaged(random: &mut SmallRng) -> Vec<u8> {
    let mut bytes = Vec::new();
    for stream in 0..3 {
        match random.random_range(0..4) {
            0 => fetch(&mut bytes, stream, "GET", "/x", b"body"),
            1 => call(&mut bytes, stream, "Counter", "a", "value", &json!([])),
            2 => link::credit(&mut bytes, stream, random.random()),
            _ => link::frame(&mut bytes, Kind::Cancel, false, stream, |_| {}),
        }
    }
    for _ in 0..random.random_range(0..6) {
        let at = random.random_range(0..bytes.len());
        bytes[at] = random.random();
    }
    bytes.truncate(random.random_range(1..=bytes.len()));
    bytes
}

#[test]
fn no_bytes_of_a_gateway_harm_a_worker() {
    let seed = rand::rng().random();
    eprintln!("seed {seed}");
    let mut random = SmallRng::seed_from_u64(seed);
    let node = TestNode::start();
    for _ in 0..300 {
        let mut stream = TcpStream::connect(node.node.addresses()[0]).unwrap();
        let mut hello = Hello::write(b"").unwrap();
        if random.random_ratio(1, 10) {
            let at = random.random_range(1..hello.len());
            hello[at] = random.random();
        }
        hello.extend(damaged(&mut random));
        // The worker may hang up in the middle of it.
        drop(stream.write_all(&hello));
        drop(stream.shutdown(std::net::Shutdown::Write));
        let mut answers = Vec::new();
        drop(stream.read_to_end(&mut answers));
    }
    let mut link = Link::open(&node);
    assert_eq!(link.call("Counter", "value", &json!([])).json(), 0);
    assert!(node.node.health().is_ok());
}

/// Both ends agree about what [`Request::read`] takes.
#[test]
fn a_request_with_an_id_that_was_never_made_ends_the_link() {
    let node = TestNode::start();
    let mut link = Link::open(&node);
    let mut frames = Vec::new();
    call(&mut frames, 0, "Counter", "a", "value", &json!([]));
    frames[HEADER_BYTES] = 0;
    assert!(Request::read(&frames[HEADER_BYTES..]).is_err());
    link.0.write_all(&frames).unwrap();
    assert!(link.read().is_none());
}
