//! Sharded counters: what gateways, shards and coordinators say to each other.
//!
//! A counter is one object of the class [`COORDINATOR`], with the counter's name, and any number of the class
//! [`SHARD`]. A gateway asks the coordinator for the counter's [`Plan`] and sends each increment to one of the
//! shards. A shard keeps a total, and reports it, absolute, to the coordinator, which keeps the sum.
//!
//! | call to | method | arguments | answer |
//! |---|---|---|---|
//! | coordinator | [`PLAN`] | place, whether that colo has nodes, the newest version that the gateway heard of | [`Plan`] |
//! | coordinator | [`READ`] | exact | [`Total`] |
//! | coordinator | [`RESHARD`] | [`Change`] | [`Standing`] |
//! | coordinator | [`STANDING`] | | [`Standing`] |
//! | coordinator | [`REPORT`] | [`Report`] | [`Reported`] |
//! | shard | [`ADD`] | by, version of the plan | [`Added`] |
//! | shard | [`ADD_ONCE`] | key, by, version, [`Seat`]s | [`Added`] |
//! | shard | [`CLAIM`] | key, version | [`Claimed`] |
//! | shard | [`TELL`] | | [`Tally`] |
//! | shard | [`RETIRE`] | version | [`Tally`] |
//!
//! **Exactness.** Plans have versions. A shard that a plan leaves out is *retired* with that plan's version:
//! from then on it takes no increment of that or an older plan, so that its total, which the coordinator adds to
//! its base in one transaction, is final. A later plan may take it in again; it then begins at zero, as another
//! *generation*. Reports of older generations are ignored. So the total is conserved at every moment.
//!
//! **Versions never go back.** A coordinator that was deleted, or restored as of an earlier time, has forgotten plans
//! that gateways and shards still go by. Both say which version they have heard of; a coordinator that hears of
//! one above its own goes on above that. A shard of a forgotten plan that reports is retired, so that what was
//! acknowledged meanwhile is in the total.
//!
//! **Idempotency keys** are remembered by the shard that counted them for [`KEYS_KEPT`]. A key belongs to the
//! shard that [`jump`] says. When plans change, keys change hands: the shard that has a key now first
//! *claims* it from those that had it under the plans of that time. Whoever is asked tells whether it has counted
//! it, and counts it never again under an older plan.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ids::{ClassName, Colo, Home, ObjectId, ObjectName, ObjectNameError};
use crate::limits;

pub const COORDINATOR: &str = "CounterCoordinator";
pub const SHARD: &str = "CounterShard";

pub const PLAN: &str = "plan";
pub const READ: &str = "read";
pub const RESHARD: &str = "reshard";
pub const STANDING: &str = "standing";
pub const REPORT: &str = "report";
pub const ADD: &str = "add";
pub const ADD_ONCE: &str = "add_once";
pub const CLAIM: &str = "claim";
pub const TELL: &str = "tell";
pub const RETIRE: &str = "retire";

/// Shards of a counter that nobody set otherwise. What their number should be in most cases is
/// [`SHARDS_ADVISED`]; outside of that, it is allowed and warned of.
pub const SHARDS_DEFAULT: u32 = 100;
pub const SHARDS_ADVISED: std::ops::RangeInclusive<u32> = 10..=1000;
pub const SHARDS_MAX: u32 = 10_000;

/// How long an idempotency key is remembered after it was used.
pub const KEYS_KEPT: Duration = Duration::from_secs(24 * 3600);

/// Longest idempotency key, in bytes.
pub const KEY_BYTES_MAX: usize = 255;

/// A shard with something new waits so long before it reports: at least this, and with many shards longer, so
/// that a coordinator has no more than 500 reports a second.
pub const REPORT_EVERY_MIN: Duration = Duration::from_millis(100);
pub const REPORT_PER_SHARD: Duration = Duration::from_millis(2);

/// Longest name of a counter, in bytes: a shard's name has `:shard:SFO:9999` after it.
pub const NAME_BYTES_MAX: usize = limits::OBJECT_NAME_BYTES_MAX - 24;

/// The name of a counter. Any that an object may have, but a little shorter.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct CounterName(ObjectName);

/// Why a text is no name of a counter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CounterNameError {
    #[error(transparent)]
    Object(#[from] ObjectNameError),
    #[error("the name of a counter has {0} bytes, and may have {NAME_BYTES_MAX}")]
    TooLong(usize),
}

impl CounterName {
    pub fn new(name: ObjectName) -> Result<Self, CounterNameError> {
        match name.as_str().len() {
            bytes if bytes > NAME_BYTES_MAX => Err(CounterNameError::TooLong(bytes)),
            _ => Ok(Self(name)),
        }
    }

    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }

    /// The object that coordinates this counter.
    pub fn coordinator(&self) -> (ObjectId, ObjectName) {
        let class = coordinator_class();
        let name = self.0.clone();
        (ObjectId::named(&class, Home::Global, &name), name)
    }

    /// The object that is a shard of this counter.
    pub fn shard(&self, seat: Seat) -> (ObjectId, ObjectName) {
        let name: ObjectName = format!("{}{MARK}{seat}", self.0)
            .parse()
            .expect("NAME_BYTES_MAX leaves room, and a seat has no control characters");
        (ObjectId::named(&shard_class(), seat.home(), &name), name)
    }
}

