//! Time, as the rest of the node may know it. Timers go through `tokio::time`, which tests can hold.

use std::sync::OnceLock;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// The wall clock that objects see.
pub trait Clock: Send + Sync {
    /// Milliseconds since 1970, UTC; may jump when the machine's clock is set.
    fn unix_millis(&self) -> u64;
}

/// The machine's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[expect(
        clippy::disallowed_methods,
        reason = "this is where the time comes from"
    )]
    fn unix_millis(&self) -> u64 {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }
}

/// Nanoseconds since some moment after the process began; never goes back.
///
/// For the time that SQL runs: real time even where a test holds the timers.
#[expect(
    clippy::disallowed_methods,
    reason = "this is where the time comes from"
)]
pub fn monotonic_nanos() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    let since = START.get_or_init(Instant::now).elapsed();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
