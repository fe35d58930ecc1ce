//! Where the messages of a worker's shards and the connections of a feed's readers meet.

use std::{
    collections::{HashMap, hash_map::DefaultHasher},
    convert::Infallible,
    hash::{Hash as _, Hasher as _},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use tokio::{sync::watch, time::timeout};
use tokio_util::sync::CancellationToken;

use super::dispatch::{Dispatch, NotSent, Occupied, ReaderId, Source, Spread, Unfinished};
use crate::{
    handler::{Ack, Batch, Handler, StopReason},
    record::Message,
};

/// How many messages a reader that acknowledges may have that it has not finished.
pub(super) const WINDOW: usize = 1000;
/// A shard is read on while it has fewer messages than this that are not finished. Fewer than a worker
/// lets wait for their acknowledgements: so it is the handler that waits, for as long as it must.
const ROOM_MESSAGES: usize = 4000;
/// The same in bytes.
const ROOM_BYTES: usize = 4 * 1024 * 1024;
/// What a message takes beside its text, about.
const MESSAGE_BYTES: usize = 512;
/// How long a reader may take to leave when another connection takes its place.
const LEAVE_LIMIT: Duration = Duration::from_secs(1);
/// How much is given to a connection at a time.
const CHUNK_BYTES: usize = 64 * 1024;

/// The messages of one feed that are not finished.
pub(crate) struct Hub {
    state: Mutex<State>,
    /// Told whenever something may go on: a message has come, was finished, or a reader has come or gone.
    changed: watch::Sender<()>,
    acks: bool,
}

struct State {
    dispatch: Dispatch<Item>,
    /// Cancelled when another connection takes a reader's place.
    displaced: HashMap<ReaderId, CancellationToken>,
}

struct Item {
    message: Message,
    ack: Ack,
}

impl Hub {
    /// A feed whose readers acknowledge, or which takes what was written as finished.
    pub(crate) fn new(spread: Spread, acks: bool) -> Arc<Self> {
        let window = if acks { WINDOW } else { usize::MAX };
        let state = State { dispatch: Dispatch::new(spread, window), displaced: HashMap::new() };
        Arc::new(Self { state: state.into(), changed: watch::Sender::new(()), acks })
    }

    /// Whether its readers acknowledge.
    pub(super) fn has_acks(&self) -> bool {
        self.acks
    }

    /// The handler for one shard. It waits for readers until `stop`.
    pub(crate) fn handler(self: &Arc<Self>, stop: CancellationToken) -> FeedHandler {
        let source = self.lock().dispatch.open();
        FeedHandler { hub: self.clone(), source, stop }
    }

    /// A reader has come. Where it takes the place of one of its name, what that has said is heard first.
    pub(super) async fn join(self: &Arc<Self>, name: &str) -> Result<Joined, Occupied> {
        let mut changed = self.changed.subscribe();
        let others_leave = async {
            while self.displace(name) {
                let _ = changed.changed().await;
            }
        };
        let _ = timeout(LEAVE_LIMIT, others_leave).await;
        let token = CancellationToken::new();
        let mut state = self.lock();
        let (id, displaced) = state.dispatch.join(name)?;
        for old in displaced {
            if let Some(token) = state.displaced.remove(&old) {
                token.cancel();
            }
        }
        state.displaced.insert(id, token.clone());
        drop(state);
        self.changed.send_replace(());
        Ok(Joined { hub: self.clone(), id, displaced: token, changed: self.changed.subscribe() })
    }

    /// Tells the readers whose place one of this name takes to leave. `false` if there are none.
    fn displace(&self, name: &str) -> bool {
        let state = self.lock();
        let displaced = state.dispatch.displaced_by(name);
        displaced.iter().filter_map(|id| state.displaced.get(id)).for_each(|token| token.cancel());
        !displaced.is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    /// Waits until `is_enough` holds of what is not finished of a source, or until `stop`.
    async fn until(
        &self,
        source: Source,
        is_enough: impl Fn(Unfinished) -> bool,
        stop: &CancellationToken,
    ) {
        let mut changed = self.changed.subscribe();
        while !is_enough(self.lock().dispatch.unfinished(source)) {
            tokio::select! {
                _ = changed.changed() => {}
                () = stop.cancelled() => return,
            }
        }
    }
}

/// Acknowledges what is finished.
fn acknowledge(items: Vec<Item>) {
    items.into_iter().for_each(|item| item.ack.ack());
}

/// Gives the messages of one shard to a feed. Made by [`Hub::handler`].
pub(crate) struct FeedHandler {
    hub: Arc<Hub>,
    source: Source,
    stop: CancellationToken,
}

impl Handler for FeedHandler {
    type Error = Infallible;

    /// Takes the batch, and returns when there is room for another one. Its messages are finished when
    /// readers have finished them.
    async fn handle(&mut self, batch: &Batch) -> Result<(), Infallible> {
        {
            let mut state = self.hub.lock();
            for (message, ack) in batch.iter().zip(batch.ack_later()) {
                let mut key = DefaultHasher::new();
                message.partition_key().hash(&mut key);
                let bytes = MESSAGE_BYTES + message.raw().len();
                let item = Item { message: message.clone(), ack };
                state.dispatch.offer(self.source, key.finish(), bytes, item);
            }
        }
        self.hub.changed.send_replace(());
        let has_room = |now: Unfinished| now.messages < ROOM_MESSAGES && now.bytes < ROOM_BYTES;
        self.hub.until(self.source, has_room, &self.stop).await;
        Ok(())
    }

    /// What a reader has is waited for. What none has is taken back, for the next owner of the shard,
    /// unless everything is done but that.
    async fn stopping(&mut self, why: StopReason) {
        if matches!(why, StopReason::Shutdown | StopReason::WindowEnd) {
            self.hub.until(self.source, |now| now.messages == 0, &self.stop).await;
        }
        let withdrawn = self.hub.lock().dispatch.withdraw_waiting(self.source);
        drop(withdrawn);
    }
}

/// Also when the lease is lost or the shard's task is dropped: nothing of the shard is sent any more.
impl Drop for FeedHandler {
    fn drop(&mut self) {
        let withdrawn = self.hub.lock().dispatch.close(self.source);
        drop(withdrawn);
        self.hub.changed.send_replace(());
    }
}

/// A reader's place in a feed. It has gone when this is dropped.
pub(super) struct Joined {
    hub: Arc<Hub>,
    id: ReaderId,
    displaced: CancellationToken,
    changed: watch::Receiver<()>,
}

impl Joined {
    /// Appends what there is for the reader, as `write` does it, but not much more than fits into one write.
    /// Gives the serial number of the last one.
    pub(super) fn fill(
        &mut self,
        out: &mut Vec<u8>,
        write: impl Fn(u64, &Message, &mut Vec<u8>),
    ) -> Option<u64> {
        self.changed.mark_unchanged();
        let mut state = self.hub.lock();
        let mut last = None;
        while out.len() < CHUNK_BYTES {
            let Some((serial, item)) = state.dispatch.next(self.id) else { break };
            write(serial, &item.message, out);
            last = Some(serial);
        }
        last
    }

    /// Completes when there may be more.
    pub(super) async fn changed(&mut self) {
        // The hub is held here, and with it the sender.
        let _ = self.changed.changed().await;
    }

    /// The reader has finished what it was sent up to this serial number.
    pub(super) fn finish(&self, serial: u64) -> Result<(), NotSent> {
        let finished = self.hub.lock().dispatch.finish(self.id, serial)?;
        acknowledge(finished);
        self.hub.changed.send_replace(());
        Ok(())
    }

    /// How many messages it has that are not finished.
    pub(super) fn unfinished(&self) -> usize {
        self.hub.lock().dispatch.unfinished_by(self.id)
    }

    /// Whether its readers acknowledge.
    pub(super) fn has_acks(&self) -> bool {
        self.hub.acks
    }

    /// Cancelled when another connection of its name takes its place.
    pub(super) fn displaced(&self) -> CancellationToken {
        self.displaced.clone()
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        let mut state = self.hub.lock();
        state.displaced.remove(&self.id);
        let finished = state.dispatch.leave(self.id);
        drop(state);
        acknowledge(finished);
        self.hub.changed.send_replace(());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handler::testing::batch;

    fn lines(joined: &mut Joined) -> (Option<u64>, String) {
        let mut out = Vec::new();
        let last = joined.fill(&mut out, |serial, message, out| {
            out.extend_from_slice(format!("{serial} {}\n", message.raw()).as_bytes());
        });
        (last, String::from_utf8(out).expect("text"))
    }

    #[tokio::test]
    async fn p1_a_stop_without_a_reader_takes_everything_back() {
        let stop = CancellationToken::new();
        let hub = Hub::new(Spread::Every, false);
        let mut handler = hub.handler(stop.clone());
        let Ok(()) = handler.handle(&batch(&[("a", "1"), ("a", "2")])).await;
        stop.cancel();
        handler.stopping(StopReason::Shutdown).await;
        let mut joined = hub.join("").await.expect("a place");
        assert_eq!(lines(&mut joined), (None, String::new()));
    }

    #[tokio::test(start_paused = true)]
    async fn the_handler_waits_for_room_and_the_end_for_the_reader() {
        let hub = Hub::new(Spread::One, true);
        let mut handler = hub.handler(CancellationToken::new());
        let many: Vec<(&str, &str)> = vec![("a", "1"); ROOM_MESSAGES];
        let (mut joined, all) = (hub.join("").await.expect("a place"), batch(&many));
        {
            let mut handling = std::pin::pin!(handler.handle(&all));
            let a_while = Duration::from_secs(3600);
            assert!(tokio::time::timeout(a_while, &mut handling).await.is_err());
            let (last, _) = lines(&mut joined);
            joined.finish(last.expect("a message")).expect("sent");
            let Ok(()) = handling.await;
        }
        let ending = handler.stopping(StopReason::WindowEnd);
        let finishing = async {
            while let (Some(last), _) = lines(&mut joined) {
                joined.finish(last).expect("sent");
                tokio::task::yield_now().await;
            }
        };
        tokio::join!(ending, finishing);
        let unfinished = hub.lock().dispatch.unfinished(handler.source);
        assert_eq!(unfinished, Unfinished::default());
    }
}
