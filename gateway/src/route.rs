//! From a request to its target: pure, no I/O. The public contract for objects comes first, then the
//! routes of the config file: of those that match, the highest priority, then the most specific one.
//!
//! Two steps, because who asks is known only in between: [`Routes::find`] needs nothing but the head;
//! [`Routes::target`] makes names out of it, with the claims of a verified token.

mod contract;
pub mod pattern;

use std::cmp::Reverse;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, HeaderValue, Method, StatusCode};
use ops::config::Broken;
use protocol::{ClassName, Home, ObjectId, ObjectName, Problem};

use crate::asked::{Asked, Params};
use crate::config::{Config, CounterRouteConfig, RespondConfig, RouteConfig, Scheme, Scope};
use crate::counters::ask::{self, ClientKey, CounterAsk, What};
use crate::shard::Sharding;
use crate::template::{Source, Template};
use pattern::{HostPattern, PathPattern};

/// Labels in metrics for what the config does not name.
pub const RESERVED_LABELS: [&str; 5] = ["objects", "rpc", "counters", "new", "none"];

/// One object, and what is asked of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectTarget {
    pub class: ClassName,
    pub id: ObjectId,
    /// `None` if the client gave an id.
    pub name: Option<ObjectName>,
    pub ask: Ask,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask {
    /// The object's `fetch`. Path and query as the object shall see them.
    Fetch { path_and_query: String },
    /// The call of a method.
    Call { method: String },
    /// Only that the class exists: the client wants a new id.
    Create,
    /// A call of the gateway's own.
    Own { method: &'static str },
}

impl ObjectTarget {
    /// The label in metrics.
    pub fn label(&self) -> &'static str {
        match self.ask {
            Ask::Fetch { .. } => "objects",
            Ask::Call { .. } => "rpc",
            Ask::Create => "new",
            Ask::Own { .. } => "own",
        }
    }
}

/// What a request matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// `/objects/…`
    Objects,
    /// `/rpc/…`
    Rpc,
    /// `/counters/…`
    Counters,
    /// A route of the config, by its index, with its parameters.
    Route { index: usize, params: Params },
}

/// Where a request goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    Object(Box<ObjectTarget>),
    Counter(Box<CounterAsk>),
    /// The app upstream of a route. The path and query that it shall see, unless as they came.
    App {
        route: usize,
        path_and_query: Option<String>,
    },
    Redirect {
        status: StatusCode,
        location: HeaderValue,
    },
    Respond(Arc<Fixed>),
}

/// An answer that is always the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fixed {
    pub status: StatusCode,
    pub headers: Vec<(HeaderName, HeaderValue)>,
    pub body: bytes::Bytes,
}

/// The config's routes, ready to match.
#[derive(Debug, Default)]
pub struct Routes {
    /// In the order in which they are tried: the first that matches is the one.
    routes: Vec<Route>,
    /// Classes whose names mean an object per colo under `/objects` and `/rpc`.
    colo_scoped: Vec<ClassName>,
    /// Who asks, for counters.
    client_key: ClientKey,
}

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
    methods: Vec<Method>,
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

#[derive(Debug)]
enum Goal {
    App,
    Object {
        class: ClassName,
        name: Template,
        scope: Scope,
        /// Of a call; `None` is the object's `fetch`.
        method: Option<String>,
    },
    Counter {
        name: Template,
        /// `None`: it is read.
        by: Option<Template>,
        client_key: ClientKey,
    },
    Redirect {
        status: StatusCode,
        to: Template,
    },
    Respond(Arc<Fixed>),
}

/// Prefixes that belong to the public contract.
const CONTRACT: [&str; 3] = ["objects", "rpc", "counters"];

