//! When what an object writes becomes a transaction, and when it is undone.

use std::cell::Cell;

use rusqlite::Statement;

use super::engine::prepare_ours;
use super::{Around, Open, Segment, Storage, StorageError, contains_ignore_case, vfs};

impl Storage {
    /// Runs `f` as one: if it fails, everything it wrote is undone and what was written before it
    /// stays. May be nested (Cloudflare's `transactionSync`).
    pub fn transaction<R, E: From<StorageError>>(
        &self,
        f: impl FnOnce() -> Result<R, E>,
    ) -> Result<R, E> {
        if self.segment.get() == Segment::Clean {
            // Nothing was written before it: to undo `f` is to roll back the whole.
            let result = f();
            if result.is_err() {
                self.rollback()?;
            }
            return result;
        }
        self.savepoint("SAVEPOINT _dormouse_transaction")?;
        let result = f();
        if result.is_err() {
            self.savepoint("ROLLBACK TO _dormouse_transaction")?;
            self.open()?.has_pairs.set(false);
        }
        self.savepoint("RELEASE _dormouse_transaction")?;
        result
    }

    pub(super) fn around(&self, what: Around) -> Result<(), StorageError> {
        let open = self.open()?;
        let _trusted = self.guard.trusted();
        self.check(open.run(what), 0)
    }

    pub(super) fn savepoint(&self, sql: &str) -> Result<(), StorageError> {
        let open = self.open()?;
        let _trusted = self.guard.trusted();
        let run = prepare_ours(&open.connection, sql)
            .and_then(|mut statement| statement.raw_execute().map(drop));
        self.check(run, 0)
    }

