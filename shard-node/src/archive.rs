//! What leaves the commit log, kept for point-in-time recovery.
//!
//! A segment that recovery no longer needs is packed and put into an object store, a local directory
//! unless configured otherwise, before it is removed from the log. A pack has the segment's records as
//! they were, with their checksums, and says where the records of each object are:
//!
//! | bytes | field |
//! |------:|-------|
//! | 8 | `"DORMPACK"` |
//! | 4, 4 | version 1; CRC32C of the 56 bytes that follow and of the index |
//! | 8, 8 | log position of the first record, and behind the last |
//! | 8, 8 | least and greatest time of a commit, milliseconds since 1970 |
//! | 8, 8 | bytes of the index, and of the records |
//! | 2, 6 | worker; 0 |
//! | … | the index: per object, in order of their ids, the id (32), a count (4), and so many offsets among the records (4 each) |
//! | … | the records |
//!
//! Names sort by time: `{worker}/{first time}-{first position}.pack`. Numbers are little-endian.
//!
//! Databases that are too large for the log are beside the packs as they were at times, see [`snapshots`].

mod snapshots;

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path as FilePath;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use protocol::LogPosition;
use serde::{Deserialize, Serialize};
use tracing::warn;

pub use snapshots::Snapshot;
pub(crate) use snapshots::every as snapshots_every;

use crate::commit_log::record::{self, Commit, FileId, Record};
use crate::store::{Store, StoreError};

const MAGIC: [u8; 8] = *b"DORMPACK";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 72;

/// `[archive]`: what is kept for point-in-time recovery.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ArchiveConfig {
    /// Keep what leaves the commit log. Without it no object can be restored to an earlier time.
    pub enabled: bool,
    /// Where: a directory, or `s3://bucket/prefix`, in which each node has a part of its name. Empty: `archive`
    /// below the data directory.
    pub location: String,
    /// Objects can be restored to any time since so long ago.
    #[serde(with = "humantime_serde")]
    pub window: Duration,
    /// Most bytes that are kept, per worker; the oldest go first, whatever the window.
    pub bytes_max: u64,
    /// An object's database up to this size is written to the log whole once a day, if it changes: a restore
    /// begins there. Larger ones are copied to the archive, after at most a week.
    pub base_bytes_max: u64,
}

impl Default for ArchiveConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            location: String::new(),
            window: Duration::from_secs(30 * 86_400),
            bytes_max: 10 << 30,
            base_bytes_max: 1 << 20,
        }
    }
}

impl ArchiveConfig {
    pub fn validate(&self) -> Result<(), String> {
        if self.window < Duration::from_secs(60) {
            return Err(format!(
                "archive.window = {:?} must be at least 1m; archive.enabled = false keeps nothing",
                self.window
            ));
        }
        if self.bytes_max < 64 << 20 {
            return Err(format!(
                "archive.bytes_max = {} must be at least 64 MiB, the largest segment of a log twice",
                self.bytes_max
            ));
        }
        if !(1024..=64 << 20).contains(&self.base_bytes_max) {
            return Err(format!(
                "archive.base_bytes_max = {} must be from 1 KiB to 64 MiB",
                self.base_bytes_max
            ));
        }
        Ok(())
    }

    /// Where the archive of a node is whose data are there.
    fn place(&self, data_dir: &FilePath, node: &str) -> String {
        if self.location.is_empty() {
            return data_dir.join("archive").to_string_lossy().into_owned();
        }
        format!(
            "{}/{}",
            self.location.trim_end_matches('/'),
            node.replace('/', "_")
        )
    }
}

/// Why the archive did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    #[error("the archive cannot be used")]
    Store(#[from] StoreError),
    #[error("{name} in the archive is damaged: {what}")]
    Damaged { name: String, what: String },
    #[error(
        "the archive lacks what the log of worker {worker} had from position {from} to {to}: it was lost, or removed by hand"
    )]
    Gap {
        worker: u16,
        from: LogPosition,
        to: LogPosition,
    },
}

/// Packs of one worker, or of all that there are.
#[derive(Clone)]
pub struct Archive {
    store: Store,
    config: ArchiveConfig,
    /// Headers that were read, by name, some 150 bytes each: packs never change.
    headers: Arc<Mutex<HashMap<String, (u64, Pack)>>>,
    /// When it was last said that the bytes do not reach for the window, in milliseconds since 1970.
    warned_ms: Arc<AtomicU64>,
}

/// A pack, as its name and header tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pack {
    name: String,
    pub(crate) worker: u16,
    pub(crate) start: LogPosition,
    pub(crate) end: LogPosition,
    pub(crate) first_ms: u64,
    pub(crate) last_ms: u64,
    index: Range<u64>,
    records: Range<u64>,
    crc: u32,
    /// Why nothing can be read of it. Its times are what its name says.
    damage: Option<String>,
}

