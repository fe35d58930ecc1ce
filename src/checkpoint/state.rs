//! Positions and handler state, kept together in S3 or in files.

use std::{collections::BTreeMap, io, sync::Arc};

use aws_types::SdkConfig;
use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use jiff::Timestamp;
use tokio::sync::OnceCell;

use super::{
    Checkpoint, Checkpoints, Saved,
    document::{Document, Stamp},
    file::StateFile,
    held::{HeldDocument, Object, Signature},
    place,
    s3::{self, S3Object},
};
use crate::{aws::AwsError, shard::ShardId};

/// How many documents are read at a time by one who only looks.
const CONCURRENT_LOOKS: usize = 8;

/// Who writes state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Writer {
    /// The application that the positions are of.
    pub application: String,
    /// The stream that they are in.
    pub stream: String,
    /// The worker's id.
    pub worker: String,
}

/// Keeps positions and handler state in an object or a file, or in one for each shard.
///
/// One worker writes a document at a time. In S3 the one that comes takes it over, and the one that was
/// there is refused from then on. A file is locked, and the one that comes is refused while the other
/// has it. A document for each shard is taken over when the shard is opened, by the higher lease counter;
/// one for all shards when the store is first used.
///
/// A call that fails is not repeated here, beyond what the AWS SDK does: see
/// [`StateError::is_transient`].
#[derive(Debug)]
pub struct StateStore {
    origin: Origin,
    signature: Arc<Signature>,
    /// The document, if there is one for all shards, and whether it was taken over.
    one: Option<(Arc<HeldDocument>, OnceCell<()>)>,
}

/// A document as one sees it who does not write it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateDocument {
    /// Where it is.
    pub place: String,
    /// What is stored of each shard.
    pub shards: BTreeMap<ShardId, Saved>,
    stamp: Stamp,
}

/// Where reading of a shard is to go on, by somebody's will.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Move {
    /// The shard.
    pub shard: ShardId,
    /// Its new checkpoint.
    pub checkpoint: Checkpoint,
    /// The point in time that belongs to `LATEST` and `AT_TIMESTAMP`.
    pub start_at: Option<Timestamp>,
}

/// Where documents are.
#[derive(Debug)]
enum Origin {
    S3 { client: aws_sdk_s3::Client, bucket: String, key: String },
    File { path: String },
}

/// The state of one shard, which this worker has opened. Dropped, it lets go of the shard's document: a
/// file of the shard's own is unlocked.
#[derive(Debug)]
pub struct ShardState {
    document: Arc<HeldDocument>,
    shard: ShardId,
    fence: u64,
}

impl StateStore {
    /// The store at a place; `None` if that is the lease table, which is no store of state. Nothing is
    /// read yet.
    pub fn new(
        config: &SdkConfig,
        place: &Checkpoints,
        writer: Writer,
    ) -> Result<Option<Self>, StateError> {
        place.check()?;
        let origin = match place.clone() {
            Checkpoints::LeaseTable => return Ok(None),
            Checkpoints::S3 { bucket, key } => {
                Origin::S3 { client: s3::client(config), bucket, key }
            }
            Checkpoints::File { path } => Origin::File { path: path.to_string_lossy().into() },
        };
        let signature = Arc::new(Signature::new(writer));
        let one = (!place.is_per_shard())
            .then(|| (origin.document(None, &signature).into(), OnceCell::new()));
        Ok(Some(Self { origin, signature, one }))
    }

    /// What is stored of every shard, where one document holds them all; takes it over if that has not
    /// been done. Where each shard has its own, nothing: a shard's comes from [`open`](Self::open).
    pub async fn load(&self) -> Result<BTreeMap<ShardId, Saved>, StateError> {
        let Some((document, taken_over)) = &self.one else { return Ok(BTreeMap::new()) };
        taken_over.get_or_try_init(|| document.take_over(None)).await?;
        Ok(document.shards())
    }

    /// Starts to keep a shard, and gives what is stored of it.
    ///
    /// `fence` is the lease's counter when this worker took it. Who comes with a lower one later is
    /// refused, and so is this worker if a higher one was here before ([`StateError::Fenced`]).
    pub async fn open(
        &self,
        shard: &ShardId,
        fence: u64,
    ) -> Result<(ShardState, Saved), StateError> {
        let document = match &self.one {
            Some((document, taken_over)) => {
                taken_over.get_or_try_init(|| document.take_over(None)).await?;
                document.open(shard, fence).await?;
                document.clone()
            }
            None => {
                let document = self.origin.document(Some(shard), &self.signature);
                document.take_over(Some((shard, fence))).await?;
                document.into()
            }
        };
        let saved = document.shards().remove(shard).unwrap_or_default();
        Ok((ShardState { document, shard: shard.clone(), fence }, saved))
    }

