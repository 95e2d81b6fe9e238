//! Sharded counters before scripted workers: plans, shards, keys, and increments that go together.

use std::collections::HashSet;
use std::io::Write;
use std::net::{Shutdown, TcpListener, TcpStream};

use gateway::config::Config;
use gateway::server::RingFrom;
use protocol::counters::{Plan, jump, key_hash};
use protocol::link::{Request, Verdict};
use serde_json::{Value, json};

use crate::link::{Worker, client};
use crate::support::{
    Act, Answer, Front, Scripted, Seen, config, ok, read_head, refusal, ring, runtime,
};

fn plan(version: u64, shards: u32, strategy: &str) -> String {
    json!({
        "version": version, "place": "", "shards": shards, "strategy": strategy, "report_every_ms": 200,
    })
    .to_string()
}

fn added(version: u64, outcome: &str) -> Act {
    ok(&json!({ "version": version, "outcome": outcome }).to_string())
}

/// The object's name, the method, and the arguments.
fn call(seen: &Seen) -> (String, String, Value) {
    let header = |name: &str| seen.headers[name].to_str().unwrap().to_owned();
    assert_eq!(header("dormouse-internal"), "1");
    let class = header("dormouse-class");
    let method = header("dormouse-method");
    let of_coordinator = ["plan", "read"].contains(&method.as_str());
    assert_eq!(
        class == "CounterCoordinator",
        of_coordinator,
        "{class} {method}"
    );
    let arguments = serde_json::from_slice(&seen.body).unwrap();
    (header("dormouse-name"), method, arguments)
}

fn calls(worker: &Scripted) -> Vec<(String, String, Value)> {
    worker.seen().iter().map(call).collect()
}

fn increment(front: &Front, key: Option<&str>) -> Answer {
    let mut request = front.request("POST", "/counters/likes/increment?by=5");
    if let Some(key) = key {
        request = request.header("idempotency-key", key);
    }
    front.send(request, "")
}

#[test]
fn an_increment_goes_to_a_shard_of_the_plan_which_is_asked_for_once() {
    let (front, worker) = Front::before_worker();
    worker.script([
        ok(&plan(1, 1, "random")),
        added(1, "counted"),
        added(1, "counted"),
    ]);
    let answer = increment(&front, None);
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.headers["content-type"], "application/json");
    let want = json!({ "by": 5, "shard": "0", "shards": 1, "staleness_ms": 400 });
    assert_eq!(answer.json(), want);
    assert_eq!(increment(&front, None).json(), want);
    let shard = ("likes:shard:0".to_owned(), "add".to_owned(), json!([5, 1]));
    assert_eq!(
        calls(&worker),
        [
            ("likes".to_owned(), "plan".to_owned(), json!(["SFO", false])),
            shard.clone(),
            shard,
        ]
    );
    front.eventually("gateway_counter_increments_total{outcome=\"counted\"}", 2.0);
    front.eventually("gateway_counter_plans", 1.0);
    front.eventually(
        "gateway_requests_total{route=\"counters\",code=\"200\"}",
        2.0,
    );
}

#[test]
fn increments_take_turns_or_follow_their_client_or_spread() {
    let (front, worker) = Front::before_worker();
    let shards = |strategy: &str, count: usize| -> Vec<String> {
        let name = format!("/counters/{strategy}/increment");
        worker.script([ok(&plan(1, 10, strategy))]);
        worker.script((0..count).map(|_| added(1, "counted")));
        (0..count).for_each(|_| assert_eq!(front.post(&name, "").status, 200));
        let calls = calls(&worker);
        let names = calls[1..].iter().map(|(name, ..)| name.rsplit(':').next());
        names.map(|shard| shard.unwrap().to_owned()).collect()
    };
    let turns = shards("round_robin", 12);
    let want: Vec<String> = (0..12).map(|turn| (turn % 10).to_string()).collect();
    assert_eq!(turns, want);
    let mine = jump(key_hash("127.0.0.1"), 10).to_string();
    assert!(shards("hash", 5).iter().all(|shard| *shard == mine));
    let spread: HashSet<String> = shards("random", 60).into_iter().collect();
    assert!(spread.len() > 5, "{spread:?}");
}

