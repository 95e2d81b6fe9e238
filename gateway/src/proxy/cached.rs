//! What the cache does with one request, phase by phase.

use std::time::SystemTime;

use http::{HeaderName, Method};
use pingora_cache::{CacheKey, CachePhase, NoCacheReason, RespCacheable};
use pingora_core::{Error, ErrorType, Result};
use pingora_http::ResponseHeader;
use pingora_proxy::Session;

use super::Dynamic;
use crate::asked::Asked;
use crate::cache::plan::Keyed;
use crate::cache::{Cache, Fill, Moment, PURGE, TAGS, TAGS_MAX, Tag, policy, tags};
use crate::metrics::{Metrics, RouteLabel};
use crate::route::{Found, Target};

/// What became of it (RFC 9211).
const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");

/// What the cache has to do with a request.
#[derive(Default)]
pub(super) struct Cached {
    /// Its route has a cache.
    planned: bool,
    /// Its answer may be kept.
    keyed: Option<Box<Keyed>>,
    /// What it changes if it succeeds, for a method that may change something.
    written: Option<Tag>,
    asked: Moment,
    /// That the answer names.
    tags: Vec<Tag>,
}

impl Cached {
    pub(super) fn of(dynamic: &Dynamic, found: Found, asked: &Asked<'_>, target: &Target) -> Self {
        if dynamic.plans.is_empty() {
            return Self::default();
        }
        let plan = dynamic.plans.of(found);
        let identified = asked.claims.is_some();
        let keyed = plan.and_then(|plan| plan.keyed(asked, target, identified));
        Self {
            planned: plan.is_some(),
            keyed: keyed.map(Box::new),
            written: written(dynamic, asked),
            ..Self::default()
        }
    }

    pub(super) fn is_keyed(&self) -> bool {
        self.keyed.is_some()
    }

    pub(super) fn key(&self) -> Result<CacheKey> {
        let Some(keyed) = &self.keyed else {
            return Error::e_explain(ErrorType::InternalError, "a request without a key");
        };
        let mut key = CacheKey::new("", "");
        key.set_primary_bin_override(keyed.key);
        Ok(key)
    }

    /// It goes on to where answers come from.
    pub(super) fn asked_at(&mut self, moment: Moment) {
        self.asked = moment;
    }

    /// What an answer says to the cache; taken out of it. When this returns, what it purges is gone.
    pub(super) fn learn(&mut self, cache: &Cache, response: &mut ResponseHeader) {
        let mut purged = tags(&response.headers, &PURGE);
        if !purged.is_empty() {
            response.remove_header(&PURGE);
        }
        let status = response.status;
        if status.is_success() || status.is_redirection() {
            purged.extend(self.written.take());
        }
        if !purged.is_empty() {
            cache.purge(&purged);
        }
        if self.planned {
            self.tags = tags(&response.headers, &TAGS);
            response.remove_header(&TAGS);
        }
    }

    pub(super) fn keep(&self, response: &ResponseHeader) -> RespCacheable {
        let Some(keyed) = self.keyed.as_deref() else {
            return RespCacheable::Uncacheable(NoCacheReason::InternalError);
        };
        if self.tags.len() > TAGS_MAX {
            return RespCacheable::Uncacheable(NoCacheReason::OriginNotCache);
        }
        #[expect(
            clippy::disallowed_methods,
            reason = "pingora's cache compares with this clock"
        )]
        let now = SystemTime::now();
        match policy::keep(response, &keyed.terms, now) {
            Ok(mut meta) => {
                let mut tags = self.tags.clone();
                tags.extend(keyed.tags);
                tags.sort_unstable();
                tags.dedup();
                meta.extensions_mut().insert(Fill {
                    asked: self.asked,
                    tags: tags.into(),
                });
                RespCacheable::Cacheable(meta)
            }
            Err(reason) => RespCacheable::Uncacheable(reason),
        }
    }

    /// Tells the client.
    pub(super) fn say(&self, session: &Session, response: &mut ResponseHeader) -> Result<()> {
        if self.outcome(session).is_none() {
            return Ok(());
        }
        let status = match session.cache.phase() {
            CachePhase::Hit => "dormouse; hit",
            CachePhase::Stale | CachePhase::StaleUpdating => "dormouse; hit; detail=stale",
            CachePhase::Revalidated | CachePhase::RevalidatedNoCache(_) => {
                "dormouse; fwd=stale; fwd-status=304"
            }
            CachePhase::Expired => "dormouse; fwd=stale; stored",
            CachePhase::Miss => "dormouse; fwd=uri-miss; stored",
            CachePhase::Disabled(NoCacheReason::NeverEnabled) => "dormouse; fwd=bypass",
            _ => "dormouse; fwd=uri-miss",
        };
        response.append_header(CACHE_STATUS, status)?;
        Ok(())
    }

    /// `None` if the route has no cache, or nothing is read.
    pub(super) fn outcome(&self, session: &Session) -> Option<&'static str> {
        let reads = matches!(session.req_header().method, Method::GET | Method::HEAD);
        (self.planned && reads).then(|| outcome(session))
    }

    pub(super) fn count(&self, session: &Session, metrics: &Metrics, route: &RouteLabel) {
        let Some(outcome) = self.outcome(session) else {
            return;
        };
        if session.cache.lock_duration().is_some() {
            metrics.cache.collapsed.increment(1);
        }
        metrics.cached(route, outcome);
    }
}

/// Whether an answer comes out of the cache.
pub(super) fn is_given_again(session: &Session) -> bool {
    matches!(outcome(session), "hit" | "stale" | "revalidated")
}

fn outcome(session: &Session) -> &'static str {
    match session.cache.phase() {
        CachePhase::Hit => "hit",
        CachePhase::Stale | CachePhase::StaleUpdating => "stale",
        CachePhase::Revalidated | CachePhase::RevalidatedNoCache(_) => "revalidated",
        CachePhase::Disabled(NoCacheReason::NeverEnabled) | CachePhase::Bypass => "bypass",
        _ => "miss",
    }
}

/// What a request changes if it succeeds: what is kept under its URL (RFC 9111, 4.4).
fn written(dynamic: &Dynamic, asked: &Asked<'_>) -> Option<Tag> {
    if asked.method.is_safe() {
        return None;
    }
    let mut read = Asked {
        method: &Method::GET,
        ..*asked
    };
    let found = dynamic.routes.find(&read).ok()?;
    if let Found::Route { params, .. } = found {
        read.params = params;
    }
    dynamic.plans.of(found)?.written(&read)
}
