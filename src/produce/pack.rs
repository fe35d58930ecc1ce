//! From messages to the data of one record.

use std::io::Write as _;

use flate2::{Compression, write::GzEncoder};
use jiff::Timestamp;
use serde::Deserialize;

use super::spool::Spooled;
use crate::{
    ocs::{BatchMessage, EventSource, event_time},
    record::write_aggregate,
};

/// What a record holds. Every reader of ours reads all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Encoding {
    /// A JSON array of CloudEvents, as Trike writes it.
    #[default]
    Array,
    /// One CloudEvent.
    Single,
    /// One CloudEvent of the type `com.mbta.ocs.raw_message_batch`, which says once what its messages
    /// have in common.
    Batch,
    /// A KPL aggregate with a CloudEvent in each user record.
    Kpl,
}

/// How records are made.
#[derive(Debug, Clone, Copy)]
pub(super) struct Packing {
    pub encoding: Encoding,
    pub gzip: bool,
    /// The most bytes of a record's data and partition key together.
    pub record_limit_bytes: usize,
}

/// What became of the messages that a record took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Packed {
    pub data: Vec<u8>,
    pub messages: u64,
    /// What the messages take in the spool.
    pub spooled_bytes: u64,
    /// When the first of them was received.
    pub oldest: Timestamp,
}

/// Makes one record of messages of one lane.
///
/// The same messages make the same bytes: a record that is put again is a copy (P7).
pub(super) struct Packer<'a> {
    packing: Packing,
    source: &'a EventSource,
    limit_bytes: usize,
    messages: u64,
    spooled_bytes: u64,
    oldest: Timestamp,
    /// How large the data is so far, without gzip and with what closes it.
    size_bytes: usize,
    content: Content,
}

enum Content {
    Json(Vec<u8>),
    Batch(Vec<BatchMessage>),
    Events(Vec<Vec<u8>>),
}

/// Magic, MD5 and the partition key's tag and length in an aggregate.
const KPL_BYTES: usize = 4 + 16 + 6;
/// Tags, lengths and the key's index of a user record.
const KPL_USER_RECORD_BYTES: usize = 16;

impl<'a> Packer<'a> {
    pub(super) fn new(packing: Packing, source: &'a EventSource) -> Self {
        let key_bytes = source.partition_key().len();
        let (content, size_bytes) = match packing.encoding {
            Encoding::Array | Encoding::Single => (Content::Json(Vec::new()), 0),
            Encoding::Batch => (Content::Batch(Vec::new()), 0),
            Encoding::Kpl => (Content::Events(Vec::new()), KPL_BYTES + key_bytes),
        };
        Self {
            packing,
            source,
            limit_bytes: packing.record_limit_bytes.saturating_sub(key_bytes),
            messages: 0,
            spooled_bytes: 0,
            oldest: Timestamp::MAX,
            size_bytes,
            content,
        }
    }

    /// Adds a message, or tells that it opens the next record. A record takes its first message whatever
    /// its size, so that none is stuck.
    ///
    /// With gzip too, the limit is that of the bytes before: who can hold the record can read it.
    pub(super) fn push(&mut self, message: &Spooled<'_>) -> bool {
        let first = self.messages == 0;
        let time = event_time(message.received_at);
        match &mut self.content {
            Content::Json(json) => {
                let event = self.source.event(&time, message.raw).json;
                let array = self.packing.encoding == Encoding::Array;
                let separator_and_end = if array { 2 } else { 0 };
                let size_bytes = json.len() + event.len() + separator_and_end;
                if !first && (!array || size_bytes > self.limit_bytes) {
                    return false;
                }
                if array {
                    json.push(if first { b'[' } else { b',' });
                }
                json.extend_from_slice(&event);
            }
            Content::Batch(messages) => {
                let next = BatchMessage::new(&time, message.raw);
                let mut size_bytes = self.size_bytes + next.json.len() + 1;
                if first {
                    let alone = self.source.batch(std::slice::from_ref(&next));
                    size_bytes = alone.map_or(size_bytes, |event| event.json.len());
                }
                if !first && size_bytes > self.limit_bytes {
                    return false;
                }
                self.size_bytes = size_bytes;
                messages.push(next);
            }
            Content::Events(events) => {
                let mut data = self.source.event(&time, message.raw).json;
                if self.packing.gzip {
                    data = zipped(data);
                }
                let size_bytes = self.size_bytes + data.len() + KPL_USER_RECORD_BYTES;
                if !first && size_bytes > self.limit_bytes {
                    return false;
                }
                self.size_bytes = size_bytes;
                events.push(data);
            }
        }
        self.messages += 1;
        self.spooled_bytes += message.spooled_bytes();
        self.oldest = self.oldest.min(message.received_at);
        true
    }

