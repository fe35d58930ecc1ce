//! Where records come from: enhanced fan-out, or polling where the server does not know it.
//!
//! A [`ShardReader`] hands out the records of one shard in order, whatever happens to subscriptions
//! and iterators underneath.

mod fan_out;
mod lag;
mod polling;
mod prefetch;
mod stream;
mod streams;

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::Deserialize;
use tokio::time::{Instant, sleep_until};

#[cfg(feature = "cli")]
pub(crate) use lag::Lag;
pub(crate) use prefetch::{Failing, Prefetch};
pub(crate) use stream::Stream;
pub(crate) use streams::Streams;

use crate::{
    aws::{AwsError, AwsErrorKind},
    record::Record,
    shard::{ChildShard, SequenceNumber, Shard, ShardId},
};

/// How records are fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Retrieval {
    /// Fan-out, or polling if the server does not know fan-out (Kinesalite, moto).
    #[default]
    Auto,
    /// `SubscribeToShard`: records are pushed, 2 MB/s a shard for this application alone.
    FanOut,
    /// `GetRecords`: 5 reads and 2 MB a second and shard, shared by all applications that poll.
    Polling,
}

/// Why a shard cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The stream could not be looked at.
    #[error("stream {stream}: {source}")]
    Stream {
        /// The stream.
        stream: String,
        /// What Kinesis said.
        source: AwsError,
    },
    /// There is no such stream.
    #[error(
        "stream {stream} does not exist in region {region}; check the name, the region and the \
         account, or create the stream"
    )]
    NoStream {
        /// The stream.
        stream: String,
        /// The region that was asked.
        region: String,
    },
    /// The fan-out consumer could not be registered.
    #[error(
        "stream {stream}: fan-out consumer {consumer} cannot be registered: {source}; a stream has a \
         quota of consumers, and an account one of registrations a second: try again, remove a \
         consumer, ask for more, or use polling"
    )]
    ConsumerQuota {
        /// The stream.
        stream: String,
        /// The consumer's name.
        consumer: String,
        /// What Kinesis said.
        source: AwsError,
    },
    /// The stream or the fan-out consumer did not become active.
    #[error("stream {stream}: {what} is not active after {waited_secs} s; try again")]
    NotActive {
        /// The stream.
        stream: String,
        /// What was waited for.
        what: String,
        /// How long.
        waited_secs: u64,
    },
    /// Kinesis says of a stream neither whose it is nor when it was made.
    #[error(
        "stream {stream} cannot be read beside others: its ARN {arn:?} or its time of creation does not \
         tell it apart; read it by a worker of its own"
    )]
    Identity {
        /// The stream.
        stream: String,
        /// Its ARN.
        arn: String,
    },
    /// A shard could not be read.
    #[error("stream {stream}, shard {}, at {place}: {source}", shard.name())]
    Shard {
        /// The stream.
        stream: String,
        /// The shard.
        shard: ShardId,
        /// Where reading was to go on.
        place: String,
        /// What Kinesis said.
        source: AwsError,
    },
}

/// How much later our clock may be than the server's.
const PIN_MARGIN: SignedDuration = SignedDuration::from_secs(5);

/// How long to wait from one opening of a shard to the next: five a second are allowed (AWS API
/// reference, GetShardIterator). What is opened lasts for minutes, unless a server misbehaves.
const OPEN_INTERVAL: Duration = Duration::from_millis(200);

/// Where in a shard reading goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// With the oldest record.
    TrimHorizon,
    /// With what arrives from now on. Never survives the first attempt to open the shard: see
    /// [`Place::pin`].
    Latest,
    /// With the first record that arrived at or after this time.
    Time(Timestamp),
    /// With the record that has this number, or the next one.
    At(SequenceNumber),
}

impl Place {
    /// The place to open the shard at, now. What is left to open it at another time is concrete:
    /// asking for the latest again, after an expired iterator or a lost connection, would skip what
    /// arrived in between, so `latest` becomes the time of the first attempt.
    fn pin(&mut self, now: Timestamp) -> Self {
        let place = self.clone();
        if place == Self::Latest {
            *self = Self::Time(Self::pin_time(now));
        }
        place
    }

    /// The time that stands for "now by the server's clock", which may be behind ours. A few records
    /// from before are harmless, a gap is not.
    pub(crate) fn pin_time(now: Timestamp) -> Timestamp {
        now.checked_sub(PIN_MARGIN).unwrap_or(now)
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::TrimHorizon => f.write_str("trim horizon"),
            Self::Latest => f.write_str("latest"),
            Self::Time(at) => write!(f, "{at}"),
            Self::At(number) => write!(f, "sequence number {number}"),
        }
    }
}

