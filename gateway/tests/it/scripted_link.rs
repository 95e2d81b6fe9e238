//! The worker's side of a link, as a scripted server speaks it: requests become what they are over
//! HTTP/1.1, and answers are written whole.

use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};
use protocol::headers;
use protocol::link::{
    self, Ask, HEADER_BYTES, HELLO_BYTES, Header, Hello, Kind, Request, STREAMS_MAX, Verdict,
    Welcome,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Mutex;

use crate::support::{Act, Scripted, Seen};

/// Serves a link until it ends, or the script says so.
pub(crate) async fn serve(mut stream: TcpStream, server: Scripted) {
    let mut hello = [0; HELLO_BYTES];
    stream.read_exact(&mut hello).await.unwrap();
    let hello = Hello::read(&hello).unwrap();
    let mut token = vec![0; hello.token_bytes as usize];
    stream.read_exact(&mut token).await.unwrap();
    let welcome = Welcome {
        version: 1,
        verdict: Verdict::Accepted,
        streams_max: STREAMS_MAX,
    };
    stream.write_all(&welcome.write()).await.unwrap();
    let (mut reading, writing) = stream.into_split();
    let writing = Arc::new(Mutex::new(writing));
    let mut buffer = BytesMut::new();
    let mut answers = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            read = reading.read_buf(&mut buffer) => if !matches!(read, Ok(1..)) { return },
            // A script that hangs up ends the link.
            Some(Ok(false)) = answers.join_next() => return,
        }
        while let Some(header) = Header::read(&buffer).unwrap() {
            if buffer.len() < HEADER_BYTES + header.payload_bytes {
                break;
            }
            buffer.advance(HEADER_BYTES);
            let payload = buffer.split_to(header.payload_bytes).freeze();
            if header.kind == Kind::Cancel {
                server.note_cancel();
            }
            if header.kind == Kind::Request {
                let seen = seen(&Request::read(&payload).unwrap());
                let (server, writing) = (server.clone(), Arc::clone(&writing));
                answers.spawn(async move {
                    let Some(frames) = answer(header.stream, seen, server).await else {
                        return false;
                    };
                    // A gateway that hung up reads no answers.
                    writing.lock().await.write_all(&frames).await.is_ok()
                });
            }
        }
    }
}

/// The frames that the script answers with; `None`: hang up.
async fn answer(stream: u32, seen: Seen, server: Scripted) -> Option<Vec<u8>> {
    let body = seen.body.clone();
    let (status, headers, body) = match server.next_act(seen) {
        Act::Echo => (200, HeaderMap::new(), body),
        Act::Answer(response) => {
            let (head, body) = response.into_parts();
            let body = http_body_util::BodyExt::collect(body).await.unwrap();
            (head.status.as_u16(), head.headers, body.to_bytes())
        }
        Act::HangUp => return None,
        Act::Silence => std::future::pending().await,
    };
    let mut frames = Vec::new();
    let lines = headers
        .iter()
        .map(|(name, value)| (name.as_str().as_bytes(), value.as_bytes()));
    assert!(link::response(
        &mut frames,
        stream,
        true,
        status,
        lines,
        &body
    ));
    Some(frames)
}

/// A request as it would look over HTTP/1.1.
fn seen(request: &Request<'_>) -> Seen {
    let routed = &request.routed;
    let mut map = HeaderMap::new();
    let mut set = |name: HeaderName, value: &str| map.append(name, value.parse().unwrap());
    set(headers::CLASS, routed.class);
    set(headers::OBJECT, &routed.id.to_string());
    if let Some(name) = routed.name {
        set(headers::NAME, &headers::encode_name(&name.parse().unwrap()));
    }
    set(headers::SHARD, &routed.id.shard(128).to_string());
    set(headers::EPOCH, &routed.epoch.to_string());
    set(headers::COLO, routed.colo);
    set(headers::REQUEST, routed.request);
    set(headers::TRACEPARENT, &routed.trace.to_string());
    if let Some(timeout_ms) = routed.timeout_ms {
        set(headers::TIMEOUT, &timeout_ms.to_string());
    }
    let (method, uri) = match request.ask {
        Ask::Fetch {
            method,
            path_and_query,
        } => (method, path_and_query),
        Ask::Call { method } => {
            set(headers::METHOD, method);
            ("POST", "/")
        }
        Ask::Create => {
            set(headers::CREATE, "1");
            ("POST", "/")
        }
        Ask::Own { method } => {
            set(headers::METHOD, method);
            set(headers::INTERNAL, "1");
            ("POST", "/")
        }
    };
    for (name, value) in request.headers {
        map.append(
            HeaderName::from_bytes(name).unwrap(),
            HeaderValue::from_bytes(value).unwrap(),
        );
    }
    Seen {
        method: method.to_owned(),
        uri: uri.to_owned(),
        headers: map,
        body: Bytes::copy_from_slice(request.body),
    }
}
