//! Sharded counters with real processes: totals are what clients were told, whatever happens meanwhile.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex, RwLock, mpsc};
use std::thread;
use std::time::Duration;

use loadtest::process::loopback_host;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

use crate::support::{
    Process, agent, dormouse, eventually, free_port, gateway, node, node_at, request,
};

/// How long the soak lasts, in seconds, if `DORMOUSE_SOAK_SECONDS` does not say otherwise.
const SOAK_SECONDS: u64 = 8;

/// What came of an increment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Counted,
    Repeated,
    /// Nothing was counted.
    Not,
    Unknown,
}

fn increment(agent: &ureq::Agent, url: &str, counter: &str, by: i64, key: Option<&str>) -> Told {
    let mut asked = ureq::http::Request::builder()
        .method("POST")
        .uri(format!("{url}/counters/{counter}/increment?by={by}"));
    if let Some(key) = key {
        asked = asked.header("idempotency-key", key);
    }
    let Ok(mut answer) = agent.run(asked.body(String::new()).unwrap()) else {
        return Told::Unknown;
    };
    let status = answer.status().as_u16();
    let Ok(text) = answer.body_mut().read_to_string() else {
        return Told::Unknown;
    };
    let body: Value = serde_json::from_str(&text).unwrap_or_default();
    match status {
        200 if body["repeated"] == true => Told::Repeated,
        200 => Told::Counted,
        // With a key everything may be sent again, and that says nothing of what was counted.
        503 if key.is_none() && body["retryable"] == true => Told::Not,
        500.. => Told::Unknown,
        _ => panic!("{status} {text}"),
    }
}

/// An answer that must be there in the end: after something died, a try may fail.
fn read(url: &str, path: &str) -> Value {
    let agent = agent();
    let mut last = String::new();
    for _ in 0..50 {
        match request(&agent, "GET", &format!("{url}{path}"), "") {
            Ok((200, body)) => return serde_json::from_str(&body).unwrap(),
            other => last = format!("{other:?}"),
        }
    }
    panic!("{path}: {last}");
}

fn exact(url: &str, counter: &str) -> i64 {
    read(url, &format!("/counters/{counter}?exact=true"))["value"]
        .as_i64()
        .unwrap()
}

fn reshard(admin: &str, counter: &str, change: &Value) -> Result<Value, String> {
    let url = format!("{admin}/counters/{counter}/shards");
    match request(&agent(), "PUT", &url, &change.to_string()) {
        Ok((200, body)) => Ok(serde_json::from_str(&body).unwrap()),
        other => Err(format!("{other:?}")),
    }
}

#[track_caller]
fn drained(admin: &str, counter: &str) -> Value {
    let mut standing = Value::Null;
    eventually("no shard retires any more", || {
        standing = read(admin, &format!("/counters/{counter}"));
        standing["retiring"] == 0
    });
    standing
}

#[test]
fn many_clients_count_exactly_and_the_sum_follows_within_its_staleness() {
    let dir = tempfile::tempdir().unwrap();
    let dev = Process::dev(dir.path());
    thread::scope(|scope| {
        for client in 0..16 {
            let url = &dev.url;
            scope.spawn(move || {
                let agent = agent();
                for round in 0..50 {
                    let by = if (client + round) % 5 == 0 { -3 } else { 2 };
                    let told = increment(&agent, url, "likes", by, None);
                    assert_eq!(told, Told::Counted);
                }
            });
        }
    });
    let want = 160 * -3 + 640 * 2;
    assert_eq!(exact(&dev.url, "likes"), want);
    eventually("the sum without asking the shards", || {
        read(&dev.url, "/counters/likes")["value"] == want
    });
    let stale = read(&dev.url, "/counters/likes");
    assert_eq!(stale["shards"], 100);
    assert!(stale["staleness_ms"].as_u64().unwrap() >= 400, "{stale}");
    assert_eq!(exact(&dev.url, "never-counted"), 0);
}

