//! The dead letter, and how it is written: one JSON object a line, the same at every destination.
//!
//! ```json
//! {"dead_letter":{"version":1,"kind":"handler-failed","reason":"no such trip","stream":"s",
//!  "shard":"shardId-000000000000","sequence_number":"495…","sub_sequence_number":3,
//!  "partition_key":"k","arrived_at":"…","attempts":5,"given_up_at":"…","application":"rtr",
//!  "worker":"w1","event":{…},"data_base64":"…"}}
//! ```
//! (On one line.) `data_base64` is what counts: the exact bytes, for a message those of its CloudEvent.
//! `event` shows the same to people and to `jq`, if it is a JSON object. Fields may be added within a
//! version.

use std::{
    fmt,
    io::{self, Write as _},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};

use crate::{record::Message, shard::SequenceNumber};

/// The version of the format that is written and read.
pub(super) const VERSION: u32 = 1;
/// The most of a reason that is written. An error text may quote what it failed on.
const REASON_LIMIT_BYTES: usize = 4 * 1024;
/// How much of the data of a letter that is cut goes into one part. The same for every copy of a letter,
/// so that parts of different copies fit together.
const PART_BYTES: usize = 512 * 1024;

/// Something that could not be delivered, with all that is needed to look into it or to put it back
/// (P9).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DeadLetter {
    pub kind: Kind,
    /// The reason in words; what the handler said, if it failed.
    pub reason: String,
    pub place: Place,
    /// How often the handler was offered it: 0 for what was not a message.
    pub attempts: u32,
    pub given_up_at: Timestamp,
    pub application: Option<String>,
    pub worker: Option<String>,
    /// Its bytes as they came; those of the CloudEvent for a message.
    pub data: Bytes,
}

/// Why it could not be delivered, for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    /// It is no raw OCS message.
    Undecodable,
    /// The handler returned an error each time.
    HandlerFailed,
    /// The handler did not return in time.
    HandlerTimedOut,
    /// An OCS message over the size limit.
    Oversized,
    /// An OCS message without an end.
    Unfinished,
}

/// Where it was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Place {
    /// In a record of a stream, by a worker.
    Record(RecordPlace),
    /// On an OCS connection, by the producer.
    Connection {
        connection: String,
        received_at: String,
        /// How long it was; more than there is data if it was over the size limit.
        length_bytes: u64,
    },
}

/// A place in a stream. Their order is that of the stream.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct RecordPlace {
    pub stream: String,
    pub shard: String,
    #[serde(deserialize_with = "sequence_number")]
    pub sequence_number: SequenceNumber,
    /// The place among the user records of a KPL aggregate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_record: Option<u64>,
    /// The place among the messages; none if the record as a whole is the letter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sub_sequence_number: Option<u64>,
    pub partition_key: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arrived_at: Option<Timestamp>,
}

fn sequence_number<'de, D: Deserializer<'de>>(json: D) -> Result<SequenceNumber, D::Error> {
    SequenceNumber::parse(String::deserialize(json)?)
        .ok_or_else(|| D::Error::custom("not a sequence number"))
}

impl From<&Message> for Place {
    fn from(message: &Message) -> Self {
        Self::Record(RecordPlace {
            stream: message.stream().to_owned(),
            shard: message.shard().as_str().to_owned(),
            sequence_number: message.sequence_number().clone(),
            user_record: message.user_record(),
            sub_sequence_number: Some(message.sub_sequence_number()),
            partition_key: message.partition_key().to_owned(),
            arrived_at: message.arrived_at(),
        })
    }
}

/// Which piece of a letter a line has, if a destination could not take the letter in one line.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct Part {
    /// From 1.
    pub number: u32,
    pub of: u32,
    /// Of the whole data, in hexadecimal digits.
    pub data_sha256: String,
}

#[derive(Serialize, Deserialize)]
pub(super) struct Line<L> {
    pub dead_letter: L,
}

#[derive(Serialize)]
struct Written<'a> {
    version: u32,
    kind: Kind,
    reason: &'a str,
    #[serde(flatten)]
    place: &'a Place,
    attempts: u32,
    given_up_at: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    application: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    worker: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    part: Option<Part>,
    #[serde(skip_serializing_if = "Option::is_none")]
    event: Option<&'a RawValue>,
    data_base64: String,
}

/// Which letter it is: the same for every copy of it, whoever wrote it and when. The bytes count, since a
/// stream that was made again under its name may count from the beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct LetterId([u8; 16]);

impl AsRef<[u8]> for LetterId {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Serialize for LetterId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for LetterId {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        let text = String::deserialize(json)?;
        let mut id = [0; 16];
        let digits = |n: usize| u8::from_str_radix(text.get(2 * n..2 * n + 2)?, 16).ok();
        for (n, byte) in id.iter_mut().enumerate() {
            *byte = digits(n).ok_or_else(|| D::Error::custom("not the id of a letter"))?;
        }
        Ok(Self(id))
    }
}

