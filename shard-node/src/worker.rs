//! One thread with everything it owns: a listener, a host and its objects. Workers share nothing.

use std::collections::BTreeMap;
use std::io;
use std::net::TcpListener;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use futures_util::FutureExt;
use http::HeaderValue;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use ops::Causes;
use ops::advisor::Thresholds;
use ops::metrics::Registry;
use protocol::{Home, Ring, ShardId, link};
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};
use tokio::task::{JoinSet, LocalSet};
use tracing::{debug, error, info, warn};

use crate::advice::Advice;
use crate::alarms::Runner;
use crate::archive::Archive;
use crate::classes::Classes;
use crate::clock::Clock;
use crate::commit_log::record::FileId;
use crate::disk::Disk;
use crate::expiry::{Stores, Sweeper};
use crate::host::{Host, HostConfig};
use crate::metrics::Metrics;
use crate::operator::Operator;
use crate::server::Server;
use crate::snapshots::Keeper;
use crate::stock::StockTaker;
use crate::storage::logged::{OpenError, PAGE_BYTES, Setup};
use crate::storage::{LogConfig, Logged};
use crate::stub::Switchboard;

/// How often idle objects are evicted and overdue requests answered.
const TICK: Duration = Duration::from_millis(100);

/// After an accept failed, most likely for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What one worker is made of.
pub(crate) struct Worker {
    pub(crate) number: u16,
    /// This worker, as an index into the ring's list.
    pub(crate) me: usize,
    pub(crate) listener: TcpListener,
    pub(crate) ring: Arc<Ring>,
    pub(crate) classes: Classes,
    pub(crate) host: HostConfig,
    pub(crate) data_dir: PathBuf,
    /// For files on their way in or out.
    pub(crate) spool: PathBuf,
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) archive: Option<Archive>,
    /// Where databases of objects go that expire.
    pub(crate) expired_to: Stores,
    /// Since when classes expire.
    pub(crate) expires_since: Arc<BTreeMap<String, u64>>,
    pub(crate) log: LogConfig,
    pub(crate) advisor: Arc<Thresholds>,
    pub(crate) advice: Arc<Advice>,
    pub(crate) token: Option<Arc<str>>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) drain_max: Duration,
    /// Logs of workers that the node no longer has; one of its workers writes them to the files.
    pub(crate) orphans: Vec<u16>,
    /// Told once that this worker has recovered, or why not.
    pub(crate) recovered: mpsc::SyncSender<Result<(), OpenError>>,
    pub(crate) order: watch::Receiver<Order>,
}

/// What a node tells its workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Order {
    /// Others still recover: what they write to files may be what this worker will own.
    Recover,
    Serve,
    Stop,
}

