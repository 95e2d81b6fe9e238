//! `CounterCoordinator`: the plan and the sum of one counter.
//!
//! It sleeps while nothing is counted: shards wake it when they have something to report. It keeps the last
//! report of every shard, and the sum of what retired ones had; both change in one transaction when a shard
//! retires. Nothing is stored for a counter that has the plan of new counters and no reports.

mod meters;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroUsize;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use http::{Request, Response};
use ops::metrics::Registry;
use protocol::counters::{
    self, Auto, Change, Count, CounterName, KEYS_KEPT, PLAN, Place, Plan, READ, REPORT, RESHARD,
    RETIRE, Report, Reported, SHARDS_ADVISED, SHARDS_DEFAULT, SHARDS_MAX, STANDING, Scope, Seat,
    Standing, Strategy, TELL, Tally, Total,
};
use protocol::{ClassName, Problem};
use tracing::{info, warn};

use self::meters::Meters;
use super::heat::{Heat, Window};
use super::table::{Earlier, Settings, Table};
use super::{answer, no_method, no_pages, parse, understood};
use crate::class::{AlarmInfo, Args, Body, Class, ClassError, Context, Instance, Json, Turn};
use crate::fan_out::{FanOut, Needs};

/// Shards asked at once.
const ASKED_AT_ONCE: NonZeroUsize = NonZeroUsize::new(64).expect("64 is not 0");

/// How long all shards together may take to answer an exact read.
const READ_MAX: Duration = Duration::from_secs(10);

/// How long a change waits for the shards that it retires; the alarm goes on with the rest.
const DRAIN_MAX: Duration = Duration::from_secs(10);
const DRAIN_AGAIN: Duration = Duration::from_secs(1);

/// What a shard may wait before it reports.
const REPORT_EVERY_MS: std::ops::RangeInclusive<u64> = 10..=60_000;

/// A counter that chooses by itself has at least so many shards when it grows, and at most so many.
const AUTO: std::ops::RangeInclusive<u32> = SHARDS_ADVISED;

/// A late report is spoken of so long.
const LAG_KEPT_MS: u64 = 60_000;

/// Above this, operators are told that shards are unevenly used.
const SKEW_ADVISED: f64 = 3.0;

pub struct Coordinator {
    name: ClassName,
    meters: Arc<OnceLock<Meters>>,
}

impl Default for Coordinator {
    fn default() -> Self {
        Self {
            name: counters::coordinator_class(),
            meters: Arc::default(),
        }
    }
}

impl Class for Coordinator {
    fn name(&self) -> &ClassName {
        &self.name
    }

    fn methods(&self) -> &'static [&'static str] {
        &[PLAN, READ, RESHARD, STANDING, REPORT]
    }

    fn is_internal(&self) -> bool {
        true
    }

    fn handles_alarms(&self) -> bool {
        true
    }

    fn register(&self, registry: &Registry) {
        // The first node of a process counts for all.
        self.meters.get_or_init(|| Meters::new(registry));
    }

    fn construct(&self, context: Context) -> Result<Rc<dyn Instance>, ClassError> {
        Ok(Rc::new(Summing {
            class: self.name.clone(),
            shard_class: counters::shard_class(),
            table: Table {
                context: context.clone(),
            },
            context,
            known: RefCell::default(),
            changing: Cell::new(false),
            heat: RefCell::default(),
            lag: Cell::new((0, 0)),
            meters: Arc::clone(&self.meters),
        }))
    }
}

struct Summing {
    class: ClassName,
    shard_class: ClassName,
    context: Context,
    table: Table,
    /// What is in the tables. Nothing while it is changed, or if that failed: then it is read again.
    known: RefCell<Option<Known>>,
    /// An operator's change is under way.
    changing: Cell<bool>,
    heat: RefCell<Heat>,
    /// The longest that an increment waited for its report, lately, and when that was; milliseconds.
    lag: Cell<(u64, u64)>,
    meters: Arc<OnceLock<Meters>>,
}

/// The tables in memory.
struct Known {
    /// There are tables.
    stored: bool,
    settings: Settings,
    tallies: HashMap<Seat, Tally>,
    /// The totals of `tallies`.
    sum: i128,
    places: Vec<Place>,
    retiring: BTreeMap<Seat, u64>,
    drained: HashMap<Seat, u64>,
}

