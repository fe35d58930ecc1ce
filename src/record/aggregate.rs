//! KPL aggregation: many user records in one Kinesis record.
//!
//! Laid out as four magic bytes, a protobuf message, and the MD5 of that message. Read as the KCL reads
//! it (`AggregatorUtil.deaggregate`), but for one thing: where the KCL delivers the first half of a corrupt
//! aggregate and loses the rest, nothing of it is delivered here, and the record goes to the dead letters.

use std::{borrow::Cow, collections::HashMap};

use bytes::Bytes;
use md5::{Digest as _, Md5};
use prost::Message as _;

use crate::shard::HashKeyRange;

const MAGIC: [u8; 4] = [0xF3, 0x89, 0x9A, 0xC2];
const DIGEST_BYTES: usize = 16;
/// No Kinesis record is larger. An aggregate that gzip hides may be; it is not read as one, because it
/// would take many times its size in memory.
const LIMIT_BYTES: usize = 10 * 1024 * 1024;

const ALL_HASH_KEYS: HashKeyRange = HashKeyRange { start: 0, end: u128::MAX };

/// What the bytes of a record say about aggregation.
#[derive(Debug, PartialEq)]
pub(super) enum Reading {
    /// No aggregate: too short, without the magic, with another MD5, or no such protobuf message.
    Plain,
    Aggregate(Aggregate),
    /// A user record in it belongs to another shard, by its partition key or explicit hash key. The KPL
    /// puts such user records again by itself, when it learns that the shards have changed.
    Misplaced {
        user_records: u64,
    },
    /// Its MD5 is right and its content is not.
    Corrupt(String),
}

/// The user records of an aggregate, all of them usable.
#[derive(Debug, PartialEq)]
pub(super) struct Aggregate(AggregatedRecord);

