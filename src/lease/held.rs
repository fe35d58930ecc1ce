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
    /// Set when a write that lets go has begun. It may land without our hearing of it, and a renewal
    /// after that would find another's lease: from then on only that write is tried again.
    letting_go: AtomicBool,
    /// When the last successful write began; or, if attempts before it got no answer, the first of
    /// those: it may be the one that moved the counter.
    written_at: Mutex<Instant>,
    unanswered_since: Mutex<Option<Instant>>,
    /// From when on nobody else can be reading.
    usable_from: Instant,
    lost: CancellationToken,
    /// Set when it was lost because its row was deleted.
    gone: AtomicBool,
    /// Set when it was lost because no write of it was answered in time.
    ran_out: AtomicBool,
    asked: CancellationToken,
    /// How far behind the stream's tip the last read was, and when that was.
    behind: Mutex<Option<(Duration, Instant)>>,
    /// A note that waits for the next renewal, and when the last one was written.
    note: Mutex<Option<Change>>,
    noted_at: Mutex<Instant>,
    /// What last kept the reader from getting on.
    trouble: Mutex<Option<Trouble>>,
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
            letting_go: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            ran_out: AtomicBool::new(false),
            behind: Mutex::new(None),
            note: Mutex::new(None),
            noted_at: taken_at.into(),
            trouble: Mutex::new(None),
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

    /// If it was lost because no write of it was answered in time: the counter that it was taken with. To
    /// be asked when nothing reads the shard any more.
    pub(super) fn ran_out_from(&self) -> Option<u64> {
        let lease = self.lease.try_lock().ok().filter(|_| self.ran_out.load(Ordering::Acquire))?;
        lease.current_note().map(|note| note.from_counter)
    }

    fn run_out(&self) {
        self.ran_out.store(true, Ordering::Release);
        self.lost.cancel();
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
        *lock(&self.trouble) = Some(trouble.clone());
        *lock(&self.note) = Some(Change::Note { trouble });
    }

    /// What last kept the reader from getting on, as it was noted here.
    pub fn trouble(&self) -> Option<Trouble> {
        lock(&self.trouble).clone()
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
        match change {
            Change::Release { .. } | Change::End { .. } => {
                self.letting_go.store(true, Ordering::Release);
            }
            Change::Renew if self.letting_go.load(Ordering::Acquire) => return Ok(()),
            _ => {}
        }
        let began = Instant::now();
        match self.store.update(&mut lease, change).await {
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
                match &error {
                    LeaseError::Lost { shard, owner } => {
                        // After a write that lets go, another's lease is as it should be.
                        let letting_go = self.letting_go.load(Ordering::Acquire);
                        if !letting_go && !self.lost.is_cancelled() {
                            let owner = owner.as_deref().unwrap_or("nobody");
                            tracing::warn!(
                                %shard, owner,
                                "lease lost: delivery of the shard stops here, and what was handled since \
                                 the last checkpoint comes again to its new owner"
                            );
                        }
                        self.lost.cancel();
                    }
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
        let mut failed = false;
        loop {
            match self.write(change).await {
                Err(error) if self.is_valid() => {
                    if !std::mem::replace(&mut failed, true) {
                        tracing::warn!("{error}; trying again while the lease is ours");
                    }
                    tokio::time::sleep(backoff.next_wait()).await;
                }
                Err(error @ (LeaseError::Table { .. } | LeaseError::NoTable { .. })) => {
                    tracing::warn!("{error}; the lease may be another worker's by now");
                    self.run_out();
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
                    self.run_out();
                    return;
                }
                plan::Renewal::Due if self.letting_go.load(Ordering::Acquire) => {
                    sleep_until(self.valid_until()).await;
                    continue;
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
                Ok(Err(LeaseError::Lost { .. })) => return,
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
    use crate::{checkpoint::Checkpoint, lease::deaf::Deaf, shard::Shard};

    async fn taken_from(store: &Deaf) -> HeldLease<Deaf> {
        let shard = Shard {
            id: "a".into(),
            parents: vec![],
            hash_key_range: None,
            closed: false,
            begins: None,
        };
        let mut lease = Lease::new(&shard, Checkpoint::TrimHorizon, None);
        store.create(&lease).await.expect("a lease");
        let take = Change::Take { worker: "me".into(), at: Timestamp::UNIX_EPOCH };
        let taken = store.update(&mut lease, &take).await.expect("taken");
        let (now, duration) = (Instant::now(), Duration::from_secs(10));
        HeldLease::new(store.clone(), taken, now, now, duration, 1)
    }

    #[tokio::test]
    async fn p4_writes_whose_answers_get_lost_one_after_the_other_do_not_cost_the_lease() {
        let store = Deaf::default();
        let held = taken_from(&store).await;
        let checkpoint =
            |number| Change::Checkpoint { checkpoint: Checkpoint::parse(number, 0).expect("one") };
        for unheard in [Change::Renew, checkpoint("1"), Change::Renew, checkpoint("2")] {
            store.lose_next_answer();
            assert!(held.write(&unheard).await.is_err(), "written, but not heard of");
        }
        held.write(&Change::Renew).await.expect("still ours");
        assert_eq!(held.lease().await, store.table.rows()[0]);
    }

    #[tokio::test(start_paused = true)]
    async fn p6_a_release_whose_answer_got_lost_is_not_taken_for_a_loss_by_the_next_renewal() {
        let children = ["b".into()].into();
        for change in [Change::Release { checkpoint: None }, Change::End { children }] {
            let store = Deaf::default();
            let held = Arc::new(taken_from(&store).await);
            let keeper = tokio::spawn(held.clone().keep());
            store.lose_next_answer();
            assert!(held.write(&change).await.is_err(), "written, but not heard of");
            tokio::time::sleep(Duration::from_secs(6)).await;
            held.write(&change).await.expect("recognised as written");
            keeper.abort();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn p4_a_renewal_whose_answer_got_lost_counts_from_when_it_was_sent() {
        let store = Deaf::default();
        let held = taken_from(&store).await;

        tokio::time::advance(Duration::from_secs(4)).await;
        store.lose_next_answer();
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
