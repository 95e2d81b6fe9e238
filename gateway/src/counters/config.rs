//! `[counters]`.

use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};

/// `[counters]`: sharded counters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CountersConfig {
    /// A template of who asks, for counters with the strategy `hash`: one client, one shard.
    pub key: String,
    /// Whether increments that come together, and may go to the same shard, go together.
    pub combine: bool,
    /// Increments that may wait for one shard, or for any of one counter, per thread. One more is refused as `overloaded`.
    pub waiting_max: NonZeroU32,
    /// Counters whose plans are remembered. Those that were not used for longest are asked for again.
    pub plans_max: NonZeroU32,
}

impl Default for CountersConfig {
    fn default() -> Self {
        Self {
            key: "{client.ip}".to_owned(),
            combine: true,
            waiting_max: NonZeroU32::new(10_000).expect("not 0"),
            plans_max: NonZeroU32::new(100_000).expect("not 0"),
        }
    }
}
