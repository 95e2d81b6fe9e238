//! All objects of a worker as one stream, each as of one commit, while all of them go on.
//!
//! The answer is lines of JSON, some of which have bytes behind them:
//!
//! | line | means |
//! |------|-------|
//! | `{"began_ms"}` | the first: what is committed from here on may be missing |
//! | `{"object", "cursor", "bookmark", "bytes"}` | an object; that many bytes follow, its database |
//! | `{"object", "cursor"}` | an object that has not changed since `since_ms` |
//! | `{"object", "cursor", "error"}` | an object that could not be read, and why |
//! | `{"end": true}` | the last: without it, the stream broke off; `after` the last cursor it goes on |

use std::collections::VecDeque;
use std::fs::File;
use std::future::ready;
use std::path::PathBuf;
use std::rc::Rc;

use bytes::Bytes;
use futures_util::stream::{self, LocalBoxStream};
use futures_util::{StreamExt, TryStreamExt};
use http::{HeaderValue, Request, Response};
use http_body_util::StreamBody;
use hyper::body::Frame;
use protocol::{Home, ObjectId, Problem, ShardId};
use serde::Deserialize;
use serde_json::{Value as Json, json};
use tracing::warn;

use super::copies::{BoxError, chunks};
use super::{Answer, Operator, parameters};
use crate::catalog::Row;
use crate::class::Body;
use crate::commit_log::record::FileId;
use crate::export::{CopyError, Pages, copy};
use crate::storage::Logged;

/// Rows that are read from a catalog at once, some tenths of a millisecond.
const ROWS_AT_ONCE: u32 = 256;

/// Objects that are looked at before others have their turn.
const OBJECTS_AT_ONCE: u32 = 16;

/// Times that one object is copied before it counts as unreadable.
const TRIES: u32 = 3;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Parameters {
    /// Objects that have not changed since then come without their databases.
    since_ms: Option<u64>,
    /// Begin after this cursor.
    after: Option<String>,
}

/// What is still to be sent.
struct Rest {
    engine: Logged,
    spool: PathBuf,
    catalogs: Rc<[(Home, ShardId)]>,
    since_ms: Option<u64>,
    /// The catalog to be read on, by its place in the list, and after which row.
    at: usize,
    after: Option<FileId>,
    rows: VecDeque<Row>,
    sent: u32,
    ended: bool,
}

/// A line and what is behind it.
enum Part {
    Bytes(Vec<u8>),
    File(Vec<u8>, File),
}

impl Part {
    fn frames(self) -> LocalBoxStream<'static, Result<Frame<Bytes>, BoxError>> {
        let one = |bytes: Vec<u8>| stream::once(ready(Ok(Frame::data(Bytes::from(bytes)))));
        match self {
            Self::Bytes(bytes) => one(bytes).boxed_local(),
            Self::File(head, file) => one(head).chain(chunks(file)).boxed_local(),
        }
    }
}

impl Operator {
    pub(super) async fn backup(&self, request: &Request<Body>) -> Answer {
        let parameters: Parameters = parameters(request)?;
        let (at, after) = match &parameters.after {
            None => (0, None),
            Some(cursor) => self.place(cursor).ok_or_else(|| {
                Problem::bad_request(format!("after={cursor:?} is no cursor of a backup"))
            })?,
        };
        let began_ms = self.engine.bookmark().unix_millis;
        self.refresh().await;
        let rest = Rest {
            engine: self.engine.clone(),
            spool: self.spool.clone(),
            catalogs: Rc::clone(&self.catalogs),
            // A clock that went back tells nothing of what came before what.
            since_ms: parameters.since_ms.filter(|since| *since <= began_ms),
            at,
            after,
            rows: VecDeque::new(),
            sent: 0,
            ended: false,
        };
        let first = Part::Bytes(line(&json!({ "began_ms": began_ms })));
        let parts = stream::iter([Ok(first)]).chain(stream::try_unfold(rest, Rest::next));
        let frames = parts.map_ok(Part::frames).try_flatten();
        let mut response = Response::new(Body::stream(StreamBody::new(frames)));
        let media_type = HeaderValue::from_static("application/octet-stream");
        response
            .headers_mut()
            .insert(http::header::CONTENT_TYPE, media_type);
        Ok(response)
    }

