//! Pools: which server gets a request, and what happens when servers fail.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use gateway::config::Config;
use gateway::server::RingFrom;
use http::StatusCode;

use crate::support::{Act, Front, Scripted, config, ok, refusal, runtime};

/// A pool `app` of these servers with these settings, and a route for everything to it.
fn with_pool(servers: &[&Scripted], settings: &str) -> Config {
    let servers: Vec<String> = servers.iter().map(|s| s.address.to_string()).collect();
    let toml = format!(
        "routes = [{{ name = 'app', path = '/*', upstream = 'app' }}]
         [upstreams.app]
         servers = {servers:?}
         {settings}"
    );
    let given: Config = toml::from_str(&toml).unwrap();
    let config = Config {
        routes: given.routes,
        upstreams: given.upstreams,
        ..config()
    };
    config.validate().unwrap();
    config
}

fn pool<const N: usize>(settings: &str) -> (Front, [Scripted; N]) {
    let runtime = runtime();
    let servers: [Scripted; N] = std::array::from_fn(|_| Scripted::start(&runtime));
    let config = with_pool(&servers.iter().collect::<Vec<_>>(), settings);
    (Front::start(runtime, &config, RingFrom::Nodes), servers)
}

#[test]
fn a_key_stays_with_its_server() {
    let (front, servers) = pool::<3>("balance = 'hash'\nkey = '{query.k}'");
    let mut home = HashMap::new();
    for round in 0..3 {
        for key in 0..30 {
            assert_eq!(front.get(&format!("/?k={key}")).status, 200);
            let at = servers.iter().position(|server| !server.seen().is_empty());
            let before = home.insert(key, at.unwrap());
            assert!(round == 0 || before == at, "key {key} moved");
        }
    }
    let used: std::collections::HashSet<_> = home.values().collect();
    assert_eq!(used.len(), 3, "every server has keys");
    // Without the key, any server will do.
    (0..3).for_each(|_| assert_eq!(front.get("/").status, 200));
    assert!(servers.iter().all(|server| server.seen().len() == 1));
}

#[test]
fn a_sticky_cookie_keeps_a_client_with_its_server() {
    let (front, servers) = pool::<2>("sticky_cookie = 'app'");
    let first = front.get("/");
    let cookie = first.headers["set-cookie"].to_str().unwrap().to_owned();
    let (pair, rest) = cookie.split_once("; ").unwrap();
    assert_eq!(rest, "Path=/; HttpOnly; SameSite=Lax");
    let at = servers
        .iter()
        .position(|server| !server.seen().is_empty())
        .unwrap();
    for _ in 0..5 {
        let request = front
            .request("GET", "/")
            .header("cookie", format!("x=1; {pair}"));
        let answer = front.send(request, "");
        assert!(!answer.headers.contains_key("set-cookie"));
    }
    assert_eq!(servers[at].seen().len(), 5);
    let request = front.request("GET", "/").header("cookie", "app=forged");
    assert!(front.send(request, "").headers.contains_key("set-cookie"));
}

#[test]
fn least_connections_avoids_a_busy_server() {
    let (front, servers) = pool::<2>("balance = 'least-connections'");
    servers[0].script([Act::Silence]);
    servers[1].script([Act::Silence]);
    let mut busy = TcpStream::connect(front.gateway.address()).unwrap();
    busy.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        .unwrap();
    let at = loop {
        if let Some(at) = servers.iter().position(|server| !server.seen().is_empty()) {
            break at;
        }
        std::thread::yield_now();
    };
    let free = &servers[1 - at];
    free.clear();
    for _ in 0..6 {
        assert_eq!(front.get("/").status, 200);
    }
    assert_eq!((free.seen().len(), servers[at].seen().len()), (6, 0));
}

#[test]
fn servers_get_requests_by_weight() {
    let runtime = runtime();
    let (one, two) = (Scripted::start(&runtime), Scripted::start(&runtime));
    let mut config = with_pool(&[&one, &two], "");
    let given: Config = toml::from_str(&format!(
        "upstreams.app.servers = ['{}', {{ address = '{}', weight = 3 }}]",
        one.address, two.address
    ))
    .unwrap();
    config.upstreams = given.upstreams;
    let front = Front::start(runtime, &config, RingFrom::Nodes);
    (0..8).for_each(|_| assert_eq!(front.get("/").status, 200));
    assert_eq!((one.seen().len(), two.seen().len()), (2, 6));
}

