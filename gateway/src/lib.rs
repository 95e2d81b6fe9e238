//! The stateless edge: any gateway can serve any request.
//!
//! One request through the files: [`downstream`] accepts the connection; pingora reads the head and calls
//! [`proxy`], which makes a view of it ([`asked`]), asks [`route`] for the target and [`placement`] for
//! its worker, adds the headers of `protocol`, and streams both bodies; keys and names come from
//! [`template`]s; answers of some routes are kept in the [`cache`]; [`retry`] says what may be sent again when that fails;
//! [`metrics`] counts it, [`access_log`] writes it down. A gateway keeps nothing that a restart could lose.

pub mod access;
pub mod access_log;
pub mod asked;
pub mod auth;
pub mod cache;
pub mod client;
pub mod config;
pub mod cors;
pub mod counters;
pub mod deadline;
pub mod downstream;
#[doc(hidden)]
pub mod fuzz;
pub mod hot;
pub mod limit;
pub mod link;
pub mod metrics;
pub mod placement;
pub mod proxy;
pub mod refusal;
pub mod retry;
pub mod route;
pub mod rules;
pub mod server;
pub mod shard;
pub mod shed;
pub mod template;
pub mod upgrade;
pub mod upstream;
pub mod validate;
