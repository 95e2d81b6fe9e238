//! The admin listener: `/metrics`, `/healthz`, `/readyz`, the pages of the process behind it, and what
//! operators ask of objects.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONNECTION, CONTENT_TYPE, HOST, ORIGIN, WWW_AUTHENTICATE};
use http::uri::Authority;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use protocol::{ErrorCode, Problem, headers, problem};
use subtle::ConstantTimeEq;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{debug, warn};

use crate::logs::Causes;
use crate::operator::Front;

pub use http::Method;

/// Bytes at hand, or what a worker sends.
pub type Body = BoxBody<Bytes, hyper::Error>;

pub type Page = Response<Body>;

/// A body of bytes at hand.
pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into())
        .map_err(|never| match never {})
        .boxed()
}

/// What one process shows its operator.
pub trait Admin: Send + Sync + 'static {
    /// The body of `/metrics`, in the Prometheus text format.
    fn metrics(&self) -> String;

    /// Whether the process can serve; an error says what it waits for.
    fn ready(&self) -> Result<(), String>;

    /// Any other page; `None` is a 404.
    fn page(&self, _method: &Method, _path: &str, _query: Option<&str>) -> Option<Page> {
        None
    }

    /// Who passes on what operators ask of objects.
    fn front(&self) -> Option<Front> {
        None
    }
}

/// Why the admin listener did not start.
#[derive(Debug, thiserror::Error)]
#[error("the admin listener cannot listen on {address}")]
pub struct BindError {
    address: String,
    source: std::io::Error,
}

pub async fn bind(address: &str) -> Result<TcpListener, BindError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| BindError {
            address: address.to_owned(),
            source,
        })
}

/// Serves until the task is aborted. With a `token`, every page but the two health checks needs
/// `Authorization: Bearer` with it; the comparison takes the same time whatever differs.
pub async fn serve(listener: TcpListener, token: Option<Arc<str>>, admin: Arc<dyn Admin>) {
    serve_until(listener, token, admin, std::future::pending()).await;
}

/// Serves until told to stop. What was asked by then is answered, within some time; and what is asked for so
/// long on connections that are open, as the last thing there.
pub async fn serve_until(
    listener: TcpListener,
    token: Option<Arc<str>>,
    admin: Arc<dyn Admin>,
    stop: impl Future<Output = Duration> + Send,
) {
    let mut connections = JoinSet::new();
    let (leave, told) = watch::channel(None::<Duration>);
    let mut stop = std::pin::pin!(stop);
    let patience = loop {
        let (stream, peer): (_, SocketAddr) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    warn!(error = %Causes(&error), "admin accept failed");
                    // Most likely out of descriptors; without a pause this would spin.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            Some(_) = connections.join_next() => continue,
            patience = &mut stop => break patience,
        };
        let (admin, token) = (Arc::clone(&admin), token.clone());
        let mut told = told.clone();
        let stopping = told.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            let (admin, token) = (Arc::clone(&admin), token.clone());
            let is_last = stopping.borrow().is_some();
            async move {
                let mut page = answer(request, token.as_deref(), admin.as_ref()).await;
                if is_last {
                    let close = HeaderValue::from_static("close");
                    page.headers_mut().insert(CONNECTION, close);
                }
                Ok::<_, Infallible>(page)
            }
        });
        connections.spawn(async move {
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .serve_connection(TokioIo::new(stream), service);
            let mut connection = std::pin::pin!(connection);
            // The sender lives as long as this task.
            let leave = async {
                let told = told.wait_for(Option::is_some).await;
                let patience = told.ok().and_then(|told| *told);
                tokio::time::sleep(patience.unwrap_or_default()).await;
            };
            let served = tokio::select! {
                served = connection.as_mut() => served,
                () = leave => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = served {
                debug!(%peer, error = %Causes(&error), "admin connection ended");
            }
        });
    };
    drop(listener);
    leave.send_replace(Some(patience));
    let ended = async { while connections.join_next().await.is_some() {} };
    // Who takes longer is cut off.
    drop(tokio::time::timeout(patience + LEAVE_MAX, ended).await);
}

/// How long a stopping listener waits for what was asked.
const LEAVE_MAX: Duration = Duration::from_secs(5);

async fn answer(request: Request<Incoming>, token: Option<&str>, admin: &dyn Admin) -> Page {
    let path = request.uri().path();
    match path {
        "/healthz" => return text("ok\n".to_owned()),
        "/readyz" => {
            return match admin.ready() {
                Ok(()) => text("ready\n".to_owned()),
                Err(reason) => refusal(&Problem::unavailable(reason)),
            };
        }
        _ => {}
    }
    if token.is_none() && is_from_a_web_page(request.headers()) {
        return refusal(&Problem::new(
            ErrorCode::Forbidden,
            "web pages of others may not ask this listener; with an admin token it would know its operator",
        ));
    }
    if let Some(token) = token
        && !bearer_matches(request.headers().get(AUTHORIZATION), token)
    {
        let mut page = refusal(&Problem::new(
            ErrorCode::Unauthorized,
            "this page needs `Authorization: Bearer` with the admin token",
        ));
        page.headers_mut()
            .insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        return page;
    }
    if path == "/metrics" {
        let mut page = text(admin.metrics());
        page.headers_mut().insert(
            CONTENT_TYPE,
            HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"),
        );
        return page;
    }
    if let Some(page) = admin.page(request.method(), path, request.uri().query()) {
        return page;
    }
    match admin.front().filter(|_| Front::answers(path)) {
        Some(front) => front.answer(request).await,
        None => refusal(&Problem::not_found(format!(
            "there is no page {path:?} here"
        ))),
    }
}

/// A browser says where a request comes from, or names a host that only a browser was made to believe is
/// here (DNS rebinding). Tools do neither.
fn is_from_a_web_page(headers: &HeaderMap) -> bool {
    let site = headers.get("sec-fetch-site").map(HeaderValue::as_bytes);
    let elsewhere = site.is_some_and(|site| site != b"none" && site != b"same-origin");
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    let name = host.and_then(|host| host.parse::<Authority>().ok());
    let foreign = name.is_some_and(|name| {
        let name = name.host().trim_matches(['[', ']']);
        name != "localhost" && name.parse::<IpAddr>().is_err()
    });
    headers.contains_key(ORIGIN) || elsewhere || foreign
}

/// Compares in a time that depends on the lengths alone.
pub fn bearer_matches(value: Option<&HeaderValue>, token: &str) -> bool {
    value
        .and_then(|value| value.as_bytes().strip_prefix(b"Bearer "))
        .is_some_and(|given| given.ct_eq(token.as_bytes()).into())
}

pub fn text(body: String) -> Page {
    let mut page = Response::new(full(body));
    page.headers_mut().insert(
        CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    page
}

pub fn json(body: &impl serde::Serialize) -> Page {
    match serde_json::to_vec(body) {
        Ok(body) => {
            let mut page = Response::new(full(body));
            page.headers_mut()
                .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            page
        }
        Err(error) => refusal(&Problem::new(ErrorCode::Internal, error.to_string())),
    }
}

pub fn refusal(problem: &Problem) -> Page {
    let mut page = Response::new(full(problem.to_json(None)));
    *page.status_mut() = problem.code.status();
    page.headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(problem::MEDIA_TYPE));
    page.headers_mut().insert(
        headers::ERROR,
        HeaderValue::from_static(problem.code.name()),
    );
    page
}
