//! Whole databases: copied while they go on, replaced by others, deleted.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use protocol::{Bookmark, LogPosition, ObjectId, ShardId};

pub use super::database::Large;
use super::database::{Core, Database};
use super::{Inner, Logged};
use crate::alarm::AlarmState;
use crate::checkpoint;
use crate::commit_log::record::{FileId, Named};
use crate::disk::parent;
use crate::history::History;
use crate::storage::vfs::DatabaseFile;
use crate::storage::{Engine, Identity, StorageError};

/// The pages of a database as of one commit. As long as this lives, the database goes on, but nothing of
/// it is written to its file, where the pages may be that this needs.
pub struct Snapshot {
    engine: Weak<Inner>,
    database: Rc<Database>,
    page_bytes: usize,
    pages: u32,
    /// Pages that the file lacks.
    changed: BTreeMap<u32, Arc<[u8]>>,
    file_pages: u32,
    position: LogPosition,
    bookmark: Bookmark,
    revoked: u32,
}

impl Snapshot {
    pub fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    pub fn pages(&self) -> u32 {
        self.pages
    }

    pub fn bytes(&self) -> u64 {
        u64::from(self.pages) * self.page_bytes as u64
    }

    /// It may be shown to others once the log is durable up to here.
    pub fn position(&self) -> LogPosition {
        self.position
    }

    /// It has all commits up to here, and none after it.
    pub fn bookmark(&self) -> Bookmark {
        self.bookmark
    }

    /// The log has lost what it shows.
    pub fn is_lost(&self) -> bool {
        self.database.lost.get()
    }

    /// Adds up to `count` pages to `pages`, from page `first` on, counted from 1. Those that are side by side
    /// in the file are read at once.
    ///
    /// # Errors
    /// The file cannot be read, the log has lost the commit or needs its room, or the engine closes.
    pub fn read(&self, first: u32, count: u32, pages: &mut Vec<u8>) -> io::Result<()> {
        let engine = self.engine.upgrade();
        let engine = engine.filter(|engine| !engine.closing.get());
        let revoked = self.database.revoked.get() != self.revoked;
        if engine.is_none() || revoked || self.database.lost.get() {
            return Err(io::Error::other(
                "it was written to its file, or lost, before it was copied: try again",
            ));
        }
        let end = first.saturating_add(count).min(self.pages + 1);
        let mut number = first;
        while number < end {
            if let Some(changed) = self.changed.get(&number) {
                pages.extend_from_slice(changed);
                number += 1;
                continue;
            }
            let next_changed = self.changed.range(number..end).next();
            let run_end = next_changed.map_or(end, |(next, _)| *next);
            let from = pages.len();
            let bytes = (run_end - number) as usize * self.page_bytes;
            // What the file does not have was never written.
            pages.resize(from + bytes, 0);
            let in_file = (self.file_pages + 1)
                .saturating_sub(number)
                .min(run_end - number);
            if in_file > 0 {
                let at = u64::from(number - 1) * self.page_bytes as u64;
                let run = &mut pages[from..from + in_file as usize * self.page_bytes];
                let Database {
                    id, shard, core, ..
                } = &*self.database;
                core.read_file(*id, *shard, run, at)?;
            }
            number = run_end;
        }
        Ok(())
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        let snapshots = &self.database.snapshots;
        snapshots.set(snapshots.get() - 1);
        if let Some(engine) = self.engine.upgrade() {
            engine.release(&self.database);
        }
    }
}

impl Logged {
    /// The database of an object as of its last commit; `None` if it has none.
    pub fn snapshot(&self, id: ObjectId, shard: ShardId) -> rusqlite::Result<Option<Snapshot>> {
        let database = self.0.open_database(id.into(), shard)?;
        let overlay = database.overlay.borrow();
        let pages = overlay.committed_pages();
        database.snapshots.set(database.snapshots.get() + 1);
        let snapshot = Snapshot {
            engine: Rc::downgrade(&self.0),
            page_bytes: overlay.committed_page_bytes(),
            pages,
            changed: overlay.committed_pages_here().collect(),
            file_pages: overlay.file_pages(),
            position: database.last.get().1,
            // Of what came from its file only a time is known that is no earlier.
            bookmark: database.changed.get().min(self.bookmark()),
            revoked: database.revoked.get(),
            database: Rc::clone(&database),
        };
        drop(overlay);
        Ok((pages > 0).then_some(snapshot))
    }

    /// Whether an object has a database.
    pub fn exists(&self, id: ObjectId, shard: ShardId) -> rusqlite::Result<bool> {
        self.0.exists(id.into(), shard)
    }

    /// An object's database has not changed since then, or no later than a loss of power could hide. `None`
    /// if it has none.
    pub fn changed(&self, id: ObjectId, shard: ShardId) -> rusqlite::Result<Option<Bookmark>> {
        let database = self.0.open_database(id.into(), shard)?;
        let exists = database.overlay.borrow().committed_pages() > 0;
        let changed = database.changed.get();
        self.0.release(&database);
        Ok(exists.then_some(changed))
    }

