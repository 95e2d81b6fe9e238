//! One logical set over as many storage objects as it needs: its *parts*, and the versioned map that knows them.
//!
//! Parts fill one after the other. There are three roles, each a helper for a class:
//!
//! * the **map object** keeps a [`ShardMap`]: how many parts there are, and the map's version;
//! * a **part** keeps a [`Part`] beside its items: whether it is sealed;
//! * whoever uses the set keeps a [`Parts`], which caches the map.
//!
//! The newest part takes new items until it is full. Then it *seals* itself, in the transaction in which it refuses:
//! from then on it takes no item any more, ever, though it goes on to answer and to remove. Only when a part has
//! said that it is sealed does the map open the next one, and raise its version. Each step may be repeated, so a
//! death between any two loses nothing: the next writer finds the sealed part and goes on from there.
//!
//! It follows that an item stays where it was put; that an old map is never wrong, only short: whoever has one comes
//! to a sealed part, and asks for a newer map; and that no two parts hold one item, because a writer goes through
//! the parts from the first on, and each that it leaves behind is sealed and does not have it.
//!
//! What is not here: parts are neither split nor merged, and nothing moves, so the room that removals leave in a
//! sealed part is not used again; a look for one item asks the parts one after the other. For sets of few large parts
//! that is right. Where the place follows from the item, by a hash, choose a number of parts once (as the counters do).

use std::cell::Cell;

use protocol::{ClassName, ObjectName};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::class::{ClassError, Context};
use crate::storage::{Rows, SqlValue};
use crate::stub::Stub;

/// Parts of one set at the most.
pub const PARTS_MAX: u32 = 10_000;

/// The methods by which map objects and parts are called; their classes pass them on to the helpers here.
pub const MAP: &str = "map";
pub const GROW: &str = "grow";
pub const SEAL: &str = "seal";

/// Bytes of what is read here.
const RESULT_BYTES: usize = 64 << 10;

const MAP_TABLE: &str = "CREATE TABLE IF NOT EXISTS shard_map
    (one INTEGER PRIMARY KEY CHECK (one = 1), version INTEGER NOT NULL, parts INTEGER NOT NULL)";

const PART_TABLE: &str =
    "CREATE TABLE IF NOT EXISTS shard_part (one INTEGER PRIMARY KEY CHECK (one = 1))";

/// Which parts there are: 0 to `parts` - 1. The last one is the newest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Map {
    /// Rises with every change.
    pub version: u64,
    pub parts: u32,
}

impl Map {
    /// A set that has never grown: nothing is stored for it.
    const FIRST: Self = Self {
        version: 1,
        parts: 1,
    };
}

/// The object that is a part of a set.
///
/// # Errors
/// The set's name leaves no room for the part's number.
pub fn part_name(set: &ObjectName, part: u32) -> Result<ObjectName, ClassError> {
    format!("{set}#{part}")
        .parse()
        .map_err(|error| ClassError::BadRequest(format!("part {part} of {set}: {error}")))
}

/// What a part says when it is asked for an item, or to take one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Said {
    /// It has the item, or has taken it; with what the class answers.
    Here(Json),
    /// It does not have the item, and is sealed: the next part may.
    Sealed,
    /// It does not have the item, and no later part can: it still takes items.
    Nowhere,
}

impl Said {
    pub fn to_json(&self) -> Result<Json, ClassError> {
        serde_json::to_value(self).map_err(|error| senseless("a part's answer", &error))
    }
}

/// What a map object keeps. Its name is the set's.
#[derive(Clone)]
pub struct ShardMap {
    context: Context,
    part_class: ClassName,
}

impl ShardMap {
    pub fn new(context: Context, part_class: ClassName) -> Self {
        Self {
            context,
            part_class,
        }
    }

    /// The map, for [`MAP`].
    pub fn map(&self) -> Result<Map, ClassError> {
        if !has_table(&self.context, "shard_map")? {
            return Ok(Map::FIRST);
        }
        let rows = sql(&self.context, "SELECT version, parts FROM shard_map", &[])?;
        Ok(match rows.rows.first().map(Vec::as_slice) {
            Some([SqlValue::Integer(version), SqlValue::Integer(parts)]) => Map {
                version: u64::try_from(*version).unwrap_or(1),
                parts: u32::try_from(*parts).unwrap_or(1),
            },
            _ => Map::FIRST,
        })
    }

