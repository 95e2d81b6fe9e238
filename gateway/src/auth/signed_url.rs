//! URLs that whoever has the secret signed for others, until a time.
//!
//! Such a URL has the query parameters `expires` (seconds since 1970) and, anywhere, `sig`: the HMAC-SHA256
//! (RFC 2104) of the text below as 64 hex digits, or in base64url without padding.
//!
//! ```text
//! METHOD \n PATH \n QUERY
//! ```
//!
//! METHOD in upper case (HEAD counts as GET), PATH and QUERY byte for byte as they are sent, QUERY without
//! `sig` and its `&`. The host is not signed: a secret is for one deployment. In a shell:
//!
//! ```sh
//! printf 'GET\n/files/a.pdf\nexpires=1893456000' | openssl dgst -sha256 -hmac "$SECRET"
//! ```

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use hmac::{Hmac, Mac};
use http::Method;
use serde::{Deserialize, Serialize};
use sha2::Sha256;

use super::{Denied, hex, unix_seconds};
use crate::asked::Asked;

/// A shorter secret could be guessed from one URL.
const SECRET_BYTES_MIN: usize = 16;

/// `signed_url`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignedUrlConfig {
    /// Any of them may have signed: give the new one and the old one while you change it.
    pub secrets: Vec<String>,
}

pub(super) struct SignedUrl {
    keys: Vec<Hmac<Sha256>>,
}

impl SignedUrl {
    pub(super) fn new(config: &SignedUrlConfig) -> Result<Self, String> {
        if config.secrets.is_empty() {
            return Err("secrets must not be empty".to_owned());
        }
        let key = |secret: &String| match secret.len() < SECRET_BYTES_MIN {
            true => Err(format!(
                "a secret of {} bytes must have at least {SECRET_BYTES_MIN}",
                secret.len()
            )),
            false => Hmac::new_from_slice(secret.as_bytes()).map_err(|error| error.to_string()),
        };
        let keys = config.secrets.iter().map(key).collect::<Result<_, _>>()?;
        Ok(Self { keys })
    }

    pub(super) fn check(&self, asked: &Asked<'_>) -> Result<(), Denied> {
        self.check_at(asked, unix_seconds())
    }

    fn check_at(&self, asked: &Asked<'_>, now: u64) -> Result<(), Denied> {
        let wrong = |rule: &str| Denied::Wrong(rule.to_owned());
        let pairs = asked.query.unwrap_or("").split('&');
        let mut signature = None;
        let mut expires = None;
        let mut signed = String::new();
        for pair in pairs {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            if name == "sig" {
                if signature.replace(value).is_some() {
                    return Err(wrong("the query has sig twice"));
                }
                continue;
            }
            if name == "expires" && expires.replace(value).is_some() {
                return Err(wrong("the query has expires twice"));
            }
            if !signed.is_empty() {
                signed.push('&');
            }
            signed.push_str(pair);
        }
        let signature = signature.ok_or(Denied::Absent)?;
        let signature = decode(signature)
            .ok_or_else(|| wrong("sig must be 32 bytes as 64 hex digits or in base64url"))?;
        let method = match *asked.method {
            Method::HEAD => "GET",
            ref method => method.as_str(),
        };
        let parts = [method, "\n", asked.path, "\n", &signed];
        let is_right = self.keys.iter().any(|key| {
            let mac = parts
                .iter()
                .fold(key.clone(), |mac, part| mac.chain_update(part));
            // Compares in constant time.
            mac.verify_slice(&signature).is_ok()
        });
        if !is_right {
            return Err(wrong("the signature of the URL is not right"));
        }
        let expires = expires.and_then(|expires| expires.parse::<u64>().ok());
        match expires {
            None => Err(wrong("a signed URL must say when it expires")),
            Some(expires) if expires <= now => {
                Err(Denied::Forbidden("the URL has expired".to_owned()))
            }
            Some(_) => Ok(()),
        }
    }
}

fn decode(signature: &str) -> Option<Vec<u8>> {
    match signature.len() {
        64 => hex(signature).map(Vec::from),
        _ => BASE64_URL_SAFE_NO_PAD
            .decode(signature)
            .ok()
            .filter(|bytes| bytes.len() == 32),
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;

    use super::*;
    use crate::asked::tests::asked;

    fn url() -> SignedUrl {
        let secrets = ["a secret of this test", "the secret before that"];
        SignedUrl::new(&SignedUrlConfig {
            secrets: secrets.map(str::to_owned).to_vec(),
        })
        .unwrap()
    }

    #[track_caller]
    fn check(target: &str, now: u64, want: Result<(), &str>) {
        let headers = HeaderMap::new();
        let checked = url().check_at(&asked(target, &headers), now);
        match (checked, want) {
            (Ok(()), Ok(())) => {}
            (Err(Denied::Absent), Err("absent")) => {}
            (Err(Denied::Wrong(text) | Denied::Forbidden(text)), Err(want)) => {
                assert!(text.contains(want), "{text:?} should say {want:?}");
            }
            (checked, want) => panic!("{checked:?} instead of {want:?}"),
        }
    }

    /// `printf 'GET\n/files/a%%20b.pdf\nv=2&expires=2000' | openssl dgst -sha256 -hmac 'a secret of this test'`
    const HEX: &str = "e9734d46f616343e4dc8daa6015b31a46c3d34ec0bdb5c188357c777ff854b9a";

    #[test]
    fn a_url_is_good_as_it_was_signed_and_until_it_expires() {
        let good = format!("/files/a%20b.pdf?v=2&expires=2000&sig={HEX}");
        check(&good, 1999, Ok(()));
        check(
            &format!("/files/a%20b.pdf?sig={HEX}&v=2&expires=2000"),
            1999,
            Ok(()),
        );
        check(&good, 2000, Err("expired"));
        check(&good.replace("2000", "3000"), 1999, Err("not right"));
        check(&good.replace("a%20b", "a%20c"), 1999, Err("not right"));
        check(&good.replace("v=2&", ""), 1999, Err("not right"));
        check(&format!("{good}&x=1"), 1999, Err("not right"));
        check(&format!("{good}&sig={HEX}"), 1999, Err("sig twice"));
        check(&format!("{good}&expires=9"), 1999, Err("expires twice"));
        check("/files/a%20b.pdf?expires=2000", 1999, Err("absent"));
        check("/files/a?sig=abc", 1, Err("32 bytes"));
    }

    #[test]
    fn the_old_secret_counts_too_and_every_url_must_expire() {
        let sign = |text: &str| {
            let mac = url().keys[1].clone().chain_update(text);
            BASE64_URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes())
        };
        let signature = sign("GET\n/a\nexpires=5");
        check(&format!("/a?expires=5&sig={signature}"), 4, Ok(()));
        let signature = sign("GET\n/a\n");
        check(
            &format!("/a?sig={signature}"),
            4,
            Err("must say when it expires"),
        );
        let short = SignedUrl::new(&SignedUrlConfig {
            secrets: vec!["short".to_owned()],
        });
        assert!(short.err().unwrap().contains("at least 16"));
    }
}
