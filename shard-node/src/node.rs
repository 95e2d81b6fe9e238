//! One process: its workers, its admin listener, its start and its end.

use std::error::Error;
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use http::HeaderValue;
use metrics_exporter_prometheus::PrometheusHandle;
use ops::admin::{self, Admin, Page};
use ops::config::{ConfigError, non_empty, token_header};
use ops::metrics::Registry;
use ops::operator::Front;
use ops::process::{self, Signals};
use protocol::Ring;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::advice::Advice;
use crate::archive::{Archive, ArchiveError};
use crate::classes::Classes;
use crate::clock::{Clock, SystemClock};
use crate::config::{Args, Config};
use crate::data_dir::{DataDir, DataDirError};
use crate::expiry::{self, open_stores};
use crate::host::HostConfig;
use crate::storage::heap;
use crate::storage::logged::OpenError;
use crate::store::StoreError;
use crate::worker::{Order, Worker};

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error("worker {worker} cannot listen on {address}")]
    Listen {
        worker: u16,
        address: String,
        source: io::Error,
    },
    #[error("the address {address:?} is not valid")]
    Address { address: String, source: io::Error },
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error("open where databases of expired objects go")]
    Store(#[from] StoreError),
    #[error("start worker {worker}")]
    Thread { worker: u16, source: io::Error },
    #[error("recover worker {worker}")]
    Recover { worker: u16, source: OpenError },
}

/// A running node. Dropping it without [`shut_down`](Self::shut_down) leaves the threads running.
pub struct Node {
    ring: Arc<Ring>,
    addresses: Vec<SocketAddr>,
    registry: Arc<Registry>,
    name: String,
    /// What workers want from whoever speaks for a gateway.
    token: Option<HeaderValue>,
    order: watch::Sender<Order>,
    threads: Vec<JoinHandle<()>>,
    /// Released last.
    data_dir: DataDir,
}

impl Node {
    /// Locks the data directory, binds every worker's port and starts the workers. When it returns,
    /// the node serves.
    pub fn start(config: &Config, classes: &Classes) -> Result<Self, StartError> {
        config.validate()?;
        if !heap::install() {
            warn!("SQLite was in use before the node: sql.memory_bytes_max has no effect");
        }
        let data_dir = DataDir::open(&config.data_dir, config.ring.shards)?;
        let token = token_header(&config.token)?;
        let listeners = listen(&config.listen, config.worker_count())?;
        let addresses: Vec<SocketAddr> = listeners
            .iter()
            .map(TcpListener::local_addr)
            .collect::<io::Result<_>>()
            .map_err(|source| StartError::Address {
                address: config.listen.clone(),
                source,
            })?;
        let ring = Arc::new(config.ring(addresses.iter().map(ToString::to_string).collect())?);
        let registry = Arc::new(Registry::default());
        classes.iter().for_each(|class| class.register(&registry));
        let (order, orders) = watch::channel(Order::Recover);
        let mut orphans = data_dir.workers_from(config.worker_count())?;
        let disks: Vec<_> = listeners
            .iter()
            .map(|_| data_dir.disk())
            .collect::<Result<_, _>>()?;
        let archive = Archive::open(&config.archive, data_dir.path(), &config.name)?;
        let mut recovering = Vec::new();
        let host = HostConfig {
            mailbox: config.mailbox.clone(),
            objects: config.objects.clone(),
            sql: Arc::new(config.sql.clone()),
            alarms: config.alarms.clone(),
            expiry: Arc::new(config.expiry.clone()),
        };
        let unknown = config.expiry.classes.keys();
        let mut unknown = unknown.filter(|class| !classes.has(class));
        if let Some(class) = unknown.next() {
            return Err(StartError::Config(ConfigError::Rule(format!(
                "expiry.classes.{class} is no class of this node, which has {}",
                classes.names()
            ))));
        }
        let expired_to = open_stores(&config.expiry)?;
        let expires_since =
            expiry::since(&config.expiry, data_dir.path(), SystemClock.unix_millis());
        let expires_since = Arc::new(expires_since.map_err(StoreError::from)?);
        let advice = Advice::new(&registry);
        let mut threads = Vec::with_capacity(listeners.len());
        for (number, (listener, disk)) in (0..).zip(listeners.into_iter().zip(disks)) {
            let me = ring
                .workers()
                .iter()
                .position(|worker| worker.node == config.name && worker.index == number)
                .expect("validate() made sure that the ring has all workers of this node");
            let (recovered, told) = mpsc::sync_channel(1);
            recovering.push((number, told));
            let worker = Worker {
                number,
                me,
                listener,
                ring: Arc::clone(&ring),
                classes: classes.clone(),
                host: host.clone(),
                data_dir: data_dir.path().to_owned(),
                spool: data_dir.spool(),
                token: non_empty(&config.token).map(Arc::from),
                clock: Arc::new(SystemClock),
                registry: Arc::clone(&registry),
                drain_max: config.drain_max,
                disk,
                archive: archive.clone(),
                expired_to: expired_to.clone(),
                expires_since: Arc::clone(&expires_since),
                log: config.log.clone(),
                advisor: Arc::new(config.advisor.clone()),
                advice: Arc::clone(&advice),
                orphans: std::mem::take(&mut orphans),
                recovered,
                order: orders.clone(),
            };
            let thread = match worker.spawn() {
                Ok(thread) => thread,
                Err(source) => {
                    give_up(order, threads);
                    return Err(StartError::Thread {
                        worker: number,
                        source,
                    });
                }
            };
            threads.push(thread);
        }
        for (worker, told) in recovering {
            // A worker that ends without a word has aborted the process.
            if let Ok(Err(source)) = told.recv() {
                give_up(order, threads);
                return Err(StartError::Recover { worker, source });
            }
        }
        process::raise_descriptor_limit();
        order.send_replace(Order::Serve);
        info!(node = config.name, workers = threads.len(), data_dir = %data_dir.path().display(), "node started");
        Ok(Self {
            ring,
            addresses,
            registry,
            name: config.name.clone(),
            token,
            order,
            threads,
            data_dir,
        })
    }

