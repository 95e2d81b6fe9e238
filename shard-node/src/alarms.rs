//! The timers of one worker: when which object's alarm is due, and the task that fires them.
//!
//! Invariants: every alarm that is set in a database of this worker has a timer, as long as the worker
//! has read its catalogs; an object's handler is never run twice at once; at most
//! `alarms.running_max` handlers run, so that a stampede leaves turns for everybody else.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashMap};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use protocol::{ClassName, Home, ObjectId, Problem, Ring, ShardId};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tracing::{debug, warn};
use xxhash_rust::xxh3::Xxh3DefaultBuilder;

use crate::classes::Classes;
use crate::clock::Clock;
use crate::host::{Address, Host};
use crate::metrics::Metrics;
use crate::object::mailbox::Event;
use crate::storage::Logged;
use crate::worker::or_abort;

/// `[alarms]`: how alarms run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AlarmsConfig {
    /// Handlers that run at once per worker. Further alarms that are due wait for them.
    pub running_max: u32,
    /// How long one handler may run before that counts as a failure.
    #[serde(with = "humantime_serde")]
    pub run_time_max: Duration,
    /// How often the catalogs are searched for alarms that are due and have no timer. There must be none.
    #[serde(with = "humantime_serde")]
    pub scan_every: Duration,
}

impl Default for AlarmsConfig {
    fn default() -> Self {
        Self {
            running_max: 64,
            run_time_max: Duration::from_secs(15 * 60),
            scan_every: Duration::from_secs(30),
        }
    }
}

impl AlarmsConfig {
    pub fn validate(&self) -> Result<(), String> {
        if self.running_max == 0 {
            return Err(
                "alarms.running_max = 0 must be at least 1, or no alarm would run".to_owned(),
            );
        }
        for (key, time) in [
            ("run_time_max", self.run_time_max),
            ("scan_every", self.scan_every),
        ] {
            if time < Duration::from_millis(100) {
                return Err(format!("alarms.{key} = {time:?} must be at least 100ms"));
            }
        }
        Ok(())
    }
}

/// The longest wait without a look at the clock, which somebody may set.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Pauses after a failure of the platform, which costs the alarm no retry.
const POSTPONE_FIRST: Duration = Duration::from_millis(500);
const POSTPONE_MAX: Duration = Duration::from_secs(30);

/// An alarm that is due for this long and does not run is overdue.
const OVERDUE_AFTER: Duration = Duration::from_secs(5);

/// Overdue alarms are counted up to here: more are as bad.
const OVERDUE_COUNTED: usize = 10_000;

/// When alarms are due. One per worker, on its thread.
pub struct Timers {
    inner: RefCell<Inner>,
    changed: Notify,
    clock: Arc<dyn Clock>,
    metrics: Rc<Metrics>,
}

#[derive(Default)]
struct Inner {
    /// What waits, by time. An object whose handler runs is not here.
    due: BTreeSet<(u64, ObjectId)>,
    objects: HashMap<ObjectId, Timer, Xxh3DefaultBuilder>,
    running: usize,
    /// Those that wait after they were put off.
    postponed: usize,
}

/// The timer of one object.
#[derive(Debug, Clone, Copy, Default)]
struct Timer {
    next_ms: Option<u64>,
    /// Where it stands in the queue: not before those that were due when it came.
    queued_ms: u64,
    running: bool,
    /// How often in a row it was due, and could not run because of the platform.
    postponed: u32,
}

/// Timers at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Standing {
    pub pending: usize,
    pub running: usize,
    /// Due for longer than a moment, or put off, and not running; up to ten thousand of the former.
    pub overdue: usize,
}

impl Timers {
    pub fn new(clock: Arc<dyn Clock>, metrics: Rc<Metrics>) -> Rc<Self> {
        Rc::new(Self {
            inner: RefCell::default(),
            changed: Notify::new(),
            clock,
            metrics,
        })
    }

    /// A class has set an alarm: how far ahead is how often it wants to be woken.
    pub(crate) fn count_ahead(&self, class: &ClassName, next_ms: u64) {
        let ahead = next_ms.saturating_sub(self.clock.unix_millis());
        self.metrics
            .alarm_ahead(class, Duration::from_millis(ahead));
    }

    /// A handler is about to begin, so much later than it was due.
    pub(crate) fn count_begun(&self, next_ms: u64) {
        let late = self.clock.unix_millis().saturating_sub(next_ms);
        let late = Duration::from_millis(late);
        self.metrics.alarm_lateness.record(late.as_secs_f64());
    }

