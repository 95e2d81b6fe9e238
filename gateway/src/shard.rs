//! Which shard of many: the number that routes put into names, as in `shard:{shard}`.

mod overflow;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use ops::config::Broken;
use rand::Rng;
use xxhash_rust::xxh3::xxh3_64;

use crate::asked::Asked;
use crate::config::{ShardConfig, ShardHash};
use crate::template::{Incomplete, Template};
use overflow::Overflow;

/// Most shards of one route: each is counted, to show how even they are.
const COUNT_MAX: u32 = 100_000;

/// Fewer and more are legal, but seldom meant.
const COUNT_ADVISED: std::ops::RangeInclusive<u32> = 10..=1000;

/// The `shard` table of a route, ready to choose.
#[derive(Debug)]
pub struct Sharding {
    how: How,
    count: u32,
    /// Requests that each shard got.
    load: Box<[AtomicU64]>,
}

#[derive(Debug)]
enum How {
    Xxh3(Template),
    Java31(Template),
    /// The bounds are in lower case and ascend.
    Range(Template, Box<[String]>),
    Random,
    RoundRobin(AtomicU32),
    Overflow(Template, Box<Overflow>),
}

impl Sharding {
    /// # Errors
    /// The key, below `shard`, that breaks a rule.
    pub fn new(config: &ShardConfig, params: &[Box<str>]) -> Result<Self, Broken> {
        let by = || {
            let by = Template::key(&config.by, params);
            let by = by.map_err(|error| Broken::new("by", error.to_string()))?;
            let constant = by.sources().next().is_none();
            match constant {
                false => Ok(by),
                true => Err(Broken::value(
                    "by",
                    &config.by,
                    "must take something from the request, or all requests go to one shard",
                )),
            }
        };
        let mut count = config.count;
        let how = match config.hash {
            ShardHash::Xxh3 => How::Xxh3(by()?),
            ShardHash::Java31 => How::Java31(by()?),
            ShardHash::Range => {
                let bounds = bounds(&config.bounds)?;
                count = u32::try_from(bounds.len() + 1).unwrap_or(u32::MAX);
                How::Range(by()?, bounds)
            }
            ShardHash::Random => How::Random,
            ShardHash::RoundRobin => How::RoundRobin(AtomicU32::new(0)),
            ShardHash::Overflow => How::Overflow(by()?, Box::new(Overflow::new(config)?)),
        };
        if config.limit.is_some() && config.hash != ShardHash::Overflow {
            return Err(Broken::new("limit", "is for hash = \"overflow\" only"));
        }
        if !config.bounds.is_empty() && config.hash != ShardHash::Range {
            return Err(Broken::new("bounds", "are for hash = \"range\" only"));
        }
        if !(1..=COUNT_MAX).contains(&count) {
            return Err(Broken::value(
                "count",
                count,
                format!("must be from 1 to {COUNT_MAX}"),
            ));
        }
        Ok(Self {
            how,
            count,
            load: (0..count).map(|_| AtomicU64::new(0)).collect(),
        })
    }

