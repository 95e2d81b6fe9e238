//! What may come before the first request: a PROXY header, and the preface of HTTP/2.
//!
//! Bytes are peeked at until they are known to be one or the other; the preface then stays for HTTP/2.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

/// What begins an HTTP/2 connection (RFC 9113, 3.4).
const HTTP_2: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Longest PROXY header that is taken: version 2 with room for TLVs.
const PROXY_BYTES_MAX: usize = 2048;

/// How version 1 begins, and how long it may be (PROXY protocol, 2.1).
const VERSION_1: &[u8] = b"PROXY ";
const VERSION_1_BYTES_MAX: usize = 107;

/// Between two looks at bytes that are not complete; they seldom come in pieces.
const PAUSE: Duration = Duration::from_millis(2);

/// Why the beginning of a connection cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PrefaceError {
    #[error("read")]
    Read(#[from] io::Error),
    #[error("it does not begin with a PROXY header")]
    NotProxy,
}

/// Whether the client speaks HTTP/2 without being asked (RFC 9113, 3.3). Takes nothing.
pub(super) async fn is_http_2(stream: &TcpStream) -> io::Result<bool> {
    let mut seen = [0; HTTP_2.len()];
    loop {
        let count = stream.peek(&mut seen).await?;
        if count == 0 || seen[..count] != HTTP_2[..count] {
            return Ok(false);
        }
        if count == HTTP_2.len() {
            return Ok(true);
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Takes the PROXY header (version 1 or 2) and returns whom it names; `None` if it names nobody, as the
/// health checks of load balancers do.
pub(super) async fn take_proxy_header(
    stream: &mut TcpStream,
) -> Result<Option<SocketAddr>, PrefaceError> {
    let mut seen = [0; PROXY_BYTES_MAX];
    loop {
        let count = stream.peek(&mut seen).await?;
        if count == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        let Some((length, client)) = parse(&seen[..count])? else {
            if count == PROXY_BYTES_MAX {
                return Err(PrefaceError::NotProxy);
            }
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        stream.read_exact(&mut seen[..length]).await?;
        return Ok(client);
    }
}

/// Length and client of a header; `None` if it is not complete.
pub(crate) fn parse(bytes: &[u8]) -> Result<Option<(usize, Option<SocketAddr>)>, PrefaceError> {
    use ppp::{HeaderResult, PartialResult, v1, v2};
    let start = bytes.len().min(VERSION_1.len());
    let is_1 = bytes[..start] == VERSION_1[..start];
    // Of version 1 the parser gets the line and nothing else: it takes half an address for a wrong one, and what
    // follows a line for a part of it.
    let bytes = match is_1 {
        true => match line(bytes)? {
            Some(line) => line,
            None => return Ok(None),
        },
        false => bytes,
    };
    let header = HeaderResult::parse(bytes);
    if header.is_incomplete() {
        return match is_1 {
            true => Err(PrefaceError::NotProxy),
            false => Ok(None),
        };
    }
    match header {
        HeaderResult::V1(Ok(header)) => {
            let client = match header.addresses {
                v1::Addresses::Tcp4(a) => Some((a.source_address, a.source_port).into()),
                v1::Addresses::Tcp6(a) => Some((a.source_address, a.source_port).into()),
                v1::Addresses::Unknown => None,
            };
            Ok(Some((header.header.len(), client)))
        }
        HeaderResult::V2(Ok(header)) => {
            let client = match (header.command, header.addresses) {
                (v2::Command::Proxy, v2::Addresses::IPv4(a)) => {
                    Some((a.source_address, a.source_port).into())
                }
                (v2::Command::Proxy, v2::Addresses::IPv6(a)) => {
                    Some((a.source_address, a.source_port).into())
                }
                // Of the proxy itself, or a socket without an address.
                _ => None,
            };
            Ok(Some((header.len(), client)))
        }
        HeaderResult::V1(Err(_)) | HeaderResult::V2(Err(_)) => Err(PrefaceError::NotProxy),
    }
}

/// A header of version 1, with its end; `None` if that has not come yet.
fn line(bytes: &[u8]) -> Result<Option<&[u8]>, PrefaceError> {
    let most = &bytes[..bytes.len().min(VERSION_1_BYTES_MAX)];
    match most.iter().position(|byte| *byte == b'\n') {
        Some(end) if most[..end].ends_with(b"\r") => Ok(Some(&most[..=end])),
        None if most.len() < VERSION_1_BYTES_MAX => Ok(None),
        Some(_) | None => Err(PrefaceError::NotProxy),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn both_versions_name_the_client() {
        let one = b"PROXY TCP4 203.0.113.7 10.0.0.1 4711 443\r\nGET /";
        let client: SocketAddr = "203.0.113.7:4711".parse().unwrap();
        assert_eq!(parse(one).unwrap(), Some((42, Some(client))));
        assert_eq!(parse(b"PROXY UNKNOWN\r\n").unwrap(), Some((15, None)));
        let mut two = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec();
        two.extend([203, 0, 113, 7, 10, 0, 0, 1, 0x12, 0x67, 1, 187]);
        assert_eq!(parse(&two).unwrap(), Some((28, Some(client))));
        // LOCAL: the proxy speaks for itself.
        two[12] = 0x20;
        assert_eq!(parse(&two).unwrap(), Some((28, None)));
        for end in 1..one.len() - 6 {
            assert_eq!(parse(&one[..end]).unwrap(), None, "{end}");
        }
        assert!(parse(b"GET / HTTP/1.1\r\n").is_err());
        assert!(parse(b"PROXY TCP4 x y 1 2\r\n").is_err());
    }

    #[test]
    fn a_line_is_judged_alone_and_ends_as_the_protocol_says() {
        // Found by the fuzz target `proxy_header`: the parser took the first for a header, and for none with more behind.
        for line in [
            "PROXY TCP4 203.0.113.7 10.0.0.1 4422 4711 \n",
            "PROXY TCP4 203.0.113.7 10.0.0.1 4422 4711\n",
            &format!("PROXY {}\r\n", "x".repeat(VERSION_1_BYTES_MAX)),
        ] {
            assert!(parse(line.as_bytes()).is_err(), "{line:?}");
            assert!(parse(format!("{line}443G\r\n").as_bytes()).is_err());
        }
        let line = b"PROXY TCP4 203.0.113.7 10.0.0.1 4711 443\r\n\xff\xff\r\n";
        assert!(matches!(parse(line), Ok(Some((42, Some(_))))));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..64), prefixed in any::<bool>()) {
            let mut all = if prefixed { b"\r\n\r\n\0\r\nQUIT\n".to_vec() } else { b"PROXY ".to_vec() };
            all.extend(bytes);
            if let Ok(Some((length, _))) = parse(&all) {
                prop_assert!(length <= all.len());
            }
        }
    }
}
