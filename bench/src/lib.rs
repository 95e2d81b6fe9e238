//! Measurements against peers ([`peers`]). Micro-benchmarks live in `benches/`, a file per question:
//! `cargo bench -p dormouse-bench`.

pub mod peers;

use std::process::ExitCode;

use clap::Subcommand;

/// Benchmarks.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Dormouse beside workerd, redis, nginx and haproxy: one session, one machine, one load
    Peers(Box<peers::Args>),
}

/// Runs a command to its end and prints its result.
pub fn main(command: &Command) -> ExitCode {
    let Command::Peers(args) = command;
    let done = peers::peers(args).map(|results| {
        ops::process::print_line(&if args.json {
            results.to_json()
        } else {
            results.to_markdown()
        });
    });
    ops::process::exit_code("dormouse bench", done.map_err(Into::into))
}
