//! The worker's side of a link ([`protocol::link`]): one connection, many requests at once.
//!
//! Each request is a task, so that a slow object holds up nobody. What they answer gathers in one buffer
//! while other tasks run, and is written when all that were ready have run: the answers that one group
//! commit released go out in one write.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use http::header::{CONNECTION, CONTENT_LENGTH, TE, TRAILER, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response};
use http_body_util::BodyExt;
use hyper::body::Body as _;
use protocol::link::{
    self, Ask, DATA_BYTES_MAX, HEADER_BYTES, HELLO_BYTES, Header, Hello, Kind, LinkFault,
    STREAMS_MAX, Verdict, WINDOW_BYTES, Welcome,
};
use protocol::{ErrorCode, Problem, ShardId, headers};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tracing::debug;

use crate::class::Body;
use crate::server::Server;
use crate::worker::{Order, or_abort};

/// A handshake that takes longer is no gateway's.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);

/// Answers that wait to be written. Above this, streams wait before they add more.
const UNWRITTEN_BYTES_MAX: usize = 256 << 10;

/// How long a link that has no more to say waits for its gateway to close it.
const LINGER_MAX: Duration = Duration::from_secs(2);

/// Bytes that are read at once, if they are there.
const READ_BYTES: usize = 64 << 10;

