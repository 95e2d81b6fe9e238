//! What a class implements, and all that an object may touch.
//!
//! A [`Class`] makes [`Instance`]s, one per awake object; an instance lives on its worker's thread
//! and never meets another thread. It is rebuilt from storage after sleep, so its fields are a cache.
//!
//! A handler returns a [`Turn`]. What it did before returning, and each stretch between two awaits of
//! a running turn, is one transaction: committed and durable before the answer leaves, or, if the
//! handler fails, undone. While one handler awaits, others of the same object may run, as
//! everywhere Durable Objects exist. Fields are not undone: change storage first, fields after.

mod alarm;
mod body;
mod once;
mod past;

use std::cell::Cell;
use std::future::Future;
use std::ops::RangeInclusive;
use std::rc::Rc;
use std::sync::Arc;

pub(crate) use alarm::AlarmHandler;
pub use body::Body;
use futures_util::future::LocalBoxFuture;
use http::{Request, Response};
use ops::metrics::Registry;
use protocol::{ClassName, ErrorCode, ObjectId, ObjectName, Problem};
pub use serde_json::Value as Json;
use tokio::sync::oneshot;

pub use crate::alarm::AlarmInfo;
use crate::clock::Clock;
use crate::storage::{KvError, STATEMENTS_CACHED, Storage, StorageError};
use crate::stub::{Place, Switchboard};

/// The code of a class of objects. One value per node, shared by all workers.
pub trait Class: Send + Sync + 'static {
    fn name(&self) -> &ClassName;

    /// The methods that [`Instance::call`] answers to, for the refusal of any other.
    fn methods(&self) -> &'static [&'static str];

    /// Prepared statements that each awake object keeps, a few KiB of memory each. More than a class has
    /// different texts of SQL are of no use.
    fn statements_cached(&self) -> usize {
        STATEMENTS_CACHED
    }

    /// Whether only gateways may call it, for themselves: clients are told that there is no such class.
    fn is_internal(&self) -> bool {
        false
    }

    /// Whether [`Instance::alarm`] does something. Without it no alarm can be set.
    fn handles_alarms(&self) -> bool {
        false
    }

    /// Where the class may register metrics of its own, before the node serves.
    fn register(&self, _registry: &Registry) {}

    /// The constructor. Runs as part of the first turn after sleep; if it fails, so does that turn.
    fn construct(&self, context: Context) -> Result<Rc<dyn Instance>, ClassError>;
}

/// The code of one awake object.
pub trait Instance: 'static {
    /// Answers an HTTP request. The path is what follows the object's name.
    fn fetch(self: Rc<Self>, request: Request<Body>) -> Turn<Response<Body>>;

    /// Answers a call of one of [`Class::methods`].
    fn call(self: Rc<Self>, method: &str, args: Args) -> Turn<Json>;

    /// Runs when the alarm is due, at least once: again after an error, and if the node died before the
    /// turn was durable. The alarm is gone with the commit that ends the handler, unless the handler
    /// has set it again; an error leaves it as it was, for another try.
    fn alarm(self: Rc<Self>, _info: AlarmInfo) -> Turn<()> {
        Turn::Done(Err(ClassError::Thrown {
            name: "TypeError".to_owned(),
            message: "the class has no alarm handler".to_owned(),
        }))
    }
}

