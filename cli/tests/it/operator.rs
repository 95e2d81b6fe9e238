//! The operator's commands, on real clusters, with what goes wrong.

use std::path::Path;
use std::process::Command;
use std::thread;

use rusqlite::Connection;
use serde_json::{Value, json};

use crate::fsck::fsck;
use crate::support::{Process, call, dormouse, eventually, gateway, metric, node};

/// An admin address to give commands to.
pub(crate) struct Admin<'a> {
    process: &'a Process,
    token: Option<&'a str>,
}

impl<'a> Admin<'a> {
    pub(crate) fn of(process: &'a Process) -> Self {
        Self {
            process,
            token: None,
        }
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = dormouse();
        command
            .env("DORMOUSE_ADMIN", &self.process.admin)
            .args(args);
        if let Some(token) = self.token {
            command.env("DORMOUSE_ADMIN_TOKEN", token);
        }
        command
    }

    /// What a command that must succeed prints.
    #[track_caller]
    pub(crate) fn run(&self, args: &[&str]) -> String {
        let output = self.command(args).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let mut all = args.to_vec();
        all.push("--json");
        serde_json::from_str(&self.run(&all)).unwrap()
    }

    /// A command that must fail, and say this.
    #[track_caller]
    pub(crate) fn refused(&self, args: &[&str], want: &str) {
        let output = self.command(args).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{args:?} should fail");
        assert!(
            error.contains(want),
            "{args:?}: {error:?} should say {want:?}"
        );
    }
}

/// A gateway before a node with two workers: the operator talks to the gateway.
struct Cluster {
    dir: tempfile::TempDir,
    node: Process,
    gateway: Process,
}

impl Cluster {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let node = Process::start(&mut node(&dir.path().join("data"), "2"));
        let gateway = Process::start(&mut gateway(&node));
        Self { dir, node, gateway }
    }

    fn admin(&self) -> Admin<'_> {
        Admin::of(&self.gateway)
    }

    fn call(&self, path: &str, args: Value) -> Value {
        call(&self.gateway.url, path, &args)
    }

    fn file(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    /// Stops cleanly, and everything is as it should be on the disk.
    fn stop(self) {
        self.gateway.kill();
        self.node.signal("TERM");
        assert!(self.node.wait().success());
        fsck(&self.dir.path().join("data"), true);
    }
}

