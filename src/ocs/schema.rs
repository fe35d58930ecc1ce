use super::{BATCH_EVENT_TYPE, EVENT_TYPE};

/// The JSON Schema (draft 2020-12) of an event type that we write; `None` of any other.
pub fn event_schema(event_type: &str) -> Option<&'static str> {
    match event_type {
        EVENT_TYPE => Some(include_str!("schema/com.mbta.ocs.raw_message.json")),
        BATCH_EVENT_TYPE => Some(include_str!("schema/com.mbta.ocs.raw_message_batch.json")),
        _ => None,
    }
}
