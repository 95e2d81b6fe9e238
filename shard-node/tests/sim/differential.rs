//! The same random SQL on our files and on stock SQLite: equal answers, equal contents.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use protocol::{ClassName, Home, ObjectId, ObjectName, ShardId};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rusqlite::Connection;
use shard_node::commit_log::record::{FileId, Named};
use shard_node::storage::{Engine, Logged, Opened};

use crate::disk::{Crash, Fault, SimDisk};
use crate::node::{ROOT, setup};

const SHARD: ShardId = ShardId(1);

struct Run {
    disk: SimDisk,
    engine: Logged,
    opened: Option<Opened>,
    stock: Connection,
    id: FileId,
    named: Named,
    random: SmallRng,
    context: String,
}

#[test]
fn random_sql_does_what_stock_sqlite_does() {
    crate::for_seeds(40, |seed| {
        let mut run = Run::new(seed);
        for step in 0..150 {
            run.context = format!("seed {seed}, step {step}");
            run.step();
        }
        run.end();
    });
}

impl Run {
    fn new(seed: u64) -> Self {
        let mut random = SmallRng::seed_from_u64(seed);
        let disk = SimDisk::new(ROOT.as_ref());
        let class: ClassName = "Sim".parse().unwrap();
        let name: ObjectName = "differential".parse().unwrap();
        let stock = Connection::open_in_memory().unwrap();
        let page = 512 << random.random_range(0..4);
        let vacuum = random.random_range(0..3);
        let pragmas = format!("PRAGMA page_size = {page}; PRAGMA auto_vacuum = {vacuum}");
        stock.execute_batch(&pragmas).unwrap();
        let mut run = Self {
            engine: Logged::open_idle(setup(&disk), Arc::default()).unwrap(),
            disk,
            opened: None,
            stock,
            id: ObjectId::named(&class, Home::Global, &name).into(),
            named: Named {
                class,
                name: Some(name),
            },
            random,
            context: String::new(),
        };
        run.both(&pragmas);
        run.both(
            "CREATE TABLE t (id INTEGER PRIMARY KEY, k TEXT, v BLOB); CREATE INDEX t_k ON t (k)",
        );
        run
    }

    fn opened(&mut self) -> &Opened {
        let (engine, id, named) = (&self.engine, self.id, &self.named);
        self.opened.get_or_insert_with(|| {
            let opened = engine.open_file(id, SHARD).unwrap();
            opened.handle.identify(named.clone(), true);
            // So few pages that transactions spill.
            opened
                .connection
                .execute_batch("PRAGMA cache_size = 4")
                .unwrap();
            opened
        })
    }

    /// One transaction, or whatever `sql` makes of it, on both sides.
    fn both(&mut self, sql: &str) {
        let ours = self.opened();
        let result = ours
            .connection
            .execute_batch(sql)
            .map_err(|error| error.to_string());
        if result.is_err() && !ours.connection.is_autocommit() {
            ours.connection.execute_batch("ROLLBACK").unwrap();
        }
        if ours.connection.is_autocommit() {
            ours.handle.rolled_back();
        }
        let want = self
            .stock
            .execute_batch(sql)
            .map_err(|error| error.to_string());
        if want.is_err() && !self.stock.is_autocommit() {
            self.stock.execute_batch("ROLLBACK").unwrap();
        }
        assert_eq!(result, want, "{}: {sql}", self.context);
    }

    fn write(&mut self) -> String {
        let random = &mut self.random;
        let id = random.random_range(0..200);
        let bytes = if random.random_ratio(1, 6) {
            random.random_range(0..20_000)
        } else {
            random.random_range(0..100)
        };
        let fill = random.random_range(0..250);
        // The same bytes on both sides.
        let blob = format!("CAST(printf('%.{bytes}c', 'x') || {fill} AS BLOB)");
        match random.random_range(0..9) {
            0 => format!("DELETE FROM t WHERE id BETWEEN {id} AND {}", id + fill / 4),
            1 => format!("UPDATE t SET k = 'k{fill}' WHERE id % 7 = {}", id % 7),
            2 => format!("INSERT OR FAIL INTO t SELECT id + {fill}, k, v FROM t LIMIT 20"),
            3 => format!(
                "WITH RECURSIVE n(i) AS (SELECT {id} UNION ALL SELECT i + 1 FROM n WHERE i < {}) INSERT OR REPLACE INTO t SELECT i, 'n' || i, {blob} FROM n",
                id + 30
            ),
            4 => "DELETE FROM t".to_owned(),
            5 => format!(
                "CREATE TABLE IF NOT EXISTS u{0} (a); INSERT INTO u{0} VALUES ({blob})",
                id % 3
            ),
            6 => format!("DROP TABLE IF EXISTS u{}", id % 3),
            _ => format!("INSERT OR REPLACE INTO t VALUES ({id}, 'k{fill}', {blob})"),
        }
    }

