//! The link: many requests at once on one connection between a gateway and a worker.
//!
//! It shares the worker's port with HTTP/1.1 and is told from it by its first byte. All numbers are
//! little-endian. The connection begins with two messages:
//!
//! | offset | bytes | hello, from the gateway | welcome, from the worker |
//! |---|---|---|---|
//! | 0 | 8 | [`MAGIC`] | [`MAGIC`] |
//! | 8 | 2 | oldest version it speaks | the version that both will speak, or 0 |
//! | 10 | 2 | newest version it speaks | [`Verdict`] |
//! | 12 | 4 | bytes of the token | streams that may be open at once |
//! | 16 | … | the cluster's token | |
//!
//! Then frames go both ways, each with this header before its payload:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | bytes of the payload, at most [`PAYLOAD_BYTES_MAX`] |
//! | 4 | 4 | stream |
//! | 8 | 1 | [`Kind`] |
//! | 9 | 1 | flags: [`END`] |
//!
//! A *stream* is one request and its answer. The gateway picks a number that is not in use and sends
//! [`Kind::Request`]. The worker sends [`Kind::Response`] and then any number of [`Kind::Data`], the
//! last of all with [`END`]; or [`Kind::Broken`], at any time. With these the stream ends, exactly once
//! and only by the worker, so both sides know when a number is free again. The gateway may send
//! [`Kind::Cancel`]; the worker then ends the stream soon.
//!
//! **Flow control.** The worker sends at most [`WINDOW_BYTES`] of body per stream ahead of what the
//! gateway's client has taken; [`Kind::Credit`] gives back what it took. So the gateway always reads the
//! link at once, and a slow client holds up nothing but its own stream.
//!
//! **Order.** A worker takes requests in the order of the link. [`Kind::Retire`] says how many it has
//! taken since the beginning: of those beyond, nothing ran and nothing will. It follows that a request
//! whose frame was not handed to the kernel, or was sent after that point, is safe to send elsewhere.

mod messages;

pub use messages::{Ask, Headers, Request, Response, Routed, request, response};

/// The first bytes of both directions. No HTTP request begins with a NUL.
pub const MAGIC: [u8; 8] = *b"\0dmlink\n";

/// The versions that this build speaks.
pub const VERSION_OLDEST: u16 = 1;
pub const VERSION_NEWEST: u16 = 1;

/// Bytes of a hello before the token, and of a welcome.
pub const HELLO_BYTES: usize = 16;
pub const WELCOME_BYTES: usize = 16;

/// Longest token.
pub const TOKEN_BYTES_MAX: usize = 4096;

/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 10;

/// Largest payload of a frame.
pub const PAYLOAD_BYTES_MAX: usize = 512 << 10;

/// Largest body of a request. Larger ones, and those of unknown length, go by HTTP/1.1: what a link saves
/// is the same for each request, and vanishes beside the cost of many bytes.
pub const REQUEST_BODY_BYTES_MAX: usize = 64 << 10;

/// Most bytes of all headers, path and names of a request or response.
pub const HEAD_BYTES_MAX: usize = 256 << 10;

/// Body bytes per stream that a worker may send ahead of the credit it was given.
pub const WINDOW_BYTES: u32 = 128 << 10;

/// Body bytes of one data frame: what others on the link wait for behind it.
pub const DATA_BYTES_MAX: usize = 32 << 10;

/// Streams that a worker lets be open at once.
pub const STREAMS_MAX: u32 = 16 << 10;

/// Flag: nothing of this stream follows.
pub const END: u8 = 1;

const _: () = assert!(
    HEAD_BYTES_MAX + WINDOW_BYTES as usize <= PAYLOAD_BYTES_MAX
        && HEAD_BYTES_MAX + REQUEST_BODY_BYTES_MAX <= PAYLOAD_BYTES_MAX,
    "the largest head and body must fit in one frame"
);

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// To the worker: a whole [`Request`].
    Request = 1,
    /// To the worker: the client took so many bytes of the body (4 bytes).
    Credit = 2,
    /// To the worker: nobody waits for the answer any more.
    Cancel = 3,
    /// From the worker: a [`Response`], with the beginning of its body.
    Response = 16,
    /// From the worker: more of the body.
    Data = 17,
    /// From the worker: the stream ends here, and is not whole. The payload says why, for people.
    Broken = 18,
    /// From the worker, on stream 0: how many requests it took (8 bytes). It takes no more.
    Retire = 19,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Request,
            2 => Self::Credit,
            3 => Self::Cancel,
            16 => Self::Response,
            17 => Self::Data,
            18 => Self::Broken,
            19 => Self::Retire,
            _ => return None,
        })
    }
}

/// What a worker says to a hello.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Verdict {
    Accepted = 0,
    /// It speaks none of the versions.
    Version = 1,
    /// The token is not the cluster's.
    Token = 2,
}

/// What the other side said is not of this protocol. The link is of no further use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LinkFault {
    #[error("the connection does not begin with the magic of a link")]
    Magic,
    #[error("the versions {oldest} to {newest} make no range")]
    Versions { oldest: u16, newest: u16 },
    #[error("the verdict {0} is unknown")]
    Verdict(u16),
    #[error("a token of {0} bytes is longer than {TOKEN_BYTES_MAX}")]
    Token(u32),
    #[error("frame kind {0} is unknown")]
    Kind(u8),
    #[error("a payload of {0} bytes is larger than {PAYLOAD_BYTES_MAX}")]
    Payload(u32),
    #[error("a frame ends before its {0}")]
    Short(&'static str),
    #[error("the {0} of a frame is not valid")]
    Invalid(&'static str),
}

/// The gateway's first message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    pub oldest: u16,
    pub newest: u16,
    /// Of the token that follows.
    pub token_bytes: u32,
}

