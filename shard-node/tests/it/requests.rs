//! What callers see: answers, refusals, order, atomicity.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use protocol::headers;
use serde_json::json;

use crate::support::{TestNode, eventually};

#[test]
fn concurrent_calls_on_one_object_are_serial() {
    let node = TestNode::start();
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..125 {
                    node.result("Probe", "a", "read_add_write", json!([]));
                }
            });
        }
    });
    assert_eq!(node.result("Probe", "a", "read_add_write", json!([])), 1001);
}

#[test]
fn calls_of_one_connection_keep_their_order() {
    let node = TestNode::start();
    for expected in 1..=200 {
        assert_eq!(node.result("Probe", "a", "order", json!([])), expected);
    }
}

#[test]
fn fields_are_a_cache_while_the_object_is_awake() {
    let node = TestNode::start();
    assert_eq!(node.result("Probe", "a", "cached", json!([])), 1);
    assert_eq!(node.result("Probe", "a", "cached", json!([])), 2);
}

#[test]
fn another_request_runs_while_one_awaits() {
    let node = TestNode::start();
    thread::scope(|scope| {
        let slow = scope.spawn(|| node.result("Probe", "a", "wait", json!([2000])));
        let begun = Duration::from_nanos(shard_node::clock::monotonic_nanos());
        node.result("Probe", "a", "instance", json!([]));
        let took = Duration::from_nanos(shard_node::clock::monotonic_nanos()) - begun;
        assert!(took < Duration::from_millis(1500), "it waited {took:?}");
        assert!(!slow.is_finished());
        slow.join().unwrap();
    });
}

/// A step of a saga: however often it is asked for it happens once, and says the same.
#[test]
fn a_step_happens_once_per_key() {
    let node = TestNode::start();
    let once = |key: &str| node.result("Probe", "a", "once", json!([key]));
    assert_eq!(
        (once("x"), once("y"), once("x"), once("y")),
        (json!(1), json!(2), json!(1), json!(2))
    );
    // What failed did not happen.
    let failed = node.call("Probe", "a", "once", json!(["z", true]));
    assert_eq!(failed.status, 400);
    assert_eq!(node.result("Probe", "a", "written", json!([])), "2");
    assert_eq!((once("z"), once("z")), (json!(3), json!(3)));
    let refused = node.call("Probe", "a", "once", json!([""]));
    assert!(refused.detail().contains("must have 1 to 256 bytes"));
}

/// An object takes itself back to a bookmark, and forward again.
#[test]
fn an_object_restores_itself_at_its_next_start() {
    let mut node = TestNode::start();
    let written = |node: &TestNode| node.result("Probe", "a", "written", json!([]));
    let write = |node: &TestNode, value: &str| node.result("Probe", "a", "write", json!([value]));
    write(&node, "first");
    let bookmark = node.result("Probe", "a", "bookmark", json!([]));
    write(&node, "second");
    assert!(node.result("Probe", "a", "bookmark", json!([])).as_str() > bookmark.as_str());
    let undo = node.result("Probe", "a", "go_back", json!([bookmark]));
    // Whatever comes next waits for the restore.
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(written(&node), "first"));
        }
    });
    node.result("Probe", "a", "go_back", json!([undo]));
    assert_eq!(written(&node), "second");
    // One that is due when the process ends is done by the next.
    write(&node, "third");
    node.result("Probe", "a", "go_back", json!([bookmark, false]));
    assert_eq!(written(&node), "third", "the session goes on");
    node = node.restart();
    let first = node.call("Probe", "a", "written", json!([]));
    assert_eq!((first.status, first.code()), (503, "unavailable"));
    eventually("it is restored", || {
        node.call("Probe", "a", "written", json!([])).status == 200
    });
    assert_eq!(written(&node), "first");
    // What cannot be done changes nothing, and does not stand in the way.
    let long_ago = protocol::Bookmark::at_time(1).to_string();
    node.result("Probe", "a", "go_back", json!([long_ago]));
    assert_eq!(written(&node), "first");
    let future = protocol::Bookmark::at_time(u64::MAX).to_string();
    let refused = node.call("Probe", "a", "go_back", json!([future]));
    assert!(refused.detail().contains("has not come yet"));
    let refused = node.call("Probe", "a", "bookmark", json!([1]));
    assert!(refused.detail().contains("must be from archive.window"));
}

