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

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::io;
use std::path::{Path, PathBuf};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::Waker;
use std::thread::JoinHandle;

use metrics::Histogram;
use protocol::{Epoch, Home, LogPosition, ObjectId, ShardId};
use rusqlite::Connection;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tracing::{error, info, warn};
use xxhash_rust::xxh3::Xxh3DefaultBuilder;

use super::overlay::{Capture, Overlay, Place};
use super::vfs::{self, DatabaseFile, Failed, Read};
use super::{Engine, Handle, Identity, Opened, StorageError, commit_statement};
use crate::catalog::{Catalogs, Note, Row, USED_WITHIN_MILLIS};
use crate::checkpoint::{self, Checkpointer, Flush, Job};
use crate::clock::Clock;
use crate::commit_log::record::{CommitHead, CommitWriter, FileId, Named};
use crate::commit_log::replay::{ReplayError, replay};
use crate::commit_log::segment::{self, Header, Segment};
use crate::commit_log::{Log, LogFailure, State, Stats, Writer};
use crate::disk::{self, Access, Disk, DiskFile, create_dirs};
use crate::worker::abort_on_panic;

/// Databases written at once.
const BATCH: usize = 512;

/// Files that are open for reading, whatever the number of awake objects.
const DESCRIPTORS_MAX: usize = 128;

/// Notes that are written to the catalogs before their time because they are many.
const NOTES_MAX: usize = 4096;

/// Ticks between two writes to the catalogs.
const TICKS_PER_NOTES: u32 = 10;

/// Ticks between a checkpoint that failed and the next try.
const TICKS_AFTER_FAILURE: u32 = 10;

/// `[log]`: the commit log of each worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// Bytes after which a segment is full and the next one begins.
    pub segment_bytes: u64,
    /// Bytes of the log that may be needed for recovery, which bounds its time. At half of it the
    /// databases that were not written for longest are written to their files; at all of it new writes
    /// wait for that.
    pub live_bytes_max: u64,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            segment_bytes: 32 << 20,
            live_bytes_max: 256 << 20,
        }
    }
}

impl LogConfig {
    pub fn validate(&self) -> Result<(), String> {
        if !((1 << 20)..=(1 << 30)).contains(&self.segment_bytes) {
            return Err(format!(
                "log.segment_bytes = {} must be from 1 MiB to 1 GiB",
                self.segment_bytes
            ));
        }
        if self.live_bytes_max < 2 * self.segment_bytes {
            return Err(format!(
                "log.live_bytes_max = {} must be at least twice log.segment_bytes = {}, or every commit would wait for a checkpoint",
                self.live_bytes_max, self.segment_bytes
            ));
        }
        Ok(())
    }
}

/// What an engine is made of.
pub struct Setup {
    pub disk: Arc<dyn Disk>,
    pub data_dir: PathBuf,
    pub worker: u16,
    pub log: LogConfig,
    /// Most bytes that one transaction may write.
    pub transaction_bytes_max: u64,
    pub clock: Arc<dyn Clock>,
    /// Gets the seconds of every write and sync of the log.
    pub sync_time: Histogram,
}

/// Why an engine did not start.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("create {path}")]
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
    /// The databases that are being written, while their job is under way.
    in_flight: RefCell<Vec<(Rc<Database>, Arc<Capture>)>>,
    /// A batch that waits until what it has is durable.
    waiting: RefCell<Option<(LogPosition, Vec<Flush>)>>,
    /// Databases that are dirty and closed: written soon, so that they leave memory.
    asleep: RefCell<Vec<FileId>>,
    /// What waits for the log.
    waiters: RefCell<Vec<(LogPosition, Waker)>>,
    ticks: Cell<u32>,
    checkpoint_failed: Cell<bool>,
    /// Ticks before the next try, after a checkpoint failed.
    pause: Cell<u32>,
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

/// What databases need of their engine.
struct Core {
    disk: Arc<dyn Disk>,
    shards: PathBuf,
    log_directory: PathBuf,
    log: Log,
    clock: Arc<dyn Clock>,
    transaction_bytes_max: u64,
    dirty: RefCell<VecDeque<(LogPosition, FileId)>>,
    notes: RefCell<HashMap<FileId, Note, Xxh3DefaultBuilder>>,
    descriptors: RefCell<Descriptors>,
}

/// Open files, the least recently used first.
#[derive(Default)]
struct Descriptors(VecDeque<(FileId, Rc<dyn DiskFile>)>);

