//! Load from outside: arrivals follow a schedule that no slow answer can delay (open loop), latency
//! counts from the moment a request was meant to be sent, every answer is checked, and in the end
//! everything acknowledged must be there.
//!
//! A run goes through these files: `args` (what to do), `schedule` and `rate` (when, and to whom), `load`
//! (one process; `parts`: several), `visitor` over `client` (one connection), `measures` and `ledger`
//! (what came of it), `verify` (what is there), `report` and `rule` (what to say of it).

mod args;
mod client;
mod csv;
mod faults;
mod ledger;
mod load;
mod measures;
mod operation;
mod parts;
mod plot;
pub mod process;
mod progress;
mod prometheus;
mod rate;
mod report;
mod rule;
mod run;
mod schedule;
mod server_side;
mod shards;
mod sweep;
mod verify;
mod visitor;

use std::process::ExitCode;

use clap::Subcommand;

pub use args::RunArgs;
pub use faults::{Fault, FaultReport, FaultsArgs, FaultsReport, faults};
pub use operation::{Mix, Operation};
pub use rate::Rate;
pub use report::{Machine, Report};
pub use rule::Rule;
pub use run::run;
pub use schedule::{Arrivals, Names};
pub use sweep::{Axis, Point, Sweep, SweepArgs, sweep};

/// The commit that this was built from.
pub const COMMIT: &str = env!("DORMOUSE_COMMIT");

/// The exit code of a run whose `--fail-if` holds; 1 is for everything else that goes wrong.
const RULE_BROKEN: u8 = 3;

/// Load tests.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Sends requests at a given rate, checks every answer, then verifies the totals
    ///
    /// Exits with 0 if all is well, 3 if a --fail-if holds, 1 if the verification or anything else
    /// fails, 2 if the arguments are wrong.
    Run(Box<RunArgs>),
    /// Measures throughput and latency over a range of shards, workers, objects or connections
    Sweep(Box<SweepArgs>),
    /// Runs a load while processes are killed, stopped and started, and reports the gaps
    Faults(Box<FaultsArgs>),
    /// One of several load processes; started by `run --processes`
    #[command(hide = true)]
    Part,
}

/// Runs a command to its end and prints its report.
pub fn main(command: &Command) -> ExitCode {
    let done = match command {
        Command::Run(args) => run(args).map(|report| {
            print(&if args.json {
                report.to_json()
            } else {
                report.to_text()
            });
            judge(args, &report)
        }),
        Command::Sweep(args) => sweep(args).map(|sweep| {
            print(&if args.run.json {
                sweep.to_json()
            } else {
                sweep.to_text()
            });
            ExitCode::SUCCESS
        }),
        Command::Faults(args) => faults(args).map(|report| {
            print(&if args.run.json {
                report.to_json()
            } else {
                report.to_text()
            });
            if report.passed() {
                judge(&args.run, &report.run)
            } else {
                ExitCode::FAILURE
            }
        }),
        Command::Part => parts::part().map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| ops::process::exit_code("dormouse loadtest", Err(error.into())))
}

/// Shows which rules a report breaks.
fn judge(args: &RunArgs, report: &Report) -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for rule in &args.fail_if {
        if let Some(found) = rule.broken_by(report) {
            progress::show(&format_args!("dormouse loadtest: {rule}: it is {found}"));
            code = ExitCode::from(RULE_BROKEN);
        }
    }
    if report.verification.passed() {
        code
    } else {
        ExitCode::FAILURE
    }
}

#[expect(clippy::print_stdout, reason = "the report is the result")]
fn print(report: &str) {
    println!("{report}");
}
