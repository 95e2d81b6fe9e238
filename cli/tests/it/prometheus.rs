//! What a real Prometheus makes of our metrics: every panel of the dashboards and every rule, against a cluster
//! under a small load. Needs Debian's package `prometheus`, which `.ci/run` installs.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{Process, agent, call, dev, dormouse, request};

/// What promtool says against names that mean something else here: a counter of section "counters" is a thing
/// that counts, not a kind of metric.
const NAMES_THAT_STAY: &str = "metric name should not include type 'counter'";

fn grafana() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../grafana")
}

/// A program of Debian's package.
fn tool(name: &str) -> Command {
    let found = Command::new(name)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    assert!(
        found.is_ok_and(|status| status.success()),
        "this test needs `{name}` in PATH: apt-get install prometheus, as .ci/run does"
    );
    Command::new(name)
}

/// Runs promtool; what it printed if it found fault.
fn promtool(args: &[&str], input: &str) -> Result<(), String> {
    let mut child = tool("promtool")
        .args(args)
        .current_dir(grafana())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    match output.status.success() {
        true => Ok(()),
        false => Err(text.into_owned()),
    }
}

/// A query, and what would miss it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Query {
    of: String,
    text: String,
}

/// The queries of all panels.
fn panels() -> Vec<Query> {
    let mut found = Vec::new();
    for file in std::fs::read_dir(grafana().join("dashboards")).unwrap() {
        let path = file.unwrap().path();
        let dashboard: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        for panel in dashboard["panels"].as_array().unwrap() {
            for target in panel["targets"].as_array().unwrap() {
                found.push(Query {
                    of: format!("{}: {}", dashboard["title"], panel["title"]),
                    text: target["expr"].as_str().unwrap().to_owned(),
                });
            }
        }
    }
    assert!(found.len() > 50, "{}", found.len());
    found
}

/// Prometheus, on a free port.
struct Prometheus {
    child: Child,
    url: String,
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Prometheus {
    fn start(dir: &Path, targets: &[(&str, &str)]) -> Self {
        let jobs: Vec<Value> = targets
            .iter()
            .map(|(job, target)| {
                json!({ "job_name": job, "static_configs": [{ "targets": [target] }] })
            })
            .collect();
        // JSON is YAML.
        let config = json!({
            "global": { "scrape_interval": "1s", "evaluation_interval": "1s" },
            "rule_files": [grafana().canonicalize().unwrap().join("rules.yml")],
            "scrape_configs": jobs,
        });
        let file = dir.join("prometheus.yml");
        std::fs::write(&file, config.to_string()).unwrap();
        let address = free_address();
        let child = tool("prometheus")
            .arg(format!("--config.file={}", file.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                dir.join("tsdb").display()
            ))
            .arg(format!("--web.listen-address={address}"))
            .arg("--log.level=warn")
            .spawn()
            .unwrap();
        let prometheus = Self {
            child,
            url: format!("http://{address}"),
        };
        patiently("Prometheus is ready", || {
            let ready = request(&agent(), "GET", &format!("{}/-/ready", prometheus.url), "");
            matches!(ready, Ok((200, _)))
                .then_some(())
                .ok_or_else(String::new)
        });
        prometheus
    }

    fn get(&self, path: &str) -> Value {
        let (status, body) = request(&agent(), "GET", &format!("{}{path}", self.url), "").unwrap();
        let answer: Value = serde_json::from_str(&body).unwrap_or_else(|_| panic!("{body}"));
        assert_eq!(status, 200, "{path}: {answer}");
        answer["data"].clone()
    }

    /// The values of a query; an error of it fails the test.
    fn query(&self, text: &str) -> Vec<f64> {
        let query = serde_urlencoded::to_string([("query", text)]).unwrap();
        let data = self.get(&format!("/api/v1/query?{query}"));
        let result = data["result"].as_array().unwrap().iter();
        let value = |series: &Value| series["value"][1].as_str().unwrap().parse().unwrap();
        result.map(value).collect()
    }

    /// Whether a query has something to show.
    fn shows(&self, text: &str) -> bool {
        self.query(text).iter().any(|value| !value.is_nan())
    }
}

/// An address that was free a moment ago.
fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

/// Waits for something that comes with a few scrapes.
#[track_caller]
fn patiently(what: &str, mut holds: impl FnMut() -> Result<(), String>) {
    let (_never, pause) = std::sync::mpsc::sync_channel::<()>(1);
    let mut last = String::new();
    for _ in 0..360 {
        match holds() {
            Ok(()) => return,
            Err(missing) => last = missing,
        }
        // Nobody sends: this only waits.
        pause.recv_timeout(Duration::from_millis(250)).unwrap_err();
    }
    panic!("not within 90 seconds: {what}\n{last}");
}

/// An app that answers everything, until the test ends.
fn app() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::spawn(move || {
        let answer = |mut stream: TcpStream| {
            let mut head = [0; 4096];
            if stream.read(&mut head).is_ok() {
                let page = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok";
                // A client that went away is no concern here.
                drop(stream.write_all(page));
            }
        };
        listener.incoming().flatten().for_each(answer);
    });
    address
}

