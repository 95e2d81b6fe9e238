use std::cell::Cell;
use std::collections::HashMap as Map;

use proptest::prelude::*;
use protocol::Colo;
use protocol::counters::{Place, Plan, Strategy};

use super::*;

fn planned(version: u64, shards: u32, strategy: Strategy) -> Arc<Planned> {
    Arc::new(Planned::new(Plan {
        version,
        place: Place::Anywhere,
        shards,
        strategy,
        report_every_ms: 100,
        earlier: Vec::new(),
    }))
}

fn group(only: Option<u32>) -> Group {
    Group {
        counter: PlanKey {
            name: "c".parse().unwrap(),
            colo: Colo::UNKNOWN,
        },
        only: only.map(seat),
    }
}

fn seat(index: u32) -> Seat {
    Seat {
        place: Place::Anywhere,
        index,
    }
}

/// So many workers; every so-manieth shard is on the same.
struct Every(u16);

impl Workers for Every {
    fn of(&self, _name: &CounterName, seat: Seat) -> Option<SocketAddr> {
        let number = u16::try_from(seat.index).unwrap() % self.0;
        Some(SocketAddr::from(([127, 0, 0, 1], number + 1)))
    }

    fn count(&self) -> usize {
        self.0.into()
    }
}

fn waiting(by: i64, version: u64) -> Waiting {
    let (answer, _) = oneshot::channel();
    Waiting {
        by,
        planned: planned(version, 1, Strategy::Random),
        answer,
    }
}

#[track_caller]
fn goes(entered: Entered) -> Taken {
    match entered {
        Entered::Goes(taken) => taken,
        Entered::Waits(_) => panic!("it waits"),
        Entered::Full => panic!("it is refused"),
    }
}

#[track_caller]
fn waits(entered: Entered) {
    assert!(matches!(entered, Entered::Waits(_)));
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

    /// Whatever comes and ends in whatever order: everything goes once, within the bounds, and nobody waits for
    /// ever.
    #[test]
    fn everything_goes_and_nobody_waits_while_nothing_is_under_way(
        shards in 1_u32..40,
        workers in 1_u16..5,
        by_client in any::<bool>(),
        steps in proptest::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 1..200),
    ) {
        let workers = Every(workers);
        let combiner = Combiner::default();
        let group = group(by_client.then_some(0));
        let planned = planned(1, shards, Strategy::RoundRobin);
        let (mut under_way, mut waited, gone) = (Vec::new(), 0_i64, Cell::new(0_i64));
        let end = |under_way: &mut Vec<Taken>, at: usize| {
            let ended = under_way.swap_remove(at);
            if let Some((batch, taken)) = combiner.next(&group, ended, &workers) {
                gone.set(gone.get() + batch.sum);
                under_way.push(taken);
            }
        };
        for (comes, which) in steps {
            if comes || under_way.is_empty() {
                match combiner.enter(&group, 1, &planned, 1000, &workers) {
                    Entered::Goes(taken) => {
                        prop_assert!(!under_way.contains(&taken));
                        under_way.push(taken);
                    }
                    Entered::Waits(_) => waited += 1,
                    Entered::Full => prop_assert!(false, "200 fit"),
                }
            } else {
                let at = which.index(under_way.len());
                end(&mut under_way, at);
            }
            let mut of_worker: Map<Option<SocketAddr>, usize> = Map::new();
            under_way.iter().for_each(|taken| *of_worker.entry(taken.worker).or_default() += 1);
            let most = calls_per_worker(workers.count());
            prop_assert!(of_worker.values().all(|calls| *calls <= most), "{of_worker:?}");
            prop_assert!(!by_client || under_way.len() <= 1);
        }
        while !under_way.is_empty() {
            end(&mut under_way, 0);
        }
        prop_assert_eq!(gone.get(), waited);
        prop_assert!(combiner.lock().is_empty());
    }
}

#[test]
fn a_batch_goes_by_the_newest_of_its_plans() {
    let mut queue = vec![waiting(1, 3), waiting(2, 5), waiting(3, 4)];
    let batch = Batch::take(&mut queue);
    assert_eq!((batch.sum, batch.planned.plan.version), (6, 5));
}

