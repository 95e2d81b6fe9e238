//! Calls from objects to objects: on the same worker without leaving its thread, elsewhere over a link as gateways
//! have them, or over HTTP/1.1 if their arguments are too large for one.
//!
//! A call leaves its object through the output gate: it waits until the stretch of the turn that made it, and
//! whatever was committed before, is durable, so that nobody acts upon what may be lost. Calls leave in the order
//! in which they were made. While one is under way the object takes other events, as at every await.

mod connections;
mod links;

use std::future::poll_fn;
use std::num::NonZeroU32;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use http::header::HOST;
use http::{HeaderValue, Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use protocol::ids::ObjectIdError;
use protocol::link::Routed;
use protocol::ring::Worker;
use protocol::trace::TraceParent;
use protocol::{ClassName, ErrorCode, Home, ObjectId, ObjectName, Problem, Ring, headers, limits};
use serde_json::Value as Json;
use tokio::sync::oneshot;

use self::connections::{Connections, SendError};
use self::links::Links;
use crate::class::{Args, ClassError, Context};
use crate::classes::Classes;
use crate::host::{Address, Host};
use crate::object::mailbox::{Event, Reply};
use crate::worker::or_abort;

/// How long a call may take unless its caller says otherwise.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// A handle on another object, which holds none of its state: making one costs no I/O.
/// (<https://developers.cloudflare.com/durable-objects/api/stub/>)
#[derive(Clone)]
pub struct Stub {
    context: Context,
    class: ClassName,
    id: ObjectId,
    name: Option<ObjectName>,
    answer_max: Duration,
}

impl Context {
    /// The object with this name, on the global ring (`getByName`).
    pub fn stub(&self, class: &ClassName, name: &ObjectName) -> Stub {
        self.stub_in(class, Home::Global, name)
    }

    /// The object with this name whose home is that.
    pub fn stub_in(&self, class: &ClassName, home: Home, name: &ObjectName) -> Stub {
        Stub {
            context: self.clone(),
            class: class.clone(),
            id: ObjectId::named(class, home, name),
            name: Some(name.clone()),
            answer_max: ANSWER_MAX,
        }
    }

    /// The object with this id (`get`).
    ///
    /// # Errors
    /// The id is of another class.
    pub fn stub_of(&self, class: &ClassName, id: ObjectId) -> Result<Stub, ObjectIdError> {
        Ok(Stub {
            context: self.clone(),
            class: class.clone(),
            id: id.check_class(class)?,
            name: None,
            answer_max: ANSWER_MAX,
        })
    }

    /// Waits until all that the object has committed so far is durable.
    async fn released(&self) {
        let storage = self.storage();
        // Later commits, of other turns, are none of this call's.
        let gate = storage.gate();
        poll_fn(|cx| match storage.is_durable_up_to(gate, cx.waker()) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        })
        .await;
    }
}

/// A call's place among those of its object that have not left yet.
pub(crate) struct Place {
    /// Closes when the call before has left.
    before: Option<oneshot::Receiver<()>>,
    /// Dropped when this one has.
    _after: oneshot::Sender<()>,
}

impl Place {
    pub(crate) fn new(before: Option<oneshot::Receiver<()>>, after: oneshot::Sender<()>) -> Self {
        Self {
            before,
            _after: after,
        }
    }
}

impl Stub {
    pub fn id(&self) -> ObjectId {
        self.id
    }

    pub fn name(&self) -> Option<&ObjectName> {
        self.name.as_ref()
    }

    /// Calls give up after this time, instead of 30 seconds. Whatever was called may go on.
    #[must_use]
    pub fn within(self, answer_max: Duration) -> Self {
        Self { answer_max, ..self }
    }

    /// Calls a method. Calls of one object to another arrive in the order in which they were made, unless the
    /// other is on another worker and the arguments of one of them are larger than 64 KiB.
    ///
    /// # Errors
    /// [`ClassError::Called`] with what the object, or the system on the way to it, refused; its flag
    /// `retryable` says that nothing ran.
    pub async fn call(&self, method: &str, args: Vec<Json>) -> Result<Json, ClassError> {
        let Some(switchboard) = self.context.switchboard() else {
            return Err(ClassError::Called(Problem::unavailable(
                "this host has no way to other objects",
            )));
        };
        self.context.count_object_call(self.id);
        let (reply, answer) = oneshot::channel();
        let made = Made {
            stub: self.clone(),
            switchboard: Rc::clone(switchboard),
            place: self.context.take_place(),
            method: method.to_owned(),
            args,
        };
        // A task of its own: however a class polls, it does not run before this stretch has ended.
        tokio::task::spawn_local(or_abort(made.leave(reply)));
        answer
            .await
            .unwrap_or_else(|_| Err(Problem::outcome_unknown("the worker is stopping")))
            .map_err(ClassError::Called)
    }

