//! Alarms under a clock that runs as fast as there is nothing to do, on a disk that may fail, through
//! deaths of the node.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::{Request, Response};
use ops::metrics::Registry;
use protocol::ring::{RingDocument, RingNode};
use protocol::{ClassName, Home, ObjectId, ObjectName, Ring, RingVersion, ShardId};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::json;
use shard_node::alarm::AlarmState;
use shard_node::alarms::{AlarmsConfig, Runner};
use shard_node::class::{AlarmInfo, Args, Body, Class, ClassError, Context, Instance, Json, Turn};
use shard_node::classes::Classes;
use shard_node::classes::sharded_counter::{Coordinator, Shard};
use shard_node::clock::Clock;
use shard_node::config::{MailboxConfig, ObjectsConfig};
use shard_node::host::{Address, Host, HostConfig};
use shard_node::metrics::Metrics;
use shard_node::object::mailbox::{Event, Reply};
use shard_node::storage::Logged;
use shard_node::stub::Switchboard;
use tokio::sync::Notify;
use tokio::task::LocalSet;
use tokio::time::Instant;

use crate::disk::{Crash, Fault, SimDisk};
use crate::node::{ROOT, setup};
use crate::schedules::Planner;

/// When a run begins, in milliseconds since 1970.
pub(crate) const EPOCH: u64 = 1_700_000_000_000;

const SHARDS: u16 = 4;

/// Follows the runtime's clock, which jumps to the next timer whenever nothing else is to be done.
struct VirtualClock {
    base: u64,
    start: Instant,
}

impl Clock for VirtualClock {
    fn unix_millis(&self) -> u64 {
        self.base + u64::try_from(self.start.elapsed().as_millis()).unwrap()
    }
}

/// One try of a handler: for whom, when it was to be, which try it was, and when it began.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Try {
    object: String,
    scheduled: u64,
    retry: u32,
    at: u64,
}

type Tries = Arc<Mutex<Vec<Try>>>;

/// Notes every try outside of its object, and every success inside.
struct Beeper {
    name: ClassName,
    tries: Tries,
}

impl Class for Beeper {
    fn name(&self) -> &ClassName {
        &self.name
    }

    fn methods(&self) -> &'static [&'static str] {
        &["set", "get", "delete", "behave", "runs", "set_and_fail"]
    }

    fn handles_alarms(&self) -> bool {
        true
    }

    fn construct(&self, context: Context) -> Result<Rc<dyn Instance>, ClassError> {
        let tries = Arc::clone(&self.tries);
        Ok(Rc::new(BeeperInstance { context, tries }))
    }
}

struct BeeperInstance {
    context: Context,
    tries: Tries,
}

impl BeeperInstance {
    fn text(&self, key: &str) -> Result<String, ClassError> {
        let entry = self.context.storage().kv_get(key)?;
        Ok(entry.map_or_else(String::new, |entry| String::from_utf8(entry.value).unwrap()))
    }

    fn note_success(&self, scheduled: u64) -> Result<(), ClassError> {
        let storage = self.context.storage();
        let runs = self.text("runs")?;
        storage.kv_put("runs", None, format!("{runs}{scheduled} ").as_bytes())?;
        Ok(())
    }
}

impl Instance for BeeperInstance {
    fn fetch(self: Rc<Self>, _request: Request<Body>) -> Turn<Response<Body>> {
        Turn::Done(Ok(Response::new(Body::empty())))
    }

    fn call(self: Rc<Self>, method: &str, args: Args) -> Turn<Json> {
        let at = || args.integer(0, "at").unwrap().unwrap().unsigned_abs();
        Turn::Done((|| match method {
            "set" => self.context.set_alarm(at()).map(|()| Json::Null),
            "set_and_fail" => {
                self.context.set_alarm(at())?;
                Err(ClassError::BadRequest("as asked".to_owned()))
            }
            "delete" => self.context.delete_alarm().map(|()| Json::Null),
            "get" => Ok(json!(self.context.alarm()?)),
            "behave" => {
                let how = args.text(0, "how")?.as_bytes();
                self.context.storage().kv_put("how", None, how)?;
                Ok(Json::Null)
            }
            _ => {
                let runs = self.text("runs")?;
                let runs = runs.split_whitespace();
                Ok(runs.map(|run| run.parse::<u64>().unwrap()).collect())
            }
        })())
    }

