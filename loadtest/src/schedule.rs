//! When requests are meant to be sent, and to whom. All from one seed: the same seed, the same load.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, Exp1, Zipf};
use tokio::sync::Notify;

/// How arrivals follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Arrivals {
    /// Independent clients: exponential gaps
    Poisson,
    /// A metronome
    Even,
}

/// Which objects are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Names {
    /// Each as likely as any other
    Uniform,
    /// A few hot ones and a long tail
    Zipf,
}

/// Requests that may be due and not yet sent. One more is not sent at all, and counted as such.
const BACKLOG_MAX: usize = 1 << 20;

/// One request that is to be sent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrival {
    /// When it was meant to be sent.
    pub(crate) intended: Instant,
    pub(crate) object: u32,
}

/// Draws objects by number.
pub(crate) struct Picker {
    random: SmallRng,
    count: u32,
    zipf: Option<Zipf<f64>>,
}

impl Picker {
    pub(crate) fn new(names: Names, count: u32, exponent: f64, seed: u64) -> anyhow::Result<Self> {
        let zipf = match names {
            Names::Uniform => None,
            Names::Zipf => Some(Zipf::new(f64::from(count), exponent)?),
        };
        Ok(Self {
            random: SmallRng::seed_from_u64(seed),
            count,
            zipf,
        })
    }

    pub(crate) fn pick(&mut self) -> u32 {
        match &self.zipf {
            None => self.random.random_range(0..self.count),
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a Zipf sample is a whole number from 1 to the count"
            )]
            Some(zipf) => (zipf.sample(&mut self.random) as u32 - 1).min(self.count - 1),
        }
    }
}

/// The moments of arrival, one after the other.
pub(crate) struct Gaps {
    random: SmallRng,
    arrivals: Arrivals,
    mean: Duration,
}

impl Gaps {
    pub(crate) fn new(arrivals: Arrivals, rate: f64, seed: u64) -> Self {
        Self {
            random: SmallRng::seed_from_u64(seed),
            arrivals,
            mean: Duration::from_secs_f64(1.0 / rate),
        }
    }

    pub(crate) fn next(&mut self) -> Duration {
        match self.arrivals {
            Arrivals::Even => self.mean,
            Arrivals::Poisson => {
                let factor: f64 = Exp1.sample(&mut self.random);
                self.mean.mul_f64(factor)
            }
        }
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

/// Makes arrivals due at their time, from `begin` for `duration`. Blocks: it wants its own thread,
/// because a sleeping thread wakes within some 60 µs, and timers of the runtime only within 1 ms.
#[expect(
    clippy::disallowed_methods,
    reason = "the load generator keeps real time on a thread of its own"
)]
pub(crate) fn generate(
    due: &Due,
    begin: Instant,
    duration: Duration,
    mut gaps: Gaps,
    mut picker: Picker,
) {
    let mut intended = begin;
    loop {
        intended += gaps.next();
        if intended.duration_since(begin) >= duration {
            break;
        }
        let now = Instant::now();
        if intended > now {
            std::thread::sleep(intended - now);
        }
        due.push(Arrival {
            intended,
            object: picker.pick(),
        });
    }
    due.close();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats() {
        let picks = |seed| -> Vec<u32> {
            let mut picker = Picker::new(Names::Zipf, 100, 1.0, seed).unwrap();
            (0..50).map(|_| picker.pick()).collect()
        };
        assert_eq!(picks(7), picks(7));
        assert_ne!(picks(7), picks(8));
    }

    #[test]
    fn zipf_has_hot_objects_and_uniform_has_none() {
        let share_of_first = |names| {
            let mut picker = Picker::new(names, 1000, 1.0, 1).unwrap();
            (0..10_000).filter(|_| picker.pick() == 0).count()
        };
        assert!(share_of_first(Names::Zipf) > 1000);
        assert!(share_of_first(Names::Uniform) < 50);
    }

    #[test]
    fn gaps_have_the_mean_of_the_rate() {
        for arrivals in [Arrivals::Poisson, Arrivals::Even] {
            let mut gaps = Gaps::new(arrivals, 1000.0, 3);
            let total: Duration = (0..10_000).map(|_| gaps.next()).sum();
            assert!(
                (9.5..10.5).contains(&total.as_secs_f64()),
                "{arrivals:?} {total:?}"
            );
        }
    }
}
