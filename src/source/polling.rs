//! Polling: `GetShardIterator` and `GetRecords`.

use std::time::Duration;

use aws_sdk_kinesis::types::ShardIteratorType;
use tokio::time::{Instant, sleep_until};

use super::{Linked, Place, Read, Stream, children, followers, record};
use crate::{
    aws::{self, AwsError, AwsErrorKind},
    shard::{ChildShard, ShardId},
};

/// The most records that one GetRecords call may return (AWS API reference).
const RECORDS_PER_READ: usize = 10_000;
/// How many the first call asks for, which does not know how large they are.
const RECORDS_AT_FIRST: usize = 1000;
/// How much a call is to give: what a shard allows in a second. With more, memory grows; with less, calls.
const READ_BYTES: usize = 2 * 1024 * 1024;
/// A shard allows five reads a second ...
const READ_INTERVAL: Duration = Duration::from_millis(200);
/// ... and two MiB a second: after a larger read, the next one is refused until its bytes are paid off.
const SHARD_BYTES_PER_SEC: f64 = 2.0 * 1024.0 * 1024.0;
/// How long to wait after a read that reached the tip.
const IDLE_INTERVAL: Duration = Duration::from_secs(1);

/// A place in a shard that moves on with every read.
pub(super) struct ShardIterator {
    /// `None` when the server gave no next one although the shard is open.
    pub(super) token: Option<String>,
    shard: ShardId,
    not_before: Instant,
    /// How many records the next call asks for.
    limit: usize,
}

pub(super) async fn iterate(
    stream: &Stream,
    shard: &ShardId,
    place: &Place,
) -> Result<ShardIterator, AwsError> {
    let call =
        stream.client().get_shard_iterator().stream_name(stream.name()).shard_id(shard.name());
    let call = match place {
        Place::TrimHorizon => call.shard_iterator_type(ShardIteratorType::TrimHorizon),
        Place::Latest => call.shard_iterator_type(ShardIteratorType::Latest),
        Place::Time(at) => {
            call.shard_iterator_type(ShardIteratorType::AtTimestamp).timestamp(aws::sdk_time(*at))
        }
        Place::At(number) => call
            .shard_iterator_type(ShardIteratorType::AtSequenceNumber)
            .starting_sequence_number(number.as_str()),
    };
    let answer =
        call.send().await.map_err(|error| stream.failure("kinesis:GetShardIterator", error))?;
    tracing::debug!(stream = stream.name(), %shard, %place, "shard iterator opened");
    Ok(ShardIterator {
        token: answer.shard_iterator,
        shard: shard.clone(),
        not_before: Instant::now(),
        limit: RECORDS_AT_FIRST,
    })
}

impl ShardIterator {
    pub(super) async fn next(&mut self, stream: &Stream) -> Result<Linked, AwsError> {
        sleep_until(self.not_before).await;
        let Some(token) = &self.token else { return Ok(Linked::Over) };
        let asked_at = Instant::now();
        let answer = stream
            .client()
            .get_records()
            .shard_iterator(token)
            .limit(i32::try_from(self.limit).unwrap_or(i32::MAX))
            .send()
            .await
            .map_err(|error| stream.failure("kinesis:GetRecords", error));
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) if error.kind() == AwsErrorKind::ExpiredIterator => {
                tracing::info!(stream = stream.name(), shard = %self.shard, "shard iterator expired: opening another");
                return Ok(Linked::Over);
            }
            Err(error) => return Err(error),
        };
        self.token = answer.next_shard_iterator;
        let end = match self.token {
            Some(_) => None,
            None => self.end(stream, answer.child_shards.as_deref()).await?,
        };
        let behind = answer
            .millis_behind_latest
            .and_then(|millis| u64::try_from(millis).ok())
            .map(Duration::from_millis);
        let read =
            Read { records: answer.records.into_iter().filter_map(record).collect(), behind, end };
        self.not_before = asked_at + pause(&read);
        self.limit = limit(&read).unwrap_or(self.limit);
        Ok(Linked::Read { read, next: None })
    }

    /// The child shards, if the shard has really ended. A missing iterator alone may be a malformed
    /// answer: believed is one that names the child shards, or a shard that ListShards shows closed.
    async fn end(
        &self,
        stream: &Stream,
        named: Option<&[aws_sdk_kinesis::types::ChildShard]>,
    ) -> Result<Option<Vec<ChildShard>>, AwsError> {
        if let Some(named) = named.filter(|named| !named.is_empty()) {
            return Ok(Some(children(&self.shard, named)));
        }
        let listed = stream.list_shards().await?;
        if !listed.iter().any(|shard| shard.id == self.shard && shard.closed) {
            tracing::warn!(
                stream = stream.name(), shard = %self.shard,
                "the server gave no next iterator for an open shard: opening another"
            );
            return Ok(None);
        }
        Ok(Some(followers(listed, &self.shard)))
    }
}

/// How long to wait from one read to the next.
fn pause(read: &Read) -> Duration {
    let bytes = Duration::from_secs_f64(read.size_bytes() as f64 / SHARD_BYTES_PER_SEC);
    if read.reached_tip() { IDLE_INTERVAL } else { READ_INTERVAL.max(bytes) }
}

/// How many records make a call of a good size, by those of the last one.
fn limit(read: &Read) -> Option<usize> {
    let average = read.size_bytes().div_ceil(read.records.len().max(1)).max(1);
    (!read.records.is_empty()).then(|| (READ_BYTES / average).clamp(1, RECORDS_PER_READ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{record::Record, shard::SequenceNumber};

    fn read(size_bytes: usize, behind: Option<Duration>) -> Read {
        let record = Record {
            sequence_number: SequenceNumber::parse("1").expect("a number"),
            partition_key: String::new(),
            arrived_at: None,
            data: vec![0; size_bytes].into(),
        };
        let records = if size_bytes > 0 { vec![record] } else { Vec::new() };
        Read { records, behind, end: None }
    }

    #[test]
    fn reads_stay_within_the_limits_of_a_shard_and_idle_only_at_the_tip() {
        assert_eq!(pause(&read(0, None)), IDLE_INTERVAL);
        assert_eq!(pause(&read(0, Some(Duration::ZERO))), IDLE_INTERVAL);
        assert_eq!(pause(&read(0, Some(Duration::from_millis(5)))), READ_INTERVAL);
        assert_eq!(pause(&read(100, Some(Duration::ZERO))), READ_INTERVAL);
        assert_eq!(pause(&read(10 * 1024 * 1024, None)), Duration::from_secs(5));
    }

    #[test]
    fn a_read_asks_for_as_many_records_as_a_shard_gives_in_a_second() {
        assert_eq!(limit(&read(0, None)), None, "nothing is known");
        assert_eq!(limit(&read(1, None)), Some(RECORDS_PER_READ));
        assert_eq!(limit(&read(1024, None)), Some(2048));
        assert_eq!(limit(&read(10 * 1024 * 1024, None)), Some(1));
    }
}
