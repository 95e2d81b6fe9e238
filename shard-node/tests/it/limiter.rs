//! The class that decides rate limits for several gateways.

use protocol::headers;
use protocol::limiter::{ASKS_MAX, CLASS, TAKE};
use serde_json::{Value, json};

use crate::support::{Answer, TestNode, config};

const NAME: &str = "SFO:per-user:0";

fn terms(algorithm: &str, limit: u32, seconds: u64) -> Value {
    json!({
        "algorithm": algorithm, "limit": limit, "burst": limit,
        "period": { "secs": seconds, "nanos": 0 },
    })
}

fn ask(key: u64, most: u32) -> Value {
    json!({ "key": format!("{key:032x}"), "most": most })
}

fn take(node: &TestNode, terms: &Value, asks: &[Value]) -> Answer {
    let request = node
        .request("POST", CLASS, NAME, "/")
        .header(headers::METHOD, TAKE)
        .header(headers::INTERNAL, "1");
    node.send(request, json!([terms, asks]).to_string())
}

/// What was taken of each.
#[track_caller]
fn taken(node: &TestNode, terms: &Value, asks: &[Value]) -> Vec<u64> {
    let answer = take(node, terms, asks);
    assert_eq!(answer.status, 200, "{answer:?}");
    let grants = answer.json();
    let grants = grants.as_array().unwrap().iter();
    grants
        .map(|grant| grant["taken"].as_u64().unwrap())
        .collect()
}

#[test]
fn clients_are_told_that_there_is_no_such_class() {
    let node = TestNode::start();
    let answer = node.call(
        CLASS,
        NAME,
        TAKE,
        json!([terms("gcra", 5, 10), [ask(1, 5)]]),
    );
    assert_eq!((answer.status, answer.code()), (404, "not_found"));
    assert!(!answer.detail().contains("Queue, Limiter"));
}

#[test]
fn keys_get_what_the_terms_allow_and_no_more() {
    let node = TestNode::start();
    for algorithm in ["gcra", "sliding_window"] {
        let terms = terms(algorithm, 5, 3600);
        let key = algorithm.len() as u64;
        let asks = [ask(key, 3), ask(key, 3), ask(key, 3), ask(key + 100, 9)];
        assert_eq!(taken(&node, &terms, &asks), [3, 2, 0, 5], "{algorithm}");
        let refused = take(&node, &terms, &[ask(key, 1)]).json();
        let wait = refused[0]["wait"].as_u64().unwrap() / 1_000_000_000;
        assert!((600..4000).contains(&wait), "{wait} s");
    }
}

#[test]
fn what_was_taken_is_known_after_sleep_and_restart() {
    let dir = tempfile::tempdir().unwrap();
    let terms = terms("gcra", 5, 3600);
    let node = TestNode::reopen(&config(dir.path()));
    assert_eq!(taken(&node, &terms, &[ask(1, 4)]), [4]);
    node.node.shut_down();
    let node = TestNode::reopen(&config(dir.path()));
    assert_eq!(taken(&node, &terms, &[ask(1, 4), ask(2, 4)]), [1, 4]);
}

#[test]
fn what_is_no_call_of_a_gateway_is_refused() {
    let node = TestNode::start();
    let good = terms("gcra", 5, 10);
    let refused = |terms: &Value, asks: &[Value], want: &str| {
        let answer = take(&node, terms, asks);
        assert_eq!(answer.status, 400, "{answer:?}");
        assert!(answer.detail().contains(want), "{answer:?}");
    };
    refused(&terms("gcra", 5, 0), &[], "period = 0ns");
    refused(&terms("leaky", 5, 1), &[], "argument 1 (terms)");
    refused(&good, &[json!({ "key": "ab", "most": 1 })], "32 hex digits");
    refused(
        &good,
        &vec![ask(1, 1); ASKS_MAX + 1],
        "257 asks are more than 256",
    );
}
