//! Rate limits that several gateways share through objects of a node.

use std::path::Path;
use std::thread;

use crate::support::{Process, agent, call, eventually, gateway, node, node_at, request};

/// Calls of any object, limited by the address of the client. An hour: next to nothing comes back meanwhile.
fn config(dir: &Path, scope: &str, algorithm: &str) -> std::path::PathBuf {
    let path = dir.join(format!("{scope}-{algorithm}.toml"));
    let text = format!(
        "[limits.calls]
         key = '{{client.ip}}'
         limit = 60
         period = '3600s'
         scope = '{scope}'
         algorithm = '{algorithm}'
         when_unreachable = 'closed'
         [objects]
         limits = ['calls']"
    );
    std::fs::write(&path, text).unwrap();
    path
}

fn start(node: &Process, config: &Path, colo: &str) -> Process {
    let mut command = gateway(node);
    command.arg("--config").arg(config).args(["--colo", colo]);
    Process::start(&mut command)
}

/// How many of so many calls passed, asked by four clients side by side.
fn passed(gateway: &Process, calls: usize) -> usize {
    let url = format!("{}/rpc/Counter/c/increment", gateway.url);
    let client = || {
        let agent = agent();
        let statuses = (0..calls / 4).map(|_| request(&agent, "POST", &url, "").unwrap().0);
        statuses.filter(|status| *status == 200).count()
    };
    thread::scope(|scope| {
        let clients: Vec<_> = (0..4).map(|_| scope.spawn(client)).collect();
        clients
            .into_iter()
            .map(|client| client.join().unwrap())
            .sum()
    })
}

fn metric(process: &Process, line: &str) -> f64 {
    let (_, metrics) = request(&agent(), "GET", &format!("{}/metrics", process.admin), "").unwrap();
    let value = metrics
        .lines()
        .find_map(|found| found.strip_prefix(line)?.strip_prefix(' '));
    value.map_or(0.0, |value| value.parse().unwrap())
}

/// Of 60 at once, one gateway leases at most a tenth beyond what it spends.
const LEASE_MAX: usize = 6;

#[test]
fn gateways_of_a_colo_share_a_limit_and_colos_do_not() {
    for algorithm in ["gcra", "sliding_window"] {
        let dir = tempfile::tempdir().unwrap();
        let node = Process::start(&mut node(dir.path(), "2"));
        let config = config(dir.path(), "colo", algorithm);
        let (a, b) = (start(&node, &config, "SFO"), start(&node, &config, "SFO"));
        let lhr = start(&node, &config, "LHR");
        let (of_a, of_b) = thread::scope(|scope| {
            let of_a = scope.spawn(|| passed(&a, 120));
            let of_b = scope.spawn(|| passed(&b, 120));
            (of_a.join().unwrap(), of_b.join().unwrap())
        });
        let both = of_a + of_b;
        assert!(both <= 60, "{algorithm}: {of_a} + {of_b}");
        assert!(both >= 60 - LEASE_MAX, "{algorithm}: {of_a} + {of_b}");
        let elsewhere = passed(&lhr, 80);
        assert!((60 - LEASE_MAX..=60).contains(&elsewhere), "{elsewhere}");
        // What was refused touched no counter.
        let counted = metric(
            &node,
            "shard_requests_total{class=\"Counter\",code=\"200\"}",
        );
        assert_eq!(counted, (both + elsewhere) as f64);
        // And most decisions needed no object.
        let asked = metric(
            &node,
            "shard_requests_total{class=\"Limiter\",code=\"200\"}",
        );
        assert!(asked > 0.0 && asked < 120.0, "{asked}");
    }
}

#[test]
fn a_gateway_that_dies_takes_its_lease_with_it_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let node = Process::start(&mut node(dir.path(), "1"));
    let config = config(dir.path(), "colo", "gcra");
    let (dying, staying) = (start(&node, &config, "SFO"), start(&node, &config, "SFO"));
    let before = passed(&dying, 20);
    assert_eq!(before, 20);
    dying.kill();
    let after = passed(&staying, 120);
    assert!(before + after <= 60, "{before} + {after}");
    // What the dead one had leased is lost, and at most as much is left unspent.
    assert!(before + after >= 60 - 2 * LEASE_MAX, "{before} + {after}");
}

#[test]
fn an_exact_limit_is_exact_over_all_gateways() {
    let dir = tempfile::tempdir().unwrap();
    let node = Process::start(&mut node(dir.path(), "1"));
    let config = config(dir.path(), "exact", "sliding_window");
    let gateways = ["SFO", "LHR"].map(|colo| start(&node, &config, colo));
    let all: usize = thread::scope(|scope| {
        let each: Vec<_> = gateways
            .iter()
            .map(|gateway| scope.spawn(|| passed(gateway, 80)))
            .collect();
        each.into_iter().map(|one| one.join().unwrap()).sum()
    });
    assert_eq!(all, 60);
}

#[test]
fn a_node_that_restarts_remembers_what_was_taken() {
    let dir = tempfile::tempdir().unwrap();
    let first = Process::start(&mut node(dir.path(), "1"));
    let listen = first.url.trim_start_matches("http://").to_owned();
    let config = config(dir.path(), "exact", "gcra");
    let gateway = start(&first, &config, "SFO");
    // Each increment is durable, and behind its grant in the same log.
    assert_eq!(passed(&gateway, 40), 40);
    first.kill();
    let second = Process::start(&mut node_at(dir.path(), "1", &listen));
    let mut total = 0;
    eventually("the limiter is reached again", || {
        total += passed(&gateway, 4);
        metric(
            &second,
            "shard_requests_total{class=\"Limiter\",code=\"200\"}",
        ) > 0.0
    });
    total += passed(&gateway, 80);
    assert_eq!(total, 20, "after 40 were taken");
}

