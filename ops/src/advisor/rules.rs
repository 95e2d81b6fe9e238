//! The table of heuristics, with a rule for each of its gaps.
//!
//! | rule | green | yellow | yellow_high | red |
//! |------|-------|--------|-------------|-----|
//! | K1 requests of an object, averaged over a minute | < 100/s | to 500/s | | > 500/s |
//! | K2 keys and rows of an object together | < 100 | to 1,000 | | > 1,000 |
//! | K3 size of an object's database | < 10 MB | to 100 MB | to 1 GB | > 1 GB |
//! | K4 time between two alarms of an object | ≥ 1 min | ≥ 30 s | less | < 10 s, and less than half of what happens to it is something else |
//! | K6 objects that an object calls within a minute | none, or below 10 and less often than once a minute | < 10 | < 100 | ≥ 100 |
//! | K10 share of a class's requests (if it has 10/s) at one object | < 50 % | < 90 % | | ≥ 90 % |
//! | K11 calls of an object to others | < 100/s | < 1,000/s | | ≥ 1,000/s |
//! | K12 an object awake without a pause | < 1 h | < 24 h | | ≥ 24 h |
//! | K13 calls to others per request, of a class or an object | < 1 | < 10 | | ≥ 10 |
//! | K14 rows read per row returned, per request | < 10, < 100 | < 100, < 1,000 | | ≥ 100, ≥ 1,000 |
//! | H13 alarms in a row that wrote nothing | < 3 | < 10 | | ≥ 10 |
//! | T12 mean time of a class's constructor | < 10 ms | < 100 ms | | ≥ 100 ms |

use super::{ClassSeen, Finding, Level, NotMeasured, ObjectNamed, ObjectSeen, Seen, Thresholds};

/// The rules of the table, as findings name them.
pub const RULES: [&str; 12] = [
    "K1", "K2", "K3", "K4", "K6", "K10", "K11", "K12", "K13", "K14", "H13", "T12",
];

/// A class below so many requests per second says nothing about ratios.
const RATIOS_FROM: f64 = 0.1;

/// What to do about a finding: the pattern's name, and the advice in a sentence or two.
type Remedy = (&'static str, &'static str);

const SHARD: Remedy = (
    "sharding",
    "The watchman has one pair of hands: split what this object owns over several names (a shard number or a finer key in the name) and add up where that is asked for.",
);
const SPLIT_STATE: Remedy = (
    "parent-child",
    "A deposit box holds what belongs together: give each part a child object of its own, and let this one keep their names.",
);
const ARCHIVE: Remedy = (
    "parent-child",
    "Give each part a child object of its own, delete what is old, and keep large binaries in an object store with only their keys here.",
);
const WAKE_FOR_WORK: Remedy = (
    "alarms for work",
    "A watchman who rattles at doors: set the alarm for when something is due (or when an event comes), not to look whether something is.",
);
const HIERARCHY: Remedy = (
    "parent-child",
    "Put a level between: children each serve a part of the objects and report upwards, or let the others send what they have instead of asking them.",
);
const QUEUE: Remedy = (
    "queue",
    "An object is no message broker: hand messages to a queue and let consumers take them in batches.",
);
const LET_SLEEP: Remedy = (
    "worker and alarms",
    "Sleep is free: end streams and long handlers, note where the work stands and set an alarm for the next piece.",
);
const MERGE: Remedy = (
    "ownership boundary",
    "Objects that need each other for every request are one object: move the state to whoever answers, or send changes in batches.",
);
const INDEX: Remedy = (
    "index, or a database",
    "Add an index for what is asked, or keep a sum beside the rows; questions across everything belong into a database that the objects feed.",
);
const LEAN_CONSTRUCTOR: Remedy = (
    "lazy initialisation",
    "The constructor runs at every wake: read what is needed when it is needed, and migrate schemas once.",
);