/// What one read of a shard gave.
#[derive(Debug, Default)]
pub(crate) struct Read {
    pub records: Vec<Record>,
    /// How far behind the tip of the stream this read was, where the server tells.
    pub behind: Option<Duration>,
    /// The shard is closed and read to its end; these shards follow it.
    pub end: Option<Vec<ChildShard>>,
}

impl Read {
    /// The same in pieces of about so many bytes, so that what is made of the records is not made of all of
    /// them at once. Only the last one ends the shard.
    fn pieces(self, size_bytes: usize) -> Vec<Self> {
        let Self { records, behind, end } = self;
        let mut records = records.into_iter();
        let mut pieces: Vec<Self> = Vec::new();
        while pieces.is_empty() || !records.as_slice().is_empty() {
            let mut bytes = 0;
            let fitting = records.as_slice().iter().take_while(|record| {
                let fits = bytes < size_bytes;
                bytes += record.data.len();
                fits
            });
            let length = fitting.count();
            pieces.push(Self {
                records: records.by_ref().take(length).collect(),
                behind,
                end: None,
            });
        }
        if let Some(last) = pieces.last_mut() {
            last.end = end;
        }
        pieces
    }

    fn size_bytes(&self) -> usize {
        self.records.iter().map(|record| record.data.len() + record.partition_key.len()).sum()
    }

    /// Whether this read found that there is nothing more. Servers report "not behind" while they have
    /// more, and empty reads while they are behind.
    pub(crate) fn reached_tip(&self) -> bool {
        self.records.is_empty() && self.behind.is_none_or(|behind| behind.is_zero())
    }
}

/// Reads one shard, in order.
pub(crate) struct ShardReader {
    stream: Stream,
    shard: ShardId,
    place: Place,
    /// The newest record handed out. Servers may repeat records when asked to go on, never before it.
    delivered: Option<SequenceNumber>,
    link: Link,
    open_not_before: Instant,
    /// The time that reading starts at, if it is a time.
    from: Option<Timestamp>,
}

enum Link {
    Closed,
    Subscription(Box<fan_out::Subscription>),
    Iterator(polling::ShardIterator),
}

/// What came over a link.
enum Linked {
    Read {
        read: Read,
        next: Option<SequenceNumber>,
    },
    /// The link has ended in the ordinary way: open the next one.
    Over,
}

impl ShardReader {
    pub(crate) fn new(stream: Stream, shard: ShardId, place: Place) -> Self {
        Self {
            stream,
            shard,
            place,
            delivered: None,
            link: Link::Closed,
            open_not_before: Instant::now(),
            from: None,
        }
    }

    /// Waits for the next records, which may be none.
    ///
    /// After an error the next call opens the shard again where it left off. After `end` there is
    /// nothing more to read.
    pub(crate) async fn read(&mut self) -> Result<Read, SourceError> {
        match self.try_read().await {
            Ok(read) => Ok(read),
            Err(error) if error.kind() == AwsErrorKind::NotFound => {
                self.link = Link::Closed;
                // The shard's records have expired, or our consumer or the whole stream is gone.
                let listed = self.stream.shards().await?;
                if listed.iter().any(|shard| shard.id == self.shard) {
                    if self.stream.repair_consumer().await? {
                        return Ok(Read::default());
                    }
                    return Err(self.failed(error));
                }
                tracing::warn!(
                    stream = self.stream.name(), shard = %self.shard,
                    "shard no longer exists: its records have expired; it counts as finished"
                );
                Ok(Read { end: Some(Vec::new()), ..Read::default() })
            }
            Err(error) => {
                // An iterator outlives a call that was throttled or got no answer.
                if !(error.is_transient() && matches!(self.link, Link::Iterator(_))) {
                    self.link = Link::Closed;
                }
                Err(self.failed(error))
            }
        }
    }

