//! One engine with some objects, and a model that knows what each of them held after every commit.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use protocol::{Bookmark, ClassName, Home, LogPosition, ObjectId, ObjectName, ShardId};
use rusqlite::Connection;
use shard_node::alarm::AlarmState;
use shard_node::archive::{Archive, ArchiveConfig};
use shard_node::commit_log::record::FileId;
use shard_node::disk::{Access, Disk};
use shard_node::history::{AsOf, HistoryError};
use shard_node::storage::image::{Image, KeepAlarm};
use shard_node::storage::logged::{Large, OpenError, PAGE_BYTES, Setup, Snapshot};
use shard_node::storage::{Engine, Identity, LogConfig, Logged, SqlConfig, Storage, StorageError};
use shard_node::store::Store;

use crate::disk::{Crash, SimDisk};

pub(crate) const ROOT: &str = "/data";

/// Objects of a run; two shards, so two catalogs.
pub(crate) const OBJECTS: usize = 4;
const SHARDS: u16 = 2;

const RESULT_BYTES: usize = 1 << 20;

/// Rows of a table, in order.
pub(crate) type Dump = Vec<(i64, Vec<u8>)>;

/// What clients of a run know, across crashes.
#[derive(Default, Clone)]
pub(crate) struct Model {
    /// Every commit: the object, what it held then, where the commit ended, and a bookmark of then.
    pub(crate) commits: Vec<(usize, Dump, LogPosition, Bookmark)>,
    /// How many of them were acknowledged.
    pub(crate) acknowledged: usize,
    /// Commits that adopted a file which was copied to the archive later: until then it may be unknown.
    pub(crate) copied_later: BTreeSet<usize>,
}

impl Model {
    /// What an object held after the first `count` commits.
    fn after(&self, count: usize, object: usize) -> Dump {
        let of_object = self.commits[..count]
            .iter()
            .rev()
            .find(|(of, ..)| *of == object);
        of_object
            .map(|(_, dump, ..)| dump.clone())
            .unwrap_or_default()
    }
}

/// A running engine. Dropping it is the death of its process.
pub(crate) struct Node {
    pub(crate) disk: SimDisk,
    pub(crate) engine: Logged,
    storages: Vec<Option<Storage>>,
    pub(crate) model: Model,
    /// The world has stopped, or something failed: what happens now is not what clients see.
    pub(crate) failed: bool,
    /// The log lost commits.
    lost: bool,
}

pub(crate) fn identity(object: usize) -> Identity {
    let class: ClassName = "Sim".parse().unwrap();
    let name: ObjectName = format!("object-{object}").parse().unwrap();
    Identity {
        id: ObjectId::named(&class, Home::Global, &name),
        class,
        name: Some(name),
        shard: ShardId(u16::try_from(object).unwrap() % SHARDS),
    }
}

pub(crate) fn setup(disk: &SimDisk) -> Setup {
    Setup {
        disk: Arc::new(disk.clone()),
        data_dir: PathBuf::from(ROOT),
        worker: 0,
        // Small, so that segments fill and checkpoints press.
        log: LogConfig {
            segment_bytes: 12 << 10,
            live_bytes_max: 40 << 10,
        },
        page_bytes: PAGE_BYTES,
        transaction_bytes_max: 128 << 20,
        clock: Arc::new(disk.clone()),
        sync_time: metrics::Histogram::noop(),
        archive: Some(archive(disk)),
    }
}

fn archive(disk: &SimDisk) -> Archive {
    let config = ArchiveConfig {
        // Some databases are too large for a base in the log, and some are at times.
        base_bytes_max: 8 << 10,
        ..ArchiveConfig::default()
    };
    Archive::new(Store::new(disk.archive()), config)
}

impl Node {
    pub(crate) fn start(disk: SimDisk, model: Model) -> Result<Self, OpenError> {
        let engine = Logged::open_idle(setup(&disk), Arc::default())?;
        Ok(Self {
            disk,
            engine,
            storages: (0..OBJECTS).map(|_| None).collect(),
            model,
            failed: false,
            lost: false,
        })
    }

    fn storage(&mut self, object: usize) -> &Storage {
        let engine = self.engine.clone();
        self.storages[object].get_or_insert_with(|| {
            let config = Arc::new(SqlConfig::default());
            Storage::new(identity(object), Rc::new(engine), config)
        })
    }

