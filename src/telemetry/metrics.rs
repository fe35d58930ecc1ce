//! The metrics, in the text format of OpenMetrics 1.0.

use std::fmt;

use hdrhistogram::Histogram;
use jiff::Timestamp;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, MetricEncoder, text},
    metrics::{MetricType, exemplar::Exemplar},
    registry::{Registry, Unit},
};

use super::WorkerLook;
use crate::{
    latency::LatencySummary,
    produce::{Failure, LaneStats, ProducerStats, SourceStats},
    worker::{LeaseMoves, ShardStatus, WorkerStatus},
};

/// What the text is, for `Content-Type`.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What is told in one answer.
#[derive(Debug)]
pub(super) struct Snapshot {
    pub ready: bool,
    pub resident_bytes: Option<u64>,
    pub workers: Vec<WorkerLook>,
    pub producer: Option<ProducerStats>,
    /// When that was.
    pub at: Timestamp,
}

impl Snapshot {
    /// The text of the answer.
    pub(super) fn text(self) -> Result<String, fmt::Error> {
        let mut registry = Registry::with_prefix("tramline");
        registry.register_collector(Box::new(self));
        let mut text = String::new();
        text::encode(&mut text, &registry)?;
        Ok(text)
    }
}

#[derive(Clone, Copy)]
enum Kind {
    /// Only grows.
    Counter,
    Gauge,
}

/// What a value is in; the name ends with it.
#[derive(Clone, Copy)]
enum In {
    /// A number, or what the name says.
    Plain,
    Seconds,
    Bytes,
}

/// Metrics of one name: what each `T` is counted or measured as.
struct Family<T: 'static> {
    name: &'static str,
    help: &'static str,
    kind: Kind,
    unit: In,
    value: fn(&T, Timestamp) -> Option<f64>,
}

const fn counter<T>(
    name: &'static str,
    help: &'static str,
    value: fn(&T, Timestamp) -> Option<f64>,
) -> Family<T> {
    Family { name, help, kind: Kind::Counter, unit: In::Plain, value }
}

const fn gauge<T>(
    name: &'static str,
    help: &'static str,
    value: fn(&T, Timestamp) -> Option<f64>,
) -> Family<T> {
    Family { name, help, kind: Kind::Gauge, unit: In::Plain, value }
}

impl<T> Family<T> {
    const fn seconds(mut self) -> Self {
        self.unit = In::Seconds;
        self
    }

    const fn bytes(mut self) -> Self {
        self.unit = In::Bytes;
        self
    }

    /// Writes one sample for each of `all`, with its labels.
    fn encode<'a, L: EncodeLabelSet>(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        all: impl IntoIterator<Item = (L, &'a T)>,
        now: Timestamp,
    ) -> fmt::Result {
        let metric_type = match self.kind {
            Kind::Counter => MetricType::Counter,
            Kind::Gauge => MetricType::Gauge,
        };
        let unit = match self.unit {
            In::Plain => None,
            In::Seconds => Some(Unit::Seconds),
            In::Bytes => Some(Unit::Bytes),
        };
        let mut metric =
            encoder.encode_descriptor(self.name, self.help, unit.as_ref(), metric_type)?;
        for (labels, of) in all {
            if let Some(value) = (self.value)(of, now) {
                sample(self.kind, metric.encode_family(&labels)?, value)?;
            }
        }
        Ok(())
    }
}

fn sample(kind: Kind, mut encoder: MetricEncoder<'_>, value: f64) -> fmt::Result {
    match kind {
        Kind::Counter => encoder.encode_counter(&value, None::<&Exemplar<NoLabels, f64>>),
        Kind::Gauge => encoder.encode_gauge(&value),
    }
}

type NoLabels = [(&'static str, &'static str); 0];

const PROCESS: &[Family<Snapshot>] = &[
    gauge("ready", "1 if /readyz says so, else 0", |of: &Snapshot, _| {
        Some(f64::from(u8::from(of.ready)))
    }),
    gauge("resident_memory", "Memory of the process that is resident", |of: &Snapshot, _| {
        of.resident_bytes.map(|bytes| bytes as f64)
    })
    .bytes(),
];

