//! A port that the feed connects to.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{net::TcpStream, time::timeout};
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument as _;

use super::{
    Connections,
    hub::Hub,
    server::tcp_halves,
    session::{self, Encoding, Hearing},
};
use crate::backoff::Backoff;

/// How long the target may take to accept a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// A connection that held for so long worked: the next one is tried at once.
const HELD: Duration = Duration::from_secs(10);
/// How often a lasting failure is told again.
const REMINDER_INTERVAL: Duration = Duration::from_secs(60);

/// Sends a feed to a target, for as long as what this gives is held: connects, and again when the
/// connection ends.
pub(crate) fn send(address: String, hub: Arc<Hub>) -> Connections {
    let span = tracing::info_span!("feed", place = format!("tcp-connect://{address}"));
    let task = tokio::spawn(keep_connected(address, hub).instrument(span));
    Connections { _task: AbortOnDropHandle::new(task), _file: None }
}

async fn keep_connected(address: String, hub: Arc<Hub>) {
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
    let mut told_at: Option<Instant> = None;
    loop {
        match connect(&address).await {
            Ok((input, mut output)) => {
                told_at = None;
                let connected_at = Instant::now();
                // There is no other.
                let Ok(mut joined) = hub.join("").await else { return };
                tracing::info!("connected");
                let mut hearing = Hearing::End(input);
                let end =
                    session::serve(&mut joined, &mut hearing, &mut output, Encoding::Frames).await;
                session::end(end, joined, &mut output).await;
                if connected_at.elapsed() >= HELD {
                    backoff.reset();
                }
            }
            Err(error) => {
                if told_at.is_none_or(|at| at.elapsed() >= REMINDER_INTERVAL) {
                    told_at = Some(Instant::now());
                    tracing::warn!(
                        "cannot connect: {error}; its messages wait, and it is tried again until it works"
                    );
                }
            }
        }
        tokio::time::sleep(backoff.next_wait()).await;
    }
}

async fn connect(address: &str) -> io::Result<(session::Input, session::Output)> {
    let socket = timeout(CONNECT_LIMIT, TcpStream::connect(address))
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
    tcp_halves(socket)
}
