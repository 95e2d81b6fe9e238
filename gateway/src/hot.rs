//! Which keys come most: a bounded sketch for operators, never a label of metrics.
//!
//! *Space-Saving* (Metwally, Agrawal, El Abbadi 2005): a fixed number of counters; a key that has none takes over
//! the smallest one, and its count. A key that came more than 1 / [`COUNTERS`] of the time is always there, and
//! its count is too high by at most the count that it took over, which is shown.
//! Counts are of windows of ten seconds, so that yesterday's keys leave.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;

/// Counters of one sketch, for keys of at most this many bytes; longer ones are cut.
const COUNTERS: usize = 256;
const KEY_BYTES_MAX: usize = 200;

const WINDOW: Duration = Duration::from_secs(10);

/// Keys that are shown.
const SHOWN: usize = 20;

/// What is counted of some keys, by all threads.
pub struct Hot(Mutex<Windows>);

struct Windows {
    begun: Instant,
    now: Sketch,
    /// The window before, whole.
    before: Option<Sketch>,
}

#[derive(Default)]
struct Sketch(HashMap<Box<str>, Count>);

#[derive(Clone, Copy)]
struct Count {
    count: u64,
    /// How much of it another key brought along.
    inherited: u64,
}

/// A key as operators see it.
#[derive(Debug, PartialEq, Serialize)]
pub struct HotKey {
    key: String,
    per_second: f64,
    /// By so much `per_second` may be too high.
    too_high_by: f64,
}

impl Default for Hot {
    fn default() -> Self {
        Self(Mutex::new(Windows {
            begun: Instant::now(),
            now: Sketch::default(),
            before: None,
        }))
    }
}

impl Hot {
    /// Counts a key that stands for `weight` of them. Nobody waits: while another thread counts, it is left
    /// out.
    pub fn count(&self, key: &str, weight: u64) {
        if let Ok(mut windows) = self.0.try_lock() {
            windows.turn(Instant::now());
            windows.now.count(clip(key), weight);
        }
    }

    /// The keys that come most, the first the most: of the last whole window, or of the one under way if it
    /// is the first.
    pub fn top(&self) -> Vec<HotKey> {
        // Nothing panics while it holds the lock.
        let Ok(mut windows) = self.0.lock() else {
            return Vec::new();
        };
        let now = Instant::now();
        windows.turn(now);
        let under_way = now.duration_since(windows.begun).as_secs_f64();
        match &windows.before {
            Some(before) => before.top(WINDOW.as_secs_f64()),
            None => windows.now.top(under_way.max(1.0)),
        }
    }
}

impl Windows {
    fn turn(&mut self, now: Instant) {
        let age = now.duration_since(self.begun);
        if age < WINDOW {
            return;
        }
        let whole = std::mem::take(&mut self.now);
        // After a pause of more than a window, the last one had nothing.
        self.before = Some(if age < 2 * WINDOW {
            whole
        } else {
            Sketch::default()
        });
        self.begun = now;
    }
}

impl Sketch {
    fn count(&mut self, key: &str, weight: u64) {
        if let Some(known) = self.0.get_mut(key) {
            known.count += weight;
            return;
        }
        let inherited = match self.0.len() < COUNTERS {
            true => 0,
            false => self.take_smallest(),
        };
        let count = Count {
            count: inherited + weight,
            inherited,
        };
        self.0.insert(key.into(), count);
    }

    fn take_smallest(&mut self) -> u64 {
        let smallest = self.0.iter().min_by_key(|(_, count)| count.count);
        let Some((key, count)) = smallest.map(|(key, count)| (key.clone(), count.count)) else {
            return 0;
        };
        self.0.remove(&key);
        count
    }

    fn top(&self, seconds: f64) -> Vec<HotKey> {
        let mut all: Vec<(&str, Count)> =
            self.0.iter().map(|(key, count)| (&**key, *count)).collect();
        all.sort_by(|(key, a), (other, b)| b.count.cmp(&a.count).then_with(|| key.cmp(other)));
        let shown = all.into_iter().take(SHOWN).map(|(key, count)| HotKey {
            key: key.to_owned(),
            per_second: count.count as f64 / seconds,
            too_high_by: count.inherited as f64 / seconds,
        });
        shown.collect()
    }
}

fn clip(key: &str) -> &str {
    &key[..key.floor_char_boundary(KEY_BYTES_MAX)]
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    #[test]
    fn frequent_keys_are_found_among_a_flood_of_others() {
        let mut sketch = Sketch::default();
        let mut random = SmallRng::seed_from_u64(1);
        for n in 0..40_000 {
            match n % 20 {
                0 => sketch.count("hot", 1),
                1 if n % 40 == 1 => sketch.count("warm", 1),
                _ => sketch.count(&format!("k{}", random.random::<u32>()), 1),
            }
        }
        assert!(sketch.0.len() <= COUNTERS);
        let top = sketch.top(1.0);
        let names: Vec<&str> = top.iter().take(2).map(|hot| hot.key.as_str()).collect();
        assert_eq!(names, ["hot", "warm"]);
        for (hot, truth) in top.iter().zip([2_000.0, 1_000.0]) {
            assert!(
                hot.per_second >= truth && hot.per_second - hot.too_high_by <= truth,
                "{hot:?}"
            );
        }
    }

    #[test]
    fn windows_forget() {
        let begun = Instant::now();
        let mut windows = Windows {
            begun,
            now: Sketch::default(),
            before: None,
        };
        windows.now.count("a", 1);
        windows.turn(begun + WINDOW);
        assert_eq!(windows.before.as_ref().unwrap().0.len(), 1);
        windows.turn(begun + 4 * WINDOW);
        assert_eq!(windows.before.as_ref().unwrap().0.len(), 0);
    }

    #[test]
    fn long_keys_are_cut_between_characters() {
        let hot = Hot::default();
        hot.count(&"é".repeat(300), 1);
        assert_eq!(hot.top()[0].key, "é".repeat(100));
    }
}
