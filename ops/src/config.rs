//! Reading a config file, with errors that name line, key, value and rule.

use std::fmt;
use std::path::{Path, PathBuf};

use http::HeaderValue;
use serde::de::DeserializeOwned;
use toml::de::{DeTable, DeValue};

/// Why a configuration was refused. Processes answer with exit code 2.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("read config file {path}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    /// The source names line, column and key.
    #[error("config file {path} is not valid")]
    Parse {
        path: PathBuf,
        source: Box<toml::de::Error>,
    },
    /// Each field is legal by itself, but the whole breaks a rule.
    #[error("{0}")]
    Rule(String),
    /// One key breaks a rule, and it is not from a file, or the file does not have it.
    #[error(transparent)]
    Key(#[from] Broken),
    /// One key of a file breaks a rule.
    #[error("config file {path}, line {line}: {broken}")]
    Line {
        path: PathBuf,
        line: usize,
        broken: Broken,
    },
}

impl ConfigError {
    /// Adds the line, where `path` is a file that has the key.
    #[must_use]
    pub fn located(self, path: Option<&Path>) -> Self {
        let (Self::Key(broken), Some(path)) = (&self, path) else {
            return self;
        };
        let text = std::fs::read_to_string(path).unwrap_or_default();
        match broken.line(&text) {
            Some(line) => Self::Line {
                path: path.to_owned(),
                line,
                broken: broken.clone(),
            },
            None => self,
        }
    }
}

/// A key that breaks a rule. Reads like `routes[2].path = "x" must begin with /`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broken {
    /// From the outermost table on; places in arrays are decimal numbers.
    pub key: Vec<String>,
    /// The rule, with the value where that helps.
    pub rule: String,
}

impl std::error::Error for Broken {}

impl Broken {
    /// `key` is the last step only; see [`under`](Self::under).
    pub fn new(key: &str, rule: impl Into<String>) -> Self {
        Self {
            key: vec![key.to_owned()],
            rule: rule.into(),
        }
    }

    /// `= value rule`.
    pub fn value(key: &str, value: impl fmt::Debug, rule: impl fmt::Display) -> Self {
        Self::new(key, format!("= {value:?} {rule}"))
    }

    /// Says in which table or array the key is.
    #[must_use]
    pub fn under(mut self, outer: impl fmt::Display) -> Self {
        self.key.insert(0, outer.to_string());
        self
    }

    /// Where the key is in a file, counted from 1; or else the innermost table around it.
    fn line(&self, text: &str) -> Option<usize> {
        let root = DeTable::parse(text).ok()?;
        let mut here = None;
        let mut inside = None;
        for (depth, step) in self.key.iter().enumerate() {
            let table = match depth {
                0 => Some(root.get_ref()),
                _ => inside.and_then(|value: &DeValue<'_>| value.as_table()),
            };
            let array = inside.and_then(DeValue::as_array);
            if let Some((key, value)) = table.and_then(|table| table.get_key_value(step.as_str())) {
                here = Some(key.span().start);
                inside = Some(value.get_ref());
            } else if let Some(value) =
                array.and_then(|array| array.get(step.parse::<usize>().ok()?))
            {
                here = Some(value.span().start);
                inside = Some(value.get_ref());
            } else {
                break;
            }
        }
        let before = text.get(..here?)?;
        Some(before.matches('\n').count() + 1)
    }
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, step) in self.key.iter().enumerate() {
            match step.parse::<usize>() {
                Ok(place) => write!(f, "[{place}]")?,
                Err(_) if number == 0 => f.write_str(step)?,
                Err(_) => write!(f, ".{step}")?,
            }
        }
        write!(f, " {}", self.rule)
    }
}

/// Reads a TOML file into `C`. What the file leaves out keeps its default.
pub fn read<C: DeserializeOwned>(path: &Path) -> Result<C, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })?;
    parse(&text, path)
}

