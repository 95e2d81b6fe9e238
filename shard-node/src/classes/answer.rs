//! Responses that the built-in classes give to `fetch`.

use std::fmt::Display;
use std::str::FromStr;

use http::header::CONTENT_TYPE;
use http::{HeaderValue, Request, Response, StatusCode};
use percent_encoding::percent_decode_str;

use crate::class::{Body, ClassError, Json};

pub(super) fn json(value: &Json) -> Response<Body> {
    let mut response = Response::new(Body::from(value.to_string()));
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

pub(super) fn empty(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    response
}

/// The parameters of a query string, decoded. A name without `=` has the value "".
pub(super) fn query(request: &Request<Body>) -> Result<Vec<(String, String)>, ClassError> {
    let decode = |text: &str| {
        let spaced = text.replace('+', " ");
        percent_decode_str(&spaced)
            .decode_utf8()
            .map(|text| text.into_owned())
            .map_err(|_| {
                ClassError::BadRequest(format!("query {text:?} is not UTF-8 after decoding"))
            })
    };
    request
        .uri()
        .query()
        .unwrap_or("")
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            Ok((decode(name)?, decode(value)?))
        })
        .collect()
}

/// A query parameter as a number.
pub(super) fn number<N: FromStr<Err: Display>>(name: &str, text: &str) -> Result<N, ClassError> {
    text.parse()
        .map_err(|error| ClassError::BadRequest(format!("{name}={text:?} is not valid: {error}")))
}

pub(super) fn unknown_parameter(name: &str, known: &str) -> ClassError {
    ClassError::BadRequest(format!("unknown parameter {name:?}; known: {known}"))
}