    /// Opens the part after this one, unless that was done already; for [`GROW`].
    ///
    /// # Errors
    /// This part does not exist, or could not be sealed; or there are too many. The map is as it was.
    pub async fn grow(&self, full: u32) -> Result<Map, ClassError> {
        let map = self.map()?;
        if full + 1 < map.parts {
            return Ok(map);
        }
        if full >= map.parts || map.parts >= PARTS_MAX {
            return Err(ClassError::BadRequest(format!(
                "part {full} of {} cannot be followed by another; at most {PARTS_MAX} are allowed",
                map.parts
            )));
        }
        let set = set_of(&self.context)?;
        let part = self.context.stub(&self.part_class, &part_name(&set, full)?);
        // Whatever the caller says: the part must agree before there is another.
        part.call(SEAL, Vec::new()).await?;
        let map = self.map()?;
        if full + 1 < map.parts {
            // Somebody else asked, too.
            return Ok(map);
        }
        let grown = Map {
            version: map.version + 1,
            parts: map.parts + 1,
        };
        sql(&self.context, MAP_TABLE, &[])?;
        let values = [integer(grown.version), integer(grown.parts.into())];
        sql(
            &self.context,
            "INSERT OR REPLACE INTO shard_map VALUES (1, ?, ?)",
            &values,
        )?;
        Ok(grown)
    }
}

/// What a part keeps beside its items.
#[derive(Clone)]
pub struct Part {
    context: Context,
}

impl Part {
    pub fn new(context: Context) -> Self {
        Self { context }
    }

    pub fn is_sealed(&self) -> Result<bool, ClassError> {
        if !has_table(&self.context, "shard_part")? {
            return Ok(false);
        }
        let rows = sql(&self.context, "SELECT 1 FROM shard_part", &[])?;
        Ok(!rows.rows.is_empty())
    }

    /// Takes no items any more; for [`SEAL`]. May be repeated.
    pub fn seal(&self) -> Result<(), ClassError> {
        sql(&self.context, PART_TABLE, &[])?;
        sql(
            &self.context,
            "INSERT OR IGNORE INTO shard_part VALUES (1)",
            &[],
        )?;
        Ok(())
    }

    /// The answer to a look for an item: `found` is what there is of it.
    pub fn look(&self, found: Option<Json>) -> Result<Said, ClassError> {
        Ok(match found {
            Some(found) => Said::Here(found),
            None if self.is_sealed()? => Said::Sealed,
            None => Said::Nowhere,
        })
    }

    /// The answer to a new item: `found` is what there is of it already, `is_full` whether there is no room, and
    /// `take` puts it there. A part without room seals itself.
    pub fn place(
        &self,
        found: Option<Json>,
        is_full: bool,
        take: impl FnOnce() -> Result<Json, ClassError>,
    ) -> Result<Said, ClassError> {
        match found {
            Some(found) => Ok(Said::Here(found)),
            None if self.is_sealed()? => Ok(Said::Sealed),
            None if is_full => {
                self.seal()?;
                Ok(Said::Sealed)
            }
            None => Ok(Said::Here(take()?)),
        }
    }
}

/// The parts of one set, for whoever uses it. Keeps the map that it saw last.
pub struct Parts {
    context: Context,
    set: ObjectName,
    map_class: ClassName,
    part_class: ClassName,
    known: Cell<Map>,
}

/// What a walk through the parts is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Walk {
    Look,
    Place,
}

impl Parts {
    pub fn new(
        context: Context,
        set: ObjectName,
        map_class: ClassName,
        part_class: ClassName,
    ) -> Self {
        Self {
            context,
            set,
            map_class,
            part_class,
            known: Cell::new(Map::FIRST),
        }
    }

    /// The map that it saw last.
    pub fn known(&self) -> Map {
        self.known.get()
    }

