//! Sends what was logged, or is in a stream, to a TCP port as OCS would: framed, at the pace that it had.

mod entry;
mod log;
mod outlet;
mod pace;
mod stream;

use std::{io, time::Duration};

use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

pub(crate) use log::Log;
use outlet::Outlet;
use pace::Pace;
pub(crate) use pace::Speed;
pub(crate) use stream::{StreamReplay, replay_stream};

use crate::WorkerError;

/// How many bad lines are told one by one.
const TOLD: u64 = 20;
/// A longer pause is told.
const LONG_PAUSE: Duration = Duration::from_secs(60);
/// As good as never: for what is due beyond the end of the clock.
const NEVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// Why a replay ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReplayError {
    #[error("{log} cannot be opened: {source}")]
    Open { log: Log, source: io::Error },
    #[error("{log} cannot be read beyond line {line}: {source}; all before it was sent")]
    Read { log: Log, line: u64, source: io::Error },
    #[error(
        "{log} is a tar file: unpack it first, as by `tar -xOf FILE | tramline replay - --to …`"
    )]
    Tar { log: Log },
    #[error("cannot connect to {to}: {source}; nothing was sent; is a receiver listening there?")]
    Connect { to: String, source: io::Error },
    #[error(
        "the connection to {to} ended after {messages} messages: {source}; {resume}; a few of the last \
         ones may have been lost on the way: go back a little further if none may be missing"
    )]
    Gone { to: String, messages: u64, resume: String, source: io::Error },
    #[error(transparent)]
    Worker(#[from] WorkerError),
}

/// What was sent, and what was not.
#[derive(Debug, Default)]
pub(crate) struct Summary {
    pub messages: u64,
    /// The last line, or the last before a stop, of which everything was sent; 0 if there is none.
    pub line: u64,
    pub bad_lines: u64,
    /// The numbers of the first of them.
    pub told: Vec<u64>,
    /// Whether it was stopped before the end.
    pub stopped: bool,
}

/// How far a replay is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Progress {
    pub line: u64,
    /// How much of the log was read, as it is stored.
    pub read_bytes: u64,
}

/// A log to be replayed.
pub(crate) struct LogReplay {
    log: Log,
    input: Box<dyn io::Read + Send>,
    /// How long it is as it is stored, where that is known.
    pub length_bytes: Option<u64>,
}

impl LogReplay {
    pub(crate) fn open(log: Log) -> Result<Self, ReplayError> {
        let (input, length_bytes) =
            log::open(&log).map_err(|source| ReplayError::Open { log: log.clone(), source })?;
        Ok(Self { log, input, length_bytes })
    }

    /// Sends everything from line `from` on, until the end, or until it is to stop.
    pub(crate) async fn send(
        self,
        to: &str,
        speed: Speed,
        from: u64,
        stop: &CancellationToken,
        progress: impl Fn(Progress),
    ) -> Result<Summary, ReplayError> {
        let mut summary = Summary { line: from - 1, ..Summary::default() };
        let outlet = tokio::select! {
            outlet = Outlet::connect(to) => outlet
                .map_err(|source| ReplayError::Connect { to: to.to_owned(), source })?,
            () = stop.cancelled() => {
                summary.stopped = true;
                return Ok(summary);
            }
        };
        let lines = log::read(self.log, self.input, from);
        let mut sending =
            Sending { outlet, pace: Pace::new(speed), began: Instant::now(), summary };
        let sent = tokio::select! {
            biased;
            () = stop.cancelled() => {
                sending.summary.stopped = true;
                Ok(())
            }
            sent = sending.all(lines, progress) => sent,
        };
        let Sending { outlet, summary, .. } = sending;
        let finished = async {
            match sent {
                Ok(()) => outlet.finish().await.map_err(Interrupt::Gone),
                error => error,
            }
        };
        match finished.await {
            Ok(()) => Ok(summary),
            Err(Interrupt::Log(error)) => Err(error),
            Err(Interrupt::Gone(source)) => Err(ReplayError::Gone {
                to: to.to_owned(),
                messages: summary.messages,
                resume: format!("--from-line {} goes on", summary.line + 1),
                source,
            }),
        }
    }
}

/// Why it does not go on.
enum Interrupt {
    Gone(io::Error),
    Log(ReplayError),
}

struct Sending {
    /// A message is marked by its line, where it is the last one of it.
    outlet: Outlet<Option<u64>>,
    pace: Pace,
    began: Instant,
    summary: Summary,
}

impl Sending {
    async fn all(
        &mut self,
        mut lines: tokio::sync::mpsc::Receiver<Result<Vec<log::Line>, ReplayError>>,
        progress: impl Fn(Progress),
    ) -> Result<(), Interrupt> {
        loop {
            let chunk = tokio::select! {
                chunk = lines.recv() => chunk,
                gone = self.outlet.gone() => return Err(Interrupt::Gone(gone)),
            };
            let Some(chunk) = chunk else { return Ok(()) };
            for line in chunk.map_err(Interrupt::Log)? {
                let at = Progress { line: line.number, read_bytes: line.read_bytes };
                self.line(line).await.map_err(Interrupt::Gone)?;
                progress(at);
            }
            self.flush().await.map_err(Interrupt::Gone)?;
        }
    }

    async fn line(&mut self, line: log::Line) -> io::Result<()> {
        if let Some(problem) = line.problem {
            self.summary.bad_lines += 1;
            if self.summary.bad_lines <= TOLD {
                tracing::warn!("line {} is left out: {problem}", line.number);
                self.summary.told.push(line.number);
            } else if self.summary.bad_lines == TOLD + 1 {
                tracing::warn!("further bad lines are only counted");
            }
        }
        let count = line.entries.len();
        for (n, entry) in line.entries.into_iter().enumerate() {
            let due = self.began.checked_add(self.pace.due(entry.at));
            let due = due.unwrap_or_else(|| Instant::now() + NEVER);
            let wait = due.saturating_duration_since(Instant::now());
            if !wait.is_zero() {
                self.flush().await?;
                if wait > LONG_PAUSE {
                    tracing::info!("line {} is due in {} s", line.number, wait.as_secs());
                }
                tokio::select! {
                    () = sleep_until(due) => {}
                    gone = self.outlet.gone() => return Err(gone),
                }
            }
            self.outlet.push(&entry.raw, (n + 1 == count).then_some(line.number));
        }
        Ok(())
    }

    async fn flush(&mut self) -> io::Result<()> {
        let summary = &mut self.summary;
        self.outlet
            .flush(|line| {
                summary.messages += 1;
                summary.line = line.unwrap_or(summary.line);
            })
            .await
    }
}