/// One database: its pages in memory and its place in the log.
struct Database {
    id: FileId,
    shard: ShardId,
    core: Rc<Core>,
    overlay: RefCell<Overlay>,
    /// Where its last commit begins and ends.
    last: Cell<(LogPosition, LogPosition)>,
    /// Where its first commit is that its file lacks, and the same since the capture under way.
    first_unflushed: Cell<Option<LogPosition>>,
    since_capture: Cell<Option<LogPosition>>,
    capturing: Cell<bool>,
    /// A connection has it.
    open: Cell<bool>,
    /// Its last commits were lost with the log: nothing may be read from here any more.
    lost: Cell<bool>,
    named: RefCell<Option<Named>>,
    /// The next commit tells class and name.
    tell_name: Cell<bool>,
    /// Bytes that the transaction may write.
    room: Cell<u64>,
    /// Size and last use that the catalog knows, or will.
    noted: Cell<(u64, u64)>,
}

impl Logged {
    /// Recovers what the log of `worker` has, and starts its threads. Reads no object's file: what they
    /// lack is in memory afterwards, and is written in the background.
    ///
    /// `progress` is notified when more is durable, or anything else calls for
    /// [`advance`](Engine::advance).
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
        let Setup {
            disk,
            data_dir,
            worker,
            log: config,
            transaction_bytes_max,
            clock,
            sync_time,
        } = setup;
        let log_directory = log_directory(&data_dir, worker);
        // The data directory is there: log, worker and `workers` may be missing.
        create_dirs(&*disk, &log_directory, 2).map_err(|source| OpenError::Directory {
            path: log_directory.clone(),
            source,
        })?;
        sync_names(&*disk, &data_dir, &log_directory).map_err(|source| OpenError::Directory {
            path: log_directory.clone(),
            source,
        })?;
        let mut recovery = Recovery::default();
        let found = replay(&*disk, &log_directory, None, |begin, end, commit| {
            recovery.apply(begin, end, commit)
        })?;
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
        let checkpointer = Checkpointer::new(
            Arc::clone(&disk),
            log.clone(),
            log_directory.clone(),
            Arc::clone(&progress),
        );
        let core = Rc::new(Core {
            disk,
            shards: data_dir.join("shards"),
            log_directory,
            log,
            clock,
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
            in_flight: RefCell::default(),
            waiting: RefCell::default(),
            asleep: RefCell::default(),
            waiters: RefCell::default(),
            ticks: Cell::new(0),
            checkpoint_failed: Cell::new(false),
            pause: Cell::new(0),
            runner: RefCell::new(Runner::Nobody(Box::new(writer))),
            worker,
            config,
        };
        let recovered = recovery.databases.len();
        if recovered > 0 {
            info!(worker, databases = recovered, end = %found.end, "recovered from the log");
        }
        inner.adopt(recovery);
        Ok(Self(Rc::new(inner)))
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
        *runner = Runner::Threads(vec![writing, checkpointing]);
        Ok(())
    }

    /// Does one thing that waits for the log's or the checkpointer's thread, where nobody runs them.
    /// `false` if there was none, or it failed.
    pub fn step(&self) -> bool {
        let wrote = match &mut *self.0.runner.borrow_mut() {
            Runner::Nobody(writer) => writer.step(),
            Runner::Threads(_) | Runner::Stopped => false,
        };
        wrote | self.0.checkpointer.step()
    }

    /// The databases that are open or have anything in the log that their files lack.
    pub fn databases(&self) -> Vec<(FileId, ShardId)> {
        let databases = self.0.databases.borrow();
        databases
            .values()
            .map(|found| (found.id, found.shard))
            .collect()
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
        let connect = |catalog| self.0.open(catalog, shard);
        self.0.catalogs.list(catalog, after, limit, &connect)
    }

    /// How many objects a shard has.
    pub fn count(&self, home: Home, shard: ShardId) -> rusqlite::Result<u64> {
        let connect = |catalog| self.0.open(catalog, shard);
        self.0
            .catalogs
            .count(FileId::catalog(home, shard), &connect)
    }

    /// Writes to the catalogs what they do not have yet, as far as it is durable.
    pub fn write_notes(&self) -> rusqlite::Result<()> {
        self.0.write_notes()
    }

    /// What the log counted.
    pub fn stats(&self) -> &Stats {
        self.0.core.log.stats()
    }

