//! The real binary and the crate against embedded servers, over sockets.

mod consume;
mod demo;
mod errors;
mod fleet;
mod generate;
mod hand_over;
mod lease_faults;
mod local;
mod produce;
mod proxy;
mod read_faults;
mod simulation;
mod status;
mod support;
mod worker;