const WORKER: &[Family<WorkerStatus>] = &[
    gauge("uptime", "How long the worker runs", |of: &WorkerStatus, _| {
        Some(of.uptime.as_secs_f64())
    })
    .seconds(),
    gauge("leases_held", "Shards that the worker reads", |of: &WorkerStatus, _| {
        Some(of.shards.len() as f64)
    }),
    gauge(
        "lease_look_age",
        "Time since the last look for leases that worked",
        |of: &WorkerStatus, _| of.looked.map(|ago| ago.as_secs_f64()),
    )
    .seconds(),
];

/// A value of a label, and what is counted or measured with it.
type Labelled<T, V> = (&'static str, fn(&T) -> V);

const MOVES: &[Labelled<LeaseMoves, u64>] = &[
    ("taken", |moves| moves.taken),
    ("handed-over", |moves| moves.handed_over),
    ("lost", |moves| moves.lost),
    ("released", |moves| moves.released),
    ("finished", |moves| moves.finished),
];

const SHARD: &[Family<ShardStatus>] = &[
    gauge(
        "shard_lag_milliseconds",
        "How far reading is behind the stream's tip",
        |of: &ShardStatus, _| of.behind.map(|behind| behind.as_millis() as f64),
    ),
    counter("shard_records", "Records that were read", |of: &ShardStatus, _| {
        Some(of.counts.records as f64)
    }),
    counter("shard_read", "Bytes of the records that were read", |of: &ShardStatus, _| {
        Some(of.bytes as f64)
    })
    .bytes(),
    counter("shard_messages", "Messages that the handler finished", |of: &ShardStatus, _| {
        Some(of.counts.messages as f64)
    }),
    counter(
        "shard_undecodable",
        "Parts of records that could not be decoded",
        |of: &ShardStatus, _| Some(of.counts.undecodable as f64),
    ),
    counter(
        "shard_misplaced",
        "KPL aggregates with user records of another shard",
        |of: &ShardStatus, _| Some(of.counts.misplaced as f64),
    ),
    counter(
        "shard_failed_attempts",
        "Calls of the handler that failed or took too long",
        |of: &ShardStatus, _| Some(of.counts.failed_attempts as f64),
    ),
    counter("shard_dead_letters", "Dead letters that were stored", |of: &ShardStatus, _| {
        Some(of.counts.dead_letters as f64)
    }),
    counter(
        "shard_skipped",
        "Messages that were skipped because the handler failed",
        |of: &ShardStatus, _| Some(of.counts.skipped as f64),
    ),
    counter("shard_stuck", "How often the watchdog found no progress", |of: &ShardStatus, _| {
        Some(of.counts.stuck as f64)
    }),
    gauge(
        "shard_stopped",
        "1 if the shard stopped because of a failure, else 0",
        |of: &ShardStatus, _| Some(f64::from(u8::from(of.parked))),
    ),
    gauge("shard_waiting", "How long the shard waits for the same thing", |of: &ShardStatus, _| {
        Some(of.waits.as_secs_f64())
    })
    .seconds(),
    gauge(
        "shard_checkpoint_age",
        "How long something is finished that is not stored",
        |of: &ShardStatus, _| Some(of.checkpoint_age.as_secs_f64()),
    )
    .seconds(),
    counter("handler_calls", "Calls of the handler", |of: &ShardStatus, _| {
        Some(of.handler.count as f64)
    }),
    counter("handler_duration", "Time in calls of the handler", |of: &ShardStatus, _| {
        Some(of.handler.total.as_secs_f64())
    })
    .seconds(),
];

const QUANTILES: &[Labelled<LatencySummary, f64>] = &[
    ("0.5", |of| of.p50.as_secs_f64()),
    ("0.9", |of| of.p90.as_secs_f64()),
    ("0.99", |of| of.p99.as_secs_f64()),
    ("1", |of| of.max.as_secs_f64()),
];

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let encoder = &mut encoder;
        let info = [("version", env!("CARGO_PKG_VERSION"))];
        gauge::<()>("build_info", "1, and which version runs", |(), _| Some(1.0)).encode(
            encoder,
            [(info, &())],
            self.at,
        )?;
        let none: NoLabels = [];
        for family in PROCESS {
            family.encode(encoder, [(none, self)], self.at)?;
        }
        encode_workers(&self.workers, self.at, encoder)?;
        if let Some(producer) = &self.producer {
            encode_producer(producer, self.at, encoder)?;
        }
        Ok(())
    }
}

