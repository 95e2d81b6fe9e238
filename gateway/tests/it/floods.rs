//! What HTTP/2 lets a client do to a server with little effort: each is bounded, and others are served.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use gateway::config::Config;
use gateway::server::RingFrom;

use crate::support::{Act, Front, Scripted, config, resident_bytes, ring, runtime};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Frame types and flags (RFC 9113, 6).
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// `GET http://x/` in HPACK: three entries of the static table, and one name of it with a value.
const GET: &[u8] = &[0x82, 0x84, 0x86, 0x41, 1, b'x'];
/// `POST` of the same.
const POST: &[u8] = &[0x83, 0x84, 0x86, 0x41, 1, b'x'];

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

fn front(change: impl FnOnce(&mut Config)) -> (Front, Scripted) {
    let runtime = runtime();
    let app = Scripted::start(&runtime);
    let toml = format!(
        "routes = [{{ name = 'app', path = '/*', upstream = 'app' }}]
         upstreams.app.servers = ['{}']",
        app.address
    );
    let given: Config = toml::from_str(&toml).unwrap();
    let mut config = Config {
        routes: given.routes,
        upstreams: given.upstreams,
        ..config()
    };
    change(&mut config);
    let ring = RingFrom::Document(ring(1, app.address));
    (Front::start(runtime, &config, ring), app)
}

fn connect(front: &Front) -> TcpStream {
    let mut stream = TcpStream::connect(front.gateway.address()).unwrap();
    let patience = Some(Duration::from_secs(20));
    stream.set_read_timeout(patience).unwrap();
    stream.set_write_timeout(patience).unwrap();
    stream.write_all(PREFACE).unwrap();
    stream.write_all(&frame(SETTINGS, 0, 0, b"")).unwrap();
    stream
}

/// The next frame: type, stream and payload. `None` at the end, or when nothing comes for long.
fn next(stream: &mut TcpStream) -> Option<(u8, u32, Vec<u8>)> {
    let mut head = [0; 9];
    stream.read_exact(&mut head).ok()?;
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
    let mut payload = vec![0; length as usize];
    stream.read_exact(&mut payload).ok()?;
    let number = u32::from_be_bytes(head[5..].try_into().unwrap());
    Some((head[3], number, payload))
}

/// The error of the GOAWAY that ends the connection.
fn goaway(stream: &mut TcpStream) -> Option<u32> {
    let mut error = None;
    while let Some((kind, _, payload)) = next(stream) {
        if kind == GOAWAY {
            error = Some(u32::from_be_bytes(payload[4..8].try_into().unwrap()));
        }
    }
    error
}

const ENHANCE_YOUR_CALM: u32 = 11;

#[test]
fn streams_that_are_reset_as_fast_as_they_begin_end_the_connection() {
    let (front, app) = front(|_| {});
    let mut stream = connect(&front);
    let mut sent = 0;
    for number in (1..40_000).step_by(2) {
        let begin = frame(HEADERS, END_HEADERS | END_STREAM, number, GET);
        let reset = frame(RST_STREAM, 0, number, &8_u32.to_be_bytes());
        if stream.write_all(&[begin, reset].concat()).is_err() {
            break;
        }
        sent += 1;
    }
    let error = goaway(&mut stream);
    assert!(sent < 20_000 || error.is_some(), "{sent} {error:?}");
    assert!(
        error.is_none_or(|error| error == ENHANCE_YOUR_CALM),
        "{error:?}"
    );
    assert!(app.count() < 2000, "{} reached the app", app.count());
    assert_eq!(front.get("/").status, 200);
    front.until("it is gone", || front.metric("gateway_connections") <= 1.0);
}

#[test]
fn resets_while_the_app_works_leave_nothing_under_way() {
    let (front, app) = front(|config| {
        let toml = "in_flight_min = 1\nin_flight_max = 1000";
        let pool = config.upstreams.get_mut("app").unwrap();
        pool.shedding = Some(toml::from_str(toml).unwrap());
    });
    app.answer("/", || Act::Silence);
    let mut stream = connect(&front);
    let in_flight = || front.metric("gateway_concurrency_in_flight{target=\"upstreams.app\"}");
    for round in 0..20_u32 {
        let numbers = (0..10).map(|place| 1 + 2 * (round * 10 + place));
        for number in numbers.clone() {
            let begin = frame(HEADERS, END_HEADERS | END_STREAM, number, GET);
            stream.write_all(&begin).unwrap();
        }
        front.until("all are under way", || in_flight() == 10.0);
        for number in numbers {
            let reset = frame(RST_STREAM, 0, number, &8_u32.to_be_bytes());
            stream.write_all(&reset).unwrap();
        }
        front.until("none is", || in_flight() == 0.0);
    }
}

