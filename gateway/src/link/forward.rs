//! A request for an object over a link, tried until it has an answer or nothing more may be tried.

use std::num::NonZeroU32;
use std::time::Duration;

use http::header::{CONNECTION, CONTENT_LENGTH, EXPECT, TE, TRAILER, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use protocol::link::{self, REQUEST_BODY_BYTES_MAX, Routed};
use protocol::trace::TraceParent;
use protocol::{Colo, ErrorCode, Problem, headers};
use tokio::time::Instant;

use super::{ConnectError, Exchange, ExchangeError, Head, Links, Refused, Way};
use crate::deadline;
use crate::placement::Owner;
use crate::proxy::Shared;
use crate::retry::{self, Failure};
use crate::route::{Ask, ObjectTarget};

/// What shall be sent.
pub(crate) struct Errand<'a> {
    pub(crate) target: &'a ObjectTarget,
    pub(crate) method: &'a Method,
    pub(crate) headers: &'a HeaderMap,
    pub(crate) body: &'a [u8],
    pub(crate) request: &'a str,
    pub(crate) trace: TraceParent,
    pub(crate) colo: Colo,
    pub(crate) deadline: Option<Instant>,
}

/// What came of it.
pub(crate) enum Forwarded {
    Answered {
        head: Head,
        exchange: Exchange,
        /// The system's refusal, if the answer is one.
        refused: Option<ErrorCode>,
    },
    /// The worker speaks no links, or this request does not fit on one. Nothing was sent.
    Http1,
    Failed(Problem),
}

/// The bytes of the body that a request says it has, if it may go over a link: bounded, and with nothing that
/// concerns the connection. `is_empty`: the request has no body.
pub(crate) fn body_bytes(headers: &HeaderMap, is_empty: bool) -> Option<usize> {
    let closes_or_not = |value: &HeaderValue| {
        let value = value.as_bytes();
        value.eq_ignore_ascii_case(b"keep-alive") || value.eq_ignore_ascii_case(b"close")
    };
    let mut length = None;
    for (name, value) in headers {
        if *name == CONTENT_LENGTH {
            length = length.or(Some(value));
        } else if *name == CONNECTION {
            if !closes_or_not(value) {
                return None;
            }
        } else if [UPGRADE, EXPECT, TE, TRAILER, TRANSFER_ENCODING].contains(name) {
            return None;
        }
    }
    match length {
        None => is_empty.then_some(0),
        Some(length) => {
            let bytes = length.to_str().ok()?.parse().ok()?;
            (bytes <= REQUEST_BODY_BYTES_MAX).then_some(bytes)
        }
    }
}

/// Sends a request and waits for the head of its answer. `tries` counts.
pub(crate) async fn forward(
    shared: &Shared,
    links: &Links,
    errand: &Errand<'_>,
    tries: &mut u32,
) -> Forwarded {
    loop {
        *tries += 1;
        match attempt(shared, links, errand).await {
            Ok(forwarded) => return forwarded,
            Err(Tried { failure, problem }) => {
                let safe = retry::is_safe(failure, errand.method);
                let pause = retry::pause(&shared.retry, *tries).filter(|_| safe);
                let in_time = |pause: &Duration| match errand.deadline {
                    Some(deadline) => deadline::left(deadline) > *pause,
                    None => true,
                };
                let Some(pause) = pause.filter(in_time) else {
                    return Forwarded::Failed(problem);
                };
                try_again_later(shared, pause).await;
            }
        }
    }
}

/// A try after the first begins with a look for a newer ring, and with a pause.
async fn try_again_later(shared: &Shared, pause: Duration) {
    shared.metrics.retries.increment(1);
    shared.placement.refresh().await;
    tokio::time::sleep(pause).await;
}

/// A try that came to nothing, and what the client is told if it was the last.
struct Tried {
    failure: Failure,
    problem: Problem,
}

impl Tried {
    fn not_sent(detail: impl Into<String>) -> Self {
        Self {
            failure: Failure::NotSent,
            problem: Problem::unavailable(detail),
        }
    }
}

