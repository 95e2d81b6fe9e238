//! What a process does with its surroundings: signals, descriptors, exit codes.

use std::error::Error;
use std::io::Write;
use std::process::ExitCode;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::args::LogArgs;
use crate::config::ConfigError;
use crate::logs::Causes;

/// SIGTERM and SIGINT (drain and stop), and SIGHUP (reload).
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    Stop,
    Reload,
}

impl Signals {
    /// From here on, none of the three signals kills the process. Needs a tokio runtime.
    pub fn listen() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    pub async fn next(&mut self) -> Order {
        tokio::select! {
            _ = self.terminate.recv() => Order::Stop,
            _ = self.interrupt.recv() => Order::Stop,
            _ = self.hang_up.recv() => Order::Reload,
        }
    }
}

/// Raises the soft limit of open descriptors to the hard one, and returns it.
///
/// The usual soft limit of 1,024 is for programs that use `select`; a proxy needs more on its first
/// busy day.
pub fn raise_descriptor_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum.unwrap_or(u64::MAX),
        Err(_) => limit.current.unwrap_or(u64::MAX),
    }
}

/// What every server process begins with: logs, enough descriptors, and the runtime of its main
/// thread, which serves the admin listener and waits for signals.
pub fn begin(
    log: &LogArgs,
    level: &str,
) -> Result<tokio::runtime::Runtime, Box<dyn Error + Send + Sync>> {
    // What a client does wrong is not worth a line each; the gateway counts and answers it.
    let usual = format!("{level},pingora_core=off,pingora_proxy=off,h2=off");
    crate::logs::start(log.log_format, log.log.as_deref().unwrap_or(&usual))?;
    raise_descriptor_limit();
    let mut builder = tokio::runtime::Builder::new_current_thread();
    Ok(builder.enable_all().build()?)
}

/// Prints a line that callers wait for, such as the ready line.
pub fn print_line(line: &str) {
    let mut out = std::io::stdout().lock();
    // A closed stdout is no reason to stop serving.
    drop(writeln!(out, "{line}").and_then(|()| out.flush()));
}

/// Prints why `program` ends, without a backtrace: 2 for usage or configuration, 1 otherwise.
#[expect(clippy::print_stderr, reason = "the last words of the process")]
pub fn exit_code(program: &str, result: Result<(), Box<dyn Error + Send + Sync>>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!(
                "{program}: {}",
                Causes(error.as_ref()).to_string().trim_end()
            );
            if error.is::<ConfigError>() {
                ExitCode::from(2)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}