/// All that is not green.
pub fn findings(seen: &Seen) -> Vec<Finding> {
    let mut found = Vec::new();
    for class in &seen.classes {
        found.extend(of_class(&seen.thresholds, class));
    }
    for object in &seen.objects {
        let class = seen
            .classes
            .iter()
            .find(|class| class.class == object.class);
        found.extend(of_object(&seen.thresholds, object, class));
    }
    found
}

/// The rules that this system gives nothing to measure for.
pub fn not_measured() -> Vec<NotMeasured> {
    let entry = |rule: &str, why: &str| NotMeasured {
        rule: rule.to_owned(),
        why: why.to_owned(),
    };
    vec![
        entry(
            "K5",
            "how long sockets stay: objects have no WebSockets of their own yet; those of apps pass the gateway",
        ),
        entry(
            "K15",
            "block_concurrency_while in every request: there is no such call yet; a turn that does not await is atomic by itself",
        ),
    ]
}

/// A value that is worse the higher it is, and where each level begins.
struct Rising {
    yellow: f64,
    yellow_high: Option<f64>,
    red: f64,
    /// Red begins at its threshold, not just above it.
    red_at: bool,
}

impl Rising {
    fn to(yellow: impl Into<f64>, red: impl Into<f64>) -> Self {
        Self {
            yellow: yellow.into(),
            yellow_high: None,
            red: red.into(),
            red_at: true,
        }
    }

    /// Red begins above its threshold.
    fn above(self) -> Self {
        Self {
            red_at: false,
            ..self
        }
    }

    /// The level, and the threshold that it begins at.
    fn judge(&self, value: f64) -> (Level, f64) {
        let beyond = |limit: f64| value > limit || (self.red_at && value >= limit);
        if beyond(self.red) {
            return (Level::Red, self.red);
        }
        match self.yellow_high {
            Some(high) if beyond(high) => (Level::YellowHigh, high),
            _ if value >= self.yellow => (Level::Yellow, self.yellow),
            _ => (Level::Green, self.yellow),
        }
    }
}

/// Whom findings are of.
struct Of<'a> {
    class: &'a str,
    object: Option<&'a ObjectSeen>,
}

impl Of<'_> {
    fn finding(
        &self,
        rule: &str,
        what: &str,
        (level, limit): (Level, f64),
        value: f64,
        says: String,
        (pattern, advice): Remedy,
    ) -> Option<Finding> {
        debug_assert!(RULES.contains(&rule), "{rule}");
        (level > Level::Green).then(|| Finding {
            level,
            rule: rule.to_owned(),
            what: what.to_owned(),
            class: self.class.to_owned(),
            object: self.object.map(|object| ObjectNamed {
                id: object.id.clone(),
                name: object.name.clone(),
            }),
            value,
            limit,
            says,
            pattern: pattern.to_owned(),
            advice: advice.to_owned(),
        })
    }
}

fn of_class(limits: &Thresholds, class: &ClassSeen) -> Vec<Finding> {
    let of = Of {
        class: &class.class,
        object: None,
    };
    let rate = class.requests_per_second();
    let mut found = Vec::new();
    if rate >= RATIOS_FROM {
        let per_request = class.object_calls_per_second / rate;
        found.extend(chatty(limits, &of, per_request));
        let returned = class.rows_returned_per_second;
        let per_row = (returned > 0.0).then(|| class.rows_read_per_second / returned);
        found.extend(scans(
            limits,
            &of,
            per_row,
            Some(class.rows_read_per_second / rate),
        ));
    }
    if class.constructed > 0 {
        let mean = class.constructor_seconds / class.constructed as f64;
        let scale = Rising::to(
            limits.constructor_yellow.as_secs_f64(),
            limits.constructor_red.as_secs_f64(),
        );
        let says = format!("its constructor takes {:.1} ms on average", mean * 1e3);
        found.extend(of.finding(
            "T12",
            "constructor_seconds",
            scale.judge(mean),
            mean,
            says,
            LEAN_CONSTRUCTOR,
        ));
    }
    found
}

