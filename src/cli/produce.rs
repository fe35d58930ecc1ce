use std::{net::SocketAddr, time::Duration};

use aws_config::SdkConfig;
use clap::Args;
use tokio_util::sync::CancellationToken;

use super::{Outcome, values};
use crate::{PartitionKey, Producer, ProducerSettings, telemetry};

/// Receive OCS connections and write their messages to a stream
///
/// Listens for OCS connections, wraps each message as a CloudEvent and writes it to a stream, in the
/// order of its connection. It listens also while AWS is away, until the buffers are full.
///
/// LISTEN_PORT and KINESIS_STREAM are read as well, after the TRAMLINE_ variables.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tramline produce --stream ctd-ocs-raw-messages
  tramline produce --listen 127.0.0.1:8001 --stream ctd-ocs-raw-messages --partition-key connection
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

    /// How much of a connection may wait for Kinesis before its socket is not read any more
    #[arg(long, value_name = "SIZE", value_parser = values::size_bytes, default_value = "8MiB")]
    lane_buffer: u32,

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
        let settings = ProducerSettings {
            partition_key: self.partition_key,
            source: self.source.unwrap_or(defaults.source),
            stale_after: self.stale_after,
            max_message_bytes: self.max_message_size as usize,
            lane_bytes: self.lane_buffer,
            shutdown_limit: self.shutdown_limit,
        };
        let producer = Producer::bind(config, &self.stream, self.listen, settings).await?;
        let address = producer.local_addr()?;
        tracing::info!(%address, stream = self.stream, "listening for OCS connections");
        let _told = telemetry::tell_ready(stop.clone());
        producer.run(stop.cancelled_owned()).await?;
        Ok(())
    }
}
