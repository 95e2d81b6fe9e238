//! Everything a node counts. Names begin with `shard_`; labels are closed sets: a class, a code, a
//! worker's number, never an object.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use metrics::{
    Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram,
    gauge, histogram,
};
use ops::metrics::Registry;
use protocol::{ClassName, ErrorCode};
use tokio::time::Instant;

use crate::alarms::Standing;
use crate::storage::Logged;
use crate::usage::{COUNTERS, ClassMetrics, ClassUsage};

/// How a request ended: with an answer of the object, or refused by the system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    Status(u16),
    Refused(ErrorCode),
}

impl Code {
    fn label(self) -> String {
        match self {
            Self::Status(status) => status.to_string(),
            Self::Refused(code) => code.name().to_owned(),
        }
    }
}

/// The label of requests that named no class of this node.
const NO_CLASS: &str = "none";

/// The metrics of one worker. Not shared: handles that depend on labels are kept in a plain map.
pub struct Metrics {
    registry: Arc<Registry>,
    /// Per class, of which there are a handful: found by comparing, without an allocation per request.
    requests: RefCell<Vec<(Option<ClassName>, ByCode)>>,
    classes: RefCell<Vec<Rc<ClassUsage>>>,
    pub mailbox_wait: Histogram,
    pub mailbox_depth: Gauge,
    pub mailbox_refusals: Counter,
    pub commits: Counter,
    pub log_waits: Counter,
    /// Copies of large databases that went to the archive, and what did not.
    pub snapshots: Counter,
    pub archive_failures: Counter,
    /// Segments that did not.
    segments_not_archived: Cell<u64>,
    /// Bytes of memory of the open databases of a worker.
    pub memory: Gauge,
    log_syncs: Counter,
    log_bytes: Counter,
    log_failures: Counter,
    pub log_sync_time: Histogram,
    log_live: Gauge,
    pub evictions: Counter,
    pub resets: Counter,
    alarms: RefCell<HashMap<(ClassName, &'static str), Counter>>,
    alarms_ahead: RefCell<HashMap<ClassName, Histogram>>,
    pub alarm_lateness: Histogram,
    pub alarms_postponed: Counter,
    pub alarms_found: Counter,
    alarms_pending: Gauge,
    alarms_running: Gauge,
    alarms_overdue: Gauge,
}

type ByCode = HashMap<Code, Requests>;

/// What is counted per class and code.
#[derive(Clone)]
struct Requests {
    total: Counter,
    seconds: Histogram,
}

impl Metrics {
    pub fn new(registry: Arc<Registry>, worker: u16) -> Self {
        let worker = worker.to_string();
        registry.register(describe);
        registry.clone().register(|| Self {
            registry,
            requests: RefCell::default(),
            classes: RefCell::default(),
            mailbox_wait: histogram!("shard_mailbox_wait_seconds"),
            mailbox_depth: gauge!("shard_mailbox_depth", "worker" => worker.clone()),
            mailbox_refusals: counter!("shard_mailbox_refusals_total"),
            commits: counter!("shard_commits_total"),
            log_waits: counter!("shard_log_waits_total"),
            snapshots: counter!("shard_snapshots_total"),
            archive_failures: counter!("shard_archive_failures_total"),
            segments_not_archived: Cell::default(),
            memory: gauge!("shard_storage_memory_bytes", "worker" => worker.clone()),
            log_syncs: counter!("shard_log_syncs_total", "worker" => worker.clone()),
            log_bytes: counter!("shard_log_bytes_total", "worker" => worker.clone()),
            log_failures: counter!("shard_log_failures_total", "worker" => worker.clone()),
            log_sync_time: histogram!("shard_log_sync_seconds"),
            log_live: gauge!("shard_log_live_bytes", "worker" => worker.clone()),
            alarms: RefCell::default(),
            alarms_ahead: RefCell::default(),
            alarm_lateness: histogram!("shard_alarm_lateness_seconds"),
            alarms_postponed: counter!("shard_alarms_postponed_total"),
            alarms_found: counter!("shard_alarms_found_total"),
            alarms_pending: gauge!("shard_alarms_pending", "worker" => worker.clone()),
            alarms_running: gauge!("shard_alarms_running", "worker" => worker.clone()),
            alarms_overdue: gauge!("shard_alarms_overdue", "worker" => worker),
            evictions: counter!("shard_evictions_total"),
            resets: counter!("shard_object_resets_total"),
        })
    }

    /// One request was answered.
    pub fn request(&self, class: Option<&ClassName>, code: Code, took: Duration) {
        let mut known = self.requests.borrow_mut();
        let found = known.iter().position(|(of, _)| of.as_ref() == class);
        let place = found.unwrap_or_else(|| {
            known.push((class.cloned(), ByCode::new()));
            known.len() - 1
        });
        let handles = known[place].1.entry(code).or_insert_with(|| {
            let class = class.map_or(NO_CLASS, ClassName::as_str).to_owned();
            let code = code.label();
            self.registry.register(|| Requests {
                total: counter!("shard_requests_total", "class" => class.clone(), "code" => code.clone()),
                seconds: histogram!("shard_request_seconds", "class" => class, "code" => code),
            })
        });
        handles.total.increment(1);
        handles.seconds.record(took.as_secs_f64());
    }

