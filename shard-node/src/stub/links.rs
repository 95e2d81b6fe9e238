//! Links of one worker to the others ([`protocol::link`]): many calls at once on one connection, which arrive
//! in the order in which they were made.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use http::HeaderValue;
use ops::Causes;
use protocol::limits::RPC_BODY_BYTES_MAX;
use protocol::link::{
    self, Ask, HEADER_BYTES, Header, Hello, Kind, Response, Routed, STREAMS_MAX, Verdict,
    WELCOME_BYTES, Welcome,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;
use tracing::debug;

use super::connections::{CONNECT_MAX, SendError};
use crate::worker::or_abort;

/// Bytes that are read at once, if they are there.
const READ_BYTES: usize = 64 << 10;

/// What a worker that reads nothing may keep waiting here.
const UNWRITTEN_BYTES_MAX: usize = 16 << 20;

/// A worker that is told of a call's end says so at once. One that is silent for so long is gone.
const SILENCE_MAX: Duration = Duration::from_secs(10);

/// A status and a body.
type Answer = Result<(u16, Vec<u8>), SendError>;

/// The links of one worker, by address; each made with its first call, and again after it ended.
pub(super) struct Links {
    token: Option<HeaderValue>,
    peers: RefCell<HashMap<String, Rc<Link>>>,
}

impl Links {
    pub(super) fn new(token: Option<HeaderValue>) -> Self {
        Self {
            token,
            peers: RefCell::default(),
        }
    }

    /// Makes a call. It has its place among the others when this was polled once. `None` if it is too large
    /// for a link: nothing was sent.
    pub(super) async fn call(
        &self,
        address: &str,
        routed: &Routed<'_>,
        method: &str,
        body: &[u8],
    ) -> Option<Answer> {
        if body.len() > link::REQUEST_BODY_BYTES_MAX {
            return None;
        }
        let link = self.to(address);
        let (reply, answer) = oneshot::channel();
        let stream = match link.begin(routed, method, body, reply) {
            Begun::On(stream) => stream,
            Begun::Full => return Some(Err(SendError::Full(address.to_owned()))),
            Begun::TooLarge => return None,
        };
        // Whoever stops waiting tells the worker.
        let _cancel = Cancel(&link, stream);
        let broken = |_| Err(SendError::Broken(address.to_owned()));
        Some(answer.await.unwrap_or_else(broken))
    }

    fn to(&self, address: &str) -> Rc<Link> {
        let mut peers = self.peers.borrow_mut();
        if let Some(link) = peers.get(address)
            && !link.closed.get()
        {
            return Rc::clone(link);
        }
        let link = Rc::new(Link::new(address));
        let driven = Rc::clone(&link).drive(self.token.clone());
        tokio::task::spawn_local(or_abort(driven));
        peers.insert(address.to_owned(), Rc::clone(&link));
        link
    }
}

struct Link {
    address: String,
    /// It takes no more calls.
    closed: Cell<bool>,
    state: RefCell<State>,
    /// The writer has work.
    work: Notify,
    /// Since when the worker owes a word; `None` when it has said something since.
    owes: Cell<Option<Instant>>,
    owing: Notify,
}

#[derive(Default)]
struct State {
    /// Frames that wait to be written.
    unwritten: Vec<u8>,
    open: HashMap<u32, Open>,
    /// Numbers of streams that were used, and are free again.
    free: Vec<u32>,
    used: u32,
    /// Calls begun.
    begun: u64,
    /// Of them, how many may have left.
    left: u64,
}

/// A call that has no answer yet.
struct Open {
    /// Which of all calls of this link it is, from 1.
    number: u64,
    /// `None` when nobody waits any more.
    reply: Option<oneshot::Sender<Answer>>,
    /// What came of the answer.
    answer: Option<(u16, Vec<u8>)>,
}

enum Begun {
    On(u32),
    Full,
    TooLarge,
}

struct Cancel<'a>(&'a Link, u32);

