//! A database as the bytes of one SQLite file, on its way in or out of an object.

use protocol::{ObjectId, ObjectName};
use rusqlite::{Connection, OptionalExtension, params};

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
const JOURNAL_VERSIONS: std::ops::Range<usize> = 18..20;

/// A sound database, whole in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    page_bytes: usize,
    bytes: Vec<u8>,
    name: Option<ObjectName>,
}

/// Why bytes are no database that an object can have.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("{0} bytes are no SQLite database: it begins with \"SQLite format 3\"")]
    NotSqlite(usize),
    #[error(
        "the database breaks off: it has {bytes} bytes, which is no number of pages of {page_bytes}"
    )]
    Length { bytes: usize, page_bytes: usize },
    #[error("the database is damaged: {0}")]
    Damaged(String),
    #[error("the database cannot be read")]
    Sqlite(#[from] rusqlite::Error),
}

/// What becomes of the alarm in a database that an object takes over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeepAlarm {
    Yes,
    /// A copy under another name must not do again what the original does.
    No,
}

impl Image {
    /// Checks a file and makes it the database of `object`. Costs a read of all of it, so not on a
    /// worker's thread.
    pub fn import(
        mut bytes: Vec<u8>,
        object: &Identity,
        keep_alarm: KeepAlarm,
    ) -> Result<(Self, AlarmState), ImageError> {
        let page_bytes = check_header(&bytes)?;
        if !bytes.len().is_multiple_of(page_bytes) {
            return Err(ImageError::Length {
                bytes: bytes.len(),
                page_bytes,
            });
        }
        // Its write-ahead log, if it had one, was not sent along; what is here is a database by itself.
        bytes[JOURNAL_VERSIONS].fill(1);
        let mut connection = Connection::open_in_memory()?;
        let length = bytes.len();
        connection.deserialize_read_exact("main", bytes.as_slice(), length, false)?;
        drop(bytes);
        connection.pragma_update(None, "trusted_schema", false)?;
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
        let bytes = connection.serialize("main")?.to_vec();
        let image = Self {
            page_bytes,
            bytes,
            name,
        };
        Ok((image, alarm))
    }

    pub fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    pub fn pages(&self) -> impl Iterator<Item = &[u8]> {
        self.bytes.chunks_exact(self.page_bytes)
    }

    /// The object's name, as the database has it.
    pub fn name(&self) -> Option<&ObjectName> {
        self.name.as_ref()
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
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

/// The size of the pages of a database, if these bytes are one.
fn check_header(bytes: &[u8]) -> Result<usize, ImageError> {
    if bytes.len() < HEADER_BYTES || !bytes.starts_with(MAGIC) {
        return Err(ImageError::NotSqlite(bytes.len()));
    }
    let field = u16::from_be_bytes([bytes[PAGE_SIZE_AT], bytes[PAGE_SIZE_AT + 1]]);
    match field {
        1 => Ok(65536),
        page_bytes if page_bytes.is_power_of_two() && page_bytes >= 512 => Ok(page_bytes.into()),
        other => Err(ImageError::Damaged(format!(
            "its header says that pages have {other} bytes"
        ))),
    }
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