fn of_object(limits: &Thresholds, object: &ObjectSeen, class: Option<&ClassSeen>) -> Vec<Finding> {
    let of = Of {
        class: &object.class,
        object: Some(object),
    };
    let mut found = Vec::new();
    found.extend(busy(limits, &of, object, class));
    found.extend(large(limits, &of, object));
    found.extend(alarming(limits, &of, object));
    found.extend(reaching(limits, &of, object));
    if let Some(seconds) = object.awake_seconds {
        let scale = Rising::to(
            limits.awake_yellow.as_secs_f64(),
            limits.awake_red.as_secs_f64(),
        );
        let says = format!("it has not slept for {:.1} h", seconds as f64 / 3600.0);
        found.extend(of.finding(
            "K12",
            "awake_seconds",
            scale.judge(seconds as f64),
            seconds as f64,
            says,
            LET_SLEEP,
        ));
    }
    if let Some(ratio) = object.calls_per_request {
        found.extend(chatty(limits, &of, ratio));
    }
    found.extend(scans(
        limits,
        &of,
        object.rows_read_per_row,
        object.rows_read_per_request,
    ));
    found
}

/// K1 and K10.
fn busy(
    limits: &Thresholds,
    of: &Of<'_>,
    object: &ObjectSeen,
    class: Option<&ClassSeen>,
) -> Vec<Finding> {
    let Some(rate) = object.requests_per_second else {
        return Vec::new();
    };
    let scale = Rising::to(
        limits.requests_per_second_yellow,
        limits.requests_per_second_red,
    )
    .above();
    let says = format!("{rate:.0} requests a second, sustained");
    let mut found = Vec::from_iter(of.finding(
        "K1",
        "requests_per_second",
        scale.judge(rate),
        rate,
        says,
        SHARD,
    ));
    let all = class.map_or(0.0, ClassSeen::requests_per_second).max(rate);
    if all >= f64::from(limits.singleton_requests_per_second) {
        let percent = 100.0 * rate / all;
        let scale = Rising::to(
            limits.singleton_percent_yellow,
            limits.singleton_percent_red,
        );
        let says = format!(
            "{percent:.0} % of the {all:.0} requests a second of its class go to it: a global singleton"
        );
        found.extend(of.finding(
            "K10",
            "percent_of_class",
            scale.judge(percent),
            percent,
            says,
            SHARD,
        ));
    }
    found
}

/// K2 and K3.
fn large(limits: &Thresholds, of: &Of<'_>, object: &ObjectSeen) -> Vec<Finding> {
    let mut found = Vec::new();
    if let Some(keys) = object.keys {
        let scale = Rising::to(limits.keys_yellow, limits.keys_red).above();
        let many = if keys > u64::from(limits.keys_red) {
            "or more "
        } else {
            ""
        };
        let says =
            format!("{keys} {many}keys and rows: look whether most requests need few of them");
        found.extend(of.finding(
            "K2",
            "keys",
            scale.judge(keys as f64),
            keys as f64,
            says,
            SPLIT_STATE,
        ));
    }
    if let Some(bytes) = object.bytes {
        let scale = Rising {
            yellow: limits.bytes_yellow as f64,
            yellow_high: Some(limits.bytes_yellow_high as f64),
            red: limits.bytes_red as f64,
            red_at: false,
        };
        let says = format!("its database has {:.0} MB", bytes as f64 / 1e6);
        found.extend(of.finding(
            "K3",
            "bytes",
            scale.judge(bytes as f64),
            bytes as f64,
            says,
            ARCHIVE,
        ));
    }
    found
}