async fn attempt(shared: &Shared, links: &Links, errand: &Errand<'_>) -> Result<Forwarded, Tried> {
    let owner = shared
        .placement
        .owner(errand.target.id)
        .map_err(|error| Tried::not_sent(error.to_string()))?;
    let link = match links.to(owner.address).await {
        Ok(Way::Link(link)) => link,
        Ok(Way::Http1) => return Ok(Forwarded::Http1),
        Err(error @ ConnectError::Token) => {
            let problem = Problem::new(ErrorCode::Internal, error.to_string());
            return Ok(Forwarded::Failed(problem));
        }
        Err(ConnectError::Unreachable) => {
            return Err(Tried::not_sent(
                "the worker of this object cannot be reached",
            ));
        }
    };
    let begun = link.begin(|out, stream| write(out, stream, errand, &owner));
    let mut exchange = match begun {
        Ok(exchange) => exchange,
        Err(Refused::TooMuch) => return Ok(Forwarded::Http1),
        Err(Refused::Closed) => return Err(failed(ExchangeError::NotSent, shared, errand)),
    };
    let head = exchange.head().await;
    let head = head.map_err(|error| failed(error, shared, errand))?;
    let refused = match head.read() {
        Ok(response) => refusal(&response),
        Err(_) => return Err(failed(ExchangeError::Broken, shared, errand)),
    };
    if refused == Some(ErrorCode::NotOwner) {
        shared.metrics.not_owner.increment(1);
        return Err(Tried {
            failure: Failure::NotOwner,
            problem: Problem::unavailable("the shard of this object is moving between workers"),
        });
    }
    Ok(Forwarded::Answered {
        head,
        exchange,
        refused,
    })
}

fn refusal(response: &link::Response<'_>) -> Option<ErrorCode> {
    let ours = |(name, _): &(&[u8], &[u8])| *name == headers::ERROR.as_str().as_bytes();
    let (_, code) = response.headers.into_iter().find(ours)?;
    std::str::from_utf8(code).ok()?.parse().ok()
}

fn failed(error: ExchangeError, shared: &Shared, errand: &Errand<'_>) -> Tried {
    let harmless = errand.method.is_safe();
    let effect = match harmless {
        true => "nothing was changed",
        false => "whether the request had an effect is unknown",
    };
    match error {
        ExchangeError::NotSent => Tried::not_sent("the worker of this object is stopping"),
        // No byte of an answer came: what another try may do is the same as on a stale connection.
        ExchangeError::Broken => Tried {
            failure: Failure::StaleConnection,
            problem: Problem {
                retryable: harmless,
                ..Problem::outcome_unknown(format!(
                    "the connection to the worker of this object broke; {effect}"
                ))
            },
        },
        // The worker has seen the request, and will see no more in it the next time.
        ExchangeError::BrokenOff => Tried {
            failure: Failure::Sent,
            problem: Problem::outcome_unknown(format!(
                "the object's answer broke off before it began; {effect}"
            )),
        },
        ExchangeError::TimedOut => Tried {
            failure: Failure::Sent,
            problem: Problem::new(
                ErrorCode::TimedOut,
                format!(
                    "no byte came for requests.silence_max = {:?}; whether the request had an effect is unknown",
                    shared.requests.silence_max
                ),
            ),
        },
    }
}

/// What is left of a deadline, for the worker. Nothing left is a millisecond: 0 would be no deadline.
fn timeout_ms(deadline: Instant) -> Option<NonZeroU32> {
    let left = deadline::left(deadline).as_millis().max(1);
    NonZeroU32::new(u32::try_from(left).unwrap_or(u32::MAX))
}

/// Appends the frame of a request.
fn write(out: &mut Vec<u8>, stream: u32, errand: &Errand<'_>, owner: &Owner) -> bool {
    let target = errand.target;
    let routed = Routed {
        id: target.id,
        epoch: owner.epoch.0.get(),
        timeout_ms: errand.deadline.and_then(timeout_ms),
        trace: errand.trace,
        colo: errand.colo.as_str(),
        request: errand.request,
        class: target.class.as_str(),
        name: target.name.as_ref().map(|name| name.as_str()),
    };
    let (ask, all) = match &target.ask {
        Ask::Fetch { path_and_query } => {
            let ask = link::Ask::Fetch {
                method: errand.method.as_str(),
                path_and_query,
            };
            (ask, Some(errand.headers))
        }
        // Nobody sees the headers of these.
        Ask::Call { method } => (link::Ask::Call { method }, None),
        Ask::Create => (link::Ask::Create, None),
        Ask::Own { method } => (link::Ask::Own { method }, None),
    };
    let lines = all.into_iter().flatten().filter(|(name, _)| passes(name));
    let lines = lines.map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()));
    link::request(out, stream, &routed, &ask, lines, errand.body)
}

/// What only the system may say does not pass, nor what concerns the client's connection.
fn passes(name: &HeaderName) -> bool {
    const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
    !(name.as_str().starts_with(headers::PREFIX)
        || [headers::TRACEPARENT, CONNECTION, KEEP_ALIVE].contains(name))
}
