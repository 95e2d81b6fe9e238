//! A closed loop that costs little: requests at hand as bytes, one under way on each connection, no
//! pipelining. One thread, pinned.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use hdrhistogram::Histogram;
use protocol::link;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rustix::thread::{CpuSet, sched_setaffinity};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::{JoinSet, LocalSet};

/// Answers are small here.
const ANSWER_BYTES_MAX: usize = 64 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Protocol {
    /// HTTP/1.1; 200 is right.
    Http,
    /// Redis' RESP2; an integer or a bulk string is right.
    Resp,
    /// A link, as gateways have to workers, here with one request at a time; 200 is right.
    Link,
}

pub(super) struct Load {
    pub(super) address: SocketAddr,
    pub(super) protocol: Protocol,
    /// Each is sent as often as any other.
    pub(super) requests: Rc<[Vec<u8>]>,
    pub(super) connections: u32,
    pub(super) warmup: Duration,
    pub(super) duration: Duration,
    pub(super) core: u32,
    pub(super) seed: u64,
}

#[derive(Debug, Clone)]
pub(super) struct Measured {
    /// Answered, the warm-up's included.
    pub(super) sent: u64,
    /// Answered per second after the warm-up.
    pub(super) rps: f64,
    pub(super) p50_us: u64,
    pub(super) p99_us: u64,
    pub(super) errors: u64,
    /// The last of them.
    pub(super) error: String,
}

/// Runs a load to its end.
pub(super) fn run(load: Load) -> anyhow::Result<Measured> {
    pin(load.core)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    LocalSet::new().block_on(&runtime, all(load))
}

/// Asks once and gives the body of the answer.
pub(super) fn ask(
    address: SocketAddr,
    protocol: Protocol,
    request: &[u8],
) -> anyhow::Result<String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut connection = Connection::open(address, protocol).await?;
        let body = connection.exchange(request).await?;
        Ok(String::from_utf8_lossy(body).into_owned())
    })
}

/// Keeps this thread on a core.
pub(super) fn pin(core: u32) -> anyhow::Result<()> {
    let mut cores = CpuSet::new();
    cores.set(usize::try_from(core)?);
    sched_setaffinity(None, &cores).with_context(|| format!("pin the client to core {core}"))
}

async fn all(load: Load) -> anyhow::Result<Measured> {
    let begin = now();
    let (measure_from, end) = (begin + load.warmup, begin + load.warmup + load.duration);
    let mut connections = JoinSet::new();
    for number in 0..load.connections {
        let random = SmallRng::seed_from_u64(load.seed << 32 | u64::from(number));
        let connection = Connection::open(load.address, load.protocol).await?;
        let requests = Rc::clone(&load.requests);
        connections.spawn_local(one(connection, requests, random, measure_from, end));
    }
    let mut histogram = histogram()?;
    let (mut sent, mut errors, mut error) = (0, 0, String::new());
    while let Some(part) = connections.join_next().await {
        let part = part.context("a connection's task panicked")?;
        sent += part.sent;
        histogram.add(&part.histogram).context("equal bounds")?;
        if let Err(wrong) = part.ended {
            errors += 1;
            error = format!("{wrong:#}");
        }
    }
    Ok(Measured {
        sent,
        rps: count(histogram.len()) / load.duration.as_secs_f64(),
        p50_us: histogram.value_at_quantile(0.5),
        p99_us: histogram.value_at_quantile(0.99),
        errors,
        error,
    })
}

struct Part {
    sent: u64,
    histogram: Histogram<u64>,
    ended: anyhow::Result<()>,
}

async fn one(
    mut connection: Connection,
    requests: Rc<[Vec<u8>]>,
    mut random: SmallRng,
    measure_from: Instant,
    end: Instant,
) -> Part {
    let mut part = Part {
        sent: 0,
        histogram: histogram().expect("the bounds are in order"),
        ended: Ok(()),
    };
    loop {
        let begin = now();
        if begin >= end {
            return part;
        }
        let request = &requests[random.random_range(0..requests.len())];
        if let Err(error) = connection.exchange(request).await {
            part.ended = Err(error);
            return part;
        }
        part.sent += 1;
        let ended = now();
        // What ends after the end is acknowledged, and not measured.
        if begin >= measure_from && ended < end {
            let micros = u64::try_from((ended - begin).as_micros()).unwrap_or(u64::MAX);
            part.histogram.saturating_record(micros.max(1));
        }
    }
}

struct Connection {
    stream: TcpStream,
    protocol: Protocol,
    buffer: Vec<u8>,
}

impl Connection {
    async fn open(address: SocketAddr, protocol: Protocol) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address)
            .await
            .with_context(|| format!("connect to {address}"))?;
        stream.set_nodelay(true)?;
        let mut connection = Self {
            stream,
            protocol,
            buffer: Vec::with_capacity(4096),
        };
        if protocol == Protocol::Link {
            connection.shake_hands().await?;
        }
        Ok(connection)
    }

    async fn shake_hands(&mut self) -> anyhow::Result<()> {
        self.stream.write_all(&link::Hello::write(b"")?).await?;
        let mut welcome = [0; link::WELCOME_BYTES];
        self.stream.read_exact(&mut welcome).await?;
        let verdict = link::Welcome::read(&welcome)?.verdict;
        ensure!(verdict == link::Verdict::Accepted, "{verdict:?}");
        Ok(())
    }

    /// Sends a request and returns the body of its answer.
    async fn exchange(&mut self, request: &[u8]) -> anyhow::Result<&[u8]> {
        self.stream.write_all(request).await?;
        self.buffer.clear();
        let body = loop {
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                bail!("the connection was closed before the answer ended");
            }
            let answer = match self.protocol {
                Protocol::Http => http(&self.buffer)?,
                Protocol::Resp => resp(&self.buffer)?,
                Protocol::Link => link_answer(&self.buffer)?,
            };
            if let Some(body) = answer {
                break body;
            }
            ensure!(
                self.buffer.len() < ANSWER_BYTES_MAX,
                "the answer is too long"
            );
        };
        Ok(&self.buffer[body])
    }
}

