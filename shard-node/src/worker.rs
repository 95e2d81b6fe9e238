//! One thread with everything it owns: a listener, a host and its objects. Workers share nothing.

use std::io;
use std::net::TcpListener;
use std::panic::AssertUnwindSafe;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use futures_util::FutureExt;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use ops::Causes;
use ops::metrics::Registry;
use protocol::Ring;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::{JoinSet, LocalSet};
use tracing::{debug, error, info, warn};

use crate::classes::Classes;
use crate::clock::Clock;
use crate::host::{Host, HostConfig};
use crate::metrics::Metrics;
use crate::server::Server;
use crate::storage::PlainFiles;

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
    pub(crate) data_dir: std::path::PathBuf,
    pub(crate) token: Option<Arc<str>>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) drain_max: Duration,
    /// Turns true when the node stops.
    pub(crate) stop: watch::Receiver<bool>,
}

impl Worker {
    /// Starts the thread. It ends after `stop`, when what was under way is answered.
    pub(crate) fn spawn(self) -> io::Result<JoinHandle<()>> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        std::thread::Builder::new()
            .name(format!("worker-{}", self.number))
            .spawn(move || LocalSet::new().block_on(&runtime, self.run()))
    }

    async fn run(self) {
        let metrics = Rc::new(Metrics::new(self.registry, self.number));
        let host = Host::new(
            self.host,
            Rc::new(PlainFiles::new(&self.data_dir)),
            self.clock,
            Rc::clone(&metrics),
        );
        let server = Rc::new(Server {
            host: Rc::clone(&host),
            ring: self.ring,
            me: self.me,
            classes: self.classes,
            token: self.token,
            metrics,
        });
        let turns = tokio::task::spawn_local(or_abort(Rc::clone(&host).run()));
        let ticks = tokio::task::spawn_local(or_abort(tick(Rc::clone(&host))));
        match tokio::net::TcpListener::from_std(self.listener) {
            Ok(listener) => accept(listener, server, self.stop, self.drain_max).await,
            Err(error) => warn!(error = %Causes(&error), "the listener cannot be used"),
        }
        ticks.abort();
        turns.abort();
        host.shut_down();
        info!(worker = self.number, "stopped");
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

async fn tick(host: Rc<Host>) {
    let mut interval = tokio::time::interval(TICK);
    loop {
        interval.tick().await;
        host.tick();
    }
}

/// Serves connections until told to stop; then lets each finish the request it is in.
async fn accept(
    listener: tokio::net::TcpListener,
    server: Rc<Server>,
    mut stop: watch::Receiver<bool>,
    drain_max: Duration,
) {
    let mut connections = JoinSet::new();
    let told = stop.clone();
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
            _ = stop.wait_for(|stop| *stop) => break,
        }
    }
    drop(listener);
    let drained = tokio::time::timeout(drain_max, async {
        while connections.join_next().await.is_some() {}
    });
    if drained.await.is_err() {
        warn!(
            connections = connections.len(),
            "drain took too long; connections are cut"
        );
    }
}

async fn connection(stream: TcpStream, server: Rc<Server>, mut stop: watch::Receiver<bool>) {
    // Small answers must not wait for the acknowledgement of earlier ones.
    if let Err(error) = stream.set_nodelay(true) {
        debug!(error = %Causes(&error), "TCP_NODELAY");
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
            _ = stop.wait_for(|stop| *stop), if !stopping => {
                stopping = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    };
    if let Err(error) = served {
        debug!(error = %Causes(&error), "connection ended");
    }
}
