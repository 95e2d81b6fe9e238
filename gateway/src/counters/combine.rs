//! Increments that come together go together.
//!
//! Those that may go to the same places are a *group*: with the strategy `hash` those of one shard, with the
//! others, where any shard will do, all of a counter. A group has a few calls under way at a time, one per shard
//! and one per worker, or [`CALLS_AT_ONCE`] if there is one worker. An increment that finds room goes at once. Those
//! that find none wait, and when a call is back all of them go as one increment by their sum, to the same shard or,
//! after some of them, to the one whose turn it is, answered when that is durable. So what a call costs is shared
//! by all that it carries, however many shards there are, and without a crowd nobody waits.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::stream::{self, StreamExt};
use protocol::counters::{Added, CounterName, Seat};
use protocol::{ErrorCode, Problem};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::plans::{PlanKey, Planned};
use super::{Counters, Origin};
use crate::proxy::Shared;

/// Calls of one group under way at a time, from one thread, unless more workers than that have shards: one that waits
/// for the disk, and one that is worked at. More would share the increments that come among smaller batches.
const CALLS_AT_ONCE: usize = 2;

/// Batches that go to one shard before the next has its turn: shards with news report it, each for itself.
const CALLS_IN_A_ROW: u32 = 32;

/// Shards that are looked at for one with room.
const SEATS_TRIED: usize = 8;

/// Increments of a sum that was refused, which are tried alone, so many at once.
const ALONE_AT_ONCE: usize = 64;

/// The groups with a call under way. One thread uses it.
#[derive(Default)]
pub(super) struct Combiner(Mutex<HashMap<Group, Line>>);

/// Increments that may go together.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Group {
    counter: PlanKey,
    /// The only shard that will do.
    only: Option<Seat>,
}

/// What is under way of a group, and who waits: never anybody while nothing is under way.
#[derive(Default)]
struct Line {
    under_way: Vec<Taken>,
    waiting: Vec<Waiting>,
}

/// A shard with a call under way, and the worker that had it when the call began, if the ring knew one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Taken {
    seat: Seat,
    worker: Option<SocketAddr>,
    /// Calls to it, one after the other, this one included.
    calls: u32,
}

/// What was sent by which plan, where to, and what came back.
#[derive(Debug, Clone)]
pub(super) struct Sent {
    pub(super) planned: Arc<Planned>,
    pub(super) seat: Seat,
    pub(super) added: Added,
}

struct Waiting {
    by: i64,
    /// The plan by which it came here.
    planned: Arc<Planned>,
    /// A client that hung up does not listen.
    answer: oneshot::Sender<Result<Sent, Problem>>,
}

enum Entered {
    Goes(Taken),
    Waits(oneshot::Receiver<Result<Sent, Problem>>),
    Full,
}

/// Increments that go together.
struct Batch {
    sum: i64,
    planned: Arc<Planned>,
    waiting: Vec<Waiting>,
}

/// Who has which shard of a counter, by the ring.
trait Workers {
    fn of(&self, name: &CounterName, seat: Seat) -> Option<SocketAddr>;
    fn count(&self) -> usize;
}

/// Calls of one group that a worker has at a time: each has its share, so that none that is silent holds up the others.
fn calls_per_worker(workers: usize) -> usize {
    CALLS_AT_ONCE.div_ceil(workers.max(1))
}

impl Group {
    /// The shard whose turn it is. Another one each time, if any will do.
    fn next_seat(&self, planned: &Planned) -> Seat {
        self.only.unwrap_or_else(|| planned.next_seat())
    }
}