fn names(listing: &Value) -> Vec<String> {
    let rows = listing["objects"].as_array().unwrap().iter();
    rows.map(|row| row["name"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn listings_of_all_workers_come_in_order_page_by_page() {
    let cluster = Cluster::start();
    let admin = cluster.admin();
    for number in 0..60 {
        cluster.call(&format!("Counter/c-{number:02}/increment"), json!([]));
    }
    for number in 0..5 {
        let text = "x".repeat(2000 * (5 - number));
        cluster.call(&format!("Kv/k-{number}/put"), json!(["text", text]));
    }
    let (mut all, mut after) = (Vec::new(), String::new());
    loop {
        let mut args = vec!["objects", "ls", "--limit", "7"];
        if !after.is_empty() {
            args.extend(["--after", &after]);
        }
        let page = admin.json(&args);
        all.extend(names(&page));
        match page["next"].as_str() {
            Some(next) => next.clone_into(&mut after),
            None => break,
        }
    }
    let counters = (0..60).map(|number| format!("c-{number:02}"));
    let want: Vec<String> = counters
        .chain((0..5).map(|number| format!("k-{number}")))
        .collect();
    assert_eq!(all, want);
    let listed = admin.json(&["objects", "ls", "--prefix", "c-1"]);
    assert_eq!(
        names(&listed),
        (10..20)
            .map(|number| format!("c-{number}"))
            .collect::<Vec<_>>()
    );
    let listed = admin.json(&[
        "objects",
        "ls",
        "--sort",
        "size",
        "--reverse",
        "--limit",
        "3",
    ]);
    assert_eq!(names(&listed), ["k-0", "k-1", "k-2"]);
    let listed = admin.json(&["objects", "ls", "--class", "Kv", "--reverse"]);
    assert_eq!(names(&listed), ["k-4", "k-3", "k-2", "k-1", "k-0"]);
    let listed = admin.json(&[
        "objects",
        "ls",
        "--sort",
        "used",
        "--reverse",
        "--limit",
        "2",
    ]);
    assert!(
        names(&listed).iter().all(|name| name.starts_with("k-")),
        "{listed}"
    );
    assert_eq!(
        admin.json(&["objects", "ls", "--class", "Teapot"])["objects"],
        json!([])
    );
    admin.refused(
        &["objects", "ls", "--limit", "2000"],
        "limit=2000 must be from 1 to 1000",
    );
    admin.refused(
        &["objects", "ls", "--after", "nonsense"],
        "after=\"nonsense\" is no cursor",
    );
    // A node lists its own objects, and its own admin listener does all the rest, too.
    let direct = Admin {
        process: &cluster.node,
        token: None,
    };
    assert_eq!(
        names(&direct.json(&["objects", "ls", "--class", "Kv"])).len(),
        5
    );
    let shown = direct.json(&["objects", "show", "Kv", "k-0"]);
    assert_eq!(
        (shown["name"].clone(), shown["awake"].clone()),
        (json!("k-0"), json!(true))
    );
    direct.run(&["objects", "sleep", "Kv", "k-0"]);
    assert_eq!(
        direct.json(&["objects", "show", "Kv", "k-0"])["awake"],
        false
    );
    // A unique id is found by listing (it has no name).
    let id = crate::support::request(
        &crate::support::agent(),
        "POST",
        &format!("{}/objects/Counter", cluster.gateway.url),
        "",
    );
    let id: Value = serde_json::from_str(&id.unwrap().1).unwrap();
    let id = id["id"].as_str().unwrap();
    cluster.call(&format!("Counter/id:{id}/increment"), json!([]));
    assert!(
        admin
            .run(&["objects", "ls", "--class", "Counter"])
            .contains(&format!("id:{id}"))
    );
    assert!(
        admin
            .run(&["objects", "show", "Counter", &format!("id:{id}")])
            .contains(id)
    );
    cluster.stop();
}

#[test]
fn databases_leave_and_enter_objects_whole() {
    let cluster = Cluster::start();
    let admin = cluster.admin();
    let sql = |name: &str, text: &str| cluster.call(&format!("Sql/{name}/exec"), json!([text]));
    sql(
        "a",
        "CREATE TABLE t (id INTEGER PRIMARY KEY, half INTEGER, v TEXT); CREATE INDEX by_v ON t (v)",
    );
    cluster.call("Kv/pairs/put", json!([{ "k": 1, "l": [2] }]));
    let file = cluster.file("a.db");
    // While rows are written in pairs, a copy never has half a pair.
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for pair in 0..300 {
                sql("a", &format!("INSERT INTO t (half, v) VALUES ({pair}, 'x'), ({pair}, printf('%200s', 'y'))"));
            }
        });
        while !writer.is_finished() {
            admin.run(&["objects", "export", "Sql", "a", &file]);
            let copy = Connection::open(&file).unwrap();
            let text = |sql: &str| {
                copy.query_row(sql, [], |row| row.get::<_, String>(0))
                    .unwrap()
            };
            assert_eq!(text("PRAGMA integrity_check"), "ok");
            assert_eq!(text("SELECT CAST(count(*) % 2 AS TEXT) FROM t"), "0");
        }
    });
    admin.run(&["objects", "export", "Sql", "a", &file]);
    let copy = Connection::open(&file).unwrap();
    let dump = |connection: &Connection| -> Vec<(i64, i64, String)> {
        let mut select = connection
            .prepare("SELECT id, half, v FROM t ORDER BY id")
            .unwrap();
        let rows = select.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)));
        rows.unwrap().collect::<Result<_, _>>().unwrap()
    };
    let exported = dump(&copy);
    let through = sql("a", "SELECT id, half, v FROM t ORDER BY id");
    assert_eq!(json!(exported), through["rows"]);
    // The same as another object, on whichever worker.
    for name in ["b", "c", "d", "e"] {
        admin.run(&["objects", "import", "Sql", name, &file]);
        assert_eq!(
            sql(name, "SELECT id, half, v FROM t ORDER BY id")["rows"],
            through["rows"]
        );
        assert_eq!(admin.json(&["objects", "show", "Sql", name])["name"], name);
    }
    // import(export(x)) is x, down to the bytes that SQLite does not count.
    let again = cluster.file("again.db");
    admin.run(&["objects", "export", "Sql", "b", &again]);
    assert_eq!(dump(&Connection::open(&again).unwrap()), exported);
    // A fork goes its own way.
    admin.run(&["objects", "fork", "Sql", "a", "fork"]);
    sql("fork", "DELETE FROM t WHERE id > 2");
    sql("a", "DELETE FROM t WHERE id <= 2");
    assert_eq!(sql("fork", "SELECT count(*) FROM t")["rows"], json!([[2]]));
    assert_eq!(sql("a", "SELECT count(*) FROM t")["rows"], json!([[598]]));
    admin.run(&["objects", "fork", "Kv", "pairs", "id-of-another"]);
    assert_eq!(
        cluster.call("Kv/id-of-another/list", json!([])),
        json!({ "k": 1, "l": [2] })
    );
    // A database from elsewhere, with other pages and a write-ahead log.
    let foreign = cluster.file("foreign.db");
    let made = Connection::open(&foreign).unwrap();
    made.execute_batch("PRAGMA page_size = 8192; PRAGMA journal_mode = WAL; CREATE TABLE f (x); INSERT INTO f VALUES (7)").unwrap();
    made.close().unwrap();
    admin.run(&["objects", "import", "Sql", "a", &foreign, "--replace"]);
    assert_eq!(sql("a", "SELECT x FROM f")["rows"], json!([[7]]));
    sql("a", "INSERT INTO f VALUES (8)");
    admin.run(&["objects", "sleep", "Sql", "a"]);
    assert_eq!(sql("a", "SELECT x FROM f")["rows"], json!([[7], [8]]));
    import_errors(&cluster, &foreign);
    cluster.stop();
}

