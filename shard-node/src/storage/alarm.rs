//! The alarm of one object, as a row of its database.

use rusqlite::{Connection, OptionalExtension, params};

use super::engine::prepare_ours;
use super::{Storage, StorageError};
use crate::alarm::{AlarmState, DeadLetter, Pending};

/// One row at the most. `number` counts changes, so that the end of a handler can tell whether the alarm
/// it ran for was replaced meanwhile.
pub(super) const TABLE: &str = "CREATE TABLE IF NOT EXISTS _dormouse_alarm (
    only_one INTEGER PRIMARY KEY CHECK (only_one = 1),
    number INTEGER NOT NULL,
    scheduled_ms INTEGER,
    next_ms INTEGER,
    retries INTEGER NOT NULL,
    dead_scheduled_ms INTEGER,
    dead_ms INTEGER,
    dead_error TEXT
)";

/// The row, and how often it was changed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct NumberedAlarm {
    pub(crate) number: i64,
    pub(crate) state: AlarmState,
}

impl Storage {
    pub(crate) fn alarm(&self) -> Result<NumberedAlarm, StorageError> {
        let open = self.open()?;
        if !self.may_have_tables(&open) {
            return Ok(NumberedAlarm::default());
        }
        drop(open);
        self.reading(stored_alarm)
    }

    /// Changes the alarm, in the transaction of this turn. The commit tells whoever must know. `replaced`:
    /// what is pending is another alarm than before.
    pub(crate) fn write_alarm(
        &self,
        state: &AlarmState,
        replaced: bool,
    ) -> Result<(), StorageError> {
        let (pending, dead) = (state.pending, state.dead.as_ref());
        self.writing(|connection| {
            prepare_ours(connection, TABLE)?.raw_execute()?;
            prepare_ours(
                connection,
                "INSERT INTO _dormouse_alarm VALUES (1, 1, ?1, ?2, ?3, ?4, ?5, ?6) \
                 ON CONFLICT DO UPDATE SET number = number + ?7, scheduled_ms = ?1, next_ms = ?2, \
                 retries = ?3, dead_scheduled_ms = ?4, dead_ms = ?5, dead_error = ?6",
            )?
            .execute(params![
                pending.map(|pending| signed(pending.scheduled_ms)),
                pending.map(|pending| signed(pending.next_ms)),
                pending.map_or(0, |pending| pending.retries),
                dead.map(|dead| signed(dead.scheduled_ms)),
                dead.map(|dead| signed(dead.failed_ms)),
                dead.map(|dead| dead.error.as_str()),
                replaced,
            ])
            .map(drop)
        })?;
        self.alarm_changed.set(true);
        Ok(())
    }

    /// The transaction is about to be committed: what it made of the alarm, if it may have changed it. Read
    /// again, because the turn that changed it may have been undone.
    pub(super) fn tell_alarm(&self) -> Result<Option<AlarmState>, StorageError> {
        if !self.alarm_changed.get() {
            return Ok(None);
        }
        let state = self.alarm()?.state;
        self.open()?.handle.tell_alarm(state.clone());
        Ok(Some(state))
    }

    /// Tells the timers when the alarm runs next.
    pub(crate) fn set_timer(&self, state: &AlarmState) {
        if let Some(timers) = &self.timers {
            if let Some(first) = state.pending.filter(|pending| pending.retries == 0) {
                timers.count_ahead(&self.identity.class, first.next_ms);
            }
            timers.set(
                self.identity.id,
                state.pending.map(|pending| pending.next_ms),
            );
        }
    }
}

/// The alarm that a database has; it may have no table for one.
pub(super) fn stored_alarm(connection: &Connection) -> rusqlite::Result<NumberedAlarm> {
    let exists = prepare_ours(
        connection,
        "SELECT 1 FROM sqlite_schema WHERE name = '_dormouse_alarm'",
    )?
    .exists([])?;
    if !exists {
        return Ok(NumberedAlarm::default());
    }
    let found = prepare_ours(
        connection,
        "SELECT number, scheduled_ms, next_ms, retries, dead_scheduled_ms, dead_ms, dead_error \
         FROM _dormouse_alarm",
    )?
    .query_row([], |row| {
        Ok(NumberedAlarm {
            number: row.get(0)?,
            state: alarm_of(row, 1)?,
        })
    })
    .optional()?;
    Ok(found.unwrap_or_default())
}

/// The six columns of an alarm, from `first` on: when it was scheduled, when it runs next, its retries; when
/// the dead letter was scheduled, when it failed, its error.
pub(crate) fn alarm_of(row: &rusqlite::Row<'_>, first: usize) -> rusqlite::Result<AlarmState> {
    let time = |at: usize| {
        let time: Option<i64> = row.get(first + at)?;
        Ok::<_, rusqlite::Error>(time.map(|time| u64::try_from(time).unwrap_or(0)))
    };
    let pending = match (time(0)?, time(1)?) {
        (Some(scheduled_ms), Some(next_ms)) => Some(Pending {
            scheduled_ms,
            next_ms,
            retries: row.get(first + 2)?,
        }),
        _ => None,
    };
    let dead = match (time(3)?, time(4)?) {
        (Some(scheduled_ms), Some(failed_ms)) => Some(DeadLetter {
            scheduled_ms,
            failed_ms,
            error: row.get(first + 5)?,
        }),
        _ => None,
    };
    Ok(AlarmState { pending, dead })
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
