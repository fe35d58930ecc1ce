//! A state document that this worker has taken over.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use jiff::Timestamp;
use tokio::time::{Instant, sleep, sleep_until};

use super::{
    Move, StateError, Writer,
    document::{Document, Flaw, LIMIT_BYTES, Saved, Stamp, WriteId},
    file::StateFile,
    s3::S3Object,
};
use crate::{backoff::Backoff, shard::ShardId};

/// How often a write is tried when the document turns out to be another than the one that was seen.
const ATTEMPTS: u32 = 20;
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_LIMIT: Duration = Duration::from_secs(1);
/// After a write, the document is left alone for this many times as long as the write took: who wants to
/// take it over has to read and write it in between. This is also what keeps many shards that share a
/// document from writing it all the time.
const REST: u32 = 2;
const REST_LIMIT: Duration = Duration::from_secs(5);

/// Where a document is.
#[derive(Debug)]
pub(super) enum Object {
    S3(S3Object),
    File(StateFile),
}

/// A document as it was read.
#[derive(Debug)]
pub(super) struct Found {
    pub bytes: Bytes,
    pub tag: Tag,
}

/// Tells one content of a document from the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tag(pub String);

impl Object {
    fn name(&self) -> &str {
        match self {
            Self::S3(object) => object.name(),
            Self::File(file) => file.name(),
        }
    }

    async fn read(&self) -> Result<Option<Found>, StateError> {
        match self {
            Self::S3(object) => object.read().await,
            Self::File(file) => file.read().await,
        }
    }

    /// Reads as one who does not mean to write.
    async fn peek(&self) -> Result<Option<Found>, StateError> {
        match self {
            Self::S3(object) => object.read().await,
            Self::File(file) => file.peek().await,
        }
    }

    async fn write(&self, bytes: Bytes, seen: Option<&Tag>) -> Result<Option<Tag>, StateError> {
        match self {
            Self::S3(object) => object.write(bytes, seen).await,
            Self::File(file) => file.write(bytes, seen).await,
        }
    }
}

/// Who writes: the same for all documents of a worker.
#[derive(Debug)]
pub(super) struct Signature {
    writer: Writer,
    /// Drawn at random: our own writes are known by it.
    process: u64,
    /// How many documents were taken over.
    tenures: AtomicU64,
}

impl Signature {
    pub fn new(writer: Writer) -> Self {
        Self { writer, process: rand::random(), tenures: AtomicU64::new(0) }
    }

    pub fn worker(&self) -> &str {
        &self.writer.worker
    }
}

/// A document that this worker has taken over.
///
/// Every write is on the condition that the document is still the one that we saw. If a write is refused,
/// the document is read again. If its last write is one of ours, whose answer got lost or was not waited
/// for, we write on top of it. If it is another's, the document was taken over from us, and we write it
/// no more (P4).
///
/// A change goes into `content` at once and stays there if the write fails: the next write carries it.
/// Changes that are made while a write is on its way share the next one.
#[derive(Debug)]
pub(super) struct HeldDocument {
    object: Object,
    signature: Arc<Signature>,
    tenure: u64,
    content: Mutex<Content>,
    /// One write at a time.
    stored: tokio::sync::Mutex<Stored>,
}

/// What the document is to be.
#[derive(Debug)]
struct Content {
    place: String,
    document: Document,
    /// Who wrote it before us.
    taken_from: Option<Stamp>,
    /// The shards that this worker has opened.
    opened: BTreeSet<ShardId>,
    /// Raised with every change.
    version: u64,
}

/// What is known of the document where it is kept.
#[derive(Debug)]
struct Stored {
    /// `None` if there is none.
    tag: Option<Tag>,
    /// How many writes have begun.
    begun: u64,
    /// The last of them that is known to have got there.
    acknowledged: u64,
    /// When it may be written next.
    rests_until: Instant,
    /// The version that the last write carried, and what came of it.
    last: (u64, Result<(), StateError>),
    /// Why it is written no more.
    lost: Option<StateError>,
}

