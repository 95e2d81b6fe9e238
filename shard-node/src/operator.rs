//! What an operator asks of one worker: which objects there are, what they hold, what their alarms do.
//!
//! Requests come from an admin listener, of this node or of a gateway, which has checked the operator's
//! token; they carry [`headers::OPERATOR`] and the cluster's token. What changes an object is a turn of
//! its own, in the order of its mailbox, and is answered when it is durable.
//!
//! | request | answer |
//! |---------|--------|
//! | `GET /objects?class&prefix&order&descending&from&below&after&limit` | a page of the catalog: `{"objects": [{"object", "rank", "cursor"}]}` |
//! | `GET /objects/{id}` | what the catalog knows, whether it is awake, what operators did to it |
//! | `DELETE /objects/{id}` | removes all its data, its alarm included |
//! | `POST /objects/{id}/sleep` | `{"awake"}`: it leaves memory unless it is busy |
//! | `GET /objects/{id}/export?bookmark|time_ms` | its database, as one plain SQLite file; as it was then, if given |
//! | `GET /objects/{id}/bookmark?time_ms` | the bookmark of now, or of a time that can be gone back to |
//! | `POST /objects/{id}/restore` | `{"bookmark" or "time_ms", "who", "why"}`: it becomes as it was; also after it was deleted |
//! | `PUT /objects/{id}/import?name&replace&alarm` | the body becomes its database |
//! | `POST /objects/{id}/sql` | `{"sql", "params", "write", "who", "why"}`: runs SQL, which only reads unless `write` |
//! | `GET /hot`, `GET /advisor` | the objects that do most; what this worker has seen of its classes and objects |
//! | `GET /alarms?state&class&from&below&after&limit` | a page of the objects with alarms |
//! | `GET /backup?since_ms&after` | all objects with their databases, one after the other, see [`backup`] |
//! | `POST /alarms/{id}/fire`, `DELETE /alarms/{id}` | runs the alarm now; cancels it |
//! | `POST /alarms/{id}/retry`, `DELETE /alarms/{id}/dead` | runs the dead letter again; drops it |

mod audit;
mod backup;
mod copies;
mod overview;
mod past;

use std::rc::Rc;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::{Method, Request, Response, StatusCode};
use ops::advisor::Thresholds;
use protocol::{Home, ObjectId, ObjectName, Problem, Ring, ShardId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};

use crate::alarm::{AlarmState, Pending};
use crate::catalog::{Key, Order, Place, Query, Row};
use crate::class::{Body, ClassError, Context};
use crate::classes::{Classes, sql};
use crate::clock::Clock;
use crate::host::{Address, Host};
use crate::object::mailbox::{Event, Reply};
use crate::storage::{Logged, SqlConfig};

/// Rows of one page, unless asked for fewer or more, and the most.
const PAGE_ROWS: u32 = 100;
const PAGE_ROWS_MAX: u32 = 1000;

/// Catalogs read between two chances for others, a tenth of a millisecond each.
const CATALOGS_AT_ONCE: usize = 8;

/// Rounds of notes written to the catalogs before a listing, each some milliseconds at the most.
const NOTE_ROUNDS_MAX: u32 = 64;

const SQL_BODY_BYTES_MAX: usize = 1 << 20;

/// Operators' business on one worker.
pub(crate) struct Operator {
    pub(crate) host: Rc<Host>,
    pub(crate) engine: Logged,
    pub(crate) classes: Classes,
    pub(crate) ring: Arc<Ring>,
    /// This worker, as an index into the ring's list.
    pub(crate) me: usize,
    pub(crate) catalogs: Rc<[(Home, ShardId)]>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) sql: Arc<SqlConfig>,
    pub(crate) advisor: Arc<Thresholds>,
    /// One import at a time: each holds its database in memory several times over.
    pub(crate) importing: tokio::sync::Semaphore,
    /// Two restores at a time look into the archive.
    pub(crate) looking_back: tokio::sync::Semaphore,
    /// Where files lie that are on their way out.
    pub(crate) spool: std::path::PathBuf,
}

type Answer = Result<Response<Body>, Problem>;

