//! What is asked: the view of a request that routing, keys, limits and validation share.

use std::borrow::Cow;
use std::net::IpAddr;

use http::{HeaderMap, HeaderName, Method};
use percent_encoding::percent_decode_str;
use protocol::Colo;
use serde_json::Value;

/// Most parameters of one path pattern.
pub const PARAMS_MAX: usize = 8;

/// One request before it is answered. Borrows everything; cheap to copy.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    pub method: &'a Method,
    /// Of the `Host` header or the URI, with the port if it came with one.
    pub host: Option<&'a str>,
    /// Whether the connection is TLS.
    pub secure: bool,
    /// As it came: not decoded.
    pub path: &'a str,
    /// As it came, without the `?`.
    pub query: Option<&'a str>,
    pub headers: &'a HeaderMap,
    /// The site that the request came in at.
    pub colo: Colo,
    /// Who asks: the peer, or whom a trusted proxy names. Absent only if the peer has no IP address.
    pub client: Option<IpAddr>,
    /// Where the parameters of the matching route are in `path`.
    pub params: Params,
    /// The shard that the route computed, if it has a `shard` table.
    pub shard: Option<u32>,
    /// What a verified token says; `None` before there is one.
    pub claims: Option<&'a Value>,
}

impl<'a> Asked<'a> {
    pub fn scheme(&self) -> &'static str {
        if self.secure { "https" } else { "http" }
    }

    /// The host without its port.
    pub fn host_name(&self) -> Option<&'a str> {
        self.host.map(without_port)
    }

    /// The first value of a query parameter, decoded like a form (`+` is a space). `None` too if it
    /// is not UTF-8. Allocates only when something is encoded.
    pub fn query_value(&self, name: &str) -> Option<Cow<'a, str>> {
        let mut rest = Some(self.query?);
        while let Some(pairs) = rest {
            let (pair, after) = cut(pairs, b'&');
            let (found, value) = cut(pair, b'=');
            if found == name || decode_form(found).is_some_and(|key| key == name) {
                return decode_form(value.unwrap_or_default());
            }
            rest = after;
        }
        None
    }

    /// The first line of a header, if it is UTF-8.
    pub fn header_value(&self, name: &HeaderName) -> Option<&'a str> {
        std::str::from_utf8(self.headers.get(name)?.as_bytes()).ok()
    }

    /// The first cookie of this name, as it came.
    pub fn cookie_value(&self, name: &str) -> Option<&'a str> {
        let lines = self.headers.get_all(http::header::COOKIE).iter();
        let lines = lines.filter_map(|line| std::str::from_utf8(line.as_bytes()).ok());
        lines
            .flat_map(|line| line.split(';'))
            .filter_map(|pair| pair.trim_ascii().split_once('='))
            .find_map(|(found, value)| (found == name).then_some(value))
    }

    /// A claim of the verified token: the one of exactly this name, or else the one that its dots lead
    /// to through nested objects.
    pub fn claim(&self, name: &str) -> Option<&'a Value> {
        let claims = self.claims?;
        claims.get(name).or_else(|| {
            name.split('.')
                .try_fold(claims, |inside, part| inside.get(part))
        })
    }
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
}

/// Percent-decodes; `None` if the result is not UTF-8.
pub fn decode(text: &str) -> Option<Cow<'_, str>> {
    percent_decode_str(text).decode_utf8().ok()
}

/// What stands before and after the first `byte` of ASCII. For short texts: `str::split_once` prepares more than
/// it saves.
fn cut(text: &str, byte: u8) -> (&str, Option<&str>) {
    match text.bytes().position(|found| found == byte) {
        Some(at) => (&text[..at], Some(&text[at + 1..])),
        None => (text, None),
    }
}

fn is_encoded(text: &str) -> bool {
    text.bytes().any(|byte| byte == b'%' || byte == b'+')
}

/// The decoding of `application/x-www-form-urlencoded` (WHATWG URL, 5.1), but strict in UTF-8.
fn decode_form(text: &str) -> Option<Cow<'_, str>> {
    if !is_encoded(text) {
        return Some(Cow::Borrowed(text));
    }
    if text.contains('+') {
        let spaced = text.replace('+', " ");
        return decode(&spaced).map(|decoded| Cow::Owned(decoded.into_owned()));
    }
    decode(text)
}

