//! What a client is told when pingora gave up.

use http::Method;
use pingora_core::{Error, ErrorSource, ErrorType};
use protocol::{ErrorCode, Problem};

use super::bounds::BODY_TOO_SLOW;
use super::{Aim, BODY_TOO_LARGE, NOT_OWNER, Proxy, Request, TOKEN_REFUSED, UNROUTABLE};
use crate::retry::Failure;

impl Proxy {
    pub(super) fn too_large(&self) -> Problem {
        Problem::new(
            ErrorCode::PayloadTooLarge,
            format!(
                "the body is larger than requests.body_bytes_max = {}",
                self.shared.requests.body_bytes_max
            ),
        )
    }

    /// The problem of a request that did not arrive as it should.
    fn client_fault(&self, error: &Error) -> Problem {
        match error.etype() {
            ErrorType::ReadTimedout | ErrorType::WriteTimedout => self.too_slow(),
            kind if *kind == BODY_TOO_SLOW => self.too_slow(),
            kind => Problem::bad_request(format!(
                "the request is not valid HTTP: {}",
                error
                    .context
                    .as_ref()
                    .map_or(kind.as_str(), |context| context.as_str())
            )),
        }
    }

    /// The problem that a client is told when pingora gave up.
    pub(super) fn problem(&self, error: &Error, request: &Request, method: &Method) -> Problem {
        if *error.esource() == ErrorSource::Downstream && *error.etype() != BODY_TOO_LARGE {
            return self.client_fault(error);
        }
        let nothing_ran = matches!(request.failure, Some(Failure::NotSent | Failure::NotOwner));
        if let Some(problem) = request.overdue_problem(nothing_ran) {
            return problem;
        }
        let harmless = nothing_ran || method.is_safe();
        let unavailable = |detail: String| match harmless {
            true => Problem::unavailable(detail),
            false => Problem::outcome_unknown(detail),
        };
        match error.etype() {
            kind if *kind == BODY_TOO_LARGE => match request.body_bytes_max {
                Some(max) => crate::validate::too_large(max),
                None => self.too_large(),
            },
            kind if *kind == BODY_TOO_SLOW => self.too_slow(),
            kind if *kind == NOT_OWNER => {
                unavailable("the shard of this object is moving between workers".to_owned())
            }
            kind if *kind == TOKEN_REFUSED => Problem::new(
                ErrorCode::Internal,
                "the worker does not accept the cluster token of this gateway",
            ),
            kind if *kind == UNROUTABLE => unavailable(
                error
                    .context
                    .as_ref()
                    .map_or_else(String::new, |context| context.as_str().to_owned()),
            ),
            ErrorType::ConnectTimedout
            | ErrorType::ConnectRefused
            | ErrorType::ConnectNoRoute
            | ErrorType::ConnectError
            | ErrorType::SocketError => unavailable(format!(
                "{} cannot be reached",
                request.aim.as_ref().map_or("the upstream", Aim::what)
            )),
            ErrorType::ReadTimedout | ErrorType::WriteTimedout => Problem::new(
                ErrorCode::TimedOut,
                format!(
                    "no byte came for requests.silence_max = {:?}; whether the request had an effect is unknown",
                    self.shared.requests.silence_max
                ),
            ),
            ErrorType::ReadError | ErrorType::WriteError | ErrorType::ConnectionClosed => {
                unavailable(format!(
                    "the connection to {} broke; {}",
                    request.aim.as_ref().map_or("the upstream", Aim::what),
                    if harmless {
                        "nothing was changed"
                    } else {
                        "whether the request had an effect is unknown"
                    },
                ))
            }
            ErrorType::TLSHandshakeFailure
            | ErrorType::TLSHandshakeTimedout
            | ErrorType::InvalidCert
            | ErrorType::HandshakeError => unavailable(format!(
                "{} cannot be reached securely",
                request.aim.as_ref().map_or("the upstream", Aim::what)
            )),
            kind if *error.esource() == ErrorSource::Upstream => unavailable(format!(
                "{} did not answer as it should: {}",
                request.aim.as_ref().map_or("the upstream", Aim::what),
                kind.as_str()
            )),
            kind => Problem::new(
                ErrorCode::Internal,
                format!("the request failed: {}", kind.as_str()),
            ),
        }
    }
}