    fn alarm(self: Rc<Self>, info: AlarmInfo) -> Turn<()> {
        let object = self.context.name().unwrap().unwrap().to_string();
        let now = self.context.unix_millis();
        self.tries.lock().unwrap().push(Try {
            object,
            scheduled: info.scheduled_ms,
            retry: info.retry_count,
            at: now,
        });
        assert_eq!(self.context.alarm().unwrap(), None, "none while it runs");
        let how = self.text("how").unwrap();
        let (how, argument) = how.split_once(' ').unwrap_or((&how, "0"));
        let argument: u64 = argument.parse().unwrap();
        let result = match how {
            // Written, and undone with the rest.
            "fail" if u64::from(info.retry_count) < argument => self
                .context
                .set_alarm(now + 1)
                .and_then(|()| self.note_success(0))
                .and(Err(ClassError::BadRequest("as asked".to_owned()))),
            "panic" if u64::from(info.retry_count) < argument => panic!("as asked"),
            "beat" => self
                .note_success(info.scheduled_ms)
                .and_then(|()| self.context.set_alarm(info.scheduled_ms + argument)),
            "cancel" => self.context.delete_alarm(),
            "wait" => {
                return Turn::run(async move {
                    tokio::time::sleep(Duration::from_millis(argument)).await;
                    assert!(info.retry_count > 0 || argument != 1, "as asked");
                    self.note_success(info.scheduled_ms)
                });
            }
            "set_and_wait" => {
                return Turn::run(async move {
                    self.context.set_alarm(now + argument)?;
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    assert_eq!(self.context.alarm()?, Some(now + argument));
                    self.note_success(info.scheduled_ms)?;
                    self.context.storage().kv_put("how", None, b"")?;
                    Ok(())
                });
            }
            _ => self.note_success(info.scheduled_ms),
        };
        Turn::Done(result)
    }
}

/// What outlives the node's deaths.
pub(crate) struct World {
    disk: SimDisk,
    tries: Tries,
    pub(crate) now: u64,
    config: AlarmsConfig,
}

/// One life of the node.
pub(crate) struct Life {
    host: Rc<Host>,
    runner: Rc<Runner>,
    engine: Logged,
    progress: Arc<Notify>,
    classes: Classes,
    ring: Arc<Ring>,
    clock: Arc<VirtualClock>,
    registry: Arc<Registry>,
    disk: SimDisk,
    /// The disk's thread shall look for work soon.
    calls: Rc<Notify>,
    /// The disk's thread stands still.
    stuck: Rc<Cell<bool>>,
}

impl World {
    pub(crate) fn new() -> Self {
        Self {
            disk: SimDisk::new(ROOT.as_ref()),
            tries: Tries::default(),
            now: EPOCH,
            config: AlarmsConfig::default(),
        }
    }

    /// Time goes by in which no node runs.
    pub(crate) fn pass(&mut self, millis: u64) {
        self.now += millis;
    }

    fn tries(&self) -> Vec<Try> {
        self.tries.lock().unwrap().clone()
    }

    /// Runs a node for as long as `run` lasts, then kills it.
    pub(crate) fn live(&mut self, crash: Crash, run: impl AsyncFnOnce(&Life)) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap();
        let local = LocalSet::new();
        self.now = local.block_on(&runtime, async {
            let life = Life::begin(self);
            run(&life).await;
            life.clock.unix_millis()
        });
        // The dead write nothing.
        let dead = self.disk.clone();
        self.disk = dead.crash(crash);
        dead.set_faults(vec![Fault::Stop(0)]);
    }
}

