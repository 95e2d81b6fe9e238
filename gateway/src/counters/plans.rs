//! The plans of counters that this process knows: asked for when first needed, once, and again only when a shard
//! says that there is a newer one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use arc_swap::ArcSwapOption;
use dashmap::DashMap;
use protocol::counters::{CounterName, PLAN, Place, Plan, Seat, Strategy};
use protocol::{Colo, Home, Problem, ShardId};
use rand::Rng;
use tokio::time::Instant;
use tracing::warn;

use super::call::{Call, Nature};
use super::{Counters, Origin, coordinator};
use crate::metrics::CounterMetrics;

/// Which plan: those of counters with shards per colo differ by where requests come in.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct PlanKey {
    pub(crate) name: CounterName,
    pub(crate) colo: Colo,
}

/// A plan in use.
#[derive(Debug)]
pub(crate) struct Planned {
    pub(crate) plan: Plan,
    next: AtomicU32,
}

impl Planned {
    pub(super) fn new(plan: Plan) -> Self {
        Self {
            plan,
            next: AtomicU32::new(0),
        }
    }

    /// A shard for what may go to any.
    pub(super) fn next_seat(&self) -> Seat {
        let index = match self.plan.strategy {
            Strategy::RoundRobin => self.turn(),
            // Those of the strategy `hash` have a shard of their own.
            Strategy::Random | Strategy::Hash => rand::rng().random_range(0..self.plan.shards),
        };
        Seat {
            place: self.plan.place,
            index,
        }
    }

    /// The shard whose turn it is.
    fn turn(&self) -> u32 {
        self.next.fetch_add(1, Ordering::Relaxed) % self.plan.shards.max(1)
    }
}

/// What is known of one counter.
#[derive(Default)]
struct Slot {
    planned: ArcSwapOption<Planned>,
    /// Held while the coordinator is asked: the others wait for it.
    asking: tokio::sync::Mutex<Option<Failed>>,
    /// The newest version that a shard spoke of, and that was asked for.
    heard: AtomicU64,
    /// When it was used last, in milliseconds since the start.
    used: AtomicU64,
}

/// Which plan is asked for.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Wanted {
    /// Newer than this.
    pub(super) above: u64,
    /// The newest version that anybody spoke of; 0 if nobody did. A coordinator that has forgotten it goes on above it.
    pub(super) heard: u64,
}

/// Why the coordinator gave no plan when it was asked last.
struct Failed {
    at: Instant,
    problem: Problem,
}

/// The plans of all counters, shared by the threads of a gateway.
pub struct Plans {
    slots: DashMap<PlanKey, Arc<Slot>>,
    started: Instant,
    pub(crate) metrics: CounterMetrics,
}

impl Plans {
    pub(crate) fn new(metrics: CounterMetrics) -> Self {
        Self {
            slots: DashMap::new(),
            started: Instant::now(),
            metrics,
        }
    }

    /// Publishes what is not counted as it happens.
    pub(crate) fn publish(&self) {
        self.metrics.plans.set(self.slots.len() as f64);
    }

    fn slot(&self, key: &PlanKey, most: usize) -> Arc<Slot> {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        if let Some(slot) = self.slots.get(key) {
            slot.used.store(now, Ordering::Relaxed);
            return Arc::clone(&slot);
        }
        if self.slots.len() >= most {
            self.forget(most);
        }
        let slot = Arc::clone(&self.slots.entry(key.clone()).or_default());
        slot.used.store(now, Ordering::Relaxed);
        slot
    }

    /// Makes room for a sixteenth of `most`: what was not used for longest goes.
    fn forget(&self, most: usize) {
        let used = |slot: &Arc<Slot>| slot.used.load(Ordering::Relaxed);
        let mut times: Vec<u64> = self.slots.iter().map(|slot| used(slot.value())).collect();
        let room = (most / 16).max(1) + times.len().saturating_sub(most);
        let last = room.min(times.len()).saturating_sub(1);
        if times.is_empty() {
            return;
        }
        let (_, bound, _) = times.select_nth_unstable(last);
        let bound = *bound;
        let mut left = room;
        self.slots.retain(|_, slot| {
            let goes = left > 0 && used(slot) <= bound;
            left -= usize::from(goes);
            !goes
        });
    }
}

impl Slot {
    fn install(&self, plan: Plan) -> Arc<Planned> {
        let current = self.planned.load_full();
        match current.filter(|current| current.plan.version >= plan.version) {
            // The same plan goes on with the next shard in turn.
            Some(current) => current,
            None => {
                let planned = Arc::new(Planned::new(plan));
                self.planned.store(Some(Arc::clone(&planned)));
                planned
            }
        }
    }
}

impl Counters {
    fn slot(&self, key: &PlanKey) -> Arc<Slot> {
        let most = self.shared.dynamic.load().counters.plans_max.get() as usize;
        self.shared.plans.slot(key, most)
    }

    /// The plan of a counter, which is asked for if it is not known.
    pub(super) async fn plan(
        &self,
        key: &PlanKey,
        origin: &Origin,
    ) -> Result<Arc<Planned>, Problem> {
        let slot = self.slot(key);
        match slot.planned.load_full() {
            Some(planned) => Ok(planned),
            None => self.ask_slot(&slot, key, Wanted::default(), origin).await,
        }
    }

