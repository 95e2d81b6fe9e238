//! Passes on what operators ask of objects: to the worker that owns an object, or to all workers, whose
//! answers become one.
//!
//! | request | goes to |
//! |---------|---------|
//! | `GET /objects`, `GET /alarms` | every worker; their pages are merged into one, `{"objects": […], "next"}` |
//! | `POST /objects/{id}/fork` with `{"to", "name", "replace", "bookmark" or "time_ms"}` | the owner of `{id}` for a copy, and the owner of `to` to take it |
//! | `GET /backup` | nobody: says how many workers there are, each of which has a part of a backup |
//! | `GET /backup/{n}` | the worker of that number: all its objects, one after the other |
//! | `GET /advisor` | every worker; what they have seen is added up and judged |
//! | `GET /hot`, of a gateway `GET /hot/nodes` | every worker; the hottest objects of all |
//! | `/counters`, and what is below | coordinators: see [`counters`] |
//! | anything else below `/objects/{id}` and `/alarms/{id}` | the owner |

mod counters;
mod gather;

use std::cmp::Ordering;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::try_join_all;
use http::uri::PathAndQuery;
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use protocol::ring::Worker;
use protocol::{ErrorCode, ObjectId, Problem, Ring, headers};
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};

use crate::admin::{Body, Page, full, json, refusal};
use crate::exchange::{self, ExchangeError};
use crate::logs::Causes;

/// How long a worker may take to begin its answer.
const ANSWER_MAX: Duration = Duration::from_secs(300);

/// The same where a database of any size goes in, or is looked for in an archive.
const LONG_ANSWER_MAX: Duration = Duration::from_secs(6 * 3600);

/// Bytes of one worker's page of a listing: a thousand rows with long names.
const PAGE_BYTES_MAX: usize = 8 << 20;

const FORK_BODY_BYTES_MAX: usize = 16 << 10;

/// The workers that one admin listener stands before.
#[derive(Clone)]
pub struct Front {
    /// What is known of them now.
    pub ring: Option<Arc<Ring>>,
    /// Only the workers of this node are asked, if given.
    pub node: Option<String>,
    pub token: Option<HeaderValue>,
}

/// A row with its place among those of all workers.
#[derive(Deserialize)]
struct Listed {
    object: Json,
    rank: Vec<Json>,
    cursor: String,
}

#[derive(Deserialize)]
struct Listing {
    objects: Vec<Listed>,
}

/// Rows, and the cursor after them if there may be more.
type Rows = (Vec<Json>, Option<String>);

/// What matters here of a listing's parameters; the workers check them.
#[derive(Default, Deserialize)]
#[serde(default)]
struct ListParameters {
    descending: bool,
    limit: Option<usize>,
}

/// Rows of a page if nobody says how many; the same as the workers'.
const PAGE_ROWS: usize = 100;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Fork {
    to: ObjectIdText,
    name: Option<String>,
    #[serde(default)]
    replace: bool,
    bookmark: Option<String>,
    time_ms: Option<u64>,
}

/// What to copy, as the workers know it.
#[derive(Serialize)]
struct Export<'a> {
    bookmark: Option<&'a str>,
    time_ms: Option<u64>,
}

/// An id, as operators write it.
#[derive(Clone, Copy)]
struct ObjectIdText(ObjectId);

impl<'de> Deserialize<'de> for ObjectIdText {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map(Self).map_err(serde::de::Error::custom)
    }
}

/// Parameters of an import, as the workers know them.
#[derive(Serialize)]
struct Import<'a> {
    name: Option<&'a str>,
    replace: bool,
    alarm: &'static str,
}

impl Front {
    /// Whether a page is one of these.
    pub fn answers(path: &str) -> bool {
        let first = path.split('/').nth(1);
        matches!(
            first,
            Some("objects" | "alarms" | "backup" | "counters" | "advisor" | "hot")
        )
    }

    pub async fn answer(&self, request: Request<Incoming>) -> Page {
        match self.try_answer(request).await {
            Ok(page) => page,
            Err(problem) => refusal(&problem),
        }
    }

