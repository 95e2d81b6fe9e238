//! `Limiter`: how much of each key was taken lately, for the gateways that share a rate limit.
//!
//! | call | answer |
//! |------|--------|
//! | `take(terms, asks)` | a grant per ask; see [`protocol::limiter`] |
//!
//! Only gateways may call it. The state of a key is a row until it is as good as that of a new one. Writes
//! are unconfirmed: a grant does not wait for the disk. A crash of the node may forget the grants of the
//! last group of the commit log, a few milliseconds of them; sleep, restart and a move forget nothing.
//!
//! An object remembers [`KEYS_MAX`] keys. If more are live, the one that is nearest to being as good as new
//! leaves, and the *floor* (the row with the empty key) remembers the most that anybody who left had taken:
//! whoever comes without a row begins there. So no key gets more than its limit, however many come.

use std::cell::Cell;
use std::rc::Rc;

use http::{Request, Response};
use protocol::ClassName;
use protocol::limiter::{self, ASKS_MAX, Ask, Grant};
use protocol::rate::{Algorithm, Decision, Gcra, Rate, SlidingWindow, Terms};
use serde::de::DeserializeOwned;

use crate::class::{Args, Body, Class, ClassError, Context, Instance, Json, Turn};
use crate::storage::{Rows, SqlValue};

/// Keys that one object remembers; a limit has [`limiter::SLICES`] objects.
const KEYS_MAX: u64 = 100_000;

/// Calls between two looks for keys that are as good as new, and how many leave at a look.
const SWEEP_EVERY: u32 = 64;
const SWEEP_KEYS: i64 = 1024;

const RESULT_BYTES: usize = 4096;

/// `ends_ms` is when the key is as good as new.
const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS keys (
        key BLOB PRIMARY KEY, state BLOB NOT NULL, ends_ms INTEGER NOT NULL) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS keys_by_end ON keys (ends_ms)";

const FLOOR: &[u8] = &[];

pub struct Limiter {
    name: ClassName,
}

impl Default for Limiter {
    fn default() -> Self {
        Self {
            name: limiter::class(),
        }
    }
}

impl Class for Limiter {
    fn name(&self) -> &ClassName {
        &self.name
    }

    fn methods(&self) -> &'static [&'static str] {
        &[limiter::TAKE]
    }

    fn is_internal(&self) -> bool {
        true
    }

    fn construct(&self, context: Context) -> Result<Rc<dyn Instance>, ClassError> {
        let keys = Keys {
            context,
            count: Cell::new(0),
            until_sweep: Cell::new(SWEEP_EVERY),
        };
        let storage = keys.context.storage();
        storage.unconfirmed(|| keys.sql(SCHEMA, &[]))?;
        keys.count_again()?;
        Ok(Rc::new(keys))
    }
}

/// The keys of one object.
struct Keys {
    context: Context,
    /// Rows, the floor included; counted again when a turn may have been undone.
    count: Cell<u64>,
    until_sweep: Cell<u32>,
}

impl Keys {
    fn take(&self, args: &mut Args) -> Result<Json, ClassError> {
        args.expect(2..=2, "take(terms, asks)")?;
        let terms: Terms = parse(args, 0, "terms")?;
        terms
            .check()
            .map_err(|error| ClassError::BadRequest(format!("take: {error}")))?;
        let asks: Vec<Ask> = parse(args, 1, "asks")?;
        if asks.len() > ASKS_MAX {
            return Err(ClassError::BadRequest(format!(
                "take: {} asks are more than {ASKS_MAX}",
                asks.len()
            )));
        }
        let granted = self
            .context
            .storage()
            .unconfirmed(|| match terms.algorithm {
                Algorithm::Gcra => self.grant_all(Gcra::new(&terms), &asks),
                Algorithm::SlidingWindow => self.grant_all(SlidingWindow::new(&terms), &asks),
            });
        if granted.is_err() {
            self.count_again()?;
        }
        serde_json::to_value(granted?).map_err(|error| ClassError::Thrown {
            name: "TypeError".to_owned(),
            message: error.to_string(),
        })
    }

    fn grant_all<R: Rate<State: Words>>(
        &self,
        rate: R,
        asks: &[Ask],
    ) -> Result<Vec<Grant>, ClassError> {
        // Milliseconds of the wall clock as nanoseconds; rates bear it when it is set back.
        let now = self.context.unix_millis().saturating_mul(1_000_000);
        self.sweep(now)?;
        asks.iter().map(|ask| self.grant(rate, *ask, now)).collect()
    }

    fn grant<R: Rate<State: Words>>(
        &self,
        rate: R,
        ask: Ask,
        now: u64,
    ) -> Result<Grant, ClassError> {
        let key = ask.key.to_be_bytes();
        let found = self.state(&key)?;
        let mut state: R::State = match found {
            Some(state) => state,
            None => self.state(FLOOR)?.unwrap_or_default(),
        };
        let most = ask.most.min(rate.available(&state, now));
        if most == 0 {
            let wait = match rate.take(&mut state, 1, now) {
                Decision::Refused { wait } => wait,
                Decision::Passed { .. } => 0,
            };
            return Ok(Grant { taken: 0, wait });
        }
        match rate.take(&mut state, most, now) {
            Decision::Passed { .. } => {}
            Decision::Refused { wait } => return Ok(Grant { taken: 0, wait }),
        }
        if found.is_none() {
            self.make_room::<R>(rate, now)?;
            self.count.set(self.count.get() + 1);
        }
        self.put(rate, &key, &state, now)?;
        Ok(Grant {
            taken: most,
            wait: 0,
        })
    }

