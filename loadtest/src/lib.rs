//! Open-loop load from outside: arrivals follow a schedule that no slow answer can delay, latency
//! counts from the moment a request was meant to be sent, and in the end every acknowledged increment
//! must be in the totals.

mod client;
mod report;
mod run;
mod schedule;

use std::process::ExitCode;

use clap::Subcommand;

pub use report::Report;
pub use run::{RunArgs, run};
pub use schedule::{Arrivals, Names};

/// Load tests.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Increments many counters at a given rate, then verifies the totals
    Run(RunArgs),
}

/// Runs a command to its end and prints its report.
pub fn main(command: &Command) -> ExitCode {
    let Command::Run(args) = command;
    match run(args) {
        Ok(report) => {
            print(&if args.json {
                report.to_json()
            } else {
                report.to_text()
            });
            if report.verification.passed() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Err(error) => ops::process::exit_code("dormouse loadtest", Err(error.into())),
    }
}

#[expect(clippy::print_stdout, reason = "the report is the result")]
fn print(report: &str) {
    println!("{report}");
}