    async fn try_answer(&self, request: Request<Incoming>) -> Result<Page, Problem> {
        let ring = self
            .ring
            .as_ref()
            .ok_or_else(|| Problem::unavailable("no node has told this gateway its ring yet"))?;
        let path = request.uri().path().to_owned();
        let mut parts = path.split('/').skip(2);
        match path.split('/').nth(1) {
            Some("backup") => return self.backup(ring, parts.next(), &request).await,
            Some("counters") => return self.counters(ring, request).await,
            Some("advisor" | "hot") => return self.gathered(ring, &request).await,
            _ => {}
        }
        let Some(id) = parts.next() else {
            if request.method() != Method::GET {
                return Err(Problem::method_not_allowed(
                    "GET",
                    format!("{} is not offered at {path}", request.method()),
                ));
            }
            return self.list(ring, request.uri()).await;
        };
        let id: ObjectId = id
            .parse()
            .map_err(|error| Problem::bad_request(format!("{error}")))?;
        let rest: Vec<&str> = parts.collect();
        if rest == ["fork"] && request.method() == Method::POST && path.starts_with("/objects/") {
            return self.fork(ring, id, request).await;
        }
        let answer = self.ask(owner(ring, id)?, request).await?;
        Ok(answer.map(BodyExt::boxed))
    }

