//! Load while processes are killed, stopped and started on a schedule, and the gap that clients saw.

use std::fmt::Write;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Args;
use rustix::process::Signal;
use serde::Serialize;

use crate::args::RunArgs;
use crate::load::now;
use crate::measures::Measures;
use crate::process::{Cluster, ClusterShape, Process};
use crate::progress::show;
use crate::report::Report;
use crate::run::{run_beside, sleep_until};

/// How long a process is started again and again if it ends before it is ready.
const START_MAX: Duration = Duration::from_secs(5);
const START_PAUSE: Duration = Duration::from_millis(100);

/// A run, and what happens to processes during it.
#[derive(Debug, Clone, Args)]
pub struct FaultsArgs {
    #[command(flatten)]
    pub run: RunArgs,
    /// What happens when, from the begin of measuring: "2s kill node", "3s start node", "5s stop
    /// gateway", "6s continue gateway", "8s restart node" (SIGTERM, and started again when it has
    /// ended), "9s terminate node"; may be given several times
    #[arg(long, value_name = "FAULT", required = true)]
    pub at: Vec<Fault>,
    /// A process: NAME=PID, or NAME=COMMAND, which is started and must print a line when it is ready;
    /// may be given several times [default: a node and a gateway of this program, called so]
    #[arg(long, value_name = "NAME=PROCESS")]
    pub process: Vec<String>,
}

/// One thing that happens to one process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    at: Duration,
    action: Action,
    process: String,
    text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Kill,
    Terminate,
    Stop,
    Continue,
    Start,
    Restart,
}

/// Why a text is no fault.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{0:?} must be a time, an action (kill, terminate, stop, continue, start, restart) and the name of a process, as in \"2s kill node\""
)]
pub struct FaultError(String);

impl FromStr for Fault {
    type Err = FaultError;

    fn from_str(text: &str) -> Result<Self, FaultError> {
        let wrong = || FaultError(text.to_owned());
        let words: Vec<&str> = text.split_whitespace().collect();
        let [at, action, process] = words[..] else {
            return Err(wrong());
        };
        let action = match action {
            "kill" => Action::Kill,
            "terminate" => Action::Terminate,
            "stop" => Action::Stop,
            "continue" => Action::Continue,
            "start" => Action::Start,
            "restart" => Action::Restart,
            _ => return Err(wrong()),
        };
        Ok(Self {
            at: humantime::parse_duration(at).map_err(|_| wrong())?,
            action,
            process: process.to_owned(),
            text: text.to_owned(),
        })
    }
}

/// What clients saw of a fault.
#[derive(Debug, Clone, Serialize)]
pub struct FaultReport {
    pub fault: String,
    /// Seconds from the begin of measuring until it was done.
    pub at: f64,
    /// Longest time without any acknowledged request until the next fault, to 10 ms.
    pub gap_ms: u128,
    /// Why it could not be done.
    pub error: Option<String>,
}

/// A run with faults.
#[derive(Debug, Clone, Serialize)]
pub struct FaultsReport {
    pub run: Report,
    pub faults: Vec<FaultReport>,
}

/// When a fault was done, or why it was not.
type Done = (Fault, Duration, Option<String>);

/// Runs the load with its faults.
///
/// # Errors
/// When the arguments are wrong or something cannot be started. What goes wrong later is in the report.
pub fn faults(args: &FaultsArgs) -> anyhow::Result<FaultsReport> {
    let mut run = args.run.clone();
    let mut schedule = args.at.clone();
    schedule.sort_by_key(|fault| fault.at);
    let (mut processes, data) = if args.process.is_empty() {
        let shape = ClusterShape {
            program: std::env::current_exe().context("find this program")?,
            ..ClusterShape::default()
        };
        let mut cluster = Cluster::start(&shape)?;
        cluster.stay(&shape)?;
        run.target.clone_from(&cluster.gateway_ready.url);
        let (processes, data) = cluster.into_parts();
        (processes, Some(data))
    } else {
        let processes = args.process.iter().map(|text| process(text));
        (processes.collect::<anyhow::Result<Vec<_>>>()?, None)
    };
    check(&schedule, &processes, run.duration)?;
    if data.is_none() {
        for process in processes.iter_mut().filter(|one| one.can_start()) {
            show(&format_args!(
                "{}: {}",
                process.name().to_owned(),
                process.start()?
            ));
        }
    }
    let length = Duration::from_secs_f64(run.duration);
    let beside = move |from: Instant| {
        let done = follow(&schedule, &mut processes, from);
        (processes, done)
    };
    let (report, measures, (processes, done)) = run_beside(&run, beside)?;
    drop((processes, data));
    Ok(FaultsReport {
        run: report,
        faults: reports(&done, &measures, length),
    })
}

fn process(text: &str) -> anyhow::Result<Process> {
    let (name, process) = text
        .split_once('=')
        .with_context(|| format!("--process {text:?} must be NAME=PID or NAME=COMMAND"))?;
    if let Ok(pid) = process.parse() {
        return Process::foreign(name, pid);
    }
    let command: Vec<String> = process.split_whitespace().map(str::to_owned).collect();
    ensure!(!command.is_empty(), "--process {text:?} has no command");
    Ok(Process::own(name, command))
}

