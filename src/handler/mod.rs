//! What a service implements to get messages.

mod coalesce;
mod concurrent;
mod dead_letter;
mod deduplicate;

use std::{fmt, ops::Deref, time::Duration};

pub use coalesce::Coalesce;
pub use concurrent::{Concurrent, MessagesFailed};
pub(crate) use dead_letter::{DeadLetter, Place};
pub use deduplicate::Deduplicate;

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
    /// After an `Err` the same batch is offered again, five times in all with growing waits; then the
    /// worker stops with the error, and the batch is read again after a restart (P1). If the lease is
    /// lost meanwhile, the call is dropped at its next `await`: another worker has the shard (P4).
    fn handle(&mut self, batch: &Batch) -> impl Future<Output = Result<(), Self::Error>> + Send;

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

    /// The worker stops, or hands the shard to another one. No batch is under way: the last one is
    /// finished, or was given up after it failed. The checkpoint is written after this.
    fn stopping(&mut self) -> impl Future<Output = ()> + Send {
        async {}
    }
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

/// Messages of one shard, in order.
#[derive(Debug)]
pub struct Batch {
    pub(crate) messages: Vec<Message>,
    pub(crate) behind: Option<Duration>,
}

impl Batch {
    /// How far behind the tip of the stream this batch was read, where the server tells.
    pub fn behind(&self) -> Option<Duration> {
        self.behind
    }

    /// This batch with other messages: some of its own.
    pub(crate) fn with(&self, messages: Vec<Message>) -> Self {
        Self { messages, behind: self.behind }
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
mod testing {
    use std::sync::Arc;

    use super::*;
    use crate::{
        ocs::EventSource,
        record::{Record, ShardName, unpack},
        shard::SequenceNumber,
    };

    /// A batch of one record for each partition key and OCS line.
    pub(super) fn batch(lines: &[(&str, &str)]) -> Batch {
        let shard = Arc::new(ShardName { stream: "s".into(), shard: "shardId-0".into() });
        let mut messages = Vec::new();
        for (n, (key, line)) in lines.iter().enumerate() {
            let source = EventSource::new((*key).to_owned(), "test", None);
            let record = Record {
                sequence_number: SequenceNumber::parse((100 + n).to_string()).expect("a number"),
                partition_key: (*key).to_owned(),
                arrived_at: None,
                data: source.event("2025-07-02T15:00:00Z", line.as_bytes()).json.into(),
            };
            unpack(&shard, record, &mut messages, &mut Vec::new());
        }
        assert_eq!(messages.len(), lines.len());
        Batch { messages, behind: None }
    }

    /// Keeps what it is called with.
    #[derive(Debug, Default)]
    pub(super) struct Recorder {
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

        async fn stopping(&mut self) {
            self.heard.push("stopping");
        }
    }

    /// Calls everything but `handle`.
    pub(super) async fn hear_everything(handler: &mut impl Handler) {
        let tenure = Tenure { shard: "shardId-0".into(), lease_counter: 1, owner_switches: 0 };
        handler.started(&tenure).await;
        handler.ended().await;
        handler.lost().await;
        handler.stopping().await;
    }
}
