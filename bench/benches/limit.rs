//! What does one decision of a rate limit cost: over a million keys, on one thread and contended; and what
//! would it cost with a `DashMap` for the keys?

use std::hint::black_box;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dashmap::DashMap;
use gateway::limit::table::Table;
use protocol::rate::{Algorithm, Decision, Gcra, Rate, SlidingWindow, Terms};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tokio::time::Instant;
use xxhash_rust::xxh3::{Xxh3DefaultBuilder, xxh3_128_with_seed};

const KEYS: u64 = 1_000_000;

/// Decisions per thread in one round of the contended cases.
const ROUND: u64 = 20_000;

fn terms(algorithm: Algorithm) -> Terms {
    let limit = NonZeroU32::new(100).expect("not 0");
    Terms {
        algorithm,
        limit,
        period: Duration::from_secs(60),
        burst: limit,
    }
}

/// The hash of a key as a template gives it.
fn hash(key: u64) -> u128 {
    let mut name = *b"SFO:user-xxxxxxxx";
    name[9..].copy_from_slice(&key.to_le_bytes());
    xxh3_128_with_seed(&name, 7)
}

/// The same with a map that grows: for comparison only.
fn take_from_map<R: Rate>(
    map: &DashMap<u128, R::State, Xxh3DefaultBuilder>,
    rate: R,
    key: u128,
    now: u64,
) -> Decision {
    let mut state = map.entry(key).or_default();
    rate.take(&mut state, 1, now)
}

/// CPU time of this thread: others use the machine, too.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// CPU time of so many decisions on this thread.
fn measure(rounds: u64, mut decide: impl FnMut() -> Decision) -> Duration {
    let begun = cpu_time();
    for _ in 0..rounds {
        black_box(decide());
    }
    cpu_time().saturating_sub(begun)
}

/// Every kind of table over all keys, in a random order; with the hash, without the clock.
fn decisions(criterion: &mut Criterion) {
    let mut random = SmallRng::seed_from_u64(1);
    let mut group = criterion.benchmark_group("limit/one_thread_1e6_keys");
    group.throughput(Throughput::Elements(1));
    let gcra = Gcra::new(&terms(Algorithm::Gcra));
    let sliding = SlidingWindow::new(&terms(Algorithm::SlidingWindow));
    let keys_max = usize::try_from(KEYS).expect("a million");
    let buckets = Table::new(gcra, keys_max).expect("memory");
    let windows = Table::new(sliding, keys_max).expect("memory");
    let map = DashMap::default();
    for key in 0..KEYS {
        buckets.take(hash(key), 1, 0);
        windows.take(hash(key), 1, 0);
        take_from_map(&map, gcra, hash(key), 0);
    }
    let mut now = 0;
    let mut next = move || {
        now += 1000;
        (random.random_range(0..KEYS), now)
    };
    group.bench_function("gcra", |bencher| {
        bencher.iter_custom(|rounds| {
            measure(rounds, || {
                let (key, now) = next();
                buckets.take(hash(key), 1, now)
            })
        });
    });
    group.bench_function("sliding_window", |bencher| {
        bencher.iter_custom(|rounds| {
            measure(rounds, || {
                let (key, now) = next();
                windows.take(hash(key), 1, now)
            })
        });
    });
    group.bench_function("gcra_in_a_dashmap", |bencher| {
        bencher.iter_custom(|rounds| {
            measure(rounds, || {
                let (key, now) = next();
                take_from_map(&map, gcra, hash(key), now)
            })
        });
    });
    group.finish();
}

/// Time of `threads` threads, per decision of one of them.
fn contend(threads: u64, rounds: u64, decide: impl Fn(u64, u64) + Sync) -> Duration {
    let clock = AtomicU64::new(0);
    let begun = Instant::now();
    for _ in 0..rounds {
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let (decide, clock) = (&decide, &clock);
                scope.spawn(move || {
                    let mut random = SmallRng::seed_from_u64(thread);
                    let now = clock.fetch_add(1_000_000, Ordering::Relaxed);
                    for _ in 0..ROUND {
                        decide(random.random_range(0..KEYS), now);
                    }
                });
            }
        });
    }
    begun.elapsed()
}

/// Eight threads on as many cores as there are: over all keys, and all on one.
fn contended(criterion: &mut Criterion) {
    let gcra = Gcra::new(&terms(Algorithm::Gcra));
    let table = Table::new(gcra, usize::try_from(KEYS).expect("a million"));
    let table = table.expect("memory");
    let map = DashMap::default();
    for key in 0..KEYS {
        table.take(hash(key), 1, 0);
        take_from_map(&map, gcra, hash(key), 0);
    }
    let mut group = criterion.benchmark_group("limit/contended");
    group.sample_size(10);
    for threads in [1, 8] {
        group.throughput(Throughput::Elements(threads * ROUND));
        group.bench_function(format!("{threads}_threads_1e6_keys"), |bencher| {
            bencher.iter_custom(|rounds| {
                contend(threads, rounds, |key, now| {
                    black_box(table.take(hash(key), 1, now));
                })
            });
        });
        group.bench_function(format!("{threads}_threads_one_key"), |bencher| {
            bencher.iter_custom(|rounds| {
                contend(threads, rounds, |_, now| {
                    black_box(table.take(hash(0), 1, now));
                })
            });
        });
        group.bench_function(
            format!("{threads}_threads_1e6_keys_in_a_dashmap"),
            |bencher| {
                bencher.iter_custom(|rounds| {
                    contend(threads, rounds, |key, now| {
                        black_box(take_from_map(&map, gcra, hash(key), now));
                    })
                });
            },
        );
    }
    group.finish();
}

criterion_group!(benches, decisions, contended);
criterion_main!(benches);
