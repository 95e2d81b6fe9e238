//! Objects as they were: bookmarks, restores, and copies of earlier times.

use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use http::Request;
use protocol::{Bookmark, ErrorCode, LogPosition, Problem};
use serde::Deserialize;
use serde_json::{Value as Json, json};
use tracing::warn;

use super::copies::{file_answer, no_spool, unreadable};
use super::{Answer, Operator, answer, audit, parameters};
use crate::class::{Body, ClassError};
use crate::history::{AsOf, HistoryError};
use crate::host::Address;
use crate::storage::image::KeepAlarm;
use crate::storage::{Engine, Identity, Storage, StorageError};

const BODY_BYTES_MAX: usize = 16 << 10;

/// A moment, by bookmark or by time.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Moment {
    bookmark: Option<String>,
    time_ms: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct RestoreBody {
    #[serde(flatten)]
    to: Moment,
    #[serde(default)]
    who: String,
    #[serde(default)]
    why: String,
}

impl Moment {
    /// `None`: now.
    pub(super) fn bookmark(&self) -> Result<Option<Bookmark>, Problem> {
        match (&self.bookmark, self.time_ms) {
            (None, None) => Ok(None),
            (None, Some(time_ms)) => Ok(Some(Bookmark::at_time(time_ms))),
            (Some(text), None) => {
                let parsed = text.parse::<Bookmark>();
                parsed
                    .map(Some)
                    .map_err(|error| Problem::bad_request(error.to_string()))
            }
            (Some(_), Some(_)) => Err(Problem::bad_request(
                "bookmark and time_ms both say when: give one of them",
            )),
        }
    }
}

impl Operator {
    /// The bookmark of now, or of a time.
    pub(super) async fn bookmark(&self, object: &Address, request: &Request<Body>) -> Answer {
        let moment: Moment = parameters(request)?;
        let now = self.engine.bookmark();
        let Some(at) = moment.bookmark()? else {
            return Ok(answer(&json!({ "bookmark": now.to_string() })));
        };
        // Whether it can be gone back to.
        self.database_at(object, at).await?;
        Ok(answer(&json!({ "bookmark": at.to_string() })))
    }

    pub(super) async fn database_at(
        &self,
        object: &Address,
        at: Bookmark,
    ) -> Result<AsOf, Problem> {
        // What was committed before now can be read from the log then.
        self.settled(object).await?;
        self.past(object, at).await
    }

    /// The same of an object all of whose commits are durable.
    async fn past(&self, object: &Address, at: Bookmark) -> Result<AsOf, Problem> {
        let _permit = self.looking_back.acquire().await;
        let history = self.engine.history(object.id, object.shard);
        let history = history.map_err(|error| unreadable(&error))?;
        let spool = self.spool.clone();
        let found = tokio::task::spawn_blocking(move || history.database_at(at, &spool));
        let found = found
            .await
            .map_err(|error| Problem::new(ErrorCode::Internal, error.to_string()))?;
        found.map_err(|error| impossible(&error))
    }

    /// The object becomes as it was, in one commit. Its answer has the way back.
    pub(super) async fn restore(&self, object: &Address, request: Request<Body>) -> Answer {
        let body = request.into_body().read(BODY_BYTES_MAX).await;
        let body = body.map_err(|error| error.problem())?;
        let body: RestoreBody = serde_json::from_slice(&body).map_err(|error| {
            Problem::bad_request(format!(
                "the body must be {{\"bookmark\" or \"time_ms\", \"who\", \"why\"}}: {error}"
            ))
        })?;
        let at = body.to.bookmark()?.ok_or_else(|| {
            Problem::bad_request("\"bookmark\" or \"time_ms\" must say what to restore to")
        })?;
        let AsOf::Database(past) = self.database_at(object, at).await? else {
            let undo = self.engine.bookmark();
            let same =
                json!({ "restored": at.to_string(), "changed": false, "undo": undo.to_string() });
            return Ok(answer(&same));
        };
        let identity = self.identity(object);
        let file = past.file.into_temp_path();
        let checked = self.check(file, identity, KeepAlarm::Yes).await?;
        let operations = self.operations(object).await?;
        // From here to the commit nothing else happens to the object.
        let undo = self.engine.bookmark();
        self.take_over(checked).await?;
        let (now, at, undo) = (self.clock.unix_millis(), at.to_string(), undo.to_string());
        let detail = format!("to {at}, undo with {undo}");
        self.between_sessions(object, |storage| {
            audit::keep(storage, &operations)?;
            audit::note(storage, now, "restore", &body.who, &body.why, &detail)
        })
        .map_err(|error| ClassError::from(error).problem())?;
        self.settled(object).await?;
        Ok(answer(
            &json!({ "restored": at, "changed": true, "undo": undo }),
        ))
    }

