//! The bytes of a state document. Pure.
//!
//! ```text
//! {"version":1,"application":"rtr-green","stream":"ctd-ocs-raw-messages","writer":"host-1","write":…}
//! …the state of the first shard…
//! …the state of the second…
//! {"sha256":"…"}
//! ```
//!
//! The first line is a JSON object, the header. It says whose the document is, who wrote it last and
//! when, and, under `shards`, how far each shard is finished: `head -1 FILE | jq`.
//!
//! | in the header | meaning |
//! |---|---|
//! | `version` | 1; raised with any change of the format |
//! | `application`, `stream` | whose positions these are |
//! | `writer`, `written_at` | the worker that wrote last, and when, by its clock |
//! | `write` | tells the write from all others: a random number of the writing process, how many documents it had taken over, how often it had written this one |
//! | `shards.ID.checkpoint`, `.sub_sequence_number` | as in the lease table; absent before the first one |
//! | `shards.ID.start_at` | where reading starts, for the checkpoints `LATEST` and `AT_TIMESTAMP` |
//! | `shards.ID.lease_counter` | the lease counter of the last worker that opened the shard |
//! | `shards.ID.state_bytes` | the length of the handler's state; absent if there is none |
//!
//! After it come the states, as the handlers gave them, in the order of the header, each followed by a
//! newline. The last line is a JSON object too: the SHA-256 of everything before it. So a document that
//! was cut short or changed is noticed, and state is neither escaped nor encoded.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
};

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::Checkpoint;
use crate::shard::ShardId;

/// The largest document.
pub(super) const LIMIT_BYTES: usize = 64 * 1024 * 1024;

const VERSION: u64 = 1;
/// `{"sha256":"…"}` and a newline.
const LAST_LINE_BYTES: usize = 11 + 64 + 3;

/// What is stored of a shard.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Saved {
    /// How far it is finished; `None` before the first checkpoint.
    pub checkpoint: Option<Checkpoint>,
    /// Where reading starts, for the checkpoints `LATEST` and `AT_TIMESTAMP`.
    pub start_at: Option<Timestamp>,
    /// The lease counter of the last worker that opened it.
    pub lease_counter: u64,
    /// The state of the handler at the checkpoint.
    pub state: Option<Bytes>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Document {
    pub application: String,
    pub stream: String,
    pub stamp: Stamp,
    pub shards: BTreeMap<ShardId, Saved>,
}

/// Who wrote a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stamp {
    /// The worker's id.
    pub writer: String,
    pub write: WriteId,
    /// By the writer's clock, for people. Milliseconds.
    pub at: Timestamp,
}

/// Tells one write from all others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct WriteId {
    /// Drawn at random by each process: two workers may go by one name.
    pub process: u64,
    /// How many documents the process had taken over.
    pub tenure: u64,
    /// How often it had written this one since.
    pub number: u64,
}

/// Why bytes are not a document.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Flaw {
    /// They were cut short or changed, or never were one.
    Damaged(String),
    /// A later version of Tramline wrote them.
    Version(u64),
}

#[derive(Serialize, Deserialize)]
struct Header {
    version: u64,
    application: String,
    stream: String,
    writer: String,
    write: String,
    written_at: String,
    shards: BTreeMap<String, Row>,
}

#[derive(Serialize, Deserialize)]
struct Row {
    #[serde(skip_serializing_if = "Option::is_none")]
    checkpoint: Option<String>,
    sub_sequence_number: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    start_at: Option<Timestamp>,
    lease_counter: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    state_bytes: Option<usize>,
}

