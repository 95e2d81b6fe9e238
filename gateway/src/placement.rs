//! The current ring: learned from the nodes, refreshed in the background, corrected by `not_owner`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt, select_ok};
use http::{HeaderValue, Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use ops::Causes;
use ops::exchange::ExchangeError;
use protocol::ring::RingDocument;
use protocol::{ObjectId, Ring, RingVersion, headers};
use tokio::sync::{Notify, watch};
use tracing::{debug, info, warn};

/// Largest ring document: 1,024 nodes of 256 workers with long addresses.
const DOCUMENT_BYTES_MAX: usize = 32 << 20;

/// How long one node may take to show its ring.
const FETCH_MAX: Duration = Duration::from_secs(2);

/// A ring whose workers' addresses are resolved.
pub struct Placed {
    ring: Arc<Ring>,
    addresses: Vec<SocketAddr>,
}

/// A worker that owns an object, by this gateway's ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    pub address: SocketAddr,
    pub shard: protocol::ShardId,
    pub epoch: RingVersion,
}

/// Why an object cannot be routed.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    #[error("no node has told this gateway its ring yet")]
    NoRing,
    #[error(transparent)]
    NoNode(#[from] protocol::ring::NoNodeInColo),
}

/// Shared by all threads; reading it is one atomic load.
pub struct Placement {
    current: ArcSwapOption<Placed>,
    /// A task keeps the ring current; without one there is nobody to ask for a newer ring.
    kept: AtomicBool,
    /// Asks that task to look now.
    wanted: Notify,
    /// Counts the looks that have ended.
    looks: watch::Sender<u64>,
}

impl Default for Placement {
    fn default() -> Self {
        Self {
            current: ArcSwapOption::empty(),
            kept: AtomicBool::new(false),
            wanted: Notify::new(),
            looks: watch::Sender::new(0),
        }
    }
}

impl Placement {
    pub fn owner(&self, object: ObjectId) -> Result<Owner, RouteError> {
        let placed = self.current.load();
        let placed = placed.as_ref().ok_or(RouteError::NoRing)?;
        let shard = placed.ring.shard_of(object);
        let worker = placed.ring.owner(object.home(), shard)?;
        Ok(Owner {
            address: placed.addresses[worker.number],
            shard,
            epoch: placed.ring.version(),
        })
    }

    pub fn version(&self) -> Option<RingVersion> {
        Some(self.current.load().as_ref()?.ring.version())
    }

    pub fn ring(&self) -> Option<Arc<Ring>> {
        Some(Arc::clone(&self.current.load().as_ref()?.ring))
    }

    pub fn document(&self) -> Option<RingDocument> {
        Some(self.current.load().as_ref()?.ring.document().clone())
    }

    /// Something points to a newer ring: looks for it, and returns when that is done, or after a bound.
    pub async fn refresh(&self) {
        if !self.kept.load(Ordering::Relaxed) {
            tokio::task::yield_now().await;
            return;
        }
        let mut looks = self.looks.subscribe();
        self.wanted.notify_one();
        // The sender lives in `self`; only the time can run out.
        drop(tokio::time::timeout(FETCH_MAX, looks.changed()).await);
    }

    /// Keeps the ring current for ever: every `period`, and whenever a refresh is wanted.
    pub async fn keep(self: Arc<Self>, source: RingSource, period: Duration) {
        self.kept.store(true, Ordering::Relaxed);
        loop {
            self.look(&source).await;
            self.looks.send_modify(|looks| *looks += 1);
            let known = self.current.load().is_some();
            // Until there is a ring, clients wait for it.
            let pause = if known {
                period
            } else {
                period.min(UNKNOWN_PAUSE)
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.wanted.notified() => {}
            }
        }
    }

    async fn look(&self, source: &RingSource) {
        let mut addresses: Vec<String> = source.nodes.clone();
        if let Some(document) = self.document() {
            // One worker of each node is enough: nodes have one configuration.
            addresses.extend(
                document
                    .nodes
                    .iter()
                    .filter_map(|node| node.workers.first().cloned()),
            );
        }
        addresses.sort();
        addresses.dedup();
        let fetches: Vec<BoxFuture<'_, Result<RingDocument, FetchError>>> = addresses
            .iter()
            .map(|address| fetch(address, source.token.as_ref()).boxed())
            .collect();
        match newest(fetches, self.version()).await {
            Ok(document) => self.install(document).await,
            Err(error) => debug!(error = %Causes(&error), "no node showed its ring"),
        }
    }

