//! `CounterCoordinator`: the plan and the sum of one counter.
//!
//! It sleeps while nothing is counted: shards wake it when they have something to report. It keeps the last
//! report of every shard, and the sum of what retired ones had; both change in one transaction when a shard
//! retires. Nothing is stored for a counter that has the plan of new counters and no reports.

mod draining;
mod known;
mod meters;
mod plan;
mod totals;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroUsize;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use http::{Request, Response};
use ops::metrics::Registry;
use protocol::ClassName;
use protocol::counters::{self, CounterName, PLAN, READ, REPORT, RESHARD, STANDING, Seat, Tally};

use self::known::Known;
use self::meters::Meters;
use super::heat::Heat;
use super::table::{Settings, Table};
use super::{answer, no_method, no_pages, parse, understood};
use crate::class::{AlarmInfo, Args, Body, Class, ClassError, Context, Instance, Json, Turn};

/// Shards asked at once.
const ASKED_AT_ONCE: NonZeroUsize = NonZeroUsize::new(64).expect("64 is not 0");

/// How long all shards together may take to answer an exact read.
const READ_MAX: Duration = Duration::from_secs(10);

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

impl Summing {
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
                args.expect(2..=3, "plan(place, has_nodes, heard = 0)")?;
                let place = parse(args, 0, PLAN, "place")?;
                let has_nodes = parse(args, 1, PLAN, "has_nodes")?;
                let heard = match args.len() {
                    3 => parse(args, 2, PLAN, "heard")?,
                    _ => 0,
                };
                answer(self.plan(place, has_nodes, heard)?)
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

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
