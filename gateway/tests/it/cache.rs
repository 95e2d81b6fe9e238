//! Answers that are given again, and when they are not.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use bytes::Bytes;
use gateway::config::Config;
use gateway::server::{GatewayAdmin, RingFrom};
use http::Response;
use http_body_util::Full;
use ops::admin::Admin;

use crate::support::{Act, Answer, Front, Scripted, config, ok, read_head, ring, runtime};

/// A config with this much in it, before a server that is the app `app` and the only worker.
fn given(toml: &str, server: SocketAddr) -> Config {
    let toml = format!("upstreams.app.servers = ['{server}']\n{toml}");
    let given: Config = toml::from_str(&toml).unwrap();
    Config {
        routes: given.routes,
        upstreams: given.upstreams,
        objects: given.objects,
        limits: given.limits,
        auth: given.auth,
        cache: given.cache,
        ..config()
    }
}

fn front(toml: &str) -> (Front, Scripted) {
    let runtime = runtime();
    let server = Scripted::start(&runtime);
    let ring = RingFrom::Document(ring(1, server.address));
    let front = Front::start(runtime, &given(toml, server.address), ring);
    (front, server)
}

const APP: &str = "
    [[routes]]
    name = 'app'
    path = '/*'
    upstream = 'app'
    [routes.cache]
    default_ttl = '1h'";

fn said(lines: &[(&str, &str)], body: &str) -> Act {
    let mut response = Response::new(Full::new(Bytes::copy_from_slice(body.as_bytes())));
    for (name, value) in lines {
        let name = http::HeaderName::from_bytes(name.as_bytes()).unwrap();
        response.headers_mut().append(name, value.parse().unwrap());
    }
    Act::Answer(response)
}

fn status(status: u16, lines: &[(&str, &str)]) -> Act {
    match said(lines, "") {
        Act::Answer(mut response) => {
            *response.status_mut() = status.try_into().unwrap();
            Act::Answer(response)
        }
        act => act,
    }
}

fn text(answer: &Answer) -> &str {
    std::str::from_utf8(&answer.body).unwrap()
}

#[track_caller]
fn header<'a>(answer: &'a Answer, name: &str) -> &'a str {
    let value = answer.headers.get(name);
    value.map_or("-", |value| value.to_str().unwrap())
}

fn operator(front: &Front, method: &str, target: &str) -> serde_json::Value {
    let pages = GatewayAdmin {
        gateway: std::sync::Arc::clone(&front.gateway),
        metrics: front.gateway.registry().handle(),
    };
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let page = pages.page(&method.parse().unwrap(), path, Some(query));
    let body = http_body_util::BodyExt::collect(page.unwrap().into_body());
    let body = front.runtime.block_on(body).unwrap().to_bytes();
    serde_json::from_slice(&body).unwrap()
}

#[test]
fn a_hundred_requests_are_one_for_the_app() {
    let (front, app) = front(APP);
    app.script([said(&[("etag", "\"1\""), ("x-a", "b")], "0123456789")]);
    let first = front.get("/a?b=c");
    assert_eq!(
        header(&first, "cache-status"),
        "dormouse; fwd=uri-miss; stored"
    );
    for _ in 0..99 {
        let again = front.get("/a?b=c");
        assert_eq!((again.status, text(&again)), (200, "0123456789"));
        assert_eq!(header(&again, "cache-status"), "dormouse; hit");
        assert_eq!((header(&again, "x-a"), header(&again, "age")), ("b", "0"));
    }
    assert_eq!(app.count(), 1);
    let line =
        |outcome| format!("gateway_cache_requests_total{{route=\"app\",outcome=\"{outcome}\"}}");
    front.eventually(&line("hit"), 99.0);
    front.eventually(&line("miss"), 1.0);
    front.eventually("gateway_cache_entries", 1.0);
    assert_eq!(operator(&front, "GET", "/cache")["entries"], 1);

    let head = front.send(front.request("HEAD", "/a?b=c"), "");
    assert_eq!((head.status, header(&head, "content-length")), (200, "10"));
    let known = front
        .request("GET", "/a?b=c")
        .header("if-none-match", "\"1\"");
    let unchanged = front.send(known, "");
    assert_eq!((unchanged.status, text(&unchanged)), (304, ""));
    let part = front.request("GET", "/a?b=c").header("range", "bytes=2-4");
    let part = front.send(part, "");
    assert_eq!((part.status, text(&part)), (206, "234"));
    assert_eq!(app.count(), 1);
    // Other URLs are other answers.
    assert_eq!(text(&front.get("/a?b=d")), "ok");
    assert_eq!(app.count(), 2);
}

