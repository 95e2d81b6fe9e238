//! One object as it was: its records in the archive and in the log, put together again.
//!
//! A database that changes is written to the log whole once a day, as it was before the change, or, if it
//! is large, copied to the archive from time to time (a *base*, either). To know it at a time, take the last
//! base before that time and apply the commits that follow it; or, if the first base in the log comes
//! later, that base itself, if nothing had changed since the time.
//!
//! Neither records nor pages are held in memory: both are put into files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use protocol::{Bookmark, LogPosition};
use tempfile::NamedTempFile;

use crate::archive::{Archive, ArchiveError, Pack, Snapshot};
use crate::commit_log::record::{self, Change, Commit, FileId, Record};
use crate::commit_log::replay::{ReplayError, replay};
use crate::disk::Disk;

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
    /// Of the files that hold what was found.
    #[error("the copy of the object as it was cannot be written")]
    Spool(#[from] io::Error),
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
#[derive(Debug)]
pub enum AsOf {
    /// Nothing has changed since.
    AsItIs,
    Database(Past),
}

/// A database of an earlier time, in a file that goes with this.
#[derive(Debug)]
pub struct Past {
    /// At its beginning.
    pub file: NamedTempFile,
    pub bytes: u64,
}

/// A segment may leave the log for the archive between a look at one and at the other.
const TRIES: u32 = 5;

impl History {
    /// The database at a bookmark. Blocks, and reads what it needs of archive and log; keeps its files in
    /// `spool`.
    pub fn database_at(&self, at: Bookmark, spool: &Path) -> Result<AsOf, HistoryError> {
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
            match self.live_records(at, spool) {
                Err(HistoryError::Log(_)) if tries < TRIES => {}
                live => break live?,
            }
        };
        let (mut records, live_start) = live;
        let mut snapshots = archive.snapshots(self.file)?.into_iter();
        records.snapshot = snapshots.rfind(|snapshot| snapshot.bookmark <= at);
        let mut packs = archive.packs(None)?;
        let fronts = fronts(&packs);
        packs.sort_by_key(|pack| std::cmp::Reverse((pack.last_ms, pack.start)));
        let mut read = Vec::new();
        for pack in packs {
            // All that is later than the time must be known; then older ones until there is a base, and
            // everything since that.
            let reached = match records.find() {
                Found::Nothing => None,
                Found::Snapshot => records.snapshot.as_ref().map(|base| base.bookmark),
                Found::Unchanged | Found::Base(_) | Found::NotYet => Some(at),
            };
            if reached.is_some_and(|reached| pack.last_ms < reached.unix_millis) {
                break;
            }
            archive.records(&pack, self.file, |position, commit| {
                records.keep(pack.worker, position, commit)
            })?;
            read.push(pack);
        }
        check_whole(&mut read, self.worker, live_start)?;
        let found = records.find();
        let complete = records.is_complete(found, &fronts, (self.worker, live_start));
        match found {
            Found::Unchanged => Ok(AsOf::AsItIs),
            Found::Snapshot if complete => records.rebuild(None, archive, spool),
            Found::Base(base) if complete => records.rebuild(Some(base), archive, spool),
            Found::NotYet => Err(HistoryError::DidNotExist(at)),
            Found::Nothing | Found::Snapshot | Found::Base(_) => Err(HistoryError::OutOfWindow {
                asked: at,
                first: match (records.next, records.kept.first(), self.changed) {
                    (Some(next), None, _) => next.bookmark,
                    (Some(next), Some(_), _) if !complete => next.bookmark,
                    (_, Some(first), _) => first.bookmark,
                    (None, None, Some(changed)) => changed,
                    (None, None, None) => return Err(HistoryError::DidNotExist(at)),
                },
            }),
        }
    }

    /// What the log has of an object, and where the log begins.
    fn live_records(
        &self,
        at: Bookmark,
        spool: &Path,
    ) -> Result<(Records, LogPosition), HistoryError> {
        let mut records = Records::new(at, spool)?;
        let mut failed = None;
        let found = replay(
            &*self.disk,
            &self.log_directory,
            Some(self.durable),
            |position, _, commit| {
                if commit.head.file == self.file
                    && let Err(error) = records.keep(self.worker, position, commit)
                {
                    failed = Some(error);
                }
                Ok(())
            },
        )?;
        if let Some(error) = failed {
            return Err(error);
        }
        let starts = found.segments.iter().map(|segment| segment.header.start);
        Ok((records, starts.min().unwrap_or(self.durable)))
    }
}

/// Where what is kept of a worker begins.
struct Front {
    first_ms: u64,
    start: LogPosition,
}

