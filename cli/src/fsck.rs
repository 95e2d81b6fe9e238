//! `dormouse fsck`: prints what [`shard_node::fsck`] finds.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use shard_node::fsck::{self, Summary};

/// Databases between two updates of the progress line.
const PROGRESS_EVERY: u64 = 256;

#[derive(Parser)]
pub(crate) struct Args {
    /// The node's data directory; the node must be stopped
    data_dir: PathBuf,
}

/// 0 if nothing is wrong, 1 otherwise.
pub(crate) fn main(args: &Args) -> ExitCode {
    ops::process::exit_code("dormouse fsck", run(args))
}

fn run(args: &Args) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut screen = std::io::stderr();
    let watched = screen.is_terminal();
    let summary = fsck::check(&args.data_dir, ops::process::print_line, |databases| {
        if watched && databases.is_multiple_of(PROGRESS_EVERY) {
            // Progress that cannot be shown is no reason to stop.
            drop(write!(screen, "\r{databases} databases"));
        }
    })?;
    if watched {
        drop(write!(screen, "\r"));
    }
    let Summary {
        logs,
        recovered,
        objects,
        bytes,
        listed,
        problems,
    } = summary;
    ops::process::print_line(&format!(
        "{logs} logs, with commits of {recovered} databases that their files lack"
    ));
    ops::process::print_line(&format!(
        "{objects} objects, {listed} in the catalogs; {bytes} bytes of databases"
    ));
    if problems > 0 {
        return Err(format!("{problems} problems").into());
    }
    ops::process::print_line("no problems");
    Ok(())
}
