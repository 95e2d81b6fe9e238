//! The generic cell rate algorithm (ITU-T I.371, A.2, as virtual scheduling): one number per key, the
//! time at which its bucket is full again.

use super::{Decision, NEVER, Rate, Terms, nanos};

/// A bucket of `burst` that fills by one every `period / limit`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gcra {
    /// Nanoseconds between two that pass for good, rounded up: never more than the limit.
    every: u64,
    /// Nanoseconds that an empty bucket takes to fill.
    fill: u64,
}

impl Gcra {
    /// `terms` were checked; what was not is cut to the bounds.
    pub fn new(terms: &Terms) -> Self {
        let every = nanos(terms.period).div_ceil(u64::from(terms.limit.get()));
        Self {
            every: every.max(1),
            fill: every.max(1).saturating_mul(u64::from(terms.burst.get())),
        }
    }

    /// When the bucket is full again. A time too far ahead was written by a clock that has gone back
    /// since, or for other terms: the bucket counts as empty.
    fn full_at(&self, state: [u64; 1], now: u64) -> u64 {
        state[0].clamp(now, now.saturating_add(self.fill))
    }
}

impl Rate for Gcra {
    type State = [u64; 1];

    fn take(&self, state: &mut [u64; 1], cost: u32, now: u64) -> Decision {
        let full_at = self.full_at(*state, now);
        let after = full_at.saturating_add(self.every.saturating_mul(u64::from(cost)));
        let ahead = after - now;
        if ahead <= self.fill {
            state[0] = after;
            let remaining = (self.fill - ahead) / self.every;
            return Decision::Passed {
                remaining: u32::try_from(remaining).unwrap_or(u32::MAX),
            };
        }
        let possible = self.every.saturating_mul(u64::from(cost)) <= self.fill;
        Decision::Refused {
            wait: if possible { ahead - self.fill } else { NEVER },
        }
    }

    fn give_back(&self, state: &mut [u64; 1], cost: u32, _taken: u64) {
        state[0] = state[0].saturating_sub(self.every.saturating_mul(u64::from(cost)));
    }

    fn available(&self, state: &[u64; 1], now: u64) -> u32 {
        let ahead = self.full_at(*state, now) - now;
        u32::try_from(self.fill.saturating_sub(ahead) / self.every).unwrap_or(u32::MAX)
    }

    fn recovers_in(&self, state: &[u64; 1], now: u64) -> u64 {
        self.full_at(*state, now) - now
    }

    fn merge(&self, state: &mut [u64; 1], other: &[u64; 1], _now: u64) {
        state[0] = state[0].max(other[0]);
    }
}
