//! Calls from objects to objects: on other workers, and on another node, which is a process of its own.

use std::io::Read;
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;

use protocol::ring::RingNode;
use serde_json::{Value, json};
use shard_node::config::Config;
use shard_node::node::Node;

use crate::classes;
use crate::support::{TestNode, config, eventually};

/// Tells the test below which node it is to be.
const NODE: &str = "DORMOUSE_TEST_NODE";

const WORKERS: u16 = 2;

/// The second node of [`Cluster`] is this test, run again by itself in a process of its own.
#[test]
fn serves_while_another_test_wants_it_to() {
    let Ok(config) = std::env::var(NODE) else {
        return;
    };
    let config: Config = toml::from_str(&config).unwrap();
    let node = Node::start(&config, &classes::all()).unwrap();
    // Ends with whoever holds the other end of the pipe.
    drop(std::io::stdin().read_to_end(&mut Vec::new()));
    node.shut_down();
}

/// A ring of two nodes with two workers each: one here, one in another process, which is not started yet.
struct Cluster {
    here: TestNode,
    other: Config,
    process: Option<Child>,
    _dir: tempfile::TempDir,
}

/// Ports that follow each other, and stay free while nobody listens: of a host of its own (all of 127.0.0.0/8 is
/// this machine), where no connection begins.
fn free_ports() -> Vec<String> {
    let [a, b]: [u8; 2] = rand::random();
    [7001, 7002]
        .map(|port| format!("127.77.{a}.{b}:{port}"))
        .to_vec()
}

fn node_config(dir: &Path, name: &str, nodes: &[RingNode]) -> Config {
    let mut config = config(&dir.join(name));
    let me = nodes.iter().find(|node| node.name == name).unwrap();
    config.name = name.to_owned();
    config.workers = WORKERS;
    config.listen = me.workers[0].clone();
    config.ring.nodes = nodes.to_vec();
    config
}

impl Cluster {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let nodes = ["here", "other"].map(|name| RingNode {
            name: name.to_owned(),
            weight: 1,
            colo: None,
            workers: free_ports(),
        });
        Self {
            here: TestNode::reopen(&node_config(dir.path(), "here", &nodes)),
            other: node_config(dir.path(), "other", &nodes),
            process: None,
            _dir: dir,
        }
    }

    fn both() -> Self {
        let mut cluster = Self::start();
        cluster.start_other();
        cluster
    }

    fn start_other(&mut self) {
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "calls::serves_while_another_test_wants_it_to"])
            .env(NODE, toml::to_string(&self.other).unwrap())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        self.process = Some(process);
        for address in &self.other.ring.nodes[1].workers {
            eventually("the other node listens", || {
                TcpStream::connect(address).is_ok()
            });
        }
    }

    fn kill_other(&mut self) {
        let mut process = self.process.take().unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
    }

    /// The workers' addresses: two here, then two there.
    fn workers(&self) -> Vec<String> {
        let nodes = &self.other.ring.nodes;
        nodes.iter().flat_map(|node| node.workers.clone()).collect()
    }

    /// Names of relays on that worker.
    fn relays_on(&self, worker: usize) -> impl Iterator<Item = String> {
        let address = self.workers().swap_remove(worker);
        let names = (0..).map(|number| format!("o{number}"));
        names.filter(move |name| self.here.owner(self.here.id("Relay", name)) == address)
    }

    fn relay_on(&self, worker: usize) -> String {
        self.relays_on(worker).next().unwrap()
    }

    /// What relay `from` was answered when it called relay `to`.
    fn relay(&self, from: &str, to: &str, method: &str, args: Value) -> Value {
        let args = json!(["Relay", to, method, args]);
        self.here.result("Relay", from, "call", args)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            drop(process.kill());
            drop(process.wait());
        }
    }
}

#[test]
fn calls_reach_objects_wherever_they_are() {
    let cluster = Cluster::both();
    for from in 0..4 {
        for to in 0..4 {
            let (from, to) = (cluster.relay_on(from), cluster.relay_on(to));
            let answer = cluster.relay(&from, &to, "append", json!([1]));
            assert!(answer["ok"].is_u64(), "{answer}");
        }
    }
    for worker in 0..4 {
        let name = cluster.relay_on(worker);
        let list = cluster.here.result("Relay", &name, "list", json!([]));
        assert_eq!(list, json!([1, 1, 1, 1]), "worker {worker}");
    }
}

#[test]
fn what_is_too_large_for_a_link_arrives_too() {
    let cluster = Cluster::both();
    let (from, to) = (cluster.relay_on(0), cluster.relay_on(3));
    for bytes in [60_000, 70_000, 3 << 20] {
        let text = "x".repeat(bytes);
        let answer = cluster.relay(&from, &to, "echo", json!([text]));
        assert_eq!(answer["ok"].as_str().map(str::len), Some(bytes));
        // Large answers to small calls.
        let answer = cluster.relay(&from, &to, "fill", json!([bytes]));
        assert_eq!(answer["ok"].as_str().map(str::len), Some(bytes));
    }
}

