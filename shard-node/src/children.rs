//! Parents: objects that have others to look after, and know of each how it does.
//!
//! A native class keeps [`Children`]: a list in the parent's own database (table `children`), with the state of each
//! child. [`call_all`](Children::call_all) asks all of them at once. One that fails never stops the others: it is
//! noted, and the parent's alarm makes the same call again, after pauses that double; after
//! [`tries`](Supervision::tries) failures in a row the child is marked failed, and the class is told, in that same
//! transaction. A child that answers is well again, whatever was before.
//!
//! The parent's alarm is shared through [`Schedules`]: from its alarm handler the class returns
//! [`Children::supervise`] with the handler of its own schedules. An object has one such list.
//!
//! A call that failed may have had its effect, and so may each of its repetitions: children must take it twice
//! ([`Context::once`]). Only the last call that failed is repeated, and none once the child has answered another:
//! supervision tells whether children are well, and is no queue of what they are to do.

use std::num::NonZeroUsize;
use std::rc::Rc;
use std::time::Duration;

use protocol::{ClassName, ObjectName};
use serde::Serialize;
use serde_json::Value as Json;

use crate::alarm::AlarmInfo;
use crate::class::{ClassError, Context, Turn};
use crate::fan_out::{FanOut, Needs};
use crate::schedules::{Due, Handler, Schedules};
use crate::storage::{Rows, SqlValue};

/// The schedule by which children that failed are asked again.
pub const SCHEDULE: &str = "children";

/// Children of one page of a list, and of one round of the alarm, at the most.
pub const PAGE_MAX: usize = 1000;

/// Bytes of a page: names of 1 KiB, and errors.
const PAGE_BYTES: usize = 8 << 20;

/// Bytes of an error that are kept.
const ERROR_CHARS: usize = 200;

const TABLE: &str = "CREATE TABLE IF NOT EXISTS children (
    name TEXT PRIMARY KEY, status TEXT NOT NULL, asked_ms INTEGER, failures INTEGER NOT NULL,
    error TEXT, again_ms INTEGER, method TEXT, args TEXT) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS children_again ON children (again_ms) WHERE again_ms IS NOT NULL";

const COLUMNS: &str = "name, status, asked_ms, failures, error, again_ms";

/// How children are asked, and what becomes of those that fail.
#[derive(Debug, Clone, Copy)]
pub struct Supervision {
    /// Children asked at once.
    pub at_once: NonZeroUsize,
    /// How long all of them together may take to answer.
    pub within: Duration,
    /// Failures in a row after which a child is marked failed, and asked no more by the alarm.
    pub tries: u32,
    /// The pause after the first failure; each later one is twice as long, up to `pause_max`.
    pub pause: Duration,
    pub pause_max: Duration,
}

impl Default for Supervision {
    fn default() -> Self {
        Self {
            at_once: NonZeroUsize::new(64).expect("64 is not 0"),
            within: Duration::from_secs(30),
            tries: 6,
            pause: Duration::from_secs(2),
            pause_max: Duration::from_secs(300),
        }
    }
}

impl Supervision {
    /// The pause after so many failures in a row, in milliseconds.
    fn pause_ms(&self, failures: u32) -> u64 {
        let doubled = 2_u32.saturating_pow(failures.saturating_sub(1));
        let pause = self.pause.saturating_mul(doubled).min(self.pause_max);
        u64::try_from(pause.as_millis()).unwrap_or(u64::MAX)
    }
}

/// How a child did when it was asked last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// It was never asked.
    New,
    Ok,
    /// It failed, and is asked again.
    Failing,
    /// It failed too often.
    Failed,
}

impl Status {
    fn name(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Ok => "ok",
            Self::Failing => "failing",
            Self::Failed => "failed",
        }
    }

    fn of(name: &str) -> Self {
        match name {
            "ok" => Self::Ok,
            "failing" => Self::Failing,
            "failed" => Self::Failed,
            _ => Self::New,
        }
    }
}