    /// Reads the documents that there are of these shards, and takes nothing over.
    pub async fn look<'a>(
        &self,
        shards: impl IntoIterator<Item = &'a ShardId>,
    ) -> Result<Vec<StateDocument>, StateError> {
        let documents: Vec<Arc<HeldDocument>> = match &self.one {
            Some((document, _)) => vec![document.clone()],
            None => {
                let of_shard = |shard| self.origin.document(Some(shard), &self.signature).into();
                shards.into_iter().map(of_shard).collect()
            }
        };
        let looks = documents.into_iter().map(async |document| {
            let found = document.look().await?;
            Ok(found.map(|Document { shards, stamp, .. }| {
                let place = document.place().to_owned();
                StateDocument { place, shards, stamp }
            }))
        });
        stream::iter(looks)
            .buffered(CONCURRENT_LOOKS)
            .try_filter_map(|found| std::future::ready(Ok(found)))
            .try_collect()
            .await
    }

    /// Moves checkpoints, also back, and drops the state that belonged to them: the one thing that moves
    /// one back, and only by somebody's will. Shard after shard as given, or in one write if one document
    /// holds them.
    ///
    /// A document that is no longer as it was `seen` is refused ([`StateError::Written`]), unless this
    /// store has taken it over. One that is not there needs no change where each shard has its own.
    pub async fn reset(&self, seen: &[StateDocument], moves: &[Move]) -> Result<(), StateError> {
        match &self.one {
            Some((document, taken_over)) if taken_over.initialized() => document.reset(moves).await,
            Some((document, _)) => {
                document.reset_seen(seen.first().map(|seen| &seen.stamp), moves).await
            }
            None => {
                for of_shard in moves {
                    let shard = &of_shard.shard;
                    let seen = seen.iter().find(|seen| seen.shards.contains_key(shard));
                    if let Some(seen) = seen {
                        let document = self.origin.document(Some(shard), &self.signature);
                        let moves = std::slice::from_ref(of_shard);
                        document.reset_seen(Some(&seen.stamp), moves).await?;
                    }
                }
                Ok(())
            }
        }
    }
}

impl StateDocument {
    /// The worker that wrote it last.
    pub fn writer(&self) -> &str {
        &self.stamp.writer
    }

    /// When that was, by the worker's clock, in whole milliseconds.
    pub fn written_at(&self) -> Timestamp {
        self.stamp.at
    }
}

impl ShardState {
    /// Stores how far the shard is finished, and the handler's state at that point, in one write. No state
    /// means that there is none: what was stored before is dropped.
    ///
    /// Where one document holds every shard, saves that are made at the same time share a write. After an
    /// error it may or may not have been written, and may still be: the next write carries it.
    pub async fn save(
        &self,
        checkpoint: &Checkpoint,
        start_at: Option<Timestamp>,
        state: Option<Bytes>,
    ) -> Result<(), StateError> {
        let checkpoint = Some(checkpoint.clone());
        let saved = Saved { checkpoint, start_at, lease_counter: self.fence, state };
        self.document.save(&self.shard, saved).await
    }
}

impl Origin {
    fn document(&self, shard: Option<&ShardId>, signature: &Arc<Signature>) -> HeldDocument {
        let object = match self {
            Self::S3 { client, bucket, key } => {
                let key = place::with_shard(key, shard);
                Object::S3(S3Object::new(client.clone(), bucket.clone(), key))
            }
            Self::File { path } => {
                let path = place::with_shard(path, shard);
                Object::File(StateFile::new(path.into(), signature.worker()))
            }
        };
        HeldDocument::new(object, signature.clone())
    }
}

