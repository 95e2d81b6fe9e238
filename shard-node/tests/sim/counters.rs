//! Sharded counters: clients with old plans, changes of plans, deaths at any moment, and one total.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Duration;

use protocol::counters::{
    ADD, ADD_ONCE, AddOutcome, Added, CounterName, PLAN, Plan, READ, RESHARD, STANDING, Seat, Set,
    Standing, TELL, Tally, Total,
};
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde::de::DeserializeOwned;
use serde_json::{Value as Json, json};

use crate::alarms::{Life, World};
use crate::disk::{Crash, Fault};
use crate::for_seeds;

const COORDINATOR: &str = "CounterCoordinator";
const SHARD: &str = "CounterShard";

fn name() -> CounterName {
    "visits".parse().unwrap()
}

async fn coordinator<T: DeserializeOwned>(
    life: &Life,
    method: &str,
    args: Json,
) -> Result<T, String> {
    let answer = life
        .try_call_of(COORDINATOR, "visits", method, args)
        .await?;
    Ok(serde_json::from_value(answer).unwrap())
}

async fn shard<T: DeserializeOwned>(
    life: &Life,
    seat: Seat,
    method: &str,
    args: Json,
) -> Result<T, String> {
    let (_, object) = name().shard(seat);
    let answer = life
        .try_call_of(SHARD, object.as_str(), method, args)
        .await?;
    Ok(serde_json::from_value(answer).unwrap())
}

async fn plan(life: &Life) -> Plan {
    coordinator(life, PLAN, json!(["", true])).await.unwrap()
}

async fn read(life: &Life, exact: bool) -> Total {
    coordinator(life, READ, json!([exact])).await.unwrap()
}

async fn reshard(life: &Life, change: Json) -> Standing {
    coordinator(life, RESHARD, json!([change])).await.unwrap()
}

async fn add(life: &Life, plan: &Plan, index: u32, by: i64) -> AddOutcome {
    let seat = Seat {
        place: plan.place,
        index,
    };
    let added: Added = shard(life, seat, ADD, json!([by, plan.version]))
        .await
        .unwrap();
    added.outcome
}

async fn add_once(life: &Life, plan: &Plan, key: &str, by: i64) -> Result<AddOutcome, String> {
    let (seat, before) = plan.seats_of_key(key);
    let args = json!([key, by, plan.version, before]);
    let added: Added = shard(life, seat, ADD_ONCE, args).await?;
    Ok(added.outcome)
}

fn test(run: impl AsyncFnOnce(&Life)) {
    World::new().live(Crash::Process, run);
}

#[test]
fn what_shards_count_is_in_the_sum_within_the_stated_time() {
    test(async |life| {
        let plan = plan(life).await;
        assert_eq!((plan.version, plan.shards), (1, 100));
        for index in 0..100 {
            let outcome = add(life, &plan, index, i64::from(index)).await;
            assert_eq!(outcome, AddOutcome::Counted);
        }
        life.sleep(plan.staleness_ms() + 1000).await;
        let total = read(life, false).await;
        assert_eq!(total.value, 4950);
        assert!(total.staleness_ms >= plan.staleness_ms());
    });
}

#[test]
fn nobody_wakes_while_nothing_is_counted() {
    test(async |life| {
        let plan = plan(life).await;
        add(life, &plan, 7, 1).await;
        life.sleep(60_000).await;
        let before = life.metric("shard_activations_total");
        life.sleep(3_600_000).await;
        assert_eq!(life.metric("shard_activations_total"), before);
    });
}

#[test]
fn an_exact_read_has_what_was_not_reported_yet() {
    test(async |life| {
        let plan = plan(life).await;
        add(life, &plan, 3, 5).await;
        add(life, &plan, 99, -2).await;
        let total = read(life, true).await;
        assert_eq!((total.value, total.staleness_ms), (3, 0));
    });
}

#[test]
fn a_counter_that_nobody_used_is_0_and_stores_nothing() {
    test(async |life| {
        assert_eq!(read(life, true).await.value, 0);
        assert_eq!(read(life, false).await.value, 0);
        assert!(!life.exists(COORDINATOR, "visits"));
        assert!(!life.exists(SHARD, "visits:shard:0"));
    });
}

