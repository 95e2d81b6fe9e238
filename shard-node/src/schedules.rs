//! Many named schedules on the one alarm of an object.
//!
//! A native class keeps a [`Schedules`], adds one-shot and cron schedules to it, and from
//! [`Instance::alarm`](crate::class::Instance::alarm) returns [`Schedules::run`]. The schedules are rows of
//! the object's own database; the alarm is always set to the first of them.
//!
//! What an item does and its removal, or its next time, are in one commit. An item that fails is undone
//! alone, and tried again after 2, 4, … 64 s, as alarms are; then it is kept as failed (a cron schedule goes
//! on with its next time). So no item ever blocks another. If a handler breaks the whole turn (a panic, SQL
//! beyond its time), the next try runs items one by one, each counted before it begins.
//!
//! An item runs at least once: again if the node dies between what the item did elsewhere and the commit.
//! [`Due::key`] is the same for each such try, for whoever must not do it twice.

use std::rc::Rc;
use std::str::FromStr;

use chrono::{DateTime, Utc};
use chrono_tz::Tz;
use croner::parser::{CronParser, Seconds, Year};
use serde::Serialize;
use serde_json::Value as Json;

use crate::alarm::{AlarmInfo, RETRIES_MAX, RETRY_FIRST};
use crate::class::{ClassError, Context, Turn};
use crate::storage::SqlValue;

/// Items that one turn runs at the most; others of the object have their turn before the next ones.
pub const ITEMS_PER_TURN: usize = 50;

/// An occurrence that is later than this was missed: the object could not be woken.
const MISSED_AFTER_MS: u64 = 60_000;

const TABLE: &str = "CREATE TABLE IF NOT EXISTS _dormouse_schedules (
    name TEXT PRIMARY KEY, due_ms INTEGER NOT NULL, next_ms INTEGER, retries INTEGER NOT NULL,
    cron TEXT, zone TEXT, missed TEXT, payload TEXT NOT NULL, failed_ms INTEGER, error TEXT
) WITHOUT ROWID";

const COLUMNS: &str =
    "name, due_ms, next_ms, retries, cron, zone, missed, payload, failed_ms, error";

/// What becomes of times of a cron schedule that passed while the object could not be woken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Missed {
    /// All of them together are one run, late.
    #[default]
    Once,
    /// None of them runs.
    Skip,
    /// Each of them runs, one after the other.
    All,
}

impl Missed {
    fn name(self) -> &'static str {
        match self {
            Self::Once => "once",
            Self::Skip => "skip",
            Self::All => "all",
        }
    }

    fn of(name: Option<&str>) -> Self {
        match name {
            Some("skip") => Self::Skip,
            Some("all") => Self::All,
            _ => Self::Once,
        }
    }
}

/// One schedule, as it is stored. Times are milliseconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Schedule {
    pub name: String,
    /// What it is for next.
    pub due_ms: u64,
    /// When it runs next: then, or later for another try; never again if it failed for good.
    pub next_ms: Option<u64>,
    pub retries: u32,
    pub cron: Option<String>,
    pub zone: Option<String>,
    pub missed: Missed,
    pub payload: Json,
    /// When it was last given up, and why.
    pub failed_ms: Option<u64>,
    pub error: Option<String>,
}

/// What a handler is told of the item that is due.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Due {
    pub name: String,
    /// When it was to run; milliseconds since 1970.
    pub due_ms: u64,
    /// Tries of this item before this one that failed.
    pub retry_count: u32,
    pub payload: Json,
}

impl Due {
    /// The same for every try of one run, and for no other run.
    pub fn key(&self) -> String {
        format!("{}@{}", self.name, self.due_ms)
    }
}

/// What runs an item. Synchronous: what it writes is one with the item's end.
pub type Handler = dyn Fn(&Due) -> Result<(), ClassError>;

/// The schedules of one object.
#[derive(Clone)]
pub struct Schedules {
    context: Context,
}

impl Schedules {
    pub fn new(context: Context) -> Self {
        Self { context }
    }

    /// Runs `name` once, at this time. Replaces any schedule of that name.
    pub fn once(&self, name: &str, at_ms: u64, payload: Json) -> Result<(), ClassError> {
        self.put(&Schedule {
            name: name.to_owned(),
            due_ms: at_ms,
            next_ms: Some(at_ms),
            retries: 0,
            cron: None,
            zone: None,
            missed: Missed::Once,
            payload,
            failed_ms: None,
            error: None,
        })
    }

