//! From a request to its target: pure, no I/O. The public contract for objects comes first, then the
//! routes of the config file: of those that match, the highest priority, then the most specific one.
//!
//! Two steps, because who asks is known only in between: [`Routes::find`] needs nothing but the head;
//! [`Routes::target`] makes names out of it, with the claims of a verified token.

mod configured;
mod contract;
mod goal;
pub mod pattern;

use std::sync::Arc;

use http::{HeaderName, HeaderValue, Method, StatusCode};
use ops::config::Broken;
use protocol::{ClassName, Home, ObjectId, ObjectName, Problem};

use crate::asked::{Asked, Params};
use crate::config::Config;
use crate::counters::ask::{self, ClientKey, CounterAsk};
pub use configured::{Finish, Route};

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
        routes.sort_by(Route::order);
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
            client_key: goal::client_key(config)?,
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

#[cfg(test)]
mod tests;
