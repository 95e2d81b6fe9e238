//! A million objects on one worker: how long until they exist, what a page of the catalog costs, and how
//! soon is the worker back after a clean stop, and after its death? `OBJECTS=…` for another number.
#![expect(clippy::print_stdout, reason = "the figures are the result")]

#[path = "parts/objects.rs"]
mod objects;
#[path = "parts/setup.rs"]
mod setup;

use protocol::{Home, ShardId};
use shard_node::catalog::{Order, Query};
use shard_node::clock::monotonic_nanos;
use shard_node::storage::Logged;

use objects::{SHARDS, open, seconds, write};

/// Objects that write once more before the death of the process.
const LAST_WRITES: u32 = 50_000;

fn main() {
    let objects =
        std::env::var("OBJECTS").map_or(1_000_000, |count| count.parse().expect("a number"));
    let dir = tempfile::tempdir().expect("a directory for temporary files");
    std::fs::create_dir_all(dir.path().join("shards")).expect("a directory");
    let engine = open(dir.path());
    let before = resident_mib();
    let begun = monotonic_nanos();
    write(&engine, 0..objects);
    println!("created {objects} objects: {:.1} s", seconds(begun));
    let begun = monotonic_nanos();
    engine.close().expect("the disk works");
    println!(
        "clean stop, with what was not in the files yet: {:.1} s",
        seconds(begun)
    );
    drop(engine);
    let begun = monotonic_nanos();
    let engine = open(dir.path());
    println!(
        "start after a clean stop: {:.3} s; memory {:.0} MiB more than at first",
        seconds(begun),
        resident_mib() - before
    );
    let begun = monotonic_nanos();
    let total: u64 = (0..SHARDS)
        .map(|shard| {
            engine
                .count(Home::Global, ShardId(shard))
                .expect("the disk works")
        })
        .sum();
    assert_eq!(total, u64::from(objects));
    println!("counted all catalogs: {:.3} s", seconds(begun));
    for order in [Order::Name, Order::Bytes, Order::Used] {
        let times: Vec<f64> = (0..5).map(|_| search(&engine, order)).collect();
        println!(
            "a page of 100 of all shards, ordered by {order:?}: {:.1} ms, then {:.1} ms",
            times[0] * 1e3,
            times[1..].iter().copied().fold(f64::MAX, f64::min) * 1e3
        );
    }
    let mut pages = Vec::new();
    for round in 0..200 {
        let shard = ShardId(round % SHARDS);
        let begun = monotonic_nanos();
        let page = engine
            .list(Home::Global, shard, None, 100)
            .expect("the disk works");
        pages.push(seconds(begun) * 1e3);
        assert!(page.len() == 100 || objects < 100_000);
    }
    pages.sort_unstable_by(f64::total_cmp);
    println!(
        "a page of 100 rows: p50 {:.3} ms, p99 {:.3} ms",
        pages[100], pages[198]
    );
    write(&engine, 0..LAST_WRITES.min(objects));
    let live = engine.live_bytes();
    // No flush, no farewell: what a death leaves.
    drop(engine);
    let begun = monotonic_nanos();
    let engine = open(dir.path());
    println!(
        "start after a death, with {:.0} MiB of log: {:.3} s, {} databases recovered",
        live as f64 / 1_048_576.0,
        seconds(begun),
        engine.databases().len()
    );
    let begun = monotonic_nanos();
    engine.close().expect("the disk works");
    println!("clean stop after that: {:.1} s", seconds(begun));
}

/// A page of a listing, as an operator asks for it; its time in seconds.
fn search(engine: &Logged, order: Order) -> f64 {
    let begun = monotonic_nanos();
    let query = Query {
        order,
        descending: order != Order::Name,
        ..Query::default()
    };
    let mut rows = Vec::new();
    for shard in (0..SHARDS).map(ShardId) {
        let found = engine.search(Home::Global, shard, &query);
        rows.extend(found.expect("the disk works"));
    }
    query.merge(&mut rows);
    assert_eq!(rows.len(), 100);
    seconds(begun)
}

fn resident_mib() -> f64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages = statm
        .split(' ')
        .nth(1)
        .and_then(|pages| pages.parse::<f64>().ok());
    pages.expect("a number") * 4096.0 / 1_048_576.0
}