impl Routes {
    /// # Errors
    /// The key that breaks a rule.
    pub fn new(config: &Config) -> Result<Self, Broken> {
        let mut routes: Vec<Route> = Vec::with_capacity(config.routes.len());
        for (place, route) in config.routes.iter().enumerate() {
            let compiled = Route::new(route, config);
            let under = |broken: Broken| broken.under(place).under("routes");
            let compiled = compiled.map_err(under)?;
            if routes.iter().any(|other| other.label == compiled.label) {
                return Err(under(Broken::value(
                    "name",
                    &route.name,
                    "is the name of another route too",
                )));
            }
            routes.push(compiled);
        }
        // Stable: of routes that are equal, the first of the file comes first.
        routes.sort_by(|a, b| {
            let rank = |route: &Route| {
                let host = route.host.as_ref().map(HostPattern::rank);
                Reverse((route.priority, host))
            };
            let details = |route: &Route| {
                let narrow = (route.scheme.is_some(), !route.methods.is_empty());
                Reverse((route.headers.len(), narrow))
            };
            rank(a)
                .cmp(&rank(b))
                .then_with(|| b.path.specificity(&a.path))
                .then_with(|| details(a).cmp(&details(b)))
        });
        let colo_scoped = config.objects.colo_scoped.iter().enumerate();
        let colo_scoped = colo_scoped.map(|(place, class)| {
            class
                .parse()
                .map_err(|error: protocol::ids::ClassNameError| {
                    let broken = Broken::value(&place.to_string(), class, error);
                    broken.under("colo_scoped").under("objects")
                })
        });
        Ok(Self {
            routes,
            colo_scoped: colo_scoped.collect::<Result<_, _>>()?,
            client_key: client_key(config)?,
        })
    }

    pub fn get(&self, index: usize) -> &Route {
        &self.routes[index]
    }

    pub fn iter(&self) -> impl Iterator<Item = &Route> {
        self.routes.iter()
    }

    /// What the request matches; the routes of the config are not asked for what belongs to objects.
    pub fn find(&self, asked: &Asked<'_>) -> Result<Found, Problem> {
        if asked.path.starts_with("/objects/") {
            return Ok(Found::Objects);
        }
        if asked.path.starts_with("/rpc/") {
            return Ok(Found::Rpc);
        }
        if asked.path.starts_with("/counters/") {
            return Ok(Found::Counters);
        }
        if pattern::has_dot_segment(asked.path) {
            return Err(Problem::bad_request(format!(
                "path {:?} has a segment `.` or `..`; clients resolve those",
                asked.path
            )));
        }
        let host = asked.host_name();
        let mut allowed: Vec<&str> = Vec::new();
        for (index, route) in self.routes.iter().enumerate() {
            let Some(params) = route.matches(asked, host) else {
                continue;
            };
            if route.methods.is_empty() || route.methods.contains(asked.method) {
                return Ok(Found::Route { index, params });
            }
            allowed.extend(route.methods.iter().map(Method::as_str));
        }
        if !allowed.is_empty() {
            allowed.sort_unstable();
            allowed.dedup();
            return Err(Problem::method_not_allowed(
                allowed.join(", "),
                format!("{} is not offered at {:?}", asked.method, asked.path),
            ));
        }
        Err(Problem::not_found(format!(
            "nothing is at {:?}; there are /objects/{{class}}/{{name}}, /rpc/{{class}}/{{name}}/{{method}}, \
             /counters/{{name}} and the routes of the gateway's configuration",
            asked.path
        )))
    }

    /// Where a request goes that [`find`](Self::find) found. `asked` has the parameters of that, and claims
    /// if there are any. `random` makes the id when a new one is asked for.
    pub fn target(
        &self,
        found: Found,
        asked: &Asked<'_>,
        random: impl FnOnce() -> [u8; 20],
    ) -> Result<Target, Problem> {
        let after = |prefix: &str| asked.path.strip_prefix(prefix).unwrap_or_default();
        let object = |target| Target::Object(Box::new(target));
        match found {
            Found::Objects => {
                contract::objects(self, asked, after("/objects/"), random).map(object)
            }
            Found::Rpc => contract::rpc(self, asked, after("/rpc/")).map(object),
            Found::Counters => {
                let ask = ask::contract(&self.client_key, asked, after("/counters/"))?;
                Ok(Target::Counter(Box::new(ask)))
            }
            Found::Route { index, .. } => self.routes[index].target(index, asked),
        }
    }

    /// Where the names of a class live, under `/objects` and `/rpc`.
    fn home(&self, class: &ClassName, asked: &Asked<'_>) -> Home {
        match self.colo_scoped.contains(class) {
            true => Home::Colo(asked.colo),
            false => Home::Global,
        }
    }
}

