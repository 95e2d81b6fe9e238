//! The pages of one database that its file does not have yet. No I/O.
//!
//! SQLite reads and writes here. What a transaction wrote is kept apart until its commit
//! ([`Overlay::commit`]), which also says what goes to the log: a page whole if it was not logged since
//! the last flush began, and after that only what changed in it. A flush takes the committed pages
//! ([`Overlay::capture`]) and, when they are safe in the file, lets go of those that did not change
//! meanwhile ([`Overlay::flushed`]).

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::commit_log::record::{Change, Commit, CommitWriter};

/// Buffers kept for the next transaction.
const SPARE_MAX: usize = 4;

/// Where a page is to be read.
#[derive(Debug)]
pub(crate) enum Place<'a> {
    Here(&'a [u8]),
    /// In the file, if it is that long; else it is all zeros.
    File,
    /// Nowhere: all zeros.
    Nowhere,
}

/// The pages of one database, by number, counted from 1.
#[derive(Debug, Default)]
pub(crate) struct Overlay {
    /// 0 until anything was read or written.
    page_bytes: usize,
    committed_page_bytes: usize,
    /// Pages of the database as of the last commit.
    pages: u32,
    /// Pages of the file that are still meant: a database that shrank and grew has none beyond.
    file_pages: u32,
    committed: BTreeMap<u32, Page>,
    /// What the open transaction wrote, and the length it gave the database.
    written: BTreeMap<u32, Arc<[u8]>>,
    resized: Option<u32>,
    /// What was written is another database, whole.
    replaced: bool,
    spare: Vec<Arc<[u8]>>,
    /// The least length since the last capture.
    least_since_capture: u32,
}

#[derive(Debug)]
struct Page {
    bytes: Arc<[u8]>,
    /// The log has it whole since the last capture.
    logged: bool,
}

/// A commit that cannot belong to this database as it is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Mismatch {
    pub(crate) page: u32,
}

/// The committed pages at one moment, for a flush.
#[derive(Debug)]
pub(crate) struct Capture {
    pub(crate) page_bytes: usize,
    pub(crate) pages: u32,
    pub(crate) changed: Vec<(u32, Arc<[u8]>)>,
}

impl Overlay {
    /// A database whose commits come from the log: its file, if there is one, has what they do not.
    pub(crate) fn before_replay() -> Self {
        Self::of_file(0, u32::MAX)
    }

    /// A database of which nothing is in memory. An empty file has no pages.
    pub(crate) fn of_file(page_bytes: usize, pages: u32) -> Self {
        Self {
            page_bytes,
            committed_page_bytes: page_bytes,
            pages,
            file_pages: pages,
            least_since_capture: pages,
            ..Self::default()
        }
    }

    pub(crate) fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    /// The size of the pages of the last commit: another only while a replacement waits for its own.
    pub(crate) fn committed_page_bytes(&self) -> usize {
        self.committed_page_bytes
    }

    /// Pages of the database as the open transaction sees it.
    pub(crate) fn pages(&self) -> u32 {
        self.resized.unwrap_or(self.pages)
    }

    /// Pages of the database as of the last commit.
    pub(crate) fn committed_pages(&self) -> u32 {
        self.pages
    }

    /// Bytes that the open transaction wrote.
    pub(crate) fn written_bytes(&self) -> usize {
        self.written.len() * self.page_bytes
    }

    pub(crate) fn has_written(&self, number: u32) -> bool {
        self.written.contains_key(&number)
    }

    /// Pages of the file that are still meant.
    pub(crate) fn file_pages(&self) -> u32 {
        self.file_pages
    }