/// One child, as it is stored. Times are milliseconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Child {
    pub name: String,
    pub status: Status,
    /// When it was asked last.
    pub asked_ms: Option<u64>,
    /// Failures in a row.
    pub failures: u32,
    pub error: Option<String>,
    /// When it is asked again.
    pub again_ms: Option<u64>,
}

/// What came of asking all children.
#[derive(Debug)]
pub struct Round {
    pub results: Vec<(ObjectName, Result<Json, ClassError>)>,
}

impl Round {
    /// The answers, by child.
    pub fn answers(&self) -> impl Iterator<Item = (&ObjectName, &Json)> {
        let results = self.results.iter();
        results.filter_map(|(name, result)| Some((name, result.as_ref().ok()?)))
    }

    /// Who failed, and how.
    pub fn failures(&self) -> impl Iterator<Item = (&ObjectName, &ClassError)> {
        let results = self.results.iter();
        results.filter_map(|(name, result)| Some((name, result.as_ref().err()?)))
    }
}

/// What the parent's class does about a child that was marked failed. Synchronous: it is one with the mark.
pub type OnFailed = dyn Fn(&Child) -> Result<(), ClassError>;

/// The children of one object.
#[derive(Clone)]
pub struct Children {
    context: Context,
    schedules: Schedules,
    class: ClassName,
    supervision: Supervision,
    on_failed: Rc<OnFailed>,
}

impl Children {
    /// `class` is the children's. The class of the parent handles alarms.
    pub fn new(
        context: Context,
        class: ClassName,
        supervision: Supervision,
        on_failed: Rc<OnFailed>,
    ) -> Self {
        Self {
            schedules: Schedules::new(context.clone()),
            context,
            class,
            supervision,
            on_failed,
        }
    }

    /// Adds a child; `false` if it was one already. The object itself is not touched.
    pub fn add(&self, name: &ObjectName) -> Result<bool, ClassError> {
        self.sql(TABLE, &[])?;
        let insert = "INSERT OR IGNORE INTO children (name, status, failures) VALUES (?, 'new', 0)";
        Ok(self.sql(insert, &[text(name)])?.rows_written > 0)
    }

    /// Removes a child from the list; `true` if it was one. The object itself stays as it is.
    pub fn remove(&self, name: &ObjectName) -> Result<bool, ClassError> {
        if !self.has_any()? {
            return Ok(false);
        }
        let delete = "DELETE FROM children WHERE name = ?";
        let removed = self.sql(delete, &[text(name)])?.rows_written > 0;
        if removed {
            self.arm()?;
        }
        Ok(removed)
    }

    pub fn find(&self, name: &ObjectName) -> Result<Option<Child>, ClassError> {
        let found = self.select("WHERE name = ?", &[text(name)])?;
        Ok(found.into_iter().next())
    }

    /// A page of the list, by name: the children after this one, at most `count` and [`PAGE_MAX`].
    pub fn list(&self, after: Option<&ObjectName>, count: usize) -> Result<Vec<Child>, ClassError> {
        let after = after.map_or("", ObjectName::as_str);
        let limit = i64::try_from(count.min(PAGE_MAX)).unwrap_or(i64::MAX);
        self.select(
            "WHERE name > ? ORDER BY name LIMIT ?",
            &[text(after), SqlValue::Integer(limit)],
        )
    }

    pub fn count(&self) -> Result<u64, ClassError> {
        if !self.has_any()? {
            return Ok(0);
        }
        let rows = self.sql("SELECT count(*) FROM children", &[])?;
        Ok(rows
            .rows
            .first()
            .map_or(0, |row| number(&row[0]).unwrap_or(0)))
    }

    /// All names. They are held in memory.
    fn names(&self) -> Result<Vec<ObjectName>, ClassError> {
        let mut names: Vec<ObjectName> = Vec::new();
        loop {
            let page = self.list(names.last(), PAGE_MAX)?;
            let whole = page.len() == PAGE_MAX;
            for child in page {
                names.push(parse(&child.name)?);
            }
            if !whole {
                return Ok(names);
            }
        }
    }

