//! What a client is told when its request goes nowhere.

use http::header::{ACCEPT, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderMap, HeaderName, HeaderValue};
use protocol::{Problem, problem};

/// A problem, and the headers that belong to it.
#[derive(Debug, Clone)]
pub struct Refusal {
    pub problem: Problem,
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// A body for clients that do not ask for a problem document.
    pub text: Option<&'static str>,
}

impl Refusal {
    #[must_use]
    pub fn with(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }

    /// Type and bytes of the body for a client that sent these headers.
    pub fn body(&self, asked: &HeaderMap, request: &str) -> (&'static str, Vec<u8>) {
        match self.text {
            Some(text) if !accepts_problems(asked) => {
                ("text/plain; charset=utf-8", text.as_bytes().to_vec())
            }
            _ => (problem::MEDIA_TYPE, self.problem.to_json(Some(request))),
        }
    }

    /// All headers but those of the body.
    pub fn headers(&self) -> impl Iterator<Item = (HeaderName, HeaderValue)> {
        let own_pause = self.headers.iter().any(|(name, _)| name == RETRY_AFTER);
        let pause = self.problem.retry_after_seconds().filter(|_| !own_pause);
        let pause = pause.map(|seconds| (RETRY_AFTER, HeaderValue::from(seconds)));
        self.headers.iter().cloned().chain(pause)
    }
}

impl From<Problem> for Refusal {
    fn from(problem: Problem) -> Self {
        Self {
            problem,
            headers: Vec::new(),
            text: None,
        }
    }
}

/// Whether a client names the type of problem documents; `*/*` is no wish for one.
fn accepts_problems(headers: &HeaderMap) -> bool {
    let lines = headers.get_all(ACCEPT).iter();
    let mut kinds = lines
        .filter_map(|line| line.to_str().ok())
        .flat_map(|line| line.split(','))
        .filter_map(|kind| kind.split(';').next());
    kinds.any(|kind| kind.trim().eq_ignore_ascii_case(problem::MEDIA_TYPE))
}

/// The type of a body, without its parameters.
pub fn media_type(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(CONTENT_TYPE)?.to_str().ok()?;
    Some(value.split(';').next().unwrap_or(value).trim())
}
