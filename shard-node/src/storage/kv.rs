//! Key-value pairs of one object, in a hidden table of its database: one transaction with its SQL.
//!
//! The operations and their limits are Cloudflare's storage API
//! (<https://developers.cloudflare.com/durable-objects/api/sqlite-storage-api/#synchronous-kv-api>).

use rusqlite::OptionalExtension;
use rusqlite::limits::Limit;
use rusqlite::types::ValueRef;
use serde::Deserialize;

use super::{Storage, StorageError, prepare_ours};

/// Longest key, in bytes of UTF-8.
pub const KEY_BYTES_MAX: usize = 2048;

/// Most keys in one batch.
pub const BATCH_KEYS_MAX: usize = 128;

/// Room for the row around key and value.
const ROW_OVERHEAD_BYTES: u32 = 4096;

/// Why a pair was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KvError {
    #[error("a key must not be empty")]
    EmptyKey,
    #[error("key of {0} bytes is longer than {KEY_BYTES_MAX}")]
    KeyTooLong(usize),
    #[error("key and value of together {bytes} bytes are larger than {max}")]
    PairTooLarge { bytes: usize, max: u32 },
    #[error("a batch of {0} keys is larger than {BATCH_KEYS_MAX}")]
    BatchTooLarge(usize),
}

/// A stored value with its media type, where it was given one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub key: String,
    pub media_type: Option<String>,
    pub value: Vec<u8>,
}

/// Which keys to list, in the order of their UTF-8 bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub struct ListOptions {
    pub prefix: Option<String>,
    /// First key, inclusive.
    pub start: Option<String>,
    /// Last key before the first, exclusive. Not together with `start`.
    pub start_after: Option<String>,
    /// End of the range, exclusive.
    pub end: Option<String>,
    pub limit: Option<u32>,
    /// Descending order; the range stays the same.
    pub reverse: bool,
}

impl Storage {
    /// The value of `key`.
    pub fn kv_get(&self, key: &str) -> Result<Option<Entry>, StorageError> {
        check_key(key)?;
        let found = self.pair(key)?;
        let bytes = found.as_ref().map(|found| key.len() + found.value.len());
        self.meter.pairs_read(1, bytes.unwrap_or(0));
        Ok(found)
    }

    fn pair(&self, key: &str) -> Result<Option<Entry>, StorageError> {
        if !self.has_pairs()? {
            return Ok(None);
        }
        self.reading(|connection| {
            prepare_ours(
                connection,
                "SELECT media_type, value FROM _dormouse_kv WHERE key = ?1",
            )?
            .query_row([key], |row| {
                Ok(Entry {
                    key: key.to_owned(),
                    media_type: row.get(0)?,
                    value: row.get(1)?,
                })
            })
            .optional()
        })
    }

    /// Stores `value` under `key`; `true` if the key is new.
    pub fn kv_put(
        &self,
        key: &str,
        media_type: Option<&str>,
        value: &[u8],
    ) -> Result<bool, StorageError> {
        check_key(key)?;
        let bytes = key.len() + value.len();
        let max = self.config.value_bytes_max;
        if bytes > max as usize {
            return Err(KvError::PairTooLarge { bytes, max }.into());
        }
        self.create_pairs()?;
        self.meter.pair_written(bytes);
        self.writing(|connection| {
            // The limit on a value counts the whole row; ours counts key and value alone.
            let raised = i32::try_from(max.saturating_add(ROW_OVERHEAD_BYTES)).unwrap_or(i32::MAX);
            let before = connection.set_limit(Limit::SQLITE_LIMIT_LENGTH, raised)?;
            let written = (|| {
                let new = prepare_ours(connection, "SELECT 1 FROM _dormouse_kv WHERE key = ?1")?
                    .query_row([key], |_| Ok(()))
                    .optional()?
                    .is_none();
                prepare_ours(
                    connection,
                    "INSERT INTO _dormouse_kv (key, media_type, value) VALUES (?1, ?2, ?3) \
                     ON CONFLICT DO UPDATE \
                     SET media_type = excluded.media_type, value = excluded.value",
                )?
                .execute((key, media_type, value))?;
                Ok(new)
            })();
            connection.set_limit(Limit::SQLITE_LIMIT_LENGTH, before)?;
            written
        })
    }

    /// Removes `key`; `true` if it was there.
    pub fn kv_delete(&self, key: &str) -> Result<bool, StorageError> {
        check_key(key)?;
        let deleted = match self.has_pairs()? {
            false => false,
            true => self.writing(|connection| {
                let delete = "DELETE FROM _dormouse_kv WHERE key = ?1";
                let deleted = prepare_ours(connection, delete)?.execute([key])?;
                Ok(deleted > 0)
            })?,
        };
        self.meter.pair_deleted(deleted);
        Ok(deleted)
    }

