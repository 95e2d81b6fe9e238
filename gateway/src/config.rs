//! `gateway.toml` as types, the command line, and what both must obey together.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Parser;
use clap::builder::FalseyValueParser;
use ops::args::{ProcessArgs, overrule};
use ops::config::{Broken, ConfigError, non_empty};
use protocol::Colo;
use serde::{Deserialize, Serialize};

use crate::access::AccessConfig;
use crate::auth::AuthConfig;
use crate::cache::config::{CacheConfig, RouteCacheConfig};
use crate::cache::plan::Plans;
use crate::client::ClientRules;
use crate::cors::CorsConfig;
use crate::counters::config::CountersConfig;
use crate::downstream::certificates::Certificates;
use crate::limit::config::LimitConfig;
use crate::route::{Route, Routes};
use crate::rules::RuleSet;
use crate::shed::SheddingConfig;
use crate::upstream::Upstream;
use crate::validate::ValidateConfig;

mod connections;
mod routes;
mod upstreams;

pub use connections::ConnectionsConfig;
pub use routes::{
    CounterRouteConfig, ObjectRouteConfig, RedirectConfig, RespondConfig, RouteConfig,
    RpcRouteConfig, Scheme, Scope, ShardConfig, ShardHash,
};
pub use upstreams::{
    Balance, EjectConfig, HealthConfig, HttpVersion, ServerConfig, TimeoutsConfig, UpstreamConfig,
    UpstreamRetryConfig, UpstreamTlsConfig, WeightedServerConfig,
};

/// Everything a gateway can be told. Every key has a default; `config/gateway.toml` shows them all.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    pub listen: String,
    /// Address that clients connect to with TLS. Empty: none.
    pub tls_listen: String,
    /// Whether clients may speak HTTP/2: by ALPN, and with prior knowledge.
    pub http2: bool,
    pub admin_listen: String,
    /// A Unix socket: `gateway --upgrade` takes over from the gateway that waits there. Empty: none.
    pub upgrade_socket: String,
    /// The site this gateway is in; objects see it.
    pub colo: String,
    /// Threads that serve connections; 0 is one per core.
    pub threads: u16,
    /// How long a stopping gateway waits for requests under way.
    #[serde(with = "humantime_serde")]
    pub drain_max: Duration,
    /// How often the config file is looked at for changes; 0 is never.
    #[serde(with = "humantime_serde")]
    pub watch_every: Duration,
    /// The cluster's shared secret, sent to workers. Empty: none.
    pub token: String,
    /// Bearer token of the admin listener. Required off loopback. Empty: none.
    pub admin_token: String,
    /// Workers to learn the ring from: any one of each node that is likely to be up.
    pub nodes: Vec<String>,
    pub connections: ConnectionsConfig,
    pub requests: RequestsConfig,
    pub retry: RetryConfig,
    /// Names what the routes' `upstream` may be.
    pub upstreams: BTreeMap<String, UpstreamConfig>,
    pub objects: ObjectsConfig,
    pub counters: CountersConfig,
    pub client: ClientConfig,
    /// Ways to know who asks, by name, for `auth` of routes.
    pub auth: BTreeMap<String, AuthConfig>,
    pub access_log: AccessLogConfig,
    pub cache: CacheConfig,
    /// Rate limits by name, for `limits` of routes.
    pub limits: BTreeMap<String, LimitConfig>,
    /// For `tls_listen`: the one for the name that a client asks for, or else the first.
    pub certificates: Vec<CertificateConfig>,
    /// What is not for objects by the public contract.
    pub routes: Vec<RouteConfig>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:8080".to_owned(),
            tls_listen: String::new(),
            http2: true,
            admin_listen: "127.0.0.1:8081".to_owned(),
            upgrade_socket: String::new(),
            colo: "unknown".to_owned(),
            threads: 0,
            drain_max: Duration::from_secs(30),
            watch_every: Duration::from_secs(1),
            token: String::new(),
            admin_token: String::new(),
            nodes: vec!["127.0.0.1:7100".to_owned()],
            connections: ConnectionsConfig::default(),
            requests: RequestsConfig::default(),
            retry: RetryConfig::default(),
            upstreams: BTreeMap::new(),
            objects: ObjectsConfig::default(),
            counters: CountersConfig::default(),
            client: ClientConfig::default(),
            auth: BTreeMap::new(),
            access_log: AccessLogConfig::default(),
            cache: CacheConfig::default(),
            limits: BTreeMap::new(),
            certificates: Vec::new(),
            routes: Vec::new(),
        }
    }
}

