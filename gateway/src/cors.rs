//! Cross-origin requests of browsers (WHATWG Fetch, 3.2): preflights are answered here, and responses say who
//! may read them.

use std::time::Duration;

use bytes::Bytes;
use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE,
    ACCESS_CONTROL_REQUEST_METHOD, ORIGIN, VARY,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use ops::config::Broken;
use serde::{Deserialize, Serialize};

use crate::route::Fixed;

/// `cors`: which pages of other origins may use a route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CorsConfig {
    /// As in `https://app.example.org`, compared byte for byte; `*` is any, without credentials.
    pub origins: Vec<String>,
    #[serde(default = "methods")]
    pub methods: Vec<String>,
    /// Request headers that pages may set.
    #[serde(default)]
    pub headers: Vec<String>,
    /// Response headers that pages may read.
    #[serde(default)]
    pub expose: Vec<String>,
    /// Cookies and other credentials may come along.
    #[serde(default)]
    pub credentials: bool,
    /// How long browsers may remember the answer to a preflight.
    #[serde(default = "max_age", with = "humantime_serde")]
    pub max_age: Duration,
}

fn methods() -> Vec<String> {
    ["GET", "HEAD", "POST"].map(str::to_owned).into()
}

fn max_age() -> Duration {
    Duration::from_secs(600)
}

/// A `cors` table, ready to answer.
#[derive(Debug, Clone)]
pub struct Cors {
    origins: Vec<HeaderValue>,
    any: bool,
    methods: HeaderValue,
    headers: Option<HeaderValue>,
    expose: Option<HeaderValue>,
    credentials: bool,
    max_age: HeaderValue,
}

/// What an app might say itself, and the route says instead.
pub const HEADERS: [HeaderName; 3] = [
    ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_ALLOW_CREDENTIALS,
    ACCESS_CONTROL_EXPOSE_HEADERS,
];

/// Headers of one response.
pub type Grant = Vec<(HeaderName, HeaderValue)>;

/// The method that a browser asks for in a preflight.
pub fn preflight(method: &Method, headers: &HeaderMap) -> Option<Method> {
    if *method != Method::OPTIONS || !headers.contains_key(ORIGIN) {
        return None;
    }
    let wanted = headers.get(ACCESS_CONTROL_REQUEST_METHOD)?;
    Method::from_bytes(wanted.as_bytes()).ok()
}

impl Cors {
    /// # Errors
    /// The key, below `cors`, that breaks a rule.
    pub fn new(config: &CorsConfig) -> Result<Self, Broken> {
        let value = |key: &str, text: &str| {
            HeaderValue::from_str(text)
                .map_err(|_| Broken::value(key, text, "cannot be in a header"))
        };
        let list = |key: &str, list: &[String]| match list {
            [] => Ok(None),
            list => value(key, &list.join(", ")).map(Some),
        };
        if config.origins.is_empty() {
            return Err(Broken::new("origins", "must not be empty"));
        }
        let any = config.origins.iter().any(|origin| origin == "*");
        if any && config.credentials {
            let rule = "must name origins: credentials are not for any";
            return Err(Broken::value("origins", &config.origins, rule));
        }
        let wrong = |origin: &&String| {
            let rest = origin.split_once("://").map(|(_, rest)| rest);
            *origin != "*"
                && *origin != "null"
                && rest.is_none_or(|rest| rest.contains('/') || rest.is_empty())
        };
        if let Some(origin) = config.origins.iter().find(wrong) {
            let rule = "must be scheme://host[:port] and nothing after it, or *";
            return Err(Broken::value("origins", origin, rule));
        }
        let origins = config.origins.iter();
        Ok(Self {
            origins: origins
                .map(|origin| value("origins", origin))
                .collect::<Result<_, _>>()?,
            any,
            methods: value("methods", &config.methods.join(", "))?,
            headers: list("headers", &config.headers)?,
            expose: list("expose", &config.expose)?,
            credentials: config.credentials,
            max_age: HeaderValue::from(config.max_age.as_secs()),
        })
    }

