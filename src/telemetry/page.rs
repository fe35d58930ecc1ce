//! What the status page shows, as JSON: the page itself is a file that asks for it.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use jiff::Timestamp;
use serde::Serialize;

use super::{
    WorkerLook,
    history::{History, Sample},
    readiness::Reason,
    recent::Entry,
};
use crate::{
    lease::overview::{ShardOverview, State},
    produce::ProducerStats,
    worker::{LeaseMoves, ShardStatus, WorkerStatus},
};

/// The shards of the application, whoever reads them, or why they are not known.
pub(crate) type Fleet = Result<Vec<FleetShard>, String>;

/// A shard by the lease table.
#[derive(Debug, Clone)]
pub(crate) struct FleetShard {
    /// The stream's name.
    pub stream: String,
    /// What the table tells.
    pub shard: ShardOverview,
}

#[derive(Debug, Serialize)]
pub(super) struct Page {
    at: Timestamp,
    version: &'static str,
    /// What runs, such as `consume`.
    command: &'static str,
    /// What it was told to work on, in a few words.
    title: String,
    ready: bool,
    reasons: Vec<Reason>,
    resident_bytes: Option<u64>,
    /// Those that run, one for each application.
    #[serde(skip_serializing_if = "Option::is_none")]
    workers: Option<Vec<WorkerPage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    producer: Option<ProducerPage>,
    shards: Vec<ShardRow>,
    /// Shards that are read to their end, which are not among `shards`.
    finished_shards: usize,
    /// The latest warnings and errors, the newest first.
    errors: Vec<Entry>,
}

#[derive(Debug, Serialize)]
struct WorkerPage {
    application: String,
    name: String,
    /// Why it is not known what other workers of the application read.
    fleet_error: Option<String>,
    uptime_ms: u64,
    stopping: bool,
    looked_ms_ago: Option<u64>,
    records: u64,
    messages: u64,
    failed_attempts: u64,
    dead_letters: u64,
    undecodable: u64,
    skipped: u64,
    stuck: u64,
    lease_moves: Moves,
}

#[derive(Debug, Serialize)]
struct Moves {
    taken: u64,
    handed_over: u64,
    lost: u64,
    released: u64,
    finished: u64,
}

impl From<LeaseMoves> for Moves {
    fn from(moves: LeaseMoves) -> Self {
        let LeaseMoves { taken, handed_over, lost, released, finished } = moves;
        Self { taken, handed_over, lost, released, finished }
    }
}

/// A shard, whoever reads it.
#[derive(Debug, Serialize)]
struct ShardRow {
    application: String,
    stream: String,
    shard: String,
    owner: Option<String>,
    /// During a hand-over.
    next_owner: Option<String>,
    state: State,
    checkpoint: Option<String>,
    error: Option<String>,
    error_at: Option<Timestamp>,
    error_is_over: bool,
    /// What only its reader knows; missing if that is another worker.
    #[serde(flatten)]
    here: Option<Here>,
}

#[derive(Debug, Serialize)]
struct Here {
    lag_ms: Option<u64>,
    checkpoint_age_ms: u64,
    waits_for: String,
    waits_ms: u64,
    records: u64,
    messages: u64,
    bytes: u64,
    handler_p50_ms: f64,
    handler_p99_ms: f64,
    failed_attempts: u64,
    dead_letters: u64,
    /// Every 10 s, the oldest first.
    history: Vec<Sample>,
}

pub(super) struct Parts<'a> {
    pub at: Timestamp,
    pub command: &'static str,
    pub title: String,
    pub reasons: Vec<Reason>,
    pub resident_bytes: Option<u64>,
    /// With what the lease table of each tells.
    pub workers: Vec<(WorkerLook, Option<Fleet>)>,
    pub producer: Option<ProducerStats>,
    pub history: &'a History,
    pub errors: Vec<Entry>,
}