// The texts are read as bytes: they stay where they are, and what is no UTF-8 is replaced, not refused,
// as in Java. `required` fields are optional here, because prost does not notice that one is missing.
#[derive(Clone, PartialEq, prost::Message)]
struct AggregatedRecord {
    #[prost(bytes = "bytes", repeated, tag = "1")]
    partition_key_table: Vec<Bytes>,
    #[prost(bytes = "bytes", repeated, tag = "2")]
    explicit_hash_key_table: Vec<Bytes>,
    #[prost(message, repeated, tag = "3")]
    records: Vec<UserRecord>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct UserRecord {
    #[prost(uint64, optional, tag = "1")]
    partition_key_index: Option<u64>,
    #[prost(uint64, optional, tag = "2")]
    explicit_hash_key_index: Option<u64>,
    #[prost(bytes = "bytes", optional, tag = "3")]
    data: Option<Bytes>,
    #[prost(message, repeated, tag = "4")]
    tags: Vec<Tag>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Tag {
    #[prost(bytes = "bytes", optional, tag = "1")]
    key: Option<Bytes>,
    #[prost(bytes = "bytes", optional, tag = "2")]
    value: Option<Bytes>,
}

/// Whether these bytes are an aggregate as far as their beginning says.
pub(super) fn has_magic(data: &[u8]) -> bool {
    data.starts_with(&MAGIC)
}

/// Reads `data`, and compares the hash keys of its user records with those of the shard. Without a range
/// all 128-bit keys will do.
pub(super) fn read(data: &Bytes, range: Option<HashKeyRange>) -> Reading {
    let Some(message) = message(data) else { return Reading::Plain };
    let Ok(aggregated) = AggregatedRecord::decode(message) else { return Reading::Plain };
    let complete = |record: &UserRecord| {
        record.partition_key_index.is_some()
            && record.data.is_some()
            && record.tags.iter().all(|tag| tag.key.is_some())
    };
    if !aggregated.records.iter().all(complete) {
        return Reading::Plain;
    }
    if aggregated.records.is_empty() {
        return Reading::Corrupt("a KPL aggregate without a user record".into());
    }
    let mut keys = HashKeys::new(&aggregated, range.unwrap_or(ALL_HASH_KEYS));
    for (index, record) in aggregated.records.iter().enumerate() {
        match keys.are_ours(record) {
            Ok(true) => {}
            Ok(false) => {
                return Reading::Misplaced { user_records: aggregated.records.len() as u64 };
            }
            Err(reason) => {
                return Reading::Corrupt(format!(
                    "a corrupt KPL aggregate: user record {index}: {reason}"
                ));
            }
        }
    }
    Reading::Aggregate(Aggregate(aggregated))
}

/// The protobuf message, if the record has the form of an aggregate.
fn message(data: &Bytes) -> Option<Bytes> {
    let ours =
        has_magic(data) && (MAGIC.len() + DIGEST_BYTES + 1..=LIMIT_BYTES).contains(&data.len());
    if !ours {
        return None;
    }
    let message = data.slice(MAGIC.len()..data.len() - DIGEST_BYTES);
    (Md5::digest(&message)[..] == data[data.len() - DIGEST_BYTES..]).then_some(message)
}

impl Reading {
    /// How many user records an aggregate has; `None` for a record that counts as one.
    pub(super) fn user_records(&self) -> Option<u64> {
        match self {
            Self::Plain | Self::Corrupt(_) => None,
            Self::Aggregate(Aggregate(aggregated)) => Some(aggregated.records.len() as u64),
            Self::Misplaced { user_records } => Some(*user_records),
        }
    }
}

impl Aggregate {
    /// The partition key and the data of each user record, in their order. They share the bytes that the
    /// aggregate was read from.
    pub(super) fn user_records(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.0.records.iter().filter_map(|record| {
            let key = entry(&self.0.partition_key_table, record.partition_key_index?)?;
            Some((&key[..], &record.data.as_ref()?[..]))
        })
    }
}

/// The data of one Kinesis record that holds several user records, as the KPL writes it: each is a
/// partition key and its data. Put it with a partition key of the same shard as all of theirs, or readers
/// leave it out.
pub fn write_aggregate<'a>(user_records: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Vec<u8> {
    let mut aggregated = AggregatedRecord::default();
    let mut indexes = HashMap::new();
    for (partition_key, data) in user_records {
        let keys = &mut aggregated.partition_key_table;
        let index = *indexes.entry(partition_key).or_insert_with(|| {
            keys.push(Bytes::copy_from_slice(partition_key.as_bytes()));
            keys.len() as u64 - 1
        });
        aggregated.records.push(UserRecord {
            partition_key_index: Some(index),
            data: Some(Bytes::copy_from_slice(data)),
            ..UserRecord::default()
        });
    }
    wrapped(&aggregated.encode_to_vec())
}

fn wrapped(message: &[u8]) -> Vec<u8> {
    [&MAGIC[..], message, &Md5::digest(message)].concat()
}

/// The hash keys of an aggregate's user records: each partition key is hashed once.
struct HashKeys<'a> {
    tables: &'a AggregatedRecord,
    range: HashKeyRange,
    of_partition_keys: Vec<Option<bool>>,
}

impl<'a> HashKeys<'a> {
    fn new(tables: &'a AggregatedRecord, range: HashKeyRange) -> Self {
        // With one shard, every hash key will do.
        let known = (range == ALL_HASH_KEYS).then_some(true);
        let of_partition_keys = vec![known; tables.partition_key_table.len()];
        Self { tables, range, of_partition_keys }
    }

    /// Whether a user record belongs to the range; an error if its keys are not in the tables.
    fn are_ours(&mut self, record: &UserRecord) -> Result<bool, String> {
        let index = record.partition_key_index.unwrap_or_default();
        let partition_key = entry(&self.tables.partition_key_table, index)
            .ok_or_else(|| format!("there is no partition key {index}"))?;
        if let Some(index) = record.explicit_hash_key_index {
            let text = entry(&self.tables.explicit_hash_key_table, index)
                .ok_or_else(|| format!("there is no explicit hash key {index}"))?;
            return explicit_hash_key_is_in(self.range, text);
        }
        let known = &mut self.of_partition_keys[index as usize];
        Ok(*known.get_or_insert_with(|| {
            let hash = Md5::digest(text(partition_key).as_bytes());
            contains(self.range, u128::from_be_bytes(hash.into()))
        }))
    }
}

fn entry(table: &[Bytes], index: u64) -> Option<&Bytes> {
    table.get(usize::try_from(index).ok()?)
}