#[test]
fn a_failing_handler_undoes_its_turn() {
    let node = TestNode::start();
    node.result("Probe", "a", "write", json!(["kept"]));
    let answer = node.call("Probe", "a", "write_then_fail", json!([]));
    assert_eq!((answer.status, answer.code()), (400, "bad_request"));
    assert_eq!(node.result("Probe", "a", "written", json!([])), "kept");
    // Only the stretch that failed: what was written before the wait is durable.
    let answer = node.call("Probe", "a", "write_around_a_wait", json!([]));
    assert_eq!(answer.status, 400);
    assert_eq!(node.result("Probe", "a", "written", json!([])), "before");
}

#[test]
fn a_panic_resets_one_object_and_no_other() {
    let node = TestNode::start();
    node.result("Probe", "a", "write", json!(["kept"]));
    let (a, b) = (
        node.result("Probe", "a", "instance", json!([])),
        node.result("Probe", "b", "instance", json!([])),
    );
    let answer = node.call("Probe", "a", "write_then_panic", json!([]));
    assert_eq!((answer.status, answer.code()), (500, "object_reset"));
    assert_eq!(answer.detail(), "class code panicked: as asked");
    assert_eq!(answer.json()["remote"], true);
    assert_ne!(node.result("Probe", "a", "instance", json!([])), a);
    assert_eq!(node.result("Probe", "b", "instance", json!([])), b);
    assert_eq!(node.result("Probe", "a", "written", json!([])), "kept");
    assert_eq!(node.metric("shard_object_resets_total"), 1.0);
}

#[test]
fn a_panic_ends_the_calls_under_way_on_that_object() {
    let node = TestNode::start();
    thread::scope(|scope| {
        let slow = scope.spawn(|| node.call("Probe", "a", "wait", json!([20_000])));
        eventually("the call runs", || {
            node.metric("shard_mailbox_wait_seconds_count") >= 1.0
        });
        node.call("Probe", "a", "write_then_panic", json!([]));
        let answer = slow.join().unwrap();
        assert_eq!((answer.status, answer.code()), (500, "object_reset"));
    });
}

#[test]
fn a_panicking_constructor_is_answered_every_time() {
    let node = TestNode::start();
    for _ in 0..3 {
        let answer = node.call("Broken", "a", "any", json!([]));
        assert_eq!(answer.code(), "object_reset");
        assert!(
            answer.detail().contains("this constructor always panics"),
            "{}",
            answer.detail()
        );
    }
}

#[test]
fn an_exception_reaches_the_caller_with_its_name() {
    let node = TestNode::start();
    let answer = node.call("Probe", "a", "throw", json!([]));
    assert_eq!((answer.status, answer.code()), (500, "internal"));
    let problem = answer.json();
    assert_eq!(problem["detail"], "RangeError: too far");
    assert_eq!(
        (
            &problem["remote"],
            &problem["retryable"],
            &problem["overloaded"]
        ),
        (&json!(true), &json!(false), &json!(false))
    );
}

#[test]
fn sql_that_runs_away_resets_its_object() {
    let node = TestNode::with(|config| config.sql.turn_time_max = Duration::from_millis(50));
    node.result("Sql", "a", "exec", json!(["CREATE TABLE t (a)"]));
    let endless = "INSERT INTO t WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n";
    let answer = node.call("Sql", "a", "exec", json!([endless]));
    assert_eq!((answer.status, answer.code()), (500, "object_reset"));
    assert!(
        answer.detail().contains("sql.turn_time_max = 50ms"),
        "{}",
        answer.detail()
    );
    assert_eq!(
        node.result("Sql", "a", "one", json!(["SELECT count(*) AS n FROM t"])),
        json!({"n": 0})
    );
}

