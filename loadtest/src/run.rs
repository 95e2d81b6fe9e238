//! One run: warm-up, load, verification.

use std::io::IsTerminal;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use rand::Rng;
use tokio::runtime::Runtime;
use tokio::task::LocalSet;

use crate::args::RunArgs;
use crate::client::Target;
use crate::csv;
use crate::ledger::Ledger;
use crate::load::{Part, Watcher, load, now};
use crate::measures::Measures;
use crate::parts::{HEAD_START, load_in_parts};
use crate::progress::show;
use crate::prometheus::{self, Live};
use crate::report::Report;
use crate::schedule::Span;
use crate::server_side::{Scrape, scrape};
use crate::shards::reshard;
use crate::verify::verify;

/// Runs the load and verifies its totals.
///
/// # Errors
/// When the arguments are wrong or the first connection cannot be made. What goes wrong later is in
/// the report.
pub fn run(args: &RunArgs) -> anyhow::Result<Report> {
    run_beside(args, |_| ()).map(|(report, _, ())| report)
}

/// The same, with something that happens on a thread beside it; it is told when measuring begins.
pub(crate) fn run_beside<T: Send + 'static>(
    args: &RunArgs,
    beside: impl FnOnce(Instant) -> T + Send + 'static,
) -> anyhow::Result<(Report, Measures, T)> {
    args.validate()?;
    ops::process::raise_descriptor_limit();
    let seed = args.seed.unwrap_or_else(|| rand::rng().random());
    let target = args.target(seed)?;
    std::net::TcpStream::connect(&target.host)
        .with_context(|| format!("connect to {}", target.host))?;
    if let Some(shards) = args.shards {
        reshard(args, &target, shards)?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let span = args.span(
        now()
            + if args.processes > 1 {
                HEAD_START
            } else {
                HEAD_START / 50
            },
    );
    let measure_from = span.measure_from;
    let beside = std::thread::spawn(move || beside(measure_from));
    let before = scrape_at(args, measure_from);
    let (measures, ledger) = send(args, &runtime, &target, seed, span)?;
    let beside = join(beside)?;
    let server = match (join(before)?, args.admin.is_empty()) {
        (_, true) => Vec::new(),
        (before, false) => scrape(&args.admin, args.admin_token.as_deref())?.since(&before?),
    };
    let verified = verify(&target, ledger, args.connections);
    let verification = LocalSet::new().block_on(&runtime, verified)?;
    let report = Report::new(args, seed, &measures, server, verification);
    if let Some(file) = &args.csv {
        std::fs::write(file, csv::render(&report))
            .with_context(|| format!("write {}", file.display()))?;
    }
    if let Some(file) = &args.prometheus {
        std::fs::write(file, prometheus::render(&measures))
            .with_context(|| format!("write {}", file.display()))?;
    }
    Ok((report, measures, beside))
}

fn send(
    args: &RunArgs,
    runtime: &Runtime,
    target: &Target,
    seed: u64,
    span: Span,
) -> anyhow::Result<(Measures, Ledger)> {
    let progress = args.progress || std::io::stderr().is_terminal();
    if args.processes > 1 {
        return load_in_parts(args, seed, span, progress);
    }
    let local = LocalSet::new();
    local.block_on(runtime, async {
        let live = Live::default();
        if let Some(address) = &args.prometheus_listen {
            let listener = ops::admin::bind(address).await?;
            show(&format_args!("metrics http://{}", listener.local_addr()?));
            // Ends with the runtime.
            drop(tokio::spawn(ops::admin::serve(
                listener,
                None,
                Arc::new(live.clone()),
            )));
        }
        let watching = progress || args.prometheus_listen.is_some();
        let watcher = watching.then(|| -> Watcher {
            Box::new(move |measures, line| {
                if progress {
                    show(line);
                }
                live.set(measures);
            })
        });
        load(args, Part::ALONE, target, seed, span, watcher).await
    })
}

/// Reads the server's histograms when measuring begins.
fn scrape_at(args: &RunArgs, at: Instant) -> std::thread::JoinHandle<anyhow::Result<Scrape>> {
    let (urls, token) = (args.admin.clone(), args.admin_token.clone());
    std::thread::spawn(move || {
        if urls.is_empty() {
            return Ok(Scrape::default());
        }
        sleep_until(at);
        scrape(&urls, token.as_deref())
    })
}

#[expect(
    clippy::disallowed_methods,
    reason = "a thread of its own, beside the load, in real time"
)]
pub(crate) fn sleep_until(at: Instant) {
    std::thread::sleep(at.saturating_duration_since(Instant::now()));
}

fn join<T>(thread: std::thread::JoinHandle<T>) -> anyhow::Result<T> {
    thread
        .join()
        .map_err(|_| anyhow::anyhow!("a thread beside the load panicked"))
}
