//! What an object's alarm is: the words that its database, the commit log, the catalog and the timers
//! share.
//!
//! An object has at most one alarm (<https://developers.cloudflare.com/durable-objects/api/alarms/>). Its
//! truth is a row in the object's own database, changed in the same commit as the object's data. A
//! commit that changes it tells the log, the log tells the catalog, both tell the timers. So a timer
//! may ring for nothing, which costs a look, but it is never missing.

use std::time::Duration;

use serde::Serialize;

/// An alarm that is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Pending {
    /// When the class wanted it to run; milliseconds since 1970.
    pub scheduled_ms: u64,
    /// When it runs next: then, or later for another try.
    pub next_ms: u64,
    /// Tries that failed.
    pub retries: u32,
}

/// An alarm that was given up after its last retry failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeadLetter {
    pub scheduled_ms: u64,
    pub failed_ms: u64,
    /// What the last try said, cut to [`ERROR_BYTES_MAX`].
    pub error: String,
}

/// Everything that is to be known of one object's alarm.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct AlarmState {
    #[serde(rename = "alarm")]
    pub pending: Option<Pending>,
    /// The latest alarm that was given up, until somebody runs it again or drops it.
    #[serde(rename = "dead_letter")]
    pub dead: Option<DeadLetter>,
}

/// What a handler is told of the alarm that it runs for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AlarmInfo {
    /// When it was to run; milliseconds since 1970. After downtime that may be long ago.
    pub scheduled_ms: u64,
    /// Tries before this one that failed; 0 for the first.
    pub retry_count: u32,
}

impl AlarmInfo {
    pub fn is_retry(&self) -> bool {
        self.retry_count > 0
    }
}

/// Tries after the first. If the last of them fails, the alarm becomes a dead letter.
pub const RETRIES_MAX: u32 = 6;

/// The pause before the first retry; each further one is twice as long.
pub const RETRY_FIRST: Duration = Duration::from_secs(2);

/// Longest error that is kept with a dead letter.
pub const ERROR_BYTES_MAX: usize = 512;

/// The latest time an alarm may be set to: the year 9999. Beyond it, times have no text form.
pub const ALARM_MILLIS_MAX: u64 = 253_402_300_799_999;

impl AlarmState {
    /// After a try that failed at `now`.
    pub fn after_failure(self, now: u64, error: &str) -> Self {
        let Some(pending) = self.pending else {
            return self;
        };
        if pending.retries >= RETRIES_MAX {
            let dead = DeadLetter {
                scheduled_ms: pending.scheduled_ms,
                failed_ms: now,
                error: clip(error).to_owned(),
            };
            return Self {
                pending: None,
                dead: Some(dead),
            };
        }
        let pause = RETRY_FIRST * 2u32.pow(pending.retries);
        Self {
            pending: Some(Pending {
                next_ms: now + u64::try_from(pause.as_millis()).unwrap_or(u64::MAX),
                retries: pending.retries + 1,
                ..pending
            }),
            dead: self.dead,
        }
    }
}

/// The beginning of an error, as much as is kept.
pub(crate) fn clip(text: &str) -> &str {
    let mut end = text.len().min(ERROR_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_double_from_two_seconds_and_the_seventh_failure_is_the_last() {
        let mut state = AlarmState {
            pending: Some(Pending {
                scheduled_ms: 1000,
                next_ms: 1000,
                retries: 0,
            }),
            dead: None,
        };
        let mut now = 1000;
        let mut pauses = Vec::new();
        while let Some(pending) = state.pending {
            now = pending.next_ms;
            state = state.after_failure(now, "é".repeat(400).as_str());
            pauses.extend(state.pending.map(|pending| pending.next_ms - now));
        }
        assert_eq!(pauses, [2000, 4000, 8000, 16_000, 32_000, 64_000]);
        let dead = state.dead.unwrap();
        assert_eq!((dead.scheduled_ms, dead.failed_ms), (1000, now));
        assert_eq!(dead.error, "é".repeat(256));
    }
}
