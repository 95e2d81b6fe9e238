//! What to do in one run.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Args;
use http::Uri;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Deserialize, Serialize};

use crate::client::Target;
use crate::operation::Mix;
use crate::rate::Rate;
use crate::rule::Rule;
use crate::schedule::{Arrivals, Names, Picks, Span};

/// A value of a map must leave room for its key within 2 MiB.
const VALUE_BYTES_MAX: u32 = 1 << 20;

const PROCESSES_MAX: u32 = 64;

/// What a name in a path must escape.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b':');

/// What to do in one run.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
pub struct RunArgs {
    /// A gateway
    #[arg(long, env = "DORMOUSE_TARGET", default_value = "http://127.0.0.1:8080")]
    pub target: String,
    /// Requests per second: constant (2000), equally long steps (500,1000,2000) or a ramp
    /// (500..2000); 0: as fast as the connections allow (closed loop)
    #[arg(long, default_value = "1000")]
    pub rate: Rate,
    /// What requests do: increment, read, sql, sql-write, sql-read, kv, kv-put, kv-get, mixed, counter (a sharded
    /// one), or several with weights (increment=3,read=6,sql=1)
    #[arg(long, default_value = "increment")]
    pub scenario: Mix,
    /// Seconds of load, warm-up not included
    #[arg(long, default_value_t = 10.0)]
    pub duration: f64,
    /// Seconds of load before measuring begins
    #[arg(long, default_value_t = 1.0)]
    pub warmup: f64,
    /// Keep-alive connections
    #[arg(long, default_value_t = 64)]
    pub connections: u32,
    /// Objects that share the load
    #[arg(long, default_value_t = 1000)]
    pub objects: u32,
    /// How the objects are picked
    #[arg(long, value_enum, default_value = "uniform")]
    pub names: Names,
    /// Exponent of the Zipf distribution
    #[arg(long, default_value_t = 1.0)]
    pub zipf_exponent: f64,
    /// With --names hot-spot: the share of requests that the hot object gets
    #[arg(long, default_value_t = 0.9)]
    pub hot_share: f64,
    /// With --scenario counter: how many shards each counter has, told to the first --admin [default: as they come]
    #[arg(long, value_name = "N")]
    pub shards: Option<u32>,
    /// Bytes of a value that kv-put writes
    #[arg(long, default_value_t = 100)]
    pub value_bytes: u32,
    /// How arrivals follow each other
    #[arg(long, value_enum, default_value = "poisson")]
    pub arrivals: Arrivals,
    /// Objects are called PREFIX-0, PREFIX-1, …; they must not exist yet [default: load-SEED]
    #[arg(long)]
    pub prefix: Option<String>,
    /// What stands between the prefix and the number in names
    #[arg(long, default_value = "-", hide = true)]
    pub joint: String,
    /// The class of increment and read; it must have `increment` and `value`
    #[arg(long, default_value = "Counter")]
    pub class: String,
    /// Seconds until a request counts as lost
    #[arg(long, default_value_t = 10.0)]
    pub timeout: f64,
    /// Seconds, from when it was meant to be sent, to go on sending a request that is refused while nothing of it ran
    #[arg(long, default_value_t = 0.0)]
    pub patience: f64,
    /// Makes the load repeatable [default: random]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Processes that share connections and rate, if one core is not enough to make the load
    #[arg(long, default_value_t = 1)]
    pub processes: u32,
    /// An admin listener to read the server's own latency from; may be given several times
    #[arg(
        long,
        env = "DORMOUSE_ADMIN",
        value_name = "URL",
        value_delimiter = ','
    )]
    pub admin: Vec<String>,
    /// Bearer token of the admin listeners
    #[arg(long, env = "DORMOUSE_ADMIN_TOKEN", hide_env_values = true)]
    #[serde(skip)]
    pub admin_token: Option<String>,
    /// Exit with 3 if this holds in the end: "p99>5ms", "rps<1000", "errors>0.1%"; may be given
    /// several times
    #[arg(long, value_name = "RULE")]
    #[serde(skip)]
    pub fail_if: Vec<Rule>,
    /// Show what happens every second, on stderr [default: if that is a terminal]
    #[arg(long)]
    pub progress: bool,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
    /// Write the timeline to this file as comma-separated values
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
    /// Write the result to this file as Prometheus metrics, for the text file collector of the node exporter
    #[arg(long, value_name = "FILE")]
    pub prometheus: Option<PathBuf>,
    /// Serve what was measured so far as Prometheus metrics while the load runs
    #[arg(long, value_name = "HOST:PORT")]
    pub prometheus_listen: Option<String>,
}

