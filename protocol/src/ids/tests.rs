use proptest::prelude::*;

use super::*;

fn class(name: &str) -> ClassName {
    name.parse().unwrap()
}

fn name(text: &str) -> ObjectName {
    text.parse().unwrap()
}

fn any_class() -> impl Strategy<Value = ClassName> {
    "[A-Za-z][A-Za-z0-9_-]{0,63}".prop_map(|text| class(&text))
}

fn any_name() -> impl Strategy<Value = ObjectName> {
    "\\PC{1,200}".prop_filter_map("control character", |text| text.parse().ok())
}

fn any_home() -> impl Strategy<Value = Home> {
    prop_oneof![
        Just(Home::Global),
        Just(Home::Colo(Colo::UNKNOWN)),
        "[A-Z0-9]{3}".prop_map(|code| Home::Colo(code.parse().unwrap())),
    ]
}

proptest! {
    #[test]
    fn text_and_id_are_inverse(class in any_class(), home in any_home(), name in any_name()) {
        let id = ObjectId::named(&class, home, &name);
        let text = id.to_string();
        prop_assert_eq!(text.len(), 64);
        prop_assert_eq!(text.parse::<ObjectId>(), Ok(id));
        prop_assert_eq!(id.home(), home);
        prop_assert_eq!(id.kind(), IdKind::Named);
        prop_assert_eq!(id.check_class(&class), Ok(id));
    }

    #[test]
    fn an_id_of_another_class_is_refused(
        one in any_class(), other in any_class(), random in any::<[u8; 20]>()
    ) {
        prop_assume!(one != other);
        let id = ObjectId::unique(&one, Home::Global, random);
        prop_assert_eq!(id.kind(), IdKind::Unique);
        prop_assert!(id.check_class(&other).is_err());
    }

    #[test]
    fn one_wrong_digit_is_refused(name in any_name(), at in 0..64usize, digit in 0..16u32) {
        let counter = class("Counter");
        let text = ObjectId::named(&counter, Home::Global, &name).to_string();
        let digit = char::from_digit(digit, 16).unwrap();
        prop_assume!(text[at..=at] != digit.to_string());
        let wrong = format!("{}{digit}{}", &text[..at], &text[at + 1..]);
        let accepted = wrong.parse::<ObjectId>().and_then(|id| id.check_class(&counter));
        prop_assert!(accepted.is_err(), "{wrong} passed for {text}");
    }

    #[test]
    fn class_home_and_name_all_count(
        a in (any_class(), any_home(), any_name()), b in (any_class(), any_home(), any_name())
    ) {
        prop_assume!(a != b);
        prop_assert_ne!(
            ObjectId::named(&a.0, a.1, &a.2),
            ObjectId::named(&b.0, b.1, &b.2)
        );
    }

    #[test]
    fn a_shard_is_below_the_count(random in any::<[u8; 20]>(), shards in 1..=limits::SHARDS_MAX) {
        let id = ObjectId::unique(&class("Kv"), Home::Global, random);
        prop_assert!(id.shard(shards).0 < shards);
    }

    #[test]
    fn whatever_a_parser_accepts_prints_as_it_was(text in any::<String>()) {
        if let Ok(id) = text.parse::<ObjectId>() {
            prop_assert_eq!(id.to_string(), text.as_str());
        }
        if let Ok(class) = text.parse::<ClassName>() {
            prop_assert_eq!(class.as_str(), text.as_str());
        }
        if let Ok(colo) = text.parse::<Colo>() {
            prop_assert_eq!(colo.as_str(), text.as_str());
        }
        if let Ok(name) = ObjectName::decode(&text) {
            prop_assert_eq!(name.as_str().parse(), Ok(name.clone()));
        }
    }
}

