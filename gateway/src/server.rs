//! One gateway: its threads, what it shows its operator, its start and its end.
//!
//! Each thread has a runtime, a listener on the shared port (SO_REUSEPORT spreads the connections)
//! and a pingora proxy with its own pool of upstream connections: a request never leaves its thread.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use arc_swap::ArcSwap;
use metrics_exporter_prometheus::PrometheusHandle;
use ops::Causes;
use ops::admin::{self, Admin, Page};
use ops::config::{ConfigError, non_empty, token_header};
use ops::metrics::Registry;
use ops::operator::Front;
use pingora_core::apps::HttpServerApp;
use pingora_core::server::configuration::ServerConf;
use pingora_proxy::HttpProxy;
use protocol::RingVersion;
use protocol::ring::RingDocument;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::access_log::OpenError;
use crate::cache::Cache;
use crate::cache::peers::Peer;
use crate::config::Config;
use crate::counters::Counters;
use crate::counters::plans::Plans;
use crate::downstream::certificates::{Certificates, Resolver};
use crate::downstream::crowd::Crowd;
use crate::downstream::{self, Doors, PATIENCE, Unwrap, acceptor, listen};
use crate::hot::Hot;
use crate::limit::shared::Link;
use crate::link::Links;
use crate::metrics::Metrics;
use crate::placement::{Placement, RingSource};
use crate::proxy::{Dynamic, Proxy, Shared};
use crate::upgrade::{Kind, Sockets};
use crate::upstream::UpstreamError;
use crate::upstream::connections::Connections;
use crate::upstream::tls::authorities_file;

mod process;

pub use process::{Reloader, main};

/// How long a starting gateway waits for its first ring before it says that it is ready.
const SETTLE_MAX: Duration = Duration::from_secs(1);

/// The same for one that takes over from another: that one goes on meanwhile.
const INHERIT_MAX: Duration = Duration::from_secs(10);

/// Why a gateway did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Upstream(#[from] UpstreamError),
    #[error(transparent)]
    AccessLog(#[from] OpenError),
    #[error("the gateway cannot listen on {address}")]
    Listen { address: String, source: io::Error },
    #[error("start a thread")]
    Thread { source: io::Error },
}

/// Where a gateway gets its ring from.
pub enum RingFrom {
    /// The nodes of the configuration, asked again and again.
    Nodes,
    /// A node in the same process.
    Document(RingDocument),
}

/// A running gateway. Dropping it without [`shut_down`](Self::shut_down) leaves the threads running.
pub struct Gateway {
    address: SocketAddr,
    tls_address: Option<SocketAddr>,
    certificates: Arc<ArcSwap<Certificates>>,
    shared: Arc<Shared>,
    link: Link,
    registry: Arc<Registry>,
    stop: watch::Sender<bool>,
    threads: Vec<JoinHandle<()>>,
    keeper: Option<tokio::task::JoinHandle<()>>,
    /// Asks other gateways for their purges.
    peers: JoinSet<()>,
    /// Whether a ring is to be expected.
    for_objects: bool,
    /// All that it listens on.
    sockets: Sockets,
}

impl Gateway {
    /// Binds the port and starts the threads. When it returns, the gateway serves. Needs a tokio
    /// runtime for the background task that keeps the ring.
    pub async fn start(config: &Config, ring: RingFrom) -> Result<Self, StartError> {
        Self::start_with(config, ring, &mut Sockets::default()).await
    }

