//! What comes out of records of every kind, through `unpack`.

use std::{io::Write as _, sync::Arc};

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use md5::{Digest as _, Md5};
use proptest::prelude::*;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::{
    Message, Record, ShardName, Undecodable, Unpacked, unpack,
    unpack::{UNDECODABLE_LIMIT, UNPACKED_LIMIT_BYTES},
    write_aggregate,
};
use crate::{
    ocs::{BatchMessage, EventSource},
    shard::{HashKeyRange, SequenceNumber},
};

const TIME: &str = "2021-08-13T12:00:00Z";

fn unpacked_at(
    data: impl Into<Bytes>,
    finished: Option<u64>,
    hash_key_range: Option<HashKeyRange>,
) -> (Option<Unpacked>, Vec<Message>, Vec<Undecodable>) {
    let shard =
        Arc::new(ShardName { stream: "s".into(), shard: "shardId-0".into(), hash_key_range });
    let record = Record {
        sequence_number: SequenceNumber::parse("17").expect("a number"),
        partition_key: "record_key".into(),
        arrived_at: None,
        data: data.into(),
    };
    let (mut messages, mut undecodable) = (Vec::new(), Vec::new());
    let unpacked = unpack(&shard, record, finished, &mut messages, &mut undecodable);
    (unpacked, messages, undecodable)
}

fn unpacked(data: impl Into<Bytes>) -> (Vec<Message>, Vec<Undecodable>) {
    let (_, messages, undecodable) = unpacked_at(data, None, None);
    (messages, undecodable)
}

/// The one dead letter that is all that comes out.
fn dead_letter(data: impl Into<Bytes>) -> Undecodable {
    let (messages, mut undecodable) = unpacked(data);
    assert_eq!((messages.len(), undecodable.len()), (0, 1), "{undecodable:?}");
    undecodable.remove(0)
}

fn source() -> EventSource {
    EventSource::new("event_key".into(), "src", None)
}

fn event(raw: &[u8]) -> String {
    String::from_utf8(source().event(TIME, raw).json).expect("UTF-8")
}

fn array(raws: &[&[u8]]) -> String {
    format!("[{}]", raws.iter().map(|raw| event(raw)).collect::<Vec<_>>().join(","))
}

fn batch(raws: &[&[u8]]) -> String {
    let messages: Vec<_> = raws.iter().map(|raw| BatchMessage::new(TIME, raw)).collect();
    String::from_utf8(source().batch(&messages).expect("a batch").json).expect("UTF-8")
}

fn gzip(data: impl AsRef<[u8]>) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(data.as_ref()).expect("a Vec takes every write");
    encoder.finish().expect("a Vec takes every write")
}

fn aggregate(user_records: &[(&str, &[u8])]) -> Vec<u8> {
    write_aggregate(user_records.iter().copied())
}

/// Sub-sequence number, user record, partition key and OCS text.
fn seen(messages: &[Message]) -> Vec<(u64, Option<u64>, &str, &str)> {
    messages
        .iter()
        .map(|m| (m.sub_sequence_number(), m.user_record(), m.partition_key(), m.raw()))
        .collect()
}

// --- Plain JSON

#[test]
fn an_array_gives_its_events_in_order() {
    let json = format!(" [{},\n {}]", event(b"1,DIAG,00:00:01,a"), event(b"2,DIAG,00:00:02,b"));
    let (messages, undecodable) = unpacked(json);
    assert!(undecodable.is_empty());
    assert_eq!(
        seen(&messages),
        [
            (0, None, "record_key", "1,DIAG,00:00:01,a"),
            (1, None, "record_key", "2,DIAG,00:00:02,b"),
        ]
    );
    assert_eq!(messages[0].sequence_number().as_str(), "17");
    assert_eq!(messages[1].event_json(), event(b"2,DIAG,00:00:02,b"));
}

#[test]
fn a_single_event_needs_no_array() {
    let (messages, undecodable) = unpacked(format!("\r\n\t {}\n", event(b"1,DIAG,00:00:01,a")));
    assert!(undecodable.is_empty());
    assert_eq!(messages[0].raw(), "1,DIAG,00:00:01,a");
    assert_eq!(messages[0].source(), "src");
    assert_eq!(messages[0].event_json(), event(b"1,DIAG,00:00:01,a"));
    assert_eq!(messages[0].time().map(|t| t.as_second()), Some(1_628_856_000));
}

