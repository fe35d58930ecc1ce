//! Putting: from the spool to Kinesis, by calls that lanes share.

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
    ops::ControlFlow,
    sync::Arc,
    time::Duration,
};

use aws_sdk_kinesis::{
    Client,
    config::retry::RetryConfig,
    primitives::Blob,
    types::{PutRecordsRequestEntry, PutRecordsResultEntry},
};
use aws_types::SdkConfig;
use jiff::Timestamp;
use tokio::{
    sync::{Notify, mpsc, oneshot},
    task::JoinSet,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    Counters, Room, StoredAt, add,
    commit::{Appended, Committed, Request},
    lanes::{Lanes, Outcome, Turn},
    pack::{Packed, Packer, Packing},
    shards::hash_key,
    spool::{LaneId, LaneInfo, Left, SpoolError, Store},
    stats::{Failure, LaneStats, PutStats, RetryReason, Stored, Waiting},
};
use crate::{
    aws::{self, AwsError, AwsErrorKind, Reconnecting},
    ocs::EventSource,
    shard::Shard,
};

/// How often a lasting failure is told again.
const REMINDER_INTERVAL: Duration = Duration::from_secs(60);

/// A record on its way.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub partition_key: String,
    pub data: Vec<u8>,
}

/// The stream, as far as putting needs it.
pub(super) trait PutRecords: Clone + Send + Sync + 'static {
    /// Puts records, and tells for each in turn where it is or why it is not there.
    fn put_records(
        &self,
        records: Vec<Entry>,
    ) -> impl Future<Output = Result<Vec<Result<StoredAt, AwsError>>, AwsError>> + Send;
}

const OPERATION: &str = "kinesis:PutRecords";

/// The stream in Kinesis.
#[derive(Debug, Clone)]
pub(super) struct Kinesis {
    client: Arc<Reconnecting<Client>>,
    stream: String,
}

impl Kinesis {
    pub(super) fn new(config: &SdkConfig, stream: &str) -> Self {
        let config = aws_sdk_kinesis::config::Builder::from(config)
            .timeout_config(aws::call_timeouts())
            // What to put again, and when, depends on the record: it is decided in one place.
            .retry_config(RetryConfig::disabled())
            .build();
        let client = Reconnecting::new(move || Client::from_conf(config.clone()));
        Self { client: Arc::new(client), stream: stream.to_owned() }
    }
}

impl PutRecords for Kinesis {
    async fn put_records(
        &self,
        records: Vec<Entry>,
    ) -> Result<Vec<Result<StoredAt, AwsError>>, AwsError> {
        let count = records.len();
        let entries = records.into_iter().map(|record| {
            PutRecordsRequestEntry::builder()
                .partition_key(record.partition_key)
                .data(Blob::new(record.data))
                .build()
                .expect("both fields that it must have are set")
        });
        let put = self
            .client
            .get()
            .put_records()
            .stream_name(&self.stream)
            .set_records(Some(entries.collect()))
            .send()
            .await
            .map_err(|error| self.client.failure(OPERATION, error))?;
        if put.records.len() != count {
            return Err(AwsError::new(
                OPERATION,
                AwsErrorKind::Server,
                format!("{count} records were put, and {} answered for", put.records.len()),
            ));
        }
        Ok(put.records.into_iter().map(stored_at).collect())
    }
}

fn stored_at(entry: PutRecordsResultEntry) -> Result<StoredAt, AwsError> {
    match (entry.error_code, entry.shard_id, entry.sequence_number) {
        (None, Some(shard), Some(sequence_number)) => Ok(StoredAt { shard, sequence_number }),
        (code, ..) => {
            let code = code.unwrap_or_else(|| "an answer without a place".to_owned());
            let message = entry.error_message.unwrap_or_default();
            Err(aws::record_failure(OPERATION, &code, &message))
        }
    }
}

