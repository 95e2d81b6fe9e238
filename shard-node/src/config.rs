//! `shard-node.toml` as types, the command line, and what both must obey together.

use std::num::{NonZeroU32, NonZeroU64};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Parser;
use ops::advisor::Thresholds;
use ops::args::{ProcessArgs, overrule};
use ops::config::{ConfigError, non_empty};
use protocol::ring::{RingDocument, RingNode};
use protocol::{Colo, Ring, RingVersion, limits};
use serde::{Deserialize, Serialize};

use crate::alarms::AlarmsConfig;
use crate::archive::ArchiveConfig;
use crate::expiry::ExpiryConfig;
use crate::storage::{LogConfig, SqlConfig};

/// Everything a node can be told. Every key has a default; `config/shard-node.toml` shows them all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The node's name in the ring. Shards belong to names: data stays valid when addresses change.
    pub name: String,
    /// Address of the first worker; the others listen on the ports that follow. Port 0 gives each a
    /// free one.
    pub listen: String,
    pub admin_listen: String,
    pub data_dir: PathBuf,
    /// The site this node is in.
    pub colo: String,
    /// Threads that host objects; 0 is one per core.
    pub workers: u16,
    /// How long a stopping node waits for requests under way.
    #[serde(with = "humantime_serde")]
    pub drain_max: Duration,
    /// The cluster's shared secret, which gateways must send. Required off loopback. Empty: none.
    pub token: String,
    /// Bearer token of the admin listener. Required off loopback. Empty: none.
    pub admin_token: String,
    pub ring: RingConfig,
    pub mailbox: MailboxConfig,
    pub objects: ObjectsConfig,
    pub sql: SqlConfig,
    pub log: LogConfig,
    pub alarms: AlarmsConfig,
    pub archive: ArchiveConfig,
    pub expiry: ExpiryConfig,
    pub advisor: Thresholds,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            name: "node-1".to_owned(),
            listen: "127.0.0.1:7100".to_owned(),
            admin_listen: "127.0.0.1:7090".to_owned(),
            data_dir: PathBuf::from("./data"),
            colo: "unknown".to_owned(),
            workers: 0,
            drain_max: Duration::from_secs(30),
            token: String::new(),
            admin_token: String::new(),
            ring: RingConfig::default(),
            mailbox: MailboxConfig::default(),
            objects: ObjectsConfig::default(),
            sql: SqlConfig::default(),
            log: LogConfig::default(),
            alarms: AlarmsConfig::default(),
            archive: ArchiveConfig::default(),
            expiry: ExpiryConfig::default(),
            advisor: Thresholds::default(),
        }
    }
}

/// `[ring]`: who owns which shard. The same in the config of every node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RingConfig {
    /// Raise it with every change of the nodes: gateways take the ring with the highest version.
    pub version: NonZeroU64,
    /// Fixed for the life of the data.
    pub shards: u16,
    /// All nodes. Empty: this node alone owns every shard.
    pub nodes: Vec<RingNode>,
}

impl Default for RingConfig {
    fn default() -> Self {
        Self {
            version: NonZeroU64::MIN,
            shards: limits::SHARDS_DEFAULT,
            nodes: Vec::new(),
        }
    }
}

/// `[mailbox]`: how much work may wait for one object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MailboxConfig {
    /// Requests that may wait. One more is refused with `overloaded`.
    pub capacity: NonZeroU32,
    /// How long a request may wait before it is answered `timed_out`.
    #[serde(with = "humantime_serde")]
    pub wait_max: Duration,
    /// Requests of one object that may be under way at once, awaiting something.
    pub in_flight_max: NonZeroU32,
}

impl Default for MailboxConfig {
    fn default() -> Self {
        Self {
            capacity: NonZeroU32::new(1024).expect("not zero"),
            wait_max: Duration::from_secs(10),
            in_flight_max: NonZeroU32::new(1024).expect("not zero"),
        }
    }
}

