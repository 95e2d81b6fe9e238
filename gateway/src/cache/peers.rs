//! What other gateways purge counts here too: each is asked again and again what it purged since.

use std::time::Duration;

use bytes::Bytes;
use http::header::AUTHORIZATION;
use http::{HeaderValue, Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use ops::Causes;
use ops::exchange::ExchangeError;
use tracing::{debug, info, warn};

use super::{Cache, Purges, Tag};
use crate::metrics::CacheMetrics;

/// How long one exchange may take.
const EXCHANGE_MAX: Duration = Duration::from_secs(2);

/// Of one answer: all purges that a gateway remembers, and some more.
const ANSWER_BYTES_MAX: usize = 4 << 20;

/// Where gateways tell their purges, on the admin listener.
pub const PATH: &str = "/cache/purges";

/// Another gateway, and what is known of it.
pub struct Peer {
    pub address: String,
    /// The bearer token of its admin listener.
    pub token: Option<HeaderValue>,
    heard: Option<(String, u64)>,
    is_silent: bool,
}

#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error("it took longer than {EXCHANGE_MAX:?}")]
    Slow,
    #[error(transparent)]
    Exchange(#[from] ExchangeError),
    #[error("the request cannot be made")]
    Request(#[from] http::Error),
    #[error("it answered {0}; have all gateways one admin_token?")]
    Status(StatusCode),
    #[error("read its answer")]
    Body(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("it tells no purges")]
    Purges(#[from] serde_json::Error),
}

impl Peer {
    pub fn new(address: String, token: Option<HeaderValue>) -> Self {
        Self {
            address,
            token,
            heard: None,
            is_silent: false,
        }
    }

    /// Asks for ever.
    pub async fn follow(mut self, cache: &'static Cache, every: Duration, metrics: CacheMetrics) {
        let mut next = tokio::time::interval(every);
        next.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            next.tick().await;
            let asked = tokio::time::timeout(EXCHANGE_MAX, self.ask()).await;
            match asked.unwrap_or(Err(AskError::Slow)) {
                Ok(purges) => {
                    self.take(cache, purges);
                    metrics.peer_looks.increment(1);
                    if std::mem::take(&mut self.is_silent) {
                        metrics.peers_silent.decrement(1);
                        info!(peer = self.address, "a peer tells its purges again");
                    }
                }
                Err(error) if !self.is_silent => {
                    self.is_silent = true;
                    metrics.peers_silent.increment(1);
                    warn!(
                        peer = self.address,
                        error = %Causes(&error),
                        "a peer does not tell its purges; until it does, answers are as old as they may be"
                    );
                }
                Err(error) => debug!(peer = self.address, error = %Causes(&error), "still silent"),
            }
        }
    }

    async fn ask(&self) -> Result<Purges, AskError> {
        let (boot, count) = self
            .heard
            .as_ref()
            .map_or(("", 0), |(b, c)| (b.as_str(), *c));
        let mut request = Request::get(format!("{PATH}?boot={boot}&count={count}"));
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, token);
        }
        let request = request.body(Empty::<Bytes>::new())?;
        let answer = ops::exchange::send(&self.address, None, request).await?;
        let status = answer.status();
        if status != StatusCode::OK {
            return Err(AskError::Status(status));
        }
        let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX);
        let body = body.collect().await.map_err(AskError::Body)?;
        Ok(serde_json::from_slice(&body.to_bytes())?)
    }

    /// What it purged is purged here. If it cannot be known, everything is.
    fn take(&mut self, cache: &Cache, purges: Purges) {
        if !cache.is(&purges.boot) {
            match &purges.tags {
                Some(tags) if tags.is_empty() => {}
                Some(tags) => drop(cache.purge_for_another(tags)),
                None => {
                    let dropped = cache.purge_for_another(&[Tag::EVERYTHING]);
                    debug!(peer = self.address, dropped, "a peer's purges begin anew");
                }
            }
        }
        self.heard = Some((purges.boot, purges.count));
    }
}