/// Puts what is in the spool until `stop` is cancelled.
pub(super) struct Putter<P> {
    pub stream: String,
    pub put: P,
    pub store: Arc<Store>,
    pub packing: Packing,
    pub lanes: Lanes,
    pub sources: HashMap<LaneId, Source>,
    pub requests: mpsc::UnboundedSender<Request>,
    pub committed: mpsc::UnboundedReceiver<Committed>,
    pub shards: mpsc::Receiver<Vec<Shard>>,
    /// Told when a record went to another shard than expected.
    pub resharded: Arc<Notify>,
    pub room: Arc<Room>,
    pub counters: Arc<Counters>,
    /// Of all lanes, also of those that are gone.
    pub puts: PutStats,
    /// Who wants to know how it is.
    pub asked: mpsc::UnboundedReceiver<oneshot::Sender<Snapshot>>,
    pub failing: Option<Failing>,
    pub stop: CancellationToken,
}

/// How the putting is at one moment.
#[derive(Debug)]
pub(super) struct Snapshot {
    pub puts: PutStats,
    pub failure: Option<Failure>,
    /// Each with the place of its first message that waits. When that was received is still to be read
    /// from the spool.
    pub lanes: Vec<(LaneId, u64, LaneStats)>,
}

/// A lane as far as it has to do with bytes.
pub(super) struct Source {
    events: Arc<EventSource>,
    source_ip: Option<IpAddr>,
    hash_key: u128,
    /// Since its first record.
    puts: Option<PutStats>,
    spooled_bytes: u64,
    /// The place of the first message that is not in Kinesis, and of the one that is received next.
    first: u64,
    next: u64,
    waiters: VecDeque<(u64, Waiter)>,
}

enum Waiter {
    /// For the message at this place.
    Receipt(oneshot::Sender<StoredAt>),
    /// For all messages before this place.
    Flush(oneshot::Sender<()>),
}

impl Source {
    pub(super) fn new(info: &LaneInfo, first: u64, next: u64) -> Self {
        let key = info.partition_key.clone();
        Self {
            hash_key: hash_key(&key),
            source_ip: info.source_ip,
            puts: None,
            spooled_bytes: 0,
            events: Arc::new(EventSource::new(key, &info.source, info.source_ip)),
            first,
            next,
            waiters: VecDeque::new(),
        }
    }

    fn stats(&self) -> LaneStats {
        LaneStats {
            partition_key: self.events.partition_key().to_owned(),
            source_ip: self.source_ip,
            puts: self.puts.clone().unwrap_or_default(),
            waiting: Waiting {
                messages: self.next - self.first,
                spooled_bytes: self.spooled_bytes,
                oldest: None,
            },
        }
    }
}

impl TurnReturned {
    fn unreadable(lane: LaneId) -> Self {
        let retry = Some(RetryReason::Spool);
        Self { lane, outcome: Outcome::NotStored, stored: None, retry }
    }
}

/// What became of a call.
struct Returned {
    turns: Vec<TurnReturned>,
    latency: Duration,
    /// One of the reasons why a record was not stored.
    failure: Option<String>,
}

struct TurnReturned {
    lane: LaneId,
    outcome: Outcome,
    /// Where the record is, and when its oldest message was received.
    stored: Option<(StoredAt, Timestamp)>,
    retry: Option<RetryReason>,
}

/// A failure that lasts.
pub(super) struct Failing {
    began: Instant,
    remind_at: Instant,
    failure: Failure,
}

impl<P: PutRecords> Putter<P> {
    /// Lets lanes that an earlier process left go first.
    pub(super) fn recover(&mut self, left: &[Left], now: Instant) {
        for lane in left {
            let mut source = Source::new(&lane.info, lane.first, lane.first + lane.messages);
            source.spooled_bytes = lane.spooled_bytes;
            self.lanes.open(lane.lane, source.hash_key, &host(&lane.info));
            self.lanes.arrived(lane.lane, lane.messages, lane.spooled_bytes, now, now);
            self.sources.insert(lane.lane, source);
            if self.lanes.close(lane.lane, now) {
                self.finished(lane.lane);
            }
        }
    }

