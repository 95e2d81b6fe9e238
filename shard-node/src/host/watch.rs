//! What objects do, on its way to whoever counts it: their class, and the hottest objects.

use std::rc::Rc;
use std::time::Duration;

use protocol::ObjectId;
use tokio::time::Instant;
use tracing::debug;

use super::Host;
use crate::hot::Hot;
use crate::metrics::Metrics;
use crate::object::Object;
use crate::usage::{Counts, Of};

/// How often an object that is used is counted among the hottest.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// How often keys and rows of an object that writes and does not sleep are counted.
const COUNT_KEYS_EVERY: Duration = Duration::from_secs(60);

/// Ticks between two looks for objects that have not slept for long, and how long that is.
const TICKS_PER_LOOK: u32 = 100;
pub(crate) const LONG_AWAKE: Duration = Duration::from_secs(3600);

impl Host {
    /// A batch of turns ran: what it did is its class's and its object's.
    pub(super) fn settle(&self, object: &Object, begun: Instant, now: Instant) {
        let mut counts = object.context.storage().meter().take();
        let took = now.saturating_duration_since(begun).as_nanos();
        counts.count(Of::TurnNanos, u64::try_from(took).unwrap_or(u64::MAX));
        object.usage.add(&counts);
        let mut untold = object.untold.borrow_mut();
        untold.0.add(&counts);
        if counts.of(Of::RowsWritten) > 0 {
            let (_, counted) = object.keys_counted.get();
            object.keys_counted.set((true, counted));
        }
        let due = now.saturating_duration_since(untold.1) >= TELL_EVERY;
        drop(untold);
        if due {
            self.tell(object, now);
            self.note_keys(object, Some(now));
        }
    }

    /// Counts among the hottest objects what one did since that was done last.
    pub(super) fn tell(&self, object: &Object, now: Instant) {
        let (counts, _) = object.untold.replace((Counts::ZERO, now));
        if counts == Counts::ZERO {
            return;
        }
        let meter = object.context.storage().meter();
        let fan_out = meter.reach(now).map(|number| (number, now));
        self.hot.add(object.id(), &counts, fan_out);
    }

    /// Lets the catalog know how many keys and rows an object has that wrote since: before it sleeps, or once
    /// in a while.
    pub(super) fn note_keys(&self, object: &Object, awake: Option<Instant>) {
        let (wrote, counted) = object.keys_counted.get();
        let lately = awake.is_some_and(|now| now.duration_since(counted) < COUNT_KEYS_EVERY);
        let storage = object.context.storage();
        if !wrote || lately || object.broken.get() || storage.has_written() {
            return;
        }
        object.keys_counted.set((false, awake.unwrap_or(counted)));
        match storage.count_keys() {
            Ok(keys) => self.engine.keys(storage.identity(), keys),
            Err(error) => debug!(object = %object.id(), %error, "keys could not be counted"),
        }
    }

    /// Once per tick: publishes what classes did.
    pub(super) fn watch(&self, now: Instant) {
        self.hot.tick(now);
        self.metrics.publish(now);
        let ticks = self.ticks.get().wrapping_add(1);
        self.ticks.set(ticks);
        if !ticks.is_multiple_of(TICKS_PER_LOOK) {
            return;
        }
        let objects = self.objects.borrow();
        let long = objects
            .values()
            .filter(|object| now.saturating_duration_since(object.woke) >= LONG_AWAKE);
        let long: Vec<_> = long.map(|object| &object.usage).collect();
        self.metrics.each_class(|usage| {
            let of_class = long.iter().filter(|other| Rc::ptr_eq(other, usage));
            usage.set_long_awake(of_class.count() as u64);
        });
    }

    /// The hottest objects, with all that was counted before now.
    pub(crate) fn hot(&self) -> &Hot {
        let now = Instant::now();
        let objects: Vec<Rc<Object>> = self.objects.borrow().values().cloned().collect();
        for object in objects {
            self.tell(&object, now);
        }
        self.metrics.publish(now);
        &self.hot
    }

    /// An object, if it is awake.
    pub(crate) fn awake_object(&self, id: ObjectId) -> Option<Rc<Object>> {
        self.objects.borrow().get(&id).cloned()
    }

    /// The objects that have not slept for longest, the longest first.
    pub(crate) fn longest_awake(&self, most: usize) -> Vec<Rc<Object>> {
        let mut objects: Vec<Rc<Object>> = self.objects.borrow().values().cloned().collect();
        let most = most.min(objects.len());
        if most < objects.len() {
            objects.select_nth_unstable_by_key(most, |object| object.woke);
        }
        objects.truncate(most);
        objects.sort_by_key(|object| object.woke);
        objects
    }

    pub(crate) fn metrics(&self) -> &Rc<Metrics> {
        &self.metrics
    }
}
