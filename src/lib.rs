//! Tramline carries OCS train messages from a TCP socket to your code through Amazon Kinesis: in order,
//! and without losing one.
//!
//! OCS, the MBTA's Operations Control System, says where subway trains are, as lines of text over TCP.
//! The [`OcsListener`] wraps each line as a CloudEvent and writes it to a Kinesis stream. A [`Worker`]
//! takes shard leases in a DynamoDB table (that of the Java KCL), reads by enhanced fan-out or by
//! polling, hands messages to your [`Handler`] and checkpoints what it has finished.
//!
//! # A service in one page
//!
//! ```no_run
//! use std::convert::Infallible;
//!
//! use tramline::{Batch, Handler, StartPosition, Worker, shutdown_signal};
//!
//! struct GreenLine;
//!
//! impl Handler for GreenLine {
//!     type Error = Infallible;
//!
//!     async fn handle(&mut self, batch: &Batch) -> Result<(), Infallible> {
//!         for message in batch {
//!             println!("{} {}", message.sequence_number(), message.raw());
//!         }
//!         Ok(()) // The batch is finished: the checkpoint may pass it.
//!     }
//! }
//!
//! #[tokio::main]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let aws = aws_config::load_defaults(aws_config::BehaviorVersion::latest()).await;
//!     let worker = Worker::builder(&aws, "ctd-ocs-raw-messages", "rtr-green")
//!         .start(StartPosition::ServiceDay)
//!         .handler(|_shard| GreenLine) // One for each shard.
//!         .build()
//!         .await?;
//!     worker.run(shutdown_signal()).await?;
//!     Ok(())
//! }
//! ```
//!
//! # What it promises
//!
//! - Every record from the start position on is handled, or told on stderr if it cannot be decoded,
//!   before a checkpoint passes it. After a crash the records since the last checkpoint come again.
//! - Within a shard, messages come in order; a child shard starts when its parents are finished.
//! - A worker that lost a lease cannot move the shard's checkpoint.
//! - After a clean stop the next worker starts at once, and nothing comes twice.
//!
//! # Features
//!
//! `cli` is the program `tramline`; `local` is [`local`], embedded Kinesis, DynamoDB and S3 for tests.
//! Both are on by default; a service turns them off with `default-features = false`.

#[cfg(not(unix))]
compile_error!("Tramline runs on Unix: it uses its signals and file descriptors");

mod aws;
mod backoff;
#[cfg(feature = "cli")]
mod check;
pub mod checkpoint;
#[cfg(feature = "cli")]
pub mod cli;
pub mod feed;
mod handler;
mod host;
mod latency;
pub mod lease;
#[cfg(feature = "local")]
pub mod local;
pub mod ocs;
pub mod permissions;
mod produce;
pub mod record;
#[cfg(feature = "cli")]
mod redrive;
#[cfg(feature = "cli")]
mod replay;
pub mod shard;
mod source;
#[cfg(feature = "cli")]
mod telemetry;
mod worker;

pub use aws::{AwsError, AwsErrorKind};
pub use checkpoint::Checkpoints;
pub use handler::{
    Ack, Batch, Coalesce, Concurrent, DeadLetterError, DeadLetters, Deduplicate, Handler,
    MessagesFailed, OnFailure, Retries, RetryPer, StopReason, Tenure, Tolerance,
};
pub use latency::LatencySummary;
pub use lease::LeaseError;
#[cfg(feature = "cli")]
pub(crate) use produce::SPOOL_LIMIT_MIN_BYTES;
pub use produce::{
    BatchPolicy, Encoding, Failure, Lane, LaneStats, ListenerSettings, ListenerTls, OcsListener,
    PartitionKey, ProduceError, Producer, ProducerMonitor, ProducerReport, ProducerSettings,
    ProducerStats, PutStats, Receipt, RetryReason, SendError, SequencePer, ShardRate, SourceStats,
    Spool, SpoolError, StoredAt, TlsError, Waiting,
};
pub use record::Message;
pub use shard::{SequenceNumber, ShardId, StreamIdentifier};
pub use source::{Retrieval, SourceError};
pub use worker::{
    LeaseMoves, Load, MaxCheckpointAge, Messages, Observer, OnStuck, Poller, Received, Report,
    ShardStatus, StartPosition, Worker, WorkerBuilder, WorkerError, WorkerStatus, shutdown_signal,
};

/// The Rust of the documentation compiles.
#[cfg(doctest)]
mod documentation {
    #[doc = include_str!("../README.md")]
    struct Readme;
    #[doc = include_str!("../docs/embed.md")]
    struct Embed;
}