    pub(super) async fn run(mut self) {
        // Nothing is received that nobody puts.
        let _ended = self.stop.clone().drop_guard();
        let mut calls: JoinSet<Returned> = JoinSet::new();
        let stop = self.stop.clone();
        loop {
            let now = Instant::now();
            loop {
                let turns = self.lanes.next_call(now);
                if turns.is_empty() {
                    break;
                }
                calls.spawn(self.call(turns));
            }
            let wake_at = self.lanes.wake_at(now);
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                Some(returned) = calls.join_next() => match returned {
                    Ok(returned) => self.returned(returned),
                    Err(error) => {
                        tracing::error!(stream = self.stream, "a call broke off: {error}");
                        return;
                    }
                },
                committed = self.committed.recv() => {
                    let Some(committed) = committed else { return };
                    self.committed(committed);
                    while let Ok(committed) = self.committed.try_recv() {
                        self.committed(committed);
                    }
                }
                Some(shards) = self.shards.recv() => self.lanes.set_shards(&shards, Instant::now()),
                Some(asked) = self.asked.recv() => {
                    // Whoever asked may have gone.
                    let _ = asked.send(self.snapshot());
                }
                () = sleep_until(wake_at) => {}
            }
        }
    }

    fn committed(&mut self, committed: Committed) {
        let now = Instant::now();
        match committed {
            Committed::Opened { lane, info } => {
                let source = Source::new(&info, 0, 0);
                self.lanes.open(lane, source.hash_key, &host(&info));
                self.sources.insert(lane, source);
            }
            Committed::Appended(Appended { lane, messages, spooled_bytes, due, receipts }) => {
                if let Some(source) = self.sources.get_mut(&lane) {
                    source.next += messages;
                    source.spooled_bytes += spooled_bytes;
                    let receipts = receipts.into_iter();
                    source.waiters.extend(receipts.map(|(place, r)| (place, Waiter::Receipt(r))));
                }
                self.lanes.arrived(lane, messages, spooled_bytes, due, now);
            }
            Committed::Closed { lane } => {
                if self.lanes.close(lane, now) {
                    self.finished(lane);
                }
            }
            Committed::Put { lane } => {
                if self.lanes.settled(lane) {
                    self.finished(lane);
                }
            }
            Committed::Flush { lane, done } => {
                if lane.is_none() {
                    self.lanes.hurry_all(now);
                }
                let concerned: Vec<LaneId> = match lane {
                    Some(lane) => vec![lane],
                    None => self.lanes.waiting().collect(),
                };
                let mut flushed = Vec::new();
                for lane in concerned {
                    let Some(source) = self.sources.get_mut(&lane) else { continue };
                    if source.first < source.next {
                        let (sender, receiver) = oneshot::channel();
                        source.waiters.push_back((source.next, Waiter::Flush(sender)));
                        flushed.push(receiver);
                    }
                }
                // Whoever asked may have gone.
                let _ = done.send(flushed);
            }
        }
    }

    fn call(&self, turns: Vec<Turn>) -> impl Future<Output = Returned> + Send + use<P> {
        let turns: Vec<(Turn, u64, Arc<EventSource>)> = turns
            .into_iter()
            .filter_map(|turn| {
                let source = self.sources.get(&turn.lane)?;
                Some((turn, source.first, source.events.clone()))
            })
            .collect();
        let call_limit_bytes = call_limit_bytes(self.packing.record_limit_bytes);
        let (put, store, packing) = (self.put.clone(), self.store.clone(), self.packing);
        async move {
            let lanes: Vec<LaneId> = turns.iter().map(|(turn, ..)| turn.lane).collect();
            let forming = tokio::task::spawn_blocking(move || {
                form(&store, &turns, packing, call_limit_bytes)
            });
            match forming.await {
                Ok(formed) => put_formed(&put, formed).await,
                Err(error) => Returned {
                    turns: lanes.into_iter().map(TurnReturned::unreadable).collect(),
                    latency: Duration::ZERO,
                    failure: Some(format!("no records could be formed: {error}")),
                },
            }
        }
    }

    fn returned(&mut self, returned: Returned) {
        let now = Instant::now();
        let mut any_stored = false;
        let mut outcomes = Vec::with_capacity(returned.turns.len());
        for TurnReturned { lane, outcome, stored, retry } in returned.turns {
            outcomes.push((lane, outcome));
            if let (Outcome::Stored { messages, spooled_bytes, record_bytes }, Some((at, oldest))) =
                (outcome, stored)
            {
                any_stored = true;
                let age = Timestamp::now().duration_since(oldest);
                let stored = Stored {
                    messages,
                    bytes: record_bytes as u64,
                    latency: returned.latency,
                    // A clock may have gone back.
                    age: age.try_into().unwrap_or_default(),
                };
                self.puts.stored(stored);
                self.stored(lane, stored, spooled_bytes, &at);
                self.room.release(spooled_bytes);
                add(&self.counters.put, messages);
                add(&self.counters.records, 1);
                add(&self.counters.bytes, record_bytes as u64);
            }
            if let Some(reason) = retry {
                self.puts.retried(reason);
                if let Some(source) = self.sources.get_mut(&lane) {
                    source.puts.get_or_insert_default().retried(reason);
                }
            }
        }
        self.lanes.returned(outcomes, now);
        if let Some(reason) = returned.failure {
            self.failed(reason, now);
        }
        if any_stored
            && !self.lanes.in_trouble()
            && let Some(Failing { began, failure, .. }) = self.failing.take()
        {
            tracing::info!(
                stream = self.stream,
                failures = failure.failures,
                "Kinesis takes records again after {:.1} s",
                (now - began).as_secs_f64()
            );
        }
    }

    fn failed(&mut self, reason: String, now: Instant) {
        let failing = self.failing.get_or_insert_with(|| Failing {
            began: now,
            remind_at: now,
            failure: Failure::new(),
        });
        failing.failure.again(reason);
        if now < failing.remind_at {
            return;
        }
        failing.remind_at = now + REMINDER_INTERVAL;
        let Failure { failures, reason, .. } = failing.failure.clone();
        tracing::warn!(
            stream = self.stream,
            failures,
            waiting = self.lanes.messages(),
            oldest = self.oldest().map(tracing::field::display),
            "{reason}; the connection's messages wait, in order, and the record is put again until \
             Kinesis has it"
        );
    }

    fn snapshot(&self) -> Snapshot {
        let mut lanes: Vec<_> =
            self.sources.iter().map(|(id, source)| (*id, source.first, source.stats())).collect();
        lanes.sort_unstable_by_key(|(id, ..)| *id);
        Snapshot {
            puts: self.puts.clone(),
            failure: self.failing.as_ref().map(|failing| failing.failure.clone()),
            lanes,
        }
    }

    /// When the oldest message that waits was received.
    fn oldest(&self) -> Option<Timestamp> {
        let received_at = |lane| self.store.received_at(lane, self.sources.get(&lane)?.first);
        self.lanes.waiting().filter_map(received_at).min()
    }

    /// The next messages of a lane are in Kinesis.
    fn stored(&mut self, lane: LaneId, stored: Stored, spooled_bytes: u64, at: &StoredAt) {
        let Some(source) = self.sources.get_mut(&lane) else { return };
        tracing::debug!(
            stream = self.stream,
            shard = at.shard,
            sequence_number = at.sequence_number,
            messages = stored.messages,
            "record put"
        );
        source.puts.get_or_insert_default().stored(stored);
        source.first += stored.messages;
        source.spooled_bytes = source.spooled_bytes.saturating_sub(spooled_bytes);
        // The spool may have ended before: then the next process puts them again.
        let _ = self.requests.send(Request::Put { lane, count: source.first });
        while let Some((place, waiter)) = source.waiters.pop_front() {
            match waiter {
                Waiter::Receipt(receipt) if place < source.first => {
                    let _ = receipt.send(at.clone());
                }
                Waiter::Flush(flushed) if place <= source.first => {
                    let _ = flushed.send(());
                }
                waiter => {
                    source.waiters.push_front((place, waiter));
                    break;
                }
            }
        }
        if self.lanes.shard_of(source.hash_key).is_some_and(|expected| expected != at.shard) {
            self.resharded.notify_one();
        }
    }

    fn finished(&mut self, lane: LaneId) {
        self.sources.remove(&lane);
        let _ = self.requests.send(Request::Finished { lane });
    }
}

