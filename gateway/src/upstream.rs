//! App upstreams: pools of HTTP servers that know nothing of Dormouse.
//!
//! A pool knows three things of each server: what asking it said (`health`), what requests said
//! (`server`), and what is under way there. A server that is not well or ejected gets no requests, unless
//! no other is left: then all are tried, because a chance is better than a refusal.

pub(crate) mod answer;
pub mod balance;
pub mod connections;
mod health;
mod resolve;
pub mod server;
pub(crate) mod tls;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use arc_swap::ArcSwap;
use http::HeaderValue;
use ops::Causes;
use ops::config::{Broken, ConfigError, non_empty};
use pingora_core::protocols::ALPN;
use pingora_core::upstreams::peer::HttpPeer;
use serde::Serialize;
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::asked::Asked;
use crate::config::{Balance, Config, HttpVersion, RequestsConfig, UpstreamConfig};
use crate::metrics::{Metrics, UpstreamMetrics};
use crate::shed::Shedder;
use crate::template::Template;
use balance::Servers;
use health::Prober;
pub use resolve::ResolveError;
use resolve::{Spec, resolve};
use server::{Outcome, Picked, Server};
use tls::Tls;

/// HTTP/2 requests that share one connection to a server.
const H2_STREAMS_MAX: usize = 100;

/// One pool.
pub struct Upstream {
    name: Arc<str>,
    config: UpstreamConfig,
    /// For what `config.timeouts` leaves out.
    requests: RequestsConfig,
    compiled: Compiled,
    servers: ArcSwap<Servers>,
    budget: Budget,
    shedder: Option<Arc<Shedder>>,
    metrics: UpstreamMetrics,
    /// What looks after the servers; ends with this.
    keepers: OnceLock<JoinSet<()>>,
}

/// What the config of a pool says, ready to use.
struct Compiled {
    specs: Vec<Spec>,
    key: Option<Template>,
    tls: Option<Tls>,
    host: Option<HeaderValue>,
}

/// Why the pools of a config cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Resolve(#[from] ResolveError),
}

/// One server, as operators see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ServerState {
    pub address: SocketAddr,
    pub weight: u8,
    /// Whether it gets requests: well, and not ejected.
    pub available: bool,
    /// What health checks say, if there are any.
    pub well: bool,
}

/// What of a request decides which server it goes to.
#[derive(Debug, Default)]
pub struct Selector {
    /// What is hashed; `None` where nothing is, and where the request lacks it.
    key: Option<String>,
    /// Of the server that a cookie names.
    tag: Option<String>,
}

/// A server for one try.
pub struct Choice {
    pub picked: Picked,
    /// Tells the client to come back to it.
    pub set_cookie: Option<HeaderValue>,
}

/// All pools of a config. Those that did not change are the ones of `before`, with all that is known of
/// their servers. The config was validated. Needs a tokio runtime.
pub async fn start(
    config: &Config,
    before: &HashMap<String, Arc<Upstream>>,
    metrics: &Metrics,
) -> Result<HashMap<String, Arc<Upstream>>, UpstreamError> {
    let mut upstreams = HashMap::new();
    for (name, upstream) in &config.upstreams {
        let same = before.get(name).filter(|known| {
            // Files may have changed though their names have not.
            known.config == *upstream && known.requests == config.requests && upstream.tls.is_none()
        });
        let started = match same {
            Some(known) => Arc::clone(known),
            None => Upstream::start(name, upstream, &config.requests, metrics).await?,
        };
        upstreams.insert(name.clone(), started);
    }
    Ok(upstreams)
}

impl Upstream {
    /// # Errors
    /// The key, below `upstreams.NAME`, that breaks a rule.
    pub fn check(config: &UpstreamConfig) -> Result<(), Broken> {
        Compiled::new(config).map(|_| ())
    }

