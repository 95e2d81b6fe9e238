//! `Queue`: messages that somebody fetches, works on and acknowledges; at least once.
//!
//! | call | answer |
//! |------|--------|
//! | `send(body, {delayMs})` | the message's id; it can be fetched after the delay |
//! | `receive({max, visibilityMs})` | `[{"id", "body", "attempts", "lease"}]`, oldest first; hidden from others for a time |
//! | `ack(id, lease)` | whether the message was still leased so, and is gone now |
//! | `retry(id, lease, {delayMs})` | the same, but it can be fetched again |
//! | `configure({maxAttempts})` | the settings: fetches of one message before it is given up, 1 to 100 |
//! | `stats()` | `{"ready", "delayed", "leased", "dead"}` |
//! | `dead({max})`, `redrive(id)` | messages that were given up; sends one of them again |
//!
//! A message whose lease runs out is back, or given up after its last attempt: the object's alarm sees to
//! it. A body is any JSON of at most 128 KiB, as in Cloudflare Queues
//! (<https://developers.cloudflare.com/queues/platform/limits/>).

use std::rc::Rc;

use http::{Request, Response};
use protocol::ClassName;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value as Json, json};

use crate::class::{AlarmInfo, Args, Body, Class, ClassError, Context, Instance, Turn};
use crate::storage::{Rows, SqlValue};

/// Bytes of a body as JSON.
const BODY_BYTES_MAX: usize = 128 << 10;

/// Messages of one fetch: one by default, a hundred at the most.
const RECEIVE_MAX: u32 = 100;

/// How long a fetched message is hidden, unless the caller says otherwise: half a minute, twelve hours at
/// the most; and the longest delay.
const VISIBILITY_MS: u64 = 30_000;
const VISIBILITY_MS_MAX: u64 = 12 * 3_600_000;
const DELAY_MS_MAX: u64 = 12 * 3_600_000;

/// Fetches of one message before it is given up, unless the queue was told otherwise.
const ATTEMPTS: i64 = 4;
const ATTEMPTS_MAX: i64 = 100;

const RESULT_BYTES_MAX: usize = 32 << 20;

/// A message is ready from `at_ms` on; while it is leased that is when the lease ends. Dead ones have none.
const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS messages (
        id INTEGER PRIMARY KEY AUTOINCREMENT, body TEXT NOT NULL, sent_ms INTEGER NOT NULL,
        at_ms INTEGER, attempts INTEGER NOT NULL DEFAULT 0, lease TEXT);
    CREATE INDEX IF NOT EXISTS messages_by_time ON messages (at_ms) WHERE at_ms IS NOT NULL;
    CREATE INDEX IF NOT EXISTS messages_by_lease ON messages (at_ms) WHERE lease IS NOT NULL;
    CREATE TABLE IF NOT EXISTS settings (max_attempts INTEGER NOT NULL)";

pub struct Queue {
    name: ClassName,
}

impl Default for Queue {
    fn default() -> Self {
        Self {
            name: super::name("Queue"),
        }
    }
}

impl Class for Queue {
    fn name(&self) -> &ClassName {
        &self.name
    }

    fn methods(&self) -> &'static [&'static str] {
        &[
            "send",
            "receive",
            "ack",
            "retry",
            "configure",
            "stats",
            "dead",
            "redrive",
        ]
    }

    fn handles_alarms(&self) -> bool {
        true
    }

    fn construct(&self, context: Context) -> Result<Rc<dyn Instance>, ClassError> {
        Ok(Rc::new(Messages { context }))
    }
}