/// A text of the message, as Java decodes it.
pub(super) fn text(bytes: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

/// Whether a decimal number is in the range. It may have a sign, and any length, as Java's `BigInteger`.
fn explicit_hash_key_is_in(range: HashKeyRange, key: &[u8]) -> Result<bool, String> {
    let (negative, digits) = match key {
        [b'-', digits @ ..] => (true, digits),
        [b'+', digits @ ..] => (false, digits),
        digits => (false, digits),
    };
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return Err(format!("explicit hash key {:?} is not a number", text(key)));
    }
    // Too many digits: beyond all 128-bit keys.
    let number = text(digits).parse::<u128>().ok();
    Ok(number.is_some_and(|number| contains(range, number) && (number == 0 || !negative)))
}

fn contains(range: HashKeyRange, key: u128) -> bool {
    (range.start..=range.end).contains(&key)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two user records, checked with the Python reader of AWS's kinesis-aggregation.
    const VECTOR: [u8; 42] = [
        0xF3, 0x89, 0x9A, 0xC2, 0x0A, 0x01, b'a', 0x0A, 0x02, b'b', b'b', 0x1A, 0x05, 0x08, 0x00,
        0x1A, 0x01, b'x', 0x1A, 0x06, 0x08, 0x01, 0x1A, 0x02, b'y', b'z', 0xE8, 0xE6, 0xB1, 0x58,
        0xB5, 0x9E, 0x89, 0x08, 0xD0, 0xCC, 0xE7, 0x90, 0xCF, 0x47, 0x24, 0x17,
    ];

    fn read_all(data: impl Into<Bytes>) -> Reading {
        read(&data.into(), None)
    }

    /// An aggregate with one key of each kind, and user records that name keys by index.
    fn aggregate(partition_key: &str, explicit: &str, indexes: &[(u64, Option<u64>)]) -> Bytes {
        let table = |key: &str| vec![Bytes::copy_from_slice(key.as_bytes())];
        let message = AggregatedRecord {
            partition_key_table: table(partition_key),
            explicit_hash_key_table: table(explicit),
            records: indexes
                .iter()
                .map(|&(partition_key, explicit)| UserRecord {
                    partition_key_index: Some(partition_key),
                    explicit_hash_key_index: explicit,
                    data: Some(Bytes::from_static(b"data")),
                    tags: Vec::new(),
                })
                .collect(),
        };
        wrapped(&message.encode_to_vec()).into()
    }

    #[test]
    fn the_published_vector_is_read_and_written() {
        let Reading::Aggregate(aggregate) = read_all(VECTOR.to_vec()) else { panic!("not read") };
        let user_records: Vec<_> = aggregate.user_records().collect();
        assert_eq!(user_records, [(&b"a"[..], &b"x"[..]), (b"bb", b"yz")]);
        assert_eq!(write_aggregate([("a", &b"x"[..]), ("bb", b"yz")]), VECTOR);
    }

    #[test]
    fn each_key_is_written_once() {
        let data = write_aggregate([("a", &b"1"[..]), ("b", b"2"), ("a", b"3")]);
        let Reading::Aggregate(aggregate) = read_all(data) else { panic!("not read") };
        assert_eq!(aggregate.0.partition_key_table, ["a", "b"]);
        let keys: Vec<_> = aggregate.user_records().map(|(key, _)| key).collect();
        assert_eq!(keys, [b"a", b"b", b"a"]);
    }

    #[test]
    fn user_records_share_the_bytes_of_the_record() {
        let data = Bytes::from(VECTOR.to_vec());
        let Reading::Aggregate(aggregate) = read(&data, None) else { panic!("not read") };
        for (key, value) in aggregate.user_records() {
            assert!(data.as_ptr_range().contains(&key.as_ptr()));
            assert!(data.as_ptr_range().contains(&value.as_ptr()));
        }
    }

    #[test]
    fn what_the_kcl_takes_for_a_plain_record_is_one() {
        let mut wrong_magic = VECTOR.to_vec();
        wrong_magic[0] = 0xF2;
        let mut wrong_sum = VECTOR.to_vec();
        wrong_sum[42 - 1] ^= 1;
        for data in [
            vec![],
            VECTOR[..3].to_vec(),
            VECTOR[..4].to_vec(),
            wrapped(b""),
            wrong_magic,
            wrong_sum,
            VECTOR[..41].to_vec(),
            // A field that is longer than the message.
            wrapped(&[0x0A, 0x05, b'a']),
            // A user record without data, one without a partition key, and a tag without a key.
            wrapped(&[0x0A, 1, b'a', 0x1A, 2, 0x08, 0]),
            wrapped(&[0x0A, 1, b'a', 0x1A, 3, 0x1A, 1, b'x']),
            wrapped(&[0x0A, 1, b'a', 0x1A, 7, 0x08, 0, 0x1A, 1, b'x', 0x22, 0]),
        ] {
            assert_eq!(read_all(data.clone()), Reading::Plain, "{data:x?}");
        }
        let tagged =
            wrapped(&[0x0A, 1, b'a', 0x1A, 10, 0x08, 0, 0x1A, 1, b'x', 0x22, 3, 0x0A, 1, b't']);
        assert!(matches!(read_all(tagged), Reading::Aggregate(_)));
        let unknown_field = wrapped(&[0x0A, 1, b'a', 0x1A, 5, 0x08, 0, 0x1A, 1, b'x', 0x78, 1]);
        assert!(matches!(read_all(unknown_field), Reading::Aggregate(_)));
    }

    #[test]
    fn p1_a_fault_behind_a_right_sum_spoils_the_whole_aggregate() {
        for (data, reason) in [
            (
                aggregate("a", "1", &[(0, None), (1, None)]),
                "user record 1: there is no partition key 1",
            ),
            (aggregate("a", "1", &[(u64::MAX, None)]), "there is no partition key"),
            (aggregate("a", "1", &[(0, Some(1))]), "there is no explicit hash key 1"),
            (aggregate("a", "", &[(0, Some(0))]), "\"\" is not a number"),
            (aggregate("a", "-", &[(0, Some(0))]), "\"-\" is not a number"),
            (aggregate("a", "12x", &[(0, Some(0))]), "\"12x\" is not a number"),
            (aggregate("a", "1", &[]), "without a user record"),
        ] {
            let Reading::Corrupt(said) = read_all(data) else { panic!("read: {reason}") };
            assert!(said.contains(reason), "{said}");
        }
    }

    #[test]
    fn the_first_user_record_of_another_shard_discards_all() {
        // MD5("a")
        let hash = 0x0cc1_75b9_c0f1_b6a8_31c3_99e2_6977_2661;
        let ours = |data: &Bytes, start, end| match read(data, Some(HashKeyRange { start, end })) {
            Reading::Aggregate(_) => true,
            Reading::Misplaced { user_records } => {
                assert_eq!(user_records, 2);
                false
            }
            other => panic!("{other:?}"),
        };
        let by_partition_key = aggregate("a", "5", &[(0, None), (0, None)]);
        // Both ends are in the range.
        assert!(ours(&by_partition_key, hash, hash));
        assert!(!ours(&by_partition_key, hash + 1, u128::MAX));
        assert!(!ours(&by_partition_key, 0, hash - 1));

        // An explicit hash key goes before the partition key, for its own user record.
        let explicit = |key| aggregate("a", key, &[(0, Some(0)), (0, Some(0))]);
        assert!(ours(&explicit("5"), 5, 5));
        assert!(ours(&explicit("+0005"), 5, 5));
        assert!(!ours(&explicit("5"), 6, u128::MAX));
        let mixed = aggregate("a", "5", &[(0, Some(0)), (0, None)]);
        assert!(ours(&mixed, 5, hash));
        assert!(!ours(&mixed, 5, 5));

        // Java's numbers have no limit; hash keys have.
        assert!(ours(&explicit("340282366920938463463374607431768211455"), 0, u128::MAX));
        assert!(!ours(&explicit("340282366920938463463374607431768211456"), 0, u128::MAX));
        assert!(!ours(&explicit("-5"), 0, u128::MAX));
        assert!(ours(&explicit("-0"), 0, u128::MAX));
    }

    #[test]
    fn a_key_that_is_no_text_is_read_as_java_reads_it() {
        let data = wrapped(&[0x0A, 1, 0xFF, 0x1A, 5, 0x08, 0, 0x1A, 1, b'x']);
        let hash = u128::from_be_bytes(Md5::digest("\u{FFFD}").into());
        let range = HashKeyRange { start: hash, end: hash };
        let Reading::Aggregate(aggregate) = read(&data.into(), Some(range)) else { panic!() };
        let (key, _) = aggregate.user_records().next().expect("one");
        assert_eq!(text(key), "\u{FFFD}");
    }
}
