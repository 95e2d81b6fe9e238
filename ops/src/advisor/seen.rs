//! What workers saw of classes and objects, and how that of several is added up.

use serde::{Deserialize, Serialize};

use super::Thresholds;

/// What one worker has seen, or several together.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Seen {
    pub thresholds: Thresholds,
    pub classes: Vec<ClassSeen>,
    /// The busiest and the largest, with what is known of each.
    pub objects: Vec<ObjectSeen>,
}

/// One class. Rates are averages that forget with a time constant of 60 seconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClassSeen {
    pub class: String,
    /// Objects that exist, those without a name, and bytes of their databases.
    pub objects: u64,
    pub unnamed: u64,
    pub bytes: u64,
    /// Objects by the bytes of their database: under 10 MB, 100 MB, 1 GB, and above.
    pub objects_by_bytes: [u64; 4],
    /// Objects with at least 100, and with more than 1,000 keys and rows.
    pub objects_by_keys: [u64; 2],
    pub awake: u64,
    pub fetches_per_second: f64,
    pub calls_per_second: f64,
    pub alarms_per_second: f64,
    /// Of these, alarms that wrote nothing.
    pub idle_alarms_per_second: f64,
    pub wakes_per_second: f64,
    pub turn_seconds_per_second: f64,
    pub rows_read_per_second: f64,
    pub rows_returned_per_second: f64,
    pub rows_written_per_second: f64,
    /// Calls to other objects.
    pub object_calls_per_second: f64,
    /// Constructors that ran since the node started, and how long all of them took.
    pub constructed: u64,
    pub constructor_seconds: f64,
}

/// One object. What is not known of it is left out.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ObjectSeen {
    pub class: String,
    pub id: String,
    pub name: Option<String>,
    /// Requests, calls and alarms.
    pub requests_per_second: Option<f64>,
    /// The same without alarms, where it has some.
    pub requests_besides_alarms_per_second: Option<f64>,
    pub keys: Option<u64>,
    pub bytes: Option<u64>,
    /// Between two alarms, lately.
    pub alarm_every_seconds: Option<f64>,
    pub idle_alarms_in_a_row: Option<u32>,
    /// Different objects that it called within a minute, at the most.
    pub fan_out: Option<u32>,
    pub object_calls_per_second: Option<f64>,
    pub calls_per_request: Option<f64>,
    pub rows_read_per_row: Option<f64>,
    pub rows_read_per_request: Option<f64>,
    pub awake_seconds: Option<u64>,
}

impl Seen {
    /// Adds what another worker has seen; objects are of one worker only.
    pub fn add(&mut self, other: Self) {
        self.thresholds = other.thresholds;
        self.objects.extend(other.objects);
        for class in other.classes {
            let known = self.classes.iter_mut();
            match { known }.find(|known| known.class == class.class) {
                Some(known) => known.add(&class),
                None => self.classes.push(class),
            }
        }
        self.classes
            .sort_by(|left, right| left.class.cmp(&right.class));
    }
}

impl ClassSeen {
    /// All that happens to its objects.
    pub fn requests_per_second(&self) -> f64 {
        self.fetches_per_second + self.calls_per_second + self.alarms_per_second
    }

    fn add(&mut self, other: &Self) {
        let counts = [
            (&mut self.objects, other.objects),
            (&mut self.unnamed, other.unnamed),
            (&mut self.bytes, other.bytes),
            (&mut self.awake, other.awake),
            (&mut self.constructed, other.constructed),
        ];
        for (mine, others) in counts {
            *mine += others;
        }
        let mine = self.objects_by_bytes.iter_mut();
        let mine = mine.chain(&mut self.objects_by_keys);
        let others = other.objects_by_bytes.iter();
        for (mine, others) in mine.zip(others.chain(&other.objects_by_keys)) {
            *mine += others;
        }
        let rates = [
            (&mut self.fetches_per_second, other.fetches_per_second),
            (&mut self.calls_per_second, other.calls_per_second),
            (&mut self.alarms_per_second, other.alarms_per_second),
            (
                &mut self.idle_alarms_per_second,
                other.idle_alarms_per_second,
            ),
            (&mut self.wakes_per_second, other.wakes_per_second),
            (
                &mut self.turn_seconds_per_second,
                other.turn_seconds_per_second,
            ),
            (&mut self.rows_read_per_second, other.rows_read_per_second),
            (
                &mut self.rows_returned_per_second,
                other.rows_returned_per_second,
            ),
            (
                &mut self.rows_written_per_second,
                other.rows_written_per_second,
            ),
            (
                &mut self.object_calls_per_second,
                other.object_calls_per_second,
            ),
            (&mut self.constructor_seconds, other.constructor_seconds),
        ];
        for (mine, others) in rates {
            *mine += others;
        }
    }
}
