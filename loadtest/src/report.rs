//! What a run found, for people and for programs.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use serde::Serialize;

use crate::args::RunArgs;
use crate::measures::{Interval, Measures, Samples};

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
    pub(crate) fn of(samples: &Samples) -> Self {
        let histogram = samples.histogram();
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
    /// Acknowledged writes, the warm-up's included.
    pub acknowledged: u64,
    /// Those of them that the totals hold.
    pub found: u64,
    /// Writes in the totals beyond those acknowledged and those with an unknown outcome.
    pub surplus: u64,
    /// Writes sent whose outcome is unknown; each may or may not be in the totals.
    pub unknown: u64,
    pub objects: u64,
    /// Objects whose total could not be read.
    pub unread: u64,
    /// Answers during the run that cannot be, after what was acknowledged before.
    pub wrong_answers: u64,
    /// The first of them.
    pub wrong_answer: Option<String>,
}

impl Verification {
    pub fn passed(&self) -> bool {
        self.found == self.acknowledged
            && self.surplus == 0
            && self.unread == 0
            && self.wrong_answers == 0
    }
}

/// One run.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub target: String,
    pub seed: u64,
    pub commit: &'static str,
    pub machine: Machine,
    /// Requests per second that were meant to be sent, in the mean; 0: as fast as the connections
    /// allowed.
    pub rate: f64,
    /// The same as it was asked for: a number, steps or a ramp.
    pub rates: String,
    pub scenario: String,
    pub processes: u32,
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
    /// By operation, if there are several.
    pub operations: BTreeMap<&'static str, OperationReport>,
    /// By step of the rate, or tenth of a ramp.
    pub stages: Vec<Stage>,
    /// What the server itself measured meanwhile, if its admin listener was given.
    pub server: Vec<ServerLatency>,
    pub timeline: Vec<Moment>,
    pub verification: Verification,
}

/// One operation of a mix.
#[derive(Debug, Clone, Serialize)]
pub struct OperationReport {
    pub acknowledged: u64,
    pub errors: u64,
    pub latency: Latency,
    pub service_time: Latency,
}

/// A part of a run with a rate of its own.
#[derive(Debug, Clone, Serialize)]
pub struct Stage {
    /// Requests per second that were meant to be sent, in the middle of it.
    pub rate: f64,
    pub acknowledged: u64,
    pub latency: Latency,
}

/// One of the server's histograms; quantiles are as sharp as its buckets.
#[derive(Debug, Clone, Serialize)]
pub struct ServerLatency {
    pub name: String,
    pub metric: String,
    pub count: u64,
    pub p50_us: f64,
    pub p90_us: f64,
    pub p99_us: f64,
    pub mean_us: f64,
}

/// What was answered in one interval of the timeline, usually a second.
#[derive(Debug, Clone, Serialize)]
pub struct Moment {
    /// When it began, in seconds since measuring did.
    pub second: f64,
    pub rps: f64,
    pub acknowledged: u64,
    pub errors: u64,
    /// Exact to two digits.
    pub latency: Latency,
}

/// Where it ran.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    pub cpu: String,
    pub cores: usize,
    pub kernel: String,
}

impl Machine {
    /// This machine, as far as /proc tells.
    pub fn this() -> Self {
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
    pub(crate) fn new(
        args: &RunArgs,
        seed: u64,
        measures: &Measures,
        server: Vec<ServerLatency>,
        verification: Verification,
    ) -> Self {
        let seconds = measures.last_answer.as_secs_f64().max(f64::EPSILON);
        let acknowledged = measures.acknowledged();
        let several = measures.operations.len() > 1;
        let operations = measures.operations.iter().filter(|_| several);
        Self {
            target: args.target.clone(),
            seed,
            commit: crate::COMMIT,
            machine: Machine::this(),
            rate: args.rate.mean(),
            rates: args.rate.to_string(),
            scenario: args.scenario.to_string(),
            processes: args.processes,
            connections: args.connections,
            objects: args.objects,
            names: format!("{:?}", args.names).to_lowercase(),
            seconds,
            rps: per_second(acknowledged, seconds),
            acknowledged,
            errors: measures.errors.clone(),
            not_sent: measures.not_sent,
            latency: Latency::of(&measures.latency()),
            service_time: Latency::of(&measures.service_time()),
            operations: operations
                .map(|(operation, measured)| {
                    let report = OperationReport {
                        acknowledged: measured.latency.histogram().len(),
                        errors: measured.errors,
                        latency: Latency::of(&measured.latency),
                        service_time: Latency::of(&measured.service_time),
                    };
                    (operation.name(), report)
                })
                .collect(),
            stages: stages(args, measures),
            server,
            timeline: timeline(measures, seconds),
            verification,
        }
    }

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
            format!("{}/s, open loop", self.rates)
        } else {
            "as fast as the connections allow, closed loop: latency hides what a stall would cost"
                .to_owned()
        };
        writeln!(text, "target        {}", self.target)?;
        writeln!(text, "load          {} at {load}", self.scenario)?;
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
        self.write_latency(text)?;
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
        self.verification.write(text, &self.scenario)
    }

    fn write_latency(&self, text: &mut String) -> std::fmt::Result {
        writeln!(
            text,
            "              {:>10} {:>10} {:>10} {:>10} {:>10}",
            "p50", "p90", "p99", "p99.9", "max"
        )?;
        row(text, "latency", &self.latency)?;
        row(text, "service time", &self.service_time)?;
        for (operation, report) in &self.operations {
            row(text, &format!("  {operation}"), &report.latency)?;
        }
        for stage in &self.stages {
            row(text, &format!("  {:.0}/s", stage.rate), &stage.latency)?;
        }
        for server in &self.server {
            let shown = [server.p50_us, server.p90_us, server.p99_us].map(micros);
            let [p50, p90, p99] = shown.map(|time| format!("{time:.2?}"));
            writeln!(
                text,
                "{:<13} {p50:>10} {p90:>10} {p99:>10}   ({}, as sharp as its buckets)",
                server.name, server.metric
            )?;
        }
        Ok(())
    }
}

