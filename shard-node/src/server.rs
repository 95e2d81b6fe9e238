//! Requests in, replies and refusals out: what a worker's listener understands.
//!
//! Only gateways speak to it. The headers of [`protocol::headers`], or the fields of a
//! [`protocol::link`] request, say which object it is for; method, path, query, other headers and body are
//! the object's.

use std::convert::Infallible;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE, LOCATION, RETRY_AFTER};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use protocol::link::{self, Ask};
use protocol::trace::TraceParent;
use protocol::{ErrorCode, ObjectId, ObjectName, Problem, Ring, ShardId, headers, limits, problem};
use subtle::ConstantTimeEq;
use tokio::time::Instant;
use tracing::debug;

use crate::class::{Args, Body, Class};
use crate::classes::Classes;
use crate::host::{Address, Host};
use crate::metrics::{Code, Metrics};
use crate::object::mailbox::{Event, Reply};
use crate::operator::Operator;

/// The front of one worker.
pub(crate) struct Server {
    pub(crate) host: Rc<Host>,
    pub(crate) ring: Arc<Ring>,
    /// This worker, as an index into the ring's list.
    pub(crate) me: usize,
    pub(crate) classes: Classes,
    pub(crate) token: Option<Arc<str>>,
    pub(crate) metrics: Rc<Metrics>,
    pub(crate) operator: Rc<Operator>,
}

