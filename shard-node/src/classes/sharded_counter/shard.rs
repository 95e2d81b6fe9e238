//! `CounterShard`: one shard of a counter.
//!
//! It writes its total with every increment, and sets its alarm when it turns from having nothing new to having
//! something: the alarm reports, so no increment stays unreported, whatever dies. A report that fails is tried
//! again for ever.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::num::NonZeroUsize;
use std::rc::Rc;
use std::time::Duration;

use http::{Request, Response};
use protocol::counters::{
    self, ADD, ADD_ONCE, AddOutcome, Added, CLAIM, Claimed, CounterName, KEY_BYTES_MAX, KEYS_KEPT,
    REPORT, REPORT_EVERY_MIN, RETIRE, Report, Reported, Seat, TELL, Tally,
};
use protocol::{ClassName, Problem};
use tracing::debug;

use super::{RESULT_BYTES, answer, no_method, no_pages, number, parse, text, understood, unsigned};
use crate::class::{AlarmInfo, Args, Body, Class, ClassError, Context, Instance, Json, Turn};
use crate::fan_out::{FanOut, Needs};
use crate::storage::{Rows, SqlValue};

/// After a report failed, the next one is tried after twice the time, at most this.
const RETRY_MAX: Duration = Duration::from_secs(10);

/// How long a report or a claim may take.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Claims of one key under way at once: as many shards may have had it as plans were changed in a day.
const CLAIMS_AT_ONCE: NonZeroUsize = NonZeroUsize::new(8).expect("8 is not 0");

/// Keys that are forgotten at a time.
const FORGET_KEYS: i64 = 1000;

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

/// What is known of an idempotency key.
#[derive(Debug, Clone, Copy)]
struct Key {
    by: Option<i64>,
    lost: Option<u64>,
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

    /// Adds once per key, wherever the key was before.
    fn add_once(self: Rc<Self>, mut args: Args) -> Result<Turn<Json>, ClassError> {
        args.expect(4..=4, "add_once(key, by, version, seats)")?;
        let key: Box<str> = parse(&mut args, 0, ADD_ONCE, "key")?;
        let by: i64 = parse(&mut args, 1, ADD_ONCE, "by")?;
        let version: u64 = parse(&mut args, 2, ADD_ONCE, "version")?;
        let seats: Vec<Seat> = parse(&mut args, 3, ADD_ONCE, "seats")?;
        check_key(&key)?;
        self.hear(version);
        if let Some(added) = self.known(&key, by, version)? {
            return Ok(Turn::Done(answer(added)));
        }
        if seats.is_empty() {
            return Ok(Turn::Done(answer(self.count_once(&key, by, version)?)));
        }
        let claim = Claim::begin(&self, &key)?;
        Ok(Turn::run(async move {
            let counted = self.claim_all(&key, version, &seats).await?;
            drop(claim);
            // Others had their turns meanwhile.
            if let Some(added) = self.known(&key, by, version)? {
                return answer(added);
            }
            let Some(counted) = counted else {
                return answer(self.count_once(&key, by, version)?);
            };
            self.remember(&key, counted)?;
            same(&key, counted, by)?;
            answer(self.added(AddOutcome::Repeated))
        }))
    }

    /// What is to be answered to an increment with this key, if that is clear already.
    fn known(&self, key: &str, by: i64, version: u64) -> Result<Option<Added>, ClassError> {
        let state = self.state()?;
        let known = self.key(state, key)?;
        if let Some(counted) = known.and_then(|known| known.by) {
            same(key, counted, by)?;
            return Ok(Some(self.added(AddOutcome::Repeated)));
        }
        let lost = known.and_then(|known| known.lost);
        let moved = state.refuses(version) || lost.is_some_and(|lost| version <= lost);
        Ok(moved.then(|| self.added(AddOutcome::Moved)))
    }

    fn count_once(&self, key: &str, by: i64, version: u64) -> Result<Added, ClassError> {
        self.count(self.state()?, by, version)?;
        self.remember(key, by)?;
        Ok(self.added(AddOutcome::Counted))
    }

