use std::{
    collections::BTreeSet,
    error::Error,
    future::pending,
    io,
    sync::{Arc, OnceLock},
    time::Duration,
};

use aws_config::SdkConfig;
use clap::Args;
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use jiff::Timestamp;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{
    Outcome, Watched, fleet,
    values::{self, Output, Place},
};
use crate::{
    Checkpoints, DeadLetters, Handler, MaxCheckpointAge, Observer, OnFailure, OnStuck, Retries,
    Retrieval, ShardId, StartPosition, Tolerance, Worker, WorkerBuilder,
    feed::{
        Archive, Format, Stdout,
        readers::{Connections, Doors, Encoding, Hub, Server, Spread, run_command, send_to},
    },
    host,
    telemetry::{self, ObservedWorker, Served, Subject, WorkerSubject},
};

/// Read a stream and give its messages to stdout, to readers or to an archive
///
/// Reads a stream as one worker of an application and writes its messages to stdout, which carries
/// nothing else; to readers over sockets or a pipe; or to an archive. It goes on where the application's
/// workers stopped.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tramline consume --stream ctd-ocs-raw-messages --app rtr-green
  tramline consume --stream ctd-ocs-raw-messages --app day --start service-day --exit-when-idle 10s
  tramline consume --stream ctd-ocs-raw-messages --app ocs --output unix:///run/ocs.sock --acks
  tramline consume --stream ctd-ocs-raw-messages --app rtr \\
    --output green=tcp-connect://rtr-green:8001 --output blue=tcp-connect://rtr-blue:8001")]
pub(super) struct Consume {
    /// The stream to read; may be repeated, to read several with their leases in one table
    #[arg(long, value_name = "NAME", required = true, value_delimiter = ',')]
    pub(super) stream: Vec<String>,

    /// The application: workers of one application share the shards
    #[arg(long, value_name = "NAME")]
    pub(super) app: String,

    /// Where messages go: stdout; readers that connect to unix:///PATH or tcp://ADDRESS:PORT; a receiver
    /// of raw OCS text at tcp-connect://HOST:PORT; the stdin of a shell command, exec:COMMAND; or the
    /// day's log in S3, s3-archive://BUCKET/PREFIX, as lines MM/dd/yy,HH:mm:ss,TEXT in objects
    /// PREFIX/YYYY-MM-DD/STREAM/SHARD/PLACE.txt. May be repeated, with NAME= before each: then each has its
    /// own position, that of the application APP-NAME
    #[arg(long, value_name = "[NAME=]PLACE", value_parser = values::output, default_value = "stdout")]
    pub(super) output: Vec<Output>,

    /// Let the readers say what they have finished, and keep the checkpoint before it: for unix, tcp and
    /// exec, by the protocol of docs/feeds.md
    #[arg(long)]
    acks: bool,

