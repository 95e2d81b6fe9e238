//! kill -9 under load: what was acknowledged is there.

use std::collections::HashMap;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

use crate::fsck::fsck;
use crate::support::{Process, agent, call, dormouse, eventually, gateway, node, node_at, request};

const CLIENTS: u64 = 8;
const OBJECTS: u32 = 1000;
const KILLS: u32 = 200;

/// A node lives for a random time up to this, which is too short for its clients to have no request under
/// way at its end.
const LIFE_MS_MAX: u64 = 150;

/// Where the node that lives now can be reached.
struct Target {
    url: Mutex<String>,
    changed: Condvar,
}

impl Target {
    /// Until another node lives than the one at `url`, or for a while.
    fn wait(&self, url: &str) {
        let now = self.url.lock().unwrap();
        let patience = Duration::from_millis(50);
        drop(
            self.changed
                .wait_timeout_while(now, patience, |now| now == url),
        );
    }
}

/// Increments and rows of one object, as its clients know them.
#[derive(Default, Clone, Copy)]
struct Known {
    acknowledged: i64,
    unknown: i64,
}

#[test]
fn nothing_acknowledged_is_lost_by_kill_9() {
    let seed: u64 = rand::rng().random();
    println!("seed {seed}");
    let dir = tempfile::tempdir().unwrap();
    let first = Process::dev(dir.path());
    let url = Target {
        url: Mutex::new(first.url.clone()),
        changed: Condvar::new(),
    };
    let stop = AtomicBool::new(false);
    let (never, pause) = mpsc::sync_channel::<()>(1);
    let (url_now, stop_now) = (&url, &stop);
    let mut random = StdRng::seed_from_u64(seed);
    let (process, increments, rows) = thread::scope(|scope| {
        let mut process = first;
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| scope.spawn(move || increment(seed ^ client, url_now, stop_now)))
            .collect();
        let writer = scope.spawn(|| insert(&url, &stop));
        for _ in 0..KILLS {
            let life = Duration::from_millis(random.random_range(0..LIFE_MS_MAX));
            pause.recv_timeout(life).unwrap_err();
            process.kill();
            process = Process::dev(dir.path());
            url.url.lock().unwrap().clone_from(&process.url);
            url.changed.notify_all();
        }
        pause.recv_timeout(Duration::from_millis(300)).unwrap_err();
        stop.store(true, Ordering::Relaxed);
        drop(never);
        let mut all: HashMap<u32, Known> = HashMap::new();
        for client in clients {
            for (object, known) in client.join().unwrap() {
                let sum = all.entry(object).or_default();
                sum.acknowledged += known.acknowledged;
                sum.unknown += known.unknown;
            }
        }
        (process, all, writer.join().unwrap())
    });
    let acknowledged: i64 = increments.values().map(|known| known.acknowledged).sum();
    assert!(
        acknowledged > 100 && rows.len() > 10,
        "there was hardly any load: {acknowledged}"
    );
    for (object, known) in increments {
        let total = call(
            &process.url,
            &format!("Counter/c{object}/value"),
            &json!([]),
        )
        .as_i64()
        .unwrap();
        let possible = known.acknowledged..=known.acknowledged + known.unknown;
        assert!(
            possible.contains(&total),
            "object {object} has {total}, not {possible:?}"
        );
    }
    let found = call(&process.url, "Sql/log/exec", &json!(["SELECT n FROM t"]));
    let found: Vec<i64> = found["rows"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row[0].as_i64().unwrap())
        .collect();
    for row in rows {
        assert!(found.contains(&row), "row {row} was acknowledged");
    }
    let check = call(
        &process.url,
        "Sql/log/exec",
        &json!(["PRAGMA integrity_check"]),
    );
    assert_eq!(check["rows"], json!([["ok"]]));
    process.kill();
    fsck(dir.path(), true);
}

/// Requests that were refused while the node was down are sent again; those whose outcome is unknown
/// are not. So every effect is there once.
#[test]
fn a_patient_client_repeats_no_effect() {
    let dir = tempfile::tempdir().unwrap();
    let first = Process::start(&mut node(dir.path(), "1"));
    let listen = first.url.trim_start_matches("http://").to_owned();
    let gateway = Process::start(&mut gateway(&first));
    let load = dormouse()
        .args([
            "loadtest",
            "run",
            "--target",
            &gateway.url,
            "--json",
            "--rate",
            "300",
            "--objects",
            "20",
        ])
        .args([
            "--warmup",
            "0",
            "--duration",
            "3",
            "--patience",
            "20",
            "--connections",
            "16",
        ])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    reach(
        &gateway,
        "gateway_requests_total{route=\"rpc\",code=\"200\"}",
        200,
    );
    first.kill();
    reach(
        &gateway,
        "gateway_requests_total{route=\"rpc\",code=\"unavailable\"}",
        1,
    );
    let second = Process::start(&mut node_at(dir.path(), "1", &listen));
    let output = load.wait_with_output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let verification = &report["verification"];
    assert_eq!(
        verification["found"], verification["acknowledged"],
        "{report}"
    );
    assert_eq!(
        (&verification["surplus"], &verification["unread"]),
        (&json!(0), &json!(0)),
        "{report}"
    );
    let sent = report["acknowledged"].as_u64().unwrap() + verification["unknown"].as_u64().unwrap();
    assert!(sent > 600, "most got through in the end: {report}");
    drop(second);
}

