use std::sync::Arc;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use serde::Deserialize;

use super::{
    Message, Record, ShardName, Undecodable, Unpacked,
    aggregate::{self, Aggregate, Reading},
    gzip,
    json::{self, Object},
    message::{EventJson, Origin, Span, Text},
};
use crate::ocs::{EventMiddle, is_raw_message, is_raw_message_batch};

/// So many aggregates and gzip streams may lie one in another.
const DEPTH_LIMIT: u8 = 4;
/// A record that unpacks to more than this is a bomb. (Tests need not wait for so much.)
pub(super) const UNPACKED_LIMIT_BYTES: usize =
    if cfg!(test) { 4 * 1024 * 1024 } else { 64 * 1024 * 1024 };
/// So many parts of a record are told one by one.
pub(super) const UNDECODABLE_LIMIT: usize = 1000;
/// What a batch event may have beside its messages, to be kept with each of them that is bad.
const BATCH_FRAME_LIMIT_BYTES: usize = 4 * 1024;
/// What is said of a part that cannot be decoded; it may quote the part.
const REASON_LIMIT_BYTES: usize = 400;

/// Takes a record apart: a KPL aggregate, gzip, a CloudEvent or a JSON array of them, events with one OCS
/// message or with a batch, and all of these one in another.
///
/// Messages are appended to `messages` in their order, and what is no OCS message to `undecodable`.
/// Nothing is dropped but what `finished` says: it is the sub-sequence number of the shard's checkpoint, if
/// that is at this record. `None` says that nothing of the record is left. The numbers of the rest are the
/// same as without a checkpoint.
///
/// A worker does this by itself. It is here for services that read Kinesis in their own way:
///
/// ```
/// use std::sync::Arc;
///
/// use tramline::{SequenceNumber, record::{Record, ShardName, unpack}};
///
/// # let data = br#"{"data":{"raw":"4994,TSCH,02:00:06,R,RLD,W"},"id":"myH7tTFo1tuZdSXxQ/5QFA4Xx58=",
/// #     "partitionkey":"test_key","source":"s","sourceip":"","specversion":"1.0",
/// #     "time":"2021-08-13T12:00:00Z","type":"com.mbta.ocs.raw_message"}"#.to_vec();
/// let shard = Arc::new(ShardName {
///     stream: "ctd-ocs-raw-messages".into(),
///     shard: "shardId-000000000000".into(),
///     hash_key_range: None,
/// });
/// let record = Record {
///     sequence_number: SequenceNumber::parse("49590338271490256608559692").expect("a number"),
///     partition_key: "test_key".into(),
///     arrived_at: None,
///     data: data.into(),
/// };
/// let (mut messages, mut undecodable) = (Vec::new(), Vec::new());
/// unpack(&shard, record, None, &mut messages, &mut undecodable);
/// assert_eq!(messages[0].raw(), "4994,TSCH,02:00:06,R,RLD,W");
/// assert!(undecodable.is_empty());
/// ```
pub fn unpack(
    shard: &Arc<ShardName>,
    record: Record,
    finished: Option<u64>,
    messages: &mut Vec<Message>,
    undecodable: &mut Vec<Undecodable>,
) -> Option<Unpacked> {
    let origin = Arc::new(Origin {
        shard: shard.clone(),
        sequence_number: record.sequence_number,
        partition_key: record.partition_key,
        arrived_at: record.arrived_at,
        payload: record.data,
    });
    let reading = aggregate::read(&origin.payload, shard.hash_key_range);
    let user_records = reading.user_records();
    let first = first_unfinished(finished, user_records)?;
    let unpacked = Unpacked {
        last_user_record: user_records.map(|count| count - 1),
        misplaced: matches!(reading, Reading::Misplaced { .. }),
    };
    if unpacked.misplaced {
        return Some(unpacked);
    }
    let mut unpacking = Unpacking {
        had_messages: messages.len(),
        had_undecodable: undecodable.len(),
        messages,
        undecodable,
        next: 0,
        untold: Untold::default(),
        left_bytes: UNPACKED_LIMIT_BYTES,
    };
    let record = Part {
        origin: &origin,
        span: origin.span(&origin.payload),
        partition_key: None,
        user_record: None,
        depth: 0,
    };
    unpacking.record(record, reading);
    unpacking.drop_finished(first);
    Some(unpacked)
}

