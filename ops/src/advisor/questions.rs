//! Five questions before a class is written, and the four that decide in the end.
//!
//! Who owns the state, must all see the same at once, how often do objects talk to each other, can each sleep, and
//! how many are there? Then: is there state that somebody must own; must it be consistent; does one key at a time
//! suffice; does the load split by key? The answers give a verdict, each with its reasons.

use serde::Serialize;

/// What the state belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ownership {
    /// Nothing is remembered between requests.
    NoState,
    /// Each piece belongs to one user, room, document or session.
    OneOwner,
    /// Questions go across everything.
    Shared,
}

/// How fresh reads must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consistency {
    /// Everybody sees the last write at once.
    Strong,
    /// Some seconds old will do.
    Eventual,
}

/// How often the parts talk to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Talk {
    Rarely,
    /// For most requests, or many times a second.
    Constantly,
}

/// Whether a part has nothing to do most of the time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sleep {
    Can,
    /// It works all the time: a stream of messages, a long computation.
    Cannot,
}

/// How many parts there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Number {
    /// One for everything.
    One,
    /// Some to millions, and load grows with their number.
    Many,
}

/// The answers to the five questions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answers {
    pub ownership: Ownership,
    pub consistency: Consistency,
    pub talk: Talk,
    pub sleep: Sleep,
    pub number: Number,
}

/// What to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Object,
    Kv,
    Sql,
    Queue,
    Stateless,
}

impl Verdict {
    pub fn name(self) -> &'static str {
        match self {
            Self::Object => "object",
            Self::Kv => "kv",
            Self::Sql => "sql",
            Self::Queue => "queue",
            Self::Stateless => "stateless",
        }
    }

    /// What that is, here.
    pub fn says(self) -> &'static str {
        match self {
            Self::Object => "a class of objects, one per owner, named after it",
            Self::Kv => "a key-value store or a cache: reads from anywhere, some seconds old",
            Self::Sql => "a relational database, fed by objects where they own the writes",
            Self::Queue => "a queue (class Queue, or a broker) with consumers that take batches",
            Self::Stateless => {
                "a stateless app behind the gateway: a route to an upstream, no object"
            }
        }
    }
}

/// A verdict with its reasons.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Advice {
    pub verdict: Verdict,
    pub says: &'static str,
    /// Why, in order of weight.
    pub because: Vec<&'static str>,
    /// What to look at even so.
    pub beware: Vec<&'static str>,
}

/// Answers the checklist.
pub fn advise(answers: &Answers) -> Advice {
    let (verdict, because) = judge(answers);
    let mut beware = Vec::new();
    if verdict == Verdict::Object {
        if answers.number == Number::One {
            beware.push("one object for everything is one pair of hands: shard it before it takes 100 requests a second");
        }
        if answers.talk == Talk::Constantly {
            beware.push(
                "objects that talk for most requests may be one object: draw the boundary again",
            );
        }
        if answers.sleep == Sleep::Cannot {
            beware.push(
                "what never sleeps costs memory all the time: do the work in pieces, with alarms",
            );
        }
    }
    Advice {
        verdict,
        says: verdict.says(),
        because,
        beware,
    }
}

fn judge(answers: &Answers) -> (Verdict, Vec<&'static str>) {
    let Answers {
        ownership,
        consistency,
        talk,
        sleep,
        ..
    } = *answers;
    match (ownership, consistency) {
        (Ownership::NoState, _) if sleep == Sleep::Cannot => (
            Verdict::Queue,
            vec!["a stream of messages without owners", "it never sleeps"],
        ),
        (Ownership::NoState, _) => (
            Verdict::Stateless,
            vec!["there is no state that somebody must own"],
        ),
        (Ownership::Shared, Consistency::Strong) => (
            Verdict::Sql,
            vec![
                "questions go across everything",
                "and must see the last write",
            ],
        ),
        (Ownership::Shared, Consistency::Eventual) => (
            Verdict::Kv,
            vec!["everybody reads it", "and some seconds old will do"],
        ),
        (Ownership::OneOwner, _) if sleep == Sleep::Cannot && talk == Talk::Constantly => (
            Verdict::Queue,
            vec![
                "messages pass all the time",
                "and nothing ever sleeps: that is a broker",
            ],
        ),
        (Ownership::OneOwner, Consistency::Eventual) if talk == Talk::Constantly => (
            Verdict::Kv,
            vec!["many read what one owns", "and some seconds old will do"],
        ),
        (Ownership::OneOwner, _) => (
            Verdict::Object,
            vec![
                "each piece of state has one owner",
                "one thread and one database per owner make it consistent without locks",
            ],
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(name: &str, answers: (Ownership, Consistency, Talk, Sleep, Number), want: Verdict) {
        let (ownership, consistency, talk, sleep, number) = answers;
        let answers = Answers {
            ownership,
            consistency,
            talk,
            sleep,
            number,
        };
        let advice = advise(&answers);
        assert_eq!(advice.verdict, want, "{name}: {advice:?}");
        assert!(!advice.because.is_empty());
    }

    #[test]
    fn five_answers_give_five_verdicts() {
        use Consistency::{Eventual, Strong};
        use Number::{Many, One};
        use Ownership::{NoState, OneOwner, Shared};
        use Sleep::{Can, Cannot};
        use Talk::{Constantly, Rarely};
        check(
            "a chat room",
            (OneOwner, Strong, Rarely, Can, Many),
            Verdict::Object,
        );
        check(
            "settings that all read",
            (Shared, Eventual, Rarely, Can, One),
            Verdict::Kv,
        );
        check(
            "reports over all orders",
            (Shared, Strong, Rarely, Can, One),
            Verdict::Sql,
        );
        check(
            "a firehose of events",
            (OneOwner, Strong, Constantly, Cannot, One),
            Verdict::Queue,
        );
        check(
            "resizing pictures",
            (NoState, Eventual, Rarely, Can, Many),
            Verdict::Stateless,
        );
    }

    #[test]
    fn an_object_for_everything_comes_with_a_warning() {
        let answers = Answers {
            ownership: Ownership::OneOwner,
            consistency: Consistency::Strong,
            talk: Talk::Rarely,
            sleep: Sleep::Can,
            number: Number::One,
        };
        let advice = advise(&answers);
        assert_eq!(advice.verdict, Verdict::Object);
        assert!(advice.beware[0].contains("shard"), "{advice:?}");
    }
}