#[test]
fn a_head_or_a_part_that_misses_brings_the_whole() {
    let (front, app) = front(APP);
    app.script([ok("0123456789"), ok("abcdefghij")]);
    let head = front.send(front.request("HEAD", "/a"), "");
    assert_eq!((head.status, text(&head)), (200, ""));
    assert_eq!(text(&front.get("/a")), "0123456789");
    let part = front.request("GET", "/b").header("range", "bytes=-3");
    let part = front.send(part, "");
    assert_eq!((part.status, text(&part)), (206, "hij"));
    assert_eq!(text(&front.get("/b")), "abcdefghij");
    let seen = app.seen();
    assert_eq!(seen.len(), 2);
    assert_eq!((&*seen[0].method, &*seen[1].method), ("GET", "GET"));
    assert!(!seen[1].headers.contains_key("range"));
}

#[test]
fn objects_are_not_woken_by_what_is_kept_of_them() {
    let (front, worker) = front("objects.cache = {}");
    worker.script([
        said(
            &[
                ("cache-control", "max-age=60"),
                ("cache-tag", "page, room-1"),
            ],
            "one",
        ),
        said(&[("dormouse-purge", "room-1")], "written"),
        said(
            &[("cache-control", "max-age=60"), ("cache-tag", "room-1")],
            "two",
        ),
        // No word of freshness: not kept.
        ok("three"),
        ok("four"),
    ]);
    for _ in 0..50 {
        let answer = front.get("/objects/Room/1/page");
        assert_eq!((text(&answer), header(&answer, "cache-tag")), ("one", "-"));
    }
    assert_eq!(worker.count(), 1, "the object saw one request of fifty");
    // A write goes over a link; its answer names what it changed.
    let written = front.post("/objects/Room/1/say", "hello");
    assert_eq!(
        (text(&written), header(&written, "dormouse-purge")),
        ("written", "-")
    );
    assert_eq!(text(&front.get("/objects/Room/1/page")), "two");
    assert_eq!(text(&front.get("/objects/Room/1/page")), "two");
    assert_eq!(worker.count(), 3);
    assert_eq!(text(&front.get("/objects/Room/2")), "three");
    assert_eq!(text(&front.get("/objects/Room/2")), "four");
    front.eventually("gateway_cache_purged_total", 1.0);
}

#[test]
fn two_objects_never_share_an_answer() {
    let (front, worker) = front(
        "[[routes]]
         name = 'me'
         path = '/me'
         object = { class = 'User', name = '{header.x-user}' }
         cache = { default_ttl = '1h', key = 'the same for all' }",
    );
    worker.script([ok("ada's"), ok("bob's")]);
    let get = |user: &str| {
        let request = front.request("GET", "/me").header("x-user", user);
        text(&front.send(request, "")).to_owned()
    };
    for _ in 0..3 {
        assert_eq!(
            (get("ada").as_str(), get("bob").as_str()),
            ("ada's", "bob's")
        );
    }
    assert_eq!(worker.count(), 2);
}