#[test]
fn a_key_has_its_shard_and_those_that_had_it_before_are_named() {
    let (front, worker) = Front::before_worker();
    let mut document: Value = serde_json::from_str(&plan(7, 40, "random")).unwrap();
    document["earlier"] = json!([{ "place": "", "shards": 7 }, { "place": "", "shards": 40 }]);
    worker.script([
        ok(&document.to_string()),
        added(7, "counted"),
        added(7, "repeated"),
    ]);
    let first = increment(&front, Some("order-17"));
    let document: Plan = serde_json::from_value(document).unwrap();
    let (seat, before) = document.seats_of_key("order-17");
    let mut want = json!({
        "by": 5, "shard": seat.to_string(), "shards": 40, "staleness_ms": 400,
    });
    assert_eq!(first.json(), want);
    want["repeated"] = json!(true);
    assert_eq!(increment(&front, Some("order-17")).json(), want);
    let calls = calls(&worker);
    assert_eq!(
        calls[1],
        (
            format!("likes:shard:{seat}"),
            "add_once".to_owned(),
            json!(["order-17", 5, 7, before]),
        )
    );
    assert_eq!(calls[1], calls[2]);
    front.eventually(
        "gateway_counter_increments_total{outcome=\"repeated\"}",
        1.0,
    );
}

#[test]
fn a_broken_connection_is_made_good_with_a_key_and_told_without_one() {
    let (front, worker) = Front::before_worker();
    worker.answer("plan", || ok(&plan(1, 3, "random")));
    worker.script([Act::HangUp, Act::HangUp, added(1, "repeated")]);
    let kept = increment(&front, Some("k"));
    assert_eq!((kept.status, &kept.json()["repeated"]), (200, &json!(true)));
    worker.seen();
    worker.script([Act::HangUp]);
    let lost = increment(&front, None);
    assert_eq!((lost.status, lost.code()), (503, "unavailable"));
    let problem = lost.json();
    assert_eq!(problem["retryable"], json!(false), "{problem}");
    assert!(
        problem["detail"].as_str().unwrap().contains("is unknown"),
        "{problem}"
    );
    assert_eq!(calls(&worker).len(), 1, "it was tried once");
    front.eventually("gateway_counter_increments_total{outcome=\"unknown\"}", 1.0);
    // A key that finds nobody may be sent again: that is what it is for.
    worker.script((0..5).map(|_| Act::HangUp));
    let gone = increment(&front, Some("k"));
    assert_eq!(
        (gone.status, &gone.json()["retryable"]),
        (503, &json!(true))
    );
    assert_eq!(calls(&worker).len(), 5);
}

#[test]
fn what_moved_goes_to_its_new_shard_at_once() {
    let (front, worker) = Front::before_worker();
    worker.script([
        ok(&plan(1, 1, "random")),
        added(4, "moved"),
        ok(&plan(4, 1, "random")),
        added(4, "counted"),
        added(6, "moved"),
        ok(&plan(6, 1, "random")),
        added(6, "counted"),
    ]);
    assert_eq!(increment(&front, None).status, 200);
    assert_eq!(increment(&front, Some("k")).status, 200);
    let methods: Vec<(String, Value)> = calls(&worker)
        .into_iter()
        .map(|(_, method, arguments)| (method, arguments))
        .collect();
    let want = [
        ("plan", json!(["SFO", false])),
        ("add", json!([5, 1])),
        // What was heard is told: the coordinator may have forgotten it.
        ("plan", json!(["SFO", false, 4])),
        ("add", json!([5, 4])),
        ("add_once", json!(["k", 5, 4, []])),
        ("plan", json!(["SFO", false, 6])),
        ("add_once", json!(["k", 5, 6, []])),
    ];
    assert_eq!(
        methods,
        want.map(|(method, args)| (method.to_owned(), args))
    );
    front.eventually("gateway_counter_plan_refreshes_total", 2.0);
}

#[test]
fn shards_that_keep_moving_are_not_followed_for_ever() {
    let (front, worker) = Front::before_worker();
    worker.answer("plan", || ok(&plan(1, 1, "random")));
    worker.answer("add", || added(2, "moved"));
    let answer = increment(&front, None);
    assert_eq!((answer.status, answer.code()), (503, "unavailable"));
    let problem = answer.json();
    assert_eq!(
        problem["retryable"],
        json!(true),
        "nothing was added: {problem}"
    );
}

