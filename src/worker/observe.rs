//! What a running worker tells of itself.
//!
//! The tasks note; whoever has an [`Observer`] reads, at any time and without holding them up.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use tokio::time::Instant;

use super::{
    Report,
    watchdog::{Activity, Step},
};
use crate::{
    checkpoint::Checkpoint,
    latency::{Latency, LatencySummary},
    lease::{HeldLease, LeaseStore, Trouble},
    shard::ShardId,
};

/// Tells how a worker is doing while it runs. Cloning it is cheap, and asking holds nothing up.
///
/// ```no_run
/// # async fn example(worker: tramline::WorkerBuilder<()>) -> Result<(), tramline::WorkerError> {
/// # let worker = worker.handler(|_| tramline::feed::Stdout::new(Default::default()).unwrap());
/// let worker = worker.build().await?;
/// let observer = worker.observer();
/// tokio::spawn(async move {
///     loop {
///         tokio::time::sleep(std::time::Duration::from_secs(60)).await;
///         for shard in observer.status().shards {
///             println!("{} is {:?} behind", shard.shard, shard.behind);
///         }
///     }
/// });
/// worker.run(tramline::shutdown_signal()).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Observer(pub(super) Arc<Observed>);

/// How a worker is doing.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct WorkerStatus {
    /// Its name in the lease table ([`WorkerBuilder::worker_id`](crate::WorkerBuilder::worker_id)).
    pub worker: String,
    /// How long it runs; zero before it does.
    pub uptime: Duration,
    /// What it did since it started.
    pub counts: Report,
    /// How leases came and went.
    pub leases: LeaseMoves,
    /// How long ago it last lost a lease; `None` if it never did.
    pub last_lost: Option<Duration>,
    /// How long ago it last looked for leases with success; `None` before it has.
    pub looked: Option<Duration>,
    /// Why its last look for leases failed, if it did.
    pub look_error: Option<String>,
    /// Whether it is to stop.
    pub stopping: bool,
    /// How long a shard may not get on before it counts as stuck.
    pub watchdog: Duration,
    /// How long a lease lasts.
    pub lease_duration: Duration,
    /// The shards that it reads, by name.
    pub shards: Vec<ShardStatus>,
}

/// How leases came to a worker and went from it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LeaseMoves {
    /// Taken.
    pub taken: u64,
    /// Given to another worker that asked.
    pub handed_over: u64,
    /// Lost to another worker, or not renewed in time.
    pub lost: u64,
    /// Let go of at a stop, at the end of a window or because the shard did not get on.
    pub released: u64,
    /// Of shards that were read to their end.
    pub finished: u64,
}

/// How a worker gets on with one shard.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ShardStatus {
    /// The stream's name.
    pub stream: String,
    /// The shard.
    pub shard: ShardId,
    /// The lease's counter when the lease was taken.
    pub lease_counter: u64,
    /// What the shard's task waits for.
    pub waits_for: String,
    /// How long it has waited for that.
    pub waits: Duration,
    /// Whether it stopped because of a failure, and waits for a repair.
    pub parked: bool,
    /// Whether what it waits for has a limit of its own, so that waiting is no sign of trouble.
    pub bounded: bool,
    /// How far it is behind the stream's tip, where that is known.
    pub behind: Option<Duration>,
    /// The last checkpoint that is stored.
    pub checkpoint: String,
    /// How long something is finished that is not stored; zero if all that is finished is stored.
    pub checkpoint_age: Duration,
    /// What was counted since the lease was taken.
    pub counts: Report,
    /// Bytes of the records that were read.
    pub bytes: u64,
    /// How long the handler took for a batch, each attempt by itself.
    pub handler: LatencySummary,
    /// What last kept it from getting on.
    pub error: Option<String>,
    /// When that began, or, if it is over, ended.
    pub error_at: Option<Timestamp>,
    /// Whether it gets on again.
    pub error_is_over: bool,
}

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Observer").field(&self.status()).finish()
    }
}

impl Observer {
    /// How the worker is doing now.
    pub fn status(&self) -> WorkerStatus {
        self.0.status(Instant::now())
    }
}

/// Counts of a worker, or of one of its shards.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub records: AtomicU64,
    pub messages: AtomicU64,
    pub undecodable: AtomicU64,
    pub failed_attempts: AtomicU64,
    pub dead_letters: AtomicU64,
    pub skipped: AtomicU64,
    pub stuck: AtomicU64,
    pub misplaced: AtomicU64,
}

