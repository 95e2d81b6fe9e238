//! Connections of clients: accepted, unwrapped, and given to pingora.

pub mod certificates;
mod coalesce;
pub mod crowd;
pub(crate) mod head;
mod preface;
mod prior;

use std::cell::Cell;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use ops::Causes;
use pingora_core::apps::{HttpServerOptions, ServerApp};
use pingora_core::listeners::tls::{Acceptor, TlsSettings};
use pingora_core::protocols::http::v2::server::{H2Options, default_h2_options};
use pingora_core::protocols::l4::stream::Stream;
use pingora_core::protocols::tls::server::handshake;
use pingora_core::protocols::{GetSocketDigest, SocketDigest, Stream as AnyStream};
use pingora_proxy::HttpProxy;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{debug, warn};

use crate::config::ConnectionsConfig;
use crate::metrics::{Cut, Metrics};
use crate::proxy::{Proxy, Shared};
use certificates::Resolver;
use coalesce::Coalesced;
use crowd::Place;
use head::HeadWatch;
pub(crate) use preface::parse as parse_proxy_header;
use preface::{PrefaceError, is_http_2, take_proxy_header};
use prior::PriorKnowledge;

/// Connections that the kernel holds for us between two accepts.
const BACKLOG: i32 = 4096;

/// After an accept failed, most likely for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long a PROXY header and a TLS handshake may take.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);

/// How long a gateway that was relieved by another waits for the next request of an open connection, to answer
/// it and say that it is the last. Closing before that could cross with the request.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// When a gateway stops, the first request of a new connection may be on its way.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// How connections are unwrapped.
#[derive(Clone)]
pub struct Unwrap {
    /// For `tls_listen`.
    pub tls: Option<Arc<Acceptor>>,
    /// HTTP/2 by ALPN, or with prior knowledge.
    pub http_2: bool,
    /// Each connection begins with a PROXY header.
    pub proxy_protocol: bool,
}

/// An acceptor of TLS connections.
pub fn acceptor(resolver: Resolver, http_2: bool) -> Arc<Acceptor> {
    let mut settings =
        TlsSettings::intermediate("", "").expect("files are not read when there is a resolver");
    settings.set_cert_resolver(Arc::new(resolver));
    if http_2 {
        settings.enable_h2();
    }
    Arc::new(settings.build())
}

/// Bounds of HTTP/2 connections. What is a flood in HTTP/2 alone is bounded by the crate `h2`: streams that are
/// reset before they are answered, CONTINUATION frames, and answers to PING and SETTINGS that nobody reads.
pub fn http_2(config: &ConnectionsConfig) -> (Option<H2Options>, Option<HttpServerOptions>) {
    let mut streams = default_h2_options();
    streams.max_header_list_size(config.head_bytes_max);
    streams.max_concurrent_streams(config.streams_max.get());
    let mut connections = HttpServerOptions::default();
    connections.h2_idle_timeout = Some(config.idle_max);
    (Some(streams), Some(connections))
}

/// Sockets on one port, at least one per thread. Those that were taken over are all among them: closing one
/// would reset the connections in its queue.
pub fn listen(
    address: &str,
    threads: usize,
    mut listeners: Vec<std::net::TcpListener>,
) -> io::Result<Vec<std::net::TcpListener>> {
    let mut address = match listeners.first() {
        Some(listener) => listener.local_addr()?,
        None => address
            .to_socket_addrs()?
            .next()
            .ok_or_else(|| io::Error::other("the address resolves to nothing"))?,
    };
    if address.port() != 0 && listeners.is_empty() {
        // SO_REUSEPORT would share the port with a stranger of the same user without a word.
        drop(std::net::TcpListener::bind(address)?);
    }
    while listeners.len() < threads {
        let socket = Socket::new(
            Domain::for_address(address),
            Type::STREAM,
            Some(Protocol::TCP),
        )?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        let listener = std::net::TcpListener::from(socket);
        address = listener.local_addr()?;
        listeners.push(listener);
    }
    Ok(listeners)
}

/// The listeners of one thread, each with whether it is for TLS.
pub struct Doors {
    listeners: Vec<(TcpListener, bool)>,
    /// Where the next look begins, so that none is always last.
    next: Cell<usize>,
}

impl Doors {
    pub fn new(
        plain: Vec<std::net::TcpListener>,
        tls: Vec<std::net::TcpListener>,
    ) -> io::Result<Self> {
        let plain = plain.into_iter().map(|listener| (listener, false));
        let all = plain.chain(tls.into_iter().map(|listener| (listener, true)));
        let all = all.map(|(listener, secure)| Ok((TcpListener::from_std(listener)?, secure)));
        Ok(Self {
            listeners: all.collect::<io::Result<_>>()?,
            next: Cell::new(0),
        })
    }

    /// The next connection, and whether it came in for TLS.
    async fn accept(&self) -> (io::Result<(TcpStream, SocketAddr)>, bool) {
        std::future::poll_fn(|context| {
            let first = self.next.get();
            self.next.set(first.wrapping_add(1));
            let (before, from) = self.listeners.split_at(first % self.listeners.len());
            for (listener, secure) in from.iter().chain(before) {
                if let Poll::Ready(accepted) = listener.poll_accept(context) {
                    return Poll::Ready((accepted, *secure));
                }
            }
            Poll::Pending
        })
        .await
    }
}

