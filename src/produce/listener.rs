//! Listening for OCS connections.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use aws_types::SdkConfig;
use ipnet::IpNet;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time::Instant,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use super::{
    ListenerTls, MESSAGE_LIMIT_BYTES, ProduceError, Producer, ProducerMonitor, ProducerReport,
    ProducerSettings, SequencePer, add, connection::Connection, put::Kinesis,
};
use crate::source::{Retrieval, SourceError, Stream};

/// How often refused connections are told.
const TELL_INTERVAL: Duration = Duration::from_secs(10);
/// How often the log says how it goes.
const SUMMARY_INTERVAL: Duration = Duration::from_secs(60);

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
    /// Who may connect. Default: empty, and so everyone.
    pub allow: Vec<IpNet>,
    /// How many may be connected at the same time. Default: 256.
    pub max_connections: usize,
    /// Encryption. Default: none.
    pub tls: Option<ListenerTls>,
    /// What the partition key is made of.
    pub partition_key: PartitionKey,
    /// A connection is closed that for this long sends no byte, or does not end a message. Default: 5 min.
    pub stale_after: Duration,
    /// The longest OCS message in bytes, without its end byte: at most 128 KiB. A longer one is a dead letter.
    /// Default: 64 KiB.
    pub max_message_bytes: usize,
    /// Who counts OCS sequence numbers.
    pub sequence_per: SequencePer,
    /// How their messages are kept, batched and put.
    pub producer: ProducerSettings,
}

impl Default for ListenerSettings {
    fn default() -> Self {
        Self {
            allow: Vec::new(),
            max_connections: 256,
            tls: None,
            partition_key: PartitionKey::default(),
            stale_after: Duration::from_secs(300),
            max_message_bytes: 64 * 1024,
            sequence_per: SequencePer::default(),
            producer: ProducerSettings::default(),
        }
    }
}

/// Listens for OCS connections and writes their messages to a stream.
///
/// A connection carries OCS lines, each ended by EOT (0x04). What was received is in the
/// [spool](ProducerSettings::spool) before it is put; while that is full, the sockets are not read.
///
/// ```no_run
/// # async fn example(aws: &aws_types::SdkConfig) -> Result<(), Box<dyn std::error::Error>> {
/// use tramline::{ListenerSettings, OcsListener, shutdown_signal};
///
/// let settings = ListenerSettings { allow: vec!["10.0.0.0/8".parse()?], ..Default::default() };
/// let address = "0.0.0.0:8001".parse()?;
/// let listener = OcsListener::bind(aws, "ctd-ocs-raw-messages", address, settings).await?;
/// let report = listener.run(shutdown_signal()).await?;
/// println!("{} of {} messages are in the stream", report.put, report.messages);
/// # Ok(())
/// # }
/// ```
#[must_use = "it listens, and receives nothing until it runs"]
pub struct OcsListener {
    listener: TcpListener,
    stream: Stream,
    producer: Producer,
    door: Door,
}

impl OcsListener {
    /// Listens on `address`, for messages that are to go to `stream`. AWS may be away. An error says what is
    /// wrong with the address, the TLS files or the spool.
    pub async fn bind(
        config: &SdkConfig,
        stream: &str,
        address: SocketAddr,
        settings: ListenerSettings,
    ) -> Result<Self, ProduceError> {
        let ListenerSettings { allow, max_connections, tls, producer, .. } = settings;
        let tls = tls.map(|tls| tls.acceptor()).transpose()?;
        let listener = TcpListener::bind(address)
            .await
            .map_err(|source| ProduceError::Listen { address, source })?;
        let put = Kinesis::new(config, stream);
        let stream = Stream::new(config, stream, Retrieval::Polling);
        let producer = Producer::open(stream.clone(), put, producer).await?;
        let door = Door {
            allow,
            max_connections,
            places: Arc::new(Semaphore::new(max_connections.min(Semaphore::MAX_PERMITS))),
            tls,
            partition_key: settings.partition_key,
            stale_after: settings.stale_after,
            max_message_bytes: settings.max_message_bytes.min(MESSAGE_LIMIT_BYTES),
            sequence_per: settings.sequence_per,
            refused: Refused { untold: 0, tell_at: Instant::now() },
        };
        Ok(Self { listener, stream, producer, door })
    }

    /// The address it listens on, with the port that the system picked if it was given 0.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// For asking how it is while it runs.
    pub fn monitor(&self) -> ProducerMonitor {
        self.producer.monitor()
    }

