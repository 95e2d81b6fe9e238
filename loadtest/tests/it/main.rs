//! Load against servers that misbehave, over real sockets.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod server;
mod stall;
mod wrong;
