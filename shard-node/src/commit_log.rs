//! A worker's append-only log and its group commit.
//!
//! The worker's thread appends commits to a buffer in memory ([`Log::append`]). A thread of its own
//! ([`Writer`]) takes whatever gathered there while it was busy, writes it as one group, and syncs it
//! once. Then all of it is durable, and the worker is told.
//!
//! A write or sync that fails leaves the fate of its group unknown, so none of it ever counts: the log
//! stops ([`State::Failed`]) with what was durable before. The worker takes back what depended on the
//! rest, and asks for a fresh segment that begins where the durable part ends ([`Log::reopen`]); its
//! header makes the failed tail void. Until that works, nothing can be written.

pub mod record;
pub(crate) mod replay;
pub(crate) mod segment;

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use metrics::Histogram;
use protocol::LogPosition;
use tokio::sync::Notify;

use crate::clock::monotonic_nanos;
use crate::disk::Disk;
use record::{begin_group, seal_group};
use segment::{Header, Segment};

/// After this time without work the writer adds a record that says how far the log is durable. It lets
/// recovery tell damage of the last acknowledged commits from a torn tail.
const QUIET: Duration = Duration::from_millis(100);

/// Bytes of a log that the writer lets gather before it is full: then the worker runs no more turns until
/// the disk has caught up.
pub const UNSYNCED_BYTES_MAX: usize = 32 << 20;

/// The log of one worker, as its worker's thread sees it.
#[derive(Clone)]
pub(crate) struct Log(Arc<Shared>);

struct Shared {
    state: Mutex<Inner>,
    /// For the writer: there is work.
    work: Condvar,
    durable: AtomicU64,
    /// For the worker: more is durable, or the log failed, or it works again.
    progress: Arc<Notify>,
    /// The same, for a worker that stops and has nothing else to do.
    done: Condvar,
    stats: Stats,
}

/// What a log counts.
#[derive(Debug, Default)]
pub struct Stats {
    pub groups: AtomicU64,
    pub bytes: AtomicU64,
    /// Writes and syncs that failed.
    pub failures: AtomicU64,
}

struct Inner {
    /// Records that the writer has not taken; begins with a group record if there are any.
    pending: Vec<u8>,
    /// Where `pending` begins in the log.
    base: LogPosition,
    /// Where the last group that was taken ends; markers do not count.
    group_end: LogPosition,
    /// The writer may take what is pending.
    released: bool,
    /// The writer waits for work.
    idle: bool,
    /// Threads that wait until all is durable.
    flushing: u32,
    state: State,
    closed: bool,
    /// All segments, oldest first.
    segments: VecDeque<Header>,
}

impl Inner {
    /// The first segment and where its records end, if none of them counts that is at or after `needed`.
    /// Never the last one.
    fn first_before(&self, needed: LogPosition) -> Option<(Header, LogPosition)> {
        let end = self
            .segments
            .iter()
            .skip(1)
            .map(|later| later.start)
            .min()?;
        (end <= needed).then(|| (self.segments[0], end))
    }
}

/// Whether the log can be written.
#[derive(Debug, Clone)]
pub(crate) enum State {
    Open,
    Failed(LogFailure),
    /// The worker has taken back what was lost; the writer tries a fresh segment.
    Reopening(LogFailure),
}

/// A log at one moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Standing {
    pub(crate) open: bool,
    /// So much waits for the disk that nothing should be added.
    pub(crate) is_full: bool,
    pub(crate) end: LogPosition,
}

/// Why a log stopped.
#[derive(Debug, Clone)]
pub struct LogFailure {
    pub disk_full: bool,
    pub message: Arc<str>,
}

impl LogFailure {
    pub(crate) fn of(error: &io::Error) -> Self {
        let full = matches!(
            error.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        );
        Self {
            disk_full: full,
            message: error.to_string().into(),
        }
    }
}

