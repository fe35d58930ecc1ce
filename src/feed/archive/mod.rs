//! The day's log in S3, in the format that analysts use.
//!
//! An object holds the lines of some consecutive messages of one service day and shard. It is named by
//! the place of its first message, and written on the condition that there is none of that name. Who is
//! refused reads where the object that is there ends, and goes on after that. So the objects of a day
//! and shard are a chain that any number of writers can only make longer at its end: it does not matter
//! from which checkpoint one starts again, nor that one which lost its lease writes late. Each message is
//! in it once, and a checkpoint passes it when it is.

mod day;
mod objects;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use aws_types::SdkConfig;
use jiff::civil::Date;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument as _;

use self::{
    day::{Day, Place},
    objects::{Folder, Objects},
};
use crate::{
    aws::{AwsError, AwsErrorKind},
    backoff::Backoff,
    handler::{Ack, Batch, Handler, StopReason},
    ocs::{ArchiveLine, ServiceDay},
    record::Message,
};

/// An object is written when so many messages wait, however young they are. Fewer than a worker lets
/// wait for their acknowledgements: else reading would wait for the interval.
const MESSAGES: usize = 8_000;
/// The same for the bytes of their texts.
const BYTES: usize = 8 * 1024 * 1024;
/// How many service days of a shard are looked after at a time.
const DAYS: usize = 4;
/// How often a lasting failure is told again.
const REMINDER_INTERVAL: Duration = Duration::from_secs(60);

/// Writes the day's log to S3: [`ArchiveLine`]s in objects named
/// `PREFIX/YYYY-MM-DD/STREAM/SHARD/PLACE.txt`.
///
/// The date is the service day's, from 02:00 in New York, of the time at which the message was received.
/// All objects of a day and shard in the order of their names, one after the other, are its log: each
/// message once and in order, whatever happened in between, as long as the prefix is for one
/// application. The names of a prefix and a date name everything of that day.
///
/// Needs `s3:ListBucket` on the bucket, and `s3:GetObject` and `s3:PutObject` on the objects. The worker
/// must be allowed at least 10 000 unacknowledged messages, its default; with fewer, an object is only
/// written each interval.
///
/// ```no_run
/// # async fn example(aws: aws_config::SdkConfig) -> Result<(), Box<dyn std::error::Error>> {
/// use tramline::{Worker, feed::Archive, shutdown_signal};
///
/// let archive = Archive::open(&aws, "ocs-archive", "raw").await?;
/// let worker = Worker::builder(&aws, "ctd-ocs-raw-messages", "archive")
///     .handler(move |_shard| archive.handler())
///     .build()
///     .await?;
/// worker.run(shutdown_signal()).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Archive {
    objects: Arc<Objects>,
    /// An object was written: what fails from then on is tried again, whatever it is.
    has_worked: Arc<AtomicBool>,
    interval: Duration,
}

/// Why the archive cannot be written.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ArchiveError {
    /// S3 did not do what was asked.
    #[error("the archive {object}: {source}")]
    S3 {
        /// The object, or what the names of several begin with.
        object: String,
        /// What S3 said.
        source: AwsError,
    },
    /// There is an object that this did not write.
    #[error(
        "the archive has an object {object} that was not written by Tramline: where it ends cannot be \
         told; move it elsewhere, or use another prefix"
    )]
    Foreign {
        /// The object.
        object: String,
    },
    /// A message has no readable time, so that its service day is not known.
    #[error("the event's time {time:?} cannot be read, and Kinesis gave none")]
    NoTime {
        /// The event's time as it stands there.
        time: String,
    },
}

impl ArchiveError {
    /// Whether waiting may help.
    fn is_transient(&self) -> bool {
        // A condition is in doubt while another write of the same name is under way.
        matches!(self, Self::S3 { source, .. }
            if source.is_transient() || source.kind() == AwsErrorKind::Condition)
    }
}

impl Archive {
    /// An archive below `prefix`, which may be empty. An error if the bucket cannot be listed.
    pub async fn open(
        config: &SdkConfig,
        bucket: &str,
        prefix: &str,
    ) -> Result<Self, ArchiveError> {
        let objects = Objects::new(config, bucket, prefix);
        objects.check().await?;
        let interval = Duration::from_secs(60);
        Ok(Self { objects: objects.into(), has_worked: Arc::default(), interval })
    }

