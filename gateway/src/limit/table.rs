//! What is remembered of the keys of one limit, in memory that never grows beyond its bound.
//!
//! A table is sets of five places, a cache line each with a bucket. The hash of a key names two of them, and it
//! goes to the emptier one. Memory is taken as sets are first used, and never more than
//! [`Table::bytes_max`]: 29 bytes per key with a bucket, 87 with a sliding window.
//!
//! **A full set forgets nothing that counts.** A key whose state is as good as new leaves its place to the
//! next one. If all ten still count, the least used leaves, and its set remembers by its *floor* that
//! somebody had taken that much: whoever comes to the set without a place begins there and not with a
//! full bucket. So no key ever gets more than its limit, however many keys come; what a flood of keys
//! costs is that newcomers to full sets are refused earlier than they should. With `keys_max` live keys in
//! the table, that is less than one key in 10,000.
//!
//! Keys are told apart by 32 bits besides their sets: one in some 10^8 shares the limit of another. Nobody can
//! choose which, without the seed of the hash.
//!
//! A key is looked for without a lock, which is where the cache misses are, and what was found is looked at again
//! under the lock, for as long as arithmetic takes. So all of the memory is atomic words, written under locks only.

mod places;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytemuck::Pod;
use protocol::rate::{Decision, Rate};

use places::{NOBODY, Place, Places, WAYS};

/// Places per key of `keys_max`, so that hardly ever two sets are full while the table is not.
const SPARE: usize = 2;

/// Parts of the table with a lock each.
const SHARDS: usize = 64;

/// The keys of one limit. Shared by all threads.
pub struct Table<R: Rate> {
    rate: R,
    places: Places<R::State>,
    shards: Box<[Shard]>,
    /// Per shard.
    sets: u64,
    evictions: AtomicU64,
}

/// The lock of some sets, on cache lines of its own, with the number of their places that somebody has.
#[derive(Default)]
#[repr(align(128))]
struct Shard(Mutex<usize>);

impl<R: Rate<State: Pod>> Table<R> {
    /// Room for `keys_max` keys; `None` if the system refuses that much. Costs address space; memory is taken when it
    /// is used.
    pub fn new(rate: R, keys_max: usize) -> Option<Self> {
        let sets = (keys_max.max(1) * SPARE).div_ceil(WAYS * SHARDS);
        Some(Self {
            rate,
            places: Places::new(sets * SHARDS)?,
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
            sets: sets as u64,
            evictions: AtomicU64::new(0),
        })
    }

    /// Takes `cost` of a key, or nothing. Costs one lock and, once the table is larger than the caches, two
    /// cache misses side by side.
    pub fn take(&self, key: u128, cost: u32, now: u64) -> Decision {
        let spot = self.spot(key);
        let seen = self.places.find(&spot);
        let mut used = lock(&self.shards[spot.shard]);
        if let Some(place) = self.places.find_again(&spot, seen) {
            let mut state = self.places.state(place);
            let decision = self.rate.take(&mut state, cost, now);
            self.places.set_state(place, &state);
            return decision;
        }
        let [one, other] = spot.sets.map(|set| self.places.floor(set));
        let mut state = one;
        self.rate.merge(&mut state, &other, now);
        let decision = self.rate.take(&mut state, cost, now);
        // Who is refused has taken nothing and needs no place: the floor would say the same again.
        if matches!(decision, Decision::Passed { .. }) {
            self.settle(&mut used, &spot, &state, now);
        }
        decision
    }

    /// Gives back what was taken at `taken`. If the key has lost its place since, it is gone.
    pub fn give_back(&self, key: u128, cost: u32, taken: u64) {
        let spot = self.spot(key);
        let seen = self.places.find(&spot);
        let _lock = lock(&self.shards[spot.shard]);
        if let Some(place) = self.places.find_again(&spot, seen) {
            let mut state = self.places.state(place);
            self.rate.give_back(&mut state, cost, taken);
            self.places.set_state(place, &state);
        }
    }

    /// Keys that have a place, and how often one lost it while it still counted.
    pub fn stats(&self) -> (usize, u64) {
        let used = self.shards.iter().map(|shard| *lock(shard)).sum();
        (used, self.evictions.load(Ordering::Relaxed))
    }

