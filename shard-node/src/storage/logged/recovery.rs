//! Databases out of the log: when the engine starts, and when the log has lost what was not durable.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::path::Path;
use std::rc::Rc;

use protocol::{Bookmark, LogPosition, ObjectId, ShardId};
use tracing::{error, warn};

use super::Inner;
use super::database::Database;
use crate::alarm::AlarmState;
use crate::catalog::{Note, USED_WITHIN_MILLIS};
use crate::commit_log::record::{Commit, FileId, Named};
use crate::commit_log::replay::{Replayed, replay};
use crate::commit_log::segment::HEADER_BYTES;
use crate::commit_log::{LogFailure, State};
use crate::disk::{self, Access, Disk};
use crate::storage::overlay::Overlay;

/// Databases as the log makes them.
#[derive(Default)]
pub(super) struct Recovery {
    pub(super) databases: BTreeMap<FileId, Recovered>,
    /// Others are not looked at, if given.
    pub(super) only: Option<HashSet<FileId>>,
}

pub(super) struct Recovered {
    pub(super) shard: ShardId,
    pub(super) overlay: Overlay,
    pub(super) first: LogPosition,
    pub(super) last: (LogPosition, LogPosition),
    pub(super) named: Option<Named>,
    pub(super) alarm: Option<AlarmState>,
    /// A commit deleted it; later ones may have made it again.
    pub(super) deleted: bool,
    pub(super) first_ms: u64,
    pub(super) last_ms: u64,
}

impl Recovery {
    pub(super) fn apply(
        &mut self,
        begin: LogPosition,
        end: LogPosition,
        commit: &Commit<'_>,
    ) -> Result<(), String> {
        let head = &commit.head;
        if self
            .only
            .as_ref()
            .is_some_and(|only| !only.contains(&head.file))
        {
            return Ok(());
        }
        let found = self
            .databases
            .entry(head.file)
            .or_insert_with(|| Recovered {
                shard: head.shard,
                overlay: Overlay::before_replay(),
                first: begin,
                last: (LogPosition::ZERO, LogPosition::ZERO),
                named: None,
                alarm: None,
                deleted: false,
                first_ms: head.unix_millis,
                last_ms: 0,
            });
        if found.overlay.committed_pages() == 0 {
            found.first_ms = head.unix_millis;
        }
        if head.pages == 0 {
            found.deleted = true;
            found.named = None;
            found.alarm = None;
        }
        let (before, _) = found.last;
        if head.previous != before && head.previous >= found.first {
            return Err(format!(
                "the commit of {} follows one at {}, but the one before it is at {before}",
                head.file, head.previous
            ));
        }
        found.overlay.replay(commit).map_err(|mismatch| {
            format!(
                "page {} of {} differs from what was committed",
                mismatch.page, head.file
            )
        })?;
        found.last = (begin, end);
        found.last_ms = found.last_ms.max(head.unix_millis);
        if let Some(named) = &commit.named {
            found.named = Some(named.clone());
        }
        if let Some(alarm) = &commit.alarm {
            found.alarm = Some(alarm.clone());
        }
        Ok(())
    }
}

impl Inner {
    /// Takes over what was recovered. The databases are closed and dirty.
    pub(super) fn adopt(&self, recovery: Recovery) {
        let mut databases = self.databases.borrow_mut();
        let mut dirty = self.core.dirty.borrow_mut();
        for (id, mut found) in recovery.databases {
            found.overlay.replayed();
            let bytes =
                u64::from(found.overlay.committed_pages()) * found.overlay.page_bytes() as u64;
            let core = Rc::clone(&self.core);
            let database = Database::new(id, found.shard, core, found.overlay);
            database.last.set(found.last);
            database.first_unflushed.set(Some(found.first));
            database.asleep.set(true);
            database.named.borrow_mut().clone_from(&found.named);
            database.noted.set((bytes, found.last_ms));
            database.changed.set(Bookmark {
                unix_millis: found.last_ms,
                position: found.last.1,
            });
            let latest = self.core.latest_ms.get().max(found.last_ms);
            self.core.latest_ms.set(latest);
            if !id.is_catalog() {
                let note = Note {
                    used_within_ms: USED_WITHIN_MILLIS,
                    shard: found.shard,
                    since: found.first,
                    named: found.named,
                    bytes,
                    first_ms: found.first_ms,
                    used_ms: found.last_ms,
                    alarm: found.alarm,
                    deleted: found.deleted,
                    // An observation, not worth a place in the log: counted again when the object writes.
                    keys: None,
                };
                self.core.notes.borrow_mut().insert(id, note);
            }
            dirty.push_back((found.first, id));
            self.asleep.borrow_mut().push(id);
            databases.insert(id, Rc::new(database));
        }
        dirty.make_contiguous().sort_unstable();
    }

