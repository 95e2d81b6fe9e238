//! One object's database: SQL, key-value pairs, transactions and limits.
//!
//! A [`Storage`] belongs to one object and one thread. Everything written between
//! [`begin_segment`](Storage::begin_segment) and [`commit`](Storage::commit) is one transaction,
//! begun at the first write; the object host calls these around each stretch of a handler that runs
//! without awaiting. Several stretches may share one SQLite transaction, each in a savepoint
//! ([`end_segment`](Storage::end_segment)). How a database is opened and when a commit is durable is
//! the business of an [`Engine`]: [`Logged`] in a node, [`PlainFiles`] to compare it with.

mod alarm;
mod authorizer;
mod config;
mod delete_all;
mod engine;
mod error;
mod functions;
pub(crate) mod heap;
mod identity;
pub mod image;
mod keys;
mod kv;
pub mod logged;
pub(crate) mod overlay;
mod past;
mod plain_files;
mod sql;
mod statements;
mod transactions;
pub(crate) mod vfs;

use std::cell::{Cell, OnceCell, RefCell, RefMut};
use std::ffi::CStr;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Waker;

use protocol::{Bookmark, LogPosition, ObjectName, ShardId};
use rusqlite::Connection;
use rusqlite::limits::Limit;
use tracing::debug;

pub use config::{LogConfig, SqlConfig};
pub use engine::{Engine, Handle, Opened};
pub use error::StorageError;
pub use identity::Identity;
pub use keys::KEYS_COUNTED;
pub use kv::{BATCH_KEYS_MAX, Entry, KEY_BYTES_MAX, KvError, ListOptions};
pub use logged::Logged;
pub use plain_files::PlainFiles;
/// One SQL value: NULL, a 64-bit integer, a real, a text or a blob.
pub use rusqlite::types::Value as SqlValue;
pub use sql::Rows;

pub(crate) use alarm::{NumberedAlarm, alarm_of};
pub(crate) use kv::successor;

use crate::alarms::Timers;
use crate::commit_log::record::Named;
use crate::usage::Meter;
use authorizer::Guard;
use engine::prepare_ours;
use identity::put_identity;
use past::Armed;

/// Tables of ours in every object's database begin with this; SQL of classes cannot touch them.
pub const RESERVED_PREFIX: &str = "_dormouse_";

/// Prepared statements kept per awake object, a few KiB each, unless its class says otherwise.
pub const STATEMENTS_CACHED: usize = 32;

/// The database of one object.
pub struct Storage {
    identity: Identity,
    /// Set once the name is known, from the caller or from the database.
    name: OnceCell<ObjectName>,
    engine: Rc<dyn Engine>,
    config: Arc<SqlConfig>,
    guard: Arc<Guard>,
    statements_cached: usize,
    open: RefCell<Option<Open>>,
    /// The object left memory; another copy of it may have the database open.
    closed: Cell<bool>,
    segment: Cell<Segment>,
    /// Writes of an earlier stretch are in the open transaction.
    batch: Cell<bool>,
    /// They were, and are gone.
    batch_lost: Cell<bool>,
    /// Writes inside a call of [`unconfirmed`](Self::unconfirmed) do not hold replies.
    unconfirmed: Cell<bool>,
    /// The open transaction has a write that does.
    confirm: Cell<bool>,
    /// What runs now may only read.
    forbid_writes: Cell<bool>,
    /// Replies wait until the log is durable up to here.
    gate: Cell<LogPosition>,
    /// The open transaction may have changed the alarm.
    alarm_changed: Cell<bool>,
    /// What the object is to be restored to before it starts next, if that was written down.
    armed: Cell<Armed>,
    /// All tables were dropped, and perhaps there are others since.
    emptied: Cell<bool>,
    /// Told of every commit that changed the alarm.
    timers: Option<Rc<Timers>>,
    meter: Meter,
}

/// An open connection.
struct Open {
    // First: statements go before their connection.
    kept: Statements,
    connection: Connection,
    handle: Box<dyn Handle>,
    /// The identity record in the database says all we know.
    identified: Cell<bool>,
    /// The table of key-value pairs is there.
    has_pairs: Cell<bool>,
}

/// The statements around turns. Each is prepared when it is needed first.
#[derive(Default)]
struct Statements([OnceCell<vfs::Kept>; 4]);

/// One of them.
#[derive(Debug, Clone, Copy)]
enum Around {
    Begin,
    Commit,
    Savepoint,
    Release,
}

