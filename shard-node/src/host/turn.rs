//! The beginning of a turn: an event handed to its object's instance, and what an alarm's turn has besides.

use std::rc::Rc;
use std::time::Duration;

use protocol::ClassName;

use super::Host;
use crate::alarm::AlarmInfo;
use crate::alarms::Firing;
use crate::class::{AlarmHandler, ClassError, Json, Turn};
use crate::object::Object;
use crate::object::mailbox::{Event, Reply};
use crate::storage::NumberedAlarm;
use crate::usage::Of;

impl Host {
    /// Hands an event to the instance.
    pub(super) fn begin(&self, object: &Object, event: Event) -> Result<Turn<Reply>, ClassError> {
        let meter = object.context.storage().meter();
        Ok(match event {
            Event::Fetch(request) => {
                meter.count(Of::Fetches, 1);
                map_turn(object.instance()?.fetch(request), Reply::Response)
            }
            Event::Call { method, args } => {
                meter.count(Of::Calls, 1);
                let instance = object.instance()?;
                let methods = object.class.methods();
                if !methods.contains(&method.as_ref()) {
                    return Err(no_method(object.class.name(), &method, methods));
                }
                map_turn(instance.call(&method, args), Reply::Value)
            }
            Event::Alarm(firing) => map_turn(self.begin_alarm(object, &firing)?, |()| {
                Reply::Value(Json::Null)
            }),
            Event::Operate(operation) => Turn::Done(operation(&object.context).map(Reply::Value)),
        })
    }

    /// Runs the alarm's handler if the alarm is due, and takes the alarm away with its success.
    fn begin_alarm(&self, object: &Object, firing: &Firing) -> Result<Turn<()>, ClassError> {
        let context = &object.context;
        let mut alarm = context.storage().alarm()?;
        let is_due = |alarm: &NumberedAlarm| {
            let pending = alarm.state.pending;
            pending.is_some_and(|pending| pending.next_ms <= context.unix_millis())
        };
        let instance = if is_due(&alarm) {
            let instance = object.instance()?;
            // Its constructor may have set another.
            alarm = context.storage().alarm()?;
            Some(instance)
        } else {
            None
        };
        let due = alarm
            .state
            .pending
            .filter(|pending| pending.next_ms <= context.unix_millis());
        let (Some(due), Some(instance)) = (due, instance) else {
            // It was changed, or never became durable.
            let next_ms = alarm.state.pending.map(|pending| pending.next_ms);
            self.timers.set(object.id(), next_ms);
            return Ok(Turn::Done(Ok(())));
        };
        self.timers.count_begun(due.next_ms);
        context.storage().meter().count(Of::Alarms, 1);
        firing.number.set(Some(alarm.number));
        context.begin_alarm(alarm.number);
        let info = AlarmInfo {
            scheduled_ms: due.scheduled_ms,
            retry_count: due.retries,
        };
        let class = object.class.name().clone();
        let metrics = Rc::clone(&self.metrics);
        Ok(match context.in_alarm(|| instance.alarm(info)) {
            Turn::Done(Ok(())) => {
                let idle = !context.storage().has_written();
                context.end_alarm()?;
                metrics.alarm(&class, if idle { "idle" } else { "done" });
                if idle {
                    context.storage().meter().count(Of::IdleAlarms, 1);
                }
                self.hot
                    .alarm_ended(context.id(), idle, context.unix_millis());
                Turn::Done(Ok(()))
            }
            Turn::Done(Err(error)) => {
                context.drop_alarm_run();
                Turn::Done(Err(error))
            }
            Turn::Running(handler) => {
                let run_time_max = self.config.alarms.run_time_max;
                let hot = Rc::clone(&self.hot);
                let context = context.clone();
                let handler = AlarmHandler {
                    context: context.clone(),
                    handler,
                };
                Turn::run(async move {
                    let ended = tokio::time::timeout(run_time_max, handler).await;
                    context.drop_alarm_run();
                    ended.unwrap_or_else(|_| Err(ran_too_long(run_time_max)))?;
                    metrics.alarm(&class, "done");
                    // It waited for something: that is work.
                    hot.alarm_ended(context.id(), false, context.unix_millis());
                    Ok(())
                })
            }
        })
    }
}

fn ran_too_long(run_time_max: Duration) -> ClassError {
    ClassError::Thrown {
        name: "TimeoutError".to_owned(),
        message: format!(
            "the alarm handler ran longer than alarms.run_time_max = {run_time_max:?}"
        ),
    }
}

fn no_method(class: &ClassName, method: &str, methods: &[&str]) -> ClassError {
    ClassError::NotFound(format!(
        "class {class} has no method {method:?}; it has {}",
        methods.join(", ")
    ))
}

fn map_turn<T: 'static>(turn: Turn<T>, into: fn(T) -> Reply) -> Turn<Reply> {
    match turn {
        Turn::Done(result) => Turn::Done(result.map(into)),
        Turn::Running(future) => Turn::run(async move { future.await.map(into) }),
    }
}
