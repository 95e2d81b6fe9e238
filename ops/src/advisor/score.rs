//! How near a class is to a perfect object: twelve lines, as far as they can be measured.

use serde::{Deserialize, Serialize};

use super::{ClassSeen, Finding, Level, Seen};

/// The lines that hold, of those that could be judged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Score {
    pub holds: u32,
    pub of: u32,
    pub lines: Vec<Line>,
}

/// One line of the checklist; without `holds` it is for people to judge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    pub line: String,
    pub holds: Option<bool>,
    pub why: String,
}

/// Scores a class by what was seen of it, and what the rules found.
pub fn score(seen: &Seen, class: &ClassSeen, findings: &[Finding]) -> Score {
    let of_class = findings.iter().filter(|found| found.class == class.class);
    let judge = Judge {
        class,
        findings: of_class.collect(),
        busy: class.requests_per_second() > 0.0,
    };
    let mut lines = judge.what_it_is();
    lines.extend(judge.what_it_does(uses_calls(seen, class)));
    let holds = lines.iter().filter(|line| line.holds == Some(true)).count();
    let of = lines.iter().filter(|line| line.holds.is_some()).count();
    let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    Score {
        holds: number(holds),
        of: number(of),
        lines,
    }
}

/// What the lines are judged by.
struct Judge<'a> {
    class: &'a ClassSeen,
    findings: Vec<&'a Finding>,
    /// Something happened to it lately.
    busy: bool,
}

impl Judge<'_> {
    fn what_it_is(&self) -> Vec<Line> {
        let class = self.class;
        let exists = class.objects > 0;
        let calls = class.fetches_per_second + class.calls_per_second;
        let named = class.objects - class.unnamed.min(class.objects);
        let large: u64 = class.objects_by_bytes[1..].iter().sum();
        let many_keys = class.objects_by_keys[0];
        let overloaded = self
            .findings
            .iter()
            .any(|found| found.level == Level::Red && ["K1", "K10"].contains(&found.rule.as_str()));
        vec![
            line(
                "owns one thing",
                self.busy.then_some(!overloaded),
                "no object takes the load of many".to_owned(),
            ),
            line(
                "has a name that follows from what it is",
                exists.then_some(2 * named >= class.objects),
                format!("{named} of {} objects have a name", class.objects),
            ),
            line(
                "keeps its state in SQLite",
                Some(true),
                "there is nothing else".to_owned(),
            ),
            line(
                "is called by methods (RPC), not by HTTP",
                (calls > 0.0).then_some(class.calls_per_second >= class.fetches_per_second),
                format!(
                    "{:.2} calls and {:.2} HTTP requests a second",
                    class.calls_per_second, class.fetches_per_second
                ),
            ),
            line(
                "has fewer than 100 keys and 10 MB",
                exists.then_some(large + many_keys == 0),
                format!("{large} objects of 10 MB or more, {many_keys} with 100 keys or more"),
            ),
        ]
    }

    fn what_it_does(&self, uses_calls: bool) -> Vec<Line> {
        let by_people = |text: &str, why: &str| line(text, None, why.to_owned());
        vec![
            self.by_rules("is woken rarely", &["K4"], self.busy),
            self.by_rules("does real work when it wakes", &["H13"], self.busy),
            self.by_rules("sleeps", &["K12"], true),
            self.by_rules(
                "works with others by calls, and seldom",
                &["K6", "K11", "K13"],
                self.busy,
            ),
            self.by_rules(
                "is parent or child, not peer of many",
                &["K6"],
                self.busy && uses_calls,
            ),
            by_people(
                "can be rebuilt from its storage",
                "for people to judge: evict it in a test",
            ),
            by_people("is the authority, not a cache", "for people to judge"),
        ]
    }

    /// Holds if none of the rules found anything.
    fn by_rules(&self, text: &str, rules: &[&str], known: bool) -> Line {
        if !known {
            return line(text, None, "nothing of that happened lately".to_owned());
        }
        let is_broken = |rule: &&&str| self.findings.iter().any(|found| found.rule == **rule);
        let broken: Vec<&str> = rules.iter().filter(is_broken).copied().collect();
        let why = match broken.as_slice() {
            [] => format!("{} green", rules.join(", ")),
            broken => format!("see {}", broken.join(", ")),
        };
        line(text, Some(broken.is_empty()), why)
    }
}

fn line(line: &str, holds: Option<bool>, why: String) -> Line {
    Line {
        line: line.to_owned(),
        holds,
        why,
    }
}

fn uses_calls(seen: &Seen, class: &ClassSeen) -> bool {
    let objects = seen
        .objects
        .iter()
        .filter(|object| object.class == class.class);
    class.object_calls_per_second > 0.0 || { objects }.any(|object| object.fan_out.is_some())
}
