//! The stream's shape: shards, their place in the stream, and the numbers of their records.
//!
//! Pure, and only names and values: which shards ought to have a lease is decided in
//! [`lease`](crate::lease), and reading them is the worker's.

use std::{cmp::Ordering, fmt, sync::Arc};

use serde::{Serialize, Serializer};

/// A shard among all those that a worker reads. Cheap to clone.
///
/// Of a worker that reads one stream it is the name that Kinesis gave, `shardId-000000000000`. Where
/// several streams are read, the stream's identifier stands before the name, as in the KCL's multi-stream
/// lease keys: `123456789012:ctd-ocs-raw-messages:1625148000:shardId-000000000000`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShardId(Arc<str>);

impl ShardId {
    /// The whole of it: the key of the shard's lease.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name as Kinesis writes it.
    pub fn name(&self) -> &str {
        self.0.rsplit_once(':').map_or(&self.0, |(_, name)| name)
    }

    /// The stream, where several are read.
    pub fn stream(&self) -> Option<StreamIdentifier> {
        self.0.rsplit_once(':').and_then(|(stream, _)| StreamIdentifier::parse(stream))
    }

    /// Another shard of the same stream.
    pub(crate) fn sibling(&self, name: &str) -> Self {
        match self.0.rsplit_once(':') {
            Some((stream, _)) => Self(format!("{stream}:{name}").into()),
            None => Self(name.into()),
        }
    }
}

/// One of several streams that a worker reads, as the KCL names it: `account:name:creationEpochSeconds`
/// (`StreamIdentifier` of amazon-kinesis-client). A stream that was deleted and made again has another.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamIdentifier(Arc<str>);

impl StreamIdentifier {
    /// `None` unless `text` is digits, a name without colons, and digits that are not all zero, with
    /// colons between them.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let (account, name, epoch) = (parts.next()?, parts.next()?, parts.next()?);
        let digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        let valid = digits(account) && !name.is_empty() && digits(epoch);
        (valid && epoch.bytes().any(|b| b != b'0') && parts.next().is_none())
            .then(|| Self(text.into()))
    }

    /// The whole of it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The stream's name.
    pub fn name(&self) -> &str {
        self.0.split(':').nth(1).unwrap_or_default()
    }

    /// A shard of the stream, by the name that Kinesis gave it.
    pub fn shard(&self, name: &str) -> ShardId {
        ShardId(format!("{self}:{name}").into())
    }

    /// Whether both are streams of one account and name, made at different times.
    pub fn is_made_again(&self, other: &Self) -> bool {
        let without_epoch = |id: &Self| id.0.rsplit_once(':').map(|(rest, _)| rest.to_owned());
        self != other && without_epoch(self) == without_epoch(other)
    }
}

impl fmt::Display for StreamIdentifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for ShardId {
    fn from(id: &str) -> Self {
        Self(id.into())
    }
}

impl From<String> for ShardId {
    fn from(id: String) -> Self {
        Self(id.into())
    }
}

impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for ShardId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

/// A record's place in its shard.
///
/// AWS writes 56 decimal digits, other servers fewer, so the text is kept as it came and compared as
/// a number of any length.
///
/// ```
/// use tramline::SequenceNumber;
///
/// assert!(SequenceNumber::parse("9") < SequenceNumber::parse("10"));
/// assert_eq!(SequenceNumber::parse("latest"), None);
/// ```
#[derive(Debug, Clone)]
pub struct SequenceNumber(Box<str>);

impl SequenceNumber {
    /// `None` unless `text` is a decimal number.
    pub fn parse(text: impl Into<Box<str>>) -> Option<Self> {
        let text = text.into();
        (!text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())).then_some(Self(text))
    }

    /// The number as the server wrote it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn significant(&self) -> &str {
        self.0.trim_start_matches('0')
    }
}

impl Ord for SequenceNumber {
    fn cmp(&self, other: &Self) -> Ordering {
        let (a, b) = (self.significant(), other.significant());
        a.len().cmp(&b.len()).then_with(|| a.cmp(b))
    }
}

impl PartialOrd for SequenceNumber {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for SequenceNumber {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for SequenceNumber {}

impl fmt::Display for SequenceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for SequenceNumber {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

/// The MD5 values of the partition keys that a shard takes, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HashKeyRange {
    /// The lowest value.
    pub start: u128,
    /// The highest value.
    pub end: u128,
}

/// A shard as ListShards describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    /// Its name.
    pub id: ShardId,
    /// The shards it was split or merged from: none, one or two.
    pub parents: Vec<ShardId>,
    /// The keys it takes.
    pub hash_key_range: Option<HashKeyRange>,
    /// Whether it takes no more records (it has an ending sequence number).
    pub closed: bool,
    /// Its starting sequence number, where it is known: no record of it has a lower one.
    pub begins: Option<SequenceNumber>,
}

/// A shard that the last read of its parent named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChildShard {
    /// Its name.
    pub id: ShardId,
    /// The one (split) or two (merge) shards it comes from.
    pub parents: Vec<ShardId>,
    /// The keys it takes.
    pub hash_key_range: Option<HashKeyRange>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(text: &str) -> SequenceNumber {
        SequenceNumber::parse(text).expect("a number")
    }

    #[test]
    fn sequence_numbers_compare_as_numbers_of_any_length() {
        assert!(number("9") < number("10"));
        assert!(number("49590338271490256608559692538361571095921575989136588898") > number("10"));
        assert_eq!(number("007"), number("7"));
        assert_eq!(number("007").as_str(), "007", "the text is kept as it came");
        assert!(number("0") < number("1"));
    }

    #[test]
    fn a_shard_of_several_streams_is_named_as_the_kcl_names_its_lease() {
        let stream = StreamIdentifier::parse("123456789012:ocs:1625148000").expect("an identifier");
        let shard = stream.shard("shardId-000000000003");
        assert_eq!(shard.as_str(), "123456789012:ocs:1625148000:shardId-000000000003");
        assert_eq!((shard.name(), shard.stream()), ("shardId-000000000003", Some(stream.clone())));
        assert_eq!(stream.name(), "ocs");
        assert_eq!(shard.sibling("shardId-000000000004").stream(), Some(stream.clone()));
        let alone = ShardId::from("shardId-000000000003");
        assert_eq!((alone.name(), alone.stream()), ("shardId-000000000003", None));
        assert_eq!(alone.sibling("shardId-000000000004"), "shardId-000000000004".into());

        let again = StreamIdentifier::parse("123456789012:ocs:1625149000").expect("an identifier");
        let other =
            StreamIdentifier::parse("123456789012:other:1625148000").expect("an identifier");
        assert!(stream.is_made_again(&again) && !stream.is_made_again(&stream));
        assert!(!stream.is_made_again(&other));
        for wrong in ["", "ocs", "1:ocs", "a:ocs:1", "1::1", "1:ocs:0", "1:ocs:", "1:o:c:1"] {
            assert_eq!(StreamIdentifier::parse(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn what_is_not_a_number_is_no_sequence_number() {
        for text in ["", "LATEST", "-1", "12a", "１"] {
            assert_eq!(SequenceNumber::parse(text), None, "{text:?}");
        }
    }
}