#[test]
fn a_server_that_says_it_is_ill_gets_nothing_until_it_is_well() {
    let (front, [one, two]) = pool::<2>(
        "health = { path = '/health', every = '10ms', down_after = 2, up_after = 2, status = [204] }",
    );
    // Health checks are answered `200 ok` by default, which is not 204: both are ill, and both are tried.
    let available = "gateway_upstream_servers_available{upstream=\"app\"}";
    front.eventually(available, 0.0);
    assert!(
        front
            .gateway
            .health()
            .unwrap_err()
            .contains("no server of any upstream is well (app)")
    );
    assert_eq!(front.get("/x").status, 200);
    let well = || {
        let mut answer = http::Response::new(http_body_util::Full::new("".into()));
        *answer.status_mut() = StatusCode::NO_CONTENT;
        Act::Answer(answer)
    };
    one.answer("/health", well);
    front.eventually(available, 1.0);
    assert_eq!(
        front.gateway.health(),
        Ok(()),
        "without nodes no ring is waited for"
    );
    one.clear();
    two.clear();
    (0..6).for_each(|_| assert_eq!(front.get("/x").status, 200));
    let count = |server: &Scripted| server.seen().iter().filter(|s| s.uri == "/x").count();
    assert_eq!((count(&one), count(&two)), (6, 0));
    two.answer("/health", well);
    front.eventually(available, 2.0);
    (0..6).for_each(|_| assert_eq!(front.get("/x").status, 200));
    assert_eq!((count(&one), count(&two)), (3, 3));
    let asked = two.seen().into_iter().find(|seen| seen.uri == "/health");
    assert!(asked.is_none_or(|seen| seen.headers["user-agent"] == "dormouse-health"));
}

#[test]
fn a_server_that_fails_in_a_row_is_left_out_and_taken_back() {
    let (front, [one, two]) = pool::<2>("eject = { failures = 3, pause = '300ms' }");
    one.script((0..3).map(|_| refusal(503, "overloaded")));
    let failed = (0..6).filter(|_| front.get("/").status == 503).count();
    assert_eq!(failed, 3);
    front.eventually("gateway_upstream_ejections_total{upstream=\"app\"}", 1.0);
    one.clear();
    two.clear();
    (0..6).for_each(|_| assert_eq!(front.get("/").status, 200));
    assert_eq!((one.seen().len(), two.seen().len()), (0, 6));
    front.eventually("gateway_upstream_servers_available{upstream=\"app\"}", 2.0);
    (0..6).for_each(|_| assert_eq!(front.get("/").status, 200));
    assert_eq!(one.seen().len(), 3);
}

#[test]
fn what_was_sent_is_sent_again_only_if_that_is_idempotent() {
    let (front, [one, two]) = pool::<2>("");
    let calls = || one.seen().len() + two.seen().len();
    let hang_up = || {
        one.clear();
        two.clear();
        one.script([Act::HangUp]);
        two.script([Act::HangUp]);
    };
    hang_up();
    assert_eq!((front.get("/").status, calls()), (200, 3), "the third try");
    hang_up();
    let body = "x".repeat(1000);
    let put = front.send(front.request("PUT", "/"), &body);
    assert_eq!(put.status, 200);
    let seen: Vec<_> = [one.seen(), two.seen()].concat();
    assert!(
        seen.iter().any(|seen| seen.body == body),
        "the body was sent again"
    );
    hang_up();
    let answer = front.post("/", "x");
    assert_eq!(
        (answer.status, answer.code(), calls()),
        (503, "unavailable", 1)
    );
    assert_eq!(answer.json()["retryable"], false);
}

#[test]
fn statuses_may_be_tried_again_and_the_last_one_passes() {
    let (front, [one, two]) = pool::<2>("retry = { status = [503], tries_max = 3 }");
    let busy = |count: usize| (0..count).map(|_| refusal(503, "overloaded"));
    one.script(busy(1));
    two.script(busy(1));
    assert_eq!(front.get("/").status, 200);
    assert_eq!(one.seen().len() + two.seen().len(), 3);
    one.script(busy(1));
    two.script(busy(1));
    assert_eq!(front.post("/", "").status, 503, "not idempotent");
    one.clear();
    two.clear();
    one.script(busy(9));
    two.script(busy(9));
    assert_eq!(front.get("/").status, 503, "tried enough");
}

