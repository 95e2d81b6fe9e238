//! What does one turn of an object cost in process: mailbox, turn loop, storage, reply?

use std::rc::Rc;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ops::metrics::Registry;
use protocol::{Home, ObjectId, ShardId};
use shard_node::class::Args;
use shard_node::classes::Classes;
use shard_node::clock::SystemClock;
use shard_node::config::{MailboxConfig, ObjectsConfig};
use shard_node::host::{Address, Host, HostConfig};
use shard_node::metrics::Metrics;
use shard_node::object::mailbox::Event;
use shard_node::storage::PlainFiles;
use tokio::runtime::Runtime;
use tokio::task::LocalSet;

/// Requests that wait for one another's commit.
const IN_FLIGHT: u64 = 64;

/// A host on a directory of its own, its turn loop running.
struct Fixture {
    host: Rc<Host>,
    local: LocalSet,
    runtime: Runtime,
    address: Address,
    _dir: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory for temporary files");
        let config = HostConfig {
            mailbox: MailboxConfig::default(),
            objects: ObjectsConfig::default(),
            sql: Arc::default(),
        };
        let metrics = Rc::new(Metrics::new(Arc::new(Registry::default()), 0));
        let engine = Rc::new(PlainFiles::new(dir.path()));
        let host = Host::new(config, engine, Arc::new(SystemClock), metrics);
        let local = LocalSet::new();
        drop(local.spawn_local(Rc::clone(&host).run()));
        let class = Arc::clone(
            Classes::built_in()
                .iter()
                .next()
                .expect("Counter comes first"),
        );
        let name = "hot".parse().expect("legal");
        Self {
            host,
            local,
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime"),
            address: Address {
                id: ObjectId::named(class.name(), Home::Global, &name),
                class,
                name: Some(name),
                shard: ShardId(0),
            },
            _dir: dir,
        }
    }

    /// Calls a method as often as [`IN_FLIGHT`], all at once.
    fn calls(&self, method: &str) {
        self.local.block_on(&self.runtime, async {
            let calls = (0..IN_FLIGHT).map(|_| {
                let (host, address, method) = (
                    Rc::clone(&self.host),
                    self.address.clone(),
                    method.to_owned(),
                );
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
    }
}

fn turn(criterion: &mut Criterion) {
    let fixture = Fixture::new();
    let mut group = criterion.benchmark_group("turn");
    group.throughput(Throughput::Elements(IN_FLIGHT));
    group.bench_function("read_64_in_flight", |bencher| {
        bencher.iter(|| fixture.calls("value"))
    });
    group.sample_size(20);
    group.bench_function("durable_increment_64_in_flight", |bencher| {
        bencher.iter(|| fixture.calls("increment"));
    });
    group.finish();
}

criterion_group!(benches, turn);
criterion_main!(benches);
