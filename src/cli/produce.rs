use std::{net::SocketAddr, time::Duration};

use aws_config::SdkConfig;
use clap::Args;
use tokio_util::sync::CancellationToken;

use super::{Outcome, values};
use crate::{
    BatchPolicy, Encoding, ListenerSettings, OcsListener, PartitionKey, ProducerSettings, Spool,
};

/// Listens for OCS connections, wraps each message as a CloudEvent and writes it to a stream, in the
/// order of its connection. It listens also while AWS is away: messages wait in the spool, a directory on
/// disk, and what an earlier run left there goes first. When the spool is full, the sockets are not read.
///
/// LISTEN_PORT and KINESIS_STREAM are read as well, after the TRAMLINE_ variables.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tramline produce --stream ctd-ocs-raw-messages
  tramline produce --listen 127.0.0.1:8001 --stream ctd-ocs-raw-messages --partition-key connection
  tramline produce --stream ctd-ocs-raw-messages --encoding batch --gzip --type-delay RGPS=200ms
  LISTEN_PORT=8001 KINESIS_STREAM=ctd-ocs-raw-messages tramline produce")]
pub(super) struct Produce {
    /// The address to listen on
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:8001")]
    listen: SocketAddr,

    /// The stream to write
    #[arg(long, value_name = "NAME")]
    stream: String,

    /// What the partition key of a connection is made of
    #[arg(long, value_enum, default_value_t)]
    partition_key: PartitionKey,

    /// The CloudEvents' source [default: HOSTNAME.mbta.com/trike]
    #[arg(long, value_name = "URI")]
    source: Option<String>,

    /// Close a connection that sends no byte for this long
    #[arg(long, value_name = "DURATION", value_parser = values::duration, default_value = "5m")]
    stale_after: Duration,

    /// The longest OCS message; a longer one is written to stderr as a dead letter
    #[arg(long, value_name = "SIZE", value_parser = message_size, default_value = "64KiB")]
    max_message_size: u32,

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
    pub(super) async fn run(self, config: &SdkConfig, stop: CancellationToken) -> Outcome {
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
            spool,
            spool_limit_bytes,
            spool_commit_delay: self.spool_commit_delay,
            shutdown_limit: self.shutdown_limit,
            ..defaults
        };
        let settings = ListenerSettings {
            partition_key: self.partition_key,
            stale_after: self.stale_after,
            max_message_bytes: self.max_message_size as usize,
            producer,
        };
        let producer = OcsListener::bind(config, &self.stream, self.listen, settings).await?;
        let address = producer.local_addr()?;
        tracing::info!(%address, stream = self.stream, "listening for OCS connections");
        producer.run(stop.cancelled_owned()).await?;
        Ok(())
    }
}
