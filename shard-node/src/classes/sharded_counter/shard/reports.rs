//! What a shard tells its coordinator, by its alarm.

use std::rc::Rc;
use std::time::Duration;

use protocol::counters::{self, REPORT, Report, Reported, Tally};
use tracing::debug;

use super::{ANSWER_MAX, Counting, State, millis};
use crate::class::{AlarmInfo, ClassError};
use crate::classes::sharded_counter::{answer, number, understood};

/// After a report failed, the next one is tried after twice the time, at most this.
const RETRY_MAX: Duration = Duration::from_secs(10);

impl Counting {
    /// Reports what is new, and forgets old keys.
    pub(super) async fn report(self: Rc<Self>, info: AlarmInfo) -> Result<(), ClassError> {
        let state = self.state()?;
        let mut next = None;
        if state.has_news() {
            let begun = self.context.unix_millis();
            let known_since = self.new_since.get().unwrap_or_else(|| {
                // It slept or died since: the alarm was set when the first was counted.
                let before = millis(self.report_every.get());
                info.scheduled_ms.saturating_sub(before)
            });
            let told = self
                .tell(state.tally(), begun.saturating_sub(known_since))
                .await;
            next = self.reported(told, state, begun)?;
        } else {
            self.reporting.set(false);
        }
        let forget = self.forget_keys()?;
        if let Some(at) = next.into_iter().chain(forget).min() {
            self.context.set_alarm(at)?;
        }
        Ok(())
    }

    async fn tell(&self, tally: Tally, lag_ms: u64) -> Result<Reported, ClassError> {
        let (counter, seat) = self.seat()?;
        let report = Report {
            seat,
            tally,
            lag_ms,
            heard: self.heard.get(),
        };
        let (_, name) = counter.coordinator();
        let coordinator = self.context.stub(&counters::coordinator_class(), &name);
        let coordinator = coordinator.within(ANSWER_MAX);
        let told = coordinator.call(REPORT, vec![answer(report)?]).await?;
        understood(told, REPORT)
    }

    /// When to report again, if there is something by now.
    fn reported(
        &self,
        told: Result<Reported, ClassError>,
        sent: State,
        begun: u64,
    ) -> Result<Option<u64>, ClassError> {
        let now = self.context.unix_millis();
        match told {
            Ok(reported) => {
                self.hear(reported.version);
                self.report_every
                    .set(Duration::from_millis(reported.report_every_ms));
                self.failures.set(0);
                let mut state = self.state()?;
                // It may have retired and begun again meanwhile.
                if state.generation == sent.generation && state.turns >= sent.turns {
                    self.state.set(None);
                    self.sql("UPDATE tally SET reported = ?1", &[number(sent.turns)])?;
                    state.reported = sent.turns;
                    self.state.set(Some(state));
                }
                self.reporting.set(state.has_news());
                // Whatever came meanwhile came after this.
                self.new_since.set(state.has_news().then_some(begun));
                Ok(state
                    .has_news()
                    .then(|| now + millis(self.report_every.get())))
            }
            Err(error) => {
                let failures = self.failures.get();
                self.failures.set(failures.saturating_add(1));
                let pause = self.report_every.get() * 2_u32.saturating_pow(failures.min(10));
                debug!(shard = %self.context.id(), %error, "a report failed");
                Ok(Some(now + millis(pause.min(RETRY_MAX))))
            }
        }
    }
}