/// Why a link ended before its gateway closed it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    #[error("the handshake took longer than {HANDSHAKE_MAX:?}")]
    Handshake,
    #[error("the gateway was refused: {0:?}")]
    Refused(Verdict),
    #[error("the link broke")]
    Io(#[from] io::Error),
    #[error("what the gateway sent is no link")]
    Fault(#[from] LinkFault),
    #[error("stream {0} is in use already, or too high")]
    Stream(u32),
}

/// Serves one link until its gateway closes it or the worker stops and all is answered.
pub(crate) async fn serve(
    stream: TcpStream,
    server: Rc<Server>,
    order: watch::Receiver<Order>,
) -> Result<(), LinkError> {
    let mut stream = stream;
    tokio::time::timeout(HANDSHAKE_MAX, shake_hands(&mut stream, &server))
        .await
        .map_err(|_| LinkError::Handshake)??;
    let (reading, writing) = stream.into_split();
    let link = Rc::new(Link::default());
    let _ends = EndStreams(Rc::clone(&link));
    tokio::select! {
        read = link.read(reading, server) => read,
        written = link.write(writing) => Ok(written?),
        () = link.retire(order) => Ok(()),
    }
}

async fn shake_hands(stream: &mut TcpStream, server: &Server) -> Result<(), LinkError> {
    let mut hello = [0; HELLO_BYTES];
    stream.read_exact(&mut hello).await?;
    let hello = Hello::read(&hello)?;
    let mut token = vec![0; hello.token_bytes as usize];
    stream.read_exact(&mut token).await?;
    let verdict = match hello.version() {
        None => Verdict::Version,
        Some(_) if !server.check_token(&token) => Verdict::Token,
        Some(_) => Verdict::Accepted,
    };
    let accepted = verdict == Verdict::Accepted;
    let welcome = Welcome {
        version: hello.version().filter(|_| accepted).unwrap_or(0),
        verdict,
        streams_max: STREAMS_MAX,
    };
    stream.write_all(&welcome.write()).await?;
    match accepted {
        true => Ok(()),
        false => Err(LinkError::Refused(verdict)),
    }
}

/// What the tasks of one link share.
#[derive(Default)]
struct Link {
    /// Frames that wait to be written.
    unwritten: RefCell<Vec<u8>>,
    /// The writer has work.
    work: Notify,
    /// There is room in `unwritten` again.
    room: Notify,
    streams: RefCell<HashMap<u32, Open, xxhash_rust::xxh3::Xxh3DefaultBuilder>>,
    /// Requests taken so far.
    taken: Cell<u64>,
    retired: Cell<bool>,
}

/// A stream that has not ended.
struct Open {
    task: AbortHandle,
    window: Rc<Window>,
}

/// How much of a body may still be sent.
struct Window {
    bytes: Cell<u32>,
    grown: Notify,
}

impl Link {
    /// Takes frames until the gateway closes the link.
    async fn read(
        self: &Rc<Self>,
        mut reading: OwnedReadHalf,
        server: Rc<Server>,
    ) -> Result<(), LinkError> {
        let mut buffer = BytesMut::with_capacity(READ_BYTES);
        loop {
            buffer.reserve(READ_BYTES);
            if reading.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
            while let Some(header) = Header::read(&buffer)? {
                let bytes = HEADER_BYTES + header.payload_bytes;
                if buffer.len() < bytes {
                    break;
                }
                self.take(&header, &buffer[HEADER_BYTES..bytes], &server)?;
                buffer.advance(bytes);
            }
        }
    }

    fn take(
        self: &Rc<Self>,
        header: &Header,
        payload: &[u8],
        server: &Rc<Server>,
    ) -> Result<(), LinkError> {
        match header.kind {
            Kind::Request => self.begin(header.stream, payload, server),
            Kind::Credit => {
                let bytes = link::read_credit(payload)?;
                // The stream may have ended while this was on its way.
                if let Some(open) = self.streams.borrow().get(&header.stream) {
                    let window = &open.window;
                    window.bytes.set(window.bytes.get().saturating_add(bytes));
                    window.grown.notify_one();
                }
                Ok(())
            }
            Kind::Cancel => {
                let open = self.streams.borrow_mut().remove(&header.stream);
                if let Some(open) = open {
                    open.task.abort();
                    self.end_broken(header.stream, "cancelled");
                }
                Ok(())
            }
            Kind::Response | Kind::Data | Kind::Broken | Kind::Retire => {
                Err(LinkFault::Kind(header.kind as u8).into())
            }
        }
    }

    fn begin(
        self: &Rc<Self>,
        stream: u32,
        payload: &[u8],
        server: &Rc<Server>,
    ) -> Result<(), LinkError> {
        if self.retired.get() {
            // It was sent before the gateway read that no more are taken; it will go elsewhere.
            return Ok(());
        }
        let mut streams = self.streams.borrow_mut();
        if stream >= STREAMS_MAX || streams.contains_key(&stream) {
            return Err(LinkError::Stream(stream));
        }
        // A request that makes no sense ends the link: its reader cannot be trusted with the next.
        link::Request::read(payload)?;
        self.taken.set(self.taken.get() + 1);
        let window = Rc::new(Window {
            bytes: Cell::new(WINDOW_BYTES),
            grown: Notify::new(),
        });
        let (link, server) = (Rc::clone(self), Rc::clone(server));
        // A copy: whoever waits for long must not hold on to all that was read with it.
        let answered = link.answer(stream, payload.into(), server, Rc::clone(&window));
        // Boxed: it is large, and on its way to the task it would be copied several times.
        let answered = Box::pin(answered);
        let task = tokio::task::spawn_local(or_abort(answered)).abort_handle();
        streams.insert(stream, Open { task, window });
        Ok(())
    }

    async fn answer(
        self: Rc<Self>,
        stream: u32,
        payload: Box<[u8]>,
        server: Rc<Server>,
        window: Rc<Window>,
    ) {
        let Ok(request) = link::Request::read(&payload) else {
            return self.end_broken(stream, "the request is no request");
        };
        let of_head = matches!(request.ask, Ask::Fetch { method: "HEAD", .. });
        let response = server.serve_linked(&request).await;
        drop(payload);
        self.send(stream, response, of_head, &window).await;
    }

    /// Sends a response, however long it is.
    async fn send(&self, stream: u32, response: Response<Body>, of_head: bool, window: &Window) {
        self.make_room().await;
        let (mut head, body) = response.into_parts();
        let status = head.status.as_u16();
        if status < 200 {
            let refused = "an object answered 1xx to a request that offered no upgrade";
            return self.end_broken(stream, refused);
        }
        let headers = &mut head.headers;
        let exact = body.size_hint().exact();
        if of_head || matches!(status, 204 | 304) {
            // They tell the length that another answer would have (RFC 9110, 8.6), and have no body.
            if let Some(bytes) = exact.filter(|bytes| of_head && *bytes > 0) {
                headers.entry(CONTENT_LENGTH).or_insert(bytes.into());
            }
            self.send_head(stream, true, status, headers, &[]);
            return;
        }
        if let Some(bytes) = exact {
            headers.insert(CONTENT_LENGTH, bytes.into());
        }
        match body.whole() {
            Ok(whole) if whole.len() <= WINDOW_BYTES as usize => {
                self.send_head(stream, true, status, headers, &whole);
            }
            Ok(whole) => {
                if self.send_head(stream, false, status, headers, &[]) {
                    self.send_part(stream, whole, window).await;
                    self.end(stream);
                }
            }
            Err(body) => {
                if self.send_head(stream, false, status, headers, &[]) {
                    self.stream(stream, body, window).await;
                }
            }
        }
    }

    /// Sends a body as it comes.
    async fn stream(&self, stream: u32, mut body: Body, window: &Window) {
        loop {
            match body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.send_part(stream, data, window).await;
                    }
                }
                Some(Err(error)) => {
                    debug!(error = %error, "a body broke off");
                    return self.end_broken(stream, "the body broke off");
                }
                None => return self.end(stream),
            }
        }
    }

    /// `false` if the head is too large for a link, which ended the stream.
    fn send_head(
        &self,
        stream: u32,
        end: bool,
        status: u16,
        headers: &HeaderMap,
        body: &[u8],
    ) -> bool {
        let lines = headers
            .iter()
            .filter(|(name, _)| !concerns_connection(name));
        let lines = lines.map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()));
        let mut unwritten = self.unwritten.borrow_mut();
        let fits = link::response(&mut unwritten, stream, end, status, lines, body);
        drop(unwritten);
        match fits {
            true if end => self.forget(stream),
            true => self.work.notify_one(),
            false => self.end_broken(stream, "the head of the response is too large"),
        }
        fits
    }

    /// Sends bytes as the window and the buffer have room.
    async fn send_part(&self, stream: u32, mut data: Bytes, window: &Window) {
        while !data.is_empty() {
            while window.bytes.get() == 0 {
                window.grown.notified().await;
            }
            self.make_room().await;
            let bytes = data
                .len()
                .min(DATA_BYTES_MAX)
                .min(window.bytes.get() as usize);
            let part = data.split_to(bytes);
            let sent = u32::try_from(bytes).expect("at most DATA_BYTES_MAX");
            window.bytes.set(window.bytes.get() - sent);
            link::frame(
                &mut self.unwritten.borrow_mut(),
                Kind::Data,
                false,
                stream,
                |out| out.extend_from_slice(&part),
            );
            self.work.notify_one();
        }
    }

    fn end(&self, stream: u32) {
        let mut unwritten = self.unwritten.borrow_mut();
        link::frame(&mut unwritten, Kind::Data, true, stream, |_| {});
        drop(unwritten);
        self.forget(stream);
    }

    fn end_broken(&self, stream: u32, reason: &str) {
        let mut unwritten = self.unwritten.borrow_mut();
        link::frame(&mut unwritten, Kind::Broken, true, stream, |out| {
            out.extend_from_slice(reason.as_bytes());
        });
        drop(unwritten);
        self.forget(stream);
    }

    /// The stream's last frame is in the buffer: its number is free again.
    fn forget(&self, stream: u32) {
        self.streams.borrow_mut().remove(&stream);
        self.work.notify_one();
    }

    async fn make_room(&self) {
        let mut waited = false;
        while self.unwritten.borrow().len() > UNWRITTEN_BYTES_MAX {
            self.room.notified().await;
            waited = true;
        }
        if waited {
            // One notice wakes one stream; it tells the next.
            self.room.notify_one();
        }
    }

    async fn write(&self, mut writing: OwnedWriteHalf) -> io::Result<()> {
        let mut frames = Vec::new();
        loop {
            std::mem::swap(&mut frames, &mut *self.unwritten.borrow_mut());
            if !frames.is_empty() {
                self.room.notify_one();
                writing.write_all(&frames).await?;
                frames.clear();
                frames.shrink_to(2 * UNWRITTEN_BYTES_MAX);
            } else if self.retired.get() && self.streams.borrow().is_empty() {
                break;
            } else {
                self.work.notified().await;
            }
        }
        writing.shutdown().await?;
        // Closing now would reset the connection under what the gateway still sends, and could take away
        // answers that it has not read yet. It closes when it has.
        tokio::time::sleep(LINGER_MAX).await;
        Ok(())
    }

    /// When the worker stops: says that no more requests are taken.
    async fn retire(&self, mut order: watch::Receiver<Order>) {
        // Nobody to give orders is a node that ends.
        drop(order.wait_for(|order| *order == Order::Stop).await);
        self.retired.set(true);
        link::retire(&mut self.unwritten.borrow_mut(), self.taken.get());
        self.work.notify_one();
        std::future::pending().await
    }
}

