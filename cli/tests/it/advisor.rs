//! `dormouse doctor` before objects that are used well and badly, and `dormouse advise`.

use std::process::Output;

use serde_json::{Value, json};

use crate::support::{Process, agent, call, dormouse, eventually, gateway, node, request};

/// A node whose advisor is easily alarmed.
fn node_config(dir: &std::path::Path) -> std::path::PathBuf {
    let file = dir.join("node.toml");
    let text = "[objects]\nidle_after = '200ms'\n\
                [advisor]\nbytes_yellow = 4000\nbytes_yellow_high = 5000\nbytes_red = 20000\n";
    std::fs::write(&file, text).unwrap();
    file
}

fn run(admin: &str, args: &[&str]) -> Output {
    let mut command = dormouse();
    command.args(args).args(["--admin", admin]);
    command.output().unwrap()
}

fn text(output: &Output) -> String {
    assert!(output.stderr.is_empty(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn the_doctor_says_the_same_everywhere_and_its_exit_code_can_fail_a_pipeline() {
    let dir = tempfile::tempdir().unwrap();
    let config = node_config(dir.path());
    let mut command = node(&dir.path().join("data"), "2");
    let node = Process::start(command.arg("--config").arg(config));
    let gateway = Process::start(&mut gateway(&node));
    call(&gateway.url, "Counter/small/increment", &json!([]));
    // A coordinator asks a hundred shards, as it is made to: no object of a class's is like that.
    for (method, path) in [("POST", "likes/increment"), ("GET", "likes?exact=true")] {
        let url = format!("{}/counters/{path}", gateway.url);
        let (status, body) = request(&agent(), method, &url, "").unwrap();
        assert_eq!(status, 200, "{body}");
    }
    let doctor = |args: &[&str]| run(&gateway.admin, &[&["doctor"], args].concat());
    let healthy = doctor(&["--fail-on", "yellow"]);
    assert!(healthy.status.success(), "{healthy:?}");
    assert!(text(&healthy).contains("all green"), "{healthy:?}");

    let large = json!([{ "k": "v".repeat(6000) }]);
    call(&gateway.url, "Kv/large/put", &large);
    let yellow = doctor(&["--fail-on", "yellow-high"]);
    assert_eq!(yellow.status.code(), Some(3), "{yellow:?}");
    assert!(doctor(&["--fail-on", "red"]).status.success());
    let shown = text(&yellow);
    assert!(
        shown.contains("yellow_high K3  Kv large: its database has"),
        "{shown}"
    );

    let larger = json!([{ "k": "v".repeat(60_000) }]);
    call(&gateway.url, "Kv/larger/put", &larger);
    let red = doctor(&["--fail-on", "red", "--score"]);
    assert_eq!(red.status.code(), Some(3), "{red:?}");
    let shown = text(&red);
    let first = shown.find("red K3  Kv larger").unwrap();
    assert!(
        first < shown.find("K3  Kv large:").unwrap(),
        "the worst comes first: {shown}"
    );
    assert!(shown.contains("parent-child: "), "{shown}");
    assert!(shown.contains("not measured: K5"), "{shown}");
    assert!(shown.contains("\nKv:\n  "), "{shown}");
    assert!(doctor(&[]).status.success(), "nobody asked it to fail");

    let page = |admin: &str| -> Value {
        let (status, body) = request(&agent(), "GET", &format!("{admin}/advisor"), "").unwrap();
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    };
    let findings = |report: &Value| report["findings"].clone();
    let printed: Value = serde_json::from_str(&text(&doctor(&["--json"]))).unwrap();
    assert_eq!(findings(&printed), findings(&page(&gateway.admin)));
    assert_eq!(findings(&printed), findings(&page(&node.admin)));
    assert_eq!(printed["level"], "red");
}

#[test]
fn nodes_and_gateways_show_the_hottest_objects_of_all_workers() {
    let dir = tempfile::tempdir().unwrap();
    let node = Process::start(&mut node(dir.path(), "2"));
    let gateway = Process::start(&mut gateway(&node));
    for object in 0..6 {
        for _ in 0..=object {
            call(
                &gateway.url,
                &format!("Counter/o{object}/increment"),
                &json!([]),
            );
        }
    }
    let names = |url: &str| -> Vec<String> {
        let (status, body) = request(&agent(), "GET", url, "").unwrap();
        assert_eq!(status, 200, "{body}");
        let page: Value = serde_json::from_str(&body).unwrap();
        let objects = page["requests_per_second"].as_array().unwrap().iter();
        objects
            .map(|object| object["name"].as_str().unwrap().to_owned())
            .collect()
    };
    for url in [
        format!("{}/hot", node.admin),
        format!("{}/hot/nodes", gateway.admin),
    ] {
        assert_eq!(names(&url), ["o5", "o4", "o3", "o2", "o1", "o0"], "{url}");
    }
    // The gateway's own page is about what came to it.
    let (status, body) = request(&agent(), "GET", &format!("{}/hot", gateway.admin), "").unwrap();
    assert_eq!(status, 200);
    assert!(body.contains("\"limits\""), "{body}");
    let (status, _) = request(&agent(), "POST", &format!("{}/advisor", node.admin), "").unwrap();
    assert_eq!(status, 405);
}

#[test]
fn five_canned_answers_give_five_verdicts() {
    let check = |answers: [&str; 5], want: &str| {
        let flags = ["--state", "--reads", "--talk", "--sleep", "--count"];
        let mut command = dormouse();
        command.args(["advise", "--json"]);
        for (flag, answer) in flags.iter().zip(answers) {
            command.args([flag, answer]);
        }
        let output = command.output().unwrap();
        let advice: Value = serde_json::from_str(&text(&output)).unwrap();
        assert_eq!(advice["verdict"], want, "{advice}");
        assert!(!advice["because"].as_array().unwrap().is_empty());
    };
    check(["owned", "strong", "rarely", "yes", "many"], "object");
    check(["shared", "eventual", "rarely", "yes", "one"], "kv");
    check(["shared", "strong", "rarely", "yes", "one"], "sql");
    check(["owned", "strong", "constantly", "no", "one"], "queue");
    check(["none", "eventual", "rarely", "yes", "many"], "stateless");
}

#[test]
fn metrics_do_not_grow_with_the_objects() {
    let dir = tempfile::tempdir().unwrap();
    let node = Process::start(&mut node(dir.path(), "2"));
    let gateway = Process::start(&mut gateway(&node));
    let series = || {
        let (_, text) = request(&agent(), "GET", &format!("{}/metrics", node.admin), "").unwrap();
        text.lines().filter(|line| !line.starts_with('#')).count()
    };
    let use_object = |number: u32| {
        call(
            &gateway.url,
            &format!("Counter/o{number}/increment"),
            &json!([]),
        );
    };
    (0..3).for_each(use_object);
    // Histograms show themselves with their first samples.
    let mut before = 0;
    eventually("no more series come", || {
        let now = series();
        std::mem::replace(&mut before, now) == now && now > 100
    });
    (3..300).for_each(use_object);
    assert_eq!(series(), before);
}
