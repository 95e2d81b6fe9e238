//! The public contract for objects, before scripted workers.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use gateway::server::RingFrom;
use protocol::{ClassName, Home, ObjectId, headers};

use crate::support::{
    Act, Front, Scripted, config, ok, read_head, refusal, resident_bytes, ring, runtime,
};

#[test]
fn a_routed_request_carries_who_where_and_which() {
    let (front, worker) = Front::before_worker();
    let request = front
        .request("PUT", "/objects/Kv/r%C3%A4ume%2F1/a%20b?x=%2F")
        .header("x-mine", "1")
        .header("dormouse-object", "forged")
        .header("dormouse-token", "forged")
        .header("Dormouse-Anything", "forged");
    let answer = front.send(request, "body");
    assert_eq!(
        (answer.status, answer.body.as_slice()),
        (200, b"ok".as_slice())
    );
    let seen = worker.seen().remove(0);
    let class: ClassName = "Kv".parse().unwrap();
    let id = ObjectId::named(&class, Home::Global, &"räume/1".parse().unwrap());
    let header = |name: &str| {
        seen.headers
            .get(name)
            .map_or("-", |value| value.to_str().unwrap())
    };
    assert_eq!(
        (seen.method.as_str(), seen.uri.as_str(), &seen.body[..]),
        ("PUT", "/a%20b?x=%2F", &b"body"[..])
    );
    assert_eq!(header("dormouse-class"), "Kv");
    assert_eq!(header("dormouse-object"), id.to_string());
    assert_eq!(header("dormouse-name"), "r%C3%A4ume/1");
    assert_eq!(header("dormouse-shard"), id.shard(128).to_string());
    assert_eq!(header("dormouse-epoch"), "1");
    assert_eq!(header("dormouse-colo"), "SFO");
    assert_eq!(header("dormouse-request").len(), 16);
    assert_eq!(header("traceparent").len(), 55);
    assert_eq!(header("dormouse-token"), "-");
    assert_eq!(header("dormouse-anything"), "-");
    assert_eq!(header("x-mine"), "1");
}

#[test]
fn a_trace_goes_on_and_a_broken_one_begins_anew() {
    let (front, worker) = Front::before_worker();
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let with = |value: &str| {
        front.send(
            front
                .request("GET", "/objects/Kv/a")
                .header("traceparent", value),
            "",
        );
        worker.seen().remove(0).headers["traceparent"]
            .to_str()
            .unwrap()
            .to_owned()
    };
    let passed = with(&format!("00-{trace}-b7ad6b7169203331-01"));
    assert!(
        passed.starts_with(&format!("00-{trace}-")) && passed.ends_with("-01"),
        "{passed}"
    );
    assert!(
        !passed.contains("b7ad6b7169203331"),
        "the gateway is a span of its own: {passed}"
    );
    assert!(!with("00-zero").contains("zero"));
}

#[test]
fn calls_and_new_ids_reach_the_worker_as_such() {
    let (front, worker) = Front::before_worker();
    front.post("/rpc/Counter/a/increment", "[1]");
    let seen = worker.seen().remove(0);
    assert_eq!(
        (seen.uri.as_str(), &seen.headers[headers::METHOD]),
        ("/", &"increment".parse().unwrap())
    );
    front.post("/objects/Counter", "");
    front.post("/objects/Counter", "");
    let seen = worker.seen();
    assert!(seen[0].headers.contains_key(headers::CREATE));
    assert_ne!(
        seen[0].headers[headers::OBJECT],
        seen[1].headers[headers::OBJECT]
    );
}

#[test]
fn an_answer_of_an_object_passes_untouched() {
    let (front, worker) = Front::before_worker();
    let mut own = http::Response::new(http_body_util::Full::new("own words".into()));
    *own.status_mut() = http::StatusCode::NOT_FOUND;
    own.headers_mut().insert("x-own", "kept".parse().unwrap());
    own.headers_mut()
        .append("set-cookie", "a=1".parse().unwrap());
    own.headers_mut()
        .append("set-cookie", "b=2".parse().unwrap());
    worker.script([Act::Answer(own)]);
    let answer = front.get("/objects/Kv/a");
    assert_eq!(
        (answer.status, answer.body.as_slice(), answer.code()),
        (404, b"own words".as_slice(), "-")
    );
    assert_eq!(answer.headers["x-own"], "kept");
    assert_eq!(answer.headers.get_all("set-cookie").iter().count(), 2);
    front.eventually(
        "gateway_requests_total{route=\"objects\",code=\"404\"}",
        1.0,
    );
}

