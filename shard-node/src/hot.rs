//! The objects of one worker that do most, in bounded memory: a [sketch](ops::sketch) per measure.
//!
//! An object counts for itself while it is awake; about once a second, and when it falls asleep, that is added
//! here. Counts forget exponentially, with a time constant of a minute: what is added later weighs more, so
//! that nothing has to be touched as time goes by.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use ops::sketch::Sketch;
use protocol::ObjectId;
use tokio::time::Instant;
use xxhash_rust::xxh3::Xxh3DefaultBuilder;

use crate::usage::{Counts, Of, SUSTAINED};

/// What objects are ranked by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Measure {
    Requests,
    TurnSeconds,
    RowsRead,
    RowsWritten,
    Alarms,
    ObjectCalls,
}

impl Measure {
    pub(crate) const ALL: [Self; 6] = [
        Self::Requests,
        Self::TurnSeconds,
        Self::RowsRead,
        Self::RowsWritten,
        Self::Alarms,
        Self::ObjectCalls,
    ];

    /// As `/hot` calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Requests => "requests_per_second",
            Self::TurnSeconds => "turn_seconds_per_second",
            Self::RowsRead => "rows_read_per_second",
            Self::RowsWritten => "rows_written_per_second",
            Self::Alarms => "alarms_per_second",
            Self::ObjectCalls => "object_calls_per_second",
        }
    }

    fn weight(self, counts: &Counts) -> f64 {
        match self {
            Self::Requests => counts.requests() as f64,
            Self::TurnSeconds => counts.of(Of::TurnNanos) as f64 / 1e9,
            Self::RowsRead => counts.of(Of::RowsRead) as f64,
            Self::RowsWritten => counts.of(Of::RowsWritten) as f64,
            Self::Alarms => counts.of(Of::Alarms) as f64,
            Self::ObjectCalls => counts.of(Of::ObjectCalls) as f64,
        }
    }
}

/// Ratios forget: sums are halved when so many requests are in them.
const REQUESTS_MAX: f64 = 10_000.0;

/// How long it is remembered how many objects one has called.
const FAN_OUT_KEPT: Duration = Duration::from_secs(600);

/// How much a new interval between two alarms counts beside those before.
const INTERVAL_WEIGHT: f64 = 0.25;

/// Intervals after which their mean is believed.
const INTERVALS_MIN: u32 = 3;

/// After this many time constants the counts are scaled down, long before they lose precision.
const SCALED_AFTER: f64 = 40.0;

/// How an object behaves, noted beside its count: since it has a counter.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Habits {
    requests: f64,
    besides_alarms: f64,
    rows_read: f64,
    rows_returned: f64,
    object_calls: f64,
    /// Most objects called within a minute, and when that was.
    fan_out: Option<(u32, Instant)>,
    alarm_ms: u64,
    interval_ms: f64,
    intervals: u32,
    pub(crate) idle_alarms: u32,
}

impl Habits {
    fn add(&mut self, counts: &Counts, fan_out: Option<(u32, Instant)>) {
        let requests = counts.requests();
        self.requests += requests as f64;
        self.besides_alarms += (requests - counts.of(Of::Alarms)) as f64;
        self.rows_read += counts.of(Of::RowsRead) as f64;
        self.rows_returned += counts.of(Of::RowsReturned) as f64;
        self.object_calls += counts.of(Of::ObjectCalls) as f64;
        if let Some((number, at)) = fan_out
            && self.fan_out(at).is_none_or(|before| number >= before)
        {
            self.fan_out = Some((number, at));
        }
        if self.requests > REQUESTS_MAX {
            for sum in [
                &mut self.requests,
                &mut self.besides_alarms,
                &mut self.rows_read,
                &mut self.rows_returned,
                &mut self.object_calls,
            ] {
                *sum /= 2.0;
            }
        }
    }

    fn per_request(&self, sum: f64) -> Option<f64> {
        (self.requests > 0.0).then(|| sum / self.requests)
    }

    /// Objects that it called within a minute, at the most, lately.
    pub(crate) fn fan_out(&self, now: Instant) -> Option<u32> {
        let (number, at) = self.fan_out?;
        (now.saturating_duration_since(at) < FAN_OUT_KEPT).then_some(number)
    }

    pub(crate) fn calls_per_request(&self) -> Option<f64> {
        self.per_request(self.object_calls)
    }

    pub(crate) fn rows_read_per_request(&self) -> Option<f64> {
        self.per_request(self.rows_read)
    }

    pub(crate) fn rows_read_per_row(&self) -> Option<f64> {
        (self.rows_returned > 0.0).then(|| self.rows_read / self.rows_returned)
    }

    /// The part of its requests that are no alarms.
    pub(crate) fn besides_alarms(&self) -> Option<f64> {
        self.per_request(self.besides_alarms)
    }

    /// Between two alarms, lately.
    pub(crate) fn alarm_every_seconds(&self) -> Option<f64> {
        (self.intervals >= INTERVALS_MIN).then_some(self.interval_ms / 1e3)
    }

    fn alarm(&mut self, now_ms: u64) {
        let before = std::mem::replace(&mut self.alarm_ms, now_ms);
        if before == 0 {
            return;
        }
        let interval = now_ms.saturating_sub(before) as f64;
        self.interval_ms = match self.intervals {
            0 => interval,
            _ => self.interval_ms + (interval - self.interval_ms) * INTERVAL_WEIGHT,
        };
        self.intervals = self.intervals.saturating_add(1);
    }
}

type Objects = Sketch<ObjectId, Habits, Xxh3DefaultBuilder>;

/// One object by one measure.
pub(crate) struct HotObject {
    pub(crate) id: ObjectId,
    pub(crate) per_second: f64,
    pub(crate) too_high_by: f64,
    pub(crate) habits: Habits,
}

