//! One object in memory: its mailbox, its instance, and how a stretch of a turn becomes a commit.

pub mod mailbox;

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use protocol::{Bookmark, ErrorCode, ObjectId, Problem};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tracing::warn;

use self::mailbox::Mailbox;
use crate::class::{Class, ClassError, Context, Instance};
use crate::metrics::Metrics;
use crate::storage::StorageError;
use crate::usage::{ClassUsage, Counts};

/// An object in memory. Lives on its worker's thread; the host owns it.
pub(crate) struct Object {
    pub(crate) class: Arc<dyn Class>,
    pub(crate) context: Context,
    pub(crate) mailbox: RefCell<Mailbox>,
    /// Set by the first turn, which runs the constructor.
    instance: RefCell<Option<Rc<dyn Instance>>>,
    /// It was made in the current stretch: if that is undone, so is what the constructor wrote.
    constructed: Cell<bool>,
    /// In the host's run queue.
    pub(crate) queued: Cell<bool>,
    /// Turns that await something, by number, with what stops them.
    pub(crate) flights: RefCell<HashMap<u64, AbortHandle>>,
    pub(crate) last_used: Cell<Instant>,
    /// When the catalog was last told of a use.
    pub(crate) use_told: Cell<Option<Instant>>,
    /// Bytes of memory of its database when that was last looked at, and when.
    pub(crate) memory: Cell<(usize, Option<Instant>)>,
    /// What its class did, all objects together.
    pub(crate) usage: Rc<ClassUsage>,
    pub(crate) woke: Instant,
    /// What it did since the hottest objects were told, and when that was.
    pub(crate) untold: RefCell<(Counts, Instant)>,
    /// Whether it wrote since its keys were counted, and when that was.
    pub(crate) keys_counted: Cell<(bool, Instant)>,
    /// Reset: nothing runs in this copy any more.
    pub(crate) broken: Cell<bool>,
}

/// Why a stretch of a turn came to nothing.
pub(crate) enum Failure {
    /// The turn was rolled back and the object goes on.
    Refused(Problem),
    /// The object must be reset.
    Reset(Problem),
}

impl Object {
    pub(crate) fn new(
        class: Arc<dyn Class>,
        context: Context,
        mailbox: Mailbox,
        usage: Rc<ClassUsage>,
    ) -> Self {
        let now = Instant::now();
        Self {
            class,
            context,
            mailbox: RefCell::new(mailbox),
            instance: RefCell::new(None),
            constructed: Cell::new(false),
            queued: Cell::new(false),
            flights: RefCell::default(),
            last_used: Cell::new(now),
            use_told: Cell::new(None),
            memory: Cell::new((0, None)),
            usage,
            woke: now,
            untold: RefCell::new((Counts::ZERO, now)),
            keys_counted: Cell::new((false, now)),
            broken: Cell::new(false),
        }
    }

    pub(crate) fn id(&self) -> ObjectId {
        self.context.id()
    }

    /// Nothing runs, waits or streams.
    pub(crate) fn is_idle(&self) -> bool {
        self.flights.borrow().is_empty()
            && !self.context.is_held()
            && self.mailbox.borrow().is_empty()
    }

    /// The instance; constructed if this is the first turn.
    pub(crate) fn instance(&self) -> Result<Rc<dyn Instance>, ClassError> {
        if let Some(instance) = self.instance.borrow().as_ref() {
            return Ok(Rc::clone(instance));
        }
        let begun = Instant::now();
        let instance = self.class.construct(self.context.clone());
        self.usage.constructed(begun.elapsed());
        let instance = instance?;
        *self.instance.borrow_mut() = Some(Rc::clone(&instance));
        self.constructed.set(true);
        Ok(instance)
    }

    /// Runs one stretch of a turn: atomic, rolled back alone when it fails or panics. What it wrote
    /// counts when [`commit`](Self::commit) has succeeded.
    pub(crate) fn segment<T>(
        &self,
        metrics: &Metrics,
        f: impl FnOnce() -> Poll<Result<T, ClassError>>,
    ) -> Poll<Result<T, Failure>> {
        let storage = self.context.storage();
        storage.begin_segment();
        self.constructed.set(false);
        let outcome = match catch_unwind(AssertUnwindSafe(f)) {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(Ok(value))) => Poll::Ready(value),
            Ok(Poll::Ready(Err(error))) if error.resets() => {
                return self.undo(Failure::Reset(error.problem()));
            }
            Ok(Poll::Ready(Err(error))) => return self.undo(Failure::Refused(error.problem())),
            Err(panic) => return self.undo(Failure::Reset(panicked(panic.as_ref()))),
        };
        if let Err(error) = storage.check_constraints() {
            return self.undo(Failure::Refused(ClassError::from(error).problem()));
        }
        match storage.end_segment() {
            Ok(true) => metrics.commits.increment(1),
            Ok(false) => {}
            // The instance may remember what its database does not.
            Err(error) => {
                return Poll::Ready(Err(Failure::Reset(ClassError::from(error).problem())));
            }
        }
        outcome.map(Ok)
    }

    /// Commits what the stretches since the last commit wrote. Replies may leave when the log is durable
    /// up to the storage's gate.
    ///
    /// # Errors
    /// None of them counts, and the object must be reset.
    pub(crate) fn commit(&self) -> Result<(), Problem> {
        match self.context.storage().commit() {
            Ok(_) => Ok(()),
            Err(StorageError::RolledBack) => Err(Problem {
                retryable: true,
                ..Problem::new(
                    ErrorCode::ObjectReset,
                    "another request in the same transaction made SQLite roll it back; nothing of this one was kept",
                )
            }),
            Err(error) => Err(ClassError::from(error).problem()),
        }
    }

    fn undo<T>(&self, failure: Failure) -> Poll<Result<T, Failure>> {
        if self.constructed.take() {
            let instance = self.instance.borrow_mut().take();
            drop_class_code(instance);
        }
        Poll::Ready(Err(match (self.context.storage().rollback(), failure) {
            (Ok(()), failure) => failure,
            // SQLite rolled back the turns before this one, too: the error that made it do so is
            // this turn's.
            (
                Err(StorageError::RolledBack),
                Failure::Refused(problem) | Failure::Reset(problem),
            ) => Failure::Reset(problem),
            (Err(error), _) => Failure::Reset(ClassError::from(error).problem()),
        }))
    }

    /// Ends this copy: its turns stop, its database closes. Waiting letters stay in the mailbox. What it is
    /// to be restored to before it starts again, if it has asked for that.
    pub(crate) fn break_up(&self) -> Option<Bookmark> {
        self.broken.set(true);
        for flight in self.flights.borrow().values() {
            flight.abort();
        }
        let instance = self.instance.borrow_mut().take();
        drop_class_code(instance);
        self.context.storage().close()
    }
}

/// Drops what belongs to a class. A panic there has nothing left to break.
pub(crate) fn drop_class_code<T>(value: T) {
    if catch_unwind(AssertUnwindSafe(|| drop(value))).is_err() {
        warn!("class code panicked while it was dropped");
    }
}

fn panicked(panic: &(dyn Any + Send)) -> Problem {
    let message = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    Problem::new(
        ErrorCode::ObjectReset,
        format!("class code panicked: {message}"),
    )
    .from_class()
}
