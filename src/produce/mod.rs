//! The producer: OCS connections in, CloudEvents out.
//!
//! ```text
//! socket → Framer → lane ─→ group commit ─→ spool ─→ lanes ─→ PutRecords ─→ Kinesis
//!                             (commit)              (whose turn)   │
//!                                ↑──────── what Kinesis has ───────┘
//! ```
//! Each connection has its own lane. While a record of it is on the way, what arrives forms the next one,
//! so order holds under every failure and records grow with the load by themselves (P7). A message is put
//! only when it is in the spool, and leaves the spool only when Kinesis has it (P8).
//!
//! [`OcsListener`] receives connections; [`Producer`] is the part behind the sockets, for services that
//! have messages of their own.

mod commit;
mod connection;
mod lanes;
mod listener;
mod pack;
mod policy;
mod put;
mod sequences;
mod shards;
mod spool;
mod stats;
mod tls;

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, Weak,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use aws_types::SdkConfig;
use jiff::Timestamp;
use tokio::{
    sync::{Notify, Semaphore, mpsc, oneshot},
    task::JoinHandle,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    backoff::Backoff,
    shard::Shard,
    source::{Retrieval, SourceError, Stream},
};
use commit::{Committer, Request};
use lanes::{Lanes, Limits};
use pack::Packing;
use put::{Kinesis, PutRecords, Putter, Snapshot, call_limit_bytes};
use sequences::Sequences;
use spool::{Chunk, Disk, LaneId, LaneInfo, Left, Spooled, Store};

pub use listener::{ListenerSettings, OcsListener, PartitionKey};
pub use pack::Encoding;
pub use policy::BatchPolicy;
pub use sequences::SequencePer;
pub use shards::ShardRate;
pub use spool::{Spool, SpoolError};
#[cfg(all(test, feature = "cli"))]
pub(crate) use stats::stats_of;
pub use stats::{Failure, LaneStats, ProducerStats, PutStats, RetryReason, SourceStats, Waiting};
pub use tls::{ListenerTls, TlsError};

/// The longest message: any fits into a record of 1 MiB, also when every byte of it is escaped.
pub(crate) const MESSAGE_LIMIT_BYTES: usize = 128 * 1024;
/// The smallest spool: it must hold a read of every connection at least.
pub(crate) const SPOOL_LIMIT_MIN_BYTES: u64 = 1024 * 1024;
/// What may be in memory before it is in the spool.
const UNSPOOLED_BYTES: usize = 2 * 1024 * 1024;
/// What may be on its way to Kinesis at the same time, and in how many calls.
const UNDER_WAY_BYTES: usize = 4 * 1024 * 1024;
const CALLS: usize = 4;
/// AWS API reference, PutRecords.
const CALL_RECORDS: usize = 500;

/// How messages are kept, batched and put.
#[derive(Debug, Clone)]
pub struct ProducerSettings {
    /// The CloudEvents' source, a URI reference. Default: `HOST.mbta.com/trike`.
    pub source: String,
    /// What a record holds.
    pub encoding: Encoding,
    /// Whether records are compressed: the whole of one, or each user record of a KPL aggregate. Default:
    /// they are not.
    pub gzip: bool,
    /// When messages go.
    pub batch: BatchPolicy,
    /// The most bytes of a record, partition key included: what the stream is set to, 1 MiB to 10 MiB (AWS
    /// API reference, `MaxRecordSizeInKiB`). Default: 1 MiB.
    pub record_limit_bytes: usize,
    /// What each shard takes a second. More than the stream allows leaves it to its refusals.
    pub shard_rate: ShardRate,
    /// Where messages wait for Kinesis. Default: on disk, in the directory of [`Spool::State`].
    pub spool: Spool,
    /// How many bytes of messages may wait there before nothing more is received; at least 1 MiB. Default:
    /// 1 GiB.
    pub spool_limit_bytes: u64,
    /// The time from one write to the disk to the next: what arrives meanwhile shares one. Default: 5 ms.
    pub spool_commit_delay: Duration,
    /// How long a stop may take. Default: 30 s.
    pub shutdown_limit: Duration,
}

