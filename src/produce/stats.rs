//! What the producer counts and measures.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use hdrhistogram::Histogram;
use jiff::Timestamp;

use super::ProducerReport;
use crate::aws::AwsErrorKind;

/// What a producer has done since its start, and how it is at this moment.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ProducerStats {
    /// Counts since the start.
    pub report: ProducerReport,
    /// Records of all lanes, also of those that are closed.
    pub puts: PutStats,
    /// What waits for Kinesis, of all lanes.
    pub waiting: Waiting,
    /// How many bytes may wait before nothing more is received.
    pub spool_limit_bytes: u64,
    /// Set while records are not stored.
    pub put_failure: Option<Failure>,
    /// Set while the spool takes nothing.
    pub spool_failure: Option<Failure>,
    /// The lanes that are open, or have messages.
    pub lanes: Vec<LaneStats>,
    /// The OCS sequence numbers of each source, as far as the producer received the messages itself.
    pub sources: Vec<SourceStats>,
}

/// What a lane has done, and what of it waits.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct LaneStats {
    /// Its partition key.
    pub partition_key: String,
    /// The address that its messages come from.
    pub source_ip: Option<IpAddr>,
    /// Its records.
    pub puts: PutStats,
    /// What waits for Kinesis.
    pub waiting: Waiting,
}

/// Messages that Kinesis does not have yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Waiting {
    /// How many.
    pub messages: u64,
    /// What they take in the spool.
    pub spooled_bytes: u64,
    /// When the oldest of them was received.
    pub oldest: Option<Timestamp>,
}

/// Records that Kinesis has, and how they came there.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct PutStats {
    /// Messages in them.
    pub messages: u64,
    /// Records.
    pub records: u64,
    /// Bytes of their data and partition keys.
    pub bytes: u64,
    /// Messages of a record.
    pub record_messages: Histogram<u32>,
    /// Bytes of a record.
    pub record_bytes: Histogram<u32>,
    /// Microseconds from sending a record to Kinesis' answer that it has it.
    pub latency_micros: Histogram<u32>,
    /// Microseconds from receiving the oldest message of a record to that answer.
    pub age_micros: Histogram<u32>,
    /// How often a record was put again, and why.
    pub retries: BTreeMap<RetryReason, u64>,
}

/// Why a record is put again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum RetryReason {
    /// Its shard had too much.
    Throttled,
    /// There was no answer: it may be there.
    Unreachable,
    /// The server failed: it may be there.
    Server,
    /// The credentials are missing, expired or not enough.
    Credentials,
    /// The clock of this machine is wrong.
    Clock,
    /// Kinesis refused it otherwise.
    Refused,
    /// It could not be read from the spool.
    Spool,
}

impl RetryReason {
    /// Its name, in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Throttled => "throttled",
            Self::Unreachable => "unreachable",
            Self::Server => "server",
            Self::Credentials => "credentials",
            Self::Clock => "clock",
            Self::Refused => "refused",
            Self::Spool => "spool",
        }
    }

    pub(super) fn of(kind: AwsErrorKind) -> Self {
        match kind {
            AwsErrorKind::Throttled => Self::Throttled,
            AwsErrorKind::Unreachable => Self::Unreachable,
            AwsErrorKind::Server => Self::Server,
            AwsErrorKind::Credentials | AwsErrorKind::Denied => Self::Credentials,
            AwsErrorKind::Clock => Self::Clock,
            _ => Self::Refused,
        }
    }
}

/// Something that does not work and is tried again.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Failure {
    /// When it failed first.
    pub since: Timestamp,
    /// How often it failed since.
    pub failures: u64,
    /// Why, the last time.
    pub reason: String,
}

impl Failure {
    /// One that begins now.
    pub(crate) fn new() -> Self {
        Self { since: Timestamp::now(), failures: 0, reason: String::new() }
    }

    pub(super) fn again(&mut self, reason: impl Into<String>) {
        self.failures += 1;
        self.reason = reason.into();
    }
}

/// The OCS sequence numbers of a source; see [`SequenceStep`](crate::ocs::SequenceStep).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SourceStats {
    /// Its address, or the name of its connection.
    pub source: String,
    /// Messages with a number.
    pub messages: u64,
    /// How often numbers were left out.
    pub gaps: u64,
    /// How many numbers that was.
    pub missing: u64,
    /// Numbers that were there before.
    pub repeats: u64,
    /// How often the numbers went back.
    pub backwards: u64,
    /// How often they started again, as they do every midnight.
    pub resets: u64,
    /// The last number.
    pub last: u64,
    /// When it was received.
    pub heard_at: Timestamp,
}

impl Default for PutStats {
    fn default() -> Self {
        // It grows with the values.
        let histogram = || Histogram::new(2).expect("two digits are within the allowed five");
        Self {
            messages: 0,
            records: 0,
            bytes: 0,
            record_messages: histogram(),
            record_bytes: histogram(),
            latency_micros: histogram(),
            age_micros: histogram(),
            retries: BTreeMap::new(),
        }
    }
}

/// A record that Kinesis has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stored {
    pub messages: u64,
    pub bytes: u64,
    pub latency: Duration,
    pub age: Duration,
}

impl PutStats {
    pub(super) fn stored(&mut self, stored: Stored) {
        self.messages += stored.messages;
        self.records += 1;
        self.bytes += stored.bytes;
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        for (histogram, value) in [
            (&mut self.record_messages, stored.messages),
            (&mut self.record_bytes, stored.bytes),
            (&mut self.latency_micros, micros(stored.latency)),
            (&mut self.age_micros, micros(stored.age)),
        ] {
            // A histogram grows to any value that there may be.
            let _ = histogram.record(value);
        }
    }

    pub(super) fn retried(&mut self, reason: RetryReason) {
        *self.retries.entry(reason).or_default() += 1;
    }
}

/// A producer with `lanes` lanes that is well.
#[cfg(test)]
pub(crate) fn stats_of(lanes: usize) -> ProducerStats {
    let lane = |n: usize| LaneStats {
        partition_key: format!("lane-{n}"),
        source_ip: None,
        puts: PutStats::default(),
        waiting: Waiting::default(),
    };
    let mut puts = PutStats::default();
    puts.retried(RetryReason::Throttled);
    ProducerStats {
        report: ProducerReport::default(),
        puts,
        waiting: Waiting::default(),
        spool_limit_bytes: 1 << 30,
        put_failure: None,
        spool_failure: None,
        lanes: (0..lanes).map(lane).collect(),
        sources: vec![SourceStats {
            source: "10.0.0.1".to_owned(),
            messages: 1,
            gaps: 0,
            missing: 0,
            repeats: 0,
            backwards: 0,
            resets: 0,
            last: 1,
            heard_at: Timestamp::UNIX_EPOCH,
        }],
    }
}