#[test]
fn a_client_makes_no_more_new_objects_than_its_quota() {
    let dir = tempfile::tempdir().unwrap();
    let node = Process::start(&mut node(dir.path(), "2"));
    let config = dir.path().join("quota.toml");
    let text = "objects.creations = 'new-per-client'
         [limits.new-per-client]
         key = '{client.ip}'
         limit = 10
         period = '3600s'";
    std::fs::write(&config, text).unwrap();
    let gateway = start(&node, &config, "SFO");
    let agent = agent();
    let call = |object: &str, method: &str| {
        let url = format!("{}/rpc/Counter/{object}/{method}", gateway.url);
        request(&agent, "POST", &url, "").unwrap().0
    };
    // To look at what is not there makes nothing.
    assert!((0..50).all(|n| call(&format!("nobody-{n}"), "value") == 200));
    let makes = |client: usize| {
        (0..50)
            .filter(|n| call(&format!("{client}-{n}"), "increment") == 200)
            .count()
    };
    let made: usize = thread::scope(|scope| {
        let clients: Vec<_> = (0..4)
            .map(|client| scope.spawn(move || makes(client)))
            .collect();
        clients
            .into_iter()
            .map(|client| client.join().unwrap())
            .sum()
    });
    assert_eq!(made, 10, "of 200 names");
    // Those go on.
    let first = (0..4).flat_map(|client| (0..50).map(move |n| format!("{client}-{n}")));
    let alive = first.filter(|name| call(name, "increment") == 200).count();
    assert_eq!(alive, 10);
    let (_, listed) = request(
        &agent,
        "GET",
        &format!("{}/objects?class=Counter&limit=1000", gateway.admin),
        "",
    )
    .unwrap();
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed["objects"].as_array().unwrap().len(), 10);
}

#[test]
fn bodies_that_were_checked_arrive_whole_and_pages_may_read_the_answer() {
    let dir = tempfile::tempdir().unwrap();
    let node = Process::start(&mut node(dir.path(), "1"));
    let config = dir.path().join("checked.toml");
    let text = "[objects.validate.schema]
         type = 'object'
         required = ['item']
         [objects.cors]
         origins = ['https://shop.example']";
    std::fs::write(&config, text).unwrap();
    let gateway = start(&node, &config, "SFO");
    let put = |body: &str| {
        let url = format!("{}/objects/Kv/cart/order", gateway.url);
        let request = agent().put(url).header("origin", "https://shop.example");
        let answer = request.send(body).unwrap();
        let readable = answer.headers().get("access-control-allow-origin").cloned();
        assert_eq!(readable.unwrap(), "https://shop.example");
        answer.status().as_u16()
    };
    let large = format!(r#"{{"item": "{}"}}"#, "nut".repeat(10_000));
    assert_eq!([put("{}"), put(&large), put("[]")], [400, 201, 400]);
    // Through a gateway without rules.
    let open = Process::start(&mut crate::support::gateway(&node));
    let url = format!("{}/objects/Kv/cart/order", open.url);
    assert_eq!(request(&agent(), "GET", &url, "").unwrap(), (200, large));
    let requests = metric(&node, "shard_requests_total{class=\"Kv\",code=\"201\"}");
    assert_eq!(requests, 1.0);
}

#[test]
fn a_hot_key_has_more_shards_than_a_cold_one_in_each_colo_and_nothing_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let node = Process::start(&mut node(dir.path(), "2"));
    let config = dir.path().join("overflow.toml");
    let text = "[[routes]]
         name = 'hits'
         path = '/hits'
         rpc = { class = 'Counter', name = '{colo}:{query.k}:{shard}', method = 'increment' }
         [routes.shard]
         by = '{colo}:{query.k}'
         hash = 'overflow'
         count = 8
         limit = 20
         period = '3600s'";
    std::fs::write(&config, text).unwrap();
    let [sfo, lhr] = ["SFO", "LHR"].map(|colo| start(&node, &config, colo));
    let hit = |gateway: &Process, key: &str, times: usize| {
        let url = format!("{}/hits?k={key}", gateway.url);
        let client = || {
            let agent = agent();
            for _ in 0..times / 4 {
                assert_eq!(request(&agent, "POST", &url, "").unwrap().0, 200);
            }
        };
        thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(client))));
    };
    hit(&sfo, "hot", 92);
    hit(&sfo, "cold", 12);
    hit(&lhr, "hot", 32);
    let counted = |key: &str| -> Vec<i64> {
        let value = |shard| {
            let counter = format!("Counter/{key}:{shard}/value");
            call(&sfo.url, &counter, &serde_json::json!([]))
                .as_i64()
                .unwrap()
        };
        (0..8).map(value).collect()
    };
    assert_eq!(counted("SFO:hot"), [20, 20, 20, 20, 12, 0, 0, 0]);
    assert_eq!(counted("SFO:cold"), [12, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(counted("LHR:hot"), [20, 12, 0, 0, 0, 0, 0, 0]);
}
