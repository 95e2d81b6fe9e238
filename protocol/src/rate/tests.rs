use proptest::prelude::*;

use super::*;

const SECOND: u64 = 1_000_000_000;

fn terms(algorithm: Algorithm, limit: u32, period: Duration, burst: u32) -> Terms {
    let terms = Terms {
        algorithm,
        limit: limit.try_into().unwrap(),
        period,
        burst: burst.try_into().unwrap(),
    };
    terms.check().unwrap();
    terms
}

fn gcra(limit: u32, seconds: u64, burst: u32) -> Gcra {
    Gcra::new(&terms(
        Algorithm::Gcra,
        limit,
        Duration::from_secs(seconds),
        burst,
    ))
}

fn sliding(limit: u32, period: Duration) -> SlidingWindow {
    SlidingWindow::new(&terms(Algorithm::SlidingWindow, limit, period, 1))
}

fn passes<R: Rate>(rate: R, state: &mut R::State, cost: u32, now: u64) -> bool {
    matches!(rate.take(state, cost, now), Decision::Passed { .. })
}

/// What a client gets that asks once per `step` until `end`.
fn admitted<R: Rate>(rate: R, step: u64, end: u64) -> Vec<u64> {
    let mut state = R::State::default();
    let times = (0..).map(|n| n * step).take_while(|now| *now < end);
    times
        .filter(|now| passes(rate, &mut state, 1, *now))
        .collect()
}

/// The most in any time of `span`.
fn densest(times: &[u64], span: u64) -> usize {
    let counts = times.iter().enumerate().map(|(first, start)| {
        times[first..]
            .iter()
            .take_while(|time| **time < start + span)
            .count()
    });
    counts.max().unwrap_or(0)
}

#[test]
fn a_bucket_lets_a_burst_pass_and_then_the_rate() {
    let times = admitted(gcra(2, 1, 5), SECOND / 100, 10 * SECOND);
    assert_eq!(times.len(), 5 + 19, "5 at once, then one per half second");
    assert_eq!(times[4], 4 * SECOND / 100);
    assert_eq!(times[5], SECOND / 2);
}

#[test]
fn the_wait_of_a_refusal_is_exact() {
    let rate = gcra(3, 60, 3);
    let mut state = [0];
    for _ in 0..3 {
        assert!(passes(rate, &mut state, 1, 7));
    }
    let Decision::Refused { wait } = rate.take(&mut state, 1, 7) else {
        panic!("a fourth passed");
    };
    assert_eq!(wait, 20 * SECOND);
    assert!(!passes(rate, &mut state, 1, 7 + wait - 1));
    assert!(passes(rate, &mut state, 1, 7 + wait));

    let rate = sliding(2, Duration::from_secs(9));
    let mut state = [0; 3];
    assert!(passes(rate, &mut state, 2, SECOND / 2));
    let Decision::Refused { wait } = rate.take(&mut state, 1, SECOND) else {
        panic!("a third passed");
    };
    assert!(!passes(rate, &mut state, 1, SECOND + wait - 1));
    assert!(passes(rate, &mut state, 1, SECOND + wait));
}

#[test]
fn a_limit_of_one_is_one() {
    assert_eq!(
        admitted(gcra(1, 10, 1), SECOND, 30 * SECOND),
        [0, 10 * SECOND, 20 * SECOND]
    );
    let times = admitted(sliding(1, Duration::from_secs(9)), SECOND / 10, 30 * SECOND);
    assert_eq!(times, [0, 10 * SECOND, 20 * SECOND]);
}

#[test]
fn more_than_ever_passes_at_once_is_refused_for_ever_and_takes_nothing() {
    let mut state = [0];
    let rate = gcra(10, 1, 10);
    let never = Decision::Refused { wait: NEVER };
    assert_eq!(rate.take(&mut state, 11, 5), never);
    assert_eq!(rate.take(&mut state, u32::MAX, 5), never);
    assert_eq!(rate.available(&state, 5), 10);
    let mut state = [0; 3];
    let rate = sliding(10, Duration::from_secs(1));
    assert_eq!(rate.take(&mut state, 11, 5), never);
    assert_eq!(rate.take(&mut state, u32::MAX, 5), never);
    assert_eq!(rate.available(&state, 5), 10);
}

