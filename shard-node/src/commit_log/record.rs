//! The bytes of a record.
//!
//! Numbers are little-endian. Every record begins with the same twelve bytes:
//!
//! | offset | bytes | field |
//! |-------:|------:|-------|
//! | 0 | 4 | CRC32C of the position of the record (8 bytes) and of what follows this field |
//! | 4 | 4 | length of the record, these bytes included; 0: the log ends here |
//! | 8 | 1 | kind: 1 group, 2 commit |
//! | 9 | 1 | flags of the kind |
//! | 10 | 2 | commit: shard; group: 0 |
//!
//! A *group* is what was written and synced at once; its record comes first. It tells a torn tail from
//! damage: all before `durable` was on the disk when the group was written.
//!
//! | offset | bytes | field |
//! |-------:|------:|-------|
//! | 12 | 8 | `"DORMGRP1"` |
//! | 20 | 8 | position up to which the log was durable |
//!
//! A *commit* is one transaction of one database:
//!
//! | offset | bytes | field |
//! |-------:|------:|-------|
//! | 12 | 8 | epoch of the shard |
//! | 20 | 8 | time, milliseconds since 1970 |
//! | 28 | 8 | position of the commit before, of the same database; 0: unknown |
//! | 36 | 32 | the database: the id of its object, or [`FileId::catalog`] |
//! | 68 | 4 | bytes of a page |
//! | 72 | 4 | pages of the database after the commit |
//! | 76 | 4 | pages that changed |
//! | 80 | … | if flag 1: class, name (each 2 bytes of length and UTF-8; an empty name is none) |
//! | … | … | if flag 2: the alarm from here on |
//! | … | 16 | if flag 4: time and position since which the database was as this says |
//! | … | … | the changed pages |
//!
//! and a changed page is its number (4 bytes, counted from 1), the CRC32C that its contents have after
//! the commit (4 bytes), and the number of changed ranges (2 bytes). Each range is its offset in
//! the page, its length (2 bytes each) and its bytes. No ranges at all: the whole page follows.
//!
//! Flag 4 is a *base*: it changes nothing, but has all pages, for whoever wants to know the database at an
//! earlier time. Flag 8: before this commit the database had no pages. Flag 16: before it a file took the
//! place of the database, and the pages that did not change are those of the file.
//!
//! An alarm is one byte, the sum of 1 if one is pending and 2 if there is a dead letter. Pending: when it
//! was to run and when it runs next (8 bytes each, milliseconds since 1970), and its retries (4 bytes).
//! Dead letter: when it was to run, when it failed (8 bytes each), and the error (2 bytes of length and
//! UTF-8).

use protocol::{Bookmark, ClassName, Epoch, Home, LogPosition, ObjectId, ObjectName, ShardId};

use crate::alarm::{AlarmState, DeadLetter, Pending, clip};

/// Version of this format, in the header of every segment.
pub const VERSION: u32 = 2;

/// The oldest version that is understood: it lacks flag 16 of commits and the time in headers of segments.
pub const VERSION_MIN: u32 = 1;

/// Bytes that every record begins with.
const PREFIX_BYTES: usize = 12;

/// Bytes of a group record.
pub(crate) const GROUP_BYTES: usize = GROUP_LENGTH as usize;
const GROUP_LENGTH: u32 = 28;

/// Bytes of a commit before identity and pages.
const COMMIT_BYTES: usize = 80;

pub(crate) const GROUP_MAGIC: [u8; 8] = *b"DORMGRP1";

/// Where the magic is in a group record.
pub(crate) const GROUP_MAGIC_AT: usize = PREFIX_BYTES;

const KIND_GROUP: u8 = 1;
const KIND_COMMIT: u8 = 2;

/// Flag of a commit: class and name are given.
const FLAG_IDENTITY: u8 = 1;

/// Flag of a commit: it changed the alarm.
const FLAG_ALARM: u8 = 2;

