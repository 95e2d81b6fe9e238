//! Running SQL of classes: cut into statements, authorized, bounded, its rows collected.

use rusqlite::types::ValueRef;
use rusqlite::{Connection, Statement};

use super::{SqlValue, Storage, StorageError, heap, statements};

/// What a row, and a value however small, count against the bound of a result: each exists for a
/// moment as a SQL value, as JSON and as text.
const ROW_COST_BYTES: usize = 128;
const VALUE_COST_BYTES: usize = 128;

/// What a query gave.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Rows {
    pub columns: Vec<String>,
    pub rows: Vec<Vec<SqlValue>>,
    /// Rows stepped over by full scans, or else rows returned: a lower bound of what was read, because
    /// SQLite does not count rows that an index look-up visits and a filter then drops.
    pub rows_read: u64,
    /// Rows inserted, changed or deleted, triggers included, index entries not.
    pub rows_written: u64,
}

impl Storage {
    /// Runs SQL of a class: one or several statements, `params` bound to the last of them. Returns
    /// what the last one gave.
    ///
    /// All rows are held in memory; a result that would take more than `bytes_max`, there or as JSON, is
    /// refused.
    pub fn exec(
        &self,
        sql: &str,
        params: &[SqlValue],
        bytes_max: usize,
    ) -> Result<Rows, StorageError> {
        if sql.len() > self.config.statement_bytes_max as usize {
            return Err(StorageError::Sql {
                message: format!(
                    "SQL of {} bytes is longer than {}",
                    sql.len(),
                    self.config.statement_bytes_max
                ),
                at: None,
            });
        }
        let _user = self.guard.user_sql(sql);
        let _limited = heap::limit(self.config.memory_bytes_max);
        let mut rest = statements::skip_blank(sql);
        if rest.is_empty() {
            return Err(StorageError::Sql {
                message: "there is no statement in this SQL".to_owned(),
                at: None,
            });
        }
        loop {
            // Each may need what the one before it created: prepared only when its turn comes.
            let at = sql.len() - rest.len();
            let (first, next) = statements::split_first(rest);
            let next = statements::skip_blank(next);
            if next.is_empty() {
                return self.exec_one(first, at, params, bytes_max);
            }
            self.exec_one(first, at, &[], bytes_max)?;
            rest = next;
        }
    }

    /// One statement, which begins at byte `at` of the text that the class gave.
    fn exec_one(
        &self,
        sql: &str,
        at: usize,
        params: &[SqlValue],
        bytes_max: usize,
    ) -> Result<Rows, StorageError> {
        let open = self.open()?;
        // The cache is keyed by text, and one of our own statements may have the same: text that names
        // a reserved table is authorized afresh each time.
        if self.guard.names_reserved() {
            let mut statement = self.check(open.connection.prepare(sql), at)?;
            self.begin_if_writing(&open, &statement, sql)?;
            self.run(&open.connection, &mut statement, params, bytes_max)
        } else {
            let mut statement = self.check(open.connection.prepare_cached(sql), at)?;
            self.begin_if_writing(&open, &statement, sql)?;
            self.run(&open.connection, &mut statement, params, bytes_max)
        }
    }

    fn run(
        &self,
        connection: &Connection,
        statement: &mut Statement<'_>,
        params: &[SqlValue],
        bytes_max: usize,
    ) -> Result<Rows, StorageError> {
        let wanted = statement.parameter_count();
        if wanted != params.len() {
            return Err(StorageError::Sql {
                message: format!(
                    "the statement has {wanted} parameters, but {} were given",
                    params.len()
                ),
                at: None,
            });
        }
        for (number, value) in (1..).zip(params) {
            self.check(statement.raw_bind_parameter(number, value), 0)?;
        }
        let changes_before = connection.total_changes();
        statement.reset_status(rusqlite::StatementStatus::FullscanStep);
        let width = statement.column_count();
        let mut rows = Rows {
            columns: statement.column_names().map(str::to_owned).collect(),
            ..Rows::default()
        };
        let mut bytes = 0;
        {
            let mut cursor = statement.raw_query();
            while let Some(row) = self.check(cursor.next(), 0)? {
                let mut values = Vec::with_capacity(width);
                bytes += ROW_COST_BYTES;
                for column in 0..width {
                    let value = self.check(row.get_ref(column), 0)?;
                    bytes += cost(value);
                    values.push(owned(value));
                }
                if bytes > bytes_max {
                    return Err(StorageError::Sql {
                        message: format!(
                            "the result is larger than {bytes_max} bytes: ask for less, with LIMIT"
                        ),
                        at: None,
                    });
                }
                rows.rows.push(values);
            }
        }
        let scanned = statement.get_status(rusqlite::StatementStatus::FullscanStep);
        let returned = rows.rows.len() as u64;
        rows.rows_read = match u64::try_from(scanned) {
            // A scan steps once less than it has rows.
            Ok(steps) if steps > 0 => returned.max(steps + 1),
            _ => returned,
        };
        rows.rows_written = connection.total_changes() - changes_before;
        if width == 0 {
            rows.rows_read = 0;
        }
        self.meter.rows(rows.rows_read, returned, rows.rows_written);
        Ok(rows)
    }
}

/// What a value of a result may take at the most, in memory as it passes from here to the caller, or
/// as JSON on the wire.
fn cost(value: ValueRef<'_>) -> usize {
    let beyond = match value {
        ValueRef::Null | ValueRef::Integer(_) | ValueRef::Real(_) => 0,
        // Control characters take six bytes in JSON, quotes and backslashes two.
        ValueRef::Text(text) => text
            .iter()
            .map(|byte| match byte {
                0..0x20 => 6,
                b'"' | b'\\' => 2,
                _ => 1,
            })
            .sum(),
        ValueRef::Blob(blob) => blob.len() / 3 * 4 + 4,
    };
    VALUE_COST_BYTES + beyond
}

fn owned(value: ValueRef<'_>) -> SqlValue {
    match value {
        ValueRef::Null => SqlValue::Null,
        ValueRef::Integer(integer) => SqlValue::Integer(integer),
        ValueRef::Real(real) => SqlValue::Real(real),
        ValueRef::Text(text) => SqlValue::Text(String::from_utf8_lossy(text).into_owned()),
        ValueRef::Blob(blob) => SqlValue::Blob(blob.to_vec()),
    }
}
