//! pingora's `ProxyHttp`: a short method per phase. pingora's error type stays in this file and those below
//! it.

mod admit;
mod answers;
mod bounds;
mod cached;
mod counted;
mod direct;
mod dynamic;
mod heads;
mod letter;
mod linked;
mod logged;
mod problems;
mod tries;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use arc_swap::ArcSwap;
use async_trait::async_trait;
use bytes::Bytes;
use http::HeaderValue;
use http::header::{CONTENT_LENGTH, HOST};
use pingora_cache::key::HashBinary;
use pingora_cache::{CacheKey, CacheMeta, RespCacheable};
use pingora_core::protocols::ALPN;
use pingora_core::upstreams::peer::HttpPeer;
use pingora_core::{Error, ErrorSource, ErrorType, Result};
use pingora_http::{RequestHeader, ResponseHeader};
use pingora_proxy::{FailToProxy, ProxyHttp, ProxyWarnLogContext, Session};
use protocol::trace::TraceParent;
use protocol::{Colo, ErrorCode, Problem, headers, limits};
use rand::Rng;
use tokio::time::Instant;
use tracing::debug;

use crate::asked::{Asked, Params};
use crate::cache::{Cache, policy};
use crate::config::{ConnectionsConfig, RequestsConfig, RetryConfig};
use crate::cors::Grant;
use crate::counters::Counters;
use crate::counters::ask::CounterAsk;
use crate::counters::plans::Plans;
use crate::deadline;
use crate::downstream::crowd::Crowd;
use crate::downstream::head::Carrier;
use crate::hot::Hot;
use crate::limit;
use crate::link::Links;
use crate::metrics::{Code, Metrics, RouteLabel};
use crate::placement::{Owner, Placement};
use crate::refusal::Refusal;
use crate::retry::{self, Failure};
use crate::route::{Ask, Finish, Found, ObjectTarget, Target};
use crate::rules::{Admission, Creation};
use crate::shed::Slot;
use crate::upstream::connections::Connections;
use crate::upstream::server::Outcome;
use crate::upstream::{Choice, Selector, Upstream};
use admit::admit;
use answers::{Answer, compress, receive_rest, refuse, tell_browser};
use bounds::{DEADLINE_OVER, check_head};
use cached::Cached;
pub use dynamic::Dynamic;
use heads::{
    forwarded, host, is_secure, join_cookies, pass_upgrade, peer_ip, require_one_host, strip, uri,
};
use logged::log;

const NOT_OWNER: ErrorType = ErrorType::Custom("not_owner");
const TOKEN_REFUSED: ErrorType = ErrorType::Custom("token_refused");
const BODY_TOO_LARGE: ErrorType = ErrorType::Custom("body_too_large");
const UNROUTABLE: ErrorType = ErrorType::Custom("unroutable");
const BAD_STATUS: ErrorType = ErrorType::Custom("bad_status");

/// Shared by all threads of a gateway.
pub struct Shared {
    pub colo: Colo,
    pub token: Option<HeaderValue>,
    pub connections: ConnectionsConfig,
    pub crowd: Arc<Crowd>,
    pub requests: RequestsConfig,
    pub retry: RetryConfig,
    pub placement: Arc<Placement>,
    pub dynamic: ArcSwap<Dynamic>,
    pub cache: &'static Cache,
    /// Another process goes on with the listening sockets.
    pub relieved: AtomicBool,
    pub metrics: Metrics,
    /// Objects that requests go to, by class and name; one of some requests is counted.
    pub hot_objects: Hot,
    /// Of sharded counters.
    pub plans: Plans,
}

/// The proxy of one thread.
pub struct Proxy {
    pub shared: Arc<Shared>,
    /// To workers.
    pub links: Arc<Links>,
    pub counters: Arc<Counters>,
    /// To servers of apps.
    pub connections: Arc<Connections>,
}