/// The first user record that a checkpoint leaves to do, by the sub-sequence number that it has at this
/// record; `None` if it leaves none.
///
/// That number is the last finished user record of an aggregate. Any other record counts as one and is
/// finished as a whole, whatever the number.
fn first_unfinished(finished: Option<u64>, user_records: Option<u64>) -> Option<u64> {
    match (finished, user_records) {
        (None, _) => Some(0),
        (Some(_), None) => None,
        (Some(finished), Some(count)) => finished.checked_add(1).filter(|first| *first < count),
    }
}

/// A record that is being taken apart.
struct Unpacking<'a> {
    messages: &'a mut Vec<Message>,
    undecodable: &'a mut Vec<Undecodable>,
    had_messages: usize,
    had_undecodable: usize,
    /// The next sub-sequence number.
    next: u64,
    untold: Untold,
    /// What gzip streams may still give.
    left_bytes: usize,
}

/// Undecodable parts beyond those that are told one by one.
#[derive(Clone, Copy, Default)]
struct Untold {
    parts: u64,
    last_user_record: Option<u64>,
}

/// A state to go back to when something turns out to be useless as a whole.
#[derive(Clone, Copy)]
struct Mark {
    messages: usize,
    undecodable: usize,
    next: u64,
    untold: Untold,
}

/// A record, a user record, or what a gzip stream holds.
#[derive(Clone, Copy)]
struct Part<'a> {
    origin: &'a Arc<Origin>,
    span: Span,
    /// That of its user record; `None` if it is the origin's.
    partition_key: Option<&'a Text>,
    user_record: Option<u64>,
    /// How many aggregates and gzip streams it lies in.
    depth: u8,
}

impl Part<'_> {
    fn bytes(&self) -> &[u8] {
        self.origin.bytes(self.span)
    }

    fn partition_key(&self) -> String {
        match self.partition_key {
            Some(key) => self.origin.resolve(key).to_owned(),
            None => self.origin.partition_key.clone(),
        }
    }

    fn undecodable(&self, reason: String) -> Undecodable {
        Undecodable {
            sub_sequence_number: None,
            user_record: self.user_record,
            partition_key: self.partition_key(),
            reason: shortened(reason),
            data: self.origin.slice(self.span),
        }
    }
}

