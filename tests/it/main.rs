//! The real binary and the crate against embedded servers, over sockets.

// Two examples are modules here, each with the file that all of them share.
#![allow(clippy::duplicate_mod)]

mod archive;
mod calm_fleet;
mod check;
mod consume;
mod costs;
mod crash_points;
mod demo;
mod documentation;
mod errors;
mod exactly_once;
mod examples;
mod failure;
mod feeds;
mod fleet;
mod fronts;
mod generate;
mod hand_over;
mod http;
mod lease_faults;
mod local;
mod logs;
mod markdown;
mod produce;
mod produce_faults;
mod produce_listener;
mod produce_spool;
mod proxy;
mod read_faults;
mod redrive;
mod replay;
mod reset;
mod sequence_monitor;
mod signals;
mod simulated_worker;
mod simulation;
mod state;
mod status;
mod streams;
mod support;
mod terraform;
mod watchdog;
mod worker;
