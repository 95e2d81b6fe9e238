//! Whole databases, out of an object and into one.

use std::fs::File;
use std::io::{self, Read, Write};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, stream};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderValue, Request, Response};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use protocol::{ErrorCode, Problem};
use serde::Deserialize;
use serde_json::json;
use tempfile::{NamedTempFile, TempPath};
use tokio::time::Instant;

use super::{Answer, Operator, answer, checked_name, parameters};
use crate::alarm::AlarmState;
use crate::class::{Body, ClassError};
use crate::export::{CopyError, Pages, copy, joined};
use crate::host::Address;
use crate::storage::Identity;
use crate::storage::image::{Image, ImageError, KeepAlarm};

pub(super) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Media type of a SQLite file (<https://www.iana.org/assignments/media-types/application/vnd.sqlite3>).
pub(super) const MEDIA_TYPE: &str = "application/vnd.sqlite3";

/// Bytes that are sent at once.
const CHUNK_BYTES: usize = 256 << 10;

/// How long the files of a database that was deleted just now may take to go.
const REMOVED_WITHIN: Duration = Duration::from_secs(10);

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
    /// The database as it is now, while the object goes on.
    pub(super) async fn export(&self, object: &Address) -> Answer {
        self.row(object).await?;
        let copied = copy(&self.engine, object.id, object.shard, &self.spool).await;
        match copied.map_err(|error| no_copy(&error))? {
            Some(copied) => Ok(match copied.pages {
                Pages::Memory(pages) => database_answer(Body::from(pages), copied.bytes),
                Pages::File(file) => file_answer(file, copied.bytes),
            }),
            None => Err(Problem::not_found(format!(
                "object {} was deleted just now",
                object.id
            ))),
        }
    }

    /// Another database becomes that of the object, in one commit.
    pub(super) async fn import(&self, object: Address, request: Request<Body>) -> Answer {
        let parameters: ImportParameters = parameters(&request)?;
        let name = checked_name(&object, parameters.name.as_deref())?;
        let known = self.row(&object).await.ok();
        self.check_replaceable(&object, parameters.replace)?;
        let file = self.receive(request.into_body()).await?;
        let permit = self.importing.acquire().await;
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
        let image = self.check(file, identity, keep_alarm).await?;
        drop(permit);
        let bytes = image.bytes;
        // Somebody may have been faster.
        self.check_replaceable(&object, parameters.replace)?;
        self.take_over(image).await?;
        self.settled(&object).await?;
        self.host.sleep(object.id);
        Ok(answer(
            &json!({ "id": object.id.to_string(), "bytes": bytes }),
        ))
    }

    /// Saves a body in a file.
    async fn receive(&self, mut body: Body) -> Result<TempPath, Problem> {
        let bytes_max = self.sql.database_bytes_max;
        let mut file = NamedTempFile::new_in(&self.spool).map_err(|error| no_spool(&error))?;
        let mut bytes = 0;
        while let Some(frame) = body.frame().await {
            let frame = frame
                .map_err(|error| Problem::bad_request(format!("the body broke off: {error}")))?;
            let Ok(data) = frame.into_data() else {
                continue;
            };
            bytes += data.len() as u64;
            if bytes > bytes_max {
                return Err(Problem::new(
                    ErrorCode::PayloadTooLarge,
                    format!("the database is larger than sql.database_bytes_max = {bytes_max}"),
                ));
            }
            let wrote = tokio::task::spawn_blocking(move || {
                file.write_all(&data)?;
                Ok(file)
            });
            file = joined(wrote.await).map_err(|error| no_spool(&error))?;
        }
        Ok(file.into_temp_path())
    }

    /// Makes a file the database of an object, as far as that needs no object.
    pub(super) async fn check(
        &self,
        file: TempPath,
        identity: Identity,
        keep_alarm: KeepAlarm,
    ) -> Result<Checked, Problem> {
        let in_memory_max = self.sql.transaction_bytes_max;
        let checked = tokio::task::spawn_blocking(move || {
            let (image, alarm) = Image::import(file, &identity, keep_alarm)?;
            let pages = if image.bytes() <= in_memory_max {
                Some(image.read()?)
            } else {
                File::open(image.file())?.sync_all()?;
                None
            };
            let name = image.name().cloned();
            Ok(Checked {
                identity: Identity { name, ..identity },
                alarm,
                pages,
                bytes: image.bytes(),
                image,
            })
        });
        let checked: Result<Checked, ImageError> = checked
            .await
            .map_err(|error| Problem::new(ErrorCode::Internal, error.to_string()))?;
        checked.map_err(|error| match error {
            ImageError::File(error) => no_spool(&error),
            error => Problem::bad_request(ops::Causes(&error).to_string()),
        })
    }

    /// Puts a database in the place of the object's. The first stretch of this, up to an await, does so
    /// unless the database is too large for one transaction.
    pub(super) async fn take_over(&self, checked: Checked) -> Result<(), Problem> {
        let Checked {
            identity,
            alarm,
            pages,
            image,
            ..
        } = checked;
        let next_ms = alarm.pending.map(|pending| pending.next_ms);
        self.host.take_out(identity.id);
        match pages {
            Some(pages) => {
                self.engine
                    .replace(&identity, image.page_bytes(), &pages, alarm)
                    .map_err(|error| ClassError::from(error).problem())?;
            }
            None => self.adopt(&identity, &image, alarm).await?,
        }
        self.host.timers().set(identity.id, next_ms);
        Ok(())
    }

    async fn adopt(
        &self,
        identity: &Identity,
        image: &Image,
        alarm: AlarmState,
    ) -> Result<(), Problem> {
        let exists = self.engine.exists(identity.id, identity.shard);
        if exists.map_err(|error| unreadable(&error))? {
            return Err(Problem::bad_request(format!(
                "a database of {} bytes is larger than sql.transaction_bytes_max = {}: it cannot take the place of \
                 another; delete object {} first",
                image.bytes(),
                self.sql.transaction_bytes_max,
                identity.id
            )));
        }
        let begun = Instant::now();
        loop {
            let adopted = self.engine.adopt(identity, image.file(), alarm.clone());
            if let Some(_end) = adopted.map_err(|error| ClassError::from(error).problem())? {
                return Ok(());
            }
            if begun.elapsed() > REMOVED_WITHIN {
                return Err(Problem::unavailable(format!(
                    "the file that object {} had is not removed yet",
                    identity.id
                )));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
            self.host.take_out(identity.id);
        }
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

/// A database that was checked, and is that of an object now.
pub(super) struct Checked {
    identity: Identity,
    alarm: AlarmState,
    /// Its pages, unless they are too many for one transaction.
    pages: Option<Vec<u8>>,
    bytes: u64,
    image: Image,
}

/// A database in a file as an answer.
pub(super) fn file_answer(file: File, bytes: u64) -> Response<Body> {
    database_answer(Body::stream(StreamBody::new(chunks(file))), bytes)
}

fn database_answer(body: Body, bytes: u64) -> Response<Body> {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
    headers.insert(CONTENT_LENGTH, bytes.into());
    response
}

/// What follows in a file, piece by piece.
pub(super) fn chunks(file: File) -> impl Stream<Item = Result<Frame<Bytes>, BoxError>> {
    stream::try_unfold(file, |mut file| async move {
        let read = tokio::task::spawn_blocking(move || {
            let mut chunk = vec![0; CHUNK_BYTES];
            let bytes = file.read(&mut chunk)?;
            chunk.truncate(bytes);
            Ok((file, chunk))
        });
        let (file, chunk): (File, Vec<u8>) = joined(read.await)?;
        if chunk.is_empty() {
            return Ok(None);
        }
        Ok(Some((Frame::data(Bytes::from(chunk)), file)))
    })
}

pub(super) fn unreadable(error: &dyn std::error::Error) -> Problem {
    Problem::new(
        ErrorCode::Internal,
        format!("the database cannot be read: {error}"),
    )
}

fn no_copy(error: &CopyError) -> Problem {
    let text = ops::Causes(error).to_string();
    let code = match error {
        CopyError::Open(_) | CopyError::Read(_) => ErrorCode::Internal,
        CopyError::Write(_) => ErrorCode::StorageFull,
        CopyError::Lost => return Problem::unavailable(text),
    };
    Problem::new(code, text)
}

pub(super) fn no_spool(error: &io::Error) -> Problem {
    Problem::new(
        ErrorCode::StorageFull,
        format!("the copy on its way cannot be written: {error}"),
    )
}
