//! `dormouse loadtest` against the real thing.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::support::{Process, agent, dormouse, request};

#[test]
fn a_load_test_verifies_what_it_counted() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::dev(dir.path());
    let run = |more: &[&str]| {
        let output = dormouse()
            .args([
                "loadtest",
                "run",
                "--target",
                &process.url,
                "--duration",
                "1",
                "--warmup",
                "0.2",
                "--json",
            ])
            .args(more)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    for load in [
        &["--rate", "200", "--objects", "50"][..],
        &[
            "--rate",
            "200",
            "--names",
            "zipf",
            "--arrivals",
            "even",
            "--seed",
            "7",
        ],
        &["--rate", "0", "--connections", "8", "--objects", "10"],
    ] {
        let report = run(load);
        let verification = &report["verification"];
        assert!(report["acknowledged"].as_u64().unwrap() > 50, "{report}");
        assert_eq!(
            verification["found"], verification["acknowledged"],
            "{report}"
        );
        assert_eq!(
            (&verification["surplus"], &verification["unread"]),
            (&json!(0), &json!(0))
        );
        assert_eq!(report["errors"], json!({}));
    }
    let text = dormouse()
        .args([
            "loadtest",
            "run",
            "--target",
            &process.url,
            "--duration",
            "0.5",
            "--rate",
            "100",
        ])
        .output()
        .unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(
        text.contains("verified") && text.ends_with(": ok\n"),
        "{text}"
    );
    let nobody = dormouse()
        .args(["loadtest", "run", "--target", "http://127.0.0.1:1"])
        .output()
        .unwrap();
    assert_eq!(nobody.status.code(), Some(1));
    assert!(
        String::from_utf8(nobody.stderr)
            .unwrap()
            .contains("connect to 127.0.0.1:1")
    );
}

/// A short run with these arguments.
fn load(process: &Process, more: &[&str]) -> Output {
    run(process, more).output().unwrap()
}

fn run(process: &Process, more: &[&str]) -> Command {
    let mut command = dormouse();
    command
        .args(["loadtest", "run", "--target", &process.url, "--json"])
        .args(["--duration", "1", "--warmup", "0.2", "--objects", "10"])
        .args(["--connections", "8"])
        .args(more);
    command
}

#[track_caller]
fn verified(output: &Output) -> Value {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let verification = &report["verification"];
    assert_eq!(
        verification["found"], verification["acknowledged"],
        "{report}"
    );
    for none in ["surplus", "unread", "wrong_answers", "unknown"] {
        assert_eq!(verification[none], json!(0), "{report}");
    }
    assert_eq!(report["errors"], json!({}));
    report
}

#[test]
fn every_operation_is_checked_and_verified() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::dev(dir.path());
    let report = verified(&load(
        &process,
        &[
            "--scenario",
            "mixed",
            "--rate",
            "300",
            "--admin",
            &process.admin,
        ],
    ));
    let operations = report["operations"].as_object().unwrap();
    assert_eq!(operations.len(), 6, "{report}");
    for (name, operation) in operations {
        assert!(
            operation["acknowledged"].as_u64().unwrap() > 10,
            "{name} {operation}"
        );
    }
    let server = report["server"].as_array().unwrap();
    for name in ["gateway", "node"] {
        let seen = server.iter().find(|one| one["name"] == name);
        let seen = seen.unwrap_or_else(|| panic!("no {name} in {report}"));
        let count = seen["count"].as_u64().unwrap();
        assert!(
            (200..500).contains(&count),
            "the warm-up is left out: {seen}"
        );
    }
}

#[test]
fn several_processes_share_a_load() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::dev(dir.path());
    let report = verified(&load(
        &process,
        &[
            "--scenario",
            "increment,kv,sql",
            "--processes",
            "3",
            "--rate",
            "300",
        ],
    ));
    let acknowledged = report["acknowledged"].as_u64().unwrap();
    assert!((200..400).contains(&acknowledged), "{report}");
}

#[test]
fn rates_change_in_steps_and_ramps() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::dev(dir.path());
    let stages = |rate: &str| {
        let report = verified(&load(&process, &["--rate", rate, "--arrivals", "even"]));
        let stages = report["stages"].as_array().unwrap().iter();
        stages
            .map(|stage| stage["acknowledged"].as_u64().unwrap())
            .collect::<Vec<_>>()
    };
    let steps = stages("100,400");
    assert!(
        (45..=55).contains(&steps[0]) && (190..=210).contains(&steps[1]),
        "{steps:?}"
    );
    let ramp = stages("100..500");
    assert_eq!(ramp.len(), 10);
    assert!(ramp[9] > 2 * ramp[0], "{ramp:?}");
}

#[test]
fn a_rule_that_holds_fails_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::dev(dir.path());
    let rules = [
        "--rate",
        "100",
        "--fail-if",
        "max<1us",
        "--fail-if",
        "rps<1",
    ];
    let output = load(&process, &rules);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let rules = [
        "--rate",
        "100",
        "--fail-if",
        "p50>1us",
        "--fail-if",
        "rps<1",
    ];
    let output = load(&process, &rules);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("p50>1us: it is"), "{said}");
    let wrong = load(&process, &["--fail-if", "p42>1us"]);
    assert_eq!(wrong.status.code(), Some(2));
    let said = String::from_utf8(wrong.stderr).unwrap();
    assert!(said.contains("\"p42\" must be one of p50"), "{said}");
}

