//! The gateway's side of a link ([`protocol::link`]): many requests at once on one connection to a worker.
//!
//! Each thread has one link per worker. What its requests want to send gathers in one buffer while other
//! tasks run, and is written when all that were ready have run. One read takes whatever answers are there.

pub(crate) mod forward;
mod peers;

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use metrics::Gauge;
use ops::Causes;
use protocol::link::{self, HEADER_BYTES, Header, Kind, LinkFault, WINDOW_BYTES};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Notify;
use tokio::time::Instant;
use tracing::debug;

pub use peers::{ConnectError, Links, Way};

/// Bytes that are read at once, if they are there.
const READ_BYTES: usize = 64 << 10;

/// A buffer that grew beyond this is made smaller when it is empty.
const KEPT_BYTES_MAX: usize = 1 << 20;

/// What a worker that reads nothing may keep waiting here.
const UNWRITTEN_BYTES_MAX: usize = 16 << 20;

/// Silence is noticed late by at most this part of `silence_max`.
const SILENCE_LOOKS: u32 = 8;
const SILENCE_LOOK_MIN: Duration = Duration::from_millis(1);

/// Why an exchange has no answer, or not all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ExchangeError {
    /// The worker did not take the request, and will not. It may go elsewhere, whatever its method.
    #[error("the link to the worker ended before the request was on it")]
    NotSent,
    /// The request may have had its effect.
    #[error("the link to the worker broke")]
    Broken,
    /// The worker said that the body ends early.
    #[error("the answer broke off")]
    BrokenOff,
    /// The worker owed bytes for too long.
    #[error("the worker was silent")]
    TimedOut,
}

/// Why a request cannot begin on this link; it may on another, or by HTTP/1.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The link takes no more requests.
    Closed,
    /// Too many streams are open, the worker does not read, or the head is too large.
    TooMuch,
}