#[test]
fn the_largest_terms_do_not_overflow() {
    let year = PERIOD_MAX;
    let late = u64::MAX / 2;
    let rate = Gcra::new(&terms(Algorithm::Gcra, u32::MAX, year, u32::MAX));
    let mut state = [0];
    assert!(passes(rate, &mut state, u32::MAX, 0));
    assert!(!passes(rate, &mut state, 1, 0));
    assert!(passes(rate, &mut state, u32::MAX, late));
    assert!(!passes(rate, &mut state, 1, late));
    let rate = sliding(SLIDING_LIMIT_MAX, year);
    let mut state = [0; 3];
    assert!(passes(rate, &mut state, SLIDING_LIMIT_MAX, late));
    assert!(!passes(rate, &mut state, 1, late));
}

#[test]
fn terms_out_of_bounds_are_named() {
    let refused = |algorithm, limit: u32, period, burst: u32, want: &str| {
        let terms = Terms {
            algorithm,
            limit: limit.try_into().unwrap(),
            period,
            burst: burst.try_into().unwrap(),
        };
        let error = terms.check().unwrap_err().to_string();
        assert!(error.contains(want), "{error:?} should say {want:?}");
    };
    let second = Duration::from_secs(1);
    refused(Algorithm::Gcra, 1, Duration::ZERO, 1, "period = 0ns");
    refused(Algorithm::Gcra, 1, PERIOD_MAX + second, 1, "must be from");
    refused(
        Algorithm::Gcra,
        20_000_000,
        PERIOD_MIN,
        1,
        "more than one per nanosecond",
    );
    refused(Algorithm::Gcra, 1, PERIOD_MAX, 2, "burst = 2 at limit = 1");
    refused(
        Algorithm::SlidingWindow,
        65_536,
        second,
        1,
        "limit = 65536 must be at most 65535",
    );
}

#[test]
fn keys_of_different_limits_have_different_hashes() {
    assert_ne!(key_hash("a", "b"), key_hash("ab", ""));
    assert_ne!(key_hash("a", "b"), key_hash("b", "a"));
    assert_eq!(
        format!("{:032x}", key_hash("per-user", "SFO:ada")),
        "5aa513a2f73c02c9f3195156bceaa0ba",
        "golden"
    );
}

