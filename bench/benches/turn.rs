//! What does one turn of an object cost in process: mailbox, turn loop, storage, output gate, reply?
//! The engine with its commit log, and SQLite's own files with `synchronous=FULL` for comparison.

#[path = "parts/setup.rs"]
mod setup;

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ops::metrics::Registry;
use protocol::{Home, ObjectId, ShardId};
use shard_node::alarms::AlarmsConfig;
use shard_node::class::{Args, Class};
use shard_node::classes::Classes;
use shard_node::clock::SystemClock;
use shard_node::config::{MailboxConfig, ObjectsConfig};
use shard_node::host::{Address, Host, HostConfig};
use shard_node::metrics::Metrics;
use shard_node::object::mailbox::Event;
use shard_node::storage::{Engine, Logged, PlainFiles};
use tokio::runtime::Runtime;
use tokio::sync::Notify;
use tokio::task::LocalSet;

use setup::setup;

/// Rounds of calls between two ticks.
const CALLS_PER_TICK: u32 = 100;

/// A host on a directory of its own, its turn loop running.
struct Fixture {
    host: Rc<Host>,
    logged: Option<Logged>,
    local: LocalSet,
    runtime: Runtime,
    addresses: Vec<Address>,
    next: Cell<usize>,
    calls: Cell<u32>,
    _dir: tempfile::TempDir,
}

impl Fixture {
    fn plain(objects: usize) -> Self {
        let dir = tempfile::tempdir().expect("a directory for temporary files");
        let engine = Rc::new(PlainFiles::new(dir.path()));
        Self::new(dir, engine, None, Arc::default(), objects)
    }

    fn logged(objects: usize) -> Self {
        let dir = tempfile::tempdir().expect("a directory for temporary files");
        let progress = Arc::new(Notify::new());
        let engine = Logged::open(setup(dir.path()), Arc::clone(&progress)).expect("a new log");
        let logged = Some(engine.clone());
        Self::new(dir, Rc::new(engine), logged, progress, objects)
    }

    fn new(
        dir: tempfile::TempDir,
        engine: Rc<dyn Engine>,
        logged: Option<Logged>,
        progress: Arc<Notify>,
        objects: usize,
    ) -> Self {
        let config = HostConfig {
            mailbox: MailboxConfig::default(),
            objects: ObjectsConfig::default(),
            alarms: AlarmsConfig::default(),
            expiry: Arc::default(),
            sql: Arc::default(),
        };
        let metrics = Rc::new(Metrics::new(Arc::new(Registry::default()), 0));
        let host = Host::new(config, engine, Arc::new(SystemClock), metrics);
        let local = LocalSet::new();
        drop(local.spawn_local(Rc::clone(&host).run()));
        drop(local.spawn_local(Rc::clone(&host).follow_log(progress)));
        let counter: Arc<dyn Class> = Arc::clone(
            Classes::built_in()
                .iter()
                .next()
                .expect("Counter comes first"),
        );
        let address = |number: usize| {
            let name = format!("c{number}").parse().expect("legal");
            Address {
                id: ObjectId::named(counter.name(), Home::Global, &name),
                class: Arc::clone(&counter),
                name: Some(name),
                shard: ShardId(0),
            }
        };
        let fixture = Self {
            host,
            logged,
            local,
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime"),
            addresses: (0..objects).map(address).collect(),
            next: Cell::new(0),
            calls: Cell::new(0),
            _dir: dir,
        };
        // Every object is awake and has its table.
        for _ in 0..objects.div_ceil(64) {
            fixture.calls("increment", 64);
        }
        fixture
    }

    /// Calls a method `count` times, all at once, on one object after the other.
    fn calls(&self, method: &str, count: usize) {
        self.local.block_on(&self.runtime, async {
            let calls = (0..count).map(|_| {
                let next = self.next.get();
                self.next.set((next + 1) % self.addresses.len());
                let host = Rc::clone(&self.host);
                let (address, method) = (self.addresses[next].clone(), method.to_owned());
                tokio::task::spawn_local(async move {
                    let event = Event::Call {
                        args: Args::new(&method, Vec::new()),
                        method: method.into(),
                    };
                    assert!(host.deliver(&address, event).await.is_ok());
                })
            });
            for call in calls.collect::<Vec<_>>() {
                call.await.expect("no call panics");
            }
        });
        // Ten times a second in a node; here once in a while, so that files are written and logs retired.
        self.calls.set(self.calls.get() + 1);
        if self.calls.get().is_multiple_of(CALLS_PER_TICK) {
            self.host.tick();
        }
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.host.shut_down();
        if let Some(logged) = &self.logged {
            logged.close().expect("the disk works");
        }
    }
}

fn turn(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("turn");
    let one = Fixture::logged(1);
    for in_flight in [1, 64, 1000] {
        group.throughput(Throughput::Elements(in_flight as u64));
        group.bench_function(
            format!("increment/logged/1_object/{in_flight}"),
            |bencher| {
                bencher.iter(|| one.calls("increment", in_flight));
            },
        );
    }
    group.throughput(Throughput::Elements(64));
    group.bench_function("read/logged/1_object/64", |bencher| {
        bencher.iter(|| one.calls("value", 64));
    });
    drop(one);
    let many = Fixture::logged(1000);
    for in_flight in [64, 1000] {
        group.throughput(Throughput::Elements(in_flight as u64));
        group.bench_function(
            format!("increment/logged/1000_objects/{in_flight}"),
            |bencher| bencher.iter(|| many.calls("increment", in_flight)),
        );
    }
    group.throughput(Throughput::Elements(64));
    group.bench_function("read/logged/1000_objects/64", |bencher| {
        bencher.iter(|| many.calls("value", 64));
    });
    drop(many);
    group.sample_size(20);
    for objects in [1, 1000] {
        let plain = Fixture::plain(objects);
        group.bench_function(format!("increment/plain/{objects}_objects/64"), |bencher| {
            bencher.iter(|| plain.calls("increment", 64));
        });
    }
    group.finish();
}

criterion_group!(benches, turn);
criterion_main!(benches);
