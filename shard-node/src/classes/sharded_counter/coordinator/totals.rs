//! The sum of a counter: reports of its shards, and what readers are told.

use protocol::counters::{
    self, Report, Reported, SHARDS_ADVISED, Seat, Standing, TELL, Tally, Total,
};
use tracing::info;

use super::draining::DRAIN_AGAIN;
use super::known::Known;
use super::{ASKED_AT_ONCE, READ_MAX, Summing, millis};
use crate::class::ClassError;
use crate::classes::sharded_counter::heat::Window;
use crate::classes::sharded_counter::table::Settings;
use crate::fan_out::{FanOut, Needs};

/// A counter that chooses by itself has at least so many shards when it grows, and at most so many.
const AUTO: std::ops::RangeInclusive<u32> = SHARDS_ADVISED;

/// A late report is spoken of so long.
const LAG_KEPT_MS: u64 = 60_000;

/// Above this, operators are told that shards are unevenly used.
const SKEW_ADVISED: f64 = 3.0;

impl Summing {
    pub(super) fn read(&self) -> Result<Total, ClassError> {
        let known = self.take()?;
        let total = Total {
            value: known.value(),
            shards: known.settings.shards,
            staleness_ms: self.staleness_ms(&known.settings),
        };
        self.put(known);
        Ok(total)
    }

    /// Asks every shard. Whatever was acknowledged before this began is in the value.
    pub(super) async fn read_exact(&self) -> Result<Total, ClassError> {
        let known = self.take()?;
        let retiring = known.retiring.keys().copied();
        let seats: Vec<Seat> = known.seats_of(&known.settings).chain(retiring).collect();
        self.put(known);
        let counter = self.counter()?;
        let calls = seats.into_iter().map(|seat| {
            let told = self.ask(&counter, seat, TELL, Vec::new());
            async move { Ok((seat, told.await?)) }
        });
        let fan_out = FanOut {
            at_once: ASKED_AT_ONCE,
            within: READ_MAX,
            needs: Needs::All,
        };
        let told = fan_out.gather(calls).await?;
        let mut known = self.take()?;
        for (seat, tally) in told.into_iter().flatten() {
            self.accept(&mut known, seat, tally)?;
        }
        let total = Total {
            value: known.value(),
            shards: known.settings.shards,
            staleness_ms: 0,
        };
        self.put(known);
        Ok(total)
    }

    pub(super) fn report(&self, report: &Report) -> Result<Reported, ClassError> {
        let mut known = self.take()?;
        let Report { seat, tally, .. } = *report;
        self.catch_up(&mut known, report.heard)?;
        let accepted = self.accept(&mut known, seat, tally)?;
        self.note_lag(report.lag_ms, &known.settings);
        if accepted && known.has(&known.settings, seat) {
            let count = known.seats_of(&known.settings).count();
            let count = u32::try_from(count).unwrap_or(u32::MAX);
            let mut heat = self.heat.borrow_mut();
            let window = heat.note(seat, tally.turns, count, self.now());
            drop(heat);
            if let Some(window) = window {
                self.take_heat(&mut known, &window)?;
            }
        }
        let reported = Reported {
            version: known.settings.version,
            report_every_ms: known.settings.report_every_ms(),
        };
        self.put(known);
        Ok(reported)
    }

    /// A window of seconds has ended: adds shards if they run hot and the counter chooses by itself.
    fn take_heat(&self, known: &mut Known, window: &Window) -> Result<(), ClassError> {
        if let Some(meters) = self.meters.get() {
            meters.skew(self.context.id(), window.skew, self.now());
        }
        let shards = known.settings.shards;
        // Shards that retire may be among those that would be added.
        let may_grow = known.settings.auto && shards < *AUTO.end() && known.retiring.is_empty();
        if !may_grow || !window.is_hot() {
            return Ok(());
        }
        let grown = Settings {
            shards: shards.saturating_mul(2).clamp(*AUTO.start(), *AUTO.end()),
            ..known.settings.clone()
        };
        info!(counter = %self.context.id(), from = shards, to = grown.shards, rate = window.rate, "a counter's shards run hot");
        self.apply(known, grown)
    }

    /// Takes what a shard says of itself, if it is newer than what is known.
    fn accept(&self, known: &mut Known, seat: Seat, tally: Tally) -> Result<bool, ClassError> {
        self.catch_up(known, tally.generation.unwrap_or(0))?;
        if known.is_forgotten(seat, &tally) {
            self.store(known)?;
            let version = known.settings.version;
            self.retire(known, seat, version)?;
            self.context.set_alarm(self.now() + millis(DRAIN_AGAIN))?;
        }
        let before = known.tallies.get(&seat).copied();
        let newer = before.is_none_or(|before| {
            (before.generation, before.turns) < (tally.generation, tally.turns)
        });
        if !newer || !known.counts(seat, &tally) {
            return Ok(false);
        }
        self.store(known)?;
        self.table.put_shard(seat, &tally)?;
        known.sum += i128::from(tally.total) - before.map_or(0, |before| before.total.into());
        known.tallies.insert(seat, tally);
        Ok(true)
    }

    /// How old the value may be.
    fn staleness_ms(&self, settings: &Settings) -> u64 {
        let stated = counters::staleness_ms(settings.report_every_ms());
        let (lag_ms, at_ms) = self.lag.get();
        match self.now().saturating_sub(at_ms) > LAG_KEPT_MS {
            true => stated,
            false => stated.max(lag_ms),
        }
    }

    fn note_lag(&self, lag_ms: u64, settings: &Settings) {
        if let Some(meters) = self.meters.get() {
            let stated_ms = counters::staleness_ms(settings.report_every_ms());
            meters.report(lag_ms, stated_ms);
        }
        let (longest, at_ms) = self.lag.get();
        if lag_ms >= longest || self.now().saturating_sub(at_ms) > LAG_KEPT_MS {
            self.lag.set((lag_ms, self.now()));
        }
    }

    pub(super) fn standing(&self) -> Result<Standing, ClassError> {
        let known = self.take()?;
        let settings = &known.settings;
        let window = self.heat.borrow().last();
        let mut warnings = Vec::new();
        if !SHARDS_ADVISED.contains(&settings.shards) {
            warnings.push(format!(
                "{} shards are outside of what is advised, {} to {}",
                settings.shards,
                SHARDS_ADVISED.start(),
                SHARDS_ADVISED.end()
            ));
        }
        if let Some(window) = window.filter(|window| window.skew > SKEW_ADVISED) {
            warnings.push(format!(
                "shard {} has {:.1} times the turns of a mean shard: strategy random or round_robin is even",
                window.hottest, window.skew
            ));
        }
        let standing = Standing {
            value: known.value(),
            shards: settings.shards,
            version: settings.version,
            auto: settings.auto,
            scope: settings.scope,
            strategy: settings.strategy,
            report_every_ms: settings.report_every_ms(),
            staleness_ms: self.staleness_ms(settings),
            retiring: u32::try_from(known.retiring.len()).unwrap_or(u32::MAX),
            base: settings.base,
            skew: window.map(|window| window.skew),
            hottest: window.map(|window| window.hottest),
            hottest_rate: window.map(|window| window.rate),
            warnings,
        };
        self.put(known);
        Ok(standing)
    }
}
