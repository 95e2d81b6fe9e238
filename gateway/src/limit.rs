//! Rate limits: who may come how often.
//!
//! A route has a [`Guard`]: its limits, each with the template of its key. A request's keys are hashed once
//! ([`Guard::keys`]) and then all limits are asked ([`Guard::admit`]). `process` limits are decided in a
//! [`table`]; those of `colo` and `exact` by objects, through [`shared`].

pub mod config;
pub mod shared;
pub mod table;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use http::header::RETRY_AFTER;
use http::{HeaderName, HeaderValue};
use ops::config::Broken;
use protocol::rate::{Algorithm, Decision, Gcra, NEVER, SlidingWindow};
use protocol::{ErrorCode, Problem, rate};
use serde::Serialize;
use tokio::time::Instant;
use xxhash_rust::xxh3::xxh3_128_with_seed;

use self::config::{LimitConfig, Mode, Scope, WhenUnreachable};
use self::shared::Shared;
use self::table::Table;
use crate::asked::Asked;
use crate::hot::{Hot, HotKey};
use crate::metrics::{LimitMetrics, Metrics};
use crate::refusal::Refusal;
use crate::template::Template;

/// Of so many requests, the keys of one are counted for operators.
pub(crate) const SAMPLE: u64 = 8;

/// Most limits that one request obeys.
pub const LIMITS_MAX: usize = 8;

/// draft-ietf-httpapi-ratelimit-headers-10.
const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");

/// Every limit of a configuration.
#[derive(Default)]
pub struct Limits(BTreeMap<String, Arc<Limit>>);

/// One limit, shared by all routes that name it.
struct Limit {
    name: Box<str>,
    config: LimitConfig,
    keeper: Keeper,
    seed: u64,
    begun: Instant,
    /// Value of `RateLimit-Policy`.
    policy: HeaderValue,
    metrics: LimitMetrics,
    /// Keys that came, one of [`SAMPLE`] counted, and keys that were refused.
    came: Hot,
    refused: Hot,
}

/// Who knows how much of a key was taken.
enum Keeper {
    Bucket(Table<Gcra>),
    Window(Table<SlidingWindow>),
    Shared(Shared),
}

/// Keys of one limit as operators see them.
#[derive(Debug, Serialize)]
pub struct HotLimit {
    rate: Vec<HotKey>,
    refusals: Vec<HotKey>,
}

/// What one limit says of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Passed,
    /// For this many nanoseconds.
    Refused {
        wait: u64,
    },
    /// The object that decides cannot be asked.
    Unreachable,
}

impl From<Decision> for Outcome {
    fn from(decision: Decision) -> Self {
        match decision {
            Decision::Passed { .. } => Self::Passed,
            Decision::Refused { wait } => Self::Refused { wait },
        }
    }
}

impl Limits {
    /// `config` was validated. Limits that are the same as `before` keep what they know.
    ///
    /// # Errors
    /// A table that there is no memory for.
    pub fn new(
        config: &BTreeMap<String, LimitConfig>,
        before: &Self,
        metrics: &Metrics,
        link: &shared::Link,
    ) -> Result<Self, Broken> {
        let limits = config.iter().map(|(name, config)| {
            let known = before.0.get(name).filter(|known| known.config == *config);
            let limit = match known {
                Some(known) => Arc::clone(known),
                None => Arc::new(Limit::new(name, config, metrics, link)?),
            };
            Ok((name.clone(), limit))
        });
        Ok(Self(limits.collect::<Result<_, _>>()?))
    }

    /// The limits of these names and those that apply everywhere, for requests of a route with these
    /// parameters in its path.
    ///
    /// # Errors
    /// A name that there is not, a key that needs a parameter that there is not, too many.
    pub fn guard(
        config: &BTreeMap<String, LimitConfig>,
        names: &[String],
        params: &[Box<str>],
    ) -> Result<Vec<(String, Template)>, Broken> {
        let mut found = Vec::new();
        let template = |name: &String, limit: &LimitConfig| {
            let template = limit.template(params);
            let template = template.map_err(|broken| {
                Broken::new("limits", format!("has {name:?}, of which {broken}"))
            });
            template.map(|template| (name.clone(), template))
        };
        for name in names {
            let Some(limit) = config.get(name) else {
                let known: Vec<&str> = config.keys().map(String::as_str).collect();
                let rule = format!("is not among the limits ({})", known.join(", "));
                return Err(Broken::value("limits", name, rule));
            };
            if !limit.everywhere {
                found.push(template(name, limit)?);
            }
        }
        for (name, limit) in config.iter().filter(|(_, limit)| limit.everywhere) {
            found.push(template(name, limit)?);
        }
        if found.len() > LIMITS_MAX {
            let rule = format!(
                "are {} with those that apply everywhere; one request obeys at most {LIMITS_MAX}",
                found.len()
            );
            return Err(Broken::new("limits", rule));
        }
        // Those that can be given back come first: what an object took is taken.
        found.sort_by_key(|(name, _)| config[name].scope);
        Ok(found)
    }

