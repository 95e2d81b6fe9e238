//! One HTTP request to one worker, on a connection of its own. For what is asked seldom: rings, operators.

use std::io;

use http::{HeaderValue, Request, Response, header};
use hyper::body::{Body, Incoming};
use hyper_util::rt::TokioIo;
use protocol::headers;
use tokio::net::{TcpStream, ToSocketAddrs};
use tracing::debug;

use crate::logs::Causes;

/// Why there was no answer.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    #[error("connect to {address}")]
    Connect { address: String, source: io::Error },
    #[error("ask {address}")]
    Exchange {
        address: String,
        source: hyper::Error,
    },
}

/// Connects to a process of the cluster. Small messages are not held back.
///
/// A port of 127.0.0.1 that nobody listens on can be given to whoever connects to it, which then is connected to
/// itself, and keeps the port from its owner: such a connection is refused.
///
/// # Errors
/// There is nobody, or nobody but ourselves.
pub async fn connect(address: impl ToSocketAddrs) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    if stream.local_addr()? == stream.peer_addr()? {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Sends a request to a worker, with the cluster's token, and returns its answer; the body comes while it
/// is read.
pub async fn send<B>(
    address: &str,
    token: Option<&HeaderValue>,
    mut request: Request<B>,
) -> Result<Response<Incoming>, ExchangeError>
where
    B: Body<Error: Into<Box<dyn std::error::Error + Send + Sync>>, Data: Send> + Send + 'static,
{
    let failed = |source| ExchangeError::Exchange {
        address: address.to_owned(),
        source,
    };
    let stream = connect(address)
        .await
        .map_err(|source| ExchangeError::Connect {
            address: address.to_owned(),
            source,
        })?;
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(failed)?;
    // Ends with the last of the answer, or when nobody wants it any more.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            debug!(error = %Causes(&error), "a connection to a worker ended");
        }
    });
    let headers = request.headers_mut();
    if let Ok(host) = HeaderValue::from_str(address) {
        headers.insert(header::HOST, host);
    }
    if let Some(token) = token {
        headers.insert(headers::TOKEN, token.clone());
    }
    sender.send_request(request).await.map_err(failed)
}