/// Flags of a commit: it is a base; there was nothing before it.
const FLAG_BASE: u8 = 4;
const FLAG_FROM_EMPTY: u8 = 8;
/// Flag of a commit: its pages are those of a file that was put there.
const FLAG_FROM_FILE: u8 = 16;

const FLAGS: u8 = FLAG_IDENTITY | FLAG_ALARM | FLAG_BASE | FLAG_FROM_EMPTY | FLAG_FROM_FILE;

const ALARM_PENDING: u8 = 1;
const ALARM_DEAD: u8 = 2;

/// Equal bytes between two changed ranges that cost less than the head of another range.
const GAP_BYTES: usize = 8;

/// Bytes before the contents of a changed page, and before those of a range.
const PAGE_HEAD_BYTES: usize = 10;
const RANGE_HEAD_BYTES: usize = 4;

/// A database in the log and on disk: that of an object, or the catalog of a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId([u8; 32]);

/// The first byte of a catalog's id; ids of objects begin with their version and kind, never this.
const CATALOG: u8 = 0xff;

/// Where the home is, as in the id of an object.
const HOME: std::ops::Range<usize> = 1..4;

impl FileId {
    /// The catalog of a shard of the global ring, or of the ring of a colo.
    pub fn catalog(home: Home, shard: ShardId) -> Self {
        let mut bytes = [0; 32];
        bytes[0] = CATALOG;
        bytes[HOME].copy_from_slice(&home.to_bytes());
        bytes[4..6].copy_from_slice(&shard.0.to_le_bytes());
        Self(bytes)
    }

    pub fn is_catalog(&self) -> bool {
        self.0[0] == CATALOG
    }

    /// The ring it is on: with the shard, that tells who owns it.
    pub fn home(&self) -> Home {
        let [_, home @ ..] = self.0.first_chunk::<4>().expect("there are 32");
        Home::from_bytes(*home).unwrap_or(Home::Global)
    }

    pub(crate) fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    pub(crate) fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// The object, if it is the database of one.
    pub fn object(&self) -> Option<ObjectId> {
        if self.is_catalog() {
            return None;
        }
        self.to_string().parse().ok()
    }
}

impl From<ObjectId> for FileId {
    fn from(id: ObjectId) -> Self {
        Self(*id.as_bytes())
    }
}

impl std::fmt::Display for FileId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// What a commit says besides its pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommitHead {
    pub shard: ShardId,
    pub epoch: Epoch,
    pub unix_millis: u64,
    pub previous: LogPosition,
    pub file: FileId,
    pub page_bytes: u32,
    pub pages: u32,
}

/// Class and name, as the first commit of an object records them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    pub class: ClassName,
    pub name: Option<ObjectName>,
}

/// What a commit may say besides its pages.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Told<'a> {
    pub(crate) named: Option<&'a Named>,
    pub(crate) alarm: Option<&'a AlarmState>,
    /// It is a base: the database was so since then.
    pub(crate) base: Option<Bookmark>,
    /// Before it the database had no pages.
    pub(crate) from_empty: bool,
    /// Before it a file took the place of the database.
    pub(crate) from_file: bool,
}

/// Writes one commit to the end of a buffer. Its prefix is completed by [`seal`].
pub(crate) struct CommitWriter<'b> {
    buffer: &'b mut Vec<u8>,
    begin: usize,
    changed: u32,
}

