//! What does a scrape of `/metrics` cost on a node with a million objects, and how many series is it? And how
//! long until the node knows what it has? `OBJECTS=…` for another number.
#![expect(clippy::print_stdout, reason = "the figures are the result")]

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use metrics::Histogram;
use protocol::{ClassName, Home, ObjectId, ObjectName};
use shard_node::classes::Classes;
use shard_node::clock::{SystemClock, monotonic_nanos};
use shard_node::config::Config;
use shard_node::disk::RealDisk;
use shard_node::node::Node;
use shard_node::storage::logged::{PAGE_BYTES, Setup};
use shard_node::storage::{Engine, Identity, LogConfig, Logged, SqlConfig, Storage};
use tokio::sync::Notify;

const SHARDS: u16 = 128;
const PER_TICK: u32 = 500;
const SCRAPES: usize = 50;
const FEW: u32 = 10;

fn main() {
    let objects: u32 =
        std::env::var("OBJECTS").map_or(1_000_000, |count| count.parse().expect("a number"));
    let dir = tempfile::tempdir().expect("a directory for temporary files");
    let config = Config {
        listen: "127.0.0.1:0".to_owned(),
        data_dir: dir.path().to_owned(),
        workers: 1,
        ..Config::default()
    };
    // Makes the directory one of a node.
    start(&config).shut_down();
    fill(dir.path(), 0..FEW);
    let few = start_and_scrape(&config, FEW);
    let begun = monotonic_nanos();
    fill(dir.path(), FEW..objects);
    println!("created {objects} objects: {:.0} s", seconds(begun));
    let many = start_and_scrape(&config, objects);
    println!(
        "series: {} with {FEW} objects, {} with {objects}",
        few.series, many.series
    );
    println!(
        "a scrape of {} KiB: p50 {:.2} ms, slowest of {SCRAPES} {:.2} ms",
        many.bytes / 1024,
        many.times[SCRAPES / 2],
        many.times[SCRAPES - 1]
    );
}

struct Scraped {
    series: usize,
    bytes: usize,
    /// In milliseconds, the fastest first.
    times: Vec<f64>,
}

fn scrape(node: &Node) -> Scraped {
    let handle = node.registry().handle();
    let mut text = String::new();
    let mut times: Vec<f64> = (0..SCRAPES)
        .map(|_| {
            let begun = monotonic_nanos();
            text = handle.render();
            seconds(begun) * 1e3
        })
        .collect();
    times.sort_unstable_by(f64::total_cmp);
    Scraped {
        series: text.lines().filter(|line| !line.starts_with('#')).count(),
        bytes: text.len(),
        times,
    }
}

fn start(config: &Config) -> Node {
    Node::start(config, &Classes::built_in()).expect("a node")
}

/// Starts a node, waits until its metrics say how many objects there are, and scrapes it.
fn start_and_scrape(config: &Config, objects: u32) -> Scraped {
    let begun = monotonic_nanos();
    let node = start(config);
    let (_never, pause) = std::sync::mpsc::sync_channel::<()>(1);
    let line = format!("shard_stored_objects{{class=\"Counter\",size=\"under_10mb\"}} {objects}\n");
    while !node.registry().handle().render().contains(&line) {
        // Nobody sends: this only waits.
        let waited = pause.recv_timeout(Duration::from_millis(5));
        waited.expect_err("nobody sends");
    }
    println!(
        "the node knows of {objects} objects {:.2} s after its start",
        seconds(begun)
    );
    let scraped = scrape(&node);
    node.shut_down();
    scraped
}

/// Every object wakes, counts once and sleeps, as in `million`.
fn fill(dir: &Path, objects: std::ops::Range<u32>) {
    let setup = Setup {
        disk: Arc::new(RealDisk::new(dir).expect("it is a node's")),
        data_dir: dir.to_owned(),
        worker: 0,
        log: LogConfig::default(),
        page_bytes: PAGE_BYTES,
        transaction_bytes_max: 128 << 20,
        clock: Arc::new(SystemClock),
        sync_time: Histogram::noop(),
        archive: None,
    };
    let engine = Logged::open(setup, Arc::new(Notify::new())).expect("a log");
    let shared: Rc<dyn Engine> = Rc::new(engine.clone());
    let class: ClassName = "Counter".parse().expect("legal");
    let config = Arc::new(SqlConfig::default());
    for number in objects {
        let name: ObjectName = format!("object-{number}").parse().expect("legal");
        let id = ObjectId::named(&class, Home::Global, &name);
        let identity = Identity {
            id,
            class: class.clone(),
            name: Some(name),
            shard: id.shard(SHARDS),
        };
        let storage = Storage::new(identity, Rc::clone(&shared), Arc::clone(&config));
        storage.begin_segment();
        let sql = "CREATE TABLE counter (id INTEGER PRIMARY KEY, value INTEGER NOT NULL); \
                   INSERT INTO counter VALUES (1, 1)";
        storage.exec(sql, &[], 1 << 20).expect("legal");
        storage.commit().expect("the disk works");
        drop(storage);
        engine.release();
        if number.is_multiple_of(PER_TICK) {
            Engine::tick(&engine);
        }
        while engine.is_full() {
            std::thread::yield_now();
            Engine::tick(&engine);
        }
    }
    drop(shared);
    engine.close().expect("the disk works");
}

fn seconds(begun: u64) -> f64 {
    (monotonic_nanos() - begun) as f64 / 1e9
}
