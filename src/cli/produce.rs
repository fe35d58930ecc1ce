use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::Duration,
};

use aws_config::SdkConfig;
use clap::Args;
use ipnet::IpNet;
use tokio_util::sync::CancellationToken;

use super::{Outcome, Watched, values};
use crate::{
    BatchPolicy, Encoding, ListenerSettings, ListenerTls, OcsListener, PartitionKey,
    ProducerSettings, SequencePer, ShardRate, Spool,
    telemetry::{self, Served, Subject},
};

/// Receive OCS connections and write their messages to a stream
///
/// Listens for OCS connections, wraps each message as a CloudEvent and writes it to a stream, in the
/// order of its connection. It listens also while AWS is away: messages wait in the spool, a directory on
/// disk, and what an earlier run left there goes first. When the spool is full, the sockets are not read.
///
/// LISTEN_PORT and KINESIS_STREAM are read as well, after the TRAMLINE_ variables.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tramline produce --stream ctd-ocs-raw-messages
  tramline produce --stream ctd-ocs-raw-messages --encoding batch --gzip --type-delay RGPS=200ms
  tramline produce --stream ctd-ocs-raw-messages --allow 10.108.0.0/16 --tls-cert ocs.pem --tls-key ocs.key
  LISTEN_PORT=8001 KINESIS_STREAM=ctd-ocs-raw-messages tramline produce")]
pub(super) struct Produce {
    /// The address to listen on
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:8001")]
    listen: SocketAddr,

    /// The stream to write
    #[arg(long, value_name = "NAME")]
    stream: String,

    /// Who may connect: addresses or networks; may be repeated [default: everyone]
    #[arg(long, value_name = "CIDR", value_parser = values::network, value_delimiter = ',')]
    allow: Vec<IpNet>,

    /// How many may be connected at the same time
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_connections: u32,

    /// Take connections by TLS only, with this certificate (PEM, with those between it and its root)
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,

    /// The key of the certificate (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,

    /// Take only peers that show a certificate of these roots (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_client_ca: Option<PathBuf>,

    /// What the partition key of a connection is made of
    #[arg(long, value_enum, default_value_t)]
    partition_key: PartitionKey,

    /// The CloudEvents' source [default: HOSTNAME.mbta.com/trike]
    #[arg(long, value_name = "URI")]
    source: Option<String>,

    /// Close a connection that for this long sends no byte, or does not end a message
    #[arg(long, value_name = "DURATION", value_parser = values::duration, default_value = "5m")]
    stale_after: Duration,

    /// The longest OCS message; a longer one is written to stderr as a dead letter
    #[arg(long, value_name = "SIZE", value_parser = message_size, default_value = "64KiB")]
    max_message_size: u32,

    /// Who counts OCS sequence numbers, so that missing ones are told
    #[arg(long, value_enum, default_value_t)]
    sequence_per: SequencePer,

    /// What a record holds
    #[arg(long, value_enum, default_value_t)]
    encoding: Encoding,

    /// Compress records
    #[arg(long)]
    gzip: bool,

    /// How long a message may wait for others to share a record with
    #[arg(long, value_name = "DURATION", value_parser = values::delay, default_value = "1s")]
    batch_delay: Duration,

    /// The same for messages of a type; may be repeated [default: TMOV=0s]
    #[arg(long, value_name = "TYPE=DURATION", value_parser = values::type_delay, value_delimiter = ',')]
    type_delay: Vec<(String, Duration)>,

    /// So many messages do not wait any longer
    #[arg(long, value_name = "N", default_value_t = 500)]
    batch_messages: u64,

    /// A record of this size does not wait any longer
    #[arg(long, value_name = "SIZE", value_parser = values::size_bytes, default_value = "256KiB")]
    batch_size: u32,

    /// The most that a record of the stream may hold: as the stream is set, up to 10MiB
    #[arg(long, value_name = "SIZE", value_parser = values::record_size_bytes, default_value = "1MiB")]
    record_limit: u32,

