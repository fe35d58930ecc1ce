//! One OCS connection, from its bytes to its lane.

use std::{io, net::IpAddr, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use jiff::Timestamp;
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    net::TcpStream,
    sync::OwnedSemaphorePermit,
    task::coop::unconstrained,
    time::{Instant, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{either::Either, sync::CancellationToken};

use super::{Lane, SendError, Shared, add};
use crate::{
    handler::{DeadLetter, Kind, Place},
    ocs::{Frame, Framer, event_time},
};

/// How much is read from a socket at a time. Larger reads make larger records.
const READ_BYTES: usize = 128 * 1024;
/// How long a peer may take to agree on TLS.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// When a silent peer is asked whether it is there, how often, and until it is taken for gone: one that
/// went without a word is noticed within a minute.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(30), Duration::from_secs(10), 3);

pub(super) struct Connection {
    pub shared: Arc<Shared>,
    pub partition_key: String,
    pub peer: IpAddr,
    /// As it is told in the log.
    pub name: String,
    /// Who counts its OCS sequence numbers.
    pub counted_as: String,
    pub stale_after: Duration,
    pub max_message_bytes: usize,
    pub stop: CancellationToken,
}

impl Connection {
    /// Receives until the connection closes, gives its place to others, and waits until Kinesis has all
    /// of it.
    pub(super) async fn serve(
        self,
        socket: TcpStream,
        tls: Option<TlsAcceptor>,
        place: OwnedSemaphorePermit,
    ) {
        if let Err(error) = set_options(&socket) {
            tracing::warn!("socket options not set: {error}");
        }
        let socket = match tls {
            None => Either::Left(socket),
            Some(tls) => match self.agree(socket, tls).await {
                Some(socket) => Either::Right(socket),
                None => return,
            },
        };
        tracing::info!("connection accepted");
        let received = self.read(socket).await;
        drop(place);
        let put = match received {
            // The rest of a connection waits for nothing more.
            Ok(Some(lane)) => lane.flush().await,
            Ok(None) => Ok(()),
            Err(closed) => Err(closed),
        };
        if put.is_ok() {
            tracing::info!("connection done");
        }
    }

    /// Agrees on TLS with the peer.
    async fn agree(
        &self,
        socket: TcpStream,
        tls: TlsAcceptor,
    ) -> Option<impl AsyncRead + Unpin + use<>> {
        let agreeing = timeout(HANDSHAKE_LIMIT, tls.accept(socket));
        let failed = match self.stop.run_until_cancelled(agreeing).await? {
            Ok(Ok(socket)) => return Some(socket),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("it took longer than {HANDSHAKE_LIMIT:?}"),
        };
        add(&self.shared.counters.refused_connections, 1);
        tracing::warn!("connection refused, because TLS could not be agreed on: {failed}");
        None
    }

    /// Reads to the end. Gives the lane, if there was a message.
    async fn read(&self, mut socket: impl AsyncRead + Unpin) -> Result<Option<Lane>, SendError> {
        let stale_after = self.stale_after;
        let mut framer = Framer::new(self.max_message_bytes);
        let mut buffer = vec![0; READ_BYTES];
        let mut lane = None;
        // How long a message that has begun has been waited for. A peer that sends a byte now and then
        // keeps its place no longer than one that sends none.
        let mut waited = Duration::ZERO;
        loop {
            let began = Instant::now();
            let read = tokio::select! {
                biased;
                () = self.stop.cancelled() => {
                    // What has arrived is received; only then nothing more is.
                    match unconstrained(socket.read(&mut buffer)).now_or_never() {
                        Some(read) => Ok(read),
                        None => {
                            tracing::info!("connection closed: the producer stops");
                            break;
                        }
                    }
                }
                read = timeout(stale_after.saturating_sub(waited), socket.read(&mut buffer)) => read,
            };
            match read {
                Ok(Ok(0)) => {
                    tracing::info!("connection closed by the peer");
                    break;
                }
                Ok(Ok(length)) => {
                    let frames = framer.push(&buffer[..length]);
                    waited = match frames.is_empty() && framer.is_unfinished() {
                        true => waited + began.elapsed(),
                        false => Duration::ZERO,
                    };
                    self.receive(frames, &mut lane).await?;
                }
                Ok(Err(error)) => {
                    tracing::warn!("connection broken: {error}");
                    break;
                }
                Err(_) => {
                    let what = match framer.is_unfinished() {
                        true => "a message did not end",
                        false => "no byte",
                    };
                    tracing::warn!(
                        "connection closed: {what} for {stale_after:?}, so the peer is taken for gone"
                    );
                    break;
                }
            }
        }
        let unfinished = framer.into_unfinished();
        if !unfinished.is_empty() {
            let length_bytes = unfinished.len() as u64;
            self.dead_letter(Kind::Unfinished, unfinished, length_bytes, Timestamp::now()).await;
        }
        Ok(lane)
    }

    /// Takes what one read completed. All of it was received now.
    async fn receive(&self, frames: Vec<Frame>, lane: &mut Option<Lane>) -> Result<(), SendError> {
        let counters = &self.shared.counters;
        let now = Timestamp::now();
        let mut messages = Vec::with_capacity(frames.len());
        for frame in frames {
            match frame {
                Frame::Message(raw) => messages.push(raw),
                Frame::Heartbeat => add(&counters.heartbeats, 1),
                Frame::Empty => add(&counters.empty_frames, 1),
                Frame::Oversized { head, length_bytes } => {
                    self.dead_letter(Kind::Oversized, head, length_bytes, now).await;
                }
            }
        }
        if messages.is_empty() {
            return Ok(());
        }
        add(&counters.missing, self.shared.sequences.observe(&self.counted_as, &messages, now));
        let open = || self.shared.lane(&self.partition_key, Some(self.peer));
        lane.get_or_insert_with(open).send_all(&messages, now).await
    }

    async fn dead_letter(&self, kind: Kind, data: Vec<u8>, length_bytes: u64, now: Timestamp) {
        add(&self.shared.counters.dead_letters, 1);
        let reason = match kind {
            Kind::Oversized => "longer than the message limit",
            _ => "the connection closed in the middle of a message",
        };
        let letter = DeadLetter {
            kind,
            reason: reason.to_owned(),
            place: Place::Connection {
                connection: self.name.clone(),
                received_at: event_time(now),
                length_bytes,
            },
            attempts: 0,
            given_up_at: now,
            application: None,
            worker: None,
            data: data.into(),
        };
        letter.write().await;
    }
}

/// Notices dead peers, and closes with RST: OCS was seen to ignore FIN and to leave its half open.
fn set_options(socket: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(socket);
    let (after, every, times) = KEEPALIVE;
    let keepalive = TcpKeepalive::new().with_time(after).with_interval(every).with_retries(times);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_linger(Some(Duration::ZERO))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn dead_peers_are_asked_for_and_a_close_is_a_reset() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let socket = TcpStream::connect(address).await.expect("a connection");
        set_options(&socket).expect("options");
        let options = SockRef::from(&socket);
        assert!(options.keepalive().expect("an option"));
        assert_eq!(options.tcp_keepalive_time().expect("an option"), KEEPALIVE.0);
        assert_eq!(options.linger().expect("an option"), Some(Duration::ZERO));
    }
}
