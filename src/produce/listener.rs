use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use aws_types::SdkConfig;
use jiff::Timestamp;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use socket2::SockRef;
use tokio::{
    io::AsyncReadExt as _,
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use super::{
    Counters, Lane, MESSAGE_LIMIT_BYTES, ProduceError, Producer, ProducerReport, ProducerSettings,
    SendError, add, put::Kinesis,
};
use crate::{
    handler::{DeadLetter, Kind, Place},
    ocs::{Frame, Framer, event_time},
    source::{Retrieval, SourceError, Stream},
};

/// How much is read from a socket at a time. Larger reads make larger records.
const READ_BYTES: usize = 128 * 1024;

/// What the partition key of a connection is made of. It decides the shard, and it is all that keeps
/// the messages of a connection together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PartitionKey {
    /// A salted hash of the peer's address and port (RFC 5): the stream does not tell who sent what.
    #[default]
    ConnectionHash,
    /// A salted hash of the peer's address: all connections of a host share a lane and a shard.
    HostHash,
    /// `{local address -> peer address}`, readable, as Trike writes it.
    Connection,
}

/// How OCS connections are received.
#[derive(Debug, Clone)]
pub struct ListenerSettings {
    /// What the partition key is made of.
    pub partition_key: PartitionKey,
    /// A connection that sends no byte for this long is closed.
    pub stale_after: Duration,
    /// The longest OCS message, without its end byte: at most 128 KiB. A longer one is a dead letter.
    pub max_message_bytes: usize,
    /// How their messages are kept, batched and put.
    pub producer: ProducerSettings,
}

impl Default for ListenerSettings {
    fn default() -> Self {
        Self {
            partition_key: PartitionKey::default(),
            stale_after: Duration::from_secs(300),
            max_message_bytes: 64 * 1024,
            producer: ProducerSettings::default(),
        }
    }
}

/// Listens for OCS connections and writes their messages to a stream.
pub struct OcsListener {
    listener: TcpListener,
    stream: Stream,
    producer: Producer,
    settings: Settings,
}

/// What connections are received with.
#[derive(Clone, Copy)]
struct Settings {
    partition_key: PartitionKey,
    stale_after: Duration,
    max_message_bytes: usize,
}

impl OcsListener {
    /// Listens on `address`, for messages that are to go to `stream`.
    pub async fn bind(
        config: &SdkConfig,
        stream: &str,
        address: SocketAddr,
        settings: ListenerSettings,
    ) -> Result<Self, ProduceError> {
        let ListenerSettings { partition_key, stale_after, max_message_bytes, producer } = settings;
        let listener = TcpListener::bind(address)
            .await
            .map_err(|source| ProduceError::Listen { address, source })?;
        let max_message_bytes = max_message_bytes.min(MESSAGE_LIMIT_BYTES);
        let put = Kinesis::new(config, stream);
        let stream = Stream::new(config, stream, Retrieval::Polling);
        let producer = Producer::open(stream.clone(), put, producer).await?;
        let settings = Settings { partition_key, stale_after, max_message_bytes };
        Ok(Self { listener, stream, producer, settings })
    }

