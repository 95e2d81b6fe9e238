//! What objects cost, counted where it happens.
//!
//! Each object has a [`Meter`] that its storage and its turns count in, with nothing but additions. After a
//! batch of turns the host takes what it has, and adds it to the class ([`ClassUsage`]) and to the object.
//! Ten times a second the totals of the classes become metrics, so that a request pays for no atomics.
//!
//! Rows and units are two ways to count the same work, and meters of two price lists (rows: databases; units of
//! 4 KiB: key-value pairs); they are not to be added.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use metrics::{Counter, Gauge, Histogram};
use protocol::{ClassName, ObjectId};
use tokio::time::Instant;

use crate::catalog::ClassStock;

/// Bytes of a key-value unit.
const UNIT_BYTES: usize = 4096;

/// Rates forget with this time constant.
pub(crate) const SUSTAINED: Duration = Duration::from_secs(60);

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Of {
    Fetches,
    Calls,
    /// Alarm handlers that began, and of these, those that ended without a write.
    Alarms,
    IdleAlarms,
    TurnNanos,
    RowsRead,
    RowsReturned,
    RowsWritten,
    KvReadUnits,
    KvWriteUnits,
    KvDeletes,
    /// Calls to other objects.
    ObjectCalls,
    Wakes,
    AwakeMillis,
}

const COUNTS: usize = 14;
const _: () = assert!(Of::AwakeMillis as usize + 1 == COUNTS, "one count each");

/// One number of each kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counts([u64; COUNTS]);

impl Counts {
    pub(crate) const ZERO: Self = Self([0; COUNTS]);

    pub(crate) fn of(&self, of: Of) -> u64 {
        self.0[of as usize]
    }

    pub(crate) fn count(&mut self, of: Of, number: u64) {
        self.0[of as usize] += number;
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for (mine, others) in self.0.iter_mut().zip(&other.0) {
            *mine += others;
        }
    }

    /// Requests as they are billed: fetch, call and alarm are one each.
    pub(crate) fn requests(&self) -> u64 {
        self.of(Of::Fetches) + self.of(Of::Calls) + self.of(Of::Alarms)
    }
}

/// What an object did since somebody looked.
pub(crate) struct Meter {
    counts: RefCell<Counts>,
    reached: RefCell<Option<Box<Reached>>>,
}

impl Default for Meter {
    fn default() -> Self {
        Self {
            counts: RefCell::new(Counts::ZERO),
            reached: RefCell::default(),
        }
    }
}

impl Meter {
    pub(crate) fn count(&self, of: Of, number: u64) {
        self.counts.borrow_mut().count(of, number);
    }

    /// A statement read, returned and wrote rows.
    pub(crate) fn rows(&self, read: u64, returned: u64, written: u64) {
        let mut counts = self.counts.borrow_mut();
        counts.count(Of::RowsRead, read);
        counts.count(Of::RowsReturned, returned);
        counts.count(Of::RowsWritten, written);
    }

    /// So many pairs of together so many bytes were read, at once.
    pub(crate) fn pairs_read(&self, pairs: u64, bytes: usize) {
        self.count(Of::KvReadUnits, units(bytes));
        self.rows(pairs, pairs, 0);
    }

    pub(crate) fn pair_written(&self, bytes: usize) {
        self.count(Of::KvWriteUnits, units(bytes));
        self.rows(0, 0, 1);
    }

    pub(crate) fn pair_deleted(&self, existed: bool) {
        self.count(Of::KvDeletes, 1);
        self.rows(0, 0, existed.into());
    }

    /// The object called another one.
    pub(crate) fn object_called(&self, other: ObjectId) {
        self.count(Of::ObjectCalls, 1);
        let mut reached = self.reached.borrow_mut();
        reached.get_or_insert_default().add(other);
    }

    pub(crate) fn take(&self) -> Counts {
        self.counts.replace(Counts::ZERO)
    }

    /// How many different objects it called within the last minute, roughly; `None` if it never did.
    pub(crate) fn reach(&self, now: Instant) -> Option<u32> {
        let mut reached = self.reached.borrow_mut();
        reached.as_mut().map(|reached| reached.number(now))
    }
}

fn units(bytes: usize) -> u64 {
    bytes.div_ceil(UNIT_BYTES).max(1) as u64
}

/// Which objects one object called: linear counting (Whang, Vander-Zanden, Taylor 1990) with 2,048 bits, within
/// some percent up to thousands of objects.
#[derive(Default)]
struct Reached {
    bits: [u64; 32],
    begun: Option<Instant>,
    /// Of the minute before.
    before: u32,
}