/// Waits until one line of a gateway's metrics has at least this value.
#[track_caller]
fn reach(gateway: &Process, line: &str, least: i64) {
    let agent = agent();
    for _ in 0..10_000 {
        let (_, text) = request(&agent, "GET", &format!("{}/metrics", gateway.admin), "").unwrap();
        let value = text
            .lines()
            .find_map(|found| found.strip_prefix(line)?.strip_prefix(' '));
        if value.is_some_and(|value| value.parse::<i64>().unwrap() >= least) {
            return;
        }
    }
    panic!("{line} never reached {least}");
}

/// Increments random objects until told to stop.
fn increment(seed: u64, target: &Target, stop: &AtomicBool) -> HashMap<u32, Known> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut known: HashMap<u32, Known> = HashMap::new();
    let agent = agent();
    while !stop.load(Ordering::Relaxed) {
        let object = random.random_range(0..OBJECTS);
        let url = target.url.lock().unwrap().clone();
        let known = known.entry(object).or_default();
        match request(
            &agent,
            "POST",
            &format!("{url}/rpc/Counter/c{object}/increment"),
            "",
        ) {
            Ok((200, _)) => known.acknowledged += 1,
            _ => {
                known.unknown += 1;
                target.wait(&url);
            }
        }
    }
    known
}

/// Inserts numbered rows until told to stop; those that were acknowledged.
fn insert(target: &Target, stop: &AtomicBool) -> Vec<i64> {
    let agent = agent();
    let mut acknowledged = Vec::new();
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        let url = target.url.lock().unwrap().clone();
        let sql = json!([
            "CREATE TABLE IF NOT EXISTS t (n); INSERT INTO t VALUES (?)",
            number
        ]);
        let answer = request(
            &agent,
            "POST",
            &format!("{url}/rpc/Sql/log/exec"),
            &sql.to_string(),
        );
        match answer {
            Ok((200, _)) => acknowledged.push(number),
            _ => target.wait(&url),
        }
    }
    acknowledged
}

/// Leases of messages run out at random times, and the alarms of their queues see to it, whatever dies.
#[test]
fn every_alarm_runs_through_kill_9() {
    const QUEUES: u32 = 400;
    const DEATHS: u32 = 12;
    let seed: u64 = rand::rng().random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let mut process = Process::dev(dir.path());
    thread::scope(|scope| {
        for part in 0..4 {
            let url = &process.url;
            let mut random = StdRng::seed_from_u64(seed ^ u64::from(part));
            scope.spawn(move || {
                for queue in (part..QUEUES).step_by(4) {
                    let queue = format!("Queue/q{queue}");
                    call(
                        url,
                        &format!("{queue}/configure"),
                        &json!([{ "maxAttempts": 1 }]),
                    );
                    call(url, &format!("{queue}/send"), &json!(["work"]));
                    let visibility = json!([{ "visibilityMs": random.random_range(500..8000) }]);
                    let leased = call(url, &format!("{queue}/receive"), &visibility);
                    assert_eq!(leased.as_array().unwrap().len(), 1);
                }
            });
        }
    });
    let (_never, pause) = mpsc::sync_channel::<()>(1);
    for _ in 0..DEATHS {
        let life = Duration::from_millis(random.random_range(50..700));
        pause.recv_timeout(life).unwrap_err();
        process.kill();
        process = Process::dev(dir.path());
    }
    eventually("no alarm is left", || {
        let url = format!("{}/alarms", process.admin);
        let (status, body) = request(&agent(), "GET", &url, "").unwrap();
        assert_eq!(status, 200, "{body}");
        let listed: Value = serde_json::from_str(&body).unwrap();
        listed["objects"].as_array().unwrap().is_empty()
    });
    for queue in 0..QUEUES {
        let stats = call(&process.url, &format!("Queue/q{queue}/stats"), &json!([]));
        let want = json!({ "ready": 0, "delayed": 0, "leased": 0, "dead": 1 });
        assert_eq!(stats, want, "queue {queue}");
    }
    let (_, dead) = request(
        &agent(),
        "GET",
        &format!("{}/alarms?state=dead", process.admin),
        "",
    )
    .unwrap();
    assert!(dead.contains("\"objects\":[]"), "{dead}");
    process.signal("TERM");
    assert!(process.wait().success());
    fsck(dir.path(), true);
}