/// `[requests]`: bounds of one request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RequestsConfig {
    /// Larger request bodies are refused. Bodies are streamed, never held whole.
    pub body_bytes_max: u64,
    /// Connecting to a worker or an upstream.
    #[serde(with = "humantime_serde")]
    pub connect_max: Duration,
    /// Silence while a worker or an upstream owes bytes, before `timed_out`.
    #[serde(with = "humantime_serde")]
    pub silence_max: Duration,
    /// Longest that a request may take to its answer's end; clients may ask for less. 0: any time.
    #[serde(with = "humantime_serde")]
    pub deadline_max: Duration,
    /// Idle connections to workers and upstreams are closed after this time.
    #[serde(with = "humantime_serde")]
    pub idle_max: Duration,
    /// Idle connections kept, per thread.
    pub idle_connections_max: u32,
    /// Requests for objects share one connection per worker and thread where they can.
    pub links: bool,
}

impl Default for RequestsConfig {
    fn default() -> Self {
        Self {
            body_bytes_max: 1 << 30,
            connect_max: Duration::from_secs(1),
            silence_max: Duration::from_secs(60),
            deadline_max: Duration::ZERO,
            idle_max: Duration::from_secs(60),
            idle_connections_max: 1024,
            links: true,
        }
    }
}

/// `[retry]`: what is sent again when nothing ran, and for how long.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetryConfig {
    /// Tries of one request, the first included.
    pub tries_max: u32,
    /// Pause before the second try; it doubles with each further one.
    #[serde(with = "humantime_serde")]
    pub pause: Duration,
    /// How often the ring is read again from the nodes, changes or not.
    #[serde(with = "humantime_serde")]
    pub ring_refresh: Duration,
}

impl Default for RetryConfig {
    fn default() -> Self {
        Self {
            tries_max: 5,
            pause: Duration::from_millis(20),
            ring_refresh: Duration::from_secs(5),
        }
    }
}

/// `[[certificates]]`: PEM files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CertificateConfig {
    /// The certificate, then those that lead to its authority.
    pub cert_file: String,
    pub key_file: String,
}

/// `[access_log]`: a line of JSON per request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AccessLogConfig {
    /// Lines are appended to it; it is opened again when the config is. Empty: no log.
    pub file: String,
    /// Part of the requests that are written; those answered 500 and above all are.
    pub sample: f64,
}

impl Default for AccessLogConfig {
    fn default() -> Self {
        Self {
            file: String::new(),
            sample: 1.0,
        }
    }
}

/// `[client]`: who asks, when proxies stand before this gateway.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClientConfig {
    /// Addresses and networks of proxies whose headers are believed.
    pub trusted_proxies: Vec<String>,
    /// Where they say who the client is, as in `x-forwarded-for`. Empty: nowhere.
    pub address_header: String,
    /// Where they say at which colo the request came in, as in `cf-ray`. Empty: nowhere.
    pub colo_header: String,
    /// Connections begin with a PROXY header, and come from `trusted_proxies` only.
    pub proxy_protocol: bool,
}

/// `[objects]`: the public contract for objects.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ObjectsConfig {
    /// Classes of which each colo has objects of its own under `/objects` and `/rpc`.
    pub colo_scoped: Vec<String>,
    /// The following are as in routes.
    pub access: AccessConfig,
    pub auth: Vec<String>,
    pub validate: ValidateConfig,
    pub limits: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub creations: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cors: Option<CorsConfig>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<RouteCacheConfig>,
    /// Present: fewer requests go to objects at once when they become slow.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shedding: Option<SheddingConfig>,
}

/// Keys that a running gateway reads again.
const RELOADED: [&str; 9] = [
    "access_log",
    "auth",
    "certificates",
    "routes",
    "client",
    "counters",
    "limits",
    "objects",
    "upstreams",
];