    fn too_late(&self) -> Problem {
        Problem::new(
            ErrorCode::TimedOut,
            format!(
                "object {} of class {} did not answer within {:?}; whether the call had an effect is unknown",
                self.id, self.class, self.answer_max
            ),
        )
    }
}

/// A call on its way.
struct Made {
    stub: Stub,
    switchboard: Rc<Switchboard>,
    place: Place,
    method: String,
    args: Vec<Json>,
}

impl Made {
    async fn leave(self, mut reply: oneshot::Sender<Result<Json, Problem>>) {
        let Self {
            stub,
            switchboard,
            mut place,
            method,
            args,
        } = self;
        stub.context.released().await;
        if let Some(before) = place.before.take() {
            // An error is how it closes.
            drop(before.await);
        }
        if reply.is_closed() || stub.context.storage().is_closed() {
            // Its turn failed, or does not wait any more: nothing of it happens.
            return;
        }
        let called = switchboard.call(&stub, &method, args);
        let called = tokio::time::timeout(stub.answer_max, called);
        let mut called = std::pin::pin!(called);
        // Polled once, it has its place in a mailbox or on a link: the next one may follow.
        let first = poll_fn(|cx| Poll::Ready(called.as_mut().poll(cx))).await;
        drop(place);
        let called = match first {
            Poll::Ready(called) => called,
            Poll::Pending => tokio::select! {
                called = called => called,
                () = reply.closed() => return,
            },
        };
        let answer = called.unwrap_or_else(|_| Err(stub.too_late()));
        // A closed channel is a caller that has stopped waiting.
        drop(reply.send(answer));
    }
}

/// The ways of one worker's objects to all others.
pub struct Switchboard {
    host: Weak<Host>,
    classes: Classes,
    ring: Arc<Ring>,
    /// This worker, as an index into the ring's list.
    me: usize,
    token: Option<HeaderValue>,
    links: Links,
    connections: Connections,
}

impl Switchboard {
    /// `me` is the worker's place in the ring's list; `token` the cluster's.
    pub fn new(
        host: &Rc<Host>,
        classes: Classes,
        ring: Arc<Ring>,
        me: usize,
        token: Option<HeaderValue>,
    ) -> Self {
        Self {
            host: Rc::downgrade(host),
            classes,
            ring,
            me,
            links: Links::new(token.clone()),
            token,
            connections: Connections::default(),
        }
    }

    async fn call(&self, stub: &Stub, method: &str, args: Vec<Json>) -> Result<Json, Problem> {
        let shard = self.ring.shard_of(stub.id);
        let owner = self.ring.owner(stub.id.home(), shard);
        let owner = owner.map_err(|error| Problem::unavailable(error.to_string()))?;
        if std::ptr::eq(owner, &self.ring.workers()[self.me]) {
            return self.deliver(stub, method, args).await;
        }
        self.send(owner, stub, method, &args).await
    }

    /// To an object of this worker.
    async fn deliver(&self, stub: &Stub, method: &str, args: Vec<Json>) -> Result<Json, Problem> {
        let stopping = || Problem::unavailable("the worker is stopping");
        let host = self.host.upgrade().ok_or_else(stopping)?;
        let class = self
            .classes
            .iter()
            .find(|class| *class.name() == stub.class);
        let class = class.cloned().ok_or_else(|| self.no_class(&stub.class))?;
        let address = Address {
            class,
            id: stub.id,
            name: stub.name.clone(),
            shard: self.ring.shard_of(stub.id),
        };
        let event = Event::Call {
            method: method.into(),
            args: Args::new(method, args),
        };
        match host.deliver(&address, event).await? {
            Reply::Value(value) => Ok(value),
            Reply::Response(_) => Ok(Json::Null),
        }
    }

    fn no_class(&self, name: &ClassName) -> Problem {
        Problem::not_found(format!(
            "there is no class \"{name}\"; there are {}",
            self.classes.names()
        ))
    }

