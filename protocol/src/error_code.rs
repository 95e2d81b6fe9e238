//! The closed set of refusals: everything the system itself, and not an object, says no with.

use std::fmt;
use std::str::FromStr;

use http::StatusCode;
use serde::{Serialize, Serializer};

/// Why the system refused. On the wire in the header [`dormouse-error`](crate::headers::ERROR) and
/// as the `code` of a [`Problem`](crate::Problem).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// The request breaks a rule; sending it again unchanged cannot help.
    BadRequest,
    Unauthorized,
    Forbidden,
    NotFound,
    MethodNotAllowed,
    /// The client took too long to send its request.
    TooSlow,
    PayloadTooLarge,
    UriTooLong,
    /// Another worker owns the shard. Nothing ran. Never reaches clients: the gateway refreshes its
    /// ring and sends the request again.
    NotOwner,
    RateLimited,
    HeadersTooLarge,
    /// Class code panicked or ran past its limits. The object restarts from its last durable commit;
    /// whether this request had an effect is unknown to its caller.
    ObjectReset,
    /// Class code failed, or we did; the turn was rolled back.
    Internal,
    /// A queue was full. Nothing ran.
    Overloaded,
    /// The owner of the shard cannot be reached, or the connection to it broke.
    Unavailable,
    TimedOut,
    /// The disk, or the object's share of it, is full. Nothing was written; reads still work.
    StorageFull,
}

impl ErrorCode {
    pub const ALL: [Self; 17] = [
        Self::BadRequest,
        Self::Unauthorized,
        Self::Forbidden,
        Self::NotFound,
        Self::MethodNotAllowed,
        Self::TooSlow,
        Self::PayloadTooLarge,
        Self::UriTooLong,
        Self::NotOwner,
        Self::RateLimited,
        Self::HeadersTooLarge,
        Self::ObjectReset,
        Self::Internal,
        Self::Overloaded,
        Self::Unavailable,
        Self::TimedOut,
        Self::StorageFull,
    ];

    /// The name on the wire and in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::BadRequest => "bad_request",
            Self::Unauthorized => "unauthorized",
            Self::Forbidden => "forbidden",
            Self::NotFound => "not_found",
            Self::MethodNotAllowed => "method_not_allowed",
            Self::TooSlow => "too_slow",
            Self::PayloadTooLarge => "payload_too_large",
            Self::UriTooLong => "uri_too_long",
            Self::NotOwner => "not_owner",
            Self::RateLimited => "rate_limited",
            Self::HeadersTooLarge => "headers_too_large",
            Self::ObjectReset => "object_reset",
            Self::Internal => "internal",
            Self::Overloaded => "overloaded",
            Self::Unavailable => "unavailable",
            Self::TimedOut => "timed_out",
            Self::StorageFull => "storage_full",
        }
    }

    pub const fn status(self) -> StatusCode {
        match self {
            Self::BadRequest => StatusCode::BAD_REQUEST,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Forbidden => StatusCode::FORBIDDEN,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::TooSlow => StatusCode::REQUEST_TIMEOUT,
            Self::PayloadTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::UriTooLong => StatusCode::URI_TOO_LONG,
            Self::NotOwner => StatusCode::MISDIRECTED_REQUEST,
            Self::RateLimited => StatusCode::TOO_MANY_REQUESTS,
            Self::HeadersTooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::ObjectReset | Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Overloaded | Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Self::TimedOut => StatusCode::GATEWAY_TIMEOUT,
            Self::StorageFull => StatusCode::INSUFFICIENT_STORAGE,
        }
    }

    /// The title of the problem document: the same words for every occurrence.
    pub const fn title(self) -> &'static str {
        match self {
            Self::BadRequest => "the request breaks a rule",
            Self::Unauthorized => "credentials are missing or wrong",
            Self::Forbidden => "these credentials do not allow it",
            Self::NotFound => "there is no such thing",
            Self::MethodNotAllowed => "this method is not offered here",
            Self::TooSlow => "the request took too long to arrive",
            Self::PayloadTooLarge => "the body is larger than allowed",
            Self::UriTooLong => "the URI is longer than allowed",
            Self::NotOwner => "another worker owns the shard",
            Self::RateLimited => "too many requests",
            Self::HeadersTooLarge => "the headers are larger than allowed",
            Self::ObjectReset => "the object was reset",
            Self::Internal => "the request failed",
            Self::Overloaded => "too much work is waiting",
            Self::Unavailable => "the object cannot be reached now",
            Self::TimedOut => "the answer took too long",
            Self::StorageFull => "storage is full",
        }
    }

    /// Whether a refusal with this code always means that nothing ran, so that any request, idempotent
    /// or not, may be sent again after a pause. `unavailable` depends on the case and says so itself.
    pub const fn nothing_ran(self) -> bool {
        match self {
            Self::NotOwner | Self::RateLimited | Self::Overloaded => true,
            Self::BadRequest
            | Self::Unauthorized
            | Self::Forbidden
            | Self::NotFound
            | Self::MethodNotAllowed
            | Self::TooSlow
            | Self::PayloadTooLarge
            | Self::UriTooLong
            | Self::HeadersTooLarge
            | Self::ObjectReset
            | Self::Internal
            | Self::Unavailable
            | Self::TimedOut
            | Self::StorageFull => false,
        }
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The text is not one of the names in the closed set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an error code")]
pub struct UnknownCode(String);

impl FromStr for ErrorCode {
    type Err = UnknownCode;

    fn from_str(text: &str) -> Result<Self, UnknownCode> {
        Self::ALL
            .into_iter()
            .find(|code| code.name() == text)
            .ok_or_else(|| UnknownCode(text.to_owned()))
    }
}

impl Serialize for ErrorCode {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for code in ErrorCode::ALL {
            assert_eq!(code.name().parse(), Ok(code));
        }
        assert!("teapot".parse::<ErrorCode>().is_err());
    }

    #[test]
    fn names_and_statuses_are_the_contract() {
        let table: Vec<String> = ErrorCode::ALL
            .iter()
            .map(|code| format!("{} {}", code.name(), code.status().as_u16()))
            .collect();
        assert_eq!(
            table,
            [
                "bad_request 400",
                "unauthorized 401",
                "forbidden 403",
                "not_found 404",
                "method_not_allowed 405",
                "too_slow 408",
                "payload_too_large 413",
                "uri_too_long 414",
                "not_owner 421",
                "rate_limited 429",
                "headers_too_large 431",
                "object_reset 500",
                "internal 500",
                "overloaded 503",
                "unavailable 503",
                "timed_out 504",
                "storage_full 507",
            ]
        );
    }
}
