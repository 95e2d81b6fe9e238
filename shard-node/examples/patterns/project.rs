//! A coordinator that delegates: a project knows its tasks by name, hands work to each, and sums up how they stand.

use std::rc::Rc;

use serde_json::json;
use shard_node::children::{Child, Children, Supervision};
use shard_node::class::{AlarmInfo, Args, ClassError, Context, Json, Turn};
use shard_node::classes::Classes;
use shard_node::schedules::{Due, Schedules};

use super::{Acts, Example, acting, check_health, class, fail_for, get, name, put};

const HOUR: u64 = 3_600_000;

pub(super) fn added_to(classes: Classes) -> Classes {
    let methods = &["plan", "assign", "status", "tasks", "alerts", "drop"];
    classes
        .with(Example::new("ProjectCoordinator", methods, Project::make).with_alarms())
        .with(Example::new(
            "Task",
            &["assign", "finish", "status", "fail_for"],
            |context| acting(Task { context }),
        ))
}

struct Project {
    context: Context,
    tasks: Children,
    schedules: Schedules,
}

impl Project {
    fn make(context: Context) -> Result<Rc<dyn shard_node::class::Instance>, ClassError> {
        let alerted = context.clone();
        // In the transaction that marks the task failed.
        let on_failed = move |task: &Child| {
            let error = task.error.as_deref().unwrap_or_default();
            put(&alerted, &format!("alert:{}", task.name), error)
        };
        acting(Self {
            tasks: Children::new(
                context.clone(),
                class("Task"),
                Supervision::default(),
                Rc::new(on_failed),
            ),
            schedules: Schedules::new(context.clone()),
            context,
        })
    }

    /// How all tasks stand: so many of each status, and which did not say.
    async fn status(&self) -> Result<Json, ClassError> {
        let round = self.tasks.call_all("status", &[]).await?;
        let mut by_status = std::collections::BTreeMap::<&str, u64>::new();
        for (_, status) in round.answers() {
            *by_status
                .entry(status.as_str().unwrap_or("unknown"))
                .or_default() += 1;
        }
        let failures: Vec<Json> = round
            .failures()
            .map(|(task, error)| json!({ "task": task.as_str(), "error": error.to_string() }))
            .collect();
        Ok(json!({ "tasks": by_status, "failures": failures }))
    }

    fn answer(&self, method: &str, args: &Args) -> Result<Json, ClassError> {
        match method {
            "plan" => {
                // The project's own use of its alarm, beside its tasks'.
                let next = self.context.unix_millis() + HOUR;
                self.schedules.once("review", next, Json::Null)?;
                Ok(self.tasks.add(&name(args, 0)?)?.into())
            }
            "drop" => Ok(self.tasks.remove(&name(args, 0)?)?.into()),
            "tasks" => Ok(json!(self.tasks.list(None, 1000)?)),
            _ => {
                let alert = get(&self.context, &format!("alert:{}", name(args, 0)?))?;
                Ok(json!({ "alert": alert, "reviewed": get(&self.context, "reviewed")? }))
            }
        }
    }
}

impl Acts for Project {
    fn act(self: Rc<Self>, method: &str, args: Args) -> Turn<Json> {
        match method {
            "status" => Turn::run(async move { self.status().await }),
            "assign" => Turn::run(async move {
                let to = args.text(1, "to")?.to_owned();
                self.tasks
                    .call(&name(&args, 0)?, "assign", vec![to.into()])
                    .await
            }),
            _ => Turn::Done(self.answer(method, &args)),
        }
    }

    fn alarm(self: Rc<Self>, info: AlarmInfo) -> Turn<()> {
        let context = self.context.clone();
        self.tasks.supervise(
            info,
            Rc::new(move |_: &Due| put(&context, "reviewed", "yes")),
        )
    }
}

/// One task. It knows nothing of its project.
struct Task {
    context: Context,
}

impl Acts for Task {
    fn act(self: Rc<Self>, method: &str, args: Args) -> Turn<Json> {
        Turn::Done(self.answer(method, &args))
    }
}

impl Task {
    fn answer(&self, method: &str, args: &Args) -> Result<Json, ClassError> {
        if method == "fail_for" {
            return fail_for(&self.context, args);
        }
        check_health(&self.context)?;
        match method {
            // Twice is as good as once.
            "assign" => put(&self.context, "to", args.text(0, "to")?)?,
            "finish" => put(&self.context, "done", "yes")?,
            _ => {
                let done = get(&self.context, "done")?.is_some();
                let assigned = get(&self.context, "to")?.is_some();
                return Ok(match (done, assigned) {
                    (true, _) => "done",
                    (false, true) => "assigned",
                    (false, false) => "open",
                }
                .into());
            }
        }
        Ok(Json::Null)
    }
}
