//! Which server of a pool: pure but for counters.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use foldhash::HashMap;
use pingora_ketama::{Bucket, Continuum};

use super::server::Server;
use crate::config::Balance;

/// Points of the ring that are looked at before any server will do.
const STEPS_MAX: usize = 4096;

/// The servers of a pool at one time, ready to choose from.
pub struct Servers {
    pub list: Vec<Arc<Server>>,
    /// Indexes into `list`, each as often as its weight and evenly spread.
    turns: Vec<usize>,
    next: AtomicUsize,
    ring: Option<KeyRing>,
}

struct KeyRing {
    continuum: Continuum,
    places: HashMap<SocketAddr, usize>,
}

impl Servers {
    /// `list` is not empty.
    pub fn new(list: Vec<Arc<Server>>, balance: Balance) -> Self {
        let ring = matches!(balance, Balance::Hash | Balance::BoundedHash).then(|| {
            let buckets: Vec<Bucket> = list
                .iter()
                .map(|server| Bucket::new(server.address, u32::from(server.weight)))
                .collect();
            let places = list.iter().enumerate();
            KeyRing {
                continuum: Continuum::new(&buckets),
                places: places
                    .map(|(place, server)| (server.address, place))
                    .collect(),
            }
        });
        Self {
            turns: turns(&list),
            next: AtomicUsize::new(0),
            ring,
            list,
        }
    }

    /// The next in turn of those that may be used.
    pub fn in_turn(&self, usable: impl Fn(&Server) -> bool) -> Option<&Arc<Server>> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let turns = (0..self.turns.len())
            .map(|step| self.turns[turn.wrapping_add(step) % self.turns.len()]);
        turns
            .map(|place| &self.list[place])
            .find(|server| usable(server))
    }

    /// The one with the fewest requests under way, for its weight; equal ones take turns.
    pub fn least_active(&self, usable: impl Fn(&Server) -> bool) -> Option<&Arc<Server>> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let count = self.list.len();
        (0..count)
            .map(|step| &self.list[turn.wrapping_add(step) % count])
            .filter(|server| usable(server))
            // a/b < c/d as ad < cb: no division.
            .min_by(|a, b| {
                let a_load = u64::from(a.active()) * u64::from(b.weight);
                let b_load = u64::from(b.active()) * u64::from(a.weight);
                a_load.cmp(&b_load)
            })
    }

    /// By consistent hash (ketama): from the key's place on the ring on, the first that may be used. If a
    /// server leaves, only its keys move.
    pub fn by_key(&self, key: &[u8], usable: impl Fn(&Server) -> bool) -> Option<&Arc<Server>> {
        let ring = self.ring.as_ref()?;
        ring.continuum
            .node_iter(key)
            .take(STEPS_MAX)
            .map(|address| &self.list[ring.places[address]])
            .find(|server| usable(server))
    }

    /// The same with bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2016): servers with more than
    /// `load_max` times their part of all requests under way are passed over.
    pub fn by_key_bounded(
        &self,
        key: &[u8],
        load_max: f64,
        usable: impl Fn(&Server) -> bool,
    ) -> Option<&Arc<Server>> {
        let able = self.list.iter().filter(|server| usable(server));
        let (active, weight) = able.fold((1, 0), |(active, weight), server| {
            (
                active + u64::from(server.active()),
                weight + u64::from(server.weight),
            )
        });
        let part = active as f64 * load_max / weight as f64;
        self.by_key(key, |server| {
            let most = (part * f64::from(server.weight)).ceil();
            usable(server) && f64::from(server.active()) < most
        })
    }

    pub fn by_tag(&self, tag: &str) -> Option<&Arc<Server>> {
        self.list.iter().find(|server| server.tag == tag)
    }
}

