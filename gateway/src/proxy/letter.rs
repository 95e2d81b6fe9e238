//! A request for an app, as bytes.

use std::fmt::Write;

use bytes::{BufMut, BytesMut};
use http::HeaderName;
use http::header::{CONTENT_LENGTH, COOKIE, HOST};
use pingora_http::RequestHeader;
use pingora_proxy::Session;
use protocol::headers;

use super::heads::{FORWARDED_FOR, FORWARDED_HOST, FORWARDED_PROTO, client_text, is_secure};
use super::{AppAim, Request};
use crate::deadline;

/// Why writing to one never fails.
const GROWS: &str = "a buffer grows";

/// A request that can be written without a doubt about what the server will read.
pub(super) struct Letter<'a> {
    head: &'a RequestHeader,
    path: &'a [u8],
    /// Of the client.
    host: &'a [u8],
    session: &'a Session,
    app: &'a AppAim,
}

impl<'a> Letter<'a> {
    /// `None` if it is one for pingora to decide about.
    pub(super) fn new(session: &'a Session, app: &'a AppAim) -> Option<Self> {
        let head = session.as_ref().req_header();
        let path = match &app.path_and_query {
            Some(path) => path.as_bytes(),
            None if head.raw_path().starts_with(b"/") => head.raw_path(),
            // In origin form, however the client wrote it (RFC 9112, 3.2).
            None => head.uri.path_and_query()?.as_str().as_bytes(),
        };
        let breaks = |byte: &u8| *byte <= b' ' || *byte == 0x7f;
        if path.iter().any(breaks) || !path.starts_with(b"/") {
            return None;
        }
        // Which host it is for is said once: what routed it is what the server sees.
        let host = match head.uri.authority() {
            Some(authority) if authority.as_str().contains('@') => return None,
            Some(authority) => authority.as_str().as_bytes(),
            None => head.headers.get(HOST)?.as_bytes(),
        };
        Some(Self {
            head,
            path,
            host,
            session,
            app,
        })
    }

    /// The whole request. Headers that concern the client's connection stay behind, as do those that only this
    /// system may say; who asked, and by which way, is added.
    pub(super) fn write(&self, request: &Request, body: &[u8]) -> BytesMut {
        let mut to = BytesMut::with_capacity(1024 + body.len());
        to.put_slice(self.head.method.as_str().as_bytes());
        to.put_u8(b' ');
        to.put_slice(self.path);
        to.put_slice(b" HTTP/1.1\r\n");
        let host = self.app.upstream.host();
        header(
            &mut to,
            &HOST,
            host.map_or(self.host, |host| host.as_bytes()),
        );
        let client = client_text(self.session);
        for (name, value) in &self.head.headers {
            let replaced = *name == HOST
                || *name == CONTENT_LENGTH
                || *name == COOKIE
                || *name == headers::TRACEPARENT
                || *name == FORWARDED_HOST
                || *name == FORWARDED_PROTO
                || (*name == FORWARDED_FOR && client.is_some())
                || (*name == deadline::TIMEOUT && request.deadline.is_some());
            if !replaced && !stays_behind(name) {
                header(&mut to, name, value.as_bytes());
            }
        }
        // HTTP/2 clients may have cut it into crumbs (RFC 9113, 8.2.3).
        let cookies = self.head.headers.get_all(COOKIE).iter();
        joined(
            &mut to,
            &COOKIE,
            cookies.map(|value| value.as_bytes()),
            b"; ",
        );
        if let Some(client) = client {
            // One chain, however many lines it came in.
            let known = self.head.headers.get_all(FORWARDED_FOR).iter();
            let known = known.filter_map(|line| Some(line.to_str().ok()?.as_bytes()));
            let chain = known.chain([client.as_bytes()]);
            joined(&mut to, &FORWARDED_FOR, chain, b", ");
        }
        header(&mut to, &FORWARDED_HOST, self.host);
        let proto: &[u8] = match is_secure(self.session) {
            true => b"https",
            false => b"http",
        };
        header(&mut to, &FORWARDED_PROTO, proto);
        let trace = request.trace.to_bytes();
        header(&mut to, &headers::TRACEPARENT, &trace);
        if let Some(deadline) = request.deadline {
            let left = deadline::write(deadline::left(deadline));
            header(&mut to, &deadline::TIMEOUT, left.as_bytes());
        }
        if !body.is_empty() || self.head.headers.contains_key(CONTENT_LENGTH) {
            write!(to, "{CONTENT_LENGTH}: {}\r\n", body.len()).expect(GROWS);
        }
        to.put_slice(b"\r\n");
        to.put_slice(body);
        to
    }
}

/// Of one connection only (RFC 9110, 7.6.1), or a word that only this system may say.
fn stays_behind(name: &HeaderName) -> bool {
    let name = name.as_str();
    let hop = matches!(
        name,
        "connection"
            | "keep-alive"
            | "proxy-connection"
            | "proxy-authenticate"
            | "proxy-authorization"
            | "http2-settings"
            | "te"
            | "trailer"
            | "transfer-encoding"
            | "upgrade"
    );
    hop || name.starts_with(headers::PREFIX)
}

fn header(to: &mut BytesMut, name: &HeaderName, value: &[u8]) {
    to.put_slice(name.as_str().as_bytes());
    to.put_slice(b": ");
    to.put_slice(value);
    to.put_slice(b"\r\n");
}

/// One header of all values, if there are any.
fn joined<'v>(
    to: &mut BytesMut,
    name: &HeaderName,
    mut values: impl Iterator<Item = &'v [u8]>,
    between: &[u8],
) {
    let Some(first) = values.next() else {
        return;
    };
    to.put_slice(name.as_str().as_bytes());
    to.put_slice(b": ");
    to.put_slice(first);
    for value in values {
        to.put_slice(between);
        to.put_slice(value);
    }
    to.put_slice(b"\r\n");
}