/// Whoever closes a link waits for none of its answers.
struct EndStreams(Rc<Link>);

impl Drop for EndStreams {
    fn drop(&mut self) {
        for open in self.0.streams.borrow_mut().drain() {
            open.1.task.abort();
        }
    }
}

/// Headers about one connection are not for the next one (RFC 9110, 7.6.1).
fn concerns_connection(name: &HeaderName) -> bool {
    const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
    [
        CONNECTION,
        TRANSFER_ENCODING,
        UPGRADE,
        TE,
        TRAILER,
        KEEP_ALIVE,
    ]
    .contains(name)
}

/// The request that an object's `fetch` sees: the same as over HTTP/1.1.
pub(crate) fn to_http(
    request: &link::Request<'_>,
    shard: ShardId,
) -> Result<Request<Body>, Problem> {
    let Ask::Fetch {
        method,
        path_and_query,
    } = request.ask
    else {
        return Err(Problem::new(ErrorCode::Internal, "not a fetch"));
    };
    let malformed = |what: &str| Problem::bad_request(format!("the {what} is not valid HTTP"));
    let mut made = Request::new(Body::from(Bytes::copy_from_slice(request.body)));
    *made.method_mut() = Method::from_bytes(method.as_bytes()).map_err(|_| malformed("method"))?;
    *made.uri_mut() = path_and_query.parse().map_err(|_| malformed("path"))?;
    let map = made.headers_mut();
    let value = |text: &str| HeaderValue::from_str(text).map_err(|_| malformed("routing"));
    let routed = &request.routed;
    map.insert(headers::CLASS, value(routed.class)?);
    map.insert(headers::OBJECT, value(&routed.id.to_string())?);
    if let Some(name) = routed.name.and_then(|name| name.parse().ok()) {
        map.insert(headers::NAME, value(&headers::encode_name(&name))?);
    }
    map.insert(headers::SHARD, shard.0.into());
    map.insert(headers::EPOCH, routed.epoch.into());
    map.insert(headers::COLO, value(routed.colo)?);
    map.insert(headers::REQUEST, value(routed.request)?);
    map.insert(headers::TRACEPARENT, value(&routed.trace.to_string())?);
    for (name, text) in request.headers {
        let name = HeaderName::from_bytes(name).map_err(|_| malformed("name of a header"))?;
        let text = HeaderValue::from_bytes(text).map_err(|_| malformed("value of a header"))?;
        map.append(name, text);
    }
    Ok(made)
}
