//! `[connections]`: bounds of what clients may hold, however they behave.

use std::num::NonZeroU32;
use std::time::Duration;

use ops::config::Broken;
use serde::{Deserialize, Serialize};

/// Headers of one request that the HTTP/1.1 parser takes.
const HEADERS_PARSED_MAX: u32 = 256;

/// Bytes of one head that pingora takes.
const HEAD_PARSED_BYTES_MAX: u32 = 1 << 20;

/// What breaks the bounds of a head is answered 408, 414 or 431.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConnectionsConfig {
    /// Connections of all clients together. One more is closed at once.
    pub open_max: NonZeroU32,
    /// Connections of one client address, unless it is a trusted proxy. 0: no bound.
    pub per_client_max: u32,
    /// Without a request.
    #[serde(with = "humantime_serde")]
    pub idle_max: Duration,
    /// From the first byte of a head to its last.
    #[serde(with = "humantime_serde")]
    pub head_max: Duration,
    /// Request line and headers.
    pub head_bytes_max: u32,
    pub headers_max: u32,
    /// Path and query.
    pub uri_bytes_max: u32,
    /// Silence while a client owes bytes of its body, or takes none of its answer.
    #[serde(with = "humantime_serde")]
    pub stall_max: Duration,
    /// Slower bodies are given up, once they took `body_grace`. 0: no bound.
    pub body_bytes_per_second_min: u32,
    #[serde(with = "humantime_serde")]
    pub body_grace: Duration,
    /// Requests at once on one HTTP/2 connection.
    pub streams_max: NonZeroU32,
}

impl Default for ConnectionsConfig {
    fn default() -> Self {
        Self {
            open_max: NonZeroU32::new(50_000).expect("not 0"),
            per_client_max: 0,
            idle_max: Duration::from_secs(60),
            head_max: Duration::from_secs(10),
            head_bytes_max: 64 << 10,
            headers_max: 100,
            uri_bytes_max: 16 << 10,
            stall_max: Duration::from_secs(60),
            body_bytes_per_second_min: 500,
            body_grace: Duration::from_secs(20),
            streams_max: NonZeroU32::new(100).expect("not 0"),
        }
    }
}

impl ConnectionsConfig {
    /// # Errors
    /// The key, below `connections`, that breaks a rule.
    pub fn check(&self) -> Result<(), Broken> {
        let ranges = [
            (
                "head_bytes_max",
                self.head_bytes_max,
                1024,
                HEAD_PARSED_BYTES_MAX,
            ),
            ("headers_max", self.headers_max, 1, HEADERS_PARSED_MAX),
            ("uri_bytes_max", self.uri_bytes_max, 64, self.head_bytes_max),
        ];
        for (key, value, least, most) in ranges {
            if !(least..=most).contains(&value) {
                let rule = format!("must be from {least} to {most}");
                return Err(Broken::value(key, value, rule));
            }
        }
        for (key, time) in [
            ("idle_max", self.idle_max),
            ("head_max", self.head_max),
            ("stall_max", self.stall_max),
        ] {
            if time.is_zero() {
                return Err(Broken::value(key, time, "must be above 0"));
            }
        }
        Ok(())
    }

    /// For pingora, which counts in seconds.
    pub fn idle_seconds(&self) -> u64 {
        self.idle_max
            .as_millis()
            .div_ceil(1000)
            .try_into()
            .unwrap_or(u64::MAX)
    }
}
