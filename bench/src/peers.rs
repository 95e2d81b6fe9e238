//! `dormouse bench peers`: Dormouse and what one would otherwise use for the same thing, under the same
//! load, on the same cores, in turns. Every counter is read in the end and must hold what was
//! acknowledged.

mod client;
mod contenders;
mod results;
mod server;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, ensure};

pub use results::Results;

use client::{Load, Measured};
use contenders::{Question, questions};
use results::{Row, Table};
use server::Places;

/// What to measure, and where.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Seconds of each measurement
    #[arg(long, default_value_t = 5.0)]
    pub duration: f64,
    /// Seconds of load before it
    #[arg(long, default_value_t = 1.0)]
    pub warmup: f64,
    /// How often each is measured, in turns with the others; the median counts
    #[arg(long, default_value_t = 3)]
    pub rounds: u32,
    /// Keep-alive connections, each with one request under way
    #[arg(long, default_value_t = 64)]
    pub connections: u32,
    /// The core that what is measured runs on
    #[arg(long, default_value_t = 0)]
    pub server_core: u32,
    /// The core that the client, and apps behind proxies, run on [default: the last]
    #[arg(long)]
    pub client_core: Option<u32>,
    /// Only questions whose name contains this
    #[arg(long, value_name = "TEXT")]
    pub only: Option<String>,
    /// The binary of Dormouse [default: this one]
    #[arg(long, value_name = "FILE")]
    pub dormouse: Option<PathBuf>,
    /// Where workerd is [default: in PATH]
    #[arg(long, value_name = "FILE")]
    pub workerd: Option<PathBuf>,
    /// Print one JSON object instead of tables
    #[arg(long)]
    pub json: bool,
    /// Write peers.md and peers.json to this directory
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

/// Measures everything that is installed.
///
/// # Errors
/// When the arguments are wrong, something that is installed does not start, or an answer is wrong.
pub fn peers(args: &Args) -> anyhow::Result<Results> {
    ensure!(
        args.duration > 0.0 && args.duration < 3600.0,
        "--duration {} must be above 0 and below an hour",
        args.duration
    );
    ensure!(
        (0.0..3600.0).contains(&args.warmup),
        "--warmup {} must not be negative, and below an hour",
        args.warmup
    );
    ensure!(
        (1..=100).contains(&args.rounds),
        "--rounds {} must be from 1 to 100",
        args.rounds
    );
    ensure!(
        (1..=10_000).contains(&args.connections),
        "--connections {} must be from 1 to 10000",
        args.connections
    );
    ops::process::raise_descriptor_limit();
    let places = Places::find(args)?;
    let mut results = Results::begin(args, &places)?;
    for question in questions() {
        if let Some(only) = &args.only
            && !question.name.contains(only.as_str())
        {
            continue;
        }
        if let Some(table) = ask(args, &places, &question, &mut results.skipped)? {
            results.tables.push(table);
        }
    }
    results.end();
    if let Some(directory) = &args.out {
        results.save(directory)?;
    }
    Ok(results)
}

/// One question, put to all who can answer it, in turns.
fn ask(
    args: &Args,
    places: &Places,
    question: &Question,
    skipped: &mut Vec<String>,
) -> anyhow::Result<Option<Table>> {
    let mut running = Vec::new();
    for contender in &question.contenders {
        if let Some(missing) = places.missing(contender.needs) {
            if !skipped.contains(&missing) {
                say(&missing);
                skipped.push(missing);
            }
            continue;
        }
        let started = (contender.start)(places, question.objects);
        running.push((
            contender.name,
            started.with_context(|| format!("start {}", contender.name))?,
        ));
    }
    let mut measured: Vec<Vec<(Measured, f64)>> = vec![Vec::new(); running.len()];
    let mut acknowledged = vec![0u64; running.len()];
    for round in 0..args.rounds {
        for (at, (name, running)) in running.iter().enumerate() {
            let load = Load {
                address: running.address,
                protocol: running.protocol,
                requests: running.requests.clone(),
                connections: args.connections,
                warmup: Duration::from_secs_f64(args.warmup),
                duration: Duration::from_secs_f64(args.duration),
                core: places.client_core,
                seed: u64::from(round) + 1,
            };
            let (found, cpu_us) = running.cpu_during(|| client::run(load))?;
            let found = found.with_context(|| format!("ask {name}"))?;
            ensure!(
                found.errors == 0,
                "{name}: {} wrong answers, such as {}",
                found.errors,
                found.error
            );
            acknowledged[at] += found.sent;
            say(&format!(
                "{}, round {}: {name} {:.0}/s",
                question.name,
                round + 1,
                found.rps
            ));
            let cpu_us = cpu_us / client::count(found.sent);
            measured[at].push((found, cpu_us));
        }
    }
    for ((name, running), acknowledged) in running.iter().zip(acknowledged) {
        if let Some(total) = running.total()? {
            ensure!(
                total == acknowledged,
                "{name}: {acknowledged} increments were acknowledged, and {total} are there"
            );
        }
    }
    let rows: Vec<Row> = running
        .iter()
        .zip(measured)
        .map(|((name, running), measured)| Row::new(name, running.commands.clone(), measured))
        .collect();
    Ok((!rows.is_empty()).then(|| Table::new(question, rows)))
}

fn say(line: &str) {
    use std::io::Write;
    // A closed stderr is no reason to stop.
    drop(writeln!(std::io::stderr(), "{line}"));
}