impl Page {
    pub(super) fn new(parts: Parts<'_>) -> Self {
        let Parts { at, command, title, reasons, resident_bytes, history, errors, .. } = parts;
        let is_consumer = !parts.workers.is_empty();
        let (mut workers, mut all) = (Vec::new(), Vec::new());
        for (WorkerLook { application, status }, fleet) in parts.workers {
            let Some(status) = status else { continue };
            let (fleet, fleet_error) = match fleet {
                None => (Vec::new(), None),
                Some(Ok(fleet)) => (fleet, None),
                Some(Err(error)) => (Vec::new(), Some(error)),
            };
            all.extend(rows(&application, &status, fleet, history));
            workers.push(WorkerPage::new(application, status, fleet_error));
        }
        let (shards, finished): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|row| row.state != State::Finished);
        Self {
            at,
            version: env!("CARGO_PKG_VERSION"),
            command,
            title,
            ready: reasons.is_empty(),
            reasons,
            resident_bytes,
            workers: is_consumer.then_some(workers),
            producer: parts.producer.map(|producer| ProducerPage::new(&producer, at)),
            shards,
            finished_shards: finished.len(),
            errors,
        }
    }
}

impl WorkerPage {
    fn new(application: String, status: WorkerStatus, fleet_error: Option<String>) -> Self {
        Self {
            application,
            name: status.worker,
            fleet_error,
            uptime_ms: millis(status.uptime),
            stopping: status.stopping,
            looked_ms_ago: status.looked.map(millis),
            records: status.counts.records,
            messages: status.counts.messages,
            failed_attempts: status.counts.failed_attempts,
            dead_letters: status.counts.dead_letters,
            undecodable: status.counts.undecodable,
            skipped: status.counts.skipped,
            stuck: status.counts.stuck,
            lease_moves: status.leases.into(),
        }
    }
}

#[derive(Debug, Serialize)]
struct ProducerPage {
    connections: u64,
    refused_connections: u64,
    messages: u64,
    put: u64,
    records: u64,
    dead_letters: u64,
    missing: u64,
    retries: u64,
    spool_messages: u64,
    spool_bytes: u64,
    spool_age_ms: u64,
    put_error: Option<String>,
    lanes: Vec<LaneRow>,
}

#[derive(Debug, Serialize)]
struct LaneRow {
    lane: String,
    source_ip: Option<IpAddr>,
    messages: u64,
    records: u64,
    waiting: u64,
    age_ms: u64,
    put_p50_ms: f64,
    put_p99_ms: f64,
}

impl ProducerPage {
    fn new(stats: &ProducerStats, at: Timestamp) -> Self {
        let age = |oldest: Option<Timestamp>| {
            let age = oldest.and_then(|oldest| Duration::try_from(at.duration_since(oldest)).ok());
            millis(age.unwrap_or_default())
        };
        let lanes = stats.lanes.iter().map(|lane| {
            let put_ms =
                |quantile| lane.puts.latency_micros.value_at_quantile(quantile) as f64 / 1e3;
            LaneRow {
                lane: lane.partition_key.clone(),
                source_ip: lane.source_ip,
                messages: lane.puts.messages,
                records: lane.puts.records,
                waiting: lane.waiting.messages,
                age_ms: age(lane.waiting.oldest),
                put_p50_ms: put_ms(0.5),
                put_p99_ms: put_ms(0.99),
            }
        });
        Self {
            connections: stats.report.connections,
            refused_connections: stats.report.refused_connections,
            messages: stats.report.messages,
            put: stats.report.put,
            records: stats.report.records,
            dead_letters: stats.report.dead_letters,
            missing: stats.report.missing,
            retries: stats.puts.retries.values().sum(),
            spool_messages: stats.waiting.messages,
            spool_bytes: stats.waiting.spooled_bytes,
            spool_age_ms: age(stats.waiting.oldest),
            put_error: stats.put_failure.as_ref().map(|failure| failure.reason.clone()),
            lanes: lanes.collect(),
        }
    }
}

/// The shards of the table, and those that are read here: this worker knows its own better.
fn rows(
    application: &str,
    worker: &WorkerStatus,
    fleet: Vec<FleetShard>,
    history: &History,
) -> Vec<ShardRow> {
    let mut rows = BTreeMap::new();
    for FleetShard { stream, shard } in fleet {
        let row = ShardRow {
            application: application.to_owned(),
            stream,
            shard: shard.shard.name().to_owned(),
            owner: shard.owner,
            next_owner: shard.next_owner,
            state: shard.state,
            checkpoint: shard.checkpoint,
            error: shard.last_error,
            error_at: shard.last_error_at,
            error_is_over: shard.last_error_is_over.unwrap_or(false),
            here: None,
        };
        rows.insert(shard.shard, row);
    }
    for shard in &worker.shards {
        let row = rows.entry(shard.shard.clone()).or_insert_with(|| ShardRow {
            application: application.to_owned(),
            stream: shard.stream.clone(),
            shard: shard.shard.name().to_owned(),
            owner: None,
            next_owner: None,
            state: State::Reading,
            checkpoint: None,
            error: None,
            error_at: None,
            error_is_over: false,
            here: None,
        });
        row.owner = Some(worker.worker.clone());
        if row.state != State::HandingOver {
            row.state = State::Reading;
        }
        row.checkpoint = Some(shard.checkpoint.clone());
        (row.error, row.error_at) = (shard.error.clone(), shard.error_at);
        row.error_is_over = shard.error_is_over;
        row.here = Some(Here::new(application, shard, history));
    }
    rows.into_values().collect()
}