    /// Runs SQL as one turn, or several that share a commit. A turn that contains `nonsense` fails, alone.
    pub(crate) fn commit(&mut self, object: usize, turns: &[&str]) -> Result<(), StorageError> {
        let storage = self.storage(object);
        let result = (|| {
            for sql in turns {
                storage.begin_segment();
                match storage.exec(sql, &[], RESULT_BYTES) {
                    Ok(_) => drop(storage.end_segment()?),
                    Err(StorageError::Sql { .. }) if sql.contains("nonsense") => {
                        storage.rollback()?;
                    }
                    Err(error) => {
                        drop(storage.rollback());
                        return Err(error);
                    }
                }
            }
            let wrote = storage.commit()?;
            Ok(wrote.then(|| (dump_of(storage), storage.gate())))
        })();
        match result {
            Ok(None) => Ok(()),
            Ok(Some((dump, position))) => {
                let bookmark = self.engine.bookmark();
                self.model.commits.push((object, dump?, position, bookmark));
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// The object is deleted, with all it had.
    pub(crate) fn delete(&mut self, object: usize) -> Result<(), StorageError> {
        self.sleep(object);
        let identity = identity(object);
        let existed = self.snapshot(object).is_some();
        let end = self.engine.delete(identity.id, identity.shard)?;
        if existed {
            let bookmark = self.engine.bookmark();
            self.model
                .commits
                .push((object, Dump::new(), end, bookmark));
        }
        Ok(())
    }

    /// Another database takes the place of the object's: these rows, in pages of this size.
    pub(crate) fn replace(
        &mut self,
        object: usize,
        rows: &Dump,
        page_bytes: u32,
    ) -> Result<(), StorageError> {
        self.sleep(object);
        let identity = identity(object);
        let (image, alarm) = image_of(&mut stock_of(rows, page_bytes), &identity);
        let pages = image.read().unwrap();
        let end = self
            .engine
            .replace(&identity, image.page_bytes(), &pages, alarm)?;
        let bookmark = self.engine.bookmark();
        self.model
            .commits
            .push((object, rows.clone(), end, bookmark));
        Ok(())
    }

    /// A file becomes the database of an object that has none.
    pub(crate) fn adopt(&mut self, object: usize, rows: &Dump) -> Result<(), StorageError> {
        self.delete(object)?;
        let identity = identity(object);
        let (image, alarm) = image_of(&mut stock_of(rows, 1024), &identity);
        let file = Path::new(ROOT).join("shards/adopted");
        for _ in 0..100 {
            if let Err(error) = self.put_file(&file, &image.read().unwrap()) {
                return Err(StorageError::DiskFull(error.to_string()));
            }
            let adopted = self.engine.adopt(&identity, &file, alarm.clone())?;
            if let Some(end) = adopted {
                let bookmark = self.engine.bookmark();
                self.model
                    .commits
                    .push((object, rows.clone(), end, bookmark));
                return Ok(());
            }
            // What it had must go first.
            self.engine.tick();
            self.settle();
        }
        // The disk does not let it go.
        Ok(())
    }

    fn put_file(&self, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
        let file = self.disk.open(path, Access::Write)?;
        file.set_len(0)?;
        file.write_all_at(bytes, 0)?;
        file.sync()
    }

    /// What is too large for a base in the log is copied to the archive.
    pub(crate) fn keep_large(&mut self) {
        while let Some(Large { id, shard, .. }) = self.engine.next_large() {
            let id = id.object().unwrap();
            let Ok(Some(snapshot)) = self.engine.snapshot(id, shard) else {
                continue;
            };
            // What may be lost must not be kept.
            self.settle();
            let Some(bytes) = snapshot_bytes(&snapshot) else {
                continue;
            };
            if snapshot.is_lost() || self.engine.durable() < snapshot.position() {
                continue;
            }
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&bytes).unwrap();
            let page_bytes = u32::try_from(snapshot.page_bytes()).unwrap();
            archive(&self.disk)
                .put_snapshot(id.into(), 0, snapshot.bookmark(), page_bytes, &mut file)
                .unwrap();
        }
    }

    /// The object as it is now, to be read later.
    pub(crate) fn snapshot(&mut self, object: usize) -> Option<Snapshot> {
        let identity = identity(object);
        self.engine.snapshot(identity.id, identity.shard).ok()?
    }

    /// The writer and the checkpointer do all they have to, and the engine hears of it.
    pub(crate) fn settle(&mut self) {
        self.engine.release();
        for _ in 0..100 {
            let worked = self.engine.step();
            self.advance();
            if !worked {
                break;
            }
        }
    }

    /// One thing happens behind the turns.
    pub(crate) fn step(&mut self) {
        self.engine.release();
        self.engine.step();
        self.advance();
    }

    pub(crate) fn advance(&mut self) {
        let lost = self.engine.advance();
        if self.lost {
            // The log goes on from where it was durable: its positions say nothing of what was lost.
            return;
        }
        let durable = self.engine.durable();
        if let Some((_, objects)) = lost {
            // Whoever waited got an error. Until the log goes on without it, what was lost may
            // still be found by the next process.
            self.failed = true;
            self.lost = true;
            for (object, storage) in self.storages.iter_mut().enumerate() {
                if objects.contains(&identity(object).id) {
                    *storage = None;
                }
            }
        }
        let acknowledged = self.model.commits.iter();
        let count = acknowledged
            .take_while(|(_, _, end, _)| *end <= durable)
            .count();
        self.model.acknowledged = self.model.acknowledged.max(count);
    }

    /// The disk works again, and the engine goes on without what it lost.
    pub(crate) fn recover(&mut self) {
        self.disk.set_faults(Vec::new());
        self.go_on();
        // An error that was not reported yet is, at the next commit.
        while self.disk.log_has_error() {
            let turn = "CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, v BLOB)";
            self.commit(0, &[turn, "INSERT INTO t (v) VALUES (x'01')"])
                .unwrap();
            self.settle();
            self.go_on();
        }
    }

    fn go_on(&mut self) {
        self.sleep_all();
        for _ in 0..100 {
            self.advance();
            if self.engine.check_writable().is_ok() {
                break;
            }
            self.engine.step();
            self.engine.tick();
        }
        self.engine.check_writable().unwrap();
        self.failed = false;
        if std::mem::take(&mut self.lost) {
            let durable = self.model.acknowledged;
            self.model.commits.truncate(durable);
        }
    }

    pub(crate) fn tick(&mut self, times: usize) {
        for _ in 0..times {
            self.engine.tick();
        }
        self.advance();
    }

    /// The object leaves memory.
    pub(crate) fn sleep(&mut self, object: usize) {
        self.storages[object] = None;
    }

    pub(crate) fn sleep_all(&mut self) {
        for object in 0..OBJECTS {
            self.sleep(object);
        }
    }

    /// What an object holds, read as a client would.
    pub(crate) fn read(&mut self, object: usize) -> Result<Dump, StorageError> {
        let storage = self.storage(object);
        storage.begin_segment();
        let dump = dump_of(storage)?;
        storage.commit()?;
        Ok(dump)
    }

    /// The process dies, perhaps with the power; the disk as the next one finds it, and what is known.
    pub(crate) fn crash(mut self, crash: Crash) -> (SimDisk, Model) {
        let disk = self.disk.crash(crash);
        let model = std::mem::take(&mut self.model);
        // Nothing of it may reach the disk any more.
        self.disk.set_faults(vec![crate::disk::Fault::Stop(0)]);
        (disk, model)
    }

    /// Checks that what is there is what was there after some number of commits, at least all that were
    /// acknowledged; makes that the past.
    pub(crate) fn check(&mut self, context: &str) {
        let found: Vec<Dump> = (0..OBJECTS)
            .map(|object| {
                self.read(object)
                    .unwrap_or_else(|error| panic!("{context}: {error}"))
            })
            .collect();
        let total = self.model.commits.len();
        // The fewest that fit: what was made and taken away again may never have been.
        let matching = (self.model.acknowledged..=total).find(|count| {
            (0..OBJECTS).all(|object| found[object] == self.model.after(*count, object))
        });
        let Some(count) = matching else {
            let ids = |dump: &Dump| dump.iter().map(|(id, _)| *id).collect::<Vec<i64>>();
            let found: Vec<_> = found.iter().map(ids).collect();
            let past = self.model.commits.iter().rev().take(12);
            let past: Vec<_> = past
                .map(|(object, dump, ..)| (*object, ids(dump)))
                .collect();
            panic!(
                "{context}: after {total} commits, {} of them acknowledged, the objects hold what they never held together: {found:?}; the last commits, latest first: {past:?}",
                self.model.acknowledged
            );
        };
        self.model.commits.truncate(count);
        for commit in &mut self.model.commits {
            // Positions of the past mean nothing to a log that went on from here.
            commit.2 = LogPosition::ZERO;
        }
        self.model.acknowledged = count;
        for object in 0..OBJECTS {
            let storage = self.storage(object);
            storage.begin_segment();
            let rows = storage.exec("PRAGMA integrity_check", &[], RESULT_BYTES);
            let rows = format!("{:?}", rows.unwrap().rows);
            assert_eq!(rows, "[[Text(\"ok\")]]", "{context}: object {object}");
        }
        self.sleep_all();
    }

    /// The catalog says exactly which objects there are, and how large.
    pub(crate) fn check_catalog(&mut self, context: &str) {
        self.settle();
        self.engine.write_notes().unwrap();
        self.settle();
        let mut rows = BTreeMap::new();
        for shard in (0..SHARDS).map(ShardId) {
            let listed = self.engine.list(Home::Global, shard, None, 100).unwrap();
            let count = self.engine.count(Home::Global, shard).unwrap();
            assert_eq!(count, listed.len() as u64, "{context}");
            for row in listed {
                rows.insert(row.id.clone(), (shard, row));
            }
        }
        for object in 0..OBJECTS {
            let identity = identity(object);
            let bytes = self.storage(object).database_bytes().unwrap();
            let row = rows.remove(&identity.id.to_string());
            if bytes == 0 {
                assert!(
                    row.is_none(),
                    "{context}: object {object} never was: {row:?}"
                );
                continue;
            }
            let (shard, row) =
                row.unwrap_or_else(|| panic!("{context}: object {object} is missing"));
            assert_eq!(
                (shard, row.bytes),
                (identity.shard, bytes),
                "{context}: object {object}"
            );
            assert_eq!(row.class, "Sim", "{context}");
            assert_eq!(
                row.name.as_deref(),
                Some(&*format!("object-{object}")),
                "{context}"
            );
            assert!(
                row.alarm == AlarmState::default() && row.created_ms <= row.used_ms,
                "{context}: {row:?}"
            );
        }
        assert!(rows.is_empty(), "{context}: {rows:?}");
    }

    /// Every object can be seen as it was after any of these commits, by bookmark and by time.
    pub(crate) fn check_past(&mut self, context: &str, commits: &[usize]) {
        self.settle();
        for count in commits {
            let (_, _, _, bookmark) = self.model.commits[*count];
            let of_time = Bookmark::at_time(bookmark.unix_millis);
            for object in 0..OBJECTS {
                let identity = identity(object);
                for at in [bookmark, of_time] {
                    let history = self.engine.history(identity.id, identity.shard).unwrap();
                    let found = match history.database_at(at, &std::env::temp_dir()) {
                        Ok(AsOf::AsItIs) => self.read(object).unwrap(),
                        Ok(AsOf::Database(past)) => {
                            bytes_dump(&std::fs::read(past.file.path()).unwrap())
                        }
                        Err(HistoryError::DidNotExist(_)) => Dump::new(),
                        Err(HistoryError::OutOfWindow { .. })
                            if self.is_unknown(*count, object) =>
                        {
                            continue;
                        }
                        Err(error) => panic!("{context}: object {object} at {at}: {error}"),
                    };
                    let want = self.model.after(count + 1, object);
                    assert_eq!(
                        found, want,
                        "{context}: object {object} at {at}, after {count} commits"
                    );
                }
            }
        }
    }

    /// Whether an object was, after a commit, what only a later copy tells.
    fn is_unknown(&self, count: usize, object: usize) -> bool {
        let mut commits = self.model.commits[..=count].iter().enumerate().rev();
        let last = commits.find(|(_, (of, ..))| *of == object);
        last.is_some_and(|(number, _)| self.model.copied_later.contains(&number))
    }

    /// Stops cleanly; then stock SQLite must find in the files what the objects held.
    pub(crate) fn stop(mut self, context: &str) -> (SimDisk, Model) {
        self.sleep_all();
        self.engine
            .close()
            .unwrap_or_else(|error| panic!("{context}: {error:?}"));
        let (disk, mut model) = (self.disk.clone(), std::mem::take(&mut self.model));
        model.acknowledged = model.commits.len();
        let dir = tempfile::tempdir().unwrap();
        let files: BTreeMap<PathBuf, Vec<u8>> = disk.files().into_iter().collect();
        let logs = files
            .keys()
            .filter(|path| path.extension().is_some_and(|is| is == "log"));
        assert!(
            logs.count() <= 1,
            "{context}: a clean stop leaves at most one segment"
        );
        for object in 0..OBJECTS {
            let want = model.after(model.commits.len(), object);
            let identity = identity(object);
            let id = identity.id.to_string();
            let path =
                Path::new(ROOT).join(format!("shards/{}/{}/{id}.db", identity.shard, &id[8..10]));
            let Some(bytes) = files.get(&path) else {
                assert!(want.is_empty(), "{context}: object {object} has no file");
                continue;
            };
            let copy = dir.path().join(format!("{object}.db"));
            std::fs::write(&copy, bytes).unwrap();
            let stock = Connection::open(&copy).unwrap();
            let ok: String = stock
                .query_row("PRAGMA integrity_check", [], |row| row.get(0))
                .unwrap();
            assert_eq!(ok, "ok", "{context}: object {object}");
            assert_eq!(stock_dump(&stock), want, "{context}: object {object}");
        }
        (disk, model)
    }
}

/// Nothing is in the file of an object that is unknown to the catalog, or the other way round.
pub(crate) fn database_files(disk: &SimDisk) -> Vec<FileId> {
    let files = disk.files().into_iter();
    let names = files.filter_map(|(path, _)| {
        let name = path.file_name()?.to_str()?.strip_suffix(".db")?.to_owned();
        name.parse::<ObjectId>().ok().map(FileId::from)
    });
    names.collect()
}

/// What a snapshot has, as stock SQLite reads it; `None` if it cannot be read any more.
pub(crate) fn snapshot_dump(snapshot: &Snapshot) -> Option<Dump> {
    snapshot_bytes(snapshot).map(|bytes| bytes_dump(&bytes))
}

fn snapshot_bytes(snapshot: &Snapshot) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    for first in (1..=snapshot.pages()).step_by(3) {
        snapshot.read(first, 3, &mut bytes).ok()?;
    }
    assert_eq!(bytes.len() as u64, snapshot.bytes());
    Some(bytes)
}

/// A database with these rows.
fn stock_of(rows: &Dump, page_bytes: u32) -> Connection {
    let stock = Connection::open_in_memory().unwrap();
    stock.pragma_update(None, "page_size", page_bytes).unwrap();
    stock
        .execute_batch("CREATE TABLE t (id INTEGER PRIMARY KEY, v BLOB)")
        .unwrap();
    for (id, value) in rows {
        stock
            .execute("INSERT INTO t VALUES (?1, ?2)", (id, value))
            .unwrap();
    }
    stock
}

fn image_of(stock: &mut Connection, identity: &Identity) -> (Image, AlarmState) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &*stock.serialize("main").unwrap()).unwrap();
    Image::import(file.into_temp_path(), identity, KeepAlarm::Yes).unwrap()
}