    /// Takes back what a failed log lost: the databases whose last commit is not durable return to their
    /// last durable one. `None` if the log did not fail.
    pub(super) fn take_back(self: &Rc<Self>) -> Option<(LogFailure, Vec<ObjectId>)> {
        let State::Failed(failure) = self.core.log.state() else {
            return None;
        };
        let core = &self.core;
        let durable = core.log.durable();
        error!(durable = %durable, error = %failure.message, "the commit log failed: what was not durable is taken back");
        let lost: HashSet<FileId> = {
            let databases = self.databases.borrow();
            let lost = databases
                .values()
                .filter(|database| database.last.get().1 > durable);
            lost.map(|database| database.id).collect()
        };
        self.catalogs.close();
        // What it retires now may be what is to be replayed.
        while self.checkpointer.is_busy() {
            self.run_checkpointer();
            if let Some(done) = self.checkpointer.take_done() {
                self.checkpointed(done.map(drop));
            }
        }
        if lost.is_empty() {
            core.log.reopen();
            return Some((failure, Vec::new()));
        }
        let mut recovery = Recovery {
            only: Some(lost.clone()),
            ..Recovery::default()
        };
        let replayed = replay(
            &*core.disk,
            &core.log_directory,
            Some(durable),
            |begin, end, commit| recovery.apply(begin, end, commit),
        );
        if let Err(error) = replayed {
            // Tried again with the next tick; until then nothing is acknowledged.
            warn!(%error, "the durable part of the log could not be read");
            return None;
        }
        // A batch that waits has states that will never be durable.
        if self.waiting.take().is_some() {
            self.checkpointed(Err(io::Error::other("the log failed")));
            self.checkpoint_failed.set(false);
        }
        let mut objects = Vec::new();
        for id in &lost {
            if let Some(database) = self.databases.borrow_mut().remove(id) {
                database.lost.set(true);
            }
            core.descriptors.borrow_mut().forget(*id);
            // Its base may be lost, too: the next change writes another.
            core.based.borrow_mut().remove(*id);
            core.notes.borrow_mut().remove(id);
            objects.extend(id.object());
        }
        self.adopt(recovery);
        for (end, id, note) in self.written_notes.take() {
            // Of those whose commits are lost, too, the log has just told all that is true.
            if end > durable && !lost.contains(&id) {
                let mut notes = core.notes.borrow_mut();
                match notes.get_mut(&id) {
                    Some(newer) => newer.merge(note),
                    None => drop(notes.insert(id, note)),
                }
            }
        }
        core.log.reopen();
        Some((failure, objects))
    }
}

/// Makes the names durable that lead to the log.
pub(super) fn sync_names(disk: &dyn Disk, data_dir: &Path, log_directory: &Path) -> io::Result<()> {
    let mut directory = log_directory;
    while directory != data_dir {
        disk.sync_dir(directory)?;
        directory = disk::parent(directory);
    }
    disk.sync_dir(data_dir)
}

/// Makes durable what was read from the end of the log. An earlier process may have died between
/// writing and syncing, or after a sync that failed: then the kernel shows what the disk may not have, and
/// another sync alone would not write it.
pub(super) fn rewrite_end(disk: &dyn Disk, found: &Replayed) -> io::Result<()> {
    let Some(last) = found.segments.last() else {
        return Ok(());
    };
    let bytes = usize::try_from(found.end.0 - last.header.start.0).map_err(io::Error::other)?;
    let mut records = vec![0; bytes + HEADER_BYTES];
    let file = disk.open(&last.path, Access::Write)?;
    file.read_at(&mut records, 0)?;
    file.write_all_at(&records, 0)?;
    file.sync()
}
