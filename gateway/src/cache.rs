//! Answers of routes that opt in, kept in memory and given again as RFC 9111 allows.
//!
//! pingora-cache does the steps of a request (look-up, variants, revalidation, one request for many that miss);
//! here are the memory ([`store`]), what may be kept ([`policy`]), the key ([`plan`]), and purges: by tags
//! that answers carry in `cache-tag`, told by any answer in `dormouse-purge` or by an operator.
//!
//! **How old an answer may be.** As old as its freshness allows, unless it is purged. A purge counts in this
//! gateway before the answer that brought it goes on to its client, and no answer that had been asked for
//! before it is kept after it. Gateways that list this one in `cache.peers` hear of it within `peers_every`
//! and one exchange; while they cannot ask, not at all: then the freshness (and `stale-while-revalidate`) is
//! the bound. When they can again, and cannot be sure to have missed nothing, they drop everything.

pub mod config;
mod head;
mod log;
pub mod operator;
pub mod peers;
pub mod plan;
pub mod policy;
mod storage;
mod store;

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderName};
use pingora_cache::CacheOptionOverrides;
use pingora_cache::key::{HashBinary, hash_key, str2hex};
use pingora_cache::lock::CacheLock;
use pingora_cache::predictor::Predictor;
use pingora_proxy::Session;
use rand::Rng;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use self::config::CacheConfig;
use self::store::Store;
use crate::metrics::Metrics;

pub use log::Moment;

/// What answers are filed under; the name that content delivery networks use.
pub const TAGS: HeaderName = HeaderName::from_static("cache-tag");

/// Tags whose answers are no longer right. Not for clients.
pub const PURGE: HeaderName = HeaderName::from_static("dormouse-purge");

/// Most tags of one answer. An answer with more is not kept: it could not be purged.
pub const TAGS_MAX: usize = 64;

/// How long requests wait for the one that fetches what they want too.
const COLLAPSE_MAX: Duration = Duration::from_secs(10);

/// Keys remembered whose answers are not kept, in 16 parts; requests for them do not wait for each other.
const UNKEPT_PER_PART: usize = 1024;

/// What an answer is kept under: a hash of route, key and target.
type Key = HashBinary;

/// A name that a purge may tell, as a hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Tag(HashBinary);

