//! Calls of the gateway's own to the objects of counters: over links, or by HTTP/1.1 where there are none.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Method, Request};
use http_body_util::{BodyExt, Full, Limited};
use ops::exchange::ExchangeError;
use ops::{Causes, exchange};
use protocol::{ErrorCode, Problem, headers};
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::{Counters, Origin};
use crate::deadline;
use crate::link::forward::{Errand, Forwarded, forward};
use crate::placement::Owner;
use crate::retry::{self, Failure};
use crate::route::{Ask, ObjectTarget};

/// No answer of such an object is longer.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// What may be tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Nature {
    /// It changes nothing.
    Reads,
    /// Only if nothing ran.
    Adds,
    /// Whatever became of it: the object counts it once.
    AddsOnce,
}

impl Nature {
    /// The method with these rules.
    fn method(self) -> Method {
        match self {
            Self::Reads => Method::GET,
            Self::Adds | Self::AddsOnce => Method::POST,
        }
    }
}

pub(super) struct Call<'a> {
    pub(super) target: &'a ObjectTarget,
    /// The JSON array of them.
    pub(super) arguments: Vec<u8>,
    pub(super) nature: Nature,
    pub(super) origin: &'a Origin,
}

impl Call<'_> {
    /// When it may no longer begin.
    fn deadline(&self) -> Option<Instant> {
        match self.nature {
            Nature::Reads | Nature::AddsOnce => self.origin.deadline,
            // One call may carry the increments of many clients.
            Nature::Adds => None,
        }
    }

    /// Whether there would be time left after a pause.
    fn has_time_for(&self, pause: Duration) -> bool {
        let left = self.deadline().map(deadline::left);
        left.is_none_or(|left| left > pause)
    }
}

/// What an object said: a result, or the code of a refusal and its document.
struct Said {
    refused: Option<ErrorCode>,
    body: Bytes,
}

impl Said {
    fn read<T: DeserializeOwned>(&self) -> Result<T, Problem> {
        let senseless = |error: serde_json::Error| {
            let detail = format!("what the object of a counter answered makes no sense: {error}");
            Problem::new(ErrorCode::Internal, detail)
        };
        match self.refused {
            None => serde_json::from_slice(&self.body).map_err(senseless),
            Some(code) => {
                let told = Problem::from_json(&self.body);
                Err(told.unwrap_or_else(|| Problem::new(code, code.title())))
            }
        }
    }
}

/// A try over HTTP/1.1 that came to nothing.
struct Tried {
    failure: Failure,
    problem: Problem,
}

impl Counters {
    /// Calls an object and reads its result.
    ///
    /// # Errors
    /// Why there is none. [`Problem::retryable`]: nothing ran.
    pub(super) async fn call<T: DeserializeOwned>(&self, call: &Call<'_>) -> Result<T, Problem> {
        let method = call.nature.method();
        let headers = HeaderMap::new();
        let errand = Errand {
            target: call.target,
            method: &method,
            headers: &headers,
            body: &call.arguments,
            request: &call.origin.request,
            trace: call.origin.trace,
            colo: call.origin.colo,
            deadline: call.deadline(),
        };
        let mut tries = 0;
        loop {
            let said = match self.shared.requests.links {
                true => self.over_link(&errand, &mut tries).await,
                false => None,
            };
            let said = match said {
                Some(said) => said,
                None => self.over_http1(call, &mut tries).await,
            };
            let problem = match said.and_then(|said| said.read()) {
                Ok(result) => return Ok(result),
                Err(problem) => problem,
            };
            let again = call.nature == Nature::AddsOnce && super::may_have_run(&problem);
            let pause = retry::pause(&self.shared.retry, tries).filter(|_| again);
            let Some(pause) = pause.filter(|pause| call.has_time_for(*pause)) else {
                return Err(problem);
            };
            self.before_retry(pause).await;
        }
    }

    async fn before_retry(&self, pause: Duration) {
        self.shared.metrics.retries.increment(1);
        self.shared.placement.refresh().await;
        tokio::time::sleep(pause).await;
    }

    /// `None`: there are no links to that worker.
    async fn over_link(
        &self,
        errand: &Errand<'_>,
        tries: &mut u32,
    ) -> Option<Result<Said, Problem>> {
        let (head, mut exchange, refused) =
            match forward(&self.shared, &self.links, errand, tries).await {
                Forwarded::Answered {
                    head,
                    exchange,
                    refused,
                } => (head, exchange, refused),
                Forwarded::Failed(problem) => return Some(Err(problem)),
                Forwarded::Http1 => {
                    // Nothing was sent.
                    *tries = tries.saturating_sub(1);
                    return None;
                }
            };
        let broken = |error: &dyn std::fmt::Display| {
            Problem::outcome_unknown(format!("the answer of a counter's object: {error}"))
        };
        let mut body = match head.read() {
            Ok(response) if head.is_end => {
                let body = head.bytes(response.body);
                return Some(Ok(Said { refused, body }));
            }
            Ok(response) => BytesMut::from(response.body),
            Err(fault) => return Some(Err(broken(&fault))),
        };
        loop {
            match exchange.data().await {
                Ok(Some(data)) if body.len() + data.len() <= ANSWER_BYTES_MAX => {
                    body.extend_from_slice(&data);
                }
                Ok(Some(_)) => return Some(Err(broken(&"it is too long"))),
                Ok(None) => {
                    let body = body.freeze();
                    return Some(Ok(Said { refused, body }));
                }
                Err(error) => return Some(Err(broken(&error))),
            }
        }
    }

