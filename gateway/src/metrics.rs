//! Everything a gateway counts. Names begin with `gateway_`; labels are closed sets: a route of the
//! contract or of the config, and a code.

use std::sync::Arc;
use std::time::Duration;

use dashmap::DashMap;
use metrics::{
    Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram,
    gauge, histogram,
};
use ops::metrics::Registry;
use protocol::{ErrorCode, Problem};

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    /// Answered by an object or an app.
    Status(u16),
    /// Refused by the system.
    Refused(ErrorCode),
    /// The client hung up first.
    Gone,
}

/// The label of a route: of the contract, or from the config.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum RouteLabel {
    Contract(&'static str),
    Config(Arc<str>),
}

impl RouteLabel {
    pub fn as_str(&self) -> &str {
        match self {
            Self::Contract(name) => name,
            Self::Config(name) => name,
        }
    }
}

/// The metrics of one gateway, shared by its threads.
pub struct Metrics {
    registry: Arc<Registry>,
    requests: DashMap<(RouteLabel, Code), Requests, foldhash::fast::RandomState>,
    cached: DashMap<(RouteLabel, &'static str), Counter>,
    pub connections: Gauge,
    pub connections_total: Counter,
    pub connections_refused: Counter,
    cuts: [Counter; Cut::ALL.len()],
    pub retries: Counter,
    pub access_log_dropped: Counter,
    pub not_owner: Counter,
    pub links: Gauge,
    pub ring_version: Gauge,
    pub cache: CacheMetrics,
}

/// What is counted of the cache, but for requests.
#[derive(Clone)]
pub struct CacheMetrics {
    pub entries: Gauge,
    pub bytes: Gauge,
    pub evictions: Counter,
    pub purges: Counter,
    pub purged: Counter,
    pub refreshes: Counter,
    pub collapsed: Counter,
    pub peer_looks: Counter,
    pub peers_silent: Gauge,
}

/// What is counted of one pool.
pub struct UpstreamMetrics {
    pub servers: Gauge,
    pub available: Gauge,
    pub failures: Counter,
    pub ejections: Counter,
    pub retries_refused: Counter,
}

/// What is counted of sharded counters.
pub struct CounterMetrics {
    counted: Counter,
    repeated: Counter,
    refused: Counter,
    unknown: Counter,
    /// Calls to shards.
    pub calls: Counter,
    /// Increments that wait for a call to come back.
    pub waiting: Gauge,
    pub plans: Gauge,
    pub plan_refreshes: Counter,
}

impl CounterMetrics {
    /// One increment was answered: whether it was a repetition, or why it was refused.
    pub fn count(&self, answer: &Result<bool, &Problem>) {
        let outcome = match answer {
            Ok(false) => &self.counted,
            Ok(true) => &self.repeated,
            Err(problem) if crate::counters::may_have_run(problem) => &self.unknown,
            Err(_) => &self.refused,
        };
        outcome.increment(1);
    }
}

/// Why a client's connection or request was ended by a bound of `[connections]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// `open_max`
    Crowd,
    /// `per_client_max`
    Client,
    /// `head_max`
    HeadSlow,
    /// `head_bytes_max`, while the head arrived.
    HeadLarge,
    /// `body_bytes_per_second_min`
    BodySlow,
}

impl Cut {
    const ALL: [Self; 5] = [
        Self::Crowd,
        Self::Client,
        Self::HeadSlow,
        Self::HeadLarge,
        Self::BodySlow,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Crowd => "open_max",
            Self::Client => "per_client_max",
            Self::HeadSlow => "head_max",
            Self::HeadLarge => "head_bytes_max",
            Self::BodySlow => "body_bytes_per_second_min",
        }
    }
}

/// What is counted of the load shedding before one target.
pub struct ShedMetrics {
    pub limit: Gauge,
    pub in_flight: Gauge,
    pub shed: Counter,
}

/// What is counted of one limit.
pub struct LimitMetrics {
    pub passed: Counter,
    pub refused: Counter,
    pub shadow_refused: Counter,
    pub unreachable: Counter,
    pub keys: Gauge,
    pub evictions: Counter,
}

#[derive(Clone)]
struct Requests {
    total: Counter,
    seconds: Histogram,
}

impl Metrics {
    pub fn new(registry: Arc<Registry>) -> Self {
        registry.clone().register(|| {
            describe();
            Self {
                registry,
                requests: DashMap::default(),
                cached: DashMap::new(),
                connections: gauge!("gateway_connections"),
                connections_total: counter!("gateway_connections_total"),
                connections_refused: counter!("gateway_connections_refused_total"),
                cuts: Cut::ALL
                    .map(|cut| counter!("gateway_connections_cut_total", "rule" => cut.name())),
                retries: counter!("gateway_retries_total"),
                access_log_dropped: counter!("gateway_access_log_dropped_total"),
                not_owner: counter!("gateway_not_owner_total"),
                links: gauge!("gateway_links"),
                ring_version: gauge!("gateway_ring_version"),
                cache: CacheMetrics {
                    entries: gauge!("gateway_cache_entries"),
                    bytes: gauge!("gateway_cache_bytes"),
                    evictions: counter!("gateway_cache_evictions_total"),
                    purges: counter!("gateway_cache_purges_total"),
                    purged: counter!("gateway_cache_purged_total"),
                    refreshes: counter!("gateway_cache_refreshes_total"),
                    collapsed: counter!("gateway_cache_collapsed_total"),
                    peer_looks: counter!("gateway_cache_peer_looks_total"),
                    peers_silent: gauge!("gateway_cache_peers_silent"),
                },
            }
        })
    }

