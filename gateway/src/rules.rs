//! What must hold of a request before it goes on to its target, route by route.
//!
//! In this order: who asks, what it looks like, how often it comes. Nothing of it needs an object or an app,
//! so what is refused here never reaches one.

use std::sync::Arc;

use ops::config::Broken;

use crate::asked::Asked;
use crate::config::Config;
use crate::limit::shared::Link;
use crate::limit::{Guard, Keys, Limits};
use crate::metrics::Metrics;
use crate::refusal::Refusal;
use crate::route::{Found, Routes};

/// The rules of all routes.
#[derive(Default)]
pub struct RuleSet {
    limits: Limits,
    /// Of the public contract for objects.
    contract: Arc<Rules>,
    /// By the index of the route.
    routes: Vec<Arc<Rules>>,
}

/// The rules of one route.
#[derive(Default)]
pub struct Rules {
    guard: Guard,
}

/// What is known of a request that kept the rules, as far as they can be told without waiting.
pub struct Admission {
    rules: Arc<Rules>,
    keys: Keys,
}

/// What a route, or the contract, asks for.
#[derive(Clone, Copy)]
struct Wanted<'a> {
    limits: &'a [String],
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
        each(config, routes, |wanted, params| {
            Limits::guard(&config.limits, wanted.limits, params).map(drop)
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
        let limits = Limits::new(&config.limits, &before.limits, metrics, link);
        let mut rules = each(config, routes, |wanted, params| {
            let found = Limits::guard(&config.limits, wanted.limits, params)?;
            let guard = limits.arm(found);
            Ok(Arc::new(Rules { guard }))
        })?;
        let contract = rules.pop().unwrap_or_default();
        Ok(Self {
            limits,
            contract,
            routes: rules,
        })
    }

    pub fn of(&self, found: Found) -> &Arc<Rules> {
        match found {
            Found::Objects | Found::Rpc => &self.contract,
            Found::Route { index, .. } => &self.routes[index],
        }
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
        let known = config.routes.iter().enumerate();
        let written = known
            .filter(|(_, written)| *written.name == *route.label)
            .last();
        let Some((place, written)) = written else {
            continue;
        };
        let wanted = Wanted {
            limits: &written.limits,
        };
        let rules = make(wanted, route.params());
        made.push(rules.map_err(|broken| broken.under(place).under("routes"))?);
    }
    let wanted = Wanted {
        limits: &config.objects.limits,
    };
    made.push(make(wanted, &[]).map_err(|broken| broken.under("objects"))?);
    Ok(made)
}

impl Rules {
    /// What can be told at once.
    ///
    /// # Errors
    /// The refusal of a request that breaks a rule.
    pub fn check(self: &Arc<Self>, asked: &Asked<'_>) -> Result<Option<Admission>, Refusal> {
        if self.guard.is_empty() {
            return Ok(None);
        }
        let keys = self.guard.keys(asked)?;
        let rules = Arc::clone(self);
        Ok(Some(Admission { rules, keys }))
    }
}

impl Admission {
    /// What others may have to be asked for.
    ///
    /// # Errors
    /// The refusal of a request that comes too often.
    pub async fn admit(&self) -> Result<(), Refusal> {
        self.rules.guard.admit(&self.keys).await
    }
}
