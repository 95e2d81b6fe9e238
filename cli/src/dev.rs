//! `dormouse dev`: a gateway and a node in one process, on loopback.

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use gateway::config::Config as GatewayConfig;
use gateway::server::{Gateway, GatewayAdmin, Reloader, RingFrom};
use ops::admin::{self, Admin, Page};
use ops::args::LogArgs;
use ops::config::ConfigError;
use ops::operator::Front;
use ops::process::{self, Signals};
use rand::Rng;
use shard_node::classes::Classes;
use shard_node::config::Config as NodeConfig;
use shard_node::node::Node;
use tracing::info;

/// A gateway and a node in one process, on loopback, for development
#[derive(Debug, Clone, Parser)]
pub(crate) struct Args {
    /// Where the objects' databases are
    #[arg(
        long,
        env = "DORMOUSE_DATA_DIR",
        value_name = "DIR",
        default_value = "./data"
    )]
    data_dir: PathBuf,
    /// Address that clients connect to
    #[arg(
        long,
        env = "DORMOUSE_LISTEN",
        value_name = "HOST:PORT",
        default_value = "127.0.0.1:8080"
    )]
    listen: String,
    /// Address of metrics and health
    #[arg(
        long,
        env = "DORMOUSE_ADMIN_LISTEN",
        value_name = "HOST:PORT",
        default_value = "127.0.0.1:8081"
    )]
    admin_listen: String,
    /// Label of the site
    #[arg(long, env = "DORMOUSE_COLO", default_value = "SFO")]
    colo: String,
    /// Threads that host objects; 0 is one per core
    #[arg(long, env = "DORMOUSE_WORKERS", default_value_t = 0)]
    workers: u16,
    /// Configuration file of the gateway (TOML), for its routes
    #[arg(long, env = "DORMOUSE_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Bearer token of the admin listener
    #[arg(long, env = "DORMOUSE_ADMIN_TOKEN", hide_env_values = true)]
    admin_token: Option<String>,
    /// Validate the configuration and exit
    #[arg(long)]
    check: bool,
    #[command(flatten)]
    log: LogArgs,
}

impl Args {
    fn configs(&self) -> Result<(GatewayConfig, NodeConfig), ConfigError> {
        let file = self.config.as_deref();
        let file = file.map(gateway::config::read).transpose()?;
        // Workers are on loopback but on any port: nobody but this gateway shall use them.
        let token = format!("{:032x}", rand::rng().random::<u128>());
        let gateway = GatewayConfig {
            listen: self.listen.clone(),
            admin_listen: self.admin_listen.clone(),
            colo: self.colo.clone(),
            token: token.clone(),
            admin_token: self.admin_token.clone().unwrap_or_default(),
            nodes: Vec::new(),
            ..file.unwrap_or_default()
        };
        let node = NodeConfig {
            name: "dev".to_owned(),
            listen: "127.0.0.1:0".to_owned(),
            data_dir: self.data_dir.clone(),
            colo: self.colo.clone(),
            workers: self.workers,
            token,
            ..NodeConfig::default()
        };
        gateway.validate()?;
        node.validate()?;
        Ok((gateway, node))
    }
}

/// The pages of both halves.
struct DevAdmin {
    gateway: GatewayAdmin,
    node: Arc<Node>,
}

impl Admin for DevAdmin {
    fn metrics(&self) -> String {
        let mut text = self.gateway.metrics();
        text.push_str(&self.node.registry().handle().render());
        text
    }

    fn ready(&self) -> Result<(), String> {
        self.gateway.ready()?;
        self.node.health()
    }

    fn page(&self, method: &admin::Method, path: &str, query: Option<&str>) -> Option<Page> {
        self.gateway.page(method, path, query)
    }

    fn front(&self) -> Option<Front> {
        self.gateway.front()
    }
}

pub(crate) fn main(args: &Args) -> ExitCode {
    process::exit_code("dormouse", run(args))
}

fn run(args: &Args) -> Result<(), Box<dyn Error + Send + Sync>> {
    let (gateway, node) = args.configs()?;
    if args.check {
        process::print_line("the configuration is valid");
        return Ok(());
    }
    process::begin(&args.log, "warn")?.block_on(serve(args, &gateway, &node))
}

async fn serve(
    args: &Args,
    gateway: &GatewayConfig,
    node: &NodeConfig,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let mut signals = Signals::listen()?;
    let watch_every = gateway.watch_every;
    let admin_listener = admin::bind(&gateway.admin_listen).await?;
    let admin_address = admin_listener.local_addr()?;
    let node = Arc::new(Node::start(node, &Classes::built_in())?);
    let ring = RingFrom::Document(node.ring().document().clone());
    let gateway = Arc::new(Gateway::start(gateway, ring).await?);
    let upkeep = [gateway.registry().handle(), node.registry().handle()]
        .map(|handle| tokio::spawn(ops::metrics::upkeep(handle)));
    let pages = Arc::new(DevAdmin {
        gateway: GatewayAdmin {
            gateway: Arc::clone(&gateway),
            metrics: gateway.registry().handle(),
        },
        node: Arc::clone(&node),
    });
    let token = args.admin_token.as_deref().map(Arc::from);
    let admin = tokio::spawn(admin::serve(admin_listener, token, pages));
    let front = gateway.address();
    // Before anybody is told to go on: whatever they change then is seen.
    let reloader = Reloader::new(&gateway, args.config.clone(), watch_every);
    process::print_line(&format!(
        "ready http://{front} admin http://{admin_address}"
    ));
    process::print_line(&format!(
        "try:\n  curl -X POST http://{front}/rpc/Counter/visits/increment\n  \
         curl -X PUT http://{front}/objects/Kv/room-1/topic --data 'dormice'\n  \
         curl http://{front}/objects/Kv/room-1/topic"
    ));
    reloader.until_stopped(&mut signals).await;
    info!("stopping");
    for task in upkeep {
        task.abort();
    }
    admin.abort();
    // Cancelled: that is what was asked for.
    drop(admin.await);
    let gateway = Arc::into_inner(gateway).ok_or("the admin listener still runs")?;
    let node = Arc::into_inner(node).ok_or("the admin listener still runs")?;
    tokio::task::spawn_blocking(move || {
        gateway.shut_down();
        node.shut_down();
    })
    .await?;
    Ok(())
}