#[test]
fn shards_that_leave_keep_the_total_and_send_their_clients_away() {
    test(async |life| {
        let old = plan(life).await;
        for index in 0..100 {
            add(life, &old, index, 1).await;
        }
        let standing = reshard(life, json!({ "count": 10 })).await;
        assert_eq!(
            (standing.shards, standing.retiring, standing.base),
            (10, 0, 90)
        );
        assert_eq!(read(life, true).await.value, 100);
        assert_eq!(add(life, &old, 9, 1).await, AddOutcome::Counted);
        assert_eq!(add(life, &old, 10, 1).await, AddOutcome::Moved);
        // They come back as others.
        reshard(life, json!({ "count": 20 })).await;
        assert_eq!(add(life, &old, 10, 1).await, AddOutcome::Moved);
        assert_eq!(read(life, true).await.value, 101);
        let new = plan(life).await;
        assert_eq!(add(life, &new, 10, 1000).await, AddOutcome::Counted);
        assert_eq!(read(life, true).await.value, 1101);
        // And leave again, some without having counted anything.
        reshard(life, json!({ "count": 10 })).await;
        assert_eq!(read(life, true).await.value, 1101);
        let seat = "10".parse().unwrap();
        let tally: Tally = shard(life, seat, TELL, json!([])).await.unwrap();
        assert_eq!(tally.total, 1000);
    });
}

#[test]
fn a_deleted_coordinator_goes_on_above_the_plans_that_are_in_use() {
    test(async |life| {
        reshard(life, json!({ "count": 150 })).await;
        let old = plan(life).await;
        add(life, &old, 3, 1).await;
        add(life, &old, 140, 10).await;
        life.sleep(2 * old.staleness_ms()).await;
        life.delete(COORDINATOR, "visits");
        // Nobody knows of it yet.
        assert_eq!(plan(life).await.version, 1);
        // A gateway that goes by the plan of before is counted, also where the plan of new counters has no shard.
        assert_eq!(add(life, &old, 3, 100).await, AddOutcome::Counted);
        assert_eq!(add(life, &old, 140, 1000).await, AddOutcome::Counted);
        life.sleep(20_000).await;
        let new = plan(life).await;
        assert!(new.version > old.version, "{new:?}");
        assert_eq!(new.shards, 100);
        assert_eq!(read(life, false).await.value, 1111);
        assert_eq!(read(life, true).await.value, 1111);
        // The shard that is no longer in use sends its clients away.
        assert_eq!(add(life, &old, 140, 1).await, AddOutcome::Moved);
        assert_eq!(add(life, &old, 3, 1).await, AddOutcome::Counted);
        assert_eq!(read(life, true).await.value, 1112);
    });
}

#[test]
fn a_gateway_that_heard_of_a_newer_plan_gets_one_that_is_newer_still() {
    test(async |life| {
        let heard = |heard: u64| coordinator::<Plan>(life, PLAN, json!(["", true, heard]));
        assert_eq!(heard(1).await.unwrap().version, 1);
        assert!(!life.exists(COORDINATOR, "visits"));
        assert_eq!(heard(7).await.unwrap().version, 8);
        assert_eq!(heard(8).await.unwrap().version, 8);
        assert_eq!(plan(life).await.version, 8);
    });
}

#[test]
fn a_shard_of_a_plan_that_was_forgotten_retires_after_that_plan() {
    test(async |life| {
        for count in [50, 60, 70] {
            reshard(life, json!({ "count": count })).await;
        }
        let old = plan(life).await;
        add(life, &old, 60, 5).await;
        life.delete(COORDINATOR, "visits");
        // Before any report: the coordinator learns of the shard's plan from its answer.
        reshard(life, json!({ "count": 10 })).await;
        let told = match add(life, &old, 60, 20).await {
            AddOutcome::Counted => 25,
            _ => 5,
        };
        life.sleep(20_000).await;
        assert_eq!(add(life, &old, 60, 1).await, AddOutcome::Moved);
        assert_eq!(read(life, true).await.value, told);
        assert_eq!(read(life, false).await.value, told);
    });
}

