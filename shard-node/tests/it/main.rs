//! Through the front door: real nodes on real sockets, with classes that misbehave on purpose.

mod classes;
mod node;
mod requests;
mod support;
