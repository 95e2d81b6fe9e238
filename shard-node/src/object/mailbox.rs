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
    /// Afterwards nobody waits for the answer: it is not worth beginning.
    pub(crate) deadline: Option<Instant>,
}

/// Events in the order of their arrival.
pub(crate) struct Mailbox {
    letters: VecDeque<Letter>,
    capacity: usize,
    wait_max: Duration,
    /// No letter has a deadline before this one.
    next_deadline: Option<Instant>,
}

impl Mailbox {
    pub(crate) fn new(config: &MailboxConfig) -> Self {
        Self {
            letters: VecDeque::new(),
            capacity: config.capacity.get() as usize,
            wait_max: config.wait_max,
            next_deadline: None,
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
        let deadlines = [self.next_deadline, letter.deadline];
        self.next_deadline = deadlines.into_iter().flatten().min();
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

    /// A letter that waited for longer than it may, and what its sender is told: nothing ran.
    pub(crate) fn pop_overdue(&mut self, now: Instant) -> Option<(Letter, Problem)> {
        let waited = |letter: &Letter| now.saturating_duration_since(letter.arrived);
        if self
            .letters
            .front()
            .is_some_and(|first| waited(first) > self.wait_max)
        {
            let problem = not_started(format!(
                "the request waited {:?} for its object and was not started",
                self.wait_max
            ));
            return Some((self.letters.pop_front()?, problem));
        }
        // Seldom true, so seldom searched.
        if self.next_deadline.is_none_or(|next| next > now) {
            return None;
        }
        let over = |letter: &Letter| letter.deadline.is_some_and(|deadline| deadline <= now);
        let Some(place) = self.letters.iter().position(over) else {
            let deadlines = self.letters.iter().filter_map(|letter| letter.deadline);
            self.next_deadline = deadlines.min();
            return None;
        };
        let letter = self.letters.remove(place)?;
        let problem = not_started(format!(
            "the deadline of the request was over after it had waited {:?} for its object; it was not started",
            waited(&letter)
        ));
        Some((letter, problem))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.letters.is_empty()
    }
}

/// `timed_out`, where nothing ran.
fn not_started(detail: String) -> Problem {
    Problem {
        retryable: true,
        ..Problem::new(ErrorCode::TimedOut, detail)
    }
}