    /// Where the workers listen.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    pub fn ring(&self) -> &Arc<Ring> {
        &self.ring
    }

    pub fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    pub fn data_dir(&self) -> &Path {
        self.data_dir.path()
    }

    /// Whether all workers still run; an error names one that does not.
    pub fn health(&self) -> Result<(), String> {
        match self.threads.iter().position(JoinHandle::is_finished) {
            None => Ok(()),
            Some(worker) => Err(format!("worker {worker} ended")),
        }
    }

    /// Stops accepting, lets requests under way finish, closes all databases and ends the threads.
    /// Takes at most `drain_max` and the time of the closing. Blocks.
    pub fn shut_down(self) {
        // Workers hold the receivers; if all are gone there is nobody to tell.
        self.order.send_replace(Order::Stop);
        for thread in self.threads {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
        drop(self.data_dir);
    }
}

/// Ends workers that were started in vain. They may still write to the directory, which is ours until then.
fn give_up(order: watch::Sender<Order>, threads: Vec<JoinHandle<()>>) {
    drop(order);
    for thread in threads {
        // A panic there has aborted the process.
        drop(thread.join());
    }
}

/// One listener per worker on consecutive ports; with port 0, each on a free one.
fn listen(address: &str, workers: u16) -> Result<Vec<TcpListener>, StartError> {
    let invalid = |source| StartError::Address {
        address: address.to_owned(),
        source,
    };
    let first = address
        .to_socket_addrs()
        .map_err(invalid)?
        .next()
        .ok_or_else(|| invalid(io::Error::other("it resolves to nothing")))?;
    (0..workers)
        .map(|worker| {
            let mut address = first;
            if first.port() != 0 {
                let port = first.port().checked_add(worker).ok_or_else(|| {
                    invalid(io::Error::other(
                        "the last workers would need ports above 65535",
                    ))
                })?;
                address.set_port(port);
            }
            TcpListener::bind(address)
                .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
                .map_err(|source| StartError::Listen {
                    worker,
                    address: address.to_string(),
                    source,
                })
        })
        .collect()
}

/// What a node shows its operator.
struct NodeAdmin {
    node: Arc<Node>,
    metrics: PrometheusHandle,
}

impl Admin for NodeAdmin {
    fn metrics(&self) -> String {
        self.metrics.render()
    }

    fn ready(&self) -> Result<(), String> {
        self.node.health()
    }

    fn page(&self, _method: &http::Method, path: &str, _query: Option<&str>) -> Option<Page> {
        (path == "/ring").then(|| admin::json(self.node.ring.document()))
    }

    fn front(&self) -> Option<Front> {
        Some(Front {
            ring: Some(Arc::clone(&self.node.ring)),
            node: Some(self.node.name.clone()),
            token: self.node.token.clone(),
        })
    }
}

/// The whole life of the process `shard-node`.
pub fn main(args: &Args) -> ExitCode {
    process::exit_code("shard-node", run(args))
}

fn run(args: &Args) -> Result<(), Box<dyn Error + Send + Sync>> {
    let config = args.load()?;
    if args.process.check {
        process::print_line("the configuration is valid");
        return Ok(());
    }
    process::begin(&args.process.log, "info")?.block_on(serve(&config))
}

async fn serve(config: &Config) -> Result<(), Box<dyn Error + Send + Sync>> {
    let mut signals = Signals::listen()?;
    let admin_listener = admin::bind(&config.admin_listen).await?;
    let node = Arc::new(Node::start(config, &Classes::built_in())?);
    let handle = node.registry().handle();
    let upkeep = tokio::spawn(ops::metrics::upkeep(handle.clone()));
    let admin_address = admin_listener.local_addr()?;
    let pages = Arc::new(NodeAdmin {
        node: Arc::clone(&node),
        metrics: handle,
    });
    let token = non_empty(&config.admin_token).map(Arc::from);
    let admin = tokio::spawn(admin::serve(admin_listener, token, pages));
    process::print_line(&format!(
        "ready http://{} admin http://{admin_address}",
        node.addresses()[0]
    ));
    while signals.next().await == process::Order::Reload {
        info!("nothing to reload: a node has no routes");
    }
    info!("stopping");
    upkeep.abort();
    admin.abort();
    drop(admin.await);
    let node = Arc::into_inner(node).ok_or("the admin listener still runs")?;
    tokio::task::spawn_blocking(move || node.shut_down()).await?;
    Ok(())
}
