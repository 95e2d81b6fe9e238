//! One database, as SQLite sees it: reads from memory or from its file, commits into the log.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use protocol::{Bookmark, Epoch, LogPosition, ShardId};
use tracing::warn;
use xxhash_rust::xxh3::Xxh3DefaultBuilder;

use crate::alarm::AlarmState;
use crate::archive::BASE_EVERY;
use crate::catalog::{Note, USED_WITHIN_MILLIS};
use crate::checkpoint;
use crate::clock::Clock;
use crate::commit_log::Log;
use crate::commit_log::record::{CommitHead, CommitWriter, FileId, Named, Told};
use crate::disk::{Access, Disk, DiskFile};
use crate::storage::overlay::{Overlay, Place};
use crate::storage::vfs::{DatabaseFile, Failed, Read};

/// Files that are open for reading, whatever the number of awake objects.
const DESCRIPTORS_MAX: usize = 128;

/// What databases need of their engine.
pub(super) struct Core {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) shards: PathBuf,
    pub(super) log_directory: PathBuf,
    pub(super) log: Log,
    pub(super) clock: Arc<dyn Clock>,
    /// The time of the latest commit: times never go back within a log.
    pub(super) latest_ms: Cell<u64>,
    /// Databases up to this size are written whole once a day; 0: none is.
    pub(super) base_bytes_max: u64,
    pub(super) based: RefCell<Based>,
    /// Larger ones that changed lately: to be copied, if that was not done lately.
    pub(super) large: RefCell<VecDeque<Large>>,
    pub(super) page_bytes: u32,
    pub(super) transaction_bytes_max: u64,
    pub(super) dirty: RefCell<VecDeque<(LogPosition, FileId)>>,
    pub(super) notes: RefCell<HashMap<FileId, Note, Xxh3DefaultBuilder>>,
    pub(super) descriptors: RefCell<Descriptors>,
}

/// A database that may be due to be copied to the archive.
#[derive(Debug, Clone, Copy)]
pub struct Large {
    pub id: FileId,
    pub shard: ShardId,
    /// Whatever copies there are.
    pub again: bool,
}

/// How often a database without a base in the log is thought of.
const LARGE_EVERY_MS: u64 = 3_600_000;

/// [`BASE_EVERY`] in milliseconds.
const BASE_EVERY_MS: u64 = BASE_EVERY.as_secs() * 1000;

/// The databases that have a base of today or yesterday, halves of a day. Some 20 bytes each; forgotten
/// with the process, which costs each database one more base.
#[derive(Default)]
pub(super) struct Based {
    current: HashSet<FileId, Xxh3DefaultBuilder>,
    previous: HashSet<FileId, Xxh3DefaultBuilder>,
    since_ms: u64,
}

impl Based {
    /// Counts a base; `false` if there is one already.
    fn insert(&mut self, id: FileId, now: u64) -> bool {
        if now >= self.since_ms.saturating_add(BASE_EVERY_MS) {
            self.previous = std::mem::take(&mut self.current);
            self.since_ms = now;
        }
        !self.previous.contains(&id) && self.current.insert(id)
    }

    pub(super) fn remove(&mut self, id: FileId) {
        self.current.remove(&id);
        self.previous.remove(&id);
    }
}

/// Open files, the least recently used first.
#[derive(Default)]
pub(super) struct Descriptors(VecDeque<(FileId, Rc<dyn DiskFile>)>);