#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("the link broke")]
    Io(#[from] io::Error),
    #[error("what the worker sent is no link")]
    Fault(#[from] LinkFault),
    #[error("the worker spoke of stream {0}, which is not open")]
    Stream(u32),
    #[error("the worker sent more than the window of stream {0} allows")]
    Window(u32),
}

/// Counts a link while it is open, however it ends.
struct LinkCount(Gauge);

impl LinkCount {
    fn of(links: &Gauge) -> Self {
        links.increment(1);
        Self(links.clone())
    }
}

impl Drop for LinkCount {
    fn drop(&mut self) {
        self.0.decrement(1);
    }
}

/// One connection to a worker, shared by the requests of one thread.
pub struct Link {
    state: Mutex<State>,
    /// The writer has work.
    work: Notify,
}

struct State {
    /// Frames that wait to be written.
    unwritten: Vec<u8>,
    streams: Vec<Stream>,
    /// Numbers that are free.
    free: Vec<u32>,
    streams_max: u32,
    /// Requests begun so far, and how many of them the kernel may have got bytes of.
    begun: u64,
    handed_over: u64,
    standing: Standing,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    Open,
    /// The worker takes no more requests; when all are answered the connection closes.
    Retired,
    Broken,
}

/// One request and what came of its answer. Its number is free when the worker has ended it and nobody
/// asks for it any more.
#[derive(Default)]
struct Stream {
    /// Which request of the link this is, counted from 0.
    number: u64,
    in_use: bool,
    /// An [`Exchange`] still asks for it.
    wanted: bool,
    /// The worker ended it, or nothing more can come.
    ended: bool,
    failure: Option<ExchangeError>,
    head: Option<Bytes>,
    data: VecDeque<Bytes>,
    /// Bytes in `data`, and those taken from it that were not given back as credit.
    held: u32,
    /// When the worker last said anything, or began to owe something.
    since: Option<Instant>,
    waker: Option<Waker>,
}

impl Link {
    /// Takes over a connection whose handshake is done.
    fn start(
        stream: TcpStream,
        streams_max: u32,
        silence_max: Duration,
        count: LinkCount,
    ) -> Arc<Self> {
        let link = Arc::new(Self {
            state: Mutex::new(State {
                unwritten: Vec::new(),
                streams: Vec::new(),
                free: Vec::new(),
                streams_max,
                begun: 0,
                handed_over: 0,
                standing: Standing::Open,
            }),
            work: Notify::new(),
        });
        tokio::spawn(Arc::clone(&link).run(stream, silence_max, count));
        link
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // One thread uses a link; nothing panics while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_open(&self) -> bool {
        self.lock().standing == Standing::Open
    }

    /// Begins a request: `write` appends its frame for the stream it is given, or says that it does not fit.
    pub fn begin(
        self: &Arc<Self>,
        write: impl FnOnce(&mut Vec<u8>, u32) -> bool,
    ) -> Result<Exchange, Refused> {
        let mut state = self.lock();
        let state = &mut *state;
        if state.standing != Standing::Open {
            return Err(Refused::Closed);
        }
        let number = match state.free.last() {
            Some(number) => *number,
            None => u32::try_from(state.streams.len()).unwrap_or(u32::MAX),
        };
        let full = number >= state.streams_max || state.unwritten.len() > UNWRITTEN_BYTES_MAX;
        if full || !write(&mut state.unwritten, number) {
            return Err(Refused::TooMuch);
        }
        if state.free.pop().is_none() {
            state.streams.push(Stream::default());
        }
        let stream = &mut state.streams[number as usize];
        stream.number = state.begun;
        stream.in_use = true;
        stream.wanted = true;
        stream.since = Some(Instant::now());
        state.begun += 1;
        self.work.notify_one();
        Ok(Exchange {
            link: Arc::clone(self),
            stream: number,
            taken: 0,
        })
    }

    /// `_count` counts the link while it is open.
    async fn run(self: Arc<Self>, stream: TcpStream, silence_max: Duration, _count: LinkCount) {
        let (reading, writing) = stream.into_split();
        let ended = tokio::select! {
            read = self.read(reading) => read,
            written = self.write(writing) => written.map_err(LinkError::from),
            () = self.watch(silence_max) => Ok(()),
        };
        if let Err(error) = ended {
            debug!(error = %Causes(&error), "a link ended");
        }
        self.lock().end();
    }

    async fn read(&self, mut reading: OwnedReadHalf) -> Result<(), LinkError> {
        let mut buffer = BytesMut::with_capacity(READ_BYTES);
        let mut wakers = Vec::new();
        loop {
            buffer.reserve(READ_BYTES);
            if reading.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
            let done = self.lock().take_all(&mut buffer, &mut wakers);
            wakers.drain(..).for_each(Waker::wake);
            done?;
            // Something may be owed now that was not: credit, or the end of a retired link.
            if self.lock().writer_has_work() {
                self.work.notify_one();
            }
        }
    }

    async fn write(&self, mut writing: OwnedWriteHalf) -> io::Result<()> {
        let mut frames = Vec::new();
        loop {
            let finished = {
                let mut state = self.lock();
                std::mem::swap(&mut frames, &mut state.unwritten);
                state.handed_over = state.begun;
                state.is_finished()
            };
            if !frames.is_empty() {
                writing.write_all(&frames).await?;
                frames.clear();
                frames.shrink_to(KEPT_BYTES_MAX);
            } else if finished {
                return Ok(());
            } else {
                self.work.notified().await;
            }
        }
    }

    /// Gives up streams whose worker owes bytes for longer than `silence_max`, for ever.
    async fn watch(&self, silence_max: Duration) {
        let every = (silence_max / SILENCE_LOOKS).max(SILENCE_LOOK_MIN);
        let mut looks = tokio::time::interval(every);
        loop {
            let now = looks.tick().await;
            let mut state = self.lock();
            let state = &mut *state;
            let mut wakers = Vec::new();
            for (number, stream) in (0..).zip(&mut state.streams) {
                let silent = |since: Instant| now.saturating_duration_since(since) >= silence_max;
                if stream.in_use && stream.is_owed() && stream.since.is_some_and(silent) {
                    stream.failure = Some(ExchangeError::TimedOut);
                    wakers.extend(stream.waker.take());
                    link::frame(&mut state.unwritten, Kind::Cancel, false, number, |_| {});
                    self.work.notify_one();
                }
            }
            wakers.into_iter().for_each(Waker::wake);
        }
    }
}

impl State {
    fn writer_has_work(&self) -> bool {
        !self.unwritten.is_empty() || self.is_finished()
    }

    /// Retired, and nothing is under way.
    fn is_finished(&self) -> bool {
        self.standing == Standing::Retired && self.free.len() == self.streams.len()
    }

    /// Takes all frames that are whole.
    fn take_all(
        &mut self,
        buffer: &mut BytesMut,
        wakers: &mut Vec<Waker>,
    ) -> Result<(), LinkError> {
        while let Some(header) = Header::read(buffer)? {
            let bytes = HEADER_BYTES + header.payload_bytes;
            if buffer.len() < bytes {
                break;
            }
            self.take(&header, &buffer[HEADER_BYTES..bytes], wakers)?;
            buffer.advance(bytes);
        }
        Ok(())
    }

    fn take(
        &mut self,
        header: &Header,
        payload: &[u8],
        wakers: &mut Vec<Waker>,
    ) -> Result<(), LinkError> {
        match header.kind {
            Kind::Retire => {
                let taken = link::read_retire(payload)?;
                self.retire(taken, wakers);
                return Ok(());
            }
            Kind::Response | Kind::Data | Kind::Broken => {}
            Kind::Request | Kind::Credit | Kind::Cancel => {
                return Err(LinkFault::Kind(header.kind as u8).into());
            }
        }
        let stream = self
            .streams
            .get_mut(header.stream as usize)
            .filter(|stream| stream.in_use && !stream.ended)
            .ok_or(LinkError::Stream(header.stream))?;
        match header.kind {
            Kind::Broken => stream.fail(ExchangeError::BrokenOff),
            Kind::Response if stream.head.is_none() => {
                // A slow client holds on to its own bytes, not to all that was read with them.
                stream.head = Some(Bytes::copy_from_slice(payload));
            }
            Kind::Data => {
                stream.held += u32::try_from(payload.len()).unwrap_or(u32::MAX);
                if stream.held > WINDOW_BYTES {
                    return Err(LinkError::Window(header.stream));
                }
                if stream.wanted && !payload.is_empty() {
                    stream.data.push_back(Bytes::copy_from_slice(payload));
                }
            }
            _ => return Err(LinkError::Stream(header.stream)),
        }
        stream.since = Some(Instant::now());
        wakers.extend(stream.waker.take());
        if header.end || header.kind == Kind::Broken {
            stream.ended = true;
            if !stream.wanted {
                self.release(header.stream);
            }
        }
        Ok(())
    }

    /// The worker took so many requests; the later ones are nobody's.
    fn retire(&mut self, taken: u64, wakers: &mut Vec<Waker>) {
        self.standing = Standing::Retired;
        for number in 0..u32::try_from(self.streams.len()).unwrap_or(u32::MAX) {
            let stream = &mut self.streams[number as usize];
            if stream.in_use && stream.number >= taken {
                stream.fail(ExchangeError::NotSent);
                stream.ended = true;
                wakers.extend(stream.waker.take());
                if !stream.wanted {
                    self.release(number);
                }
            }
        }
    }

    /// Nothing more will come.
    fn end(&mut self) {
        self.standing = Standing::Broken;
        for stream in &mut self.streams {
            if stream.in_use && !stream.ended {
                stream.fail(match stream.number < self.handed_over {
                    true => ExchangeError::Broken,
                    false => ExchangeError::NotSent,
                });
                stream.ended = true;
            }
            if let Some(waker) = stream.waker.take() {
                waker.wake();
            }
        }
    }

    fn release(&mut self, number: u32) {
        let stream = &mut self.streams[number as usize];
        // A long answer's queue is not kept for short ones.
        *stream = Stream::default();
        self.free.push(number);
    }
}

impl Stream {
    fn fail(&mut self, failure: ExchangeError) {
        self.failure.get_or_insert(failure);
    }

    /// Whether the worker is the one to send next.
    fn is_owed(&self) -> bool {
        self.wanted
            && !self.ended
            && self.failure.is_none()
            && self.data.is_empty()
            && self.held < WINDOW_BYTES
    }
}

/// Takes bytes of a worker as a link would that has some streams open, in pieces of some length. Nothing but an
/// error may come of it.
pub(crate) fn take_any(bytes: &[u8], piece: usize) {
    let open = |number| Stream {
        number,
        in_use: true,
        wanted: number % 2 == 0,
        ..Stream::default()
    };
    let mut state = State {
        unwritten: Vec::new(),
        streams: (0..4).map(open).collect(),
        free: Vec::new(),
        streams_max: 4,
        begun: 4,
        handed_over: 2,
        standing: Standing::Open,
    };
    let (mut buffer, mut wakers) = (BytesMut::new(), Vec::new());
    for piece in bytes.chunks(piece.max(1)) {
        buffer.extend_from_slice(piece);
        if state.take_all(&mut buffer, &mut wakers).is_err() {
            break;
        }
    }
    assert!(
        state
            .streams
            .iter()
            .all(|stream| stream.held <= 2 * WINDOW_BYTES)
    );
    state.end();
    let open = state.streams.iter().filter(|stream| stream.in_use);
    assert!(
        open.clone().all(|stream| stream.ended),
        "nobody waits for ever"
    );
    assert_eq!(open.count() + state.free.len(), state.streams.len());
}

/// The head of an answer, with the beginning of its body.
#[derive(Debug)]
pub struct Head {
    payload: Bytes,
    /// The body is whole.
    pub is_end: bool,
}

impl Head {
    /// # Errors
    /// What the worker sent makes no sense.
    pub fn read(&self) -> Result<link::Response<'_>, LinkFault> {
        link::Response::read(&self.payload)
    }

    /// `part`, which came out of [`read`](Self::read), without a copy.
    pub(crate) fn bytes(&self, part: &[u8]) -> Bytes {
        self.payload.slice_ref(part)
    }
}

