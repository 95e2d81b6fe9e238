//! The body of a refusal: `application/problem+json` (RFC 9457).

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::error_code::ErrorCode;
use crate::limits;

pub const MEDIA_TYPE: &str = "application/problem+json";

/// One refusal: its code, and what exactly was wrong with this request.
///
/// `retryable`, `overloaded` and `remote` are the flags that Cloudflare puts on errors thrown by
/// a Durable Object (<https://developers.cloudflare.com/durable-objects/best-practices/error-handling/>).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub code: ErrorCode,
    /// Names the value and the rule it breaks.
    pub detail: String,
    /// Nothing ran: the same request may be sent again, whatever its method.
    pub retryable: bool,
    /// The error came out of class code rather than from the system around it.
    pub remote: bool,
    /// Value of the `Allow` header (RFC 9110, 10.2.1), required with `method_not_allowed`.
    pub allow: Option<Cow<'static, str>>,
}

impl Problem {
    pub fn new(code: ErrorCode, detail: impl Into<String>) -> Self {
        Self {
            code,
            detail: detail.into(),
            retryable: code.nothing_ran(),
            remote: false,
            allow: None,
        }
    }

    pub fn bad_request(detail: impl Into<String>) -> Self {
        Self::new(ErrorCode::BadRequest, detail)
    }

    pub fn not_found(detail: impl Into<String>) -> Self {
        Self::new(ErrorCode::NotFound, detail)
    }

    pub fn method_not_allowed(
        allow: impl Into<Cow<'static, str>>,
        detail: impl Into<String>,
    ) -> Self {
        Self {
            allow: Some(allow.into()),
            ..Self::new(ErrorCode::MethodNotAllowed, detail)
        }
    }

    /// `unavailable`, with the promise that nothing ran.
    pub fn unavailable(detail: impl Into<String>) -> Self {
        Self {
            retryable: true,
            ..Self::new(ErrorCode::Unavailable, detail)
        }
    }

    /// `unavailable`, where the request may or may not have had its effect.
    pub fn outcome_unknown(detail: impl Into<String>) -> Self {
        Self::new(ErrorCode::Unavailable, detail)
    }

    #[must_use]
    pub fn from_class(self) -> Self {
        Self {
            remote: true,
            ..self
        }
    }

    /// Seconds for `Retry-After` (RFC 9110, 10.2.3), on the refusals that time can mend.
    pub fn retry_after_seconds(&self) -> Option<u64> {
        match self.code {
            ErrorCode::Overloaded | ErrorCode::Unavailable | ErrorCode::RateLimited => {
                Some(limits::RETRY_AFTER.as_secs())
            }
            _ => None,
        }
    }

    /// The document. `request` is the request id that logs carry too.
    pub fn to_json(&self, request: Option<&str>) -> Vec<u8> {
        #[derive(Serialize)]
        struct Document<'a> {
            r#type: String,
            title: &'static str,
            status: u16,
            code: ErrorCode,
            detail: &'a str,
            retryable: bool,
            overloaded: bool,
            remote: bool,
            #[serde(skip_serializing_if = "Option::is_none")]
            instance: Option<String>,
        }
        let document = Document {
            r#type: format!("urn:dormouse:error:{}", self.code),
            title: self.code.title(),
            status: self.code.status().as_u16(),
            code: self.code,
            detail: &self.detail,
            retryable: self.retryable,
            overloaded: self.code == ErrorCode::Overloaded,
            remote: self.remote,
            instance: request.map(|id| format!("urn:dormouse:request:{id}")),
        };
        serde_json::to_vec(&document).expect("strings, numbers and flags always serialize")
    }
}

impl Problem {
    /// The inverse of [`to_json`](Self::to_json), but for `Allow`. `None`: it is no document of ours.
    pub fn from_json(document: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Document {
            code: String,
            detail: String,
            retryable: bool,
            remote: bool,
        }
        let document: Document = serde_json::from_slice(document).ok()?;
        Some(Self {
            code: document.code.parse().ok()?,
            detail: document.detail,
            retryable: document.retryable,
            remote: document.remote,
            allow: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_is_read_as_it_was_written() {
        for problem in [
            Problem::unavailable("the worker is away"),
            Problem::new(ErrorCode::Internal, "a \"quoted\" one").from_class(),
        ] {
            assert_eq!(
                Problem::from_json(&problem.to_json(Some("ab"))),
                Some(problem)
            );
        }
        assert_eq!(Problem::from_json(b"<html>"), None);
        assert_eq!(
            Problem::from_json(br#"{"code":"teapot","detail":"","retryable":true,"remote":true}"#),
            None
        );
    }

    #[test]
    fn document_names_code_detail_and_flags() {
        let problem = Problem::new(ErrorCode::Overloaded, "1024 requests wait already");
        let json: serde_json::Value =
            serde_json::from_slice(&problem.to_json(Some("ab12"))).unwrap();
        assert_eq!(
            json,
            serde_json::json!({
                "type": "urn:dormouse:error:overloaded",
                "title": "too much work is waiting",
                "status": 503,
                "code": "overloaded",
                "detail": "1024 requests wait already",
                "retryable": true,
                "overloaded": true,
                "remote": false,
                "instance": "urn:dormouse:request:ab12",
            })
        );
        assert_eq!(problem.retry_after_seconds(), Some(1));
    }

    #[test]
    fn a_broken_connection_is_not_retryable() {
        assert!(!Problem::outcome_unknown("connection reset").retryable);
        assert!(Problem::unavailable("connection refused").retryable);
    }
}
