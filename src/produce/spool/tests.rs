//! The spool on a disk that fills up, breaks, and loses its power.

use std::{
    collections::BTreeSet,
    io,
    ops::ControlFlow,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use jiff::Timestamp;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use redb::{Database, StorageBackend};

use super::{reserve::Reserve, *};

/// A disk in memory. What was written after the last sync may be lost, each write for itself.
#[derive(Debug, Clone, Default)]
pub(in crate::produce) struct Device(Arc<Mutex<Blocks>>);

#[derive(Debug, Default)]
pub(in crate::produce) struct Blocks {
    content: Vec<u8>,
    synced: Vec<u8>,
    /// Writes since the last sync.
    unsynced: Vec<(usize, Vec<u8>)>,
    full: bool,
    /// The blocks that have ever been written: a file has room for no others on a full disk.
    written: BTreeSet<usize>,
    /// How many blocks there are, if they are bounded.
    capacity: Option<usize>,
    /// How many are held back.
    reserved: usize,
}

const BLOCK_BYTES: usize = 4096;
const RESERVE_BLOCKS: usize = 1024;

impl Blocks {
    /// Whether so many more can be written.
    fn has_room(&self, blocks: usize) -> bool {
        self.capacity.is_none_or(|capacity| self.written.len() + self.reserved + blocks <= capacity)
    }
}

impl Reserve for Device {
    fn hold(&self) -> io::Result<()> {
        let mut blocks = lock(&self.0);
        if blocks.reserved == 0 && (blocks.full || !blocks.has_room(RESERVE_BLOCKS)) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        blocks.reserved = RESERVE_BLOCKS;
        Ok(())
    }

    fn release(&self) -> io::Result<()> {
        lock(&self.0).reserved = 0;
        Ok(())
    }
}

impl Device {
    pub(in crate::produce) fn set_full(&self, full: bool) {
        lock(&self.0).full = full;
    }

    pub(in crate::produce) fn set_capacity_bytes(&self, bytes: usize) {
        lock(&self.0).capacity = Some(bytes / BLOCK_BYTES);
    }

    /// What a machine finds that starts again: some of the last writes arrived.
    pub(in crate::produce) fn after_power_loss(&self, rng: &mut ChaCha8Rng) -> Self {
        let blocks = lock(&self.0);
        let mut content = blocks.synced.clone();
        content.resize(blocks.content.len(), 0);
        for (at, data) in &blocks.unsynced {
            if rng.random() && at + data.len() <= content.len() {
                content[*at..at + data.len()].copy_from_slice(data);
            }
        }
        Self(Arc::new(Mutex::new(Blocks {
            synced: content.clone(),
            content,
            written: blocks.written.clone(),
            ..Blocks::default()
        })))
    }

    pub(in crate::produce) fn open(&self) -> Result<Disk, SpoolError> {
        let device = self.clone();
        let open = move || Database::builder().create_with_backend(device.clone());
        Disk::with(&PathBuf::from("device"), "stream", Box::new(open), Box::new(self.clone()))
    }
}

impl StorageBackend for Device {
    fn len(&self) -> io::Result<u64> {
        Ok(lock(&self.0).content.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let blocks = lock(&self.0);
        let start = offset as usize;
        let bytes = blocks.content.get(start..start + out.len());
        out.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut blocks = lock(&self.0);
        if blocks.full && len as usize > blocks.content.len() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        blocks.content.resize(len as usize, 0);
        blocks.written.split_off(&(len as usize).div_ceil(BLOCK_BYTES));
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut blocks = lock(&self.0);
        if blocks.full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        blocks.synced = blocks.content.clone();
        blocks.unsynced.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut blocks = lock(&self.0);
        if blocks.full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let start = offset as usize;
        let touched = start / BLOCK_BYTES..(start + data.len()).div_ceil(BLOCK_BYTES);
        let new = touched.clone().filter(|block| !blocks.written.contains(block)).count();
        if new > 0 && !blocks.has_room(new) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        blocks.written.extend(touched);
        blocks.content[start..start + data.len()].copy_from_slice(data);
        blocks.unsynced.push((start, data.to_vec()));
        Ok(())
    }
}

fn info() -> LaneInfo {
    LaneInfo { partition_key: "key".into(), source: "s".into(), source_ip: None }
}

/// A group that opens a lane if it is new, and adds messages to it.
fn appending(lane: LaneId, first: u64, messages: &[Vec<u8>]) -> Group {
    let mut group = Group::default();
    if first == 0 {
        group.opened.push((lane, info()));
    }
    let mut chunk = Chunk::new();
    for raw in messages {
        chunk.push(&Spooled { received_at: Timestamp::UNIX_EPOCH, raw });
    }
    group.append(lane, first, chunk);
    group
}

fn messages(from: u64, count: u64) -> Vec<Vec<u8>> {
    (from..from + count).map(|n| format!("message {n}").into_bytes()).collect()
}

fn read_all(disk: &Disk, lane: LaneId, from: u64) -> Vec<Vec<u8>> {
    let mut read = Vec::new();
    disk.read(lane, from, &mut |message| {
        read.push(message.raw.to_vec());
        ControlFlow::Continue(())
    })
    .expect("the spool can be read");
    read
}

#[test]
fn p8_a_message_is_there_from_its_commit_until_it_is_put() {
    let device = Device::default();
    let disk = device.open().expect("a spool");
    disk.commit(&appending(7, 0, &messages(0, 3))).expect("a commit");
    disk.commit(&appending(7, 3, &messages(3, 3))).expect("a commit");
    assert_eq!(read_all(&disk, 7, 0), messages(0, 6));
    assert_eq!(read_all(&disk, 7, 4), messages(4, 2));

    // Part of a chunk: the chunk stays, and the lane knows where it is.
    let put = |count| Group { put: BTreeMap::from([(7, count)]), ..Group::default() };
    disk.commit(&put(4)).expect("a commit");
    drop(disk);
    let disk = device.open().expect("a spool");
    let left = disk.left().expect("what is left");
    assert_eq!((left.len(), left[0].first, left[0].messages), (1, 4, 2));
    assert_eq!(left[0].info, info());
    assert_eq!(read_all(&disk, 7, 4), messages(4, 2));
    assert!(read_all(&disk, 7, 0).len() < 6, "the first chunk is gone");

    disk.commit(&put(6)).expect("a commit");
    disk.commit(&Group { finished: vec![7], ..Group::default() }).expect("a commit");
    assert_eq!(disk.left().expect("what is left"), []);
}

#[test]
fn p8_a_full_disk_loses_nothing_and_takes_more_when_it_has_room() {
    let device = Device::default();
    let disk = device.open().expect("a spool");
    disk.commit(&appending(1, 0, &messages(0, 3))).expect("a commit");
    device.set_full(true);
    let group = appending(1, 3, &messages(3, 3));
    for _ in 0..3 {
        let error = disk.commit(&group).expect_err("the disk is full");
        assert!(matches!(&error, SpoolError::Io { .. }), "{error}");
    }
    device.set_full(false);
    disk.commit(&group).expect("a commit");
    assert_eq!(read_all(&disk, 1, 0), messages(0, 6));
}

#[test]
fn p8_what_was_committed_is_there_after_a_power_loss_at_any_write() {
    let seed = rand::random();
    println!("seed {seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut device = Device::default();
    let (mut committed, mut put) = (0, 0);
    for _ in 0..60 {
        let disk = device.open().expect("a spool");
        for _ in 0..rng.random_range(1..4) {
            let count = rng.random_range(1..20);
            let mut group = appending(1, committed, &messages(committed, count));
            put = rng.random_range(put..=committed);
            group.put.insert(1, put);
            disk.commit(&group).expect("a commit");
            committed += count;
        }
        // One that the loss of power interrupts.
        let interrupted = appending(1, committed, &messages(committed, 5));
        device.set_full(rng.random());
        let whole = disk.commit(&interrupted).is_ok();
        device.set_full(false);
        device = device.after_power_loss(&mut rng);
        let disk = device.open().expect("a spool");
        let left = disk.left().expect("what is left");
        let found = left[0].first + left[0].messages;
        assert_eq!(left[0].first, put);
        assert_eq!(found == committed + 5, whole || found != committed, "{found} of {committed}");
        committed = found;
        assert_eq!(read_all(&disk, 1, put), messages(put, committed - put));
    }
}

#[test]
fn a_spool_belongs_to_one_process_and_one_stream() {
    let directory = tempfile::tempdir().expect("a directory");
    let disk = Disk::open(directory.path(), "a").expect("a spool");
    let second = Disk::open(directory.path(), "a").expect_err("in use");
    assert!(matches!(second, SpoolError::InUse { .. }), "{second}");
    assert_eq!(disk.salt([1; 16]).expect("a salt"), [1; 16]);
    assert_eq!(disk.salt([2; 16]).expect("a salt"), [1; 16], "it stays");
    drop(disk);
    let other = Disk::open(directory.path(), "b").expect_err("another stream's");
    assert!(other.to_string().contains("for the stream a, not for b"), "{other}");
}

#[test]
fn p9_a_damaged_spool_is_set_aside_and_stops_nothing() {
    for damage in [0_usize, 1, 2] {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("spool.redb");
        let disk = Disk::open(directory.path(), "a").expect("a spool");
        for n in 0..50 {
            disk.commit(&appending(1, n * 20, &messages(n * 20, 20))).expect("a commit");
        }
        drop(disk);
        let mut bytes = std::fs::read(&file).expect("a file");
        match damage {
            // Every page, the beginning of the file, its end.
            0 => bytes[4096..].iter_mut().step_by(512).for_each(|byte| *byte ^= 0xFF),
            1 => bytes[..512].fill(0xAB),
            _ => bytes.truncate(bytes.len() / 2),
        }
        std::fs::write(&file, &bytes).expect("a write");
        let disk = Disk::open(directory.path(), "a").expect("a new spool");
        assert_eq!(disk.left().expect("what is left"), []);
        let aside: Vec<_> = std::fs::read_dir(directory.path())
            .expect("a directory")
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.contains("damaged"))
            .collect();
        assert_eq!(aside.len(), 1, "{damage}");
        let kept = std::fs::read(directory.path().join(&aside[0])).expect("a file");
        assert!(kept.len() >= bytes.len(), "what is left of it is kept");
    }
}

#[test]
fn the_default_directory_is_the_services_or_the_users_state() {
    let directory = |variables: &[(&str, &str)]| {
        let look = |name: &str| {
            variables.iter().find(|(n, _)| *n == name).map(|(_, value)| PathBuf::from(value))
        };
        let directory = Spool::State.directory_in("s", look).expect("a directory");
        directory.to_string_lossy().into_owned()
    };
    let home = ("HOME", "/home/ocs");
    assert_eq!(directory(&[]), "/var/lib/tramline/spool/s");
    assert_eq!(directory(&[home]), "/home/ocs/.local/state/tramline/spool/s");
    let state = ("XDG_STATE_HOME", "/state");
    assert_eq!(directory(&[home, state]), "/state/tramline/spool/s");
    let service = ("STATE_DIRECTORY", "/var/lib/tram");
    assert_eq!(directory(&[home, state, service]), "/var/lib/tram/spool/s");
    assert_eq!(directory(&[("HOME", "")]), "/var/lib/tramline/spool/s");
}

#[test]
fn a_chunk_that_makes_no_sense_is_noticed() {
    let mut chunk = Chunk::new();
    let at = Timestamp::UNIX_EPOCH;
    chunk.push(&Spooled { received_at: at, raw: b"first" });
    chunk.push(&Spooled { received_at: at, raw: b"second" });
    let stored = chunk.into_stored();
    let read = |stored: &[u8]| stored_messages(stored).map(|m| m.is_some()).collect::<Vec<_>>();
    assert_eq!((stored_count(&stored), read(&stored)), (Some(2), vec![true, true]));
    assert_eq!(read(&stored[..stored.len() - 1]), [true, false]);
    assert_eq!(read(&stored[..3]), Vec::<bool>::new());
    assert_eq!(stored_count(&stored[..3]), None);
}
