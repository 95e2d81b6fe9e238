//! The output gate: nothing leaves an object before all that it may depend on is durable. The writer of
//! the log works only when a test lets it.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::BodyExt;
use http_body_util::StreamBody;
use hyper::body::Frame;
use ops::metrics::Registry;
use protocol::ring::{RingDocument, RingNode};
use protocol::{
    ClassName, ErrorCode, Home, ObjectId, ObjectName, Problem, Ring, RingVersion, ShardId,
};
use serde_json::{Value, json};
use shard_node::alarms::AlarmsConfig;
use shard_node::class::{Args, Body, Class, ClassError, Context, Instance, Json, Turn};
use shard_node::classes::Classes;
use shard_node::clock::SystemClock;
use shard_node::config::{MailboxConfig, ObjectsConfig};
use shard_node::fan_out::{FanOut, Needs};
use shard_node::host::{Address, Host, HostConfig};
use shard_node::metrics::Metrics;
use shard_node::object::mailbox::{Answer, Event, Reply};
use shard_node::storage::Logged;
use shard_node::stub::Switchboard;
use tokio::sync::Notify;
use tokio::task::{JoinHandle, LocalSet};

use crate::disk::{Fault, SimDisk};
use crate::node::{ROOT, setup};

/// A host whose log stands still.
struct Fixture {
    host: Rc<Host>,
    engine: Logged,
    progress: Arc<Notify>,
    disk: SimDisk,
    classes: Classes,
}

fn test(run: impl AsyncFnOnce(Fixture)) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    LocalSet::new().block_on(&runtime, async {
        let disk = SimDisk::new(ROOT.as_ref());
        let progress = Arc::new(Notify::new());
        let engine = Logged::open_idle(setup(&disk), Arc::clone(&progress)).unwrap();
        let config = HostConfig {
            alarms: AlarmsConfig::default(),
            expiry: Arc::default(),
            mailbox: MailboxConfig::default(),
            objects: ObjectsConfig::default(),
            sql: Arc::default(),
        };
        let metrics = Rc::new(Metrics::new(Arc::new(Registry::default()), 0));
        let host = Host::new(
            config,
            Rc::new(engine.clone()),
            Arc::new(SystemClock),
            metrics,
        );
        tokio::task::spawn_local(Rc::clone(&host).run());
        tokio::task::spawn_local(Rc::clone(&host).follow_log(Arc::clone(&progress)));
        let classes = Classes::built_in()
            .with(Ticker::default())
            .with(Caller::default());
        let ring = Arc::new(ring());
        host.set_switchboard(Switchboard::new(&host, classes.clone(), ring, 0, None));
        run(Fixture {
            host,
            engine,
            progress,
            disk,
            classes,
        })
        .await;
    });
}

/// One worker, and one shard.
fn ring() -> Ring {
    Ring::new(RingDocument {
        version: RingVersion(1.try_into().unwrap()),
        shards: 1,
        nodes: vec![RingNode {
            name: "sim".to_owned(),
            weight: 1,
            colo: None,
            workers: vec![String::new()],
        }],
    })
    .unwrap()
}

impl Fixture {
    fn address(&self, class: &str, name: &str) -> Address {
        let name: ObjectName = name.parse().unwrap();
        let class = self
            .classes
            .iter()
            .find(|known| known.name().as_str() == class)
            .unwrap();
        Address {
            id: ObjectId::named(class.name(), Home::Global, &name),
            class: Arc::clone(class),
            name: Some(name),
            shard: ShardId(0),
        }
    }

    fn send(&self, class: &str, name: &str, event: Event) -> JoinHandle<Answer> {
        let (host, address) = (Rc::clone(&self.host), self.address(class, name));
        tokio::task::spawn_local(async move { host.deliver(&address, event).await })
    }

    fn call(&self, class: &str, name: &str, method: &str, args: Value) -> JoinHandle<Answer> {
        let Value::Array(args) = args else {
            panic!("{args} are no arguments")
        };
        let event = Event::Call {
            args: Args::new(method, args),
            method: method.into(),
        };
        self.send(class, name, event)
    }

    /// Everything that can happen without the log happens.
    async fn turns(&self) {
        for _ in 0..20 {
            tokio::task::yield_now().await;
        }
    }

    /// The writer writes what there is.
    async fn write_log(&self) {
        self.turns().await;
        while self.engine.step() {}
        self.progress.notify_one();
        self.turns().await;
    }
}

