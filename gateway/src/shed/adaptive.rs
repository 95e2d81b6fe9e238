//! How many requests may be under way at a target, from how long they take: pure, no clock.
//!
//! The rule is a *gradient*, as in Netflix's concurrency-limits (`Gradient2Limit`) and Envoy's adaptive
//! concurrency filter. By Little's law a target that does `X` requests per second and needs `T` for each when
//! nothing waits has `X · T` under way; whatever is more than that waits in its queues, and shows as
//! latency. So, window by window:
//!
//! * latency at most `tolerance` times the *base*: the limit grows by one and a little;
//! * above that: the limit falls in proportion, at most by half, from what was really under way.
//!
//! The base is what requests take when nothing waits. It is the lowest latency of the last minute or so,
//! but a target that is always busy never shows it. So where the limit was needed, it is lowered to
//! `in_flight_min` for some windows, as BBR does to measure a path, and what is seen then is the new base;
//! the same if it got there by itself and requests are still slow: then they are slow, and do not wait. It
//! follows that requests which are let in take about `tolerance` times what they take with `in_flight_min`
//! under way, at worst.
//!
//! A target begins without a limit, and gets there again: only latency that was seen refuses anybody.

/// Weight of a new window in the mean of windows.
const SMOOTHING: f64 = 0.5;

/// The limit falls by no more than this factor in one window.
const GRADIENT_MIN: f64 = 0.5;

/// It grows by this factor, and by one, while nothing is wrong: from 10 to 10,000 in half a minute at most.
const GROWTH: f64 = 1.03;

/// Windows after which the lowest latency is forgotten, or measured again; at least 100 ms each.
const BASE_WINDOWS: u32 = 300;

/// While the base is measured: windows in which what waited before is answered, and the one that counts.
const PROBE_WINDOWS: u32 = 3;

/// Windows at the least limit after which slowness is no sign of waiting.
const AT_MIN_WINDOWS: u32 = 5;

/// What is known of a target since the last window.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Window {
    /// The geometric mean of the times until the heads of answers: a single slow one does not move it, and
    /// twice as slow weighs as much as twice as fast.
    pub latency_us: f64,
    /// Most requests that were under way at once.
    pub in_flight_max: u32,
}

/// Bounds of a limit, and what it follows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rule {
    pub in_flight_min: u32,
    pub in_flight_max: u32,
    pub tolerance: f64,
}

/// The limit of one target.
#[derive(Debug, Clone)]
pub struct Adaptive {
    rule: Rule,
    limit: f64,
    smooth_us: Option<f64>,
    /// Lowest `smooth_us` since the last [`BASE_WINDOWS`] began, and in those before.
    lowest_us: f64,
    lowest_before_us: f64,
    windows: u32,
    /// The limit was lowered since the last [`BASE_WINDOWS`] began.
    was_needed: bool,
    at_min: u32,
    probe: Option<Probe>,
}

/// The base is being measured.
#[derive(Debug, Clone, Copy)]
struct Probe {
    windows: u32,
    /// The limit to go back to.
    limit: f64,
}

impl Adaptive {
    pub fn new(rule: Rule) -> Self {
        Self {
            rule,
            limit: f64::from(rule.in_flight_max),
            smooth_us: None,
            lowest_us: f64::INFINITY,
            lowest_before_us: f64::INFINITY,
            windows: 0,
            was_needed: false,
            at_min: 0,
            probe: None,
        }
    }

    /// Requests that may be under way.
    pub fn limit(&self) -> u32 {
        // In range: the bounds are u32, and the limit stays between them.
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "from in_flight_min to in_flight_max"
        )]
        let limit = self.limit as u32;
        limit.clamp(self.rule.in_flight_min, self.rule.in_flight_max)
    }

    /// What requests take when nothing waits, as far as known.
    pub fn base_us(&self) -> Option<f64> {
        let base = self.lowest_us.min(self.lowest_before_us);
        base.is_finite().then_some(base)
    }

    /// Silence that is as good as an answer so late: whoever was under way before it waits longer than is
    /// tolerated. `None` while nothing is known of the target.
    pub fn silence_max_us(&self) -> Option<f64> {
        Some(2.0 * self.rule.tolerance * self.base_us()?)
    }

    /// Nothing was answered for so long, though requests are under way. Nothing is learned of the base.
    pub fn stalled(&mut self, window: Window) {
        if let Some(base) = self.base_us() {
            self.fall(window, self.rule.tolerance * base / window.latency_us);
        }
    }

    /// A window ended in which there were answers.
    pub fn update(&mut self, window: Window) {
        let latency = window.latency_us.max(1.0);
        if let Some(probe) = self.probe {
            return self.go_on_probing(probe, latency);
        }
        let smooth = match self.smooth_us {
            Some(smooth) => smooth + (latency - smooth) * SMOOTHING,
            None => latency,
        };
        self.smooth_us = Some(smooth);
        self.lowest_us = self.lowest_us.min(smooth);
        self.windows += 1;
        let tolerated = self.rule.tolerance * self.base_us().unwrap_or(smooth);
        if smooth <= tolerated {
            self.at_min = 0;
            if 2.0 * f64::from(window.in_flight_max) < self.limit {
                self.was_needed = false;
            }
            let grown = self.limit * GROWTH + 1.0;
            self.limit = grown.min(f64::from(self.rule.in_flight_max));
        } else {
            self.fall(window, tolerated / smooth);
            self.look_at_min(smooth);
        }
        if self.windows >= BASE_WINDOWS {
            self.renew_base();
        }
    }

    fn fall(&mut self, window: Window, gradient: f64) {
        let used = self.limit.min(f64::from(window.in_flight_max));
        let fallen = used * gradient.clamp(GRADIENT_MIN, 1.0);
        self.limit = fallen.max(f64::from(self.rule.in_flight_min));
        self.was_needed = true;
    }

    /// If nothing waits and requests are slow all the same, that is what they take.
    fn look_at_min(&mut self, smooth: f64) {
        if self.limit > f64::from(self.rule.in_flight_min) {
            self.at_min = 0;
            return;
        }
        self.at_min += 1;
        if self.at_min >= AT_MIN_WINDOWS {
            self.set_base(smooth);
        }
    }

    fn set_base(&mut self, latency: f64) {
        self.smooth_us = Some(latency);
        self.lowest_us = latency;
        self.lowest_before_us = latency;
        self.windows = 0;
        self.was_needed = false;
        self.at_min = 0;
    }

    fn renew_base(&mut self) {
        if self.was_needed {
            self.probe = Some(Probe {
                windows: 0,
                limit: self.limit,
            });
            self.limit = f64::from(self.rule.in_flight_min);
        } else {
            self.lowest_before_us = self.lowest_us;
            self.lowest_us = f64::INFINITY;
            self.windows = 0;
        }
    }

    fn go_on_probing(&mut self, probe: Probe, latency: f64) {
        let windows = probe.windows + 1;
        if windows < PROBE_WINDOWS {
            self.probe = Some(Probe { windows, ..probe });
            return;
        }
        self.probe = None;
        self.limit = probe.limit;
        self.set_base(latency);
    }
}

#[cfg(test)]
mod tests;