    /// One request was answered.
    pub fn request(&self, route: &RouteLabel, code: Code, took: Duration) {
        let key = (route.clone(), code);
        let handles = match self.requests.get(&key) {
            Some(handles) => handles.clone(),
            None => self
                .requests
                .entry(key)
                .or_insert_with(|| self.handles(route, code))
                .clone(),
        };
        handles.total.increment(1);
        handles.seconds.record(took.as_secs_f64());
    }

    pub fn cut(&self, cut: Cut) -> &Counter {
        &self.cuts[cut as usize]
    }

    /// What is counted of the load shedding before a target, by its place in the config.
    pub fn shed(&self, target: &str) -> ShedMetrics {
        let target = target.to_owned();
        self.registry.register(|| ShedMetrics {
            limit: gauge!("gateway_concurrency_limit", "target" => target.clone()),
            in_flight: gauge!("gateway_concurrency_in_flight", "target" => target.clone()),
            shed: counter!("gateway_shed_total", "target" => target),
        })
    }

    pub fn upstream(&self, name: &str) -> UpstreamMetrics {
        let name = name.to_owned();
        self.registry.register(|| UpstreamMetrics {
            servers: gauge!("gateway_upstream_servers", "upstream" => name.clone()),
            available: gauge!("gateway_upstream_servers_available", "upstream" => name.clone()),
            failures: counter!("gateway_upstream_failures_total", "upstream" => name.clone()),
            ejections: counter!("gateway_upstream_ejections_total", "upstream" => name.clone()),
            retries_refused: counter!("gateway_upstream_retries_refused_total", "upstream" => name),
        })
    }

    /// A request of a route that has a cache, and what the cache did with it.
    pub fn cached(&self, route: &RouteLabel, outcome: &'static str) {
        let key = (route.clone(), outcome);
        let counter = match self.cached.get(&key) {
            Some(counter) => counter.clone(),
            None => {
                let route = route.as_str().to_owned();
                let make = || {
                    self.registry.register(
                        || counter!("gateway_cache_requests_total", "route" => route, "outcome" => outcome),
                    )
                };
                self.cached.entry(key).or_insert_with(make).clone()
            }
        };
        counter.increment(1);
    }

    /// When a certificate that clients are shown ends.
    pub fn certificate_expiry(&self, name: &str) -> Gauge {
        let name = name.to_owned();
        self.registry
            .register(|| gauge!("gateway_certificate_expiry_timestamp_seconds", "name" => name))
    }

    /// How uneven the shards of a route are used.
    pub fn shard_skew(&self, route: &Arc<str>) -> Gauge {
        let route = route.to_string();
        self.registry
            .register(|| gauge!("gateway_shard_skew", "route" => route))
    }

    /// What is counted of sharded counters.
    pub fn counters(&self) -> CounterMetrics {
        let increments = |outcome: &'static str| counter!("gateway_counter_increments_total", "outcome" => outcome);
        self.registry.register(|| CounterMetrics {
            counted: increments("counted"),
            repeated: increments("repeated"),
            refused: increments("refused"),
            unknown: increments("unknown"),
            calls: counter!("gateway_counter_calls_total"),
            waiting: gauge!("gateway_counter_waiting"),
            plans: gauge!("gateway_counter_plans"),
            plan_refreshes: counter!("gateway_counter_plan_refreshes_total"),
        })
    }

    /// What is counted of the limit of this name.
    pub fn limit(&self, name: &str) -> LimitMetrics {
        let decisions = |outcome: &'static str| counter!("gateway_limit_decisions_total", "limit" => name.to_owned(), "outcome" => outcome);
        self.registry.register(|| LimitMetrics {
            passed: decisions("passed"),
            refused: decisions("refused"),
            shadow_refused: decisions("shadow_refused"),
            unreachable: decisions("unreachable"),
            keys: gauge!("gateway_limit_keys", "limit" => name.to_owned()),
            evictions: counter!("gateway_limit_evictions_total", "limit" => name.to_owned()),
        })
    }

    fn handles(&self, route: &RouteLabel, code: Code) -> Requests {
        let route = route.as_str().to_owned();
        let code = match code {
            Code::Status(status) => status.to_string(),
            Code::Refused(code) => code.name().to_owned(),
            Code::Gone => "client_gone".to_owned(),
        };
        self.registry.register(|| Requests {
            total: counter!("gateway_requests_total", "route" => route.clone(), "code" => code.clone()),
            seconds: histogram!("gateway_request_seconds", "route" => route, "code" => code),
        })
    }
}