    /// The alarm of an object runs next at this time, or it has none.
    pub fn set(&self, id: ObjectId, next_ms: Option<u64>) {
        let mut inner = self.inner.borrow_mut();
        let timer = inner.objects.entry(id).or_default();
        if timer.running {
            timer.next_ms = next_ms;
            return;
        }
        let before = *timer;
        inner.due.remove(&(before.queued_ms, id));
        inner.postponed -= usize::from(before.postponed > 0);
        match next_ms {
            None => drop(inner.objects.remove(&id)),
            Some(next) => self.queue(&mut inner, id, next, 0),
        }
    }

    /// Puts an object into the queue. One that sets its alarm into the past again and again waits for the
    /// others, too.
    fn queue(&self, inner: &mut Inner, id: ObjectId, next_ms: u64, postponed: u32) {
        let queued_ms = next_ms.max(self.clock.unix_millis());
        let timer = Timer {
            next_ms: Some(next_ms),
            queued_ms,
            running: false,
            postponed,
        };
        inner.objects.insert(id, timer);
        inner.postponed += usize::from(postponed > 0);
        inner.due.insert((queued_ms, id));
        if inner.due.first() == Some(&(queued_ms, id)) {
            self.changed.notify_one();
        }
    }

    /// The same for what a catalog says, which commits may have overtaken. `true` if this was news.
    pub fn set_if_unknown(&self, id: ObjectId, next_ms: u64) -> bool {
        let known = self.inner.borrow().objects.contains_key(&id);
        if !known {
            self.set(id, Some(next_ms));
        }
        !known
    }

    /// The object whose alarm is due for longest; it counts as running from now on.
    fn take_due(&self, now: u64) -> Option<ObjectId> {
        let mut inner = self.inner.borrow_mut();
        let (at, id) = *inner.due.first()?;
        if at > now {
            return None;
        }
        inner.due.pop_first();
        inner.running += 1;
        let timer = inner.objects.entry(id).or_default();
        let postponed = timer.postponed;
        *timer = Timer {
            running: true,
            postponed,
            ..Timer::default()
        };
        inner.postponed -= usize::from(postponed > 0);
        Some(id)
    }

    /// A handler is done, and runs again when it was set meanwhile.
    fn done(&self, id: ObjectId) {
        let mut inner = self.inner.borrow_mut();
        inner.running -= 1;
        let timer = inner.objects.remove(&id).unwrap_or_default();
        if let Some(next) = timer.next_ms {
            self.queue(&mut inner, id, next, 0);
        }
        self.changed.notify_one();
    }

    /// It could not run, because of the platform: it is tried again after a pause, each twice as long as
    /// the one before. Whatever was set meanwhile may not have been committed. The pause.
    fn postpone(&self, id: ObjectId) -> Duration {
        let mut inner = self.inner.borrow_mut();
        inner.running -= 1;
        let timer = inner.objects.remove(&id).unwrap_or_default();
        let pause = POSTPONE_FIRST
            .saturating_mul(2u32.saturating_pow(timer.postponed))
            .min(POSTPONE_MAX);
        let pause_ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
        let again = self.clock.unix_millis().saturating_add(pause_ms);
        let next = timer.next_ms.map_or(again, |next| next.min(again));
        self.queue(&mut inner, id, next, timer.postponed.saturating_add(1));
        self.changed.notify_one();
        pause
    }

    fn first_due(&self) -> Option<u64> {
        self.inner.borrow().due.first().map(|(at, _)| *at)
    }

    fn running(&self) -> usize {
        self.inner.borrow().running
    }

    pub fn standing(&self, now: u64) -> Standing {
        let inner = self.inner.borrow();
        let patience = u64::try_from(OVERDUE_AFTER.as_millis()).unwrap_or(u64::MAX);
        let overdue = inner
            .due
            .iter()
            .take(OVERDUE_COUNTED)
            .take_while(|(at, _)| at.saturating_add(patience) < now);
        Standing {
            pending: inner.due.len(),
            running: inner.running,
            overdue: overdue.count() + inner.postponed,
        }
    }
}

/// One run of an alarm's handler, as host and timers know it.
#[derive(Debug, Default)]
pub struct Firing {
    /// Set when the handler has begun: which alarm it runs for.
    pub(crate) number: Cell<Option<i64>>,
}

/// Fires the alarms of one worker.
pub struct Runner {
    timers: Rc<Timers>,
    host: Rc<Host>,
    classes: Classes,
    ring: Arc<Ring>,
    config: AlarmsConfig,
}

impl Runner {
    pub fn new(
        host: Rc<Host>,
        classes: Classes,
        ring: Arc<Ring>,
        config: AlarmsConfig,
    ) -> Rc<Self> {
        Rc::new(Self {
            timers: Rc::clone(host.timers()),
            host,
            classes,
            ring,
            config,
        })
    }

