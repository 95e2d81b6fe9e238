//! `cache` of a route, ready to say what a request's answer is kept under.

use std::sync::Arc;

use http::header::{AUTHORIZATION, COOKIE, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, Method};
use ops::config::Broken;

use super::config::RouteCacheConfig;
use super::policy::Terms;
use super::{Key, Tag, framed_hash};
use crate::asked::Asked;
use crate::config::Config;
use crate::route::{Ask, Found, Route, Routes, Target};
use crate::template::{Source, Template};

/// The plans of all routes.
#[derive(Debug, Default)]
pub struct Plans {
    /// By the index of the route.
    routes: Vec<Option<Arc<Plan>>>,
    /// Of `/objects`.
    objects: Option<Arc<Plan>>,
}

impl Plans {
    /// # Errors
    /// The key that breaks a rule.
    pub fn new(config: &Config, routes: &Routes) -> Result<Self, Broken> {
        let plan = |route: &Route| {
            let mut known = config.routes.iter().enumerate();
            let written = known.find(|(_, written)| *written.name == *route.label);
            let Some((place, written)) = written else {
                return Ok(None);
            };
            let Some(cache) = &written.cache else {
                return Ok(None);
            };
            let under = |broken: Broken| broken.under(place).under("routes");
            if written.upstream.is_none() && written.object.is_none() {
                let rule = "is for routes to an upstream or to an object";
                return Err(under(Broken::new("cache", rule)));
            }
            let plan = Plan::new(Arc::clone(&route.label), cache, route.params());
            let plan = plan.map_err(|broken| under(broken.under("cache")))?;
            Ok(Some(Arc::new(plan)))
        };
        let objects = config.objects.cache.as_ref();
        let objects = objects.map(|cache| Plan::new("objects".into(), cache, &[]));
        let objects = objects.transpose();
        let objects = objects.map_err(|broken| broken.under("cache").under("objects"))?;
        Ok(Self {
            routes: routes.iter().map(plan).collect::<Result<_, _>>()?,
            objects: objects.map(Arc::new),
        })
    }

    pub fn of(&self, found: Found) -> Option<&Arc<Plan>> {
        match found {
            Found::Objects => self.objects.as_ref(),
            Found::Rpc | Found::Counters => None,
            Found::Route { index, .. } => self.routes.get(index)?.as_ref(),
        }
    }

    /// Whether nothing is kept at all.
    pub fn is_empty(&self) -> bool {
        self.objects.is_none() && self.routes.iter().all(Option::is_none)
    }

    /// The routes whose answers are kept.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Plan>> {
        self.routes.iter().flatten().chain(&self.objects)
    }
}

/// The `cache` table of a route, or of the contract for objects.
#[derive(Debug)]
pub struct Plan {
    label: Arc<str>,
    key: Option<Template>,
    /// Cookies do not matter, or are part of the key.
    cookies_pass: bool,
    config: Arc<RouteCacheConfig>,
}

/// A request whose answer may be kept, and may have been.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keyed {
    pub key: Key,
    /// Of its answer, besides those that it names itself.
    pub tags: [Tag; 2],
    pub terms: Terms,
}

impl Plan {
    /// # Errors
    /// The key, below `cache`, that breaks a rule.
    pub fn new(
        label: Arc<str>,
        config: &RouteCacheConfig,
        params: &[Box<str>],
    ) -> Result<Self, Broken> {
        let key = match config.key.is_empty() {
            true => None,
            false => {
                let key = Template::key(&config.key, params);
                Some(key.map_err(|error| Broken::new("key", format!("is no {error}")))?)
            }
        };
        for (name, time) in [
            ("stale_while_revalidate", config.stale_while_revalidate),
            ("stale_if_error", config.stale_if_error),
        ] {
            if time.subsec_nanos() != 0 {
                return Err(Broken::value(name, time, "must be whole seconds"));
            }
        }
        let keyed_by_cookie = key.as_ref().is_some_and(|key| {
            let mut sources = key.sources();
            sources.any(|source| matches!(source, Source::Cookie(_)))
        });
        Ok(Self {
            label,
            cookies_pass: config.ignore_cookies || keyed_by_cookie,
            key,
            config: Arc::new(config.clone()),
        })
    }

    pub fn label(&self) -> &str {
        &self.label
    }

    /// What the answer to a request is kept under; `None` if the cache has nothing to do with it.
    /// `identified`: a rule of the route has found out who asks.
    pub fn keyed(&self, asked: &Asked<'_>, target: &Target, identified: bool) -> Option<Keyed> {
        let get = matches!(*asked.method, Method::GET | Method::HEAD);
        if !get || !is_plain(asked.headers) {
            return None;
        }
        if !self.cookies_pass && asked.headers.contains_key(COOKIE) {
            return None;
        }
        let text = self.text(asked)?;
        // What is answered depends on where it goes, whatever the key says: two objects never share.
        let object;
        let (kind, place) = match target {
            Target::Object(target) => {
                object = target.id.to_string();
                match &target.ask {
                    Ask::Fetch { path_and_query } => (object.as_str(), path_and_query.as_str()),
                    Ask::Call { .. } | Ask::Create | Ask::Own { .. } => return None,
                }
            }
            Target::App { path_and_query, .. } => ("", path_and_query.as_deref().unwrap_or("")),
            Target::Counter(_) | Target::Redirect { .. } | Target::Respond(_) => return None,
        };
        // A key of one's own says what of the path counts; else all of it does.
        let place = match self.key {
            Some(_) => "",
            None => place,
        };
        Some(Keyed {
            key: framed_hash('e', &[&self.label, &text, kind, place]),
            tags: [Tag::route(&self.label), Tag::key(&self.label, &text)],
            terms: Terms {
                config: Arc::clone(&self.config),
                authorized: identified || asked.headers.contains_key(AUTHORIZATION),
            },
        })
    }

    /// The tag of what a write may have changed: all that is kept under the key that the same URL has.
    pub fn written(&self, asked: &Asked<'_>) -> Option<Tag> {
        let text = self.text(asked)?;
        Some(Tag::key(&self.label, &text))
    }

    /// The key as text.
    fn text(&self, asked: &Asked<'_>) -> Option<String> {
        let mut text = String::new();
        match &self.key {
            Some(key) => key.render(asked, &mut text).ok()?,
            None => {
                text.push_str(asked.scheme());
                text.push_str("://");
                text.push_str(&asked.host?.to_ascii_lowercase());
                text.push_str(asked.path);
                if let Some(query) = asked.query {
                    text.push('?');
                    text.push_str(query);
                }
            }
        }
        Some(text)
    }
}

/// Nothing but a head, that asks for nothing special.
fn is_plain(headers: &HeaderMap) -> bool {
    let body = headers
        .get(http::header::CONTENT_LENGTH)
        .is_some_and(|length| length.as_bytes() != b"0");
    !body && !headers.contains_key(TRANSFER_ENCODING) && !headers.contains_key(UPGRADE)
}