impl Reached {
    fn add(&mut self, id: ObjectId) {
        let hash = xxhash_rust::xxh3::xxh3_64(id.as_bytes());
        let bit = (hash % 2048) as usize;
        self.bits[bit / 64] |= 1 << (bit % 64);
    }

    fn number(&mut self, now: Instant) -> u32 {
        let free: u32 = self.bits.iter().map(|word| word.count_zeros()).sum();
        let free = f64::from(free.max(1));
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "from 0 to 16,000"
        )]
        let number = (2048.0 * (2048.0 / free).ln()).round() as u32;
        let begun = *self.begun.get_or_insert(now);
        let shown = number.max(self.before);
        if now.duration_since(begun) >= SUSTAINED {
            self.before = number;
            self.bits = [0; 32];
            self.begun = Some(now);
        }
        shown
    }
}

/// The counts of one class on one worker.
pub(crate) struct ClassUsage {
    pub(crate) class: ClassName,
    totals: RefCell<Counts>,
    pub(crate) awake: Cell<u64>,
    waiting: Cell<i64>,
    /// Constructors that ran, and their time.
    constructed: Cell<(u64, Duration)>,
    stock: RefCell<ClassStock>,
    published: RefCell<Published>,
    handles: ClassMetrics,
}

/// What the metrics know already.
struct Published {
    totals: Counts,
    at: Instant,
    waiting: i64,
    long_awake: u64,
    /// Sums that forget.
    sustained: [f64; COUNTS],
    /// Counts that are less than one unit of their metric.
    carried: Counts,
}

/// A class's metrics.
pub(crate) struct ClassMetrics {
    /// With how many counts are one of the metric.
    pub(crate) counters: Vec<(&'static [Of], u64, Counter)>,
    pub(crate) awake: Gauge,
    pub(crate) long_awake: Gauge,
    pub(crate) waiting: Gauge,
    pub(crate) constructor: Histogram,
    pub(crate) stored_bytes: Gauge,
    pub(crate) stored: [Gauge; 4],
    pub(crate) many_keys: [Gauge; 2],
}

/// The counters of a class: name, what it counts, and how many of that are one.
pub(crate) const COUNTERS: [(&str, &[Of], u64); 13] = [
    (
        "shard_usage_requests_total",
        &[Of::Fetches, Of::Calls, Of::Alarms],
        1,
    ),
    ("shard_usage_fetches_total", &[Of::Fetches], 1),
    ("shard_usage_calls_total", &[Of::Calls], 1),
    (
        "shard_usage_turn_seconds_total",
        &[Of::TurnNanos],
        1_000_000_000,
    ),
    ("shard_usage_awake_seconds_total", &[Of::AwakeMillis], 1000),
    ("shard_usage_rows_read_total", &[Of::RowsRead], 1),
    ("shard_usage_rows_returned_total", &[Of::RowsReturned], 1),
    ("shard_usage_rows_written_total", &[Of::RowsWritten], 1),
    ("shard_usage_kv_read_units_total", &[Of::KvReadUnits], 1),
    ("shard_usage_kv_write_units_total", &[Of::KvWriteUnits], 1),
    ("shard_usage_kv_deletes_total", &[Of::KvDeletes], 1),
    ("shard_object_calls_total", &[Of::ObjectCalls], 1),
    ("shard_activations_total", &[Of::Wakes], 1),
];

impl ClassUsage {
    pub(crate) fn new(class: ClassName, handles: ClassMetrics) -> Rc<Self> {
        Rc::new(Self {
            class,
            totals: RefCell::new(Counts::ZERO),
            awake: Cell::new(0),
            waiting: Cell::new(0),
            constructed: Cell::new((0, Duration::ZERO)),
            stock: RefCell::default(),
            published: RefCell::new(Published {
                totals: Counts::ZERO,
                at: Instant::now(),
                waiting: 0,
                long_awake: 0,
                sustained: [0.0; COUNTS],
                carried: Counts::ZERO,
            }),
            handles,
        })
    }

    pub(crate) fn add(&self, counts: &Counts) {
        self.totals.borrow_mut().add(counts);
    }

    /// An object woke.
    pub(crate) fn woke(&self) {
        self.awake.set(self.awake.get() + 1);
        self.handles.awake.increment(1);
        self.totals.borrow_mut().count(Of::Wakes, 1);
    }

    /// An object left memory.
    pub(crate) fn slept(&self) {
        self.awake.set(self.awake.get().saturating_sub(1));
        self.handles.awake.decrement(1);
    }

    /// Requests came into mailboxes, or left them.
    pub(crate) fn wait(&self, change: i64) {
        self.waiting.set(self.waiting.get() + change);
    }

    pub(crate) fn constructed(&self, took: Duration) {
        let (number, time) = self.constructed.get();
        self.constructed.set((number + 1, time + took));
        self.handles.constructor.record(took.as_secs_f64());
    }

