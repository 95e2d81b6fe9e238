//! What objects cost and do, as metrics, `/hot` and the advisor show it.

use std::time::Duration;

use ops::advisor::{Level, Report, Seen, Thresholds, report};
use ops::hot::HotPage;
use protocol::headers;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::support::{TestNode, eventually};

/// A page that the only worker of a node shows operators.
fn page<T: DeserializeOwned>(node: &TestNode, path: &str) -> T {
    let owner = node.owner(node.id("Probe", "any"));
    let request = http::Request::builder()
        .uri(format!("http://{owner}{path}"))
        .header(headers::OPERATOR, "1");
    let answer = node.send(request, "");
    assert_eq!(answer.status, 200, "{answer:?}");
    serde_json::from_slice(&answer.body).unwrap()
}

fn judged(node: &TestNode) -> Report {
    report(&page::<Seen>(node, "/advisor"))
}

/// The level of a rule for an object.
fn level(report: &Report, rule: &str, name: &str) -> Level {
    let of_object = report.findings.iter().filter(|finding| {
        let object = finding.object.as_ref();
        finding.rule == rule && object.is_some_and(|object| object.name.as_deref() == Some(name))
    });
    of_object
        .map(|finding| finding.level)
        .max()
        .unwrap_or_default()
}

#[test]
fn meters_count_what_a_class_does() {
    let node = TestNode::start();
    let exec = |sql: &str| node.result("Sql", "a", "exec", json!([sql]));
    exec("CREATE TABLE t (n INTEGER PRIMARY KEY, text TEXT)");
    exec("INSERT INTO t SELECT value, 'x' FROM json_each('[1,2,3,4,5,6,7,8,9,10]')");
    exec("SELECT count(*) FROM t WHERE text = 'y'");
    node.result("Kv", "a", "put", json!([{ "k": "v".repeat(5000) }]));
    node.result("Kv", "a", "get", json!(["k"]));
    node.result("Kv", "a", "delete", json!(["k"]));
    assert_eq!(node.fetch("GET", "Kv", "a", "/k", "").status, 404);
    let has = |line: &str, want: f64| {
        eventually(line, || (node.metric(line) - want).abs() < 0.5);
    };
    has("shard_usage_requests_total{class=\"Sql\"}", 3.0);
    has("shard_usage_rows_written_total{class=\"Sql\"}", 10.0);
    has("shard_usage_rows_read_total{class=\"Sql\"}", 10.0);
    has("shard_usage_rows_returned_total{class=\"Sql\"}", 1.0);
    has("shard_usage_requests_total{class=\"Kv\"}", 4.0);
    has("shard_usage_calls_total{class=\"Kv\"}", 3.0);
    has("shard_usage_fetches_total{class=\"Kv\"}", 1.0);
    has("shard_usage_kv_write_units_total{class=\"Kv\"}", 2.0);
    // The value takes two units; the key that is gone, one.
    has("shard_usage_kv_read_units_total{class=\"Kv\"}", 3.0);
    has("shard_usage_kv_deletes_total{class=\"Kv\"}", 1.0);
    has("shard_activations_total{class=\"Kv\"}", 1.0);
    has("shard_constructor_seconds_count{class=\"Kv\"}", 1.0);
}

#[test]
fn seconds_awake_are_counted_while_an_object_is() {
    let node = TestNode::with(|config| config.objects.idle_after = Duration::from_secs(60));
    for object in 0..20 {
        node.result("Counter", &object.to_string(), "value", json!([]));
    }
    let line = "shard_usage_awake_seconds_total{class=\"Counter\"}";
    eventually("twenty objects make a second in a twentieth of one", || {
        node.metric(line) >= 4.0
    });
}

