//! Gateway and node together: the contract end to end.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::thread;

use serde_json::{Value, json};

use crate::support::{Process, agent, call, dev, free_port, gateway, node, node_at, request};

#[test]
fn a_thousand_concurrent_increments_end_at_exactly_a_thousand() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::dev(dir.path());
    let url = format!("{}/rpc/Counter/one/increment", process.url);
    let mut values: Vec<i64> = thread::scope(|scope| {
        let calls: Vec<_> = (0..1000)
            .map(|_| {
                thread::Builder::new()
                    .stack_size(256 << 10)
                    .spawn_scoped(scope, || request(&agent(), "POST", &url, "").unwrap())
                    .unwrap()
            })
            .collect();
        calls
            .into_iter()
            .map(|call| {
                let (status, body) = call.join().unwrap();
                assert_eq!(status, 200, "{body}");
                body.parse().unwrap()
            })
            .collect()
    });
    values.sort_unstable();
    assert_eq!(values, (1..=1000).collect::<Vec<i64>>(), "each answer once");
    assert_eq!(call(&process.url, "Counter/one/value", &json!([])), 1000);
}

#[test]
fn one_object_is_one_instance_from_every_gateway() {
    let dir = tempfile::tempdir().unwrap();
    let node = Process::start(&mut node(dir.path(), "2"));
    let gateways: Vec<Process> = (0..8)
        .map(|_| Process::start(&mut gateway(&node)))
        .collect();
    thread::scope(|scope| {
        for gateway in &gateways {
            scope.spawn(|| {
                for _ in 0..25 {
                    call(&gateway.url, "Counter/shared/increment", &json!([]));
                }
            });
        }
    });
    assert_eq!(
        call(&gateways[0].url, "Counter/shared/value", &json!([])),
        200
    );
}

#[test]
fn a_gateway_that_dies_takes_only_what_was_in_flight() {
    let dir = tempfile::tempdir().unwrap();
    let node = Process::start(&mut node(dir.path(), "1"));
    let (dying, staying) = (
        Process::start(&mut gateway(&node)),
        Process::start(&mut gateway(&node)),
    );
    let count = |url: String| {
        let agent = agent();
        let mut acknowledged = 0;
        for _ in 0..300 {
            match request(
                &agent,
                "POST",
                &format!("{url}/rpc/Counter/a/increment"),
                "",
            ) {
                Ok((200, _)) => acknowledged += 1,
                _ => return acknowledged,
            }
        }
        acknowledged
    };
    let (before, after) = thread::scope(|scope| {
        let urls = (dying.url.clone(), staying.url.clone());
        let first = scope.spawn(move || count(urls.0));
        let second = scope.spawn(move || count(urls.1));
        while call(&staying.url, "Counter/a/value", &json!([]))
            .as_i64()
            .unwrap()
            < 50
        {}
        dying.kill();
        (first.join().unwrap(), second.join().unwrap())
    });
    assert_eq!(after, 300, "the other gateway is not concerned");
    let total = call(&staying.url, "Counter/a/value", &json!([]))
        .as_i64()
        .unwrap();
    // The one call that was in flight may or may not have been applied.
    let possible = before + after..=before + after + 1;
    assert!(possible.contains(&total), "{total} is not in {possible:?}");
}

#[test]
fn a_gateway_learns_of_a_node_that_comes_back_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let start = |listen: &str| Process::start(&mut node_at(dir.path(), "1", listen));
    let node = start(&free_port());
    let listen = node.url.trim_start_matches("http://").to_owned();
    let gateway = Process::start(&mut gateway(&node));
    assert_eq!(call(&gateway.url, "Counter/a/increment", &json!([])), 1);
    node.kill();
    let (status, body) = request(
        &agent(),
        "POST",
        &format!("{}/rpc/Counter/a/increment", gateway.url),
        "",
    )
    .unwrap();
    let problem: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(
        (status, &problem["code"], &problem["retryable"]),
        (503, &json!("unavailable"), &json!(true)),
        "{body}"
    );
    let node = start(&listen);
    assert_eq!(call(&gateway.url, "Counter/a/increment", &json!([])), 2);
    drop(node);
}