impl Settings {
    fn of_new_counters() -> Self {
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

    fn report_every_ms(&self) -> u64 {
        self.report_every_ms.unwrap_or_else(|| {
            let every = counters::report_every(self.shards);
            u64::try_from(every.as_millis()).unwrap_or(u64::MAX)
        })
    }

    /// What they are after an operator's change.
    fn changed(&self, change: &Change) -> Result<Self, ClassError> {
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
    fn value(&self) -> i128 {
        self.settings.base + self.sum
    }

    /// Places that have shards under such settings.
    fn places_of(&self, settings: &Settings) -> Vec<Place> {
        match settings.scope {
            Scope::Global => vec![Place::Anywhere],
            Scope::Colo => self.places.clone(),
        }
    }

    fn seats_of(&self, settings: &Settings) -> impl Iterator<Item = Seat> {
        let shards = settings.shards;
        let places = self.places_of(settings).into_iter();
        places.flat_map(move |place| (0..shards).map(move |index| Seat { place, index }))
    }

    fn has(&self, settings: &Settings, seat: Seat) -> bool {
        let here = match settings.scope {
            Scope::Global => seat.place == Place::Anywhere,
            Scope::Colo => self.places.contains(&seat.place),
        };
        here && seat.index < settings.shards
    }

    /// Whether a shard's tally says something that is in the value, and not in the base.
    fn counts(&self, seat: Seat, tally: &Tally) -> bool {
        let in_use = self.has(&self.settings, seat) || self.retiring.contains_key(&seat);
        let drained = self.drained.get(&seat).copied();
        in_use && tally.generation.is_some_and(|began| Some(began) > drained)
    }
}

impl Summing {
    fn plan(&self, place: Place, has_nodes: bool) -> Result<Plan, ClassError> {
        let mut known = self.take()?;
        let place = match (known.settings.scope, place) {
            (Scope::Global, _) => Place::Anywhere,
            (Scope::Colo, Place::Colo(colo) | Place::ForColo(colo)) => {
                let ours = [Place::Colo(colo), Place::ForColo(colo)];
                match known.places.iter().find(|place| ours.contains(place)) {
                    Some(place) => *place,
                    None => {
                        // Before anything is counted there: an exact read must know whom to ask.
                        let place = if has_nodes { ours[0] } else { ours[1] };
                        self.table.add_place(place)?;
                        known.places.push(place);
                        place
                    }
                }
            }
            (Scope::Colo, Place::Anywhere) => {
                self.put(known);
                return Err(ClassError::BadRequest(
                    "plan: a counter with shards per colo needs a colo".to_owned(),
                ));
            }
        };
        let since = self.now().saturating_sub(millis(KEYS_KEPT));
        let earlier = match known.stored {
            true => self.table.sets(since)?,
            false => Vec::new(),
        };
        let settings = &known.settings;
        let plan = Plan {
            version: settings.version,
            place,
            shards: settings.shards,
            strategy: settings.strategy,
            report_every_ms: settings.report_every_ms(),
            earlier: earlier.iter().map(|set: &Earlier| set.set(place)).collect(),
        };
        self.put(known);
        Ok(plan)
    }

    fn read(&self) -> Result<Total, ClassError> {
        let known = self.take()?;
        let total = Total {
            value: known.value(),
            shards: known.settings.shards,
            staleness_ms: self.staleness_ms(&known.settings),
        };
        self.put(known);
        Ok(total)
    }

    /// Asks every shard. Whatever was acknowledged before this began is in the value.
    async fn read_exact(&self) -> Result<Total, ClassError> {
        let known = self.take()?;
        let retiring = known.retiring.keys().copied();
        let seats: Vec<Seat> = known.seats_of(&known.settings).chain(retiring).collect();
        self.put(known);
        let counter = self.counter()?;
        let calls = seats.into_iter().map(|seat| {
            let told = self.ask(&counter, seat, TELL, Vec::new());
            async move { Ok((seat, told.await?)) }
        });
        let fan_out = FanOut {
            at_once: ASKED_AT_ONCE,
            within: READ_MAX,
            needs: Needs::All,
        };
        let told = fan_out.gather(calls).await?;
        let mut known = self.take()?;
        for (seat, tally) in told.into_iter().flatten() {
            self.accept(&mut known, seat, tally)?;
        }
        let total = Total {
            value: known.value(),
            shards: known.settings.shards,
            staleness_ms: 0,
        };
        self.put(known);
        Ok(total)
    }

    fn report(&self, report: &Report) -> Result<Reported, ClassError> {
        let mut known = self.take()?;
        let Report { seat, tally, .. } = *report;
        let accepted = self.accept(&mut known, seat, tally)?;
        self.note_lag(report.lag_ms);
        if accepted && known.has(&known.settings, seat) {
            let count = known.seats_of(&known.settings).count();
            let count = u32::try_from(count).unwrap_or(u32::MAX);
            let mut heat = self.heat.borrow_mut();
            let window = heat.note(seat, tally.turns, count, self.now());
            drop(heat);
            if let Some(window) = window {
                self.take_heat(&mut known, &window)?;
            }
        }
        let reported = Reported {
            version: known.settings.version,
            report_every_ms: known.settings.report_every_ms(),
        };
        self.put(known);
        Ok(reported)
    }

    /// A window of seconds has ended: adds shards if they run hot and the counter chooses by itself.
    fn take_heat(&self, known: &mut Known, window: &Window) -> Result<(), ClassError> {
        if let Some(meters) = self.meters.get() {
            meters.skew(self.context.id(), window.skew, self.now());
        }
        let shards = known.settings.shards;
        // Shards that retire may be among those that would be added.
        let may_grow = known.settings.auto && shards < *AUTO.end() && known.retiring.is_empty();
        if !may_grow || !window.is_hot() {
            return Ok(());
        }
        let grown = Settings {
            shards: shards.saturating_mul(2).clamp(*AUTO.start(), *AUTO.end()),
            ..known.settings.clone()
        };
        info!(counter = %self.context.id(), from = shards, to = grown.shards, rate = window.rate, "a counter's shards run hot");
        self.apply(known, grown)
    }

    /// Takes what a shard says of itself, if it is newer than what is known.
    fn accept(&self, known: &mut Known, seat: Seat, tally: Tally) -> Result<bool, ClassError> {
        let before = known.tallies.get(&seat).copied();
        let newer = before.is_none_or(|before| {
            (before.generation, before.turns) < (tally.generation, tally.turns)
        });
        if !newer || !known.counts(seat, &tally) {
            return Ok(false);
        }
        self.store(known)?;
        self.table.put_shard(seat, &tally)?;
        known.sum += i128::from(tally.total) - before.map_or(0, |before| before.total.into());
        known.tallies.insert(seat, tally);
        Ok(true)
    }

    async fn reshard(self: Rc<Self>, change: Change) -> Result<Json, ClassError> {
        let _changing = Changing::begin(&self)?;
        // A shard that is to come back must have been drained first.
        if self.comes_back(&change)? {
            self.drain(DRAIN_MAX).await?;
            if self.comes_back(&change)? {
                return Err(ClassError::Called(Problem::unavailable(
                    "some of these shards are still retiring and do not answer; nothing was changed",
                )));
            }
        }
        let mut known = self.take()?;
        let changed = known.settings.changed(&change)?;
        self.apply(&mut known, changed)?;
        let retires = !known.retiring.is_empty();
        self.put(known);
        if retires {
            // Whatever becomes of this turn, they are drained.
            self.context.set_alarm(self.now() + millis(DRAIN_AGAIN))?;
            self.drain(DRAIN_MAX).await?;
        }
        answer(self.standing()?)
    }

    fn comes_back(&self, change: &Change) -> Result<bool, ClassError> {
        let known = self.take()?;
        let changed = known.settings.changed(change);
        let comes_back = changed.map(|changed| {
            let mut retiring = known.retiring.keys();
            retiring.any(|seat| known.has(&changed, *seat))
        });
        self.put(known);
        comes_back
    }

    /// Makes a plan of these settings; shards that it leaves out begin to retire.
    fn apply(&self, known: &mut Known, changed: Settings) -> Result<(), ClassError> {
        if changed == known.settings {
            return Ok(());
        }
        self.store(known)?;
        let before = known.settings.clone();
        let after = Settings {
            version: before.version + 1,
            ..changed
        };
        if (before.scope, before.shards) != (after.scope, after.shards) {
            self.table
                .forget_sets(self.now().saturating_sub(millis(KEYS_KEPT)))?;
            self.table.end_set(&before, self.now())?;
            let leaving: Vec<Seat> = known
                .seats_of(&before)
                .filter(|seat| !known.has(&after, *seat))
                .collect();
            for seat in leaving {
                self.table.retire(seat, after.version)?;
                known.retiring.insert(seat, after.version);
            }
            self.heat.borrow_mut().restart();
            if let Some(meters) = self.meters.get() {
                meters.reshards.increment(1);
            }
        }
        self.table.write(&after)?;
        known.settings = after;
        Ok(())
    }

    /// Retires the shards that the plan leaves out, as far as they answer.
    async fn drain(&self, within: Duration) -> Result<(), ClassError> {
        let known = self.take()?;
        let retiring: Vec<(Seat, u64)> = known.retiring.clone().into_iter().collect();
        self.put(known);
        let counter = self.counter()?;
        let calls = retiring.into_iter().map(|(seat, version)| {
            let told = self.ask(&counter, seat, RETIRE, vec![version.into()]);
            async move { self.settle(seat, version, told.await?) }
        });
        let fan_out = FanOut {
            at_once: ASKED_AT_ONCE,
            within,
            needs: Needs::Nothing,
        };
        let settled = fan_out.gather(calls).await?;
        if let Some(error) = settled.iter().find_map(|settled| settled.as_ref().err()) {
            warn!(counter = %self.context.id(), %error, "a shard that retires does not answer yet");
        }
        Ok(())
    }

    /// The total of a retired shard, which is final, goes to the base.
    fn settle(&self, seat: Seat, version: u64, tally: Tally) -> Result<(), ClassError> {
        let mut known = self.take()?;
        if known.retiring.get(&seat) != Some(&version) {
            // Somebody else asked, too.
            self.put(known);
            return Ok(());
        }
        let total = match known.counts(seat, &tally) {
            true => tally.total,
            false => 0,
        };
        let base = known.settings.base + i128::from(total);
        self.table.drain(seat, version, base)?;
        known.settings.base = base;
        let reported = known.tallies.remove(&seat);
        known.sum -= reported.map_or(0, |reported| i128::from(reported.total));
        known.retiring.remove(&seat);
        known.drained.insert(seat, version);
        self.put(known);
        Ok(())
    }

    fn standing(&self) -> Result<Standing, ClassError> {
        let known = self.take()?;
        let settings = &known.settings;
        let window = self.heat.borrow().last();
        let mut warnings = Vec::new();
        if !SHARDS_ADVISED.contains(&settings.shards) {
            warnings.push(format!(
                "{} shards are outside of what is advised, {} to {}",
                settings.shards,
                SHARDS_ADVISED.start(),
                SHARDS_ADVISED.end()
            ));
        }
        if let Some(window) = window.filter(|window| window.skew > SKEW_ADVISED) {
            warnings.push(format!(
                "shard {} has {:.1} times the turns of a mean shard: strategy random or round_robin is even",
                window.hottest, window.skew
            ));
        }
        let standing = Standing {
            value: known.value(),
            shards: settings.shards,
            version: settings.version,
            auto: settings.auto,
            scope: settings.scope,
            strategy: settings.strategy,
            report_every_ms: settings.report_every_ms(),
            staleness_ms: self.staleness_ms(settings),
            retiring: u32::try_from(known.retiring.len()).unwrap_or(u32::MAX),
            base: settings.base,
            skew: window.map(|window| window.skew),
            hottest: window.map(|window| window.hottest),
            hottest_rate: window.map(|window| window.rate),
            warnings,
        };
        self.put(known);
        Ok(standing)
    }

    async fn go_on_draining(self: Rc<Self>) -> Result<(), ClassError> {
        self.drain(DRAIN_MAX).await?;
        let known = self.take()?;
        let left = known.retiring.len();
        self.put(known);
        if left > 0 {
            self.context.set_alarm(self.now() + millis(DRAIN_AGAIN))?;
        }
        Ok(())
    }

    async fn ask(
        &self,
        counter: &CounterName,
        seat: Seat,
        method: &str,
        args: Vec<Json>,
    ) -> Result<Tally, ClassError> {
        let (_, name) = counter.shard(seat);
        let shard = self.context.stub_in(&self.shard_class, seat.home(), &name);
        understood(shard.within(READ_MAX).call(method, args).await?, method)
    }

    fn counter(&self) -> Result<CounterName, ClassError> {
        let unnamed = || ClassError::BadRequest("a counter has a name".to_owned());
        let name = self.context.name()?.ok_or_else(unnamed)?;
        CounterName::new(name).map_err(|error| ClassError::BadRequest(error.to_string()))
    }

    /// How old the value may be.
    fn staleness_ms(&self, settings: &Settings) -> u64 {
        let stated = counters::staleness_ms(settings.report_every_ms());
        let (lag_ms, at_ms) = self.lag.get();
        match self.now().saturating_sub(at_ms) > LAG_KEPT_MS {
            true => stated,
            false => stated.max(lag_ms),
        }
    }

    fn note_lag(&self, lag_ms: u64) {
        if let Some(meters) = self.meters.get() {
            meters.report(lag_ms);
        }
        let (longest, at_ms) = self.lag.get();
        if lag_ms >= longest || self.now().saturating_sub(at_ms) > LAG_KEPT_MS {
            self.lag.set((lag_ms, self.now()));
        }
    }

    fn now(&self) -> u64 {
        self.context.unix_millis()
    }

    /// What is known, to be put back; whoever fails before that leaves it to be read again.
    fn take(&self) -> Result<Known, ClassError> {
        if let Some(known) = self.known.take() {
            return Ok(known);
        }
        let Some(settings) = self.table.read()? else {
            return Ok(Known {
                stored: false,
                settings: Settings::of_new_counters(),
                tallies: HashMap::new(),
                sum: 0,
                places: Vec::new(),
                retiring: BTreeMap::new(),
                drained: HashMap::new(),
            });
        };
        let tallies: HashMap<Seat, Tally> = self.table.shards()?.into_iter().collect();
        Ok(Known {
            stored: true,
            settings,
            sum: tallies.values().map(|tally| i128::from(tally.total)).sum(),
            tallies,
            places: self.table.places()?,
            retiring: self.table.retiring()?.into_iter().collect(),
            drained: self.table.drained()?.into_iter().collect(),
        })
    }

    fn put(&self, known: Known) {
        self.known.replace(Some(known));
    }

    /// Makes the tables if there are none.
    fn store(&self, known: &mut Known) -> Result<(), ClassError> {
        if !known.stored {
            self.table.create(&known.settings)?;
            known.stored = true;
        }
        Ok(())
    }

    fn answer(&self, method: &str, args: &mut Args) -> Result<Json, ClassError> {
        match method {
            PLAN => {
                args.expect(2..=2, "plan(place, has_nodes)")?;
                let place = parse(args, 0, PLAN, "place")?;
                answer(self.plan(place, parse(args, 1, PLAN, "has_nodes")?)?)
            }
            REPORT => answer(self.report(&parse(args, 0, REPORT, "report")?)?),
            STANDING => answer(self.standing()?),
            _ => Err(no_method(&self.class, method)),
        }
    }

    fn begin(self: Rc<Self>, method: &str, mut args: Args) -> Result<Turn<Json>, ClassError> {
        match method {
            READ => {
                args.expect(0..=1, "read(exact = false)")?;
                let exact = !args.is_empty() && parse(&mut args, 0, READ, "exact")?;
                Ok(match exact {
                    true => Turn::run(async move { answer(self.read_exact().await?) }),
                    false => Turn::Done(answer(self.read()?)),
                })
            }
            RESHARD => {
                args.expect(1..=1, "reshard(change)")?;
                let change = parse(&mut args, 0, RESHARD, "change")?;
                Ok(Turn::run(self.reshard(change)))
            }
            _ => Ok(Turn::Done(self.answer(method, &mut args))),
        }
    }
}

impl Instance for Summing {
    fn fetch(self: Rc<Self>, _request: Request<Body>) -> Turn<Response<Body>> {
        no_pages(&self.class)
    }

    fn call(self: Rc<Self>, method: &str, args: Args) -> Turn<Json> {
        self.begin(method, args)
            .unwrap_or_else(|error| Turn::Done(Err(error)))
    }

    fn alarm(self: Rc<Self>, _info: AlarmInfo) -> Turn<()> {
        Turn::run(self.go_on_draining())
    }
}

/// An operator's change under way: one at a time.
struct Changing(Rc<Summing>);

impl Changing {
    fn begin(counter: &Rc<Summing>) -> Result<Self, ClassError> {
        if counter.changing.replace(true) {
            return Err(ClassError::Called(Problem::unavailable(
                "another change of this counter is under way; nothing was changed",
            )));
        }
        Ok(Self(Rc::clone(counter)))
    }
}

impl Drop for Changing {
    fn drop(&mut self) {
        self.0.changing.set(false);
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
