//! What has been received and is not yet in Kinesis.
//!
//! On disk it is a redb database, one file. redb was chosen over fjall, the other well-kept store in Rust:
//! its format has been stable since 2023; a commit is one fsync, and is there as a whole or not at all,
//! because nothing is written in place (with a log-structured store, what `persist` did before a crash
//! depends on its mode); it needs no thread and no memory but the cache that it is given, where fjall keeps
//! tables of tens of megabytes and compacts deleted messages away in the background; it locks its file;
//! it depends on no other crate; and its storage can be replaced, so that the tests fill the disk and cut
//! the power. What it costs: the file does not shrink, but is used again.
//!
//! Messages are stored by the chunk, which is what one commit brought of one lane, so that the tree is
//! walked once a chunk and not once a message.

mod disk;

use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    ops::ControlFlow,
    path::PathBuf,
    sync::{Mutex, MutexGuard},
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub(super) use disk::Disk;

pub(super) type LaneId = u64;

/// Where messages wait for Kinesis.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Spool {
    /// In a directory of the user's or the service's state, one for each stream:
    /// `$STATE_DIRECTORY/spool/STREAM` (which systemd sets), else
    /// `$XDG_STATE_HOME/tramline/spool/STREAM`, else `~/.local/state/tramline/spool/STREAM`, else
    /// `/var/lib/tramline/spool/STREAM`.
    #[default]
    State,
    /// In this directory.
    Directory(PathBuf),
    /// In memory: what waits there is lost when the process ends.
    Memory,
}

impl Spool {
    /// The directory for a stream; `None` in memory.
    pub fn directory(&self, stream: &str) -> Option<PathBuf> {
        self.directory_in(stream, |variable| std::env::var_os(variable).map(PathBuf::from))
    }

    fn directory_in(
        &self,
        stream: &str,
        variable: impl Fn(&str) -> Option<PathBuf>,
    ) -> Option<PathBuf> {
        let absolute = |name: &str| variable(name).filter(|path| path.is_absolute());
        match self {
            Self::Memory => None,
            Self::Directory(directory) => Some(directory.clone()),
            Self::State => {
                let state = absolute("STATE_DIRECTORY")
                    .or_else(|| Some(absolute("XDG_STATE_HOME")?.join("tramline")))
                    .or_else(|| Some(absolute("HOME")?.join(".local/state/tramline")))
                    .unwrap_or_else(|| PathBuf::from("/var/lib/tramline"));
                Some(state.join("spool").join(stream))
            }
        }
    }
}

/// Why the spool cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpoolError {
    /// Another process has it.
    #[error(
        "the spool {directory} is in use by another process; stop that, or give this one a spool of its \
         own"
    )]
    InUse {
        /// The directory.
        directory: PathBuf,
    },
    /// It holds messages for another stream.
    #[error(
        "the spool {directory} holds messages for the stream {holds}, not for {stream}; give each stream \
         a spool of its own"
    )]
    OtherStream {
        /// The directory.
        directory: PathBuf,
        /// What it holds messages for.
        holds: String,
        /// What was asked for.
        stream: String,
    },
    /// The system failed to read or to write.
    #[error("the spool {directory} cannot be used: {source}; see to the disk and its permissions")]
    Io {
        /// The directory.
        directory: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It broke off.
    #[error("the spool failed: {reason}")]
    Failed {
        /// How.
        reason: String,
    },
    /// What is stored makes no sense.
    #[error("the spool {directory} is damaged: {reason}")]
    Damaged {
        /// The directory.
        directory: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

/// What the messages of a lane have in common.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LaneInfo {
    pub partition_key: String,
    /// The CloudEvents' source.
    pub source: String,
    pub source_ip: Option<IpAddr>,
}

/// A message in the spool. Its event's id and time follow from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Spooled<'a> {
    pub received_at: Timestamp,
    pub raw: &'a [u8],
}

/// Length and time of a message in a chunk.
const HEAD_BYTES: usize = 4 + 8;
/// How many messages a chunk holds, before them.
const COUNT_BYTES: usize = 4;
/// A chunk takes no further message beyond this: a record is formed of many chunks, and reading part of
/// one means to read all of it.
const CHUNK_BYTES: usize = 64 * 1024;

impl Spooled<'_> {
    /// What it takes in the spool.
    pub(super) fn spooled_bytes(&self) -> u64 {
        (HEAD_BYTES + self.raw.len()) as u64
    }
}

/// Messages of one lane that follow each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chunk {
    bytes: Vec<u8>,
    messages: u32,
}

impl Chunk {
    pub(super) fn new() -> Self {
        Self { bytes: vec![0; COUNT_BYTES], messages: 0 }
    }

    pub(super) fn push(&mut self, message: &Spooled<'_>) {
        // A message is at most as long as the framer allows.
        let length = u32::try_from(message.raw.len()).unwrap_or(u32::MAX);
        self.bytes.extend_from_slice(&length.to_le_bytes());
        self.bytes.extend_from_slice(&message.received_at.as_microsecond().to_le_bytes());
        self.bytes.extend_from_slice(&message.raw[..length as usize]);
        self.messages += 1;
    }

    /// Adds what another chunk holds, unless this one is full.
    pub(super) fn append(&mut self, other: &Self) -> bool {
        if self.is_full() {
            return false;
        }
        self.bytes.extend_from_slice(&other.bytes[COUNT_BYTES..]);
        self.messages += other.messages;
        true
    }

    pub(super) fn is_full(&self) -> bool {
        self.bytes.len() >= CHUNK_BYTES
    }

