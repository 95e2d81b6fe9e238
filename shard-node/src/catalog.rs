//! Who exists: a small database per shard, `shards/{shard}/catalog.db`, with a row per object. (Objects
//! of a colo's ring are in `catalog-{colo}.db`: they may belong to another worker.)
//!
//! It goes through the same commit log as the objects, so what recovers them recovers it. A commit
//! that an operator should know of (an object was created, grew, learned its name) is noted in memory
//! ([`Note`]) and written here in batches; until a note is durably here, the log keeps the commit it
//! came from, and recovery notes it again. So the catalog never knows of an object that is not durable,
//! and after recovery it knows of every one that is.

use std::cell::RefCell;
use std::collections::HashMap;

use protocol::{LogPosition, ShardId};
use rusqlite::{Connection, params};
use serde::Serialize;

use crate::commit_log::record::{FileId, Named};
use crate::storage::Opened;

/// `used` is kept to within this time (as file systems do with `relatime`): an object that only reads
/// costs no write.
pub(crate) const USED_WITHIN_MILLIS: u64 = 3_600_000;

/// Catalogs that stay open, some 40 KiB each.
const OPEN_MAX: usize = 128;

const SCHEMA: &str = "
    CREATE TABLE objects (
        id BLOB PRIMARY KEY,
        class TEXT NOT NULL,
        name TEXT,
        bytes INTEGER NOT NULL,
        created_ms INTEGER NOT NULL,
        used_ms INTEGER NOT NULL,
        alarm_ms INTEGER
    ) WITHOUT ROWID;
    CREATE INDEX objects_by_name ON objects (class, name);
    CREATE INDEX objects_by_alarm ON objects (alarm_ms) WHERE alarm_ms IS NOT NULL;
    PRAGMA user_version = 1";

/// What commits since the last write to the catalog say of one object.
#[derive(Debug, Clone)]
pub(crate) struct Note {
    pub(crate) shard: ShardId,
    /// Where the oldest of these commits is in the log.
    pub(crate) since: LogPosition,
    pub(crate) named: Option<Named>,
    pub(crate) bytes: u64,
    pub(crate) first_ms: u64,
    pub(crate) used_ms: u64,
}

impl Note {
    /// This note, and an older one of the same object.
    pub(crate) fn merge(&mut self, older: Self) {
        self.since = self.since.min(older.since);
        self.first_ms = self.first_ms.min(older.first_ms);
        self.used_ms = self.used_ms.max(older.used_ms);
        self.named = self.named.take().or(older.named);
    }
}

/// One object, as an operator sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Row {
    pub id: String,
    pub class: String,
    pub name: Option<String>,
    pub bytes: u64,
    /// Milliseconds since 1970; `used_ms` to within an hour.
    pub created_ms: u64,
    pub used_ms: u64,
    pub alarm_ms: Option<u64>,
}

/// The catalogs of one worker's shards, opened when needed.
#[derive(Default)]
pub(crate) struct Catalogs {
    open: RefCell<HashMap<FileId, Opened>>,
}

/// How a catalog's database is opened.
pub(crate) type Connect<'a> = &'a dyn Fn(FileId) -> rusqlite::Result<Opened>;

impl Catalogs {
    /// Writes notes of one shard, in one transaction; where its commit ends in the log.
    pub(crate) fn write(
        &self,
        catalog: FileId,
        notes: &[(FileId, Note)],
        connect: Connect<'_>,
    ) -> rusqlite::Result<LogPosition> {
        self.with(catalog, connect, |opened| {
            let connection = &opened.connection;
            let run = |sql| connection.prepare_cached(sql)?.raw_execute().map(drop);
            run("BEGIN")?;
            let written = prepare(connection)
                .and_then(|()| {
                    let mut notes = notes.iter();
                    notes.try_for_each(|(file, note)| write(connection, *file, note))
                })
                .and_then(|()| run("COMMIT"));
            if written.is_err() {
                if !connection.is_autocommit() {
                    run("ROLLBACK")?;
                }
                opened.handle.rolled_back();
            }
            written.map(|()| opened.handle.last_commit())
        })
    }

