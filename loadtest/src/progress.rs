//! What is shown while a run lasts.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::measures::Measures;

/// The last second, as far as it is known.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Line {
    /// Since measuring began.
    second: u32,
    acknowledged: u64,
    errors: u64,
    /// Due, and not yet sent.
    backlog: usize,
    p50_us: u64,
    /// With several processes: the worst of theirs.
    p99_us: u64,
}

impl Line {
    /// The interval of the timeline that is over now.
    pub(crate) fn of(measures: &Measures, second: u32, backlog: usize) -> Self {
        let seconds = measures.interval().as_secs().max(1);
        let at = (u64::from(second) - 1) / seconds;
        let interval = usize::try_from(at).ok();
        let interval = interval.and_then(|at| measures.intervals.get(at));
        let quantile = |quantile| {
            interval.map_or(0, |one| one.latency.histogram().value_at_quantile(quantile))
        };
        Self {
            second,
            acknowledged: interval.map_or(0, |one| one.acknowledged),
            errors: interval.map_or(0, |one| one.errors),
            backlog,
            p50_us: quantile(0.5),
            p99_us: quantile(0.99),
        }
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = |us| format!("{:.2?}", Duration::from_micros(us));
        write!(
            f,
            "{:>5} s  {:>8}/s  p50 {:>9}  p99 {:>9}  {} errors, {} waiting to be sent",
            self.second,
            self.acknowledged,
            time(self.p50_us),
            time(self.p99_us),
            self.errors,
            self.backlog
        )
    }
}

/// Adds up the lines of several processes.
pub(crate) struct Sums {
    processes: u32,
    waiting: BTreeMap<u32, (u32, Line)>,
}

impl Sums {
    pub(crate) fn of(processes: u32) -> Self {
        Self {
            processes,
            waiting: BTreeMap::new(),
        }
    }

    /// The sum, once every process has told of that second.
    pub(crate) fn add(&mut self, line: Line) -> Option<Line> {
        let second = line.second;
        let (told, sum) = match self.waiting.remove(&second) {
            None => (1, line),
            Some((told, mut sum)) => {
                sum.acknowledged += line.acknowledged;
                sum.errors += line.errors;
                sum.backlog += line.backlog;
                sum.p50_us = sum.p50_us.max(line.p50_us);
                sum.p99_us = sum.p99_us.max(line.p99_us);
                (told + 1, sum)
            }
        };
        if told == self.processes {
            return Some(sum);
        }
        self.waiting.insert(second, (told, sum));
        None
    }
}

/// Shows something on stderr.
pub(crate) fn show(line: &impl fmt::Display) {
    // A closed stderr is no reason to stop.
    drop(writeln!(std::io::stderr(), "{line}"));
}