impl Server {
    /// Answers one request. Never fails: what goes wrong becomes a problem document.
    pub(crate) async fn serve(
        self: Rc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<Body>, Infallible> {
        let mut seen = Seen::of(request.headers());
        let answer = self.answer(request.map(Body::from), &mut seen.class).await;
        Ok(self.finish(answer, &seen))
    }

    /// Answers one request that came over a link, whose token was checked when it began.
    pub(crate) async fn serve_linked(&self, request: &link::Request<'_>) -> Response<Body> {
        let mut seen = Seen::of_linked(&request.routed);
        let answer = self.answer_linked(request, &mut seen.class).await;
        self.finish(answer, &seen)
    }

    fn finish(&self, answer: Result<Response<Body>, Problem>, seen: &Seen) -> Response<Body> {
        let (response, code) = match answer {
            Ok(response) => {
                let status = response.status().as_u16();
                (response, Code::Status(status))
            }
            Err(problem) => {
                let code = Code::Refused(problem.code);
                (self.refuse(&problem, seen.request.as_deref()), code)
            }
        };
        let took = seen.begun.elapsed();
        let class = seen.class.as_ref().map(|class| class.name());
        self.metrics.request(class, code, took);
        seen.log(class.map(|class| class.as_str()), code, took);
        response
    }

    async fn answer(
        &self,
        mut request: Request<Body>,
        class_seen: &mut Option<Arc<dyn Class>>,
    ) -> Result<Response<Body>, Problem> {
        self.authenticate(request.headers_mut())?;
        if request.headers().contains_key(headers::OPERATOR) {
            return self.operator.answer(request).await;
        }
        if !request.headers().contains_key(headers::OBJECT) {
            return self.internal_page(&request);
        }
        let of_gateway = request.headers().contains_key(headers::INTERNAL);
        let class = self.class(text(request.headers(), &headers::CLASS)?, of_gateway)?;
        *class_seen = Some(Arc::clone(&class));
        let address = self.read_address(class, request.headers())?;
        if request.headers().contains_key(headers::CREATE) {
            return Ok(created(&address));
        }
        let watched = match request.headers_mut().remove(headers::NEW_OBJECT) {
            None => false,
            Some(wish) => self.may_be_new(&address, &wish)?,
        };
        let deadline = read_deadline(request.headers_mut())?;
        let mut response = match request.headers_mut().remove(headers::METHOD) {
            None => self.fetch(&address, request, deadline).await,
            Some(method) => self.read_call(&address, &method, request, deadline).await,
        }?;
        if watched && self.exists(&address)? {
            let yes = HeaderValue::from_static("1");
            response.headers_mut().insert(headers::NEW_OBJECT, yes);
        }
        Ok(response)
    }

    async fn read_call(
        &self,
        address: &Address,
        method: &HeaderValue,
        request: Request<Body>,
        deadline: Option<Instant>,
    ) -> Result<Response<Body>, Problem> {
        let method = method
            .to_str()
            .map_err(|error| bad_header(&headers::METHOD, &error))?;
        let body = request
            .into_body()
            .read(limits::RPC_BODY_BYTES_MAX)
            .await
            .map_err(|error| Problem {
                remote: false,
                ..error.problem()
            })?;
        self.call(address, method, &body, deadline).await
    }

    async fn answer_linked(
        &self,
        request: &link::Request<'_>,
        class_seen: &mut Option<Arc<dyn Class>>,
    ) -> Result<Response<Body>, Problem> {
        let routed = &request.routed;
        let of_gateway = matches!(request.ask, Ask::Own { .. });
        let class = self.class(routed.class, of_gateway)?;
        *class_seen = Some(Arc::clone(&class));
        let address = self.address(class, routed.id, routed.epoch, || {
            let name = routed.name.map(str::parse::<ObjectName>).transpose();
            name.map_err(|error| bad_header(&headers::NAME, &error))
        })?;
        let deadline = routed
            .timeout_ms
            .and_then(|timeout| after_ms(timeout.get().into()));
        match request.ask {
            Ask::Create => Ok(created(&address)),
            Ask::Call { method } | Ask::Own { method } => {
                self.call(&address, method, request.body, deadline).await
            }
            Ask::Fetch { .. } => {
                let request = crate::link::to_http(request, address.shard)?;
                self.fetch(&address, request, deadline).await
            }
        }
    }

    /// Whether the object is new if it exists when the request is done.
    fn may_be_new(&self, address: &Address, wish: &HeaderValue) -> Result<bool, Problem> {
        if self.exists(address)? {
            return Ok(false);
        }
        if wish == headers::NEW_OBJECT_REFUSE {
            return Err(Problem::new(
                ErrorCode::RateLimited,
                "the object does not exist, and the limit of new ones is used up",
            ));
        }
        Ok(true)
    }

    /// Whether the object has a database.
    fn exists(&self, address: &Address) -> Result<bool, Problem> {
        let engine = &self.operator.engine;
        engine
            .exists(address.id, address.shard)
            .map_err(|error| Problem::new(ErrorCode::Internal, error.to_string()))
    }

    pub(crate) fn check_token(&self, given: &[u8]) -> bool {
        let wanted = self.token.as_deref();
        wanted.is_none_or(|token| given.ct_eq(token.as_bytes()).into())
    }

    /// With a token configured, nothing is answered without it.
    fn authenticate(&self, headers: &mut HeaderMap) -> Result<(), Problem> {
        if self.token.is_none() {
            return Ok(());
        }
        let given = headers.remove(headers::TOKEN);
        if given.is_some_and(|given| self.check_token(given.as_bytes())) {
            Ok(())
        } else {
            Err(Problem::new(
                ErrorCode::Unauthorized,
                "workers answer to gateways with the cluster's token only",
            ))
        }
    }

    fn internal_page(&self, request: &Request<Body>) -> Result<Response<Body>, Problem> {
        if request.uri().path() != headers::RING_PATH || request.method() != Method::GET {
            return Err(Problem::bad_request(format!(
                "the header {} is missing: workers take requests routed by a gateway",
                headers::OBJECT
            )));
        }
        let ring = serde_json::to_vec(self.ring.document())
            .map_err(|error| Problem::new(ErrorCode::Internal, error.to_string()))?;
        Ok(json(StatusCode::OK, ring))
    }

    /// `of_gateway`: the gateway itself asks, not a client of it.
    fn class(&self, name: &str, of_gateway: bool) -> Result<Arc<dyn Class>, Problem> {
        self.classes
            .iter()
            .find(|class| class.name().as_str() == name)
            .filter(|class| !class.is_internal() || of_gateway)
            .cloned()
            .ok_or_else(|| {
                Problem::not_found(format!(
                    "there is no class {name:?}; there are {}",
                    self.classes.names()
                ))
            })
    }

    fn read_address(&self, class: Arc<dyn Class>, headers: &HeaderMap) -> Result<Address, Problem> {
        let id: ObjectId = text(headers, &headers::OBJECT)?
            .parse()
            .map_err(|error| bad_header(&headers::OBJECT, &error))?;
        let epoch = text(headers, &headers::EPOCH)?;
        let epoch: u64 = epoch
            .parse()
            .map_err(|error| bad_header(&headers::EPOCH, &error))?;
        self.address(class, id, epoch, || {
            let Some(value) = headers.get(headers::NAME) else {
                return Ok(None);
            };
            let value = value
                .to_str()
                .map_err(|error| bad_header(&headers::NAME, &error))?;
            let name = headers::decode_name(value);
            name.map(Some)
                .map_err(|error| bad_header(&headers::NAME, &error))
        })
    }

    fn address(
        &self,
        class: Arc<dyn Class>,
        id: ObjectId,
        epoch: u64,
        name: impl FnOnce() -> Result<Option<ObjectName>, Problem>,
    ) -> Result<Address, Problem> {
        let shard = self.ring.shard_of(id);
        self.check_owner(id, shard, epoch)?;
        // The gateway made the id from class and name; only what wakes from sleep pays for a check.
        let known = self.host.is_awake(id);
        if !known {
            id.check_class(class.name())
                .map_err(|error| bad_header(&headers::OBJECT, &error))?;
        }
        let name = if known { None } else { name()? };
        if let Some(name) = &name {
            check_name(&class, id, name)?;
        }
        Ok(Address {
            class,
            id,
            name,
            shard,
        })
    }

    fn check_owner(&self, id: ObjectId, shard: ShardId, epoch: u64) -> Result<(), Problem> {
        let not_owner = |detail: String| Err(Problem::new(ErrorCode::NotOwner, detail));
        let mine = self.ring.version().0.get();
        if epoch > mine {
            // A newer ring exists, and it may have given the shard away.
            return not_owner(format!(
                "the request was routed by ring {epoch}, but this worker knows ring {mine}"
            ));
        }
        match self.ring.owner(id.home(), shard) {
            Ok(owner) if std::ptr::eq(owner, &self.ring.workers()[self.me]) => Ok(()),
            Ok(owner) => not_owner(format!(
                "shard {shard} belongs to worker {} of node {} at {}",
                owner.index, owner.node, owner.address
            )),
            Err(error) => Err(Problem::unavailable(error.to_string())),
        }
    }

    async fn fetch(
        &self,
        address: &Address,
        request: Request<Body>,
        deadline: Option<Instant>,
    ) -> Result<Response<Body>, Problem> {
        let event = Event::Fetch(request);
        match self.host.deliver_by(address, event, deadline).await? {
            Reply::Response(response) => Ok(clean(response)),
            Reply::Value(value) => Ok(json(StatusCode::OK, value.to_string())),
        }
    }

    async fn call(
        &self,
        address: &Address,
        method: &str,
        body: &[u8],
        deadline: Option<Instant>,
    ) -> Result<Response<Body>, Problem> {
        let args = Args::new(method, arguments(body)?);
        let event = Event::Call {
            method: method.into(),
            args,
        };
        match self.host.deliver_by(address, event, deadline).await? {
            Reply::Value(value) => Ok(json(StatusCode::OK, value.to_string())),
            Reply::Response(response) => Ok(response),
        }
    }

    fn refuse(&self, problem: &Problem, request: Option<&str>) -> Response<Body> {
        let mut response = json(problem.code.status(), problem.to_json(request));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(problem::MEDIA_TYPE));
        headers.insert(
            headers::ERROR,
            HeaderValue::from_static(problem.code.name()),
        );
        if let Some(seconds) = problem.retry_after_seconds() {
            headers.insert(RETRY_AFTER, seconds.into());
        }
        let allow = problem.allow.as_deref();
        if let Some(allow) = allow.and_then(|allow| HeaderValue::from_str(allow).ok()) {
            headers.insert(ALLOW, allow);
        }
        if problem.code == ErrorCode::NotOwner {
            headers.insert(headers::EPOCH, self.ring.version().0.get().into());
        }
        response
    }
}

