//! A restore that an object has asked for, as its database remembers it until it is done.

use protocol::Bookmark;
use rusqlite::{Connection, OptionalExtension};
use tracing::warn;

use super::engine::prepare_ours;
use super::{Open, Segment, SqlValue, Storage, StorageError};

/// Whether a restore is to come before the object starts next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Armed {
    No,
    /// This copy of the object has asked for one, in a turn that may have been undone.
    Asked,
    /// An earlier copy has, and nothing may happen before it.
    Due(Bookmark),
    /// Whoever restores it looks at the database.
    Ignored,
}

impl Armed {
    pub(super) fn due(self) -> Option<Bookmark> {
        match self {
            Self::Due(bookmark) => Some(bookmark),
            Self::No | Self::Asked | Self::Ignored => None,
        }
    }
}

impl Storage {
    /// For whoever restores the object.
    #[must_use]
    pub(crate) fn ignore_armed(self) -> Self {
        self.armed.set(Armed::Ignored);
        self
    }

    /// Commits what earlier turns wrote, so that a bookmark has it.
    ///
    /// # Errors
    /// This turn has written, too, and that must not be committed yet.
    pub(crate) fn settle_batch(&self) -> Result<(), StorageError> {
        if self.segment.get() != Segment::Clean {
            return Err(StorageError::Denied(
                "a bookmark must be asked for before the turn writes".to_owned(),
            ));
        }
        self.commit().map(drop)
    }

    /// Before the object starts next it is to be restored, if this turn is committed.
    pub(crate) fn arm_restore(&self, bookmark: Bookmark) -> Result<(), StorageError> {
        self.write_ours(
            "INSERT INTO _dormouse_meta (key, value) VALUES ('restore', ?) \
             ON CONFLICT DO UPDATE SET value = excluded.value",
            &[SqlValue::Text(bookmark.to_string())],
        )?;
        self.armed.set(Armed::Asked);
        Ok(())
    }

    /// What the object has asked to be restored to.
    pub(crate) fn asked_restore(&self) -> Result<Option<Bookmark>, StorageError> {
        let open = self.open()?;
        if !self.may_have_tables(&open) {
            return Ok(None);
        }
        drop(open);
        self.reading(stored)
    }

    /// It is not to be, or has been.
    pub(crate) fn disarm_restore(&self) -> Result<(), StorageError> {
        self.write_ours("DELETE FROM _dormouse_meta WHERE key = 'restore'", &[])
    }

    pub(super) fn armed_restore(&self, open: &Open) -> Option<Bookmark> {
        if self.armed.get() != Armed::Asked {
            return self.armed.get().due();
        }
        let _trusted = self.guard.trusted();
        stored(&open.connection).unwrap_or_else(|error| {
            warn!(object = %self.identity.id, %error, "whether a restore is due could not be read");
            None
        })
    }
}

fn stored(connection: &Connection) -> rusqlite::Result<Option<Bookmark>> {
    let select = "SELECT value FROM _dormouse_meta WHERE key = 'restore'";
    let found: Option<String> = prepare_ours(connection, select)?
        .query_row([], |row| row.get(0))
        .optional()?;
    Ok(found.and_then(|text| text.parse().ok()))
}
