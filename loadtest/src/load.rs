//! The load of one process.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use crate::args::RunArgs;
use crate::client::{Client, Target};
use crate::ledger::Ledger;
use crate::measures::{Ended, Measures};
use crate::progress::Line;
use crate::rate::Rate;
use crate::schedule::{Arrival, Due, Gaps, Picker, Span, generate};
use crate::visitor::{Shared, Visitor};

/// Which of how many processes this is.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Part {
    pub(crate) number: u32,
    pub(crate) of: u32,
}

impl Part {
    pub(crate) const ALONE: Self = Self { number: 0, of: 1 };

    /// Connections of this part.
    fn share(self, all: u32) -> u32 {
        all / self.of + u32::from(self.number < all % self.of)
    }
}

/// Who wants to see what was measured so far, once a second.
pub(crate) type Watcher = Box<dyn Fn(&Measures, &Line)>;

struct Load {
    span: Span,
    rate: Rate,
    shared: Rc<Shared>,
    measures: RefCell<Measures>,
    /// Seconds that were shown.
    shown: Cell<u32>,
}

/// Sends the load of one part and returns what came of it. Must run within a `LocalSet`.
pub(crate) async fn load(
    args: &RunArgs,
    part: Part,
    target: &Target,
    seed: u64,
    span: Span,
    watcher: Option<Watcher>,
) -> anyhow::Result<(Measures, Ledger)> {
    let seed = seed.wrapping_add(u64::from(part.number) << 48);
    let value_bytes = usize::try_from(args.value_bytes)?;
    let load = Rc::new(Load {
        span,
        rate: args.rate.clone(),
        shared: Shared::new(part.number, part.of == 1, value_bytes),
        measures: RefCell::new(Measures::new(
            span.end - span.measure_from,
            args.rate.stages(),
        )),
        shown: Cell::new(0),
    });
    let (due, picks) = (Arc::new(Due::default()), args.picks());
    let patience = Duration::from_secs_f64(args.patience);
    tokio::time::sleep_until(span.begin.into()).await;
    let mut connections = JoinSet::new();
    for number in 0..part.share(args.connections) {
        let client = Client::new(target.clone());
        let visitor = Visitor::new(client, Rc::clone(&load.shared), patience);
        if load.rate.is_closed_loop() {
            let picker = Picker::new(&picks, seed ^ (u64::from(number) + 1))?;
            connections.spawn_local(Rc::clone(&load).saturate(visitor, picker));
        } else {
            connections.spawn_local(Rc::clone(&load).follow(visitor, Arc::clone(&due)));
        }
    }
    if !load.rate.is_closed_loop() {
        let rate = load.rate.scaled(1.0 / f64::from(part.of));
        let gaps = Gaps::new(args.arrivals, rate, !seed);
        let (due, picker) = (Arc::clone(&due), Picker::new(&picks, seed)?);
        std::thread::Builder::new()
            .name("arrivals".to_owned())
            .spawn(move || generate(&due, span, gaps, picker))?;
    }
    let watcher: Option<Rc<Watcher>> = watcher.map(Rc::new);
    let watch = watcher.clone().map(|watcher| {
        let (load, due) = (Rc::clone(&load), Arc::clone(&due));
        tokio::task::spawn_local(load.watch(due, watcher))
    });
    while let Some(ended) = connections.join_next().await {
        ended.context("a connection's task panicked")?;
    }
    if let (Some(watch), Some(watcher)) = (watch, watcher) {
        watch.abort();
        // The last second, or what there was of it.
        let shown = Duration::from_secs(load.shown.get().into());
        if load.measures.borrow().last_answer > shown {
            load.show(&due, &watcher);
        }
    }
    let mut measures = load.measures.borrow().clone();
    measures.not_sent = due.not_sent();
    let ledger = load.shared.ledger.take();
    Ok((measures, ledger))
}

impl Load {
    /// Open loop: sends what is due.
    async fn follow(self: Rc<Self>, mut visitor: Visitor, due: Arc<Due>) {
        while let Some(arrival) = due.next().await {
            self.send(&mut visitor, arrival).await;
        }
    }

    /// Closed loop: sends the next request as soon as the last one is answered.
    async fn saturate(self: Rc<Self>, mut visitor: Visitor, mut picker: Picker) {
        loop {
            let intended = now();
            if intended >= self.span.end {
                return;
            }
            self.send(&mut visitor, picker.pick(intended)).await;
        }
    }

    async fn send(&self, visitor: &mut Visitor, arrival: Arrival) {
        let sent = now();
        let late = sent.saturating_duration_since(arrival.intended);
        let visited = visitor.visit(arrival.operation, arrival.object, late);
        let result = visited.await;
        // Only what was intended after the warm-up is measured.
        if arrival.intended < self.span.measure_from {
            return;
        }
        let ended = now();
        let at = ended - self.span.measure_from;
        let mut measures = self.measures.borrow_mut();
        match result {
            Ok(()) => measures.acknowledge(&Ended {
                operation: arrival.operation,
                stage: self.rate.stage(self.span.progress(arrival.intended)),
                at,
                latency: ended - arrival.intended,
                service_time: ended - sent,
            }),
            Err(why) => measures.fail(arrival.operation, at, why),
        }
    }

    /// Shows every second of the measured time when it is over.
    async fn watch(self: Rc<Self>, due: Arc<Due>, watcher: Rc<Watcher>) {
        let from = tokio::time::Instant::from(self.span.measure_from);
        loop {
            let next = Duration::from_secs(1) * (self.shown.get() + 1);
            tokio::time::sleep_until(from + next).await;
            self.show(&due, &watcher);
        }
    }

    /// Shows the second that was not shown yet.
    fn show(&self, due: &Due, watcher: &Watcher) {
        self.shown.set(self.shown.get() + 1);
        let measures = self.measures.borrow();
        watcher(
            &measures,
            &Line::of(&measures, self.shown.get(), due.backlog()),
        );
    }
}

#[expect(clippy::disallowed_methods, reason = "a load test measures real time")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_connections_are_shared_out() {
        for of in 1..9 {
            let shares = (0..of).map(|number| Part { number, of }.share(64));
            assert_eq!(shares.sum::<u32>(), 64);
        }
    }
}