    pub(super) fn messages(&self) -> u64 {
        u64::from(self.messages)
    }

    /// What the messages take in the spool.
    pub(super) fn spooled_bytes(&self) -> u64 {
        (self.bytes.len() - COUNT_BYTES) as u64
    }

    fn into_stored(mut self) -> Vec<u8> {
        self.bytes[..COUNT_BYTES].copy_from_slice(&self.messages.to_le_bytes());
        self.bytes
    }
}

/// How many messages a stored chunk holds; `None` if it is none.
fn stored_count(chunk: &[u8]) -> Option<u64> {
    Some(u64::from(u32::from_le_bytes(*chunk.first_chunk()?)))
}

/// The messages of a stored chunk; `None` in place of one that makes no sense, and nothing after it.
fn stored_messages(chunk: &[u8]) -> impl Iterator<Item = Option<Spooled<'_>>> {
    let mut rest = chunk.get(COUNT_BYTES..);
    std::iter::from_fn(move || {
        let bytes = rest.take()?;
        if bytes.is_empty() {
            return None;
        }
        let mut next = || {
            let (length, bytes) = bytes.split_first_chunk()?;
            let (micros, bytes) = bytes.split_first_chunk()?;
            let (raw, after) = bytes.split_at_checked(u32::from_le_bytes(*length) as usize)?;
            let received_at = Timestamp::from_microsecond(i64::from_le_bytes(*micros)).ok()?;
            rest = Some(after);
            Some(Spooled { received_at, raw })
        };
        Some(next())
    })
}

/// Changes that become durable together.
#[derive(Debug, Clone, Default)]
pub(super) struct Group {
    pub opened: Vec<(LaneId, LaneInfo)>,
    /// Chunks, by their lane and the place of their first message in it.
    pub appended: BTreeMap<(LaneId, u64), Vec<u8>>,
    /// How many messages of a lane are in Kinesis, from its first one.
    pub put: BTreeMap<LaneId, u64>,
    /// Lanes that will have no more messages, and have none left.
    pub finished: Vec<LaneId>,
}

impl Group {
    pub(super) fn is_empty(&self) -> bool {
        self.opened.is_empty()
            && self.appended.is_empty()
            && self.put.is_empty()
            && self.finished.is_empty()
    }

    pub(super) fn append(&mut self, lane: LaneId, first: u64, chunk: Chunk) {
        self.appended.insert((lane, first), chunk.into_stored());
    }
}

/// A lane that an earlier process left behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Left {
    pub lane: LaneId,
    pub info: LaneInfo,
    /// The place of the first message that is not in Kinesis.
    pub first: u64,
    pub messages: u64,
    pub spooled_bytes: u64,
    pub oldest: Option<Timestamp>,
}

/// Takes the next message, and tells whether to go on.
type Visit<'a> = dyn FnMut(&Spooled<'_>) -> ControlFlow<()> + 'a;

#[derive(Debug)]
pub(super) enum Store {
    Memory(Mutex<BTreeMap<(LaneId, u64), Vec<u8>>>),
    Disk(Disk),
}

impl Store {
    pub(super) fn memory() -> Self {
        Self::Memory(Mutex::default())
    }

    /// Makes the changes durable, all or none. They may be made again.
    pub(super) fn commit(&self, group: &Group) -> Result<(), SpoolError> {
        match self {
            Self::Disk(disk) => disk.commit(group),
            Self::Memory(chunks) => {
                let mut chunks = lock(chunks);
                chunks.extend(group.appended.iter().map(|(at, chunk)| (*at, chunk.clone())));
                for (lane, put) in &group.put {
                    while let Some((at, chunk)) = chunks.range((*lane, 0)..=(*lane, *put)).next()
                        && at.1 + stored_count(chunk).unwrap_or(0) <= *put
                    {
                        let at = *at;
                        chunks.remove(&at);
                    }
                }
                Ok(())
            }
        }
    }

    /// When the message at a place of a lane was received; `None` if it cannot be read.
    pub(super) fn received_at(&self, lane: LaneId, place: u64) -> Option<Timestamp> {
        let mut found = None;
        let read = self.read(lane, place, &mut |message| {
            found = Some(message.received_at);
            ControlFlow::Break(())
        });
        read.ok().and(found)
    }

    /// Visits the messages of a lane in their order, from a place on.
    pub(super) fn read(
        &self,
        lane: LaneId,
        from: u64,
        visit: &mut Visit<'_>,
    ) -> Result<(), SpoolError> {
        match self {
            Self::Disk(disk) => disk.read(lane, from, visit),
            Self::Memory(chunks) => {
                let chunks = lock(chunks);
                let before = chunks.range((lane, 0)..=(lane, from)).next_back();
                let start = before.map_or(from, |((_, first), _)| *first);
                for ((_, first), chunk) in chunks.range((lane, start)..=(lane, u64::MAX)) {
                    if visit_chunk(*first, chunk, from, visit) == Some(ControlFlow::Break(())) {
                        break;
                    }
                }
                Ok(())
            }
        }
    }
}

/// `None` if the chunk makes no sense.
fn visit_chunk(
    first: u64,
    chunk: &[u8],
    from: u64,
    visit: &mut Visit<'_>,
) -> Option<ControlFlow<()>> {
    for (place, message) in (first..).zip(stored_messages(chunk)) {
        let message = message?;
        if place >= from && visit(&message).is_break() {
            return Some(ControlFlow::Break(()));
        }
    }
    Some(ControlFlow::Continue(()))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poison| poison.into_inner())
}

#[cfg(test)]
pub(super) mod tests;
