//! What a service implements to get messages.

mod ack;
mod coalesce;
mod concurrent;
mod dead_letter;
#[cfg(any(test, feature = "cli"))]
mod dead_letter_line;
mod dead_letters;
mod deduplicate;
mod failure;

use std::{
    fmt,
    ops::Deref,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::sync::mpsc;

pub use ack::Ack;
pub(crate) use ack::Answer;
pub use coalesce::Coalesce;
pub use concurrent::{Concurrent, MessagesFailed};
#[cfg(test)]
pub(crate) use dead_letter::tests as dead_letter_tests;
pub(crate) use dead_letter::{DeadLetter, Kind, Place, RecordPlace};
#[cfg(feature = "cli")]
pub(crate) use dead_letter::{LetterId, Part, hexadecimal};
#[cfg(feature = "cli")]
pub(crate) use dead_letter_line::ReadLine;
pub(crate) use dead_letters::DeadLetterStore;
pub(crate) use dead_letters::s3::client as s3_client;
pub use dead_letters::{DeadLetterError, DeadLetters};
#[cfg(feature = "cli")]
pub(crate) use dead_letters::{
    Destination,
    file::sync_name,
    is_stream_name,
    kinesis::{KEY_LIMIT_CHARS, Outgoing, RECORD_LIMIT_BYTES, put_records, round},
};
pub use deduplicate::Deduplicate;
pub(crate) use failure::{Failure, FailureCause, FailureRate};
pub use failure::{OnFailure, Retries, RetryPer, Tolerance};

use crate::{record::Message, shard::ShardId};

/// Does a service's work with the messages of one shard.
///
/// A worker makes one handler for each shard that it reads and calls it with one batch at a time, in
/// order. Handlers of different shards run side by side.
///
/// ```
/// use tramline::{Batch, Handler};
///
/// struct Print;
///
/// impl Handler for Print {
///     type Error = std::convert::Infallible;
///
///     async fn handle(&mut self, batch: &Batch) -> Result<(), Self::Error> {
///         for message in batch {
///             println!("{}", message.raw());
///         }
///         Ok(())
///     }
/// }
/// ```
pub trait Handler: Send + 'static {
    /// Why a batch could not be handled. Its text goes to the log.
    type Error: fmt::Display + Send;

    /// Handles a batch. `Ok` says that all of it is finished: the checkpoint may pass it.
    ///
    /// After an `Err`, a panic or a call that takes too long, the same batch is offered again, as
    /// [`Retries`] says; then its messages one by one; and what still fails is dealt with as
    /// [`OnFailure`] says. So a handler must be fit to go on after any of these. If the lease is lost
    /// meanwhile, the call is dropped at its next `await`: another worker has the shard (P4).
    fn handle(&mut self, batch: &Batch) -> impl Future<Output = Result<(), Self::Error>> + Send;

    /// Whether a batch is to hold all that was read and waits, up to 10 000 records, instead of what one
    /// read gave. For a handler whose work grows slower than its batch: one that leaves out what is outdated
    /// ([`Coalesce`]), or that writes a batch in one go. One that takes its time for every message is better
    /// without: its batches would outgrow the time limit of [`Retries`]. Asked before each batch.
    fn takes_backlog(&self) -> bool {
        false
    }

    /// Reading of the shard starts.
    fn started(&mut self, tenure: &Tenure) -> impl Future<Output = ()> + Send {
        let _ = tenure;
        async {}
    }

    /// The shard is closed and every message of it was handled; the handler is not called again.
    fn ended(&mut self) -> impl Future<Output = ()> + Send {
        async {}
    }

    /// Another worker has the shard now. Nothing that is done after this belongs to it any more.
    fn lost(&mut self) -> impl Future<Output = ()> + Send {
        async {}
    }

    /// The reading of the shard stops here. No batch is under way. Acknowledgements are waited for, and
    /// then the checkpoint is written, after this.
    fn stopping(&mut self, why: StopReason) -> impl Future<Output = ()> + Send {
        let _ = why;
        async {}
    }

    /// The handler's state after all that it has finished, to be stored in the same write as the position
    /// ([`Checkpoints`](crate::Checkpoints) in S3 or a file): whatever happens, both agree, so that each
    /// message counts in the state exactly once. Called before each checkpoint, between batches. So a call of
    /// [`handle`](Self::handle) changes the state by all of its batch, or, if it fails, by nothing of it.
    ///
    /// `None`, the default, stores the position alone.
    fn snapshot(&mut self) -> Result<Option<Vec<u8>>, Self::Error> {
        Ok(None)
    }

    /// Takes up the state that was stored with the position at which reading goes on. Called once, before
    /// [`started`](Self::started), if there is one.
    fn restore(&mut self, state: &[u8]) -> Result<(), Self::Error> {
        let _ = state;
        Ok(())
    }
}