    /// The names of the readers of a socket: each gets every message, and has its own position, that of
    /// the application APP-READER [default: one reader at a time]
    #[arg(
        long, value_name = "NAME", value_parser = values::name, value_delimiter = ',', requires = "acks",
        conflicts_with = "share"
    )]
    readers: Vec<String>,

    /// Share messages out among the readers of a socket, those of a partition key to one at a time, instead
    /// of each getting every message
    #[arg(long)]
    share: bool,

    /// How old a message may get before it is written to the archive
    #[arg(long, value_name = "DURATION", value_parser = values::duration, default_value = "1m")]
    archive_interval: Duration,

    /// How a message is written, but to a receiver of raw OCS text and to the archive
    #[arg(long, value_enum, default_value_t)]
    pub(super) format: Format,

    /// How records are fetched
    #[arg(long, value_enum, default_value_t)]
    retrieval: Retrieval,

    /// Where shards without a checkpoint start: latest, trim-horizon, service-day or an RFC 3339 time
    #[arg(long, value_name = "POSITION", value_parser = values::start, default_value = "trim-horizon")]
    pub(super) start: StartPosition,

    /// Apply --start even where there is a checkpoint: moves the checkpoint of every shard there, also back,
    /// before the worker starts. Refused while another worker reads
    #[arg(long, conflicts_with = "no_checkpoint")]
    reset: bool,

    /// The DynamoDB table of the leases; where outputs or readers have an application each, TABLE-NAME or
    /// TABLE-READER is that of each [default: the application's name]
    #[arg(long, value_name = "TABLE")]
    lease_table: Option<String>,

    /// The name of this worker, which no other may have [default: host, process id, a random part]
    #[arg(long, value_name = "ID")]
    worker_id: Option<String>,

    /// Stop when every shard was read to its tip and nothing came for this long
    #[arg(long, value_name = "DURATION", value_parser = values::duration)]
    pub(super) exit_when_idle: Option<Duration>,

    /// How long a lease lasts without renewal; the same for all workers of the application
    #[arg(long, value_name = "DURATION", value_parser = values::lease_duration, default_value = "10s")]
    lease_duration: Duration,

    /// The most shards that this worker reads [default: no limit]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_leases: Option<u32>,

    /// Take no more shards while one that is read here is this far behind [default: never refuse]
    #[arg(long, value_name = "DURATION", value_parser = values::duration)]
    refuse_when_behind: Option<Duration>,

    /// Take no more shards while the process has more memory resident than this [default: never refuse]
    #[arg(long, value_name = "SIZE", value_parser = values::size_bytes)]
    refuse_above_memory: Option<u32>,

    /// How long a shard may be leased without getting on, before --on-stuck applies
    #[arg(long, value_name = "DURATION", value_parser = values::duration, default_value = "2m")]
    watchdog: Duration,

    /// What is done about a shard that does not get on
    #[arg(long, value_enum, default_value_t)]
    on_stuck: OnStuck,

    /// How long a worker that is asked to hand a shard over may take before it is taken
    #[arg(long, value_name = "DURATION", value_parser = values::duration, default_value = "30s")]
    hand_over_limit: Duration,

    /// Where checkpoints are kept: dynamodb, s3://BUCKET/KEY or file:///PATH. A key or path without {shard} is
    /// for one worker, which then needs no lease table
    #[arg(long, value_name = "PLACE", value_parser = values::checkpoints, default_value = "dynamodb")]
    checkpoint: Checkpoints,

    /// Store no checkpoints and take no leases: read all shards from --start in each run
    #[arg(long, conflicts_with = "max_checkpoint_age")]
    no_checkpoint: bool,

    /// Go on from no checkpoint older than this, but from there: service-day (its start) or a duration
    /// [default: however old it is]
    #[arg(long, value_name = "AGE", value_parser = values::max_checkpoint_age)]
    max_checkpoint_age: Option<MaxCheckpointAge>,

    /// Where what cannot be decoded or handled goes: kinesis://STREAM, s3://BUCKET/PREFIX or file:///PATH
    /// [default: standard error]
    #[arg(long, value_name = "PLACE")]
    dead_letters: Option<DeadLetters>,

    /// What is done with a message that cannot be written after all attempts [default: dead-letter where
    /// --dead-letters is set, else stop]
    #[arg(long, value_enum)]
    on_failure: Option<OnFailure>,

    /// How often a batch, and then each message of it, is tried
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), default_value = "5")]
    handler_attempts: u32,

    /// How many messages of a hundred may fail within --failure-window before the shard stops all the same
    /// [default: any number]
    #[arg(long, value_name = "PERCENT", value_parser = values::percent)]
    failure_tolerance: Option<f64>,

    /// The time for --failure-tolerance
    #[arg(long, value_name = "DURATION", value_parser = values::duration, default_value = "5m")]
    failure_window: Duration,

    /// Stop when every shard is read up to this RFC 3339 time; nothing that arrived later is written
    #[arg(long, value_name = "TIME")]
    until: Option<Timestamp>,

    /// How often progress is stored
    #[arg(long, value_name = "DURATION", value_parser = values::duration, default_value = "5s")]
    checkpoint_interval: Duration,

    /// How many bytes of records a shard may hold that wait to be written
    #[arg(long, value_name = "SIZE", value_parser = values::size_bytes, default_value = "2MiB")]
    prefetch: u32,

    /// How long a clean stop may take
    #[arg(long, value_name = "DURATION", value_parser = values::duration, default_value = "30s")]
    shutdown_limit: Duration,
}

/// Where the messages of one position go.
enum Feed {
    Stdout(Stdout),
    Archive(Archive),
    Hub(Arc<Hub>),
    Command { hub: Arc<Hub>, command: String, encoding: Encoding },
}

/// One position in the streams: that of an application.
struct Position {
    application: String,
    feed: Feed,
    observed: Arc<OnceLock<Observer>>,
}

