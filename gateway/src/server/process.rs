//! The process around a gateway: its signals, its config file, who relieves it and whom it relieves.

use std::error::Error;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use ops::Causes;
use ops::admin;
use ops::config::{non_empty, token_header};
use ops::process::{self, Order, Signals};
use ops::watch::Watch;
use tracing::{info, warn};

use super::{Gateway, GatewayAdmin, RingFrom, StartError};
use crate::cache::Cache;
use crate::config::{Args, Config};
use crate::downstream::PATIENCE;
use crate::upgrade::{Kind, Offer, Predecessor, Sockets, Successor, UpgradeError};

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
    runtime.block_on(serve(&config, args.process.config.clone(), args.upgrade))
}

async fn serve(
    config: &Config,
    file: Option<PathBuf>,
    upgrade: bool,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let mut signals = Signals::listen()?;
    let socket = non_empty(&config.upgrade_socket).map(Path::new);
    let (predecessor, mut inherited) = match upgrade {
        true => inherit(socket)?,
        false => (None, Sockets::default()),
    };
    let admin_listener = match inherited.take(Kind::Admin, &config.admin_listen)?.pop() {
        Some(listener) => tokio::net::TcpListener::from_std(listener)?,
        None => admin::bind(&config.admin_listen).await?,
    };
    let admin_address = admin_listener.local_addr()?;
    let mut gateway = Gateway::start_with(config, RingFrom::Nodes, &mut inherited).await?;
    // On addresses that this config does not name, the other gateway accepted until now.
    drop(inherited);
    let admin_socket = admin_listener.as_fd().try_clone_to_owned()?.into();
    gateway.sockets().push(Kind::Admin, admin_socket);
    let gateway = Arc::new(gateway);
    let handle = gateway.registry().handle();
    let upkeep = tokio::spawn(ops::metrics::upkeep(handle.clone()));
    let pages = Arc::new(GatewayAdmin {
        gateway: Arc::clone(&gateway),
        metrics: handle,
    });
    let token = non_empty(&config.admin_token).map(Arc::from);
    let (stop_admin, told) = tokio::sync::oneshot::channel::<Duration>();
    let told = told.map(Result::unwrap_or_default);
    let admin = tokio::spawn(admin::serve_until(admin_listener, token, pages, told));
    gateway.settle().await;
    let offer = socket.map(|path| Offer::at(path, predecessor.is_some()));
    let offer = offer.transpose()?;
    let following = predecessor.map(|mut predecessor| {
        if let Err(error) = predecessor.relieve() {
            warn!(%error, "the gateway to be relieved is gone");
        }
        tokio::spawn(predecessor.follow(gateway.cache()))
    });
    // Before anybody is told to go on: whatever they change then is seen.
    let reloader = Reloader::new(&gateway, file, config.watch_every);
    process::print_line(&format!(
        "ready http://{} admin http://{admin_address}{}",
        gateway.address(),
        gateway
            .tls_address()
            .map_or_else(String::new, |address| format!(" tls https://{address}"))
    ));
    let successor = tokio::select! {
        () = reloader.until_stopped(&mut signals) => None,
        successor = accepted(offer.as_ref(), &gateway) => Some(successor),
    };
    match &successor {
        Some(_) => info!("another gateway goes on; stopping"),
        None => {
            offer.into_iter().for_each(Offer::withdraw);
            info!("stopping");
        }
    }
    upkeep.abort();
    if let Some(following) = following {
        following.abort();
    }
    let cache = gateway.cache();
    let stopping = stop(gateway, admin, stop_admin, successor.is_some());
    match successor {
        Some(successor) => leave(successor, cache, stopping).await,
        None => stopping.await,
    }
}

/// Ends the admin listener, then the gateway. `relieved`: by another process.
async fn stop(
    gateway: Arc<Gateway>,
    admin: tokio::task::JoinHandle<()>,
    stop_admin: tokio::sync::oneshot::Sender<Duration>,
    relieved: bool,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    if relieved {
        gateway.leave();
        stop_admin
            .send(PATIENCE)
            .map_err(|_| "the admin listener has ended")?;
    } else {
        drop(stop_admin);
    }
    admin.await?;
    let gateway = Arc::into_inner(gateway).ok_or("the admin listener still runs")?;
    tokio::task::spawn_blocking(move || gateway.shut_down()).await?;
    Ok(())
}

/// What the gateway at the upgrade socket hands over, if there is one.
fn inherit(socket: Option<&Path>) -> Result<(Option<Predecessor>, Sockets), UpgradeError> {
    match Predecessor::ask(socket.ok_or(UpgradeError::NoSocket)?)? {
        Some((predecessor, sockets)) => Ok((Some(predecessor), sockets)),
        None => {
            info!("no gateway waits to be relieved; starting anew");
            Ok((None, Sockets::default()))
        }
    }
}

/// Waits for a successor; for ever if nothing is offered.
async fn accepted(offer: Option<&Offer>, gateway: &Gateway) -> Successor {
    match offer {
        Some(offer) => offer.accepted(&gateway.sockets, gateway.cache()).await,
        None => std::future::pending().await,
    }
}

/// The last requests may purge what the successor keeps.
async fn leave(
    mut successor: Successor,
    cache: &Cache,
    stopping: impl Future<Output = Result<(), Box<dyn Error + Send + Sync>>>,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let mut stopping = std::pin::pin!(stopping);
    loop {
        let stopped = tokio::select! {
            stopped = &mut stopping => Some(stopped),
            () = cache.purged() => None,
        };
        let told = successor.tell(cache).await;
        match (stopped, told) {
            (Some(stopped), _) => return stopped,
            (None, Ok(())) => {}
            (None, Err(error)) => {
                warn!(%error, "the successor is gone");
                return stopping.await;
            }
        }
    }
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