type Body = std::ops::Range<usize>;

/// Where the body of a whole answer is; `None`: more has to come.
fn http(bytes: &[u8]) -> anyhow::Result<Option<Body>> {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut response = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(head) = response.parse(bytes)? else {
        return Ok(None);
    };
    let status = response.code.unwrap_or(0);
    ensure!(status == 200, "{}", String::from_utf8_lossy(bytes));
    let header = |name: &str| {
        let found = response.headers.iter();
        let mut found = found.filter(|header| header.name.eq_ignore_ascii_case(name));
        found.next().map(|header| header.value)
    };
    if let Some(length) = header("content-length") {
        let length: usize = std::str::from_utf8(length)?.parse()?;
        return Ok((bytes.len() >= head + length).then_some(head..head + length));
    }
    // One chunk is all that the peers send for such bodies.
    ensure!(
        header("transfer-encoding") == Some(b"chunked"),
        "an answer without a length"
    );
    if !bytes.ends_with(b"0\r\n\r\n") {
        return Ok(None);
    }
    match httparse::parse_chunk_size(&bytes[head..]) {
        Ok(httparse::Status::Complete((begin, length))) => {
            let (begin, length) = (head + begin, usize::try_from(length)?);
            ensure!(begin + length <= bytes.len(), "a chunk that is not whole");
            Ok(Some(begin..begin + length))
        }
        _ => bail!("a chunk without a size"),
    }
}

/// The same of Redis: `:123\r\n` or `$3\r\n123\r\n`.
fn resp(bytes: &[u8]) -> anyhow::Result<Option<Body>> {
    if !bytes.ends_with(b"\r\n") {
        return Ok(None);
    }
    match bytes[0] {
        b':' => Ok(Some(1..bytes.len() - 2)),
        b'$' => {
            let line = bytes
                .iter()
                .position(|byte| *byte == b'\n')
                .map(|at| at + 1);
            let begin = line.unwrap_or(bytes.len());
            Ok((begin < bytes.len()).then(|| begin..bytes.len() - 2))
        }
        _ => bail!("{}", String::from_utf8_lossy(bytes)),
    }
}

/// The same of a link: the frame of a response, which has all of the body.
fn link_answer(bytes: &[u8]) -> anyhow::Result<Option<Body>> {
    let Some(header) = link::Header::read(bytes)? else {
        return Ok(None);
    };
    let end = link::HEADER_BYTES + header.payload_bytes;
    if bytes.len() < end {
        return Ok(None);
    }
    let payload = &bytes[link::HEADER_BYTES..end];
    ensure!(
        header.kind == link::Kind::Response && header.end,
        "a frame of kind {:?}: {}",
        header.kind,
        String::from_utf8_lossy(payload)
    );
    let response = link::Response::read(payload)?;
    ensure!(
        response.status == 200,
        "{}",
        String::from_utf8_lossy(response.body)
    );
    Ok(Some(end - response.body.len()..end))
}

fn histogram() -> anyhow::Result<Histogram<u64>> {
    Histogram::new_with_bounds(1, 600_000_000, 3).context("histogram")
}

#[expect(clippy::cast_precision_loss, reason = "shown, not counted")]
pub(super) fn count(count: u64) -> f64 {
    count as f64
}

#[expect(clippy::disallowed_methods, reason = "a benchmark measures real time")]
fn now() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_ends_where_it_says() {
        let body = |bytes: &'static str| {
            let body = http(bytes.as_bytes()).map_err(|error| error.to_string());
            body.map(|body| body.map(|body| &bytes[body]))
        };
        assert_eq!(body("HTTP/1.1 200 OK\r\ncontent-le"), Ok(None));
        assert_eq!(
            body("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n4"),
            Ok(None)
        );
        assert_eq!(
            body("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n42"),
            Ok(Some("42"))
        );
        let chunked = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\n42\r\n0\r\n\r\n";
        assert_eq!(body(chunked), Ok(Some("42")));
        assert!(body("HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n").is_err());
    }

    #[test]
    fn answers_of_a_link_are_frames() {
        let mut frame = Vec::new();
        let headers = [(&b"content-type"[..], &b"application/json"[..])];
        link::response(&mut frame, 0, true, 200, headers.into_iter(), b"42");
        let body = |bytes: &[u8]| {
            let body = link_answer(bytes).map_err(|error| error.to_string());
            body.map(|body| body.map(|body| bytes[body].to_vec()))
        };
        assert_eq!(body(&frame), Ok(Some(b"42".to_vec())));
        assert_eq!(body(&frame[..frame.len() - 1]), Ok(None));
        let mut refused = Vec::new();
        link::response(&mut refused, 0, true, 503, headers.into_iter(), b"busy");
        assert_eq!(body(&refused), Err("busy".to_owned()));
    }

    #[test]
    fn redis_answers_are_integers_or_bulk_strings() {
        let body = |bytes: &'static str| {
            let body = resp(bytes.as_bytes()).map_err(|error| error.to_string());
            body.map(|body| body.map(|body| &bytes[body]))
        };
        assert_eq!(body(":42\r\n"), Ok(Some("42")));
        assert_eq!(body("$2\r\n"), Ok(None));
        assert_eq!(body("$2\r\n42\r\n"), Ok(Some("42")));
        assert!(body("-ERR unknown command\r\n").is_err());
    }
}
