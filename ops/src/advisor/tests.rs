use std::time::Duration;

use super::*;

fn object() -> ObjectSeen {
    ObjectSeen {
        class: "Room".to_owned(),
        id: "11".to_owned(),
        name: Some("a".to_owned()),
        ..ObjectSeen::default()
    }
}

/// The level of one rule, and what the report says of it.
fn judge(rule: &str, object: ObjectSeen, class: ClassSeen) -> (Level, Option<Finding>) {
    let seen = Seen {
        thresholds: Thresholds::default(),
        classes: vec![ClassSeen {
            class: "Room".to_owned(),
            ..class
        }],
        objects: vec![object],
    };
    let report = report(&seen);
    let found = report.findings.into_iter().find(|found| found.rule == rule);
    (found.as_ref().map_or(Green, |found| found.level), found)
}

/// Drives one measure of an object through values, each with the level it must have.
#[track_caller]
fn flips(rule: &str, change: impl Fn(&mut ObjectSeen, f64), steps: &[(f64, Level)]) {
    for (value, want) in steps {
        let mut object = object();
        change(&mut object, *value);
        let (level, found) = judge(rule, object, ClassSeen::default());
        assert_eq!(level, *want, "{rule} at {value}");
        if level == Red {
            let found = found.unwrap();
            assert!(
                !found.pattern.is_empty() && !found.advice.is_empty(),
                "{found:?}"
            );
            assert_eq!(found.value, *value);
        }
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the steps are small numbers"
)]
fn whole(value: f64) -> u64 {
    value as u64
}

fn small(value: f64) -> u32 {
    u32::try_from(whole(value)).unwrap()
}

use Level::{Green, Red, Yellow, YellowHigh};

#[test]
fn k1_requests() {
    let rate = |object: &mut ObjectSeen, value| object.requests_per_second = Some(value);
    flips(
        "K1",
        rate,
        &[
            (0.0, Green),
            (99.99, Green),
            (100.0, Yellow),
            (500.0, Yellow),
            (500.01, Red),
        ],
    );
}

#[test]
fn k2_keys() {
    let keys = |object: &mut ObjectSeen, value| object.keys = Some(whole(value));
    flips(
        "K2",
        keys,
        &[
            (99.0, Green),
            (100.0, Yellow),
            (1000.0, Yellow),
            (1001.0, Red),
        ],
    );
}

#[test]
fn k3_bytes() {
    let bytes = |object: &mut ObjectSeen, value| object.bytes = Some(whole(value));
    flips(
        "K3",
        bytes,
        &[
            (9_999_999.0, Green),
            (10_000_000.0, Yellow),
            (100_000_000.0, Yellow),
            (100_000_001.0, YellowHigh),
            (1_000_000_000.0, YellowHigh),
            (1_000_000_001.0, Red),
        ],
    );
}

#[test]
fn k4_alarms() {
    let every = |object: &mut ObjectSeen, value| object.alarm_every_seconds = Some(value);
    flips(
        "K4",
        every,
        &[
            (60.0, Green),
            (59.9, Yellow),
            (30.0, Yellow),
            (29.9, YellowHigh),
            (10.0, YellowHigh),
            (9.9, Red),
        ],
    );
    let busy = |object: &mut ObjectSeen, value| {
        object.alarm_every_seconds = Some(value);
        object.requests_besides_alarms_per_second = Some(2.0);
    };
    flips(
        "K4",
        busy,
        &[(9.9, YellowHigh), (1.0, YellowHigh), (0.4, Red)],
    );
}

#[test]
fn k6_fan_out() {
    let often = |object: &mut ObjectSeen, value| {
        object.fan_out = Some(small(value));
        object.object_calls_per_second = Some(1.0);
    };
    flips(
        "K6",
        often,
        &[
            (0.0, Green),
            (1.0, Yellow),
            (9.0, Yellow),
            (10.0, YellowHigh),
            (99.0, YellowHigh),
            (100.0, Red),
        ],
    );
    let rarely = |object: &mut ObjectSeen, value| {
        object.fan_out = Some(small(value));
        object.object_calls_per_second = Some(0.01);
    };
    flips(
        "K6",
        rarely,
        &[(9.0, Green), (10.0, YellowHigh), (100.0, Red)],
    );
}

#[test]
fn k10_a_global_singleton() {
    let share = |of_object: f64, of_class: f64| {
        let object = ObjectSeen {
            requests_per_second: Some(of_object),
            ..object()
        };
        let class = ClassSeen {
            calls_per_second: of_class,
            ..ClassSeen::default()
        };
        judge("K10", object, class).0
    };
    assert_eq!(share(49.9, 100.0), Green);
    assert_eq!(share(50.0, 100.0), Yellow);
    assert_eq!(share(89.9, 100.0), Yellow);
    assert_eq!(share(90.0, 100.0), Red);
    assert_eq!(share(9.9, 9.9), Green, "too few requests to say anything");
    assert_eq!(share(10.0, 10.0), Red);
}

#[test]
fn k11_a_broker() {
    let calls = |object: &mut ObjectSeen, value| object.object_calls_per_second = Some(value);
    flips(
        "K11",
        calls,
        &[
            (99.9, Green),
            (100.0, Yellow),
            (999.9, Yellow),
            (1000.0, Red),
        ],
    );
}

#[test]
fn k12_never_asleep() {
    let awake = |object: &mut ObjectSeen, value| object.awake_seconds = Some(whole(value));
    flips(
        "K12",
        awake,
        &[
            (3599.0, Green),
            (3600.0, Yellow),
            (86_399.0, Yellow),
            (86_400.0, Red),
        ],
    );
}