    /// The same, with sockets that another gateway listens on. What is not taken of them is left.
    pub async fn start_with(
        config: &Config,
        ring: RingFrom,
        inherited: &mut Sockets,
    ) -> Result<Self, StartError> {
        config.validate()?;
        warn_of(config);
        let registry = Arc::new(Registry::default());
        let metrics = Metrics::new(Arc::clone(&registry));
        let link = Link {
            placement: Arc::new(Placement::default()),
            token: token_header(&config.token)?,
            colo: config.site()?,
            runtime: tokio::runtime::Handle::current(),
        };
        let dynamic = Dynamic::new(config, None, &metrics, &link).await?;
        let plans = Plans::new(metrics.counters());
        let shared = Arc::new(Shared {
            colo: link.colo,
            token: link.token.clone(),
            connections: config.connections.clone(),
            crowd: Crowd::new(&config.connections),
            requests: config.requests.clone(),
            retry: config.retry.clone(),
            placement: Arc::clone(&link.placement),
            dynamic: ArcSwap::from_pointee(dynamic),
            cache: Cache::new(&config.cache, &metrics),
            relieved: AtomicBool::new(false),
            metrics,
            hot_objects: Hot::default(),
            plans,
        });
        let peers = follow_peers(config, &shared)?;
        let certificates = Certificates::new(&config.certificates);
        let certificates = certificates.map_err(|broken| broken.under("certificates"));
        let certificates = Arc::new(ArcSwap::from_pointee(
            certificates.map_err(ConfigError::from)?,
        ));
        let doors = Bound::new(config, inherited)?;
        let (address, tls_address) = (doors.address, doors.tls_address);
        let resolver = Resolver(Arc::clone(&certificates));
        let unwrap = Unwrap {
            tls: tls_address.map(|_| acceptor(resolver, config.http2)),
            http_2: config.http2,
            proxy_protocol: config.client.proxy_protocol,
        };
        let for_objects = matches!(ring, RingFrom::Document(_)) || !config.nodes.is_empty();
        let keeper = match ring {
            RingFrom::Document(document) => {
                shared.placement.install(document).await;
                None
            }
            // Nothing but apps.
            RingFrom::Nodes if config.nodes.is_empty() => None,
            RingFrom::Nodes => {
                let source = RingSource {
                    nodes: config.nodes.clone(),
                    token: token_header(&config.token)?,
                };
                let keep = Arc::clone(&shared.placement).keep(source, config.retry.ring_refresh);
                Some(tokio::spawn(keep))
            }
        };
        let (stop, stopped) = watch::channel(false);
        let conf = Arc::new(server_conf(config));
        if doors.is_inherited && for_objects {
            // Requests come at once, and the other gateway can still answer them.
            ring_known(&shared.placement, INHERIT_MAX).await;
        }
        let mut threads = Vec::with_capacity(config.thread_count());
        for (number, (plain, tls)) in doors.per_thread.into_iter().enumerate() {
            let thread = Thread {
                plain,
                tls,
                unwrap: unwrap.clone(),
                shared: Arc::clone(&shared),
                conf: Arc::clone(&conf),
                drain_max: config.drain_max,
                stop: stopped.clone(),
            };
            threads.push(
                thread
                    .spawn(number)
                    .map_err(|source| StartError::Thread { source })?,
            );
        }
        info!(%address, threads = threads.len(), "gateway started");
        Ok(Self {
            address,
            tls_address,
            certificates,
            shared,
            link,
            registry,
            stop,
            threads,
            keeper,
            peers,
            for_objects,
            sockets: doors.sockets,
        })
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where clients connect with TLS.
    pub fn tls_address(&self) -> Option<SocketAddr> {
        self.tls_address
    }

    pub fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// Waits until requests for objects can be routed, but not for ever: apps can be served before.
    pub async fn settle(&self) {
        if !self.for_objects {
            return;
        }
        if !ring_known(&self.shared.placement, SETTLE_MAX).await {
            warn!(
                "no node has shown its ring yet; requests for objects are refused until one does"
            );
        }
    }

    /// What a successor takes over.
    pub fn sockets(&mut self) -> &mut Sockets {
        &mut self.sockets
    }

    pub fn cache(&self) -> &'static Cache {
        self.shared.cache
    }

    /// Takes the routes and upstreams of a new configuration. Requests under way keep the old ones.
    pub async fn reload(&self, config: &Config) -> Result<(), StartError> {
        config.validate()?;
        warn_of(config);
        let certificates = Certificates::new(&config.certificates);
        let certificates = certificates.map_err(|broken| broken.under("certificates"));
        let certificates = certificates.map_err(ConfigError::from)?;
        let before = self.shared.dynamic.load_full();
        let shared = &self.shared;
        let dynamic = Dynamic::new(config, Some(&before), &shared.metrics, &self.link).await?;
        self.shared.dynamic.store(Arc::new(dynamic));
        self.certificates.store(Arc::new(certificates));
        Ok(())
    }

    /// Whether this gateway can do what it is there for: route requests for objects, if it knows of nodes,
    /// and reach some app, if it knows of upstreams.
    pub fn health(&self) -> Result<(), String> {
        if self.threads.iter().any(JoinHandle::is_finished) {
            return Err("a thread ended".to_owned());
        }
        if self.for_objects && self.shared.placement.version().is_none() {
            return Err("no node has told this gateway its ring yet".to_owned());
        }
        let upstreams = &self.shared.dynamic.load().upstreams;
        if !upstreams.is_empty() && !upstreams.values().any(|upstream| upstream.is_available()) {
            let mut names: Vec<&str> = upstreams.keys().map(String::as_str).collect();
            names.sort_unstable();
            let names = names.join(", ");
            return Err(format!("no server of any upstream is well ({names})"));
        }
        Ok(())
    }

    /// All metrics as Prometheus text.
    pub fn render_metrics(&self) -> String {
        self.measure();
        self.registry.handle().render()
    }

