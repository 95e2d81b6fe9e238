//! A disk that forgets: what was not synced may be lost, in any part and any order.

use std::collections::BTreeMap;
use std::io;
use std::mem::take;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use object_store::memory::InMemory;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use shard_node::clock::Clock;
use shard_node::disk::{Access, Disk, DiskFile, Status};

/// What a disk writes at once: a power loss may tear a write between sectors.
const SECTOR: usize = 512;

/// When the world begins, in milliseconds since 1970.
pub(crate) const EPOCH: u64 = 1_700_000_000_000;

/// What a crash leaves of what was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Crash {
    /// The process died alone: all of it, still not synced.
    Process,
    /// The power failed: nothing.
    LoseAll,
    /// The power failed: all of it, by luck.
    KeepAll,
    /// The power failed: any sectors, any names.
    Torn(u64),
}

/// What happens to the operation with a given number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It and all that follow fail: the world stops before it.
    Stop(u64),
    /// It alone fails.
    Fail(u64, io::ErrorKind),
    /// So many operations on databases fail, from now on.
    FailFiles(u64),
}

/// A file system in memory. Clones are the same one.
#[derive(Clone, Default)]
pub(crate) struct SimDisk(Arc<Mutex<World>>);

#[derive(Default)]
struct World {
    files: Vec<Contents>,
    /// What processes see, and what the disk has.
    names: BTreeMap<PathBuf, Entry>,
    durable: BTreeMap<PathBuf, Entry>,
    /// Changes of names that were not synced.
    pending: Vec<(PathBuf, Option<Entry>)>,
    operations: u64,
    stopped: bool,
    faults: Vec<Fault>,
    /// Milliseconds that have passed: one per look at the clock.
    clock: u64,
    /// Never fails, and forgets nothing.
    archive: Arc<InMemory>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    Directory,
    File(usize),
}

#[derive(Default, Clone)]
struct Contents {
    of_log: bool,
    modified_ms: u64,
    /// Writing it failed in a sync of everything: its own next sync says so, too.
    error: bool,
    seen: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Change>,
    /// A sync failed: later ones do not include these.
    limbo: Vec<Change>,
}

#[derive(Clone)]
enum Change {
    Write(usize, Vec<u8>),
    Length(usize),
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Write(at, new) => {
                let end = at + new.len();
                if bytes.len() < end {
                    bytes.resize(end, 0);
                }
                bytes[*at..end].copy_from_slice(new);
            }
            Self::Length(length) => bytes.resize(*length, 0),
        }
    }

    /// Any of its sectors, or all or nothing of a new length.
    fn apply_torn(&self, bytes: &mut Vec<u8>, random: &mut SmallRng) {
        match self {
            Self::Write(at, new) => {
                let mut from = 0;
                while from < new.len() {
                    let to = ((at + from) / SECTOR * SECTOR + SECTOR - at).min(new.len());
                    if random.random() {
                        Self::Write(at + from, new[from..to].to_vec()).apply(bytes);
                    }
                    from = to;
                }
            }
            Self::Length(_) if random.random() => self.apply(bytes),
            Self::Length(_) => {}
        }
    }
}

impl Contents {
    /// The kernel forgets what it could not write; a length is in its journal, and is tried again.
    fn fail_sync(&mut self) {
        let (lost, kept) = take(&mut self.pending)
            .into_iter()
            .partition(|change| matches!(change, Change::Write(..)));
        let mut lost: Vec<Change> = lost;
        self.limbo.append(&mut lost);
        self.pending = kept;
    }

    fn sync(&mut self) {
        for change in take(&mut self.pending) {
            change.apply(&mut self.durable);
            if let Change::Write(at, new) = change {
                self.limbo = take(&mut self.limbo)
                    .into_iter()
                    .flat_map(|lost| lost.outside(at, at + new.len()))
                    .collect();
            }
        }
    }
}

impl Change {
    /// What of a write lies outside a range: what was written there later is what the disk has.
    fn outside(self, from: usize, to: usize) -> Vec<Self> {
        let Self::Write(at, bytes) = self else {
            return vec![self];
        };
        let end = at + bytes.len();
        let mut parts = Vec::new();
        if at < from.min(end) {
            parts.push(Self::Write(at, bytes[..from.min(end) - at].to_vec()));
        }
        if to.max(at) < end {
            parts.push(Self::Write(to.max(at), bytes[to.max(at) - at..].to_vec()));
        }
        parts
    }
}

/// A millisecond per look.
impl Clock for SimDisk {
    fn unix_millis(&self) -> u64 {
        let mut world = self.world();
        world.clock += 1;
        EPOCH + world.clock
    }
}

