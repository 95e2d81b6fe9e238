//! Is everything in a data directory as it should be? Offline, and without changing anything.
//!
//! Reads every log (checksums, order), opens every database with what the logs have for it
//! (`PRAGMA integrity_check`, and whether it is that of its object), and compares the catalogs with both.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use protocol::{Home, ObjectId, ShardId};

use crate::clock::SystemClock;
use crate::commit_log::record::FileId;
use crate::data_dir::{DataDir, DataDirError};
use crate::disk::Disk;
use crate::storage::logged::{OpenError, PAGE_BYTES, Setup};
use crate::storage::{LogConfig, Logged};

/// Rows of a catalog that are read at once.
const PAGE_ROWS: u32 = 1000;

/// Why a data directory could not be checked at all.
#[derive(Debug, thiserror::Error)]
pub enum FsckError {
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error("read {path}")]
    Io { path: PathBuf, source: io::Error },
}

/// What was found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Logs of workers, and databases whose latest commits are in them and not in their files.
    pub logs: u64,
    pub recovered: u64,
    pub objects: u64,
    pub bytes: u64,
    /// Rows of all catalogs, with what the logs have for them.
    pub listed: u64,
    pub problems: u64,
}

/// Checks a data directory that no node uses. `problem` hears of everything that is wrong; `progress`
/// of every database, with their number.
pub fn check(
    path: &Path,
    mut problem: impl FnMut(&str),
    mut progress: impl FnMut(u64),
) -> Result<Summary, FsckError> {
    let (data_dir, shards) = DataDir::open_existing(path)?;
    let disk = data_dir.disk()?;
    let mut summary = Summary::default();
    let mut report = |summary: &mut Summary, text: String| {
        summary.problems += 1;
        problem(&text);
    };
    let mut engines = Vec::new();
    for worker in data_dir.workers_from(0)? {
        summary.logs += 1;
        match open(&disk, data_dir.path(), worker) {
            Ok(engine) => engines.push(engine),
            Err(error) => report(
                &mut summary,
                format!("log of worker {worker}: {}", ops::Causes(&error)),
            ),
        }
    }
    let mut databases = files(data_dir.path(), shards)?;
    let mut owner: HashMap<FileId, usize> = HashMap::new();
    for (number, engine) in engines.iter().enumerate() {
        for (file, shard) in engine.databases() {
            summary.recovered += 1;
            databases.insert(file, shard);
            if owner.insert(file, number).is_some() {
                report(
                    &mut summary,
                    format!("{file} is in the logs of two workers"),
                );
            }
        }
    }
    if engines.is_empty() {
        return Ok(summary);
    }
    for file in engines.iter().flat_map(Logged::deleted) {
        databases.remove(&file);
    }
    let mut sizes: BTreeMap<FileId, (ShardId, u64)> = BTreeMap::new();
    for (file, shard) in &databases {
        let engine = &engines[owner.get(file).copied().unwrap_or(0)];
        match check_database(engine, *file, *shard) {
            Ok(bytes) if file.is_catalog() => summary.bytes += bytes,
            Ok(bytes) => {
                summary.objects += 1;
                summary.bytes += bytes;
                sizes.insert(*file, (*shard, bytes));
                progress(summary.objects);
            }
            Err(what) => report(&mut summary, format!("database {file}: {what}")),
        }
    }
    let mut listed: BTreeMap<FileId, (ShardId, u64)> = BTreeMap::new();
    for (file, shard) in databases.iter().filter(|(file, _)| file.is_catalog()) {
        let engine = &engines[owner.get(file).copied().unwrap_or(0)];
        match rows(engine, file.home(), *shard) {
            Ok(found) => listed.extend(found.into_iter().map(|(id, bytes)| (id, (*shard, bytes)))),
            Err(error) => report(&mut summary, format!("catalog of shard {shard}: {error}")),
        }
    }
    for engine in &engines {
        for (file, note) in engine.notes() {
            if note.bytes == 0 {
                listed.remove(&file);
            } else {
                listed.insert(file, (note.shard, note.bytes));
            }
        }
    }
    summary.listed = listed.len() as u64;
    for (file, found) in &sizes {
        match listed.remove(file) {
            None => report(&mut summary, format!("object {file} is not in the catalog")),
            Some(row) if row != *found => report(
                &mut summary,
                format!(
                    "object {file} has {} bytes in shard {}, but the catalog says {} in shard {}",
                    found.1, found.0, row.1, row.0
                ),
            ),
            Some(_) => {}
        }
    }
    for (file, (shard, _)) in listed {
        if !databases.contains_key(&file) {
            report(
                &mut summary,
                format!("the catalog of shard {shard} lists {file}, which has no database"),
            );
        }
    }
    Ok(summary)
}

