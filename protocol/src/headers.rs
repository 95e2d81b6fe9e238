//! The headers that a routed request carries from a gateway to a worker, and back.
//!
//! Every name begins with [`PREFIX`]; the gateway removes such headers from what clients send, so a
//! worker may believe them once the [`TOKEN`] is right.

use std::borrow::Cow;

use http::HeaderName;
use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};

use crate::ids::{ObjectName, ObjectNameError};

pub const PREFIX: &str = "dormouse-";

/// The class, as text.
pub const CLASS: HeaderName = HeaderName::from_static("dormouse-class");
/// The object id, as 64 hex digits.
pub const OBJECT: HeaderName = HeaderName::from_static("dormouse-object");
/// The object's name, percent-encoded ([`encode_name`]); absent when the client gave an id.
pub const NAME: HeaderName = HeaderName::from_static("dormouse-name");
/// The shard, in decimal.
pub const SHARD: HeaderName = HeaderName::from_static("dormouse-shard");
/// The version of the ring that the gateway routed by; on `not_owner`, the worker's own.
pub const EPOCH: HeaderName = HeaderName::from_static("dormouse-epoch");
/// The colo of the gateway.
pub const COLO: HeaderName = HeaderName::from_static("dormouse-colo");
/// The request id, 16 hex digits; logs and problem documents repeat it.
pub const REQUEST: HeaderName = HeaderName::from_static("dormouse-request");
/// Milliseconds after which nobody waits for the answer any more; absent: no such time. A relative time, so
/// that no two clocks need agree.
pub const TIMEOUT: HeaderName = HeaderName::from_static("dormouse-timeout");
/// Present on RPC calls: the method's name. Absent: the request is the object's `fetch`.
pub const METHOD: HeaderName = HeaderName::from_static("dormouse-method");
/// Present when a client asks for a new unique id: the worker answers for the class alone.
pub const CREATE: HeaderName = HeaderName::from_static("dormouse-create");
/// Present on what an operator asks; the path says what. The admin listener in between has checked the
/// operator's own token.
pub const OPERATOR: HeaderName = HeaderName::from_static("dormouse-operator");
/// Present on what a gateway asks for itself: without it there are no internal classes.
pub const INTERNAL: HeaderName = HeaderName::from_static("dormouse-internal");
/// What a gateway asks about the making of a new object: [`NEW_OBJECT_TELL`] that there is one now, which the
/// answer does by this header too, or [`NEW_OBJECT_REFUSE`] to make one.
pub const NEW_OBJECT: HeaderName = HeaderName::from_static("dormouse-new-object");
pub const NEW_OBJECT_TELL: &str = "tell";
pub const NEW_OBJECT_REFUSE: &str = "refuse";
/// The cluster's shared secret. Workers never show it to class code.
pub const TOKEN: HeaderName = HeaderName::from_static("dormouse-token");
/// On refusals: the [`ErrorCode`](crate::ErrorCode). Only the system sets it.
pub const ERROR: HeaderName = HeaderName::from_static("dormouse-error");
/// W3C Trace Context.
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// Where a worker serves the ring as JSON ([`ring::RingDocument`](crate::ring::RingDocument)), to
/// requests without an [`OBJECT`] header.
pub const RING_PATH: &str = "/dormouse/ring";

/// What must be escaped for the name to be a header value and to decode to itself.
const NAME_ESCAPES: &AsciiSet = &CONTROLS.add(b'%').add(b' ');

/// Percent-encodes a name into a header value. Borrows when nothing needs an escape.
pub fn encode_name(name: &ObjectName) -> Cow<'_, str> {
    utf8_percent_encode(name.as_str(), NAME_ESCAPES).into()
}

/// The inverse of [`encode_name`].
pub fn decode_name(value: &str) -> Result<ObjectName, ObjectNameError> {
    match percent_decode_str(value).decode_utf8() {
        Ok(name) => name.parse(),
        Err(_) => Err(ObjectNameError::NotUtf8 {
            encoded: value.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_name_survives_as_a_header_value(text in "\\PC{1,100}") {
            let Ok(name) = text.parse::<ObjectName>() else { return Ok(()) };
            let value = HeaderValue::from_str(&encode_name(&name)).unwrap();
            prop_assert_eq!(decode_name(value.to_str().unwrap()), Ok(name));
        }
    }

    #[test]
    fn every_header_has_the_prefix_that_gateways_remove() {
        for header in [
            CLASS, OBJECT, NAME, SHARD, EPOCH, COLO, REQUEST, TIMEOUT, METHOD, CREATE, OPERATOR,
            INTERNAL, NEW_OBJECT, TOKEN, ERROR,
        ] {
            assert!(header.as_str().starts_with(PREFIX));
        }
    }
}
