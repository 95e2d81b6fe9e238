//! Many schedules on one alarm, and the queue on its own, through deaths of the node.

use std::collections::BTreeMap;
use std::rc::Rc;

use http::{Request, Response};
use protocol::ClassName;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value as Json, json};
use shard_node::class::{AlarmInfo, Args, Body, Class, ClassError, Context, Instance, Turn};
use shard_node::schedules::{Due, Missed, Schedules};

use crate::alarms::{EPOCH, World};
use crate::disk::Crash;

const MINUTE: u64 = 60_000;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

/// Keeps schedules; what they did is in its own pairs, one per run.
pub(crate) struct Planner(ClassName);

impl Default for Planner {
    fn default() -> Self {
        Self("Planner".parse().unwrap())
    }
}

impl Class for Planner {
    fn name(&self) -> &ClassName {
        &self.0
    }

    fn methods(&self) -> &'static [&'static str] {
        &["once", "cron", "cancel", "retry", "list", "runs"]
    }

    fn handles_alarms(&self) -> bool {
        true
    }

    fn construct(&self, context: Context) -> Result<Rc<dyn Instance>, ClassError> {
        let schedules = Schedules::new(context.clone());
        Ok(Rc::new(Plan { context, schedules }))
    }
}

struct Plan {
    context: Context,
    schedules: Schedules,
}

impl Plan {
    fn answer(&self, method: &str, mut args: Args) -> Result<Json, ClassError> {
        match method {
            "once" => {
                let at = args.integer(1, "at")?.unwrap().unsigned_abs();
                let payload = args.take(2);
                self.schedules.once(args.text(0, "name")?, at, payload)?;
            }
            "cron" => {
                let missed = match args.text(3, "missed")? {
                    "skip" => Missed::Skip,
                    "all" => Missed::All,
                    _ => Missed::Once,
                };
                let payload = args.take(4);
                let zone = args.text(2, "zone")?;
                let (name, pattern) = (args.text(0, "name")?, args.text(1, "pattern")?);
                self.schedules.cron(name, pattern, zone, missed, payload)?;
            }
            "cancel" => return Ok(self.schedules.cancel(args.text(0, "name")?)?.into()),
            "retry" => return Ok(self.schedules.retry(args.text(0, "name")?)?.into()),
            "list" => return Ok(json!(self.schedules.list()?)),
            _ => {
                let mut runs = Vec::new();
                self.context.storage().kv_list(
                    &serde_json::from_value(json!({})).unwrap(),
                    |key, _, _| {
                        runs.push(key.to_owned());
                        true
                    },
                )?;
                return Ok(json!(runs));
            }
        }
        Ok(Json::Null)
    }

    /// Behaves as the payload says; a run is noted under its key, so that a second one would be seen.
    fn run(&self, due: &Due) -> Result<(), ClassError> {
        let storage = self.context.storage();
        let key = due.key();
        assert!(storage.kv_get(&key)?.is_none(), "{key} ran twice");
        storage.kv_put(&key, None, b"")?;
        let below = |what: &str| {
            let times = due.payload[what].as_u64().unwrap_or(0);
            u64::from(due.retry_count) < times
        };
        assert!(!below("panic"), "as asked");
        if below("fail") {
            return Err(ClassError::BadRequest("as asked".to_owned()));
        }
        Ok(())
    }
}

impl Instance for Plan {
    fn fetch(self: Rc<Self>, _request: Request<Body>) -> Turn<Response<Body>> {
        Turn::Done(Ok(Response::new(Body::empty())))
    }

    fn call(self: Rc<Self>, method: &str, args: Args) -> Turn<Json> {
        Turn::Done(self.answer(method, args))
    }

    fn alarm(self: Rc<Self>, info: AlarmInfo) -> Turn<()> {
        let schedules = self.schedules.clone();
        schedules.run(info, Rc::new(move |due: &Due| self.run(due)))
    }
}

