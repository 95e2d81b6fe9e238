//! Requests that nobody should send: a named answer for each, and nothing slips past to a server.
//!
//! What is smuggled is a second request that the gateway takes for a body and the server for a request, or the
//! other way round (RFC 9112, 11.2). The server here counts what it was asked.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use gateway::config::Config;
use gateway::server::RingFrom;

use crate::support::{Front, Scripted, config, read_head, ring, runtime};

const APP: &str = "routes = [{ name = 'app', path = '/*', upstream = 'app' }]";

fn front() -> (Front, Scripted) {
    let runtime = runtime();
    let app = Scripted::start(&runtime);
    let toml = format!("{APP}\nupstreams.app.servers = ['{}']", app.address);
    let given: Config = toml::from_str(&toml).unwrap();
    let config = Config {
        routes: given.routes,
        upstreams: given.upstreams,
        ..config()
    };
    let ring = RingFrom::Document(ring(1, app.address));
    (Front::start(runtime, &config, ring), app)
}

/// What comes back for these bytes: the statuses, and what the server saw, as `METHOD path body`.
fn exchange(front: &Front, app: &Scripted, bytes: &[u8]) -> (Vec<u16>, Vec<String>) {
    app.clear();
    let mut stream = TcpStream::connect(front.gateway.address()).unwrap();
    // The gateway may hang up before it has all.
    drop(stream.write_all(bytes));
    let mut answer = Vec::new();
    let mut part = [0; 4096];
    let mut patience = Duration::from_secs(10);
    loop {
        stream.set_read_timeout(Some(patience)).unwrap();
        match stream.read(&mut part) {
            Ok(0) | Err(_) => break,
            Ok(count) => answer.extend_from_slice(&part[..count]),
        }
        patience = Duration::from_millis(500);
    }
    let text = String::from_utf8_lossy(&answer).into_owned();
    let statuses = text
        .match_indices("HTTP/1.1 ")
        .filter_map(|(at, _)| text[at + 9..].get(..3)?.parse().ok())
        .collect();
    let seen = app.seen();
    let seen = seen.iter().map(|seen| {
        let body = String::from_utf8_lossy(&seen.body);
        format!("{} {} {body}", seen.method, seen.uri)
            .trim_end()
            .to_owned()
    });
    (statuses, seen.collect())
}

#[test]
fn nothing_is_smuggled() {
    let (front, app) = front();
    let evil = "GET /evil HTTP/1.1\r\nhost: x\r\n\r\n";
    let cases: [(&str, String); 14] = [
        (
            "length and chunks",
            format!(
                "POST /a HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n{evil}"
            ),
        ),
        (
            "chunks and length",
            format!(
                "POST /a HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ncontent-length: 99\r\n\r\n0\r\n\r\n{evil}"
            ),
        ),
        (
            "two lengths",
            format!(
                "POST /a HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\ncontent-length: {}\r\n\r\n{evil}",
                evil.len()
            ),
        ),
        (
            "a list of lengths",
            format!(
                "POST /a HTTP/1.1\r\nhost: x\r\ncontent-length: 0, {}\r\n\r\n{evil}",
                evil.len()
            ),
        ),
        (
            "a signed length",
            format!(
                "POST /a HTTP/1.1\r\nhost: x\r\ncontent-length: +{}\r\n\r\n{evil}",
                evil.len()
            ),
        ),
        (
            "a hexadecimal length",
            format!("POST /a HTTP/1.1\r\nhost: x\r\ncontent-length: 0x20\r\n\r\n{evil}"),
        ),
        (
            "an unknown coding",
            format!(
                "POST /a HTTP/1.1\r\nhost: x\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n{evil}"
            ),
        ),
        (
            "chunked not last",
            format!(
                "POST /a HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n{evil}"
            ),
        ),
        (
            "a space before the colon",
            format!(
                "POST /a HTTP/1.1\r\nhost: x\r\ncontent-length : {}\r\n\r\n{evil}",
                evil.len()
            ),
        ),
        (
            "a folded header",
            format!(
                "POST /a HTTP/1.1\r\nhost: x\r\nx-a: 1\r\n content-length: {}\r\n\r\n{evil}",
                evil.len()
            ),
        ),
        (
            "a bare CR in a header",
            format!(
                "POST /a HTTP/1.1\r\nhost: x\r\nx-a: 1\rcontent-length: {}\r\n\r\n{evil}",
                evil.len()
            ),
        ),
        (
            "a NUL in a header",
            format!(
                "POST /a HTTP/1.1\r\nhost: x\r\nx-a: \0\r\ncontent-length: {}\r\n\r\n{evil}",
                evil.len()
            ),
        ),
        (
            "a huge chunk size",
            format!(
                "POST /a HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffff1\r\n{evil}"
            ),
        ),
        (
            "chunks of HTTP/1.0",
            format!(
                "POST /a HTTP/1.0\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n{evil}"
            ),
        ),
    ];
    for (what, bytes) in &cases {
        let (statuses, seen) = exchange(&front, &app, bytes.as_bytes());
        // A request may be understood or refused, as long as gateway and server agree where it ends: then what
        // follows is a request for both, and answered as such, or for neither.
        let evil = seen
            .iter()
            .filter(|seen| seen.starts_with("GET /evil"))
            .count();
        let answered = statuses.iter().filter(|status| **status == 200).count();
        assert!(
            evil == 0 || answered == seen.len(),
            "{what}: {statuses:?} {seen:?}"
        );
        let refused = statuses.contains(&400);
        assert!(
            refused || seen.len() == answered,
            "{what}: {statuses:?} {seen:?}"
        );
    }
}

