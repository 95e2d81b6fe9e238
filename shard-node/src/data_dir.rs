//! The directory that holds everything durable, and the lock that makes one node its owner.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::disk::{Disk, RealDisk};

/// Version of the layout under the data directory.
const FORMAT: u32 = 3;

/// Why a data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    #[error("data directory {path} cannot be used for {what}")]
    Io {
        path: PathBuf,
        what: &'static str,
        source: io::Error,
    },
    #[error("data directory {path} belongs to a running node (process {owner})")]
    Locked { path: PathBuf, owner: String },
    #[error("data directory {path} has format {found}; this version reads format {FORMAT}")]
    Format { path: PathBuf, found: u32 },
    #[error(
        "data directory {path} was made with ring.shards = {made}; it cannot be opened with {asked}, because every object would be looked for in another shard"
    )]
    Shards {
        path: PathBuf,
        made: u16,
        asked: u16,
    },
    #[error("data directory {path}: {file} is not valid")]
    Manifest {
        path: PathBuf,
        file: &'static str,
        source: serde_json::Error,
    },
}

/// A data directory that this process owns until the value is dropped or the process ends.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    /// Holds the lock, which the kernel releases with the last descriptor, also after kill -9.
    _lock: File,
}

/// `node.json`: what must not change between starts.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    format: u32,
    shards: u16,
}

const MANIFEST: &str = "node.json";

const SPOOL: &str = "spool";

/// Makes an empty directory, whatever was there.
fn empty(directory: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => std::fs::create_dir(directory),
    }
}

impl DataDir {
    /// Creates the directory if need be, locks it, and checks that it fits the ring.
    pub fn open(path: &Path, shards: u16) -> Result<Self, DataDirError> {
        let io = |what| {
            let path = path.to_owned();
            move |source| DataDirError::Io { path, what, source }
        };
        let new = !path.exists();
        std::fs::create_dir_all(path.join("shards")).map_err(io("writing"))?;
        if new {
            // Its own name, too, must survive a loss of power.
            File::open(crate::disk::parent(path))
                .and_then(|parent| parent.sync_all())
                .map_err(io("writing"))?;
        }
        let lock = lock(path)?;
        let manifest = path.join(MANIFEST);
        match std::fs::read(&manifest) {
            Ok(bytes) => check(path, &bytes, shards)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                write_manifest(path, shards).map_err(io("writing"))?;
            }
            Err(error) => return Err(io("reading")(error)),
        }
        empty(&path.join(SPOOL)).map_err(io("writing"))?;
        Ok(Self {
            path: path.to_owned(),
            _lock: lock,
        })
    }

    /// Locks a directory that a node has made before, and changes nothing in it; also its number of shards.
    pub fn open_existing(path: &Path) -> Result<(Self, u16), DataDirError> {
        let bytes = std::fs::read(path.join(MANIFEST)).map_err(|source| DataDirError::Io {
            path: path.to_owned(),
            what: "reading",
            source,
        })?;
        let manifest = parse(path, &bytes)?;
        let owned = Self {
            path: path.to_owned(),
            _lock: lock(path)?,
        };
        Ok((owned, manifest.shards))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A directory for files on their way in or out, which nobody needs after this process.
    pub fn spool(&self) -> PathBuf {
        self.path.join(SPOOL)
    }

    /// The disk that the databases are on. One for each that syncs: a failed write is reported once per
    /// descriptor.
    pub fn disk(&self) -> Result<Arc<dyn Disk>, DataDirError> {
        match RealDisk::new(&self.path.join("shards")) {
            Ok(disk) => Ok(Arc::new(disk)),
            Err(source) => Err(self.io("reading")(source)),
        }
    }

    /// Workers numbered `first` and above that have left a log here.
    pub fn workers_from(&self, first: u16) -> Result<Vec<u16>, DataDirError> {
        let entries = match std::fs::read_dir(self.path.join("workers")) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(self.io("reading")(error)),
        };
        let mut found: Vec<u16> = Vec::new();
        for entry in entries {
            let name = entry.map_err(self.io("reading"))?.file_name();
            found.extend(name.to_str().and_then(|name| name.parse::<u16>().ok()));
        }
        found.retain(|worker| *worker >= first);
        found.sort_unstable();
        Ok(found)
    }

    fn io(&self, what: &'static str) -> impl Fn(io::Error) -> DataDirError {
        let path = self.path.clone();
        move |source| DataDirError::Io {
            path: path.clone(),
            what,
            source,
        }
    }
}

fn lock(path: &Path) -> Result<File, DataDirError> {
    let io = |what| {
        let path = path.to_owned();
        move |source| DataDirError::Io { path, what, source }
    };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path.join("lock"))
        .map_err(io("writing"))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut owner = String::new();
            file.read_to_string(&mut owner).map_err(io("reading"))?;
            return Err(DataDirError::Locked {
                path: path.to_owned(),
                owner: owner.trim().to_owned(),
            });
        }
        Err(TryLockError::Error(error)) => return Err(io("locking")(error)),
    }
    // For the message of the next one who tries.
    file.set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| writeln!(file, "{}", std::process::id()))
        .map_err(io("writing"))?;
    Ok(file)
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Manifest, DataDirError> {
    let manifest: Manifest =
        serde_json::from_slice(bytes).map_err(|source| DataDirError::Manifest {
            path: path.to_owned(),
            file: MANIFEST,
            source,
        })?;
    if manifest.format != FORMAT {
        return Err(DataDirError::Format {
            path: path.to_owned(),
            found: manifest.format,
        });
    }
    Ok(manifest)
}

fn check(path: &Path, bytes: &[u8], shards: u16) -> Result<(), DataDirError> {
    let manifest = parse(path, bytes)?;
    if manifest.shards != shards {
        return Err(DataDirError::Shards {
            path: path.to_owned(),
            made: manifest.shards,
            asked: shards,
        });
    }
    Ok(())
}

/// Whole or not at all, also across a power loss.
fn write_manifest(path: &Path, shards: u16) -> io::Result<()> {
    let manifest = Manifest {
        format: FORMAT,
        shards,
    };
    let new = path.join("node.json.new");
    let mut file = File::create(&new)?;
    file.write_all(&serde_json::to_vec(&manifest)?)?;
    file.sync_all()?;
    std::fs::rename(&new, path.join(MANIFEST))?;
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_owner_is_refused_and_told_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let first = DataDir::open(dir.path(), 128).unwrap();
        let refused = DataDir::open(dir.path(), 128).unwrap_err().to_string();
        assert!(refused.contains("belongs to a running node"), "{refused}");
        assert!(
            refused.contains(&std::process::id().to_string()),
            "{refused}"
        );
        drop(first);
        DataDir::open(dir.path(), 128).unwrap();
    }

    #[test]
    fn another_number_of_shards_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        drop(DataDir::open(dir.path(), 128).unwrap());
        let refused = DataDir::open(dir.path(), 64).unwrap_err().to_string();
        assert!(refused.contains("made with ring.shards = 128"), "{refused}");
    }

    #[test]
    fn damaged_and_future_manifests_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        drop(DataDir::open(dir.path(), 128).unwrap());
        std::fs::write(dir.path().join(MANIFEST), "{\"format\":1,\"shards\":128}").unwrap();
        let refused = DataDir::open(dir.path(), 128).unwrap_err().to_string();
        assert!(refused.contains("has format 1"), "{refused}");
        std::fs::write(dir.path().join(MANIFEST), "{").unwrap();
        assert!(matches!(
            DataDir::open(dir.path(), 128),
            Err(DataDirError::Manifest { .. })
        ));
    }
}