fn import_errors(cluster: &Cluster, sound: &str) {
    let admin = cluster.admin();
    let import =
        |file: &str, want: &str| admin.refused(&["objects", "import", "Sql", "new", file], want);
    let write = |name: &str, bytes: &[u8]| {
        let file = cluster.file(name);
        std::fs::write(&file, bytes).unwrap();
        file
    };
    import(
        &write("text", &[b'x'; 5000]),
        "5000 bytes are no SQLite database",
    );
    import(&write("empty", b""), "0 bytes are no SQLite database");
    let bytes = std::fs::read(sound).unwrap();
    import(
        &write("short", &bytes[..bytes.len() - 100]),
        "the database breaks off",
    );
    let mut damaged = bytes.clone();
    damaged[8192 + 8..8192 + 200].fill(0xee);
    import(&write("damaged", &damaged), "damaged");
    import("/nowhere.db", "file /nowhere.db");
    admin.refused(&["objects", "import", "Sql", "a", sound], "exists already");
    admin.refused(&["objects", "fork", "Sql", "a", "b"], "exists already");
    admin.refused(
        &["objects", "fork", "Sql", "a", "a", "--replace"],
        "cannot be forked onto itself",
    );
    admin.refused(&["objects", "show", "Sql", "new"], "there is no object");
    admin.refused(
        &["objects", "export", "Sql", "new", &cluster.file("x")],
        "there is no object",
    );
    assert!(!Path::new(&cluster.file("x")).exists());
    admin.refused(
        &["objects", "show", "Teapot", "a"],
        "is of no class of this node",
    );
    admin.refused(
        &["objects", "show", "Sql", "id:12"],
        "the name or id of an object is not valid",
    );
    admin.refused(
        &[
            "objects",
            "show",
            "Sql",
            "id:11000000e5830c4cfa480ceccde959ee0eb790f2ea824c762fba9fd71d238746",
        ],
        "class",
    );
}

