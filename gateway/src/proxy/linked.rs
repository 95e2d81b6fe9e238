//! Requests for objects that go over a link: pingora has read the head, and writes the answer.

use http::header::{CONTENT_LENGTH, TE, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use pingora_core::{Error, ErrorType, OrErr, Result};
use pingora_http::ResponseHeader;
use pingora_proxy::Session;
use protocol::ErrorCode;

use super::answers::to_client;
use super::bounds::{DEADLINE_OVER, by, while_there};
use super::{Aim, Proxy, Request, Shared, refuse, tell_browser};
use crate::link::forward::{Errand, Forwarded, body_bytes, forward};
use crate::link::{Exchange, Head};
use crate::route::Ask;
use crate::rules::Creation;

impl Proxy {
    /// Answers a request for an object over a link, if it may go that way. `false`: it goes by HTTP/1.1.
    pub(super) async fn answer_linked(
        &self,
        session: &mut Session,
        request: &mut Request,
    ) -> Result<bool> {
        if !matches!(request.aim, Some(Aim::Object { .. })) {
            return Ok(false);
        }
        if !matches!(request.creation, Creation::Free) || request.cached.is_keyed() {
            // Links have no words for that; what may be kept goes where pingora keeps it.
            return Ok(false);
        }
        let empty = session.downstream_session.is_body_empty();
        let bytes = body_bytes(&session.req_header().headers, empty);
        let Some(bytes) = bytes.filter(|_| self.shared.requests.links) else {
            return Ok(false);
        };
        if bytes > 0 && request.held.is_none() {
            // If there is no link after all, pingora sends it from there.
            session.downstream_session.enable_retry_buffering();
        }
        let Some(body) = self.prepare(session, request, bytes).await? else {
            return Ok(true);
        };
        let Some(Aim::Object { target, .. }) = &request.aim else {
            return Ok(false);
        };
        let head = session.req_header();
        let method = head.method.clone();
        let headers = match target.ask {
            Ask::Fetch { .. } => head.headers.clone(),
            Ask::Call { .. } | Ask::Create | Ask::Own { .. } => HeaderMap::new(),
        };
        let errand = Errand {
            target,
            method: &method,
            headers: &headers,
            body: &body,
            request: &request.id(),
            trace: request.trace,
            colo: request.colo,
            deadline: request.deadline,
        };
        let forwarding = forward(&self.shared, &self.links, &errand, &mut request.tries);
        let forwarding = by(request.deadline, forwarding);
        // If nobody waits for the answer, the exchange is dropped, and with it cancelled.
        let forwarded = while_there(session, async { Ok(forwarding.await) }).await?;
        let Some(forwarded) = forwarded else {
            // The exchange was dropped, and with it cancelled.
            if let Some(problem) = request.overdue_problem(false) {
                refuse(session, request, &problem.into()).await?;
            }
            return Ok(true);
        };
        match forwarded {
            Forwarded::Http1 => {
                request.tries = 0;
                Ok(false)
            }
            Forwarded::Failed(problem) => {
                if problem.code == ErrorCode::TimedOut {
                    request.gave_up();
                }
                refuse(session, request, &problem.into()).await?;
                Ok(true)
            }
            Forwarded::Answered {
                head,
                exchange,
                refused,
            } => {
                request.refused = refused;
                match refused {
                    None => request.answered(200),
                    Some(code) => request.answered(code.status().as_u16()),
                }
                pass_answer(&self.shared, session, &head, exchange, request).await?;
                Ok(true)
            }
        }
    }
}

/// Passes the answer of an object to the client.
async fn pass_answer(
    shared: &Shared,
    session: &mut Session,
    head: &Head,
    mut exchange: Exchange,
    request: &mut Request,
) -> Result<()> {
    let senseless = |_| Error::explain(ErrorType::InvalidHTTPHeader, "a response of a worker");
    let response = head.read().map_err(senseless)?;
    let mut made = ResponseHeader::build_no_case(response.status, None)?;
    for (name, value) in response.headers {
        let name = HeaderName::from_bytes(name).map_err(senseless_name)?;
        // About requests: with it, an answer could not go over HTTP/2.
        if name != TE {
            made.append_header(
                name,
                HeaderValue::from_bytes(value).map_err(senseless_value)?,
            )?;
        }
    }
    let bodiless =
        session.req_header().method == Method::HEAD || matches!(response.status, 204 | 304);
    let empty = head.is_end && (bodiless || response.body.is_empty());
    if head.is_end && !bodiless {
        made.insert_header(CONTENT_LENGTH, HeaderValue::from(response.body.len()))?;
    } else if !bodiless && !made.headers.contains_key(CONTENT_LENGTH) {
        made.insert_header(TRANSFER_ENCODING, "chunked")?;
    }
    request.cached.learn(shared.cache, &mut made);
    tell_browser(&mut made, &request.grant)?;
    to_client(session.write_response_header(Box::new(made), empty)).await?;
    if empty {
        return Ok(());
    }
    if head.is_end {
        let body = head.bytes(response.body);
        return to_client(session.write_response_body(Some(body), true)).await;
    }
    loop {
        let data = by(request.deadline, exchange.data()).await;
        let data = data.ok_or_else(|| Error::new(DEADLINE_OVER))?;
        let data = data.or_err(ErrorType::ReadError, "the body of an object")?;
        let is_last = data.is_none();
        to_client(session.write_response_body(data, is_last)).await?;
        if is_last {
            return Ok(());
        }
    }
}

fn senseless_name(_: http::header::InvalidHeaderName) -> Box<Error> {
    Error::explain(ErrorType::InvalidHTTPHeader, "a header of a worker")
}

fn senseless_value(_: http::header::InvalidHeaderValue) -> Box<Error> {
    Error::explain(ErrorType::InvalidHTTPHeader, "a header of a worker")
}
