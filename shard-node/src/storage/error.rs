//! What can go wrong, as SQLite says it and as classes and clients are told.

use std::time::Duration;

use protocol::ObjectId;

use super::{KvError, Storage};
use crate::commit_log::LogFailure;

/// Why storage did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The SQL, or a value given to it, is wrong. SQLite's own words; `at` is a byte of the SQL.
    #[error("{message}{}", at.map(|at| format!(" (at byte {at})")).unwrap_or_default())]
    Sql { message: String, at: Option<usize> },
    /// SQL that could reach beyond the object or break a turn.
    #[error("{0}")]
    Denied(String),
    /// The time of the turn is over. The transaction is gone; the object must be reset.
    #[error("SQL ran longer than sql.turn_time_max = {0:?} in one turn")]
    OutOfTime(Duration),
    /// A statement took too much memory. The transaction is gone; the object must be reset.
    #[error("a statement took more memory than sql.memory_bytes_max = {0}")]
    OutOfMemory(u64),
    /// The object's share of the disk is full, or the turn wrote too much. Nothing of it was kept.
    #[error("storage is full: {0}")]
    Full(String),
    /// The disk is full. Nothing of this turn was kept.
    #[error("storage is full: {0}")]
    DiskFull(String),
    /// SQLite gave up the transaction after an error that the class ignored. Nothing of this turn was
    /// kept.
    #[error("an earlier error in this turn rolled back its transaction")]
    RolledBack,
    /// The database could not be opened, read or written. The object must be reset.
    #[error("database of {object} failed: {message}")]
    Broken { object: ObjectId, message: String },
    /// The commit log cannot be written. Reads still work; writes do again when the disk does.
    #[error("nothing can be written, because the commit log failed: {0}")]
    LogFailed(String),
    /// The object has asked to be restored before it starts, and is not yet.
    #[error("the object is being restored: try again")]
    Restoring,
    #[error(transparent)]
    Kv(#[from] KvError),
}

impl StorageError {
    /// Not the doing of the object's class, and nothing it could mend.
    pub fn is_of_the_platform(&self) -> bool {
        matches!(
            self,
            Self::DiskFull(_) | Self::LogFailed(_) | Self::Broken { .. } | Self::Restoring
        )
    }

    pub(crate) fn log(failure: &LogFailure) -> Self {
        if failure.disk_full {
            Self::DiskFull(format!(
                "the disk of the commit log is full: {}",
                failure.message
            ))
        } else {
            Self::LogFailed(failure.message.to_string())
        }
    }
}

impl Storage {
    pub(super) fn check<T>(
        &self,
        result: rusqlite::Result<T>,
        at: usize,
    ) -> Result<T, StorageError> {
        result.map_err(|error| self.error(error, at))
    }

    /// `at` is where the prepared text begins in the text that the class gave.
    pub(super) fn error(&self, error: rusqlite::Error, at: usize) -> StorageError {
        use rusqlite::ErrorCode as Code;
        if let rusqlite::Error::SqlInputError { msg, offset, .. } = &error {
            if let Some(reason) = self.guard.take_denial() {
                return StorageError::Denied(reason);
            }
            return StorageError::Sql {
                message: msg.clone(),
                at: usize::try_from(*offset).ok().map(|offset| at + offset),
            };
        }
        let message = error.to_string();
        match error.sqlite_error_code() {
            Some(Code::AuthorizationForStatementDenied) => {
                StorageError::Denied(self.guard.take_denial().unwrap_or(message))
            }
            Some(Code::OutOfMemory) => StorageError::OutOfMemory(self.config.memory_bytes_max),
            Some(Code::OperationInterrupted) => StorageError::OutOfTime(self.config.turn_time_max),
            Some(Code::DiskFull) => StorageError::Full(message),
            Some(
                Code::CannotOpen
                | Code::SystemIoFailure
                | Code::DatabaseCorrupt
                | Code::NotADatabase
                | Code::DatabaseBusy
                | Code::DatabaseLocked
                | Code::FileLockingProtocolFailed
                | Code::ReadOnly
                | Code::PermissionDenied
                | Code::InternalMalfunction
                | Code::ApiMisuse,
            ) => StorageError::Broken {
                object: self.identity.id,
                message,
            },
            _ => StorageError::Sql { message, at: None },
        }
    }
}
