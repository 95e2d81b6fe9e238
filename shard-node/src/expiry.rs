//! Objects that nobody has used for long: saved elsewhere, if that is asked for, and deleted.
//!
//! A use is a request, a call or an alarm; what operators do is none. Of classes that expire the catalog
//! learns of uses that only read, too, within a second; of what it had not learned yet when a node dies,
//! it never does. An object with an alarm will be used, so it stays. What was deleted can be restored
//! like any other object, as long as the archive has it.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use ops::Causes;
use protocol::{ClassName, Home, ObjectId, ShardId};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use crate::catalog::{Order, Place, Query, Row};
use crate::clock::Clock;
use crate::export::{CopyError, copy};
use crate::host::Host;
use crate::metrics::Metrics;
use crate::storage::{Logged, StorageError};
use crate::store::{Store, StoreError};

/// Rows that are looked at before others have their turn.
const ROWS_AT_ONCE: u32 = 64;

/// Uses are known to within this part of the time after which an object expires, and to within an hour.
const PRECISION: u32 = 8;
const PRECISION_MAX: Duration = Duration::from_secs(3600);

/// `[expiry]`: which objects are deleted when nobody uses them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExpiryConfig {
    /// How often they are looked for.
    #[serde(with = "humantime_serde")]
    pub scan_every: Duration,
    /// Most objects that a worker deletes per second.
    pub per_second_max: NonZeroU32,
    /// By class. Objects of other classes stay.
    pub classes: BTreeMap<String, ClassExpiry>,
}

/// When objects of a class expire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClassExpiry {
    /// After this time without a use, and at most an eighth of it, or an hour, later.
    #[serde(with = "humantime_serde")]
    pub unused_for: Duration,
    /// A directory, or `s3://bucket/prefix`, where the database goes first. Empty: it is only deleted.
    #[serde(default)]
    pub save_to: String,
}

impl Default for ExpiryConfig {
    fn default() -> Self {
        Self {
            scan_every: Duration::from_secs(600),
            per_second_max: NonZeroU32::new(100).expect("not zero"),
            classes: BTreeMap::new(),
        }
    }
}

impl ExpiryConfig {
    pub fn validate(&self) -> Result<(), String> {
        if self.scan_every < Duration::from_millis(10) {
            return Err(format!(
                "expiry.scan_every = {:?} must be at least 10ms",
                self.scan_every
            ));
        }
        for (class, expiry) in &self.classes {
            if let Err(error) = class.parse::<ClassName>() {
                return Err(format!("expiry.classes.{class}: {error}"));
            }
            if expiry.unused_for < Duration::from_secs(1) {
                return Err(format!(
                    "expiry.classes.{class}.unused_for = {:?} must be at least 1s",
                    expiry.unused_for
                ));
            }
        }
        Ok(())
    }
}

impl ClassExpiry {
    /// Uses closer together than this may count as one.
    pub(crate) fn precision(&self) -> Duration {
        (self.unused_for / PRECISION).min(PRECISION_MAX)
    }
}

/// Where databases are saved, by the config's text.
pub(crate) type Stores = HashMap<String, Store>;

/// Opens all places that the config names.
pub(crate) fn open_stores(config: &ExpiryConfig) -> Result<Stores, StoreError> {
    let places = config.classes.values().map(|expiry| &expiry.save_to);
    let places = places.filter(|place| !place.is_empty());
    places
        .map(|place| Ok((place.clone(), Store::open(place)?)))
        .collect()
}

const SINCE: &str = "expiry.json";

/// Since when each class expires, in milliseconds since 1970. Before that, uses that only read were not
/// noted, so an object counts as used then. Kept in the data directory.
pub(crate) fn since(
    config: &ExpiryConfig,
    data_dir: &Path,
    now: u64,
) -> io::Result<BTreeMap<String, u64>> {
    let path = data_dir.join(SINCE);
    let known: BTreeMap<String, u64> = match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_default(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
        Err(error) => return Err(error),
    };
    let classes = config.classes.keys();
    let since: BTreeMap<String, u64> = classes
        .map(|class| (class.clone(), known.get(class).copied().unwrap_or(now)))
        .collect();
    if since != known {
        let bytes = serde_json::to_vec(&since)?;
        let new = data_dir.join("expiry.json.new");
        std::fs::write(&new, bytes)?;
        std::fs::rename(&new, &path)?;
    }
    Ok(since)
}

