//! When requests are meant to be sent, and to whom. All from one seed: the same seed, the same load.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, Exp1, Zipf};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::operation::{Mix, Operation};
use crate::rate::Rate;

/// How arrivals follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
pub enum Arrivals {
    /// Independent clients: exponential gaps
    Poisson,
    /// A metronome
    Even,
}

/// Which objects are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
pub enum Names {
    /// Each as likely as any other
    Uniform,
    /// A few hot ones and a long tail
    Zipf,
    /// One gets the share that --hot-share says, the others the rest
    HotSpot,
}

/// Requests that may be due and not yet sent. One more is not sent at all, and counted as such.
const BACKLOG_MAX: usize = 1 << 20;

/// One request that is to be sent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrival {
    /// When it was meant to be sent.
    pub(crate) intended: Instant,
    pub(crate) object: u32,
    pub(crate) operation: Operation,
}

/// Which objects are asked, and for what.
#[derive(Debug, Clone)]
pub(crate) struct Picks {
    pub(crate) names: Names,
    pub(crate) objects: u32,
    pub(crate) zipf_exponent: f64,
    /// From 0 to 1.
    pub(crate) hot_share: f64,
    pub(crate) mix: Mix,
}

/// Draws objects by number.
pub(crate) struct Picker {
    random: SmallRng,
    count: u32,
    distribution: Distribute,
    mix: Mix,
    weights: u32,
}

enum Distribute {
    Uniform,
    Zipf(Zipf<f64>),
    HotSpot(f64),
}

impl Picker {
    pub(crate) fn new(picks: &Picks, seed: u64) -> anyhow::Result<Self> {
        let distribution = match picks.names {
            Names::Uniform => Distribute::Uniform,
            Names::Zipf => {
                Distribute::Zipf(Zipf::new(f64::from(picks.objects), picks.zipf_exponent)?)
            }
            Names::HotSpot => Distribute::HotSpot(picks.hot_share),
        };
        Ok(Self {
            random: SmallRng::seed_from_u64(seed),
            count: picks.objects,
            distribution,
            mix: picks.mix.clone(),
            weights: picks.mix.total(),
        })
    }

    pub(crate) fn pick(&mut self, intended: Instant) -> Arrival {
        Arrival {
            intended,
            object: self.object(),
            operation: self.mix.at(self.random.random_range(0..self.weights)),
        }
    }

    fn object(&mut self) -> u32 {
        match &self.distribution {
            Distribute::Uniform => self.random.random_range(0..self.count),
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a Zipf sample is a whole number from 1 to the count"
            )]
            Distribute::Zipf(zipf) => {
                (zipf.sample(&mut self.random) as u32 - 1).min(self.count - 1)
            }
            Distribute::HotSpot(share) => {
                if self.count == 1 || self.random.random::<f64>() < *share {
                    0
                } else {
                    self.random.random_range(1..self.count)
                }
            }
        }
    }
}

/// The moments of arrival, one after the other.
pub(crate) struct Gaps {
    random: SmallRng,
    arrivals: Arrivals,
    rate: Rate,
}

impl Gaps {
    pub(crate) fn new(arrivals: Arrivals, rate: Rate, seed: u64) -> Self {
        Self {
            random: SmallRng::seed_from_u64(seed),
            arrivals,
            rate,
        }
    }

    /// The gap after an arrival when this share of the time has passed.
    pub(crate) fn next(&mut self, progress: f64) -> Duration {
        let mean = Duration::from_secs_f64(1.0 / self.rate.at(progress));
        match self.arrivals {
            Arrivals::Even => mean,
            Arrivals::Poisson => {
                let factor: f64 = Exp1.sample(&mut self.random);
                mean.mul_f64(factor)
            }
        }
    }
}

/// When a run begins, when measuring does, and when it ends. The rate is that of its begin until
/// measuring begins.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Span {
    pub(crate) begin: Instant,
    pub(crate) measure_from: Instant,
    pub(crate) end: Instant,
}

impl Span {
    /// The share of the measured time that has passed at a moment, from 0 to 1.
    pub(crate) fn progress(&self, at: Instant) -> f64 {
        let measured = (self.end - self.measure_from).as_secs_f64();
        let passed = at.saturating_duration_since(self.measure_from);
        (passed.as_secs_f64() / measured).min(1.0)
    }
}

/// Arrivals that are due, between the thread that makes them and the connections that send them.
#[derive(Default)]
pub(crate) struct Due {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Arrival>,
    not_sent: u64,
    closed: bool,
}

