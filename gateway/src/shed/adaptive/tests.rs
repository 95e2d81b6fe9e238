use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

const RULE: Rule = Rule {
    in_flight_min: 4,
    in_flight_max: 10_000,
    tolerance: 2.0,
};

const WINDOW_US: u64 = 100_000;

/// A target that works on some requests at once, `service_us` each, and queues the others.
struct Target {
    at_once: usize,
    service_us: u64,
    /// When each of `at_once` is free again.
    free_at: Vec<u64>,
    /// Ends of what is under way, with their beginnings; ends come in order.
    under_way: VecDeque<(u64, u64)>,
}

/// What became of the requests of some time.
#[derive(Debug, Default)]
struct Outcome {
    answered: u32,
    refused: u32,
    slowest_us: u64,
}

impl Target {
    fn new(at_once: usize, service_us: u64) -> Self {
        Self {
            at_once,
            service_us,
            free_at: vec![0; at_once],
            under_way: VecDeque::new(),
        }
    }

    fn begin(&mut self, now: u64) {
        self.free_at.truncate(self.at_once);
        let place = (0..self.at_once).min_by_key(|place| self.free_at[*place]);
        let free_at = &mut self.free_at[place.unwrap()];
        *free_at = now.max(*free_at) + self.service_us;
        self.under_way.push_back((*free_at, now));
    }

    /// Requests come evenly, so many per second, for so many windows.
    fn run(&mut self, limit: &mut Adaptive, from: u64, windows: u64, per_second: u64) -> Outcome {
        let mut outcome = Outcome::default();
        let mut due = 0;
        for window in 0..windows {
            let (mut logs, mut samples, mut peak) = (0.0, 0_u32, 0);
            for step in 0..WINDOW_US / 100 {
                let now = from + window * WINDOW_US + step * 100;
                while self.under_way.front().is_some_and(|(end, _)| *end <= now) {
                    let (end, begun) = self.under_way.pop_front().unwrap();
                    logs += ((end - begun) as f64).ln();
                    samples += 1;
                    outcome.answered += 1;
                    outcome.slowest_us = outcome.slowest_us.max(end - begun);
                }
                due += per_second * 100;
                while due >= 1_000_000 {
                    due -= 1_000_000;
                    if self.under_way.len() < limit.limit() as usize {
                        self.begin(now);
                    } else {
                        outcome.refused += 1;
                    }
                }
                peak = peak.max(self.under_way.len());
            }
            if samples > 0 {
                limit.update(Window {
                    latency_us: (logs / f64::from(samples)).exp(),
                    in_flight_max: u32::try_from(peak).unwrap(),
                });
            }
        }
        outcome
    }
}

#[test]
fn a_target_within_its_means_is_never_limited() {
    let mut limit = Adaptive::new(RULE);
    let mut target = Target::new(8, 10_000);
    let outcome = target.run(&mut limit, 0, 2000, 700);
    assert_eq!(outcome.refused, 0, "{outcome:?}");
    assert_eq!(limit.limit(), RULE.in_flight_max);
}

#[test]
fn an_overload_is_cut_early_and_costs_the_target_nothing() {
    let mut limit = Adaptive::new(RULE);
    // 800 per second, and three times as many come.
    let mut target = Target::new(8, 10_000);
    target.run(&mut limit, 0, 20, 400);
    target.run(&mut limit, 20 * WINDOW_US, 20, 2400);
    let outcome = target.run(&mut limit, 40 * WINDOW_US, 600, 2400);
    // 60 seconds: nearly all that it can do is done, and nobody waits for long.
    assert!(outcome.answered > 60 * 800 * 95 / 100, "{outcome:?}");
    assert!(outcome.slowest_us < 40_000, "{outcome:?}");
    assert!(outcome.refused > 60 * 1500, "{outcome:?}");
}

#[test]
fn an_overload_from_the_first_moment_is_found_out() {
    let mut limit = Adaptive::new(RULE);
    let mut target = Target::new(8, 10_000);
    target.run(&mut limit, 0, 400, 2400);
    let outcome = target.run(&mut limit, 400 * WINDOW_US, 200, 2400);
    assert!(outcome.slowest_us < 60_000, "{outcome:?}");
    assert!(outcome.answered > 20 * 800 * 9 / 10, "{outcome:?}");
}

