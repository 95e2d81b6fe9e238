//! The links of one thread, by worker: made when first needed, and again after they ended.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::HeaderValue;
use metrics::Gauge;
use ops::{Causes, exchange};
use protocol::link::{Hello, LinkFault, Verdict, WELCOME_BYTES, Welcome};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tracing::{debug, warn};

use super::{Link, LinkCount};
use crate::config::RequestsConfig;

/// A worker that speaks no links is asked again after this time: it may have been replaced.
const HTTP1_FOR: Duration = Duration::from_secs(10);

/// What was sent is not acknowledged for so long: the worker's machine is gone, without a word.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(10);

/// How to reach a worker.
pub enum Way {
    Link(Arc<Link>),
    /// It speaks no links, or none of ours.
    Http1,
}

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("the worker does not accept the cluster token of this gateway")]
    Token,
    /// Nothing was sent.
    #[error("the worker cannot be reached")]
    Unreachable,
}

/// The links of one thread.
pub struct Links {
    token: Option<HeaderValue>,
    connect_max: Duration,
    silence_max: Duration,
    count: Gauge,
    peers: Mutex<HashMap<SocketAddr, Arc<Peer>>>,
}

#[derive(Default)]
struct Peer {
    state: Mutex<State>,
    /// Held while a link is made: the others wait for it.
    making: tokio::sync::Mutex<()>,
}

#[derive(Default)]
enum State {
    #[default]
    None,
    Link(Arc<Link>),
    Http1 {
        since: Instant,
    },
    Failed {
        at: Instant,
        token: bool,
    },
}

impl Links {
    /// `count` shows how many are open.
    pub fn new(token: Option<HeaderValue>, requests: &RequestsConfig, count: Gauge) -> Self {
        Self {
            token,
            connect_max: requests.connect_max,
            silence_max: requests.silence_max,
            count,
            peers: Mutex::default(),
        }
    }

    /// The way to this worker; a link is made if there is none.
    pub async fn to(&self, worker: SocketAddr) -> Result<Way, ConnectError> {
        let peer = {
            let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(peers.entry(worker).or_default())
        };
        if let Some(way) = peer.way() {
            return Ok(way);
        }
        let asked = Instant::now();
        let _making = peer.making.lock().await;
        if let Some(way) = peer.way() {
            return Ok(way);
        }
        if let State::Failed { at, token } = *peer.lock()
            && at >= asked
        {
            // Somebody tried while this one waited.
            return Err(error(token));
        }
        let (state, result) = match self.make(worker).await {
            Ok(link) => (State::Link(Arc::clone(&link)), Ok(Way::Link(link))),
            Err(MakeError::Refused(Verdict::Token)) => (failed(true), Err(error(true))),
            Err(MakeError::Connect(source)) => {
                debug!(%worker, error = %Causes(&source), "a worker cannot be reached");
                (failed(false), Err(error(false)))
            }
            Err(why) => {
                let since = Instant::now();
                warn!(%worker, error = %Causes(&why), "a worker makes no link; it gets HTTP/1.1");
                (State::Http1 { since }, Ok(Way::Http1))
            }
        };
        *peer.lock() = state;
        result
    }

    async fn make(&self, worker: SocketAddr) -> Result<Arc<Link>, MakeError> {
        let late = |_| MakeError::Connect(io::ErrorKind::TimedOut.into());
        let mut stream = tokio::time::timeout(self.connect_max, exchange::connect(worker))
            .await
            .map_err(late)?
            .map_err(MakeError::Connect)?;
        let welcomed = tokio::time::timeout(self.connect_max, self.shake_hands(&mut stream));
        let welcome = welcomed.await.map_err(|_| MakeError::Silent)??;
        match welcome.verdict {
            Verdict::Accepted => Ok(Link::start(
                stream,
                welcome.streams_max,
                self.silence_max,
                LinkCount::of(&self.count),
            )),
            refused => Err(MakeError::Refused(refused)),
        }
    }

    async fn shake_hands(&self, stream: &mut TcpStream) -> Result<Welcome, MakeError> {
        let socket = SockRef::from(&*stream);
        socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED_MAX))?;
        let token = self.token.as_ref().map_or(&b""[..], HeaderValue::as_bytes);
        stream.write_all(&Hello::write(token)?).await?;
        let mut welcome = [0; WELCOME_BYTES];
        stream.read_exact(&mut welcome).await?;
        Ok(Welcome::read(&welcome)?)
    }
}

impl Peer {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn way(&self) -> Option<Way> {
        match &*self.lock() {
            State::Link(link) if link.is_open() => Some(Way::Link(Arc::clone(link))),
            State::Http1 { since } if since.elapsed() < HTTP1_FOR => Some(Way::Http1),
            _ => None,
        }
    }
}

fn failed(token: bool) -> State {
    State::Failed {
        at: Instant::now(),
        token,
    }
}

fn error(token: bool) -> ConnectError {
    match token {
        true => ConnectError::Token,
        false => ConnectError::Unreachable,
    }
}

/// Why no link was made.
#[derive(Debug, thiserror::Error)]
enum MakeError {
    #[error("connect")]
    Connect(#[source] io::Error),
    #[error("it said nothing")]
    Silent,
    #[error("shake hands")]
    Handshake(#[from] io::Error),
    #[error(transparent)]
    Fault(#[from] LinkFault),
    #[error("it refused: {0:?}")]
    Refused(Verdict),
}