    /// What the response to a request with these headers says. Empty: the page may not read it.
    pub fn grant(&self, headers: &HeaderMap) -> Grant {
        let mut grant = self.origin(headers);
        if let Some(expose) = self.expose.as_ref().filter(|_| is_granted(&grant)) {
            grant.push((ACCESS_CONTROL_EXPOSE_HEADERS, expose.clone()));
        }
        grant
    }

    /// The answer to a preflight.
    pub fn answer(&self, headers: &HeaderMap) -> Fixed {
        let mut grant = self.origin(headers);
        if is_granted(&grant) {
            grant.push((ACCESS_CONTROL_ALLOW_METHODS, self.methods.clone()));
            if let Some(headers) = &self.headers {
                grant.push((ACCESS_CONTROL_ALLOW_HEADERS, headers.clone()));
            }
            grant.push((ACCESS_CONTROL_MAX_AGE, self.max_age.clone()));
        }
        Fixed {
            status: StatusCode::NO_CONTENT,
            headers: grant,
            body: Bytes::new(),
        }
    }

    fn origin(&self, headers: &HeaderMap) -> Grant {
        let mut grant = Vec::with_capacity(4);
        if !self.any {
            // Caches must keep answers to different origins apart, also those without a grant.
            grant.push((VARY, HeaderValue::from_static("Origin")));
        }
        let Some(origin) = headers.get(ORIGIN) else {
            return grant;
        };
        if self.any {
            grant.push((ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*")));
        } else if self.origins.contains(origin) {
            grant.push((ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone()));
            if self.credentials {
                let yes = HeaderValue::from_static("true");
                grant.push((ACCESS_CONTROL_ALLOW_CREDENTIALS, yes));
            }
        }
        grant
    }
}

fn is_granted(grant: &Grant) -> bool {
    grant
        .iter()
        .any(|(name, _)| name == ACCESS_CONTROL_ALLOW_ORIGIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cors(toml: &str) -> Result<Cors, String> {
        let config: CorsConfig = toml::from_str(toml).unwrap();
        Cors::new(&config).map_err(|broken| broken.to_string())
    }

    fn grant(cors: &Cors, origin: &'static str) -> Vec<String> {
        let mut headers = HeaderMap::new();
        headers.insert(ORIGIN, HeaderValue::from_static(origin));
        let line = |(name, value): (HeaderName, HeaderValue)| {
            format!("{name}: {}", value.to_str().unwrap())
        };
        cors.grant(&headers).into_iter().map(line).collect()
    }

    #[test]
    fn only_the_origins_of_the_list_may_read() {
        let some = cors("origins = ['https://a.example']\ncredentials = true\nexpose = ['etag']");
        let some = some.unwrap();
        assert_eq!(
            grant(&some, "https://a.example"),
            [
                "vary: Origin",
                "access-control-allow-origin: https://a.example",
                "access-control-allow-credentials: true",
                "access-control-expose-headers: etag",
            ]
        );
        assert_eq!(grant(&some, "https://a.example.evil"), ["vary: Origin"]);
        assert_eq!(grant(&some, "null"), ["vary: Origin"]);
        let any = cors("origins = ['*']").unwrap();
        assert_eq!(grant(&any, "null"), ["access-control-allow-origin: *"]);
    }

    #[test]
    fn what_browsers_would_not_accept_is_refused() {
        let refused = |toml: &str, want: &str| {
            let refusal = cors(toml).unwrap_err();
            assert!(refusal.contains(want), "{refusal:?} should say {want:?}");
        };
        refused("origins = []", "must not be empty");
        refused("origins = ['*']\ncredentials = true", "must name origins");
        refused("origins = ['a.example']", "must be scheme://host");
        refused("origins = ['https://a.example/']", "must be scheme://host");
    }
}
