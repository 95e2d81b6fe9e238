//! A fleet: one manager, and members that are each their own. What one member does never depends on another.

use std::rc::Rc;
use std::time::Duration;

use serde_json::json;
use shard_node::children::{Child, Children, Supervision};
use shard_node::class::{AlarmInfo, Args, ClassError, Context, Json, Turn};
use shard_node::classes::Classes;
use shard_node::schedules::Due;

use super::{Acts, Example, acting, check_health, class, fail_for, get, put};

/// Vehicles are asked again after 1, 2, 4, 8 seconds, then they count as lost.
const SUPERVISION: Supervision = Supervision {
    at_once: std::num::NonZeroUsize::new(32).expect("32 is not 0"),
    within: Duration::from_secs(10),
    tries: 5,
    pause: Duration::from_secs(1),
    pause_max: Duration::from_secs(60),
};

pub(super) fn added_to(classes: Classes) -> Classes {
    let methods = &["enrol", "drive", "states", "lost"];
    classes
        .with(Example::new("Fleet", methods, Fleet::make).with_alarms())
        .with(Example::new(
            "Vehicle",
            &["drive", "driven", "fail_for"],
            |context| acting(Vehicle { context }),
        ))
}

struct Fleet {
    context: Context,
    vehicles: Children,
}

impl Fleet {
    fn make(context: Context) -> Result<Rc<dyn shard_node::class::Instance>, ClassError> {
        let told = context.clone();
        let on_failed = move |_: &Child| {
            let lost = get(&told, "lost")?.and_then(|lost| lost.parse().ok());
            put(&told, "lost", &(lost.unwrap_or(0_u32) + 1).to_string())
        };
        acting(Self {
            vehicles: Children::new(
                context.clone(),
                class("Vehicle"),
                SUPERVISION,
                Rc::new(on_failed),
            ),
            context,
        })
    }

    /// `drive(trip)`: sends all of them on a trip. Partial results: who went, and who failed.
    async fn drive(&self, trip: Json) -> Result<Json, ClassError> {
        let round = self.vehicles.call_all("drive", &[trip]).await?;
        let failures: Vec<&str> = round.failures().map(|(name, _)| name.as_str()).collect();
        Ok(json!({ "driving": round.answers().count(), "failures": failures }))
    }

    fn answer(&self, method: &str, args: &Args) -> Result<Json, ClassError> {
        match method {
            "enrol" => {
                for number in 0..args.integer(0, "count")?.unwrap_or(0) {
                    let name = format!("{}/{number:03}", self.fleet()?).parse();
                    let name = name.expect("a short name and digits are legal");
                    self.vehicles.add(&name)?;
                }
                Ok(self.vehicles.count()?.into())
            }
            "lost" => Ok(get(&self.context, "lost")?.into()),
            _ => Ok(json!(self.vehicles.list(None, 1000)?)),
        }
    }

    fn fleet(&self) -> Result<String, ClassError> {
        let name = self.context.name()?;
        Ok(name.map_or_else(|| self.context.id().to_string(), |name| name.to_string()))
    }
}

impl Acts for Fleet {
    fn act(self: Rc<Self>, method: &str, mut args: Args) -> Turn<Json> {
        match method {
            "drive" => Turn::run(async move { self.drive(args.take(0)).await }),
            _ => Turn::Done(self.answer(method, &args)),
        }
    }

    fn alarm(self: Rc<Self>, info: AlarmInfo) -> Turn<()> {
        self.vehicles.supervise(info, Rc::new(|_: &Due| Ok(())))
    }
}

/// One vehicle: `drive(trip)` may be repeated, and counts once per trip.
struct Vehicle {
    context: Context,
}

impl Vehicle {
    fn answer(&self, method: &str, mut args: Args) -> Result<Json, ClassError> {
        if method == "fail_for" {
            return fail_for(&self.context, &args);
        }
        check_health(&self.context)?;
        if method == "drive" {
            let trip = args.take(0).to_string();
            return self.context.once(&trip, Duration::from_secs(3600), || {
                let driven = self.driven()? + 1;
                put(&self.context, "driven", &driven.to_string())?;
                Ok(driven.into())
            });
        }
        Ok(self.driven()?.into())
    }

    fn driven(&self) -> Result<u64, ClassError> {
        let driven = get(&self.context, "driven")?;
        Ok(driven.and_then(|driven| driven.parse().ok()).unwrap_or(0))
    }
}

impl Acts for Vehicle {
    fn act(self: Rc<Self>, method: &str, args: Args) -> Turn<Json> {
        Turn::Done(self.answer(method, args))
    }
}