/// Serves connections until told to stop. Returns those that are still open.
pub async fn serve(
    doors: Doors,
    proxy: &Arc<HttpProxy<Proxy>>,
    shared: &Arc<Shared>,
    unwrap: &Unwrap,
    mut stop: watch::Receiver<bool>,
) -> JoinSet<()> {
    let told = stop.clone();
    let mut connections = JoinSet::new();
    // One line per bout of failures, not one per try.
    let mut failing = false;
    loop {
        tokio::select! {
            (accepted, secure) = doors.accept() => match accepted {
                Ok((stream, peer)) => {
                    failing = false;
                    let connection = Connection {
                        stream,
                        peer,
                        unwrap: unwrap.clone(),
                        secure,
                        shared: Arc::clone(shared),
                    };
                    connections.spawn(connection.serve(Arc::clone(proxy), told.clone()));
                }
                Err(error) => {
                    if !failing {
                        warn!(error = %Causes(&error), "accept failed; trying on");
                    }
                    failing = true;
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
            _ = stop.wait_for(|stop| *stop) => return connections,
        }
    }
}

/// One connection that was just accepted.
struct Connection {
    stream: TcpStream,
    peer: SocketAddr,
    unwrap: Unwrap,
    secure: bool,
    shared: Arc<Shared>,
}

/// Why a connection ended before its first request.
#[derive(Debug, thiserror::Error)]
enum BeginError {
    #[error(transparent)]
    Preface(#[from] PrefaceError),
    #[error("{0} is not among client.trusted_proxies")]
    Stranger(SocketAddr),
    #[error("{0} has as many connections as it may")]
    Client(IpAddr),
    #[error("it took longer than {HANDSHAKE_MAX:?}")]
    Slow,
    #[error("TLS handshake")]
    Tls(#[source] Box<pingora_core::Error>),
}

impl Connection {
    async fn serve(self, proxy: Arc<HttpProxy<Proxy>>, stop: watch::Receiver<bool>) {
        let shared = Arc::clone(&self.shared);
        let peer = self.peer;
        let _open = OpenConnection::count(&shared.metrics);
        let Some(mut place) = shared.crowd.enter() else {
            shared.metrics.cut(Cut::Crowd).increment(1);
            debug!(%peer, "connection refused: there are connections.open_max already");
            return;
        };
        let begin_max = shared.connections.idle_max;
        let begun = tokio::select! {
            // In a box: the room that a handshake needs goes with it.
            begun = tokio::time::timeout(begin_max, Box::pin(self.begin(&mut place))) => begun,
            // Nothing was asked, and nothing will be.
            () = stopped(stop.clone(), &shared) => return,
        };
        match begun {
            Ok(Ok(stream)) => {
                proxy.process_new(stream, &stop).await;
            }
            Ok(Err(error)) => {
                shared.metrics.connections_refused.increment(1);
                debug!(%peer, error = %Causes(&error), "connection refused");
            }
            Err(_) => {
                shared.metrics.connections_refused.increment(1);
                debug!(%peer, "a connection did not begin in time");
            }
        }
    }

    /// Takes off what is around the requests.
    async fn begin(mut self, place: &mut Place) -> Result<AnyStream, BeginError> {
        if let Err(error) = self.stream.set_nodelay(true) {
            warn!(%error, "TCP_NODELAY");
        }
        let mut client = self.peer;
        if self.unwrap.proxy_protocol {
            if !self.shared.dynamic.load().client.trusts(self.peer.ip()) {
                return Err(BeginError::Stranger(self.peer));
            }
            let header = tokio::time::timeout(HANDSHAKE_MAX, take_proxy_header(&mut self.stream));
            if let Some(named) = header.await.map_err(|_| BeginError::Slow)?? {
                client = named;
            }
        }
        // A proxy has many clients behind it.
        let trusted = self.shared.dynamic.load().client.trusts(client.ip());
        if !trusted && !place.is_for(client.ip()) {
            self.shared.metrics.cut(Cut::Client).increment(1);
            return Err(BeginError::Client(client.ip()));
        }
        let tls = self.unwrap.tls.filter(|_| self.secure);
        let prior = tls.is_none() && self.unwrap.http_2;
        let http_2 = prior && is_http_2(&self.stream).await.map_err(PrefaceError::from)?;
        let digest = SocketDigest::from_raw_fd(self.stream.as_raw_fd());
        // An empty cell takes its first value.
        drop(digest.peer_addr.set(Some(client.into())));
        let mut stream = Stream::from(self.stream);
        stream.set_socket_digest(digest);
        let watch = HeadWatch::new(&self.shared.connections, &self.shared.metrics, client.ip());
        Ok(match tls {
            Some(acceptor) => {
                let secured = tokio::time::timeout(HANDSHAKE_MAX, handshake(&acceptor, stream));
                let secured = secured.await.map_err(|_| BeginError::Slow)?;
                let secured = secured.map_err(BeginError::Tls)?;
                Box::new(Coalesced::new(Box::new(secured), watch))
            }
            None if http_2 => Box::new(PriorKnowledge(stream)),
            None => Box::new(Coalesced::new(Box::new(stream), watch)),
        })
    }
}

async fn stopped(mut stop: watch::Receiver<bool>, shared: &Shared) {
    // The sender lives as long as the gateway.
    drop(stop.wait_for(|stop| *stop).await);
    let last_words = match shared.relieved.load(Ordering::Relaxed) {
        true => PATIENCE,
        false => LAST_WORDS,
    };
    tokio::time::sleep(last_words).await;
}

/// Counts a connection while it is open, however it ends.
struct OpenConnection<'a>(&'a Metrics);

impl<'a> OpenConnection<'a> {
    fn count(metrics: &'a Metrics) -> Self {
        metrics.connections_total.increment(1);
        metrics.connections.increment(1);
        Self(metrics)
    }
}

impl Drop for OpenConnection<'_> {
    fn drop(&mut self) {
        self.0.connections.decrement(1);
    }
}
