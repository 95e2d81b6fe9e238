//! What a request asks of a counter: pure.
//!
//! | request | asks |
//! |---|---|
//! | `POST /counters/{name}/increment?by=N` | to add `N`, or 1; once, with an `Idempotency-Key` |
//! | `GET /counters/{name}?exact=true` | for the value |

use http::{HeaderMap, HeaderName, Method};
use ops::config::Broken;
use protocol::counters::{CounterName, KEY_BYTES_MAX, key_hash};
use protocol::{ObjectName, Problem};

use crate::asked::Asked;
use crate::template::Template;

pub(crate) const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// What is asked of one counter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CounterAsk {
    pub name: CounterName,
    pub what: What,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    Increment(Increment),
    /// `exact`: every shard is asked now.
    Read {
        exact: bool,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Increment {
    pub by: i64,
    /// The client's idempotency key.
    pub key: Option<Box<str>>,
    /// The hash of who asks, or what is missing for that; only counters that shard by it need to know.
    pub client: Result<u64, String>,
}

/// The template of who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ClientKey(Template);

impl Default for ClientKey {
    fn default() -> Self {
        let default = super::config::CountersConfig::default();
        Self::new(&default.key).expect("the default is a template")
    }
}

impl ClientKey {
    /// # Errors
    /// The text is no template of a key.
    pub(crate) fn new(text: &str) -> Result<Self, Broken> {
        let template = Template::key(text, &[]);
        let template = template.map_err(|error| Broken::new("key", format!("is no {error}")))?;
        let constant = template.sources().next().is_none();
        match constant {
            false => Ok(Self(template)),
            true => Err(Broken::value(
                "key",
                text,
                "must take something from the request, or all clients are one",
            )),
        }
    }

    fn hash(&self, asked: &Asked<'_>) -> Result<u64, String> {
        let mut text = String::new();
        match self.0.render(asked, &mut text) {
            Ok(()) => Ok(key_hash(&text)),
            Err(incomplete) => Err(format!("counters.key: {incomplete}")),
        }
    }
}

/// `{name}` and `{name}/increment`.
pub(crate) fn contract(
    client: &ClientKey,
    asked: &Asked<'_>,
    rest: &str,
) -> Result<CounterAsk, Problem> {
    let (segment, action) = match rest.split_once('/') {
        Some((segment, action)) => (segment, Some(action)),
        None => (rest, None),
    };
    let expected: &[Method] = match action {
        _ if segment.is_empty() => return Err(nothing_here(asked)),
        None => &[Method::GET, Method::HEAD],
        Some("increment") => &[Method::POST],
        Some(_) => return Err(nothing_here(asked)),
    };
    if !expected.contains(asked.method) {
        let allow: Vec<&str> = expected.iter().map(Method::as_str).collect();
        return Err(Problem::method_not_allowed(
            allow.join(", "),
            format!(
                "{} is not offered here; GET /counters/{{name}} is the value, and POST \
                 /counters/{{name}}/increment?by=N adds",
                asked.method
            ),
        ));
    }
    let name = ObjectName::decode(segment).map_err(bad_request)?;
    let name = CounterName::new(name).map_err(bad_request)?;
    let what = match action {
        None => What::Read {
            exact: exact(asked)?,
        },
        Some(_) => {
            let by = query(asked, "by")?;
            What::Increment(increment(client, asked, by.as_deref().unwrap_or("1"))?)
        }
    };
    Ok(CounterAsk { name, what })
}

fn nothing_here(asked: &Asked<'_>) -> Problem {
    Problem::not_found(format!(
        "nothing is at {:?}; there are GET /counters/{{name}} and POST /counters/{{name}}/increment; a / in \
         a name is written %2F",
        asked.path
    ))
}

/// An increment, with what the request says of it besides.
pub(crate) fn increment(
    client: &ClientKey,
    asked: &Asked<'_>,
    by: &str,
) -> Result<Increment, Problem> {
    Ok(Increment {
        by: number(by)?,
        key: idempotency_key(asked.headers)?,
        client: client.hash(asked),
    })
}

fn number(by: &str) -> Result<i64, Problem> {
    by.parse().map_err(|_| {
        let shown: String = by.chars().take(40).collect();
        Problem::bad_request(format!(
            "by = {shown:?} must be a whole number from {} to {}",
            i64::MIN,
            i64::MAX
        ))
    })
}

/// A query parameter; one that is there, but no text, is refused.
fn query<'a>(asked: &Asked<'a>, name: &str) -> Result<Option<std::borrow::Cow<'a, str>>, Problem> {
    let pairs = asked.query.unwrap_or("").split('&');
    let mut names = pairs.map(|pair| pair.split_once('=').map_or(pair, |(name, _)| name));
    match asked.query_value(name) {
        None if names.any(|found| found == name) => Err(Problem::bad_request(format!(
            "{name} is not UTF-8 when it is decoded"
        ))),
        found => Ok(found),
    }
}