impl Archive {
    /// The archive of a node of this name, whose data are there; `None` if it keeps none.
    pub fn open(
        config: &ArchiveConfig,
        data_dir: &FilePath,
        node: &str,
    ) -> Result<Option<Self>, ArchiveError> {
        if !config.enabled {
            return Ok(None);
        }
        let store = Store::open(&config.place(data_dir, node))?;
        Ok(Some(Self::new(store, config.clone())))
    }

    pub fn new(store: Store, config: ArchiveConfig) -> Self {
        Self {
            store,
            config,
            headers: Arc::default(),
            warned_ms: Arc::default(),
        }
    }

    pub fn config(&self) -> &ArchiveConfig {
        &self.config
    }

    /// Puts the records of a segment into the archive, durably. The same segment again does no harm. Blocks.
    pub(crate) fn put(
        &self,
        worker: u16,
        start: LogPosition,
        records: &[u8],
    ) -> Result<(), ArchiveError> {
        let times = match times_of(start, records) {
            Some(times) => times,
            // Only marks of the writer. Its place in the log must be known, or it would look like a gap; its
            // place in time is behind what came before it.
            None => {
                let packs = self.packs(Some(worker))?;
                let last_ms = packs.iter().map(|pack| pack.last_ms).max().unwrap_or(0);
                (last_ms, last_ms)
            }
        };
        let (name, bytes) = pack(worker, start, records, times);
        self.store.put(&name, &bytes)?;
        Ok(())
    }

    /// All packs, oldest first, by what their names and headers tell. Blocks.
    pub(crate) fn packs(&self, worker: Option<u16>) -> Result<Vec<Pack>, ArchiveError> {
        let directory = worker.map(directory).unwrap_or_default();
        let listed = self.store.list(&directory)?;
        let mut packs = Vec::with_capacity(listed.len());
        for (name, size) in listed {
            if name.ends_with(".pack") {
                packs.push(self.header(name, size)?);
            }
        }
        packs.sort_by_key(|pack| (pack.first_ms, pack.worker, pack.start));
        Ok(packs)
    }

    fn header(&self, name: String, size: u64) -> Result<Pack, ArchiveError> {
        let known = self.headers().get(&name).cloned();
        if let Some((_, pack)) = known.filter(|(known, _)| *known == size) {
            return Ok(pack);
        }
        let pack = match self.read_header(&name, size) {
            Err(ArchiveError::Damaged { what, .. }) => {
                warn!(pack = name, what, "a part of the archive is damaged");
                return Pack::damaged(name, size, what);
            }
            pack => pack?,
        };
        self.headers()
            .insert(pack.name.clone(), (size, pack.clone()));
        Ok(pack)
    }

