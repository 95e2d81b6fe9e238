//! What a coordinator knows, in memory, and what follows from it alone.

use std::collections::{BTreeMap, HashMap};

use protocol::counters::{
    self, Auto, Change, Count, Place, SHARDS_DEFAULT, SHARDS_MAX, Scope, Seat, Strategy, Tally,
};

use crate::class::ClassError;
use crate::classes::sharded_counter::table::Settings;

/// What a shard may wait before it reports.
const REPORT_EVERY_MS: std::ops::RangeInclusive<u64> = 10..=60_000;

/// The tables in memory.
pub(super) struct Known {
    /// There are tables.
    pub(super) stored: bool,
    pub(super) settings: Settings,
    pub(super) tallies: HashMap<Seat, Tally>,
    /// The totals of `tallies`.
    pub(super) sum: i128,
    pub(super) places: Vec<Place>,
    pub(super) retiring: BTreeMap<Seat, u64>,
    pub(super) drained: HashMap<Seat, u64>,
}

impl Settings {
    pub(super) fn of_new_counters() -> Self {
        Self {
            version: 1,
            shards: SHARDS_DEFAULT,
            scope: Scope::Global,
            strategy: Strategy::default(),
            report_every_ms: None,
            auto: false,
            base: 0,
        }
    }

    pub(super) fn report_every_ms(&self) -> u64 {
        self.report_every_ms.unwrap_or_else(|| {
            let every = counters::report_every(self.shards);
            u64::try_from(every.as_millis()).unwrap_or(u64::MAX)
        })
    }

    /// What they are after an operator's change.
    pub(super) fn changed(&self, change: &Change) -> Result<Self, ClassError> {
        let mut changed = self.clone();
        match change.count {
            Some(Count::Fixed(count)) if (1..=SHARDS_MAX).contains(&count) => {
                changed.shards = count;
                changed.auto = false;
            }
            Some(Count::Fixed(count)) => {
                return Err(ClassError::BadRequest(format!(
                    "count = {count} must be from 1 to {SHARDS_MAX}"
                )));
            }
            Some(Count::Auto(Auto::Auto)) => changed.auto = true,
            None => {}
        }
        if let Some(every) = change.report_every_ms {
            if !REPORT_EVERY_MS.contains(&every) {
                return Err(ClassError::BadRequest(format!(
                    "report_every_ms = {every} must be from {} to {}",
                    REPORT_EVERY_MS.start(),
                    REPORT_EVERY_MS.end()
                )));
            }
            changed.report_every_ms = Some(every);
        }
        changed.strategy = change.strategy.unwrap_or(changed.strategy);
        changed.scope = change.scope.unwrap_or(changed.scope);
        Ok(changed)
    }
}

impl Known {
    pub(super) fn value(&self) -> i128 {
        self.settings.base + self.sum
    }

    /// Places that have shards under such settings.
    pub(super) fn places_of(&self, settings: &Settings) -> Vec<Place> {
        match settings.scope {
            Scope::Global => vec![Place::Anywhere],
            Scope::Colo => self.places.clone(),
        }
    }

    pub(super) fn seats_of(&self, settings: &Settings) -> impl Iterator<Item = Seat> {
        let shards = settings.shards;
        let places = self.places_of(settings).into_iter();
        places.flat_map(move |place| (0..shards).map(move |index| Seat { place, index }))
    }

    pub(super) fn has(&self, settings: &Settings, seat: Seat) -> bool {
        let here = match settings.scope {
            Scope::Global => seat.place == Place::Anywhere,
            Scope::Colo => self.places.contains(&seat.place),
        };
        here && seat.index < settings.shards
    }

    /// Whether a shard's tally says something that is in the value, and not in the base.
    pub(super) fn counts(&self, seat: Seat, tally: &Tally) -> bool {
        self.uses(seat) && self.is_undrained(seat, tally)
    }

    /// Whether a shard counts by a plan that this coordinator has no memory of: it was deleted or restored since.
    pub(super) fn is_forgotten(&self, seat: Seat, tally: &Tally) -> bool {
        !self.uses(seat) && self.is_undrained(seat, tally)
    }

    fn uses(&self, seat: Seat) -> bool {
        self.has(&self.settings, seat) || self.retiring.contains_key(&seat)
    }

    /// What it says is not in the base.
    fn is_undrained(&self, seat: Seat, tally: &Tally) -> bool {
        let drained = self.drained.get(&seat).copied();
        tally.generation.is_some_and(|began| Some(began) > drained)
    }
}