impl Line {
    /// A shard with room, on a worker with room.
    fn find(&self, group: &Group, planned: &Planned, workers: &impl Workers) -> Option<Taken> {
        let tries = match group.only {
            Some(_) => 1,
            None => SEATS_TRIED.min(planned.plan.shards as usize),
        };
        let per_worker = calls_per_worker(workers.count());
        if self.under_way.len() >= per_worker * workers.count().max(1) {
            return None;
        }
        (0..tries).find_map(|_| {
            let seat = group.next_seat(planned);
            let worker = workers.of(&group.counter.name, seat);
            let free = self.under_way.iter().all(|taken| taken.seat != seat);
            let there = self.under_way.iter();
            let there = there.filter(|taken| taken.worker == worker).count();
            let calls = 1;
            (free && there < per_worker).then_some(Taken {
                seat,
                worker,
                calls,
            })
        })
    }

    /// The call to `ended` is over. Who goes next, and where to; nobody, if nobody waits.
    fn next(
        &mut self,
        ended: Taken,
        group: &Group,
        workers: &impl Workers,
    ) -> Option<(Batch, Taken)> {
        let place = self.under_way.iter().position(|taken| *taken == ended);
        self.under_way.swap_remove(place?);
        if self.waiting.is_empty() {
            return None;
        }
        let batch = Batch::take(&mut self.waiting);
        let planned = &batch.planned;
        let plan = &planned.plan;
        let again = Taken {
            calls: ended.calls.saturating_add(1),
            ..ended
        };
        let stays = ended.seat.place == plan.place && ended.seat.index < plan.shards;
        let found = match stays && ended.calls < CALLS_IN_A_ROW {
            true => again,
            false => {
                let found = self.find(group, planned, workers);
                found.unwrap_or_else(|| match stays {
                    true => again,
                    false => Taken {
                        seat: group.next_seat(planned),
                        calls: 1,
                        ..ended
                    },
                })
            }
        };
        self.under_way.push(found);
        Some((batch, found))
    }
}

impl Combiner {
    fn lock(&self) -> MutexGuard<'_, HashMap<Group, Line>> {
        // Nothing panics while it is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(
        &self,
        group: &Group,
        by: i64,
        planned: &Arc<Planned>,
        most: usize,
        workers: &impl Workers,
    ) -> Entered {
        let mut groups = self.lock();
        // Most groups that are asked for are there.
        if !groups.contains_key(group) {
            groups.insert(group.clone(), Line::default());
        }
        let line = groups.get_mut(group).expect("it was just put there");
        // Nobody overtakes.
        let found = match line.waiting.is_empty() {
            true => line.find(group, planned, workers),
            false => None,
        };
        if let Some(found) = found {
            line.under_way.push(found);
            return Entered::Goes(found);
        }
        if line.waiting.len() >= most {
            return Entered::Full;
        }
        let (answer, answered) = oneshot::channel();
        line.waiting.push(Waiting {
            by,
            planned: Arc::clone(planned),
            answer,
        });
        Entered::Waits(answered)
    }

    /// Who goes next after a call is back; a group without any is forgotten.
    fn next(&self, group: &Group, ended: Taken, workers: &impl Workers) -> Option<(Batch, Taken)> {
        let mut groups = self.lock();
        let line = groups.get_mut(group)?;
        let next = line.next(ended, group, workers);
        if line.under_way.is_empty() {
            groups.remove(group);
        }
        next
    }
}

impl Batch {
    /// Takes the first ones, as many as have a sum. At least one.
    fn take(waiting: &mut Vec<Waiting>) -> Self {
        let (mut sum, mut count) = (0_i64, 0);
        for one in waiting.iter() {
            match sum.checked_add(one.by) {
                Some(more) => (sum, count) = (more, count + 1),
                None => break,
            }
        }
        let rest = waiting.split_off(count);
        let waiting = std::mem::replace(waiting, rest);
        // A shard that was chosen by one of their plans is in the newest of them, or it would not have been.
        let plans = waiting.iter().map(|one| &one.planned);
        let newest = plans.max_by_key(|planned| planned.plan.version);
        Self {
            sum,
            planned: Arc::clone(newest.expect("one number has a sum")),
            waiting,
        }
    }
}

impl Waiting {
    fn answer(self, answer: Result<Sent, Problem>) {
        // Who hung up has been counted all the same.
        drop(self.answer.send(answer));
    }
}

