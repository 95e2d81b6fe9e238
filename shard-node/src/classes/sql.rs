//! `Sql`: a database of one's own.
//!
//! | call | answer |
//! |------|--------|
//! | `exec(sql, params…)`, `POST /exec` with `{"sql", "params": […]}` | `{"columns", "rows", "rows_read", "rows_written"}` |
//! | `one(sql, params…)` | the only row, as an object; no row or more than one is an error |
//! | `size()` | bytes of the database |
//! | `deleteAll()` | deletes everything; the object is gone when it sleeps |
//!
//! The SQL may have several statements; the parameters go to the last of them, and so does the
//! answer. All of one call is one transaction. Values are JSON's, and those JSON lacks are written
//! as in [`values`](super::values).

use std::rc::Rc;

use http::{Method, Request, Response};
use protocol::{ClassName, limits};
use serde::Deserialize;
use serde_json::Map;

use super::{answer, values};
use crate::class::{Args, Body, Class, ClassError, Context, Instance, Json, Turn, clip};
use crate::storage::{Rows, SqlValue, Storage};

pub struct Sql {
    name: ClassName,
}

impl Default for Sql {
    fn default() -> Self {
        Self {
            name: super::name("Sql"),
        }
    }
}

impl Class for Sql {
    fn name(&self) -> &ClassName {
        &self.name
    }

    fn methods(&self) -> &'static [&'static str] {
        &["exec", "one", "size", "deleteAll"]
    }

    fn construct(&self, context: Context) -> Result<Rc<dyn Instance>, ClassError> {
        Ok(Rc::new(Database { context }))
    }
}

/// One database.
struct Database {
    context: Context,
}

/// The body of `POST /exec`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ExecBody {
    sql: String,
    #[serde(default)]
    params: Vec<Json>,
}

impl Database {
    fn answer(&self, method: &str, args: Args) -> Result<Json, ClassError> {
        match method {
            "exec" => Ok(to_json(self.call_exec("exec(sql, params…)", args)?)),
            "one" => one(self.call_exec("one(sql, params…)", args)?),
            "deleteAll" => {
                args.expect(0..=0, "deleteAll()")?;
                self.context.delete_all()?;
                Ok(Json::Null)
            }
            _ => {
                args.expect(0..=0, "size()")?;
                Ok(self.context.storage().database_bytes()?.into())
            }
        }
    }

    fn call_exec(&self, usage: &str, mut args: Args) -> Result<Rows, ClassError> {
        args.expect(1..=usize::MAX, usage)?;
        let sql = args.text(0, "sql")?.to_owned();
        let mut params = Vec::with_capacity(args.len() - 1);
        for at in 1..args.len() {
            let shown = args.get(at).cloned();
            let param = values::sql_from_json(args.take(at))
                .map_err(|rule| args.wrong(at, "parameter", &rule, shown.as_ref()))?;
            params.push(param);
        }
        self.exec(&sql, &params)
    }

    fn exec(&self, sql: &str, params: &[SqlValue]) -> Result<Rows, ClassError> {
        let rows = self
            .context
            .storage()
            .exec(sql, params, limits::RPC_BODY_BYTES_MAX)?;
        Ok(rows)
    }

    fn exec_body(&self, body: &[u8]) -> Result<Response<Body>, ClassError> {
        let body: ExecBody = serde_json::from_slice(body).map_err(|error| {
            ClassError::BadRequest(format!("the body must be {{\"sql\", \"params\"}}: {error}"))
        })?;
        let rows = run(self.context.storage(), &body.sql, body.params)?;
        Ok(answer::json(&rows))
    }
}

impl Instance for Database {
    fn fetch(self: Rc<Self>, request: Request<Body>) -> Turn<Response<Body>> {
        if request.uri().path() != "/exec" {
            return Turn::Done(Err(ClassError::NotFound(format!(
                "a database has no {:?}; it has /exec",
                request.uri().path()
            ))));
        }
        if request.method() != Method::POST {
            return Turn::Done(Err(ClassError::MethodNotAllowed {
                allow: "POST",
                detail: format!("{} is not offered at /exec; POST is", request.method()),
            }));
        }
        Turn::run(async move {
            let body = request.into_body().read(limits::RPC_BODY_BYTES_MAX).await?;
            self.exec_body(&body)
        })
    }

    fn call(self: Rc<Self>, method: &str, args: Args) -> Turn<Json> {
        Turn::Done(self.answer(method, args))
    }
}

/// Runs SQL with parameters from JSON, to JSON.
pub(crate) fn run(storage: &Storage, sql: &str, params: Vec<Json>) -> Result<Json, ClassError> {
    let params = (1..)
        .zip(params)
        .map(|(number, value)| {
            let shown = clip(&value.to_string());
            values::sql_from_json(value).map_err(|rule| {
                ClassError::BadRequest(format!("parameter {number} must be {rule}, not {shown}"))
            })
        })
        .collect::<Result<Vec<_>, _>>()?;
    let rows = storage.exec(sql, &params, limits::RPC_BODY_BYTES_MAX)?;
    Ok(to_json(rows))
}

fn to_json(rows: Rows) -> Json {
    let values: Vec<Json> = rows
        .rows
        .into_iter()
        .map(|row| row.into_iter().map(values::sql_to_json).collect())
        .collect();
    serde_json::json!({
        "columns": rows.columns,
        "rows": values,
        "rows_read": rows.rows_read,
        "rows_written": rows.rows_written,
    })
}

fn one(mut rows: Rows) -> Result<Json, ClassError> {
    if rows.rows.len() != 1 {
        return Err(ClassError::BadRequest(format!(
            "one() wants exactly one row, but the query gave {}",
            rows.rows.len()
        )));
    }
    let twice = (1..)
        .zip(&rows.columns)
        .find(|(next, column)| rows.columns[*next..].contains(column));
    if let Some((_, column)) = twice {
        return Err(ClassError::BadRequest(format!(
            "two columns of the row are called {column:?}: name one of them with AS"
        )));
    }
    let values = rows.rows.remove(0).into_iter().map(values::sql_to_json);
    Ok(Json::Object(
        rows.columns.into_iter().zip(values).collect::<Map<_, _>>(),
    ))
}
