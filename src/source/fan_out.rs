//! Enhanced fan-out: `SubscribeToShard`.

use std::time::Duration;

use aws_sdk_kinesis::{
    operation::subscribe_to_shard::SubscribeToShardOutput,
    types::{ShardIteratorType, StartingPosition, SubscribeToShardEventStream},
};

use super::{Linked, Place, Read, Stream, children, record};
use crate::{
    aws::{self, AwsError},
    shard::{ChildShard, SequenceNumber, ShardId},
};

/// AWS sends an event, empty if need be, every few seconds. Silence means that the connection is dead.
const SILENCE_LIMIT: Duration = Duration::from_secs(30);

/// One subscription. AWS ends it after five minutes; the next goes on from the last continuation
/// sequence number.
pub(super) struct Subscription {
    output: SubscribeToShardOutput,
    /// Set by an event at the tip, without records, that names the child shards. The embedded server
    /// names them in every event after the shard closed, while records still follow, and always gives a
    /// continuation number; it shows the end by ending the stream after such an event. Believed if
    /// ListShards shows the shard closed.
    closing: Option<Vec<ChildShard>>,
    shard: ShardId,
}

pub(super) async fn subscribe(
    stream: &Stream,
    consumer_arn: &str,
    shard: &ShardId,
    place: &Place,
) -> Result<Subscription, AwsError> {
    let position = StartingPosition::builder();
    let position = match place {
        Place::TrimHorizon => position.r#type(ShardIteratorType::TrimHorizon),
        Place::Latest => position.r#type(ShardIteratorType::Latest),
        Place::Time(at) => {
            position.r#type(ShardIteratorType::AtTimestamp).timestamp(aws::sdk_time(*at))
        }
        // "At" and not "after": the continuation number may be the number of the next record, which
        // "after" would skip. What was delivered before is dropped by the reader.
        Place::At(number) => {
            position.r#type(ShardIteratorType::AtSequenceNumber).sequence_number(number.as_str())
        }
    };
    let output = stream
        .client()
        .subscribe_to_shard()
        .consumer_arn(consumer_arn)
        .shard_id(shard.name())
        .set_starting_position(position.build().ok())
        .send()
        .await
        .map_err(|error| stream.failure("kinesis:SubscribeToShard", error))?;
    tracing::debug!(stream = stream.name(), %shard, %place, "subscribed");
    Ok(Subscription { output, closing: None, shard: shard.clone() })
}

impl Subscription {
    pub(super) async fn next(&mut self, stream: &Stream) -> Result<Linked, AwsError> {
        loop {
            let event =
                match tokio::time::timeout(SILENCE_LIMIT, self.output.event_stream.recv()).await {
                    Ok(Ok(Some(event))) => event,
                    Ok(Ok(None)) => return self.over(stream).await,
                    Ok(Err(error)) => {
                        return Err(aws::stream_failure("kinesis:SubscribeToShard", error));
                    }
                    Err(_) => {
                        tracing::warn!(
                            shard = %self.shard,
                            "no event for {} s: subscribing again", SILENCE_LIMIT.as_secs()
                        );
                        stream.reconnect();
                        return Ok(Linked::Over);
                    }
                };
            let SubscribeToShardEventStream::SubscribeToShardEvent(event) = event else {
                continue;
            };
            let named = event.child_shards.as_deref();
            let children =
                named.map(|named| children(&self.shard, named)).filter(|c| !c.is_empty());
            let next = SequenceNumber::parse(event.continuation_sequence_number);
            let end = if next.is_none() { children.clone() } else { None };
            let at_tip = event.records.is_empty() && event.millis_behind_latest == 0;
            self.closing = children.filter(|_| at_tip);
            let read = Read {
                records: event.records.into_iter().filter_map(record).collect(),
                behind: u64::try_from(event.millis_behind_latest).ok().map(Duration::from_millis),
                end,
            };
            return Ok(Linked::Read { read, next });
        }
    }
    /// What it means that the stream of events has ended.
    async fn over(&mut self, stream: &Stream) -> Result<Linked, AwsError> {
        let Some(children) = self.closing.take() else { return Ok(Linked::Over) };
        let listed = stream.list_shards().await?;
        if !listed.iter().any(|shard| shard.id == self.shard && shard.closed) {
            tracing::warn!(
                stream = stream.name(), shard = %self.shard,
                "the server named child shards of an open shard: subscribing again"
            );
            return Ok(Linked::Over);
        }
        let read = Read { end: Some(children), ..Read::default() };
        Ok(Linked::Read { read, next: None })
    }
}