impl Position {
    fn new(application: String, feed: Feed) -> Self {
        Self { application, feed, observed: Arc::default() }
    }

    fn worker(&self) -> ObservedWorker {
        ObservedWorker { application: self.application.clone(), observer: self.observed.clone() }
    }
}

impl Consume {
    pub(super) async fn run(
        self,
        config: &SdkConfig,
        watched: Option<Watched>,
        stop: CancellationToken,
    ) -> Outcome {
        self.check()?;
        let opened = tokio::select! {
            opened = self.open(config) => opened?,
            () = stop.cancelled() => return Ok(()),
        };
        // The connections to readers are held open until every worker has ended.
        let (positions, _connections) = opened;
        let workers: Vec<ObservedWorker> = positions.iter().map(Position::worker).collect();
        let _told = telemetry::tell_of_workers(workers.clone(), stop.clone());
        let _served = match watched {
            Some(watched) => Some(self.serve(config, watched, workers).await?),
            None => None,
        };
        let stop = stop.child_token();
        let mut working: FuturesUnordered<_> =
            positions.into_iter().map(|position| self.work(config, position, &stop)).collect();
        let mut outcome = Ok(());
        while let Some(ended) = working.next().await {
            if ended.is_err() {
                stop.cancel();
            }
            outcome = outcome.and(ended);
        }
        outcome
    }

    /// Whether the settings go together.
    fn check(&self) -> Outcome {
        if self.refuse_above_memory.is_some() && host::resident_bytes().is_none() {
            return Err(
                "--refuse-above-memory needs /proc/self/status, which this system does not have; \
                        use --max-leases"
                    .into(),
            );
        }
        let is =
            |wanted: fn(&Place) -> bool| self.output.iter().all(|output| wanted(&output.place));
        let is_socket = |place: &Place| matches!(place, Place::Unix(_) | Place::Tcp(_));
        if self.acks
            && !is(|place| matches!(place, Place::Unix(_) | Place::Tcp(_) | Place::Exec(_)))
        {
            return Err("--acks is for readers that can answer: unix://, tcp:// and exec:".into());
        }
        if self.acks && self.format != Format::Json {
            return Err("with --acks, messages are written as --format json".into());
        }
        if (self.share || !self.readers.is_empty()) && !is(is_socket) {
            return Err(
                "--share and --readers are for readers that connect: unix:// and tcp://".into()
            );
        }
        if !is_each_once(self.readers.iter()) {
            return Err("--readers has a name twice".into());
        }
        if self.output.len() * self.readers.len().max(1) == 1 {
            return Ok(());
        }
        let names = self.output.iter().filter_map(|output| output.name.as_ref());
        if self.output.len() > 1
            && (names.clone().count() < self.output.len() || !is_each_once(names))
        {
            return Err(
                "several outputs need a name each, for the application APP-NAME that keeps its \
                        position: --output green=… --output blue=…"
                    .into(),
            );
        }
        let stdouts = self.output.iter().filter(|output| output.place == Place::Stdout);
        if stdouts.count() > 1 {
            return Err("stdout can be an output once".into());
        }
        if self.checkpoint != Checkpoints::default() {
            return Err(format!(
                "--checkpoint {} is for one position, and several outputs or readers have one each: leave it \
                 out, and the lease table of each keeps them; or run a process for each output, with its own \
                 --checkpoint",
                self.checkpoint
            )
            .into());
        }
        Ok(())
    }

    fn table_of(&self, application: &str) -> String {
        table_of(self.lease_table.as_deref(), &self.app, application)
    }

    /// Opens the outputs, and gives their positions with the connections to their readers.
    async fn open(
        &self,
        config: &SdkConfig,
    ) -> Result<(Vec<Position>, Vec<Connections>), Box<dyn Error + Send + Sync>> {
        let (mut positions, mut connections) = (Vec::new(), Vec::new());
        let encoding = match self.acks {
            true => Encoding::Numbered,
            false => Encoding::Lines(self.format),
        };
        for output in &self.output {
            let application = of(&self.app, output.name.as_deref());
            match &output.place {
                Place::Stdout => {
                    let feed = Feed::Stdout(Stdout::new(self.format)?);
                    positions.push(Position::new(application, feed));
                }
                Place::Archive { bucket, prefix } => {
                    let archive = Archive::open(config, bucket, prefix).await?;
                    let feed = Feed::Archive(archive.interval(self.archive_interval));
                    positions.push(Position::new(application, feed));
                }
                Place::TcpConnect(address) => {
                    let hub = Hub::new(Spread::One, false);
                    connections.push(send_to(address.clone(), hub.clone()));
                    positions.push(Position::new(application, Feed::Hub(hub)));
                }
                Place::Exec(command) => {
                    let (hub, command) = (Hub::new(Spread::One, self.acks), command.clone());
                    let feed = Feed::Command { hub, command, encoding };
                    positions.push(Position::new(application, feed));
                }
                Place::Unix(path) => {
                    let doors = self.doors(application, &mut positions);
                    connections.push(Server::unix(path)?.serve(doors, encoding));
                }
                Place::Tcp(address) => {
                    let doors = self.doors(application, &mut positions);
                    connections.push(Server::tcp(address).await?.serve(doors, encoding));
                }
            }
        }
        Ok((positions, connections))
    }