impl From<Tag> for String {
    fn from(tag: Tag) -> Self {
        tag.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// A text that is not 32 hex digits.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} must be 32 hex digits")]
pub struct TagError(String);

impl TryFrom<String> for Tag {
    type Error = TagError;

    fn try_from(text: String) -> Result<Self, TagError> {
        str2hex(&text).map(Self).ok_or(TagError(text))
    }
}

/// Of a tag.
pub const TAG_BYTES: usize = 16;

impl Tag {
    pub fn from_bytes(bytes: [u8; TAG_BYTES]) -> Self {
        Self(bytes)
    }

    pub fn to_bytes(self) -> [u8; TAG_BYTES] {
        self.0
    }

    /// All answers have it.
    pub const EVERYTHING: Self = Self([0; 16]);

    /// Of a header.
    pub fn named(name: &str) -> Self {
        Self::of('t', &[name])
    }

    /// All answers of a route have it.
    pub fn route(label: &str) -> Self {
        Self::of('r', &[label])
    }

    /// All answers under one key of a route have it.
    pub fn key(label: &str, key: &str) -> Self {
        Self::of('k', &[label, key])
    }

    fn of(kind: char, parts: &[&str]) -> Self {
        Self(framed_hash(kind, parts))
    }
}

/// A hash of parts that no other parts have.
fn framed_hash(kind: char, parts: &[&str]) -> HashBinary {
    let mut text = String::from(kind);
    for part in parts {
        text.push_str(&part.len().to_string());
        text.push(':');
        text.push_str(part);
    }
    hash_key(text)
}

/// The tags that a header names, separated by commas.
pub fn tags(headers: &HeaderMap, name: &HeaderName) -> Vec<Tag> {
    let mut tags = Vec::new();
    for line in headers.get_all(name) {
        for tag in line.as_bytes().split(|byte| *byte == b',') {
            let tag = tag.trim_ascii();
            if !tag.is_empty() {
                tags.push(Tag::named(&String::from_utf8_lossy(tag)));
            }
        }
    }
    tags
}

/// The cache of one gateway.
pub struct Cache {
    store: Store,
    /// For 32 parts of the keys, who fetches what.
    lock: CacheLock,
    unkept: Predictor<16>,
    entry_bytes_max: usize,
    /// Tells one life of a gateway from the next.
    boot: u64,
    /// Wakes who waits for purges.
    purged: Notify,
}

impl Cache {
    /// `config` was checked. pingora wants what lives for ever, so this does: one per gateway, empty until
    /// a route opts in.
    pub fn new(config: &CacheConfig, metrics: &Metrics) -> &'static Self {
        let bytes = |bytes| usize::try_from(bytes).unwrap_or(usize::MAX);
        Box::leak(Box::new(Self {
            store: Store::new(bytes(config.bytes_max), metrics.cache.clone()),
            lock: CacheLock::new(COLLAPSE_MAX),
            unkept: Predictor::new(UNKEPT_PER_PART, None),
            entry_bytes_max: bytes(config.entry_bytes_max),
            boot: rand::rng().random(),
            purged: Notify::new(),
        }))
    }

    /// Makes a request one that the cache may answer.
    pub fn enable(&'static self, session: &mut Session) {
        let mut patience = CacheOptionOverrides::default();
        patience.wait_timeout = Some(COLLAPSE_MAX);
        session.cache.enable(
            self,
            None,
            Some(&self.unkept),
            Some(&self.lock),
            Some(patience),
        );
    }

    /// Drops the answers that have one of these tags. How many that were.
    pub fn purge(&self, tags: &[Tag]) -> usize {
        let dropped = self.store.purge(tags, true);
        self.purged.notify_one();
        dropped
    }

    /// As another gateway says, which tells the others itself.
    pub fn purge_for_another(&self, tags: &[Tag]) -> usize {
        self.store.purge(tags, false)
    }

    /// Waits until something was purged here since the last time. For one who waits.
    pub async fn purged(&self) {
        self.purged.notified().await;
    }

    /// The moment, and what was purged here after an earlier one; `None` if that cannot be told.
    pub fn purged_after(&self, moment: Moment) -> (Moment, Option<Vec<Tag>>) {
        self.store.purges_after(moment)
    }

    /// How many purges there were.
    pub fn moment(&self) -> Moment {
        self.store.moment()
    }

    /// Whether this is the gateway that says so of itself.
    fn is(&self, boot: &str) -> bool {
        boot == self.boot()
    }

    fn boot(&self) -> String {
        format!("{:016x}", self.boot)
    }

    /// Brings gauges up to date.
    pub fn publish(&self) {
        self.store.publish();
    }

    /// What another gateway should hear that has heard everything up to `count` in the life `boot`.
    pub fn purges(&self, boot: &str, count: u64) -> Purges {
        let ours = self.boot();
        let (now, tags) = self.purged_after(Moment(count));
        Purges {
            tags: tags.filter(|_| boot == ours),
            count: now.0,
            boot: ours,
        }
    }

    /// For operators.
    pub fn state(&self) -> CacheState {
        let (entries, bytes) = self.store.size();
        CacheState { entries, bytes }
    }
}

/// What a gateway tells others of its purges.
#[derive(Debug, Serialize, Deserialize)]
pub struct Purges {
    /// This life of it; another one has forgotten what it told before.
    pub boot: String,
    /// How many there were.
    pub count: u64,
    /// Those that the other did not know, in hex; `None` if that cannot be told.
    pub tags: Option<Vec<Tag>>,
}

/// What the cache holds.
#[derive(Debug, Serialize)]
pub struct CacheState {
    pub entries: usize,
    /// With what is being received.
    pub bytes: usize,
}

/// What an answer takes with it into the store.
#[derive(Debug, Clone)]
pub struct Fill {
    /// When it was asked for.
    pub asked: Moment,
    pub tags: Arc<[Tag]>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_separated_by_commas() {
        let mut headers = HeaderMap::new();
        headers.append(TAGS, "a, b,,".parse().unwrap());
        headers.append(TAGS, "c".parse().unwrap());
        let named = ["a", "b", "c"].map(Tag::named).to_vec();
        assert_eq!(tags(&headers, &TAGS), named);
        assert_eq!(tags(&headers, &PURGE), []);
    }

    #[test]
    fn a_tag_is_read_as_it_is_written() {
        let text = String::from(Tag::named("x"));
        assert_eq!(Tag::try_from(text).unwrap(), Tag::named("x"));
        assert!(Tag::try_from("x".to_owned()).is_err());
    }

    #[test]
    fn different_things_never_have_one_tag() {
        assert_ne!(Tag::key("a", "bc"), Tag::key("ab", "c"));
        assert_ne!(Tag::named("x"), Tag::route("x"));
        assert_ne!(Tag::named(""), Tag::EVERYTHING);
    }
}
