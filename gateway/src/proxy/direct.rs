//! Requests for apps that need one message each way: pingora has read the head and writes the answer, and in between
//! nothing flows both ways at once, so it needs neither the two tasks nor the channels that pingora has for that.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::Method;
use http::header::TRANSFER_ENCODING;
use pingora_core::protocols::http::v1::client::HttpSession;
use pingora_core::protocols::l4::stream::Stream;
use pingora_core::upstreams::peer::PeerOptions;
use pingora_core::{Error, ErrorType, OrErr, Result, RetryType};
use pingora_http::ResponseHeader;
use pingora_proxy::Session;
// A timer only for what has to wait. Exact to the ms, unlike pingora's cheaper ones: clients are told of deadlines.
use pingora_timeout::tokio_timeout as timeout;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::answers::to_client;
use super::bounds::{DEADLINE_OVER, while_there};
use super::letter::Letter;
use super::{Aim, Proxy, Request};
use crate::link::forward::body_bytes;
use crate::upstream::answer::{self, PlainAnswer, Received};

/// What is read at once.
const READ_BYTES: usize = 8 << 10;

/// And of a long body.
const READ_BYTES_MAX: usize = 64 << 10;

/// An answer whose head is longer is pingora's.
const HEAD_BYTES_MAX: usize = 64 << 10;

/// How long the phases of one try may take.
#[derive(Debug, Clone, Copy)]
struct Patience {
    connect: Duration,
    read: Duration,
    write: Duration,
    idle: Duration,
}

impl Patience {
    /// None longer than what is left until the deadline.
    fn new(options: &PeerOptions, request: &Request) -> Self {
        let left = request.time_left().unwrap_or(Duration::MAX);
        let at_most = |wait: Option<Duration>| wait.map_or(left, |wait| wait.min(left));
        Self {
            connect: at_most(options.connection_timeout),
            read: at_most(options.read_timeout),
            write: at_most(options.write_timeout),
            idle: options.idle_timeout.unwrap_or(Duration::MAX),
        }
    }
}

/// The beginning of an answer.
enum Beginning {
    /// And all that was received.
    Plain(Box<PlainAnswer>, Bytes),
    /// What was received of any other.
    Other(Bytes),
}

impl Proxy {
    /// Answers a request for an app, if it can go without pingora's own way. `false`: it cannot.
    pub(super) async fn answer_direct(
        &self,
        session: &mut Session,
        request: &mut Request,
    ) -> Result<bool> {
        let Some(Aim::App(app)) = &request.aim else {
            return Ok(false);
        };
        let head = session.as_ref().req_header();
        let possible = app.upstream.is_plain_http_1()
            && !request.finish.compress
            && !request.cached.is_keyed()
            && !matches!(head.method, Method::HEAD | Method::CONNECT)
            && Letter::new(session, app).is_some();
        let empty = session.downstream_session.is_body_empty();
        let bytes = body_bytes(&session.req_header().headers, empty);
        let Some(bytes) = bytes.filter(|_| possible) else {
            return Ok(false);
        };
        let Some(body) = self.prepare(session, request, bytes).await? else {
            return Ok(true);
        };
        loop {
            match self.try_direct(session, request, &body).await {
                Ok(()) => return Ok(true),
                Err(error) if error.retry() => {}
                Err(error) => return Err(error),
            }
        }
    }

    async fn try_direct(
        &self,
        session: &mut Session,
        request: &mut Request,
        body: &Bytes,
    ) -> Result<()> {
        self.begin_try(request).await;
        let Some(Aim::App(app)) = request.aim.as_mut() else {
            return Err(Error::explain(ErrorType::InternalError, "not routed"));
        };
        let choice = app.choose_server();
        let server = Arc::clone(&choice.picked.server);
        let letter = match &request.aim {
            Some(Aim::App(app)) => Letter::new(session, app),
            _ => None,
        };
        let Some(letter) = letter.map(|letter| letter.write(request, body)) else {
            return Err(Error::explain(ErrorType::InternalError, "not routed"));
        };
        let patience = Patience::new(&server.peer.options, request);
        let connection = match self.connections.get(server.address, patience.connect).await {
            Ok(connection) => connection,
            Err(error) => return Err(self.connect_failed(session, request, error)),
        };
        let mut stream = connection.stream;
        let begun = begin(session, &mut stream, letter, patience).await;
        let passed = match begun {
            Ok(Beginning::Plain(answer, received)) => {
                self.pass_plain(session, request, (stream, patience), *answer, received)
                    .await
            }
            Ok(Beginning::Other(received)) => {
                self.pass_other(session, request, (stream, patience), &received)
                    .await
            }
            Err(error) => Err(error),
        };
        passed.map_err(|error| self.try_failed(session, error, request, connection.is_reused))
    }