/// Headers that only the system may set do not pass.
fn clean(mut response: Response<Body>) -> Response<Body> {
    let ours = |name: &&HeaderName| name.as_str().starts_with(headers::PREFIX);
    while let Some(name) = response.headers().keys().find(ours).cloned() {
        response.headers_mut().remove(name);
    }
    response
}

/// The arguments of a call: a JSON array, or nothing for none.
fn arguments(body: &[u8]) -> Result<Vec<serde_json::Value>, Problem> {
    if body.is_empty() {
        return Ok(Vec::new());
    }
    serde_json::from_slice(body).map_err(|error| {
        Problem::bad_request(format!(
            "the body of an RPC call must be a JSON array of arguments: {error}"
        ))
    })
}

fn created(address: &Address) -> Response<Body> {
    let id = address.id.to_string();
    let body = serde_json::json!({ "id": id }).to_string();
    let mut response = json(StatusCode::CREATED, body);
    let location = format!("/objects/{}/id:{id}", address.class.name());
    if let Ok(location) = HeaderValue::from_str(&location) {
        response.headers_mut().insert(LOCATION, location);
    }
    response
}

fn json(status: StatusCode, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Body::from(body.into()));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<&'a str, Problem> {
    let value = headers
        .get(name)
        .ok_or_else(|| Problem::bad_request(format!("the header {name} is missing")))?;
    value.to_str().map_err(|error| bad_header(name, &error))
}