#[test]
fn a_newer_plan_that_a_shard_speaks_of_is_fetched_behind_the_answer() {
    let (front, worker) = Front::before_worker();
    worker.script([
        ok(&plan(1, 1, "random")),
        added(2, "counted"),
        ok(&plan(2, 1, "random")),
        added(2, "counted"),
    ]);
    assert_eq!(increment(&front, None).status, 200);
    front.eventually("gateway_counter_plan_refreshes_total", 1.0);
    front.runtime.block_on(async {
        while worker.count() < 3 {
            tokio::task::yield_now().await;
        }
    });
    // The plan is on its way; until it is here the old one does.
    loop {
        worker.script([added(2, "counted")]);
        assert_eq!(increment(&front, None).status, 200);
        if calls(&worker)
            .iter()
            .any(|(_, _, arguments)| *arguments == json!([5, 2]))
        {
            break;
        }
    }
    front.eventually("gateway_counter_plan_refreshes_total", 1.0);
}

#[test]
fn many_who_need_a_plan_ask_for_it_once() {
    let runtime = runtime();
    let worker = Scripted::start(&runtime);
    worker.answer("plan", || ok(&plan(1, 5, "random")));
    worker.answer("add", || added(1, "counted"));
    let config = Config {
        threads: 2,
        ..config()
    };
    let ring = RingFrom::Document(ring(1, worker.address));
    let front = Front::start(runtime, &config, ring);
    std::thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| {
                assert_eq!(increment(&front, None).status, 200);
            });
        }
    });
    let calls = calls(&worker);
    let plans = calls.iter().filter(|(_, method, _)| method == "plan");
    assert_eq!(plans.count(), 1);
    let sum: i64 = calls
        .iter()
        .filter(|(_, method, _)| method == "add")
        .map(|(_, _, arguments)| arguments[0].as_i64().unwrap())
        .sum();
    assert_eq!(sum, 100, "what goes together is the sum of all");
}

#[test]
fn a_coordinator_that_cannot_be_reached_is_asked_by_the_next_request() {
    let (front, worker) = Front::before_worker();
    worker.script([
        refusal(503, "overloaded"),
        ok(&plan(1, 1, "random")),
        added(1, "counted"),
    ]);
    let answer = increment(&front, None);
    assert_eq!((answer.status, answer.code()), (503, "overloaded"));
    assert_eq!(increment(&front, None).status, 200);
    front.eventually("gateway_counter_increments_total{outcome=\"refused\"}", 1.0);
}

#[test]
fn values_have_all_their_digits() {
    let (front, worker) = Front::before_worker();
    let huge = i128::from(i64::MAX) * 1000;
    let total = json!({ "value": huge.to_string(), "shards": 100, "staleness_ms": 400 });
    worker.script([
        ok(&total.to_string()),
        ok(&total.to_string()),
        ok(&total.to_string()),
    ]);
    let answer = front.get("/counters/a%20b");
    assert_eq!(
        String::from_utf8(answer.body).unwrap(),
        format!("{{\"value\":{huge},\"shards\":100,\"staleness_ms\":400}}")
    );
    assert_eq!(front.get("/counters/a%20b?exact=true").status, 200);
    let head = front.send(front.request("HEAD", "/counters/a%20b"), "");
    assert_eq!((head.status, head.body.len()), (200, 0));
    assert!(head.headers.contains_key("content-length"));
    let arguments = calls(&worker)
        .into_iter()
        .map(|(_, _, arguments)| arguments);
    assert_eq!(
        arguments.collect::<Vec<_>>(),
        [json!([false]), json!([true]), json!([false])]
    );
    for (method, path, status) in [
        ("GET", "/counters/", 404),
        ("GET", "/counters/a/b", 404),
        ("PUT", "/counters/a", 405),
        ("GET", "/counters/a/increment", 405),
        ("POST", "/counters/a/increment?by=x", 400),
    ] {
        let answer = front.send(front.request(method, path), "");
        assert_eq!(answer.status, status, "{method} {path}");
    }
    assert_eq!(worker.seen().len(), 0);
}