    fn step(&mut self) {
        match self.random.random_range(0..14) {
            0..4 => {
                let sql = self.write();
                self.both(&sql);
            }
            4 | 5 => {
                let (a, b, c) = (self.write(), self.write(), self.write());
                self.both(&format!("BEGIN; {a}; {b}; {c}; COMMIT"));
            }
            6 => {
                let (a, b) = (self.write(), self.write());
                self.both(&format!("BEGIN; {a}; {b}; ROLLBACK"));
            }
            7 => {
                let (a, b, c) = (self.write(), self.write(), self.write());
                self.both(&format!(
                    "BEGIN; {a}; SAVEPOINT s; {b}; ROLLBACK TO s; {c}; RELEASE s; COMMIT"
                ));
            }
            8 => {
                // A statement that fails half-way undoes itself, and the transaction goes on.
                let a = self.write();
                self.both(&format!(
                    "BEGIN; {a}; INSERT INTO t (id, k) SELECT id, 'twice' FROM t; COMMIT"
                ));
            }
            9 if self.random.random_ratio(1, 3) => self.both("VACUUM"),
            9 => self.both("PRAGMA incremental_vacuum(5)"),
            10 => {
                if let Some(opened) = self.opened.take() {
                    opened.close();
                }
                self.tick();
            }
            11 => {
                self.engine.release();
                self.engine.step();
                self.engine.advance();
            }
            12 => self.tick(),
            _ => self.crash(),
        }
    }

    fn tick(&mut self) {
        self.engine.tick();
        while self.engine.step() {
            self.engine.advance();
        }
        self.engine.advance();
    }

    /// All that was committed is synced; then the process dies.
    fn crash(&mut self) {
        self.engine.release();
        while self.engine.step() {
            self.engine.advance();
        }
        self.opened = None;
        let disk = self.disk.crash(if self.random.random() {
            Crash::Torn(self.random.random())
        } else {
            Crash::Process
        });
        self.disk.set_faults(vec![Fault::Stop(0)]);
        self.disk = disk;
        self.engine = Logged::open_idle(setup(&self.disk), Arc::default()).unwrap();
        let context = self.context.clone();
        let want = dump(&self.stock);
        let found = dump(&self.opened().connection);
        assert_eq!(found, want, "{context}: after a crash");
    }

    fn end(mut self) {
        let context = self.context.clone();
        let context = &context;
        let want = dump(&self.stock);
        assert_eq!(dump(&self.opened().connection), want, "{context}");
        if let Some(opened) = self.opened.take() {
            opened.close();
        }
        self.engine
            .close()
            .unwrap_or_else(|error| panic!("{context}: {error:?}"));
        let id = self.id.to_string();
        let path = Path::new(ROOT).join(format!("shards/1/{}/{id}.db", &id[8..10]));
        let files: Vec<(PathBuf, Vec<u8>)> = self.disk.files();
        let (_, bytes) = files.iter().find(|(found, _)| *found == path).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let copy = dir.path().join("copy.db");
        std::fs::write(&copy, bytes).unwrap();
        let file = Connection::open(copy).unwrap();
        let ok: String = file
            .query_row("PRAGMA integrity_check", [], |row| row.get(0))
            .unwrap();
        assert_eq!(ok, "ok", "{context}");
        assert_eq!(dump(&file), dump(&self.stock), "{context}");
    }
}

/// Schema and rows of every table.
fn dump(connection: &Connection) -> Vec<String> {
    let rows = |sql: &str| -> Vec<String> {
        let mut select = connection.prepare(sql).unwrap();
        let width = select.column_count();
        let found = select.query_map([], |row| {
            let values: Vec<rusqlite::types::Value> =
                (0..width).map(|at| row.get(at)).collect::<Result<_, _>>()?;
            Ok(format!("{values:?}"))
        });
        found.unwrap().collect::<Result<_, _>>().unwrap()
    };
    let mut all = rows("SELECT type, name, sql FROM sqlite_schema ORDER BY name");
    all.extend(rows("SELECT * FROM t ORDER BY id"));
    all.extend(rows(
        "SELECT k, count(*) FROM t INDEXED BY t_k WHERE k > '' GROUP BY k",
    ));
    for number in 0..3 {
        if all
            .iter()
            .any(|line| line.contains(&format!("\"u{number}\"")))
        {
            all.extend(rows(&format!("SELECT * FROM u{number} ORDER BY rowid")));
        }
    }
    all
}
