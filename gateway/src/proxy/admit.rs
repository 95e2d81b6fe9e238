//! Rules that a request may have to wait for.

use http::header::EXPECT;
use pingora_core::Error;
use pingora_proxy::Session;
use protocol::Problem;

use super::{Aim, Request};
use crate::refusal::Refusal;
use crate::route::Ask;

/// Whatever of the rules may have to wait: for an object, or for the client's body.
pub(super) async fn admit(
    session: &mut Session,
    request: &mut Request,
    aim: &Aim,
) -> Result<(), Refusal> {
    let Some(admission) = &request.admission else {
        return Ok(());
    };
    admission.admit().await?;
    if admission.needs_body() {
        let max = admission.body_bytes_max().unwrap_or(0);
        let body = hold_body(session, max).await?;
        admission.check_body(&session.req_header().headers, &body)?;
        request.held = Some(body);
    }
    if let Aim::Object { target, .. } = aim
        && target.ask != Ask::Create
    {
        request.creation = admission.charge_creation().await;
    }
    Ok(())
}

/// Receives the body, and leaves it where pingora will find it. At most `max` bytes, which is at most what
/// pingora holds.
async fn hold_body(session: &mut Session, max: u64) -> Result<Vec<u8>, Problem> {
    let broken = |error: Box<Error>| Problem::bad_request(format!("the body broke off: {error}"));
    if session.req_header().headers.contains_key(EXPECT) {
        let told = session.downstream_session.write_continue_response().await;
        told.map_err(broken)?;
        session.req_header_mut().remove_header(&EXPECT);
    }
    let downstream = &mut session.downstream_session;
    downstream.enable_retry_buffering();
    let mut body = Vec::new();
    while let Some(bytes) = downstream.read_request_body().await.map_err(broken)? {
        body.extend_from_slice(&bytes);
        if body.len() as u64 > max {
            return Err(crate::validate::too_large(max));
        }
    }
    Ok(body)
}
