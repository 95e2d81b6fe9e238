//! Load shedding: how many requests may be under way at a target, and who is refused before it collapses.
//!
//! A request takes a *slot* before it is sent and gives it back when the head of its answer is there, or when
//! it is given up. What follows the head holds no slot: a WebSocket, a stream of events or a long download
//! says nothing of how busy its target is, and may last for ever. The time until the head is the sample that
//! the limit follows ([`adaptive`]).
//!
//! Taking and giving back a slot are atomic additions. About ten times a second one request computes the
//! limit anew; nobody waits for it.

pub mod adaptive;

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ops::config::Broken;
use protocol::{ErrorCode, Problem};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::metrics::ShedMetrics;
use adaptive::{Adaptive, Rule, Window};

/// Shortest window, and answers that end it; with fewer it lasts up to [`WINDOW_MAX`].
const WINDOW: Duration = Duration::from_millis(100);
const SAMPLES_MIN: u64 = 20;
const WINDOW_MAX: Duration = Duration::from_secs(1);

/// `seen` holds the number of samples above these bits, and below them the sum of their binary logarithms in
/// 256ths, at most 2^13 each.
const SUM_BITS: u32 = 40;
const LOG_STEPS: f64 = 256.0;
const _: () = assert!(
    SUM_BITS >= 13 + (64 - SUM_BITS),
    "as many samples as can be counted must not overflow their sum"
);

/// `shedding` of `[upstreams.NAME]` and `[objects]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SheddingConfig {
    /// The limit never falls below this.
    pub in_flight_min: NonZeroU32,
    /// It never rises above this.
    pub in_flight_max: NonZeroU32,
    /// How many times slower than without waiting requests may become.
    pub tolerance: f64,
}

impl Default for SheddingConfig {
    fn default() -> Self {
        Self {
            in_flight_min: NonZeroU32::new(8).expect("not 0"),
            in_flight_max: NonZeroU32::new(10_000).expect("not 0"),
            tolerance: 2.0,
        }
    }
}

impl SheddingConfig {
    /// # Errors
    /// The key, below `shedding`, that breaks a rule.
    pub fn check(&self) -> Result<(), Broken> {
        if self.in_flight_min > self.in_flight_max {
            let rule = format!("must be at most in_flight_max = {}", self.in_flight_max);
            return Err(Broken::value("in_flight_min", self.in_flight_min, rule));
        }
        // Not by a comparison that NaN passes.
        if !(1.1..=100.0).contains(&self.tolerance) {
            let rule = "must be from 1.1 to 100";
            return Err(Broken::value("tolerance", self.tolerance, rule));
        }
        Ok(())
    }

    fn rule(&self) -> Rule {
        Rule {
            in_flight_min: self.in_flight_min.get(),
            in_flight_max: self.in_flight_max.get(),
            tolerance: self.tolerance,
        }
    }
}

/// The requests under way at one target, for all threads of this gateway.
pub struct Shedder {
    /// What clients are told is busy.
    target: String,
    config: SheddingConfig,
    born: Instant,
    limit: AtomicU32,
    in_flight: AtomicU32,
    /// Most of them since the window began.
    peak: AtomicU32,
    seen: AtomicU64,
    /// Microseconds after `born`.
    window_begun: AtomicU64,
    /// Of whoever ends a window; never waited for.
    adaptive: Mutex<Adaptive>,
    metrics: ShedMetrics,
}

impl Shedder {
    pub fn new(
        target: impl Into<String>,
        config: &SheddingConfig,
        metrics: ShedMetrics,
    ) -> Arc<Self> {
        let adaptive = Adaptive::new(config.rule());
        Arc::new(Self {
            target: target.into(),
            config: config.clone(),
            born: Instant::now(),
            limit: AtomicU32::new(adaptive.limit()),
            in_flight: AtomicU32::new(0),
            peak: AtomicU32::new(0),
            seen: AtomicU64::new(0),
            window_begun: AtomicU64::new(0),
            adaptive: Mutex::new(adaptive),
            metrics,
        })
    }