/// One database: its pages in memory and its place in the log.
pub(super) struct Database {
    pub(super) id: FileId,
    pub(super) shard: ShardId,
    pub(super) core: Rc<Core>,
    pub(super) overlay: RefCell<Overlay>,
    /// Where its last commit begins and ends.
    pub(super) last: Cell<(LogPosition, LogPosition)>,
    /// Where its first commit is that its file lacks, and the same since the capture under way.
    pub(super) first_unflushed: Cell<Option<LogPosition>>,
    pub(super) since_capture: Cell<Option<LogPosition>>,
    pub(super) capturing: Cell<bool>,
    /// It is in the list of those to be written soon.
    pub(super) asleep: Cell<bool>,
    /// A connection has it.
    pub(super) open: Cell<bool>,
    /// So many snapshots need its file as it is.
    pub(super) snapshots: Cell<u32>,
    /// Counts how often they had to give way.
    pub(super) revoked: Cell<u32>,
    /// Its last commits were lost with the log: nothing may be read from here any more.
    pub(super) lost: Cell<bool>,
    pub(super) named: RefCell<Option<Named>>,
    /// The next commit tells class and name.
    pub(super) tell_name: Cell<bool>,
    /// The next commit tells this of the alarm.
    pub(super) tell_alarm: RefCell<Option<AlarmState>>,
    /// The next commit tells that a file took the place of the database.
    pub(super) tell_file: Cell<bool>,
    /// Bytes that the transaction may write.
    pub(super) room: Cell<u64>,
    /// Its last change, as far as known: no later than this.
    pub(super) changed: Cell<Bookmark>,
    /// When it was last found to have a base.
    pub(super) based_ms: Cell<u64>,
    /// Size and last use that the catalog knows, or will.
    pub(super) noted: Cell<(u64, u64)>,
}

impl Core {
    /// The time of a commit.
    pub(super) fn now(&self) -> u64 {
        let now = self.clock.unix_millis().max(self.latest_ms.get());
        self.latest_ms.set(now);
        now
    }

    /// Pages that a file has, and what the catalog should know of it.
    pub(super) fn overlay_of_file(
        &self,
        id: FileId,
        shard: ShardId,
    ) -> io::Result<(Overlay, (u64, u64))> {
        let path = checkpoint::path(&self.shards, shard, id);
        let file: Rc<dyn DiskFile> = match self.disk.open(&path, Access::Read) {
            Ok(file) => file.into(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok((Overlay::default(), (0, 0)));
            }
            Err(error) => return Err(error),
        };
        let status = file.status()?;
        if status.bytes == 0 {
            return Ok((Overlay::default(), (0, 0)));
        }
        let page_bytes = page_bytes(&*file)?;
        // A last page that is not whole is damage; SQLite will say so.
        let pages = status.bytes.div_ceil(page_bytes as u64);
        let pages = u32::try_from(pages).map_err(io::Error::other)?;
        self.descriptors.borrow_mut().keep(id, file);
        Ok((
            Overlay::of_file(page_bytes, pages),
            (status.bytes, status.modified_ms),
        ))
    }

    pub(super) fn read_file(
        &self,
        id: FileId,
        shard: ShardId,
        buffer: &mut [u8],
        at: u64,
    ) -> io::Result<usize> {
        let kept = self.descriptors.borrow_mut().get(id);
        let file = match kept {
            Some(file) => file,
            None => {
                let path = checkpoint::path(&self.shards, shard, id);
                let file: Rc<dyn DiskFile> = match self.disk.open(&path, Access::Read) {
                    Ok(file) => file.into(),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
                    Err(error) => return Err(error),
                };
                self.descriptors.borrow_mut().keep(id, Rc::clone(&file));
                file
            }
        };
        file.read_at(buffer, at)
    }
}

/// Where the header of a database has the size of its pages
/// (<https://www.sqlite.org/fileformat.html#page_size>).
const PAGE_SIZE_AT: u64 = 16;

/// Bytes of a page of a database file.
fn page_bytes(file: &dyn DiskFile) -> io::Result<usize> {
    let mut field = [0; 2];
    file.read_at(&mut field, PAGE_SIZE_AT)?;
    Ok(match u16::from_be_bytes(field) {
        1 => 65536,
        bytes if bytes.is_power_of_two() && bytes >= 512 => bytes.into(),
        // No database at all; SQLite says so when it sees the header.
        _ => 4096,
    })
}

