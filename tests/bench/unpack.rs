//! How fast one core takes records apart: `cargo bench --bench unpack`.
//!
//! Each line is the best of many passes over the same records, in MB (10^6 bytes) of the stream a second,
//! with what is made of them dropped again within the time. The last two lines parse the bytes of the first
//! with serde_json alone, for comparison on the same machine in the same run.

use std::{
    hint::black_box,
    io::Write as _,
    sync::Arc,
    time::{Duration, Instant},
};

use flate2::{Compression, write::GzEncoder};
use serde::Deserialize;
use tramline::{
    SequenceNumber,
    ocs::{BatchMessage, EventSource},
    record::{Record, ShardName, unpack, write_aggregate},
    shard::HashKeyRange,
};

/// Few enough for a pass to take milliseconds: on a busy machine some then run without an interruption.
const EVENTS: usize = 1_000;
/// Events in an array, a batch, an aggregate or a gzip stream: what the producer gathers while a record is
/// on its way.
const GROUP: usize = 20;
/// A worker hands on so many messages at a time.
const BATCH: usize = 500;
const PASSES: usize = 600;
const TIME: &str = "2023-01-29T13:51:54.990000Z";
const PARTITION_KEY: &str = "{10.108.46.198:8081 -> 10.198.0.34:43414}";

fn main() {
    let source = EventSource::new(
        PARTITION_KEY.into(),
        "opstech3.mbta.com/trike",
        "10.198.0.34".parse().ok(),
    );
    let lines: Vec<String> = (0..EVENTS).map(line).collect();
    let events: Vec<Vec<u8>> =
        lines.iter().map(|line| source.event(TIME, line.as_bytes()).json).collect();
    let arrays: Vec<Vec<u8>> = events.chunks(GROUP).map(array).collect();
    let batches = lines.chunks(GROUP).map(|lines| {
        let messages: Vec<_> =
            lines.iter().map(|line| BatchMessage::new(TIME, line.as_bytes())).collect();
        source.batch(&messages).expect("not empty").json
    });
    let aggregates = events
        .chunks(GROUP)
        .map(|events| write_aggregate(events.iter().map(|event| (PARTITION_KEY, &event[..]))));

    println!(
        "{EVENTS} events of {} bytes on average, {GROUP} to a group",
        events.iter().map(Vec::len).sum::<usize>() / EVENTS
    );
    unpacking("single events", events.clone());
    unpacking("arrays", arrays.clone());
    unpacking("batch events", batches.collect());
    unpacking("KPL aggregates", aggregates.collect());
    let unpacked_bytes = arrays.iter().map(Vec::len).sum();
    report_as(
        "arrays in gzip, as JSON",
        unpacked_bytes,
        arrays.iter().map(|array| gzip(array)).collect(),
    );
    parsing::<Borrowed<'_>>("serde_json, a struct", &events);
    parsing::<serde_json::Value>("serde_json, a Value", &events);
}

fn line(n: usize) -> String {
    let n = n + 10_000;
    format!(
        "{n},TMOV,02:00:40,G,{n},42.336251428162655,-71.14902308252195,1,831,25,  3885,gpsci,3885"
    )
}

fn array(events: &[Vec<u8>]) -> Vec<u8> {
    [&b"["[..], &events.join(&b','), b"]"].concat()
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(data).expect("a Vec takes every write");
    encoder.finish().expect("a Vec takes every write")
}

fn unpacking(what: &str, payloads: Vec<Vec<u8>>) {
    report_as(what, payloads.iter().map(Vec::len).sum(), payloads);
}

fn report_as(what: &str, size_bytes: usize, payloads: Vec<Vec<u8>>) {
    // One of two shards: a key's hash is looked at.
    let range = HashKeyRange { start: 0, end: u128::MAX - 1 };
    let shard = Arc::new(ShardName {
        stream: "ctd-ocs-raw-messages".into(),
        shard: "shardId-000000000000".into(),
        hash_key_range: Some(range),
    });
    let number = "49590338271490256608559692538361571095921575989136588898";
    let records: Vec<Record> = payloads
        .into_iter()
        .map(|payload| Record {
            sequence_number: SequenceNumber::parse(number).expect("a number"),
            partition_key: PARTITION_KEY.into(),
            arrived_at: None,
            data: payload.into(),
        })
        .collect();
    let best = best(|| {
        let records = records.clone();
        let (mut messages, mut undecodable) = (Vec::new(), Vec::new());
        let mut count = 0;
        let start = Instant::now();
        for record in records {
            unpack(&shard, record, None, &mut messages, &mut undecodable);
            if messages.len() >= BATCH {
                count += black_box(&messages).len();
                messages.clear();
            }
        }
        count += messages.len();
        drop(messages);
        let took = start.elapsed();
        assert_eq!((count, undecodable.len()), (EVENTS, 0), "{what}");
        took
    });
    report(what, size_bytes, best);
}

/// What a service would write by hand for the fields that a message has.
#[derive(Deserialize)]
#[expect(dead_code, reason = "it is parsed, not used")]
struct Borrowed<'a> {
    id: &'a str,
    time: &'a str,
    source: &'a str,
    r#type: &'a str,
    #[serde(borrow)]
    data: Data<'a>,
}

#[derive(Deserialize)]
#[expect(dead_code, reason = "it is parsed, not used")]
struct Data<'a> {
    raw: &'a str,
}

fn parsing<'a, T: Deserialize<'a>>(what: &str, payloads: &'a [Vec<u8>]) {
    let best = best(|| {
        let start = Instant::now();
        for payload in payloads {
            black_box(serde_json::from_slice::<T>(payload).expect("an event"));
        }
        start.elapsed()
    });
    report(what, payloads.iter().map(Vec::len).sum(), best);
}

fn best(pass: impl FnMut() -> Duration) -> Duration {
    std::iter::repeat_with(pass).take(PASSES).min().expect("several passes")
}

fn report(what: &str, size_bytes: usize, took: Duration) {
    let rate = size_bytes as f64 / took.as_secs_f64() / 1e6;
    println!(
        "{what:<26}{rate:>7.0} MB/s {:>6.0} ns a message",
        took.as_nanos() as f64 / EVENTS as f64
    );
}
