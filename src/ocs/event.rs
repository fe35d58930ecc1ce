//! The CloudEvent that carries one OCS message.

use std::{borrow::Cow, io::Write as _, net::IpAddr};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use jiff::{Timestamp, fmt::temporal::DateTimePrinter};
use sha1::{Digest as _, Sha1};

/// The event type we write. The RFCs also spell it with a hyphen; both are read.
pub const EVENT_TYPE: &str = "com.mbta.ocs.raw_message";

/// Whether an event's `type` names a raw OCS message, in either spelling.
pub fn is_raw_message(event_type: &str) -> bool {
    matches!(event_type, EVENT_TYPE | "com.mbta.ocs.raw-message")
}

/// The time of receipt as events print it: UTC with six fractional digits.
pub fn event_time(at: Timestamp) -> String {
    DateTimePrinter::new().precision(Some(6)).timestamp_to_string(&at)
}

/// An event, ready to be put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Base64 of the SHA-1 over the time as printed, followed directly by the raw bytes.
    pub id: String,
    /// The whole event in compact JSON, keys in alphabetical order.
    pub json: Vec<u8>,
}

/// Where a connection's events come from: what all of them have in common.
#[derive(Debug, Clone)]
pub struct EventSource {
    partition_key: String,
    pub(super) middle: EventMiddle,
}

/// The JSON between an event's id and its time: the same for every event of a connection.
#[derive(Debug, Clone)]
pub(crate) struct EventMiddle(Vec<u8>);

impl EventSource {
    /// `source` is the CloudEvent's source, a URI reference such as `opstech3.mbta.com/trike`;
    /// `source_ip` is the address of the sending peer.
    pub fn new(partition_key: String, source: &str, source_ip: Option<IpAddr>) -> Self {
        let source_ip = source_ip.map_or(String::new(), |ip| ip.to_canonical().to_string());
        let middle = EventMiddle::new(
            Some(&json_string(&partition_key)),
            source,
            Some(&json_string(&source_ip)),
        );
        Self { partition_key, middle }
    }

    /// The key that decides the shard: also the partition key of the Kinesis record.
    pub fn partition_key(&self) -> &str {
        &self.partition_key
    }

    /// The event for one message, received at `time` as [`event_time`] prints it.
    ///
    /// The bytes are those of Trike, MBTA's producer. A message that is not UTF-8 keeps its exact
    /// bytes in `data.raw_base64`, and `data.raw` shows U+FFFD in place of what is not text.
    pub fn event(&self, time: &str, raw: &[u8]) -> Event {
        let id = event_id(time, raw);
        let raw = RawText::new(raw);
        Event { json: self.middle.event(&raw.text, raw.base64.as_deref(), &id, time), id }
    }
}

impl EventMiddle {
    /// The partition key and the address are JSON already; what is `None` is left out.
    pub(crate) fn new(
        partition_key: Option<&[u8]>,
        source: &str,
        source_ip: Option<&[u8]>,
    ) -> Self {
        let mut json = Vec::new();
        for (key, value) in [
            (",\"partitionkey\":", partition_key),
            (",\"source\":", Some(&*json_string(source))),
            (",\"sourceip\":", source_ip),
            (",\"specversion\":", Some(b"\"1.0\"")),
        ] {
            let Some(value) = value else { continue };
            json.extend_from_slice(key.as_bytes());
            json.extend_from_slice(value);
        }
        Self(json)
    }

    /// The whole event for one message.
    pub(crate) fn event(
        &self,
        raw: &str,
        raw_base64: Option<&str>,
        id: &str,
        time: &str,
    ) -> Vec<u8> {
        let mut json = Vec::with_capacity(raw.len() + self.0.len() + 160);
        json.extend_from_slice(b"{\"data\":{");
        push_raw(&mut json, raw, raw_base64);
        json.push(b'}');
        self.finish(json, id, time, EVENT_TYPE)
    }

    /// Adds to an event's `data` all that follows it.
    pub(super) fn finish(&self, mut json: Vec<u8>, id: &str, time: &str, kind: &str) -> Vec<u8> {
        json.extend_from_slice(b",\"id\":");
        push_json_string(&mut json, id);
        json.extend_from_slice(&self.0);
        json.extend_from_slice(b",\"time\":");
        push_json_string(&mut json, time);
        json.extend_from_slice(b",\"type\":");
        push_json_string(&mut json, kind);
        json.push(b'}');
        json
    }
}

/// Base64 of the SHA-1 over the time as printed, followed directly by the raw bytes.
pub(super) fn event_id(time: &str, raw: &[u8]) -> String {
    let mut hash = Sha1::new();
    hash.update(time);
    hash.update(raw);
    BASE64_STANDARD.encode(hash.finalize())
}

/// The bytes of a message as JSON can carry them: as text, and beside it in Base64 where the text
/// cannot be exact.
pub(super) struct RawText<'a> {
    pub text: Cow<'a, str>,
    pub base64: Option<String>,
}

impl<'a> RawText<'a> {
    pub(super) fn new(raw: &'a [u8]) -> Self {
        let text = String::from_utf8_lossy(raw);
        let base64 = matches!(text, Cow::Owned(_)).then(|| BASE64_STANDARD.encode(raw));
        Self { text, base64 }
    }
}

pub(super) fn push_raw(json: &mut Vec<u8>, raw: &str, raw_base64: Option<&str>) {
    json.extend_from_slice(b"\"raw\":");
    push_json_string(json, raw);
    if let Some(raw_base64) = raw_base64 {
        json.extend_from_slice(b",\"raw_base64\":");
        push_json_string(json, raw_base64);
    }
}

fn json_string(text: &str) -> Vec<u8> {
    let mut json = Vec::with_capacity(text.len() + 2);
    push_json_string(&mut json, text);
    json
}

