//! One object as it was: its records in the archive and in the log, put together again.
//!
//! A database that changes is written to the log whole once a day, as it was before the change (a *base*).
//! To know it at a time, take the last base before that time and apply the commits that follow it; or,
//! if the first base comes later, that base itself, if nothing had changed since the time.

use std::path::PathBuf;
use std::sync::Arc;

use protocol::{Bookmark, LogPosition};

use crate::archive::{Archive, ArchiveError, Kept, Pack};
use crate::commit_log::record::{self, Commit, FileId, Record};
use crate::commit_log::replay::{ReplayError, replay};
use crate::disk::Disk;
use crate::storage::overlay::{Overlay, Place};

/// Why an object cannot be shown as it was.
#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
    #[error("{asked} has not come yet: the latest is {now}")]
    Future { asked: Bookmark, now: Bookmark },
    #[error("nothing is archived (archive.enabled = false), so no object can be restored")]
    NoArchive,
    #[error("the object did not exist at {0}")]
    DidNotExist(Bookmark),
    #[error("{asked} is out of the window: what is kept of this object begins at {first}")]
    OutOfWindow { asked: Bookmark, first: Bookmark },
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error(transparent)]
    Log(#[from] ReplayError),
    #[error("what is kept of the object contradicts itself at log position {0}")]
    Contradiction(LogPosition),
}

/// Where the records of one object are. May be used on any thread.
pub struct History {
    pub(crate) file: FileId,
    /// Its last change is no later than this; `None` if it does not exist.
    pub(crate) changed: Option<Bookmark>,
    pub(crate) archive: Option<Archive>,
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) log_directory: PathBuf,
    pub(crate) worker: u16,
    /// Where the log is durable.
    pub(crate) durable: LogPosition,
    /// The latest bookmark that can be asked for.
    pub(crate) now: Bookmark,
}

/// An object as it was.
#[derive(Debug, PartialEq, Eq)]
pub enum AsOf {
    /// Nothing has changed since.
    AsItIs,
    /// Its pages, one after the other.
    Database(Vec<u8>),
}

/// A segment may leave the log for the archive between a look at one and at the other.
const TRIES: u32 = 5;

impl History {
    /// The database at a bookmark. Blocks, and reads what it needs of archive and log.
    pub fn database_at(&self, at: Bookmark) -> Result<AsOf, HistoryError> {
        let file = self.file;
        let archive = self.archive.as_ref().ok_or(HistoryError::NoArchive)?;
        if at > self.now {
            return Err(HistoryError::Future {
                asked: at,
                now: self.now,
            });
        }
        if self.changed.is_some_and(|changed| changed <= at) {
            return Ok(AsOf::AsItIs);
        }
        let mut tries = 0;
        let live = loop {
            tries += 1;
            match self.live_records(file) {
                Err(_) if tries < TRIES => {}
                live => break live?,
            }
        };
        let (live, live_start) = live;
        let mut packs = archive.packs(None)?;
        packs.sort_by_key(|pack| std::cmp::Reverse((pack.last_ms, pack.start)));
        let mut records = live;
        let mut read = Vec::new();
        for pack in packs {
            // All that is later than the time must be known; then older ones until there is a base.
            let found = find_base(&mut records, at)?;
            if pack.last_ms < at.unix_millis && found != Found::Nothing {
                break;
            }
            records.extend(archive.records(&pack, file)?);
            read.push(pack);
        }
        check_whole(&mut read, self.worker, live_start)?;
        match find_base(&mut records, at)? {
            Found::Unchanged => Ok(AsOf::AsItIs),
            Found::Base(first) => rebuild(&records[first..], at),
            Found::NotYet => Err(HistoryError::DidNotExist(at)),
            Found::Nothing => Err(HistoryError::OutOfWindow {
                asked: at,
                first: match (records.first(), self.changed) {
                    (Some(first), _) => bookmark_of(first)?,
                    (None, Some(changed)) => changed,
                    (None, None) => return Err(HistoryError::DidNotExist(at)),
                },
            }),
        }
    }