#[track_caller]
fn value(answer: Answer) -> Json {
    match answer.map_err(|problem| problem.detail) {
        Ok(Reply::Value(value)) => value,
        Ok(Reply::Response(_)) => panic!("a response to a call"),
        Err(detail) => panic!("{detail}"),
    }
}

#[track_caller]
fn problem(answer: Answer) -> Problem {
    match answer {
        Err(problem) => problem,
        Ok(_) => panic!("it was answered"),
    }
}

#[test]
fn replies_wait_for_the_writes_they_could_tell_of() {
    test(async |fixture| {
        let write = fixture.call("Counter", "a", "increment", json!([]));
        let read = fixture.call("Counter", "a", "value", json!([]));
        let refused = fixture.call("Counter", "a", "increment", json!([i64::MAX]));
        let other = fixture.call("Counter", "b", "value", json!([]));
        fixture.turns().await;
        assert_eq!(value(other.await.unwrap()), 0, "it depends on nothing");
        assert!(!write.is_finished() && !read.is_finished() && !refused.is_finished());
        fixture.write_log().await;
        assert_eq!(value(write.await.unwrap()), 1);
        assert_eq!(value(read.await.unwrap()), 1);
        let detail = problem(refused.await.unwrap()).detail;
        assert!(detail.contains("1 + 9223372036854775807"), "{detail}");
        // Now that it is durable, reads wait for nothing.
        let read = fixture.call("Counter", "a", "value", json!([]));
        fixture.turns().await;
        assert_eq!(value(read.await.unwrap()), 1);
    });
}

#[test]
fn an_object_that_slept_meanwhile_still_waits() {
    test(async |fixture| {
        let write = fixture.call("Counter", "a", "increment", json!([]));
        fixture.turns().await;
        fixture.host.shut_down();
        let read = fixture.call("Counter", "a", "value", json!([]));
        fixture.turns().await;
        assert!(
            !read.is_finished(),
            "the write before its sleep is not durable"
        );
        drop(write);
        fixture.write_log().await;
        assert_eq!(value(read.await.unwrap()), 1);
    });
}

#[test]
fn unconfirmed_writes_hold_nothing_back() {
    test(async |fixture| {
        let options = json!({"allowUnconfirmed": true});
        let put = fixture.call("Kv", "a", "put", json!(["k", 1, options]));
        let batch = fixture.call("Kv", "a", "put", json!([{"l": 2}, options]));
        fixture.turns().await;
        assert_eq!(value(put.await.unwrap()), Json::Null);
        assert_eq!(value(batch.await.unwrap()), Json::Null);
        let read = fixture.call("Kv", "a", "get", json!(["l"]));
        fixture.turns().await;
        assert_eq!(value(read.await.unwrap()), 2);
        assert_eq!(
            fixture.engine.stats().groups.load(Ordering::Relaxed),
            0,
            "nothing is on the disk"
        );
        let put = fixture.call("Kv", "a", "put", json!(["k", 3]));
        fixture.turns().await;
        assert!(!put.is_finished(), "without the option it waits");
        fixture.write_log().await;
        assert_eq!(value(put.await.unwrap()), Json::Null);
        let unknown = fixture.call("Kv", "a", "put", json!(["k", 3, {"allow": true}]));
        let detail = problem(unknown.await.unwrap()).detail;
        assert!(detail.contains("unknown field `allow`"), "{detail}");
    });
}

/// A failed sync: whoever waited gets an error, and the object is what it durably was.
#[test]
fn a_failed_sync_answers_with_an_error_and_resets_the_object() {
    for (kind, code) in [
        (io::ErrorKind::Other, ErrorCode::ObjectReset),
        (io::ErrorKind::StorageFull, ErrorCode::StorageFull),
    ] {
        test(async move |fixture| {
            let first = fixture.call("Counter", "a", "increment", json!([]));
            fixture.write_log().await;
            assert_eq!(value(first.await.unwrap()), 1);
            let lost = fixture.call("Counter", "a", "increment", json!([41]));
            let seen = fixture.call("Counter", "a", "value", json!([]));
            fixture.turns().await;
            let now = fixture.disk.operations();
            fixture
                .disk
                .set_faults((now..now + 3).map(|at| Fault::Fail(at, kind)).collect());
            fixture.engine.step();
            fixture.progress.notify_one();
            fixture.turns().await;
            for answer in [lost, seen] {
                let problem = problem(answer.await.unwrap());
                assert_eq!(problem.code, code, "{}", problem.detail);
                assert!(
                    problem.detail.contains("could not be made durable"),
                    "{}",
                    problem.detail
                );
                assert!(!problem.retryable, "it may have survived");
            }
            let read = fixture.call("Counter", "a", "value", json!([]));
            fixture.turns().await;
            assert_eq!(value(read.await.unwrap()), 1, "reads go on");
            let refused = fixture.call("Counter", "a", "increment", json!([]));
            fixture.turns().await;
            let refused = problem(refused.await.unwrap());
            assert!(
                matches!(
                    refused.code,
                    ErrorCode::Unavailable | ErrorCode::StorageFull
                ),
                "{}",
                refused.detail
            );
            fixture.disk.set_faults(Vec::new());
            fixture.write_log().await;
            let again = fixture.call("Counter", "a", "increment", json!([]));
            fixture.write_log().await;
            assert_eq!(value(again.await.unwrap()), 2);
        });
    }
}

