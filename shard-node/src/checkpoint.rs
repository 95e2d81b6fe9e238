//! Pages from memory into the objects' files, and segments out of the log.
//!
//! The order is what makes it safe (write-ahead logging): a page is written here only after its commit
//! is durable in the log; a segment is removed only after every page that it holds was synced into
//! its file. A crash anywhere leaves a log from which [`replay`](crate::commit_log) makes the same
//! pages again, whatever part of them the files have.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use protocol::{Home, LogPosition, ShardId};
use tokio::sync::Notify;
use tracing::warn;

use crate::archive::Archive;
use crate::commit_log::record::FileId;
use crate::commit_log::{Log, segment};
use crate::disk::{Access, Disk, create_dirs, parent};
use crate::storage::overlay::Capture;

/// Files of one batch above which one sync of the file system is cheaper than one of each.
const SYNC_EACH_MAX: usize = 16;

/// Directories between the data directory and a database: `shards`, the shard, two digits.
const DEPTH: usize = 3;

/// One database to be written.
#[derive(Debug)]
pub(crate) struct Flush {
    pub(crate) path: PathBuf,
    pub(crate) capture: Arc<Capture>,
}

/// What the thread is to do next.
pub(crate) enum Job {
    Flush(Vec<Flush>),
    /// Remove the first segment if it ends before the position, to the archive if there is one. And the time.
    Retire(LogPosition, u64),
}

/// What became of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Done {
    Flushed,
    Retired,
    /// The archive does not work: the log keeps what it should take.
    NotArchived,
}

/// Does jobs, one at a time, on a thread of its own. Clones share the place where jobs wait.
#[derive(Clone)]
pub(crate) struct Checkpointer(Arc<Shared>);

struct Shared {
    archive: Option<Archive>,
    worker: u16,
    disk: Arc<dyn Disk>,
    log: Log,
    log_directory: PathBuf,
    state: Mutex<State>,
    work: Condvar,
    /// A job is done: for the worker's loop, and for a worker that stops and waits.
    progress: Arc<Notify>,
    done: Condvar,
}

#[derive(Default)]
struct State {
    job: Option<Job>,
    /// A job was given and its result not yet taken.
    busy: bool,
    done: Option<io::Result<Done>>,
    closed: bool,
    names: Names,
}

/// Which names are known to be durable.
#[derive(Default)]
struct Names {
    directories: HashSet<PathBuf>,
    /// All that were there when this process began, or when something failed last.
    old: bool,
}

