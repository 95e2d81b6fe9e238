//! The alarm, as a class sets it and as its handler ends.

use std::future::Future;
use std::pin::Pin;
use std::task::{self, Poll};

use futures_util::future::LocalBoxFuture;

use super::{AlarmRun, ClassError, Context};
use crate::alarm::{ALARM_MILLIS_MAX, AlarmState, Pending};
use crate::storage::StorageError;

impl Context {
    /// Sets the alarm, instead of any that is set. A time that has passed is due at once.
    ///
    /// In the alarm's own handler this counts when the handler has succeeded, in the commit that ends it; a
    /// `transaction` of storage that fails there does not undo it.
    /// (<https://developers.cloudflare.com/durable-objects/api/alarms/>)
    ///
    /// # Errors
    /// The class has no alarm handler, or the time is beyond the year 9999.
    pub fn set_alarm(&self, unix_millis: u64) -> Result<(), ClassError> {
        if !self.0.handles_alarms {
            return Err(ClassError::Thrown {
                name: "TypeError".to_owned(),
                message: format!(
                    "class {} has no alarm handler, so its alarm cannot be set",
                    self.0.class
                ),
            });
        }
        if unix_millis > ALARM_MILLIS_MAX {
            return Err(ClassError::BadRequest(format!(
                "an alarm at {unix_millis} ms must be at most at {ALARM_MILLIS_MAX} ms, in the year 9999"
            )));
        }
        self.change_alarm(Some(unix_millis))
    }

    /// Cancels the alarm, if one is set. A handler that is under way goes on.
    pub fn delete_alarm(&self) -> Result<(), ClassError> {
        self.change_alarm(None)
    }

    /// When the alarm runs next, in milliseconds since 1970; `None` if none is set, and while its handler
    /// runs, unless it was set again.
    pub fn alarm(&self) -> Result<Option<u64>, StorageError> {
        let run = self.0.alarm_run.get();
        if self.0.in_alarm.get()
            && let Some(AlarmRun { set: Some(set), .. }) = run
        {
            return Ok(set);
        }
        let alarm = self.0.storage.alarm()?;
        let under_way = run.is_some_and(|run| run.number == alarm.number);
        let pending = alarm.state.pending.filter(|_| !under_way);
        Ok(pending.map(|pending| pending.next_ms))
    }

    fn change_alarm(&self, at: Option<u64>) -> Result<(), ClassError> {
        if at.is_some() {
            // As it is billed.
            self.0.storage.meter().pair_written(0);
        }
        if self.0.in_alarm.get()
            && let Some(run) = self.0.alarm_run.get()
        {
            let set = Some(at);
            self.0.alarm_run.set(Some(AlarmRun { set, ..run }));
            return Ok(());
        }
        self.replace_alarm(at)
    }

    /// Sets the alarm with this stretch, even in its own handler: whatever becomes of the handler, this is
    /// another alarm, with all its tries.
    pub(crate) fn replace_alarm(&self, at: Option<u64>) -> Result<(), ClassError> {
        let state = self.0.storage.alarm()?.state;
        if at.is_none() && state.pending.is_none() {
            return Ok(());
        }
        let pending = at.map(first_try);
        let state = AlarmState { pending, ..state };
        Ok(self.0.storage.write_alarm(&state, true)?)
    }

    /// The handler of alarm `number` begins.
    pub(crate) fn begin_alarm(&self, number: i64) {
        self.0.alarm_run.set(Some(AlarmRun { number, set: None }));
    }

    /// Runs a stretch of the alarm's handler.
    pub(crate) fn in_alarm<T>(&self, f: impl FnOnce() -> T) -> T {
        struct Leave<'a>(&'a Context);
        impl Drop for Leave<'_> {
            fn drop(&mut self) {
                self.0.0.in_alarm.set(false);
            }
        }
        // Also if `f` panics.
        let _leave = Leave(self);
        self.0.in_alarm.set(true);
        f()
    }

    /// Whether what runs now is a stretch of the alarm's handler.
    pub(crate) fn is_in_alarm(&self) -> bool {
        self.0.in_alarm.get()
    }

    /// The handler failed, or was given up: what it made of the alarm counts no more.
    pub(crate) fn drop_alarm_run(&self) {
        self.0.alarm_run.set(None);
    }

    /// The handler succeeded: the alarm becomes what the handler made of it, in the transaction of the
    /// handler's last stretch.
    pub(crate) fn end_alarm(&self) -> Result<(), StorageError> {
        let Some(run) = self.0.alarm_run.take() else {
            return Ok(());
        };
        let alarm = self.0.storage.alarm()?;
        let replaced = alarm.number != run.number;
        let current = alarm.state.pending.filter(|_| replaced);
        let set = run.set.flatten().map(first_try);
        // Two turns of one object may have set it meanwhile: the earlier time loses nothing.
        let pending = current
            .into_iter()
            .chain(set)
            .min_by_key(|pending| pending.next_ms);
        if pending == current && replaced {
            return Ok(());
        }
        let dead = alarm.state.dead;
        let state = AlarmState { pending, dead };
        self.0.storage.write_alarm(&state, true)
    }
}

fn first_try(unix_millis: u64) -> Pending {
    Pending {
        scheduled_ms: unix_millis,
        next_ms: unix_millis,
        retries: 0,
    }
}

/// A handler that awaits: its stretches run as those of the alarm, and its end is the alarm's.
pub(crate) struct AlarmHandler {
    pub(crate) context: Context,
    pub(crate) handler: LocalBoxFuture<'static, Result<(), ClassError>>,
}

impl Future for AlarmHandler {
    type Output = Result<(), ClassError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<Self::Output> {
        let Self { context, handler } = &mut *self;
        let polled = context.in_alarm(|| handler.as_mut().poll(cx));
        polled.map(|result| result.and_then(|()| Ok(context.end_alarm()?)))
    }
}
