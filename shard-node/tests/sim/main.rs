//! The storage engine on a disk that fails and forgets, in one thread: every run repeats from its seed.
#![expect(
    clippy::unwrap_used,
    reason = "a test fails where something unexpected happens"
)]

mod alarms;
mod counters;
mod crashes;
mod differential;
mod disk;
mod examples;
mod faults;
mod gate;
mod node;
mod patterns;
mod schedules;

/// Runs a test with so many seeds: random ones, or those from `SIM_SEED` on, to see a failure again.
#[expect(clippy::print_stdout, reason = "a failure must be seen again")]
fn for_seeds(count: u64, run: impl Fn(u64)) {
    use rand::Rng;

    let first: u64 = std::env::var("SIM_SEED")
        .ok()
        .map_or_else(|| rand::rng().random(), |seed| seed.parse().unwrap());
    for seed in (0..count).map(|number| first.wrapping_add(number)) {
        println!("seed {seed}: run with SIM_SEED={seed}");
        run(seed);
    }
}