#[test]
fn a_shard_has_one_call_and_the_queue_has_a_bound() {
    let combiner = Combiner::default();
    let planned = planned(1, 10, Strategy::Hash);
    let enter = |only, by| combiner.enter(&group(Some(only)), by, &planned, 2, &Every(1));
    let next = |ended| combiner.next(&group(Some(3)), ended, &Every(1));
    let taken = goes(enter(3, 1));
    assert_eq!(taken.seat, seat(3));
    let other = goes(enter(4, 1));
    waits(enter(3, 2));
    waits(enter(3, 3));
    assert!(matches!(enter(3, 4), Entered::Full));
    let (batch, again) = next(taken).unwrap();
    assert_eq!((batch.sum, again.seat), (5, taken.seat));
    // Still under way.
    waits(enter(3, 6));
    let (batch, last) = next(again).unwrap();
    assert_eq!(batch.sum, 6);
    assert!(next(last).is_none());
    assert_eq!(goes(enter(3, 7)), taken);
    assert!(combiner.next(&group(Some(4)), other, &Every(1)).is_none());
}

#[test]
fn where_any_shard_will_do_a_worker_has_a_few_calls_and_batches_take_turns() {
    let combiner = Combiner::default();
    let planned = planned(1, 100, Strategy::RoundRobin);
    let enter = || combiner.enter(&group(None), 1, &planned, 100, &Every(1));
    let first: Vec<Taken> = (0..CALLS_AT_ONCE).map(|_| goes(enter())).collect();
    let seats: Vec<u32> = first.iter().map(|taken| taken.seat.index).collect();
    assert_eq!(seats, [0, 1]);
    let mut taken = first[1];
    for _ in 1..CALLS_IN_A_ROW {
        (0..5).for_each(|_| waits(enter()));
        let (batch, again) = combiner.next(&group(None), taken, &Every(1)).unwrap();
        assert_eq!((batch.sum, again.seat), (5, seat(1)));
        taken = again;
    }
    waits(enter());
    let (_, next) = combiner.next(&group(None), taken, &Every(1)).unwrap();
    assert_eq!(next.seat, seat(2));
}

#[test]
fn no_worker_keeps_the_others_from_their_share() {
    let combiner = Combiner::default();
    let planned = planned(1, 100, Strategy::RoundRobin);
    let workers = Every(2);
    let enter = || combiner.enter(&group(None), 1, &planned, 100, &workers);
    let mut of_worker: Map<_, Vec<Taken>> = Map::new();
    for taken in (0..2).map(|_| goes(enter())) {
        of_worker.entry(taken.worker).or_default().push(taken);
    }
    // One of them does not answer: all that comes goes to the other.
    let (silent, answers) = (workers.of(&"c".parse().unwrap(), seat(0)), of_worker);
    let mut calls = answers
        .into_iter()
        .find_map(|(worker, calls)| (worker != silent).then_some(calls))
        .unwrap();
    for _ in 0..20 {
        waits(enter());
        let next = combiner.next(&group(None), calls.remove(0), &workers);
        let (batch, taken) = next.unwrap();
        assert_eq!(batch.sum, 1);
        assert_ne!(taken.worker, silent);
        calls.push(taken);
    }
}

#[test]
fn a_shard_that_the_newest_plan_lacks_is_left() {
    let combiner = Combiner::default();
    let (before, after) = (
        planned(1, 9, Strategy::RoundRobin),
        planned(2, 1, Strategy::RoundRobin),
    );
    let enter = |planned| combiner.enter(&group(None), 1, planned, 100, &Every(1));
    let taken: Vec<Taken> = (0..CALLS_AT_ONCE).map(|_| goes(enter(&before))).collect();
    waits(enter(&before));
    waits(enter(&after));
    let next = combiner.next(&group(None), taken[1], &Every(1));
    let (batch, goes_to) = next.unwrap();
    assert_eq!((batch.sum, batch.planned.plan.version), (2, 2));
    assert_eq!(goes_to.seat, seat(0));
}