#[test]
fn without_links_calls_go_by_http1() {
    for links in [false, true] {
        let runtime = runtime();
        // It speaks none, or they are switched off.
        let worker = match links {
            true => Scripted::without_links(&runtime),
            false => Scripted::start(&runtime),
        };
        let mut config = config();
        config.requests.links = links;
        let ring = RingFrom::Document(ring(1, worker.address));
        let front = Front::start(runtime, &config, ring);
        worker.script([
            ok(&plan(1, 1, "random")),
            refusal(421, "not_owner"),
            added(1, "counted"),
            Act::HangUp,
            Act::HangUp,
            added(1, "repeated"),
        ]);
        assert_eq!(increment(&front, None).status, 200);
        let lost = increment(&front, None);
        assert_eq!((lost.status, lost.code()), (503, "unavailable"));
        let kept = increment(&front, Some("k"));
        assert_eq!((kept.status, &kept.json()["repeated"]), (200, &json!(true)));
        let seen = worker.seen();
        assert_eq!(seen[0].method, "POST");
        assert_eq!(seen[2].headers["dormouse-name"], "likes:shard:0");
        assert!(seen[2].headers.contains_key("dormouse-epoch"));
        assert_eq!(seen[2].body, "[5,1]");
        assert_eq!(seen.len(), 6);
    }
}

#[test]
fn what_holds_for_objects_holds_for_counters() {
    let runtime = runtime();
    let worker = Scripted::start(&runtime);
    let config: Config = toml::from_str(
        "[auth.ours.api_keys]
         in = 'header.x-api-key'
         keys = { ada = '2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b' }
         [limits.few]
         key = '{jwt.sub}'
         limit = 1
         period = '1h'
         [objects]
         auth = ['ours']
         limits = ['few']
         [objects.cors]
         origins = ['*']",
    )
    .unwrap();
    let config = Config {
        auth: config.auth,
        limits: config.limits,
        objects: config.objects,
        ..crate::support::config()
    };
    config.validate().unwrap();
    let ring = RingFrom::Document(ring(1, worker.address));
    let front = Front::start(runtime, &config, ring);
    worker.answer("plan", || ok(&plan(1, 1, "random")));
    worker.answer("add", || added(1, "counted"));
    assert_eq!(increment(&front, None).status, 401);
    let known = || {
        front
            .request("POST", "/counters/a/increment")
            .header("x-api-key", "secret")
    };
    let first = front.send(known().header("origin", "https://a.example"), "");
    assert_eq!(first.status, 200);
    assert_eq!(first.headers["access-control-allow-origin"], "*");
    assert_eq!(front.send(known(), "").status, 429);
    assert_eq!(worker.seen().len(), 2, "a plan and an increment");
}

#[test]
fn routes_lead_to_counters() {
    let runtime = runtime();
    let worker = Scripted::start(&runtime);
    let routes: Config = toml::from_str(
        "counters.key = '{query.user}'
         [[routes]]
         name = 'like'
         path = '/posts/{post}/likes'
         counter = { name = 'likes:{path.post}', by = '{query.by|1}' }
         [[routes]]
         name = 'likes'
         path = '/posts/{post}/likes'
         counter = { name = 'likes:{path.post}', read = true }",
    )
    .unwrap();
    let config = Config {
        routes: routes.routes,
        counters: routes.counters,
        ..config()
    };
    config.validate().unwrap();
    let ring = RingFrom::Document(ring(1, worker.address));
    let front = Front::start(runtime, &config, ring);
    worker.script([
        ok(&plan(1, 50, "hash")),
        added(1, "counted"),
        added(1, "counted"),
        ok(&json!({ "value": "4", "shards": 50, "staleness_ms": 0 }).to_string()),
    ]);
    let liked = front.post("/posts/7/likes?user=ada", "");
    let seat = jump(key_hash("ada"), 50).to_string();
    assert_eq!((liked.status, &liked.json()["shard"]), (200, &json!(seat)));
    assert_eq!(
        front.post("/posts/7/likes?user=ada&by=3", "").json()["by"],
        3
    );
    assert_eq!(front.get("/posts/7/likes").json()["value"], 4);
    assert_eq!(
        front.post("/posts/7/likes?user=ada&by=much", "").status,
        400
    );
    let nobody = front.post("/posts/7/likes", "");
    assert_eq!((nobody.status, nobody.code()), (400, "bad_request"));
    let detail = nobody.json()["detail"].to_string();
    assert!(detail.contains("query.user is missing"), "{detail}");
    let allowed = front.send(front.request("PUT", "/posts/7/likes"), "");
    assert_eq!(allowed.headers["allow"], "GET, HEAD, POST");
    let calls = calls(&worker);
    assert_eq!(calls[1].0, format!("likes:7:shard:{seat}"));
    assert_eq!(calls[2].2, json!([3, 1]));
    assert_eq!(
        (calls[3].0.as_str(), calls[3].1.as_str()),
        ("likes:7", "read")
    );
    front.eventually("gateway_requests_total{route=\"like\",code=\"200\"}", 2.0);
}