    /// Calls a method of every child, whatever its state, and notes how each did. It ends when all have answered or
    /// the time is over; what to make of failures is the caller's choice.
    ///
    /// # Errors
    /// The parent's own storage.
    pub async fn call_all(&self, method: &str, args: &[Json]) -> Result<Round, ClassError> {
        let calls = self.names()?.into_iter().map(|name| Call {
            name,
            method: method.to_owned(),
            args: args.to_vec(),
        });
        self.ask(calls.collect()).await
    }

    /// Calls a method of one child, and notes how it did.
    ///
    /// # Errors
    /// The child's, or the parent's own storage.
    pub async fn call(
        &self,
        name: &ObjectName,
        method: &str,
        args: Vec<Json>,
    ) -> Result<Json, ClassError> {
        let call = Call {
            name: name.clone(),
            method: method.to_owned(),
            args,
        };
        let mut round = self.ask(vec![call]).await?;
        let (_, result) = round.results.pop().expect("one call has one result");
        result
    }

    /// Runs the class's own schedules, then asks again those children whose time it is: what the class's alarm
    /// handler returns.
    pub fn supervise(&self, info: AlarmInfo, handler: Rc<Handler>) -> Turn<()> {
        let children = self.clone();
        let handler: Rc<Handler> = Rc::new(move |due: &Due| match due.name.as_str() {
            // The children's own times are theirs to say.
            SCHEDULE => Ok(()),
            _ => handler(due),
        });
        Turn::run(async move {
            match children.schedules.clone().run(info, handler) {
                Turn::Done(done) => done?,
                Turn::Running(running) => running.await?,
            }
            let due = children.due()?;
            if due.is_empty() {
                return children.arm();
            }
            children.ask(due).await.map(drop)
        })
    }

    async fn ask(&self, calls: Vec<Call>) -> Result<Round, ClassError> {
        let fan_out = FanOut {
            at_once: self.supervision.at_once,
            within: self.supervision.within,
            needs: Needs::Nothing,
        };
        let made = calls.iter().map(|call| {
            let stub = self.context.stub(&self.class, &call.name);
            let stub = stub.within(self.supervision.within);
            async move { stub.call(&call.method, call.args.clone()).await }
        });
        let results = fan_out.gather(made).await?;
        let now = self.context.unix_millis();
        for (call, result) in calls.iter().zip(&results) {
            self.note(call, result, now)?;
        }
        self.arm()?;
        let names = calls.into_iter().map(|call| call.name);
        Ok(Round {
            results: names.zip(results).collect(),
        })
    }

    /// The calls that are to be made again now.
    fn due(&self) -> Result<Vec<Call>, ClassError> {
        if !self.has_any()? {
            return Ok(Vec::new());
        }
        let rows = self.sql(
            "SELECT name, method, args FROM children WHERE again_ms <= ? ORDER BY again_ms LIMIT ?",
            &[
                time(self.context.unix_millis()),
                SqlValue::Integer(PAGE_MAX as i64),
            ],
        )?;
        let calls = rows.rows.iter().map(|row| {
            let args = string(&row[2]).unwrap_or_default();
            Ok(Call {
                name: parse(string(&row[0]).unwrap_or_default())?,
                method: string(&row[1]).unwrap_or_default().to_owned(),
                args: serde_json::from_str(args).unwrap_or_default(),
            })
        });
        calls.collect()
    }

