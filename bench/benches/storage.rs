//! What do reads cost inside an object, where no network and no context switch lies between code and
//! data: one point read, and the 1 + 1,000 queries that one would never send to a database server?

use std::hint::black_box;
use std::rc::Rc;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use protocol::{ClassName, Home, ObjectId, ObjectName, ShardId};
use shard_node::storage::{Identity, PlainFiles, SqlConfig, Storage};

/// Bytes of one result; far above what these queries give.
const RESULT_BYTES: usize = 1 << 20;

fn storage(criterion: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a directory for temporary files");
    let class: ClassName = "Sql".parse().expect("legal");
    let name: ObjectName = "bench".parse().expect("legal");
    let identity = Identity {
        id: ObjectId::named(&class, Home::Global, &name),
        class,
        name: Some(name),
        shard: ShardId(0),
    };
    let engine = Rc::new(PlainFiles::new(dir.path()));
    let storage = Storage::new(identity, engine, Arc::new(SqlConfig::default()));
    let fill = "CREATE TABLE t (id INTEGER PRIMARY KEY, v);
         WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000)
         INSERT INTO t SELECT i, i * i FROM n";
    let exec = |sql: &str, id: i64| {
        let params = [id.into()];
        let params = if sql.contains('?') { &params[..] } else { &[] };
        storage.exec(sql, params, RESULT_BYTES).expect("legal")
    };
    storage.begin_segment();
    exec(fill, 0);
    assert!(storage.commit().expect("the disk works"));
    criterion.bench_function("storage/point_select", |bencher| {
        bencher.iter(|| {
            storage.begin_segment();
            exec("SELECT v FROM t WHERE id = ?", black_box(500))
        });
    });
    criterion.bench_function("storage/1_plus_1000_selects", |bencher| {
        bencher.iter(|| {
            storage.begin_segment();
            exec("SELECT id FROM t", 0);
            for id in 1..=1000 {
                exec("SELECT v FROM t WHERE id = ?", black_box(id));
            }
        });
    });
}

/// What every commit costs that waits for the disk alone: SQLite's own files, one sync each.
fn plain_commit(criterion: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a directory for temporary files");
    let class: ClassName = "Counter".parse().expect("legal");
    let name: ObjectName = "bench".parse().expect("legal");
    let identity = Identity {
        id: ObjectId::named(&class, Home::Global, &name),
        class,
        name: Some(name),
        shard: ShardId(0),
    };
    let engine = Rc::new(PlainFiles::new(dir.path()));
    let storage = Storage::new(identity, engine, Arc::new(SqlConfig::default()));
    let turn = |sql: &str| {
        storage.begin_segment();
        storage.exec(sql, &[], RESULT_BYTES).expect("legal");
        storage.commit().expect("the disk works")
    };
    turn("CREATE TABLE counter (value INTEGER NOT NULL); INSERT INTO counter VALUES (0)");
    let mut group = criterion.benchmark_group("storage");
    group.throughput(Throughput::Elements(1));
    group.bench_function("increment/plain_sync_each", |bencher| {
        bencher.iter(|| turn("UPDATE counter SET value = value + 1"));
    });
    group.finish();
}

criterion_group!(benches, storage, plain_commit);
criterion_main!(benches);
