//! What a process measured: histograms, and what happened when.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize, Serializer};

use crate::operation::Operation;

/// Longest latency that is told apart: 10 minutes.
const MICROS_MAX: u64 = 600_000_000;

/// Seconds of the timeline; longer runs have longer intervals.
const INTERVALS_MAX: f64 = 600.0;

/// Moments at which it is known whether something was acknowledged; longer runs know it less sharply.
const TICKS_MAX: f64 = 100_000.0;
const TICK_MIN: Duration = Duration::from_millis(10);

/// A histogram of microseconds, from 1 µs to 10 minutes. As JSON: pairs of value and count.
#[derive(Debug, Clone)]
pub(crate) struct Samples(Histogram<u64>);

impl Samples {
    /// Exact to so many digits, 1 to 5.
    pub(crate) fn with_digits(digits: u8) -> Self {
        Self(
            Histogram::new_with_bounds(1, MICROS_MAX, digits)
                .expect("the bounds are in order and the digits at most 5"),
        )
    }

    pub(crate) fn record(&mut self, duration: Duration) {
        let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        self.0.saturating_record(micros.max(1));
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for value in other.0.iter_recorded() {
            self.0
                .saturating_record_n(value.value_iterated_to(), value.count_at_value());
        }
    }

    pub(crate) fn histogram(&self) -> &Histogram<u64> {
        &self.0
    }
}

impl Default for Samples {
    fn default() -> Self {
        Self::with_digits(3)
    }
}

impl Serialize for Samples {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let pairs = self.0.iter_recorded();
        serializer.collect_seq(pairs.map(|one| (one.value_iterated_to(), one.count_at_value())))
    }
}

impl<'de> Deserialize<'de> for Samples {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut samples = Self::default();
        for (value, count) in Vec::<(u64, u64)>::deserialize(deserializer)? {
            samples.0.saturating_record_n(value, count);
        }
        Ok(samples)
    }
}

/// One operation.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
pub(crate) struct Measured {
    /// From the intended send time.
    pub(crate) latency: Samples,
    /// From the actual send time.
    pub(crate) service_time: Samples,
    pub(crate) errors: u64,
}

/// Everything that was answered in one interval of the timeline.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Interval {
    pub(crate) acknowledged: u64,
    pub(crate) errors: u64,
    #[serde(deserialize_with = "coarse")]
    pub(crate) latency: Samples,
}

/// Digits of the latency in an interval: there may be many of them.
const COARSE: u8 = 2;

impl Default for Interval {
    fn default() -> Self {
        Self {
            acknowledged: 0,
            errors: 0,
            latency: Samples::with_digits(COARSE),
        }
    }
}

fn coarse<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Samples, D::Error> {
    let mut samples = Samples::with_digits(COARSE);
    samples.add(&Samples::deserialize(deserializer)?);
    Ok(samples)
}

/// The measured part of a run; times count from its begin.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Measures {
    pub(crate) operations: BTreeMap<Operation, Measured>,
    /// By reason.
    pub(crate) errors: BTreeMap<String, u64>,
    pub(crate) not_sent: u64,
    pub(crate) last_answer: Duration,
    /// Latency by stage of the rate.
    pub(crate) stages: Vec<Samples>,
    interval: Duration,
    pub(crate) intervals: Vec<Interval>,
    tick: Duration,
    /// Acknowledged requests in each tick.
    ticks: Vec<u32>,
}

/// One request that has ended.
pub(crate) struct Ended {
    pub(crate) operation: Operation,
    pub(crate) stage: usize,
    /// Since measuring began.
    pub(crate) at: Duration,
    pub(crate) latency: Duration,
    pub(crate) service_time: Duration,
}

impl Measures {
    pub(crate) fn new(length: Duration, stages: usize) -> Self {
        let seconds = length.as_secs_f64();
        Self {
            operations: BTreeMap::new(),
            errors: BTreeMap::new(),
            not_sent: 0,
            last_answer: Duration::ZERO,
            stages: vec![Samples::default(); stages],
            interval: Duration::from_secs_f64((seconds / INTERVALS_MAX).ceil().max(1.0)),
            intervals: Vec::new(),
            tick: TICK_MIN.max(Duration::from_secs_f64(seconds / TICKS_MAX)),
            ticks: Vec::new(),
        }
    }

    pub(crate) fn acknowledge(&mut self, ended: &Ended) {
        self.last_answer = self.last_answer.max(ended.at);
        let operation = self.operations.entry(ended.operation).or_default();
        operation.latency.record(ended.latency);
        operation.service_time.record(ended.service_time);
        if let Some(stage) = self.stages.get_mut(ended.stage) {
            stage.record(ended.latency);
        }
        let interval = slot(&mut self.intervals, ended.at, self.interval);
        interval.acknowledged += 1;
        interval.latency.record(ended.latency);
        *slot(&mut self.ticks, ended.at, self.tick) += 1;
    }