    /// How much is put to a shard a second, with 1000 records for each MiB; more than the stream allows
    /// leaves it to its refusals
    #[arg(long, value_name = "SIZE", value_parser = values::size_bytes, default_value = "1MiB")]
    shard_rate: u32,

    /// The directory where messages wait for Kinesis, or none: then they wait in memory, and are lost if
    /// the process ends [default: spool/STREAM in the state directory of the service or the user]
    #[arg(long, value_name = "DIR|none", value_parser = values::spool)]
    spool: Option<Spool>,

    /// How much may wait there before no socket is read any more [default: 1GiB, in memory 64MiB]
    #[arg(long, value_name = "SIZE", value_parser = values::spool_size_bytes)]
    spool_limit: Option<u64>,

    /// The time from one write to the disk to the next: what arrives meanwhile shares one
    #[arg(long, value_name = "DURATION", value_parser = values::delay, default_value = "5ms")]
    spool_commit_delay: Duration,

    /// How long a clean stop may take
    #[arg(long, value_name = "DURATION", value_parser = values::duration, default_value = "30s")]
    shutdown_limit: Duration,
}

/// Any message must fit into a record of 1 MiB, also when every byte of it is escaped.
fn message_size(text: &str) -> Result<u32, String> {
    values::size_bytes(text)
        .ok()
        .filter(|bytes| *bytes <= 128 * 1024)
        .ok_or_else(|| "write a size from 1B to 128KiB, such as 64KiB".to_owned())
}

impl Produce {
    pub(super) async fn run(
        self,
        config: &SdkConfig,
        watched: Option<Watched>,
        stop: CancellationToken,
    ) -> Outcome {
        let monitor = Arc::new(OnceLock::new());
        // Also before the spool is open, which may take its time after a crash.
        let _told = telemetry::tell_of_producer(monitor.clone(), stop.clone());
        let _served = match watched {
            Some(Watched { address, recent }) => {
                let served = Served {
                    command: "produce",
                    title: self.stream.clone(),
                    subject: Subject::Producer(monitor.clone()),
                    recent,
                };
                Some(served.serve(telemetry::bind(address).await?))
            }
            None => None,
        };
        let defaults = ProducerSettings::default();
        let mut delays = BatchPolicy::default().delays;
        delays.extend(self.type_delay);
        let spool = self.spool.unwrap_or_default();
        let spool_limit_bytes = self.spool_limit.unwrap_or(match spool {
            Spool::Memory => 64 * 1024 * 1024,
            _ => defaults.spool_limit_bytes,
        });
        let producer = ProducerSettings {
            source: self.source.unwrap_or(defaults.source),
            encoding: self.encoding,
            gzip: self.gzip,
            batch: BatchPolicy {
                delay: self.batch_delay,
                delays,
                messages: self.batch_messages,
                bytes: u64::from(self.batch_size),
            },
            record_limit_bytes: self.record_limit as usize,
            shard_rate: ShardRate::of_bytes(self.shard_rate),
            spool,
            spool_limit_bytes,
            spool_commit_delay: self.spool_commit_delay,
            shutdown_limit: self.shutdown_limit,
        };
        let tls = self.tls_cert.zip(self.tls_key).map(|(certificates, key)| ListenerTls {
            certificates,
            key,
            client_roots: self.tls_client_ca,
        });
        let settings = ListenerSettings {
            allow: self.allow,
            max_connections: self.max_connections as usize,
            tls,
            partition_key: self.partition_key,
            stale_after: self.stale_after,
            max_message_bytes: self.max_message_size as usize,
            sequence_per: self.sequence_per,
            producer,
        };
        let producer = OcsListener::bind(config, &self.stream, self.listen, settings).await?;
        // There is one, so it was not set before.
        let _ = monitor.set(producer.monitor());
        let address = producer.local_addr()?;
        tracing::info!(%address, stream = self.stream, "listening for OCS connections");
        producer.run(stop.cancelled_owned()).await?;
        Ok(())
    }
}
