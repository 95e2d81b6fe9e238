//! The same load over a range of shard, worker, object or connection counts, and where more stops to
//! help.
//!
//! Each point is measured twice: as fast as the connections allow, for its throughput, and then open
//! loop at a share of that, for its latency. Both runs are verified.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::args::RunArgs;
use crate::operation::Operation;
use crate::plot;
use crate::process::{Cluster, ClusterShape};
use crate::progress::show;
use crate::rate::Rate;
use crate::report::{Latency, Machine};
use crate::run::run;

/// The knee is the smallest value with this share of the best throughput.
const KNEE_SHARE: f64 = 0.9;

const COUNT_MAX: u32 = 1_000_000;

/// What is varied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Axis {
    /// Counters called `shard:0`, `shard:1`, … that are one logical counter; with --scenario counter the shards
    /// of one sharded counter
    Shards,
    /// Threads of the node that host objects
    Workers,
    /// Objects that share the load
    Objects,
    /// Keep-alive connections
    Connections,
}

/// A load, and what is varied.
#[derive(Debug, Clone, Args)]
pub struct SweepArgs {
    #[command(flatten)]
    pub run: RunArgs,
    /// What is varied
    #[arg(long, value_enum, default_value = "shards")]
    pub over: Axis,
    /// Its values, rising [default: 1, 2, 4, … up to 1000 (workers: to the number of cores;
    /// connections: to 256; objects: 1, 10, … to 10000)]
    #[arg(long, value_delimiter = ',')]
    pub values: Vec<u32>,
    /// Share of the throughput at which latency is measured
    #[arg(long, default_value_t = 0.7)]
    pub load_share: f64,
    /// Rounds over all values; throughput is the median, latency that of the round with the median p99
    #[arg(long, default_value_t = 1)]
    pub rounds: u32,
    /// Start a node and a gateway for the sweep instead of using --target; sweeps of workers always do
    #[arg(long)]
    pub start: bool,
    /// Workers of a node that is started; 0 is one per core
    #[arg(long, default_value_t = 0)]
    pub workers: u32,
    /// Threads of a gateway that is started; 0 is one per core
    #[arg(long, default_value_t = 0)]
    pub threads: u32,
    /// Write sweep.json, sweep.md, sweep.svg and sweep.png to this directory
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// One value of the axis.
#[derive(Debug, Clone, Serialize)]
pub struct Point {
    pub value: u32,
    /// Acknowledged requests per second, closed loop; the median of `rounds`.
    pub rps: f64,
    /// The same of every round.
    pub rounds: Vec<f64>,
    /// Requests per second of the open loop.
    pub rate: f64,
    /// From the intended send time, at `rate`.
    pub latency: Latency,
    /// Acknowledged writes that were found again, in all runs of this point.
    pub verified: u64,
}

/// A sweep.
#[derive(Debug, Clone, Serialize)]
pub struct Sweep {
    pub over: Axis,
    pub scenario: String,
    pub load_share: f64,
    pub connections: u32,
    pub objects: u32,
    pub seconds: f64,
    pub commit: &'static str,
    pub machine: Machine,
    /// The smallest value with nine tenths of the best throughput.
    pub knee: u32,
    pub points: Vec<Point>,
}

/// Runs the load at every value and writes the files.
///
/// # Errors
/// When the arguments are wrong, something cannot be started, or a verification fails: a sweep with a
/// wrong point is worth nothing.
pub fn sweep(args: &SweepArgs) -> anyhow::Result<Sweep> {
    let values = args.values()?;
    let mut measured: Vec<Vec<(f64, f64, Latency, u64)>> = vec![Vec::new(); values.len()];
    let mut cluster = args.cluster(values[0])?;
    for round in 0..args.rounds {
        for (at, value) in values.iter().enumerate() {
            if args.over == Axis::Workers && (at > 0 || round > 0) {
                drop(cluster.take());
                cluster = args.cluster(*value)?;
            }
            let mut run = args.run.clone();
            if let Some(cluster) = &cluster {
                run.target.clone_from(&cluster.gateway_ready.url);
                run.admin = vec![cluster.gateway_ready.admin.clone()];
            }
            let point = measure(args, run, *value)?;
            show(&format_args!(
                "round {} of {}, {value} {}: {:.0} rps, p99 {} us at {:.0} rps",
                round + 1,
                args.rounds,
                args.over.name(),
                point.0,
                point.2.p99_us,
                point.1
            ));
            measured[at].push(point);
        }
    }
    let points: Vec<Point> = values
        .iter()
        .zip(measured)
        .map(|(v, m)| point(*v, m))
        .collect();
    let sweep = Sweep {
        over: args.over,
        scenario: args.run.scenario.to_string(),
        load_share: args.load_share,
        connections: args.run.connections,
        objects: args.run.objects,
        seconds: args.run.duration,
        commit: crate::COMMIT,
        machine: Machine::this(),
        knee: knee(&points),
        points,
    };
    if let Some(directory) = &args.out {
        sweep.save(directory)?;
    }
    Ok(sweep)
}

impl SweepArgs {
    fn values(&self) -> anyhow::Result<Vec<u32>> {
        ensure!(
            self.load_share > 0.0 && self.load_share < 1.0,
            "--load-share {} must be above 0 and below 1",
            self.load_share
        );
        ensure!(
            (1..=100).contains(&self.rounds),
            "--rounds {} must be from 1 to 100",
            self.rounds
        );
        let values = if self.values.is_empty() {
            self.over.usual()
        } else {
            self.values.clone()
        };
        ensure!(
            values.is_sorted_by(|a, b| a < b) && values.iter().all(|v| (1..=COUNT_MAX).contains(v)),
            "--values {values:?} must rise, from 1 to {COUNT_MAX} at most"
        );
        Ok(values)
    }

