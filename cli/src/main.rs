//! `dormouse`: the one binary people type. Parsing and printing only; the work is in the libraries.

mod admin;
mod alarms;
mod backup;
mod bulk;
mod counters;
mod dev;
mod doctor;
mod fsck;
mod objects;
mod show;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// As in the binary `gateway`.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Self-hosted Durable Objects at proxy speed.
///
/// Without a command: `dormouse dev`.
#[derive(Parser)]
#[command(name = "dormouse", version)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// A gateway and a node in one process, on loopback, for development
    Dev(dev::Args),
    /// The stateless edge: routes requests to objects and to app upstreams
    Gateway(gateway::config::Args),
    /// Hosts single-threaded SQLite-backed objects behind gateways
    Node(shard_node::config::Args),
    /// Lists, shows, exports, imports, forks and deletes objects
    #[command(subcommand)]
    Objects(objects::Command),
    /// Lists, fires and cancels alarms, and what became of those that failed
    #[command(subcommand)]
    Alarms(alarms::Command),
    /// Lists, shows, reshards, increments, reads and exports sharded counters
    #[command(subcommand)]
    Counters(counters::Command),
    /// Runs SQL in the database of an object
    Sql(objects::SqlArgs),
    /// Judges how classes and objects are used, and says what to use instead
    Doctor(doctor::DoctorArgs),
    /// Five questions before a class is written: object, KV, SQL, queue or stateless?
    Advise(doctor::AdviseArgs),
    /// Saves all objects elsewhere, and brings them back
    #[command(subcommand)]
    Backup(backup::Command),
    /// Checks a data directory that no node uses, without changing it
    Fsck(fsck::Args),
    /// Open-loop load with verified answers
    #[command(subcommand)]
    Loadtest(loadtest::Command),
    /// Dormouse beside what one would otherwise use
    #[command(subcommand)]
    Bench(bench::Command),
}

fn main() -> ExitCode {
    match Cli::parse().command {
        None => dev::main(&dev::Args::parse_from(["dormouse"])),
        Some(Command::Dev(args)) => dev::main(&args),
        Some(Command::Gateway(args)) => gateway::server::main(&args),
        Some(Command::Node(args)) => shard_node::node::main(&args),
        Some(Command::Objects(command)) => objects::main(&command),
        Some(Command::Alarms(command)) => alarms::main(&command),
        Some(Command::Counters(command)) => counters::main(&command),
        Some(Command::Sql(args)) => objects::main_sql(&args),
        Some(Command::Doctor(args)) => doctor::main(&args),
        Some(Command::Advise(args)) => doctor::main_advise(&args),
        Some(Command::Backup(command)) => backup::main(&command),
        Some(Command::Fsck(args)) => fsck::main(&args),
        Some(Command::Loadtest(command)) => loadtest::main(&command),
        Some(Command::Bench(command)) => bench::main(&command),
    }
}
