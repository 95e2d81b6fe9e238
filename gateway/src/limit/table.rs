//! What is remembered of the keys of one limit, in memory that never grows beyond its bound.
//!
//! A table is sets of 16 places; the hash of a key says which set, and the set is searched. Memory is taken
//! as sets are first used, and never more than [`Table::bytes_max`]: 48 bytes per key with a bucket, 97 with
//! a sliding window.
//!
//! **A full set forgets nothing that counts.** A key whose state is as good as new leaves its place to the
//! next one. If all 16 still count, the least used leaves, and the set remembers by its *floor* that
//! somebody had taken that much: whoever comes to the set without a place begins there and not with a
//! full bucket. So no key ever gets more than its limit, however many keys come; what a flood of keys
//! costs is that newcomers to full sets are refused earlier than they should. With `keys_max` live keys in
//! the table, that is one key in 60,000.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use protocol::rate::{Decision, Rate};

/// Places of a set.
const WAYS: usize = 16;

/// Places for ten keys of `keys_max`, so that hardly ever a set is full while the table is not.
const PLACES_FOR_TEN: usize = 29;

/// Sets that get their memory together: a page of them.
const CHUNK: usize = 16;

/// Parts of the table with a lock each.
const SHARDS: usize = 64;

/// A place that nobody has.
const NOBODY: u64 = 0;

/// The keys of one limit. Shared by all threads.
pub struct Table<R: Rate> {
    rate: R,
    shards: Box<[Shard<R::State>]>,
    sets: u64,
    evictions: AtomicU64,
}

/// A lock each, on cache lines of its own.
#[repr(align(128))]
struct Shard<S>(Mutex<Sets<S>>);

struct Sets<S> {
    /// [`CHUNK`] sets each, once one of them is used.
    chunks: Vec<Option<Box<[Set<S>; CHUNK]>>>,
    /// One per set: nobody gets more than this leaves. Zeros, which take memory only where they are written.
    floors: Vec<S>,
    used: usize,
}

/// On cache lines and a page of its own.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Set<S> {
    /// The hashes of those who have a place.
    tags: [u64; WAYS],
    states: [S; WAYS],
}

impl<R: Rate> Table<R> {
    /// Room for `keys_max` keys. Costs address space; memory is taken when it is used.
    pub fn new(rate: R, keys_max: usize) -> Self {
        let sets = (keys_max.max(1) * PLACES_FOR_TEN).div_ceil(10 * WAYS * SHARDS);
        let shard = || {
            Shard(Mutex::new(Sets {
                chunks: (0..sets.div_ceil(CHUNK)).map(|_| None).collect(),
                floors: vec![R::State::default(); sets],
                used: 0,
            }))
        };
        Self {
            rate,
            shards: (0..SHARDS).map(|_| shard()).collect(),
            sets: sets as u64,
            evictions: AtomicU64::new(0),
        }
    }

    /// Takes `cost` of a key, or nothing. Costs one lock and, once the table is larger than the caches, three
    /// cache misses.
    pub fn take(&self, key: u128, cost: u32, now: u64) -> Decision {
        let (mut sets, set, tag) = self.find(key);
        if let Some(state) = sets.state(set, tag) {
            return self.rate.take(state, cost, now);
        }
        let mut state = sets.floors[set];
        let decision = self.rate.take(&mut state, cost, now);
        // Who is refused has taken nothing and needs no place: the floor would say the same again.
        if matches!(decision, Decision::Passed { .. }) {
            self.settle(&mut sets, set, tag, state, now);
        }
        decision
    }

    /// Gives back what was taken at `taken`. If the key has lost its place since, it is gone.
    pub fn give_back(&self, key: u128, cost: u32, taken: u64) {
        let (mut sets, set, tag) = self.find(key);
        if let Some(state) = sets.state(set, tag) {
            self.rate.give_back(state, cost, taken);
        }
    }

    /// Keys that have a place, and how often one lost it while it still counted.
    pub fn stats(&self) -> (usize, u64) {
        let used = self.shards.iter().map(|shard| lock(shard).used).sum();
        (used, self.evictions.load(Ordering::Relaxed))
    }

    /// Most bytes that the table can take.
    pub fn bytes_max(&self) -> usize {
        let set = WAYS * (size_of::<u64>() + size_of::<R::State>()) + size_of::<R::State>();
        self.shards.len()
            * (size_of::<Shard<R::State>>() + lock(&self.shards[0]).floors.len() * set)
    }