impl Drop for Cancel<'_> {
    fn drop(&mut self) {
        self.0.cancel(self.1);
    }
}

impl Link {
    fn new(address: &str) -> Self {
        Self {
            address: address.to_owned(),
            closed: Cell::new(false),
            state: RefCell::default(),
            work: Notify::new(),
            owes: Cell::new(None),
            owing: Notify::new(),
        }
    }

    fn begin(
        &self,
        routed: &Routed<'_>,
        method: &str,
        body: &[u8],
        reply: oneshot::Sender<Answer>,
    ) -> Begun {
        let mut state = self.state.borrow_mut();
        let full = state.free.is_empty() && state.used == STREAMS_MAX;
        if full || state.unwritten.len() > UNWRITTEN_BYTES_MAX {
            return Begun::Full;
        }
        let stream = state.free.last().copied().unwrap_or(state.used);
        // Objects may call what only the system's own code may.
        let ask = Ask::Own { method };
        let none = std::iter::empty();
        if !link::request(&mut state.unwritten, stream, routed, &ask, none, body) {
            return Begun::TooLarge;
        }
        if state.free.pop().is_none() {
            state.used += 1;
        }
        state.begun += 1;
        let open = Open {
            number: state.begun,
            reply: Some(reply),
            answer: None,
        };
        state.open.insert(stream, open);
        self.work.notify_one();
        Begun::On(stream)
    }

    /// Nobody waits for this answer any more, if it has not come.
    fn cancel(&self, stream: u32) {
        let mut state = self.state.borrow_mut();
        let State {
            open, unwritten, ..
        } = &mut *state;
        // The number may be another call's by now, which is waited for.
        let Some(open) = open.get_mut(&stream) else {
            return;
        };
        let closed = open.reply.as_ref().is_some_and(oneshot::Sender::is_closed);
        if !closed {
            return;
        }
        open.reply = None;
        link::frame(unwritten, Kind::Cancel, false, stream, |_| {});
        if self.owes.get().is_none() {
            self.owes.set(Some(Instant::now()));
            self.owing.notify_one();
        }
        self.work.notify_one();
    }

    async fn drive(self: Rc<Self>, token: Option<HeaderValue>) {
        if let Err(error) = self.run(token).await {
            debug!(address = self.address, error = %Causes(&error), "a link to a worker ended");
        }
        self.closed.set(true);
        let mut state = self.state.borrow_mut();
        let left = state.left;
        for (_, open) in state.open.drain() {
            let error = match open.number > left {
                true => SendError::NotSent(self.address.clone()),
                false => SendError::Broken(self.address.clone()),
            };
            answer(open.reply, Err(error));
        }
    }

