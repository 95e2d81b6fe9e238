//! JSON Web Tokens (RFC 7519): signed by somebody whose keys we know, for us, and not expired.
//!
//! The algorithms are a closed list of the configuration, never the token's choice (RFC 8725, 3.1). A token
//! that was found good is remembered until it expires or the keys change: a signature costs more than the
//! rest of a request.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dashmap::DashMap;
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, AlgorithmFamily, DecodingKey, Validation, decode, decode_header};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio::runtime::Handle;

use super::jwks::{Key, KeySet, Source};
use super::{Claims, Denied, Place, unix_seconds};
use crate::asked::Asked;

/// Longer tokens are refused unread.
const TOKEN_BYTES_MAX: usize = 16 << 10;

/// Tokens that are remembered as good.
const REMEMBERED_MAX: usize = 10_000;

/// RFC 7518, 3.2: a secret is at least as long as the hash.
const SECRET_BYTES_MIN: usize = 32;

/// `jwt`: exactly one of `jwks_file`, `jwks_url` and `secret`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JwtConfig {
    /// `header.NAME` (there may be `Bearer ` before the token), `query.NAME` or `cookie.NAME`.
    #[serde(default = "place")]
    pub r#in: String,
    /// Of RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, EdDSA; with a secret HS256, HS384, HS512.
    pub algorithms: Vec<String>,
    /// A file with a JWK set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jwks_file: Option<PathBuf>,
    /// `http://` or `https://`, with a JWK set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jwks_url: Option<String>,
    /// At least 32 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<String>,
    /// How often the set is read again. One signed with an unknown key makes that sooner.
    #[serde(default = "refresh", with = "humantime_serde")]
    pub refresh: Duration,
    /// `iss` must be one of them. Empty: anybody.
    #[serde(default)]
    pub issuers: Vec<String>,
    /// `aud` must have one of them. Empty: tokens with an `aud` are refused, they are for somebody.
    #[serde(default)]
    pub audiences: Vec<String>,
    /// How much clocks may differ.
    #[serde(default = "leeway", with = "humantime_serde")]
    pub leeway: Duration,
    /// Claims that must have these values, or `forbidden`; a list must contain it.
    #[serde(default)]
    pub claims: BTreeMap<String, String>,
}

fn place() -> String {
    "header.authorization".to_owned()
}

fn refresh() -> Duration {
    Duration::from_secs(300)
}

fn leeway() -> Duration {
    Duration::from_secs(30)
}

pub(super) struct Jwt {
    place: Place,
    keys: Keys,
    validation: Validation,
    claims: BTreeMap<String, String>,
    /// By SHA-256 of the token.
    remembered: DashMap<[u8; 32], Remembered>,
}

enum Keys {
    Secret(DecodingKey),
    Set(Arc<KeySet>),
}

#[derive(Clone)]
struct Remembered {
    claims: Claims,
    /// Seconds since 1970, leeway included.
    until: u64,
    /// Of the keys.
    generation: u64,
}