/// Smooth weighted round robin (nginx's): one round of it, computed ahead.
fn turns(list: &[Arc<Server>]) -> Vec<usize> {
    let sum: i64 = list.iter().map(|server| i64::from(server.weight)).sum();
    let mut credit = vec![0; list.len()];
    let mut turns = Vec::new();
    for _ in 0..sum {
        for (credit, server) in credit.iter_mut().zip(list) {
            *credit += i64::from(server.weight);
        }
        // Of equal ones the first, so that a round begins as the file does.
        let best = (0..list.len())
            .max_by_key(|&place| (credit[place], std::cmp::Reverse(place)))
            .expect("a pool has servers");
        credit[best] -= sum;
        turns.push(best);
        // Weights with a common divisor repeat earlier.
        if credit.iter().all(|credit| *credit == 0) {
            break;
        }
    }
    turns
}

#[cfg(test)]
mod tests {
    use pingora_core::upstreams::peer::HttpPeer;

    use super::*;
    use crate::upstream::server::Picked;

    fn pool(weights: &[u8], balance: Balance) -> Servers {
        let server = |(number, &weight): (usize, &u8)| {
            let address: SocketAddr = format!("10.0.0.{number}:80").parse().unwrap();
            let peer = HttpPeer::new(address, false, String::new());
            Arc::new(Server::new(address, weight, peer))
        };
        Servers::new(weights.iter().enumerate().map(server).collect(), balance)
    }

    fn any(_: &Server) -> bool {
        true
    }

    fn host(server: Option<&Arc<Server>>) -> String {
        let address = server.unwrap().address.to_string();
        address[7..].trim_end_matches(":80").to_owned()
    }

    #[test]
    fn turns_follow_weights_and_pass_over_what_is_out() {
        let pool = pool(&[5, 1, 1], Balance::RoundRobin);
        let turns: String = (0..14).map(|_| host(pool.in_turn(any))).collect();
        assert_eq!(turns, "00102000010200", "spread, as nginx does");
        let two: String = (0..4)
            .map(|_| host(pool.in_turn(|server| server.weight == 1)))
            .collect();
        assert!(!two.contains('0'), "{two}");
        assert!(pool.in_turn(|_| false).is_none());
        assert_eq!(
            super::turns(&tests::pool(&[4, 4], Balance::RoundRobin).list),
            [0, 1]
        );
    }

    #[test]
    fn least_connections_evens_out_by_weight() {
        let pool = pool(&[2, 1], Balance::LeastConnections);
        let picked: Vec<Picked> = (0..30)
            .map(|_| Picked::new(Arc::clone(pool.least_active(any).unwrap()), true))
            .collect();
        assert_eq!((pool.list[0].active(), pool.list[1].active()), (20, 10));
        drop(picked);
        assert_eq!(pool.list[0].active(), 0);
    }

    #[test]
    fn a_key_has_one_server_and_moves_only_if_that_is_out() {
        let pool = pool(&[1, 1, 1, 1], Balance::Hash);
        let mut counts = HashMap::default();
        for number in 0..10_000 {
            let key = format!("key-{number}");
            let home = pool.by_key(key.as_bytes(), any).unwrap();
            *counts.entry(home.address).or_insert(0) += 1;
            let without_0 = |server: &Server| server.address != pool.list[0].address;
            let other = pool.by_key(key.as_bytes(), without_0).unwrap();
            if home.address != pool.list[0].address {
                assert_eq!(home.address, other.address);
            } else {
                assert_ne!(home.address, other.address);
            }
        }
        for count in counts.values() {
            assert!((1500..=3500).contains(count), "{counts:?}");
        }
        assert!(pool.by_key(b"x", |_| false).is_none());
    }

    #[test]
    fn a_bounded_load_spreads_a_hot_key() {
        let pool = pool(&[1, 1, 1, 1], Balance::BoundedHash);
        let picked: Vec<Picked> = (0..100)
            .map(|_| {
                let server = pool.by_key_bounded(b"hot", 1.25, any).unwrap();
                Picked::new(Arc::clone(server), true)
            })
            .collect();
        let most = pool
            .list
            .iter()
            .map(|server| server.active())
            .max()
            .unwrap();
        assert!(
            (25..=32).contains(&most),
            "{most} of 100 with a bound of 1.25"
        );
        drop(picked);
        // At rest every request for the key goes home.
        let home = pool.by_key(b"hot", any).unwrap().address;
        assert_eq!(
            pool.by_key_bounded(b"hot", 1.25, any).unwrap().address,
            home
        );
    }
}
