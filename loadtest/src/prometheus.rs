//! What was measured, in the Prometheus text format.

use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};

use ops::admin::Admin;

use crate::measures::{Measured, Measures};

/// Upper bounds of the latency histograms, in microseconds.
const BOUNDS: [u64; 16] = [
    100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000,
    1_000_000, 2_500_000, 5_000_000, 10_000_000,
];

/// Renders all series.
pub(crate) fn render(measures: &Measures) -> String {
    let mut text = String::new();
    write(&mut text, measures).expect("a string takes any text");
    text
}

fn write(text: &mut String, measures: &Measures) -> std::fmt::Result {
    writeln!(
        text,
        "# HELP loadtest_requests_total Requests by operation and outcome.\n\
         # TYPE loadtest_requests_total counter"
    )?;
    for (operation, measured) in &measures.operations {
        let acknowledged = measured.latency.histogram().len();
        for (outcome, count) in [("acknowledged", acknowledged), ("error", measured.errors)] {
            let operation = operation.name();
            writeln!(
                text,
                "loadtest_requests_total{{operation=\"{operation}\",outcome=\"{outcome}\"}} {count}"
            )?;
        }
    }
    writeln!(
        text,
        "# HELP loadtest_not_sent_total Arrivals that were never sent because too many were due.\n\
         # TYPE loadtest_not_sent_total counter\n\
         loadtest_not_sent_total {}",
        measures.not_sent
    )?;
    histograms(
        text,
        measures,
        "loadtest_latency_seconds",
        "From the intended send time to the answer.",
        |measured| measured.latency.histogram(),
    )?;
    histograms(
        text,
        measures,
        "loadtest_service_seconds",
        "From the actual send time to the answer.",
        |measured| measured.service_time.histogram(),
    )
}

#[expect(clippy::cast_precision_loss, reason = "shown, not counted")]
fn histograms(
    text: &mut String,
    measures: &Measures,
    name: &str,
    help: &str,
    of: impl Fn(&Measured) -> &hdrhistogram::Histogram<u64>,
) -> std::fmt::Result {
    writeln!(text, "# HELP {name} {help}\n# TYPE {name} histogram")?;
    for (operation, measured) in &measures.operations {
        let (histogram, operation) = (of(measured), operation.name());
        for bound in BOUNDS {
            let below = histogram.count_between(0, bound);
            let le = bound as f64 / 1e6;
            writeln!(
                text,
                "{name}_bucket{{operation=\"{operation}\",le=\"{le}\"}} {below}"
            )?;
        }
        let count = histogram.len();
        let sum = histogram.mean() * count as f64 / 1e6;
        writeln!(
            text,
            "{name}_bucket{{operation=\"{operation}\",le=\"+Inf\"}} {count}\n\
             {name}_sum{{operation=\"{operation}\"}} {sum}\n\
             {name}_count{{operation=\"{operation}\"}} {count}"
        )?;
    }
    Ok(())
}

/// What an endpoint shows: the text of the last second.
#[derive(Clone, Default)]
pub(crate) struct Live(Arc<Mutex<String>>);

impl Live {
    pub(crate) fn set(&self, measures: &Measures) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = render(measures);
    }
}

impl Admin for Live {
    fn metrics(&self) -> String {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn ready(&self) -> Result<(), String> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::measures::Ended;
    use crate::operation::Operation;

    #[test]
    fn buckets_are_cumulative_and_end_with_the_count() {
        let mut measures = Measures::new(Duration::from_secs(1), 1);
        for ms in [1, 20, 3000] {
            measures.acknowledge(&Ended {
                operation: Operation::KvPut,
                stage: 0,
                at: Duration::ZERO,
                latency: Duration::from_millis(ms),
                service_time: Duration::from_millis(1),
            });
        }
        measures.fail(Operation::KvPut, Duration::ZERO, "503".to_owned());
        let text = render(&measures);
        for line in [
            "loadtest_requests_total{operation=\"kv-put\",outcome=\"acknowledged\"} 3",
            "loadtest_requests_total{operation=\"kv-put\",outcome=\"error\"} 1",
            "loadtest_latency_seconds_bucket{operation=\"kv-put\",le=\"0.0005\"} 0",
            "loadtest_latency_seconds_bucket{operation=\"kv-put\",le=\"0.025\"} 2",
            "loadtest_latency_seconds_bucket{operation=\"kv-put\",le=\"+Inf\"} 3",
            "loadtest_latency_seconds_count{operation=\"kv-put\"} 3",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }
}