#[test]
fn heads_that_are_too_long_or_senseless_are_refused() {
    let (front, app) = front();
    let long = "x".repeat(2 << 20);
    let cases = [
        (
            "a long line",
            format!("GET /{long} HTTP/1.1\r\nhost: x\r\n\r\n"),
        ),
        (
            "a long header",
            format!("GET / HTTP/1.1\r\nhost: x\r\nx-a: {long}\r\n\r\n"),
        ),
        (
            "many headers",
            format!(
                "GET / HTTP/1.1\r\nhost: x\r\n{}\r\n",
                "a: b\r\n".repeat(10_000)
            ),
        ),
        ("no version", "GET /\r\nhost: x\r\n\r\n".to_owned()),
        (
            "another version",
            "GET / HTTP/9.9\r\nhost: x\r\n\r\n".to_owned(),
        ),
        ("no method", " / HTTP/1.1\r\nhost: x\r\n\r\n".to_owned()),
        ("not HTTP", "\u{1}\u{2}\u{3}\r\n\r\n".to_owned()),
        ("no host", "GET / HTTP/1.1\r\n\r\n".to_owned()),
        (
            "two hosts",
            "GET / HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n".to_owned(),
        ),
    ];
    for (what, bytes) in &cases {
        let (statuses, seen) = exchange(&front, &app, bytes.as_bytes());
        // Whoever sends megabytes may miss why they were refused.
        let large = bytes.len() > 1 << 16;
        let missed = statuses.is_empty() && large;
        let want = if large { 431 } else { 400 };
        assert!(
            missed || statuses == [want],
            "{what}: {statuses:?} {seen:?}"
        );
        assert!(seen.is_empty(), "{what}: {seen:?}");
    }
    assert_eq!(front.get("/").status, 200, "and it serves on");
}

#[test]
fn a_space_in_a_path_is_escaped_on() {
    let (front, app) = front();
    let (statuses, seen) = exchange(&front, &app, b"GET /a b HTTP/1.1\r\nhost: x\r\n\r\n");
    assert_eq!((statuses, seen), (vec![200], vec!["GET /a%20b".to_owned()]));
}

#[test]
fn methods_and_forms_of_targets_have_an_answer() {
    let (front, app) = front();
    let ask = |bytes: &str| exchange(&front, &app, bytes.as_bytes());
    let (statuses, seen) = ask("HEAD /a HTTP/1.1\r\nhost: x\r\n\r\n");
    assert_eq!((statuses, seen), (vec![200], vec!["HEAD /a".to_owned()]));
    let (statuses, seen) = ask("GET http://x/a?b HTTP/1.1\r\nhost: x\r\n\r\n");
    assert_eq!((statuses, seen), (vec![200], vec!["GET /a?b".to_owned()]));
    let (statuses, seen) = ask("GET http://x/a?b HTTP/1.1\r\nhost: other\r\n\r\n");
    assert_eq!((statuses, seen.len()), (vec![400], 0), "two hosts");
    let (statuses, seen) = ask("OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n");
    assert_eq!((statuses, seen.len()), (vec![404], 0));
    let (statuses, seen) = ask("CONNECT x:80 HTTP/1.1\r\nhost: x:80\r\n\r\n");
    assert_eq!((statuses, seen.len()), (vec![405], 0), "no tunnels");
}

