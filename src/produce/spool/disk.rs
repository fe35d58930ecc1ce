use std::{
    fmt, fs, io,
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use redb::{
    Database, DatabaseError, ReadableDatabase as _, ReadableTable as _, StorageError,
    TableDefinition,
};

use super::{
    Group, LaneId, LaneInfo, Left, SpoolError, Spooled, Visit,
    reserve::{Reserve, ReserveFile},
    stored_count, visit_chunk,
};

/// Lanes that may have messages, with what their messages have in common, in JSON.
const LANES: TableDefinition<'_, LaneId, &[u8]> = TableDefinition::new("lanes");
/// How many messages of a lane are in Kinesis, from its first one.
const PUT: TableDefinition<'_, LaneId, u64> = TableDefinition::new("put");
/// Chunks of messages, by their lane and the place of their first message in it.
const CHUNKS: TableDefinition<'_, (LaneId, u64), &[u8]> = TableDefinition::new("chunks");
/// The stream that the messages are for, and the salt of partition keys.
const ABOUT: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("about");

const FILE: &str = "spool.redb";
/// What the database may keep of its file in memory.
const CACHE_BYTES: usize = 4 * 1024 * 1024;

pub(super) type Open = dyn Fn() -> Result<Database, DatabaseError> + Send + Sync;

/// A spool in a directory.
pub(in crate::produce) struct Disk {
    directory: PathBuf,
    open: Box<Open>,
    /// None after an I/O error, until it can be opened again: what is in memory then may differ from
    /// what is on disk.
    database: Mutex<Option<Arc<Database>>>,
    reserve: Box<dyn Reserve>,
    /// Whether the reserve is held.
    reserved: AtomicBool,
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Disk").field(&self.directory).finish()
    }
}

impl Disk {
    /// Opens the spool of a stream, or makes it. A file that turns out to be damaged is set aside, and
    /// a new one is made: trains do not wait for an operator.
    pub(in crate::produce) fn open(directory: &Path, stream: &str) -> Result<Self, SpoolError> {
        let io = |source| SpoolError::Io { directory: directory.to_owned(), source };
        fs::create_dir_all(directory).map_err(io)?;
        let file = directory.join(FILE);
        let open = {
            let file = file.clone();
            move || builder().create(&file)
        };
        let reserve = || Box::new(ReserveFile::in_directory(directory));
        match Self::with(directory, stream, Box::new(open.clone()), reserve()) {
            Err(SpoolError::Damaged { reason, .. }) => {
                let now = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ");
                let aside = directory.join(format!("{FILE}.damaged-{now}"));
                fs::rename(&file, &aside).map_err(io)?;
                tracing::error!(
                    stream,
                    "the spool {} is damaged ({reason}): messages that waited in it may not have \
                     reached the stream. It is kept as {}, and a new one is begun",
                    directory.display(),
                    aside.display()
                );
                Self::with(directory, stream, Box::new(open), reserve())
            }
            opened => opened,
        }
    }

    pub(super) fn with(
        directory: &Path,
        stream: &str,
        open: Box<Open>,
        reserve: Box<dyn Reserve>,
    ) -> Result<Self, SpoolError> {
        let disk = Self {
            directory: directory.to_owned(),
            open,
            database: Mutex::new(None),
            reserve,
            reserved: AtomicBool::new(false),
        };
        let mut holds = disk.about("stream", stream.as_bytes());
        if let Err(SpoolError::Io { .. }) = &holds {
            // The disk may have been full when the last process ended.
            disk.release_reserve();
            holds = disk.about("stream", stream.as_bytes());
        }
        let holds = holds?;
        disk.hold_reserve();
        if holds != stream.as_bytes() {
            return Err(SpoolError::OtherStream {
                directory: directory.to_owned(),
                holds: String::from_utf8_lossy(&holds).into_owned(),
                stream: stream.to_owned(),
            });
        }
        Ok(disk)
    }