    /// A newer plan, if the coordinator has one.
    pub(super) async fn ask_for_plan(
        &self,
        key: &PlanKey,
        wanted: Wanted,
        origin: &Origin,
    ) -> Result<Arc<Planned>, Problem> {
        self.metrics().plan_refreshes.increment(1);
        self.ask_slot(&self.slot(key), key, wanted, origin).await
    }

    /// A shard has heard of plan `version`: if that is news, the plan is asked for, and nobody waits for it.
    pub(super) fn learn(self: &Arc<Self>, key: &PlanKey, planned: &Planned, version: u64) {
        if version <= planned.plan.version {
            return;
        }
        let slot = self.slot(key);
        if slot.heard.fetch_max(version, Ordering::Relaxed) >= version {
            return;
        }
        let (this, key) = (Arc::clone(self), key.clone());
        tokio::spawn(async move {
            let origin = Origin::own(key.colo);
            let wanted = Wanted {
                above: version - 1,
                heard: version,
            };
            let asked = this.ask_for_plan(&key, wanted, &origin).await;
            if let Err(problem) = asked {
                // The next answer of a shard asks again.
                slot.heard.store(0, Ordering::Relaxed);
                warn!(counter = %key.name, problem = problem.detail, "no newer plan of a counter");
            }
        });
    }

    /// One asks; whoever waited meanwhile takes what came of it, if that is what is wanted.
    async fn ask_slot(
        &self,
        slot: &Slot,
        key: &PlanKey,
        wanted: Wanted,
        origin: &Origin,
    ) -> Result<Arc<Planned>, Problem> {
        let begun = Instant::now();
        let mut asking = slot.asking.lock().await;
        let known = slot.planned.load_full();
        if let Some(planned) = known.filter(|known| known.plan.version > wanted.above) {
            return Ok(planned);
        }
        if let Some(failed) = asking.as_ref().filter(|failed| failed.at >= begun) {
            return Err(failed.problem.clone());
        }
        match self
            .ask_coordinator(key, wanted.heard, &origin.for_all())
            .await
        {
            Ok(plan) => {
                *asking = None;
                Ok(slot.install(plan))
            }
            Err(problem) => {
                let at = Instant::now();
                *asking = Some(Failed {
                    at,
                    problem: problem.clone(),
                });
                Err(problem)
            }
        }
    }

    async fn ask_coordinator(
        &self,
        key: &PlanKey,
        heard: u64,
        origin: &Origin,
    ) -> Result<Plan, Problem> {
        let ring = self.shared.placement.ring();
        let has_nodes =
            ring.is_some_and(|ring| ring.owner(Home::Colo(key.colo), ShardId(0)).is_ok());
        let place = Place::Colo(key.colo);
        let arguments = match heard {
            0 => serde_json::to_vec(&(place, has_nodes)),
            _ => serde_json::to_vec(&(place, has_nodes, heard)),
        };
        let plan: Plan = self
            .call(&Call {
                target: &coordinator(&key.name, PLAN),
                arguments: arguments.expect("a text, a flag and a number serialize"),
                nature: Nature::Reads,
                origin,
            })
            .await?;
        match plan.shards {
            0 => Err(Problem::unavailable(
                "the coordinator of this counter has no shards",
            )),
            _ => Ok(plan),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plans() -> Plans {
        let registry = Arc::new(ops::metrics::Registry::default());
        Plans::new(crate::metrics::Metrics::new(registry).counters())
    }

    fn key(number: usize) -> PlanKey {
        PlanKey {
            name: format!("c{number}").parse().unwrap(),
            colo: Colo::UNKNOWN,
        }
    }

    fn plan(version: u64) -> Plan {
        Plan {
            version,
            place: Place::Anywhere,
            shards: 3,
            strategy: Strategy::RoundRobin,
            report_every_ms: 100,
            earlier: Vec::new(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_plans_that_were_not_used_for_longest_are_forgotten() {
        let plans = plans();
        for number in 0..100 {
            tokio::time::advance(std::time::Duration::from_millis(1)).await;
            plans.slot(&key(number), 64);
            // The first one is always in use.
            plans.slot(&key(0), 64);
            assert!(plans.slots.len() <= 64);
        }
        assert!(plans.slots.contains_key(&key(0)));
        assert!(!plans.slots.contains_key(&key(1)));
        assert!((50..100).all(|number| plans.slots.contains_key(&key(number))));
        // A smaller bound is kept at once.
        plans.slot(&key(1000), 8);
        assert!(plans.slots.len() <= 8, "{}", plans.slots.len());
    }

    #[test]
    fn an_older_plan_never_takes_the_place_of_a_newer_one() {
        let slot = Slot::default();
        assert_eq!(slot.install(plan(2)).plan.version, 2);
        assert_eq!(slot.install(plan(1)).plan.version, 2);
        assert_eq!(slot.install(plan(3)).plan.version, 3);
    }

    #[test]
    fn turns_go_round() {
        let planned = Planned::new(plan(1));
        let turns: Vec<u32> = (0..7).map(|_| planned.turn()).collect();
        assert_eq!(turns, [0, 1, 2, 0, 1, 2, 0]);
    }
}
