//! What the engine of a worker is opened with, in several benches.

use std::path::Path;
use std::sync::Arc;

use metrics::Histogram;
use shard_node::clock::SystemClock;
use shard_node::disk::RealDisk;
use shard_node::storage::LogConfig;
use shard_node::storage::logged::{PAGE_BYTES, Setup};

/// For a directory that a node made, or a new one.
pub(crate) fn setup(dir: &Path) -> Setup {
    Setup {
        disk: Arc::new(RealDisk::new(dir).expect("it is there")),
        data_dir: dir.to_owned(),
        worker: 0,
        log: LogConfig::default(),
        page_bytes: PAGE_BYTES,
        transaction_bytes_max: 128 << 20,
        clock: Arc::new(SystemClock),
        sync_time: Histogram::noop(),
        archive: None,
    }
}
