//! Steps that must not happen twice, however often they are asked for.

use std::time::Duration;

use serde_json::Value as Json;

use super::{ClassError, Context, clip};
use crate::storage::SqlValue;

const TABLE: &str = "CREATE TABLE IF NOT EXISTS _dormouse_once (
    key TEXT PRIMARY KEY, answer TEXT NOT NULL, until_ms INTEGER NOT NULL) WITHOUT ROWID";

const INDEX: &str =
    "CREATE INDEX IF NOT EXISTS _dormouse_once_by_time ON _dormouse_once (until_ms)";

/// Keys that are forgotten with each step, so that the table never grows by more than it shrinks.
const FORGOTTEN_AT_ONCE: i64 = 8;

const KEY_BYTES_MAX: usize = 256;

impl Context {
    /// Runs `step` unless it has succeeded under this key before, and gives its answer of then. What the step
    /// writes and that it happened are in one commit; if it fails it has not happened. The key, a
    /// transaction of a saga or what a client calls `Idempotency-Key`, is remembered for `keep_for`.
    ///
    /// # Errors
    /// The step's own; the key is empty or longer than 256 bytes.
    pub fn once(
        &self,
        key: &str,
        keep_for: Duration,
        step: impl FnOnce() -> Result<Json, ClassError>,
    ) -> Result<Json, ClassError> {
        if key.is_empty() || key.len() > KEY_BYTES_MAX {
            return Err(ClassError::BadRequest(format!(
                "the key {:?} of a step must have 1 to {KEY_BYTES_MAX} bytes",
                clip(key)
            )));
        }
        let storage = self.storage();
        let now = self.unix_millis();
        let until = now.saturating_add(u64::try_from(keep_for.as_millis()).unwrap_or(u64::MAX));
        let integer = |value: u64| SqlValue::Integer(i64::try_from(value).unwrap_or(i64::MAX));
        let text = |text: &str| SqlValue::Text(text.to_owned());
        if storage.has_table_of_ours("_dormouse_once")? {
            let found = storage.read_ours(
                "SELECT answer FROM _dormouse_once WHERE key = ? AND until_ms > ?",
                &[text(key), integer(now)],
                |row| row.get::<_, String>(0),
            )?;
            if let Some(answer) = found.first() {
                return serde_json::from_str(answer).map_err(|error| ClassError::Thrown {
                    name: "Error".to_owned(),
                    message: format!("the answer kept for {:?} is no JSON: {error}", clip(key)),
                });
            }
        }
        storage.transaction(|| {
            let answer = step()?;
            storage.write_ours(TABLE, &[])?;
            storage.write_ours(INDEX, &[])?;
            storage.write_ours(
                "DELETE FROM _dormouse_once WHERE key IN \
                 (SELECT key FROM _dormouse_once WHERE until_ms <= ? ORDER BY until_ms LIMIT ?)",
                &[integer(now), SqlValue::Integer(FORGOTTEN_AT_ONCE)],
            )?;
            storage.write_ours(
                "INSERT OR REPLACE INTO _dormouse_once VALUES (?, ?, ?)",
                &[text(key), text(&answer.to_string()), integer(until)],
            )?;
            Ok(answer)
        })
    }
}
