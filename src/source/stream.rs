//! One stream: what it is, its shards, and our consumer on it.

use std::{
    error::Error,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use aws_sdk_kinesis::{
    Client,
    types::{ConsumerStatus, StreamDescriptionSummary, StreamStatus},
};
use aws_smithy_runtime_api::client::{orchestrator::HttpResponse, result::SdkError};
use aws_smithy_types::error::metadata::ProvideErrorMetadata;
use aws_types::SdkConfig;
use tokio::time::Instant;

use super::{Retrieval, SourceError};
use crate::{
    aws::{self, AwsError, AwsErrorKind, Reconnecting},
    backoff::Backoff,
    shard::{HashKeyRange, SequenceNumber, Shard, StreamIdentifier},
};

/// How long a stream or a consumer may take to become active.
const ACTIVE_LIMIT: Duration = Duration::from_secs(60);

/// A stream and how we read it. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Stream(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    client: Reconnecting<Client>,
    name: Arc<str>,
    region: String,
    retrieval: Retrieval,
    /// Our fan-out consumer, once it is registered.
    consumer: Mutex<Option<Consumer>>,
    was_read: AtomicBool,
    /// Set when the server turns out not to know fan-out.
    polling: OnceLock<()>,
    /// Set where this is one of several streams: it stands before the names of its shards.
    identifier: OnceLock<StreamIdentifier>,
}

#[derive(Debug, Clone)]
struct Consumer {
    name: String,
    arn: String,
}

impl Stream {
    pub(crate) fn new(config: &SdkConfig, name: &str, retrieval: Retrieval) -> Self {
        let region = config.region().map_or("none".to_owned(), ToString::to_string);
        let config = aws_sdk_kinesis::config::Builder::from(config)
            .timeout_config(aws::call_timeouts())
            // A subscription may be silent; its reader has its own limit.
            .stalled_stream_protection(
                aws_sdk_kinesis::config::StalledStreamProtectionConfig::disabled(),
            )
            .build();
        Self(Arc::new(Inner {
            client: Reconnecting::new(move || Client::from_conf(config.clone())),
            name: name.into(),
            region,
            retrieval,
            consumer: Mutex::new(None),
            was_read: AtomicBool::new(false),
            polling: OnceLock::new(),
            identifier: OnceLock::new(),
        }))
    }

    pub(crate) fn name(&self) -> &str {
        &self.0.name
    }

    pub(crate) fn shared_name(&self) -> Arc<str> {
        self.0.name.clone()
    }

    /// What stands before the names of its shards, where it is one of several streams.
    pub(crate) fn identifier(&self) -> Option<&StreamIdentifier> {
        self.0.identifier.get()
    }

    pub(super) fn client(&self) -> Client {
        self.0.client.get()
    }

    /// Lets the calls that follow go over new connections.
    pub(super) fn reconnect(&self) {
        self.0.client.reconnect();
    }

    /// Reads an error of the client.
    pub(super) fn failure<E>(
        &self,
        operation: &'static str,
        error: SdkError<E, HttpResponse>,
    ) -> AwsError
    where
        E: ProvideErrorMetadata + Error + 'static,
    {
        self.0.client.failure(operation, error)
    }

    /// The consumer to subscribe with; `None` means to poll.
    pub(super) fn consumer_arn(&self) -> Option<String> {
        match self.0.polling.get() {
            Some(()) => None,
            None => self.consumer_lock().as_ref().map(|consumer| consumer.arn.clone()),
        }
    }

