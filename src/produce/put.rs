//! Putting: from the spool to Kinesis, by calls that lanes share.

use std::{
    collections::{HashMap, VecDeque},
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
    pub stop: CancellationToken,
}

/// A lane as far as it has to do with bytes.
pub(super) struct Source {
    events: Arc<EventSource>,
    hash_key: u128,
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
            events: Arc::new(EventSource::new(key, &info.source, info.source_ip)),
            first,
            next,
            waiters: VecDeque::new(),
        }
    }
}

/// What became of a call.
struct Returned {
    outcomes: Vec<(LaneId, Outcome, Option<StoredAt>)>,
    /// One of the reasons why a record was not stored.
    failure: Option<String>,
}

/// A failure that lasts.
struct Failing {
    since: Instant,
    failures: u64,
    remind_at: Instant,
}

impl<P: PutRecords> Putter<P> {
    /// Lets lanes that an earlier process left go first.
    pub(super) fn recover(&mut self, left: &[Left], now: Instant) {
        for lane in left {
            let source = Source::new(&lane.info, lane.first, lane.first + lane.messages);
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
        let mut failing = None;
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
                    Ok(returned) => self.returned(returned, &mut failing),
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
                    outcomes: lanes.into_iter().map(|id| (id, Outcome::NotStored, None)).collect(),
                    failure: Some(format!("no records could be formed: {error}")),
                },
            }
        }
    }

    fn returned(&mut self, returned: Returned, failing: &mut Option<Failing>) {
        let now = Instant::now();
        let mut stored = false;
        let mut outcomes = Vec::with_capacity(returned.outcomes.len());
        for (lane, outcome, at) in returned.outcomes {
            outcomes.push((lane, outcome));
            if let (Outcome::Stored { messages, spooled_bytes, record_bytes }, Some(at)) =
                (outcome, at)
            {
                stored = true;
                self.stored(lane, messages, &at);
                self.room.release(spooled_bytes);
                add(&self.counters.put, messages);
                add(&self.counters.records, 1);
                add(&self.counters.bytes, record_bytes as u64);
            }
        }
        for lane in self.lanes.returned(outcomes, now) {
            self.finished(lane);
        }
        if let Some(failure) = returned.failure {
            let failing =
                failing.get_or_insert(Failing { since: now, failures: 0, remind_at: now });
            failing.failures += 1;
            if now >= failing.remind_at {
                failing.remind_at = now + REMINDER_INTERVAL;
                tracing::warn!(
                    stream = self.stream,
                    failures = failing.failures,
                    waiting = self.lanes.messages(),
                    oldest = self.oldest().map(tracing::field::display),
                    "{failure}; the connection's messages wait, in order, and the record is put \
                     again until Kinesis has it"
                );
            }
        }
        if stored
            && !self.lanes.in_trouble()
            && let Some(failing) = failing.take()
        {
            tracing::info!(
                stream = self.stream,
                failures = failing.failures,
                "Kinesis takes records again after {:.1} s",
                (now - failing.since).as_secs_f64()
            );
        }
    }

    /// When the oldest message that waits was received.
    fn oldest(&self) -> Option<Timestamp> {
        let first_of = |lane| {
            let mut first = None;
            let read = self.store.read(lane, self.sources.get(&lane)?.first, &mut |message| {
                first = Some(message.received_at);
                ControlFlow::Break(())
            });
            read.ok().and(first)
        };
        self.lanes.waiting().filter_map(first_of).min()
    }

    /// The next messages of a lane are in Kinesis.
    fn stored(&mut self, lane: LaneId, messages: u64, at: &StoredAt) {
        let Some(source) = self.sources.get_mut(&lane) else { return };
        tracing::debug!(
            stream = self.stream,
            shard = at.shard,
            sequence_number = at.sequence_number,
            messages,
            "record put"
        );
        source.first += messages;
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
    let mut returned = Returned { outcomes: Vec::with_capacity(formed.len()), failure: None };
    let (mut records, mut sizes) = (Vec::new(), Vec::new());
    for Formed { lane, partition_key, record } in formed {
        match record {
            Ok(Some(packed)) => {
                let record_bytes = packed.data.len() + partition_key.len();
                sizes.push((lane, packed.messages, packed.spooled_bytes, record_bytes));
                records.push(Entry { partition_key, data: packed.data });
            }
            Ok(None) => returned.outcomes.push((lane, Outcome::NotPut, None)),
            Err(error) => {
                returned.outcomes.push((lane, Outcome::NotStored, None));
                returned.failure = Some(error.to_string());
            }
        }
    }
    if records.is_empty() {
        return returned;
    }
    let results = match put.put_records(records).await {
        Ok(results) => results,
        Err(error) => vec![Err(error); sizes.len()],
    };
    for ((lane, messages, spooled_bytes, record_bytes), result) in sizes.into_iter().zip(results) {
        let (outcome, at) = match result {
            Ok(at) => (Outcome::Stored { messages, spooled_bytes, record_bytes }, Some(at)),
            Err(error) => {
                let outcome = match error.kind() {
                    AwsErrorKind::Throttled => Outcome::Throttled,
                    AwsErrorKind::Unreachable | AwsErrorKind::Server => {
                        Outcome::Unknown { messages }
                    }
                    AwsErrorKind::Refused => Outcome::Refused,
                    _ => Outcome::NotStored,
                };
                returned.failure = Some(error.to_string());
                (outcome, None)
            }
        };
        returned.outcomes.push((lane, outcome, at));
    }
    returned
}