/// A gateway's config with one of everything that dashboards draw.
fn config(dir: &Path) -> PathBuf {
    let certified = rcgen::generate_simple_self_signed(["a.example".to_owned()]).unwrap();
    let (cert, key) = (dir.join("cert.pem"), dir.join("key.pem"));
    std::fs::write(&cert, certified.cert.pem()).unwrap();
    std::fs::write(&key, certified.signing_key.serialize_pem()).unwrap();
    let text = format!(
        r#"
        tls_listen = "127.0.0.1:0"
        certificates = [{{ cert_file = "{}", key_file = "{}" }}]
        [limits.all]
        key = "{{client.ip}}"
        limit = 100000
        period = "1s"
        everywhere = true
        [[routes]]
        name = "app"
        path = "/app"
        upstream = "app"
        [[routes]]
        name = "cached"
        path = "/cached"
        upstream = "app"
        cache = {{ default_ttl = "1s" }}
        [[routes]]
        name = "sharded"
        path = "/sharded"
        rpc = {{ class = "Counter", name = "shard:{{shard}}", method = "increment", scope = "global" }}
        shard = {{ by = "{{query.userId|unknown}}", hash = "xxh3", count = 4 }}
        [upstreams.app]
        servers = ["{}"]
        shedding = {{}}
        "#,
        cert.display(),
        key.display(),
        app()
    );
    let file = dir.join("gateway.toml");
    std::fs::write(&file, text).unwrap();
    file
}

/// Uses what the load test does not: an app, a sharded route, alarms, pairs.
fn use_the_rest(url: &str, round: u64) {
    let get = |path: &str| request(&agent(), "GET", &format!("{url}{path}"), "").unwrap();
    assert_eq!(get("/app").0, 200);
    assert_eq!(get("/cached").0, 200);
    let counted = format!("{url}/counters/hits/increment?by=2");
    assert_eq!(request(&agent(), "POST", &counted, "").unwrap().0, 200);
    let sharded = format!("{url}/sharded?userId={round}");
    assert_eq!(request(&agent(), "POST", &sharded, "").unwrap().0, 200);
    let queue = format!("Queue/q-{}", round % 3);
    call(url, &format!("{queue}/send"), &json!([round]));
    let hidden = json!([{ "visibilityMs": 300 }]);
    call(url, &format!("{queue}/receive"), &hidden);
    call(url, "Kv/pairs/put", &json!([{ "k": round }]));
    call(url, "Kv/pairs/delete", &json!(["k"]));
    // Objects that wake.
    call(url, &format!("Counter/new-{round}/increment"), &json!([]));
}

#[test]
fn every_panel_and_every_rule_has_something_to_say() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let process = Process::start(dev(&data).arg("--config").arg(config(dir.path())));
    let load_address = free_address();
    let mut load = dormouse()
        .args(["loadtest", "run", "--scenario", "mixed", "--rate", "60"])
        .args(["--objects", "20", "--duration", "600", "--target"])
        .args([&process.url, "--prometheus-listen", &load_address])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let admin = process.admin.trim_start_matches("http://");
    let targets = [("dormouse", admin), ("loadtest", load_address.as_str())];
    let prometheus = Prometheus::start(dir.path(), &targets);
    let done = AtomicBool::new(false);
    let judged = thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0.. {
                if done.load(Ordering::Relaxed) {
                    break;
                }
                use_the_rest(&process.url, round);
            }
        });
        let judged = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            judge(&prometheus);
        }));
        done.store(true, Ordering::Relaxed);
        judged
    });
    load.kill().unwrap();
    load.wait().unwrap();
    if let Err(panic) = judged {
        std::panic::resume_unwind(panic);
    }
    lint(&process);
}

