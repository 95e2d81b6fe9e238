//! Rate limits.

pub mod table;