#[test]
fn refusals_of_a_worker_pass_with_their_code() {
    let (front, worker) = Front::before_worker();
    worker.script([refusal(503, "overloaded")]);
    let answer = front.post("/rpc/Counter/a/increment", "");
    assert_eq!((answer.status, answer.code()), (503, "overloaded"));
    front.eventually(
        "gateway_requests_total{route=\"rpc\",code=\"overloaded\"}",
        1.0,
    );
}

#[test]
fn not_owner_makes_the_gateway_learn_the_ring_and_try_again() {
    let runtime = runtime();
    let (old, new) = (Scripted::start(&runtime), Scripted::start(&runtime));
    old.show_ring(ring(1, old.address));
    let mut config = config();
    config.nodes = vec![old.address.to_string()];
    let front = Front::start(runtime, &config, RingFrom::Nodes);
    wait_ready(&front);
    assert_eq!(front.post("/rpc/Counter/a/increment", "[1]").status, 200);
    assert_eq!(old.seen().len(), 1);
    // The shards move: the old worker says so, and shows the new ring.
    old.show_ring(ring(2, new.address));
    old.script([refusal(421, "not_owner")]);
    let answer = front.post("/rpc/Counter/a/increment", "[2]");
    assert_eq!(
        (answer.status, answer.body.as_slice()),
        (200, b"ok".as_slice())
    );
    assert_eq!(old.seen().len(), 1);
    let seen = new.seen();
    assert_eq!(
        (seen.len(), &seen[0].body[..]),
        (1, &b"[2]"[..]),
        "the body was sent again"
    );
    assert_eq!(seen[0].headers[headers::EPOCH], "2");
    front.eventually("gateway_not_owner_total", 1.0);
}

#[test]
fn not_owner_never_reaches_clients() {
    let (front, worker) = Front::before_worker();
    worker.script((0..10).map(|_| refusal(421, "not_owner")));
    let answer = front.post("/rpc/Counter/a/increment", "");
    assert_eq!((answer.status, answer.code()), (503, "unavailable"));
    assert_eq!(answer.json()["retryable"], true, "nothing ran");
    assert_eq!(answer.headers["retry-after"], "1");
    assert_eq!(worker.seen().len(), 5, "tried as often as configured");
}

#[test]
fn an_older_ring_is_not_taken() {
    let runtime = runtime();
    let (first, second) = (Scripted::start(&runtime), Scripted::start(&runtime));
    first.show_ring(ring(5, first.address));
    let mut config = config();
    config.nodes = vec![first.address.to_string()];
    config.retry.ring_refresh = Duration::from_millis(10);
    let front = Front::start(runtime, &config, RingFrom::Nodes);
    wait_ready(&front);
    first.show_ring(ring(4, second.address));
    for _ in 0..20 {
        front.get("/objects/Kv/a");
    }
    assert_eq!(second.seen().len(), 0);
}

#[test]
fn a_worker_that_is_down_is_unavailable_and_nothing_ran() {
    let runtime = runtime();
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let front = Front::start(runtime, &config(), RingFrom::Document(ring(1, free)));
    let answer = front.post("/rpc/Counter/a/increment", "");
    assert_eq!((answer.status, answer.code()), (503, "unavailable"));
    assert_eq!(answer.json()["retryable"], true);
    assert_eq!(answer.headers["content-type"], "application/problem+json");
    front.eventually("gateway_retries_total", 4.0);
}

#[test]
fn without_a_ring_objects_are_unavailable() {
    let dead = TcpListener::bind("127.0.0.1:0").unwrap().local_addr();
    let mut config = config();
    config.nodes = vec![dead.unwrap().to_string()];
    let front = Front::start(runtime(), &config, RingFrom::Nodes);
    let answer = front.get("/objects/Kv/a");
    assert_eq!((answer.status, answer.code()), (503, "unavailable"));
    assert!(
        answer.json()["detail"]
            .as_str()
            .unwrap()
            .contains("no node has told"),
        "{answer:?}"
    );
    assert!(front.gateway.health().is_err());
}

