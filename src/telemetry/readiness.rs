//! Whether a process does what it is there for, and if not, why.

use std::time::Duration;

use serde::Serialize;

use super::WorkerLook;
use crate::{
    lease::plan::LONE_LOOK_INTERVAL,
    produce::ProducerStats,
    worker::{ShardStatus, WorkerStatus},
};

/// Why a process is not ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Reason {
    /// A word to match on.
    pub reason: &'static str,
    /// The application that it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub application: Option<String>,
    /// The shard that it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shard: Option<String>,
    /// The same for people.
    pub text: String,
}

/// Why the workers of a process are not all ready: nothing, if they are.
pub(super) fn workers(looks: &[WorkerLook]) -> Vec<Reason> {
    let of_one = |look: &WorkerLook| {
        let application = Some(look.application.clone());
        let reasons = worker(look.status.as_ref()).into_iter();
        reasons.map(move |reason| Reason { application: application.clone(), ..reason })
    };
    looks.iter().flat_map(of_one).collect()
}

/// Why a worker is not ready: nothing, if it is.
///
/// A worker without a lease is ready when it has looked for some for two lease durations, since it started
/// or lost those that it had: others hold them, and it stands by.
fn worker(status: Option<&WorkerStatus>) -> Vec<Reason> {
    let reason = |reason, text| Reason { reason, application: None, shard: None, text };
    let Some(status) = status else {
        let text = "the stream, the lease table and what else is needed are looked up".to_owned();
        return vec![reason("starting", text)];
    };
    let mut reasons = Vec::new();
    if status.stopping {
        reasons.push(reason("stopping", "the worker stops".to_owned()));
    }
    let error = |fallback: &str| status.look_error.clone().unwrap_or_else(|| fallback.to_owned());
    match status.looked {
        None => {
            let text = error("the worker has not looked for leases yet");
            reasons.push(reason("starting", text));
        }
        Some(ago) if ago > LONE_LOOK_INTERVAL + status.lease_duration => {
            let text = format!(
                "no look for leases worked for {}: {}",
                seconds(ago),
                error("DynamoDB does not answer")
            );
            reasons.push(reason("leases-unknown", text));
        }
        // It may have lost its leases by the same outage, and cannot stand by for those of others.
        Some(_) if status.shards.is_empty() && status.look_error.is_some() => {
            let text =
                format!("the worker holds no lease, and its last look failed: {}", error(""));
            reasons.push(reason("leases-unknown", text));
        }
        Some(_) if status.shards.is_empty() => {
            let recent = |since: Duration| since < 2 * status.lease_duration;
            if recent(status.uptime) {
                reasons.push(reason("no-lease", "the worker holds no lease yet".to_owned()));
            } else if status.last_lost.is_some_and(recent) {
                let text = "the worker lost its leases and has none again yet";
                reasons.push(reason("no-lease", text.to_owned()));
            }
        }
        Some(_) => {}
    }
    reasons.extend(status.shards.iter().filter_map(|shard| of_shard(shard, status)));
    reasons
}

/// Why a producer is not ready: nothing, if what arrives is kept. Kinesis may be away, for that is what the
/// spool is for, until it is full.
pub(super) fn producer(stats: Option<&ProducerStats>) -> Vec<Reason> {
    let reason = |reason, text| Reason { reason, application: None, shard: None, text };
    let Some(stats) = stats else {
        return vec![reason("starting", "the spool is opened".to_owned())];
    };
    let mut reasons = Vec::new();
    if let Some(failure) = &stats.spool_failure {
        let text = format!("the spool takes nothing since {}: {}", failure.since, failure.reason);
        reasons.push(reason("spool-failing", text));
    }
    let (waiting, limit) = (stats.waiting.spooled_bytes, stats.spool_limit_bytes);
    if waiting >= limit {
        let why = stats.put_failure.as_ref().map_or("puts are too slow", |failure| &failure.reason);
        let text = format!(
            "the spool is full ({waiting} of {limit} bytes) and the sockets are not read: {why}"
        );
        reasons.push(reason("spool-full", text));
    }
    reasons
}

fn of_shard(shard: &ShardStatus, status: &WorkerStatus) -> Option<Reason> {
    let error = || shard.error.clone().unwrap_or_default();
    let (reason, text) = if shard.parked {
        ("shard-stopped", format!("stopped because of a failure: {}", error()))
    } else if !shard.bounded && shard.waits > status.watchdog {
        let text =
            format!("no progress for {}, waiting for {}", seconds(shard.waits), shard.waits_for);
        ("shard-stuck", text)
    } else if shard.error.is_some() && !shard.error_is_over {
        ("shard-failing", error())
    } else {
        return None;
    };
    Some(Reason { reason, application: None, shard: Some(shard.shard.to_string()), text })
}

