//! Clients that hold what they do not use: heads and bodies that trickle, answers that nobody reads, connections
//! that say nothing. Each ends in time, with a named answer where one can still be given, and leaves nothing
//! behind; others are served meanwhile.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use gateway::config::{Config, ConnectionsConfig};
use gateway::server::RingFrom;
use http::Response;
use http_body_util::Full;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

use crate::support::{Act, Front, Scripted, config, read_head, ring, runtime};

/// A gateway before an app at `/`, and a worker.
fn front(connections: ConnectionsConfig) -> (Front, Scripted) {
    let runtime = runtime();
    let app = Scripted::start(&runtime);
    let toml = format!(
        "routes = [{{ name = 'app', path = '/*', upstream = 'app' }}]
         upstreams.app.servers = ['{}']",
        app.address
    );
    let given: Config = toml::from_str(&toml).unwrap();
    let mut config = Config {
        connections,
        routes: given.routes,
        upstreams: given.upstreams,
        ..config()
    };
    config.requests.silence_max = Duration::from_secs(60);
    let ring = RingFrom::Document(ring(1, app.address));
    (Front::start(runtime, &config, ring), app)
}

/// So many clients begin with `begin` and then send a byte now and then, until they are answered. Ordinary
/// requests are served meanwhile.
#[track_caller]
fn trickle(front: &Front, clients: usize, begin: &'static str, want: &str) {
    let address = front.gateway.address();
    let answers: Vec<String> = std::thread::scope(|scope| {
        let trickling = scope.spawn(|| {
            front.runtime.block_on(async {
                let mut tasks = tokio::task::JoinSet::new();
                for _ in 0..clients {
                    tasks.spawn(async move {
                        let stream = tokio::net::TcpStream::connect(address).await.unwrap();
                        let (mut reading, mut writing) = stream.into_split();
                        writing.write_all(begin.as_bytes()).await.unwrap();
                        let slowly = async {
                            while writing.write_all(b"1").await.is_ok() {
                                tokio::time::sleep(Duration::from_millis(50)).await;
                            }
                            std::future::pending::<()>().await;
                        };
                        let mut answer = Vec::new();
                        tokio::select! {
                            // A byte that came too late may reset the connection after the answer.
                            _ = reading.read_to_end(&mut answer) => {}
                            () = slowly => {}
                        }
                        String::from_utf8_lossy(&answer).into_owned()
                    });
                }
                tasks.join_all().await
            })
        });
        let mut served = 0;
        while !trickling.is_finished() {
            assert_eq!(front.get("/").status, 200);
            served += 1;
        }
        assert!(served > 10, "{served} requests beside them");
        trickling.join().unwrap()
    });
    for answer in &answers {
        assert!(answer.starts_with(want), "{answer:?}");
        assert!(answer.contains("dormouse-error: too_slow"), "{answer}");
    }
}

/// All connections but those of the agent that asks are gone.
#[track_caller]
fn check_no_leak(front: &Front) {
    front.until("connections are gone", || {
        front.metric("gateway_connections") <= 1.0
    });
}

#[test]
fn hundreds_of_heads_that_trickle_are_ended_in_time() {
    let (front, app) = front(ConnectionsConfig {
        head_max: Duration::from_secs(1),
        ..ConnectionsConfig::default()
    });
    let begin = "GET / HTTP/1.1\r\nhost: x\r\nx-slow: ";
    trickle(&front, 400, begin, "HTTP/1.1 408 Request Timeout\r\n");
    check_no_leak(&front);
    let cut = "gateway_connections_cut_total{rule=\"head_max\"}";
    assert_eq!(front.metric(cut), 400.0);
    let seen = app.seen();
    assert!(seen.iter().all(|seen| !seen.headers.contains_key("x-slow")));
}