    /// Looks for an item, by a method of the parts that answers what [`Part::look`] says: the part that has it, and its
    /// answer. Exact, however old the map is that is known here.
    pub async fn look(
        &self,
        method: &str,
        args: &[Json],
    ) -> Result<Option<(u32, Json)>, ClassError> {
        self.walk(Walk::Look, 0, method, args).await
    }

    /// Puts an item where it is already, or into the newest part, by a method that answers what [`Part::place`] says:
    /// the part that has it now.
    pub async fn place(&self, method: &str, args: &[Json]) -> Result<(u32, Json), ClassError> {
        let placed = self.walk(Walk::Place, 0, method, args).await?;
        placed.ok_or_else(|| senseless(method, &"an open part took no item"))
    }

    /// The same for an item that is in no part yet, as the caller knows: only the newest is asked.
    pub async fn append(&self, method: &str, args: &[Json]) -> Result<(u32, Json), ClassError> {
        let newest = self.known.get().parts - 1;
        let placed = self.walk(Walk::Place, newest, method, args).await?;
        placed.ok_or_else(|| senseless(method, &"an open part took no item"))
    }

    /// A method of every part, with the newest map, in the order of the parts. What is put meanwhile may or may not be
    /// in the answers.
    pub async fn each(&self, method: &str, args: &[Json]) -> Result<Vec<Json>, ClassError> {
        let map = self.ask_map(MAP, Vec::new()).await?;
        let mut answers = Vec::new();
        for part in 0..map.parts {
            answers.push(self.stub(part)?.call(method, args.to_vec()).await?);
        }
        Ok(answers)
    }

    async fn walk(
        &self,
        walk: Walk,
        first: u32,
        method: &str,
        args: &[Json],
    ) -> Result<Option<(u32, Json)>, ClassError> {
        for part in first.. {
            if part >= self.known.get().parts {
                // The one before is sealed.
                let map = match walk {
                    Walk::Look => self.ask_map(MAP, Vec::new()).await?,
                    Walk::Place => self.ask_map(GROW, vec![(part - 1).into()]).await?,
                };
                if part >= map.parts {
                    return Ok(None);
                }
            }
            let said = self.stub(part)?.call(method, args.to_vec()).await?;
            match understood(method, said)? {
                Said::Here(answer) => return Ok(Some((part, answer))),
                Said::Nowhere => return Ok(None),
                Said::Sealed => {}
            }
        }
        Ok(None)
    }

    async fn ask_map(&self, method: &str, args: Vec<Json>) -> Result<Map, ClassError> {
        let map = self.context.stub(&self.map_class, &self.set);
        let map: Map = understood(method, map.call(method, args).await?)?;
        // Answers may come in another order than they were given.
        if map.version > self.known.get().version {
            self.known.set(map);
        }
        Ok(self.known.get())
    }

    fn stub(&self, part: u32) -> Result<Stub, ClassError> {
        let name = part_name(&self.set, part)?;
        Ok(self.context.stub(&self.part_class, &name))
    }
}

fn set_of(context: &Context) -> Result<ObjectName, ClassError> {
    let unnamed =
        || ClassError::BadRequest("a set has a name, by which its parts are known".to_owned());
    context.name()?.ok_or_else(unnamed)
}

fn understood<T: serde::de::DeserializeOwned>(method: &str, answer: Json) -> Result<T, ClassError> {
    serde_json::from_value(answer).map_err(|error| senseless(method, &error))
}

fn senseless(method: &str, error: &dyn std::fmt::Display) -> ClassError {
    ClassError::Thrown {
        name: "TypeError".to_owned(),
        message: format!("{method} was answered with something else: {error}"),
    }
}

fn has_table(context: &Context, name: &str) -> Result<bool, ClassError> {
    let find = "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?";
    let found = sql(context, find, &[SqlValue::Text(name.to_owned())])?;
    Ok(!found.rows.is_empty())
}

fn sql(context: &Context, sql: &str, values: &[SqlValue]) -> Result<Rows, ClassError> {
    Ok(context.storage().exec(sql, values, RESULT_BYTES)?)
}

fn integer(value: u64) -> SqlValue {
    SqlValue::Integer(i64::try_from(value).unwrap_or(i64::MAX))
}
