//! Copies databases to the archive that are too large to be written to the commit log whole, while their
//! objects go on.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use ops::Causes;
use protocol::{ObjectId, ShardId};
use tracing::warn;

use crate::archive::{Archive, ArchiveError, snapshots_every};
use crate::clock::Clock;
use crate::export::{CopyError, copy};
use crate::metrics::Metrics;
use crate::storage::Logged;
use crate::store::StoreError;

/// How often somebody looks whether there is anything to copy.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Why a database was not copied. It is thought of again within the hour, if it changes.
#[derive(Debug, thiserror::Error)]
enum KeepError {
    #[error(transparent)]
    Copy(#[from] CopyError),
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error("the task that copies it failed")]
    Task(#[from] tokio::task::JoinError),
}

/// What copies the large databases of one worker, one at a time.
pub(crate) struct Keeper {
    pub(crate) engine: Logged,
    pub(crate) archive: Archive,
    pub(crate) worker: u16,
    pub(crate) spool: PathBuf,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) metrics: Rc<Metrics>,
}

impl Keeper {
    /// For ever.
    pub(crate) async fn run(self) {
        let mut interval = tokio::time::interval(LOOK_EVERY);
        loop {
            interval.tick().await;
            while let Some((id, shard)) = self.engine.next_large() {
                if let Err(error) = self.keep(id, shard).await {
                    self.metrics.archive_failures.increment(1);
                    warn!(object = %id, error = %Causes(&error), "a large database could not be copied to the archive");
                }
            }
        }
    }

    async fn keep(&self, id: ObjectId, shard: ShardId) -> Result<(), KeepError> {
        let archive = self.archive.clone();
        let known = tokio::task::spawn_blocking(move || archive.snapshots(id.into()));
        let last = known.await??.pop();
        let bytes = self.engine.bytes(id, shard).map_err(CopyError::from)?;
        let lately = |last: u64| {
            let age = self.clock.unix_millis().saturating_sub(last);
            Duration::from_millis(age) < snapshots_every(bytes)
        };
        if bytes == 0 || last.is_some_and(|last| lately(last.bookmark.unix_millis)) {
            return Ok(());
        }
        let copied = copy(&self.engine, id, shard, &self.spool).await?;
        let Some(copied) = copied else {
            return Ok(());
        };
        let (archive, worker, spool) = (self.archive.clone(), self.worker, self.spool.clone());
        let kept = tokio::task::spawn_blocking(move || {
            let (bookmark, page_bytes) = (copied.bookmark, copied.page_bytes);
            let mut file = copied.pages.into_file(&spool).map_err(StoreError::from)?;
            archive.put_snapshot(id.into(), worker, bookmark, page_bytes, &mut file)
        });
        kept.await??;
        self.metrics.snapshots.increment(1);
        Ok(())
    }
}
