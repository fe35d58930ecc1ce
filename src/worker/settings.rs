use std::{fmt, sync::Arc, time::Duration};

use aws_types::SdkConfig;
use jiff::Timestamp;
use tokio::time::Instant;

use super::{
    Leases, OnStuck, Worker, WorkerError,
    observe::Observed,
    reset::{reset_document, reset_table},
};
use crate::{
    checkpoint::{Checkpoints, StateError, StateStore, Writer},
    handler::{DeadLetters, Handler, OnFailure, Retries, Tolerance},
    lease::{InitialPosition, MemoryTable, dynamodb::LeaseTable, stored},
    ocs::ServiceDay,
    shard::ShardId,
    source::{Retrieval, Streams},
};

/// Where reading starts in a shard that has no checkpoint.
///
/// Whatever is chosen becomes a concrete place when the shard is first opened, and stays it: a lost
/// connection, an expired iterator or a restart before the first record skips nothing. A stream keeps
/// records for 24 hours, or as long as it is set to: what is older than that cannot be read.
///
/// ```
/// use tramline::StartPosition;
///
/// let morning = StartPosition::At("2025-07-02T06:00:00-04:00".parse()?);
/// assert_ne!(morning, StartPosition::default());
/// # Ok::<(), jiff::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum StartPosition {
    /// With what arrives from now on.
    Latest,
    /// With the oldest record that the stream keeps.
    #[default]
    TrimHorizon,
    /// With the first record that arrived at or after this time.
    At(Timestamp),
    /// With the start of the current service day: 02:00 in America/New_York.
    ServiceDay,
}

impl StartPosition {
    /// What it means for a worker that starts at `now`.
    pub(super) fn at(&self, now: Timestamp) -> InitialPosition {
        match self {
            Self::Latest => InitialPosition::Latest,
            Self::TrimHorizon => InitialPosition::TrimHorizon,
            Self::At(at) => InitialPosition::At(*at),
            Self::ServiceDay => InitialPosition::At(ServiceDay::default().start(now)),
        }
    }
}

/// How long a worker that is just ending may keep the file with the state from its successor.
const PREDECESSOR_LIMIT: Duration = Duration::from_secs(5);
/// As good as no limit, and small enough to be added to any time.
const A_YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// How old the record of a checkpoint may be to go on from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MaxCheckpointAge {
    /// Of the current service day: what is from before its start is replaced by its start.
    ServiceDay,
    /// This old: what is older is replaced by that time.
    Age(Duration),
}

impl MaxCheckpointAge {
    /// The oldest time to go on from, at `now`.
    pub(super) fn oldest(self, now: Timestamp) -> Timestamp {
        match self {
            Self::ServiceDay => ServiceDay::default().start(now),
            Self::Age(age) => now.checked_sub(age).unwrap_or(Timestamp::UNIX_EPOCH),
        }
    }
}

/// What a worker has to carry, for [`WorkerBuilder::refuse_leases_when`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Load {
    /// The shards that it reads.
    pub shards: usize,
    /// How far the slowest of them is behind; `None` before anything was read.
    pub most_behind: Option<Duration>,
}

#[derive(Clone)]
pub(super) struct RefuseWhen(Arc<dyn Fn(&Load) -> bool + Send + Sync>);

impl fmt::Debug for RefuseWhen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RefuseWhen")
    }
}

impl RefuseWhen {
    pub(super) fn holds(&self, load: &Load) -> bool {
        (self.0)(load)
    }
}

#[derive(Debug, Clone)]
pub(super) struct Settings {
    pub application: String,
    pub worker_id: String,
    pub retries: Retries,
    pub on_failure: OnFailure,
    pub tolerance: Option<Tolerance>,
    pub max_unacked: usize,
    pub until: Option<Timestamp>,
    pub max_checkpoint_age: Option<MaxCheckpointAge>,
    pub start: StartPosition,
    pub max_leases: usize,
    pub refuse_when: RefuseWhen,
    pub watchdog: Duration,
    pub on_stuck: OnStuck,
    pub lease_duration: Duration,
    pub hand_over_limit: Duration,
    pub checkpoint_interval: Duration,
    pub prefetch_bytes: u32,
    pub shutdown_limit: Duration,
    pub stop_when_idle: Option<Duration>,
}

