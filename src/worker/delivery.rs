//! Offers the messages of one shard to its handler, until each is finished or given up, and knows how far
//! the shard is finished.

use std::{
    collections::{BTreeMap, BTreeSet},
    panic::AssertUnwindSafe,
    sync::Arc,
    time::Duration,
};

use futures_util::FutureExt as _;
use jiff::Timestamp;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Settings, WorkerError,
    observe::ShardMeter,
    shard_task::Interrupt,
    watchdog::{Activity, Step},
};
use crate::{
    backoff::Backoff,
    checkpoint::{Position, Tracker},
    handler::{
        Acks, Answer, Batch, DeadLetter, DeadLetterStore, Failure, FailureCause, FailureRate,
        Handler, Kind, OnFailure, RetryPer,
    },
    lease::{HeldLease, LeaseStore},
    record::Message,
    shard::ShardId,
};

pub(super) struct Delivery<H, S> {
    pub handler: H,
    shard: ShardId,
    held: Arc<HeldLease<S>>,
    stop: CancellationToken,
    activity: Arc<Activity>,
    meter: Arc<ShardMeter>,
    settings: Settings,
    letters: Arc<DeadLetterStore>,
    tracker: Tracker,
    answers: mpsc::UnboundedReceiver<Answer>,
    to_answers: mpsc::UnboundedSender<Answer>,
    /// Messages that the handler has taken and not acknowledged yet.
    unacked: BTreeMap<u64, Unacked>,
    /// Serial numbers of messages that were acknowledged although the call that took them failed.
    acked_early: BTreeSet<u64>,
    /// Those of messages that were answered otherwise.
    refused_early: BTreeSet<u64>,
    /// Serial numbers below this may still be answered from an attempt that failed: never given again.
    used_to: u64,
    failure_rate: FailureRate,
    pub checkpoint_wanted: bool,
    /// Whether the handler has finished messages of a position that is not finished.
    within_position: bool,
}

struct Unacked {
    message: Message,
    attempts: u32,
    since: Instant,
    /// Whether it failed, so that no answer is to be waited for.
    failed: bool,
}

/// The messages of one position: a plain record's, or a user record's.
struct Group {
    position: Position,
    messages: Vec<Message>,
}

impl<H: Handler, S: LeaseStore> Delivery<H, S> {
    #[expect(clippy::too_many_arguments, reason = "each is another thing that a shard has")]
    pub(super) fn new(
        handler: H,
        shard: ShardId,
        held: Arc<HeldLease<S>>,
        stop: CancellationToken,
        activity: Arc<Activity>,
        meter: Arc<ShardMeter>,
        settings: Settings,
        letters: Arc<DeadLetterStore>,
    ) -> Self {
        let (to_answers, answers) = mpsc::unbounded_channel();
        Self {
            failure_rate: FailureRate::new(settings.tolerance),
            // The limit is kept by who reads on; what was read is taken whole.
            tracker: Tracker::new(usize::MAX),
            handler,
            shard,
            held,
            stop,
            activity,
            meter,
            settings,
            letters,
            answers,
            to_answers,
            unacked: BTreeMap::new(),
            acked_early: BTreeSet::new(),
            refused_early: BTreeSet::new(),
            used_to: 0,
            checkpoint_wanted: false,
            within_position: false,
        }
    }

    /// The position up to which everything is finished, if something was.
    pub(super) fn finished(&self) -> Option<&Position> {
        self.tracker.checkpoint()
    }

    /// Whether the handler has finished nothing beyond what [`finished`](Self::finished) says, so that its
    /// state is that of this position.
    pub(super) fn is_at_position(&self) -> bool {
        self.unacked.is_empty() && !self.within_position
    }

    /// How many messages the handler has taken and not acknowledged.
    pub(super) fn outstanding(&self) -> usize {
        self.unacked.len()
    }

    /// The next acknowledgement.
    pub(super) async fn answer(&mut self) -> Option<Answer> {
        self.answers.recv().await
    }

    /// Offers messages, in their order, and returns when each is finished, given up or taken by the
    /// handler to be acknowledged later. `read_to` is the position of the last record that was read with
    /// them; that one may have no message.
    pub(super) async fn deliver(
        &mut self,
        messages: Vec<Message>,
        behind: Option<Duration>,
        read_to: Position,
    ) -> Result<(), Interrupt> {
        if !messages.is_empty() {
            let first = self.first_serial();
            let batch = self.batch(messages, first, behind);
            let offered = match self.offer(&batch).await {
                Ok(offered) => offered,
                Err(interrupt) => {
                    self.keep_early_acks(batch);
                    return Err(interrupt);
                }
            };
            match offered {
                Ok(()) if batch.acks.are_taken() => {
                    let finished = self.finished_early(&batch);
                    self.count(batch.len());
                    self.take_over(grouped(batch.messages), &finished);
                }
                Ok(()) => self.finish(&batch.messages),
                Err(failure)
                    if batch.len() == 1 || self.settings.retries.per == RetryPer::Batch =>
                {
                    self.give_up(&batch.messages, &failure).await?;
                    self.finish(&batch.messages);
                }
                Err(_) => self.deliver_singly(batch.messages, behind).await?,
            }
        }
        if self.tracker.delivered().is_none_or(|delivered| *delivered < read_to) {
            self.tracker.deliver(read_to, 0);
        }
        Ok(())
    }