/// What makes objects of one worker go.
pub(crate) struct Sweeper {
    pub(crate) config: Arc<ExpiryConfig>,
    pub(crate) stores: Stores,
    pub(crate) since: Arc<BTreeMap<String, u64>>,
    pub(crate) host: Rc<Host>,
    pub(crate) engine: Logged,
    pub(crate) catalogs: Vec<(Home, ShardId)>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) metrics: Rc<Metrics>,
    pub(crate) spool: PathBuf,
}

/// Why an object stays for now.
#[derive(Debug, thiserror::Error)]
enum ExpireError {
    #[error("the catalog cannot be read")]
    Catalog(#[from] rusqlite::Error),
    #[error(transparent)]
    Copy(#[from] CopyError),
    #[error("its database could not be saved")]
    Save(#[from] StoreError),
    #[error("the task that saves its database failed")]
    Task(#[from] tokio::task::JoinError),
    #[error(transparent)]
    Delete(#[from] StorageError),
}

impl Sweeper {
    /// For ever.
    pub(crate) async fn run(self) {
        if self.config.classes.is_empty() {
            return;
        }
        let mut interval = tokio::time::interval(self.config.scan_every);
        // The first tick comes at once.
        interval.tick().await;
        loop {
            interval.tick().await;
            for (class, expiry) in &self.config.classes {
                let since = self.since.get(class).copied().unwrap_or(u64::MAX);
                if since >= self.used_before(expiry) {
                    continue;
                }
                for (home, shard) in &self.catalogs {
                    if let Err(error) = self.sweep(class, expiry, *home, *shard).await {
                        warn!(class, %shard, error = %Causes(&error), "objects that nobody uses could not be looked for");
                    }
                }
            }
        }
    }

    /// Makes the objects of a class in a shard go that expired.
    async fn sweep(
        &self,
        class: &str,
        expiry: &ClassExpiry,
        home: Home,
        shard: ShardId,
    ) -> Result<(), ExpireError> {
        let mut after: Option<Place> = None;
        loop {
            // What was used a moment ago.
            while self.engine.write_some_notes() {
                tokio::task::yield_now().await;
            }
            tokio::task::yield_now().await;
            let query = Query {
                class: Some(class.to_owned()),
                without_alarm: true,
                order: Order::Used,
                below: Some(self.used_before(expiry)),
                after,
                limit: ROWS_AT_ONCE,
                ..Query::default()
            };
            let rows = self.engine.search(home, shard, &query)?;
            let Some(last) = rows.last() else {
                return Ok(());
            };
            after = Some(last.place(Order::Used));
            for row in &rows {
                match self.expire(row, expiry, shard).await {
                    Ok(true) => {
                        self.metrics.expired(class);
                        info!(class, id = row.id, name = row.name, "an object expired");
                        let pause = Duration::from_secs(1) / self.config.per_second_max.get();
                        tokio::time::sleep(pause).await;
                    }
                    Ok(false) => {}
                    Err(error) => {
                        warn!(class, id = row.id, error = %Causes(&error), "an object expired, and stays for now");
                    }
                }
            }
        }
    }

    fn used_before(&self, expiry: &ClassExpiry) -> u64 {
        let age = expiry.unused_for + expiry.precision();
        let age = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
        self.clock.unix_millis().saturating_sub(age)
    }

    /// Makes one object go; `false` if it is in use.
    async fn expire(
        &self,
        row: &Row,
        expiry: &ClassExpiry,
        shard: ShardId,
    ) -> Result<bool, ExpireError> {
        let Ok(id) = row.id.parse::<ObjectId>() else {
            return Ok(false);
        };
        let in_use = |row: &Row| row.alarm.pending.is_some() || self.host.is_awake(id);
        if in_use(row) {
            return Ok(false);
        }
        let before = self.engine.changed(id, shard)?;
        if let Some(store) = self.stores.get(&expiry.save_to) {
            let Some(copied) = copy(&self.engine, id, shard, &self.spool).await? else {
                return Ok(false);
            };
            let name = format!("{}/{id}-{}.db", row.class, copied.bookmark);
            let (store, spool) = (store.clone(), self.spool.clone());
            let put = tokio::task::spawn_blocking(move || {
                let mut file = copied.pages.into_file(&spool)?;
                store.put_file(&name, &mut file)
            });
            put.await??;
        }
        // From here to the deletion nothing else happens on this thread.
        self.engine.write_notes()?;
        let Some(now) = self.engine.find(id, shard)? else {
            return Ok(false);
        };
        let changed = self.engine.changed(id, shard)?;
        let used_again = now.used_ms >= self.used_before(expiry);
        if in_use(&now) || used_again || changed != before {
            return Ok(false);
        }
        self.engine.delete(id, shard)?;
        self.host.timers().set(id, None);
        Ok(true)
    }
}