impl Default for ProducerSettings {
    fn default() -> Self {
        Self {
            source: format!("{}.mbta.com/trike", crate::host::name()),
            encoding: Encoding::default(),
            gzip: false,
            batch: BatchPolicy::default(),
            record_limit_bytes: 1024 * 1024,
            shard_rate: ShardRate::default(),
            spool: Spool::default(),
            spool_limit_bytes: 1024 * 1024 * 1024,
            spool_commit_delay: Duration::from_millis(5),
            shutdown_limit: Duration::from_secs(30),
        }
    }
}

/// What a producer did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProducerReport {
    /// OCS connections accepted.
    pub connections: u64,
    /// Connections refused: their address is not allowed, there were too many, or their TLS failed.
    pub refused_connections: u64,
    /// Messages received.
    pub messages: u64,
    /// Messages that an earlier process left in the spool.
    pub left: u64,
    /// Messages that Kinesis has.
    pub put: u64,
    /// Records that Kinesis has.
    pub records: u64,
    /// Bytes of those records.
    pub bytes: u64,
    /// Writes to the spool.
    pub commits: u64,
    /// Heartbeats received.
    pub heartbeats: u64,
    /// Frames without a byte.
    pub empty_frames: u64,
    /// Oversized and unfinished messages; they were written to stderr.
    pub dead_letters: u64,
    /// OCS sequence numbers that were left out: messages that were lost before they came here.
    pub missing: u64,
}

impl ProducerReport {
    /// Messages that Kinesis does not have yet.
    pub fn waiting(&self) -> u64 {
        (self.messages + self.left).saturating_sub(self.put)
    }
}

/// Why a producer could not start, or stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProduceError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}; choose another address, or stop what uses it")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The stream cannot be written.
    #[error(transparent)]
    Stream(#[from] SourceError),
    /// The listener's TLS files cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The spool cannot be used.
    #[error("{0}")]
    Spool(#[from] SpoolError),
    /// Kinesis did not take everything before the shutdown limit, and there is no spool on disk.
    #[error(
        "{messages} messages, and whatever the sockets still held, were received but not stored in \
         the stream within {limit:?} of the stop: they are lost"
    )]
    Lost {
        /// How many.
        messages: u64,
        /// The limit.
        limit: Duration,
    },
    /// The putting of records broke off.
    #[error("the producer broke off: {waiting} messages wait for its next start")]
    BrokeOff {
        /// How many.
        waiting: u64,
    },
}

/// Why a message was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// It has no byte.
    #[error("a message without a byte is none")]
    Empty,
    /// It is too long.
    #[error("the message has {length} bytes, and may have {limit}")]
    TooLong {
        /// Its length.
        length: usize,
        /// The limit.
        limit: usize,
    },
    /// The producer has been closed.
    #[error("the producer is closed")]
    Closed,
}

/// Where a message is in the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredAt {
    /// The shard.
    pub shard: String,
    /// The sequence number of its record; messages of one record have the same.
    pub sequence_number: String,
}

/// Completes when Kinesis has the message. It need not be awaited: the message is put all the same. An error
/// if the producer ends first: then the message is in the spool, if that is on disk.
#[derive(Debug)]
pub struct Receipt(oneshot::Receiver<StoredAt>);

impl Future for Receipt {
    type Output = Result<StoredAt, SendError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map_err(|_| SendError::Closed)
    }
}

/// Puts messages to a stream: those of a lane in order, each at least once.
///
/// ```no_run
/// # async fn example(aws: &aws_types::SdkConfig) -> Result<(), Box<dyn std::error::Error>> {
/// use tramline::{Producer, ProducerSettings};
///
/// let producer = Producer::start(aws, "ctd-ocs-raw-messages", ProducerSettings::default()).await?;
/// let lane = producer.lane("my-source", None);
/// // Waits only if the spool is full.
/// let receipt = lane.send("4994,TSCH,02:00:06,R,RLD,W").await?;
/// println!("{} is in the stream", receipt.await?.sequence_number);
/// producer.close().await?;
/// # Ok(())
/// # }
/// ```
pub struct Producer {
    shared: Arc<Shared>,
    stream: String,
    putting: Task,
    committing: Task,
    watching: Task,
    salt: [u8; 16],
}

/// A task that ends when it is told to, or when this is dropped.
struct Task {
    stop: CancellationToken,
    running: JoinHandle<()>,
}

