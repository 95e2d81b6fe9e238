//! What goes on behind the turns: checkpoints, catalogs, and the end.

use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use protocol::{LogPosition, ShardId};
use tracing::warn;

use super::{CloseError, Inner, Runner};
use crate::catalog::Note;
use crate::checkpoint::{self, Done, Flush, Job};
use crate::commit_log::State;
use crate::commit_log::record::FileId;
use crate::commit_log::segment::{Header, Segment};

/// Databases written at once.
const BATCH: usize = 512;

/// Notes that are written to the catalogs before their time because they are many, and how many of them
/// are written at once: some milliseconds, in which no turn runs.
const NOTES_MAX: usize = 1024;
const NOTES_AT_ONCE: usize = 1024;

/// Ticks between two writes to the catalogs.
const TICKS_PER_NOTES: u32 = 10;

/// Checkpoints that may fail before an engine that closes gives up.
const TRIES_AT_THE_END: u32 = 4;

/// Ticks between a checkpoint that failed and the next try.
const TICKS_AFTER_FAILURE: u32 = 10;

/// The same after the archive failed.
const TICKS_AFTER_ARCHIVE_FAILURE: u32 = 100;

impl Inner {
    /// The first position of the log that recovery would need.
    pub(super) fn needed(&self) -> LogPosition {
        let core = &self.core;
        let mut dirty = core.dirty.borrow_mut();
        let databases = self.databases.borrow();
        while let Some((position, id)) = dirty.front() {
            let current = databases
                .get(id)
                .is_some_and(|database| database.is_dirty_since(*position));
            if current {
                break;
            }
            dirty.pop_front();
        }
        let in_flight = self.in_flight.borrow();
        let written = in_flight
            .iter()
            .filter_map(|(database, _)| database.first_unflushed.get());
        let durable = core.log.durable();
        let mut written_notes = self.written_notes.borrow_mut();
        written_notes.retain(|(end, _, _)| *end > durable);
        let written_notes = written_notes.iter().map(|(_, _, note)| note.since);
        let noted = core.notes.borrow();
        let noted = noted.values().map(|note| note.since).chain(written_notes);
        let oldest = dirty.front().map(|(position, _)| *position);
        let needed = written.chain(noted).chain(oldest).min();
        let needed = needed.unwrap_or_else(|| core.log.durable());
        self.known_needed.set(needed);
        needed
    }

    /// Everything that may happen to the log and the files since the last call.
    pub(super) fn advance(self: &Rc<Self>) {
        match self.retirer.take_done() {
            Some(Ok(Done::NotArchived)) => {
                self.archive_pause.set(TICKS_AFTER_ARCHIVE_FAILURE);
                self.archive_failures.set(self.archive_failures.get() + 1);
            }
            Some(Err(_)) => self.archive_pause.set(TICKS_AFTER_FAILURE),
            Some(Ok(_)) => self.retire(),
            None => {}
        }
        if let Some(done) = self.checkpointer.take_done() {
            let went_well = done.is_ok();
            self.checkpointed(done.map(drop));
            if went_well {
                self.begin_checkpoint();
            }
        }
        self.submit();
    }

    pub(super) fn tick(self: &Rc<Self>) {
        self.advance();
        let ticks = self.ticks.get() + 1;
        self.ticks.set(ticks);
        if ticks.is_multiple_of(TICKS_PER_NOTES) || self.core.notes.borrow().len() >= NOTES_MAX {
            self.try_write_notes();
        }
        let archive_pause = self.archive_pause.get();
        self.archive_pause.set(archive_pause.saturating_sub(1));
        self.retire();
        match self.pause.get() {
            0 => self.begin_checkpoint(),
            ticks => self.pause.set(ticks - 1),
        }
        self.core.log.release();
    }

    /// Has the first segment taken out of the log, if nobody needs it.
    fn retire(&self) {
        let taken_back = !matches!(self.core.log.state(), State::Failed(_));
        if self.retirer.is_busy() || self.archive_pause.get() > 0 || !taken_back {
            return;
        }
        let needed = self.needed();
        if self.core.log.may_retire(needed) {
            self.retirer.give(Job::Retire(needed, self.core.now()));
        }
    }

