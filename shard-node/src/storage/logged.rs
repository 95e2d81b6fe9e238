//! The engine: databases on pages in memory that the commit log protects.
//!
//! One [`Logged`] per worker, on its thread. A [`Database`] is what SQLite sees of one object, through
//! the [VFS](super::vfs): it reads from the [overlay](super::overlay) or the object's file, and a commit
//! becomes one record of the [commit log](crate::commit_log). What the files lack is kept here, for
//! objects that sleep too, until a [checkpoint](crate::checkpoint) has written it.
//!
//! Invariants: a database is in the table while it is open or its file lacks anything; there is one of
//! each id. `dirty` holds, oldest first, where each database's first commit since its last flush is in
//! the log, and the log is kept from the first of them on.

mod database;
mod handle;
mod recovery;
mod upkeep;
mod whole;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Waker;
use std::thread::JoinHandle;

use metrics::Histogram;
use protocol::{Bookmark, Home, LogPosition, ObjectId, ShardId};
use rusqlite::Connection;
use tokio::sync::Notify;
use tracing::info;
use xxhash_rust::xxh3::Xxh3DefaultBuilder;

use super::overlay::Capture;
use super::vfs::{self, DatabaseFile};
use super::{LogConfig, Opened};
use crate::archive::Archive;
use crate::catalog::{Catalogs, ClassStock, Note, Query, Row};
use crate::checkpoint::{Checkpointer, Flush};
use crate::clock::Clock;
use crate::commit_log::record::FileId;
use crate::commit_log::replay::{ReplayError, Replayed, replay};
use crate::commit_log::{Log, LogFailure, Stats, Writer};
use crate::disk::{Disk, create_dirs};
use crate::worker::abort_on_panic;
use database::{Core, Database};
use handle::OpenDatabase;
use recovery::{Recovery, rewrite_end, sync_names};
pub use whole::{Large, Snapshot};

/// Bytes of a page of a new database. Measured (`cargo bench --bench pages`): against 4096, an awake object
/// takes 33 KiB less and a small commit a fifth less time; a scan takes 40 % more.
pub const PAGE_BYTES: u32 = 1024;

/// How much later than its file says a database may have changed: a loss of power may forget the time of a
/// write that was synced.
const MODIFIED_SLACK_MS: u64 = 60_000;

/// What an engine is made of.
pub struct Setup {
    pub disk: Arc<dyn Disk>,
    pub data_dir: PathBuf,
    pub worker: u16,
    pub log: LogConfig,
    /// Bytes of a page of a new database: a power of two from 512 to 65536.
    pub page_bytes: u32,
    /// Most bytes that one transaction may write.
    pub transaction_bytes_max: u64,
    pub clock: Arc<dyn Clock>,
    /// Gets the seconds of every write and sync of the log.
    pub sync_time: Histogram,
    /// Gets what leaves the log.
    pub archive: Option<Archive>,
}

