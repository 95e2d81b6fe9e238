//! What a coordinator keeps: SQL and nothing else.

use protocol::counters::{Place, Scope, Seat, Set, Strategy, Tally};

use super::{RESULT_BYTES, number, text, unsigned};
use crate::class::{ClassError, Context};
use crate::storage::{Rows, SqlValue};

/// `sets` are the shards of earlier plans. A shard in `retiring` is left out by the plan of that version, and its
/// total is not in the base yet; `drained` says up to which generation a shard's total is.
const SCHEMA: &str = "
    CREATE TABLE counter (version INTEGER NOT NULL, shards INTEGER NOT NULL, scope TEXT NOT NULL,
        strategy TEXT NOT NULL, report_every_ms INTEGER, auto INTEGER NOT NULL, base TEXT NOT NULL);
    CREATE TABLE sets (version INTEGER PRIMARY KEY, scope TEXT NOT NULL, shards INTEGER NOT NULL,
        until_ms INTEGER NOT NULL);
    CREATE TABLE places (place TEXT PRIMARY KEY) WITHOUT ROWID;
    CREATE TABLE shards (seat TEXT PRIMARY KEY, generation INTEGER NOT NULL, total INTEGER NOT NULL,
        turns INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE retiring (seat TEXT PRIMARY KEY, version INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE drained (seat TEXT PRIMARY KEY, version INTEGER NOT NULL) WITHOUT ROWID";

/// One row: the counter.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Settings {
    pub(super) version: u64,
    pub(super) shards: u32,
    pub(super) scope: Scope,
    pub(super) strategy: Strategy,
    pub(super) report_every_ms: Option<u64>,
    pub(super) auto: bool,
    /// What retired shards had counted.
    pub(super) base: i128,
}

/// A plan that was, and when it ended.
pub(super) struct Earlier {
    pub(super) scope: Scope,
    pub(super) shards: u32,
}

impl Earlier {
    pub(super) fn set(&self, place: Place) -> Set {
        Set {
            place: match self.scope {
                Scope::Global => Place::Anywhere,
                Scope::Colo => place,
            },
            shards: self.shards,
        }
    }
}

/// The tables of one coordinator.
pub(super) struct Table {
    pub(super) context: Context,
}

impl Table {
    pub(super) fn exists(&self) -> Result<bool, ClassError> {
        let found = self.sql(
            "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'counter'",
            &[],
        )?;
        Ok(!found.rows.is_empty())
    }

    pub(super) fn create(&self, settings: &Settings) -> Result<(), ClassError> {
        self.sql(SCHEMA, &[])?;
        self.sql(
            "INSERT INTO counter VALUES (0, 0, '', '', NULL, 0, '0')",
            &[],
        )?;
        self.write(settings)
    }

    pub(super) fn write(&self, settings: &Settings) -> Result<(), ClassError> {
        self.sql(
            "UPDATE counter SET version = ?1, shards = ?2, scope = ?3, strategy = ?4, \
             report_every_ms = ?5, auto = ?6, base = ?7",
            &[
                number(settings.version),
                i64::from(settings.shards).into(),
                word(settings.scope),
                word(settings.strategy),
                settings.report_every_ms.map_or(SqlValue::Null, number),
                i64::from(settings.auto).into(),
                text(settings.base),
            ],
        )?;
        Ok(())
    }

    pub(super) fn read(&self) -> Result<Option<Settings>, ClassError> {
        if !self.exists()? {
            return Ok(None);
        }
        let found = self.sql(
            "SELECT version, shards, scope, strategy, report_every_ms, auto, base FROM counter",
            &[],
        )?;
        let Some(
            [
                version,
                shards,
                scope,
                strategy,
                report_every_ms,
                auto,
                base,
            ],
        ) = found.rows.first().map(Vec::as_slice)
        else {
            return Err(damaged("counter"));
        };
        let settings = (|| {
            Some(Settings {
                version: unsigned(version)?,
                shards: u32::try_from(unsigned(shards)?).ok()?,
                scope: meaning(scope)?,
                strategy: meaning(strategy)?,
                report_every_ms: unsigned(report_every_ms),
                auto: unsigned(auto)? != 0,
                base: as_text(base)?.parse().ok()?,
            })
        })();
        settings.map(Some).ok_or_else(|| damaged("counter"))
    }

    /// The plan of that version gives way at that time.
    pub(super) fn end_set(&self, settings: &Settings, now_ms: u64) -> Result<(), ClassError> {
        self.sql(
            "INSERT INTO sets VALUES (?1, ?2, ?3, ?4)",
            &[
                number(settings.version),
                word(settings.scope),
                i64::from(settings.shards).into(),
                number(now_ms),
            ],
        )?;
        Ok(())
    }

    /// Plans that ended after `since_ms`, the latest first; those before are forgotten.
    pub(super) fn sets(&self, since_ms: u64) -> Result<Vec<Earlier>, ClassError> {
        let found = self.sql(
            "SELECT scope, shards FROM sets WHERE until_ms >= ?1 ORDER BY version DESC",
            &[number(since_ms)],
        )?;
        all(&found, "sets", |row| {
            let [scope, shards] = row else { return None };
            Some(Earlier {
                scope: meaning(scope)?,
                shards: u32::try_from(unsigned(shards)?).ok()?,
            })
        })
    }

    pub(super) fn forget_sets(&self, before_ms: u64) -> Result<(), ClassError> {
        self.sql("DELETE FROM sets WHERE until_ms < ?1", &[number(before_ms)])?;
        Ok(())
    }

    pub(super) fn places(&self) -> Result<Vec<Place>, ClassError> {
        let found = self.sql("SELECT place FROM places", &[])?;
        all(&found, "places", |row| as_text(row.first()?)?.parse().ok())
    }

    pub(super) fn add_place(&self, place: Place) -> Result<(), ClassError> {
        self.sql("INSERT INTO places VALUES (?1)", &[text(place)])?;
        Ok(())
    }

    pub(super) fn shards(&self) -> Result<Vec<(Seat, Tally)>, ClassError> {
        let found = self.sql("SELECT seat, generation, total, turns FROM shards", &[])?;
        all(&found, "shards", |row| {
            let [seat, generation, SqlValue::Integer(total), turns] = row else {
                return None;
            };
            let tally = Tally {
                generation: Some(unsigned(generation)?),
                total: *total,
                turns: unsigned(turns)?,
            };
            Some((as_text(seat)?.parse().ok()?, tally))
        })
    }

    pub(super) fn put_shard(&self, seat: Seat, tally: &Tally) -> Result<(), ClassError> {
        self.sql(
            "INSERT INTO shards VALUES (?1, ?2, ?3, ?4) ON CONFLICT (seat) DO UPDATE \
             SET generation = ?2, total = ?3, turns = ?4",
            &[
                text(seat),
                number(tally.generation.unwrap_or(0)),
                tally.total.into(),
                number(tally.turns),
            ],
        )?;
        Ok(())
    }

    pub(super) fn retiring(&self) -> Result<Vec<(Seat, u64)>, ClassError> {
        let found = self.sql("SELECT seat, version FROM retiring", &[])?;
        all(&found, "retiring", seat_and_version)
    }

    pub(super) fn retire(&self, seat: Seat, version: u64) -> Result<(), ClassError> {
        self.sql(
            "INSERT INTO retiring VALUES (?1, ?2) ON CONFLICT (seat) DO UPDATE SET version = ?2",
            &[text(seat), number(version)],
        )?;
        Ok(())
    }

    pub(super) fn drained(&self) -> Result<Vec<(Seat, u64)>, ClassError> {
        let found = self.sql("SELECT seat, version FROM drained", &[])?;
        all(&found, "drained", seat_and_version)
    }

    /// The shard's total is in the base now.
    pub(super) fn drain(&self, seat: Seat, version: u64, base: i128) -> Result<(), ClassError> {
        self.sql("DELETE FROM shards WHERE seat = ?1", &[text(seat)])?;
        self.sql("DELETE FROM retiring WHERE seat = ?1", &[text(seat)])?;
        self.sql(
            "INSERT INTO drained VALUES (?1, ?2) ON CONFLICT (seat) DO UPDATE SET version = ?2",
            &[text(seat), number(version)],
        )?;
        self.sql("UPDATE counter SET base = ?1", &[text(base)])?;
        Ok(())
    }

    fn sql(&self, sql: &str, values: &[SqlValue]) -> Result<Rows, ClassError> {
        Ok(self.context.storage().exec(sql, values, RESULT_BYTES)?)
    }
}

fn seat_and_version(row: &[SqlValue]) -> Option<(Seat, u64)> {
    let [seat, version] = row else { return None };
    Some((as_text(seat)?.parse().ok()?, unsigned(version)?))
}

fn all<T>(
    found: &Rows,
    table: &str,
    read: impl Fn(&[SqlValue]) -> Option<T>,
) -> Result<Vec<T>, ClassError> {
    let rows = found.rows.iter();
    rows.map(|row| read(row).ok_or_else(|| damaged(table)))
        .collect()
}

fn damaged(table: &str) -> ClassError {
    ClassError::Thrown {
        name: "Error".to_owned(),
        message: format!("the table {table} of this counter has a row that makes no sense"),
    }
}

fn as_text(value: &SqlValue) -> Option<&str> {
    match value {
        SqlValue::Text(text) => Some(text),
        _ => None,
    }
}

/// The word of an enum, as in JSON.
fn word(value: impl serde::Serialize) -> SqlValue {
    let word = serde_json::to_value(value).ok();
    SqlValue::Text(
        word.and_then(|word| Some(word.as_str()?.to_owned()))
            .unwrap_or_default(),
    )
}

fn meaning<T: serde::de::DeserializeOwned>(value: &SqlValue) -> Option<T> {
    serde_json::from_value(as_text(value)?.into()).ok()
}