#[test]
fn sql_of_operators_reads_unless_told_otherwise_and_is_kept() {
    let cluster = Cluster::start();
    let admin = cluster.admin();
    cluster.call(
        "Sql/a/exec",
        json!(["CREATE TABLE t (n, s); INSERT INTO t VALUES (1, 'one'), (2, NULL)"]),
    );
    let shown = admin.run(&["sql", "Sql", "a", "SELECT n, s FROM t ORDER BY n"]);
    assert_eq!(shown, "n  s\n1  one\n2  -\n");
    let found = admin.json(&["sql", "Sql", "a", "SELECT s FROM t WHERE n = ?", "1"]);
    assert_eq!(found["rows"], json!([["one"]]));
    for write in [
        "INSERT INTO t VALUES (3, 3)",
        "DROP TABLE t",
        "CREATE TABLE u (x)",
    ] {
        admin.refused(&["sql", "Sql", "a", write], "was to read only");
    }
    admin.refused(&["sql", "Sql", "a", "DELETE FROM t", "--write"], "--who");
    admin.refused(&["sql", "Sql", "a", "SELECT x FROM t"], "no such column: x");
    admin.refused(
        &["sql", "Sql", "a", "SELECT * FROM _dormouse_meta"],
        "_dormouse_",
    );
    admin.refused(&["sql", "Sql", "new", "SELECT 1"], "there is no object");
    let write = ["--write", "--who", "ada", "--why", "ticket 7"];
    let delete = ["sql", "Sql", "a", "DELETE FROM t WHERE n = ?", "2"];
    assert_eq!(
        admin.run(&[&delete[..], &write[..]].concat()),
        "1 rows written\n"
    );
    assert_eq!(
        cluster.call("Sql/a/exec", json!(["SELECT n FROM t"]))["rows"],
        json!([[1]])
    );
    let kept = &admin.json(&["objects", "show", "Sql", "a"])["operations"][0];
    assert_eq!(
        (kept["who"].clone(), kept["why"].clone()),
        (json!("ada"), json!("ticket 7"))
    );
    let detail = kept["detail"].as_str().unwrap();
    let undo = detail
        .strip_prefix("DELETE FROM t WHERE n = ?, undo with ")
        .unwrap();
    admin.run(&["objects", "restore", "Sql", "a", "--to", undo]);
    assert_eq!(
        cluster.call("Sql/a/exec", json!(["SELECT n FROM t"]))["rows"],
        json!([[1], [2]])
    );
    assert!(
        admin
            .run(&["objects", "show", "Sql", "a"])
            .contains("sql by ada: ticket 7")
    );
    cluster.stop();
}

