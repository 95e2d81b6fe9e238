//! One object's database: SQL, key-value pairs, transactions and limits.
//!
//! A [`Storage`] belongs to one object and one thread. Everything written between
//! [`begin_segment`](Storage::begin_segment) and [`commit`](Storage::commit) is one transaction,
//! begun at the first write; the object host calls these around each stretch of a handler that runs
//! without awaiting. How a database file is opened and when a commit is durable is the business of
//! an [`Engine`]: that seam is all that a faster storage has to replace.

mod authorizer;
mod config;
mod functions;
mod kv;
mod plain_files;
mod sql;
mod statements;

use std::cell::{Cell, OnceCell, RefCell, RefMut};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use protocol::{ClassName, ObjectId, ObjectName, ShardId};
use rusqlite::limits::Limit;
use rusqlite::{Connection, Statement};

pub use config::SqlConfig;
pub use kv::{BATCH_KEYS_MAX, Entry, KEY_BYTES_MAX, KvError, ListOptions};
pub use plain_files::PlainFiles;
/// One SQL value: NULL, a 64-bit integer, a real, a text or a blob.
pub use rusqlite::types::Value as SqlValue;
pub use sql::Rows;

use authorizer::Guard;

/// Tables of ours in every object's database begin with this; SQL of classes cannot touch them.
pub const RESERVED_PREFIX: &str = "_dormouse_";

/// Prepared statements kept per awake object, a few KiB each.
const STATEMENTS_CACHED: usize = 32;

/// Why storage did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The SQL, or a value given to it, is wrong. SQLite's own words; `at` is a byte of the SQL.
    #[error("{message}{}", at.map(|at| format!(" (at byte {at})")).unwrap_or_default())]
    Sql { message: String, at: Option<usize> },
    /// SQL that could reach beyond the object or break a turn.
    #[error("{0}")]
    Denied(String),
    /// The time of the turn is over. The transaction is gone; the object must be reset.
    #[error("SQL ran longer than sql.turn_time_max = {0:?} in one turn")]
    OutOfTime(Duration),
    /// The disk or the object's share of it is full. Nothing of this turn was kept.
    #[error("storage is full: {0}")]
    Full(String),
    /// SQLite gave up the transaction after an error that the class ignored. Nothing of this turn was
    /// kept.
    #[error("an earlier error in this turn rolled back its transaction")]
    RolledBack,
    /// The database could not be opened, read or written. The object must be reset.
    #[error("database of {object} failed: {message}")]
    Broken { object: ObjectId, message: String },
    #[error(transparent)]
    Kv(#[from] KvError),
}

/// Who an object is, as its database records it.
#[derive(Debug, Clone)]
pub struct Identity {
    pub id: ObjectId,
    pub class: ClassName,
    pub name: Option<ObjectName>,
    pub shard: ShardId,
}

/// Opens databases and makes their commits durable. One per worker.
pub trait Engine {
    /// The database of an object that has written before, or `None`.
    fn open(&self, object: &Identity) -> rusqlite::Result<Option<Connection>>;

    /// The database of an object that is about to write for the first time.
    fn create(&self, object: &Identity) -> rusqlite::Result<Connection>;

    /// Ends the open transaction, with [`commit_statement`]. On return the commit is durable.
    fn commit(&self, connection: &Connection) -> rusqlite::Result<()>;

    /// The object leaves memory. If it never committed anything, nothing of it may stay.
    fn close(&self, object: &Identity, connection: Connection);
}

/// `COMMIT`, for engines.
pub fn commit_statement(connection: &Connection) -> rusqlite::Result<()> {
    prepare_ours(connection, "COMMIT /* _dormouse_ */")?
        .raw_execute()
        .map(drop)
}

/// The database of one object.
pub struct Storage {
    identity: Identity,
    /// Set once the name is known, from the caller or from the database.
    name: OnceCell<ObjectName>,
    engine: Rc<dyn Engine>,
    config: Arc<SqlConfig>,
    guard: Arc<Guard>,
    open: RefCell<Option<Open>>,
    /// The object left memory; another copy of it may have the database open.
    closed: Cell<bool>,
    segment: Cell<Segment>,
}

/// An open connection.
struct Open {
    connection: Connection,
    /// There is a file. Until the first write the connection is an empty database in memory, so that
    /// an object that is only read leaves nothing behind.
    file: bool,
    /// The identity record in the database says all we know.
    identified: Cell<bool>,
    /// The table of key-value pairs is there.
    has_pairs: Cell<bool>,
}