#[test]
fn resharding_under_load_conserves_the_total() {
    let dir = tempfile::tempdir().unwrap();
    let node = Process::start(&mut node(dir.path(), "2"));
    let gateways = [0, 1].map(|_| Process::start(&mut gateway(&node)));
    let stop = AtomicBool::new(false);
    let acknowledged = AtomicI64::new(0);
    let count = AtomicU64::new(0);
    thread::scope(|scope| {
        for client in 0..8 {
            let url = &gateways[client % 2].url;
            let (stop, acknowledged, count) = (&stop, &acknowledged, &count);
            scope.spawn(move || {
                let agent = agent();
                let mut random = StdRng::seed_from_u64(client as u64);
                while !stop.load(Ordering::Relaxed) {
                    let by = random.random_range(-50..100);
                    match increment(&agent, url, "c", by, None) {
                        Told::Counted => {
                            acknowledged.fetch_add(by, Ordering::Relaxed);
                            count.fetch_add(1, Ordering::Relaxed);
                        }
                        Told::Not => {}
                        told => panic!("{told:?}, though nothing died"),
                    }
                }
            });
        }
        let admin = &gateways[0].admin;
        for (number, shards) in [200, 50, 1, 30, 100].into_iter().enumerate() {
            let standing = reshard(admin, "c", &json!({ "count": shards })).unwrap();
            assert_eq!(standing["shards"], shards);
            let warned = standing["warnings"]
                .as_array()
                .is_some_and(|all| !all.is_empty());
            assert_eq!(warned, shards < 10, "{standing}");
            let so_far = count.load(Ordering::Relaxed);
            eventually("increments by the new plan", || {
                count.load(Ordering::Relaxed) > so_far + 50
            });
            assert_eq!(drained(admin, "c")["version"], number as u64 + 2);
        }
        stop.store(true, Ordering::Relaxed);
    });
    let told = acknowledged.load(Ordering::Relaxed);
    assert!(
        gateways
            .iter()
            .all(|gateway| exact(&gateway.url, "c") == told)
    );
    let standing = drained(&gateways[1].admin, "c");
    assert!(standing["base"] != "0", "{standing}");
}

#[test]
fn keys_count_once_across_reshards_and_gateways() {
    let dir = tempfile::tempdir().unwrap();
    let node = Process::start(&mut node(dir.path(), "2"));
    let gateways = [0, 1].map(|_| Process::start(&mut gateway(&node)));
    let agent = agent();
    let send = |gateway: &Process, key: u32| {
        let key = format!("order-{key}");
        increment(&agent, &gateway.url, "orders", 7, Some(&key))
    };
    for key in 0..60 {
        assert_eq!(send(&gateways[0], key), Told::Counted);
    }
    for shards in [37, 10, 80] {
        reshard(&gateways[0].admin, "orders", &json!({ "count": shards })).unwrap();
        // The other gateway finds out by itself, and from both they are known.
        for key in 0..60 {
            let gateway = &gateways[key as usize % 2];
            assert_eq!(
                send(gateway, key),
                Told::Repeated,
                "{shards} shards, key {key}"
            );
        }
        assert_eq!(exact(&gateways[1].url, "orders"), 60 * 7);
    }
    assert_eq!(send(&gateways[1], 60), Told::Counted);
    assert_eq!(exact(&gateways[0].url, "orders"), 61 * 7);
}

/// An address that nobody uses, dead or alive.
fn own_address() -> String {
    format!("{}:7001", loopback_host())
}