    /// The guard with what [`guard`](Self::guard) found.
    pub fn arm(&self, found: Vec<(String, Template)>) -> Guard {
        let uses = found.into_iter().filter_map(|(name, key)| {
            let limit = Arc::clone(self.0.get(&name)?);
            Some(Use { limit, key })
        });
        Guard(uses.collect())
    }

    /// What comes and what is refused most, by limit.
    pub fn hot(&self) -> BTreeMap<&str, HotLimit> {
        let hot = self.0.values().map(|limit| {
            let hot = HotLimit {
                rate: limit.came.top(),
                refusals: limit.refused.top(),
            };
            (&*limit.name, hot)
        });
        hot.collect()
    }

    /// Publishes what is not counted request by request.
    pub fn publish(&self) {
        for limit in self.0.values() {
            let (keys, evictions) = match &limit.keeper {
                Keeper::Bucket(table) => table.stats(),
                Keeper::Window(table) => table.stats(),
                Keeper::Shared(shared) => (shared.keys(), 0),
            };
            limit.metrics.keys.set(keys as f64);
            limit.metrics.evictions.absolute(evictions);
        }
    }
}

impl Limit {
    fn new(
        name: &str,
        config: &LimitConfig,
        metrics: &Metrics,
        link: &shared::Link,
    ) -> Result<Self, Broken> {
        let terms = config.terms();
        let keys_max = config.keys_max.get() as usize;
        let keeper = match (config.scope, config.algorithm) {
            (Scope::Process, Algorithm::Gcra) => {
                Table::new(Gcra::new(&terms), keys_max).map(Keeper::Bucket)
            }
            (Scope::Process, Algorithm::SlidingWindow) => {
                Table::new(SlidingWindow::new(&terms), keys_max).map(Keeper::Window)
            }
            (Scope::Colo | Scope::Exact, _) => {
                Some(Keeper::Shared(Shared::new(name, config, link)))
            }
        };
        let keeper = keeper.ok_or_else(|| {
            let rule = "needs more memory than the system gives";
            let broken = Broken::value("keys_max", config.keys_max, rule);
            broken.under(name).under("limits")
        })?;
        let policy = format!("\"{name}\";q={};w={}", config.limit, seconds(config.period));
        Ok(Self {
            name: name.into(),
            config: config.clone(),
            keeper,
            // Whoever does not know it cannot choose keys that meet in one place of the table.
            seed: rand::random(),
            begun: Instant::now(),
            policy: HeaderValue::from_str(&policy).expect("names of limits are visible ASCII"),
            metrics: metrics.limit(name),
            came: Hot::default(),
            refused: Hot::default(),
        })
    }

