use std::{
    fs::File,
    io::{self, Write},
    os::fd::AsFd as _,
    sync::{Arc, Mutex},
    thread::sleep,
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use super::Format;
use crate::handler::{Batch, Handler};

/// How long to wait when the system does not take more.
const PAUSE: Duration = Duration::from_millis(20);
/// How often a lasting failure is told again.
const REMINDER_INTERVAL: Duration = Duration::from_secs(60);

/// Writes messages to standard output, one line each. Made once and cloned for every shard.
#[derive(Clone)]
pub struct Stdout {
    format: Format,
    out: Arc<Mutex<File>>,
    closed: CancellationToken,
}

impl Stdout {
    /// Writes in `format`.
    ///
    /// An error if the process has no standard output.
    pub fn new(format: Format) -> io::Result<Self> {
        // Not through `io::stdout`: its buffer does not tell how much of a failed write went out.
        let out = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        Ok(Self { format, out: Arc::new(out.into()), closed: CancellationToken::new() })
    }

    /// Completes when the reader of standard output has gone.
    pub async fn closed(&self) {
        self.closed.cancelled().await;
    }
}

impl Handler for Stdout {
    type Error = io::Error;

    /// Finished when the system has taken the lines. A full disk or pipe is waited for, and the lines
    /// go on where they were cut: a batch is never given up half-way.
    async fn handle(&mut self, batch: &Batch) -> Result<(), io::Error> {
        let mut lines = Vec::new();
        for message in batch {
            self.format.write(message, &mut lines);
        }
        // A thread of its own: writing may block, and a lost lease, which drops this call, must not cut
        // a line in the middle.
        let out = self.out.clone();
        let written = tokio::task::spawn_blocking(move || {
            let mut out = out.lock().unwrap_or_else(|poison| poison.into_inner());
            write_all(&mut *out, &lines)
        });
        let result = written.await.map_err(io::Error::other)?;
        if result.is_err() {
            self.closed.cancel();
        }
        result
    }
}

/// Writes everything, however long it takes; fails only when the reader has gone.
fn write_all(out: &mut impl Write, mut bytes: &[u8]) -> io::Result<()> {
    let mut remind_at = Instant::now();
    while !bytes.is_empty() {
        match out.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(length) => bytes = &bytes[length..],
            Err(error) => match error.kind() {
                io::ErrorKind::BrokenPipe => return Err(error),
                io::ErrorKind::Interrupted => {}
                // A slow reader of a pipe that does not block.
                io::ErrorKind::WouldBlock => sleep(PAUSE),
                _ => {
                    if Instant::now() >= remind_at {
                        remind_at = Instant::now() + REMINDER_INTERVAL;
                        tracing::warn!("stdout takes nothing: {error}; trying again until it does");
                    }
                    sleep(PAUSE * 10);
                }
            },
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes a few bytes at a time and fails in between.
    struct Reluctant(Vec<u8>, Vec<io::ErrorKind>);

    impl Write for Reluctant {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if let Some(kind) = self.1.pop() {
                // The next attempt succeeds.
                return Err(kind.into());
            }
            let length = bytes.len().min(3);
            self.0.extend_from_slice(&bytes[..length]);
            self.1 = vec![io::ErrorKind::WouldBlock, io::ErrorKind::StorageFull];
            Ok(length)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn p1_a_write_that_fails_half_way_goes_on_where_it_was_cut() {
        let mut out = Reluctant(Vec::new(), Vec::new());
        write_all(&mut out, b"one line\n").expect("written");
        assert_eq!(out.0, b"one line\n");
    }

    #[test]
    fn a_reader_that_has_gone_ends_it() {
        let mut out = Reluctant(Vec::new(), vec![io::ErrorKind::BrokenPipe]);
        assert!(write_all(&mut out, b"one line\n").is_err());
    }
}
