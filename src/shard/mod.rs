//! The stream's shape: shards, their order in time, and which of them ought to have a lease.
//!
//! Pure: what ListShards answered goes in, decisions come out.

use std::{cmp::Ordering, fmt, sync::Arc};

use serde::{Serialize, Serializer};

/// The name of a shard, such as `shardId-000000000000`. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShardId(Arc<str>);

impl ShardId {
    /// The id as Kinesis writes it.
    pub fn as_str(&self) -> &str {
        &self.0
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
    fn what_is_not_a_number_is_no_sequence_number() {
        for text in ["", "LATEST", "-1", "12a", "１"] {
            assert_eq!(SequenceNumber::parse(text), None, "{text:?}");
        }
    }
}
