//! Patterns of paths and hosts.

use std::cmp::Ordering;

use crate::asked::{PARAMS_MAX, Params, decode};

/// A pattern of paths: `/users/{id}/posts/{rest...}`.
///
/// `{x}` is one segment that is not empty. `{x...}` is the rest of the path with its slashes, may be empty,
/// and is possible at the end only; `*` is a rest without a name. `/shop/*` is also `/shop`. Without
/// a rest, `/a` and `/a/` are different.
///
/// Literal segments are compared percent-decoded, and runs of slashes count as one, because that is how
/// most servers behind understand a path: `/%61dmin` and `//admin` must not slip past a route for
/// `/admin`. Upper and lower case differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathPattern {
    segments: Vec<Segment>,
    end: End,
    params: Vec<Box<str>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Segment {
    Literal(Box<str>),
    Param,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Here,
    Slash,
    /// Anything, and whether it is a parameter.
    Rest {
        named: bool,
    },
}

impl PathPattern {
    /// # Errors
    /// The rule that the text breaks.
    pub fn new(text: &str) -> Result<Self, String> {
        let Some(inner) = text.strip_prefix('/') else {
            return Err("must begin with /".to_owned());
        };
        let mut pattern = Self {
            segments: Vec::new(),
            end: End::Here,
            params: Vec::new(),
        };
        let mut parts = inner.split('/').peekable();
        while let Some(part) = parts.next() {
            let last = parts.peek().is_none();
            match part
                .strip_prefix('{')
                .and_then(|part| part.strip_suffix('}'))
            {
                Some(name) if let Some(name) = name.strip_suffix("...") => {
                    pattern.param(name)?;
                    pattern.rest(last, true)?;
                }
                Some(name) => {
                    pattern.param(name)?;
                    pattern.segments.push(Segment::Param);
                }
                None if part == "*" => pattern.rest(last, false)?,
                None if part.is_empty() && last => pattern.end = End::Slash,
                None => pattern.segments.push(literal(part)?),
            }
        }
        if pattern.params.len() > PARAMS_MAX {
            return Err(format!("may have at most {PARAMS_MAX} parameters"));
        }
        Ok(pattern)
    }

    fn param(&mut self, name: &str) -> Result<(), String> {
        let legal = name.starts_with(|first: char| first.is_ascii_alphabetic())
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-');
        if !legal {
            return Err(format!(
                "has the parameter {name:?}, which must be a letter, then letters, digits, - or _"
            ));
        }
        if self.params.iter().any(|known| **known == *name) {
            return Err(format!("has two parameters {name:?}"));
        }
        self.params.push(name.into());
        Ok(())
    }

    fn rest(&mut self, last: bool, named: bool) -> Result<(), String> {
        if !last {
            return Err("may have * and {x...} only at the end".to_owned());
        }
        self.end = End::Rest { named };
        Ok(())
    }

    /// Names of the parameters, in their order in the path.
    pub fn params(&self) -> &[Box<str>] {
        &self.params
    }

    /// Whether every path that matches begins with this segment.
    pub fn begins_with(&self, segment: &str) -> bool {
        matches!(self.segments.first(), Some(Segment::Literal(first)) if **first == *segment)
    }

    /// Where the parameters are in `path`, if it matches.
    pub fn matches(&self, path: &str) -> Option<Params> {
        if !path.starts_with('/') {
            return None;
        }
        let mut params = Params::default();
        let mut at = 0;
        for segment in &self.segments {
            let start = path.len() - path[at..].strip_prefix('/')?.trim_start_matches('/').len();
            let end = path[start..]
                .find('/')
                .map_or(path.len(), |length| start + length);
            match segment {
                _ if start == end => return None,
                Segment::Literal(wanted) if !same(&path[start..end], wanted) => return None,
                Segment::Literal(_) => {}
                Segment::Param => params.push(start, end),
            }
            at = end;
        }
        let rest = &path[at..];
        match self.end {
            End::Here => rest.is_empty().then_some(params),
            End::Slash => (!rest.is_empty() && rest.bytes().all(|b| b == b'/')).then_some(params),
            End::Rest { named } => {
                if named {
                    params.push(path.len().min(at + 1), path.len());
                }
                Some(params)
            }
        }
    }