#[test]
fn what_is_for_one_is_given_to_nobody_else() {
    let (front, app) = front(APP);
    let asked_again = |lines: &[(&str, &str)], answer: &[(&'static str, &str)]| {
        app.clear();
        let before = app.count();
        app.script([said(answer, "first"), said(answer, "second")]);
        let get = || {
            let path = format!("/{before}");
            let request = lines
                .iter()
                .fold(front.request("GET", &path), |r, (n, v)| r.header(*n, *v));
            front.send(request, "")
        };
        let (_, second) = (get(), get());
        assert_eq!(
            app.count() - before,
            if text(&second) == "first" { 1 } else { 2 }
        );
        text(&second) == "second"
    };
    let open = [("cache-control", "max-age=60")];
    assert!(!asked_again(&[], &open));
    assert!(asked_again(
        &[],
        &[("cache-control", "private, max-age=60")]
    ));
    assert!(asked_again(&[], &[("cache-control", "no-store")]));
    assert!(asked_again(&[], &[open[0], ("set-cookie", "session=1")]));
    let secret = [("authorization", "Bearer x")];
    assert!(asked_again(&secret, &open));
    assert!(!asked_again(
        &secret,
        &[("cache-control", "public, max-age=60")]
    ));
    assert!(asked_again(&[("cookie", "session=1")], &open));
}

#[test]
fn the_key_says_what_counts() {
    let (front, app) = front(
        "[[routes]]
         name = 'app'
         path = '/p/{page}'
         upstream = 'app'
         [routes.cache]
         default_ttl = '1h'
         key = '{path.page}:{cookie.lang|en}:{query.q}'",
    );
    app.script([ok("en"), ok("de"), ok("none")]);
    let get = |target: &str, cookie: &str| {
        let request = front.request("GET", target).header("cookie", cookie);
        text(&front.send(request, "")).to_owned()
    };
    assert_eq!(get("/p/1?q=1&utm=a", "x=1"), "en");
    assert_eq!(get("/p/1?utm=b&q=1", "x=2"), "en");
    assert_eq!(get("/p/1?q=1", "lang=de"), "de");
    assert_eq!(get("/p/1?q=1", "x=1; lang=de"), "de");
    assert_eq!(app.count(), 2);
    // Without a key there is nothing to keep it under.
    assert_eq!(
        (get("/p/1", "x=1"), get("/p/1", "x=1")),
        ("none".into(), "ok".into())
    );
}

#[test]
fn refused_requests_see_nothing_of_it() {
    let (front, app) = front(
        "[limits.few]
         key = '{client.ip}'
         limit = 3
         period = '1h'
         [auth.keys.api_keys]
         in = 'header.x-api-key'
         keys = { ada = '2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b' }
         [[routes]]
         name = 'limited'
         path = '/limited'
         upstream = 'app'
         limits = ['few']
         cache = { default_ttl = '1h' }
         [[routes]]
         name = 'members'
         path = '/members'
         upstream = 'app'
         auth = ['keys']
         cache = { default_ttl = '1h' }",
    );
    app.script([
        ok("content"),
        said(&[("cache-control", "public, max-age=9")], "for members"),
    ]);
    let statuses: Vec<u16> = (0..5).map(|_| front.get("/limited").status).collect();
    assert_eq!(statuses, [200, 200, 200, 429, 429]);
    assert!(!text(&front.get("/limited")).contains("content"));
    let member = || {
        front
            .request("GET", "/members")
            .header("x-api-key", "secret")
    };
    for _ in 0..2 {
        assert_eq!(text(&front.send(member(), "")), "for members");
    }
    assert_eq!(app.count(), 2);
    let stranger = front.get("/members");
    assert_eq!((stranger.status, stranger.code()), (401, "unauthorized"));
    // What does not say that it is for all is not kept once somebody has shown who they are.
    operator(&front, "POST", "/cache/purge?route=members");
    app.script([said(&[("cache-control", "max-age=9")], "hers"), ok("his")]);
    assert_eq!(text(&front.send(member(), "")), "hers");
    assert_eq!(text(&front.send(member(), "")), "his");
}

#[test]
fn answers_given_again_cost_nothing_of_the_quota_of_new_objects() {
    let (front, worker) = front(
        "[limits.new]
         key = '{client.ip}'
         limit = 2
         period = '1h'
         [[routes]]
         name = 'rooms'
         path = '/rooms/{room}'
         object = { class = 'Room', name = '{path.room}' }
         creations = 'new'
         cache = { default_ttl = '1h' }",
    );
    for _ in 0..10 {
        assert_eq!(front.get("/rooms/1").status, 200);
    }
    assert_eq!(worker.count(), 1);
    front.get("/rooms/2");
    let seen = worker.seen();
    assert_eq!(
        seen[1].headers["dormouse-new-object"],
        seen[0].headers["dormouse-new-object"]
    );
}

#[test]
fn variants_are_kept_apart() {
    let (front, app) = front(APP);
    let vary = [("vary", "accept-language")];
    app.script([said(&vary, "deutsch"), said(&vary, "english")]);
    let get = |language: &str| {
        let request = front
            .request("GET", "/")
            .header("accept-language", language);
        text(&front.send(request, "")).to_owned()
    };
    for _ in 0..3 {
        assert_eq!(
            (get("de").as_str(), get("en").as_str()),
            ("deutsch", "english")
        );
    }
    assert_eq!(app.count(), 2);
    // One key, all its variants.
    let host = front.gateway.address();
    let purge = format!("/cache/purge?key=http://{host}/");
    assert_eq!(operator(&front, "POST", &purge)["purged"], 2);
    assert_eq!(get("de"), "ok");
}

#[test]
fn what_is_no_longer_fresh_is_asked_for_again() {
    let (front, app) = front(APP);
    let lines = [("etag", "\"7\""), ("cache-control", "no-cache")];
    app.script([
        said(&lines, "body"),
        status(304, &lines),
        said(&[("etag", "\"8\""), ("cache-control", "max-age=60")], "new"),
    ]);
    assert_eq!(text(&front.get("/")), "body");
    let again = front.get("/");
    assert_eq!((again.status, text(&again)), (200, "body"));
    assert_eq!(
        header(&again, "cache-status"),
        "dormouse; fwd=stale; fwd-status=304"
    );
    assert_eq!(text(&front.get("/")), "new");
    assert_eq!(header(&front.get("/"), "cache-status"), "dormouse; hit");
    let seen = app.seen();
    assert_eq!(seen.len(), 3);
    assert!(!seen[0].headers.contains_key("if-none-match"));
    assert_eq!(seen[1].headers["if-none-match"], "\"7\"");
    front.eventually(
        "gateway_cache_requests_total{route=\"app\",outcome=\"revalidated\"}",
        1.0,
    );
}

#[test]
fn the_stale_is_served_while_the_new_is_fetched_or_cannot_be() {
    let (front, app) = front(APP);
    let lines = [("cache-control", "max-age=0, stale-while-revalidate=600")];
    app.script([
        said(&lines, "old"),
        said(&[("cache-control", "max-age=600")], "new"),
    ]);
    assert_eq!(text(&front.get("/")), "old");
    let stale = front.get("/");
    assert_eq!(text(&stale), "old");
    assert_eq!(
        header(&stale, "cache-status"),
        "dormouse; hit; detail=stale"
    );
    front.eventually("gateway_cache_refreshes_total", 1.0);
    assert_eq!(text(&front.get("/")), "new");
    assert_eq!(app.count(), 2);

    let lines = [("cache-control", "max-age=0, stale-if-error=600")];
    app.script([
        said(&lines, "known"),
        status(503, &[]),
        Act::HangUp,
        Act::HangUp,
        Act::HangUp,
    ]);
    assert_eq!(text(&front.get("/b")), "known");
    for _ in 0..2 {
        let answer = front.get("/b");
        assert_eq!((answer.status, text(&answer)), (200, "known"));
    }
}

#[test]
fn purges_by_operators_name_a_tag_a_key_a_route_or_all() {
    let (front, app) = front(APP);
    let fill = || {
        for path in ["/a", "/b", "/c"] {
            app.script([said(
                &[("cache-tag", if path == "/a" { "x" } else { "y,z" })],
                "",
            )]);
            front.get(path);
            app.clear();
        }
    };
    let host = front.gateway.address();
    for (query, purged) in [
        ("tag=x".to_owned(), 1),
        ("tag=z".to_owned(), 2),
        ("tag=x&tag=y".to_owned(), 3),
        ("tag=X".to_owned(), 0),
        (format!("key=http://{host}/b"), 1),
        (format!("route=app&key=http://{host}/b&tag=x"), 2),
        ("route=app".to_owned(), 3),
        ("all".to_owned(), 3),
    ] {
        fill();
        let answer = operator(&front, "POST", &format!("/cache/purge?{query}"));
        assert_eq!(answer["purged"], purged, "{query}");
        operator(&front, "POST", "/cache/purge?all");
    }
    for query in ["", "route=nowhere", "tags=x"] {
        let answer = operator(&front, "POST", &format!("/cache/purge?{query}"));
        assert_eq!(answer["code"], "bad_request", "{query}: {answer}");
    }
    assert_eq!(
        operator(&front, "GET", "/cache/purge")["code"],
        "method_not_allowed"
    );
}

#[test]
fn a_write_to_a_url_drops_what_is_kept_of_it_unless_it_fails() {
    let (front, app) = front(APP);
    app.script([ok("one"), status(500, &[]), ok("written"), ok("two")]);
    assert_eq!(text(&front.get("/a")), "one");
    assert_eq!(front.post("/a", "x").status, 500);
    assert_eq!(text(&front.get("/a")), "one");
    assert_eq!(text(&front.post("/a", "x")), "written");
    assert_eq!(text(&front.get("/a")), "two");
}

/// A server that answers when it is told to, and with what.
struct Gated {
    address: SocketAddr,
    /// Requests that came, and how to answer them.
    came: Receiver<(String, SyncSender<String>)>,
}

impl Gated {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (tell, came) = sync_channel(1000);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, tell) = (stream.unwrap(), tell.clone());
                std::thread::spawn(move || {
                    let head = read_head(&mut stream);
                    let (answer, wait) = sync_channel::<String>(1);
                    tell.send((head, answer)).unwrap();
                    if let Ok(answer) = wait.recv() {
                        stream.write_all(answer.as_bytes()).unwrap();
                    }
                });
            }
        });
        Self { address, came }
    }

    fn next(&self) -> (String, SyncSender<String>) {
        self.came.recv_timeout(Duration::from_secs(30)).unwrap()
    }
}

