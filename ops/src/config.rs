//! Reading a config file, with errors that name line, key, value and rule.

use std::path::{Path, PathBuf};

use http::HeaderValue;
use serde::de::DeserializeOwned;

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
}

/// Reads a TOML file into `C`. What the file leaves out keeps its default.
pub fn read<C: DeserializeOwned>(path: &Path) -> Result<C, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })?;
    toml::from_str(&text).map_err(|source| ConfigError::Parse {
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