impl Descriptors {
    pub(super) fn get(&mut self, id: FileId) -> Option<Rc<dyn DiskFile>> {
        let at = self.0.iter().rposition(|(known, _)| *known == id)?;
        let entry = self.0.remove(at)?;
        let file = Rc::clone(&entry.1);
        self.0.push_back(entry);
        Some(file)
    }

    pub(super) fn keep(&mut self, id: FileId, file: Rc<dyn DiskFile>) {
        self.forget(id);
        if self.0.len() >= DESCRIPTORS_MAX {
            self.0.pop_front();
        }
        self.0.push_back((id, file));
    }

    pub(super) fn forget(&mut self, id: FileId) {
        self.0.retain(|(known, _)| *known != id);
    }
}

impl Database {
    /// One that nobody has open, whose file has all that was committed.
    pub(super) fn new(id: FileId, shard: ShardId, core: Rc<Core>, overlay: Overlay) -> Self {
        Self {
            id,
            shard,
            overlay: RefCell::new(overlay),
            last: Cell::new((LogPosition::ZERO, LogPosition::ZERO)),
            first_unflushed: Cell::new(None),
            since_capture: Cell::new(None),
            capturing: Cell::new(false),
            asleep: Cell::new(false),
            open: Cell::new(false),
            snapshots: Cell::new(0),
            revoked: Cell::new(0),
            lost: Cell::new(false),
            named: RefCell::new(None),
            tell_name: Cell::new(false),
            tell_alarm: RefCell::new(None),
            tell_file: Cell::new(false),
            room: Cell::new(core.transaction_bytes_max),
            noted: Cell::new((0, 0)),
            changed: Cell::new(Bookmark::at_time(0)),
            based_ms: Cell::new(0),
            core,
        }
    }

    pub(super) fn is_dirty_since(&self, position: LogPosition) -> bool {
        self.first_unflushed.get() == Some(position) || self.since_capture.get() == Some(position)
    }

    pub(super) fn rolled_back(&self) {
        self.overlay.borrow_mut().rollback();
        self.tell_alarm.take();
        self.room.set(self.core.transaction_bytes_max);
    }

    /// Notes for the catalog that somebody used the object, if it exists.
    pub(super) fn used(&self, precision_ms: u64) {
        let overlay = self.overlay.borrow();
        let bytes = u64::from(overlay.committed_pages()) * overlay.committed_page_bytes() as u64;
        if bytes == 0 {
            return;
        }
        let now = self.core.now();
        let mut notes = self.core.notes.borrow_mut();
        let note = notes.entry(self.id).or_insert_with(|| Note {
            shard: self.shard,
            // Nothing in the log says so.
            since: self.core.log.end(),
            named: None,
            bytes,
            first_ms: now,
            used_ms: now,
            used_within_ms: precision_ms,
            alarm: None,
            deleted: false,
            keys: None,
        });
        note.used_ms = note.used_ms.max(now);
        note.used_within_ms = note.used_within_ms.min(precision_ms);
    }

    /// Notes for the catalog how many keys and rows the object has, if it exists.
    pub(super) fn keys(&self, keys: u32) {
        self.used(USED_WITHIN_MILLIS);
        if let Some(note) = self.core.notes.borrow_mut().get_mut(&self.id) {
            note.keys = Some(keys);
        }
    }

