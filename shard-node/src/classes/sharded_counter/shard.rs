//! `CounterShard`: one shard of a counter.
//!
//! It writes its total with every increment, and sets its alarm when it turns from having nothing new to having
//! something: the alarm reports, so no increment stays unreported, whatever dies. A report that fails is tried
//! again for ever.

mod keys;
mod reports;

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::rc::Rc;
use std::time::Duration;

use http::{Request, Response};
use protocol::ClassName;
use protocol::counters::{
    self, ADD, ADD_ONCE, AddOutcome, Added, CLAIM, CounterName, REPORT_EVERY_MIN, RETIRE, Seat,
    TELL, Tally,
};

use super::{RESULT_BYTES, answer, no_method, no_pages, number, parse, unsigned};
use crate::class::{AlarmInfo, Args, Body, Class, ClassError, Context, Instance, Json, Turn};
use crate::storage::{Rows, SqlValue};

/// How long a report or a claim may take.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// `reported` counts the turns that the coordinator knows of. A key with a `lost` belongs to another shard since
/// that plan; one without `by` was never counted here.
const SCHEMA: &str = "
    CREATE TABLE tally (total INTEGER NOT NULL, turns INTEGER NOT NULL, generation INTEGER,
        retired INTEGER, reported INTEGER NOT NULL);
    INSERT INTO tally VALUES (0, 0, NULL, NULL, 0);
    CREATE TABLE keys (key TEXT PRIMARY KEY, at_ms INTEGER NOT NULL, by INTEGER, lost INTEGER) WITHOUT ROWID;
    CREATE INDEX keys_by_time ON keys (at_ms)";

pub struct Shard {
    name: ClassName,
}

impl Default for Shard {
    fn default() -> Self {
        Self {
            name: counters::shard_class(),
        }
    }
}

impl Class for Shard {
    fn name(&self) -> &ClassName {
        &self.name
    }

    fn methods(&self) -> &'static [&'static str] {
        &[ADD, ADD_ONCE, CLAIM, TELL, RETIRE]
    }

    fn is_internal(&self) -> bool {
        true
    }

    fn handles_alarms(&self) -> bool {
        true
    }

    fn construct(&self, context: Context) -> Result<Rc<dyn Instance>, ClassError> {
        let counting = Counting {
            class: self.name.clone(),
            context,
            state: Cell::new(None),
            heard: Cell::new(0),
            reporting: Cell::new(false),
            new_since: Cell::new(None),
            report_every: Cell::new(REPORT_EVERY_MIN),
            failures: Cell::new(0),
            claiming: RefCell::default(),
        };
        let state = counting.state()?;
        counting.reporting.set(state.has_news());
        Ok(Rc::new(counting))
    }
}

struct Counting {
    class: ClassName,
    context: Context,
    /// What is in the database; `None` until it was read, and while it is written.
    state: Cell<Option<State>>,
    /// The newest plan that anybody spoke of.
    heard: Cell<u64>,
    /// The alarm is set, or runs, to report what is new.
    reporting: Cell<bool>,
    /// Since when something is new, in milliseconds since 1970.
    new_since: Cell<Option<u64>>,
    report_every: Cell<Duration>,
    /// Reports in a row that failed.
    failures: Cell<u32>,
    /// Keys that are being claimed.
    claiming: RefCell<HashSet<Box<str>>>,
}

#[derive(Debug, Clone, Copy, Default)]
struct State {
    has_tables: bool,
    total: i64,
    turns: u64,
    generation: Option<u64>,
    retired: Option<u64>,
    reported: u64,
}

impl State {
    fn tally(&self) -> Tally {
        Tally {
            generation: self.generation,
            total: self.total,
            turns: self.turns,
        }
    }

    /// Plans up to this one do not count here any more.
    fn refuses(&self, version: u64) -> bool {
        self.retired.is_some_and(|retired| version <= retired)
    }

    fn has_news(&self) -> bool {
        self.retired.is_none() && self.turns != self.reported
    }
}

impl Counting {
    fn add(&self, by: i64, version: u64) -> Result<Added, ClassError> {
        self.hear(version);
        let state = self.state()?;
        if state.refuses(version) {
            return Ok(self.added(AddOutcome::Moved));
        }
        self.count(state, by, version)?;
        Ok(self.added(AddOutcome::Counted))
    }

    /// Adds to the total, which nothing forbids.
    fn count(&self, state: State, by: i64, version: u64) -> Result<(), ClassError> {
        // What was counted before it retired is the coordinator's.
        let begins = state.generation.is_none() || state.retired.is_some();
        let before = match begins {
            true => State {
                total: 0,
                turns: 0,
                reported: 0,
                generation: Some(version),
                retired: None,
                ..state
            },
            false => state,
        };
        let total = before.total.checked_add(by).ok_or_else(|| {
            ClassError::BadRequest(format!(
                "{} + {by} does not fit in the 64 bits of a shard; the counter is unchanged",
                before.total
            ))
        })?;
        let after = State {
            total,
            turns: before.turns + 1,
            has_tables: true,
            ..before
        };
        self.prepare(state)?;
        if begins {
            self.write(after)?;
        } else {
            // Most increments change nothing else.
            self.state.set(None);
            self.sql(
                "UPDATE tally SET total = ?1, turns = ?2",
                &[total.into(), number(after.turns)],
            )?;
            self.state.set(Some(after));
        }
        if !self.reporting.get() {
            let now = self.context.unix_millis();
            self.context
                .set_alarm(now + millis(self.report_every.get()))?;
            self.reporting.set(true);
            self.new_since.set(Some(now));
        }
        Ok(())
    }