    async fn run(&self, token: Option<HeaderValue>) -> io::Result<()> {
        let made = tokio::time::timeout(CONNECT_MAX, self.connect(token));
        let (reading, writing) = made.await.map_err(|_| io::ErrorKind::TimedOut)??;
        tokio::select! {
            // First, so that a link that has ended takes nothing more.
            biased;
            read = self.read(reading) => read,
            written = self.write(writing) => written,
            () = self.silence() => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    async fn connect(
        &self,
        token: Option<HeaderValue>,
    ) -> io::Result<(OwnedReadHalf, OwnedWriteHalf)> {
        let mut stream: TcpStream = ops::exchange::connect(self.address.as_str()).await?;
        let token = token.as_ref().map_or(&b""[..], HeaderValue::as_bytes);
        let hello = Hello::write(token).map_err(io::Error::other)?;
        stream.write_all(&hello).await?;
        let mut welcome = [0; WELCOME_BYTES];
        stream.read_exact(&mut welcome).await?;
        match Welcome::read(&welcome).map_err(io::Error::other)?.verdict {
            Verdict::Accepted => Ok(stream.into_split()),
            refused => Err(io::Error::other(format!("it was refused: {refused:?}"))),
        }
    }

    async fn write(&self, mut writing: OwnedWriteHalf) -> io::Result<()> {
        let mut frames = Vec::new();
        loop {
            {
                let mut state = self.state.borrow_mut();
                std::mem::swap(&mut frames, &mut state.unwritten);
                // From here on they may arrive.
                state.left = state.begun;
            }
            if frames.is_empty() {
                self.work.notified().await;
                continue;
            }
            writing.write_all(&frames).await?;
            frames.clear();
            frames.shrink_to(READ_BYTES);
        }
    }

    /// Until the worker closes the link, or has answered the last call that it took.
    async fn read(&self, mut reading: OwnedReadHalf) -> io::Result<()> {
        let mut buffer = BytesMut::with_capacity(READ_BYTES);
        loop {
            buffer.reserve(READ_BYTES);
            if reading.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
            self.owes.set(None);
            while let Some(header) = Header::read(&buffer).map_err(io::Error::other)? {
                let bytes = HEADER_BYTES + header.payload_bytes;
                if buffer.len() < bytes {
                    break;
                }
                self.take(&header, &buffer[HEADER_BYTES..bytes])?;
                buffer.advance(bytes);
            }
            if self.closed.get() && self.state.borrow().open.is_empty() {
                return Ok(());
            }
        }
    }

    fn take(&self, header: &Header, payload: &[u8]) -> io::Result<()> {
        if header.kind == Kind::Retire {
            let taken = link::read_retire(payload).map_err(io::Error::other)?;
            self.retire(taken);
            return Ok(());
        }
        let mut state = self.state.borrow_mut();
        let State {
            open, unwritten, ..
        } = &mut *state;
        let stream = header.stream;
        let call = open.get_mut(&stream);
        let call = call.ok_or_else(|| io::Error::other(format!("stream {stream} is not open")))?;
        match header.kind {
            Kind::Response => {
                let response = Response::read(payload).map_err(io::Error::other)?;
                call.answer = Some((response.status, response.body.to_vec()));
            }
            Kind::Data => {
                if let Some((_, body)) = &mut call.answer {
                    body.extend_from_slice(payload);
                    if body.len() > RPC_BODY_BYTES_MAX {
                        return Err(io::Error::other("an answer is too large"));
                    }
                }
                if !header.end {
                    let bytes = u32::try_from(payload.len()).unwrap_or(u32::MAX);
                    link::credit(unwritten, stream, bytes);
                    self.work.notify_one();
                }
            }
            Kind::Broken => call.answer = None,
            other => return Err(io::Error::other(format!("{other:?} is not for this side"))),
        }
        if header.end || header.kind == Kind::Broken {
            let ended = open.remove(&stream);
            state.free.push(stream);
            if let Some(ended) = ended {
                let broken = || SendError::Broken(self.address.clone());
                answer(ended.reply, ended.answer.ok_or_else(broken));
            }
        }
        Ok(())
    }

    /// The worker takes no more calls than so many: nothing ran of the others.
    fn retire(&self, taken: u64) {
        self.closed.set(true);
        let mut state = self.state.borrow_mut();
        let refused = state.open.extract_if(|_, open| open.number > taken);
        for (_, open) in refused {
            answer(open.reply, Err(SendError::NotSent(self.address.clone())));
        }
    }

    /// Ends when the worker has owed a word for too long.
    async fn silence(&self) {
        loop {
            match self.owes.get() {
                None => self.owing.notified().await,
                Some(since) => {
                    tokio::time::sleep_until(since + SILENCE_MAX).await;
                    if self.owes.get() == Some(since) {
                        return;
                    }
                }
            }
        }
    }
}

fn answer(reply: Option<oneshot::Sender<Answer>>, answer: Answer) {
    if let Some(reply) = reply {
        // A closed channel is a caller that has stopped waiting.
        drop(reply.send(answer));
    }
}
