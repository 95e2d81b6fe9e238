use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    shard_node::node::main(&shard_node::config::Args::parse())
}