    fn hash(&self, key: &str) -> u128 {
        match self.keeper {
            Keeper::Bucket(_) | Keeper::Window(_) => xxh3_128_with_seed(key.as_bytes(), self.seed),
            Keeper::Shared(_) => rate::key_hash(&self.name, key),
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    async fn take(&self, key: u128, now: u64) -> Outcome {
        match &self.keeper {
            Keeper::Bucket(table) => table.take(key, 1, now).into(),
            Keeper::Window(table) => table.take(key, 1, now).into(),
            Keeper::Shared(shared) => shared.take(key, now).await,
        }
    }

    fn give_back(&self, key: u128, taken: u64) {
        match &self.keeper {
            Keeper::Bucket(table) => table.give_back(key, 1, taken),
            Keeper::Window(table) => table.give_back(key, 1, taken),
            Keeper::Shared(shared) => shared.give_back(key),
        }
    }

    fn refusal(&self, wait: u64) -> Refusal {
        let wait = Duration::from_nanos(wait.min(NEVER - 1));
        let seconds = seconds(wait);
        let state = format!("\"{}\";r=0;t={seconds}", self.name);
        let problem = Problem::new(
            ErrorCode::RateLimited,
            format!(
                "limit {:?} lets {} requests pass in {:?}; the next one in {seconds} s",
                self.name, self.config.limit, self.config.period
            ),
        );
        let mut refusal = Refusal::from(problem)
            .with(RETRY_AFTER, HeaderValue::from(seconds))
            .with(RATE_LIMIT_POLICY, self.policy.clone());
        refusal.text = Some("Rate limited");
        match HeaderValue::from_str(&state) {
            Ok(state) => refusal.with(RATE_LIMIT, state),
            Err(_) => refusal,
        }
    }
}

/// Whether this request is one of those that are counted: by chance, or clients that take turns would be
/// seen wrong.
pub(crate) fn is_sampled() -> bool {
    thread_local! {
        static STATE: Cell<u64> = const { Cell::new(1) };
    }
    // Knuth's linear congruential generator; its upper bits are good enough for this.
    let next = STATE
        .get()
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    STATE.set(next);
    (next >> 32).is_multiple_of(SAMPLE)
}

/// Whole seconds, rounded up.
fn seconds(duration: Duration) -> u64 {
    duration.as_secs() + u64::from(duration.subsec_nanos() > 0)
}

/// The limits that requests of one route obey.
#[derive(Default)]
pub struct Guard(Box<[Use]>);

struct Use {
    limit: Arc<Limit>,
    key: Template,
}

/// The keys of one request, in the order of its guard.
pub struct Keys {
    hashes: [u128; LIMITS_MAX],
    /// One after the other, and where each ends.
    texts: String,
    ends: [usize; LIMITS_MAX],
}

/// When each limit let a request pass, by its own clock; `None` if it took nothing.
pub struct Taken([Option<u64>; LIMITS_MAX]);

impl Keys {
    fn text(&self, number: usize) -> &str {
        let start = match number {
            0 => 0,
            _ => self.ends[number - 1],
        };
        &self.texts[start..self.ends[number]]
    }
}

impl Guard {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Makes and hashes the keys of a request.
    ///
    /// # Errors
    /// `bad_request` if a key needs a value that the request lacks.
    pub fn keys(&self, asked: &Asked<'_>) -> Result<Keys, Refusal> {
        let mut keys = Keys {
            hashes: [0; LIMITS_MAX],
            texts: String::new(),
            ends: [0; LIMITS_MAX],
        };
        for (number, used) in self.0.iter().enumerate() {
            let start = keys.texts.len();
            used.key.render(asked, &mut keys.texts).map_err(|lacking| {
                Problem::bad_request(format!("{lacking}: limit {:?} needs it", used.limit.name))
            })?;
            keys.ends[number] = keys.texts.len();
            keys.hashes[number] = used.limit.hash(&keys.texts[start..]);
        }
        Ok(keys)
    }

    /// Gives back what [`admit`](Self::admit) took.
    pub fn refund(&self, keys: &Keys, taken: &Taken) {
        for ((used, key), taken) in self.0.iter().zip(keys.hashes).zip(taken.0) {
            if let Some(taken) = taken {
                used.limit.give_back(key, taken);
            }
        }
    }

    /// Asks all limits. If any refuses, what the others took is given back; with scope `colo` to the lease
    /// of this gateway, and with `exact` not: such limits come last.
    ///
    /// # Errors
    /// The refusal with the longest wait.
    pub async fn admit(&self, keys: &Keys) -> Result<Taken, Refusal> {
        let mut taken = Taken([None; LIMITS_MAX]);
        let mut worst: Option<(u64, &Limit)> = None;
        let mut unreachable = None;
        let sampled = is_sampled();
        for (number, used) in self.0.iter().enumerate() {
            let (limit, key) = (&*used.limit, keys.hashes[number]);
            if sampled {
                limit.came.count(keys.text(number), SAMPLE);
            }
            if matches!(limit.keeper, Keeper::Shared(_)) && worst.is_some() {
                // It would be taken in vain.
                continue;
            }
            let now = limit.now();
            let enforced = limit.config.mode == Mode::Enforce;
            match limit.take(key, now).await {
                Outcome::Passed => {
                    limit.metrics.passed.increment(1);
                    taken.0[number] = Some(now);
                }
                Outcome::Refused { .. } if !enforced => {
                    limit.metrics.shadow_refused.increment(1);
                    limit.refused.count(keys.text(number), 1);
                }
                Outcome::Refused { wait } => {
                    limit.metrics.refused.increment(1);
                    limit.refused.count(keys.text(number), 1);
                    if worst.is_none_or(|(longest, _)| wait > longest) {
                        worst = Some((wait, limit));
                    }
                }
                Outcome::Unreachable => {
                    limit.metrics.unreachable.increment(1);
                    if enforced && limit.config.when_unreachable == WhenUnreachable::Closed {
                        unreachable = Some(limit);
                    }
                }
            }
        }
        if worst.is_none() && unreachable.is_none() {
            return Ok(taken);
        }
        self.refund(keys, &taken);
        Err(match (worst, unreachable) {
            (Some((wait, limit)), _) => limit.refusal(wait),
            (None, limit) => Problem::unavailable(format!(
                "limit {:?} cannot be asked, and lets nothing pass unasked",
                limit.map_or("", |limit| &limit.name)
            ))
            .into(),
        })
    }
}
