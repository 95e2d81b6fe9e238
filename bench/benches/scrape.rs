//! What does a scrape of `/metrics` cost on a node with a million objects, and how many series is it? And how
//! long until the node knows what it has? `OBJECTS=…` for another number.
#![expect(clippy::print_stdout, reason = "the figures are the result")]

#[path = "parts/objects.rs"]
mod objects;
#[path = "parts/setup.rs"]
mod setup;

use std::path::Path;
use std::time::Duration;

use shard_node::classes::Classes;
use shard_node::clock::monotonic_nanos;
use shard_node::config::Config;
use shard_node::node::Node;

use objects::{open, seconds, write};

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

fn fill(dir: &Path, objects: std::ops::Range<u32>) {
    let engine = open(dir);
    write(&engine, objects);
    engine.close().expect("the disk works");
}