/// The most bytes of a call: what AWS takes since 2025 if records may be large, else what it always took,
/// and other servers still do.
pub(super) fn call_limit_bytes(record_limit_bytes: usize) -> usize {
    let always: usize = 5 * 1024 * 1024;
    if record_limit_bytes > always { 2 * always } else { always }
}

/// Peers with the same one are ordered among each other when they come one after the other.
fn host(info: &LaneInfo) -> String {
    info.source_ip.map_or_else(|| info.partition_key.clone(), |ip| ip.to_string())
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// A turn with its record, or with what hindered it.
struct Formed {
    lane: LaneId,
    partition_key: String,
    record: Result<Option<Packed>, SpoolError>,
}

fn form(
    store: &Store,
    turns: &[(Turn, u64, Arc<EventSource>)],
    packing: Packing,
    call_limit_bytes: usize,
) -> Vec<Formed> {
    let mut call_bytes = 0;
    let form = |(turn, first, source): &(Turn, u64, Arc<EventSource>)| {
        let mut packer = Packer::new(packing, source);
        let mut left = turn.messages;
        let read = store.read(turn.lane, *first, &mut |message| {
            if left == 0 || !packer.push(message) {
                return ControlFlow::Break(());
            }
            left -= 1;
            ControlFlow::Continue(())
        });
        let packed = read.map(|()| packer.finish()).map(|packed| {
            let packed = packed?;
            let bytes = packed.data.len() + source.partition_key().len();
            let room = call_bytes == 0 || call_bytes + bytes <= call_limit_bytes;
            room.then(|| {
                call_bytes += bytes;
                packed
            })
        });
        Formed { lane: turn.lane, partition_key: source.partition_key().to_owned(), record: packed }
    };
    turns.iter().map(form).collect()
}

async fn put_formed(put: &impl PutRecords, formed: Vec<Formed>) -> Returned {
    let mut returned = Returned {
        turns: Vec::with_capacity(formed.len()),
        latency: Duration::ZERO,
        failure: None,
    };
    let (mut records, mut put_of) = (Vec::new(), Vec::new());
    for Formed { lane, partition_key, record } in formed {
        match record {
            Ok(Some(Packed { data, messages, spooled_bytes, oldest })) => {
                let record_bytes = data.len() + partition_key.len();
                put_of.push((lane, messages, spooled_bytes, record_bytes, oldest));
                records.push(Entry { partition_key, data });
            }
            Ok(None) => {
                let outcome = Outcome::NotPut;
                returned.turns.push(TurnReturned { lane, outcome, stored: None, retry: None });
            }
            Err(error) => {
                returned.turns.push(TurnReturned::unreadable(lane));
                returned.failure = Some(error.to_string());
            }
        }
    }
    if records.is_empty() {
        return returned;
    }
    let began = Instant::now();
    let results = match put.put_records(records).await {
        Ok(results) => results,
        Err(error) => vec![Err(error); put_of.len()],
    };
    returned.latency = began.elapsed();
    for (put, result) in put_of.into_iter().zip(results) {
        let (lane, messages, spooled_bytes, record_bytes, oldest) = put;
        returned.turns.push(match result {
            Ok(at) => TurnReturned {
                lane,
                outcome: Outcome::Stored { messages, spooled_bytes, record_bytes },
                stored: Some((at, oldest)),
                retry: None,
            },
            Err(error) => {
                returned.failure = Some(error.to_string());
                let outcome = match error.kind() {
                    AwsErrorKind::Throttled => Outcome::Throttled,
                    AwsErrorKind::Unreachable | AwsErrorKind::Server => {
                        Outcome::Unknown { messages }
                    }
                    AwsErrorKind::Refused => Outcome::Refused,
                    _ => Outcome::NotStored,
                };
                let retry = Some(RetryReason::of(error.kind()));
                TurnReturned { lane, outcome, stored: None, retry }
            }
        });
    }
    returned
}