impl Life {
    fn begin(world: &World) -> Self {
        let clock = Arc::new(VirtualClock {
            base: world.now,
            start: Instant::now(),
        });
        let progress = Arc::new(Notify::new());
        let mut setup = setup(&world.disk);
        setup.clock = Arc::clone(&clock) as _;
        // Large enough not to be in the way.
        setup.log.segment_bytes = 1 << 20;
        setup.log.live_bytes_max = 8 << 20;
        let engine = Logged::open_idle(setup, Arc::clone(&progress)).unwrap();
        let registry = Arc::new(Registry::default());
        let metrics = Rc::new(Metrics::new(Arc::clone(&registry), 0));
        let config = HostConfig {
            mailbox: MailboxConfig::default(),
            objects: ObjectsConfig::default(),
            sql: Arc::default(),
            alarms: world.config.clone(),
            expiry: Arc::default(),
        };
        let host = Host::new(
            config,
            Rc::new(engine.clone()),
            Arc::clone(&clock) as _,
            metrics,
        );
        let classes = crate::patterns::classes::added_to(crate::examples::classes::classes())
            .with(Planner::default())
            .with(Coordinator::default())
            .with(Shard::default())
            .with(Beeper {
                name: "Beeper".parse().unwrap(),
                tries: Arc::clone(&world.tries),
            });
        let ring = RingDocument {
            version: RingVersion(1.try_into().unwrap()),
            shards: SHARDS,
            nodes: vec![RingNode {
                name: "sim".to_owned(),
                weight: 1,
                colo: None,
                workers: vec![String::new()],
            }],
        };
        let ring = Arc::new(Ring::new(ring).unwrap());
        let switchboard = Switchboard::new(&host, classes.clone(), Arc::clone(&ring), 0, None);
        host.set_switchboard(switchboard);
        let runner = Runner::new(
            Rc::clone(&host),
            classes.clone(),
            Arc::clone(&ring),
            world.config.clone(),
        );
        let catalogs = (0..SHARDS).map(|shard| (Home::Global, ShardId(shard)));
        let stuck = Rc::new(Cell::new(false));
        tokio::task::spawn_local(Rc::clone(&host).run());
        tokio::task::spawn_local(Rc::clone(&host).follow_log(Arc::clone(&progress)));
        tokio::task::spawn_local(Rc::clone(&runner).run());
        tokio::task::spawn_local(Rc::clone(&runner).watch(engine.clone(), catalogs.collect()));
        let life = Self {
            host,
            runner,
            engine,
            progress,
            classes,
            ring,
            clock,
            registry,
            disk: world.disk.clone(),
            calls: Rc::default(),
            stuck,
        };
        life.begin_upkeep();
        life
    }

    /// What the threads of the log and the worker's tick do.
    fn begin_upkeep(&self) {
        let (engine, host) = (self.engine.clone(), Rc::clone(&self.host));
        let (progress, stuck) = (Arc::clone(&self.progress), Rc::clone(&self.stuck));
        let calls = Rc::clone(&self.calls);
        tokio::task::spawn_local(async move {
            loop {
                // A millisecond after a call; otherwise seldom, for hours pass.
                tokio::select! {
                    () = calls.notified() => tokio::time::sleep(Duration::from_millis(1)).await,
                    () = tokio::time::sleep(Duration::from_millis(500)) => {}
                }
                while !stuck.get() && engine.step() {
                    progress.notify_one();
                }
            }
        });
        tokio::task::spawn_local(async move {
            let mut interval = tokio::time::interval(Duration::from_millis(500));
            loop {
                interval.tick().await;
                host.tick();
            }
        });
    }

    /// What happens to the disk from now on.
    pub(crate) fn set_faults(&self, faults: Vec<Fault>) {
        self.disk.set_faults(faults);
    }

    /// Whether anything of an object is stored.
    pub(crate) fn exists(&self, class: &str, object: &str) -> bool {
        let address = self.address_of(class, object);
        self.engine.exists(address.id, address.shard).unwrap()
    }

    /// What an operator's deletion does.
    pub(crate) fn delete(&self, class: &str, object: &str) {
        let address = self.address_of(class, object);
        self.host.take_out(address.id);
        self.engine.delete(address.id, address.shard).unwrap();
        self.host.timers().set(address.id, None);
    }

    fn address(&self, object: &str) -> Address {
        self.address_of("Beeper", object)
    }

    pub(crate) fn address_of(&self, class: &str, object: &str) -> Address {
        let mut classes = self.classes.iter();
        let class = classes
            .find(|known| known.name().as_str() == class)
            .unwrap();
        let name: ObjectName = object.parse().unwrap();
        let id = ObjectId::named(class.name(), Home::Global, &name);
        Address {
            class: Arc::clone(class),
            id,
            name: Some(name),
            shard: self.ring.shard_of(id),
        }
    }