    /// The record; `None` if no message was added.
    pub(super) fn finish(self) -> Option<Packed> {
        if self.messages == 0 {
            return None;
        }
        let key = self.source.partition_key();
        let data = match self.content {
            Content::Json(mut json) => {
                if self.packing.encoding == Encoding::Array {
                    json.push(b']');
                }
                json
            }
            Content::Batch(messages) => self.source.batch(&messages)?.json,
            Content::Events(events) => {
                write_aggregate(events.iter().map(|event| (key, event.as_slice())))
            }
        };
        // Readers look for an aggregate first: inside of one, each user record is compressed.
        let data = match self.packing {
            Packing {
                gzip: true,
                encoding: Encoding::Array | Encoding::Single | Encoding::Batch,
                ..
            } => zipped(data),
            _ => data,
        };
        let Self { messages, spooled_bytes, oldest, .. } = self;
        Some(Packed { data, messages, spooled_bytes, oldest })
    }
}

/// The gzip of it, unless that is no shorter. Readers tell by the first bytes.
fn zipped(data: Vec<u8>) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::with_capacity(data.len() / 4), Compression::fast());
    // Writing to a Vec cannot fail.
    match encoder.write_all(&data).and_then(|()| encoder.finish()) {
        Ok(zipped) if zipped.len() < data.len() => zipped,
        _ => data,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;
    use crate::ocs::{BATCH_EVENT_TYPE, EVENT_TYPE, event_schema};

    const ENCODINGS: [Encoding; 4] =
        [Encoding::Array, Encoding::Single, Encoding::Batch, Encoding::Kpl];

    fn source() -> EventSource {
        EventSource::new("test_key".into(), "opstech3.mbta.com/trike", "10.0.0.1".parse().ok())
    }

    fn spooled(raw: &[u8]) -> Spooled<'_> {
        Spooled { received_at: Timestamp::UNIX_EPOCH, raw }
    }

    fn unzipped(data: &[u8]) -> Vec<u8> {
        if !data.starts_with(&[0x1F, 0x8B]) {
            return data.to_vec();
        }
        let mut plain = Vec::new();
        std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(data), &mut plain)
            .expect("gzip");
        plain
    }

    /// The bytes of the events in a record, one CloudEvent each.
    fn events(encoding: Encoding, data: &[u8]) -> Vec<Value> {
        let json = |data: &[u8]| serde_json::from_slice::<Value>(data).expect("JSON");
        match encoding {
            Encoding::Array => json(&unzipped(data)).as_array().expect("an array").clone(),
            Encoding::Single | Encoding::Batch => vec![json(&unzipped(data))],
            Encoding::Kpl => {
                use prost::Message as _;

                assert_eq!(data[..4], [0xF3, 0x89, 0x9A, 0xC2]);
                let aggregate = Aggregated::decode(&data[4..data.len() - 16]).expect("protobuf");
                assert_eq!(aggregate.keys, ["test_key"]);
                aggregate.records.iter().map(|record| json(&unzipped(&record.data))).collect()
            }
        }
    }

    #[derive(Clone, PartialEq, prost::Message)]
    struct Aggregated {
        #[prost(string, repeated, tag = "1")]
        keys: Vec<String>,
        #[prost(message, repeated, tag = "3")]
        records: Vec<UserRecord>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    struct UserRecord {
        #[prost(uint64, tag = "1")]
        key: u64,
        #[prost(bytes = "vec", tag = "3")]
        data: Vec<u8>,
    }

    #[test]
    fn one_event_is_an_array_too() {
        let source = source();
        let packing = Packing { encoding: Encoding::Array, gzip: false, record_limit_bytes: 1 };
        assert_eq!(Packer::new(packing, &source).finish(), None);
        let mut packer = Packer::new(packing, &source);
        assert!(packer.push(&spooled(b"1,DIAG,x")), "the first one whatever its size");
        assert!(!packer.push(&spooled(b"2,DIAG,x")));
        let packed = packer.finish().expect("a record");
        assert_eq!(packed.messages, 1);
        let event = source.event("1970-01-01T00:00:00.000000Z", b"1,DIAG,x").json;
        assert_eq!(packed.data, [&b"["[..], &event, b"]"].concat());
    }

    #[test]
    fn every_event_that_is_written_fits_its_schema() {
        let schema = |event_type: &str| {
            let text = event_schema(event_type).expect("a type of ours");
            let schema: Value = serde_json::from_str(text).expect("JSON");
            let validating = jsonschema::options().should_validate_formats(true);
            validating.build(&schema).expect("a schema")
        };
        let single = schema(EVENT_TYPE);
        let batch = schema(BATCH_EVENT_TYPE);
        let raws: [&[u8]; 4] =
            [b"4994,TSCH,02:00:06,R,RLD,W", b"\xff\xfe", b"\"\\\x01\n", "é\u{1F689}".as_bytes()];
        let source = source();
        for encoding in ENCODINGS {
            for gzip in [false, true] {
                let packing = Packing { encoding, gzip, record_limit_bytes: 1024 * 1024 };
                let mut rest = raws.as_slice();
                while !rest.is_empty() {
                    let mut packer = Packer::new(packing, &source);
                    while rest.first().is_some_and(|raw| packer.push(&spooled(raw))) {
                        rest = &rest[1..];
                    }
                    let packed = packer.finish().expect("a record");
                    let validator = if encoding == Encoding::Batch { &batch } else { &single };
                    for event in events(encoding, &packed.data) {
                        if let Err(error) = validator.validate(&event) {
                            panic!("{encoding:?}: {error} in {event}");
                        }
                        let mut broken = event;
                        broken.as_object_mut().expect("an object").remove("time");
                        assert!(!validator.is_valid(&broken));
                    }
                }
            }
        }
    }

    proptest! {
        #[test]
        fn p7_records_stay_under_the_limit_and_hold_every_message_in_order(
            sizes in prop::collection::vec(0usize..600, 1..40),
            limit in 1200usize..4000,
            encoding in prop::sample::select(&ENCODINGS[..]),
            gzip in any::<bool>(),
        ) {
            let source = source();
            let packing = Packing { encoding, gzip, record_limit_bytes: limit };
            let raws: Vec<String> =
                sizes.iter().enumerate().map(|(n, size)| format!("{n},{}", "x".repeat(*size))).collect();
            let mut seen = Vec::new();
            let mut rest = raws.as_slice();
            while !rest.is_empty() {
                let mut packer = Packer::new(packing, &source);
                while rest.first().is_some_and(|raw| packer.push(&spooled(raw.as_bytes()))) {
                    rest = &rest[1..];
                }
                let packed = packer.finish().expect("a record");
                prop_assert!(packed.data.len() + "test_key".len() <= limit);
                let before = seen.len();
                for event in events(encoding, &packed.data) {
                    let messages = event["data"]["messages"].as_array().cloned();
                    for message in messages.unwrap_or_else(|| vec![event["data"].clone()]) {
                        seen.push(message["raw"].as_str().expect("a text").to_owned());
                    }
                }
                prop_assert_eq!((seen.len() - before) as u64, packed.messages);
            }
            prop_assert_eq!(seen, raws);
        }
    }
}
