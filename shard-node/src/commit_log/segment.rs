//! The files of a log: `{sequence, 16 hex digits}.log`, each with a header and the records that follow.
//!
//! | offset | bytes | field |
//! |-------:|------:|-------|
//! | 0 | 8 | `"DORMLOG\n"` |
//! | 8 | 4 | version of the format |
//! | 12 | 4 | CRC32C of the 48 bytes that follow |
//! | 16 | 8 | sequence number |
//! | 24 | 8 | position of the first record |
//! | 32 | 2 | worker |
//! | 34 | 8 | the latest time of a commit before, milliseconds since 1970; 0: unknown |
//! | 42 | 22 | 0 |
//!
//! A header is durable before the first record is written. Records of earlier segments count only up to
//! the position in the header: whatever else those files hold was never acknowledged.

use std::io;
use std::path::{Path, PathBuf};

use protocol::LogPosition;

use super::record::{VERSION, VERSION_MIN};
use crate::disk::{Access, Disk, DiskFile};

pub(crate) const HEADER_BYTES: usize = 64;

const MAGIC: [u8; 8] = *b"DORMLOG\n";

/// Zeros are written this far ahead of the records, so that a sync has no new length to record; less in
/// a segment that is shorter.
const ZERO_BYTES: u64 = 1 << 20;

/// What the header of a segment says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) sequence: u64,
    pub(crate) start: LogPosition,
    pub(crate) worker: u16,
    /// No commit before it is of a later time, milliseconds since 1970; 0: unknown.
    pub(crate) latest_ms: u64,
}

/// Why bytes are no header.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum BadHeader {
    Version(u32),
    Damaged,
}

impl Header {
    fn to_bytes(self) -> [u8; HEADER_BYTES] {
        self.to_bytes_of(VERSION)
    }

    fn to_bytes_of(self, version: u32) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&version.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.start.0.to_le_bytes());
        bytes[32..34].copy_from_slice(&self.worker.to_le_bytes());
        bytes[34..42].copy_from_slice(&self.latest_ms.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[16..]);
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, BadHeader> {
        let Some(bytes) = bytes.first_chunk::<HEADER_BYTES>() else {
            return Err(BadHeader::Damaged);
        };
        let u32_at = |at: usize| u32::from_le_bytes(*bytes[at..].first_chunk().expect("inside"));
        let u64_at = |at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().expect("inside"));
        if bytes[..8] != MAGIC {
            return Err(BadHeader::Damaged);
        }
        let version = u32_at(8);
        if !(VERSION_MIN..=VERSION).contains(&version) {
            return Err(BadHeader::Version(version));
        }
        let header = Self {
            sequence: u64_at(16),
            start: LogPosition(u64_at(24)),
            worker: u16::from_le_bytes([bytes[32], bytes[33]]),
            latest_ms: u64_at(34),
        };
        // Compared whole: the zeros count too.
        if header.to_bytes_of(version) == *bytes {
            Ok(header)
        } else {
            Err(BadHeader::Damaged)
        }
    }
}

pub(crate) fn path(directory: &Path, sequence: u64) -> PathBuf {
    directory.join(format!("{sequence:016x}.log"))
}

/// The sequence number in the name of a segment; `None` for any other name.
pub(crate) fn sequence_of(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?.strip_suffix(".log")?;
    if name.len() != 16 {
        return None;
    }
    u64::from_str_radix(name, 16).ok()
}

/// The records of a segment that end at `end`; `None` if the file is gone, or all of it is void.
pub(crate) fn records(
    disk: &dyn Disk,
    path: &Path,
    header: Header,
    end: LogPosition,
) -> io::Result<Option<Vec<u8>>> {
    let Some(bytes) = end.0.checked_sub(header.start.0).filter(|bytes| *bytes > 0) else {
        return Ok(None);
    };
    let file = match disk.open(path, Access::Read) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let mut records = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
    let read = file.read_at(&mut records, HEADER_BYTES as u64)?;
    if read < records.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some(records))
}

/// The segment that is written.
pub(crate) struct Segment {
    file: Box<dyn DiskFile>,
    /// Where the next record goes, and how far there are zeros.
    next: u64,
    zeroed: u64,
    zeros: Vec<u8>,
    synced: bool,
}

impl Segment {
    /// Creates a segment, durably. A file of that name was never used and is replaced.
    pub(crate) fn create(
        disk: &dyn Disk,
        directory: &Path,
        header: Header,
        segment_bytes: u64,
    ) -> io::Result<Self> {
        let path = path(directory, header.sequence);
        match disk.remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = disk.open(&path, Access::CreateNew)?;
        let zeros = usize::try_from(segment_bytes.min(ZERO_BYTES)).unwrap_or(0);
        let zeros = vec![0; zeros.max(HEADER_BYTES)];
        file.write_all_at(&zeros, 0)?;
        file.write_all_at(&header.to_bytes(), 0)?;
        file.sync()?;
        disk.sync_dir(directory)?;
        Ok(Self {
            file,
            next: HEADER_BYTES as u64,
            zeroed: zeros.len() as u64,
            zeros,
            synced: true,
        })
    }

    /// Bytes written so far, header included.
    pub(crate) fn bytes(&self) -> u64 {
        self.next
    }

    /// Writes a group; durable after [`sync`](Self::sync).
    pub(crate) fn write(&mut self, group: &[u8]) -> io::Result<()> {
        let end = self.next + group.len() as u64;
        self.synced = false;
        if end > self.zeroed {
            // Only what lies beyond the group: zeros under it would be written twice.
            self.file.write_all_at(&self.zeros, end)?;
            self.zeroed = end + self.zeros.len() as u64;
        }
        self.file.write_all_at(group, self.next)?;
        self.next = end;
        Ok(())
    }

    pub(crate) fn sync(&mut self) -> io::Result<()> {
        if !self.synced {
            self.file.sync()?;
            self.synced = true;
        }
        Ok(())
    }
}