/// `[objects]`: when objects sleep.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ObjectsConfig {
    /// An object without work leaves memory after this time.
    #[serde(with = "humantime_serde")]
    pub idle_after: Duration,
    /// Objects in memory per worker; for one more, the one that was idle longest leaves.
    pub awake_max: NonZeroU32,
    /// Bytes that the databases of these objects may take in memory, per worker: page caches, schemas and
    /// prepared statements. Beyond it the least recently used objects leave.
    pub memory_bytes_max: NonZeroU64,
}

impl Default for ObjectsConfig {
    fn default() -> Self {
        Self {
            idle_after: Duration::from_secs(10),
            awake_max: NonZeroU32::new(10_000).expect("not zero"),
            memory_bytes_max: NonZeroU64::new(1 << 30).expect("not zero"),
        }
    }
}

impl Config {
    /// What one field cannot check by itself.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let rule = |text: String| Err(ConfigError::Rule(text));
        if self.name.is_empty() {
            return rule("name = \"\" must not be empty: the ring knows the node by it".to_owned());
        }
        if self.workers > limits::WORKERS_PER_NODE_MAX {
            return rule(format!(
                "workers = {} must be at most {}",
                self.workers,
                limits::WORKERS_PER_NODE_MAX
            ));
        }
        if let Err(error) = self.colo.parse::<Colo>() {
            return rule(error.to_string());
        }
        if self.mailbox.wait_max.is_zero() {
            return rule("mailbox.wait_max = 0s must be longer, or nothing could wait".to_owned());
        }
        if self.objects.idle_after < Duration::from_millis(10) {
            return rule(format!(
                "objects.idle_after = {:?} must be at least 10ms",
                self.objects.idle_after
            ));
        }
        let tables = self.sql.validate().and_then(|()| self.log.validate());
        if let Err(reason) = tables
            .and_then(|()| self.alarms.validate())
            .and_then(|()| self.archive.validate())
            .and_then(|()| self.expiry.validate())
            .and_then(|()| self.advisor.validate())
        {
            return rule(reason);
        }
        ops::config::require_token_off_loopback(
            "listen",
            &self.listen,
            non_empty(&self.token),
            "a cluster token (token, or DORMOUSE_TOKEN)",
        )?;
        ops::config::require_token_off_loopback(
            "admin_listen",
            &self.admin_listen,
            non_empty(&self.admin_token),
            "an admin token (admin_token, or DORMOUSE_ADMIN_TOKEN)",
        )?;
        if !self.ring.nodes.is_empty() {
            let ring = self.ring_of(self.ring.nodes.clone())?;
            let me = ring
                .document()
                .nodes
                .iter()
                .find(|node| node.name == self.name);
            match me {
                None => {
                    return rule(format!(
                        "name = {:?} is not among ring.nodes, so this node would own nothing",
                        self.name
                    ));
                }
                Some(me) if me.workers.len() != usize::from(self.worker_count()) => {
                    return rule(format!(
                        "ring.nodes gives {:?} {} workers, but workers = {}",
                        self.name,
                        me.workers.len(),
                        self.worker_count()
                    ));
                }
                Some(_) => {}
            }
        } else {
            self.ring_of(vec![
                self.alone(vec![String::new(); usize::from(self.worker_count())]),
            ])?;
        }
        Ok(())
    }

    /// Worker threads, with 0 resolved to the number of cores.
    pub fn worker_count(&self) -> u16 {
        let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        match self.workers {
            0 => u16::try_from(cores())
                .unwrap_or(u16::MAX)
                .min(limits::WORKERS_PER_NODE_MAX),
            count => count,
        }
    }

    /// The ring, where this node's workers have the addresses they were bound to.
    pub fn ring(&self, addresses: Vec<String>) -> Result<Ring, ConfigError> {
        if self.ring.nodes.is_empty() {
            return self.ring_of(vec![self.alone(addresses)]);
        }
        self.ring_of(self.ring.nodes.clone())
    }

    fn alone(&self, workers: Vec<String>) -> RingNode {
        RingNode {
            name: self.name.clone(),
            weight: 1,
            colo: Some(self.colo.clone()),
            workers,
        }
    }

    fn ring_of(&self, nodes: Vec<RingNode>) -> Result<Ring, ConfigError> {
        Ring::new(RingDocument {
            version: RingVersion(self.ring.version),
            shards: self.ring.shards,
            nodes,
        })
        .map_err(|error| ConfigError::Rule(error.to_string()))
    }
}