/// Why state could not be read or written.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// A place that cannot be used.
    #[error("{place:?} cannot keep checkpoints: {advice}")]
    Place {
        /// The place.
        place: String,
        /// What to do.
        advice: &'static str,
    },
    /// The document was taken over by another worker, or somebody put another version there. This worker
    /// writes it no more.
    #[error(
        "state {place}: what is there now, by worker {writer} at {at}, is not what this worker stored \
         last: another worker took it over, or somebody put another version there; this worker stores \
         nothing there any more; if two workers are to run, give each a place of its own"
    )]
    OtherWriter {
        /// The document.
        place: String,
        /// The other worker.
        writer: String,
        /// When it wrote, by its clock.
        at: Timestamp,
    },
    /// The document was written since it was looked at.
    #[error(
        "state {place}: not reset, because it was written{} in the meantime; stop the worker that writes \
         it, and try again",
        writer.as_ref().map_or(String::new(), |(writer, at)| format!(" by worker {writer} at {at}"))
    )]
    Written {
        /// The document.
        place: String,
        /// By whom, and when by its clock; `None` if it is gone.
        writer: Option<(String, Timestamp)>,
    },
    /// A later owner of the shard's lease was here before.
    #[error(
        "state {place}: worker {writer} wrote shard {shard} at {at} with lease counter {stored}, and \
         this worker has {ours}: it is an earlier owner of the lease; if the leases were deleted and \
         made again, delete the document too, or move it away"
    )]
    Fenced {
        /// The document.
        place: String,
        /// The shard.
        shard: ShardId,
        /// The document's last writer.
        writer: String,
        /// When it wrote, by its clock.
        at: Timestamp,
        /// The lease counter in the document.
        stored: u64,
        /// This worker's.
        ours: u64,
    },
    /// Another process has the file locked.
    #[error("state {place}: locked by {holder}; stop it, or give this worker a file of its own")]
    Locked {
        /// The file.
        place: String,
        /// Who has it.
        holder: String,
    },
    /// The document was written by others again and again while this worker took it over.
    #[error("state {place}: it changed under each of {attempts} attempts to write it")]
    Contended {
        /// The document.
        place: String,
        /// How many.
        attempts: u32,
    },
    /// The document was cut short or changed, or is none.
    #[error(
        "state {place}: {reason}, so it is not used; put an earlier version back, or move it away: \
         the worker then reads from its start position, with new state"
    )]
    Damaged {
        /// The document.
        place: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A later version of Tramline wrote the document.
    #[error("state {place}: it has format {version}, which this version of Tramline does not know")]
    Version {
        /// The document.
        place: String,
        /// Its format.
        version: u64,
    },
    /// The document belongs to another application or stream.
    #[error(
        "state {place}: it belongs to application {application} and stream {stream}; give this worker \
         a place of its own"
    )]
    Foreign {
        /// The document.
        place: String,
        /// The application in it.
        application: String,
        /// The stream in it.
        stream: String,
    },
    /// The document is larger than 64 MiB.
    #[error(
        "state {place}: {bytes} bytes are more than the 64 MiB that fit; split the state by \
         shard, with {{shard}} in the key or the file's name, or keep it in a database and store \
         only its version here"
    )]
    TooLarge {
        /// The document.
        place: String,
        /// How large it is, or would be.
        bytes: usize,
    },
    /// The bucket cannot be used.
    #[error("state {place}: the bucket {bucket} {problem}")]
    Bucket {
        /// The document.
        place: String,
        /// The bucket.
        bucket: String,
        /// What is wrong with it, and what to do.
        problem: &'static str,
    },
    /// S3 failed or refused.
    #[error("state {place}: {source}")]
    S3 {
        /// The document.
        place: String,
        /// What S3 said.
        source: AwsError,
    },
    /// The file could not be used.
    #[error("state {place}: cannot {step} it: {said}{}", advice(*kind))]
    File {
        /// The file.
        place: String,
        /// What was tried.
        step: &'static str,
        /// The kind of error.
        kind: io::ErrorKind,
        /// What the system said.
        said: String,
    },
}

impl StateError {
    /// Whether the same call may succeed later without anyone doing anything.
    pub fn is_transient(&self) -> bool {
        use io::ErrorKind::*;
        match self {
            Self::Contended { .. } | Self::Locked { .. } => true,
            Self::S3 { source, .. } => source.is_transient(),
            Self::File { kind, .. } => {
                matches!(kind, Interrupted | ResourceBusy | StorageFull | QuotaExceeded | TimedOut)
            }
            _ => false,
        }
    }
}

fn advice(kind: io::ErrorKind) -> &'static str {
    match kind {
        io::ErrorKind::NotFound => "; make its folder",
        io::ErrorKind::PermissionDenied => {
            "; the worker must be allowed to read and write the file and its folder"
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; make room on the disk",
        _ => "",
    }
}
