use std::{borrow::Cow, fmt, ops::Range, sync::Arc};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use jiff::Timestamp;

use super::ShardName;
use crate::{
    checkpoint::Position,
    shard::{SequenceNumber, ShardId},
};

/// One OCS message and where it came from.
///
/// Cheap to clone and to keep: the messages of a record share its bytes, and texts are read from them
/// in place.
#[derive(Clone)]
pub struct Message {
    pub(super) origin: Arc<Origin>,
    pub(super) sub_sequence_number: u64,
    /// The event's JSON, within the payload.
    pub(super) event: Range<usize>,
    pub(super) raw: Text,
    pub(super) raw_base64: Option<Text>,
    pub(super) id: Text,
    pub(super) time: Text,
    pub(super) source: Text,
}

/// What the messages of one record have in common.
#[derive(Debug)]
pub(super) struct Origin {
    pub shard: Arc<ShardName>,
    pub sequence_number: SequenceNumber,
    pub partition_key: String,
    pub arrived_at: Option<Timestamp>,
    pub payload: Bytes,
}

/// A text of an event: in place where the JSON has it unescaped, else a copy.
#[derive(Debug, Clone)]
pub(super) enum Text {
    InPlace(Range<usize>),
    Unescaped(Box<str>),
}

impl Message {
    /// The OCS line, such as `4994,TSCH,02:00:06,R,RLD,W`. Bytes that are no text show as U+FFFD;
    /// [`raw_bytes`](Self::raw_bytes) has them.
    pub fn raw(&self) -> &str {
        self.text(&self.raw)
    }

    /// The OCS line exactly as it was received.
    pub fn raw_bytes(&self) -> Cow<'_, [u8]> {
        self.raw_base64
            .as_ref()
            .and_then(|kept| BASE64_STANDARD.decode(self.text(kept)).ok())
            .map_or(Cow::Borrowed(self.raw().as_bytes()), Cow::Owned)
    }

    /// The CloudEvent's id. A repeat that the producer or a restart caused has the same one.
    pub fn id(&self) -> &str {
        self.text(&self.id)
    }

    /// When the producer received the message, as the event prints it.
    pub fn time_text(&self) -> &str {
        self.text(&self.time)
    }

    /// When the producer received the message; `None` if the event's time is not RFC 3339.
    pub fn time(&self) -> Option<Timestamp> {
        self.time_text().parse().ok()
    }

    /// The CloudEvent's source.
    pub fn source(&self) -> &str {
        self.text(&self.source)
    }

    /// The partition key of its record, which names the OCS connection.
    pub fn partition_key(&self) -> &str {
        &self.origin.partition_key
    }

    /// The CloudEvent as it stands in the record, in JSON.
    pub fn event_json(&self) -> &str {
        // The payload was checked to be UTF-8 when it was unpacked.
        str::from_utf8(&self.origin.payload[self.event.clone()]).unwrap_or_default()
    }

    /// The stream that it was read from.
    pub fn stream(&self) -> &str {
        &self.origin.shard.stream
    }

    /// The shard that it was read from.
    pub fn shard(&self) -> &ShardId {
        &self.origin.shard.shard
    }

    /// The sequence number of its record.
    pub fn sequence_number(&self) -> &SequenceNumber {
        &self.origin.sequence_number
    }

    /// What is finished when this message and those before it are: its record, or its user record.
    pub(crate) fn position(&self) -> Position {
        Position { sequence_number: self.sequence_number().clone(), sub_sequence_number: 0 }
    }

    /// Its place among the messages of its record, from 0. With the shard and the sequence number it
    /// names one message of the stream.
    pub fn sub_sequence_number(&self) -> u64 {
        self.sub_sequence_number
    }

    /// When Kinesis received the record; some servers do not say.
    pub fn arrived_at(&self) -> Option<Timestamp> {
        self.origin.arrived_at
    }

    fn text<'a>(&'a self, text: &'a Text) -> &'a str {
        match text {
            Text::InPlace(range) => {
                // The range is that of a JSON string within a payload that was checked to be UTF-8.
                str::from_utf8(&self.origin.payload[range.clone()]).unwrap_or_default()
            }
            Text::Unescaped(text) => text,
        }
    }
}

/// Shows where the message is, not what it says: logs get OCS text only at debug.
impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Message")
            .field("shard", self.shard())
            .field("sequence_number", self.sequence_number())
            .field("sub_sequence_number", &self.sub_sequence_number)
            .field("id", &self.id())
            .finish_non_exhaustive()
    }
}
