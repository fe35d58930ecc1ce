//! Reading ahead of the handler, within a bound.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinHandle,
    time::Instant,
};

use tracing::Instrument as _;

use super::{Read, ShardReader, SourceError};
use crate::backoff::Backoff;

/// How often a lasting failure is told again.
const REMINDER_INTERVAL: Duration = Duration::from_secs(60);
/// What a read and a record take beyond their payload, roughly: empty reads must not pile up either.
const READ_OVERHEAD_BYTES: usize = 1024;
const RECORD_OVERHEAD_BYTES: usize = 256;
/// How much is handed on at a time. A read may have 10 MiB, and what is made of it takes as much again.
const PIECE_BYTES: usize = 512 * 1024;

/// A shard that is being read in the background. Dropping it stops the reading.
pub(crate) struct Prefetch {
    reads: mpsc::UnboundedReceiver<Result<Prefetched, SourceError>>,
    task: JoinHandle<()>,
}

/// How reading goes.
pub(crate) enum Failing<'a> {
    /// A read failed, and the one before it did not: what was said of the shard's tip is not known any
    /// more.
    Since(&'a SourceError),
    /// Reads succeed again, after this.
    NoMore(&'a str),
}

/// A read or a piece of one, and the part of the buffer that it takes until it is dropped.
pub(crate) struct Prefetched {
    pub read: Read,
    _room: Option<OwnedSemaphorePermit>,
}

impl Prefetch {
    /// Reads ahead until `limit_bytes` of records wait to be handled. The read in hand comes on top: at
    /// most 10 MiB, the largest answer of Kinesis.
    ///
    /// `failing` is called when reads begin to fail, and when they no longer do.
    pub(crate) fn start(
        reader: ShardReader,
        limit_bytes: u32,
        failing: impl Fn(Failing<'_>) + Send + Sync + 'static,
    ) -> Self {
        let (sender, reads) = mpsc::unbounded_channel();
        Self {
            reads,
            task: tokio::spawn(run(reader, limit_bytes, failing, sender).in_current_span()),
        }
    }

    /// The next read. An error is final: reading may not succeed without someone doing something.
    pub(crate) async fn next(&mut self) -> Option<Result<Prefetched, SourceError>> {
        self.reads.recv().await
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run(
    mut reader: ShardReader,
    limit_bytes: u32,
    failing: impl Fn(Failing<'_>) + Send,
    sender: mpsc::UnboundedSender<Result<Prefetched, SourceError>>,
) {
    let limit_bytes = limit_bytes.max(1);
    let room = Arc::new(Semaphore::new(limit_bytes as usize));
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
    let mut failures = 0_u32;
    let mut failed = String::new();
    let mut remind_at = Instant::now();
    loop {
        let read = match reader.read().await {
            Ok(read) => read,
            // What never worked is a mistake in the set-up. What worked once may work again, unless the
            // stream was deleted.
            Err(error)
                if error.is_final()
                    || (!reader.stream.was_read(false) && !error.is_transient()) =>
            {
                let _ = sender.send(Err(error));
                return;
            }
            Err(error) => {
                if failures == 0 {
                    failing(Failing::Since(&error));
                }
                failures += 1;
                failed = error.to_string();
                if Instant::now() >= remind_at {
                    remind_at = Instant::now() + REMINDER_INTERVAL;
                    tracing::warn!(failures, "{error}; trying again until it works");
                }
                tokio::time::sleep(backoff.next_wait()).await;
                continue;
            }
        };
        if failures > 0 {
            tracing::info!(
                stream = reader.stream.name(), shard = %reader.shard,
                "reading again after {failures} failed attempts"
            );
            failing(Failing::NoMore(&failed));
            failures = 0;
            remind_at = Instant::now();
            backoff.reset();
        }
        reader.stream.was_read(true);
        let ended = read.end.is_some();
        for read in read.pieces(PIECE_BYTES) {
            let overhead = READ_OVERHEAD_BYTES + read.records.len() * RECORD_OVERHEAD_BYTES;
            let size = u32::try_from(read.size_bytes() + overhead).unwrap_or(u32::MAX);
            let room = room.clone().acquire_many_owned(size.min(limit_bytes)).await.ok();
            if sender.send(Ok(Prefetched { read, _room: room })).is_err() {
                return;
            }
        }
        if ended {
            return;
        }
    }
}
