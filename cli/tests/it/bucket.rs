//! What is kept in a bucket: a real server that speaks S3, on a directory.

use std::path::{Path, PathBuf};
use std::process::Command;

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use rusqlite::Connection;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use s3s_fs::FileSystem;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

use crate::operator::Admin;
use crate::support::{Process, eventually, metric, node};

const KEY: &str = "AKIDTEST";
const SECRET: &str = "not-so-secret";

/// A server with one bucket, `keep`.
pub(crate) struct Bucket {
    directory: tempfile::TempDir,
    address: String,
    runtime: Option<Runtime>,
}

impl Bucket {
    pub(crate) fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("keep")).unwrap();
        let runtime = Runtime::new().unwrap();
        let mut service = S3ServiceBuilder::new(FileSystem::new(directory.path()).unwrap());
        service.set_auth(SimpleAuth::from_single(KEY, SECRET));
        let service = service.build();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let service = service.clone();
                tokio::spawn(async move {
                    let server = auto::Builder::new(TokioExecutor::new());
                    let connection = server.serve_connection(TokioIo::new(stream), service);
                    // Clients may close when they like.
                    drop(connection.await);
                });
            }
        });
        Self {
            directory,
            address,
            runtime: Some(runtime),
        }
    }

    /// The access to it, for a process.
    pub(crate) fn give_to<'c>(&self, command: &'c mut Command) -> &'c mut Command {
        command
            .env("AWS_ACCESS_KEY_ID", KEY)
            .env("AWS_SECRET_ACCESS_KEY", SECRET)
            .env("AWS_REGION", "us-east-1")
            .env("AWS_ENDPOINT", &self.address)
            .env("AWS_ALLOW_HTTP", "true")
    }

    /// Files of the bucket whose names end so.
    pub(crate) fn files(&self, suffix: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut directories = vec![self.directory.path().join("keep")];
        while let Some(directory) = directories.pop() {
            for entry in std::fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    directories.push(path);
                } else if path.to_string_lossy().ends_with(suffix) {
                    found.push(path);
                }
            }
        }
        found
    }

    fn stop(&mut self) {
        drop(self.runtime.take());
    }
}

fn start(bucket: &Bucket, data: &Path, config: &Path) -> Process {
    let mut command = node(data, "1");
    command.arg("--config").arg(config);
    Process::start(bucket.give_to(&mut command))
}

/// Restores read from the bucket what was put there: segments of the log, and snapshots of a database that
/// is too large for the log.
#[test]
fn an_archive_in_a_bucket_restores_objects() {
    let mut bucket = Bucket::start();
    let dir = tempfile::tempdir().unwrap();
    let (data, config) = (dir.path().join("data"), dir.path().join("node.toml"));
    std::fs::write(
        &config,
        "[archive]\nlocation = \"s3://keep/arch\"\nbase_bytes_max = 8192\n",
    )
    .unwrap();
    let large = dir.path().join("large.db");
    let stock = Connection::open(&large).unwrap();
    stock
        .execute_batch(
            "CREATE TABLE t (id INTEGER PRIMARY KEY, v BLOB);
             WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 100)
             INSERT INTO t SELECT n, randomblob(1000) FROM numbers",
        )
        .unwrap();
    drop(stock);
    let process = start(&bucket, &data, &config);
    Admin::of(&process).run(&["objects", "import", "Sql", "large", large.to_str().unwrap()]);
    process.signal("TERM");
    assert!(process.wait().success());
    // A process does not know what bases another one made.
    let process = start(&bucket, &data, &config);
    let admin = Admin::of(&process);
    let write = |admin: &Admin<'_>, sql: &str| {
        admin.run(&[
            "sql", "Sql", "large", sql, "--write", "--who", "me", "--why", "a test",
        ]);
    };
    write(&admin, "UPDATE t SET v = 'first' WHERE id = 1");
    eventually("a snapshot is made", || {
        metric(&process.admin, "shard_snapshots_total") >= 1.0
    });
    write(&admin, "UPDATE t SET v = 'second' WHERE id = 1");
    let bookmark = admin.run(&["objects", "bookmark", "Sql", "large"]);
    write(&admin, "DELETE FROM t");
    process.signal("TERM");
    assert!(process.wait().success());
    assert_eq!(bucket.files(".db").len(), 1, "one snapshot");
    assert!(!bucket.files(".pack").is_empty());
    // The snapshot, and a commit from the packs.
    let process = start(&bucket, &data, &config);
    let admin = Admin::of(&process);
    admin.run(&[
        "objects",
        "restore",
        "Sql",
        "large",
        "--to",
        bookmark.trim(),
    ]);
    let found = admin.json(&[
        "sql",
        "Sql",
        "large",
        "SELECT count(*), min(v) FROM t WHERE id = 1",
    ]);
    assert_eq!(found["rows"][0], serde_json::json!([1, "second"]));
    let found = admin.json(&["sql", "Sql", "large", "SELECT count(*) FROM t"]);
    assert_eq!(found["rows"][0][0], 100);
    // A bucket that is gone is a clear error, and the object stays as it is.
    bucket.stop();
    admin.refused(
        &[
            "objects",
            "restore",
            "Sql",
            "large",
            "--to",
            "2026-01-01T00:00:00Z",
        ],
        "the archive cannot be used",
    );
    let found = admin.json(&["sql", "Sql", "large", "SELECT count(*) FROM t"]);
    assert_eq!(found["rows"][0][0], 100);
}
