//! What was acknowledged, and so must be there.
//!
//! A counter belongs to all connections. In databases and maps every connection writes a *cell* of
//! its own: a row, or a key, that holds how often it was written. So what a read may answer is known to
//! the digit, and a lost, repeated or reordered write shows. After a write with an unknown outcome, which may
//! still arrive, the connection goes on with a new cell.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::operation::Store;
use crate::report::Verification;

/// Writes of one counter or cell.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Counts {
    pub(crate) acknowledged: u64,
    /// Sent, and each may or may not have happened.
    pub(crate) unknown: u64,
}

/// One row or key, by the number of its writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct Cell {
    pub(crate) store: Store,
    pub(crate) object: u32,
    pub(crate) writer: u64,
}

/// The books of one process, or of several added up.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    pub(crate) counters: HashMap<u32, Counts>,
    pub(crate) sharded: HashMap<u32, Counts>,
    /// Increments whose answers are still awaited.
    under_way: HashMap<u32, u64>,
    pub(crate) cells: HashMap<Cell, Counts>,
    pub(crate) wrong_answers: u64,
    /// The first of them.
    pub(crate) wrong_answer: Option<String>,
}

impl Ledger {
    /// An increment is about to be sent; how many of the counter are acknowledged by now.
    pub(crate) fn begin_increment(&mut self, object: u32) -> u64 {
        *self.under_way.entry(object).or_default() += 1;
        self.acknowledged(object)
    }

    pub(crate) fn end_increment(&mut self, object: u32) {
        if let Some(under_way) = self.under_way.get_mut(&object) {
            *under_way = under_way.saturating_sub(1);
        }
    }

    /// Acknowledged increments of a counter.
    pub(crate) fn acknowledged(&self, object: u32) -> u64 {
        self.counters
            .get(&object)
            .map_or(0, |counts| counts.acknowledged)
    }

    /// The most that a counter can hold by now, if nobody else writes it.
    pub(crate) fn possible(&self, object: u32) -> u64 {
        let counts = self.counters.get(&object).copied().unwrap_or_default();
        let under_way = self.under_way.get(&object).copied().unwrap_or_default();
        counts.acknowledged + counts.unknown + under_way
    }

    pub(crate) fn wrong(&mut self, what: String) {
        self.wrong_answers += 1;
        self.wrong_answer.get_or_insert(what);
    }

    pub(crate) fn add(&mut self, other: Self) {
        add_up(&mut self.counters, other.counters);
        add_up(&mut self.sharded, other.sharded);
        // Writers have different numbers in every process.
        self.cells.extend(other.cells);
        self.wrong_answers += other.wrong_answers;
        self.wrong_answer = self.wrong_answer.take().or(other.wrong_answer);
    }
}

fn add_up(sums: &mut HashMap<u32, Counts>, more: HashMap<u32, Counts>) {
    for (object, counts) in more {
        let sum = sums.entry(object).or_default();
        sum.acknowledged += counts.acknowledged;
        sum.unknown += counts.unknown;
    }
}

/// A ledger between processes: JSON has no maps with such keys.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct LedgerLines {
    counters: Vec<(u32, Counts)>,
    sharded: Vec<(u32, Counts)>,
    cells: Vec<(Cell, Counts)>,
    wrong_answers: u64,
    wrong_answer: Option<String>,
}

impl From<Ledger> for LedgerLines {
    fn from(ledger: Ledger) -> Self {
        Self {
            counters: ledger.counters.into_iter().collect(),
            sharded: ledger.sharded.into_iter().collect(),
            cells: ledger.cells.into_iter().collect(),
            wrong_answers: ledger.wrong_answers,
            wrong_answer: ledger.wrong_answer,
        }
    }
}

impl From<LedgerLines> for Ledger {
    fn from(lines: LedgerLines) -> Self {
        Self {
            counters: lines.counters.into_iter().collect(),
            sharded: lines.sharded.into_iter().collect(),
            under_way: HashMap::new(),
            cells: lines.cells.into_iter().collect(),
            wrong_answers: lines.wrong_answers,
            wrong_answer: lines.wrong_answer,
        }
    }
}

impl Verification {
    /// Compares what is there with the books; `None`: it could not be read.
    pub(crate) fn add(&mut self, counts: Counts, total: Option<u64>) {
        self.acknowledged += counts.acknowledged;
        self.unknown += counts.unknown;
        if let Some(total) = total {
            self.found += total.min(counts.acknowledged);
            self.surplus += total.saturating_sub(counts.acknowledged + counts.unknown);
        }
    }

    pub(crate) fn merge(&mut self, part: &Self) {
        self.acknowledged += part.acknowledged;
        self.found += part.found;
        self.surplus += part.surplus;
        self.unknown += part.unknown;
        self.objects += part.objects;
        self.unread += part.unread;
        self.wrong_answers += part.wrong_answers;
        if self.wrong_answer.is_none() {
            self.wrong_answer.clone_from(&part.wrong_answer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_or_repeated_increment_fails_the_verification() {
        let judged = |acknowledged, unknown, total| {
            let mut verification = Verification::default();
            let counts = Counts {
                acknowledged,
                unknown,
            };
            verification.add(counts, Some(total));
            verification.passed()
        };
        assert!(judged(5, 0, 5));
        assert!(!judged(5, 0, 4), "one is lost");
        assert!(!judged(5, 0, 6), "one was counted twice");
        assert!(
            judged(5, 2, 5) && judged(5, 2, 7),
            "each unknown one may be in or not"
        );
        assert!(!judged(5, 2, 8));
    }

    #[test]
    fn books_of_several_processes_add_up() {
        let ledger = |acknowledged, writer| {
            let mut ledger = Ledger::default();
            let counts = Counts {
                acknowledged,
                unknown: 1,
            };
            ledger.counters.insert(7, counts);
            let cell = Cell {
                store: Store::Kv,
                object: 7,
                writer,
            };
            ledger.cells.insert(cell, counts);
            ledger
        };
        let mut sum = ledger(3, 1);
        let sent = serde_json::to_string(&LedgerLines::from(ledger(4, 2))).unwrap();
        sum.add(serde_json::from_str::<LedgerLines>(&sent).unwrap().into());
        assert_eq!((sum.acknowledged(7), sum.possible(7)), (7, 9));
        assert_eq!(sum.cells.len(), 2);
    }
}
