//! Cutting a text of several SQL statements into the statements.
//!
//! rusqlite does not tell where a statement ends, and given several it prepares them all, one inside
//! the other: a long text of short statements would overflow the stack. So the text is cut first, by
//! the rule of SQLite's own `sqlite3_complete` (<https://www.sqlite.org/c3ref/complete.html>): a `;`
//! outside quotes and comments ends a statement, except inside the body of a trigger, which ends
//! with `; END ;`. One pass, whatever the text.

/// The first statement of `sql`, with its `;`, and what follows it. `sql` must not be blank.
pub(super) fn split_first(sql: &str) -> (&str, &str) {
    sql.split_at(first_end(sql))
}

/// What is left of `sql` after white space, comments and lone semicolons.
pub(super) fn skip_blank(sql: &str) -> &str {
    let bytes = sql.as_bytes();
    let mut at = 0;
    loop {
        at = skip_space(bytes, at);
        match bytes.get(at) {
            Some(b';') => at += 1,
            _ => return &sql[at..],
        }
    }
}

/// How far into `CREATE [TEMP] TRIGGER … ; END ;` the tokens so far are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing yet, or only EXPLAIN.
    Start,
    /// Not a trigger: the next `;` is the end.
    Plain,
    Create,
    /// Inside the body of a trigger.
    Trigger,
    /// There, after a `;`.
    TriggerSemicolon,
    /// There, after `; END`.
    TriggerEnd,
}

fn first_end(sql: &str) -> usize {
    let bytes = sql.as_bytes();
    let mut state = State::Start;
    let mut at = 0;
    loop {
        at = skip_space(bytes, at);
        let Some(&byte) = bytes.get(at) else {
            return bytes.len();
        };
        let end = token_end(bytes, at);
        if byte == b';' {
            state = match state {
                State::Trigger | State::TriggerSemicolon => State::TriggerSemicolon,
                _ => return end,
            };
        } else {
            let is = |word: &str| sql[at..end].eq_ignore_ascii_case(word);
            state = match state {
                State::Start if is("EXPLAIN") || is("QUERY") || is("PLAN") => State::Start,
                State::Start if is("CREATE") => State::Create,
                State::Create if is("TEMP") || is("TEMPORARY") => State::Create,
                State::Create if is("TRIGGER") => State::Trigger,
                State::Start | State::Create | State::Plain => State::Plain,
                State::TriggerSemicolon if is("END") => State::TriggerEnd,
                State::Trigger | State::TriggerSemicolon | State::TriggerEnd => State::Trigger,
            };
        }
        at = end;
    }
}

/// Just past white space and comments.
fn skip_space(bytes: &[u8], mut at: usize) -> usize {
    while let Some(&byte) = bytes.get(at) {
        at = match byte {
            b' ' | b'\t' | b'\n' | b'\r' | b'\x0c' => at + 1,
            _ => match comment_end(bytes, at) {
                Some(end) => end,
                None => break,
            },
        };
    }
    at
}

/// Just past the token that begins at `at`: a word, something quoted, or one byte.
fn token_end(bytes: &[u8], at: usize) -> usize {
    let is_word = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_' || *byte >= 0x80;
    match bytes[at] {
        quote @ (b'\'' | b'"' | b'`') => quote_end(bytes, at + 1, quote),
        b'[' => quote_end(bytes, at + 1, b']'),
        byte if is_word(&byte) => {
            let length = bytes[at..].iter().position(|byte| !is_word(byte));
            length.map_or(bytes.len(), |length| at + length)
        }
        _ => at + 1,
    }
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
    use rusqlite::{Connection, Error};

    use super::*;

    /// Cuts `sql` and runs each statement, as storage does.
    fn cut(sql: &str) -> Result<Vec<String>, Error> {
        let connection = Connection::open_in_memory()?;
        let mut statements = Vec::new();
        let mut rest = skip_blank(sql);
        while !rest.is_empty() {
            let (first, next) = split_first(rest);
            let mut statement = connection.prepare(first)?;
            let mut rows = statement.raw_query();
            while rows.next()?.is_some() {}
            statements.push(first.trim().to_owned());
            rest = skip_blank(next);
        }
        Ok(statements)
    }

    #[test]
    fn semicolons_in_strings_comments_and_triggers_do_not_cut() {
        let statements = [
            "CREATE TABLE t (a TEXT, \"b;\" TEXT, [c;] TEXT, `d;` TEXT);",
            "CREATE TRIGGER r AFTER INSERT ON t BEGIN UPDATE t SET a = CASE WHEN 1 THEN 'x;y' END; DELETE FROM t; END;",
            "create temp /* ; */ trigger s after insert on t begin select 1;; end;",
            "EXPLAIN QUERY PLAN SELECT 1;",
            "INSERT INTO t (a) VALUES ('it''s; fine') /* ; */ -- ;\n;",
            "SELECT 'last'",
        ];
        // SQLite refuses the empty statement in the body of the third; the cut is right all the same.
        let text = statements.join("\n ;; -- ;\n/* ; */");
        let mut found = Vec::new();
        let mut rest = skip_blank(&text);
        while !rest.is_empty() {
            let (first, next) = split_first(rest);
            found.push(first.trim());
            rest = skip_blank(next);
        }
        assert_eq!(found, statements);
    }

    proptest! {
        #[test]
        fn cuts_where_sqlite_cuts(pieces in proptest::collection::vec(prop_oneof![
            Just("SELECT 1"), Just(";"), Just(" "), Just("\n"), Just("-- c;\n"), Just("/*;*/"),
            Just("SELECT 'a;''b'"), Just("SELECT \"a;\" FROM (SELECT 1 AS \"a;\")"), Just("SELECT [x]"),
            Just("'"), Just("/*"), Just("--"), Just("SELECT"), Just("END"), Just("EXPLAIN SELECT 1;"),
            Just("CREATE TABLE IF NOT EXISTS t (a);"),
            Just("CREATE TRIGGER IF NOT EXISTS r AFTER INSERT ON t BEGIN SELECT 1; SELECT ';'; END;"),
        ], 0..12)) {
            let sql = pieces.concat();
            let connection = Connection::open_in_memory().unwrap();
            let mut batch = rusqlite::Batch::new(&connection, &sql);
            let mut count = 0;
            let whole = loop {
                match rusqlite::fallible_iterator::FallibleIterator::next(&mut batch) {
                    Ok(Some(mut statement)) => {
                        let mut rows = statement.raw_query();
                        let failed = loop {
                            match rows.next() {
                                Ok(Some(_)) => {}
                                Ok(None) => break false,
                                Err(_) => break true,
                            }
                        };
                        if failed {
                            break false;
                        }
                        count += 1;
                    }
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
