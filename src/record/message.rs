use std::{borrow::Cow, fmt, ops::Range, sync::Arc};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use jiff::Timestamp;
use serde::Deserialize;

use super::ShardName;
use crate::{
    checkpoint::Position,
    ocs::{EventMiddle, OcsError, OcsMessage},
    shard::{SequenceNumber, ShardId},
};

/// One OCS message and where it came from.
///
/// Cheap to clone and to keep: the messages of a record share its bytes, and texts are read from them
/// in place. To keep one message is to keep its record, which may have 10 MiB.
///
/// ```
/// use tramline::Message;
///
/// /// Names one message of the stream, also when it comes again.
/// fn place(message: &Message) -> String {
///     let (shard, number) = (message.shard(), message.sequence_number());
///     format!("{shard}/{number}/{}", message.sub_sequence_number())
/// }
/// ```
#[derive(Clone)]
pub struct Message {
    pub(super) origin: Arc<Origin>,
    pub(super) sub_sequence_number: u64,
    pub(super) user_record: Option<u64>,
    /// That of its user record; `None` if it is the origin's.
    pub(super) partition_key: Option<Text>,
    pub(super) event: EventJson,
    pub(super) raw: Text,
    pub(super) raw_base64: Option<Text>,
    pub(super) id: Text,
    pub(super) time: Text,
    pub(super) source: Text,
}

/// What the messages of one record, or of one gzip stream in it, have in common.
#[derive(Debug)]
pub(super) struct Origin {
    pub shard: Arc<ShardName>,
    pub sequence_number: SequenceNumber,
    pub partition_key: String,
    pub arrived_at: Option<Timestamp>,
    pub payload: Bytes,
}

/// A place in a payload.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span {
    start: u32,
    end: u32,
}

/// A text of an event: in place where the JSON has it unescaped, else a copy.
#[derive(Debug, Clone)]
pub(super) enum Text {
    InPlace(Span),
    Copied(Box<str>),
}

/// The CloudEvent of a message.
#[derive(Clone)]
pub(super) enum EventJson {
    /// It stands in the payload.
    InPlace(Span),
    /// The message came in a batch, and this is what it shares with the others.
    OfBatch(Arc<EventMiddle>),
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

    /// What the OCS line says, read from it in place. The error is for this message alone, and says
    /// which field is wrong.
    ///
    /// ```
    /// use tramline::{
    ///     Message,
    ///     ocs::{Body, Movement, OcsError},
    /// };
    ///
    /// /// The train that left with this message, if one did.
    /// fn train_that_left(message: &Message) -> Result<Option<&str>, OcsError> {
    ///     Ok(match message.ocs()?.body {
    ///         Body::Movement(Movement::Left { train }) => Some(train),
    ///         _ => None,
    ///     })
    /// }
    /// ```
    pub fn ocs(&self) -> Result<OcsMessage<'_>, OcsError> {
        OcsMessage::parse(self.raw(), self.time().or(self.arrived_at()))
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

    /// The address of the OCS sender, where the event's `sourceip` has one.
    pub fn source_ip(&self) -> Option<Cow<'_, str>> {
        #[derive(Deserialize)]
        struct SourceIp<'a> {
            #[serde(borrow)]
            sourceip: Cow<'a, str>,
        }
        let ip = match self.event_json() {
            Cow::Borrowed(json) => serde_json::from_str::<SourceIp>(json).ok()?.sourceip,
            Cow::Owned(json) => {
                let event: SourceIp = serde_json::from_str(&json).ok()?;
                Cow::Owned(event.sourceip.into_owned())
            }
        };
        Some(ip).filter(|ip| !ip.is_empty())
    }

    /// The partition key, which names the OCS connection: that of its record, or within a KPL aggregate
    /// that of its user record.
    pub fn partition_key(&self) -> &str {
        self.partition_key.as_ref().map_or(&self.origin.partition_key, |key| self.text(key))
    }

    /// The CloudEvent in JSON: as it stands in the record, or put together for a message that came in a
    /// batch.
    pub fn event_json(&self) -> Cow<'_, str> {
        match &self.event {
            EventJson::InPlace(span) => Cow::Borrowed(self.origin.text(*span)),
            EventJson::OfBatch(middle) => {
                let raw_base64 = self.raw_base64.as_ref().map(|kept| self.text(kept));
                let json = middle.event(self.raw(), raw_base64, self.id(), self.time_text());
                // It is made of texts.
                Cow::Owned(String::from_utf8(json).unwrap_or_default())
            }
        }
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
        Position {
            sequence_number: self.sequence_number().clone(),
            sub_sequence_number: self.user_record.unwrap_or(0),
        }
    }

    /// Its place among the messages of its record, from 0. With the shard and the sequence number it
    /// names one message of the stream.
    pub fn sub_sequence_number(&self) -> u64 {
        self.sub_sequence_number
    }

    /// The place of its user record in a KPL aggregate, from 0; `None` if its record is no aggregate. The
    /// KCL calls this the sub-sequence number and checkpoints by it, with 0 for a record that is no
    /// aggregate; a user record may hold several messages.
    pub fn user_record(&self) -> Option<u64> {
        self.user_record
    }

    /// When Kinesis received the record; some servers do not say.
    pub fn arrived_at(&self) -> Option<Timestamp> {
        self.origin.arrived_at
    }

    fn text<'a>(&'a self, text: &'a Text) -> &'a str {
        self.origin.resolve(text)
    }
}

