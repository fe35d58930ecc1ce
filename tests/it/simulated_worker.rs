//! A worker whose leases are real and whose stream is made up: what the simulation and the benchmark of a
//! fleet's costs share.

use std::{
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use tokio::{
    task::JoinSet,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tramline::{
    LeaseError, SequenceNumber, ShardId,
    checkpoint::{Checkpoint, Position},
    lease::{Change, HeldLease, InitialPosition, Lease, LeaseLoop, LeaseStore, MemoryTable},
    shard::Shard,
};

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poison| poison.into_inner())
}

pub fn shard_id(n: usize) -> ShardId {
    format!("shardId-{n:012}").into()
}

/// The checkpoint at the record with the number `n`.
pub fn checkpoint_at(n: u64) -> Checkpoint {
    let sequence_number = SequenceNumber::parse(n.to_string()).expect("a number");
    Checkpoint::At(Position { sequence_number, sub_sequence_number: 0 })
}

/// How a worker reaches the table: what happens on the way there and back.
pub trait Reach: Clone + Send + Sync + 'static {
    fn table(&self) -> &MemoryTable;

    /// One request, whose effect is `effect`.
    fn request<T: Send>(
        &self,
        effect: impl Future<Output = Result<T, LeaseError>> + Send,
    ) -> impl Future<Output = Result<T, LeaseError>> + Send;

    /// Takes note of a change that is about to be written.
    fn note_write(&self, _seen: &Lease, _change: &Change) {}
}

/// The table as one worker reaches it.
#[derive(Clone)]
pub struct SimTable<R>(pub R);

impl<R: Reach> LeaseStore for SimTable<R> {
    fn name(&self) -> &str {
        "simulated"
    }

    async fn scan(&self) -> Result<Vec<Lease>, LeaseError> {
        self.0.request(self.0.table().scan()).await
    }

    async fn get(&self, shard: &ShardId) -> Result<Option<Lease>, LeaseError> {
        self.0.request(self.0.table().get(shard)).await
    }

    async fn create(&self, lease: &Lease) -> Result<bool, LeaseError> {
        self.0.request(self.0.table().create(lease)).await
    }

    async fn update(&self, seen: &mut Lease, change: &Change) -> Result<Lease, LeaseError> {
        self.0.note_write(seen, change);
        self.0.request(self.0.table().update(seen, change)).await
    }

    async fn delete(&self, seen: &Lease) -> Result<(), LeaseError> {
        self.0.request(self.0.table().delete(seen)).await
    }

    async fn ring(&self, shard: &ShardId) -> Result<(), LeaseError> {
        self.0.request(self.0.table().ring(shard)).await
    }
}

/// Drives the lease loop as `Worker::run` does, with one `read` for each lease, until `stop`. A `read`
/// gives its shard when it is over, and whether it gave the shard up.
pub async fn work<S, F>(
    mut leases: LeaseLoop<S>,
    listed: impl Fn() -> Vec<Shard>,
    read: impl Fn(Arc<HeldLease<S>>) -> F,
    stop: CancellationToken,
) where
    S: LeaseStore,
    F: Future<Output = (ShardId, bool)> + Send + 'static,
{
    let mut readers = JoinSet::new();
    let (mut look_at, mut discover_at) = (Instant::now(), Instant::now());
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Some(done) = readers.join_next() => {
                match done.expect("a reader does not panic") {
                    (shard, true) => leases.give_up(&shard),
                    (shard, false) => leases.done(&shard),
                }
                (look_at, discover_at) = (Instant::now(), Instant::now());
            }
            () = sleep_until(look_at) => {
                let due = !leases.watches_bell() && Instant::now() >= discover_at;
                let listed = if due { listed() } else { Vec::new() };
                let discover = due.then_some((listed.as_slice(), InitialPosition::TrimHorizon));
                match leases.look(discover).await {
                    Ok(looked) => {
                        if due {
                            discover_at = Instant::now() + Duration::from_secs(60);
                        }
                        for held in looked.taken {
                            readers.spawn(read(held));
                        }
                        look_at = looked.again_at;
                    }
                    Err(_) => look_at = Instant::now() + Duration::from_secs(2),
                }
            }
        }
    }
    while readers.join_next().await.is_some() {}
    let _ = leases.ring().await;
}
