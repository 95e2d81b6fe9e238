//! Where a route of the config leads, as the config says it and as it is for one request.

use std::str::FromStr;
use std::sync::Arc;

use http::header::{CONNECTION, CONTENT_LENGTH, TE, TRAILER, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderName, HeaderValue, StatusCode};
use ops::config::Broken;
use protocol::{ClassName, Home, ObjectId, ObjectName, Problem};

use super::{Ask, Fixed, ObjectTarget, Target, contract};
use crate::asked::Asked;
use crate::config::{
    Config, CounterRouteConfig, ObjectRouteConfig, RedirectConfig, RespondConfig, RouteConfig,
    RpcRouteConfig, Scope,
};
use crate::counters::ask::{self, ClientKey, CounterAsk, What};
use crate::template::{Source, Template};

#[derive(Debug)]
pub(super) enum Goal {
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

impl Goal {
    pub(super) fn new(
        config: &RouteConfig,
        all: &Config,
        templates: &Templates<'_>,
    ) -> Result<Self, Broken> {
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
            return Self::app(upstream, all);
        }
        if let Some(object) = &config.object {
            return Self::object(object, templates).map_err(|broken| broken.under("object"));
        }
        if let Some(rpc) = &config.rpc {
            return Self::rpc(rpc, templates).map_err(|broken| broken.under("rpc"));
        }
        if let Some(counter) = &config.counter {
            let goal = Self::counter(counter, all, templates);
            return goal.map_err(|broken| broken.under("counter"));
        }
        if let Some(redirect) = &config.redirect {
            return Self::redirect(redirect, templates).map_err(|broken| broken.under("redirect"));
        }
        let respond = config.respond.as_ref().expect("one of the six is there");
        let fixed = Fixed::new(respond).map_err(|broken| broken.under("respond"))?;
        Ok(Self::Respond(Arc::new(fixed)))
    }

    fn app(upstream: &str, all: &Config) -> Result<Self, Broken> {
        if all.upstreams.contains_key(upstream) {
            return Ok(Self::App);
        }
        let known: Vec<&str> = all.upstreams.keys().map(String::as_str).collect();
        let rule = format!("is not among the upstreams ({})", known.join(", "));
        Err(Broken::value("upstream", upstream, rule))
    }

    fn object(config: &ObjectRouteConfig, templates: &Templates<'_>) -> Result<Self, Broken> {
        Ok(Self::Object {
            class: class(&config.class)?,
            name: templates.key("name", &config.name)?,
            scope: config.scope,
            method: None,
        })
    }

    fn rpc(config: &RpcRouteConfig, templates: &Templates<'_>) -> Result<Self, Broken> {
        let method = contract::method_name(&config.method)
            .map_err(|rule| Broken::value("method", &config.method, rule))?;
        Ok(Self::Object {
            class: class(&config.class)?,
            name: templates.key("name", &config.name)?,
            scope: config.scope,
            method: Some(method.to_owned()),
        })
    }