#[test]
fn objects_go_back_in_time_and_forward_again_while_others_serve() {
    let cluster = Cluster::start();
    let admin = cluster.admin();
    const OBJECTS: usize = 100;
    let name = |object: usize| format!("Counter/r-{object}");
    let mut moments: Vec<String> = Vec::new();
    for round in 1..=5 {
        for object in 0..OBJECTS {
            let by = json!([round]);
            cluster.call(&format!("{}/increment", name(object)), by);
        }
        let at = admin.run(&["objects", "bookmark", "Counter", "r-0"]);
        moments.push(at.trim().to_owned());
    }
    let mut sorted = moments.clone();
    sorted.sort();
    assert_eq!(sorted, moments, "bookmarks are in order");
    let value = |object: usize| cluster.call(&format!("{}/value", name(object)), json!([]));
    thread::scope(|scope| {
        let others = scope.spawn(|| {
            (0..1000).all(|number| cluster.call("Counter/busy/increment", json!([])) == number + 1)
        });
        for object in 0..OBJECTS {
            // Each worker has bookmarks of its own; a time is the same for all.
            let round = object % 5;
            let millis = u64::from_str_radix(&moments[round][..12], 16).unwrap();
            let to = format!("{millis:012x}-ffffffffffffffff");
            let object_name = format!("r-{object}");
            let done = admin.json(&["objects", "restore", "Counter", &object_name, "--to", &to]);
            let want: usize = (1..=round + 1).sum();
            assert_eq!(value(object), want, "object {object} at {to}: {done}");
            let undo = done["undo"].as_str().unwrap();
            admin.run(&["objects", "restore", "Counter", &object_name, "--to", undo]);
            assert_eq!(value(object), 15, "object {object} after the undo");
        }
        assert!(others.join().unwrap());
    });
    let bad = ["objects", "restore", "Counter", "r-0", "--to"];
    let refused = |to: &str, want: &str| admin.refused(&[&bad[..], &[to]].concat(), want);
    refused("2000-01-01T00:00:00Z", "the object did not exist at");
    refused("2090-01-01T00:00:00Z", "has not come yet");
    refused("yesterday", "is no time such as");
    admin.refused(
        &[
            "objects",
            "restore",
            "Counter",
            "nobody",
            "--to",
            &moments[0],
        ],
        "did not exist",
    );
    // After a clean stop all of it is in the archive, which then loses a part.
    let Cluster {
        dir,
        node: first,
        gateway: front,
    } = cluster;
    front.kill();
    first.signal("TERM");
    assert!(first.wait().success());
    let data = dir.path().join("data");
    let again = Process::start(&mut node(&data, "2"));
    let front = Process::start(&mut gateway(&again));
    let admin = Admin {
        process: &front,
        token: None,
    };
    let millis = &moments[2][..12];
    let to = format!("{millis}-ffffffffffffffff");
    let restore = |name: &str| admin.json(&["objects", "restore", "Counter", name, "--to", &to]);
    restore("r-3");
    assert_eq!(call(&front.url, "Counter/r-3/value", &json!([])), 6);
    let packs = || {
        let workers = std::fs::read_dir(data.join("archive")).unwrap();
        let packs = workers.flat_map(|worker| std::fs::read_dir(worker.unwrap().path()).unwrap());
        packs.map(|pack| pack.unwrap().path()).collect::<Vec<_>>()
    };
    assert!(packs().len() >= 2);
    for pack in packs() {
        let mut bytes = std::fs::read(&pack).unwrap();
        let last = bytes.len() - 200;
        for byte in &mut bytes[90..last] {
            *byte ^= 0x55;
        }
        std::fs::write(&pack, bytes).unwrap();
    }
    let damaged = ["objects", "restore", "Counter", "r-4", "--to", &to];
    admin.refused(&damaged, "in the archive is damaged");
    assert_eq!(
        call(&front.url, "Counter/r-4/value", &json!([])),
        15,
        "nothing was touched"
    );
    for pack in packs() {
        std::fs::remove_file(pack).unwrap();
    }
    admin.refused(&damaged, "is out of the window");
    assert_eq!(call(&front.url, "Counter/r-4/value", &json!([])), 15);
}

#[test]
fn a_deleted_object_is_gone_and_begins_anew() {
    let cluster = Cluster::start();
    let admin = cluster.admin();
    for _ in 0..3 {
        cluster.call("Counter/a/increment", json!([]));
    }
    admin.refused(&["objects", "delete", "Counter", "a"], "say --yes");
    admin.run(&["objects", "delete", "Counter", "a", "--yes"]);
    admin.refused(
        &["objects", "delete", "Counter", "a", "--yes"],
        "there is no object",
    );
    assert_eq!(names(&admin.json(&["objects", "ls"])), [""; 0]);
    assert_eq!(cluster.call("Counter/a/value", json!([])), 0);
    assert_eq!(names(&admin.json(&["objects", "ls"])), [""; 0]);
    assert_eq!(cluster.call("Counter/a/increment", json!([])), 1);
    assert_eq!(names(&admin.json(&["objects", "ls"])), ["a"]);
    // Also across a death of the node.
    admin.run(&["objects", "delete", "Counter", "a", "--yes"]);
    let Cluster { dir, node, gateway } = cluster;
    node.kill();
    gateway.kill();
    let data = dir.path().join("data");
    let process = Process::dev(&data);
    assert_eq!(call(&process.url, "Counter/a/value", &json!([])), 0);
    process.signal("TERM");
    assert!(process.wait().success());
    fsck(&data, true);
    let left = std::fs::read_dir(data.join("shards"))
        .unwrap()
        .flat_map(|shard| {
            let found = std::fs::read_dir(shard.unwrap().path()).unwrap();
            found
                .filter(|found| found.as_ref().unwrap().file_type().unwrap().is_dir())
                .flat_map(|digits| {
                    std::fs::read_dir(digits.unwrap().path())
                        .unwrap()
                        .map(|file| file.unwrap().path())
                        .collect::<Vec<_>>()
                })
                .collect::<Vec<_>>()
        });
    assert_eq!(left.count(), 0, "no file of an object is left");
}

