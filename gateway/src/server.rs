//! One process: its threads, its admin listener, its start and its end.
//!
//! Each thread has a runtime, a listener on the shared port (SO_REUSEPORT spreads the connections)
//! and a pingora proxy with its own pool of upstream connections: a request never leaves its thread.

use std::collections::BTreeMap;
use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use arc_swap::ArcSwap;
use metrics_exporter_prometheus::PrometheusHandle;
use ops::Causes;
use ops::admin::{self, Admin, Page};
use ops::config::{ConfigError, non_empty, token_header};
use ops::metrics::Registry;
use ops::operator::Front;
use ops::process::{self, Order, Signals};
use ops::watch::Watch;
use pingora_core::apps::HttpServerApp;
use pingora_core::server::configuration::ServerConf;
use pingora_proxy::HttpProxy;
use protocol::RingVersion;
use protocol::ring::RingDocument;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::access_log::OpenError;
use crate::config::{Args, Config};
use crate::downstream::certificates::{Certificates, Resolver};
use crate::downstream::{self, Doors, Unwrap, acceptor, listen};
use crate::hot::Hot;
use crate::limit::shared::Link;
use crate::link::Links;
use crate::metrics::Metrics;
use crate::placement::{Placement, RingSource};
use crate::proxy::{Dynamic, Proxy, Shared};
use crate::upstream::UpstreamError;
use crate::upstream::tls::authorities_file;

/// How long a starting gateway waits for its first ring before it says that it is ready.
const SETTLE_MAX: Duration = Duration::from_secs(1);

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
    /// Whether a ring is to be expected.
    for_objects: bool,
}

