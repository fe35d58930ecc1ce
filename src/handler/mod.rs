//! What a service implements to get messages.

mod dead_letter;
#[cfg(any(test, feature = "cli"))]
mod dead_letter_line;
#[cfg_attr(not(test), expect(dead_code, reason = "the worker's failure policy stores through it"))]
mod dead_letters;

use std::{fmt, ops::Deref, time::Duration};

#[cfg(test)]
pub(crate) use dead_letter::tests as dead_letter_tests;
pub(crate) use dead_letter::{DeadLetter, Kind, Place, RecordPlace};
#[cfg(feature = "cli")]
pub(crate) use dead_letter::{LetterId, Part, hexadecimal};
#[cfg(feature = "cli")]
pub(crate) use dead_letter_line::ReadLine;
pub use dead_letters::{DeadLetterError, DeadLetters};
#[cfg(feature = "cli")]
pub(crate) use dead_letters::{
    Destination,
    file::sync_name,
    is_stream_name,
    kinesis::{KEY_LIMIT_CHARS, Outgoing, RECORD_LIMIT_BYTES, put_records, round},
    s3::client as s3_client,
};

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
