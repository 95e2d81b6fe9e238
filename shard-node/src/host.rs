//! The objects of one worker: activated on demand, run one turn at a time, evicted when idle.
//!
//! Everything happens on the worker's thread. [`deliver`](Host::deliver) puts an event into its
//! object's mailbox and the object into the run queue; [`run`](Host::run) takes objects from the
//! queue and applies their events in the order of arrival. A turn that awaits goes on as a task of
//! its own, each of its stretches again one transaction, while the object takes its next event.
//!
//! Invariants: an object is in the table at most once per id; it is in the run queue if its mailbox is not
//! empty and it may start a turn; it leaves the table only when idle, or broken.

mod memory;
mod turn;
mod watch;

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{HashMap, HashSet, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{self, Poll, Waker};
use std::time::Duration;

use futures_util::future::LocalBoxFuture;
use protocol::{Bookmark, ErrorCode, LogPosition, ObjectId, ObjectName, Problem, ShardId};
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;
use tracing::warn;
use xxhash_rust::xxh3::Xxh3DefaultBuilder;

use crate::alarms::{AlarmsConfig, Timers};
use crate::class::{Class, ClassError, Context, Turn};
use crate::clock::Clock;
use crate::config::{MailboxConfig, ObjectsConfig};
use crate::expiry::ExpiryConfig;
use crate::hot::Hot;
use crate::metrics::Metrics;
use crate::object::mailbox::{Answer, Event, Letter, Mailbox, Reply};
use crate::object::{Failure, Object, drop_class_code};
use crate::storage::{Engine, Identity, SqlConfig, Storage, StorageError};
use crate::stub::Switchboard;
use crate::worker::or_abort;

/// Turns of one object before the next object has its turn, and the time after which it has it anyway.
const TURNS_IN_A_ROW: usize = 64;
const TIME_IN_A_ROW: Duration = Duration::from_millis(1);

/// What a host needs to know.
#[derive(Clone)]
pub struct HostConfig {
    pub mailbox: MailboxConfig,
    pub objects: ObjectsConfig,
    pub sql: Arc<SqlConfig>,
    pub alarms: AlarmsConfig,
    pub expiry: Arc<ExpiryConfig>,
}

/// Whom a request is for. The id was checked against the class; the name, if any, leads to the id.
#[derive(Clone)]
pub struct Address {
    pub class: Arc<dyn Class>,
    pub id: ObjectId,
    pub name: Option<ObjectName>,
    pub shard: ShardId,
}

/// The objects of one worker.
pub struct Host {
    config: HostConfig,
    engine: Rc<dyn Engine>,
    clock: Arc<dyn Clock>,
    metrics: Rc<Metrics>,
    timers: Rc<Timers>,
    objects: RefCell<HashMap<ObjectId, Rc<Object>, Xxh3DefaultBuilder>>,
    ready: RefCell<VecDeque<Rc<Object>>>,
    work: Notify,
    /// Every object once, roughly by last use, with the use that was known when it was queued.
    by_use: RefCell<VecDeque<(Instant, Weak<Object>)>>,
    waiting: Cell<usize>,
    flights: Cell<u64>,
    /// Bytes that the databases of all objects take, as far as known.
    memory: Cell<usize>,
    /// The output gate: answers that may depend on what is not durable yet.
    gated: RefCell<VecDeque<Gated>>,
    /// The log has room again.
    room: Notify,
    /// The objects that do most.
    hot: Rc<Hot>,
    ticks: Cell<u32>,
    /// Turns of one batch; kept for its memory.
    batch: RefCell<Vec<Finished>>,
    me: Weak<Self>,
    restorer: OnceCell<Restorer>,
    switchboard: OnceCell<Rc<Switchboard>>,
    /// Objects that are being restored: none of their events runs.
    restoring: RefCell<HashSet<ObjectId>>,
}

/// Restores an object, which has left memory, to a bookmark.
pub type Restorer = Box<dyn Fn(Address, Bookmark) -> LocalBoxFuture<'static, ()>>;

/// An answer, the log position that it waits for, and whom it goes to.
struct Gated {
    position: LogPosition,
    answer: Answer,
    reply: oneshot::Sender<Answer>,
}

/// A turn that ran to its end, and is not committed yet.
struct Finished {
    result: Result<Reply, Failure>,
    reply: oneshot::Sender<Answer>,
}

impl Host {
    pub fn new(
        config: HostConfig,
        engine: Rc<dyn Engine>,
        clock: Arc<dyn Clock>,
        metrics: Rc<Metrics>,
    ) -> Rc<Self> {
        Rc::new_cyclic(|me| Self {
            me: me.clone(),
            restorer: OnceCell::new(),
            switchboard: OnceCell::new(),
            restoring: RefCell::default(),
            timers: Timers::new(Arc::clone(&clock), Rc::clone(&metrics)),
            config,
            engine,
            clock,
            metrics,
            objects: RefCell::default(),
            ready: RefCell::default(),
            work: Notify::new(),
            by_use: RefCell::default(),
            waiting: Cell::new(0),
            flights: Cell::new(0),
            memory: Cell::new(0),
            gated: RefCell::default(),
            room: Notify::new(),
            hot: Rc::default(),
            ticks: Cell::new(0),
            batch: RefCell::default(),
        })
    }

    /// Puts an event into its object's mailbox; the object wakes if it sleeps. The answer comes after
    /// everything it depends on is durable.
    ///
    /// # Errors
    /// `overloaded` when the mailbox, or the memory for awake objects, is full. Nothing ran.
    pub async fn deliver(&self, address: &Address, event: Event) -> Answer {
        self.deliver_by(address, event, None).await
    }

    /// The same; an event that has not begun when `deadline` is over never does.
    pub async fn deliver_by(
        &self,
        address: &Address,
        event: Event,
        deadline: Option<Instant>,
    ) -> Answer {
        let object = self.activate(address)?;
        let (reply, answer) = oneshot::channel();
        let letter = Letter {
            event,
            reply,
            arrived: Instant::now(),
            deadline,
        };
        let pushed = object.mailbox.borrow_mut().push(letter);
        if let Err(problem) = pushed {
            self.metrics.mailbox_refusals.increment(1);
            return Err(problem);
        }
        self.waiting.set(self.waiting.get() + 1);
        object.usage.wait(1);
        self.make_ready(&object);
        drop(object);
        answer.await.unwrap_or_else(|_| {
            Err(Problem::new(
                ErrorCode::ObjectReset,
                "the object was reset while this request was under way",
            ))
        })
    }

    /// Applies events for ever. Objects take turns, and after each share of time connections may read
    /// what arrived and write what was answered.
    pub async fn run(self: Rc<Self>) {
        loop {
            let mut begun = Instant::now();
            loop {
                while let Some(object) = self.next_ready() {
                    while self.engine.is_full() {
                        self.metrics.log_waits.increment(1);
                        self.engine.release();
                        self.room.notified().await;
                    }
                    self.run_object(&object);
                    drop(object);
                    if begun.elapsed() >= TIME_IN_A_ROW {
                        self.engine.release();
                        tokio::task::yield_now().await;
                        begun = Instant::now();
                    }
                }
                // What has arrived meanwhile goes into the same group: a sync costs as much as several turns.
                tokio::task::yield_now().await;
                if self.ready.borrow().is_empty() {
                    break;
                }
            }
            self.engine.release();
            self.work.notified().await;
        }
    }

    /// Lets answers go when what they depend on is durable, for ever. `progress` is the engine's.
    pub async fn follow_log(self: Rc<Self>, progress: Arc<Notify>) {
        loop {
            progress.notified().await;
            self.advance();
        }
    }

    fn advance(self: &Rc<Self>) {
        let lost = self.engine.advance();
        let durable = self.engine.durable();
        loop {
            let mut gated = self.gated.borrow_mut();
            if gated.front().is_none_or(|first| first.position > durable) {
                break;
            }
            let Some(Gated { answer, reply, .. }) = gated.pop_front() else {
                break;
            };
            drop(gated);
            // A closed channel is a caller that hung up; what was committed stays.
            drop(reply.send(answer));
        }
        if let Some((error, objects)) = lost {
            self.take_back(&error, &objects);
        }
        self.room.notify_one();
    }

    /// The log lost commits: whoever waited for them gets an error, and their objects start again from
    /// what is durable.
    fn take_back(self: &Rc<Self>, error: &StorageError, objects: &[ObjectId]) {
        let code = match error {
            StorageError::DiskFull(_) => ErrorCode::StorageFull,
            _ => ErrorCode::ObjectReset,
        };
        let problem = Problem::new(
            code,
            format!(
                "the write could not be made durable, and the object starts again without it: {error}"
            ),
        );
        let durable = self.engine.durable();
        for Gated {
            position,
            answer,
            reply,
        } in self.gated.take()
        {
            let answer = if position <= durable {
                answer
            } else {
                Err(problem.clone())
            };
            drop(reply.send(answer));
        }
        for id in objects {
            // Its alarm may be another now: a look finds out.
            self.timers.set(*id, Some(self.clock.unix_millis()));
            let object = self.objects.borrow().get(id).cloned();
            if let Some(object) = object {
                self.reset(&object);
            }
        }
    }

    fn next_ready(&self) -> Option<Rc<Object>> {
        self.ready.borrow_mut().pop_front()
    }

    /// Once per period: evicts objects that were idle for long enough, answers requests that waited
    /// for too long, and publishes what is not counted event by event.
    pub fn tick(self: &Rc<Self>) {
        self.engine.tick();
        // Also what nobody was told of, such as another try after an error.
        self.advance();
        self.metrics.mailbox_depth.set(self.waiting.get() as f64);
        let now = Instant::now();
        self.watch(now);
        if self.waiting.get() > 0 {
            let objects: Vec<Rc<Object>> = self.objects.borrow().values().cloned().collect();
            for object in objects {
                self.answer_overdue(&object, now);
            }
        }
        self.keep_to_budget(now);
        // Every entry is looked at once at the most, even if nothing leaves.
        let entries = self.by_use.borrow().len();
        for _ in 0..entries {
            match self.by_use.borrow().front() {
                Some((used, _)) if now.duration_since(*used) >= self.config.objects.idle_after => {}
                _ => break,
            }
            self.look_at_oldest(now, false);
        }
    }

    /// When the objects' alarms are due.
    pub fn timers(&self) -> &Rc<Timers> {
        &self.timers
    }

    /// Requests that wait in mailboxes.
    pub fn waiting(&self) -> usize {
        self.waiting.get()
    }

    /// The object leaves memory, unless it is busy.
    pub fn sleep(&self, id: ObjectId) {
        let object = self.objects.borrow().get(&id).cloned();
        if let Some(object) = object.filter(|object| object.is_idle() && !object.queued.get()) {
            self.evict(&object);
        }
    }

    /// The object leaves memory, whatever it does: what is under way is answered `object_reset`, and what
    /// waits goes to a fresh copy, which begins with its next turn.
    pub fn take_out(self: &Rc<Self>, id: ObjectId) {
        let object = self.objects.borrow().get(&id).cloned();
        if let Some(object) = object {
            self.reset(&object);
        }
    }

    pub fn is_awake(&self, id: ObjectId) -> bool {
        self.objects.borrow().contains_key(&id)
    }

    pub fn awake(&self) -> usize {
        self.objects.borrow().len()
    }

    /// Stops everything: turns under way are dropped, databases are closed.
    pub fn shut_down(&self) {
        for (_, object) in self.objects.borrow_mut().drain() {
            self.forget_memory(&object);
            object.break_up();
            object.usage.slept();
        }
        self.by_use.borrow_mut().clear();
        self.ready.borrow_mut().clear();
        self.gated.borrow_mut().clear();
    }

    fn activate(&self, address: &Address) -> Result<Rc<Object>, Problem> {
        if let Some(object) = self.objects.borrow().get(&address.id) {
            return Ok(Rc::clone(object));
        }
        self.make_room()?;
        let object = self.new_object(address, Mailbox::new(&self.config.mailbox));
        self.insert(&object);
        Ok(object)
    }

    fn new_object(&self, address: &Address, mailbox: Mailbox) -> Rc<Object> {
        let class = address.class.name().clone();
        let identity = Identity {
            id: address.id,
            class: class.clone(),
            name: address.name.clone(),
            shard: address.shard,
        };
        let storage = Storage::new(
            identity,
            Rc::clone(&self.engine),
            Arc::clone(&self.config.sql),
        )
        .cache_statements(address.class.statements_cached())
        .with_timers(Rc::clone(&self.timers));
        let clock = Arc::clone(&self.clock);
        let handles_alarms = address.class.handles_alarms();
        let usage = self.metrics.class(&class);
        let switchboard = self.switchboard.get().cloned();
        let context = Context::new(
            address.id,
            class,
            storage,
            clock,
            handles_alarms,
            switchboard,
        );
        let class = Arc::clone(&address.class);
        Rc::new(Object::new(class, context, mailbox, usage))
    }

    fn insert(&self, object: &Rc<Object>) {
        object.usage.woke();
        self.objects
            .borrow_mut()
            .insert(object.id(), Rc::clone(object));
        self.by_use
            .borrow_mut()
            .push_back((object.last_used.get(), Rc::downgrade(object)));
    }

    /// Restores an object that has asked for it. Its events wait meanwhile.
    fn restore(&self, address: Address, at: Bookmark) {
        let Some(restorer) = self.restorer.get() else {
            return;
        };
        let (id, host) = (address.id, self.me.clone());
        if !self.restoring.borrow_mut().insert(id) {
            return;
        }
        let restored = restorer(address, at);
        tokio::task::spawn_local(or_abort(async move {
            restored.await;
            let Some(host) = host.upgrade() else { return };
            host.restoring.borrow_mut().remove(&id);
            let waiting = host.objects.borrow().get(&id).cloned();
            if let Some(object) = waiting {
                host.make_ready(&object);
            }
        }));
    }

    /// Who restores objects that ask for it; until this is given, they wait for another process.
    pub fn set_restorer(&self, restorer: Restorer) {
        // The first one stays.
        drop(self.restorer.set(restorer));
    }

    /// How objects reach others; without one they reach nobody.
    pub fn set_switchboard(&self, switchboard: Switchboard) {
        // The first one stays.
        drop(self.switchboard.set(Rc::new(switchboard)));
    }

    fn make_ready(&self, object: &Rc<Object>) {
        let restoring = self.restoring.borrow();
        if !restoring.is_empty() && restoring.contains(&object.id()) {
            return;
        }
        if !object.queued.replace(true) {
            self.ready.borrow_mut().push_back(Rc::clone(object));
            self.work.notify_one();
        }
    }

    /// Runs the turns that wait for an object, up to its share. They share one transaction, each in a
    /// savepoint of its own, and one commit.
    fn run_object(self: &Rc<Self>, object: &Rc<Object>) {
        object.queued.set(false);
        if object.context.has_failed() {
            self.reset(object);
            return;
        }
        let begun = Instant::now();
        let mut now = begun;
        let mut batch = self.batch.take();
        let mut is_use = false;
        for _ in 0..TURNS_IN_A_ROW {
            if object.broken.get() {
                break;
            }
            if object.flights.borrow().len() >= self.config.mailbox.in_flight_max.get() as usize {
                // A flight that lands makes the object ready again.
                break;
            }
            self.answer_overdue(object, now);
            let operates = object.mailbox.borrow().operates_next();
            if operates && !batch.is_empty() {
                break;
            }
            let Some(letter) = object.mailbox.borrow_mut().pop() else {
                break;
            };
            self.waiting.set(self.waiting.get() - 1);
            object.usage.wait(-1);
            if letter.reply.is_closed() {
                // The caller hung up before anything ran.
                continue;
            }
            is_use |= !operates;
            let waited = now.saturating_duration_since(letter.arrived);
            self.metrics.mailbox_wait.record(waited.as_secs_f64());
            if let Some(finished) = self.start_turn(object, letter) {
                let resets = matches!(finished.result, Err(Failure::Reset(_)));
                batch.push(finished);
                if resets || operates {
                    break;
                }
            }
            now = Instant::now();
            if now.duration_since(begun) >= TIME_IN_A_ROW {
                break;
            }
        }
        self.commit(object, &mut batch);
        self.batch.replace(batch);
        now = Instant::now();
        self.settle(object, begun, now);
        if is_use && !self.config.expiry.classes.is_empty() {
            self.note_use(object, now);
        }
        object.last_used.set(now);
        self.measure(object, now);
        let flights_full =
            object.flights.borrow().len() >= self.config.mailbox.in_flight_max.get() as usize;
        if !object.broken.get() && !object.mailbox.borrow().is_empty() && !flights_full {
            self.make_ready(object);
        }
    }

    /// Commits a batch and answers its turns. If it cannot be committed, none of them counts.
    fn commit(self: &Rc<Self>, object: &Rc<Object>, batch: &mut Vec<Finished>) {
        let committed = object.commit();
        let gate = object.context.storage().gate();
        let mut reset = None;
        for Finished { result, reply } in batch.drain(..) {
            let answer = match (result, &committed) {
                (Err(Failure::Reset(problem)), _) => {
                    reset = Some(problem.clone());
                    Err(problem)
                }
                (_, Err(problem)) => Err(problem.clone()),
                (Err(Failure::Refused(problem)), Ok(())) => Err(problem),
                (Ok(Reply::Response(response)), Ok(())) => {
                    // From here on only the body keeps the object awake.
                    let awake = object.context.stay_awake();
                    Ok(Reply::Response(response.map(|body| body.held(awake))))
                }
                (Ok(value), Ok(())) => Ok(value),
            };
            self.answer(gate, answer, reply);
        }
        if let Some(problem) = reset.or(committed.err()) {
            warn!(object = %object.id(), class = %object.class.name(), reason = problem.detail, "object reset");
            self.reset(object);
        }
    }

    /// Sends an answer, through the output gate.
    fn answer(&self, position: LogPosition, answer: Answer, reply: oneshot::Sender<Answer>) {
        if position <= self.engine.durable() {
            // A closed channel is a caller that hung up; what was committed stays.
            drop(reply.send(answer));
        } else {
            self.gated.borrow_mut().push_back(Gated {
                position,
                answer,
                reply,
            });
        }
    }

    fn answer_overdue(&self, object: &Object, now: Instant) {
        loop {
            let mut mailbox = object.mailbox.borrow_mut();
            let Some((letter, problem)) = mailbox.pop_overdue(now) else {
                return;
            };
            drop(mailbox);
            self.waiting.set(self.waiting.get() - 1);
            object.usage.wait(-1);
            self.metrics.mailbox_refusals.increment(1);
            // A closed channel is a caller that hung up.
            drop(letter.reply.send(Err(problem)));
        }
    }

    /// The first stretch of a turn. If it awaits, a task takes it on.
    fn start_turn(self: &Rc<Self>, object: &Rc<Object>, letter: Letter) -> Option<Finished> {
        let Letter { event, reply, .. } = letter;
        let mut running = None;
        let outcome = object.segment(&self.metrics, || {
            let mut turn = match self.begin(object, event) {
                Ok(Turn::Done(result)) => return Poll::Ready(result),
                Ok(Turn::Running(future)) => future,
                Err(error) => return Poll::Ready(Err(error)),
            };
            // The task polls again and registers its own waker.
            let polled = turn
                .as_mut()
                .poll(&mut task::Context::from_waker(Waker::noop()));
            if polled.is_pending() {
                running = Some(turn);
            }
            polled
        });
        match (outcome, running) {
            (Poll::Ready(result), _) => Some(Finished { result, reply }),
            (Poll::Pending, Some(turn)) => {
                let number = self.flights.get();
                self.flights.set(number + 1);
                let flight = Flight {
                    host: Rc::clone(self),
                    object: Rc::clone(object),
                    number,
                    turn,
                    reply: Some(reply),
                };
                let task = tokio::task::spawn_local(or_abort(flight));
                object
                    .flights
                    .borrow_mut()
                    .insert(number, task.abort_handle());
                None
            }
            (Poll::Pending, None) => unreachable!("only a running turn is pending"),
        }
    }

    /// Replaces the object by a fresh one that starts from its last durable commit and inherits the
    /// requests that had not started.
    fn reset(self: &Rc<Self>, object: &Rc<Object>) {
        if object.broken.get() {
            return;
        }
        self.metrics.resets.increment(1);
        self.forget_memory(object);
        let name = object.context.name().ok().flatten();
        if let Some(at) = object.break_up() {
            self.restore(address_of(object, name.clone()), at);
        }
        self.objects.borrow_mut().remove(&object.id());
        object.usage.slept();
        self.tell(object, Instant::now());
        let mailbox = object.mailbox.replace(Mailbox::new(&self.config.mailbox));
        if mailbox.is_empty() {
            return;
        }
        let fresh = self.new_object(&address_of(object, name), mailbox);
        self.insert(&fresh);
        self.make_ready(&fresh);
    }
}

fn address_of(object: &Object, name: Option<ObjectName>) -> Address {
    Address {
        class: Arc::clone(&object.class),
        id: object.id(),
        name,
        shard: object.context.storage().shard(),
    }
}

/// The rest of a turn that awaits something.
struct Flight {
    host: Rc<Host>,
    object: Rc<Object>,
    number: u64,
    turn: LocalBoxFuture<'static, Result<Reply, ClassError>>,
    reply: Option<oneshot::Sender<Answer>>,
}

impl Future for Flight {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<()> {
        if self.object.broken.get() {
            return Poll::Ready(());
        }
        let Self {
            object, host, turn, ..
        } = &mut *self;
        let begun = Instant::now();
        let outcome = object.segment(&host.metrics, || turn.as_mut().poll(cx));
        let mut finished = Vec::new();
        let pending = outcome.is_pending();
        if let Poll::Ready(result) = outcome
            && let Some(reply) = self.reply.take()
        {
            finished.push(Finished { result, reply });
        }
        self.host.commit(&self.object, &mut finished);
        self.host.settle(&self.object, begun, Instant::now());
        self.host.engine.release();
        if pending {
            Poll::Pending
        } else {
            Poll::Ready(())
        }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let turn = std::mem::replace(&mut self.turn, Box::pin(std::future::pending()));
        drop_class_code(turn);
        self.object.flights.borrow_mut().remove(&self.number);
        self.object.last_used.set(Instant::now());
        if !self.object.broken.get() && !self.object.mailbox.borrow().is_empty() {
            self.host.make_ready(&self.object);
        }
    }
}