impl Counts {
    pub(super) fn report(&self) -> Report {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Report {
            records: read(&self.records),
            messages: read(&self.messages),
            undecodable: read(&self.undecodable),
            failed_attempts: read(&self.failed_attempts),
            dead_letters: read(&self.dead_letters),
            skipped: read(&self.skipped),
            stuck: read(&self.stuck),
            misplaced: read(&self.misplaced),
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct MoveCounts {
    pub taken: AtomicU64,
    pub handed_over: AtomicU64,
    pub lost: AtomicU64,
    pub released: AtomicU64,
    pub finished: AtomicU64,
}

/// What the tasks of a worker note together.
pub(super) struct Observed {
    worker: String,
    watchdog: Duration,
    lease_duration: Duration,
    counts: Counts,
    pub moves: MoveCounts,
    /// When it was told to run.
    started: Mutex<Option<Instant>>,
    lost_at: Mutex<Option<Instant>>,
    /// When the last record was read or handled.
    active_at: Mutex<Instant>,
    looks: Mutex<Looks>,
    shards: Mutex<BTreeMap<ShardId, Arc<ShardMeter>>>,
}

#[derive(Debug, Default)]
struct Looks {
    succeeded_at: Option<Instant>,
    error: Option<String>,
    stopping: bool,
}

impl Observed {
    pub(super) fn new(worker: String, watchdog: Duration, lease_duration: Duration) -> Self {
        Self {
            worker,
            watchdog,
            lease_duration,
            counts: Counts::default(),
            moves: MoveCounts::default(),
            started: Mutex::new(None),
            lost_at: Mutex::new(None),
            active_at: Instant::now().into(),
            looks: Mutex::default(),
            shards: Mutex::default(),
        }
    }

    pub(super) fn note_start(&self) {
        let now = Instant::now();
        *lock(&self.started) = Some(now);
        *lock(&self.active_at) = now;
    }

    /// Notes how a look for leases went.
    pub(super) fn note_look(&self, error: Option<String>) {
        let mut looks = lock(&self.looks);
        if error.is_none() {
            looks.succeeded_at = Some(Instant::now());
        }
        looks.error = error;
    }

    pub(super) fn note_stop(&self) {
        lock(&self.looks).stopping = true;
    }

    pub(super) fn note_loss(&self) {
        *lock(&self.lost_at) = Some(Instant::now());
    }

    pub(super) fn note_activity(&self) {
        *lock(&self.active_at) = Instant::now();
    }

    pub(super) fn quiet_for(&self) -> Duration {
        lock(&self.active_at).elapsed()
    }

    pub(super) fn report(&self) -> Report {
        self.counts.report()
    }

    /// The meter of a shard whose reading begins.
    pub(super) fn begin<S: LeaseStore>(
        self: &Arc<Self>,
        stream: String,
        shard: ShardId,
        held: Arc<HeldLease<S>>,
        activity: Arc<Activity>,
    ) -> Arc<ShardMeter> {
        let now = Instant::now();
        let meter = Arc::new(ShardMeter {
            all: self.clone(),
            stream,
            held,
            activity,
            counts: Counts::default(),
            bytes: AtomicU64::new(0),
            handler: Latency::new(now).into(),
            stored: Mutex::new(Stored {
                checkpoint: String::new(),
                lease_counter: 0,
                at: now,
                all: true,
            }),
        });
        lock(&self.shards).insert(shard, meter.clone());
        meter
    }

    /// Forgets a shard that is not read any more.
    pub(super) fn end(&self, shard: &ShardId) {
        lock(&self.shards).remove(shard);
    }

    fn status(&self, now: Instant) -> WorkerStatus {
        let since = |at: Option<Instant>| at.map(|at| now.saturating_duration_since(at));
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let shards: Vec<(ShardId, Arc<ShardMeter>)> =
            lock(&self.shards).iter().map(|(id, meter)| (id.clone(), meter.clone())).collect();
        let looks = lock(&self.looks);
        WorkerStatus {
            worker: self.worker.clone(),
            uptime: since(*lock(&self.started)).unwrap_or_default(),
            counts: self.report(),
            leases: LeaseMoves {
                taken: read(&self.moves.taken),
                handed_over: read(&self.moves.handed_over),
                lost: read(&self.moves.lost),
                released: read(&self.moves.released),
                finished: read(&self.moves.finished),
            },
            last_lost: since(*lock(&self.lost_at)),
            looked: since(looks.succeeded_at),
            look_error: looks.error.clone(),
            stopping: looks.stopping,
            watchdog: self.watchdog,
            lease_duration: self.lease_duration,
            shards: shards.into_iter().map(|(id, meter)| meter.status(id, now)).collect(),
        }
    }
}

/// What of a lease is told, whatever the store that it is in.
trait Reading: Send + Sync {
    fn behind(&self) -> Option<Duration>;
    fn trouble(&self) -> Option<Trouble>;
}

impl<S: LeaseStore> Reading for HeldLease<S> {
    fn behind(&self) -> Option<Duration> {
        self.behind()
    }

    fn trouble(&self) -> Option<Trouble> {
        self.trouble()
    }
}

/// What the task of one shard notes.
pub(super) struct ShardMeter {
    all: Arc<Observed>,
    stream: String,
    held: Arc<dyn Reading>,
    activity: Arc<Activity>,
    counts: Counts,
    bytes: AtomicU64,
    handler: Mutex<Latency>,
    stored: Mutex<Stored>,
}

#[derive(Debug)]
struct Stored {
    checkpoint: String,
    lease_counter: u64,
    at: Instant,
    /// Whether nothing is finished beyond it.
    all: bool,
}

impl ShardMeter {
    /// Counts `n` for the shard and for the worker.
    pub(super) fn count(&self, of: fn(&Counts) -> &AtomicU64, n: u64) {
        of(&self.counts).fetch_add(n, Ordering::Relaxed);
        of(&self.all.counts).fetch_add(n, Ordering::Relaxed);
    }

    pub(super) fn count_bytes(&self, n: u64) {
        self.bytes.fetch_add(n, Ordering::Relaxed);
    }

    pub(super) fn note_activity(&self) {
        self.all.note_activity();
    }

    pub(super) fn note_attempt(&self, took: Duration) {
        lock(&self.handler).note(took, Instant::now());
    }

    /// Notes where reading goes on, with the lease as it was taken.
    pub(super) fn note_opened(&self, lease_counter: u64, checkpoint: &Checkpoint) {
        let checkpoint = checkpoint.to_string();
        let at = Instant::now();
        *lock(&self.stored) = Stored { checkpoint, lease_counter, at, all: true };
    }

    pub(super) fn note_stored(&self, checkpoint: &Checkpoint) {
        let mut stored = lock(&self.stored);
        stored.checkpoint = checkpoint.to_string();
        (stored.at, stored.all) = (Instant::now(), true);
    }

    /// Notes that more is finished than is stored.
    pub(super) fn note_unstored(&self) {
        let mut stored = lock(&self.stored);
        if std::mem::take(&mut stored.all) {
            stored.at = Instant::now();
        }
    }

    fn status(&self, shard: ShardId, now: Instant) -> ShardStatus {
        let doing = self.activity.now();
        let trouble = self.held.trouble();
        let stored = lock(&self.stored);
        let stored_ago = now.saturating_duration_since(stored.at);
        ShardStatus {
            stream: self.stream.clone(),
            shard,
            lease_counter: stored.lease_counter,
            waits_for: doing.step.to_string(),
            waits: now.saturating_duration_since(doing.since),
            parked: doing.step == Step::Parked,
            bounded: doing.step.is_bounded(),
            behind: self.held.behind(),
            checkpoint: stored.checkpoint.clone(),
            checkpoint_age: if stored.all { Duration::ZERO } else { stored_ago },
            counts: self.counts.report(),
            bytes: self.bytes.load(Ordering::Relaxed),
            handler: lock(&self.handler).summary(now),
            error_at: trouble.as_ref().map(|trouble| trouble.at),
            error_is_over: trouble.as_ref().is_some_and(|trouble| trouble.is_over),
            error: trouble.map(|trouble| trouble.text),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poison| poison.into_inner())
}

/// A worker that reads `shards` shards of stream `s` and is well.
#[cfg(test)]
pub(crate) fn status_of(shards: usize) -> WorkerStatus {
    let shard = |n: usize| ShardStatus {
        stream: "s".to_owned(),
        shard: format!("shardId-{n:012}").as_str().into(),
        lease_counter: 1,
        waits_for: Step::Reads.to_string(),
        waits: Duration::from_millis(200),
        parked: false,
        bounded: false,
        behind: Some(Duration::from_millis(1500)),
        checkpoint: "TRIM_HORIZON".to_owned(),
        checkpoint_age: Duration::ZERO,
        counts: Report::default(),
        bytes: 0,
        handler: LatencySummary { count: 1, ..LatencySummary::default() },
        error: None,
        error_at: None,
        error_is_over: false,
    };
    WorkerStatus {
        worker: "w".to_owned(),
        uptime: Duration::from_secs(3600),
        counts: Report::default(),
        leases: LeaseMoves { taken: shards as u64, ..LeaseMoves::default() },
        last_lost: None,
        looked: Some(Duration::from_secs(1)),
        look_error: None,
        stopping: false,
        watchdog: Duration::from_secs(120),
        lease_duration: Duration::from_secs(10),
        shards: (0..shards).map(shard).collect(),
    }
}