#[test]
fn a_chain_over_both_nodes_is_one_call_of_its_caller() {
    let cluster = Cluster::both();
    let here = &cluster.here;
    let workers = cluster.workers();
    let on = |class: &str, name: &str| here.owner(here.id(class, name));
    let name = (0..).map(|number| format!("d{number}")).find(|name| {
        // There, here, and on the other worker here.
        workers[2..].contains(&on("Intake", name))
            && on("Review", name) == workers[0]
            && on("Publish", name) == workers[1]
    });
    let name = name.unwrap();
    let answer = here.result("Intake", &name, "pass", json!(["text"]));
    assert_eq!(answer["document"], "text");
    let hops: Vec<&str> = answer["hops"]
        .as_array()
        .unwrap()
        .iter()
        .map(|hop| hop["to"].as_str().unwrap())
        .collect();
    assert_eq!(hops, ["Review", "Publish"]);
    assert_eq!(
        here.result("Publish", &name, "passed", json!([])),
        "\"text\""
    );
}

#[test]
fn a_node_that_is_down_is_unavailable_and_serves_again_when_it_is_back() {
    let mut cluster = Cluster::start();
    let (from, to) = (cluster.relay_on(0), cluster.relay_on(2));
    let unavailable = |answer: &Value, retryable: bool| {
        let error = &answer["error"];
        assert_eq!(error["code"], "unavailable", "{answer}");
        assert_eq!(error["retryable"], retryable, "{answer}");
        assert_eq!(error["remote"], false, "{answer}");
    };
    // It never was there.
    unavailable(&cluster.relay(&from, &to, "append", json!([1])), true);
    cluster.start_other();
    let answer = cluster.relay(&from, &to, "append", json!([2]));
    assert_eq!(answer["ok"], 1, "the first one did not arrive");
    // It dies in the middle of a call.
    thread::scope(|scope| {
        let hanging = scope.spawn(|| cluster.relay(&from, &to, "hang", json!([])));
        eventually("the call runs", || {
            cluster.here.result("Relay", &to, "hangs", json!([])) == true
        });
        let id = cluster.process.as_ref().unwrap().id().to_string();
        let killed = Command::new("kill").args(["-9", &id]).status();
        assert!(killed.unwrap().success());
        let answer = hanging.join().unwrap();
        unavailable(&answer, false);
        assert!(
            answer["error"]["detail"]
                .as_str()
                .unwrap()
                .contains("unknown"),
            "{answer}"
        );
    });
    cluster.kill_other();
    unavailable(&cluster.relay(&from, &to, "append", json!([3])), true);
    // Others go on.
    let neighbour = cluster.relay_on(1);
    assert_eq!(
        cluster.relay(&from, &neighbour, "append", json!([1]))["ok"],
        1
    );
    cluster.start_other();
    assert_eq!(cluster.relay(&from, &to, "append", json!([4]))["ok"], 2);
    assert_eq!(
        cluster.here.result("Relay", &to, "list", json!([])),
        json!([2, 4])
    );
}

#[test]
fn a_thousand_calls_at_once_arrive_in_the_order_in_which_they_were_made() {
    let cluster = Cluster::both();
    let from = cluster.relay_on(0);
    let all: Vec<u64> = (0..1000).collect();
    for to in 0..4 {
        let to = cluster.relay_on(to);
        let args = json!(["Relay", to, "append", 1000]);
        let answers = cluster.here.result("Relay", &from, "burst", args);
        let lengths: Vec<u64> = all.iter().map(|length| length + 1).collect();
        assert_eq!(answers, json!(lengths), "to {to}");
        let list = cluster.here.result("Relay", &to, "list", json!([]));
        assert_eq!(list, json!(all), "to {to}");
    }
}

#[test]
fn errors_of_the_called_class_arrive_with_their_flags() {
    let cluster = Cluster::both();
    // None of those that it calls.
    let from = cluster.relays_on(0).nth(1).unwrap();
    for to in 0..4 {
        let to = cluster.relay_on(to);
        let error = cluster.relay(&from, &to, "throw", json!([]));
        assert_eq!(
            error["error"],
            json!({ "code": "internal", "detail": "Error: as asked", "retryable": false, "remote": true })
        );
        let error = cluster.relay(&from, &to, "none", json!([]));
        assert_eq!(error["error"]["code"], "not_found");
        let detail = error["error"]["detail"].as_str().unwrap();
        assert!(detail.contains("Relay has no method \"none\""), "{detail}");
        let error = cluster.relay(&from, &to, "panic", json!([]));
        assert_eq!(error["error"]["code"], "object_reset");
    }
}

#[test]
fn objects_that_call_each_other_in_a_circle_do_not_block() {
    let cluster = Cluster::both();
    let from = cluster.relay_on(0);
    // Itself, a neighbour on the worker's node, and one on the other node.
    for other in [0, 1, 3] {
        let other = cluster.relay_on(other);
        let answer = cluster
            .here
            .result("Relay", &from, "bounce", json!([other, 20]));
        assert_eq!(answer, 20, "between {from} and {other}");
    }
}

#[test]
fn a_stopping_node_answers_what_it_took_and_nothing_ran_of_the_rest() {
    let mut cluster = Cluster::both();
    let (from, to) = (cluster.relay_on(0), cluster.relay_on(2));
    assert_eq!(cluster.relay(&from, &to, "append", json!([0]))["ok"], 1);
    let mut process = cluster.process.take().unwrap();
    // The end of its pipe is the word to stop.
    drop(process.stdin.take());
    let mut appended = vec![0];
    for number in 1.. {
        let answer = cluster.relay(&from, &to, "append", json!([number]));
        if answer["ok"].is_u64() {
            appended.push(number);
            continue;
        }
        assert_eq!(answer["error"]["retryable"], true, "{answer}");
        break;
    }
    process.wait().unwrap();
    cluster.start_other();
    let list = cluster.here.result("Relay", &to, "list", json!([]));
    assert_eq!(list, json!(appended));
}
