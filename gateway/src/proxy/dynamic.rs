//! What a gateway takes from its config again and again.

use std::collections::HashMap;
use std::sync::Arc;

use ops::config::ConfigError;

use crate::access_log::AccessLog;
use crate::asked::Asked;
use crate::cache::plan::Plans;
use crate::client::ClientRules;
use crate::config::Config;
use crate::cors;
use crate::counters::config::CountersConfig;
use crate::limit::shared::Link;
use crate::metrics::Metrics;
use crate::route::{Fixed, Route, Routes};
use crate::rules::RuleSet;
use crate::server::StartError;
use crate::shed::Shedder;
use crate::upstream::Upstream;

/// What may change while the gateway runs.
pub struct Dynamic {
    pub routes: Routes,
    pub client: ClientRules,
    pub access_log: Option<AccessLog>,
    pub upstreams: HashMap<String, Arc<Upstream>>,
    /// The upstream of each route that has one, by the route's index.
    pub(super) of_route: Vec<Option<Arc<Upstream>>>,
    pub rules: RuleSet,
    pub plans: Plans,
    pub counters: CountersConfig,
    /// Who decides how many requests for objects may be under way, if anybody does.
    pub objects: Option<Arc<Shedder>>,
}

impl Dynamic {
    /// What has not changed since `before` keeps what it knows.
    ///
    /// # Errors
    /// When the config breaks a rule, or a server cannot be resolved.
    pub async fn new(
        config: &Config,
        before: Option<&Self>,
        metrics: &Metrics,
        link: &Link,
    ) -> Result<Self, StartError> {
        let client = ClientRules::new(&config.client).map_err(|broken| broken.under("client"));
        let client = client.map_err(ConfigError::from)?;
        let routes = Routes::new(config).map_err(ConfigError::from)?;
        let none = HashMap::new();
        let known = before.map_or(&none, |before| &before.upstreams);
        let upstreams = crate::upstream::start(config, known, metrics).await?;
        let upstream = |route: &Route| upstreams.get(route.upstream.as_ref()?).map(Arc::clone);
        let open = RuleSet::default();
        let known = before.map_or(&open, |before| &before.rules);
        let rules = RuleSet::new(config, &routes, known, metrics, link);
        Ok(Self {
            rules: rules.map_err(ConfigError::from)?,
            plans: Plans::new(config, &routes).map_err(ConfigError::from)?,
            objects: shedder(config, before, metrics),
            of_route: routes.iter().map(upstream).collect(),
            access_log: AccessLog::open(&config.access_log, metrics.access_log_dropped.clone())?,
            counters: config.counters.clone(),
            routes,
            client,
            upstreams,
        })
    }

    /// The answer to a browser that asks whether it may send a request; `None` if the route says nothing of
    /// that, or this is no such question.
    pub(super) fn preflight(&self, asked: &Asked<'_>) -> Option<Arc<Fixed>> {
        let method = cors::preflight(asked.method, asked.headers)?;
        let asked = Asked {
            method: &method,
            ..*asked
        };
        let found = self.routes.find(&asked).ok()?;
        self.rules.of(found).preflight(asked.headers)
    }
}

/// What is known of objects stays while its rule does.
fn shedder(config: &Config, before: Option<&Dynamic>, metrics: &Metrics) -> Option<Arc<Shedder>> {
    let shedding = config.objects.shedding.as_ref()?;
    let known = before.and_then(|before| before.objects.as_ref());
    let same = known.filter(|known| known.config() == shedding);
    Some(same.map_or_else(
        || Shedder::new("the objects", shedding, metrics.shed("objects")),
        Arc::clone,
    ))
}