/// Escapes as Trike's encoder does; serde_json differs in the case of `\u00XX`.
pub(super) fn push_json_string(json: &mut Vec<u8>, text: &str) {
    json.push(b'"');
    for &byte in text.as_bytes() {
        match byte {
            b'"' => json.extend_from_slice(b"\\\""),
            b'\\' => json.extend_from_slice(b"\\\\"),
            0x08 => json.extend_from_slice(b"\\b"),
            b'\t' => json.extend_from_slice(b"\\t"),
            b'\n' => json.extend_from_slice(b"\\n"),
            0x0C => json.extend_from_slice(b"\\f"),
            b'\r' => json.extend_from_slice(b"\\r"),
            0x00..0x20 => {
                // Writing to a Vec cannot fail.
                let _ = write!(json, "\\u{byte:04X}");
            }
            _ => json.push(byte),
        }
    }
    json.push(b'"');
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn source() -> EventSource {
        EventSource::new("test_key".into(), "opstech3.mbta.com/trike", None)
    }

    #[test]
    fn the_worked_example_is_reproduced_byte_for_byte() {
        let event = source().event("2021-08-13T12:00:00Z", b"4994,TSCH,02:00:06,R,RLD,W");
        assert_eq!(
            String::from_utf8(event.json).expect("UTF-8"),
            r#"{"data":{"raw":"4994,TSCH,02:00:06,R,RLD,W"},"id":"myH7tTFo1tuZdSXxQ/5QFA4Xx58=","partitionkey":"test_key","source":"opstech3.mbta.com/trike","sourceip":"","specversion":"1.0","time":"2021-08-13T12:00:00Z","type":"com.mbta.ocs.raw_message"}"#
        );
    }

    #[test]
    fn ids_agree_with_the_published_ones() {
        for (time, raw, id) in [
            ("2021-08-13T12:00:00Z", "4994,TSCH,02:00:06,R,RLD,W", "myH7tTFo1tuZdSXxQ/5QFA4Xx58="),
            ("2021-08-13T12:00:00Z", "4995,TSCH,03:00:06,R,RLD,W", "O7ODUPlPMM089UZL1YLYpFIZzeo="),
            (
                "2023-01-29T13:51:54.990000Z",
                "791612,RGPS,08:51:54,G,U15-141-626,3639,42.335725,71.145005,0.00,75.94",
                "prLSlfYXlQ8Nmsa8gyVi6PPZUmA=",
            ),
            (
                "2022-06-08T17:42:30.092000Z",
                "166744,RGPS,13:42:29,G,U15-141-631,3675,42.3481883333333,71.1404983333333,0.00,18.94",
                "ZJwv7YAt3mOKpHhfrQfHChGZai0=",
            ),
            (
                "2022-06-08T16:17:43.183000Z",
                "53402,RGPS,12:17:43,G,U16-350-713,3087,42.2694266666667,71.0770833333333,31.94,71.99",
                "9IRwgei0xrfcrdLFuMNiBLwtTWY=",
            ),
        ] {
            assert_eq!(source().event(time, raw.as_bytes()).id, id, "{raw}");
        }
    }

    #[test]
    fn times_have_six_fractional_digits() {
        let at: Timestamp = "2023-01-29T13:51:54.99Z".parse().expect("a time");
        assert_eq!(event_time(at), "2023-01-29T13:51:54.990000Z");
        let whole: Timestamp = "2021-08-13T12:00:00Z".parse().expect("a time");
        assert_eq!(event_time(whole), "2021-08-13T12:00:00.000000Z");
        let nanos: Timestamp = "2021-08-13T12:00:00.123456789Z".parse().expect("a time");
        assert_eq!(event_time(nanos), "2021-08-13T12:00:00.123456Z");
    }

    #[test]
    fn control_characters_are_escaped_with_upper_case_hex() {
        let json = source().event("t", b"\"\\\x08\t\n\x0c\r\x1f/\xc3\xa9").json;
        let json = String::from_utf8(json).expect("UTF-8");
        assert!(json.starts_with(r#"{"data":{"raw":"\"\\\b\t\n\f\r\u001F/é"}"#), "{json}");
    }

    #[test]
    fn p9_bytes_that_are_not_text_are_kept() {
        let raw = b"12,DIAG,00:00:00,\xff\xfe";
        let event = source().event("2021-08-13T12:00:00Z", raw);
        let json: Value = serde_json::from_slice(&event.json).expect("JSON");
        assert_eq!(json["data"]["raw"], "12,DIAG,00:00:00,\u{FFFD}\u{FFFD}");
        let kept = json["data"]["raw_base64"].as_str().expect("the bytes");
        assert_eq!(BASE64_STANDARD.decode(kept).expect("Base64"), raw);
    }

    #[test]
    fn an_ipv4_peer_on_an_ipv6_socket_is_printed_as_ipv4() {
        let mapped: IpAddr = "::ffff:10.198.0.34".parse().expect("an address");
        let event = EventSource::new("k".into(), "s", Some(mapped)).event("t", b"x");
        let json: Value = serde_json::from_slice(&event.json).expect("JSON");
        assert_eq!(json["sourceip"], "10.198.0.34");
    }

    proptest! {
        #[test]
        fn any_text_reads_back_as_it_was(text in any::<String>(), key in any::<String>()) {
            let event = EventSource::new(key.clone(), "s", None).event("t", text.as_bytes());
            let json: Value = serde_json::from_slice(&event.json).expect("JSON");
            prop_assert_eq!(json["data"]["raw"].as_str(), Some(text.as_str()));
            prop_assert_eq!(json["partitionkey"].as_str(), Some(key.as_str()));
        }
    }
}