impl SimDisk {
    /// With the directories that a node makes before its engines start.
    pub(crate) fn new(root: &Path) -> Self {
        let disk = Self::default();
        let mut world = disk.world();
        for path in [root.to_owned(), root.join("shards")] {
            world.names.insert(path.clone(), Entry::Directory);
            world.durable.insert(path, Entry::Directory);
        }
        drop(world);
        disk
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap()
    }

    pub(crate) fn archive(&self) -> Arc<InMemory> {
        Arc::clone(&self.world().archive)
    }

    pub(crate) fn operations(&self) -> u64 {
        self.world().operations
    }

    pub(crate) fn has_stopped(&self) -> bool {
        self.world().stopped
    }

    /// The next sync of the log will report a write that failed.
    pub(crate) fn log_has_error(&self) -> bool {
        let world = self.world();
        let logs = world.names.iter().filter(|(path, _)| is_log(path));
        let mut files = logs.filter_map(|(_, entry)| match entry {
            Entry::File(number) => Some(*number),
            Entry::Directory => None,
        });
        files
            .next_back()
            .is_some_and(|last| world.files[last].error)
    }

    pub(crate) fn set_faults(&self, faults: Vec<Fault>) {
        self.world().faults = faults;
    }

    /// The disk after a crash, as the next process finds it.
    pub(crate) fn crash(&self, crash: Crash) -> Self {
        let mut world = self.world();
        let mut next = World {
            files: world.files.clone(),
            clock: world.clock,
            archive: Arc::clone(&world.archive),
            ..World::default()
        };
        match crash {
            Crash::Process => {
                next.names.clone_from(&world.names);
                next.durable.clone_from(&world.durable);
                next.pending = take(&mut world.pending);
                return Self(Arc::new(Mutex::new(next)));
            }
            Crash::LoseAll => next.names.clone_from(&world.durable),
            Crash::KeepAll => {
                next.names.clone_from(&world.names);
                for file in &mut next.files {
                    file.durable.clone_from(&file.seen);
                }
            }
            Crash::Torn(seed) => {
                let mut random = SmallRng::seed_from_u64(seed);
                let mut names = world.durable.clone();
                for (path, entry) in &world.pending {
                    if random.random() {
                        change_name(&mut names, path, *entry);
                    }
                }
                next.names = names;
                for file in &mut next.files {
                    for change in file.limbo.iter().chain(&file.pending) {
                        change.apply_torn(&mut file.durable, &mut random);
                    }
                }
            }
        }
        // A name in a directory that is gone leads nowhere.
        let all = next.names.clone();
        next.names.retain(|path, _| {
            path.parent()
                .is_none_or(|parent| parent == Path::new("/") || all.contains_key(parent))
        });
        next.durable.clone_from(&next.names);
        for file in &mut next.files {
            file.seen.clone_from(&file.durable);
            file.pending.clear();
            file.limbo.clear();
        }
        Self(Arc::new(Mutex::new(next)))
    }

    /// Every file with its contents, as processes see it.
    pub(crate) fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let world = self.world();
        let files = world.names.iter().filter_map(|(path, entry)| match entry {
            Entry::File(number) => Some((path.clone(), world.files[*number].seen.clone())),
            Entry::Directory => None,
        });
        files.collect()
    }

    /// Changes a byte of a file behind everybody's back.
    pub(crate) fn flip(&self, path: &Path, at: usize, bits: u8) {
        let mut world = self.world();
        let Some(Entry::File(number)) = world.names.get(path).copied() else {
            panic!("{path:?} is no file");
        };
        let file = &mut world.files[number];
        file.seen[at] ^= bits;
        file.durable[at] ^= bits;
    }
}

fn is_log(path: &Path) -> bool {
    path.iter().any(|part| part == "log")
}

fn change_name(names: &mut BTreeMap<PathBuf, Entry>, path: &Path, entry: Option<Entry>) {
    match entry {
        Some(entry) => drop(names.insert(path.to_owned(), entry)),
        None => drop(names.remove(path)),
    }
}

