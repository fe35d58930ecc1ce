//! Tells systemd that the process is ready, alive, and stopping.
//!
//! The protocol is a datagram to the socket that `NOTIFY_SOCKET` names (sd_notify(3)); without that variable
//! nothing is told. A process that is alive and waits, for AWS say, is not to be killed by the watchdog, so
//! that is told by the runtime, whatever the worker does.

use std::{
    pin::Pin,
    sync::{Arc, OnceLock},
    time::Duration,
};

use sd_notify::NotifyState;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{
    ObservedWorker, WorkerLook,
    readiness::{self, Reason},
};
use crate::produce::ProducerMonitor;

/// How often it is looked at whether the process is ready.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// However short the watchdog's limit is.
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);
/// What is told of it fits into a line.
const LONGEST: usize = 200;

/// What was told.
#[derive(Debug, Default)]
struct Told {
    ready: bool,
    stopping: bool,
    status: String,
}

/// What is to be told.
#[derive(Debug, PartialEq, Eq)]
enum Notice {
    Ready,
    Stopping,
    Status(String),
}

impl Told {
    /// What there is to tell of a process that is not ready for this reason.
    fn next(&mut self, reason: Option<String>, stopping: bool) -> Vec<Notice> {
        let mut notices = Vec::new();
        if stopping && !self.stopping {
            self.stopping = true;
            notices.push(Notice::Stopping);
        }
        if reason.is_none() && !self.ready {
            self.ready = true;
            notices.push(Notice::Ready);
        }
        let status: String = match reason {
            _ if stopping => "stopping".to_owned(),
            None => "ready".to_owned(),
            // The protocol has a variable a line.
            Some(reason) => reason.replace('\n', " ").chars().take(LONGEST).collect(),
        };
        if status != self.status {
            self.status.clone_from(&status);
            notices.push(Notice::Status(status));
        }
        notices
    }
}

/// Why a process is not ready, as it is found out.
type Reasons = Pin<Box<dyn Future<Output = Vec<Reason>> + Send>>;

/// Tells how workers are doing, also before they run, until the handle is dropped.
pub(crate) fn tell_of_workers(
    workers: Vec<ObservedWorker>,
    stop: CancellationToken,
) -> AbortOnDropHandle<()> {
    let reasons = move || -> Reasons {
        let looks: Vec<WorkerLook> = workers.iter().map(ObservedWorker::look).collect();
        Box::pin(async move { readiness::workers(&looks) })
    };
    tell(reasons, stop)
}

/// Tells how a producer is doing, also before it runs, until the handle is dropped.
pub(crate) fn tell_of_producer(
    monitor: Arc<OnceLock<ProducerMonitor>>,
    stop: CancellationToken,
) -> AbortOnDropHandle<()> {
    let reasons = move || -> Reasons {
        let monitor = monitor.get().cloned();
        Box::pin(async move {
            let stats = match monitor {
                Some(monitor) => monitor.stats().await.ok(),
                None => None,
            };
            readiness::producer(stats.as_ref())
        })
    };
    tell(reasons, stop)
}

/// The first reason, on a line. Of several applications it says which one it is about.
fn first(reasons: Vec<Reason>) -> Option<String> {
    let Reason { application, text, .. } = reasons.into_iter().next()?;
    Some(match application {
        Some(application) => format!("{application}: {text}"),
        None => text,
    })
}

fn tell(
    reasons: impl Fn() -> Reasons + Send + 'static,
    stop: CancellationToken,
) -> AbortOnDropHandle<()> {
    let watchdog = sd_notify::watchdog_enabled();
    let pause = watchdog.map_or(LOOK_INTERVAL, |limit| LOOK_INTERVAL.min(limit / 3));
    let pause = pause.max(SHORTEST_PAUSE);
    AbortOnDropHandle::new(tokio::spawn(async move {
        if std::env::var_os("NOTIFY_SOCKET").is_none() {
            return;
        }
        let mut told = Told::default();
        let mut ticks = interval(pause);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = stop.cancelled(), if !told.stopping => {}
            }
            let reason = tokio::select! {
                biased;
                // At once: the process may end any moment.
                () = stop.cancelled() => Some("stopping".to_owned()),
                // Whatever does not answer, the process is alive.
                reasons = timeout(pause, reasons()) => match reasons {
                    Ok(reasons) => first(reasons),
                    Err(_) => Some("how it is doing is not known: no answer to that".to_owned()),
                },
            };
            for notice in told.next(reason, stop.is_cancelled()) {
                send(match &notice {
                    Notice::Ready => NotifyState::Ready,
                    Notice::Stopping => NotifyState::Stopping,
                    Notice::Status(text) => NotifyState::Status(text),
                });
            }
            if watchdog.is_some() {
                send(NotifyState::Watchdog);
            }
        }
    }))
}

fn send(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::debug!("systemd was not told: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_and_stopping_are_told_once_and_the_status_when_it_changes() {
        let status = |text: &str| Notice::Status(text.to_owned());
        let mut told = Told::default();
        let starting = || Some("the lease table\nis looked up".to_owned());
        assert_eq!(told.next(starting(), false), [status("the lease table is looked up")]);
        assert_eq!(told.next(starting(), false), []);
        assert_eq!(told.next(None, false), [Notice::Ready, status("ready")]);
        // Not ready any more: it is told, and it is no new start.
        assert_eq!(told.next(Some("AWS is away".into()), false), [status("AWS is away")]);
        assert_eq!(told.next(None, false), [status("ready")]);
        assert_eq!(told.next(None, true), [Notice::Stopping, status("stopping")]);
        assert_eq!(told.next(None, true), []);
    }
}