#[test]
fn shards_of_a_colo_stay_there_and_the_total_is_one() {
    let dir = tempfile::tempdir().unwrap();
    let addresses = [own_address(), own_address()];
    let ring = format!(
        "[ring]\nnodes = [\n\
         {{ name = 'a', weight = 1, colo = 'SFO', workers = ['{}'] }},\n\
         {{ name = 'b', weight = 1, colo = 'LHR', workers = ['{}'] }},\n]\n",
        addresses[0], addresses[1]
    );
    let start = |name: &str, colo: &str, address: &str| {
        let config = dir.path().join(format!("{name}.toml"));
        std::fs::write(&config, format!("name = '{name}'\ncolo = '{colo}'\n{ring}")).unwrap();
        let mut command = node_at(&dir.path().join(name), "1", address);
        command.arg("--config").arg(config);
        Process::start(&mut command)
    };
    let nodes = [
        start("a", "SFO", &addresses[0]),
        start("b", "LHR", &addresses[1]),
    ];
    // TYO has a gateway, and no node.
    let gateways =
        ["SFO", "LHR", "TYO"].map(|colo| Process::start(gateway(&nodes[0]).args(["--colo", colo])));
    let change = json!({ "scope": "colo", "count": 10 });
    reshard(&gateways[0].admin, "c", &change).unwrap();
    let agent = agent();
    for (place, gateway) in gateways.iter().enumerate() {
        for _ in 0..20 {
            let by = [1, 100, 10_000][place];
            assert_eq!(
                increment(&agent, &gateway.url, "c", by, None),
                Told::Counted
            );
        }
    }
    for gateway in &gateways {
        assert_eq!(exact(&gateway.url, "c"), 20 * 10_101);
    }
    let names = |node: &Process| -> Vec<String> {
        let listed = read(&node.admin, "/objects?class=CounterShard&limit=1000");
        let rows = listed["objects"].as_array().unwrap().iter();
        rows.map(|row| row["name"].as_str().unwrap().to_owned())
            .collect()
    };
    let (sfo, lhr) = (names(&nodes[0]), names(&nodes[1]));
    let own = |names: &[String], mark: &str| names.iter().any(|name| name.contains(mark));
    assert!(
        own(&sfo, ":shard:SFO:") && !own(&sfo, ":shard:LHR:"),
        "{sfo:?}"
    );
    assert!(
        own(&lhr, ":shard:LHR:") && !own(&lhr, ":shard:SFO:"),
        "{lhr:?}"
    );
    assert!(own(&sfo, ":shard:TYO~:") || own(&lhr, ":shard:TYO~:"));
    // And all of them become shards for everybody.
    reshard(&gateways[1].admin, "c", &json!({ "scope": "global" })).unwrap();
    assert_eq!(
        increment(&agent, &gateways[2].url, "c", 1, None),
        Told::Counted
    );
    assert_eq!(exact(&gateways[0].url, "c"), 20 * 10_101 + 1);
    drained(&gateways[0].admin, "c");
    assert_eq!(exact(&gateways[0].url, "c"), 20 * 10_101 + 1);
}

/// Runs `dormouse counters …` against a process; what it prints.
#[track_caller]
fn counters(process: &Process, args: &str) -> Result<String, String> {
    let output = dormouse()
        .arg("counters")
        .args(args.split(' '))
        .env("DORMOUSE_ADMIN", &process.admin)
        .env("DORMOUSE_TARGET", &process.url)
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().trim_end().to_owned();
    match output.status.success() {
        true => Ok(text(output.stdout)),
        false => Err(text(output.stderr)),
    }
}

#[test]
fn operators_list_show_reshard_and_export_counters() {
    let dir = tempfile::tempdir().unwrap();
    let dev = Process::dev(dir.path());
    let run = |args: &str| counters(&dev, args).unwrap();
    assert!(run("increment a --by 41").starts_with("a by 41 in shard "));
    assert!(run("increment a --by -1 --key k").ends_with(|last: char| last.is_ascii_digit()));
    assert!(run("increment a --by -1 --key k").contains("which it had been before"));
    let counted: Value = serde_json::from_str(&run("increment export --by 5 --json")).unwrap();
    assert_eq!(counted["by"], 5);
    assert_eq!(run("value a --exact"), "40, of 100 shards, now");
    let value: Value = serde_json::from_str(&run("value a --exact --json")).unwrap();
    assert_eq!(
        value,
        json!({ "value": 40, "shards": 100, "staleness_ms": 0 })
    );
    let resharded = run("reshard a 20 --strategy round-robin --wait");
    assert_eq!(resharded, "a has 20 shards by plan 2");
    assert!(run("reshard a 2 --wait").contains("warning: 2 shards are outside"));
    let shown: Value = serde_json::from_str(&run("show a --json")).unwrap();
    assert_eq!(
        (&shown["shards"], &shown["strategy"], &shown["retiring"]),
        (&json!(2), &json!("round_robin"), &json!(0))
    );
    run("reshard a auto");
    assert!(run("show a").contains("(auto)"));
    assert_eq!(run("value a --exact"), "40, of 2 shards, now");
    assert!(run("show export").contains("shards    100"));
    eventually("both are listed", || {
        let listed = run("ls");
        listed.contains("\na ") && listed.contains("\nexport ")
    });
    let page: Value = serde_json::from_str(&run("ls --json --limit 1")).unwrap();
    assert_eq!(page["counters"][0]["name"], "a");
    let after = page["next"].as_str().unwrap();
    let page: Value = serde_json::from_str(&run(&format!("ls --json --after {after}"))).unwrap();
    assert_eq!(page["counters"][0]["name"], "export");
    assert_eq!(
        run("export --exact --format csv"),
        "name,value,shards,staleness_ms\n\"a\",40,2,0\n\"export\",5,100,0"
    );
    let first: Value = serde_json::from_str(run("export --exact").lines().next().unwrap()).unwrap();
    assert_eq!(first["value"], 40);
    let too_long = format!("increment a --key {}", "k".repeat(256));
    for (args, said) in [
        ("reshard a", "nothing to change"),
        ("reshard a many", "\"many\" is no number of shards"),
        ("reshard a 0", "count = 0 must be from 1 to 10000"),
        (&too_long, "has 256 bytes, and must have 1 to 255"),
    ] {
        let refused = counters(&dev, args).unwrap_err();
        assert!(refused.contains(said), "{args}: {refused}");
    }
}

