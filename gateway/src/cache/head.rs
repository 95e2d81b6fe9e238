//! The head of an answer as it is kept: one piece of memory, of a known size. What pingora parses takes ten
//! times as much, and holds on to the buffer that it was read into.
//!
//! | bytes | meaning |
//! |---|---|
//! | 2 | length of a header's name, little-endian |
//! | 4 | length of its value, little-endian |
//! | … | the name, then the value |

use bytes::{Buf, Bytes};
use http::header::{InvalidHeaderName, InvalidHeaderValue};
use http::{HeaderName, HeaderValue, StatusCode};
use pingora_http::ResponseHeader;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Head {
    status: StatusCode,
    lines: Bytes,
}

/// What was written here cannot be read: a fault of this module.
#[derive(Debug, thiserror::Error)]
pub(super) enum HeadError {
    #[error("half a header")]
    Half,
    #[error(transparent)]
    Name(#[from] InvalidHeaderName),
    #[error(transparent)]
    Value(#[from] InvalidHeaderValue),
}

impl Head {
    pub(super) fn of(head: &ResponseHeader) -> Self {
        let mut lines = Vec::new();
        for (name, value) in &head.headers {
            let (name, value) = (name.as_str().as_bytes(), value.as_bytes());
            let lengths = u16::try_from(name.len())
                .ok()
                .zip(u32::try_from(value.len()).ok());
            // `http` has a limit of 64 KiB for names, and no server sends values of gigabytes.
            let Some((name_length, value_length)) = lengths else {
                continue;
            };
            lines.extend(name_length.to_le_bytes());
            lines.extend(value_length.to_le_bytes());
            lines.extend(name);
            lines.extend(value);
        }
        Self {
            status: head.status,
            lines: lines.into_boxed_slice().into(),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.lines.len()
    }

    /// The values share the memory of this.
    pub(super) fn lines(&self) -> Result<Vec<(HeaderName, HeaderValue)>, HeadError> {
        let mut rest = self.lines.clone();
        let mut lines = Vec::new();
        while !rest.is_empty() {
            let name = rest.try_get_u16_le().map_err(|_| HeadError::Half)?;
            let value = rest.try_get_u32_le().map_err(|_| HeadError::Half)?;
            let (name, value) = (usize::from(name), value as usize);
            if rest.len() < name + value {
                return Err(HeadError::Half);
            }
            let name = HeaderName::from_bytes(&rest.split_to(name))?;
            lines.push((name, HeaderValue::from_maybe_shared(rest.split_to(value))?));
        }
        Ok(lines)
    }

    pub(super) fn status(&self) -> StatusCode {
        self.status
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_comes_back_as_it_was() {
        let mut head = ResponseHeader::build(404, None).unwrap();
        let lines = [
            ("X-A", "1"),
            ("vary", "a, b"),
            ("X-A", ""),
            ("x-b", "\u{e9}"),
        ];
        for (name, value) in lines {
            head.append_header(name, value).unwrap();
        }
        let kept = Head::of(&head);
        assert_eq!(kept.status(), 404);
        let want = [
            ("x-a", "1"),
            ("x-a", ""),
            ("vary", "a, b"),
            ("x-b", "\u{e9}"),
        ];
        let got = kept.lines().unwrap();
        assert_eq!(got.len(), want.len());
        for ((name, value), (want_name, want_value)) in got.iter().zip(want) {
            assert_eq!(
                (name.as_str(), value.as_bytes()),
                (want_name, want_value.as_bytes())
            );
        }
    }
}
