//! Who exists: a small database per shard, `shards/{shard}/catalog.db`, with a row per object. (Objects
//! of a colo's ring are in `catalog-{colo}.db`: they may belong to another worker.)
//!
//! It goes through the same commit log as the objects, so what recovers them recovers it. A commit
//! that an operator should know of (an object was created, grew, learned its name) is noted in memory
//! ([`Note`]) and written here in batches; until a note is durably here, the log keeps the commit it
//! came from, and recovery notes it again. So the catalog never knows of an object that is not durable,
//! and after recovery it knows of every one that is.

pub(crate) mod stock;

use std::cell::RefCell;
use std::collections::HashMap;

use protocol::{LogPosition, ObjectId, ShardId};
use rusqlite::types::ToSqlOutput;
use rusqlite::{Connection, OptionalExtension, ToSql, params};
use serde::{Deserialize, Serialize};

use crate::alarm::AlarmState;
use crate::commit_log::record::{FileId, Named};
use crate::storage::{Opened, alarm_of, successor};
pub(crate) use stock::ClassStock;

/// `used` is kept to within this time (as file systems do with `relatime`): an object that only reads
/// costs no write.
pub(crate) const USED_WITHIN_MILLIS: u64 = 3_600_000;

/// Catalogs that stay open, some 40 KiB each: more than the shards of two rings by default, for a listing
/// looks into all of them.
const OPEN_MAX: usize = 512;

/// A row per object. Every index begins with the class, and ends with the id, which is how pages of a
/// listing follow one another. An object without a name has the empty one, which no object can have.
const SCHEMA: &str = "
    CREATE TABLE objects (
        id BLOB PRIMARY KEY,
        class TEXT NOT NULL,
        name TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        created_ms INTEGER NOT NULL,
        used_ms INTEGER NOT NULL,
        alarm_ms INTEGER,
        alarm_scheduled_ms INTEGER,
        alarm_retries INTEGER,
        dead_ms INTEGER,
        dead_scheduled_ms INTEGER,
        dead_error TEXT
    ) WITHOUT ROWID;
    CREATE INDEX objects_by_name ON objects (class, name);
    CREATE INDEX objects_by_bytes ON objects (class, bytes);
    CREATE INDEX objects_by_used ON objects (class, used_ms);
    CREATE INDEX objects_by_alarm ON objects (class, alarm_ms) WHERE alarm_ms IS NOT NULL;
    CREATE INDEX objects_by_dead ON objects (class, dead_ms) WHERE dead_ms IS NOT NULL;
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
    /// The catalog should know the last use at least so well.
    pub(crate) used_within_ms: u64,
    /// The alarm, if any of them changed it.
    pub(crate) alarm: Option<AlarmState>,
    /// One of them deleted the object; it exists again if it has bytes.
    pub(crate) deleted: bool,
    /// Keys and rows, if they were counted.
    pub(crate) keys: Option<u32>,
}

impl Note {
    /// This note, and an older one of the same object.
    pub(crate) fn merge(&mut self, older: Self) {
        self.since = self.since.min(older.since);
        self.first_ms = self.first_ms.min(older.first_ms);
        self.used_ms = self.used_ms.max(older.used_ms);
        self.used_within_ms = self.used_within_ms.min(older.used_within_ms);
        self.named = self.named.take().or(older.named);
        if !self.deleted {
            self.alarm = self.alarm.take().or(older.alarm);
        }
        self.deleted |= older.deleted;
        self.keys = self.keys.or(older.keys);
    }
}

/// One object, as an operator sees it. Times are milliseconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Row {
    pub id: String,
    pub class: String,
    pub name: Option<String>,
    pub bytes: u64,
    pub created_ms: u64,
    /// To within an hour.
    pub used_ms: u64,
    #[serde(flatten)]
    pub alarm: AlarmState,
}

/// What a listing is ordered by; equal ones by their ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    Name,
    Bytes,
    Used,
    /// When the alarm runs next; objects without one are left out.
    Alarm,
    /// When the alarm was given up; objects without a dead letter are left out.
    Dead,
}

impl Order {
    fn column(self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::Bytes => "bytes",
            Self::Used => "used_ms",
            Self::Alarm => "alarm_ms",
            Self::Dead => "dead_ms",
        }
    }
}

/// Where an object stands in a listing: its class, what it is ordered by, and its id.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Place {
    pub class: String,
    pub key: Key,
    pub id: String,
}

/// What a listing is ordered by, of one object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Key {
    Number(u64),
    Text(String),
}

impl ToSql for Key {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        match self {
            Self::Number(number) => Ok(signed(*number).into()),
            Self::Text(text) => text.to_sql(),
        }
    }
}

/// A part of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    pub class: Option<String>,
    /// Names begin with this.
    pub prefix: String,
    pub order: Order,
    pub descending: bool,
    /// Keys of a time or a size from the first and before the second.
    pub from: Option<u64>,
    pub below: Option<u64>,
    /// Leave out objects with an alarm.
    pub without_alarm: bool,
    /// The rows after this one.
    pub after: Option<Place>,
    pub limit: u32,
}

