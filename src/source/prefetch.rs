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
const PIECE_BYTES: usize = 1024 * 1024;
/// The most records of a backlog that are given at once: as many as one read of Kinesis may have.
const BACKLOG_RECORDS: usize = 10_000;

/// A shard that is being read in the background. Dropping it stops the reading.
pub(crate) struct Prefetch {
    reads: mpsc::UnboundedReceiver<Result<Prefetched, SourceError>>,
    /// One that was looked at and not given yet.
    next: Option<Result<Prefetched, SourceError>>,
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
    room: Option<OwnedSemaphorePermit>,
}

impl Prefetched {
    /// Whether it says no more than that there was nothing when it was made.
    fn is_empty(&self) -> bool {
        self.read.records.is_empty() && self.read.end.is_none()
    }

    /// Takes up the read that follows, unless that is too much for one.
    fn append(&mut self, mut next: Self) -> Result<(), Self> {
        if self.read.records.len() + next.read.records.len() > BACKLOG_RECORDS {
            return Err(next);
        }
        self.read.records.append(&mut next.read.records);
        (self.read.behind, self.read.end) = (next.read.behind, next.read.end);
        match (&mut self.room, next.room) {
            (Some(room), Some(more)) => room.merge(more),
            (room, more) => *room = room.take().or(more),
        }
        Ok(())
    }
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
            next: None,
            task: tokio::spawn(run(reader, limit_bytes, failing, sender).in_current_span()),
        }
    }

    /// The next read, or with `backlog` all that wait, up to 10 000 records. An error is final: reading
    /// may not succeed without someone doing something.
    pub(crate) async fn next(&mut self, backlog: bool) -> Option<Result<Prefetched, SourceError>> {
        let mut given = match self.next.take() {
            Some(next) => next,
            None => self.reads.recv().await?,
        };
        if backlog && let Ok(given) = &mut given {
            while let Ok(next) = self.reads.try_recv() {
                match next {
                    // Outdated by what follows. If nothing does, it says that the tip is reached.
                    Ok(next) if next.is_empty() => self.next = Some(Ok(next)),
                    Ok(next) => match given.append(next) {
                        Ok(()) => self.next = None,
                        Err(next) => {
                            self.next = Some(Ok(next));
                            break;
                        }
                    },
                    Err(error) => {
                        self.next = Some(Err(error));
                        break;
                    }
                }
            }
        }
        Some(given)
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
            if sender.send(Ok(Prefetched { read, room })).is_err() {
                return;
            }
        }
        if ended {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{aws::AwsError, record::Record, shard::SequenceNumber};

    /// Reads that wait, of these records and with this room each.
    fn waiting(reads: Vec<Result<Vec<usize>, &str>>) -> (Prefetch, Arc<Semaphore>) {
        let room = Arc::new(Semaphore::new(100));
        let (sender, waiting) = mpsc::unbounded_channel();
        for read in reads {
            let record = |n: usize| Record {
                sequence_number: SequenceNumber::parse(n.to_string()).expect("a number"),
                partition_key: "k".to_owned(),
                arrived_at: None,
                data: "{}".into(),
            };
            let room = room.clone().try_acquire_owned().ok();
            let read = match read {
                Ok(numbers) => Ok(Prefetched {
                    read: Read {
                        behind: numbers.last().map(|n| Duration::from_secs(*n as u64)),
                        records: numbers.into_iter().map(record).collect(),
                        end: None,
                    },
                    room,
                }),
                Err(said) => Err(SourceError::Stream {
                    stream: said.to_owned(),
                    source: AwsError::new("a", crate::AwsErrorKind::Refused, said),
                }),
            };
            assert!(sender.send(read).is_ok());
        }
        (Prefetch { reads: waiting, next: None, task: tokio::spawn(async {}) }, room)
    }

    fn numbers(given: &Prefetched) -> Vec<String> {
        given.read.records.iter().map(|r| r.sequence_number.as_str().to_owned()).collect()
    }

    #[tokio::test]
    async fn p2_a_backlog_is_given_in_order_and_frees_its_room_when_it_is_handled() {
        let reads = [vec![1, 2], vec![3], vec![], vec![4], vec![]].map(Ok);
        let (mut prefetch, room) = waiting(reads.into_iter().chain([Err("gone")]).collect());
        let given = prefetch.next(true).await.expect("a read").expect("no error");
        assert_eq!(numbers(&given), ["1", "2", "3", "4"]);
        assert_eq!(given.read.behind, Some(Duration::from_secs(4)));
        assert_eq!(room.available_permits(), 97, "only the four records take room");
        drop(given);
        assert_eq!(room.available_permits(), 100);
        assert!(prefetch.next(true).await.expect("an answer").is_err());
        assert!(prefetch.next(true).await.is_none());
    }

    #[tokio::test]
    async fn that_the_tip_is_reached_is_told_after_the_backlog() {
        let (mut prefetch, _) = waiting(vec![Ok(vec![1]), Ok(vec![]), Ok(vec![2]), Ok(vec![])]);
        let given = prefetch.next(true).await.expect("a read").expect("no error");
        assert_eq!(numbers(&given), ["1", "2"]);
        let tip = prefetch.next(true).await.expect("a read").expect("no error");
        assert!(tip.read.reached_tip());
    }

    #[tokio::test]
    async fn without_a_wish_for_the_backlog_each_read_is_given_by_itself() {
        let (mut prefetch, _) = waiting(vec![Ok(vec![1]), Ok(vec![2])]);
        for expected in ["1", "2"] {
            let given = prefetch.next(false).await.expect("a read").expect("no error");
            assert_eq!(numbers(&given), [expected]);
        }
    }

    #[tokio::test]
    async fn no_more_records_are_given_at_once_than_one_read_may_have() {
        let (mut prefetch, _) =
            waiting(vec![Ok((1..=6_000).collect()), Ok((6_001..=12_000).collect())]);
        for _ in 0..2 {
            let given = prefetch.next(true).await.expect("a read").expect("no error");
            assert_eq!(given.read.records.len(), 6_000);
        }
    }
}