/// Ids are on disk and in clients: these values may never change.
#[test]
fn golden_ids() {
    let sfo = Home::Colo("SFO".parse().unwrap());
    let unknown = Home::Colo(Colo::UNKNOWN);
    let table = [
        ("Counter", Home::Global, "a"),
        ("Counter", Home::Global, "b"),
        ("Kv", Home::Global, "a"),
        ("Kv", sfo, "a"),
        ("Kv", unknown, "a"),
        ("Sql", Home::Global, "rooms/日本語 😀"),
    ]
    .map(|(c, home, n)| {
        let id = ObjectId::named(&class(c), home, &name(n));
        format!("{id} {} {}", id.shard(128), id.shard(1000))
    });
    assert_eq!(table, GOLDEN);

    let unique = ObjectId::unique(&class("Counter"), Home::Global, [7; 20]);
    assert_eq!(unique.to_string(), GOLDEN_UNIQUE);
}

const GOLDEN: [&str; 6] = [
    "11000000e5830c4cfa480ceccde959ee0eb790f2ea824c762fba9fd71d238746 14 114",
    "110000000cee7b33b4798b1a61a81656623cf11be0fdc6fc9fe863c39e3bf640 38 304",
    "11000000da9fe7106cb8b0a3edf0d2dc7c6f2ee3a1619c04b24927a240d0f0e0 49 385",
    "1153464faa97fd35592699f52e11bd2cb800727130f98535907f36807e07f297 126 987",
    "11ffffffc0db582407113f649441076cea69822be50c819049d2802a4af8b2e5 15 119",
    "11000000a1b34ee1bd9816f1efe96b609e2ed618273c89c7801cce334a009080 29 231",
];
const GOLDEN_UNIQUE: &str = "120000000707070707070707070707070707070707070707f76a272d5242be1d";

#[test]
fn shards_share_the_objects_evenly() {
    let counter = class("Counter");
    let mut load = [0u32; 128];
    for number in 0..128_000 {
        let id = ObjectId::named(&counter, Home::Global, &name(&format!("user-{number}")));
        load[usize::from(id.shard(128).0)] += 1;
    }
    let (least, most) = (load.iter().min().unwrap(), load.iter().max().unwrap());
    assert!(*least > 850 && *most < 1150, "{least} to {most} per shard");
}

#[test]
fn names_are_decoded_once() {
    assert_eq!(ObjectName::decode("a%2Fb").unwrap().as_str(), "a/b");
    assert_eq!(ObjectName::decode("a%252Fb").unwrap().as_str(), "a%2Fb");
    assert_eq!(ObjectName::decode("100%").unwrap().as_str(), "100%");
}

#[test]
fn names_at_the_limits() {
    let longest = "x".repeat(limits::OBJECT_NAME_BYTES_MAX);
    assert!(longest.parse::<ObjectName>().is_ok());
    let refusals = [
        ObjectName::decode(""),
        ObjectName::decode(&format!("{longest}x")),
        ObjectName::decode(&"%41".repeat(1025)),
        ObjectName::decode(&"x".repeat(5000)),
        ObjectName::decode("a%00b"),
        ObjectName::decode("a%C2%85b"),
        ObjectName::decode("%ff"),
    ]
    .map(|refused| refused.unwrap_err().to_string());
    assert_eq!(
        refusals,
        [
            "an object name must not be empty",
            "object name of 1025 bytes is longer than 1024",
            "object name of 1025 bytes is longer than 1024",
            "object name of 5000 bytes is longer than 1024",
            "object name has the control character U+0000 at byte 1",
            "object name has the control character U+0085 at byte 1",
            "object name \"%ff\" is not UTF-8 after percent-decoding",
        ]
    );
}

#[test]
fn class_names_at_the_limits() {
    for legal in ["C", "Counter", "my-class_2", &"c".repeat(64)] {
        assert_eq!(legal.parse::<ClassName>().unwrap().as_str(), legal);
    }
    for illegal in ["", "1c", "-c", "a b", "a/b", "ä", &"c".repeat(65)] {
        assert!(illegal.parse::<ClassName>().is_err(), "{illegal:?}");
    }
}

#[test]
fn colo_labels() {
    for legal in ["SFO", "LHR", "A1B", "unknown"] {
        assert_eq!(legal.parse::<Colo>().unwrap().to_string(), legal);
    }
    for illegal in ["", "sfo", "SF", "SFOO", "S-O", "UNKNOWN"] {
        assert!(illegal.parse::<Colo>().is_err(), "{illegal:?}");
    }
}