#[test]
fn schedules_run_at_their_times_and_one_that_fails_blocks_no_other() {
    for bad in ["fail", "panic"] {
        let mut world = World::new();
        world.live(Crash::Process, async |life| {
            let call = async |method, args| life.call_of("Planner", "p", method, args).await;
            call("once", json!(["bad", EPOCH + MINUTE, { bad: 99 }])).await;
            call("once", json!(["worse", EPOCH + MINUTE, { bad: 3 }])).await;
            for number in 0..60 {
                let at = EPOCH + MINUTE + number % 3;
                call("once", json!([format!("good-{number:02}"), at, {}])).await;
            }
            call("once", json!(["later", EPOCH + HOUR, {}])).await;
            assert_eq!(call("cancel", json!(["good-07"])).await, true);
            assert_eq!(call("cancel", json!(["good-07"])).await, false);
            life.sleep(MINUTE + 20_000).await;
            let runs = call("runs", json!([])).await;
            let good = runs
                .as_array()
                .unwrap()
                .iter()
                .filter(|run| run.as_str().unwrap().starts_with("good"))
                .count();
            assert_eq!(good, 59, "{bad}: {runs}");
            life.sleep(10 * MINUTE).await;
            let runs = call("runs", json!([])).await;
            assert_eq!(runs.as_array().unwrap().len(), 60, "{bad}: {runs}");
            // It was given up, and is still there to be seen and run again.
            let list = call("list", json!([])).await;
            let names: Vec<&str> = list
                .as_array()
                .unwrap()
                .iter()
                .map(|found| found["name"].as_str().unwrap())
                .collect();
            assert_eq!(names, ["later", "bad"], "{bad}");
            assert_eq!(list[1]["next_ms"], Json::Null);
            assert!(list[1]["failed_ms"].is_u64(), "{list}");
            assert_eq!(call("retry", json!(["bad"])).await, true);
            life.sleep(2 * HOUR).await;
            let runs = call("runs", json!([])).await;
            assert_eq!(runs.as_array().unwrap().len(), 61, "{bad}: {runs}");
        });
    }
}

#[test]
fn cron_goes_on_after_failures_and_keeps_to_its_policy_after_downtime() {
    let mut world = World::new();
    world.live(Crash::LoseAll, async |life| {
        let call = async |method, args| life.call_of("Planner", "p", method, args).await;
        // 1,700,000,000 is 22:13:20 in UTC.
        for missed in ["once", "skip", "all"] {
            call("cron", json!([missed, "0 * * * *", "UTC", missed, {}])).await;
        }
        call(
            "cron",
            json!(["failing", "0 * * * *", "UTC", "once", { "fail": 99 }]),
        )
        .await;
        let error = life
            .try_call_of(
                "Planner",
                "p",
                "cron",
                json!(["x", "0 25 * * *", "UTC", "once", {}]),
            )
            .await;
        assert!(error.unwrap_err().contains("no pattern"));
        life.sleep(3 * HOUR).await;
        let runs = call("runs", json!([])).await;
        assert_eq!(runs.as_array().unwrap().len(), 9, "{runs}");
    });
    // Down for five more occurrences.
    world.now += 5 * HOUR;
    world.live(Crash::LoseAll, async |life| {
        let call = async |method, args| life.call_of("Planner", "p", method, args).await;
        life.sleep(10 * MINUTE).await;
        let runs = call("runs", json!([])).await;
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for run in runs.as_array().unwrap() {
            let (name, _) = run.as_str().unwrap().split_once('@').unwrap();
            *counts.entry(name.to_owned()).or_default() += 1;
        }
        let want = [("all", 8), ("once", 4), ("skip", 3)];
        assert_eq!(
            counts.into_iter().collect::<Vec<_>>(),
            want.map(|(name, count)| (name.to_owned(), count))
        );
        let list = call("list", json!([])).await;
        let list = list.as_array().unwrap();
        let failing = list
            .iter()
            .find(|found| found["name"] == "failing")
            .unwrap();
        assert!(
            failing["next_ms"].is_u64() && failing["failed_ms"].is_u64(),
            "{failing}"
        );
    });
}

/// Every schedule of a random run has run exactly once, as far as its own database knows.
#[test]
fn every_schedule_runs_once_through_deaths_of_the_node() {
    crate::for_seeds(1, run_schedules);
}