    pub fn config(&self) -> &SheddingConfig {
        &self.config
    }

    /// A slot for one request.
    ///
    /// # Errors
    /// `overloaded`: nothing was sent.
    pub fn admit(self: &Arc<Self>, now: Instant) -> Result<Slot, Problem> {
        let now_us = self.age_us(now);
        let before = self.in_flight.fetch_add(1, Relaxed);
        // First of all its own: what was added is taken off again however this ends.
        let slot = Slot {
            shedder: Arc::clone(self),
            since_us: now_us,
        };
        let limit = self.limit.load(Relaxed);
        if before >= limit {
            self.metrics.shed.increment(1);
            drop(slot);
            self.look(now_us);
            return Err(self.problem(limit));
        }
        if before >= self.peak.load(Relaxed) {
            self.peak.fetch_max(before + 1, Relaxed);
        }
        self.look(now_us);
        Ok(slot)
    }

    /// Brings the gauges up to date.
    pub fn measure(&self) {
        self.metrics.limit.set(self.limit.load(Relaxed));
        self.metrics.in_flight.set(self.in_flight.load(Relaxed));
    }

    fn problem(&self, limit: u32) -> Problem {
        Problem::new(
            ErrorCode::Overloaded,
            format!(
                "{limit} requests are under way at {}, which is as many as it answers without delay now",
                self.target
            ),
        )
    }

    fn age_us(&self, now: Instant) -> u64 {
        let age = now.saturating_duration_since(self.born);
        u64::try_from(age.as_micros()).unwrap_or(u64::MAX)
    }

    /// Ends the window if it is time.
    fn look(&self, now_us: u64) {
        let age_us = now_us.saturating_sub(self.window_begun.load(Relaxed));
        if age_us < micros(WINDOW) {
            return;
        }
        let samples = self.seen.load(Relaxed) >> SUM_BITS;
        if samples < SAMPLES_MIN && age_us < micros(WINDOW_MAX) {
            return;
        }
        // Whoever comes second has nothing to do.
        let Ok(mut adaptive) = self.adaptive.try_lock() else {
            return;
        };
        let age_us = now_us.saturating_sub(self.window_begun.load(Relaxed));
        if age_us < micros(WINDOW) {
            return;
        }
        self.end_window(&mut adaptive, now_us, age_us);
        self.limit.store(adaptive.limit(), Relaxed);
    }

    fn end_window(&self, adaptive: &mut Adaptive, now_us: u64, age_us: u64) {
        let in_flight = self.in_flight.load(Relaxed);
        let in_flight_max = self.peak.load(Relaxed).max(in_flight);
        if self.seen.load(Relaxed) == 0 {
            let silence_max = adaptive.silence_max_us().unwrap_or(f64::INFINITY);
            if in_flight > 0 && (age_us as f64) < silence_max {
                // They may just take so long: the window goes on.
                return;
            }
            if in_flight > 0 {
                adaptive.stalled(Window {
                    latency_us: age_us as f64,
                    in_flight_max,
                });
            }
        } else {
            let seen = self.seen.swap(0, Relaxed);
            let sum = seen & ((1 << SUM_BITS) - 1);
            let mean = sum as f64 / LOG_STEPS / (seen >> SUM_BITS) as f64;
            adaptive.update(Window {
                latency_us: mean.exp2(),
                in_flight_max,
            });
        }
        self.peak.store(in_flight, Relaxed);
        self.window_begun.store(now_us, Relaxed);
    }
}

/// One request under way. Dropping it, without an answer, says nothing of the target.
pub struct Slot {
    shedder: Arc<Shedder>,
    since_us: u64,
}

impl Slot {
    /// The head of the answer is there, or was waited for in vain.
    pub fn answered(self, now: Instant) {
        let now_us = self.shedder.age_us(now);
        let took_us = now_us.saturating_sub(self.since_us).max(1);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "the logarithm of a u64 from 1 is from 0 to 64"
        )]
        let log = ((took_us as f64).log2() * LOG_STEPS) as u64;
        let sample = (1 << SUM_BITS) | log.min((1 << 13) - 1);
        self.shedder.seen.fetch_add(sample, Relaxed);
        self.shedder.look(now_us);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.shedder.in_flight.fetch_sub(1, Relaxed);
    }
}