    /// The address it listens on, with the port that the system picked if it was given 0.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Receives and puts until `shutdown` completes; then stops reading and puts what it has. What
    /// Kinesis does not take within the shutdown limit stays in the spool, if there is one on disk.
    pub async fn run(
        self,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<ProducerReport, ProduceError> {
        let Self { listener, stream, producer, settings } = self;
        let stop = CancellationToken::new();
        let mut connections = JoinSet::new();
        let result = tokio::select! {
            () = shutdown => Ok(()),
            error = refused(&stream) => Err(error.into()),
            () = producer.putting.stop.cancelled() => {
                Err(ProduceError::BrokeOff { waiting: producer.report().waiting() })
            }
            () = accept(listener, &producer, settings, &stop, &mut connections) => Ok(()),
        };
        stop.cancel();
        let limit = producer.shared.settings.shutdown_limit;
        let mut drained = Box::pin(async {
            while connections.join_next().await.is_some() {}
            producer.flush().await.is_ok()
        });
        let flushed = match result {
            Ok(()) => tokio::time::timeout(limit, &mut drained).await.unwrap_or(false),
            // Waiting would not help.
            Err(_) => false,
        };
        drop(drained);
        connections.shutdown().await;
        let ended = producer.end(flushed).await;
        result?;
        let report = ended?;
        tracing::info!(
            stream = stream.name(),
            connections = report.connections,
            messages = report.messages,
            records = report.records,
            heartbeats = report.heartbeats,
            empty_frames = report.empty_frames,
            dead_letters = report.dead_letters,
            "producer stopped"
        );
        Ok(report)
    }
}

/// Completes if AWS says clearly that the stream cannot be written. An outage is no such answer: what
/// OCS sends is received all the same, and put when AWS is back.
async fn refused(stream: &Stream) -> SourceError {
    use crate::aws::AwsErrorKind::{Credentials, Denied};
    match stream.until_active_stream().await {
        Ok(_) => tracing::info!(stream = stream.name(), "the stream is active"),
        Err(error @ SourceError::NoStream { .. }) => return error,
        Err(SourceError::Stream { source, stream }) if source.kind() == Credentials => {
            return SourceError::Stream { source, stream };
        }
        // Putting needs no permission to describe.
        Err(SourceError::Stream { source, .. }) if source.kind() == Denied => {
            tracing::debug!("the stream was not checked: {source}");
        }
        Err(error) => tracing::warn!("{error}; messages are received and wait until it works"),
    }
    std::future::pending().await
}

/// Accepts connections for ever.
async fn accept(
    listener: TcpListener,
    producer: &Producer,
    settings: Settings,
    stop: &CancellationToken,
    connections: &mut JoinSet<()>,
) {
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((socket, peer)) => open(socket, peer, producer, settings, stop, connections),
                Err(error) => {
                    tracing::error!("cannot accept a connection: {error}; trying again in a second");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Serves a connection until it closes and Kinesis has all of its messages.
fn open(
    socket: TcpStream,
    peer: SocketAddr,
    producer: &Producer,
    settings: Settings,
    stop: &CancellationToken,
    connections: &mut JoinSet<()>,
) {
    add(&producer.shared.counters.connections, 1);
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
    let key = partition_key(settings.partition_key, &producer.salt, local, peer);
    let connection = Connection {
        lane: producer.lane(key, Some(peer.ip())),
        counters: producer.shared.counters.clone(),
        settings,
        stop: stop.clone(),
        name,
    };
    connections.spawn(connection.serve(socket).instrument(span));
}

/// Notices dead peers, and closes with RST: OCS was seen to ignore FIN and to leave its half open.
fn set_options(socket: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(socket);
    socket.set_keepalive(true)?;
    socket.set_linger(Some(Duration::ZERO))
}

struct Connection {
    lane: Lane,
    counters: Arc<Counters>,
    settings: Settings,
    stop: CancellationToken,
    name: String,
}

impl Connection {
    async fn serve(self, socket: TcpStream) {
        tracing::info!("connection accepted");
        if let Err(error) = set_options(&socket) {
            tracing::warn!("socket options not set: {error}");
        }
        // The rest of a connection waits for nothing more.
        if self.read(socket).await.is_ok() && self.lane.flush().await.is_ok() {
            tracing::info!("connection done");
        }
    }

    async fn read(&self, mut socket: TcpStream) -> Result<(), SendError> {
        let settings = self.settings;
        let mut framer = Framer::new(settings.max_message_bytes);
        let mut buffer = vec![0; READ_BYTES];
        loop {
            let read = tokio::select! {
                biased;
                () = self.stop.cancelled() => {
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
                Ok(Ok(length)) => self.receive(framer.push(&buffer[..length])).await?,
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
        Ok(())
    }

    /// Takes what one read completed. All of it was received now.
    async fn receive(&self, frames: Vec<Frame>) -> Result<(), SendError> {
        let now = Timestamp::now();
        let mut messages = Vec::with_capacity(frames.len());
        for frame in frames {
            match frame {
                Frame::Message(raw) => messages.push(raw),
                Frame::Heartbeat => add(&self.counters.heartbeats, 1),
                Frame::Empty => add(&self.counters.empty_frames, 1),
                Frame::Oversized { head, length_bytes } => {
                    self.dead_letter(Kind::Oversized, head, length_bytes, now).await;
                }
            }
        }
        self.lane.send_all(&messages, now).await
    }

    async fn dead_letter(&self, kind: Kind, data: Vec<u8>, length_bytes: u64, now: Timestamp) {
        add(&self.counters.dead_letters, 1);
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

/// The name of a connection, as Trike writes it.
fn connection_name(local: SocketAddr, peer: SocketAddr) -> String {
    format!("{{{local} -> {peer}}}")
}

fn partition_key(
    kind: PartitionKey,
    salt: &[u8; 16],
    local: SocketAddr,
    peer: SocketAddr,
) -> String {
    let salted = |text: String| {
        let digest = Sha256::new().chain_update(salt).chain_update(text).finalize();
        digest[..16].iter().map(|byte| format!("{byte:02x}")).collect()
    };
    match kind {
        PartitionKey::ConnectionHash => salted(peer.to_string()),
        PartitionKey::HostHash => salted(peer.ip().to_string()),
        PartitionKey::Connection => connection_name(local, peer),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(kind: PartitionKey, salt: u8, peer: &str) -> String {
        let local = "10.108.46.198:8081".parse().expect("an address");
        partition_key(kind, &[salt; 16], local, peer.parse().expect("an address"))
    }

    #[test]
    fn the_readable_key_is_trikes() {
        assert_eq!(
            key(PartitionKey::Connection, 0, "10.198.0.34:43414"),
            "{10.108.46.198:8081 -> 10.198.0.34:43414}"
        );
    }

    #[test]
    fn hashed_keys_tell_connections_or_hosts_apart_and_nothing_else() {
        let (a, b) = ("10.0.0.1:5000", "10.0.0.1:5001");
        let connection = |salt, peer| key(PartitionKey::ConnectionHash, salt, peer);
        assert_eq!(connection(1, a), connection(1, a));
        assert_ne!(connection(1, a), connection(1, b));
        assert_ne!(connection(1, a), connection(2, a), "the salt counts");
        let host = |peer| key(PartitionKey::HostHash, 1, peer);
        assert_eq!(host(a), host(b));
        assert_ne!(host(a), host("10.0.0.2:5000"));
        assert_eq!(connection(1, a).len(), 32);
    }
}