/// What a database has, as stock SQLite reads it.
fn bytes_dump(bytes: &[u8]) -> Dump {
    let mut stock = Connection::open_in_memory().unwrap();
    stock
        .deserialize_read_exact("main", bytes, bytes.len(), true)
        .unwrap();
    let ok: String = stock
        .query_row("PRAGMA integrity_check", [], |row| row.get(0))
        .unwrap();
    assert_eq!(ok, "ok");
    stock_dump(&stock)
}

fn dump_of(storage: &Storage) -> Result<Dump, StorageError> {
    use shard_node::storage::SqlValue;
    let tables = storage.exec(
        "SELECT 1 FROM sqlite_schema WHERE name = 't'",
        &[],
        RESULT_BYTES,
    )?;
    if tables.rows.is_empty() {
        return Ok(Dump::new());
    }
    let rows = storage.exec("SELECT id, v FROM t ORDER BY id", &[], 64 * RESULT_BYTES)?;
    let rows = rows.rows.into_iter().map(|mut row| {
        let value = match row.pop() {
            Some(SqlValue::Blob(value)) => value,
            other => panic!("{other:?} is no blob"),
        };
        match row.pop() {
            Some(SqlValue::Integer(id)) => (id, value),
            other => panic!("{other:?} is no id"),
        }
    });
    Ok(rows.collect())
}

fn stock_dump(connection: &Connection) -> Dump {
    let Ok(mut select) = connection.prepare("SELECT id, v FROM t ORDER BY id") else {
        return Dump::new();
    };
    let rows = select.query_map([], |row| Ok((row.get(0)?, row.get(1)?)));
    rows.unwrap().collect::<Result<_, _>>().unwrap()
}