/// Why the reading of a shard stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum StopReason {
    /// The worker stops.
    Shutdown,
    /// Another worker gets the shard.
    HandOver,
    /// A message could not be handled, and the policy is to stop, or too many were.
    Failed,
    /// The end of the time window is reached.
    WindowEnd,
}

/// A worker's time with a shard, from taking its lease to losing it or letting go.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Tenure {
    /// The shard.
    pub shard: ShardId,
    /// The lease's counter when this worker took it: a fencing token. Every later tenure of the shard
    /// has a higher one, so a database that keeps the highest it has seen, and refuses writes that carry
    /// a lower one, is safe from a worker that does not know yet that it lost the shard. (Martin
    /// Kleppmann, "How to do distributed locking".)
    pub lease_counter: u64,
    /// How often the lease has moved between workers since its last checkpoint: a number that grows says
    /// that workers fail on this shard before they finish anything.
    pub owner_switches: u64,
}

/// Messages of one shard, in order: those of one read, or of several
/// ([`Handler::takes_backlog`]). A slice of [`Message`] with a few things to ask of the worker.
///
/// A read is a `GetRecords` answer, of up to 10 000 records and 10 MiB, or an event of `SubscribeToShard`;
/// a record may hold many messages. There is always at least one.
///
/// ```
/// use tramline::Batch;
///
/// /// When the producer received the first and the last one.
/// fn span(batch: &Batch) -> Option<(&str, &str)> {
///     Some((batch.first()?.time_text(), batch.last()?.time_text()))
/// }
/// ```
#[derive(Debug)]
pub struct Batch {
    pub(crate) messages: Vec<Message>,
    pub(crate) behind: Option<Duration>,
    pub(crate) acks: Acks,
}

/// Where acknowledgements of a batch go, and what the handler asked for.
#[derive(Debug, Clone)]
pub(crate) struct Acks {
    /// The serial number of each message.
    pub serials: Arc<[u64]>,
    /// Those of messages that were left out of the batch: finished with it.
    pub left_out: Arc<[u64]>,
    to: mpsc::UnboundedSender<Answer>,
    asked: Arc<Asked>,
}

#[derive(Debug, Default)]
struct Asked {
    acks: AtomicBool,
    checkpoint: AtomicBool,
}

impl Acks {
    pub(crate) fn new(serials: Arc<[u64]>, to: mpsc::UnboundedSender<Answer>) -> Self {
        Self { serials, left_out: Arc::default(), to, asked: Arc::default() }
    }

    /// Whether the handler acknowledges messages one by one.
    pub(crate) fn are_taken(&self) -> bool {
        self.asked.acks.load(Ordering::Acquire)
    }

    /// As before it was offered.
    pub(crate) fn take_back(&self) {
        self.asked.acks.store(false, Ordering::Release);
    }
}

impl Batch {
    pub(crate) fn new(messages: Vec<Message>, behind: Option<Duration>, acks: Acks) -> Self {
        Self { messages, behind, acks }
    }

    /// The same batch with only some of its messages, by their places; the others count as finished with
    /// it.
    pub(crate) fn only(&self, kept: &[usize]) -> Self {
        let messages = kept.iter().map(|n| self.messages[*n].clone()).collect();
        let serials = kept.iter().map(|n| self.acks.serials[*n]).collect();
        let left_out = (0..self.len()).filter(|n| kept.binary_search(n).is_err());
        let left_out = left_out.map(|n| self.acks.serials[n]);
        let left_out = left_out.chain(self.acks.left_out.iter().copied()).collect();
        Self::new(messages, self.behind, Acks { serials, left_out, ..self.acks.clone() })
    }

    /// Takes over to say when each message is finished: one [`Ack`] for each, in the order of the
    /// messages. `Ok` then says only that the batch was taken, so that the next one comes; acknowledge in
    /// any order, from any task. The checkpoint stays before the first message that is not acknowledged,
    /// and reading waits while too many are not ([`WorkerBuilder::max_unacked`]).
    ///
    /// ```
    /// use std::convert::Infallible;
    ///
    /// use tramline::{Batch, Handler};
    ///
    /// /// Works on all messages of a batch at once, and on those of the next one beside them.
    /// struct AtOnce;
    ///
    /// impl Handler for AtOnce {
    ///     type Error = Infallible;
    ///
    ///     async fn handle(&mut self, batch: &Batch) -> Result<(), Infallible> {
    ///         for (message, ack) in batch.iter().cloned().zip(batch.ack_later()) {
    ///             tokio::spawn(async move {
    ///                 println!("{}", message.raw());
    ///                 ack.ack();
    ///             });
    ///         }
    ///         Ok(())
    ///     }
    /// }
    /// ```
    ///
    /// [`WorkerBuilder::max_unacked`]: crate::WorkerBuilder::max_unacked
    #[must_use = "a message that is not acknowledged comes again"]
    pub fn ack_later(&self) -> Vec<Ack> {
        self.acks.asked.acks.store(true, Ordering::Release);
        let ack = |serial: &u64| Ack::new(*serial, self.acks.to.clone());
        self.acks.left_out.iter().map(ack).for_each(Ack::ack);
        self.acks.serials.iter().map(ack).collect()
    }