impl Checkpointer {
    pub(crate) fn new(
        disk: Arc<dyn Disk>,
        log: Log,
        log_directory: PathBuf,
        progress: Arc<Notify>,
        archive: Option<Archive>,
        worker: u16,
    ) -> Self {
        Self(Arc::new(Shared {
            archive,
            worker,
            disk,
            log,
            log_directory,
            state: Mutex::default(),
            work: Condvar::new(),
            progress,
            done: Condvar::new(),
        }))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a job; there must be none.
    pub(crate) fn give(&self, job: Job) {
        let mut state = self.lock();
        debug_assert!(!state.busy, "one job at a time");
        state.job = Some(job);
        state.busy = true;
        self.0.work.notify_one();
    }

    pub(crate) fn is_busy(&self) -> bool {
        self.lock().busy
    }

    /// The result of a job that is done; a batch fails as a whole.
    pub(crate) fn take_done(&self) -> Option<io::Result<Done>> {
        let mut state = self.lock();
        let done = state.done.take();
        if done.is_some() {
            state.busy = false;
        }
        done
    }

    /// Blocks until the job under way, if any, is done.
    pub(crate) fn wait(&self) {
        let mut state = self.lock();
        while state.busy && state.done.is_none() {
            state = self
                .0
                .done
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.0.work.notify_one();
    }

    /// Works until closed.
    pub(crate) fn run(self) {
        loop {
            let mut state = self.lock();
            let job = loop {
                if let Some(job) = state.job.take() {
                    break job;
                }
                if state.closed {
                    return;
                }
                state = self
                    .0
                    .work
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            };
            drop(state);
            self.perform(job);
        }
    }

    /// Does the job that waits, if one does: `run` without a thread.
    pub(crate) fn step(&self) -> bool {
        let job = self.lock().job.take();
        job.map(|job| self.perform(job)).is_some()
    }

    /// Removes the first segment from the log, durably, and into the archive before. One at a time, so that
    /// no crash leaves a gap.
    pub(crate) fn retire(&self, needed: LogPosition, now: u64) -> io::Result<Done> {
        let Shared {
            archive,
            worker,
            disk,
            log,
            log_directory,
            ..
        } = &*self.0;
        if let Some((first, end)) = log.first_before(needed) {
            let path = segment::path(log_directory, first.sequence);
            if let Some(archive) = archive
                && let Some(records) = segment::records(&**disk, &path, first, end)?
                && let Err(error) = archive.put(*worker, first.start, &records)
            {
                warn!(error = %ops::Causes(&error), segment = %path.display(), "a segment could not be archived; the log keeps it");
                return Ok(Done::NotArchived);
            }
            match disk.remove_file(&path) {
                // The last try got that far.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                removed => removed?,
            }
            disk.sync_dir(log_directory)?;
            log.forget_first();
        }
        if let Some(archive) = archive
            && log.first_before(needed).is_none()
            && let Err(error) = archive.prune(*worker, now)
        {
            warn!(error = %ops::Causes(&error), "the archive could not be pruned");
        }
        Ok(Done::Retired)
    }

    fn perform(&self, job: Job) {
        let done = match job {
            Job::Flush(batch) => {
                let mut names = std::mem::take(&mut self.lock().names);
                let done = write(&*self.0.disk, &batch, &mut names);
                if done.is_ok() {
                    self.lock().names = names;
                }
                done.map(|()| Done::Flushed)
            }
            Job::Retire(needed, now) => self.retire(needed, now),
        };
        if let Err(error) = &done {
            warn!(%error, "a checkpoint failed; the log keeps what it could not write");
        }
        self.lock().done = Some(done);
        self.0.progress.notify_one();
        self.0.done.notify_all();
    }
}

/// Writes a batch of databases durably. After an error nothing of it counts: the pages must be written
/// again, by a later batch.
fn write(disk: &dyn Disk, batch: &[Flush], names: &mut Names) -> io::Result<()> {
    let one_by_one = batch.len() <= SYNC_EACH_MAX && names.old;
    let mut changed_names = Vec::new();
    let mut files = Vec::new();
    for flush in batch {
        let directory = parent(&flush.path);
        if !names.directories.contains(directory) {
            create_dirs(disk, directory, DEPTH)?;
            names.directories.insert(directory.to_owned());
        }
        let capture = &flush.capture;
        if capture.pages == 0 {
            match disk.remove_file(&flush.path) {
                // An earlier try got that far, or it never was.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                removed => removed?,
            }
            changed_names.push(directory);
            continue;
        }
        let file = disk.open(&flush.path, Access::Write)?;
        let bytes = u64::from(capture.pages) * capture.page_bytes as u64;
        let before = file.status()?.bytes;
        if before == 0 {
            changed_names.push(directory);
        }
        if before > bytes {
            file.set_len(bytes)?;
        }
        for (number, page) in &capture.changed {
            let at = u64::from(number - 1) * capture.page_bytes as u64;
            file.write_all_at(page, at)?;
        }
        if file.status()?.bytes < bytes {
            file.set_len(bytes)?;
        }
        if one_by_one {
            files.push(file);
        }
    }
    if !one_by_one {
        disk.sync_all()?;
        names.old = true;
        return Ok(());
    }
    for file in files {
        file.sync()?;
    }
    for directory in changed_names {
        disk.sync_dir(directory)?;
    }
    Ok(())
}

/// Makes the directories of a database durably there.
pub(crate) fn create_parents(disk: &dyn Disk, path: &Path) -> io::Result<()> {
    create_dirs(disk, parent(path), DEPTH)
}

/// Where a database is.
pub(crate) fn path(shards: &Path, shard: ShardId, file: FileId) -> PathBuf {
    let mut path = shards.join(shard.to_string());
    if file.is_catalog() {
        path.push(match file.home() {
            Home::Global => "catalog.db".to_owned(),
            Home::Colo(colo) => format!("catalog-{colo}.db"),
        });
    } else {
        let id = file.to_string();
        path.push(&id[DIGEST_AT..DIGEST_AT + 2]);
        path.push(format!("{id}.db"));
    }
    path
}

/// Where the digest begins in the text of an id: behind its kind and its home. Two digits of it spread a
/// shard's files over 256 directories.
const DIGEST_AT: usize = 8;
