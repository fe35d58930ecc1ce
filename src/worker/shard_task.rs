//! One shard, from taking its lease to letting go of it.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use jiff::Timestamp;
use tokio::time::{Instant, sleep_until};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::Instrument as _;

use super::{Counters, Settings, WorkerError};
use crate::{
    backoff::Backoff,
    checkpoint::{Checkpoint, Position},
    handler::{Batch, DeadLetter, Handler, Kind, Place as DeadLetterPlace, RecordPlace, Tenure},
    lease::{
        self, Change, HeldLease, InitialPosition, Lease, LeaseError, LeaseStore as _,
        dynamodb::LeaseTable,
    },
    record::{ShardName, unpack},
    shard::{ChildShard, Shard},
    source::{Place, Prefetch, Read, ShardReader, Stream},
};

/// How often a batch is offered to the handler before the worker gives up.
const HANDLER_ATTEMPTS: u32 = 5;

pub(super) struct ShardTask {
    pub stream: Stream,
    pub held: Arc<HeldLease<LeaseTable>>,
    pub initial: InitialPosition,
    pub stop: CancellationToken,
    pub counters: Arc<Counters>,
    pub settings: Settings,
}

/// How the reading of a shard came to its end.
#[derive(Debug)]
pub(super) enum Outcome {
    /// The shard is finished.
    Ended,
    /// Another worker has it.
    Lost,
    /// Another worker asked for it, and may start.
    HandedOver,
    /// The worker stops; the lease is free.
    Stopped,
    /// It cannot go on; the lease is free.
    Failed(WorkerError),
}

/// Why a step of the task did not lead to the next one.
enum Interrupt {
    Lost,
    Asked,
    Stopped,
    Failed(WorkerError),
}

impl From<LeaseError> for Interrupt {
    fn from(error: LeaseError) -> Self {
        match error {
            LeaseError::Lost { .. } | LeaseError::Gone { .. } => Self::Lost,
            error => Self::Failed(error.into()),
        }
    }
}

/// How far the shard was handled, and how far that is stored.
struct Progress {
    /// The last finished record, in this run or by the checkpoint.
    finished: Option<Position>,
    stored: bool,
    next_checkpoint: Instant,
}

impl ShardTask {
    pub(super) async fn run(self, mut handler: impl Handler) -> Outcome {
        let lease = self.held.lease().await;
        let span = tracing::info_span!(
            "shard", stream = self.stream.name(), shard = %lease.shard, counter = lease.counter
        );
        let mut progress = Progress {
            finished: match &lease.checkpoint {
                Checkpoint::At(position) => Some(position.clone()),
                _ => None,
            },
            stored: true,
            next_checkpoint: Instant::now() + self.settings.checkpoint_interval,
        };
        async {
            // A task of its own: a handler that blocks its thread must not cost the lease.
            let keeper = tokio::spawn(self.held.clone().keep().in_current_span());
            let _keeper = AbortOnDropHandle::new(keeper);
            let outcome = tokio::select! {
                biased;
                () = self.held.lost() => Outcome::Lost,
                outcome = self.read(lease, &mut handler, &mut progress) => outcome,
            };
            if let Outcome::Lost = outcome {
                handler.lost().await;
                if self.held.is_gone() {
                    self.restore(&progress).await;
                } else if self.stop.is_cancelled() && progress.unstored().is_some() {
                    let shard = self.held.lease().await.shard;
                    return Outcome::Failed(WorkerError::NotStored { shard });
                }
            }
            outcome
        }
        .instrument(span)
        .await
    }

    /// Makes the row again that was deleted under us, free for any worker, at the place that was
    /// reached. Without it the shard would start over, or skip to the latest.
    async fn restore(&self, progress: &Progress) {
        let was = self.held.lease().await;
        let mut lease = Lease {
            owner: None,
            // Not from zero: the counter is a fencing token.
            counter: was.counter.saturating_add(1),
            checkpoint_owner: None,
            ..was
        };
        if let Some(finished) = progress.finished.clone() {
            lease.checkpoint = Checkpoint::At(finished);
        }
        match self.held.store().create(&lease).await {
            Ok(true) => tracing::warn!(
                checkpoint = %lease.checkpoint, "the lease's row is made again where reading was"
            ),
            Ok(false) => {}
            Err(error) => tracing::error!(
                checkpoint = %lease.checkpoint,
                "the lease's row could not be made again: {error}; the shard starts where the start \
                 position says"
            ),
        }
    }

