//! The running of it: one worker per process, one task per shard that it owns.
//!
//! ```text
//! Worker::run ── LeaseLoop: looks at the lease table, takes, asks for and hands over leases
//!     └─ one task per shard:  Prefetch → unpack → Handler → checkpoint
//!            └─ HeldLease: renewed on the side, whatever the handler does
//! ```

mod settings;
mod shard_task;
mod signal;

use std::{
    collections::BTreeMap,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

pub use settings::{StartPosition, WorkerBuilder};
pub use signal::shutdown_signal;

use crate::{
    handler::Handler,
    lease::{
        self, HeldLease, InitialPosition, LeaseError, LeaseLoop, Looked, dynamodb::LeaseTable,
    },
    shard::ShardId,
    source::{SourceError, Stream},
};
use settings::Settings;
use shard_task::{Outcome, ShardTask};

/// How long to wait when the lease table cannot be looked at.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// How often the stream is asked for new shards; besides, it is asked whenever a shard ends.
const DISCOVERY_INTERVAL: Duration = Duration::from_secs(60);
const IDLE_CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// Reads a stream: takes leases, hands messages to one handler per shard, and checkpoints.
///
/// Made by [`Worker::builder`]; runs until it is told to stop.
pub struct Worker<F> {
    stream: Stream,
    table: LeaseTable,
    settings: Settings,
    make_handler: F,
}

/// What a worker did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// Records read.
    pub records: u64,
    /// Messages that the handler finished.
    pub messages: u64,
    /// Parts of records that are not raw OCS messages; they were written to stderr.
    pub undecodable: u64,
}

/// Why a worker could not start, or stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// The stream cannot be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The lease table cannot be used.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// The start position is a time that has not come.
    #[error(
        "the start position {start} is in the future; choose a time that has passed, or latest"
    )]
    StartInFuture {
        /// The time.
        start: Timestamp,
    },
    /// A name that AWS does not take.
    #[error(
        "{name:?} cannot name {what}: write {least} to {most} letters, digits, dots, underscores and \
         hyphens"
    )]
    Name {
        /// The name.
        name: String,
        /// What it was to name.
        what: &'static str,
        /// The fewest characters.
        least: usize,
        /// The most characters.
        most: usize,
    },
    /// A handler did not finish a batch.
    #[error(
        "shard {shard}: the handler failed {attempts} times at sequence number {sequence_number}: \
         {reason}; the worker stops, and reads the batch again when it is restarted"
    )]
    Handler {
        /// The shard.
        shard: ShardId,
        /// The first record of the batch.
        sequence_number: String,
        /// How often the batch was offered.
        attempts: u32,
        /// The handler's error.
        reason: String,
    },
    /// A handler panicked.
    #[error("shard {shard}: the handler panicked; the worker stops: {reason}")]
    Panic {
        /// The shard.
        shard: ShardId,
        /// What the panic said.
        reason: String,
    },
    /// The lease ran out during the stop.
    #[error(
        "shard {shard}: its lease was lost during the stop, before the last checkpoint was stored: \
         what was handled since the one before comes again"
    )]
    NotStored {
        /// The shard.
        shard: ShardId,
    },
    /// Shards were still busy at the shutdown limit.
    #[error(
        "{shards} shards did not stop within {limit:?}: their last batch is read again after a \
         restart, and their leases are free after {lease_duration:?}"
    )]
    ShutdownLimit {
        /// How many.
        shards: usize,
        /// The limit.
        limit: Duration,
        /// The time after which other workers take the leases.
        lease_duration: Duration,
    },
}

/// Counts that the tasks of a worker share.
#[derive(Debug)]
struct Counters {
    records: AtomicU64,
    messages: AtomicU64,
    undecodable: AtomicU64,
    started: Instant,
    /// When the last record was read or handled, in milliseconds after `started`.
    active_millis: AtomicU64,
}

impl Counters {
    fn new() -> Self {
        Self {
            records: AtomicU64::new(0),
            messages: AtomicU64::new(0),
            undecodable: AtomicU64::new(0),
            started: Instant::now(),
            active_millis: AtomicU64::new(0),
        }
    }

    fn note_activity(&self) {
        let millis = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.active_millis.fetch_max(millis, Ordering::Relaxed);
    }

    fn quiet_for(&self) -> Duration {
        let active = Duration::from_millis(self.active_millis.load(Ordering::Relaxed));
        self.started.elapsed().saturating_sub(active)
    }

    fn report(&self) -> Report {
        Report {
            records: self.records.load(Ordering::Relaxed),
            messages: self.messages.load(Ordering::Relaxed),
            undecodable: self.undecodable.load(Ordering::Relaxed),
        }
    }
}