    /// Asks all that may have had the key. What one of them counted for it.
    async fn claim_all(
        &self,
        key: &str,
        version: u64,
        seats: &[Seat],
    ) -> Result<Option<i64>, ClassError> {
        let (counter, _) = self.seat()?;
        let calls = seats.iter().map(|seat| {
            let (_, name) = counter.shard(*seat);
            let shard = self.context.stub_in(&self.class, seat.home(), &name);
            async move {
                let args = vec![key.into(), version.into()];
                let claimed = shard.within(ANSWER_MAX).call(CLAIM, args).await?;
                understood::<Claimed>(claimed, CLAIM)
            }
        });
        let fan_out = FanOut {
            at_once: CLAIMS_AT_ONCE,
            within: ANSWER_MAX,
            needs: Needs::All,
        };
        let claimed = fan_out.gather(calls).await.map_err(|failed| {
            // Nothing was counted, and the client may send it again.
            ClassError::Called(Problem::unavailable(format!(
                "shards that may know the key {key:?} could not be asked: {failed}"
            )))
        })?;
        // At most one has counted it.
        Ok(claimed.into_iter().find_map(|claimed| claimed.ok()?.by))
    }

    fn claim(&self, key: &str, version: u64) -> Result<Claimed, ClassError> {
        check_key(key)?;
        self.hear(version);
        let state = self.state()?;
        self.prepare(state)?;
        self.sql(
            "INSERT INTO keys VALUES (?1, ?2, NULL, ?3) \
             ON CONFLICT (key) DO UPDATE SET lost = max(coalesce(lost, 0), ?3)",
            &[
                text(key),
                number(self.context.unix_millis()),
                number(version),
            ],
        )?;
        self.forget_in_time()?;
        let known = self.key(self.state()?, key)?;
        Ok(Claimed {
            by: known.and_then(|known| known.by),
        })
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

    /// Reports what is new, and forgets old keys.
    async fn report(self: Rc<Self>, info: AlarmInfo) -> Result<(), ClassError> {
        let state = self.state()?;
        let mut next = None;
        if state.has_news() {
            let begun = self.context.unix_millis();
            let known_since = self.new_since.get().unwrap_or_else(|| {
                // It slept or died since: the alarm was set when the first was counted.
                let before = millis(self.report_every.get());
                info.scheduled_ms.saturating_sub(before)
            });
            let told = self
                .tell(state.tally(), begun.saturating_sub(known_since))
                .await;
            next = self.reported(told, state, begun)?;
        } else {
            self.reporting.set(false);
        }
        let forget = self.forget_keys()?;
        if let Some(at) = next.into_iter().chain(forget).min() {
            self.context.set_alarm(at)?;
        }
        Ok(())
    }

    async fn tell(&self, tally: Tally, lag_ms: u64) -> Result<Reported, ClassError> {
        let (counter, seat) = self.seat()?;
        let report = Report {
            seat,
            tally,
            lag_ms,
        };
        let (_, name) = counter.coordinator();
        let coordinator = self.context.stub(&counters::coordinator_class(), &name);
        let coordinator = coordinator.within(ANSWER_MAX);
        let told = coordinator.call(REPORT, vec![answer(report)?]).await?;
        understood(told, REPORT)
    }

    /// When to report again, if there is something by now.
    fn reported(
        &self,
        told: Result<Reported, ClassError>,
        sent: State,
        begun: u64,
    ) -> Result<Option<u64>, ClassError> {
        let now = self.context.unix_millis();
        match told {
            Ok(reported) => {
                self.hear(reported.version);
                self.report_every
                    .set(Duration::from_millis(reported.report_every_ms));
                self.failures.set(0);
                let mut state = self.state()?;
                // It may have retired and begun again meanwhile.
                if state.generation == sent.generation && state.turns >= sent.turns {
                    self.state.set(None);
                    self.sql("UPDATE tally SET reported = ?1", &[number(sent.turns)])?;
                    state.reported = sent.turns;
                    self.state.set(Some(state));
                }
                self.reporting.set(state.has_news());
                // Whatever came meanwhile came after this.
                self.new_since.set(state.has_news().then_some(begun));
                Ok(state
                    .has_news()
                    .then(|| now + millis(self.report_every.get())))
            }
            Err(error) => {
                let failures = self.failures.get();
                self.failures.set(failures.saturating_add(1));
                let pause = self.report_every.get() * 2_u32.saturating_pow(failures.min(10));
                debug!(shard = %self.context.id(), %error, "a report failed");
                Ok(Some(now + millis(pause.min(RETRY_MAX))))
            }
        }
    }

    /// When the next key is old enough to be forgotten.
    fn forget_keys(&self) -> Result<Option<u64>, ClassError> {
        if !self.state()?.has_tables {
            return Ok(None);
        }
        let now = self.context.unix_millis();
        let before = now.saturating_sub(millis(KEYS_KEPT));
        self.sql(
            "DELETE FROM keys WHERE key IN \
             (SELECT key FROM keys WHERE at_ms < ?1 ORDER BY at_ms LIMIT ?2)",
            &[number(before), FORGET_KEYS.into()],
        )?;
        let first = self.sql("SELECT min(at_ms) FROM keys", &[])?;
        let first = first.rows.first().and_then(|row| unsigned(row.first()?));
        // All of an hour at once.
        const TOGETHER: Duration = Duration::from_secs(3600);
        Ok(first.map(|at| (at + millis(KEYS_KEPT)).max(now) + millis(TOGETHER)))
    }

    /// Makes sure that an alarm will look for old keys.
    fn forget_in_time(&self) -> Result<(), ClassError> {
        if !self.reporting.get() && self.context.alarm()?.is_none() {
            let at = self.context.unix_millis() + millis(KEYS_KEPT);
            self.context.set_alarm(at)?;
        }
        Ok(())
    }

    fn remember(&self, key: &str, by: i64) -> Result<(), ClassError> {
        self.prepare(self.state()?)?;
        self.sql(
            "INSERT INTO keys VALUES (?1, ?2, ?3, NULL) \
             ON CONFLICT (key) DO UPDATE SET at_ms = ?2, by = ?3",
            &[text(key), number(self.context.unix_millis()), by.into()],
        )?;
        self.forget_in_time()
    }

    fn key(&self, state: State, key: &str) -> Result<Option<Key>, ClassError> {
        if !state.has_tables {
            return Ok(None);
        }
        let found = self.sql("SELECT by, lost FROM keys WHERE key = ?1", &[text(key)])?;
        let row = found.rows.first().map(Vec::as_slice);
        Ok(row.and_then(|row| {
            let [by, lost] = row else { return None };
            Some(Key {
                by: match by {
                    SqlValue::Integer(by) => Some(*by),
                    _ => None,
                },
                lost: unsigned(lost),
            })
        }))
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

/// A key that is being claimed; nobody else claims it meanwhile.
struct Claim {
    shard: Rc<Counting>,
    key: Box<str>,
}

impl Claim {
    fn begin(shard: &Rc<Counting>, key: &str) -> Result<Self, ClassError> {
        if !shard.claiming.borrow_mut().insert(key.into()) {
            return Err(ClassError::Called(Problem::unavailable(format!(
                "an increment with the key {key:?} is under way"
            ))));
        }
        Ok(Self {
            shard: Rc::clone(shard),
            key: key.into(),
        })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.shard.claiming.borrow_mut().remove(&self.key);
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

/// A key stands for one increment.
fn same(key: &str, counted: i64, by: i64) -> Result<(), ClassError> {
    if counted == by {
        return Ok(());
    }
    Err(ClassError::BadRequest(format!(
        "the idempotency key {key:?} was used with by={counted}, and now comes with by={by}"
    )))
}

fn check_key(key: &str) -> Result<(), ClassError> {
    if key.is_empty() || key.len() > KEY_BYTES_MAX {
        return Err(ClassError::BadRequest(format!(
            "an idempotency key has from 1 to {KEY_BYTES_MAX} bytes, not {}",
            key.len()
        )));
    }
    Ok(())
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