impl std::str::FromStr for CounterName {
    type Err = CounterNameError;

    fn from_str(text: &str) -> Result<Self, CounterNameError> {
        Self::new(text.parse()?)
    }
}

impl fmt::Display for CounterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Between the name of a counter and the seat of a shard.
const MARK: &str = ":shard:";

/// Which shard of a counter. Prints as `17`, or with a colo as `SFO:17`, or as `SFO~:17` if that colo had no nodes
/// of its own when the counter came there: such shards live on the global ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Seat {
    pub place: Place,
    pub index: u32,
}

/// Where shards of a counter are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Place {
    Anywhere,
    /// In a colo, on its own nodes.
    Colo(Colo),
    /// For a colo that had no nodes.
    ForColo(Colo),
}

/// Text that is no seat, or no place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no {1} of a counter's shard")]
pub struct SeatError(String, &'static str);

impl Seat {
    pub fn home(self) -> Home {
        match self.place {
            Place::Colo(colo) => Home::Colo(colo),
            Place::Anywhere | Place::ForColo(_) => Home::Global,
        }
    }

    /// The counter and seat that the name of a shard tells.
    pub fn of_object(name: &ObjectName) -> Option<(CounterName, Self)> {
        let (counter, seat) = name.as_str().rsplit_once(MARK)?;
        Some((counter.parse().ok()?, seat.parse().ok()?))
    }
}

impl fmt::Display for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.place {
            Place::Anywhere => write!(f, "{}", self.index),
            place => write!(f, "{place}:{}", self.index),
        }
    }
}

impl std::str::FromStr for Seat {
    type Err = SeatError;

    fn from_str(text: &str) -> Result<Self, SeatError> {
        let wrong = || SeatError(text.to_owned(), "seat");
        let (place, index) = text.rsplit_once(':').unwrap_or(("", text));
        let digits = !index.is_empty() && index.bytes().all(|byte| byte.is_ascii_digit());
        let canonical = digits && (index == "0" || !index.starts_with('0'));
        Ok(Self {
            place: place.parse().map_err(|_| wrong())?,
            index: index.parse().ok().filter(|_| canonical).ok_or_else(wrong)?,
        })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anywhere => Ok(()),
            Self::Colo(colo) => write!(f, "{colo}"),
            Self::ForColo(colo) => write!(f, "{colo}~"),
        }
    }
}

impl std::str::FromStr for Place {
    type Err = SeatError;

    fn from_str(text: &str) -> Result<Self, SeatError> {
        let colo = |code: &str| {
            let parsed = code.parse();
            parsed.map_err(|_| SeatError(text.to_owned(), "place"))
        };
        Ok(match text.strip_suffix('~') {
            _ if text.is_empty() => Self::Anywhere,
            Some(code) => Self::ForColo(colo(code)?),
            None => Self::Colo(colo(text)?),
        })
    }
}

/// Serde by the text form.
macro_rules! as_text {
    ($($type:ty),*) => {$(
        impl From<$type> for String {
            fn from(value: $type) -> Self {
                value.to_string()
            }
        }

        impl TryFrom<String> for $type {
            type Error = SeatError;

            fn try_from(text: String) -> Result<Self, SeatError> {
                text.parse()
            }
        }
    )*};
}
as_text!(Seat, Place);

/// Whether the shards of a counter are the same for all colos.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// One set of shards.
    #[default]
    Global,
    /// A set per colo; increments stay in theirs, and the total is of all.
    Colo,
}

/// Which shard an increment without an idempotency key goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// By the key that the gateway makes of a request: one client, one shard.
    Hash,
    #[default]
    Random,
    RoundRobin,
}

/// How a counter is sharded, as its gateways know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// From 1; grows with every change.
    pub version: u64,
    pub place: Place,
    pub shards: u32,
    pub strategy: Strategy,
    pub report_every_ms: u64,
    /// Earlier sets of shards that may know idempotency keys, latest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub earlier: Vec<Set>,
}

/// Shards that are used together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Set {
    pub place: Place,
    pub shards: u32,
}

impl Set {
    /// The seat of a key among these.
    pub fn seat(self, key: u64) -> Seat {
        Seat {
            place: self.place,
            index: jump(key, self.shards),
        }
    }
}

impl Plan {
    pub fn set(&self) -> Set {
        Set {
            place: self.place,
            shards: self.shards,
        }
    }

    /// Most time, but for failures, until an increment is in the coordinator's sum.
    pub fn staleness_ms(&self) -> u64 {
        staleness_ms(self.report_every_ms)
    }