    /// Bytes of the database of an object; 0 if it has none.
    pub fn bytes(&self, id: ObjectId, shard: ShardId) -> rusqlite::Result<u64> {
        let database = self.0.open_database(id.into(), shard)?;
        let overlay = database.overlay.borrow();
        let bytes = u64::from(overlay.committed_pages()) * overlay.committed_page_bytes() as u64;
        drop(overlay);
        self.0.release(&database);
        Ok(bytes)
    }

    /// The bookmark of now: all that was committed, and nothing that will be.
    pub fn bookmark(&self) -> Bookmark {
        Bookmark {
            unix_millis: self.0.core.now(),
            position: self.0.core.log.end(),
        }
    }

    /// Where an object can be read as it was, from any thread.
    pub fn history(&self, id: ObjectId, shard: ShardId) -> rusqlite::Result<History> {
        let database = self.0.open_database(id.into(), shard)?;
        let exists = database.overlay.borrow().committed_pages() > 0;
        let changed = exists.then(|| database.changed.get());
        self.0.release(&database);
        Ok(History {
            file: id.into(),
            changed,
            archive: self.0.archive.clone(),
            disk: Arc::clone(&self.0.core.disk),
            log_directory: self.0.core.log_directory.clone(),
            worker: self.0.worker,
            durable: self.0.core.log.durable(),
            now: self.bookmark(),
        })
    }

    /// Puts another database, the pages of which are given, in the place of an object's, in one commit; where
    /// that ends. The object must not be open.
    pub fn replace(
        &self,
        object: &Identity,
        page_bytes: usize,
        pages: &[u8],
        alarm: AlarmState,
    ) -> Result<LogPosition, StorageError> {
        self.change(object.id, object.shard, |database| {
            let mut overlay = database.overlay.borrow_mut();
            overlay.replace(page_bytes, pages.chunks_exact(page_bytes));
            drop(overlay);
            tell(database, object, alarm);
            Ok(())
        })
    }

    /// Makes a file the database of an object that has none, whatever its size; where the commit ends that
    /// tells of it. The file must be durable, and on the same file system. `None` if what the object had
    /// before is not removed yet: later it works.
    ///
    /// If the process dies before that commit is durable the object may exist, unknown to the catalog
    /// until it writes.
    pub fn adopt(
        &self,
        object: &Identity,
        file: &Path,
        alarm: AlarmState,
    ) -> Result<Option<LogPosition>, StorageError> {
        self.check_writable()?;
        let (id, shard) = (FileId::from(object.id), object.shard);
        let broken = |message: String| StorageError::Broken {
            object: object.id,
            message,
        };
        if self
            .0
            .exists(id, shard)
            .map_err(|error| broken(error.to_string()))?
        {
            return Err(broken("it exists already".to_owned()));
        }
        if self.0.databases.borrow().contains_key(&id) {
            return Ok(None);
        }
        let Core { disk, shards, .. } = &*self.0.core;
        let path = checkpoint::path(shards, shard, id);
        checkpoint::create_parents(&**disk, &path)
            .and_then(|()| disk.rename(file, &path))
            .and_then(|()| disk.sync_dir(parent(&path)))
            .map_err(|error| broken(error.to_string()))?;
        let end = self.change(object.id, shard, |database| {
            let mut first_page = vec![0; database.overlay.borrow().page_bytes()];
            let unreadable = |_| broken("its first page cannot be read".to_owned());
            database.read(&mut first_page, 0).map_err(unreadable)?;
            database.write(&first_page, 0).map_err(unreadable)?;
            tell(database, object, alarm);
            database.tell_file.set(true);
            Ok(())
        })?;
        // No earlier base counts.
        self.0.core.large.borrow_mut().push_front(Large {
            id,
            shard,
            again: true,
        });
        Ok(Some(end))
    }

    /// Removes all data of an object, its alarm included, in one commit; where that ends. The object must
    /// not be open.
    pub fn delete(&self, id: ObjectId, shard: ShardId) -> Result<LogPosition, StorageError> {
        self.change(id, shard, |database| {
            let mut overlay = database.overlay.borrow_mut();
            if overlay.committed_pages() > 0 {
                overlay.truncate(0);
            }
            Ok(())
        })
    }

    fn change(
        &self,
        id: ObjectId,
        shard: ShardId,
        change: impl FnOnce(&Database) -> Result<(), StorageError>,
    ) -> Result<LogPosition, StorageError> {
        self.check_writable()?;
        let broken = |message: String| StorageError::Broken {
            object: id,
            message,
        };
        let database = self.0.open_database(id.into(), shard);
        let database = database.map_err(|error| broken(error.to_string()))?;
        if database.open.get() {
            return Err(broken("it is open".to_owned()));
        }
        let changed = change(&database);
        if changed.is_ok() {
            database.commit_now();
        }
        let end = database.last.get().1;
        self.0.release(&database);
        changed.map(|()| end)
    }

    /// The next database that is too large to be written to the log whole, and may be due to be copied to the
    /// archive.
    pub fn next_large(&self) -> Option<Large> {
        self.0.core.large.borrow_mut().pop_front()
    }
}

/// The next commit tells whose database it is, and of its alarm.
fn tell(database: &Database, object: &Identity, alarm: AlarmState) {
    *database.named.borrow_mut() = Some(Named {
        class: object.class.clone(),
        name: object.name.clone(),
    });
    database.tell_name.set(true);
    *database.tell_alarm.borrow_mut() = Some(alarm);
}
