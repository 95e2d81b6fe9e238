//! Reading a log: every durable commit, in order, and how it ends.
//!
//! A log ends where the first record is not whole. After a crash that is a torn tail: the last groups
//! were not synced, so none of them was acknowledged. But if something later in the log says that
//! this place was durable before, then what is here was damaged afterwards, and the log is refused.

use std::io;
use std::path::{Path, PathBuf};

use protocol::LogPosition;

use super::record::{self, Bad, Commit, GROUP_BYTES, GROUP_MAGIC, GROUP_MAGIC_AT, Record, VERSION};
use super::segment::{self, BadHeader, HEADER_BYTES, Header};
use crate::disk::{Access, Disk};

/// Why a log cannot be used. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    #[error("read {path}")]
    Io { path: PathBuf, source: io::Error },
    #[error(
        "{path} has version {found} of the log's format, but this version of dormouse reads version {VERSION}: start the version that wrote it, and stop it cleanly, before this one"
    )]
    Version { path: PathBuf, found: u32 },
    #[error(
        "{path} is damaged at byte {offset} (log position {position}): {what}. It holds acknowledged writes; restore the file, or the whole data directory, from a copy"
    )]
    Damaged {
        path: PathBuf,
        offset: u64,
        position: LogPosition,
        what: String,
    },
    #[error("segment {missing} of the log is missing")]
    Missing { missing: PathBuf },
}

/// One segment that holds, or may hold, records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) path: PathBuf,
    pub(crate) header: Header,
}

/// What was found.
#[derive(Debug)]
pub(crate) struct Replayed {
    /// In the order of their sequence numbers.
    pub(crate) segments: Vec<Found>,
    /// Where the durable part ends.
    pub(crate) end: LogPosition,
    /// The number that no segment had yet.
    pub(crate) next_sequence: u64,
    /// Bytes after the end that were not synced before a crash.
    pub(crate) torn_bytes: u64,
}

/// Calls `apply` with every commit and its place, oldest first.
///
/// Reads one segment at a time into memory. `until`, if given, is where the durable part is known to
/// end: what is beyond is not looked at.
pub(crate) fn replay(
    disk: &dyn Disk,
    directory: &Path,
    until: Option<LogPosition>,
    mut apply: impl FnMut(LogPosition, LogPosition, &Commit<'_>) -> Result<(), String>,
) -> Result<Replayed, ReplayError> {
    let (mut segments, mut next_sequence) = find(disk, directory)?;
    let mut bytes = Vec::new();
    if let Some(last) = segments.last()
        && header_was_torn(disk, last, &mut bytes)?
    {
        next_sequence = last.0;
        segments.pop();
    }
    let segments = headers(disk, segments)?;
    let starts = segments.iter().map(|found| found.header.start);
    let mut end = starts.min().unwrap_or_default();
    let mut torn_bytes = 0;
    for (index, found) in segments.iter().enumerate() {
        // A later segment that begins before the end of this one makes the rest of this one void.
        let later = segments[index + 1..].iter().map(|next| next.header.start);
        let limit = later.chain(until).min();
        if limit.is_some_and(|limit| limit <= found.header.start) {
            continue;
        }
        if found.header.start != end {
            return Err(damaged(
                found,
                24,
                found.header.start,
                "it begins elsewhere",
            ));
        }
        read_file(disk, &found.path, &mut bytes)?;
        let stop = Scan {
            found,
            bytes: &bytes[HEADER_BYTES.min(bytes.len())..],
        }
        .run(limit, &mut apply)?;
        end = stop;
        if limit.is_none() {
            let valid = end.0 - found.header.start.0 + HEADER_BYTES as u64;
            let rest = usize::try_from(valid).map_or(&[][..], |valid| &bytes[valid..]);
            torn_bytes = rest.iter().filter(|byte| **byte != 0).count() as u64;
        }
    }
    Ok(Replayed {
        segments,
        end,
        next_sequence,
        torn_bytes,
    })
}

/// The files of a log in order, and the next free number.
fn find(disk: &dyn Disk, directory: &Path) -> Result<(Vec<(u64, PathBuf)>, u64), ReplayError> {
    let names = disk
        .list(directory)
        .map_err(|source| io_error(directory, source))?;
    let mut found: Vec<(u64, PathBuf)> = names
        .into_iter()
        .filter_map(|path| Some((segment::sequence_of(&path)?, path)))
        .collect();
    found.sort();
    for pair in found.windows(2) {
        if pair[1].0 != pair[0].0 + 1 {
            let missing = segment::path(directory, pair[0].0 + 1);
            return Err(ReplayError::Missing { missing });
        }
    }
    let next = found.last().map_or(1, |(sequence, _)| sequence + 1);
    Ok((found, next))
}

/// Whether the last segment was being created when the node died: a header that is not whole, and no
/// group anywhere. Headers are durable before the first group is written.
fn header_was_torn(
    disk: &dyn Disk,
    (_, path): &(u64, PathBuf),
    bytes: &mut Vec<u8>,
) -> Result<bool, ReplayError> {
    read_file(disk, path, bytes)?;
    Ok(Header::parse(bytes) == Err(BadHeader::Damaged)
        && memchr::memmem::find(bytes, &GROUP_MAGIC).is_none())
}

fn headers(disk: &dyn Disk, segments: Vec<(u64, PathBuf)>) -> Result<Vec<Found>, ReplayError> {
    let read = |(sequence, path): (u64, PathBuf)| {
        let mut bytes = [0; HEADER_BYTES];
        let length = disk
            .open(&path, Access::Read)
            .and_then(|file| file.read_at(&mut bytes, 0))
            .map_err(|source| io_error(&path, source))?;
        match Header::parse(&bytes[..length]) {
            Ok(header) if header.sequence == sequence => Ok(Found { path, header }),
            Err(BadHeader::Version(found)) => Err(ReplayError::Version { path, found }),
            Ok(_) | Err(BadHeader::Damaged) => Err(ReplayError::Damaged {
                path,
                offset: 0,
                position: LogPosition::ZERO,
                what: "its header is not valid".to_owned(),
            }),
        }
    };
    segments.into_iter().map(read).collect()
}

fn read_file(disk: &dyn Disk, path: &Path, bytes: &mut Vec<u8>) -> Result<(), ReplayError> {
    let mut read = || {
        let file = disk.open(path, Access::Read)?;
        let length = usize::try_from(file.status()?.bytes).map_err(io::Error::other)?;
        bytes.clear();
        bytes.resize(length, 0);
        let read = file.read_at(bytes, 0)?;
        bytes.truncate(read);
        Ok(())
    };
    read().map_err(|source| io_error(path, source))
}

fn io_error(path: &Path, source: io::Error) -> ReplayError {
    ReplayError::Io {
        path: path.to_owned(),
        source,
    }
}

fn damaged(
    found: &Found,
    offset: usize,
    position: LogPosition,
    what: impl Into<String>,
) -> ReplayError {
    ReplayError::Damaged {
        path: found.path.clone(),
        offset: offset as u64,
        position,
        what: what.into(),
    }
}

/// The records of one segment.
struct Scan<'a> {
    found: &'a Found,
    bytes: &'a [u8],
}

