//! Heads of requests and answers on their way through: what is read of them, what is added and removed.

use std::borrow::Cow;
use std::net::IpAddr;

use http::header::{CONNECTION, COOKIE, HOST, TE, UPGRADE};
use http::{HeaderName, HeaderValue, Uri, Version};
use pingora_core::{ErrorType, OrErr, Result};
use pingora_http::{RequestHeader, ResponseHeader};
use pingora_proxy::Session;
use protocol::{Problem, headers};

use crate::downstream::head::Carrier;

pub(super) const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
pub(super) const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
pub(super) const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// RFC 9112, 3.2: without it, or with two, gateway and server could mean different hosts.
pub(super) fn require_one_host(head: &RequestHeader) -> Result<(), Problem> {
    let mut hosts = head.headers.get_all(HOST).iter();
    let named = hosts.next().is_some() || head.uri.authority().is_some();
    if !named && head.version == Version::HTTP_11 {
        return Err(Problem::bad_request("the request has no Host"));
    }
    match hosts.next() {
        None => Ok(()),
        Some(_) => Err(Problem::bad_request("the request has more than one Host")),
    }
}

/// Of the URI, as in HTTP/2, or else of the `Host` header (RFC 9112, 3.2.2).
pub(super) fn host(head: &RequestHeader) -> Option<&str> {
    match head.uri.authority() {
        Some(authority) => Some(authority.as_str()),
        None => head.headers.get(HOST)?.to_str().ok(),
    }
}

pub(super) fn is_secure(session: &Session) -> bool {
    let digest = session.digest();
    digest.is_some_and(|digest| digest.ssl_digest.is_some())
}

/// The address of the other end of the connection, as apps are told.
pub(super) fn client_text(session: &Session) -> Option<Cow<'_, str>> {
    match Carrier::of(session) {
        Some(carrier) => Some(carrier.client().into()),
        None => Some(peer_ip(session)?.to_string().into()),
    }
}

/// The other end of the connection.
pub(super) fn peer_ip(session: &Session) -> Option<IpAddr> {
    let address = session.client_addr()?.as_inet()?;
    Some(address.ip())
}

pub(super) fn uri(path_and_query: &str) -> Result<Uri> {
    path_and_query
        .parse()
        .or_err_with(ErrorType::InvalidHTTPHeader, || {
            format!("path {path_and_query:?}")
        })
}

/// Removes what only the system may say.
pub(super) fn strip(head: &mut RequestHeader) {
    while let Some(name) = head.headers.keys().find(|name| is_ours(name)).cloned() {
        head.remove_header(&name);
    }
}

/// The same of answers, and `TE`, which is about requests: with it, an answer could not go over HTTP/2.
pub(super) fn strip_response(response: &mut ResponseHeader) {
    let goes = |name: &&HeaderName| is_ours(name) || **name == TE;
    while let Some(name) = response.headers.keys().find(goes).cloned() {
        response.remove_header(&name);
    }
}

fn is_ours(name: &HeaderName) -> bool {
    name.as_str().starts_with(headers::PREFIX)
}

/// Lets an upgrade to any protocol pass. pingora has removed the headers that concern one connection
/// only; of these, an upgrade needs two again. To `h2c` it never passes: a tunnel of HTTP/2 requests
/// would go around everything that this gateway checks (RFC 9113 dropped that upgrade).
pub(super) fn pass_upgrade(session: &Session, head: &mut RequestHeader) -> Result<()> {
    let asked = session.req_header();
    match asked.headers.get(UPGRADE) {
        Some(protocol) if session.is_upgrade_req() && !mentions_h2c(protocol) => {
            head.insert_header(CONNECTION, "upgrade")?;
            head.insert_header(UPGRADE, protocol.clone())
        }
        _ => Ok(()),
    }
}

fn mentions_h2c(protocol: &HeaderValue) -> bool {
    protocol
        .as_bytes()
        .windows(3)
        .any(|window| window.eq_ignore_ascii_case(b"h2c"))
}

/// HTTP/2 clients may cut `Cookie` into crumbs; in HTTP/1.1 there is one (RFC 9113, 8.2.3).
pub(super) fn join_cookies(head: &mut RequestHeader) -> Result<()> {
    let crumbs: Vec<&[u8]> = head
        .headers
        .get_all(COOKIE)
        .iter()
        .map(HeaderValue::as_bytes)
        .collect();
    if crumbs.len() < 2 {
        return Ok(());
    }
    let whole = HeaderValue::from_bytes(&crumbs.join(&b"; "[..]));
    let whole = whole.or_err(ErrorType::InvalidHTTPHeader, "cookies")?;
    head.insert_header(COOKIE, whole)
}

/// Tells an app who asked, by the names that proxies have always used.
pub(super) fn forwarded(session: &Session, head: &mut RequestHeader) -> Result<()> {
    if let Some(client) = client_text(session) {
        // One chain, however many lines it came in.
        let known = head.headers.get_all(FORWARDED_FOR).iter();
        let known = known.filter_map(|line| line.to_str().ok());
        let chain: Vec<&str> = known.chain([&*client]).collect();
        let chain = chain.join(", ");
        head.insert_header(FORWARDED_FOR, chain)?;
    }
    if let Some(host) = head.headers.get(HOST).cloned() {
        head.insert_header(FORWARDED_HOST, host)?;
    }
    let proto = if is_secure(session) { "https" } else { "http" };
    head.insert_header(FORWARDED_PROTO, proto)
}