    async fn try_read(&mut self) -> Result<Read, AwsError> {
        loop {
            let linked = match &mut self.link {
                Link::Closed => {
                    sleep_until(self.open_not_before).await;
                    self.open_not_before = Instant::now() + OPEN_INTERVAL;
                    let now = Timestamp::now();
                    let mut place = self.place.pin(now);
                    if let Place::Time(from) = &mut place {
                        self.from = Some(*from);
                        // Kinesis takes no time that is still to come. It may have come by its clock, so
                        // what arrives is looked at, and not our clock.
                        *from = now.min(*from);
                    }
                    self.link = self.open(&place).await?;
                    continue;
                }
                Link::Subscription(subscription) => subscription.next(&self.stream).await?,
                Link::Iterator(iterator) => iterator.next(&self.stream).await?,
            };
            match linked {
                Linked::Read { mut read, next } => {
                    self.drop_repeats(&mut read);
                    self.advance(&read, next);
                    return Ok(read);
                }
                Linked::Over => self.link = Link::Closed,
            }
        }
    }

    async fn open(&self, place: &Place) -> Result<Link, AwsError> {
        if let Some(consumer_arn) = self.stream.consumer_arn() {
            match fan_out::subscribe(&self.stream, &consumer_arn, &self.shard, place).await {
                Ok(subscription) => return Ok(Link::Subscription(Box::new(subscription))),
                Err(error) if error.kind() == AwsErrorKind::UnknownOperation => {
                    self.stream.fall_back_to_polling(&error)?;
                }
                Err(error) => return Err(error),
            }
        }
        let iterator = polling::iterate(&self.stream, &self.shard, place).await?;
        Ok(Link::Iterator(iterator))
    }

    /// Drops what was handed out before, and what a server sends from before the time asked for.
    fn drop_repeats(&self, read: &mut Read) {
        if let Some(delivered) = &self.delivered {
            read.records.retain(|record| record.sequence_number > *delivered);
        } else if let Some(from) = self.from {
            // Arrival times may be cut to the second.
            let from = from.as_second();
            read.records.retain(|record| record.arrived_at.is_none_or(|at| at.as_second() >= from));
        }
    }

    fn advance(&mut self, read: &Read, next: Option<SequenceNumber>) {
        if let Some(last) = read.records.last() {
            self.delivered = Some(last.sequence_number.clone());
            self.place = Place::At(last.sequence_number.clone());
        }
        if let Some(next) = next {
            self.place = Place::At(next);
        }
    }

    fn failed(&self, source: AwsError) -> SourceError {
        SourceError::Shard {
            stream: self.stream.name().to_owned(),
            shard: self.shard.clone(),
            place: self.place.to_string(),
            source,
        }
    }
}

impl SourceError {
    fn is_throttled(&self) -> bool {
        matches!(self, Self::Stream { source, .. } if source.kind() == AwsErrorKind::Throttled)
    }

    /// Whether no waiting helps, also where reading worked before: the stream was deleted.
    pub(crate) fn is_final(&self) -> bool {
        matches!(self, Self::NoStream { .. })
    }

    /// Whether reading may succeed later without anyone doing anything.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Self::Stream { source, .. } | Self::Shard { source, .. } => {
                source.is_transient() || source.kind() == AwsErrorKind::ExpiredIterator
            }
            Self::NotActive { .. } => true,
            Self::NoStream { .. } | Self::ConsumerQuota { .. } | Self::Identity { .. } => false,
        }
    }
}

/// A record as the SDK read it. One whose sequence number is no number cannot be placed in its shard.
fn record(record: aws_sdk_kinesis::types::Record) -> Option<Record> {
    let Some(sequence_number) = SequenceNumber::parse(record.sequence_number.as_str()) else {
        tracing::error!(
            sequence_number = record.sequence_number,
            "record without a usable sequence number: skipped; report this to the server's maker"
        );
        return None;
    };
    Some(Record {
        sequence_number,
        partition_key: record.partition_key.unwrap_or_default(),
        arrived_at: record
            .approximate_arrival_timestamp
            .as_ref()
            .and_then(crate::aws::time_from_sdk),
        data: record.data.into_inner().into(),
    })
}

/// The child shards that the last read of `parent` named.
fn children(parent: &ShardId, named: &[aws_sdk_kinesis::types::ChildShard]) -> Vec<ChildShard> {
    named
        .iter()
        .map(|child| ChildShard {
            id: parent.sibling(&child.shard_id),
            parents: child.parent_shards.iter().map(|name| parent.sibling(name)).collect(),
            hash_key_range: child.hash_key_range.as_ref().and_then(stream::hash_key_range),
        })
        .collect()
}