#[test]
fn a_key_counts_once_wherever_it_goes() {
    test(async |life| {
        let plans = [100, 7, 300, 7, 101];
        let mut old = Vec::new();
        for count in plans {
            reshard(life, json!({ "count": count })).await;
            let plan = plan(life).await;
            for number in 0..50 {
                let key = format!("key-{number}");
                let outcome = add_once(life, &plan, &key, number).await.unwrap();
                let first = count == plans[0];
                let wanted = if first {
                    AddOutcome::Counted
                } else {
                    AddOutcome::Repeated
                };
                assert_eq!(outcome, wanted, "{key} with {count} shards");
            }
            old.push(plan);
        }
        for plan in &old {
            for number in 0..50 {
                let key = format!("key-{number}");
                let outcome = add_once(life, plan, &key, number).await.unwrap();
                assert_ne!(outcome, AddOutcome::Counted, "{key} by {plan:?}");
            }
        }
        assert_eq!(read(life, true).await.value, 1225);
        let other = add_once(life, &old[4], "key-3", 4).await.unwrap_err();
        assert!(other.contains("was used with by=3"), "{other}");
    });
}

#[test]
fn a_key_that_was_claimed_is_not_counted_by_an_older_plan() {
    test(async |life| {
        let old = plan(life).await;
        reshard(life, json!({ "count": 101 })).await;
        let new = plan(life).await;
        assert_eq!(
            new.earlier,
            [Set {
                place: old.place,
                shards: 100
            }]
        );
        let moved = (0..).map(|number| format!("key-{number}"));
        let moved = moved
            .into_iter()
            .find(|key| !new.seats_of_key(key).1.is_empty());
        let moved = moved.unwrap();
        assert_eq!(
            add_once(life, &new, &moved, 1).await,
            Ok(AddOutcome::Counted)
        );
        // The first try arrives after the second.
        assert_eq!(add_once(life, &old, &moved, 1).await, Ok(AddOutcome::Moved));
        assert_eq!(read(life, true).await.value, 1);
    });
}

#[test]
fn keys_are_forgotten_after_a_day_and_then_nobody_wakes() {
    const HOUR: u64 = 3_600_000;
    let mut world = World::new();
    let once = async |life: &Life| add_once(life, &plan(life).await, "a", 1).await;
    world.live(Crash::Process, async |life| {
        assert_eq!(once(life).await, Ok(AddOutcome::Counted));
    });
    world.pass(23 * HOUR);
    world.live(Crash::Process, async |life| {
        assert_eq!(once(life).await, Ok(AddOutcome::Repeated));
    });
    world.pass(26 * HOUR);
    world.live(Crash::Process, async |life| {
        life.sleep(60_000).await;
        let before = life.metric("shard_activations_total");
        life.sleep(2 * HOUR).await;
        assert_eq!(life.metric("shard_activations_total"), before);
        assert_eq!(once(life).await, Ok(AddOutcome::Counted));
    });
}

#[test]
fn colos_count_in_shards_of_their_own_and_have_one_total() {
    test(async |life| {
        let old = plan(life).await;
        add(life, &old, 0, 1).await;
        reshard(life, json!({ "scope": "colo", "count": 10 })).await;
        assert_eq!(add(life, &old, 0, 1).await, AddOutcome::Moved);
        for colo in ["SFO", "LHR"] {
            // This ring has no nodes in either.
            let args = json!([colo, false]);
            let plan: Plan = coordinator(life, PLAN, args).await.unwrap();
            assert_eq!(plan.place.to_string(), format!("{colo}~"));
            add(life, &plan, 3, 10).await;
        }
        assert_eq!(read(life, true).await.value, 21);
        reshard(life, json!({ "scope": "global" })).await;
        assert_eq!(read(life, true).await.value, 21);
        let plan = plan(life).await;
        add(life, &plan, 9, 100).await;
        assert_eq!(read(life, true).await.value, 121);
    });
}