impl Config {
    /// What one field cannot check by itself.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if let Err(error) = self.colo.parse::<Colo>() {
            return Err(Broken::value("colo", &self.colo, error).into());
        }
        ops::config::require_token_off_loopback(
            "admin_listen",
            &self.admin_listen,
            non_empty(&self.admin_token),
            "an admin token (admin_token, or DORMOUSE_ADMIN_TOKEN)",
        )?;
        if self.retry.tries_max == 0 {
            let broken = Broken::value("tries_max", 0, "must be at least 1");
            return Err(broken.under("retry").into());
        }
        if self.retry.ring_refresh < Duration::from_millis(10) {
            let broken = Broken::value(
                "ring_refresh",
                self.retry.ring_refresh,
                "must be at least 10ms",
            );
            return Err(broken.under("retry").into());
        }
        let connections = self.connections.check();
        connections.map_err(|broken| broken.under("connections"))?;
        if let Some(shedding) = &self.objects.shedding {
            let checked = shedding.check();
            checked.map_err(|broken| broken.under("shedding").under("objects"))?;
        }
        for (name, upstream) in &self.upstreams {
            let checked = Upstream::check(upstream);
            checked.map_err(|broken| broken.under(name).under("upstreams"))?;
        }
        let certificates = Certificates::new(&self.certificates);
        certificates.map_err(|broken| broken.under("certificates"))?;
        if !self.tls_listen.is_empty() && self.certificates.is_empty() {
            let rule = "needs certificates";
            return Err(Broken::value("tls_listen", &self.tls_listen, rule).into());
        }
        if !(0.0..=1.0).contains(&self.access_log.sample) {
            let broken = Broken::value("sample", self.access_log.sample, "must be from 0 to 1");
            return Err(broken.under("access_log").into());
        }
        self.cache
            .validate()
            .map_err(|broken| broken.under("cache"))?;
        ClientRules::new(&self.client).map_err(|broken| broken.under("client"))?;
        let routes = Routes::new(self)?;
        RuleSet::check(self, &routes)?;
        Plans::new(self, &routes)?;
        Ok(())
    }

    pub fn thread_count(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            count => usize::from(count),
        }
    }

    /// What an operator should hear of, though it is legal. The config was validated.
    pub fn warnings(&self) -> Vec<String> {
        let routes = Routes::new(self).unwrap_or_default();
        routes.iter().filter_map(Route::warning).collect()
    }

    /// Files that the config names.
    pub fn files(&self) -> Vec<PathBuf> {
        let mine = self.certificates.iter();
        let mine = mine.flat_map(|one| [&one.cert_file, &one.key_file]);
        let upstreams = self.upstreams.values().filter_map(|pool| pool.tls.as_ref());
        let theirs = upstreams.flat_map(|tls| [&tls.ca_file, &tls.cert_file, &tls.key_file]);
        let pem = mine.chain(theirs).filter(|file| !file.is_empty());
        let validate = self.routes.iter().map(|route| &route.validate);
        let validate = validate.chain([&self.objects.validate]);
        let schemas = validate.filter_map(|rules| rules.schema_file.clone());
        pem.map(PathBuf::from).chain(schemas).collect()
    }

    /// Keys that differ from `before` and are only read when a gateway starts.
    pub fn differences_that_wait(&self, before: &Self) -> Vec<String> {
        let keys = |config: &Self| match serde_json::to_value(config) {
            Ok(serde_json::Value::Object(keys)) => keys,
            _ => serde_json::Map::new(),
        };
        let (mine, before) = (keys(self), keys(before));
        let differ = mine.into_iter().filter(|(key, value)| {
            !RELOADED.contains(&key.as_str()) && before.get(key) != Some(value)
        });
        differ.map(|(key, _)| key).collect()
    }

    /// The site, parsed.
    pub fn site(&self) -> Result<Colo, ConfigError> {
        self.colo
            .parse()
            .map_err(|error: protocol::ids::ColoError| ConfigError::Rule(error.to_string()))
    }
}

