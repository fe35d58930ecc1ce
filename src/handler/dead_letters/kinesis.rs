//! Dead letters in a stream, and putting records so that each partition key's stay in order.

use std::collections::{HashMap, HashSet, VecDeque};

use aws_sdk_kinesis::{Client, primitives::Blob, types::PutRecordsRequestEntry};
use aws_types::SdkConfig;
use bytes::Bytes;

use crate::{
    aws::{self, AwsError, AwsErrorKind},
    handler::{DeadLetter, Place},
};

/// The most bytes of a record, partition key included (AWS API reference).
pub(crate) const RECORD_LIMIT_BYTES: usize = 1024 * 1024;
/// The most records and bytes of a PutRecords call (AWS API reference).
const CALL_LIMIT_RECORDS: usize = 500;
const CALL_LIMIT_BYTES: usize = 5 * 1024 * 1024;
/// The longest partition key, in characters (AWS API reference).
pub(crate) const KEY_LIMIT_CHARS: usize = 256;

/// A record to be put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Outgoing {
    pub partition_key: String,
    pub data: Bytes,
}

impl Outgoing {
    fn size_bytes(&self) -> usize {
        self.partition_key.len() + self.data.len()
    }
}

/// Which of the pending records one call may put: the first of each key, so that a call of which only a
/// part succeeds cannot change the order within a key. Never empty unless nothing is pending.
pub(crate) fn round<'a>(pending: impl IntoIterator<Item = &'a Outgoing>) -> Vec<usize> {
    let mut keys = HashSet::new();
    let mut chosen = Vec::new();
    let mut size_bytes = 0;
    for (n, record) in pending.into_iter().enumerate() {
        if !keys.insert(record.partition_key.as_str()) {
            continue;
        }
        size_bytes += record.size_bytes();
        if chosen.len() == CALL_LIMIT_RECORDS
            || (size_bytes > CALL_LIMIT_BYTES && !chosen.is_empty())
        {
            break;
        }
        chosen.push(n);
    }
    chosen
}

/// Puts records in one call, and tells of each whether Kinesis has it. An error says that Kinesis has
/// none, or, if there was no usable answer, that it may have any of them.
pub(crate) async fn put_records(
    client: &Client,
    stream: &str,
    records: &[&Outgoing],
) -> Result<Vec<Result<(), AwsError>>, AwsError> {
    const OPERATION: &str = "kinesis:PutRecords";
    let mut call = client.put_records().stream_name(stream);
    for record in records {
        let entry = PutRecordsRequestEntry::builder()
            .partition_key(&record.partition_key)
            .data(Blob::new(record.data.as_ref()))
            .build()
            .map_err(|error| AwsError::new(OPERATION, AwsErrorKind::Refused, error.to_string()))?;
        call = call.records(entry);
    }
    let answer = call.send().await.map_err(|error| aws::failure(OPERATION, error))?;
    if answer.records.len() != records.len() {
        let said = format!("{} records were put, {} answered", records.len(), answer.records.len());
        return Err(AwsError::new(OPERATION, AwsErrorKind::Server, said));
    }
    let put = answer.records.into_iter().map(|result| match result.error_code {
        None => Ok(()),
        Some(code) => {
            let message = result.error_message.unwrap_or_default();
            Err(aws::record_failure(OPERATION, &code, &message))
        }
    });
    Ok(put.collect())
}

/// A stream for dead letters.
pub(super) struct Records {
    client: Client,
    stream: String,
}

impl Records {
    pub(super) fn new(config: &SdkConfig, stream: &str) -> Self {
        let config = aws_sdk_kinesis::config::Builder::from(config)
            .timeout_config(aws::call_timeouts())
            .build();
        Self { client: Client::from_conf(config), stream: stream.to_owned() }
    }

    pub(super) async fn check(&self) -> Result<(), AwsError> {
        let described =
            self.client.describe_stream_summary().stream_name(&self.stream).send().await;
        described.map(drop).map_err(|error| aws::failure("kinesis:DescribeStreamSummary", error))
    }

