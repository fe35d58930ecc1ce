use std::{borrow::Cow, ops::Range, sync::Arc};

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{
    Message, Record, ShardName, Undecodable,
    message::{Origin, Text},
};
use crate::ocs::is_raw_message;

/// Takes a record apart. Messages are appended to `messages` in their order, the rest to `undecodable`.
pub(crate) fn unpack(
    shard: &Arc<ShardName>,
    record: Record,
    messages: &mut Vec<Message>,
    undecodable: &mut Vec<Undecodable>,
) {
    let origin = Arc::new(Origin {
        shard: shard.clone(),
        sequence_number: record.sequence_number,
        partition_key: record.partition_key,
        arrived_at: record.arrived_at,
        payload: record.data,
    });
    let payload = &origin.payload;
    let events = match events(payload) {
        Ok(events) => events,
        Err(reason) => {
            undecodable.push(Undecodable {
                sub_sequence_number: None,
                reason,
                data: payload.clone(),
            });
            return;
        }
    };
    let count = events.len();
    let (had_messages, had_undecodable) = (messages.len(), undecodable.len());
    for (sub_sequence_number, event) in (0..).zip(events) {
        match message(&origin, sub_sequence_number, event) {
            Ok(message) => messages.push(message),
            Err(reason) => undecodable.push(Undecodable {
                sub_sequence_number: Some(sub_sequence_number),
                reason,
                data: payload.slice(range_in(payload, event)),
            }),
        }
    }
    // A large array of something else is one thing to look at, not a hundred thousand.
    if messages.len() == had_messages && count > 1 {
        let first = undecodable.drain(had_undecodable..).next();
        let reason = first.map_or_else(String::new, |first| first.reason);
        undecodable.push(Undecodable {
            sub_sequence_number: None,
            reason: format!("an array of {count} without a raw OCS message; the first: {reason}"),
            data: payload.clone(),
        });
    }
}

/// The events of a payload, each as the JSON it is written in.
fn events(payload: &Bytes) -> Result<Vec<&str>, String> {
    let text = str::from_utf8(payload).map_err(|error| format!("not UTF-8: {error}"))?;
    let whole = text.trim_ascii();
    if !whole.starts_with('[') {
        return Ok(vec![whole]);
    }
    let events: Vec<&RawValue> =
        serde_json::from_str(whole).map_err(|error| format!("not JSON: {error}"))?;
    if events.is_empty() {
        return Err("an empty array: no event in the record".into());
    }
    Ok(events.into_iter().map(RawValue::get).collect())
}

fn message(origin: &Arc<Origin>, sub_sequence_number: u64, json: &str) -> Result<Message, String> {
    let event: EventFields = serde_json::from_str(json).map_err(|error| explain(json, error))?;
    if !is_raw_message(&event.kind.0) {
        return Err(format!("event type {:?} is not a raw OCS message", event.kind.0));
    }
    if event.data.raw.0.is_empty() {
        return Err("data.raw is empty".into());
    }
    let text = |text: Str<'_>| match text.0 {
        Cow::Borrowed(text) => Text::InPlace(range_in(&origin.payload, text)),
        Cow::Owned(text) => Text::Unescaped(text.into()),
    };
    Ok(Message {
        sub_sequence_number,
        event: range_in(&origin.payload, json),
        raw: text(event.data.raw),
        raw_base64: event.data.raw_base64.map(text),
        id: text(event.id),
        time: text(event.time),
        source: text(event.source),
        origin: origin.clone(),
    })
}

/// The fields that a raw message must have by its JSON Schema; others are allowed and ignored.
#[derive(Deserialize)]
struct EventFields<'a> {
    #[serde(borrow, rename = "type")]
    kind: Str<'a>,
    #[serde(borrow)]
    id: Str<'a>,
    #[serde(borrow)]
    time: Str<'a>,
    #[serde(borrow)]
    source: Str<'a>,
    #[serde(borrow)]
    data: Data<'a>,
}

#[derive(Deserialize)]
struct Data<'a> {
    #[serde(borrow)]
    raw: Str<'a>,
    #[serde(borrow)]
    raw_base64: Option<Str<'a>>,
}

/// A string that borrows from the JSON unless it is escaped there. (serde borrows for a bare `Cow`
/// field, not for one inside an `Option`.)
#[derive(Deserialize)]
#[serde(transparent)]
struct Str<'a>(#[serde(borrow)] Cow<'a, str>);

/// Says what is wrong with an event: its type if it is another kind of event, else what is missing.
fn explain(json: &str, error: serde_json::Error) -> String {
    #[derive(Deserialize)]
    struct Kind<'a> {
        #[serde(borrow, rename = "type")]
        kind: Str<'a>,
    }
    match serde_json::from_str::<Kind>(json) {
        Ok(Kind { kind }) if !is_raw_message(&kind.0) => {
            format!("event type {:?} is not a raw OCS message", kind.0)
        }
        _ if error.is_data() => format!("not a raw OCS message: {error}"),
        _ => format!("not JSON: {error}"),
    }
}