    /// Runs `name` at every time that a cron pattern gives (minute, hour, day of month, month, day of week;
    /// a sixth field in front is seconds) in a time zone such as `Europe/Berlin`. Replaces any schedule of
    /// that name. A time that daylight saving skips runs right after the gap; one that comes twice runs once.
    ///
    /// # Errors
    /// Pattern or zone is not one, or the pattern never comes.
    pub fn cron(
        &self,
        name: &str,
        pattern: &str,
        zone: &str,
        missed: Missed,
        payload: Json,
    ) -> Result<(), ClassError> {
        let now = self.context.unix_millis();
        let due_ms = occurrence_after(pattern, zone, now)?.ok_or_else(|| {
            ClassError::BadRequest(format!("cron {pattern:?} in {zone:?}: it never comes"))
        })?;
        self.put(&Schedule {
            name: name.to_owned(),
            due_ms,
            next_ms: Some(due_ms),
            retries: 0,
            cron: Some(pattern.to_owned()),
            zone: Some(zone.to_owned()),
            missed,
            payload,
            failed_ms: None,
            error: None,
        })
    }

    /// Removes a schedule; `true` if there was one.
    pub fn cancel(&self, name: &str) -> Result<bool, ClassError> {
        let existed = self.find(name)?.is_some();
        if existed {
            self.remove(name)?;
            self.arm()?;
        }
        Ok(existed)
    }

    /// Runs an item again that was given up; `true` if there was one.
    pub fn retry(&self, name: &str) -> Result<bool, ClassError> {
        let Some(schedule) = self.find(name)?.filter(|found| found.next_ms.is_none()) else {
            return Ok(false);
        };
        self.put(&Schedule {
            next_ms: Some(self.context.unix_millis()),
            retries: 0,
            ..schedule
        })?;
        Ok(true)
    }

    pub fn find(&self, name: &str) -> Result<Option<Schedule>, ClassError> {
        let found = self.select("WHERE name = ?1", &[SqlValue::Text(name.to_owned())])?;
        Ok(found.into_iter().next())
    }

    /// All schedules, the one due first first; those that were given up come last.
    pub fn list(&self) -> Result<Vec<Schedule>, ClassError> {
        self.select("ORDER BY next_ms IS NULL, next_ms, name", &[])
    }

    /// Runs what is due, and sets the alarm to what comes next: what the class's alarm handler returns.
    pub fn run(self, info: AlarmInfo, handler: Rc<Handler>) -> Turn<()> {
        if info.is_retry() {
            // The last try broke the turn, and nobody knows which item did.
            return Turn::run(async move { self.run_one_by_one(&*handler).await });
        }
        Turn::Done(self.run_together(&*handler))
    }

    fn run_together(&self, handler: &Handler) -> Result<(), ClassError> {
        let now = self.context.unix_millis();
        for schedule in self.due(now)? {
            self.run_item(schedule, now, handler)?;
        }
        self.arm()
    }

    /// Each item a stretch of its own, after one that has counted it as failed. If it breaks its turn, too,
    /// that costs the alarm no retry: there is another alarm by then.
    async fn run_one_by_one(&self, handler: &Handler) -> Result<(), ClassError> {
        let now = self.context.unix_millis();
        for schedule in self.due(now)? {
            if !self.is_as_it_was(&schedule)? {
                continue;
            }
            let broke = "the handler broke its turn: it panicked, or took too long";
            self.failed(&schedule, now, broke)?;
            self.context
                .replace_alarm(Some(now.saturating_add(pause_ms(0))))?;
            tokio::task::yield_now().await;
            self.run_item(schedule, now, handler)?;
            tokio::task::yield_now().await;
        }
        self.arm()
    }

    fn due(&self, now: u64) -> Result<Vec<Schedule>, ClassError> {
        let limit = i64::try_from(ITEMS_PER_TURN).unwrap_or(i64::MAX);
        self.select(
            "WHERE next_ms <= ?1 ORDER BY next_ms, name LIMIT ?2",
            &[signed(now), SqlValue::Integer(limit)],
        )
    }

    /// An error is the platform's, or breaks the turn; the class's own are noted with the item.
    fn run_item(&self, schedule: Schedule, now: u64, handler: &Handler) -> Result<(), ClassError> {
        if !self.is_as_it_was(&schedule)? {
            return Ok(());
        }
        if schedule.missed == Missed::Skip
            && schedule.cron.is_some()
            && schedule.retries == 0
            && schedule.due_ms.saturating_add(MISSED_AFTER_MS) < now
        {
            return self.done(&schedule, now);
        }
        let due = Due {
            name: schedule.name.clone(),
            due_ms: schedule.due_ms,
            retry_count: schedule.retries,
            payload: schedule.payload.clone(),
        };
        let ran = self.context.storage().transaction(|| handler(&due));
        match ran {
            Ok(()) => self.done(&schedule, now),
            Err(error) if error.resets() || error.is_of_the_platform() => Err(error),
            Err(error) => self.failed(&schedule, now, &error.to_string()),
        }
    }