/// A queue whose alarm has failed six times already, or was given up: what an operator may find.
fn queue_with_alarm(file: &str, pending: Option<(u64, u32)>, dead: bool) {
    let made = Connection::open(file).unwrap();
    made.execute_batch(
        "CREATE TABLE _dormouse_alarm (only_one INTEGER PRIMARY KEY CHECK (only_one = 1), \
           number INTEGER NOT NULL, scheduled_ms INTEGER, next_ms INTEGER, retries INTEGER NOT NULL, \
           dead_scheduled_ms INTEGER, dead_ms INTEGER, dead_error TEXT)",
    )
    .unwrap();
    let dead = dead.then_some((5000, 6000, "it was not its day"));
    made.execute(
        "INSERT INTO _dormouse_alarm VALUES (1, 1, ?1, ?1, ?2, ?3, ?4, ?5)",
        rusqlite::params![
            pending.map(|(at, _)| i64::try_from(at).unwrap()),
            pending.map_or(0, |(_, retries)| retries),
            dead.map(|dead| dead.0),
            dead.map(|dead| dead.1),
            dead.map(|dead| dead.2),
        ],
    )
    .unwrap();
}

#[test]
fn alarms_are_listed_fired_cancelled_and_run_again() {
    const FAR: u64 = 4_000_000_000_000;
    let cluster = Cluster::start();
    let admin = cluster.admin();
    let file = |name: &str, pending, dead| {
        let file = cluster.file(name);
        queue_with_alarm(&file, pending, dead);
        admin.run(&["objects", "import", "Queue", name, &file]);
    };
    // The queue's handler needs its tables: without them it fails.
    file("far", Some((FAR, 0)), false);
    file("farther", Some((FAR + 1000, 2)), false);
    file("last-try", Some((1000, 6)), false);
    file("dead", None, true);
    file("both", Some((FAR + 2000, 0)), true);
    eventually("the last try failed", || {
        let dead = admin.json(&["alarms", "dead"]);
        names(&dead) == ["dead", "both", "last-try"] || names(&dead) == ["both", "dead", "last-try"]
    });
    let listed = admin.json(&["alarms", "ls"]);
    assert_eq!(names(&listed), ["far", "farther", "both"]);
    assert_eq!(listed["objects"][1]["alarm"]["retries"], 2);
    let text = admin.run(&[
        "alarms",
        "ls",
        "--class",
        "Queue",
        "--below",
        "2096-10-02T07:06:41Z",
    ]);
    assert!(text.contains("far  ") && !text.contains("both"), "{text}");
    assert_eq!(
        admin.json(&["alarms", "ls", "--state", "overdue"])["objects"],
        json!([])
    );
    assert!(
        admin
            .run(&["alarms", "dead"])
            .contains("it was not its day")
    );
    assert!(
        admin
            .run(&["objects", "ls", "--sort", "alarm"])
            .contains("2096-10-02")
    );
    // Fired now, it fails, and waits for another try.
    admin.run(&["alarms", "fire", "Queue", "farther"]);
    eventually("it was tried", || {
        admin.json(&["objects", "show", "Queue", "farther"])["alarm"]["retries"] == 3
    });
    admin.run(&["alarms", "cancel", "Queue", "far"]);
    admin.refused(&["alarms", "cancel", "Queue", "far"], "has no alarm");
    admin.refused(&["alarms", "fire", "Queue", "dead"], "has no alarm");
    admin.refused(&["alarms", "fire", "Queue", "nobody"], "there is no object");
    admin.refused(
        &["alarms", "retry", "Queue", "both"],
        "has another alarm set",
    );
    admin.refused(&["alarms", "retry", "Queue", "far"], "has no dead letter");
    // With its tables, what was given up runs well.
    cluster.call("Queue/dead/send", json!(["work"]));
    admin.run(&["alarms", "retry", "Queue", "dead"]);
    eventually("it has run", || {
        let shown = admin.json(&["objects", "show", "Queue", "dead"]);
        shown["alarm"].is_null() && shown["dead_letter"].is_null()
    });
    admin.run(&["alarms", "drop", "Queue", "both"]);
    assert_eq!(names(&admin.json(&["alarms", "dead"])), ["last-try"]);
    cluster.stop();
}

