//! What may be kept, for how long, and for whom (RFC 9111). Pure.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::header::{AGE, CONTENT_TYPE, SET_COOKIE, VARY};
use http::{HeaderMap, HeaderValue, StatusCode};
use pingora_cache::cache_control::{CacheControl, Cacheable, InterpretCacheControl};
use pingora_cache::filters::calculate_expires_header_time;
use pingora_cache::key::HashBinary;
use pingora_cache::{CacheMeta, NoCacheReason, VarianceBuilder};
use pingora_http::ResponseHeader;

use super::config::RouteCacheConfig;

/// What an answer may be at all: RFC 9110, 15.1, and redirects that say how long they hold.
const KEPT: [u16; 12] = [200, 203, 204, 300, 301, 302, 307, 308, 404, 405, 410, 414];

/// Those that hold for a while without a word about it.
const KEPT_BY_DEFAULT: [u16; 7] = [200, 203, 204, 301, 308, 404, 410];

/// How an answer may be given again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Terms {
    pub config: Arc<RouteCacheConfig>,
    /// The one who asked showed who they are; only what says that it is for all is kept.
    pub authorized: bool,
}

/// The answer as it may be kept from now on.
///
/// # Errors
/// When it may not.
pub fn keep(
    head: &ResponseHeader,
    terms: &Terms,
    now: SystemTime,
) -> Result<CacheMeta, NoCacheReason> {
    const REFUSED: NoCacheReason = NoCacheReason::OriginNotCache;
    let control = CacheControl::from_resp_headers(head);
    let control = control.as_ref();
    let refused = control.is_some_and(|control| control.is_cacheable() == Cacheable::No)
        || !KEPT.contains(&head.status.as_u16())
        || head.headers.contains_key(SET_COOKIE)
        || varies_by_everything(&head.headers)
        || is_endless(&head.headers)
        || head.headers.contains_key(protocol::headers::ERROR);
    let for_all = control.is_some_and(InterpretCacheControl::allow_caching_authorized_req);
    if refused || (terms.authorized && !for_all) {
        return Err(REFUSED);
    }
    let age = age(&head.headers);
    let config = &terms.config;
    let said = control.and_then(InterpretCacheControl::fresh_duration);
    let said = said.map(|ttl| ttl.saturating_sub(age));
    let until = |ttl: Duration| match ttl {
        Duration::ZERO => now - Duration::from_secs(1),
        ttl => now.checked_add(ttl).unwrap_or(now),
    };
    let fresh_until = match (config.ttl, said) {
        (Some(ttl), _) => until(ttl),
        (None, Some(ttl)) => until(ttl),
        (None, None) => match calculate_expires_header_time(head) {
            Some(expires) => expires,
            None if config.default_ttl.is_zero() => return Err(REFUSED),
            None if !KEPT_BY_DEFAULT.contains(&head.status.as_u16()) => return Err(REFUSED),
            None => until(config.default_ttl),
        },
    };
    let seconds = |said: Option<Duration>, default: Duration| {
        let seconds = said.unwrap_or(default).as_secs();
        u32::try_from(seconds).unwrap_or(u32::MAX)
    };
    let revalidate = control.and_then(InterpretCacheControl::serve_stale_while_revalidate_duration);
    let error = control.and_then(InterpretCacheControl::serve_stale_if_error_duration);
    let revalidate = seconds(revalidate, config.stale_while_revalidate);
    let error = seconds(error, config.stale_if_error);
    if fresh_until <= now && revalidate == 0 && error == 0 && !has_validator(head) {
        // It could never be used again.
        return Err(REFUSED);
    }
    let mut kept = head.clone();
    if let Some(control) = control {
        control.strip_private_headers(&mut kept);
    }
    let mut meta = CacheMeta::new(fresh_until, now, revalidate, error, kept);
    if !age.is_zero() {
        meta.set_epoch_override(now.checked_sub(age).unwrap_or(now));
    }
    Ok(meta)
}

fn has_validator(head: &ResponseHeader) -> bool {
    use http::header::{ETAG, LAST_MODIFIED};
    head.status == StatusCode::OK
        && (head.headers.contains_key(ETAG) || head.headers.contains_key(LAST_MODIFIED))
}

/// How long it was kept elsewhere before it came.
fn age(headers: &HeaderMap) -> Duration {
    let age = headers.get(AGE).and_then(|age| age.to_str().ok());
    Duration::from_secs(age.and_then(|age| age.trim().parse().ok()).unwrap_or(0))
}

/// A stream of events never ends: nobody may wait for it to be kept.
fn is_endless(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    kind.is_some_and(|kind| {
        let name = b"text/event-stream";
        kind.len() >= name.len() && kind[..name.len()].eq_ignore_ascii_case(name)
    })
}

/// Names of headers that an answer depends on.
fn vary(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    let lines = headers.get_all(VARY).into_iter();
    let names = lines.flat_map(|line| line.as_bytes().split(|byte| *byte == b','));
    names
        .map(<[u8]>::trim_ascii)
        .filter(|name| !name.is_empty())
}

fn varies_by_everything(headers: &HeaderMap) -> bool {
    vary(headers).any(|name| name == b"*")
}