impl HeldDocument {
    pub fn new(object: Object, signature: Arc<Signature>) -> Self {
        let tenure = signature.tenures.fetch_add(1, Ordering::Relaxed);
        let Writer { application, stream, worker } = signature.writer.clone();
        let write = WriteId { process: signature.process, tenure, number: 0 };
        let stamp = Stamp { writer: worker, write, at: Timestamp::now() };
        let content = Content {
            place: object.name().to_owned(),
            document: Document { application, stream, stamp, shards: BTreeMap::new() },
            taken_from: None,
            opened: BTreeSet::new(),
            version: 0,
        };
        let stored = Stored {
            tag: None,
            begun: 0,
            acknowledged: 0,
            rests_until: Instant::now(),
            last: (0, Ok(())),
            lost: None,
        };
        Self { object, signature, tenure, content: content.into(), stored: stored.into() }
    }

    /// Reads the document and writes it back under our name: who wrote it before is refused from now on.
    /// Opens a shard in the same write, if there is one to open.
    pub async fn take_over(&self, open: Option<(&ShardId, u64)>) -> Result<(), StateError> {
        let mut stored = self.stored.lock().await;
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_LIMIT);
        for _ in 0..ATTEMPTS {
            let (found, tag) = self.read().await?.unzip();
            stored.tag = tag;
            let was_ours = found
                .as_ref()
                .is_some_and(|found| found.stamp.write.process == self.signature.process);
            self.content().replace(found);
            if open.is_none() {
                // Its leases are made anew by each process, from what has a checkpoint.
                self.content().forget_what_was_only_opened();
            }
            if let Some((shard, fence)) = open {
                self.content().change(|content| content.open(shard, fence, was_ours))?;
            }
            let (version, document) = self.snapshot();
            if self.put(document, &mut stored).await? {
                stored.last = (version, Ok(()));
                return Ok(());
            }
            // Its owner has just written it: once more, with what is there now.
            sleep(backoff.next_wait()).await;
        }
        Err(self.contended())
    }

    /// Opens a shard of a document that was taken over.
    pub async fn open(&self, shard: &ShardId, fence: u64) -> Result<(), StateError> {
        self.change(|content| {
            let was_ours = content.opened.contains(shard);
            content.open(shard, fence, was_ours)
        })
        .await
    }

    /// Stores a shard that was opened with the lease counter in `saved`.
    pub async fn save(&self, shard: &ShardId, saved: Saved) -> Result<(), StateError> {
        self.change(|content| content.save(shard, saved)).await
    }

    /// Reads the document, and takes nothing over.
    pub async fn look(&self) -> Result<Option<Document>, StateError> {
        match self.object.peek().await? {
            Some(found) => self.decode(found).await.map(|(document, _)| Some(document)),
            None => Ok(None),
        }
    }

    /// Moves checkpoints of a document that was taken over.
    pub async fn reset(&self, moves: &[Move]) -> Result<(), StateError> {
        self.change(|content| content.reset(moves)).await
    }

    /// Moves checkpoints if the document is still the one that was `seen`, by one write: whoever writes it
    /// now is not written over, and if nobody does, its next writer finds the change.
    pub async fn reset_seen(&self, seen: Option<&Stamp>, moves: &[Move]) -> Result<(), StateError> {
        let mut stored = self.stored.lock().await;
        let (found, tag) = self.read().await?.unzip();
        stored.tag = tag;
        if found.as_ref().map(|found| &found.stamp) != seen {
            return Err(self.written(found));
        }
        self.content().replace(found);
        self.content().change(|content| content.reset(moves))?;
        let (_, document) = self.snapshot();
        match self.put(document, &mut stored).await? {
            true => Ok(()),
            false => Err(self.written(self.read().await?.map(|(document, _)| document))),
        }
    }

    /// What is stored of each shard, or about to be.
    pub fn shards(&self) -> BTreeMap<ShardId, Saved> {
        self.content().document.shards.clone()
    }

    async fn change(
        &self,
        change: impl FnOnce(&mut Content) -> Result<(), StateError>,
    ) -> Result<(), StateError> {
        let version = self.content().change(change)?;
        let mut stored = self.stored.lock().await;
        if let Some(lost) = &stored.lost {
            return Err(lost.clone());
        }
        // Else a write that began since has carried it.
        if stored.last.0 < version {
            sleep_until(stored.rests_until).await;
            let began = Instant::now();
            let (version, document) = self.snapshot();
            stored.last = (version, self.write(document, &mut stored).await);
            stored.rests_until = Instant::now() + (REST * began.elapsed()).min(REST_LIMIT);
        }
        stored.last.1.clone()
    }

    /// Writes until it is written or refused for good.
    async fn write(&self, document: Document, stored: &mut Stored) -> Result<(), StateError> {
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_LIMIT);
        for _ in 0..ATTEMPTS {
            if self.put(document.clone(), stored).await? {
                return Ok(());
            }
            match self.read().await? {
                Some((found, tag)) => match self.own_write(&found.stamp, stored.acknowledged) {
                    Some(number) => {
                        (stored.tag, stored.acknowledged) = (Some(tag), number);
                        if number == stored.begun {
                            return Ok(());
                        }
                    }
                    None => {
                        let Stamp { writer, at, .. } = found.stamp;
                        let place = self.place().to_owned();
                        let lost = StateError::OtherWriter { place, writer, at };
                        stored.lost = Some(lost.clone());
                        return Err(lost);
                    }
                },
                None => {
                    if stored.tag.take().is_some() {
                        tracing::warn!(
                            "state {}: it was deleted under this worker, which writes it again",
                            self.place()
                        );
                    }
                }
            }
            sleep(backoff.next_wait()).await;
        }
        Err(self.contended())
    }

    /// One attempt. `false` if the document is not the one that we saw.
    async fn put(&self, document: Document, stored: &mut Stored) -> Result<bool, StateError> {
        stored.begun += 1;
        let write = WriteId { number: stored.begun, ..document.stamp.write };
        let stamp = Stamp { write, at: Timestamp::now(), ..document.stamp };
        let document = Document { stamp, ..document };
        let bytes = blocking(move || Bytes::from(document.encode())).await;
        let written = self.object.write(bytes, stored.tag.as_ref()).await?;
        if let Some(tag) = written {
            (stored.tag, stored.acknowledged) = (Some(tag), stored.begun);
            return Ok(true);
        }
        Ok(false)
    }

    /// The number of a write whose answer we did not get. None of another worker's, nor one that is older
    /// than what we know to be stored: that was put back by somebody.
    fn own_write(&self, stamp: &Stamp, acknowledged: u64) -> Option<u64> {
        let WriteId { process, tenure, number } = stamp.write;
        let ours = process == self.signature.process && tenure == self.tenure;
        (ours && number > acknowledged).then_some(number)
    }

    async fn read(&self) -> Result<Option<(Document, Tag)>, StateError> {
        match self.object.read().await? {
            Some(found) => self.decode(found).await.map(Some),
            None => Ok(None),
        }
    }

    async fn decode(&self, found: Found) -> Result<(Document, Tag), StateError> {
        let Found { bytes, tag } = found;
        let decoded = blocking(move || Document::decode(&bytes)).await;
        let place = || self.place().to_owned();
        let document = decoded.map_err(|flaw| match flaw {
            Flaw::Damaged(reason) => StateError::Damaged { place: place(), reason },
            Flaw::Version(version) => StateError::Version { place: place(), version },
        })?;
        let Document { application, stream, .. } = &document;
        let Writer { application: our_application, stream: our_stream, .. } =
            &self.signature.writer;
        if (application, stream) != (our_application, our_stream) {
            return Err(StateError::Foreign {
                place: place(),
                application: application.clone(),
                stream: stream.clone(),
            });
        }
        Ok((document, tag))
    }

    fn snapshot(&self) -> (u64, Document) {
        let content = self.content();
        (content.version, content.document.clone())
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    pub fn place(&self) -> &str {
        self.object.name()
    }

    fn written(&self, found: Option<Document>) -> StateError {
        let writer = found.map(|found| (found.stamp.writer, found.stamp.at));
        StateError::Written { place: self.place().to_owned(), writer }
    }

    fn contended(&self) -> StateError {
        StateError::Contended { place: self.place().to_owned(), attempts: ATTEMPTS }
    }
}