    /// How old a message may get before it is written; default: 60 s. The longer, the fewer objects. A
    /// checkpoint, and the start of child shards, waits for it.
    #[must_use]
    pub fn interval(mut self, interval: Duration) -> Self {
        self.interval = interval;
        self
    }

    /// Tries until it works, if it may: what never worked is an error at once.
    async fn until_it_works<'a, T, A>(
        &'a self,
        attempt: impl Fn(&'a Objects) -> A,
    ) -> Result<T, ArchiveError>
    where
        A: Future<Output = Result<T, ArchiveError>>,
    {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        let mut told_at: Option<Instant> = None;
        loop {
            let error = match attempt(&self.objects).await {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            if !error.is_transient() && !self.has_worked.load(Ordering::Relaxed) {
                return Err(error);
            }
            if told_at.is_none_or(|at| at.elapsed() >= REMINDER_INTERVAL) {
                told_at = Some(Instant::now());
                tracing::warn!("{error}; trying again until it works, and the messages wait");
            }
            sleep(backoff.next_wait()).await;
        }
    }

    /// The handler for one shard.
    pub fn handler(&self) -> ArchiveHandler {
        ArchiveHandler { archive: self.clone(), failed: Arc::default(), writer: None }
    }
}

/// Archives the messages of one shard. Made by [`Archive::handler`].
///
/// When S3 is away, it waits until it is back: reading waits with it, and nothing is lost.
#[derive(Debug)]
pub struct ArchiveHandler {
    archive: Archive,
    /// Why nothing can be archived.
    failed: Arc<OnceLock<ArchiveError>>,
    writer: Option<(mpsc::UnboundedSender<Command>, AbortOnDropHandle<()>)>,
}

enum Command {
    Take(Vec<(Message, Ack)>),
    Flush,
}

impl ArchiveHandler {
    /// Gives the writer something to do; starts it if there is none.
    fn tell(&mut self, command: Command) {
        let (to_writer, _) = self.writer.get_or_insert_with(|| {
            // What waits in it is bounded by how many messages a worker lets be unacknowledged.
            let (to_writer, commands) = mpsc::unbounded_channel();
            let writer = Writer {
                archive: self.archive.clone(),
                failed: self.failed.clone(),
                service_day: ServiceDay::default(),
                days: BTreeMap::new(),
                waiting: Total::default(),
            };
            let writing = writer.run(commands).in_current_span();
            (to_writer, AbortOnDropHandle::new(tokio::spawn(writing)))
        });
        // A writer that ended has said why.
        let _ = to_writer.send(command);
    }
}

impl Handler for ArchiveHandler {
    type Error = ArchiveError;

    /// Takes the batch; its messages are finished when they are in an object.
    async fn handle(&mut self, batch: &Batch) -> Result<(), ArchiveError> {
        if let Some(error) = self.failed.get() {
            return Err(error.clone());
        }
        self.tell(Command::Take(batch.iter().cloned().zip(batch.ack_later()).collect()));
        Ok(())
    }

    /// What waits is written at once; the worker waits for the acknowledgements.
    async fn stopping(&mut self, _: StopReason) {
        self.tell(Command::Flush);
    }
}

/// Writes the objects of one shard.
struct Writer {
    archive: Archive,
    failed: Arc<OnceLock<ArchiveError>>,
    service_day: ServiceDay,
    days: BTreeMap<Date, OpenDay>,
    waiting: Total,
}

struct OpenDay {
    stream: String,
    shard: String,
    day: Day<Ack>,
}

/// What waits, of all days.
#[derive(Default)]
struct Total {
    messages: usize,
    bytes: usize,
    /// When the oldest came.
    since: Option<Instant>,
}

impl Writer {
    /// Works until the handler is dropped, or nothing can be archived.
    async fn run(mut self, mut commands: mpsc::UnboundedReceiver<Command>) {
        if let Err(error) = self.work(&mut commands).await {
            let reason = error.to_string();
            // Before the messages come back: they are refused from now on.
            let _ = self.failed.set(error);
            commands.close();
            let given_up = self.days.into_values().flat_map(|open| open.day.give_up());
            given_up.for_each(|ack| ack.nack(&reason));
            while let Some(command) = commands.recv().await {
                if let Command::Take(messages) = command {
                    messages.into_iter().for_each(|(_, ack)| ack.nack(&reason));
                }
            }
        }
    }