impl RunArgs {
    pub(crate) fn validate(&self) -> anyhow::Result<()> {
        let positive = [
            ("duration", self.duration),
            ("timeout", self.timeout),
            ("zipf-exponent", self.zipf_exponent),
        ];
        for (flag, value) in positive {
            ensure!(
                value > 0.0 && value < 1e6,
                "--{flag} {value} must be above 0 and below a million"
            );
        }
        let not_negative = [("warmup", self.warmup), ("patience", self.patience)];
        for (flag, value) in not_negative {
            ensure!(
                (0.0..1e7).contains(&value),
                "--{flag} {value} must not be negative, and below ten million"
            );
        }
        ensure!(self.connections > 0, "--connections 0 must be at least 1");
        ensure!(self.objects > 0, "--objects 0 must be at least 1");
        ensure!(
            (0.0..=1.0).contains(&self.hot_share),
            "--hot-share {} must be from 0 to 1",
            self.hot_share
        );
        ensure!(
            (1..=VALUE_BYTES_MAX).contains(&self.value_bytes),
            "--value-bytes {} must be from 1 to {VALUE_BYTES_MAX}",
            self.value_bytes
        );
        ensure!(
            (1..=self.connections.min(PROCESSES_MAX)).contains(&self.processes),
            "--processes {} must be from 1 to {PROCESSES_MAX}, and not above --connections {}",
            self.processes,
            self.connections
        );
        ensure!(
            self.shards.is_none() || !self.admin.is_empty(),
            "--shards wants --admin: clients cannot change the shards of a counter"
        );
        ensure!(
            self.processes == 1 || self.prometheus_listen.is_none(),
            "--prometheus-listen wants --processes 1: one process has no live figures of another"
        );
        Ok(())
    }

    pub(crate) fn target(&self, seed: u64) -> anyhow::Result<Target> {
        let uri: Uri = self
            .target
            .parse()
            .with_context(|| format!("--target {:?}", self.target))?;
        if uri.scheme_str() != Some("http") {
            bail!("--target {:?} must begin with http://", self.target);
        }
        let authority = uri
            .authority()
            .with_context(|| format!("--target {:?} has no host", self.target))?;
        Ok(Target {
            host: match authority.port() {
                Some(_) => authority.to_string(),
                None => format!("{authority}:80"),
            },
            counter: self.class.clone(),
            prefix: {
                let prefix = self.prefix.clone();
                let prefix = prefix.unwrap_or_else(|| format!("load-{seed:016x}"));
                utf8_percent_encode(&format!("{prefix}{}", self.joint), ESCAPED).to_string()
            },
            timeout: Duration::from_secs_f64(self.timeout),
        })
    }

    pub(crate) fn picks(&self) -> Picks {
        Picks {
            names: self.names,
            objects: self.objects,
            zipf_exponent: self.zipf_exponent,
            hot_share: self.hot_share,
            mix: self.scenario.clone(),
        }
    }

    /// Warm-up and load.
    pub(crate) fn span(&self, begin: Instant) -> Span {
        let measure_from = begin + Duration::from_secs_f64(self.warmup);
        Span {
            begin,
            measure_from,
            end: measure_from + Duration::from_secs_f64(self.duration),
        }
    }
}