#[test]
fn a_counter_that_chooses_by_itself_takes_more_shards_when_they_run_hot() {
    test(async |life| {
        reshard(life, json!({ "count": 10 })).await;
        reshard(life, json!({ "count": "auto" })).await;
        let mut plan = plan(life).await;
        let mut counted = 0_i128;
        let until = life.now() + 7000;
        while life.now() < until {
            // More than 500 a second each.
            let adds = (0..50).map(|number| add(life, &plan, number % 10, 1));
            let outcomes = futures_util::future::join_all(adds).await;
            let done = outcomes
                .iter()
                .filter(|outcome| **outcome == AddOutcome::Counted);
            counted += done.count() as i128;
            life.sleep(5).await;
            plan = coordinator(life, PLAN, json!(["", true])).await.unwrap();
        }
        let standing: Standing = coordinator(life, STANDING, json!([])).await.unwrap();
        assert!(standing.shards >= 20, "{standing:?}");
        assert!(standing.auto);
        assert_eq!(read(life, true).await.value, counted);
    });
}

#[test]
fn bad_changes_are_refused_and_unusual_ones_warned_of() {
    test(async |life| {
        for (change, rule) in [
            (json!({ "count": 0 }), "count = 0 must be from 1 to 10000"),
            (json!({ "count": 10_001 }), "must be from 1 to 10000"),
            (json!({ "report_every_ms": 1 }), "must be from 10 to 60000"),
            (json!({ "shards": 3 }), "unknown field"),
        ] {
            let refused = coordinator::<Standing>(life, RESHARD, json!([change])).await;
            let refused = refused.unwrap_err();
            assert!(refused.contains(rule), "{refused}");
        }
        assert_eq!(reshard(life, json!({ "count": 5 })).await.warnings.len(), 1);
        assert_eq!(
            reshard(life, json!({ "count": 100 })).await.warnings.len(),
            0
        );
    });
}

/// What clients were told of all increments, across deaths.
#[derive(Default)]
struct Ledger {
    /// The sum of what was acknowledged.
    known: i128,
    /// Increments without a key whose fate nobody knows.
    unknown: BTreeMap<u64, i64>,
    /// Increments with a key, until they are acknowledged.
    keyed: BTreeMap<u64, i64>,
    begun: u64,
}

impl Ledger {
    fn begin(&mut self, by: i64, keyed: bool) -> u64 {
        self.begun += 1;
        match keyed {
            true => self.keyed.insert(self.begun, by),
            false => self.unknown.insert(self.begun, by),
        };
        self.begun
    }

    fn end(&mut self, number: u64) {
        let ended = self.unknown.remove(&number);
        let ended = ended.or_else(|| self.keyed.remove(&number));
        self.known += i128::from(ended.unwrap());
    }

    /// Whether the total can be true.
    fn allows(&self, total: i128) -> bool {
        let mut sums = std::collections::BTreeSet::from([self.known]);
        for by in self.unknown.values() {
            let more: Vec<i128> = sums.iter().map(|sum| sum + i128::from(*by)).collect();
            sums.extend(more);
        }
        sums.contains(&total)
    }
}

/// A client behind a gateway of its own, which knows a plan that may be old.
async fn client(life: &Life, ledger: &RefCell<Ledger>, mut random: SmallRng) {
    let mut plan: Option<Plan> = None;
    loop {
        let known = match &plan {
            Some(known) if random.random_ratio(29, 30) => known.clone(),
            _ => match coordinator(life, PLAN, json!(["", true])).await {
                Ok(new) => plan.insert(new).clone(),
                Err(_) => {
                    life.sleep(50).await;
                    continue;
                }
            },
        };
        let by = random.random_range(-1000..=1000);
        let outcome = if random.random_bool(0.5) {
            let number = ledger.borrow_mut().begin(by, false);
            let seat = Seat {
                place: known.place,
                index: random.random_range(0..known.shards),
            };
            let args = json!([by, known.version]);
            let added = shard::<Added>(life, seat, ADD, args).await;
            if let Ok(Added {
                outcome: AddOutcome::Moved,
                ..
            }) = added
            {
                ledger.borrow_mut().unknown.remove(&number);
            }
            added.map(|added| (number, added.outcome))
        } else {
            // New ones, and such that somebody else has tried.
            let again: Vec<(u64, i64)> = ledger.borrow().keyed.clone().into_iter().collect();
            let (number, by) = match again.choose(&mut random) {
                Some(again) if random.random_bool(0.5) => *again,
                _ => (ledger.borrow_mut().begin(by, true), by),
            };
            let outcome = add_once(life, &known, &format!("key-{number}"), by).await;
            outcome.map(|outcome| (number, outcome))
        };
        match outcome {
            Ok((_, AddOutcome::Moved)) => plan = None,
            Ok((number, AddOutcome::Counted | AddOutcome::Repeated)) => {
                let mut ledger = ledger.borrow_mut();
                // Two may have sent the same key.
                if ledger.unknown.contains_key(&number) || ledger.keyed.contains_key(&number) {
                    ledger.end(number);
                }
            }
            Err(_) => {}
        }
        life.sleep(random.random_range(0..20)).await;
    }
}

