//! How many connections clients have, all together and each.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::config::ConnectionsConfig;

/// The connections of all threads.
pub struct Crowd {
    open: AtomicU32,
    open_max: u32,
    /// 0: clients are not counted.
    per_client_max: u32,
    by_client: Mutex<HashMap<IpAddr, u32>>,
}

impl Crowd {
    pub fn new(config: &ConnectionsConfig) -> Arc<Self> {
        Arc::new(Self {
            open: AtomicU32::new(0),
            open_max: config.open_max.get(),
            per_client_max: config.per_client_max,
            by_client: Mutex::default(),
        })
    }

    /// A place for one more connection, if there is one.
    pub fn enter(self: &Arc<Self>) -> Option<Place> {
        let before = self.open.fetch_add(1, Ordering::Relaxed);
        let place = Place {
            crowd: Arc::clone(self),
            client: None,
        };
        (before < self.open_max).then_some(place)
    }

    fn clients(&self) -> std::sync::MutexGuard<'_, HashMap<IpAddr, u32>> {
        // Counts are right whoever panics: nothing does while they change.
        self.by_client
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection, counted until it is dropped.
pub struct Place {
    crowd: Arc<Crowd>,
    client: Option<IpAddr>,
}

impl Place {
    /// Whose it is. `false`: the client has as many as it may.
    pub fn is_for(&mut self, client: IpAddr) -> bool {
        let max = self.crowd.per_client_max;
        if max == 0 {
            return true;
        }
        let client = client.to_canonical();
        let mut clients = self.crowd.clients();
        let count = clients.entry(client).or_default();
        if *count >= max {
            return false;
        }
        *count += 1;
        drop(clients);
        self.client = Some(client);
        true
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.crowd.open.fetch_sub(1, Ordering::Relaxed);
        let Some(client) = self.client else { return };
        let mut clients = self.crowd.clients();
        if let Some(count) = clients.get_mut(&client) {
            *count -= 1;
            if *count == 0 {
                clients.remove(&client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;

    #[test]
    fn places_are_counted_and_given_back() {
        let crowd = Crowd::new(&ConnectionsConfig {
            open_max: NonZeroU32::new(3).unwrap(),
            per_client_max: 2,
            ..ConnectionsConfig::default()
        });
        let one: IpAddr = "10.0.0.1".parse().unwrap();
        let mapped: IpAddr = "::ffff:10.0.0.1".parse().unwrap();
        let mut places: Vec<Place> = (0..3).map(|_| crowd.enter().unwrap()).collect();
        assert!(crowd.enter().is_none(), "full");
        assert!(places[0].is_for(one) && places[1].is_for(mapped));
        assert!(!places[2].is_for(one), "it has two");
        assert!(places[2].is_for("10.0.0.2".parse().unwrap()));
        drop(places.remove(0));
        let mut again = crowd.enter().unwrap();
        assert!(again.is_for(one));
        drop((places, again));
        assert_eq!(crowd.open.load(Ordering::Relaxed), 0);
        assert!(crowd.clients().is_empty(), "nobody is remembered");
    }
}