/// The listed shards that follow a shard.
pub(crate) fn followers(listed: Vec<Shard>, shard: &ShardId) -> Vec<ChildShard> {
    let followers = listed.into_iter().filter(|other| other.parents.contains(shard));
    followers
        .map(|Shard { id, parents, hash_key_range, .. }| ChildShard { id, parents, hash_key_range })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(text: &str) -> SequenceNumber {
        SequenceNumber::parse(text).expect("a number")
    }

    fn reader(place: Place) -> ShardReader {
        let config = aws_types::SdkConfig::builder()
            .behavior_version(aws_sdk_kinesis::config::BehaviorVersion::latest())
            .build();
        ShardReader::new(Stream::new(&config, "s", Retrieval::Polling), "shard".into(), place)
    }

    fn read(numbers: &[&str], arrived_at: &str) -> Read {
        let records = numbers
            .iter()
            .map(|n| Record {
                sequence_number: number(n),
                partition_key: String::new(),
                arrived_at: Some(arrived_at.parse().expect("a time")),
                data: bytes::Bytes::new(),
            })
            .collect();
        Read { records, ..Read::default() }
    }

    fn numbers(read: &Read) -> Vec<&str> {
        read.records.iter().map(|record| record.sequence_number.as_str()).collect()
    }

    #[test]
    fn p1_latest_is_asked_for_once_and_pinned_to_that_time() {
        let first: Timestamp = "2025-07-02T15:00:00Z".parse().expect("a time");
        let later: Timestamp = "2025-07-02T16:00:00Z".parse().expect("a time");
        let mut place = Place::Latest;
        assert_eq!(place.pin(first), Place::Latest);
        assert_eq!(place.pin(later), Place::Time(Place::pin_time(first)));
        assert!(Place::pin_time(first) < first, "the server's clock may be behind ours");
        let mut place = Place::At(number("7"));
        assert_eq!(place.pin(first), Place::At(number("7")));
        assert_eq!(place.pin(later), Place::At(number("7")));
    }

    #[test]
    fn p2_a_record_that_comes_again_after_a_reconnect_is_dropped() {
        let mut reader = reader(Place::TrimHorizon);
        let mut first = read(&["9", "10"], "2025-07-02T15:00:00Z");
        reader.drop_repeats(&mut first);
        reader.advance(&first, Some(number("11")));
        assert_eq!(reader.place, Place::At(number("11")));

        let mut again = read(&["9", "10", "11"], "2025-07-02T15:00:00Z");
        reader.drop_repeats(&mut again);
        assert_eq!(numbers(&again), ["11"]);
    }

    #[test]
    fn p2_the_pieces_of_a_read_are_its_records_in_order_and_only_the_last_one_ends_the_shard() {
        let mut whole = read(&["1", "2", "3", "4", "5"], "2025-07-02T15:00:00Z");
        for record in &mut whole.records {
            record.data = bytes::Bytes::from_static(b"0123456789");
        }
        (whole.behind, whole.end) = (Some(Duration::from_secs(3)), Some(Vec::new()));
        let pieces = whole.pieces(20);
        let found: Vec<Vec<&str>> = pieces.iter().map(numbers).collect();
        assert_eq!(found, [vec!["1", "2"], vec!["3", "4"], vec!["5"]]);
        assert!(pieces.iter().all(|piece| piece.behind == Some(Duration::from_secs(3))));
        let ends: Vec<bool> = pieces.iter().map(|piece| piece.end.is_some()).collect();
        assert_eq!(ends, [false, false, true]);
        // A read without records tells how far behind it was, or that the shard has ended.
        let empty = Read { end: Some(Vec::new()), ..Read::default() };
        assert!(matches!(&empty.pieces(20)[..], [piece] if piece.end.is_some()));
    }

    #[test]
    fn p1_an_empty_read_moves_on_by_its_continuation_number() {
        let mut reader = reader(Place::Latest);
        reader.advance(&Read::default(), Some(number("11")));
        assert_eq!(reader.place, Place::At(number("11")));
    }

    #[test]
    fn records_from_before_the_start_time_are_dropped_but_not_those_of_the_same_second() {
        let mut reader = reader(Place::TrimHorizon);
        reader.from = "2025-07-02T15:00:00.5Z".parse().ok();
        let mut early = read(&["1"], "2025-07-02T14:59:59Z");
        reader.drop_repeats(&mut early);
        assert_eq!(numbers(&early), [""; 0]);
        let mut same_second = read(&["2"], "2025-07-02T15:00:00Z");
        reader.drop_repeats(&mut same_second);
        assert_eq!(numbers(&same_second), ["2"]);
    }
}