    async fn read(
        &self,
        lease: Lease,
        handler: &mut impl Handler,
        progress: &mut Progress,
    ) -> Outcome {
        let name =
            Arc::new(ShardName { stream: self.stream.shared_name(), shard: lease.shard.clone() });
        let interrupt = match self.read_on(&lease, &name, handler, progress).await {
            Ok(children) => self.end(children).await.err(),
            Err(interrupt) => Some(interrupt),
        };
        match interrupt {
            None => {
                tracing::info!("shard finished");
                handler.ended().await;
                Outcome::Ended
            }
            Some(Interrupt::Lost) => Outcome::Lost,
            Some(interrupt @ (Interrupt::Stopped | Interrupt::Asked)) => {
                handler.stopping().await;
                match (self.release(progress).await, interrupt) {
                    (Ok(()), Interrupt::Asked) => Outcome::HandedOver,
                    (Ok(()), _) => Outcome::Stopped,
                    (Err(LeaseError::Lost { .. } | LeaseError::Gone { .. }), _) => Outcome::Lost,
                    (Err(error), _) => Outcome::Failed(error.into()),
                }
            }
            Some(Interrupt::Failed(error)) => {
                if let Err(lease_error) = self.release(progress).await {
                    tracing::warn!("lease not released: {lease_error}");
                }
                Outcome::Failed(error)
            }
        }
    }

