//! Bodies of requests and responses: bytes at hand, or streams, on their way in and out.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{self, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};

use super::{Awake, ClassError};
use crate::object::drop_class_code;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A request or response body: bytes at hand, or a stream.
pub struct Body(Kind);

enum Kind {
    Bytes(Bytes),
    Incoming(Receiving),
    Stream(Pin<Box<dyn HttpBody<Data = Bytes, Error = BoxError>>>),
}

impl Body {
    pub fn empty() -> Self {
        Self(Kind::Bytes(Bytes::new()))
    }

    /// A body that is produced while it is sent. The object stays awake until it has ended.
    pub fn stream(body: impl HttpBody<Data = Bytes, Error = BoxError> + 'static) -> Self {
        Self(Kind::Stream(Box::pin(body)))
    }

    /// The whole body in memory, if it has at most `max` bytes.
    pub async fn read(self, max: usize) -> Result<Bytes, ClassError> {
        let too_large = |bytes: u64| {
            ClassError::PayloadTooLarge(format!("a body of {bytes} bytes is larger than {max}"))
        };
        let announced = self.size_hint().lower();
        if announced > max as u64 {
            return Err(too_large(announced));
        }
        let whole = match self.0 {
            Kind::Bytes(bytes) => return Ok(bytes),
            Kind::Incoming(incoming) => http_body_util::Limited::new(incoming, max).collect().await,
            Kind::Stream(stream) => http_body_util::Limited::new(stream, max).collect().await,
        };
        match whole {
            Ok(whole) => Ok(whole.to_bytes()),
            Err(error) if error.is::<http_body_util::LengthLimitError>() => {
                Err(too_large(max as u64 + 1))
            }
            Err(error) => Err(ClassError::BadRequest(format!(
                "the body broke off: {error}"
            ))),
        }
    }

    /// The bytes, if they are at hand.
    pub(crate) fn whole(self) -> Result<Bytes, Self> {
        match self.0 {
            Kind::Bytes(bytes) => Ok(bytes),
            _ => Err(self),
        }
    }

    /// The same body, keeping its object awake until it has been sent. Bytes at hand need no object.
    pub(crate) fn held(self, awake: Awake) -> Self {
        match self.0 {
            Kind::Bytes(_) => self,
            Kind::Incoming(_) | Kind::Stream(_) => Self(Kind::Stream(Box::pin(Held {
                body: Some(self),
                gated: None,
                awake,
            }))),
        }
    }
}

/// A body that keeps its object awake. It runs class code while it is sent, each time as one stretch of
/// a turn; a panic there ends the body, and with it the response, but nothing else. What it gives passes
/// the output gate like any other answer.
struct Held {
    body: Option<Body>,
    /// What is ready, until all that it may depend on is durable.
    gated: Option<Option<Result<Frame<Bytes>, BoxError>>>,
    awake: Awake,
}

impl Held {
    /// One stretch of class code.
    fn produce(
        &mut self,
        cx: &mut task::Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let Some(body) = self.body.as_mut() else {
            return Poll::Ready(None);
        };
        let storage = self.awake.storage();
        storage.begin_segment();
        let polled = catch_unwind(AssertUnwindSafe(|| Pin::new(body).poll_frame(cx)));
        let failed = match polled {
            Ok(polled) => match storage.commit() {
                Ok(_) => return polled,
                Err(error) => {
                    self.awake.fail();
                    error.to_string()
                }
            },
            Err(_) => match storage.rollback() {
                Ok(()) => "class code panicked in a response body".to_owned(),
                Err(error) => error.to_string(),
            },
        };
        drop_class_code(self.body.take());
        Poll::Ready(Some(Err(failed.into())))
    }
}

impl HttpBody for Held {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if self.awake.storage().is_closed() {
            self.gated = None;
            drop_class_code(self.body.take());
            return Poll::Ready(Some(Err("the object was reset".into())));
        }
        if self.gated.is_none() {
            match self.produce(cx) {
                Poll::Ready(frame) => self.gated = Some(frame),
                Poll::Pending => return Poll::Pending,
            }
        }
        let storage = self.awake.storage();
        if !storage.is_durable(cx.waker()) {
            return Poll::Pending;
        }
        Poll::Ready(self.gated.take().flatten())
    }

    fn is_end_stream(&self) -> bool {
        self.gated.is_none() && self.body.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        if self.gated.is_some() {
            return SizeHint::new();
        }
        self.body
            .as_ref()
            .map(HttpBody::size_hint)
            .unwrap_or_default()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        drop_class_code(self.body.take());
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        Self(Kind::Bytes(bytes))
    }
}

impl From<Vec<u8>> for Body {
    fn from(bytes: Vec<u8>) -> Self {
        Self(Kind::Bytes(bytes.into()))
    }
}

impl From<String> for Body {
    fn from(text: String) -> Self {
        Self(Kind::Bytes(text.into()))
    }
}

impl From<Incoming> for Body {
    fn from(incoming: Incoming) -> Self {
        Self(Kind::Incoming(Receiving(Some(incoming))))
    }
}

/// A body on its way in.
///
/// Whoever is refused before sending all of it should still read the refusal. If the connection were
/// closed under the bytes that still come, most clients would see a broken connection instead; so
/// what is dropped half read is received and forgotten for a while (nginx calls it lingering close).
struct Receiving(Option<Incoming>);

/// How long an unwanted rest is received for.
const REST_TIME_MAX: Duration = Duration::from_secs(10);

impl Receiving {
    fn get(&self) -> &Incoming {
        self.0.as_ref().expect("taken by drop alone")
    }
}

impl HttpBody for Receiving {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let incoming = self.0.as_mut().expect("taken by drop alone");
        Pin::new(incoming).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.get().is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.get().size_hint()
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        let Some(mut rest) = self.0.take().filter(|incoming| !incoming.is_end_stream()) else {
            return;
        };
        tokio::task::spawn_local(tokio::time::timeout(REST_TIME_MAX, async move {
            while let Some(Ok(_)) = rest.frame().await {}
        }));
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match &mut self.0 {
            Kind::Bytes(bytes) if bytes.is_empty() => Poll::Ready(None),
            Kind::Bytes(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Kind::Incoming(incoming) => Pin::new(incoming).poll_frame(cx).map_err(Into::into),
            Kind::Stream(stream) => stream.as_mut().poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Kind::Bytes(bytes) => bytes.is_empty(),
            Kind::Incoming(incoming) => incoming.is_end_stream(),
            Kind::Stream(stream) => stream.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Kind::Bytes(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Kind::Incoming(incoming) => incoming.size_hint(),
            Kind::Stream(stream) => stream.size_hint(),
        }
    }
}