    /// `Greater` is more specific: at the first segment that differs, a literal before a parameter before
    /// a rest; of two that differ nowhere, the longer.
    pub fn specificity(&self, other: &Self) -> Ordering {
        let rank = |segment: Option<&Segment>| match segment {
            Some(Segment::Literal(_)) => 2,
            Some(Segment::Param) => 1,
            None => 0,
        };
        let longer = self.segments.len().max(other.segments.len());
        let here = (0..longer).map(|place| rank(self.segments.get(place)));
        let there = (0..longer).map(|place| rank(other.segments.get(place)));
        let open = |pattern: &Self| matches!(pattern.end, End::Rest { .. });
        here.cmp(there).then_with(|| open(other).cmp(&open(self)))
    }
}

fn literal(part: &str) -> Result<Segment, String> {
    if part.is_empty() {
        return Err("must not have two slashes in a row".to_owned());
    }
    if part.contains(['*', '?', '#', '{', '}']) {
        return Err(format!(
            "has the segment {part:?}: {{x}}, {{x...}} and * must be whole segments, * only at the end, \
             and there is no ? and no #"
        ));
    }
    let decoded =
        decode(part).ok_or_else(|| format!("has the segment {part:?}, which is not UTF-8"))?;
    if decoded == "." || decoded == ".." {
        return Err(format!("has the segment {part:?}, which no request has"));
    }
    Ok(Segment::Literal(decoded.into()))
}

fn same(segment: &str, wanted: &str) -> bool {
    segment == wanted || (segment.contains('%') && decode(segment).is_some_and(|d| d == *wanted))
}

/// Whether a path has a segment `.` or `..`, percent-encoded or not. Browsers and most clients resolve
/// those; a request that still has them tries to look like another.
pub fn has_dot_segment(path: &str) -> bool {
    if !path.contains("/.") && !path.contains("%2") {
        return false;
    }
    path.split('/')
        .any(|segment| same(segment, ".") || same(segment, ".."))
}

/// A pattern of hosts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostPattern {
    Exact(Box<str>),
    /// `.example.org`, in lower case: any host with one label or more before it.
    Below(Box<str>),
}

