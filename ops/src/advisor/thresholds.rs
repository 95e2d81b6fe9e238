//! Where green ends and red begins.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Keys and rows of an object are counted up to one more than this.
pub const KEYS_RED_MAX: u32 = 1000;

/// `[advisor]`: from where on the advisor warns. Rates are averages that forget with a time constant of 60
/// seconds: what lasts for a minute counts, a burst does not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Thresholds {
    /// Requests, calls and alarms of one object per second: from here on yellow, above the second red (K1).
    pub requests_per_second_yellow: u32,
    pub requests_per_second_red: u32,
    /// Keys and rows of one object together: from here on yellow, above the second red (K2).
    pub keys_yellow: u32,
    pub keys_red: u32,
    /// Bytes of one object's database: from here on yellow, above the others yellow_high and red (K3).
    pub bytes_yellow: u64,
    pub bytes_yellow_high: u64,
    pub bytes_red: u64,
    /// Time between two alarms of one object: below it yellow, yellow_high, and red if little else happens to
    /// the object (K4).
    #[serde(with = "humantime_serde")]
    pub alarm_every_yellow: Duration,
    #[serde(with = "humantime_serde")]
    pub alarm_every_yellow_high: Duration,
    #[serde(with = "humantime_serde")]
    pub alarm_every_red: Duration,
    /// Different objects that one object calls within a minute: any is yellow, from these on yellow_high and
    /// red (K6).
    pub fan_out_yellow_high: u32,
    pub fan_out_red: u32,
    /// An object that calls fewer than these others, and on average less often than this, fans out rarely,
    /// which is green (K6).
    #[serde(with = "humantime_serde")]
    pub fan_out_rare: Duration,
    /// Percent of a class's requests that go to one object, if the class has at least so many requests per
    /// second (K10).
    pub singleton_percent_yellow: u32,
    pub singleton_percent_red: u32,
    pub singleton_requests_per_second: u32,
    /// Calls to others per second, of one object (K11).
    pub object_calls_per_second_yellow: u32,
    pub object_calls_per_second_red: u32,
    /// Time without sleep, of one object (K12).
    #[serde(with = "humantime_serde")]
    pub awake_yellow: Duration,
    #[serde(with = "humantime_serde")]
    pub awake_red: Duration,
    /// Calls to other objects per request, of a class or an object (K13).
    pub calls_per_request_yellow: u32,
    pub calls_per_request_red: u32,
    /// Rows read per row returned, and per request, of a class or an object (K14).
    pub rows_read_per_row_yellow: u32,
    pub rows_read_per_row_red: u32,
    pub rows_read_per_request_yellow: u32,
    pub rows_read_per_request_red: u32,
    /// Alarms of one object in a row that wrote nothing (H13).
    pub idle_alarms_yellow: u32,
    pub idle_alarms_red: u32,
    /// Mean time of a class's constructor (T12).
    #[serde(with = "humantime_serde")]
    pub constructor_yellow: Duration,
    #[serde(with = "humantime_serde")]
    pub constructor_red: Duration,
}

impl Default for Thresholds {
    fn default() -> Self {
        const HOUR: u64 = 3600;
        Self {
            requests_per_second_yellow: 100,
            requests_per_second_red: 500,
            keys_yellow: 100,
            keys_red: KEYS_RED_MAX,
            bytes_yellow: 10_000_000,
            bytes_yellow_high: 100_000_000,
            bytes_red: 1_000_000_000,
            alarm_every_yellow: Duration::from_secs(60),
            alarm_every_yellow_high: Duration::from_secs(30),
            alarm_every_red: Duration::from_secs(10),
            fan_out_yellow_high: 10,
            fan_out_red: 100,
            fan_out_rare: Duration::from_secs(60),
            singleton_percent_yellow: 50,
            singleton_percent_red: 90,
            singleton_requests_per_second: 10,
            object_calls_per_second_yellow: 100,
            object_calls_per_second_red: 1000,
            awake_yellow: Duration::from_secs(HOUR),
            awake_red: Duration::from_secs(24 * HOUR),
            calls_per_request_yellow: 1,
            calls_per_request_red: 10,
            rows_read_per_row_yellow: 10,
            rows_read_per_row_red: 100,
            rows_read_per_request_yellow: 100,
            rows_read_per_request_red: 1000,
            idle_alarms_yellow: 3,
            idle_alarms_red: 10,
            constructor_yellow: Duration::from_millis(10),
            constructor_red: Duration::from_millis(100),
        }
    }
}