impl Gateway {
    /// Binds the port and starts the threads. When it returns, the gateway serves. Needs a tokio
    /// runtime for the background task that keeps the ring.
    pub async fn start(config: &Config, ring: RingFrom) -> Result<Self, StartError> {
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
        let shared = Arc::new(Shared {
            colo: link.colo,
            token: link.token.clone(),
            requests: config.requests.clone(),
            retry: config.retry.clone(),
            placement: Arc::clone(&link.placement),
            dynamic: ArcSwap::from_pointee(dynamic),
            metrics,
            hot_objects: Hot::default(),
        });
        let certificates = Certificates::new(&config.certificates);
        let certificates = certificates.map_err(|broken| broken.under("certificates"));
        let certificates = Arc::new(ArcSwap::from_pointee(
            certificates.map_err(ConfigError::from)?,
        ));
        let (listeners, address) = bind(&config.listen, config.thread_count())?;
        let mut tls_listeners = Vec::new();
        let mut tls_address = None;
        if let Some(wanted) = non_empty(&config.tls_listen) {
            let (bound, address) = bind(wanted, config.thread_count())?;
            (tls_listeners, tls_address) = (bound, Some(address));
        }
        let resolver = Resolver(Arc::clone(&certificates));
        let unwrap = Unwrap {
            tls: tls_address.map(|_| acceptor(resolver, config.http2)),
            http_2: config.http2,
            proxy_protocol: config.client.proxy_protocol,
        };
        let mut tls_listeners = tls_listeners.into_iter();
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
        let mut threads = Vec::with_capacity(listeners.len());
        for (number, listener) in listeners.into_iter().enumerate() {
            let thread = Thread {
                listener,
                tls_listener: tls_listeners.next(),
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
            for_objects,
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
        let settled = async {
            while self.shared.placement.version().is_none() {
                self.shared.placement.refresh().await;
            }
        };
        if tokio::time::timeout(SETTLE_MAX, settled).await.is_err() {
            warn!(
                "no node has shown its ring yet; requests for objects are refused until one does"
            );
        }
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
            return Err("no server of any upstream is well".to_owned());
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

    /// Stops accepting, lets requests under way finish, and ends the threads. Takes at most
    /// `drain_max`. Blocks.
    pub fn shut_down(self) {
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

/// Sockets on one port, one per thread, and their address.
fn bind(
    address: &str,
    threads: usize,
) -> Result<(Vec<std::net::TcpListener>, SocketAddr), StartError> {
    let failed = |source| StartError::Listen {
        address: address.to_owned(),
        source,
    };
    let listeners = listen(address, threads).map_err(failed)?;
    let bound = listeners[0].local_addr().map_err(failed)?;
    Ok((listeners, bound))
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
    listener: std::net::TcpListener,
    tls_listener: Option<std::net::TcpListener>,
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
        let links = Links::new(self.shared.token.clone(), requests, count);
        let proxy = Proxy(Arc::clone(&self.shared), links);
        let mut proxy = HttpProxy::new(proxy, Arc::clone(&self.conf));
        proxy.handle_init_modules();
        let proxy = Arc::new(proxy);
        let tls = self.tls_listener.map(TcpListener::from_std).transpose();
        let doors = TcpListener::from_std(self.listener).and_then(|plain| {
            let tls = tls?;
            Ok(Doors { plain, tls })
        });
        let doors = match doors {
            Ok(doors) => doors,
            Err(error) => {
                warn!(error = %Causes(&error), "the listener cannot be used");
                return;
            }
        };
        let mut connections =
            downstream::serve(doors, &proxy, &self.shared, &self.unwrap, self.stop).await;
        // Connections that wait for a next request close; the others finish theirs.
        proxy.http_cleanup().await;
        let drained = tokio::time::timeout(self.drain_max, async {
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

    fn page(&self, _method: &http::Method, path: &str) -> Option<Page> {
        let shared = &self.gateway.shared;
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

/// The whole life of the process `gateway`.
pub fn main(args: &Args) -> ExitCode {
    process::exit_code("gateway", run(args))
}

fn run(args: &Args) -> Result<(), Box<dyn Error + Send + Sync>> {
    let config = args.load()?;
    if args.process.check {
        token_header(&config.token)?;
        for warning in config.warnings() {
            process::print_line(&format!("warning: {warning}"));
        }
        process::print_line("the configuration is valid");
        return Ok(());
    }
    let runtime = process::begin(&args.process.log, "info")?;
    runtime.block_on(serve(&config, args.process.config.clone()))
}

async fn serve(config: &Config, file: Option<PathBuf>) -> Result<(), Box<dyn Error + Send + Sync>> {
    let mut signals = Signals::listen()?;
    let admin_listener = admin::bind(&config.admin_listen).await?;
    let admin_address = admin_listener.local_addr()?;
    let gateway = Arc::new(Gateway::start(config, RingFrom::Nodes).await?);
    let handle = gateway.registry().handle();
    let upkeep = tokio::spawn(ops::metrics::upkeep(handle.clone()));
    let pages = Arc::new(GatewayAdmin {
        gateway: Arc::clone(&gateway),
        metrics: handle,
    });
    let token = non_empty(&config.admin_token).map(Arc::from);
    let admin = tokio::spawn(admin::serve(admin_listener, token, pages));
    gateway.settle().await;
    process::print_line(&format!(
        "ready http://{} admin http://{admin_address}{}",
        gateway.address(),
        gateway
            .tls_address()
            .map_or_else(String::new, |address| format!(" tls https://{address}"))
    ));
    Reloader::new(&gateway, file, config.watch_every)
        .until_stopped(&mut signals)
        .await;
    info!("stopping");
    upkeep.abort();
    admin.abort();
    // Cancelled: that is what was asked for.
    drop(admin.await);
    let gateway = Arc::into_inner(gateway).ok_or("the admin listener still runs")?;
    tokio::task::spawn_blocking(move || gateway.shut_down()).await?;
    Ok(())
}

/// Reads the config file again when it, or a file that it names, changes, or when somebody says so.
pub struct Reloader<'a> {
    gateway: &'a Gateway,
    file: Option<PathBuf>,
    watch: Watch,
    /// What the file said when the gateway started.
    begun: Config,
}

impl<'a> Reloader<'a> {
    /// `every` is how often the file is looked at; 0 is never.
    pub fn new(gateway: &'a Gateway, file: Option<PathBuf>, every: Duration) -> Self {
        let begun = file
            .as_deref()
            .and_then(|file| crate::config::read(file).ok());
        let begun = begun.unwrap_or_default();
        Self {
            gateway,
            watch: Watch::new(watched(file.as_ref(), &begun), every),
            begun,
            file,
        }
    }

    /// Returns when the process is to stop.
    pub async fn until_stopped(mut self, signals: &mut Signals) {
        loop {
            tokio::select! {
                order = signals.next() => match order {
                    Order::Reload => self.reload().await,
                    Order::Stop => return,
                },
                () = self.watch.changed() => self.reload().await,
            }
        }
    }

    /// Whatever is wrong with the file changes nothing.
    async fn reload(&mut self) {
        let Some(file) = &self.file else {
            warn!("nothing to reload: there is no config file");
            return;
        };
        let reloaded = match crate::config::read(file) {
            Ok(config) => self.gateway.reload(&config).await.map(|()| config),
            Err(error) => Err(error.into()),
        };
        let error = match reloaded {
            Ok(config) => {
                info!(file = %file.display(), "config reloaded");
                let waiting = config.differences_that_wait(&self.begun);
                if !waiting.is_empty() {
                    warn!(
                        keys = waiting.join(", "),
                        "these keys take effect at the next start"
                    );
                }
                self.watch.look_at(watched(Some(file), &config));
                return;
            }
            Err(StartError::Config(error)) => StartError::Config(error.located(Some(file))),
            Err(error) => error,
        };
        warn!(error = %Causes(&error), "reload refused; nothing has changed");
    }
}

/// The config file, and the files that it names.
fn watched(file: Option<&PathBuf>, config: &Config) -> Vec<PathBuf> {
    file.cloned().into_iter().chain(config.files()).collect()
}