    /// To another worker.
    async fn send(
        &self,
        owner: &Worker,
        stub: &Stub,
        method: &str,
        args: &[Json],
    ) -> Result<Json, Problem> {
        let address = owner.address.as_str();
        let body = arguments(method, args)?;
        let routed = self.routed(stub);
        let linked = self.links.call(address, &routed, method, &body).await;
        let (status, body) = match linked {
            Some(answer) => answer.map_err(not_answered)?,
            None => self.send_large(address, stub, method, body).await?,
        };
        let senseless = |what: &str| {
            Problem::outcome_unknown(format!("worker {address} answered {status} and {what}"))
        };
        if status == StatusCode::OK.as_u16() {
            return serde_json::from_slice(&body).map_err(|_| senseless("no JSON"));
        }
        let problem = Problem::from_json(&body).ok_or_else(|| senseless("no problem"))?;
        Err(match problem.code {
            // Rings of nodes are the same, or are about to be.
            ErrorCode::NotOwner => Problem::unavailable(problem.detail),
            _ => problem,
        })
    }

    fn routed<'a>(&self, stub: &'a Stub) -> Routed<'a> {
        Routed {
            id: stub.id,
            epoch: self.ring.version().0.get(),
            timeout_ms: u32::try_from(stub.answer_max.as_millis())
                .ok()
                .and_then(NonZeroU32::new),
            trace: TraceParent {
                trace: 0,
                span: 0,
                flags: 0,
            },
            colo: "",
            request: "",
            class: stub.class.as_str(),
            name: stub.name.as_ref().map(ObjectName::as_str),
        }
    }

    /// Over HTTP/1.1.
    async fn send_large(
        &self,
        address: &str,
        stub: &Stub,
        method: &str,
        body: Vec<u8>,
    ) -> Result<(u16, Vec<u8>), Problem> {
        let request = self.request(address, stub, method, body)?;
        let answer = self.connections.send(address, request).await;
        let answer = answer.map_err(not_answered)?;
        let status = answer.response.status();
        let body = Limited::new(answer.response.into_body(), limits::RPC_BODY_BYTES_MAX).collect();
        let body = body.await.map_err(|error| {
            Problem::outcome_unknown(format!("the answer of worker {address} broke off: {error}"))
        })?;
        self.connections.put_back(address, answer.sender);
        Ok((status.as_u16(), body.to_bytes().into()))
    }

    fn request(
        &self,
        address: &str,
        stub: &Stub,
        method: &str,
        body: Vec<u8>,
    ) -> Result<Request<Full<Bytes>>, Problem> {
        let illegal = |error: &dyn std::fmt::Display| cannot_be_sent(method, error);
        let mut request = Request::post("/")
            .header(HOST, address)
            .header(headers::CLASS, stub.class.as_str())
            .header(headers::OBJECT, stub.id.to_string())
            .header(
                headers::SHARD,
                HeaderValue::from(self.ring.shard_of(stub.id).0),
            )
            .header(
                headers::EPOCH,
                HeaderValue::from(self.ring.version().0.get()),
            )
            .header(headers::METHOD, method)
            // Objects may call what only the system's own code may.
            .header(headers::INTERNAL, "1")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| illegal(&error))?;
        let map = request.headers_mut();
        if let Some(name) = &stub.name {
            let name = HeaderValue::from_str(&headers::encode_name(name));
            map.insert(headers::NAME, name.map_err(|error| illegal(&error))?);
        }
        if let Some(token) = &self.token {
            map.insert(headers::TOKEN, token.clone());
        }
        Ok(request)
    }
}

fn arguments(method: &str, args: &[Json]) -> Result<Vec<u8>, Problem> {
    let body = serde_json::to_vec(args).map_err(|error| cannot_be_sent(method, &error))?;
    if body.len() > limits::RPC_BODY_BYTES_MAX {
        return Err(Problem::new(
            ErrorCode::PayloadTooLarge,
            format!(
                "the arguments of a call are larger than {} bytes",
                limits::RPC_BODY_BYTES_MAX
            ),
        ));
    }
    Ok(body)
}

fn cannot_be_sent(method: &str, error: &dyn std::fmt::Display) -> Problem {
    Problem::bad_request(format!("the call of {method:?} cannot be sent: {error}"))
}

fn not_answered(error: SendError) -> Problem {
    match error {
        SendError::NotSent(_) => Problem::unavailable(error.to_string()),
        SendError::Full(_) => Problem::new(ErrorCode::Overloaded, error.to_string()),
        SendError::Broken(_) => Problem::outcome_unknown(error.to_string()),
    }
}
