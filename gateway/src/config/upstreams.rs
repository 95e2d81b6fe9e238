//! `[upstreams.NAME]`: pools of servers that know nothing of Dormouse.

use std::num::NonZeroU32;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::shed::SheddingConfig;

/// One pool.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct UpstreamConfig {
    /// `host:port` each, or a table with a weight. A name stands for all its addresses.
    pub servers: Vec<ServerConfig>,
    /// How often names are looked up again.
    #[serde(with = "humantime_serde")]
    pub resolve_every: Duration,
    pub balance: Balance,
    /// A template, for `hash` and `bounded-hash`. A request that lacks it goes to the next in turn.
    pub key: String,
    /// For `bounded-hash`: no server has more than this times the mean of requests under way.
    pub load_max: f64,
    /// A cookie that keeps a client with its server. Empty: none.
    pub sticky_cookie: String,
    /// The `Host` that servers see. Empty: what the client sent.
    pub host: String,
    pub http: HttpVersion,
    /// Present: connections are TLS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<UpstreamTlsConfig>,
    pub timeouts: TimeoutsConfig,
    pub health: HealthConfig,
    pub eject: EjectConfig,
    pub retry: UpstreamRetryConfig,
    /// Present: fewer requests go to it at once when it becomes slow.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shedding: Option<SheddingConfig>,
}

impl Default for UpstreamConfig {
    fn default() -> Self {
        Self {
            servers: Vec::new(),
            resolve_every: Duration::from_secs(30),
            balance: Balance::default(),
            key: String::new(),
            load_max: 1.25,
            sticky_cookie: String::new(),
            host: String::new(),
            http: HttpVersion::default(),
            tls: None,
            timeouts: TimeoutsConfig::default(),
            health: HealthConfig::default(),
            eject: EjectConfig::default(),
            retry: UpstreamRetryConfig::default(),
            shedding: None,
        }
    }
}

/// One server, or all addresses of a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ServerConfig {
    Address(String),
    Weighted(WeightedServerConfig),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightedServerConfig {
    pub address: String,
    /// Its part of the requests, from 1 to 100.
    pub weight: u8,
}

impl ServerConfig {
    pub fn address(&self) -> &str {
        match self {
            Self::Address(address) => address,
            Self::Weighted(server) => &server.address,
        }
    }

    pub fn weight(&self) -> u8 {
        match self {
            Self::Address(_) => 1,
            Self::Weighted(server) => server.weight,
        }
    }
}

/// How a server is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Balance {
    /// One after the other, as often as their weights say.
    #[default]
    RoundRobin,
    /// The one with the fewest requests under way, for its weight.
    LeastConnections,
    /// By consistent hash of `key` (ketama): the servers that nginx's `hash … consistent` takes.
    Hash,
    /// The same, but a server with too much under way passes on to the next.
    BoundedHash,
}

/// What is spoken to servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum HttpVersion {
    #[default]
    #[serde(rename = "1")]
    One,
    /// With TLS what the server prefers; without, 1.
    #[serde(rename = "auto")]
    Auto,
    /// HTTP/2 alone; without TLS with prior knowledge.
    #[serde(rename = "2")]
    Two,
}

/// `[upstreams.NAME.tls]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct UpstreamTlsConfig {
    /// The name that certificates must have. Empty: that of the server's address.
    pub sni: String,
    /// Whether certificates are verified.
    pub verify: bool,
    /// PEM file of the authorities that are believed. Empty: those of the system.
    pub ca_file: String,
    /// PEM files of a certificate and key to show to servers. Empty: none.
    pub cert_file: String,
    pub key_file: String,
}

impl Default for UpstreamTlsConfig {
    fn default() -> Self {
        Self {
            sni: String::new(),
            verify: true,
            ca_file: String::new(),
            cert_file: String::new(),
            key_file: String::new(),
        }
    }
}

/// `[upstreams.NAME.timeouts]`: what is absent is as in `[requests]`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TimeoutsConfig {
    /// Until the TCP connection is there.
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub connect: Option<Duration>,
    /// Until the TLS connection is there, TCP included.
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub handshake: Option<Duration>,
    /// Silence while the server owes bytes.
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub read: Option<Duration>,
    /// While the server takes no bytes.
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub write: Option<Duration>,
    /// An idle connection is closed.
    #[serde(with = "humantime_serde", skip_serializing_if = "Option::is_none")]
    pub idle: Option<Duration>,
}

/// `[upstreams.NAME.health]`: asks servers whether they are well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HealthConfig {
    /// What is asked for with GET. Empty: nothing is asked.
    pub path: String,
    /// Statuses that mean well. Empty: 200 to 399.
    pub status: Vec<u16>,
    #[serde(with = "humantime_serde")]
    pub every: Duration,
    /// For the whole answer's head.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// Bad answers in a row before a server gets no more requests.
    pub down_after: NonZeroU32,
    /// Good ones in a row before it gets some again.
    pub up_after: NonZeroU32,
}

impl Default for HealthConfig {
    fn default() -> Self {
        Self {
            path: String::new(),
            status: Vec::new(),
            every: Duration::from_secs(5),
            timeout: Duration::from_secs(2),
            down_after: NonZeroU32::new(3).expect("not 0"),
            up_after: NonZeroU32::new(2).expect("not 0"),
        }
    }
}

/// `[upstreams.NAME.eject]`: what requests themselves tell about a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EjectConfig {
    /// Failures in a row (no connection, broken, silent, 502, 503, 504) before a server is left out.
    /// 0: never.
    pub failures: u32,
    /// For how long. After that one more failure is enough, until a request succeeds.
    #[serde(with = "humantime_serde")]
    pub pause: Duration,
}

impl Default for EjectConfig {
    fn default() -> Self {
        Self {
            failures: 5,
            pause: Duration::from_secs(10),
        }
    }
}

/// `[upstreams.NAME.retry]`: what is sent again, to another server if there is one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct UpstreamRetryConfig {
    /// Tries of one request, the first included.
    pub tries_max: u32,
    /// Retries per request on average; more are not sent, so that they cannot add to an overload.
    pub budget: f64,
    /// Retries at once on top of that.
    pub reserve: u32,
    /// Answers with these statuses are tried again too, if the method is idempotent.
    pub status: Vec<u16>,
}

impl Default for UpstreamRetryConfig {
    fn default() -> Self {
        Self {
            tries_max: 3,
            budget: 0.2,
            reserve: 100,
            status: Vec::new(),
        }
    }
}
