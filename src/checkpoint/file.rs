//! A state document as a file.
//!
//! Written to a temporary file beside it, which then takes its name: after a crash at any moment the old
//! content or the new one is there. One process at a time: it holds a lock of the operating system on a
//! file beside it, `NAME.lock`, from the first read on; a crash releases it.

use std::{
    ffi::OsString,
    fs::{self, File, Metadata, OpenOptions, TryLockError},
    io::{self, Read as _, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use jiff::Timestamp;

use super::{
    StateError,
    document::LIMIT_BYTES,
    held::{Found, Tag, blocking},
};

#[derive(Debug, Clone)]
pub(super) struct StateFile {
    name: String,
    /// Used by one blocking call at a time: one goes on when its caller is dropped.
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    /// Who we are, for the lock file.
    holder: String,
    lock: Option<File>,
}

/// Why a call failed, in the terms of [`StateError`].
enum Failure {
    Locked(String),
    TooLarge(usize),
    Io(&'static str, io::Error),
}

impl StateFile {
    pub fn new(path: PathBuf, worker: &str) -> Self {
        let name = format!("file://{}", path.display());
        let holder = format!("worker {worker}, process {}", std::process::id());
        Self { name, inner: Arc::new(Mutex::new(Inner { path, holder, lock: None })) }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub async fn read(&self) -> Result<Option<Found>, StateError> {
        self.call(|inner| inner.read()).await
    }

    /// Reads without the lock: the file is whole at any moment.
    pub async fn peek(&self) -> Result<Option<Found>, StateError> {
        self.call(|inner| inner.peek()).await
    }

    /// Writes if the file is still `seen`. `None` if it is not, and nothing was written.
    pub async fn write(&self, bytes: Bytes, seen: Option<&Tag>) -> Result<Option<Tag>, StateError> {
        let seen = seen.cloned();
        self.call(move |inner| inner.write(&bytes, seen.as_ref())).await
    }

    async fn call<T: Send + 'static>(
        &self,
        f: impl FnOnce(&mut Inner) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, StateError> {
        let inner = self.inner.clone();
        let called =
            blocking(move || f(&mut inner.lock().unwrap_or_else(|poison| poison.into_inner())));
        called.await.map_err(|failure| match failure {
            Failure::Locked(holder) => StateError::Locked { place: self.name.clone(), holder },
            Failure::TooLarge(bytes) => StateError::TooLarge { place: self.name.clone(), bytes },
            Failure::Io(step, error) => {
                let (kind, said) = (error.kind(), error.to_string());
                StateError::File { place: self.name.clone(), step, kind, said }
            }
        })
    }
}

impl Inner {
    fn read(&mut self) -> Result<Option<Found>, Failure> {
        self.take_lock()?;
        self.peek()
    }

    fn peek(&self) -> Result<Option<Found>, Failure> {
        let failed = |error| Failure::Io("read", error);
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let metadata = file.metadata().map_err(failed)?;
        let length = usize::try_from(metadata.len()).unwrap_or(usize::MAX);
        if length > LIMIT_BYTES {
            return Err(Failure::TooLarge(length));
        }
        let mut bytes = Vec::with_capacity(length);
        file.read_to_end(&mut bytes).map_err(failed)?;
        Ok(Some(Found { bytes: bytes.into(), tag: tag(&metadata) }))
    }

    fn write(&mut self, bytes: &[u8], seen: Option<&Tag>) -> Result<Option<Tag>, Failure> {
        self.take_lock()?;
        // The lock keeps other workers out. This keeps us from writing over what a person put there.
        let now = match fs::metadata(&self.path) {
            Ok(metadata) => Some(tag(&metadata)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(Failure::Io("read", error)),
        };
        if now.as_ref() != seen {
            return Ok(None);
        }
        let temporary = beside(&self.path, ".tmp");
        let written = replace(&self.path, &temporary, bytes);
        if written.is_err() {
            let _ = fs::remove_file(&temporary); // A full disk needs the room.
        }
        written.map(Some).map_err(|error| Failure::Io("write", error))
    }

    fn take_lock(&mut self) -> Result<(), Failure> {
        if self.lock.is_some() {
            return Ok(());
        }
        let failed = |error| Failure::Io("lock", error);
        // Never removed: another process may be about to lock it.
        let path = beside(&self.path, ".lock");
        let mut options = OpenOptions::new();
        let mut file = options
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(path)
            .map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                let told = file.read_to_string(&mut holder).is_ok() && !holder.is_empty();
                let holder = if told { holder.trim_end() } else { "another process" };
                return Err(Failure::Locked(holder.to_owned()));
            }
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        let since = Timestamp::now();
        file.set_len(0).map_err(failed)?;
        writeln!(file, "{}, since {since:.0}", self.holder).map_err(failed)?;
        self.lock = Some(file);
        Ok(())
    }
}

fn replace(path: &Path, temporary: &Path, bytes: &[u8]) -> io::Result<Tag> {
    let mut file = File::create(temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    let tag = tag(&file.metadata()?);
    fs::rename(temporary, path)?;
    // The new name is in the folder, which has to reach the disk too.
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()?;
    Ok(tag)
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut beside = OsString::from(path);
    beside.push(ending);
    beside.into()
}

/// Changes whenever the file is written.
fn tag(metadata: &Metadata) -> Tag {
    let (dev, ino, length) = (metadata.dev(), metadata.ino(), metadata.len());
    Tag(format!("{dev}.{ino}.{length}.{}.{}", metadata.mtime(), metadata.mtime_nsec()))
}
