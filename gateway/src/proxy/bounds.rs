//! What bounds a request from its head to its end: sizes, slowness of its client, its deadline, and its slot
//! at the target.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use pingora_core::upstreams::peer::PeerOptions;
use pingora_core::{Error, ErrorType, Result};
use pingora_http::RequestHeader;
use pingora_proxy::Session;
use protocol::{ErrorCode, Problem};
use tokio::time::Instant;

use super::{Aim, Proxy, Request, refuse};
use crate::config::ConnectionsConfig;
use crate::deadline;
use crate::metrics::Cut;

/// The client sends its body more slowly than it may.
pub(super) const BODY_TOO_SLOW: ErrorType = ErrorType::Custom("body_too_slow");
/// The time of the request is over.
pub(super) const DEADLINE_OVER: ErrorType = ErrorType::Custom("deadline_over");

/// Whether the head is as large as it may be. What is much larger never came this far.
pub(super) fn check_head(head: &RequestHeader, config: &ConnectionsConfig) -> Result<(), Problem> {
    let path = head.uri.path_and_query();
    let uri_bytes = path.map_or(0, |path| path.as_str().len());
    if uri_bytes > config.uri_bytes_max as usize {
        return Err(Problem::new(
            ErrorCode::UriTooLong,
            format!(
                "path and query have {uri_bytes} bytes, more than connections.uri_bytes_max = {}",
                config.uri_bytes_max
            ),
        ));
    }
    let count = head.headers.len();
    if count > config.headers_max as usize {
        return Err(Problem::new(
            ErrorCode::HeadersTooLarge,
            format!(
                "the request has {count} headers, more than connections.headers_max = {}",
                config.headers_max
            ),
        ));
    }
    // Two for the colon and the space, two for the end of the line.
    let lines = head.headers.iter();
    let bytes: usize = lines
        .map(|(name, value)| name.as_str().len() + value.len() + 4)
        .sum();
    if bytes + uri_bytes > config.head_bytes_max as usize {
        return Err(Problem::new(
            ErrorCode::HeadersTooLarge,
            format!(
                "the head of the request has {} bytes, more than connections.head_bytes_max = {}",
                bytes + uri_bytes,
                config.head_bytes_max
            ),
        ));
    }
    Ok(())
}

impl Proxy {
    /// Bounds of the client's connection while this request is on it.
    pub(super) fn bound_client(&self, session: &mut Session) {
        let config = &self.shared.connections;
        let stall_max = Some(config.stall_max);
        let downstream = &mut session.downstream_session;
        downstream.set_read_timeout(stall_max);
        downstream.set_write_timeout(stall_max);
        if downstream.get_keepalive().is_some() {
            downstream.set_keepalive(Some(config.idle_seconds()));
        }
    }

    /// When this request must be done.
    pub(super) fn find_deadline(
        &self,
        session: &Session,
        request: &mut Request,
    ) -> Result<(), Problem> {
        let client = deadline::of_client(&session.req_header().headers)?;
        if session.is_upgrade_req() {
            // Who upgrades means to stay.
            return Ok(());
        }
        let max = request.finish.deadline_max;
        let max = max.unwrap_or(self.shared.requests.deadline_max);
        let max = Some(max).filter(|max| !max.is_zero());
        request.deadline = deadline::of_request(request.begun, client, max);
        // What the config allows is more than it took to come here.
        match request
            .deadline
            .filter(|_| client.is_some() && request.is_overdue())
        {
            Some(deadline) => Err(deadline::problem(request.begun, deadline, true)),
            None => Ok(()),
        }
    }

    /// Takes a slot for a request that is to be sent now.
    pub(super) fn take_slot(&self, request: &mut Request) -> Result<(), Problem> {
        if request.slot.is_some() {
            return Ok(());
        }
        let dynamic;
        let shedder = match &request.aim {
            Some(Aim::App(app)) => app.upstream.shedder(),
            Some(Aim::Object { .. }) => {
                dynamic = self.shared.dynamic.load();
                dynamic.objects.as_ref()
            }
            Some(Aim::Counter(_) | Aim::Here(_)) | None => None,
        };
        if let Some(shedder) = shedder {
            request.slot = Some(shedder.admit(Instant::now())?);
        }
        Ok(())
    }

    /// Whether a body that has come so far comes fast enough. Streams in both directions are exempt, once
    /// their answer has begun: they may be silent for a reason.
    pub(super) fn check_pace(&self, session: &Session, request: &Request) -> Result<()> {
        let config = &self.shared.connections;
        let per_second = u64::from(config.body_bytes_per_second_min);
        if per_second == 0 || session.response_written().is_some() {
            return Ok(());
        }
        let took = request.begun.elapsed();
        let due = u128::from(per_second) * took.as_millis() / 1000;
        if took > config.body_grace && u128::from(request.body_bytes) < due {
            self.shared.metrics.cut(Cut::BodySlow).increment(1);
            return Err(Error::explain(BODY_TOO_SLOW, "the body of the request"));
        }
        Ok(())
    }

