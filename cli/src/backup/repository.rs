//! What backups look like where they are kept.
//!
//! | name | holds |
//! |------|-------|
//! | `backups/{name}.json` | what a backup is: written last, so a backup without it is none |
//! | `backups/{name}.objects` | a line of JSON per object: where its database is |
//! | `backups/{name}.pending` | a backup that is being made, and the name of the one before, which it builds on |
//! | `data/{name}/{number}.pack` | small databases, one after the other |
//! | `data/{name}/{id}.db` | a large one, a file of SQLite |
//!
//! An object that has not changed since the backup before stays where that has put it. Names are times, so
//! they sort.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use shard_node::clock::{Clock, SystemClock};
use shard_node::store::{S3_SCHEME, Store, StoreError};

/// Databases from this size on have a file of their own.
const LARGE_BYTES: u64 = 8 << 20;

/// Bytes of a pack.
const PACK_BYTES: u64 = 32 << 20;

const FORMAT: u32 = 1;

const BACKUPS: &str = "backups";
const DATA: &str = "data";

/// Why backups cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RepositoryError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("a copy on its way to or from the backup")]
    File(#[from] io::Error),
    #[error("{name} is damaged: {what}")]
    Damaged { name: String, what: String },
    #[error("{name} has format {found}; this version reads format {FORMAT}")]
    Format { name: String, found: u32 },
    #[error("there is no backup {0:?} here")]
    NoSuchBackup(String),
    #[error("there is no backup here")]
    Empty,
    #[error("{0:?} is no directory, and no s3://bucket/prefix")]
    NoDirectory(String),
}

/// A backup, as its file says.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Summary {
    format: u32,
    pub(crate) name: String,
    /// The oldest of the times at which workers began to be read: what changed later may be missing.
    pub(crate) began_ms: u64,
    pub(crate) objects: u64,
    pub(crate) bytes: u64,
    /// Of these, what this backup added.
    pub(crate) new_objects: u64,
    pub(crate) new_bytes: u64,
}

/// Where the database of an object is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) id: String,
    pub(crate) class: String,
    pub(crate) name: Option<String>,
    /// It has all commits up to here.
    pub(crate) bookmark: String,
    pub(crate) file: String,
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    pub(crate) crc32c: u32,
}

/// A place with backups.
pub(crate) struct Repository(Store);

impl Repository {
    pub(crate) fn open(location: &str) -> Result<Self, RepositoryError> {
        Ok(Self(Store::open(location)?))
    }

    /// One that is there already.
    pub(crate) fn open_existing(location: &str) -> Result<Self, RepositoryError> {
        if location.starts_with(S3_SCHEME) || Path::new(location).is_dir() {
            return Self::open(location);
        }
        Err(RepositoryError::NoDirectory(location.to_owned()))
    }

    /// All backups, oldest first.
    pub(crate) fn summaries(&self) -> Result<Vec<Summary>, RepositoryError> {
        let mut found = Vec::new();
        for (name, _) in self.0.list(BACKUPS)? {
            if name.ends_with(".json") {
                found.push(self.read_summary(&name)?);
            }
        }
        found.sort_by(|left, right| left.name.cmp(&right.name));
        Ok(found)
    }

    fn read_summary(&self, file: &str) -> Result<Summary, RepositoryError> {
        let text = self.0.get(file)?;
        let damaged = |error: serde_json::Error| RepositoryError::Damaged {
            name: file.to_owned(),
            what: error.to_string(),
        };
        let summary: Summary = serde_json::from_slice(&text).map_err(damaged)?;
        if summary.format != FORMAT {
            return Err(RepositoryError::Format {
                name: file.to_owned(),
                found: summary.format,
            });
        }
        Ok(summary)
    }

    /// The backup of this name, or the latest.
    pub(crate) fn find(&self, name: Option<&str>) -> Result<Summary, RepositoryError> {
        let mut all = self.summaries()?;
        match name {
            None => all.pop().ok_or(RepositoryError::Empty),
            Some(name) => {
                let found = all.into_iter().find(|summary| summary.name == name);
                found.ok_or_else(|| RepositoryError::NoSuchBackup(name.to_owned()))
            }
        }
    }

    /// The objects of a backup, all of them.
    pub(crate) fn entries(&self, summary: &Summary) -> Result<Vec<Entry>, RepositoryError> {
        let name = format!("{BACKUPS}/{}.objects", summary.name);
        let damaged = |what: String| RepositoryError::Damaged {
            name: name.clone(),
            what,
        };
        let (mut file, _) = self.fetch(&name)?;
        file.rewind()?;
        let mut entries = Vec::new();
        for line in BufReader::new(file).lines() {
            let entry = serde_json::from_str(&line?).map_err(|error| damaged(error.to_string()))?;
            entries.push(entry);
        }
        if entries.len() as u64 != summary.objects {
            let what = format!("it has {} objects of {}", entries.len(), summary.objects);
            return Err(damaged(what));
        }
        Ok(entries)
    }

