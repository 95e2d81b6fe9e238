//! What does it cost to find the owner of an object, and to place all shards anew?

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use protocol::ring::{RingDocument, RingNode};
use protocol::{ClassName, Home, ObjectId, Ring, RingVersion};

fn ring(criterion: &mut Criterion) {
    let node = |number: u16| RingNode {
        name: format!("node-{number}"),
        weight: 1 + number % 4,
        colo: None,
        workers: (0..8)
            .map(|worker| format!("10.0.0.{number}:710{worker}"))
            .collect(),
    };
    let document = RingDocument {
        version: RingVersion::FIRST,
        shards: 1024,
        nodes: (0..20).map(node).collect(),
    };
    let ring = Ring::new(document.clone()).expect("legal");
    let class: ClassName = "Counter".parse().expect("legal");
    let id = ObjectId::unique(&class, Home::Global, [7; 20]);
    criterion.bench_function("ring/owner", |bencher| {
        bencher.iter(|| {
            let id = black_box(id);
            ring.owner(id.home(), ring.shard_of(id)).is_ok()
        });
    });
    criterion.bench_function("ring/place_1024_shards_on_20_nodes", |bencher| {
        bencher.iter(|| Ring::new(black_box(document.clone())).is_ok());
    });
}

criterion_group!(benches, ring);
criterion_main!(benches);
