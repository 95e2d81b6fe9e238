//! Everything a node counts. Names begin with `shard_`; labels are closed sets: a class, a code, a
//! worker's number, never an object.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use metrics::{
    Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram,
    gauge, histogram,
};
use ops::metrics::Registry;
use protocol::{ClassName, ErrorCode};

use crate::alarms::Standing;
use crate::storage::Logged;

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
    awake: RefCell<HashMap<ClassName, Gauge>>,
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
    pub log_sync_time: Histogram,
    log_live: Gauge,
    pub activations: Counter,
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
        describe();
        let worker = worker.to_string();
        registry.clone().register(|| Self {
            registry,
            requests: RefCell::default(),
            awake: RefCell::default(),
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
            activations: counter!("shard_activations_total"),
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

    /// Objects of `class` in memory.
    pub fn awake(&self, class: &ClassName) -> Gauge {
        let mut known = self.awake.borrow_mut();
        if let Some(gauge) = known.get(class) {
            return gauge.clone();
        }
        let label = class.as_str().to_owned();
        let gauge = self
            .registry
            .register(|| gauge!("shard_objects_awake", "class" => label));
        known.insert(class.clone(), gauge.clone());
        gauge
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
    describe_counter!("shard_activations_total", "Objects loaded into memory");
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
