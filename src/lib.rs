//! Tramline carries OCS train messages from a TCP socket to your code through Amazon Kinesis: in order,
//! and without losing one.
//!
//! OCS, the MBTA's Operations Control System, says where subway trains are, as lines of text over TCP.
//! Tramline is both ends of the stream between it and the services that need it:
//!
//! - An [`OcsListener`] receives the connections, wraps each line as a CloudEvent and puts it into a Kinesis
//!   stream, through outages of AWS. A [`Producer`] does the same with messages of your own.
//! - A [`Worker`] takes shard leases in a DynamoDB table (that of the Java KCL), reads by enhanced fan-out or
//!   by polling, gives the messages to your code, and checkpoints what that has finished.
//!
//! It is for these messages: a record of the stream that holds anything but raw OCS messages goes to the
//! [dead letters](DeadLetters). It runs on Tokio, and on Unix.
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
//! # Three fronts
//!
//! One engine, and three ways to get at its messages:
//!
//! | front | a message is finished | for |
//! |---|---|---|
//! | [`WorkerBuilder::handler`] | when [`Handler::handle`] returns `Ok` for its batch, or is [acknowledged](Batch::ack_later) | most services; the only one with [state](Handler::snapshot) |
//! | [`WorkerBuilder::messages`] | by [`Received::ack`] | code that is built on a [`Stream`](tokio_stream::Stream), or hands messages to other tasks |
//! | [`WorkerBuilder::poller`] | by the next [`Poller::poll`] | code with a loop of its own |
//!
//! [`Coalesce`], [`Deduplicate`] and [`Concurrent`] are handlers for services that are slower than the
//! stream, that must not act twice, or that wait for others. To look at a worker while it runs, ask its
//! [`Observer`]; at a producer, its [`ProducerMonitor`].
//!
//! # Both ends, without AWS
//!
//! [`local`] has Kinesis, DynamoDB and S3 in this process: for the tests of your service.
//!
//! ```
//! # #[cfg(feature = "local")]
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::time::Duration;
//!
//! use tokio_stream::StreamExt as _;
//! use tramline::{Producer, ProducerSettings, Spool, Worker, local::Local};
//!
//! let local = Local::start(Default::default()).await?;
//! let aws = local.sdk_config();
//! let kinesis = aws_sdk_kinesis::Client::new(&aws);
//! kinesis.create_stream().stream_name("ocs").shard_count(1).send().await?;
//!
//! let settings = ProducerSettings { spool: Spool::Memory, ..ProducerSettings::default() };
//! let producer = Producer::start(&aws, "ocs", settings).await?;
//! producer.lane("my-source", None).send("4994,TSCH,02:00:06,R,RLD,W").await?;
//! producer.close().await?;
//!
//! let worker = Worker::builder(&aws, "ocs", "test").stop_when_idle(Duration::from_secs(1));
//! let mut messages = worker.messages().await?;
//! while let Some(message) = messages.next().await {
//!     assert_eq!(message.raw(), "4994,TSCH,02:00:06,R,RLD,W");
//!     message.ack();
//! }
//! assert_eq!(messages.finish().await?.messages, 1);
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "local"))]
//! # fn main() {}
//! ```
//!
//! # What it promises
//!
//! - P1: every record from the start position on is handled, or is a dead letter, before a checkpoint passes
//!   it. After a crash the records since the last checkpoint come again.
//! - P2: within a shard, messages come in order.
//! - P3: checkpoints only go forward, and never past what your code has finished.
//! - P4: a worker that lost a lease cannot move the shard's checkpoint.
//! - P5: a child shard starts when its parents are finished.
//! - P6: after a clean stop the next worker starts at once, and nothing comes twice.
//! - P7: messages of one OCS connection, or of one [`Lane`], stand in the stream in their order.
//! - P8: what is in the [spool on disk](Spool) is in the stream at least once, also after `kill -9` or an
//!   outage of AWS.
//! - P9: bad input stops nothing, and is never dropped in silence.
//!
//! # Where things are
//!
//! What a service needs is here at the top. The modules have what is behind it, for tools and for the curious:
//!
//! | module | what is in it |
//! |---|---|
//! | [`ocs`] | what OCS sends and what it says; frames, CloudEvents, the service day, made-up traffic |
//! | [`record`] | from the bytes of a Kinesis record to messages |
//! | [`shard`] | shards and sequence numbers |
//! | [`lease`] | who reads which shard: the table, what a worker decides from it, an operator's repairs |
//! | [`checkpoint`] | how far a shard is finished, and where that is kept, with state or without |
//! | [`feed`] | handlers that write to standard output or to an archive in S3 |
//! | [`permissions`] | the IAM actions that are called |
//! | [`local`] | Kinesis, DynamoDB and S3 in this process |
//! | `cli` | the program `tramline` |
//!
//! # Features
//!
//! | feature | what it adds |
//! |---|---|
//! | `cli` | the program `tramline`, with metrics, a status page and feeds over sockets |
//! | `local` | [`local`], the embedded servers |
//!
//! Both are on by default, for who builds the program; a service leaves them out with
//! `default-features = false`, and may turn `local` on for its tests.
//!
//! # Types of others
//!
//! These crates are part of the interface, so that a service uses the same major versions: `aws-types` 1
//! (whose `SdkConfig` is that of `aws-config`), `jiff` 0.2 for times, `tokio-stream` 0.1 for [`Messages`],
//! `ipnet` 2 for [`ListenerSettings::allow`], `hdrhistogram` 7 in [`PutStats`].
//!
//! What goes wrong is told by `tracing`, with what to do about it; set up a subscriber to read it.

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