#[test]
fn after_an_overload_everybody_is_let_in_again() {
    let mut limit = Adaptive::new(RULE);
    let mut target = Target::new(8, 10_000);
    target.run(&mut limit, 0, 20, 400);
    target.run(&mut limit, 20 * WINDOW_US, 100, 2400);
    assert!(limit.limit() < 40, "{}", limit.limit());
    target.run(&mut limit, 120 * WINDOW_US, 10, 400);
    let outcome = target.run(&mut limit, 130 * WINDOW_US, 300, 700);
    assert_eq!(outcome.refused, 0, "{outcome:?}");
    assert_eq!(limit.limit(), RULE.in_flight_max);
}

#[test]
fn a_target_that_became_slower_is_not_refused_for_long() {
    let mut limit = Adaptive::new(RULE);
    let mut target = Target::new(64, 10_000);
    target.run(&mut limit, 0, 100, 400);
    // Every request takes ten times as long, and none waits.
    target.service_us = 100_000;
    target.run(&mut limit, 100 * WINDOW_US, 20, 400);
    let outcome = target.run(&mut limit, 120 * WINDOW_US, 300, 400);
    assert!(outcome.refused < 30 * 400 / 20, "{outcome:?}");
    assert!(limit.limit() > 100, "{}", limit.limit());
}

#[test]
fn a_target_with_fewer_places_gets_fewer_requests() {
    let mut limit = Adaptive::new(RULE);
    let mut target = Target::new(8, 10_000);
    target.run(&mut limit, 0, 100, 700);
    target.at_once = 2;
    target.run(&mut limit, 100 * WINDOW_US, 50, 700);
    let outcome = target.run(&mut limit, 150 * WINDOW_US, 300, 700);
    // With the least that may be under way, each takes 20 ms.
    assert!(outcome.slowest_us < 90_000, "{outcome:?}");
    assert!(outcome.answered > 30 * 200 * 9 / 10, "{outcome:?}");
}

#[test]
fn silence_is_taken_for_slowness_and_teaches_nothing() {
    let mut limit = Adaptive::new(RULE);
    assert_eq!(limit.silence_max_us(), None, "nothing is known yet");
    let window = |latency_us, in_flight_max| Window {
        latency_us,
        in_flight_max,
    };
    limit.update(window(1000.0, 10));
    assert_eq!(limit.silence_max_us(), Some(4000.0));
    limit.stalled(window(1_000_000.0, 500));
    assert_eq!(limit.limit(), 250);
    assert_eq!(limit.base_us(), Some(1000.0));
}

proptest! {
    #[test]
    fn the_limit_keeps_its_bounds(
        windows in prop::collection::vec((any::<f64>(), any::<u32>(), any::<bool>()), 0..2000),
        least in 1_u32..100,
        more in 0_u32..1000,
    ) {
        let rule = Rule { in_flight_min: least, in_flight_max: least + more, tolerance: 1.5 };
        let mut limit = Adaptive::new(rule);
        for (latency_us, in_flight_max, stalled) in windows {
            let window = Window { latency_us: latency_us.abs().clamp(0.0, 1e12), in_flight_max };
            if stalled { limit.stalled(window) } else { limit.update(window) }
            prop_assert!((rule.in_flight_min..=rule.in_flight_max).contains(&limit.limit()));
            prop_assert!(limit.limit.is_finite());
        }
    }
}

proptest! {
    // Each is a minute of requests.
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Whatever the target and the load, it does what it can, and nobody waits much longer than tolerated.
    #[test]
    fn any_overload_is_bounded(
        at_once in 4_usize..40,
        service_ms in 2_u64..50,
        overload in 2_u64..6,
    ) {
        let mut limit = Adaptive::new(RULE);
        let mut target = Target::new(at_once, service_ms * 1000);
        let capacity = at_once as u64 * 1000 / service_ms;
        target.run(&mut limit, 0, 30, capacity / 2);
        target.run(&mut limit, 30 * WINDOW_US, 60, capacity * overload);
        let outcome = target.run(&mut limit, 90 * WINDOW_US, 400, capacity * overload);
        prop_assert!(outcome.slowest_us < 8 * service_ms * 1000, "{outcome:?}");
        prop_assert!(u64::from(outcome.answered) > 40 * capacity * 85 / 100, "{outcome:?}");
    }
}
