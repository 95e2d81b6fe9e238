//! Who stays in memory: as many objects, and as many bytes, as the config says; those used longest ago leave.

use std::rc::Rc;
use std::time::Duration;

use protocol::{ErrorCode, Problem};
use tokio::time::Instant;

use super::{Host, address_of};
use crate::object::Object;

/// How often the memory of an object that is used is looked at: many microseconds, if it is not in the caches.
const MEASURE_EVERY: Duration = Duration::from_secs(4);

/// When one object must leave memory: objects that were used lately and get a second chance, and busy
/// ones looked at before giving up.
const SECOND_CHANCES: usize = 16;
const BUSY_TRIES: usize = 1024;

/// What became of the entry that looked least recently used.
pub(super) enum Look {
    /// Its object is no longer in memory.
    Left,
    /// Its object is idle, but was used after the entry was queued.
    UsedSince,
    Busy,
}

impl Host {
    /// Looks how much memory an object takes that was just used. A single one that takes all of the budget
    /// gives back what it only caches.
    pub(super) fn measure(&self, object: &Object, now: Instant) {
        let (before, measured) = object.memory.get();
        let lately = |measured| now.saturating_duration_since(measured) < MEASURE_EVERY;
        if measured.is_some_and(lately) || object.broken.get() {
            return;
        }
        let storage = object.context.storage();
        let mut bytes = storage.memory_bytes();
        if bytes as u64 > self.config.objects.memory_bytes_max.get() / 2 {
            storage.shrink();
            bytes = storage.memory_bytes();
        }
        object.memory.set((bytes, Some(now)));
        self.memory.set(self.memory.get() + bytes - before);
    }

    /// While all objects together take too much memory, the least recently used leave.
    pub(super) fn keep_to_budget(&self, now: Instant) {
        let budget = self.config.objects.memory_bytes_max.get();
        self.metrics.memory.set(self.memory.get() as f64);
        let entries = self.by_use.borrow().len();
        for _ in 0..entries {
            if self.memory.get() as u64 <= budget {
                break;
            }
            self.look_at_oldest(now, true);
        }
    }

    pub(super) fn forget_memory(&self, object: &Object) {
        let (bytes, _) = object.memory.take();
        self.memory.set(self.memory.get() - bytes);
    }

    /// Evicts until one more object fits.
    pub(super) fn make_room(&self) -> Result<(), Problem> {
        let max = self.config.objects.awake_max.get() as usize;
        let (mut chances, mut busy) = (SECOND_CHANCES, BUSY_TRIES);
        while self.objects.borrow().len() >= max {
            match self.look_at_oldest(Instant::now(), chances == 0) {
                Look::Left => {}
                Look::UsedSince => chances -= 1,
                Look::Busy if busy > 0 => busy -= 1,
                Look::Busy => {
                    return Err(Problem::new(
                        ErrorCode::Overloaded,
                        format!("{max} objects are awake on this worker, and all seem busy"),
                    ));
                }
            }
        }
        Ok(())
    }

    /// Takes the entry that looks least recently used. Its object leaves memory if it is idle and was
    /// not used since it was queued, or `whatever` its last use; else it is queued again.
    pub(super) fn look_at_oldest(&self, now: Instant, whatever: bool) -> Look {
        let Some((used, object)) = self.by_use.borrow_mut().pop_front() else {
            return Look::Busy;
        };
        let Some(object) = object.upgrade().filter(|object| !object.broken.get()) else {
            return Look::Left;
        };
        let (look, used) = if !object.is_idle() {
            object.last_used.set(now);
            (Look::Busy, now)
        } else if whatever || object.last_used.get() == used {
            self.evict(&object);
            return Look::Left;
        } else {
            (Look::UsedSince, object.last_used.get())
        };
        self.by_use
            .borrow_mut()
            .push_back((used, Rc::downgrade(&object)));
        look
    }

    pub(super) fn evict(&self, object: &Object) {
        self.forget_memory(object);
        self.objects.borrow_mut().remove(&object.id());
        self.metrics.evictions.increment(1);
        object.usage.slept();
        self.tell(object, Instant::now());
        self.note_keys(object, None);
        if object.use_told.get().is_some() {
            // Its last use may have begun long ago.
            self.note_use(object, Instant::now());
        }
        if let Some(at) = object.break_up() {
            let name = object.context.storage().known_name();
            self.restore(address_of(object, name), at);
        }
    }

    /// Tells the catalog that the object is used, if its class expires and that was not said lately.
    pub(super) fn note_use(&self, object: &Object, now: Instant) {
        let classes = &self.config.expiry.classes;
        let Some(expiry) = classes.get(object.class.name().as_str()) else {
            return;
        };
        let precision = expiry.precision();
        let lately = |told: Instant| now.duration_since(told) < precision;
        if object.use_told.get().is_some_and(lately) || object.broken.get() {
            return;
        }
        object.use_told.set(Some(now));
        let precision_ms = u64::try_from(precision.as_millis()).unwrap_or(u64::MAX);
        self.engine
            .used(object.context.storage().identity(), precision_ms);
    }
}