/// `GET /objects`, and with `state` `GET /alarms`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ListParameters {
    class: Option<String>,
    prefix: String,
    order: Option<Order>,
    state: Option<AlarmsListed>,
    descending: bool,
    from: Option<u64>,
    below: Option<u64>,
    after: Option<String>,
    limit: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum AlarmsListed {
    Pending,
    Overdue,
    Dead,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SqlBody {
    sql: String,
    #[serde(default)]
    params: Vec<Json>,
    #[serde(default)]
    write: bool,
    #[serde(default)]
    who: String,
    #[serde(default)]
    why: String,
}

/// A row on its way to be merged with those of other workers.
#[derive(Serialize)]
struct Listed {
    object: Row,
    rank: Vec<Json>,
    cursor: String,
}

impl Operator {
    pub(crate) async fn answer(&self, request: Request<Body>) -> Answer {
        let path = request.uri().path().to_owned();
        let parts: Vec<&str> = path.split('/').skip(1).collect();
        let method = request.method().clone();
        match (&method, parts.as_slice()) {
            (&Method::GET, ["objects"]) => self.list(parameters(&request)?, Order::Name).await,
            (&Method::GET, ["hot"]) => self.hot().await,
            (&Method::GET, ["advisor"]) => self.advisor().await,
            (&Method::GET, ["backup"]) => self.backup(&request).await,
            (&Method::GET, ["alarms"]) => self.list(parameters(&request)?, Order::Alarm).await,
            (_, [kind @ ("objects" | "alarms"), id, action @ ..]) => {
                let object = self.address(id)?;
                match (*kind, &method, action) {
                    ("objects", &Method::GET, []) => self.show(&object).await,
                    ("objects", &Method::DELETE, []) => self.delete(&object).await,
                    ("objects", &Method::POST, ["sleep"]) => Ok(self.sleep(&object)),
                    ("objects", &Method::GET, ["export"]) => {
                        let moment: past::Moment = parameters(&request)?;
                        match moment.bookmark()? {
                            None => self.export(&object).await,
                            Some(at) => self.export_at(&object, at).await,
                        }
                    }
                    ("objects", &Method::GET, ["bookmark"]) => {
                        self.bookmark(&object, &request).await
                    }
                    ("objects", &Method::POST, ["restore"]) => self.restore(&object, request).await,
                    ("objects", &Method::PUT, ["import"]) => self.import(object, request).await,
                    ("objects", &Method::POST, ["sql"]) => self.sql(&object, request).await,
                    ("alarms", &Method::POST, ["fire"]) => self.fire(&object).await,
                    ("alarms", &Method::POST, ["retry"]) => self.retry(&object).await,
                    ("alarms", &Method::DELETE, []) => self.cancel(&object).await,
                    ("alarms", &Method::DELETE, ["dead"]) => self.drop_dead(&object).await,
                    _ => Err(no_page(&method, &path)),
                }
            }
            _ => Err(no_page(&method, &path)),
        }
    }

    /// The object of an id, which this worker must own.
    fn address(&self, id: &str) -> Result<Address, Problem> {
        let id: ObjectId = id
            .parse()
            .map_err(|error| Problem::bad_request(format!("{error}")))?;
        let class = self.classes.of(id).ok_or_else(|| {
            Problem::not_found(format!(
                "object {id} is of no class of this node, which are {}",
                self.classes.names()
            ))
        })?;
        let shard = self.ring.shard_of(id);
        match self.ring.owner(id.home(), shard) {
            Ok(owner) if std::ptr::eq(owner, &self.ring.workers()[self.me]) => {}
            Ok(owner) => {
                return Err(Problem::unavailable(format!(
                    "object {id} belongs to worker {} of node {} at {}",
                    owner.index, owner.node, owner.address
                )));
            }
            Err(error) => return Err(Problem::unavailable(error.to_string())),
        }
        Ok(Address {
            class: Arc::clone(class),
            id,
            name: None,
            shard,
        })
    }

    /// The catalogs know what was committed before now, unless that is very much.
    async fn refresh(&self) {
        for _ in 0..NOTE_ROUNDS_MAX {
            if !self.engine.write_some_notes() {
                return;
            }
            tokio::task::yield_now().await;
        }
    }

    async fn list(&self, parameters: ListParameters, usual: Order) -> Answer {
        let query = self.query(parameters, usual)?;
        self.refresh().await;
        let mut rows = Vec::new();
        for some in self.catalogs.chunks(CATALOGS_AT_ONCE) {
            for (home, shard) in some {
                let found = self.engine.search(*home, *shard, &query).map_err(|error| {
                    Problem::unavailable(format!(
                        "the catalog of shard {shard} cannot be read: {error}"
                    ))
                })?;
                rows.extend(found);
            }
            query.merge(&mut rows);
            tokio::task::yield_now().await;
        }
        let listed: Vec<Listed> = rows
            .into_iter()
            .map(|row| listed(row, query.order))
            .collect();
        Ok(answer(&json!({ "objects": listed })))
    }

    fn query(&self, parameters: ListParameters, usual: Order) -> Result<Query, Problem> {
        let mut query = Query {
            class: parameters.class,
            prefix: parameters.prefix,
            order: parameters.order.unwrap_or(usual),
            descending: parameters.descending,
            from: parameters.from,
            below: parameters.below,
            without_alarm: false,
            after: None,
            limit: parameters.limit.unwrap_or(PAGE_ROWS),
        };
        match parameters.state {
            None => {}
            Some(AlarmsListed::Pending) => query.order = Order::Alarm,
            Some(AlarmsListed::Overdue) => {
                query.order = Order::Alarm;
                let now = self.clock.unix_millis();
                query.below = Some(query.below.map_or(now, |below| below.min(now)));
            }
            Some(AlarmsListed::Dead) => query.order = Order::Dead,
        }
        if query.limit == 0 || query.limit > PAGE_ROWS_MAX {
            return Err(Problem::bad_request(format!(
                "limit={} must be from 1 to {PAGE_ROWS_MAX}",
                query.limit
            )));
        }
        if query.order == Order::Name && (query.from.is_some() || query.below.is_some()) {
            return Err(Problem::bad_request(
                "from and below are bounds of sizes and times, and order=name has none",
            ));
        }
        if let Some(cursor) = parameters.after {
            let place = decode_cursor(&cursor).filter(|place| {
                let text = matches!(place.key, Key::Text(_));
                text == (query.order == Order::Name)
            });
            query.after = Some(place.ok_or_else(|| {
                Problem::bad_request(format!(
                    "after={cursor:?} is no cursor of a listing in this order"
                ))
            })?);
        }
        Ok(query)
    }

    /// What the catalog knows of an object that exists.
    async fn row(&self, object: &Address) -> Result<Row, Problem> {
        self.refresh().await;
        let found = self.engine.find(object.id, object.shard).map_err(|error| {
            Problem::unavailable(format!(
                "the catalog of shard {} cannot be read: {error}",
                object.shard
            ))
        })?;
        found.ok_or_else(|| {
            Problem::not_found(format!(
                "there is no object {} of class {}: it never wrote, or was deleted",
                object.id,
                object.class.name()
            ))
        })
    }

    async fn show(&self, object: &Address) -> Answer {
        let row = self.row(object).await?;
        let awake = self.host.is_awake(object.id);
        let operations = self.operations(object).await?;
        if !awake {
            self.host.sleep(object.id);
        }
        let mut shown =
            serde_json::to_value(&row).map_err(|error| Problem::bad_request(error.to_string()))?;
        shown["shard"] = object.shard.0.into();
        shown["awake"] = awake.into();
        shown["operations"] = operations;
        Ok(answer(&shown))
    }

    fn sleep(&self, object: &Address) -> Response<Body> {
        self.host.sleep(object.id);
        answer(&json!({ "awake": self.host.is_awake(object.id) }))
    }

    async fn delete(&self, object: &Address) -> Answer {
        let row = match self.row(object).await {
            Ok(row) => json!(row),
            // A death at the wrong moment can leave an object that the catalog does not know.
            Err(unknown) => match self.engine.exists(object.id, object.shard) {
                Ok(true) => json!({ "id": object.id.to_string() }),
                _ => return Err(unknown),
            },
        };
        self.host.take_out(object.id);
        self.engine
            .delete(object.id, object.shard)
            .map_err(|error| ClassError::from(error).problem())?;
        self.host.timers().set(object.id, None);
        self.settled(object).await?;
        self.host.sleep(object.id);
        Ok(answer(&json!({ "deleted": row })))
    }

    async fn sql(&self, object: &Address, request: Request<Body>) -> Answer {
        let body = request.into_body().read(SQL_BODY_BYTES_MAX).await;
        let body = body.map_err(|error| error.problem())?;
        let body: SqlBody = serde_json::from_slice(&body).map_err(|error| {
            Problem::bad_request(format!(
                "the body must be {{\"sql\", \"params\", \"write\", \"who\", \"why\"}}: {error}"
            ))
        })?;
        if body.write && (body.who.is_empty() || body.why.is_empty()) {
            return Err(Problem::bad_request(
                "SQL that writes needs \"who\" and \"why\": they are kept with the object",
            ));
        }
        self.row(object).await?;
        let now = self.clock.unix_millis();
        let engine = self.engine.clone();
        let rows = self.turn(object, move |context| {
            let storage = context.storage();
            if !body.write {
                return storage.read_only(|| sql::run(storage, &body.sql, body.params));
            }
            let undo = engine.bookmark();
            let mut rows = sql::run(storage, &body.sql, body.params)?;
            rows["undo"] = undo.to_string().into();
            let detail = format!("{}, undo with {undo}", body.sql);
            audit::note(storage, now, "sql", &body.who, &body.why, &detail)?;
            Ok(rows)
        });
        Ok(answer(&rows.await?))
    }

    async fn fire(&self, object: &Address) -> Answer {
        let now = self.clock.unix_millis();
        self.change_alarm(object, move |alarm| {
            let pending = alarm.pending.ok_or("has no alarm")?;
            Ok(AlarmState {
                pending: Some(Pending {
                    next_ms: now.min(pending.next_ms),
                    ..pending
                }),
                ..alarm
            })
        })
        .await
    }

    async fn cancel(&self, object: &Address) -> Answer {
        self.change_alarm(object, |alarm| {
            alarm.pending.ok_or("has no alarm")?;
            Ok(AlarmState {
                pending: None,
                ..alarm
            })
        })
        .await
    }

    async fn retry(&self, object: &Address) -> Answer {
        let now = self.clock.unix_millis();
        self.change_alarm(object, move |alarm| {
            let dead = alarm.dead.ok_or("has no dead letter")?;
            if alarm.pending.is_some() {
                return Err("has another alarm set: let it run, or cancel it, first");
            }
            Ok(AlarmState {
                pending: Some(Pending {
                    scheduled_ms: dead.scheduled_ms,
                    next_ms: now,
                    retries: 0,
                }),
                dead: None,
            })
        })
        .await
    }

    async fn drop_dead(&self, object: &Address) -> Answer {
        self.change_alarm(object, |alarm| {
            alarm.dead.as_ref().ok_or("has no dead letter")?;
            Ok(AlarmState {
                dead: None,
                ..alarm
            })
        })
        .await
    }

    /// A handler that is under way hears of it if what is pending changes.
    async fn change_alarm(
        &self,
        object: &Address,
        change: impl FnOnce(AlarmState) -> Result<AlarmState, &'static str> + 'static,
    ) -> Answer {
        self.row(object).await?;
        let changed = self.turn(object, move |context| {
            let before = context.storage().alarm()?.state;
            let pending = before.pending;
            let after = change(before)
                .map_err(|why| ClassError::BadRequest(format!("object {} {why}", context.id())))?;
            let replaced = after.pending != pending;
            context.storage().write_alarm(&after, replaced)?;
            Ok(json!(after))
        });
        Ok(answer(&changed.await?))
    }

    /// A turn of an object, durable when this returns.
    async fn turn(
        &self,
        object: &Address,
        operation: impl FnOnce(&Context) -> Result<Json, ClassError> + 'static,
    ) -> Result<Json, Problem> {
        let event = Event::Operate(Box::new(operation));
        match self.host.deliver(object, event).await? {
            Reply::Value(value) => Ok(value),
            Reply::Response(_) => unreachable!("an operation gives a value"),
        }
    }

    /// What operators did to the object.
    async fn operations(&self, object: &Address) -> Result<Json, Problem> {
        self.turn(object, |context| Ok(audit::list(context.storage())?))
            .await
    }

    /// Returns when the last commit of an object is durable.
    async fn settled(&self, object: &Address) -> Result<(), Problem> {
        let read = |context: &Context| {
            // An answer waits for what was read, so something must be.
            context.storage().alarm()?;
            Ok(Json::Null)
        };
        self.turn(object, read).await.map(drop)
    }
}

fn listed(row: Row, order: Order) -> Listed {
    let place = row.place(order);
    let cursor = serde_json::to_vec(&place).expect("strings and numbers always serialize");
    let key = match place.key {
        Key::Number(number) => number.into(),
        Key::Text(text) => text.into(),
    };
    let class = (order == Order::Name).then(|| place.class.into());
    let rank = class.into_iter().chain([key, place.id.into()]).collect();
    Listed {
        object: row,
        rank,
        cursor: URL_SAFE_NO_PAD.encode(cursor),
    }
}

fn decode_cursor(cursor: &str) -> Option<Place> {
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(cursor).ok()?).ok()
}

