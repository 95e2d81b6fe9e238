//! Idempotency keys of a shard: rows beside its total, in the transaction of the increment.

use std::num::NonZeroUsize;
use std::rc::Rc;
use std::time::Duration;

use protocol::Problem;
use protocol::counters::{
    ADD_ONCE, AddOutcome, Added, CLAIM, Claimed, KEY_BYTES_MAX, KEYS_KEPT, Seat,
};

use super::{ANSWER_MAX, Counting, State, millis};
use crate::class::{Args, ClassError, Json, Turn};
use crate::classes::sharded_counter::{answer, number, parse, text, understood, unsigned};
use crate::fan_out::{FanOut, Needs};
use crate::storage::SqlValue;

/// Claims of one key under way at once: as many shards may have had it as plans were changed in a day.
const CLAIMS_AT_ONCE: NonZeroUsize = NonZeroUsize::new(8).expect("8 is not 0");

/// Keys that are forgotten at a time.
const FORGET_KEYS: i64 = 1000;

/// What is known of an idempotency key.
#[derive(Debug, Clone, Copy)]
struct Key {
    by: Option<i64>,
    lost: Option<u64>,
}

impl Counting {
    /// Adds once per key, wherever the key was before.
    pub(super) fn add_once(self: Rc<Self>, mut args: Args) -> Result<Turn<Json>, ClassError> {
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

    pub(super) fn claim(&self, key: &str, version: u64) -> Result<Claimed, ClassError> {
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

    /// Makes sure that an alarm will look for old keys.
    fn forget_in_time(&self) -> Result<(), ClassError> {
        if !self.reporting.get() && self.context.alarm()?.is_none() {
            let at = self.context.unix_millis() + millis(KEYS_KEPT);
            self.context.set_alarm(at)?;
        }
        Ok(())
    }

    /// When the next key is old enough to be forgotten.
    pub(super) fn forget_keys(&self) -> Result<Option<u64>, ClassError> {
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
