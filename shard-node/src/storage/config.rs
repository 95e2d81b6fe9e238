//! `[sql]`: what the SQL of one object may take; `[log]`: the commit log.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// `[sql]`: what the SQL of one object may take. The defaults are Cloudflare's documented limits
/// (<https://developers.cloudflare.com/durable-objects/platform/limits/>), but for the time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SqlConfig {
    /// How long SQL may run in one turn before the object is reset. All objects of the worker wait
    /// meanwhile.
    #[serde(with = "humantime_serde")]
    pub turn_time_max: Duration,
    /// Size of one object's database. At the limit writes fail with `storage_full`; reads still work.
    pub database_bytes_max: u64,
    /// Memory that one statement may take, for sorting and gathering. Beyond it the object is reset.
    pub memory_bytes_max: u64,
    /// Bytes of pages that one turn may write; it is held in memory until it is in the commit log.
    /// Beyond it the turn fails with `storage_full`.
    pub transaction_bytes_max: u64,
    /// One text, blob or row; also key plus value of a key-value pair.
    pub value_bytes_max: u32,
    pub statement_bytes_max: u32,
    pub columns_max: u32,
    pub parameters_max: u32,
    pub function_arguments_max: u32,
    /// The pattern of LIKE and GLOB.
    pub like_pattern_bytes_max: u32,
}

impl Default for SqlConfig {
    fn default() -> Self {
        Self {
            turn_time_max: Duration::from_secs(5),
            database_bytes_max: 10 << 30,
            memory_bytes_max: 128 << 20,
            transaction_bytes_max: 128 << 20,
            value_bytes_max: 2 << 20,
            statement_bytes_max: 100 << 10,
            columns_max: 100,
            parameters_max: 100,
            function_arguments_max: 32,
            like_pattern_bytes_max: 50,
        }
    }
}

impl SqlConfig {
    /// What SQLite was compiled to allow at the most
    /// (<https://www.sqlite.org/limits.html>); beyond it a setting would be cut silently.
    pub fn validate(&self) -> Result<(), String> {
        let bounds = [
            ("value_bytes_max", self.value_bytes_max, 1024, 1_000_000_000),
            (
                "statement_bytes_max",
                self.statement_bytes_max,
                1,
                1_000_000_000,
            ),
            ("columns_max", self.columns_max, 1, 2000),
            ("parameters_max", self.parameters_max, 1, 32_766),
            (
                "function_arguments_max",
                self.function_arguments_max,
                1,
                127,
            ),
            (
                "like_pattern_bytes_max",
                self.like_pattern_bytes_max,
                1,
                50_000,
            ),
        ];
        for (key, value, least, most) in bounds {
            if !(least..=most).contains(&value) {
                return Err(format!(
                    "sql.{key} = {value} must be from {least} to {most}"
                ));
            }
        }
        if self.database_bytes_max < 1 << 20 {
            return Err(format!(
                "sql.database_bytes_max = {} must be at least 1 MiB",
                self.database_bytes_max
            ));
        }
        if !((4 << 20)..=(1 << 30)).contains(&self.transaction_bytes_max) {
            return Err(format!(
                "sql.transaction_bytes_max = {} must be from 4 MiB to 1 GiB",
                self.transaction_bytes_max
            ));
        }
        if self.memory_bytes_max < 16 << 20 {
            return Err(format!(
                "sql.memory_bytes_max = {} must be at least 16 MiB",
                self.memory_bytes_max
            ));
        }
        if self.turn_time_max < Duration::from_millis(1)
            || self.turn_time_max > Duration::from_secs(300)
        {
            return Err(format!(
                "sql.turn_time_max = {:?} must be from 1ms to 5m",
                self.turn_time_max
            ));
        }
        Ok(())
    }
}

/// `[log]`: the commit log of each worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// Bytes after which a segment is full and the next one begins.
    pub segment_bytes: u64,
    /// Bytes of the log that may be needed for recovery, which bounds its time. At half of it the
    /// databases that were not written for longest are written to their files; at all of it new writes
    /// wait for that.
    pub live_bytes_max: u64,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            segment_bytes: 32 << 20,
            live_bytes_max: 256 << 20,
        }
    }
}

impl LogConfig {
    pub fn validate(&self) -> Result<(), String> {
        if !((1 << 20)..=(1 << 30)).contains(&self.segment_bytes) {
            return Err(format!(
                "log.segment_bytes = {} must be from 1 MiB to 1 GiB",
                self.segment_bytes
            ));
        }
        if self.live_bytes_max < 2 * self.segment_bytes {
            return Err(format!(
                "log.live_bytes_max = {} must be at least twice log.segment_bytes = {}, or every commit would wait for a checkpoint",
                self.live_bytes_max, self.segment_bytes
            ));
        }
        Ok(())
    }
}
