//! What every process owes its operator: a configuration file with errors one can act on, logs,
//! signals, and an admin listener with metrics and health.

pub mod admin;
pub mod advisor;
pub mod args;
pub mod config;
pub mod exchange;
pub mod hot;
pub mod logs;
pub mod metrics;
pub mod operator;
pub mod process;
pub mod sketch;
pub mod watch;

pub use logs::Causes;
