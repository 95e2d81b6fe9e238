//! The end of everything an object has, from inside.

use rusqlite::Connection;
use rusqlite::config::DbConfig;
use tracing::warn;

use super::{Open, Storage, StorageError};

/// Tables that outlive it: whose object it is, its alarm, and what operators did to it.
const KEPT: [&str; 3] = ["_dormouse_meta", "_dormouse_alarm", "_dormouse_operations"];

impl Storage {
    /// Deletes all tables, views and pairs of the object, in the transaction of this turn; the alarm stays. If
    /// nothing is written after it, the database is gone with the object's sleep
    /// (<https://developers.cloudflare.com/durable-objects/api/sqlite-storage-api/#deleteall>).
    pub(crate) fn delete_tables(&self) -> Result<(), StorageError> {
        self.writing(|connection| {
            // Tables go in any order, whatever refers to them; this takes effect inside a transaction, too.
            connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_FKEY, false)?;
            let dropped = drop_all(connection);
            connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_FKEY, true)?;
            dropped
        })?;
        self.open()?.has_pairs.set(false);
        self.emptied.set(true);
        Ok(())
    }

    /// Whether nothing is left but the object's identity, after a call of the above.
    pub(super) fn is_left_empty(&self, open: &Open) -> bool {
        if !self.emptied.get() || !open.handle.is_stored() {
            return false;
        }
        let _trusted = self.guard.trusted();
        let left = only_kept(&open.connection);
        left.unwrap_or_else(|error| {
            warn!(object = %self.identity.id, %error, "whether a database is empty could not be read");
            false
        })
    }
}

fn drop_all(connection: &Connection) -> rusqlite::Result<()> {
    // Virtual tables take their own tables along.
    let mut select = connection.prepare(
        "SELECT type, name FROM sqlite_schema \
         WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' \
         ORDER BY type = 'view' DESC, sql LIKE 'create virtual%' DESC",
    )?;
    let found: Vec<(String, String)> = select
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<rusqlite::Result<_>>()?;
    drop(select);
    for (kind, name) in found {
        if !KEPT.contains(&name.as_str()) {
            let name = name.replace('"', "\"\"");
            connection.execute_batch(&format!("DROP {kind} IF EXISTS \"{name}\""))?;
        }
    }
    // SQLite's own: numbers that AUTOINCREMENT gave, statistics.
    let own = "SELECT name FROM sqlite_schema \
               WHERE type = 'table' AND name LIKE 'sqlite\\_%' ESCAPE '\\'";
    for name in names(connection, own)? {
        connection.execute_batch(&format!("DELETE FROM \"{name}\""))?;
    }
    Ok(())
}

fn only_kept(connection: &Connection) -> rusqlite::Result<bool> {
    let left = "SELECT name FROM sqlite_schema WHERE type IN ('table', 'view') \
                AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' AND name <> '_dormouse_meta'";
    for table in names(connection, left)? {
        if table != "_dormouse_alarm" {
            return Ok(false);
        }
        let set = "SELECT 1 FROM _dormouse_alarm WHERE next_ms IS NOT NULL OR dead_ms IS NOT NULL";
        if connection.prepare(set)?.exists([])? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn names(connection: &Connection, select: &str) -> rusqlite::Result<Vec<String>> {
    let mut select = connection.prepare(select)?;
    select.query_map([], |row| row.get(0))?.collect()
}
