//! The producer: OCS connections in, CloudEvents out.
//!
//! ```text
//! socket → Framer → event ── lane ──→ Batcher → put, one record at a time → Kinesis
//! ```
//! Each connection has its own lane. While its record is on the way, what arrives forms the next one,
//! so order holds under every failure and records grow with the load by themselves (P7).

mod batcher;
mod lane;
mod listener;
mod put;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use aws_types::SdkConfig;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::source::{Retrieval, SourceError, Stream};
use put::Put;

/// What the partition key of a connection is made of. It decides the shard, and it is all that keeps
/// the messages of a connection together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PartitionKey {
    /// A salted hash of the peer's address and port (RFC 5): the stream does not tell who sent what.
    #[default]
    ConnectionHash,
    /// A salted hash of the peer's address: all connections of a host share a shard.
    HostHash,
    /// `{local address -> peer address}`, readable, as Trike writes it.
    Connection,
}

/// How OCS connections are received and their messages put.
#[derive(Debug, Clone)]
pub struct ProducerSettings {
    /// What the partition key is made of.
    pub partition_key: PartitionKey,
    /// The CloudEvents' source, a URI reference.
    pub source: String,
    /// A connection that sends no byte for this long is closed.
    pub stale_after: Duration,
    /// The longest OCS message, without its end byte. A longer one is a dead letter.
    pub max_message_bytes: usize,
    /// How much of a connection may wait for Kinesis before its socket is not read any more.
    pub lane_bytes: u32,
    /// How long a stop may take.
    pub shutdown_limit: Duration,
}

impl Default for ProducerSettings {
    fn default() -> Self {
        Self {
            partition_key: PartitionKey::default(),
            source: format!("{}.mbta.com/trike", crate::host::name()),
            stale_after: Duration::from_secs(300),
            max_message_bytes: 64 * 1024,
            lane_bytes: 8 * 1024 * 1024,
            shutdown_limit: Duration::from_secs(30),
        }
    }
}

/// Listens for OCS connections and writes their messages to a stream.
pub struct Producer {
    listener: TcpListener,
    stream: Stream,
    shared: Arc<Shared>,
}

/// What a producer did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProducerReport {
    /// OCS connections accepted.
    pub connections: u64,
    /// Messages received.
    pub messages: u64,
    /// Messages that Kinesis has.
    pub put: u64,
    /// Records that Kinesis has.
    pub records: u64,
    /// Bytes of those records.
    pub bytes: u64,
    /// Heartbeats received.
    pub heartbeats: u64,
    /// Frames without a byte.
    pub empty_frames: u64,
    /// Oversized and unfinished messages; they were written to stderr.
    pub dead_letters: u64,
}

/// Why a producer could not start, or stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProduceError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}; choose another address, or stop what uses it")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The stream cannot be written.
    #[error(transparent)]
    Stream(#[from] SourceError),
    /// Kinesis did not take everything before the shutdown limit.
    #[error(
        "{messages} messages, and whatever the sockets still held, were received but not stored in \
         the stream within {limit:?} of the stop: they are lost"
    )]
    Lost {
        /// How many.
        messages: u64,
        /// The limit.
        limit: Duration,
    },
}

/// What the tasks of a producer share.
struct Shared {
    put: Put,
    settings: ProducerSettings,
    salt: [u8; 16],
    stop: CancellationToken,
    counters: Counters,
}

#[derive(Debug, Default)]
struct Counters {
    connections: AtomicU64,
    messages: AtomicU64,
    put: AtomicU64,
    records: AtomicU64,
    bytes: AtomicU64,
    heartbeats: AtomicU64,
    empty_frames: AtomicU64,
    dead_letters: AtomicU64,
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

impl Producer {
    /// Listens on `address`, for messages that are to go to `stream`.
    pub async fn bind(
        config: &SdkConfig,
        stream: &str,
        address: SocketAddr,
        settings: ProducerSettings,
    ) -> Result<Self, ProduceError> {
        let listener = TcpListener::bind(address)
            .await
            .map_err(|source| ProduceError::Listen { address, source })?;
        Ok(Self {
            listener,
            stream: Stream::new(config, stream, Retrieval::Polling),
            shared: Arc::new(Shared {
                put: Put::new(config, stream),
                settings,
                salt: rand::random(),
                stop: CancellationToken::new(),
                counters: Counters::default(),
            }),
        })
    }

    /// The address it listens on, with the port that the system picked if it was given 0.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Receives and puts until `shutdown` completes; then stops reading and puts what it has.
    pub async fn run(
        self,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<ProducerReport, ProduceError> {
        let Self { listener, stream, shared } = self;
        let mut connections = JoinSet::new();
        let result = tokio::select! {
            () = shutdown => Ok(()),
            error = refused(&stream) => Err(ProduceError::from(error)),
            () = listener::accept(listener, &shared, &mut connections) => Ok(()),
        };
        shared.stop.cancel();
        let limit = shared.settings.shutdown_limit;
        let drained =
            tokio::time::timeout(limit, async { while connections.join_next().await.is_some() {} });
        let report = match drained.await {
            Ok(()) => Ok(shared.counters.report()),
            Err(_) => {
                connections.shutdown().await;
                let ProducerReport { messages, put, .. } = shared.counters.report();
                Err(ProduceError::Lost { messages: messages.saturating_sub(put), limit })
            }
        };
        if let Ok(report) = &report {
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
        }
        result.and(report)
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

impl Counters {
    fn report(&self) -> ProducerReport {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ProducerReport {
            connections: read(&self.connections),
            messages: read(&self.messages),
            put: read(&self.put),
            records: read(&self.records),
            bytes: read(&self.bytes),
            heartbeats: read(&self.heartbeats),
            empty_frames: read(&self.empty_frames),
            dead_letters: read(&self.dead_letters),
        }
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