#[test]
fn many_heads_on_one_connection_are_each_their_own() {
    let (front, _app) = front(ConnectionsConfig {
        head_max: Duration::from_millis(200),
        head_bytes_max: 1024,
        uri_bytes_max: 512,
        ..ConnectionsConfig::default()
    });
    let mut stream = TcpStream::connect(front.gateway.address()).unwrap();
    // Refused at once, without a look at the connection.
    let request = b"GET /objects/Kv HTTP/1.1\r\nhost: x\r\n\r\n";
    for _ in 0..50 {
        stream.write_all(request).unwrap();
        let head = read_head(&mut stream).to_lowercase();
        let length = head.split("content-length: ").nth(1).unwrap();
        let length: usize = length.split("\r\n").next().unwrap().parse().unwrap();
        assert!(head.starts_with("http/1.1 405 "), "{head}");
        stream.read_exact(&mut vec![0; length]).unwrap();
    }
    // Between requests a client may think for longer.
    front.pause(Duration::from_millis(500));
    stream.write_all(request).unwrap();
    assert!(read_head(&mut stream).starts_with("HTTP/1.1 405 "));
}

#[test]
fn hundreds_of_bodies_that_trickle_are_ended_in_time() {
    let (front, _app) = front(ConnectionsConfig {
        body_grace: Duration::from_secs(1),
        ..ConnectionsConfig::default()
    });
    for begin in [
        // To an app, of known and unknown length, and over a link.
        "POST /up HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n",
        "POST /up HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nfffff\r\n",
        "POST /objects/Kv/a HTTP/1.1\r\nhost: x\r\ncontent-length: 10000\r\n\r\n",
    ] {
        trickle(&front, 150, begin, "HTTP/1.1 408 Request Timeout\r\n");
        check_no_leak(&front);
    }
    let cut = "gateway_connections_cut_total{rule=\"body_bytes_per_second_min\"}";
    assert_eq!(front.metric(cut), 450.0);
}

#[test]
fn a_body_that_stops_is_not_waited_for() {
    let (front, _app) = front(ConnectionsConfig {
        stall_max: Duration::from_millis(300),
        ..ConnectionsConfig::default()
    });
    for path in ["/up", "/objects/Kv/a"] {
        let begin = format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nabc");
        let answer = front.raw(&begin);
        assert!(answer.starts_with("HTTP/1.1 408 "), "{path}: {answer}");
    }
    check_no_leak(&front);
}

#[test]
fn a_fast_enough_body_may_take_its_time() {
    let (front, app) = front(ConnectionsConfig {
        body_grace: Duration::from_millis(50),
        ..ConnectionsConfig::default()
    });
    let mut stream = TcpStream::connect(front.gateway.address()).unwrap();
    let head = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 20000\r\n\r\n";
    stream.write_all(head).unwrap();
    for _ in 0..10 {
        stream.write_all(&[b'x'; 2000]).unwrap();
        front.pause(Duration::from_millis(20));
    }
    assert!(read_head(&mut stream).starts_with("HTTP/1.1 200 "));
    assert_eq!(app.seen()[0].body.len(), 20_000);
}

#[test]
fn an_answer_that_nobody_reads_is_given_up() {
    let (front, app) = front(ConnectionsConfig {
        stall_max: Duration::from_millis(300),
        ..ConnectionsConfig::default()
    });
    app.answer("/much", || {
        Act::Answer(Response::new(Full::from(vec![b'x'; 64 << 20])))
    });
    let clients: Vec<TcpStream> = (0..8)
        .map(|_| {
            let mut stream = TcpStream::connect(front.gateway.address()).unwrap();
            let request = b"GET /much HTTP/1.1\r\nhost: x\r\n\r\n";
            stream.write_all(request).unwrap();
            stream
        })
        .collect();
    front.until("they are asked for", || app.count() == 8);
    check_no_leak(&front);
    drop(clients);
}