impl World {
    /// Counts an operation that changes or syncs something, and fails it if it must.
    fn operation(&mut self, of_log: bool) -> io::Result<()> {
        let number = self.operations;
        self.operations += 1;
        for fault in &mut self.faults {
            match fault {
                Fault::Stop(stop) if number >= *stop => {
                    self.stopped = true;
                    return Err(io::Error::other("the world has stopped"));
                }
                Fault::Fail(fail, kind) if number == *fail => return Err((*kind).into()),
                Fault::FailFiles(left) if !of_log && *left > 0 => {
                    *left -= 1;
                    return Err(io::ErrorKind::StorageFull.into());
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn change(&mut self, path: &Path, entry: Option<Entry>) {
        change_name(&mut self.names, path, entry);
        self.pending.push((path.to_owned(), entry));
    }

    fn need_parent(&self, path: &Path) -> io::Result<()> {
        let parent = path.parent().unwrap_or(Path::new("/"));
        match self.names.get(parent) {
            Some(Entry::Directory) => Ok(()),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn sync_names(&mut self, directory: Option<&Path>) {
        let inside = |path: &PathBuf| directory.is_none_or(|dir| path.parent() == Some(dir));
        let (synced, rest) = take(&mut self.pending)
            .into_iter()
            .partition(|(path, _)| inside(path));
        self.pending = rest;
        let synced: Vec<(PathBuf, Option<Entry>)> = synced;
        for (path, entry) in synced {
            change_name(&mut self.durable, &path, entry);
        }
    }
}

impl Disk for SimDisk {
    fn open(&self, path: &Path, access: Access) -> io::Result<Box<dyn DiskFile>> {
        let mut world = self.world();
        let number = match (world.names.get(path).copied(), access) {
            (Some(Entry::Directory), _) => return Err(io::ErrorKind::IsADirectory.into()),
            (Some(Entry::File(_)), Access::CreateNew) => {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            (Some(Entry::File(number)), _) => number,
            (None, Access::Read) => return Err(io::ErrorKind::NotFound.into()),
            (None, _) => {
                let of_log = is_log(path);
                world.operation(of_log)?;
                world.need_parent(path)?;
                let number = world.files.len();
                world.files.push(Contents {
                    of_log,
                    ..Contents::default()
                });
                world.change(path, Some(Entry::File(number)));
                number
            }
        };
        Ok(Box::new(SimFile {
            disk: self.clone(),
            number,
        }))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let mut world = self.world();
        if world.names.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        world.need_parent(path)?;
        world.operation(is_log(path))?;
        world.change(path, Some(Entry::Directory));
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        let world = self.world();
        let inside = world
            .names
            .keys()
            .filter(|name| name.parent() == Some(path));
        Ok(inside.cloned().collect())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut world = self.world();
        match world.names.get(path) {
            Some(Entry::File(_)) => {}
            _ => return Err(io::ErrorKind::NotFound.into()),
        }
        world.operation(is_log(path))?;
        world.change(path, None);
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut world = self.world();
        let Some(entry @ Entry::File(_)) = world.names.get(from).copied() else {
            return Err(io::ErrorKind::NotFound.into());
        };
        world.need_parent(to)?;
        world.operation(is_log(to))?;
        world.change(to, Some(entry));
        world.change(from, None);
        Ok(())
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut world = self.world();
        world.operation(is_log(path))?;
        world.sync_names(Some(path));
        Ok(())
    }

    fn sync_all(&self) -> io::Result<()> {
        let mut world = self.world();
        let world = &mut *world;
        let failed = world.operation(false);
        for file in &mut world.files {
            match failed {
                Ok(()) => file.sync(),
                Err(_) if !world.stopped && !file.pending.is_empty() => {
                    file.fail_sync();
                    file.error = true;
                }
                Err(_) => {}
            }
        }
        failed?;
        world.sync_names(None);
        Ok(())
    }
}

struct SimFile {
    disk: SimDisk,
    number: usize,
}

impl SimFile {
    fn change(&self, change: Change) -> io::Result<()> {
        let mut world = self.disk.world();
        let of_log = world.files[self.number].of_log;
        world.operation(of_log)?;
        let now = EPOCH + world.clock;
        let file = &mut world.files[self.number];
        file.modified_ms = now;
        change.apply(&mut file.seen);
        file.pending.push(change);
        Ok(())
    }
}

impl DiskFile for SimFile {
    fn status(&self) -> io::Result<Status> {
        let world = self.disk.world();
        let file = &world.files[self.number];
        Ok(Status {
            bytes: file.seen.len() as u64,
            modified_ms: file.modified_ms,
        })
    }

    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        let world = self.disk.world();
        let seen = &world.files[self.number].seen;
        let from = usize::try_from(at).unwrap().min(seen.len());
        let bytes = buffer.len().min(seen.len() - from);
        buffer[..bytes].copy_from_slice(&seen[from..from + bytes]);
        Ok(bytes)
    }

    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.change(Change::Write(usize::try_from(at).unwrap(), bytes.to_vec()))
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.change(Change::Length(usize::try_from(bytes).unwrap()))
    }

    fn sync(&self) -> io::Result<()> {
        let mut world = self.disk.world();
        let of_log = world.files[self.number].of_log;
        let mut failed = world.operation(of_log);
        let stopped = world.stopped;
        let file = &mut world.files[self.number];
        if take(&mut file.error) && failed.is_ok() {
            failed = Err(io::ErrorKind::Other.into());
        }
        match failed {
            Ok(()) => file.sync(),
            Err(_) if !stopped => file.fail_sync(),
            Err(_) => {}
        }
        failed
    }
}