fn describe_cache() {
    describe_counter!(
        "gateway_cache_requests_total",
        "Requests of routes with a cache, by route and outcome: hit, stale, revalidated, miss, bypass"
    );
    describe_gauge!("gateway_cache_entries", "Answers in the cache");
    describe_gauge!(
        "gateway_cache_bytes",
        "Memory of the answers in the cache and of those on their way into it"
    );
    describe_counter!(
        "gateway_cache_evictions_total",
        "Answers that left the cache for want of room"
    );
    describe_counter!(
        "gateway_cache_purges_total",
        "Tags purged, here or by other gateways"
    );
    describe_counter!(
        "gateway_cache_purged_total",
        "Answers that left the cache because a tag of theirs was purged"
    );
    describe_counter!(
        "gateway_cache_refreshes_total",
        "Requests that the cache made while it served a stale answer"
    );
    describe_counter!(
        "gateway_cache_collapsed_total",
        "Requests that waited for another one which fetched the same"
    );
    describe_counter!(
        "gateway_cache_peer_looks_total",
        "Times that another gateway told its purges"
    );
    describe_gauge!(
        "gateway_cache_peers_silent",
        "Other gateways that do not tell their purges"
    );
}

fn describe() {
    describe_cache();
    describe_counter!(
        "gateway_counter_increments_total",
        "Increments of sharded counters, by outcome; unknown: counted or not, the client must find out"
    );
    describe_counter!(
        "gateway_counter_calls_total",
        "Calls to shards of counters; increments of one shard that come together share one"
    );
    describe_gauge!(
        "gateway_counter_waiting",
        "Increments that wait for a call to come back, to go together"
    );
    describe_gauge!(
        "gateway_counter_plans",
        "Counters whose plans are remembered"
    );
    describe_counter!(
        "gateway_counter_plan_refreshes_total",
        "Plans of counters that were asked for because there was a newer one"
    );
    describe_counter!(
        "gateway_limit_decisions_total",
        "Answers of rate limits, by limit and outcome; unreachable: by its configuration"
    );
    describe_gauge!("gateway_limit_keys", "Keys that a rate limit remembers");
    describe_counter!(
        "gateway_limit_evictions_total",
        "Keys that a rate limit forgot for want of room; newcomers in their place are refused early"
    );
    describe_counter!(
        "gateway_requests_total",
        "Requests answered, by route and code (a status, or a refusal)"
    );
    describe_histogram!(
        "gateway_request_seconds",
        "From the arrival of a request's head to the end of its response"
    );
    describe_gauge!("gateway_connections", "Client connections open");
    describe_counter!(
        "gateway_connections_cut_total",
        "Connections and requests of clients that were ended because they broke a rule of [connections], by rule"
    );
    describe_gauge!(
        "gateway_concurrency_limit",
        "Requests that may be under way at a target whose load is shed, until the heads of their answers"
    );
    describe_gauge!(
        "gateway_concurrency_in_flight",
        "Requests that are under way there"
    );
    describe_counter!(
        "gateway_shed_total",
        "Requests refused because as many were under way at their target as it answers without delay"
    );
    describe_gauge!("gateway_upstream_servers", "Servers of an upstream");
    describe_gauge!(
        "gateway_upstream_servers_available",
        "Servers of an upstream that get requests: well, and not ejected"
    );
    describe_counter!(
        "gateway_upstream_failures_total",
        "Tries that failed at a server: no connection, broken, silent, or 502, 503, 504"
    );
    describe_counter!(
        "gateway_upstream_ejections_total",
        "Times that a server was left out after failures in a row"
    );
    describe_counter!(
        "gateway_upstream_retries_refused_total",
        "Retries that were not sent because the budget was spent"
    );
    describe_gauge!(
        "gateway_shard_skew",
        "Requests of a route's busiest shard over the mean of its shards, since the routes were loaded"
    );
    describe_gauge!(
        "gateway_links",
        "Connections to workers that many requests share"
    );
    describe_counter!("gateway_connections_total", "Client connections accepted");
    describe_counter!(
        "gateway_connections_refused_total",
        "Client connections that ended before a request: PROXY header, TLS, silence"
    );
    describe_gauge!(
        "gateway_certificate_expiry_timestamp_seconds",
        "When a certificate that clients are shown ends, by its first name; seconds since 1970"
    );
    describe_counter!(
        "gateway_retries_total",
        "Tries after the first, of requests of which nothing had run"
    );
    describe_counter!(
        "gateway_access_log_dropped_total",
        "Lines of the access log that were dropped because too many waited for the disk"
    );
    describe_counter!(
        "gateway_not_owner_total",
        "Requests that a worker refused because another one owns the shard"
    );
    describe_gauge!(
        "gateway_ring_version",
        "Version of the ring that requests are routed by; 0 before there is one"
    );
}