/// Describes a worker. Every setting but the handler has a default. Made by [`Worker::builder`], and ended by
/// [`build`](Self::build), or without a handler by [`messages`](Self::messages) or [`poller`](Self::poller).
///
/// ```no_run
/// # async fn example(aws: aws_config::SdkConfig) -> Result<(), Box<dyn std::error::Error>> {
/// use std::time::Duration;
///
/// use tramline::{Checkpoints, DeadLetters, Retrieval, StartPosition, Worker};
/// # use tramline::feed::{Format, Stdout};
/// # let print = Stdout::new(Format::Raw)?;
///
/// let worker = Worker::builder(&aws, "ctd-ocs-raw-messages", "rtr-green")
///     .start(StartPosition::ServiceDay)
///     .retrieval(Retrieval::Polling)
///     .checkpoints(Checkpoints::s3("rtr-state", "green/{shard}.state"))
///     .checkpoint_interval(Duration::from_secs(30))
///     .dead_letters(DeadLetters::s3("rtr-dead-letters", "green"))
///     .handler(move |_shard| print.clone())
///     .build()
///     .await?;
/// # Ok(())
/// # }
/// ```
#[must_use = "it describes a worker, and starts none"]
pub struct WorkerBuilder<F> {
    config: SdkConfig,
    streams: Vec<String>,
    application: String,
    lease_table: Option<String>,
    on_failure: Option<OnFailure>,
    retrieval: Retrieval,
    dead_letters: DeadLetters,
    checkpoints: Checkpoints,
    no_checkpoint: bool,
    reset: bool,
    settings: Settings,
    make_handler: F,
}

impl WorkerBuilder<()> {
    pub(super) fn new(config: &SdkConfig, stream: String, application: String) -> Self {
        Self {
            config: config.clone(),
            streams: vec![stream],
            application,
            lease_table: None,
            on_failure: None,
            retrieval: Retrieval::default(),
            dead_letters: DeadLetters::stderr(),
            checkpoints: Checkpoints::default(),
            no_checkpoint: false,
            reset: false,
            settings: Settings {
                application: String::new(),
                retries: Retries::default(),
                on_failure: OnFailure::default(),
                tolerance: None,
                max_unacked: 10_000,
                until: None,
                max_checkpoint_age: None,
                worker_id: default_worker_id(),
                start: StartPosition::default(),
                max_leases: usize::MAX,
                refuse_when: RefuseWhen(Arc::new(|_| false)),
                watchdog: Duration::from_secs(120),
                on_stuck: OnStuck::default(),
                lease_duration: Duration::from_secs(10),
                hand_over_limit: Duration::from_secs(30),
                checkpoint_interval: Duration::from_secs(5),
                prefetch_bytes: 2 * 1024 * 1024,
                shutdown_limit: Duration::from_secs(30),
                stop_when_idle: None,
            },
            make_handler: (),
        }
    }

    /// Makes the handler for each shard that the worker reads, each time that it takes the shard's lease.
    pub fn handler<F, H>(self, make_handler: F) -> WorkerBuilder<F>
    where
        F: Fn(&ShardId) -> H,
        H: Handler,
    {
        WorkerBuilder {
            config: self.config,
            streams: self.streams,
            application: self.application,
            lease_table: self.lease_table,
            on_failure: self.on_failure,
            retrieval: self.retrieval,
            dead_letters: self.dead_letters,
            checkpoints: self.checkpoints,
            no_checkpoint: self.no_checkpoint,
            reset: self.reset,
            settings: self.settings,
            make_handler,
        }
    }
}

impl<F> WorkerBuilder<F> {
    /// Reads another stream as well. The leases of several streams have the stream's identifier in their
    /// keys, as in the KCL's multi-stream mode; so an application stays with one stream or with several,
    /// or its streams would be started over. What differs is refused at the start.
    pub fn and_stream(mut self, name: impl Into<String>) -> Self {
        self.streams.push(name.into());
        self
    }

    pub(super) fn without_time_limit(mut self) -> Self {
        self.settings.retries.time_limit = None;
        self
    }