    /// Bytes of the log that recovery would read.
    pub fn live_bytes(&self) -> u64 {
        let log = &self.0.core.log;
        log.end().0 - log.start().0
    }

    /// Bytes of pages in memory that files lack, and of open databases.
    pub fn overlay_bytes(&self) -> usize {
        let databases = self.0.databases.borrow();
        databases
            .values()
            .map(|database| database.overlay.borrow().bytes())
            .sum()
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

/// Databases as the log makes them.
#[derive(Default)]
struct Recovery {
    databases: BTreeMap<FileId, Recovered>,
    /// Others are not looked at, if given.
    only: Option<HashSet<FileId>>,
}

struct Recovered {
    shard: ShardId,
    overlay: Overlay,
    first: LogPosition,
    last: (LogPosition, LogPosition),
    named: Option<Named>,
    first_ms: u64,
    last_ms: u64,
}

impl Recovery {
    fn apply(
        &mut self,
        begin: LogPosition,
        end: LogPosition,
        commit: &crate::commit_log::record::Commit<'_>,
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
                first_ms: head.unix_millis,
                last_ms: 0,
            });
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
        Ok(())
    }
}

impl Inner {
    /// Takes over what was recovered. The databases are closed and dirty.
    fn adopt(&self, recovery: Recovery) {
        let mut databases = self.databases.borrow_mut();
        let mut dirty = self.core.dirty.borrow_mut();
        for (id, found) in recovery.databases {
            let bytes =
                u64::from(found.overlay.committed_pages()) * found.overlay.page_bytes() as u64;
            let database = Database {
                id,
                shard: found.shard,
                core: Rc::clone(&self.core),
                overlay: RefCell::new(found.overlay),
                last: Cell::new(found.last),
                first_unflushed: Cell::new(Some(found.first)),
                since_capture: Cell::new(None),
                capturing: Cell::new(false),
                open: Cell::new(false),
                lost: Cell::new(false),
                named: RefCell::new(found.named.clone()),
                tell_name: Cell::new(false),
                room: Cell::new(self.core.transaction_bytes_max),
                noted: Cell::new((bytes, found.last_ms)),
            };
            if !id.is_catalog() {
                let note = Note {
                    shard: found.shard,
                    since: found.first,
                    until: found.last.1,
                    named: found.named,
                    bytes,
                    first_ms: found.first_ms,
                    used_ms: found.last_ms,
                };
                self.core.notes.borrow_mut().insert(id, note);
            }
            dirty.push_back((found.first, id));
            self.asleep.borrow_mut().push(id);
            databases.insert(id, Rc::new(database));
        }
        dirty.make_contiguous().sort_unstable();
    }

    fn open(self: &Rc<Self>, id: FileId, shard: ShardId) -> rusqlite::Result<Opened> {
        let database = self.open_database(id, shard)?;
        let connection = self.connection(&database)?;
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
        let database = Rc::new(Database {
            id,
            shard,
            core: Rc::clone(&self.core),
            overlay: RefCell::new(overlay),
            last: Cell::new((LogPosition::ZERO, LogPosition::ZERO)),
            first_unflushed: Cell::new(None),
            since_capture: Cell::new(None),
            capturing: Cell::new(false),
            open: Cell::new(false),
            lost: Cell::new(false),
            named: RefCell::new(None),
            tell_name: Cell::new(false),
            room: Cell::new(self.core.transaction_bytes_max),
            noted: Cell::new(noted),
        });
        self.databases.borrow_mut().insert(id, Rc::clone(&database));
        Ok(database)
    }

