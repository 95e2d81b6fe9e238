//! Increments of one shard that come together go there together.
//!
//! The first for a shard goes at once. While it is under way others wait, and when it is back all of them go as
//! one increment by their sum, answered when that is durable. So a shard has one call of each thread at a time,
//! and what a call costs is shared by all that it carries.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::stream::{self, StreamExt};
use protocol::counters::Added;
use protocol::{ErrorCode, ObjectId, Problem};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::{Counters, Origin};
use crate::route::ObjectTarget;

/// Increments of a sum that was refused, which are tried alone, so many at once.
const ALONE_AT_ONCE: usize = 64;

/// Shards with a call under way, and who waits for the next one. One thread uses it.
#[derive(Default)]
pub(super) struct Combiner(Mutex<HashMap<ObjectId, Vec<Waiting>>>);

struct Waiting {
    by: i64,
    /// Of the plan by which it came here.
    version: u64,
    /// A client that hung up does not listen.
    answer: oneshot::Sender<Result<Added, Problem>>,
}

enum Entered {
    /// Nobody is under way.
    First,
    Waits(oneshot::Receiver<Result<Added, Problem>>),
    Full,
}

/// Increments that go together.
struct Batch {
    sum: i64,
    version: u64,
    waiting: Vec<Waiting>,
}

impl Combiner {
    fn lock(&self) -> MutexGuard<'_, HashMap<ObjectId, Vec<Waiting>>> {
        // Nothing panics while it is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, shard: ObjectId, by: i64, version: u64, most: usize) -> Entered {
        match self.lock().entry(shard) {
            Entry::Vacant(vacant) => {
                vacant.insert(Vec::new());
                Entered::First
            }
            Entry::Occupied(waiting) if waiting.get().len() >= most => Entered::Full,
            Entry::Occupied(mut waiting) => {
                let (answer, answered) = oneshot::channel();
                waiting.get_mut().push(Waiting {
                    by,
                    version,
                    answer,
                });
                Entered::Waits(answered)
            }
        }
    }

    /// Who goes next; if nobody waits, nobody is under way any more.
    fn next(&self, shard: ObjectId) -> Option<Batch> {
        let mut busy = self.lock();
        let waiting = busy.get_mut(&shard)?;
        if waiting.is_empty() {
            busy.remove(&shard);
            return None;
        }
        Some(Batch::take(waiting))
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
        // The shard is in the newest of their plans, or it would not have been chosen by it.
        let versions = waiting.iter().map(|one| one.version);
        Self {
            sum,
            version: versions.max().unwrap_or(0),
            waiting,
        }
    }
}

impl Waiting {
    fn answer(self, answer: Result<Added, Problem>) {
        // Who hung up has been counted all the same.
        drop(self.answer.send(answer));
    }
}

/// The call of the first; when it ends, however it does, the others go.
struct Turn {
    counters: Arc<Counters>,
    target: Option<ObjectTarget>,
    origin: Option<Origin>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        let (Some(target), Some(origin)) = (self.target.take(), self.origin.take()) else {
            return;
        };
        let Some(batch) = self.counters.combiner.next(target.id) else {
            return;
        };
        // At the end of a thread there is nobody left to answer.
        if let Ok(runtime) = Handle::try_current() {
            let counters = Arc::clone(&self.counters);
            runtime.spawn(counters.drive(target, batch, origin));
        }
    }
}