#[test]
fn without_its_token_an_admin_listener_tells_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = crate::support::dev(dir.path());
    let process = Process::start(command.env("DORMOUSE_ADMIN_TOKEN", "open sesame"));
    call(&process.url, "Counter/a/increment", &json!([]));
    let stranger = Admin {
        process: &process,
        token: None,
    };
    stranger.refused(&["objects", "ls"], "needs `Authorization: Bearer`");
    let wrong = Admin {
        process: &process,
        token: Some("open sesamo"),
    };
    wrong.refused(
        &["objects", "delete", "Counter", "a", "--yes"],
        "needs `Authorization: Bearer`",
    );
    let right = Admin {
        process: &process,
        token: Some("open sesame"),
    };
    assert_eq!(names(&right.json(&["objects", "ls"])), ["a"]);
    let nobody = dormouse()
        .args(["objects", "ls", "--admin", "http://127.0.0.1:1"])
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&nobody.stderr);
    assert!(error.contains("ask http://127.0.0.1:1/objects"), "{error}");
    // Objects' clients cannot reach it by its header.
    let agent = crate::support::agent();
    let request = ureq::http::Request::get(format!("{}/objects/Counter/a/objects", process.url))
        .header("dormouse-operator", "1")
        .body(())
        .unwrap();
    assert_eq!(agent.run(request).unwrap().status(), 404);
}