    /// Objects of a shard in the order of their ids, after `after`.
    pub(crate) fn list(
        &self,
        catalog: FileId,
        after: Option<FileId>,
        limit: u32,
        connect: Connect<'_>,
    ) -> rusqlite::Result<Vec<Row>> {
        self.read(catalog, connect, |opened| {
            let mut select = opened.connection.prepare_cached(
                "SELECT id, class, name, bytes, created_ms, used_ms, alarm_ms FROM objects \
                 WHERE id > ?1 ORDER BY id LIMIT ?2",
            )?;
            let after = after
                .map(|file| file.as_bytes().to_vec())
                .unwrap_or_default();
            select
                .query_map(params![after, limit], |row| {
                    let id: Vec<u8> = row.get(0)?;
                    Ok(Row {
                        id: FileId::from_slice(&id).map_or_else(String::new, |id| id.to_string()),
                        class: row.get(1)?,
                        name: row.get(2)?,
                        bytes: unsigned(row.get(3)?),
                        created_ms: unsigned(row.get(4)?),
                        used_ms: unsigned(row.get(5)?),
                        alarm_ms: row.get::<_, Option<i64>>(6)?.map(unsigned),
                    })
                })?
                .collect()
        })
    }

    /// How many objects a shard has.
    pub(crate) fn count(&self, catalog: FileId, connect: Connect<'_>) -> rusqlite::Result<u64> {
        self.read(catalog, connect, |opened| {
            opened
                .connection
                .prepare_cached("SELECT count(*) FROM objects")?
                .query_row([], |row| row.get(0))
                .map(unsigned)
        })
    }

    /// Closes them all; transactions are never left open.
    pub(crate) fn close(&self) {
        for (_, opened) in self.open.take() {
            opened.close();
        }
    }

    /// A shard without objects may have no catalog.
    fn read<T: Default>(
        &self,
        catalog: FileId,
        connect: Connect<'_>,
        f: impl FnOnce(&Opened) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        self.with(catalog, connect, |opened| {
            if version(&opened.connection)? == 0 {
                return Ok(T::default());
            }
            f(opened)
        })
    }

    fn with<T>(
        &self,
        catalog: FileId,
        connect: Connect<'_>,
        f: impl FnOnce(&Opened) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        if !self.open.borrow().contains_key(&catalog) {
            if self.open.borrow().len() >= OPEN_MAX {
                self.close();
            }
            let opened = connect(catalog)?;
            self.open.borrow_mut().insert(catalog, opened);
        }
        f(&self.open.borrow()[&catalog])
    }
}

/// Creates the tables of a new catalog.
fn prepare(connection: &Connection) -> rusqlite::Result<()> {
    if version(connection)? == 0 {
        connection.execute_batch(SCHEMA)?;
    }
    Ok(())
}

fn version(connection: &Connection) -> rusqlite::Result<i64> {
    connection
        .prepare_cached("PRAGMA user_version")?
        .query_row([], |row| row.get(0))
}

fn write(connection: &Connection, file: FileId, note: &Note) -> rusqlite::Result<()> {
    let name = note.named.as_ref().and_then(|named| named.name.as_ref());
    let name = name.map(|name| name.as_str());
    let (bytes, used) = (signed(note.bytes), signed(note.used_ms));
    let stale = signed(note.used_ms.saturating_sub(USED_WITHIN_MILLIS));
    // Most notes are of objects that are here, and many change nothing.
    let mut update = connection.prepare_cached(
        "UPDATE objects SET bytes = ?2, used_ms = max(used_ms, ?3), name = coalesce(name, ?4) \
         WHERE id = ?1 AND (bytes <> ?2 OR used_ms < ?5 OR (name IS NULL AND ?4 IS NOT NULL))",
    )?;
    if update.execute(params![file.as_bytes(), bytes, used, name, stale])? > 0 {
        return Ok(());
    }
    let class = note.named.as_ref().map_or("", |named| named.class.as_str());
    connection
        .prepare_cached(
            "INSERT INTO objects (id, class, name, bytes, created_ms, used_ms) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6) ON CONFLICT DO NOTHING",
        )?
        .execute(params![
            file.as_bytes(),
            class,
            name,
            bytes,
            signed(note.first_ms),
            used
        ])
        .map(drop)
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}
