//! The classes that ship with the node, and the set of classes a node hosts.

mod answer;
pub mod counter;
pub mod kv;
pub mod limiter;
pub mod queue;
pub mod sharded_counter;
pub mod sql;
mod values;

use std::sync::Arc;

use protocol::{ClassName, ObjectId};

use crate::class::Class;

/// The classes of one node. A class named twice is replaced by the later one.
#[derive(Clone, Default)]
pub struct Classes(Vec<Arc<dyn Class>>);

impl Classes {
    /// [`Counter`](counter::Counter), [`Kv`](kv::Kv), [`Sql`](sql::Sql) and [`Queue`](queue::Queue), and
    /// for gateways [`Limiter`](limiter::Limiter) and the two classes of [`sharded_counter`].
    pub fn built_in() -> Self {
        Self::default()
            .with(counter::Counter::default())
            .with(kv::Kv::default())
            .with(sql::Sql::default())
            .with(queue::Queue::default())
            .with(limiter::Limiter::default())
            .with(sharded_counter::Coordinator::default())
            .with(sharded_counter::Shard::default())
    }

    #[must_use]
    pub fn with(mut self, class: impl Class) -> Self {
        self.0.retain(|known| known.name() != class.name());
        self.0.push(Arc::new(class));
        self
    }

    pub fn iter(&self) -> impl Iterator<Item = &Arc<dyn Class>> {
        self.0.iter()
    }

    /// The class that an id is bound to, if it is one of these.
    pub fn of(&self, id: ObjectId) -> Option<&Arc<dyn Class>> {
        self.0
            .iter()
            .find(|class| id.check_class(class.name()).is_ok())
    }

    /// Whether one has this name.
    pub fn has(&self, name: &str) -> bool {
        self.0.iter().any(|class| class.name().as_str() == name)
    }

    /// Whether clients may use one with this name.
    pub fn offers(&self, name: &str) -> bool {
        let mut offered = self.0.iter().filter(|class| !class.is_internal());
        offered.any(|class| class.name().as_str() == name)
    }

    /// All names that clients may use, for the refusal of one that is not among them.
    pub fn names(&self) -> String {
        let offered = self.0.iter().filter(|class| !class.is_internal());
        let names: Vec<&str> = offered.map(|class| class.name().as_str()).collect();
        names.join(", ")
    }
}

fn name(text: &str) -> ClassName {
    text.parse()
        .expect("the names of built-in classes are legal")
}