    /// Restores an object that has asked for it, between two of its sessions. If that fails the object goes on
    /// as it is.
    pub(crate) async fn restore_asked(&self, object: Address, at: Bookmark) {
        let restored = self.try_restore_asked(&object, at).await;
        if let Ok(None) = restored {
            // Somebody else has changed the database, as a whole.
            return;
        }
        let now = self.clock.unix_millis();
        let (what, why, detail) = match &restored {
            Ok(None) => return,
            Ok(Some((undo, _))) => ("restore", "", format!("to {at}, undo with {undo}")),
            Err(problem) => {
                warn!(object = %object.id, %at, error = problem.detail, "an object could not be restored as it has asked");
                (
                    "restore failed",
                    problem.detail.as_str(),
                    format!("to {at}"),
                )
            }
        };
        // By itself: there may be no room for a note.
        let disarmed = self.between_sessions(&object, |storage| match storage.asked_restore()? {
            Some(_) => storage.disarm_restore(),
            None => Ok(()),
        });
        let noted = disarmed.and_then(|_| {
            self.between_sessions(&object, |storage| {
                if let Ok(Some((_, operations))) = &restored {
                    audit::keep(storage, operations)?;
                }
                audit::note(storage, now, what, "the object", why, &detail)
            })
        });
        if let Err(error) = noted {
            warn!(object = %object.id, %error, "a restore could not be noted");
        }
    }

    async fn try_restore_asked(
        &self,
        object: &Address,
        at: Bookmark,
    ) -> Result<Option<(Bookmark, Json)>, Problem> {
        let failed = |error| ClassError::from(error).problem();
        let mut operations = Json::Null;
        let last = self
            .between_sessions(object, |storage| {
                operations = audit::list(storage)?;
                Ok(())
            })
            .map_err(failed)?;
        poll_fn(|context| {
            if self.engine.durable() >= last || self.engine.check_writable().is_err() {
                return Poll::Ready(());
            }
            self.engine.wake_at(last, context.waker());
            self.engine.release();
            Poll::Pending
        })
        .await;
        let found = match self.past(object, at).await? {
            AsOf::AsItIs => None,
            AsOf::Database(past) => {
                let file = past.file.into_temp_path();
                let checked = self.check(file, self.identity(object), KeepAlarm::Yes);
                Some(checked.await?)
            }
        };
        // From here to the commit nothing else happens to the object; until here an operator may have
        // deleted or replaced it.
        let mut asked = None;
        self.between_sessions(object, |storage| {
            asked = storage.asked_restore()?;
            Ok(())
        })
        .map_err(failed)?;
        if asked != Some(at) {
            return Ok(None);
        }
        let undo = self.engine.bookmark();
        if let Some(checked) = found {
            self.take_over(checked).await?;
        }
        Ok(Some((undo, operations)))
    }

    /// One turn of an object that is not awake, and cannot wake meanwhile; where its last commit ends.
    fn between_sessions(
        &self,
        object: &Address,
        turn: impl FnOnce(&Storage) -> Result<(), StorageError>,
    ) -> Result<LogPosition, StorageError> {
        let engine = Rc::new(self.engine.clone());
        let storage = Storage::new(self.identity(object), engine, Arc::clone(&self.sql))
            .with_timers(Rc::clone(self.host.timers()))
            .ignore_armed();
        storage.begin_segment();
        let done = turn(&storage);
        let ended = match &done {
            Ok(()) => storage.commit().map(drop),
            Err(_) => storage.rollback(),
        };
        let gate = storage.gate();
        storage.close();
        done.and(ended).map(|()| gate)
    }

    fn identity(&self, object: &Address) -> Identity {
        Identity {
            id: object.id,
            class: object.class.name().clone(),
            name: object.name.clone(),
            shard: object.shard,
        }
    }

    /// A copy of the object as it was.
    pub(super) async fn export_at(&self, object: &Address, at: Bookmark) -> Answer {
        match self.database_at(object, at).await? {
            AsOf::AsItIs => self.export(object).await,
            AsOf::Database(past) => Ok(file_answer(past.file.into_file(), past.bytes)),
        }
    }
}

fn impossible(error: &HistoryError) -> Problem {
    let text = ops::Causes(error).to_string();
    match error {
        HistoryError::Archive(_) | HistoryError::Log(_) | HistoryError::Contradiction(_) => {
            Problem::new(ErrorCode::Internal, text)
        }
        HistoryError::Spool(error) => no_spool(error),
        HistoryError::DidNotExist(_) => Problem::not_found(text),
        HistoryError::Future { .. }
        | HistoryError::NoArchive
        | HistoryError::OutOfWindow { .. } => Problem::bad_request(text),
    }
}
