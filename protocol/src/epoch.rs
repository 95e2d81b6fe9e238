//! What is newer than what: owners of a shard, and places in a commit log.

use std::fmt;
use std::num::NonZeroU64;

/// Counts the owners a shard has had; a higher epoch fences every lower one. Prints as `e7`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub NonZeroU64);

impl Epoch {
    /// The epoch of a shard that never moved.
    pub const FIRST: Self = Self(NonZeroU64::MIN);
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "e{}", self.0)
    }
}

/// A place in the commit log of one worker: bytes of records since the log began, whatever segments
/// they are in. Never goes back, but for what was never durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct LogPosition(pub u64);

impl LogPosition {
    /// The beginning: everything is at or after it.
    pub const ZERO: Self = Self(0);

    /// `bytes` further on.
    #[must_use]
    pub fn after(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

impl fmt::Display for LogPosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
