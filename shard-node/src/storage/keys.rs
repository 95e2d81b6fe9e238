//! How many keys and rows an object has: pairs, and rows of its tables, together.

use rusqlite::{Connection, OptionalExtension};

use super::{Storage, StorageError};

/// Keys and rows are counted up to here: beyond it is too many, whatever their number.
pub const KEYS_COUNTED: u32 = ops::advisor::KEYS_RED_MAX + 1;

/// A database of so few pages has one for all its rows at the most, and is not worth a look: one for the schema,
/// one for whose it is.
const PAGES_NOT_COUNTED: i64 = 3;

impl Storage {
    /// Keys and rows of the object, up to [`KEYS_COUNTED`]. Takes some ten microseconds, or a few hundred for
    /// many rows; tables are read no further than needed.
    pub(crate) fn count_keys(&self) -> Result<u32, StorageError> {
        self.guard.restart_clock();
        self.reading(count)
    }
}

fn count(connection: &Connection) -> rusqlite::Result<u32> {
    let pages: i64 = connection.pragma_query_value(None, "page_count", |row| row.get(0))?;
    if pages <= PAGES_NOT_COUNTED {
        return Ok(0);
    }
    // Virtual tables have no root; the tables that hold their rows do.
    let mut select = connection.prepare(
        "SELECT name FROM sqlite_schema WHERE type = 'table' AND rootpage > 0 \
         AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' \
         AND (name = '_dormouse_kv' OR name NOT LIKE '\\_dormouse\\_%' ESCAPE '\\')",
    )?;
    let tables: Vec<String> = select
        .query_map([], |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    drop(select);
    let mut keys = 0;
    for table in tables {
        if keys >= KEYS_COUNTED {
            break;
        }
        let table = table.replace('"', "\"\"");
        let left = KEYS_COUNTED - keys;
        let sql = format!("SELECT count(*) FROM (SELECT 1 FROM \"{table}\" LIMIT {left})");
        let found: Option<u32> = connection
            .prepare(&sql)?
            .query_row([], |row| row.get(0))
            .optional()?;
        keys += found.unwrap_or(0);
    }
    Ok(keys)
}
