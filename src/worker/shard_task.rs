//! One shard, from taking its lease to letting go of it.

use std::{cmp::Ordering, sync::Arc, time::Duration};

use bytes::Bytes;
use jiff::Timestamp;
use tokio::time::{Instant, sleep_until};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::Instrument as _;

use super::{
    Settings, WorkerError,
    delivery::Delivery,
    observe::ShardMeter,
    watchdog::{Activity, Step},
};
use crate::{
    backoff::Backoff,
    checkpoint::{Checkpoint, Position, Saved, ShardState, StateError, StateStore},
    handler::{
        DeadLetter, DeadLetterStore, Handler, Kind, Place as DeadLetterPlace, RecordPlace,
        StopReason, Tenure,
    },
    lease::{
        self, Change, HeldLease, InitialPosition, Lease, LeaseError, LeaseStore, whole_millis,
    },
    record::{ShardName, unpack},
    shard::{ChildShard, SequenceNumber, Shard, ShardId},
    source::{self, Failing, Place, Prefetch, Read, ShardReader, Stream},
};

/// How often a lasting failure is told again.
const REMINDER_INTERVAL: Duration = Duration::from_secs(60);

pub(super) struct ShardTask<S> {
    pub stream: Stream,
    pub held: Arc<HeldLease<S>>,
    pub activity: Arc<Activity>,
    pub initial: InitialPosition,
    pub stop: CancellationToken,
    pub meter: Arc<ShardMeter>,
    pub settings: Settings,
    pub letters: Arc<DeadLetterStore>,
    pub state: Option<Arc<StateStore>>,
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
    /// It did not get on; the lease is free.
    GivenUp,
    /// Everything before the end of the time window was handled; the lease is free.
    WindowEnd,
    /// It cannot go on; the lease is free.
    Failed(WorkerError),
}