/// K4 and H13.
fn alarming(limits: &Thresholds, of: &Of<'_>, object: &ObjectSeen) -> Vec<Finding> {
    let mut found = Vec::new();
    if let Some(every) = object.alarm_every_seconds {
        let [yellow, high, red] = [
            limits.alarm_every_yellow,
            limits.alarm_every_yellow_high,
            limits.alarm_every_red,
        ]
        .map(|limit| limit.as_secs_f64());
        let besides = object.requests_besides_alarms_per_second.unwrap_or(0.0);
        let idle = besides * every < 1.0;
        let judged = match every {
            _ if every < red && idle => (Level::Red, red),
            _ if every < high => (Level::YellowHigh, high),
            _ if every < yellow => (Level::Yellow, yellow),
            _ => (Level::Green, yellow),
        };
        let else_ = if idle {
            ", and little else happens to it"
        } else {
            ""
        };
        let says = format!("an alarm every {every:.1} s{else_}");
        found.extend(of.finding(
            "K4",
            "alarm_every_seconds",
            judged,
            every,
            says,
            WAKE_FOR_WORK,
        ));
    }
    if let Some(idle) = object.idle_alarms_in_a_row {
        let scale = Rising::to(limits.idle_alarms_yellow, limits.idle_alarms_red);
        let says = format!("its last {idle} alarms wrote nothing");
        found.extend(of.finding(
            "H13",
            "idle_alarms_in_a_row",
            scale.judge(idle.into()),
            idle.into(),
            says,
            WAKE_FOR_WORK,
        ));
    }
    found
}

/// K6 and K11.
fn reaching(limits: &Thresholds, of: &Of<'_>, object: &ObjectSeen) -> Vec<Finding> {
    let mut found = Vec::new();
    let rate = object.object_calls_per_second.unwrap_or(0.0);
    if let Some(reached) = object.fan_out {
        let often = rate * limits.fan_out_rare.as_secs_f64() >= 1.0;
        let scale = Rising {
            yellow: if often { 1.0 } else { f64::INFINITY },
            yellow_high: Some(limits.fan_out_yellow_high.into()),
            red: limits.fan_out_red.into(),
            red_at: true,
        };
        let says = format!("it calls {reached} other objects within a minute");
        let (level, limit) = scale.judge(reached.into());
        let limit = if limit.is_finite() { limit } else { 1.0 };
        found.extend(of.finding(
            "K6",
            "fan_out",
            (level, limit),
            reached.into(),
            says,
            HIERARCHY,
        ));
    }
    let scale = Rising::to(
        limits.object_calls_per_second_yellow,
        limits.object_calls_per_second_red,
    );
    let says = format!("{rate:.0} calls a second to other objects");
    found.extend(of.finding(
        "K11",
        "object_calls_per_second",
        scale.judge(rate),
        rate,
        says,
        QUEUE,
    ));
    found
}

/// K13.
fn chatty(limits: &Thresholds, of: &Of<'_>, per_request: f64) -> Option<Finding> {
    let scale = Rising::to(
        limits.calls_per_request_yellow,
        limits.calls_per_request_red,
    );
    let says = format!("{per_request:.1} calls to other objects for each request");
    of.finding(
        "K13",
        "calls_per_request",
        scale.judge(per_request),
        per_request,
        says,
        MERGE,
    )
}

/// K14, by the worse of its two measures.
fn scans(
    limits: &Thresholds,
    of: &Of<'_>,
    per_row: Option<f64>,
    per_request: Option<f64>,
) -> Option<Finding> {
    let by_row = per_row.and_then(|ratio| {
        let scale = Rising::to(
            limits.rows_read_per_row_yellow,
            limits.rows_read_per_row_red,
        );
        let says = format!("{ratio:.0} rows read for each that is returned");
        of.finding(
            "K14",
            "rows_read_per_row",
            scale.judge(ratio),
            ratio,
            says,
            INDEX,
        )
    });
    let by_request = per_request.and_then(|ratio| {
        let scale = Rising::to(
            limits.rows_read_per_request_yellow,
            limits.rows_read_per_request_red,
        );
        let says = format!("{ratio:.0} rows read for each request");
        of.finding(
            "K14",
            "rows_read_per_request",
            scale.judge(ratio),
            ratio,
            says,
            INDEX,
        )
    });
    by_row
        .into_iter()
        .chain(by_request)
        .max_by_key(|finding| finding.level)
}