    async fn try_call(&self, object: &str, method: &str, args: Json) -> Result<Json, String> {
        self.try_call_of("Beeper", object, method, args).await
    }

    pub(crate) async fn call_of(
        &self,
        class: &str,
        object: &str,
        method: &str,
        args: Json,
    ) -> Json {
        self.try_call_of(class, object, method, args).await.unwrap()
    }

    pub(crate) async fn try_call_of(
        &self,
        class: &str,
        object: &str,
        method: &str,
        args: Json,
    ) -> Result<Json, String> {
        let Json::Array(args) = args else {
            panic!("{args} are no arguments")
        };
        let event = Event::Call {
            method: method.into(),
            args: Args::new(method, args),
        };
        self.calls.notify_one();
        match self
            .host
            .deliver(&self.address_of(class, object), event)
            .await
        {
            Ok(Reply::Value(value)) => Ok(value),
            Ok(Reply::Response(_)) => panic!("a response to a call"),
            Err(problem) => Err(problem.detail),
        }
    }

    async fn call(&self, object: &str, method: &str, args: Json) -> Json {
        self.try_call(object, method, args).await.unwrap()
    }

    /// The same while the disk's thread looks for work all the time.
    async fn sleep_with_the_disk(&self, millis: u64) {
        for _ in 0..millis / 2 {
            self.calls.notify_one();
            self.sleep(2).await;
        }
    }

    pub(crate) fn now(&self) -> u64 {
        self.clock.unix_millis()
    }

    pub(crate) async fn sleep(&self, millis: u64) {
        tokio::time::sleep(Duration::from_millis(millis)).await;
    }

    /// The alarm of an object, as its catalog has it after a while.
    async fn listed(&self, object: &str) -> AlarmState {
        self.sleep(6000).await;
        let address = self.address(object);
        let row = self.engine.find(address.id, address.shard).unwrap();
        row.map(|row| row.alarm).unwrap_or_default()
    }

    pub(crate) fn metric(&self, line: &str) -> f64 {
        let metrics = self.registry.handle().render();
        let value = metrics
            .lines()
            .find_map(|found| found.strip_prefix(line)?.strip_prefix(' '));
        value.map_or(0.0, |value| value.parse().unwrap())
    }
}

/// One life that ends well.
fn test(run: impl AsyncFnOnce(&Life)) -> Vec<Try> {
    let mut world = World::new();
    world.live(Crash::Process, run);
    world.tries()
}

fn at(tries: &[Try]) -> Vec<(u32, u64)> {
    tries
        .iter()
        .map(|run| (run.retry, run.at - EPOCH))
        .collect()
}

#[test]
fn an_alarm_runs_when_it_is_due_and_is_gone_then() {
    let tries = test(async |life| {
        life.call("a", "set", json!([EPOCH + 3_600_000])).await;
        assert_eq!(life.call("a", "get", json!([])).await, EPOCH + 3_600_000);
        assert_eq!(life.metric("shard_alarms_pending{worker=\"0\"}"), 0.0);
        life.sleep(3_599_000).await;
        assert_eq!(life.call("a", "runs", json!([])).await, json!([]));
        life.sleep(2000).await;
        assert_eq!(
            life.call("a", "runs", json!([])).await,
            json!([EPOCH + 3_600_000])
        );
        assert_eq!(life.call("a", "get", json!([])).await, Json::Null);
        assert_eq!(life.listed("a").await, AlarmState::default());
        assert_eq!(
            life.metric("shard_alarms_total{class=\"Beeper\",outcome=\"done\"}"),
            1.0
        );
    });
    assert_eq!(at(&tries), [(0, 3_600_000)]);
}

#[test]
fn a_time_that_has_passed_is_due_at_once() {
    let tries = test(async |life| {
        life.call("a", "set", json!([0])).await;
        life.sleep(5).await;
        assert_eq!(life.call("a", "runs", json!([])).await, json!([0]));
    });
    assert!(tries[0].at - EPOCH <= 5, "{tries:?}");
}