    /// Offers the messages of a batch that failed one by one: only those that fail are given up.
    async fn deliver_singly(
        &mut self,
        messages: Vec<Message>,
        behind: Option<Duration>,
    ) -> Result<(), Interrupt> {
        for group in grouped(messages) {
            let first = self.first_serial();
            let mut finished = Vec::new();
            for (serial, message) in (first..).zip(&group.messages) {
                let batch = self.batch(vec![message.clone()], serial, behind);
                match self.offer(&batch).await? {
                    Ok(()) => {
                        finished.push(!batch.acks.are_taken());
                        // Until the whole position is, below.
                        self.within_position = true;
                    }
                    Err(failure) => {
                        self.give_up(&batch.messages, &failure).await?;
                        finished.push(true);
                    }
                }
            }
            if finished.contains(&false) {
                self.count(group.messages.len());
                self.take_over(vec![group], &finished);
            } else {
                self.finish(&group.messages);
            }
            self.within_position = false;
        }
        Ok(())
    }

    /// At a stop: what was acknowledged of a batch that the handler did not take wholly is finished all
    /// the same.
    fn keep_early_acks(&mut self, batch: Batch) {
        let refused = std::mem::take(&mut self.refused_early);
        if self.acked_early.is_empty() && refused.is_empty() {
            return;
        }
        let finished = self.finished_early(&batch);
        self.count(finished.iter().filter(|finished| **finished).count());
        self.take_over(grouped(batch.messages), &finished);
        // The others are with somebody who may acknowledge them yet.
        for serial in refused {
            if let Some(unacked) = self.unacked.get_mut(&serial) {
                unacked.failed = true;
            }
        }
    }

    fn finished_early(&mut self, batch: &Batch) -> Vec<bool> {
        let early = std::mem::take(&mut self.acked_early);
        batch.acks.serials.iter().map(|serial| early.contains(serial)).collect()
    }

    /// Notes messages as finished, and with them what comes before, unless it is not acknowledged.
    fn finish(&mut self, messages: &[Message]) {
        self.count(messages.len());
        if let Some(last) = messages.last() {
            self.tracker.deliver(last.position(), 0);
        }
    }

    /// Notes messages as taken by the handler, which acknowledges them later, but for those that are
    /// `finished`.
    fn take_over(&mut self, groups: Vec<Group>, finished: &[bool]) {
        let mut finished = finished.iter();
        for Group { position, messages } in groups {
            let serials = self.tracker.deliver(position, messages.len()).unwrap_or(0..0);
            for (serial, message) in serials.zip(messages) {
                if finished.next().copied().unwrap_or(false) {
                    self.tracker.finish(serial);
                } else {
                    let since = Instant::now();
                    let unacked = Unacked { message, attempts: 1, since, failed: false };
                    self.unacked.insert(serial, unacked);
                }
            }
        }
    }

    fn count(&self, messages: usize) {
        self.meter.count(|counts| &counts.messages, messages as u64);
        self.meter.note_activity();
    }

    /// Takes note of an acknowledgement. A message that failed is offered again, alone.
    pub(super) async fn take_answer(&mut self, answer: Answer) -> Result<(), Interrupt> {
        let Answer { serial, failed } = answer;
        // What is not there was acknowledged before, or is of a batch that was offered again.
        let Some(unacked) = self.unacked.get_mut(&serial) else { return Ok(()) };
        if let Some(reason) = failed {
            let (attempts, since) = (unacked.attempts, unacked.since);
            unacked.attempts += 1;
            unacked.failed = true;
            let message = unacked.message.clone();
            let allowed = self.settings.retries.allow(attempts, since, Instant::now());
            let failure = Failure { attempts, cause: FailureCause::Error(reason) };
            let done = if allowed {
                self.tell_failure(&message, &failure);
                let mut backoff = self.backoff(attempts);
                self.wait(&mut backoff).await?;
                let batch = self.batch(vec![message], serial, None);
                match self.offer(&batch).await? {
                    Ok(()) => !batch.acks.are_taken(),
                    Err(failure) => {
                        self.give_up(&batch.messages, &failure).await?;
                        true
                    }
                }
            } else {
                self.give_up(&[message], &failure).await?;
                true
            };
            if !done {
                if let Some(unacked) = self.unacked.get_mut(&serial) {
                    unacked.failed = false;
                }
                return Ok(());
            }
        }
        self.unacked.remove(&serial);
        self.tracker.finish(serial);
        self.activity.got_on();
        self.meter.note_activity();
        Ok(())
    }