impl Jwt {
    pub(super) fn new(config: &JwtConfig) -> Result<Self, String> {
        let (keys, secret) = match (&config.secret, &config.jwks_file, &config.jwks_url) {
            (Some(secret), None, None) if secret.len() < SECRET_BYTES_MIN => {
                return Err(format!(
                    "secret has {} bytes; it must have at least {SECRET_BYTES_MIN}",
                    secret.len()
                ));
            }
            (Some(secret), None, None) => (
                Keys::Secret(DecodingKey::from_secret(secret.as_bytes())),
                true,
            ),
            (None, Some(file), None) => (keys(Source::File(file.clone()), config)?, false),
            (None, None, Some(url)) => {
                if !url.starts_with("https://") && !url.starts_with("http://") {
                    return Err(format!(
                        "jwks_url = {url:?} must begin with https:// or http://"
                    ));
                }
                (keys(Source::Url(url.clone()), config)?, false)
            }
            _ => {
                return Err(
                    "exactly one of jwks_file, jwks_url and secret must be there".to_owned(),
                );
            }
        };
        Ok(Self {
            place: Place::parse(&config.r#in)?,
            keys,
            validation: validation(config, secret)?,
            claims: config.claims.clone(),
            remembered: DashMap::new(),
        })
    }

    /// Starts what keeps the keys current.
    pub(super) fn keep(&self, runtime: &Handle) {
        if let Keys::Set(set) = &self.keys {
            set.keep(runtime);
        }
    }

    pub(super) fn identify(&self, asked: &Asked<'_>) -> Result<Claims, Denied> {
        let token = self.token(asked).ok_or(Denied::Absent)?;
        if token.len() > TOKEN_BYTES_MAX {
            return Err(Denied::Wrong(format!(
                "a token of {} bytes is longer than {TOKEN_BYTES_MAX}",
                token.len()
            )));
        }
        let hash: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        let generation = match &self.keys {
            Keys::Secret(_) => 0,
            Keys::Set(set) => set.generation(),
        };
        let known = self.remembered.get(&hash).map(|known| known.clone());
        let good =
            |known: &Remembered| known.generation == generation && unix_seconds() < known.until;
        let claims = match known.filter(good) {
            Some(known) => known.claims,
            None => {
                let claims = self.verify(&token)?;
                self.remember(hash, &claims, generation);
                claims
            }
        };
        self.allow(&claims)?;
        Ok(claims)
    }

    fn token<'a>(&self, asked: &Asked<'a>) -> Option<Cow<'a, str>> {
        let found = self.place.find(asked)?;
        let Cow::Borrowed(text) = found else {
            return Some(found);
        };
        // The scheme is case-insensitive (RFC 9110, 11.1).
        match text.split_once(' ') {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => {
                Some(token.trim().into())
            }
            // Other credentials, not for us.
            Some(_) => None,
            None => Some(text.into()),
        }
    }

    fn verify(&self, token: &str) -> Result<Claims, Denied> {
        let wrong = |text: &str| Denied::Wrong(text.to_owned());
        let header = decode_header(token).map_err(|_| wrong("the token is no JWT"))?;
        if !self.validation.algorithms.contains(&header.alg) {
            return Err(Denied::Wrong(format!(
                "tokens signed with {:?} are not accepted here",
                header.alg
            )));
        }
        let set = match &self.keys {
            Keys::Secret(key) => return self.decode(token, key).map_err(|kind| denied(&kind)),
            Keys::Set(set) => set,
        };
        let keys = set.keys().ok_or_else(|| {
            Denied::Unavailable("the keys of tokens could not be read yet".to_owned())
        })?;
        let fits = |key: &&Key| {
            let named = header.kid.is_none() || key.id.is_none() || key.id == header.kid;
            named
                && key.key.family() == family(header.alg)
                && key
                    .algorithm
                    .is_none_or(|algorithm| algorithm == header.alg)
        };
        let mut last = None;
        for key in keys.iter().filter(fits) {
            match self.decode(token, &key.key) {
                Ok(claims) => return Ok(claims),
                // Perhaps another key; all else would be wrong with any.
                Err(ErrorKind::InvalidSignature) => last = Some(ErrorKind::InvalidSignature),
                Err(kind) => return Err(denied(&kind)),
            }
        }
        // It may be a new one.
        set.hurry();
        Err(last.map_or_else(
            || wrong("the token is signed with a key that is not known here"),
            |kind| denied(&kind),
        ))
    }

    fn decode(&self, token: &str, key: &DecodingKey) -> Result<Claims, ErrorKind> {
        match decode::<Value>(token, key, &self.validation) {
            Ok(token) => Ok(Arc::new(token.claims)),
            Err(error) => Err(error.into_kind()),
        }
    }

    fn remember(&self, hash: [u8; 32], claims: &Claims, generation: u64) {
        let Some(expires) = claims.get("exp").and_then(Value::as_u64) else {
            return;
        };
        if self.remembered.len() >= REMEMBERED_MAX {
            let now = unix_seconds();
            self.remembered
                .retain(|_, known| known.until > now && known.generation == generation);
            if self.remembered.len() >= REMEMBERED_MAX {
                self.remembered.clear();
            }
        }
        let remembered = Remembered {
            claims: Arc::clone(claims),
            until: expires.saturating_add(self.validation.leeway),
            generation,
        };
        self.remembered.insert(hash, remembered);
    }

    fn allow(&self, claims: &Value) -> Result<(), Denied> {
        let has = |found: &Value, wanted: &str| match found {
            Value::String(text) => text == wanted,
            Value::Number(number) => number.to_string() == wanted,
            Value::Bool(flag) => flag.to_string() == wanted,
            Value::Null | Value::Array(_) | Value::Object(_) => false,
        };
        for (name, wanted) in &self.claims {
            let allowed = match claims.get(name) {
                Some(Value::Array(list)) => list.iter().any(|found| has(found, wanted)),
                // RFC 8693, 4.2: a scope is words with spaces between them.
                Some(Value::String(text)) if name == "scope" => {
                    text.split(' ').any(|word| word == wanted)
                }
                Some(found) => has(found, wanted),
                None => false,
            };
            if !allowed {
                return Err(Denied::Forbidden(format!(
                    "the token's claim {name:?} does not have the value that this needs"
                )));
            }
        }
        Ok(())
    }
}