    /// Who has an idempotency key now, and who may have had it before.
    pub fn seats_of_key(&self, key: &str) -> (Seat, Vec<Seat>) {
        let hash = key_hash(key);
        let seat = self.set().seat(hash);
        let mut before = Vec::new();
        for set in &self.earlier {
            let other = set.seat(hash);
            if other != seat && !before.contains(&other) {
                before.push(other);
            }
        }
        (seat, before)
    }
}

/// The bound of [`Plan::staleness_ms`]: the wait before a report, and as much again for its way.
pub fn staleness_ms(report_every_ms: u64) -> u64 {
    report_every_ms.saturating_mul(2)
}

/// How long a shard waits before it reports, unless the counter says otherwise.
pub fn report_every(shards: u32) -> Duration {
    (REPORT_PER_SHARD * shards).max(REPORT_EVERY_MIN)
}

/// The hash of a client key or an idempotency key.
pub fn key_hash(key: &str) -> u64 {
    xxhash_rust::xxh3::xxh3_64(key.as_bytes())
}

/// Jump consistent hash (Lamping and Veach, "A Fast, Minimal Memory, Consistent Hash Algorithm", 2014): a
/// number below `buckets`, even, and the same for all but 1/n of the keys when the n-th bucket is added.
pub fn jump(mut key: u64, buckets: u32) -> u32 {
    let mut bucket: i64 = -1;
    let mut next: i64 = 0;
    while next < i64::from(buckets.max(1)) {
        bucket = next;
        key = key.wrapping_mul(2_862_933_555_777_941_757).wrapping_add(1);
        let fraction = f64::from(1_u32 << 31) / ((key >> 33) as f64 + 1.0);
        #[expect(
            clippy::cast_possible_truncation,
            reason = "saturates far above any number of buckets"
        )]
        let far = ((bucket + 1) as f64 * fraction) as i64;
        next = far;
    }
    u32::try_from(bucket).expect("below buckets, and at least 0")
}

/// What a shard answers to an increment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Added {
    /// The newest plan that the shard has heard of.
    pub version: u64,
    pub outcome: AddOutcome,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AddOutcome {
    Counted,
    /// The key was counted before; nothing was added.
    Repeated,
    /// The plan is too old for this shard. Nothing was added.
    Moved,
}

/// What a shard knows of a key that it loses. It counts it never again under an older plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claimed {
    /// What it counted for the key, if anything.
    pub by: Option<i64>,
}

/// What a shard has counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// The plan by which it began; `None` if it never counted anything.
    pub generation: Option<u64>,
    pub total: i64,
    /// Turns that counted something.
    pub turns: u64,
}

/// What a shard tells the coordinator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    pub seat: Seat,
    pub tally: Tally,
    /// How long ago the oldest increment was counted that was not reported yet.
    pub lag_ms: u64,
    /// The newest plan that the shard has heard of.
    #[serde(default)]
    pub heard: u64,
}

/// What the coordinator answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reported {
    /// The newest plan.
    pub version: u64,
    pub report_every_ms: u64,
}

/// The value of a counter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Total {
    /// In decimal: a sum of many 64-bit numbers.
    #[serde(with = "decimal")]
    pub value: i128,
    pub shards: u32,
    /// What was acknowledged longer ago than this is in the value; 0 for an exact one.
    pub staleness_ms: u64,
}

/// What an operator changes of a counter. What is absent stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Change {
    pub count: Option<Count>,
    pub strategy: Option<Strategy>,
    pub scope: Option<Scope>,
    pub report_every_ms: Option<u64>,
}

/// How many shards, or `"auto"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Count {
    Fixed(u32),
    Auto(Auto),
}

/// The word `auto`: the coordinator adds shards while they run hot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Auto {
    Auto,
}

/// How a counter stands, for operators.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Standing {
    #[serde(with = "decimal")]
    pub value: i128,
    pub shards: u32,
    pub version: u64,
    pub auto: bool,
    pub scope: Scope,
    pub strategy: Strategy,
    pub report_every_ms: u64,
    pub staleness_ms: u64,
    /// Shards of earlier plans whose totals are not in the base yet.
    pub retiring: u32,
    /// What retired shards had counted.
    #[serde(with = "decimal")]
    pub base: i128,
    /// Turns of the busiest shard over the mean, of the shards of this plan; 1 is even.
    pub skew: Option<f64>,
    /// The busiest of them, and its turns a second as of its last reports.
    pub hottest: Option<Seat>,
    pub hottest_rate: Option<f64>,
    /// What an operator should think about.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// The class of coordinators, parsed.
pub fn coordinator_class() -> ClassName {
    COORDINATOR.parse().expect("a legal class name")
}

/// The class of shards, parsed.
pub fn shard_class() -> ClassName {
    SHARD.parse().expect("a legal class name")
}

/// An `i128` in decimal, as a text: JSON's numbers are seldom read exactly beyond 2^53.
mod decimal {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(value: &i128, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<i128, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests;
