//! `Relay`: an object that calls others as it is told, and tells what they answered.

use std::rc::Rc;

use http::{Request, Response};
use protocol::ClassName;
use serde_json::json;
use shard_node::class::{Args, Body, Class, ClassError, Context, Instance, Json, Turn};
use shard_node::stub::Stub;

pub(crate) struct Relay(ClassName);

impl Default for Relay {
    fn default() -> Self {
        Self("Relay".parse().unwrap())
    }
}

impl Class for Relay {
    fn name(&self) -> &ClassName {
        &self.0
    }

    fn methods(&self) -> &'static [&'static str] {
        &[
            "call", "burst", "bounce", "append", "list", "hang", "hangs", "throw", "panic", "echo",
            "fill",
        ]
    }

    fn construct(&self, context: Context) -> Result<Rc<dyn Instance>, ClassError> {
        Ok(Rc::new(Relays { context }))
    }
}

struct Relays {
    context: Context,
}

impl Relays {
    fn stub(&self, args: &Args) -> Result<Stub, ClassError> {
        let class = args.text(0, "class")?.parse().unwrap();
        let name = args.text(1, "name")?.parse().unwrap();
        Ok(self.context.stub(&class, &name))
    }

    /// `call(class, name, method, args)`
    async fn call_other(&self, mut args: Args) -> Result<Json, ClassError> {
        let stub = self.stub(&args)?;
        let method = args.text(2, "method")?.to_owned();
        let Json::Array(values) = args.take(3) else {
            panic!("no arguments")
        };
        Ok(match stub.call(&method, values).await {
            Ok(value) => json!({ "ok": value }),
            Err(ClassError::Called(problem)) => json!({ "error": {
                "code": problem.code.to_string(),
                "detail": problem.detail,
                "retryable": problem.retryable,
                "remote": problem.remote,
            } }),
            Err(other) => return Err(other),
        })
    }

    /// `burst(class, name, method, count)`: that many calls at once, each with its number.
    async fn burst(&self, args: Args) -> Result<Json, ClassError> {
        let stub = self.stub(&args)?;
        let method = args.text(2, "method")?;
        let count = args.integer(3, "count")?.unwrap();
        let calls = (0..count).map(|number| stub.call(method, vec![number.into()]));
        let answers = futures_util::future::join_all(calls).await;
        answers.into_iter().collect()
    }

    /// `bounce(other, times)`: the other calls this one back, and so on.
    async fn bounce(&self, args: Args) -> Result<Json, ClassError> {
        let times = args.integer(1, "times")?.unwrap();
        if times == 0 {
            return Ok(0.into());
        }
        let me = self.context.name()?.unwrap();
        let other = args.text(0, "other")?.parse().unwrap();
        let stub = self.context.stub(self.context.class(), &other);
        let back = stub.call("bounce", vec![me.as_str().into(), (times - 1).into()]);
        Ok((back.await?.as_i64().unwrap() + 1).into())
    }

    fn list(&self) -> Result<Vec<Json>, ClassError> {
        let list = self.context.storage().kv_get("list")?;
        Ok(list.map_or_else(Vec::new, |entry| {
            serde_json::from_slice(&entry.value).unwrap()
        }))
    }

    /// `append(value)`: how many there are now.
    fn append(&self, value: Json) -> Result<Json, ClassError> {
        let mut list = self.list()?;
        list.push(value);
        let bytes = serde_json::to_vec(&list).unwrap();
        self.context.storage().kv_put("list", None, &bytes)?;
        Ok(list.len().into())
    }

    async fn hang(&self) -> Result<Json, ClassError> {
        self.context.storage().kv_put("hangs", None, b"1")?;
        std::future::pending().await
    }
}

impl Instance for Relays {
    fn fetch(self: Rc<Self>, _request: Request<Body>) -> Turn<Response<Body>> {
        Turn::Done(Err(ClassError::NotFound("no pages".to_owned())))
    }

    fn call(self: Rc<Self>, method: &str, mut args: Args) -> Turn<Json> {
        Turn::Done(match method {
            "call" => return Turn::run(async move { self.call_other(args).await }),
            "burst" => return Turn::run(async move { self.burst(args).await }),
            "bounce" => return Turn::run(async move { self.bounce(args).await }),
            "hang" => return Turn::run(async move { self.hang().await }),
            "hangs" => self
                .context
                .storage()
                .kv_get("hangs")
                .map(|found| found.is_some().into())
                .map_err(Into::into),
            "append" => self.append(args.take(0)),
            "list" => self.list().map(Json::from),
            "echo" => Ok(args.take(0)),
            "fill" => args
                .integer(0, "bytes")
                .map(|bytes| "x".repeat(bytes.unwrap().try_into().unwrap()).into()),
            "throw" => Err(ClassError::Thrown {
                name: "Error".to_owned(),
                message: "as asked".to_owned(),
            }),
            _ => panic!("as asked"),
        })
    }
}