    /// A copy of a file, which must be there, and its bytes.
    fn fetch(&self, name: &str) -> Result<(File, u64), RepositoryError> {
        let bytes = self.0.size(name)?;
        let bytes = bytes.ok_or_else(|| RepositoryError::Damaged {
            name: name.to_owned(),
            what: "it is missing".to_owned(),
        })?;
        let mut file = tempfile::tempfile()?;
        self.0.get_to_file(name, bytes, &mut file)?;
        Ok((file, bytes))
    }

    /// Reads the databases of entries, which all are in the same file, and gives each to `each`, if it is
    /// what was saved; the error if not.
    pub(crate) fn read<'e>(
        &self,
        entries: impl IntoIterator<Item = &'e Entry>,
        mut each: impl FnMut(&'e Entry, Result<io::Take<&mut File>, RepositoryError>),
    ) -> Result<(), RepositoryError> {
        let mut entries = entries.into_iter().peekable();
        let Some(name) = entries.peek().map(|entry| entry.file.clone()) else {
            return Ok(());
        };
        let damaged = |what: String| RepositoryError::Damaged {
            name: name.clone(),
            what,
        };
        let (mut file, bytes) = self.fetch(&name)?;
        for entry in entries {
            let checked = (|| {
                if entry.offset.saturating_add(entry.bytes) > bytes {
                    return Err(damaged("it breaks off".to_owned()));
                }
                file.seek(SeekFrom::Start(entry.offset))?;
                if copy(&mut file, &mut io::sink(), entry.bytes)? != entry.crc32c {
                    return Err(damaged(format!(
                        "the database of object {} does not match its checksum",
                        entry.id
                    )));
                }
                file.seek(SeekFrom::Start(entry.offset))?;
                Ok(())
            })();
            each(entry, checked.map(|()| (&mut file).take(entry.bytes)));
        }
        Ok(())
    }

    /// Removes all backups but the last ones, and what none of these needs; their names. What is being made
    /// stays, and what it builds on.
    pub(crate) fn prune(&self, keep: usize) -> Result<Vec<String>, RepositoryError> {
        let mut pending = BTreeSet::new();
        for (name, _) in self.0.list(BACKUPS)? {
            let Some(made) = name.strip_suffix(".pending") else {
                continue;
            };
            pending.extend(made.rsplit('/').next().map(str::to_owned));
            pending.insert(String::from_utf8_lossy(&self.0.get(&name)?).into_owned());
        }
        let all = self.summaries()?;
        let mut left = all.len();
        let is_kept = |summary: &&Summary| {
            left -= 1;
            left < keep || pending.contains(&summary.name)
        };
        let (kept, gone): (Vec<&Summary>, Vec<&Summary>) = all.iter().partition(is_kept);
        let mut needed = BTreeSet::new();
        for summary in &kept {
            needed.extend(self.entries(summary)?.into_iter().map(|entry| entry.file));
        }
        for summary in &gone {
            self.0.delete(&format!("{BACKUPS}/{}.json", summary.name))?;
            self.0
                .delete(&format!("{BACKUPS}/{}.objects", summary.name))?;
        }
        // Data of a later name may be of a backup that is being made.
        let latest = all.last().map(|summary| summary.name.as_str());
        for (file, _) in self.0.list(DATA)? {
            let of = file.split('/').nth(1);
            let pending = of.is_some_and(|of| pending.contains(of));
            if of <= latest && !pending && !needed.contains(&file) {
                self.0.delete(&file)?;
            }
        }
        Ok(gone.iter().map(|summary| summary.name.clone()).collect())
    }
}

/// A backup that is being made.
pub(crate) struct Writer<'r> {
    store: &'r Store,
    name: String,
    previous: HashMap<String, Entry>,
    objects: BufWriter<File>,
    pack: File,
    pack_bytes: u64,
    packs: u32,
    pub(crate) summary: Summary,
    /// What could not be read, and why.
    pub(crate) unread: Vec<String>,
    finished: bool,
}