    fn redirect(config: &RedirectConfig, templates: &Templates<'_>) -> Result<Self, Broken> {
        let legal = [301, 302, 303, 307, 308].contains(&config.status);
        let status = StatusCode::from_u16(config.status).ok().filter(|_| legal);
        let rule = "must be 301, 302, 303, 307 or 308";
        Ok(Self::Redirect {
            status: status.ok_or_else(|| Broken::value("status", config.status, rule))?,
            to: templates.location("to", &config.to)?,
        })
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

    /// Where a request goes. `index` is the route's.
    pub(super) fn target(
        &self,
        index: usize,
        rewrite: Option<&Template>,
        asked: &Asked<'_>,
    ) -> Result<Target, Problem> {
        match self {
            Self::App => Ok(Target::App {
                route: index,
                path_and_query: rewritten(rewrite, asked)?,
            }),
            Self::Object {
                class,
                name,
                scope,
                method,
            } => {
                let name: ObjectName = rendered(name, asked)?
                    .parse()
                    .map_err(contract::bad_request)?;
                let home = match scope {
                    Scope::Global => Home::Global,
                    Scope::Colo => Home::Colo(asked.colo),
                };
                let ask = match method {
                    Some(method) => Ask::Call {
                        method: method.clone(),
                    },
                    None => Ask::Fetch {
                        path_and_query: match rewritten(rewrite, asked)? {
                            Some(path_and_query) => path_and_query,
                            None => with_query(asked.path.to_owned(), asked),
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
            Self::Counter {
                name,
                by,
                client_key,
            } => counter_target(name, by.as_ref(), client_key, asked),
            Self::Redirect { status, to } => {
                let location = HeaderValue::try_from(with_query(rendered(to, asked)?, asked));
                Ok(Target::Redirect {
                    status: *status,
                    location: location.map_err(contract::bad_request)?,
                })
            }
            Self::Respond(fixed) => Ok(Target::Respond(Arc::clone(fixed))),
        }
    }
}

fn class(text: &str) -> Result<ClassName, Broken> {
    ClassName::from_str(text).map_err(|error| Broken::value("class", text, error))
}

/// Who asks, for counters.
pub(super) fn client_key(config: &Config) -> Result<ClientKey, Broken> {
    ClientKey::new(&config.counters.key).map_err(|broken| broken.under("counters"))
}

fn counter_target(
    name: &Template,
    by: Option<&Template>,
    client_key: &ClientKey,
    asked: &Asked<'_>,
) -> Result<Target, Problem> {
    let name = rendered(name, asked)?
        .parse()
        .map_err(contract::bad_request)?;
    let what = match by {
        None => What::Read { exact: false },
        Some(by) => What::Increment(ask::increment(client_key, asked, &rendered(by, asked)?)?),
    };
    Ok(Target::Counter(Box::new(CounterAsk { name, what })))
}

fn rendered(template: &Template, asked: &Asked<'_>) -> Result<String, Problem> {
    let mut text = String::new();
    template
        .render(asked, &mut text)
        .map_err(contract::bad_request)?;
    Ok(text)
}

/// The path and query that the target shall see instead of those that came.
fn rewritten(rewrite: Option<&Template>, asked: &Asked<'_>) -> Result<Option<String>, Problem> {
    let text = rewrite
        .map(|rewrite| rendered(rewrite, asked))
        .transpose()?;
    Ok(text.map(|text| with_query(text, asked)))
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

/// What an answer says of its framing and its connection (RFC 9110, 7.6.1).
const FRAMING: [HeaderName; 7] = [
    CONNECTION,
    CONTENT_LENGTH,
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
    HeaderName::from_static("keep-alive"),
];

impl Fixed {
    fn new(config: &RespondConfig) -> Result<Self, Broken> {
        let status = StatusCode::from_u16(config.status)
            .ok()
            .filter(|status| (200..=599).contains(&status.as_u16()))
            .ok_or_else(|| Broken::value("status", config.status, "must be from 200 to 599"))?;
        let headers = config.headers.iter().map(|(name, value)| {
            let broken = |rule: &str| Broken::value(name, value, rule).under("headers");
            let parsed: Option<(HeaderName, _)> = name.parse().ok().zip(value.parse().ok());
            let (name, value) = parsed.ok_or_else(|| broken("cannot be a header"))?;
            match FRAMING.contains(&name) {
                true => Err(broken("is said by the gateway: it concerns the connection")),
                false => Ok((name, value)),
            }
        });
        Ok(Self {
            status,
            headers: headers.collect::<Result<_, _>>()?,
            body: config.body.clone().into(),
        })
    }
}

/// What the templates of one route may use.
pub(super) struct Templates<'a> {
    pub(super) params: &'a [Box<str>],
    pub(super) sharded: bool,
}

impl Templates<'_> {
    fn key(&self, key: &str, text: &str) -> Result<Template, Broken> {
        self.check(key, Template::key(text, self.params))
    }

    pub(super) fn location(&self, key: &str, text: &str) -> Result<Template, Broken> {
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
