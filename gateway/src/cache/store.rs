//! Answers in memory: found by key, dropped by tag, the least recently used first when there is no more room.
//!
//! One lock for all, held for some look-ups and never while bytes are copied.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use lru::LruCache;

use super::head::Head;
use super::log::{Moment, PurgeLog};
use super::{Key, Tag};
use crate::metrics::CacheMetrics;

/// What an entry takes besides its head, body and tags: the tables' places for it. Measured, with room to spare.
const ENTRY_BYTES: usize = 640;

/// What a tag takes, if no other entry has it. Measured too.
const TAG_BYTES: usize = 320;

/// One part in so many is for answers that are being received.
const FILLING_PART: usize = 4;

/// An answer that is kept.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    /// No two entries have the same, so that what was learned of one is not written into its successor.
    pub(super) id: u64,
    pub(super) head: Head,
    pub(super) body: Bytes,
    pub(super) tags: Arc<[Tag]>,
    pub(super) variance: Option<[u8; 16]>,
    pub(super) times: Times,
}

/// From when and until when an answer counts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Times {
    pub(super) created: SystemTime,
    /// From when on its age counts.
    pub(super) epoch: SystemTime,
    pub(super) fresh_until: SystemTime,
    pub(super) stale_while_revalidate: u32,
    pub(super) stale_if_error: u32,
}

impl Entry {
    fn bytes(&self) -> usize {
        ENTRY_BYTES + self.head.bytes() + self.body.len() + self.tags.len() * TAG_BYTES
    }
}

/// The entries of a gateway.
pub(super) struct Store {
    tables: Mutex<Tables>,
    /// Bytes of answers that are being received.
    filling: AtomicUsize,
    filling_max: usize,
    metrics: CacheMetrics,
}

struct Tables {
    entries: LruCache<Key, (Entry, usize)>,
    by_tag: HashMap<Tag, HashSet<Key>>,
    bytes: usize,
    bytes_max: usize,
    next_id: u64,
    log: PurgeLog,
}

impl Store {
    pub(super) fn new(bytes_max: usize, metrics: CacheMetrics) -> Self {
        let filling_max = bytes_max / FILLING_PART;
        Self {
            tables: Mutex::new(Tables {
                entries: LruCache::unbounded(),
                by_tag: HashMap::new(),
                bytes: 0,
                bytes_max: bytes_max - filling_max,
                next_id: 0,
                log: PurgeLog::default(),
            }),
            filling: AtomicUsize::new(0),
            filling_max,
            metrics,
        }
    }

    /// Nothing in here can panic half way; if it did, the tables would still be sound.
    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn find(&self, key: &Key) -> Option<Entry> {
        let mut tables = self.tables();
        tables.entries.get(key).map(|(entry, _)| entry.clone())
    }

    /// Keeps an answer that was asked for at a moment, unless it was purged since. Its `id` is chosen here.
    pub(super) fn insert(&self, key: Key, mut entry: Entry, asked: Moment) -> bool {
        let bytes = entry.bytes();
        let mut tables = self.tables();
        if bytes > tables.bytes_max || tables.log.purged_since(asked, &entry.tags) {
            return false;
        }
        tables.next_id += 1;
        entry.id = tables.next_id;
        // What leaves is freed after the lock is.
        let mut left: Vec<Entry> = tables.remove(&key).into_iter().collect();
        let before = left.len();
        while tables.bytes + bytes > tables.bytes_max {
            let Some((key, (entry, bytes))) = tables.entries.pop_lru() else {
                break;
            };
            tables.forget(&key, &entry, bytes);
            left.push(entry);
        }
        self.metrics
            .evictions
            .increment((left.len() - before) as u64);
        for tag in &*entry.tags {
            tables.by_tag.entry(*tag).or_default().insert(key);
        }
        tables.bytes += bytes;
        tables.entries.put(key, (entry, bytes));
        drop(tables);
        true
    }

    /// Renews an entry that was found to be still right. `false` if it is gone.
    pub(super) fn renew(&self, key: &Key, id: u64, head: Head, times: Times, more: &[Tag]) -> bool {
        let tables = self.tables();
        let renewed = match tables.entries.peek(key) {
            Some((entry, _)) if entry.id == id => {
                let tags = entry.tags.iter().chain(more).copied();
                let mut tags: Vec<Tag> = tags.collect();
                tags.sort_unstable();
                tags.dedup();
                Entry {
                    head,
                    times,
                    tags: tags.into(),
                    ..entry.clone()
                }
            }
            _ => return false,
        };
        let asked = tables.log.now();
        drop(tables);
        self.insert(*key, renewed, asked)
    }

    /// Drops what has one of the tags, and whatever is on its way with it. How many entries that were.
    pub(super) fn purge(&self, tags: &[Tag], ours: bool) -> usize {
        let mut left = Vec::new();
        let mut tables = self.tables();
        for tag in tags {
            tables.log.push(*tag, ours);
            if *tag == Tag::EVERYTHING {
                while let Some((key, (entry, bytes))) = tables.entries.pop_lru() {
                    tables.forget(&key, &entry, bytes);
                    left.push(entry);
                }
            }
            let keys = tables.by_tag.remove(tag).unwrap_or_default();
            left.extend(keys.iter().filter_map(|key| tables.remove(key)));
        }
        drop(tables);
        self.metrics.purges.increment(tags.len() as u64);
        self.metrics.purged.increment(left.len() as u64);
        left.len()
    }

    /// How many purges there were.
    pub(super) fn moment(&self) -> Moment {
        self.tables().log.now()
    }

    /// The moment, and what others should hear that know everything up to an earlier one.
    pub(super) fn purges_after(&self, moment: Moment) -> (Moment, Option<Vec<Tag>>) {
        let tables = self.tables();
        (tables.log.now(), tables.log.ours_after(moment))
    }

    /// Takes room for an answer that is being received. `false`: there is none.
    pub(super) fn reserve(&self, bytes: usize) -> bool {
        let take = |taken: usize| Some(taken + bytes).filter(|sum| *sum <= self.filling_max);
        let order = Ordering::Relaxed;
        self.filling.fetch_update(order, order, take).is_ok()
    }

    pub(super) fn release(&self, bytes: usize) {
        self.filling.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Entries, and bytes with what is being received.
    pub(super) fn size(&self) -> (usize, usize) {
        let tables = self.tables();
        let filling = self.filling.load(Ordering::Relaxed);
        (tables.entries.len(), tables.bytes + filling)
    }

    pub(super) fn publish(&self) {
        let (entries, bytes) = self.size();
        self.metrics.entries.set(entries as f64);
        self.metrics.bytes.set(bytes as f64);
    }
}

impl Tables {
    fn remove(&mut self, key: &Key) -> Option<Entry> {
        let (entry, bytes) = self.entries.pop(key)?;
        self.forget(key, &entry, bytes);
        Some(entry)
    }

    /// Takes what left `entries` out of the rest.
    fn forget(&mut self, key: &Key, entry: &Entry, bytes: usize) {
        self.bytes -= bytes;
        for tag in &*entry.tags {
            if let Some(keys) = self.by_tag.get_mut(tag) {
                keys.remove(key);
                if keys.is_empty() {
                    self.by_tag.remove(tag);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