    /// The whole body of a request that goes as one message, and a slot at its target; `None` if it was refused.
    pub(super) async fn prepare(
        &self,
        session: &mut Session,
        request: &mut Request,
        bytes: usize,
    ) -> Result<Option<Bytes>> {
        let body = match &request.held {
            Some(held) => Bytes::copy_from_slice(held),
            None if bytes == 0 => Bytes::new(),
            None => self.receive_body(session, request).await?.freeze(),
        };
        match self.take_slot(request) {
            Ok(()) => Ok(Some(body)),
            Err(problem) => {
                refuse(session, request, &problem.into()).await?;
                Ok(None)
            }
        }
    }

    /// Receives the rest of a body.
    async fn receive_body(&self, session: &mut Session, request: &mut Request) -> Result<BytesMut> {
        let mut body = BytesMut::new();
        // HTTP/2 has no bound of its own on silence.
        let stall_max = self.shared.connections.stall_max;
        loop {
            let reading = session.downstream_session.read_request_body();
            let reading = tokio::time::timeout(stall_max, reading);
            let read = by(request.deadline, reading).await;
            let read = read.ok_or_else(|| Error::new(DEADLINE_OVER))?;
            let slow = |_| Error::new_down(ErrorType::ReadTimedout);
            match read.map_err(slow)?.map_err(Error::into_down)? {
                None => return Ok(body),
                Some(part) => body.extend_from_slice(&part),
            }
            request.body_bytes = body.len() as u64;
            self.check_pace(session, request)?;
        }
    }

    pub(super) fn too_slow(&self) -> Problem {
        let config = &self.shared.connections;
        Problem::new(
            ErrorCode::TooSlow,
            format!(
                "the body of the request came too slowly: connections.stall_max = {:?} or body_bytes_per_second_min = {} was broken; whatever was asked did not get all of it",
                config.stall_max, config.body_bytes_per_second_min
            ),
        )
    }
}

impl Request {
    /// Nobody waits for the answer any more.
    pub(super) fn is_overdue(&self) -> bool {
        self.deadline
            .is_some_and(|deadline| deadline <= Instant::now())
    }

    /// Whether there would be time left after a pause.
    pub(super) fn has_time_for(&self, pause: Duration) -> bool {
        self.deadline
            .is_none_or(|deadline| deadline::left(deadline) > pause)
    }

    /// What the client is told when its time is over.
    pub(super) fn overdue_problem(&self, nothing_ran: bool) -> Option<Problem> {
        let deadline = self.deadline.filter(|_| self.is_overdue())?;
        Some(deadline::problem(self.begun, deadline, nothing_ran))
    }

    /// Until the deadline, if there is one. Never nothing: as a timeout, that would be none.
    pub(super) fn time_left(&self) -> Option<Duration> {
        let left = self.deadline.map(deadline::left);
        left.map(|left| left.max(Duration::from_millis(1)))
    }

    /// No phase of a try may take longer than what is left.
    pub(super) fn bound_peer(&self, options: &mut PeerOptions) {
        let Some(left) = self.time_left() else {
            return;
        };
        for timeout in [
            &mut options.connection_timeout,
            &mut options.total_connection_timeout,
            &mut options.read_timeout,
            &mut options.write_timeout,
        ] {
            *timeout = Some(timeout.map_or(left, |timeout| timeout.min(left)));
        }
    }

    /// The head of an answer came: the slot is free, and what it took is known, if it says anything of the
    /// target. Refusals and failures come fast when nothing works.
    pub(super) fn answered(&mut self, status: u16) {
        if status < 200 && status != 101 {
            return;
        }
        if status == 101 {
            self.deadline = None;
        }
        if let Some(slot) = self.slot.take()
            && (200..500).contains(&status)
            && self.tries <= 1
        {
            slot.answered(Instant::now());
        }
    }

    /// The answer was waited for in vain, for as long as one may wait.
    pub(super) fn gave_up(&mut self) {
        if let Some(slot) = self.slot.take().filter(|_| !self.is_overdue()) {
            slot.answered(Instant::now());
        }
    }
}

/// What comes of it, unless the client hangs up first. Then it is dropped.
pub(super) async fn while_there<T>(
    session: &mut Session,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    tokio::select! {
        biased;
        done = work => done,
        gone = session.downstream_session.read_body_or_idle(true) => {
            let error = match gone {
                Err(error) => Error::because(ErrorType::ConnectionClosed, "the client", error),
                Ok(_) => Error::explain(ErrorType::ConnectionClosed, "bytes after the body"),
            };
            Err(error.into_down())
        }
    }
}

/// What comes of it before the deadline.
pub(super) async fn by<T>(deadline: Option<Instant>, work: impl Future<Output = T>) -> Option<T> {
    match deadline {
        None => Some(work.await),
        Some(deadline) => tokio::time::timeout_at(deadline, work).await.ok(),
    }
}