    /// The serial number of the next message that is offered.
    fn first_serial(&mut self) -> u64 {
        self.acked_early.clear();
        self.refused_early.clear();
        self.tracker.skip_to(self.used_to);
        self.tracker.next_serial()
    }

    fn batch(&self, messages: Vec<Message>, first_serial: u64, behind: Option<Duration>) -> Batch {
        let serials = (first_serial..).take(messages.len()).collect();
        Batch::new(messages, behind, Acks::new(serials, self.to_answers.clone()))
    }

    /// Offers a batch until the handler has finished it, or for as often as it is to be.
    async fn offer(&mut self, batch: &Batch) -> Result<Result<(), Failure>, Interrupt> {
        let since = Instant::now();
        let mut attempts = 0;
        let mut backoff = self.backoff(1);
        loop {
            if !self.held.is_valid() {
                return Err(Interrupt::Lost);
            }
            attempts += 1;
            self.activity.enter(Step::Handles);
            let began = Instant::now();
            let offered = self.offer_once(batch).await;
            self.meter.note_attempt(began.elapsed());
            let cause = match offered {
                Ok(()) => {
                    self.checkpoint_wanted |= batch.is_checkpoint_wanted();
                    self.failure_rate.note(batch.len() as u64, 0, Instant::now());
                    self.activity.got_on();
                    return Ok(Ok(()));
                }
                Err(cause) => cause,
            };
            self.meter.count(|counts| &counts.failed_attempts, 1);
            self.take_back(batch);
            let failure = Failure { attempts, cause };
            if self.stop.is_cancelled() {
                let first = batch.first().map_or("", |m| m.sequence_number().as_str());
                let cause = &failure.cause;
                tracing::info!(sequence_number = first, "batch not finished at the stop: {cause}");
                return Err(Interrupt::Stopped);
            }
            if !self.settings.retries.allow(attempts, since, Instant::now()) {
                return Ok(Err(failure));
            }
            if let Some(first) = batch.first() {
                self.tell_failure(first, &failure);
            }
            self.wait(&mut backoff).await?;
        }
    }

    /// What the handler finished in an attempt that failed is finished; what it dropped says nothing of
    /// the next attempt.
    fn take_back(&mut self, batch: &Batch) {
        if batch.acks.are_taken() {
            let last = batch.acks.serials.last().copied().unwrap_or(0);
            self.used_to = self.used_to.max(last + 1);
        }
        let mut of_others = Vec::new();
        while let Ok(answer) = self.answers.try_recv() {
            let of_this = batch.acks.serials.binary_search(&answer.serial).is_ok();
            match (of_this, &answer.failed) {
                (true, None) => {
                    self.acked_early.insert(answer.serial);
                }
                (true, Some(_)) => {
                    self.refused_early.insert(answer.serial);
                }
                (false, _) => of_others.push(answer),
            }
        }
        for answer in of_others {
            // To be looked at in its turn.
            let _ = self.to_answers.send(answer);
        }
        batch.acks.take_back();
    }

    async fn offer_once(&mut self, batch: &Batch) -> Result<(), FailureCause> {
        let limit = self.settings.retries.time_limit;
        let handler = &mut self.handler;
        let handling = AssertUnwindSafe(async { handler.handle(batch).await }).catch_unwind();
        let handled = match limit {
            Some(limit) => match timeout(limit, handling).await {
                Ok(handled) => handled,
                Err(_) => return Err(FailureCause::TimeLimit(limit)),
            },
            None => handling.await,
        };
        match handled {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(FailureCause::Error(error.to_string())),
            Err(panic) => Err(FailureCause::Panic(super::panic_text(panic))),
        }
    }

    fn backoff(&self, attempts: u32) -> Backoff {
        let retries = &self.settings.retries;
        let first = retries.first_wait.saturating_mul(1 << attempts.saturating_sub(1).min(20));
        Backoff::new(first.min(retries.longest_wait), retries.longest_wait)
    }

    async fn wait(&mut self, backoff: &mut Backoff) -> Result<(), Interrupt> {
        tokio::select! {
            () = sleep(backoff.next_wait()) => Ok(()),
            () = self.stop.cancelled() => Err(Interrupt::Stopped),
        }
    }

    fn tell_failure(&self, first: &Message, failure: &Failure) {
        tracing::warn!(
            sequence_number = first.sequence_number().as_str(),
            sub_sequence_number = first.sub_sequence_number(),
            attempts = failure.attempts,
            "the handler failed: {}; offering it again",
            failure.cause
        );
    }