    /// What the log has of an object, and where the log begins.
    fn live_records(&self, file: FileId) -> Result<(Vec<Kept>, LogPosition), ReplayError> {
        let mut records = Vec::new();
        let found = replay(
            &*self.disk,
            &self.log_directory,
            Some(self.durable),
            |position, _, commit| {
                if commit.head.file == file {
                    records.push(Kept {
                        worker: self.worker,
                        position,
                        bytes: commit.raw.to_vec(),
                    });
                }
                Ok(())
            },
        )?;
        let starts = found.segments.iter().map(|segment| segment.header.start);
        Ok((records, starts.min().unwrap_or(self.durable)))
    }
}

/// What was read of each worker follows without a gap, up to where the log begins. (A worker whose data
/// directory was made anew has positions twice: only what no pack reaches is a gap.)
fn check_whole(
    packs: &mut [Pack],
    worker: u16,
    live_start: LogPosition,
) -> Result<(), HistoryError> {
    packs.sort_by_key(|pack| (pack.worker, pack.start));
    for of_worker in packs.chunk_by(|left, right| left.worker == right.worker) {
        let number = of_worker[0].worker;
        let live = (number == worker).then_some(live_start);
        let starts = of_worker.iter().map(|pack| (pack.start, pack.end));
        let mut reached = of_worker[0].start;
        for (start, end) in starts.chain(live.map(|start| (start, start))) {
            if start > reached {
                return Err(HistoryError::Archive(ArchiveError::Gap {
                    worker: number,
                    from: reached,
                    to: start,
                }));
            }
            reached = reached.max(end);
        }
    }
    Ok(())
}

fn parse(kept: &Kept) -> Result<Commit<'_>, HistoryError> {
    match record::read(&kept.bytes, kept.position) {
        Ok((Record::Commit(commit), _)) => Ok(commit),
        _ => Err(HistoryError::Contradiction(kept.position)),
    }
}

/// A commit counts from where it ends.
fn bookmark_of(kept: &Kept) -> Result<Bookmark, HistoryError> {
    Ok(Bookmark {
        unix_millis: parse(kept)?.head.unix_millis,
        position: kept.position.after(kept.bytes.len()),
    })
}

/// What the records of an object, as far as they are known, say of a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    /// Nothing came after it.
    Unchanged,
    /// From this record on the object can be rebuilt.
    Base(usize),
    /// The object begins after it.
    NotYet,
    /// Older records are needed.
    Nothing,
}

/// Puts records in order, and looks for what an object is rebuilt from.
fn find_base(records: &mut Vec<Kept>, at: Bookmark) -> Result<Found, HistoryError> {
    for kept in records.iter() {
        parse(kept)?;
    }
    records.sort_by_cached_key(|kept| bookmark_of(kept).ok());
    // A segment may be in the log and in the archive for a moment.
    records.dedup();
    let mut base = None;
    for (number, kept) in records.iter().enumerate() {
        let commit = parse(kept)?;
        if bookmark_of(kept)? <= at {
            if commit.base.is_some() || commit.from_empty || commit.head.pages == 0 {
                base = Some(number);
            }
            continue;
        }
        // The first one after the time.
        return Ok(match base {
            Some(base) => Found::Base(base),
            None if commit.base.is_some_and(|since| since <= at) => Found::Base(number),
            None if commit.from_empty => Found::NotYet,
            None => Found::Nothing,
        });
    }
    Ok(base.map_or(Found::Nothing, |_| Found::Unchanged))
}

/// Applies a base and what follows it, up to the time.
fn rebuild(records: &[Kept], at: Bookmark) -> Result<AsOf, HistoryError> {
    let mut overlay = Overlay::default();
    for (number, kept) in records.iter().enumerate() {
        // A base from after the time shows what was before it.
        if number > 0 && bookmark_of(kept)? > at {
            break;
        }
        overlay
            .replay(&parse(kept)?)
            .map_err(|_| HistoryError::Contradiction(kept.position))?;
    }
    let pages = overlay.committed_pages();
    if pages == 0 {
        return Err(HistoryError::DidNotExist(at));
    }
    let mut bytes = Vec::with_capacity(pages as usize * overlay.page_bytes());
    for number in 1..=pages {
        match overlay.place(number) {
            Place::Here(page) => bytes.extend_from_slice(page),
            // Pages that were never written, of a database that grew.
            Place::File | Place::Nowhere => bytes.resize(bytes.len() + overlay.page_bytes(), 0),
        }
    }
    Ok(AsOf::Database(bytes))
}
