//! One set over several storage objects: a library whose shelves hold ten books each. Real parts would be full by
//! [`Storage::database_bytes`](shard_node::storage::Storage::database_bytes); ten can be seen.

use std::rc::Rc;

use serde_json::json;
use shard_node::class::{Args, ClassError, Context, Json, Turn};
use shard_node::classes::Classes;
use shard_node::shard_map::{GROW, MAP, Part, Parts, SEAL, ShardMap};
use shard_node::storage::SqlValue;

use super::{Acts, Example, acting, class};

const SHELF_MAX: i64 = 10;

pub(super) fn added_to(classes: Classes) -> Classes {
    classes
        .with(Example::new(
            "Library",
            &["add", "find", "remove", "count", "shelves", "known"],
            Library::make,
        ))
        .with(Example::new("LibraryMap", &[MAP, GROW], |context| {
            acting(LibraryMap(ShardMap::new(context, class("Shelf"))))
        }))
        .with(Example::new(
            "Shelf",
            &["add", "find", "remove", "count", SEAL],
            |context| {
                acting(Shelf {
                    part: Part::new(context.clone()),
                    context,
                })
            },
        ))
}

/// Who uses the set. Any number of objects, of any class, may, each with a map of its own: here, `{set}:{desk}`.
struct Library {
    shelves: Parts,
}

impl Library {
    fn make(context: Context) -> Result<Rc<dyn shard_node::class::Instance>, ClassError> {
        let name = context.name()?;
        let desk = name.as_ref().map_or("", |name| name.as_str());
        let set = desk.split(':').next().unwrap_or_default().parse();
        let set = set.map_err(|error| ClassError::BadRequest(format!("a library: {error}")))?;
        acting(Self {
            shelves: Parts::new(context, set, class("LibraryMap"), class("Shelf")),
        })
    }

    async fn answer(&self, method: &str, args: Args) -> Result<Json, ClassError> {
        let title = || Ok::<_, ClassError>([Json::from(args.text(0, "title")?)]);
        match method {
            "add" => {
                let (shelf, _) = self.shelves.place("add", &title()?).await?;
                Ok(shelf.into())
            }
            "find" | "remove" => {
                let found = self.shelves.look(method, &title()?).await?;
                Ok(found.map(|(shelf, _)| shelf).into())
            }
            "known" => Ok(json!(self.shelves.known())),
            _ => {
                let counts = self.shelves.each("count", &[]).await?;
                let sum = counts.iter().filter_map(Json::as_i64).sum::<i64>();
                Ok(if method == "count" {
                    sum.into()
                } else {
                    counts.into()
                })
            }
        }
    }
}

impl Acts for Library {
    fn act(self: Rc<Self>, method: &str, args: Args) -> Turn<Json> {
        let method = method.to_owned();
        Turn::run(async move { self.answer(&method, args).await })
    }
}

struct LibraryMap(ShardMap);

impl Acts for LibraryMap {
    fn act(self: Rc<Self>, method: &str, args: Args) -> Turn<Json> {
        if method == MAP {
            return Turn::Done(self.0.map().map(|map| json!(map)));
        }
        Turn::run(async move {
            let full = args.integer(0, "full")?.unwrap_or(0);
            let full = u32::try_from(full).unwrap_or(u32::MAX);
            Ok(json!(self.0.grow(full).await?))
        })
    }
}

struct Shelf {
    context: Context,
    part: Part,
}

impl Shelf {
    fn answer(&self, method: &str, args: &Args) -> Result<Json, ClassError> {
        self.sql(
            "CREATE TABLE IF NOT EXISTS books (title TEXT PRIMARY KEY)",
            &[],
        )?;
        match method {
            SEAL => {
                self.part.seal()?;
                return Ok(Json::Null);
            }
            "count" => return Ok(self.count()?.into()),
            _ => {}
        }
        let title = [SqlValue::Text(args.text(0, "title")?.to_owned())];
        let is_here = self.sql("SELECT 1 FROM books WHERE title = ?", &title)? != 0;
        let found = is_here.then_some(Json::Null);
        let said = match method {
            "add" => self.part.place(found, self.count()? >= SHELF_MAX, || {
                self.sql("INSERT INTO books VALUES (?)", &title)?;
                Ok(Json::Null)
            })?,
            "remove" => {
                self.sql("DELETE FROM books WHERE title = ?", &title)?;
                self.part.look(found)?
            }
            _ => self.part.look(found)?,
        };
        said.to_json()
    }

    fn count(&self) -> Result<i64, ClassError> {
        self.sql("SELECT count(*) FROM books", &[])
    }

    /// The number that a statement gives; 0 if it gives none.
    fn sql(&self, sql: &str, values: &[SqlValue]) -> Result<i64, ClassError> {
        let rows = self.context.storage().exec(sql, values, 1024)?;
        Ok(match rows.rows.first().and_then(|row| row.first()) {
            Some(SqlValue::Integer(number)) => *number,
            _ => 0,
        })
    }
}

impl Acts for Shelf {
    fn act(self: Rc<Self>, method: &str, args: Args) -> Turn<Json> {
        Turn::Done(self.answer(method, &args))
    }
}