/// What lanes share with their producer.
struct Shared {
    settings: ProducerSettings,
    directory: Option<PathBuf>,
    requests: mpsc::UnboundedSender<Request>,
    lanes: Mutex<HashMap<String, Weak<OpenLane>>>,
    next_lane: AtomicU64,
    room: Arc<Room>,
    counters: Arc<Counters>,
    sequences: Sequences,
    /// As long as the producer runs.
    store: Weak<Store>,
    /// Asks whoever puts how it is.
    ask: mpsc::UnboundedSender<oneshot::Sender<Snapshot>>,
    /// Told when a record went to another shard than expected.
    resharded: Arc<Notify>,
}

#[derive(Debug, Default)]
struct Counters {
    connections: AtomicU64,
    refused_connections: AtomicU64,
    messages: AtomicU64,
    left: AtomicU64,
    put: AtomicU64,
    records: AtomicU64,
    bytes: AtomicU64,
    commits: AtomicU64,
    heartbeats: AtomicU64,
    empty_frames: AtomicU64,
    dead_letters: AtomicU64,
    missing: AtomicU64,
    spool_failure: Mutex<Option<Failure>>,
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// How much more may be received.
#[derive(Debug)]
struct Room {
    spool: Semaphore,
    /// What an earlier process left beyond the limit.
    excess: Mutex<u64>,
    memory: Arc<Semaphore>,
}

impl Room {
    fn new(limit_bytes: u64, left_bytes: u64) -> Self {
        let free = limit_bytes.saturating_sub(left_bytes);
        let free = usize::try_from(free).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        Self {
            spool: Semaphore::new(free),
            excess: Mutex::new(left_bytes.saturating_sub(limit_bytes)),
            memory: Arc::new(Semaphore::new(UNSPOOLED_BYTES)),
        }
    }

    fn release(&self, bytes: u64) {
        let mut excess = lock(&self.excess);
        let settled = bytes.min(*excess);
        *excess -= settled;
        // What was taken fits in; nothing else is given back.
        self.spool.add_permits(usize::try_from(bytes - settled).unwrap_or(0));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poison| poison.into_inner())
}

impl Producer {
    /// Opens the spool and puts what is left in it. AWS may be away, and the stream missing: it is tried
    /// until it works. An error says what is wrong with the spool.
    pub async fn start(
        config: &SdkConfig,
        stream: &str,
        settings: ProducerSettings,
    ) -> Result<Self, ProduceError> {
        let put = Kinesis::new(config, stream);
        Self::open(Stream::new(config, stream, Retrieval::Polling), put, settings).await
    }

    async fn open(
        stream: Stream,
        put: impl PutRecords,
        settings: ProducerSettings,
    ) -> Result<Self, ProduceError> {
        let directory = settings.spool.directory(stream.name());
        let opening = {
            let (directory, stream) = (directory.clone(), stream.name().to_owned());
            tokio::task::spawn_blocking(move || open_spool(directory, &stream))
        };
        let opened = opening
            .await
            .map_err(|error| SpoolError::Failed { reason: error.to_string() })
            .flatten()?;
        let (listed, shards) = mpsc::channel(1);
        let mut producer = Self::with(put, stream.name(), settings, directory, opened, shards);
        let resharded = producer.shared.resharded.clone();
        let stop = CancellationToken::new();
        producer.watching = Task::spawn(stop.clone(), async move {
            stop.run_until_cancelled(watch_shards(&stream, listed, &resharded)).await;
        });
        Ok(producer)
    }