const fn micros(duration: Duration) -> u64 {
    // Only of the constants above.
    duration.as_secs() * 1_000_000 + duration.subsec_micros() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;

    fn shedder() -> Arc<Shedder> {
        let metrics = Metrics::new(Arc::default());
        let config = SheddingConfig {
            in_flight_min: NonZeroU32::new(2).unwrap(),
            in_flight_max: NonZeroU32::new(100).unwrap(),
            tolerance: 2.0,
        };
        Shedder::new("app", &config, metrics.shed("upstreams.app"))
    }

    fn limit(shedder: &Shedder) -> u32 {
        shedder.limit.load(Relaxed)
    }

    /// Some requests at once that take so long.
    async fn round(shedder: &Arc<Shedder>, count: usize, took: Duration) {
        let slots = (0..count).filter_map(|_| shedder.admit(Instant::now()).ok());
        let slots: Vec<Slot> = slots.collect();
        tokio::time::advance(took).await;
        slots
            .into_iter()
            .for_each(|slot| slot.answered(Instant::now()));
    }

    #[tokio::test(start_paused = true)]
    async fn slots_are_given_back_however_a_request_ends() {
        let shedder = shedder();
        let slots: Vec<_> = (0..100)
            .map(|_| shedder.admit(Instant::now()).unwrap())
            .collect();
        let refused = shedder.admit(Instant::now()).err().unwrap();
        assert_eq!(refused.code, ErrorCode::Overloaded);
        assert!(refused.retryable && refused.retry_after_seconds().is_some());
        let mut slots = slots.into_iter();
        slots.next().unwrap().answered(Instant::now());
        drop(slots);
        assert_eq!(shedder.in_flight.load(Relaxed), 0);
        assert!(shedder.admit(Instant::now()).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn the_limit_follows_what_answers_take() {
        let shedder = shedder();
        for _ in 0..10 {
            round(&shedder, 50, Duration::from_millis(101)).await;
        }
        assert_eq!(limit(&shedder), 100, "steady is fast enough");
        for _ in 0..2 {
            round(&shedder, 90, Duration::from_secs(2)).await;
        }
        assert!(limit(&shedder) <= 50, "{}", limit(&shedder));
        for _ in 0..100 {
            round(&shedder, 50, Duration::from_millis(101)).await;
        }
        assert_eq!(limit(&shedder), 100, "and forgets it");
    }

    #[tokio::test(start_paused = true)]
    async fn a_target_that_answers_nothing_gets_less_and_less() {
        let shedder = shedder();
        for _ in 0..10 {
            round(&shedder, 50, Duration::from_millis(101)).await;
        }
        let mut held = Vec::new();
        for _ in 0..100 {
            held.extend(shedder.admit(Instant::now()).ok());
            tokio::time::advance(Duration::from_millis(100)).await;
        }
        let held = u32::try_from(held.len()).unwrap();
        assert!(limit(&shedder) < held && held < 50, "{held}");
    }

    #[tokio::test(start_paused = true)]
    async fn answers_that_take_long_by_nature_are_no_overload() {
        let shedder = shedder();
        for _ in 0..20 {
            round(&shedder, 90, Duration::from_secs(30)).await;
        }
        assert_eq!(limit(&shedder), 100);
    }

    #[test]
    fn what_breaks_a_rule_is_named() {
        let check = |toml: &str| toml::from_str::<SheddingConfig>(toml).unwrap().check();
        assert!(check("").is_ok());
        let text = |toml| check(toml).unwrap_err().to_string();
        assert!(text("in_flight_min = 20000").contains("in_flight_min = 20000"));
        assert!(text("tolerance = 1.0").contains("tolerance = 1"));
        assert!(text("tolerance = nan").contains("tolerance = NaN"));
    }
}