impl<'b> CommitWriter<'b> {
    pub(crate) fn begin(buffer: &'b mut Vec<u8>, head: &CommitHead, told: &Told<'_>) -> Self {
        let begin = buffer.len();
        buffer.extend_from_slice(&[0; 8]);
        buffer.push(KIND_COMMIT);
        let flag = |is: bool, flag| if is { flag } else { 0 };
        buffer.push(
            flag(told.named.is_some(), FLAG_IDENTITY)
                | flag(told.alarm.is_some(), FLAG_ALARM)
                | flag(told.base.is_some(), FLAG_BASE)
                | flag(told.from_empty, FLAG_FROM_EMPTY)
                | flag(told.from_file, FLAG_FROM_FILE),
        );
        buffer.extend_from_slice(&head.shard.0.to_le_bytes());
        buffer.extend_from_slice(&head.epoch.0.get().to_le_bytes());
        buffer.extend_from_slice(&head.unix_millis.to_le_bytes());
        buffer.extend_from_slice(&head.previous.0.to_le_bytes());
        buffer.extend_from_slice(&head.file.0);
        buffer.extend_from_slice(&head.page_bytes.to_le_bytes());
        buffer.extend_from_slice(&head.pages.to_le_bytes());
        buffer.extend_from_slice(&[0; 4]);
        if let Some(named) = told.named {
            let name = named.name.as_ref().map_or("", ObjectName::as_str);
            for text in [named.class.as_str(), name] {
                put_text(buffer, text);
            }
        }
        if let Some(alarm) = told.alarm {
            put_alarm(buffer, alarm);
        }
        if let Some(since) = told.base {
            buffer.extend_from_slice(&since.unix_millis.to_le_bytes());
            buffer.extend_from_slice(&since.position.0.to_le_bytes());
        }
        Self {
            buffer,
            begin,
            changed: 0,
        }
    }

    fn page_head(&mut self, number: u32, now: &[u8]) {
        self.changed += 1;
        self.buffer.extend_from_slice(&number.to_le_bytes());
        self.buffer
            .extend_from_slice(&crc32c::crc32c(now).to_le_bytes());
    }

    /// A page whose contents before are not in the log since the last flush.
    pub(crate) fn whole_page(&mut self, number: u32, now: &[u8]) {
        self.page_head(number, now);
        self.buffer.extend_from_slice(&0u16.to_le_bytes());
        self.buffer.extend_from_slice(now);
    }

    /// A page as what changed in it, or whole where that is shorter. Equal pages write nothing.
    pub(crate) fn changed_page(&mut self, number: u32, before: &[u8], now: &[u8]) {
        debug_assert_eq!(before.len(), now.len(), "pages of one database");
        let Some(first) = next_difference(before, now, 0) else {
            return;
        };
        let page_begin = self.buffer.len();
        self.page_head(number, now);
        let count_at = self.buffer.len();
        self.buffer.extend_from_slice(&[0; 2]);
        let mut ranges: u16 = 0;
        let mut begin = first;
        loop {
            let end = range_end(before, now, begin);
            for number in [begin, end - begin] {
                // Pages have at most 65536 bytes; a range as long as that becomes a whole page below.
                let number = u16::try_from(number).unwrap_or(0);
                self.buffer.extend_from_slice(&number.to_le_bytes());
            }
            self.buffer.extend_from_slice(&now[begin..end]);
            ranges += 1;
            let spent = self.buffer.len() - page_begin;
            if spent >= PAGE_HEAD_BYTES + now.len() {
                self.buffer.truncate(page_begin);
                self.changed -= 1;
                return self.whole_page(number, now);
            }
            match next_difference(before, now, end) {
                Some(next) => begin = next,
                None => break,
            }
        }
        self.buffer[count_at..count_at + 2].copy_from_slice(&ranges.to_le_bytes());
    }

    /// Completes the record; its length.
    pub(crate) fn finish(self) -> usize {
        let length = self.buffer.len() - self.begin;
        let record = &mut self.buffer[self.begin..];
        let bytes = u32::try_from(length).expect("transaction_bytes_max is far below 4 GiB");
        record[4..8].copy_from_slice(&bytes.to_le_bytes());
        record[76..80].copy_from_slice(&self.changed.to_le_bytes());
        length
    }
}

fn put_text(buffer: &mut Vec<u8>, text: &str) {
    let length = u16::try_from(text.len()).expect("names and errors are at most 1024 bytes");
    buffer.extend_from_slice(&length.to_le_bytes());
    buffer.extend_from_slice(text.as_bytes());
}

