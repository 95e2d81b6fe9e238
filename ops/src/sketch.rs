//! Which keys come most: a bounded sketch for operators, never a label of metrics.
//!
//! *Space-Saving* (Metwally, Agrawal, El Abbadi 2005): a fixed number of counters; a key that has none takes over
//! the smallest one, and its count. A key that has more than 1 / [`COUNTERS`] of all that is counted is always
//! there, and its count is too high by at most the count that it took over, which is shown.
//!
//! The counters are a heap by their counts, so that also a flood of keys that come once each costs a few dozen
//! nanoseconds per key.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hash};

/// Counters of one sketch.
pub const COUNTERS: usize = 256;

/// What is counted of some keys. `N` is noted beside each count, and lost when another key takes it over.
pub struct Sketch<K, N = (), S = RandomState> {
    counters: Vec<Counter<K, N>>,
    /// Where the counter of a key is.
    of: HashMap<K, usize, S>,
    /// Counters by their counts, the smallest first: none is smaller than the one at half its place.
    heap: Vec<usize>,
}

/// What is known of one key.
#[derive(Debug, Clone)]
pub struct Counter<K, N> {
    pub key: K,
    pub count: f64,
    /// By so much `count` may be too high: another key brought it along.
    pub inherited: f64,
    pub note: N,
    /// Its place in the heap.
    place: usize,
}

impl<K, N, S: Default> Default for Sketch<K, N, S> {
    fn default() -> Self {
        Self {
            counters: Vec::new(),
            of: HashMap::default(),
            heap: Vec::new(),
        }
    }
}

impl<K: Clone + Eq + Hash + Ord, N: Default, S: BuildHasher> Sketch<K, N, S> {
    /// Counts a key that stands for `weight` of them; what is noted of it, to be changed. `own` makes the key
    /// to be kept, if it has no counter yet.
    pub fn add<Q>(&mut self, key: &Q, own: impl FnOnce(&Q) -> K, weight: f64) -> &mut N
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ?Sized,
    {
        let at = match self.of.get(key) {
            Some(at) => *at,
            None => self.place_for(own(key)),
        };
        self.counters[at].count += weight;
        self.sink(self.counters[at].place);
        &mut self.counters[at].note
    }

    /// What is noted of a key that has a counter.
    pub fn note<Q>(&mut self, key: &Q) -> Option<&mut N>
    where
        K: Borrow<Q>,
        Q: Eq + Hash + ?Sized,
    {
        let at = *self.of.get(key)?;
        Some(&mut self.counters[at].note)
    }

    /// Multiplies all counts, which keeps their order.
    pub fn scale(&mut self, factor: f64) {
        for counter in &mut self.counters {
            counter.count *= factor;
            counter.inherited *= factor;
        }
    }

    /// The keys with the highest counts, the first the highest.
    pub fn top(&self, most: usize) -> Vec<&Counter<K, N>> {
        let mut all: Vec<_> = self.counters.iter().collect();
        all.sort_by(|left, right| {
            let by_count = right.count.total_cmp(&left.count);
            by_count.then_with(|| left.key.cmp(&right.key))
        });
        all.truncate(most);
        all
    }

    pub fn len(&self) -> usize {
        self.counters.len()
    }

    pub fn is_empty(&self) -> bool {
        self.counters.is_empty()
    }

    /// A counter for a key that has none: a fresh one, or the smallest.
    fn place_for(&mut self, key: K) -> usize {
        if self.counters.len() < COUNTERS {
            let at = self.counters.len();
            self.counters.push(Counter {
                key: key.clone(),
                count: 0.0,
                inherited: 0.0,
                note: N::default(),
                place: at,
            });
            self.of.insert(key, at);
            self.heap.push(at);
            self.rise(at);
            return at;
        }
        let at = self.heap[0];
        let counter = &mut self.counters[at];
        let before = std::mem::replace(&mut counter.key, key.clone());
        counter.inherited = counter.count;
        counter.note = N::default();
        self.of.remove(&before);
        self.of.insert(key, at);
        at
    }

    fn count_at(&self, place: usize) -> f64 {
        self.counters[self.heap[place]].count
    }

    fn swap(&mut self, one: usize, other: usize) {
        self.heap.swap(one, other);
        self.counters[self.heap[one]].place = one;
        self.counters[self.heap[other]].place = other;
    }

    /// Restores the order below a place whose count grew.
    fn sink(&mut self, mut place: usize) {
        loop {
            let first = 2 * place + 1;
            if first >= self.heap.len() {
                return;
            }
            let second = first + 1;
            let smaller = match second < self.heap.len() {
                true if self.count_at(second) < self.count_at(first) => second,
                _ => first,
            };
            if self.count_at(smaller) >= self.count_at(place) {
                return;
            }
            self.swap(place, smaller);
            place = smaller;
        }
    }

    /// The same above a place that is new.
    fn rise(&mut self, mut place: usize) {
        while place > 0 {
            let above = (place - 1) / 2;
            if self.count_at(above) <= self.count_at(place) {
                return;
            }
            self.swap(place, above);
            place = above;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that repeat from run to run (xorshift).
    struct Numbers(u64);

    impl Numbers {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0
        }
    }

    #[test]
    fn frequent_keys_are_found_among_a_flood_of_others() {
        let mut sketch: Sketch<Box<str>> = Sketch::default();
        let mut random = Numbers(1);
        for n in 0..40_000 {
            let key = match n % 20 {
                0 => "hot".to_owned(),
                1 if n % 40 == 1 => "warm".to_owned(),
                _ => format!("k{}", random.next()),
            };
            sketch.add(key.as_str(), |key| key.into(), 1.0);
        }
        assert_eq!(sketch.len(), COUNTERS);
        let top = sketch.top(2);
        let names: Vec<&str> = top.iter().map(|hot| &*hot.key).collect();
        assert_eq!(names, ["hot", "warm"]);
        for (hot, truth) in top.iter().zip([2_000.0, 1_000.0]) {
            assert!(
                hot.count >= truth && hot.count - hot.inherited <= truth,
                "{hot:?}"
            );
        }
    }

    #[test]
    fn no_count_is_too_low_and_the_smallest_gives_way() {
        let mut sketch: Sketch<u64> = Sketch::default();
        let mut truth = HashMap::<u64, f64>::new();
        let mut random = Numbers(7);
        for _ in 0..20_000 {
            // A few keys come often, most of 2,000 seldom.
            let key = random.next() % 2000 % (1 + random.next() % 2000);
            let weight = f64::from(u32::try_from(random.next() % 5).unwrap());
            *truth.entry(key).or_default() += weight;
            sketch.add(&key, |key| *key, weight);
            for place in 1..sketch.heap.len() {
                assert!(sketch.count_at((place - 1) / 2) <= sketch.count_at(place));
            }
        }
        for counter in sketch.top(COUNTERS) {
            let truth = truth[&counter.key];
            assert!(
                counter.count >= truth && counter.count - counter.inherited <= truth,
                "{counter:?} {truth}"
            );
        }
    }

    #[test]
    fn notes_stay_with_their_keys() {
        let mut sketch: Sketch<u32, u32> = Sketch::default();
        *sketch.add(&1, |key| *key, 1.0) = 7;
        assert_eq!(sketch.note(&1), Some(&mut 7));
        for key in 2..=u32::try_from(COUNTERS).unwrap() {
            sketch.add(&key, |key| *key, 2.0);
        }
        assert_eq!(*sketch.add(&1000, |key| *key, 1.0), 0);
        assert_eq!(sketch.note(&1), None, "it had the smallest count");
    }
}
