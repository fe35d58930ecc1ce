//! The running of it: one worker per process, one task per shard that it owns.
//!
//! ```text
//! Worker::run ── LeaseLoop: looks at the lease table, takes, asks for and hands over leases
//!     └─ one task per shard:  Prefetch → unpack → Handler → checkpoint
//!            └─ HeldLease: renewed on the side, whatever the handler does
//! ```

mod delivery;
mod messages;
mod observe;
mod reset;
mod settings;
mod shard_task;
mod signal;
mod watchdog;

use std::{
    any::Any,
    collections::BTreeMap,
    pin::pin,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use jiff::Timestamp;
use tokio::{
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

pub use messages::{Messages, Poller, Received};
#[cfg(all(test, feature = "cli"))]
pub(crate) use observe::status_of;
pub use observe::{LeaseMoves, Observer, ShardStatus, WorkerStatus};
pub use settings::{Load, MaxCheckpointAge, StartPosition, WorkerBuilder};
pub use signal::shutdown_signal;
pub use watchdog::OnStuck;

use crate::{
    checkpoint::{StateError, StateStore},
    handler::{DeadLetterError, DeadLetterStore, Handler},
    lease::{
        self, Change, HeldLease, InitialPosition, LeaseError, LeaseLoop, LeaseStore, Looked,
        MemoryTable, dynamodb::LeaseTable, reset::ResetError,
    },
    shard::ShardId,
    source::{SourceError, Streams},
};
use observe::{Observed, ShardMeter};
use settings::Settings;
use shard_task::{Outcome, ShardTask};
use watchdog::{Activity, Finding, Step, Watched};

/// How long to wait when the lease table cannot be looked at.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// How often the stream is asked for new shards; besides, it is asked whenever a shard ends.
const DISCOVERY_INTERVAL: Duration = Duration::from_secs(60);
/// How often a worker looks whether there is nothing left to do.
const STATE_CHECK_INTERVAL: Duration = Duration::from_millis(250);
/// How often shards are looked at that may not get on: a quarter of the limit, within these.
const WATCH_AT_MOST_EVERY: Duration = Duration::from_millis(50);
const WATCH_AT_LEAST_EVERY: Duration = Duration::from_secs(5);

/// Reads streams: takes leases, hands messages to one handler per shard, and checkpoints.
///
/// Made by [`Worker::builder`]; runs until it is told to stop. The [front page](crate#a-service-in-one-page)
/// has a whole service.
///
/// Any number of workers of one application, in one process or in many, share the shards of its streams.
/// Each shard that a worker reads has a task of its own, with a handler of its own.
///
/// ```no_run
/// # async fn example<F, H>(worker: tramline::Worker<F>) -> Result<(), tramline::WorkerError>
/// # where F: Fn(&tramline::ShardId) -> H, H: tramline::Handler {
/// let report = worker.run(tramline::shutdown_signal()).await?;
/// println!("{} messages are finished", report.messages);
/// # Ok(())
/// # }
/// ```
#[must_use = "a worker does nothing until it runs"]
pub struct Worker<F> {
    streams: Streams,
    leases: Leases,
    state: Option<Arc<StateStore>>,
    letters: Arc<DeadLetterStore>,
    settings: Settings,
    observed: Arc<Observed>,
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
    /// Parts of records that are not raw OCS messages; they went to the dead letters.
    pub undecodable: u64,
    /// How often the handler failed, timed out or panicked.
    pub failed_attempts: u64,
    /// Dead letters that were stored.
    pub dead_letters: u64,
    /// Messages that were skipped because the handler failed on them.
    pub skipped: u64,
    /// How often a shard was found not to get on.
    pub stuck: u64,
    /// KPL aggregates that were left out because a user record in them belongs to another shard.
    pub misplaced: u64,
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
    /// The start position cannot be applied anew, because a worker reads a shard.
    #[error(
        "not reset: shard {shard} is read by {worker}; stop every worker of the application, start one \
         with the reset, and then the others without it"
    )]
    ResetRefused {
        /// The shard.
        shard: ShardId,
        /// The worker.
        worker: String,
    },
    /// The start position cannot be applied anew.
    #[error(transparent)]
    Reset(#[from] ResetError),
    /// The start position is a time that has not come.
    #[error(
        "the start position {start} is in the future; choose a time that has passed, or latest"
    )]
    StartInFuture {
        /// The time.
        start: Timestamp,
    },
    /// A place for checkpoints is set, and that none are to be stored.
    #[error("checkpoints are to be stored and not to be stored; choose one")]
    CheckpointsAndNone,
    /// A stream is named twice.
    #[error("stream {stream} is named twice; name each stream once")]
    StreamTwice {
        /// The stream.
        stream: String,
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
         {reason}; the shard stops before it, and goes on there when the worker is restarted: repair what \
         the handler needs, or set a place for dead letters"
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
    /// More messages failed than are tolerated.
    #[error(
        "shard {shard}: more than {percent} % of its messages failed, the last at sequence number \
         {sequence_number}: {reason}; the shard stops before it, and goes on there when the worker is \
         restarted"
    )]
    TooManyFailures {
        /// The shard.
        shard: ShardId,
        /// The record of the last one.
        sequence_number: String,
        /// How many of a hundred are tolerated.
        percent: f64,
        /// The handler's error.
        reason: String,
    },
    /// Positions and state cannot be kept.
    #[error(transparent)]
    State(#[from] StateError),
    /// A handler has state and there is no place for it.
    #[error(
        "shard {shard}: the handler has state, which the lease table has no place for; keep checkpoints \
         in S3 or in a file"
    )]
    NoPlaceForState {
        /// The shard.
        shard: ShardId,
    },
    /// The state that was stored cannot be taken up, or that of the handler cannot be stored.
    #[error("shard {shard}: the handler cannot {what} its state: {reason}; the worker stops")]
    HandlerState {
        /// The shard.
        shard: ShardId,
        /// What it was to do.
        what: &'static str,
        /// The handler's error.
        reason: String,
    },
    /// Dead letters cannot be stored.
    #[error(transparent)]
    DeadLetters(#[from] DeadLetterError),
    /// A handler panicked while no batch was under way.
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

impl WorkerError {
    /// Whether it stops a shard and not the worker.
    fn is_of_one_shard(&self) -> bool {
        matches!(self, Self::Handler { .. } | Self::TooManyFailures { .. } | Self::DeadLetters(_))
    }

    /// Whether no waiting helps: the lease table or the stream was deleted, or made again.
    fn is_final(&self) -> bool {
        match self {
            Self::Source(error) => error.is_final(),
            Self::Lease(
                LeaseError::Outlived { .. }
                | LeaseError::NoTable { .. }
                | LeaseError::OtherKeys { .. },
            ) => true,
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
    /// Starts to describe a worker of `application` that reads `stream`, by its name.
    ///
    /// The application's name is that of its lease table and of its fan-out consumer: 3 to 128 letters,
    /// digits, dots, underscores and hyphens (AWS API reference, CreateTable and RegisterStreamConsumer).
    /// Workers of one application share the stream's shards; each application gets every message.
    pub fn builder(
        config: &aws_types::SdkConfig,
        stream: impl Into<String>,
        application: impl Into<String>,
    ) -> WorkerBuilder<()> {
        WorkerBuilder::new(config, stream.into(), application.into())
    }
}

/// Where the leases are.
enum Leases {
    /// In DynamoDB, shared by a fleet.
    Table(LeaseTable),
    /// In this process: it is the only worker.
    Own(MemoryTable),
}

impl<F, H> Worker<F>
where
    F: Fn(&ShardId) -> H,
    H: Handler,
{
    /// Tells how the worker is doing while it runs.
    pub fn observer(&self) -> Observer {
        Observer(self.observed.clone())
    }

    /// Reads until `shutdown` completes, then stops cleanly: running batches finish, last checkpoints
    /// are written, leases are given up (P6). It ends by itself at the end of a window
    /// ([`until`](WorkerBuilder::until)), [when idle](WorkerBuilder::stop_when_idle), or when no shard is
    /// left to read because the handlers of all have failed.
    ///
    /// Throttling, lost connections and outages of AWS are no errors: what worked once is tried until it
    /// works again. An error is something that somebody must repair, and says what. If the future is dropped
    /// instead, it is as after a crash: what was handled since the last checkpoint comes again, and the
    /// leases are free when they have run out.
    pub async fn run(
        self,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<Report, WorkerError> {
        match &self.leases {
            Leases::Table(table) => self.run_with(table.clone(), shutdown).await,
            Leases::Own(table) => self.run_with(table.clone(), shutdown).await,
        }
    }

    async fn run_with<S: LeaseStore>(
        &self,
        table: S,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<Report, WorkerError> {
        let mut shutdown = pin!(shutdown);
        self.observed.note_start();
        let mut running = Running {
            initial: self.settings.start.at(Timestamp::now()),
            stop: CancellationToken::new(),
            tasks: JoinSet::new(),
            shards: BTreeMap::new(),
            leases: LeaseLoop::new(
                table,
                lease::Settings {
                    worker: self.settings.worker_id.clone(),
                    max_leases: self.settings.max_leases,
                    lease_duration: self.settings.lease_duration,
                    hand_over_limit: self.settings.hand_over_limit,
                    finished_kept_for: lease::FINISHED_KEPT_FOR,
                    seed: rand::random(),
                    wall_clock: Timestamp::now,
                },
            ),
            discover_at: None,
            failing: false,
            worker: self,
        };
        let idle_limit = self.settings.stop_when_idle;
        let stop = running.stop.clone();
        let mut look_at = Instant::now();
        let watch_interval =
            (self.settings.watchdog / 4).clamp(WATCH_AT_MOST_EVERY, WATCH_AT_LEAST_EVERY);
        let mut watch_at = Instant::now() + watch_interval;
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
                () = tokio::time::sleep(STATE_CHECK_INTERVAL) => {
                    if running.all_parked() || running.leases.all_left() {
                        break Ok(());
                    }
                    if idle_limit.is_some_and(|limit| running.is_idle(limit)) {
                        tracing::info!(streams = self.streams.names(), "nothing new: stopping");
                        break Ok(());
                    }
                }
                () = sleep_until(watch_at) => {
                    running.watch();
                    watch_at = Instant::now() + watch_interval;
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
        self.observed.note_stop();
        let stopped = running.stop().await;
        let report = self.observed.report();
        tracing::info!(
            streams = self.streams.names(),
            records = report.records,
            messages = report.messages,
            undecodable = report.undecodable,
            dead_letters = report.dead_letters,
            skipped = report.skipped,
            stuck = report.stuck,
            misplaced = report.misplaced,
            "worker stopped"
        );
        result.and(stopped).map(|()| report)
    }
}

/// A shard whose task runs.
struct RunningShard<S> {
    id: ShardId,
    held: Arc<HeldLease<S>>,
    activity: Arc<Activity>,
    meter: Arc<ShardMeter>,
    watched: Watched,
    task: AbortHandle,
}

/// The state of a running worker.
struct Running<'a, F, S> {
    worker: &'a Worker<F>,
    initial: InitialPosition,
    stop: CancellationToken,
    tasks: JoinSet<Outcome>,
    shards: BTreeMap<tokio::task::Id, RunningShard<S>>,
    leases: LeaseLoop<S>,
    /// When to ask for shards next; `None` means now.
    discover_at: Option<Instant>,
    /// Whether the last look failed, so that an outage is told once.
    failing: bool,
}

type Joined = Result<(tokio::task::Id, Outcome), tokio::task::JoinError>;

impl<F, H, S> Running<'_, F, S>
where
    F: Fn(&ShardId) -> H,
    H: Handler,
    S: LeaseStore,
{
    /// Looks at the table, starts to read what it got, and tells when to look again. An error ends the
    /// worker.
    async fn look(&mut self) -> Result<Instant, WorkerError> {
        let had_looked = self.leases.has_looked();
        let load = Load {
            shards: self.shards.len(),
            most_behind: self.leases.held().filter_map(|held| held.behind()).max(),
        };
        self.leases.refuse(self.worker.settings.refuse_when.holds(&load));
        let span = tracing::info_span!("worker", streams = self.worker.streams.names());
        let (again_at, error) = match self.try_look().instrument(span).await {
            Ok((looked, error)) => {
                for held in looked.taken {
                    self.worker.observed.moves.taken.fetch_add(1, Ordering::Relaxed);
                    let shard = held.lease().await.shard;
                    self.start(shard, held, Arc::new(Activity::new()), Watched::default());
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
        self.worker.observed.note_look(error.as_ref().map(ToString::to_string));
        Ok(again_at)
    }

    /// Looks, and tells what went wrong without making the look useless.
    async fn try_look(&mut self) -> Result<(Looked<S>, Option<WorkerError>), WorkerError> {
        // A worker that only watches the bell leaves discovery to those that watch the table.
        let due = self.discover_at.is_none_or(|at| Instant::now() >= at);
        let listed = if due && !self.leases.watches_bell() {
            let listed = tokio::select! {
                listed = self.worker.streams.shards() => listed,
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

    /// Starts to read a shard, for the first time or again.
    fn start(
        &mut self,
        id: ShardId,
        held: Arc<HeldLease<S>>,
        activity: Arc<Activity>,
        mut watched: Watched,
    ) {
        let Some(stream) = self.worker.streams.of(&id) else {
            // The table gives only leases of our streams.
            tracing::error!(shard = %id, "lease of a stream that is not read here: left to run out");
            return held.give_up();
        };
        let meter = self.worker.observed.begin(
            stream.name().to_owned(),
            id.clone(),
            held.clone(),
            activity.clone(),
        );
        let shard_task = ShardTask {
            stream: stream.clone(),
            held: held.clone(),
            activity: activity.clone(),
            initial: self.initial,
            stop: self.stop.clone(),
            meter: meter.clone(),
            settings: self.worker.settings.clone(),
            letters: self.worker.letters.clone(),
            state: self.worker.state.clone(),
        };
        self.worker.observed.note_activity();
        activity.enter(Step::Opens);
        watched.started();
        let task = self.tasks.spawn(shard_task.run((self.worker.make_handler)(&id)));
        let shard = RunningShard { id, held, activity, meter, watched, task };
        self.shards.insert(shard.task.id(), shard);
    }

    /// Takes note of a task that is over. Tells whether to look at the table at once.
    fn task_done(&mut self, done: Joined) -> Result<bool, WorkerError> {
        let id = match &done {
            Ok((id, _)) => *id,
            Err(error) => error.id(),
        };
        let Some(shard) = self.shards.remove(&id) else { return Ok(false) };
        self.worker.observed.end(&shard.id);
        let outcome = match done {
            Ok((_, outcome)) => outcome,
            Err(error) if error.is_cancelled() => return Ok(self.dropped(shard)),
            Err(error) => Outcome::Failed(WorkerError::Panic {
                shard: shard.id.clone(),
                reason: match error.try_into_panic() {
                    Ok(panic) => panic_text(panic),
                    Err(error) => error.to_string(),
                },
            }),
        };
        let moves = &self.worker.observed.moves;
        let gone = match outcome {
            Outcome::Ended => &moves.finished,
            Outcome::Lost => &moves.lost,
            Outcome::HandedOver => &moves.handed_over,
            Outcome::Stopped | Outcome::GivenUp | Outcome::WindowEnd | Outcome::Failed(_) => {
                &moves.released
            }
        };
        gone.fetch_add(1, Ordering::Relaxed);
        if let Outcome::Lost = outcome {
            self.worker.observed.note_loss();
        }
        match outcome {
            Outcome::GivenUp => self.leases.give_up(&shard.id),
            Outcome::WindowEnd => self.leases.leave(&shard.id),
            _ => self.leases.done(&shard.id),
        }
        match outcome {
            Outcome::Ended => {
                self.worker.observed.note_activity();
                self.discover_at = None;
                Ok(true)
            }
            // There is another worker: from now on its leases are watched too.
            Outcome::HandedOver | Outcome::Lost | Outcome::GivenUp | Outcome::WindowEnd => Ok(true),
            Outcome::Stopped => Ok(false),
            Outcome::Failed(error) => Err(error),
        }
    }

    /// Goes on with a shard whose task was dropped because it did not get on. Tells whether to look at
    /// the table at once.
    fn dropped(&mut self, shard: RunningShard<S>) -> bool {
        let RunningShard { id, held, activity, meter, watched, .. } = shard;
        if !held.is_valid() || self.stop.is_cancelled() {
            self.worker.observed.moves.lost.fetch_add(1, Ordering::Relaxed);
            self.worker.observed.note_loss();
            self.leases.done(&id);
            return true;
        }
        match self.worker.settings.on_stuck {
            OnStuck::Release => {
                let release = held.clone();
                let task = self.tasks.spawn(async move {
                    let _ = release.write_surely(&Change::Release { checkpoint: None }).await;
                    Outcome::GivenUp
                });
                activity.enter(Step::Stops);
                let shard = RunningShard { id, held, activity, meter, watched, task };
                self.shards.insert(shard.task.id(), shard);
            }
            OnStuck::Restart | OnStuck::Report => self.start(id, held, activity, watched),
        }
        false
    }

    /// Looks for shards that do not get on.
    fn watch(&mut self) {
        let Settings { watchdog: limit, on_stuck, retries, .. } = &self.worker.settings;
        let now = Instant::now();
        for shard in self.shards.values_mut() {
            let doing = shard.activity.now();
            let waits_for = doing.step;
            match shard.watched.judge(doing, *limit, now) {
                Finding::GetsOn => {}
                Finding::Stuck => {
                    shard.meter.count(|counts| &counts.stuck, 1);
                    let secs = now.saturating_duration_since(doing.since).as_secs();
                    // A handler without a time limit may wait for ever, such as for its reader.
                    let of_handler = matches!(waits_for, Step::Handles | Step::Acks);
                    let handler_may = of_handler && retries.time_limit.is_none();
                    let on_stuck = if handler_may { OnStuck::Report } else { *on_stuck };
                    let next = match on_stuck {
                        OnStuck::Restart => "it is started again from its last checkpoint",
                        OnStuck::Release => "its lease is released for another worker",
                        OnStuck::Report => "it is left alone",
                    };
                    tracing::error!(
                        shard = %shard.id, %waits_for, secs,
                        "the shard does not get on: {next}"
                    );
                    let text = format!("no progress for {secs} s, waiting for {waits_for}");
                    shard.held.note_trouble(text, Timestamp::now(), false);
                    if on_stuck != OnStuck::Report {
                        shard.task.abort();
                        shard.watched.aborted(now);
                    }
                }
                Finding::CannotBeDropped => {
                    tracing::error!(
                        shard = %shard.id, %waits_for,
                        "the shard's handler blocks its thread and cannot be stopped: the lease is given \
                         up, and another worker takes it when it has run out; use \
                         tokio::task::spawn_blocking for work that blocks"
                    );
                    shard.held.give_up();
                }
                Finding::Recovered => {
                    tracing::info!(shard = %shard.id, "the shard gets on again");
                    let text = "no progress for a while".to_owned();
                    shard.held.note_trouble(text, Timestamp::now(), true);
                }
            }
        }
    }

    /// Whether every shard has been at its tip for `limit`; one that stopped because of a failure does
    /// not count.
    fn is_idle(&self, limit: Duration) -> bool {
        let is_parked = |shard: &RunningShard<S>| shard.activity.now().step == Step::Parked;
        self.leases.has_looked()
            && !self.leases.unattended()
            && self.shards.values().all(|shard| is_parked(shard) || shard.held.is_caught_up())
            && self.worker.observed.quiet_for() >= limit
    }

    /// Whether every shard that is read here stopped because of a failure: there is nothing left to do.
    fn all_parked(&self) -> bool {
        let mut steps = self.shards.values().map(|shard| shard.activity.now().step);
        let nothing_else = !self.shards.is_empty() && steps.all(|step| step == Step::Parked);
        nothing_else && !self.leases.may_take_more()
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

fn panic_text(panic: Box<dyn Any + Send>) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no text".to_owned())
}