impl Document {
    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.len_bytes());
        bytes.extend(self.header());
        bytes.push(b'\n');
        for state in self.states() {
            bytes.extend_from_slice(state);
            bytes.push(b'\n');
        }
        let last_line = last_line(&bytes);
        bytes.extend(last_line.into_bytes());
        bytes
    }

    /// The number of its bytes. The stamp's write and time do not change it.
    pub fn len_bytes(&self) -> usize {
        let states: usize = self.states().map(|state| state.len() + 1).sum();
        self.header().len() + 1 + states + LAST_LINE_BYTES
    }

    /// Reads a document. States are parts of `bytes`, not copies.
    pub fn decode(bytes: &Bytes) -> Result<Self, Flaw> {
        #[derive(Deserialize)]
        struct Version {
            version: u64,
        }
        const NO_HEADER: &str = "its first line is not the header of a state document";
        let damaged = |reason: String| Flaw::Damaged(reason);

        let line = bytes.split(|b| *b == b'\n').next().unwrap_or_default();
        let version: Version =
            serde_json::from_slice(line).map_err(|_| damaged(NO_HEADER.to_owned()))?;
        if version.version != VERSION {
            return Err(Flaw::Version(version.version));
        }
        let header: Header = serde_json::from_slice(line)
            .map_err(|error| damaged(format!("{NO_HEADER}: {error}")))?;

        let states = header.shards.values().filter_map(|row| row.state_bytes);
        let promised = states
            .map(|length| length.saturating_add(1))
            .fold(line.len() + 1 + LAST_LINE_BYTES, usize::saturating_add);
        if promised != bytes.len() {
            let length = bytes.len();
            return Err(damaged(format!(
                "it has {length} bytes where its header promises {promised}"
            )));
        }
        let (summed, sum) = bytes.split_at(bytes.len() - LAST_LINE_BYTES);
        if last_line(summed).as_bytes() != sum {
            return Err(damaged("its checksum does not match".to_owned()));
        }

        let mut at = line.len() + 1;
        let mut shards = BTreeMap::new();
        for (shard, row) in header.shards {
            let state = row.state_bytes.map(|length| bytes.slice(at..at + length));
            at += row.state_bytes.map_or(0, |length| length + 1);
            let saved = row.read(state).map_err(|text| {
                damaged(format!(
                    "shard {shard} has no sequence number as its checkpoint but {text:?}"
                ))
            })?;
            shards.insert(shard.into(), saved);
        }
        let stamp = Stamp::read(&header.writer, &header.write, &header.written_at)
            .ok_or_else(|| damaged(NO_HEADER.to_owned()))?;
        Ok(Self { application: header.application, stream: header.stream, stamp, shards })
    }

    fn header(&self) -> Vec<u8> {
        let Stamp { writer, write, at } = &self.stamp;
        let header = Header {
            version: VERSION,
            application: self.application.clone(),
            stream: self.stream.clone(),
            writer: writer.clone(),
            write: write.to_string(),
            written_at: format!("{at:.3}"),
            shards: self
                .shards
                .iter()
                .map(|(shard, saved)| (shard.to_string(), Row::of(saved)))
                .collect(),
        };
        serde_json::to_vec(&header).expect("texts and numbers can be written as JSON")
    }

    fn states(&self) -> impl Iterator<Item = &Bytes> {
        self.shards.values().filter_map(|saved| saved.state.as_ref())
    }
}

impl Row {
    fn of(saved: &Saved) -> Self {
        let checkpoint = saved.checkpoint.as_ref();
        Self {
            checkpoint: checkpoint.map(|checkpoint| checkpoint.as_str().to_owned()),
            sub_sequence_number: checkpoint.map_or(0, Checkpoint::sub_sequence_number),
            start_at: saved.start_at,
            lease_counter: saved.lease_counter,
            state_bytes: saved.state.as_ref().map(Bytes::len),
        }
    }

    /// The error is the text that is no checkpoint.
    fn read(self, state: Option<Bytes>) -> Result<Saved, String> {
        let checkpoint = match self.checkpoint {
            None => None,
            Some(text) => Some(Checkpoint::parse(&text, self.sub_sequence_number).ok_or(text)?),
        };
        Ok(Saved { checkpoint, start_at: self.start_at, lease_counter: self.lease_counter, state })
    }
}

impl Stamp {
    fn read(writer: &str, write: &str, written_at: &str) -> Option<Self> {
        Some(Self {
            writer: writer.to_owned(),
            write: WriteId::parse(write)?,
            at: written_at.parse().ok()?,
        })
    }
}

impl WriteId {
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('-').map(|part| u64::from_str_radix(part, 16).ok());
        Some(Self { process: parts.next()??, tenure: parts.next()??, number: parts.next()?? })
    }
}

/// Always of the same length.
impl fmt::Display for WriteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}-{:016x}-{:016x}", self.process, self.tenure, self.number)
    }
}

