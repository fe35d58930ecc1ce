//! The metrics, in the text format of OpenMetrics 1.0.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, MetricEncoder, text},
    metrics::{MetricType, exemplar::Exemplar},
    registry::{Registry, Unit},
};

use crate::{
    latency::LatencySummary,
    worker::{LeaseMoves, ShardStatus, WorkerStatus},
};

/// What the text is, for `Content-Type`.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What is told in one answer.
#[derive(Debug, Default)]
pub(super) struct Snapshot {
    pub ready: bool,
    pub resident_bytes: Option<u64>,
    pub worker: Option<WorkerStatus>,
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
    value: fn(&T) -> Option<f64>,
}

const fn counter<T>(
    name: &'static str,
    help: &'static str,
    value: fn(&T) -> Option<f64>,
) -> Family<T> {
    Family { name, help, kind: Kind::Counter, unit: In::Plain, value }
}

const fn gauge<T>(
    name: &'static str,
    help: &'static str,
    value: fn(&T) -> Option<f64>,
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
            if let Some(value) = (self.value)(of) {
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
    gauge("ready", "1 if /readyz says so, else 0", |of: &Snapshot| {
        Some(f64::from(u8::from(of.ready)))
    }),
    gauge("resident_memory", "Memory of the process that is resident", |of: &Snapshot| {
        of.resident_bytes.map(|bytes| bytes as f64)
    })
    .bytes(),
];

const WORKER: &[Family<WorkerStatus>] = &[
    gauge("uptime", "How long the worker runs", |of: &WorkerStatus| Some(of.uptime.as_secs_f64()))
        .seconds(),
    gauge("leases_held", "Shards that the worker reads", |of: &WorkerStatus| {
        Some(of.shards.len() as f64)
    }),
    gauge(
        "lease_look_age",
        "Time since the last look for leases that worked",
        |of: &WorkerStatus| of.looked.map(|ago| ago.as_secs_f64()),
    )
    .seconds(),
];

const MOVES: &[(&str, fn(&LeaseMoves) -> u64)] = &[
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
        |of: &ShardStatus| of.behind.map(|behind| behind.as_millis() as f64),
    ),
    counter("shard_records", "Records that were read", |of: &ShardStatus| {
        Some(of.counts.records as f64)
    }),
    counter("shard_read", "Bytes of the records that were read", |of: &ShardStatus| {
        Some(of.bytes as f64)
    })
    .bytes(),
    counter("shard_messages", "Messages that the handler finished", |of: &ShardStatus| {
        Some(of.counts.messages as f64)
    }),
    counter(
        "shard_undecodable",
        "Parts of records that could not be decoded",
        |of: &ShardStatus| Some(of.counts.undecodable as f64),
    ),
    counter(
        "shard_misplaced",
        "KPL aggregates with user records of another shard",
        |of: &ShardStatus| Some(of.counts.misplaced as f64),
    ),
    counter(
        "shard_failed_attempts",
        "Calls of the handler that failed or took too long",
        |of: &ShardStatus| Some(of.counts.failed_attempts as f64),
    ),
    counter("shard_dead_letters", "Dead letters that were stored", |of: &ShardStatus| {
        Some(of.counts.dead_letters as f64)
    }),
    counter(
        "shard_skipped",
        "Messages that were skipped because the handler failed",
        |of: &ShardStatus| Some(of.counts.skipped as f64),
    ),
    counter("shard_stuck", "How often the watchdog found no progress", |of: &ShardStatus| {
        Some(of.counts.stuck as f64)
    }),
    gauge(
        "shard_stopped",
        "1 if the shard stopped because of a failure, else 0",
        |of: &ShardStatus| Some(f64::from(u8::from(of.parked))),
    ),
    gauge("shard_waiting", "How long the shard waits for the same thing", |of: &ShardStatus| {
        Some(of.waits.as_secs_f64())
    })
    .seconds(),
    gauge(
        "shard_checkpoint_age",
        "How long something is finished that is not stored",
        |of: &ShardStatus| Some(of.checkpoint_age.as_secs_f64()),
    )
    .seconds(),
    counter("handler_calls", "Calls of the handler", |of: &ShardStatus| {
        Some(of.handler.count as f64)
    }),
    counter("handler_duration", "Time in calls of the handler", |of: &ShardStatus| {
        Some(of.handler.total.as_secs_f64())
    })
    .seconds(),
];

const QUANTILES: &[(&str, fn(&LatencySummary) -> f64)] = &[
    ("0.5", |of| of.p50.as_secs_f64()),
    ("0.9", |of| of.p90.as_secs_f64()),
    ("0.99", |of| of.p99.as_secs_f64()),
    ("1", |of| of.max.as_secs_f64()),
];

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let encoder = &mut encoder;
        let info = [("version", env!("CARGO_PKG_VERSION"))];
        gauge::<()>("build_info", "1, and which version runs", |()| Some(1.0))
            .encode(encoder, [(info, &())])?;
        let none: NoLabels = [];
        for family in PROCESS {
            family.encode(encoder, [(none, self)])?;
        }
        match &self.worker {
            Some(worker) => encode_worker(worker, encoder),
            None => Ok(()),
        }
    }
}

fn encode_worker(worker: &WorkerStatus, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let none: NoLabels = [];
    for family in WORKER {
        family.encode(encoder, [(none, worker)])?;
    }
    let help = "Leases that came to the worker and went from it";
    let mut moves = encoder.encode_descriptor("lease_moves", help, None, MetricType::Counter)?;
    for (kind, count) in MOVES {
        let labels = [("kind", *kind)];
        sample(Kind::Counter, moves.encode_family(&labels)?, count(&worker.leases) as f64)?;
    }
    let labels = |shard: &ShardStatus| {
        [("stream", shard.stream.clone()), ("shard", shard.shard.name().into())]
    };
    for family in SHARD {
        family.encode(encoder, worker.shards.iter().map(|shard| (labels(shard), shard)))?;
    }
    let help = "How long a call of the handler took in the last minutes, by quantile";
    let unit = Some(&Unit::Seconds);
    let name = "handler_duration_quantile";
    let mut quantiles = encoder.encode_descriptor(name, help, unit, MetricType::Gauge)?;
    for shard in worker.shards.iter().filter(|shard| shard.handler.count > 0) {
        let [stream, name] = labels(shard);
        for (quantile, value) in QUANTILES {
            let labels = [stream.clone(), name.clone(), ("quantile", (*quantile).to_owned())];
            sample(Kind::Gauge, quantiles.encode_family(&labels)?, value(&shard.handler))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::worker::status_of;

    fn everything() -> String {
        let worker = status_of(2);
        let snapshot = Snapshot { ready: true, resident_bytes: Some(1024), worker: Some(worker) };
        snapshot.text().expect("a text")
    }

    #[test]
    fn each_sample_has_its_name_labels_and_value() {
        let text = everything();
        for line in [
            "# TYPE tramline_ready gauge",
            "tramline_ready 1.0",
            "tramline_resident_memory_bytes 1024.0",
            "tramline_leases_held 2.0",
            "tramline_lease_moves_total{kind=\"taken\"} 2.0",
            "tramline_shard_lag_milliseconds{stream=\"s\",shard=\"shardId-000000000000\"} 1500.0",
            "tramline_shard_records_total{stream=\"s\",shard=\"shardId-000000000001\"} 0.0",
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