    /// The connection of a database is closed.
    fn closed(&self, database: &Rc<Database>) {
        database.open.set(false);
        database.rolled_back();
        self.core.descriptors.borrow_mut().forget(database.id);
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
        } else if !database.capturing.get() {
            self.asleep.borrow_mut().push(database.id);
        }
    }

    /// The first position of the log that recovery would need.
    fn needed(&self) -> LogPosition {
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
        let noted = core.notes.borrow();
        let noted = noted.values().map(|note| note.since);
        let oldest = dirty.front().map(|(position, _)| *position);
        written
            .chain(noted)
            .chain(oldest)
            .min()
            .unwrap_or_else(|| core.log.durable())
    }

    /// Everything that may happen to the log and the files since the last call.
    fn advance(self: &Rc<Self>) {
        if let Some(done) = self.checkpointer.take_done() {
            let went_well = done.is_ok();
            self.checkpointed(done);
            if went_well {
                self.begin_checkpoint();
            }
        }
        self.submit();
    }

    fn tick(self: &Rc<Self>) {
        self.advance();
        let ticks = self.ticks.get() + 1;
        self.ticks.set(ticks);
        if ticks.is_multiple_of(TICKS_PER_NOTES) || self.core.notes.borrow().len() >= NOTES_MAX {
            self.try_write_notes();
        }
        match self.pause.get() {
            0 => self.begin_checkpoint(),
            ticks => self.pause.set(ticks - 1),
        }
        self.core.log.release();
    }

    /// Starts a job, if one is due and none is under way.
    fn begin_checkpoint(self: &Rc<Self>) {
        if self.checkpointer.is_busy() || self.waiting.borrow().is_some() || !self.log_is_open() {
            return;
        }
        let needed = self.needed();
        let log = &self.core.log;
        if log.may_retire(needed) {
            self.checkpointer.give(Job::Retire(needed));
            return;
        }
        let pressed = log.end().0 - needed.0 > self.config.live_bytes_max / 2;
        let mut batch = Vec::new();
        while batch.len() < BATCH
            && let Some(id) = self.asleep.borrow_mut().pop()
        {
            self.capture(id, &mut batch);
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
                self.capture(id, &mut batch);
            }
        }
        self.flush(batch);
    }

    fn notes_hold(&self, needed: LogPosition) -> bool {
        let notes = self.core.notes.borrow();
        notes.values().any(|note| note.since == needed)
    }

    /// Adds a database to a batch, if its file lacks anything.
    fn capture(&self, id: FileId, batch: &mut Vec<Flush>) {
        let databases = self.databases.borrow();
        let Some(database) = databases.get(&id) else {
            return;
        };
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

    fn flush(&self, batch: Vec<Flush>) {
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
    fn submit(&self) {
        let mut waiting = self.waiting.borrow_mut();
        if let Some((needed, batch)) = waiting.take() {
            if self.core.log.durable() >= needed && !self.checkpointer.is_busy() {
                self.checkpointer.give(Job::Flush(batch));
            } else {
                *waiting = Some((needed, batch));
            }
        }
    }

    fn checkpointed(&self, done: io::Result<()>) {
        self.checkpoint_failed.set(done.is_err());
        if done.is_err() {
            self.pause.set(TICKS_AFTER_FAILURE);
        }
        let in_flight = self.in_flight.take();
        let mut again = Vec::new();
        for (database, capture) in in_flight {
            database.capturing.set(false);
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
            if !database.open.get() {
                self.closed(&database);
            }
        }
        let mut dirty = self.core.dirty.borrow_mut();
        if !again.is_empty() {
            dirty.extend(again);
            dirty.make_contiguous().sort_unstable();
        }
    }

    /// Writes the notes that are durable to the catalogs. What cannot be written stays noted, and with it
    /// the part of the log it came from.
    fn write_notes(self: &Rc<Self>) -> rusqlite::Result<()> {
        let durable = self.core.log.durable();
        let mut by_catalog: BTreeMap<(FileId, ShardId), Vec<(FileId, Note)>> = BTreeMap::new();
        for (file, note) in self.core.notes.borrow().iter() {
            if note.until <= durable {
                let catalog = FileId::catalog(file.home(), note.shard);
                let notes = by_catalog.entry((catalog, note.shard)).or_default();
                notes.push((*file, note.clone()));
            }
        }
        for ((catalog, shard), notes) in by_catalog {
            let connect = |catalog| self.open(catalog, shard);
            self.catalogs.write(catalog, &notes, &connect)?;
            let mut all = self.core.notes.borrow_mut();
            for (file, _) in notes {
                all.remove(&file);
            }
        }
        Ok(())
    }

    fn try_write_notes(self: &Rc<Self>) {
        if self.log_is_open()
            && let Err(error) = self.write_notes()
        {
            warn!(%error, "the catalog could not be written");
        }
    }

    fn log_is_open(&self) -> bool {
        matches!(self.core.log.state(), State::Open)
    }

    /// Takes back what a failed log lost: the databases whose last commit is not durable return to their
    /// last durable one. `None` if the log did not fail.
    fn take_back(self: &Rc<Self>) -> Option<(LogFailure, Vec<ObjectId>)> {
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
            core.notes.borrow_mut().remove(id);
            objects.extend(id.object());
        }
        self.adopt(recovery);
        core.log.reopen();
        Some((failure, objects))
    }

    fn close(self: &Rc<Self>) -> Result<(), CloseError> {
        let settled = self.settle();
        self.stop();
        settled?;
        self.empty_log().map_err(CloseError::Files)
    }

    /// Ends the threads, after what they have begun.
    fn stop(&self) {
        self.core.log.close();
        self.checkpointer.close();
        if let Runner::Threads(threads) = self.runner.replace(Runner::Stopped) {
            for thread in threads {
                // A panic there has aborted the process.
                drop(thread.join());
            }
        }
    }

    /// Writes everything to the catalogs and the files.
    fn settle(self: &Rc<Self>) -> Result<(), CloseError> {
        self.flush_log()?;
        self.wait_for_checkpointer();
        while !self.core.notes.borrow().is_empty() {
            self.write_notes().map_err(CloseError::Catalog)?;
            self.flush_log()?;
        }
        self.catalogs.close();
        loop {
            self.wait_for_checkpointer();
            if self.checkpoint_failed.get() {
                let error = io::Error::other("the log keeps what they lack");
                return Err(CloseError::Files(error));
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
                self.capture(id, &mut batch);
            }
            self.flush(batch);
        }
    }

    /// Begins a segment without records and removes all others: nothing is left to recover.
    fn empty_log(&self) -> io::Result<()> {
        let core = &self.core;
        let end = core.log.durable();
        let Some(last) = core.log.last_segment() else {
            return Ok(());
        };
        if last.start == end {
            // Not even a marker is in it.
            return core.log.retire(&*core.disk, &core.log_directory, end);
        }
        let header = Header {
            sequence: last.sequence + 1,
            start: end,
            worker: self.worker,
        };
        Segment::create(&*core.disk, &core.log_directory, header)?;
        core.log.add_segment(header);
        core.log.retire(&*core.disk, &core.log_directory, end)
    }

    fn flush_log(&self) -> Result<(), CloseError> {
        if let Runner::Nobody(writer) = &mut *self.runner.borrow_mut() {
            self.core.log.release();
            while writer.step() {}
        }
        self.core.log.flush().map_err(CloseError::Log)
    }

    fn wait_for_checkpointer(self: &Rc<Self>) {
        while self.checkpointer.is_busy() || self.waiting.borrow().is_some() {
            if matches!(*self.runner.borrow(), Runner::Nobody(_)) {
                self.checkpointer.step();
            }
            self.checkpointer.wait();
            self.advance();
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Makes the names durable that lead to the log, and what an earlier process wrote into it last: it may
/// have died between writing and syncing, and what is read now must not be lost later.
fn sync_names(disk: &dyn Disk, data_dir: &Path, log_directory: &Path) -> io::Result<()> {
    let mut directory = log_directory;
    while directory != data_dir {
        disk.sync_dir(directory)?;
        directory = disk::parent(directory);
    }
    disk.sync_dir(data_dir)?;
    let names = disk.list(log_directory)?.into_iter();
    match names
        .filter(|path| segment::sequence_of(path).is_some())
        .max()
    {
        Some(last) => disk.open(&last, Access::Write)?.sync(),
        None => Ok(()),
    }
}

fn failed(message: &str) -> rusqlite::Error {
    rusqlite::Error::SqliteFailure(
        rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CANTOPEN),
        Some(message.to_owned()),
    )
}

impl Core {
    /// Pages that a file has, and what the catalog should know of it.
    fn overlay_of_file(&self, id: FileId, shard: ShardId) -> io::Result<(Overlay, (u64, u64))> {
        let path = checkpoint::path(&self.shards, shard, id);
        let file: Rc<dyn DiskFile> = match self.disk.open(&path, Access::Read) {
            Ok(file) => file.into(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok((Overlay::default(), (0, 0)));
            }
            Err(error) => return Err(error),
        };
        let status = file.status()?;
        if status.bytes == 0 {
            return Ok((Overlay::default(), (0, 0)));
        }
        let page_bytes = page_bytes(&*file)?;
        // A last page that is not whole is damage; SQLite will say so.
        let pages = status.bytes.div_ceil(page_bytes as u64);
        let pages = u32::try_from(pages).map_err(io::Error::other)?;
        self.descriptors.borrow_mut().keep(id, file);
        Ok((
            Overlay::of_file(page_bytes, pages),
            (status.bytes, status.modified_ms),
        ))
    }

    fn read_file(
        &self,
        id: FileId,
        shard: ShardId,
        buffer: &mut [u8],
        at: u64,
    ) -> io::Result<usize> {
        let kept = self.descriptors.borrow_mut().get(id);
        let file = match kept {
            Some(file) => file,
            None => {
                let path = checkpoint::path(&self.shards, shard, id);
                let file: Rc<dyn DiskFile> = match self.disk.open(&path, Access::Read) {
                    Ok(file) => file.into(),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
                    Err(error) => return Err(error),
                };
                self.descriptors.borrow_mut().keep(id, Rc::clone(&file));
                file
            }
        };
        file.read_at(buffer, at)
    }
}

/// Where the header of a database has the size of its pages
/// (<https://www.sqlite.org/fileformat.html#page_size>).
const PAGE_SIZE_AT: u64 = 16;

/// Bytes of a page of a database file.
fn page_bytes(file: &dyn DiskFile) -> io::Result<usize> {
    let mut field = [0; 2];
    file.read_at(&mut field, PAGE_SIZE_AT)?;
    Ok(match u16::from_be_bytes(field) {
        1 => 65536,
        bytes if bytes.is_power_of_two() && bytes >= 512 => bytes.into(),
        // No database at all; SQLite says so when it sees the header.
        _ => 4096,
    })
}

impl Descriptors {
    fn get(&mut self, id: FileId) -> Option<Rc<dyn DiskFile>> {
        let at = self.0.iter().rposition(|(known, _)| *known == id)?;
        let entry = self.0.remove(at)?;
        let file = Rc::clone(&entry.1);
        self.0.push_back(entry);
        Some(file)
    }

    fn keep(&mut self, id: FileId, file: Rc<dyn DiskFile>) {
        self.forget(id);
        if self.0.len() >= DESCRIPTORS_MAX {
            self.0.pop_front();
        }
        self.0.push_back((id, file));
    }

    fn forget(&mut self, id: FileId) {
        self.0.retain(|(known, _)| *known != id);
    }
}

impl Database {
    fn is_dirty_since(&self, position: LogPosition) -> bool {
        self.first_unflushed.get() == Some(position) || self.since_capture.get() == Some(position)
    }

    fn rolled_back(&self) {
        self.overlay.borrow_mut().rollback();
        self.room.set(self.core.transaction_bytes_max);
    }

    /// Notes for the catalog what this commit changed of what it knows.
    fn note(&self, begin: LogPosition, end: LogPosition, now: u64, told_name: bool) {
        let overlay = self.overlay.borrow();
        let bytes = u64::from(overlay.committed_pages()) * overlay.page_bytes() as u64;
        let (noted_bytes, noted_used) = self.noted.get();
        if bytes == noted_bytes && now.saturating_sub(noted_used) < USED_WITHIN_MILLIS && !told_name
        {
            return;
        }
        self.noted.set((bytes, now));
        let mut notes = self.core.notes.borrow_mut();
        let note = notes.entry(self.id).or_insert_with(|| Note {
            shard: self.shard,
            since: begin,
            until: end,
            named: None,
            bytes,
            first_ms: now,
            used_ms: now,
        });
        note.until = end;
        note.bytes = bytes;
        note.used_ms = now;
        note.named.clone_from(&self.named.borrow());
    }
}

impl DatabaseFile for Database {
    fn read(&self, buffer: &mut [u8], at: u64) -> Result<Read, Failed> {
        if self.lost.get() {
            return Err(Failed::Io);
        }
        let overlay = self.overlay.borrow();
        let page_bytes = overlay.page_bytes() as u64;
        if page_bytes == 0 {
            return Ok(Read::BeyondTheEnd);
        }
        let number = u32::try_from(at / page_bytes + 1).map_err(|_| Failed::Io)?;
        let within = usize::try_from(at % page_bytes).map_err(|_| Failed::Io)?;
        match overlay.place(number) {
            Place::Here(page) => {
                let part = page.get(within..within + buffer.len()).ok_or(Failed::Io)?;
                buffer.copy_from_slice(part);
                Ok(Read::All)
            }
            Place::File => {
                let read = self.core.read_file(self.id, self.shard, buffer, at);
                match read {
                    Ok(bytes) if bytes == buffer.len() => Ok(Read::All),
                    Ok(_) => Ok(Read::BeyondTheEnd),
                    Err(error) => {
                        warn!(database = %self.id, %error, "a database could not be read");
                        Err(Failed::Io)
                    }
                }
            }
            Place::Nowhere => Ok(Read::BeyondTheEnd),
        }
    }

    fn write(&self, page: &[u8], at: u64) -> Result<(), Failed> {
        let mut overlay = self.overlay.borrow_mut();
        let known = overlay.page_bytes();
        let whole = (known == 0 || known == page.len()) && at.is_multiple_of(page.len() as u64);
        if !whole || self.lost.get() {
            return Err(Failed::Io);
        }
        let number = at / page.len() as u64 + 1;
        let number = u32::try_from(number).map_err(|_| Failed::Io)?;
        let bytes = (overlay.written_bytes() + page.len()) as u64;
        if bytes > self.room.get() && !overlay.has_written(number) {
            // What undoes the transaction writes too, and must not fail.
            self.room.set(2 * self.core.transaction_bytes_max);
            return Err(Failed::Full);
        }
        overlay.write(number, page);
        Ok(())
    }

    fn truncate(&self, bytes: u64) -> Result<(), Failed> {
        let mut overlay = self.overlay.borrow_mut();
        let page_bytes = overlay.page_bytes().max(1) as u64;
        let pages = u32::try_from(bytes / page_bytes).map_err(|_| Failed::Io)?;
        overlay.truncate(pages);
        Ok(())
    }

    fn bytes(&self) -> u64 {
        let overlay = self.overlay.borrow();
        u64::from(overlay.pages()) * overlay.page_bytes() as u64
    }

    fn commit(&self) {
        let mut overlay = self.overlay.borrow_mut();
        if !overlay.is_written() {
            return;
        }
        let now = self.core.clock.unix_millis();
        let named = self.named.borrow();
        let told_name = self.tell_name.take();
        let head = CommitHead {
            shard: self.shard,
            epoch: Epoch::FIRST,
            unix_millis: now,
            previous: self.last.get().0,
            file: self.id,
            page_bytes: u32::try_from(overlay.page_bytes()).expect("at most 65536"),
            pages: overlay.pages(),
        };
        let (begin, end) = self.core.log.append(|buffer| {
            let named = named.as_ref().filter(|_| told_name);
            let mut record = CommitWriter::begin(buffer, &head, named);
            overlay.commit(&mut record);
            record.finish();
        });
        drop(overlay);
        drop(named);
        self.last.set((begin, end));
        let first = if self.capturing.get() {
            &self.since_capture
        } else {
            &self.first_unflushed
        };
        if first.get().is_none() {
            first.set(Some(begin));
            self.core.dirty.borrow_mut().push_back((begin, self.id));
        }
        if !self.id.is_catalog() {
            self.note(begin, end, now, told_name);
        }
    }
}

impl Engine for Logged {
    fn open(&self, object: &Identity) -> rusqlite::Result<Opened> {
        self.0.open(object.id.into(), object.shard)
    }

    fn check_writable(&self) -> Result<(), StorageError> {
        let inner = &*self.0;
        let failure = match inner.core.log.state() {
            State::Failed(failure) | State::Reopening(failure) => failure,
            State::Open => {
                let held = inner.core.log.end().0 - inner.core.log.start().0;
                if inner.checkpoint_failed.get() && held > inner.config.live_bytes_max {
                    return Err(StorageError::Full(
                        "the log is full, and the files cannot be written".to_owned(),
                    ));
                }
                return Ok(());
            }
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
        let behind = inner.core.log.end().0 - inner.core.log.start().0
            > inner.config.live_bytes_max + inner.config.segment_bytes;
        inner.core.log.is_full() || (behind && !inner.checkpoint_failed.get())
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

    fn tick(&self) {
        self.0.tick();
    }
}

/// A database that a [`Storage`](super::Storage) has open.
struct OpenDatabase {
    engine: Weak<Inner>,
    database: Rc<Database>,
}

impl Handle for OpenDatabase {
    fn commit(&self, connection: &Connection) -> rusqlite::Result<Option<LogPosition>> {
        let before = self.database.last.get().1;
        commit_statement(connection)?;
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

    fn close(self: Box<Self>, connection: Connection) {
        if let Err((_, error)) = connection.close() {
            warn!(database = %self.database.id, %error, "closing a database failed");
        }
        if let Some(engine) = self.engine.upgrade() {
            engine.closed(&self.database);
        }
    }
}
