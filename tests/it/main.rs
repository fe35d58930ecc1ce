//! The real binary and the crate against embedded servers, over sockets.

mod calm_fleet;
mod consume;
mod crash_points;
mod demo;
mod errors;
mod exactly_once;
mod failure;
mod fleet;
mod fronts;
mod generate;
mod hand_over;
mod lease_faults;
mod local;
mod produce;
mod proxy;
mod read_faults;
mod redrive;
mod sequence_monitor;
mod simulated_worker;
mod simulation;
mod state;
mod status;
mod streams;
mod support;
mod watchdog;
mod worker;