    /// Brings gauges up to date that nobody sets as things happen.
    fn measure(&self) {
        let version = self.shared.placement.version();
        let version = version.map_or(0, |RingVersion(version)| version.get());
        let metrics = &self.shared.metrics;
        metrics.ring_version.set(version as f64);
        let dynamic = self.shared.dynamic.load();
        dynamic.rules.publish();
        self.shared.cache.publish();
        self.shared.plans.publish();
        if let Some(shedder) = &dynamic.objects {
            shedder.measure();
        }
        dynamic
            .upstreams
            .values()
            .for_each(|upstream| upstream.measure());
        for certificate in self.certificates.load().iter() {
            let name = certificate.names.first().map_or("", String::as_str);
            metrics
                .certificate_expiry(name)
                .set(certificate.expires as f64);
        }
        for route in dynamic.routes.iter() {
            if let Some(skew) = route.skew() {
                metrics.shard_skew(&route.label).set(skew);
            }
        }
    }

    /// Stops accepting, because another process does so on the same sockets. Blocks nobody;
    /// [`shut_down`](Self::shut_down) waits for the end.
    pub fn leave(&self) {
        self.shared.relieved.store(true, Ordering::Relaxed);
        self.stop.send_replace(true);
    }

    /// Stops accepting, lets requests under way finish, and ends the threads. Takes at most
    /// `drain_max`. Blocks.
    pub fn shut_down(mut self) {
        // Else connections would wait in queues that nobody looks at.
        self.sockets = Sockets::default();
        self.peers.abort_all();
        // Threads hold the receivers; if all are gone there is nobody to tell.
        self.stop.send_replace(true);
        if let Some(keeper) = self.keeper {
            keeper.abort();
        }
        for thread in self.threads {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
        if let Some(log) = &self.shared.dynamic.load().access_log {
            log.flush();
        }
    }
}

/// Hears of what other gateways purge.
fn follow_peers(config: &Config, shared: &Shared) -> Result<JoinSet<()>, StartError> {
    let token = non_empty(&config.admin_token).map(|token| format!("Bearer {token}"));
    let token = token.as_deref().map(token_header).transpose()?.flatten();
    let mut following = JoinSet::new();
    for address in &config.cache.peers {
        let peer = Peer::new(address.clone(), token.clone());
        let metrics = shared.metrics.cache.clone();
        following.spawn(peer.follow(shared.cache, config.cache.peers_every, metrics));
    }
    Ok(following)
}

/// Sockets for all threads.
struct Bound {
    address: SocketAddr,
    tls_address: Option<SocketAddr>,
    /// Of each thread, those for plain connections and those for TLS.
    per_thread: Vec<(Vec<TcpListener>, Vec<TcpListener>)>,
    /// All of them once more.
    sockets: Sockets,
    is_inherited: bool,
}

impl Bound {
    fn new(config: &Config, inherited: &mut Sockets) -> Result<Self, StartError> {
        let threads = config.thread_count();
        let mut all = Self {
            address: SocketAddr::from(([0, 0, 0, 0], 0)),
            tls_address: None,
            per_thread: (0..threads).map(|_| Default::default()).collect(),
            sockets: Sockets::default(),
            is_inherited: false,
        };
        all.address = all.bind(Kind::Plain, &config.listen, inherited)?;
        if let Some(wanted) = non_empty(&config.tls_listen) {
            all.tls_address = Some(all.bind(Kind::Tls, wanted, inherited)?);
        }
        Ok(all)
    }

    fn bind(
        &mut self,
        kind: Kind,
        address: &str,
        inherited: &mut Sockets,
    ) -> Result<SocketAddr, StartError> {
        let failed = |source| StartError::Listen {
            address: address.to_owned(),
            source,
        };
        let threads = self.per_thread.len();
        let inherited = inherited.take(kind, address).map_err(failed)?;
        self.is_inherited |= !inherited.is_empty();
        let listeners = listen(address, threads, inherited).map_err(failed)?;
        let bound = listeners[0].local_addr().map_err(failed)?;
        for (number, listener) in listeners.into_iter().enumerate() {
            let copy = listener.try_clone().map_err(failed)?;
            self.sockets.push(kind, copy);
            let (plain, tls) = &mut self.per_thread[number % threads];
            match kind {
                Kind::Tls => tls.push(listener),
                Kind::Plain | Kind::Admin => plain.push(listener),
            }
        }
        Ok(bound)
    }
}

/// Waits for a ring; whether there is one.
async fn ring_known(placement: &Placement, at_most: Duration) -> bool {
    let known = async {
        while placement.version().is_none() {
            placement.refresh().await;
        }
    };
    tokio::time::timeout(at_most, known).await.is_ok()
}

fn warn_of(config: &Config) {
    for warning in config.warnings() {
        warn!(warning, "the configuration is legal, but unusual");
    }
}

fn server_conf(config: &Config) -> ServerConf {
    ServerConf {
        threads: 1,
        work_stealing: false,
        ca_file: authorities_file(),
        upstream_keepalive_pool_size: config.requests.idle_connections_max as usize,
        // The proxy decides itself what is tried again; this only must not be less.
        max_retries: config.retry.tries_max.max(crate::upstream::TRIES_MAX) as usize + 1,
        ..ServerConf::default()
    }
}

/// One thread with everything it owns.
struct Thread {
    plain: Vec<TcpListener>,
    tls: Vec<TcpListener>,
    unwrap: Unwrap,
    shared: Arc<Shared>,
    conf: Arc<ServerConf>,
    drain_max: Duration,
    stop: watch::Receiver<bool>,
}

impl Thread {
    fn spawn(self, number: usize) -> io::Result<JoinHandle<()>> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        std::thread::Builder::new()
            .name(format!("gateway-{number}"))
            .spawn(move || runtime.block_on(self.run()))
    }

