//! A database as one SQLite file, on its way into an object.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use protocol::{ObjectId, ObjectName};
use rusqlite::{Connection, OpenFlags, OptionalExtension, params};
use tempfile::TempPath;

use super::Identity;
use super::alarm::{TABLE as ALARM_TABLE, stored_alarm};
use super::engine::prepare_ours;
use super::identity::{put_identity, stored_name};
use crate::alarm::{ALARM_MILLIS_MAX, AlarmState};

/// What every database begins with (<https://www.sqlite.org/fileformat.html#the_database_header>).
const MAGIC: &[u8; 16] = b"SQLite format 3\0";

const HEADER_BYTES: usize = 100;

/// Where the header says how large pages are, and how the file was written last: 1 with a rollback
/// journal, 2 with a write-ahead log.
const PAGE_SIZE_AT: usize = 16;
const JOURNAL_VERSIONS_AT: u64 = 18;

/// A sound database, in a file that goes with this.
#[derive(Debug)]
pub struct Image {
    file: TempPath,
    page_bytes: usize,
    bytes: u64,
    name: Option<ObjectName>,
}

/// Why bytes are no database that an object can have.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("{0} bytes are no SQLite database: it begins with \"SQLite format 3\"")]
    NotSqlite(u64),
    #[error(
        "the database breaks off: it has {bytes} bytes, which is no number of pages of {page_bytes}"
    )]
    Length { bytes: u64, page_bytes: usize },
    #[error("the database is damaged: {0}")]
    Damaged(String),
    #[error("the database cannot be read")]
    Sqlite(#[from] rusqlite::Error),
    #[error("the copy of the database cannot be written")]
    File(#[from] io::Error),
}

/// What becomes of the alarm in a database that an object takes over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeepAlarm {
    Yes,
    /// A copy under another name must not do again what the original does.
    No,
}

impl Image {
    /// Checks a file, which nobody else uses, and makes it the database of `object`. Costs a read of all of it,
    /// so not on a worker's thread.
    pub fn import(
        file: TempPath,
        object: &Identity,
        keep_alarm: KeepAlarm,
    ) -> Result<(Self, AlarmState), ImageError> {
        let page_bytes = prepare_header(&file)?;
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(&file, flags)?;
        // If this breaks off the file is of no use anyway.
        connection.execute_batch(
            "PRAGMA journal_mode = MEMORY; PRAGMA synchronous = OFF; \
             PRAGMA locking_mode = EXCLUSIVE; PRAGMA trusted_schema = OFF",
        )?;
        check_integrity(&connection)?;
        connection.execute_batch("BEGIN")?;
        // It may be another object's: only what leads to this one may stay.
        let kept = stored_name(&connection)?;
        let leads_here =
            |name: &ObjectName| ObjectId::named(&object.class, object.id.home(), name) == object.id;
        let name = object.name.clone().or(kept.filter(leads_here));
        connection.execute_batch("DROP TABLE IF EXISTS _dormouse_meta")?;
        let identity = Identity {
            name: name.clone(),
            ..object.clone()
        };
        put_identity(&connection, &identity)?;
        let alarm = match keep_alarm {
            KeepAlarm::Yes => stored_alarm(&connection)?.state,
            KeepAlarm::No => {
                prepare_ours(&connection, ALARM_TABLE)?.raw_execute()?;
                prepare_ours(&connection, "DELETE FROM _dormouse_alarm")?.execute([])?;
                disarm_schedules(&connection)?;
                AlarmState::default()
            }
        };
        let times = alarm
            .pending
            .map(|pending| pending.next_ms.max(pending.scheduled_ms));
        if let Some(time) = times.filter(|time| *time > ALARM_MILLIS_MAX) {
            return Err(ImageError::Damaged(format!(
                "its alarm at {time} ms is beyond the year 9999"
            )));
        }
        connection.execute_batch("COMMIT")?;
        connection.close().map_err(|(_, error)| error)?;
        let bytes = std::fs::metadata(&file)?.len();
        let image = Self {
            file,
            page_bytes,
            bytes,
            name,
        };
        Ok((image, alarm))
    }

    pub fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn file(&self) -> &Path {
        &self.file
    }

    /// All pages, one after the other.
    pub fn read(&self) -> io::Result<Vec<u8>> {
        std::fs::read(&self.file)
    }

    /// The object's name, as the database has it.
    pub fn name(&self) -> Option<&ObjectName> {
        self.name.as_ref()
    }
}

/// Schedules of a copy stay to be seen, and run when somebody says so.
fn disarm_schedules(connection: &Connection) -> rusqlite::Result<()> {
    let exists = "SELECT 1 FROM sqlite_schema WHERE name = '_dormouse_schedules'";
    if prepare_ours(connection, exists)?.exists([])? {
        let disarm = "UPDATE _dormouse_schedules SET next_ms = NULL, error = 'this is a copy'";
        prepare_ours(connection, disarm)?.execute([])?;
    }
    Ok(())
}

/// The size of the pages of a database, if the file is one.
fn prepare_header(path: &Path) -> Result<usize, ImageError> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let bytes = file.metadata()?.len();
    let mut header = [0; HEADER_BYTES];
    if bytes < HEADER_BYTES as u64 {
        return Err(ImageError::NotSqlite(bytes));
    }
    file.read_exact_at(&mut header, 0)?;
    if !header.starts_with(MAGIC) {
        return Err(ImageError::NotSqlite(bytes));
    }
    let field = u16::from_be_bytes([header[PAGE_SIZE_AT], header[PAGE_SIZE_AT + 1]]);
    let page_bytes: usize = match field {
        1 => 65536,
        page_bytes if page_bytes.is_power_of_two() && page_bytes >= 512 => page_bytes.into(),
        other => {
            return Err(ImageError::Damaged(format!(
                "its header says that pages have {other} bytes"
            )));
        }
    };
    if !bytes.is_multiple_of(page_bytes as u64) {
        return Err(ImageError::Length { bytes, page_bytes });
    }
    // Its write-ahead log, if it had one, was not sent along; what is here is a database by itself.
    file.write_all_at(&[1, 1], JOURNAL_VERSIONS_AT)?;
    Ok(page_bytes)
}

fn check_integrity(connection: &Connection) -> Result<(), ImageError> {
    let found: Option<String> = connection
        .query_row("PRAGMA integrity_check(1)", params![], |row| row.get(0))
        .optional()
        .map_err(|error| ImageError::Damaged(error.to_string()))?;
    match found.as_deref() {
        Some("ok") => Ok(()),
        other => Err(ImageError::Damaged(other.unwrap_or("no answer").to_owned())),
    }
}
