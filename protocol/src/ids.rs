//! Names and ids: what an object is called, and the 32 bytes that every process derives from that.
//!
//! An [`ObjectId`], byte by byte:
//!
//! | offset | bytes | field   | meaning |
//! |-------:|------:|---------|---------|
//! | 0      | 1     | kind    | format version 1 in the high nibble; 1 = named, 2 = unique in the low one |
//! | 1      | 3     | home    | a colo in ASCII, ff ff ff for the colo `unknown`, zeros for no home |
//! | 4      | 20    | digest  | named: the first bytes of SHA-256 over class, home and name; unique: random |
//! | 24     | 8     | binding | the first bytes of SHA-256 over class and bytes 0 to 23 |
//!
//! The binding ties an id to its class, so that a mistyped id, or one of another class, is refused
//! instead of opening an empty object. The digest is cryptographic because two names must never meet
//! in one object; the choice of a shard is not, so [`ObjectId::shard`] hashes fast.

use std::fmt;
use std::str::FromStr;

use percent_encoding::percent_decode_str;
use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::xxh3_64;

use crate::limits;

const FORMAT: u8 = 1;
const DIGEST_DOMAIN: &[u8] = b"dormouse object name\0";
const BINDING_DOMAIN: &[u8] = b"dormouse class binding\0";

/// The name of a class: a letter, then letters, digits, `_` and `-`, at most
/// [`limits::CLASS_NAME_BYTES_MAX`] bytes. Cheap to clone is not promised; parse it at the edge.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClassName(Box<str>);

/// Why a class name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "class name {0:?} must be a letter followed by at most {max} letters, digits, `_` or `-`",
    max = limits::CLASS_NAME_BYTES_MAX - 1
)]
pub struct ClassNameError(String);

impl ClassName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ClassName {
    type Err = ClassNameError;

    fn from_str(text: &str) -> Result<Self, ClassNameError> {
        let legal = text.len() <= limits::CLASS_NAME_BYTES_MAX
            && text.starts_with(|first: char| first.is_ascii_alphabetic())
            && text
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-');
        if legal {
            Ok(Self(text.into()))
        } else {
            Err(ClassNameError(clip(text)))
        }
    }
}

impl fmt::Display for ClassName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name of an object within its class: 1 to [`limits::OBJECT_NAME_BYTES_MAX`] bytes of UTF-8
/// without control characters.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName(Box<str>);

/// Why an object name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ObjectNameError {
    #[error("an object name must not be empty")]
    Empty,
    #[error("object name of {bytes} bytes is longer than {max}", max = limits::OBJECT_NAME_BYTES_MAX)]
    TooLong { bytes: usize },
    #[error("object name has the control character U+{:04X} at byte {at}", u32::from(*character))]
    Control { character: char, at: usize },
    #[error("object name {encoded:?} is not UTF-8 after percent-decoding")]
    NotUtf8 { encoded: String },
}

impl ObjectName {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Percent-decodes one path segment, once.
    pub fn decode(segment: &str) -> Result<Self, ObjectNameError> {
        // Decoding shrinks at most threefold, so this bounds the work too.
        if segment.len() > 3 * limits::OBJECT_NAME_BYTES_MAX {
            let bytes = percent_decode_str(segment).count();
            return Err(ObjectNameError::TooLong { bytes });
        }
        percent_decode_str(segment)
            .decode_utf8()
            .map_err(|_| ObjectNameError::NotUtf8 {
                encoded: clip(segment),
            })?
            .parse()
    }
}

impl FromStr for ObjectName {
    type Err = ObjectNameError;

    fn from_str(text: &str) -> Result<Self, ObjectNameError> {
        if text.is_empty() {
            return Err(ObjectNameError::Empty);
        }
        if text.len() > limits::OBJECT_NAME_BYTES_MAX {
            return Err(ObjectNameError::TooLong { bytes: text.len() });
        }
        if let Some((at, character)) = text.char_indices().find(|(_, c)| c.is_control()) {
            return Err(ObjectNameError::Control { character, at });
        }
        Ok(Self(text.into()))
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One site: three upper-case letters or digits in the style of IATA airport codes, or `unknown`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Colo([u8; 3]);

/// Why a colo label was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("colo {0:?} must be three upper-case letters or digits, as in SFO, or `unknown`")]
pub struct ColoError(String);

impl Colo {
    pub const UNKNOWN: Self = Self([0xff; 3]);

    pub fn as_str(&self) -> &str {
        match std::str::from_utf8(&self.0) {
            Ok(code) => code,
            Err(_) => "unknown",
        }
    }

    fn from_bytes(bytes: [u8; 3]) -> Option<Self> {
        let legal = bytes == Self::UNKNOWN.0
            || bytes
                .iter()
                .all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit());
        legal.then_some(Self(bytes))
    }
}

impl FromStr for Colo {
    type Err = ColoError;

    fn from_str(text: &str) -> Result<Self, ColoError> {
        if text == "unknown" {
            return Ok(Self::UNKNOWN);
        }
        text.as_bytes()
            .try_into()
            .ok()
            .and_then(Self::from_bytes)
            .ok_or_else(|| ColoError(clip(text)))
    }
}

impl fmt::Display for Colo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Which ring an object lives on: the global one, or the one of a colo.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Home {
    Global,
    Colo(Colo),
}

impl Home {
    /// As it is in an id: zeros, or the letters of the colo.
    pub fn to_bytes(self) -> [u8; 3] {
        match self {
            Self::Global => [0; 3],
            Self::Colo(colo) => colo.0,
        }
    }