    fn headers(&self) -> std::sync::MutexGuard<'_, HashMap<String, (u64, Pack)>> {
        self.headers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_header(&self, name: &str, size: u64) -> Result<Pack, ArchiveError> {
        let damaged = |what: &str| ArchiveError::Damaged {
            name: name.to_owned(),
            what: what.to_owned(),
        };
        if size < HEADER_BYTES as u64 {
            return Err(damaged("it is shorter than its header"));
        }
        let bytes = self.store.get_range(name, 0..HEADER_BYTES as u64)?;
        if bytes.len() != HEADER_BYTES || bytes[..8] != MAGIC {
            return Err(damaged("it does not begin like a pack"));
        }
        let u64_at = |at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().expect("inside"));
        let u32_at = |at: usize| u32::from_le_bytes(*bytes[at..].first_chunk().expect("inside"));
        if u32_at(8) != VERSION {
            return Err(damaged("it is of another version"));
        }
        let index = HEADER_BYTES as u64..(HEADER_BYTES as u64).saturating_add(u64_at(48));
        let records = index.end..index.end.saturating_add(u64_at(56));
        if records.end != size {
            return Err(damaged("its length is not what its header says"));
        }
        Ok(Pack {
            worker: u16::from_le_bytes([bytes[64], bytes[65]]),
            start: LogPosition(u64_at(16)),
            end: LogPosition(u64_at(24)),
            first_ms: u64_at(32),
            last_ms: u64_at(40),
            index,
            records,
            crc: u32_at(12),
            name: name.to_owned(),
            damage: None,
        })
    }

    /// Gives `each` the records of one object in a pack, in order. Blocks.
    pub(crate) fn records<E: From<ArchiveError>>(
        &self,
        pack: &Pack,
        file: FileId,
        mut each: impl FnMut(LogPosition, &Commit<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let damaged = |what: String| ArchiveError::Damaged {
            name: pack.name.clone(),
            what,
        };
        if let Some(damage) = &pack.damage {
            return Err(damaged(damage.clone()).into());
        }
        let offsets = {
            let head = self.range(pack, 0..pack.index.end)?;
            if crc32c::crc32c(&head[16..]) != pack.crc {
                return Err(damaged("its index does not match its checksum".to_owned()).into());
            }
            let index = &head[HEADER_BYTES..];
            offsets_of(index, file).ok_or_else(|| damaged("its index breaks off".to_owned()))?
        };
        let mut window: (u64, Bytes) = (0, Bytes::new());
        for offset in offsets.into_iter().map(u64::from) {
            // Its length comes first; most records are short and lie close together.
            window = self.window(pack, window, offset, 12)?;
            let at = usize::try_from(offset - window.0).unwrap_or(usize::MAX);
            let length = window
                .1
                .get(at + 4..at + 8)
                .and_then(|bytes| bytes.first_chunk());
            let length = length.map_or(0, |bytes| u32::from_le_bytes(*bytes));
            window = self.window(pack, window, offset, u64::from(length))?;
            let at = usize::try_from(offset - window.0).unwrap_or(usize::MAX);
            let bytes = window.1.get(at..at + length as usize).unwrap_or_default();
            let position = LogPosition(pack.start.0 + offset);
            match record::read(bytes, position) {
                Ok((Record::Commit(commit), _)) if commit.head.file == file => {
                    each(position, &commit)?;
                }
                _ => {
                    let what = format!("the record at log position {position} is not whole");
                    return Err(damaged(what).into());
                }
            }
        }
        Ok(())
    }

    /// Records from `offset` on, at least `bytes` of them if there are so many: those at hand, or others.
    fn window(
        &self,
        pack: &Pack,
        window: (u64, Bytes),
        offset: u64,
        bytes: u64,
    ) -> Result<(u64, Bytes), ArchiveError> {
        let have = window.0..window.0 + window.1.len() as u64;
        if have.contains(&offset) && offset + bytes <= have.end {
            return Ok(window);
        }
        let from = pack.records.start + offset;
        let to = (from + bytes.max(WINDOW_BYTES)).min(pack.records.end);
        Ok((offset, self.range(pack, from..to.max(from))?))
    }

    fn range(&self, pack: &Pack, range: Range<u64>) -> Result<Bytes, ArchiveError> {
        Ok(self.store.get_range(&pack.name, range)?)
    }

    /// Removes what is older than the window, and the time before it in which the restores to its beginning
    /// have their base; also the oldest while a worker's are too many. Blocks.
    pub(crate) fn prune(&self, worker: u16, now: u64) -> Result<(), ArchiveError> {
        let packs = self.packs(Some(worker))?.into_iter();
        let packs = packs.map(|pack| (pack.last_ms, pack.records.end, pack.name));
        let snapshots = self.snapshots_of_worker(worker)?.into_iter();
        let snapshots =
            snapshots.map(|found| (found.bookmark.unix_millis, found.bytes, found.name));
        let mut files: Vec<(u64, u64, String)> = packs.chain(snapshots).collect();
        files.sort_unstable();
        let window = self.config.window + BASE_AGE_MAX;
        let window = u64::try_from(window.as_millis()).unwrap_or(u64::MAX);
        let mut sum: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
        for (last_ms, bytes, name) in files {
            let old = last_ms.saturating_add(window) < now;
            if !old && sum <= self.config.bytes_max {
                break;
            }
            if !old {
                self.warn_of_window(worker, last_ms, now);
            }
            sum -= bytes;
            self.store.delete(&name)?;
            self.headers().remove(&name);
        }
        Ok(())
    }
}

impl Archive {
    /// Says once a day that less is kept than the window wants.
    fn warn_of_window(&self, worker: u16, last_ms: u64, now: u64) {
        let age = Duration::from_millis(now.saturating_sub(last_ms));
        let warned = self.warned_ms.load(Ordering::Relaxed);
        if age < self.config.window && now.saturating_sub(warned) > 86_400_000 {
            self.warned_ms.store(now, Ordering::Relaxed);
            warn!(
                worker,
                kept_for = ?age,
                "archive.bytes_max is too little for archive.window: what is older is removed"
            );
        }
    }
}