    /// Publishes what the log of this worker counted.
    pub fn log(&self, engine: &Logged) {
        let stats = engine.stats();
        self.log_syncs
            .absolute(stats.groups.load(Ordering::Relaxed));
        self.log_bytes.absolute(stats.bytes.load(Ordering::Relaxed));
        let failed = stats.failures.load(Ordering::Relaxed);
        self.log_failures.absolute(failed);
        self.log_live.set(engine.live_bytes() as f64);
        let failures = engine.archive_failures();
        let known = self.segments_not_archived.replace(failures);
        self.archive_failures.increment(failures - known);
    }

    /// Publishes how many alarms wait, run and should run.
    pub fn alarms(&self, standing: Standing) {
        self.alarms_pending.set(standing.pending as f64);
        self.alarms_running.set(standing.running as f64);
        self.alarms_overdue.set(standing.overdue as f64);
    }

    /// A try of an alarm's handler ended.
    pub fn alarm(&self, class: &ClassName, outcome: &'static str) {
        let mut known = self.alarms.borrow_mut();
        let counter = known.entry((class.clone(), outcome)).or_insert_with(|| {
            let class = class.as_str().to_owned();
            self.registry
                .register(|| counter!("shard_alarms_total", "class" => class, "outcome" => outcome))
        });
        counter.increment(1);
    }

    /// An object of the class was deleted because nobody used it.
    pub fn expired(&self, class: &str) {
        let class = class.to_owned();
        let counter = self
            .registry
            .register(|| counter!("shard_objects_expired_total", "class" => class));
        counter.increment(1);
    }

    /// A class has set an alarm so far ahead.
    pub fn alarm_ahead(&self, class: &ClassName, ahead: Duration) {
        let mut known = self.alarms_ahead.borrow_mut();
        if !known.contains_key(class) {
            let label = class.as_str().to_owned();
            let histogram = self
                .registry
                .register(|| histogram!("shard_alarm_ahead_seconds", "class" => label));
            known.insert(class.clone(), histogram);
        }
        known[class].record(ahead.as_secs_f64());
    }

    /// What is counted of a class. Looked up when an object wakes.
    pub(crate) fn class(&self, class: &ClassName) -> Rc<ClassUsage> {
        let known = self
            .classes
            .borrow()
            .iter()
            .find(|known| known.class == *class)
            .cloned();
        known.unwrap_or_else(|| {
            let usage = ClassUsage::new(class.clone(), self.class_metrics(class));
            self.classes.borrow_mut().push(Rc::clone(&usage));
            usage
        })
    }

    pub(crate) fn each_class(&self, f: impl FnMut(&Rc<ClassUsage>)) {
        let classes = self.classes.borrow().clone();
        classes.iter().for_each(f);
    }

    /// Adds what classes counted by themselves to their metrics.
    pub(crate) fn publish(&self, now: Instant) {
        for usage in self.classes.borrow().iter() {
            usage.publish(now);
        }
    }