#[test]
fn retries_have_a_budget() {
    let (front, [one, two]) =
        pool::<2>("retry = { budget = 0.1, reserve = 2 }\neject = { failures = 0 }");
    one.script((0..200).map(|_| Act::HangUp));
    two.script((0..200).map(|_| Act::HangUp));
    let failed = (0..50).filter(|_| front.get("/").status == 503).count();
    let tries = one.seen().len() + two.seen().len();
    assert_eq!(failed, 50);
    // 2 of the reserve, and a tenth of 50.
    assert!((52..=57).contains(&tries), "{tries} tries");
    let metrics = front.gateway.render_metrics();
    assert!(
        metrics.contains("gateway_upstream_retries_refused_total{upstream=\"app\"}"),
        "{metrics}"
    );
}

#[test]
fn a_silent_server_costs_one_wait() {
    let (front, [one]) = pool::<1>("timeouts.read = '50ms'");
    one.script([Act::Silence]);
    let answer = front.get("/");
    assert_eq!((answer.status, answer.code()), (504, "timed_out"));
    assert_eq!(one.seen().len(), 1);
}

#[test]
fn servers_may_want_a_host_of_their_own() {
    let (front, [one]) = pool::<1>("host = 'app.internal'");
    assert_eq!(front.get("/").status, 200);
    let seen = one.seen().remove(0);
    assert_eq!(seen.headers["host"], "app.internal");
    assert_eq!(
        seen.headers["x-forwarded-host"],
        front.gateway.address().to_string()
    );
}

#[test]
fn a_name_stands_for_its_addresses() {
    let runtime = runtime();
    let server = Scripted::start(&runtime);
    let mut config = with_pool(&[&server], "resolve_every = '10ms'");
    let named = format!("localhost:{}", server.address.port());
    config.upstreams.get_mut("app").unwrap().servers =
        vec![gateway::config::ServerConfig::Address(named)];
    let front = Front::start(runtime, &config, RingFrom::Nodes);
    (0..10).for_each(|_| assert_eq!(front.get("/").status, 200));
    let mut lost = config.clone();
    lost.upstreams.get_mut("app").unwrap().servers = vec![gateway::config::ServerConfig::Address(
        "nowhere.invalid:1".to_owned(),
    )];
    let error = front
        .runtime
        .block_on(front.gateway.reload(&lost))
        .unwrap_err();
    assert!(error.to_string().contains("nowhere.invalid"), "{error}");
    assert_eq!(front.get("/").status, 200, "nothing changed");
}