fn encode_workers(
    workers: &[WorkerLook],
    now: Timestamp,
    encoder: &mut DescriptorEncoder<'_>,
) -> fmt::Result {
    let running: Vec<(&str, &WorkerStatus)> = workers
        .iter()
        .filter_map(|look| Some((look.application.as_str(), look.status.as_ref()?)))
        .collect();
    if running.is_empty() {
        return Ok(());
    }
    for family in WORKER {
        let all =
            running.iter().map(|(application, worker)| ([("application", *application)], *worker));
        family.encode(encoder, all, now)?;
    }
    let help = "Leases that came to the worker and went from it";
    let mut moves = encoder.encode_descriptor("lease_moves", help, None, MetricType::Counter)?;
    for (application, worker) in &running {
        for (kind, count) in MOVES {
            let labels = [("application", *application), ("kind", *kind)];
            sample(Kind::Counter, moves.encode_family(&labels)?, count(&worker.leases) as f64)?;
        }
    }
    let shards = running.iter().flat_map(|(application, worker)| {
        worker.shards.iter().map(|shard| {
            let labels = [
                ("application", *application),
                ("stream", shard.stream.as_str()),
                ("shard", shard.shard.name()),
            ];
            (labels, shard)
        })
    });
    for family in SHARD {
        family.encode(encoder, shards.clone(), now)?;
    }
    let help = "How long a call of the handler took in the last minutes, by quantile";
    let unit = Some(&Unit::Seconds);
    let name = "handler_duration_quantile";
    let mut quantiles = encoder.encode_descriptor(name, help, unit, MetricType::Gauge)?;
    for (labels, shard) in shards.filter(|(_, shard)| shard.handler.count > 0) {
        let [application, stream, name] = labels;
        for (quantile, value) in QUANTILES {
            let labels = [application, stream, name, ("quantile", *quantile)];
            sample(Kind::Gauge, quantiles.encode_family(&labels)?, value(&shard.handler))?;
        }
    }
    Ok(())
}

fn age(since: Option<Timestamp>, now: Timestamp) -> f64 {
    since.map_or(0.0, |since| now.duration_since(since).as_secs_f64().max(0.0))
}

fn failing(failure: &Option<Failure>, now: Timestamp) -> f64 {
    age(failure.as_ref().map(|failure| failure.since), now)
}

