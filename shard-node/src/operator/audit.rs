//! What operators did to an object, kept in its own database.

use serde_json::Value as Json;

use crate::storage::{SqlValue, Storage, StorageError};

/// Operations that are kept; older ones make room.
const KEPT: i64 = 100;

const TABLE: &str = "CREATE TABLE IF NOT EXISTS _dormouse_operations (
    number INTEGER PRIMARY KEY, at_ms INTEGER NOT NULL, what TEXT NOT NULL, who TEXT NOT NULL,
    why TEXT NOT NULL, detail TEXT NOT NULL)";

/// Notes an operation, in the transaction that does it.
pub(super) fn note(
    storage: &Storage,
    now: u64,
    what: &str,
    who: &str,
    why: &str,
    detail: &str,
) -> Result<(), StorageError> {
    let text = |text: &str| SqlValue::Text(text.to_owned());
    let values = [
        SqlValue::Integer(i64::try_from(now).unwrap_or(i64::MAX)),
        text(what),
        text(who),
        text(why),
        text(detail),
    ];
    storage.write_ours(TABLE, &[])?;
    storage.write_ours(
        "INSERT INTO _dormouse_operations (at_ms, what, who, why, detail) VALUES (?, ?, ?, ?, ?)",
        &values,
    )?;
    storage.write_ours(
        "DELETE FROM _dormouse_operations \
         WHERE number <= (SELECT max(number) FROM _dormouse_operations) - ?",
        &[SqlValue::Integer(KEPT)],
    )
}

/// What was done, the latest first.
pub(super) fn list(storage: &Storage) -> Result<Json, StorageError> {
    if !storage.has_table_of_ours("_dormouse_operations")? {
        return Ok(Json::Array(Vec::new()));
    }
    let operations = storage.read_ours(
        "SELECT at_ms, what, who, why, detail FROM _dormouse_operations ORDER BY number DESC",
        &[],
        |row| {
            Ok(serde_json::json!({
                "at_ms": row.get::<_, i64>(0)?,
                "what": row.get::<_, String>(1)?,
                "who": row.get::<_, String>(2)?,
                "why": row.get::<_, String>(3)?,
                "detail": row.get::<_, String>(4)?,
            }))
        },
    )?;
    Ok(Json::Array(operations))
}

/// Notes again what was done before, the latest first: the database may be another, which knows less.
pub(super) fn keep(storage: &Storage, operations: &Json) -> Result<(), StorageError> {
    storage.write_ours("DROP TABLE IF EXISTS _dormouse_operations", &[])?;
    for operation in operations.as_array().into_iter().flatten().rev() {
        let text = |field: &str| operation[field].as_str().unwrap_or_default();
        let at_ms = operation["at_ms"].as_u64().unwrap_or(0);
        let (what, who) = (text("what"), text("who"));
        note(storage, at_ms, what, who, text("why"), text("detail"))?;
    }
    Ok(())
}