    /// Where readers of a socket are let in: to one position, or by their names to one each.
    fn doors(&self, application: String, positions: &mut Vec<Position>) -> Doors {
        if self.readers.is_empty() {
            let spread = match (self.share, self.acks) {
                (true, _) => Spread::Shared,
                (false, true) => Spread::One,
                (false, false) => Spread::Every,
            };
            let hub = Hub::new(spread, self.acks);
            positions.push(Position::new(application, Feed::Hub(hub.clone())));
            return Doors::One(hub);
        }
        let hubs = self.readers.iter().map(|reader| {
            let hub = Hub::new(Spread::One, self.acks);
            let application = of(&application, Some(reader));
            positions.push(Position::new(application, Feed::Hub(hub.clone())));
            (reader.clone(), hub)
        });
        Doors::ByName(hubs.collect())
    }

    /// Tells how the workers are doing, also before they run.
    async fn serve(
        &self,
        config: &SdkConfig,
        watched: Watched,
        workers: Vec<ObservedWorker>,
    ) -> io::Result<AbortOnDropHandle<()>> {
        let listener = telemetry::bind(watched.address).await?;
        let names: Vec<&str> = workers.iter().map(|worker| worker.application.as_str()).collect();
        let names = match names[..] {
            [one] => format!("application {one}"),
            _ => format!("applications {}", names.join(", ")),
        };
        // Without a lease table this is the only worker.
        let has_table = !self.no_checkpoint
            && (self.checkpoint == Checkpoints::default() || self.checkpoint.is_per_shard());
        let subject = |worker: ObservedWorker| {
            let table = has_table.then(|| self.table_of(&worker.application));
            let fleet = table.map(|table| fleet::looker(config, &self.stream, &table));
            WorkerSubject { worker, fleet }
        };
        let served = Served {
            command: "consume",
            title: format!("{}, {names}", self.stream.join(", ")),
            subject: Subject::Workers(workers.into_iter().map(subject).collect()),
            recent: watched.recent,
        };
        Ok(served.serve(listener))
    }

    /// Runs the worker of one position until it is done.
    async fn work(
        &self,
        config: &SdkConfig,
        position: Position,
        stop: &CancellationToken,
    ) -> Outcome {
        let Position { application, feed, observed } = position;
        let (worker, observed) = (self.worker(config, application), &*observed);
        match feed {
            Feed::Stdout(stdout) => {
                let feed = stdout.clone();
                let gone = async {
                    stdout.closed().await;
                    tracing::info!("the reader of stdout has gone: stopping");
                };
                work(worker.handler(move |_| feed.clone()), observed, gone, stop).await
            }
            Feed::Archive(archive) => {
                work(worker.handler(move |_| archive.handler()), observed, pending(), stop).await
            }
            Feed::Hub(hub) => {
                let stopping = stop.clone();
                let worker = worker.handler(move |_| hub.handler(stopping.clone()));
                work(worker, observed, pending(), stop).await
            }
            Feed::Command { hub, command, encoding } => {
                let (done, stop) = (CancellationToken::new(), stop.child_token());
                let stopping = stop.clone();
                let feed = hub.clone();
                let worker = worker.handler(move |_| feed.handler(stopping.clone()));
                let working = async {
                    let outcome = work(worker, observed, pending(), &stop).await;
                    done.cancel();
                    outcome
                };
                let running = async {
                    let outcome = run_command(command, hub, encoding, done.clone()).await;
                    if outcome.is_err() {
                        stop.cancel();
                    }
                    outcome
                };
                let (worked, ran) = tokio::join!(working, running);
                Ok(ran.map_err(Box::new).map(|()| worked)??)
            }
        }
    }