fn seconds(time: Duration) -> String {
    format!("{} s", time.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{produce::stats_of, worker::status_of};

    #[test]
    fn a_producer_is_ready_while_it_keeps_what_arrives() {
        assert_eq!(producer(None)[0].reason, "starting");
        let mut stats = stats_of(2);
        stats.put_failure = Some(crate::produce::Failure::new());
        assert_eq!(producer(Some(&stats)), [], "it is spooled");
        stats.waiting.spooled_bytes = stats.spool_limit_bytes;
        assert_eq!(producer(Some(&stats))[0].reason, "spool-full");
        stats.waiting.spooled_bytes = 0;
        stats.spool_failure = Some(crate::produce::Failure::new());
        assert_eq!(producer(Some(&stats))[0].reason, "spool-failing");
    }

    fn names(status: &WorkerStatus) -> Vec<&'static str> {
        worker(Some(status)).into_iter().map(|reason| reason.reason).collect()
    }

    #[test]
    fn a_process_is_ready_when_each_of_its_workers_is() {
        let look =
            |application: &str, status| WorkerLook { application: application.to_owned(), status };
        let looks = [look("rtr-green", Some(status_of(2))), look("rtr-blue", None)];
        let reasons = workers(&looks);
        let named: Vec<_> = reasons.iter().map(|r| (r.reason, r.application.as_deref())).collect();
        assert_eq!(named, [("starting", Some("rtr-blue"))]);
        assert_eq!(workers(&looks[..1]), []);
    }

    #[test]
    fn a_worker_that_reads_is_ready() {
        assert_eq!(worker(Some(&status_of(2))), []);
    }

    #[test]
    fn a_worker_is_not_ready_before_it_holds_a_lease_but_is_as_a_stand_by() {
        assert_eq!(worker(None)[0].reason, "starting");
        let mut status = status_of(0);
        status.looked = None;
        assert_eq!(names(&status), ["starting"]);
        status.looked = Some(Duration::from_secs(1));
        status.uptime = Duration::from_secs(19);
        assert_eq!(names(&status), ["no-lease"]);
        status.uptime = Duration::from_secs(20);
        assert_eq!(worker(Some(&status)), []);
    }

    #[test]
    fn a_worker_that_lost_its_leases_is_not_ready_before_it_has_some_or_stands_by() {
        let mut status = status_of(0);
        status.last_lost = Some(Duration::from_secs(19));
        assert_eq!(names(&status), ["no-lease"]);
        status.last_lost = Some(Duration::from_secs(20));
        assert_eq!(worker(Some(&status)), []);
        // Others are read.
        let mut status = status_of(1);
        status.last_lost = Some(Duration::ZERO);
        assert_eq!(worker(Some(&status)), []);
    }

    #[test]
    fn a_worker_that_cannot_look_for_leases_says_why() {
        let mut status = status_of(1);
        status.looked = Some(Duration::from_secs(21));
        status.look_error = Some("connection refused".to_owned());
        let reasons = worker(Some(&status));
        assert_eq!(reasons[0].reason, "leases-unknown");
        assert_eq!(reasons[0].text, "no look for leases worked for 21 s: connection refused");
        // A lone worker looks every 10 s, however short a lease is; and one look that failed is no reason
        // while shards are read.
        status.lease_duration = Duration::from_secs(3);
        for error in [None, Some("was throttled".to_owned())] {
            status.looked = Some(Duration::from_secs(12));
            status.look_error = error;
            assert_eq!(worker(Some(&status)), []);
        }
        // Nor does it stand by if it lost them in the same outage.
        status.shards.clear();
        assert_eq!(names(&status), ["leases-unknown"]);
    }

    #[test]
    fn each_shard_that_does_not_get_on_is_named() {
        let mut status = status_of(4);
        status.shards[0].waits = Duration::from_secs(121);
        status.shards[1].parked = true;
        status.shards[1].error = Some("the handler failed".to_owned());
        status.shards[2].error = Some("access denied".to_owned());
        status.shards[3].error = Some("was throttled".to_owned());
        status.shards[3].error_is_over = true;
        let reasons = worker(Some(&status));
        let named: Vec<_> =
            reasons.iter().map(|reason| (reason.reason, reason.shard.as_deref())).collect();
        assert_eq!(
            named,
            [
                ("shard-stuck", Some("shardId-000000000000")),
                ("shard-stopped", Some("shardId-000000000001")),
                ("shard-failing", Some("shardId-000000000002")),
            ]
        );
        // What has a limit of its own is not stuck.
        status.shards.truncate(1);
        status.shards[0].bounded = true;
        assert_eq!(worker(Some(&status)), []);
    }

    #[test]
    fn a_worker_that_stops_takes_nothing_new() {
        let mut status = status_of(1);
        status.stopping = true;
        assert_eq!(names(&status), ["stopping"]);
    }
}