fn put_alarm(buffer: &mut Vec<u8>, alarm: &AlarmState) {
    let pending = if alarm.pending.is_some() {
        ALARM_PENDING
    } else {
        0
    };
    let dead = if alarm.dead.is_some() { ALARM_DEAD } else { 0 };
    buffer.push(pending | dead);
    if let Some(pending) = &alarm.pending {
        buffer.extend_from_slice(&pending.scheduled_ms.to_le_bytes());
        buffer.extend_from_slice(&pending.next_ms.to_le_bytes());
        buffer.extend_from_slice(&pending.retries.to_le_bytes());
    }
    if let Some(dead) = &alarm.dead {
        buffer.extend_from_slice(&dead.scheduled_ms.to_le_bytes());
        buffer.extend_from_slice(&dead.failed_ms.to_le_bytes());
        put_text(buffer, clip(&dead.error));
    }
}

const WORD: usize = size_of::<u64>();

/// The first place at or after `from` where the pages differ.
fn next_difference(before: &[u8], now: &[u8], from: usize) -> Option<usize> {
    let (before, now) = (&before[from..], &now[from..]);
    let mut at = 0;
    for (left, right) in before.chunks_exact(WORD).zip(now.chunks_exact(WORD)) {
        if left != right {
            break;
        }
        at += WORD;
    }
    let differs = |(left, right): (&u8, &u8)| left != right;
    let found = before[at..].iter().zip(&now[at..]).position(differs)?;
    Some(from + at + found)
}

/// Where the changed range that begins at `begin` ends: before the next run of equal bytes that is
/// longer than the head of a new range.
fn range_end(before: &[u8], now: &[u8], begin: usize) -> usize {
    let mut end = begin + 1;
    let mut at = end;
    while at < now.len() && at - end < GAP_BYTES {
        if before[at] != now[at] {
            end = at + 1;
        }
        at += 1;
    }
    end
}

/// Appends the record of a group; [`seal_group`] completes it.
pub(crate) fn begin_group(buffer: &mut Vec<u8>) {
    buffer.extend_from_slice(&[0; 4]);
    buffer.extend_from_slice(&GROUP_LENGTH.to_le_bytes());
    buffer.extend_from_slice(&[KIND_GROUP, 0, 0, 0]);
    buffer.extend_from_slice(&GROUP_MAGIC);
    buffer.extend_from_slice(&[0; 8]);
}

/// Completes all records of a group that begins at `position`: what is durable, and the checksums.
pub(crate) fn seal_group(group: &mut [u8], position: LogPosition, durable: LogPosition) {
    group[20..28].copy_from_slice(&durable.0.to_le_bytes());
    let mut at = 0;
    while at < group.len() {
        let length = u32_at(&group[at..], 4) as usize;
        let record = &mut group[at..at + length];
        let crc = checksum(position.after(at), &record[4..]);
        record[..4].copy_from_slice(&crc.to_le_bytes());
        at += length;
    }
}

fn checksum(position: LogPosition, bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&position.0.to_le_bytes()), bytes)
}

/// A record as it was read.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "most are commits, and each lives for a moment on the stack"
)]
pub(crate) enum Record<'a> {
    Group { durable: LogPosition },
    Commit(Commit<'a>),
}

/// A commit as it was read, its checksum already right.
#[derive(Debug)]
pub(crate) struct Commit<'a> {
    pub(crate) head: CommitHead,
    pub(crate) named: Option<Named>,
    pub(crate) alarm: Option<AlarmState>,
    pub(crate) base: Option<Bookmark>,
    pub(crate) from_empty: bool,
    pub(crate) from_file: bool,
    /// All of it, as it is in the log.
    pub(crate) raw: &'a [u8],
    changed: u32,
    pages: &'a [u8],
}

/// One changed page.
#[derive(Debug)]
pub(crate) struct ChangedPage<'a> {
    pub(crate) number: u32,
    /// CRC32C of its contents after the commit.
    pub(crate) crc: u32,
    pub(crate) change: Change<'a>,
}

