//! The CloudEvent that carries many OCS messages of one connection.
//!
//! It says once what the messages share, and for each what is its own:
//!
//! ```json
//! {
//!   "data": {
//!     "messages": [
//!       {"id": "…", "raw": "4994,TSCH,02:00:06,R,RLD,W", "time": "2021-08-13T12:00:00.000000Z"},
//!       {"id": "…", "raw": "12,DIAG,\u{FFFD}", "raw_base64": "MTIsRElBRyz/", "time": "…"}
//!     ]
//!   },
//!   "id": "…", "partitionkey": "…", "source": "…", "sourceip": "…", "specversion": "1.0",
//!   "time": "…", "type": "com.mbta.ocs.raw_message_batch"
//! }
//! ```
//!
//! Each message, put together with the batch's partition key, source and address, is the single event
//! that [`EventSource::event`] writes, byte for byte. Its JSON Schema is
//! `schema/com.mbta.ocs.raw_message_batch.json`.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use sha1::{Digest as _, Sha1};

use super::{
    Event, EventSource,
    event::{RawText, event_id, push_json_string, push_raw},
};

/// The type of the event that carries a batch. The RFCs also spell it with hyphens; both are read.
pub const BATCH_EVENT_TYPE: &str = "com.mbta.ocs.raw_message_batch";

/// Whether an event's `type` names a batch of raw OCS messages, in either spelling.
pub fn is_raw_message_batch(event_type: &str) -> bool {
    matches!(event_type, BATCH_EVENT_TYPE | "com.mbta.ocs.raw-message-batch")
}

/// One message of a batch, ready to be joined with others of its connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchMessage {
    /// The id that the message has as a single event, too.
    pub id: String,
    /// When it was received, as [`event_time`](super::event_time) prints it.
    pub time: String,
    /// What stands for it in the batch: compact JSON, keys in alphabetical order.
    pub json: Vec<u8>,
}

impl BatchMessage {
    /// The message for what was received at `time`, as [`event_time`](super::event_time) prints it.
    pub fn new(time: &str, raw: &[u8]) -> Self {
        let id = event_id(time, raw);
        let raw = RawText::new(raw);
        let mut json = Vec::with_capacity(raw.text.len() + 96);
        json.extend_from_slice(b"{\"id\":");
        push_json_string(&mut json, &id);
        json.push(b',');
        push_raw(&mut json, &raw.text, raw.base64.as_deref());
        json.extend_from_slice(b",\"time\":");
        push_json_string(&mut json, time);
        json.push(b'}');
        Self { id, time: time.to_owned(), json }
    }
}

impl EventSource {
    /// The event for several messages of this connection, in their order; `None` if there are none.
    ///
    /// Its time is that of the last message. Its id is Base64 of the SHA-1 over the ids of the messages,
    /// one directly after the other: the same messages make the same event.
    pub fn batch(&self, messages: &[BatchMessage]) -> Option<Event> {
        let last = messages.last()?;
        let mut hash = Sha1::new();
        let size_bytes: usize = messages.iter().map(|message| message.json.len() + 1).sum();
        let mut json = Vec::with_capacity(size_bytes + 512);
        json.extend_from_slice(b"{\"data\":{\"messages\":");
        for (n, message) in messages.iter().enumerate() {
            hash.update(&message.id);
            json.push(if n == 0 { b'[' } else { b',' });
            json.extend_from_slice(&message.json);
        }
        json.extend_from_slice(b"]}");
        let id = BASE64_STANDARD.encode(hash.finalize());
        let json = self.middle.finish(json, &id, &last.time, BATCH_EVENT_TYPE);
        Some(Event { id, json })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;
    use crate::ocs::EVENT_TYPE;

    const TIME: &str = "2021-08-13T12:00:00Z";

    fn source() -> EventSource {
        let ip = "10.198.0.34".parse().ok();
        EventSource::new("test_key".into(), "opstech3.mbta.com/trike", ip)
    }

    fn batch(raws: &[&[u8]]) -> Event {
        let messages: Vec<_> = raws.iter().map(|raw| BatchMessage::new(TIME, raw)).collect();
        source().batch(&messages).expect("messages")
    }

    #[test]
    fn a_batch_is_written_as_the_schema_shows_it() {
        let json = batch(&[b"4994,TSCH,02:00:06,R,RLD,W", b"4995,TSCH,03:00:06,R,RLD,W"]).json;
        assert_eq!(
            String::from_utf8(json).expect("UTF-8"),
            r#"{"data":{"messages":[{"id":"myH7tTFo1tuZdSXxQ/5QFA4Xx58=","raw":"4994,TSCH,02:00:06,R,RLD,W","time":"2021-08-13T12:00:00Z"},{"id":"O7ODUPlPMM089UZL1YLYpFIZzeo=","raw":"4995,TSCH,03:00:06,R,RLD,W","time":"2021-08-13T12:00:00Z"}]},"id":"c+terwhB0vcYfFwr6SERJcAVu1E=","partitionkey":"test_key","source":"opstech3.mbta.com/trike","sourceip":"10.198.0.34","specversion":"1.0","time":"2021-08-13T12:00:00Z","type":"com.mbta.ocs.raw_message_batch"}"#
        );
    }

    #[test]
    fn the_schemas_name_the_types_and_show_what_is_written() {
        let raw = b"4994,TSCH,02:00:06,R,RLD,W";
        for (schema, event_type, written) in [
            (
                include_str!("schema/com.mbta.ocs.raw_message.json"),
                EVENT_TYPE,
                source().event(TIME, raw),
            ),
            (
                include_str!("schema/com.mbta.ocs.raw_message_batch.json"),
                BATCH_EVENT_TYPE,
                batch(&[raw, b"4995,TSCH,03:00:06,R,RLD,W"]),
            ),
        ] {
            let schema: Value = serde_json::from_str(schema).expect("JSON");
            assert_eq!(schema["$id"], format!("{event_type}.json"));
            assert_eq!(schema["properties"]["type"]["const"], event_type);
            let written: Value = serde_json::from_slice(&written.json).expect("JSON");
            assert_eq!(schema["examples"][0], written);
        }
    }

    #[test]
    fn the_same_messages_make_the_same_event_and_others_another() {
        assert_eq!(batch(&[b"1", b"2"]), batch(&[b"1", b"2"]));
        assert_ne!(batch(&[b"1", b"2"]).id, batch(&[b"2", b"1"]).id);
        let alone = batch(&[b"1"]);
        assert_ne!(alone.id, source().event(TIME, b"1").id);
        assert_eq!(source().batch(&[]), None);
    }

    proptest! {
        #[test]
        fn p9_any_bytes_read_back_as_they_were(
            raws in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..40), 1..6),
        ) {
            let event = batch(&raws.iter().map(Vec::as_slice).collect::<Vec<_>>());
            let json: Value = serde_json::from_slice(&event.json).expect("JSON");
            let messages = json["data"]["messages"].as_array().expect("messages");
            prop_assert_eq!(messages.len(), raws.len());
            for (message, raw) in messages.iter().zip(&raws) {
                prop_assert_eq!(message["id"].as_str(), Some(&*source().event(TIME, raw).id));
                let text = message["raw"].as_str().expect("a text");
                match message["raw_base64"].as_str() {
                    Some(kept) => prop_assert_eq!(&BASE64_STANDARD.decode(kept).expect("Base64"), raw),
                    None => prop_assert_eq!(text.as_bytes(), raw),
                }
            }
        }
    }
}