/// A gateway, and its worker as a test plays it, after the first increment of `c` is on its way.
fn under_way(config: impl FnOnce(&mut Config)) -> (Front, Worker, u32, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut changed = crate::support::config();
    config(&mut changed);
    let ring = RingFrom::Document(ring(1, listener.local_addr().unwrap()));
    let front = Front::start(runtime(), &changed, ring);
    let first = ask(&front, "1");
    let mut worker = Worker::accept(&listener, Verdict::Accepted);
    let (stream, _) = worker.asked();
    worker.answer(stream, &plan(1, 1, "random"));
    let (stream, by) = next_add(&mut worker);
    assert_eq!(by, 1);
    (front, worker, stream, first)
}

fn ask(front: &Front, by: &str) -> TcpStream {
    let mut client = client(front);
    write!(
        client,
        "POST /counters/c/increment?by={by} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
    )
    .unwrap();
    client
}

/// The next call, which must be an increment: by how much.
#[track_caller]
fn next_add(worker: &mut Worker) -> (u32, i64) {
    let (stream, payload) = worker.asked();
    let request = Request::read(&payload).unwrap();
    let (by, version): (i64, u64) = serde_json::from_slice(request.body).unwrap();
    assert_eq!(version, 1);
    (stream, by)
}

const COUNTED: &str = "{\"version\":1,\"outcome\":\"counted\"}";

#[track_caller]
fn status(client: &mut TcpStream) -> String {
    let head = read_head(client);
    head.split(' ').nth(1).unwrap().to_owned()
}

#[test]
fn increments_that_come_together_go_together_and_wait_for_their_answer() {
    let (front, mut worker, stream, mut first) = under_way(|_| {});
    let mut others = ["10", "200", "-3000"].map(|by| ask(&front, by));
    front.eventually("gateway_counter_waiting", 3.0);
    // One of them does not wait for its answer; it is counted all the same.
    others[1].shutdown(Shutdown::Both).unwrap();
    worker.answer(stream, COUNTED);
    assert_eq!(status(&mut first), "200");
    let (stream, by) = next_add(&mut worker);
    assert_eq!(by, 10 + 200 - 3000);
    worker.answer(stream, COUNTED);
    assert_eq!(status(&mut others[0]), "200");
    assert_eq!(status(&mut others[2]), "200");
    front.eventually("gateway_counter_increments_total{outcome=\"counted\"}", 4.0);
    front.eventually("gateway_counter_calls_total", 2.0);
    front.eventually("gateway_counter_waiting", 0.0);
    // Nobody is under way any more: the next goes at once.
    let mut last = ask(&front, "7");
    let (stream, by) = next_add(&mut worker);
    assert_eq!(by, 7);
    worker.answer(stream, COUNTED);
    assert_eq!(status(&mut last), "200");
}

#[test]
fn a_sum_that_a_shard_refuses_is_tried_one_by_one() {
    let (front, mut worker, stream, mut first) = under_way(|_| {});
    let mut fits = ask(&front, "2");
    front.eventually("gateway_counter_waiting", 1.0);
    let mut too_much = ask(&front, "100");
    front.eventually("gateway_counter_waiting", 2.0);
    worker.answer(stream, COUNTED);
    assert_eq!(status(&mut first), "200");
    let (stream, by) = next_add(&mut worker);
    assert_eq!(by, 102);
    refuse(&mut worker, stream);
    for _ in 0..2 {
        match next_add(&mut worker) {
            (stream, 2) => worker.answer(stream, COUNTED),
            (stream, 100) => refuse(&mut worker, stream),
            (_, by) => panic!("{by}"),
        }
    }
    assert_eq!(status(&mut fits), "200");
    assert_eq!(status(&mut too_much), "400");
}

