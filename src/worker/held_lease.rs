use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::{
    backoff::Backoff,
    lease::{Change, Lease, LeaseError, dynamodb::LeaseTable},
};

/// A renewal is due when this part of the lease duration has passed: 4 s of 10 s.
const RENEW_AFTER: f64 = 0.4;

/// A lease that this worker has.
///
/// Renewed on the side by [`keep`](Self::keep), so that neither a slow handler nor a full buffer costs
/// the lease. Other workers count the lease duration from when they see it move, which is after our
/// write began; we count from when it began. So we stop before they start (P4).
pub(super) struct HeldLease {
    table: LeaseTable,
    duration: Duration,
    /// Renewals and checkpoints both move the counter: one at a time.
    lease: tokio::sync::Mutex<Lease>,
    /// When the last successful write began.
    written_at: Mutex<Instant>,
    lost: CancellationToken,
    caught_up: AtomicBool,
}

impl HeldLease {
    pub(super) fn new(
        table: LeaseTable,
        lease: Lease,
        taken_at: Instant,
        duration: Duration,
    ) -> Self {
        Self {
            table,
            duration,
            lease: lease.into(),
            written_at: taken_at.into(),
            lost: CancellationToken::new(),
            caught_up: AtomicBool::new(false),
        }
    }

    pub(super) fn table(&self) -> &LeaseTable {
        &self.table
    }

    /// The lease as it was last written.
    pub(super) async fn lease(&self) -> Lease {
        self.lease.lock().await.clone()
    }

    /// Whether it is certain that no other worker has the shard. After a pause of the whole process
    /// the clock knows it before any task does.
    pub(super) fn is_valid(&self) -> bool {
        !self.lost.is_cancelled() && Instant::now() < self.valid_until()
    }

    /// Completes when the lease is lost.
    pub(super) async fn lost(&self) {
        self.lost.cancelled().await;
    }

    /// Whether the last read found nothing more.
    pub(super) fn is_caught_up(&self) -> bool {
        self.caught_up.load(Ordering::Relaxed)
    }

    pub(super) fn set_caught_up(&self, caught_up: bool) {
        self.caught_up.store(caught_up, Ordering::Relaxed);
    }

    /// Writes a change. Refused if another worker wrote the lease: then it is lost.
    pub(super) async fn write(&self, change: &Change) -> Result<(), LeaseError> {
        let mut lease = self.lease.lock().await;
        let began = Instant::now();
        match self.table.update(&lease, change).await {
            Ok(written) => {
                *lease = written;
                *self.written_at.lock().unwrap_or_else(|poison| poison.into_inner()) = began;
                Ok(())
            }
            Err(error) => {
                if let LeaseError::Lost { .. } = error {
                    self.lost.cancel();
                }
                Err(error)
            }
        }
    }

    /// Renews the lease until it is lost.
    pub(super) async fn keep(self: Arc<Self>) {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(2));
        let mut failed = false;
        loop {
            sleep_until(self.written_at() + self.duration.mul_f64(RENEW_AFTER)).await;
            if self.written_at().elapsed() < self.duration.mul_f64(RENEW_AFTER) {
                continue; // A checkpoint was written meanwhile: that renews too.
            }
            match timeout_at(self.valid_until(), self.write(&Change::Renew)).await {
                Ok(Ok(())) => {
                    if std::mem::take(&mut failed) {
                        tracing::info!("lease renewed again");
                    }
                    backoff.reset();
                }
                Ok(Err(LeaseError::Lost { shard, owner })) => {
                    tracing::warn!(
                        %shard, owner = owner.as_deref().unwrap_or("nobody"),
                        "lease lost: another worker has it; delivery of the shard stops here"
                    );
                    return;
                }
                Ok(Err(error)) => {
                    if !std::mem::replace(&mut failed, true) {
                        tracing::warn!("lease not renewed: {error}; trying again");
                    }
                    tokio::time::sleep(backoff.next_wait()).await;
                }
                Err(_) => {
                    tracing::error!(
                        "lease not renewed for {:?}: delivery of the shard stops, because another \
                         worker may start; check that DynamoDB can be reached",
                        self.duration
                    );
                    self.lost.cancel();
                    return;
                }
            }
        }
    }

    fn written_at(&self) -> Instant {
        *self.written_at.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    fn valid_until(&self) -> Instant {
        self.written_at() + self.duration
    }
}