#[test]
fn what_is_stored_is_known_from_the_catalogs() {
    let dir = tempfile::tempdir().unwrap();
    let config = crate::support::config(dir.path());
    let node = TestNode::reopen(&config);
    for object in 0..3 {
        node.result("Counter", &object.to_string(), "increment", json!([]));
    }
    node.node.shut_down();
    // Read at the start; after that when they change, every quarter of a minute.
    let node = TestNode::reopen(&config);
    eventually("the catalogs are read", || {
        node.metric("shard_stored_objects{class=\"Counter\",size=\"under_10mb\"}") == 3.0
    });
    assert_eq!(
        node.metric("shard_stored_bytes{class=\"Counter\"}"),
        3.0 * 3072.0
    );
    let seen: Seen = page(&node, "/advisor");
    let counter = { seen.classes.iter() }.find(|class| class.class == "Counter");
    assert_eq!(counter.unwrap().objects, 3);
    assert_eq!(counter.unwrap().unnamed, 0);
}

#[test]
fn the_hottest_objects_are_shown_by_what_they_do() {
    let node = TestNode::start();
    for _ in 0..5 {
        node.result("Counter", "busy", "increment", json!([]));
    }
    node.result("Counter", "lazy", "value", json!([]));
    node.result("Sql", "s", "exec", json!(["CREATE TABLE t (n)"]));
    node.result(
        "Sql",
        "s",
        "exec",
        json!(["INSERT INTO t SELECT value FROM json_each('[1,2,3,4,5,6,7,8,9]')"]),
    );
    let hot: HotPage = page(&node, "/hot");
    let names = |measure: &str| -> Vec<&str> {
        let objects = hot.0[measure].iter();
        objects
            .map(|object| object.name.as_deref().unwrap())
            .collect()
    };
    assert_eq!(names("requests_per_second"), ["busy", "s", "lazy"]);
    assert_eq!(names("rows_written_per_second"), ["s", "busy"]);
    assert_eq!(names("turn_seconds_per_second").len(), 3);
    assert_eq!(names("bytes").len(), 2, "what never wrote is not stored");
    assert!(names("alarms_per_second").is_empty());
    let busy = &hot.0["requests_per_second"][0];
    assert!((0.05..0.084).contains(&busy.value), "{busy:?}");
    assert_eq!(busy.too_high_by, 0.0);
}

#[test]
fn the_advisor_sees_what_objects_are_bad_at() {
    let node = TestNode::with(|config| {
        config.objects.idle_after = Duration::from_millis(200);
        config.advisor = Thresholds {
            bytes_yellow: 4096,
            bytes_yellow_high: 5000,
            bytes_red: 6000,
            keys_yellow: 110,
            ..Thresholds::default()
        };
    });
    // 120 pairs; 8 KiB and more; an alarm that rattles at doors; a parent of 150.
    let pairs: serde_json::Map<String, Value> =
        (0..120).map(|n| (format!("k{n}"), n.into())).collect();
    node.result("Kv", "many", "put", json!([pairs]));
    node.result("Kv", "one", "put", json!([{ "k": "v".repeat(9000) }]));
    node.result("Rattle", "door", "begin", json!([]));
    node.result("Probe", "parent", "call_others", json!([150]));
    eventually("all of it is judged", || {
        let report = judged(&node);
        let levels = [
            ("K2", "many", Level::Yellow),
            ("K3", "one", Level::Red),
            ("K4", "door", Level::Red),
            ("H13", "door", Level::Red),
            ("K6", "parent", Level::Red),
            ("K13", "parent", Level::Red),
        ];
        levels
            .iter()
            .all(|(rule, name, want)| level(&report, rule, name) == *want)
    });
    let report = judged(&node);
    assert_eq!(report.level, Level::Red);
    for finding in &report.findings {
        assert!(!finding.pattern.is_empty(), "{finding:?}");
    }
    assert_eq!(level(&report, "K2", "one"), Level::Green);
    assert_eq!(level(&report, "K4", "parent"), Level::Green);
    // An object that gives its keys up is green again when it has slept.
    node.result("Kv", "many", "deleteAll", json!([]));
    eventually("few keys are known to be few", || {
        level(&judged(&node), "K2", "many") == Level::Green
    });
}
