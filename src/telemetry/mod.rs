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

use std::sync::{Arc, OnceLock};

pub(crate) use http::{LookAtFleet, Served, Subject, WorkerSubject, bind};
pub(crate) use page::{Fleet, FleetShard};
pub(crate) use recent::{Recent, RecentLayer};
pub(crate) use repeats::RepeatFilter;
pub(crate) use systemd::{tell_of_producer, tell_of_workers};

use crate::worker::{Observer, WorkerStatus};

/// The worker of an application; set when it runs.
#[derive(Clone)]
pub(crate) struct ObservedWorker {
    pub application: String,
    pub observer: Arc<OnceLock<Observer>>,
}

impl ObservedWorker {
    fn look(&self) -> WorkerLook {
        let status = self.observer.get().map(Observer::status);
        WorkerLook { application: self.application.clone(), status }
    }
}

/// How the worker of an application is doing; `None` before it runs.
#[derive(Debug)]
struct WorkerLook {
    application: String,
    status: Option<WorkerStatus>,
}
