//! Classes for tests: one that shows what the host does, one that misbehaves.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use protocol::ClassName;
use shard_node::class::{AlarmInfo, Args, Body, Class, ClassError, Context, Instance, Json, Turn};
use shard_node::classes::Classes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[path = "../../examples/patterns/classes.rs"]
mod patterns;

pub(crate) fn all() -> Classes {
    let classes = Classes::built_in()
        .with(Probe::default())
        .with(Broken::default())
        .with(Rattle::default())
        .with(crate::relay::Relay::default());
    patterns::added_to(classes)
}

/// Counts its own constructions, waits, panics, echoes.
pub(crate) struct Probe(ClassName);

impl Default for Probe {
    fn default() -> Self {
        Self("Probe".parse().unwrap())
    }
}

impl Class for Probe {
    fn name(&self) -> &ClassName {
        &self.0
    }

    fn methods(&self) -> &'static [&'static str] {
        &[
            "instance",
            "name",
            "id",
            "write",
            "written",
            "write_then_fail",
            "write_then_panic",
            "wait",
            "write_around_a_wait",
            "read_add_write",
            "order",
            "cached",
            "throw",
            "once",
            "bookmark",
            "go_back",
            "call_others",
        ]
    }

    fn construct(&self, context: Context) -> Result<Rc<dyn Instance>, ClassError> {
        static INSTANCES: AtomicU64 = AtomicU64::new(0);
        Ok(Rc::new(ProbeInstance {
            context,
            number: INSTANCES.fetch_add(1, Ordering::Relaxed),
            calls: Cell::new(0),
            cached: Cell::new(0),
        }))
    }
}

struct ProbeInstance {
    context: Context,
    number: u64,
    calls: Cell<u64>,
    cached: Cell<u64>,
}

impl ProbeInstance {
    /// `go_back(bookmark, restart)`: the way to undo it.
    fn go_back(&self, args: &Args) -> Result<Json, ClassError> {
        let bookmark = args.text(0, "bookmark")?.parse().unwrap();
        let undo = self.context.restore_at_next_start(bookmark)?;
        if args.get(1) != Some(&Json::Bool(false)) {
            self.context.restart();
        }
        Ok(undo.to_string().into())
    }

    /// `once(key, fail)`: adds one to a number, once per key.
    fn once(&self, args: &Args) -> Result<Json, ClassError> {
        let key = args.text(0, "key")?;
        self.context.once(key, Duration::from_secs(60), || {
            let before = self
                .written()?
                .as_str()
                .map_or(0, |text| text.parse::<u64>().unwrap());
            self.write(&(before + 1).to_string())?;
            if args.get(1) == Some(&Json::Bool(true)) {
                return Err(ClassError::BadRequest("as asked".to_owned()));
            }
            Ok((before + 1).into())
        })
    }

    fn write(&self, value: &str) -> Result<(), ClassError> {
        self.context
            .storage()
            .kv_put("value", None, value.as_bytes())?;
        Ok(())
    }

    fn written(&self) -> Result<Json, ClassError> {
        let entry = self.context.storage().kv_get("value")?;
        Ok(entry.map_or(Json::Null, |entry| {
            String::from_utf8(entry.value).unwrap().into()
        }))
    }
}

