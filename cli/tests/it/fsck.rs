//! `dormouse fsck`, after all that may happen to a data directory.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::{Process, call, dormouse, gateway, node};

/// What fsck prints; it must, or must not, be content.
#[track_caller]
pub(crate) fn fsck(data_dir: &Path, sound: bool) -> String {
    let output = dormouse().arg("fsck").arg(data_dir).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8(text).unwrap();
    assert_eq!(output.status.success(), sound, "{text}");
    text
}

fn increment(gateway: &Process, objects: std::ops::Range<u32>) {
    for object in objects {
        call(
            &gateway.url,
            &format!("Counter/c{object}/increment"),
            &json!([]),
        );
    }
}

fn values(gateway: &Process, objects: std::ops::Range<u32>) -> Vec<Value> {
    let value = |object| {
        call(
            &gateway.url,
            &format!("Counter/c{object}/value"),
            &json!([]),
        )
    };
    objects.map(value).collect()
}

/// Files below a directory whose path contains `part`.
fn files(directory: &Path, part: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![directory.to_owned()];
    while let Some(directory) = todo.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                todo.push(path);
            } else if path.to_str().unwrap().contains(part) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

#[test]
fn a_directory_is_sound_after_kill_9_and_after_a_clean_stop() {
    let dir = tempfile::tempdir().unwrap();
    let running = Process::start(&mut node(dir.path(), "2"));
    let front = Process::start(&mut gateway(&running));
    increment(&front, 0..40);
    let refused = fsck(dir.path(), false);
    assert!(refused.contains("belongs to a running node"), "{refused}");
    running.kill();
    let found = fsck(dir.path(), true);
    assert!(found.contains("40 objects, 40 in the catalogs"), "{found}");
    // Other workers own the shards now; the log of the second belongs to nobody.
    let running = Process::start(&mut node(dir.path(), "1"));
    let front = Process::start(&mut gateway(&running));
    assert_eq!(values(&front, 0..40), vec![json!(1); 40]);
    increment(&front, 0..10);
    running.signal("TERM");
    assert!(running.wait().success());
    let found = fsck(dir.path(), true);
    assert!(
        found.contains("commits of 0 databases that their files lack"),
        "{found}"
    );
    assert!(found.contains("40 objects, 40 in the catalogs"), "{found}");
    let running = Process::start(&mut node(dir.path(), "3"));
    let front = Process::start(&mut gateway(&running));
    assert_eq!(values(&front, 0..10), vec![json!(2); 10]);
    assert_eq!(values(&front, 10..40), vec![json!(1); 30]);
}

#[test]
fn damage_is_found_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let running = Process::start(&mut node(dir.path(), "1"));
    let front = Process::start(&mut gateway(&running));
    increment(&front, 0..3);
    running.signal("TERM");
    assert!(running.wait().success());
    let objects = files(dir.path(), "0000");
    let objects: Vec<&PathBuf> = objects
        .iter()
        .filter(|path| path.extension().is_some_and(|is| is == "db"))
        .collect();
    assert_eq!(objects.len(), 3, "{objects:?}");
    let sound = std::fs::read(objects[0]).unwrap();
    let mut damaged = sound.clone();
    // The head of the second page.
    damaged[1024..1040].fill(0xee);
    std::fs::write(objects[0], damaged).unwrap();
    let id = objects[0].file_stem().unwrap().to_str().unwrap();
    let found = fsck(dir.path(), false);
    assert!(found.contains(&format!("database {id}: ")), "{found}");
    std::fs::remove_file(objects[0]).unwrap();
    let found = fsck(dir.path(), false);
    assert!(
        found.contains(&format!("lists {id}, which has no database")),
        "{found}"
    );
    std::fs::write(objects[0], sound).unwrap();
    fsck(dir.path(), true);
    // A node that finds its log damaged says so and does not start; nor does it change anything.
    let running = Process::start(&mut node(dir.path(), "1"));
    let front = Process::start(&mut gateway(&running));
    increment(&front, 0..3);
    increment(&front, 0..3);
    running.kill();
    let log = files(dir.path(), "/log/").pop().unwrap();
    let mut bytes = std::fs::read(&log).unwrap();
    bytes[64 + 28 + 50] ^= 1;
    std::fs::write(&log, &bytes).unwrap();
    let found = fsck(dir.path(), false);
    assert!(found.contains("is damaged at byte 92"), "{found}");
    let refused = node(dir.path(), "1").output().unwrap();
    let text = String::from_utf8(refused.stderr).unwrap();
    assert!(
        !refused.status.success() && text.contains("is damaged at byte 92"),
        "{text}"
    );
    assert_eq!(std::fs::read(&log).unwrap(), bytes);
}