    /// Sends a request of an operator to a worker.
    async fn ask<B>(
        &self,
        address: &str,
        mut request: Request<B>,
    ) -> Result<Response<Incoming>, Problem>
    where
        B: hyper::body::Body<Error: Into<Box<dyn std::error::Error + Send + Sync>>, Data: Send>
            + Send
            + 'static,
    {
        let ours: Vec<_> = request
            .headers()
            .keys()
            .filter(|name| name.as_str().starts_with(headers::PREFIX))
            .cloned()
            .collect();
        let headers = request.headers_mut();
        for name in ours {
            headers.remove(name);
        }
        // The operator's token is for this listener alone.
        headers.remove(http::header::AUTHORIZATION);
        headers.insert(headers::OPERATOR, HeaderValue::from_static("1"));
        let path = request.uri().path();
        let long = ["/import", "/restore", "/export", "/bookmark"];
        let answer_max = match long.iter().any(|end| path.ends_with(end)) {
            true => LONG_ANSWER_MAX,
            false => ANSWER_MAX,
        };
        let sent = exchange::send(address, self.token.as_ref(), request);
        match tokio::time::timeout(answer_max, sent).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error @ ExchangeError::Connect { .. })) => {
                Err(Problem::unavailable(Causes(&error).to_string()))
            }
            // It may have run.
            Ok(Err(error)) => Err(Problem::outcome_unknown(Causes(&error).to_string())),
            Err(_) => Err(Problem::new(
                ErrorCode::TimedOut,
                format!("worker {address} did not answer within {answer_max:?}"),
            )),
        }
    }

    async fn list(&self, ring: &Ring, uri: &Uri) -> Result<Page, Problem> {
        Ok(match self.rows(ring, uri).await? {
            Ok((objects, next)) => json(&json!({ "objects": objects, "next": next })),
            Err(refused) => refused,
        })
    }

    /// A page of all workers' rows, and where the next one begins; or what a worker says instead.
    async fn rows(&self, ring: &Ring, uri: &Uri) -> Result<Result<Rows, Page>, Problem> {
        let query = uri.query().unwrap_or("");
        let parameters: ListParameters = serde_urlencoded::from_str(query)
            .map_err(|error| Problem::bad_request(format!("parameters {query:?}: {error}")))?;
        let pages = self
            .workers(ring)
            .map(|worker| self.page(&worker.address, uri));
        let mut rows = Vec::new();
        for page in try_join_all(pages).await? {
            match page {
                Ok(listed) => rows.extend(listed),
                // It says what is wrong with the parameters.
                Err(refused) => return Ok(Err(refused)),
            }
        }
        rows.sort_by(|left, right| compare(&left.rank, &right.rank));
        if parameters.descending {
            rows.reverse();
        }
        let limit = parameters.limit.unwrap_or(PAGE_ROWS);
        rows.truncate(limit);
        let next = (rows.len() == limit)
            .then(|| rows.last().map(|last| last.cursor.clone()))
            .flatten();
        let objects: Vec<Json> = rows.into_iter().map(|row| row.object).collect();
        Ok(Ok((objects, next)))
    }

    /// The workers that this stands before.
    fn workers<'r>(&self, ring: &'r Ring) -> impl Iterator<Item = &'r Worker> {
        let of_node = |worker: &&Worker| self.node.as_ref().is_none_or(|node| *node == worker.node);
        ring.workers().iter().filter(of_node)
    }

    async fn backup<B>(
        &self,
        ring: &Ring,
        part: Option<&str>,
        request: &Request<B>,
    ) -> Result<Page, Problem> {
        if request.method() != Method::GET {
            return Err(Problem::method_not_allowed(
                "GET",
                format!("{} is not offered here", request.method()),
            ));
        }
        let count = self.workers(ring).count();
        let Some(part) = part else {
            return Ok(json(&json!({ "parts": count })));
        };
        let number: Option<usize> = part.parse().ok();
        let worker = number.and_then(|number| self.workers(ring).nth(number));
        let worker = worker.ok_or_else(|| {
            Problem::not_found(format!(
                "part {part:?} of a backup: there are {count}, from 0 on"
            ))
        })?;
        let query = request.uri().query().unwrap_or("");
        let request = get(format!("/backup?{query}").parse().ok())?;
        let answer = self.ask(&worker.address, request).await?;
        Ok(answer.map(BodyExt::boxed))
    }

    /// One worker's page, or what it says instead.
    async fn page(&self, address: &str, uri: &Uri) -> Result<Result<Vec<Listed>, Page>, Problem> {
        let request = get(uri.path_and_query().cloned())?;
        let answer = self.ask(address, request).await?;
        if answer.status() != StatusCode::OK {
            return Ok(Err(answer.map(BodyExt::boxed)));
        }
        let broken = |error: &dyn std::fmt::Display| {
            Problem::unavailable(format!("the answer of worker {address}: {error}"))
        };
        let body = Limited::new(answer.into_body(), PAGE_BYTES_MAX)
            .collect()
            .await;
        let body = body.map_err(|error| broken(&error))?.to_bytes();
        let listing: Listing = serde_json::from_slice(&body).map_err(|error| broken(&error))?;
        Ok(Ok(listing.objects))
    }

    /// Copies an object to another id, which another worker may own. The copy has no alarm: it must not do
    /// again what the original does.
    async fn fork(
        &self,
        ring: &Ring,
        from: ObjectId,
        request: Request<Incoming>,
    ) -> Result<Page, Problem> {
        let body = Limited::new(request.into_body(), FORK_BODY_BYTES_MAX)
            .collect()
            .await;
        let body = body.map_err(|error| Problem::bad_request(error.to_string()))?;
        let fork: Fork = serde_json::from_slice(&body.to_bytes()).map_err(|error| {
            Problem::bad_request(format!(
                "the body must be {{\"to\", \"name\", \"replace\"}}: {error}"
            ))
        })?;
        let to = fork.to.0;
        if to == from {
            return Err(Problem::bad_request(format!(
                "object {from} cannot be forked onto itself"
            )));
        }
        let wrong = |error: serde_urlencoded::ser::Error| Problem::bad_request(error.to_string());
        let query = serde_urlencoded::to_string(Export {
            bookmark: fork.bookmark.as_deref(),
            time_ms: fork.time_ms,
        });
        let query = query.map_err(wrong)?;
        let export = get(format!("/objects/{from}/export?{query}").parse().ok())?;
        let copy = self.ask(owner(ring, from)?, export).await?;
        if copy.status() != StatusCode::OK {
            return Ok(copy.map(BodyExt::boxed));
        }
        let import = Import {
            name: fork.name.as_deref(),
            replace: fork.replace,
            alarm: "drop",
        };
        let query = serde_urlencoded::to_string(import).map_err(wrong)?;
        let import = Request::put(format!("/objects/{to}/import?{query}"))
            .body(copy.into_body())
            .map_err(|error| Problem::bad_request(error.to_string()))?;
        let answer = self.ask(owner(ring, to)?, import).await?;
        Ok(answer.map(BodyExt::boxed))
    }
}

fn owner(ring: &Ring, id: ObjectId) -> Result<&str, Problem> {
    let owner = ring.owner(id.home(), ring.shard_of(id));
    let owner = owner.map_err(|error| Problem::unavailable(error.to_string()))?;
    Ok(&owner.address)
}

fn get(target: Option<PathAndQuery>) -> Result<Request<Body>, Problem> {
    let target = target.map(Uri::from).unwrap_or_default();
    Request::get(target)
        .body(full(""))
        .map_err(|error| Problem::bad_request(error.to_string()))
}

/// The order of rows: numbers by size, texts by their bytes.
fn compare(left: &[Json], right: &[Json]) -> Ordering {
    let pairs = left.iter().zip(right);
    pairs
        .map(|(left, right)| match (left, right) {
            (Json::Number(left), Json::Number(right)) => left.as_u64().cmp(&right.as_u64()),
            (left, right) => left.as_str().cmp(&right.as_str()),
        })
        .find(|order| order.is_ne())
        .unwrap_or(Ordering::Equal)
}