fn keys(source: Source, config: &JwtConfig) -> Result<Keys, String> {
    if config.refresh < Duration::from_secs(1) {
        return Err(format!(
            "refresh = {:?} must be at least 1s",
            config.refresh
        ));
    }
    let set = KeySet::new(source, config.refresh);
    set.map(|set| Keys::Set(Arc::new(set)))
        .map_err(|error| ops::Causes(&error).to_string())
}

fn validation(config: &JwtConfig, secret: bool) -> Result<Validation, String> {
    let mut algorithms = Vec::with_capacity(config.algorithms.len());
    for name in &config.algorithms {
        let algorithm: Algorithm = name
            .parse()
            .map_err(|_| format!("algorithms: {name:?} is not known"))?;
        // A public key must never be taken for a secret (RFC 8725, 2.1).
        if (family(algorithm) == AlgorithmFamily::Hmac) != secret {
            return Err(format!(
                "algorithms: {name} does not go with {}",
                if secret { "a secret" } else { "public keys" }
            ));
        }
        algorithms.push(algorithm);
    }
    let first = algorithms
        .first()
        .ok_or("algorithms must not be empty: name those that your issuer signs with")?;
    let mut validation = Validation::new(*first);
    validation.algorithms.clone_from(&algorithms);
    validation.leeway = config.leeway.as_secs();
    validation.validate_nbf = true;
    let mut required = vec!["exp"];
    if !config.issuers.is_empty() {
        validation.set_issuer(&config.issuers);
        required.push("iss");
    }
    if !config.audiences.is_empty() {
        validation.set_audience(&config.audiences);
        required.push("aud");
    }
    validation.set_required_spec_claims(&required);
    Ok(validation)
}

fn family(algorithm: Algorithm) -> AlgorithmFamily {
    let families = [
        AlgorithmFamily::Hmac,
        AlgorithmFamily::Rsa,
        AlgorithmFamily::Ec,
    ];
    let of = |family: &AlgorithmFamily| family.algorithms().contains(&algorithm);
    families.into_iter().find(of).unwrap_or(AlgorithmFamily::Ed)
}

/// What the client may know.
fn denied(kind: &ErrorKind) -> Denied {
    let rule = match kind {
        ErrorKind::ExpiredSignature => "the token has expired",
        ErrorKind::ImmatureSignature => "the token is not valid yet",
        ErrorKind::InvalidIssuer => "the token is from another issuer",
        ErrorKind::InvalidAudience => "the token is for another audience",
        ErrorKind::InvalidSignature => "the signature of the token is not right",
        ErrorKind::MissingRequiredClaim(claim) => {
            return Denied::Wrong(format!("the token has no claim {claim:?}"));
        }
        _ => "the token is not valid",
    };
    Denied::Wrong(rule.to_owned())
}