impl Route {
    fn new(config: &RouteConfig, all: &Config) -> Result<Self, Broken> {
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

    /// Everything but the method.
    fn matches(&self, asked: &Asked<'_>, host: Option<&str>) -> Option<Params> {
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

    fn target(&self, index: usize, asked: &Asked<'_>) -> Result<Target, Problem> {
        let mut text = String::new();
        let mut asked = *asked;
        if let Some(sharding) = &self.sharding {
            let shard = sharding.choose(&asked, &mut text);
            asked.shard = Some(shard.map_err(contract::bad_request)?);
        }
        match &self.goal {
            Goal::App => Ok(Target::App {
                route: index,
                path_and_query: self.rewritten(&asked)?,
            }),
            Goal::Object {
                class,
                name,
                scope,
                method,
            } => {
                text.clear();
                name.render(&asked, &mut text)
                    .map_err(contract::bad_request)?;
                let name: ObjectName = text.parse().map_err(contract::bad_request)?;
                let home = match scope {
                    Scope::Global => Home::Global,
                    Scope::Colo => Home::Colo(asked.colo),
                };
                let ask = match method {
                    Some(method) => Ask::Call {
                        method: method.clone(),
                    },
                    None => Ask::Fetch {
                        path_and_query: match self.rewritten(&asked)? {
                            Some(path_and_query) => path_and_query,
                            None => with_query(asked.path.to_owned(), &asked),
                        },
                    },
                };
                Ok(Target::Object(Box::new(ObjectTarget {
                    id: ObjectId::named(class, home, &name),
                    class: class.clone(),
                    name: Some(name),
                    ask,
                })))
            }
            Goal::Counter {
                name,
                by,
                client_key,
            } => counter_target(name, by.as_ref(), client_key, &asked),
            Goal::Redirect { status, to } => {
                to.render(&asked, &mut text)
                    .map_err(contract::bad_request)?;
                let location = HeaderValue::try_from(with_query(text, &asked));
                Ok(Target::Redirect {
                    status: *status,
                    location: location.map_err(contract::bad_request)?,
                })
            }
            Goal::Respond(fixed) => Ok(Target::Respond(Arc::clone(fixed))),
        }
    }

    fn rewritten(&self, asked: &Asked<'_>) -> Result<Option<String>, Problem> {
        let Some(rewrite) = &self.rewrite else {
            return Ok(None);
        };
        let mut text = String::new();
        rewrite
            .render(asked, &mut text)
            .map_err(contract::bad_request)?;
        Ok(Some(with_query(text, asked)))
    }
}

/// Adds the query of the request to a location that has none.
fn with_query(mut location: String, asked: &Asked<'_>) -> String {
    if let Some(query) = asked.query
        && !location.contains('?')
    {
        location.push('?');
        location.push_str(query);
    }
    location
}

/// What the templates of one route may use.
struct Templates<'a> {
    params: &'a [Box<str>],
    sharded: bool,
}

impl Templates<'_> {
    fn key(&self, key: &str, text: &str) -> Result<Template, Broken> {
        self.check(key, Template::key(text, self.params))
    }

    fn location(&self, key: &str, text: &str) -> Result<Template, Broken> {
        self.check(key, Template::location(text, self.params))
    }

    fn check(
        &self,
        key: &str,
        parsed: Result<Template, crate::template::TemplateError>,
    ) -> Result<Template, Broken> {
        let template = parsed.map_err(|error| Broken::new(key, format!("is no {error}")))?;
        if !self.sharded && template.sources().any(|source| *source == Source::Shard) {
            return Err(Broken::value(
                key,
                template.as_str(),
                "uses {shard}, and the route has no shard table",
            ));
        }
        Ok(template)
    }
}

