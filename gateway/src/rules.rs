//! What must hold of a request before it goes on to its target, route by route.
//!
//! In this order: who asks, what it looks like, how often it comes. Nothing of it needs an object or an app,
//! so what is refused here never reaches one.

use std::collections::BTreeMap;
use std::sync::Arc;

use http::HeaderMap;
use ops::config::Broken;
use protocol::Problem;
use serde_json::Value;

use crate::access::{Access, AccessConfig};
use crate::asked::Asked;
use crate::auth::{Auth, Claims, Ways};
use crate::config::Config;
use crate::cors::{Cors, CorsConfig, Grant};
use crate::limit::config::Scope;
use crate::limit::shared::Link;
use crate::limit::{Guard, HotLimit, Keys, Limits, Taken};
use crate::metrics::Metrics;
use crate::refusal::Refusal;
use crate::route::{Fixed, Found, Routes};
use crate::validate::{ValidateConfig, Validation};

/// The rules of all routes.
#[derive(Default)]
pub struct RuleSet {
    limits: Limits,
    ways: Ways,
    /// Of the public contract for objects and counters.
    contract: Arc<Rules>,
    /// By the index of the route.
    routes: Vec<Arc<Rules>>,
}

/// The rules of one route.
#[derive(Default)]
pub struct Rules {
    access: Access,
    auth: Auth,
    validation: Validation,
    guard: Guard,
    /// The limit of requests that make a new object.
    creations: Guard,
    cors: Option<Cors>,
    /// There is nothing to check.
    is_open: bool,
}

/// A request that kept the rules, as far as they can be told at once.
pub struct Admission {
    rules: Arc<Rules>,
    claims: Option<Claims>,
    keys: Keys,
    /// Hashed; `None` if there is no limit.
    creation: Option<Keys>,
}

/// Whether a request may make a new object.
pub enum Creation {
    /// Nobody limits that.
    Free,
    /// It was charged for one; see [`Admission::refund_creation`].
    Charged(Taken),
    /// Only if the object exists.
    Forbidden,
}

/// What a route, or the contract, asks for.
#[derive(Clone, Copy)]
struct Wanted<'a> {
    access: &'a AccessConfig,
    auth: &'a [String],
    validate: &'a ValidateConfig,
    limits: &'a [String],
    creations: Option<&'a String>,
    cors: Option<&'a CorsConfig>,
}

impl RuleSet {
    /// # Errors
    /// The key that breaks a rule.
    pub fn check(config: &Config, routes: &Routes) -> Result<(), Broken> {
        for (name, limit) in &config.limits {
            limit
                .validate(name)
                .map_err(|broken| broken.under(name).under("limits"))?;
        }
        let ways = Ways::new(&config.auth, &Ways::default())?;
        each(config, routes, |wanted, params| {
            Limits::guard(&config.limits, wanted.limits, params)?;
            wanted.creations(config, params)?;
            wanted.rules(&ways, params).map(drop)
        })?;
        Ok(())
    }

    /// `config` was checked. What has not changed since `before` keeps what it knows.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn new(
        config: &Config,
        routes: &Routes,
        before: &Self,
        metrics: &Metrics,
        link: &Link,
    ) -> Result<Self, Broken> {
        let limits = Limits::new(&config.limits, &before.limits, metrics, link)?;
        let ways = Ways::new(&config.auth, &before.ways)?;
        let mut rules = each(config, routes, |wanted, params| {
            let found = Limits::guard(&config.limits, wanted.limits, params)?;
            let mut rules = wanted.rules(&ways, params)?;
            rules.guard = limits.arm(found);
            rules.creations = limits.arm(wanted.creations(config, params)?);
            rules.is_open &= rules.guard.is_empty() && rules.creations.is_empty();
            Ok(Arc::new(rules))
        })?;
        ways.keep(&link.runtime);
        let contract = rules.pop().unwrap_or_default();
        Ok(Self {
            limits,
            ways,
            contract,
            routes: rules,
        })
    }

    pub fn of(&self, found: Found) -> &Arc<Rules> {
        match found {
            Found::Objects | Found::Rpc | Found::Counters => &self.contract,
            Found::Route { index, .. } => &self.routes[index],
        }
    }

    /// What comes and what is refused most, by limit.
    pub fn hot(&self) -> BTreeMap<&str, HotLimit> {
        self.limits.hot()
    }

    /// Publishes what is not counted request by request.
    pub fn publish(&self) {
        self.limits.publish();
    }
}

