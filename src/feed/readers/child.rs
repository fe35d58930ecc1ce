//! A child process that reads the feed from its stdin.

use std::{
    process::{ExitStatus, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    process::{Child, Command},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use super::{
    FeedError,
    hub::{Hub, Joined},
    server::greet,
    session::{self, Encoding, End, Hearing, Input, Output},
};
use crate::backoff::Backoff;

/// A child that ran for so long worked: it is started again at once.
const WORKED: Duration = Duration::from_secs(10);
/// How long a child may take to end when its stdin is closed. Then it is killed.
const END_LIMIT: Duration = Duration::from_secs(5);
/// How long the last acknowledgements of a child that ended may take to be read.
const LAST_ACKS_LIMIT: Duration = Duration::from_secs(1);
/// What a shell says of a command that it cannot run.
const CANNOT_RUN: [i32; 2] = [126, 127];

/// Runs a shell command that reads the feed from its stdin, again and again, until `done`. Then its stdin
/// is closed and its end awaited. An error if the command could never be run.
pub(crate) async fn run(
    command: String,
    hub: Arc<Hub>,
    encoding: Encoding,
    done: CancellationToken,
) -> Result<(), FeedError> {
    let span = tracing::info_span!("feed", place = format!("exec:{command}"));
    keep_running(&command, &hub, encoding, &done).instrument(span).await
}

async fn keep_running(
    command: &str,
    hub: &Arc<Hub>,
    encoding: Encoding,
    done: &CancellationToken,
) -> Result<(), FeedError> {
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
    let mut has_run = false;
    loop {
        let started_at = Instant::now();
        let cannot_run =
            |reason: String| FeedError::Command { command: command.to_owned(), reason };
        let mut child =
            start(command, hub.has_acks()).map_err(|error| cannot_run(error.to_string()))?;
        let served = tokio::select! {
            served = serve(&mut child, hub, encoding) => Some(served),
            () = done.cancelled() => None,
        };
        // Its stdin is closed by now.
        let status = finish(child).await;
        let ended = status.map_or("it was killed".to_owned(), |status| status.to_string());
        let Some(()) = served else {
            tracing::info!("the command has ended ({ended})");
            return Ok(());
        };
        let code = status.and_then(|status| status.code()).unwrap_or(0);
        if !has_run && CANNOT_RUN.contains(&code) {
            return Err(cannot_run(ended));
        }
        has_run = true;
        if started_at.elapsed() >= WORKED {
            backoff.reset();
        }
        let wait = backoff.next_wait();
        tracing::warn!(
            wait_millis = wait.as_millis() as u64,
            "the command has ended ({ended}); it is started again"
        );
        tokio::select! {
            () = sleep(wait) => {}
            () = done.cancelled() => return Ok(()),
        }
    }
}

/// Its stderr is ours, and without acknowledgements its stdout too.
fn start(command: &str, acks: bool) -> std::io::Result<Child> {
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg(command).stdin(Stdio::piped()).kill_on_drop(true);
    if acks {
        shell.stdout(Stdio::piped());
    }
    shell.spawn()
}

/// Serves a child until it ends or says what it must not.
async fn serve(child: &mut Child, hub: &Arc<Hub>, encoding: Encoding) {
    let Some(input) = child.stdin.take() else { return };
    let mut output: Output = Box::new(input);
    tracing::info!(process = child.id(), "the command is started");
    let (name, mut hearing) = match child.stdout.take() {
        None => (String::new(), Hearing::Nothing),
        Some(answers) => {
            let answers: Input = Box::new(answers);
            match greet(answers, &mut output).await {
                Ok((name, lines)) => (name, Hearing::Acks(lines)),
                Err(why) => {
                    tracing::warn!("the command is no reader: {why}");
                    return session::refuse(&mut output, &why).await;
                }
            }
        }
    };
    // There is no other.
    let Ok(mut joined) = hub.join(&name).await else { return };
    let end = serve_joined(child, &mut joined, &mut hearing, &mut output, encoding).await;
    session::end(end, joined, &mut output).await;
}

async fn serve_joined(
    child: &mut Child,
    joined: &mut Joined,
    hearing: &mut Hearing,
    output: &mut Output,
    encoding: Encoding,
) -> End {
    let mut serving = std::pin::pin!(session::serve(joined, hearing, output, encoding));
    tokio::select! {
        biased;
        end = &mut serving => end,
        _ = child.wait() => match timeout(LAST_ACKS_LIMIT, serving).await {
            Ok(end) => end,
            // One of its own children still holds its end of the pipe.
            Err(_) => End::Gone("its process has ended".to_owned()),
        },
    }
}

/// Waits for the end of a child whose stdin is closed; `None` if it had to be killed.
async fn finish(mut child: Child) -> Option<ExitStatus> {
    match timeout(END_LIMIT, child.wait()).await {
        Ok(status) => status.ok(),
        Err(_) => {
            tracing::warn!(
                "the command goes on {END_LIMIT:?} after the end of its stdin: it is killed"
            );
            let _ = child.kill().await;
            None
        }
    }
}