    /// Somebody may have removed or replaced the item meanwhile: then that counts. A cron item that was
    /// counted as failed for good before its last try has its next time already.
    fn is_as_it_was(&self, schedule: &Schedule) -> Result<bool, ClassError> {
        let Some(found) = self.find(&schedule.name)? else {
            return Ok(false);
        };
        let last_try = schedule.retries == RETRIES_MAX && schedule.cron.is_some();
        Ok(found.cron == schedule.cron && (found.due_ms == schedule.due_ms || last_try))
    }

    fn done(&self, schedule: &Schedule, now: u64) -> Result<(), ClassError> {
        if !self.is_as_it_was(schedule)? {
            return Ok(());
        }
        match next_occurrence(schedule, now)? {
            None => self.remove(&schedule.name),
            Some(due_ms) => self.write(&Schedule {
                due_ms,
                next_ms: Some(due_ms),
                retries: 0,
                ..schedule.clone()
            }),
        }
    }

    fn failed(&self, schedule: &Schedule, now: u64, error: &str) -> Result<(), ClassError> {
        if !self.is_as_it_was(schedule)? {
            return Ok(());
        }
        if schedule.retries < RETRIES_MAX {
            return self.write(&Schedule {
                next_ms: Some(now.saturating_add(pause_ms(schedule.retries))),
                retries: schedule.retries + 1,
                ..schedule.clone()
            });
        }
        let next = next_occurrence(schedule, now)?;
        self.write(&Schedule {
            due_ms: next.unwrap_or(schedule.due_ms),
            next_ms: next,
            retries: if next.is_some() { 0 } else { schedule.retries },
            failed_ms: Some(now),
            error: Some(error.chars().take(200).collect()),
            ..schedule.clone()
        })
    }

    /// Sets the alarm to the first item, if there is one.
    fn arm(&self) -> Result<(), ClassError> {
        let first = self.select("WHERE next_ms IS NOT NULL ORDER BY next_ms LIMIT 1", &[])?;
        let waiting = self.context.storage().alarm()?.state.pending;
        if waiting.is_some_and(|alarm| alarm.retries > 0) && !self.context.is_in_alarm() {
            // The handler broke its turn, and runs soon, more carefully.
            return Ok(());
        }
        match first.first().and_then(|first| first.next_ms) {
            Some(next) if self.context.alarm()? == Some(next) => Ok(()),
            Some(next) => self.context.set_alarm(next),
            None => self.context.delete_alarm(),
        }
    }

    fn put(&self, schedule: &Schedule) -> Result<(), ClassError> {
        self.write(schedule)?;
        self.arm()
    }

