//! Which keys come most, as a [sketch](ops::sketch) that all threads share: for operators, never a label of metrics.
//!
//! Counts are of windows of ten seconds, so that yesterday's keys leave.

use std::sync::Mutex;
use std::time::Duration;

use ops::sketch;
use serde::Serialize;
use tokio::time::Instant;

/// Longer keys are cut.
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

type Sketch = sketch::Sketch<Box<str>>;

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
            windows.now.add(clip(key), |key| key.into(), weight as f64);
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
            Some(before) => top(before, WINDOW.as_secs_f64()),
            None => top(&windows.now, under_way.max(1.0)),
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

/// The keys that come most of what was counted in so many seconds.
fn top(sketch: &Sketch, seconds: f64) -> Vec<HotKey> {
    let shown = sketch.top(SHOWN).into_iter().map(|counter| HotKey {
        key: counter.key.to_string(),
        per_second: counter.count / seconds,
        too_high_by: counter.inherited / seconds,
    });
    shown.collect()
}

fn clip(key: &str) -> &str {
    &key[..key.floor_char_boundary(KEY_BYTES_MAX)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_forget() {
        let begun = Instant::now();
        let mut windows = Windows {
            begun,
            now: Sketch::default(),
            before: None,
        };
        windows.now.add("a", |key| key.into(), 1.0);
        windows.turn(begun + WINDOW);
        assert_eq!(windows.before.as_ref().unwrap().len(), 1);
        windows.turn(begun + 4 * WINDOW);
        assert_eq!(windows.before.as_ref().unwrap().len(), 0);
    }

    #[test]
    fn long_keys_are_cut_between_characters() {
        let hot = Hot::default();
        hot.count(&"é".repeat(300), 1);
        assert_eq!(hot.top()[0].key, "é".repeat(100));
    }
}
