//! The payloads of requests and responses.
//!
//! Texts are a length and their bytes; the length has 1 byte for class, method and colo, 2 for names and
//! the request id, 4 for paths and values of headers. A body is what follows its head.
//!
//! Request: id (32), epoch (8), timeout in milliseconds (4, 0: none), trace (16), span (8), trace flags (1),
//! colo, request id, class, name (length 0xffff: none), what is asked (1: fetch, call, create, own call), its
//! method, for a fetch the path with the query; headers; body.
//! Response: status (2), headers, body. Headers: their count (2), then names and values in turn.

use std::num::NonZeroU32;

use crate::ids::ObjectId;
use crate::trace::TraceParent;

use super::{HEAD_BYTES_MAX, Kind, LinkFault, frame};

/// The length that stands for no name.
const NO_NAME: u16 = u16::MAX;

const FETCH: u8 = 0;
const CALL: u8 = 1;
const CREATE: u8 = 2;
const OWN: u8 = 3;

/// Who a request is for and where it came from: what [`headers`](crate::headers) carry over HTTP/1.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Routed<'a> {
    pub id: ObjectId,
    /// The version of the ring that the gateway routed by.
    pub epoch: u64,
    /// Milliseconds after which nobody waits for the answer any more.
    pub timeout_ms: Option<NonZeroU32>,
    pub trace: TraceParent,
    pub colo: &'a str,
    pub request: &'a str,
    pub class: &'a str,
    /// As it is, not encoded.
    pub name: Option<&'a str>,
}

/// What is asked of the object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask<'a> {
    Fetch {
        method: &'a str,
        path_and_query: &'a str,
    },
    Call {
        method: &'a str,
    },
    Create,
    /// A call that the gateway makes for itself: only so there are internal classes.
    Own {
        method: &'a str,
    },
}

/// A request as a worker reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request<'a> {
    pub routed: Routed<'a>,
    pub ask: Ask<'a>,
    pub headers: Headers<'a>,
    pub body: &'a [u8],
}

/// A response as a gateway reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Response<'a> {
    pub status: u16,
    pub headers: Headers<'a>,
    pub body: &'a [u8],
}

/// Names and values, whose lengths were checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Headers<'a> {
    bytes: &'a [u8],
}

impl<'a> Iterator for Headers<'a> {
    type Item = (&'a [u8], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let mut reader = Reader(self.bytes);
        let name = reader.text2("header").ok()?;
        let value = reader.text4("header").ok()?;
        self.bytes = reader.0;
        Some((name, value))
    }
}

/// Appends a [`Kind::Request`] frame. `false`, with nothing appended, if its head is too large for a link:
/// such a request goes by HTTP/1.1. The body is at most
/// [`REQUEST_BODY_BYTES_MAX`](super::REQUEST_BODY_BYTES_MAX).
pub fn request<'a>(
    out: &mut Vec<u8>,
    stream: u32,
    routed: &Routed<'_>,
    ask: &Ask<'_>,
    headers: impl Iterator<Item = (&'a [u8], &'a [u8])>,
    body: &[u8],
) -> bool {
    let start = out.len();
    let mut fits = true;
    frame(out, Kind::Request, true, stream, |out| {
        let begin = out.len();
        out.extend_from_slice(routed.id.as_bytes());
        out.extend_from_slice(&routed.epoch.to_le_bytes());
        let timeout_ms = routed.timeout_ms.map_or(0, NonZeroU32::get);
        out.extend_from_slice(&timeout_ms.to_le_bytes());
        out.extend_from_slice(&routed.trace.trace.to_le_bytes());
        out.extend_from_slice(&routed.trace.span.to_le_bytes());
        out.push(routed.trace.flags);
        fits &= text1(out, routed.colo);
        fits &= text2(out, routed.request.as_bytes());
        fits &= text1(out, routed.class);
        match routed.name {
            Some(name) => fits &= text2(out, name.as_bytes()),
            None => out.extend_from_slice(&NO_NAME.to_le_bytes()),
        }
        match ask {
            Ask::Fetch {
                method,
                path_and_query,
            } => {
                out.push(FETCH);
                fits &= text1(out, method);
                fits &= text4(out, path_and_query.as_bytes());
            }
            Ask::Call { method } => {
                out.push(CALL);
                fits &= text1(out, method);
            }
            Ask::Create => out.push(CREATE),
            Ask::Own { method } => {
                out.push(OWN);
                fits &= text1(out, method);
            }
        }
        fits &= write_headers(out, headers) && out.len() - begin <= HEAD_BYTES_MAX;
        if fits {
            out.extend_from_slice(body);
        } else {
            out.truncate(begin);
        }
    });
    if !fits {
        out.truncate(start);
    }
    fits
}

/// Appends a [`Kind::Response`] frame. `false`, with nothing appended, if its head is too large.
pub fn response<'a>(
    out: &mut Vec<u8>,
    stream: u32,
    end: bool,
    status: u16,
    headers: impl Iterator<Item = (&'a [u8], &'a [u8])>,
    body: &[u8],
) -> bool {
    let start = out.len();
    let mut fits = true;
    frame(out, Kind::Response, end, stream, |out| {
        let begin = out.len();
        out.extend_from_slice(&status.to_le_bytes());
        fits = write_headers(out, headers) && out.len() - begin <= HEAD_BYTES_MAX;
        if fits {
            out.extend_from_slice(body);
        } else {
            out.truncate(begin);
        }
    });
    if !fits {
        out.truncate(start);
    }
    fits
}