    /// What was stored under a name, and at first this.
    fn about(&self, name: &str, otherwise: &[u8]) -> Result<Vec<u8>, SpoolError> {
        self.using(|database| {
            let writing = database.begin_write()?;
            // Readers can open a table that exists only.
            writing.open_table(LANES)?;
            writing.open_table(PUT)?;
            writing.open_table(CHUNKS)?;
            let stored = {
                let mut about = writing.open_table(ABOUT)?;
                let stored = about.get(name)?.map(|stored| stored.value().to_vec());
                match stored {
                    Some(stored) => stored,
                    None => {
                        about.insert(name, otherwise)?;
                        otherwise.to_vec()
                    }
                }
            };
            writing.commit()?;
            Ok(stored)
        })
    }

    /// Whether there is room that is held back for removing.
    pub(super) fn hold_reserve(&self) -> bool {
        if !self.reserved.load(Ordering::Relaxed) {
            self.reserved.store(self.reserve.hold().is_ok(), Ordering::Relaxed);
        }
        self.reserved.load(Ordering::Relaxed)
    }

    /// Lets removing have it. If that fails, so will the next write, which is told.
    pub(super) fn release_reserve(&self) {
        let _ = self.reserve.release();
        self.reserved.store(false, Ordering::Relaxed);
    }

    pub(super) fn full(&self) -> SpoolError {
        SpoolError::Full { directory: self.directory.clone() }
    }

    /// The salt of partition keys: the first one that was ever given. With it, a host keeps its key, and
    /// so its shard, when the process starts again.
    pub(in crate::produce) fn salt(&self, otherwise: [u8; 16]) -> Result<[u8; 16], SpoolError> {
        let salt = self.about("salt", &otherwise)?;
        salt.try_into().map_err(|_| self.damaged("its salt has another length"))
    }

    /// The lanes that have messages which are not in Kinesis, as far as is known, in their order.
    pub(in crate::produce) fn left(&self) -> Result<Vec<Left>, SpoolError> {
        let lanes = self.using(|database| {
            let reading = database.begin_read()?;
            let (lanes, put) = (reading.open_table(LANES)?, reading.open_table(PUT)?);
            let mut found = Vec::new();
            for entry in lanes.iter()? {
                let (lane, info) = entry?;
                let first = put.get(lane.value())?.map_or(0, |put| put.value());
                found.push((lane.value(), info.value().to_vec(), first));
            }
            Ok(found)
        })?;
        let mut left = Vec::new();
        for (lane, info, first) in lanes {
            let info: LaneInfo = serde_json::from_slice(&info)
                .map_err(|error| self.damaged(&format!("lane {lane}: {error}")))?;
            let mut lane = Left { lane, info, first, messages: 0, spooled_bytes: 0, oldest: None };
            self.read(lane.lane, first, &mut |message| {
                lane.messages += 1;
                lane.spooled_bytes += message.spooled_bytes();
                lane.oldest.get_or_insert(message.received_at);
                ControlFlow::Continue(())
            })?;
            left.push(lane);
        }
        Ok(left)
    }

    pub(super) fn commit(&self, group: &Group) -> Result<(), SpoolError> {
        self.using(|database| {
            let writing = database.begin_write()?;
            {
                let mut lanes = writing.open_table(LANES)?;
                for (lane, info) in &group.opened {
                    let info = serde_json::to_vec(info).map_err(io::Error::other)?;
                    lanes.insert(lane, info.as_slice())?;
                }
                let mut chunks = writing.open_table(CHUNKS)?;
                for (at, chunk) in &group.appended {
                    chunks.insert(at, chunk.as_slice())?;
                }
                let mut put = writing.open_table(PUT)?;
                for (lane, count) in &group.put {
                    put.insert(lane, count)?;
                    remove_put(&mut chunks, *lane, *count)?;
                }
                for lane in &group.finished {
                    lanes.remove(lane)?;
                    put.remove(lane)?;
                }
            }
            writing.commit()?;
            Ok(())
        })
    }

