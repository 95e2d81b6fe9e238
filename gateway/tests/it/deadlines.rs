//! How long a request may take: what clients say, what the config allows, and what becomes of the exchange.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use gateway::config::Config;
use gateway::server::RingFrom;
use tokio::time::Instant;

use crate::support::{Act, Answer, Front, Scripted, config, ok, read_head, ring, runtime};

const APP: &str = "
    routes = [
        { name = 'app', path = '/*', upstream = 'app' },
        { name = 'short', path = '/short', upstream = 'app', deadline_max = '100ms' },
    ]";

/// A gateway before an app, with what else its config says.
fn before_app(more: &str) -> (Front, Scripted) {
    let runtime = runtime();
    let app = Scripted::start(&runtime);
    let toml = format!(
        "{APP}\n[upstreams.app]\nservers = ['{}']\n{more}",
        app.address
    );
    let given: Config = toml::from_str(&toml).unwrap();
    let mut config = Config {
        routes: given.routes,
        upstreams: given.upstreams,
        ..config()
    };
    config.requests.silence_max = Duration::from_secs(60);
    (Front::start(runtime, &config, RingFrom::Nodes), app)
}

/// The same before whatever `listener` does.
fn before(listener: &TcpListener) -> Front {
    let app = listener.local_addr().unwrap();
    Front::of_apps(&format!("{APP}\nupstreams.app.servers = ['{app}']"))
}

fn ask(front: &Front, method: &str, path: &str, timeout: &str) -> Answer {
    let request = front.request(method, path);
    front.send(request.header("grpc-timeout", timeout), "")
}

#[track_caller]
fn check_over(answer: &Answer) {
    assert_eq!((answer.status, answer.code()), (504, "timed_out"));
    let detail = answer.json()["detail"].as_str().unwrap().to_owned();
    assert!(detail.contains("deadline"), "{detail}");
}

#[test]
fn a_silent_app_costs_a_client_no_more_time_than_it_has() {
    let (front, app) = before_app("eject = { failures = 1 }");
    app.script([Act::Silence, Act::Silence, Act::Silence]);
    let begun = Instant::now();
    for _ in 0..3 {
        // Not tried again, though its method would allow it: there is no time left.
        check_over(&ask(&front, "GET", "/", "100m"));
    }
    assert!(begun.elapsed() < Duration::from_secs(30), "the app has 60");
    assert_eq!(app.count(), 3);
    // That a client was in a hurry says nothing of the server.
    front.eventually("gateway_upstream_ejections_total{upstream=\"app\"}", 0.0);
    assert_eq!(front.get("/").status, 200);
}

#[test]
fn what_is_left_goes_on_to_apps() {
    let (front, app) = before_app("");
    assert_eq!(ask(&front, "GET", "/", "5S").status, 200);
    let seen = app.seen();
    let left = seen[0].headers["grpc-timeout"].to_str().unwrap();
    let (digits, unit) = left.split_at(left.len() - 1);
    let left: u64 = digits.parse().unwrap();
    assert_eq!(unit, "u");
    assert!((1_000_000..=5_000_000).contains(&left), "{left}");
    front.get("/");
    assert!(!app.seen()[0].headers.contains_key("grpc-timeout"));
}

#[test]
fn a_route_has_a_bound_of_its_own() {
    let (front, app) = before_app("");
    app.script([Act::Silence, Act::Silence]);
    check_over(&front.get("/short"));
    // A client cannot have more.
    check_over(&ask(&front, "GET", "/short", "1H"));
    assert_eq!(front.get("/short").status, 200);
}

#[test]
fn time_that_is_over_or_senseless_sends_nothing() {
    let (front, app) = before_app("");
    let answer = ask(&front, "POST", "/", "0m");
    check_over(&answer);
    assert_eq!(answer.json()["retryable"], true, "nothing ran");
    for senseless in ["soon", "5", "-1S", "123456789S"] {
        let answer = ask(&front, "POST", "/", senseless);
        assert_eq!((answer.status, answer.code()), (400, "bad_request"));
    }
    assert_eq!(app.count(), 0);
}

#[test]
fn an_answer_that_comes_a_little_late_is_not_begun() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let front = before(&listener);
    let late = Duration::from_millis(2);
    std::thread::spawn(move || {
        for (place, stream) in listener.incoming().enumerate() {
            let mut stream = stream.unwrap();
            read_head(&mut stream);
            // From a little before to a little after the deadline.
            std::thread::park_timeout(
                Duration::from_millis(18) + late * u32::try_from(place % 8).unwrap(),
            );
            let whole = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\nconnection: close\r\n\r\nabc";
            // Who asked may have left.
            drop(stream.write_all(whole));
        }
    });
    for _ in 0..48 {
        let answer = ask(&front, "GET", "/", "20m");
        match answer.status {
            200 => assert_eq!(answer.body, b"abc"),
            _ => check_over(&answer),
        }
    }
}

