//! `dormouse bench peers`, with whatever peers are installed here.

use serde_json::Value;

use crate::support::dormouse;

fn peers(only: &str) -> Value {
    let output = dormouse()
        .args(["bench", "peers", "--json", "--only", only, "--rounds", "1"])
        .args(["--duration", "0.5", "--warmup", "0.1", "--connections", "8"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Each contender has a row, or the way to get it.
#[track_caller]
fn measured_or_skipped(results: &Value, table: usize, program: &str) {
    let rows = results["tables"][table]["rows"].as_array().unwrap();
    let row = rows
        .iter()
        .find(|row| row["contender"].as_str().unwrap().starts_with(program));
    let skipped = results["skipped"].as_array().unwrap();
    let skipped = skipped
        .iter()
        .any(|line| line.as_str().unwrap().contains(program));
    match row {
        Some(row) => assert!(row["rps"].as_f64().unwrap() > 1.0, "{row}"),
        None => assert!(
            skipped,
            "{program} is neither measured nor skipped: {results}"
        ),
    }
}

#[test]
fn increments_are_measured_beside_peers_and_counted() {
    // One object, one counter of many, and an object whose process is asked without a gateway.
    for (only, name, peer) in [
        ("increment-one", "dormouse, gateway and node", "workerd"),
        ("increment-sharded", "dormouse, sharded counter", "workerd"),
        ("incr-one", "dormouse, worker, over a link", "redis"),
    ] {
        let results = peers(only);
        assert_eq!(results["tables"].as_array().unwrap().len(), 1, "{results}");
        let dormouse = &results["tables"][0]["rows"][0];
        assert_eq!(dormouse["contender"], name);
        assert!(dormouse["rps"].as_f64().unwrap() > 10.0, "{results}");
        assert!(dormouse["cpu_us_per_request"].as_f64().unwrap() > 0.0);
        measured_or_skipped(&results, 0, peer);
        if only == "incr-one" {
            measured_or_skipped(&results, 0, "dormouse, worker, over HTTP");
        }
    }
}

#[test]
fn proxies_need_an_app_and_say_so() {
    let results = peers("proxy");
    let tables = results["tables"].as_array().unwrap().len();
    if tables == 0 {
        let skipped = results["skipped"].to_string();
        assert!(skipped.contains("apt-get install nginx"), "{skipped}");
        return;
    }
    assert_eq!(tables, 2);
    for table in 0..tables {
        for program in ["dormouse", "nginx", "haproxy"] {
            measured_or_skipped(&results, table, program);
        }
    }
}

#[test]
fn wrong_arguments_are_named() {
    let output = dormouse()
        .args(["bench", "peers", "--rounds", "0"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("--rounds 0 must be from 1 to 100"), "{said}");
}
