//! API keys. The configuration has their SHA-256, so that reading it gives nobody a key.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use super::{Claims, Denied, Place, hex};
use crate::asked::Asked;

/// Every key is compared with all, so that the time tells nothing.
const KEYS_MAX: usize = 10_000;

/// `api_keys`: a secret per caller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApiKeysConfig {
    /// `header.NAME`, `query.NAME` or `cookie.NAME`.
    #[serde(default = "place")]
    pub r#in: String,
    /// Callers by name, each with the SHA-256 of its key as 64 hex digits (`printf %s KEY | sha256sum`).
    /// Keys must be random: the hash is a fast one.
    pub keys: BTreeMap<String, String>,
}

fn place() -> String {
    "header.x-api-key".to_owned()
}

pub(super) struct ApiKeys {
    place: Place,
    keys: Vec<([u8; 32], Claims)>,
}

impl ApiKeys {
    pub(super) fn new(config: &ApiKeysConfig) -> Result<Self, String> {
        if config.keys.is_empty() || config.keys.len() > KEYS_MAX {
            return Err(format!(
                "keys has {} entries; it must have from 1 to {KEYS_MAX}",
                config.keys.len()
            ));
        }
        let mut keys = Vec::with_capacity(config.keys.len());
        for (name, hash) in &config.keys {
            let hash = hex(hash)
                .ok_or_else(|| format!("keys.{name} must be a SHA-256 as 64 hex digits"))?;
            keys.push((hash, Arc::new(json!({ "sub": name }))));
        }
        Ok(Self {
            place: Place::parse(&config.r#in)?,
            keys,
        })
    }

    pub(super) fn identify(&self, asked: &Asked<'_>) -> Result<Claims, Denied> {
        let given = self.place.find(asked).ok_or(Denied::Absent)?;
        let given: [u8; 32] = Sha256::digest(given.as_bytes()).into();
        let mut found = u32::MAX;
        for (number, (hash, _)) in (0u32..).zip(&self.keys) {
            let same: Choice = hash.ct_eq(&given);
            found.conditional_assign(&number, same);
        }
        match self.keys.get(found as usize) {
            Some((_, claims)) => Ok(Arc::clone(claims)),
            None => Err(Denied::Wrong("the API key is not a known one".to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;

    use super::*;
    use crate::asked::tests::asked;

    fn keys(r#in: &str) -> ApiKeys {
        let hash = |key: &str| format!("{:x}", Sha256::digest(key));
        ApiKeys::new(&ApiKeysConfig {
            r#in: r#in.to_owned(),
            keys: [("ada", "secret-a"), ("bob", "secret-b")]
                .map(|(name, key)| (name.to_owned(), hash(key)))
                .into(),
        })
        .unwrap()
    }

    #[test]
    fn a_key_is_known_by_its_hash() {
        let mut headers = HeaderMap::new();
        headers.insert("x-api-key", "secret-b".parse().unwrap());
        let who = |place: &str, target: &str| keys(place).identify(&asked(target, &headers));
        assert_eq!(who("header.x-api-key", "/").unwrap()["sub"], "bob");
        assert_eq!(who("query.key", "/?key=secret-a").unwrap()["sub"], "ada");
        assert_eq!(who("query.key", "/"), Err(Denied::Absent));
        assert_eq!(who("query.key", "/?key="), Err(Denied::Absent));
        let Err(Denied::Wrong(detail)) = who("query.key", "/?key=secret") else {
            panic!("a wrong key passed");
        };
        assert!(!detail.contains("secret"), "{detail}");
    }

    #[test]
    fn what_is_no_hash_is_refused() {
        let broken = |hash: &str| {
            ApiKeys::new(&ApiKeysConfig {
                r#in: place(),
                keys: [("ada".to_owned(), hash.to_owned())].into(),
            })
            .err()
            .unwrap()
        };
        assert!(broken("secret").contains("keys.ada must be a SHA-256"));
        assert!(broken(&"+a".repeat(32)).contains("keys.ada"));
        assert!(broken(&"a".repeat(65)).contains("keys.ada"));
    }
}