fn parameters<T: DeserializeOwned>(request: &Request<Body>) -> Result<T, Problem> {
    let query = request.uri().query().unwrap_or("");
    serde_urlencoded::from_str(query)
        .map_err(|error| Problem::bad_request(format!("parameters {query:?}: {error}")))
}

/// The name that an object is to have, if it leads to the object's id.
fn checked_name(object: &Address, name: Option<&str>) -> Result<Option<ObjectName>, Problem> {
    let Some(name) = name else { return Ok(None) };
    let name: ObjectName = name
        .parse()
        .map_err(|error| Problem::bad_request(format!("{error}")))?;
    let class = object.class.name();
    if ObjectId::named(class, object.id.home(), &name) != object.id {
        return Err(Problem::bad_request(format!(
            "the name {:?} of class {class} does not lead to the id {}",
            name.as_str(),
            object.id
        )));
    }
    Ok(Some(name))
}

fn no_page(method: &Method, path: &str) -> Problem {
    Problem::not_found(format!("operators cannot {method} {path:?}"))
}

fn answer(value: &impl Serialize) -> Response<Body> {
    let body = serde_json::to_vec(value).expect("strings and numbers always serialize");
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = StatusCode::OK;
    response.headers_mut().insert(
        http::header::CONTENT_TYPE,
        http::HeaderValue::from_static("application/json"),
    );
    response
}
