//! What a line of a log says. Pure.

use std::sync::Arc;

use bytes::Bytes;
use jiff::{
    Timestamp,
    civil::{DateTime, Time},
};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::{
    ocs::{ArchiveLine, EOT},
    record::{Record, ShardName, unpack},
    shard::SequenceNumber,
};

/// An OCS message of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub at: At,
    pub raw: Vec<u8>,
}

/// When a message of a log was sent or received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum At {
    /// The time of an event.
    Instant(Timestamp),
    /// The date and time of an archive's line, by New York's clocks.
    Local(DateTime),
    /// The time of day in an OCS line.
    TimeOfDay(Time),
}

/// Adds the messages of one line, which may be of any of the formats. An error says why the line, or a
/// part of it, gives none; what it gave is added all the same.
pub(super) fn parse(line: &[u8], entries: &mut Vec<Entry>) -> Result<(), String> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let had = entries.len();
    let parsed = match line.trim_ascii_start().first() {
        // Where objects were joined, there may be empty lines.
        None => Ok(()),
        Some(b'{' | b'[') => parse_json(line, entries),
        Some(_) if line == b"HEARTBEAT" => Ok(()),
        Some(_) => parse_text(line).map(|entry| entries.push(entry)),
    };
    let can_be_sent = |entry: &Entry| !entry.raw.is_empty() && !entry.raw.contains(&EOT);
    let count = entries.len();
    let mut n = 0;
    entries.retain(|entry| {
        n += 1;
        n <= had || can_be_sent(entry)
    });
    if entries.len() < count {
        return Err("a message that is empty, or has an EOT byte in it, cannot be sent".to_owned());
    }
    parsed
}

fn parse_text(line: &[u8]) -> Result<Entry, String> {
    if let Some(line) = ArchiveLine::parse(line) {
        return Ok(Entry { at: At::Local(line.received_at), raw: line.raw.to_vec() });
    }
    let mut fields = line.split(|byte| *byte == b',');
    let counter = fields.next().unwrap_or_default().trim_ascii();
    let time = fields.nth(1).and_then(|time| str::from_utf8(time.trim_ascii()).ok());
    let time = time.and_then(|time| Time::strptime("%H:%M:%S", time).ok());
    match time {
        Some(time) if !counter.is_empty() && counter.iter().all(u8::is_ascii_digit) => {
            Ok(Entry { at: At::TimeOfDay(time), raw: line.to_vec() })
        }
        _ => Err("it begins neither with MM/dd/yy,HH:mm:ss, as an archive's line, nor with \
                  counter,TYPE,HH:MM:SS as an OCS line, and is no JSON"
            .to_owned()),
    }
}

/// What `consume --format json` prints has the event in it. Anything else is read as a record would be.
#[derive(Deserialize)]
struct Printed<'a> {
    #[serde(borrow)]
    event: Option<&'a RawValue>,
    #[serde(borrow)]
    specversion: Option<&'a RawValue>,
}