    /// Puts the next records, and takes those that Kinesis has from `pending`.
    pub(super) async fn put_round(&self, pending: &mut VecDeque<Outgoing>) -> Result<(), AwsError> {
        let chosen = round(&*pending);
        let records: Vec<&Outgoing> = chosen.iter().map(|n| &pending[*n]).collect();
        let results = put_records(&self.client, &self.stream, &records).await?;
        let mut failed = None;
        // From the back, so that the numbers of those in front stay what they are.
        for (n, result) in chosen.into_iter().zip(results).rev() {
            match result {
                Ok(()) => drop(pending.remove(n)),
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(()), Err)
    }
}

/// The records for letters. Letters of one key share a record as far as it goes.
pub(super) fn records(letters: &[DeadLetter]) -> VecDeque<Outgoing> {
    let mut records: Vec<(String, Vec<u8>)> = Vec::new();
    let mut last_of_key: HashMap<String, usize> = HashMap::new();
    for letter in letters {
        let key = partition_key(&letter.place);
        let limit_bytes = RECORD_LIMIT_BYTES - key.len();
        for line in letter.lines(limit_bytes) {
            let last = last_of_key.get(&key).map(|last| &mut records[*last].1);
            match last.filter(|data| data.len() + line.len() <= limit_bytes) {
                Some(data) => data.extend_from_slice(&line),
                None => {
                    last_of_key.insert(key.clone(), records.len());
                    records.push((key.clone(), line));
                }
            }
        }
    }
    records
        .into_iter()
        .map(|(partition_key, data)| Outgoing { partition_key, data: data.into() })
        .collect()
}

fn partition_key(place: &Place) -> String {
    match place {
        Place::Record(place) => place.partition_key.clone(),
        Place::Connection { connection, .. } => connection.chars().take(KEY_LIMIT_CHARS).collect(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::handler::{dead_letter::tests::letter, dead_letter_line::ReadLine};

    fn outgoing(key: &str, length: usize) -> Outgoing {
        Outgoing { partition_key: key.into(), data: vec![0; length].into() }
    }

    #[test]
    fn a_call_stays_within_the_limits_of_kinesis() {
        let many: Vec<Outgoing> = (0..600).map(|n| outgoing(&n.to_string(), 1)).collect();
        assert_eq!(round(&many), (0..500).collect::<Vec<_>>());
        let large: Vec<Outgoing> =
            (0..8).map(|n| outgoing(&n.to_string(), 1024 * 1024 - 1)).collect();
        assert_eq!(round(&large).len(), 5);
        assert_eq!(round(&[]), [0; 0]);
    }

    #[test]
    fn letters_of_a_key_share_a_record_and_a_large_one_takes_several() {
        let small = |n, key| letter(n, key, "x");
        let large = letter(3, "a", vec![b'x'; 1024 * 1024]);
        let records = records(&[small(1, "a"), small(2, "b"), large, small(4, "b"), small(5, "a")]);
        let shape: Vec<(&str, Vec<_>)> = records
            .iter()
            .map(|record| {
                let lines = record.data.strip_suffix(b"\n").expect("whole lines");
                let lines = lines.split(|byte| *byte == b'\n').map(|line| {
                    let read = ReadLine::parse(line).expect("a letter");
                    let Place::Record(place) = read.letter.place else { panic!("a record") };
                    (place.sequence_number.to_string(), read.part.map(|part| part.number))
                });
                (record.partition_key.as_str(), lines.collect())
            })
            .collect();
        let one = |n: u64, part| (n.to_string(), part);
        assert_eq!(
            shape,
            [
                ("a", vec![one(1, None), one(3, Some(1))]),
                ("b", vec![one(2, None), one(4, None)]),
                ("a", vec![one(3, Some(2)), one(5, None)]),
            ]
        );
    }

    proptest! {
        /// Whatever part of a call succeeds, a key's records arrive in order, each once.
        #[test]
        fn p7_partial_failures_change_no_order_within_a_key(
            keys in prop::collection::vec(0_u8..4, 1..60),
            mut outcomes in prop::collection::vec(any::<bool>(), 300),
        ) {
            let all: Vec<Outgoing> = (0..).zip(&keys)
                .map(|(n, key)| outgoing(&key.to_string(), n))
                .collect();
            let mut pending = all.clone();
            let mut arrived = Vec::new();
            while !pending.is_empty() {
                for n in round(&pending).into_iter().rev() {
                    if outcomes.pop().unwrap_or(true) {
                        arrived.push(pending.remove(n));
                    }
                }
            }
            for key in 0_u8..4 {
                let of = |records: &[Outgoing]| -> Vec<usize> {
                    let of_key = records.iter().filter(|r| r.partition_key == key.to_string());
                    of_key.map(|record| record.data.len()).collect()
                };
                prop_assert_eq!(of(&arrived), of(&all));
            }
        }
    }
}

#[cfg(all(test, feature = "local"))]
mod server_tests {
    use std::collections::HashMap;

    use aws_sdk_kinesis::types::ShardIteratorType;

    use crate::{
        handler::{
            DeadLetter, DeadLetters, Place, dead_letter::tests::letter, dead_letter_line::ReadLine,
        },
        local::{Local, LocalSettings},
    };

    #[tokio::test]
    async fn p9_letters_are_in_the_stream_under_their_keys_in_order_when_store_returns() {
        let local = Local::start(LocalSettings::default()).await.expect("servers");
        let client = aws_sdk_kinesis::Client::new(&local.sdk_config());
        client
            .create_stream()
            .stream_name("letters")
            .shard_count(2)
            .send()
            .await
            .expect("a stream");
        let letters: Vec<DeadLetter> = (0..60)
            .map(|n| {
                let data = vec![b'x'; if n % 30 == 7 { 1_000_000 } else { 30_000 }];
                letter(n, &format!("key-{}", n % 3), data)
            })
            .collect();
        let to = DeadLetters::kinesis("letters").open(&local.sdk_config()).await.expect("a stream");
        to.store(&letters).await.expect("stored");

        let mut by_key: HashMap<String, Vec<DeadLetter>> = HashMap::new();
        for shard in ["shardId-000000000000", "shardId-000000000001"] {
            let opened = client
                .get_shard_iterator()
                .stream_name("letters")
                .shard_id(shard)
                .shard_iterator_type(ShardIteratorType::TrimHorizon);
            let mut iterator = opened.send().await.expect("a shard").shard_iterator;
            loop {
                let call = client.get_records().set_shard_iterator(iterator);
                let answer = call.send().await.expect("records");
                iterator = answer.next_shard_iterator;
                if answer.records.is_empty() {
                    break;
                }
                for record in answer.records {
                    let data = record.data.into_inner();
                    for line in data.strip_suffix(b"\n").expect("lines").split(|b| *b == b'\n') {
                        let ReadLine { letter, part } = ReadLine::parse(line).expect("a letter");
                        let Place::Record(place) = &letter.place else { panic!("a record") };
                        assert_eq!(record.partition_key.as_ref(), Some(&place.partition_key));
                        let of_key = by_key.entry(place.partition_key.clone()).or_default();
                        match (part, of_key.last_mut()) {
                            (Some(part), Some(last)) if part.number > 1 => {
                                last.data = [&last.data[..], &letter.data[..]].concat().into();
                            }
                            _ => of_key.push(letter),
                        }
                    }
                }
            }
        }
        for n in 0..3 {
            let key = format!("key-{n}");
            let of_key: Vec<&DeadLetter> = letters
                .iter()
                .filter(
                    |letter| matches!(&letter.place, Place::Record(p) if p.partition_key == key),
                )
                .collect();
            let stored: Vec<&DeadLetter> = by_key[&key].iter().collect();
            assert!(stored == of_key, "{key}: {} of {}", stored.len(), of_key.len());
        }
    }

    #[tokio::test]
    async fn a_missing_stream_is_told_at_the_start() {
        let local = Local::start(LocalSettings::default()).await.expect("servers");
        let opened = DeadLetters::kinesis("nowhere").open(&local.sdk_config()).await;
        let error = opened.err().expect("no stream").to_string();
        assert!(
            error.starts_with("dead letters cannot be stored in kinesis://nowhere: ")
                && error.ends_with("create it, or check the name, the region and the account"),
            "{error}"
        );
    }
}