/// The same of every worker that has packs.
fn fronts(packs: &[Pack]) -> BTreeMap<u16, Front> {
    let mut fronts: BTreeMap<u16, Front> = BTreeMap::new();
    for pack in packs {
        let front = fronts.entry(pack.worker).or_insert(Front {
            first_ms: pack.first_ms,
            start: pack.start,
        });
        front.first_ms = front.first_ms.min(pack.first_ms);
        front.start = front.start.min(pack.start);
    }
    fronts
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

/// A record of the object. A commit counts from where it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Kept {
    bookmark: Bookmark,
    worker: u16,
    position: LogPosition,
    /// Where its bytes are in the spool, and how many.
    at: u64,
    bytes: u32,
    says: Says,
}

/// What a record says of the database before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Says {
    /// That there was one.
    Nothing,
    /// All of it, as it was since then.
    Base(Bookmark),
    /// That it was empty.
    FromEmpty,
    /// Whatever it was, it is empty now.
    Deleted,
    /// Whatever it was, it is now what nothing but a snapshot has.
    Replaced,
}

/// What the records of an object, as far as they are known, say of a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    /// Nothing came after it.
    Unchanged,
    /// From this record on the object can be rebuilt.
    Base(Base),
    /// From the snapshot on.
    Snapshot,
    /// The object begins after it.
    NotYet,
    /// Older records are needed.
    Nothing,
}

/// A base in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Base {
    /// From before the time: so many records come before it.
    Kept(usize),
    /// The first record after the time, which shows what was before it.
    Next,
}

/// Records of one object up to a time, some 80 bytes of memory each, and the first one after it.
struct Records {
    at: Bookmark,
    kept: Vec<Kept>,
    sorted: bool,
    next: Option<Kept>,
    /// Whose records these are, and those after the time.
    workers: BTreeSet<u16>,
    /// Their bytes, one after the other.
    spool: File,
    spooled: u64,
    /// A copy from before the time.
    snapshot: Option<Snapshot>,
}

impl Records {
    fn new(at: Bookmark, spool: &Path) -> io::Result<Self> {
        Ok(Self {
            at,
            kept: Vec::new(),
            sorted: true,
            next: None,
            workers: BTreeSet::new(),
            spool: unnamed_file(spool)?,
            spooled: 0,
            snapshot: None,
        })
    }

    fn keep(
        &mut self,
        worker: u16,
        position: LogPosition,
        commit: &Commit<'_>,
    ) -> Result<(), HistoryError> {
        let says = match commit.base {
            Some(since) => Says::Base(since),
            None if commit.head.pages == 0 => Says::Deleted,
            None if commit.from_file => Says::Replaced,
            None if commit.from_empty => Says::FromEmpty,
            None => Says::Nothing,
        };
        self.workers.insert(worker);
        let contradiction = |_| HistoryError::Contradiction(position);
        let kept = Kept {
            bookmark: Bookmark {
                unix_millis: commit.head.unix_millis,
                position: position.after(commit.raw.len()),
            },
            worker,
            position,
            at: self.spooled,
            bytes: u32::try_from(commit.raw.len()).map_err(contradiction)?,
            says,
        };
        if kept.bookmark > self.at {
            if self.next.is_some_and(|next| next.bookmark <= kept.bookmark) {
                return Ok(());
            }
            self.next = Some(kept);
            if !matches!(says, Says::Base(_)) {
                return Ok(());
            }
        } else {
            self.kept.push(kept);
            self.sorted = false;
        }
        self.spool.write_all(commit.raw)?;
        self.spooled += commit.raw.len() as u64;
        Ok(())
    }

    /// Puts records in order, and looks for what the object is rebuilt from.
    fn find(&mut self) -> Found {
        if !self.sorted {
            self.kept.sort_unstable();
            // A segment may be in the log and in the archive for a moment.
            self.kept.dedup_by_key(|kept| (kept.worker, kept.bookmark));
            self.sorted = true;
        }
        let mut snapshot = self.snapshot.as_ref();
        let mut base = None;
        for (number, kept) in self.kept.iter().enumerate() {
            match kept.says {
                Says::Nothing => {}
                Says::Base(_) | Says::FromEmpty | Says::Deleted => base = Some(number),
                Says::Replaced => {
                    base = None;
                    snapshot = snapshot.filter(|it| it.bookmark >= kept.bookmark);
                }
            }
        }
        let Some(next) = self.next else {
            return match base {
                None if snapshot.is_none() => Found::Nothing,
                _ => Found::Unchanged,
            };
        };
        match (base, next.says) {
            // Nothing had changed since the time, whatever came before that.
            (_, Says::Base(since)) if since <= self.at => Found::Base(Base::Next),
            (Some(base), _) if snapshot.is_none_or(|it| it.bookmark < self.kept[base].bookmark) => {
                Found::Base(Base::Kept(base))
            }
            _ if snapshot.is_some() => Found::Snapshot,
            // A file is put where nothing was.
            (_, Says::FromEmpty | Says::Replaced) => Found::NotYet,
            _ => Found::Nothing,
        }
    }

