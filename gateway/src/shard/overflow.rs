//! Shards for hot keys: a key has one, until a rate limit says that it is too much for that.
//!
//! Each shard of a key has a bucket, as keys of limits have. A request goes to the first shard whose bucket lets it
//! pass, so a key has as many shards as its rate needs, and fewer again when it cools down; nothing else is
//! remembered of it. What is more than all of them should get is spread evenly.

use std::fmt;

use ops::config::Broken;
use protocol::rate::{Algorithm, Decision, Gcra, Terms};
use rand::Rng;
use tokio::time::Instant;
use xxhash_rust::xxh3::xxh3_128_with_seed;

use crate::config::ShardConfig;
use crate::limit::table::Table;

/// Most shards of a key: each that is used up costs the next request a look.
const COUNT_MAX: u32 = 256;

/// Shards of keys that are remembered in full: 3 MB of a route, if it has so many.
const REMEMBERED: usize = 100_000;

pub(super) struct Overflow {
    count: u32,
    buckets: Table<Gcra>,
    /// Whoever does not know it cannot choose keys that share a bucket.
    seed: u64,
    begun: Instant,
}

impl fmt::Debug for Overflow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Overflow");
        shown.field("count", &self.count).finish_non_exhaustive()
    }
}

impl Overflow {
    /// # Errors
    /// The key, below `shard`, that breaks a rule.
    pub(super) fn new(config: &ShardConfig) -> Result<Self, Broken> {
        let limit = config.limit.ok_or_else(|| {
            let rule = "must say how many requests one shard of a key gets in each period";
            Broken::new("limit", rule)
        })?;
        if !(1..=COUNT_MAX).contains(&config.count) {
            let rule = format!("must be from 1 to {COUNT_MAX} with hash = \"overflow\"");
            return Err(Broken::value("count", config.count, rule));
        }
        let terms = Terms {
            algorithm: Algorithm::Gcra,
            limit,
            period: config.period,
            burst: limit,
        };
        let checked = terms.check();
        checked.map_err(|error| Broken::new("limit", format!("breaks a rule: {error}")))?;
        let buckets = Table::new(Gcra::new(&terms), REMEMBERED);
        let buckets = buckets.ok_or_else(|| Broken::new("hash", "finds no memory for its buckets"));
        Ok(Self {
            count: config.count,
            buckets: buckets?,
            seed: rand::random(),
            begun: Instant::now(),
        })
    }

    /// The shard of a request with this key.
    pub(super) fn choose(&self, key: &str) -> u32 {
        let now = u64::try_from(self.begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let passes = |shard: &u32| {
            let seed = self.seed.wrapping_add(u64::from(*shard));
            let bucket = xxh3_128_with_seed(key.as_bytes(), seed);
            matches!(self.buckets.take(bucket, 1, now), Decision::Passed { .. })
        };
        let first = (0..self.count).find(passes);
        first.unwrap_or_else(|| rand::rng().random_range(0..self.count))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use super::*;

    fn overflow(count: u32, limit: u32) -> Overflow {
        let config = ShardConfig {
            count,
            limit: limit.try_into().ok(),
            ..ShardConfig::default()
        };
        Overflow::new(&config).unwrap()
    }

    /// How many of so many requests of a key each shard gets.
    fn shards(overflow: &Overflow, key: &str, requests: u32) -> BTreeMap<u32, u32> {
        let mut got = BTreeMap::new();
        for _ in 0..requests {
            *got.entry(overflow.choose(key)).or_default() += 1;
        }
        got
    }

    #[tokio::test(start_paused = true)]
    async fn a_hot_key_has_more_shards_while_it_is_hot_and_others_have_one() {
        let overflow = overflow(8, 100);
        assert_eq!(shards(&overflow, "cold", 100), [(0, 100)].into());
        let hot = shards(&overflow, "hot", 350);
        assert_eq!(hot, [(0, 100), (1, 100), (2, 100), (3, 50)].into());
        assert_eq!(shards(&overflow, "other", 7), [(0, 7)].into());
        // A second later all is forgiven.
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(shards(&overflow, "hot", 100), [(0, 100)].into());
        tokio::time::advance(Duration::from_millis(500)).await;
        assert_eq!(shards(&overflow, "hot", 60), [(0, 50), (1, 10)].into());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_too_much_for_all_shards_is_spread() {
        let overflow = overflow(4, 10);
        let got = shards(&overflow, "hot", 4040);
        assert!(
            got.values().all(|count| (800..1220).contains(count)),
            "{got:?}"
        );
        assert_eq!(got.values().sum::<u32>(), 4040);
    }
}