    async fn start(
        name: &str,
        config: &UpstreamConfig,
        requests: &RequestsConfig,
        metrics: &Metrics,
    ) -> Result<Arc<Self>, UpstreamError> {
        let under = |broken: Broken| ConfigError::from(broken.under(name).under("upstreams"));
        let compiled = Compiled::new(config).map_err(under)?;
        let addresses = resolve(name, &compiled.specs).await?;
        let named = compiled.specs.iter().any(Spec::is_name);
        let host = match non_empty(&config.host) {
            Some(host) => host.to_owned(),
            None => config.servers[0].address().to_owned(),
        };
        let prober = Prober::new(&config.health, &host)
            .map_err(|error| under(Broken::new("health", error.to_string())))?;
        let new_server = |(address, spec): &(SocketAddr, Spec)| {
            let peer = compiled.peer(*address, spec, config, requests);
            Arc::new(Server::new(*address, spec.weight, peer))
        };
        let servers = addresses.iter().map(new_server).collect();
        let upstream = Arc::new(Self {
            name: name.into(),
            servers: ArcSwap::from_pointee(Servers::new(servers, config.balance)),
            budget: Budget::new(config.retry.budget, config.retry.reserve),
            shedder: config.shedding.as_ref().map(|shedding| {
                let target = format!("upstreams.{name}");
                Shedder::new(name, shedding, metrics.shed(&target))
            }),
            metrics: metrics.upstream(name),
            config: config.clone(),
            requests: requests.clone(),
            compiled,
            keepers: OnceLock::new(),
        });
        let mut keepers = JoinSet::new();
        if named {
            keepers.spawn(keep_resolved(Arc::downgrade(&upstream)));
        }
        if let Some(prober) = prober {
            keepers.spawn(keep_probed(Arc::downgrade(&upstream), prober));
        }
        // An empty cell takes its first value.
        drop(upstream.keepers.set(keepers));
        Ok(upstream)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn config(&self) -> &UpstreamConfig {
        &self.config
    }

    /// Who decides how many requests may be under way, if anybody does.
    pub fn shedder(&self) -> Option<&Arc<Shedder>> {
        self.shedder.as_ref()
    }

    /// The `Host` that servers see, if not the client's.
    pub fn host(&self) -> Option<&HeaderValue> {
        self.compiled.host.as_ref()
    }

    pub fn is_tls(&self) -> bool {
        self.compiled.tls.is_some()
    }

    /// Whether its servers are spoken to in HTTP/1.1 without TLS.
    pub fn is_plain_http_1(&self) -> bool {
        !self.is_tls() && self.config.http != HttpVersion::Two
    }

    pub fn servers(&self) -> Arc<Servers> {
        self.servers.load_full()
    }

    /// Whether any server should get requests.
    pub fn is_available(&self) -> bool {
        self.servers
            .load()
            .list
            .iter()
            .any(|server| server.is_available())
    }

    /// What is known of each server, for operators.
    pub fn state(&self) -> Vec<ServerState> {
        let servers = self.servers.load();
        let state = |server: &Arc<Server>| ServerState {
            address: server.address,
            weight: server.weight,
            available: server.is_available(),
            well: server.is_well(),
        };
        servers.list.iter().map(state).collect()
    }

    /// Brings the gauges up to date.
    pub fn measure(&self) {
        let servers = self.servers.load();
        let available = servers
            .list
            .iter()
            .filter(|server| server.is_available())
            .count();
        self.metrics.available.set(available as f64);
        self.metrics.servers.set(servers.list.len() as f64);
        if let Some(shedder) = &self.shedder {
            shedder.measure();
        }
    }

    /// A request came. Retries of it, and of others, live from this.
    pub fn begin(&self) {
        self.budget.deposit();
    }

    /// Whether one more try is within the budget; if so, it is spent.
    pub fn spend_retry(&self) -> bool {
        let spent = self.budget.spend();
        if !spent {
            self.metrics.retries_refused.increment(1);
        }
        spent
    }

    /// What [`pick`](Self::pick) has to know of a request.
    pub fn selector(&self, asked: &Asked<'_>) -> Selector {
        let key = self.compiled.key.as_ref().and_then(|template| {
            let mut key = String::new();
            template.render(asked, &mut key).ok().map(|()| key)
        });
        let sticky = non_empty(&self.config.sticky_cookie);
        let tag = sticky.and_then(|name| asked.cookie_value(name));
        Selector {
            key,
            tag: tag.map(ToOwned::to_owned),
        }
    }

    /// A server for this request, not one of those that were `tried` if there are others.
    pub fn pick(&self, selector: &Selector, tried: &[SocketAddr]) -> Choice {
        let servers = self.servers.load();
        let untried = |server: &Server| !tried.contains(&server.address);
        let sticky = non_empty(&self.config.sticky_cookie);
        let tag = selector.tag.as_deref();
        let stuck = tag.and_then(|tag| servers.by_tag(tag));
        let stuck = stuck.filter(|server| server.is_available() && untried(server));
        let server = stuck
            .or_else(|| {
                self.choose(&servers, selector, &|server| {
                    server.is_available() && untried(server)
                })
            })
            .or_else(|| self.choose(&servers, selector, &untried))
            .or_else(|| self.choose(&servers, selector, &|_| true))
            .unwrap_or(&servers.list[0]);
        let set_cookie = sticky.filter(|_| tag != Some(server.tag.as_str()));
        let set_cookie = set_cookie.and_then(|name| {
            let cookie = format!("{name}={}; Path=/; HttpOnly; SameSite=Lax", server.tag);
            HeaderValue::try_from(cookie).ok()
        });
        let counted = matches!(
            self.config.balance,
            Balance::LeastConnections | Balance::BoundedHash
        );
        Choice {
            picked: Picked::new(Arc::clone(server), counted),
            set_cookie,
        }
    }

    fn choose<'a>(
        &self,
        servers: &'a Servers,
        selector: &Selector,
        usable: &dyn Fn(&Server) -> bool,
    ) -> Option<&'a Arc<Server>> {
        let key = selector.key.as_ref().map(String::as_bytes);
        let chosen = match self.config.balance {
            Balance::RoundRobin => None,
            Balance::LeastConnections => servers.least_active(usable),
            Balance::Hash => key.and_then(|key| servers.by_key(key, usable)),
            Balance::BoundedHash => key.and_then(|key| {
                let bounded = servers.by_key_bounded(key, self.config.load_max, usable);
                bounded.or_else(|| servers.by_key(key, usable))
            }),
        };
        chosen.or_else(|| servers.in_turn(usable))
    }

    /// How a try went, as far as it concerns its server.
    pub fn report(&self, server: &Server, outcome: Outcome) {
        if outcome == Outcome::Failure {
            self.metrics.failures.increment(1);
        }
        if server.report(outcome, &self.config.eject) {
            self.metrics.ejections.increment(1);
            let pause_ms = u64::try_from(self.config.eject.pause.as_millis()).unwrap_or(u64::MAX);
            warn!(upstream = self.name(), server = %server.address, pause_ms, "server left out: too many failures in a row");
        }
    }

    /// Looks names up again. Servers that stay are the same, with all that is known of them.
    async fn refresh(&self) {
        let found = match resolve(&self.name, &self.compiled.specs).await {
            Ok(found) => found,
            Err(error) => {
                warn!(error = %Causes(&error), "look-up failed; the servers are unchanged");
                return;
            }
        };
        let current = self.servers.load();
        let same = current.list.len() == found.len()
            && current
                .list
                .iter()
                .zip(&found)
                .all(|(server, (address, spec))| {
                    server.address == *address && server.weight == spec.weight
                });
        if same {
            return;
        }
        let server = |(address, spec): &(SocketAddr, Spec)| {
            let known = current
                .list
                .iter()
                .find(|server| server.address == *address && server.weight == spec.weight);
            known.cloned().unwrap_or_else(|| {
                let peer = self
                    .compiled
                    .peer(*address, spec, &self.config, &self.requests);
                Arc::new(Server::new(*address, spec.weight, peer))
            })
        };
        let servers = Servers::new(found.iter().map(server).collect(), self.config.balance);
        info!(
            upstream = self.name(),
            servers = servers.list.len(),
            "servers changed"
        );
        self.servers.store(Arc::new(servers));
    }
}