#[test]
fn a_later_call_replaces_the_alarm_and_a_failed_turn_does_not() {
    let tries = test(async |life| {
        life.call("a", "set", json!([EPOCH + 1000])).await;
        life.call("a", "set", json!([EPOCH + 5000])).await;
        life.try_call("a", "set_and_fail", json!([EPOCH + 2000]))
            .await
            .unwrap_err();
        life.call("b", "set", json!([EPOCH + 1000])).await;
        life.call("b", "delete", json!([])).await;
        life.call("b", "delete", json!([])).await;
        life.sleep(10_000).await;
        let refused = life
            .try_call("a", "set", json!([i64::MAX]))
            .await
            .unwrap_err();
        assert!(
            refused.contains("must be at most at 253402300799999"),
            "{refused}"
        );
    });
    assert_eq!(at(&tries), [(0, 5000)]);
}

#[test]
fn a_class_without_a_handler_cannot_set_an_alarm() {
    test(async |life| {
        let counter = life.classes.iter().next().unwrap();
        let name: ObjectName = "a".parse().unwrap();
        let address = Address {
            class: Arc::clone(counter),
            id: ObjectId::named(counter.name(), Home::Global, &name),
            name: Some(name),
            shard: ShardId(0),
        };
        let set = Event::Operate(Box::new(|context: &Context| {
            context.set_alarm(1).map(|()| Json::Null)
        }));
        let Err(problem) = life.host.deliver(&address, set).await else {
            panic!("it was set")
        };
        assert!(
            problem
                .detail
                .contains("class Counter has no alarm handler"),
            "{problem:?}"
        );
    });
}

#[test]
fn failures_are_retried_with_doubling_pauses_and_then_kept_as_a_dead_letter() {
    for how in ["fail 99", "panic 99"] {
        let tries = test(async |life| {
            life.call("a", "behave", json!([how])).await;
            life.call("a", "set", json!([EPOCH + 1000])).await;
            life.sleep(8000).await;
            let waiting = life.listed("a").await.pending.unwrap();
            assert_eq!((waiting.scheduled_ms, waiting.retries), (EPOCH + 1000, 3));
            life.sleep(200_000).await;
            assert_eq!(life.call("a", "get", json!([])).await, Json::Null);
            let dead = life.listed("a").await.dead.unwrap();
            assert_eq!(dead.scheduled_ms, EPOCH + 1000);
            assert!(dead.error.contains("as asked"), "{dead:?}");
            assert_eq!(life.call("a", "runs", json!([])).await, json!([]));
            assert_eq!(
                life.metric("shard_alarms_total{class=\"Beeper\",outcome=\"failed\"}"),
                6.0
            );
            assert_eq!(
                life.metric("shard_alarms_total{class=\"Beeper\",outcome=\"dead\"}"),
                1.0
            );
        });
        let pauses: Vec<u64> = tries
            .windows(2)
            .map(|pair| pair[1].at - pair[0].at)
            .collect();
        let whole: Vec<u64> = pauses.iter().map(|pause| (pause + 500) / 1000).collect();
        assert_eq!(whole, [2, 4, 8, 16, 32, 64], "{how}");
        let numbers: Vec<u32> = tries.iter().map(|run| run.retry).collect();
        assert_eq!(numbers, [0, 1, 2, 3, 4, 5, 6], "{how}");
    }
}

#[test]
fn a_retry_that_succeeds_ends_it_and_a_new_alarm_has_all_its_tries() {
    let tries = test(async |life| {
        life.call("a", "behave", json!(["fail 2"])).await;
        life.call("a", "set", json!([EPOCH])).await;
        life.sleep(10_000).await;
        assert_eq!(life.call("a", "runs", json!([])).await, json!([EPOCH]));
        life.call("a", "set", json!([EPOCH + 20_000])).await;
        life.sleep(30_000).await;
        assert_eq!(
            life.call("a", "runs", json!([])).await,
            json!([EPOCH, EPOCH + 20_000])
        );
        assert_eq!(life.listed("a").await, AlarmState::default());
    });
    let numbers: Vec<u32> = tries.iter().map(|run| run.retry).collect();
    assert_eq!(numbers, [0, 1, 2, 0, 1, 2]);
}