#[test]
fn without_the_token_a_gateway_gets_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let node = Process::start(node(dir.path(), "1").env("DORMOUSE_TOKEN", "secret"));
    let right = Process::start(gateway(&node).args(["--token", "secret"]));
    assert_eq!(call(&right.url, "Counter/a/increment", &json!([])), 1);
    let wrong = Process::start(gateway(&node).args(["--token", "wrong"]));
    let (status, _) = request(
        &agent(),
        "POST",
        &format!("{}/rpc/Counter/a/increment", wrong.url),
        "",
    )
    .unwrap();
    assert_eq!(status, 503, "it cannot even learn the ring");
    let (ready, _) = request(&agent(), "GET", &format!("{}/readyz", wrong.admin), "").unwrap();
    assert_eq!(ready, 503);
    // The worker's port answers nobody else.
    let (status, _) = request(&agent(), "GET", &format!("{}/", node.url), "").unwrap();
    assert_eq!(status, 401);
}

#[test]
fn one_trace_spans_client_gateway_and_worker() {
    let dir = tempfile::tempdir().unwrap();
    let debug = ["--log", "debug", "--log-format", "json"];
    let mut node_command = node(dir.path(), "1");
    node_command.args(debug);
    let (node_log, node_stderr) = std::io::pipe().unwrap();
    let node = Process::start(node_command.stderr(node_stderr));
    drop(node_command);
    let (gateway_log, gateway_stderr) = std::io::pipe().unwrap();
    let mut gateway_command = gateway(&node);
    gateway_command.args(debug).stderr(gateway_stderr);
    let gateway = Process::start(&mut gateway_command);
    drop(gateway_command);
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let sent = agent()
        .post(format!("{}/rpc/Counter/a/increment", gateway.url))
        .header("traceparent", format!("00-{trace}-b7ad6b7169203331-01"))
        .send_empty()
        .unwrap();
    assert_eq!(sent.status(), 200);
    let line = |log: std::io::PipeReader| -> Value {
        BufReader::new(log)
            .lines()
            .map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap())
            .find(|line| line["trace"] == trace)
            .expect("a line with the trace")
    };
    let (at_gateway, at_worker) = (line(gateway_log), line(node_log));
    assert_eq!(
        at_worker["parent"], at_gateway["span"],
        "{at_gateway} {at_worker}"
    );
    assert_eq!(at_worker["request"], at_gateway["request"]);
    assert_eq!(at_gateway["route"], "rpc");
}

#[test]
fn metrics_of_both_tiers_count_what_happened() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::dev(dir.path());
    for _ in 0..5 {
        call(&process.url, "Counter/a/increment", &json!([]));
    }
    request(
        &agent(),
        "POST",
        &format!("{}/rpc/Counter/a/nope", process.url),
        "",
    )
    .unwrap();
    let (status, metrics) =
        request(&agent(), "GET", &format!("{}/metrics", process.admin), "").unwrap();
    assert_eq!(status, 200);
    for line in [
        "gateway_requests_total{route=\"rpc\",code=\"200\"} 5",
        "gateway_request_seconds_count{route=\"rpc\",code=\"200\"} 5",
        "shard_requests_total{class=\"Counter\",code=\"200\"} 5",
        "shard_requests_total{class=\"Counter\",code=\"not_found\"} 1",
        "shard_request_seconds_bucket{class=\"Counter\",code=\"200\",le=\"10\"} 5",
        "shard_objects_awake{class=\"Counter\"} 1",
        "shard_mailbox_wait_seconds_count 6",
        "shard_commits_total 5",
        "gateway_ring_version 1",
    ] {
        assert!(
            metrics.lines().any(|found| found == line),
            "{line} is not in\n{metrics}"
        );
    }
    let (_, ready) = request(&agent(), "GET", &format!("{}/readyz", process.admin), "").unwrap();
    assert_eq!(ready, "ready\n");
    let (_, ring) = request(&agent(), "GET", &format!("{}/ring", process.admin), "").unwrap();
    assert_eq!(serde_json::from_str::<Value>(&ring).unwrap()["shards"], 128);
}