impl Worker {
    /// Starts the thread. It ends after `stop`, when what was under way is answered.
    pub(crate) fn spawn(self) -> io::Result<JoinHandle<()>> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let drain_max = self.drain_max;
        std::thread::Builder::new()
            .name(format!("worker-{}", self.number))
            .spawn(move || {
                abort_on_panic(|| LocalSet::new().block_on(&runtime, self.run()));
                // A copy that goes to a slow archive is of no use any more.
                runtime.shutdown_timeout(drain_max);
            })
    }

    async fn run(mut self) {
        let progress = Arc::new(Notify::new());
        let metrics = Rc::new(Metrics::new(Arc::clone(&self.registry), self.number));
        let engine = match self.recover(&progress, &metrics) {
            Ok(engine) => engine,
            Err(error) => {
                // The node, which waits for this, says what happened.
                drop(self.recovered.send(Err(error)));
                return;
            }
        };
        drop(self.recovered.send(Ok(())));
        // An order that never comes is a node that did not start.
        if self
            .order
            .wait_for(|order| *order >= Order::Serve)
            .await
            .is_err()
        {
            return;
        }
        let host = Host::new(
            self.host.clone(),
            Rc::new(engine.clone()),
            Arc::clone(&self.clock),
            Rc::clone(&metrics),
        );
        let token = self
            .token
            .as_deref()
            .and_then(|token| HeaderValue::from_str(token).ok());
        host.set_switchboard(Switchboard::new(
            &host,
            self.classes.clone(),
            Arc::clone(&self.ring),
            self.me,
            token,
        ));
        let alarms = Runner::new(
            Rc::clone(&host),
            self.classes.clone(),
            Arc::clone(&self.ring),
            self.host.alarms.clone(),
        );
        let spool = self.spool.clone();
        let catalogs = self.catalogs();
        let operator = Rc::new(Operator {
            host: Rc::clone(&host),
            engine: engine.clone(),
            classes: self.classes.clone(),
            ring: Arc::clone(&self.ring),
            me: self.me,
            catalogs: catalogs.as_slice().into(),
            clock: Arc::clone(&self.clock),
            sql: Arc::clone(&self.host.sql),
            advisor: Arc::clone(&self.advisor),
            importing: tokio::sync::Semaphore::new(1),
            looking_back: tokio::sync::Semaphore::new(2),
            spool: spool.clone(),
        });
        let advising = self.advice.follow(self.number, Rc::clone(&operator));
        let advising = tokio::task::spawn_local(or_abort(advising));
        let restorer = Rc::downgrade(&operator);
        host.set_restorer(Box::new(move |object, at| {
            let restorer = restorer.upgrade();
            Box::pin(async move {
                if let Some(operator) = restorer {
                    operator.restore_asked(object, at).await;
                }
            })
        }));
        let server = Rc::new(Server {
            operator,
            host: Rc::clone(&host),
            ring: Arc::clone(&self.ring),
            me: self.me,
            classes: self.classes,
            token: self.token,
            metrics: Rc::clone(&metrics),
        });
        let keeping = self.archive.clone().map(|archive| {
            let keeper = Keeper {
                engine: engine.clone(),
                archive,
                worker: self.number,
                spool: spool.clone(),
                clock: Arc::clone(&self.clock),
                metrics: Rc::clone(&metrics),
                ring: Arc::clone(&self.ring),
            };
            tokio::task::spawn_local(or_abort(keeper.run()))
        });
        let sweeper = Sweeper {
            config: Arc::clone(&self.host.expiry),
            stores: self.expired_to.clone(),
            since: Arc::clone(&self.expires_since),
            host: Rc::clone(&host),
            engine: engine.clone(),
            catalogs: catalogs.clone(),
            clock: Arc::clone(&self.clock),
            metrics: Rc::clone(&metrics),
            spool: spool.clone(),
        };
        let sweeping = tokio::task::spawn_local(or_abort(sweeper.run()));
        let stock_taker = StockTaker {
            engine: engine.clone(),
            catalogs: catalogs.clone(),
            metrics: Rc::clone(&metrics),
        };
        let taking_stock = tokio::task::spawn_local(or_abort(stock_taker.run()));
        let firing = [
            tokio::task::spawn_local(or_abort(Rc::clone(&alarms).run())),
            tokio::task::spawn_local(or_abort(Rc::clone(&alarms).watch(engine.clone(), catalogs))),
        ];
        let tasks = [
            tokio::task::spawn_local(or_abort(Rc::clone(&host).run())),
            tokio::task::spawn_local(or_abort(Rc::clone(&host).follow_log(progress))),
            tokio::task::spawn_local(or_abort(tick(
                Rc::clone(&host),
                engine.clone(),
                metrics,
                self.clock,
            ))),
        ];
        match tokio::net::TcpListener::from_std(self.listener) {
            Ok(listener) => {
                accept(listener, server, self.order, self.drain_max, async move {
                    for task in firing {
                        task.abort();
                    }
                    alarms.drain().await;
                })
                .await;
            }
            Err(error) => warn!(error = %Causes(&error), "the listener cannot be used"),
        }
        for task in tasks
            .into_iter()
            .chain(keeping)
            .chain([sweeping, taking_stock, advising])
        {
            task.abort();
        }
        host.shut_down();
        match engine.close() {
            Ok(()) => info!(worker = self.number, "stopped"),
            Err(error) => {
                warn!(worker = self.number, error = %Causes(&error), "stopped; the log keeps what the files lack");
            }
        }
    }

    /// The engine, with what its log had. Objects that the ring gave to others since are written to
    /// their files before anybody serves.
    fn recover(&self, progress: &Arc<Notify>, metrics: &Metrics) -> Result<Logged, OpenError> {
        for orphan in &self.orphans {
            let engine = Logged::open(self.setup(*orphan, metrics), Arc::clone(progress))?;
            engine.close().map_err(OpenError::Settle)?;
            info!(
                worker = orphan,
                "the log of a worker that is no more was written to the files"
            );
        }
        let engine = Logged::open(self.setup(self.number, metrics), Arc::clone(progress))?;
        let mine = |(file, shard): &(FileId, ShardId)| {
            shard.0 < self.ring.shards()
                && self
                    .ring
                    .owner(file.home(), *shard)
                    .is_ok_and(|owner| std::ptr::eq(owner, &self.ring.workers()[self.me]))
        };
        if engine.databases().iter().all(mine) {
            return Ok(engine);
        }
        engine.close().map_err(OpenError::Settle)?;
        Logged::open(self.setup(self.number, metrics), Arc::clone(progress))
    }

    /// The catalogs of all shards that this worker may own: of the global ring, and of its colo's.
    fn catalogs(&self) -> Vec<(Home, ShardId)> {
        let me = &self.ring.workers()[self.me];
        let shards = (0..self.ring.shards()).map(ShardId);
        let all = shards.flat_map(|shard| self.ring.homes().map(move |home| (home, shard)));
        all.filter(|(home, shard)| {
            let owner = self.ring.owner(*home, *shard);
            owner.is_ok_and(|owner| std::ptr::eq(owner, me))
        })
        .collect()
    }

    fn setup(&self, worker: u16, metrics: &Metrics) -> Setup {
        Setup {
            disk: Arc::clone(&self.disk),
            data_dir: self.data_dir.clone(),
            worker,
            log: self.log.clone(),
            page_bytes: PAGE_BYTES,
            transaction_bytes_max: self.host.sql.transaction_bytes_max,
            clock: Arc::clone(&self.clock),
            sync_time: metrics.log_sync_time.clone(),
            archive: self.archive.clone(),
        }
    }
}