/// Why an engine did not start.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("prepare {path}")]
    Directory { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Replay(#[from] ReplayError),
    #[error("start a thread for the log")]
    Thread(#[source] io::Error),
    /// The log has data of objects that belong to another worker now.
    #[error("write what the log has to the objects' files")]
    Settle(#[source] CloseError),
}

/// The engine of one worker.
#[derive(Clone)]
pub struct Logged(Rc<Inner>);

struct Inner {
    core: Rc<Core>,
    databases: RefCell<HashMap<FileId, Rc<Database>, Xxh3DefaultBuilder>>,
    catalogs: Catalogs,
    checkpointer: Checkpointer,
    /// Takes segments out of the log: an archive may be slow, and files must be written meanwhile.
    retirer: Checkpointer,
    /// The databases that are being written, while their job is under way.
    in_flight: RefCell<Vec<(Rc<Database>, Arc<Capture>)>>,
    /// A batch that waits until what it has is durable.
    waiting: RefCell<Option<(LogPosition, Vec<Flush>)>>,
    /// Databases that are dirty and closed: written soon, so that they leave memory.
    asleep: RefCell<Vec<FileId>>,
    /// Notes whose commit in the catalog ends there: if the log loses it, they are notes again.
    written_notes: RefCell<Vec<(LogPosition, FileId, Note)>>,
    /// What waits for the log.
    waiters: RefCell<Vec<(LogPosition, Waker)>>,
    ticks: Cell<u32>,
    checkpoint_failed: Cell<bool>,
    catalog_failed: Cell<bool>,
    /// Where recovery would have begun when that was last looked at.
    known_needed: Cell<LogPosition>,
    /// Everything is written to the files, for the last time.
    closing: Cell<bool>,
    /// Which of the two [`step`](Logged::step) takes first.
    writer_first: Cell<bool>,
    /// Ticks before the next try, after a checkpoint failed.
    pause: Cell<u32>,
    /// The same, after the archive did.
    archive_pause: Cell<u32>,
    archive_failures: Cell<u64>,
    archive: Option<Archive>,
    runner: RefCell<Runner>,
    worker: u16,
    config: LogConfig,
}

/// Who does the work of the writer and the checkpointer.
enum Runner {
    Threads(Vec<JoinHandle<()>>),
    /// Whoever calls [`Logged::step`], for tests.
    Nobody(Box<Writer>),
    Stopped,
}

impl Logged {
    /// Recovers what the log of `worker` has, and starts its threads. Reads no object's file: what they
    /// lack is in memory afterwards, and is written in the background.
    ///
    /// `progress` is notified when more is durable, or anything else calls for
    /// [`advance`](super::Engine::advance).
    ///
    /// # Errors
    /// The log is damaged, from another version, or cannot be read. Nothing was changed.
    pub fn open(setup: Setup, progress: Arc<Notify>) -> Result<Self, OpenError> {
        let engine = Self::open_idle(setup, progress)?;
        engine.start().map_err(OpenError::Thread)?;
        Ok(engine)
    }

    /// The same without threads: [`step`](Self::step) does their work.
    pub fn open_idle(setup: Setup, progress: Arc<Notify>) -> Result<Self, OpenError> {
        let directory = log_directory(&setup.data_dir, setup.worker);
        let prepared = |source| OpenError::Directory {
            path: directory.clone(),
            source,
        };
        // The data directory is there: log, worker and `workers` may be missing.
        create_dirs(&*setup.disk, &directory, 2).map_err(prepared)?;
        sync_names(&*setup.disk, &setup.data_dir, &directory).map_err(prepared)?;
        let disk = Arc::clone(&setup.disk);
        let (engine, found) = Self::recover(setup, progress)?;
        rewrite_end(&*disk, &found).map_err(prepared)?;
        Ok(engine)
    }

    /// The same for looking only: nothing on the disk changes, and nothing may be written.
    pub fn open_read_only(setup: Setup) -> Result<Self, OpenError> {
        let (engine, _) = Self::recover(setup, Arc::default())?;
        engine.0.stop();
        Ok(engine)
    }

    fn recover(setup: Setup, progress: Arc<Notify>) -> Result<(Self, Replayed), OpenError> {
        let Setup {
            disk,
            data_dir,
            worker,
            log: config,
            page_bytes,
            transaction_bytes_max,
            clock,
            sync_time,
            archive,
        } = setup;
        let log_directory = log_directory(&data_dir, worker);
        let mut recovery = Recovery::default();
        let mut latest_ms = clock.unix_millis();
        let found = replay(&*disk, &log_directory, None, |begin, end, commit| {
            latest_ms = latest_ms.max(commit.head.unix_millis);
            recovery.apply(begin, end, commit)
        })?;
        let headers = found
            .segments
            .iter()
            .map(|segment| segment.header.latest_ms);
        latest_ms = headers.fold(latest_ms, u64::max);
        if found.torn_bytes > 0 {
            info!(worker, bytes = found.torn_bytes, end = %found.end, "the log ended in the middle of a write");
        }
        let segments = found.segments.iter().map(|found| found.header).collect();
        let log = Log::new(found.end, segments, Arc::clone(&progress));
        let writer = Writer::new(
            log.clone(),
            Arc::clone(&disk),
            log_directory.clone(),
            worker,
            config.segment_bytes,
            found.next_sequence,
            sync_time,
        );
        let checkpointer = || {
            Checkpointer::new(
                Arc::clone(&disk),
                log.clone(),
                log_directory.clone(),
                Arc::clone(&progress),
                archive.clone(),
                worker,
            )
        };
        let (checkpointer, retirer) = (checkpointer(), checkpointer());
        let core = Rc::new(Core {
            disk,
            shards: data_dir.join("shards"),
            log_directory,
            log,
            latest_ms: Cell::new(latest_ms),
            clock,
            base_bytes_max: archive
                .as_ref()
                .map_or(0, |archive| archive.config().base_bytes_max),
            based: RefCell::default(),
            large: RefCell::default(),
            page_bytes,
            transaction_bytes_max,
            dirty: RefCell::default(),
            notes: RefCell::default(),
            descriptors: RefCell::default(),
        });
        let inner = Inner {
            core,
            databases: RefCell::default(),
            catalogs: Catalogs::default(),
            checkpointer,
            retirer,
            in_flight: RefCell::default(),
            waiting: RefCell::default(),
            asleep: RefCell::default(),
            written_notes: RefCell::default(),
            waiters: RefCell::default(),
            ticks: Cell::new(0),
            checkpoint_failed: Cell::new(false),
            catalog_failed: Cell::new(false),
            known_needed: Cell::new(found.end),
            writer_first: Cell::new(false),
            closing: Cell::new(false),
            pause: Cell::new(0),
            archive_pause: Cell::new(0),
            archive_failures: Cell::new(0),
            archive,
            runner: RefCell::new(Runner::Nobody(Box::new(writer))),
            worker,
            config,
        };
        let recovered = recovery.databases.len();
        if recovered > 0 {
            info!(worker, databases = recovered, end = %found.end, "recovered from the log");
        }
        inner.adopt(recovery);
        Ok((Self(Rc::new(inner)), found))
    }

    fn start(&self) -> io::Result<()> {
        let mut runner = self.0.runner.borrow_mut();
        let Runner::Nobody(writer) = std::mem::replace(&mut *runner, Runner::Stopped) else {
            unreachable!("an engine is started once");
        };
        let checkpointer = self.0.checkpointer.clone();
        let worker = self.0.worker;
        let writing = std::thread::Builder::new()
            .name(format!("log-{worker}"))
            .spawn(move || abort_on_panic(|| writer.run()))?;
        let checkpointing = std::thread::Builder::new()
            .name(format!("checkpoint-{worker}"))
            .spawn(move || abort_on_panic(|| checkpointer.run()))?;
        let retirer = self.0.retirer.clone();
        let retiring = std::thread::Builder::new()
            .name(format!("archive-{worker}"))
            .spawn(move || abort_on_panic(|| retirer.run()))?;
        *runner = Runner::Threads(vec![writing, checkpointing, retiring]);
        Ok(())
    }

    /// Does one thing that waits for the log's or the checkpointer's thread, where nobody runs them.
    /// `false` if there was none, or it failed.
    pub fn step(&self) -> bool {
        // Now one first, now the other: neither may rely on the order.
        let writer_first = self.0.writer_first.get();
        self.0.writer_first.set(!writer_first);
        let write = || match &mut *self.0.runner.borrow_mut() {
            Runner::Nobody(writer) => writer.step(),
            Runner::Threads(_) | Runner::Stopped => false,
        };
        let checkpoint = || {
            let (first, second) = (&self.0.checkpointer, &self.0.retirer);
            first.step() || second.step()
        };
        (writer_first && write()) || checkpoint() || (!writer_first && write())
    }

    /// The databases that are open or have anything in the log that their files lack.
    pub fn databases(&self) -> Vec<(FileId, ShardId)> {
        let databases = self.0.databases.borrow();
        databases
            .values()
            .map(|found| (found.id, found.shard))
            .collect()
    }

    /// Those of them that were deleted, and may still have a file.
    pub(crate) fn deleted(&self) -> Vec<FileId> {
        let databases = self.0.databases.borrow();
        let deleted = databases
            .values()
            .filter(|found| found.overlay.borrow().committed_pages() == 0);
        deleted.map(|found| found.id).collect()
    }

    /// Rows of a shard's catalog in the order of ids, after `after`; at most `limit`.
    pub fn list(
        &self,
        home: Home,
        shard: ShardId,
        after: Option<FileId>,
        limit: u32,
    ) -> rusqlite::Result<Vec<Row>> {
        let catalog = FileId::catalog(home, shard);
        if !self.0.exists(catalog, shard)? {
            return Ok(Vec::new());
        }
        let connect = |catalog| self.0.open(catalog, shard);
        self.0.catalogs.list(catalog, after, limit, &connect)
    }

    /// What the log has for the catalog, and the catalog does not have yet: ids, sizes, classes and names.
    pub(crate) fn notes(&self) -> Vec<(FileId, Note)> {
        let notes = self.0.core.notes.borrow();
        notes.iter().map(|(id, note)| (*id, note.clone())).collect()
    }

    /// Objects of a shard in the order that the query asks for, as the catalog knows them.
    pub fn search(&self, home: Home, shard: ShardId, query: &Query) -> rusqlite::Result<Vec<Row>> {
        let catalog = FileId::catalog(home, shard);
        if !self.0.exists(catalog, shard)? {
            return Ok(Vec::new());
        }
        let connect = |catalog| self.0.open(catalog, shard);
        self.0.catalogs.search(catalog, query, &connect)
    }

    /// One object, as the catalog knows it.
    pub fn find(&self, id: ObjectId, shard: ShardId) -> rusqlite::Result<Option<Row>> {
        let connect = |catalog| self.0.open(catalog, shard);
        let catalog = FileId::catalog(id.home(), shard);
        self.0.catalogs.find(catalog, id.into(), &connect)
    }

    /// When the alarms of a shard's objects run next that are due before a time, in any order: what the
    /// catalog knows, but for those of [`noted_alarms`](Self::noted_alarms).
    pub fn alarms(
        &self,
        home: Home,
        shard: ShardId,
        before: u64,
    ) -> rusqlite::Result<Vec<(ObjectId, u64)>> {
        let catalog = FileId::catalog(home, shard);
        if !self.0.exists(catalog, shard)? {
            return Ok(Vec::new());
        }
        let connect = |catalog| self.0.open(catalog, shard);
        let found = self.0.catalogs.alarms(catalog, before, &connect)?;
        let notes = self.0.core.notes.borrow();
        let newer = |id: &FileId| {
            let note = notes.get(id);
            note.is_some_and(|note| note.alarm.is_some() || note.deleted)
        };
        let found = found.into_iter().filter(|(id, _)| !newer(id));
        Ok(found
            .filter_map(|(id, at)| Some((id.object()?, at)))
            .collect())
    }

    /// The alarms of which the catalogs do not know yet.
    pub fn noted_alarms(&self) -> Vec<(ObjectId, u64)> {
        let notes = self.0.core.notes.borrow();
        let set = notes.iter().filter_map(|(id, note)| {
            let pending = note.alarm.as_ref()?.pending?;
            Some((id.object()?, pending.next_ms))
        });
        set.collect()
    }

    /// How many objects a shard has.
    pub fn count(&self, home: Home, shard: ShardId) -> rusqlite::Result<u64> {
        let connect = |catalog| self.0.open(catalog, shard);
        self.0
            .catalogs
            .count(FileId::catalog(home, shard), &connect)
    }

    /// How often a shard's catalog was written since the start.
    pub(crate) fn times_written(&self, home: Home, shard: ShardId) -> u64 {
        self.0.catalogs.times_written(FileId::catalog(home, shard))
    }

    /// What a shard has of each class.
    pub(crate) fn stock(
        &self,
        home: Home,
        shard: ShardId,
    ) -> rusqlite::Result<Vec<(String, ClassStock)>> {
        let catalog = FileId::catalog(home, shard);
        if !self.0.exists(catalog, shard)? {
            return Ok(Vec::new());
        }
        let connect = |catalog| self.0.open(catalog, shard);
        self.0.catalogs.stock(catalog, &connect)
    }

    /// The objects of a shard with the most keys and rows.
    pub(crate) fn most_keys(
        &self,
        home: Home,
        shard: ShardId,
        limit: u32,
    ) -> rusqlite::Result<Vec<(ObjectId, u32)>> {
        let catalog = FileId::catalog(home, shard);
        if !self.0.exists(catalog, shard)? {
            return Ok(Vec::new());
        }
        let connect = |catalog| self.0.open(catalog, shard);
        let found = self.0.catalogs.most_keys(catalog, limit, &connect)?;
        let objects = found.into_iter();
        Ok(objects
            .filter_map(|(id, keys)| Some((id.object()?, keys)))
            .collect())
    }

    /// Keys and rows of an object as its catalog, or a note for it, says.
    fn known_keys(&self, id: FileId, shard: ShardId) -> rusqlite::Result<u32> {
        let noted = self
            .0
            .core
            .notes
            .borrow()
            .get(&id)
            .and_then(|note| note.keys);
        if let Some(keys) = noted {
            return Ok(keys);
        }
        let catalog = FileId::catalog(id.home(), shard);
        if !self.0.exists(catalog, shard)? {
            return Ok(0);
        }
        let connect = |catalog| self.0.open(catalog, shard);
        self.0.catalogs.keys(catalog, id, &connect)
    }

    /// Writes to the catalogs what they do not have yet.
    pub fn write_notes(&self) -> rusqlite::Result<()> {
        self.0.write_notes(usize::MAX)
    }

    /// Writes some of them; `false` when there are no more, or they cannot be written now.
    pub(crate) fn write_some_notes(&self) -> bool {
        self.0.try_write_notes();
        let left = !self.0.core.notes.borrow().is_empty();
        left && !self.0.catalog_failed.get() && self.0.log_is_open()
    }

    /// Where the last commit ends.
    pub fn end(&self) -> LogPosition {
        self.0.core.log.end()
    }

    /// What the log counted.
    pub fn stats(&self) -> &Stats {
        self.0.core.log.stats()
    }

    /// How often a segment could not be put into the archive.
    pub fn archive_failures(&self) -> u64 {
        self.0.archive_failures.get()
    }

    /// Bytes of the log that recovery would read.
    pub fn live_bytes(&self) -> u64 {
        self.0.core.log.live_bytes()
    }

    /// Opens a database by its id, for tools. It must not be open.
    pub fn open_file(&self, id: FileId, shard: ShardId) -> rusqlite::Result<Opened> {
        self.0.open(id, shard)
    }

    /// Writes everything to the files and empties the log. Connections must be closed. Blocks.
    ///
    /// # Errors
    /// What was durable stays so, in the log.
    pub fn close(&self) -> Result<(), CloseError> {
        self.0.close()
    }
}

/// Why an engine could not write everything to the files.
#[derive(Debug, thiserror::Error)]
pub enum CloseError {
    #[error("the commit log failed: {}", .0.message)]
    Log(LogFailure),
    #[error("write to the objects' files")]
    Files(#[source] io::Error),
    #[error("write to the catalog")]
    Catalog(#[source] rusqlite::Error),
}

pub(crate) fn log_directory(data_dir: &Path, worker: u16) -> PathBuf {
    data_dir
        .join("workers")
        .join(worker.to_string())
        .join("log")
}

impl Inner {
    fn open(self: &Rc<Self>, id: FileId, shard: ShardId) -> rusqlite::Result<Opened> {
        let database = self.open_database(id, shard)?;
        let connection = match self.connection(&database) {
            Ok(connection) => connection,
            Err(error) => {
                if !database.open.get() {
                    self.closed(&database);
                }
                return Err(error);
            }
        };
        Ok(Opened {
            connection,
            handle: Box::new(OpenDatabase {
                engine: Rc::downgrade(self),
                database,
            }),
        })
    }

    fn connection(&self, database: &Rc<Database>) -> rusqlite::Result<Connection> {
        if database.open.replace(true) {
            return Err(failed("the database is open already"));
        }
        let file: Rc<dyn DatabaseFile> = Rc::clone(database) as _;
        let connected = vfs::connect(file).and_then(|connection| {
            // Nobody else has the file; the log does what journal and sync would.
            connection.execute_batch(
                "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = MEMORY; \
                 PRAGMA synchronous = OFF; PRAGMA temp_store = MEMORY",
            )?;
            if database.overlay.borrow().committed_pages() == 0 {
                connection.pragma_update(None, "page_size", self.core.page_bytes)?;
            }
            Ok(connection)
        });
        if connected.is_err() {
            database.open.set(false);
        }
        connected
    }

    /// The database of an id: from memory, from its file, or a new one without pages.
    fn open_database(&self, id: FileId, shard: ShardId) -> rusqlite::Result<Rc<Database>> {
        if let Some(database) = self.databases.borrow().get(&id) {
            return Ok(Rc::clone(database));
        }
        let (overlay, noted) = self
            .core
            .overlay_of_file(id, shard)
            .map_err(|error| failed(&format!("read the file of {id}: {error}")))?;
        let database = Rc::new(Database::new(id, shard, Rc::clone(&self.core), overlay));
        database.noted.set(noted);
        let changed = noted.1.saturating_add(MODIFIED_SLACK_MS);
        database.changed.set(Bookmark::at_time(changed));
        self.databases.borrow_mut().insert(id, Rc::clone(&database));
        Ok(database)
    }

    /// Files or catalogs cannot be written, so the log cannot get shorter.
    fn is_stuck(&self) -> bool {
        self.checkpoint_failed.get() || self.catalog_failed.get()
    }

    /// Whether recovery would need more of a log that ends there than it may.
    fn is_behind(&self, end: LogPosition) -> bool {
        end.0.saturating_sub(self.known_needed.get().0) > self.config.live_bytes_max
    }

    /// Whether a database has any pages: cheaper than to open it.
    fn exists(self: &Rc<Self>, id: FileId, shard: ShardId) -> rusqlite::Result<bool> {
        let database = self.open_database(id, shard)?;
        let exists = database.overlay.borrow().committed_pages() > 0;
        self.release(&database);
        Ok(exists)
    }

    /// The connection of a database is closed.
    fn closed(&self, database: &Rc<Database>) {
        database.open.set(false);
        database.rolled_back();
        self.core.descriptors.borrow_mut().forget(database.id);
        self.release(database);
    }

    /// Nobody may need a database any more: it leaves memory, at once or when its file has all of it.
    fn release(&self, database: &Rc<Database>) {
        if database.open.get() || database.snapshots.get() > 0 {
            return;
        }
        let is_current = self
            .databases
            .borrow()
            .get(&database.id)
            .is_some_and(|current| Rc::ptr_eq(current, database));
        if !is_current {
            return;
        }
        if database.first_unflushed.get().is_none() {
            self.databases.borrow_mut().remove(&database.id);
        } else if !database.capturing.get() && !database.asleep.replace(true) {
            self.asleep.borrow_mut().push(database.id);
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop();
    }
}

fn failed(message: &str) -> rusqlite::Error {
    rusqlite::Error::SqliteFailure(
        rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CANTOPEN),
        Some(message.to_owned()),
    )
}