const PRODUCER: &[Family<ProducerStats>] = &[
    counter("produce_connections", "OCS connections accepted", |of: &ProducerStats, _| {
        Some(of.report.connections as f64)
    }),
    counter(
        "produce_refused_connections",
        "Connections refused: not allowed, too many, or no TLS",
        |of: &ProducerStats, _| Some(of.report.refused_connections as f64),
    ),
    counter("produce_messages", "Messages received", |of: &ProducerStats, _| {
        Some(of.report.messages as f64)
    }),
    counter(
        "produce_left_messages",
        "Messages that an earlier process left in the spool",
        |of: &ProducerStats, _| Some(of.report.left as f64),
    ),
    counter("produce_put_messages", "Messages that Kinesis has", |of: &ProducerStats, _| {
        Some(of.report.put as f64)
    }),
    counter("produce_records", "Records that Kinesis has", |of: &ProducerStats, _| {
        Some(of.report.records as f64)
    }),
    counter("produce_put", "Bytes of those records", |of: &ProducerStats, _| {
        Some(of.report.bytes as f64)
    })
    .bytes(),
    counter("produce_commits", "Writes to the spool", |of: &ProducerStats, _| {
        Some(of.report.commits as f64)
    }),
    counter("produce_heartbeats", "Heartbeats received", |of: &ProducerStats, _| {
        Some(of.report.heartbeats as f64)
    }),
    counter(
        "produce_dead_letters",
        "Oversized and unfinished messages, written to stderr",
        |of: &ProducerStats, _| Some(of.report.dead_letters as f64),
    ),
    gauge("spool_messages", "Messages that Kinesis does not have yet", |of: &ProducerStats, _| {
        Some(of.waiting.messages as f64)
    }),
    gauge("spool_used", "What these take in the spool", |of: &ProducerStats, _| {
        Some(of.waiting.spooled_bytes as f64)
    })
    .bytes(),
    gauge(
        "spool_limit",
        "How much may wait before the sockets are not read",
        |of: &ProducerStats, _| Some(of.spool_limit_bytes as f64),
    )
    .bytes(),
    gauge("spool_age", "How long the oldest of them waits", |of: &ProducerStats, now| {
        Some(age(of.waiting.oldest, now))
    })
    .seconds(),
    gauge(
        "spool_failing",
        "How long the spool takes nothing; 0 if it does",
        |of: &ProducerStats, now| Some(failing(&of.spool_failure, now)),
    )
    .seconds(),
    gauge(
        "put_failing",
        "How long records are not stored; 0 if they are",
        |of: &ProducerStats, now| Some(failing(&of.put_failure, now)),
    )
    .seconds(),
];

const LANE: &[Family<LaneStats>] = &[
    counter("lane_messages", "Messages that Kinesis has", |of: &LaneStats, _| {
        Some(of.puts.messages as f64)
    }),
    counter("lane_records", "Records that Kinesis has", |of: &LaneStats, _| {
        Some(of.puts.records as f64)
    }),
    counter("lane_put", "Bytes of those records", |of: &LaneStats, _| Some(of.puts.bytes as f64))
        .bytes(),
    gauge(
        "lane_waiting_messages",
        "Messages that Kinesis does not have yet",
        |of: &LaneStats, _| Some(of.waiting.messages as f64),
    ),
    gauge("lane_age", "How long the oldest of them waits", |of: &LaneStats, now| {
        Some(age(of.waiting.oldest, now))
    })
    .seconds(),
];

const SOURCE: &[Family<SourceStats>] = &[
    counter("source_messages", "Messages with an OCS sequence number", |of: &SourceStats, _| {
        Some(of.messages as f64)
    }),
    counter(
        "source_gaps",
        "How often OCS sequence numbers were left out",
        |of: &SourceStats, _| Some(of.gaps as f64),
    ),
    counter("source_missing", "How many numbers that was", |of: &SourceStats, _| {
        Some(of.missing as f64)
    }),
    counter("source_repeats", "Numbers that were there before", |of: &SourceStats, _| {
        Some(of.repeats as f64)
    }),
];

