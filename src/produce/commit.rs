//! Group commit: what lanes and Kinesis say goes into the spool, and from there to whoever puts.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, MutexGuard},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, oneshot},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    Counters, StoredAt, add, lock,
    spool::{Chunk, Group, LaneId, LaneInfo, SpoolError, Store},
    stats::Failure,
};
use crate::backoff::Backoff;

/// A group takes no more requests beyond this, so that a commit takes a bounded time.
const GROUP_BYTES: u64 = 2 * 1024 * 1024;
/// How often a lasting failure is told again.
const REMINDER_INTERVAL: Duration = Duration::from_secs(60);

/// What the spool is asked to keep.
#[derive(Debug)]
pub(super) enum Request {
    Open {
        lane: LaneId,
        info: LaneInfo,
    },
    Append {
        lane: LaneId,
        chunk: Chunk,
        /// When a record with its messages is to go.
        due: Instant,
        /// To be told where the messages are in the stream: by their place in the chunk.
        receipts: Vec<(u64, oneshot::Sender<StoredAt>)>,
        /// Its room in memory, until it is in the spool.
        room: OwnedSemaphorePermit,
    },
    Close {
        lane: LaneId,
    },
    /// To be told when all messages until now are in Kinesis: those of a lane, or all.
    Flush {
        lane: Option<LaneId>,
        done: oneshot::Sender<Vec<oneshot::Receiver<()>>>,
    },
    /// The first `count` messages of a lane are in Kinesis, of which so many since the last time.
    Put {
        lane: LaneId,
        count: u64,
        messages: u64,
    },
    /// A lane has no messages and will get none.
    Finished {
        lane: LaneId,
    },
}

/// What is in the spool.
#[derive(Debug)]
pub(super) enum Committed {
    Opened { lane: LaneId, info: LaneInfo },
    Appended(Appended),
    Closed { lane: LaneId },
    Put { lane: LaneId, messages: u64 },
    Flush { lane: Option<LaneId>, done: oneshot::Sender<Vec<oneshot::Receiver<()>>> },
}

#[derive(Debug)]
pub(super) struct Appended {
    pub lane: LaneId,
    pub messages: u64,
    pub spooled_bytes: u64,
    pub due: Instant,
    /// By the place of the message in the lane.
    pub receipts: Vec<(u64, oneshot::Sender<StoredAt>)>,
}

/// Commits groups of requests until `stop` is cancelled; then the requests that are there, and ends.
pub(super) struct Committer {
    pub store: Arc<Store>,
    /// The time from one commit to the next: all that comes meanwhile shares one.
    pub delay: Duration,
    /// The place of the next message of each lane.
    pub next: HashMap<LaneId, u64>,
    /// Messages in the spool that Kinesis does not have, as far as the spool knows.
    pub waiting: u64,
    /// A failure that lasts.
    pub failing: Option<Failing>,
    pub requests: mpsc::UnboundedReceiver<Request>,
    pub committed: mpsc::UnboundedSender<Committed>,
    pub counters: Arc<Counters>,
    pub stop: CancellationToken,
}

/// Since when the spool takes nothing, or not everything.
pub(super) struct Failing {
    began: Instant,
    remind_at: Instant,
}

impl Committer {
    pub(super) async fn run(mut self) {
        let mut next_commit = Instant::now();
        let mut gathered = Gathered::default();
        loop {
            if gathered.is_empty() {
                let first = tokio::select! {
                    biased;
                    request = self.requests.recv() => request,
                    () = self.stop.cancelled() => self.requests.try_recv().ok(),
                };
                let Some(first) = first else { return };
                self.gather(first, &mut gathered);
            }
            tokio::time::sleep_until(next_commit).await;
            next_commit = Instant::now() + self.delay;
            while gathered.bytes < GROUP_BYTES
                && let Ok(request) = self.requests.try_recv()
            {
                self.gather(request, &mut gathered);
            }
            let Some(later) = self.commit(gathered).await else { return };
            gathered = later;
        }
    }

    fn gather(&mut self, request: Request, gathered: &mut Gathered) {
        let Gathered { group, committed, rooms, .. } = gathered;
        match request {
            Request::Open { lane, info } => {
                group.opened.push((lane, info.clone()));
                committed.push(Committed::Opened { lane, info });
            }
            Request::Append { lane, chunk, due, receipts, room } => {
                let next = self.next.entry(lane).or_default();
                let receipts = receipts.into_iter().map(|(n, receipt)| (*next + n, receipt));
                committed.push(Committed::Appended(Appended {
                    lane,
                    messages: chunk.messages(),
                    spooled_bytes: chunk.spooled_bytes(),
                    due,
                    receipts: receipts.collect(),
                }));
                rooms.push(room);
                gathered.bytes += chunk.spooled_bytes();
                let first = *next;
                *next += chunk.messages();
                gathered.add(lane, first, chunk);
            }
            Request::Close { lane } => committed.push(Committed::Closed { lane }),
            Request::Flush { lane, done } => committed.push(Committed::Flush { lane, done }),
            Request::Put { lane, count, messages } => {
                group.put.insert(lane, count);
                committed.push(Committed::Put { lane, messages });
            }
            Request::Finished { lane } => {
                self.next.remove(&lane);
                group.put.remove(&lane);
                group.finished.push(lane);
            }
        }
    }