/// Turns that waited together share one commit; one that fails takes back its own writes only.
#[test]
fn queued_turns_share_a_commit_and_fail_alone() {
    test(async |fixture| {
        let create = fixture.call("Sql", "a", "exec", json!(["CREATE TABLE t (n UNIQUE)"]));
        fixture.write_log().await;
        value(create.await.unwrap());
        let groups = fixture.engine.live_bytes();
        let insert =
            |n: i64| fixture.call("Sql", "a", "exec", json!(["INSERT INTO t VALUES (?)", n]));
        let answers = [insert(1), insert(2), insert(1), insert(3)];
        let both = fixture.call(
            "Sql",
            "a",
            "exec",
            json!(["INSERT INTO t VALUES (4); INSERT INTO t VALUES (2)"]),
        );
        let count = fixture.call("Sql", "a", "exec", json!(["SELECT n FROM t ORDER BY n"]));
        fixture.write_log().await;
        let answers = futures_util::future::join_all(answers).await;
        let ok: Vec<bool> = answers
            .into_iter()
            .map(|answer| answer.unwrap().is_ok())
            .collect();
        assert_eq!(ok, [true, true, false, true]);
        assert!(problem(both.await.unwrap()).detail.contains("UNIQUE"));
        let rows = value(count.await.unwrap());
        assert_eq!(rows["rows"], json!([[1], [2], [3]]));
        let written = fixture.engine.live_bytes() - groups;
        assert!(written < 4000, "{written} bytes of log for one commit");
    });
}

/// `Ticker`: a streamed body whose every frame is a write.
struct Ticker {
    name: ClassName,
}

impl Default for Ticker {
    fn default() -> Self {
        Self {
            name: "Ticker".parse().unwrap(),
        }
    }
}

impl Class for Ticker {
    fn name(&self) -> &ClassName {
        &self.name
    }

    fn methods(&self) -> &'static [&'static str] {
        &[]
    }

    fn construct(&self, context: Context) -> Result<Rc<dyn Instance>, ClassError> {
        Ok(Rc::new(Ticks { context }))
    }
}

struct Ticks {
    context: Context,
}

impl Instance for Ticks {
    fn fetch(self: Rc<Self>, _request: Request<Body>) -> Turn<Response<Body>> {
        let number = Cell::new(0);
        let frames = futures_util::stream::poll_fn(move |_| {
            number.set(number.get() + 1);
            let key = format!("tick-{}", number.get());
            let put = self.context.storage().kv_put(&key, None, b"1");
            let frame = put.map(|_| Frame::data(Bytes::from(key)));
            Poll::Ready(Some(frame.map_err(|error| error.to_string().into())))
        });
        Turn::Done(Ok(Response::new(Body::stream(StreamBody::new(frames)))))
    }

    fn call(self: Rc<Self>, _method: &str, _args: Args) -> Turn<Json> {
        Turn::Done(Ok(Json::Null))
    }
}

#[test]
fn frames_of_a_streamed_body_wait_too() {
    test(async |fixture| {
        let request = Request::get("/").body(Body::empty()).unwrap();
        let sent = fixture.send("Ticker", "a", Event::Fetch(request));
        fixture.turns().await;
        let Ok(Reply::Response(mut response)) = sent.await.unwrap() else {
            panic!("no response");
        };
        for number in 1..4 {
            let mut frame = Box::pin(response.body_mut().frame());
            let early = std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut frame).poll(cx))).await;
            assert!(early.is_pending(), "frame {number} is not durable");
            fixture.write_log().await;
            let data = frame.await.unwrap().unwrap().into_data().unwrap();
            assert_eq!(data, format!("tick-{number}").as_bytes());
        }
    });
}