impl Instance for ProbeInstance {
    fn fetch(self: Rc<Self>, mut request: Request<Body>) -> Turn<Response<Body>> {
        match request.uri().path() {
            // Sends the body back as it comes.
            "/echo" => {
                let (head, body) = request.into_parts();
                let mut response = Response::new(body);
                *response.headers_mut() = head.headers;
                response.headers_mut().remove("content-length");
                response.headers_mut().remove("transfer-encoding");
                Turn::Done(Ok(response))
            }
            // Speaks its own protocol after 101: every byte comes back, upper-cased.
            "/upgrade" => {
                let upgraded = hyper::upgrade::on(&mut request);
                let awake = self.context.stay_awake();
                tokio::task::spawn_local(async move {
                    let _awake = awake;
                    let mut stream = TokioIo::new(upgraded.await.unwrap());
                    let mut byte = [0];
                    while stream.read(&mut byte).await.is_ok_and(|read| read == 1) {
                        stream
                            .write_all(&byte.map(|b| b.to_ascii_uppercase()))
                            .await
                            .unwrap();
                        stream.flush().await.unwrap();
                    }
                });
                let mut response = Response::new(Body::empty());
                *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
                response
                    .headers_mut()
                    .insert("connection", "upgrade".parse().unwrap());
                response
                    .headers_mut()
                    .insert("upgrade", "shout".parse().unwrap());
                Turn::Done(Ok(response))
            }
            // As many bytes as the query says, whenever somebody takes them.
            "/long" => {
                let bytes = request.uri().query().unwrap().parse().unwrap();
                Turn::Done(Ok(Response::new(Body::stream(LongBody(bytes)))))
            }
            "/panic_while_streaming" => {
                Turn::Done(Ok(Response::new(Body::stream(PanickingBody(false)))))
            }
            // What it saw of the request.
            path => {
                let headers: serde_json::Map<String, Json> = request
                    .headers()
                    .iter()
                    .map(|(name, value)| (name.to_string(), value.to_str().unwrap().into()))
                    .collect();
                let seen = serde_json::json!({
                    "method": request.method().as_str(),
                    "path": path,
                    "query": request.uri().query(),
                    "headers": headers,
                });
                let mut response = Response::new(Body::from(seen.to_string()));
                *response.status_mut() = StatusCode::IM_A_TEAPOT;
                response
                    .headers_mut()
                    .insert("x-own", "kept".parse().unwrap());
                response
                    .headers_mut()
                    .insert("dormouse-error", "forged".parse().unwrap());
                Turn::Done(Ok(response))
            }
        }
    }

    fn call(self: Rc<Self>, method: &str, args: Args) -> Turn<Json> {
        self.calls.set(self.calls.get() + 1);
        match method {
            "instance" => Turn::Done(Ok(self.number.into())),
            "name" => Turn::Done(
                self.context
                    .name()
                    .map_err(ClassError::from)
                    .map(|name| name.map_or(Json::Null, |name| name.as_str().into())),
            ),
            "id" => Turn::Done(Ok(self.context.id().to_string().into())),
            "write" => Turn::Done(
                args.text(0, "value")
                    .and_then(|value| self.write(value))
                    .map(|()| Json::Null),
            ),
            "written" => Turn::Done(self.written()),
            "write_then_fail" => Turn::Done(
                self.write("lost")
                    .and(Err(ClassError::BadRequest("as asked".to_owned()))),
            ),
            "write_then_panic" => {
                self.write("lost").unwrap();
                panic!("as asked");
            }
            "once" => Turn::Done(self.once(&args)),
            "bookmark" => Turn::Done(
                match args.integer(0, "ms").unwrap() {
                    None => self.context.current_bookmark(),
                    Some(ms) => self.context.bookmark_for_time(ms.unsigned_abs()),
                }
                .map(|bookmark| bookmark.to_string().into()),
            ),
            "go_back" => Turn::Done(self.go_back(&args)),
            // Calls so many others, one after the other.
            "call_others" => {
                let count = args.integer(0, "count").unwrap().unwrap();
                Turn::run(async move {
                    let class: ClassName = "Counter".parse().unwrap();
                    for number in 0..count {
                        let name = format!("child-{number}").parse().unwrap();
                        let child = self.context.stub(&class, &name);
                        child.call("value", Vec::new()).await?;
                    }
                    Ok(Json::Null)
                })
            }
            "throw" => Turn::Done(Err(ClassError::Thrown {
                name: "RangeError".to_owned(),
                message: "too far".to_owned(),
            })),
            "wait" => {
                let millis = args.integer(0, "ms").unwrap().unwrap();
                Turn::run(async move {
                    tokio::time::sleep(Duration::from_millis(millis.unsigned_abs())).await;
                    Ok(self.number.into())
                })
            }
            // Two stretches: the first is durable although the second fails.
            "write_around_a_wait" => Turn::run(async move {
                self.write("before")?;
                tokio::time::sleep(Duration::from_millis(5)).await;
                self.write("after")?;
                Err(ClassError::BadRequest("as asked".to_owned()))
            }),
            // Safe without any lock, because nothing is awaited in between.
            "read_add_write" => Turn::Done((|| {
                let storage = self.context.storage();
                let number =
                    |bytes: &[u8]| std::str::from_utf8(bytes).unwrap().parse::<u64>().unwrap();
                let before = storage.kv_get("n")?.map_or(0, |entry| number(&entry.value));
                storage.kv_put("n", None, (before + 1).to_string().as_bytes())?;
                Ok((before + 1).into())
            })()),
            "order" => Turn::Done(Ok(self.calls.get().into())),
            _ => {
                self.cached.set(self.cached.get() + 1);
                Turn::Done(Ok(self.cached.get().into()))
            }
        }
    }
}