impl<'r> Writer<'r> {
    /// `previous` is what unchanged objects are looked for in, of the backup `parent`.
    pub(crate) fn new(
        repository: &'r Repository,
        parent: Option<&str>,
        previous: Vec<Entry>,
    ) -> Result<Self, RepositoryError> {
        let now = UNIX_EPOCH + Duration::from_millis(SystemClock.unix_millis());
        let now = humantime::format_rfc3339_millis(now).to_string();
        let name: String = now
            .chars()
            .filter(|each| each.is_ascii_alphanumeric())
            .collect();
        let pending = format!("{BACKUPS}/{name}.pending");
        repository
            .0
            .put(&pending, parent.unwrap_or_default().as_bytes())?;
        let previous = previous.into_iter();
        Ok(Self {
            unread: Vec::new(),
            finished: false,
            store: &repository.0,
            previous: previous.map(|entry| (entry.id.clone(), entry)).collect(),
            objects: BufWriter::new(tempfile::tempfile()?),
            pack: tempfile::tempfile()?,
            pack_bytes: 0,
            packs: 0,
            summary: Summary {
                format: FORMAT,
                name: name.clone(),
                began_ms: u64::MAX,
                objects: 0,
                bytes: 0,
                new_objects: 0,
                new_bytes: 0,
            },
            name,
        })
    }

    /// An object that has not changed; `false` if it is not in the backup before.
    pub(crate) fn unchanged(&mut self, id: &str) -> Result<bool, RepositoryError> {
        let Some(entry) = self.previous.get(id).cloned() else {
            return Ok(false);
        };
        self.list(&entry)?;
        Ok(true)
    }

    /// An object and its database. The file and the place in it, and the checksum, are filled in here.
    pub(crate) fn add(
        &mut self,
        mut entry: Entry,
        database: &mut impl Read,
    ) -> Result<(), RepositoryError> {
        if entry.bytes >= LARGE_BYTES {
            let mut file = tempfile::tempfile()?;
            entry.crc32c = copy(database, &mut file, entry.bytes)?;
            file.rewind()?;
            entry.file = format!("{DATA}/{}/{}.db", self.name, entry.id);
            self.store.put_file(&entry.file, &mut file)?;
        } else {
            if self.pack_bytes + entry.bytes > PACK_BYTES {
                self.put_pack()?;
            }
            entry.file = self.pack_name();
            entry.offset = self.pack_bytes;
            // One that broke off may be there.
            self.pack.seek(SeekFrom::Start(self.pack_bytes))?;
            entry.crc32c = copy(database, &mut self.pack, entry.bytes)?;
            self.pack_bytes += entry.bytes;
        }
        self.summary.new_objects += 1;
        self.summary.new_bytes += entry.bytes;
        self.list(&entry)
    }

    fn list(&mut self, entry: &Entry) -> Result<(), RepositoryError> {
        self.summary.objects += 1;
        self.summary.bytes += entry.bytes;
        serde_json::to_writer(&mut self.objects, entry).map_err(io::Error::from)?;
        self.objects.write_all(b"\n")?;
        Ok(())
    }

    fn pack_name(&self) -> String {
        format!("{DATA}/{}/{:06}.pack", self.name, self.packs)
    }

    fn put_pack(&mut self) -> Result<(), RepositoryError> {
        if self.pack_bytes > 0 {
            self.pack.set_len(self.pack_bytes)?;
            self.pack.rewind()?;
            self.store.put_file(&self.pack_name(), &mut self.pack)?;
            self.pack = tempfile::tempfile()?;
            self.pack_bytes = 0;
            self.packs += 1;
        }
        Ok(())
    }

    /// From here on the backup counts.
    pub(crate) fn finish(mut self) -> Result<Summary, RepositoryError> {
        self.put_pack()?;
        self.objects.flush()?;
        let mut objects = self.objects.get_ref();
        objects.rewind()?;
        let name = format!("{BACKUPS}/{}", self.name);
        self.store
            .put_file(&format!("{name}.objects"), &mut objects)?;
        let summary = serde_json::to_vec(&self.summary).map_err(io::Error::from)?;
        self.store.put(&format!("{name}.json"), &summary)?;
        self.finished = true;
        self.store.delete(&format!("{name}.pending"))?;
        Ok(self.summary.clone())
    }
}

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        if !self.finished {
            // What it has stored goes with the next prune.
            drop(
                self.store
                    .delete(&format!("{BACKUPS}/{}.pending", self.name)),
            );
        }
    }
}

/// Copies so many bytes, no fewer; their CRC32C.
fn copy(from: &mut impl Read, to: &mut impl Write, bytes: u64) -> io::Result<u32> {
    let mut chunk = vec![0; 256 << 10];
    let (mut crc, mut left) = (0, bytes);
    while left > 0 {
        let want = usize::try_from(left).map_or(chunk.len(), |left| left.min(chunk.len()));
        from.read_exact(&mut chunk[..want])?;
        crc = crc32c::crc32c_append(crc, &chunk[..want]);
        to.write_all(&chunk[..want])?;
        left -= want as u64;
    }
    Ok(crc)
}
