//! `[limits.NAME]`: how many requests of one key may pass in how much time.

use std::num::NonZeroU32;
use std::time::Duration;

use ops::config::Broken;
use protocol::rate::{Algorithm, Terms};
use serde::{Deserialize, Serialize};

use crate::template::{Source, Template};

/// Longest name of a limit: it is part of names of objects and of headers.
const NAME_BYTES_MAX: usize = 64;

/// Largest table, about 2.9 GB with a bucket and 8.7 GB with a sliding window.
const KEYS_MAX_MAX: u32 = 100_000_000;

/// One limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitConfig {
    /// A template: requests with the same result share the limit.
    pub key: String,
    /// Requests per `period`.
    pub limit: NonZeroU32,
    #[serde(with = "humantime_serde")]
    pub period: Duration,
    /// Requests that may pass at once after a quiet time, with `gcra`. Absent: `limit`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst: Option<NonZeroU32>,
    #[serde(default)]
    pub algorithm: Algorithm,
    #[serde(default)]
    pub scope: Scope,
    #[serde(default)]
    pub mode: Mode,
    /// What happens to requests while the limiter objects of `colo` and `exact` cannot be reached.
    #[serde(default)]
    pub when_unreachable: WhenUnreachable,
    /// Keys that are remembered in full; more share what is left. See `limit/table.rs`.
    #[serde(default = "keys_max")]
    pub keys_max: NonZeroU32,
    /// Applies to every request, not only to routes that name it.
    #[serde(default)]
    pub everywhere: bool,
}

/// Who shares a limit. The guarantee of each is in ARCHITECTURE.md.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// The threads of one gateway.
    #[default]
    Process,
    /// The gateways of a colo: each leases some at a time from an object.
    Colo,
    /// All gateways: an object decides each request.
    Exact,
}

/// What a refusal does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    #[default]
    Enforce,
    /// Counts what it would refuse, and lets it pass.
    Shadow,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WhenUnreachable {
    /// They pass.
    #[default]
    Open,
    /// They are refused, `unavailable`.
    Closed,
}

fn keys_max() -> NonZeroU32 {
    NonZeroU32::new(1_000_000).expect("not 0")
}

impl LimitConfig {
    /// The rate that is written here.
    pub fn terms(&self) -> Terms {
        Terms {
            algorithm: self.algorithm,
            limit: self.limit,
            period: self.period,
            burst: self.burst.unwrap_or(self.limit),
        }
    }

    /// How long a gateway may use what it leased: a tenth of a period, at most ten seconds.
    pub fn lease(&self) -> Duration {
        (self.period / 10).min(Duration::from_secs(10))
    }

    /// The rate that objects decide by. What they grant is used up to one lease later; a window that is
    /// longer by that holds all the same. (A bucket's guarantee has the lease in it.)
    pub fn shared_terms(&self) -> Terms {
        let mut terms = self.terms();
        if self.scope == Scope::Colo && self.algorithm == Algorithm::SlidingWindow {
            terms.period += self.lease();
        }
        terms
    }

    /// What one field cannot check by itself.
    ///
    /// # Errors
    /// The key, below the name of the limit.
    pub fn validate(&self, name: &str) -> Result<(), Broken> {
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.');
        if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.bytes().all(legal) {
            let rule = format!(
                "the name of a limit must be 1 to {NAME_BYTES_MAX} letters, digits, '_', '-' or '.'"
            );
            return Err(Broken::new("key", rule));
        }
        let checked = self.terms().check();
        checked
            .and_then(|()| self.shared_terms().check())
            .map_err(|error| Broken::new("limit", format!("breaks a rule: {error}")))?;
        if let Some(burst) = self.burst
            && self.algorithm == Algorithm::SlidingWindow
        {
            let rule = "is for algorithm = \"gcra\"; a window has none";
            return Err(Broken::value("burst", burst, rule));
        }
        if self.keys_max.get() > KEYS_MAX_MAX {
            let rule = format!("must be at most {KEYS_MAX_MAX}");
            return Err(Broken::value("keys_max", self.keys_max, rule));
        }
        // Without a route there are no parameters of its path.
        if self.everywhere {
            self.template(&[])?;
        }
        Ok(())
    }

    /// The key for requests of a route with these parameters in its path.
    ///
    /// # Errors
    /// The key, below the name of the limit.
    pub fn template(&self, params: &[Box<str>]) -> Result<Template, Broken> {
        let template = Template::key(&self.key, params)
            .map_err(|error| Broken::new("key", format!("is no {error}")))?;
        if template.sources().any(|source| *source == Source::Shard) {
            let rule = "uses {shard}, and limits are asked before a shard is chosen";
            return Err(Broken::value("key", &self.key, rule));
        }
        Ok(template)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn refused(toml: &str, want: &str) {
        let refusal = match toml::from_str::<LimitConfig>(toml) {
            Ok(config) => config
                .validate("l")
                .unwrap_err()
                .under("limits")
                .to_string(),
            Err(error) => error.to_string(),
        };
        assert!(refusal.contains(want), "{refusal:?} should say {want:?}");
    }

    #[test]
    fn what_is_no_limit_is_refused_by_name() {
        let with = |more: &str| format!("key = '{{client.ip}}'\nlimit = 5\nperiod = '10s'\n{more}");
        refused("limit = 5\nperiod = '1s'", "missing field `key`");
        refused("key = 'k'\nlimit = 0\nperiod = '1s'", "nonzero");
        refused(&with("burst = 0"), "nonzero");
        refused(
            "key = 'k'\nlimit = 5\nperiod = '1ms'",
            "limits.limit breaks a rule: period = 1ms must be",
        );
        refused(
            &with("burst = 4\nalgorithm = 'sliding_window'"),
            "limits.burst = 4 is for",
        );
        refused(&with("keys_max = 200000000"), "must be at most");
        refused(&with("scope = 'galaxy'"), "unknown variant");
        refused(&with("brust = 4"), "unknown field");
        refused(
            "everywhere = true\nkey = '{path.x}'\nlimit = 5\nperiod = '1s'",
            "limits.key is no",
        );
        refused(
            "everywhere = true\nkey = '{shard}'\nlimit = 5\nperiod = '1s'",
            "before a shard is chosen",
        );
    }

    #[test]
    fn defaults_are_the_strict_and_simple_ones() {
        let config: LimitConfig = toml::from_str("key = 'k'\nlimit = 100\nperiod = '60s'").unwrap();
        config.validate("per-user").unwrap();
        assert_eq!(config.terms().burst.get(), 100);
        assert_eq!((config.scope, config.mode), (Scope::Process, Mode::Enforce));
        assert_eq!(config.lease(), Duration::from_secs(6));
        assert!(config.validate("per user").is_err());
    }
}
