//! One keep-alive connection, and what an answer means for the count.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use protocol::headers;
use rand::Rng;
use serde::Deserialize;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::operation::Store;

/// Largest answer that is read.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// First pause before a refused request is sent again; it doubles, with jitter.
const PAUSE: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// What became of one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Answered with this: the effect is durable.
    Answered(Value),
    /// Refused, and nothing ran.
    Refused(String),
    /// Sent, but whether it had its effect is unknown.
    Unknown(String),
}

/// Where requests go.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) host: String,
    /// Objects are called `{prefix}{number}`; percent-encoded.
    pub(crate) prefix: String,
    /// The class of counters.
    pub(crate) counter: String,
    pub(crate) timeout: Duration,
}

/// One RPC call of object `number`.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) store: Store,
    pub(crate) number: u32,
    pub(crate) method: &'static str,
    /// A JSON array of arguments; empty: none.
    pub(crate) arguments: Bytes,
}

/// A connection that is opened when it is needed.
pub(crate) struct Client {
    target: Target,
    sender: Option<SendRequest<Full<Bytes>>>,
}

impl Client {
    pub(crate) fn new(target: Target) -> Self {
        Self {
            target,
            sender: None,
        }
    }

    pub(crate) async fn call(&mut self, call: &Call) -> Outcome {
        let timeout = self.target.timeout;
        match tokio::time::timeout(timeout, self.exchange(call)).await {
            Ok(outcome) => outcome,
            Err(_) => {
                // An answer may still come: this connection cannot be used for another request.
                self.sender = None;
                Outcome::Unknown(format!("no answer in {timeout:?}"))
            }
        }
    }

    /// The same, sent again while it is refused and nothing ran, with doubling pauses and jitter (AWS
    /// Architecture Blog, "Exponential backoff and jitter": full jitter), until that time.
    pub(crate) async fn call_patiently(&mut self, call: &Call, until: Instant) -> Outcome {
        let mut pause = PAUSE;
        loop {
            let outcome = self.call(call).await;
            let wait = pause.mul_f64(rand::rng().random());
            if !matches!(outcome, Outcome::Refused(_)) || Instant::now() + wait > until {
                return outcome;
            }
            tokio::time::sleep(wait).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    async fn exchange(&mut self, call: &Call) -> Outcome {
        let mut sender = match self.sender.take() {
            Some(sender) if !sender.is_closed() => sender,
            _ => match self.connect().await {
                Ok(sender) => sender,
                Err(error) => return Outcome::Refused(format!("connect: {error}")),
            },
        };
        if let Err(error) = sender.ready().await {
            return Outcome::Refused(format!("connection closed: {error}"));
        }
        let Target { host, prefix, .. } = &self.target;
        let class = match call.store {
            Store::Counter => &self.target.counter,
            Store::Sql => "Sql",
            Store::Kv => "Kv",
            Store::Sharded => "",
        };
        let (number, method) = (call.number, call.method);
        let request = match (call.store, method) {
            (Store::Sharded, "value") => {
                Request::get(format!("/counters/{prefix}{number}?exact=true"))
            }
            (Store::Sharded, _) => Request::post(format!("/counters/{prefix}{number}/{method}")),
            _ => Request::post(format!("/rpc/{class}/{prefix}{number}/{method}")),
        };
        let request = request
            .header(header::HOST, host)
            .header(header::CONTENT_LENGTH, call.arguments.len())
            .body(Full::new(call.arguments.clone()));
        let request = match request {
            Ok(request) => request,
            Err(error) => return Outcome::Refused(format!("request: {error}")),
        };
        let response = match sender.send_request(request).await {
            Ok(response) => response,
            Err(error) => return Outcome::Unknown(format!("send: {error}")),
        };
        let status = response.status();
        let code = response.headers().get(headers::ERROR).cloned();
        let body = match Limited::new(response.into_body(), ANSWER_BYTES_MAX)
            .collect()
            .await
        {
            Ok(body) => body.to_bytes(),
            Err(error) => return Outcome::Unknown(format!("answer: {error}")),
        };
        self.sender = Some(sender);
        judge(status, code.as_ref(), &body)
    }

    async fn connect(&self) -> anyhow::Result<SendRequest<Full<Bytes>>> {
        let stream = TcpStream::connect(&self.target.host).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        // Ends with the sender; its error also reaches whoever waits for an answer.
        tokio::spawn(async move { drop(connection.await) });
        Ok(sender)
    }
}

/// The part of a problem document that counts here.
#[derive(Deserialize)]
struct Problem {
    retryable: bool,
}

fn judge(status: StatusCode, code: Option<&HeaderValue>, body: &[u8]) -> Outcome {
    if status == StatusCode::OK
        && let Ok(value) = serde_json::from_slice(body)
    {
        return Outcome::Answered(value);
    }
    let code = code
        .and_then(|code| code.to_str().ok())
        .unwrap_or("no code");
    let what = format!("{} {code}", status.as_u16());
    let nothing_ran = status.is_client_error()
        || serde_json::from_slice(body).is_ok_and(|problem: Problem| problem.retryable);
    if nothing_ran {
        Outcome::Refused(what)
    } else {
        Outcome::Unknown(what)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_cannot_have_run_counts_as_refused() {
        let judge = |status: u16, body: &str| {
            judge(StatusCode::from_u16(status).unwrap(), None, body.as_bytes())
        };
        assert_eq!(judge(200, "7"), Outcome::Answered(7.into()));
        assert!(matches!(judge(200, "what?"), Outcome::Unknown(_)));
        assert!(matches!(judge(404, ""), Outcome::Refused(_)));
        assert!(matches!(
            judge(503, r#"{"retryable":true}"#),
            Outcome::Refused(_)
        ));
        assert!(matches!(
            judge(503, r#"{"retryable":false}"#),
            Outcome::Unknown(_)
        ));
        assert!(matches!(judge(502, "<html>"), Outcome::Unknown(_)));
    }
}
