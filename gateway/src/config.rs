//! `gateway.toml` as types, the command line, and what both must obey together.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use clap::Parser;
use ops::args::{ProcessArgs, overrule};
use ops::config::{ConfigError, non_empty};
use protocol::Colo;
use serde::{Deserialize, Serialize};

use crate::route::Pattern;

/// Everything a gateway can be told. Every key has a default; `config/gateway.toml` shows them all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    pub listen: String,
    pub admin_listen: String,
    /// The site this gateway is in; objects see it.
    pub colo: String,
    /// Threads that serve connections; 0 is one per core.
    pub threads: u16,
    /// How long a stopping gateway waits for requests under way.
    #[serde(with = "humantime_serde")]
    pub drain_max: Duration,
    /// The cluster's shared secret, sent to workers. Empty: none.
    pub token: String,
    /// Bearer token of the admin listener. Required off loopback. Empty: none.
    pub admin_token: String,
    /// Workers to learn the ring from: any one of each node that is likely to be up.
    pub nodes: Vec<String>,
    pub requests: RequestsConfig,
    pub retry: RetryConfig,
    /// Names what the routes' `upstream` may be.
    pub upstreams: BTreeMap<String, UpstreamConfig>,
    /// What is not for objects. The longest matching path wins.
    pub routes: Vec<RouteConfig>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:8080".to_owned(),
            admin_listen: "127.0.0.1:8081".to_owned(),
            colo: "unknown".to_owned(),
            threads: 0,
            drain_max: Duration::from_secs(30),
            token: String::new(),
            admin_token: String::new(),
            nodes: vec!["127.0.0.1:7100".to_owned()],
            requests: RequestsConfig::default(),
            retry: RetryConfig::default(),
            upstreams: BTreeMap::new(),
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
    /// Idle connections to workers and upstreams are closed after this time.
    #[serde(with = "humantime_serde")]
    pub idle_max: Duration,
    /// Idle connections kept, per thread.
    pub idle_connections_max: u32,
}

impl Default for RequestsConfig {
    fn default() -> Self {
        Self {
            body_bytes_max: 1 << 30,
            connect_max: Duration::from_secs(1),
            silence_max: Duration::from_secs(60),
            idle_max: Duration::from_secs(60),
            idle_connections_max: 1024,
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

/// `[upstreams.NAME]`: plain HTTP servers that know nothing of Dormouse, used in turn.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpstreamConfig {
    /// `host:port` each.
    pub servers: Vec<String>,
}

/// `[[routes]]`: requests that go to an app.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteConfig {
    /// Unique; the label of this route in metrics.
    pub name: String,
    /// A path, or a prefix that ends in `/*`.
    pub path: String,
    /// Only requests for this host, without its port. Absent: any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// One of `upstreams`.
    pub upstream: String,
}

/// Prefixes that belong to the public contract.
const RESERVED_PATHS: [&str; 3] = ["/objects", "/rpc", "/counters"];

impl Config {
    /// What one field cannot check by itself.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let rule = |text: String| Err(ConfigError::Rule(text));
        if let Err(error) = self.colo.parse::<Colo>() {
            return rule(error.to_string());
        }
        ops::config::require_token_off_loopback(
            "admin_listen",
            &self.admin_listen,
            non_empty(&self.admin_token),
            "an admin token (admin_token, or DORMOUSE_ADMIN_TOKEN)",
        )?;
        if self.retry.tries_max == 0 {
            return rule("retry.tries_max = 0 must be at least 1".to_owned());
        }
        if self.retry.ring_refresh < Duration::from_millis(10) {
            return rule(format!(
                "retry.ring_refresh = {:?} must be at least 10ms",
                self.retry.ring_refresh
            ));
        }
        for (name, upstream) in &self.upstreams {
            if upstream.servers.is_empty() {
                return rule(format!("upstreams.{name}.servers must not be empty"));
            }
            for server in &upstream.servers {
                let port = server
                    .rsplit_once(':')
                    .and_then(|(_, port)| port.parse::<u16>().ok());
                if port.is_none() {
                    return rule(format!(
                        "upstreams.{name}.servers: {server:?} must be host:port"
                    ));
                }
            }
        }
        for (number, route) in self.routes.iter().enumerate() {
            self.validate_route(number, route)?;
        }
        Ok(())
    }

    fn validate_route(&self, number: usize, route: &RouteConfig) -> Result<(), ConfigError> {
        let name = &route.name;
        let rule = |text: String| Err(ConfigError::Rule(format!("route {name:?}: {text}")));
        if name.is_empty() || crate::route::RESERVED_LABELS.contains(&name.as_str()) {
            return rule(format!(
                "name must not be empty and not one of {}",
                crate::route::RESERVED_LABELS.join(", ")
            ));
        }
        if self.routes[..number]
            .iter()
            .any(|other| other.name == *name)
        {
            return rule("another route has this name".to_owned());
        }
        if let Err(reason) = Pattern::new(&route.path) {
            return rule(format!("path = {:?} {reason}", route.path));
        }
        let reserved = RESERVED_PATHS.iter().find(|reserved| {
            route
                .path
                .strip_prefix(**reserved)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        });
        if let Some(reserved) = reserved {
            return rule(format!(
                "path = {:?} would hide {reserved}, which belongs to objects",
                route.path
            ));
        }
        if !self.upstreams.contains_key(&route.upstream) {
            return rule(format!(
                "upstream = {:?} is not among the upstreams ({})",
                route.upstream,
                self.upstreams
                    .keys()
                    .cloned()
                    .collect::<Vec<_>>()
                    .join(", ")
            ));
        }
        Ok(())
    }

    pub fn thread_count(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            count => usize::from(count),
        }
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
        overrule(
            &mut config.nodes,
            (!self.nodes.is_empty()).then(|| self.nodes.clone()),
        );
        overrule(&mut config.token, given.token);
        overrule(&mut config.admin_token, given.admin_token);
        config.validate()?;
        Ok(config)
    }
}

/// Reads a file without validating it.
pub fn read(path: &Path) -> Result<Config, ConfigError> {
    ops::config::read(path)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

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

    #[test]
    fn the_example_of_an_app_is_valid() {
        let config = read(&file("examples/app.toml")).unwrap();
        config.validate().unwrap();
        assert_eq!(config.routes.len(), 1);
    }

    #[track_caller]
    fn refused(toml: &str, want: &str) {
        let config: Config = toml::from_str(toml).unwrap();
        let error = config.validate().unwrap_err().to_string();
        assert!(error.contains(want), "{error:?} should say {want:?}");
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
            "upstreams.app.servers = []",
            "upstreams.app.servers must not be empty",
        );
        refused("upstreams.app.servers = ['nohost']", "must be host:port");
        refused(&route("/x", "other"), "is not among the upstreams (app)");
        refused(&route("x", "app"), "must begin with /");
        refused(&route("/a*b", "app"), "only at the end");
        refused(&route("/objects/*", "app"), "would hide /objects");
        let two = format!(
            "{}\n[[routes]]\nname = 'r'\npath = '/y'\nupstream = 'app'",
            route("/x", "app")
        );
        refused(&two, "another route has this name");
    }
}