impl Log {
    /// A log whose durable part ends at `end`, in these segments.
    pub(crate) fn new(end: LogPosition, segments: VecDeque<Header>, progress: Arc<Notify>) -> Self {
        Self(Arc::new(Shared {
            state: Mutex::new(Inner {
                pending: Vec::new(),
                base: end,
                group_end: end,
                released: false,
                idle: false,
                flushing: 0,
                state: State::Open,
                closed: false,
                segments,
            }),
            work: Condvar::new(),
            durable: AtomicU64::new(end.0),
            progress,
            done: Condvar::new(),
            stats: Stats::default(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics while it is held; if it did, what is inside would still be whole records.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends the record that `write` writes; where it begins and ends. It is durable once
    /// [`durable`](Self::durable) reaches the end, and the writer begins with it at the next
    /// [`release`](Self::release).
    pub(crate) fn append(&self, write: impl FnOnce(&mut Vec<u8>)) -> (LogPosition, LogPosition) {
        let mut inner = self.lock();
        if inner.pending.is_empty() {
            begin_group(&mut inner.pending);
        }
        let begin = inner.base.after(inner.pending.len());
        write(&mut inner.pending);
        (begin, inner.base.after(inner.pending.len()))
    }

    /// Lets the writer take what was appended. Called when the worker has nothing else to do at once,
    /// so that a group is as large as it can be without waiting.
    pub(crate) fn release(&self) {
        let mut inner = self.lock();
        if !inner.pending.is_empty() && !inner.released {
            inner.released = true;
            // One that is at work looks by itself before it waits.
            if inner.idle {
                self.0.work.notify_one();
            }
        }
    }

    /// Everything before this survives a loss of power.
    pub(crate) fn durable(&self) -> LogPosition {
        LogPosition(self.0.durable.load(Ordering::Acquire))
    }

    pub(crate) fn state(&self) -> State {
        self.lock().state.clone()
    }

    /// Whether the log can be written, and what waits for the disk.
    pub(crate) fn standing(&self) -> Standing {
        let inner = self.lock();
        Standing {
            open: matches!(inner.state, State::Open),
            is_full: inner.pending.len() >= UNSYNCED_BYTES_MAX,
            end: inner.base.after(inner.pending.len()),
        }
    }

    /// After a failure: drops what was not durable and lets the writer try a fresh segment.
    pub(crate) fn reopen(&self) {
        let mut inner = self.lock();
        if let State::Failed(failure) = &inner.state {
            inner.state = State::Reopening(failure.clone());
            inner.pending.clear();
            inner.released = false;
            inner.base = self.durable();
            inner.group_end = inner.base;
            self.0.work.notify_one();
        }
    }

    /// Blocks until everything appended is durable; an error if the log failed instead.
    pub(crate) fn flush(&self) -> Result<(), LogFailure> {
        self.release();
        let mut inner = self.lock();
        loop {
            if let State::Failed(failure) | State::Reopening(failure) = &inner.state {
                return Err(failure.clone());
            }
            if inner.pending.is_empty() && self.durable() >= inner.group_end {
                return Ok(());
            }
            inner.flushing += 1;
            inner = self
                .0
                .done
                .wait(inner)
                .unwrap_or_else(PoisonError::into_inner);
            inner.flushing -= 1;
        }
    }

    /// Where the next record goes, but for the group record that may come before it.
    pub(crate) fn end(&self) -> LogPosition {
        let inner = self.lock();
        inner.base.after(inner.pending.len())
    }

    /// Bytes of the log that recovery would read, about.
    pub(crate) fn live_bytes(&self) -> u64 {
        let inner = self.lock();
        let end = inner.base.after(inner.pending.len());
        let start = inner.segments.iter().map(|segment| segment.start).min();
        end.0 - start.unwrap_or(end).0.min(end.0)
    }

    /// Whether there is a segment whose records are all before `needed`.
    pub(crate) fn may_retire(&self, needed: LogPosition) -> bool {
        self.lock().first_before(needed).is_some()
    }

    /// The segment that is written, or was last.
    pub(crate) fn last_segment(&self) -> Option<Header> {
        self.lock().segments.back().copied()
    }

    /// Counts a segment that was created.
    pub(crate) fn add_segment(&self, header: Header) {
        self.lock().segments.push_back(header);
    }

    /// The first segment and where its records end, if all of them are before `needed`. Never the last one.
    pub(crate) fn first_before(&self, needed: LogPosition) -> Option<(Header, LogPosition)> {
        self.lock().first_before(needed)
    }

    /// The first segment is no more.
    pub(crate) fn forget_first(&self) {
        self.lock().segments.pop_front();
    }

    /// Lets the writer end when all is written.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.0.work.notify_one();
    }

    pub(crate) fn stats(&self) -> &Stats {
        &self.0.stats
    }
}

/// Writes and syncs. One per log, on a thread of its own.
pub(crate) struct Writer {
    log: Log,
    disk: Arc<dyn Disk>,
    directory: PathBuf,
    worker: u16,
    /// A segment is full when its next group would make it longer than this.
    segment_bytes: u64,
    segment: Option<Segment>,
    next_sequence: u64,
    /// The last group record says that everything is durable.
    marked: bool,
    /// A group's memory, used again for the next one.
    spare: Vec<u8>,
    sync_time: Histogram,
}

/// What a writer has to do.
pub(crate) enum Work {
    /// Write this group, which begins at the position.
    Group(LogPosition, Vec<u8>),
    /// Try a fresh segment.
    Reopen,
    /// Nothing came for a while: say in the log how far it is durable.
    Mark(LogPosition, Vec<u8>),
    End,
}

fn marker(inner: &mut Inner) -> Work {
    let mut marker = Vec::new();
    begin_group(&mut marker);
    let begin = inner.base;
    inner.base = begin.after(marker.len());
    Work::Mark(begin, marker)
}

/// How long the writer waits before it tries a fresh segment again.
const REOPEN_PAUSE: Duration = Duration::from_millis(200);

impl Writer {
    pub(crate) fn new(
        log: Log,
        disk: Arc<dyn Disk>,
        directory: PathBuf,
        worker: u16,
        segment_bytes: u64,
        next_sequence: u64,
        sync_time: Histogram,
    ) -> Self {
        Self {
            log,
            disk,
            directory,
            worker,
            segment_bytes,
            segment: None,
            next_sequence,
            marked: true,
            spare: Vec::new(),
            sync_time,
        }
    }

    /// Works until the log is closed.
    pub(crate) fn run(mut self) {
        loop {
            match self.next(true) {
                Some(Work::End) => return,
                Some(work) => {
                    let reopened = matches!(work, Work::Reopen);
                    if !self.perform(work) && reopened {
                        self.pause();
                    }
                }
                None => {}
            }
        }
    }

    /// Does what there is to do now, if anything: `run` without a thread, for tests.
    pub(crate) fn step(&mut self) -> bool {
        match self.next(false) {
            Some(Work::End) | None => false,
            Some(work) => self.perform(work),
        }
    }

    /// The next thing to do; `wait` for it, or `None` if there is nothing now.
    fn next(&mut self, wait: bool) -> Option<Work> {
        let shared = Arc::clone(&self.log.0);
        let mut inner = self.log.lock();
        loop {
            match &inner.state {
                State::Open if inner.released || (inner.closed && !inner.pending.is_empty()) => {
                    let group =
                        std::mem::replace(&mut inner.pending, std::mem::take(&mut self.spare));
                    let begin = inner.base;
                    inner.base = begin.after(group.len());
                    inner.group_end = inner.base;
                    inner.released = false;
                    return Some(Work::Group(begin, group));
                }
                State::Reopening(_) if !inner.closed => return Some(Work::Reopen),
                _ if inner.closed => return Some(Work::End),
                State::Open if !wait && !self.marked && inner.pending.is_empty() => {
                    return Some(marker(&mut inner));
                }
                _ if !wait => return None,
                _ => {}
            }
            inner.idle = true;
            if self.marked {
                inner = shared
                    .work
                    .wait(inner)
                    .unwrap_or_else(PoisonError::into_inner);
                inner.idle = false;
            } else {
                let (woken, timeout) = shared
                    .work
                    .wait_timeout(inner, QUIET)
                    .unwrap_or_else(PoisonError::into_inner);
                inner = woken;
                inner.idle = false;
                // Only between groups: a marker takes a place in the log like any other record.
                if timeout.timed_out() && inner.pending.is_empty() {
                    return Some(marker(&mut inner));
                }
            }
        }
    }

    fn pause(&self) {
        let inner = self.log.lock();
        if !inner.closed {
            drop(self.log.0.work.wait_timeout(inner, REOPEN_PAUSE));
        }
    }

    /// `true` if it went well.
    fn perform(&mut self, work: Work) -> bool {
        let done = match work {
            Work::Group(begin, group) => self.write(begin, group),
            Work::Reopen => self.reopen(),
            Work::Mark(begin, marker) => self.mark(begin, marker),
            Work::End => Ok(()),
        };
        if let Err(error) = &done {
            let failures = &self.log.stats().failures;
            failures.fetch_add(1, Ordering::Relaxed);
            self.segment = None;
            self.marked = true;
            let mut inner = self.log.lock();
            let failure = LogFailure::of(error);
            inner.state = match inner.state {
                State::Reopening(_) => State::Reopening(failure),
                _ => State::Failed(failure),
            };
        }
        self.log.0.progress.notify_one();
        // Whoever waits looks at the state under the lock.
        if self.log.lock().flushing > 0 {
            self.log.0.done.notify_all();
        }
        done.is_ok()
    }

    fn write(&mut self, begin: LogPosition, mut group: Vec<u8>) -> io::Result<()> {
        seal_group(&mut group, begin, self.log.durable());
        if let Some(segment) = &mut self.segment
            && segment.bytes() + group.len() as u64 > self.segment_bytes
        {
            // The next header will say that all of this one is durable.
            segment.sync()?;
            self.segment = None;
        }
        let segment = match &mut self.segment {
            Some(segment) => segment,
            None => self.begin_segment(begin)?,
        };
        let begun = monotonic_nanos();
        segment.write(&group)?;
        segment.sync()?;
        self.sync_time
            .record(Duration::from_nanos(monotonic_nanos() - begun));
        let stats = &self.log.0.stats;
        stats.groups.fetch_add(1, Ordering::Relaxed);
        stats.bytes.fetch_add(group.len() as u64, Ordering::Relaxed);
        let end = begin.after(group.len());
        self.log.0.durable.store(end.0, Ordering::Release);
        self.marked = false;
        group.clear();
        if group.capacity() <= UNSYNCED_BYTES_MAX {
            self.spare = group;
        }
        Ok(())
    }

    fn begin_segment(&mut self, start: LogPosition) -> io::Result<&mut Segment> {
        let header = Header {
            sequence: self.next_sequence,
            start,
            worker: self.worker,
            // Its commits tell.
            latest_ms: 0,
        };
        let segment = Segment::create(&*self.disk, &self.directory, header, self.segment_bytes)?;
        self.next_sequence += 1;
        self.log.add_segment(header);
        Ok(self.segment.insert(segment))
    }

    fn reopen(&mut self) -> io::Result<()> {
        self.begin_segment(self.log.durable())?;
        self.log.lock().state = State::Open;
        Ok(())
    }

    /// Not synced: the marker proves something about what is before it, and nothing depends on it.
    fn mark(&mut self, begin: LogPosition, mut marker: Vec<u8>) -> io::Result<()> {
        seal_group(&mut marker, begin, begin);
        self.marked = true;
        match &mut self.segment {
            Some(segment) => segment.write(&marker),
            None => Ok(()),
        }
    }
}