    /// Most bytes that the table can take.
    pub fn bytes_max(&self) -> usize {
        self.shards.len() * size_of::<Shard>() + self.places.bytes()
    }

    fn spot(&self, key: u128) -> Spot {
        let part = |from: u32| u64::try_from((key >> from) & 0xffff_ffff).unwrap_or(0);
        let shard = part(0) % SHARDS as u64;
        // Multiply-shift: all sets get an equal part of the hashes.
        let set = |from| {
            let set = shard * self.sets + ((part(from) * self.sets) >> 32);
            usize::try_from(set).unwrap_or(0)
        };
        Spot {
            shard: usize::try_from(shard).unwrap_or(0),
            sets: [set(32), set(64)],
            tag: u32::try_from(part(96)).unwrap_or(0).max(NOBODY + 1),
        }
    }

    /// Gives a newcomer a place: an empty one in the emptier set, else one that counts no more, else the
    /// least used.
    fn settle(&self, used: &mut usize, spot: &Spot, state: &R::State, now: u64) {
        let mut best: Option<(Weight, Place)> = None;
        for set in spot.sets {
            let tags = self.places.tags(set);
            let taken = tags.iter().filter(|tag| **tag != NOBODY).count();
            for (way, tag) in tags.into_iter().enumerate() {
                let place = Place { set, way };
                let weight = match tag {
                    NOBODY => Weight::Empty { taken },
                    _ => match self.rate.recovers_in(&self.places.state(place), now) {
                        0 => Weight::AsGoodAsNew,
                        recovers_in => Weight::Counts { recovers_in },
                    },
                };
                if best.is_none_or(|(lightest, _)| weight < lightest) {
                    best = Some((weight, place));
                }
            }
        }
        let Some((weight, place)) = best else {
            return;
        };
        match weight {
            Weight::Empty { .. } => *used += 1,
            Weight::AsGoodAsNew => {}
            Weight::Counts { .. } => {
                let mut floor = self.places.floor(place.set);
                let leaving = self.places.state(place);
                self.rate.merge(&mut floor, &leaving, now);
                self.places.set_floor(place.set, &floor);
                self.evictions.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.places.set_tag(place, spot.tag);
        self.places.set_state(place, state);
    }
}

/// Where a key may be.
struct Spot {
    shard: usize,
    /// Perhaps the same one twice.
    sets: [usize; 2],
    tag: u32,
}

/// How much a place matters. The lightest one is given away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Weight {
    /// `taken`: places of the set that are not.
    Empty {
        taken: usize,
    },
    AsGoodAsNew,
    Counts {
        recovers_in: u64,
    },
}

fn lock(shard: &Shard) -> MutexGuard<'_, usize> {
    // Nothing panics while it holds the lock, and half of a decision would do no harm.
    shard.0.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::time::Duration;

    use proptest::prelude::*;
    use protocol::rate::{Algorithm, Gcra, SlidingWindow, Terms};

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn terms(algorithm: Algorithm, limit: u32) -> Terms {
        let limit = limit.try_into().unwrap();
        Terms {
            algorithm,
            limit,
            period: Duration::from_secs(10),
            burst: limit,
        }
    }

    fn gcra(limit: u32) -> Gcra {
        Gcra::new(&terms(Algorithm::Gcra, limit))
    }

    fn passes<R: Rate<State: Pod>>(table: &Table<R>, key: u128, now: u64) -> bool {
        matches!(table.take(key, 1, now), Decision::Passed { .. })
    }

    /// Spreads small numbers like hashes.
    fn hash(key: u64) -> u128 {
        xxhash_rust::xxh3::xxh3_128(&key.to_le_bytes())
    }

    #[test]
    fn every_key_has_its_own_limit() {
        let table = Table::new(gcra(2), 100_000).unwrap();
        for key in 0..100_000 {
            let passed = (0..3).filter(|_| passes(&table, hash(key), 0)).count();
            assert_eq!(passed, 2, "key {key}");
        }
        let (used, evictions) = table.stats();
        assert_eq!(used as u64 + evictions, 100_000);
        assert!(evictions <= 10, "{evictions}");
    }