impl Thresholds {
    /// Green ends before red begins, and no threshold is where nothing is green.
    pub fn validate(&self) -> Result<(), String> {
        self.check_numbers()?;
        self.check_gaps()?;
        self.check_times()
    }

    fn check_numbers(&self) -> Result<(), String> {
        let numbers = [
            (
                "requests_per_second",
                self.requests_per_second_yellow.into(),
                self.requests_per_second_red.into(),
            ),
            ("keys", self.keys_yellow.into(), self.keys_red.into()),
            ("bytes", self.bytes_yellow, self.bytes_red),
            (
                "singleton_percent",
                self.singleton_percent_yellow.into(),
                self.singleton_percent_red.into(),
            ),
            (
                "object_calls_per_second",
                self.object_calls_per_second_yellow.into(),
                self.object_calls_per_second_red.into(),
            ),
            (
                "calls_per_request",
                self.calls_per_request_yellow.into(),
                self.calls_per_request_red.into(),
            ),
            (
                "rows_read_per_row",
                self.rows_read_per_row_yellow.into(),
                self.rows_read_per_row_red.into(),
            ),
            (
                "rows_read_per_request",
                self.rows_read_per_request_yellow.into(),
                self.rows_read_per_request_red.into(),
            ),
            (
                "idle_alarms",
                self.idle_alarms_yellow.into(),
                self.idle_alarms_red.into(),
            ),
        ];
        for (key, yellow, red) in numbers {
            if yellow == 0 || yellow > red {
                return Err(format!(
                    "advisor.{key}_yellow = {yellow} must be from 1 to advisor.{key}_red = {red}"
                ));
            }
        }
        Ok(())
    }

    fn check_gaps(&self) -> Result<(), String> {
        if !(self.bytes_yellow..=self.bytes_red).contains(&self.bytes_yellow_high) {
            return Err(format!(
                "advisor.bytes_yellow_high = {} must be from advisor.bytes_yellow = {} to advisor.bytes_red = {}",
                self.bytes_yellow_high, self.bytes_yellow, self.bytes_red
            ));
        }
        if self.fan_out_yellow_high > self.fan_out_red {
            return Err(format!(
                "advisor.fan_out_yellow_high = {} must be at most advisor.fan_out_red = {}",
                self.fan_out_yellow_high, self.fan_out_red
            ));
        }
        if self.keys_red > KEYS_RED_MAX {
            return Err(format!(
                "advisor.keys_red = {} must be at most {KEYS_RED_MAX}: more are not counted",
                self.keys_red
            ));
        }
        Ok(())
    }

    fn check_times(&self) -> Result<(), String> {
        let times = [
            self.alarm_every_yellow,
            self.alarm_every_yellow_high,
            self.alarm_every_red,
        ];
        if !times.is_sorted_by(|left, right| left >= right) {
            return Err(format!(
                "advisor.alarm_every_yellow = {:?}, alarm_every_yellow_high = {:?} and alarm_every_red = {:?} must not \
                 become longer: the shorter the time, the worse",
                times[0], times[1], times[2]
            ));
        }
        for (key, yellow, red) in [
            ("awake", self.awake_yellow, self.awake_red),
            ("constructor", self.constructor_yellow, self.constructor_red),
        ] {
            if yellow > red {
                return Err(format!(
                    "advisor.{key}_yellow = {yellow:?} must be at most advisor.{key}_red = {red:?}"
                ));
            }
        }
        Ok(())
    }
}