#[test]
fn a_heartbeat_does_not_drift() {
    let tries = test(async |life| {
        life.call("a", "behave", json!(["beat 30000"])).await;
        life.call("a", "set", json!([EPOCH + 30_000])).await;
        life.sleep(1000 * 30_000 + 100).await;
        assert_eq!(
            life.metric("shard_alarm_ahead_seconds_bucket{class=\"Beeper\",le=\"30\"}"),
            1001.0
        );
    });
    assert_eq!(tries.len(), 1000);
    for (number, run) in (1..).zip(&tries) {
        assert!(run.at - EPOCH - number * 30_000 <= 5, "{run:?}");
    }
}

#[test]
fn a_handler_may_cancel_itself_and_may_await() {
    let tries = test(async |life| {
        life.call("a", "behave", json!(["cancel"])).await;
        life.call("a", "set", json!([EPOCH])).await;
        // It fails after it awaited; the second try does not.
        life.call("b", "behave", json!(["wait 1"])).await;
        life.call("b", "set", json!([EPOCH])).await;
        // While it waits, somebody sets another alarm.
        life.call("c", "behave", json!(["wait 10000"])).await;
        life.call("c", "set", json!([EPOCH])).await;
        life.sleep(5000).await;
        assert_eq!(life.call("c", "get", json!([])).await, Json::Null);
        life.call("c", "set", json!([EPOCH + 6000])).await;
        assert_eq!(life.call("c", "get", json!([])).await, EPOCH + 6000);
        life.sleep(60_000).await;
        assert_eq!(life.call("b", "runs", json!([])).await, json!([EPOCH]));
        assert_eq!(
            life.call("c", "runs", json!([])).await,
            json!([EPOCH, EPOCH + 6000])
        );
        // The handler sets it while it waits: that counts when it is done.
        life.call("d", "behave", json!(["set_and_wait 5000"])).await;
        life.call("d", "set", json!([EPOCH])).await;
        life.sleep(500).await;
        assert_eq!(life.call("d", "get", json!([])).await, Json::Null);
        life.sleep(10_000).await;
        let runs = life.call("d", "runs", json!([])).await;
        assert_eq!(runs.as_array().unwrap().len(), 2, "{runs}");
    });
    let of = |object| tries.iter().filter(|run| run.object == object).count();
    assert_eq!((of("a"), of("b"), of("c"), of("d")), (1, 2, 2, 2));
    // Never twice at once: the second run of c began when the first had ended.
    let c: Vec<u64> = tries
        .iter()
        .filter(|run| run.object == "c")
        .map(|run| run.at)
        .collect();
    assert!(c[1] - c[0] >= 10_000, "{c:?}");
}

#[test]
fn a_handler_that_never_ends_is_given_up() {
    let mut world = World::new();
    world.config.run_time_max = Duration::from_secs(60);
    world.live(Crash::Process, async |life| {
        life.call("a", "behave", json!(["wait 3600000"])).await;
        life.call("a", "set", json!([EPOCH])).await;
        life.sleep(61_000).await;
        assert_eq!(life.listed("a").await.pending.unwrap().retries, 1);
    });
}

#[test]
fn alarms_survive_the_death_of_the_node_and_run_late_once() {
    let mut world = World::new();
    world.live(Crash::LoseAll, async |life| {
        life.call("a", "set", json!([EPOCH + 60_000])).await;
        life.call("b", "behave", json!(["wait 10000"])).await;
        life.call("b", "set", json!([EPOCH])).await;
        life.call("c", "set", json!([EPOCH + 60_000])).await;
        life.call("c", "delete", json!([])).await;
        life.sleep(5000).await;
    });
    world.now += 3_600_000;
    world.live(Crash::LoseAll, async |life| {
        life.sleep(100).await;
        assert_eq!(
            life.call("a", "runs", json!([])).await,
            json!([EPOCH + 60_000])
        );
        // It was under way: it runs again.
        life.sleep(20_000).await;
        assert_eq!(life.call("b", "runs", json!([])).await, json!([EPOCH]));
        assert_eq!(life.call("c", "runs", json!([])).await, json!([]));
        life.call("a", "set", json!([EPOCH + 10 * 3_600_000])).await;
        // Long enough for files, catalogs and an empty log.
        life.sleep(600_000).await;
    });
    world.live(Crash::LoseAll, async |life| {
        life.sleep(10 * 3_600_000).await;
        let runs = life.call("a", "runs", json!([])).await;
        assert_eq!(runs, json!([EPOCH + 60_000, EPOCH + 10 * 3_600_000]));
    });
    let late: Vec<_> = world
        .tries()
        .into_iter()
        .filter(|run| run.object == "b")
        .collect();
    assert_eq!(
        at(&late)
            .iter()
            .map(|(retry, _)| *retry)
            .collect::<Vec<_>>(),
        [0, 0]
    );
}

