//! Through the front door: real nodes on real sockets, with classes that misbehave on purpose.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod calls;
mod classes;
mod limiter;
mod link;
mod node;
mod relay;
mod requests;
mod support;
mod usage;