fn encode_producer(
    stats: &ProducerStats,
    now: Timestamp,
    encoder: &mut DescriptorEncoder<'_>,
) -> fmt::Result {
    let none: NoLabels = [];
    for family in PRODUCER {
        family.encode(encoder, [(none, stats)], now)?;
    }
    let help = "Records that were put again, and why";
    let mut retries = encoder.encode_descriptor("put_retries", help, None, MetricType::Counter)?;
    for (reason, count) in &stats.puts.retries {
        let labels = [("reason", reason.as_str())];
        sample(Kind::Counter, retries.encode_family(&labels)?, *count as f64)?;
    }
    for (name, help, micros) in [
        (
            "put_duration_quantile",
            "From sending a record to the answer",
            &stats.puts.latency_micros,
        ),
        ("put_age_quantile", "From receiving a record's oldest message", &stats.puts.age_micros),
    ] {
        let unit = Some(&Unit::Seconds);
        let mut quantiles = encoder.encode_descriptor(name, help, unit, MetricType::Gauge)?;
        for quantile in ["0.5", "0.9", "0.99", "1"] {
            let labels = [("quantile", quantile)];
            sample(Kind::Gauge, quantiles.encode_family(&labels)?, seconds(micros, quantile))?;
        }
    }
    let labels = |lane: &LaneStats| [("lane", lane.partition_key.clone())];
    for family in LANE {
        family.encode(encoder, stats.lanes.iter().map(|lane| (labels(lane), lane)), now)?;
    }
    for family in SOURCE {
        let labels = |source: &SourceStats| [("source", source.source.clone())];
        family.encode(encoder, stats.sources.iter().map(|source| (labels(source), source)), now)?;
    }
    Ok(())
}

fn seconds(micros: &Histogram<u32>, quantile: &str) -> f64 {
    let quantile = quantile.parse().unwrap_or(1.0);
    micros.value_at_quantile(quantile) as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{produce::stats_of, worker::status_of};

    fn everything() -> String {
        let worker = |application: &str, shards| WorkerLook {
            application: application.to_owned(),
            status: Some(status_of(shards)),
        };
        let snapshot = Snapshot {
            ready: true,
            resident_bytes: Some(1024),
            workers: vec![worker("rtr-green", 2), worker("rtr-blue", 1)],
            producer: Some(stats_of(2)),
            at: Timestamp::UNIX_EPOCH,
        };
        snapshot.text().expect("a text")
    }

    #[test]
    fn each_sample_has_its_name_labels_and_value() {
        let text = everything();
        for line in [
            "# TYPE tramline_ready gauge",
            "tramline_ready 1.0",
            "tramline_resident_memory_bytes 1024.0",
            "tramline_leases_held{application=\"rtr-green\"} 2.0",
            "tramline_leases_held{application=\"rtr-blue\"} 1.0",
            "tramline_lease_moves_total{application=\"rtr-green\",kind=\"taken\"} 2.0",
            "tramline_shard_lag_milliseconds{application=\"rtr-blue\",stream=\"s\",\
             shard=\"shardId-000000000000\"} 1500.0",
            "tramline_shard_records_total{application=\"rtr-green\",stream=\"s\",\
             shard=\"shardId-000000000001\"} 0.0",
            "# EOF",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }

    /// The table of docs/metrics.md: name, kind, labels.
    #[test]
    fn the_documentation_lists_each_metric_with_its_kind_and_labels() {
        let mut told = BTreeMap::new();
        let text = everything();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').expect("a name and a kind");
                told.insert(name.to_owned(), (kind.to_owned(), String::new()));
            } else if !line.starts_with('#') {
                let (name, labels) = line.split_once('{').unwrap_or((line, ""));
                let name = name.split(' ').next().unwrap_or(name);
                let labels: Vec<&str> = labels
                    .split("=\"")
                    .map(|part| part.rsplit(['"', ',']).next().unwrap_or(""))
                    .collect();
                let labels = labels[..labels.len() - 1].join(", ");
                let family = told.get_mut(name).or(None);
                let family = match family {
                    Some(family) => family,
                    None => {
                        let base = name.strip_suffix("_total").expect("a counter");
                        told.get_mut(base).expect("a family")
                    }
                };
                family.1 = labels;
            }
        }
        let documented: BTreeMap<String, (String, String)> = include_str!("../../docs/metrics.md")
            .lines()
            .filter_map(|line| line.strip_prefix("| `"))
            .map(|line| {
                let mut cells = line.split(" | ");
                let mut cell = || cells.next().unwrap_or("").trim_matches(['`', ' ']).to_owned();
                let (name, kind, labels) = (cell(), cell(), cell());
                (name.trim_end_matches("_total").to_owned(), (kind, labels))
            })
            .collect();
        assert_eq!(told, documented);
    }
}