#[test]
fn an_admin_token_guards_all_but_health() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::start(dev(dir.path()).env("DORMOUSE_ADMIN_TOKEN", "secret"));
    let status = |path: &str, token: &str| {
        let mut request = agent().get(format!("{}{path}", process.admin));
        if !token.is_empty() {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        request.call().unwrap().status().as_u16()
    };
    assert_eq!(status("/healthz", ""), 200);
    assert_eq!(status("/metrics", ""), 401);
    assert_eq!(status("/metrics", "wrong"), 401);
    assert_eq!(status("/metrics", "secret"), 200);
    assert_eq!(status("/nothing", "secret"), 404);
}

#[test]
fn hanging_up_reloads_routes_and_a_bad_file_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("gateway.toml");
    let app = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = app.local_addr().unwrap();
    thread::spawn(move || {
        use std::io::{Read, Write};
        for stream in app.incoming() {
            let mut stream = stream.unwrap();
            let mut head = [0; 1024];
            if stream.read(&mut head).is_ok() {
                // A client that went away is no concern here.
                drop(stream.write_all(
                    b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\nconnection: close\r\n\r\napp",
                ));
            }
        }
    });
    std::fs::write(&file, "").unwrap();
    let process = Process::start(
        dev(&dir.path().join("data"))
            .arg("--config")
            .arg(&file)
            .stderr(Stdio::null()),
    );
    let status = || {
        request(&agent(), "GET", &format!("{}/page", process.url), "")
            .unwrap()
            .0
    };
    let reach = |want: u16| {
        for _ in 0..500 {
            if status() == want {
                return;
            }
        }
        panic!("the status never became {want}");
    };
    reach(404);
    let routes = format!(
        "routes = [{{ name = 'app', path = '/*', upstream = 'app' }}]\nupstreams.app.servers = ['{address}']\n"
    );
    std::fs::write(&file, &routes).unwrap();
    process.signal("HUP");
    reach(200);
    std::fs::write(&file, "routes = 7").unwrap();
    process.signal("HUP");
    for _ in 0..20 {
        assert_eq!(status(), 200);
    }
}

/// A colo is where objects of its scope may be, and nowhere else.
#[test]
fn objects_of_a_colo_without_nodes_are_refused_and_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let node = Process::start(node(dir.path(), "2").args(["--colo", "IAD"]));
    let config = dir.path().join("gateway.toml");
    std::fs::write(&config, "objects.colo_scoped = ['Kv']").unwrap();
    let [here, elsewhere] = ["IAD", "FRA"].map(|colo| {
        let mut command = gateway(&node);
        command.arg("--config").arg(&config).args(["--colo", colo]);
        Process::start(&mut command)
    });
    let agent = agent();
    let put = |gateway: &Process| {
        let url = format!("{}/objects/Kv/cart/order", gateway.url);
        request(&agent, "PUT", &url, "nuts").unwrap()
    };
    let (status, problem) = put(&elsewhere);
    assert_eq!(status, 503);
    assert!(
        problem.contains("no node of the ring is in colo FRA"),
        "{problem}"
    );
    assert_eq!(put(&here).0, 201);
    let objects = || -> Vec<Value> {
        let url = format!("{}/objects?class=Kv", here.admin);
        let (_, listed) = request(&agent, "GET", &url, "").unwrap();
        let listed: Value = serde_json::from_str(&listed).unwrap();
        listed["objects"].as_array().unwrap().clone()
    };
    let [object] = <[Value; 1]>::try_from(objects()).unwrap();
    // Its id says where it lives, whoever asks.
    let url = format!(
        "{}/objects/Kv/id:{}/order",
        elsewhere.url,
        object["id"].as_str().unwrap()
    );
    assert_eq!(
        request(&agent, "GET", &url, "").unwrap(),
        (200, "nuts".to_owned())
    );
    assert_eq!(put(&elsewhere).0, 503);
    assert_eq!(objects().len(), 1);
}