#[test]
fn both_spellings_of_the_types_are_read() {
    for json in [event(b"1,DIAG,00:00:01,a"), batch(&[b"1,DIAG,00:00:01,a"])] {
        let hyphens = json.replace("raw_message_batch", "raw-message-batch");
        let hyphens = hyphens.replace("raw_message", "raw-message");
        assert_ne!(json, hyphens);
        assert_eq!(unpacked(hyphens).0.len(), 1);
    }
}

#[test]
fn unknown_fields_are_ignored() {
    let new = r#""new":{"a":[1,{"type":"x"}]},"sourceip":null"#;
    for json in [event(b"x"), batch(&[b"x"])] {
        let json = json.replace(r#""partitionkey":"event_key","#, "");
        let json = json.replace(r#""sourceip":"""#, new);
        assert!(json.contains(new));
        assert_eq!(unpacked(json).0.len(), 1);
    }
}

#[test]
fn p9_one_bad_event_leaves_its_neighbours_alone_and_keeps_its_bytes() {
    let other = r#"{"type":"com.example.other","data":7}"#;
    let json =
        format!("[{} ,{other}, {}]", event(b"1,DIAG,00:00:01,a"), event(b"2,DIAG,00:00:02,b"));
    let (messages, undecodable) = unpacked(json);
    let subs: Vec<_> = messages.iter().map(Message::sub_sequence_number).collect();
    assert_eq!(subs, [0, 2]);
    assert_eq!(undecodable.len(), 1);
    assert_eq!(undecodable[0].sub_sequence_number, Some(1));
    assert_eq!(undecodable[0].partition_key, "record_key");
    assert_eq!(undecodable[0].data, other);
    assert_eq!(undecodable[0].reason, r#"event type "com.example.other" is not a raw OCS message"#);
}

#[test]
fn p9_an_array_without_a_message_is_one_dead_letter() {
    for data in [r#"[0, "1", {}, [], null, true]"#, "[0]"] {
        let letter = dead_letter(data);
        assert_eq!(letter.sub_sequence_number, None);
        assert_eq!(letter.data, data);
        assert!(letter.reason.contains("without a raw OCS message"), "{}", letter.reason);
    }
}

#[test]
fn p9_what_cannot_be_read_comes_out_whole_with_the_reason() {
    let good = event(b"1,DIAG,00:00:01,a");
    for (data, reason) in [
        (&b"\xff\xfe"[..], "not UTF-8"),
        (b"", "not JSON"),
        (b" \n", "not JSON"),
        (b"{\"type\":", "not JSON"),
        (b"[{]", "not JSON"),
        (b"[]", "an array without an element"),
        (b"[ ] ", "an array without an element"),
        (b"17", "not a raw OCS message"),
        (br#"{"type":"com.mbta.ocs.raw_message"}"#, "missing field"),
        (br#"{"type":"com.mbta.ocs.raw_message_batch"}"#, "missing field"),
        (event(b"").as_bytes(), "data.raw is empty"),
        (good.replace("\"raw\"", "\"row\"").as_bytes(), "data.raw is missing"),
        (good.replace("raw_message", "raw_message_batch").as_bytes(), "data.messages is missing"),
        (format!("{good} {good}").as_bytes(), "trailing characters"),
        // An array is right from beginning to end, or nothing of it can be trusted.
        (format!("[{good}").as_bytes(), "not JSON"),
        (format!("[{good},]").as_bytes(), "not JSON"),
        (format!("[,{good}]").as_bytes(), "not JSON"),
        (format!("[{good} {good}]").as_bytes(), "not JSON"),
        (format!("[{good}] {good}").as_bytes(), "not JSON"),
        (format!("[{good},{{\"type\":x}}]").as_bytes(), "not JSON"),
        (format!("[\x0c{good}]").as_bytes(), "not JSON"),
        // serde would take an array of an object's fields for the object.
        (
            br#"["com.mbta.ocs.raw_message","i","t","s",["raw",null,null]]"#,
            "an array of 5 without a raw OCS message",
        ),
        (
            br#"{"type":"com.mbta.ocs.raw_message","id":"i","time":"t","source":"s","data":["x"]}"#,
            "an object",
        ),
    ] {
        let letter = dead_letter(data.to_vec());
        assert!(letter.reason.contains(reason), "{:?}: {}", data.escape_ascii(), letter.reason);
        assert_eq!(letter.data, data);
        assert_eq!(letter.sub_sequence_number, None);
    }
}

#[test]
fn p9_raw_bytes_are_those_that_were_received() {
    let raw = b"1,DIAG,00:00:01,\xff";
    for data in [event(raw), batch(&[raw])] {
        let (messages, _) = unpacked(data.clone());
        assert_eq!(messages[0].raw(), "1,DIAG,00:00:01,\u{FFFD}");
        assert_eq!(messages[0].raw_bytes(), &raw[..]);

        let letter = dead_letter(data.replace(r#""raw_base64":""#, r#""raw_base64":"!"#));
        assert!(letter.reason.contains("data.raw_base64 is not Base64"), "{}", letter.reason);
    }
}

#[test]
fn p9_a_long_text_does_not_make_a_long_reason() {
    let long = "é".repeat(100_000);
    let letter = dead_letter(format!(r#"{{"type":"{long}"}}"#));
    assert!(letter.reason.len() < 500, "{}", letter.reason.len());
    assert!(letter.reason.ends_with('…'));
}

#[test]
fn p9_countless_bad_parts_are_told_in_bounded_memory_and_none_is_lost() {
    let bad = vec!["0"; UNDECODABLE_LIMIT + 500].join(",");
    let json = format!("[{bad},{}]", event(b"x"));
    let (messages, undecodable) = unpacked(json.clone());
    assert_eq!(messages[0].sub_sequence_number(), UNDECODABLE_LIMIT as u64 + 500);
    assert_eq!(undecodable.len(), UNDECODABLE_LIMIT + 1);
    let last = undecodable.last().expect("one");
    assert!(last.reason.starts_with("500 more parts cannot be decoded"), "{}", last.reason);
    assert_eq!((last.sub_sequence_number, &last.data[..]), (None, json.as_bytes()));
}

// --- Batch events

#[test]
fn a_message_of_a_batch_looks_as_if_it_came_alone() {
    let raws: [&[u8]; 4] = [b"1,DIAG,00:00:01,a", b"\"\\\t\x01\xc3\xa9", b"\xff\xfe", b"4"];
    let source = EventSource::new("{a -> \"b\"}".into(), "s/\u{1}", "10.0.0.1".parse().ok());
    let parts: Vec<_> = raws.iter().map(|raw| BatchMessage::new(TIME, raw)).collect();
    let (messages, undecodable) = unpacked(source.batch(&parts).expect("a batch").json);
    assert!(undecodable.is_empty(), "{undecodable:?}");
    let subs: Vec<_> = messages.iter().map(Message::sub_sequence_number).collect();
    assert_eq!(subs, [0, 1, 2, 3]);
    for (message, raw) in messages.iter().zip(raws) {
        let alone = source.event(TIME, raw).json;
        assert_eq!(message.event_json().as_bytes(), alone, "byte for byte");
        let (alone, _) = unpacked(alone);
        assert_eq!(message.id(), alone[0].id());
        assert_eq!(message.time_text(), alone[0].time_text());
        assert_eq!(message.source(), alone[0].source());
        assert_eq!(message.raw_bytes(), raw);
    }
}

#[test]
fn p9_one_bad_message_of_a_batch_leaves_its_neighbours_alone() {
    let json = batch(&[b"1", b"2", b"3"]).replace(r#""raw":"2","#, "");
    let (messages, undecodable) = unpacked(json.clone());
    assert_eq!(
        seen(&messages),
        [(0, None, "record_key", "1"), (2, None, "record_key", "3")],
        "{json}"
    );
    assert_eq!(undecodable.len(), 1);
    assert_eq!(undecodable[0].sub_sequence_number, Some(1));
    // As a record of its own it is what it was in the batch, with its id.
    let mut alone: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    alone["data"]["messages"] = serde_json::json!([alone["data"]["messages"][1]]);
    let kept: serde_json::Value = serde_json::from_slice(&undecodable[0].data).expect("JSON");
    assert_eq!(kept, alone);
    let again = dead_letter(undecodable[0].data.clone());
    assert_eq!(again.data, undecodable[0].data);
    let (whole, _) = unpacked(batch(&[b"1", b"2", b"3"]));
    let repaired = kept.to_string().replace(r#""time":"#, r#""raw":"2","time":"#);
    let (repaired, _) = unpacked(repaired);
    assert_eq!((repaired[0].raw(), repaired[0].id()), ("2", whole[1].id()));
    assert!(undecodable[0].reason.contains("missing field `raw`"), "{}", undecodable[0].reason);

    // A frame that is too long is not copied for each bad message.
    let long = json.replacen('{', &format!("{{\"more\":\"{}\",", "x".repeat(5000)), 1);
    let (messages, undecodable) = unpacked(long);
    assert_eq!((messages.len(), undecodable.len()), (2, 1));
    assert!(undecodable[0].data.starts_with(b"{\"id\":"));

    let none = batch(&[b"1"]).replace("\"raw\"", "\"row\"");
    let letter = dead_letter(none.clone());
    assert!(letter.reason.starts_with("a batch of 1 without"), "{}", letter.reason);
    assert_eq!(letter.data, none);
}

// --- gzip

#[test]
fn gzip_is_unpacked_in_one_member_or_several() {
    let json = array(&[b"1", b"2"]);
    let (first, second) = json.as_bytes().split_at(30);
    for data in [gzip(&json), [gzip(first), gzip(second)].concat()] {
        let (messages, undecodable) = unpacked(data);
        assert!(undecodable.is_empty(), "{undecodable:?}");
        assert_eq!(seen(&messages), [(0, None, "record_key", "1"), (1, None, "record_key", "2")]);
        assert_eq!(messages[1].event_json(), event(b"2"));
    }
}

#[test]
fn p9_gzip_that_cannot_be_unpacked_is_a_dead_letter_with_its_own_bytes() {
    let good = gzip(event(b"1"));
    let mut wrong_sum = good.clone();
    let at = wrong_sum.len() - 8;
    wrong_sum[at] ^= 1;
    for (data, reason) in [
        (good[..good.len() - 1].to_vec(), "it is cut off"),
        (good[..2].to_vec(), "it is cut off"),
        (wrong_sum, "checksum"),
        ([&good[..], b"more than a member has"].concat(), "gzip header"),
        (gzip(b"no event"), "not JSON"),
        (gzip(b""), "not JSON"),
    ] {
        let letter = dead_letter(data.clone());
        assert!(letter.reason.contains(reason), "{reason}: {}", letter.reason);
        assert_eq!(letter.data, data);
    }
}

#[test]
fn p9_a_gzip_bomb_is_a_dead_letter_and_so_is_the_gzip_behind_it() {
    let member = gzip(vec![b' '; UNPACKED_LIMIT_BYTES / 4]);
    let three_quarters = [member.repeat(3), gzip(event(b"1"))].concat();
    let two_quarters = [member.repeat(2), gzip(event(b"2"))].concat();
    let one = gzip(event(b"3"));
    let data = aggregate(&[
        ("a", &three_quarters),
        ("b", &two_quarters),
        ("c", &one),
        ("d", event(b"4").as_bytes()),
    ]);
    let (messages, undecodable) = unpacked(data);
    assert_eq!(seen(&messages), [(0, Some(0), "a", "1"), (3, Some(3), "d", "4")]);
    let data: Vec<_> = undecodable.iter().map(|part| &part.data[..]).collect();
    assert_eq!(data, [&two_quarters, &one]);
    for part in undecodable {
        assert!(part.reason.contains("unpacks to more than"), "{}", part.reason);
    }
}

// --- KPL aggregates

#[test]
fn the_user_records_of_an_aggregate_have_their_own_keys_and_numbers() {
    let data = aggregate(&[
        ("a", event(b"1").as_bytes()),
        ("b", array(&[b"2", b"3"]).as_bytes()),
        ("a", b"no event"),
        ("é", batch(&[b"4", b"5"]).as_bytes()),
        ("", event(b"6").as_bytes()),
    ]);
    let (outcome, messages, undecodable) = unpacked_at(data, None, None);
    assert_eq!(
        seen(&messages),
        [
            (0, Some(0), "a", "1"),
            (1, Some(1), "b", "2"),
            (2, Some(1), "b", "3"),
            (4, Some(3), "é", "4"),
            (5, Some(3), "é", "5"),
            (6, Some(4), "", "6"),
        ]
    );
    let [bad] = &undecodable[..] else { panic!("{undecodable:?}") };
    assert_eq!((bad.sub_sequence_number, bad.user_record), (Some(3), Some(2)));
    assert_eq!((&*bad.partition_key, &bad.data[..]), ("a", &b"no event"[..]));
    let outcome = outcome.expect("it is not finished");
    assert_eq!(outcome, Unpacked { last_user_record: Some(4), misplaced: false });
    assert_eq!(outcome.sub_sequence_number(), 4);
}

#[test]
fn p9_what_is_no_aggregate_is_read_as_a_plain_record() {
    let good = aggregate(&[("a", event(b"1").as_bytes())]);
    let mut wrong_sum = good.clone();
    *wrong_sum.last_mut().expect("a byte") ^= 1;
    for data in [&good[..4], &good[..20], &good[..good.len() - 1], &wrong_sum] {
        let (outcome, messages, undecodable) = unpacked_at(data.to_vec(), None, None);
        assert_eq!(outcome.map(|outcome| outcome.last_user_record), Some(None));
        assert!(messages.is_empty());
        assert!(undecodable[0].reason.contains("not UTF-8"), "{}", undecodable[0].reason);
        assert_eq!((undecodable.len(), &undecodable[0].data[..]), (1, data));
    }
}

#[test]
fn p1_a_corrupt_aggregate_is_one_dead_letter_and_no_half_of_it_is_delivered() {
    // Its second user record names partition key 7.
    let mut message = good_message();
    message.extend_from_slice(&[0x1A, 5, 0x08, 7, 0x1A, 1, b'x']);
    let data = wrapped(&message);
    let (outcome, messages, undecodable) = unpacked_at(data.clone(), None, None);
    assert!(messages.is_empty());
    let [letter] = &undecodable[..] else { panic!("{undecodable:?}") };
    assert_eq!((letter.sub_sequence_number, letter.user_record), (None, None));
    assert_eq!(
        letter.reason,
        "a corrupt KPL aggregate: user record 1: there is no partition key 7"
    );
    assert_eq!(letter.data, data);
    assert_eq!(outcome.map(|outcome| outcome.sub_sequence_number()), Some(0));
    assert_eq!(unpacked_at(data, Some(0), None).0, None, "as a plain record it is finished");
}

fn good_message() -> Vec<u8> {
    let data = aggregate(&[("a", event(b"1").as_bytes())]);
    data[4..data.len() - 16].to_vec()
}

fn wrapped(message: &[u8]) -> Vec<u8> {
    [&[0xF3, 0x89, 0x9A, 0xC2], message, &Md5::digest(message)].concat()
}

#[test]
fn an_aggregate_of_another_shard_gives_nothing_and_says_so() {
    // MD5("a") is 0cc1…, MD5("b") is 92eb….
    let lower = HashKeyRange { start: 0, end: u128::MAX / 2 };
    let (one, two) = (event(b"1"), event(b"2"));
    let ours = aggregate(&[("a", one.as_bytes()), ("a", two.as_bytes())]);
    let mixed = aggregate(&[("a", one.as_bytes()), ("b", two.as_bytes())]);
    assert_eq!(unpacked_at(ours, None, Some(lower)).1.len(), 2);
    let (outcome, messages, undecodable) = unpacked_at(mixed.clone(), None, Some(lower));
    assert_eq!(outcome, Some(Unpacked { last_user_record: Some(1), misplaced: true }));
    assert!(messages.is_empty() && undecodable.is_empty());
    assert_eq!(unpacked_at(mixed.clone(), None, None).1.len(), 2, "the range is not known");
    assert_eq!(unpacked_at(mixed.clone(), Some(1), Some(lower)).0, None, "it was noted before");

    // Only Kinesis records are filtered, as with the KCL.
    assert_eq!(unpacked_at(gzip(mixed), None, Some(lower)).1.len(), 2);
    assert_eq!(unpacked_at(event(b"1"), None, Some(HashKeyRange { start: 1, end: 2 })).1.len(), 1);
}

// --- Checkpoints

#[test]
fn p1_a_checkpoint_finishes_a_plain_record_whole_and_an_aggregate_up_to_its_user_record() {
    let (one, two, three) = (event(b"1"), array(&[b"2", b"3"]), event(b"4"));
    let plain = array(&[b"1", b"2"]);
    let aggregated =
        aggregate(&[("a", one.as_bytes()), ("b", two.as_bytes()), ("c", three.as_bytes())]);
    let left = |data: &[u8], finished| {
        let (outcome, messages, _) = unpacked_at(data.to_vec(), finished, None);
        let subs = messages.iter().map(Message::sub_sequence_number).collect();
        outcome.map(|_| -> Vec<u64> { subs })
    };
    for (finished, of_plain, of_aggregate) in [
        (None, Some(vec![0, 1]), Some(vec![0, 1, 2, 3])),
        // What the KCL's checkpoint(sequence number) writes.
        (Some(0), None, Some(vec![1, 2, 3])),
        (Some(1), None, Some(vec![3])),
        (Some(2), None, None),
        (Some(u64::MAX), None, None),
    ] {
        assert_eq!(left(plain.as_bytes(), finished), of_plain, "{finished:?}");
        assert_eq!(left(&gzip(&plain), finished), of_plain, "{finished:?}");
        assert_eq!(left(b"no event", finished).is_some(), finished.is_none(), "{finished:?}");
        assert_eq!(left(&aggregated, finished), of_aggregate, "{finished:?}");
    }
}

#[test]
fn p1_what_was_found_before_is_left_alone_when_a_finished_part_is_dropped() {
    let shard =
        Arc::new(ShardName { stream: "s".into(), shard: "shardId-0".into(), hash_key_range: None });
    let data = aggregate(&[("a", b"bad"), ("a", event(b"1").as_bytes()), ("a", b"worse")]);
    let record = Record {
        sequence_number: SequenceNumber::parse("17").expect("a number"),
        partition_key: "record_key".into(),
        arrived_at: None,
        data: data.into(),
    };
    let (mut messages, mut undecodable) = (Vec::new(), Vec::new());
    unpack(&shard, record.clone(), None, &mut messages, &mut undecodable);
    unpack(&shard, record, Some(1), &mut messages, &mut undecodable);
    assert_eq!(seen(&messages), [(1, Some(1), "a", "1")]);
    let places: Vec<_> = undecodable.iter().map(|part| part.user_record).collect();
    assert_eq!(places, [Some(0), Some(2), Some(2)]);
}

// --- One in another

#[test]
fn nested_kinds_are_unpacked_to_a_bounded_depth() {
    let json = event(b"1");
    let in_aggregate = |data: &[u8]| aggregate(&[("k", data)]);
    for (data, user_record, key) in [
        (gzip(in_aggregate(json.as_bytes())), None, "k"),
        (in_aggregate(&in_aggregate(json.as_bytes())), Some(0), "k"),
        (in_aggregate(&gzip(gzip(gzip(&json)))), Some(0), "k"),
        (gzip(gzip(gzip(gzip(&json)))), None, "record_key"),
    ] {
        let (messages, undecodable) = unpacked(data.clone());
        assert_eq!(seen(&messages), [(0, user_record, key, "1")], "{undecodable:?}");
        assert_eq!(messages[0].event_json(), json);
        let letter = dead_letter(gzip(gzip(gzip(data))));
        assert_eq!(letter.reason, "packed more than 4 times over");
        assert_eq!(letter.partition_key, key);
    }
}

/// A record's content, and what must come out of it.
#[derive(Debug, Clone)]
enum Content {
    Single(Vec<u8>),
    Array(Vec<Content>),
    Batch(Vec<Vec<u8>>),
    Bad,
    Gzip(Box<Content>),
    Aggregate(Vec<(String, Content)>),
}

impl Content {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Single(raw) => event(raw).into(),
            Self::Array(events) => {
                let events: Vec<_> = events.iter().map(Self::bytes).collect();
                [&b"["[..], &events.join(&b','), b"]"].concat()
            }
            Self::Batch(raws) => batch(&raws.iter().map(Vec::as_slice).collect::<Vec<_>>()).into(),
            Self::Bad => br#"{"type":"other"}"#.to_vec(),
            Self::Gzip(content) => gzip(content.bytes()),
            Self::Aggregate(user_records) => {
                let records: Vec<_> =
                    user_records.iter().map(|(key, content)| (key, content.bytes())).collect();
                write_aggregate(records.iter().map(|(key, data)| (key.as_str(), &data[..])))
            }
        }
    }

    /// Partition key and OCS bytes of each message, `None` for what is bad, in their order.
    fn expected(&self, key: &str) -> Vec<(String, Option<Vec<u8>>)> {
        match self {
            Self::Single(raw) => vec![(key.to_owned(), Some(raw.clone()))],
            Self::Batch(raws) => {
                raws.iter().map(|raw| (key.to_owned(), Some(raw.clone()))).collect()
            }
            Self::Bad => vec![(key.to_owned(), None)],
            Self::Gzip(content) => content.expected(key),
            Self::Array(events) => {
                let parts: Vec<_> = events.iter().flat_map(|event| event.expected(key)).collect();
                // Without a message it is bad as a whole.
                if parts.iter().any(|(_, raw)| raw.is_some()) {
                    parts
                } else {
                    vec![(key.to_owned(), None)]
                }
            }
            Self::Aggregate(user_records) => {
                user_records.iter().flat_map(|(key, content)| content.expected(key)).collect()
            }
        }
    }
}

fn raw() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        "[ -~]{1,20}".prop_map(String::into_bytes),
        prop::collection::vec(any::<u8>(), 1..20),
    ]
}

fn json_content() -> impl Strategy<Value = Content> {
    let event = prop_oneof![
        4 => raw().prop_map(Content::Single),
        2 => prop::collection::vec(raw(), 1..4).prop_map(Content::Batch),
        1 => Just(Content::Bad),
    ];
    prop_oneof![event.clone(), prop::collection::vec(event, 1..4).prop_map(Content::Array),]
}

fn content() -> impl Strategy<Value = Content> {
    json_content().prop_recursive(4, 12, 3, |inner| {
        prop_oneof![
            inner.clone().prop_map(|content| Content::Gzip(Box::new(content))),
            prop::collection::vec(("[a-c]{0,2}", inner), 1..4).prop_map(Content::Aggregate),
        ]
    })
}

/// Sub-sequence number, user record, partition key, and OCS bytes if it is a message.
type Place = (u64, Option<u64>, String, Option<Vec<u8>>);

/// Messages and what could not be decoded, in the order of their numbers.
fn all_parts(messages: &[Message], undecodable: &[Undecodable]) -> Vec<Place> {
    let mut parts: Vec<_> = messages
        .iter()
        .map(|m| {
            let raw = Some(m.raw_bytes().into_owned());
            (m.sub_sequence_number(), m.user_record(), m.partition_key().to_owned(), raw)
        })
        .collect();
    parts.extend(undecodable.iter().map(|part| {
        let number = part.sub_sequence_number.unwrap_or(0);
        (number, part.user_record, part.partition_key.clone(), None)
    }));
    parts.sort();
    parts
}

proptest! {
    #[test]
    fn whatever_is_packed_comes_back(content in content()) {
        let (_, messages, undecodable) = unpacked_at(content.bytes(), None, None);
        let parts = all_parts(&messages, &undecodable);
        let numbers: Vec<u64> = parts.iter().map(|part| part.0).collect();
        prop_assert_eq!(numbers, (0..parts.len() as u64).collect::<Vec<_>>());
        let back: Vec<_> = parts.into_iter().map(|(.., key, raw)| (key, raw)).collect();
        prop_assert_eq!(back, content.expected("record_key"));
        for message in &messages {
            let json: serde_json::Value =
                serde_json::from_str(&message.event_json()).expect("an event is JSON");
            prop_assert_eq!(json["id"].as_str(), Some(message.id()));
            prop_assert_eq!(json["data"]["raw"].as_str(), Some(message.raw()));
        }
    }

    #[test]
    fn p1_a_resume_at_any_position_gives_exactly_the_rest(content in content()) {
        let data = content.bytes();
        let (outcome, messages, undecodable) = unpacked_at(data.clone(), None, None);
        let all = all_parts(&messages, &undecodable);
        let last = outcome.expect("nothing is finished").sub_sequence_number();
        for finished in 0..=last + 1 {
            let (outcome, messages, undecodable) =
                unpacked_at(data.clone(), Some(finished), None);
            let rest: Vec<_> = all
                .iter()
                .filter(|(_, user_record, ..)| user_record.is_some_and(|n| n > finished))
                .cloned()
                .collect();
            prop_assert_eq!(outcome.is_none(), finished >= last);
            prop_assert_eq!(all_parts(&messages, &undecodable), rest);
        }
    }

    #[test]
    fn p9_no_bytes_make_it_panic(
        data in prop::collection::vec(any::<u8>(), 0..200),
        kind in 0..4,
    ) {
        let data = match kind {
            0 => data,
            1 => wrapped(&data),
            2 => [&[0x1F, 0x8B, 8, 0][..], &data].concat(),
            _ => gzip(data),
        };
        let (messages, undecodable) = unpacked(data);
        prop_assert!(messages.len() + undecodable.len() > 0);
    }
}

/// Damages valid records: a part of the time so that sums are right again, and what is inside is met.
///
/// `TRAMLINE_SEED=17 cargo test --lib damaged_records` runs one seed again.
#[test]
fn p9_damaged_records_lose_nothing_and_stop_nothing() {
    let seeds = match std::env::var("TRAMLINE_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => seed..seed + 1,
        None => 0..2000,
    };
    let inner = aggregate(&[
        ("a", event(b"1,DIAG,00:00:01,a").as_bytes()),
        ("b", &gzip(array(&[b"2", b"\xff"]))),
        ("c", batch(&[b"3", b"4\"", b"5"]).as_bytes()),
    ]);
    for seed in seeds {
        // It is shown if the test fails.
        println!("seed {seed}");
        let mut dice = ChaCha8Rng::seed_from_u64(seed);
        let data = match dice.random_range(0..4) {
            0 => damaged(&gzip(damaged(&inner, &mut dice)), &mut dice),
            1 => gzip(damaged(&inner, &mut dice)),
            2 => damaged(&inner, &mut dice),
            _ => wrapped(&damaged(&inner[4..inner.len() - 16], &mut dice)),
        };
        let (outcome, messages, undecodable) = unpacked_at(data.clone(), None, None);
        let outcome = outcome.expect("nothing is finished");
        if outcome.misplaced {
            continue;
        }
        assert!(messages.len() + undecodable.len() > 0);
        for message in &messages {
            assert!(!message.raw().is_empty());
            serde_json::from_str::<serde_json::Value>(&message.event_json()).expect("JSON");
        }
        let all = all_parts(&messages, &undecodable);
        let numbers: Vec<u64> = all.iter().map(|part| part.0).collect();
        assert_eq!(numbers, (0..all.len() as u64).collect::<Vec<_>>());
        // Nobody asks for the second half of what has none.
        let (again, messages, undecodable) = unpacked_at(data, Some(0), None);
        let rest: Vec<_> = all.into_iter().filter(|part| part.1.is_some_and(|n| n > 0)).collect();
        assert_eq!(again.is_some(), !rest.is_empty());
        assert_eq!(all_parts(&messages, &undecodable), rest);
    }
}

fn damaged(data: &[u8], dice: &mut ChaCha8Rng) -> Vec<u8> {
    let mut data = data.to_vec();
    for _ in 0..dice.random_range(1..4) {
        let at = dice.random_range(0..=data.len());
        match dice.random_range(0..4) {
            0 => data.truncate(at),
            1 => data.insert(at, dice.random()),
            2 if at < data.len() => data[at] = dice.random(),
            _ if at < data.len() => data[at] ^= 1 << dice.random_range(0..8),
            _ => data.push(dice.random()),
        }
    }
    data
}
