//! SQL functions that SQLite has, with a cost that grows with the length of their arguments alone.
//!
//! SQLite's own `instr`, `replace` and `trim` compare every place of one argument with all of the
//! other: on two values of a megabyte each that takes minutes inside one step of its machine, where
//! no time limit can stop it, and every object of the worker waits. The answers are the same.

use std::borrow::Cow;
use std::collections::HashSet;

use memchr::memmem;
use rusqlite::functions::{Context, FunctionFlags};
use rusqlite::types::{Value, ValueRef};
use rusqlite::{Connection, Error, Result};

/// Replaces the functions on one connection. A result is at most `bytes_max` long.
pub(super) fn install(connection: &Connection, bytes_max: usize) -> Result<()> {
    // The same everywhere and without effect: what indexes and generated columns may use.
    let flags = FunctionFlags::SQLITE_UTF8
        | FunctionFlags::SQLITE_DETERMINISTIC
        | FunctionFlags::SQLITE_INNOCUOUS;
    connection.create_scalar_function("instr", 2, flags, instr)?;
    connection.create_scalar_function("replace", 3, flags, move |context| {
        replace(context, bytes_max)
    })?;
    for (name, start, end) in [
        ("trim", true, true),
        ("ltrim", true, false),
        ("rtrim", false, true),
    ] {
        connection.create_scalar_function(name, 1, flags, move |context| {
            Ok(text(context, 0)?.map(|text| trim(&text, " ", start, end)))
        })?;
        connection.create_scalar_function(name, 2, flags, move |context| {
            let (Some(text), Some(set)) = (text(context, 0)?, text(context, 1)?) else {
                return Ok(None);
            };
            Ok(Some(trim(&text, &set, start, end)))
        })?;
    }
    Ok(())
}

/// Where the second value first occurs in the first, counted from 1; 0 if nowhere. In bytes if both
/// are blobs, else in characters.
fn instr(context: &Context<'_>) -> Result<Option<i64>> {
    if let (ValueRef::Blob(whole), ValueRef::Blob(part)) = (context.get_raw(0), context.get_raw(1))
    {
        return Ok(Some(place(memmem::find(whole, part))));
    }
    let (Some(whole), Some(part)) = (text(context, 0)?, text(context, 1)?) else {
        return Ok(None);
    };
    let found = memmem::find(whole.as_bytes(), part.as_bytes());
    Ok(Some(place(found.map(|at| whole[..at].chars().count()))))
}

fn place(found: Option<usize>) -> i64 {
    found.map_or(0, |at| i64::try_from(at).unwrap_or(i64::MAX - 1) + 1)
}

fn replace(context: &Context<'_>, bytes_max: usize) -> Result<Value> {
    let (Some(whole), Some(part)) = (text(context, 0)?, text(context, 1)?) else {
        return Ok(Value::Null);
    };
    if part.is_empty() {
        // SQLite gives the first argument back, whatever the third.
        return Ok(Value::Text(whole.into_owned()));
    }
    let Some(by) = text(context, 2)? else {
        return Ok(Value::Null);
    };
    let mut result = String::new();
    let mut done = 0;
    for at in memmem::find_iter(whole.as_bytes(), part.as_bytes()) {
        result.push_str(&whole[done..at]);
        result.push_str(&by);
        done = at + part.len();
        if result.len() > bytes_max {
            return Err(Error::SqliteFailure(
                rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_TOOBIG),
                Some("string or blob too big".to_owned()),
            ));
        }
    }
    result.push_str(&whole[done..]);
    Ok(Value::Text(result))
}

fn trim(text: &str, set: &str, start: bool, end: bool) -> String {
    let set: HashSet<char> = set.chars().collect();
    let mut rest = text;
    if start {
        rest = rest.trim_start_matches(|character| set.contains(&character));
    }
    if end {
        rest = rest.trim_end_matches(|character| set.contains(&character));
    }
    rest.to_owned()
}

