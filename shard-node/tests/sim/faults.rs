//! Operations of the disk that fail while the node goes on, and bits that flip.

use std::io;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use shard_node::storage::{Engine, StorageError};

use crate::crashes::{check_some_past, random_step};
use crate::disk::{Crash, Fault, SimDisk};
use crate::node::{Model, Node, OBJECTS, ROOT};

const CREATE: &str = "CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, v BLOB)";
const INSERT: &str = "INSERT INTO t (v) VALUES (zeroblob(40))";

fn node() -> Node {
    Node::start(SimDisk::new(ROOT.as_ref()), Model::default()).unwrap()
}

/// Whatever operation of the log fails: the commit that waited is not acknowledged, the object starts
/// again without it, the node refuses writes until the log works, and then goes on.
#[test]
fn a_failed_sync_is_no_acknowledgement() {
    for kind in [io::ErrorKind::Other, io::ErrorKind::StorageFull] {
        for operation in 0..3 {
            let context = format!("{kind:?} at operation {operation}");
            let mut node = node();
            node.commit(0, &[CREATE, INSERT]).unwrap();
            node.settle();
            assert_eq!(node.model.acknowledged, 1, "{context}");
            node.commit(0, &[INSERT]).unwrap();
            node.commit(1, &[CREATE, INSERT]).unwrap();
            // The write of the group, its sync, and the creation of the next segment.
            let now = node.disk.operations();
            let fail: Vec<Fault> = (0..=operation)
                .map(|next| Fault::Fail(now + next, kind))
                .collect();
            node.disk.set_faults(fail);
            node.engine.release();
            assert!(!node.engine.step(), "{context}");
            // Before the engine has even heard of it, nothing new counts.
            let refused = node.commit(2, &[CREATE]).unwrap_err();
            match kind {
                io::ErrorKind::StorageFull => {
                    assert!(
                        matches!(refused, StorageError::DiskFull(_)),
                        "{context}: {refused}"
                    );
                }
                _ => assert!(
                    matches!(refused, StorageError::LogFailed(_)),
                    "{context}: {refused}"
                ),
            }
            node.advance();
            assert!(node.failed, "{context}: clients were told");
            assert_eq!(node.model.acknowledged, 1, "{context}");
            // What was durable can be read at once, what was not is gone.
            assert_eq!(node.read(0).unwrap().len(), 1, "{context}");
            assert_eq!(node.read(1).unwrap().len(), 0, "{context}");
            node.recover();
            node.commit(1, &[CREATE, INSERT]).unwrap();
            node.settle();
            assert_eq!(node.model.acknowledged, 2, "{context}");
            node.sleep_all();
            node.check_catalog(&context);
            node.stop(&context);
        }
    }
}

/// A log that cannot be written does not keep the objects from being read.
#[test]
fn reads_go_on_while_the_disk_is_full() {
    let mut node = node();
    node.commit(0, &[CREATE, INSERT]).unwrap();
    node.settle();
    let now = node.disk.operations();
    node.disk.set_faults(
        (now..now + 60)
            .map(|at| Fault::Fail(at, io::ErrorKind::StorageFull))
            .collect(),
    );
    node.commit(0, &[INSERT]).unwrap();
    for _ in 0..10 {
        node.step();
        node.tick(1);
        assert_eq!(node.read(0).map(|rows| rows.len()).unwrap_or(1), 1);
        assert!(node.commit(1, &[CREATE]).is_err(), "refused at once");
    }
    assert_eq!(node.read(0).unwrap().len(), 1);
    node.recover();
    node.commit(0, &[INSERT]).unwrap();
    node.settle();
    node.stop("after the disk was full");
}

/// Files that cannot be written keep their pages in the log, and are written when they can be.
#[test]
fn a_failed_checkpoint_is_made_good() {
    let mut node = node();
    for object in 0..OBJECTS {
        node.commit(object, &[CREATE, INSERT]).unwrap();
    }
    node.settle();
    node.sleep_all();
    for failures in 1..6 {
        node.disk.set_faults(vec![Fault::FailFiles(failures)]);
        node.tick(1);
        node.settle();
        node.disk.set_faults(Vec::new());
        assert!(!node.failed, "the log is not concerned");
        node.tick(25);
        node.settle();
        node.commit(0, &[INSERT]).unwrap();
        node.sleep_all();
    }
    node.settle();
    let context = "after failed checkpoints";
    node.check_catalog(context);
    let (disk, model) = node.crash(Crash::LoseAll);
    let mut node = Node::start(disk, model).unwrap();
    node.check(context);
    node.stop(context);
}

/// Random operations fail, alone or in bouts, in long runs that also crash.
#[test]
fn random_faults_lose_and_split_nothing() {
    crate::for_seeds(24, random_run);
}

