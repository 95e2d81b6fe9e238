//! How much there is of each class, and which objects have many keys: what operators and the advisor ask of a
//! catalog without a look at any object.
//!
//! Objects with few keys have no row for that: they are most, and cost nothing.

use rusqlite::{Connection, OptionalExtension, params};

use super::{Catalogs, Connect, signed, unsigned};
use crate::commit_log::record::FileId;

/// Bytes from which on an object counts among the larger ones, and the largest: the advisor's defaults.
const BYTES_FROM: [u64; 3] = [10_000_000, 100_000_000, 1_000_000_000];

/// The same of keys: at least so many, and more than so many.
const KEYS_FROM: u32 = 100;
const KEYS_ABOVE: u32 = 1000;

/// One class on one worker, or in one catalog.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ClassStock {
    pub(crate) objects: u64,
    pub(crate) unnamed: u64,
    pub(crate) bytes: u64,
    /// Objects under 10 MB, 100 MB, 1 GB, and above.
    pub(crate) by_bytes: [u64; 4],
    /// Objects with at least 100, and with more than 1,000 keys and rows.
    pub(crate) by_keys: [u64; 2],
}

impl ClassStock {
    pub(crate) fn add(&mut self, other: &Self) {
        self.objects += other.objects;
        self.unnamed += other.unnamed;
        self.bytes += other.bytes;
        let mine = self.by_bytes.iter_mut().chain(&mut self.by_keys);
        for (mine, others) in mine.zip(other.by_bytes.iter().chain(&other.by_keys)) {
            *mine += others;
        }
    }
}

impl Catalogs {
    /// How often a catalog was written since the start.
    pub(crate) fn times_written(&self, catalog: FileId) -> u64 {
        let written = self.written.borrow();
        written.get(&catalog).copied().unwrap_or(0)
    }

    /// What a catalog has of each class: a look at one index, about a millisecond for ten thousand objects.
    pub(crate) fn stock(
        &self,
        catalog: FileId,
        connect: Connect<'_>,
    ) -> rusqlite::Result<Vec<(String, ClassStock)>> {
        self.read(catalog, connect, |opened| {
            let connection = &opened.connection;
            let found = stock(connection);
            // The index is not needed again soon.
            connection.release_memory()?;
            found
        })
    }

    /// The objects of a catalog with the most keys and rows.
    pub(crate) fn most_keys(
        &self,
        catalog: FileId,
        limit: u32,
        connect: Connect<'_>,
    ) -> rusqlite::Result<Vec<(FileId, u32)>> {
        self.read(catalog, connect, |opened| {
            if !has_keys(&opened.connection)? {
                return Ok(Vec::new());
            }
            let mut select = opened
                .connection
                .prepare_cached("SELECT id, keys FROM many_keys ORDER BY keys DESC LIMIT ?1")?;
            let rows =
                select.query_map([limit], |row| Ok((row.get::<_, Vec<u8>>(0)?, row.get(1)?)))?;
            rows.filter_map(|row| match row {
                Ok((id, keys)) => FileId::from_slice(&id).map(|id| Ok((id, keys))),
                Err(error) => Some(Err(error)),
            })
            .collect()
        })
    }

    /// Keys and rows of an object as the catalog knows them; 0 for few.
    pub(crate) fn keys(
        &self,
        catalog: FileId,
        id: FileId,
        connect: Connect<'_>,
    ) -> rusqlite::Result<u32> {
        self.read(catalog, connect, |opened| {
            if !has_keys(&opened.connection)? {
                return Ok(0);
            }
            let found = opened
                .connection
                .prepare_cached("SELECT keys FROM many_keys WHERE id = ?1")?
                .query_row([id.as_bytes()], |row| row.get(0))
                .optional()?;
            Ok(found.unwrap_or(0))
        })
    }
}

/// Whether a catalog should be told that an object has so many keys, of which it knows `known`. Some more or
/// less is no news.
pub(crate) fn is_news(known: u32, keys: u32) -> bool {
    let band = |keys| (keys >= KEYS_FROM, keys > KEYS_ABOVE);
    band(known) != band(keys) || (keys >= KEYS_FROM && known.abs_diff(keys) > keys / 5)
}

fn stock(connection: &Connection) -> rusqlite::Result<Vec<(String, ClassStock)>> {
    let mut select = connection.prepare_cached(
        "SELECT class, count(*), sum(bytes), sum(bytes >= ?1), sum(bytes >= ?2), sum(bytes >= ?3) \
         FROM objects INDEXED BY objects_by_bytes GROUP BY class",
    )?;
    let mut unnamed =
        connection.prepare_cached("SELECT count(*) FROM objects WHERE class = ?1 AND name = ''")?;
    let mut many = match has_keys(connection)? {
        true => Some(connection.prepare_cached(
            "SELECT count(*), coalesce(sum(keys > ?2), 0) FROM many_keys \
             WHERE class = ?1",
        )?),
        false => None,
    };
    let mut found = Vec::new();
    let mut rows = select.query(params![
        signed(BYTES_FROM[0]),
        signed(BYTES_FROM[1]),
        signed(BYTES_FROM[2])
    ])?;
    while let Some(row) = rows.next()? {
        let number = |column| row.get(column).map(unsigned);
        let class: String = row.get(0)?;
        let [objects, large, larger, largest] = [number(1)?, number(3)?, number(4)?, number(5)?];
        let by_keys = match &mut many {
            Some(many) => many.query_row(params![class, KEYS_ABOVE], |row| {
                Ok([unsigned(row.get(0)?), unsigned(row.get(1)?)])
            })?,
            None => [0, 0],
        };
        let stock = ClassStock {
            objects,
            unnamed: unnamed.query_row([&class], |row| row.get(0).map(unsigned))?,
            bytes: number(2)?,
            by_bytes: [objects - large, large - larger, larger - largest, largest],
            by_keys,
        };
        found.push((class, stock));
    }
    Ok(found)
}

/// Notes the keys of an object, if it has many; it must be in the catalog.
pub(super) fn write_keys(connection: &Connection, file: FileId, keys: u32) -> rusqlite::Result<()> {
    if keys < KEYS_FROM {
        if has_keys(connection)? {
            connection
                .prepare_cached("DELETE FROM many_keys WHERE id = ?1")?
                .execute([file.as_bytes()])?;
        }
        return Ok(());
    }
    if !has_keys(connection)? {
        connection.execute_batch(
            "CREATE TABLE many_keys (id BLOB PRIMARY KEY, class TEXT NOT NULL, keys INTEGER NOT NULL) WITHOUT ROWID;
             CREATE INDEX many_keys_by_class ON many_keys (class, keys);
             CREATE INDEX many_keys_by_keys ON many_keys (keys)",
        )?;
    }
    connection
        .prepare_cached(
            "INSERT OR REPLACE INTO many_keys (id, class, keys) \
             SELECT id, class, ?2 FROM objects WHERE id = ?1",
        )?
        .execute(params![file.as_bytes(), keys])
        .map(drop)
}

/// Catalogs have no table for many keys until an object has many.
fn has_keys(connection: &Connection) -> rusqlite::Result<bool> {
    connection
        .prepare_cached("SELECT 1 FROM sqlite_schema WHERE name = 'many_keys'")?
        .exists([])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_band_or_a_fifth_more_is_news() {
        for (known, keys, want) in [
            (0, 99, false),
            (0, 100, true),
            (100, 99, true),
            (100, 120, false),
            (100, 130, true),
            (1000, 1001, true),
            (1001, 1001, false),
        ] {
            assert_eq!(is_news(known, keys), want, "{known} {keys}");
        }
    }
}