impl Default for Query {
    fn default() -> Self {
        Self {
            class: None,
            prefix: String::new(),
            order: Order::Name,
            descending: false,
            from: None,
            below: None,
            without_alarm: false,
            after: None,
            limit: 100,
        }
    }
}

impl Row {
    /// Where it stands in a listing of this order.
    pub fn place(&self, order: Order) -> Place {
        let pending = self.alarm.pending.map(|pending| pending.next_ms);
        let dead = self.alarm.dead.as_ref().map(|dead| dead.failed_ms);
        Place {
            class: self.class.clone(),
            key: match order {
                Order::Name => Key::Text(self.name.clone().unwrap_or_default()),
                Order::Bytes => Key::Number(self.bytes),
                Order::Used => Key::Number(self.used_ms),
                Order::Alarm => Key::Number(pending.unwrap_or(0)),
                Order::Dead => Key::Number(dead.unwrap_or(0)),
            },
            id: self.id.clone(),
        }
    }
}

impl Query {
    /// Puts rows of several catalogs into order, and leaves out what is beyond the limit. Numbers order a
    /// listing before classes do.
    pub fn merge(&self, rows: &mut Vec<Row>) {
        rows.sort_by_cached_key(|row| self.rank(row.place(self.order)));
        if self.descending {
            rows.reverse();
        }
        rows.truncate(self.limit as usize);
    }

    fn rank(&self, place: Place) -> (Option<String>, Key, String) {
        match self.order {
            Order::Name => (Some(place.class), place.key, place.id),
            _ => (None, place.key, place.id),
        }
    }
}