#[test]
fn a_call_whose_connection_breaks_is_not_sent_again() {
    let (front, worker) = Front::before_worker();
    // The second time the connection is a kept one, where proxies are tempted to try again.
    worker.script([ok("ok"), Act::HangUp]);
    front.post("/rpc/Counter/a/increment", "");
    let answer = front.post("/rpc/Counter/a/increment", "");
    assert_eq!((answer.status, answer.code()), (503, "unavailable"));
    assert_eq!(answer.json()["retryable"], false, "it may have run");
    assert_eq!(worker.seen().len(), 2);
}

#[test]
fn an_idempotent_request_survives_a_stale_connection() {
    let (front, worker) = Front::before_worker();
    worker.script([ok("ok"), Act::HangUp]);
    front.get("/objects/Kv/a");
    let answer = front.get("/objects/Kv/a");
    assert_eq!((answer.status, worker.seen().len()), (200, 3));
}

#[test]
fn silence_is_answered_timed_out() {
    let runtime = runtime();
    let worker = Scripted::start(&runtime);
    let mut config = config();
    config.requests.silence_max = Duration::from_millis(100);
    let front = Front::start(
        runtime,
        &config,
        RingFrom::Document(ring(1, worker.address)),
    );
    worker.script([Act::Silence]);
    let answer = front.post("/rpc/Counter/a/increment", "");
    assert_eq!((answer.status, answer.code()), (504, "timed_out"));
}

#[test]
fn bodies_beyond_the_limit_are_refused_announced_or_not() {
    let runtime = runtime();
    let worker = Scripted::start(&runtime);
    let mut config = config();
    config.requests.body_bytes_max = 1000;
    let front = Front::start(
        runtime,
        &config,
        RingFrom::Document(ring(1, worker.address)),
    );
    let body = |bytes: usize| vec![b'x'; bytes];
    assert_eq!(
        front
            .send(front.request("PUT", "/objects/Kv/a/k"), body(1000))
            .status,
        200
    );
    let announced = front.send(front.request("PUT", "/objects/Kv/a/k"), body(1001));
    assert_eq!(
        (announced.status, announced.code()),
        (413, "payload_too_large")
    );
    worker.seen();
    let mut stream = TcpStream::connect(front.gateway.address()).unwrap();
    write!(
        stream,
        "PUT /objects/Kv/a/k HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    .unwrap();
    write!(stream, "3e9\r\n{}\r\n0\r\n\r\n", "x".repeat(1001)).unwrap();
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 413");
}

#[test]
fn a_refused_request_with_a_large_body_still_reads_its_refusal() {
    let (front, worker) = Front::before_worker();
    let answer = front.send(front.request("PUT", "/nowhere"), vec![0; 4 << 20]);
    assert_eq!((answer.status, answer.code()), (404, "not_found"));
    let answer = front.send(front.request("PUT", "/objects/Kv/%00"), vec![0; 4 << 20]);
    assert_eq!((answer.status, answer.code()), (400, "bad_request"));
    assert_eq!(worker.seen().len(), 0, "refused before any object");
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let (front, worker) = Front::before_worker();
    worker.script([ok("one"), ok("two"), ok("three")]);
    let mut client = TcpStream::connect(front.gateway.address()).unwrap();
    client
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let request = "GET /objects/Kv/a HTTP/1.1\r\nhost: x\r\n\r\n";
    client.write_all(request.repeat(3).as_bytes()).unwrap();
    for body in ["one", "two", "three"] {
        assert!(read_head(&mut client).starts_with("HTTP/1.1 200 "));
        let mut received = vec![0; body.len()];
        client.read_exact(&mut received).unwrap();
        assert_eq!(received, body.as_bytes());
    }
}

#[test]
fn a_malformed_body_is_answered() {
    let (front, _worker) = Front::before_worker();
    let mut client = TcpStream::connect(front.gateway.address()).unwrap();
    client
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    write!(
        client,
        "PUT /objects/Kv/a/k HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"
    )
    .unwrap();
    let head = read_head(&mut client);
    assert!(
        head.starts_with("HTTP/1.1 400 ") && head.contains("bad_request"),
        "{head}"
    );
}

#[test]
fn arguments_larger_than_a_call_may_have_are_refused_here() {
    let (front, worker) = Front::before_worker();
    let bytes = (32 << 20) + 1;
    let mut client = TcpStream::connect(front.gateway.address()).unwrap();
    client
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    write!(
        client,
        "POST /rpc/Kv/a/put HTTP/1.1\r\nhost: x\r\ncontent-length: {bytes}\r\n\r\n"
    )
    .unwrap();
    // All of it, before reading: as most clients do.
    std::io::copy(&mut std::io::repeat(b' ').take(bytes), &mut client).unwrap();
    let head = read_head(&mut client);
    assert!(
        head.starts_with("HTTP/1.1 413 ") && head.contains("payload_too_large"),
        "{head}"
    );
    assert_eq!(worker.seen().len(), 0);
}

#[test]
fn a_hundred_megabytes_stream_both_ways() {
    const BYTES: u64 = 100 << 20;
    let (front, worker) = Front::before_worker();
    worker.script([Act::Echo]);
    let before = resident_bytes();
    let mut client = TcpStream::connect(front.gateway.address()).unwrap();
    client
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    let mut sending = client.try_clone().unwrap();
    // Both directions at once: whoever sends all before reading would wait for ever.
    let sender = std::thread::spawn(move || {
        write!(
            sending,
            "POST /objects/Kv/a/echo HTTP/1.1\r\nhost: x\r\ncontent-length: {BYTES}\r\n\r\n"
        )
        .unwrap();
        std::io::copy(&mut std::io::repeat(7).take(BYTES), &mut sending).unwrap();
    });
    assert!(read_head(&mut client).starts_with("HTTP/1.1 200 "));
    let (mut sevens, mut most) = (0, 0);
    let mut buffer = vec![0; 1 << 16];
    while sevens < BYTES {
        let read = client.read(&mut buffer).unwrap();
        assert!(read > 0, "the connection closed after {sevens} bytes");
        // The rest is the framing of chunks.
        sevens += buffer[..read].iter().filter(|&&byte| byte == 7).count() as u64;
        most = most.max(resident_bytes().saturating_sub(before));
    }
    sender.join().unwrap();
    assert!(most < 50 << 20, "streamed, but memory grew by {most} bytes");
}

#[test]
fn an_upgrade_passes_to_the_object() {
    let runtime = runtime();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let front = Front::start(
        runtime,
        &config(),
        RingFrom::Document(ring(1, listener.local_addr().unwrap())),
    );
    let worker = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let head = read_head(&mut stream);
        write!(
            stream,
            "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: shout\r\n\r\n"
        )
        .unwrap();
        let mut bytes = [0; 5];
        stream.read_exact(&mut bytes).unwrap();
        stream.write_all(&bytes.to_ascii_uppercase()).unwrap();
        head
    });
    let mut client = TcpStream::connect(front.gateway.address()).unwrap();
    write!(client, "GET /objects/Probe/a/up HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: shout\r\n\r\n").unwrap();
    let head = read_head(&mut client);
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    client.write_all(b"hello").unwrap();
    let mut shouted = [0; 5];
    client.read_exact(&mut shouted).unwrap();
    assert_eq!(&shouted, b"HELLO");
    let head = worker.join().unwrap().to_lowercase();
    assert!(
        head.contains("upgrade: shout") && head.contains("dormouse-class: probe"),
        "{head}"
    );
}

