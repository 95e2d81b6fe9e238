//! Cutting a text of several SQL statements into the statements.
//!
//! SQLite can do it, but rusqlite does not tell where a statement ends. A `;` outside quotes and
//! comments ends one, except inside the body of a trigger; there SQLite says that what comes before
//! it is incomplete, and the next `;` is tried.

use rusqlite::{Connection, Error, Statement};

/// Prepares the first statement of `sql`, which must not be blank, and tells where it ends.
pub(super) fn prepare_first<'c>(
    connection: &'c Connection,
    sql: &str,
) -> Result<(Statement<'c>, usize), Error> {
    let mut from = 0;
    loop {
        let end = statement_end(sql, from);
        match connection.prepare(&sql[..end]) {
            Err(error) if end < sql.len() && is_incomplete(&error) => from = end,
            result => return result.map(|statement| (statement, end)),
        }
    }
}

fn is_incomplete(error: &Error) -> bool {
    match error {
        Error::SqlInputError { msg, .. } => msg == "incomplete input",
        Error::SqliteFailure(_, message) => message.as_deref() == Some("incomplete input"),
        _ => false,
    }
}

/// What is left of `sql` after white space, comments and lone semicolons.
pub(super) fn skip_blank(sql: &str) -> &str {
    let bytes = sql.as_bytes();
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        at = match byte {
            b';' | b' ' | b'\t' | b'\n' | b'\r' | b'\x0c' => at + 1,
            _ => match comment_end(bytes, at) {
                Some(end) => end,
                None => break,
            },
        };
    }
    &sql[at..]
}

/// Just past the first `;` at or after `from` that is not quoted or commented out; else the end.
fn statement_end(sql: &str, from: usize) -> usize {
    let bytes = sql.as_bytes();
    let mut at = from;
    while let Some(&byte) = bytes.get(at) {
        at = match byte {
            b';' => return at + 1,
            b'\'' | b'"' | b'`' => quote_end(bytes, at + 1, byte),
            b'[' => quote_end(bytes, at + 1, b']'),
            _ => comment_end(bytes, at).unwrap_or(at + 1),
        };
    }
    bytes.len()
}

/// Just past the closing quote. A doubled quote ends one string and begins the next, which comes to
/// the same.
fn quote_end(bytes: &[u8], from: usize, quote: u8) -> usize {
    bytes[from..]
        .iter()
        .position(|&byte| byte == quote)
        .map_or(bytes.len(), |length| from + length + 1)
}

/// Just past the comment that begins at `at`, if one does.
fn comment_end(bytes: &[u8], at: usize) -> Option<usize> {
    let rest = &bytes[at..];
    if rest.starts_with(b"--") {
        let length = rest.iter().position(|&byte| byte == b'\n');
        Some(length.map_or(bytes.len(), |length| at + length + 1))
    } else if rest.starts_with(b"/*") && rest.len() > 2 {
        // To SQLite, these two at the very end are operators.
        let length = rest[2..].windows(2).position(|pair| pair == b"*/");
        Some(length.map_or(bytes.len(), |length| at + length + 4))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Cuts `sql` and runs each statement, as storage does.
    fn cut(sql: &str) -> Result<Vec<String>, Error> {
        let connection = Connection::open_in_memory()?;
        let mut statements = Vec::new();
        let mut rest = skip_blank(sql);
        while !rest.is_empty() {
            let (mut statement, end) = prepare_first(&connection, rest)?;
            let mut rows = statement.raw_query();
            while rows.next()?.is_some() {}
            statements.push(rest[..end].trim().to_owned());
            rest = skip_blank(&rest[end..]);
        }
        Ok(statements)
    }

    #[test]
    fn semicolons_in_strings_comments_and_triggers_do_not_cut() {
        let statements = [
            "CREATE TABLE t (a TEXT, \"b;\" TEXT, [c;] TEXT, `d;` TEXT);",
            "CREATE TRIGGER r AFTER INSERT ON t BEGIN UPDATE t SET a = 'x;y'; DELETE FROM t; END;",
            "INSERT INTO t (a) VALUES ('it''s; fine') /* ; */ -- ;\n;",
            "SELECT 'last'",
        ];
        assert_eq!(
            cut(&statements.join("\n ;; -- ;\n/* ; */")).unwrap(),
            statements
        );
    }

    proptest! {
        #[test]
        fn cuts_where_sqlite_cuts(pieces in proptest::collection::vec(prop_oneof![
            Just("SELECT 1"), Just(";"), Just(" "), Just("\n"), Just("-- c;\n"), Just("/*;*/"),
            Just("SELECT 'a;''b'"), Just("SELECT \"a;\" FROM (SELECT 1 AS \"a;\")"), Just("SELECT [x]"),
            Just("'"), Just("/*"), Just("--"), Just("SELECT"),
        ], 0..12)) {
            let sql = pieces.concat();
            let connection = Connection::open_in_memory().unwrap();
            let mut batch = rusqlite::Batch::new(&connection, &sql);
            let mut count = 0;
            let whole = loop {
                match rusqlite::fallible_iterator::FallibleIterator::next(&mut batch) {
                    Ok(Some(_)) => count += 1,
                    Ok(None) => break true,
                    Err(_) => break false,
                }
            };
            match cut(&sql) {
                Ok(statements) => {
                    prop_assert!(whole, "SQLite refuses {sql:?}");
                    prop_assert_eq!(statements.len(), count, "{:?}", sql);
                }
                Err(_) => prop_assert!(!whole, "SQLite accepts {sql:?}"),
            }
        }
    }
}