fn open(disk: &Arc<dyn Disk>, data_dir: &Path, worker: u16) -> Result<Logged, OpenError> {
    Logged::open_read_only(Setup {
        disk: Arc::clone(disk),
        data_dir: data_dir.to_owned(),
        worker,
        log: LogConfig::default(),
        page_bytes: PAGE_BYTES,
        transaction_bytes_max: 0,
        clock: Arc::new(SystemClock),
        sync_time: metrics::Histogram::noop(),
        archive: None,
    })
}

/// Every database file, with the shard whose directory it is in.
fn files(data_dir: &Path, shards: u16) -> Result<BTreeMap<FileId, ShardId>, FsckError> {
    let mut found = BTreeMap::new();
    for shard in (0..shards).map(ShardId) {
        let directory = data_dir.join("shards").join(shard.to_string());
        for path in list(&directory)? {
            let name = name_of(&path);
            if let Some(home) = catalog_home(&name) {
                found.insert(FileId::catalog(home, shard), shard);
            } else if path.is_dir() {
                let objects = list(&path)?;
                let ids = objects.iter().filter_map(|path| {
                    let name = name_of(path);
                    name.strip_suffix(".db")?.parse::<ObjectId>().ok()
                });
                found.extend(ids.map(|id| (FileId::from(id), shard)));
            }
        }
    }
    Ok(found)
}

fn catalog_home(name: &str) -> Option<Home> {
    match name.strip_prefix("catalog")?.strip_suffix(".db")? {
        "" => Some(Home::Global),
        colo => Some(Home::Colo(colo.strip_prefix('-')?.parse().ok()?)),
    }
}

fn name_of(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

fn list(directory: &Path) -> Result<Vec<PathBuf>, FsckError> {
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.and_then(|entries| {
            entries
                .map(|entry| entry.map(|entry| entry.path()))
                .collect()
        }),
    };
    entries.map_err(|source| FsckError::Io {
        path: directory.to_owned(),
        source,
    })
}

/// The size of a database, if it is whole.
fn check_database(engine: &Logged, file: FileId, shard: ShardId) -> Result<u64, String> {
    let text = |error: rusqlite::Error| error.to_string();
    let opened = engine.open_file(file, shard).map_err(text)?;
    let result = (|| {
        let connection = &opened.connection;
        let value = |pragma: &str| -> Result<u64, String> {
            let found = connection.pragma_query_value(None, pragma, |row| row.get::<_, i64>(0));
            Ok(u64::try_from(found.map_err(text)?).unwrap_or(0))
        };
        let mut check = connection.prepare("PRAGMA integrity_check").map_err(text)?;
        let lines = check
            .query_map([], |row| row.get::<_, String>(0))
            .map_err(text)?;
        let lines: Vec<String> = lines.collect::<Result<_, _>>().map_err(text)?;
        if lines != ["ok"] {
            return Err(lines.join("; "));
        }
        if file.is_catalog() {
            return Ok(value("page_count")? * value("page_size")?);
        }
        let id: String = connection
            .query_row(
                "SELECT value FROM _dormouse_meta WHERE key = 'id'",
                [],
                |row| row.get(0),
            )
            .map_err(text)?;
        if id != file.to_string() {
            return Err(format!("it is the database of {id}"));
        }
        Ok(value("page_count")? * value("page_size")?)
    })();
    opened.close();
    result
}

fn rows(engine: &Logged, home: Home, shard: ShardId) -> rusqlite::Result<Vec<(FileId, u64)>> {
    let mut all = Vec::new();
    loop {
        let after = all.last().map(|(id, _)| *id);
        let page = engine.list(home, shard, after, PAGE_ROWS)?;
        if page.is_empty() {
            return Ok(all);
        }
        let found = page.iter().filter_map(|row| {
            let id: ObjectId = row.id.parse().ok()?;
            Some((FileId::from(id), row.bytes))
        });
        let before = all.len();
        all.extend(found);
        if all.len() == before {
            return Ok(all);
        }
    }
}
