//! What the gateway and the shard nodes must agree on, and nothing else: no I/O, no async, no clock.
//!
//! A request names an object; [`ids`] turn the name into an [`ObjectId`], the [`ring`] turns the id
//! into a shard and the shard into a worker's address, [`headers`] or a [`link`] carry all of it there,
//! and what the system refuses comes back as a [`Problem`] with a code from a closed set ([`ErrorCode`]).
//! Every bound they share is in [`limits`]; [`rate`] and [`limiter`] are how often a key may come, and
//! [`counters`] how many objects count as one.

pub mod counters;
pub mod epoch;
pub mod error_code;
pub mod headers;
pub mod ids;
pub mod limiter;
pub mod limits;
pub mod link;
pub mod problem;
pub mod rate;
pub mod ring;
pub mod trace;

pub use epoch::{Bookmark, Epoch, LogPosition};
pub use error_code::ErrorCode;
pub use ids::{ClassName, Colo, Home, ObjectId, ObjectName, ShardId};
pub use problem::Problem;
pub use ring::{Ring, RingVersion};