    #[test]
    fn a_key_takes_less_than_a_hundred_bytes() {
        let keys = 1_000_000;
        let bucket = Table::new(gcra(1), keys).unwrap().bytes_max();
        let window = Table::new(
            SlidingWindow::new(&terms(Algorithm::SlidingWindow, 1)),
            keys,
        )
        .unwrap();
        assert!(bucket <= 30 * keys, "{bucket}");
        assert!(window.bytes_max() <= 100 * keys, "{}", window.bytes_max());
    }

    #[test]
    fn hardly_any_key_is_refused_before_the_table_is_full() {
        let table = Table::new(gcra(1), 200_000).unwrap();
        let refused = (0..200_000).filter(|key| !passes(&table, hash(*key), 0));
        assert!(refused.count() <= 40);
    }

    #[test]
    fn a_flood_of_keys_takes_no_memory_and_frees_nobody() {
        let table = Table::new(gcra(3), 1000).unwrap();
        let places = 1000 * SPARE + WAYS * SHARDS;
        for _ in 0..3 {
            assert!(passes(&table, hash(0), 0));
        }
        let mut passed = 0;
        for key in 1..200_000 {
            passed += u64::from(passes(&table, hash(key), 0));
            if key % 1000 == 0 {
                assert!(!passes(&table, hash(0), 0), "after {key} keys");
            }
        }
        let (used, evictions) = table.stats();
        assert!(used <= places);
        assert!(evictions > 0);
        // A floor counts like a place.
        let most = 3 * (places + places / WAYS) as u64;
        assert!(passed <= most, "{passed} of 200,000 strangers");
        // Time mends it.
        assert!((1..1000).all(|key| passes(&table, hash(key), 20 * SECOND)));
    }

    #[test]
    fn clients_on_many_threads_get_the_limit_together() {
        let table = Table::new(gcra(1000), 10).unwrap();
        let passed: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| (0..500).filter(|_| passes(&table, 7, 0)).count()))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .sum()
        });
        assert_eq!(passed, 1000);
    }

    #[test]
    fn nobody_gets_more_than_the_limit_while_threads_push_each_other_out() {
        let table = Table::new(gcra(3), 1).unwrap();
        let keys = 4096;
        // In windows that overlap, so that some keys are pushed out while others ask for them.
        let ask = |thread: u64| {
            let asked = (0..40 * keys).map(|n| (n * (thread + 1) / 3) % keys);
            asked
                .filter(|key| passes(&table, hash(*key), 0))
                .collect::<Vec<u64>>()
        };
        let passed: Vec<Vec<u64>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|thread| scope.spawn(move || ask(thread)))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        let mut of_key: HashMap<u64, u32> = HashMap::new();
        for key in passed.into_iter().flatten() {
            *of_key.entry(key).or_default() += 1;
        }
        assert!(of_key.values().all(|passed| *passed <= 3), "{of_key:?}");
        let places = SHARDS * WAYS;
        let (used, evictions) = table.stats();
        assert!(used <= places && evictions > 0, "{used} {evictions}");
    }

    proptest! {
        #[test]
        fn nobody_gets_more_than_alone_however_small_the_table(
            asks in prop::collection::vec((0u64..400, 0u64..SECOND / 20), 1..1500),
        ) {
            fn check<R: Rate<State: Pod>>(rate: R, asks: &[(u64, u64)]) -> Result<(), TestCaseError> {
                // Two sets per shard, and all keys in one shard.
                let table = Table::new(rate, 2 * WAYS * SHARDS / SPARE).unwrap();
                assert_eq!(table.sets, 2);
                let hash = |key: u64| u128::from(key % 4) << 94 | u128::from(key % 2) << 63 | u128::from(key + 1) << 96;
                let mut alone: HashMap<u64, Vec<u64>> = HashMap::new();
                let mut now = 0;
                for (key, pause) in asks {
                    now += pause;
                    if passes(&table, hash(*key), now) {
                        alone.entry(*key).or_default().push(now);
                    }
                }
                // What passed would have passed alone, too.
                for times in alone.into_values() {
                    let mut state = R::State::default();
                    for time in times {
                        let decision = rate.take(&mut state, 1, time);
                        let passed = matches!(decision, Decision::Passed { .. });
                        prop_assert!(passed);
                    }
                }
                Ok(())
            }
            check(gcra(2), &asks)?;
            check(SlidingWindow::new(&terms(Algorithm::SlidingWindow, 2)), &asks)?;
        }
    }
}