/// Clients that ask until they are told to stop. The counts of answers 200, and of anything else.
fn load(
    front: &Front,
    method: &'static str,
    clients: usize,
    meanwhile: impl FnOnce(),
) -> (u64, u64) {
    let stop = Arc::new(AtomicBool::new(false));
    let counts = Arc::new((AtomicU64::new(0), AtomicU64::new(0)));
    let threads: Vec<_> = (0..clients)
        .map(|client| {
            let (stop, counts) = (Arc::clone(&stop), Arc::clone(&counts));
            let url = front.url(&format!("/?client={client}"));
            std::thread::spawn(move || {
                let agent: ureq::Agent = ureq::Agent::config_builder()
                    .http_status_as_error(false)
                    .build()
                    .into();
                while !stop.load(Ordering::Relaxed) {
                    let request = http::Request::builder().method(method).uri(&url);
                    let answer = agent.run(request.body(Vec::new()).unwrap());
                    let good = answer.is_ok_and(|mut answer| {
                        answer.status() == 200 && answer.body_mut().read_to_vec().is_ok()
                    });
                    let count = if good { &counts.0 } else { &counts.1 };
                    count.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    meanwhile();
    stop.store(true, Ordering::Relaxed);
    threads
        .into_iter()
        .for_each(|thread| thread.join().unwrap());
    (
        counts.0.load(Ordering::Relaxed),
        counts.1.load(Ordering::Relaxed),
    )
}

fn wait(counted: impl Fn() -> bool) {
    while !counted() {
        std::thread::yield_now();
    }
}

#[test]
fn killing_a_server_under_load_costs_idempotent_requests_nothing() {
    let (runtime, dying) = (runtime(), runtime());
    let servers = [Scripted::start(&runtime), Scripted::start(&dying)];
    let config = with_pool(&[&servers[0], &servers[1]], "");
    let front = Front::start(runtime, &config, RingFrom::Nodes);
    let total = |least: usize| {
        let mut seen = 0;
        wait(|| servers[0].count() + servers[1].count() > least);
        seen += servers[1].count();
        seen
    };
    let (good, bad) = load(&front, "GET", 16, || {
        assert!(total(500) > 100, "both get requests");
        // Its connections break in the middle of whatever they were doing, and its port is closed.
        dying.shutdown_background();
        let before = servers[0].count();
        wait(|| servers[0].count() > before + 1000);
    });
    assert_eq!(bad, 0, "of {good} requests");
    assert!(
        front
            .gateway
            .render_metrics()
            .contains("gateway_upstream_ejections_total{upstream=\"app\"} 1")
    );
}

#[test]
fn reloads_under_load_fail_nothing() {
    let (front, servers) = pool::<2>("");
    let addresses: Vec<&Scripted> = servers.iter().collect();
    let (good, bad) = load(&front, "POST", 8, || {
        for round in 0..20 {
            // Other pools, other routes, and back.
            let mut config = with_pool(&addresses[round % 2..], "");
            config.routes[0].priority = i32::try_from(round).unwrap();
            front
                .runtime
                .block_on(front.gateway.reload(&config))
                .unwrap();
            let before = servers[1].count();
            wait(|| servers[1].count() > before + 10);
        }
    });
    assert_eq!(bad, 0, "of {good} requests");
}

#[test]
fn websockets_pass_both_ways() {
    let runtime = runtime();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let given: Config = toml::from_str(&format!(
        "routes = [{{ name = 'app', path = '/*', upstream = 'app' }}]
         upstreams.app.servers = ['{}']",
        listener.local_addr().unwrap()
    ))
    .unwrap();
    let config = Config {
        routes: given.routes,
        upstreams: given.upstreams,
        ..config()
    };
    let front = Front::start(runtime, &config, RingFrom::Nodes);
    let app = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let head = crate::support::read_head(&mut stream);
        // The example of RFC 6455, 1.3.
        write!(
            stream,
            "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\
             sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
        )
        .unwrap();
        // A masked text frame "Hello" (RFC 6455, 5.7), answered unmasked.
        let mut frame = [0; 11];
        stream.read_exact(&mut frame).unwrap();
        assert_eq!(frame[..2], [0x81, 0x85]);
        stream.write_all(b"\x81\x05Hello").unwrap();
        // Until the client goes.
        assert_eq!(stream.read(&mut frame).unwrap(), 0);
        head
    });
    let mut client = TcpStream::connect(front.gateway.address()).unwrap();
    write!(
        client,
        "GET /chat HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\
         sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n"
    )
    .unwrap();
    let head = crate::support::read_head(&mut client);
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    assert!(head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{head}");
    client
        .write_all(b"\x81\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58")
        .unwrap();
    let mut frame = [0; 7];
    client.read_exact(&mut frame).unwrap();
    assert_eq!(&frame, b"\x81\x05Hello");
    drop(client);
    let head = app.join().unwrap().to_lowercase();
    assert!(
        head.contains("sec-websocket-key: dghlihnhbxbszsbub25jzq=="),
        "{head}"
    );
    assert!(head.contains("upgrade: websocket\r\n"), "{head}");
}

#[test]
fn events_pass_as_they_come() {
    let runtime = runtime();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let given: Config = toml::from_str(&format!(
        "routes = [{{ name = 'app', path = '/*', upstream = 'app' }}]
         upstreams.app.servers = ['{}']",
        listener.local_addr().unwrap()
    ))
    .unwrap();
    let config = Config {
        routes: given.routes,
        upstreams: given.upstreams,
        ..config()
    };
    let front = Front::start(runtime, &config, RingFrom::Nodes);
    let mut client = TcpStream::connect(front.gateway.address()).unwrap();
    client
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    write!(
        client,
        "GET /events HTTP/1.1\r\nhost: x\r\naccept: text/event-stream\r\n\r\n"
    )
    .unwrap();
    let (mut app, _) = listener.accept().unwrap();
    crate::support::read_head(&mut app);
    write!(
        app,
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    .unwrap();
    assert!(crate::support::read_head(&mut client).starts_with("HTTP/1.1 200 "));
    for number in 0..3 {
        // The next event is sent only when the client has this one: nothing is held back.
        let event = format!("data: {number}\n\n");
        write!(app, "{:x}\r\n{event}\r\n", event.len()).unwrap();
        let mut seen = String::new();
        while !seen.contains(&event) {
            let mut byte = [0];
            client.read_exact(&mut byte).unwrap();
            seen.push(char::from(byte[0]));
        }
    }
    // A client that goes away is noticed by the app.
    drop(client);
    let mut byte = [0];
    app.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let ended = loop {
        let event = b"3\r\n:\n\n\r\n";
        if app.write_all(event).is_err() {
            break true;
        }
        match app.read(&mut byte) {
            Ok(0) => break true,
            Ok(_) => break false,
            Err(_) => {}
        }
    };
    assert!(ended);
}

#[test]
fn pools_that_mean_nothing_are_refused_by_key_value_and_rule() {
    let refused = |settings: &str, want: &str| {
        let toml = format!("[upstreams.app]\nservers = ['127.0.0.1:1']\n{settings}");
        let config: Config = toml::from_str(&toml).unwrap();
        let error = config.validate().unwrap_err().to_string();
        assert!(error.contains(want), "{error:?} should say {want:?}");
    };
    refused(
        "balance = 'hash'",
        "upstreams.app.key must say what is hashed",
    );
    refused(
        "key = '{query.k}'",
        "upstreams.app.key is for balance = \"hash\"",
    );
    refused("balance = 'hash'\nkey = '{path.k}'", "needs a path pattern");
    refused(
        "load_max = 1.0",
        "upstreams.app.load_max = 1.0 must be above 1",
    );
    refused(
        "retry.budget = 1.5",
        "upstreams.app.retry.budget = 1.5 must be from 0 to 1",
    );
    refused(
        "retry.tries_max = 0",
        "upstreams.app.retry.tries_max = 0 must be from 1 to 100",
    );
    refused(
        "health.path = 'x'",
        "upstreams.app.health.path = \"x\" must begin with /",
    );
    refused(
        "sticky_cookie = 'a b'",
        "upstreams.app.sticky_cookie = \"a b\" must be letters",
    );
    refused(
        "resolve_every = '1ms'",
        "upstreams.app.resolve_every = 1ms must be at least 10ms",
    );
    refused(
        "tls.ca_file = '/nowhere.pem'",
        "upstreams.app.tls.ca_file = \"/nowhere.pem\"",
    );
    refused(
        "tls.cert_file = '/nowhere.pem'",
        "upstreams.app.tls.key_file and cert_file need each other",
    );
    let config: Config =
        toml::from_str("upstreams.a.servers = [{ address = '127.0.0.1:1', weight = 0 }]").unwrap();
    let error = config.validate().unwrap_err().to_string();
    assert!(
        error.contains("upstreams.a.servers[0].weight = 0 must be from 1 to 100"),
        "{error}"
    );
}

#[test]
fn after_a_refusal_to_connect_anything_is_sent_to_another() {
    let runtime = runtime();
    let server = Scripted::start(&runtime);
    let dead = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let mut config = with_pool(&[&server, &server], "");
    config.upstreams.get_mut("app").unwrap().servers[0] =
        gateway::config::ServerConfig::Address(dead.to_string());
    let front = Front::start(runtime, &config, RingFrom::Nodes);
    for _ in 0..4 {
        assert_eq!(front.post("/", "body").status, 200);
    }
    assert!(server.seen().iter().all(|seen| &seen.body[..] == b"body"));
    server.script([ok("fine")]);
}
#[test]
fn a_client_is_told_when_its_connection_ends_with_a_refusal() {
    let (front, [one]) = pool::<1>("retry = { tries_max = 1 }");
    one.script([Act::HangUp]);
    let answer = front.get("/");
    assert_eq!(
        (answer.status, &answer.headers["connection"]),
        (503, &"close".parse().unwrap())
    );
}