fn closing(lines: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n{lines}\r\n{body}")
}

/// Sends a request, and does not wait for its answer.
fn begin(front: &Front, method: &str, path: &str) -> TcpStream {
    let mut stream = TcpStream::connect(front.gateway.address()).unwrap();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).unwrap();
    stream
}

fn end(mut stream: TcpStream) -> String {
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn before_gated(toml: &str) -> (Front, Gated) {
    let app = Gated::start();
    let front = Front::start(runtime(), &given(toml, app.address), RingFrom::Nodes);
    (front, app)
}

#[test]
fn a_stampede_is_one_request() {
    let (front, app) = before_gated(APP);
    let clients: Vec<TcpStream> = (0..100).map(|_| begin(&front, "GET", "/")).collect();
    let (_, answer) = app.next();
    front.eventually("gateway_connections", 100.0);
    answer.send(closing("", "made once")).unwrap();
    for client in clients {
        let answer = end(client);
        assert!(answer.ends_with("made once"), "{answer}");
    }
    assert!(app.came.try_recv().is_err(), "one request for all of them");
}

#[test]
fn those_who_want_what_is_not_kept_do_not_wait_for_each_other() {
    let (front, app) = before_gated(APP);
    let first = begin(&front, "GET", "/");
    let (_, answer) = app.next();
    let others: Vec<TcpStream> = (0..20).map(|_| begin(&front, "GET", "/")).collect();
    answer
        .send(closing("cache-control: no-store\r\n", "mine"))
        .unwrap();
    assert!(end(first).ends_with("mine"));
    // None is answered before all are asked for.
    let asked: Vec<_> = others.iter().map(|_| app.next()).collect();
    for (_, answer) in asked {
        answer
            .send(closing("cache-control: no-store\r\n", "mine"))
            .unwrap();
    }
    for other in others {
        assert!(end(other).ends_with("mine"));
    }
}

#[test]
fn what_was_asked_for_before_a_purge_is_not_kept_after_it() {
    let (front, app) = before_gated(APP);
    let reader = begin(&front, "GET", "/page");
    let (_, page) = app.next();
    // The app has read its data by now; then they change.
    let writer = begin(&front, "POST", "/write");
    let (head, written) = app.next();
    assert!(head.starts_with("POST /write"), "{head}");
    written
        .send(closing("dormouse-purge: data\r\n", "done"))
        .unwrap();
    assert!(end(writer).ends_with("done"));
    page.send(closing("cache-tag: data\r\n", "before")).unwrap();
    assert!(
        end(reader).ends_with("before"),
        "who asked before may see it"
    );
    let reader = begin(&front, "GET", "/page");
    app.next()
        .1
        .send(closing("cache-tag: data\r\n", "after"))
        .unwrap();
    assert!(end(reader).ends_with("after"));
    assert!(
        end(begin(&front, "GET", "/page")).ends_with("after"),
        "and this is kept"
    );
}

#[test]
fn what_is_too_large_passes_and_is_not_kept() {
    let (front, app) = before_gated(&format!("cache.entry_bytes_max = 1000\n{APP}"));
    let large = "x".repeat(5000);
    let chunked = format!(
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n{:x}\r\n{large}\r\n0\r\n\r\n",
        large.len()
    );
    for answer in [
        closing("", &large),
        closing("", &large),
        chunked.clone(),
        chunked,
    ] {
        let reader = begin(&front, "GET", "/");
        app.next().1.send(answer).unwrap();
        let got = end(reader);
        assert_eq!(got.matches('x').count(), 5000, "{}", got.len());
    }
    assert_eq!(operator(&front, "GET", "/cache")["entries"], 0);
    assert_eq!(operator(&front, "GET", "/cache")["bytes"], 0);
}

#[test]
fn a_flood_of_keys_stays_within_its_memory() {
    let (front, app) = front(&format!(
        "cache = {{ bytes_max = 1048576, entry_bytes_max = 65536 }}\n{APP}"
    ));
    app.answer("/", || ok(&"x".repeat(10_000)));
    for n in 0..500 {
        assert_eq!(front.get(&format!("/?n={n}")).body.len(), 10_000);
        let bytes = operator(&front, "GET", "/cache")["bytes"].as_u64().unwrap();
        assert!(bytes <= 1_048_576, "{bytes}");
    }
    let entries = operator(&front, "GET", "/cache")["entries"]
        .as_u64()
        .unwrap();
    assert!((60..80).contains(&entries), "{entries}");
    front.eventually("gateway_cache_evictions_total", 500.0 - entries as f64);
    // The latest are there, the first are not.
    let before = app.count();
    front.get("/?n=499");
    assert_eq!(app.count(), before);
    front.get("/?n=0");
    assert_eq!(app.count(), before + 1);
}

/// Gateways that know each other, each before the same app.
fn peers(count: usize, app: &Scripted) -> Vec<Front> {
    let bound = (0..count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
    let bound: Vec<TcpListener> = bound.collect();
    let addresses = bound
        .iter()
        .map(|one| one.local_addr().unwrap().to_string());
    let addresses: Vec<String> = addresses.collect();
    let mut config = given(APP, app.address);
    config.admin_token = "secret".to_owned();
    config.cache.peers = addresses;
    config.cache.peers_every = Duration::from_millis(20);
    let started = bound.into_iter().map(|listener| {
        let front = Front::start(runtime(), &config, RingFrom::Nodes);
        listener.set_nonblocking(true).unwrap();
        let pages = std::sync::Arc::new(GatewayAdmin {
            gateway: std::sync::Arc::clone(&front.gateway),
            metrics: front.gateway.registry().handle(),
        });
        front.runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            ops::admin::serve(listener, Some("secret".into()), pages).await;
        });
        front
    });
    started.collect()
}