impl Pack {
    /// One of which only the name can be believed: `{worker}/{first time}-{first position}.pack`.
    fn damaged(name: String, size: u64, what: String) -> Result<Self, ArchiveError> {
        let parse = || {
            let (directory, file) = name.rsplit_once('/')?;
            let (time, start) = file.strip_suffix(".pack")?.split_once('-')?;
            let worker = directory.rsplit('/').next()?.parse().ok()?;
            let start = u64::from_str_radix(start, 16).ok()?;
            Some((worker, time.parse().ok()?, LogPosition(start)))
        };
        let Some((worker, first_ms, start)) = parse() else {
            return Err(ArchiveError::Damaged { name, what });
        };
        Ok(Self {
            worker,
            start,
            end: start,
            first_ms,
            last_ms: first_ms,
            index: 0..0,
            records: 0..size,
            crc: 0,
            damage: Some(what),
            name,
        })
    }
}

/// Read at once, where records lie close together.
const WINDOW_BYTES: u64 = 256 << 10;

/// A database that changes is written whole to the log again after this time: twice as much after the last
/// time at the most.
pub(crate) const BASE_EVERY: Duration = Duration::from_secs(43_200);

/// A database that changes has a base, in the log or beside it, that is at most so old.
const BASE_AGE_MAX: Duration = Duration::from_secs(8 * 86_400);
const _: () = assert!(
    BASE_EVERY.as_secs() * 2 <= BASE_AGE_MAX.as_secs()
        && snapshots::EVERY_MAX.as_secs() < BASE_AGE_MAX.as_secs()
);

fn directory(worker: u16) -> String {
    format!("{worker:05}")
}

/// The least and the greatest time of the commits of a segment.
fn times_of(start: LogPosition, records: &[u8]) -> Option<(u64, u64)> {
    let mut times: Option<(u64, u64)> = None;
    each_commit(start, records, |_, commit| {
        let time = commit.head.unix_millis;
        let (first, last) = times.unwrap_or((time, time));
        times = Some((first.min(time), last.max(time)));
    });
    times
}

/// Calls `each` with every commit and its offset; where the records end.
fn each_commit(
    start: LogPosition,
    records: &[u8],
    mut each: impl FnMut(usize, &Commit<'_>),
) -> usize {
    let mut at = 0;
    while let Ok((parsed, length)) = record::read(&records[at..], start.after(at)) {
        if let Record::Commit(commit) = parsed {
            each(at, &commit);
        }
        at += length;
    }
    at
}

/// The pack of a segment's records, and its name.
fn pack(
    worker: u16,
    start: LogPosition,
    records: &[u8],
    (first_ms, last_ms): (u64, u64),
) -> (String, Vec<u8>) {
    let mut index: BTreeMap<FileId, Vec<u32>> = BTreeMap::new();
    let at = each_commit(start, records, |offset, commit| {
        if !commit.head.file.is_catalog() {
            let offset = u32::try_from(offset).expect("segments are at most 1 GiB");
            index.entry(commit.head.file).or_default().push(offset);
        }
    });
    let mut bytes = vec![0; HEADER_BYTES];
    for (file, offsets) in &index {
        bytes.extend_from_slice(file.as_bytes());
        let count = u32::try_from(offsets.len()).expect("fewer than bytes");
        bytes.extend_from_slice(&count.to_le_bytes());
        for offset in offsets {
            bytes.extend_from_slice(&offset.to_le_bytes());
        }
    }
    let index_bytes = (bytes.len() - HEADER_BYTES) as u64;
    let kept = if index.is_empty() { 0 } else { at };
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    for (place, number) in [
        (16, start.0),
        (24, start.after(at).0),
        (32, first_ms),
        (40, last_ms),
        (48, index_bytes),
        (56, kept as u64),
    ] {
        bytes[place..place + 8].copy_from_slice(&number.to_le_bytes());
    }
    bytes[64..66].copy_from_slice(&worker.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[16..]);
    bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    bytes.extend_from_slice(&records[..kept]);
    let name = format!("{}/{first_ms:013}-{:016x}.pack", directory(worker), start.0);
    (name, bytes)
}

/// Where the records of an object are; `None` if the index is not whole.
fn offsets_of(mut index: &[u8], file: FileId) -> Option<Vec<u32>> {
    while !index.is_empty() {
        let (id, rest) = index.split_first_chunk::<32>()?;
        let (count, rest) = rest.split_first_chunk::<4>()?;
        let bytes = u32::from_le_bytes(*count) as usize * 4;
        let (offsets, rest) = rest.split_at_checked(bytes)?;
        if id == file.as_bytes() {
            let offsets = offsets.chunks_exact(4);
            let offsets =
                offsets.map(|bytes| u32::from_le_bytes(*bytes.first_chunk().expect("four")));
            return Some(offsets.collect());
        }
        index = rest;
    }
    Some(Vec::new())
}
