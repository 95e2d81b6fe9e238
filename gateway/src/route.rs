//! From URL to target: pure, no I/O. The public contract for objects comes first, then the routes of
//! the config file.

use std::fmt;

use http::Method;
use protocol::{ClassName, Home, ObjectId, ObjectName, Problem, limits};

use crate::asked::Asked;
use crate::config::Config;

/// Labels in metrics for what the config does not name.
pub const RESERVED_LABELS: [&str; 4] = ["objects", "rpc", "new", "none"];

/// Where a request goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    Object(Box<ObjectTarget>),
    /// A route of the config, by its index.
    App {
        route: usize,
    },
}

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
}

impl ObjectTarget {
    /// The label in metrics.
    pub fn label(&self) -> &'static str {
        match self.ask {
            Ask::Fetch { .. } => "objects",
            Ask::Call { .. } => "rpc",
            Ask::Create => "new",
        }
    }
}

/// The config's routes, ready to match.
#[derive(Debug, Clone, Default)]
pub struct Routes(Vec<Route>);

#[derive(Debug, Clone)]
pub struct Route {
    pub name: String,
    pub upstream: String,
    host: Option<String>,
    pattern: Pattern,
}

/// A path, or a prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pattern {
    Exact(String),
    /// Ends in `/`; also matches the path without that slash.
    Prefix(String),
}

impl Pattern {
    /// # Errors
    /// The rule that the text breaks.
    pub fn new(text: &str) -> Result<Self, &'static str> {
        if !text.starts_with('/') {
            return Err("must begin with /");
        }
        let (path, prefix) = match text.strip_suffix('*') {
            Some(path) if path.ends_with('/') => (path, true),
            Some(_) => return Err("may have * only at the end, after a /"),
            None => (text, false),
        };
        if path.contains(['*', '?', '#']) {
            return Err("may have * only at the end, and no ? or #");
        }
        Ok(if prefix {
            Self::Prefix(path.to_owned())
        } else {
            Self::Exact(path.to_owned())
        })
    }

    fn matches(&self, path: &str) -> bool {
        match self {
            Self::Exact(exact) => path == exact,
            Self::Prefix(prefix) => {
                path.starts_with(prefix.as_str()) || prefix.strip_suffix('/') == Some(path)
            }
        }
    }

    /// Longer patterns win, and exact ones over prefixes.
    fn rank(&self) -> (usize, bool) {
        match self {
            Self::Exact(path) => (path.len(), true),
            Self::Prefix(path) => (path.len(), false),
        }
    }
}

impl Routes {
    /// `config` was validated.
    pub fn new(config: &Config) -> Self {
        let routes = config.routes.iter().map(|route| Route {
            name: route.name.clone(),
            upstream: route.upstream.clone(),
            host: route.host.clone(),
            pattern: Pattern::new(&route.path).expect("validated"),
        });
        Self(routes.collect())
    }

    pub fn get(&self, index: usize) -> &Route {
        &self.0[index]
    }

    fn find(&self, asked: &Asked<'_>) -> Option<usize> {
        let host = asked.host_name();
        let applies = |route: &Route| {
            let right_host = match &route.host {
                None => true,
                Some(wanted) => host.is_some_and(|host| host.eq_ignore_ascii_case(wanted)),
            };
            right_host && route.pattern.matches(asked.path)
        };
        self.0
            .iter()
            .enumerate()
            .filter(|(_, route)| applies(route))
            .max_by_key(|(_, route)| (route.host.is_some(), route.pattern.rank()))
            .map(|(index, _)| index)
    }
}