impl Content {
    /// Takes what was found where the document is kept.
    fn replace(&mut self, found: Option<Document>) {
        (self.document.shards, self.taken_from) = match found {
            Some(Document { shards, stamp, .. }) => (shards, Some(stamp)),
            None => (BTreeMap::new(), None),
        };
    }

    fn forget_what_was_only_opened(&mut self) {
        self.document.shards.retain(|_, saved| saved.checkpoint.is_some());
    }

    /// Makes a change and gives its version; undoes it if the document would be too large.
    fn change(
        &mut self,
        change: impl FnOnce(&mut Self) -> Result<(), StateError>,
    ) -> Result<u64, StateError> {
        let before = self.document.shards.clone();
        change(self)?;
        let bytes = self.document.len_bytes();
        if bytes > LIMIT_BYTES {
            self.document.shards = before;
            return Err(StateError::TooLarge { place: self.place.clone(), bytes });
        }
        self.version += 1;
        Ok(self.version)
    }

    /// Lease counters of a shard only grow, so a lower one belongs to an earlier owner, and so does the
    /// same one unless this worker had it.
    fn open(&mut self, shard: &ShardId, fence: u64, was_ours: bool) -> Result<(), StateError> {
        if let Some(Saved { lease_counter: stored, .. }) = self.document.shards.get(shard)
            && (*stored > fence || (*stored == fence && !was_ours))
        {
            return Err(self.fenced(shard, *stored, fence));
        }
        self.document.shards.entry(shard.clone()).or_default().lease_counter = fence;
        self.opened.insert(shard.clone());
        Ok(())
    }

