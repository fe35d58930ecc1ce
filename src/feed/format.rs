use serde::{Deserialize, Serialize};

use crate::record::Message;

/// How a message is written: one line, unless the OCS text itself has a line break and is written raw.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// A JSON object with the message's place in the stream and the CloudEvent.
    #[default]
    Json,
    /// The CloudEvent.
    Event,
    /// The OCS text, exactly as it was received.
    Raw,
}

#[derive(Serialize)]
struct Place<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    serial: Option<u64>,
    stream: &'a str,
    shard: &'a str,
    sequence_number: &'a str,
    sub_sequence_number: u64,
    partition_key: &'a str,
    arrived_at: Option<jiff::Timestamp>,
}

impl Format {
    /// Appends the line for `message` to `out`.
    pub fn write(self, message: &Message, out: &mut Vec<u8>) {
        match self {
            Self::Json => write_json(None, message, out),
            Self::Event => write_event(message, out),
            Self::Raw => out.extend_from_slice(&message.raw_bytes()),
        }
        out.push(b'\n');
    }

    /// Appends the JSON line for `message`, beginning with its serial number on a connection.
    #[cfg(feature = "cli")]
    pub(crate) fn write_numbered(serial: u64, message: &Message, out: &mut Vec<u8>) {
        write_json(Some(serial), message, out);
        out.push(b'\n');
    }
}

fn write_json(serial: Option<u64>, message: &Message, out: &mut Vec<u8>) {
    let place = Place {
        serial,
        stream: message.stream(),
        shard: message.shard().as_str(),
        sequence_number: message.sequence_number().as_str(),
        sub_sequence_number: message.sub_sequence_number(),
        partition_key: message.partition_key(),
        arrived_at: message.arrived_at(),
    };
    // Strings and numbers always have a JSON form, and a Vec takes every write.
    if serde_json::to_writer(&mut *out, &place).is_ok() {
        out.pop();
        out.extend_from_slice(b",\"event\":");
        write_event(message, out);
        out.push(b'}');
    }
}

/// The event as it stands in the record. Line breaks can only be white space there: within strings
/// JSON escapes them.
fn write_event(message: &Message, out: &mut Vec<u8>) {
    let event = message.event_json();
    out.extend(event.bytes().map(|byte| if matches!(byte, b'\n' | b'\r') { b' ' } else { byte }));
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        record::{Record, ShardName, unpack},
        shard::SequenceNumber,
    };

    fn line(format: Format) -> String {
        let json = r#"{"data":{"raw":"1,DIAG,00:00:01,\"a\""},
            "id":"i","source":"s","specversion":"1.0",
            "time":"2021-08-13T12:00:00Z","type":"com.mbta.ocs.raw_message"}"#;
        let record = Record {
            sequence_number: SequenceNumber::parse("17").expect("a number"),
            partition_key: "{a -> b}".into(),
            arrived_at: "2021-08-13T12:00:01.5Z".parse().ok(),
            data: json.into(),
        };
        let shard = Arc::new(ShardName {
            stream: "st".into(),
            shard: "shardId-0".into(),
            hash_key_range: None,
        });
        let (mut messages, mut undecodable) = (Vec::new(), Vec::new());
        unpack(&shard, record, None, &mut messages, &mut undecodable);
        let mut out = Vec::new();
        format.write(&messages[0], &mut out);
        String::from_utf8(out).expect("UTF-8")
    }

    #[test]
    fn json_has_the_place_and_the_event_on_one_line() {
        let line = line(Format::Json);
        assert_eq!(line.matches('\n').count(), 1);
        assert!(
            line.starts_with(
                r#"{"stream":"st","shard":"shardId-0","sequence_number":"17","sub_sequence_number":0,"partition_key":"{a -> b}","arrived_at":"2021-08-13T12:00:01.5Z","event":{"data":"#
            ),
            "{line}"
        );
        let value: serde_json::Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!(value["event"]["data"]["raw"], r#"1,DIAG,00:00:01,"a""#);
    }

    #[test]
    fn event_and_raw_are_one_line_each() {
        let event = line(Format::Event);
        assert_eq!(event.matches('\n').count(), 1);
        assert!(serde_json::from_str::<serde_json::Value>(&event).is_ok());
        assert_eq!(line(Format::Raw), "1,DIAG,00:00:01,\"a\"\n");
    }
}