    fn find(&self, key: u128) -> (MutexGuard<'_, Sets<R::State>>, usize, u64) {
        let (high, tag) = halves(key);
        let shard = usize::try_from(high % SHARDS as u64).unwrap_or(0);
        // Multiply-shift: the upper bits choose the set, and the lower ones have chosen the shard.
        let (_, set) = halves((u128::from(high) * u128::from(self.sets)) >> 64);
        let set = usize::try_from(set).unwrap_or(0);
        (lock(&self.shards[shard]), set, tag.max(NOBODY + 1))
    }

    /// Gives a newcomer a place: an empty one, else one that counts no more, else the least used.
    fn settle(&self, sets: &mut Sets<R::State>, set: usize, tag: u64, state: R::State, now: u64) {
        let Sets {
            chunks,
            floors,
            used,
        } = sets;
        let chunk = chunks[set / CHUNK]
            .get_or_insert_with(|| Box::new([Set::<R::State>::default(); CHUNK]));
        let places = &mut chunk[set % CHUNK];
        let weight = |place: &usize| match places.tags[*place] {
            NOBODY => (false, 0),
            _ => (true, self.rate.recovers_in(&places.states[*place], now)),
        };
        let Some(place) = (0..WAYS).min_by_key(weight) else {
            return;
        };
        match weight(&place) {
            (false, _) => *used += 1,
            (true, 0) => {}
            (true, _) => {
                let leaving = places.states[place];
                self.rate.merge(&mut floors[set], &leaving, now);
                self.evictions.fetch_add(1, Ordering::Relaxed);
            }
        }
        places.tags[place] = tag;
        places.states[place] = state;
    }
}

impl<S> Sets<S> {
    /// What is known of a key.
    fn state(&mut self, set: usize, tag: u64) -> Option<&mut S> {
        let set = &mut self.chunks[set / CHUNK].as_mut()?[set % CHUNK];
        // Without a branch per place, the compiler compares several at once.
        let tags = set.tags.iter().enumerate();
        let hits = tags.fold(0u32, |hits, (at, known)| {
            hits | u32::from(*known == tag) << at
        });
        set.states.get_mut(hits.trailing_zeros() as usize)
    }
}

fn lock<S>(shard: &Shard<S>) -> MutexGuard<'_, Sets<S>> {
    // Nothing panics while it holds the lock, and half of a decision would do no harm.
    shard.0.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The upper and the lower half.
fn halves(key: u128) -> (u64, u64) {
    let low = u64::try_from(key & u128::from(u64::MAX)).unwrap_or(0);
    let high = u64::try_from(key >> 64).unwrap_or(0);
    (high, low)
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

    fn passes<R: Rate>(table: &Table<R>, key: u128, now: u64) -> bool {
        matches!(table.take(key, 1, now), Decision::Passed { .. })
    }

    /// Spreads small numbers like hashes.
    fn hash(key: u64) -> u128 {
        xxhash_rust::xxh3::xxh3_128(&key.to_le_bytes())
    }

    #[test]
    fn every_key_has_its_own_limit() {
        let table = Table::new(gcra(2), 100_000);
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
        let bucket = Table::new(gcra(1), keys).bytes_max();
        let window = Table::new(
            SlidingWindow::new(&terms(Algorithm::SlidingWindow, 1)),
            keys,
        );
        assert!(bucket <= 50 * keys, "{bucket}");
        assert!(window.bytes_max() <= 100 * keys, "{}", window.bytes_max());
    }

    #[test]
    fn hardly_any_key_is_refused_before_the_table_is_full() {
        let table = Table::new(gcra(1), 200_000);
        let refused = (0..200_000).filter(|key| !passes(&table, hash(*key), 0));
        assert!(refused.count() <= 40);
    }

    #[test]
    fn a_flood_of_keys_takes_no_memory_and_frees_nobody() {
        let table = Table::new(gcra(3), 1000);
        let places = 1000 * PLACES_FOR_TEN / 10 + WAYS * SHARDS;
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
        assert!(passed <= 3 * places as u64, "{passed} of 200,000 strangers");
        // Time mends it.
        assert!((1..1000).all(|key| passes(&table, hash(key), 20 * SECOND)));
    }

    #[test]
    fn clients_on_many_threads_get_the_limit_together() {
        let table = Table::new(gcra(1000), 10);
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

    proptest! {
        #[test]
        fn nobody_gets_more_than_alone_however_small_the_table(
            asks in prop::collection::vec((0u64..400, 0u64..SECOND / 20), 1..1500),
        ) {
            fn check<R: Rate>(rate: R, asks: &[(u64, u64)]) -> Result<(), TestCaseError> {
                // One set per shard, and all keys in one shard.
                let table = Table::new(rate, 1);
                let mut alone: HashMap<u64, Vec<u64>> = HashMap::new();
                let mut now = 0;
                for (key, pause) in asks {
                    now += pause;
                    if passes(&table, u128::from(*key + 1), now) {
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