    /// The answer is `answer`, and what was received after its head.
    async fn pass_plain(
        &self,
        session: &mut Session,
        request: &mut Request,
        (stream, patience): (Stream, Patience),
        mut answer: PlainAnswer,
        mut received: Bytes,
    ) -> Result<()> {
        check_time(request)?;
        self.weigh_answer(session, &mut answer.head, request)?;
        self.finish_answer(session, &mut answer.head, request)?;
        received.advance(answer.head_bytes);
        let mut left = answer.body_bytes;
        if received.len() as u64 > left {
            // Whatever that is, nobody asked for it.
            answer.keeps = false;
            received.truncate(usize::try_from(left).unwrap_or(usize::MAX));
        }
        left -= received.len() as u64;
        let mut stream = Some(stream);
        let keep = |stream: &mut Option<Stream>| {
            if let Some(stream) = stream.take().filter(|_| answer.keeps) {
                self.keep(request, stream, patience);
            }
        };
        if left == 0 {
            keep(&mut stream);
        }
        let empty = answer.body_bytes == 0;
        to_client(session.write_response_header(Box::new(answer.head), empty)).await?;
        let mut part = received;
        loop {
            if !empty && (!part.is_empty() || left == 0) {
                to_client(session.write_response_body(Some(part), left == 0)).await?;
            }
            let Some(open) = &mut stream else {
                return Ok(());
            };
            part = while_there(session, read_part(open, left, patience.read)).await?;
            // What came with the head goes with it.
            check_time(request)?;
            left -= part.len() as u64;
            if left == 0 {
                keep(&mut stream);
            }
        }
    }

    /// Keeps a connection to the server of this request for another.
    fn keep(&self, request: &Request, stream: Stream, patience: Patience) {
        if let Some(Aim::App(app)) = &request.aim
            && let Some(choice) = &app.choice
        {
            let server = choice.picked.server.address;
            self.connections.put(server, stream, patience.idle);
        }
    }

    /// The answer is what pingora makes of it.
    async fn pass_other(
        &self,
        session: &mut Session,
        request: &mut Request,
        (mut stream, patience): (Stream, Patience),
        received: &[u8],
    ) -> Result<()> {
        stream.rewind(received);
        let mut answer = HttpSession::new(Box::new(stream));
        answer.read_timeout = Some(patience.read);
        loop {
            let head = self.pass_head(session, request, &mut answer).await?;
            if !head.is_informational() {
                break;
            }
        }
        while !answer.is_body_done() {
            let part = while_there(session, into_up(answer.read_body_bytes())).await?;
            check_time(request)?;
            if part.is_some() {
                to_client(session.write_response_body(part, false)).await?;
            }
        }
        to_client(session.write_response_body(None, true)).await?;
        answer.respect_keepalive();
        let stream = answer.reuse().await.map(|stream| stream.into_any());
        if let Some(Ok(stream)) = stream.map(|stream| stream.downcast::<Stream>()) {
            self.keep(request, *stream, patience);
        }
        Ok(())
    }