/// One request on its way.
pub struct Request {
    begun: Instant,
    id: u64,
    trace: TraceParent,
    aim: Option<Aim>,
    /// Rules that it keeps, as far as known before it waited for anything.
    admission: Option<Admission>,
    /// What browsers are told.
    grant: Grant,
    creation: Creation,
    /// The body, if it was needed whole.
    held: Option<Vec<u8>>,
    /// Of its route, if that has one.
    body_bytes_max: Option<u64>,
    label: RouteLabel,
    cached: Cached,
    /// Where it came in.
    colo: Colo,
    finish: Finish,
    tries: u32,
    failure: Option<Failure>,
    refused: Option<ErrorCode>,
    body_bytes: u64,
    /// Afterwards nobody waits for its answer.
    deadline: Option<Instant>,
    /// At its target, until that begins to answer.
    slot: Option<Slot>,
}

impl Request {
    /// As others know it.
    fn id(&self) -> String {
        format!("{:016x}", self.id)
    }

    /// The object has answered, and whether it is a new one is known.
    fn settle_creation(&mut self, created: bool) {
        if let Creation::Charged(taken) = std::mem::replace(&mut self.creation, Creation::Free)
            && !created
            && let Some(admission) = &self.admission
        {
            admission.refund_creation(&taken);
        }
    }
}

/// Where the request goes; for apps, resolved when the request was routed.
enum Aim {
    Object {
        target: Box<ObjectTarget>,
        owner: Option<Owner>,
    },
    App(Box<AppAim>),
    Counter(Box<CounterAsk>),
    /// Answered here.
    Here(Answer),
}

/// A pool, and how far a request got there.
struct AppAim {
    upstream: Arc<Upstream>,
    /// Instead of what the client asked for.
    path_and_query: Option<String>,
    selector: Selector,
    /// For the present try.
    choice: Option<Choice>,
    /// Servers of earlier tries.
    tried: Vec<SocketAddr>,
}

impl AppAim {
    /// A server for this try, not one that was tried if there are others.
    fn choose_server(&mut self) -> &Choice {
        if let Some(choice) = self.choice.take() {
            self.tried.push(choice.picked.server.address);
        }
        let choice = self.upstream.pick(&self.selector, &self.tried);
        self.choice.insert(choice)
    }

    fn report(&self, outcome: Outcome) {
        if let Some(choice) = &self.choice {
            self.upstream.report(&choice.picked.server, outcome);
        }
    }
}

impl Proxy {
    /// Where the request goes, or why it is refused before anything was sent.
    fn route(&self, session: &Session, request: &mut Request) -> Result<Aim, Refusal> {
        let head = session.req_header();
        let announced = head
            .headers
            .get(CONTENT_LENGTH)
            .and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
        if announced.is_some_and(|bytes| bytes > self.shared.requests.body_bytes_max) {
            return Err(self.too_large().into());
        }
        require_one_host(head)?;
        check_head(head, &self.shared.connections)?;
        let dynamic = self.shared.dynamic.load();
        let mut asked = self.asked(session, &dynamic);
        if let Some(answer) = dynamic.preflight(&asked) {
            return Ok(Aim::Here(Answer::Fixed(answer)));
        }
        let found = dynamic.routes.find(&asked)?;
        let label = match found {
            Found::Objects => RouteLabel::Contract("objects"),
            Found::Rpc => RouteLabel::Contract("rpc"),
            Found::Counters => RouteLabel::Contract("counters"),
            Found::Route { index, params } => {
                let route = dynamic.routes.get(index);
                asked.params = params;
                request.finish = route.finish;
                RouteLabel::Config(Arc::clone(&route.label))
            }
        };
        request.label = label;
        request.colo = asked.colo;
        self.find_deadline(session, request)?;
        let rules = dynamic.rules.of(found);
        request.grant = rules.grant(asked.headers);
        request.admission = rules.check(&asked, announced)?;
        if let Some(admission) = &request.admission {
            asked.claims = admission.claims();
            request.body_bytes_max = admission.body_bytes_max();
        }
        let target = dynamic
            .routes
            .target(found, &asked, || rand::rng().random())?;
        request.cached = Cached::of(&dynamic, found, &asked, &target);
        match target {
            Target::Object(target) => {
                let call = matches!(target.ask, Ask::Call { .. });
                if call && announced.is_some_and(|bytes| bytes > limits::RPC_BODY_BYTES_MAX as u64)
                {
                    return Err(Problem::new(
                        ErrorCode::PayloadTooLarge,
                        format!(
                            "the arguments of a call are larger than {} bytes",
                            limits::RPC_BODY_BYTES_MAX
                        ),
                    )
                    .into());
                }
                if target.ask == Ask::Create {
                    request.label = RouteLabel::Contract("new");
                }
                let owner = None;
                Ok(Aim::Object { target, owner })
            }
            Target::App {
                route,
                path_and_query,
            } => match &dynamic.of_route[route] {
                Some(upstream) => {
                    upstream.begin();
                    Ok(Aim::App(Box::new(AppAim {
                        upstream: Arc::clone(upstream),
                        path_and_query,
                        selector: upstream.selector(&asked),
                        choice: None,
                        tried: Vec::new(),
                    })))
                }
                None => Err(Problem::not_found("the route has no upstream").into()),
            },
            Target::Counter(ask) => Ok(Aim::Counter(ask)),
            Target::Redirect { status, location } => {
                Ok(Aim::Here(Answer::Redirect { status, location }))
            }
            Target::Respond(fixed) => Ok(Aim::Here(Answer::Fixed(fixed))),
        }
    }

