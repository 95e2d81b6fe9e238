//! Limits that several gateways share: an object decides, and a gateway leases.
//!
//! With scope `colo` a gateway takes some of a key at once and spends them without asking, until a *lease*
//! (a tenth of a period) after it asked. It begins with one, and doubles what it asks for while that does
//! not last for a lease, up to a tenth of what may pass at once. With scope `exact` it takes one at a
//! time. In both, the wait of a refusal is remembered: nothing could pass before it is over, so nobody asks.
//!
//! What a gateway leased and did not spend is lost with the lease, and so is what a gateway that dies
//! had: fewer pass, never more.

mod courier;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use dashmap::{DashMap, Entry};
use http::HeaderValue;
use protocol::Colo;
use protocol::limiter::{Ask, Grant};
use tokio::runtime::Handle;

use self::courier::Couriers;
use super::Outcome;
use super::config::{LimitConfig, Scope};
use crate::placement::Placement;

/// After this time somebody else may ask for more, if whoever did has not come back.
const ASKING_MAX: u64 = 1_000_000_000;

/// How limiter objects are reached.
#[derive(Clone)]
pub struct Link {
    pub placement: Arc<Placement>,
    pub token: Option<HeaderValue>,
    pub colo: Colo,
    /// Where the tasks run that ask.
    pub runtime: Handle,
}

/// One limit whose keys are decided elsewhere.
pub struct Shared {
    couriers: Couriers,
    leases: Leases,
}

/// What this gateway knows of the keys of a limit.
struct Leases {
    keys: DashMap<u128, Lease>,
    /// Keys in the map; its own count would lock all of it.
    count: AtomicUsize,
    keys_max: usize,
    /// Nanoseconds.
    lease: u64,
    /// Most of one key at once.
    batch_max: u32,
    /// Scope `colo`: what is left may be spent later.
    leases_more: bool,
    /// Before this time it is of no use to look for leases that are over.
    full_until: AtomicU64,
}

/// What this gateway may spend of a key.
#[derive(Debug, Clone, Copy, Default)]
struct Lease {
    left: u32,
    /// `left` is lost at this time.
    until: u64,
    refused_until: u64,
    /// How many were asked for at last.
    batch: u32,
    /// Somebody asks for a batch, and is back by then.
    asking_until: u64,
}

impl Lease {
    fn is_over(&self, now: u64) -> bool {
        now >= self.until && now >= self.refused_until && now >= self.asking_until
    }
}

/// What is known here.
enum Local {
    Decided(Outcome),
    Ask { most: u32 },
}

impl Shared {
    pub(super) fn new(name: &str, config: &LimitConfig, link: &Link) -> Self {
        let place = match config.scope {
            Scope::Exact => "exact",
            Scope::Colo | Scope::Process => link.colo.as_str(),
        };
        let terms = config.shared_terms();
        Self {
            couriers: Couriers::start(place, name, terms, config.scope, link),
            leases: Leases::new(config),
        }
    }

    /// Keys that something is known of here.
    pub(super) fn keys(&self) -> usize {
        self.leases.count.load(Ordering::Relaxed)
    }

    /// Takes one. Asks the object only if nothing is known here.
    pub(super) async fn take(&self, key: u128, now: u64) -> Outcome {
        let most = match self.leases.look(key, now) {
            Local::Decided(outcome) => return outcome,
            Local::Ask { most } => most,
        };
        match self.couriers.ask(Ask { key, most }).await {
            None => Outcome::Unreachable,
            Some(grant) => self.leases.learn(key, now, grant),
        }
    }

    /// A request was refused by another limit. What an object decided by itself stays taken.
    pub(super) fn give_back(&self, key: u128) {
        if self.leases.leases_more {
            self.leases
                .keep(key, |lease| lease.left = lease.left.saturating_add(1));
        }
    }
}

