//! A client's connection on which what is written before a flush leaves in one piece.
//!
//! pingora writes the head of a response, then its body, and flushes when it has no more for now. Each
//! write would be a system call and a packet, or a TLS record; one of them is a tenth of the cost of a proxied
//! request.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use async_trait::async_trait;
use pingora_core::protocols::raw_connect::ProxyDigest;
use pingora_core::protocols::tls::SslDigest;
use pingora_core::protocols::{
    ALPN, GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl,
    Stream, TimingDigest, UniqueID, UniqueIDType,
};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};

use super::head::HeadWatch;

/// Bytes that wait for a flush at most; what does not fit beside them goes out at once.
const GATHERED_BYTES_MAX: usize = 8 << 10;

/// Memory that an idle connection may keep.
const KEPT_BYTES_MAX: usize = 1 << 10;

/// A connection, and what was written since the last flush.
#[derive(Debug)]
pub(super) struct Coalesced {
    inner: Stream,
    gathered: Vec<u8>,
    /// Of `gathered`, what has left.
    sent: usize,
    /// None with HTTP/2, whose heads are its own.
    watch: Option<HeadWatch>,
}

impl Coalesced {
    pub(super) fn new(inner: Stream, watch: HeadWatch) -> Self {
        let http_1 = !matches!(inner.selected_alpn_proto(), Some(ALPN::H2));
        Self {
            watch: http_1.then_some(watch),
            inner,
            gathered: Vec::new(),
            sent: 0,
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.gathered.len() {
            let rest = &self.gathered[self.sent..];
            match ready!(Pin::new(&mut self.inner).poll_write(cx, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                sent => self.sent += sent,
            }
        }
        self.sent = 0;
        self.gathered.clear();
        self.gathered.shrink_to(KEPT_BYTES_MAX);
        Poll::Ready(Ok(()))
    }
}

impl Drop for Coalesced {
    /// pingora drops a connection whose answer broke off without a flush: what was written still leaves, as far as
    /// the kernel takes it at once.
    fn drop(&mut self) {
        if self.sent < self.gathered.len() {
            drop(self.poll_send(&mut Context::from_waker(Waker::noop())));
        }
    }
}

impl AsyncRead for Coalesced {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let Some(watch) = &mut this.watch else {
            return Pin::new(&mut this.inner).poll_read(cx, buffer);
        };
        let mut answer = watch.before_read();
        if answer.is_none() {
            let before = buffer.filled().len();
            let polled = Pin::new(&mut this.inner).poll_read(cx, buffer);
            watch.took(buffer.filled().len() - before);
            answer = polled
                .is_pending()
                .then(|| watch.nothing_came(cx))
                .flatten();
            if answer.is_none() {
                return polled;
            }
        }
        // The answer leaves when pingora closes what it takes for ended.
        this.gathered.extend(answer.into_iter().flatten());
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Coalesced {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.gathered.len() + bytes.len() > GATHERED_BYTES_MAX {
            ready!(self.poll_send(cx))?;
            if bytes.len() > GATHERED_BYTES_MAX {
                return Pin::new(&mut self.inner).poll_write(cx, bytes);
            }
        }
        self.gathered.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx))?;
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx))?;
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[async_trait]
impl Shutdown for Coalesced {
    async fn shutdown(&mut self) {
        // It closes whether or not the last bytes arrive.
        drop(self.flush().await);
        Shutdown::shutdown(self.inner.as_mut()).await;
    }
}

#[async_trait]
impl Peek for Coalesced {
    async fn try_peek(&mut self, buffer: &mut [u8]) -> io::Result<bool> {
        self.inner.try_peek(buffer).await
    }
}

impl UniqueID for Coalesced {
    fn id(&self) -> UniqueIDType {
        self.inner.id()
    }
}

impl Ssl for Coalesced {
    fn get_ssl_digest(&self) -> Option<Arc<SslDigest>> {
        self.inner.get_ssl_digest()
    }

    fn selected_alpn_proto(&self) -> Option<ALPN> {
        self.inner.selected_alpn_proto()
    }
}

impl GetTimingDigest for Coalesced {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        self.inner.get_timing_digest()
    }

    fn get_read_pending_time(&self) -> std::time::Duration {
        self.inner.get_read_pending_time()
    }

    fn get_write_pending_time(&self) -> std::time::Duration {
        self.inner.get_write_pending_time()
    }
}

impl GetProxyDigest for Coalesced {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        match &self.watch {
            Some(watch) => Some(Arc::clone(&watch.digest)),
            None => self.inner.get_proxy_digest(),
        }
    }
}

impl GetSocketDigest for Coalesced {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        self.inner.get_socket_digest()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::config::ConnectionsConfig;
    use crate::metrics::Metrics;

    async fn pair() -> (Coalesced, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap());
        let (client, accepted) = tokio::join!(client, listener.accept());
        let stream = pingora_core::protocols::l4::stream::Stream::from(accepted.unwrap().0);
        let metrics = Metrics::new(Arc::default());
        let watch = HeadWatch::new(
            &ConnectionsConfig::default(),
            &metrics,
            [192, 0, 2, 1].into(),
        );
        (Coalesced::new(Box::new(stream), watch), client.unwrap())
    }

    #[tokio::test]
    async fn what_is_written_before_a_flush_leaves_in_one_piece() {
        let (mut server, mut client) = pair().await;
        server.write_all(b"head ").await.unwrap();
        server.write_all(b"body").await.unwrap();
        let mut bytes = [0; 100];
        assert!(client.try_read(&mut bytes).is_err(), "nothing came yet");
        server.flush().await.unwrap();
        let read = client.read(&mut bytes).await.unwrap();
        assert_eq!(&bytes[..read], b"head body");
    }

    #[tokio::test]
    async fn any_amount_arrives_in_order() {
        let (mut server, mut client) = pair().await;
        let parts: Vec<Vec<u8>> = (0..200_usize)
            .map(|part| vec![u8::try_from(part).unwrap(); (part * 7919) % 30_000])
            .collect();
        let want = parts.concat();
        let writing = async move {
            for part in &parts {
                server.write_all(part).await.unwrap();
            }
            Shutdown::shutdown(&mut server).await;
        };
        let mut got = Vec::new();
        let reading = client.read_to_end(&mut got);
        let ((), read) = tokio::join!(writing, reading);
        read.unwrap();
        assert!(got == want, "{} of {} bytes", got.len(), want.len());
    }
}