async fn keep_resolved(upstream: Weak<Upstream>) {
    while let Some(every) = upstream
        .upgrade()
        .map(|upstream| upstream.config.resolve_every)
    {
        tokio::time::sleep(every).await;
        if let Some(upstream) = upstream.upgrade() {
            upstream.refresh().await;
        }
    }
}

async fn keep_probed(upstream: Weak<Upstream>, prober: Prober) {
    while let Some(upstream) = upstream.upgrade() {
        prober.round(&upstream).await;
        let every = upstream.config.health.every;
        drop(upstream);
        tokio::time::sleep(every).await;
    }
}

impl Compiled {
    fn new(config: &UpstreamConfig) -> Result<Self, Broken> {
        if config.servers.is_empty() {
            return Err(Broken::new("servers", "must not be empty"));
        }
        let specs = config.servers.iter().enumerate().map(|(place, server)| {
            Spec::new(server).map_err(|broken| broken.under(place).under("servers"))
        });
        let specs = specs.collect::<Result<Vec<_>, _>>()?;
        let keyed = matches!(config.balance, Balance::Hash | Balance::BoundedHash);
        let key = non_empty(&config.key).map(|key| {
            Template::key(key, &[]).map_err(|error| Broken::new("key", format!("is no {error}")))
        });
        let key = key.transpose()?;
        if keyed && key.is_none() {
            return Err(Broken::new(
                "key",
                "must say what is hashed, as in \"{query.user}\"",
            ));
        }
        if !keyed && key.is_some() {
            return Err(Broken::new(
                "key",
                "is for balance = \"hash\" and \"bounded-hash\" only",
            ));
        }
        let bounded = config.load_max > 1.0 && config.load_max <= 100.0;
        let below_one = 0.0..=1.0;
        let ranges = [
            (
                bounded,
                "load_max",
                config.load_max,
                "must be above 1 and at most 100",
            ),
            (
                below_one.contains(&config.retry.budget),
                "budget",
                config.retry.budget,
                "must be from 0 to 1",
            ),
        ];
        for (legal, key, value, rule) in ranges {
            if !legal {
                let broken = Broken::value(key, value, rule);
                return Err(if key == "budget" {
                    broken.under("retry")
                } else {
                    broken
                });
            }
        }
        if let Some(shedding) = &config.shedding {
            shedding
                .check()
                .map_err(|broken| broken.under("shedding"))?;
        }
        if !(1..=TRIES_MAX).contains(&config.retry.tries_max) {
            let rule = format!("must be from 1 to {TRIES_MAX}");
            return Err(Broken::value("tries_max", config.retry.tries_max, rule).under("retry"));
        }
        if !config.health.path.is_empty() && !config.health.path.starts_with('/') {
            return Err(
                Broken::value("path", &config.health.path, "must begin with /").under("health"),
            );
        }
        let sticky = &config.sticky_cookie;
        if !sticky
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-')
        {
            let rule = "must be letters, digits, - and _";
            return Err(Broken::value("sticky_cookie", sticky, rule));
        }
        for (key, every) in [
            ("resolve_every", config.resolve_every),
            ("health.every", config.health.every),
        ] {
            if every < EVERY_MIN {
                return Err(Broken::value(
                    key,
                    every,
                    format!("must be at least {EVERY_MIN:?}"),
                ));
            }
        }
        let host = non_empty(&config.host).map(|host| {
            HeaderValue::from_str(host)
                .map_err(|_| Broken::value("host", host, "cannot be a header"))
        });
        let tls = config.tls.as_ref().map(Tls::new).transpose();
        Ok(Self {
            specs,
            key,
            tls: tls.map_err(|broken| broken.under("tls"))?,
            host: host.transpose()?,
        })
    }

