//! Who asks: API keys, tokens and signed URLs, checked before anything else of a request.
//!
//! A route names one or more ways (`auth = ["users", "partners"]`). The first whose credentials a request
//! has decides; a request without any is `unauthorized`. What is found out are *claims*, `{jwt.x}` in
//! templates: those of the token, or `sub` with the name of the API key.

pub mod api_key;
pub mod jwks;
pub mod jwt;
pub mod signed_url;

use std::collections::BTreeMap;
use std::sync::Arc;

use http::HeaderValue;
use http::header::WWW_AUTHENTICATE;
use ops::config::Broken;
use protocol::{ErrorCode, Problem};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::runtime::Handle;

use self::api_key::{ApiKeys, ApiKeysConfig};
use self::jwt::{Jwt, JwtConfig};
use self::signed_url::{SignedUrl, SignedUrlConfig};
use crate::asked::Asked;
use crate::refusal::Refusal;

/// `[auth.NAME]`: one way to know who asks. Exactly one of the keys.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuthConfig {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_keys: Option<ApiKeysConfig>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jwt: Option<JwtConfig>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signed_url: Option<SignedUrlConfig>,
}

/// What a token says, or who an API key belongs to.
pub type Claims = Arc<Value>;

/// Why a request is not let in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Denied {
    /// It has no credentials of this kind: another kind may do.
    Absent,
    /// It has, and they are wrong. The text names the rule, never the credentials.
    Wrong(String),
    /// They are right, but do not allow this.
    Forbidden(String),
    /// They cannot be judged now.
    Unavailable(String),
}

/// One way to know who asks.
enum Way {
    ApiKeys(ApiKeys),
    Jwt(Box<Jwt>),
    SignedUrl(SignedUrl),
}

/// All ways of a configuration.
#[derive(Default)]
pub struct Ways(BTreeMap<String, (AuthConfig, Arc<Way>)>);

impl Ways {
    /// Ways that are the same as `before` go on, with the keys that they fetched.
    ///
    /// # Errors
    /// What breaks a rule, or a file of keys that cannot be read.
    pub fn new(config: &BTreeMap<String, AuthConfig>, before: &Self) -> Result<Self, Broken> {
        let mut ways = BTreeMap::new();
        for (name, config) in config {
            let known = before.0.get(name).filter(|(known, _)| known == config);
            let way = match known {
                Some((_, way)) => Arc::clone(way),
                None => {
                    let way = Way::new(config);
                    Arc::new(way.map_err(|broken| broken.under(name).under("auth"))?)
                }
            };
            ways.insert(name.clone(), (config.clone(), way));
        }
        Ok(Self(ways))
    }

    /// Starts what keeps keys current, unless it runs already.
    pub fn keep(&self, runtime: &Handle) {
        for (_, way) in self.0.values() {
            if let Way::Jwt(jwt) = &**way {
                jwt.keep(runtime);
            }
        }
    }

    /// What a route asks for.
    ///
    /// # Errors
    /// A name that there is not.
    pub fn guard(&self, names: &[String]) -> Result<Auth, Broken> {
        let find = |name: &String| match self.0.get(name) {
            Some((_, way)) => Ok(Arc::clone(way)),
            None => {
                let known: Vec<&str> = self.0.keys().map(String::as_str).collect();
                let rule = format!("is not among the ways of [auth] ({})", known.join(", "));
                Err(Broken::value("auth", name, rule))
            }
        };
        names.iter().map(find).collect::<Result<_, _>>().map(Auth)
    }
}

impl Way {
    fn new(config: &AuthConfig) -> Result<Self, Broken> {
        let (key, way) = match (&config.api_keys, &config.jwt, &config.signed_url) {
            (Some(keys), None, None) => ("api_keys", ApiKeys::new(keys).map(Self::ApiKeys)),
            (None, Some(jwt), None) => ("jwt", Jwt::new(jwt).map(|jwt| Self::Jwt(Box::new(jwt)))),
            (None, None, Some(url)) => ("signed_url", SignedUrl::new(url).map(Self::SignedUrl)),
            _ => {
                let rule = "must be there, or jwt, or signed_url: exactly one of them";
                return Err(Broken::new("api_keys", rule));
            }
        };
        way.map_err(|rule| Broken::new(key, format!(": {rule}")))
    }

