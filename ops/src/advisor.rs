//! The advisor: which classes and objects are used for what they are not good at, and what to do instead.
//!
//! Workers say what they have [seen]; whoever was asked adds that up and [judges](report) it by
//! [rules] with [`Thresholds`]. Nothing here does I/O, and nothing grows with the number of objects: workers
//! name the busiest and the largest.

pub mod questions;
pub mod rules;
pub mod score;
pub mod seen;
mod thresholds;

use serde::{Deserialize, Serialize};

pub use seen::{ClassSeen, ObjectSeen, Seen};
pub use thresholds::{KEYS_RED_MAX, Thresholds};

/// How good a use is. `yellow_high` is where the published table has a gap below red.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    #[default]
    Green,
    Yellow,
    YellowHigh,
    Red,
}

impl Level {
    pub const ALL: [Self; 4] = [Self::Green, Self::Yellow, Self::YellowHigh, Self::Red];

    pub fn name(self) -> &'static str {
        match self {
            Self::Green => "green",
            Self::Yellow => "yellow",
            Self::YellowHigh => "yellow_high",
            Self::Red => "red",
        }
    }
}

/// What is not green of one class or object.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    pub level: Level,
    /// The row of the table of heuristics, such as `K1`.
    pub rule: String,
    /// What was measured, such as `requests_per_second`.
    pub what: String,
    pub class: String,
    /// The object, if it is one object's.
    pub object: Option<ObjectNamed>,
    pub value: f64,
    /// The threshold that the value passed.
    pub limit: f64,
    /// What is seen, in words.
    pub says: String,
    /// What to use instead.
    pub pattern: String,
    pub advice: String,
}

/// Which object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectNamed {
    pub id: String,
    pub name: Option<String>,
}

/// One class: its worst level, and how near it is to a perfect object.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassReport {
    pub class: String,
    pub level: Level,
    pub seen: ClassSeen,
    pub score: score::Score,
}

/// A rule that nothing can be said of, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotMeasured {
    pub rule: String,
    pub why: String,
}

/// What `/advisor` answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub level: Level,
    /// The worst first.
    pub findings: Vec<Finding>,
    pub classes: Vec<ClassReport>,
    pub not_measured: Vec<NotMeasured>,
}

/// Judges what all workers have seen.
pub fn report(seen: &Seen) -> Report {
    let mut findings = rules::findings(seen);
    findings.sort_by(|left, right| {
        let worst_first = right.level.cmp(&left.level);
        worst_first
            .then_with(|| left.class.cmp(&right.class))
            .then_with(|| left.rule.cmp(&right.rule))
            .then_with(|| right.value.total_cmp(&left.value))
    });
    let worst = |class: &str| {
        let of_class = findings.iter().filter(|finding| finding.class == class);
        of_class.map(|finding| finding.level).max()
    };
    let classes = seen.classes.iter().map(|class| ClassReport {
        level: worst(&class.class).unwrap_or_default(),
        score: score::score(seen, class, &findings),
        class: class.class.clone(),
        seen: class.clone(),
    });
    Report {
        level: findings.first().map_or(Level::Green, |first| first.level),
        classes: classes.collect(),
        not_measured: rules::not_measured(),
        findings,
    }
}

#[cfg(test)]
mod tests;