    pub(crate) fn fail(&mut self, operation: Operation, at: Duration, why: String) {
        self.last_answer = self.last_answer.max(at);
        self.operations.entry(operation).or_default().errors += 1;
        slot(&mut self.intervals, at, self.interval).errors += 1;
        *self.errors.entry(why).or_default() += 1;
    }

    /// Adds what another process measured in the same run.
    pub(crate) fn add(&mut self, other: &Self) {
        for (operation, measured) in &other.operations {
            let sum = self.operations.entry(*operation).or_default();
            sum.latency.add(&measured.latency);
            sum.service_time.add(&measured.service_time);
            sum.errors += measured.errors;
        }
        for (why, count) in &other.errors {
            *self.errors.entry(why.clone()).or_default() += count;
        }
        self.not_sent += other.not_sent;
        self.last_answer = self.last_answer.max(other.last_answer);
        for (sum, part) in self.stages.iter_mut().zip(&other.stages) {
            sum.add(part);
        }
        let intervals = self.intervals.len().max(other.intervals.len());
        self.intervals.resize_with(intervals, Interval::default);
        for (sum, part) in self.intervals.iter_mut().zip(&other.intervals) {
            sum.acknowledged += part.acknowledged;
            sum.errors += part.errors;
            sum.latency.add(&part.latency);
        }
        self.ticks
            .resize(self.ticks.len().max(other.ticks.len()), 0);
        for (sum, part) in self.ticks.iter_mut().zip(&other.ticks) {
            *sum += part;
        }
    }

    /// Of all operations.
    pub(crate) fn latency(&self) -> Samples {
        self.sum(|measured| &measured.latency)
    }

    pub(crate) fn service_time(&self) -> Samples {
        self.sum(|measured| &measured.service_time)
    }

    pub(crate) fn acknowledged(&self) -> u64 {
        self.intervals.iter().map(|one| one.acknowledged).sum()
    }

    /// How long an interval of the timeline is.
    pub(crate) fn interval(&self) -> Duration {
        self.interval
    }

    /// The longest time from `from` to `until` in which nothing was acknowledged, to the tick
    /// (10 ms, or more in runs above 1,000 s).
    pub(crate) fn gap(&self, from: Duration, until: Duration) -> Duration {
        let (mut longest, mut current) = (0u32, 0u32);
        for at in index(from, self.tick)..index(until, self.tick) {
            let silent = self.ticks.get(at).is_none_or(|count| *count == 0);
            current = if silent { current + 1 } else { 0 };
            longest = longest.max(current);
        }
        self.tick * longest
    }

    fn sum(&self, of: impl Fn(&Measured) -> &Samples) -> Samples {
        let mut sum = Samples::default();
        for measured in self.operations.values() {
            sum.add(of(measured));
        }
        sum
    }
}

fn index(at: Duration, width: Duration) -> usize {
    usize::try_from(at.as_nanos() / width.as_nanos().max(1)).unwrap_or(usize::MAX)
}

fn slot<T: Default>(slots: &mut Vec<T>, at: Duration, width: Duration) -> &mut T {
    let index = index(at, width);
    if slots.len() <= index {
        slots.resize_with(index + 1, T::default);
    }
    &mut slots[index]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(at_ms: u64, latency_ms: u64) -> Ended {
        Ended {
            operation: Operation::Increment,
            stage: 0,
            at: Duration::from_millis(at_ms),
            latency: Duration::from_millis(latency_ms),
            service_time: Duration::from_millis(1),
        }
    }

    #[test]
    fn a_gap_is_the_longest_silence_of_a_time() {
        let mut measures = Measures::new(Duration::from_secs(10), 1);
        for at in (0..1000).chain(1500..3000).chain(3200..5000).step_by(5) {
            measures.acknowledge(&ended(at, 1));
        }
        let gap = |from, until| {
            let time = Duration::from_millis;
            measures.gap(time(from), time(until)).as_millis()
        };
        assert_eq!(gap(0, 5000), 500);
        assert_eq!(gap(2000, 5000), 200);
        assert_eq!(gap(0, 900), 0);
        assert_eq!(gap(4000, 6000), 1000, "silence at the end counts, too");
    }

    #[test]
    fn measures_of_several_processes_add_up() {
        let mut measures = Measures::new(Duration::from_secs(10), 1);
        measures.acknowledge(&ended(100, 2));
        measures.fail(
            Operation::Increment,
            Duration::from_millis(2100),
            "503".to_owned(),
        );
        let sent = serde_json::to_string(&measures).unwrap();
        let received: Measures = serde_json::from_str(&sent).unwrap();
        let mut other = Measures::new(Duration::from_secs(10), 1);
        other.acknowledge(&ended(1100, 8));
        other.add(&received);
        assert_eq!((other.acknowledged(), other.errors["503"]), (2, 1));
        assert_eq!(other.intervals.len(), 3);
        assert_eq!(other.latency().histogram().len(), 2);
        assert!(other.latency().histogram().max() >= 8000);
    }
}