/// What `make` gives for each route, in the order of `routes`, and last for the contract.
fn each<T>(
    config: &Config,
    routes: &Routes,
    make: impl Fn(Wanted<'_>, &[Box<str>]) -> Result<T, Broken>,
) -> Result<Vec<T>, Broken> {
    let mut made = Vec::new();
    for route in routes.iter() {
        let mut known = config.routes.iter().enumerate();
        let written = known.find(|(_, written)| *written.name == *route.label);
        let Some((place, written)) = written else {
            continue;
        };
        let wanted = Wanted {
            access: &written.access,
            auth: &written.auth,
            validate: &written.validate,
            limits: &written.limits,
            creations: written.creations.as_ref(),
            cors: written.cors.as_ref(),
        };
        let rules = make(wanted, route.params());
        made.push(rules.map_err(|broken| broken.under(place).under("routes"))?);
    }
    let objects = &config.objects;
    let wanted = Wanted {
        access: &objects.access,
        auth: &objects.auth,
        validate: &objects.validate,
        limits: &objects.limits,
        creations: objects.creations.as_ref(),
        cors: objects.cors.as_ref(),
    };
    made.push(make(wanted, &[]).map_err(|broken| broken.under("objects"))?);
    Ok(made)
}

impl Wanted<'_> {
    /// Everything but the limits.
    fn rules(&self, ways: &Ways, params: &[Box<str>]) -> Result<Rules, Broken> {
        let validation = Validation::new(self.validate, params);
        let cors = self.cors.map(Cors::new).transpose();
        Ok(Rules {
            access: Access::new(self.access).map_err(|broken| broken.under("access"))?,
            auth: ways.guard(self.auth)?,
            validation: validation.map_err(|broken| broken.under("validate"))?,
            cors: cors.map_err(|broken| broken.under("cors"))?,
            is_open: *self.access == AccessConfig::default()
                && *self.validate == ValidateConfig::default()
                && self.auth.is_empty(),
            ..Rules::default()
        })
    }

    fn creations(
        &self,
        config: &Config,
        params: &[Box<str>],
    ) -> Result<Vec<(String, crate::template::Template)>, Broken> {
        let Some(name) = self.creations else {
            return Ok(Vec::new());
        };
        let Some(limit) = config.limits.get(name) else {
            let known: Vec<&str> = config.limits.keys().map(String::as_str).collect();
            let rule = format!("is not among the limits ({})", known.join(", "));
            return Err(Broken::value("creations", name, rule));
        };
        if limit.scope != Scope::Process {
            let rule = "must have scope = \"process\": what objects took cannot be given back";
            return Err(Broken::value("creations", name, rule));
        }
        let template = limit
            .template(params)
            .map_err(|broken| Broken::new("creations", format!("= {name:?}, of which {broken}")))?;
        Ok(vec![(name.clone(), template)])
    }
}

impl Rules {
    /// What can be told at once; `None` if there are no rules. `announced`: bytes of the body, if its length is
    /// known.
    ///
    /// # Errors
    /// The refusal of a request that breaks a rule.
    pub fn check(
        self: &Arc<Self>,
        asked: &Asked<'_>,
        announced: Option<u64>,
    ) -> Result<Option<Admission>, Refusal> {
        if self.is_open {
            return Ok(None);
        }
        self.access.check(asked.client)?;
        let claims = self.auth.identify(asked)?;
        let asked = Asked {
            claims: claims.as_deref(),
            ..*asked
        };
        self.validation.check(&asked, announced)?;
        let keys = self.guard.keys(&asked)?;
        let creation = match self.creations.is_empty() {
            true => None,
            false => Some(self.creations.keys(&asked)?),
        };
        Ok(Some(Admission {
            rules: Arc::clone(self),
            keys,
            creation,
            claims,
        }))
    }

    /// The answer to a browser that asks what pages may do; `None` where nothing is said of that.
    pub fn preflight(&self, headers: &HeaderMap) -> Option<Arc<Fixed>> {
        let cors = self.cors.as_ref()?;
        Some(Arc::new(cors.answer(headers)))
    }

    /// What responses say to browsers; empty where nothing is said of that.
    pub fn grant(&self, headers: &HeaderMap) -> Grant {
        let cors = self.cors.as_ref();
        cors.map_or_else(Grant::new, |cors| cors.grant(headers))
    }
}

impl Admission {
    /// Who asks, for templates.
    pub fn claims(&self) -> Option<&Value> {
        self.claims.as_deref()
    }

    /// What others may have to be asked for.
    ///
    /// # Errors
    /// The refusal of a request that comes too often.
    pub async fn admit(&self) -> Result<(), Refusal> {
        match self.rules.guard.is_empty() {
            true => Ok(()),
            false => self.rules.guard.admit(&self.keys).await.map(drop),
        }
    }

    /// Charges for a new object, before it is known whether there will be one: so any number of requests
    /// at once make no more of them than the limit says.
    pub async fn charge_creation(&self) -> Creation {
        match &self.creation {
            None => Creation::Free,
            Some(keys) => match self.rules.creations.admit(keys).await {
                Ok(taken) => Creation::Charged(taken),
                Err(_) => Creation::Forbidden,
            },
        }
    }

    /// There was no new object after all.
    pub fn refund_creation(&self, taken: &Taken) {
        if let Some(keys) = &self.creation {
            self.rules.creations.refund(keys, taken);
        }
    }

    /// Most bytes of the body, if the route says so.
    pub fn body_bytes_max(&self) -> Option<u64> {
        self.rules.validation.body_bytes_max()
    }

    /// Whether the body must be held whole, for [`check_body`](Self::check_body).
    pub fn needs_body(&self) -> bool {
        self.rules.validation.needs_body()
    }

    /// # Errors
    /// The refusal of a body that does not fit its schema.
    pub fn check_body(&self, headers: &HeaderMap, body: &[u8]) -> Result<(), Problem> {
        self.rules.validation.check_body(headers, body)
    }
}