/// Where the current stretch of a turn stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Segment {
    Clean,
    /// A transaction is open.
    Writing,
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
            open: RefCell::new(None),
            closed: Cell::new(false),
            segment: Cell::new(Segment::Clean),
        }
    }

    /// The object's name, if it has one and anybody ever called it by that name.
    pub fn name(&self) -> Result<Option<ObjectName>, StorageError> {
        if self.name.get().is_none() {
            // Opening reads the identity record.
            drop(self.open()?);
        }
        Ok(self.name.get().cloned())
    }

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

    fn savepoint(&self, sql: &str) -> Result<(), StorageError> {
        self.writing(|connection| prepare_ours(connection, sql)?.raw_execute().map(drop))
    }

    /// Bytes of the database, free pages included; 0 if the object never wrote.
    pub fn database_bytes(&self) -> Result<u64, StorageError> {
        let open = self.open()?;
        if !open.file {
            return Ok(0);
        }
        let pragma = |name: &str| {
            let found = open
                .connection
                .pragma_query_value(None, name, |row| row.get::<_, i64>(0));
            self.check(found, 0)
        };
        let bytes = pragma("page_count")? * pragma("page_size")?;
        Ok(u64::try_from(bytes).unwrap_or(0))
    }

    pub fn shard(&self) -> ShardId {
        self.identity.shard
    }

    /// Most bytes that the key and the value of a pair may have together.
    pub fn pair_bytes_max(&self) -> usize {
        self.config.value_bytes_max as usize
    }

    /// A stretch of a turn begins: SQL may run for its time again.
    pub fn begin_segment(&self) {
        debug_assert_eq!(self.segment.get(), Segment::Clean, "segments do not nest");
        self.guard.restart_clock();
    }

    /// The stretch is over and went well: what it wrote becomes durable, or an error says that it is
    /// gone. `true` if there was anything to commit.
    pub fn commit(&self) -> Result<bool, StorageError> {
        if self.segment.get() == Segment::Clean {
            return Ok(false);
        }
        let open = self.open.borrow();
        let connection = &open
            .as_ref()
            .expect("a transaction has a connection")
            .connection;
        if connection.is_autocommit() {
            // SQLite rolled back by itself: disk full, interrupted, out of memory.
            self.segment.set(Segment::Clean);
            return Err(StorageError::RolledBack);
        }
        let _trusted = self.guard.trusted();
        let committed = self.engine.commit(connection);
        if committed.is_err() {
            drop(open);
            self.rollback()?;
        }
        self.segment.set(Segment::Clean);
        self.check(committed, 0)?;
        Ok(true)
    }

    /// The stretch failed: nothing it wrote stays.
    pub fn rollback(&self) -> Result<(), StorageError> {
        if self.segment.replace(Segment::Clean) == Segment::Clean {
            return Ok(());
        }
        let open = self.open.borrow();
        let open = open.as_ref().expect("a transaction has a connection");
        // The identity record may have been part of it.
        open.identified.set(false);
        open.has_pairs.set(false);
        if open.connection.is_autocommit() {
            return Ok(());
        }
        let _trusted = self.guard.trusted();
        self.check(open.connection.execute_batch("ROLLBACK"), 0)
    }

    /// Closes the database, if it is open, for good: whatever of this copy of the object still runs
    /// gets errors. An unfinished transaction is rolled back.
    pub fn close(&self) {
        self.closed.set(true);
        let Some(open) = self.open.borrow_mut().take() else {
            return;
        };
        self.segment.set(Segment::Clean);
        if open.file {
            self.engine.close(&self.identity, open.connection);
        }
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
        let mut open = self.open()?;
        if !open.file {
            self.create_file(&mut open)?;
        }
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
        let existing = self.check(self.engine.open(&self.identity), 0)?;
        let file = existing.is_some();
        let mut connection = match existing {
            Some(connection) => connection,
            None => self.check(Connection::open_in_memory(), 0)?,
        };
        self.configure(&mut connection)?;
        let identified = file && self.read_identity(&connection)?;
        Ok(Open {
            connection,
            file,
            identified: Cell::new(identified),
            has_pairs: Cell::new(false),
        })
    }

    fn create_file(&self, open: &mut Open) -> Result<(), StorageError> {
        let mut connection = self.check(self.engine.create(&self.identity), 0)?;
        self.configure(&mut connection)?;
        open.connection = connection;
        open.file = true;
        Ok(())
    }

    fn begin_if_writing(&self, open: &Open, statement: &Statement<'_>) -> Result<(), StorageError> {
        if statement.readonly() {
            return Ok(());
        }
        self.begin(open)
    }

    fn begin(&self, open: &Open) -> Result<(), StorageError> {
        if self.segment.get() == Segment::Writing {
            if open.connection.is_autocommit() {
                // What follows would be committed by itself, without what came before it.
                return Err(StorageError::RolledBack);
            }
            return Ok(());
        }
        let _trusted = self.guard.trusted();
        let begun = prepare_ours(&open.connection, "BEGIN IMMEDIATE /* _dormouse_ */")
            .and_then(|mut begin| begin.raw_execute());
        self.check(begun, 0)?;
        self.segment.set(Segment::Writing);
        if !open.identified.get() {
            self.write_identity(&open.connection)?;
            open.identified.set(true);
        }
        Ok(())
    }

    /// Who this is, for tools that find the file: class, id and name.
    fn write_identity(&self, connection: &Connection) -> Result<(), StorageError> {
        let written = connection
            .execute_batch(
                "CREATE TABLE IF NOT EXISTS _dormouse_meta \
                 (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
            )
            .and_then(|()| {
                let mut put = prepare_ours(
                    connection,
                    "INSERT INTO _dormouse_meta (key, value) VALUES (?1, ?2) \
                     ON CONFLICT DO UPDATE SET value = excluded.value",
                )?;
                put.execute(["class", self.identity.class.as_str()])?;
                put.execute(["id", &self.identity.id.to_string()])?;
                if let Some(name) = self.name.get() {
                    put.execute(["name", name.as_str()])?;
                }
                Ok(())
            });
        self.check(written, 0)
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
            connection.set_prepared_statement_cache_capacity(STATEMENTS_CACHED);
            let pages =
                i64::try_from(self.config.database_bytes_max).unwrap_or(i64::MAX) / page_bytes;
            connection.pragma_update(None, "max_page_count", pages)?;
            connection.pragma_update(None, "foreign_keys", true)?;
            connection.pragma_update(None, "trusted_schema", false)?;
            connection.pragma_update(None, "temp_store", "MEMORY")?;
            functions::install(connection, self.config.value_bytes_max as usize)?;
            self.guard.install(connection)
        })();
        self.check(configured, 0)
    }

    fn check<T>(&self, result: rusqlite::Result<T>, at: usize) -> Result<T, StorageError> {
        result.map_err(|error| self.error(error, at))
    }

    /// `at` is where the prepared text begins in the text that the class gave.
    fn error(&self, error: rusqlite::Error, at: usize) -> StorageError {
        use rusqlite::ErrorCode as Code;
        if let rusqlite::Error::SqlInputError { msg, offset, .. } = &error {
            if let Some(reason) = self.guard.take_denial() {
                return StorageError::Denied(reason);
            }
            return StorageError::Sql {
                message: msg.clone(),
                at: usize::try_from(*offset).ok().map(|offset| at + offset),
            };
        }
        let message = error.to_string();
        match error.sqlite_error_code() {
            Some(Code::AuthorizationForStatementDenied) => {
                StorageError::Denied(self.guard.take_denial().unwrap_or(message))
            }
            Some(Code::OperationInterrupted) => StorageError::OutOfTime(self.config.turn_time_max),
            Some(Code::DiskFull) => StorageError::Full(message),
            Some(
                Code::CannotOpen
                | Code::SystemIoFailure
                | Code::DatabaseCorrupt
                | Code::NotADatabase
                | Code::DatabaseBusy
                | Code::DatabaseLocked
                | Code::FileLockingProtocolFailed
                | Code::ReadOnly
                | Code::PermissionDenied
                | Code::InternalMalfunction
                | Code::ApiMisuse
                | Code::OutOfMemory,
            ) => StorageError::Broken {
                object: self.identity.id,
                message,
            },
            _ => StorageError::Sql { message, at: None },
        }
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        self.close();
    }
}

/// Prepares one of our own statements, or takes it from the cache. Its text must name our prefix, if
/// only in a comment: SQL of classes with that prefix never comes from the cache, so a class that
/// gives the same text cannot get a statement that was authorized for us.
fn prepare_ours<'c>(
    connection: &'c Connection,
    sql: &str,
) -> rusqlite::Result<rusqlite::CachedStatement<'c>> {
    debug_assert!(authorizer::mentions_reserved(sql), "{sql:?}");
    connection.prepare_cached(sql)
}

#[cfg(test)]
mod tests;