#[derive(Debug)]
pub(crate) enum Change<'a> {
    Whole(&'a [u8]),
    Ranges(Ranges<'a>),
}

/// Ranges of a page, checked to lie inside it.
#[derive(Debug)]
pub(crate) struct Ranges<'a>(&'a [u8]);

impl Ranges<'_> {
    pub(crate) fn apply(&self, page: &mut [u8]) {
        let mut rest = self.0;
        while !rest.is_empty() {
            let (offset, length) = (u16_at(rest, 0) as usize, u16_at(rest, 2) as usize);
            let (bytes, next) = rest[RANGE_HEAD_BYTES..].split_at(length);
            page[offset..offset + length].copy_from_slice(bytes);
            rest = next;
        }
    }
}

/// Why bytes are no record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Bad {
    /// Its length says that there is none: where an intact log ends.
    End,
    /// Too short, or its checksum is wrong.
    Torn,
    /// Its checksum is right, but this version does not understand it.
    Foreign(String),
}

/// Reads the record at the beginning of `bytes`, which is at `position`; also its length.
pub(crate) fn read(bytes: &[u8], position: LogPosition) -> Result<(Record<'_>, usize), Bad> {
    if bytes.len() < PREFIX_BYTES {
        return Err(if bytes.iter().all(|byte| *byte == 0) {
            Bad::End
        } else {
            Bad::Torn
        });
    }
    let length = u32_at(bytes, 4) as usize;
    if length == 0 && bytes[..PREFIX_BYTES].iter().all(|byte| *byte == 0) {
        return Err(Bad::End);
    }
    if length < PREFIX_BYTES || length > bytes.len() {
        return Err(Bad::Torn);
    }
    let record = &bytes[..length];
    if checksum(position, &record[4..]) != u32_at(record, 0) {
        return Err(Bad::Torn);
    }
    let parsed = match record[8] {
        KIND_GROUP if length == GROUP_BYTES && record[12..20] == GROUP_MAGIC => Record::Group {
            durable: LogPosition(u64_at(record, 20)),
        },
        KIND_COMMIT => Record::Commit(
            parse_commit(record)
                .ok_or_else(|| Bad::Foreign("a commit that contradicts itself".to_owned()))?,
        ),
        kind => return Err(Bad::Foreign(format!("a record of kind {kind}"))),
    };
    Ok((parsed, length))
}

fn parse_commit(record: &[u8]) -> Option<Commit<'_>> {
    if record.len() < COMMIT_BYTES || record[9] & !FLAGS != 0 {
        return None;
    }
    let head = CommitHead {
        shard: ShardId(u16_at(record, 10)),
        epoch: Epoch(u64_at(record, 12).try_into().ok()?),
        unix_millis: u64_at(record, 20),
        previous: LogPosition(u64_at(record, 28)),
        file: FileId(record[36..68].try_into().ok()?),
        page_bytes: u32_at(record, 68),
        pages: u32_at(record, 72),
    };
    if !(512..=65536).contains(&head.page_bytes) || !head.page_bytes.is_power_of_two() {
        return None;
    }
    let mut rest = &record[COMMIT_BYTES..];
    let named = if record[9] & FLAG_IDENTITY != 0 {
        let class = take_text(&mut rest)?.parse().ok()?;
        let name = match take_text(&mut rest)? {
            "" => None,
            name => Some(name.parse().ok()?),
        };
        Some(Named { class, name })
    } else {
        None
    };
    let alarm = if record[9] & FLAG_ALARM != 0 {
        Some(take_alarm(&mut rest)?)
    } else {
        None
    };
    let base = if record[9] & FLAG_BASE != 0 {
        Some(Bookmark {
            unix_millis: u64::from_le_bytes(take(&mut rest)?),
            position: LogPosition(u64::from_le_bytes(take(&mut rest)?)),
        })
    } else {
        None
    };
    let commit = Commit {
        head,
        named,
        alarm,
        base,
        from_empty: record[9] & FLAG_FROM_EMPTY != 0,
        from_file: record[9] & FLAG_FROM_FILE != 0,
        raw: record,
        changed: u32_at(record, 76),
        pages: rest,
    };
    // All of it is read once here, so that applying it cannot fail half-way.
    let mut pages = commit.pages();
    let mut count = 0;
    while let Some(page) = pages.read_one()? {
        if page.number == 0 || page.number > commit.head.pages {
            return None;
        }
        count += 1;
    }
    (count == commit.changed).then_some(commit)
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, left) = rest.split_first_chunk()?;
    *rest = left;
    Some(*taken)
}

