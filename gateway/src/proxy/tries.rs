//! One try of a request after another: where it goes, what came of it, and whether there is a next.

use std::time::Duration;

use http::header::SET_COOKIE;
use pingora_core::{Error, ErrorSource, ErrorType, Result};
use pingora_http::ResponseHeader;
use pingora_proxy::Session;
use protocol::{ErrorCode, headers};

use super::answers::{secure_headers, tell_browser};
use super::heads::{is_secure, strip_response};
use super::{Aim, BAD_STATUS, NOT_OWNER, Proxy, Request, TOKEN_REFUSED, cached};
use crate::retry::{self, Failure};
use crate::upstream::server::Outcome;

impl Proxy {
    /// A try after the first is counted, and waits.
    pub(super) async fn begin_try(&self, request: &mut Request) {
        if request.tries > 0 {
            self.shared.metrics.retries.increment(1);
            self.before_retry(request).await;
        }
        request.tries += 1;
        request.failure = None;
    }

    /// There is no connection.
    pub(super) fn connect_failed(
        &self,
        session: &Session,
        request: &mut Request,
        mut error: Box<Error>,
    ) -> Box<Error> {
        request.failure = Some(Failure::NotSent);
        // How little time a client has says nothing of the server.
        if let Some(Aim::App(app)) = &request.aim
            && !request.is_overdue()
        {
            app.report(Outcome::Failure);
        }
        error.set_retry(self.tries_again(session, request, Failure::NotSent));
        error
    }

    /// Something failed on a connection; `reused`: it served other requests before.
    pub(super) fn try_failed(
        &self,
        session: &Session,
        mut error: Box<Error>,
        request: &mut Request,
        reused: bool,
    ) -> Box<Error> {
        // pingora marks errors of reused connections on which no byte of an answer came.
        error.retry.decide_reuse(reused);
        let failure = match request.failure {
            Some(failure) => failure,
            None if error.retry() => Failure::StaleConnection,
            None if *error.etype() == ErrorType::ReadTimedout => Failure::Silent,
            None => Failure::Sent,
        };
        request.failure = Some(failure);
        // A status that is tried again was weighed when it came.
        let again = failure == Failure::Status
            || (*error.esource() != ErrorSource::Downstream
                && self.tries_again(session, request, failure));
        if let Some(Aim::App(app)) = &request.aim
            && matches!(failure, Failure::Sent | Failure::Silent)
            && *error.esource() == ErrorSource::Upstream
            && !request.is_overdue()
        {
            app.report(Outcome::Failure);
        }
        if failure == Failure::Silent && !again {
            request.gave_up();
        }
        error.set_retry(again);
        error
    }

    /// The head of an answer came, interim or final: what it says of its target, and whether it is passed on.
    pub(super) fn weigh_answer(
        &self,
        session: &Session,
        response: &mut ResponseHeader,
        request: &mut Request,
    ) -> Result<()> {
        request.cached.learn(self.shared.cache, response);
        if let Some(Aim::App(app)) = &request.aim {
            strip_response(response);
            let status = response.status.as_u16();
            app.report(match status {
                502..=504 => Outcome::Failure,
                _ => Outcome::Success,
            });
            if app.upstream.config().retry.status.contains(&status)
                && self.tries_again(session, request, Failure::Status)
            {
                request.failure = Some(Failure::Status);
                return Err(Error::new_up(BAD_STATUS));
            }
            request.answered(status);
            return Ok(());
        }
        let created = response.remove_header(&headers::NEW_OBJECT).is_some();
        let Some(code) = response.headers.get(headers::ERROR) else {
            request.settle_creation(created);
            request.answered(response.status.as_u16());
            return Ok(());
        };
        let code: Option<ErrorCode> = code.to_str().ok().and_then(|code| code.parse().ok());
        if code == Some(ErrorCode::NotOwner) {
            self.shared.metrics.not_owner.increment(1);
            request.failure = Some(Failure::NotOwner);
            return Err(Error::new(NOT_OWNER));
        }
        if code == Some(ErrorCode::Unauthorized) {
            // A matter between gateway and worker: no credentials of the client could help.
            return Err(Error::new(TOKEN_REFUSED));
        }
        request.settle_creation(created);
        request.answered(response.status.as_u16());
        request.refused = code;
        Ok(())
    }

    /// The head of an answer goes to the client.
    pub(super) fn finish_answer(
        &self,
        session: &Session,
        response: &mut ResponseHeader,
        request: &mut Request,
    ) -> Result<()> {
        if let Some(Aim::App(app)) = &request.aim {
            if request.finish.security_headers {
                secure_headers(response, is_secure(session))?;
            }
            let cookie = app.choice.as_ref().and_then(|c| c.set_cookie.as_ref());
            if let Some(cookie) = cookie.filter(|_| !cached::is_given_again(session)) {
                response.append_header(SET_COOKIE, cookie)?;
            }
        }
        if cached::is_given_again(session) {
            // Whatever the object was asked for before, nothing is new now.
            request.settle_creation(false);
        }
        request.cached.say(session, response)?;
        tell_browser(response, &request.grant)
    }

    /// Whether the request is to be sent again after this failure; for apps, it is then paid for.
    fn tries_again(&self, session: &Session, request: &Request, failure: Failure) -> bool {
        let method = &session.req_header().method;
        let pause = match &request.aim {
            Some(Aim::App(_)) => Duration::ZERO,
            _ => retry::pause(&self.shared.retry, request.tries).unwrap_or_default(),
        };
        let possible = request.has_time_for(pause)
            && !session.as_ref().retry_buffer_truncated()
            && session.response_written().is_none();
        match &request.aim {
            Some(Aim::App(app)) => {
                possible
                    && retry::is_safe_for_app(failure, method)
                    && request.tries < app.upstream.config().retry.tries_max
                    && app.upstream.spend_retry()
            }
            _ => {
                possible
                    && retry::is_safe(failure, method)
                    && retry::pause(&self.shared.retry, request.tries).is_some()
            }
        }
    }

    /// A try after the first begins with a pause, and for objects with a look for a newer ring. A pool has
    /// another server at once, while there is one that was not tried.
    async fn before_retry(&self, request: &Request) {
        match &request.aim {
            Some(Aim::App(app)) if app.tried.len() + 1 < app.upstream.servers().list.len() => {
                return;
            }
            Some(Aim::Object { .. }) => self.shared.placement.refresh().await,
            _ => {}
        }
        if let Some(pause) = retry::pause(&self.shared.retry, request.tries) {
            tokio::time::sleep(pause).await;
        }
    }
}
