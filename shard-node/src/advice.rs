//! What the advisor makes of a node, for metrics: the worst level of each rule. Which objects and classes these are,
//! `/advisor` says.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use metrics::{Gauge, describe_gauge, gauge};
use ops::advisor::{self, Level, Seen, rules};
use ops::metrics::Registry;
use tracing::warn;

use crate::operator::Operator;

/// Pause between two looks of a worker. One takes some ten milliseconds, in pieces, however many objects there are.
const LOOK_EVERY: Duration = Duration::from_secs(60);

/// What the workers of a node saw last, judged together: a share of a class's requests means nothing for one of them.
pub(crate) struct Advice {
    seen: Mutex<BTreeMap<u16, Seen>>,
    levels: Vec<(&'static str, Gauge)>,
}

impl Advice {
    pub(crate) fn new(registry: &Registry) -> Arc<Self> {
        let levels = registry.register(|| {
            describe_gauge!(
                "shard_advisor_level",
                "Worst finding of a rule of the advisor at this node: 0 green, 1 yellow, 2 yellow_high, 3 red"
            );
            let level = |rule: &&'static str| (*rule, gauge!("shard_advisor_level", "rule" => *rule));
            rules::RULES.iter().map(level).collect()
        });
        Arc::new(Self {
            seen: Mutex::default(),
            levels,
        })
    }

    /// A worker has looked again.
    fn hear(&self, worker: u16, seen: Seen) {
        let mut all = Seen::default();
        {
            let mut known = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            known.insert(worker, seen);
            for seen in known.values() {
                all.add(seen.clone());
            }
        }
        let findings = advisor::report(&all).findings;
        for (rule, gauge) in &self.levels {
            let of_rule = findings.iter().filter(|finding| finding.rule == *rule);
            let worst = of_rule.map(|finding| finding.level).max();
            gauge.set(number(worst.unwrap_or_default()));
        }
    }

    /// Looks at what one worker does, for ever.
    pub(crate) async fn follow(self: Arc<Self>, worker: u16, operator: Rc<Operator>) {
        loop {
            match operator.seen().await {
                Ok(seen) => self.hear(worker, seen),
                Err(problem) => {
                    warn!(
                        worker,
                        problem = problem.detail,
                        "what the advisor looks at could not be read; tried again"
                    );
                }
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

fn number(level: Level) -> f64 {
    match level {
        Level::Green => 0.0,
        Level::Yellow => 1.0,
        Level::YellowHigh => 2.0,
        Level::Red => 3.0,
    }
}

#[cfg(test)]
mod tests {
    use ops::advisor::{ClassSeen, ObjectSeen};

    use super::*;

    fn seen(all: f64, of_one: f64) -> Seen {
        Seen {
            classes: vec![ClassSeen {
                class: "Room".to_owned(),
                calls_per_second: all,
                ..ClassSeen::default()
            }],
            objects: vec![ObjectSeen {
                class: "Room".to_owned(),
                requests_per_second: Some(of_one),
                ..ObjectSeen::default()
            }],
            ..Seen::default()
        }
    }

    #[track_caller]
    fn check(registry: &Registry, rule: &str, level: u32) {
        let metrics = registry.handle().render();
        let line = format!("shard_advisor_level{{rule=\"{rule}\"}} {level}\n");
        assert!(metrics.contains(&line), "{line}{metrics}");
    }

    #[test]
    fn the_level_of_a_rule_is_the_worst_of_the_whole_node_as_it_is_now() {
        let registry = Registry::default();
        let advice = Advice::new(&registry);
        for rule in rules::RULES {
            check(&registry, rule, 0);
        }
        // All of what this worker does, and more than an object should.
        advice.hear(0, seen(600.0, 600.0));
        check(&registry, "K1", 3);
        check(&registry, "K10", 3);
        // A tenth of what both do.
        advice.hear(1, seen(5400.0, 50.0));
        check(&registry, "K1", 3);
        check(&registry, "K10", 0);
        advice.hear(0, seen(300.0, 200.0));
        check(&registry, "K1", 1);
        advice.hear(0, seen(90.0, 50.0));
        check(&registry, "K1", 0);
    }
}