/// The parameters of a path pattern in one path, by their number in the pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Params {
    ranges: [(u32, u32); PARAMS_MAX],
    count: usize,
}

impl Params {
    /// Notes that the next parameter is `path[start..end]`. At most [`PARAMS_MAX`]; more are forgotten,
    /// and patterns with more are refused.
    pub fn push(&mut self, start: usize, end: usize) {
        let range = u32::try_from(start).ok().zip(u32::try_from(end).ok());
        if let (Some(range), Some(slot)) = (range, self.ranges.get_mut(self.count)) {
            *slot = range;
            self.count += 1;
        }
    }

    /// Parameter `number`, as it came: not decoded.
    pub fn get<'p>(&self, number: usize, path: &'p str) -> Option<&'p str> {
        let (start, end) = self.ranges[..self.count].get(number)?;
        path.get(*start as usize..*end as usize)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A `GET` of this target without headers.
    pub(crate) fn asked<'a>(target: &'a str, headers: &'a HeaderMap) -> Asked<'a> {
        let (path, query) = match target.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (target, None),
        };
        Asked {
            method: &Method::GET,
            host: Some("example.org:8080"),
            secure: false,
            path,
            query,
            headers,
            colo: Colo::UNKNOWN,
            client: Some([192, 0, 2, 1].into()),
            params: Params::default(),
            shard: None,
            claims: None,
        }
    }

    #[test]
    fn query_values_are_decoded_like_forms() {
        let headers = HeaderMap::new();
        let value = |query: &str, name: &str| {
            let target = format!("/?{query}");
            let asked = asked(&target, &headers);
            asked.query_value(name).map(Cow::into_owned)
        };
        assert_eq!(value("a=1&b=2", "b").as_deref(), Some("2"));
        assert_eq!(value("a=1&a=2", "a").as_deref(), Some("1"), "the first");
        assert_eq!(value("a=x+y%2Bz", "a").as_deref(), Some("x y+z"));
        assert_eq!(value("%61=1", "a").as_deref(), Some("1"));
        assert_eq!(value("a+b=1", "a b").as_deref(), Some("1"));
        assert_eq!(value("a", "a").as_deref(), Some(""));
        assert_eq!(value("ab=1", "a"), None);
        assert_eq!(value("a=%FF", "a"), None, "not UTF-8");
        assert_eq!(value("a==b=", "a").as_deref(), Some("=b="));
    }

    #[test]
    fn cookies_come_in_one_line_or_many() {
        let mut headers = HeaderMap::new();
        headers.append("cookie", "a=1; b=2;c = 3".parse().unwrap());
        headers.append("cookie", "d=4; a=9".parse().unwrap());
        let asked = asked("/", &headers);
        assert_eq!(asked.cookie_value("a"), Some("1"));
        assert_eq!(asked.cookie_value("b"), Some("2"));
        assert_eq!(asked.cookie_value("d"), Some("4"));
        assert_eq!(asked.cookie_value("e"), None);
    }

    #[test]
    fn claims_are_found_by_name_and_by_path() {
        let claims = serde_json::json!({
            "sub": "ada", "org": { "id": 7 }, "https://example.org/tier": "gold",
        });
        let headers = HeaderMap::new();
        let asked = Asked {
            claims: Some(&claims),
            ..asked("/", &headers)
        };
        assert_eq!(asked.claim("sub").unwrap(), "ada");
        assert_eq!(asked.claim("org.id").unwrap(), 7);
        assert_eq!(asked.claim("https://example.org/tier").unwrap(), "gold");
        assert_eq!(asked.claim("org.name"), None);
    }

    #[test]
    fn a_host_may_have_a_port_and_brackets() {
        let headers = HeaderMap::new();
        let name = |host: &str| {
            let asked = Asked {
                host: Some(host),
                ..asked("/", &headers)
            };
            asked.host_name().unwrap().to_owned()
        };
        assert_eq!(name("a.example:80"), "a.example");
        assert_eq!(name("a.example"), "a.example");
        assert_eq!(name("[::1]:80"), "[::1]");
        assert_eq!(name("[::1]"), "[::1]");
    }
}