    async fn over_http1(&self, call: &Call<'_>, tries: &mut u32) -> Result<Said, Problem> {
        loop {
            *tries += 1;
            let Tried { failure, problem } = match self.try_http1(call).await {
                Ok(said) => return Ok(said),
                Err(tried) => tried,
            };
            let safe = retry::is_safe(failure, &call.nature.method());
            let pause = retry::pause(&self.shared.retry, *tries).filter(|_| safe);
            let Some(pause) = pause.filter(|pause| call.has_time_for(*pause)) else {
                return Err(problem);
            };
            self.before_retry(pause).await;
        }
    }

    async fn try_http1(&self, call: &Call<'_>) -> Result<Said, Tried> {
        let owner = self.shared.placement.owner(call.target.id);
        let owner = owner.map_err(|error| Tried {
            failure: Failure::NotSent,
            problem: Problem::unavailable(error.to_string()),
        })?;
        let exchange = async {
            let request = http1_request(call, &owner);
            let token = self.shared.token.as_ref();
            let answer = exchange::send(&owner.address.to_string(), token, request).await;
            let answer = answer.map_err(not_answered)?;
            let (head, body) = answer.into_parts();
            let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await;
            let body = body.map_err(|error| broken(&error))?.to_bytes();
            let code = head.headers.get(headers::ERROR);
            let refused = code.and_then(|code| code.to_str().ok()?.parse().ok());
            Ok(Said { refused, body })
        };
        let silence_max = self.shared.requests.silence_max;
        let said = tokio::time::timeout(silence_max, exchange).await;
        let said = said.unwrap_or_else(|_| {
            Err(Tried {
                failure: Failure::Silent,
                problem: Problem::new(
                    ErrorCode::TimedOut,
                    format!(
                        "no answer came for requests.silence_max = {silence_max:?}; whether the request had \
                         an effect is unknown"
                    ),
                ),
            })
        })?;
        match said.refused {
            Some(ErrorCode::NotOwner) => {
                self.shared.metrics.not_owner.increment(1);
                Err(Tried {
                    failure: Failure::NotOwner,
                    problem: Problem::unavailable(
                        "the shard of this object is moving between workers",
                    ),
                })
            }
            Some(ErrorCode::Unauthorized) => Err(Tried {
                failure: Failure::Sent,
                problem: Problem::new(
                    ErrorCode::Internal,
                    "the worker does not accept the cluster token of this gateway",
                ),
            }),
            _ => Ok(said),
        }
    }
}

fn not_answered(error: ExchangeError) -> Tried {
    match error {
        ExchangeError::Connect { .. } => Tried {
            failure: Failure::NotSent,
            problem: Problem::unavailable("the worker of this object cannot be reached"),
        },
        error @ ExchangeError::Exchange { .. } => broken(&Causes(&error)),
    }
}

fn broken(error: &dyn std::fmt::Display) -> Tried {
    Tried {
        failure: Failure::StaleConnection,
        problem: Problem::outcome_unknown(format!(
            "the connection to the worker of this object broke, and whether the request had an effect is \
             unknown: {error}"
        )),
    }
}

fn http1_request(call: &Call<'_>, owner: &Owner) -> Request<Full<Bytes>> {
    let target = call.target;
    let mut request = Request::post("/")
        .header(headers::CLASS, target.class.as_str())
        .header(headers::OBJECT, target.id.to_string())
        .header(headers::SHARD, HeaderValue::from(owner.shard.0))
        .header(headers::EPOCH, HeaderValue::from(owner.epoch.0.get()))
        .header(headers::COLO, call.origin.colo.as_str())
        .header(headers::REQUEST, call.origin.request.as_str())
        .header(headers::TRACEPARENT, call.origin.trace.to_string())
        .header(headers::INTERNAL, "1");
    if let Some(name) = &target.name {
        request = request.header(headers::NAME, &*headers::encode_name(name));
    }
    if let Some(deadline) = call.deadline() {
        let left_ms = deadline::left(deadline).as_millis().max(1);
        request = request.header(headers::TIMEOUT, left_ms.to_string());
    }
    if let Ask::Own { method } = target.ask {
        request = request.header(headers::METHOD, method);
    }
    request
        .body(Full::new(Bytes::from(call.arguments.clone())))
        .expect("every header is a legal one")
}