impl Span {
    fn range(self) -> Range<usize> {
        self.start as usize..self.end as usize
    }
}

impl Origin {
    pub(super) fn bytes(&self, span: Span) -> &[u8] {
        self.payload.get(span.range()).unwrap_or_default()
    }

    pub(super) fn slice(&self, span: Span) -> Bytes {
        self.payload.slice(span.range())
    }

    /// A part that is known to be UTF-8: it was checked when the record was unpacked.
    pub(super) fn text(&self, span: Span) -> &str {
        str::from_utf8(self.bytes(span)).unwrap_or_default()
    }

    pub(super) fn resolve<'a>(&'a self, text: &'a Text) -> &'a str {
        match text {
            Text::InPlace(span) => self.text(*span),
            Text::Copied(text) => text,
        }
    }

    /// Keeps a text: where it stands if that is in the payload.
    pub(super) fn keep(&self, text: Cow<'_, str>) -> Text {
        match text {
            Cow::Borrowed(text) => Text::InPlace(self.span(text.as_bytes())),
            Cow::Owned(text) => Text::Copied(text.into()),
        }
    }

    /// Where a part of the payload stands in it.
    pub(super) fn span(&self, part: &[u8]) -> Span {
        if part.is_empty() {
            return Span { start: 0, end: 0 };
        }
        let start = (part.as_ptr() as usize).wrapping_sub(self.payload.as_ptr() as usize);
        let end = start.wrapping_add(part.len());
        debug_assert!(start < end && end <= self.payload.len(), "not a part of the payload");
        // No payload is that long.
        let short = |place| u32::try_from(place).unwrap_or(u32::MAX);
        Span { start: short(start), end: short(end) }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ocs::{Body, EventSource},
        record::{Record, unpack},
    };

    fn message(event: impl Into<Bytes>, arrived_at: Option<Timestamp>) -> Message {
        let shard = Arc::new(ShardName {
            stream: "s".into(),
            shard: "shardId-0".into(),
            hash_key_range: None,
        });
        let record = Record {
            sequence_number: SequenceNumber::parse("17").expect("a number"),
            partition_key: "k".into(),
            arrived_at,
            data: event.into(),
        };
        let mut messages = Vec::new();
        unpack(&shard, record, None, &mut messages, &mut Vec::new());
        messages.pop().expect("a message")
    }

    fn event(source_ip: Option<&str>, line: &[u8]) -> Vec<u8> {
        let source_ip = source_ip.map(|ip| ip.parse().expect("an address"));
        EventSource::new("k".into(), "s", source_ip).event("2025-07-02T13:44:03Z", line).json
    }

    #[test]
    fn the_ocs_line_is_understood_by_the_time_of_the_event() {
        let message = message(event(None, b"1234,DIAG,09:44:01,BROADCAST"), None);
        let ocs = message.ocs().expect("an OCS message");
        assert_eq!(ocs.body, Body::Diagnostic("BROADCAST"));
        assert_eq!(ocs.header.at(), "2025-07-02T13:44:01Z".parse().ok());
    }

    #[test]
    fn without_the_time_of_the_event_that_of_the_record_serves() {
        let event = String::from_utf8(event(None, b"1234,DIAG,09:44:01,BROADCAST")).expect("UTF-8");
        let event = event.replace("2025-07-02T13:44:03Z", "yesterday");
        let arrived_at = "2025-07-03T13:44:03Z".parse().ok();
        let at = message(event.clone(), arrived_at).ocs().expect("an OCS message").header.at();
        assert_eq!(at, "2025-07-03T13:44:01Z".parse().ok());
        assert_eq!(message(event, None).ocs().expect("an OCS message").header.at(), None);
    }

    #[test]
    fn p9_an_ocs_line_that_is_not_understood_is_still_there() {
        let message = message(event(None, b"garbage\xff"), None);
        assert_eq!(message.ocs().expect_err("no number").field(), "counter");
        assert_eq!(message.raw_bytes(), &b"garbage\xff"[..]);
    }

    #[test]
    fn the_senders_address_is_borrowed_from_the_event() {
        let with = message(event(Some("10.198.0.34"), b"1,DIAG,00:00:00,x"), None);
        assert!(matches!(with.source_ip(), Some(Cow::Borrowed("10.198.0.34"))));
        let empty = message(event(None, b"1,DIAG,00:00:00,x"), None);
        assert_eq!(empty.source_ip(), None);
        let event = String::from_utf8(event(None, b"1,DIAG,00:00:00,x")).expect("UTF-8");
        for sourceip in ["", r#""sourceip":null,"#, r#""sourceip":7,"#] {
            let event = event.replace(r#""sourceip":"","#, sourceip);
            assert_eq!(message(event, None).source_ip(), None, "{sourceip}");
        }
    }
}