/// A panic of ours, unlike one of class code, is a broken invariant: better down than corrupt. tokio
/// would keep it in a task that nobody may ever look at.
pub(crate) async fn or_abort<F: Future>(future: F) -> F::Output {
    match AssertUnwindSafe(future).catch_unwind().await {
        Ok(output) => output,
        Err(_) => {
            error!("an invariant is broken; the process stops");
            std::process::abort()
        }
    }
}

/// The same for a thread of ours.
pub(crate) fn abort_on_panic(work: impl FnOnce()) {
    if std::panic::catch_unwind(AssertUnwindSafe(work)).is_err() {
        error!("an invariant is broken; the process stops");
        std::process::abort()
    }
}

async fn tick(host: Rc<Host>, engine: Logged, metrics: Rc<Metrics>, clock: Arc<dyn Clock>) {
    let mut interval = tokio::time::interval(TICK);
    loop {
        interval.tick().await;
        host.tick();
        metrics.log(&engine);
        metrics.alarms(host.timers().standing(clock.unix_millis()));
    }
}

/// Serves connections until told to stop; then lets each finish the request it is in.
async fn accept(
    listener: tokio::net::TcpListener,
    server: Rc<Server>,
    mut order: watch::Receiver<Order>,
    drain_max: Duration,
    drain: impl Future<Output = ()>,
) {
    let mut connections = JoinSet::new();
    let told = order.clone();
    // One line per bout of failures, not one per try.
    let mut failing = false;
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    failing = false;
                    let served = connection(stream, Rc::clone(&server), told.clone());
                    connections.spawn_local(or_abort(served));
                }
                Err(error) => {
                    if !failing {
                            warn!(error = %Causes(&error), "accept failed; trying on");
                        }
                        failing = true;
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
            _ = order.wait_for(|order| *order == Order::Stop) => break,
        }
    }
    drop(listener);
    let drained = tokio::time::timeout(drain_max, async {
        drain.await;
        while connections.join_next().await.is_some() {}
    });
    if drained.await.is_err() {
        warn!(
            connections = connections.len(),
            "drain took too long; connections are cut"
        );
    }
}

async fn connection(stream: TcpStream, server: Rc<Server>, mut order: watch::Receiver<Order>) {
    // Small answers must not wait for the acknowledgement of earlier ones.
    if let Err(error) = stream.set_nodelay(true) {
        debug!(error = %Causes(&error), "TCP_NODELAY");
    }
    let mut first = [0];
    let peeked = tokio::select! {
        peeked = stream.peek(&mut first) => peeked,
        // It has asked nothing.
        _ = order.wait_for(|order| *order == Order::Stop) => return,
    };
    if peeked.is_ok() && first[0] == link::MAGIC[0] {
        if let Err(error) = crate::link::serve(stream, server, order).await {
            debug!(error = %Causes(&error), "link ended");
        }
        return;
    }
    let service = service_fn(move |request| Rc::clone(&server).serve(request));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        // Gateways keep idle connections and close them first, so that none is closed under a request.
        .header_read_timeout(None)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::pin!(connection);
    let mut stopping = false;
    let served = loop {
        tokio::select! {
            served = connection.as_mut() => break served,
            _ = order.wait_for(|order| *order == Order::Stop), if !stopping => {
                stopping = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    };
    if let Err(error) = served {
        debug!(error = %Causes(&error), "connection ended");
    }
}
