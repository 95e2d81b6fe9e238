use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    gateway::server::main(&gateway::config::Args::parse())
}