    /// Passes an interim answer, or the head of the final one.
    async fn pass_head(
        &self,
        session: &mut Session,
        request: &mut Request,
        answer: &mut HttpSession,
    ) -> Result<http::StatusCode> {
        while_there(session, into_up(answer.read_response())).await?;
        check_time(request)?;
        let senseless = |what: &'static str| Error::explain(ErrorType::InvalidHTTPHeader, what);
        let head = answer.resp_header();
        let head = head.ok_or_else(|| senseless("no head").into_up())?;
        let mut head: ResponseHeader = head.clone();
        let status = head.status;
        if status == http::StatusCode::SWITCHING_PROTOCOLS {
            return Err(senseless("an upgrade that nobody asked for").into_up());
        }
        for name in ["connection", "keep-alive", "proxy-connection"] {
            head.remove_header(name);
        }
        self.weigh_answer(session, &mut head, request)?;
        let ended = !status.is_informational() && answer.is_body_done();
        let framed = ended || status.is_informational();
        let lengths = [TRANSFER_ENCODING, http::header::CONTENT_LENGTH];
        if !framed && !lengths.iter().any(|name| head.headers.contains_key(name)) {
            head.insert_header(TRANSFER_ENCODING, "chunked")?;
        }
        head.set_version(http::Version::HTTP_11);
        self.finish_answer(session, &mut head, request)?;
        to_client(session.write_response_header(Box::new(head), ended)).await?;
        Ok(status)
    }
}

/// Sends the request, and waits for the head of the answer while the client is there.
async fn begin(
    session: &mut Session,
    stream: &mut Stream,
    letter: BytesMut,
    patience: Patience,
) -> Result<Beginning> {
    let sending = timeout(patience.write, stream.write_all(&letter));
    let slow = |_| Error::explain(ErrorType::WriteTimedout, "a request").into_up();
    sending
        .await
        .map_err(slow)?
        .map_err(|error| stale(ErrorType::WriteError, Some(error)))?;
    drop(letter);
    let reading = timeout(patience.read, read_head(stream));
    while_there(session, async {
        let slow = |_| Error::explain(ErrorType::ReadTimedout, "the head of an answer").into_up();
        reading.await.map_err(slow)?
    })
    .await
}

/// What says nothing of a server, if its connection had served requests before.
fn stale(kind: ErrorType, error: Option<std::io::Error>) -> Box<Error> {
    let mut made = match error {
        Some(error) => Error::because(kind, "a connection to an app", error),
        None => Error::explain(kind, "a connection to an app"),
    };
    made.retry = RetryType::ReusedOnly;
    made.into_up()
}

async fn read_head(stream: &mut Stream) -> Result<Beginning> {
    let mut buffer = BytesMut::with_capacity(READ_BYTES);
    loop {
        let nothing_yet = buffer.is_empty();
        let failed = |error: Option<std::io::Error>| match (nothing_yet, error) {
            (true, None) => stale(ErrorType::ConnectionClosed, None),
            (true, Some(error)) => stale(ErrorType::ReadError, Some(error)),
            (false, None) => Error::explain(ErrorType::ConnectionClosed, "within a head").into_up(),
            (false, Some(error)) => {
                Error::because(ErrorType::ReadError, "within a head", error).into_up()
            }
        };
        match stream.read_buf(&mut buffer).await {
            Ok(0) => return Err(failed(None)),
            Ok(_) => {}
            Err(error) => return Err(failed(Some(error))),
        }
        let received = buffer.freeze();
        match answer::read(&received) {
            Received::Plain(answer) => return Ok(Beginning::Plain(answer, received)),
            Received::Part if received.len() < HEAD_BYTES_MAX => {
                buffer = BytesMut::from(received);
                buffer.reserve(READ_BYTES);
            }
            Received::Part | Received::Other => return Ok(Beginning::Other(received)),
        }
    }
}

/// Some of the `left` bytes of a body.
async fn read_part(stream: &mut Stream, left: u64, wait: Duration) -> Result<Bytes> {
    let most = usize::try_from(left).map_or(READ_BYTES_MAX, |left| left.min(READ_BYTES_MAX));
    let mut part = BytesMut::with_capacity(most).limit(most);
    let reading = timeout(wait, stream.read_buf(&mut part));
    let slow = |_| Error::explain(ErrorType::ReadTimedout, "the body of an answer").into_up();
    let read = reading.await.map_err(slow)?;
    let read = read.or_err(ErrorType::ReadError, "the body of an answer");
    match read.map_err(Error::into_up)? {
        0 => Err(Error::explain(ErrorType::ConnectionClosed, "within a body").into_up()),
        _ => Ok(part.into_inner().freeze()),
    }
}

fn check_time(request: &Request) -> Result<()> {
    match request.is_overdue() {
        false => Ok(()),
        true => Err(Error::new(DEADLINE_OVER)),
    }
}

async fn into_up<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    work.await.map_err(Error::into_up)
}