fn check(schedule: &[Fault], processes: &[Process], duration: f64) -> anyhow::Result<()> {
    for fault in schedule {
        let known = processes.iter().find(|one| one.name() == fault.process);
        let known = known.with_context(|| {
            let names: Vec<&str> = processes.iter().map(Process::name).collect();
            format!(
                "--at {:?}: the processes are {}",
                fault.text,
                names.join(", ")
            )
        })?;
        let starts = matches!(fault.action, Action::Start | Action::Restart);
        ensure!(
            !starts || known.can_start(),
            "--at {:?}: only what was started here can be started again",
            fault.text
        );
        ensure!(
            fault.at.as_secs_f64() < duration,
            "--at {:?} must be before the end of the run, --duration {duration}",
            fault.text
        );
    }
    Ok(())
}

fn follow(schedule: &[Fault], processes: &mut [Process], from: Instant) -> Vec<Done> {
    let mut done = Vec::new();
    for fault in schedule {
        sleep_until(from + fault.at);
        let at = now() - from;
        let process = processes.iter_mut().find(|one| one.name() == fault.process);
        let result = process
            .context("the schedule was checked")
            .and_then(|process| fault.action.apply(process));
        let error = result.err().map(|error| format!("{error:#}"));
        done.push((fault.clone(), at, error));
    }
    done
}

impl Action {
    fn apply(self, process: &mut Process) -> anyhow::Result<()> {
        match self {
            Self::Kill => {
                process.signal(Signal::KILL)?;
                process.wait()
            }
            Self::Terminate => process.signal(Signal::TERM),
            Self::Stop => process.signal(Signal::STOP),
            Self::Continue => process.signal(Signal::CONT),
            Self::Start => start(process),
            Self::Restart => {
                process.signal(Signal::TERM)?;
                process.wait()?;
                start(process)
            }
        }
    }
}

/// Meanwhile somebody else's connection may have the port: it is tried again for some seconds.
fn start(process: &mut Process) -> anyhow::Result<()> {
    let until = now() + START_MAX;
    loop {
        match process.start() {
            Ok(_) => return Ok(()),
            Err(error) if now() > until => return Err(error),
            Err(_) => sleep_until(now() + START_PAUSE),
        }
    }
}

fn reports(done: &[Done], measures: &Measures, length: Duration) -> Vec<FaultReport> {
    let ends = done.iter().skip(1).map(|(_, at, _)| *at).chain([length]);
    let reports = done
        .iter()
        .zip(ends)
        .map(|((fault, at, error), end)| FaultReport {
            fault: fault.text.clone(),
            at: at.as_secs_f64(),
            gap_ms: measures.gap(*at, end.max(*at)).as_millis(),
            error: error.clone(),
        });
    reports.collect()
}

impl FaultsReport {
    pub fn passed(&self) -> bool {
        self.run.verification.passed() && self.faults.iter().all(|fault| fault.error.is_none())
    }

    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("numbers, strings and maps always serialize")
    }

    pub fn to_text(&self) -> String {
        let mut text = String::new();
        for fault in &self.faults {
            let outcome = match &fault.error {
                Some(error) => format!("NOT DONE: {error}"),
                None => format!("{} ms without an answer", fault.gap_ms),
            };
            writeln!(
                text,
                "{:<24} at {:>6.2} s: {outcome}",
                fault.fault, fault.at
            )
            .expect("a string takes any text");
        }
        text + &self.run.to_text()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_a_time_an_action_and_a_process() {
        let fault: Fault = "1500ms stop node".parse().unwrap();
        assert_eq!(fault.at, Duration::from_millis(1500));
        assert_eq!(
            (fault.action, fault.process.as_str()),
            (Action::Stop, "node")
        );
        for text in [
            "",
            "kill node",
            "2s burn node",
            "2 s kill node",
            "soon kill node",
        ] {
            assert_eq!(text.parse::<Fault>(), Err(FaultError(text.to_owned())));
        }
    }

    #[test]
    fn a_schedule_names_known_processes_and_moments_of_the_run() {
        let processes = [Process::foreign("node", 4_000_000).unwrap()];
        let check = |text: &str| {
            let schedule = [text.parse::<Fault>().unwrap()];
            check(&schedule, &processes, 10.0).map_err(|error| error.to_string())
        };
        assert_eq!(check("2s kill node"), Ok(()));
        assert!(
            check("2s kill nod")
                .unwrap_err()
                .ends_with("the processes are node")
        );
        assert!(
            check("2s restart node")
                .unwrap_err()
                .contains("started here")
        );
        assert!(
            check("10s kill node")
                .unwrap_err()
                .contains("--duration 10")
        );
        assert!(Process::foreign("all", 0).is_err() && Process::foreign("group", -5).is_err());
    }
}