    /// How to connect to a server.
    fn peer(
        &self,
        address: SocketAddr,
        spec: &Spec,
        config: &UpstreamConfig,
        requests: &RequestsConfig,
    ) -> HttpPeer {
        let sni = self.tls.as_ref().map(|tls| tls.name(&spec.host).to_owned());
        let mut peer = HttpPeer::new(address, sni.is_some(), sni.unwrap_or_default());
        if let Some(tls) = &self.tls {
            tls.apply(&mut peer);
        }
        let timeouts = &config.timeouts;
        let connect = timeouts.connect.unwrap_or(requests.connect_max);
        peer.options.connection_timeout = Some(connect);
        peer.options.total_connection_timeout = Some(timeouts.handshake.unwrap_or(2 * connect));
        peer.options.read_timeout = Some(timeouts.read.unwrap_or(requests.silence_max));
        peer.options.write_timeout = Some(timeouts.write.unwrap_or(requests.silence_max));
        peer.options.idle_timeout = Some(timeouts.idle.unwrap_or(requests.idle_max));
        peer.options.alpn = match (config.http, self.tls.is_some()) {
            (HttpVersion::One, _) | (HttpVersion::Auto, false) => ALPN::H1,
            (HttpVersion::Auto, true) => ALPN::H2H1,
            (HttpVersion::Two, _) => ALPN::H2,
        };
        peer.options.max_h2_streams = H2_STREAMS_MAX;
        peer
    }
}

/// Most tries of one request.
pub const TRIES_MAX: u32 = 100;

/// Shortest period of look-ups and health checks.
const EVERY_MIN: std::time::Duration = std::time::Duration::from_millis(10);

/// A bucket of retries: every request puts a part of one in, up to a bound, every retry takes one out.
struct Budget {
    thousandths: AtomicI64,
    deposit: i64,
    bound: i64,
}

impl Budget {
    fn new(ratio: f64, reserve: u32) -> Self {
        let bound = i64::from(reserve) * 1000;
        Self {
            thousandths: AtomicI64::new(bound),
            #[expect(clippy::cast_possible_truncation, reason = "the ratio is from 0 to 1")]
            deposit: (ratio * 1000.0) as i64,
            bound: bound.max(1000),
        }
    }

    fn deposit(&self) {
        // Usually it is full, and no cache line changes hands.
        if self.thousandths.load(Ordering::Relaxed) < self.bound {
            self.thousandths.fetch_add(self.deposit, Ordering::Relaxed);
        }
    }

    fn spend(&self) -> bool {
        let spend = |left: i64| (left >= 1000).then_some(left - 1000);
        self.thousandths
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, spend)
            .is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_are_a_part_of_the_requests_and_a_reserve() {
        let budget = Budget::new(0.2, 2);
        assert!(budget.spend() && budget.spend());
        assert!(!budget.spend());
        let spent = (0..1000).filter(|_| {
            budget.deposit();
            budget.spend()
        });
        assert_eq!(spent.count(), 200);
        (0..1000).for_each(|_| budget.deposit());
        assert_eq!(
            (0..10).filter(|_| budget.spend()).count(),
            2,
            "the reserve is the bound"
        );
    }
}