#[test]
fn failures_of_the_platform_cost_no_retry() {
    let tries = test(async |life| {
        life.call("a", "set", json!([EPOCH + 1000])).await;
        life.stuck.set(true);
        life.sleep(3000).await;
        // It ran, but never became durable: the disk failed under it.
        let disk = life.disk_fails();
        life.stuck.set(false);
        life.sleep(100).await;
        disk.set_faults(Vec::new());
        life.sleep(5000).await;
        assert_eq!(
            life.call("a", "runs", json!([])).await,
            json!([EPOCH + 1000])
        );
        assert_eq!(life.listed("a").await, AlarmState::default());
        assert!(life.metric("shard_alarms_postponed_total") >= 1.0);
        assert_eq!(
            life.metric("shard_alarms_total{class=\"Beeper\",outcome=\"failed\"}"),
            0.0
        );
    });
    assert!(
        tries.len() >= 2 && tries.iter().all(|run| run.retry == 0),
        "{tries:?}"
    );
}

#[test]
fn an_alarm_that_was_lost_with_the_log_gives_way_to_the_one_before() {
    let tries = test(async |life| {
        life.call("a", "set", json!([EPOCH + 60_000])).await;
        life.call("b", "set", json!([EPOCH + 60_000])).await;
        life.stuck.set(true);
        let lost = async {
            let cancel = life.try_call("a", "delete", json!([]));
            let replace = life.try_call("b", "set", json!([EPOCH + 30_000]));
            let (cancelled, replaced) = tokio::join!(cancel, replace);
            cancelled.unwrap_err();
            replaced.unwrap_err();
        };
        let fail = async {
            life.sleep(10).await;
            let disk = life.disk_fails();
            life.stuck.set(false);
            life.sleep_with_the_disk(100).await;
            disk.set_faults(Vec::new());
        };
        tokio::join!(lost, fail);
        life.sleep(120_000).await;
    });
    assert_eq!(at(&tries), [(0, 60_000), (0, 60_000)]);
}

#[test]
fn a_stampede_is_spread_and_leaves_turns_for_others() {
    const ALARMS: usize = 2000;
    let mut world = World::new();
    world.config.running_max = 8;
    world.live(Crash::Process, async |life| {
        let due = EPOCH + 3_600_000;
        for object in 0..ALARMS {
            // Its handler waits, so it is under way for a while.
            life.call(&object.to_string(), "behave", json!(["wait 20"]))
                .await;
            life.call(&object.to_string(), "set", json!([due])).await;
        }
        let now = life.clock.unix_millis();
        assert!(now < due, "setting them took too long: {now}");
        life.sleep(due - now - 1).await;
        life.sleep_with_the_disk(50).await;
        let asked = Instant::now();
        life.call("somebody else", "get", json!([])).await;
        let waited = asked.elapsed();
        assert!(waited < Duration::from_millis(5), "{waited:?}");
        let standing = life.host.timers().standing(life.clock.unix_millis());
        assert!(
            standing.running <= 8 && standing.pending > ALARMS / 2,
            "{standing:?}"
        );
        life.sleep_with_the_disk(8000).await;
        let standing = life.host.timers().standing(life.clock.unix_millis());
        assert_eq!((standing.pending, standing.running), (0, 0), "{standing:?}");
    });
    let mut objects: Vec<String> = world.tries().into_iter().map(|run| run.object).collect();
    objects.sort();
    objects.dedup();
    assert_eq!(objects.len(), ALARMS);
}

#[test]
fn a_lost_timer_is_found_by_the_scan() {
    let tries = test(async |life| {
        life.call("a", "set", json!([EPOCH + 60_000])).await;
        life.sleep(5000).await;
        life.host.timers().set(life.address("a").id, None);
        life.sleep(120_000).await;
        assert_eq!(life.metric("shard_alarms_found_total"), 1.0);
    });
    let patience = 60_000 + 5000 + 30_000;
    assert!(
        tries.len() == 1 && tries[0].at - EPOCH <= patience + 1000,
        "{tries:?}"
    );
}