fn check_name(class: &Arc<dyn Class>, id: ObjectId, name: &ObjectName) -> Result<(), Problem> {
    if ObjectId::named(class.name(), id.home(), name) == id {
        Ok(())
    } else {
        Err(Problem::bad_request(format!(
            "the name in {} does not lead to the id in {}",
            headers::NAME,
            headers::OBJECT
        )))
    }
}

/// When nobody waits for the answer any more, if the gateway says so.
fn read_deadline(headers: &mut HeaderMap) -> Result<Option<Instant>, Problem> {
    let Some(value) = headers.remove(headers::TIMEOUT) else {
        return Ok(None);
    };
    let text = value.to_str().unwrap_or_default();
    let timeout_ms = text.parse::<u64>();
    timeout_ms
        .map(after_ms)
        .map_err(|error| bad_header(&headers::TIMEOUT, &error))
}

/// `None` beyond all time, which is no deadline.
fn after_ms(timeout_ms: u64) -> Option<Instant> {
    Instant::now().checked_add(Duration::from_millis(timeout_ms))
}

fn bad_header(name: &HeaderName, error: &dyn std::fmt::Display) -> Problem {
    Problem::bad_request(format!("{name}: {error}"))
}

/// What metrics and the log say about a request, copied before the request is handed on.
struct Seen {
    begun: Instant,
    /// Once it is known.
    class: Option<Arc<dyn Class>>,
    request: Option<String>,
    trace: Option<TraceParent>,
}

impl Seen {
    fn of(headers: &HeaderMap) -> Self {
        let text = |name| {
            headers
                .get(name)
                .and_then(|value: &HeaderValue| value.to_str().ok())
        };
        Self {
            begun: Instant::now(),
            class: None,
            request: text(headers::REQUEST).map(str::to_owned),
            trace: tracing::enabled!(tracing::Level::DEBUG)
                .then(|| TraceParent::parse(text(headers::TRACEPARENT)?))
                .flatten(),
        }
    }

    fn of_linked(routed: &link::Routed<'_>) -> Self {
        Self {
            begun: Instant::now(),
            class: None,
            request: Some(routed.request.to_owned()),
            trace: tracing::enabled!(tracing::Level::DEBUG).then_some(routed.trace),
        }
    }

    fn log(&self, class: Option<&str>, code: Code, took: Duration) {
        if let Some(trace) = &self.trace {
            debug!(
                request = self.request,
                trace = format!("{:032x}", trace.trace),
                parent = format!("{:016x}", trace.span),
                class,
                ?code,
                took_us = took.as_micros(),
                "request answered"
            );
        }
    }
}
