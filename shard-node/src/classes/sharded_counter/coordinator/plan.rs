//! The plan of a counter: what gateways are told of it, and changes.

use std::rc::Rc;

use protocol::Problem;
use protocol::counters::{Change, KEYS_KEPT, Place, Plan, Scope, Seat};
use tracing::warn;

use super::draining::{DRAIN_AGAIN, DRAIN_MAX};
use super::known::Known;
use super::{Summing, millis};
use crate::class::{ClassError, Json};
use crate::classes::sharded_counter::answer;
use crate::classes::sharded_counter::table::{Earlier, Settings};

impl Summing {
    pub(super) fn plan(
        &self,
        place: Place,
        has_nodes: bool,
        heard: u64,
    ) -> Result<Plan, ClassError> {
        let mut known = self.take()?;
        self.catch_up(&mut known, heard)?;
        let place = match (known.settings.scope, place) {
            (Scope::Global, _) => Place::Anywhere,
            (Scope::Colo, Place::Colo(colo) | Place::ForColo(colo)) => {
                let ours = [Place::Colo(colo), Place::ForColo(colo)];
                match known.places.iter().find(|place| ours.contains(place)) {
                    Some(place) => *place,
                    None => {
                        // Before anything is counted there: an exact read must know whom to ask.
                        let place = if has_nodes { ours[0] } else { ours[1] };
                        self.table.add_place(place)?;
                        known.places.push(place);
                        place
                    }
                }
            }
            (Scope::Colo, Place::Anywhere) => {
                self.put(known);
                return Err(ClassError::BadRequest(
                    "plan: a counter with shards per colo needs a colo".to_owned(),
                ));
            }
        };
        let since = self.now().saturating_sub(millis(KEYS_KEPT));
        let earlier = match known.stored {
            true => self.table.sets(since)?,
            false => Vec::new(),
        };
        let settings = &known.settings;
        let plan = Plan {
            version: settings.version,
            place,
            shards: settings.shards,
            strategy: settings.strategy,
            report_every_ms: settings.report_every_ms(),
            earlier: earlier.iter().map(|set: &Earlier| set.set(place)).collect(),
        };
        self.put(known);
        Ok(plan)
    }

    /// Somebody goes by plan `heard`. If that is above ours, we were deleted or restored since: the plan that we have
    /// now follows it, or nobody would ever take it.
    pub(super) fn catch_up(&self, known: &mut Known, heard: u64) -> Result<(), ClassError> {
        let version = known.settings.version;
        if heard <= version {
            return Ok(());
        }
        warn!(counter = %self.context.id(), version, heard, "a plan of this counter was forgotten");
        self.store(known)?;
        let after = Settings {
            version: heard.saturating_add(1),
            ..known.settings.clone()
        };
        self.table.write(&after)?;
        known.settings = after;
        Ok(())
    }

    pub(super) async fn reshard(self: Rc<Self>, change: Change) -> Result<Json, ClassError> {
        let _changing = Changing::begin(&self)?;
        // A shard that is to come back must have been drained first.
        if self.comes_back(&change)? {
            self.drain(DRAIN_MAX).await?;
            if self.comes_back(&change)? {
                return Err(ClassError::Called(Problem::unavailable(
                    "some of these shards are still retiring and do not answer; nothing was changed",
                )));
            }
        }
        let mut known = self.take()?;
        let changed = known.settings.changed(&change)?;
        self.apply(&mut known, changed)?;
        let retires = !known.retiring.is_empty();
        self.put(known);
        if retires {
            // Whatever becomes of this turn, they are drained.
            self.context.set_alarm(self.now() + millis(DRAIN_AGAIN))?;
            self.drain(DRAIN_MAX).await?;
        }
        answer(self.standing()?)
    }

    fn comes_back(&self, change: &Change) -> Result<bool, ClassError> {
        let known = self.take()?;
        let changed = known.settings.changed(change);
        let comes_back = changed.map(|changed| {
            let mut retiring = known.retiring.keys();
            retiring.any(|seat| known.has(&changed, *seat))
        });
        self.put(known);
        comes_back
    }

    /// Makes a plan of these settings; shards that it leaves out begin to retire.
    pub(super) fn apply(&self, known: &mut Known, changed: Settings) -> Result<(), ClassError> {
        if changed == known.settings {
            return Ok(());
        }
        self.store(known)?;
        let before = known.settings.clone();
        let after = Settings {
            version: before.version + 1,
            ..changed
        };
        if (before.scope, before.shards) != (after.scope, after.shards) {
            self.table
                .forget_sets(self.now().saturating_sub(millis(KEYS_KEPT)))?;
            self.table.end_set(&before, self.now())?;
            let leaving: Vec<Seat> = known
                .seats_of(&before)
                .filter(|seat| !known.has(&after, *seat))
                .collect();
            for seat in leaving {
                self.retire(known, seat, after.version)?;
            }
            self.heat.borrow_mut().restart();
            if let Some(meters) = self.meters.get() {
                meters.reshards.increment(1);
            }
        }
        self.table.write(&after)?;
        known.settings = after;
        Ok(())
    }
}

/// An operator's change under way: one at a time.
struct Changing(Rc<Summing>);

impl Changing {
    fn begin(counter: &Rc<Summing>) -> Result<Self, ClassError> {
        if counter.changing.replace(true) {
            return Err(ClassError::Called(Problem::unavailable(
                "another change of this counter is under way; nothing was changed",
            )));
        }
        Ok(Self(Rc::clone(counter)))
    }
}

impl Drop for Changing {
    fn drop(&mut self) {
        self.0.changing.set(false);
    }
}
