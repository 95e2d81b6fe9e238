//! Starting, stopping, sleeping, owning.

use std::net::TcpListener;
use std::thread;
use std::time::Duration;

use protocol::headers;
use serde_json::json;
use shard_node::classes::Classes;
use shard_node::node::Node;

use crate::support::{TestNode, agent, config, eventually};

#[test]
fn requests_for_a_shard_of_another_worker_are_not_served() {
    let node = TestNode::with(|config| config.workers = 2);
    let id = node.id("Counter", "a");
    let stranger = node
        .node
        .addresses()
        .iter()
        .map(ToString::to_string)
        .find(|address| *address != node.owner(id))
        .unwrap();
    let mut request = node
        .request("POST", "Counter", "a", "/")
        .header(headers::METHOD, "increment");
    request = request.uri(format!("http://{stranger}/"));
    let answer = node.send(request, "");
    assert_eq!(
        (answer.status, answer.code()),
        (421, "not_owner"),
        "{answer:?}"
    );
    assert_eq!(answer.headers[headers::EPOCH], "1");
    assert!(
        answer.detail().contains(&node.owner(id)),
        "it names the owner: {}",
        answer.detail()
    );
    assert_eq!(node.result("Counter", "a", "value", json!([])), 0);
}

#[test]
fn a_request_routed_by_a_newer_ring_is_not_served() {
    let node = TestNode::start();
    let mut request = node
        .request("POST", "Counter", "a", "/")
        .header(headers::METHOD, "increment");
    request
        .headers_mut()
        .unwrap()
        .insert(headers::EPOCH, "2".parse().unwrap());
    let answer = node.send(request, "");
    assert_eq!(answer.code(), "not_owner");
    assert!(answer.detail().contains("ring 2"), "{}", answer.detail());
}

#[test]
fn every_worker_shows_the_ring() {
    let node = TestNode::with(|config| config.workers = 2);
    for address in node.node.addresses() {
        let mut response = agent()
            .get(format!("http://{address}{}", headers::RING_PATH))
            .call()
            .unwrap();
        let text = response.body_mut().read_to_string().unwrap();
        assert_eq!(
            serde_json::from_str::<protocol::ring::RingDocument>(&text).unwrap(),
            *node.node.ring().document()
        );
    }
}

#[test]
fn with_a_token_nothing_is_answered_without_it() {
    let node = TestNode::with(|config| config.token = "secret".to_owned());
    let call = |token: Option<&str>| {
        let mut request = node
            .request("POST", "Probe", "a", "/")
            .header(headers::METHOD, "instance");
        if let Some(token) = token {
            request = request.header(headers::TOKEN, token);
        }
        node.send(request, "").status
    };
    assert_eq!(call(None), 401);
    assert_eq!(call(Some("Secret")), 401);
    assert_eq!(call(Some("secret")), 200);
    let ring = agent()
        .get(format!(
            "http://{}{}",
            node.node.addresses()[0],
            headers::RING_PATH
        ))
        .call()
        .unwrap();
    assert_eq!(ring.status(), 401);
    let seen = node
        .send(
            node.request("GET", "Probe", "a", "/x")
                .header(headers::TOKEN, "secret"),
            "",
        )
        .json();
    assert!(
        seen["headers"].get("dormouse-token").is_none(),
        "classes never see the token: {seen}"
    );
}

#[test]
fn a_taken_port_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    config.listen = address.clone();
    let error = Node::start(&config, &Classes::built_in()).err().unwrap();
    assert_eq!(
        error.to_string(),
        format!("worker 0 cannot listen on {address}")
    );
}

#[test]
fn a_directory_that_cannot_be_written_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = Node::start(&config(&file), &Classes::built_in())
        .err()
        .unwrap();
    let text = ops::Causes(&error).to_string();
    assert!(
        text.contains("file") && text.contains("cannot be used for writing"),
        "{text}"
    );
}

#[test]
fn an_idle_object_sleeps_and_wakes_with_its_data() {
    let node = TestNode::with(|config| config.objects.idle_after = Duration::from_secs(1));
    node.result("Probe", "a", "write", json!(["kept"]));
    let before = node.result("Probe", "a", "instance", json!([]));
    assert_eq!(node.metric("shard_objects_awake{class=\"Probe\"}"), 1.0);
    eventually("the object sleeps", || {
        node.metric("shard_objects_awake{class=\"Probe\"}") == 0.0
    });
    let after = node.result("Probe", "a", "instance", json!([]));
    assert_ne!(before, after, "a new instance was constructed");
    assert_eq!(node.result("Probe", "a", "written", json!([])), "kept");
}

