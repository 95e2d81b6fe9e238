//! The plain engine: every object a SQLite file in WAL mode, every commit an fsync.
//!
//! Durable and simple, and the baseline that a faster engine is measured against: with
//! `synchronous=FULL` each commit waits for the disk, and the worker with it.

use std::path::{Path, PathBuf};

use protocol::{LogPosition, ObjectId};
use rusqlite::{Connection, OpenFlags};
use tracing::warn;

use super::{Engine, Handle, Identity, Opened};

/// Files under `data/shards/{shard}/{2 hex}/{id}.db`.
#[derive(Debug)]
pub struct PlainFiles {
    shards: PathBuf,
}

impl PlainFiles {
    pub fn new(data_dir: &Path) -> Self {
        Self {
            shards: data_dir.join("shards"),
        }
    }

    /// Two digits of the digest spread a shard's files over 256 directories.
    fn path(&self, object: &Identity) -> PathBuf {
        let id = object.id.to_string();
        let mut path = self.shards.join(object.shard.to_string());
        path.push(&id[DIGEST_AT..DIGEST_AT + 2]);
        path.push(format!("{id}.db"));
        path
    }

    fn connect(path: &Path) -> rusqlite::Result<Connection> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_CREATE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags)?;
        // Nobody else opens the file while the node runs: no shared memory, no locks per transaction.
        connection.pragma_update(None, "locking_mode", "EXCLUSIVE")?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "temp_store", "MEMORY")?;
        Ok(connection)
    }
}

/// Where the digest begins in the text of an id: behind its kind and its home.
const DIGEST_AT: usize = 8;

impl Engine for PlainFiles {
    fn open(&self, object: &Identity) -> rusqlite::Result<Opened> {
        let path = self.path(object);
        let directory = path.parent().expect("a file lies in a directory");
        if !directory.exists() {
            create_synced(directory, 3).map_err(|error| cannot_open(object.id, &error))?;
        }
        Ok(Opened {
            connection: Self::connect(&path)?,
            handle: Box::new(PlainFile(path)),
        })
    }
}

struct PlainFile(PathBuf);

impl Handle for PlainFile {
    fn commit(
        &self,
        commit: &dyn Fn() -> rusqlite::Result<()>,
    ) -> rusqlite::Result<Option<LogPosition>> {
        commit()?;
        Ok(Some(LogPosition::ZERO))
    }

    fn close(self: Box<Self>, connection: Connection) {
        // The first commit of an object records who it is: without a table, there was no commit.
        let empty = connection
            .query_row(
                "SELECT NOT EXISTS (SELECT 1 FROM sqlite_schema)",
                [],
                |row| row.get(0),
            )
            .unwrap_or(false);
        let path = self.0.display();
        if let Err((_, error)) = connection.close() {
            // Every commit is in the write-ahead log; the next open reads it.
            warn!(%path, %error, "closing a database failed");
            return;
        }
        if empty && let Err(error) = std::fs::remove_file(&self.0) {
            warn!(%path, %error, "removing an empty database failed");
        }
    }
}

/// Creates a directory and up to `depth` parents, each durably: a power loss must not forget the name
/// of a directory that holds acknowledged data.
fn create_synced(directory: &Path, depth: usize) -> std::io::Result<()> {
    if depth == 0 || directory.exists() {
        return Ok(());
    }
    let parent = directory.parent().unwrap_or(Path::new("/"));
    create_synced(parent, depth - 1)?;
    match std::fs::create_dir(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    std::fs::File::open(parent)?.sync_all()
}

fn cannot_open(object: ObjectId, error: &std::io::Error) -> rusqlite::Error {
    rusqlite::Error::SqliteFailure(
        rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CANTOPEN),
        Some(format!("database of {object}: {error}")),
    )
}
