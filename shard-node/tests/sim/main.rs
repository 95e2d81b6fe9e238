//! The storage engine on a disk that fails and forgets, in one thread: every run repeats from its seed.
#![expect(
    clippy::unwrap_used,
    reason = "a test fails where something unexpected happens"
)]

mod alarms;
mod crashes;
mod differential;
mod disk;
mod faults;
mod gate;
mod node;
mod schedules;
