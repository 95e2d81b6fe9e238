//! Coordinated omission (Gil Tene): a client that waits for the stalled server before it sends the next
//! request asks least while it is slow, and its percentiles hide the stall. Ours do not.

use std::time::Duration;

use crate::server::{Fault, run, start};

const STALL: Fault = Fault::Stall {
    after: Duration::from_millis(1500),
    lasts: Duration::from_secs(1),
};

/// A quarter of four seconds of arrivals falls into the stall of one second, and waits half of it in the
/// mean.
#[test]
fn a_stall_of_a_second_shows_in_p99() {
    let report = run(
        &start(STALL),
        &["--rate", "400", "--duration", "4", "--connections", "4"],
    );
    let latency = &report.latency;
    let of_second = |us: u64| (us as f64) / 1e6;
    assert!(
        (0.9..1.4).contains(&of_second(latency.p99_us)),
        "{latency:?}"
    );
    assert!(
        (0.4..1.2).contains(&of_second(latency.p90_us)),
        "{latency:?}"
    );
    assert!(of_second(latency.p50_us) < 0.3, "{latency:?}");
    // What each request took once it was sent tells next to nothing of it: four of 1,600 are slow.
    let service = &report.service_time;
    assert!(of_second(service.p99_us) < 0.3, "{service:?}");
    assert!(of_second(service.max_us) > 0.9, "{service:?}");
    assert!(report.verification.passed(), "{report:?}");
}

#[test]
fn a_closed_loop_hides_the_same_stall() {
    let report = run(
        &start(STALL),
        &["--rate", "0", "--duration", "4", "--connections", "4"],
    );
    assert!(report.latency.p99_us < 300_000, "{:?}", report.latency);
    assert!(report.latency.max_us > 900_000, "{:?}", report.latency);
    assert!(
        report
            .to_text()
            .contains("latency hides what a stall would cost")
    );
}