fn judge(prometheus: &Prometheus) {
    patiently("both targets were scraped some times", || {
        let scraped = prometheus.query("min(count_over_time(up[10m]) * up)");
        match scraped.first() {
            Some(times) if *times >= 5.0 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
    let rules = rules(prometheus);
    let alerts: Vec<&Query> = rules.alerts.iter().collect();
    assert!(alerts.len() > 20 && rules.records.len() > 8);
    let mut wanted = panels();
    wanted.extend(rules.records);
    // An alert says nothing while all is well, but everything that it looks at must be there. (rules-test.yml
    // shows that each of them can fire.)
    for alert in alerts {
        prometheus.query(&alert.text);
        wanted.extend(metrics_of(&alert.text).into_iter().map(|text| Query {
            of: alert.of.clone(),
            text,
        }));
    }
    patiently("every query has a result", || {
        wanted.retain(|query| !prometheus.shows(&query.text));
        match wanted.as_slice() {
            [] => Ok(()),
            missing => Err(missing
                .iter()
                .map(|query| format!("{}: {}\n", query.of, query.text))
                .collect()),
        }
    });
}

struct Rules {
    records: Vec<Query>,
    alerts: Vec<Query>,
}

/// The rules as Prometheus took them, each of them evaluated without an error.
fn rules(prometheus: &Prometheus) -> Rules {
    let mut all = Rules {
        records: Vec::new(),
        alerts: Vec::new(),
    };
    patiently("every rule was evaluated", || {
        all.records.clear();
        all.alerts.clear();
        for group in prometheus.get("/api/v1/rules")["groups"]
            .as_array()
            .unwrap()
        {
            for rule in group["rules"].as_array().unwrap() {
                assert_eq!(rule["lastError"].as_str().unwrap_or(""), "", "{rule}");
                if rule["health"] != "ok" {
                    return Err(rule.to_string());
                }
                let query = Query {
                    of: rule["name"].to_string(),
                    text: rule["query"].as_str().unwrap().to_owned(),
                };
                match rule["type"].as_str().unwrap() {
                    "recording" => all.records.push(query),
                    _ => all.alerts.push(query),
                }
            }
        }
        Ok(())
    });
    all
}

/// The metrics, recorded ones too, that an expression names.
fn metrics_of(expression: &str) -> BTreeSet<String> {
    let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':');
    let is_metric = |word: &&str| {
        ["shard_", "gateway_", "loadtest_", "class:", "route:"]
            .iter()
            .any(|prefix| word.starts_with(prefix))
    };
    words.filter(is_metric).map(str::to_owned).collect()
}

/// promtool finds no fault with what a gateway and a node show, and each name is there once.
fn lint(process: &Process) {
    let url = format!("{}/metrics", process.admin);
    let (_, metrics) = request(&agent(), "GET", &url, "").unwrap();
    if let Err(faults) = promtool(&["check", "metrics"], &metrics) {
        let faults: Vec<&str> = faults
            .lines()
            .filter(|line| !line.contains(NAMES_THAT_STAY))
            .collect();
        assert!(faults.is_empty(), "{faults:#?}");
    }
    let mut types = BTreeMap::<&str, u32>::new();
    for line in metrics.lines().filter(|line| line.starts_with("# TYPE ")) {
        *types.entry(line).or_default() += 1;
    }
    assert!(types.values().all(|times| *times == 1), "{types:#?}");
}

#[test]
fn rules_are_sound_and_every_alert_can_fire() {
    promtool(&["check", "rules", "rules.yml"], "").unwrap();
    promtool(&["check", "config", "prometheus.yml"], "").unwrap();
    promtool(&["test", "rules", "rules-test.yml"], "").unwrap();
    let text = |file: &str| std::fs::read_to_string(grafana().join(file)).unwrap();
    let tested = text("rules-test.yml");
    for line in text("rules.yml").lines() {
        if let Some(alert) = line.trim().strip_prefix("- alert: ") {
            assert!(
                tested.contains(&format!("alertname: {alert}\n")),
                "rules-test.yml does not show that {alert} can fire"
            );
        }
    }
}