/// One event applied from start to end, or still running.
pub enum Turn<T> {
    /// Done without awaiting: the whole turn was atomic.
    Done(Result<T, ClassError>),
    Running(LocalBoxFuture<'static, Result<T, ClassError>>),
}

impl<T> Turn<T> {
    pub fn run(future: impl Future<Output = Result<T, ClassError>> + 'static) -> Self {
        Self::Running(Box::pin(future))
    }
}

/// Why a handler gave no answer. Its turn is rolled back.
#[derive(Debug, thiserror::Error)]
pub enum ClassError {
    #[error("{0}")]
    BadRequest(String),
    #[error("{0}")]
    NotFound(String),
    #[error("{detail}")]
    MethodNotAllowed { allow: &'static str, detail: String },
    #[error("{0}")]
    PayloadTooLarge(String),
    /// An exception of class code.
    #[error("{name}: {message}")]
    Thrown { name: String, message: String },
    /// What another object, or the system on the way to it, answered to a call.
    #[error("{}", .0.detail)]
    Called(Problem),
    #[error(transparent)]
    Storage(#[from] StorageError),
}

impl From<KvError> for ClassError {
    fn from(error: KvError) -> Self {
        Self::Storage(error.into())
    }
}

impl ClassError {
    /// Whether the object may not go on: its memory and its database may differ.
    pub fn resets(&self) -> bool {
        matches!(
            self,
            Self::Storage(
                StorageError::OutOfTime(_)
                    | StorageError::OutOfMemory(_)
                    | StorageError::Broken { .. }
                    | StorageError::Restoring
            )
        )
    }

    /// Not the class's doing, and nothing it could mend.
    pub fn is_of_the_platform(&self) -> bool {
        match self {
            Self::Storage(error) => error.is_of_the_platform(),
            Self::Called(problem) => {
                !problem.remote
                    && matches!(
                        problem.code,
                        ErrorCode::Unavailable | ErrorCode::Overloaded | ErrorCode::TimedOut
                    )
            }
            _ => false,
        }
    }

    pub fn problem(&self) -> Problem {
        let detail = self.to_string();
        match self {
            Self::BadRequest(_) => Problem::bad_request(detail),
            Self::NotFound(_) => Problem::not_found(detail),
            Self::MethodNotAllowed { allow, .. } => Problem::method_not_allowed(*allow, detail),
            Self::PayloadTooLarge(_) => Problem::new(ErrorCode::PayloadTooLarge, detail),
            Self::Thrown { .. } => Problem::new(ErrorCode::Internal, detail),
            // Its caller's turn did run.
            Self::Called(called) => Problem {
                retryable: false,
                ..called.clone()
            },
            Self::Storage(error) if error.is_of_the_platform() => {
                return Problem::new(storage_code(error), detail);
            }
            Self::Storage(error) => Problem::new(storage_code(error), detail),
        }
        .from_class()
    }
}

fn storage_code(error: &StorageError) -> ErrorCode {
    match error {
        StorageError::Sql { .. } | StorageError::Denied(_) => ErrorCode::BadRequest,
        StorageError::Kv(KvError::PairTooLarge { .. }) => ErrorCode::PayloadTooLarge,
        StorageError::Kv(
            KvError::EmptyKey | KvError::KeyTooLong(_) | KvError::BatchTooLarge(_),
        ) => ErrorCode::BadRequest,
        StorageError::OutOfTime(_) | StorageError::OutOfMemory(_) => ErrorCode::ObjectReset,
        StorageError::Full(_) | StorageError::DiskFull(_) | StorageError::RolledBack => {
            ErrorCode::StorageFull
        }
        StorageError::Broken { .. } => ErrorCode::Internal,
        StorageError::LogFailed(_) | StorageError::Restoring => ErrorCode::Unavailable,
    }
}

/// All that an object may touch. Cheap to clone.
#[derive(Clone)]
pub struct Context(Rc<Inner>);

struct Inner {
    id: ObjectId,
    class: ClassName,
    storage: Storage,
    clock: Arc<dyn Clock>,
    /// What keeps the object in memory besides its turns.
    holds: Cell<u32>,
    /// A commit outside of any turn failed, so memory and database may differ; or the object wants to
    /// start again.
    failed: Cell<bool>,
    handles_alarms: bool,
    /// The alarm handler is under way.
    alarm_run: Cell<Option<AlarmRun>>,
    /// What runs now is a stretch of that handler.
    in_alarm: Cell<bool>,
    /// The way to other objects.
    switchboard: Option<Rc<Switchboard>>,
    /// Closes when the last call to another object has left.
    last_call: Cell<Option<oneshot::Receiver<()>>>,
}

/// An alarm handler under way.
#[derive(Debug, Clone, Copy)]
struct AlarmRun {
    /// The alarm that it runs for.
    number: i64,
    /// What the handler made of the alarm: written with the commit that ends it.
    set: Option<Option<u64>>,
}

/// Keeps its object in memory until it is dropped.
pub struct Awake(Rc<Inner>);

impl Awake {
    fn storage(&self) -> &Storage {
        &self.0.storage
    }

    /// A commit outside of any turn failed: the object must be reset.
    fn fail(&self) {
        self.0.failed.set(true);
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        self.0.holds.set(self.0.holds.get() - 1);
    }
}

impl Context {
    pub(crate) fn new(
        id: ObjectId,
        class: ClassName,
        storage: Storage,
        clock: Arc<dyn Clock>,
        handles_alarms: bool,
        switchboard: Option<Rc<Switchboard>>,
    ) -> Self {
        Self(Rc::new(Inner {
            id,
            class,
            storage,
            clock,
            holds: Cell::new(0),
            failed: Cell::new(false),
            handles_alarms,
            alarm_run: Cell::new(None),
            in_alarm: Cell::new(false),
            switchboard,
            last_call: Cell::default(),
        }))
    }

    /// Keeps the object awake beyond the turn, for as long as the guard lives: a connection that it
    /// took over, a response that is still produced. Turns and streamed bodies need no guard.
    #[must_use = "the object stays awake only while the guard lives"]
    pub fn stay_awake(&self) -> Awake {
        self.0.holds.set(self.0.holds.get() + 1);
        Awake(Rc::clone(&self.0))
    }

    pub(crate) fn switchboard(&self) -> Option<&Rc<Switchboard>> {
        self.0.switchboard.as_ref()
    }

    /// The next place among the calls that leave the object.
    pub(crate) fn take_place(&self) -> Place {
        let (after, next) = oneshot::channel();
        Place::new(self.0.last_call.replace(Some(next)), after)
    }

    /// Whether the object must be reset before its next turn.
    pub(crate) fn has_failed(&self) -> bool {
        self.0.failed.get()
    }

    pub(crate) fn is_held(&self) -> bool {
        self.0.holds.get() > 0
    }

    pub fn id(&self) -> ObjectId {
        self.0.id
    }

    pub fn class(&self) -> &ClassName {
        &self.0.class
    }

    /// The name this object was called by, now or ever before; `None` for unique ids.
    pub fn name(&self) -> Result<Option<ObjectName>, StorageError> {
        self.0.storage.name()
    }

    /// Deletes all that the object has: tables, pairs and the alarm, in the transaction of this turn
    /// (Cloudflare's `deleteAll`, as of 2026-02-24). If nothing is written after it, the object ceases to exist
    /// with its sleep.
    pub fn delete_all(&self) -> Result<(), ClassError> {
        self.delete_alarm()?;
        self.delete_all_but_alarm()
    }

    /// The same as it was before that date: the alarm stays.
    pub fn delete_all_but_alarm(&self) -> Result<(), ClassError> {
        Ok(self.0.storage.delete_tables()?)
    }

    pub fn storage(&self) -> &Storage {
        &self.0.storage
    }

    /// Counts a call of this object to another one, for metrics and the advisor.
    pub(crate) fn count_object_call(&self, other: ObjectId) {
        self.0.storage.meter().object_called(other);
    }

    /// Milliseconds since 1970.
    pub fn unix_millis(&self) -> u64 {
        self.0.clock.unix_millis()
    }
}

/// The arguments of a call, with refusals that say which one is wrong and what it should be.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Args {
    method: Box<str>,
    values: Vec<Json>,
}

impl Args {
    pub fn new(method: &str, values: Vec<Json>) -> Self {
        Self {
            method: method.into(),
            values,
        }
    }

