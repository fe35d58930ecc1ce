//! What a running process tells those who watch it: whether it is ready, its metrics, a status page.
//!
//! What is told is worked out from snapshots, purely; [`http`] only carries it.

mod history;
mod http;
mod metrics;
mod page;
mod readiness;
mod recent;
mod repeats;
mod systemd;

pub(crate) use http::{LookAtFleet, Served, Subject, bind};
pub(crate) use page::{Fleet, FleetShard};
pub(crate) use recent::{Recent, RecentLayer};
pub(crate) use repeats::RepeatFilter;
pub(crate) use systemd::{tell_of_worker, tell_ready};