/// Where `part`, a piece of `payload`, stands in it.
fn range_in(payload: &Bytes, part: &str) -> Range<usize> {
    let start = part.as_ptr() as usize - payload.as_ptr() as usize;
    start..start + part.len()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{ocs::EventSource, shard::SequenceNumber};

    fn unpacked(data: impl Into<Bytes>) -> (Vec<Message>, Vec<Undecodable>) {
        let shard = Arc::new(ShardName { stream: "s".into(), shard: "shardId-0".into() });
        let record = Record {
            sequence_number: SequenceNumber::parse("17").expect("a number"),
            partition_key: "record_key".into(),
            arrived_at: None,
            data: data.into(),
        };
        let (mut messages, mut undecodable) = (Vec::new(), Vec::new());
        unpack(&shard, record, &mut messages, &mut undecodable);
        (messages, undecodable)
    }

    fn event(raw: &[u8]) -> String {
        let event =
            EventSource::new("event_key".into(), "src", None).event("2021-08-13T12:00:00Z", raw);
        String::from_utf8(event.json).expect("UTF-8")
    }

    #[test]
    fn an_array_gives_its_events_in_order() {
        let json = format!(" [{},\n {}]", event(b"1,DIAG,00:00:01,a"), event(b"2,DIAG,00:00:02,b"));
        let (messages, undecodable) = unpacked(json);
        assert!(undecodable.is_empty());
        let seen: Vec<_> = messages.iter().map(|m| (m.sub_sequence_number(), m.raw())).collect();
        assert_eq!(seen, [(0, "1,DIAG,00:00:01,a"), (1, "2,DIAG,00:00:02,b")]);
        assert_eq!(messages[0].sequence_number().as_str(), "17");
        assert_eq!(messages[0].partition_key(), "record_key");
        assert_eq!(messages[1].event_json(), event(b"2,DIAG,00:00:02,b"));
    }

    #[test]
    fn a_single_event_needs_no_array() {
        let (messages, undecodable) = unpacked(event(b"1,DIAG,00:00:01,a"));
        assert!(undecodable.is_empty());
        assert_eq!(messages[0].raw(), "1,DIAG,00:00:01,a");
        assert_eq!(messages[0].source(), "src");
        assert_eq!(messages[0].time().map(|t| t.as_second()), Some(1_628_856_000));
    }

    #[test]
    fn both_spellings_of_the_type_are_read() {
        let hyphen = event(b"1,DIAG,00:00:01,a").replace("raw_message", "raw-message");
        assert_eq!(unpacked(hyphen).0.len(), 1);
    }

    #[test]
    fn unknown_fields_are_ignored() {
        let json = event(b"x").replace(r#""partitionkey":"event_key""#, r#""new":{"a":[1]}"#);
        assert_eq!(unpacked(json).0.len(), 1);
    }

    #[test]
    fn p9_one_bad_event_leaves_its_neighbours_alone_and_keeps_its_bytes() {
        let other = r#"{"type":"com.example.other","data":7}"#;
        let json =
            format!("[{},{other},{}]", event(b"1,DIAG,00:00:01,a"), event(b"2,DIAG,00:00:02,b"));
        let (messages, undecodable) = unpacked(json);
        let subs: Vec<_> = messages.iter().map(Message::sub_sequence_number).collect();
        assert_eq!(subs, [0, 2]);
        assert_eq!(undecodable.len(), 1);
        assert_eq!(undecodable[0].sub_sequence_number, Some(1));
        assert_eq!(undecodable[0].data, other);
        assert_eq!(
            undecodable[0].reason,
            r#"event type "com.example.other" is not a raw OCS message"#
        );
    }

    #[test]
    fn p9_an_array_without_a_message_is_one_dead_letter() {
        let (messages, undecodable) = unpacked("[0, 1, {}]");
        assert!(messages.is_empty());
        assert_eq!(undecodable.len(), 1);
        assert_eq!(undecodable[0].sub_sequence_number, None);
        assert_eq!(undecodable[0].data, "[0, 1, {}]");
        assert!(undecodable[0].reason.starts_with("an array of 3 "), "{}", undecodable[0].reason);
    }

    #[test]
    fn p9_what_cannot_be_read_comes_out_whole_with_the_reason() {
        for (data, reason) in [
            (&b"\xff\xfe"[..], "not UTF-8"),
            (b"", "not JSON"),
            (b"{\"type\":", "not JSON"),
            (b"[{]", "not JSON"),
            (b"[]", "an empty array"),
            (b"17", "not a raw OCS message"),
            (br#"{"type":"com.mbta.ocs.raw_message"}"#, "missing field"),
            (event(b"").as_bytes(), "data.raw is empty"),
        ] {
            let (messages, undecodable) = unpacked(data.to_vec());
            assert!(messages.is_empty());
            assert_eq!(undecodable.len(), 1);
            assert!(undecodable[0].reason.contains(reason), "{}", undecodable[0].reason);
            assert_eq!(undecodable[0].data, data);
        }
    }

    #[test]
    fn p9_raw_bytes_are_those_that_were_received() {
        let raw = b"1,DIAG,00:00:01,\xff";
        let (messages, _) = unpacked(event(raw));
        assert_eq!(messages[0].raw(), "1,DIAG,00:00:01,\u{FFFD}");
        assert_eq!(messages[0].raw_bytes(), &raw[..]);
    }

    proptest! {
        #[test]
        fn whatever_is_wrapped_comes_back(raws in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..50), 1..5)) {
            let array = format!("[{}]", raws.iter().map(|raw| event(raw)).collect::<Vec<_>>().join(","));
            let (messages, undecodable) = unpacked(array);
            prop_assert!(undecodable.is_empty());
            let back: Vec<_> = messages.iter().map(|m| m.raw_bytes().into_owned()).collect();
            prop_assert_eq!(back, raws);
        }

        #[test]
        fn no_bytes_make_it_panic(data in prop::collection::vec(any::<u8>(), 0..200)) {
            let (messages, undecodable) = unpacked(data);
            prop_assert!(messages.len() + undecodable.len() > 0);
        }
    }
}
