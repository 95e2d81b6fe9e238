//! One server of a pool, and what is known of how it does.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use pingora_core::upstreams::peer::HttpPeer;
use tokio::time::Instant;

use crate::config::{EjectConfig, HealthConfig};

/// One address. Lives as long as it is in the pool, whatever else changes there.
#[derive(Debug)]
pub struct Server {
    pub address: SocketAddr,
    pub weight: u8,
    /// How to connect; requests take copies.
    pub peer: HttpPeer,
    /// For sticky cookies.
    pub tag: String,
    /// Requests under way; counted only where the choice depends on it.
    pub(super) active: AtomicU32,
    /// What asking it said last, thresholds applied.
    well: AtomicBool,
    /// Answers in a row that contradict `well`.
    contradictions: AtomicU32,
    /// Requests in a row that failed.
    failures: AtomicU32,
    /// Milliseconds after `born` until which it is left out.
    ejected_until: AtomicU64,
    born: Instant,
}

/// How a request went, as far as it concerns the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Success,
    Failure,
}

impl Server {
    pub fn new(address: SocketAddr, weight: u8, peer: HttpPeer) -> Self {
        Self {
            address,
            weight,
            peer,
            tag: format!(
                "{:016x}",
                xxhash_rust::xxh3::xxh3_64(address.to_string().as_bytes())
            ),
            active: AtomicU32::new(0),
            well: AtomicBool::new(true),
            contradictions: AtomicU32::new(0),
            failures: AtomicU32::new(0),
            ejected_until: AtomicU64::new(0),
            born: Instant::now(),
        }
    }

    /// Whether it should get requests.
    pub fn is_available(&self) -> bool {
        if !self.well.load(Ordering::Relaxed) {
            return false;
        }
        // Most servers were never ejected: no look at the clock.
        match self.ejected_until.load(Ordering::Relaxed) {
            0 => true,
            until => self.age_ms() >= until,
        }
    }

    pub fn is_well(&self) -> bool {
        self.well.load(Ordering::Relaxed)
    }

    pub fn active(&self) -> u32 {
        self.active.load(Ordering::Relaxed)
    }

    fn age_ms(&self) -> u64 {
        u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// A request ended. True if the server is left out from now on.
    pub fn report(&self, outcome: Outcome, eject: &EjectConfig) -> bool {
        if outcome == Outcome::Success {
            // Usually nothing is to be forgotten, and no cache line changes hands.
            if self.failures.load(Ordering::Relaxed) != 0 {
                self.failures.store(0, Ordering::Relaxed);
                self.ejected_until.store(0, Ordering::Relaxed);
            }
            return false;
        }
        let failures = self
            .failures
            .fetch_add(1, Ordering::Relaxed)
            .saturating_add(1);
        if eject.failures == 0 || failures < eject.failures {
            return false;
        }
        let now = self.age_ms();
        let pause = u64::try_from(eject.pause.as_millis()).unwrap_or(u64::MAX);
        let before = self
            .ejected_until
            .swap(now.saturating_add(pause).max(1), Ordering::Relaxed);
        // Requests that were under way fail too; they do not make it a new event.
        before <= now
    }

    /// The server was asked how it is. True if that changes whether it gets requests.
    pub fn observe(&self, well: bool, health: &HealthConfig) -> bool {
        if self.well.load(Ordering::Relaxed) == well {
            self.contradictions.store(0, Ordering::Relaxed);
            return false;
        }
        let enough = if well {
            health.up_after
        } else {
            health.down_after
        };
        let seen = self.contradictions.fetch_add(1, Ordering::Relaxed) + 1;
        if seen < enough.get() {
            return false;
        }
        self.contradictions.store(0, Ordering::Relaxed);
        self.well.store(well, Ordering::Relaxed);
        true
    }
}

/// A server that a request was given to. Dropping it ends that.
#[derive(Debug)]
pub struct Picked {
    pub server: Arc<Server>,
    counted: bool,
}

impl Picked {
    pub(super) fn new(server: Arc<Server>, counted: bool) -> Self {
        if counted {
            server.active.fetch_add(1, Ordering::Relaxed);
        }
        Self { server, counted }
    }
}

impl Drop for Picked {
    fn drop(&mut self) {
        if self.counted {
            self.server.active.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn server() -> Server {
        let address: SocketAddr = "127.0.0.1:1".parse().unwrap();
        Server::new(address, 1, HttpPeer::new(address, false, String::new()))
    }

    #[tokio::test(start_paused = true)]
    async fn failures_in_a_row_eject_for_a_while() {
        let (server, eject) = (server(), EjectConfig::default());
        tokio::time::advance(Duration::from_secs(1)).await;
        for _ in 0..4 {
            assert!(!server.report(Outcome::Failure, &eject));
        }
        server.report(Outcome::Success, &eject);
        for _ in 0..4 {
            assert!(
                !server.report(Outcome::Failure, &eject),
                "the row began anew"
            );
        }
        assert!(server.is_available());
        assert!(server.report(Outcome::Failure, &eject));
        assert!(!server.report(Outcome::Failure, &eject), "one event");
        assert!(!server.is_available());
        tokio::time::advance(eject.pause).await;
        assert!(server.is_available());
        assert!(server.report(Outcome::Failure, &eject), "on probation");
        assert!(!server.is_available());
        server.report(Outcome::Success, &eject);
        assert!(server.is_available(), "whatever is said of it, it works");
    }

    #[test]
    fn health_follows_answers_in_a_row() {
        let (server, health) = (server(), HealthConfig::default());
        let seen: Vec<bool> = [
            false, false, true, false, false, false, true, false, true, true,
        ]
        .into_iter()
        .map(|well| {
            server.observe(well, &health);
            server.is_available()
        })
        .collect();
        let want = [
            true, true, true, true, true, false, false, false, false, true,
        ];
        assert_eq!(seen, want);
    }
}