#[test]
fn pipelined_requests_are_answered_in_turn() {
    let (front, app) = front();
    let three = "GET /1 HTTP/1.1\r\nhost: x\r\n\r\n\
                 POST /2 HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nhi\
                 GET /3 HTTP/1.1\r\nhost: x\r\n\r\n";
    let (statuses, seen) = exchange(&front, &app, three.as_bytes());
    assert_eq!(statuses, [200, 200, 200]);
    assert_eq!(seen, ["GET /1", "POST /2 hi", "GET /3"]);
}

#[test]
fn trailers_end_a_chunked_body() {
    let (front, app) = front();
    let request = "POST /a HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n\
                   2\r\nhi\r\n0\r\nx-sum: 7\r\n\r\nGET /b HTTP/1.1\r\nhost: x\r\n\r\n";
    let (statuses, seen) = exchange(&front, &app, request.as_bytes());
    assert_eq!(
        (statuses.len(), &seen[0]),
        (seen.len(), &"POST /a hi".to_owned()),
        "{statuses:?} {seen:?}"
    );
    assert!(statuses.iter().all(|status| *status == 200), "{statuses:?}");
}

#[test]
fn a_client_that_expects_a_continue_gets_one() {
    let (front, app) = front();
    let mut stream = TcpStream::connect(front.gateway.address()).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    stream
        .write_all(
            b"POST /a HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\nexpect: 100-continue\r\n\r\n",
        )
        .unwrap();
    assert!(read_head(&mut stream).starts_with("HTTP/1.1 100 "));
    stream.write_all(b"hi").unwrap();
    assert!(read_head(&mut stream).starts_with("HTTP/1.1 200 "));
    assert_eq!(&app.seen()[0].body[..], b"hi");
}

/// A gateway before a server that is a function on one connection.
fn before(serve: impl FnOnce(TcpStream) + Send + 'static) -> Front {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let toml = format!(
        "{APP}\nupstreams.app = {{ servers = ['{}'], retry.tries_max = 1 }}",
        listener.local_addr().unwrap()
    );
    std::thread::spawn(move || serve(listener.accept().unwrap().0));
    Front::of_apps(&toml)
}

#[test]
fn answers_that_break_off_or_make_no_sense_are_no_answers() {
    let ask = |answer: &'static str| {
        let front = before(move |mut stream| {
            read_head(&mut stream);
            stream.write_all(answer.as_bytes()).unwrap();
        });
        front.raw("GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    };
    for senseless in [
        "",
        "HTTP/1.1 2",
        "hello\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
    ] {
        let answer = ask(senseless);
        assert!(
            answer.starts_with("HTTP/1.1 503 "),
            "{senseless:?}: {answer}"
        );
        assert!(
            answer.contains("dormouse-error: unavailable"),
            "{senseless:?}: {answer}"
        );
    }
    // What has begun cannot be taken back: the client sees that the end is missing.
    let short = ask("HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc");
    assert!(
        short.starts_with("HTTP/1.1 200 ") && short.ends_with("abc"),
        "{short}"
    );
    let chunked = ask("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n");
    assert!(
        chunked.contains("abc") && !chunked.ends_with("0\r\n\r\n"),
        "{chunked}"
    );
}

#[test]
fn an_answer_before_the_end_of_the_body_reaches_the_client() {
    let front = before(|mut stream| {
        read_head(&mut stream);
        let answer =
            b"HTTP/1.1 413 Payload Too Large\r\ncontent-length: 2\r\nconnection: close\r\n\r\nno";
        stream.write_all(answer).unwrap();
        // The body goes on until nobody takes it.
        let mut rest = [0; 4096];
        while stream.read(&mut rest).is_ok_and(|read| read > 0) {}
    });
    let mut stream = TcpStream::connect(front.gateway.address()).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    stream
        .write_all(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\nbegin")
        .unwrap();
    assert!(read_head(&mut stream).starts_with("HTTP/1.1 413 "));
}

#[test]
fn connections_that_break_off_are_forgotten() {
    let (front, _) = front();
    for end in [
        "",
        "GET",
        "GET / HTTP/1.1\r\nhost: x\r\n",
        "POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nabc",
    ] {
        for _ in 0..20 {
            let mut stream = TcpStream::connect(front.gateway.address()).unwrap();
            stream.write_all(end.as_bytes()).unwrap();
        }
    }
    front.eventually("gateway_connections_total", 80.0);
    front.eventually("gateway_connections", 0.0);
}