    /// The worker of an application.
    fn worker(&self, config: &SdkConfig, application: String) -> WorkerBuilder<()> {
        let table = self.table_of(&application);
        let (behind, memory) = (self.refuse_when_behind, self.refuse_above_memory);
        let mut streams = self.stream.iter().cloned();
        let mut worker = Worker::builder(config, streams.next().unwrap_or_default(), application)
            .start(self.start.clone())
            .retrieval(self.retrieval)
            .lease_duration(self.lease_duration)
            .hand_over_limit(self.hand_over_limit)
            .refuse_leases_when(move |load| {
                let is_behind = behind.is_some_and(|limit| load.most_behind >= Some(limit));
                let resident = || host::resident_bytes().unwrap_or(0);
                is_behind || memory.is_some_and(|limit| resident() > u64::from(limit))
            })
            .retries(Retries {
                attempts: self.handler_attempts,
                // The output is waited for, however long nobody reads it.
                time_limit: None,
                ..Retries::default()
            })
            .checkpoints(self.checkpoint.clone())
            .lease_table(table)
            .watchdog(self.watchdog)
            .on_stuck(self.on_stuck)
            .max_leases(self.max_leases.map_or(usize::MAX, |limit| limit as usize))
            .checkpoint_interval(self.checkpoint_interval)
            .prefetch_bytes(self.prefetch)
            .shutdown_limit(self.shutdown_limit);
        if self.reset {
            worker = worker.reset();
        }
        if self.no_checkpoint {
            worker = worker.no_checkpoint();
        }
        if let Some(age) = self.max_checkpoint_age {
            worker = worker.max_checkpoint_age(age);
        }
        if let Some(letters) = &self.dead_letters {
            worker = worker.dead_letters(letters.clone());
        }
        if let Some(on_failure) = self.on_failure {
            worker = worker.on_failure(on_failure);
        }
        if let Some(percent) = self.failure_tolerance {
            worker = worker.failure_tolerance(Tolerance { percent, window: self.failure_window });
        }
        if let Some(until) = self.until {
            worker = worker.until(until);
        }
        for stream in streams {
            worker = worker.and_stream(stream);
        }
        if let Some(id) = &self.worker_id {
            worker = worker.worker_id(id.clone());
        }
        if let Some(limit) = self.exit_when_idle {
            worker = worker.stop_when_idle(limit);
        }
        worker
    }
}

/// The applications of these outputs: each has a position of its own.
pub(super) fn applications(app: &str, outputs: &[Output], readers: &[String]) -> Vec<String> {
    let of_output = |output: &Output| {
        let application = of(app, output.name.as_deref());
        match readers {
            [] => vec![application],
            readers => readers.iter().map(|reader| of(&application, Some(reader))).collect(),
        }
    };
    outputs.iter().flat_map(of_output).collect()
}

/// The application of an output or a reader that has a name.
fn of(app: &str, name: Option<&str>) -> String {
    name.map_or_else(|| app.to_owned(), |name| format!("{app}-{name}"))
}

/// The lease table of one of the applications: what tells that from the others tells its table too.
pub(super) fn table_of(table: Option<&str>, app: &str, application: &str) -> String {
    let Some(table) = table else { return application.to_owned() };
    let rest = application.strip_prefix(app).unwrap_or_default();
    format!("{table}{rest}")
}

fn is_each_once<'a>(mut names: impl Iterator<Item = &'a String>) -> bool {
    let mut seen = BTreeSet::new();
    names.all(|name| seen.insert(name))
}

/// Runs a worker until it is done, its output has `gone`, or it is to stop.
async fn work<F, H>(
    worker: WorkerBuilder<F>,
    observed: &OnceLock<Observer>,
    gone: impl Future<Output = ()> + Send,
    stop: &CancellationToken,
) -> Outcome
where
    F: Fn(&ShardId) -> H + Send + Sync + 'static,
    H: Handler,
{
    let worker = tokio::select! {
        built = worker.build() => built?,
        () = stop.cancelled() => return Ok(()),
    };
    // It is built once.
    let _ = observed.set(worker.observer());
    let shutdown = async {
        tokio::select! {
            () = stop.cancelled() => {}
            () = gone => {}
        }
    };
    worker.run(shutdown).await?;
    Ok(())
}
