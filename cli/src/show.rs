//! Answers of the admin listener as a person reads them.

use std::time::{Duration, UNIX_EPOCH};

use ops::process::print_line;
use protocol::Bookmark;
use serde_json::Value as Json;

/// What became of a command: the answer, or what is said of it.
pub(crate) fn done(as_json: bool, answer: &Json, said: &str) {
    if as_json {
        print_line(&answer.to_string());
    } else {
        print_line(said);
    }
}

/// Columns with a head, as wide as they need to be.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let widths: Vec<usize> = (0..head.len())
        .map(|column| {
            let cells = rows.iter().map(|row| row[column].chars().count());
            cells.chain([head[column].len()]).max().unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    let head = head.iter().map(ToString::to_string).collect();
    for row in std::iter::once(&head).chain(rows) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:width$}  "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text.pop();
    text
}

/// Milliseconds since 1970 as RFC 3339; `-` for none.
pub(crate) fn time(millis: &Json) -> String {
    let at = millis
        .as_u64()
        .and_then(|millis| UNIX_EPOCH.checked_add(Duration::from_millis(millis)));
    at.map_or_else(
        || "-".to_owned(),
        |at| humantime::format_rfc3339_millis(at).to_string(),
    )
}

/// A time that somebody typed, as milliseconds since 1970.
pub(crate) fn parse_time(text: &str) -> Result<u64, String> {
    let at = humantime::parse_rfc3339_weak(text)
        .map_err(|error| format!("{text:?} is no time such as 2026-11-21T12:00:00Z: {error}"))?;
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// A bookmark, or a time that stands for all that was committed in its millisecond and before.
pub(crate) fn parse_moment(text: &str) -> Result<Bookmark, String> {
    match text.parse() {
        Ok(bookmark) => Ok(bookmark),
        Err(_) => parse_time(text).map(Bookmark::at_time).map_err(|error| {
            format!("{error}; and it is no bookmark, which is 12 hex digits, a hyphen and 16")
        }),
    }
}

pub(crate) fn bytes(bytes: &Json) -> String {
    let bytes = bytes.as_u64().unwrap_or(0);
    indicatif::BinaryBytes(bytes).to_string()
}

/// What an object is called: its name, or its id.
pub(crate) fn name(row: &Json) -> String {
    match row["name"].as_str() {
        Some(name) => name.to_owned(),
        None => format!("id:{}", text(&row["id"])),
    }
}

pub(crate) fn text(value: &Json) -> String {
    match value {
        Json::Null => "-".to_owned(),
        Json::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn times_read_back() {
        assert_eq!(
            time(&json!(1_700_000_000_123u64)),
            "2023-11-14T22:13:20.123Z"
        );
        assert_eq!(
            parse_time("2023-11-14T22:13:20.123Z"),
            Ok(1_700_000_000_123)
        );
        assert_eq!(time(&Json::Null), "-");
        assert!(
            parse_time("soon")
                .unwrap_err()
                .contains("\"soon\" is no time")
        );
    }

    #[test]
    fn columns_are_as_wide_as_they_need_to_be() {
        let rows = [
            vec!["a".to_owned(), "1".to_owned()],
            vec!["long".to_owned(), "2".to_owned()],
        ];
        assert_eq!(
            table(&["N", "BYTES"], &rows),
            "N     BYTES\na     1\nlong  2"
        );
    }
}
