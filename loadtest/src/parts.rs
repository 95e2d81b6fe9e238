//! Load from several processes, begun at one moment by one of them that adds everything up.
//!
//! Each is `dormouse loadtest part`: it reads a [`Spec`] from stdin and writes a [`Told`] per line.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use tokio::task::LocalSet;

use crate::args::RunArgs;
use crate::ledger::{Ledger, LedgerLines};
use crate::load::{Part, load, now};
use crate::measures::Measures;
use crate::progress::{Line, Sums, show};
use crate::schedule::Span;

/// Time that processes have to start until the load begins.
pub(crate) const HEAD_START: Duration = Duration::from_millis(500);

/// What a process is told.
#[derive(Debug, Serialize, Deserialize)]
struct Spec {
    args: RunArgs,
    part: Part,
    seed: u64,
    begin_unix_us: u64,
}

/// What a process tells.
#[derive(Debug, Serialize, Deserialize)]
enum Told {
    Progress(Line),
    Result(Box<(Measures, LedgerLines)>),
}

/// Runs the load in `args.processes` processes and adds up what they found.
pub(crate) fn load_in_parts(
    args: &RunArgs,
    seed: u64,
    span: Span,
    progress: bool,
) -> anyhow::Result<(Measures, Ledger)> {
    let begin = wall_clock()? + (span.begin - now());
    let mut children = Vec::new();
    // A bounded queue: a slow terminal slows down the telling only.
    let (tell, told) = sync_channel(64);
    for number in 0..args.processes {
        let spec = Spec {
            args: args.clone(),
            part: Part {
                number,
                of: args.processes,
            },
            seed,
            begin_unix_us: u64::try_from(begin.as_micros())?,
        };
        let (child, output) = start(&spec)?;
        children.push(child);
        let tell = tell.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if tell.send(line).is_err() {
                    return;
                }
            }
        });
    }
    drop(tell);
    let sum = add_up(args.processes, &told, progress);
    for mut child in children {
        if sum.is_err() {
            // It may have ended already.
            drop(child.kill());
        }
        let status = child.wait().context("wait for a load process")?;
        if sum.is_ok() && !status.success() {
            bail!("a load process ended with {status}");
        }
    }
    sum
}

fn start(spec: &Spec) -> anyhow::Result<(Child, ChildStdout)> {
    let program = std::env::current_exe().context("find this program")?;
    let mut child = Command::new(program)
        .args(["loadtest", "part"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("start a load process")?;
    let mut input = child.stdin.take().context("a pipe was asked for")?;
    serde_json::to_writer(&mut input, spec)
        .map_err(anyhow::Error::from)
        .and_then(|()| Ok(input.flush()?))
        .context("tell a load process what to do")?;
    let output = child.stdout.take().context("a pipe was asked for")?;
    Ok((child, output))
}

fn add_up(
    processes: u32,
    told: &Receiver<String>,
    progress: bool,
) -> anyhow::Result<(Measures, Ledger)> {
    let mut sums = Sums::of(processes);
    let mut whole: Option<(Measures, Ledger)> = None;
    let mut results = 0;
    for line in told {
        match serde_json::from_str(&line).context("understand a load process")? {
            Told::Progress(line) => {
                if let Some(line) = sums.add(line).filter(|_| progress) {
                    show(&line);
                }
            }
            Told::Result(result) => {
                let (measures, ledger) = *result;
                results += 1;
                match &mut whole {
                    None => whole = Some((measures, ledger.into())),
                    Some((sum, books)) => {
                        sum.add(&measures);
                        books.add(ledger.into());
                    }
                }
            }
        }
    }
    if results < processes {
        bail!("{results} of {processes} load processes told what they found");
    }
    whole.context("there is at least one process")
}

/// What a load process does.
pub(crate) fn part() -> anyhow::Result<()> {
    let spec: Spec = serde_json::from_reader(std::io::stdin()).context("read what to do")?;
    let begin = Duration::from_micros(spec.begin_unix_us).saturating_sub(wall_clock()?);
    ops::process::raise_descriptor_limit();
    let target = spec.args.target(spec.seed)?;
    let span = spec.args.span(now() + begin);
    let watcher = Box::new(|_: &Measures, line: &Line| tell(&Told::Progress(line.clone())));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let loaded = load(
        &spec.args,
        spec.part,
        &target,
        spec.seed,
        span,
        Some(watcher),
    );
    let (measures, ledger) = LocalSet::new().block_on(&runtime, loaded)?;
    tell(&Told::Result(Box::new((measures, ledger.into()))));
    Ok(())
}

fn tell(told: &Told) {
    let line = serde_json::to_string(told).expect("numbers, strings and lists always serialize");
    ops::process::print_line(&line);
}

#[expect(
    clippy::disallowed_methods,
    reason = "processes have no other clock in common"
)]
fn wall_clock() -> anyhow::Result<Duration> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?)
}