    fn cluster(&self, value: u32) -> anyhow::Result<Option<Cluster>> {
        let workers = self.over == Axis::Workers;
        if !self.start && !workers {
            return Ok(None);
        }
        let shape = ClusterShape {
            program: std::env::current_exe().context("find this program")?,
            workers: if workers { value } else { self.workers },
            threads: self.threads,
            ..ClusterShape::default()
        };
        Cluster::start(&shape).map(Some)
    }
}

impl Axis {
    fn name(self) -> &'static str {
        match self {
            Self::Shards => "shards",
            Self::Workers => "workers",
            Self::Objects => "objects",
            Self::Connections => "connections",
        }
    }

    fn usual(self) -> Vec<u32> {
        let doubling = |until: u32| {
            let powers = (0..u32::BITS).map(|power| 1u32 << power);
            powers
                .take_while(move |value| *value < until)
                .chain([until])
        };
        match self {
            Self::Shards => doubling(1000).collect(),
            Self::Connections => doubling(256).collect(),
            Self::Objects => vec![1, 10, 100, 1000, 10_000],
            Self::Workers => {
                let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
                doubling(u32::try_from(cores).unwrap_or(u32::MAX).min(64)).collect()
            }
        }
    }
}

/// Throughput, rate, latency at that rate, and how many writes were verified.
fn measure(
    args: &SweepArgs,
    mut run_args: RunArgs,
    value: u32,
) -> anyhow::Result<(f64, f64, Latency, u64)> {
    match args.over {
        Axis::Shards if run_args.scenario == Operation::Counter.into() => {
            run_args.shards = Some(value);
            run_args.objects = 1;
        }
        Axis::Shards => {
            ":shard:".clone_into(&mut run_args.joint);
            run_args.objects = value;
        }
        Axis::Objects => run_args.objects = value,
        Axis::Connections => run_args.connections = value,
        Axis::Workers => {}
    }
    let mut verified = 0;
    let mut checked = |rate: Rate| {
        run_args.rate = rate;
        let report = run(&run_args)?;
        if !report.verification.passed() {
            bail!("{value} {}: {}", args.over.name(), report.to_text());
        }
        verified += report.verification.found;
        anyhow::Ok(report)
    };
    let rps = checked(Rate::Constant(0.0))?.rps;
    let rate = (rps * args.load_share).max(1.0).round();
    let latency = checked(Rate::Constant(rate))?.latency;
    Ok((rps, rate, latency, verified))
}

fn point(value: u32, mut measured: Vec<(f64, f64, Latency, u64)>) -> Point {
    let verified = measured.iter().map(|one| one.3).sum();
    let rounds: Vec<f64> = measured.iter().map(|one| one.0).collect();
    let middle = measured.len() / 2;
    measured.sort_by_key(|one| one.2.p99_us);
    let (_, rate, latency, _) = measured.swap_remove(middle);
    let mut sorted = rounds.clone();
    sorted.sort_by(f64::total_cmp);
    Point {
        value,
        rps: sorted[middle],
        rounds,
        rate,
        latency,
        verified,
    }
}