#[test]
fn results_go_to_files_and_an_endpoint() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::dev(&dir.path().join("data"));
    let file = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let output = load(
        &process,
        &[
            "--rate",
            "200",
            "--csv",
            &file("timeline.csv"),
            "--prometheus",
            &file("load.prom"),
            "--prometheus-listen",
            "127.0.0.1:0",
            "--progress",
        ],
    );
    let report = verified(&output);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("metrics http://127.0.0.1:"), "{said}");
    assert!(said.contains("    1 s  "), "a line per second: {said}");
    let timeline = std::fs::read_to_string(Path::new(&file("timeline.csv"))).unwrap();
    assert!(timeline.starts_with("second,rps,"), "{timeline}");
    let metrics = std::fs::read_to_string(Path::new(&file("load.prom"))).unwrap();
    let line = format!(
        "loadtest_requests_total{{operation=\"increment\",outcome=\"acknowledged\"}} {}",
        report["acknowledged"]
    );
    assert!(metrics.lines().any(|found| found == line), "{metrics}");
}

/// A sweep with few and short points.
fn sweep(more: &[&str]) -> Value {
    let mut command = dormouse();
    command
        .args(["loadtest", "sweep", "--json", "--duration", "0.4"])
        .args(["--warmup", "0.1", "--connections", "8"])
        .args(more);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_sweep_over_shards_writes_table_and_plots() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::dev(&dir.path().join("data"));
    let out = dir.path().join("out");
    let report = sweep(&[
        "--target",
        &process.url,
        "--values",
        "1,2,8",
        "--rounds",
        "2",
        "--out",
        out.to_str().unwrap(),
    ]);
    let points = report["points"].as_array().unwrap();
    let values: Vec<&Value> = points.iter().map(|point| &point["value"]).collect();
    assert_eq!(values, [1, 2, 8]);
    for point in points {
        assert!(point["rps"].as_f64().unwrap() > 10.0, "{report}");
        assert!(point["verified"].as_u64().unwrap() > 10, "{report}");
        assert_eq!(point["rounds"].as_array().unwrap().len(), 2);
    }
    let listed = process.admin.clone() + "/objects?class=Counter&limit=100";
    let agent = agent();
    let (_, objects) = request(&agent, "GET", &listed, "").unwrap();
    assert!(objects.contains(":shard:7\""), "{objects}");
    let table = std::fs::read_to_string(out.join("sweep.md")).unwrap();
    assert!(
        table.starts_with("| shards |") && table.contains("Knee: "),
        "{table}"
    );
    for file in ["sweep.json", "sweep.svg", "sweep.png"] {
        assert!(out.join(file).metadata().unwrap().len() > 1000, "{file}");
    }
}

#[test]
fn a_sweep_over_workers_starts_its_own_processes() {
    let report = sweep(&["--over", "workers", "--values", "1,2", "--objects", "20"]);
    assert_eq!(report["over"], "workers");
    assert_eq!(report["points"].as_array().unwrap().len(), 2, "{report}");
}

#[test]
fn the_gap_of_a_killed_and_a_stopped_process_is_reported() {
    let mut command = dormouse();
    command
        .args(["loadtest", "faults", "--json", "--duration", "6"])
        .args(["--warmup", "0.2", "--objects", "10", "--rate", "200"])
        .args(["--connections", "16", "--patience", "20"])
        .args(["--at", "1s stop gateway", "--at", "1500ms continue gateway"])
        .args(["--at", "2500ms kill node", "--at", "3500ms start node"]);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let gap = |at: usize| report["faults"][at]["gap_ms"].as_u64().unwrap();
    assert!((400..=510).contains(&gap(0)), "{}", report["faults"]);
    assert!((900..=1010).contains(&gap(2)), "{}", report["faults"]);
    assert!(gap(1) < 900 && gap(3) < 2500, "{}", report["faults"]);
    let verification = &report["run"]["verification"];
    assert_eq!(verification["found"], verification["acknowledged"]);
    assert!(
        report["run"]["latency"]["max_us"].as_u64().unwrap() > 900_000,
        "who had to wait for the node is counted: {report}"
    );
}

#[test]
fn a_fault_of_nobody_is_refused() {
    let output = dormouse()
        .args(["loadtest", "faults", "--at", "1s kill nobody"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("the processes are node, gateway"), "{said}");
}

#[test]
fn sharded_counters_are_loaded_and_swept_and_every_total_is_exact() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::dev(dir.path());
    let run = |args: &[&str]| {
        let output = dormouse()
            .arg("loadtest")
            .args(args)
            .args(["--scenario", "counter", "--target", &process.url])
            .args(["--admin", &process.admin, "--json"])
            .args(["--duration", "0.5", "--warmup", "0.1", "--connections", "4"])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    let loaded = ["run", "--rate", "100", "--objects", "2", "--shards", "7"];
    let report = run(&[&loaded[..], &["--prefix", "mine"]].concat());
    let verification = &report["verification"];
    assert!(report["acknowledged"].as_u64().unwrap() > 20, "{report}");
    assert_eq!(
        verification["found"], verification["acknowledged"],
        "{report}"
    );
    assert_eq!(verification["objects"], 2);
    let url = format!("{}/counters/mine-1?exact=true", process.url);
    let (_, body) = request(&agent(), "GET", &url, "").unwrap();
    assert!(body.contains("\"shards\":7,"), "{body}");
    let sweep = run(&["sweep", "--over", "shards", "--values", "1,12"]);
    let points = sweep["points"].as_array().unwrap();
    assert_eq!(points.len(), 2);
    assert!(
        points
            .iter()
            .all(|point| point["verified"].as_u64().unwrap() > 10),
        "{sweep}"
    );
    // Without an admin listener nobody could change them.
    let refused = dormouse()
        .args(["loadtest", "run", "--scenario", "counter", "--shards", "7"])
        .output()
        .unwrap();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("--shards wants --admin"), "{said}");
}