    /// Tries until all of it is in the spool. Meanwhile nothing more is read from the sockets, and TCP
    /// pushes back; but what Kinesis has is removed, for that may be what makes room. Gives what came
    /// meanwhile; `None` if the producer was stopped before.
    async fn commit(&mut self, gathered: Gathered) -> Option<Gathered> {
        let (mut group, mut committed, rooms) = gathered.finish();
        let mut later = Gathered::default();
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        loop {
            let error = match self.try_commit(&mut group).await {
                Ok(()) => break,
                Err(error) => error,
            };
            self.failed(&error);
            let retry_at = Instant::now() + backoff.next_wait();
            loop {
                if self.remove(&mut group, &mut committed, &mut later).await && self.waiting == 0 {
                    break;
                }
                tokio::select! {
                    biased;
                    () = self.stop.cancelled() => {
                        tracing::error!("{error}; the producer stops, and the last messages are lost");
                        return None;
                    }
                    () = tokio::time::sleep_until(retry_at) => break,
                    // What is received has its room in memory.
                    Some(request) = self.requests.recv() => self.gather(request, &mut later),
                }
            }
        }
        // It may just have taken the last room.
        if self.failing.is_some()
            && self.store.hold_reserve().is_ok()
            && let (Some(Failing { began, .. }), Some(Failure { failures, .. })) =
                (self.failing.take(), self.failure().take())
        {
            tracing::info!(
                failures,
                "the spool works again after {:.1} s",
                began.elapsed().as_secs_f64()
            );
        }
        drop(rooms);
        self.tell(committed);
        Some(later)
    }

    /// Removes what Kinesis has. Tells whether there was something, and it is done.
    async fn remove(
        &mut self,
        group: &mut Group,
        committed: &mut Vec<Committed>,
        later: &mut Gathered,
    ) -> bool {
        let mut removals = Group::default();
        for put in [&mut group.put, &mut later.group.put] {
            removals.put.append(put);
        }
        if removals.is_empty() {
            return false;
        }
        if self.try_commit(&mut removals).await.is_err() {
            group.put = removals.put;
            return false;
        }
        let put = |event: &mut Committed| matches!(event, Committed::Put { .. });
        self.tell(committed.extract_if(.., put));
        self.tell(later.committed.extract_if(.., put));
        true
    }

    /// Tells whoever puts what is in the spool. It may have ended.
    fn tell(&mut self, committed: impl IntoIterator<Item = Committed>) {
        add(&self.counters.commits, 1);
        for event in committed {
            match &event {
                Committed::Appended(appended) => self.waiting += appended.messages,
                Committed::Put { messages, .. } => self.waiting -= messages,
                _ => {}
            }
            let _ = self.committed.send(event);
        }
    }

    fn failed(&mut self, error: &SpoolError) {
        self.failure().get_or_insert_with(Failure::new).again(error.to_string());
        let now = Instant::now();
        let failing = self.failing.get_or_insert(Failing { began: now, remind_at: now });
        if now >= failing.remind_at {
            failing.remind_at = now + REMINDER_INTERVAL;
            tracing::error!(
                "{error}; no connection is read until it works again, and it is tried again"
            );
        }
    }

    fn failure(&self) -> MutexGuard<'_, Option<Failure>> {
        lock(&self.counters.spool_failure)
    }

    async fn try_commit(&self, group: &mut Group) -> Result<(), SpoolError> {
        if group.is_empty() {
            return Ok(());
        }
        if let Store::Memory(_) = &*self.store {
            return self.store.commit(group);
        }
        let (store, shared) = (self.store.clone(), Arc::new(std::mem::take(group)));
        let lent = shared.clone();
        // What is added may take the last room only if nothing is left to be removed.
        let reserve_first = lent.adds() && self.waiting > 0;
        let committing = tokio::task::spawn_blocking(move || {
            let reserved = if reserve_first { store.hold_reserve() } else { Ok(()) };
            reserved.and_then(|()| store.commit(&lent)).inspect_err(|_| store.release_reserve())
        });
        let committed = committing.await;
        *group = Arc::unwrap_or_clone(shared);
        match committed {
            Ok(result) => result,
            Err(error) => Err(SpoolError::Failed { reason: error.to_string() }),
        }
    }
}

#[derive(Default)]
struct Gathered {
    group: Group,
    /// The last chunk of each lane, which may take more.
    open: BTreeMap<LaneId, (u64, Chunk)>,
    committed: Vec<Committed>,
    rooms: Vec<OwnedSemaphorePermit>,
    bytes: u64,
}

impl Gathered {
    fn is_empty(&self) -> bool {
        self.group.is_empty() && self.open.is_empty() && self.committed.is_empty()
    }

    fn add(&mut self, lane: LaneId, first: u64, chunk: Chunk) {
        if let Some((_, open)) = self.open.get_mut(&lane)
            && open.append(&chunk)
        {
            return;
        }
        if let Some((first, full)) = self.open.insert(lane, (first, chunk)) {
            self.group.append(lane, first, full);
        }
    }

    fn finish(mut self) -> (Group, Vec<Committed>, Vec<OwnedSemaphorePermit>) {
        for (lane, (first, chunk)) in self.open {
            self.group.append(lane, first, chunk);
        }
        (self.group, self.committed, self.rooms)
    }
}
