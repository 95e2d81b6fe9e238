//! Bookmarks, and a restore that an object asks of itself.

use std::time::Duration;

use protocol::Bookmark;

use super::{ClassError, Context};
use crate::storage::StorageError;

impl Context {
    /// The bookmark of now: what was committed of this object, without what this turn writes
    /// (<https://developers.cloudflare.com/durable-objects/api/sqlite-storage-api/#pitr-point-in-time-recovery-api-methods>).
    /// Bookmarks are ordered, and so are their texts.
    ///
    /// # Errors
    /// This turn has written already.
    pub fn current_bookmark(&self) -> Result<Bookmark, ClassError> {
        self.storage().settle_batch()?;
        let bookmark = self.storage().engine().bookmark();
        bookmark.ok_or_else(|| no_archive().into())
    }

    /// The bookmark of a time, in milliseconds since 1970: of all that was committed in that millisecond and
    /// before.
    ///
    /// # Errors
    /// The time has not come, or is out of the window of the archive.
    pub fn bookmark_for_time(&self, unix_millis: u64) -> Result<Bookmark, ClassError> {
        let window = self.storage().engine().restore_window();
        let window = window.ok_or_else(no_archive)?;
        let now = self.unix_millis();
        let age = Duration::from_millis(now.saturating_sub(unix_millis));
        if unix_millis > now || age > window {
            return Err(ClassError::BadRequest(format!(
                "the time {unix_millis} ms must be from archive.window = {window:?} ago to now, {now} ms"
            )));
        }
        Ok(Bookmark::at_time(unix_millis))
    }

    /// When the object starts next, its database becomes what it was at the bookmark before anything else
    /// happens (Cloudflare's `onNextSessionRestoreBookmark`); the bookmark to undo that. To start it at once,
    /// see [`restart`](Self::restart). If it cannot be restored, which the node's log and `dormouse objects show` tell, it
    /// starts as it is.
    ///
    /// # Errors
    /// The bookmark has not come yet; this turn has written already.
    pub fn restore_at_next_start(&self, bookmark: Bookmark) -> Result<Bookmark, ClassError> {
        let undo = self.current_bookmark()?;
        if bookmark > undo {
            return Err(ClassError::BadRequest(format!(
                "the bookmark {bookmark} has not come yet: the latest is {undo}"
            )));
        }
        self.storage().arm_restore(bookmark)?;
        Ok(undo)
    }

    /// The object leaves memory after this turn, whatever else it does, and starts again with the next event
    /// (Cloudflare's `abort`, but what this turn wrote counts).
    pub fn restart(&self) {
        self.0.failed.set(true);
    }
}

fn no_archive() -> StorageError {
    StorageError::Denied("nothing is archived: the object cannot go back in time".to_owned())
}