    /// Constructors that ran, and their time.
    pub(crate) fn constructors(&self) -> (u64, Duration) {
        self.constructed.get()
    }

    /// What the catalogs have of the class.
    pub(crate) fn stock(&self) -> ClassStock {
        self.stock.borrow().clone()
    }

    pub(crate) fn set_stock(&self, stock: ClassStock) {
        let before = self.stock.replace(stock);
        let now = self.stock.borrow();
        let change = |gauge: &Gauge, before: u64, now: u64| {
            if before != now {
                gauge.increment(now as f64 - before as f64);
            }
        };
        change(&self.handles.stored_bytes, before.bytes, now.bytes);
        for (place, gauge) in self.handles.stored.iter().enumerate() {
            change(gauge, before.by_bytes[place], now.by_bytes[place]);
        }
        for (place, gauge) in self.handles.many_keys.iter().enumerate() {
            change(gauge, before.by_keys[place], now.by_keys[place]);
        }
    }

    /// So many of its objects have not slept for long.
    pub(crate) fn set_long_awake(&self, number: u64) {
        let mut published = self.published.borrow_mut();
        let change = number as f64 - published.long_awake as f64;
        published.long_awake = number;
        self.handles.long_awake.increment(change);
    }

    /// Adds to the metrics what was counted since.
    pub(crate) fn publish(&self, now: Instant) {
        let mut published = self.published.borrow_mut();
        let passed = now.saturating_duration_since(published.at);
        published.at = now;
        let awake = u64::try_from(passed.as_millis()).unwrap_or(0) * self.awake.get();
        let mut totals = self.totals.borrow_mut();
        totals.count(Of::AwakeMillis, awake);
        let forget = (-passed.as_secs_f64() / SUSTAINED.as_secs_f64()).exp();
        for place in 0..COUNTS {
            let news = totals.0[place] - published.totals.0[place];
            published.totals.0[place] = totals.0[place];
            published.carried.0[place] += news;
            published.sustained[place] = published.sustained[place] * forget + news as f64;
        }
        for (of, unit, counter) in &self.handles.counters {
            let carried: u64 = of.iter().map(|of| published.carried.of(*of)).sum();
            if carried >= *unit {
                counter.increment(carried / unit);
            }
        }
        for (_, of, unit) in COUNTERS {
            for of in of {
                published.carried.0[*of as usize] %= unit;
            }
        }
        let waiting = self.waiting.get();
        if waiting != published.waiting {
            self.handles
                .waiting
                .increment((waiting - published.waiting) as f64);
            published.waiting = waiting;
        }
    }

    /// What happens per second, averaged over about a minute; as of the last publication.
    pub(crate) fn per_second(&self, of: Of) -> f64 {
        self.published.borrow().sustained[of as usize] / SUSTAINED.as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use protocol::Home;

    use super::*;

    fn id(number: u32) -> ObjectId {
        let class: ClassName = "Room".parse().unwrap();
        ObjectId::named(&class, Home::Global, &number.to_string().parse().unwrap())
    }

    #[test]
    fn units_are_of_four_kibibytes_and_at_least_one() {
        assert_eq!([0, 1, 4096, 4097, 8192].map(units), [1, 1, 1, 2, 2]);
    }

    #[test]
    fn a_meter_counts_pairs_in_rows_and_in_units() {
        let meter = Meter::default();
        meter.pairs_read(3, 5000);
        meter.pair_written(10);
        meter.pair_deleted(false);
        meter.pair_deleted(true);
        let counts = meter.take();
        let of = |of| counts.of(of);
        assert_eq!(
            [of(Of::RowsRead), of(Of::RowsReturned), of(Of::RowsWritten)],
            [3, 3, 2]
        );
        assert_eq!(
            [of(Of::KvReadUnits), of(Of::KvWriteUnits), of(Of::KvDeletes)],
            [2, 1, 2]
        );
        assert_eq!(meter.take(), Counts::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn the_number_of_objects_reached_is_about_right_and_of_a_minute() {
        let meter = Meter::default();
        assert_eq!(meter.reach(Instant::now()), None);
        for round in 0..3 {
            for number in 0..120 {
                meter.object_called(id(number));
            }
            let reach = meter.reach(Instant::now()).unwrap();
            assert!((114..=126).contains(&reach), "{reach} in round {round}");
        }
        tokio::time::advance(SUSTAINED).await;
        meter.reach(Instant::now());
        tokio::time::advance(SUSTAINED).await;
        meter.reach(Instant::now());
        assert_eq!(meter.reach(Instant::now()), Some(0), "it calls nobody now");
    }
}