#[test]
fn a_busy_object_leaves_time_for_the_others() {
    let node = TestNode::start();
    let slow = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300000) SELECT max(i) FROM n";
    node.result("Sql", "busy", "exec", json!([slow]));
    thread::scope(|scope| {
        let calls: Vec<_> = (0..16)
            .map(|_| scope.spawn(|| node.result("Sql", "busy", "exec", json!([slow]))))
            .collect();
        eventually("they run", || {
            node.metric("shard_requests_total{class=\"Sql\",code=\"200\"}") >= 2.0
        });
        node.result("Counter", "other", "value", json!([]));
        let unfinished = calls.iter().filter(|call| !call.is_finished()).count();
        assert!(
            unfinished > 4,
            "the other object was served last: {unfinished} left"
        );
    });
}

#[test]
fn a_panic_in_a_streamed_body_ends_that_response_alone() {
    let node = TestNode::start();
    let id = node.id("Probe", "a");
    let mut stream = TcpStream::connect(node.owner(id)).unwrap();
    write!(stream, "GET /panic_while_streaming HTTP/1.1\r\nhost: x\r\ndormouse-class: Probe\r\ndormouse-object: {id}\r\ndormouse-epoch: 1\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    // How the connection ends is not the point.
    drop(stream.read_to_end(&mut answer));
    let answer = String::from_utf8_lossy(&answer);
    assert!(
        !answer.ends_with("0\r\n\r\n"),
        "the body must not look complete: {answer}"
    );
    assert_eq!(node.call("Probe", "b", "instance", json!([])).status, 200);
}

#[test]
fn a_full_mailbox_refuses_and_says_so() {
    let node = TestNode::with(|config| {
        config.mailbox.capacity = 2.try_into().unwrap();
        config.mailbox.in_flight_max = 1.try_into().unwrap();
    });
    thread::scope(|scope| {
        let running = scope.spawn(|| node.call("Probe", "a", "wait", json!([4000])));
        eventually("it runs", || {
            node.metric("shard_mailbox_wait_seconds_count") >= 1.0
        });
        let waiting = [0; 2].map(|_| scope.spawn(|| node.call("Probe", "a", "wait", json!([1]))));
        eventually("both wait", || {
            node.metric("shard_mailbox_depth{worker=\"0\"}") >= 2.0
        });
        for _ in 0..3 {
            let refused = node.call("Probe", "a", "instance", json!([]));
            assert_eq!((refused.status, refused.code()), (503, "overloaded"));
            assert_eq!(refused.headers["retry-after"], "1");
            let problem = refused.json();
            assert_eq!(
                (&problem["overloaded"], &problem["retryable"]),
                (&json!(true), &json!(true))
            );
        }
        assert_eq!(running.join().unwrap().status, 200);
        for waiting in waiting {
            assert_eq!(waiting.join().unwrap().status, 200);
        }
    });
    assert_eq!(node.metric("shard_mailbox_refusals_total"), 3.0);
}

#[test]
fn a_request_whose_deadline_is_over_before_its_turn_never_runs() {
    let node = TestNode::with(|config| config.mailbox.in_flight_max = 1.try_into().unwrap());
    thread::scope(|scope| {
        let running = scope.spawn(|| node.call("Probe", "a", "wait", json!([1500])));
        eventually("it runs", || {
            node.metric("shard_mailbox_wait_seconds_count") >= 1.0
        });
        // One that has time waits before those that have not.
        let patient = scope.spawn(|| node.call("Probe", "a", "written", json!([])));
        eventually("it waits", || {
            node.metric("shard_mailbox_depth{worker=\"0\"}") >= 1.0
        });
        let hasty = scope.spawn(|| {
            let request = node.request("POST", "Probe", "a", "/");
            let request = request
                .header(headers::METHOD, "write")
                .header(headers::TIMEOUT, "100");
            node.send(request, r#"["hasty"]"#)
        });
        let answer = hasty.join().unwrap();
        assert_eq!((answer.status, answer.code()), (504, "timed_out"));
        assert_eq!(answer.json()["retryable"], true, "nothing ran");
        assert!(answer.detail().contains("deadline"), "{}", answer.detail());
        assert!(!running.is_finished(), "it was answered before its turn");
        assert_eq!(running.join().unwrap().status, 200);
        assert_eq!(patient.join().unwrap().json(), json!(null));
    });
    let request = node
        .request("GET", "Probe", "a", "/")
        .header(headers::TIMEOUT, "soon");
    let answer = node.send(request, "");
    assert_eq!((answer.status, answer.code()), (400, "bad_request"));
}

#[test]
fn a_request_that_waits_too_long_is_answered() {
    let node = TestNode::with(|config| {
        config.mailbox.wait_max = Duration::from_millis(100);
        config.mailbox.in_flight_max = 1.try_into().unwrap();
    });
    thread::scope(|scope| {
        let slow = scope.spawn(|| node.call("Probe", "a", "wait", json!([1000])));
        eventually("the call runs", || {
            node.metric("shard_mailbox_wait_seconds_count") >= 1.0
        });
        let answer = node.call("Probe", "a", "instance", json!([]));
        assert_eq!((answer.status, answer.code()), (504, "timed_out"));
        assert_eq!(answer.json()["retryable"], true, "it was not started");
        assert_eq!(slow.join().unwrap().status, 200);
    });
}

#[test]
fn objects_see_their_request_and_answer_as_they_like() {
    let node = TestNode::start();
    let request = node
        .request("PATCH", "Probe", "a", "/x%20y/../z?q=%41&r")
        .header("x-mine", "1");
    let answer = node.send(request, "body");
    assert_eq!(answer.status, 418);
    assert_eq!(answer.headers["x-own"], "kept");
    assert_eq!(answer.code(), "-", "only the system sets that header");
    let seen = answer.json();
    assert_eq!(
        (&seen["method"], &seen["path"], &seen["query"]),
        (&json!("PATCH"), &json!("/x%20y/../z"), &json!("q=%41&r"))
    );
    assert_eq!(seen["headers"]["x-mine"], "1");
}

#[test]
fn names_and_ids_are_known_inside() {
    let node = TestNode::start();
    assert_eq!(
        node.result("Probe", "räume/1", "name", json!([])),
        "räume/1"
    );
    assert_eq!(
        node.result("Probe", "a", "id", json!([])),
        node.id("Probe", "a").to_string()
    );
}

#[test]
fn an_upgraded_connection_belongs_to_the_object() {
    let node = TestNode::with(|config| config.objects.idle_after = Duration::from_millis(20));
    let id = node.id("Probe", "a");
    let mut stream = TcpStream::connect(node.owner(id)).unwrap();
    write!(stream, "GET /upgrade HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: shout\r\ndormouse-class: Probe\r\ndormouse-object: {id}\r\ndormouse-epoch: 1\r\n\r\n").unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    assert!(
        head.starts_with(b"HTTP/1.1 101 "),
        "{}",
        String::from_utf8_lossy(&head)
    );
    stream.write_all(b"dormouse").unwrap();
    let mut shouted = [0; 8];
    stream.read_exact(&mut shouted).unwrap();
    assert_eq!(&shouted, b"DORMOUSE");
    let before = node.result("Probe", "a", "instance", json!([]));
    // Objects around it come and go; this one stays while its connection is open.
    for other in 0..5 {
        node.result("Probe", &format!("other{other}"), "wait", json!([30]));
    }
    assert_eq!(node.result("Probe", "a", "instance", json!([])), before);
    drop(stream);
    eventually("all sleep", || {
        node.metric("shard_objects_awake{class=\"Probe\"}") == 0.0
    });
}

#[test]
fn an_object_streams_more_than_it_could_hold() {
    const BYTES: u64 = 100 << 20;
    let node = TestNode::with(|config| config.objects.idle_after = Duration::from_millis(50));
    let id = node.id("Probe", "a");
    let mut client = TcpStream::connect(node.owner(id)).unwrap();
    client
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    let mut sending = client.try_clone().unwrap();
    // Both directions at once: whoever sends all before reading would wait for ever.
    let sender = thread::spawn(move || {
        write!(sending, "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: {BYTES}\r\ndormouse-class: Probe\r\ndormouse-object: {id}\r\ndormouse-epoch: 1\r\n\r\n").unwrap();
        std::io::copy(&mut std::io::repeat(7).take(BYTES), &mut sending).unwrap();
    });
    let mut buffer = vec![0; 1 << 16];
    let (mut sevens, mut checked) = (0, false);
    while sevens < BYTES {
        let read = client.read(&mut buffer).unwrap();
        assert!(read > 0, "the connection closed after {sevens} bytes");
        // The rest is the head and the framing of chunks.
        sevens += buffer[..read].iter().filter(|&&byte| byte == 7).count() as u64;
        if !checked {
            // While nobody reads, the kernel holds some of the rest and the object waits with what it
            // has not sent: neither does the node buffer it, nor may the object leave.
            let first = node.result("Probe", "a", "instance", json!([]));
            node.result("Probe", "b", "wait", json!([300]));
            let meanwhile = node.result("Probe", "a", "instance", json!([]));
            assert_eq!(meanwhile, first, "it stays awake while it streams");
            checked = true;
        }
    }
    sender.join().unwrap();
}

#[test]
fn requests_that_no_gateway_would_send_are_refused() {
    let node = TestNode::start();
    let worker = node.node.addresses()[0];
    let check = |change: &dyn Fn(&mut http::HeaderMap), status: u16, want: &str| {
        let mut request = node
            .request("POST", "Counter", "a", "/")
            .header(headers::METHOD, "value");
        change(request.headers_mut().unwrap());
        let answer = node.send(request, "");
        assert_eq!(answer.status, status, "{answer:?}");
        assert!(
            answer.detail().contains(want),
            "{:?} should say {want:?}",
            answer.detail()
        );
    };
    let foreign = node.id("Kv", "a").to_string();
    check(
        &|h| drop(h.remove(headers::OBJECT)),
        400,
        "dormouse-object is missing",
    );
    check(
        &|h| drop(h.remove(headers::CLASS)),
        400,
        "dormouse-class is missing",
    );
    check(
        &|h| drop(h.remove(headers::EPOCH)),
        400,
        "dormouse-epoch is missing",
    );
    check(
        &|h| drop(h.insert(headers::OBJECT, "xy".parse().unwrap())),
        400,
        "64 lower-case hex digits",
    );
    check(
        &|h| drop(h.insert(headers::OBJECT, foreign.parse().unwrap())),
        400,
        "does not belong to class Counter",
    );
    check(
        &|h| drop(h.insert(headers::NAME, "b".parse().unwrap())),
        400,
        "does not lead to the id",
    );
    check(
        &|h| drop(h.insert(headers::EPOCH, "x".parse().unwrap())),
        400,
        "dormouse-epoch",
    );
    check(
        &|h| drop(h.insert(headers::CLASS, "Nope".parse().unwrap())),
        404,
        "there are Counter, Kv, Sql, Queue, Probe, Broken",
    );
    check(
        &|h| drop(h.insert(headers::METHOD, "nope".parse().unwrap())),
        404,
        "it has increment, value, reset",
    );
    let elsewhere = crate::support::agent()
        .get(format!("http://{worker}/x"))
        .call()
        .unwrap();
    assert_eq!(elsewhere.status(), 400);
}

#[test]
fn calls_with_wrong_arguments_are_refused_with_the_rule() {
    let node = TestNode::start();
    let check = |class: &str, method: &str, body: &str, want: &str| {
        let request = node
            .request("POST", class, "a", "/")
            .header(headers::METHOD, method);
        let answer = node.send(request, body);
        assert_eq!(
            (answer.status, answer.code()),
            (400, "bad_request"),
            "{answer:?}"
        );
        assert!(
            answer.detail().contains(want),
            "{:?} should say {want:?}",
            answer.detail()
        );
    };
    check(
        "Counter",
        "increment",
        "{}",
        "must be a JSON array of arguments",
    );
    check(
        "Counter",
        "increment",
        "[1",
        "must be a JSON array of arguments",
    );
    check(
        "Counter",
        "increment",
        "[1, 2]",
        "increment got 2 arguments, but it is called as increment(by = 1)",
    );
    check(
        "Counter",
        "increment",
        "[\"x\"]",
        "argument 1 (by) must be an integer of 64 bits, not \"x\"",
    );
    check("Counter", "increment", "[1.5]", "not 1.5");
    check(
        "Counter",
        "increment",
        "[9223372036854775808]",
        "not 9223372036854775808",
    );
    check("Counter", "value", "[1]", "value got 1 arguments");
    check("Kv", "get", "[]", "get(key) or get([keys])");
    check(
        "Kv",
        "get",
        "[1]",
        "argument 1 (key) must be a string, not 1",
    );
    check("Kv", "get", "[[1]]", "an array of strings");
    check("Kv", "put", "[\"k\"]", "an object of keys and values");
    check("Kv", "put", "[\"\", 1]", "a key must not be empty");
    check("Kv", "put", "[\"k\", {\"base64\": \"*\"}]", "valid base64");
    check(
        "Kv",
        "list",
        "[{\"limit\": 0}]",
        "limit=0 must be at least 1",
    );
    check("Kv", "list", "[{\"limits\": 1}]", "unknown field `limits`");
    check(
        "Kv",
        "list",
        "[{\"start\": \"a\", \"startAfter\": \"b\"}]",
        "exclude each other",
    );
    check("Sql", "exec", "[]", "exec(sql, params…)");
    check(
        "Sql",
        "exec",
        "[7]",
        "argument 1 (sql) must be a string, not 7",
    );
    check(
        "Sql",
        "exec",
        "[\"SELECT ?\", [1]]",
        "argument 2 (parameter) must be null, a boolean",
    );
    check(
        "Sql",
        "exec",
        "[\"SELEC 1\"]",
        "near \"SELEC\": syntax error (at byte 0)",
    );
    check(
        "Sql",
        "exec",
        "[\"CREATE TABLE _dormouse_x (a)\"]",
        "are reserved",
    );
    check(
        "Sql",
        "one",
        "[\"SELECT 1 WHERE 0\"]",
        "exactly one row, but the query gave 0",
    );
    check("Sql", "one", "[\"SELECT 1 UNION SELECT 2\"]", "gave 2");
}

#[test]
fn a_body_larger_than_a_call_may_have_is_refused() {
    let node = TestNode::start();
    let request = node
        .request("POST", "Kv", "a", "/")
        .header(headers::METHOD, "get");
    let id = node.id("Kv", "a");
    // Only announced: the refusal must not wait for the bytes.
    let mut stream = TcpStream::connect(node.owner(id)).unwrap();
    write!(
        stream,
        "POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 33554433\r\n"
    )
    .unwrap();
    for (name, value) in request.headers_ref().unwrap() {
        write!(stream, "{name}: {}\r\n", value.to_str().unwrap()).unwrap();
    }
    write!(stream, "\r\n").unwrap();
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 413");
}

#[test]
fn counters_count_in_64_bits_and_do_not_wrap() {
    let node = TestNode::start();
    let max = i64::MAX;
    assert_eq!(node.result("Counter", "a", "value", json!([])), 0);
    assert_eq!(node.result("Counter", "a", "increment", json!([])), 1);
    assert_eq!(node.result("Counter", "a", "increment", json!([-3])), -2);
    assert_eq!(node.result("Counter", "a", "reset", json!([])), 0);
    assert_eq!(node.result("Counter", "a", "increment", json!([max])), max);
    let answer = node.call("Counter", "a", "increment", json!([]));
    assert_eq!(answer.code(), "bad_request");
    assert!(
        answer.detail().contains("does not fit in 64 bits"),
        "{}",
        answer.detail()
    );
    assert_eq!(node.result("Counter", "a", "value", json!([])), max);
    assert_eq!(node.fetch("GET", "Counter", "a", "/value", "").json(), max);
    assert_eq!(
        node.fetch("POST", "Counter", "b", "/increment?by=5", "")
            .json(),
        5
    );
    assert_eq!(
        node.fetch("POST", "Counter", "b", "/increment?by=x", "")
            .code(),
        "bad_request"
    );
    assert_eq!(
        node.fetch("POST", "Counter", "b", "/increment?with=x", "")
            .code(),
        "bad_request"
    );
    assert_eq!(
        node.fetch("GET", "Counter", "b", "/increment", "").headers["allow"],
        "POST"
    );
    assert_eq!(
        node.fetch("GET", "Counter", "b", "/else", "").code(),
        "not_found"
    );
}

#[test]
fn pairs_keep_bytes_and_content_type_over_http() {
    let node = TestNode::start();
    let put = |key: &str, content_type: Option<&str>, value: &[u8]| {
        let mut request = node.request("PUT", "Kv", "a", key);
        if let Some(content_type) = content_type {
            request = request.header("content-type", content_type);
        }
        node.send(request, value).status
    };
    let bytes: Vec<u8> = (0..=255).collect();
    assert_eq!(put("/bin", Some("image/png"), &bytes), 201);
    assert_eq!(put("/bin", Some("image/png"), &bytes), 204);
    assert_eq!(put("/plain", None, b"x"), 201);
    assert_eq!(put("/a%2Fb/c", Some("text/plain"), b""), 201);
    let got = node.fetch("GET", "Kv", "a", "/bin", "");
    assert_eq!(
        (got.status, &got.headers["content-type"], &got.body),
        (200, &"image/png".parse().unwrap(), &bytes)
    );
    let head = node.fetch("HEAD", "Kv", "a", "/bin", "");
    assert_eq!(
        (
            head.status,
            head.headers["content-length"].to_str().unwrap(),
            head.body.len()
        ),
        (200, "256", 0)
    );
    assert_eq!(
        node.fetch("GET", "Kv", "a", "/plain", "").headers["content-type"],
        "application/octet-stream"
    );
    assert_eq!(node.fetch("GET", "Kv", "a", "/a/b/c", "").status, 200);
    assert_eq!(
        node.fetch("GET", "Kv", "a", "/none", "").code(),
        "not_found"
    );
    assert_eq!(node.fetch("DELETE", "Kv", "a", "/plain", "").status, 204);
    assert_eq!(node.fetch("DELETE", "Kv", "a", "/plain", "").status, 404);
    assert_eq!(
        node.fetch("POST", "Kv", "a", "/plain", "").headers["allow"],
        "GET, HEAD, PUT, DELETE"
    );
    assert_eq!(
        node.fetch("GET", "Kv", "a", "/%ff", "").code(),
        "bad_request"
    );
    let large = node.fetch("PUT", "Kv", "a", "/large", vec![0; (2 << 20) + 1]);
    assert_eq!((large.status, large.code()), (413, "payload_too_large"));
    let list = |query: &str| {
        node.fetch("GET", "Kv", "a", &format!("/?{query}"), "")
            .json()
    };
    assert_eq!(
        list(""),
        json!({"keys": [
            {"key": "a/b/c", "content_type": "text/plain", "bytes": 0},
            {"key": "bin", "content_type": "image/png", "bytes": 256},
        ], "truncated": false})
    );
    assert_eq!(list("limit=1")["truncated"], true);
    assert_eq!(list("reverse=true&limit=1")["keys"][0]["key"], "bin");
    assert_eq!(
        list("prefix=a%2F&start=a&end=b")["keys"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    assert_eq!(
        node.fetch("GET", "Kv", "a", "/?limit=x", "").code(),
        "bad_request"
    );
    assert_eq!(
        node.fetch("GET", "Kv", "a", "/?what=x", "").code(),
        "bad_request"
    );
}

#[test]
fn pairs_over_calls_single_and_in_batches() {
    let node = TestNode::start();
    let call = |method: &str, args| node.result("Kv", "a", method, args);
    assert_eq!(call("get", json!(["k"])), json!(null));
    assert_eq!(
        call("put", json!(["k", {"deep": [1, "ä", null]}])),
        json!(null)
    );
    assert_eq!(call("get", json!(["k"])), json!({"deep": [1, "ä", null]}));
    assert_eq!(
        call("put", json!([{"b": 2, "c": {"base64": "AP8="}}])),
        json!(null)
    );
    assert_eq!(
        call("get", json!([["b", "none", "c"]])),
        json!({"b": 2, "c": {"base64": "AP8="}})
    );
    assert_eq!(node.fetch("GET", "Kv", "a", "/c", "").body, [0, 255]);
    assert_eq!(
        node.fetch("GET", "Kv", "a", "/k", "").headers["content-type"],
        "application/json"
    );
    let listed = call("list", json!([{"reverse": true}]));
    assert_eq!(
        listed.as_object().unwrap().keys().collect::<Vec<_>>(),
        ["k", "c", "b"]
    );
    assert_eq!(
        call("list", json!([{"startAfter": "b", "limit": 1}])),
        json!({"c": {"base64": "AP8="}})
    );
    assert_eq!(call("delete", json!(["k"])), true);
    assert_eq!(call("delete", json!(["k"])), false);
    assert_eq!(call("delete", json!([["b", "c", "none"]])), 2);
    assert_eq!(call("list", json!([])), json!({}));
    let many: Vec<String> = (0..129).map(|n| format!("k{n}")).collect();
    assert_eq!(
        node.call("Kv", "a", "get", json!([many])).code(),
        "bad_request"
    );
    assert_eq!(call("get", json!([many[..128]])), json!({}));
    // A batch is one turn: a bad pair undoes the good ones before it.
    assert_eq!(
        node.call("Kv", "a", "put", json!([{"good": 1, "": 2}]))
            .code(),
        "bad_request"
    );
    assert_eq!(call("get", json!(["good"])), json!(null));
}

#[test]
fn sql_keeps_every_value() {
    let node = TestNode::start();
    let created = node.result("Sql", "a", "exec", json!(["CREATE TABLE t (v)"]));
    assert_eq!(
        created,
        json!({"columns": [], "rows": [], "rows_read": 0, "rows_written": 0})
    );
    let values = json!([null, 9223372036854775807i64, -9223372036854775808i64, 0.1, "text ä", {"base64": "AAEC"}, {"real": "Infinity"}, "", {"base64": ""}]);
    for value in values.as_array().unwrap() {
        let back = node.result(
            "Sql",
            "a",
            "exec",
            json!(["INSERT INTO t VALUES (?) RETURNING v", value]),
        );
        assert_eq!(
            back,
            json!({"columns": ["v"], "rows": [[value]], "rows_read": 1, "rows_written": 1})
        );
    }
    assert_eq!(
        node.result("Sql", "a", "one", json!(["SELECT ? AS flag", true])),
        json!({"flag": 1})
    );
    let all = node
        .fetch(
            "POST",
            "Sql",
            "a",
            "/exec",
            json!({"sql": "SELECT v FROM t WHERE rowid <= ?", "params": [3]}).to_string(),
        )
        .json();
    assert_eq!(all["rows"].as_array().unwrap().len(), 3);
    assert_eq!(all["rows_read"], 3);
    assert_eq!(
        node.fetch("POST", "Sql", "a", "/exec", "{}").code(),
        "bad_request"
    );
    assert_eq!(
        node.fetch("GET", "Sql", "a", "/exec", "").headers["allow"],
        "POST"
    );
    assert!(node.result("Sql", "a", "size", json!([])).as_u64().unwrap() >= 2048);
    let script =
        "CREATE TABLE u (a); INSERT INTO u VALUES (1), (2); SELECT sum(a) AS s FROM u WHERE a >= ?";
    assert_eq!(
        node.result("Sql", "b", "one", json!([script, 2])),
        json!({"s": 2})
    );
}

#[test]
fn a_statement_that_takes_all_memory_resets_its_object_and_no_other() {
    let node = TestNode::with(|config| config.sql.memory_bytes_max = 32 << 20);
    node.result(
        "Sql",
        "a",
        "exec",
        json!(["CREATE TABLE t (n); INSERT INTO t VALUES (1)"]),
    );
    node.result("Counter", "b", "increment", json!([]));
    let sort = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 400000)
        SELECT count(*) FROM (SELECT randomblob(1000) AS r FROM n ORDER BY r LIMIT 399999)";
    let answer = node.call("Sql", "a", "exec", json!([sort]));
    assert_eq!(
        (answer.status, answer.code()),
        (500, "object_reset"),
        "{answer:?}"
    );
    assert!(
        answer.detail().contains("sql.memory_bytes_max = 33554432"),
        "{answer:?}"
    );
    let rows = node.result("Sql", "a", "exec", json!(["SELECT n FROM t"]));
    assert_eq!(rows["rows"], json!([[1]]));
    assert_eq!(node.result("Counter", "b", "value", json!([])), 1);
}