#[test]
fn a_node_that_stops_waits_for_handlers() {
    test(async |life| {
        life.call("a", "behave", json!(["wait 7000"])).await;
        life.call("a", "set", json!([EPOCH])).await;
        life.sleep(100).await;
        let begun = Instant::now();
        life.runner.drain().await;
        assert!(
            begun.elapsed() >= Duration::from_millis(6800),
            "{:?}",
            begun.elapsed()
        );
        assert_eq!(life.call("a", "runs", json!([])).await, json!([EPOCH]));
    });
}

impl Life {
    /// From now on nothing can be written to the log.
    fn disk_fails(&self) -> SimDisk {
        let disk = self.disk.clone();
        disk.set_faults(vec![Fault::Stop(0)]);
        disk
    }
}

/// Alarms of a random run, with deaths of the node; `SIM_ALARMS` says how many.
#[test]
fn every_alarm_is_handled_and_its_effect_is_there_once() {
    crate::for_seeds(1, run_alarms);
}

#[expect(clippy::print_stdout, reason = "shown where a run is looked at")]
fn run_alarms(seed: u64) {
    let count: usize = std::env::var("SIM_ALARMS").map_or(3000, |count| count.parse().unwrap());
    let mut random = SmallRng::seed_from_u64(seed);
    let mut world = World::new();
    let objects = 200;
    let mut left = count;
    // What each object was told to do and has not done yet, as far as known.
    let mut waiting: BTreeMap<usize, u64> = BTreeMap::new();
    let mut acknowledged: BTreeMap<usize, Vec<u64>> = BTreeMap::new();
    let mut deaths = 0;
    while left > 0 || !waiting.is_empty() {
        let crash = match random.random_range(0..4) {
            0 => Crash::Process,
            1 => Crash::LoseAll,
            2 => Crash::KeepAll,
            _ => Crash::Torn(random.random()),
        };
        deaths += 1;
        world.live(crash, async |life| {
            let until = life.clock.unix_millis() + random.random_range(10_000..1_800_000);
            while life.clock.unix_millis() < until && (left > 0 || !waiting.is_empty()) {
                let object = random.random_range(0..objects);
                if !waiting.contains_key(&object) && left > 0 {
                    if random.random_ratio(1, 4) {
                        let how = ["", "fail 2", "wait 300", "panic 1"][random.random_range(0..4)];
                        life.call(&object.to_string(), "behave", json!([how])).await;
                    }
                    let at = life.clock.unix_millis() + random.random_range(0..600_000);
                    life.call(&object.to_string(), "set", json!([at])).await;
                    waiting.insert(object, at);
                    acknowledged.entry(object).or_default().push(at);
                    left -= 1;
                } else {
                    life.sleep(random.random_range(0..20_000)).await;
                }
                let now = life.clock.unix_millis();
                for object in waiting.keys().copied().collect::<Vec<_>>() {
                    // Its retries, if it has any, are over.
                    if waiting[&object] + 20_000 < now {
                        let runs = life.call(&object.to_string(), "runs", json!([])).await;
                        if runs == json!(acknowledged[&object]) {
                            waiting.remove(&object);
                        } else {
                            // The node was dead meanwhile, perhaps; but not for long.
                            let late = now - waiting[&object];
                            assert!(
                                late < 120_000,
                                "{object} is stuck: {runs}, {acknowledged:?}"
                            );
                        }
                    }
                }
            }
        });
        world.now += random.random_range(0..30_000);
    }
    world.live(Crash::Process, async |life| {
        life.sleep(60_000).await;
        for (object, wanted) in &acknowledged {
            let runs = life.call(&object.to_string(), "runs", json!([])).await;
            assert_eq!(runs, json!(wanted), "object {object}");
        }
    });
    let tries = world.tries();
    let first = tries.iter().filter(|run| run.retry == 0).count();
    println!(
        "{count} alarms, {deaths} deaths, {} tries, {} begun twice",
        tries.len(),
        first - count
    );
}