    /// Starts a job, if one is due and none is under way.
    pub(super) fn begin_checkpoint(self: &Rc<Self>) {
        let state = self.core.log.state();
        let taken_back = !matches!(state, State::Failed(_));
        if self.checkpointer.is_busy() || self.waiting.borrow().is_some() || !taken_back {
            return;
        }
        // A full disk may be full of this log.
        let full = matches!(&state, State::Reopening(failure) if failure.disk_full);
        let needed = self.needed();
        let log = &self.core.log;
        let pressed = full || log.end().0.saturating_sub(needed.0) > self.config.live_bytes_max / 2;
        let mut batch = Vec::new();
        while batch.len() < BATCH
            && let Some(id) = self.asleep.borrow_mut().pop()
        {
            self.capture(id, false, &mut batch);
        }
        if pressed {
            let oldest: Vec<FileId> = {
                let dirty = self.core.dirty.borrow();
                dirty.iter().take(BATCH).map(|(_, id)| *id).collect()
            };
            if self.notes_hold(needed) {
                self.try_write_notes();
            }
            for id in oldest {
                self.capture(id, true, &mut batch);
            }
        }
        self.flush(batch);
    }

    pub(super) fn notes_hold(&self, needed: LogPosition) -> bool {
        let notes = self.core.notes.borrow();
        notes.values().any(|note| note.since == needed)
    }

    /// Adds a database to a batch, if its file lacks anything.
    pub(super) fn capture(&self, id: FileId, pressed: bool, batch: &mut Vec<Flush>) {
        let databases = self.databases.borrow();
        let Some(database) = databases.get(&id) else {
            return;
        };
        database.asleep.set(false);
        if database.snapshots.get() > 0 && !self.closing.get() {
            if !pressed {
                // When its snapshots are gone it comes back here.
                return;
            }
            // The log must get shorter, or no turn of any object runs.
            database.revoked.set(database.revoked.get() + 1);
        }
        if database.first_unflushed.get().is_none() || database.capturing.replace(true) {
            return;
        }
        let capture = Arc::new(database.overlay.borrow_mut().capture());
        batch.push(Flush {
            path: checkpoint::path(&self.core.shards, database.shard, id),
            capture: Arc::clone(&capture),
        });
        self.in_flight
            .borrow_mut()
            .push((Rc::clone(database), capture));
    }

    pub(super) fn flush(&self, batch: Vec<Flush>) {
        if batch.is_empty() {
            return;
        }
        let in_flight = self.in_flight.borrow();
        let last = in_flight.iter().map(|(database, _)| database.last.get().1);
        let last = last.max().unwrap_or_default();
        drop(in_flight);
        *self.waiting.borrow_mut() = Some((last, batch));
        self.core.log.release();
        self.submit();
    }

    /// Gives a waiting batch to the checkpointer once all of it is durable in the log.
    pub(super) fn submit(&self) {
        let mut waiting = self.waiting.borrow_mut();
        if let Some((needed, batch)) = waiting.take() {
            if self.core.log.durable() >= needed && !self.checkpointer.is_busy() {
                self.checkpointer.give(Job::Flush(batch));
            } else {
                *waiting = Some((needed, batch));
            }
        }
    }

    pub(super) fn checkpointed(&self, done: io::Result<()>) {
        self.checkpoint_failed.set(done.is_err());
        if done.is_err() {
            self.pause.set(TICKS_AFTER_FAILURE);
        }
        let in_flight = self.in_flight.take();
        let mut again = Vec::new();
        for (database, capture) in in_flight {
            database.capturing.set(false);
            if capture.pages == 0 {
                // The file may be gone, whatever became of the rest; one of the same name is another.
                self.core.descriptors.borrow_mut().forget(database.id);
            }
            if done.is_ok() {
                database.overlay.borrow_mut().flushed(&capture);
                database.first_unflushed.set(database.since_capture.take());
            } else {
                // What was committed since is covered by the older position.
                database.since_capture.set(None);
                again.extend(
                    database
                        .first_unflushed
                        .get()
                        .map(|first| (first, database.id)),
                );
            }
            self.release(&database);
        }
        let mut dirty = self.core.dirty.borrow_mut();
        if !again.is_empty() {
            dirty.extend(again);
            dirty.make_contiguous().sort_unstable();
        }
    }