/// One queue.
struct Messages {
    context: Context,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct SendOptions {
    delay_ms: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
struct ReceiveOptions {
    max: Option<u32>,
    visibility_ms: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    max_attempts: i64,
}

impl Messages {
    fn answer(&self, method: &str, mut args: Args) -> Result<Json, ClassError> {
        match method {
            "send" => self.send(&mut args),
            "receive" => self.receive(&mut args),
            "ack" => self.ack(&args),
            "retry" => self.retry(&mut args),
            "configure" => self.configure(&mut args),
            "stats" => self.stats(&args),
            "dead" => self.dead(&mut args),
            _ => self.redrive(&args),
        }
    }

    fn send(&self, args: &mut Args) -> Result<Json, ClassError> {
        args.expect(1..=2, "send(body, {delayMs})")?;
        let body = args.take(0).to_string();
        if body.len() > BODY_BYTES_MAX {
            return Err(ClassError::PayloadTooLarge(format!(
                "a message of {} bytes is larger than {BODY_BYTES_MAX}",
                body.len()
            )));
        }
        let options: SendOptions = options(args, 1, "send")?;
        let delay = within("delayMs", options.delay_ms, DELAY_MS_MAX)?;
        let now = self.context.unix_millis();
        self.prepare()?;
        let sent = self.sql(
            "INSERT INTO messages (body, sent_ms, at_ms) VALUES (?, ?, ?) RETURNING id",
            &[SqlValue::Text(body), time(now), time(now + delay)],
        )?;
        Ok(first(&sent))
    }

    fn receive(&self, args: &mut Args) -> Result<Json, ClassError> {
        args.expect(0..=1, "receive({max, visibilityMs})")?;
        let options: ReceiveOptions = options(args, 0, "receive")?;
        let max = options.max.unwrap_or(1);
        if max == 0 || max > RECEIVE_MAX {
            return Err(ClassError::BadRequest(format!(
                "receive: max = {max} must be from 1 to {RECEIVE_MAX}"
            )));
        }
        let visibility = options.visibility_ms.unwrap_or(VISIBILITY_MS);
        let visibility = within("visibilityMs", visibility, VISIBILITY_MS_MAX)?;
        if !self.is_prepared()? {
            return Ok(json!([]));
        }
        self.expire()?;
        let now = self.context.unix_millis();
        // A lease is told from the next one of the same message by its attempt, and cannot be guessed.
        let leased = self.sql(
            "UPDATE messages SET attempts = attempts + 1, at_ms = ?1, \
               lease = (attempts + 1) || '-' || lower(hex(randomblob(8))) \
             WHERE id IN (SELECT id FROM messages WHERE at_ms <= ?2 ORDER BY at_ms, id LIMIT ?3) \
             RETURNING id, body, attempts, lease",
            &[
                time(now + visibility),
                time(now),
                SqlValue::Integer(max.into()),
            ],
        )?;
        let mut messages: Vec<Json> = leased.rows.into_iter().map(message).collect();
        messages.sort_by_key(|message| message["id"].as_i64());
        if !messages.is_empty() {
            self.arm()?;
        }
        Ok(messages.into())
    }

    fn ack(&self, args: &Args) -> Result<Json, ClassError> {
        args.expect(2..=2, "ack(id, lease)")?;
        self.if_leased(
            args,
            "DELETE FROM messages WHERE id = ?1 AND lease = ?2 AND at_ms > ?3",
            &[],
        )
    }

    fn retry(&self, args: &mut Args) -> Result<Json, ClassError> {
        args.expect(2..=3, "retry(id, lease, {delayMs})")?;
        let options: SendOptions = options(args, 2, "retry")?;
        let delay = within("delayMs", options.delay_ms, DELAY_MS_MAX)?;
        let at = time(self.context.unix_millis() + delay);
        // After its last attempt it is given up like one whose lease ran out.
        self.if_leased(
            args,
            "UPDATE messages SET lease = NULL, \
               at_ms = CASE WHEN attempts < ?5 THEN ?4 END \
             WHERE id = ?1 AND lease = ?2 AND at_ms > ?3",
            &[at, SqlValue::Integer(self.max_attempts()?)],
        )
    }

    /// Runs SQL on the message that is leased as the caller says; whether there was one.
    fn if_leased(&self, args: &Args, sql: &str, more: &[SqlValue]) -> Result<Json, ClassError> {
        let id = self.id(args)?;
        let lease = SqlValue::Text(args.text(1, "lease")?.to_owned());
        if !self.is_prepared()? {
            return Ok(false.into());
        }
        let mut values = vec![id, lease, time(self.context.unix_millis())];
        values.extend_from_slice(more);
        let changed = self.sql(sql, &values)?;
        Ok((changed.rows_written > 0).into())
    }

    fn id(&self, args: &Args) -> Result<SqlValue, ClassError> {
        match args.integer(0, "id")? {
            Some(id) => Ok(SqlValue::Integer(id)),
            None => Err(args.wrong(0, "id", "an integer", None)),
        }
    }

    fn configure(&self, args: &mut Args) -> Result<Json, ClassError> {
        args.expect(1..=1, "configure({maxAttempts})")?;
        let settings: Settings = serde_json::from_value(args.take(0))
            .map_err(|error| ClassError::BadRequest(format!("configure: {error}")))?;
        if !(1..=ATTEMPTS_MAX).contains(&settings.max_attempts) {
            return Err(ClassError::BadRequest(format!(
                "configure: maxAttempts = {} must be from 1 to {ATTEMPTS_MAX}",
                settings.max_attempts
            )));
        }
        self.prepare()?;
        self.sql("DELETE FROM settings", &[])?;
        let attempts = SqlValue::Integer(settings.max_attempts);
        self.sql("INSERT INTO settings VALUES (?)", &[attempts])?;
        Ok(json!({ "maxAttempts": settings.max_attempts }))
    }

    fn stats(&self, args: &Args) -> Result<Json, ClassError> {
        args.expect(0..=0, "stats()")?;
        if !self.is_prepared()? {
            return Ok(json!({ "ready": 0, "delayed": 0, "leased": 0, "dead": 0 }));
        }
        self.expire()?;
        let found = self.sql(
            "SELECT count(*) FILTER (WHERE at_ms <= ?1), \
               count(*) FILTER (WHERE at_ms > ?1 AND lease IS NULL), \
               count(*) FILTER (WHERE at_ms > ?1 AND lease IS NOT NULL), \
               count(*) FILTER (WHERE at_ms IS NULL) FROM messages",
            &[time(self.context.unix_millis())],
        )?;
        let count = |at: usize| match found.rows[0][at] {
            SqlValue::Integer(count) => count,
            _ => 0,
        };
        Ok(json!({ "ready": count(0), "delayed": count(1), "leased": count(2), "dead": count(3) }))
    }

    fn dead(&self, args: &mut Args) -> Result<Json, ClassError> {
        args.expect(0..=1, "dead({max})")?;
        let options: ReceiveOptions = options(args, 0, "dead")?;
        if !self.is_prepared()? {
            return Ok(json!([]));
        }
        self.expire()?;
        let max = options.max.unwrap_or(RECEIVE_MAX);
        let found = self.sql(
            "SELECT id, body, attempts, NULL FROM messages WHERE at_ms IS NULL ORDER BY id LIMIT ?",
            &[SqlValue::Integer(max.into())],
        )?;
        Ok(found.rows.into_iter().map(message).collect())
    }

    fn redrive(&self, args: &Args) -> Result<Json, ClassError> {
        args.expect(1..=1, "redrive(id)")?;
        let id = self.id(args)?;
        if !self.is_prepared()? {
            return Ok(false.into());
        }
        let changed = self.sql(
            "UPDATE messages SET attempts = 0, at_ms = ? WHERE id = ? AND at_ms IS NULL",
            &[time(self.context.unix_millis()), id],
        )?;
        Ok((changed.rows_written > 0).into())
    }

    /// Leases that ran out are none any more; a message that had its last one is dead.
    fn expire(&self) -> Result<(), ClassError> {
        let now = time(self.context.unix_millis());
        let expired = "FROM messages WHERE lease IS NOT NULL AND at_ms <= ?1";
        let any = self.sql(
            &format!("SELECT 1 {expired} LIMIT 1"),
            std::slice::from_ref(&now),
        )?;
        if !any.rows.is_empty() {
            let expire = format!(
                "UPDATE messages SET lease = NULL, at_ms = CASE WHEN attempts < ?2 THEN at_ms END \
                 WHERE id IN (SELECT id {expired})"
            );
            let attempts = SqlValue::Integer(self.max_attempts()?);
            self.sql(&expire, &[now, attempts])?;
        }
        Ok(())
    }

    /// The alarm rings when the first lease runs out.
    fn arm(&self) -> Result<(), ClassError> {
        let first = self.sql(
            "SELECT min(at_ms) FROM messages WHERE lease IS NOT NULL",
            &[],
        )?;
        match first.rows[0][0] {
            SqlValue::Integer(at) => {
                let at = u64::try_from(at).unwrap_or(0);
                match self.context.alarm()? {
                    Some(set) if set <= at => Ok(()),
                    _ => self.context.set_alarm(at),
                }
            }
            _ => Ok(()),
        }
    }

    fn max_attempts(&self) -> Result<i64, ClassError> {
        let found = self.sql("SELECT max_attempts FROM settings", &[])?;
        Ok(match found.rows.first().map(|row| &row[0]) {
            Some(SqlValue::Integer(attempts)) => *attempts,
            _ => ATTEMPTS,
        })
    }

    fn is_prepared(&self) -> Result<bool, ClassError> {
        let found = self.sql("SELECT 1 FROM sqlite_schema WHERE name = 'settings'", &[])?;
        Ok(!found.rows.is_empty())
    }

    fn prepare(&self) -> Result<(), ClassError> {
        if !self.is_prepared()? {
            self.sql(SCHEMA, &[])?;
        }
        Ok(())
    }

    fn sql(&self, sql: &str, values: &[SqlValue]) -> Result<Rows, ClassError> {
        let storage = self.context.storage();
        Ok(storage.exec(sql, values, RESULT_BYTES_MAX)?)
    }
}

impl Instance for Messages {
    fn fetch(self: Rc<Self>, _request: Request<Body>) -> Turn<Response<Body>> {
        Turn::Done(Err(ClassError::NotFound(
            "a queue has no pages; it answers calls".to_owned(),
        )))
    }

    fn call(self: Rc<Self>, method: &str, args: Args) -> Turn<Json> {
        Turn::Done(self.answer(method, args))
    }

    fn alarm(self: Rc<Self>, _info: AlarmInfo) -> Turn<()> {
        Turn::Done(self.expire().and_then(|()| self.arm()))
    }
}

fn options<T: DeserializeOwned + Default>(
    args: &mut Args,
    at: usize,
    method: &str,
) -> Result<T, ClassError> {
    match args.take(at) {
        Json::Null => Ok(T::default()),
        options => serde_json::from_value(options)
            .map_err(|error| ClassError::BadRequest(format!("{method}: options: {error}"))),
    }
}

fn within(name: &str, millis: u64, max: u64) -> Result<u64, ClassError> {
    if millis > max {
        return Err(ClassError::BadRequest(format!(
            "{name} = {millis} must be at most {max}"
        )));
    }
    Ok(millis)
}

fn time(millis: u64) -> SqlValue {
    SqlValue::Integer(i64::try_from(millis).unwrap_or(i64::MAX))
}

fn first(rows: &Rows) -> Json {
    match rows.rows.first().and_then(|row| row.first()) {
        Some(SqlValue::Integer(number)) => (*number).into(),
        _ => Json::Null,
    }
}

/// A row of id, body, attempts and lease.
fn message(row: Vec<SqlValue>) -> Json {
    let mut values = row.into_iter().map(super::values::sql_to_json);
    let mut next = || values.next().unwrap_or(Json::Null);
    let (id, body, attempts, lease) = (next(), next(), next(), next());
    let body = body.as_str().map(serde_json::from_str::<Json>);
    let body = body.and_then(Result::ok).unwrap_or(Json::Null);
    let mut message = json!({ "id": id, "body": body, "attempts": attempts });
    if !lease.is_null() {
        message["lease"] = lease;
    }
    message
}