proptest! {
    /// The naive model: a number that grows with time and shrinks with what passes.
    #[test]
    fn a_bucket_is_a_bucket(
        limit in 1u32..50, seconds in 1u64..90, burst in 1u32..60,
        asks in prop::collection::vec((0u64..3 * SECOND, 0u32..4), 1..200),
    ) {
        let rate = gcra(limit, seconds, burst);
        let every = (seconds * SECOND).div_ceil(u64::from(limit));
        let full = u128::from(every) * u128::from(burst);
        let (mut level, mut now, mut state) = (full, 0, [0]);
        for (pause, cost) in asks {
            now += pause;
            level = full.min(level + u128::from(pause));
            let price = u128::from(every) * u128::from(cost);
            prop_assert_eq!(u128::from(rate.available(&state, now)), level / u128::from(every));
            let passed = passes(rate, &mut state, cost, now);
            prop_assert_eq!(passed, price <= level);
            if passed {
                level -= price;
            }
        }
    }

    #[test]
    fn a_bucket_never_lets_more_pass_than_it_says_even_if_the_clock_goes_back(
        limit in 1u32..20, burst in 1u32..20,
        asks in prop::collection::vec((0u64..SECOND, prop::option::weighted(0.1, 0u64..100 * SECOND)), 1..300),
    ) {
        let rate = gcra(limit, 10, burst);
        let (mut real, mut behind, mut state) = (0, 0, [0]);
        let mut passed = Vec::new();
        for (pause, back) in asks {
            real += pause;
            behind += back.unwrap_or(0);
            let clock = (1_000_000 * SECOND + real) - behind;
            if passes(rate, &mut state, 1, clock) {
                passed.push(real);
            }
        }
        for (first, start) in passed.iter().enumerate() {
            for (before, end) in passed[first..].iter().enumerate() {
                let allowed = u64::from(burst) + (end - start) * u64::from(limit) / (10 * SECOND);
                prop_assert!((before as u64) < allowed, "{} in {}", before + 1, end - start);
            }
        }
    }

    #[test]
    fn a_window_never_holds_more_than_the_limit_and_refuses_only_what_is_near_it(
        limit in 1u32..30,
        start in prop_oneof![Just(0u64), Just(1_763_000_000 * SECOND)],
        asks in prop::collection::vec((0u64..SECOND, prop::option::weighted(0.05, 0u64..100 * SECOND)), 1..300),
    ) {
        let period = 9 * SECOND;
        let rate = sliding(limit, Duration::from_nanos(period));
        let (mut real, mut behind, mut state) = (0, 0, [0; 3]);
        let mut passed: Vec<u64> = Vec::new();
        for (pause, back) in asks {
            real += pause;
            behind += back.unwrap_or(0).min(start / 1000);
            let clock = (start + real) - behind;
            if passes(rate, &mut state, 1, clock) {
                passed.push(real);
            } else if behind == 0 {
                let lately = passed.iter().filter(|time| real - **time <= period / 9 * 10).count();
                prop_assert!(lately >= limit as usize, "refused after {lately}");
            }
        }
        prop_assert!(densest(&passed, period) <= limit as usize);
    }

    #[test]
    fn what_is_given_back_can_be_taken_again_and_no_more(
        taken in prop::collection::vec((0u64..SECOND, 1u32..4), 1..20),
    ) {
        fn check<R: Rate>(rate: R, taken: &[(u64, u32)]) -> Result<(), TestCaseError> {
            let (mut state, mut now, mut receipts) = (R::State::default(), 50 * SECOND, Vec::new());
            for (pause, cost) in taken {
                now += pause;
                let before = rate.available(&state, now);
                if passes(rate, &mut state, *cost, now) {
                    let mut again = state;
                    rate.give_back(&mut again, *cost, now);
                    prop_assert_eq!(rate.available(&again, now), before);
                    receipts.push((*cost, now));
                }
            }
            for (cost, at) in receipts {
                rate.give_back(&mut state, cost, at);
            }
            prop_assert_eq!(rate.recovers_in(&state, now), 0);
            Ok(())
        }
        check(gcra(10, 20, 15), &taken)?;
        check(sliding(15, Duration::from_secs(30)), &taken)?;
    }

    #[test]
    fn a_merged_state_lets_pass_no_more_than_either(
        one in prop::collection::vec(0u64..20 * SECOND, 0..10),
        other in prop::collection::vec(0u64..20 * SECOND, 0..10),
        later in 0u64..20 * SECOND,
    ) {
        fn check<R: Rate>(rate: R, one: &[u64], other: &[u64], later: u64) -> Result<(), TestCaseError> {
            let charged = |times: &[u64]| {
                let mut times = times.to_vec();
                times.sort_unstable();
                let mut state = R::State::default();
                for time in times {
                    rate.take(&mut state, 1, time);
                }
                state
            };
            let (one, other) = (charged(one), charged(other));
            let mut merged = one;
            rate.merge(&mut merged, &other, 20 * SECOND);
            let now = 20 * SECOND + later;
            let least = rate.available(&one, now).min(rate.available(&other, now));
            prop_assert!(rate.available(&merged, now) <= least);
            Ok(())
        }
        check(gcra(5, 10, 10), &one, &other, later)?;
        check(sliding(10, Duration::from_secs(9)), &one, &other, later)?;
    }
}
