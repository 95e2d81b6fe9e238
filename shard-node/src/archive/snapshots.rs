//! Copies of databases that are too large to be written to the log whole.
//!
//! `snapshots/{id}/{bookmark}-{worker}.db` has the pages of a database as they were when the commit log was
//! at the bookmark, and behind them 16 bytes: `"DORMSNAP"`, CRC32C of the pages, bytes of a page. So it is
//! also a file that stock SQLite can open.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::time::Duration;

use protocol::{Bookmark, ObjectId};

use super::{Archive, ArchiveError};
use crate::commit_log::record::FileId;
use crate::store::StoreError;

const MAGIC: [u8; 8] = *b"DORMSNAP";
const TRAILER_BYTES: u64 = 16;

const DIRECTORY: &str = "snapshots";

/// A database of this size that changes every day is copied every second day, and one of twice the size
/// every third: not more often than it pays.
const DAILY_BYTES: u64 = 64 << 20;
pub(super) const EVERY_MAX: Duration = Duration::from_secs(7 * DAY);
const DAY: u64 = 86_400;

/// A copy of a database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// It has all commits up to here.
    pub bookmark: Bookmark,
    /// With what is behind the pages.
    pub(super) bytes: u64,
    pub(super) name: String,
    file: FileId,
    worker: u16,
}

impl Snapshot {
    /// `snapshots/{id}/{bookmark}-{worker}.db`
    fn parse(name: String, bytes: u64) -> Option<Self> {
        let mut parts = name.rsplit('/');
        let (bookmark, worker) = parts.next()?.strip_suffix(".db")?.rsplit_once('-')?;
        let (bookmark, worker) = (bookmark.parse().ok()?, worker.parse().ok()?);
        let id: ObjectId = parts.next()?.parse().ok()?;
        Some(Self {
            bookmark,
            bytes,
            file: id.into(),
            worker,
            name,
        })
    }
}

/// How long after the last copy a database of this size is copied again, if it changes.
pub(crate) fn every(bytes: u64) -> Duration {
    Duration::from_secs((1 + bytes / DAILY_BYTES) * DAY).min(EVERY_MAX)
}

impl Archive {
    /// The newest copy of each database that a worker has copied, if that is old: half a window, and it
    /// should be copied again, or the window will end in nothing. Blocks.
    pub(crate) fn old_snapshots(&self, worker: u16, now: u64) -> Result<Vec<FileId>, ArchiveError> {
        let mut newest: HashMap<FileId, u64> = HashMap::new();
        for found in self.snapshots_of_worker(worker)? {
            let time = newest.entry(found.file).or_default();
            *time = found.bookmark.unix_millis.max(*time);
        }
        let half = u64::try_from((self.config.window / 2).as_millis()).unwrap_or(u64::MAX);
        newest.retain(|_, time| time.saturating_add(half) < now);
        Ok(newest.into_keys().collect())
    }

    /// Copies of an object's database, oldest first. Blocks.
    pub fn snapshots(&self, file: FileId) -> Result<Vec<Snapshot>, ArchiveError> {
        let mut found = self.list(&format!("{DIRECTORY}/{file}"))?;
        found.sort_by_key(|snapshot| snapshot.bookmark);
        Ok(found)
    }

    /// All of a worker.
    pub(super) fn snapshots_of_worker(&self, worker: u16) -> Result<Vec<Snapshot>, ArchiveError> {
        let mut found = self.list(DIRECTORY)?;
        found.retain(|snapshot| snapshot.worker == worker);
        Ok(found)
    }

    fn list(&self, directory: &str) -> Result<Vec<Snapshot>, ArchiveError> {
        let listed = self.store.list(directory)?.into_iter();
        Ok(listed
            .filter_map(|(name, bytes)| Snapshot::parse(name, bytes))
            .collect())
    }

    /// Keeps a copy: the pages are in `file`, whose rest is for us. Blocks.
    pub fn put_snapshot(
        &self,
        id: FileId,
        worker: u16,
        bookmark: Bookmark,
        page_bytes: u32,
        file: &mut File,
    ) -> Result<(), ArchiveError> {
        let failed = StoreError::from;
        let crc = checksum(file, u64::MAX).map_err(failed)?;
        let mut trailer = MAGIC.to_vec();
        trailer.extend_from_slice(&crc.to_le_bytes());
        trailer.extend_from_slice(&page_bytes.to_le_bytes());
        file.seek(SeekFrom::End(0)).map_err(failed)?;
        file.write_all(&trailer).map_err(failed)?;
        file.rewind().map_err(failed)?;
        let name = format!("{DIRECTORY}/{id}/{bookmark}-{worker:05}.db");
        Ok(self.store.put_file(&name, file)?)
    }

    /// Writes the pages of a copy into an empty file; the bytes of one. Blocks.
    pub(crate) fn get_snapshot(
        &self,
        snapshot: &Snapshot,
        file: &mut File,
    ) -> Result<u32, ArchiveError> {
        let failed = StoreError::from;
        let damaged = |what: &str| ArchiveError::Damaged {
            name: snapshot.name.clone(),
            what: what.to_owned(),
        };
        let pages_bytes = snapshot.bytes.checked_sub(TRAILER_BYTES);
        let pages_bytes = pages_bytes.ok_or_else(|| damaged("it is too short"))?;
        let trailer = self
            .store
            .get_range(&snapshot.name, pages_bytes..snapshot.bytes)?;
        if trailer.len() as u64 != TRAILER_BYTES || trailer[..8] != MAGIC {
            return Err(damaged("it does not end like a snapshot"));
        }
        let u32_at = |at: usize| u32::from_le_bytes(*trailer[at..].first_chunk().expect("inside"));
        self.store.get_to_file(&snapshot.name, pages_bytes, file)?;
        if checksum(file, pages_bytes).map_err(failed)? != u32_at(8) {
            return Err(damaged("its pages do not match their checksum"));
        }
        match u32_at(12) {
            page_bytes if page_bytes.is_power_of_two() && (512..=65536).contains(&page_bytes) => {
                Ok(page_bytes)
            }
            other => Err(damaged(&format!("pages have {other} bytes"))),
        }
    }
}

/// CRC32C of a file's first bytes.
fn checksum(file: &mut File, bytes_max: u64) -> std::io::Result<u32> {
    file.rewind()?;
    let mut rest = file.take(bytes_max);
    let mut chunk = vec![0; 1 << 20];
    let mut crc = 0;
    loop {
        match rest.read(&mut chunk) {
            Ok(0) => return Ok(crc),
            Ok(bytes) => crc = crc32c::crc32c_append(crc, &chunk[..bytes]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