fn run_schedules(seed: u64) {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut world = World::new();
    let mut wanted: BTreeMap<String, u64> = BTreeMap::new();
    for life in 0..8 {
        let crash = [Crash::Process, Crash::LoseAll, Crash::Torn(seed)][random.random_range(0..3)];
        world.live(crash, async |node| {
            for number in 0..random.random_range(0..40) {
                let name = format!("{life}-{number}");
                let at = node.now() + random.random_range(0..HOUR);
                let payload = match random.random_range(0..6) {
                    0 => json!({ "fail": random.random_range(1..6) }),
                    1 => json!({ "panic": 1 }),
                    _ => json!({}),
                };
                node.call_of("Planner", "p", "once", json!([name, at, payload]))
                    .await;
                wanted.insert(name, at);
            }
            node.sleep(random.random_range(0..HOUR)).await;
        });
        world.now += random.random_range(0..10 * MINUTE);
    }
    world.live(Crash::Process, async |node| {
        node.sleep(DAY).await;
        let runs = node.call_of("Planner", "p", "runs", json!([])).await;
        let mut want: Vec<String> = wanted
            .iter()
            .map(|(name, at)| format!("{name}@{at}"))
            .collect();
        want.sort();
        assert_eq!(runs, json!(want));
        assert_eq!(
            node.call_of("Planner", "p", "list", json!([])).await,
            json!([])
        );
    });
}

#[test]
fn a_queue_delivers_at_least_once_and_gives_up_in_the_end() {
    let mut world = World::new();
    world.live(Crash::LoseAll, async |life| {
        let call = async |method, args| life.call_of("Queue", "q", method, args).await;
        assert_eq!(call("receive", json!([])).await, json!([]));
        assert_eq!(
            call("configure", json!([{ "maxAttempts": 2 }])).await["maxAttempts"],
            2
        );
        assert_eq!(call("send", json!([{ "job": 1 }])).await, 1);
        assert_eq!(call("send", json!(["two", { "delayMs": 5000 }])).await, 2);
        assert_eq!(
            call("stats", json!([])).await,
            json!({ "ready": 1, "delayed": 1, "leased": 0, "dead": 0 })
        );
        let got = call("receive", json!([{ "max": 10, "visibilityMs": 10_000 }])).await;
        assert_eq!(
            (got[0]["body"].clone(), got[0]["attempts"].clone()),
            (json!({ "job": 1 }), json!(1))
        );
        assert_eq!(got.as_array().unwrap().len(), 1);
        assert_eq!(call("receive", json!([])).await, json!([]), "it is leased");
        assert_eq!(call("ack", json!([1, "1-0000000000000000"])).await, false);
        life.sleep(6000).await;
        let second = call("receive", json!([])).await;
        assert_eq!(call("ack", json!([2, second[0]["lease"]])).await, true);
        // The first lease ran out: it is back, and an old lease is worth nothing.
        life.sleep(5000).await;
        assert_eq!(call("ack", json!([1, got[0]["lease"]])).await, false);
        let again = call("receive", json!([{ "visibilityMs": 10_000 }])).await;
        assert_eq!(again[0]["attempts"], 2);
    });
    world.live(Crash::LoseAll, async |life| {
        let call = async |method, args| life.call_of("Queue", "q", method, args).await;
        // Nobody asks: the alarm gives it up.
        life.sleep(15_000).await;
        assert_eq!(
            life.metric("shard_alarms_total{class=\"Queue\",outcome=\"done\"}"),
            1.0
        );
        let dead = call("dead", json!([])).await;
        assert_eq!(
            dead,
            json!([{ "id": 1, "body": { "job": 1 }, "attempts": 2 }])
        );
        assert_eq!(call("redrive", json!([1])).await, true);
        let got = call("receive", json!([])).await;
        assert_eq!(
            call("retry", json!([1, got[0]["lease"], { "delayMs": 1000 }])).await,
            true
        );
        assert_eq!(call("receive", json!([])).await, json!([]));
        life.sleep(1500).await;
        let got = call("receive", json!([])).await;
        assert_eq!(call("ack", json!([1, got[0]["lease"]])).await, true);
        assert_eq!(
            call("stats", json!([])).await,
            json!({ "ready": 0, "delayed": 0, "leased": 0, "dead": 0 })
        );
        let refused = life
            .try_call_of("Queue", "q", "receive", json!([{ "max": 101 }]))
            .await;
        assert!(
            refused
                .unwrap_err()
                .contains("max = 101 must be from 1 to 100")
        );
    });
}