    /// Writes that `f` makes do not hold replies back: they may be lost after somebody was told of them
    /// (Cloudflare's `allowUnconfirmed`). If they are, the object is reset all the same.
    pub fn unconfirmed<R>(&self, f: impl FnOnce() -> R) -> R {
        struct Restore<'a>(&'a Cell<bool>, bool);
        impl Drop for Restore<'_> {
            fn drop(&mut self) {
                self.0.set(self.1);
            }
        }
        // Also if `f` panics: a later write must not go unconfirmed.
        let _restore = Restore(&self.unconfirmed, self.unconfirmed.replace(true));
        f()
    }

    /// A stretch of a turn begins: SQL may run for its time again.
    pub fn begin_segment(&self) {
        debug_assert_eq!(self.segment.get(), Segment::Clean, "segments do not nest");
        self.guard.restart_clock();
    }

    /// The stretch is over and went well. What it wrote stays in the transaction, which the next
    /// stretches may share, until [`commit`](Self::commit). `true` if it wrote anything.
    ///
    /// # Errors
    /// The transaction is gone, with what earlier stretches wrote in it.
    pub fn end_segment(&self) -> Result<bool, StorageError> {
        match self.segment.get() {
            Segment::Clean => return Ok(false),
            Segment::Writing => {}
            Segment::Nested => self.around(Around::Release)?,
        }
        self.check_transaction()?;
        self.segment.set(Segment::Clean);
        self.batch.set(true);
        Ok(true)
    }

    /// Whether the stretch leaves every foreign key satisfied. Asked for each turn: turns that share a
    /// transaction must not fail for one another's rows.
    pub fn check_constraints(&self) -> Result<(), StorageError> {
        if self.segment.get() == Segment::Clean {
            return Ok(());
        }
        let open = self.open.borrow();
        let open = open.as_ref().expect("a transaction has a connection");
        if vfs::has_violations(&open.connection) {
            return Err(StorageError::Sql {
                message: "FOREIGN KEY constraint failed".to_owned(),
                at: None,
            });
        }
        Ok(())
    }

    /// Whether the current stretch wrote anything.
    pub(crate) fn has_written(&self) -> bool {
        self.segment.get() != Segment::Clean
    }

    /// Whether the tables may be other than those of an empty database.
    pub(super) fn may_have_tables(&self, open: &Open) -> bool {
        open.handle.is_stored() || self.batch.get() || self.segment.get() != Segment::Clean
    }

    /// Commits what the stretches since the last commit wrote. It is durable when the engine's log is
    /// durable up to [`gate`](Self::gate). `true` if there was anything to commit.
    ///
    /// # Errors
    /// Nothing of it was kept. The object must be reset, because its memory may say otherwise.
    pub fn commit(&self) -> Result<bool, StorageError> {
        if self.batch_lost.take() {
            return Err(StorageError::RolledBack);
        }
        if !self.end_segment()? && !self.batch.get() {
            return Ok(false);
        }
        self.check_transaction()?;
        let alarm = self.tell_alarm();
        let open = self.open.borrow();
        let open = open.as_ref().expect("a transaction has a connection");
        let committed = alarm.and_then(|alarm| {
            let _trusted = self.guard.trusted();
            let committed = open.handle.commit(&|| open.run(Around::Commit));
            self.check(committed, 0).map(|position| (alarm, position))
        });
        match committed {
            Ok((alarm, position)) => {
                self.batch.set(false);
                if let Some(alarm) = alarm {
                    self.alarm_changed.set(false);
                    self.set_timer(&alarm);
                }
                if self.confirm.take()
                    && let Some(position) = position
                {
                    self.gate.set(position);
                }
                Ok(true)
            }
            Err(error) => {
                self.roll_back_all(open)?;
                self.batch_lost.set(false);
                Err(error)
            }
        }
    }

    /// SQLite rolls back by itself when the disk is full, or a statement was interrupted or had no
    /// memory. Then the whole transaction is gone.
    pub(super) fn check_transaction(&self) -> Result<(), StorageError> {
        let open = self.open.borrow();
        let open = open.as_ref().expect("a transaction has a connection");
        if open.connection.is_autocommit() {
            self.roll_back_all(open)?;
            return Err(StorageError::RolledBack);
        }
        Ok(())
    }

    /// The stretch failed: nothing it wrote stays, and what earlier stretches wrote does.
    ///
    /// # Errors
    /// [`StorageError::RolledBack`] if SQLite had rolled back all of it already.
    pub fn rollback(&self) -> Result<(), StorageError> {
        match self.segment.get() {
            Segment::Clean => Ok(()),
            Segment::Writing => {
                let open = self.open.borrow();
                self.roll_back_all(open.as_ref().expect("a transaction has a connection"))
            }
            Segment::Nested => {
                self.check_transaction()?;
                self.savepoint("ROLLBACK TO _dormouse_turn")?;
                self.around(Around::Release)?;
                self.segment.set(Segment::Clean);
                self.open()?.has_pairs.set(false);
                Ok(())
            }
        }
    }

    pub(super) fn roll_back_all(&self, open: &Open) -> Result<(), StorageError> {
        self.segment.set(Segment::Clean);
        if self.batch.take() {
            self.batch_lost.set(true);
        }
        self.confirm.set(false);
        self.alarm_changed.set(false);
        // The identity record may have been part of it.
        open.identified.set(false);
        open.has_pairs.set(false);
        let rolled_back = if open.connection.is_autocommit() {
            Ok(())
        } else {
            let _trusted = self.guard.trusted();
            self.check(open.connection.execute_batch("ROLLBACK"), 0)
        };
        open.handle.rolled_back();
        rolled_back
    }

    pub(super) fn begin_if_writing(
        &self,
        open: &Open,
        statement: &Statement<'_>,
        sql: &str,
    ) -> Result<(), StorageError> {
        // PRAGMA optimize may run ANALYZE inside a statement that SQLite calls read-only.
        if statement.readonly() && !contains_ignore_case(sql, "optimize") {
            return Ok(());
        }
        self.begin(open)
    }

    /// A write is about to happen.
    pub(super) fn begin(&self, open: &Open) -> Result<(), StorageError> {
        if self.forbid_writes.get() {
            return Err(StorageError::Denied(
                "this SQL would write, and was to read only".to_owned(),
            ));
        }
        if self.segment.get() == Segment::Clean {
            if self.batch.get() && open.connection.is_autocommit() {
                // A read of this turn failed so badly that SQLite rolled back what came before it.
                return Err(StorageError::RolledBack);
            }
            self.engine.check_writable()?;
            let (begin, segment) = if self.batch.get() {
                (Around::Savepoint, Segment::Nested)
            } else {
                (Around::Begin, Segment::Writing)
            };
            let trusted = self.guard.trusted();
            self.check(open.run(begin), 0)?;
            self.segment.set(segment);
            if !open.identified.get() {
                self.write_identity(&open.connection)?;
                open.handle.identify(self.named(), true);
                open.identified.set(true);
            }
            drop(trusted);
        } else if open.connection.is_autocommit() {
            // What follows would be committed by itself, without what came before it.
            return Err(StorageError::RolledBack);
        }
        if !self.unconfirmed.get() {
            self.confirm.set(true);
        }
        Ok(())
    }
}