#[test]
fn connections_that_say_nothing_are_closed() {
    let (front, _app) = front(ConnectionsConfig {
        idle_max: Duration::from_secs(1),
        ..ConnectionsConfig::default()
    });
    let begun = Instant::now();
    assert_eq!(front.raw(""), "");
    let answer = front.raw("GET / HTTP/1.1\r\nhost: x\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(begun.elapsed() < Duration::from_secs(20));
    check_no_leak(&front);
}

#[test]
fn connections_are_bounded_and_places_are_given_back() {
    let (front, _app) = front(ConnectionsConfig {
        open_max: 5.try_into().unwrap(),
        ..ConnectionsConfig::default()
    });
    let connect = || TcpStream::connect(front.gateway.address()).unwrap();
    let held: Vec<TcpStream> = (0..5).map(|_| connect()).collect();
    front.until("all are counted", || {
        front.metric("gateway_connections") == 5.0
    });
    assert_eq!(connect().read(&mut [0]).unwrap(), 0, "closed at once");
    let cut = "gateway_connections_cut_total{rule=\"open_max\"}";
    assert_eq!(front.metric(cut), 1.0);
    drop(held);
    front.eventually("gateway_connections", 0.0);
    assert_eq!(front.get("/").status, 200);
}

#[test]
fn a_client_has_its_own_bound_unless_it_is_a_proxy() {
    let bounded = ConnectionsConfig {
        per_client_max: 2,
        ..ConnectionsConfig::default()
    };
    let (front, _app) = front(bounded.clone());
    let connect = |front: &Front| {
        let mut stream = TcpStream::connect(front.gateway.address()).unwrap();
        let patience = Some(Duration::from_secs(10));
        stream.set_read_timeout(patience).unwrap();
        // A connection that is closed at once may not even take this.
        drop(stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"));
        let mut first = [0];
        let served = matches!(stream.read(&mut first), Ok(1));
        (stream, served)
    };
    let mut held: Vec<_> = (0..2).map(|_| connect(&front)).collect();
    assert!(held.iter().all(|(_, served)| *served));
    assert!(!connect(&front).1, "it has two");
    held.pop();
    front.until("a place is free", || connect(&front).1);

    let runtime = runtime();
    let app = Scripted::start(&runtime);
    let mut config = config();
    config.connections = bounded;
    config.client.trusted_proxies = vec!["127.0.0.0/8".to_owned()];
    let ring = RingFrom::Document(ring(1, app.address));
    let front = Front::start(runtime, &config, ring);
    let held: Vec<_> = (0..5).map(|_| connect(&front)).collect();
    assert!(held.iter().all(|(_, served)| *served));
}

#[test]
fn heads_have_bounds_with_a_name_each() {
    let (front, app) = front(ConnectionsConfig {
        head_bytes_max: 4096,
        headers_max: 20,
        uri_bytes_max: 256,
        ..ConnectionsConfig::default()
    });
    let long = |bytes: usize| "x".repeat(bytes);
    let cases = [
        (
            format!("GET /{}", long(300)),
            String::new(),
            414,
            "uri_too_long",
        ),
        (
            "GET /".to_owned(),
            "a: b\r\n".repeat(30),
            431,
            "headers_too_large",
        ),
        ("GET /".to_owned(), "a: b\r\n".repeat(300), 400, "-"),
        (
            "GET /".to_owned(),
            format!("a: {}\r\n", long(4080)),
            431,
            "headers_too_large",
        ),
        // More than is ever read of a head.
        (
            "GET /".to_owned(),
            format!("a: {}\r\n", long(20_000)),
            431,
            "headers_too_large",
        ),
    ];
    for (line, headers, status, code) in cases {
        let request = format!("{line} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n");
        let answer = front.raw(&request);
        let head = answer.split("\r\n\r\n").next().unwrap().to_lowercase();
        assert!(head.starts_with(&format!("http/1.1 {status} ")), "{head}");
        let named = format!("dormouse-error: {code}");
        assert!(code == "-" || head.contains(&named), "{head}");
    }
    assert_eq!(app.count(), 0);
    assert_eq!(front.get("/").status, 200);
}