    pub fn from_bytes(bytes: [u8; 3]) -> Option<Self> {
        match bytes {
            [0, 0, 0] => Some(Self::Global),
            colo => Colo::from_bytes(colo).map(Self::Colo),
        }
    }
}

/// The unit of placement: a number below the ring's shard count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShardId(pub u16);

impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Where an id came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdKind {
    Named,
    Unique,
}

/// The identity of one object in the whole system; prints as 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId([u8; 32]);

/// Why an id was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ObjectIdError {
    #[error("object id {0:?} must be 64 lower-case hex digits")]
    NotHex(String),
    #[error("object id {0} has an unknown version, kind or home: it was not made by this system")]
    Format(String),
    #[error("object id {id} does not belong to class {class}, or was mistyped")]
    Foreign { id: ObjectId, class: ClassName },
}

impl ObjectId {
    /// The id of the object that `name` denotes: equal inputs give equal ids, everywhere and for ever.
    pub fn named(class: &ClassName, home: Home, name: &ObjectName) -> Self {
        // The class cannot contain a NUL and the home has a fixed length: the parts cannot be mixed up.
        let digest = Sha256::new()
            .chain_update(DIGEST_DOMAIN)
            .chain_update(class.as_str())
            .chain_update([0])
            .chain_update(home.to_bytes())
            .chain_update(name.as_str())
            .finalize();
        let digest = digest[..20].try_into().expect("20 of 32 bytes");
        Self::assemble(IdKind::Named, class, home, digest)
    }

    /// An id that no name leads to. `random` must come from a cryptographic generator: with 160 bits,
    /// ids of one class collide after about 2^80 of them.
    pub fn unique(class: &ClassName, home: Home, random: [u8; 20]) -> Self {
        Self::assemble(IdKind::Unique, class, home, random)
    }

    fn assemble(kind: IdKind, class: &ClassName, home: Home, digest: [u8; 20]) -> Self {
        let mut bytes = [0; 32];
        bytes[0] = FORMAT << 4
            | match kind {
                IdKind::Named => 1,
                IdKind::Unique => 2,
            };
        bytes[1..4].copy_from_slice(&home.to_bytes());
        bytes[4..24].copy_from_slice(&digest);
        let binding = binding(class, &bytes);
        bytes[24..].copy_from_slice(&binding);
        Self(bytes)
    }

    /// Checks that this id was made for `class`.
    pub fn check_class(self, class: &ClassName) -> Result<Self, ObjectIdError> {
        if self.0[24..] == binding(class, &self.0) {
            Ok(self)
        } else {
            Err(ObjectIdError::Foreign {
                id: self,
                class: class.clone(),
            })
        }
    }

    pub fn kind(self) -> IdKind {
        match self.0[0] & 0xf {
            1 => IdKind::Named,
            _ => IdKind::Unique,
        }
    }

    pub fn home(self) -> Home {
        match [self.0[1], self.0[2], self.0[3]] {
            [0, 0, 0] => Home::Global,
            colo => Home::Colo(Colo(colo)),
        }
    }

    /// The shard of this object in a ring of `shards` shards: xxh3 and a multiply-shift, so that every
    /// shard gets an equal part of the hash space.
    pub fn shard(self, shards: u16) -> ShardId {
        let product = u128::from(xxh3_64(&self.0)) * u128::from(shards);
        ShardId(u16::try_from(product >> 64).expect("below `shards`, which is a u16"))
    }

    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The inverse of [`as_bytes`](Self::as_bytes); `None` if this system makes no such ids.
    pub fn from_bytes(bytes: [u8; 32]) -> Option<Self> {
        let known_kind = matches!(bytes[0], 0x11 | 0x12);
        let known = known_kind && Home::from_bytes([bytes[1], bytes[2], bytes[3]]).is_some();
        known.then_some(Self(bytes))
    }
}

fn binding(class: &ClassName, id: &[u8; 32]) -> [u8; 8] {
    let digest = Sha256::new()
        .chain_update(BINDING_DOMAIN)
        .chain_update(class.as_str())
        .chain_update([0])
        .chain_update(&id[..24])
        .finalize();
    digest[..8].try_into().expect("8 of 32 bytes")
}

impl FromStr for ObjectId {
    type Err = ObjectIdError;

    fn from_str(text: &str) -> Result<Self, ObjectIdError> {
        let malformed = || ObjectIdError::NotHex(clip(text));
        let digits: &[u8; 64] = text.as_bytes().try_into().map_err(|_| malformed())?;
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.as_chunks::<2>().0) {
            let high = hex_value(pair[0]).ok_or_else(malformed)?;
            let low = hex_value(pair[1]).ok_or_else(malformed)?;
            *byte = high << 4 | low;
        }
        Self::from_bytes(bytes).ok_or_else(|| ObjectIdError::Format(text.to_owned()))
    }
}

fn hex_value(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut text = [0; 64];
        for (pair, byte) in text.as_chunks_mut::<2>().0.iter_mut().zip(self.0) {
            *pair = [
                DIGITS[usize::from(byte >> 4)],
                DIGITS[usize::from(byte & 0xf)],
            ];
        }
        f.write_str(std::str::from_utf8(&text).expect("hex digits are ASCII"))
    }
}

impl fmt::Debug for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Shortens what goes into an error message: the caller has the whole, a log need not.
fn clip(text: &str) -> String {
    const SHOWN: usize = 80;
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests;