    /// Notes for the catalog what this commit changed of what it knows.
    pub(super) fn note(
        &self,
        begin: LogPosition,
        now: u64,
        told_name: bool,
        alarm: Option<AlarmState>,
    ) {
        let overlay = self.overlay.borrow();
        let bytes = u64::from(overlay.committed_pages()) * overlay.page_bytes() as u64;
        let (noted_bytes, noted_used) = self.noted.get();
        let deleted = bytes == 0;
        let lately = now.saturating_sub(noted_used) < USED_WITHIN_MILLIS;
        if bytes == noted_bytes && lately && !told_name && alarm.is_none() {
            return;
        }
        self.noted.set((bytes, now));
        let mut notes = self.core.notes.borrow_mut();
        let note = notes.entry(self.id).or_insert_with(|| Note {
            shard: self.shard,
            since: begin,
            named: None,
            bytes,
            first_ms: now,
            used_ms: now,
            used_within_ms: USED_WITHIN_MILLIS,
            alarm: None,
            deleted,
            keys: None,
        });
        if note.bytes == 0 {
            note.first_ms = now;
        }
        if deleted {
            note.deleted = true;
            note.alarm = None;
            note.keys = None;
        }
        if alarm.is_some() {
            note.alarm = alarm;
        }
        note.bytes = bytes;
        note.used_ms = note.used_ms.max(now);
        note.named.clone_from(&self.named.borrow());
    }
}

impl DatabaseFile for Database {
    fn read(&self, buffer: &mut [u8], at: u64) -> Result<Read, Failed> {
        if self.lost.get() {
            return Err(Failed::Io);
        }
        let overlay = self.overlay.borrow();
        let page_bytes = overlay.page_bytes() as u64;
        if page_bytes == 0 {
            return Ok(Read::BeyondTheEnd);
        }
        let number = u32::try_from(at / page_bytes + 1).map_err(|_| Failed::Io)?;
        let within = usize::try_from(at % page_bytes).map_err(|_| Failed::Io)?;
        match overlay.place(number) {
            Place::Here(page) => {
                let part = page.get(within..within + buffer.len()).ok_or(Failed::Io)?;
                buffer.copy_from_slice(part);
                Ok(Read::All)
            }
            Place::File => {
                let read = self.core.read_file(self.id, self.shard, buffer, at);
                match read {
                    Ok(bytes) if bytes == buffer.len() => Ok(Read::All),
                    Ok(_) => Ok(Read::BeyondTheEnd),
                    Err(error) => {
                        warn!(database = %self.id, %error, "a database could not be read");
                        Err(Failed::Io)
                    }
                }
            }
            Place::Nowhere => Ok(Read::BeyondTheEnd),
        }
    }

    fn write(&self, page: &[u8], at: u64) -> Result<(), Failed> {
        let mut overlay = self.overlay.borrow_mut();
        let known = overlay.page_bytes();
        // One that was deleted may begin again with other pages.
        let whole =
            (known == page.len() || overlay.pages() == 0) && at.is_multiple_of(page.len() as u64);
        if !whole || self.lost.get() {
            return Err(Failed::Io);
        }
        let number = at / page.len() as u64 + 1;
        let number = u32::try_from(number).map_err(|_| Failed::Io)?;
        let bytes = (overlay.written_bytes() + page.len()) as u64;
        if bytes > self.room.get() && !overlay.has_written(number) {
            // What undoes the transaction writes too, and must not fail.
            self.room.set(2 * self.core.transaction_bytes_max);
            return Err(Failed::Full);
        }
        overlay.write(number, page);
        Ok(())
    }

    fn truncate(&self, bytes: u64) -> Result<(), Failed> {
        let mut overlay = self.overlay.borrow_mut();
        let page_bytes = overlay.page_bytes().max(1) as u64;
        let pages = u32::try_from(bytes / page_bytes).map_err(|_| Failed::Io)?;
        overlay.truncate(pages);
        Ok(())
    }

    fn bytes(&self) -> u64 {
        let overlay = self.overlay.borrow();
        u64::from(overlay.pages()) * overlay.page_bytes() as u64
    }

    fn commit(&self) {
        self.commit_now();
    }
}