    /// A key leaves for another if there are too many. Those that are as good as new left before.
    fn make_room<R: Rate<State: Words>>(&self, rate: R, now: u64) -> Result<(), ClassError> {
        if self.count.get() < KEYS_MAX {
            return Ok(());
        }
        let leaving = self.sql(
            "DELETE FROM keys WHERE key = (SELECT key FROM keys WHERE key <> x'' ORDER BY ends_ms LIMIT 1) \
             RETURNING state",
            &[],
        )?;
        self.count.set(self.count.get().saturating_sub(1));
        let Some(leaving) = first_state::<R::State>(&leaving) else {
            return Ok(());
        };
        if rate.recovers_in(&leaving, now) == 0 {
            return Ok(());
        }
        let floor: Option<R::State> = self.state(FLOOR)?;
        if floor.is_none() {
            self.count.set(self.count.get() + 1);
        }
        let mut floor = floor.unwrap_or_default();
        rate.merge(&mut floor, &leaving, now);
        self.put(rate, FLOOR, &floor, now)
    }

    /// Keys that are as good as new leave, some at a time.
    fn sweep(&self, now: u64) -> Result<(), ClassError> {
        let left = self.until_sweep.get();
        if left > 0 && self.count.get() < KEYS_MAX {
            self.until_sweep.set(left - 1);
            return Ok(());
        }
        self.until_sweep.set(SWEEP_EVERY);
        let swept = self.sql(
            "DELETE FROM keys WHERE key IN (SELECT key FROM keys WHERE ends_ms < ? ORDER BY ends_ms LIMIT ?)",
            &[number(now / 1_000_000), SqlValue::Integer(SWEEP_KEYS)],
        )?;
        self.count
            .set(self.count.get().saturating_sub(swept.rows_written));
        Ok(())
    }

    fn state<S: Words>(&self, key: &[u8]) -> Result<Option<S>, ClassError> {
        let key = SqlValue::Blob(key.to_vec());
        let found = self.sql("SELECT state FROM keys WHERE key = ?", &[key])?;
        Ok(first_state(&found))
    }

    fn put<R: Rate<State: Words>>(
        &self,
        rate: R,
        key: &[u8],
        state: &R::State,
        now: u64,
    ) -> Result<(), ClassError> {
        let ends = now.saturating_add(rate.recovers_in(state, now)) / 1_000_000;
        self.sql(
            "INSERT INTO keys VALUES (?1, ?2, ?3) \
             ON CONFLICT (key) DO UPDATE SET state = ?2, ends_ms = ?3",
            &[
                SqlValue::Blob(key.to_vec()),
                SqlValue::Blob(state.to_bytes()),
                number(ends),
            ],
        )?;
        Ok(())
    }

    fn count_again(&self) -> Result<(), ClassError> {
        let found = self.sql("SELECT count(*) FROM keys", &[])?;
        let count = match found.rows.first().map(Vec::as_slice) {
            Some([SqlValue::Integer(count)]) => u64::try_from(*count).unwrap_or(0),
            _ => 0,
        };
        self.count.set(count);
        Ok(())
    }

    fn sql(&self, sql: &str, values: &[SqlValue]) -> Result<Rows, ClassError> {
        Ok(self.context.storage().exec(sql, values, RESULT_BYTES)?)
    }
}

impl Instance for Keys {
    fn fetch(self: Rc<Self>, _request: Request<Body>) -> Turn<Response<Body>> {
        Turn::Done(Err(ClassError::NotFound(
            "a limiter has no pages; it answers calls".to_owned(),
        )))
    }

    fn call(self: Rc<Self>, _method: &str, mut args: Args) -> Turn<Json> {
        Turn::Done(self.take(&mut args))
    }
}

/// States of rates as bytes: 64-bit words, little-endian.
trait Words: Sized + Copy + Default {
    fn to_bytes(&self) -> Vec<u8>;
    /// `None` if the length is that of another algorithm's state.
    fn from_bytes(bytes: &[u8]) -> Option<Self>;
}

impl<const N: usize> Words for [u64; N]
where
    [u64; N]: Default,
{
    fn to_bytes(&self) -> Vec<u8> {
        self.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (words, rest) = bytes.as_chunks::<8>();
        let words: &[[u8; 8]; N] = words.try_into().ok()?;
        rest.is_empty().then(|| words.map(u64::from_le_bytes))
    }
}

fn first_state<S: Words>(rows: &Rows) -> Option<S> {
    match rows.rows.first().map(Vec::as_slice) {
        // A limit that has changed its algorithm begins anew.
        Some([SqlValue::Blob(state)]) => S::from_bytes(state),
        _ => None,
    }
}

fn parse<T: DeserializeOwned>(args: &mut Args, at: usize, name: &str) -> Result<T, ClassError> {
    serde_json::from_value(args.take(at)).map_err(|error| {
        ClassError::BadRequest(format!("take: argument {} ({name}): {error}", at + 1))
    })
}

fn number(value: u64) -> SqlValue {
    SqlValue::Integer(i64::try_from(value).unwrap_or(i64::MAX))
}
