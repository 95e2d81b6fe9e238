//! `Counter`: one 64-bit number. Overflow is an error, never a wrap.
//!
//! | call | answer |
//! |------|--------|
//! | `increment(by = 1)`, `POST /increment?by=N` | the new value |
//! | `value()`, `GET /value` or `GET /` | the value; 0 if nothing was ever counted |
//! | `reset()`, `POST /reset` | 0 |

use std::cell::Cell;
use std::rc::Rc;

use http::{Method, Request, Response};
use protocol::ClassName;

use super::answer;
use crate::class::{Args, Body, Class, ClassError, Context, Instance, Json, Turn};
use crate::storage::{SqlValue, StorageError};

/// More than one value takes as the result of a query.
const RESULT_BYTES: usize = 1024;

pub struct Counter {
    name: ClassName,
}

impl Default for Counter {
    fn default() -> Self {
        Self {
            name: super::name("Counter"),
        }
    }
}

impl Class for Counter {
    fn name(&self) -> &ClassName {
        &self.name
    }

    fn methods(&self) -> &'static [&'static str] {
        &["increment", "value", "reset"]
    }

    fn construct(&self, context: Context) -> Result<Rc<dyn Instance>, ClassError> {
        Ok(Rc::new(Count {
            context,
            cached: Cell::new(None),
        }))
    }
}

/// One counter.
struct Count {
    context: Context,
    /// The value in the database, and whether its table exists; `None` until it was read.
    cached: Cell<Option<Stored>>,
}

#[derive(Clone, Copy)]
struct Stored {
    value: i64,
    has_table: bool,
}

impl Count {
    fn stored(&self) -> Result<Stored, StorageError> {
        if let Some(stored) = self.cached.get() {
            return Ok(stored);
        }
        let storage = self.context.storage();
        let table = storage.exec(
            "SELECT 1 FROM sqlite_schema WHERE name = 'counter'",
            &[],
            RESULT_BYTES,
        )?;
        let has_table = !table.rows.is_empty();
        let mut value = 0;
        if has_table {
            let rows = storage.exec("SELECT value FROM counter", &[], RESULT_BYTES)?;
            if let Some([SqlValue::Integer(found)]) = rows.rows.first().map(Vec::as_slice) {
                value = *found;
            }
        }
        let stored = Stored { value, has_table };
        self.cached.set(Some(stored));
        Ok(stored)
    }

    fn store(&self, before: Stored, value: i64) -> Result<i64, StorageError> {
        let storage = self.context.storage();
        // If this turn is not committed the object is reset, but until then memory must not claim it.
        self.cached.set(None);
        if before.has_table {
            storage.exec(
                "UPDATE counter SET value = ?1",
                &[value.into()],
                RESULT_BYTES,
            )?;
        } else {
            storage.exec(
                "CREATE TABLE counter (value INTEGER NOT NULL)",
                &[],
                RESULT_BYTES,
            )?;
            storage.exec(
                "INSERT INTO counter (value) VALUES (?1)",
                &[value.into()],
                RESULT_BYTES,
            )?;
        }
        self.cached.set(Some(Stored {
            value,
            has_table: true,
        }));
        Ok(value)
    }

    fn increment(&self, by: i64) -> Result<i64, ClassError> {
        let before = self.stored()?;
        let value = before.value.checked_add(by).ok_or_else(|| {
            ClassError::BadRequest(format!(
                "{} + {by} does not fit in 64 bits; the counter is unchanged",
                before.value
            ))
        })?;
        Ok(self.store(before, value)?)
    }

    fn reset(&self) -> Result<i64, ClassError> {
        let before = self.stored()?;
        if before.value == 0 {
            return Ok(0);
        }
        Ok(self.store(before, 0)?)
    }

    fn answer(&self, method: &str, args: &Args) -> Result<i64, ClassError> {
        match method {
            "increment" => {
                args.expect(0..=1, "increment(by = 1)")?;
                self.increment(args.integer(0, "by")?.unwrap_or(1))
            }
            "reset" => {
                args.expect(0..=0, "reset()")?;
                self.reset()
            }
            _ => {
                args.expect(0..=0, "value()")?;
                Ok(self.stored()?.value)
            }
        }
    }

    fn respond(&self, request: &Request<Body>) -> Result<i64, ClassError> {
        let wrong_method = |allow| ClassError::MethodNotAllowed {
            allow,
            detail: format!(
                "{} is not offered at {}",
                request.method(),
                request.uri().path()
            ),
        };
        match (request.uri().path(), request.method()) {
            ("/" | "/value", &Method::GET | &Method::HEAD) => Ok(self.stored()?.value),
            ("/" | "/value", _) => Err(wrong_method("GET, HEAD")),
            ("/increment", &Method::POST) => {
                let mut by = 1;
                for (name, value) in answer::query(request)? {
                    match name.as_str() {
                        "by" => by = answer::number("by", &value)?,
                        _ => return Err(answer::unknown_parameter(&name, "by")),
                    }
                }
                self.increment(by)
            }
            ("/reset", &Method::POST) => self.reset(),
            ("/increment" | "/reset", _) => Err(wrong_method("POST")),
            (path, _) => Err(ClassError::NotFound(format!(
                "a counter has no {path:?}; it has /value, /increment and /reset"
            ))),
        }
    }
}

impl Instance for Count {
    fn fetch(self: Rc<Self>, request: Request<Body>) -> Turn<Response<Body>> {
        Turn::Done(
            self.respond(&request)
                .map(|value| answer::json(&value.into())),
        )
    }

    fn call(self: Rc<Self>, method: &str, args: Args) -> Turn<Json> {
        Turn::Done(self.answer(method, &args).map(Json::from))
    }
}