/// Reads the text of a TOML file; `path` is for messages only.
pub fn parse<C: DeserializeOwned>(text: &str, path: &Path) -> Result<C, ConfigError> {
    toml::from_str(text).map_err(|source| ConfigError::Parse {
        path: path.to_owned(),
        source: Box::new(source),
    })
}

/// A setting whose empty text means "none".
pub fn non_empty(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

/// The cluster's token as the value of a header; `None` if there is none.
pub fn token_header(token: &str) -> Result<Option<HeaderValue>, ConfigError> {
    let value = |token| {
        let mut value = HeaderValue::from_str(token).map_err(|_| {
            ConfigError::Rule("token must be visible ASCII: it travels in a header".to_owned())
        })?;
        value.set_sensitive(true);
        Ok(value)
    };
    non_empty(token).map(value).transpose()
}

/// Refuses an address that is neither loopback nor protected by `token`.
///
/// `what` names the listener and `remedy` the setting that would protect it.
pub fn require_token_off_loopback(
    what: &str,
    address: &str,
    token: Option<&str>,
    remedy: &str,
) -> Result<(), ConfigError> {
    let loopback = match address.parse::<std::net::SocketAddr>() {
        Ok(address) => address.ip().is_loopback(),
        Err(_) => address
            .rsplit_once(':')
            .is_some_and(|(host, _)| host == "localhost"),
    };
    match token {
        Some("") => Err(ConfigError::Rule(format!("{remedy} must not be empty"))),
        None if !loopback => Err(ConfigError::Rule(format!(
            "{what} = {address:?} can be reached from other machines, so it needs {remedy}"
        ))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        #[expect(dead_code, reason = "only parsed")]
        capacity: u32,
    }

    #[test]
    fn a_typo_is_named_with_its_line() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        write!(file, "capacity = 3\ncapacitie = 4\n").unwrap();
        let error = read::<Sample>(file.path()).unwrap_err();
        let text = crate::Causes(&error).to_string();
        assert!(
            text.contains("line 2") && text.contains("capacitie"),
            "{text}"
        );
    }

    #[test]
    fn a_broken_rule_is_named_with_its_line() {
        let text =
            "a = 1\n\n[[routes]]\npath = '/'\n\n[[routes]]\nshard = { by = 'x' }\npath = 'x'\n";
        let line = |key: &[&str]| {
            let key = key.iter().map(|&step| step.to_owned()).collect();
            let rule = String::new();
            Broken { key, rule }.line(text)
        };
        assert_eq!(line(&["a"]), Some(1));
        assert_eq!(line(&["routes", "1", "path"]), Some(8));
        assert_eq!(line(&["routes", "1", "shard", "by"]), Some(7));
        assert_eq!(line(&["routes", "0", "host"]), Some(3), "around it");
        assert_eq!(line(&["b"]), None);
        let broken = Broken::value("path", "x", "must begin with /")
            .under(1)
            .under("routes");
        assert_eq!(
            broken.to_string(),
            "routes[1].path = \"x\" must begin with /"
        );
        let mut file = tempfile::NamedTempFile::new().unwrap();
        write!(file, "{text}").unwrap();
        let error = ConfigError::from(broken).located(Some(file.path()));
        assert!(error.to_string().contains(", line 8: routes[1]"), "{error}");
    }

    #[test]
    fn only_loopback_may_go_without_a_token() {
        let check = |address, token| {
            require_token_off_loopback("listen", address, token, "a token")
                .map_err(|e| e.to_string())
        };
        assert_eq!(check("127.0.0.1:1", None), Ok(()));
        assert_eq!(check("[::1]:1", None), Ok(()));
        assert_eq!(check("localhost:1", None), Ok(()));
        assert_eq!(check("0.0.0.0:1", Some("secret")), Ok(()));
        assert!(check("0.0.0.0:1", None).unwrap_err().contains("0.0.0.0:1"));
        assert!(check("example.net:1", None).is_err());
        assert!(check("127.0.0.1:1", Some("")).is_err());
    }
}