/// Where the request goes, or why nowhere. `random` makes the id when a new one is asked for.
pub fn decide(
    routes: &Routes,
    asked: Asked<'_>,
    random: impl FnOnce() -> [u8; 20],
) -> Result<Target, Problem> {
    if let Some(rest) = asked.path.strip_prefix("/objects/") {
        return objects(asked, rest, random).map(|target| Target::Object(Box::new(target)));
    }
    if let Some(rest) = asked.path.strip_prefix("/rpc/") {
        return rpc(asked, rest).map(|target| Target::Object(Box::new(target)));
    }
    match routes.find(&asked) {
        Some(route) => Ok(Target::App { route }),
        None => Err(Problem::not_found(format!(
            "nothing is at {:?}; there are /objects/{{class}}/{{name}}, /rpc/{{class}}/{{name}}/{{method}} \
             and the routes of the gateway's configuration",
            asked.path
        ))),
    }
}

/// `{class}`, `{class}/{name}`, `{class}/{name}/{path…}`, the name also as `id:{hex}`.
fn objects(
    asked: Asked<'_>,
    rest: &str,
    random: impl FnOnce() -> [u8; 20],
) -> Result<ObjectTarget, Problem> {
    let (class, rest) = match rest.split_once('/') {
        Some((class, rest)) => (parse_class(class)?, rest),
        None => (parse_class(rest)?, ""),
    };
    if rest.is_empty() {
        if asked.method != Method::POST {
            return Err(Problem::method_not_allowed(
                "POST",
                format!(
                    "{} is not offered here; POST makes a new unique id, and /objects/{class}/{{name}} \
                     is an object",
                    asked.method
                ),
            ));
        }
        let id = ObjectId::unique(&class, Home::Global, random());
        return Ok(ObjectTarget {
            class,
            id,
            name: None,
            ask: Ask::Create,
        });
    }
    let (segment, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let (id, name) = identify(&class, segment)?;
    let path = if path.is_empty() { "/" } else { path };
    let path_and_query = match asked.query {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    };
    Ok(ObjectTarget {
        class,
        id,
        name,
        ask: Ask::Fetch { path_and_query },
    })
}

/// `{class}/{name}/{method}`.
fn rpc(asked: Asked<'_>, rest: &str) -> Result<ObjectTarget, Problem> {
    let mut parts = rest.split('/');
    let (Some(class), Some(segment), Some(method), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(Problem::not_found(format!(
            "{:?} must be /rpc/{{class}}/{{name}}/{{method}}; a / in a name is written %2F",
            asked.path
        )));
    };
    if asked.method != Method::POST {
        return Err(Problem::method_not_allowed(
            "POST",
            format!("{} is not offered here; calls are POST", asked.method),
        ));
    }
    let class = parse_class(class)?;
    let (id, name) = identify(&class, segment)?;
    Ok(ObjectTarget {
        class,
        id,
        name,
        ask: Ask::Call {
            method: parse_method(method)?,
        },
    })
}

/// The object that a path segment denotes. `id:` counts only as it is: a name that begins so is
/// written `id%3A`.
fn identify(class: &ClassName, segment: &str) -> Result<(ObjectId, Option<ObjectName>), Problem> {
    if let Some(hex) = segment.strip_prefix("id:") {
        let id: ObjectId = hex.parse().map_err(bad_request)?;
        return Ok((id.check_class(class).map_err(bad_request)?, None));
    }
    let name = ObjectName::decode(segment).map_err(bad_request)?;
    Ok((ObjectId::named(class, Home::Global, &name), Some(name)))
}

fn parse_class(text: &str) -> Result<ClassName, Problem> {
    text.parse().map_err(bad_request)
}

fn parse_method(text: &str) -> Result<String, Problem> {
    let legal = text.len() <= limits::METHOD_NAME_BYTES_MAX
        && text.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_')
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if legal {
        Ok(text.to_owned())
    } else {
        let shown: String = text.chars().take(80).collect();
        Err(Problem::bad_request(format!(
            "method name {shown:?} must be a letter or `_` followed by at most {} letters, digits or `_`",
            limits::METHOD_NAME_BYTES_MAX - 1
        )))
    }
}

fn bad_request(error: impl fmt::Display) -> Problem {
    Problem::bad_request(error.to_string())
}

#[cfg(test)]
mod tests;