    /// Asks for a checkpoint as soon as this batch is finished, instead of at the next interval. With
    /// [`checkpoint_interval`](crate::WorkerBuilder::checkpoint_interval) set to
    /// [`Duration::MAX`] there is no other, but at the end of the shard, at a hand-over and at a stop.
    pub fn checkpoint_now(&self) {
        self.acks.asked.checkpoint.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_checkpoint_wanted(&self) -> bool {
        self.acks.asked.checkpoint.load(Ordering::Relaxed)
    }

    /// How far behind the tip of the stream this batch was read, where the server tells
    /// (`MillisBehindLatest`).
    pub fn behind(&self) -> Option<Duration> {
        self.behind
    }
}

impl Deref for Batch {
    type Target = [Message];

    fn deref(&self) -> &[Message] {
        &self.messages
    }
}

impl<'a> IntoIterator for &'a Batch {
    type Item = &'a Message;
    type IntoIter = std::slice::Iter<'a, Message>;

    fn into_iter(self) -> Self::IntoIter {
        self.messages.iter()
    }
}

/// What the tests of the handlers here share.
#[cfg(test)]
pub(crate) mod testing {
    use std::sync::Arc;

    use super::*;
    use crate::{
        ocs::EventSource,
        record::{Record, ShardName, unpack},
        shard::SequenceNumber,
    };

    /// A batch of one record for each partition key and OCS line.
    pub(crate) fn batch(lines: &[(&str, &str)]) -> Batch {
        let shard = Arc::new(ShardName {
            stream: "s".into(),
            shard: "shardId-0".into(),
            hash_key_range: None,
        });
        let mut messages = Vec::new();
        for (n, (key, line)) in lines.iter().enumerate() {
            let source = EventSource::new((*key).to_owned(), "test", None);
            let record = Record {
                sequence_number: SequenceNumber::parse((100 + n).to_string()).expect("a number"),
                partition_key: (*key).to_owned(),
                arrived_at: None,
                data: source.event("2025-07-02T15:00:00Z", line.as_bytes()).json.into(),
            };
            unpack(&shard, record, None, &mut messages, &mut Vec::new());
        }
        assert_eq!(messages.len(), lines.len());
        let acks = Acks::new((0..messages.len() as u64).collect(), mpsc::unbounded_channel().0);
        Batch::new(messages, None, acks)
    }

    /// Keeps what it is called with.
    #[derive(Debug, Default)]
    pub(crate) struct Recorder {
        pub batches: Vec<Vec<String>>,
        pub behind: Vec<Option<Duration>>,
        pub heard: Vec<&'static str>,
        /// How many batches it refuses first.
        pub failures: u32,
    }

    impl Handler for Recorder {
        type Error = &'static str;

        async fn handle(&mut self, batch: &Batch) -> Result<(), Self::Error> {
            if self.failures > 0 {
                self.failures -= 1;
                return Err("as told");
            }
            self.batches.push(batch.iter().map(|message| message.raw().to_owned()).collect());
            self.behind.push(batch.behind());
            Ok(())
        }

        async fn started(&mut self, _: &Tenure) {
            self.heard.push("started");
        }

        async fn ended(&mut self) {
            self.heard.push("ended");
        }

        async fn lost(&mut self) {
            self.heard.push("lost");
        }

        async fn stopping(&mut self, _: StopReason) {
            self.heard.push("stopping");
        }

        fn snapshot(&mut self) -> Result<Option<Vec<u8>>, Self::Error> {
            self.heard.push("snapshot");
            Ok(None)
        }

        fn restore(&mut self, _: &[u8]) -> Result<(), Self::Error> {
            self.heard.push("restore");
            Ok(())
        }

        fn takes_backlog(&self) -> bool {
            true
        }
    }

    /// Calls everything but `handle`.
    pub(crate) async fn hear_everything(handler: &mut impl Handler) {
        let tenure = Tenure { shard: "shardId-0".into(), lease_counter: 1, owner_switches: 0 };
        handler.started(&tenure).await;
        handler.ended().await;
        handler.lost().await;
        handler.stopping(StopReason::Shutdown).await;
        let _ = (handler.snapshot(), handler.restore(&[]));
    }
}