/// The catalogs of one worker's shards, opened when needed.
#[derive(Default)]
pub(crate) struct Catalogs {
    open: RefCell<HashMap<FileId, Opened>>,
    /// How often each was written.
    written: RefCell<HashMap<FileId, u64>>,
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
        *self.written.borrow_mut().entry(catalog).or_default() += 1;
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
            let mut select = opened.connection.prepare_cached(&format!(
                "SELECT {COLUMNS} FROM objects WHERE id > ?1 ORDER BY id LIMIT ?2"
            ))?;
            let after = after
                .map(|file| file.as_bytes().to_vec())
                .unwrap_or_default();
            select.query_map(params![after, limit], row)?.collect()
        })
    }

    /// The objects of a shard that a listing asks for, in its order.
    pub(crate) fn search(
        &self,
        catalog: FileId,
        query: &Query,
        connect: Connect<'_>,
    ) -> rusqlite::Result<Vec<Row>> {
        self.read(catalog, connect, |opened| {
            let classes = match &query.class {
                Some(class) => vec![class.clone()],
                None => classes(&opened.connection)?,
            };
            let mut rows = Vec::new();
            for class in classes {
                search_class(&opened.connection, query, &class, &mut rows)?;
            }
            query.merge(&mut rows);
            Ok(rows)
        })
    }

    /// One object.
    pub(crate) fn find(
        &self,
        catalog: FileId,
        id: FileId,
        connect: Connect<'_>,
    ) -> rusqlite::Result<Option<Row>> {
        self.read(catalog, connect, |opened| {
            let mut select = opened
                .connection
                .prepare_cached(&format!("SELECT {COLUMNS} FROM objects WHERE id = ?1"))?;
            select.query_row([id.as_bytes()], row).optional()
        })
    }

    /// When the alarms of a shard run next that are due before a time, in any order.
    pub(crate) fn alarms(
        &self,
        catalog: FileId,
        before: u64,
        connect: Connect<'_>,
    ) -> rusqlite::Result<Vec<(FileId, u64)>> {
        self.read(catalog, connect, |opened| {
            opened
                .connection
                .prepare_cached("SELECT id, alarm_ms FROM objects WHERE alarm_ms < ?1")?
                .query_map([signed(before)], |row| {
                    let id: Vec<u8> = row.get(0)?;
                    Ok((FileId::from_slice(&id), unsigned(row.get(1)?)))
                })?
                .filter_map(|found| match found {
                    Ok((id, at)) => id.map(|id| Ok((id, at))),
                    Err(error) => Some(Err(error)),
                })
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

const COLUMNS: &str = "id, class, name, bytes, created_ms, used_ms, alarm_scheduled_ms, alarm_ms, \
     alarm_retries, dead_scheduled_ms, dead_ms, dead_error";

fn row(row: &rusqlite::Row<'_>) -> rusqlite::Result<Row> {
    let id: Vec<u8> = row.get(0)?;
    let name: String = row.get(2)?;
    Ok(Row {
        id: FileId::from_slice(&id).map_or_else(String::new, |id| id.to_string()),
        class: row.get(1)?,
        name: Some(name).filter(|name| !name.is_empty()),
        bytes: unsigned(row.get(3)?),
        created_ms: unsigned(row.get(4)?),
        used_ms: unsigned(row.get(5)?),
        alarm: alarm_of(row, 6)?,
    })
}

/// The classes that a catalog has, without looking at every row.
fn classes(connection: &Connection) -> rusqlite::Result<Vec<String>> {
    connection
        .prepare_cached(
            "WITH RECURSIVE found (class) AS ( \
               SELECT min(class) FROM objects \
               UNION ALL \
               SELECT (SELECT min(class) FROM objects WHERE class > found.class) FROM found \
               WHERE found.class IS NOT NULL) \
             SELECT class FROM found WHERE class IS NOT NULL",
        )?
        .query_map([], |row| row.get(0))?
        .collect()
}

/// Adds the rows of one class. Each order has an index, so this reads no more rows than it gives, unless
/// a prefix is asked for in another order than that of names.
fn search_class(
    connection: &Connection,
    query: &Query,
    class: &str,
    rows: &mut Vec<Row>,
) -> rusqlite::Result<()> {
    let key = query.order.column();
    let mut sql = format!("SELECT {COLUMNS} FROM objects WHERE class = ?1 AND {key} IS NOT NULL");
    let (beyond, direction) = if query.descending {
        ("<", "DESC")
    } else {
        (">", "ASC")
    };
    if query.without_alarm {
        sql.push_str(" AND alarm_ms IS NULL");
    }
    let mut values: Vec<Box<dyn ToSql>> = vec![Box::new(class.to_owned())];
    let mut condition = |text: &str, value: Box<dyn ToSql>| {
        values.push(value);
        sql.push_str(&format!(" AND {text} ?{}", values.len()));
    };
    if !query.prefix.is_empty() {
        condition("name >=", Box::new(query.prefix.clone()));
        if let Some(end) = successor(&query.prefix) {
            // A text, whatever its bytes: names are compared as such.
            values.push(Box::new(end));
            sql.push_str(&format!(" AND name < CAST(?{} AS TEXT)", values.len()));
        }
    }
    for (comparison, bound) in [(">=", query.from), ("<", query.below)] {
        if let Some(bound) = bound {
            values.push(Box::new(signed(bound)));
            sql.push_str(&format!(" AND {key} {comparison} ?{}", values.len()));
        }
    }
    if let Some(after) = &query.after {
        let id = after.id.parse::<ObjectId>().map(FileId::from);
        let id = id.map_or_else(|_| Vec::new(), |id| id.as_bytes().to_vec());
        if query.order != Order::Name || after.class == class {
            values.push(Box::new(after.key.clone()));
            values.push(Box::new(id));
            let last = values.len();
            sql.push_str(&format!(
                " AND ({key}, id) {beyond} (?{}, ?{last})",
                last - 1
            ));
        } else if (class < after.class.as_str()) != query.descending {
            return Ok(());
        }
    }
    sql.push_str(&format!(
        " ORDER BY {key} {direction}, id {direction} LIMIT {}",
        query.limit
    ));
    let mut select = connection.prepare_cached(&sql)?;
    let values = values.iter().map(AsRef::as_ref);
    for found in select.query_map(rusqlite::params_from_iter(values), row)? {
        rows.push(found?);
    }
    Ok(())
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
    if note.deleted {
        connection
            .prepare_cached("DELETE FROM objects WHERE id = ?1")?
            .execute([file.as_bytes()])?;
        stock::write_keys(connection, file, 0)?;
        if note.bytes == 0 {
            return Ok(());
        }
    }
    let name = note.named.as_ref().and_then(|named| named.name.as_ref());
    let name = name.map_or("", |name| name.as_str());
    let (bytes, used) = (signed(note.bytes), signed(note.used_ms));
    let stale = signed(note.used_ms.saturating_sub(note.used_within_ms));
    // Most notes are of objects that are here, and many change nothing.
    let mut update = connection.prepare_cached(
        "UPDATE objects SET bytes = ?2, used_ms = max(used_ms, ?3), \
           name = CASE name WHEN '' THEN ?4 ELSE name END \
         WHERE id = ?1 AND (bytes <> ?2 OR used_ms < ?5 OR (name = '' AND ?4 <> ''))",
    )?;
    if update.execute(params![file.as_bytes(), bytes, used, name, stale])? == 0 {
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
            ])?;
    }
    if let Some(alarm) = &note.alarm {
        write_alarm(connection, file, alarm)?;
    }
    match note.keys {
        Some(keys) => stock::write_keys(connection, file, keys),
        None => Ok(()),
    }
}

fn write_alarm(connection: &Connection, file: FileId, alarm: &AlarmState) -> rusqlite::Result<()> {
    let (pending, dead) = (alarm.pending, alarm.dead.as_ref());
    connection
        .prepare_cached(
            "UPDATE objects SET alarm_ms = ?2, alarm_scheduled_ms = ?3, alarm_retries = ?4, \
               dead_ms = ?5, dead_scheduled_ms = ?6, dead_error = ?7 WHERE id = ?1",
        )?
        .execute(params![
            file.as_bytes(),
            pending.map(|pending| signed(pending.next_ms)),
            pending.map(|pending| signed(pending.scheduled_ms)),
            pending.map(|pending| pending.retries),
            dead.map(|dead| signed(dead.failed_ms)),
            dead.map(|dead| signed(dead.scheduled_ms)),
            dead.map(|dead| dead.error.as_str()),
        ])
        .map(drop)
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}
