//! Public keys that tokens are checked with: a JWK set (RFC 7517) in a file or at a URL, read again and again.
//!
//! A token signed with a key that is not in the set makes the set be read at once, but not more often than
//! every [`HURRY_MIN`]: so a new key works seconds after it is first used, and strangers cannot make us ask.
//! A set that cannot be read leaves the one before in place.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use jsonwebtoken::jwk::{Jwk, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey};
use ops::Causes;
use serde::Deserialize;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::{info, warn};

/// Shortest pause between two reads because of unknown keys.
const HURRY_MIN: Duration = Duration::from_secs(10);

/// Pause after a failed read of a set of which nothing is known yet.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

const FETCH_MAX: Duration = Duration::from_secs(5);
const SET_BYTES_MAX: usize = 1 << 20;

/// Keys of one set that are used.
const KEYS_MAX: usize = 100;

/// Where a set is.
#[derive(Debug, Clone)]
pub(super) enum Source {
    File(PathBuf),
    Url(String),
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Url(url) => url.fmt(f),
        }
    }
}

/// One key of a set.
pub(super) struct Key {
    pub(super) id: Option<String>,
    pub(super) algorithm: Option<Algorithm>,
    pub(super) key: DecodingKey,
}

/// The keys that are known now.
pub(super) struct KeySet {
    source: Source,
    refresh: Duration,
    keys: ArcSwapOption<Vec<Key>>,
    /// Counts the changes.
    generation: AtomicU64,
    wanted: Notify,
    kept: AtomicBool,
}

/// Why a set was not read.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    #[error("read {path}")]
    File {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("fetch {url}")]
    Fetch { url: String, source: reqwest::Error },
    #[error("{url} sent more than {SET_BYTES_MAX} bytes")]
    TooLarge { url: String },
    #[error("{from} is no JWK set")]
    Set {
        from: String,
        source: serde_json::Error,
    },
    #[error("{from} has no key that could verify a signature")]
    NoKeys { from: String },
}

impl KeySet {
    /// A file is read at once.
    pub(super) fn new(source: Source, refresh: Duration) -> Result<Self, ReadError> {
        let first = match &source {
            Source::File(path) => Some(read_file(path)?),
            Source::Url(_) => None,
        };
        Ok(Self {
            keys: ArcSwapOption::from(first.map(Arc::new)),
            source,
            refresh,
            generation: AtomicU64::new(0),
            wanted: Notify::new(),
            kept: AtomicBool::new(false),
        })
    }

    /// `None` until the set was read for the first time.
    pub(super) fn keys(&self) -> Option<Arc<Vec<Key>>> {
        self.keys.load_full()
    }

    /// Changes with the keys.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// A token is signed with a key that is not there.
    pub(super) fn hurry(&self) {
        self.wanted.notify_one();
    }

    /// Starts the task that reads the set again, unless there is one. It ends with the last user of the set.
    pub(super) fn keep(self: &Arc<Self>, runtime: &Handle) {
        if !self.kept.swap(true, Ordering::Relaxed) {
            runtime.spawn(keep(Arc::downgrade(self)));
        }
    }

    async fn read(&self) -> Result<Vec<Key>, ReadError> {
        match &self.source {
            Source::File(path) => read_file(path),
            Source::Url(url) => fetch(url).await,
        }
    }

    async fn refresh(&self) {
        match self.read().await {
            Ok(keys) => {
                let before = self.keys.swap(Some(Arc::new(keys)));
                self.generation.fetch_add(1, Ordering::Release);
                if before.is_none() {
                    info!(from = %self.source, "keys of tokens read");
                }
            }
            Err(error) => {
                warn!(from = %self.source, error = %Causes(&error), "keys of tokens not read; those before stay");
            }
        }
    }
}

async fn keep(set: Weak<KeySet>) {
    let mut read = None;
    loop {
        let Some(set) = set.upgrade() else { return };
        let known = set.keys.load().is_some();
        let pause = match (&read, known) {
            // A file was read when it was named.
            (None, true) => set.refresh,
            (None, false) => Duration::ZERO,
            (Some(_), true) => set.refresh,
            (Some(_), false) => FIRST_PAUSE.min(set.refresh),
        };
        let hurry_from = read.map_or_else(Instant::now, |read: Instant| read + HURRY_MIN);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = async {
                set.wanted.notified().await;
                tokio::time::sleep_until(hurry_from).await;
            } => {}
        }
        set.refresh().await;
        read = Some(Instant::now());
    }
}

fn read_file(path: &std::path::Path) -> Result<Vec<Key>, ReadError> {
    let text = std::fs::read(path).map_err(|source| ReadError::File {
        path: path.to_owned(),
        source,
    })?;
    parse(&text, &path.display().to_string())
}

async fn fetch(url: &str) -> Result<Vec<Key>, ReadError> {
    let failed = |source| ReadError::Fetch {
        url: url.to_owned(),
        source,
    };
    // Several crates bring cryptography along; whoever was first is good enough.
    drop(rustls::crypto::ring::default_provider().install_default());
    let client = reqwest::Client::builder()
        .timeout(FETCH_MAX)
        .build()
        .map_err(failed)?;
    let answer = client.get(url).send().await.map_err(failed)?;
    let mut answer = answer.error_for_status().map_err(failed)?;
    let mut body = Vec::new();
    while let Some(chunk) = answer.chunk().await.map_err(failed)? {
        if body.len() + chunk.len() > SET_BYTES_MAX {
            return Err(ReadError::TooLarge {
                url: url.to_owned(),
            });
        }
        body.extend_from_slice(&chunk);
    }
    parse(&body, url)
}

/// Keys for other purposes and of unknown kinds are skipped (RFC 7517, 5).
fn parse(text: &[u8], from: &str) -> Result<Vec<Key>, ReadError> {
    #[derive(Deserialize)]
    struct Set {
        keys: Vec<serde_json::Value>,
    }
    let set: Set = serde_json::from_slice(text).map_err(|source| ReadError::Set {
        from: from.to_owned(),
        source,
    })?;
    let usable = set.keys.into_iter().filter_map(|key| {
        let key: Jwk = serde_json::from_value(key).ok()?;
        let for_signatures = matches!(
            key.common.public_key_use,
            None | Some(PublicKeyUse::Signature)
        );
        let algorithm = key.common.key_algorithm;
        let algorithm = algorithm.and_then(|name| name.to_string().parse().ok());
        let decoding = DecodingKey::from_jwk(&key).ok()?;
        for_signatures.then_some(Key {
            id: key.common.key_id,
            algorithm,
            key: decoding,
        })
    });
    let keys: Vec<Key> = usable.take(KEYS_MAX).collect();
    if keys.is_empty() {
        return Err(ReadError::NoKeys {
            from: from.to_owned(),
        });
    }
    Ok(keys)
}