/// The stateless edge of Dormouse: routes requests to objects and to app upstreams.
#[derive(Debug, Clone, Parser)]
#[command(name = "gateway", version)]
pub struct Args {
    #[command(flatten)]
    pub process: ProcessArgs,
    /// Threads that serve connections; 0 is one per core
    #[arg(long, env = "DORMOUSE_THREADS")]
    pub threads: Option<u16>,
    /// Take over the listening sockets of the gateway that waits at the upgrade socket, which then ends; if
    /// there is none, start as usual
    #[arg(long, env = "DORMOUSE_UPGRADE", value_parser = FalseyValueParser::new())]
    pub upgrade: bool,
    /// Unix socket to be relieved at, and to take over at
    #[arg(long, env = "DORMOUSE_UPGRADE_SOCKET", value_name = "PATH")]
    pub upgrade_socket: Option<String>,
    /// Workers to learn the ring from
    #[arg(
        long,
        env = "DORMOUSE_NODES",
        value_name = "HOST:PORT",
        value_delimiter = ','
    )]
    pub nodes: Vec<String>,
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
        overrule(&mut config.threads, self.threads);
        overrule(&mut config.upgrade_socket, self.upgrade_socket.clone());
        overrule(
            &mut config.nodes,
            (!self.nodes.is_empty()).then(|| self.nodes.clone()),
        );
        overrule(&mut config.token, given.token);
        overrule(&mut config.admin_token, given.admin_token);
        let file = given.config.as_deref();
        config.validate().map_err(|error| error.located(file))?;
        Ok(config)
    }
}