/// `Caller`: writes, and calls the counter `target`.
struct Caller(ClassName);

impl Default for Caller {
    fn default() -> Self {
        Self("Caller".parse().unwrap())
    }
}

impl Class for Caller {
    fn name(&self) -> &ClassName {
        &self.0
    }

    fn methods(&self) -> &'static [&'static str] {
        &["call", "gather", "fail"]
    }

    fn construct(&self, context: Context) -> Result<Rc<dyn Instance>, ClassError> {
        Ok(Rc::new(Calls { context }))
    }
}

struct Calls {
    context: Context,
}

impl Calls {
    async fn call_target(self: Rc<Self>, method: String) -> Result<Json, ClassError> {
        self.context.storage().kv_put("k", None, b"1")?;
        let (class, name) = ("Counter".parse().unwrap(), "target".parse().unwrap());
        let stub = self.context.stub(&class, &name);
        let mut call = Box::pin(stub.call("increment", Vec::new()));
        let failed = || Err(ClassError::NotFound("as asked".to_owned()));
        match method.as_str() {
            "call" => call.await,
            "fail" => {
                // It begins, and goes with its turn.
                let begun = std::future::poll_fn(|cx| Poll::Ready(call.as_mut().poll(cx))).await;
                assert!(begun.is_pending());
                failed()
            }
            _ => {
                // One that has failed at once makes whoever gathers poll the other again, in the same stretch.
                let calls: [futures_util::future::LocalBoxFuture<'_, _>; 2] =
                    [call, Box::pin(std::future::ready(failed()))];
                let fan_out = FanOut {
                    at_once: 2.try_into().unwrap(),
                    within: std::time::Duration::from_secs(60),
                    needs: Needs::AtLeast(1),
                };
                fan_out.gather(calls).await?.swap_remove(0)
            }
        }
    }
}

impl Instance for Calls {
    fn fetch(self: Rc<Self>, _request: Request<Body>) -> Turn<Response<Body>> {
        Turn::Done(Err(ClassError::NotFound("no pages".to_owned())))
    }

    fn call(self: Rc<Self>, method: &str, _args: Args) -> Turn<Json> {
        Turn::run(self.call_target(method.to_owned()))
    }
}

/// What `target` is, as far as it was told.
async fn target(fixture: &Fixture) -> Json {
    let read = fixture.call("Counter", "target", "value", json!([]));
    fixture.turns().await;
    assert!(read.is_finished(), "it waits for nothing");
    value(read.await.unwrap())
}

#[test]
fn calls_wait_for_the_writes_made_before_them() {
    for method in ["call", "gather"] {
        test(async move |fixture| {
            let called = fixture.call("Caller", "a", method, json!([]));
            fixture.turns().await;
            assert_eq!(
                target(&fixture).await,
                0,
                "{method}: its writes are not durable"
            );
            // The caller's write, then the counter's.
            fixture.write_log().await;
            fixture.write_log().await;
            assert_eq!(value(called.await.unwrap()), 1, "{method}");
            assert_eq!(target(&fixture).await, 1);
        });
    }
}

#[test]
fn a_call_of_a_turn_that_fails_is_not_made() {
    test(async |fixture| {
        let called = fixture.call("Caller", "a", "fail", json!([]));
        fixture.write_log().await;
        assert_eq!(problem(called.await.unwrap()).code, ErrorCode::NotFound);
        fixture.write_log().await;
        assert_eq!(target(&fixture).await, 0);
    });
}

#[test]
fn a_call_is_not_made_if_the_writes_before_it_are_lost() {
    test(async |fixture| {
        let called = fixture.call("Caller", "a", "call", json!([]));
        fixture.turns().await;
        let now = fixture.disk.operations();
        let fails = (now..now + 3).map(|at| Fault::Fail(at, io::ErrorKind::Other));
        fixture.disk.set_faults(fails.collect());
        fixture.engine.step();
        fixture.progress.notify_one();
        fixture.turns().await;
        assert_eq!(problem(called.await.unwrap()).code, ErrorCode::ObjectReset);
        fixture.disk.set_faults(Vec::new());
        for _ in 0..3 {
            fixture.write_log().await;
        }
        assert_eq!(target(&fixture).await, 0);
    });
}