    /// Counts some of the requests for objects, for operators.
    fn sample(&self, aim: &Aim) {
        let key = match aim {
            Aim::Object { target, .. } if limit::is_sampled() => match &target.name {
                Some(name) => format!("{}/{name}", target.class),
                None => format!("{}/id:{}", target.class, target.id),
            },
            // Whatever shard it goes to.
            Aim::Counter(ask) if limit::is_sampled() => {
                format!("{}/{}", protocol::counters::COORDINATOR, ask.name)
            }
            _ => return,
        };
        self.shared.hot_objects.count(&key, limit::SAMPLE);
    }

    /// The view of a request that has not been routed yet.
    fn asked<'a>(&self, session: &'a Session, dynamic: &Dynamic) -> Asked<'a> {
        let head = session.req_header();
        let peer = peer_ip(session);
        Asked {
            method: &head.method,
            host: host(head),
            secure: is_secure(session),
            path: head.uri.path(),
            query: head.uri.query(),
            headers: &head.headers,
            colo: dynamic.client.colo(peer, &head.headers, self.shared.colo),
            client: dynamic.client.address(peer, &head.headers),
            params: Params::default(),
            shard: None,
            claims: None,
        }
    }
}

impl Aim {
    fn what(&self) -> &str {
        match self {
            Self::Object { .. } => "the worker of this object",
            Self::App(app) => app.upstream.name(),
            Self::Counter(_) => "the objects of this counter",
            Self::Here(_) => "this gateway",
        }
    }
}

#[async_trait]
impl ProxyHttp for Proxy {
    /// In a box: pingora moves it more than once for each request, and keeps room for it in idle connections.
    type CTX = Box<Request>;

    fn new_ctx(&self) -> Box<Request> {
        let mut random = rand::rng();
        Box::new(Request {
            begun: Instant::now(),
            id: random.random(),
            trace: TraceParent {
                trace: random.random::<u128>() | 1,
                span: random.random::<u64>() | 1,
                flags: 0,
            },
            aim: None,
            admission: None,
            grant: Grant::new(),
            creation: Creation::Free,
            held: None,
            body_bytes_max: None,
            label: RouteLabel::Contract("none"),
            cached: Cached::default(),
            colo: self.shared.colo,
            finish: Finish::default(),
            tries: 0,
            failure: None,
            refused: None,
            body_bytes: 0,
            deadline: None,
            slot: None,
        })
    }

