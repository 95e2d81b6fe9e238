//! Very many objects of one worker, in several benches.

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use protocol::{ClassName, Home, ObjectId, ObjectName};
use shard_node::clock::monotonic_nanos;
use shard_node::storage::{Engine, Identity, Logged, SqlConfig, Storage};
use tokio::sync::Notify;

use crate::setup::setup;

pub(crate) const SHARDS: u16 = 128;

const RESULT_BYTES: usize = 1 << 20;

/// Objects between two rounds of what a worker does ten times a second.
const PER_TICK: u32 = 500;

pub(crate) fn open(dir: &Path) -> Logged {
    Logged::open(setup(dir), Arc::new(Notify::new())).expect("a log")
}

/// Every object wakes, counts once and sleeps.
pub(crate) fn write(engine: &Logged, objects: std::ops::Range<u32>) {
    let class: ClassName = "Counter".parse().expect("legal");
    let config = Arc::new(SqlConfig::default());
    let shared: Rc<dyn Engine> = Rc::new(engine.clone());
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
        let sql =
            "CREATE TABLE IF NOT EXISTS counter (id INTEGER PRIMARY KEY, value INTEGER NOT NULL);
            INSERT INTO counter VALUES (1, 1) ON CONFLICT DO UPDATE SET value = value + 1";
        storage.exec(sql, &[], RESULT_BYTES).expect("legal");
        storage.commit().expect("the disk works");
        drop(storage);
        engine.release();
        if number.is_multiple_of(PER_TICK) {
            Engine::tick(engine);
        }
        // As a worker does: no turn while the disk is behind.
        while engine.is_full() {
            std::thread::yield_now();
            Engine::tick(engine);
        }
    }
}

/// Since `begun`.
pub(crate) fn seconds(begun: u64) -> f64 {
    (monotonic_nanos() - begun) as f64 / 1e9
}