/// The same for many objects, told by a file, and taken back by it.
#[test]
fn many_objects_are_changed_and_changed_back() {
    let cluster = Cluster::start();
    let admin = cluster.admin();
    for object in 0..30 {
        cluster.call(
            &format!("Sql/m-{object}/exec"),
            json!(["CREATE TABLE t (v); INSERT INTO t VALUES (1)"]),
        );
    }
    cluster.call("Sql/other/exec", json!(["CREATE TABLE t (v)"]));
    let file = |name: &str| cluster.dir.path().join(name).to_str().unwrap().to_owned();
    let migrated = file("migrated");
    let select = [
        "objects",
        "bulk",
        "--class",
        "Sql",
        "--prefix",
        "m-",
        "--rate",
        "10000",
        "--outcome",
    ];
    let with = |outcome: &str, action: &[&str]| -> Vec<String> {
        let all = select.iter().chain([&outcome]).chain(action);
        all.map(|arg| (*arg).to_owned()).collect()
    };
    let run = |outcome: &str, action: &[&str]| {
        let args = with(outcome, action);
        admin.json(&args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let refused = |outcome: &str, action: &[&str], want: &str| {
        let args = with(outcome, action);
        admin.refused(&args.iter().map(String::as_str).collect::<Vec<_>>(), want);
    };
    // One of them cannot be migrated.
    cluster.call("Sql/m-7/exec", json!(["ALTER TABLE t ADD COLUMN w"]));
    let migrate = [
        "sql",
        "ALTER TABLE t ADD COLUMN w; UPDATE t SET w = 2",
        "--write",
        "--who",
        "me",
        "--why",
        "v2",
    ];
    refused(&migrated, &migrate, "1 objects failed");
    let lines = std::fs::read_to_string(&migrated).unwrap();
    assert_eq!(lines.lines().count(), 31);
    assert!(lines.contains("duplicate column name"));
    let value =
        |object: u32| cluster.call(&format!("Sql/m-{object}/exec"), json!(["SELECT * FROM t"]));
    assert_eq!(value(3)["rows"], json!([[1, 2]]));
    // Again: only that one is tried.
    cluster.call("Sql/m-7/exec", json!(["ALTER TABLE t DROP COLUMN w"]));
    assert_eq!(
        run(&migrated, &migrate),
        json!({ "done": 1, "failed": 0, "before": 29 })
    );
    refused(&migrated, &["sleep"], "is the outcome of another action");
    // And back.
    let back = file("back");
    assert_eq!(
        run(&back, &["undo", &migrated]),
        json!({ "done": 30, "failed": 0, "before": 0 })
    );
    for object in [3, 7, 29] {
        assert_eq!(value(object)["rows"], json!([[1]]), "object {object}");
    }
    let copies = file("copies");
    std::fs::create_dir(&copies).unwrap();
    run(&file("exported"), &["export", &copies]);
    assert_eq!(std::fs::read_dir(&copies).unwrap().count(), 30);
    run(&file("asleep"), &["sleep"]);
    refused(&file("deleted"), &["delete"], "say --yes");
    run(&file("deleted"), &["delete", "--yes"]);
    assert_eq!(names(&admin.json(&["objects", "ls"])), ["other"]);
}

/// Objects that nobody uses are saved and deleted; used ones, those with an alarm, and others stay.
#[test]
fn objects_that_nobody_uses_expire() {
    let dir = tempfile::tempdir().unwrap();
    let saved = dir.path().join("saved");
    let config = dir.path().join("node.toml");
    std::fs::write(
        &config,
        format!(
            "objects.idle_after = '100ms'\n\
             [expiry]\nscan_every = '100ms'\nclasses.Sql = {{ unused_for = '2s', save_to = {:?} }}\n\
             classes.Queue = {{ unused_for = '1s' }}\n",
            saved.to_str().unwrap()
        ),
    )
    .unwrap();
    let mut command = node(&dir.path().join("data"), "1");
    let node = Process::start(command.arg("--config").arg(&config));
    let front = Process::start(&mut gateway(&node));
    let admin = Admin::of(&front);
    let exec = |name: &str, sql: &str| call(&front.url, &format!("Sql/{name}/exec"), &json!([sql]));
    exec(
        "unused",
        "CREATE TABLE t (v); INSERT INTO t VALUES ('kept')",
    );
    exec("read", "CREATE TABLE t (v)");
    call(&front.url, "Counter/other/increment", &json!([]));
    call(&front.url, "Queue/jobs/send", &json!(["a job"]));
    // Its lease runs out by alarm.
    call(
        &front.url,
        "Queue/jobs/receive",
        &json!([{ "visibilityMs": 3_600_000 }]),
    );
    eventually("the one that nobody reads expires", || {
        // Asleep in between: it is the catalog that must know.
        exec("read", "SELECT * FROM t");
        let sql = admin.json(&["objects", "ls", "--class", "Sql"]);
        names(&sql) == ["read"]
    });
    let files = std::fs::read_dir(saved.join("Sql")).unwrap();
    let files: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    assert_eq!(files.len(), 1);
    admin.run(&[
        "objects",
        "import",
        "Sql",
        "unused",
        files[0].to_str().unwrap(),
    ]);
    assert_eq!(exec("unused", "SELECT v FROM t")["rows"][0][0], "kept");
    assert_eq!(metric(&node.admin, "shard_objects_expired_total"), 1.0);
    drop(node);
    std::fs::write(&config, "expiry.classes.Nope.unused_for = '2s'").unwrap();
    let mut command = crate::support::node(&dir.path().join("data"), "1");
    let output = command.arg("--config").arg(&config).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        error.contains("expiry.classes.Nope is no class of this node"),
        "{error}"
    );
}