impl Database {
    /// What was written becomes one record of the log.
    pub(super) fn commit_now(&self) {
        let mut overlay = self.overlay.borrow_mut();
        if !overlay.is_written() {
            return;
        }
        let now = self.core.now();
        let base = self.log_base(&overlay, now);
        let named = self.named.borrow();
        let told_name = self.tell_name.take();
        let alarm = self.tell_alarm.take();
        let told = Told {
            named: named.as_ref().filter(|_| told_name),
            alarm: alarm.as_ref(),
            base: None,
            from_empty: overlay.committed_pages() == 0,
            from_file: self.tell_file.take(),
        };
        let head = self.head(overlay.page_bytes(), overlay.pages(), now);
        let (begin, end) = self.core.log.append(|buffer| {
            let mut record = CommitWriter::begin(buffer, &head, &told);
            overlay.commit(&mut record);
            record.finish();
        });
        drop(overlay);
        drop(named);
        self.last.set((begin, end));
        self.changed.set(Bookmark {
            unix_millis: now,
            position: end,
        });
        let begin = base.unwrap_or(begin);
        let first = if self.capturing.get() {
            &self.since_capture
        } else {
            &self.first_unflushed
        };
        if first.get().is_none() {
            first.set(Some(begin));
            self.core.dirty.borrow_mut().push_back((begin, self.id));
        }
        if !self.id.is_catalog() {
            self.note(begin, now, told_name, alarm);
        }
    }

    fn head(&self, page_bytes: usize, pages: u32, now: u64) -> CommitHead {
        CommitHead {
            shard: self.shard,
            epoch: Epoch::FIRST,
            unix_millis: now,
            previous: self.last.get().0,
            file: self.id,
            page_bytes: u32::try_from(page_bytes).expect("at most 65536"),
            pages,
        }
    }

    /// Before a change, once a day: the database as it was before, whole, so that it can be found in the
    /// archive. Where that begins, if it was written.
    fn log_base(&self, overlay: &Overlay, now: u64) -> Option<LogPosition> {
        let core = &self.core;
        let lately = now < self.based_ms.get().saturating_add(BASE_EVERY_MS);
        // Before a file that was put there, there was nothing.
        if core.base_bytes_max == 0 || self.id.is_catalog() || lately || self.tell_file.get() {
            return None;
        }
        self.based_ms.set(now);
        let pages = overlay.committed_pages();
        let bytes = u64::from(pages) * overlay.committed_page_bytes() as u64;
        // What begins with this commit is its own base. A large one may be smaller tomorrow.
        if !core.based.borrow_mut().insert(self.id, now) || pages == 0 {
            return None;
        }
        if bytes > core.base_bytes_max {
            core.based.borrow_mut().remove(self.id);
            self.based_ms
                .set(now.saturating_sub(BASE_EVERY_MS) + LARGE_EVERY_MS);
            core.large.borrow_mut().push_back(Large {
                id: self.id,
                shard: self.shard,
                again: false,
            });
            return None;
        }
        let page_bytes = overlay.committed_page_bytes();
        let mut whole = vec![0; usize::try_from(bytes).ok()?];
        for (number, page) in (1..).zip(whole.chunks_exact_mut(page_bytes)) {
            match overlay.committed_place(number) {
                Place::Here(bytes) => page.copy_from_slice(bytes),
                Place::File => {
                    let at = u64::from(number - 1) * page_bytes as u64;
                    if let Err(error) = core.read_file(self.id, self.shard, page, at) {
                        // The database itself will say so when it is read.
                        warn!(database = %self.id, %error, "no base could be written");
                        core.based.borrow_mut().remove(self.id);
                        return None;
                    }
                }
                Place::Nowhere => {}
            }
        }
        let head = self.head(page_bytes, pages, now);
        let told = Told {
            base: Some(self.changed.get()),
            ..Told::default()
        };
        let (begin, end) = core.log.append(|buffer| {
            let mut record = CommitWriter::begin(buffer, &head, &told);
            for (number, page) in (1..).zip(whole.chunks_exact(page_bytes)) {
                record.whole_page(number, page);
            }
            record.finish();
        });
        self.last.set((begin, end));
        Some(begin)
    }
}
