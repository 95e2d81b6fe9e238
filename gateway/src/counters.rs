//! Sharded counters, as their gateways see them; [`protocol::counters`] says who says what to whom.
//!
//! [`ask`] makes of a request what it asks of a counter. An increment goes to one of the shards of the counter's
//! plan ([`plans`]); those that come while enough calls are under way go together ([`combine`]).
//! [`call`] is how objects are asked. Nothing here is asked for before somebody needs it.

pub(crate) mod ask;
mod call;
mod combine;
pub(crate) mod config;
pub(crate) mod plans;

use std::sync::Arc;

use protocol::counters::{
    ADD, ADD_ONCE, AddOutcome, CounterName, READ, Seat, Strategy, Total, shard_class,
};
use protocol::trace::TraceParent;
use protocol::{Colo, ErrorCode, Problem};
use rand::Rng;
use tokio::time::Instant;

use crate::link::Links;
use crate::metrics::CounterMetrics;
use crate::proxy::Shared;
use crate::retry;
use crate::route::{Ask, ObjectTarget};
use ask::{CounterAsk, Increment, What};
use call::{Call, Nature};
use combine::{Combiner, Sent};
use plans::{PlanKey, Planned, Wanted};

/// The way to all counters, of one thread.
pub struct Counters {
    shared: Arc<Shared>,
    links: Arc<Links>,
    combiner: Combiner,
}

/// Which request asks.
#[derive(Debug, Clone)]
pub(crate) struct Origin {
    pub(crate) request: String,
    pub(crate) trace: TraceParent,
    pub(crate) colo: Colo,
    /// When nobody waits for the answer any more.
    pub(crate) deadline: Option<Instant>,
}

impl Origin {
    /// Of what the gateway asks without a request.
    fn own(colo: Colo) -> Self {
        let mut random = rand::rng();
        Self {
            request: format!("{:016x}", random.random::<u64>()),
            trace: TraceParent {
                trace: random.random::<u128>() | 1,
                span: random.random::<u64>() | 1,
                flags: 0,
            },
            colo,
            deadline: None,
        }
    }

    /// The same for a call whose answer others wait for, too.
    fn for_all(&self) -> Self {
        Self {
            deadline: None,
            ..self.clone()
        }
    }
}

/// An increment that was counted, now or before.
struct Counted {
    seat: Seat,
    planned: Arc<Planned>,
    repeated: bool,
}

impl Counters {
    pub fn new(shared: Arc<Shared>, links: Arc<Links>) -> Self {
        Self {
            shared,
            links,
            combiner: Combiner::default(),
        }
    }

    /// What the client is answered, as JSON.
    ///
    /// # Errors
    /// What it is told instead.
    pub(crate) async fn answer(
        self: &Arc<Self>,
        ask: &CounterAsk,
        origin: &Origin,
    ) -> Result<String, Problem> {
        match &ask.what {
            What::Read { exact } => self.read(&ask.name, *exact, origin).await,
            What::Increment(increment) => {
                let counted = self.increment(&ask.name, increment, origin).await;
                let outcome = counted.as_ref().map(|counted| counted.repeated);
                self.metrics().count(&outcome);
                counted.map(|counted| counted.json(increment.by))
            }
        }
    }

    fn metrics(&self) -> &CounterMetrics {
        &self.shared.plans.metrics
    }

    async fn read(
        &self,
        name: &CounterName,
        exact: bool,
        origin: &Origin,
    ) -> Result<String, Problem> {
        let target = coordinator(name, READ);
        let total: Total = self
            .call(&Call {
                target: &target,
                arguments: serde_json::to_vec(&[exact]).expect("a flag always serializes"),
                nature: Nature::Reads,
                origin,
            })
            .await?;
        // Digits, however many: a JSON number has no bounds of its own.
        Ok(format!(
            "{{\"value\":{},\"shards\":{},\"staleness_ms\":{}}}",
            total.value, total.shards, total.staleness_ms
        ))
    }

    async fn increment(
        self: &Arc<Self>,
        name: &CounterName,
        increment: &Increment,
        origin: &Origin,
    ) -> Result<Counted, Problem> {
        let key = PlanKey {
            name: name.clone(),
            colo: origin.colo,
        };
        let mut planned = self.plan(&key, origin).await?;
        let mut tries = 0;
        loop {
            tries += 1;
            let by = increment.by;
            let sent = match &increment.key {
                Some(once) => self.add_once(&planned, name, once, by, origin).await?,
                None => {
                    let only = seat_of_client(&planned, increment)?;
                    self.add(&key, &planned, only, by, origin).await?
                }
            };
            match sent.added.outcome {
                AddOutcome::Counted | AddOutcome::Repeated => {
                    self.learn(&key, &sent.planned, sent.added.version);
                    return Ok(Counted {
                        seat: sent.seat,
                        planned: sent.planned,
                        repeated: sent.added.outcome == AddOutcome::Repeated,
                    });
                }
                // Nothing was added.
                AddOutcome::Moved => {
                    let wanted = Wanted {
                        above: sent.planned.plan.version,
                        heard: sent.added.version.max(sent.planned.plan.version),
                    };
                    planned = self.newer_plan(&key, wanted, tries, origin).await?;
                }
            }
        }
    }