    async fn request_filter(
        &self,
        session: &mut Session,
        request: &mut Box<Request>,
    ) -> Result<bool> {
        // A client may send its next request before the answer (RFC 9112, 9.3.2).
        session.downstream_session.set_pipelining_enabled(true);
        if session.subrequest_ctx.is_none() {
            if let Some(carrier) = Carrier::of(session) {
                carrier.set_phase(true);
            }
            self.bound_client(session);
        }
        let given = session
            .req_header()
            .headers
            .get(headers::TRACEPARENT)
            .and_then(|value| TraceParent::parse(value.to_str().ok()?));
        if let Some(given) = given {
            request.trace = given.child(request.trace.span);
        }
        let mut aim = self.route(session, request);
        // What the cache asks for by itself has been admitted once.
        if let Ok(found) = &aim
            && session.subrequest_ctx.is_none()
            && let Err(refusal) = admit(session, request, found).await
        {
            aim = Err(refusal);
        }
        match aim {
            Ok(Aim::Here(answer)) => {
                receive_rest(session).await;
                answer.send(session, request).await?;
                Ok(true)
            }
            Ok(aim) => {
                if request.finish.compress && matches!(aim, Aim::App(_)) {
                    compress(session);
                }
                self.sample(&aim);
                if let Aim::Counter(ask) = &aim {
                    return Box::pin(self.answer_counter(session, request, ask)).await;
                }
                // In boxes of their own: what is on its way to an app does not carry room for a link.
                match request.aim.insert(aim) {
                    Aim::Object { .. } => Box::pin(self.answer_linked(session, request)).await,
                    Aim::App(_) => Box::pin(self.answer_direct(session, request)).await,
                    Aim::Counter(_) | Aim::Here(_) => Ok(false),
                }
            }
            Err(refusal) => {
                receive_rest(session).await;
                refuse(session, request, &refusal).await?;
                Ok(true)
            }
        }
    }

    /// Not before this, because an answer out of a cache needs no slot.
    async fn proxy_upstream_filter(
        &self,
        session: &mut Session,
        request: &mut Box<Request>,
    ) -> Result<bool> {
        request.cached.asked_at(self.shared.cache.moment());
        match self.take_slot(request) {
            Ok(()) => Ok(true),
            Err(problem) => {
                receive_rest(session).await;
                refuse(session, request, &problem.into()).await?;
                Ok(false)
            }
        }
    }

    async fn request_body_filter(
        &self,
        session: &mut Session,
        body: &mut Option<Bytes>,
        _end_of_stream: bool,
        request: &mut Box<Request>,
    ) -> Result<()> {
        request.body_bytes += body.as_ref().map_or(0, |bytes| bytes.len() as u64);
        let max = self.shared.requests.body_bytes_max;
        if request.body_bytes > request.body_bytes_max.map_or(max, |own| own.min(max)) {
            return Err(Error::new(BODY_TOO_LARGE));
        }
        self.check_pace(session, request)
    }

    fn request_cache_filter(
        &self,
        session: &mut Session,
        request: &mut Box<Request>,
    ) -> Result<()> {
        if request.cached.is_keyed() {
            self.shared.cache.enable(session);
        }
        Ok(())
    }

    fn cache_key_callback(
        &self,
        _session: &Session,
        request: &mut Box<Request>,
    ) -> Result<CacheKey> {
        request.cached.key()
    }

    fn response_cache_filter(
        &self,
        _session: &Session,
        response: &ResponseHeader,
        request: &mut Box<Request>,
    ) -> Result<RespCacheable> {
        Ok(request.cached.keep(response))
    }

    fn cache_vary_filter(
        &self,
        meta: &CacheMeta,
        _request: &mut Box<Request>,
        head: &RequestHeader,
    ) -> Option<HashBinary> {
        policy::variance(meta.headers(), &head.headers)
    }

    /// `None` asks whether that may be while a new answer is fetched.
    fn should_serve_stale(
        &self,
        _session: &mut Session,
        _request: &mut Box<Request>,
        error: Option<&Error>,
    ) -> bool {
        error.is_none_or(|error| *error.esource() != ErrorSource::Downstream)
    }