    pub(super) fn read(
        &self,
        lane: LaneId,
        mut from: u64,
        visit: &mut Visit<'_>,
    ) -> Result<(), SpoolError> {
        let sense = self.using(|database| {
            let reading = database.begin_read()?;
            let chunks = reading.open_table(CHUNKS)?;
            let first = from;
            let before = chunks.range((lane, 0)..=(lane, first))?.next_back().transpose()?;
            let start = before.map_or(first, |(at, _)| at.value().1);
            for entry in chunks.range((lane, start)..=(lane, u64::MAX))? {
                let (at, chunk) = entry?;
                // Where to go on if the database must be opened again.
                let mut visit = |message: &Spooled<'_>| {
                    from += 1;
                    visit(message)
                };
                match visit_chunk(at.value().1, chunk.value(), first, &mut visit) {
                    Some(ControlFlow::Continue(())) => {}
                    Some(ControlFlow::Break(())) => break,
                    None => return Ok(false),
                }
            }
            Ok(true)
        })?;
        match sense {
            true => Ok(()),
            false => Err(self.damaged(&format!("a chunk of lane {lane} makes no sense"))),
        }
    }

    /// Does something with the database, which is opened if it is not open. After an error it is closed:
    /// redb takes no more orders then.
    fn using<T>(
        &self,
        mut act: impl FnMut(&Database) -> Result<T, redb::Error>,
    ) -> Result<T, SpoolError> {
        let mut done = self.using_once(&mut act);
        if matches!(done, Err(redb::Error::PreviousIo)) {
            // It was another one's error, and it has been told.
            done = self.using_once(&mut act);
        }
        done.map_err(|error| self.failed(error))
    }

    fn using_once<T>(
        &self,
        act: impl FnOnce(&Database) -> Result<T, redb::Error>,
    ) -> Result<T, redb::Error> {
        let database = {
            let mut open = self.database();
            match &*open {
                Some(database) => database.clone(),
                None => open.insert(Arc::new((self.open)()?)).clone(),
            }
        };
        act(&database).inspect_err(|_| {
            let mut open = self.database();
            // Another call may have opened it again already.
            if open.as_ref().is_some_and(|open| Arc::ptr_eq(open, &database)) {
                *open = None;
            }
        })
    }

    fn database(&self) -> MutexGuard<'_, Option<Arc<Database>>> {
        self.database.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, error: redb::Error) -> SpoolError {
        let directory = self.directory.clone();
        match error {
            redb::Error::DatabaseAlreadyOpen => SpoolError::InUse { directory },
            redb::Error::Io(source) if source.kind() == io::ErrorKind::InvalidData => {
                SpoolError::Damaged { directory, reason: source.to_string() }
            }
            redb::Error::Io(source) => SpoolError::Io { directory, source },
            error @ (redb::Error::Corrupted(_)
            | redb::Error::UpgradeRequired(_)
            | redb::Error::TableTypeMismatch { .. }
            | redb::Error::TypeDefinitionChanged { .. }) => self.damaged(&error.to_string()),
            error => SpoolError::Io { directory, source: io::Error::other(error) },
        }
    }

    fn damaged(&self, reason: &str) -> SpoolError {
        SpoolError::Damaged { directory: self.directory.clone(), reason: reason.to_owned() }
    }
}

/// Removes the chunks of a lane whose messages are all among its first `count`.
fn remove_put(
    chunks: &mut redb::Table<'_, (LaneId, u64), &'static [u8]>,
    lane: LaneId,
    count: u64,
) -> Result<(), StorageError> {
    let mut done = Vec::new();
    for entry in chunks.range((lane, 0)..(lane, count))? {
        let (at, chunk) = entry?;
        if at.value().1 + stored_count(chunk.value()).unwrap_or(0) > count {
            break;
        }
        done.push(at.value());
    }
    for at in done {
        chunks.remove(at)?;
    }
    Ok(())
}

fn builder() -> redb::Builder {
    let mut builder = Database::builder();
    // What was changed behind its back is noticed, instead of trusted.
    builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
    builder
}
