//! The bounded queue before an object.

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use http::{Request, Response};
use protocol::{ErrorCode, Problem};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::alarms::Firing;
use crate::class::{Args, Body, ClassError, Context, Json};
use crate::config::MailboxConfig;

/// What may happen to an object.
#[expect(
    clippy::large_enum_variant,
    reason = "moved twice on its way; a box would be one more allocation per request"
)]
pub enum Event {
    Fetch(Request<Body>),
    Call {
        method: Box<str>,
        args: Args,
    },
    /// The object's alarm is due, unless it was changed meanwhile.
    Alarm(Rc<Firing>),
    /// A turn of the system around the class: nothing of the class runs.
    Operate(Operation),
}

/// What such a turn does, as one transaction.
pub type Operation = Box<dyn FnOnce(&Context) -> Result<Json, ClassError>>;

/// What an object gives back.
pub enum Reply {
    Response(Response<Body>),
    Value(Json),
}

pub type Answer = Result<Reply, Problem>;

/// One event on its way.
pub(crate) struct Letter {
    pub(crate) event: Event,
    pub(crate) reply: oneshot::Sender<Answer>,
    pub(crate) arrived: Instant,
}

/// Events in the order of their arrival.
pub(crate) struct Mailbox {
    letters: VecDeque<Letter>,
    capacity: usize,
    wait_max: Duration,
}

impl Mailbox {
    pub(crate) fn new(config: &MailboxConfig) -> Self {
        Self {
            letters: VecDeque::new(),
            capacity: config.capacity.get() as usize,
            wait_max: config.wait_max,
        }
    }

    /// Queues a letter, or gives it back with the refusal.
    pub(crate) fn push(&mut self, letter: Letter) -> Result<(), Problem> {
        if self.letters.len() >= self.capacity {
            return Err(Problem::new(
                ErrorCode::Overloaded,
                format!(
                    "{} requests wait for this object already",
                    self.letters.len()
                ),
            ));
        }
        self.letters.push_back(letter);
        Ok(())
    }

    /// The next letter is a turn of the system, which has a commit of its own: a bookmark before it says
    /// exactly what was before it.
    pub(crate) fn operates_next(&self) -> bool {
        let next = self.letters.front();
        next.is_some_and(|letter| matches!(letter.event, Event::Operate(_)))
    }

    pub(crate) fn pop(&mut self) -> Option<Letter> {
        self.letters.pop_front()
    }

    /// The next letter that waited for longer than allowed.
    pub(crate) fn pop_overdue(&mut self, now: Instant) -> Option<Letter> {
        let overdue = |letter: &Letter| now.duration_since(letter.arrived) > self.wait_max;
        self.letters
            .front()
            .is_some_and(overdue)
            .then(|| self.letters.pop_front())?
    }

    pub(crate) fn overdue_problem(&self) -> Problem {
        Problem {
            retryable: true,
            ..Problem::new(
                ErrorCode::TimedOut,
                format!(
                    "the request waited {:?} for its object and was not started",
                    self.wait_max
                ),
            )
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.letters.is_empty()
    }
}
