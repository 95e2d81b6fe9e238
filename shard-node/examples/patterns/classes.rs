//! Four ways of objects to work together: a coordinator with its tasks, a fleet, a chain of stages, and one set over
//! several storage objects.

#[path = "chain.rs"]
mod chain;
#[path = "fleet.rs"]
mod fleet;
#[path = "library.rs"]
mod library;
#[path = "project.rs"]
mod project;

use std::rc::Rc;

use http::{Request, Response};
use protocol::{ClassName, ObjectName};
use shard_node::class::{AlarmInfo, Args, Body, Class, ClassError, Context, Instance, Json, Turn};
use shard_node::classes::Classes;

/// These classes, and those given.
pub(crate) fn added_to(classes: Classes) -> Classes {
    let classes = project::added_to(classes);
    let classes = fleet::added_to(classes);
    let classes = chain::added_to(classes);
    library::added_to(classes)
}

/// What an object of these examples does.
trait Acts: 'static {
    fn act(self: Rc<Self>, method: &str, args: Args) -> Turn<Json>;

    fn alarm(self: Rc<Self>, _info: AlarmInfo) -> Turn<()> {
        Turn::Done(Ok(()))
    }
}

type Make = fn(Context) -> Result<Rc<dyn Instance>, ClassError>;

/// A class of these examples.
struct Example {
    name: ClassName,
    methods: &'static [&'static str],
    handles_alarms: bool,
    make: Make,
}

impl Example {
    fn new(name: &str, methods: &'static [&'static str], make: Make) -> Self {
        Self {
            name: class(name),
            methods,
            handles_alarms: false,
            make,
        }
    }

    fn with_alarms(self) -> Self {
        Self {
            handles_alarms: true,
            ..self
        }
    }
}

impl Class for Example {
    fn name(&self) -> &ClassName {
        &self.name
    }

    fn methods(&self) -> &'static [&'static str] {
        self.methods
    }

    fn handles_alarms(&self) -> bool {
        self.handles_alarms
    }

    fn construct(&self, context: Context) -> Result<Rc<dyn Instance>, ClassError> {
        (self.make)(context)
    }
}

/// An object that answers calls, and has no pages.
struct Acting<A>(Rc<A>);

impl<A: Acts> Instance for Acting<A> {
    fn fetch(self: Rc<Self>, _request: Request<Body>) -> Turn<Response<Body>> {
        let what = "these classes are called: POST /rpc/{class}/{name}/{method}".to_owned();
        Turn::Done(Err(ClassError::NotFound(what)))
    }

    fn call(self: Rc<Self>, method: &str, args: Args) -> Turn<Json> {
        Rc::clone(&self.0).act(method, args)
    }

    fn alarm(self: Rc<Self>, info: AlarmInfo) -> Turn<()> {
        Rc::clone(&self.0).alarm(info)
    }
}

fn acting(acts: impl Acts) -> Result<Rc<dyn Instance>, ClassError> {
    Ok(Rc::new(Acting(Rc::new(acts))))
}

fn class(name: &str) -> ClassName {
    name.parse().expect("the names of examples are legal")
}

/// An argument that names an object.
fn name(args: &Args, at: usize) -> Result<ObjectName, ClassError> {
    let name = args.text(at, "name")?.parse();
    name.map_err(|error| ClassError::BadRequest(format!("argument {}: {error}", at + 1)))
}

fn get(context: &Context, key: &str) -> Result<Option<String>, ClassError> {
    let found = context.storage().kv_get(key)?;
    Ok(found.map(|entry| String::from_utf8_lossy(&entry.value).into_owned()))
}

fn put(context: &Context, key: &str, value: &str) -> Result<(), ClassError> {
    context.storage().kv_put(key, None, value.as_bytes())?;
    Ok(())
}

/// `fail_for(ms)`: how the tests of these examples make a child fail.
fn fail_for(context: &Context, args: &Args) -> Result<Json, ClassError> {
    let millis = args.integer(0, "ms")?.unwrap_or(0).unsigned_abs();
    let until = context.unix_millis().saturating_add(millis);
    put(context, "fails_until", &until.to_string())?;
    Ok(Json::Null)
}

fn check_health(context: &Context) -> Result<(), ClassError> {
    let until = get(context, "fails_until")?.and_then(|until| until.parse().ok());
    match until.is_some_and(|until: u64| context.unix_millis() < until) {
        false => Ok(()),
        true => Err(ClassError::Thrown {
            name: "Error".to_owned(),
            message: "out of order".to_owned(),
        }),
    }
}