fn last_line(summed: &[u8]) -> String {
    let mut line = String::with_capacity(LAST_LINE_BYTES);
    line.push_str("{\"sha256\":\"");
    for byte in Sha256::digest(summed) {
        let _ = write!(line, "{byte:02x}"); // Writing to a string cannot fail.
    }
    line.push_str("\"}\n");
    line
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn document(shards: impl IntoIterator<Item = (&'static str, Saved)>) -> Document {
        Document {
            application: "rtr".into(),
            stream: "ocs".into(),
            stamp: Stamp {
                writer: "host-1".into(),
                write: WriteId { process: u64::MAX, tenure: 1, number: 42 },
                at: Timestamp::from_millisecond(1_751_468_400_123).expect("a time"),
            },
            shards: shards.into_iter().map(|(shard, saved)| (shard.into(), saved)).collect(),
        }
    }

    fn two_shards() -> Document {
        document([
            (
                "shardId-0",
                Saved {
                    checkpoint: Checkpoint::parse("4959033827149025660", 7),
                    start_at: None,
                    lease_counter: 3,
                    state: Some(Bytes::from_static(b"\0two\nlines")),
                },
            ),
            (
                "shardId-1",
                Saved {
                    checkpoint: Some(Checkpoint::Latest),
                    start_at: Some(Timestamp::UNIX_EPOCH),
                    ..Saved::default()
                },
            ),
        ])
    }

    #[test]
    fn the_format_is_what_the_documentation_says() {
        let text = String::from_utf8(two_shards().encode()).expect("UTF-8");
        let header = r#"{"version":1,"application":"rtr","stream":"ocs","writer":"host-1","#
            .to_owned()
            + r#""write":"ffffffffffffffff-0000000000000001-000000000000002a","written_at":"2025-07-02T15:00:00.123Z","#
            + r#""shards":{"shardId-0":{"checkpoint":"4959033827149025660","sub_sequence_number":7,"#
            + r#""lease_counter":3,"state_bytes":10},"shardId-1":{"checkpoint":"LATEST","#
            + r#""sub_sequence_number":0,"start_at":"1970-01-01T00:00:00Z","lease_counter":0}}}"#;
        let sum = "ee238e03c88b0107d80cafafc3e667a6fc17a220a332b769e624d01e9f0b8848";
        assert_eq!(text, format!("{header}\n\0two\nlines\n{{\"sha256\":\"{sum}\"}}\n"));
    }

    #[test]
    fn a_document_that_was_cut_short_or_changed_is_noticed() {
        let bytes = two_shards().encode();
        for length in 0..bytes.len() {
            let cut = Bytes::copy_from_slice(&bytes[..length]);
            assert!(Document::decode(&cut).is_err(), "cut to {length}");
        }
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(Document::decode(&changed.into()).is_err(), "changed at {at}");
        }
        let longer = [&bytes[..], b"\n"].concat();
        assert!(Document::decode(&longer.into()).is_err());
    }

    #[test]
    fn what_is_no_document_is_told_from_one_of_a_later_version() {
        let flaw = |text: &'static str| Document::decode(&Bytes::from_static(text.as_bytes()));
        for text in ["", "\n", "{\"green\":1}", "PK\u{3}\u{4}", "{\"version\":1}\n"] {
            assert!(matches!(flaw(text), Err(Flaw::Damaged(_))), "{text:?}");
        }
        assert_eq!(flaw("{\"version\":2,\"new\":[]}\nwhatever"), Err(Flaw::Version(2)));
        let huge = "{\"version\":1,\"application\":\"\",\"stream\":\"\",\"writer\":\"\",\"write\":\"\",\
                    \"written_at\":\"\",\"shards\":{\"a\":{\"sub_sequence_number\":0,\
                    \"lease_counter\":0,\"state_bytes\":18446744073709551615}}}\n";
        assert!(matches!(flaw(huge), Err(Flaw::Damaged(_))), "a length that overflows");
    }

    fn saved() -> impl Strategy<Value = Saved> {
        let checkpoint = prop::option::of(prop_oneof![
            Just(Checkpoint::ShardEnd),
            Just(Checkpoint::TrimHorizon),
            ("[0-9]{1,56}", any::<u64>())
                .prop_map(|(number, sub)| Checkpoint::parse(&number, sub).expect("a number")),
        ]);
        let start_at = prop::option::of(
            (0..4_000_000_000_i64)
                .prop_map(|second| Timestamp::from_second(second).expect("a time")),
        );
        let state = prop::option::of(prop::collection::vec(any::<u8>(), 0..100));
        (checkpoint, start_at, any::<u64>(), state).prop_map(
            |(checkpoint, start_at, lease_counter, state)| Saved {
                checkpoint,
                start_at,
                lease_counter,
                state: state.map(Bytes::from),
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(
            shards in prop::collection::btree_map("[a-zA-Z0-9_.-]{1,20}", saved(), 0..5),
            writer in any::<String>(),
        ) {
            let mut document = document([]);
            document.stamp.writer = writer;
            document.shards =
                shards.into_iter().map(|(shard, saved)| (shard.into(), saved)).collect();
            let bytes = document.encode();
            prop_assert_eq!(bytes.len(), document.len_bytes());
            prop_assert_eq!(Document::decode(&bytes.into()), Ok(document));
        }
    }
}
