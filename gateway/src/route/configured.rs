//! One route of the config: which requests it matches, and what is done to them on their way.

use std::cmp::{Ordering, Reverse};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, HeaderValue, Method};
use ops::config::Broken;
use protocol::Problem;

use super::goal::{Goal, Templates};
use super::pattern::{HostPattern, PathPattern};
use super::{RESERVED_LABELS, Target, contract};
use crate::asked::{Asked, Params};
use crate::config::{Config, RouteConfig, Scheme};
use crate::shard::Sharding;
use crate::template::Template;

/// Prefixes that belong to the public contract.
const CONTRACT: [&str; 3] = ["objects", "rpc", "counters"];

#[derive(Debug)]
pub struct Route {
    /// In metrics.
    pub label: Arc<str>,
    /// Which upstream, if it is for an app.
    pub upstream: Option<String>,
    host: Option<HostPattern>,
    scheme: Option<Scheme>,
    path: PathPattern,
    /// Empty: any.
    pub(super) methods: Vec<Method>,
    /// With `None`, any value.
    headers: Vec<(HeaderName, Option<HeaderValue>)>,
    priority: i32,
    goal: Goal,
    rewrite: Option<Template>,
    sharding: Option<Sharding>,
    /// What is done to answers.
    pub finish: Finish,
}

/// What a route does to requests and answers on their way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Finish {
    pub compress: bool,
    pub security_headers: bool,
    /// Instead of `requests.deadline_max`.
    pub deadline_max: Option<Duration>,
}

impl Route {
    pub(super) fn new(config: &RouteConfig, all: &Config) -> Result<Self, Broken> {
        if config.name.is_empty() || RESERVED_LABELS.contains(&config.name.as_str()) {
            return Err(Broken::value(
                "name",
                &config.name,
                format!(
                    "must not be empty and not one of {}",
                    RESERVED_LABELS.join(", ")
                ),
            ));
        }
        let path = PathPattern::new(&config.path)
            .map_err(|rule| Broken::value("path", &config.path, rule))?;
        if let Some(ours) = CONTRACT.iter().find(|segment| path.begins_with(segment)) {
            return Err(Broken::value(
                "path",
                &config.path,
                format!("would hide /{ours}, which belongs to objects"),
            ));
        }
        let host = config
            .host
            .as_ref()
            .map(|host| HostPattern::new(host).map_err(|rule| Broken::value("host", host, rule)));
        let sharding = config.shard.as_ref().map(|shard| {
            Sharding::new(shard, path.params()).map_err(|broken| broken.under("shard"))
        });
        let sharding = sharding.transpose()?;
        let templates = Templates {
            params: path.params(),
            sharded: sharding.is_some(),
        };
        let goal = Goal::new(config, all, &templates)?;
        let rewrite = config.rewrite.as_ref().map(|to| match &goal {
            Goal::App | Goal::Object { method: None, .. } if to.starts_with('/') => {
                templates.location("rewrite", to)
            }
            Goal::App | Goal::Object { method: None, .. } => {
                Err(Broken::value("rewrite", to, "must begin with /"))
            }
            _ => Err(Broken::value(
                "rewrite",
                to,
                "is for routes to an upstream or to an object",
            )),
        });
        Ok(Self {
            label: config.name.as_str().into(),
            upstream: config.upstream.clone(),
            host: host.transpose()?,
            scheme: config.scheme,
            methods: methods(config, &goal)?,
            headers: header_matches(config)?,
            priority: config.priority,
            goal,
            rewrite: rewrite.transpose()?,
            finish: Finish {
                compress: config.compress,
                security_headers: config.security_headers,
                deadline_max: config.deadline_max,
            },
            sharding,
            path,
        })
    }

    /// Names of the parameters of its path.
    pub fn params(&self) -> &[Box<str>] {
        self.path.params()
    }

    /// How uneven the shards of this route are used, if it has any and was used.
    pub fn skew(&self) -> Option<f64> {
        self.sharding.as_ref()?.skew()
    }

    /// What an operator should hear of.
    pub fn warning(&self) -> Option<String> {
        let warning = self.sharding.as_ref()?.warning()?;
        Some(format!("route {:?}: {warning}", self.label))
    }

    /// Which of two is tried first.
    pub(super) fn order(&self, other: &Self) -> Ordering {
        let rank = |route: &Self| {
            let host = route.host.as_ref().map(HostPattern::rank);
            Reverse((route.priority, host))
        };
        let details = |route: &Self| {
            let narrow = (route.scheme.is_some(), !route.methods.is_empty());
            Reverse((route.headers.len(), narrow))
        };
        rank(self)
            .cmp(&rank(other))
            .then_with(|| other.path.specificity(&self.path))
            .then_with(|| details(self).cmp(&details(other)))
    }

    /// Everything but the method.
    pub(super) fn matches(&self, asked: &Asked<'_>, host: Option<&str>) -> Option<Params> {
        let params = self.path.matches(asked.path)?;
        let right_host = match &self.host {
            None => true,
            Some(wanted) => host.is_some_and(|host| wanted.matches(host)),
        };
        let right_scheme = match self.scheme {
            None => true,
            Some(scheme) => asked.secure == (scheme == Scheme::Https),
        };
        let has = |(name, value): &(HeaderName, Option<HeaderValue>)| match value {
            None => asked.headers.contains_key(name),
            Some(value) => asked.headers.get_all(name).iter().any(|line| line == value),
        };
        (right_host && right_scheme && self.headers.iter().all(has)).then_some(params)
    }

    /// Where a request goes that this matches.
    pub(super) fn target(&self, index: usize, asked: &Asked<'_>) -> Result<Target, Problem> {
        let mut asked = *asked;
        if let Some(sharding) = &self.sharding {
            let shard = sharding.choose(&asked, &mut String::new());
            asked.shard = Some(shard.map_err(contract::bad_request)?);
        }
        self.goal.target(index, self.rewrite.as_ref(), &asked)
    }
}

fn methods(config: &RouteConfig, goal: &Goal) -> Result<Vec<Method>, Broken> {
    if config.methods.is_empty()
        && let Goal::Object {
            method: Some(_), ..
        } = goal
    {
        return Ok(vec![Method::POST]);
    }
    if let (Goal::Counter { by, .. }, true) = (goal, config.methods.is_empty()) {
        return Ok(match by {
            Some(_) => vec![Method::POST],
            None => vec![Method::GET, Method::HEAD],
        });
    }
    let parse = |(place, text): (usize, &String)| {
        let upper = text.bytes().all(|byte| byte.is_ascii_uppercase());
        let method = Method::from_str(text).ok().filter(|_| upper);
        method.ok_or_else(|| {
            Broken::value(&place.to_string(), text, "must be a method in upper case")
                .under("methods")
        })
    };
    config.methods.iter().enumerate().map(parse).collect()
}

fn header_matches(config: &RouteConfig) -> Result<Vec<(HeaderName, Option<HeaderValue>)>, Broken> {
    let parse = |(name, value): (&String, &String)| {
        let broken = || Broken::value(name, value, "cannot be a header").under("headers");
        let wanted = match value.as_str() {
            "*" => None,
            value => Some(HeaderValue::from_str(value).map_err(|_| broken())?),
        };
        Ok((name.parse().map_err(|_| broken())?, wanted))
    };
    config.headers.iter().map(parse).collect()
}
