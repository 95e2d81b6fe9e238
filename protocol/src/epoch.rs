//! What is newer than what: owners of a shard, and places in a commit log.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;

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

/// A moment in the life of an object, to go back to: everything that was committed at or before it, and
/// nothing after. Its text form, `{12 hex digits of time}-{16 of position}`, sorts like itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bookmark {
    /// Milliseconds since 1970; at most 2^48 - 1.
    pub unix_millis: u64,
    /// Among the commits of that millisecond: those that end here or before, in the log of their worker.
    pub position: LogPosition,
}

impl Bookmark {
    /// The end of a millisecond, with all that was committed in it.
    pub fn at_time(unix_millis: u64) -> Self {
        Self {
            unix_millis: unix_millis.min(MILLIS_MAX),
            position: LogPosition(u64::MAX),
        }
    }
}

/// Times of bookmarks have 12 hex digits: until the year 10889.
const MILLIS_MAX: u64 = (1 << 48) - 1;

impl fmt::Display for Bookmark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:012x}-{:016x}", self.unix_millis, self.position.0)
    }
}

/// Why a text is no bookmark.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no bookmark, which is 12 hex digits, a hyphen and 16 hex digits")]
pub struct BookmarkError(String);

impl FromStr for Bookmark {
    type Err = BookmarkError;

    fn from_str(text: &str) -> Result<Self, BookmarkError> {
        let parse = || {
            let (millis, position) = text.split_once('-')?;
            let legal = |text: &str, digits: usize| {
                text.len() == digits
                    && text
                        .bytes()
                        .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
            };
            (legal(millis, 12) && legal(position, 16)).then_some(())?;
            Some(Self {
                unix_millis: u64::from_str_radix(millis, 16).ok()?,
                position: LogPosition(u64::from_str_radix(position, 16).ok()?),
            })
        };
        parse().ok_or_else(|| BookmarkError(text.chars().take(60).collect()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bookmarks_read_back_and_sort_as_text(
            (a, b) in (0..=MILLIS_MAX, any::<u64>()),
            (c, d) in (0..=MILLIS_MAX, any::<u64>()),
        ) {
            let one = Bookmark { unix_millis: a, position: LogPosition(b) };
            let other = Bookmark { unix_millis: c, position: LogPosition(d) };
            prop_assert_eq!(one.to_string().parse(), Ok(one));
            prop_assert_eq!(one.cmp(&other), one.to_string().cmp(&other.to_string()));
        }
    }

    #[test]
    fn what_is_no_bookmark_is_said_to_be_none() {
        for text in [
            "",
            "-",
            "0-0",
            "00000000000G-0000000000000000",
            "000000000000-000000000000000",
        ] {
            let error = text.parse::<Bookmark>().unwrap_err().to_string();
            assert!(error.contains("is no bookmark"), "{error}");
        }
    }
}
