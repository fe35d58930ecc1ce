use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::{Shared, add, batcher::Batcher, put::RECORD_LIMIT_BYTES};
use crate::ocs::Event;

/// The way of one connection's messages to Kinesis, in order.
pub(super) struct Lane {
    queue: mpsc::UnboundedSender<Queued>,
    /// Bounds the bytes between the socket and Kinesis.
    room: Arc<Semaphore>,
    limit_bytes: u32,
}

struct Queued {
    event: Event,
    /// Held until Kinesis has the event.
    room: Option<OwnedSemaphorePermit>,
}

impl Lane {
    /// A lane, and the work that empties it: that completes when the lane was dropped and Kinesis has
    /// everything.
    pub(super) fn new(
        shared: Arc<Shared>,
        partition_key: String,
    ) -> (Self, impl Future<Output = ()> + Send) {
        let (queue, queued) = mpsc::unbounded_channel();
        let limit_bytes = shared.settings.lane_bytes.max(1);
        let room = Arc::new(Semaphore::new(limit_bytes as usize));
        (Self { queue, room, limit_bytes }, empty(shared, partition_key, queued))
    }

    /// Waits until there is room: while it waits, nobody reads the socket, and TCP pushes back.
    pub(super) async fn send(&self, event: Event) {
        let size_bytes = u32::try_from(event.json.len()).unwrap_or(u32::MAX).min(self.limit_bytes);
        let room = self.room.clone().acquire_many_owned(size_bytes).await.ok();
        // The other end only goes when the process does.
        let _ = self.queue.send(Queued { event, room });
    }
}

async fn empty(
    shared: Arc<Shared>,
    partition_key: String,
    mut queued: mpsc::UnboundedReceiver<Queued>,
) {
    let mut batcher = Batcher::new(RECORD_LIMIT_BYTES - partition_key.len());
    let mut last = None;
    let mut next = queued.recv().await;
    while next.is_some() {
        // Everything that came while the last record was on its way.
        let mut rooms = Vec::new();
        while let Some(Queued { event, room }) = next.take().or_else(|| queued.try_recv().ok()) {
            match batcher.push(event) {
                Ok(()) => rooms.push(room),
                Err(event) => {
                    next = Some(Queued { event, room });
                    break;
                }
            }
        }
        if let Some(record) = batcher.take() {
            let size_bytes = record.data.len() as u64;
            last = Some(shared.put.put(&partition_key, record.data, last).await);
            add(&shared.counters.put, record.events);
            add(&shared.counters.records, 1);
            add(&shared.counters.bytes, size_bytes);
        }
        drop(rooms);
        if next.is_none() {
            next = queued.recv().await;
        }
    }
}