impl fmt::Display for LetterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hexadecimal(&self.0))
    }
}

impl DeadLetter {
    pub(crate) fn id(&self) -> LetterId {
        let mut hash = Sha256::new();
        let mut text = |text: &str| {
            hash.update(text);
            hash.update([0]);
        };
        match &self.place {
            Place::Record(place) => {
                text(&place.stream);
                text(&place.shard);
                text(place.sequence_number.as_str());
                for number in [place.user_record, place.sub_sequence_number] {
                    text(&number.map_or(String::new(), |number| number.to_string()));
                }
            }
            Place::Connection { connection, received_at, .. } => {
                text(connection);
                text(received_at);
            }
        }
        let digest = hash.chain_update(&self.data).finalize();
        let mut id = [0; 16];
        id.copy_from_slice(&digest[..16]);
        LetterId(id)
    }

    /// Its line, with the line break.
    pub(crate) fn line(&self) -> Vec<u8> {
        self.written(&self.data, self.event(), None)
    }

    /// The same for a destination that takes at most `limit_bytes` at a time, which must be more than a
    /// part takes. A letter that is too large for it is written without `event`, and if that is too
    /// large too, as several lines that each have a piece of the data.
    pub(crate) fn lines(&self, limit_bytes: usize) -> Vec<Vec<u8>> {
        for event in [self.event(), None] {
            let line = self.written(&self.data, event, None);
            if line.len() <= limit_bytes {
                return vec![line];
            }
        }
        let data_sha256 = hexadecimal(&Sha256::digest(&self.data));
        let of = self.data.len().div_ceil(PART_BYTES) as u32;
        (1..)
            .zip(self.data.chunks(PART_BYTES))
            .map(|(number, data)| {
                let part = Part { number, of, data_sha256: data_sha256.clone() };
                self.written(data, None, Some(part))
            })
            .collect()
    }

    fn event(&self) -> Option<&RawValue> {
        let event: &RawValue = serde_json::from_slice(&self.data).ok()?;
        event.get().starts_with('{').then_some(event)
    }

    fn written(&self, data: &[u8], event: Option<&RawValue>, part: Option<Part>) -> Vec<u8> {
        let line = Line {
            dead_letter: Written {
                version: VERSION,
                kind: self.kind,
                reason: &shortened(&self.reason),
                place: &self.place,
                attempts: self.attempts,
                given_up_at: self.given_up_at,
                application: self.application.as_deref(),
                worker: self.worker.as_deref(),
                part,
                event,
                data_base64: BASE64_STANDARD.encode(data),
            },
        };
        let mut line = serde_json::to_vec(&line)
            .expect("texts, numbers and times have a JSON form, and a Vec takes every write");
        // Line breaks can only be white space of the event: within strings JSON escapes them.
        for byte in &mut line {
            if matches!(byte, b'\n' | b'\r') {
                *byte = b' ';
            }
        }
        line.push(b'\n');
        line
    }

    /// Writes it to stderr, and returns when that is done: a reader of stderr that does not read holds
    /// up this shard or connection, and nothing else.
    pub(crate) async fn write(&self) {
        write_to_stderr(self.line()).await;
    }
}

pub(super) async fn write_to_stderr(lines: Vec<u8>) {
    let write = move || io::stderr().lock().write_all(&lines);
    if let Ok(Err(error)) = tokio::task::spawn_blocking(write).await {
        // There is no place left where it could be written.
        tracing::error!("dead letters not written to stderr: {error}");
    }
}

fn shortened(reason: &str) -> std::borrow::Cow<'_, str> {
    if reason.len() <= REASON_LIMIT_BYTES {
        return reason.into();
    }
    let cut = reason.floor_char_boundary(REASON_LIMIT_BYTES);
    format!("{} … ({} bytes more)", &reason[..cut], reason.len() - cut).into()
}

pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;
    use crate::handler::dead_letter_line::ReadLine;

    /// A letter of `data`, found at a place of the shard `shardId-0`.
    pub(crate) fn letter(sequence_number: u64, key: &str, data: impl Into<Bytes>) -> DeadLetter {
        DeadLetter {
            kind: Kind::HandlerFailed,
            reason: "no such trip".into(),
            place: Place::Record(RecordPlace {
                stream: "s".into(),
                shard: "shardId-0".into(),
                sequence_number: SequenceNumber::parse(sequence_number.to_string())
                    .expect("a number"),
                user_record: None,
                sub_sequence_number: Some(0),
                partition_key: key.into(),
                arrived_at: "2025-07-02T15:00:00Z".parse().ok(),
            }),
            attempts: 5,
            given_up_at: "2025-07-02T15:00:10Z".parse().expect("a time"),
            application: Some("rtr".into()),
            worker: Some("w1".into()),
            data: data.into(),
        }
    }

    fn value(line: &[u8]) -> Value {
        serde_json::from_slice(line).expect("JSON")
    }

    #[test]
    fn a_letter_says_where_why_and_when_and_shows_the_event() {
        let line = value(&letter(17, "k", "{\"id\":\n 7}").line());
        let expected = serde_json::json!({"dead_letter": {
            "version": 1, "kind": "handler-failed", "reason": "no such trip", "stream": "s",
            "shard": "shardId-0", "sequence_number": "17", "sub_sequence_number": 0,
            "partition_key": "k", "arrived_at": "2025-07-02T15:00:00Z", "attempts": 5,
            "given_up_at": "2025-07-02T15:00:10Z", "application": "rtr", "worker": "w1",
            "event": {"id": 7}, "data_base64": "eyJpZCI6CiA3fQ==",
        }});
        assert_eq!(line, expected);
    }

    #[test]
    fn what_came_over_a_connection_says_so() {
        let place = Place::Connection {
            connection: "{a -> b}".into(),
            received_at: "2025-07-02T15:00:00.000000Z".into(),
            length_bytes: 3000,
        };
        let letter = DeadLetter { kind: Kind::Oversized, place, ..letter(1, "k", "xxx") };
        let line = letter.line();
        let fields = &value(&line)["dead_letter"];
        assert_eq!(
            (&fields["connection"], &fields["length_bytes"]),
            (&"{a -> b}".into(), &3000.into())
        );
        assert_eq!(fields.get("stream"), None);
        assert_eq!(ReadLine::parse(&line).expect("a letter").letter, letter);
    }

    #[test]
    fn a_long_reason_is_cut_and_says_so() {
        let reason = "é".repeat(5000);
        let line = DeadLetter { reason, ..letter(1, "k", "x") }.line();
        let reason = value(&line)["dead_letter"]["reason"].as_str().expect("a text").to_owned();
        assert!(reason.ends_with("é … (5904 bytes more)"), "{}", &reason[reason.len() - 40..]);
    }

    #[test]
    fn p9_a_letter_too_large_for_a_destination_loses_its_event_first_and_is_then_cut_in_parts() {
        let event = format!("{{\"data\":\"{}\"}}", "x".repeat(500_000));
        let limit = 1024 * 1024;
        let lines = letter(1, "k", event.clone()).lines(limit);
        assert_eq!(lines.len(), 1);
        assert_eq!(value(&lines[0])["dead_letter"].get("event"), None);
        assert_eq!(ReadLine::parse(&lines[0]).expect("a letter").letter.data, event);

        let event = vec![b'x'; 1024 * 1024];
        // The worst reason, application and worker still fit.
        let worst = DeadLetter {
            reason: "\u{1}".repeat(100_000),
            worker: Some("w".repeat(256)),
            ..letter(1, &"\u{1}".repeat(256), event.clone())
        };
        let lines = worst.lines(limit - 256);
        assert_eq!(lines.len(), 2);
        let mut data = Vec::new();
        for (n, line) in (1..).zip(&lines) {
            assert!(line.len() <= limit - 256);
            let read = ReadLine::parse(line).expect("a part");
            let part = read.part.expect("a part");
            assert_eq!((part.number, part.of), (n, 2));
            assert_eq!(part.data_sha256, hexadecimal(&Sha256::digest(&event)));
            data.extend_from_slice(&read.letter.data);
        }
        assert_eq!(data, event);
    }

    #[test]
    fn a_letter_is_known_by_its_place_and_bytes() {
        let one = letter(1, "k", "x");
        let copy = DeadLetter { attempts: 9, worker: None, ..one.clone() };
        assert_eq!(copy.id(), one.id());
        for other in [letter(2, "k", "x"), letter(1, "k", "y")] {
            assert_ne!(other.id(), one.id());
        }
        let mut part = one.clone();
        if let Place::Record(place) = &mut part.place {
            place.sub_sequence_number = Some(1);
        }
        assert_ne!(part.id(), one.id());
        assert_eq!(one.id().to_string().len(), 32);
    }

    proptest! {
        #[test]
        fn p9_any_letter_is_one_line_and_reads_back(
            data in prop::collection::vec(any::<u8>(), 0..200),
            (reason, key, worker) in any::<(String, String, Option<String>)>(),
            (user_record, sub_sequence_number) in any::<(Option<u64>, Option<u64>)>(),
        ) {
            let mut letter = DeadLetter { reason, worker, ..letter(1, &key, data) };
            if let Place::Record(place) = &mut letter.place {
                place.user_record = user_record;
                place.sub_sequence_number = sub_sequence_number;
            }
            let line = letter.line();
            prop_assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
            prop_assert_eq!(line.last(), Some(&b'\n'));
            let read = ReadLine::parse(&line).expect("a letter");
            prop_assert_eq!(read.letter, letter);
            prop_assert_eq!(read.part, None);
        }

    }
}
