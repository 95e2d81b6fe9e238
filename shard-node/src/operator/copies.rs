//! Whole databases, out of an object and into one.

use std::fs::File;
use std::future::poll_fn;
use std::io::{self, Read, Seek, Write};
use std::path::Path;
use std::task::Poll;

use bytes::Bytes;
use futures_util::stream;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderValue, Request, Response};
use http_body_util::StreamBody;
use hyper::body::Frame;
use protocol::{ErrorCode, Problem};
use serde::Deserialize;
use serde_json::json;

use super::{Answer, Operator, answer, checked_name, parameters};
use crate::class::{Body, ClassError};
use crate::host::Address;
use crate::storage::image::{Image, ImageError, KeepAlarm};
use crate::storage::logged::Snapshot;
use crate::storage::{Engine, Identity};

/// Media type of a SQLite file (<https://www.iana.org/assignments/media-types/application/vnd.sqlite3>).
pub(super) const MEDIA_TYPE: &str = "application/vnd.sqlite3";

/// Bytes that are copied at once: other objects wait for some tenths of a millisecond.
const CHUNK_BYTES: usize = 1 << 20;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ImportParameters {
    name: Option<String>,
    /// An object that exists is replaced.
    replace: bool,
    /// What becomes of an alarm that the database has.
    alarm: AlarmOf,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum AlarmOf {
    #[default]
    Keep,
    Drop,
}

impl Operator {
    /// The database as it is now, while the object goes on. It is copied to a file first: what a slow
    /// client has not read yet must not keep the object's own file from being written.
    pub(super) async fn export(&self, object: &Address) -> Answer {
        self.row(object).await?;
        let snapshot = self.engine.snapshot(object.id, object.shard);
        let snapshot = snapshot.map_err(|error| unreadable(&error))?;
        let Some(snapshot) = snapshot else {
            return Err(Problem::not_found(format!(
                "object {} was deleted just now",
                object.id
            )));
        };
        let file = self.copy(&snapshot).await?;
        self.wait_for(&snapshot).await?;
        let bytes = snapshot.bytes();
        drop(snapshot);
        let mut response = Response::new(stream_file(file));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
        headers.insert(CONTENT_LENGTH, bytes.into());
        Ok(response)
    }

    async fn copy(&self, snapshot: &Snapshot) -> Result<File, Problem> {
        let mut file = spool_file(&self.spool).map_err(|error| no_spool(&error))?;
        let at_once = u32::try_from(CHUNK_BYTES / snapshot.page_bytes()).unwrap_or(1);
        let mut chunk = Vec::with_capacity(CHUNK_BYTES);
        for first in (1..=snapshot.pages()).step_by(at_once as usize) {
            chunk.clear();
            snapshot
                .read(first, at_once, &mut chunk)
                .map_err(|error| unreadable(&error))?;
            let wrote = tokio::task::spawn_blocking(move || {
                file.write_all(&chunk)?;
                Ok((file, chunk))
            });
            let wrote: io::Result<(File, Vec<u8>)> = joined(wrote.await);
            (file, chunk) = wrote.map_err(|error| no_spool(&error))?;
        }
        file.rewind().map_err(|error| no_spool(&error))?;
        Ok(file)
    }

    /// Until what a snapshot shows is durable.
    async fn wait_for(&self, snapshot: &Snapshot) -> Result<(), Problem> {
        poll_fn(|context| {
            if snapshot.is_lost() {
                return Poll::Ready(Err(Problem::unavailable(
                    "the latest commit of the object was lost; it is as it was before it",
                )));
            }
            if self.engine.durable() >= snapshot.position() {
                return Poll::Ready(Ok(()));
            }
            self.engine.wake_at(snapshot.position(), context.waker());
            self.engine.release();
            Poll::Pending
        })
        .await
    }

    /// Another database becomes that of the object, in one commit.
    pub(super) async fn import(&self, object: Address, request: Request<Body>) -> Answer {
        let parameters: ImportParameters = parameters(&request)?;
        let name = checked_name(&object, parameters.name.as_deref())?;
        let known = self.row(&object).await.ok();
        self.check_replaceable(&object, parameters.replace)?;
        let bytes_max = self
            .sql
            .transaction_bytes_max
            .min(self.sql.database_bytes_max);
        let bytes_max = usize::try_from(bytes_max).unwrap_or(usize::MAX);
        let _permit = self.importing.acquire().await;
        let body = request.into_body().read(bytes_max).await;
        let body = body.map_err(|error| too_large(&error, bytes_max))?;
        let known_name = known.and_then(|row| row.name?.parse().ok());
        let identity = Identity {
            id: object.id,
            class: object.class.name().clone(),
            name: name.or(known_name),
            shard: object.shard,
        };
        let keep_alarm = match parameters.alarm {
            AlarmOf::Keep => KeepAlarm::Yes,
            AlarmOf::Drop => KeepAlarm::No,
        };
        let of = identity.clone();
        let imported =
            tokio::task::spawn_blocking(move || Image::import(body.into(), &of, keep_alarm));
        let (image, alarm) = imported
            .await
            .map_err(|error| Problem::new(ErrorCode::Internal, error.to_string()))?
            .map_err(|error| bad_image(&error))?;
        // Somebody may have been faster.
        self.check_replaceable(&object, parameters.replace)?;
        self.host.take_out(object.id);
        let next_ms = alarm.pending.map(|pending| pending.next_ms);
        self.engine
            .replace(&identity, &image, alarm)
            .map_err(|error| ClassError::from(error).problem())?;
        self.host.timers().set(object.id, next_ms);
        self.settled(&object).await?;
        self.host.sleep(object.id);
        Ok(answer(
            &json!({ "id": object.id.to_string(), "bytes": image.bytes().len() }),
        ))
    }

    fn check_replaceable(&self, object: &Address, replace: bool) -> Result<(), Problem> {
        let exists = self.engine.exists(object.id, object.shard);
        if exists.map_err(|error| unreadable(&error))? && !replace {
            return Err(Problem::bad_request(format!(
                "object {} exists already; with replace=true its data give way",
                object.id
            )));
        }
        Ok(())
    }
}

/// A file without a name: it is gone with its last descriptor, whatever happens.
fn spool_file(directory: &Path) -> io::Result<File> {
    std::fs::create_dir_all(directory)?;
    tempfile::tempfile_in(directory)
}

fn stream_file(file: File) -> Body {
    let chunks = stream::try_unfold(file, |mut file| async move {
        let read = tokio::task::spawn_blocking(move || {
            let mut chunk = vec![0; CHUNK_BYTES / 4];
            let bytes = file.read(&mut chunk)?;
            chunk.truncate(bytes);
            Ok((file, chunk))
        });
        let (file, chunk): (File, Vec<u8>) = joined(read.await)?;
        if chunk.is_empty() {
            return Ok(None);
        }
        Ok(Some((Frame::data(Bytes::from(chunk)), file)))
    });
    Body::stream(StreamBody::new(chunks))
}

fn joined<T>(result: Result<io::Result<T>, tokio::task::JoinError>) -> io::Result<T> {
    result.map_err(io::Error::other)?
}

pub(super) fn unreadable(error: &dyn std::error::Error) -> Problem {
    Problem::new(
        ErrorCode::Internal,
        format!("the database cannot be read: {error}"),
    )
}

fn no_spool(error: &io::Error) -> Problem {
    Problem::new(
        ErrorCode::StorageFull,
        format!("the copy on its way out cannot be written: {error}"),
    )
}

fn too_large(error: &ClassError, bytes_max: usize) -> Problem {
    let problem = Problem {
        remote: false,
        ..error.problem()
    };
    if problem.code != ErrorCode::PayloadTooLarge {
        return problem;
    }
    let rule = format!(
        "{}: an import is one transaction, of at most sql.transaction_bytes_max and sql.database_bytes_max, here {bytes_max}",
        problem.detail
    );
    Problem::new(problem.code, rule)
}

pub(super) fn bad_image(error: &ImageError) -> Problem {
    Problem::bad_request(ops::Causes(error).to_string())
}