    fn consumer_lock(&self) -> MutexGuard<'_, Option<Consumer>> {
        self.0.consumer.lock().unwrap_or_else(|poison| poison.into_inner())
    }

    /// Registers our fan-out consumer again if someone removed it, and tells whether that was so.
    pub(super) async fn repair_consumer(&self) -> Result<bool, SourceError> {
        let Some(consumer) = self.consumer_lock().clone() else { return Ok(false) };
        self.open(&consumer.name).await?;
        let removed = self.consumer_arn().as_deref() != Some(&consumer.arn);
        if removed {
            tracing::warn!(
                stream = self.name(),
                consumer = consumer.name,
                "the fan-out consumer was removed while in use: it is registered again"
            );
        }
        Ok(removed)
    }

    /// Whether any shard of the stream was ever read, and, with `true`, that one was.
    pub(super) fn was_read(&self, now: bool) -> bool {
        self.0.was_read.fetch_or(now, Ordering::Relaxed) || now
    }

    /// Polls from now on if that is allowed, and says so once.
    pub(super) fn fall_back_to_polling(&self, because: &AwsError) -> Result<(), AwsError> {
        if self.0.retrieval != Retrieval::Auto {
            return Err(because.clone());
        }
        if self.0.polling.set(()).is_ok() {
            tracing::warn!(
                stream = self.name(),
                "falling back to polling: enhanced fan-out cannot be used here ({because})"
            );
        }
        Ok(())
    }

    /// Waits until the stream can be read, and registers the fan-out consumer `name` if it is to be
    /// used.
    pub(crate) async fn open(&self, consumer_name: &str) -> Result<(), SourceError> {
        let stream_arn = self.until_active_stream().await?.stream_arn;
        if self.0.retrieval == Retrieval::Polling {
            return Ok(());
        }
        match self.register(&stream_arn, consumer_name).await {
            Ok(arn) => {
                *self.consumer_lock() = Some(Consumer { name: consumer_name.to_owned(), arn });
                Ok(())
            }
            Err(SourceError::Stream { source, .. })
                if source.kind() == AwsErrorKind::UnknownOperation =>
            {
                self.fall_back_to_polling(&source).map_err(|source| self.failed(source))
            }
            Err(error) => Err(error),
        }
    }

    /// Makes it one of several streams, whose shards are told apart by the stream's identifier.
    pub(crate) async fn be_one_of_several(&self) -> Result<(), SourceError> {
        let summary = self.until_active_stream().await?;
        // arn:aws:kinesis:us-east-1:123456789012:stream/name
        let account = summary.stream_arn.split(':').nth(4).unwrap_or_default();
        let epoch = summary.stream_creation_timestamp.secs();
        let identifier = StreamIdentifier::parse(&format!("{account}:{}:{epoch}", self.name()))
            .ok_or_else(|| SourceError::Identity {
                stream: self.name().to_owned(),
                arn: summary.stream_arn,
            })?;
        // It stays what it was first: the leases are kept under it.
        let _ = self.0.identifier.set(identifier);
        Ok(())
    }

    /// Waits until the stream is active and gives what Kinesis says of it.
    pub(crate) async fn until_active_stream(
        &self,
    ) -> Result<StreamDescriptionSummary, SourceError> {
        self.until_active("the stream", || async {
            let answer = self
                .client()
                .describe_stream_summary()
                .stream_name(self.name())
                .send()
                .await
                .map_err(|error| {
                    self.failed(self.failure("kinesis:DescribeStreamSummary", error))
                })?;
            Ok(answer.stream_description_summary.and_then(|stream| match stream.stream_status {
                StreamStatus::Active | StreamStatus::Updating => Some(stream),
                _ => None,
            }))
        })
        .await
    }

    async fn register(&self, stream_arn: &str, name: &str) -> Result<String, SourceError> {
        if self.consumer(stream_arn, name).await?.is_none() {
            let registered = self
                .client()
                .register_stream_consumer()
                .stream_arn(stream_arn)
                .consumer_name(name)
                .send()
                .await;
            match registered.map_err(|error| self.failure("kinesis:RegisterStreamConsumer", error))
            {
                Ok(_) => tracing::info!(
                    stream = self.name(),
                    consumer = name,
                    "fan-out consumer registered"
                ),
                // Another worker was faster.
                Err(error) if error.kind() == AwsErrorKind::InUse => {}
                Err(error) if error.kind() == AwsErrorKind::Quota => {
                    return Err(SourceError::ConsumerQuota {
                        stream: self.name().to_owned(),
                        consumer: name.to_owned(),
                        source: error,
                    });
                }
                Err(error) => return Err(self.failed(error)),
            }
        }
        self.until_active(&format!("fan-out consumer {name}"), || async {
            Ok(match self.consumer(stream_arn, name).await? {
                Some((arn, ConsumerStatus::Active)) => Some(arn),
                _ => None,
            })
        })
        .await
    }

    async fn consumer(
        &self,
        stream_arn: &str,
        name: &str,
    ) -> Result<Option<(String, ConsumerStatus)>, SourceError> {
        let answer = self
            .client()
            .describe_stream_consumer()
            .stream_arn(stream_arn)
            .consumer_name(name)
            .send()
            .await;
        match answer.map_err(|error| self.failure("kinesis:DescribeStreamConsumer", error)) {
            Ok(answer) => {
                Ok(answer.consumer_description.map(|c| (c.consumer_arn, c.consumer_status)))
            }
            Err(error) if error.kind() == AwsErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.failed(error)),
        }
    }

    /// Asks until `look` finds what it looks for.
    async fn until_active<T, L>(&self, what: &str, look: impl Fn() -> L) -> Result<T, SourceError>
    where
        L: Future<Output = Result<Option<T>, SourceError>>,
    {
        let give_up = Instant::now() + ACTIVE_LIMIT;
        // Accounts share these calls' rates: five registrations, twenty descriptions a second.
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(2));
        loop {
            match look().await {
                Ok(Some(found)) => return Ok(found),
                Ok(None) => {}
                Err(error) if error.is_throttled() => tracing::debug!("{error}; trying again"),
                Err(error) => return Err(error),
            }
            if Instant::now() >= give_up {
                return Err(SourceError::NotActive {
                    stream: self.name().to_owned(),
                    what: what.to_owned(),
                    waited_secs: ACTIVE_LIMIT.as_secs(),
                });
            }
            tokio::time::sleep(backoff.next_wait()).await;
        }
    }

    /// Every shard that the stream still lists, closed ones included.
    pub(crate) async fn shards(&self) -> Result<Vec<Shard>, SourceError> {
        self.list_shards().await.map_err(|source| self.failed(source))
    }

    pub(super) async fn list_shards(&self) -> Result<Vec<Shard>, AwsError> {
        let mut shards = Vec::new();
        let mut next_token: Option<String> = None;
        loop {
            // With a token neither the name nor a filter may be sent (AWS API reference).
            let call = self.client().list_shards();
            let call = match next_token {
                Some(token) => call.next_token(token),
                None => call.stream_name(self.name()),
            };
            let answer =
                call.send().await.map_err(|error| self.failure("kinesis:ListShards", error))?;
            let listed = answer.shards.unwrap_or_default();
            shards.extend(listed.into_iter().map(|listed| shard(listed, self.identifier())));
            next_token = answer.next_token;
            if next_token.is_none() {
                return Ok(shards);
            }
        }
    }

    fn failed(&self, source: AwsError) -> SourceError {
        let stream = self.name().to_owned();
        match source.kind() {
            AwsErrorKind::NotFound => {
                SourceError::NoStream { stream, region: self.0.region.clone() }
            }
            _ => SourceError::Stream { stream, source },
        }
    }
}

fn shard(shard: aws_sdk_kinesis::types::Shard, stream: Option<&StreamIdentifier>) -> Shard {
    let range = shard.sequence_number_range;
    let id = |name: String| stream.map_or_else(|| name.as_str().into(), |s| s.shard(&name));
    Shard {
        id: id(shard.shard_id),
        parents: [shard.parent_shard_id, shard.adjacent_parent_shard_id]
            .into_iter()
            .flatten()
            .map(id)
            .collect(),
        hash_key_range: shard.hash_key_range.as_ref().and_then(hash_key_range),
        closed: range.as_ref().is_some_and(|range| range.ending_sequence_number.is_some()),
        begins: range.and_then(|range| SequenceNumber::parse(range.starting_sequence_number)),
    }
}

pub(super) fn hash_key_range(range: &aws_sdk_kinesis::types::HashKeyRange) -> Option<HashKeyRange> {
    Some(HashKeyRange {
        start: range.starting_hash_key.parse().ok()?,
        end: range.ending_hash_key.parse().ok()?,
    })
}
