//! Who an object is, as its database records it, for tools that find the file.

use protocol::{ClassName, ObjectId, ObjectName, ShardId};
use rusqlite::{Connection, OptionalExtension};

use super::engine::prepare_ours;

/// Class, id and name of an object, and its shard.
#[derive(Debug, Clone)]
pub struct Identity {
    pub id: ObjectId,
    pub class: ClassName,
    pub name: Option<ObjectName>,
    pub shard: ShardId,
}

/// Writes class, id and name into a database, in the open transaction.
pub(super) fn put_identity(connection: &Connection, object: &Identity) -> rusqlite::Result<()> {
    connection.execute_batch(
        "CREATE TABLE IF NOT EXISTS _dormouse_meta \
         (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    )?;
    let mut put = prepare_ours(
        connection,
        "INSERT INTO _dormouse_meta (key, value) VALUES (?1, ?2) \
         ON CONFLICT DO UPDATE SET value = excluded.value",
    )?;
    put.execute(["class", object.class.as_str()])?;
    put.execute(["id", &object.id.to_string()])?;
    if let Some(name) = &object.name {
        put.execute(["name", name.as_str()])?;
    }
    Ok(())
}

/// The name that a database has for its object; it may have no identity at all.
pub(super) fn stored_name(connection: &Connection) -> rusqlite::Result<Option<ObjectName>> {
    let exists = "SELECT 1 FROM sqlite_schema WHERE name = '_dormouse_meta'";
    if !prepare_ours(connection, exists)?.exists([])? {
        return Ok(None);
    }
    let name = "SELECT value FROM _dormouse_meta WHERE key = 'name'";
    let found: Option<String> = prepare_ours(connection, name)?
        .query_row([], |row| row.get(0))
        .optional()?;
    Ok(found.and_then(|name| name.parse().ok()))
}