/// So many bytes, always the same.
struct LongBody(usize);

impl hyper::body::Body for LongBody {
    type Data = bytes::Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        _cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<hyper::body::Frame<bytes::Bytes>, Self::Error>>> {
        static SEVENS: [u8; 50_000] = [7; 50_000];
        let part = self.0.min(SEVENS.len());
        self.0 -= part;
        let frame = hyper::body::Frame::data(bytes::Bytes::from_static(&SEVENS[..part]));
        std::task::Poll::Ready((part > 0).then_some(Ok(frame)))
    }
}

/// One frame, and then a panic.
struct PanickingBody(bool);

impl hyper::body::Body for PanickingBody {
    type Data = bytes::Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        _cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<hyper::body::Frame<bytes::Bytes>, Self::Error>>> {
        assert!(!std::mem::replace(&mut self.0, true), "as asked");
        std::task::Poll::Ready(Some(Ok(hyper::body::Frame::data(
            bytes::Bytes::from_static(b"first"),
        ))))
    }
}

/// Has an alarm every few milliseconds, which does nothing but set the next.
pub(crate) struct Rattle(ClassName);

impl Default for Rattle {
    fn default() -> Self {
        Self("Rattle".parse().unwrap())
    }
}

impl Class for Rattle {
    fn name(&self) -> &ClassName {
        &self.0
    }

    fn methods(&self) -> &'static [&'static str] {
        &["begin"]
    }

    fn handles_alarms(&self) -> bool {
        true
    }

    fn construct(&self, context: Context) -> Result<Rc<dyn Instance>, ClassError> {
        Ok(Rc::new(RattleInstance(context)))
    }
}

struct RattleInstance(Context);

impl RattleInstance {
    fn again(&self) -> Result<(), ClassError> {
        self.0.set_alarm(self.0.unix_millis() + 20)
    }
}

impl Instance for RattleInstance {
    fn fetch(self: Rc<Self>, _request: Request<Body>) -> Turn<Response<Body>> {
        Turn::Done(Ok(Response::new(Body::empty())))
    }

    fn call(self: Rc<Self>, _method: &str, _args: Args) -> Turn<Json> {
        Turn::Done(self.again().map(|()| Json::Null))
    }

    fn alarm(self: Rc<Self>, _info: AlarmInfo) -> Turn<()> {
        Turn::Done(self.again())
    }
}

/// Cannot be constructed.
pub(crate) struct Broken(ClassName);

impl Default for Broken {
    fn default() -> Self {
        Self("Broken".parse().unwrap())
    }
}

impl Class for Broken {
    fn name(&self) -> &ClassName {
        &self.0
    }

    fn methods(&self) -> &'static [&'static str] {
        &["any"]
    }

    fn construct(&self, _context: Context) -> Result<Rc<dyn Instance>, ClassError> {
        panic!("this constructor always panics");
    }
}
