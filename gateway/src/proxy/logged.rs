//! What is written down of a request when it has been answered.

use std::time::Duration;

use http::header::USER_AGENT;
use pingora_core::Error;
use pingora_proxy::Session;
use protocol::ErrorCode;
use tracing::debug;

use super::{Aim, Proxy, Request};
use crate::access_log::{self, AccessLog, Line};
use crate::asked::Asked;
use crate::metrics::Code;

impl Proxy {
    pub(super) fn write_down(
        &self,
        log: &AccessLog,
        asked: &Asked<'_>,
        session: &Session,
        request: &Request,
        took: Duration,
    ) {
        log.write(&Line {
            time: access_log::now(),
            request: &request.id(),
            trace: format!("{:032x}", request.trace.trace),
            client: asked.client,
            method: asked.method.as_str(),
            scheme: asked.scheme(),
            host: asked.host,
            path: asked.path,
            route: request.label.as_str(),
            status: session
                .response_written()
                .map_or(0, |head| head.status.as_u16()),
            refused: request.refused.map(ErrorCode::name),
            cache: request.cached.outcome(session),
            server: match &request.aim {
                Some(Aim::App(app)) => app
                    .choice
                    .as_ref()
                    .map(|choice| choice.picked.server.address),
                _ => None,
            },
            tries: request.tries,
            sent_bytes: session.body_bytes_sent(),
            took_us: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
            agent: asked.header_value(&USER_AGENT),
        });
    }
}

/// For developers; operators have metrics and the access log.
pub(super) fn log(
    session: &Session,
    error: Option<&Error>,
    request: &Request,
    code: Code,
    took: Duration,
) {
    debug!(
        request = format_args!("{:016x}", request.id),
        trace = format_args!("{:032x}", request.trace.trace),
        span = format_args!("{:016x}", request.trace.span),
        method = %session.req_header().method,
        route = request.label.as_str(),
        ?code,
        tries = request.tries,
        took_us = took.as_micros(),
        error = error.map(tracing::field::display),
        "request answered"
    );
}