/// The hottest objects of one worker.
pub(crate) struct Hot {
    sketches: RefCell<[Objects; Measure::ALL.len()]>,
    /// When counts had the weight 1.
    begun: Cell<Instant>,
    /// The weight of what is counted now.
    weight: Cell<f64>,
}

impl Default for Hot {
    fn default() -> Self {
        Self {
            sketches: RefCell::default(),
            begun: Cell::new(Instant::now()),
            weight: Cell::new(1.0),
        }
    }
}

impl Hot {
    /// Time goes by; ten times a second is enough.
    pub(crate) fn tick(&self, now: Instant) {
        let passed = now
            .saturating_duration_since(self.begun.get())
            .as_secs_f64();
        let constants = passed / SUSTAINED.as_secs_f64();
        let weight = constants.exp();
        if constants < SCALED_AFTER {
            self.weight.set(weight);
            return;
        }
        for sketch in self.sketches.borrow_mut().iter_mut() {
            sketch.scale(weight.recip());
        }
        self.begun.set(now);
        self.weight.set(1.0);
    }

    /// Adds what an object did; `fan_out` is how many others it called within a minute.
    pub(crate) fn add(&self, id: ObjectId, counts: &Counts, fan_out: Option<(u32, Instant)>) {
        let mut sketches = self.sketches.borrow_mut();
        for (measure, sketch) in Measure::ALL.into_iter().zip(sketches.iter_mut()) {
            let weight = measure.weight(counts);
            if weight > 0.0 {
                let habits = sketch.add(&id, |id| *id, weight * self.weight.get());
                habits.add(counts, fan_out);
            }
        }
    }

    /// The handler of an object's alarm ended; `idle`: it wrote nothing and waited for nothing.
    pub(crate) fn alarm_ended(&self, id: ObjectId, idle: bool, now_ms: u64) {
        let mut sketches = self.sketches.borrow_mut();
        let sketch = &mut sketches[Measure::Alarms as usize];
        // It is counted with what else it did; this is about its habits.
        let habits = sketch.add(&id, |id| *id, 0.0);
        habits.alarm(now_ms);
        habits.idle_alarms = match idle {
            true => habits.idle_alarms.saturating_add(1),
            false => 0,
        };
    }

    /// The hottest objects by a measure.
    pub(crate) fn top(&self, measure: Measure, most: usize) -> Vec<HotObject> {
        let sketches = self.sketches.borrow();
        let scale = self.weight.get() * SUSTAINED.as_secs_f64();
        let top = sketches[measure as usize].top(most).into_iter();
        let shown = top.map(|counter| HotObject {
            id: counter.key,
            per_second: counter.count / scale,
            too_high_by: counter.inherited / scale,
            habits: counter.note,
        });
        shown.filter(|object| object.per_second > 0.0).collect()
    }
}

#[cfg(test)]
mod tests {
    use protocol::{ClassName, Home};

    use super::*;

    fn id(number: u32) -> ObjectId {
        let class: ClassName = "Room".parse().unwrap();
        ObjectId::named(&class, Home::Global, &number.to_string().parse().unwrap())
    }

    fn calls(number: u64) -> Counts {
        let mut counts = Counts::ZERO;
        counts.count(Of::Calls, number);
        counts
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_is_what_lasted_for_a_minute() {
        let hot = Hot::default();
        let second = Duration::from_secs(1);
        let rate = |hot: &Hot| hot.top(Measure::Requests, 1)[0].per_second;
        for _ in 0..10 {
            hot.add(id(1), &calls(600), None);
            tokio::time::advance(second).await;
            hot.tick(Instant::now());
        }
        let burst = rate(&hot);
        assert!(
            (85.0..=95.0).contains(&burst),
            "{burst} after 10 s of 600/s"
        );
        // Long enough for the counts to be scaled down once.
        for _ in 0..3000 {
            hot.add(id(1), &calls(600), None);
            tokio::time::advance(second).await;
            hot.tick(Instant::now());
        }
        let sustained = rate(&hot);
        assert!((590.0..=601.0).contains(&sustained), "{sustained}");
        tokio::time::advance(60 * second).await;
        hot.tick(Instant::now());
        let later = rate(&hot);
        assert!(
            (215.0..=222.0).contains(&later),
            "{later}: a minute later it is 1/e"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn habits_are_ratios_and_intervals() {
        let hot = Hot::default();
        let mut counts = calls(2);
        counts.count(Of::RowsRead, 300);
        counts.count(Of::RowsReturned, 3);
        counts.count(Of::ObjectCalls, 5);
        hot.add(id(1), &counts, Some((4, Instant::now())));
        for round in 0..4 {
            hot.alarm_ended(id(1), round > 0, 1_000_000 + round * 5000);
            let mut alarm = Counts::ZERO;
            alarm.count(Of::Alarms, 1);
            hot.add(id(1), &alarm, None);
        }
        let read = &hot.top(Measure::RowsRead, 1)[0].habits;
        assert_eq!(read.rows_read_per_row(), Some(100.0));
        assert_eq!(read.rows_read_per_request(), Some(150.0));
        let called = &hot.top(Measure::ObjectCalls, 1)[0].habits;
        assert_eq!(called.calls_per_request(), Some(2.5));
        assert_eq!(called.fan_out(Instant::now()), Some(4));
        let later = Instant::now() + FAN_OUT_KEPT;
        assert_eq!(called.fan_out(later), None);
        let alarms = &hot.top(Measure::Alarms, 1)[0].habits;
        assert_eq!(alarms.alarm_every_seconds(), Some(5.0));
        assert_eq!(alarms.idle_alarms, 3, "the first wrote something");
        assert!(hot.top(Measure::RowsWritten, 1).is_empty());
    }
}