/// Whether all of it could be written; it stops at [`HEAD_BYTES_MAX`].
fn write_headers<'a>(
    out: &mut Vec<u8>,
    headers: impl Iterator<Item = (&'a [u8], &'a [u8])>,
) -> bool {
    let count_at = out.len();
    out.extend_from_slice(&[0; 2]);
    let mut count: u16 = 0;
    for (name, value) in headers {
        let fits = out.len() - count_at + name.len() + value.len() <= HEAD_BYTES_MAX;
        if !fits || count == u16::MAX || !text2(out, name) || !text4(out, value) {
            return false;
        }
        count += 1;
    }
    out[count_at..count_at + 2].copy_from_slice(&count.to_le_bytes());
    true
}

fn text1(out: &mut Vec<u8>, text: &str) -> bool {
    let Ok(length) = u8::try_from(text.len()) else {
        return false;
    };
    out.push(length);
    out.extend_from_slice(text.as_bytes());
    true
}

fn text2(out: &mut Vec<u8>, text: &[u8]) -> bool {
    let Some(length) = u16::try_from(text.len())
        .ok()
        .filter(|length| *length != NO_NAME)
    else {
        return false;
    };
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(text);
    true
}

fn text4(out: &mut Vec<u8>, text: &[u8]) -> bool {
    let Ok(length) = u32::try_from(text.len()) else {
        return false;
    };
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(text);
    true
}

impl<'a> Request<'a> {
    /// Reads the payload of a [`Kind::Request`]. What it names is checked for its form only; header names
    /// and values are any bytes.
    pub fn read(payload: &'a [u8]) -> Result<Self, LinkFault> {
        let mut reader = Reader(payload);
        let id = ObjectId::from_bytes(reader.array("id")?).ok_or(LinkFault::Invalid("id"))?;
        let epoch = reader.u64("epoch")?;
        let timeout_ms = NonZeroU32::new(reader.u32("timeout")?);
        let trace = TraceParent {
            trace: u128::from_le_bytes(reader.array("trace")?),
            span: reader.u64("span")?,
            flags: reader.u8("trace flags")?,
        };
        let colo = reader.str1("colo")?;
        let request = utf8(reader.text2("request id")?, "request id")?;
        let class = reader.str1("class")?;
        let name = match reader.peek_u16() {
            Some(NO_NAME) => {
                reader.u16("name")?;
                None
            }
            _ => Some(utf8(reader.text2("name")?, "name")?),
        };
        let ask = match reader.u8("ask")? {
            FETCH => Ask::Fetch {
                method: reader.str1("method")?,
                path_and_query: utf8(reader.text4("path")?, "path")?,
            },
            CALL => Ask::Call {
                method: reader.str1("method")?,
            },
            CREATE => Ask::Create,
            OWN => Ask::Own {
                method: reader.str1("method")?,
            },
            _ => return Err(LinkFault::Invalid("ask")),
        };
        let routed = Routed {
            id,
            epoch,
            timeout_ms,
            trace,
            colo,
            request,
            class,
            name,
        };
        Ok(Self {
            routed,
            ask,
            headers: reader.headers()?,
            body: reader.0,
        })
    }
}

impl<'a> Response<'a> {
    /// Reads the payload of a [`Kind::Response`].
    pub fn read(payload: &'a [u8]) -> Result<Self, LinkFault> {
        let mut reader = Reader(payload);
        Ok(Self {
            status: reader.u16("status")?,
            headers: reader.headers()?,
            body: reader.0,
        })
    }
}

/// Takes fields off the front of bytes that anybody may have sent.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, bytes: usize, field: &'static str) -> Result<&'a [u8], LinkFault> {
        let (taken, rest) = self
            .0
            .split_at_checked(bytes)
            .ok_or(LinkFault::Short(field))?;
        self.0 = rest;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(
        &mut self,
        field: &'static str,
    ) -> Result<[u8; N], LinkFault> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(LinkFault::Short(field))?;
        self.0 = rest;
        Ok(*taken)
    }

    pub(super) fn u8(&mut self, field: &'static str) -> Result<u8, LinkFault> {
        self.array(field).map(u8::from_le_bytes)
    }

    pub(super) fn u16(&mut self, field: &'static str) -> Result<u16, LinkFault> {
        self.array(field).map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self, field: &'static str) -> Result<u32, LinkFault> {
        self.array(field).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, field: &'static str) -> Result<u64, LinkFault> {
        self.array(field).map(u64::from_le_bytes)
    }

    fn peek_u16(&self) -> Option<u16> {
        self.0.first_chunk().map(|bytes| u16::from_le_bytes(*bytes))
    }

    fn str1(&mut self, field: &'static str) -> Result<&'a str, LinkFault> {
        let length = self.u8(field)?;
        utf8(self.take(usize::from(length), field)?, field)
    }

    fn text2(&mut self, field: &'static str) -> Result<&'a [u8], LinkFault> {
        let length = self.u16(field)?;
        self.take(usize::from(length), field)
    }

    fn text4(&mut self, field: &'static str) -> Result<&'a [u8], LinkFault> {
        let length = self.u32(field)?;
        self.take(length as usize, field)
    }

    fn headers(&mut self) -> Result<Headers<'a>, LinkFault> {
        let count = self.u16("headers")?;
        let all = self.0;
        for _ in 0..count {
            self.text2("headers")?;
            self.text4("headers")?;
        }
        Ok(Headers {
            bytes: &all[..all.len() - self.0.len()],
        })
    }
}

fn utf8<'a>(bytes: &'a [u8], field: &'static str) -> Result<&'a str, LinkFault> {
    std::str::from_utf8(bytes).map_err(|_| LinkFault::Invalid(field))
}
