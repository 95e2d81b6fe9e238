//! Templates: texts with places for parts of a request, as in `{colo}:{query.userId|unknown}`.
//!
//! | place | gives |
//! |---|---|
//! | `{colo}` | the site that the request came in at, `unknown` if that is not known |
//! | `{client.ip}` | the address of the client |
//! | `{scheme}`, `{host}`, `{method}` | `http` or `https`, the host without its port in lower case, the method |
//! | `{path}`, `{query}` | the whole path and query as they came |
//! | `{path.x}` | the parameter `x` of the route's path pattern, percent-decoded |
//! | `{query.x}` | the first query parameter `x`, decoded like a form |
//! | `{header.x}`, `{cookie.x}` | the first header or cookie of that name |
//! | `{jwt.x}` | the claim `x` of the verified token (`{jwt.a.b}`: inside `a`): a string, number or flag |
//! | `{shard}` | the shard that the route's `shard` table computed |
//!
//! `{query.x|text}` gives `text` when the value is missing, empty or not UTF-8; without a `|` the
//! result is [`Incomplete`]. (In a location, an empty rest of a path is not missing.) `{{` and `}}` are
//! braces.
//!
//! **Keys name things, so two requests with different values never get one key.** Clients choose the
//! values: were they put in as they are, `{query.a}:{query.b}` would give `x:y:z` for both `x`, `y:z` and
//! `x:y`, `z`. So in the value of every place but the last, `%` and the first character of the text
//! that follows are percent-encoded; and between two places there must be some text. The last value
//! has nothing behind it that it could imitate, and stays as it is: `{colo}:{query.userId|unknown}`
//! with `userId=a:b` gives `SFO:a:b`.

use std::fmt::{self, Write};

use http::HeaderName;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;

use crate::asked::{Asked, decode};

/// Everything but what RFC 3986, 2.3 calls unreserved.
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// A parsed template; evaluating it takes no look at its text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    text: Box<str>,
    purpose: Purpose,
    parts: Box<[Part]>,
}

/// What the result is for, which decides how values are written into it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// A key or a name. See the module's docs.
    Key,
    /// A path or URL: what came encoded stays as it came, other values are percent-encoded.
    Location,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(Box<str>),
    Place {
        source: Source,
        fallback: Option<Box<str>>,
        /// In keys: what the value must not contain, besides `%`.
        guard: Option<char>,
    },
}

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    Colo,
    ClientIp,
    Scheme,
    Host,
    Method,
    WholePath,
    WholeQuery,
    /// A parameter of the path pattern, by its number there.
    Path {
        name: Box<str>,
        number: usize,
    },
    Query(Box<str>),
    Header(HeaderName),
    Cookie(Box<str>),
    Jwt(Box<str>),
    Shard,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Colo => f.write_str("colo"),
            Self::ClientIp => f.write_str("client.ip"),
            Self::Scheme => f.write_str("scheme"),
            Self::Host => f.write_str("host"),
            Self::Method => f.write_str("method"),
            Self::WholePath => f.write_str("path"),
            Self::WholeQuery => f.write_str("query"),
            Self::Path { name, .. } => write!(f, "path.{name}"),
            Self::Query(name) => write!(f, "query.{name}"),
            Self::Header(name) => write!(f, "header.{name}"),
            Self::Cookie(name) => write!(f, "cookie.{name}"),
            Self::Jwt(name) => write!(f, "jwt.{name}"),
            Self::Shard => f.write_str("shard"),
        }
    }
}

/// Why a text is not a template.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("template {template:?}, character {at}: {rule}")]
pub struct TemplateError {
    pub template: String,
    /// Counted from 1.
    pub at: usize,
    pub rule: String,
}

/// A request lacks a value that the template has no fallback for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} is missing or empty")]
pub struct Incomplete<'a>(pub &'a Source);

impl Template {
    /// Parses a template of a key or a name. `params` are the parameters of the route's path pattern,
    /// in their order there; empty where there is no route.
    pub fn key(text: &str, params: &[Box<str>]) -> Result<Self, TemplateError> {
        Self::parse(text, params, Purpose::Key)
    }