impl Around {
    fn sql(self) -> &'static CStr {
        match self {
            Self::Begin => c"BEGIN IMMEDIATE",
            Self::Commit => c"COMMIT",
            Self::Savepoint => c"SAVEPOINT _dormouse_turn",
            Self::Release => c"RELEASE _dormouse_turn",
        }
    }
}

impl Open {
    fn run(&self, what: Around) -> rusqlite::Result<()> {
        let slot = &self.kept.0[what as usize];
        let statement = match slot.get() {
            Some(statement) => statement,
            None => {
                let prepared = vfs::Kept::prepare(&self.connection, what.sql())?;
                slot.get_or_init(|| prepared)
            }
        };
        statement.run(&self.connection)
    }
}

/// Where the current stretch of a turn stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Segment {
    Clean,
    /// A transaction is open, begun by this stretch.
    Writing,
    /// A savepoint is open, because an earlier stretch wrote in this transaction.
    Nested,
}

impl Storage {
    pub fn new(identity: Identity, engine: Rc<dyn Engine>, config: Arc<SqlConfig>) -> Self {
        Self {
            name: identity
                .name
                .clone()
                .map(OnceCell::from)
                .unwrap_or_default(),
            guard: Arc::new(Guard::new(config.turn_time_max)),
            identity,
            engine,
            config,
            statements_cached: STATEMENTS_CACHED,
            open: RefCell::new(None),
            closed: Cell::new(false),
            segment: Cell::new(Segment::Clean),
            batch: Cell::new(false),
            batch_lost: Cell::new(false),
            unconfirmed: Cell::new(false),
            confirm: Cell::new(false),
            gate: Cell::new(LogPosition::ZERO),
            forbid_writes: Cell::new(false),
            alarm_changed: Cell::new(false),
            armed: Cell::new(Armed::No),
            emptied: Cell::new(false),
            timers: None,
            meter: Meter::default(),
        }
    }

    /// Where everything that the object does is counted.
    pub(crate) fn meter(&self) -> &Meter {
        &self.meter
    }

    /// Keeps so many prepared statements instead of [`STATEMENTS_CACHED`].
    #[must_use]
    pub fn cache_statements(mut self, count: usize) -> Self {
        self.statements_cached = count;
        self
    }

    /// Tells these timers of every commit that changes the alarm.
    #[must_use]
    pub(crate) fn with_timers(mut self, timers: Rc<Timers>) -> Self {
        self.timers = Some(timers);
        self
    }

    /// The object's name, if it has one and anybody ever called it by that name.
    pub fn name(&self) -> Result<Option<ObjectName>, StorageError> {
        if self.name.get().is_none() {
            // Opening reads the identity record.
            drop(self.open()?);
        }
        Ok(self.name.get().cloned())
    }

    /// The same as far as it is known without a look into the database.
    pub(crate) fn known_name(&self) -> Option<ObjectName> {
        self.name.get().cloned()
    }

    /// Whether all that replies could tell is durable. If not, `waker` is woken when that may have
    /// changed.
    pub fn is_durable(&self, waker: &Waker) -> bool {
        self.is_durable_up_to(self.gate.get(), waker)
    }

    /// Whether the log is durable up to a position, or will not be in this copy of the object, which is
    /// then at its end. If not, `waker` is woken when that may have changed.
    pub(crate) fn is_durable_up_to(&self, position: LogPosition, waker: &Waker) -> bool {
        let durable = self.engine.durable() >= position;
        if !durable {
            self.engine.wake_at(position, waker);
            self.engine.release();
        }
        durable
    }

    /// This copy of the object left memory.
    pub fn is_closed(&self) -> bool {
        self.closed.get()
    }

    /// Replies of this object wait until the log is durable up to here.
    pub fn gate(&self) -> LogPosition {
        self.gate.get()
    }

    /// Bytes of the database, free pages included; 0 if the object never wrote.
    pub fn database_bytes(&self) -> Result<u64, StorageError> {
        let open = self.open()?;
        let pragma = |name: &str| {
            let found = open
                .connection
                .pragma_query_value(None, name, |row| row.get::<_, i64>(0));
            self.check(found, 0)
        };
        let bytes = pragma("page_count")? * pragma("page_size")?;
        Ok(u64::try_from(bytes).unwrap_or(0))
    }

    /// Bytes of memory that the open database takes in SQLite; 0 if it is not open.
    pub fn memory_bytes(&self) -> usize {
        let open = self.open.borrow();
        open.as_ref()
            .map_or(0, |open| vfs::memory(&open.connection))
    }

