//! The world stops at every single operation of a scripted run, and at random ones of long runs.

use std::fmt::Write;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use shard_node::storage::StorageError;

use crate::disk::{Crash, Fault, SimDisk};
use crate::node::{Model, Node, OBJECTS, ROOT, database_files, snapshot_dump};

const CREATE: &str = "CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, v BLOB)";

/// The script: everything that writes, syncs, creates or removes files happens in it.
fn script(node: &mut Node) {
    let create = "CREATE TABLE t (id INTEGER PRIMARY KEY, v BLOB)";
    let insert = |id: i64, bytes: usize| {
        format!("INSERT OR REPLACE INTO t VALUES ({id}, randomblob({bytes}))")
    };
    let steps: &[&dyn Fn(&mut Node)] = &[
        &|node| run(node, 0, &[create, &insert(1, 10)]),
        &|node| run(node, 1, &[&format!("{create}; {}", insert(1, 3000))]),
        &|node| node.step(),
        &|node| {
            run(
                node,
                0,
                &[
                    &insert(2, 100),
                    "INSERT INTO nonsense VALUES (1)",
                    &insert(3, 5),
                ],
            )
        },
        &|node| node.settle(),
        &|node| node.tick(10),
        &|node| node.settle(),
        &|node| run(node, 0, &["UPDATE t SET v = zeroblob(20) WHERE id = 1"]),
        &|node| node.sleep(0),
        &|node| node.sleep(1),
        &|node| node.tick(1),
        &|node| run(node, 0, &["UPDATE t SET v = zeroblob(21) WHERE id = 1"]),
        &|node| node.settle(),
        &|node| node.tick(1),
        &|node| run(node, 2, &[create, &insert(7, 6000)]),
        &|node| run(node, 1, &[&insert(2, 4000), &insert(3, 2000)]),
        &|node| node.settle(),
        &|node| run(node, 1, &["DELETE FROM t WHERE id <= 2"]),
        &|node| run(node, 2, &["UPDATE t SET v = randomblob(5000)"]),
        &|node| node.settle(),
        &|node| node.tick(10),
        &|node| node.settle(),
        &|node| node.tick(1),
        &|node| run(node, 3, &[create, &insert(1, 9000)]),
        &|node| node.step(),
        &|node| run(node, 3, &[&insert(1, 8000), &insert(2, 1)]),
        &|node| node.settle(),
        &|node| node.sleep_all(),
        &|node| node.tick(1),
        &|node| node.settle(),
        &|node| node.tick(1),
        &|node| node.settle(),
        &|node| run(node, 0, &[&insert(9, 9)]),
        &|node| node.settle(),
        &|node| delete(node, 0),
        &|node| node.settle(),
        &|node| node.tick(1),
        &|node| node.settle(),
        &|node| replace(node, 1, 4096),
        &|node| delete(node, 3),
        &|node| run(node, 3, &[create, &insert(5, 5)]),
        &|node| node.settle(),
        &|node| node.tick(10),
        &|node| node.settle(),
        &|node| replace(node, 0, 1024),
        &|node| run(node, 1, &[&insert(9, 5000)]),
        &|node| node.settle(),
    ];
    for step in steps {
        step(node);
        if node.failed {
            return;
        }
    }
}

/// A turn. If the disk does not work it may fail, and then the run is over.
fn run(node: &mut Node, object: usize, turns: &[&str]) {
    if let Err(error) = node.commit(object, turns) {
        check_is_of_the_disk(&error);
        node.failed = true;
    }
}

fn delete(node: &mut Node, object: usize) {
    if let Err(error) = node.delete(object) {
        check_is_of_the_disk(&error);
        node.failed = true;
    }
}

fn replace(node: &mut Node, object: usize, page_bytes: u32) {
    let rows = vec![(1, vec![7; 3000]), (2, vec![8; 10]), (3, vec![9; 1500])];
    if let Err(error) = node.replace(object, &rows, page_bytes) {
        check_is_of_the_disk(&error);
        node.failed = true;
    }
}

fn check_is_of_the_disk(error: &StorageError) {
    assert!(
        matches!(
            error,
            StorageError::Broken { .. } | StorageError::DiskFull(_) | StorageError::LogFailed(_)
        ),
        "{error}"
    );
}

fn start(disk: SimDisk, model: Model, context: &str) -> Node {
    Node::start(disk, model).unwrap_or_else(|error| panic!("{context}: {error:?}"))
}

/// Starts on what a crash left, checks it, works on, and stops cleanly.
fn check_survivor(disk: SimDisk, model: Model, context: &str) {
    let mut node = start(disk, model, context);
    node.check(context);
    node.check_catalog(context);
    for object in 0..OBJECTS {
        node.commit(
            object,
            &[CREATE, "INSERT INTO t (v) VALUES (randomblob(50))"],
        )
        .unwrap_or_else(|error| panic!("{context}: {error}"));
    }
    let (disk, model) = node.stop(context);
    assert_eq!(database_files(&disk).len(), OBJECTS, "{context}");
    let mut node = start(disk, model, context);
    node.check(context);
    node.check_catalog(context);
}

