//! Rates: how many requests of one key may pass in how much time. Integers of nanoseconds, no clock: the
//! time is an argument, counted from any moment that its caller keeps to, and below 2^63.
//!
//! | algorithm | of one key pass | exactly |
//! |---|---|---|
//! | [`Gcra`] | at most `burst + t · limit / period` in any time `t` | a bucket of `burst` that fills evenly |
//! | [`SlidingWindow`] | at most `limit` in any time of one `period` | counts by tenths; a refusal may come up to a ninth of a period early |
//!
//! Both forget nothing while it counts, never let more pass than the table says, and stay so when the clock
//! goes back: what was taken then counts as if it had been taken now.

mod gcra;
mod sliding;

use std::num::NonZeroU32;
use std::time::Duration;

pub use gcra::Gcra;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
pub use sliding::SlidingWindow;

/// The shortest and the longest period.
pub const PERIOD_MIN: Duration = Duration::from_millis(10);
pub const PERIOD_MAX: Duration = Duration::from_secs(366 * 24 * 3600);

/// The longest time in which a bucket fills: `burst · period / limit`.
pub const FILL_MAX: Duration = PERIOD_MAX;

/// The largest limit of a sliding window: it counts in 16 bits.
pub const SLIDING_LIMIT_MAX: u32 = u16::MAX as u32;

/// What was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// It was taken; this many more could be taken at once.
    Passed { remaining: u32 },
    /// Nothing was taken. Asked again after this many nanoseconds it passes, if nobody else takes
    /// anything; [`NEVER`] if it is more than ever passes at once.
    Refused { wait: u64 },
}

/// The wait of what can never pass.
pub const NEVER: u64 = u64::MAX;

/// How many of one key may pass in how much time. Small and copied: the state of the keys is elsewhere.
pub trait Rate: Copy + Send + Sync + 'static {
    /// What is remembered of one key. All zeros is a key that took nothing lately.
    type State: Copy + Default + Send + 'static;

    /// Takes `cost`, or nothing.
    fn take(&self, state: &mut Self::State, cost: u32, now: u64) -> Decision;

    /// Gives back what was taken at `taken`, in whole.
    fn give_back(&self, state: &mut Self::State, cost: u32, taken: u64);

    /// How much could be taken at once.
    fn available(&self, state: &Self::State, now: u64) -> u32;

    /// After how many nanoseconds the state is as good as that of a key that took nothing; 0 if it is.
    fn recovers_in(&self, state: &Self::State, now: u64) -> u64;

    /// Makes `state` one that never lets pass what `other` would not.
    fn merge(&self, state: &mut Self::State, other: &Self::State, now: u64);
}

/// Which algorithm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    #[default]
    Gcra,
    SlidingWindow,
}

/// A rate as it is written and sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    pub algorithm: Algorithm,
    pub limit: NonZeroU32,
    pub period: Duration,
    /// What may pass at once after a quiet time. A sliding window has none.
    pub burst: NonZeroU32,
}

/// Why terms are no rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TermsError {
    #[error("period = {0:?} must be from {PERIOD_MIN:?} to {PERIOD_MAX:?}")]
    Period(Duration),
    #[error(
        "limit = {limit} in period = {period:?} is more than one per nanosecond; use a smaller limit"
    )]
    TooFast { limit: u32, period: Duration },
    #[error(
        "burst = {burst} at limit = {limit} in period = {period:?} takes longer than {FILL_MAX:?} to fill"
    )]
    Burst {
        burst: u32,
        limit: u32,
        period: Duration,
    },
    #[error("limit = {0} must be at most {SLIDING_LIMIT_MAX} with algorithm = \"sliding_window\"")]
    SlidingLimit(u32),
}

impl Terms {
    /// Whether these terms are within the bounds that the arithmetic of the algorithms needs.
    pub fn check(&self) -> Result<(), TermsError> {
        let (limit, burst, period) = (self.limit.get(), self.burst.get(), self.period);
        if !(PERIOD_MIN..=PERIOD_MAX).contains(&period) {
            return Err(TermsError::Period(period));
        }
        if u128::from(limit) > period.as_nanos() {
            return Err(TermsError::TooFast { limit, period });
        }
        match self.algorithm {
            Algorithm::SlidingWindow if limit > SLIDING_LIMIT_MAX => {
                Err(TermsError::SlidingLimit(limit))
            }
            Algorithm::Gcra
                if period.as_nanos() * u128::from(burst)
                    > FILL_MAX.as_nanos() * u128::from(limit) =>
            {
                Err(TermsError::Burst {
                    burst,
                    limit,
                    period,
                })
            }
            Algorithm::Gcra | Algorithm::SlidingWindow => Ok(()),
        }
    }

    /// What may pass at once at the most.
    pub fn at_once(&self) -> u32 {
        match self.algorithm {
            Algorithm::Gcra => self.burst.get(),
            Algorithm::SlidingWindow => self.limit.get(),
        }
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// What stands for a key where other processes see it: 16 bytes of SHA-256 over the limit's name and the
/// key, so that nobody can choose a key that shares another's limit.
pub fn key_hash(limit: &str, key: &str) -> u128 {
    let digest = Sha256::new()
        .chain_update(b"dormouse rate limit\0")
        .chain_update(u64::try_from(limit.len()).unwrap_or(u64::MAX).to_be_bytes())
        .chain_update(limit)
        .chain_update(key)
        .finalize();
    u128::from_be_bytes(digest[..16].try_into().expect("16 of 32 bytes"))
}

#[cfg(test)]
mod tests;