impl WorkerError {
    /// Whether no waiting helps: the lease table or the stream was deleted, or made again.
    fn is_final(&self) -> bool {
        match self {
            Self::Source(error) => matches!(error, SourceError::NoStream { .. }),
            Self::Lease(LeaseError::Outlived { .. } | LeaseError::NoTable { .. }) => true,
            _ => false,
        }
    }

    /// Whether waiting may help although nothing worked yet: the set-up is right, but AWS is away or busy.
    fn is_transient(&self) -> bool {
        match self {
            Self::Source(error) => error.is_transient(),
            Self::Lease(LeaseError::Table { source, .. }) => source.is_transient(),
            _ => false,
        }
    }
}

impl Worker<()> {
    /// Starts to describe a worker of `application` that reads `stream`.
    ///
    /// The application's name is that of its lease table and of its fan-out consumer. Workers of one
    /// application share the stream's shards; each application gets every message.
    pub fn builder(
        config: &aws_types::SdkConfig,
        stream: impl Into<String>,
        application: impl Into<String>,
    ) -> WorkerBuilder<()> {
        WorkerBuilder::new(config, stream.into(), application.into())
    }
}

impl<F, H> Worker<F>
where
    F: Fn(&ShardId) -> H,
    H: Handler,
{
    /// Reads until `shutdown` completes, then stops cleanly: running batches finish, last checkpoints
    /// are written, leases are given up (P6).
    pub async fn run(
        self,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<Report, WorkerError> {
        let mut shutdown = pin!(shutdown);
        let counters = Arc::new(Counters::new());
        let mut running = Running {
            initial: self.settings.start.at(Timestamp::now()),
            stop: CancellationToken::new(),
            tasks: JoinSet::new(),
            shard_of_task: BTreeMap::new(),
            leases: LeaseLoop::new(
                self.table.clone(),
                lease::Settings {
                    worker: self.settings.worker_id.clone(),
                    max_leases: self.settings.max_leases,
                    lease_duration: self.settings.lease_duration,
                    hand_over_limit: self.settings.hand_over_limit,
                    finished_kept_for: lease::FINISHED_KEPT_FOR,
                    seed: rand::random(),
                },
            ),
            discover_at: None,
            failing: false,
            counters: counters.clone(),
            worker: &self,
        };
        let idle_limit = self.settings.stop_when_idle;
        let stop = running.stop.clone();
        let mut look_at = Instant::now();
        let result = loop {
            tokio::select! {
                biased;
                () = &mut shutdown => break Ok(()),
                Some(done) = running.tasks.join_next_with_id() => {
                    match running.task_done(done) {
                        Ok(look_again) if look_again => look_at = Instant::now(),
                        Ok(_) => {}
                        Err(error) => break Err(error),
                    }
                }
                () = tokio::time::sleep(IDLE_CHECK_INTERVAL), if idle_limit.is_some() => {
                    if idle_limit.is_some_and(|limit| running.is_idle(limit)) {
                        tracing::info!(stream = self.stream.name(), "nothing new: stopping");
                        break Ok(());
                    }
                }
                () = sleep_until(look_at) => {
                    let mut look = pin!(running.look());
                    // A look is not cut off, or a lease just taken would have nobody to read it. But
                    // the shards stop at once.
                    let looked = tokio::select! {
                        biased;
                        looked = &mut look => looked,
                        () = &mut shutdown => {
                            stop.cancel();
                            look.await
                        }
                    };
                    match looked {
                        Ok(_) if stop.is_cancelled() => break Ok(()),
                        Ok(again_at) => look_at = again_at,
                        Err(error) => break Err(error),
                    }
                }
            }
        };
        let stopped = running.stop().await;
        let report = counters.report();
        tracing::info!(
            stream = self.stream.name(),
            records = report.records,
            messages = report.messages,
            undecodable = report.undecodable,
            "worker stopped"
        );
        result.and(stopped).map(|()| report)
    }
}

/// The state of a running worker.
struct Running<'a, F> {
    worker: &'a Worker<F>,
    initial: InitialPosition,
    stop: CancellationToken,
    tasks: JoinSet<Outcome>,
    shard_of_task: BTreeMap<tokio::task::Id, ShardId>,
    leases: LeaseLoop<LeaseTable>,
    /// When to ask for shards next; `None` means now.
    discover_at: Option<Instant>,
    /// Whether the last look failed, so that an outage is told once.
    failing: bool,
    counters: Arc<Counters>,
}

type Joined = Result<(tokio::task::Id, Outcome), tokio::task::JoinError>;