impl Leases {
    fn new(config: &LimitConfig) -> Self {
        Self {
            keys: DashMap::new(),
            count: AtomicUsize::new(0),
            keys_max: config.keys_max.get() as usize,
            lease: nanos(config.lease()),
            batch_max: match config.scope {
                Scope::Colo => (config.terms().at_once() / 10).max(1),
                Scope::Exact | Scope::Process => 1,
            },
            leases_more: config.scope == Scope::Colo,
            full_until: AtomicU64::new(0),
        }
    }

    /// The object granted this to a question that was asked at `asked`. One of it is spent at once.
    fn learn(&self, key: u128, asked: u64, grant: Grant) -> Outcome {
        match grant.taken.checked_sub(1) {
            Some(left) => {
                self.keep(key, |lease| {
                    lease.asking_until = 0;
                    // From the time of the question on: the object may have taken it at once.
                    let until = asked.saturating_add(self.lease);
                    // What somebody else got meanwhile must not last longer for that.
                    lease.until = match lease.left {
                        0 => until,
                        _ => lease.until.min(until),
                    };
                    lease.left = lease.left.saturating_add(left);
                });
                Outcome::Passed
            }
            None => {
                self.keep(key, |lease| {
                    lease.asking_until = 0;
                    lease.refused_until = asked.saturating_add(grant.wait);
                });
                Outcome::Refused { wait: grant.wait }
            }
        }
    }

    fn look(&self, key: u128, now: u64) -> Local {
        let is_full = self.is_full(now);
        match self.keys.entry(key) {
            Entry::Occupied(mut entry) => self.spend(entry.get_mut(), now),
            Entry::Vacant(_) if is_full => Local::Ask { most: 1 },
            Entry::Vacant(entry) => {
                self.count.fetch_add(1, Ordering::Relaxed);
                entry.insert(Lease {
                    batch: 1,
                    asking_until: now.saturating_add(ASKING_MAX),
                    ..Lease::default()
                });
                Local::Ask { most: 1 }
            }
        }
    }

    fn spend(&self, lease: &mut Lease, now: u64) -> Local {
        let lasts = now < lease.until;
        if !lasts {
            lease.left = 0;
        }
        // First: one may have been refused while another got a batch.
        if let Some(left) = lease.left.checked_sub(1) {
            lease.left = left;
            return Local::Decided(Outcome::Passed);
        }
        if now < lease.refused_until {
            let wait = lease.refused_until - now;
            return Local::Decided(Outcome::Refused { wait });
        }
        if now < lease.asking_until {
            return Local::Ask { most: 1 };
        }
        // What was spent before its time was too little; what was not was too much.
        lease.batch = match lasts {
            true => lease.batch.saturating_mul(2).min(self.batch_max),
            false => (lease.batch / 2).max(1),
        };
        lease.asking_until = now.saturating_add(ASKING_MAX);
        Local::Ask { most: lease.batch }
    }

    fn keep(&self, key: u128, change: impl FnOnce(&mut Lease)) {
        if let Some(mut lease) = self.keys.get_mut(&key) {
            change(&mut lease);
        }
    }

