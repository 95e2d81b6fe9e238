//! Through the front door: a real gateway before scripted nodes and apps.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod answers;
mod apps;
mod cache;
mod corpus;
mod counters;
mod crowds;
mod deadlines;
mod downstream;
mod examples;
mod exchanges;
mod floods;
mod guards;
mod limits;
mod link;
mod objects;
mod process;
mod robust;
mod routes;
mod scripted_link;
mod shedding;
mod support;
mod unmodified;
mod upgrade;
mod upstream_tls;
mod upstreams;