    /// Takes a ring unless it is older than the one known. Equal versions: what a node says now.
    pub async fn install(&self, document: RingDocument) {
        if let Some(current) = self.current.load().as_ref()
            && (document == *current.ring.document() || document.version < current.ring.version())
        {
            return;
        }
        match place(document).await {
            Ok(placed) => {
                info!(version = %placed.ring.version(), workers = placed.addresses.len(), "ring installed");
                self.current.store(Some(Arc::new(placed)));
            }
            Err(error) => warn!(error = %Causes(&error), "ring refused"),
        }
    }
}

const UNKNOWN_PAUSE: Duration = Duration::from_millis(50);

/// Whom to ask for the ring, and with which token.
pub struct RingSource {
    pub nodes: Vec<String>,
    pub token: Option<HeaderValue>,
}

/// The first answer, unless it is older than what is known and another node says more.
async fn newest(
    mut fetches: Vec<BoxFuture<'_, Result<RingDocument, FetchError>>>,
    known: Option<RingVersion>,
) -> Result<RingDocument, FetchError> {
    let mut best: Option<RingDocument> = None;
    loop {
        if fetches.is_empty() {
            return best.ok_or(FetchError::NoNodes);
        }
        match select_ok(fetches).await {
            Ok((document, rest)) => {
                let newer = known.is_none_or(|known| document.version > known);
                if best
                    .as_ref()
                    .is_none_or(|best| document.version > best.version)
                {
                    best = Some(document);
                }
                if newer {
                    return best.ok_or(FetchError::NoNodes);
                }
                fetches = rest;
            }
            Err(error) => return best.ok_or(error),
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error("no nodes are configured")]
    NoNodes,
    #[error("{address} took longer than {FETCH_MAX:?}")]
    TimedOut { address: String },
    #[error(transparent)]
    Exchange(#[from] ExchangeError),
    #[error("read the answer of {address}")]
    Body {
        address: String,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{address} answered {status}")]
    Status { address: String, status: StatusCode },
    #[error("{address} sent no ring")]
    Document {
        address: String,
        source: serde_json::Error,
    },
}

async fn fetch(address: &str, token: Option<&HeaderValue>) -> Result<RingDocument, FetchError> {
    tokio::time::timeout(FETCH_MAX, exchange(address, token))
        .await
        .unwrap_or_else(|_| {
            Err(FetchError::TimedOut {
                address: address.to_owned(),
            })
        })
}

async fn exchange(address: &str, token: Option<&HeaderValue>) -> Result<RingDocument, FetchError> {
    let request = Request::get(headers::RING_PATH)
        .body(Empty::<Bytes>::new())
        .expect("the path is a legal one");
    let response = ops::exchange::send(address, token, request).await?;
    let status = response.status();
    if status != StatusCode::OK {
        return Err(FetchError::Status {
            address: address.to_owned(),
            status,
        });
    }
    let body = Limited::new(response.into_body(), DOCUMENT_BYTES_MAX)
        .collect()
        .await;
    let body = body.map_err(|source| FetchError::Body {
        address: address.to_owned(),
        source,
    })?;
    serde_json::from_slice(&body.to_bytes()).map_err(|source| FetchError::Document {
        address: address.to_owned(),
        source,
    })
}

/// Why a document cannot be used.
#[derive(Debug, thiserror::Error)]
enum PlaceError {
    #[error(transparent)]
    Ring(#[from] protocol::ring::RingError),
    #[error("resolve {address}")]
    Resolve {
        address: String,
        source: std::io::Error,
    },
    #[error("{address} resolves to nothing")]
    NoAddress { address: String },
}

async fn place(document: RingDocument) -> Result<Placed, PlaceError> {
    let ring = Ring::new(document)?;
    let mut addresses = Vec::with_capacity(ring.workers().len());
    for worker in ring.workers() {
        let resolved = tokio::net::lookup_host(&worker.address)
            .await
            .map_err(|source| PlaceError::Resolve {
                address: worker.address.clone(),
                source,
            })?
            .next();
        addresses.push(resolved.ok_or_else(|| PlaceError::NoAddress {
            address: worker.address.clone(),
        })?);
    }
    let ring = Arc::new(ring);
    Ok(Placed { ring, addresses })
}