impl HostPattern {
    /// # Errors
    /// The rule that the text breaks.
    pub fn new(text: &str) -> Result<Self, &'static str> {
        let lower = text.to_ascii_lowercase();
        let (name, below) = match lower.strip_prefix("*.") {
            Some(name) => (name, true),
            None => (lower.as_str(), false),
        };
        if name.is_empty() || name.contains(['*', '/', ' ']) {
            return Err("must be a host, or *. and a host");
        }
        if !name.starts_with('[') && name.contains(':') {
            return Err("must be a host without a port");
        }
        Ok(match below {
            true => Self::Below(format!(".{name}").into()),
            false => Self::Exact(name.into()),
        })
    }

    /// `host` has no port.
    pub fn matches(&self, host: &str) -> bool {
        match self {
            Self::Exact(wanted) => host.eq_ignore_ascii_case(wanted),
            Self::Below(suffix) => {
                let (host, suffix) = (host.as_bytes(), suffix.as_bytes());
                host.len() > suffix.len()
                    && host[host.len() - suffix.len()..].eq_ignore_ascii_case(suffix)
            }
        }
    }

    /// Exact ones before others, longer ones before shorter ones.
    pub fn rank(&self) -> (bool, usize) {
        match self {
            Self::Exact(name) => (true, name.len()),
            Self::Below(suffix) => (false, suffix.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The parameters by `,`, or `-` if the path does not match.
    #[track_caller]
    fn check(pattern: &str, path: &str, want: &str) {
        let pattern = PathPattern::new(pattern).unwrap();
        let got = pattern.matches(path).map(|params| {
            let values = (0..pattern.params().len()).map(|n| params.get(n, path).unwrap());
            values.collect::<Vec<_>>().join(",")
        });
        assert_eq!(got.as_deref().unwrap_or("-"), want, "{pattern:?} {path}");
    }

    #[test]
    fn parameters_are_segments_and_rests() {
        check("/users/{id}", "/users/7", "7");
        check("/users/{id}", "/users/a%2Fb", "a%2Fb");
        check("/users/{id}", "/users/", "-");
        check("/users/{id}", "/users/7/", "-");
        check("/users/{id}/posts/{rest...}", "/users/7/posts/a/b", "7,a/b");
        check("/users/{id}/posts/{rest...}", "/users/7/posts/", "7,");
        check("/users/{id}/posts/{rest...}", "/users/7/posts", "7,");
        check("/users/{id}/posts/{rest...}", "/users/7/postscript", "-");
        check("/{all...}", "/a/b", "a/b");
        check("/{all...}", "/", "");
    }

    #[test]
    fn a_star_is_a_rest_without_a_name() {
        check("/shop/*", "/shop", "");
        check("/shop/*", "/shop/", "");
        check("/shop/*", "/shop/x/y", "");
        check("/shop/*", "/shopping", "-");
        check("/*", "/", "");
        check("/*", "*", "-");
    }

    #[test]
    fn without_a_rest_the_last_slash_counts() {
        check("/a", "/a", "");
        check("/a", "/a/", "-");
        check("/a/", "/a/", "");
        check("/a/", "/a", "-");
        check("/", "/", "");
        check("/", "/a", "-");
    }

    #[test]
    fn other_spellings_of_a_path_do_not_slip_past() {
        check("/admin/*", "/%61dmin/x", "");
        check("/admin/*", "//admin/x", "");
        check("/a/b", "/a//b", "");
        check("/caf%C3%A9", "/caf\u{e9}", "");
        check("/caf\u{e9}", "/caf%c3%a9", "");
        check("/admin", "/Admin", "-");
        assert!(has_dot_segment("/a/../b"));
        assert!(has_dot_segment("/a/%2e%2E/b"));
        assert!(has_dot_segment("/a/."));
        assert!(has_dot_segment("/a/.%2e"));
        assert!(!has_dot_segment("/a/.well-known/..."));
        assert!(!has_dot_segment("/a%2Fb"));
    }

    #[test]
    fn the_more_specific_pattern_is_greater() {
        let ascending = [
            "/*",
            "/{a}/*",
            "/{a}",
            "/{a}/x",
            "/shop/*",
            "/shop",
            "/shop/{a}",
            "/shop/cart",
        ];
        for pair in ascending.windows(2) {
            let [less, more] = pair
                .iter()
                .map(|p| PathPattern::new(p).unwrap())
                .collect::<Vec<_>>()
                .try_into()
                .unwrap();
            assert_eq!(more.specificity(&less), Ordering::Greater, "{pair:?}");
            assert_eq!(less.specificity(&more), Ordering::Less, "{pair:?}");
        }
    }

    #[test]
    fn patterns_that_mean_nothing_are_refused() {
        let refused = |text: &str, want: &str| {
            let error = PathPattern::new(text).unwrap_err();
            assert!(error.contains(want), "{error:?} should say {want:?}");
        };
        refused("x", "must begin with /");
        refused("/a*b", "must be whole segments");
        refused("/*/b", "only at the end");
        refused("/{a...}/b", "only at the end");
        refused("/{a}/{a}", "two parameters \"a\"");
        refused("/{}", "must be a letter");
        refused("/x{a}", "must be whole segments");
        refused("/a//b", "two slashes in a row");
        refused("/a/../b", "which no request has");
        refused("/a?b", "no ? and no #");
        refused(
            "/{a}/{b}/{c}/{d}/{e}/{f}/{g}/{h}/{i}",
            "at most 8 parameters",
        );
    }

    #[test]
    fn hosts_match_whole_or_below() {
        let check = |pattern: &str, host: &str, want: bool| {
            let pattern = HostPattern::new(pattern).unwrap();
            assert_eq!(pattern.matches(host), want, "{pattern:?} {host}");
        };
        check("Example.org", "example.ORG", true);
        check("example.org", "a.example.org", false);
        check("*.example.org", "a.example.org", true);
        check("*.example.org", "a.b.Example.org", true);
        check("*.example.org", "example.org", false);
        check("*.example.org", ".example.org", false);
        check("*.example.org", "badexample.org", false);
        check("[::1]", "[::1]", true);
        assert!(
            HostPattern::new("a:80")
                .unwrap_err()
                .contains("without a port")
        );
        assert!(HostPattern::new("*").is_err());
        assert!(HostPattern::new("a.*.b").is_err());
    }

    proptest! {
        #[test]
        fn no_path_makes_matching_panic(pattern in "(/|/a|/\\{x\\}|/\\*|/\\{y\\.\\.\\.\\}){0,4}", path in "\\PC{0,20}|[/a%.2eé]{0,12}") {
            if let Ok(pattern) = PathPattern::new(&pattern)
                && let Some(params) = pattern.matches(&path)
            {
                for number in 0..pattern.params().len() {
                    prop_assert!(params.get(number, &path).is_some());
                }
            }
            has_dot_segment(&path);
        }
    }
}