/// An argument as text, as SQLite converts it; `None` for NULL.
fn text<'a>(context: &'a Context<'_>, argument: usize) -> Result<Option<Cow<'a, str>>> {
    Ok(match context.get_raw(argument) {
        ValueRef::Null => None,
        ValueRef::Integer(integer) => Some(integer.to_string().into()),
        ValueRef::Real(real) => Some(real_text(real)?.into()),
        ValueRef::Text(bytes) | ValueRef::Blob(bytes) => Some(String::from_utf8_lossy(bytes)),
    })
}

/// A real as SQLite prints it, which differs from version to version: so SQLite is asked. Rare.
fn real_text(real: f64) -> Result<String> {
    thread_local! {
        static SCRATCH: Result<Connection> = Connection::open_in_memory();
    }
    SCRATCH.with(|scratch| match scratch {
        Ok(connection) => connection
            .prepare_cached("SELECT CAST(?1 AS TEXT)")?
            .query_row([real], |row| row.get(0)),
        Err(_) => Err(Error::InvalidQuery),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn value() -> impl Strategy<Value = Value> {
        prop_oneof![
            Just(Value::Null),
            (-20..20i64).prop_map(Value::Integer),
            any::<i64>().prop_map(Value::Integer),
            prop_oneof![
                Just(0.0),
                Just(1e15),
                Just(-2.5),
                Just(1e-5),
                Just(123456789.125),
                Just(1e300),
                Just(0.0001)
            ]
            .prop_map(Value::Real),
            "[ab\u{e9}]{0,6}".prop_map(Value::Text),
            "[ab]{0,6}".prop_map(|text| Value::Blob(text.into_bytes())),
        ]
    }

    proptest! {
        #[test]
        fn answers_are_sqlites_own(a in value(), b in value(), c in value()) {
            let (stock, ours) = (Connection::open_in_memory().unwrap(), Connection::open_in_memory().unwrap());
            install(&ours, 1000).unwrap();
            for call in [
                "instr(?1, ?2)", "replace(?1, ?2, ?3)", "trim(?1)", "ltrim(?1)", "rtrim(?1)",
                "trim(?1, ?2)", "ltrim(?1, ?2)", "rtrim(?1, ?2)",
            ] {
                let sql = format!("SELECT {call} FROM (SELECT ?1, ?2, ?3)");
                let run = |connection: &Connection| -> Value {
                    connection.query_row(&sql, (&a, &b, &c), |row| row.get(0)).unwrap()
                };
                prop_assert_eq!(run(&ours), run(&stock), "{} of {:?} {:?} {:?}", call, a, b, c);
            }
        }
    }

    #[test]
    fn the_worst_arguments_cost_little() {
        let connection = Connection::open_in_memory().unwrap();
        install(&connection, 2 << 20).unwrap();
        // Of this thread alone, however busy the machine is.
        let cpu_seconds = || {
            let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
            time.tv_sec
        };
        let begun = cpu_seconds();
        for sql in [
            "SELECT instr(zeroblob(2000000), CAST(zeroblob(1000000) || x'01' AS BLOB))",
            "SELECT length(replace(replace(hex(zeroblob(500000)), '00', 'ab'), replace(hex(zeroblob(250000)), '00', 'ab') || 'x', 'y'))",
            "SELECT length(ltrim(hex(zeroblob(900000)), hex(randomblob(900000))))",
        ] {
            connection
                .query_row(sql, [], |row| row.get::<_, i64>(0))
                .unwrap();
        }
        let seconds = cpu_seconds() - begun;
        assert!(seconds < 4, "{seconds} s; quadratic cost would be minutes");
        let large = "SELECT replace(hex(zeroblob(900000)), '0', 'abc')";
        let error = connection
            .query_row(large, [], |row| row.get::<_, String>(0))
            .unwrap_err();
        assert!(error.to_string().contains("too big"), "{error}");
    }
}