    async fn work(
        &mut self,
        commands: &mut mpsc::UnboundedReceiver<Command>,
    ) -> Result<(), ArchiveError> {
        loop {
            let due = self.waiting.since.map(|since| since + self.archive.interval);
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::Take(messages)) => {
                        for (message, ack) in messages {
                            self.take(&message, ack).await?;
                        }
                    }
                    Some(Command::Flush) => self.flush().await?,
                    None => return Ok(()),
                },
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    self.flush().await?;
                }
            }
        }
    }

    async fn take(&mut self, message: &Message, ack: Ack) -> Result<(), ArchiveError> {
        let Some(received_at) = message.time().or(message.arrived_at()) else {
            ack.nack(ArchiveError::NoTime { time: message.time_text().to_owned() });
            return Ok(());
        };
        let date = self.service_day.date(received_at);
        let place = Place::of(message);
        if !self.days.contains_key(&date) {
            self.open(date, message).await?;
        }
        if let Some(met) = self.days.get_mut(&date).and_then(|open| open.day.meets(&place)) {
            self.write(date).await?;
            self.pass(date, &met).await?;
        }
        let Some(open) = self.days.get_mut(&date) else { return Ok(()) };
        let write =
            |lines: &mut Vec<u8>| ArchiveLine::write(received_at, &message.raw_bytes(), lines);
        match open.day.take(place, ack, write) {
            Some(ack) => ack.ack(),
            None => {
                self.waiting.messages += 1;
                self.waiting.bytes += message.raw().len();
                self.waiting.since.get_or_insert_with(Instant::now);
            }
        }
        if self.waiting.messages >= MESSAGES || self.waiting.bytes >= BYTES {
            self.flush().await?;
        }
        Ok(())
    }

    /// Looks up which objects a day has.
    async fn open(&mut self, date: Date, message: &Message) -> Result<(), ArchiveError> {
        if self.days.len() >= DAYS {
            self.flush().await?;
            self.days.clear();
        }
        let (stream, shard) = (message.stream(), message.shard().as_str());
        let folder = Folder { date, stream, shard };
        let starts = self.archive.until_it_works(|objects| objects.starts(folder)).await?;
        let (stream, shard) = (stream.to_owned(), shard.to_owned());
        self.days.insert(date, OpenDay { stream, shard, day: Day::new(starts) });
        Ok(())
    }

    /// Writes what waits, of all days.
    async fn flush(&mut self) -> Result<(), ArchiveError> {
        let dates: Vec<Date> = self.days.keys().copied().collect();
        for date in dates {
            self.write(date).await?;
        }
        self.waiting = Total::default();
        Ok(())
    }

    /// Writes what waits, of one day.
    async fn write(&mut self, date: Date) -> Result<(), ArchiveError> {
        let Self { archive, days, .. } = self;
        let Some(open) = days.get_mut(&date) else { return Ok(()) };
        while let Some(object) = open.day.object() {
            let (first, last) = (object.first.clone(), object.last.clone());
            let folder = Folder { date, stream: &open.stream, shard: &open.shard };
            let is_new = archive.until_it_works(|objects| objects.write(folder, object)).await?;
            let end = if is_new {
                archive.has_worked.store(true, Ordering::Relaxed);
                tracing::debug!(%date, %first, %last, bytes = object.lines.len(), "object written");
                Some(last)
            } else {
                // Another worker's, or our own if the answer to an earlier attempt got lost.
                archive.until_it_works(|objects| objects.end(folder, &first)).await?
            };
            if let Some(end) = end {
                open.day.archived(end).into_iter().for_each(Ack::ack);
            }
        }
        Ok(())
    }

    /// Goes on after an object that is there.
    async fn pass(&mut self, date: Date, first: &Place) -> Result<(), ArchiveError> {
        let Some(open) = self.days.get_mut(&date) else { return Ok(()) };
        let folder = Folder { date, stream: &open.stream, shard: &open.shard };
        if let Some(end) = self.archive.until_it_works(|objects| objects.end(folder, first)).await?
        {
            open.day.archived(end).into_iter().for_each(Ack::ack);
        }
        Ok(())
    }
}