    /// Parses a template of a path or URL.
    pub fn location(text: &str, params: &[Box<str>]) -> Result<Self, TemplateError> {
        Self::parse(text, params, Purpose::Location)
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// What the template takes from requests, in its order.
    pub fn sources(&self) -> impl Iterator<Item = &Source> {
        self.parts.iter().filter_map(|part| match part {
            Part::Text(_) => None,
            Part::Place { source, .. } => Some(source),
        })
    }

    /// Appends the result for this request. Allocates only if `out` is too small or a value came
    /// percent-encoded.
    ///
    /// # Errors
    /// When a value without a fallback is missing; `out` then ends somewhere in the middle.
    pub fn render(&self, asked: &Asked<'_>, out: &mut String) -> Result<(), Incomplete<'_>> {
        for part in &self.parts {
            match part {
                Part::Text(text) => out.push_str(text),
                Part::Place {
                    source,
                    fallback,
                    guard,
                } => {
                    let start = out.len();
                    let encode = self.purpose == Purpose::Location;
                    let found = put(source, asked, out, encode);
                    // The rest of a path may be empty; in a location that is no gap.
                    let may_be_empty = encode && matches!(source, Source::Path { .. });
                    if found.is_none() || (out.len() == start && !may_be_empty) {
                        out.truncate(start);
                        out.push_str(fallback.as_deref().ok_or(Incomplete(source))?);
                    }
                    if let Some(guard) = guard {
                        escape_tail(out, start, *guard);
                    }
                }
            }
        }
        Ok(())
    }

    fn parse(text: &str, params: &[Box<str>], purpose: Purpose) -> Result<Self, TemplateError> {
        let mut parts = Vec::new();
        let mut literal = String::new();
        let mut rest = text;
        while let Some(next) = rest.chars().next() {
            let at = text.len() - rest.len();
            let error = |rule: String| TemplateError {
                template: text.to_owned(),
                at: text[..at].chars().count() + 1,
                rule,
            };
            if let Some(after) = rest.strip_prefix("{{").or_else(|| rest.strip_prefix("}}")) {
                literal.push(next);
                rest = after;
                continue;
            }
            match next {
                '}' => return Err(error("} without a {; a brace by itself is }}".to_owned())),
                '{' => {
                    let end = rest.find('}').ok_or_else(|| {
                        error("{ without a }; a brace by itself is {{".to_owned())
                    })?;
                    let inside = &rest[1..end];
                    let (name, fallback) = match inside.split_once('|') {
                        Some((name, fallback)) => (name, Some(fallback)),
                        None => (inside, None),
                    };
                    let source = Source::parse(name, params).map_err(error)?;
                    flush(&mut literal, &mut parts);
                    if purpose == Purpose::Key && matches!(parts.last(), Some(Part::Place { .. })) {
                        return Err(error(
                            "between two places there must be some text, or different values would \
                             give one key"
                                .to_owned(),
                        ));
                    }
                    parts.push(Part::Place {
                        source,
                        fallback: fallback.map(Into::into),
                        guard: None,
                    });
                    rest = &rest[end + 1..];
                }
                _ => {
                    literal.push(next);
                    rest = &rest[next.len_utf8()..];
                }
            }
        }
        flush(&mut literal, &mut parts);
        if purpose == Purpose::Key {
            guard(&mut parts);
        }
        Ok(Self {
            text: text.into(),
            purpose,
            parts: parts.into(),
        })
    }
}

fn flush(literal: &mut String, parts: &mut Vec<Part>) {
    if !literal.is_empty() {
        parts.push(Part::Text(std::mem::take(literal).into()));
    }
}

/// Tells every place but the last what its value must not contain.
fn guard(parts: &mut [Part]) {
    let mut last = true;
    let mut follows = None;
    for part in parts.iter_mut().rev() {
        match part {
            Part::Text(text) => follows = text.chars().next(),
            Part::Place { guard, .. } => {
                *guard = follows.filter(|_| !last);
                last = false;
            }
        }
    }
}

impl Source {
    fn parse(name: &str, params: &[Box<str>]) -> Result<Self, String> {
        let whole = match name {
            "colo" => Some(Self::Colo),
            "client.ip" => Some(Self::ClientIp),
            "scheme" => Some(Self::Scheme),
            "host" => Some(Self::Host),
            "method" => Some(Self::Method),
            "path" => Some(Self::WholePath),
            "query" => Some(Self::WholeQuery),
            "shard" => Some(Self::Shard),
            _ => None,
        };
        if let Some(whole) = whole {
            return Ok(whole);
        }
        let part = name.split_once('.').filter(|(_, part)| !part.is_empty());
        match part {
            Some(("path", part)) => match params.iter().position(|param| **param == *part) {
                Some(number) => Ok(Self::Path {
                    name: part.into(),
                    number,
                }),
                None if params.is_empty() => Err(format!(
                    "{{{name}}} needs a path pattern with the parameter {part:?}, and there is none here"
                )),
                None => Err(format!(
                    "{{{name}}} is not a parameter of the path; those are {}",
                    params.join(", ")
                )),
            },
            Some(("query", part)) => Ok(Self::Query(part.into())),
            Some(("header", part)) => part
                .parse()
                .map(Self::Header)
                .map_err(|_| format!("{part:?} cannot be the name of a header")),
            Some(("cookie", part)) => Ok(Self::Cookie(part.into())),
            Some(("jwt", part)) => Ok(Self::Jwt(part.into())),
            _ => Err(format!(
                "{{{name}}} is not one of colo, client.ip, scheme, host, method, path, query, shard, path.X, \
                 query.X, header.X, cookie.X, jwt.X"
            )),
        }
    }
}

/// Appends a value; `None` if there is none. `encode`: for a URL.
fn put(source: &Source, asked: &Asked<'_>, out: &mut String, encode: bool) -> Option<()> {
    let put_text = |out: &mut String, text: &str| match encode {
        true => out.extend(utf8_percent_encode(text, RESERVED)),
        false => out.push_str(text),
    };
    match source {
        Source::Colo => out.push_str(asked.colo.as_str()),
        Source::ClientIp => write!(out, "{}", asked.client?).ok()?,
        Source::Scheme => out.push_str(asked.scheme()),
        Source::Host => {
            let start = out.len();
            out.push_str(asked.host_name()?);
            out[start..].make_ascii_lowercase();
        }
        Source::Method => out.push_str(asked.method.as_str()),
        Source::WholePath => out.push_str(asked.path),
        Source::WholeQuery => out.push_str(asked.query?),
        Source::Path { number, .. } => {
            let raw = asked.params.get(*number, asked.path)?;
            match encode {
                true => out.push_str(raw),
                false => out.push_str(&decode(raw)?),
            }
        }
        Source::Query(name) => put_text(out, &asked.query_value(name)?),
        Source::Header(name) => put_text(out, asked.header_value(name)?),
        Source::Cookie(name) => put_text(out, asked.cookie_value(name)?),
        Source::Jwt(name) => match asked.claim(name)? {
            Value::String(text) => put_text(out, text),
            Value::Number(number) => write!(out, "{number}").ok()?,
            Value::Bool(flag) => write!(out, "{flag}").ok()?,
            Value::Null | Value::Array(_) | Value::Object(_) => return None,
        },
        Source::Shard => write!(out, "{}", asked.shard?).ok()?,
    }
    Some(())
}

/// Percent-encodes `%` and `guard` in what `out` has from `start` on.
fn escape_tail(out: &mut String, start: usize, guard: char) {
    if !out[start..].contains(['%', guard]) {
        return;
    }
    let tail = out.split_off(start);
    let mut bytes = [0; 4];
    for character in tail.chars() {
        if character == '%' || character == guard {
            for byte in character.encode_utf8(&mut bytes).bytes() {
                out.push_str(percent_encoding::percent_encode_byte(byte));
            }
        } else {
            out.push(character);
        }
    }
}

#[cfg(test)]
mod tests;