    /// Whether nothing can be missing between what the object is rebuilt from and the time: of every worker
    /// that had the object, what is kept begins before that.
    fn is_complete(
        &self,
        found: Found,
        fronts: &BTreeMap<u16, Front>,
        (worker, live_start): (u16, LogPosition),
    ) -> bool {
        let (since, base) = match found {
            Found::Base(Base::Kept(number)) => {
                (self.kept[number].bookmark, Some(self.kept[number]))
            }
            Found::Snapshot => match &self.snapshot {
                Some(snapshot) => (snapshot.bookmark, None),
                None => return false,
            },
            Found::Base(Base::Next) | Found::Unchanged | Found::NotYet | Found::Nothing => {
                return true;
            }
        };
        self.workers.iter().all(|of| {
            let at_its_own = base.is_some_and(|base| base.worker == *of);
            match fronts.get(of) {
                _ if at_its_own => true,
                Some(front) => {
                    front.start == LogPosition::ZERO || front.first_ms <= since.unix_millis
                }
                None => *of == worker && live_start == LogPosition::ZERO,
            }
        })
    }

    /// Applies a base, the snapshot if it is no record, and what follows it, up to the time.
    fn rebuild(
        mut self,
        base: Option<Base>,
        archive: &Archive,
        spool: &Path,
    ) -> Result<AsOf, HistoryError> {
        let mut pages = Pages::new(spool)?;
        let mut after = None;
        if let Some(snapshot) = self.snapshot.take().filter(|_| base.is_none()) {
            let page_bytes = archive.get_snapshot(&snapshot, pages.file.as_file_mut())?;
            pages.page_bytes = u64::from(page_bytes);
            after = Some(snapshot.bookmark);
        }
        let (first, next) = match base {
            None => (0, None),
            Some(Base::Kept(number)) => (number, None),
            Some(Base::Next) => (self.kept.len(), self.next),
        };
        let mut bytes = Vec::new();
        for kept in self.kept[first..].iter().chain(&next) {
            if after.is_some_and(|after| kept.bookmark <= after) {
                continue;
            }
            bytes.resize(kept.bytes as usize, 0);
            self.spool.seek(SeekFrom::Start(kept.at))?;
            self.spool.read_exact(&mut bytes)?;
            let contradiction = HistoryError::Contradiction(kept.position);
            let Ok((Record::Commit(commit), _)) = record::read(&bytes, kept.position) else {
                return Err(contradiction);
            };
            if !pages.apply(&commit)? {
                return Err(contradiction);
            }
        }
        let bytes = pages.file.as_file().metadata()?.len();
        if bytes == 0 {
            return Err(HistoryError::DidNotExist(self.at));
        }
        pages.file.as_file_mut().rewind()?;
        Ok(AsOf::Database(Past {
            file: pages.file,
            bytes,
        }))
    }
}

/// A database in a file, on which commits are repeated.
struct Pages {
    file: NamedTempFile,
    page_bytes: u64,
}

impl Pages {
    fn new(spool: &Path) -> io::Result<Self> {
        Ok(Self {
            file: NamedTempFile::new_in(spool)?,
            page_bytes: 0,
        })
    }

    /// Repeats a commit; `false` if it does not belong to this database as it is.
    fn apply(&mut self, commit: &Commit<'_>) -> io::Result<bool> {
        let file = self.file.as_file();
        let page_bytes = u64::from(commit.head.page_bytes);
        if self.page_bytes != page_bytes {
            // Another database is in its place.
            file.set_len(0)?;
            self.page_bytes = page_bytes;
        }
        // What it does not write of new pages is zeros.
        file.set_len(u64::from(commit.head.pages) * page_bytes)?;
        let mut page = Vec::new();
        for changed in commit.pages() {
            let at = u64::from(changed.number - 1) * page_bytes;
            match changed.change {
                Change::Whole(bytes) => file.write_all_at(bytes, at)?,
                Change::Ranges(ranges) => {
                    page.resize(commit.head.page_bytes as usize, 0);
                    file.read_exact_at(&mut page, at)?;
                    ranges.apply(&mut page);
                    if crc32c::crc32c(&page) != changed.crc {
                        return Ok(false);
                    }
                    file.write_all_at(&page, at)?;
                }
            }
        }
        Ok(true)
    }
}

/// A file that is gone with its last descriptor, whatever happens.
pub(crate) fn unnamed_file(directory: &Path) -> io::Result<File> {
    tempfile::tempfile_in(directory)
}