#[test]
fn an_answer_that_has_begun_is_broken_off() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let front = before(&listener);
    let serving = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        read_head(&mut stream);
        let head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n";
        stream.write_all(head).unwrap();
        // Until the gateway hangs up.
        std::io::copy(&mut stream, &mut std::io::sink())
    });
    let answer = front.raw("GET / HTTP/1.1\r\nhost: x\r\ngrpc-timeout: 300m\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(!answer.ends_with("0\r\n\r\n"), "{answer}");
    // Closed or reset: it is over for the app, too.
    drop(serving.join().unwrap());
}

#[test]
fn calls_to_counters_end_in_time_and_say_how_much_is_left() {
    let (front, worker) = Front::before_worker();
    let total = r#"{"value":"7","shards":1,"staleness_ms":0}"#;
    worker.script([ok(total), Act::Silence]);
    let read = |timeout| ask(&front, "GET", "/counters/likes", timeout);
    assert_eq!(read("5S").status, 200);
    let seen = worker.seen();
    let left = seen[0].headers["dormouse-timeout"].to_str().unwrap();
    let left: u64 = left.parse().unwrap();
    assert!((1..=5000).contains(&left), "{left}");
    check_over(&read("100m"));
    front.until("the worker hears of it", || worker.cancels() == 1);
    // A plan is for all who wait for it, and a call may carry the increments of many.
    worker.clear();
    worker.script([
        ok(r#"{"version":1,"place":"","shards":1,"strategy":"random","report_every_ms":100}"#),
        ok(r#"{"version":1,"outcome":"counted"}"#),
        Act::Silence,
    ]);
    let increment = |timeout| ask(&front, "POST", "/counters/likes/increment", timeout);
    assert_eq!(increment("5S").status, 200);
    let seen = worker.seen();
    let told = |seen: &crate::support::Seen| seen.headers.contains_key("dormouse-timeout");
    assert_eq!(seen.iter().filter(|seen| told(seen)).count(), 0);
    let over = increment("100m");
    check_over(&over);
    assert_eq!(over.json()["retryable"], false, "it may have been counted");
}

#[test]
fn an_exchange_with_a_worker_is_cancelled() {
    let (front, worker) = Front::before_worker();
    worker.script([Act::Silence, ok("ok")]);
    check_over(&ask(&front, "POST", "/rpc/Counter/a/increment", "100m"));
    front.until("the worker hears of it", || worker.cancels() == 1);
    assert_eq!(
        ask(&front, "POST", "/rpc/Counter/a/increment", "10S").status,
        200
    );
    let seen = worker.seen();
    let left = |at: usize| -> u64 {
        let left = seen[at].headers["dormouse-timeout"].to_str().unwrap();
        left.parse().unwrap()
    };
    assert!((1..=100).contains(&left(0)), "{seen:?}");
    assert!((1000..=10_000).contains(&left(1)), "{seen:?}");
}

#[test]
fn workers_without_links_are_told_too() {
    let runtime = runtime();
    let worker = Scripted::without_links(&runtime);
    let ring = RingFrom::Document(ring(1, worker.address));
    let front = Front::start(runtime, &config(), ring);
    worker.script([Act::Silence]);
    check_over(&ask(&front, "GET", "/objects/Kv/a", "100m"));
    let forged = front
        .request("GET", "/objects/Kv/a")
        .header("dormouse-timeout", "1");
    assert_eq!(front.send(forged, "").status, 200);
    let seen = worker.seen();
    assert!(seen[0].headers.contains_key("dormouse-timeout"));
    assert!(!seen[1].headers.contains_key("dormouse-timeout"));
}

#[test]
fn nothing_is_tried_again_when_there_is_no_time_for_it() {
    // Nobody listens there.
    let gone = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let mut config = config();
    config.retry.pause = Duration::from_secs(20);
    let front = Front::start(runtime(), &config, RingFrom::Document(ring(1, gone)));
    let begun = Instant::now();
    let answer = ask(&front, "GET", "/objects/Kv/a", "5S");
    assert_eq!((answer.status, answer.code()), (503, "unavailable"));
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_body_that_comes_too_late_is_over_as_well() {
    let (front, worker) = Front::before_worker();
    let mut stream = TcpStream::connect(front.gateway.address()).unwrap();
    let head = "POST /rpc/Counter/a/increment HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\ngrpc-timeout: 100m\r\n\r\n[";
    stream.write_all(head.as_bytes()).unwrap();
    let patience = Some(Duration::from_secs(20));
    stream.set_read_timeout(patience).unwrap();
    let head = read_head(&mut stream);
    assert!(head.starts_with("HTTP/1.1 504 "), "{head}");
    assert_eq!(worker.count(), 0);
}