    fn with(
        put: impl PutRecords,
        stream: &str,
        settings: ProducerSettings,
        directory: Option<PathBuf>,
        Opened { store, left, salt }: Opened,
        shards: mpsc::Receiver<Vec<Shard>>,
    ) -> Self {
        let left_bytes = left.iter().map(|lane| lane.spooled_bytes).sum();
        let left_messages: u64 = left.iter().map(|lane| lane.messages).sum();
        if let Some(directory) = &directory {
            tracing::info!(
                stream,
                waiting = left_messages,
                oldest =
                    left.iter().filter_map(|lane| lane.oldest).min().map(tracing::field::display),
                "the spool is {}",
                directory.display()
            );
        }
        let limit_bytes = settings.spool_limit_bytes.max(SPOOL_LIMIT_MIN_BYTES);
        let room = Arc::new(Room::new(limit_bytes, left_bytes));
        let counters = Arc::new(Counters::default());
        add(&counters.left, left_messages);
        let store = Arc::new(store);
        let (requests, requested) = mpsc::unbounded_channel();
        let (committed_to, committed) = mpsc::unbounded_channel();
        let (ask, asked) = mpsc::unbounded_channel();
        let committer = Committer {
            delay: match &*store {
                Store::Memory(_) => Duration::ZERO,
                Store::Disk(_) => settings.spool_commit_delay,
            },
            store: store.clone(),
            next: HashMap::new(),
            waiting: left_messages,
            failing: None,
            requests: requested,
            committed: committed_to,
            counters: counters.clone(),
            stop: CancellationToken::new(),
        };
        let limits = Limits {
            record_bytes: settings.record_limit_bytes,
            call_bytes: call_limit_bytes(settings.record_limit_bytes),
            call_records: CALL_RECORDS,
            calls: CALLS,
            under_way_bytes: UNDER_WAY_BYTES,
        };
        let seed = rand::random();
        let resharded = Arc::new(Notify::new());
        let mut putter = Putter {
            stream: stream.to_owned(),
            put,
            store: store.clone(),
            packing: Packing {
                encoding: settings.encoding,
                gzip: settings.gzip,
                record_limit_bytes: settings.record_limit_bytes,
            },
            lanes: Lanes::new(limits, settings.batch.clone(), settings.shard_rate, seed),
            sources: HashMap::new(),
            requests: requests.clone(),
            committed,
            shards,
            resharded: resharded.clone(),
            room: room.clone(),
            counters: counters.clone(),
            puts: PutStats::default(),
            asked,
            failing: None,
            stop: CancellationToken::new(),
        };
        putter.recover(&left, Instant::now());
        let next_lane = left.iter().map(|lane| lane.lane + 1).max().unwrap_or(0);
        Self {
            shared: Arc::new(Shared {
                settings,
                directory,
                requests,
                lanes: Mutex::default(),
                next_lane: AtomicU64::new(next_lane),
                room,
                counters,
                sequences: Sequences::new(),
                store: Arc::downgrade(&store),
                ask,
                resharded,
            }),
            stream: stream.to_owned(),
            putting: Task::spawn(putter.stop.clone(), putter.run()),
            committing: Task::spawn(committer.stop.clone(), committer.run()),
            watching: Task::spawn(CancellationToken::new(), std::future::ready(())),
            salt,
        }
    }

    /// The lane of a partition key: its messages stand in the stream in the order they were sent. Lanes
    /// of one key are one lane.
    ///
    /// Messages of lanes with the same `source_ip` that are opened one after the other keep their order,
    /// too, as far as one shard takes them.
    pub fn lane(&self, partition_key: impl AsRef<str>, source_ip: Option<IpAddr>) -> Lane {
        self.shared.lane(partition_key.as_ref(), source_ip)
    }

    /// Completes when Kinesis has all that was sent until now, however long AWS is away. What waits for other
    /// messages goes at once. An error if the producer ends first.
    pub async fn flush(&self) -> Result<(), SendError> {
        self.shared.flush(None).await
    }

    /// What it did until now.
    pub fn report(&self) -> ProducerReport {
        self.shared.counters.report()
    }

    /// For asking how it is, from elsewhere.
    pub fn monitor(&self) -> ProducerMonitor {
        ProducerMonitor(self.shared.clone())
    }

    /// Waits until Kinesis has everything, or until the shutdown limit has passed, and ends. What Kinesis
    /// does not have by then stays in the spool for the next start, if there is one on disk.
    pub async fn close(self) -> Result<ProducerReport, ProduceError> {
        let limit = self.shared.settings.shutdown_limit;
        let flushed = tokio::time::timeout(limit, self.flush()).await;
        self.end(matches!(flushed, Ok(Ok(())))).await
    }