    fn class_metrics(&self, class: &ClassName) -> ClassMetrics {
        let class = class.as_str().to_owned();
        let gauge = |name: &'static str| gauge!(name, "class" => class.clone());
        let by_bytes = |size: &'static str| gauge!("shard_stored_objects", "class" => class.clone(), "size" => size);
        self.registry.register(|| ClassMetrics {
            counters: COUNTERS
                .iter()
                .map(|(name, of, unit)| (*of, *unit, counter!(*name, "class" => class.clone())))
                .collect(),
            awake: gauge("shard_objects_awake"),
            long_awake: gauge("shard_objects_long_awake"),
            waiting: gauge("shard_mailbox_waiting"),
            constructor: histogram!("shard_constructor_seconds", "class" => class.clone()),
            stored_bytes: gauge("shard_stored_bytes"),
            stored: ["under_10mb", "10mb_to_100mb", "100mb_to_1gb", "1gb_and_more"].map(by_bytes),
            many_keys: ["100", "1001"].map(|keys| {
                gauge!("shard_stored_objects_with_keys", "class" => class.clone(), "at_least" => keys)
            }),
        })
    }
}

fn describe() {
    describe_counter!(
        "shard_requests_total",
        "Requests answered, by class and code (a status of the object, or a refusal)"
    );
    describe_histogram!(
        "shard_request_seconds",
        "From the arrival of a request's head to the head of its response"
    );
    describe_gauge!("shard_objects_awake", "Objects in memory");
    describe_gauge!(
        "shard_mailbox_depth",
        "Requests waiting in the mailboxes of a worker"
    );
    describe_histogram!(
        "shard_mailbox_wait_seconds",
        "From a request's arrival in a mailbox to the start of its turn"
    );
    describe_counter!(
        "shard_mailbox_refusals_total",
        "Requests refused because a mailbox was full, or waited too long in one"
    );
    describe_counter!("shard_commits_total", "Turns that wrote, made durable");
    describe_counter!(
        "shard_log_syncs_total",
        "Syncs of the commit log; each makes a group of commits durable"
    );
    describe_counter!("shard_log_bytes_total", "Bytes written to the commit log");
    describe_counter!(
        "shard_log_failures_total",
        "Writes and syncs of the commit log that failed; what was not durable was taken back"
    );
    describe_histogram!(
        "shard_log_sync_seconds",
        "Time to write and sync one group of commits"
    );
    describe_gauge!(
        "shard_storage_memory_bytes",
        "Memory of open databases: cached pages, schemas, prepared statements"
    );
    describe_gauge!(
        "shard_log_live_bytes",
        "Bytes of the commit log that recovery would read"
    );
    describe_counter!(
        "shard_log_waits_total",
        "Times a worker ran no turns because the commit log, or its checkpoint, was behind"
    );
    describe_counter!(
        "shard_snapshots_total",
        "Databases too large for the commit log that were copied to the archive"
    );
    describe_counter!(
        "shard_archive_failures_total",
        "Segments of the commit log and large databases that the archive did not take; they are tried again"
    );
    describe_counter!(
        "shard_objects_expired_total",
        "Objects deleted because nobody had used them for as long as expiry.classes says"
    );
    describe_usage();
    describe_counter!("shard_evictions_total", "Objects that left memory");
    describe_counter!(
        "shard_alarms_total",
        "Tries of alarm handlers, by class and outcome: done, idle (done, and nothing was written), failed (will be retried), dead (the last retry failed)"
    );
    describe_histogram!(
        "shard_alarm_ahead_seconds",
        "How far ahead classes set alarms"
    );
    describe_histogram!(
        "shard_alarm_lateness_seconds",
        "From the time an alarm was due to the start of its handler"
    );
    describe_counter!(
        "shard_alarms_postponed_total",
        "Alarms put off because the platform, not the class, failed; costs no retry"
    );
    describe_counter!(
        "shard_alarms_found_total",
        "Alarms found in a catalog, due and without a timer; there must be none"
    );
    describe_gauge!("shard_alarms_pending", "Alarms that are set");
    describe_gauge!("shard_alarms_running", "Alarm handlers under way");
    describe_gauge!(
        "shard_alarms_overdue",
        "Alarms due for more than 5 seconds and not running; there must be none for long"
    );
    describe_counter!(
        "shard_object_resets_total",
        "Objects reset after a panic, a limit or a storage failure"
    );
}

fn describe_usage() {
    let counters = [
        (
            "shard_usage_requests_total",
            "Fetches, calls and alarms of objects, as they are billed: one each",
        ),
        ("shard_usage_fetches_total", "HTTP requests to objects"),
        ("shard_usage_calls_total", "Calls of objects' methods"),
        (
            "shard_usage_turn_seconds_total",
            "Time that turns of objects took, in whole seconds",
        ),
        (
            "shard_usage_awake_seconds_total",
            "Seconds that objects were in memory, all together; with 128 MB each, 8 of them are a GB-second",
        ),
        (
            "shard_usage_rows_read_total",
            "Rows and pairs that objects read: a lower bound where an index is used",
        ),
        (
            "shard_usage_rows_returned_total",
            "Rows and pairs that queries gave; far fewer than were read are a sign of scans",
        ),
        (
            "shard_usage_rows_written_total",
            "Rows and pairs that objects wrote or deleted, also in turns that were undone",
        ),
        (
            "shard_usage_kv_read_units_total",
            "Pairs read, in units of 4 KiB; the same reads are in rows",
        ),
        (
            "shard_usage_kv_write_units_total",
            "Pairs written, in units of 4 KiB, and alarms set; the same writes are in rows",
        ),
        (
            "shard_usage_kv_deletes_total",
            "Pairs deleted, whether or not they existed",
        ),
        (
            "shard_object_calls_total",
            "Calls of objects to other objects",
        ),
        ("shard_activations_total", "Objects loaded into memory"),
    ];
    for (name, help) in counters {
        describe_counter!(name, help);
    }
    let gauges = [
        (
            "shard_objects_long_awake",
            "Objects that have not slept for an hour",
        ),
        (
            "shard_mailbox_waiting",
            "Requests waiting in the mailboxes of a class",
        ),
        ("shard_stored_bytes", "Bytes of the databases of objects"),
        (
            "shard_stored_objects",
            "Objects that exist, by the size of their database (1 MB is a million bytes)",
        ),
        (
            "shard_stored_objects_with_keys",
            "Objects with at least so many keys and rows, as of their last sleep",
        ),
    ];
    for (name, help) in gauges {
        describe_gauge!(name, help);
    }
    describe_histogram!(
        "shard_constructor_seconds",
        "Time that constructors took, which run at every wake"
    );
}
