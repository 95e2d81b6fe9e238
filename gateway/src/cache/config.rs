//! `[cache]`, and `cache` of routes.

use std::time::Duration;

use ops::config::Broken;
use serde::{Deserialize, Serialize};

/// The shortest time between two looks at the purges of others.
const PEERS_EVERY_MIN: Duration = Duration::from_millis(10);

/// `[cache]`: the memory for answers of routes that opt in, and whose purges count here too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CacheConfig {
    /// Of all answers kept, with those that are being received.
    pub bytes_max: u64,
    /// Larger answers are passed on, and not kept.
    pub entry_bytes_max: u64,
    /// Admin listeners of the other gateways. One's own may be among them.
    pub peers: Vec<String>,
    /// How often they are asked for their purges.
    #[serde(with = "humantime_serde")]
    pub peers_every: Duration,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            bytes_max: 64 << 20,
            entry_bytes_max: 1 << 20,
            peers: Vec::new(),
            peers_every: Duration::from_secs(1),
        }
    }
}

impl CacheConfig {
    /// # Errors
    /// The key that breaks a rule.
    pub fn validate(&self) -> Result<(), Broken> {
        // A quarter is for answers that are being received: one of them must fit.
        if self.entry_bytes_max > self.bytes_max / 4 {
            let rule = format!(
                "must be at most a quarter of bytes_max = {}",
                self.bytes_max
            );
            return Err(Broken::value("entry_bytes_max", self.entry_bytes_max, rule));
        }
        if usize::try_from(self.bytes_max).is_err() {
            let rule = "is more than this machine can address";
            return Err(Broken::value("bytes_max", self.bytes_max, rule));
        }
        if self.peers_every < PEERS_EVERY_MIN {
            let rule = format!("must be at least {PEERS_EVERY_MIN:?}");
            return Err(Broken::value("peers_every", self.peers_every, rule));
        }
        for (place, peer) in self.peers.iter().enumerate() {
            let port = peer.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
            if !matches!(port, Some(Ok(_))) {
                let broken = Broken::value(&place.to_string(), peer, "must be host:port");
                return Err(broken.under("peers"));
            }
        }
        Ok(())
    }
}

/// `cache` of a route: its answers to GET and HEAD are kept, as RFC 9111 allows.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RouteCacheConfig {
    /// A template: requests with the same one get the same answer. Empty: scheme, host, path and query.
    pub key: String,
    /// How long answers are fresh that do not say it. 0: those are not kept.
    #[serde(with = "humantime_serde")]
    pub default_ttl: Duration,
    /// How long all are, whatever they say; but for those that must not be kept.
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Duration>,
    /// For how long after that they are served while a new one is fetched, unless they say.
    #[serde(with = "humantime_serde")]
    pub stale_while_revalidate: Duration,
    /// For how long after that they are served instead of an error, unless they say.
    #[serde(with = "humantime_serde")]
    pub stale_if_error: Duration,
    /// Whether requests with cookies share answers with others.
    pub ignore_cookies: bool,
}