/// One request on its way. Dropping it cancels what has not ended.
pub struct Exchange {
    link: Arc<Link>,
    stream: u32,
    /// Bytes that were taken and not yet given back as credit.
    taken: u32,
}

impl Exchange {
    /// Waits for the head of the answer. To be asked once.
    pub async fn head(&mut self) -> Result<Head, ExchangeError> {
        poll_fn(|cx| {
            self.poll(cx, |stream| {
                let payload = stream.head.take()?;
                Some(Head {
                    payload,
                    is_end: stream.ended && stream.failure.is_none() && stream.data.is_empty(),
                })
            })
        })
        .await
    }

    /// The next bytes of the body after the head; `None` at its end.
    pub async fn data(&mut self) -> Result<Option<Bytes>, ExchangeError> {
        let data = poll_fn(|cx| {
            self.poll(cx, |stream| match stream.data.pop_front() {
                Some(data) => {
                    // From here on it is the worker again that others wait for.
                    stream.since = Some(Instant::now());
                    Some(Some(data))
                }
                None if stream.ended && stream.failure.is_none() => Some(None),
                None => None,
            })
        })
        .await?;
        if let Some(data) = &data {
            self.give_credit(data.len());
        }
        Ok(data)
    }

    fn poll<T>(
        &self,
        cx: &mut Context<'_>,
        take: impl FnOnce(&mut Stream) -> Option<T>,
    ) -> Poll<Result<T, ExchangeError>> {
        let mut state = self.link.lock();
        let stream = &mut state.streams[self.stream as usize];
        if let Some(taken) = take(stream) {
            return Poll::Ready(Ok(taken));
        }
        if let Some(failure) = stream.failure {
            return Poll::Ready(Err(failure));
        }
        match &mut stream.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        Poll::Pending
    }

    /// Half a window at a time, so that the worker need not wait and hears of it seldom.
    fn give_credit(&mut self, bytes: usize) {
        self.taken += u32::try_from(bytes).unwrap_or(u32::MAX);
        if self.taken < WINDOW_BYTES / 2 {
            return;
        }
        let mut state = self.link.lock();
        let state = &mut *state;
        let stream = &mut state.streams[self.stream as usize];
        stream.held -= self.taken.min(stream.held);
        stream.since = Some(Instant::now());
        if !stream.ended {
            link::credit(&mut state.unwritten, self.stream, self.taken);
            self.link.work.notify_one();
        }
        self.taken = 0;
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let mut state = self.link.lock();
        let state = &mut *state;
        let stream = &mut state.streams[self.stream as usize];
        if stream.ended {
            state.release(self.stream);
        } else {
            stream.wanted = false;
            stream.data = VecDeque::new();
            // Whoever was given up for its silence was told so already.
            if stream.failure.is_none() {
                link::frame(
                    &mut state.unwritten,
                    Kind::Cancel,
                    false,
                    self.stream,
                    |_| {},
                );
            }
        }
        if state.writer_has_work() {
            self.link.work.notify_one();
        }
    }
}
