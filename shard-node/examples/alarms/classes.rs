//! Five things that alarms are for: a periodic task, a timeout, a delayed action, an object that deletes itself, and a
//! queue whose messages come again (that one ships with the node: `Queue`).

use std::rc::Rc;

use http::{Request, Response};
use protocol::ClassName;
use shard_node::class::{AlarmInfo, Args, Body, Class, ClassError, Context, Instance, Json, Turn};
use shard_node::classes::Classes;
use shard_node::storage::SqlValue;

/// The classes of this example, and those that every node has.
pub(crate) fn classes() -> Classes {
    Classes::built_in()
        .with(Example::new(
            "Heartbeat",
            &["start", "stop", "beats"],
            heartbeat,
        ))
        .with(Example::new("Session", &["touch", "state"], session))
        .with(Example::new("Reminder", &["remind", "said"], reminder))
        .with(Example::new("Draft", &["save", "text"], draft))
}

/// Milliseconds of the examples.
const BEAT_EVERY: u64 = 60_000;
const SESSION_IDLE_MAX: u64 = 30 * 60_000;
const DRAFT_KEPT_FOR: u64 = 3_600_000;

/// What a class of this example does: a call, or the alarm.
type Act = fn(&Context, What<'_>) -> Result<Json, ClassError>;

enum What<'a> {
    Call(&'a str, &'a Args),
    Alarm,
}

/// A periodic task. The handler sets the alarm again: in the same commit as what it did, so no beat is lost
/// or doubled by a crash.
fn heartbeat(context: &Context, what: What<'_>) -> Result<Json, ClassError> {
    match what {
        What::Call("start", _) => context.set_alarm(context.unix_millis() + BEAT_EVERY)?,
        What::Call("stop", _) => context.delete_alarm()?,
        What::Call(..) => return Ok(number(context, "beats")?.into()),
        What::Alarm => {
            put_number(context, "beats", number(context, "beats")? + 1)?;
            context.set_alarm(context.unix_millis() + BEAT_EVERY)?;
        }
    }
    Ok(Json::Null)
}

/// A timeout. Every use moves the one alarm further away; when it runs there was none for half an hour.
fn session(context: &Context, what: What<'_>) -> Result<Json, ClassError> {
    match what {
        What::Call("touch", _) => {
            put_number(context, "open", 1)?;
            context.set_alarm(context.unix_millis() + SESSION_IDLE_MAX)?;
        }
        What::Call(..) => {
            let open = number(context, "open")? == 1;
            return Ok(if open { "open" } else { "closed" }.into());
        }
        What::Alarm => put_number(context, "open", 0)?,
    }
    Ok(Json::Null)
}

/// A delayed action: `remind(text, ms)`. What is to be done is in the database, when in the alarm.
fn reminder(context: &Context, what: What<'_>) -> Result<Json, ClassError> {
    match what {
        What::Call("remind", args) => {
            let text = args.text(0, "text")?;
            let delay = args.integer(1, "ms")?.unwrap_or(0).unsigned_abs();
            put(context, "waiting", text)?;
            context.set_alarm(context.unix_millis() + delay)?;
            Ok(Json::Null)
        }
        What::Call(..) => Ok(get(context, "said")?.into()),
        What::Alarm => {
            let text = get(context, "waiting")?.unwrap_or_default();
            put(context, "said", &text)?;
            Ok(Json::Null)
        }
    }
}

/// An object that deletes itself an hour after its last change. Nothing of it stays on the disk.
fn draft(context: &Context, what: What<'_>) -> Result<Json, ClassError> {
    match what {
        What::Call("save", args) => {
            put(context, "text", args.text(0, "text")?)?;
            context.set_alarm(context.unix_millis() + DRAFT_KEPT_FOR)?;
            Ok(Json::Null)
        }
        What::Call(..) => Ok(get(context, "text")?.into()),
        What::Alarm => {
            context.delete_all()?;
            Ok(Json::Null)
        }
    }
}

fn get(context: &Context, key: &str) -> Result<Option<String>, ClassError> {
    let found = context.storage().kv_get(key)?;
    Ok(found.map(|entry| String::from_utf8_lossy(&entry.value).into_owned()))
}

fn put(context: &Context, key: &str, value: &str) -> Result<(), ClassError> {
    context.storage().kv_put(key, None, value.as_bytes())?;
    Ok(())
}

/// Numbers are rows of a table, to show that, too.
fn number(context: &Context, name: &str) -> Result<i64, ClassError> {
    let storage = context.storage();
    storage.exec(NUMBERS, &[], 1024)?;
    let select = "SELECT value FROM numbers WHERE name = ?";
    let found = storage.exec(select, &[SqlValue::Text(name.to_owned())], 1024)?;
    Ok(match found.rows.first().and_then(|row| row.first()) {
        Some(SqlValue::Integer(value)) => *value,
        _ => 0,
    })
}

fn put_number(context: &Context, name: &str, value: i64) -> Result<(), ClassError> {
    let storage = context.storage();
    storage.exec(NUMBERS, &[], 1024)?;
    let values = [SqlValue::Text(name.to_owned()), SqlValue::Integer(value)];
    storage.exec(
        "INSERT OR REPLACE INTO numbers VALUES (?, ?)",
        &values,
        1024,
    )?;
    Ok(())
}

const NUMBERS: &str = "CREATE TABLE IF NOT EXISTS numbers (name TEXT PRIMARY KEY, value INTEGER)";

/// A class that is one function.
struct Example {
    name: ClassName,
    methods: &'static [&'static str],
    act: Act,
}

impl Example {
    fn new(name: &str, methods: &'static [&'static str], act: Act) -> Self {
        Self {
            name: name.parse().expect("the names here are legal"),
            methods,
            act,
        }
    }
}

impl Class for Example {
    fn name(&self) -> &ClassName {
        &self.name
    }

    fn methods(&self) -> &'static [&'static str] {
        self.methods
    }

    fn handles_alarms(&self) -> bool {
        true
    }

    fn construct(&self, context: Context) -> Result<Rc<dyn Instance>, ClassError> {
        Ok(Rc::new(ExampleObject {
            context,
            act: self.act,
        }))
    }
}

struct ExampleObject {
    context: Context,
    act: Act,
}

impl Instance for ExampleObject {
    fn fetch(self: Rc<Self>, _request: Request<Body>) -> Turn<Response<Body>> {
        let what = "these classes are called: POST /rpc/{class}/{name}/{method}".to_owned();
        Turn::Done(Err(ClassError::NotFound(what)))
    }

    fn call(self: Rc<Self>, method: &str, args: Args) -> Turn<Json> {
        Turn::Done((self.act)(&self.context, What::Call(method, &args)))
    }

    fn alarm(self: Rc<Self>, _info: AlarmInfo) -> Turn<()> {
        Turn::Done((self.act)(&self.context, What::Alarm).map(drop))
    }
}