#[test]
fn a_busy_object_stays_awake() {
    let node = TestNode::with(|config| config.objects.idle_after = Duration::from_millis(20));
    thread::scope(|scope| {
        let long = scope.spawn(|| node.result("Probe", "a", "wait", json!([2000])));
        eventually("the call runs", || {
            node.metric("shard_mailbox_wait_seconds_count") >= 1.0
        });
        let first = node.result("Probe", "a", "instance", json!([]));
        // Long enough for an idle object to leave.
        node.result("Probe", "b", "wait", json!([300]));
        assert_eq!(node.result("Probe", "a", "instance", json!([])), first);
        assert_eq!(long.join().unwrap(), first);
    });
}

#[test]
fn the_least_recently_used_objects_make_room() {
    let node = TestNode::with(|config| config.objects.awake_max = 10.try_into().unwrap());
    for object in 0..100 {
        let name = format!("o{object}");
        assert_eq!(node.result("Counter", &name, "increment", json!([])), 1);
        assert!(node.metric("shard_objects_awake{class=\"Counter\"}") <= 10.0);
    }
    for object in 0..100 {
        assert_eq!(
            node.result("Counter", &format!("o{object}"), "value", json!([])),
            1
        );
    }
}

#[test]
fn idle_objects_make_room_however_often_they_were_used() {
    let node = TestNode::with(|config| config.objects.awake_max = 200.try_into().unwrap());
    for round in 0..3 {
        for object in 0..200 {
            node.result(
                "Counter",
                &format!("r{}o{object}", round % 2),
                "value",
                json!([]),
            );
            node.result(
                "Counter",
                &format!("r{}o{object}", round % 2),
                "value",
                json!([]),
            );
        }
    }
}

#[test]
fn objects_do_not_see_each_other() {
    let node = TestNode::start();
    node.result("Probe", "a", "write", json!(["of a"]));
    assert_eq!(node.result("Probe", "b", "written", json!([])), json!(null));
    assert_eq!(node.result("Kv", "a", "get", json!(["value"])), json!(null));
    assert_ne!(
        node.result("Probe", "a", "instance", json!([])),
        node.result("Probe", "b", "instance", json!([]))
    );
}

#[test]
fn data_survives_a_restart_with_another_number_of_workers() {
    let dir = tempfile::tempdir().unwrap();
    for workers in [1, 3, 2] {
        let mut config = config(dir.path());
        config.workers = workers;
        let node = TestNode::reopen(&config);
        for object in 0..20 {
            node.result("Counter", &format!("o{object}"), "increment", json!([]));
        }
        node.node.shut_down();
    }
    let node = TestNode::reopen(&config(dir.path()));
    for object in 0..20 {
        assert_eq!(
            node.result("Counter", &format!("o{object}"), "value", json!([])),
            3
        );
    }
}

#[test]
fn a_stopping_node_answers_what_is_under_way() {
    let node = TestNode::start();
    node.result("Probe", "a", "write", json!(["x"]));
    let request = node
        .request("POST", "Probe", "a", "/")
        .header(headers::METHOD, "wait");
    let address = node.node.addresses()[0];
    let slow = thread::spawn(move || {
        agent()
            .run(request.body("[500]".to_owned()).unwrap())
            .unwrap()
            .status()
    });
    eventually("the call runs", || {
        node.metric("shard_mailbox_wait_seconds_count") >= 2.0
    });
    node.node.shut_down();
    assert_eq!(slow.join().unwrap(), 200);
    assert!(
        std::net::TcpStream::connect(address).is_err(),
        "the port is closed"
    );
}

#[test]
fn objects_leave_when_their_databases_take_too_much_memory() {
    let node = TestNode::with(|config| {
        config.objects.memory_bytes_max = std::num::NonZeroU64::new(1 << 20).unwrap();
        config.objects.idle_after = Duration::from_secs(600);
    });
    for object in 0..100 {
        node.result("Counter", &format!("c{object}"), "increment", json!([]));
    }
    // 100 small databases take about 2 MiB, besides the connections.
    eventually("half of them sleep", || {
        let awake = node.metric("shard_objects_awake{class=\"Counter\"}");
        let memory = node.metric("shard_storage_memory_bytes{worker=\"0\"}");
        awake < 70.0 && (1.0..=f64::from(1 << 20)).contains(&memory)
    });
    for object in 0..100 {
        let value = node.result("Counter", &format!("c{object}"), "value", json!([]));
        assert_eq!(value, 1, "object {object}");
    }
}
