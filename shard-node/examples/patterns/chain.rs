//! A chain: each stage does its part and calls the next one. The first caller awaits once, and the answer comes back
//! through all of them, with the time that each hop took.

use std::rc::Rc;

use protocol::ClassName;
use serde_json::json;
use shard_node::class::{Args, ClassError, Context, Json, Turn};
use shard_node::classes::Classes;

use super::{Acts, Example, acting, check_health, class, fail_for, get, put};

const METHODS: &[&str] = &["pass", "passed", "fail_for"];

pub(super) fn added_to(classes: Classes) -> Classes {
    classes
        .with(Example::new("Intake", METHODS, |context| {
            stage(context, Some(class("Review")))
        }))
        .with(Example::new("Review", METHODS, |context| {
            stage(context, Some(class("Publish")))
        }))
        .with(Example::new("Publish", METHODS, |context| {
            stage(context, None)
        }))
}

fn stage(
    context: Context,
    next: Option<ClassName>,
) -> Result<Rc<dyn shard_node::class::Instance>, ClassError> {
    acting(Stage { context, next })
}

struct Stage {
    context: Context,
    next: Option<ClassName>,
}

impl Stage {
    /// `pass(document)`. May be repeated: what a stage has done is done.
    async fn pass(&self, document: Json) -> Result<Json, ClassError> {
        check_health(&self.context)?;
        put(&self.context, "passed", &document.to_string())?;
        let Some(next) = &self.next else {
            return Ok(json!({ "document": document, "hops": [] }));
        };
        // All stages of one document have its name.
        let unnamed = || ClassError::BadRequest("a document has a name".to_owned());
        let name = self.context.name()?.ok_or_else(unnamed)?;
        let sent_ms = self.context.unix_millis();
        // It leaves when what was written above is durable.
        let mut answer = self
            .context
            .stub(next, &name)
            .call("pass", vec![document])
            .await?;
        let took_ms = self.context.unix_millis().saturating_sub(sent_ms);
        if let Some(hops) = answer["hops"].as_array_mut() {
            hops.insert(0, json!({ "to": next.as_str(), "ms": took_ms }));
        }
        Ok(answer)
    }
}

impl Acts for Stage {
    fn act(self: Rc<Self>, method: &str, mut args: Args) -> Turn<Json> {
        match method {
            "pass" => Turn::run(async move { self.pass(args.take(0)).await }),
            "fail_for" => Turn::Done(fail_for(&self.context, &args)),
            _ => Turn::Done(get(&self.context, "passed").map(Json::from)),
        }
    }
}
