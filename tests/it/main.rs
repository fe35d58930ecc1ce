//! The real binary and the crate against embedded servers, over sockets.

mod consume;
mod demo;
mod errors;
mod fleet;
mod generate;
mod local;
mod produce;
mod redrive;
mod simulation;
mod status;
mod support;
mod worker;