    async fn end(self, flushed: bool) -> Result<ProducerReport, ProduceError> {
        let Self { shared, stream, putting, committing, watching, .. } = self;
        watching.end().await;
        putting.end().await;
        committing.end().await;
        let report = shared.counters.report();
        let waiting = report.waiting();
        if flushed && waiting == 0 {
            return Ok(report);
        }
        match &shared.directory {
            Some(directory) => {
                tracing::warn!(
                    stream,
                    waiting,
                    "not everything is in the stream: the rest is in the spool {}, and goes first when \
                     the producer starts again",
                    directory.display()
                );
                Ok(report)
            }
            None => {
                Err(ProduceError::Lost { messages: waiting, limit: shared.settings.shutdown_limit })
            }
        }
    }
}

/// Tells how a producer is. Cheap to clone.
#[derive(Clone)]
pub struct ProducerMonitor(Arc<Shared>);

impl ProducerMonitor {
    /// What the producer has done, and how it is now. An error if it is closed.
    pub async fn stats(&self) -> Result<ProducerStats, SendError> {
        let shared = &self.0;
        let (asking, answer) = oneshot::channel();
        shared.ask.send(asking).map_err(|_| SendError::Closed)?;
        let snapshot = answer.await.map_err(|_| SendError::Closed)?;
        let store = shared.store.upgrade().ok_or(SendError::Closed)?;
        let reading = tokio::task::spawn_blocking(move || {
            let Snapshot { puts, failure, lanes } = snapshot;
            let lanes: Vec<LaneStats> = lanes
                .into_iter()
                .map(|(id, first, mut lane)| {
                    if lane.waiting.messages > 0 {
                        lane.waiting.oldest = store.received_at(id, first);
                    }
                    lane
                })
                .collect();
            (puts, failure, lanes)
        });
        let (puts, put_failure, lanes) = reading.await.map_err(|_| SendError::Closed)?;
        Ok(ProducerStats {
            report: shared.counters.report(),
            puts,
            waiting: Waiting {
                messages: lanes.iter().map(|lane| lane.waiting.messages).sum(),
                spooled_bytes: lanes.iter().map(|lane| lane.waiting.spooled_bytes).sum(),
                oldest: lanes.iter().filter_map(|lane| lane.waiting.oldest).min(),
            },
            spool_limit_bytes: shared.settings.spool_limit_bytes.max(SPOOL_LIMIT_MIN_BYTES),
            put_failure,
            spool_failure: lock(&shared.counters.spool_failure).clone(),
            lanes,
            sources: shared.sequences.stats(),
        })
    }
}

struct Opened {
    store: Store,
    left: Vec<Left>,
    salt: [u8; 16],
}

fn open_spool(directory: Option<PathBuf>, stream: &str) -> Result<Opened, SpoolError> {
    let salt = rand::random();
    let Some(directory) = directory else {
        return Ok(Opened { store: Store::memory(), left: Vec::new(), salt });
    };
    let disk = Disk::open(&directory, stream)?;
    let (left, salt) = (disk.left()?, disk.salt(salt)?);
    Ok(Opened { store: Store::Disk(disk), left, salt })
}

/// Asks for the stream's shards at the start, and when a record went to another than expected. Without
/// them, the stream's own refusals are the only limit.
async fn watch_shards(stream: &Stream, shards: mpsc::Sender<Vec<Shard>>, resharded: &Notify) {
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
    loop {
        match stream.shards().await {
            Ok(listed) => {
                if shards.send(listed).await.is_err() {
                    return;
                }
                backoff.reset();
                resharded.notified().await;
            }
            Err(error) => {
                tracing::debug!("{error}; the shards' rates are not known until it works")
            }
        }
        tokio::time::sleep(backoff.next_wait()).await;
    }
}

impl Task {
    fn spawn(stop: CancellationToken, work: impl Future<Output = ()> + Send + 'static) -> Self {
        Self { stop, running: tokio::spawn(work) }
    }

