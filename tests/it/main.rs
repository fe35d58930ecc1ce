//! The real binary and the crate against embedded servers, over sockets.

mod calm_fleet;
mod consume;
mod demo;
mod errors;
mod fleet;
mod generate;
mod local;
mod produce;
mod simulated_worker;
mod simulation;
mod status;
mod support;
mod worker;