impl Goal {
    fn new(config: &RouteConfig, all: &Config, templates: &Templates<'_>) -> Result<Self, Broken> {
        let goals = [
            config.upstream.is_some(),
            config.object.is_some(),
            config.rpc.is_some(),
            config.counter.is_some(),
            config.redirect.is_some(),
            config.respond.is_some(),
        ];
        if goals.iter().filter(|goal| **goal).count() != 1 {
            return Err(Broken::new(
                "name",
                format!(
                    "= {:?} must have exactly one of upstream, object, rpc, counter, redirect, respond",
                    config.name
                ),
            ));
        }
        if let Some(upstream) = &config.upstream {
            if all.upstreams.contains_key(upstream) {
                return Ok(Self::App);
            }
            let known: Vec<&str> = all.upstreams.keys().map(String::as_str).collect();
            let rule = format!("is not among the upstreams ({})", known.join(", "));
            return Err(Broken::value("upstream", upstream, rule));
        }
        let class = |text: &str| {
            ClassName::from_str(text).map_err(|error| Broken::value("class", text, error))
        };
        if let Some(object) = &config.object {
            let goal = || {
                Ok(Self::Object {
                    class: class(&object.class)?,
                    name: templates.key("name", &object.name)?,
                    scope: object.scope,
                    method: None,
                })
            };
            return goal().map_err(|broken: Broken| broken.under("object"));
        }
        if let Some(rpc) = &config.rpc {
            let goal = || {
                let method = contract::method_name(&rpc.method)
                    .map_err(|rule| Broken::value("method", &rpc.method, rule))?;
                Ok(Self::Object {
                    class: class(&rpc.class)?,
                    name: templates.key("name", &rpc.name)?,
                    scope: rpc.scope,
                    method: Some(method.to_owned()),
                })
            };
            return goal().map_err(|broken: Broken| broken.under("rpc"));
        }
        if let Some(counter) = &config.counter {
            let goal = Self::counter(counter, all, templates);
            return goal.map_err(|broken| broken.under("counter"));
        }
        if let Some(redirect) = &config.redirect {
            let goal = || {
                let legal = [301, 302, 303, 307, 308].contains(&redirect.status);
                let status = StatusCode::from_u16(redirect.status).ok().filter(|_| legal);
                let rule = "must be 301, 302, 303, 307 or 308";
                Ok(Self::Redirect {
                    status: status.ok_or_else(|| Broken::value("status", redirect.status, rule))?,
                    to: templates.location("to", &redirect.to)?,
                })
            };
            return goal().map_err(|broken: Broken| broken.under("redirect"));
        }
        let respond = config.respond.as_ref().expect("one of the six is there");
        let fixed = Fixed::new(respond).map_err(|broken| broken.under("respond"))?;
        Ok(Self::Respond(Arc::new(fixed)))
    }

    fn counter(
        config: &CounterRouteConfig,
        all: &Config,
        templates: &Templates<'_>,
    ) -> Result<Self, Broken> {
        if let Some(by) = config.by.as_ref().filter(|_| config.read) {
            return Err(Broken::value(
                "by",
                by,
                "is for increments, and read = true",
            ));
        }
        let by = config.by.as_deref().unwrap_or("1");
        let by = match config.read {
            true => None,
            false => Some(templates.key("by", by)?),
        };
        let constant = by.as_ref().filter(|by| by.sources().next().is_none());
        if let Some(by) = constant.filter(|by| by.as_str().parse::<i64>().is_err()) {
            let rule = "must be a whole number of 64 bits, or take it from the request";
            return Err(Broken::value("by", by.as_str(), rule));
        }
        Ok(Self::Counter {
            name: templates.key("name", &config.name)?,
            by,
            client_key: client_key(all)?,
        })
    }
}

fn client_key(config: &Config) -> Result<ClientKey, Broken> {
    ClientKey::new(&config.counters.key).map_err(|broken| broken.under("counters"))
}

fn counter_target(
    name: &Template,
    by: Option<&Template>,
    client_key: &ClientKey,
    asked: &Asked<'_>,
) -> Result<Target, Problem> {
    let mut text = String::new();
    name.render(asked, &mut text)
        .map_err(contract::bad_request)?;
    let name = text.parse().map_err(contract::bad_request)?;
    let what = match by {
        None => What::Read { exact: false },
        Some(by) => {
            text.clear();
            by.render(asked, &mut text).map_err(contract::bad_request)?;
            What::Increment(ask::increment(client_key, asked, &text)?)
        }
    };
    Ok(Target::Counter(Box::new(CounterAsk { name, what })))
}

impl Fixed {
    fn new(config: &RespondConfig) -> Result<Self, Broken> {
        let status = StatusCode::from_u16(config.status)
            .ok()
            .filter(|status| (200..=599).contains(&status.as_u16()))
            .ok_or_else(|| Broken::value("status", config.status, "must be from 200 to 599"))?;
        let headers = config.headers.iter().map(|(name, value)| {
            let broken = || Broken::value(name, value, "cannot be a header").under("headers");
            let parsed = name.parse().ok().zip(value.parse().ok());
            parsed.ok_or_else(broken)
        });
        Ok(Self {
            status,
            headers: headers.collect::<Result<_, _>>()?,
            body: config.body.clone().into(),
        })
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

#[cfg(test)]
mod tests;
