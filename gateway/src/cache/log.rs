//! Which tags were purged, in order: what this gateway tells others, and what says of an answer that was
//! asked for earlier whether it may still be kept.

use std::collections::VecDeque;

use super::Tag;

/// Purges remembered, some 2 MiB. Who asks for older ones, or stores what was asked for before them, begins anew.
const REMEMBERED: usize = 65_536;

/// More purges than this while one answer came: it is not kept, rather than compared with all of them.
const COMPARED_MAX: u64 = 4096;

/// Purges so far; a count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Moment(pub u64);

/// The latest purges.
#[derive(Debug, Default)]
pub(super) struct PurgeLog {
    count: u64,
    /// The latest last, each with whether it began here: what came from others, they tell each other.
    recent: VecDeque<(Tag, bool)>,
}

impl PurgeLog {
    pub(super) fn now(&self) -> Moment {
        Moment(self.count)
    }

    pub(super) fn push(&mut self, tag: Tag, ours: bool) {
        if self.recent.len() == REMEMBERED {
            self.recent.pop_front();
        }
        self.recent.push_back((tag, ours));
        self.count += 1;
    }

    /// Those after a moment; `None` if they are not remembered, or lie ahead.
    fn after(&self, moment: Moment) -> Option<impl Iterator<Item = (Tag, bool)>> {
        let missing = usize::try_from(self.count.checked_sub(moment.0)?).ok()?;
        let skipped = self.recent.len().checked_sub(missing)?;
        Some(self.recent.range(skipped..).copied())
    }

    /// What others should hear that know everything up to a moment.
    pub(super) fn ours_after(&self, moment: Moment) -> Option<Vec<Tag>> {
        let after = self.after(moment)?;
        Some(
            after
                .filter_map(|(tag, ours)| ours.then_some(tag))
                .collect(),
        )
    }

    /// Whether any of the tags was purged after a moment, as far as one can tell.
    pub(super) fn purged_since(&self, moment: Moment, tags: &[Tag]) -> bool {
        if self.count.saturating_sub(moment.0) > COMPARED_MAX {
            return true;
        }
        match self.after(moment) {
            None => true,
            Some(mut after) => after.any(|(tag, _)| tag == Tag::EVERYTHING || tags.contains(&tag)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tag(name: &str) -> Tag {
        Tag::named(name)
    }

    #[test]
    fn purges_are_told_in_order_and_only_those_that_began_here() {
        let mut log = PurgeLog::default();
        log.push(tag("a"), true);
        let moment = log.now();
        log.push(tag("b"), false);
        log.push(tag("c"), true);
        assert_eq!(log.ours_after(Moment(0)), Some(vec![tag("a"), tag("c")]));
        assert_eq!(log.ours_after(moment), Some(vec![tag("c")]));
        assert_eq!(log.ours_after(log.now()), Some(vec![]));
        assert_eq!(log.ours_after(Moment(4)), None, "it lies ahead");
        assert!(log.purged_since(moment, &[tag("x"), tag("b")]));
        assert!(!log.purged_since(moment, &[tag("a")]));
    }

    #[test]
    fn what_is_forgotten_counts_as_purged() {
        let mut log = PurgeLog::default();
        for _ in 0..=REMEMBERED {
            log.push(tag("x"), true);
        }
        assert_eq!(log.ours_after(Moment(0)), None);
        assert!(log.purged_since(Moment(0), &[tag("y")]));
        let old = Moment(log.now().0 - COMPARED_MAX - 1);
        assert!(log.purged_since(old, &[tag("y")]));
        let recent = Moment(log.now().0 - COMPARED_MAX);
        assert!(!log.purged_since(recent, &[tag("y")]));
    }
}
