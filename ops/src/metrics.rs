//! The Prometheus recorder of one process.
//!
//! Handles are registered once, through [`Registry::register`], and kept in a struct that is passed
//! in; nothing goes through a process-wide recorder, so several nodes can live in one test process.

use std::time::Duration;

use metrics_exporter_prometheus::{
    Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};

/// Upper bounds, in seconds, of every duration histogram. From the 50 µs that a warm turn should
/// take, over the 1 ms of a wake and the 10 ms of a slow disk, to what a client gives up at.
const SECONDS: [f64; 15] = [
    0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0,
    2.5, 10.0,
];

/// The same of what lies ahead: the advisor's limits for alarms are 30 seconds, a minute and an hour.
const AHEAD_SECONDS: [f64; 8] = [1.0, 5.0, 30.0, 60.0, 300.0, 3600.0, 86_400.0, 604_800.0];

/// The same of reports that wait on purpose: a counter states 0.2 s with few shards, 0.4 s with 100, 4 s with 1,000,
/// and whether the 99th percentile is below that must be seen.
const LAG_SECONDS: [f64; 22] = [
    0.05, 0.1, 0.125, 0.15, 0.175, 0.2, 0.225, 0.25, 0.3, 0.35, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 2.5,
    3.0, 4.0, 5.0, 10.0, 20.0,
];

/// Histograms keep samples until somebody drains them; without a scraper this does it.
const UPKEEP_EVERY: Duration = Duration::from_secs(5);

pub struct Registry {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
}

impl Default for Registry {
    fn default() -> Self {
        let recorder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)
            .expect("the list of bounds is not empty")
            .set_buckets_for_metric(Matcher::Suffix("_ahead_seconds".to_owned()), &AHEAD_SECONDS)
            .expect("the list of bounds is not empty")
            .set_buckets_for_metric(Matcher::Suffix("_lag_seconds".to_owned()), &LAG_SECONDS)
            .expect("the list of bounds is not empty")
            .build_recorder();
        Self {
            handle: recorder.handle(),
            recorder,
        }
    }
}

impl Registry {
    /// Runs `f` with this registry as the recorder of `metrics::counter!` and its like.
    pub fn register<R>(&self, f: impl FnOnce() -> R) -> R {
        metrics::with_local_recorder(&self.recorder, f)
    }

    pub fn handle(&self) -> PrometheusHandle {
        self.handle.clone()
    }
}

/// Drains histograms for ever. Spawn one per process and abort it at shutdown.
pub async fn upkeep(handle: PrometheusHandle) {
    let mut tick = tokio::time::interval(UPKEEP_EVERY);
    loop {
        tick.tick().await;
        handle.run_upkeep();
    }
}
