//! Connections of one worker to the others, for calls that are too large for a link; kept while they are idle.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use ops::Causes;
use tokio::net::TcpStream;
use tracing::debug;

/// Idle connections that are kept to one worker.
const IDLE_MAX: usize = 32;

pub(super) const CONNECT_MAX: Duration = Duration::from_secs(1);

#[derive(Default)]
pub(super) struct Connections {
    idle: RefCell<HashMap<String, Vec<Sender>>>,
}

type Sender = SendRequest<Full<Bytes>>;

/// An answer's head; the connection can be put back when the body was read.
pub(super) struct Answer {
    pub(super) response: Response<Incoming>,
    pub(super) sender: Sender,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum SendError {
    /// Nothing ran.
    #[error("the worker at {0} cannot be reached")]
    NotSent(String),
    /// Nothing ran.
    #[error("too much is under way to the worker at {0}")]
    Full(String),
    #[error("the connection to the worker at {0} broke; whether the call had an effect is unknown")]
    Broken(String),
}

impl Connections {
    /// Sends a request on an idle connection, or on a new one.
    pub(super) async fn send(
        &self,
        address: &str,
        mut request: Request<Full<Bytes>>,
    ) -> Result<Answer, SendError> {
        while let Some(mut sender) = self.take(address) {
            match sender.try_send_request(request).await {
                Ok(response) => return Ok(Answer { response, sender }),
                Err(mut failed) => match failed.take_message() {
                    // It had been closed while it was idle.
                    Some(unsent) => request = unsent,
                    None => return Err(SendError::Broken(address.to_owned())),
                },
            }
        }
        let mut sender = self.connect(address).await.map_err(|error| {
            debug!(address, error = %Causes(&error), "a worker cannot be reached");
            SendError::NotSent(address.to_owned())
        })?;
        match sender.try_send_request(request).await {
            Ok(response) => Ok(Answer { response, sender }),
            Err(mut failed) => Err(match failed.take_message() {
                Some(_) => SendError::NotSent(address.to_owned()),
                None => SendError::Broken(address.to_owned()),
            }),
        }
    }

    pub(super) fn put_back(&self, address: &str, sender: Sender) {
        let mut idle = self.idle.borrow_mut();
        if let Some(known) = idle.get_mut(address) {
            if known.len() < IDLE_MAX {
                known.push(sender);
            }
        } else {
            idle.insert(address.to_owned(), vec![sender]);
        }
    }

    fn take(&self, address: &str) -> Option<Sender> {
        let mut idle = self.idle.borrow_mut();
        let known = idle.get_mut(address)?;
        // The one used last is the least likely to have been closed.
        while let Some(sender) = known.pop() {
            if !sender.is_closed() {
                return Some(sender);
            }
        }
        None
    }

    async fn connect(&self, address: &str) -> io::Result<Sender> {
        let connecting = tokio::time::timeout(CONNECT_MAX, ops::exchange::connect(address));
        let stream: TcpStream = connecting.await.map_err(|_| io::ErrorKind::TimedOut)??;
        let handshake = http1::handshake(TokioIo::new(stream)).await;
        let (sender, connection) = handshake.map_err(io::Error::other)?;
        // Ends when the sender is dropped.
        tokio::task::spawn_local(async move {
            if let Err(error) = connection.await {
                debug!(error = %Causes(&error), "a connection to a worker ended");
            }
        });
        Ok(sender)
    }
}