    async fn upstream_peer(
        &self,
        session: &mut Session,
        request: &mut Box<Request>,
    ) -> Result<Box<HttpPeer>> {
        self.begin_try(request).await;
        request.body_bytes = 0;
        match request.aim.as_mut() {
            Some(Aim::Object { target, owner }) => {
                let found = self.shared.placement.owner(target.id).map_err(|error| {
                    request.failure = Some(Failure::NotSent);
                    let mut error = Error::explain(UNROUTABLE, error.to_string());
                    error.set_retry(retry::pause(&self.shared.retry, request.tries).is_some());
                    error
                })?;
                *owner = Some(found);
                let mut peer = HttpPeer::new(found.address, false, String::new());
                peer.options.connection_timeout = Some(self.shared.requests.connect_max);
                peer.options.read_timeout = Some(self.shared.requests.silence_max);
                peer.options.write_timeout = Some(self.shared.requests.silence_max);
                peer.options.idle_timeout = Some(self.shared.requests.idle_max);
                request.bound_peer(&mut peer.options);
                Ok(Box::new(peer))
            }
            Some(Aim::App(app)) => {
                let choice = app.choose_server();
                let mut peer = choice.picked.server.peer.clone();
                if session.is_upgrade_req() {
                    // HTTP/2 has no such upgrade.
                    peer.options.alpn = ALPN::H1;
                }
                request.bound_peer(&mut peer.options);
                Ok(Box::new(peer))
            }
            Some(Aim::Counter(_) | Aim::Here(_)) | None => {
                Err(Error::explain(ErrorType::InternalError, "not routed"))
            }
        }
    }

    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        head: &mut RequestHeader,
        request: &mut Box<Request>,
    ) -> Result<()> {
        strip(head);
        pass_upgrade(session, head)?;
        head.insert_header(headers::TRACEPARENT, request.trace.to_string())?;
        match &request.aim {
            Some(Aim::Object {
                target,
                owner: Some(owner),
            }) => self.address(head, request, target, owner),
            Some(Aim::App(app)) => {
                // Which host it is for is said once: what routed it is what the server sees.
                if let Some(authority) = head.uri.authority().map(ToString::to_string) {
                    head.insert_header(HOST, authority)?;
                }
                // In origin form, however the client wrote it (RFC 9112, 3.2).
                if !head.raw_path().starts_with(b"/") {
                    let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
                    head.set_uri(uri(path)?);
                }
                if let Some(path) = &app.path_and_query {
                    head.set_uri(uri(path)?);
                }
                forwarded(session, head)?;
                join_cookies(head)?;
                if let Some(deadline) = request.deadline {
                    let left = deadline::write(deadline::left(deadline));
                    head.insert_header(deadline::TIMEOUT, left)?;
                }
                match app.upstream.host() {
                    Some(host) => head.insert_header(HOST, host),
                    None => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }

    async fn response_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        request: &mut Box<Request>,
    ) -> Result<()> {
        self.finish_answer(session, response, request)
    }

    fn response_body_filter(
        &self,
        _session: &mut Session,
        _body: &mut Option<Bytes>,
        _end_of_stream: bool,
        request: &mut Box<Request>,
    ) -> Result<Option<Duration>> {
        match request.is_overdue() {
            false => Ok(None),
            true => Err(Error::new(DEADLINE_OVER)),
        }
    }

    async fn upstream_response_filter(
        &self,
        session: &mut Session,
        response: &mut ResponseHeader,
        request: &mut Box<Request>,
    ) -> Result<()> {
        self.weigh_answer(session, response, request)
    }

    fn fail_to_connect(
        &self,
        session: &mut Session,
        _peer: &HttpPeer,
        request: &mut Box<Request>,
        error: Box<Error>,
    ) -> Box<Error> {
        self.connect_failed(session, request, error)
    }

    fn error_while_proxy(
        &self,
        _peer: &HttpPeer,
        session: &mut Session,
        error: Box<Error>,
        request: &mut Box<Request>,
        reused: bool,
    ) -> Box<Error> {
        self.try_failed(session, error, request, reused)
    }

    async fn fail_to_proxy(
        &self,
        session: &mut Session,
        error: &Error,
        request: &mut Box<Request>,
    ) -> FailToProxy {
        let broken = matches!(
            error.etype(),
            ErrorType::ReadError | ErrorType::WriteError | ErrorType::ConnectionClosed
        );
        let gone = broken && *error.esource() == ErrorSource::Downstream;
        let mut code = 0;
        if !gone && session.response_written().is_none() {
            // pingora will close the connection; the client has to be told, or it sends its next request
            // into the void.
            session.downstream_session.set_keepalive(None);
            let problem = self.problem(error, request, &session.req_header().method);
            code = problem.code.status().as_u16();
            if let Err(error) = refuse(session, request, &problem.into()).await {
                debug!(%error, "the client hung up before its refusal");
            }
        }
        FailToProxy {
            error_code: code,
            can_reuse_downstream: false,
        }
    }

    /// The caller of pingora's own warnings is the operator, who has metrics and the client's answer.
    fn suppress_error_log(
        &self,
        _session: &Session,
        _request: &Box<Request>,
        _error: &Error,
    ) -> bool {
        true
    }

    /// Tries after the first are counted, and logged with the request.
    fn suppress_proxy_warn_log(
        &self,
        _session: &Session,
        _request: &Box<Request>,
        error: &Error,
        _context: ProxyWarnLogContext,
    ) -> bool {
        debug!(%error, "a try failed");
        true
    }

    async fn logging(
        &self,
        session: &mut Session,
        error: Option<&Error>,
        request: &mut Box<Request>,
    ) {
        let took = request.begun.elapsed();
        if session.subrequest_ctx.is_some() {
            self.shared.metrics.cache.refreshes.increment(1);
            return;
        }
        if let Some(carrier) = Carrier::of(session) {
            carrier.set_phase(false);
        }
        request
            .cached
            .count(session, &self.shared.metrics, &request.label);
        let code = match (request.refused, session.response_written()) {
            (Some(refused), _) => Code::Refused(refused),
            (None, Some(response)) => Code::Status(response.status.as_u16()),
            (None, None) => Code::Gone,
        };
        self.shared.metrics.request(&request.label, code, took);
        log(session, error, request, code, took);
        let dynamic = self.shared.dynamic.load();
        let status = session
            .response_written()
            .map_or(0, |head| head.status.as_u16());
        if let Some(log) = &dynamic.access_log
            && log.wants(status)
        {
            self.write_down(log, &self.asked(session, &dynamic), session, request, took);
        }
    }
}

impl Proxy {
    /// Makes the request one for a worker.
    fn address(
        &self,
        head: &mut RequestHeader,
        request: &Request,
        target: &ObjectTarget,
        owner: &Owner,
    ) -> Result<()> {
        head.insert_header(headers::CLASS, target.class.as_str())?;
        head.insert_header(headers::OBJECT, target.id.to_string())?;
        if let Some(name) = &target.name {
            head.insert_header(headers::NAME, headers::encode_name(name).as_ref())?;
        }
        head.insert_header(headers::SHARD, HeaderValue::from(owner.shard.0))?;
        head.insert_header(headers::EPOCH, HeaderValue::from(owner.epoch.0.get()))?;
        head.insert_header(headers::COLO, request.colo.as_str())?;
        head.insert_header(headers::REQUEST, request.id())?;
        if let Some(deadline) = request.deadline {
            let left_ms = deadline::left(deadline).as_millis().max(1);
            head.insert_header(headers::TIMEOUT, left_ms.to_string())?;
        }
        if let Some(token) = &self.shared.token {
            head.insert_header(headers::TOKEN, token.clone())?;
        }
        match request.creation {
            Creation::Free => {}
            Creation::Charged(_) => {
                head.insert_header(headers::NEW_OBJECT, headers::NEW_OBJECT_TELL)?
            }
            Creation::Forbidden => {
                head.insert_header(headers::NEW_OBJECT, headers::NEW_OBJECT_REFUSE)?;
            }
        }
        let path = match &target.ask {
            Ask::Fetch { path_and_query } => path_and_query.as_str(),
            Ask::Call { method } => {
                head.insert_header(headers::METHOD, method.as_str())?;
                "/"
            }
            Ask::Create => {
                head.insert_header(headers::CREATE, "1")?;
                "/"
            }
            Ask::Own { method } => {
                head.insert_header(headers::METHOD, *method)?;
                head.insert_header(headers::INTERNAL, "1")?;
                "/"
            }
        };
        head.set_uri(uri(path)?);
        Ok(())
    }
}