    /// The shard of a request. `scratch` is overwritten.
    pub fn choose(&self, asked: &Asked<'_>, scratch: &mut String) -> Result<u32, Incomplete<'_>> {
        scratch.clear();
        let shard = match &self.how {
            How::Xxh3(by) => {
                by.render(asked, scratch)?;
                // Multiply-shift: the same share for every shard, without a division.
                let wide = u128::from(xxh3_64(scratch.as_bytes())) * u128::from(self.count);
                u32::try_from(wide >> 64).expect("less than count")
            }
            How::Java31(by) => {
                by.render(asked, scratch)?;
                u32::try_from(java31(scratch) % u64::from(self.count)).expect("less than count")
            }
            How::Range(by, bounds) => {
                by.render(asked, scratch)?;
                scratch.make_ascii_lowercase();
                let below = bounds.partition_point(|bound| bound <= scratch);
                u32::try_from(below).expect("there are count - 1 bounds")
            }
            How::Random => rand::rng().random_range(0..self.count),
            How::RoundRobin(next) => next.fetch_add(1, Ordering::Relaxed) % self.count,
            How::Overflow(by, overflow) => {
                by.render(asked, scratch)?;
                overflow.choose(scratch)
            }
        };
        self.load[shard as usize].fetch_add(1, Ordering::Relaxed);
        Ok(shard)
    }

    /// The load of the busiest shard over the mean; 1 is even. `None` before the first request, and where it is meant
    /// to be uneven.
    pub fn skew(&self) -> Option<f64> {
        if matches!(self.how, How::Overflow(..)) {
            return None;
        }
        let load = self.load.iter().map(|load| load.load(Ordering::Relaxed));
        let (sum, max) = load.fold((0, 0), |(sum, max), load| (sum + load, max.max(load)));
        (sum > 0).then(|| max as f64 * f64::from(self.count) / sum as f64)
    }

    /// What an operator should hear of.
    pub fn warning(&self) -> Option<String> {
        let spread = !matches!(self.how, How::Range(..) | How::Overflow(..));
        (spread && !COUNT_ADVISED.contains(&self.count)).then(|| {
            format!(
                "shard.count = {}: from {} to {} are advised",
                self.count,
                COUNT_ADVISED.start(),
                COUNT_ADVISED.end()
            )
        })
    }
}

fn bounds(bounds: &[String]) -> Result<Box<[String]>, Broken> {
    if bounds.is_empty() {
        return Err(Broken::new(
            "bounds",
            "must say where the second shard begins, as in [\"n\"]",
        ));
    }
    let lower: Box<[String]> = bounds.iter().map(|b| b.to_ascii_lowercase()).collect();
    match lower.windows(2).position(|pair| pair[0] >= pair[1]) {
        Some(place) => Err(Broken::value(
            "bounds",
            bounds,
            format!("must ascend, and {:?} does not", bounds[place + 1]),
        )),
        None => Ok(lower),
    }
}

/// The `hashCode` of many JavaScript examples of sharding, with its peculiarity: only the shifted term is
/// cut to 32 bits, the difference is not. A port that wraps every step gives other shards.
///
/// Works on UTF-16 units. Exact as long as the original is: up to about a million characters.
pub fn java31(text: &str) -> u64 {
    let hash = text.encode_utf16().fold(0_i64, |hash, unit| {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "the rule: JavaScript's << works on 32 bits"
        )]
        let shifted = (hash as i32).wrapping_shl(5);
        i64::from(shifted) - hash + i64::from(unit)
    });
    hash.unsigned_abs()
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;

    use super::*;

    #[test]
    fn java31_gives_the_golden_values() {
        for (text, hash, shard) in [
            ("", 0, 0),
            ("a", 97, 97),
            ("user", 3_599_307, 7),
            ("user-1", 836_031_825, 25),
            ("alice@example.com", 2_149_194_435, 35),
            ("unknown", 284_840_886, 86),
            ("SFO:unknown", 1_264_778_028, 28),
            ("日本語", 25_921_943, 43),
            ("😀", 1_772_899, 99),
            ("null", 3_392_903, 3),
        ] {
            assert_eq!((java31(text), java31(text) % 100), (hash, shard), "{text}");
        }
    }

    fn sharding(toml: &str) -> Result<Sharding, String> {
        let config: ShardConfig = toml::from_str(toml).unwrap();
        Sharding::new(&config, &[]).map_err(|broken| broken.to_string())
    }

    fn choose(sharding: &Sharding, query: &str) -> u32 {
        let headers = HeaderMap::new();
        let target = format!("/?{query}");
        let asked = crate::asked::tests::asked(&target, &headers);
        sharding.choose(&asked, &mut "junk".to_owned()).unwrap()
    }

    #[test]
    fn java31_is_what_the_snippet_with_a_fallback_computes() {
        let sharding = sharding("by = '{query.userId|unknown}'\nhash = 'java31'").unwrap();
        assert_eq!(choose(&sharding, "userId=alice@example.com"), 35);
        assert_eq!(choose(&sharding, "userId="), 86);
        assert_eq!(choose(&sharding, ""), 86);
    }

    #[test]
    fn ranges_of_identifiers_have_their_shards() {
        let sharding = sharding("by = '{query.u|}'\nhash = 'range'\nbounds = ['G', 'n']").unwrap();
        for (user, shard) in [
            ("adams", 0),
            ("Frank", 0),
            ("g", 1),
            ("Miller", 1),
            ("N", 2),
            ("zoë", 2),
            ("", 0),
        ] {
            assert_eq!(choose(&sharding, &format!("u={user}")), shard, "{user}");
        }
    }

    #[test]
    fn hashed_and_random_shards_are_even_and_turns_exactly() {
        let rounds = 100_000;
        for (toml, most) in [
            ("by = '{query.u}'", 1.15),
            ("by = '{query.u}'\nhash = 'java31'", 1.15),
            ("hash = 'random'", 1.15),
            ("hash = 'round-robin'", 1.0),
        ] {
            let sharding = sharding(toml).unwrap();
            assert_eq!(sharding.skew(), None);
            for number in 0..rounds {
                choose(&sharding, &format!("u=user-{number}"));
            }
            let skew = sharding.skew().unwrap();
            assert!((1.0..=most).contains(&skew), "{toml}: {skew}");
        }
        let one = sharding("by = '{query.u}'").unwrap();
        choose(&one, "u=hot");
        assert_eq!(one.skew(), Some(100.0), "all load on one shard");
    }

    #[test]
    fn counts_outside_of_the_advice_are_warned_of() {
        let warning = |toml: &str| sharding(toml).unwrap().warning();
        assert_eq!(warning("by = '{query.u}'"), None);
        assert_eq!(warning("by = '{query.u}'\ncount = 10"), None);
        assert_eq!(warning("by = '{query.u}'\ncount = 1000"), None);
        let few = warning("by = '{query.u}'\ncount = 9").unwrap();
        assert!(few.contains("from 10 to 1000 are advised"), "{few}");
        assert!(warning("hash = 'random'\ncount = 1001").is_some());
    }

    #[test]
    fn tables_that_make_no_sense_are_refused() {
        let refused = |toml: &str, want: &str| {
            let error = sharding(toml).unwrap_err();
            assert!(error.contains(want), "{error:?} should say {want:?}");
        };
        refused("", "must take something from the request");
        refused("by = 'x'", "must take something from the request");
        refused("by = '{nope}'", "by template \"{nope}\", character 1");
        refused(
            "by = '{query.u}'\ncount = 0",
            "count = 0 must be from 1 to 100000",
        );
        refused(
            "by = '{query.u}'\nhash = 'range'",
            "where the second shard begins",
        );
        refused(
            "by = '{query.u}'\nhash = 'range'\nbounds = ['b', 'B']",
            "\"B\" does not",
        );
        refused(
            "hash = 'random'\nbounds = ['b']",
            "are for hash = \"range\" only",
        );
        refused(
            "hash = 'random'\nlimit = 5",
            "is for hash = \"overflow\" only",
        );
        refused(
            "by = '{query.u}'\nhash = 'overflow'",
            "limit must say how many requests",
        );
        refused(
            "by = '{query.u}'\nhash = 'overflow'\nlimit = 5\ncount = 257",
            "count = 257 must be from 1 to 256",
        );
        refused(
            "by = '{query.u}'\nhash = 'overflow'\nlimit = 5\nperiod = '1ms'",
            "period = 1ms must be from",
        );
        refused("hash = 'overflow'\nlimit = 5", "must take something");
    }
}