/// Hosts single-threaded SQLite-backed objects behind Dormouse gateways.
#[derive(Debug, Clone, Parser)]
#[command(name = "shard-node", version)]
pub struct Args {
    #[command(flatten)]
    pub process: ProcessArgs,
    /// Threads that host objects; 0 is one per core
    #[arg(long, env = "DORMOUSE_WORKERS")]
    pub workers: Option<u16>,
}

impl Args {
    /// The file, overruled by flags and environment, validated.
    pub fn load(&self) -> Result<Config, ConfigError> {
        let given = self.process.clone();
        let mut config: Config = given
            .config
            .as_deref()
            .map(read)
            .transpose()?
            .unwrap_or_default();
        overrule(&mut config.listen, given.listen);
        overrule(&mut config.admin_listen, given.admin_listen);
        overrule(&mut config.colo, given.colo);
        overrule(&mut config.data_dir, given.data_dir);
        overrule(&mut config.workers, self.workers);
        overrule(&mut config.token, given.token);
        overrule(&mut config.admin_token, given.admin_token);
        config.validate()?;
        Ok(config)
    }
}

fn read(path: &Path) -> Result<Config, ConfigError> {
    ops::config::read(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_file_is_the_default_config() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config/shard-node.toml");
        assert_eq!(read(&path).unwrap(), Config::default());
        let text = std::fs::read_to_string(path).unwrap();
        let shipped: toml::Table = text.parse().unwrap();
        let all: toml::Table = toml::to_string(&Config::default())
            .unwrap()
            .parse()
            .unwrap();
        assert_eq!(
            keys("", &shipped),
            keys("", &all),
            "every key is in the file"
        );
    }

    fn keys(prefix: &str, table: &toml::Table) -> Vec<String> {
        let mut found: Vec<String> = table
            .iter()
            .flat_map(|(key, value)| match value {
                toml::Value::Table(inner) => keys(&format!("{prefix}{key}."), inner),
                _ => vec![format!("{prefix}{key}")],
            })
            .collect();
        found.sort();
        found
    }

    #[track_caller]
    fn refused(change: impl FnOnce(&mut Config), want: &str) {
        let mut config = Config::default();
        change(&mut config);
        let error = config.validate().unwrap_err().to_string();
        assert!(error.contains(want), "{error:?} should say {want:?}");
    }

    #[test]
    fn settings_that_contradict_each_other_are_refused() {
        refused(
            |c| c.listen = "0.0.0.0:7100".to_owned(),
            "needs a cluster token",
        );
        refused(
            |c| c.admin_listen = "0.0.0.0:1".to_owned(),
            "needs an admin token",
        );
        refused(|c| c.colo = "sfo".to_owned(), "three upper-case letters");
        refused(|c| c.ring.shards = 0, "ring.shards = 0");
        refused(|c| c.workers = 257, "workers = 257 must be at most 256");
        refused(
            |c| c.sql.columns_max = 5000,
            "sql.columns_max = 5000 must be from 1 to 2000",
        );
        refused(
            |c| c.sql.turn_time_max = Duration::ZERO,
            "sql.turn_time_max",
        );
        let other = RingNode {
            name: "other".to_owned(),
            weight: 1,
            colo: None,
            workers: vec!["127.0.0.1:1".to_owned()],
        };
        refused(|c| c.ring.nodes = vec![other], "is not among ring.nodes");
    }
}