    fn now(&self) -> u64 {
        self.timers.clock.unix_millis()
    }

    fn metrics(&self) -> &Rc<Metrics> {
        &self.timers.metrics
    }

    /// Fires what is due, for ever.
    pub async fn run(self: Rc<Self>) {
        loop {
            let now = self.now();
            let max = self.config.running_max as usize;
            while self.timers.running() < max
                && let Some(id) = self.timers.take_due(now)
            {
                tokio::task::spawn_local(or_abort(Rc::clone(&self).fire(id)));
            }
            let wait = match self.timers.first_due() {
                Some(due) if self.timers.running() < max => {
                    Duration::from_millis(due.saturating_sub(now)).min(LOOK_EVERY)
                }
                _ => LOOK_EVERY,
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.timers.changed.notified() => {}
            }
        }
    }

    async fn fire(self: Rc<Self>, id: ObjectId) {
        match self.try_fire(id).await {
            Ok(()) => self.timers.done(id),
            Err(problem) => {
                let pause = self.timers.postpone(id);
                debug!(object = %id, error = problem.detail, ?pause, "alarm put off");
                self.metrics().alarms_postponed.increment(1);
            }
        }
    }

    /// An error is the platform's: the alarm is as it was.
    async fn try_fire(&self, id: ObjectId) -> Result<(), Problem> {
        let address = self.address(id)?;
        let firing = Rc::new(Firing::default());
        let event = Event::Alarm(Rc::clone(&firing));
        let Err(problem) = self.host.deliver(&address, event).await else {
            return Ok(());
        };
        if !problem.remote {
            return Err(problem);
        }
        // The class failed. A failure before the handler began, such as that of the constructor, counts, too.
        let now = self.now();
        let class = address.class.name().clone();
        let metrics = Rc::clone(self.metrics());
        let record: Event = Event::Operate(Box::new(move |context| {
            let alarm = context.storage().alarm()?;
            if firing
                .number
                .get()
                .is_some_and(|number| number != alarm.number)
            {
                // Replaced meanwhile: the new one has its own tries.
                return Ok(().into());
            }
            let after = alarm.state.after_failure(now, &problem.detail);
            let outcome = match after.pending {
                Some(_) => "failed",
                None => "dead",
            };
            metrics.alarm(&class, outcome);
            warn!(object = %context.id(), class = %class, error = problem.detail, outcome, "alarm handler failed");
            context.storage().write_alarm(&after, true)?;
            Ok(().into())
        }));
        self.host.deliver(&address, record).await.map(drop)
    }

    fn address(&self, id: ObjectId) -> Result<Address, Problem> {
        let class = self.classes.of(id).ok_or_else(|| {
            Problem::unavailable(format!(
                "the class of object {id} is not one of this node's, which are {}",
                self.classes.names()
            ))
        })?;
        Ok(Address {
            class: Arc::clone(class),
            id,
            name: None,
            shard: self.ring.shard_of(id),
        })
    }

    /// Reads from the catalogs, once, which alarms are set; then searches them for ever for alarms that
    /// are due and have no timer.
    pub async fn watch(self: Rc<Self>, engine: Logged, catalogs: Vec<(Home, ShardId)>) {
        let mut first = true;
        loop {
            self.compare(engine.noted_alarms(), first);
            for (home, shard) in &catalogs {
                // At first all of them; then those that should have run.
                let before = if first { u64::MAX } else { self.now() };
                match engine.alarms(*home, *shard, before) {
                    Ok(found) => self.compare(found, first),
                    Err(error) => {
                        warn!(%shard, %error, "the alarms of a shard could not be read; tried again");
                    }
                }
                // A look takes a tenth of a millisecond; others have their turn in between.
                tokio::task::yield_now().await;
            }
            if std::mem::take(&mut first) {
                debug!(alarms = self.timers.standing(0).pending, "alarms are set");
            }
            tokio::time::sleep(self.config.scan_every).await;
        }
    }

    fn compare(&self, found: Vec<(ObjectId, u64)>, first: bool) {
        let patience = u64::try_from(OVERDUE_AFTER.as_millis()).unwrap_or(u64::MAX);
        let now = self.now();
        for (id, at) in found {
            let late = at.saturating_add(patience) < now;
            let news = (first || late) && self.timers.set_if_unknown(id, at);
            if news && !first {
                self.metrics().alarms_found.increment(1);
                warn!(object = %id, "an alarm had no timer");
            }
        }
    }

    /// Until no handler runs.
    pub async fn drain(&self) {
        while self.timers.running() > 0 {
            self.timers.changed.notified().await;
        }
    }
}