fn take_alarm(rest: &mut &[u8]) -> Option<AlarmState> {
    let [what] = take(rest)?;
    if what & !(ALARM_PENDING | ALARM_DEAD) != 0 {
        return None;
    }
    let mut alarm = AlarmState::default();
    if what & ALARM_PENDING != 0 {
        alarm.pending = Some(Pending {
            scheduled_ms: u64::from_le_bytes(take(rest)?),
            next_ms: u64::from_le_bytes(take(rest)?),
            retries: u32::from_le_bytes(take(rest)?),
        });
    }
    if what & ALARM_DEAD != 0 {
        alarm.dead = Some(DeadLetter {
            scheduled_ms: u64::from_le_bytes(take(rest)?),
            failed_ms: u64::from_le_bytes(take(rest)?),
            error: take_text(rest)?.to_owned(),
        });
    }
    Some(alarm)
}

fn take_text<'a>(rest: &mut &'a [u8]) -> Option<&'a str> {
    let length = usize::from(u16::from_le_bytes(*rest.first_chunk()?));
    let text = rest.get(2..2 + length)?;
    *rest = &rest[2 + length..];
    std::str::from_utf8(text).ok()
}

impl<'a> Commit<'a> {
    pub(crate) fn pages(&self) -> Pages<'a> {
        Pages {
            rest: self.pages,
            page_bytes: self.head.page_bytes as usize,
        }
    }
}

/// The changed pages of a commit, one after the other.
pub(crate) struct Pages<'a> {
    rest: &'a [u8],
    page_bytes: usize,
}

impl<'a> Pages<'a> {
    /// The next page, or `None` after the last; no answer at all if the bytes are wrong.
    fn read_one(&mut self) -> Option<Option<ChangedPage<'a>>> {
        if self.rest.is_empty() {
            return Some(None);
        }
        if self.rest.len() < PAGE_HEAD_BYTES {
            return None;
        }
        let (number, crc) = (u32_at(self.rest, 0), u32_at(self.rest, 4));
        let count = u16_at(self.rest, 8);
        let body = &self.rest[PAGE_HEAD_BYTES..];
        let length = if count == 0 {
            self.page_bytes
        } else {
            ranges_length(body, count, self.page_bytes)?
        };
        let bytes = body.get(..length)?;
        self.rest = &body[length..];
        let change = if count == 0 {
            Change::Whole(bytes)
        } else {
            Change::Ranges(Ranges(bytes))
        };
        Some(Some(ChangedPage {
            number,
            crc,
            change,
        }))
    }
}

impl<'a> Iterator for Pages<'a> {
    type Item = ChangedPage<'a>;

    fn next(&mut self) -> Option<ChangedPage<'a>> {
        self.read_one().flatten()
    }
}

/// Bytes that `count` ranges take, if each lies inside the page.
fn ranges_length(body: &[u8], count: u16, page_bytes: usize) -> Option<usize> {
    let mut at = 0;
    for _ in 0..count {
        let head = body.get(at..at + RANGE_HEAD_BYTES)?;
        let (offset, length) = (u16_at(head, 0) as usize, u16_at(head, 2) as usize);
        if offset + length > page_bytes {
            return None;
        }
        at += RANGE_HEAD_BYTES + length;
    }
    Some(at)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*bytes[at..].first_chunk().expect("the caller checked"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(*bytes[at..].first_chunk().expect("the caller checked"))
}