impl Hello {
    /// The hello of this build with its token.
    ///
    /// # Errors
    /// [`LinkFault::Token`] when the token is too long.
    pub fn write(token: &[u8]) -> Result<Vec<u8>, LinkFault> {
        let token_bytes = u32::try_from(token.len()).unwrap_or(u32::MAX);
        if token.len() > TOKEN_BYTES_MAX {
            return Err(LinkFault::Token(token_bytes));
        }
        let mut hello = Vec::with_capacity(HELLO_BYTES + token.len());
        hello.extend_from_slice(&MAGIC);
        hello.extend_from_slice(&VERSION_OLDEST.to_le_bytes());
        hello.extend_from_slice(&VERSION_NEWEST.to_le_bytes());
        hello.extend_from_slice(&token_bytes.to_le_bytes());
        hello.extend_from_slice(token);
        Ok(hello)
    }

    pub fn read(bytes: &[u8; HELLO_BYTES]) -> Result<Self, LinkFault> {
        let mut reader = messages::Reader(bytes);
        if reader.array::<8>("magic")? != MAGIC {
            return Err(LinkFault::Magic);
        }
        let hello = Self {
            oldest: reader.u16("versions")?,
            newest: reader.u16("versions")?,
            token_bytes: reader.u32("token")?,
        };
        if hello.oldest > hello.newest {
            return Err(LinkFault::Versions {
                oldest: hello.oldest,
                newest: hello.newest,
            });
        }
        if hello.token_bytes as usize > TOKEN_BYTES_MAX {
            return Err(LinkFault::Token(hello.token_bytes));
        }
        Ok(hello)
    }

    /// The newest version that both sides speak.
    pub fn version(&self) -> Option<u16> {
        let newest = self.newest.min(VERSION_NEWEST);
        (newest >= self.oldest.max(VERSION_OLDEST)).then_some(newest)
    }
}

/// The worker's answer to a hello.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Welcome {
    /// 0 unless accepted.
    pub version: u16,
    pub verdict: Verdict,
    pub streams_max: u32,
}

impl Welcome {
    pub fn write(&self) -> [u8; WELCOME_BYTES] {
        let mut bytes = [0; WELCOME_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&self.version.to_le_bytes());
        bytes[10..12].copy_from_slice(&(self.verdict as u16).to_le_bytes());
        bytes[12..].copy_from_slice(&self.streams_max.to_le_bytes());
        bytes
    }

    pub fn read(bytes: &[u8; WELCOME_BYTES]) -> Result<Self, LinkFault> {
        let mut reader = messages::Reader(bytes);
        if reader.array::<8>("magic")? != MAGIC {
            return Err(LinkFault::Magic);
        }
        let version = reader.u16("version")?;
        let verdict = match reader.u16("verdict")? {
            0 => Verdict::Accepted,
            1 => Verdict::Version,
            2 => Verdict::Token,
            unknown => return Err(LinkFault::Verdict(unknown)),
        };
        Ok(Self {
            version,
            verdict,
            streams_max: reader.u32("streams")?,
        })
    }
}

/// The header of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub payload_bytes: usize,
    pub stream: u32,
    pub kind: Kind,
    /// The flag [`END`].
    pub end: bool,
}

impl Header {
    /// The header at the beginning of `bytes`; `None` while it is not whole.
    pub fn read(bytes: &[u8]) -> Result<Option<Self>, LinkFault> {
        let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let mut reader = messages::Reader(header);
        let payload = reader.u32("header")?;
        let stream = reader.u32("header")?;
        let kind = reader.u8("header")?;
        let flags = reader.u8("header")?;
        if payload as usize > PAYLOAD_BYTES_MAX {
            return Err(LinkFault::Payload(payload));
        }
        Ok(Some(Self {
            payload_bytes: payload as usize,
            stream,
            kind: Kind::from_byte(kind).ok_or(LinkFault::Kind(kind))?,
            end: flags & END != 0,
        }))
    }
}

/// Appends a frame whose payload `write` appends, at most [`PAYLOAD_BYTES_MAX`].
pub fn frame(
    out: &mut Vec<u8>,
    kind: Kind,
    end: bool,
    stream: u32,
    write: impl FnOnce(&mut Vec<u8>),
) {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&stream.to_le_bytes());
    out.extend_from_slice(&[kind as u8, if end { END } else { 0 }]);
    write(out);
    let payload = out.len() - start - HEADER_BYTES;
    debug_assert!(payload <= PAYLOAD_BYTES_MAX, "a frame of {payload} bytes");
    let payload = u32::try_from(payload).expect("callers keep to PAYLOAD_BYTES_MAX");
    out[start..start + 4].copy_from_slice(&payload.to_le_bytes());
}

/// Appends a frame that gives `bytes` of credit.
pub fn credit(out: &mut Vec<u8>, stream: u32, bytes: u32) {
    frame(out, Kind::Credit, false, stream, |out| {
        out.extend_from_slice(&bytes.to_le_bytes());
    });
}

/// Appends the frame that says how many requests the worker took.
pub fn retire(out: &mut Vec<u8>, taken: u64) {
    frame(out, Kind::Retire, false, 0, |out| {
        out.extend_from_slice(&taken.to_le_bytes());
    });
}

/// The payload of [`Kind::Credit`].
pub fn read_credit(payload: &[u8]) -> Result<u32, LinkFault> {
    messages::Reader(payload).u32("credit")
}

/// The payload of [`Kind::Retire`].
pub fn read_retire(payload: &[u8]) -> Result<u64, LinkFault> {
    messages::Reader(payload).u64("count")
}

#[cfg(test)]
mod tests;
