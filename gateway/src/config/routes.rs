//! `[[routes]]`: what is matched, and what is done with it.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::access::AccessConfig;
use crate::cache::config::RouteCacheConfig;
use crate::cors::CorsConfig;
use crate::validate::ValidateConfig;

/// One route. Exactly one of `upstream`, `object`, `rpc`, `counter`, `redirect` and `respond` says where to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteConfig {
    /// Unique; the label of this route in metrics.
    pub name: String,
    /// See [`PathPattern`](crate::route::pattern::PathPattern).
    pub path: String,
    /// Only requests for this host, without its port; `*.example.org` is any host below that one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Only requests without TLS (`http`), or only those with it (`https`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scheme: Option<Scheme>,
    /// Only these methods. Empty: any, but for `rpc` only POST, and for `counter` what it is for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub methods: Vec<String>,
    /// Only requests with these headers; the value `*` is any value.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
    /// Where several routes match, the highest wins, before the most specific one.
    #[serde(default)]
    pub priority: i32,
    /// One of `upstreams`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upstream: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<ObjectRouteConfig>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rpc: Option<RpcRouteConfig>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counter: Option<CounterRouteConfig>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redirect: Option<RedirectConfig>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub respond: Option<RespondConfig>,
    /// A template: the path that the upstream or object sees. The query is kept unless it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rewrite: Option<String>,
    /// Whether answers of apps are compressed for clients that accept it (gzip, brotli, zstd).
    #[serde(default)]
    pub compress: bool,
    /// Whether answers, but for those of objects, get the usual headers against attacks in browsers.
    #[serde(default)]
    pub security_headers: bool,
    /// Instead of `requests.deadline_max`.
    #[serde(
        default,
        with = "humantime_serde",
        skip_serializing_if = "Option::is_none"
    )]
    pub deadline_max: Option<Duration>,
    /// Computes `{shard}` for templates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shard: Option<ShardConfig>,
    /// Which addresses it is for.
    #[serde(default)]
    pub access: AccessConfig,
    /// Names of ways to know who asks; any one does. Empty: open to all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub auth: Vec<String>,
    /// What requests must look like.
    #[serde(default)]
    pub validate: ValidateConfig,
    /// Names of limits that its requests obey, all at once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub limits: Vec<String>,
    /// The name of a limit of new objects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub creations: Option<String>,
    /// Which pages of other origins may use it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cors: Option<CorsConfig>,
    /// Its answers are kept, and given again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<RouteCacheConfig>,
}

/// `object`: the `fetch` of an object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ObjectRouteConfig {
    pub class: String,
    /// A template of the object's name.
    pub name: String,
    #[serde(default)]
    pub scope: Scope,
}

/// `rpc`: the call of a method; the body is the array of its arguments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RpcRouteConfig {
    pub class: String,
    /// A template of the object's name.
    pub name: String,
    pub method: String,
    #[serde(default)]
    pub scope: Scope,
}

/// `counter`: an increment of a sharded counter, or its value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CounterRouteConfig {
    /// A template of the counter's name.
    pub name: String,
    /// A template of what is added. Absent: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
    /// Its value is read instead.
    #[serde(default)]
    pub read: bool,
}

/// Where the objects of a name live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// One object per name.
    #[default]
    Global,
    /// One object per name and colo, on the nodes of the colo where the request came in.
    Colo,
}

/// Whether a request came in with TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scheme {
    Http,
    Https,
}

/// `redirect`: to another URL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RedirectConfig {
    /// A template. The query is kept unless it has one.
    pub to: String,
    /// 301, 302, 303, 307 or 308.
    #[serde(default = "permanent_redirect")]
    pub status: u16,
}

fn permanent_redirect() -> u16 {
    308
}

/// `respond`: always the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RespondConfig {
    /// From 200 to 599.
    #[serde(default = "ok")]
    pub status: u16,
    #[serde(default)]
    pub body: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
}

fn ok() -> u16 {
    200
}

/// `shard`: a number below `count`, `{shard}` in templates.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ShardConfig {
    /// A template of what is hashed or compared. Not for `random` and `round-robin`.
    pub by: String,
    pub hash: ShardHash,
    /// 10 to 1,000 are advised. Not for `range`.
    pub count: u32,
    /// For `range`: where the second and each further shard begins, ascending, letters' case aside.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub bounds: Vec<String>,
    /// For `overflow`: what one shard of a key gets from this gateway in each `period`, before the next one gets the
    /// rest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<NonZeroU32>,
    #[serde(with = "humantime_serde")]
    pub period: Duration,
}

impl Default for ShardConfig {
    fn default() -> Self {
        Self {
            by: String::new(),
            hash: ShardHash::default(),
            count: 100,
            bounds: Vec::new(),
            limit: None,
            period: Duration::from_secs(1),
        }
    }
}

/// How a shard is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShardHash {
    /// xxh3 of 64 bits; fast, and even for any keys.
    #[default]
    Xxh3,
    /// The string hash of the sharding examples for Workers, bit for bit.
    Java31,
    /// By ranges of keys.
    Range,
    /// Anywhere, for writes that may go to any shard.
    Random,
    /// One after the other.
    RoundRobin,
    /// The first one whose share of the key is not used up: one shard for most keys, and more the hotter a key is.
    Overflow,
}