fn operations_of_the_script() -> u64 {
    let disk = SimDisk::new(ROOT.as_ref());
    let mut node = start(disk.clone(), Model::default(), "the script alone");
    script(&mut node);
    assert!(!node.failed, "the script alone fails nowhere");
    assert!(node.model.acknowledged >= 10);
    let operations = disk.operations();
    let (_, model) = node.stop("the script alone");
    assert_eq!(model.acknowledged, model.commits.len());
    operations
}

#[test]
fn no_crash_at_any_operation_loses_or_splits_a_commit() {
    let operations = operations_of_the_script();
    assert!(operations > 80, "{operations} are too few to mean anything");
    for stop in 0..operations {
        for crash in [
            Crash::Process,
            Crash::LoseAll,
            Crash::KeepAll,
            Crash::Torn(stop),
            Crash::Torn(stop + 1_000_000),
        ] {
            let context = format!("stopped at operation {stop} of {operations}, {crash:?}");
            let disk = SimDisk::new(ROOT.as_ref());
            disk.set_faults(vec![Fault::Stop(stop)]);
            let (disk, model) = match Node::start(disk.clone(), Model::default()) {
                Ok(mut node) => {
                    script(&mut node);
                    node.crash(crash)
                }
                Err(_) => (disk.crash(crash), Model::default()),
            };
            check_survivor(disk, model, &context);
        }
    }
}

/// Recovery is interrupted at every operation of its own, and by a loss of power after a mere death of the
/// process, which left data in the kernel that no sync has confirmed.
#[test]
fn no_crash_during_recovery_loses_or_splits_a_commit() {
    let operations = operations_of_the_script();
    for stop in (0..operations).step_by(7) {
        for second in 0..12 {
            for (first, then) in [
                (Crash::Process, Crash::LoseAll),
                (Crash::Process, Crash::Torn(stop * 31 + second)),
                (Crash::Torn(stop), Crash::Torn(second)),
            ] {
                let context =
                    format!("stopped at {stop}, {first:?}, recovery at {second}, {then:?}");
                let disk = SimDisk::new(ROOT.as_ref());
                disk.set_faults(vec![Fault::Stop(stop)]);
                let Ok(mut node) = Node::start(disk.clone(), Model::default()) else {
                    continue;
                };
                script(&mut node);
                let (disk, model) = node.crash(first);
                disk.set_faults(vec![Fault::Stop(second)]);
                let (disk, model) = match Node::start(disk.clone(), model.clone()) {
                    Ok(mut node) => {
                        // What a client can read now is promised.
                        node.check(&context);
                        run(
                            &mut node,
                            0,
                            &[CREATE, "INSERT INTO t (v) VALUES (randomblob(30))"],
                        );
                        node.settle();
                        node.crash(then)
                    }
                    Err(_) => (disk.crash(then), model),
                };
                check_survivor(disk, model, &context);
            }
        }
    }
}

/// A file that becomes the database of an object is there whole, or not at all, wherever the world stops.
#[test]
fn a_file_is_adopted_whole_or_not_at_all() {
    let rows = vec![(1, vec![7; 3000]), (2, vec![8; 10])];
    let create = "CREATE TABLE t (id INTEGER PRIMARY KEY, v BLOB)";
    let mut finished = false;
    for stop in 0.. {
        for crash in [Crash::Process, Crash::LoseAll, Crash::Torn(stop)] {
            let context = format!("stopped after {stop} operations, {crash:?}");
            let mut node = start(SimDisk::new(ROOT.as_ref()), Model::default(), &context);
            run(&mut node, 2, &[create, "INSERT INTO t VALUES (9, x'09')"]);
            node.settle();
            let before = node.model.acknowledged;
            let now = node.disk.operations();
            node.disk.set_faults(vec![Fault::Stop(now + stop)]);
            let adopted = node.adopt(2, &rows);
            node.settle();
            let acknowledged = node.model.acknowledged > before + 1;
            finished = acknowledged;
            drop(adopted);
            let deleted = node.model.acknowledged > before;
            let (disk, mut model) = node.crash(crash);
            model.commits.truncate(model.acknowledged);
            let mut node = start(disk, model, &context);
            let found = node.read(2).unwrap();
            if acknowledged {
                assert_eq!(found, rows, "{context}");
                node.check_catalog(&context);
            } else if deleted {
                assert!(found == rows || found.is_empty(), "{context}: {found:?}");
            } else {
                let before = vec![(9, vec![9])];
                assert!(found == before || found.is_empty(), "{context}: {found:?}");
            }
            // Whatever is left of it is in nobody's way.
            node.adopt(2, &rows).unwrap();
            node.settle();
            assert_eq!(node.read(2).unwrap(), rows, "{context}");
            node.sleep_all();
            node.stop(&context);
        }
        if finished {
            return;
        }
    }
}

