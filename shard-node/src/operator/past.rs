//! Objects as they were: bookmarks, restores, and copies of earlier times.

use http::Request;
use protocol::{Bookmark, ErrorCode, Problem};
use serde::Deserialize;
use serde_json::{Value as Json, json};

use super::copies::{file_answer, no_spool, unreadable};
use super::{Answer, Operator, answer, audit, parameters};
use crate::class::Body;
use crate::history::{AsOf, HistoryError};
use crate::host::Address;
use crate::storage::Identity;
use crate::storage::image::KeepAlarm;

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
        let identity = Identity {
            id: object.id,
            class: object.class.name().clone(),
            name: None,
            shard: object.shard,
        };
        let file = past.file.into_temp_path();
        let checked = self.check(file, identity, KeepAlarm::Yes).await?;
        let operations = self.turn(object, audit::list).await?;
        // From here to the commit nothing else happens to the object.
        let undo = self.engine.bookmark();
        self.take_over(checked).await?;
        let (now, at, undo) = (self.clock.unix_millis(), at.to_string(), undo.to_string());
        let detail = format!("to {at}, undo with {undo}");
        let noted = self.turn(object, move |context| {
            audit::keep(context, &operations)?;
            audit::note(context, now, "restore", &body.who, &body.why, &detail)?;
            Ok(Json::Null)
        });
        noted.await?;
        Ok(answer(
            &json!({ "restored": at, "changed": true, "undo": undo }),
        ))
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