    /// Where a cursor is: the place of its catalog in the list, and the last row.
    fn place(&self, cursor: &str) -> Option<(usize, Option<FileId>)> {
        let id: ObjectId = cursor.parse().ok()?;
        let of = (id.home(), self.ring.shard_of(id));
        let at = self.catalogs.iter().position(|catalog| *catalog == of)?;
        Some((at, Some(id.into())))
    }
}

impl Rest {
    async fn next(mut self) -> Result<Option<(Part, Self)>, BoxError> {
        loop {
            if self.ended {
                return Ok(None);
            }
            let Some(row) = self.rows.pop_front() else {
                self.read_rows()?;
                tokio::task::yield_now().await;
                if self.rows.is_empty() && self.at == self.catalogs.len() {
                    self.ended = true;
                    let end = line(&json!({ "end": true }));
                    return Ok(Some((Part::Bytes(end), self)));
                }
                continue;
            };
            self.sent += 1;
            if self.sent.is_multiple_of(OBJECTS_AT_ONCE) {
                tokio::task::yield_now().await;
            }
            let part = match self.object(&row).await {
                Ok(part) => part,
                Err(error) => {
                    warn!(id = row.id, %error, "an object could not be read for a backup");
                    let mut line_of = head(&row);
                    line_of["error"] = error.to_string().into();
                    Some(Part::Bytes(line(&line_of)))
                }
            };
            if let Some(part) = part {
                return Ok(Some((part, self)));
            }
        }
    }

    /// Reads rows of the next catalog that has any.
    fn read_rows(&mut self) -> Result<(), BoxError> {
        let Some((home, shard)) = self.catalogs.get(self.at) else {
            return Ok(());
        };
        let rows = self.engine.list(*home, *shard, self.after, ROWS_AT_ONCE)?;
        match rows.last() {
            Some(last) => self.after = last.id.parse::<ObjectId>().ok().map(FileId::from),
            None => {
                self.at += 1;
                self.after = None;
            }
        }
        self.rows = rows.into();
        Ok(())
    }

    /// One object; nothing if it was deleted meanwhile.
    async fn object(&self, row: &Row) -> Result<Option<Part>, BoxError> {
        let id: ObjectId = row.id.parse()?;
        let (_, shard) = self.catalogs[self.at];
        let Some(changed) = self.engine.changed(id, shard)? else {
            return Ok(None);
        };
        let mut head = head(row);
        if self
            .since_ms
            .is_some_and(|since| changed.unix_millis < since)
        {
            return Ok(Some(Part::Bytes(line(&head))));
        }
        let mut tries = 0;
        let copied = loop {
            tries += 1;
            match copy(&self.engine, id, shard, &self.spool).await {
                // The log needed the room that the copy held back, or lost the last commit.
                Err(CopyError::Read(_) | CopyError::Lost) if tries < TRIES => {}
                copied => break copied?,
            }
        };
        let Some(copied) = copied else {
            return Ok(None);
        };
        head["bookmark"] = copied.bookmark.to_string().into();
        head["bytes"] = copied.bytes.into();
        let mut head = line(&head);
        Ok(Some(match copied.pages {
            Pages::Memory(pages) => {
                head.extend_from_slice(&pages);
                Part::Bytes(head)
            }
            Pages::File(file) => Part::File(head, file),
        }))
    }
}

fn head(row: &Row) -> Json {
    json!({ "object": { "id": row.id, "class": row.class, "name": row.name }, "cursor": row.id })
}

fn line(value: &Json) -> Vec<u8> {
    let mut line = value.to_string().into_bytes();
    line.push(b'\n');
    line
}