    /// Receives and puts until `shutdown` completes; then stops reading and puts what it has. What
    /// Kinesis does not take within the shutdown limit stays in the spool, if there is one on disk.
    pub async fn run(
        self,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<ProducerReport, ProduceError> {
        let Self { listener, stream, producer, door } = self;
        let stop = CancellationToken::new();
        let mut connections = JoinSet::new();
        let result = tokio::select! {
            () = shutdown => Ok(()),
            error = refused(&stream) => Err(error.into()),
            () = producer.putting.stop.cancelled() => {
                Err(ProduceError::BrokeOff { waiting: producer.report().waiting() })
            }
            () = accept(listener, &producer, door, &stop, &mut connections) => Ok(()),
            () = summarize(&producer) => Ok(()),
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
            refused_connections = report.refused_connections,
            messages = report.messages,
            records = report.records,
            commits = report.commits,
            heartbeats = report.heartbeats,
            empty_frames = report.empty_frames,
            dead_letters = report.dead_letters,
            missing = report.missing,
            "producer stopped"
        );
        Ok(report)
    }
}

/// Completes if AWS says clearly that there is no such stream. An outage is no such answer, and neither are
/// credentials that have expired: what OCS sends is received all the same, and put when it works.
async fn refused(stream: &Stream) -> SourceError {
    use crate::aws::AwsErrorKind::{Clock, Credentials, Denied};
    match stream.until_active_stream().await {
        Ok(_) => tracing::info!(stream = stream.name(), "the stream is active"),
        Err(error @ SourceError::NoStream { .. }) => return error,
        Err(SourceError::Stream { source, stream })
            if matches!(source.kind(), Credentials | Clock) =>
        {
            tracing::error!(
                "{}; messages are received and wait until it works",
                SourceError::Stream { source, stream }
            )
        }
        // Putting needs no permission to describe.
        Err(SourceError::Stream { source, .. }) if source.kind() == Denied => {
            tracing::debug!("the stream was not checked: {source}");
        }
        Err(error) => tracing::warn!("{error}; messages are received and wait until it works"),
    }
    std::future::pending().await
}

/// Says now and then how it goes, for ever.
async fn summarize(producer: &Producer) {
    let monitor = producer.monitor();
    let mut before = producer.report();
    loop {
        tokio::time::sleep(SUMMARY_INTERVAL).await;
        let Ok(stats) = monitor.stats().await else { continue };
        let report = stats.report;
        let millis = |q| stats.puts.age_micros.value_at_quantile(q) as f64 / 1000.0;
        tracing::info!(
            stream = producer.stream,
            received = report.messages - before.messages,
            put = report.put - before.put,
            records = report.records - before.records,
            waiting = stats.waiting.messages,
            oldest = stats.waiting.oldest.map(tracing::field::display),
            "in the last {SUMMARY_INTERVAL:?}; since the start, half of the records were in Kinesis \
             {:.0} ms after their first message was received, and 99 % after {:.0} ms",
            millis(0.5),
            millis(0.99),
        );
        before = report;
    }
}

/// Accepts connections for ever.
async fn accept(
    listener: TcpListener,
    producer: &Producer,
    mut door: Door,
    stop: &CancellationToken,
    connections: &mut JoinSet<()>,
) {
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((socket, peer)) => door.open(socket, peer, producer, stop, connections),
                Err(error) => {
                    tracing::error!("cannot accept a connection: {error}; trying again in a second");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Whom it lets in, and how.
struct Door {
    allow: Vec<IpNet>,
    max_connections: usize,
    /// As many as there may be more connections.
    places: Arc<Semaphore>,
    tls: Option<TlsAcceptor>,
    partition_key: PartitionKey,
    stale_after: Duration,
    max_message_bytes: usize,
    sequence_per: SequencePer,
    refused: Refused,
}

/// Connections that were refused and not told yet.
struct Refused {
    untold: u64,
    tell_at: Instant,
}

impl Door {
    /// Serves a connection until it closes and Kinesis has all of its messages.
    fn open(
        &mut self,
        socket: TcpStream,
        peer: SocketAddr,
        producer: &Producer,
        stop: &CancellationToken,
        connections: &mut JoinSet<()>,
    ) {
        // An IPv4 peer of an IPv6 socket is an IPv4 peer.
        let canonical =
            |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
        let peer = canonical(peer);
        let counters = &producer.shared.counters;
        let allowed =
            self.allow.is_empty() || self.allow.iter().any(|net| net.contains(&peer.ip()));
        let place = match allowed {
            true => self.places.clone().try_acquire_owned().map_err(|_| {
                format!("there are {} connections, as many as there may be", self.max_connections)
            }),
            false => Err("its address is not allowed".to_owned()),
        };
        let place = match place {
            Ok(place) => place,
            Err(reason) => {
                add(&counters.refused_connections, 1);
                return self.refused.tell(peer, &reason, Instant::now());
            }
        };
        add(&counters.connections, 1);
        let local = match socket.local_addr() {
            Ok(local) => canonical(local),
            Err(error) => return tracing::warn!(%peer, "connection closed at once: {error}"),
        };
        let name = connection_name(local, peer);
        let span = tracing::info_span!("connection", name);
        let connection = Connection {
            shared: producer.shared.clone(),
            partition_key: partition_key(self.partition_key, &producer.salt, local, peer),
            peer: peer.ip(),
            counted_as: match self.sequence_per {
                SequencePer::Host => peer.ip().to_string(),
                SequencePer::Connection => name.clone(),
            },
            name,
            stale_after: self.stale_after,
            max_message_bytes: self.max_message_bytes,
            stop: stop.clone(),
        };
        connections.spawn(connection.serve(socket, self.tls.clone(), place).instrument(span));
    }
}

impl Refused {
    /// Tells of one at once, and of those that follow now and then.
    fn tell(&mut self, peer: SocketAddr, reason: &str, now: Instant) {
        self.untold += 1;
        if now >= self.tell_at {
            self.tell_at = now + TELL_INTERVAL;
            let refused = std::mem::take(&mut self.untold);
            tracing::warn!(%peer, refused, "connection refused: {reason}");
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
