use std::time::Duration;

use ops::metrics::Registry;

use pingora_http::ResponseHeader;

use super::*;
use crate::metrics::Metrics;

fn store(bytes_max: usize) -> Store {
    Store::new(bytes_max, Metrics::new(Arc::new(Registry::default())).cache)
}

fn key(n: u64) -> Key {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&n.to_be_bytes());
    key
}

fn entry(bytes: usize, tags: &[Tag]) -> Entry {
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
    Entry {
        id: 0,
        head: Head::of(&ResponseHeader::build(200, None).unwrap()),
        body: vec![0; bytes].into(),
        tags: tags.into(),
        variance: None,
        times: Times {
            created: now,
            epoch: now,
            fresh_until: now,
            stale_while_revalidate: 0,
            stale_if_error: 0,
        },
    }
}

#[test]
fn the_least_recently_used_leave_first_and_leave_nothing_behind() {
    let store = store(40_000);
    let t = Tag::named("t");
    for n in 0..100 {
        assert!(store.insert(
            key(n),
            entry(2000, &[t, Tag::named(&n.to_string())]),
            store.moment()
        ));
        assert!(store.size().1 <= 30_000);
        store.find(&key(0));
    }
    assert!(store.find(&key(0)).is_some(), "it was used all the time");
    assert!(store.find(&key(1)).is_none());
    assert!(store.find(&key(99)).is_some());
    let tables = store.tables();
    assert_eq!(tables.by_tag[&t].len(), tables.entries.len());
    assert_eq!(tables.by_tag.len(), tables.entries.len() + 1);
    drop(tables);
    assert!(
        !store.insert(key(7), entry(30_000, &[]), store.moment()),
        "too large"
    );
    store.purge(&[t], true);
    let tables = store.tables();
    assert_eq!(
        (tables.entries.len(), tables.by_tag.len(), tables.bytes),
        (0, 0, 0)
    );
}

#[test]
fn what_was_purged_meanwhile_is_not_kept() {
    let store = store(1 << 20);
    let (a, b) = (Tag::named("a"), Tag::named("b"));
    let before = store.moment();
    store.purge(&[a], false);
    assert!(!store.insert(key(1), entry(1, &[a, b]), before));
    assert!(store.insert(key(2), entry(1, &[b]), before));
    assert!(store.insert(key(1), entry(1, &[a, b]), store.moment()));
    assert_eq!(store.purge(&[Tag::EVERYTHING], true), 2);
    assert!(!store.insert(key(2), entry(1, &[b]), before));
}

#[test]
fn an_entry_is_renewed_unless_another_took_its_place() {
    let store = store(1 << 20);
    let (a, b) = (Tag::named("a"), Tag::named("b"));
    store.insert(key(1), entry(10, &[a]), store.moment());
    let found = store.find(&key(1)).unwrap();
    let renew = |id| {
        let head = Head::of(&ResponseHeader::build(200, None).unwrap());
        store.renew(&key(1), id, head, found.times, &[b])
    };
    assert!(renew(found.id));
    assert!(!renew(found.id), "its number has changed");
    assert_eq!(store.find(&key(1)).unwrap().body.len(), 10);
    assert_eq!(store.purge(&[b], true), 1, "it has the new tag too");
    assert_eq!(store.size(), (0, 0));
}

#[test]
fn answers_on_their_way_have_a_bound_of_their_own() {
    let store = store(4000);
    assert!(store.reserve(600));
    assert!(!store.reserve(401));
    assert!(store.reserve(400));
    assert_eq!(store.size(), (0, 1000));
    store.release(1000);
    assert_eq!(store.size(), (0, 0));
}