    pub fn len(&self) -> usize {
        self.values.len()
    }

    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// Refuses a wrong number of arguments; `usage` shows the right ones.
    pub fn expect(&self, count: RangeInclusive<usize>, usage: &str) -> Result<(), ClassError> {
        if count.contains(&self.values.len()) {
            return Ok(());
        }
        Err(ClassError::BadRequest(format!(
            "{} got {} arguments, but it is called as {usage}",
            self.method,
            self.values.len()
        )))
    }

    pub fn get(&self, at: usize) -> Option<&Json> {
        self.values.get(at)
    }

    /// Argument `at`, counted from 0, taken out of the list.
    pub fn take(&mut self, at: usize) -> Json {
        self.values.get_mut(at).map(Json::take).unwrap_or_default()
    }

    pub fn text(&self, at: usize, name: &str) -> Result<&str, ClassError> {
        match self.get(at) {
            Some(Json::String(text)) => Ok(text),
            other => Err(self.wrong(at, name, "a string", other)),
        }
    }

    /// A 64-bit integer, or `None` if the list ends before it.
    pub fn integer(&self, at: usize, name: &str) -> Result<Option<i64>, ClassError> {
        match self.get(at) {
            None => Ok(None),
            Some(value) => value
                .as_i64()
                .map(Some)
                .ok_or_else(|| self.wrong(at, name, "an integer of 64 bits", Some(value))),
        }
    }

    /// The refusal of one argument.
    pub fn wrong(&self, at: usize, name: &str, rule: &str, value: Option<&Json>) -> ClassError {
        let value = match value {
            None => "missing".to_owned(),
            Some(value) => clip(&value.to_string()),
        };
        ClassError::BadRequest(format!(
            "{}: argument {} ({name}) must be {rule}, not {value}",
            self.method,
            at + 1
        ))
    }
}

/// Shortens a value for an error message.
pub(crate) fn clip(text: &str) -> String {
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