impl<F, H> Running<'_, F>
where
    F: Fn(&ShardId) -> H,
    H: Handler,
{
    /// Looks at the table, starts to read what it got, and tells when to look again. An error ends the
    /// worker.
    async fn look(&mut self) -> Result<Instant, WorkerError> {
        let had_looked = self.leases.has_looked();
        let span = tracing::info_span!("worker", stream = self.worker.stream.name());
        let (again_at, error) = match self.try_look().instrument(span).await {
            Ok((looked, error)) => {
                for held in looked.taken {
                    self.start(held).await;
                }
                (looked.again_at, error)
            }
            // What never worked is a mistake in the set-up. What worked once may work again.
            Err(error) if error.is_final() || !(had_looked || error.is_transient()) => {
                return Err(error);
            }
            Err(error) => (Instant::now() + LOOK_AGAIN, Some(error)),
        };
        match &error {
            None if self.failing => tracing::info!("looking for leases works again"),
            Some(error) if !self.failing => tracing::warn!(
                "looking for leases failed: {error}; the shards that this worker has are read on; \
                 trying again"
            ),
            _ => {}
        }
        self.failing = error.is_some();
        Ok(again_at)
    }

    /// Looks, and tells what went wrong without making the look useless.
    async fn try_look(&mut self) -> Result<(Looked<LeaseTable>, Option<WorkerError>), WorkerError> {
        // A worker that only watches the bell leaves discovery to those that watch the table.
        let due = self.discover_at.is_none_or(|at| Instant::now() >= at);
        let listed = if due && !self.leases.watches_bell() {
            let listed = tokio::select! {
                listed = self.worker.stream.shards() => listed,
                () = self.stop.cancelled() => {
                    let looked = Looked { taken: Vec::new(), again_at: Instant::now(), error: None };
                    return Ok((looked, None));
                }
            };
            Some(listed.map_err(WorkerError::from))
        } else {
            None
        };
        let (listed, unlisted) = match listed.transpose() {
            Ok(listed) => (listed, None),
            // The leases that exist can be taken and handed over all the same.
            Err(error) if self.leases.has_looked() && !error.is_final() => (None, Some(error)),
            Err(error) => return Err(error),
        };
        let discovered = listed.as_deref().map(|listed| (listed, self.initial));
        let mut looked = self.leases.look(discovered).await?;
        if listed.is_some() {
            self.discover_at = Some(Instant::now() + DISCOVERY_INTERVAL);
        }
        let error = looked.error.take().map(WorkerError::from);
        Ok((looked, unlisted.or(error)))
    }

    async fn start(&mut self, held: Arc<HeldLease<LeaseTable>>) {
        let shard = held.lease().await.shard;
        let task = ShardTask {
            stream: self.worker.stream.clone(),
            held,
            initial: self.initial,
            stop: self.stop.clone(),
            counters: self.counters.clone(),
            settings: self.worker.settings.clone(),
        };
        self.counters.note_activity();
        let id = self.tasks.spawn(task.run((self.worker.make_handler)(&shard))).id();
        self.shard_of_task.insert(id, shard);
    }

    /// Takes note of a task that is over. Tells whether to look at the table at once.
    fn task_done(&mut self, done: Joined) -> Result<bool, WorkerError> {
        let id = match &done {
            Ok((id, _)) => *id,
            Err(error) => error.id(),
        };
        let shard = self.shard_of_task.remove(&id).unwrap_or_else(|| "unknown".into());
        self.leases.done(&shard);
        match done {
            Ok((_, Outcome::Ended)) => {
                self.counters.note_activity();
                self.discover_at = None;
                Ok(true)
            }
            // There is another worker: from now on its leases are watched too.
            Ok((_, Outcome::HandedOver | Outcome::Lost)) => Ok(true),
            Ok((_, Outcome::Stopped)) => Ok(false),
            Ok((_, Outcome::Failed(error))) => Err(error),
            Err(error) => Err(WorkerError::Panic { shard, reason: panic_text(error) }),
        }
    }

    /// Whether every shard has been at its tip for `limit`.
    fn is_idle(&self, limit: Duration) -> bool {
        self.leases.has_looked()
            && !self.leases.unattended()
            && self.leases.held().all(|held| held.is_caught_up())
            && self.counters.quiet_for() >= limit
    }

    async fn stop(mut self) -> Result<(), WorkerError> {
        self.stop.cancel();
        let limit = self.worker.settings.shutdown_limit;
        let give_up = Instant::now() + limit;
        let mut result = Ok(());
        loop {
            match tokio::time::timeout_at(give_up, self.tasks.join_next_with_id()).await {
                Ok(None) => break,
                Ok(Some(done)) => result = result.and(self.task_done(done).map(|_| ())),
                Err(_) => {
                    return Err(WorkerError::ShutdownLimit {
                        shards: self.tasks.len(),
                        limit,
                        lease_duration: self.worker.settings.lease_duration,
                    });
                }
            }
        }
        // The others need not wait until they look: there are leases to take.
        if let Err(error) = self.leases.ring().await {
            tracing::debug!("the other workers were not told of the stop: {error}");
        }
        result
    }
}

fn panic_text(error: tokio::task::JoinError) -> String {
    match error.try_into_panic() {
        Ok(panic) => panic
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "no text".to_owned()),
        Err(error) => error.to_string(),
    }
}