    /// Calls `each` with key, media type and value of every pair in the range, in order, until it
    /// returns `false`.
    pub fn kv_list(
        &self,
        options: &ListOptions,
        mut each: impl FnMut(&str, Option<&str>, &[u8]) -> bool,
    ) -> Result<(), StorageError> {
        self.kv_scan(options, "value", |key, media_type, value| {
            Ok(each(key, media_type, value.as_blob()?))
        })
    }

    /// The same with the length of each value, in bytes, instead of the value itself.
    pub fn kv_index(
        &self,
        options: &ListOptions,
        mut each: impl FnMut(&str, Option<&str>, i64) -> bool,
    ) -> Result<(), StorageError> {
        self.kv_scan(options, "length(value)", |key, media_type, bytes| {
            Ok(each(key, media_type, bytes.as_i64()?))
        })
    }

    fn kv_scan(
        &self,
        options: &ListOptions,
        what: &str,
        mut each: impl FnMut(&str, Option<&str>, ValueRef<'_>) -> rusqlite::Result<bool>,
    ) -> Result<(), StorageError> {
        if !self.has_pairs()? {
            return Ok(());
        }
        let prefix = options.prefix.as_deref().unwrap_or("");
        let after = options.start_after.as_deref();
        // The least key that may be in the range; `start_after` excludes its own key.
        let least = [Some(prefix), options.start.as_deref(), after]
            .into_iter()
            .flatten()
            .max()
            .unwrap_or("");
        // Keys are UTF-8, so no key lies between a prefix and this bound but those with the prefix.
        let beyond_prefix = successor(prefix);
        let end = [
            options.end.as_deref().map(str::as_bytes),
            beyond_prefix.as_deref(),
        ]
        .into_iter()
        .flatten()
        .min();
        // A bound that could be absent would keep SQLite from stopping at it: hence a text each.
        let below = if end.is_some() {
            "key < CAST(?2 AS TEXT)"
        } else {
            "?2 IS NULL"
        };
        let order = if options.reverse { "DESC" } else { "ASC" };
        let sql = format!(
            "SELECT key, media_type, {what} FROM _dormouse_kv \
             WHERE key >= ?1 AND {below} ORDER BY key {order}"
        );
        let (mut pairs, mut bytes) = (0, 0);
        let listed = self.reading(|connection| {
            let mut statement = prepare_ours(connection, &sql)?;
            let mut rows = statement.query((least, end))?;
            let mut left = options.limit.unwrap_or(u32::MAX);
            while left > 0
                && let Some(row) = rows.next()?
            {
                let key = row.get_ref(0)?.as_str()?;
                if after == Some(key) {
                    continue;
                }
                let media_type = match row.get_ref(1)? {
                    ValueRef::Null => None,
                    text => Some(text.as_str()?),
                };
                let value = row.get_ref(2)?;
                pairs += 1;
                bytes += key.len() + value.as_blob().map_or(0, <[u8]>::len);
                if !each(key, media_type, value)? {
                    break;
                }
                left -= 1;
            }
            Ok(())
        });
        self.meter.pairs_read(pairs, bytes);
        listed
    }

    /// Whether anything was ever put.
    fn has_pairs(&self) -> Result<bool, StorageError> {
        let open = self.open()?;
        if !open.has_pairs.get() && self.may_have_tables(&open) {
            let found = prepare_ours(
                &open.connection,
                "SELECT 1 FROM sqlite_schema WHERE name = '_dormouse_kv'",
            )
            .and_then(|mut statement| statement.exists([]));
            open.has_pairs.set(self.check(found, 0)?);
        }
        Ok(open.has_pairs.get())
    }

    fn create_pairs(&self) -> Result<(), StorageError> {
        if self.has_pairs()? {
            return Ok(());
        }
        self.writing(|connection| {
            connection.execute_batch(
                "CREATE TABLE _dormouse_kv \
                 (key TEXT PRIMARY KEY, media_type TEXT, value BLOB NOT NULL) WITHOUT ROWID",
            )
        })?;
        self.open()?.has_pairs.set(true);
        Ok(())
    }
}

pub(super) fn check_key(key: &str) -> Result<(), KvError> {
    if key.is_empty() {
        Err(KvError::EmptyKey)
    } else if key.len() > KEY_BYTES_MAX {
        Err(KvError::KeyTooLong(key.len()))
    } else {
        Ok(())
    }
}

/// The least byte string above every string with this prefix; `None` if there is no such bound.
pub(crate) fn successor(prefix: &str) -> Option<Vec<u8>> {
    let mut bytes = prefix.as_bytes().to_vec();
    while let Some(last) = bytes.pop() {
        if last < 0xff {
            bytes.push(last + 1);
            return Some(bytes);
        }
    }
    None
}
