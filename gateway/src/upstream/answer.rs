//! The head of an answer whose framing is beyond doubt, read with as few copies as can be.
//!
//! That is most of what apps say: HTTP/1.1, a final status, one `Content-Length` or no body at all. Whatever else it
//! is (chunks, a body until the end of the connection, interim answers, HTTP/1.0, anything odd) is left to
//! pingora's reader.

use std::mem::MaybeUninit;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use pingora_http::ResponseHeader;

/// Most headers of an answer that is read here.
const HEADERS_MAX: usize = 64;

/// What was received so far.
#[derive(Debug)]
pub(crate) enum Received {
    /// Not the whole head.
    Part,
    Plain(Box<PlainAnswer>),
    /// For pingora to read, from its first byte.
    Other,
}

/// A head, and how the body is framed (RFC 9112, 6.3).
#[derive(Debug)]
pub(crate) struct PlainAnswer {
    /// Without what concerns the connection only.
    pub(crate) head: ResponseHeader,
    /// Where the body begins.
    pub(crate) head_bytes: usize,
    pub(crate) body_bytes: u64,
    /// Whether the server keeps the connection open.
    pub(crate) keeps: bool,
}

/// Reads the head of an answer to a request that was not HEAD.
pub(crate) fn read(bytes: &Bytes) -> Received {
    let mut headers = [const { MaybeUninit::uninit() }; HEADERS_MAX];
    let mut parsed = httparse::Response::new(&mut []);
    let config = httparse::ParserConfig::default();
    match config.parse_response_with_uninit_headers(&mut parsed, bytes, &mut headers) {
        Ok(httparse::Status::Partial) => Received::Part,
        Ok(httparse::Status::Complete(head_bytes)) => match plain(bytes, &parsed, head_bytes) {
            Some(answer) => Received::Plain(Box::new(answer)),
            None => Received::Other,
        },
        Err(_) => Received::Other,
    }
}

fn plain(
    bytes: &Bytes,
    parsed: &httparse::Response<'_, '_>,
    head_bytes: usize,
) -> Option<PlainAnswer> {
    let status = parsed.code.filter(|status| *status >= 200)?;
    if parsed.version != Some(1) {
        return None;
    }
    let status = StatusCode::from_u16(status).ok()?;
    // Not with `append_header`, which parses each name again.
    let mut headers = HeaderMap::with_capacity(parsed.headers.len() + 4);
    let mut length = None;
    let mut keeps = true;
    for header in parsed.headers.iter() {
        let name = HeaderName::from_bytes(header.name.as_bytes()).ok()?;
        if name == TRANSFER_ENCODING {
            return None;
        } else if name == CONNECTION {
            keeps &= keeps_open(header.value)?;
            continue;
        } else if name == CONTENT_LENGTH {
            if length.is_some() {
                return None;
            }
            length = Some(digits(header.value)?);
        } else if matches!(name.as_str(), "keep-alive" | "proxy-connection") {
            continue;
        }
        let value = HeaderValue::from_maybe_shared(bytes.slice_ref(header.value)).ok()?;
        headers.append(name, value);
    }
    let body_bytes = match status {
        StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED => 0,
        _ => length?,
    };
    let (mut parts, ()) = http::Response::new(()).into_parts();
    (parts.status, parts.headers) = (status, headers);
    let mut head = ResponseHeader::from(parts);
    head.set_reason_phrase(parsed.reason).ok()?;
    Some(PlainAnswer {
        head,
        head_bytes,
        body_bytes,
        keeps,
    })
}

/// What `Connection` says; `None` if it names headers.
fn keeps_open(value: &[u8]) -> Option<bool> {
    if value.eq_ignore_ascii_case(b"keep-alive") {
        Some(true)
    } else if value.eq_ignore_ascii_case(b"close") {
        Some(false)
    } else {
        None
    }
}

/// RFC 9110, 8.6: digits and nothing else.
fn digits(value: &[u8]) -> Option<u64> {
    let all_digits = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
    let text = std::str::from_utf8(value).ok()?;
    all_digits.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(text: &str) -> Option<PlainAnswer> {
        match read(&Bytes::from(text.to_owned())) {
            Received::Plain(answer) => Some(*answer),
            Received::Part | Received::Other => None,
        }
    }

    #[test]
    fn what_has_a_length_or_no_body_is_read() {
        let text = "HTTP/1.1 200 Fine\r\nContent-Length: 5\r\nConnection: Close\r\nX-A: 1\r\nx-a: 2\r\n\r\nhello";
        let read = answer(text).unwrap();
        assert_eq!(read.body_bytes, 5);
        assert_eq!(&text[read.head_bytes..], "hello");
        assert!(!read.keeps);
        let values: Vec<_> = read.head.headers.get_all("x-a").iter().collect();
        assert_eq!(values, ["1", "2"]);
        assert!(!read.head.headers.contains_key(CONNECTION));
        assert_eq!(read.head.get_reason_phrase(), Some("Fine"));
        let read = answer("HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n").unwrap();
        assert_eq!((read.body_bytes, read.keeps), (0, true));
    }

    #[test]
    fn what_is_in_any_doubt_is_left_to_others() {
        for rest in [
            "1.0 200 OK\r\nContent-Length: 5",
            "1.1 200 OK",
            "1.1 100 Continue\r\nContent-Length: 5",
            "1.1 101 Switching Protocols\r\nContent-Length: 5",
            "1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked",
            "1.1 204 No Content\r\nTransfer-Encoding: chunked",
            "1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5",
            "1.1 200 OK\r\nContent-Length: +5",
            "1.1 200 OK\r\nContent-Length: 5, 5",
            "1.1 200 OK\r\nContent-Length: ",
            "1.1 200 OK\r\nContent-Length: 99999999999999999999",
            "1.1 200 OK\r\nContent-Length: 5\r\nConnection: close, x-a",
            "1.1 200 OK\r\nContent-Length: 5\r\nX-Folded: a\r\n b",
            "1.1 200 OK\r\nContent-Length : 5",
            "1.1 200 OK\r\nno colon",
        ] {
            let bytes = Bytes::from(format!("HTTP/{rest}\r\n\r\nhello"));
            assert!(matches!(read(&bytes), Received::Other), "{rest}");
        }
        let many = "x: y\r\n".repeat(HEADERS_MAX);
        let many = format!("HTTP/1.1 200 OK\r\n{many}content-length: 0\r\n\r\n");
        assert!(matches!(read(&many.into()), Received::Other));
    }

    #[test]
    fn a_part_of_a_head_is_waited_for() {
        let text = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
        for end in 0..text.len() {
            let part = Bytes::copy_from_slice(&text.as_bytes()[..end]);
            assert!(matches!(read(&part), Received::Part), "{end}");
        }
    }
}
