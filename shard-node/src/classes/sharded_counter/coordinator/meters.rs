//! What the coordinators of a node count together.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use metrics::{
    Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram,
    gauge, histogram,
};
use ops::metrics::Registry;
use protocol::ObjectId;

/// A counter that reported nothing for so long is no longer spoken of.
const KEPT_MS: u64 = 60_000;

/// Counters that are looked at. Of more, some are not.
const COUNTERS_MAX: usize = 1024;

pub(super) struct Meters {
    reports: Counter,
    lag: Histogram,
    late: Counter,
    pub(super) reshards: Counter,
    skew: Gauge,
    /// The skew of each counter, and when it was known. Changes every few seconds per counter.
    skews: Mutex<BTreeMap<ObjectId, (f64, u64)>>,
}

impl Meters {
    pub(super) fn new(registry: &Registry) -> Self {
        registry.register(|| {
            describe_counter!(
                "shard_counter_reports_total",
                "Reports of counters' shards that coordinators took"
            );
            describe_histogram!(
                "shard_counter_report_lag_seconds",
                "How long an increment waited until its shard reported it"
            );
            describe_counter!(
                "shard_counter_reports_late_total",
                "Reports with an increment that had waited for longer than the staleness that its counter states"
            );
            describe_counter!(
                "shard_counter_reshards_total",
                "Changes of the number or scope of a counter's shards"
            );
            describe_gauge!(
                "shard_counter_skew",
                "Turns of the busiest shard over the mean, of the counter where that is highest"
            );
            Self {
                reports: counter!("shard_counter_reports_total"),
                lag: histogram!("shard_counter_report_lag_seconds"),
                late: counter!("shard_counter_reports_late_total"),
                reshards: counter!("shard_counter_reshards_total"),
                skew: gauge!("shard_counter_skew"),
                skews: Mutex::default(),
            }
        })
    }

    /// A report whose oldest increment waited so long, of a counter that states `stated_ms`.
    pub(super) fn report(&self, lag_ms: u64, stated_ms: u64) {
        self.reports.increment(1);
        self.late.increment(u64::from(lag_ms > stated_ms));
        self.lag.record(lag_ms as f64 / 1000.0);
    }

    pub(super) fn skew(&self, counter: ObjectId, skew: f64, now_ms: u64) {
        let mut skews = self.skews.lock().unwrap_or_else(PoisonError::into_inner);
        skews.retain(|_, (_, at_ms)| now_ms.saturating_sub(*at_ms) < KEPT_MS);
        if skews.len() < COUNTERS_MAX || skews.contains_key(&counter) {
            skews.insert(counter, (skew, now_ms));
        }
        let highest = skews.values().map(|(skew, _)| *skew).fold(1.0, f64::max);
        self.skew.set(highest);
    }
}
