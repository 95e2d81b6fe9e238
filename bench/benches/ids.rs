//! What does it cost to get from a name to an id, to a shard, to text and back?

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use protocol::{ClassName, Home, ObjectId, ObjectName};

fn ids(criterion: &mut Criterion) {
    let class: ClassName = "Counter".parse().expect("legal");
    let name: ObjectName = "user:8423".parse().expect("legal");
    let id = ObjectId::named(&class, Home::Global, &name);
    let text = id.to_string();
    criterion.bench_function("ids/named", |bencher| {
        bencher.iter(|| ObjectId::named(black_box(&class), Home::Global, black_box(&name)));
    });
    criterion.bench_function("ids/check_class", |bencher| {
        bencher.iter(|| black_box(id).check_class(&class).is_ok());
    });
    criterion.bench_function("ids/shard", |bencher| {
        bencher.iter(|| black_box(id).shard(128))
    });
    criterion.bench_function("ids/print", |bencher| {
        bencher.iter(|| black_box(id).to_string())
    });
    criterion.bench_function("ids/parse", |bencher| {
        bencher.iter(|| black_box(&text).parse::<ObjectId>().is_ok());
    });
}

criterion_group!(benches, ids);
criterion_main!(benches);