/// Which of the variants of an answer a request asks for; `None` if there is only one.
pub fn variance(answer: &HeaderMap, asked: &HeaderMap) -> Option<HashBinary> {
    let mut variance = VarianceBuilder::new();
    for name in vary(answer) {
        let Ok(name) = http::HeaderName::from_bytes(name) else {
            continue;
        };
        let mut value = Vec::new();
        for line in asked.get_all(&name) {
            // The length keeps two lines apart from one that has both.
            value.extend_from_slice(line.len().to_string().as_bytes());
            value.push(b':');
            value.extend_from_slice(line.as_bytes());
        }
        variance.add_owned_name_value(name.as_str().to_owned(), value);
    }
    variance.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;

    fn head(status: u16, lines: &[(&'static str, &str)]) -> ResponseHeader {
        let mut head = ResponseHeader::build(status, None).unwrap();
        for (name, value) in lines {
            head.append_header(*name, *value).unwrap();
        }
        head
    }

    fn now() -> SystemTime {
        NOW + Duration::from_secs(1_000_000)
    }

    /// Seconds for which it is fresh; `None` if it is not kept.
    fn fresh(toml: &str, authorized: bool, head: &ResponseHeader) -> Option<i64> {
        let config = Arc::new(toml::from_str(toml).unwrap());
        let meta = keep(head, &Terms { config, authorized }, now()).ok()?;
        Some(match meta.fresh_until().duration_since(now()) {
            Ok(ahead) => i64::try_from(ahead.as_secs()).unwrap(),
            Err(_) => -1,
        })
    }

    #[test]
    fn what_answers_say_decides_before_defaults_do() {
        let check = |toml: &str, lines: &[(&'static str, &str)], want| {
            assert_eq!(
                fresh(toml, false, &head(200, lines)),
                want,
                "{toml} {lines:?}"
            );
        };
        let silent = &[];
        check("", silent, None);
        check("default_ttl = '9s'", silent, Some(9));
        let said = &[("cache-control", "max-age=5")];
        check("", said, Some(5));
        check("default_ttl = '9s'", said, Some(5));
        check("ttl = '9s'", said, Some(9));
        check("", &[("cache-control", "s-maxage=3, max-age=5")], Some(3));
        check("", &[("cache-control", "max-age=5"), ("age", "2")], Some(3));
        check(
            "",
            &[("expires", "Tue, 13 Jan 1970 00:00:00 GMT")],
            Some(36_800),
        );
        let expired = [("expires", "0"), ("etag", "\"1\"")];
        check("default_ttl = '9s'", &expired, Some(-1));
        check("ttl = '9s'", &[("cache-control", "no-cache")], Some(9));
        let must_ask = [("cache-control", "no-cache"), ("etag", "\"1\"")];
        check("default_ttl = '9s'", &must_ask, Some(-1));
        check("default_ttl = '9s'", &must_ask[..1], None);
    }

    #[test]
    fn what_is_for_one_or_for_nobody_is_never_kept() {
        let check = |lines: &[(&'static str, &str)]| {
            assert_eq!(
                fresh("ttl = '9s'", false, &head(200, lines)),
                None,
                "{lines:?}"
            );
        };
        check(&[("cache-control", "no-store")]);
        check(&[("cache-control", "private, max-age=9")]);
        check(&[
            ("cache-control", "public, max-age=9"),
            ("set-cookie", "a=b"),
        ]);
        check(&[("vary", "accept, *")]);
        check(&[("content-type", "Text/Event-Stream; charset=utf-8")]);
        check(&[("dormouse-error", "unavailable")]);
        for status in [206, 304, 500, 503] {
            assert_eq!(fresh("ttl = '9s'", false, &head(status, &[])), None);
        }
        assert_eq!(fresh("default_ttl = '9s'", false, &head(302, &[])), None);
        let held = head(302, &[("cache-control", "max-age=4")]);
        assert_eq!(fresh("", false, &held), Some(4));
    }

    #[test]
    fn answers_to_somebody_are_kept_only_if_they_are_for_all() {
        let check = |control: &str, want| {
            let head = head(200, &[("cache-control", control)]);
            assert_eq!(fresh("ttl = '9s'", true, &head), want, "{control}");
        };
        check("max-age=9", None);
        check("public, max-age=9", Some(9));
        check("s-maxage=9", Some(9));
        check("must-revalidate, max-age=9", Some(9));
    }

    #[test]
    fn variants_differ_by_the_named_headers_alone() {
        let asked = |lines: &[(&'static str, &str)]| head(200, lines).headers.clone();
        let answer = asked(&[("vary", "Accept-Language, x-a")]);
        let of = |lines: &[(&'static str, &str)]| variance(&answer, &asked(lines));
        assert_eq!(
            of(&[("accept-language", "de"), ("x-b", "1")]),
            of(&[("accept-language", "de")])
        );
        assert_ne!(
            of(&[("accept-language", "de")]),
            of(&[("accept-language", "en")])
        );
        assert_ne!(of(&[("x-a", "1"), ("x-a", "2")]), of(&[("x-a", "12")]));
        assert_ne!(of(&[("x-a", "de")]), of(&[("accept-language", "de")]));
        assert_eq!(variance(&asked(&[]), &asked(&[("x-a", "1")])), None);
    }
}