/// An operator who never leaves it alone.
async fn restless(life: &Life, mut random: SmallRng) {
    loop {
        life.sleep(random.random_range(50..800)).await;
        let count = *[1, 2, 5, 12, 13, 30].choose(&mut random).unwrap();
        let change = json!([{ "count": count, "report_every_ms": 100 }]);
        drop(coordinator::<Standing>(life, RESHARD, change).await);
    }
}

#[test]
fn the_total_is_what_clients_were_told_whatever_dies() {
    for_seeds(6, |seed| {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut world = World::new();
        let ledger = RefCell::new(Ledger::default());
        for _ in 0..random.random_range(2..6) {
            let crash = match random.random_range(0..3) {
                0 => Crash::Process,
                1 => Crash::LoseAll,
                _ => Crash::Torn(random.random()),
            };
            let mut seeds = std::iter::repeat_with(|| SmallRng::seed_from_u64(random.random()));
            let clients: Vec<SmallRng> = seeds.by_ref().take(4).collect();
            let operator = seeds.next().unwrap();
            let mut chance = seeds.next().unwrap();
            let length = Duration::from_millis(chance.random_range(500..3000));
            world.live(crash, async |life| {
                let all = async {
                    let clients = clients
                        .into_iter()
                        .map(|random| client(life, &ledger, random));
                    futures_util::future::join_all(clients).await;
                };
                let fails = async {
                    life.sleep(chance.random_range(100..1500)).await;
                    if chance.random_bool(0.3) {
                        let kind = std::io::ErrorKind::Other;
                        life.set_faults(vec![Fault::Fail(chance.random_range(0..20), kind)]);
                    }
                    std::future::pending::<()>().await;
                };
                tokio::select! {
                    () = all => {}
                    () = restless(life, operator) => {}
                    () = fails => {}
                    () = tokio::time::sleep(length) => {}
                }
            });
        }
        world.live(Crash::Process, async |life| {
            life.sleep(15_000).await;
            settle(life, &ledger).await;
            let exact = read(life, true).await.value;
            check(&ledger.borrow(), exact);
            life.sleep(5000).await;
            assert_eq!(read(life, false).await.value, exact);
            let standing: Standing = coordinator(life, STANDING, json!([])).await.unwrap();
            assert_eq!((standing.value, standing.retiring), (exact, 0));
            // And so it is without what is in memory.
            reshard(life, json!({ "count": 1 })).await;
            assert_eq!(read(life, true).await.value, exact);
        });
    });
}

fn check(told: &Ledger, exact: i128) {
    assert!(told.keyed.is_empty());
    assert!(
        told.allows(exact),
        "{exact} is none of {} and some of {:?}",
        told.known,
        told.unknown
    );
}

/// All keys are sent until they are acknowledged.
async fn settle(life: &Life, ledger: &RefCell<Ledger>) {
    let plan = plan(life).await;
    let left = ledger.borrow().keyed.clone();
    for (number, by) in left {
        let outcome = add_once(life, &plan, &format!("key-{number}"), by).await;
        assert_ne!(outcome.unwrap(), AddOutcome::Moved);
        ledger.borrow_mut().end(number);
    }
}
