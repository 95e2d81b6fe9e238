//! What a run found, for people and for programs.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

/// Shown percentiles of a latency distribution, in microseconds.
#[derive(Debug, Clone, Serialize)]
pub struct Latency {
    pub p50_us: u64,
    pub p90_us: u64,
    pub p99_us: u64,
    pub p99_9_us: u64,
    pub max_us: u64,
    pub mean_us: f64,
}

impl Latency {
    pub(crate) fn of(histogram: &Histogram<u64>) -> Self {
        Self {
            p50_us: histogram.value_at_quantile(0.5),
            p90_us: histogram.value_at_quantile(0.9),
            p99_us: histogram.value_at_quantile(0.99),
            p99_9_us: histogram.value_at_quantile(0.999),
            max_us: histogram.max(),
            mean_us: histogram.mean(),
        }
    }
}

/// Whether the totals hold what was acknowledged.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Verification {
    /// Acknowledged increments, the warm-up's included.
    pub acknowledged: u64,
    /// Those of them that the totals hold.
    pub found: u64,
    /// Increments in the totals beyond those acknowledged and those with an unknown outcome.
    pub surplus: u64,
    /// Increments sent whose outcome is unknown; each may or may not be in the totals.
    pub unknown: u64,
    pub objects: u64,
    /// Objects whose total could not be read.
    pub unread: u64,
}

impl Verification {
    pub fn passed(&self) -> bool {
        self.found == self.acknowledged && self.surplus == 0 && self.unread == 0
    }
}

/// One run.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub target: String,
    pub seed: u64,
    pub commit: &'static str,
    pub machine: Machine,
    /// Requests per second that were meant to be sent; 0: as fast as the connections allowed.
    pub rate: f64,
    pub connections: u32,
    pub objects: u32,
    pub names: String,
    pub seconds: f64,
    /// Acknowledged requests per second.
    pub rps: f64,
    pub acknowledged: u64,
    /// Requests refused or with unknown outcome, by reason.
    pub errors: BTreeMap<String, u64>,
    /// Arrivals that were never sent because too many were due.
    pub not_sent: u64,
    /// From the intended send time, so that a stall counts for everyone who had to wait for it.
    pub latency: Latency,
    /// From the actual send time.
    pub service_time: Latency,
    pub verification: Verification,
}

/// Where it ran.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    pub cpu: String,
    pub cores: usize,
    pub kernel: String,
}

impl Machine {
    pub(crate) fn this() -> Self {
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu = cpu
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or("unknown", |(_, model)| model);
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            cpu: cpu.to_owned(),
            cores: std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
            kernel: kernel.trim().to_owned(),
        }
    }
}

impl Report {
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("numbers, strings and maps always serialize")
    }

    pub fn to_text(&self) -> String {
        let mut text = String::new();
        self.write(&mut text).expect("a string takes any text");
        text
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        let load = if self.rate > 0.0 {
            format!("{:.0}/s, open loop", self.rate)
        } else {
            "as fast as the connections allow, closed loop: latency hides what a stall would cost"
                .to_owned()
        };
        writeln!(text, "target        {}", self.target)?;
        writeln!(text, "load          {load}")?;
        writeln!(
            text,
            "              {} objects ({}), {} connections, {:.1} s, seed {}",
            self.objects, self.names, self.connections, self.seconds, self.seed
        )?;
        writeln!(
            text,
            "throughput    {:.0} rps ({} acknowledged)",
            self.rps, self.acknowledged
        )?;
        writeln!(
            text,
            "              {:>10} {:>10} {:>10} {:>10} {:>10}",
            "p50", "p90", "p99", "p99.9", "max"
        )?;
        for (name, latency) in [
            ("latency", &self.latency),
            ("service time", &self.service_time),
        ] {
            write!(text, "{name:<13}")?;
            for us in [
                latency.p50_us,
                latency.p90_us,
                latency.p99_us,
                latency.p99_9_us,
                latency.max_us,
            ] {
                write!(
                    text,
                    " {:>10}",
                    format!("{:.2?}", Duration::from_micros(us))
                )?;
            }
            writeln!(text)?;
        }
        let errors: u64 = self.errors.values().sum();
        writeln!(
            text,
            "errors        {errors}{}",
            if self.not_sent > 0 {
                format!(", and {} arrivals not sent", self.not_sent)
            } else {
                String::new()
            }
        )?;
        for (reason, count) in &self.errors {
            writeln!(text, "              {count} × {reason}")?;
        }
        let v = &self.verification;
        write!(
            text,
            "verified      {} of {} acknowledged increments, in {} objects",
            v.found, v.acknowledged, v.objects
        )?;
        if v.unknown > 0 {
            write!(text, "; {} had an unknown outcome", v.unknown)?;
        }
        if v.surplus > 0 {
            write!(text, "; {} too many", v.surplus)?;
        }
        if v.unread > 0 {
            write!(text, "; {} objects could not be read", v.unread)?;
        }
        write!(text, ": {}", if v.passed() { "ok" } else { "FAILED" })
    }
}