    /// Writes up to `count` notes to the catalogs. What cannot be written stays noted, and with it the
    /// part of the log it came from.
    pub(super) fn write_notes(self: &Rc<Self>, count: usize) -> rusqlite::Result<()> {
        let mut by_catalog: BTreeMap<(FileId, ShardId), Vec<(FileId, Note)>> = BTreeMap::new();
        for (file, note) in self.core.notes.borrow().iter().take(count) {
            // Durable or not: the commit in the catalog comes later in the log than what it tells of.
            let catalog = FileId::catalog(file.home(), note.shard);
            let notes = by_catalog.entry((catalog, note.shard)).or_default();
            notes.push((*file, note.clone()));
        }
        let mut failed = Ok(());
        for ((catalog, shard), notes) in by_catalog {
            let connect = |catalog| self.open(catalog, shard);
            let end = match self.catalogs.write(catalog, &notes, &connect) {
                Ok(end) => end,
                Err(error) => {
                    failed = Err(error);
                    continue;
                }
            };
            let mut all = self.core.notes.borrow_mut();
            let mut written = self.written_notes.borrow_mut();
            for (file, note) in notes {
                all.remove(&file);
                written.push((end, file, note));
            }
        }
        self.catalog_failed.set(failed.is_err());
        failed
    }

    pub(super) fn try_write_notes(self: &Rc<Self>) {
        if self.log_is_open()
            && let Err(error) = self.write_notes(NOTES_AT_ONCE)
        {
            warn!(%error, "the catalog could not be written");
        }
    }

    pub(super) fn log_is_open(&self) -> bool {
        matches!(self.core.log.state(), State::Open)
    }

    pub(super) fn close(self: &Rc<Self>) -> Result<(), CloseError> {
        let settled = self.settle();
        self.stop();
        settled?;
        self.empty_log().map_err(CloseError::Files)
    }

    /// Ends the threads, after what they have begun.
    pub(super) fn stop(&self) {
        self.core.log.close();
        self.checkpointer.close();
        self.retirer.close();
        if let Runner::Threads(threads) = self.runner.replace(Runner::Stopped) {
            for thread in threads {
                // A panic there has aborted the process.
                drop(thread.join());
            }
        }
    }

    /// Writes everything to the catalogs and the files.
    pub(super) fn settle(self: &Rc<Self>) -> Result<(), CloseError> {
        self.closing.set(true);
        self.flush_log()?;
        self.wait_for_checkpointer()?;
        while !self.core.notes.borrow().is_empty() {
            self.write_notes(usize::MAX).map_err(CloseError::Catalog)?;
            self.flush_log()?;
        }
        self.catalogs.close();
        let mut tries = TRIES_AT_THE_END;
        loop {
            self.wait_for_checkpointer()?;
            if self.checkpoint_failed.take() {
                tries -= 1;
                if tries == 0 {
                    let error = io::Error::other("the log keeps what they lack");
                    return Err(CloseError::Files(error));
                }
            }
            let dirty: Vec<FileId> = {
                let databases = self.databases.borrow();
                let dirty = databases
                    .values()
                    .filter(|found| found.first_unflushed.get().is_some());
                dirty.map(|found| found.id).take(BATCH).collect()
            };
            if dirty.is_empty() {
                return Ok(());
            }
            let mut batch = Vec::new();
            for id in dirty {
                self.capture(id, true, &mut batch);
            }
            self.flush(batch);
        }
    }

    /// Begins a segment without records and removes all others: nothing is left to recover.
    pub(super) fn empty_log(&self) -> io::Result<()> {
        let core = &self.core;
        let end = core.log.durable();
        let Some(last) = core.log.last_segment() else {
            return Ok(());
        };
        // Without even a marker in it the last one can stay.
        if last.start != end {
            let header = Header {
                sequence: last.sequence + 1,
                start: end,
                worker: self.worker,
                latest_ms: core.now(),
            };
            Segment::create(&*core.disk, &core.log_directory, header, 0)?;
            core.log.add_segment(header);
        }
        while core.log.first_before(end).is_some() {
            if let Done::NotArchived = self.retirer.retire(end, core.now())? {
                break;
            }
        }
        Ok(())
    }

    pub(super) fn flush_log(&self) -> Result<(), CloseError> {
        if let Runner::Nobody(writer) = &mut *self.runner.borrow_mut() {
            self.core.log.release();
            while writer.step() {}
        }
        self.core.log.flush().map_err(CloseError::Log)
    }

    /// Until no job is under way or waits. A job that is done may begin the next.
    fn wait_for_checkpointer(self: &Rc<Self>) -> Result<(), CloseError> {
        loop {
            self.advance();
            if self.waiting.borrow().is_some() {
                self.flush_log()?;
            } else if !self.checkpointer.is_busy() {
                return Ok(());
            } else {
                self.run_checkpointer();
            }
        }
    }

    /// Waits for the job under way, or does it where nobody else does.
    pub(super) fn run_checkpointer(&self) {
        if matches!(*self.runner.borrow(), Runner::Nobody(_)) {
            self.checkpointer.step();
        }
        self.checkpointer.wait();
    }
}
