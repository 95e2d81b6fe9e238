//! Files, as the commit log and the databases use them: the machine's disk here, scripted in tests.
//!
//! What was written is durable after [`DiskFile::sync`]; that a name leads to a file is durable after
//! [`Disk::sync_dir`] of its directory; [`Disk::sync_all`] is both for everything. Before that, a power
//! loss may keep any part of it, in any order.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// What a file is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Read,
    /// Reading and writing; created if it is not there.
    Write,
    /// Reading and writing; must not be there yet.
    CreateNew,
}

/// A file system.
pub trait Disk: Send + Sync + 'static {
    fn open(&self, path: &Path, access: Access) -> io::Result<Box<dyn DiskFile>>;

    /// Creates one directory; that it exists already is an error.
    fn create_dir(&self, path: &Path) -> io::Result<()>;

    /// The names in a directory, in no order.
    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>>;

    fn remove_file(&self, path: &Path) -> io::Result<()>;

    /// Gives a file another name, on the same file system; what had that name is gone.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Makes the names in a directory durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;

    /// Makes everything durable that was written before, files and names. For many files at once it is
    /// cheaper than syncing each (`syncfs`; since Linux 5.8 it reports failed writes).
    fn sync_all(&self) -> io::Result<()>;
}

/// What a file system says of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    pub bytes: u64,
    /// When it was written last, milliseconds since 1970; 0 if unknown.
    pub modified_ms: u64,
}

/// An open file.
pub trait DiskFile: Send + Sync {
    fn status(&self) -> io::Result<Status>;

    /// Reads at most as many bytes as fit; fewer only at the end of the file.
    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize>;

    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()>;

    fn set_len(&self, bytes: u64) -> io::Result<()>;

    /// Makes data and length durable. After an error nobody knows what is on the disk: the same data
    /// must be written again, or given up.
    fn sync(&self) -> io::Result<()>;
}

/// The disk of the machine.
#[derive(Debug)]
pub struct RealDisk {
    /// Open since before the first write, so that `syncfs` reports every failed one.
    root: File,
}

impl RealDisk {
    /// `root` is any directory on the file system that is used.
    pub fn new(root: &Path) -> io::Result<Self> {
        Ok(Self {
            root: File::open(root)?,
        })
    }
}

impl Disk for RealDisk {
    fn open(&self, path: &Path, access: Access) -> io::Result<Box<dyn DiskFile>> {
        let file = OpenOptions::new()
            .read(true)
            .write(access != Access::Read)
            .create(access == Access::Write)
            .create_new(access == Access::CreateNew)
            .open(path)?;
        Ok(Box::new(file))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        std::fs::create_dir(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        std::fs::read_dir(path)?
            .map(|entry| Ok(entry?.path()))
            .collect()
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn sync_all(&self) -> io::Result<()> {
        rustix::fs::syncfs(&self.root).map_err(io::Error::from)
    }
}

impl DiskFile for File {
    fn status(&self) -> io::Result<Status> {
        let metadata = self.metadata()?;
        let modified = metadata.modified()?.duration_since(UNIX_EPOCH);
        let millis = modified.unwrap_or_default().as_millis();
        Ok(Status {
            bytes: metadata.len(),
            modified_ms: u64::try_from(millis).unwrap_or(0),
        })
    }

    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            match FileExt::read_at(self, &mut buffer[done..], at + done as u64) {
                Ok(0) => break,
                Ok(bytes) => done += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        FileExt::write_all_at(self, bytes, at)
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        Self::set_len(self, bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}

/// Creates a directory and up to `depth` of its parents, each durably: a power loss must not forget the
/// name of a directory that holds acknowledged data.
pub fn create_dirs(disk: &dyn Disk, directory: &Path, depth: usize) -> io::Result<()> {
    match disk.create_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound && depth > 0 => {
            create_dirs(disk, parent(directory), depth - 1)?;
            disk.create_dir(directory)?;
        }
        created => created?,
    }
    disk.sync_dir(parent(directory))
}

pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => Path::new("/"),
    }
}