    /// Where shards without a checkpoint start. Default: the trim horizon.
    pub fn start(mut self, start: StartPosition) -> Self {
        self.settings.start = start;
        self
    }

    /// Applies the start position even where there is a checkpoint: [`build`](Self::build) moves the
    /// checkpoint of every shard there, also back, and drops the state of handlers that belonged to it. It
    /// is the one setting that moves a checkpoint back (P3), so it is for a run that someone starts by hand:
    /// in a service that is restarted, it would read everything again each time. What is stored is what
    /// `tramline lease reset` stores.
    ///
    /// In a fleet it is for the first worker. While another one renews a lease it is refused
    /// ([`WorkerError::ResetRefused`]) and nothing is moved; if one died, it waits until the leases have
    /// run out. An S3 object without `{shard}` in its key is taken over, as it is without this. Changes
    /// nothing with [`no_checkpoint`](Self::no_checkpoint).
    pub fn reset(mut self) -> Self {
        self.reset = true;
        self
    }

    /// How records are fetched. Default: fan-out, or polling where the server does not know it.
    pub fn retrieval(mut self, retrieval: Retrieval) -> Self {
        self.retrieval = retrieval;
        self
    }

    /// The DynamoDB table of the leases: 3 to 255 letters, digits, dots, underscores and hyphens (AWS API
    /// reference, CreateTable). It is created if there is none, paid per request. Default: the application's
    /// name, as in the KCL.
    pub fn lease_table(mut self, name: impl Into<String>) -> Self {
        self.lease_table = Some(name.into());
        self
    }

    /// The name by which other workers know this one. It must be its own: two processes of one name
    /// cannot be told apart, and both read the shards of either. A worker that is restarted under its old
    /// name takes its leases back at once. Default: host name, process id and a random part.
    pub fn worker_id(mut self, id: impl Into<String>) -> Self {
        self.settings.worker_id = id.into();
        self
    }

    /// How long a lease lasts without renewal: after this, others take the shards of a worker that
    /// died. It is renewed when two fifths of it have passed, and every 4 s at least. All workers of an
    /// application ought to have the same (in the KCL: `failoverTimeMillis`): one with a shorter
    /// duration may take what another still reads. Default: 10 s.
    pub fn lease_duration(mut self, duration: Duration) -> Self {
        self.settings.lease_duration = duration.min(A_YEAR);
        self
    }

    /// The most shards that this worker reads. Others read the rest. Default: no limit.
    pub fn max_leases(mut self, limit: usize) -> Self {
        self.settings.max_leases = limit;
        self
    }

    /// When the worker takes no more leases than it has, although it has fewer than its share: because
    /// it is behind, or short of memory. Asked before each look at the table. Other workers read what it
    /// refuses; if every one refuses, shards stay unread, which is logged. Default: never.
    pub fn refuse_leases_when(
        mut self,
        refuse: impl Fn(&Load) -> bool + Send + Sync + 'static,
    ) -> Self {
        self.settings.refuse_when = RefuseWhen(Arc::new(refuse));
        self
    }

    /// How long a shard may be leased here without getting on: no read returned, no batch finished. Then
    /// it is logged with what it waits for, counted, shown in the status, and dealt with as
    /// [`on_stuck`](Self::on_stuck) says. Default: 2 minutes.
    pub fn watchdog(mut self, limit: Duration) -> Self {
        self.settings.watchdog = limit.min(A_YEAR);
        self
    }

    /// What is done about a shard that does not get on. Default: its task is started again.
    pub fn on_stuck(mut self, on_stuck: OnStuck) -> Self {
        self.settings.on_stuck = on_stuck;
        self
    }

    /// How long a worker that is asked to hand a shard over may take to finish its batch, before the
    /// shard is taken from it. Default: 30 s.
    pub fn hand_over_limit(mut self, limit: Duration) -> Self {
        self.settings.hand_over_limit = limit.min(A_YEAR);
        self
    }

    /// How often a batch is offered to the handler, with what waits and limits.
    pub fn retries(mut self, retries: Retries) -> Self {
        self.settings.retries = retries;
        self
    }

