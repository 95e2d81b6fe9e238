//! Copies databases to the archive that are too large to be written to the commit log whole, while their
//! objects go on.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use ops::Causes;
use protocol::Ring;
use tracing::warn;

use crate::archive::{Archive, ArchiveError, snapshots_every};
use crate::clock::Clock;
use crate::export::{CopyError, copy};
use crate::metrics::Metrics;
use crate::storage::Logged;
use crate::storage::logged::Large;
use crate::store::StoreError;

/// How often somebody looks whether there is anything to copy.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How often old copies are looked for.
const RENEW_EVERY_MS: u64 = 86_400_000;

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
    pub(crate) ring: Arc<Ring>,
}

impl Keeper {
    /// For ever.
    pub(crate) async fn run(self) {
        let mut interval = tokio::time::interval(LOOK_EVERY);
        let mut renewed_ms = self.clock.unix_millis();
        loop {
            interval.tick().await;
            while let Some(large) = self.engine.next_large() {
                self.try_keep(large).await;
            }
            if self.clock.unix_millis().saturating_sub(renewed_ms) > RENEW_EVERY_MS {
                renewed_ms = self.clock.unix_millis();
                self.renew().await;
            }
        }
    }

    /// Copies databases again that nobody changes, before their last copy is too old to be kept.
    async fn renew(&self) {
        let (archive, worker, now) = (self.archive.clone(), self.worker, self.clock.unix_millis());
        let old = tokio::task::spawn_blocking(move || archive.old_snapshots(worker, now)).await;
        match old {
            Ok(Ok(old)) => {
                for id in old {
                    let Some(shard) = id.object().map(|object| self.ring.shard_of(object)) else {
                        continue;
                    };
                    let again = true;
                    self.try_keep(Large { id, shard, again }).await;
                }
            }
            Ok(Err(error)) => {
                warn!(error = %Causes(&error), "the archive could not be looked through")
            }
            Err(error) => warn!(%error, "the archive could not be looked through"),
        }
    }

    async fn try_keep(&self, large: Large) {
        if let Err(error) = self.keep(large).await {
            self.metrics.archive_failures.increment(1);
            warn!(object = %large.id, error = %Causes(&error), "a large database could not be copied to the archive");
        }
    }

    async fn keep(&self, Large { id, shard, again }: Large) -> Result<(), KeepError> {
        let Some(id) = id.object() else { return Ok(()) };
        let bytes = self.engine.bytes(id, shard).map_err(CopyError::from)?;
        if bytes == 0 {
            return Ok(());
        }
        if !again {
            let archive = self.archive.clone();
            let known = tokio::task::spawn_blocking(move || archive.snapshots(id.into()));
            let last = known.await??.pop();
            let row = self.engine.find(id, shard).map_err(CopyError::from)?;
            let is_recent = |last: u64| {
                let age = self.clock.unix_millis().saturating_sub(last);
                // One of an object of the same name that was deleted does not count.
                let of_this = row.is_none_or(|row| row.created_ms <= last);
                of_this && Duration::from_millis(age) < snapshots_every(bytes)
            };
            if last.is_some_and(|last| is_recent(last.bookmark.unix_millis)) {
                return Ok(());
            }
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
