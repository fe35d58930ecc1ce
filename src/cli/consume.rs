use std::time::Duration;

use aws_config::SdkConfig;
use clap::Args;
use tokio_util::sync::CancellationToken;

use super::{Outcome, values};
use crate::{
    Retrieval, StartPosition, Worker,
    feed::{Format, Stdout},
};

/// Reads a stream as one worker of an application and writes its messages to stdout, which carries
/// nothing else. It goes on where the application's workers stopped.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  tramline consume --stream ctd-ocs-raw-messages --app rtr-green
  tramline consume --stream ctd-ocs-raw-messages --app look --start latest --format raw
  tramline consume --stream ctd-ocs-raw-messages --app day --start service-day --exit-when-idle 10s")]
pub(super) struct Consume {
    /// The stream to read
    #[arg(long, value_name = "NAME")]
    pub(super) stream: String,

    /// The application: workers of one application share the shards
    #[arg(long, value_name = "NAME")]
    pub(super) app: String,

    /// How a message is written
    #[arg(long, value_enum, default_value_t)]
    pub(super) format: Format,

    /// How records are fetched
    #[arg(long, value_enum, default_value_t)]
    retrieval: Retrieval,

    /// Where shards without a checkpoint start: latest, trim-horizon, service-day or an RFC 3339 time
    #[arg(long, value_name = "POSITION", value_parser = values::start, default_value = "trim-horizon")]
    pub(super) start: StartPosition,

    /// The DynamoDB table of the leases [default: the application's name]
    #[arg(long, value_name = "NAME")]
    lease_table: Option<String>,

    /// The name of this worker, which no other may have [default: host, process id, a random part]
    #[arg(long, value_name = "ID")]
    worker_id: Option<String>,

    /// Stop when every shard was read to its tip and nothing came for this long
    #[arg(long, value_name = "DURATION", value_parser = values::duration)]
    pub(super) exit_when_idle: Option<Duration>,

    /// How long a lease lasts without renewal; the same for all workers of the application
    #[arg(long, value_name = "DURATION", value_parser = values::lease_duration, default_value = "10s")]
    lease_duration: Duration,

    /// The most shards that this worker reads [default: no limit]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_leases: Option<u32>,

    /// How long a worker that is asked to hand a shard over may take before it is taken
    #[arg(long, value_name = "DURATION", value_parser = values::duration, default_value = "30s")]
    hand_over_limit: Duration,

    /// How often progress is stored
    #[arg(long, value_name = "DURATION", value_parser = values::duration, default_value = "5s")]
    checkpoint_interval: Duration,

    /// How many bytes of records a shard may hold that wait to be written
    #[arg(long, value_name = "SIZE", value_parser = values::size_bytes, default_value = "8MiB")]
    prefetch: u32,

    /// How long a clean stop may take
    #[arg(long, value_name = "DURATION", value_parser = values::duration, default_value = "30s")]
    shutdown_limit: Duration,
}

impl Consume {
    pub(super) async fn run(self, config: &SdkConfig, stop: CancellationToken) -> Outcome {
        let stdout = Stdout::new(self.format)?;
        let feed = stdout.clone();
        let mut worker = Worker::builder(config, self.stream, self.app)
            .start(self.start)
            .retrieval(self.retrieval)
            .lease_duration(self.lease_duration)
            .hand_over_limit(self.hand_over_limit)
            .max_leases(self.max_leases.map_or(usize::MAX, |limit| limit as usize))
            .checkpoint_interval(self.checkpoint_interval)
            .prefetch_bytes(self.prefetch)
            .shutdown_limit(self.shutdown_limit);
        if let Some(table) = self.lease_table {
            worker = worker.lease_table(table);
        }
        if let Some(id) = self.worker_id {
            worker = worker.worker_id(id);
        }
        if let Some(limit) = self.exit_when_idle {
            worker = worker.stop_when_idle(limit);
        }
        let worker = tokio::select! {
            built = worker.handler(move |_| feed.clone()).build() => built?,
            () = stop.cancelled() => return Ok(()),
        };
        let shutdown = async {
            tokio::select! {
                () = stop.cancelled() => {}
                () = stdout.closed() => tracing::info!("the reader of stdout has gone: stopping"),
            }
        };
        worker.run(shutdown).await?;
        Ok(())
    }
}