    /// Reads to the end of the shard and gives the shards that follow it.
    async fn read_on(
        &self,
        lease: &Lease,
        name: &Arc<ShardName>,
        handler: &mut impl Handler,
        progress: &mut Progress,
    ) -> Result<Vec<ChildShard>, Interrupt> {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => return Err(Interrupt::Stopped),
            () = self.held.asked() => return Err(Interrupt::Asked),
            () = self.held.usable() => {}
        }
        let place = self.place(lease).await?;
        tracing::debug!(%place, "reading");
        let tenure = Tenure {
            shard: lease.shard.clone(),
            lease_counter: lease.counter,
            owner_switches: lease.owner_switches_since_checkpoint,
        };
        handler.started(&tenure).await;
        let reader = ShardReader::new(self.stream.clone(), lease.shard.clone(), place);
        let mut prefetch = {
            let held = self.held.clone();
            Prefetch::start(reader, self.settings.prefetch_bytes, move || held.set_caught_up(false))
        };
        loop {
            let prefetched = tokio::select! {
                biased;
                () = self.stop.cancelled() => return Err(Interrupt::Stopped),
                () = self.held.asked() => return Err(Interrupt::Asked),
                () = sleep_until(progress.next_checkpoint), if !progress.stored => {
                    self.checkpoint(progress).await?;
                    continue;
                }
                prefetched = prefetch.next() => prefetched,
            };
            let mut prefetched = match prefetched {
                Some(Ok(prefetched)) => prefetched,
                Some(Err(error)) => return Err(Interrupt::Failed(error.into())),
                None => return Err(Interrupt::Stopped),
            };
            let end = prefetched.read.end.take();
            self.handle(&mut prefetched.read, name, handler, progress).await?;
            if let Some(children) = end {
                return Ok(children);
            }
        }
    }

    /// Where to start, by the lease. What the lease's checkpoint does not make concrete is made so and
    /// written down before the first read.
    async fn place(&self, lease: &Lease) -> Result<Place, Interrupt> {
        let start_at = match (&lease.checkpoint, lease.start_at, self.initial) {
            (Checkpoint::At(position), ..) => {
                return Ok(Place::At(position.sequence_number.clone()));
            }
            (Checkpoint::TrimHorizon | Checkpoint::ShardEnd, ..) => return Ok(Place::TrimHorizon),
            (_, Some(start_at), _) => return Ok(Place::Time(start_at)),
            (Checkpoint::Latest, None, _) => Place::pin_time(Timestamp::now()),
            (Checkpoint::AtTimestamp, None, InitialPosition::At(at)) => at,
            (Checkpoint::AtTimestamp, None, _) => {
                tracing::warn!(
                    "the lease says AT_TIMESTAMP without a time, and this worker has none as its \
                     start position: reading from the oldest record"
                );
                return Ok(Place::TrimHorizon);
            }
        };
        // The table keeps milliseconds.
        let start_at = Timestamp::from_millisecond(start_at.as_millisecond()).unwrap_or(start_at);
        self.held.write_surely(&Change::Pin { start_at }).await?;
        match lease.checkpoint {
            Checkpoint::Latest => Ok(Place::Latest),
            _ => Ok(Place::Time(start_at)),
        }
    }

    async fn handle(
        &self,
        read: &mut Read,
        name: &Arc<ShardName>,
        handler: &mut impl Handler,
        progress: &mut Progress,
    ) -> Result<(), Interrupt> {
        self.held.set_caught_up(read.reached_tip());
        let mut batch = Batch { messages: Vec::new(), behind: read.behind };
        let mut finished = None;
        for record in read.records.drain(..) {
            let position = Position {
                sequence_number: record.sequence_number.clone(),
                sub_sequence_number: 0,
            };
            if progress.finished.as_ref().is_some_and(|finished| position <= *finished) {
                continue; // Reading starts at the checkpoint, which is finished.
            }
            let (partition_key, arrived_at) = (record.partition_key.clone(), record.arrived_at);
            let mut undecodable = Vec::new();
            unpack(name, record, &mut batch.messages, &mut undecodable);
            for part in undecodable {
                self.counters.undecodable.fetch_add(1, Ordering::Relaxed);
                let letter = DeadLetter {
                    kind: Kind::Undecodable,
                    reason: part.reason,
                    place: DeadLetterPlace::Record(RecordPlace {
                        stream: name.stream.to_string(),
                        shard: name.shard.as_str().to_owned(),
                        sequence_number: position.sequence_number.clone(),
                        user_record: None,
                        sub_sequence_number: part.sub_sequence_number,
                        partition_key: partition_key.clone(),
                        arrived_at,
                    }),
                    attempts: 0,
                    given_up_at: Timestamp::now(),
                    application: None,
                    worker: None,
                    data: part.data,
                };
                letter.write().await;
            }
            self.counters.records.fetch_add(1, Ordering::Relaxed);
            finished = Some(position);
        }
        let Some(finished) = finished else { return Ok(()) };
        self.counters.note_activity();
        if !batch.is_empty() {
            self.deliver(&batch, handler).await?;
        }
        self.counters.messages.fetch_add(batch.len() as u64, Ordering::Relaxed);
        self.counters.note_activity();
        progress.finished = Some(finished);
        progress.stored = false;
        if Instant::now() >= progress.next_checkpoint {
            self.checkpoint(progress).await?;
        }
        Ok(())
    }

    /// Offers a batch until the handler has finished it.
    async fn deliver(&self, batch: &Batch, handler: &mut impl Handler) -> Result<(), Interrupt> {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
        let first = batch.first().map_or("", |message| message.sequence_number().as_str());
        let mut attempts = 0;
        loop {
            if !self.held.is_valid() {
                return Err(Interrupt::Lost);
            }
            attempts += 1;
            let handled = handler.handle(batch).await;
            let Err(error) = handled else { return Ok(()) };
            if self.stop.is_cancelled() {
                tracing::info!(sequence_number = first, "batch not finished at the stop: {error}");
                return Err(Interrupt::Stopped);
            }
            if attempts == HANDLER_ATTEMPTS {
                return Err(Interrupt::Failed(WorkerError::Handler {
                    shard: self.held.lease().await.shard,
                    sequence_number: first.to_owned(),
                    attempts,
                    reason: error.to_string(),
                }));
            }
            let wait = backoff.next_wait();
            tracing::warn!(
                sequence_number = first,
                attempts,
                "the handler failed: {error}; offering the batch again in {wait:?}"
            );
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.stop.cancelled() => return Err(Interrupt::Stopped),
            }
        }
    }

    /// Stores how far the shard is finished. A table that does not answer only makes the checkpoint
    /// later.
    async fn checkpoint(&self, progress: &mut Progress) -> Result<(), Interrupt> {
        progress.next_checkpoint = Instant::now() + self.settings.checkpoint_interval;
        let Some(checkpoint) = progress.unstored() else { return Ok(()) };
        match self.held.write(&Change::Checkpoint { checkpoint }).await {
            Ok(()) => {
                progress.stored = true;
                Ok(())
            }
            Err(LeaseError::Lost { .. } | LeaseError::Gone { .. }) => Err(Interrupt::Lost),
            Err(error) => {
                tracing::warn!("checkpoint not stored: {error}; trying again");
                Ok(())
            }
        }
    }

    async fn release(&self, progress: &Progress) -> Result<(), LeaseError> {
        let change = Change::Release { checkpoint: progress.unstored() };
        self.held.write_surely(&change).await?;
        tracing::info!("lease released");
        Ok(())
    }

    /// Gives the following shards their leases, and then marks this one finished: in this order, so
    /// that a crash between the two repeats the first and loses nothing.
    async fn end(&self, children: Vec<ChildShard>) -> Result<(), Interrupt> {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(2));
        while let Err(error) = self.create_children(&children).await {
            tracing::warn!("{error}; trying again while the lease is ours");
            tokio::time::sleep(backoff.next_wait()).await;
        }
        let children = children.into_iter().map(|child| child.id).collect();
        Ok(self.held.write_surely(&Change::End { children }).await?)
    }

    /// Creates the leases that the stream's shards ought to have, those of the children among them. Not
    /// the children's alone: the other parent of a merge may have no lease yet, and would then count as
    /// finished.
    async fn create_children(&self, children: &[ChildShard]) -> Result<(), WorkerError> {
        if children.is_empty() {
            return Ok(());
        }
        let mut listed = self.stream.shards().await?;
        for child in children {
            // Kinesis named it; the list may be a moment behind.
            if !listed.iter().any(|shard| shard.id == child.id) {
                listed.push(Shard {
                    id: child.id.clone(),
                    parents: child.parents.clone(),
                    hash_key_range: child.hash_key_range,
                    closed: false,
                    begins: None,
                });
            }
        }
        lease::create_missing(self.held.store(), &listed, self.initial).await?;
        Ok(())
    }
}

impl Progress {
    fn unstored(&self) -> Option<Checkpoint> {
        self.finished.clone().filter(|_| !self.stored).map(Checkpoint::At)
    }
}
