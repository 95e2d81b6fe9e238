//! The database of an object as one file, copied while the object goes on.

use std::fs::File;
use std::future::poll_fn;
use std::io::{self, Seek, Write};
use std::path::Path;
use std::task::Poll;

use protocol::{Bookmark, ObjectId, ShardId};

use crate::history::unnamed_file;
use crate::storage::logged::Snapshot;
use crate::storage::{Engine, Logged};

/// Bytes that are copied at once: other objects wait for some tenths of a millisecond. What is no larger is
/// copied into memory.
const CHUNK_BYTES: usize = 1 << 20;

/// A copy of a database.
pub(crate) struct Copied {
    pub(crate) pages: Pages,
    pub(crate) bytes: u64,
    pub(crate) page_bytes: u32,
    /// It has all commits up to here.
    pub(crate) bookmark: Bookmark,
}

/// All pages, one after the other.
pub(crate) enum Pages {
    Memory(Vec<u8>),
    /// In a file without a name, which is at its beginning.
    File(File),
}

impl Pages {
    pub(crate) fn into_file(self, spool: &Path) -> io::Result<File> {
        match self {
            Self::File(file) => Ok(file),
            Self::Memory(bytes) => {
                let mut file = unnamed_file(spool)?;
                file.write_all(&bytes)?;
                file.rewind()?;
                Ok(file)
            }
        }
    }
}

/// Why there is no copy.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CopyError {
    #[error("the database cannot be read")]
    Open(#[from] rusqlite::Error),
    #[error("the database cannot be read")]
    Read(#[source] io::Error),
    #[error("the copy on its way out cannot be written")]
    Write(#[source] io::Error),
    #[error("the latest commit of the object was lost; it is as it was before it")]
    Lost,
}

/// Copies a database as of its last commit, which is durable when this returns; `None` if there is none.
/// It goes to a file in `spool` first: what a slow reader has not read yet must not keep the object's own
/// file from being written.
pub(crate) async fn copy(
    engine: &Logged,
    id: ObjectId,
    shard: ShardId,
    spool: &Path,
) -> Result<Option<Copied>, CopyError> {
    let Some(snapshot) = engine.snapshot(id, shard)? else {
        return Ok(None);
    };
    let pages = read(&snapshot, spool).await?;
    is_durable(engine, &snapshot).await?;
    Ok(Some(Copied {
        pages,
        bytes: snapshot.bytes(),
        page_bytes: u32::try_from(snapshot.page_bytes()).expect("at most 65536"),
        bookmark: snapshot.bookmark(),
    }))
}

async fn read(snapshot: &Snapshot, spool: &Path) -> Result<Pages, CopyError> {
    let small = usize::try_from(snapshot.bytes()).is_ok_and(|bytes| bytes <= CHUNK_BYTES);
    if small {
        let mut pages = Vec::new();
        snapshot
            .read(1, snapshot.pages(), &mut pages)
            .map_err(CopyError::Read)?;
        return Ok(Pages::Memory(pages));
    }
    let mut file = unnamed_file(spool).map_err(CopyError::Write)?;
    let at_once = u32::try_from(CHUNK_BYTES / snapshot.page_bytes()).unwrap_or(1);
    let mut chunk = Vec::with_capacity(CHUNK_BYTES);
    for first in (1..=snapshot.pages()).step_by(at_once as usize) {
        chunk.clear();
        snapshot
            .read(first, at_once, &mut chunk)
            .map_err(CopyError::Read)?;
        let wrote = tokio::task::spawn_blocking(move || {
            file.write_all(&chunk)?;
            Ok((file, chunk))
        });
        (file, chunk) = joined(wrote.await).map_err(CopyError::Write)?;
    }
    file.rewind().map_err(CopyError::Write)?;
    Ok(Pages::File(file))
}

/// Returns when what a snapshot shows is durable.
async fn is_durable(engine: &Logged, snapshot: &Snapshot) -> Result<(), CopyError> {
    poll_fn(|context| {
        if snapshot.is_lost() {
            return Poll::Ready(Err(CopyError::Lost));
        }
        if engine.durable() >= snapshot.position() {
            return Poll::Ready(Ok(()));
        }
        engine.wake_at(snapshot.position(), context.waker());
        engine.release();
        Poll::Pending
    })
    .await
}

/// What a blocking task gave.
pub(crate) fn joined<T>(result: Result<io::Result<T>, tokio::task::JoinError>) -> io::Result<T> {
    result.map_err(io::Error::other)?
}
