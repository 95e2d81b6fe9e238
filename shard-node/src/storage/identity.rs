//! Who an object is, as its database records it, for tools that find the file.

use protocol::{ClassName, ObjectId, ObjectName, ShardId};
use rusqlite::Connection;

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
