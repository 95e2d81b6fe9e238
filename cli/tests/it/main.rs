//! The binary, as people use it.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod advisor;
mod backup;
mod bench;
mod bucket;
mod command_line;
mod counters;
mod crash;
mod fsck;
mod limits;
mod loadtest;
mod operator;
mod prometheus;
mod readme;
mod support;
mod whole;