    /// What is done with a message that the handler has not finished after all attempts. Default: its
    /// shard stops; or, where a place for dead letters is set, it goes there.
    pub fn on_failure(mut self, on_failure: OnFailure) -> Self {
        self.on_failure = Some(on_failure);
        self
    }

    /// Where what cannot be decoded or handled goes. Default: standard error.
    pub fn dead_letters(mut self, to: DeadLetters) -> Self {
        self.dead_letters = to;
        self
    }

    /// How many messages of a shard may fail before it stops all the same. Default: any number.
    pub fn failure_tolerance(mut self, tolerance: Tolerance) -> Self {
        self.settings.tolerance = Some(tolerance);
        self
    }

    /// How many messages of a shard the handler may have taken
    /// ([`Batch::ack_later`](crate::Batch::ack_later)) and not acknowledged before reading waits for it.
    /// Default: 10 000.
    pub fn max_unacked(mut self, limit: usize) -> Self {
        self.settings.max_unacked = limit.max(1);
        self
    }

    /// Stops the worker when every shard is read up to this time: what arrived at or after it is not
    /// handled. With a start position before it, a closed window is replayed. Use an application's name of
    /// its own, or the live application goes on from the end of the window.
    pub fn until(mut self, end: Timestamp) -> Self {
        self.settings.until = Some(end);
        self
    }

    /// Where checkpoints are kept, with the state of handlers if they have any
    /// ([`Handler::snapshot`]). Default: the lease table.
    ///
    /// An S3 object or a file without `{shard}` in its name holds every shard, and is for one worker, which
    /// needs no lease table. With `{shard}`, a fleet shares the stream by a lease table.
    pub fn checkpoints(mut self, place: Checkpoints) -> Self {
        self.checkpoints = place;
        self
    }

    /// Stores nothing, in no place: each run begins at the start position, and reads every shard alone,
    /// whoever else does. Needs no lease table.
    pub fn no_checkpoint(mut self) -> Self {
        self.no_checkpoint = true;
        self
    }

    /// Does not go on from a checkpoint whose record is older than this, but from there: for a service to
    /// which what is older says nothing. The handler's state is then left behind too. Costs a
    /// GetShardIterator and a GetRecords when a shard is opened. Default: off.
    pub fn max_checkpoint_age(mut self, age: MaxCheckpointAge) -> Self {
        self.settings.max_checkpoint_age = Some(age);
        self
    }

    /// How often progress is stored: what was handled since comes again after a crash. At the end of a
    /// shard and at a stop it is stored in any case. Default: 5 s.
    pub fn checkpoint_interval(mut self, interval: Duration) -> Self {
        self.settings.checkpoint_interval = interval.min(A_YEAR);
        self
    }

    /// How many bytes of records a shard may hold that wait for the handler, beside the read in
    /// hand. Default: 2 MiB, what a shard gives in a second.
    pub fn prefetch_bytes(mut self, limit: u32) -> Self {
        self.settings.prefetch_bytes = limit;
        self
    }

    /// How long a stop may take, before shards whose handler is still busy are given up. Default: 30 s.
    pub fn shutdown_limit(mut self, limit: Duration) -> Self {
        self.settings.shutdown_limit = limit.min(A_YEAR);
        self
    }

    /// Stops the worker when every shard was read to its tip and nothing came for this long: for jobs and
    /// tests. Default: never.
    pub fn stop_when_idle(mut self, limit: Duration) -> Self {
        self.settings.stop_when_idle = Some(limit);
        self
    }

