use proptest::prelude::proptest;
use proptest::prop_assert_eq;

use super::*;

#[track_caller]
fn check(text: &str, place: Place, index: u32) {
    let seat = Seat { place, index };
    assert_eq!(seat.to_string(), text);
    assert_eq!(text.parse(), Ok(seat));
}

#[test]
fn seats_parse_back() {
    let sfo = "SFO".parse().unwrap();
    check("17", Place::Anywhere, 17);
    check("SFO:0", Place::Colo(sfo), 0);
    check("SFO~:9999", Place::ForColo(sfo), 9999);
    for bad in [
        "",
        ":",
        "-1",
        "+1",
        "01",
        "SFO:",
        "SFO",
        "sfo~1",
        "SFO:1:2",
        "~:1",
        "99999999999",
    ] {
        assert!(bad.parse::<Seat>().is_err(), "{bad:?}");
    }
}

#[test]
fn a_shards_name_tells_counter_and_seat_whatever_the_counter_is_called() {
    for name in [
        "visits",
        "a:shard:1",
        "ü:",
        ":shard:",
        &"x".repeat(NAME_BYTES_MAX),
    ] {
        let counter: CounterName = name.parse().unwrap();
        let seat: Seat = "LHR:42".parse().unwrap();
        let (id, object) = counter.shard(seat);
        assert!(id.check_class(&shard_class()).is_ok());
        assert_eq!(id.home(), Home::Colo("LHR".parse().unwrap()));
        assert_eq!(Seat::of_object(&object), Some((counter, seat)));
    }
    assert!(
        "x".repeat(NAME_BYTES_MAX + 1)
            .parse::<CounterName>()
            .is_err()
    );
    assert!(Seat::of_object(&"visits".parse().unwrap()).is_none());
}

#[test]
fn one_more_bucket_moves_its_share_of_the_keys_and_no_other() {
    for buckets in [1, 2, 10, 99, 1000] {
        let mut moved = 0;
        for key in 0..20_000_u64 {
            let key = key_hash(&key.to_string());
            let (before, after) = (jump(key, buckets), jump(key, buckets + 1));
            assert!(before < buckets);
            if before != after {
                assert_eq!(after, buckets);
                moved += 1;
            }
        }
        let share = 20_000 / (buckets + 1);
        assert!(
            moved > share / 2 && moved < share * 2 + 20,
            "{buckets}: {moved}"
        );
    }
}

/// Placement of keys is for ever: what these say must never change.
#[test]
fn keys_stay_where_they_are() {
    let places = ["a", "b", "order-1", "\u{1F600}"].map(|key| jump(key_hash(key), 100));
    assert_eq!(places, GOLDEN);
}

const GOLDEN: [u32; 4] = [14, 26, 47, 63];

#[test]
fn a_key_is_claimed_from_whoever_may_have_had_it() {
    let set = |shards| Set {
        place: Place::Anywhere,
        shards,
    };
    let plan = Plan {
        version: 4,
        place: Place::Anywhere,
        shards: 200,
        strategy: Strategy::Random,
        report_every_ms: 400,
        earlier: vec![set(100), set(200), set(50)],
    };
    let mut moved = 0;
    for key in 0..1000 {
        let key = format!("key-{key}");
        let (seat, before) = plan.seats_of_key(&key);
        assert!(!before.contains(&seat));
        assert!(before.len() <= 2);
        moved += before.len();
    }
    assert!((500..2000).contains(&moved), "{moved}");
}

#[test]
fn changes_say_what_they_change() {
    let change: Change = serde_json::from_str(r#"{"count": 200}"#).unwrap();
    assert_eq!(change.count, Some(Count::Fixed(200)));
    let change: Change = serde_json::from_str(r#"{"count": "auto", "scope": "colo"}"#).unwrap();
    assert_eq!(change.count, Some(Count::Auto(Auto::Auto)));
    assert_eq!(change.scope, Some(Scope::Colo));
    for bad in [
        r#"{"count": "many"}"#,
        r#"{"shards": 3}"#,
        r#"{"count": -1}"#,
    ] {
        assert!(serde_json::from_str::<Change>(bad).is_err(), "{bad}");
    }
}

proptest! {
    #[test]
    fn totals_parse_back(value: i128, shards: u32, staleness_ms: u64) {
        let total = Total { value, shards, staleness_ms };
        let text = serde_json::to_string(&total).unwrap();
        prop_assert_eq!(serde_json::from_str::<Total>(&text).unwrap(), total);
    }

    #[test]
    fn no_text_breaks_a_seat(text: String) {
        if let Ok(seat) = text.parse::<Seat>() {
            prop_assert_eq!(seat.to_string(), text);
        }
    }
}