    /// An increment with an idempotency key: exact, however often it is tried.
    async fn add_once(
        &self,
        planned: &Arc<Planned>,
        name: &CounterName,
        once: &str,
        by: i64,
        origin: &Origin,
    ) -> Result<Sent, Problem> {
        let (seat, before) = planned.plan.seats_of_key(once);
        let arguments = (once, by, planned.plan.version, before);
        self.metrics().calls.increment(1);
        let added = self
            .call(&Call {
                target: &shard(name, seat, ADD_ONCE),
                arguments: serde_json::to_vec(&arguments).expect("texts and numbers serialize"),
                nature: Nature::AddsOnce,
                origin,
            })
            .await;
        // Whatever happened: with the same key it is counted once.
        let added = added.map_err(|problem| Problem {
            retryable: problem.retryable || may_have_run(&problem),
            ..problem
        });
        Ok(Sent {
            planned: Arc::clone(planned),
            seat,
            added: added?,
        })
    }

    /// One call for one shard.
    async fn send(
        &self,
        name: &CounterName,
        planned: &Arc<Planned>,
        seat: Seat,
        by: i64,
        origin: &Origin,
    ) -> Result<Sent, Problem> {
        self.metrics().calls.increment(1);
        let arguments = (by, planned.plan.version);
        let added = self
            .call(&Call {
                target: &shard(name, seat, ADD),
                arguments: serde_json::to_vec(&arguments).expect("numbers serialize"),
                nature: Nature::Adds,
                origin,
            })
            .await?;
        Ok(Sent {
            planned: Arc::clone(planned),
            seat,
            added,
        })
    }

    /// The plan did not do: another one, or this one once more after a pause.
    async fn newer_plan(
        &self,
        key: &PlanKey,
        wanted: Wanted,
        tries: u32,
        origin: &Origin,
    ) -> Result<Arc<Planned>, Problem> {
        let again = || Problem::unavailable("the shards of this counter are changing");
        let newest = self.ask_for_plan(key, wanted, origin).await?;
        if newest.plan.version > wanted.above && tries < MOVES_MAX {
            return Ok(newest);
        }
        let pause = retry::pause(&self.shared.retry, tries).ok_or_else(again)?;
        tokio::time::sleep(pause).await;
        Ok(newest)
    }
}

/// How many plans an increment follows without a pause.
const MOVES_MAX: u32 = 3;

impl Counted {
    fn json(&self, by: i64) -> String {
        let plan = &self.planned.plan;
        let repeated = match self.repeated {
            true => ",\"repeated\":true",
            false => "",
        };
        format!(
            "{{\"by\":{by},\"shard\":\"{}\",\"shards\":{},\"staleness_ms\":{}{repeated}}}",
            self.seat,
            plan.shards,
            plan.staleness_ms()
        )
    }
}

/// Whether a refusal leaves open whether the increment was counted.
pub(crate) fn may_have_run(problem: &Problem) -> bool {
    match problem.code {
        ErrorCode::Unavailable | ErrorCode::TimedOut | ErrorCode::ObjectReset => !problem.retryable,
        ErrorCode::BadRequest
        | ErrorCode::Internal
        | ErrorCode::Unauthorized
        | ErrorCode::Forbidden
        | ErrorCode::NotFound
        | ErrorCode::MethodNotAllowed
        | ErrorCode::TooSlow
        | ErrorCode::PayloadTooLarge
        | ErrorCode::UriTooLong
        | ErrorCode::HeadersTooLarge
        | ErrorCode::NotOwner
        | ErrorCode::RateLimited
        | ErrorCode::Overloaded
        | ErrorCode::StorageFull => false,
    }
}

/// The shard of the plan that an increment without an idempotency key must go to; `None`: any will do.
fn seat_of_client(planned: &Planned, increment: &Increment) -> Result<Option<Seat>, Problem> {
    match planned.plan.strategy {
        Strategy::Hash => {
            let client = increment.client.as_ref();
            let client = client.map_err(|missing| Problem::bad_request(missing.clone()))?;
            Ok(Some(planned.plan.set().seat(*client)))
        }
        Strategy::Random | Strategy::RoundRobin => Ok(None),
    }
}

fn shard(name: &CounterName, seat: Seat, method: &'static str) -> ObjectTarget {
    let (id, name) = name.shard(seat);
    ObjectTarget {
        class: shard_class(),
        id,
        name: Some(name),
        ask: Ask::Own { method },
    }
}

fn coordinator(name: &CounterName, method: &'static str) -> ObjectTarget {
    let (id, name) = name.coordinator();
    ObjectTarget {
        class: protocol::counters::coordinator_class(),
        id,
        name: Some(name),
        ask: Ask::Own { method },
    }
}