impl Here {
    fn new(application: &str, shard: &ShardStatus, history: &History) -> Self {
        Self {
            lag_ms: shard.behind.map(millis),
            checkpoint_age_ms: millis(shard.checkpoint_age),
            waits_for: shard.waits_for.clone(),
            waits_ms: millis(shard.waits),
            records: shard.counts.records,
            messages: shard.counts.messages,
            bytes: shard.bytes,
            handler_p50_ms: shard.handler.p50.as_secs_f64() * 1000.0,
            handler_p99_ms: shard.handler.p99.as_secs_f64() * 1000.0,
            failed_attempts: shard.counts.failed_attempts,
            dead_letters: shard.counts.dead_letters,
            history: history.of(application, &shard.shard),
        }
    }
}

pub(super) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;
    use crate::{
        checkpoint::Checkpoint,
        lease::{Lease, overview, plan::Observations},
        shard::Shard,
        worker::status_of,
    };

    /// Shards 0 to 2; another worker reads 1 and 2 is finished.
    fn fleet() -> Vec<FleetShard> {
        let shards: Vec<Shard> = (0..3)
            .map(|n| Shard {
                id: format!("shardId-{n:012}").as_str().into(),
                parents: vec![],
                hash_key_range: None,
                closed: false,
                begins: None,
            })
            .collect();
        let mut leases: Vec<Lease> =
            shards.iter().map(|s| Lease::new(s, Checkpoint::TrimHorizon, None)).collect();
        leases[0].owner = Some("w".to_owned());
        leases[1].owner = Some("other".to_owned());
        leases[2].checkpoint = Checkpoint::ShardEnd;
        let (observed, now) = (Observations::default(), Instant::now());
        overview::shards(&shards, &leases, &observed, Duration::from_secs(5), now)
            .into_iter()
            .map(|shard| FleetShard { stream: "s".to_owned(), shard })
            .collect()
    }

    /// Of two applications that read the same shards; the second has not begun to run.
    fn page(fleet: Fleet) -> serde_json::Value {
        let look =
            |application: &str, status| WorkerLook { application: application.to_owned(), status };
        let page = Page::new(Parts {
            at: Timestamp::UNIX_EPOCH,
            command: "consume",
            title: "s, a".to_owned(),
            reasons: Vec::new(),
            resident_bytes: None,
            workers: vec![
                (look("rtr-green", Some(status_of(1))), Some(fleet)),
                (look("rtr-blue", None), None),
            ],
            producer: None,
            history: &History::default(),
            errors: Vec::new(),
        });
        serde_json::to_value(page).expect("JSON")
    }

    #[test]
    fn shards_of_this_worker_and_of_others_are_shown_together() {
        let page = page(Ok(fleet()));
        assert_eq!(page["finished_shards"], 1);
        let shards = page["shards"].as_array().expect("shards");
        assert_eq!(shards.len(), 2);
        assert_eq!((&shards[0]["owner"], &shards[0]["lag_ms"]), (&"w".into(), &1500.into()));
        assert_eq!(shards[0]["state"], "reading");
        assert_eq!(shards[0]["application"], "rtr-green");
        assert_eq!((&shards[1]["owner"], shards[1].get("lag_ms")), (&"other".into(), None));
        assert_eq!(shards[1]["state"], "held");
    }

    #[test]
    fn a_table_that_cannot_be_read_leaves_what_is_known_here() {
        let page = page(Err("no table".to_owned()));
        assert_eq!(page["workers"][0]["fleet_error"], "no table");
        assert_eq!(page["shards"].as_array().map(Vec::len), Some(1));
    }
}