/// The smallest value beyond which nothing brings a tenth more.
fn knee(points: &[Point]) -> u32 {
    let best = points.iter().map(|point| point.rps).fold(0.0, f64::max);
    let reached = points.iter().find(|point| point.rps >= best * KNEE_SHARE);
    reached.map_or(1, |point| point.value)
}

impl Sweep {
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("numbers, strings and lists always serialize")
    }

    /// A table in Markdown.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        self.write(&mut text).expect("a string takes any text");
        text
    }

    pub(crate) fn name(&self) -> &'static str {
        self.over.name()
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        writeln!(
            text,
            "| {} | requests/s | at rate | p50 | p99 | p99.9 | verified |\n|---:|---:|---:|---:|---:|---:|---:|",
            self.name()
        )?;
        for point in &self.points {
            let latency = &point.latency;
            let ms = [latency.p50_us, latency.p99_us, latency.p99_9_us].map(milliseconds);
            writeln!(
                text,
                "| {} | {:.0} | {:.0} | {} | {} | {} | {} |",
                point.value, point.rps, point.rate, ms[0], ms[1], ms[2], point.verified
            )?;
        }
        write!(
            text,
            "\nKnee: {} {}, the fewest with nine tenths of the best throughput. {}, {} connections, \
             {} s per run; {} ({} cores), Linux {}, commit {}.",
            self.knee,
            self.name(),
            self.scenario,
            self.connections,
            self.seconds,
            self.machine.cpu,
            self.machine.cores,
            self.machine.kernel,
            self.commit
        )
    }

    fn save(&self, directory: &Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("make {}", directory.display()))?;
        let write = |name: &str, bytes: &[u8]| {
            let file = directory.join(name);
            std::fs::write(&file, bytes).with_context(|| format!("write {}", file.display()))
        };
        write("sweep.json", self.to_json().as_bytes())?;
        write("sweep.md", format!("{}\n", self.to_text()).as_bytes())?;
        write("sweep.svg", plot::svg(self)?.as_bytes())?;
        plot::png(self, &directory.join("sweep.png"))
    }
}

#[expect(clippy::cast_precision_loss, reason = "shown, not counted")]
fn milliseconds(us: u64) -> String {
    format!("{:.2} ms", us as f64 / 1e3)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::report::tests::report;

    pub(crate) fn sweep(rps: &[f64]) -> Sweep {
        let points = (0u32..).zip(rps).map(|(power, rps)| Point {
            value: 1 << power,
            rps: *rps,
            rounds: vec![*rps],
            rate: rps * 0.7,
            latency: report().latency,
            verified: 1,
        });
        let points: Vec<Point> = points.collect();
        Sweep {
            over: Axis::Shards,
            scenario: "increment".to_owned(),
            load_share: 0.7,
            connections: 64,
            objects: 1,
            seconds: 1.0,
            commit: "none",
            machine: Machine::this(),
            knee: knee(&points),
            points,
        }
    }

    #[test]
    fn the_knee_is_where_more_stops_to_help() {
        assert_eq!(sweep(&[100.0, 200.0, 390.0, 400.0, 410.0]).knee, 4);
        assert_eq!(sweep(&[400.0, 300.0, 200.0]).knee, 1);
        assert_eq!(sweep(&[100.0, 200.0, 400.0]).knee, 4);
    }

    #[test]
    fn rounds_give_medians() {
        let of_round = |rps, p99_us| {
            let mut latency = report().latency;
            latency.p99_us = p99_us;
            (rps, rps * 0.7, latency, 10)
        };
        let point = point(
            8,
            vec![of_round(300.0, 5), of_round(100.0, 9), of_round(200.0, 7)],
        );
        assert_eq!(
            (point.rps, point.latency.p99_us, point.verified),
            (200.0, 7, 30)
        );
    }

    #[test]
    fn every_axis_has_rising_values() {
        for axis in Axis::value_variants() {
            let values = axis.usual();
            assert!(values.is_sorted_by(|a, b| a < b), "{values:?}");
        }
        assert_eq!(Axis::Shards.usual().last(), Some(&1000));
    }
}
