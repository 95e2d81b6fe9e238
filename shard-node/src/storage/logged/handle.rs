//! The engine as storage sees it, and its open databases.

use std::rc::{Rc, Weak};
use std::task::Waker;
use std::time::Duration;

use protocol::{Bookmark, LogPosition, ObjectId};
use rusqlite::Connection;
use tracing::warn;

use super::database::Database;
use super::{Inner, Logged};
use crate::alarm::AlarmState;
use crate::catalog::stock;
use crate::commit_log::State;
use crate::commit_log::record::Named;
use crate::storage::{Engine, Handle, Identity, Opened, StorageError};

impl Engine for Logged {
    fn open(&self, object: &Identity) -> rusqlite::Result<Opened> {
        self.0.open(object.id.into(), object.shard)
    }

    fn check_writable(&self) -> Result<(), StorageError> {
        let inner = &*self.0;
        let failure = match inner.core.log.state() {
            State::Failed(failure) | State::Reopening(failure) => failure,
            State::Open if inner.is_stuck() && inner.is_behind(inner.core.log.end()) => {
                return Err(StorageError::DiskFull(
                    "the log is full, and the files cannot be written".to_owned(),
                ));
            }
            State::Open => return Ok(()),
        };
        Err(StorageError::log(&failure))
    }

    fn durable(&self) -> LogPosition {
        self.0.core.log.durable()
    }

    fn wake_at(&self, position: LogPosition, waker: &Waker) {
        self.0.waiters.borrow_mut().push((position, waker.clone()));
    }

    fn release(&self) {
        self.0.core.log.release();
    }

    fn is_full(&self) -> bool {
        let inner = &*self.0;
        let log = inner.core.log.standing();
        // While the log is not open writes are refused; reads must go on.
        log.open && (log.is_full || (inner.is_behind(log.end) && !inner.is_stuck()))
    }

    fn advance(&self) -> Option<(StorageError, Vec<ObjectId>)> {
        self.0.advance();
        let taken_back = self.0.take_back();
        let (durable, failed) = (self.durable(), taken_back.is_some());
        let woken = |(position, _): &mut (LogPosition, Waker)| failed || *position <= durable;
        let woken: Vec<_> = self.0.waiters.borrow_mut().extract_if(.., woken).collect();
        for (_, waker) in woken {
            waker.wake();
        }
        let (failure, objects) = taken_back?;
        Some((StorageError::log(&failure), objects))
    }

    fn used(&self, object: &Identity, precision_ms: u64) {
        match self.0.open_database(object.id.into(), object.shard) {
            Ok(database) => {
                database.used(precision_ms);
                self.0.release(&database);
            }
            Err(error) => warn!(object = %object.id, %error, "a use could not be noted"),
        }
    }

    fn keys(&self, object: &Identity, keys: u32) {
        let (id, shard) = (object.id.into(), object.shard);
        let noted = self.known_keys(id, shard).and_then(|known| {
            if stock::is_news(known, keys) {
                let database = self.0.open_database(id, shard)?;
                database.keys(keys);
                self.0.release(&database);
            }
            Ok(())
        });
        if let Err(error) = noted {
            warn!(object = %object.id, %error, "the number of keys could not be noted");
        }
    }

    fn bookmark(&self) -> Option<Bookmark> {
        self.0.archive.as_ref()?;
        Some(Self::bookmark(self))
    }

    fn restore_window(&self) -> Option<Duration> {
        Some(self.0.archive.as_ref()?.config().window)
    }

    fn delete_empty(&self, object: &Identity) {
        if let Err(error) = self.delete(object.id, object.shard) {
            warn!(object = %object.id, %error, "an empty database could not be removed");
        }
    }

    fn tick(&self) {
        self.0.tick();
    }
}

/// A database that a [`Storage`](super::Storage) has open.
pub(super) struct OpenDatabase {
    pub(super) engine: Weak<Inner>,
    pub(super) database: Rc<Database>,
}

impl Handle for OpenDatabase {
    fn commit(
        &self,
        commit: &dyn Fn() -> rusqlite::Result<()>,
    ) -> rusqlite::Result<Option<LogPosition>> {
        let before = self.database.last.get().1;
        commit()?;
        let after = self.database.last.get().1;
        Ok((after != before).then_some(after))
    }

    fn rolled_back(&self) {
        self.database.rolled_back();
    }

    fn last_commit(&self) -> LogPosition {
        self.database.last.get().1
    }

    fn is_stored(&self) -> bool {
        self.database.overlay.borrow().committed_pages() > 0
    }

    fn identify(&self, named: Named, new: bool) {
        *self.database.named.borrow_mut() = Some(named);
        if new {
            self.database.tell_name.set(true);
        }
    }

    fn tell_alarm(&self, alarm: AlarmState) {
        *self.database.tell_alarm.borrow_mut() = Some(alarm);
    }

    fn close(self: Box<Self>, connection: Connection) {
        if let Err((_, error)) = connection.close() {
            warn!(database = %self.database.id, %error, "closing a database failed");
        }
        if let Some(engine) = self.engine.upgrade() {
            engine.closed(&self.database);
        }
    }
}
