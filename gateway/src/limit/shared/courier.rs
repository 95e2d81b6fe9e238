//! Tasks that carry questions to limiter objects: one per object, with one connection and one call under way.
//! Whatever was asked meanwhile is in the next call.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::HOST;
use http::{HeaderValue, Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use ops::{Causes, exchange};
use protocol::limiter::{self, ASKS_MAX, Ask, Grant, SLICES};
use protocol::rate::Terms;
use protocol::{Home, ObjectId, ObjectName, headers};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::{Link, Scope};
use crate::placement::{Owner, RouteError};

/// Questions that wait for one object. More are not asked.
const WAITING_MAX: usize = 1024;

/// How long an object may take to answer. Requests wait as long.
const ANSWER_MAX: Duration = Duration::from_millis(500);

/// After an object could not be asked, the next ones are told so at once for this time.
const DOWN_FOR: Duration = Duration::from_secs(1);

/// Grants for `ASKS_MAX` asks are shorter.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// The ways to all objects of a limit.
pub(super) struct Couriers(Vec<mpsc::Sender<Question>>);

/// Whoever asked gets the answer, or sees the sender dropped.
struct Question {
    ask: Ask,
    answer: oneshot::Sender<Grant>,
}

impl Couriers {
    /// The tasks end when this is dropped.
    pub(super) fn start(place: &str, limit: &str, terms: Terms, scope: Scope, link: &Link) -> Self {
        let terms = Arc::new(terms);
        let start = |slice| {
            let (sender, questions) = mpsc::channel(WAITING_MAX);
            let mut homes = Vec::with_capacity(2);
            if scope == Scope::Colo {
                homes.push(Home::Colo(link.colo));
            }
            // Also for a colo that has no nodes: the object's name has the colo in it.
            homes.push(Home::Global);
            let object = |home| limiter::object(place, limit, slice, home);
            let courier = Courier {
                objects: homes.into_iter().map(object).collect(),
                limit: limit.to_owned(),
                terms: Arc::clone(&terms),
                link: link.clone(),
                connection: None,
                down_until: None,
            };
            link.runtime.spawn(courier.run(questions));
            sender
        };
        Self((0..SLICES).map(start).collect())
    }

    /// `None` if the object cannot be asked. Returns within about a second.
    pub(super) async fn ask(&self, ask: Ask) -> Option<Grant> {
        let (answer, answered) = oneshot::channel();
        let courier = self.0.get(usize::from(limiter::slice(ask.key)))?;
        courier.try_send(Question { ask, answer }).ok()?;
        answered.await.ok()
    }
}

/// The way to one object.
struct Courier {
    /// In the order of preference: the first whose home has a node.
    objects: Vec<(ObjectId, ObjectName)>,
    limit: String,
    terms: Arc<Terms>,
    link: Link,
    connection: Option<Connection>,
    down_until: Option<Instant>,
}

struct Connection {
    address: SocketAddr,
    sender: SendRequest<Full<Bytes>>,
}

/// Why an object was not asked.
#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error(transparent)]
    Route(#[from] RouteError),
    #[error("connect to {address}")]
    Connect {
        address: SocketAddr,
        source: std::io::Error,
    },
    #[error("ask {address}")]
    Exchange {
        address: SocketAddr,
        source: hyper::Error,
    },
    #[error("read the answer of {address}")]
    Body {
        address: SocketAddr,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{address} answered {status}: {detail}")]
    Status {
        address: SocketAddr,
        status: StatusCode,
        detail: String,
    },
    #[error("{address} sent no grants")]
    Grants {
        address: SocketAddr,
        source: serde_json::Error,
    },
    #[error("no answer within {ANSWER_MAX:?}")]
    TimedOut,
}

impl AskError {
    /// The same call may do better at once: another owner, or a connection that had been closed.
    fn may_be_stale(&self) -> bool {
        match self {
            Self::Status { status, .. } => *status == StatusCode::MISDIRECTED_REQUEST,
            Self::Exchange { .. } => true,
            Self::Route(_)
            | Self::Connect { .. }
            | Self::Body { .. }
            | Self::Grants { .. }
            | Self::TimedOut => false,
        }
    }
}

impl Courier {
    async fn run(mut self, mut questions: mpsc::Receiver<Question>) {
        let mut batch = Vec::new();
        while questions.recv_many(&mut batch, ASKS_MAX).await > 0 {
            if self.down_until.is_some_and(|until| Instant::now() < until) {
                batch.clear();
                continue;
            }
            let asks: Vec<Ask> = batch.iter().map(|question| question.ask).collect();
            let asked = tokio::time::timeout(ANSWER_MAX, self.ask(&asks)).await;
            match asked.unwrap_or(Err(AskError::TimedOut)) {
                Ok(grants) => {
                    if self.down_until.take().is_some() {
                        info!(limit = self.limit, "limiter reached again");
                    }
                    for (question, grant) in batch.drain(..).zip(grants) {
                        if question.answer.send(grant).is_err() {
                            debug!("a client hung up; what was taken for it is taken");
                        }
                    }
                }
                Err(error) => {
                    self.connection = None;
                    if self.down_until.is_none() {
                        warn!(limit = self.limit, error = %Causes(&error), "limiter unreachable");
                    }
                    self.down_until = Some(Instant::now() + DOWN_FOR);
                }
            }
            // Whoever has no answer sees that there is none.
            batch.clear();
        }
    }

    async fn ask(&mut self, asks: &[Ask]) -> Result<Vec<Grant>, AskError> {
        match self.try_ask(asks).await {
            Err(error) if error.may_be_stale() => {
                debug!(error = %Causes(&error), "asking a limiter again");
                self.connection = None;
                if matches!(error, AskError::Status { .. }) {
                    self.link.placement.refresh().await;
                }
                // If the first call was carried out, too much is taken, which is safe.
                self.try_ask(asks).await
            }
            asked => asked,
        }
    }

    async fn try_ask(&mut self, asks: &[Ask]) -> Result<Vec<Grant>, AskError> {
        let (owner, request) = self.request(asks)?;
        let address = owner.address;
        let exchange = |source| AskError::Exchange { address, source };
        let connection = self.connect(address).await?;
        connection.sender.ready().await.map_err(exchange)?;
        let answer = connection.sender.send_request(request).await;
        let answer = answer.map_err(exchange)?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect();
        let body = body
            .await
            .map_err(|source| AskError::Body { address, source })?
            .to_bytes();
        if status != StatusCode::OK {
            return Err(AskError::Status {
                address,
                status,
                detail: String::from_utf8_lossy(&body).into_owned(),
            });
        }
        serde_json::from_slice(&body).map_err(|source| AskError::Grants { address, source })
    }

    fn request(&self, asks: &[Ask]) -> Result<(Owner, Request<Full<Bytes>>), AskError> {
        let mut found = Err(RouteError::NoRing);
        let mut object = None;
        for candidate in &self.objects {
            found = self.link.placement.owner(candidate.0);
            object = Some(candidate);
            if found.is_ok() {
                break;
            }
        }
        let owner = found?;
        let (id, name) = object.ok_or(RouteError::NoRing)?;
        let body = serde_json::to_vec(&(&*self.terms, asks))
            .expect("numbers and strings always serialize");
        let mut request = Request::post("/")
            .header(HOST, owner.address.to_string())
            .header(headers::CLASS, limiter::CLASS)
            .header(headers::OBJECT, id.to_string())
            .header(headers::NAME, &*headers::encode_name(name))
            .header(headers::SHARD, HeaderValue::from(owner.shard.0))
            .header(headers::EPOCH, HeaderValue::from(owner.epoch.0.get()))
            .header(headers::COLO, self.link.colo.as_str())
            .header(headers::METHOD, limiter::TAKE)
            .header(headers::INTERNAL, "1")
            .body(Full::new(Bytes::from(body)))
            .expect("every header is a legal one");
        if let Some(token) = &self.link.token {
            request.headers_mut().insert(headers::TOKEN, token.clone());
        }
        Ok((owner, request))
    }

    async fn connect(&mut self, address: SocketAddr) -> Result<&mut Connection, AskError> {
        let usable = self
            .connection
            .take()
            .filter(|known| known.address == address && !known.sender.is_closed());
        let connection = match usable {
            Some(known) => known,
            None => {
                let stream = exchange::connect(address)
                    .await
                    .map_err(|source| AskError::Connect { address, source })?;
                let (sender, driver) = http1::handshake(TokioIo::new(stream))
                    .await
                    .map_err(|source| AskError::Exchange { address, source })?;
                // Ends when the sender is dropped.
                tokio::spawn(async move {
                    if let Err(error) = driver.await {
                        debug!(error = %Causes(&error), "a connection to a limiter ended");
                    }
                });
                Connection { address, sender }
            }
        };
        Ok(self.connection.insert(connection))
    }
}