impl Due {
    /// The next arrival; `None` when there will be no more.
    pub(crate) async fn next(&self) -> Option<Arrival> {
        loop {
            {
                let mut state = self.lock();
                if let Some(arrival) = state.queue.pop_front() {
                    return Some(arrival);
                }
                if state.closed {
                    // Whoever else waits must see it too.
                    self.changed.notify_one();
                    return None;
                }
            }
            self.changed.notified().await;
        }
    }

    /// How many arrivals were never sent because too many were due.
    pub(crate) fn not_sent(&self) -> u64 {
        self.lock().not_sent
    }

    /// How many arrivals are due and not yet sent.
    pub(crate) fn backlog(&self) -> usize {
        self.lock().queue.len()
    }

    fn push(&self, arrival: Arrival) {
        let mut state = self.lock();
        if state.queue.len() >= BACKLOG_MAX {
            state.not_sent += 1;
            return;
        }
        state.queue.push_back(arrival);
        drop(state);
        self.changed.notify_one();
    }

    fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_waiters();
        self.changed.notify_one();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes arrivals due at their time. Blocks: it wants its own thread, because a sleeping thread wakes
/// within some 60 µs, and timers of the runtime only within 1 ms.
#[expect(
    clippy::disallowed_methods,
    reason = "the load generator keeps real time on a thread of its own"
)]
pub(crate) fn generate(due: &Due, span: Span, mut gaps: Gaps, mut picker: Picker) {
    let mut intended = span.begin;
    loop {
        intended += gaps.next(span.progress(intended));
        if intended >= span.end {
            break;
        }
        let now = Instant::now();
        if intended > now {
            std::thread::sleep(intended - now);
        }
        due.push(picker.pick(intended));
    }
    due.close();
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "any moment will do")]
mod tests {
    use super::*;

    fn picks(names: Names, objects: u32) -> Picks {
        Picks {
            names,
            objects,
            zipf_exponent: 1.0,
            hot_share: 0.5,
            mix: "mixed".parse().unwrap(),
        }
    }

    #[test]
    fn a_seed_repeats() {
        let start = Instant::now();
        let picks = |seed| -> Vec<(u32, Operation)> {
            let mut picker = Picker::new(&picks(Names::Zipf, 100), seed).unwrap();
            let arrivals = (0..50).map(|_| picker.pick(start));
            arrivals.map(|one| (one.object, one.operation)).collect()
        };
        assert_eq!(picks(7), picks(7));
        assert_ne!(picks(7), picks(8));
    }

    #[test]
    fn zipf_and_hot_spot_have_hot_objects_and_uniform_has_none() {
        let share_of_first = |names| {
            let mut picker = Picker::new(&picks(names, 1000), 1).unwrap();
            (0..10_000).filter(|_| picker.object() == 0).count()
        };
        assert!(share_of_first(Names::Zipf) > 1000);
        assert!((4500..5500).contains(&share_of_first(Names::HotSpot)));
        assert!(share_of_first(Names::Uniform) < 50);
    }

    #[test]
    fn gaps_have_the_mean_of_the_rate() {
        for arrivals in [Arrivals::Poisson, Arrivals::Even] {
            let mut gaps = Gaps::new(arrivals, Rate::Constant(1000.0), 3);
            let total: Duration = (0..10_000).map(|_| gaps.next(0.0)).sum();
            assert!(
                (9.5..10.5).contains(&total.as_secs_f64()),
                "{arrivals:?} {total:?}"
            );
        }
    }

    #[test]
    fn a_ramp_sends_more_and_more() {
        let begin = Instant::now();
        let second = Duration::from_secs(1);
        let span = Span {
            begin,
            measure_from: begin + second,
            end: begin + 11 * second,
        };
        let ramp = Rate::Ramp {
            from: 100.0,
            to: 1100.0,
        };
        let mut gaps = Gaps::new(Arrivals::Even, ramp, 3);
        let mut sent = [0u32; 11];
        let mut at = begin;
        while at < span.end {
            sent[usize::try_from((at - begin).as_secs()).unwrap()] += 1;
            at += gaps.next(span.progress(at));
        }
        assert!((95..=105).contains(&sent[0]), "warm-up {sent:?}");
        assert!((140..=160).contains(&sent[1]), "{sent:?}");
        assert!((1020..=1080).contains(&sent[10]), "{sent:?}");
    }
}