#[test]
fn a_client_that_left_is_no_failure_of_what_it_asked() {
    let (front, _app) = front(|config| {
        let route = "name = 'fixed'\npath = '/*'\nrespond.body = 'here'";
        config.routes = vec![toml::from_str(route).unwrap()];
    });
    let mut stream = connect(&front);
    let many = 10;
    let requests: Vec<u8> = (0..many)
        .flat_map(|place| {
            let number = 1 + 2 * place;
            let begin = frame(HEADERS, END_HEADERS | END_STREAM, number, GET);
            let reset = frame(RST_STREAM, 0, number, &8_u32.to_be_bytes());
            [begin, reset].concat()
        })
        .collect();
    stream.write_all(&requests).unwrap();
    let count = |code: &str| {
        let line = format!("gateway_requests_total{{route=\"fixed\",code=\"{code}\"}}");
        front.metric(&line)
    };
    front.until("all are counted", || {
        count("200") + count("client_gone") + count("unavailable") == f64::from(many)
    });
    assert_eq!(count("unavailable"), 0.0);
    assert!(count("client_gone") > 0.0, "{}", count("200"));
}

#[test]
fn a_head_without_end_is_not_collected() {
    let (front, app) = front(|_| {});
    let before = resident_bytes();
    let mut stream = connect(&front);
    stream
        .write_all(&frame(HEADERS, END_STREAM, 1, GET))
        .unwrap();
    // `x-a: aaa…`, a literal that is not remembered, again and again.
    let line = [&[0, 3][..], b"x-a", &[100], &[b'a'; 100]].concat();
    let more = frame(CONTINUATION, 0, 1, &line.repeat(100));
    let mut sent = 0;
    while sent < 200 << 20 && stream.write_all(&more).is_ok() {
        sent += more.len();
    }
    assert!(sent < 200 << 20, "all was taken");
    assert!(resident_bytes() < before + (50 << 20));
    assert_eq!(app.count(), 0);
    assert_eq!(front.get("/").status, 200);
    drop(stream);
    front.until("it is gone", || front.metric("gateway_connections") <= 1.0);
}

/// A client that makes the gateway answer and reads nothing: it is not read from any more.
fn flood(frame: &[u8]) {
    let (front, _app) = front(|config| {
        config.connections.idle_max = Duration::from_secs(3);
    });
    let before = resident_bytes();
    let mut stream = connect(&front);
    let wait = Some(Duration::from_millis(500));
    stream.set_write_timeout(wait).unwrap();
    let many = frame.repeat(1000);
    let mut sent = 0;
    while sent < 400 << 20 && stream.write_all(&many).is_ok() {
        sent += many.len();
    }
    assert!(sent < 400 << 20, "it is not held back");
    assert!(resident_bytes() < before + (50 << 20));
    assert_eq!(front.get("/").status, 200);
    front.until("it is gone", || front.metric("gateway_connections") <= 1.0);
}

#[test]
fn pings_whose_answers_nobody_reads_are_held_back() {
    flood(&frame(PING, 0, 0, b"12345678"));
}

#[test]
fn settings_whose_answers_nobody_reads_are_held_back() {
    flood(&frame(SETTINGS, 0, 0, b""));
}

#[test]
fn half_a_head_is_not_waited_for() {
    let (front, _app) = front(|config| {
        config.connections.idle_max = Duration::from_millis(500);
    });
    let mut stream = connect(&front);
    stream
        .write_all(&frame(HEADERS, END_STREAM, 1, GET))
        .unwrap();
    while next(&mut stream).is_some() {}
    front.until("it is gone", || front.metric("gateway_connections") == 0.0);
}

#[test]
fn a_body_that_stops_is_answered() {
    let (front, _app) = front(|config| {
        config.connections.stall_max = Duration::from_millis(300);
    });
    let mut stream = connect(&front);
    // Over a link, so with a length: `:path: /objects/Kv/a` and `content-length: 9`.
    let path = b"/objects/Kv/a";
    let head = [
        &[0x83, 0x86, 0x41, 1, b'x', 0x04, 13][..],
        path,
        &[0x0f, 0x0d, 1, b'9'],
    ]
    .concat();
    assert_eq!(POST[0], head[0]);
    stream
        .write_all(&frame(HEADERS, END_HEADERS, 1, &head))
        .unwrap();
    stream.write_all(&frame(DATA, 0, 1, b"abc")).unwrap();
    let answer = loop {
        let (kind, number, payload) = next(&mut stream).expect("an answer");
        if kind == HEADERS && number == 1 {
            break payload;
        }
    };
    // `:status: 408`, by the name of an entry of the static table; digits may be Huffman coded.
    let plain = answer.windows(3).any(|bytes| bytes == b"408");
    let coded = answer.windows(3).any(|bytes| bytes == [0x68, 0x0f, 0x7f]);
    assert!(plain || coded, "{answer:02x?}");
}