impl Verification {
    fn write(&self, text: &mut String, scenario: &str) -> std::fmt::Result {
        let what = match scenario {
            "increment" | "read" => "increments",
            _ => "writes",
        };
        write!(
            text,
            "verified      {} of {} acknowledged {what}, in {} objects",
            self.found, self.acknowledged, self.objects
        )?;
        if self.unknown > 0 {
            write!(text, "; {} had an unknown outcome", self.unknown)?;
        }
        if self.surplus > 0 {
            write!(text, "; {} too many", self.surplus)?;
        }
        if self.unread > 0 {
            write!(text, "; {} objects could not be read", self.unread)?;
        }
        if let Some(wrong) = &self.wrong_answer {
            write!(text, "; {} wrong answers ({wrong})", self.wrong_answers)?;
        }
        write!(text, ": {}", if self.passed() { "ok" } else { "FAILED" })
    }
}

fn row(text: &mut String, name: &str, latency: &Latency) -> std::fmt::Result {
    write!(text, "{name:<13}")?;
    for us in [
        latency.p50_us,
        latency.p90_us,
        latency.p99_us,
        latency.p99_9_us,
        latency.max_us,
    ] {
        let shown = format!("{:.2?}", Duration::from_micros(us));
        write!(text, " {shown:>10}")?;
    }
    writeln!(text)
}

fn micros(us: f64) -> Duration {
    Duration::from_secs_f64((us / 1e6).max(0.0))
}

#[expect(clippy::cast_precision_loss, reason = "shown, not counted")]
fn per_second(count: u64, seconds: f64) -> f64 {
    count as f64 / seconds
}

#[expect(clippy::cast_precision_loss, reason = "few stages")]
fn stages(args: &RunArgs, measures: &Measures) -> Vec<Stage> {
    if measures.stages.len() < 2 {
        return Vec::new();
    }
    let count = measures.stages.len() as f64;
    let stages = measures.stages.iter().enumerate();
    let stages = stages.map(|(at, samples)| Stage {
        rate: args.rate.at((at as f64 + 0.5) / count),
        acknowledged: samples.histogram().len(),
        latency: Latency::of(samples),
    });
    stages.collect()
}

#[expect(clippy::cast_precision_loss, reason = "shown, not counted")]
fn timeline(measures: &Measures, seconds: f64) -> Vec<Moment> {
    let width = measures.interval().as_secs_f64();
    let intervals = measures.intervals.iter().enumerate();
    let moment = |(at, interval): (usize, &Interval)| {
        let second = at as f64 * width;
        Moment {
            second,
            // The last interval is not whole.
            rps: per_second(
                interval.acknowledged,
                width.min(seconds - second).max(0.001),
            ),
            acknowledged: interval.acknowledged,
            errors: interval.errors,
            latency: Latency::of(&interval.latency),
        }
    };
    intervals.map(moment).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use clap::Parser;

    use super::*;
    use crate::measures::Ended;
    use crate::operation::Operation;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: RunArgs,
    }

    /// 999 answers from 1 ms to 10 ms within 10 seconds, and an error.
    pub(crate) fn report() -> Report {
        let args = Cli::parse_from(["run", "--rate", "100"]).args;
        let mut measures = Measures::new(Duration::from_secs(10), 1);
        for at in 1..1000 {
            // 8191 µs is the upper end of what a histogram with three digits holds for one.
            let latency = Duration::from_micros((at * 10).clamp(1000, 8191));
            measures.acknowledge(&Ended {
                operation: Operation::Increment,
                stage: 0,
                at: Duration::from_millis(at * 10),
                latency: if at == 999 {
                    Duration::from_millis(10)
                } else {
                    latency
                },
                service_time: Duration::from_millis(1),
            });
        }
        measures.fail(
            Operation::Increment,
            Duration::from_millis(9990),
            "503".to_owned(),
        );
        Report::new(&args, 7, &measures, Vec::new(), Verification::default())
    }

    #[test]
    fn a_wrong_answer_fails_the_verification_and_is_shown() {
        let mut report = report();
        assert!(report.to_text().ends_with(": ok"));
        report.verification.wrong_answers = 3;
        report.verification.wrong_answer = Some("read answered 4".to_owned());
        let text = report.to_text();
        assert!(
            text.ends_with("; 3 wrong answers (read answered 4): FAILED"),
            "{text}"
        );
    }

    #[test]
    fn the_timeline_has_every_second() {
        let report = report();
        assert_eq!(report.timeline.len(), 10);
        assert!(
            report
                .timeline
                .iter()
                .all(|one| (95.0..105.0).contains(&one.rps))
        );
        assert_eq!(report.timeline[9].errors, 1);
    }
}