    /// The calls that need nobody else.
    fn answer(&self, method: &str, mut args: Args) -> Result<Json, ClassError> {
        match method {
            ADD => {
                args.expect(2..=2, "add(by, version)")?;
                let by = parse(&mut args, 0, ADD, "by")?;
                let version = parse(&mut args, 1, ADD, "version")?;
                answer(self.add(by, version)?)
            }
            CLAIM => {
                args.expect(2..=2, "claim(key, version)")?;
                let key: Box<str> = parse(&mut args, 0, CLAIM, "key")?;
                let version = parse(&mut args, 1, CLAIM, "version")?;
                answer(self.claim(&key, version)?)
            }
            TELL => answer(self.state()?.tally()),
            RETIRE => {
                args.expect(1..=1, "retire(version)")?;
                answer(self.retire(parse(&mut args, 0, RETIRE, "version")?)?)
            }
            _ => Err(no_method(&self.class, method)),
        }
    }

    fn retire(&self, version: u64) -> Result<Tally, ClassError> {
        self.hear(version);
        let state = self.state()?;
        let began_later = state.generation.is_some_and(|began| began > version);
        // A plan that took it in again after this one has been used.
        if !began_later && !state.refuses(version) {
            self.prepare(state)?;
            self.write(State {
                retired: Some(version),
                has_tables: true,
                ..state
            })?;
        }
        Ok(state.tally())
    }

    fn added(&self, outcome: AddOutcome) -> Added {
        Added {
            version: self.heard.get(),
            outcome,
        }
    }

    fn hear(&self, version: u64) {
        self.heard.set(self.heard.get().max(version));
    }

    /// Which shard of which counter this is.
    fn seat(&self) -> Result<(CounterName, Seat), ClassError> {
        let name = self.context.name()?;
        name.as_ref().and_then(Seat::of_object).ok_or_else(|| {
            ClassError::BadRequest(format!(
                "{} is no name of a counter's shard",
                name.as_ref().map_or("", |name| name.as_str())
            ))
        })
    }

    fn state(&self) -> Result<State, ClassError> {
        if let Some(state) = self.state.get() {
            return Ok(state);
        }
        let table = self.sql(
            "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'tally'",
            &[],
        )?;
        let mut state = State::default();
        if !table.rows.is_empty() {
            let found = self.sql(
                "SELECT total, turns, generation, retired, reported FROM tally",
                &[],
            )?;
            let row = found.rows.first().map(Vec::as_slice);
            if let Some(
                [
                    SqlValue::Integer(total),
                    turns,
                    generation,
                    retired,
                    reported,
                ],
            ) = row
            {
                state = State {
                    has_tables: true,
                    total: *total,
                    turns: unsigned(turns).unwrap_or(0),
                    generation: unsigned(generation),
                    retired: unsigned(retired),
                    reported: unsigned(reported).unwrap_or(0),
                };
            }
        }
        self.hear(state.retired.or(state.generation).unwrap_or(0));
        self.state.set(Some(state));
        Ok(state)
    }

    /// Makes the tables if there are none.
    fn prepare(&self, state: State) -> Result<(), ClassError> {
        if !state.has_tables {
            self.state.set(None);
            self.sql(SCHEMA, &[])?;
            self.state.set(Some(State {
                has_tables: true,
                ..state
            }));
        }
        Ok(())
    }

    fn write(&self, state: State) -> Result<(), ClassError> {
        self.state.set(None);
        let optional = |value: Option<u64>| value.map_or(SqlValue::Null, number);
        self.sql(
            "UPDATE tally SET total = ?1, turns = ?2, generation = ?3, retired = ?4, reported = ?5",
            &[
                state.total.into(),
                number(state.turns),
                optional(state.generation),
                optional(state.retired),
                number(state.reported),
            ],
        )?;
        self.state.set(Some(state));
        Ok(())
    }

    fn sql(&self, sql: &str, values: &[SqlValue]) -> Result<Rows, ClassError> {
        Ok(self.context.storage().exec(sql, values, RESULT_BYTES)?)
    }
}

impl Instance for Counting {
    fn fetch(self: Rc<Self>, _request: Request<Body>) -> Turn<Response<Body>> {
        no_pages(&self.class)
    }

    fn call(self: Rc<Self>, method: &str, args: Args) -> Turn<Json> {
        let begun = match method {
            ADD_ONCE => self.add_once(args),
            _ => self.answer(method, args).map(|done| Turn::Done(Ok(done))),
        };
        begun.unwrap_or_else(|error| Turn::Done(Err(error)))
    }

    fn alarm(self: Rc<Self>, info: AlarmInfo) -> Turn<()> {
        Turn::run(self.report(info))
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
