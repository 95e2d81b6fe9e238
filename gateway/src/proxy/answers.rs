//! Answers of the gateway itself, and what it does to those of others.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{
    ALLOW, CONTENT_LENGTH, CONTENT_TYPE, EXPECT, LOCATION, REFERRER_POLICY,
    STRICT_TRANSPORT_SECURITY, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use http::{HeaderValue, Method, StatusCode};
use pingora_core::modules::http::compression::ResponseCompression;
use pingora_core::{Error, Result};
use pingora_http::ResponseHeader;
use pingora_proxy::Session;
use protocol::headers;

use super::Request;
use super::heads::is_secure;
use crate::cors::{self, Grant};
use crate::refusal::Refusal;
use crate::route::Fixed;

/// Of gzip, brotli and zstd alike: most of what there is to gain, at a bearable cost.
const COMPRESSION_LEVEL: u32 = 5;

/// How long an unwanted body is received for.
const REST_TIME_MAX: Duration = Duration::from_secs(10);

/// An answer that needs nobody else.
pub(super) enum Answer {
    Fixed(Arc<Fixed>),
    Redirect {
        status: StatusCode,
        location: HeaderValue,
    },
}

impl Answer {
    pub(super) async fn send(self, session: &mut Session, request: &Request) -> Result<()> {
        let (status, body) = match &self {
            Self::Fixed(fixed) => (fixed.status, fixed.body.clone()),
            Self::Redirect { status, .. } => (*status, Bytes::new()),
        };
        let mut head = ResponseHeader::build(status, Some(4))?;
        // Where there cannot be a body, there is no length either (RFC 9110, 8.6).
        if status != StatusCode::NO_CONTENT {
            head.insert_header(CONTENT_LENGTH, HeaderValue::from(body.len()))?;
        }
        match self {
            Self::Fixed(fixed) => {
                for (name, value) in &fixed.headers {
                    head.append_header(name, value)?;
                }
            }
            Self::Redirect { location, .. } => head.insert_header(LOCATION, location)?,
        }
        tell_browser(&mut head, &request.grant)?;
        if request.finish.security_headers {
            secure_headers(&mut head, is_secure(session))?;
        }
        let bodiless = session.req_header().method == Method::HEAD
            || body.is_empty()
            || status == StatusCode::NO_CONTENT
            || status == StatusCode::NOT_MODIFIED;
        write_whole(session, head, (!bodiless).then_some(body)).await
    }
}

/// Answers with a problem document, or what else belongs to the refusal.
pub(super) async fn refuse(
    session: &mut Session,
    request: &mut Request,
    refusal: &Refusal,
) -> Result<()> {
    let problem = &refusal.problem;
    request.refused = Some(problem.code);
    let (kind, body) = refusal.body(&session.req_header().headers, &request.id());
    let body = Bytes::from(body);
    let mut head = ResponseHeader::build(problem.code.status(), Some(8))?;
    head.insert_header(CONTENT_TYPE, kind)?;
    head.insert_header(CONTENT_LENGTH, HeaderValue::from(body.len()))?;
    head.insert_header(headers::ERROR, problem.code.name())?;
    for (name, value) in refusal.headers() {
        head.append_header(name, value)?;
    }
    if let Some(allow) = &problem.allow {
        head.insert_header(ALLOW, allow.as_ref())?;
    }
    tell_browser(&mut head, &request.grant)?;
    let bodiless = session.req_header().method == Method::HEAD;
    write_whole(session, head, (!bodiless).then_some(body)).await
}

/// Writes to the client. Whatever fails of that is the client's: with HTTP/2, pingora does not say so.
pub(super) async fn to_client(writing: impl Future<Output = Result<()>>) -> Result<()> {
    writing.await.map_err(Error::into_down)
}

async fn write_whole(
    session: &mut Session,
    head: ResponseHeader,
    body: Option<Bytes>,
) -> Result<()> {
    to_client(session.write_response_header(Box::new(head), body.is_none())).await?;
    match body {
        None => Ok(()),
        Some(body) => to_client(session.write_response_body(Some(body), true)).await,
    }
}

/// Receives and forgets a body that nobody wants, for a while. If the connection were closed under the
/// bytes that still come, most clients would see a broken connection instead of their refusal.
pub(super) async fn receive_rest(session: &mut Session) {
    // Who asks first will see the refusal first, and then sends no body.
    if session.req_header().headers.contains_key(EXPECT) {
        return;
    }
    let receive =
        async { while let Ok(Some(_)) = session.downstream_session.read_request_body().await {} };
    // The bound on time is as good an end as the end of the body.
    drop(tokio::time::timeout(REST_TIME_MAX, receive).await);
}

/// Lets pingora compress the answer, if client and content suit.
pub(super) fn compress(session: &mut Session) {
    // The module looked at the head when it was still off; it is shown again.
    let head = session.req_header().clone();
    let modules = &mut session.downstream_modules_ctx;
    if let Some(compression) = modules.get_mut::<ResponseCompression>() {
        compression.adjust_level(COMPRESSION_LEVEL);
        compression.request_filter(&head);
    }
}

/// What browsers should be told unless the app says otherwise (OWASP secure headers).
pub(super) fn secure_headers(head: &mut ResponseHeader, secure: bool) -> Result<()> {
    let strict = (STRICT_TRANSPORT_SECURITY, "max-age=31536000");
    let always = [
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (X_FRAME_OPTIONS, "SAMEORIGIN"),
        (REFERRER_POLICY, "strict-origin-when-cross-origin"),
    ];
    for (name, value) in always.into_iter().chain(secure.then_some(strict)) {
        if !head.headers.contains_key(&name) {
            head.insert_header(name, value)?;
        }
    }
    Ok(())
}

/// Replaces what an app says to browsers by what the route does, if it does.
pub(super) fn tell_browser(response: &mut ResponseHeader, grant: &Grant) -> Result<()> {
    if grant.is_empty() {
        return Ok(());
    }
    for name in cors::HEADERS {
        response.remove_header(&name);
    }
    for (name, value) in grant {
        response.append_header(name, value)?;
    }
    Ok(())
}