impl Unpacking<'_> {
    fn record(&mut self, record: Part<'_>, reading: Reading) {
        let start = self.mark();
        let content = if record.bytes().len() > UNPACKED_LIMIT_BYTES {
            Err(format!("more than {UNPACKED_LIMIT_BYTES} bytes"))
        } else {
            self.content(record, reading)
        };
        if let Err(reason) = content {
            self.roll_back(start);
            self.undecodable.push(record.undecodable(reason));
        }
        let Untold { parts, last_user_record } = self.untold;
        if parts > 0 {
            let reason =
                format!("{parts} more parts cannot be decoded; this is the record as a whole");
            let whole = Part { user_record: last_user_record, ..record };
            self.undecodable.push(whole.undecodable(reason));
        }
    }

    /// What cannot be read as a whole is an error, and the caller's to tell; for what lies in it, that is
    /// done here.
    fn payload(&mut self, part: Part<'_>) -> Result<(), String> {
        if part.depth > DEPTH_LIMIT {
            return Err(format!("packed more than {DEPTH_LIMIT} times over"));
        }
        let reading = if aggregate::has_magic(part.bytes()) {
            aggregate::read(&part.origin.slice(part.span), None)
        } else {
            Reading::Plain
        };
        self.content(part, reading)
    }

    fn content(&mut self, part: Part<'_>, reading: Reading) -> Result<(), String> {
        match reading {
            Reading::Aggregate(aggregate) => {
                self.aggregate(part, &aggregate);
                Ok(())
            }
            Reading::Misplaced { .. } => {
                Err("a KPL aggregate with a hash key over 128 bits".into())
            }
            Reading::Corrupt(reason) => Err(reason),
            Reading::Plain if gzip::is_gzip(part.bytes()) => self.gzip(part),
            Reading::Plain => self.json(part),
        }
    }

    fn aggregate(&mut self, part: Part<'_>, aggregate: &Aggregate) {
        for (index, (key, data)) in (0..).zip(aggregate.user_records()) {
            let key = part.origin.keep(aggregate::text(key));
            let user_record = Part {
                span: part.origin.span(data),
                partition_key: Some(&key),
                // A KPL aggregate is a Kinesis record: what lies deeper has no part in checkpoints.
                user_record: if part.depth == 0 { Some(index) } else { part.user_record },
                depth: part.depth + 1,
                ..part
            };
            let before = self.mark();
            if let Err(reason) = self.payload(user_record) {
                self.roll_back(before);
                self.give_up(user_record.undecodable(reason));
            }
        }
    }

    fn gzip(&mut self, part: Part<'_>) -> Result<(), String> {
        let payload = gzip::unpack(part.bytes(), &mut self.left_bytes)?;
        let origin = Arc::new(Origin {
            shard: part.origin.shard.clone(),
            sequence_number: part.origin.sequence_number.clone(),
            partition_key: part.partition_key(),
            arrived_at: part.origin.arrived_at,
            payload: payload.into(),
        });
        let span = origin.span(&origin.payload);
        self.payload(Part {
            origin: &origin,
            span,
            partition_key: None,
            depth: part.depth + 1,
            ..part
        })
    }

    fn json(&mut self, part: Part<'_>) -> Result<(), String> {
        let text = str::from_utf8(part.bytes()).map_err(|error| format!("not UTF-8: {error}"))?;
        let text = json::trim(text);
        if text.starts_with('[') {
            let alone = |_: &str| None;
            self.each(part, text, "an array", alone, |this, event, parsed| {
                this.event(part, event, parsed)
            })
        } else {
            self.event(part, text, serde_json::from_str(text))
        }
    }

    /// Takes an array apart. A bad element does not spoil the others, but a large array of something else
    /// is one thing to look at, not a hundred thousand.
    ///
    /// `alone` gives what a bad element would be as a record of its own, if not just its bytes.
    fn each<'t, T: Deserialize<'t>>(
        &mut self,
        part: Part<'_>,
        array: &'t str,
        what: &str,
        alone: impl Fn(&'t str) -> Option<Bytes>,
        mut element: impl FnMut(&mut Self, &'t str, serde_json::Result<T>) -> Result<(), String>,
    ) -> Result<(), String> {
        let start = self.mark();
        let count = json::for_each(array, |text, parsed| {
            let before = self.mark();
            if let Err(reason) = element(self, text, parsed) {
                self.roll_back(before);
                let bad = Part { span: part.origin.span(text.as_bytes()), ..part };
                let mut bad = bad.undecodable(reason);
                if let Some(data) = alone(text) {
                    bad.data = data;
                }
                self.give_up(bad);
            }
        })?;
        if self.messages.len() > start.messages {
            return Ok(());
        }
        let first = self.undecodable.get(start.undecodable);
        Err(match first {
            _ if count == 0 => format!("{what} without an element: no OCS message in it"),
            Some(first) => {
                format!("{what} of {count} without a raw OCS message; the first: {}", first.reason)
            }
            None => format!("{what} of {count} without a raw OCS message"),
        })
    }

    fn event(
        &mut self,
        part: Part<'_>,
        text: &str,
        parsed: serde_json::Result<Object<json::Event<'_>>>,
    ) -> Result<(), String> {
        let Object(event) = parsed.map_err(|error| explain(text, &error))?;
        let kind = &*event.kind.0;
        let Object(data) = event.data;
        if is_raw_message(kind) {
            let message = json::OcsMessage {
                id: event.id,
                time: event.time,
                raw: data.raw.ok_or("data.raw is missing")?,
                raw_base64: data.raw_base64,
            };
            let event_json = EventJson::InPlace(part.origin.span(text.as_bytes()));
            let source = part.origin.keep(event.source.0);
            return self.message(part, event_json, source, message);
        }
        if !is_raw_message_batch(kind) {
            return Err(format!("event type {kind:?} is not a raw OCS message"));
        }
        let shared = Arc::new(EventMiddle::new(
            event.partition_key.map(|value| value.get().as_bytes()),
            &event.source.0,
            event.source_ip.map(|value| value.get().as_bytes()),
        ));
        let source = part.origin.keep(event.source.0);
        let messages = data.messages.ok_or("data.messages is missing")?.get();
        let alone = |message: &str| batch_of_one(text, messages, message);
        self.each(part, messages, "a batch", alone, |this, _, parsed| {
            let Object(message) =
                parsed.map_err(|error| format!("not a message of a batch: {error}"))?;
            this.message(part, EventJson::OfBatch(shared.clone()), source.clone(), message)
        })
    }

    fn message(
        &mut self,
        part: Part<'_>,
        event: EventJson,
        source: Text,
        message: json::OcsMessage<'_>,
    ) -> Result<(), String> {
        if message.raw.0.is_empty() {
            return Err("data.raw is empty".into());
        }
        if let Some(bytes) = &message.raw_base64 {
            let bytes = BASE64_STANDARD.decode(&*bytes.0);
            bytes.map_err(|error| format!("data.raw_base64 is not Base64: {error}"))?;
        }
        let keep = |text: json::Str<'_>| part.origin.keep(text.0);
        self.messages.push(Message {
            sub_sequence_number: self.next,
            user_record: part.user_record,
            partition_key: part.partition_key.cloned(),
            event,
            raw: keep(message.raw),
            raw_base64: message.raw_base64.map(keep),
            id: keep(message.id),
            time: keep(message.time),
            source,
            origin: part.origin.clone(),
        });
        self.next += 1;
        Ok(())
    }

    fn give_up(&mut self, bad: Undecodable) {
        if self.undecodable.len() - self.had_undecodable < UNDECODABLE_LIMIT {
            let sub_sequence_number = Some(self.next);
            self.undecodable.push(Undecodable { sub_sequence_number, ..bad });
        } else {
            self.untold.parts += 1;
            self.untold.last_user_record = bad.user_record;
        }
        self.next += 1;
    }

    fn mark(&self) -> Mark {
        Mark {
            messages: self.messages.len(),
            undecodable: self.undecodable.len(),
            next: self.next,
            untold: self.untold,
        }
    }

    fn roll_back(&mut self, mark: Mark) {
        self.messages.truncate(mark.messages);
        self.undecodable.truncate(mark.undecodable);
        self.next = mark.next;
        self.untold = mark.untold;
    }

    /// Drops what a checkpoint has passed. It was unpacked all the same: the numbers of the rest follow
    /// from it.
    fn drop_finished(&mut self, first: u64) {
        let is_finished = |user_record: Option<u64>| user_record.is_some_and(|n| n < first);
        let new = &self.messages[self.had_messages..];
        let finished = new.partition_point(|message| is_finished(message.user_record));
        self.messages.drain(self.had_messages..self.had_messages + finished);
        let new = &self.undecodable[self.had_undecodable..];
        let finished = new.partition_point(|part| is_finished(part.user_record));
        self.undecodable.drain(self.had_undecodable..self.had_undecodable + finished);
    }
}

/// A batch event with one of its messages alone: as a record of its own, that has the message's id and what
/// the messages share, byte for byte. `None` if the rest of the event is too long to be copied for each
/// message.
fn batch_of_one(event: &str, messages: &str, message: &str) -> Option<Bytes> {
    let start = (messages.as_ptr() as usize).checked_sub(event.as_ptr() as usize)?;
    let (before, rest) = event.split_at_checked(start)?;
    let after = rest.get(messages.len()..)?;
    if before.len() + after.len() > BATCH_FRAME_LIMIT_BYTES {
        return None;
    }
    Some([before, "[", message, "]", after].concat().into())
}

/// Says what is wrong with an event: its type if it is another kind of event, else what is missing.
fn explain(event: &str, error: &serde_json::Error) -> String {
    match json::kind_of(event) {
        Some(kind) if !is_raw_message(&kind) && !is_raw_message_batch(&kind) => {
            format!("event type {kind:?} is not a raw OCS message")
        }
        _ if error.is_data() => format!("not a raw OCS message: {error}"),
        _ => format!("not JSON: {error}"),
    }
}

fn shortened(mut reason: String) -> String {
    if reason.len() > REASON_LIMIT_BYTES {
        reason.truncate(reason.floor_char_boundary(REASON_LIMIT_BYTES));
        reason.push('…');
    }
    reason
}
