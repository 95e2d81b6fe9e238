//! The public contract: `/objects/…` and `/rpc/…`.

use std::fmt;

use http::Method;
use protocol::{ClassName, Home, ObjectId, ObjectName, Problem, limits};

use super::{Ask, ObjectTarget, Routes};
use crate::asked::Asked;

/// `{class}`, `{class}/{name}`, `{class}/{name}/{path…}`, the name also as `id:{hex}`.
pub(super) fn objects(
    routes: &Routes,
    asked: &Asked<'_>,
    rest: &str,
    random: impl FnOnce() -> [u8; 20],
) -> Result<ObjectTarget, Problem> {
    let (class, rest) = match rest.split_once('/') {
        Some((class, rest)) => (parse_class(class)?, rest),
        None => (parse_class(rest)?, ""),
    };
    if rest.is_empty() {
        if asked.method != Method::POST {
            return Err(Problem::method_not_allowed(
                "POST",
                format!(
                    "{} is not offered here; POST makes a new unique id, and /objects/{class}/{{name}} \
                     is an object",
                    asked.method
                ),
            ));
        }
        let id = ObjectId::unique(&class, routes.home(&class, asked), random());
        return Ok(ObjectTarget {
            class,
            id,
            name: None,
            ask: Ask::Create,
        });
    }
    let (segment, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let (id, name) = identify(&class, segment, routes.home(&class, asked))?;
    let path = if path.is_empty() { "/" } else { path };
    let path_and_query = match asked.query {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    };
    Ok(ObjectTarget {
        class,
        id,
        name,
        ask: Ask::Fetch { path_and_query },
    })
}

/// `{class}/{name}/{method}`.
pub(super) fn rpc(routes: &Routes, asked: &Asked<'_>, rest: &str) -> Result<ObjectTarget, Problem> {
    let mut parts = rest.split('/');
    let (Some(class), Some(segment), Some(method), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(Problem::not_found(format!(
            "{:?} must be /rpc/{{class}}/{{name}}/{{method}}; a / in a name is written %2F",
            asked.path
        )));
    };
    if asked.method != Method::POST {
        return Err(Problem::method_not_allowed(
            "POST",
            format!("{} is not offered here; calls are POST", asked.method),
        ));
    }
    let class = parse_class(class)?;
    let (id, name) = identify(&class, segment, routes.home(&class, asked))?;
    Ok(ObjectTarget {
        class,
        id,
        name,
        ask: Ask::Call {
            method: parse_method(method)?,
        },
    })
}

/// The object that a path segment denotes. `id:` counts only as it is: a name that begins so is
/// written `id%3A`.
fn identify(
    class: &ClassName,
    segment: &str,
    home: Home,
) -> Result<(ObjectId, Option<ObjectName>), Problem> {
    if let Some(hex) = segment.strip_prefix("id:") {
        let id: ObjectId = hex.parse().map_err(bad_request)?;
        return Ok((id.check_class(class).map_err(bad_request)?, None));
    }
    let name = ObjectName::decode(segment).map_err(bad_request)?;
    Ok((ObjectId::named(class, home, &name), Some(name)))
}

fn parse_class(text: &str) -> Result<ClassName, Problem> {
    text.parse().map_err(bad_request)
}

fn parse_method(text: &str) -> Result<String, Problem> {
    method_name(text)
        .map(str::to_owned)
        .map_err(Problem::bad_request)
}

/// # Errors
/// The rule that the name of a method breaks.
pub(super) fn method_name(text: &str) -> Result<&str, String> {
    let legal = text.len() <= limits::METHOD_NAME_BYTES_MAX
        && text.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_')
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if legal {
        Ok(text)
    } else {
        let shown: String = text.chars().take(80).collect();
        Err(format!(
            "method name {shown:?} must be a letter or `_` followed by at most {} letters, digits or `_`",
            limits::METHOD_NAME_BYTES_MAX - 1
        ))
    }
}

pub(super) fn bad_request(error: impl fmt::Display) -> Problem {
    Problem::bad_request(error.to_string())
}