#[test]
fn a_stopping_gateway_answers_what_is_under_way() {
    let (front, worker) = Front::before_worker();
    let address = front.gateway.address();
    let slow = TcpListener::bind("127.0.0.1:0").unwrap();
    drop(worker);
    let mut config = config();
    config.requests.links = false;
    let Front {
        gateway, runtime, ..
    } = Front::start(
        runtime(),
        &config,
        RingFrom::Document(ring(1, slow.local_addr().unwrap())),
    );
    let busy = gateway.address();
    let client = std::thread::spawn(move || {
        let mut client = TcpStream::connect(busy).unwrap();
        write!(client, "GET /objects/Kv/a HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        read_head(&mut client)
    });
    let (mut stream, _) = slow.accept().unwrap();
    read_head(&mut stream);
    let stopping =
        std::thread::spawn(move || std::sync::Arc::into_inner(gateway).unwrap().shut_down());
    // New connections are refused while the request is still under way.
    while TcpStream::connect(busy).is_ok() {
        std::thread::yield_now();
    }
    write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").unwrap();
    assert!(client.join().unwrap().starts_with("HTTP/1.1 200 "));
    stopping.join().unwrap();
    drop(runtime);
    assert!(
        TcpStream::connect(address).is_ok(),
        "another gateway is not concerned"
    );
}

fn wait_ready(front: &Front) {
    front.runtime.block_on(async {
        while front.gateway.health().is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
}