impl Counters {
    /// One increment of a shard, alone or with others.
    pub(super) async fn add(
        self: &Arc<Self>,
        target: ObjectTarget,
        version: u64,
        by: i64,
        origin: &Origin,
    ) -> Result<Added, Problem> {
        let (combine, most) = {
            let dynamic = self.shared.dynamic.load();
            let config = &dynamic.counters;
            (config.combine, config.waiting_max.get() as usize)
        };
        if !combine {
            return self.send(&target, version, by, origin).await;
        }
        match self.combiner.enter(target.id, by, version, most) {
            Entered::First => {
                let turn = Turn {
                    counters: Arc::clone(self),
                    target: Some(target.clone()),
                    origin: Some(origin.clone()),
                };
                let added = self.send(&target, version, by, origin).await;
                drop(turn);
                added
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
                format!("counters.waiting_max = {most} increments wait for this shard already"),
            )),
        }
    }

    /// Sends what waits, batch after batch, until nobody does.
    async fn drive(self: Arc<Self>, target: ObjectTarget, batch: Batch, origin: Origin) {
        let mut next = Some(batch);
        while let Some(batch) = next {
            self.send_batch(&target, batch, &origin).await;
            next = self.combiner.next(target.id);
        }
    }

    async fn send_batch(&self, target: &ObjectTarget, batch: Batch, origin: &Origin) {
        let added = self.send(target, batch.version, batch.sum, origin).await;
        let refused = added.as_ref().is_err_and(|problem| {
            // The total has no room for the sum. It may have for some of them.
            problem.code == ErrorCode::BadRequest
        });
        if refused && batch.waiting.len() > 1 {
            stream::iter(batch.waiting)
                .for_each_concurrent(ALONE_AT_ONCE, async |one| {
                    let added = self.send(target, batch.version, one.by, origin).await;
                    one.answer(added);
                })
                .await;
            return;
        }
        for one in batch.waiting {
            one.answer(added.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn waiting(by: i64, version: u64) -> Waiting {
        let (answer, _) = oneshot::channel();
        Waiting {
            by,
            version,
            answer,
        }
    }

    proptest! {
        #[test]
        fn batches_carry_everything_in_order_and_never_overflow(
            all in proptest::collection::vec(
                prop_oneof![-9_i64..9, Just(i64::MAX), Just(i64::MIN), any::<i64>()], 1..40),
        ) {
            let mut queue: Vec<Waiting> = all.iter().map(|by| waiting(*by, 1)).collect();
            let (mut seen, mut total) = (Vec::new(), 0_i128);
            while !queue.is_empty() {
                let batch = Batch::take(&mut queue);
                prop_assert!(!batch.waiting.is_empty());
                let parts: i128 = batch.waiting.iter().map(|one| i128::from(one.by)).sum();
                prop_assert_eq!(i128::from(batch.sum), parts);
                seen.extend(batch.waiting.iter().map(|one| one.by));
                total += parts;
            }
            prop_assert_eq!(total, all.iter().map(|by| i128::from(*by)).sum());
            prop_assert_eq!(seen, all);
        }
    }

    #[test]
    fn a_batch_goes_by_the_newest_of_its_plans() {
        let mut queue = vec![waiting(1, 3), waiting(2, 5), waiting(3, 4)];
        let batch = Batch::take(&mut queue);
        assert_eq!((batch.sum, batch.version), (6, 5));
    }

    #[test]
    fn one_goes_the_others_wait_and_the_queue_has_a_bound() {
        let combiner = Combiner::default();
        let name: protocol::counters::CounterName = "c".parse().unwrap();
        let (shard, other) = (name.coordinator().0, name.shard("0".parse().unwrap()).0);
        assert!(matches!(combiner.enter(shard, 1, 1, 2), Entered::First));
        assert!(matches!(combiner.enter(other, 1, 1, 2), Entered::First));
        let waits = [
            combiner.enter(shard, 2, 1, 2),
            combiner.enter(shard, 3, 1, 2),
        ];
        assert!(
            waits
                .iter()
                .all(|entered| matches!(entered, Entered::Waits(_)))
        );
        assert!(matches!(combiner.enter(shard, 4, 1, 2), Entered::Full));
        assert_eq!(combiner.next(shard).unwrap().sum, 5);
        // Still under way.
        assert!(matches!(combiner.enter(shard, 6, 1, 2), Entered::Waits(_)));
        assert_eq!(combiner.next(shard).unwrap().sum, 6);
        assert!(combiner.next(shard).is_none());
        assert!(matches!(combiner.enter(shard, 7, 1, 2), Entered::First));
        assert!(combiner.next(other).is_none());
    }
}
