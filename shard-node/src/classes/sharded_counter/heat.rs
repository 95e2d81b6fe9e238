//! How hot the shards of a counter run: turns a second of each over windows of some seconds, as reports tell.

use std::collections::HashMap;

use protocol::counters::Seat;

/// Shortest window.
const WINDOW_MS: u64 = 5000;

/// Turns a second of one shard above which a counter that chooses by itself takes more shards. An object is
/// said to manage some 500 to 1,000 simple requests a second; above 500 it should be split
/// (<https://developers.cloudflare.com/durable-objects/platform/limits/>).
const HOT: f64 = 500.0;

/// Windows of one counter.
#[derive(Debug, Default)]
pub(super) struct Heat {
    begun_ms: Option<u64>,
    /// Turns of each shard when the window began.
    then: HashMap<Seat, u64>,
    now: HashMap<Seat, u64>,
    last: Option<Window>,
}

/// What a window showed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Window {
    /// The busiest shard over the mean of all: 1 is even.
    pub(super) skew: f64,
    pub(super) hottest: Seat,
    /// Turns a second of that one.
    pub(super) rate: f64,
}

impl Window {
    pub(super) fn is_hot(&self) -> bool {
        self.rate > HOT
    }
}

impl Heat {
    /// A shard, of so many, has had so many turns. The window, when this ends one.
    pub(super) fn note(
        &mut self,
        seat: Seat,
        turns: u64,
        shards: u32,
        now_ms: u64,
    ) -> Option<Window> {
        self.now.insert(seat, turns);
        let Some(begun_ms) = self.begun_ms else {
            self.begin(now_ms);
            return None;
        };
        let took_ms = now_ms.saturating_sub(begun_ms);
        if took_ms < WINDOW_MS {
            return None;
        }
        let window = self.end(shards, took_ms);
        self.begin(now_ms);
        self.last = window;
        window
    }

    /// Of the last window that ended.
    pub(super) fn last(&self) -> Option<Window> {
        self.last
    }

    /// Other shards than before are in use.
    pub(super) fn restart(&mut self) {
        *self = Self::default();
    }

    fn begin(&mut self, now_ms: u64) {
        self.begun_ms = Some(now_ms);
        self.then.clone_from(&self.now);
    }

    fn end(&self, shards: u32, took_ms: u64) -> Option<Window> {
        let grown = self.now.iter().map(|(seat, turns)| {
            let before = self.then.get(seat).copied().unwrap_or(0);
            // A shard that began again has fewer than before.
            (*seat, turns.checked_sub(before).unwrap_or(*turns))
        });
        let (hottest, most) = grown.clone().max_by_key(|(_, turns)| *turns)?;
        let all: u64 = grown.map(|(_, turns)| turns).sum();
        (all > 0).then(|| Window {
            skew: most as f64 * f64::from(shards) / all as f64,
            hottest,
            rate: most as f64 * 1000.0 / took_ms as f64,
        })
    }
}

#[cfg(test)]
mod tests {
    use protocol::counters::Place;

    use super::*;

    fn seat(index: u32) -> Seat {
        Seat {
            place: Place::Anywhere,
            index,
        }
    }

    #[test]
    fn a_window_knows_the_busiest_shard_and_how_uneven_it_is() {
        let mut heat = Heat::default();
        assert_eq!(heat.note(seat(0), 100, 2, 1000), None);
        assert_eq!(heat.note(seat(1), 50, 2, 1100), None);
        assert_eq!(heat.note(seat(0), 3100, 2, 2000), None);
        let window = heat.note(seat(1), 1050, 2, 6000).unwrap();
        assert_eq!((window.hottest, window.rate), (seat(0), 600.0));
        assert!(
            (window.skew - 3000.0 * 2.0 / 4050.0).abs() < 1e-9,
            "{window:?}"
        );
        assert!(window.is_hot());
        // Nothing happened in the next but one report.
        assert_eq!(heat.note(seat(1), 1050, 2, 11_000), None);
    }

    #[test]
    fn a_shard_that_began_again_counts_from_zero() {
        let mut heat = Heat::default();
        heat.note(seat(0), 1000, 1, 0);
        let window = heat.note(seat(0), 500, 1, 5000).unwrap();
        assert_eq!(window.rate, 100.0);
    }
}
