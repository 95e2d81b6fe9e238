//! The flags that every server process has.

use std::path::PathBuf;

use clap::Args;

use crate::logs::LogFormat;

/// Flags of a gateway and of a node alike. Those that are given overrule the config file.
#[derive(Debug, Clone, Args)]
pub struct ProcessArgs {
    /// Configuration file (TOML); without it every key has its default
    #[arg(long, env = "DORMOUSE_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Address to serve on; a node's workers take it and the ports that follow
    #[arg(long, env = "DORMOUSE_LISTEN", value_name = "HOST:PORT")]
    pub listen: Option<String>,
    /// Address of metrics and health
    #[arg(long, env = "DORMOUSE_ADMIN_LISTEN", value_name = "HOST:PORT")]
    pub admin_listen: Option<String>,
    /// Label of the site, as in SFO
    #[arg(long, env = "DORMOUSE_COLO")]
    pub colo: Option<String>,
    /// Where the objects' databases are; a gateway keeps no data and ignores it
    #[arg(long, env = "DORMOUSE_DATA_DIR", value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// The secret that gateways and nodes of one cluster share
    #[arg(long, env = "DORMOUSE_TOKEN", hide_env_values = true)]
    pub token: Option<String>,
    /// Bearer token of the admin listener
    #[arg(long, env = "DORMOUSE_ADMIN_TOKEN", hide_env_values = true)]
    pub admin_token: Option<String>,
    /// Validate the configuration and exit
    #[arg(long)]
    pub check: bool,
    #[command(flatten)]
    pub log: LogArgs,
}

/// How and how much a process logs, on stderr.
#[derive(Debug, Clone, Args)]
pub struct LogArgs {
    /// How log lines look
    #[arg(long, env = "DORMOUSE_LOG_FORMAT", value_enum, default_value_t)]
    pub log_format: LogFormat,
    /// Level of the log, or a list of target=level [default: info; warn for `dormouse dev`]
    #[arg(long, env = "DORMOUSE_LOG")]
    pub log: Option<String>,
}

/// Puts a flag that was given in the place of what the config file says.
pub fn overrule<T>(slot: &mut T, given: Option<T>) {
    if let Some(given) = given {
        *slot = given;
    }
}