impl Scan<'_> {
    /// Reads records up to `limit`, which must be the end of one, or else to the end of the log; where
    /// that is.
    fn run(
        &self,
        limit: Option<LogPosition>,
        apply: &mut impl FnMut(LogPosition, LogPosition, &Commit<'_>) -> Result<(), String>,
    ) -> Result<LogPosition, ReplayError> {
        let start = self.found.header.start;
        let mut at = 0;
        loop {
            let position = start.after(at);
            if limit.is_some_and(|limit| position >= limit) {
                return if limit == Some(position) {
                    Ok(position)
                } else {
                    Err(self.damaged(at, "a record crosses the end of its segment"))
                };
            }
            match record::read(&self.bytes[at..], position) {
                Ok((parsed, length)) => {
                    if let Record::Commit(commit) = parsed {
                        apply(position, position.after(length), &commit)
                            .map_err(|what| self.damaged(at, what))?;
                    }
                    at += length;
                }
                Err(Bad::Foreign(what)) => return Err(self.damaged(at, what)),
                Err(Bad::End | Bad::Torn) if limit.is_some() => {
                    return Err(self.damaged(at, "a record is not whole"));
                }
                Err(Bad::End | Bad::Torn) => {
                    self.check_tail(at)?;
                    return Ok(position);
                }
            }
        }
    }

    /// The record at `at` is not whole. If any group after it knew this place to be durable, this is no
    /// torn tail.
    fn check_tail(&self, at: usize) -> Result<(), ReplayError> {
        let start = self.found.header.start;
        for magic in memchr::memmem::find_iter(&self.bytes[at..], &GROUP_MAGIC) {
            let Some(group) = (at + magic).checked_sub(GROUP_MAGIC_AT) else {
                continue;
            };
            let bytes = self.bytes.get(group..group + GROUP_BYTES);
            let parsed = bytes.map(|bytes| record::read(bytes, start.after(group)));
            if let Some(Ok((Record::Group { durable }, _))) = parsed
                && durable > start.after(at)
            {
                return Err(self.damaged(
                    at,
                    format!(
                        "a record is not whole, though the log was durable up to position {durable}"
                    ),
                ));
            }
        }
        Ok(())
    }

    fn damaged(&self, at: usize, what: impl Into<String>) -> ReplayError {
        let position = self.found.header.start.after(at);
        damaged(self.found, at + HEADER_BYTES, position, what)
    }
}