    /// Whether there is no room for another key. Leases that are over leave first, but that is looked for
    /// once per lease at the most.
    fn is_full(&self, now: u64) -> bool {
        if self.count.load(Ordering::Relaxed) < self.keys_max {
            return false;
        }
        let full_until = self.full_until.load(Ordering::Relaxed);
        let next = now.saturating_add(self.lease);
        let mine = now >= full_until
            && self
                .full_until
                .compare_exchange(full_until, next, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok();
        if mine {
            self.keys.retain(|_, lease| !lease.is_over(now));
            self.count.store(self.keys.len(), Ordering::Relaxed);
        }
        self.count.load(Ordering::Relaxed) >= self.keys_max
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use protocol::rate::{Decision, Gcra, Rate, SlidingWindow};

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// What a limiter object does with an ask.
    fn grant<R: Rate>(rate: R, state: &mut R::State, most: u32, now: u64) -> Grant {
        let taken = most.min(rate.available(state, now));
        match rate.take(state, taken.max(1), now) {
            Decision::Passed { .. } => Grant { taken, wait: 0 },
            Decision::Refused { wait } => Grant { taken: 0, wait },
        }
    }

    fn limit(algorithm: &str, limit: u32) -> LimitConfig {
        toml::from_str(&format!(
            "key = 'k'\nlimit = {limit}\nperiod = '10s'\nscope = 'colo'\nalgorithm = '{algorithm}'"
        ))
        .unwrap()
    }

    /// Gateways before one object. Each step: which gateway is asked, after which pause, how long its
    /// question is under way if it must ask, and whether it dies and starts again before. Gives the times
    /// of what passed.
    fn run<R: Rate>(config: &LimitConfig, rate: R, steps: &[(usize, u64, u64, bool)]) -> Vec<u64> {
        let start = || Leases::new(config);
        let mut gateways = [start(), start(), start()];
        let mut state = R::State::default();
        let mut passed = Vec::new();
        let mut now = 0;
        for (number, pause, delay, dies) in steps {
            now += pause;
            if *dies {
                gateways[*number] = start();
            }
            let leases = &gateways[*number];
            let outcome = match leases.look(7, now) {
                Local::Decided(outcome) => outcome,
                Local::Ask { most } => {
                    let asked = now;
                    // It decides while the question is under way, and the answer comes later still.
                    let granted = grant(rate, &mut state, most, now + delay / 2);
                    now += delay;
                    leases.learn(7, asked, granted)
                }
            };
            if outcome == Outcome::Passed {
                passed.push(now);
            }
        }
        passed
    }

    fn steps() -> impl Strategy<Value = Vec<(usize, u64, u64, bool)>> {
        let pause = prop_oneof![0u64..SECOND / 50, 0u64..2 * SECOND];
        let step = (
            0usize..3,
            pause,
            0u64..SECOND / 100,
            prop::bool::weighted(0.05),
        );
        prop::collection::vec(step, 1..400)
    }

    proptest! {
        #[test]
        fn gateways_of_a_colo_stay_within_the_inequality(limited in 1u32..60, steps in steps()) {
            let config = limit("gcra", limited);
            let passed = run(&config, Gcra::new(&config.shared_terms()), &steps);
            // An answer is under way for at most 10 ms here, and counts as spent when it arrives.
            let lease = nanos(config.lease()) + SECOND / 100;
            for (first, start) in passed.iter().enumerate() {
                for (before, end) in passed[first..].iter().enumerate() {
                    let time = u128::from(end - start + lease);
                    let most = u128::from(limited)
                        + time * u128::from(limited) / u128::from(10 * SECOND);
                    prop_assert!((before as u128) < most, "{} in {}", before + 1, end - start);
                }
            }
        }

        #[test]
        fn a_shared_window_holds_the_limit_in_any_period(limited in 1u32..60, steps in steps()) {
            let config = limit("sliding_window", limited);
            let passed = run(&config, SlidingWindow::new(&config.shared_terms()), &steps);
            // Less what an answer is under way.
            let period = 10 * SECOND - SECOND / 100;
            for (first, start) in passed.iter().enumerate() {
                let within = passed[first..].iter().take_while(|time| **time < start + period);
                prop_assert!(within.count() <= limited as usize);
            }
        }
    }

    #[test]
    fn a_busy_key_is_asked_for_seldom_and_a_quiet_one_gives_nothing_away() {
        let mut config = limit("gcra", 1000);
        let rate = Gcra::new(&config.shared_terms());
        let leases = Leases::new(&config);
        let (mut state, mut asks) = ([0], 0);
        for now in (0..500).map(|n| n * SECOND / 1000) {
            if let Local::Ask { most } = leases.look(7, now) {
                asks += 1;
                leases.learn(7, now, grant(rate, &mut state, most, now));
            }
        }
        assert!((5..20).contains(&asks), "{asks} questions for 500 requests");
        // Of scope `exact` each is one.
        config.scope = Scope::Exact;
        let leases = Leases::new(&config);
        for now in 0..10 {
            assert!(matches!(leases.look(7, now), Local::Ask { most: 1 }));
            leases.learn(7, now, Grant { taken: 1, wait: 0 });
        }
    }
}