/// Reads a file without validating it.
pub fn read(path: &Path) -> Result<Config, ConfigError> {
    ops::config::read(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../config")
            .join(name)
    }

    #[test]
    fn the_shipped_file_is_the_default_config() {
        assert_eq!(read(&file("gateway.toml")).unwrap(), Config::default());
        let text = std::fs::read_to_string(file("gateway.toml")).unwrap();
        for key in toml::to_string(&Config::default()).unwrap().lines() {
            let key = key.split('=').next().unwrap().trim();
            assert!(text.contains(key), "gateway.toml does not mention {key}");
        }
    }

    /// What the comments of the shipped file show, as a config.
    fn manual() -> Config {
        let text = std::fs::read_to_string(file("gateway.toml")).unwrap();
        let shown: Vec<&str> = text
            .lines()
            .filter_map(|l| l.strip_prefix("#   "))
            .collect();
        toml::from_str(&shown.join("\n")).unwrap()
    }

    #[test]
    fn what_the_manual_shows_is_valid_and_complete() {
        let manual = manual();
        manual.validate().unwrap();
        assert_eq!(manual.warnings(), [""; 0]);
        let text = std::fs::read_to_string(file("gateway.toml")).unwrap();
        let source = concat!(
            include_str!("config/routes.rs"),
            include_str!("limit/config.rs"),
            include_str!("access.rs"),
            include_str!("auth.rs"),
            include_str!("auth/api_key.rs"),
            include_str!("auth/jwt.rs"),
            include_str!("auth/signed_url.rs"),
            include_str!("cache/config.rs"),
            include_str!("cors.rs"),
            include_str!("validate.rs"),
        );
        for key in source
            .lines()
            .filter_map(|line| line.trim().strip_prefix("pub "))
        {
            if let Some((key, _)) = key.split_once(':')
                && !key.contains(' ')
            {
                let key = key.trim_start_matches("r#");
                assert!(text.contains(key), "gateway.toml does not mention {key}");
            }
        }
    }

    #[track_caller]
    fn refused(toml: &str, want: &str) {
        let config: Config = toml::from_str(toml).unwrap();
        let error = config.validate().unwrap_err().to_string();
        assert!(error.contains(want), "{error:?} should say {want:?}");
    }

    #[track_caller]
    fn route_refused(keys: &str, want: &str) {
        refused(
            &format!("routes = [{{ name = 'r', path = '/x/{{id}}', {keys} }}]"),
            want,
        );
    }

    #[test]
    fn routes_that_mean_nothing_are_refused_by_key_value_and_rule() {
        let ok = "respond = {}";
        route_refused(
            "methods = []",
            "routes[0].name = \"r\" must have exactly one of upstream, object",
        );
        route_refused("respond = {}, upstream = 'a'", "exactly one of");
        route_refused(
            &format!("{ok}, host = 'a:1'"),
            "routes[0].host = \"a:1\" must be a host without a port",
        );
        route_refused(
            &format!("{ok}, methods = ['get']"),
            "routes[0].methods[0] = \"get\" must be a method in upper case",
        );
        route_refused(
            &format!("{ok}, headers = {{ 'a b' = '*' }}"),
            "routes[0].headers.a b = \"*\" cannot be a header",
        );
        route_refused(
            &format!("{ok}, rewrite = '/'"),
            "routes[0].rewrite = \"/\" is for routes to an upstream",
        );
        route_refused(
            "respond = { status = 99 }",
            "routes[0].respond.status = 99 must be from 200 to 599",
        );
        route_refused(
            "redirect = { to = '/', status = 200 }",
            "routes[0].redirect.status = 200 must be 301",
        );
        route_refused(
            "redirect = { to = '{path.x}' }",
            "routes[0].redirect.to is no template \"{path.x}\", character 1",
        );
        route_refused(
            "object = { class = '1', name = 'a' }",
            "routes[0].object.class = \"1\" class name",
        );
        route_refused(
            "object = { class = 'Kv', name = '{a' }",
            "routes[0].object.name is no template \"{a\", character 1: { without a }",
        );
        route_refused(
            "counter = { name = '{a' }",
            "routes[0].counter.name is no template \"{a\", character 1: { without a }",
        );
        route_refused(
            "counter = { name = 'c', by = '1.5' }",
            "routes[0].counter.by = \"1.5\" must be a whole number of 64 bits",
        );
        route_refused(
            "counter = { name = 'c', by = '1', read = true }",
            "routes[0].counter.by = \"1\" is for increments",
        );
        route_refused(
            "object = { class = 'Kv', name = '{shard}' }",
            "has no shard table",
        );
        route_refused(
            "object = { class = 'Kv', name = '{shard}' }, shard = { by = 'x' }",
            "routes[0].shard.by = \"x\" must take something",
        );
        route_refused(
            "rpc = { class = 'Kv', name = 'a', method = '1x' }",
            "routes[0].rpc.method = \"1x\" method name",
        );
        refused(
            "objects.colo_scoped = ['K$']",
            "objects.colo_scoped[0] = \"K$\"",
        );
        refused(
            "client.colo_header = 'cf-ray'",
            "client.trusted_proxies must name those",
        );
    }

    #[test]
    fn keys_that_wait_for_a_start_are_known() {
        let config: Config =
            toml::from_str("threads = 7\nrequests.idle_max = '1s'\nobjects.colo_scoped = ['A']")
                .unwrap();
        assert_eq!(
            config.differences_that_wait(&Config::default()),
            ["threads", "requests"]
        );
        assert_eq!(config.differences_that_wait(&config), [""; 0]);
        let keys = toml::to_string(&Config::default()).unwrap();
        for key in RELOADED {
            assert!(keys.contains(key), "{key} is a key");
        }
    }

    #[test]
    fn shard_counts_outside_of_the_advice_are_warned_of() {
        let warnings = |count: u32| {
            let config: Config = toml::from_str(&format!(
                "routes = [{{ name = 'r', path = '/', respond = {{}}, shard = {{ by = '{{query.k|}}', count = {count} }} }}]"
            ))
            .unwrap();
            config.validate().unwrap();
            config.warnings()
        };
        assert_eq!(warnings(100), [""; 0]);
        assert_eq!(
            warnings(9),
            ["route \"r\": shard.count = 9: from 10 to 1000 are advised"]
        );
    }

    #[test]
    fn settings_that_contradict_each_other_are_refused() {
        let app = "upstreams.app.servers = ['127.0.0.1:1']\n";
        let route = |path: &str, upstream: &str| {
            format!("{app}[[routes]]\nname = 'r'\npath = '{path}'\nupstream = '{upstream}'")
        };
        refused("colo = 'sfo'", "three upper-case letters");
        refused("admin_listen = '0.0.0.0:1'", "needs an admin token");
        refused("retry.tries_max = 0", "retry.tries_max = 0");
        refused(
            "counters.key = 'fixed'",
            "counters.key = \"fixed\" must take something from the request",
        );
        refused(
            "upstreams.app.servers = []",
            "upstreams.app.servers must not be empty",
        );
        refused("upstreams.app.servers = ['nohost']", "must be host:port");
        refused(&route("/x", "other"), "is not among the upstreams (app)");
        refused(
            &route("x", "app"),
            "routes[0].path = \"x\" must begin with /",
        );
        refused(&route("/a*b", "app"), "must be whole segments");
        refused(&route("/objects/*", "app"), "would hide /objects");
        let two = format!(
            "{}\n[[routes]]\nname = 'r'\npath = '/y'\nupstream = 'app'",
            route("/x", "app")
        );
        refused(&two, "routes[1].name = \"r\" is the name of another route");
    }
}
