//! Connections to servers that one thread keeps open between requests.
//!
//! pingora gives each idle connection a task that watches it, which for short requests is a good part of what they
//! cost. Here nobody watches: news of a connection waits in the reactor, and is looked at when the connection is
//! wanted, and every second. Looking at a connection without news makes no system call.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use foldhash::HashMap;
use pingora_core::protocols::l4::stream::Stream;
use pingora_core::{Error, ErrorType, Result};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Instant;

/// Between two looks at all idle connections.
const KEEP_EVERY: Duration = Duration::from_secs(1);

/// A connection to a server, plain HTTP/1.1, with no request on it.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) stream: Stream,
    /// It served a request before: the server may close it at any moment.
    pub(crate) is_reused: bool,
    idle_since: Instant,
    idle_max: Duration,
}

/// Idle connections of one thread, by server.
#[derive(Debug)]
pub struct Connections {
    idle: Mutex<Idle>,
    /// Connections that may be idle.
    max: usize,
}

#[derive(Debug, Default)]
struct Idle {
    /// Of each server, the one that was used last at the back.
    by_server: HashMap<SocketAddr, VecDeque<Connection>>,
    count: usize,
}

impl Connections {
    /// Keeps at most `max` idle connections; what was used longest ago goes first.
    pub fn new(max: usize) -> Self {
        Self {
            idle: Mutex::default(),
            max,
        }
    }

    /// A connection to a server: an idle one that is still open, or else a new one.
    ///
    /// # Errors
    /// Of pingora's types for connecting, from upstream; `ConnectTimedout` after `connect_max`.
    pub(crate) async fn get(
        &self,
        server: SocketAddr,
        connect_max: Duration,
    ) -> Result<Connection> {
        if let Some(connection) = self.take(server) {
            return Ok(connection);
        }
        let connecting = tokio::time::timeout(connect_max, TcpStream::connect(server));
        let connected = connecting.await.map_err(|_| {
            let waited = format!("{server} after {connect_max:?}");
            Error::explain(ErrorType::ConnectTimedout, waited).into_up()
        })?;
        let stream = connected.and_then(|stream| stream.set_nodelay(true).map(|()| stream));
        let stream = stream.map_err(|error| {
            let kind = match error.kind() {
                io::ErrorKind::ConnectionRefused => ErrorType::ConnectRefused,
                io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
                    ErrorType::ConnectNoRoute
                }
                io::ErrorKind::TimedOut => ErrorType::ConnectTimedout,
                _ => ErrorType::ConnectError,
            };
            Error::because(kind, server.to_string(), error).into_up()
        })?;
        Ok(Connection::new(Stream::from(stream), false))
    }

    fn take(&self, server: SocketAddr) -> Option<Connection> {
        let mut idle = self.idle();
        let idle = &mut *idle;
        let kept = idle.by_server.get_mut(&server)?;
        while let Some(mut connection) = kept.pop_back() {
            idle.count -= 1;
            if connection.is_usable(Instant::now()) {
                return Some(connection);
            }
        }
        None
    }

    /// Keeps a connection for the next request, for at most `idle_max`.
    pub(crate) fn put(&self, server: SocketAddr, stream: Stream, idle_max: Duration) {
        let mut connection = Connection::new(stream, true);
        connection.idle_max = idle_max;
        let mut idle = self.idle();
        if idle.count >= self.max && !idle.drop_oldest() {
            return;
        }
        idle.count += 1;
        idle.by_server
            .entry(server)
            .or_default()
            .push_back(connection);
    }

    /// Drops connections that were closed or idle for too long, until `self` is gone.
    pub fn keep(self: &Arc<Self>) -> impl Future<Output = ()> + use<> {
        let all: Weak<Self> = Arc::downgrade(self);
        async move {
            loop {
                tokio::time::sleep(KEEP_EVERY).await;
                match all.upgrade() {
                    Some(all) => all.idle().drop_unusable(),
                    None => return,
                }
            }
        }
    }

    fn idle(&self) -> MutexGuard<'_, Idle> {
        // Nothing that could panic happens to it half-way.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connection {
    fn new(stream: Stream, is_reused: bool) -> Self {
        Self {
            stream,
            is_reused,
            idle_since: Instant::now(),
            idle_max: Duration::MAX,
        }
    }

    /// Whether it is open, without a byte that nobody asked for, and was not idle for too long.
    fn is_usable(&mut self, now: Instant) -> bool {
        let mut byte = [0];
        let mut byte = ReadBuf::new(&mut byte);
        let mut nobody = Context::from_waker(Waker::noop());
        let read = Pin::new(&mut self.stream).poll_read(&mut nobody, &mut byte);
        matches!(read, Poll::Pending) && now - self.idle_since < self.idle_max
    }
}

impl Idle {
    /// False if there is none.
    fn drop_oldest(&mut self) -> bool {
        let lists = self.by_server.values_mut();
        let oldest = lists
            .filter(|kept| !kept.is_empty())
            .min_by_key(|kept| kept[0].idle_since);
        let dropped = oldest.and_then(VecDeque::pop_front);
        self.count -= usize::from(dropped.is_some());
        dropped.is_some()
    }

    fn drop_unusable(&mut self) {
        let now = Instant::now();
        self.by_server.retain(|_, kept| {
            kept.retain_mut(|connection| connection.is_usable(now));
            !kept.is_empty()
        });
        self.count = self.by_server.values().map(VecDeque::len).sum();
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    async fn listener() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    #[tokio::test]
    async fn a_connection_is_used_again_until_its_server_closes_it() {
        let (listener, server) = listener().await;
        let connections = Connections::new(10);
        let first = connections.get(server, LONG).await.unwrap();
        assert!(!first.is_reused);
        let (mut other_end, _) = listener.accept().await.unwrap();
        connections.put(server, first.stream, LONG);
        let again = connections.get(server, LONG).await.unwrap();
        assert!(again.is_reused);
        connections.put(server, again.stream, LONG);
        other_end.write_all(b"HTTP/1.1 408").await.unwrap();
        // The news comes when the reactor has looked.
        while connections.idle().count > 0 {
            connections.idle().drop_unusable();
            tokio::task::yield_now().await;
        }
        assert!(!connections.get(server, LONG).await.unwrap().is_reused);
    }

    #[tokio::test]
    async fn those_idle_longest_make_room_and_time_ends_all() {
        let (_listener, server) = listener().await;
        let connections = Connections::new(2);
        let mut ports = Vec::new();
        for _ in 0..3 {
            let stream = TcpStream::connect(server).await.unwrap();
            ports.push(stream.local_addr().unwrap().port());
            connections.put(server, Stream::from(stream), LONG);
        }
        let kept = connections.take(server).unwrap();
        assert!(connections.take(server).is_some());
        assert!(connections.take(server).is_none(), "the first made room");
        connections.put(server, kept.stream, Duration::ZERO);
        assert!(connections.take(server).is_none(), "its time was over");
        assert_eq!(connections.idle().count, 0);
    }

    #[tokio::test]
    async fn nobody_there_is_a_refusal() {
        let (listener, server) = listener().await;
        drop(listener);
        let error = Connections::new(1).get(server, LONG).await.unwrap_err();
        assert_eq!(*error.etype(), ErrorType::ConnectRefused);
    }
}