fn parse_json(line: &[u8], entries: &mut Vec<Entry>) -> Result<(), String> {
    let data = match serde_json::from_slice(line) {
        Ok(Printed { event: Some(event), specversion: None }) => event.get().as_bytes(),
        _ => line,
    };
    // The place of a record that there is none of.
    let Some(sequence_number) = SequenceNumber::parse("0") else { return Ok(()) };
    let shard = ShardName { stream: "".into(), shard: "".into(), hash_key_range: None };
    let record = Record {
        sequence_number,
        partition_key: String::new(),
        arrived_at: None,
        data: Bytes::copy_from_slice(data),
    };
    let (mut messages, mut undecodable) = (Vec::new(), Vec::new());
    unpack(&Arc::new(shard), record, None, &mut messages, &mut undecodable);
    let mut problem = undecodable.first().map(|undecodable| undecodable.reason.clone());
    for message in messages {
        match message.time() {
            Some(time) => {
                entries.push(Entry { at: At::Instant(time), raw: message.raw_bytes().into_owned() })
            }
            None => {
                problem =
                    Some(format!("the event's time {:?} is none of RFC 3339", message.time_text()));
            }
        }
    }
    problem.map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENT: &str = r#"{"data":{"raw":"4994,TSCH,02:00:06,R,RLD,W"},"id":"i","source":"s","specversion":"1.0","time":"2021-08-13T12:00:00Z","type":"com.mbta.ocs.raw_message"}"#;

    fn entries(line: &[u8]) -> (Vec<Entry>, Result<(), String>) {
        let mut entries = Vec::new();
        let parsed = parse(line, &mut entries);
        (entries, parsed)
    }

    fn one(line: &[u8]) -> Entry {
        match entries(line) {
            (entries, Ok(())) if entries.len() == 1 => entries[0].clone(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_format_gives_the_text_and_a_time() {
        let raw = b"4994,TSCH,02:00:06,R,RLD,W".to_vec();
        let time_of_day = Time::constant(2, 0, 6, 0);
        let expected = Entry { at: At::TimeOfDay(time_of_day), raw: raw.clone() };
        assert_eq!(one(b"4994,TSCH,02:00:06,R,RLD,W"), expected);
        assert_eq!(one(b"4994,TSCH,02:00:06,R,RLD,W\r\n"), expected);

        let local = "2021-08-13T08:00:00".parse().expect("a time");
        let expected = Entry { at: At::Local(local), raw: raw.clone() };
        assert_eq!(one(b"08/13/21,08:00:00,4994,TSCH,02:00:06,R,RLD,W\n"), expected);

        let instant = "2021-08-13T12:00:00Z".parse().expect("a time");
        let expected = Entry { at: At::Instant(instant), raw };
        assert_eq!(one(EVENT.as_bytes()), expected);
        let printed = format!(r#"{{"stream":"s","shard":"x","event":{EVENT}}}"#);
        assert_eq!(one(printed.as_bytes()), expected);
        let (several, parsed) = entries(format!("[{EVENT},{EVENT}]\n").as_bytes());
        assert_eq!((several, parsed), (vec![expected.clone(), expected], Ok(())));
    }

    #[test]
    fn what_was_received_is_kept_whatever_it_is() {
        assert_eq!(one(b"08/13/21,08:00:00,gar\xffbage ").raw, b"gar\xffbage ");
        let not_text = EVENT.replace(r#""W""#, "").replace(
            r#"{"raw":"4994,TSCH,02:00:06,R,RLD,W"}"#,
            r#"{"raw":"1,DIAG,00:00:01,\ufffd","raw_base64":"MSxESUFHLDAwOjAwOjAxLP8="}"#,
        );
        assert_eq!(one(not_text.as_bytes()).raw, b"1,DIAG,00:00:01,\xff");
    }

    #[test]
    fn what_says_nothing_is_passed_over() {
        for line in ["", "\n", "  \r\n", "HEARTBEAT\n"] {
            assert_eq!(entries(line.as_bytes()), (Vec::new(), Ok(())), "{line:?}");
        }
    }

    #[test]
    fn p9_a_bad_line_says_why_and_gives_what_it_can() {
        for line in [
            "not_an_integer,DEVI,02:04:55,B",
            "4364,,",
            "4364,DIAG,25:00:00,x",
            "{",
            r#"{"event":1}"#,
            "08/13/21,08:00:00,",
            "08/13/21,08:00:00,a\u{4}b",
        ] {
            let (entries, parsed) = entries(line.as_bytes());
            assert!(entries.is_empty() && parsed.is_err(), "{line}: {entries:?}");
        }
        let (some, parsed) = entries(format!("[{EVENT},7]").as_bytes());
        assert!(some.len() == 1 && parsed.is_err(), "{some:?} {parsed:?}");
        let (none, parsed) = entries(EVENT.replace("2021-08-13T", "then").as_bytes());
        assert!(none.is_empty() && parsed.is_err_and(|why| why.contains("time")), "{none:?}");
    }
}