    /// Notes how a child did, unless it is none any more.
    fn note(
        &self,
        call: &Call,
        result: &Result<Json, ClassError>,
        now: u64,
    ) -> Result<(), ClassError> {
        let Some(before) = self.find(&call.name)? else {
            return Ok(());
        };
        let Err(error) = result else {
            self.sql(
                "UPDATE children SET status = 'ok', asked_ms = ?, failures = 0, error = NULL,
                    again_ms = NULL, method = NULL, args = NULL WHERE name = ?",
                &[time(now), text(&call.name)],
            )?;
            return Ok(());
        };
        let failures = before.failures.saturating_add(1);
        let gives_up = failures >= self.supervision.tries;
        let child = Child {
            status: if gives_up {
                Status::Failed
            } else {
                Status::Failing
            },
            asked_ms: Some(now),
            failures,
            error: Some(error.to_string().chars().take(ERROR_CHARS).collect()),
            again_ms: (!gives_up).then(|| now.saturating_add(self.supervision.pause_ms(failures))),
            name: before.name,
        };
        self.sql(
            "UPDATE children SET status = ?, asked_ms = ?, failures = ?, error = ?, again_ms = ?,
                method = ?, args = ? WHERE name = ?",
            &[
                text(child.status.name()),
                time(now),
                SqlValue::Integer(failures.into()),
                text(child.error.as_deref().unwrap_or_default()),
                child.again_ms.map_or(SqlValue::Null, time),
                text(&call.method),
                text(Json::from(call.args.clone())),
                text(&call.name),
            ],
        )?;
        match gives_up && before.status != Status::Failed {
            true => (self.on_failed)(&child),
            false => Ok(()),
        }
    }

    /// Sets the schedule to the first child that is to be asked again.
    fn arm(&self) -> Result<(), ClassError> {
        let first = self.sql("SELECT min(again_ms) FROM children", &[])?;
        let first = first.rows.first().and_then(|row| number(&row[0]));
        let set = self.schedules.find(SCHEDULE)?;
        match (first, set) {
            (Some(first), Some(set)) if set.next_ms == Some(first) => Ok(()),
            (Some(first), _) => self.schedules.once(SCHEDULE, first, Json::Null),
            (None, Some(_)) => self.schedules.cancel(SCHEDULE).map(drop),
            (None, None) => Ok(()),
        }
    }

    /// Whether there is a list at all.
    fn has_any(&self) -> Result<bool, ClassError> {
        let find = "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'children'";
        Ok(!self.sql(find, &[])?.rows.is_empty())
    }

    fn select(&self, rest: &str, values: &[SqlValue]) -> Result<Vec<Child>, ClassError> {
        if !self.has_any()? {
            return Ok(Vec::new());
        }
        let rows = self.sql(&format!("SELECT {COLUMNS} FROM children {rest}"), values)?;
        Ok(rows.rows.iter().map(|row| child(row)).collect())
    }

    fn sql(&self, sql: &str, values: &[SqlValue]) -> Result<Rows, ClassError> {
        Ok(self.context.storage().exec(sql, values, PAGE_BYTES)?)
    }
}

/// A call of one child.
struct Call {
    name: ObjectName,
    method: String,
    args: Vec<Json>,
}

fn child(row: &[SqlValue]) -> Child {
    Child {
        name: string(&row[0]).unwrap_or_default().to_owned(),
        status: Status::of(string(&row[1]).unwrap_or_default()),
        asked_ms: number(&row[2]),
        failures: number(&row[3]).map_or(0, |count| u32::try_from(count).unwrap_or(u32::MAX)),
        error: string(&row[4]).map(str::to_owned),
        again_ms: number(&row[5]),
    }
}

fn parse(name: &str) -> Result<ObjectName, ClassError> {
    name.parse()
        .map_err(|error| ClassError::BadRequest(format!("table children: {error}")))
}

fn text(value: impl ToString) -> SqlValue {
    SqlValue::Text(value.to_string())
}

fn time(millis: u64) -> SqlValue {
    SqlValue::Integer(i64::try_from(millis).unwrap_or(i64::MAX))
}

fn string(value: &SqlValue) -> Option<&str> {
    match value {
        SqlValue::Text(text) => Some(text),
        _ => None,
    }
}

fn number(value: &SqlValue) -> Option<u64> {
    match value {
        SqlValue::Integer(number) => u64::try_from(*number).ok(),
        _ => None,
    }
}