    /// Where a page is to be read by the open transaction.
    pub(crate) fn place(&self, number: u32) -> Place<'_> {
        if let Some(bytes) = self.written.get(&number) {
            return Place::Here(bytes);
        }
        if number > self.pages() {
            return Place::Nowhere;
        }
        self.committed_place(number)
    }

    /// The pages in memory as of the last commit.
    pub(crate) fn committed_pages_here(&self) -> impl Iterator<Item = (u32, Arc<[u8]>)> {
        let pages = self.committed.iter();
        pages.map(|(number, page)| (*number, Arc::clone(&page.bytes)))
    }

    /// The same of the last commit, for a page that it has.
    pub(crate) fn committed_place(&self, number: u32) -> Place<'_> {
        match self.committed.get(&number) {
            Some(page) => Place::Here(&page.bytes),
            None if number <= self.file_pages => Place::File,
            None => Place::Nowhere,
        }
    }

    /// SQLite writes a page: for the commit that follows, because its cache is full, or to undo that.
    pub(crate) fn write(&mut self, number: u32, bytes: &[u8]) {
        if self.page_bytes != bytes.len() {
            self.spare.clear();
            self.page_bytes = bytes.len();
        }
        let pages = self.pages().max(number);
        self.resized = Some(pages);
        if let Some(buffer) = self.written.get_mut(&number).and_then(Arc::get_mut) {
            buffer.copy_from_slice(bytes);
            return;
        }
        let buffer = self.spare.pop().and_then(|mut spare| {
            // A spare buffer may still be part of a flush.
            Arc::get_mut(&mut spare)?.copy_from_slice(bytes);
            Some(spare)
        });
        self.written
            .insert(number, buffer.unwrap_or_else(|| Arc::from(bytes)));
    }

    /// Another database takes the place of this one, with the next commit. Its pages may have another size.
    pub(crate) fn replace<'p>(&mut self, page_bytes: usize, pages: impl Iterator<Item = &'p [u8]>) {
        self.rollback();
        self.replaced = true;
        self.spare.clear();
        self.page_bytes = page_bytes;
        for (number, page) in (1..).zip(pages) {
            self.written.insert(number, Arc::from(page));
            self.resized = Some(number);
        }
    }

    /// No page of the last commit counts any more, in memory or in the file: all come anew.
    fn forget_committed(&mut self) {
        self.committed.clear();
        self.spare.clear();
        self.file_pages = 0;
        self.least_since_capture = 0;
    }

    pub(crate) fn truncate(&mut self, pages: u32) {
        self.resized = Some(pages);
        self.written.split_off(&(pages + 1));
    }

    /// Forgets what the open transaction wrote.
    pub(crate) fn rollback(&mut self) {
        self.written.clear();
        self.resized = None;
        self.page_bytes = self.committed_page_bytes;
        self.replaced = false;
    }

    /// Whether the open transaction changed anything, as far as it was written here.
    pub(crate) fn is_written(&self) -> bool {
        self.resized.is_some()
    }

    /// Ends the open transaction: its pages become those of the database, and what the log needs of
    /// them goes into `record`.
    pub(crate) fn commit(&mut self, record: &mut CommitWriter<'_>) {
        self.resize(self.pages());
        self.resized = None;
        self.committed_page_bytes = self.page_bytes;
        if self.replaced {
            self.replaced = false;
            self.forget_committed();
        }
        while let Some((number, now)) = self.written.pop_first() {
            match self.committed.get_mut(&number) {
                Some(page) => {
                    if page.logged {
                        record.changed_page(number, &page.bytes, &now);
                    } else {
                        record.whole_page(number, &now);
                    }
                    page.logged = true;
                    let before = std::mem::replace(&mut page.bytes, now);
                    if self.spare.len() < SPARE_MAX {
                        self.spare.push(before);
                    }
                }
                None => {
                    record.whole_page(number, &now);
                    let page = Page {
                        bytes: now,
                        logged: true,
                    };
                    self.committed.insert(number, page);
                }
            }
        }
    }

    fn resize(&mut self, pages: u32) {
        if pages < self.pages {
            self.committed.split_off(&(pages + 1));
            self.file_pages = self.file_pages.min(pages);
            self.least_since_capture = self.least_since_capture.min(pages);
        }
        self.pages = pages;
    }

    /// Applies a commit from the log, as [`commit`](Self::commit) did when it was made.
    ///
    /// Changes of a page that is not here are skipped: the log begins later than the record that had it
    /// whole, so a flush that was complete when the earlier part of the log went has put the page with
    /// these changes into the file.
    pub(crate) fn replay(&mut self, commit: &Commit<'_>) -> Result<(), Mismatch> {
        let page_bytes = commit.head.page_bytes as usize;
        if self.page_bytes != page_bytes && self.page_bytes != 0 {
            self.forget_committed();
        }
        self.page_bytes = page_bytes;
        self.committed_page_bytes = page_bytes;
        self.resize(commit.head.pages);
        if commit.from_file {
            *self = Self::of_file(page_bytes, commit.head.pages);
        }
        for change in commit.pages() {
            match change.change {
                Change::Whole(bytes) => {
                    let page = Page {
                        bytes: Arc::from(bytes),
                        logged: true,
                    };
                    self.committed.insert(change.number, page);
                }
                Change::Ranges(ranges) => {
                    let Some(page) = self.committed.get_mut(&change.number) else {
                        continue;
                    };
                    ranges.apply(Arc::make_mut(&mut page.bytes));
                    if crc32c::crc32c(&page.bytes) != change.crc {
                        return Err(Mismatch {
                            page: change.number,
                        });
                    }
                }
            }
        }
        Ok(())
    }

    /// All commits of the log were replayed. The log gets changed pages whole again: the part of it that
    /// has them may go before the next flush, if a checkpoint from before is still under way.
    pub(crate) fn replayed(&mut self) {
        for page in self.committed.values_mut() {
            page.logged = false;
        }
    }

    /// The committed pages, for a flush. From here on the log gets changed pages whole again.
    pub(crate) fn capture(&mut self) -> Capture {
        self.least_since_capture = self.pages;
        let changed = self.committed.iter_mut().map(|(number, page)| {
            page.logged = false;
            (*number, Arc::clone(&page.bytes))
        });
        Capture {
            page_bytes: self.page_bytes,
            pages: self.pages,
            changed: changed.collect(),
        }
    }

    /// The captured pages are durable in the file.
    pub(crate) fn flushed(&mut self, capture: &Capture) {
        self.file_pages = capture.pages.min(self.least_since_capture);
        for (number, bytes) in &capture.changed {
            let same = self
                .committed
                .get(number)
                .is_some_and(|page| Arc::ptr_eq(&page.bytes, bytes));
            if same {
                self.committed.remove(number);
            }
        }
    }
}
