//! Shards that a plan leaves out: their totals go to the base.

use std::rc::Rc;
use std::time::Duration;

use protocol::counters::{RETIRE, Seat, Tally};
use tracing::warn;

use super::known::Known;
use super::{ASKED_AT_ONCE, Summing, millis};
use crate::class::ClassError;
use crate::fan_out::{FanOut, Needs};

/// How long a change waits for the shards that it retires; the alarm goes on with the rest.
pub(super) const DRAIN_MAX: Duration = Duration::from_secs(10);
pub(super) const DRAIN_AGAIN: Duration = Duration::from_secs(1);

impl Summing {
    /// Retires the shards that the plan leaves out, as far as they answer.
    pub(super) async fn drain(&self, within: Duration) -> Result<(), ClassError> {
        let known = self.take()?;
        let retiring: Vec<(Seat, u64)> = known.retiring.clone().into_iter().collect();
        self.put(known);
        let counter = self.counter()?;
        let calls = retiring.into_iter().map(|(seat, version)| {
            let told = self.ask(&counter, seat, RETIRE, vec![version.into()]);
            async move { self.settle(seat, version, told.await?) }
        });
        let fan_out = FanOut {
            at_once: ASKED_AT_ONCE,
            within,
            needs: Needs::Nothing,
        };
        let settled = fan_out.gather(calls).await?;
        if let Some(error) = settled.iter().find_map(|settled| settled.as_ref().err()) {
            warn!(counter = %self.context.id(), %error, "a shard that retires does not answer yet");
        }
        Ok(())
    }

    /// Notes that a shard is left out since plan `version`.
    pub(super) fn retire(
        &self,
        known: &mut Known,
        seat: Seat,
        version: u64,
    ) -> Result<(), ClassError> {
        self.table.retire(seat, version)?;
        known.retiring.insert(seat, version);
        Ok(())
    }

    /// The total of a retired shard, which is final, goes to the base.
    fn settle(&self, seat: Seat, version: u64, tally: Tally) -> Result<(), ClassError> {
        let mut known = self.take()?;
        if known.retiring.get(&seat) != Some(&version) {
            // Somebody else asked, too.
            self.put(known);
            return Ok(());
        }
        if let Some(began) = tally.generation.filter(|began| *began > version) {
            // It goes by a plan that was forgotten, and counts on: it retires with the one after that.
            self.catch_up(&mut known, began)?;
            let version = known.settings.version;
            self.retire(&mut known, seat, version)?;
            self.put(known);
            return Ok(());
        }
        let total = match known.counts(seat, &tally) {
            true => tally.total,
            false => 0,
        };
        let base = known.settings.base + i128::from(total);
        self.table.drain(seat, version, base)?;
        known.settings.base = base;
        let reported = known.tallies.remove(&seat);
        known.sum -= reported.map_or(0, |reported| i128::from(reported.total));
        known.retiring.remove(&seat);
        known.drained.insert(seat, version);
        self.put(known);
        Ok(())
    }

    pub(super) async fn go_on_draining(self: Rc<Self>) -> Result<(), ClassError> {
        self.drain(DRAIN_MAX).await?;
        let known = self.take()?;
        let left = known.retiring.len();
        self.put(known);
        if left > 0 {
            self.context.set_alarm(self.now() + millis(DRAIN_AGAIN))?;
        }
        Ok(())
    }
}