/// How often a gateway has heard the purges of others, of itself too.
fn looks(front: &Front) -> u64 {
    let metrics = front.gateway.render_metrics();
    let line = metrics
        .lines()
        .find_map(|line| line.strip_prefix("gateway_cache_peer_looks_total "));
    line.map_or(0, |value| value.parse().unwrap())
}

fn wait_for_looks(front: &Front, more: u64) {
    let until = looks(front) + more;
    front.runtime.block_on(async {
        while looks(front) < until {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
}

#[test]
fn a_purge_reaches_the_other_gateways_within_one_look() {
    let runtime = runtime();
    let app = Scripted::start(&runtime);
    let fronts = peers(2, &app);
    let [here, there] = &fronts[..] else {
        unreachable!()
    };
    // The first look at each other begins with an empty cache.
    fronts.iter().for_each(|front| wait_for_looks(front, 4));
    let tagged = |body| said(&[("cache-tag", "t")], body);
    app.script([tagged("old"), tagged("old")]);
    assert_eq!(
        (text(&here.get("/")), text(&there.get("/"))),
        ("old", "old")
    );
    wait_for_looks(there, 6);
    assert_eq!(
        text(&there.get("/")),
        "old",
        "looks that bring nothing drop nothing"
    );
    app.script([
        said(&[("dormouse-purge", "t")], ""),
        tagged("new"),
        tagged("new"),
    ]);
    here.post("/write", "");
    assert_eq!(text(&here.get("/")), "new", "here at once");
    // Two looks at each of two gateways: one at the other began after the purge.
    wait_for_looks(there, 4);
    assert_eq!(text(&there.get("/")), "new", "there after a look");
    assert_eq!(app.count(), 5);
}

#[test]
fn who_may_have_missed_a_purge_begins_anew() {
    let runtime = runtime();
    let (app, peer) = (Scripted::start(&runtime), Scripted::start(&runtime));
    let mut config = given(APP, app.address);
    config.cache.peers = vec![peer.address.to_string()];
    config.cache.peers_every = Duration::from_millis(20);
    let front = Front::start(runtime, &config, RingFrom::Nodes);
    let tell = |text: &str| {
        let until = looks(&front) + 1;
        peer.script([ok(text)]);
        front.eventually("gateway_cache_peer_looks_total", until as f64);
    };
    tell(r#"{"boot": "a", "count": 7, "tags": null}"#);
    app.script([ok("old"), ok("new")]);
    assert_eq!(text(&front.get("/")), "old");
    tell(r#"{"boot": "a", "count": 7, "tags": []}"#);
    // Then it says nothing that makes sense: what is here is as old as its freshness allows.
    front.eventually("gateway_cache_peers_silent", 1.0);
    assert_eq!(text(&front.get("/")), "old");
    // It comes back, and remembers what it told: nothing was missed.
    tell(r#"{"boot": "a", "count": 8, "tags": []}"#);
    assert_eq!(text(&front.get("/")), "old");
    // It comes back as another.
    tell(r#"{"boot": "b", "count": 0, "tags": null}"#);
    assert_eq!(text(&front.get("/")), "new");
}