    fn identify(&self, asked: &Asked<'_>) -> Result<Option<Claims>, Denied> {
        match self {
            Self::ApiKeys(keys) => keys.identify(asked).map(Some),
            Self::Jwt(jwt) => jwt.identify(asked).map(Some),
            Self::SignedUrl(url) => url.check(asked).map(|()| None),
        }
    }

    /// What `WWW-Authenticate` says of it (RFC 9110, 11.6.1).
    fn challenge(&self, wrong: bool) -> &'static str {
        match self {
            Self::Jwt(_) if wrong => "Bearer error=\"invalid_token\"",
            Self::Jwt(_) => "Bearer",
            Self::ApiKeys(_) => "ApiKey",
            Self::SignedUrl(_) => "SignedUrl",
        }
    }
}

/// The ways that lead into one route; none: it is open to all.
#[derive(Default)]
pub struct Auth(Box<[Arc<Way>]>);

impl Auth {
    /// Who asks, as far as credentials say.
    ///
    /// # Errors
    /// `unauthorized`, `forbidden`, or `unavailable` if there are no keys to check with yet.
    pub fn identify(&self, asked: &Asked<'_>) -> Result<Option<Claims>, Refusal> {
        for way in &self.0 {
            match way.identify(asked) {
                Ok(claims) => return Ok(claims),
                Err(Denied::Absent) => {}
                Err(denied) => return Err(refusal(way, denied)),
            }
        }
        match self.0.first() {
            None => Ok(None),
            Some(way) => Err(refusal(way, Denied::Absent)),
        }
    }
}

fn refusal(way: &Way, denied: Denied) -> Refusal {
    let challenge = |problem: Problem, wrong: bool| {
        let challenge = HeaderValue::from_static(way.challenge(wrong));
        Refusal::from(problem).with(WWW_AUTHENTICATE, challenge)
    };
    match denied {
        Denied::Absent => challenge(
            Problem::new(
                ErrorCode::Unauthorized,
                "this needs credentials, and there are none",
            ),
            false,
        ),
        Denied::Wrong(detail) => challenge(Problem::new(ErrorCode::Unauthorized, detail), true),
        Denied::Forbidden(detail) => Problem::new(ErrorCode::Forbidden, detail).into(),
        Denied::Unavailable(detail) => Problem::unavailable(detail).into(),
    }
}

/// Where credentials are: `header.NAME`, `query.NAME` or `cookie.NAME`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    Header(http::HeaderName),
    Query(String),
    Cookie(String),
}

impl Place {
    fn parse(text: &str) -> Result<Self, String> {
        let rule = || format!("in = {text:?} must be header.NAME, query.NAME or cookie.NAME");
        match text.split_once('.') {
            Some((_, "")) | None => Err(rule()),
            Some(("header", name)) => name.parse().map(Self::Header).map_err(|_| rule()),
            Some(("query", name)) => Ok(Self::Query(name.to_owned())),
            Some(("cookie", name)) => Ok(Self::Cookie(name.to_owned())),
            Some(_) => Err(rule()),
        }
    }

    fn find<'a>(&self, asked: &Asked<'a>) -> Option<std::borrow::Cow<'a, str>> {
        let found = match self {
            Self::Header(name) => asked.header_value(name)?.into(),
            Self::Query(name) => asked.query_value(name)?,
            Self::Cookie(name) => asked.cookie_value(name)?.into(),
        };
        (!found.is_empty()).then_some(found)
    }
}

/// 32 bytes as hex digits.
fn hex(text: &str) -> Option<[u8; 32]> {
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let pairs: &[[u8; 2]; 32] = pairs.try_into().ok().filter(|_| rest.is_empty())?;
    let digit = |digit: u8| {
        char::from(digit)
            .to_digit(16)
            .and_then(|n| u8::try_from(n).ok())
    };
    let mut bytes = [0; 32];
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Some(bytes)
}

/// Seconds since 1970.
fn unix_seconds() -> u64 {
    jsonwebtoken::get_current_timestamp()
}