    fn save(&mut self, shard: &ShardId, saved: Saved) -> Result<(), StateError> {
        let fence = saved.lease_counter;
        match self.document.shards.get_mut(shard) {
            Some(stored) if stored.lease_counter == fence => *stored = saved,
            stored => {
                let stored = stored.map_or(0, |stored| stored.lease_counter);
                return Err(self.fenced(shard, stored, fence));
            }
        }
        Ok(())
    }

    /// The one change that moves a checkpoint back. The state belongs to the old one, and goes with it.
    fn reset(&mut self, moves: &[Move]) -> Result<(), StateError> {
        for Move { shard, checkpoint, start_at } in moves {
            let saved = self.document.shards.entry(shard.clone()).or_default();
            let lease_counter = saved.lease_counter;
            let (checkpoint, start_at) = (Some(checkpoint.clone()), *start_at);
            *saved = Saved { checkpoint, start_at, lease_counter, state: None };
        }
        Ok(())
    }

    fn fenced(&self, shard: &ShardId, stored: u64, ours: u64) -> StateError {
        let Stamp { writer, at, .. } =
            self.taken_from.as_ref().unwrap_or(&self.document.stamp).clone();
        let (place, shard) = (self.place.clone(), shard.clone());
        StateError::Fenced { place, shard, writer, at, stored, ours }
    }
}

/// Runs what would hold up other tasks: file calls, and sums over many bytes.
pub(super) async fn blocking<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(f).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime shuts down, and drops us.
            Err(_) => std::future::pending().await,
        },
    }
}