/// A process that is killed and started again, and where it is now.
struct Place {
    process: Mutex<Option<Process>>,
    url: RwLock<(String, String)>,
    start: Box<dyn Fn() -> Process + Send + Sync>,
}

impl Place {
    fn new(start: impl Fn() -> Process + Send + Sync + 'static) -> Self {
        let process = start();
        Self {
            url: RwLock::new((process.url.clone(), process.admin.clone())),
            process: Mutex::new(Some(process)),
            start: Box::new(start),
        }
    }

    fn url(&self) -> String {
        self.url.read().unwrap().0.clone()
    }

    fn admin(&self) -> String {
        self.url.read().unwrap().1.clone()
    }

    fn kill_and_start(&self) {
        let mut process = self.process.lock().unwrap();
        if let Some(process) = process.take() {
            process.kill();
        }
        let again = (self.start)();
        *self.url.write().unwrap() = (again.url.clone(), again.admin.clone());
        *process = Some(again);
    }
}

/// What one client was told.
#[derive(Default)]
struct Heard {
    sum: i64,
    /// Of increments without a key that may or may not be counted.
    unknown_up: i64,
    unknown_down: i64,
    /// Increments with a key, until it is known that they were counted.
    open: BTreeMap<String, i64>,
    /// Those of which it is known.
    closed: BTreeMap<String, i64>,
}

impl Heard {
    fn note(&mut self, by: i64, told: Told) {
        match told {
            Told::Counted => self.sum += by,
            Told::Not => {}
            Told::Unknown if by > 0 => self.unknown_up += by,
            Told::Unknown => self.unknown_down += by,
            Told::Repeated => panic!("it had no key"),
        }
    }

    fn note_key(&mut self, key: &str, by: i64, told: Told) {
        match told {
            Told::Counted | Told::Repeated => {
                let was_open = self.open.remove(key).is_some();
                let known = self.closed.insert(key.to_owned(), by).is_some();
                assert!(was_open != known);
                assert!(!known || told == Told::Repeated, "{key} was counted twice");
                if was_open {
                    self.sum += by;
                }
            }
            Told::Not | Told::Unknown => {}
        }
    }
}

fn soak_client(seed: u64, number: u64, gateways: &[Place], stop: &AtomicBool) -> Heard {
    let mut random = StdRng::seed_from_u64(seed ^ number << 32);
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(Duration::from_secs(20)))
        .build()
        .into();
    let mut heard = Heard::default();
    let mut keys = 0;
    while !stop.load(Ordering::Relaxed) {
        let url = gateways[random.random_range(0..gateways.len())].url();
        let by = random.random_range(-1000..1500);
        match random.random_range(0..10) {
            0..5 => heard.note(by, increment(&agent, &url, "c", by, None)),
            kind => {
                // A new key, or one that may have been counted, or one that was.
                let known = match kind {
                    8 => heard.open.iter().next(),
                    9 => heard.closed.iter().nth(random.random_range(0..50)),
                    _ => None,
                };
                let (key, by) = match known {
                    Some((key, by)) => (key.clone(), *by),
                    None => {
                        keys += 1;
                        let key = format!("{seed}-{number}-{keys}");
                        heard.open.insert(key.clone(), by);
                        (key, by)
                    }
                };
                let told = increment(&agent, &url, "c", by, Some(&key));
                heard.note_key(&key, by, told);
            }
        }
    }
    heard
}