    fn write(&self, schedule: &Schedule) -> Result<(), ClassError> {
        let text = |text: &Option<String>| match text {
            Some(text) => SqlValue::Text(text.clone()),
            None => SqlValue::Null,
        };
        let time = |time: Option<u64>| time.map_or(SqlValue::Null, signed);
        let values = [
            SqlValue::Text(schedule.name.clone()),
            signed(schedule.due_ms),
            time(schedule.next_ms),
            SqlValue::Integer(schedule.retries.into()),
            text(&schedule.cron),
            text(&schedule.zone),
            SqlValue::Text(schedule.missed.name().to_owned()),
            SqlValue::Text(schedule.payload.to_string()),
            time(schedule.failed_ms),
            text(&schedule.error),
        ];
        let storage = self.context.storage();
        storage.write_ours(TABLE, &[])?;
        let replace = format!(
            "INSERT OR REPLACE INTO _dormouse_schedules ({COLUMNS}) \
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        );
        Ok(storage.write_ours(&replace, &values)?)
    }

    fn remove(&self, name: &str) -> Result<(), ClassError> {
        let delete = "DELETE FROM _dormouse_schedules WHERE name = ?";
        let storage = self.context.storage();
        Ok(storage.write_ours(delete, &[SqlValue::Text(name.to_owned())])?)
    }

    fn select(&self, rest: &str, values: &[SqlValue]) -> Result<Vec<Schedule>, ClassError> {
        let storage = self.context.storage();
        if !storage.has_table_of_ours("_dormouse_schedules")? {
            return Ok(Vec::new());
        }
        let sql = format!("SELECT {COLUMNS} FROM _dormouse_schedules {rest}");
        Ok(storage.read_ours(&sql, values, schedule)?)
    }
}

/// The pause after so many failures before this one, in milliseconds.
fn pause_ms(retries: u32) -> u64 {
    let pause = RETRY_FIRST * 2u32.pow(retries);
    u64::try_from(pause.as_millis()).unwrap_or(u64::MAX)
}

fn schedule(row: &rusqlite::Row<'_>) -> rusqlite::Result<Schedule> {
    let time = |at| {
        let time: Option<i64> = row.get(at)?;
        Ok::<_, rusqlite::Error>(time.map(|time| u64::try_from(time).unwrap_or(0)))
    };
    let payload: String = row.get(7)?;
    let missed: Option<String> = row.get(6)?;
    Ok(Schedule {
        name: row.get(0)?,
        due_ms: time(1)?.unwrap_or(0),
        next_ms: time(2)?,
        retries: row.get(3)?,
        cron: row.get(4)?,
        zone: row.get(5)?,
        missed: Missed::of(missed.as_deref()),
        payload: serde_json::from_str(&payload).unwrap_or(Json::Null),
        failed_ms: time(8)?,
        error: row.get(9)?,
    })
}

/// The next time of a cron schedule, after what it was for now; `None` for one that runs once.
fn next_occurrence(schedule: &Schedule, now: u64) -> Result<Option<u64>, ClassError> {
    let (Some(pattern), Some(zone)) = (&schedule.cron, &schedule.zone) else {
        return Ok(None);
    };
    let after = match schedule.missed {
        Missed::All => schedule.due_ms,
        Missed::Once | Missed::Skip => schedule.due_ms.max(now),
    };
    occurrence_after(pattern, zone, after)
}

/// The first time after this one that a pattern gives; `None` if there is none.
fn occurrence_after(pattern: &str, zone: &str, after_ms: u64) -> Result<Option<u64>, ClassError> {
    let wrong = |what: &str, error: &dyn std::fmt::Display| {
        ClassError::BadRequest(format!("cron {pattern:?} in {zone:?}: {what}: {error}"))
    };
    let zone_found = Tz::from_str(zone).map_err(|error| wrong("that is no time zone", &error))?;
    // Years are not for what comes again and again.
    let parser = CronParser::builder()
        .seconds(Seconds::Optional)
        .year(Year::Disallowed)
        .build();
    let cron = parser
        .parse(pattern)
        .map_err(|error| wrong("that is no pattern", &error))?;
    let after = i64::try_from(after_ms)
        .ok()
        .and_then(DateTime::<Utc>::from_timestamp_millis)
        .ok_or_else(|| wrong("the time is out of range", &after_ms))?;
    // Its one error is a search that found nothing within its bounds.
    let Ok(next) = cron.find_next_occurrence(&after.with_timezone(&zone_found), false) else {
        return Ok(None);
    };
    Ok(u64::try_from(next.timestamp_millis()).ok())
}

fn signed(number: u64) -> SqlValue {
    SqlValue::Integer(i64::try_from(number).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Times as people write them.
    fn next(pattern: &str, zone: &str, after: &str) -> String {
        let after = DateTime::parse_from_rfc3339(after)
            .unwrap()
            .timestamp_millis();
        let next = occurrence_after(pattern, zone, after.unsigned_abs());
        let next = next.unwrap().unwrap();
        let next = DateTime::<Utc>::from_timestamp_millis(i64::try_from(next).unwrap()).unwrap();
        next.to_rfc3339()
    }

    #[test]
    fn patterns_are_read_in_their_zone() {
        let noon = "0 12 * * MON-FRI";
        assert_eq!(
            next(noon, "Europe/Berlin", "2026-11-21T00:00:00Z"),
            "2026-11-23T11:00:00+00:00"
        );
        assert_eq!(
            next(noon, "America/New_York", "2026-11-23T11:30:00Z"),
            "2026-11-23T17:00:00+00:00"
        );
    }

    #[test]
    fn daylight_saving_neither_loses_nor_repeats_a_day() {
        // 02:30 does not exist on the last Sunday of March.
        let early = "30 2 * * *";
        let first = next(early, "Europe/Berlin", "2026-03-28T12:00:00Z");
        assert!(first.starts_with("2026-03-29T01:"), "{first}");
        assert_eq!(
            next(early, "Europe/Berlin", &first),
            "2026-03-30T00:30:00+00:00"
        );
        // And comes twice on the last one of October.
        let first = next(early, "Europe/Berlin", "2026-10-24T12:00:00Z");
        assert!(first.starts_with("2026-10-25T0"), "{first}");
        assert_eq!(
            next(early, "Europe/Berlin", &first),
            "2026-10-26T01:30:00+00:00"
        );
    }

    #[test]
    fn what_is_wrong_is_said() {
        let error = occurrence_after("61 * * * *", "UTC", 0)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("\"61 * * * *\"") && error.contains("no pattern"),
            "{error}"
        );
        let error = occurrence_after("* * * * *", "Mars/Base", 0)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("\"Mars/Base\": that is no time zone"),
            "{error}"
        );
        let error = occurrence_after("0 0 12 1 1 * 2026", "UTC", 0).unwrap_err();
        assert!(error.to_string().contains("no pattern"), "{error}");
        assert_eq!(
            occurrence_after("0 0 30 2 *", "UTC", 0).unwrap_or(None),
            None
        );
    }
}