    /// Deals with messages that the handler has not finished, as the policy says.
    async fn give_up(&mut self, messages: &[Message], failure: &Failure) -> Result<(), Interrupt> {
        let Some(first) = messages.first() else { return Ok(()) };
        let count = messages.len() as u64;
        let number = first.sequence_number().as_str();
        let too_many = self.failure_rate.note(count, count, Instant::now());
        if too_many && self.settings.on_failure != OnFailure::Stop {
            return Err(Interrupt::Failed(WorkerError::TooManyFailures {
                shard: self.shard.clone(),
                sequence_number: number.to_owned(),
                percent: self.settings.tolerance.map_or(0.0, |tolerance| tolerance.percent),
                reason: failure.cause.to_string(),
            }));
        }
        match self.settings.on_failure {
            OnFailure::Stop => Err(Interrupt::Failed(WorkerError::Handler {
                shard: self.shard.clone(),
                sequence_number: number.to_owned(),
                attempts: failure.attempts,
                reason: failure.cause.to_string(),
            })),
            OnFailure::Skip => {
                self.meter.count(|counts| &counts.skipped, count);
                tracing::error!(
                    sequence_number = number,
                    messages = count,
                    attempts = failure.attempts,
                    "skipped, because the handler failed: {}",
                    failure.cause
                );
                Ok(())
            }
            OnFailure::DeadLetter => {
                let kind = match failure.cause {
                    FailureCause::TimeLimit(_) => Kind::HandlerTimedOut,
                    _ => Kind::HandlerFailed,
                };
                let letters = messages.iter().map(|message| DeadLetter {
                    kind,
                    reason: failure.cause.to_string(),
                    place: message.into(),
                    attempts: failure.attempts,
                    given_up_at: Timestamp::now(),
                    application: Some(self.settings.application.clone()),
                    worker: Some(self.settings.worker_id.clone()),
                    data: message.event_json().as_bytes().to_vec().into(),
                });
                let letters: Vec<DeadLetter> = letters.collect();
                self.store_letters(&letters).await?;
                tracing::error!(
                    sequence_number = number,
                    messages = count,
                    attempts = failure.attempts,
                    "gone to the dead letters, because the handler failed: {}",
                    failure.cause
                );
                Ok(())
            }
        }
    }

    /// Stores dead letters, and returns when the checkpoint may pass them (P1, P9). A stop gives up.
    pub(super) async fn store_letters(&mut self, letters: &[DeadLetter]) -> Result<(), Interrupt> {
        self.activity.enter(Step::WritesDeadLetter);
        tokio::select! {
            biased;
            stored = self.letters.store(letters) => {
                stored.map_err(|error| Interrupt::Failed(error.into()))?;
            }
            () = stopped_for(&self.stop, self.settings.shutdown_limit / 2) => {
                return Err(Interrupt::Stopped);
            }
        }
        self.meter.count(|counts| &counts.dead_letters, letters.len() as u64);
        Ok(())
    }

    /// At a stop or a hand-over: waits for the acknowledgements of what the handler has taken. What is
    /// not acknowledged in time, or failed, is read again.
    pub(super) async fn settle_acks(&mut self, limit: Duration) {
        let give_up = Instant::now() + limit;
        let mut awaited = self.unacked.values().filter(|unacked| !unacked.failed).count();
        while awaited > 0 {
            match tokio::time::timeout_at(give_up, self.answers.recv()).await {
                Ok(Some(Answer { serial, failed: None })) => {
                    if let Some(unacked) = self.unacked.remove(&serial) {
                        self.tracker.finish(serial);
                        awaited -= usize::from(!unacked.failed);
                    }
                }
                Ok(Some(Answer { serial, failed: Some(_) })) => {
                    if let Some(unacked) = self.unacked.get_mut(&serial) {
                        awaited -= usize::from(!std::mem::replace(&mut unacked.failed, true));
                    }
                }
                Ok(None) | Err(_) => break,
            }
        }
        if !self.unacked.is_empty() {
            tracing::info!(
                messages = self.unacked.len(),
                "not acknowledged: these messages are read again, by the next reader of the shard"
            );
        }
    }
}

/// Completes some time after `stop`.
async fn stopped_for(stop: &CancellationToken, time: Duration) {
    stop.cancelled().await;
    sleep(time).await;
}

/// The messages, by the position that is reached when they are finished.
fn grouped(messages: Vec<Message>) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for message in messages {
        let position = message.position();
        match groups.last_mut() {
            Some(group) if group.position == position => group.messages.push(message),
            _ => groups.push(Group { position, messages: vec![message] }),
        }
    }
    groups
}
