//! The real binary and the crate against embedded servers, over sockets.

mod calm_fleet;
mod consume;
mod demo;
mod errors;
mod failure;
mod fleet;
mod fronts;
mod generate;
mod local;
mod produce;
mod sequence_monitor;
mod simulated_worker;
mod simulation;
mod status;
mod streams;
mod support;
mod watchdog;
mod worker;
