//! What [`Storage`](super::Storage) asks of whoever opens databases and makes commits durable.

use std::task::Waker;
use std::time::Duration;

use protocol::{Bookmark, LogPosition, ObjectId};
use rusqlite::Connection;

use super::{Identity, StorageError, authorizer};
use crate::alarm::AlarmState;
use crate::commit_log::record::Named;

/// Opens databases and makes their commits durable. One per worker, on its thread.
pub trait Engine {
    /// The database of an object; empty if it never wrote.
    fn open(&self, object: &Identity) -> rusqlite::Result<Opened>;

    /// Whether a write that begins now can become durable.
    fn check_writable(&self) -> Result<(), StorageError> {
        Ok(())
    }

    /// All commits that end at or before this position survive a loss of power.
    fn durable(&self) -> LogPosition {
        LogPosition(u64::MAX)
    }

    /// Wakes when the log is durable up to `position`, or failed.
    fn wake_at(&self, _position: LogPosition, waker: &Waker) {
        waker.wake_by_ref();
    }

    /// The worker has nothing else to do at once: what was committed may be written.
    fn release(&self) {}

    /// So much waits for the disk that no turn should begin.
    fn is_full(&self) -> bool {
        false
    }

    /// Something happened to the log or the files. If commits were lost: why, and the objects that must
    /// be reset to what is durable.
    fn advance(&self) -> Option<(StorageError, Vec<ObjectId>)> {
        None
    }

    /// The object was used, whether or not it wrote; uses closer together than `precision_ms` may count
    /// as one.
    fn used(&self, _object: &Identity, _precision_ms: u64) {}

    /// The object has so many keys and rows, counted up to [`KEYS_COUNTED`](super::KEYS_COUNTED).
    fn keys(&self, _object: &Identity, _keys: u32) {}

    /// The bookmark of now: all that was committed, and nothing that will be. `None`: this engine keeps no
    /// past.
    fn bookmark(&self) -> Option<Bookmark> {
        None
    }

    /// How far back objects can be restored; `None`: not at all.
    fn restore_window(&self) -> Option<Duration> {
        None
    }

    /// Nothing is in the database of an object any more, which is closed: it may go.
    fn delete_empty(&self, _object: &Identity) {}

    /// Housekeeping, ten times a second.
    fn tick(&self) {}
}

/// An open database.
pub struct Opened {
    pub connection: Connection,
    pub handle: Box<dyn Handle>,
}

impl Opened {
    pub fn close(self) {
        self.handle.close(self.connection);
    }
}

/// What an engine knows of a database that is open.
pub trait Handle {
    /// Ends the open transaction, with `commit`. The commit is durable when [`Engine::durable`] reaches the
    /// position; `None` if nothing had changed.
    fn commit(
        &self,
        commit: &dyn Fn() -> rusqlite::Result<()>,
    ) -> rusqlite::Result<Option<LogPosition>>;

    /// The transaction was rolled back.
    fn rolled_back(&self) {}

    /// Where the last commit of this database ends.
    fn last_commit(&self) -> LogPosition {
        LogPosition::ZERO
    }

    /// `false` if the database is known to be empty.
    fn is_stored(&self) -> bool {
        true
    }

    /// Whose database it is; if that is `new`, the next commit tells the catalog.
    fn identify(&self, _named: Named, _new: bool) {}

    /// The open transaction changed the alarm to this: the commit that ends it tells the catalog.
    fn tell_alarm(&self, _alarm: AlarmState) {}

    /// The object leaves memory. If it never committed anything, nothing of it may stay.
    fn close(self: Box<Self>, connection: Connection);
}

/// Prepares one of our own statements, or takes it from the cache. Its text must name our prefix, if
/// only in a comment: SQL of classes with that prefix never comes from the cache, so a class that
/// gives the same text cannot get a statement that was authorized for us.
pub(crate) fn prepare_ours<'c>(
    connection: &'c Connection,
    sql: &str,
) -> rusqlite::Result<rusqlite::CachedStatement<'c>> {
    debug_assert!(authorizer::mentions_reserved(sql), "{sql:?}");
    connection.prepare_cached(sql)
}