#[cfg(all(test, feature = "local"))]
mod server_tests {
    use super::*;
    use crate::{
        handler::{Acks, Answer, s3_client},
        local::{Local, LocalSettings},
        ocs::EventSource,
        record::{Record, ShardName, unpack},
        shard::SequenceNumber,
    };

    /// The messages with these numbers, and where they are acknowledged.
    fn batch(numbers: std::ops::Range<u64>) -> (Batch, mpsc::UnboundedReceiver<Answer>) {
        let (stream, shard) = ("s".into(), "shardId-0".into());
        let shard = Arc::new(ShardName { stream, shard, hash_key_range: None });
        let source = EventSource::new("k".to_owned(), "test", None);
        let mut messages = Vec::new();
        for n in numbers {
            let raw = format!("{n},DIAG,x");
            let record = Record {
                sequence_number: SequenceNumber::parse((100 + n).to_string()).expect("a number"),
                partition_key: "k".to_owned(),
                arrived_at: None,
                data: source.event("2025-07-02T15:00:00Z", raw.as_bytes()).json.into(),
            };
            unpack(&shard, record, None, &mut messages, &mut Vec::new());
        }
        let (to, answers) = mpsc::unbounded_channel();
        let acks = Acks::new((0..messages.len() as u64).collect(), to);
        (Batch::new(messages, None, acks), answers)
    }

    async fn take(handler: &mut ArchiveHandler, batch: &Batch) {
        handler.handle(batch).await.expect("taken");
    }

    /// Lets the handler write what waits, and checks that all of its batch is finished then.
    async fn write(
        handler: &mut ArchiveHandler,
        batch: &Batch,
        answers: &mut mpsc::UnboundedReceiver<Answer>,
    ) {
        handler.stopping(StopReason::Shutdown).await;
        for _ in batch {
            assert_eq!(answers.recv().await.expect("an answer").failed, None);
        }
    }

    #[tokio::test]
    async fn p4_one_that_lost_the_shard_and_writes_late_doubles_and_hides_nothing() {
        let local = Local::start(LocalSettings::default()).await.expect("servers");
        let config = local.sdk_config();
        let client = s3_client(&config);
        client.create_bucket().bucket("logs").send().await.expect("a bucket");
        let archive = Archive::open(&config, "logs", "/a/b/").await.expect("a bucket");
        let archive = archive.interval(Duration::from_secs(3600));
        let (mut old, mut new) = (archive.handler(), archive.handler());

        let (of_old, mut old_answers) = batch(0..10);
        take(&mut old, &of_old).await;
        let (of_new, mut answers) = batch(0..6);
        take(&mut new, &of_new).await;
        write(&mut new, &of_new, &mut answers).await;
        write(&mut old, &of_old, &mut old_answers).await;
        let (of_new, mut answers) = batch(6..20);
        take(&mut new, &of_new).await;
        write(&mut new, &of_new, &mut answers).await;

        let listed = client.list_objects_v2().bucket("logs").send().await.expect("a list");
        let mut keys: Vec<&str> = listed.contents().iter().filter_map(|o| o.key()).collect();
        keys.sort_unstable();
        let mut log = Vec::new();
        for key in &keys {
            assert!(key.starts_with("a/b/2025-07-02/s/shardId-0/"), "{key}");
            let object = client.get_object().bucket("logs").key(*key).send().await;
            let body = object.expect("an object").body.collect().await.expect("bytes");
            log.extend(body.into_bytes());
        }
        let expected: String = (0..20).map(|n| format!("07/02/25,11:00:00,{n},DIAG,x\n")).collect();
        assert_eq!(String::from_utf8(log).expect("text"), expected);
        assert_eq!(keys.len(), 3, "{keys:?}");
    }
}
