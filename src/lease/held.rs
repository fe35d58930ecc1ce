//! A lease that this worker has.

use std::{
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;

use super::{Change, Lease, LeaseError, LeaseStore, Trouble, plan, whole_millis};
use crate::backoff::Backoff;

const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_LIMIT: Duration = Duration::from_secs(2);
/// Notes beyond those that go with a renewal are no more frequent than this.
const NOTE_INTERVAL: Duration = Duration::from_secs(4);
/// AWS sends an event of a subscription every few seconds, and polls are a second apart.
const CAUGHT_UP_FOR: Duration = Duration::from_secs(15);

/// A lease that this worker has, until it loses it or lets go.
///
/// Renewed on the side by [`keep`](Self::keep), so that neither a slow handler nor a full buffer costs
/// the lease. Other workers count the lease duration from when they see it move, which is after our
/// write began; we count nine tenths of it from when it began. So we stop before they start, also when
/// our clock is slower than theirs by up to a tenth (P4).
#[derive(Debug)]
pub struct HeldLease<S> {
    store: S,
    duration: Duration,
    seed: u64,
    /// Renewals and checkpoints both move the counter: one at a time.
    lease: tokio::sync::Mutex<Lease>,
    /// Set when we let go: what was on its way to the lease must not touch it any more.
    let_go: AtomicBool,
    /// When the last successful write began; or, if attempts before it got no answer, the first of
    /// those: it may be the one that moved the counter.
    written_at: Mutex<Instant>,
    unanswered_since: Mutex<Option<Instant>>,
    /// From when on nobody else can be reading.
    usable_from: Instant,
    lost: CancellationToken,
    /// Set when it was lost because its row was deleted.
    gone: AtomicBool,
    asked: CancellationToken,
    /// How far behind the stream's tip the last read was, and when that was.
    behind: Mutex<Option<(Duration, Instant)>>,
    /// A note that waits for the next renewal, and when the last one was written.
    note: Mutex<Option<Change>>,
    noted_at: Mutex<Instant>,
}

impl<S: LeaseStore> HeldLease<S> {
    pub(super) fn new(
        store: S,
        lease: Lease,
        taken_at: Instant,
        usable_from: Instant,
        duration: Duration,
        seed: u64,
    ) -> Self {
        Self {
            store,
            duration,
            seed: seed ^ lease.counter,
            lease: lease.into(),
            written_at: taken_at.into(),
            unanswered_since: Mutex::new(None),
            usable_from,
            lost: CancellationToken::new(),
            asked: CancellationToken::new(),
            let_go: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            behind: Mutex::new(None),
            note: Mutex::new(None),
            noted_at: taken_at.into(),
        }
    }

    /// The table that it is in.
    pub fn store(&self) -> &S {
        &self.store
    }

    /// The lease as it was last written.
    pub async fn lease(&self) -> Lease {
        self.lease.lock().await.clone()
    }

    /// Whether it is certain that no other worker has the shard. After a pause of the whole process
    /// the clock knows it before any task does.
    pub fn is_valid(&self) -> bool {
        !self.lost.is_cancelled()
            && !self.let_go.load(Ordering::Acquire)
            && Instant::now() < self.valid_until()
    }

    /// Completes when nobody else can be reading any more: at once, unless the lease was taken from a
    /// reader that did not let go.
    pub async fn usable(&self) {
        sleep_until(self.usable_from).await;
    }

    /// Completes when the lease is lost.
    pub async fn lost(&self) {
        self.lost.cancelled().await;
    }

    /// Notes that another worker has asked for the lease.
    pub(super) fn ask(&self) {
        self.asked.cancel();
    }

    /// Whether it was lost because its row was deleted: then nobody else knows how far the shard is.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Completes when another worker has asked for the lease: finish the batch and let go.
    pub async fn asked(&self) {
        self.asked.cancelled().await;
    }

    /// Whether the last read found nothing more, and was not long ago: a shard that cannot be read is
    /// not caught up.
    pub fn is_caught_up(&self) -> bool {
        lock(&self.behind)
            .is_some_and(|(behind, at)| behind.is_zero() && at.elapsed() < CAUGHT_UP_FOR)
    }

    /// How far behind the stream's tip the reading is, as far as is known: as the last read was, and the
    /// time since then, for reads are waited for or not asked for while the handler is busy.
    pub fn behind(&self) -> Option<Duration> {
        let (behind, at) = (*lock(&self.behind))?;
        let waited = at.elapsed();
        Some(if behind.is_zero() && waited < CAUGHT_UP_FOR { behind } else { behind + waited })
    }

    /// Notes how far behind the stream's tip a read was: zero if it found nothing more, `None` if that is
    /// not known.
    pub fn set_behind(&self, behind: Option<Duration>) {
        *lock(&self.behind) = behind.map(|behind| (behind, Instant::now()));
    }

    /// Notes in the row, with the next renewal, what keeps the reader from getting on since `at`, or, with
    /// `is_over`, what kept it until now.
    pub fn note_trouble(&self, text: String, at: Timestamp, is_over: bool) {
        let trouble = Trouble { text, at: whole_millis(at), is_over };
        *lock(&self.note) = Some(Change::Note { trouble });
    }

    /// Gives the lease up without a write: it is not used nor renewed any more, and others take it when
    /// it has run out.
    pub fn give_up(&self) {
        self.let_go.store(true, Ordering::Release);
        self.lost.cancel();
    }

    /// Writes a change. Refused if another worker wrote the lease: then it is lost.
    pub async fn write(&self, change: &Change) -> Result<(), LeaseError> {
        let mut lease = self.lease.lock().await;
        if self.let_go.load(Ordering::Acquire) {
            return Err(LeaseError::Lost { shard: lease.shard.clone(), owner: None });
        }
        let began = Instant::now();
        match self.store.update(&lease, change).await {
            Ok(written) => {
                match change {
                    Change::Release { .. } | Change::End { .. } => {
                        self.let_go.store(true, Ordering::Release);
                    }
                    _ if written.checkpoint_owner.is_some() => self.ask(),
                    _ => {}
                }
                if let Change::Note { .. } = change {
                    *lock(&self.noted_at) = began;
                }
                *lease = written;
                let unanswered_since = lock(&self.unanswered_since).take();
                *lock(&self.written_at) = unanswered_since.unwrap_or(began);
                Ok(())
            }
            Err(error) => {
                match error {
                    LeaseError::Lost { .. } => self.lost.cancel(),
                    LeaseError::Gone { .. } => {
                        self.gone.store(true, Ordering::Release);
                        self.lost.cancel();
                    }
                    _ => {
                        lock(&self.unanswered_since).get_or_insert(began);
                    }
                }
                Err(error)
            }
        }
    }

    /// Writes a change that must not be given up: tries again until it is written or the lease is lost.
    pub async fn write_surely(&self, change: &Change) -> Result<(), LeaseError> {
        let mut backoff = Backoff::seeded(RETRY_FIRST, RETRY_LIMIT, self.seed);
        loop {
            match self.write(change).await {
                Err(error) if self.is_valid() => {
                    tracing::warn!("{error}; trying again while the lease is ours");
                    tokio::time::sleep(backoff.next_wait()).await;
                }
                Err(error @ LeaseError::Table { .. }) => {
                    tracing::warn!("{error}; the lease may be another worker's by now");
                    self.lost.cancel();
                    let shard = self.lease.lock().await.shard.clone();
                    return Err(LeaseError::Lost { shard, owner: None });
                }
                written => return written,
            }
        }
    }

    /// Renews the lease until it is lost. To be run beside whatever reads the shard.
    pub async fn keep(self: Arc<Self>) {
        let mut backoff = Backoff::seeded(RETRY_FIRST, RETRY_LIMIT, self.seed);
        let mut failed = false;
        loop {
            match plan::renewal(self.written_at(), self.duration, Instant::now()) {
                // Checkpoints renew too, so that with frequent ones no renewal is ever due.
                plan::Renewal::NotBefore(_) if self.is_note_due() => {}
                plan::Renewal::NotBefore(due) => {
                    sleep_until(due).await;
                    continue; // A checkpoint may have been written meanwhile.
                }
                plan::Renewal::TooLate => {
                    tracing::error!(
                        "lease not renewed in time: delivery of the shard stops, because another worker \
                         may start; check that DynamoDB can be reached"
                    );
                    self.lost.cancel();
                    return;
                }
                plan::Renewal::Due => {}
            }
            let note = lock(&self.note).take();
            let written =
                timeout_at(self.valid_until(), self.write(note.as_ref().unwrap_or(&Change::Renew)));
            let written = written.await;
            if let (Some(note), Ok(Err(LeaseError::Table { .. }))) = (note, &written) {
                lock(&self.note).get_or_insert(note);
            }
            match written {
                Ok(Ok(())) => {
                    if std::mem::take(&mut failed) {
                        tracing::info!("lease renewed again");
                    }
                    backoff.reset();
                }
                Ok(Err(LeaseError::Lost { .. })) if self.let_go.load(Ordering::Acquire) => return,
                Ok(Err(LeaseError::Lost { shard, owner })) => {
                    let owner = owner.as_deref().unwrap_or("nobody");
                    tracing::warn!(%shard, owner, "lease lost: delivery of the shard stops here");
                    return;
                }
                Ok(Err(error @ LeaseError::Gone { .. })) => {
                    tracing::warn!("{error}: delivery of the shard stops here");
                    return;
                }
                Ok(Err(error)) => {
                    if !std::mem::replace(&mut failed, true) {
                        tracing::warn!("lease not renewed: {error}; trying again");
                    }
                    tokio::time::sleep(backoff.next_wait()).await;
                }
                Err(_) => {} // Too late: told above.
            }
        }
    }

    fn is_note_due(&self) -> bool {
        lock(&self.note).is_some() && lock(&self.noted_at).elapsed() >= NOTE_INTERVAL
    }

    fn written_at(&self) -> Instant {
        *lock(&self.written_at)
    }

    fn valid_until(&self) -> Instant {
        plan::usable_until(self.written_at(), self.duration)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poison| poison.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        aws::{AwsError, AwsErrorKind},
        checkpoint::Checkpoint,
        lease::MemoryTable,
        shard::{Shard, ShardId},
    };

    /// A table whose next answer gets lost after the write.
    #[derive(Clone, Default)]
    struct Deaf(MemoryTable, Arc<AtomicBool>);

    impl LeaseStore for Deaf {
        fn name(&self) -> &str {
            "deaf"
        }

        async fn scan(&self) -> Result<Vec<Lease>, LeaseError> {
            self.0.scan().await
        }

        async fn get(&self, shard: &ShardId) -> Result<Option<Lease>, LeaseError> {
            self.0.get(shard).await
        }

        async fn create(&self, lease: &Lease) -> Result<bool, LeaseError> {
            self.0.create(lease).await
        }

        async fn update(&self, seen: &Lease, change: &Change) -> Result<Lease, LeaseError> {
            let written = self.0.update(seen, change).await;
            if self.1.swap(false, Ordering::SeqCst) {
                let source = AwsError::new("dynamodb:UpdateItem", AwsErrorKind::Unreachable, "");
                return Err(LeaseError::Table { table: "deaf".into(), source });
            }
            written
        }

        async fn delete(&self, seen: &Lease) -> Result<(), LeaseError> {
            self.0.delete(seen).await
        }

        async fn ring(&self, shard: &ShardId) -> Result<(), LeaseError> {
            self.0.ring(shard).await
        }
    }

    #[tokio::test(start_paused = true)]
    async fn p4_a_renewal_whose_answer_got_lost_counts_from_when_it_was_sent() {
        let shard = Shard {
            id: "a".into(),
            parents: vec![],
            hash_key_range: None,
            closed: false,
            begins: None,
        };
        let lease = Lease::new(&shard, Checkpoint::TrimHorizon, None);
        let store = Deaf::default();
        store.create(&lease).await.expect("a lease");
        let take = Change::Take { worker: "me".into(), at: Timestamp::UNIX_EPOCH };
        let taken = store.update(&lease, &take).await.expect("taken");
        let (now, duration) = (Instant::now(), Duration::from_secs(10));
        let held = HeldLease::new(store.clone(), taken, now, now, duration, 1);

        tokio::time::advance(Duration::from_secs(4)).await;
        store.1.store(true, Ordering::SeqCst);
        assert!(held.write(&Change::Renew).await.is_err(), "written, but not heard of");
        tokio::time::advance(Duration::from_secs(3)).await;
        held.write(&Change::Renew).await.expect("recognised as written");
        // Others saw the lease move at 4 s, and take it at 14 s.
        tokio::time::advance(Duration::from_millis(5_900)).await;
        assert!(held.is_valid());
        tokio::time::advance(Duration::from_millis(200)).await;
        assert!(!held.is_valid());
    }
}
