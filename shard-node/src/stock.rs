//! How much there is of each class, for metrics and the advisor: read from the catalogs that changed, one after
//! the other, with turns in between.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::rc::Rc;
use std::time::Duration;

use protocol::{Home, ShardId};
use tracing::warn;

use crate::catalog::ClassStock;
use crate::metrics::Metrics;
use crate::storage::Logged;

/// Pause between two looks. A look at catalogs of a million objects takes some hundred milliseconds, in pieces.
const LOOK_EVERY: Duration = Duration::from_secs(15);

/// Follows the catalogs of one worker.
pub(crate) struct StockTaker {
    pub(crate) engine: Logged,
    pub(crate) catalogs: Vec<(Home, ShardId)>,
    pub(crate) metrics: Rc<Metrics>,
}

/// One catalog when it was last read.
struct Known {
    written: u64,
    classes: Vec<(String, ClassStock)>,
}

impl StockTaker {
    /// For ever.
    pub(crate) async fn run(self) {
        let mut known = HashMap::new();
        loop {
            if self.look(&mut known).await {
                self.publish(&known);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Reads the catalogs that were written since; `false` if none was.
    async fn look(&self, known: &mut HashMap<(Home, ShardId), Known>) -> bool {
        let mut news = false;
        for (home, shard) in &self.catalogs {
            let written = self.engine.times_written(*home, *shard);
            let entry = known.entry((*home, *shard));
            if matches!(&entry, Entry::Occupied(known) if known.get().written == written) {
                continue;
            }
            match self.engine.stock(*home, *shard) {
                Ok(classes) => {
                    news = true;
                    entry.insert_entry(Known { written, classes });
                }
                Err(error) => {
                    warn!(%shard, %error, "what a shard has could not be read; tried again");
                }
            }
            tokio::task::yield_now().await;
        }
        news
    }

    fn publish(&self, known: &HashMap<(Home, ShardId), Known>) {
        let mut all = HashMap::<&str, ClassStock>::new();
        for (class, stock) in known.values().flat_map(|known| &known.classes) {
            all.entry(class).or_default().add(stock);
        }
        // Classes of which nothing is left count too.
        self.metrics.each_class(|usage| {
            let stock = all.remove(usage.class.as_str());
            usage.set_stock(stock.unwrap_or_default());
        });
        for (class, stock) in all {
            if let Ok(class) = class.parse() {
                self.metrics.class(&class).set_stock(stock);
            }
        }
    }
}
