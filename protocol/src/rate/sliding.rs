//! A window that slides by ninths of its period, with a count for each and for the part under way.
//!
//! Any time of one period touches ten ninths at the most, and all ten are in the state when the last
//! request in it is decided: hence never more than `limit` in any period. The price is that what passed
//! counts for up to ten ninths of a period.
//!
//! | bits of the state | meaning |
//! |---|---|
//! | word 0, upper half | number of the newest ninth, modulo 2^32 |
//! | word 0, lower half | counts of the newest two, 16 bits each, the newest lowest |
//! | words 1 and 2 | counts of the eight before, in the same order |

use super::{Decision, NEVER, Rate, SLIDING_LIMIT_MAX, Terms, nanos};

/// Counts per key.
const PARTS: usize = 10;

/// At most `limit` in any time of one period.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlidingWindow {
    limit: u32,
    /// Nanoseconds of a ninth, rounded up.
    part: u64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Window {
    newest: u32,
    /// The newest first.
    counts: [u16; PARTS],
}

impl Window {
    fn unpack([head, middle, last]: [u64; 3]) -> Self {
        let count = |word: u64, at: u32| low(word >> (16 * at));
        Self {
            newest: u32::try_from(head >> 32).unwrap_or(0),
            counts: [
                count(head, 0),
                count(head, 1),
                count(middle, 0),
                count(middle, 1),
                count(middle, 2),
                count(middle, 3),
                count(last, 0),
                count(last, 1),
                count(last, 2),
                count(last, 3),
            ],
        }
    }

    fn pack(self) -> [u64; 3] {
        let word = |counts: &[u16]| {
            counts
                .iter()
                .rev()
                .fold(0, |word, count| word << 16 | u64::from(*count))
        };
        [
            u64::from(self.newest) << 32 | word(&self.counts[..2]),
            word(&self.counts[2..6]),
            word(&self.counts[6..]),
        ]
    }

    /// Lets time pass. If it goes back, the newest count as if they had happened now, and all the others
    /// as a part younger than they were: how far into its part the old clock was is not known.
    fn advance(&mut self, now: u32) {
        let passed = now.wrapping_sub(self.newest);
        self.newest = now;
        if passed > u32::MAX / 2 {
            let newest = self.counts[0];
            self.counts.copy_within(1.., 0);
            self.counts[PARTS - 1] = 0;
            // Together at most the limit, which is 16 bits.
            self.counts[0] = self.counts[0].saturating_add(newest);
            return;
        }
        match usize::try_from(passed) {
            Ok(0) => {}
            Ok(passed) if passed < PARTS => {
                self.counts.copy_within(..PARTS - passed, passed);
                self.counts[..passed].fill(0);
            }
            _ => self.counts = [0; PARTS],
        }
    }

    fn total(&self) -> u32 {
        self.counts.iter().map(|count| u32::from(*count)).sum()
    }
}

/// The lowest 16 bits.
fn low(word: u64) -> u16 {
    u16::try_from(word & 0xffff).unwrap_or(0)
}

impl SlidingWindow {
    /// `terms` were checked; what was not is cut to the bounds.
    pub fn new(terms: &Terms) -> Self {
        Self {
            limit: terms.limit.get().min(SLIDING_LIMIT_MAX),
            part: nanos(terms.period).div_ceil(PARTS as u64 - 1).max(1),
        }
    }

    /// The number of the ninth that a time is in, modulo 2^32.
    fn number(&self, now: u64) -> u32 {
        u32::try_from((now / self.part) & u64::from(u32::MAX)).unwrap_or(0)
    }

    fn at(&self, state: [u64; 3], now: u64) -> Window {
        let mut window = Window::unpack(state);
        window.advance(self.number(now));
        window
    }

    /// How long until so many of the oldest have left.
    fn wait(&self, window: &Window, leave: u32, now: u64) -> u64 {
        let mut gone = 0;
        for (age, count) in window.counts.iter().enumerate().rev() {
            gone += u32::from(*count);
            if gone >= leave {
                let parts = (PARTS - age) as u64;
                return parts * self.part - now % self.part;
            }
        }
        NEVER
    }
}

impl Rate for SlidingWindow {
    type State = [u64; 3];

    fn take(&self, state: &mut [u64; 3], cost: u32, now: u64) -> Decision {
        let mut window = self.at(*state, now);
        let total = window.total();
        let after = total.saturating_add(cost);
        if after > self.limit {
            let wait = match cost > self.limit {
                true => NEVER,
                false => self.wait(&window, after - self.limit, now),
            };
            return Decision::Refused { wait };
        }
        // At most `limit`, which is 16 bits.
        window.counts[0] = window.counts[0].saturating_add(low(u64::from(cost)));
        *state = window.pack();
        Decision::Passed {
            remaining: self.limit - after,
        }
    }

    fn give_back(&self, state: &mut [u64; 3], cost: u32, taken: u64) {
        let mut window = Window::unpack(*state);
        let age = window.newest.wrapping_sub(self.number(taken));
        // What has left the window by now needs no giving back.
        if let Some(count) = usize::try_from(age)
            .ok()
            .and_then(|age| window.counts.get_mut(age))
        {
            *count = count.saturating_sub(low(u64::from(cost.min(SLIDING_LIMIT_MAX))));
            *state = window.pack();
        }
    }

    fn available(&self, state: &[u64; 3], now: u64) -> u32 {
        self.limit.saturating_sub(self.at(*state, now).total())
    }

    fn recovers_in(&self, state: &[u64; 3], now: u64) -> u64 {
        let window = self.at(*state, now);
        match window.counts.iter().position(|count| *count > 0) {
            None => 0,
            Some(youngest) => (PARTS - youngest) as u64 * self.part - now % self.part,
        }
    }

    fn merge(&self, state: &mut [u64; 3], other: &[u64; 3], now: u64) {
        let mut window = self.at(*state, now);
        let other = self.at(*other, now);
        for (count, other) in window.counts.iter_mut().zip(other.counts) {
            *count = (*count).max(other);
        }
        *state = window.pack();
    }
}