fn exact(asked: &Asked<'_>) -> Result<bool, Problem> {
    match query(asked, "exact")?.as_deref() {
        None | Some("false") => Ok(false),
        Some("true") => Ok(true),
        Some(other) => {
            let shown: String = other.chars().take(40).collect();
            Err(Problem::bad_request(format!(
                "exact = {shown:?} must be true or false"
            )))
        }
    }
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<Box<str>>, Problem> {
    let mut lines = headers.get_all(IDEMPOTENCY_KEY).iter();
    let Some(line) = lines.next() else {
        return Ok(None);
    };
    if lines.next().is_some() {
        return Err(Problem::bad_request(
            "there is more than one Idempotency-Key; it cannot be told which one counts",
        ));
    }
    let visible = line.as_bytes().iter().all(u8::is_ascii_graphic);
    let text = line.to_str().ok().filter(|_| visible);
    match text {
        Some(text) if (1..=KEY_BYTES_MAX).contains(&text.len()) => Ok(Some(text.into())),
        _ => Err(Problem::bad_request(format!(
            "Idempotency-Key has {} bytes, and must have 1 to {KEY_BYTES_MAX}, all visible ASCII",
            line.len()
        ))),
    }
}

pub(crate) fn bad_request(error: impl std::fmt::Display) -> Problem {
    Problem::bad_request(error.to_string())
}

#[cfg(test)]
mod tests {
    use protocol::ErrorCode;

    use super::*;

    /// `want` is the name, `+N`, `=` or `!` for an exact read, and the key; or the code of the refusal.
    #[track_caller]
    fn check(request: &str, key: Option<&[u8]>, want: Result<&str, ErrorCode>) -> String {
        let (method, target) = request.split_once(' ').unwrap();
        let mut headers = HeaderMap::new();
        if let Some(key) = key {
            headers.insert(IDEMPOTENCY_KEY, http::HeaderValue::from_bytes(key).unwrap());
        }
        let asked = Asked {
            method: &method.parse().unwrap(),
            ..crate::asked::tests::asked(target, &headers)
        };
        let rest = asked.path.strip_prefix("/counters/").unwrap();
        let got = contract(&ClientKey::default(), &asked, rest);
        let detail = got.as_ref().err().map(|problem| problem.detail.clone());
        let got = got.map(|ask| match ask.what {
            What::Read { exact: false } => format!("{} =", ask.name),
            What::Read { exact: true } => format!("{} !", ask.name),
            What::Increment(Increment { by, key, client }) => {
                assert_eq!(client, Ok(key_hash("192.0.2.1")));
                let key = key.map_or(String::new(), |key| format!(" {key}"));
                format!("{} {by:+}{key}", ask.name)
            }
        });
        let got = got.map_err(|problem| problem.code);
        assert_eq!(got.as_deref().map_err(|code| *code), want, "{request}");
        detail.unwrap_or_default()
    }

    #[test]
    fn increments_are_by_one_or_by_what_is_said() {
        check("POST /counters/likes/increment", None, Ok("likes +1"));
        check("POST /counters/a%2Fb/increment?by=5", None, Ok("a/b +5"));
        check("POST /counters/a/increment?x=1&by=-7", None, Ok("a -7"));
        check("POST /counters/a/increment?by=0", None, Ok("a +0"));
        let most = format!("POST /counters/a/increment?by={}", i64::MIN);
        check(&most, None, Ok(&format!("a {}", i64::MIN)));
        let beyond = "POST /counters/a/increment?by=9223372036854775808";
        let detail = check(beyond, None, Err(ErrorCode::BadRequest));
        assert!(
            detail.contains("by = \"9223372036854775808\" must be a whole number"),
            "{detail}"
        );
        for by in ["", "1.5", "ten", "1e3", "%FF", "0x10", "+1"] {
            let request = format!("POST /counters/a/increment?by={by}");
            check(&request, None, Err(ErrorCode::BadRequest));
        }
    }

    #[test]
    fn values_are_read_at_once_or_exactly() {
        check("GET /counters/likes", None, Ok("likes ="));
        check("HEAD /counters/likes?exact=false", None, Ok("likes ="));
        check("GET /counters/likes?exact=true", None, Ok("likes !"));
        let detail = check(
            "GET /counters/a?exact=yes",
            None,
            Err(ErrorCode::BadRequest),
        );
        assert_eq!(detail, "exact = \"yes\" must be true or false");
    }

    #[test]
    fn nothing_else_is_there() {
        for path in [
            "",
            "a/",
            "a/decrement",
            "a/increment/",
            "a/increment/x",
            "/increment",
        ] {
            for method in ["GET", "POST"] {
                let request = format!("{method} /counters/{path}");
                check(&request, None, Err(ErrorCode::NotFound));
            }
        }
        check(
            "GET /counters/a/increment",
            None,
            Err(ErrorCode::MethodNotAllowed),
        );
        check("PUT /counters/a", None, Err(ErrorCode::MethodNotAllowed));
        check("DELETE /counters/a", None, Err(ErrorCode::MethodNotAllowed));
    }

    #[test]
    fn names_are_what_names_of_objects_are_and_a_little_shorter() {
        check("GET /counters/a%00", None, Err(ErrorCode::BadRequest));
        check("GET /counters/%FF", None, Err(ErrorCode::BadRequest));
        let name = "n".repeat(protocol::counters::NAME_BYTES_MAX);
        check(
            &format!("GET /counters/{name}"),
            None,
            Ok(&format!("{name} =")),
        );
        let longer = format!("GET /counters/{name}n");
        let detail = check(&longer, None, Err(ErrorCode::BadRequest));
        assert!(
            detail.contains("has 1001 bytes, and may have 1000"),
            "{detail}"
        );
    }

    #[test]
    fn idempotency_keys_are_visible_and_not_too_long() {
        let add = "POST /counters/a/increment";
        check(add, Some(b"k-1"), Ok("a +1 k-1"));
        let most = "k".repeat(KEY_BYTES_MAX);
        check(add, Some(most.as_bytes()), Ok(&format!("a +1 {most}")));
        for key in [&b""[..], b"a b", b"\xff", b"\t", "k".repeat(256).as_bytes()] {
            let detail = check(add, Some(key), Err(ErrorCode::BadRequest));
            assert!(
                detail.contains("must have 1 to 255, all visible"),
                "{detail}"
            );
        }
    }

    #[test]
    fn a_client_key_takes_something_from_the_request() {
        let refused = |text: &str| ClientKey::new(text).unwrap_err().to_string();
        assert!(refused("fixed").contains("key = \"fixed\" must take something"));
        assert!(
            refused("{nope}").contains("key is no template"),
            "{}",
            refused("{nope}")
        );
        // Who lacks it is refused only where it matters.
        let headers = HeaderMap::new();
        let asked = crate::asked::tests::asked("/", &headers);
        let key = ClientKey::new("{header.x-user}").unwrap();
        let increment = increment(&key, &asked, "1").unwrap();
        assert_eq!(
            increment.client.unwrap_err(),
            "counters.key: header.x-user is missing or empty"
        );
    }
}