#[test]
fn totals_are_what_clients_were_told_whatever_dies() {
    let seed: u64 = match std::env::var("DORMOUSE_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => rand::rng().random(),
    };
    let seconds = std::env::var("DORMOUSE_SOAK_SECONDS");
    let seconds = seconds.map_or(SOAK_SECONDS, |seconds| seconds.parse().unwrap());
    println!("DORMOUSE_SEED={seed} DORMOUSE_SOAK_SECONDS={seconds}");
    let dir = tempfile::tempdir().unwrap();
    let (node_place, gateways) = cluster(dir.path());
    let stop = AtomicBool::new(false);
    let (_never, pause) = mpsc::sync_channel::<()>(1);
    let mut random = StdRng::seed_from_u64(seed);
    let (mut kills, mut reshards) = (0, 0);
    let heard: Vec<Heard> = thread::scope(|scope| {
        let clients: Vec<_> = (0..6)
            .map(|number| {
                let (gateways, stop) = (&gateways, &stop);
                scope.spawn(move || soak_client(seed, number, gateways, stop))
            })
            .collect();
        let mut left = Duration::from_secs(seconds);
        while !left.is_zero() {
            let wait = Duration::from_millis(random.random_range(50..500)).min(left);
            pause.recv_timeout(wait).unwrap_err();
            left -= wait;
            match random.random_range(0..6) {
                0 => {
                    node_place.kill_and_start();
                    kills += 1;
                }
                1 => {
                    gateways[random.random_range(0..gateways.len())].kill_and_start();
                    kills += 1;
                }
                _ => {
                    let change = match random.random_range(0..5) {
                        0 => json!({ "strategy": "round_robin" }),
                        1 => json!({ "strategy": "hash" }),
                        _ => json!({ "count": random.random_range(1..40) }),
                    };
                    // One that fails may be carried out or not.
                    let admin = gateways[random.random_range(0..gateways.len())].admin();
                    reshards += u32::from(reshard(&admin, "c", &change).is_ok());
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
        clients
            .into_iter()
            .map(|client| client.join().unwrap())
            .collect()
    });
    let url = gateways[0].url();
    let told = settle(&url, heard);
    let total = exact(&url, "c");
    println!(
        "{kills} kills, {reshards} reshards, {} increments with keys",
        told.keys
    );
    assert!(
        told.possible.contains(&total),
        "{total} is not in {:?}",
        told.possible
    );
    // It stays so, when all shards that leave have left.
    drained(&gateways[1].admin(), "c");
    assert_eq!(exact(&gateways[1].url(), "c"), total);
    assert!(kills + reshards > 0 && told.keys > 20);
}

/// A node, and two gateways before it.
fn cluster(data: &Path) -> (Place, Vec<Place>) {
    let address = own_address();
    let (data, at) = (data.to_owned(), address.clone());
    let node_place =
        Place::new(move || Process::start(node_at(&data, "1", &at).stderr(Stdio::null())));
    let gateways = (0..2).map(|_| {
        let address = address.clone();
        Place::new(move || {
            let mut command = dormouse();
            command.args([
                "gateway",
                "--listen",
                &free_port(),
                "--admin-listen",
                &free_port(),
            ]);
            command.args(["--nodes", &address]).stderr(Stdio::null());
            Process::start(&mut command)
        })
    });
    (node_place, gateways.collect())
}

struct ToldSum {
    possible: std::ops::RangeInclusive<i64>,
    keys: usize,
}

/// Sends what is open once more, until it is known of each; then everything with a key is exact.
fn settle(url: &str, heard: Vec<Heard>) -> ToldSum {
    let agent = agent();
    let (mut sum, mut up, mut down, mut keys) = (0, 0, 0, 0);
    for mut one in heard {
        for (key, by) in one.open.clone() {
            eventually("an increment with a key is counted", || {
                let told = increment(&agent, url, "c", by, Some(&key));
                one.note_key(&key, by, told);
                matches!(told, Told::Counted | Told::Repeated)
            });
        }
        sum += one.sum;
        up += one.unknown_up;
        down += one.unknown_down;
        keys += one.closed.len();
    }
    ToldSum {
        possible: sum + down..=sum + up,
        keys,
    }
}