    async fn end(mut self) {
        self.stop.cancel();
        // A panic was reported when it happened.
        let _ = (&mut self.running).await;
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Messages of one partition key, in order. Cheap to clone; when the last clone is dropped, what it has
/// sent is put without waiting for more.
#[derive(Clone)]
pub struct Lane(Arc<OpenLane>);

struct OpenLane {
    id: LaneId,
    partition_key: String,
    shared: Arc<Shared>,
}

impl Lane {
    /// Sends one OCS message of 1 byte to 128 KiB, without its end byte, received now. Waits while the spool is
    /// full; AWS is not waited for. An error says that the message was not taken.
    pub async fn send(&self, raw: impl AsRef<[u8]>) -> Result<Receipt, SendError> {
        let raw = raw.as_ref();
        match raw.len() {
            0 => return Err(SendError::Empty),
            1..=MESSAGE_LIMIT_BYTES => {}
            length => return Err(SendError::TooLong { length, limit: MESSAGE_LIMIT_BYTES }),
        }
        let mut chunk = Chunk::new();
        chunk.push(&Spooled { received_at: Timestamp::now(), raw });
        let due = Instant::now() + self.shared().settings.batch.delay_of(raw);
        let (receipt, received) = oneshot::channel();
        self.append(chunk, due, vec![(0, receipt)]).await?;
        add(&self.shared().counters.messages, 1);
        Ok(Receipt(received))
    }

    /// Completes when Kinesis has all that was sent in this lane until now. An error if the producer ends
    /// first.
    pub async fn flush(&self) -> Result<(), SendError> {
        self.shared().flush(Some(self.0.id)).await
    }

    /// The same for messages that were received together, none of them empty or too long.
    async fn send_all(
        &self,
        messages: &[Vec<u8>],
        received_at: Timestamp,
    ) -> Result<(), SendError> {
        let now = Instant::now();
        let mut rest = messages;
        while !rest.is_empty() {
            let mut chunk = Chunk::new();
            let mut delay = Duration::MAX;
            while let Some((raw, after)) = rest.split_first()
                && !chunk.is_full()
            {
                chunk.push(&Spooled { received_at, raw });
                delay = delay.min(self.shared().settings.batch.delay_of(raw));
                rest = after;
            }
            let count = chunk.messages();
            self.append(chunk, now + delay, Vec::new()).await?;
            add(&self.shared().counters.messages, count);
        }
        Ok(())
    }

    async fn append(
        &self,
        chunk: Chunk,
        due: Instant,
        receipts: Vec<(u64, oneshot::Sender<StoredAt>)>,
    ) -> Result<(), SendError> {
        let Room { spool, memory, .. } = &*self.shared().room;
        // A chunk is far smaller than each of the two.
        let bytes = u32::try_from(chunk.spooled_bytes()).unwrap_or(u32::MAX);
        let room = memory.clone().acquire_many_owned(bytes).await.map_err(|_| SendError::Closed)?;
        spool.acquire_many(bytes).await.map_err(|_| SendError::Closed)?.forget();
        let request = Request::Append { lane: self.0.id, chunk, due, receipts, room };
        self.shared().requests.send(request).map_err(|_| SendError::Closed)
    }

    fn shared(&self) -> &Shared {
        &self.0.shared
    }
}

impl Drop for OpenLane {
    fn drop(&mut self) {
        // Whoever opens it again from now on gets a new lane, which waits for this one.
        lock(&self.shared.lanes)
            .extract_if(|key, lane| *key == self.partition_key && lane.strong_count() == 0)
            .for_each(drop);
        let _ = self.shared.requests.send(Request::Close { lane: self.id });
    }
}

impl Shared {
    fn lane(self: &Arc<Self>, partition_key: &str, source_ip: Option<IpAddr>) -> Lane {
        let mut lanes = lock(&self.lanes);
        if let Some(open) = lanes.get(partition_key).and_then(Weak::upgrade) {
            return Lane(open);
        }
        let id = self.next_lane.fetch_add(1, Ordering::Relaxed);
        let partition_key = partition_key.to_owned();
        let info = LaneInfo {
            partition_key: partition_key.clone(),
            source: self.settings.source.clone(),
            source_ip,
        };
        // A closed producer says so when a message is sent.
        let _ = self.requests.send(Request::Open { lane: id, info });
        let open = Arc::new(OpenLane { id, partition_key, shared: self.clone() });
        lanes.insert(open.partition_key.clone(), Arc::downgrade(&open));
        Lane(open)
    }

    async fn flush(&self, lane: Option<LaneId>) -> Result<(), SendError> {
        let (done, concerned) = oneshot::channel();
        self.requests.send(Request::Flush { lane, done }).map_err(|_| SendError::Closed)?;
        for flushed in concerned.await.map_err(|_| SendError::Closed)? {
            flushed.await.map_err(|_| SendError::Closed)?;
        }
        Ok(())
    }
}

impl Counters {
    fn report(&self) -> ProducerReport {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ProducerReport {
            connections: read(&self.connections),
            refused_connections: read(&self.refused_connections),
            messages: read(&self.messages),
            left: read(&self.left),
            put: read(&self.put),
            records: read(&self.records),
            bytes: read(&self.bytes),
            commits: read(&self.commits),
            heartbeats: read(&self.heartbeats),
            empty_frames: read(&self.empty_frames),
            dead_letters: read(&self.dead_letters),
            missing: read(&self.missing),
        }
    }
}

#[cfg(test)]
mod tests;