/// Databases that come from files, are copied to the archive and come back from it, in any order, through
/// clean stops and deaths of the process.
#[test]
fn what_was_adopted_can_be_seen_as_it_was() {
    crate::for_seeds(12, |seed| {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut disk = SimDisk::new(ROOT.as_ref());
        let mut model = Model::default();
        for round in 0..6 {
            let context = format!("seed {seed}, round {round}");
            let mut node = start(disk, model, &context);
            node.check(&context);
            check_some_past(&mut node, &mut random, &context);
            for _ in 0..random.random_range(5..30) {
                if random.random_ratio(1, 5) {
                    let object = random.random_range(0..OBJECTS);
                    let bytes = random.random_range(0..20_000);
                    node.settle();
                    node.adopt(object, &vec![(1, vec![random.random(); bytes])])
                        .unwrap();
                    if random.random() {
                        let last = node.model.commits.len() - 1;
                        node.model.copied_later.insert(last);
                        node.settle();
                        node.sleep_all();
                        node.tick(30);
                        node.settle();
                    }
                    node.keep_large();
                } else {
                    random_step(&mut node, &mut random);
                }
                assert!(!node.failed, "{context}");
            }
            check_some_past(&mut node, &mut random, &context);
            if random.random() {
                (disk, model) = node.stop(&context);
            } else {
                node.settle();
                (disk, model) = node.crash(Crash::Process);
            }
        }
        check_survivor(disk, model, &format!("seed {seed}, the end"));
    });
}

/// Long random runs with many crashes each.
#[test]
fn random_runs_lose_and_split_nothing() {
    crate::for_seeds(24, random_run);
}

fn random_run(seed: u64) {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut disk = SimDisk::new(ROOT.as_ref());
    let mut model = Model::default();
    for round in 0..12 {
        let context = format!("seed {seed}, round {round}");
        let mut node = start(disk, model, &context);
        node.check(&context);
        if random.random_ratio(1, 3) {
            node.check_catalog(&context);
        }
        check_some_past(&mut node, &mut random, &context);
        let stop = node.disk.operations() + random.random_range(0..120);
        node.disk.set_faults(vec![Fault::Stop(stop)]);
        for _ in 0..random.random_range(5..60) {
            random_step(&mut node, &mut random);
            if node.failed {
                break;
            }
        }
        if !node.failed && !node.disk.has_stopped() && random.random_ratio(1, 4) {
            node.disk.set_faults(Vec::new());
            (disk, model) = node.stop(&context);
            continue;
        }
        let crash = match random.random_range(0..4) {
            0 => Crash::Process,
            1 => Crash::LoseAll,
            2 => Crash::KeepAll,
            _ => Crash::Torn(random.random()),
        };
        (disk, model) = node.crash(crash);
    }
    check_survivor(disk, model, &format!("seed {seed}, the end"));
}

pub(crate) fn check_some_past(node: &mut Node, random: &mut SmallRng, context: &str) {
    let total = node.model.commits.len();
    if total > 0 {
        let commits: Vec<usize> = (0..4).map(|_| random.random_range(0..total)).collect();
        node.check_past(context, &commits);
    }
}

pub(crate) fn random_step(node: &mut Node, random: &mut SmallRng) {
    let object = random.random_range(0..OBJECTS);
    match random.random_range(0..14) {
        0..5 => {
            let mut turns = Vec::new();
            for _ in 0..random.random_range(1..4) {
                turns.push(random_turn(random));
            }
            let turns: Vec<&str> = turns.iter().map(String::as_str).collect();
            run(node, object, &turns);
        }
        5 => node.step(),
        6 | 7 => node.settle(),
        8 => node.sleep(object),
        9 => node.tick(1),
        10 => node.tick(10),
        11 => match random.random_range(0..3) {
            0 => delete(node, object),
            1 => node.keep_large(),
            _ => replace(node, object, 512 << random.random_range(0..5)),
        },
        12 => {
            // Read later, after whatever happens next.
            let Ok(dump) = node.read(object) else { return };
            let snapshot = node.snapshot(object);
            for _ in 0..random.random_range(0..4) {
                if node.failed {
                    return;
                }
                random_step(node, random);
            }
            if let Some(found) = snapshot.as_ref().and_then(snapshot_dump) {
                assert_eq!(found, dump, "a snapshot changed");
            }
        }
        _ => {
            if let Err(error) = node.read(object) {
                check_is_of_the_disk(&error);
                node.failed = true;
            }
        }
    }
}

fn random_turn(random: &mut SmallRng) -> String {
    let mut sql = "CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, v BLOB);".to_owned();
    let id = random.random_range(0..30);
    let bytes = match random.random_range(0..4) {
        0 => random.random_range(0..8000),
        _ => random.random_range(0..60),
    };
    match random.random_range(0..8) {
        0 => write!(sql, "DELETE FROM t WHERE id % 3 = {}", id % 3).unwrap(),
        1 => write!(sql, "UPDATE t SET v = randomblob({bytes}) WHERE id = {id}").unwrap(),
        2 => write!(sql, "INSERT OR REPLACE INTO t VALUES ({id}, zeroblob({bytes})); INSERT INTO nonsense VALUES (1)").unwrap(),
        3 => sql = "DROP TABLE IF EXISTS t".to_owned(),
        _ => write!(sql, "INSERT OR REPLACE INTO t VALUES ({id}, randomblob({bytes}))").unwrap(),
    }
    sql
}
