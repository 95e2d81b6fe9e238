//! The head of an HTTP/1.1 request while it arrives: how long it may take, and how large it may be.
//!
//! pingora bounds the silence between two bytes, not the whole: a byte now and then would keep a connection,
//! and up to a megabyte of buffer, for ever. So the connection itself looks, and answers what is too
//! slow or too large; pingora sees it end. A head that comes at once, as nearly all do, costs nothing but
//! counting.

use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use metrics::Counter;
use pingora_core::protocols::raw_connect::ProxyDigest;
use pingora_http::ResponseHeader;
use pingora_proxy::Session;
use protocol::{ErrorCode, Problem, headers, problem};
use tokio::time::Sleep;

use crate::config::ConnectionsConfig;
use crate::metrics::{Cut, Metrics};

/// What a connection and the requests on it know of each other.
#[derive(Debug)]
pub(crate) struct Carrier {
    /// Counts beginnings and ends of requests, as the proxy says: odd is within one.
    phase: AtomicU64,
    /// The address of its other end, without the port, as apps are told.
    client: Box<str>,
}

impl Carrier {
    /// Of the connection that a session is on, unless that is HTTP/2.
    pub(crate) fn of(session: &Session) -> Option<&Self> {
        let digest = session.digest()?.proxy_digest.as_ref()?;
        let carrier = digest.user_data.as_ref()?.downcast_ref::<Arc<Self>>()?;
        Some(carrier)
    }

    /// Tells the connection whether a request is on it.
    pub(crate) fn set_phase(&self, in_request: bool) {
        let count = self.phase.load(Ordering::Relaxed);
        let changes = (count % 2 == 1) != in_request;
        self.phase
            .store(count + u64::from(changes), Ordering::Relaxed);
    }

    pub(crate) fn client(&self) -> &str {
        &self.client
    }
}

/// Watches over the heads of one connection.
#[derive(Debug)]
pub(super) struct HeadWatch {
    carrier: Arc<Carrier>,
    /// How requests find `carrier`.
    pub(super) digest: Arc<ProxyDigest>,
    bytes_max: usize,
    time_max: Duration,
    slow: Counter,
    large: Counter,
    /// The count of the carrier when something was read last.
    seen: u64,
    /// Of the head that arrives.
    bytes: usize,
    /// Only once it did not come at once.
    timer: Option<Pin<Box<Sleep>>>,
}

impl HeadWatch {
    pub(super) fn new(config: &ConnectionsConfig, metrics: &Metrics, client: IpAddr) -> Self {
        let carrier = Arc::new(Carrier {
            phase: AtomicU64::new(0),
            client: client.to_string().into(),
        });
        let digest = ProxyDigest::new(
            Box::new(ResponseHeader::build(200, Some(0)).expect("200 is a status")),
            Some(Box::new(Arc::clone(&carrier))),
        );
        Self {
            carrier,
            digest: Arc::new(digest),
            bytes_max: config.head_bytes_max as usize,
            time_max: config.head_max,
            slow: metrics.cut(Cut::HeadSlow).clone(),
            large: metrics.cut(Cut::HeadLarge).clone(),
            seen: 0,
            bytes: 0,
            timer: None,
        }
    }

    /// Before more is read of a head: the answer, if it is too large already. What was read last may have been
    /// more than the rest of it, but then nothing more would be read of it.
    pub(super) fn before_read(&mut self) -> Option<Vec<u8>> {
        let count = self.carrier.phase.load(Ordering::Relaxed);
        if count != self.seen {
            // Though nothing may have been read within a request that was refused at once.
            self.seen = count;
            self.bytes = 0;
            self.timer = None;
        }
        (!self.in_request() && self.bytes > self.bytes_max).then(|| {
            self.large.increment(1);
            answer(&Problem::new(
                ErrorCode::HeadersTooLarge,
                format!(
                    "the head of the request is larger than connections.head_bytes_max = {}",
                    self.bytes_max
                ),
            ))
        })
    }

    fn in_request(&self) -> bool {
        self.seen % 2 == 1
    }

    /// So many bytes came.
    pub(super) fn took(&mut self, bytes: usize) {
        self.bytes += bytes;
    }

    /// Nothing is there to read: the answer, if the head has taken too long.
    pub(super) fn nothing_came(&mut self, cx: &mut Context<'_>) -> Option<Vec<u8>> {
        if self.bytes == 0 || self.in_request() {
            return None;
        }
        let time_max = self.time_max;
        let timer = self
            .timer
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(time_max)));
        match timer.as_mut().poll(cx) {
            Poll::Pending => None,
            Poll::Ready(()) => {
                self.slow.increment(1);
                Some(answer(&Problem::new(
                    ErrorCode::TooSlow,
                    format!(
                        "the head of the request took longer than connections.head_max = {time_max:?}"
                    ),
                )))
            }
        }
    }
}

/// An answer to a request that was never read to its end.
fn answer(problem: &Problem) -> Vec<u8> {
    let body = problem.to_json(None);
    let status = problem.code.status();
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: {}\r\ncontent-length: {}\r\n{}: {}\r\nconnection: close\r\n\r\n",
        problem::MEDIA_TYPE,
        body.len(),
        headers::ERROR,
        problem.code,
    );
    [head.into_bytes(), body].concat()
}
