use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use jiff::Timestamp;
use socket2::SockRef;
use tokio::{
    io::AsyncReadExt as _,
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::timeout,
};
use tracing::Instrument as _;

use super::{Shared, add, connection_name, lane::Lane, partition_key};
use crate::{
    handler::{DeadLetter, Kind, Place},
    ocs::{EventSource, Frame, Framer, event_time},
};

/// How much is read from a socket at a time. Larger reads make larger records.
const READ_BYTES: usize = 128 * 1024;

/// Accepts connections for ever.
pub(super) async fn accept(
    listener: TcpListener,
    shared: &Arc<Shared>,
    connections: &mut JoinSet<()>,
) {
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((socket, peer)) => {
                    add(&shared.counters.connections, 1);
                    connections.spawn(serve(socket, peer, shared.clone()));
                }
                Err(error) => {
                    tracing::error!("cannot accept a connection: {error}; trying again in a second");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Serves one connection until it closes and Kinesis has all of its messages.
async fn serve(socket: TcpStream, peer: SocketAddr, shared: Arc<Shared>) {
    // An IPv4 peer of an IPv6 socket is an IPv4 peer.
    let canonical =
        |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    let peer = canonical(peer);
    let local = match socket.local_addr() {
        Ok(local) => canonical(local),
        Err(error) => return tracing::warn!(%peer, "connection closed at once: {error}"),
    };
    let name = connection_name(local, peer);
    let span = tracing::info_span!("connection", name);
    async {
        tracing::info!("connection accepted");
        if let Err(error) = set_options(&socket) {
            tracing::warn!("socket options not set: {error}");
        }
        let key = partition_key(shared.settings.partition_key, &shared.salt, local, peer);
        let (lane, emptied) = Lane::new(shared.clone(), key.clone());
        let connection = Connection {
            events: EventSource::new(key, &shared.settings.source, Some(peer.ip())),
            lane,
            shared,
            name: &name,
        };
        // Reading ends with the connection; emptying goes on until Kinesis has everything.
        tokio::join!(connection.read(socket), emptied);
        tracing::info!("connection done");
    }
    .instrument(span)
    .await;
}

/// Notices dead peers, and closes with RST: OCS was seen to ignore FIN and to leave its half open.
fn set_options(socket: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(socket);
    socket.set_keepalive(true)?;
    socket.set_linger(Some(Duration::ZERO))
}

struct Connection<'a> {
    events: EventSource,
    lane: Lane,
    shared: Arc<Shared>,
    name: &'a str,
}

impl Connection<'_> {
    async fn read(self, mut socket: TcpStream) {
        let settings = &self.shared.settings;
        let mut framer = Framer::new(settings.max_message_bytes);
        let mut buffer = vec![0; READ_BYTES];
        loop {
            let read = tokio::select! {
                biased;
                () = self.shared.stop.cancelled() => {
                    // What has arrived is received; only then nothing more is.
                    match socket.try_read(&mut buffer) {
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            tracing::info!("connection closed: the producer stops");
                            break;
                        }
                        read => Ok(read),
                    }
                }
                read = timeout(settings.stale_after, socket.read(&mut buffer)) => read,
            };
            match read {
                Ok(Ok(0)) => {
                    tracing::info!("connection closed by the peer");
                    break;
                }
                Ok(Ok(length)) => self.receive(framer.push(&buffer[..length])).await,
                Ok(Err(error)) => {
                    tracing::warn!("connection broken: {error}");
                    break;
                }
                Err(_) => {
                    tracing::warn!(
                        "connection closed: no byte for {:?}, so the peer is taken for gone",
                        settings.stale_after
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
    }

    /// Takes what one read completed. All of it was received now.
    async fn receive(&self, frames: Vec<Frame>) {
        let counters = &self.shared.counters;
        let now = Timestamp::now();
        let messages = frames.iter().filter(|frame| matches!(frame, Frame::Message(_))).count();
        add(&counters.messages, messages as u64);
        for frame in frames {
            match frame {
                Frame::Message(raw) => {
                    self.lane.send(self.events.event(&event_time(now), &raw)).await;
                }
                Frame::Heartbeat => add(&counters.heartbeats, 1),
                Frame::Empty => add(&counters.empty_frames, 1),
                Frame::Oversized { head, length_bytes } => {
                    self.dead_letter(Kind::Oversized, head, length_bytes, now).await;
                }
            }
        }
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
                connection: self.name.to_owned(),
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