#[test]
fn k13_chatty() {
    let calls = |object: &mut ObjectSeen, value| object.calls_per_request = Some(value);
    flips(
        "K13",
        calls,
        &[(0.99, Green), (1.0, Yellow), (9.9, Yellow), (10.0, Red)],
    );
    let class = |calls: f64| ClassSeen {
        calls_per_second: 2.0,
        object_calls_per_second: calls,
        ..ClassSeen::default()
    };
    assert_eq!(judge("K13", object(), class(1.9)).0, Green);
    assert_eq!(judge("K13", object(), class(2.0)).0, Yellow);
    assert_eq!(judge("K13", object(), class(20.0)).0, Red);
}

#[test]
fn k14_scans() {
    let per_row = |object: &mut ObjectSeen, value| object.rows_read_per_row = Some(value);
    flips(
        "K14",
        per_row,
        &[(9.9, Green), (10.0, Yellow), (99.9, Yellow), (100.0, Red)],
    );
    let per_request = |object: &mut ObjectSeen, value| object.rows_read_per_request = Some(value);
    flips(
        "K14",
        per_request,
        &[
            (99.9, Green),
            (100.0, Yellow),
            (999.9, Yellow),
            (1000.0, Red),
        ],
    );
}

#[test]
fn h13_alarms_for_nothing() {
    let idle = |object: &mut ObjectSeen, value| object.idle_alarms_in_a_row = Some(small(value));
    flips(
        "H13",
        idle,
        &[(2.0, Green), (3.0, Yellow), (9.0, Yellow), (10.0, Red)],
    );
}

#[test]
fn t12_constructors() {
    let class = |seconds: f64| ClassSeen {
        constructed: 2,
        constructor_seconds: seconds,
        ..ClassSeen::default()
    };
    assert_eq!(judge("T12", object(), class(0.0199)).0, Green);
    assert_eq!(judge("T12", object(), class(0.02)).0, Yellow);
    assert_eq!(judge("T12", object(), class(0.2)).0, Red);
}

#[test]
fn thresholds_move_the_flips_and_contradictions_are_refused() {
    let thresholds = Thresholds {
        requests_per_second_yellow: 1,
        requests_per_second_red: 2,
        ..Thresholds::default()
    };
    thresholds.validate().unwrap();
    let seen = Seen {
        thresholds,
        objects: vec![ObjectSeen {
            requests_per_second: Some(3.0),
            ..object()
        }],
        ..Seen::default()
    };
    assert_eq!(report(&seen).level, Red);
    let refused = |change: fn(&mut Thresholds), want: &str| {
        let mut thresholds = Thresholds::default();
        change(&mut thresholds);
        let reason = thresholds.validate().unwrap_err();
        assert!(reason.contains(want), "{reason}");
    };
    refused(
        |t| t.keys_yellow = 2000,
        "advisor.keys_yellow = 2000 must be from 1 to advisor.keys_red = 1000",
    );
    refused(|t| t.keys_red = 5000, "more are not counted");
    refused(|t| t.bytes_yellow_high = 1, "advisor.bytes_yellow_high = 1");
    refused(
        |t| t.alarm_every_red = Duration::from_secs(90),
        "the shorter the time, the worse",
    );
    refused(
        |t| t.awake_yellow = Duration::from_secs(1 << 30),
        "advisor.awake_yellow",
    );
}

#[test]
fn what_several_workers_saw_is_added_up_and_survives_json() {
    let one = Seen {
        classes: vec![ClassSeen {
            class: "Room".to_owned(),
            objects: 2,
            calls_per_second: 1.5,
            objects_by_bytes: [1, 1, 0, 0],
            ..ClassSeen::default()
        }],
        objects: vec![object()],
        ..Seen::default()
    };
    let mut both = one.clone();
    let text = serde_json::to_string(&one).unwrap();
    both.add(serde_json::from_str(&text).unwrap());
    assert_eq!(both.objects.len(), 2);
    assert_eq!(both.classes.len(), 1);
    assert_eq!(both.classes[0].objects, 4);
    assert_eq!(both.classes[0].objects_by_bytes, [2, 2, 0, 0]);
    assert_eq!(both.classes[0].requests_per_second(), 3.0);
}

#[test]
fn a_class_is_scored_by_what_can_be_measured() {
    let class = ClassSeen {
        objects: 4,
        objects_by_bytes: [4, 0, 0, 0],
        calls_per_second: 3.0,
        ..ClassSeen::default()
    };
    let score_of = |object, class: &ClassSeen| {
        let seen = Seen {
            classes: vec![ClassSeen {
                class: "Room".to_owned(),
                ..class.clone()
            }],
            objects: vec![object],
            ..Seen::default()
        };
        report(&seen).classes.remove(0).score
    };
    let good = score_of(object(), &class);
    assert_eq!(good.lines.len(), 12);
    assert_eq!(good.holds, good.of, "{good:?}");
    assert_eq!(good.of, 9, "two lines are for people, and it calls nobody");
    let bad = score_of(
        ObjectSeen {
            idle_alarms_in_a_row: Some(20),
            ..object()
        },
        &ClassSeen {
            unnamed: 4,
            fetches_per_second: 9.0,
            objects_by_keys: [1, 0],
            ..class
        },
    );
    let broken: Vec<&str> = bad
        .lines
        .iter()
        .filter(|line| line.holds == Some(false))
        .map(|line| line.line.as_str())
        .collect();
    assert_eq!(
        broken,
        [
            "has a name that follows from what it is",
            "is called by methods (RPC), not by HTTP",
            "has fewer than 100 keys and 10 MB",
            "does real work when it wakes",
        ]
    );
}