/// A call that an increment makes itself; when it ends, however it does, those that wait go.
struct Turn {
    counters: Arc<Counters>,
    group: Option<Group>,
    taken: Taken,
    origin: Origin,
}

impl Drop for Turn {
    fn drop(&mut self) {
        let Some(group) = self.group.take() else {
            return;
        };
        let next = self.counters.next(&group, self.taken);
        let Some(next) = next else { return };
        // At the end of a thread there is nobody left to answer.
        if let Ok(runtime) = Handle::try_current() {
            let counters = Arc::clone(&self.counters);
            runtime.spawn(counters.drive(group, next, self.origin.clone()));
        }
    }
}

impl Workers for Shared {
    fn of(&self, name: &CounterName, seat: Seat) -> Option<SocketAddr> {
        let owner = self.placement.owner(name.shard(seat).0);
        Some(owner.ok()?.address)
    }

    fn count(&self) -> usize {
        self.placement.ring().map_or(1, |ring| ring.workers().len())
    }
}

impl Counters {
    /// One increment by a plan, alone or with others; to this shard, or to any.
    pub(super) async fn add(
        self: &Arc<Self>,
        counter: &PlanKey,
        planned: &Arc<Planned>,
        only: Option<Seat>,
        by: i64,
        origin: &Origin,
    ) -> Result<Sent, Problem> {
        let (combine, most) = {
            let dynamic = self.shared.dynamic.load();
            let config = &dynamic.counters;
            (config.combine, config.waiting_max.get() as usize)
        };
        let group = Group {
            counter: counter.clone(),
            only,
        };
        if !combine {
            let seat = group.next_seat(planned);
            return self.send(&counter.name, planned, seat, by, origin).await;
        }
        match self
            .combiner
            .enter(&group, by, planned, most, &*self.shared)
        {
            Entered::Goes(taken) => {
                let turn = Turn {
                    counters: Arc::clone(self),
                    group: Some(group),
                    taken,
                    origin: origin.clone(),
                };
                let seat = taken.seat;
                let sent = self.send(&counter.name, planned, seat, by, origin).await;
                drop(turn);
                sent
            }
            Entered::Waits(answered) => {
                let waiting = &self.metrics().waiting;
                waiting.increment(1);
                let answered = answered.await;
                waiting.decrement(1);
                answered.unwrap_or_else(|_| {
                    Err(Problem::outcome_unknown(
                        "this gateway is stopping; whether the increment was counted is unknown",
                    ))
                })
            }
            Entered::Full => Err(Problem::new(
                ErrorCode::Overloaded,
                format!("counters.waiting_max = {most} increments wait for this counter already"),
            )),
        }
    }

    fn next(&self, group: &Group, ended: Taken) -> Option<(Batch, Taken)> {
        self.combiner.next(group, ended, &*self.shared)
    }

    /// Sends what waits, batch after batch, until nobody does.
    async fn drive(self: Arc<Self>, group: Group, first: (Batch, Taken), origin: Origin) {
        let mut next = Some(first);
        while let Some((batch, taken)) = next {
            let name = &group.counter.name;
            self.send_batch(name, batch, taken.seat, &origin).await;
            next = self.next(&group, taken);
        }
    }

    async fn send_batch(&self, name: &CounterName, batch: Batch, seat: Seat, origin: &Origin) {
        let planned = &batch.planned;
        let sent = self.send(name, planned, seat, batch.sum, origin).await;
        let refused = sent.as_ref().is_err_and(|problem| {
            // The total has no room for the sum. It may have for some of them.
            problem.code == ErrorCode::BadRequest
        });
        if refused && batch.waiting.len() > 1 {
            stream::iter(batch.waiting)
                .for_each_concurrent(ALONE_AT_ONCE, async |one| {
                    let sent = self.send(name, planned, seat, one.by, origin).await;
                    one.answer(sent);
                })
                .await;
            return;
        }
        for one in batch.waiting {
            one.answer(sent.clone());
        }
    }
}

#[cfg(test)]
mod tests;
