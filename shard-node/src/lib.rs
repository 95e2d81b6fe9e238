//! Hosts objects: each single-threaded, with a name and a SQLite database of its own, asleep unless
//! something happens.
//!
//! The life of a request: [`worker`](node) accepts the connection on its own thread; `link`, or hyper for
//! HTTP/1.1, takes requests from it; `server` reads how they were routed and refuses what another worker owns; [`host`] finds the object in memory or
//! activates it, and puts the request into its mailbox; the turn loop hands it to the
//! [`class`]'s instance inside one transaction of the object's [`storage`]; the reply leaves once
//! that transaction is durable.

mod advice;
pub mod alarm;
pub mod alarms;
pub mod archive;
pub mod catalog;
mod checkpoint;
pub mod children;
pub mod class;
pub mod classes;
pub mod clock;
pub mod commit_log;
pub mod config;
pub mod data_dir;
pub mod disk;
pub mod expiry;
mod export;
pub mod fan_out;
pub mod fsck;
pub mod history;
pub mod host;
mod hot;
mod link;
pub mod metrics;
pub mod node;
pub mod object;
mod operator;
pub mod schedules;
mod server;
pub mod shard_map;
mod snapshots;
mod stock;
pub mod storage;
pub mod store;
pub mod stub;
mod usage;
mod worker;
