//! How large should the pages of an object's database be? Memory, log, time and size on disk for each,
//! in one run. Not criterion: half of the answers are bytes.
#![expect(clippy::print_stdout, reason = "the table is the result")]

#[path = "parts/setup.rs"]
mod setup;

use std::hint::black_box;
use std::process::Command;
use std::rc::Rc;
use std::sync::Arc;

use protocol::{ClassName, Home, ObjectId, ObjectName, ShardId};
use shard_node::clock::monotonic_nanos;
use shard_node::storage::logged::Setup;
use shard_node::storage::{Engine, Identity, Logged, SqlConfig, SqlValue, Storage};

const OBJECTS: u32 = 2000;
const RESULT_BYTES: usize = 64 << 20;

/// Each size is measured in a process of its own, so that none finds memory that another has freed.
const SIZE: &str = "PAGE_BYTES";

fn main() {
    if let Ok(page_bytes) = std::env::var(SIZE) {
        measure(page_bytes.parse().expect("a number"));
        return;
    }
    println!(
        "{:>6} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "page",
        "KiB/awake",
        "create",
        "wake",
        "incr",
        "log B",
        "insert",
        "point",
        "scan",
        "1MB put",
        "1MB get"
    );
    println!(
        "{:>6} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "bytes", "", "µs p50", "µs p50", "µs", "/commit", "µs/row", "µs", "ms/100k", "ms", "ms"
    );
    for page_bytes in [512_u32, 1024, 2048, 4096, 8192] {
        let me = std::env::current_exe().expect("Linux");
        let status = Command::new(me).env(SIZE, page_bytes.to_string()).status();
        assert!(status.is_ok_and(|status| status.success()));
    }
}

fn measure(page_bytes: u32) {
    let dir = tempfile::tempdir().expect("a directory for temporary files");
    std::fs::create_dir_all(dir.path().join("shards")).expect("a directory");
    let open_engine = || {
        let setup = Setup {
            page_bytes,
            ..setup::setup(dir.path())
        };
        Logged::open(setup, Arc::default()).expect("a log")
    };
    let engine = open_engine();
    let before = resident_bytes();
    let mut create = Vec::new();
    let mut awake: Vec<Storage> = Vec::new();
    for number in 0..OBJECTS {
        let begun = monotonic_nanos();
        let storage = open(&engine, number);
        turn(
            &storage,
            "CREATE TABLE counter (value INTEGER NOT NULL); INSERT INTO counter VALUES (1)",
            &[],
        );
        create.push(monotonic_nanos() - begun);
        turn(&storage, "SELECT value FROM counter", &[]);
        awake.push(storage);
    }
    let per_object = (resident_bytes() - before) as f64 / f64::from(OBJECTS) / 1024.0;
    drop(awake);
    engine.close().expect("the disk works");
    let engine = open_engine();
    let mut wake = Vec::new();
    for number in 0..OBJECTS {
        let begun = monotonic_nanos();
        let storage = open(&engine, number);
        turn(&storage, "SELECT value FROM counter", &[]);
        wake.push(monotonic_nanos() - begun);
    }
    let storage = open(&engine, 0);
    let log = |engine: &Logged| engine.live_bytes();
    let bytes = log(&engine);
    let incr = per(100_000, |_| {
        turn(&storage, "UPDATE counter SET value = value + 1", &[]);
        engine.release();
    });
    let log_bytes = (log(&engine) - bytes) as f64 / 100_000.0;
    turn(
        &storage,
        "CREATE TABLE t (id INTEGER PRIMARY KEY, k TEXT, v BLOB)",
        &[],
    );
    turn(&storage, "CREATE INDEX t_k ON t (k)", &[]);
    storage.begin_segment();
    let insert = per(100_000, |id| {
        let params = [
            id.into(),
            format!("key-{}", id * 7919 % 100_000).into(),
            SqlValue::Blob(vec![7; 100]),
        ];
        storage
            .exec("INSERT INTO t VALUES (?, ?, ?)", &params, RESULT_BYTES)
            .expect("legal");
    });
    storage.commit().expect("the disk works");
    let point = per(100_000, |id| {
        let key = format!("key-{}", id * 104_729 % 100_000);
        black_box(turn(&storage, "SELECT v FROM t WHERE k = ?", &[key.into()]));
    });
    let scan = per(5, |_| {
        turn(&storage, "SELECT sum(length(v)) FROM t", &[]);
    });
    turn(&storage, "CREATE TABLE b (v BLOB)", &[]);
    let put = per(10, |_| {
        turn(
            &storage,
            "INSERT INTO b VALUES (?)",
            &[SqlValue::Blob(vec![9; 1 << 20])],
        );
    });
    let get = per(10, |row| {
        black_box(turn(
            &storage,
            "SELECT v FROM b WHERE rowid = ?",
            &[(row + 1).into()],
        ));
    });
    drop(storage);
    println!(
        "{page_bytes:>6} {per_object:>9.1} {:>9.0} {:>9.0} {incr:>9.2} {log_bytes:>9.0} {insert:>9.2} {point:>9.2} {:>9.2} {:>9.2} {:>9.2}",
        median(create),
        median(wake),
        scan / 1000.0,
        put / 1000.0,
        get / 1000.0,
    );
    engine.close().expect("the disk works");
}

fn open(engine: &Logged, number: u32) -> Storage {
    let class: ClassName = "Counter".parse().expect("legal");
    let name: ObjectName = format!("object-{number}").parse().expect("legal");
    let identity = Identity {
        id: ObjectId::named(&class, Home::Global, &name),
        class,
        name: Some(name),
        shard: ShardId(0),
    };
    Storage::new(
        identity,
        Rc::new(engine.clone()),
        Arc::new(SqlConfig::default()),
    )
}

fn turn(storage: &Storage, sql: &str, params: &[SqlValue]) -> usize {
    storage.begin_segment();
    let rows = storage.exec(sql, params, RESULT_BYTES).expect("legal");
    storage.commit().expect("the disk works");
    rows.rows.len()
}

/// Microseconds of one of `count` calls.
fn per(count: i64, mut f: impl FnMut(i64)) -> f64 {
    let begun = monotonic_nanos();
    (0..count).for_each(&mut f);
    (monotonic_nanos() - begun) as f64 / 1000.0 / count as f64
}

/// Microseconds.
fn median(mut nanos: Vec<u64>) -> f64 {
    nanos.sort_unstable();
    nanos[nanos.len() / 2] as f64 / 1000.0
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages = statm
        .split(' ')
        .nth(1)
        .and_then(|pages| pages.parse::<u64>().ok());
    pages.expect("a number") * 4096
}