    /// Gives back the memory that SQLite only caches with. Not while SQL runs.
    pub fn shrink(&self) {
        let open = self.open.borrow();
        if let Some(open) = open.as_ref()
            && let Err(error) = open.connection.release_memory()
        {
            debug!(object = %self.identity.id, %error, "memory could not be released");
        }
    }

    pub(crate) fn engine(&self) -> &dyn Engine {
        &*self.engine
    }

    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }

    pub fn shard(&self) -> ShardId {
        self.identity.shard
    }

    /// Most bytes that the key and the value of a pair may have together.
    pub fn pair_bytes_max(&self) -> usize {
        self.config.value_bytes_max as usize
    }

    /// Closes the database, if it is open, for good: whatever of this copy of the object still runs
    /// gets errors. An unfinished transaction is rolled back. What the object is to be restored to before
    /// it starts again, if it has asked for that.
    pub fn close(&self) -> Option<Bookmark> {
        self.closed.set(true);
        let Some(open) = self.open.borrow_mut().take() else {
            return self.armed.get().due();
        };
        if self.segment.replace(Segment::Clean) != Segment::Clean || self.batch.replace(false) {
            let rolled_back = open.connection.execute_batch("ROLLBACK");
            open.handle.rolled_back();
            if let Err(error) = rolled_back {
                // SQLite had done so itself, or closing does.
                debug!(object = %self.identity.id, %error, "rolled back");
            }
        }
        let armed = self.armed_restore(&open);
        let is_empty = self.is_left_empty(&open);
        drop(open.kept);
        open.handle.close(open.connection);
        if is_empty {
            self.engine.delete_empty(&self.identity);
        }
        armed
    }

    /// Runs `f`, in which nothing may be written.
    pub(crate) fn read_only<R>(&self, f: impl FnOnce() -> R) -> R {
        let before = self.forbid_writes.replace(true);
        let result = f();
        self.forbid_writes.set(before);
        result
    }

    /// Runs a statement of ours that writes, in the transaction of this turn. It must name one of our
    /// tables.
    pub(crate) fn write_ours(&self, sql: &str, values: &[SqlValue]) -> Result<(), StorageError> {
        self.writing(|connection| {
            let mut statement = prepare_ours(connection, sql)?;
            statement
                .execute(rusqlite::params_from_iter(values))
                .map(drop)
        })
    }

    /// The rows of a query of ours. It must name one of our tables.
    pub(crate) fn read_ours<T>(
        &self,
        sql: &str,
        values: &[SqlValue],
        row: impl FnMut(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>, StorageError> {
        self.reading(|connection| {
            prepare_ours(connection, sql)?
                .query_map(rusqlite::params_from_iter(values), row)?
                .collect()
        })
    }

    /// Whether one of our tables is there.
    pub(crate) fn has_table_of_ours(&self, name: &str) -> Result<bool, StorageError> {
        let open = self.open()?;
        if !self.may_have_tables(&open) {
            return Ok(false);
        }
        drop(open);
        let select = "SELECT 1 FROM sqlite_schema WHERE name = ? /* _dormouse_ */";
        let found = self.read_ours(select, &[SqlValue::Text(name.to_owned())], |_| Ok(()))?;
        Ok(!found.is_empty())
    }

    /// Runs statements of ours that only read.
    fn reading<T>(
        &self,
        f: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, StorageError> {
        let open = self.open()?;
        let _trusted = self.guard.trusted();
        self.check(f(&open.connection), 0)
    }

    /// Runs statements of ours that write, in the transaction of this turn.
    fn writing<T>(
        &self,
        f: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, StorageError> {
        let open = self.open()?;
        self.begin(&open)?;
        let _trusted = self.guard.trusted();
        self.check(f(&open.connection), 0)
    }

    /// The connection; opened on first use.
    fn open(&self) -> Result<RefMut<'_, Open>, StorageError> {
        if self.closed.get() {
            return Err(StorageError::Broken {
                object: self.identity.id,
                message: "this copy of the object has left memory".to_owned(),
            });
        }
        let mut slot = self.open.borrow_mut();
        if slot.is_none() {
            *slot = Some(self.connect()?);
        }
        Ok(RefMut::map(slot, |open| {
            open.as_mut().expect("just opened")
        }))
    }

    fn connect(&self) -> Result<Open, StorageError> {
        let Opened {
            mut connection,
            handle,
        } = self.check(self.engine.open(&self.identity), 0)?;
        let prepared = self.configure(&mut connection).and_then(|()| {
            // What an earlier copy of the object committed may not be durable yet.
            self.gate.set(self.gate.get().max(handle.last_commit()));
            Ok(handle.is_stored() && self.read_identity(&connection)?)
        });
        match prepared {
            Ok(identified) => {
                handle.identify(self.named(), false);
                Ok(Open {
                    kept: Statements::default(),
                    connection,
                    handle,
                    identified: Cell::new(identified),
                    has_pairs: Cell::new(false),
                })
            }
            Err(error) => {
                handle.close(connection);
                Err(error)
            }
        }
    }

    fn named(&self) -> Named {
        Named {
            class: self.identity.class.clone(),
            name: self.name.get().cloned(),
        }
    }

    fn write_identity(&self, connection: &Connection) -> Result<(), StorageError> {
        let identity = Identity {
            name: self.name.get().cloned(),
            ..self.identity.clone()
        };
        self.check(put_identity(connection, &identity), 0)
    }

    /// Reads what the database says of its object; `true` if it says all that we know.
    fn read_identity(&self, connection: &Connection) -> Result<bool, StorageError> {
        let _trusted = self.guard.trusted();
        let found: rusqlite::Result<Vec<(String, String)>> =
            prepare_ours(connection, "SELECT key, value FROM _dormouse_meta").and_then(
                |mut statement| {
                    statement
                        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
                        .collect()
                },
            );
        let found = match found {
            // A file without the table never saw a commit: the node died before its first one.
            Err(
                rusqlite::Error::SqliteFailure(_, Some(message))
                | rusqlite::Error::SqlInputError { msg: message, .. },
            ) if message.starts_with("no such table") => Vec::new(),
            found => self.check(found, 0)?,
        };
        let get = |key: &str| {
            found
                .iter()
                .find_map(|(k, v)| (k == key).then_some(v.as_str()))
        };
        if let Some(id) = get("id")
            && id != self.identity.id.to_string()
        {
            return Err(StorageError::Broken {
                object: self.identity.id,
                message: format!("its file holds the database of {id}"),
            });
        }
        if let Some(bookmark) = get("restore").and_then(|text| text.parse().ok())
            && self.armed.get() != Armed::Ignored
        {
            self.armed.set(Armed::Due(bookmark));
            return Err(StorageError::Restoring);
        }
        let recorded: Option<ObjectName> = get("name").and_then(|name| name.parse().ok());
        let complete = get("id").is_some() && (recorded.is_some() || self.name.get().is_none());
        if let Some(recorded) = recorded {
            // Equal to the caller's, where there is one: both lead to this id.
            drop(self.name.set(recorded));
        }
        Ok(complete)
    }

    fn configure(&self, connection: &mut Connection) -> Result<(), StorageError> {
        let limits = [
            (Limit::SQLITE_LIMIT_LENGTH, self.config.value_bytes_max),
            // Our own statements are short; the text of a class was measured before.
            (
                Limit::SQLITE_LIMIT_SQL_LENGTH,
                self.config.statement_bytes_max.max(1024),
            ),
            (Limit::SQLITE_LIMIT_COLUMN, self.config.columns_max),
            (
                Limit::SQLITE_LIMIT_VARIABLE_NUMBER,
                self.config.parameters_max.max(8),
            ),
            (
                Limit::SQLITE_LIMIT_FUNCTION_ARG,
                self.config.function_arguments_max,
            ),
            (
                Limit::SQLITE_LIMIT_LIKE_PATTERN_LENGTH,
                self.config.like_pattern_bytes_max,
            ),
            (Limit::SQLITE_LIMIT_ATTACHED, 0),
            (Limit::SQLITE_LIMIT_WORKER_THREADS, 0),
        ];
        let configured = (|| {
            for (limit, value) in limits {
                connection.set_limit(limit, i32::try_from(value).unwrap_or(i32::MAX))?;
            }
            let page_bytes: i64 =
                connection.pragma_query_value(None, "page_size", |row| row.get(0))?;
            connection.set_prepared_statement_cache_capacity(self.statements_cached);
            let pages =
                i64::try_from(self.config.database_bytes_max).unwrap_or(i64::MAX) / page_bytes;
            connection.pragma_update(None, "max_page_count", pages)?;
            connection.pragma_update(None, "foreign_keys", true)?;
            connection.pragma_update(None, "trusted_schema", false)?;
            functions::install(connection, self.config.value_bytes_max as usize)?;
            self.guard.install(connection)
        })();
        self.check(configured, 0)
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        self.close();
    }
}

fn contains_ignore_case(text: &str, part: &str) -> bool {
    text.as_bytes()
        .windows(part.len())
        .any(|window| window.eq_ignore_ascii_case(part.as_bytes()))
}

#[cfg(test)]
mod tests;