/// Why a step of the task did not lead to the next one.
pub(super) enum Interrupt {
    Lost,
    Asked,
    Stopped,
    /// Every record before the end of the time window was handled.
    WindowEnd,
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

/// How far that is stored.
struct Progress {
    /// The last finished record by the checkpoint that reading began with, or by the last one that was
    /// stored.
    stored: Option<Position>,
    /// Whether the last attempt to store it failed, so that an outage is told once.
    failing: bool,
    next_checkpoint: Instant,
    told_misplaced: bool,
    /// Where positions and state are kept, if not in the lease table.
    state: Option<ShardState>,
}

impl<S: LeaseStore> ShardTask<S> {
    pub(super) async fn run(self, handler: impl Handler) -> Outcome {
        let lease = self.held.lease().await;
        let span = tracing::info_span!(
            "shard",
            stream = self.stream.name(),
            shard = lease.shard.name(),
            counter = lease.counter
        );
        let mut progress = Progress {
            stored: match &lease.checkpoint {
                Checkpoint::At(position) => Some(position.clone()),
                _ => None,
            },
            failing: false,
            next_checkpoint: Instant::now() + self.settings.checkpoint_interval,
            told_misplaced: false,
            state: None,
        };
        let mut delivery = Delivery::new(
            handler,
            lease.shard.clone(),
            self.held.clone(),
            self.stop.clone(),
            self.activity.clone(),
            self.meter.clone(),
            self.settings.clone(),
            self.letters.clone(),
        );
        async {
            // A task of its own: a handler that blocks its thread must not cost the lease.
            let keeper = tokio::spawn(self.held.clone().keep().in_current_span());
            let _keeper = AbortOnDropHandle::new(keeper);
            let outcome = tokio::select! {
                biased;
                () = self.held.lost() => Outcome::Lost,
                outcome = self.read(lease, &mut delivery, &mut progress) => outcome,
            };
            if let Outcome::Lost = outcome {
                delivery.handler.lost().await;
                if self.held.is_gone() {
                    self.restore(&progress, &mut delivery).await;
                } else if self.stop.is_cancelled() && progress.unstored(&delivery).is_some() {
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
    async fn restore<H: Handler>(&self, progress: &Progress, delivery: &mut Delivery<H, S>) {
        let was = self.held.lease().await;
        let mut lease = Lease {
            owner: None,
            // Not from zero: the counter is a fencing token.
            counter: was.counter.saturating_add(1),
            checkpoint_owner: None,
            ..was
        };
        if let Some(finished) = delivery.finished().or(progress.stored.as_ref()) {
            lease.checkpoint = Checkpoint::At(finished.clone());
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

    async fn read<H: Handler>(
        &self,
        lease: Lease,
        delivery: &mut Delivery<H, S>,
        progress: &mut Progress,
    ) -> Outcome {
        let name = Arc::new(ShardName {
            stream: self.stream.shared_name(),
            shard: lease.shard.name().into(),
            hash_key_range: lease.hash_key_range,
        });
        let interrupt = match self.read_on(&lease, &name, delivery, progress).await {
            Ok(children) => self.end(children, delivery, progress).await.err(),
            Err(interrupt) => Some(interrupt),
        };
        let Some(interrupt) = interrupt else {
            tracing::info!("shard finished");
            delivery.handler.ended().await;
            return Outcome::Ended;
        };
        self.activity.enter(Step::Stops);
        let (why, limit) = match &interrupt {
            Interrupt::Lost => return Outcome::Lost,
            Interrupt::Asked => (StopReason::HandOver, self.settings.hand_over_limit),
            Interrupt::Stopped => (StopReason::Shutdown, self.settings.shutdown_limit),
            Interrupt::WindowEnd => (StopReason::WindowEnd, self.settings.shutdown_limit),
            Interrupt::Failed(_) => (StopReason::Failed, self.settings.shutdown_limit),
        };
        delivery.handler.stopping(why).await;
        // The rest of the limit is for the last checkpoint.
        delivery.settle_acks(limit.mul_f64(0.75)).await;
        let interrupt = match interrupt {
            Interrupt::Failed(error) if error.is_of_one_shard() => {
                self.park(error, delivery, progress).await
            }
            interrupt => interrupt,
        };
        let released = match interrupt {
            Interrupt::Lost => return Outcome::Lost,
            _ => self.release(delivery, progress).await,
        };
        match (released, interrupt) {
            (Ok(()), Interrupt::Asked) => Outcome::HandedOver,
            (Ok(()), Interrupt::WindowEnd) => Outcome::WindowEnd,
            (released, Interrupt::Failed(error)) => {
                if let Err(Interrupt::Failed(lease_error)) = released {
                    tracing::warn!("lease not released: {lease_error}");
                }
                Outcome::Failed(error)
            }
            (Ok(()), _) => Outcome::Stopped,
            (Err(Interrupt::Failed(error)), _) => Outcome::Failed(error),
            (Err(_), _) => Outcome::Lost,
        }
    }

    /// Keeps the lease of a shard that stopped because of a failure, so that no other worker fails on it
    /// too, and shows why, until the worker stops or another one asks for it.
    async fn park<H: Handler>(
        &self,
        error: WorkerError,
        delivery: &mut Delivery<H, S>,
        progress: &mut Progress,
    ) -> Interrupt {
        if let Err(interrupt) = self.checkpoint(delivery, progress).await {
            return interrupt;
        }
        self.held.note_trouble(error.to_string(), Timestamp::now(), false);
        loop {
            tracing::error!("{error}");
            self.activity.enter(Step::Parked);
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return Interrupt::Failed(error),
                () = self.held.asked() => {
                    tracing::warn!("another worker gets the shard, and the message that failed here");
                    return Interrupt::Asked;
                }
                () = tokio::time::sleep(REMINDER_INTERVAL) => {}
            }
        }
    }

    /// Reads to the end of the shard and gives the shards that follow it.
    async fn read_on<H: Handler>(
        &self,
        lease: &Lease,
        name: &Arc<ShardName>,
        delivery: &mut Delivery<H, S>,
        progress: &mut Progress,
    ) -> Result<Vec<ChildShard>, Interrupt> {
        self.activity.enter(Step::WaitsForOldReader);
        tokio::select! {
            biased;
            () = self.stop.cancelled() => return Err(Interrupt::Stopped),
            () = self.held.asked() => return Err(Interrupt::Asked),
            () = self.held.usable() => {}
        }
        self.activity.enter(Step::Opens);
        let kept = self.open_state(lease, progress).await?;
        let lease =
            &match kept.as_ref().and_then(|saved| saved.checkpoint.clone().zip(kept.as_ref())) {
                Some((checkpoint, saved)) => {
                    Lease { checkpoint, start_at: saved.start_at, ..lease.clone() }
                }
                None => lease.clone(),
            };
        let oldest = self.oldest_to_go_on_from(lease).await?;
        let place = match oldest {
            Some(oldest) => {
                progress.stored = None;
                Place::Time(oldest)
            }
            None => self.place(lease, progress).await?,
        };
        self.meter.note_opened(lease.counter, &lease.checkpoint);
        tracing::debug!(%place, "reading");
        if let Some(state) = kept.and_then(|kept| kept.state).filter(|_| oldest.is_none())
            && let Err(error) = delivery.handler.restore(&state)
        {
            return Err(self.handler_state(lease, "take up", error.to_string()));
        }
        let tenure = Tenure {
            shard: lease.shard.clone(),
            lease_counter: lease.counter,
            owner_switches: lease.owner_switches_since_checkpoint,
        };
        delivery.handler.started(&tenure).await;
        if lease.is_finished() {
            // It is stored so, with the handler's state, and the lease table was not told.
            return self.followers(&lease.shard).await;
        }
        let reader = ShardReader::new(self.stream.clone(), lease.shard.clone(), place);
        let mut prefetch = {
            let held = self.held.clone();
            Prefetch::start(reader, self.settings.prefetch_bytes, move |failing| match failing {
                Failing::Since(error) => {
                    held.set_behind(None);
                    held.note_trouble(error.to_string(), Timestamp::now(), false);
                }
                Failing::NoMore(error) => {
                    held.note_trouble(error.to_owned(), Timestamp::now(), true);
                }
            })
        };
        let mut ended = None;
        loop {
            if delivery.outstanding() == 0
                && let Some(children) = ended
            {
                return Ok(children);
            }
            let unstored = progress.is_behind(delivery);
            if unstored {
                self.meter.note_unstored();
            }
            if unstored && std::mem::take(&mut delivery.checkpoint_wanted) {
                self.checkpoint(delivery, progress).await?;
                continue;
            }
            let reads = ended.is_none() && delivery.outstanding() < self.settings.max_unacked;
            let backlog = delivery.handler.takes_backlog();
            self.activity.enter(if reads { Step::Reads } else { Step::Acks });
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return Err(Interrupt::Stopped),
                () = self.held.asked() => return Err(Interrupt::Asked),
                () = sleep_until(progress.next_checkpoint), if unstored => {
                    self.checkpoint(delivery, progress).await?;
                }
                Some(answer) = delivery.answer() => delivery.take_answer(answer).await?,
                prefetched = prefetch.next(backlog), if reads => {
                    let mut prefetched = match prefetched {
                        Some(Ok(prefetched)) => prefetched,
                        Some(Err(error)) => return Err(Interrupt::Failed(error.into())),
                        None => return Err(Interrupt::Stopped),
                    };
                    self.activity.got_on();
                    ended = prefetched.read.end.take();
                    self.handle(&mut prefetched.read, name, delivery, progress).await?;
                }
            }
        }
    }

    /// The shards that follow one that was read to its end before, as the stream lists them.
    async fn followers(&self, shard: &ShardId) -> Result<Vec<ChildShard>, Interrupt> {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        let mut told = false;
        loop {
            match self.stream.shards().await {
                Ok(listed) => return Ok(source::followers(listed, shard)),
                Err(error) if error.is_transient() => {
                    if !std::mem::replace(&mut told, true) {
                        tracing::warn!("{error}; trying again until it works");
                    }
                }
                Err(error) => return Err(Interrupt::Failed(error.into())),
            }
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return Err(Interrupt::Stopped),
                () = self.held.asked() => return Err(Interrupt::Asked),
                () = tokio::time::sleep(backoff.next_wait()) => {}
            }
        }
    }

    /// Opens the shard's place in the store of positions and state, and gives what is kept there.
    async fn open_state(
        &self,
        lease: &Lease,
        progress: &mut Progress,
    ) -> Result<Option<Saved>, Interrupt> {
        let Some(store) = &self.state else { return Ok(None) };
        let opened = self.until_it_works(|| store.open(&lease.shard, lease.counter)).await?;
        let (state, saved) = opened;
        progress.state = Some(state);
        if let Some(checkpoint) = &saved.checkpoint {
            progress.stored = match checkpoint {
                Checkpoint::At(position) => Some(position.clone()),
                _ => None,
            };
        }
        Ok(Some(saved))
    }

    async fn save(
        &self,
        state: &ShardState,
        checkpoint: &Checkpoint,
        start_at: Option<Timestamp>,
        snapshot: Option<Vec<u8>>,
    ) -> Result<(), Interrupt> {
        self.activity.enter(Step::Checkpoints);
        let snapshot = snapshot.map(Bytes::from);
        self.until_it_works(|| state.save(checkpoint, start_at, snapshot.clone())).await
    }

    /// Tries again while waiting may help and the lease is ours.
    async fn until_it_works<T, A>(&self, attempt: impl Fn() -> A) -> Result<T, Interrupt>
    where
        A: Future<Output = Result<T, StateError>>,
    {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
        let mut told = false;
        loop {
            match attempt().await {
                Ok(done) => return Ok(done),
                Err(error) if error.is_transient() && self.held.is_valid() => {
                    if !std::mem::replace(&mut told, true) {
                        tracing::warn!("{error}; trying again while the lease is ours");
                    }
                    tokio::time::sleep(backoff.next_wait()).await;
                }
                Err(error) => return Err(Interrupt::Failed(error.into())),
            }
        }
    }

    /// The handler's state, if it has any.
    async fn snapshot<H: Handler>(
        &self,
        delivery: &mut Delivery<H, S>,
    ) -> Result<Option<Vec<u8>>, Interrupt> {
        let snapshot = match delivery.handler.snapshot() {
            Ok(snapshot) => snapshot,
            Err(error) => {
                let lease = self.held.lease().await;
                return Err(self.handler_state(&lease, "give", error.to_string()));
            }
        };
        if snapshot.is_some() && self.state.is_none() {
            let shard = self.held.lease().await.shard;
            return Err(Interrupt::Failed(WorkerError::NoPlaceForState { shard }));
        }
        Ok(snapshot)
    }

    fn handler_state(&self, lease: &Lease, what: &'static str, reason: String) -> Interrupt {
        let shard = lease.shard.clone();
        Interrupt::Failed(WorkerError::HandlerState { shard, what, reason })
    }

    /// Where to go on instead of at the checkpoint, if that is older than it may be.
    async fn oldest_to_go_on_from(&self, lease: &Lease) -> Result<Option<Timestamp>, Interrupt> {
        let (Some(age), Checkpoint::At(position)) =
            (self.settings.max_checkpoint_age, &lease.checkpoint)
        else {
            return Ok(None);
        };
        let oldest = age.oldest(Timestamp::now());
        let place = Place::At(position.sequence_number.clone());
        let found = self.stream.lag(&lease.shard, &place, Timestamp::now()).await;
        let found = found.map_err(|error| Interrupt::Failed(error.into()))?;
        let too_old = found.finished_arrived_at.is_some_and(|at| at < oldest);
        if too_old {
            tracing::warn!(
                checkpoint = %lease.checkpoint, %oldest,
                "the checkpoint is older than it may be: reading goes on with what arrived from then on"
            );
        }
        Ok(too_old.then_some(oldest))
    }

    /// Where to start, by the lease. What the lease's checkpoint does not make concrete is made so and
    /// written down before the first read.
    async fn place(&self, lease: &Lease, progress: &Progress) -> Result<Place, Interrupt> {
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
        let start_at = whole_millis(start_at);
        self.held.write_surely(&Change::Pin { start_at }).await?;
        if let Some(state) = &progress.state {
            self.save(state, &lease.checkpoint, Some(start_at), None).await?;
        }
        match lease.checkpoint {
            Checkpoint::Latest => Ok(Place::Latest),
            _ => Ok(Place::Time(start_at)),
        }
    }

    async fn handle<H: Handler>(
        &self,
        read: &mut Read,
        name: &Arc<ShardName>,
        delivery: &mut Delivery<H, S>,
        progress: &mut Progress,
    ) -> Result<(), Interrupt> {
        let now = Timestamp::now();
        self.held.set_behind(behind(read, now));
        let window_end = self.settings.until.filter(|until| cut_off(read, *until, now));
        let mut messages = Vec::with_capacity(read.records.len());
        let mut letters = Vec::new();
        let (mut records, mut bytes) = (0, 0);
        let mut read_to = None;
        for record in read.records.drain(..) {
            let (number, arrived_at) = (record.sequence_number.clone(), record.arrived_at);
            // Reading starts at the checkpoint. An aggregate may be finished in part.
            let checkpoint = match &progress.stored {
                Some(finished) => match number.cmp(&finished.sequence_number) {
                    Ordering::Less => continue,
                    Ordering::Equal => Some(finished.sub_sequence_number),
                    Ordering::Greater => None,
                },
                None => None,
            };
            bytes += record.data.len() as u64;
            let mut undecodable = Vec::new();
            let unpacked = unpack(name, record, checkpoint, &mut messages, &mut undecodable);
            let Some(unpacked) = unpacked else { continue };
            if unpacked.misplaced {
                self.note_misplaced(&number, progress);
            }
            letters.extend(undecodable.into_iter().map(|part| DeadLetter {
                kind: Kind::Undecodable,
                reason: part.reason,
                place: DeadLetterPlace::Record(RecordPlace {
                    stream: name.stream.to_string(),
                    shard: name.shard.as_str().to_owned(),
                    sequence_number: number.clone(),
                    user_record: part.user_record,
                    sub_sequence_number: part.sub_sequence_number,
                    partition_key: part.partition_key,
                    arrived_at,
                }),
                attempts: 0,
                given_up_at: now,
                application: Some(self.settings.application.clone()),
                worker: Some(self.settings.worker_id.clone()),
                data: part.data,
            }));
            records += 1;
            let sub_sequence_number = unpacked.sub_sequence_number();
            read_to = Some(Position { sequence_number: number, sub_sequence_number });
        }
        if let Some(read_to) = read_to {
            self.meter.note_activity();
            self.meter.count(|counts| &counts.records, records);
            self.meter.count_bytes(bytes);
            if !letters.is_empty() {
                self.meter.count(|counts| &counts.undecodable, letters.len() as u64);
                delivery.store_letters(&letters).await?;
            }
            delivery.deliver(messages, read.behind, read_to).await?;
            self.meter.note_activity();
            if Instant::now() >= progress.next_checkpoint {
                self.checkpoint(delivery, progress).await?;
            }
        }
        match window_end {
            Some(_) => Err(Interrupt::WindowEnd),
            None => Ok(()),
        }
    }

    /// Notes a KPL aggregate that was left out, and says so once for the shard.
    fn note_misplaced(&self, number: &SequenceNumber, progress: &mut Progress) {
        self.meter.count(|counts| &counts.misplaced, 1);
        if !std::mem::replace(&mut progress.told_misplaced, true) {
            tracing::warn!(
                sequence_number = %number,
                "a KPL aggregate has user records of another shard: left out, as the KCL does. The KPL puts \
                 them again by itself after a resharding; if another library made it, they are lost: let it \
                 aggregate by shard, or put records one by one. Said once for this shard"
            );
        }
    }

    /// Stores how far the shard is finished. A table that does not answer only makes the checkpoint
    /// later.
    async fn checkpoint<H: Handler>(
        &self,
        delivery: &mut Delivery<H, S>,
        progress: &mut Progress,
    ) -> Result<(), Interrupt> {
        progress.next_checkpoint = Instant::now() + self.settings.checkpoint_interval;
        let Some(position) = progress.unstored(delivery) else { return Ok(()) };
        self.activity.enter(Step::Checkpoints);
        let checkpoint = Checkpoint::At(position.clone());
        if progress.state.is_some() && !delivery.is_at_position() {
            // The handler's state is that of more than is finished: it is stored when both agree.
            return Ok(());
        }
        let snapshot = self.snapshot(delivery).await?;
        if let Some(state) = &progress.state {
            self.save(state, &checkpoint, None, snapshot).await?;
            self.meter.note_stored(&checkpoint);
            progress.stored = Some(position);
            return Ok(());
        }
        match self.held.write(&Change::Checkpoint { checkpoint: checkpoint.clone() }).await {
            Ok(()) => {
                self.meter.note_stored(&checkpoint);
                progress.stored = Some(position);
                if std::mem::take(&mut progress.failing) {
                    tracing::info!("checkpoint stored again");
                }
                Ok(())
            }
            Err(LeaseError::Lost { .. } | LeaseError::Gone { .. }) => Err(Interrupt::Lost),
            Err(error) => {
                if !std::mem::replace(&mut progress.failing, true) {
                    tracing::warn!("checkpoint not stored: {error}; trying again");
                }
                Ok(())
            }
        }
    }

    async fn release<H: Handler>(
        &self,
        delivery: &mut Delivery<H, S>,
        progress: &mut Progress,
    ) -> Result<(), Interrupt> {
        if progress.state.is_some() {
            self.checkpoint(delivery, progress).await?;
        }
        let unstored = progress.unstored(delivery).filter(|_| progress.state.is_none());
        let checkpoint = unstored.map(Checkpoint::At);
        self.held.write_surely(&Change::Release { checkpoint }).await?;
        tracing::info!("lease released");
        Ok(())
    }

    /// Gives the following shards their leases, and then marks this one finished: in this order, so
    /// that a crash between the two repeats the first and loses nothing.
    async fn end<H: Handler>(
        &self,
        children: Vec<ChildShard>,
        delivery: &mut Delivery<H, S>,
        progress: &mut Progress,
    ) -> Result<(), Interrupt> {
        self.activity.enter(Step::Ends);
        tokio::select! {
            biased;
            () = self.stop.cancelled() => return Err(Interrupt::Stopped),
            () = self.held.asked() => return Err(Interrupt::Asked),
            () = self.create_children_surely(&children) => {}
        }
        if let Some(state) = &progress.state {
            let snapshot = self.snapshot(delivery).await?;
            self.save(state, &Checkpoint::ShardEnd, None, snapshot).await?;
        }
        let children = children.into_iter().map(|child| child.id).collect();
        Ok(self.held.write_surely(&Change::End { children }).await?)
    }

    async fn create_children_surely(&self, children: &[ChildShard]) {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        let mut remind_at = Instant::now();
        while let Err(error) = self.create_children(children).await {
            if Instant::now() >= remind_at {
                remind_at = Instant::now() + REMINDER_INTERVAL;
                tracing::warn!(
                    "the shard is read to its end, but the shards that follow it have no leases yet: \
                     {error}; trying again until it works"
                );
            }
            tokio::time::sleep(backoff.next_wait()).await;
        }
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

/// How far behind the stream's tip a read was: as the server says, or by the age of the newest record,
/// whichever is more. Zero says that the tip was reached.
fn behind(read: &Read, now: Timestamp) -> Option<Duration> {
    if read.reached_tip() {
        return Some(Duration::ZERO);
    }
    let newest = read.records.last().and_then(|record| record.arrived_at);
    let age = newest.map(|at| Duration::try_from(now.duration_since(at)).unwrap_or_default());
    // Not the tip: at least a moment.
    read.behind.max(age).map(|behind| behind.max(Duration::from_millis(1)))
}

/// Cuts what arrived at or after `until` off a read, and tells whether nothing from before can follow:
/// something was cut off, or the tip was reached after that time. (Arrival times ascend but for the
/// clocks of Kinesis' own machines, so one margin is left.)
fn cut_off(read: &mut Read, until: Timestamp, now: Timestamp) -> bool {
    let end =
        read.records.iter().position(|record| record.arrived_at.is_some_and(|at| at >= until));
    if let Some(end) = end {
        read.records.truncate(end);
        read.end = None;
        return true;
    }
    read.reached_tip() && Place::pin_time(now) >= until
}

impl Progress {
    fn is_behind<H: Handler, S: LeaseStore>(&self, delivery: &Delivery<H, S>) -> bool {
        delivery.finished().is_some_and(|finished| self.stored.as_ref() != Some(finished))
    }

    /// What is finished and not stored.
    fn unstored<H: Handler, S: LeaseStore>(&self, delivery: &Delivery<H, S>) -> Option<Position> {
        delivery.finished().filter(|_| self.is_behind(delivery)).cloned()
    }
}
