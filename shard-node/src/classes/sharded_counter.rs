//! Sharded counters: [`Shard`]s that count, and the [`Coordinator`] that knows their sum.
//!
//! What they say to each other and to gateways, and why totals are exact, is in [`protocol::counters`].

mod coordinator;
mod heat;
mod shard;
mod table;

use protocol::ClassName;
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use coordinator::Coordinator;
pub use shard::Shard;

use crate::class::{Args, Body, ClassError, Json, Turn};
use crate::storage::SqlValue;
use http::Response;

/// Bytes of a result: rows of all shards of a large counter.
const RESULT_BYTES: usize = 64 << 20;

/// An argument of a call, by its type.
fn parse<T: DeserializeOwned>(
    args: &mut Args,
    at: usize,
    method: &str,
    name: &str,
) -> Result<T, ClassError> {
    serde_json::from_value(args.take(at)).map_err(|error| {
        ClassError::BadRequest(format!("{method}: argument {} ({name}): {error}", at + 1))
    })
}

fn answer<T: Serialize>(value: T) -> Result<Json, ClassError> {
    serde_json::to_value(value).map_err(|error| ClassError::Thrown {
        name: "TypeError".to_owned(),
        message: error.to_string(),
    })
}

/// The answer of another object, as what it should be.
fn understood<T: DeserializeOwned>(answer: Json, method: &str) -> Result<T, ClassError> {
    serde_json::from_value(answer).map_err(|error| ClassError::Thrown {
        name: "TypeError".to_owned(),
        message: format!("{method} was answered with something else: {error}"),
    })
}

fn no_pages(class: &ClassName) -> Turn<Response<Body>> {
    Turn::Done(Err(ClassError::NotFound(format!(
        "objects of class {class} have no pages; they answer calls"
    ))))
}

fn no_method(class: &ClassName, method: &str) -> ClassError {
    ClassError::NotFound(format!("class {class} has no method {method:?}"))
}

fn number(value: u64) -> SqlValue {
    SqlValue::Integer(i64::try_from(value).unwrap_or(i64::MAX))
}

fn text(value: impl ToString) -> SqlValue {
    SqlValue::Text(value.to_string())
}

/// A column that holds a number which is not negative, or nothing.
fn unsigned(value: &SqlValue) -> Option<u64> {
    match value {
        SqlValue::Integer(number) => u64::try_from(*number).ok(),
        _ => None,
    }
}