    /// Checks that the stream can be read, registers the fan-out consumer and creates the lease table
    /// where they are missing; with [`reset`](Self::reset), moves checkpoints. Nothing is read before
    /// [`Worker::run`].
    ///
    /// An error says what is missing, down to the IAM action, or which settings contradict each other. It
    /// is not tried again here, AWS being away included: what starts a service starts it again.
    pub async fn build<H>(self) -> Result<Worker<F>, WorkerError>
    where
        F: Fn(&ShardId) -> H,
        H: Handler,
    {
        let mut names: Vec<&String> = self.streams.iter().collect();
        names.sort();
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(WorkerError::StreamTwice { stream: twice[0].clone() });
        }
        if let StartPosition::At(start) = self.settings.start
            && start > Timestamp::now()
        {
            return Err(WorkerError::StartInFuture { start });
        }
        let streams = Streams::new(&self.config, &self.streams, self.retrieval);
        let name = self.lease_table.unwrap_or_else(|| self.application.clone());
        if self.no_checkpoint && self.checkpoints != Checkpoints::default() {
            return Err(WorkerError::CheckpointsAndNone);
        }
        // By the rules of CreateTable and RegisterStreamConsumer, before either is called.
        check_name("a lease table", &name, 3, 255)?;
        check_name("an application", &self.application, 1, 128)?;
        let state = StateStore::new(
            &self.config,
            &self.checkpoints,
            Writer {
                application: self.application.clone(),
                stream: streams.names(),
                worker: self.settings.worker_id.clone(),
            },
        )?;
        // Where one document holds everything, or nothing is stored, this is the only worker.
        let shared = match &self.checkpoints {
            _ if self.no_checkpoint => None,
            place if state.is_some() && !place.is_per_shard() => None,
            _ => Some(LeaseTable::new(&self.config, name)),
        };
        let ensured = async {
            match &shared {
                Some(table) => table.ensure().await,
                None => Ok(()),
            }
        };
        let mut settings = self.settings;
        settings.application = self.application;
        settings.on_failure = self.on_failure.unwrap_or(match self.dead_letters.is_stderr() {
            true => OnFailure::Stop,
            false => OnFailure::DeadLetter,
        });
        let (opened, ensured, letters) = tokio::join!(
            streams.open(&settings.application),
            ensured,
            self.dead_letters.open(&self.config)
        );
        opened?;
        ensured?;
        let letters = Arc::new(letters?);
        let leases = match shared {
            Some(table) => {
                let table = table.of_streams(streams.identifiers());
                if self.reset {
                    let listed = streams.shards().await?;
                    let start = settings.start.at(Timestamp::now());
                    let duration = settings.lease_duration;
                    reset_table(&table, state.as_ref(), &listed, start, duration).await?;
                }
                Leases::Table(table)
            }
            None => {
                let reset_to = self.reset.then(|| settings.start.at(Timestamp::now()));
                Leases::Own(own_leases(&streams, state.as_ref(), reset_to).await?)
            }
        };
        let state = state.map(Arc::new);
        let Settings { worker_id, watchdog, lease_duration, .. } = &settings;
        let observed = Arc::new(Observed::new(worker_id.clone(), *watchdog, *lease_duration));
        let make_handler = self.make_handler;
        Ok(Worker { streams, leases, state, letters, settings, observed, make_handler })
    }
}

/// Leases of the stream's shards: of those that are stored in a document, at the place that was reached.
async fn own_leases(
    streams: &Streams,
    state: Option<&StateStore>,
    reset_to: Option<InitialPosition>,
) -> Result<MemoryTable, WorkerError> {
    let table = MemoryTable::default();
    let Some(state) = state else { return Ok(table) };
    let give_up = Instant::now() + PREDECESSOR_LIMIT;
    let saved = loop {
        match state.load().await {
            Err(StateError::Locked { .. }) if Instant::now() < give_up => {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            loaded => break loaded?,
        }
    };
    let listed = streams.shards().await?;
    for lease in stored::of_document(&listed, &saved) {
        table.set(&lease.shard.clone(), Some(lease));
    }
    if let Some(start) = reset_to {
        reset_document(&table, state, &listed, start).await?;
    }
    Ok(table)
}

fn check_name(
    what: &'static str,
    name: &str,
    least: usize,
    most: usize,
) -> Result<(), WorkerError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if (least..=most).contains(&name.len()) && name.chars().all(allowed) {
        return Ok(());
    }
    Err(WorkerError::Name { name: name.to_owned(), what, least, most })
}

fn default_worker_id() -> String {
    let part: u32 = rand::random();
    format!("{}-{}-{part:08x}", crate::host::name(), std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_service_day_is_the_current_one() {
        let now: Timestamp = "2025-07-02T05:59:59Z".parse().expect("a time");
        let start: Timestamp = "2025-07-01T06:00:00Z".parse().expect("a time");
        assert_eq!(StartPosition::ServiceDay.at(now), InitialPosition::At(start));
    }
}