fn refuse(worker: &mut Worker, stream: u32) {
    let lines = [(&b"dormouse-error"[..], &b"bad_request"[..])];
    worker.send(|out| {
        let body = b"{\"detail\":\"the total of a shard has 64 bits\"}";
        assert!(protocol::link::response(
            out,
            stream,
            true,
            400,
            lines.into_iter(),
            body
        ));
    });
}

#[test]
fn sums_that_do_not_fit_go_in_parts() {
    let (front, mut worker, stream, mut first) = under_way(|_| {});
    let most = i64::MAX.to_string();
    let mut others = Vec::new();
    for (waiting, by) in [(1.0, "1"), (2.0, most.as_str()), (3.0, "2")] {
        others.push(ask(&front, by));
        front.eventually("gateway_counter_waiting", waiting);
    }
    worker.answer(stream, COUNTED);
    let mut parts = Vec::new();
    for _ in 0..3 {
        let (stream, by) = next_add(&mut worker);
        parts.push(by);
        worker.answer(stream, COUNTED);
    }
    assert_eq!(parts, [1, i64::MAX, 2]);
    assert_eq!(status(&mut first), "200");
    assert!(others.iter_mut().all(|client| status(client) == "200"));
}

#[test]
fn too_many_that_wait_are_refused() {
    let (front, mut worker, stream, _first) =
        under_way(|config| config.counters.waiting_max = std::num::NonZeroU32::MIN);
    let mut waits = ask(&front, "1");
    front.eventually("gateway_counter_waiting", 1.0);
    let refused = front.post("/counters/c/increment", "");
    assert_eq!((refused.status, refused.code()), (503, "overloaded"));
    worker.answer(stream, COUNTED);
    let (stream, _) = next_add(&mut worker);
    worker.answer(stream, COUNTED);
    assert_eq!(status(&mut waits), "200");
}

#[test]
fn a_link_that_breaks_tells_all_that_went_together() {
    let (front, mut worker, stream, mut first) = under_way(|_| {});
    let mut others = ["1", "2"].map(|by| ask(&front, by));
    front.eventually("gateway_counter_waiting", 2.0);
    worker.answer(stream, COUNTED);
    assert_eq!(status(&mut first), "200");
    next_add(&mut worker);
    drop(worker);
    assert!(others.iter_mut().all(|client| status(client) == "503"));
    front.eventually("gateway_counter_increments_total{outcome=\"unknown\"}", 2.0);
}

#[test]
fn combining_can_be_switched_off() {
    let (front, mut worker, stream, mut first) =
        under_way(|config| config.counters.combine = false);
    let mut second = ask(&front, "2");
    let (next, by) = next_add(&mut worker);
    assert_eq!(by, 2, "it waits for nobody");
    worker.answer(next, COUNTED);
    assert_eq!(status(&mut second), "200");
    worker.answer(stream, COUNTED);
    assert_eq!(status(&mut first), "200");
}

#[test]
fn a_silent_shard_is_asked_again_with_a_key() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut config = config();
    config.requests.silence_max = std::time::Duration::from_millis(200);
    let ring = RingFrom::Document(ring(1, listener.local_addr().unwrap()));
    let front = Front::start(runtime(), &config, ring);
    let worker = std::thread::spawn(move || {
        let mut worker = Worker::accept(&listener, Verdict::Accepted);
        let (stream, _) = worker.asked();
        worker.answer(stream, &plan(1, 1, "random"));
        worker.asked();
        // The gateway cancels what it does not wait for any longer, and asks again.
        worker.cancelled();
        let (stream, _) = worker.asked();
        worker.answer(stream, "{\"version\":1,\"outcome\":\"repeated\"}");
        worker
    });
    assert_eq!(increment(&front, Some("k")).json()["repeated"], json!(true));
    drop(worker.join().unwrap());
}
