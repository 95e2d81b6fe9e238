//! The timeline of a run as comma-separated values (RFC 4180).

use std::fmt::Write;

use crate::report::Report;

/// A line per interval, after a line of names.
pub(crate) fn render(report: &Report) -> String {
    let mut text =
        "second,rps,acknowledged,errors,p50_us,p90_us,p99_us,p99_9_us,max_us\n".to_owned();
    for one in &report.timeline {
        let latency = &one.latency;
        writeln!(
            text,
            "{},{:.1},{},{},{},{},{},{},{}",
            one.second,
            one.rps,
            one.acknowledged,
            one.errors,
            latency.p50_us,
            latency.p90_us,
            latency.p99_us,
            latency.p99_9_us,
            latency.max_us
        )
        .expect("a string takes any text");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::report;

    #[test]
    fn every_line_has_a_value_for_every_name() {
        let text = render(&report());
        let mut lines = text.lines().map(|line| line.split(',').count());
        assert_eq!(lines.next(), Some(9));
        assert_eq!(lines.clone().count(), 10);
        assert!(lines.all(|values| values == 9), "{text}");
    }
}
