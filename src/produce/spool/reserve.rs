//! Room on the disk that is held back for removing.
//!
//! redb writes a page anew before it lets go of the old one, so that removing takes room too, and its file
//! does not shrink. On a disk that is full to the last block nothing could be removed any more, and what
//! waits would wait for an operator. So a file is kept that can be deleted then.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

const FILE: &str = "spool.reserve";
/// Several times what a removal writes.
const RESERVE_BYTES: usize = 4 * 1024 * 1024;

pub(super) trait Reserve: Send + Sync {
    /// Takes the room if it is not taken.
    fn hold(&self) -> io::Result<()>;

    /// Gives it to whoever writes.
    fn release(&self) -> io::Result<()>;
}

pub(super) struct ReserveFile(PathBuf);

impl ReserveFile {
    pub(super) fn in_directory(directory: &Path) -> Self {
        Self(directory.join(FILE))
    }
}

impl Reserve for ReserveFile {
    fn hold(&self) -> io::Result<()> {
        if fs::metadata(&self.0).is_ok_and(|file| file.len() == RESERVE_BYTES as u64) {
            return Ok(());
        }
        // A file system that compresses would keep no room for zeros.
        let bytes: Vec<u8> = std::iter::repeat_with(rand::random).take(RESERVE_BYTES).collect();
        let written = fs::write(&self.0, bytes).and_then(|()| fs::File::open(&self.0)?.sync_all());
        // Part of it would be in the way, and no reserve.
        written.inspect_err(|_| drop(self.release()))
    }

    fn release(&self) -> io::Result<()> {
        match fs::remove_file(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}