    async fn run(self) {
        let requests = &self.shared.requests;
        let count = self.shared.metrics.links.clone();
        let links = Arc::new(Links::new(self.shared.token.clone(), requests, count));
        let counters = Counters::new(Arc::clone(&self.shared), Arc::clone(&links));
        let connections = Arc::new(Connections::new(requests.idle_connections_max as usize));
        tokio::spawn(connections.keep());
        let proxy = Proxy {
            shared: Arc::clone(&self.shared),
            links,
            counters: Arc::new(counters),
            connections,
        };
        let mut proxy = HttpProxy::new(proxy, Arc::clone(&self.conf));
        proxy.handle_init_modules();
        (proxy.h2_options, proxy.server_options) = downstream::http_2(&self.shared.connections);
        let proxy = Arc::new(proxy);
        let doors = match Doors::new(self.plain, self.tls) {
            Ok(doors) => doors,
            Err(error) => {
                warn!(error = %Causes(&error), "the listener cannot be used");
                return;
            }
        };
        let mut connections =
            downstream::serve(doors, &proxy, &self.shared, &self.unwrap, self.stop).await;
        let begun = Instant::now();
        if self.shared.relieved.load(Ordering::Relaxed) {
            // Those that wait for a next request are told with its answer that it was the last.
            let patience = PATIENCE.min(self.drain_max);
            let ended = async { while connections.join_next().await.is_some() {} };
            // Who has not asked by then may be cut off.
            drop(tokio::time::timeout(patience, ended).await);
        }
        // Connections that wait for a next request close; the others finish theirs.
        proxy.http_cleanup().await;
        let drained = tokio::time::timeout_at(begun + self.drain_max, async {
            while connections.join_next().await.is_some() {}
        });
        if drained.await.is_err() {
            warn!(
                connections = connections.len(),
                "drain took too long; connections are cut"
            );
        }
    }
}

/// What a gateway shows its operator.
pub struct GatewayAdmin {
    pub gateway: Arc<Gateway>,
    pub metrics: PrometheusHandle,
}

impl Admin for GatewayAdmin {
    fn metrics(&self) -> String {
        self.gateway.measure();
        self.metrics.render()
    }

    fn ready(&self) -> Result<(), String> {
        self.gateway.health()
    }

    fn page(&self, method: &http::Method, path: &str, query: Option<&str>) -> Option<Page> {
        let shared = &self.gateway.shared;
        if path.starts_with("/cache") {
            let plans = &shared.dynamic.load().plans;
            return crate::cache::operator::page(shared.cache, plans, method, path, query);
        }
        match path {
            "/ring" => Some(match shared.placement.document() {
                Some(document) => admin::json(&document),
                None => admin::refusal(&protocol::Problem::unavailable(
                    "no node has told this gateway its ring yet",
                )),
            }),
            "/hot" => Some(admin::json(&serde_json::json!({
                "objects": shared.hot_objects.top(),
                "limits": shared.dynamic.load().rules.hot(),
            }))),
            "/upstreams" => {
                let dynamic = shared.dynamic.load();
                let pools = dynamic.upstreams.iter();
                let pools: BTreeMap<_, _> =
                    pools.map(|(name, pool)| (name, pool.state())).collect();
                Some(admin::json(&pools))
            }
            _ => None,
        }
    }

    fn front(&self) -> Option<Front> {
        let shared = &self.gateway.shared;
        Some(Front {
            ring: shared.placement.ring(),
            node: None,
            token: shared.token.clone(),
        })
    }
}
