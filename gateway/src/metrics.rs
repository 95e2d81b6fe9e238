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
use protocol::ErrorCode;

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
    requests: DashMap<(RouteLabel, Code), Requests>,
    pub connections: Gauge,
    pub connections_total: Counter,
    pub retries: Counter,
    pub not_owner: Counter,
    pub ring_version: Gauge,
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
                requests: DashMap::new(),
                connections: gauge!("gateway_connections"),
                connections_total: counter!("gateway_connections_total"),
                retries: counter!("gateway_retries_total"),
                not_owner: counter!("gateway_not_owner_total"),
                ring_version: gauge!("gateway_ring_version"),
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

    /// How uneven the shards of a route are used.
    pub fn shard_skew(&self, route: &Arc<str>) -> Gauge {
        let route = route.to_string();
        self.registry
            .register(|| gauge!("gateway_shard_skew", "route" => route))
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

fn describe() {
    describe_counter!(
        "gateway_requests_total",
        "Requests answered, by route and code (a status, or a refusal)"
    );
    describe_histogram!(
        "gateway_request_seconds",
        "From the arrival of a request's head to the end of its response"
    );
    describe_gauge!("gateway_connections", "Client connections open");
    describe_gauge!(
        "gateway_shard_skew",
        "Requests of a route's busiest shard over the mean of its shards, since the routes were loaded"
    );
    describe_counter!("gateway_connections_total", "Client connections accepted");
    describe_counter!(
        "gateway_retries_total",
        "Tries after the first, of requests of which nothing had run"
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