fn random_run(seed: u64) {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut disk = SimDisk::new(ROOT.as_ref());
    let mut model = Model::default();
    for round in 0..6 {
        let context = format!("seed {seed}, round {round}");
        let mut node =
            Node::start(disk, model).unwrap_or_else(|error| panic!("{context}: {error:?}"));
        node.check(&context);
        check_some_past(&mut node, &mut random, &context);
        for _ in 0..random.random_range(1..6) {
            let from = node.disk.operations() + random.random_range(0..30);
            let kind = if random.random() {
                io::ErrorKind::Other
            } else {
                io::ErrorKind::StorageFull
            };
            let bout = random.random_range(1..6);
            node.disk.set_faults(
                (from..from + bout)
                    .map(|at| Fault::Fail(at, kind))
                    .collect(),
            );
            for _ in 0..random.random_range(5..40) {
                random_step(&mut node, &mut random);
                if node.failed {
                    break;
                }
            }
            node.recover();
        }
        if random.random() {
            node.check_catalog(&context);
            (disk, model) = node.stop(&context);
            continue;
        }
        let crash = match random.random_range(0..3) {
            0 => Crash::Process,
            1 => Crash::LoseAll,
            _ => Crash::Torn(random.random()),
        };
        (disk, model) = node.crash(crash);
    }
    let context = format!("seed {seed}, the end");
    let mut node = Node::start(disk, model).unwrap_or_else(|error| panic!("{context}: {error:?}"));
    node.check(&context);
    node.check_catalog(&context);
}

/// A log of a node that died, with everything acknowledged. Every bit of it counts: a flip is an error,
/// or, in what nothing depends on, changes nothing. It is never applied.
#[test]
fn no_flipped_bit_of_a_log_is_ever_applied() {
    let mut node = node();
    node.commit(0, &[CREATE, INSERT]).unwrap();
    node.settle();
    node.commit(1, &[CREATE, INSERT, "UPDATE t SET v = randomblob(41)"])
        .unwrap();
    node.commit(0, &["UPDATE t SET v = zeroblob(39)"]).unwrap();
    // With the writer's mark that all of it is durable.
    node.settle();
    node.settle();
    assert_eq!(node.model.acknowledged, 3);
    let (disk, model) = node.crash(Crash::KeepAll);
    let (path, bytes) = disk
        .files()
        .into_iter()
        .find(|(path, _)| path.extension().is_some_and(|is| is == "log"))
        .unwrap();
    let used = end_of_mark(&bytes);
    assert!(used > 500, "{used}");
    let mut refused = 0;
    for at in 0..used {
        for bits in [1 << (at % 8), 0xff] {
            let damaged = disk.crash(Crash::KeepAll);
            damaged.flip(&path, at, bits);
            match Node::start(damaged, model.clone()) {
                Err(error) => {
                    let message = std::error::Error::source(&error)
                        .map_or_else(|| error.to_string(), |source| source.to_string());
                    assert!(error.to_string().contains(".log"), "{error}: {message}");
                    refused += 1;
                }
                // Only the mark itself may be lost without a word: nothing comes after it.
                Ok(mut node) => {
                    assert!(at + 28 >= used, "byte {at} of {used} was not missed");
                    node.check(&format!("flipped byte {at}"));
                    assert_eq!(node.model.acknowledged, 3);
                }
            }
        }
    }
    assert!(refused >= 2 * (used - 28), "{refused} of {used} bytes");
}

/// Where the last group record ends, which is all of the writer's mark.
fn end_of_mark(segment: &[u8]) -> usize {
    let magic = b"DORMGRP1";
    let at = segment
        .windows(magic.len())
        .rposition(|window| window == magic);
    at.unwrap() + 16
}

/// Any byte behind the end, as a torn write may leave it, is no reason to refuse the log.
#[test]
fn a_torn_tail_is_no_damage() {
    let mut node = node();
    node.commit(0, &[CREATE, INSERT]).unwrap();
    node.settle();
    node.settle();
    let (disk, model) = node.crash(Crash::KeepAll);
    let (path, bytes) = disk
        .files()
        .into_iter()
        .find(|(path, _)| path.extension().is_some_and(|is| is == "log"))
        .unwrap();
    let used = end_of_mark(&bytes);
    for at in used..used + 200 {
        let torn = disk.crash(Crash::KeepAll);
        torn.flip(&path, at, 0x55);
        let context = format!("torn at {at}");
        let mut node =
            Node::start(torn, model.clone()).unwrap_or_else(|error| panic!("{context}: {error:?}"));
        node.check(&context);
        node.commit(0, &[INSERT]).unwrap();
        node.settle();
        let (disk, model) = node.crash(Crash::LoseAll);
        let mut node =
            Node::start(disk, model).unwrap_or_else(|error| panic!("{context}: {error:?}"));
        node.check(&context);
        assert_eq!(node.model.commits.len(), 2);
    }
}

/// A log that another version wrote is refused, and says so.
#[test]
fn a_log_of_another_version_is_refused() {
    let mut node = node();
    node.commit(0, &[CREATE]).unwrap();
    node.settle();
    let (disk, model) = node.crash(Crash::KeepAll);
    let (path, _) = disk
        .files()
        .into_iter()
        .find(|(path, _)| path.extension().is_some_and(|is| is == "log"))
        .unwrap();
    disk.flip(&path, 8, 0xf);
    let error = Node::start(disk, model).err().unwrap().to_string();
    assert!(
        error.contains("has version 13 of the log's format"),
        "{error}"
    );
}
