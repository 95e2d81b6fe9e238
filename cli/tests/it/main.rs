//! The binary, as people use it.

mod command_line;
mod crash;
mod readme;
mod support;
mod whole;
