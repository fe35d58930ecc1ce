//! The producer's spool with the real binary: killed, kept waiting, refused.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write as _,
    net::{Shutdown, TcpStream},
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use crate::{
    proxy::{Fault, Proxy, Rule},
    support::{Servers, lines, listening, run, tramline, wait_for},
};

const STREAM: &str = "ctd-ocs-raw-messages";

fn command(servers: &Servers, spool: &Path, more: &[&str]) -> Command {
    let mut command = servers.tramline(&["produce", "--listen", "127.0.0.1:0"]);
    command.args(["--stream", STREAM, "--spool"]).arg(spool).args(more);
    command
}

/// A Kinesis at a port where nothing listens.
fn away(command: &mut Command) {
    command.env("AWS_ENDPOINT_URL_KINESIS", "http://127.0.0.1:1");
}

/// The id and the line of each message of a record.
type Record = Vec<(String, String)>;

/// The records of the stream, by partition key, in order.
fn stored(servers: &Servers) -> BTreeMap<String, Vec<Record>> {
    let args = ["consume", "--stream", STREAM, "--app", "check", "--exit-when-idle", "1s"];
    let stdout = run(servers.tramline(&[&args[..], &["--retrieval", "polling"]].concat()));
    let mut by_key: BTreeMap<String, BTreeMap<String, Record>> = BTreeMap::new();
    for line in stdout.succeeded().stdout {
        let value: serde_json::Value = serde_json::from_str(&line).expect("JSON");
        let text = |value: &serde_json::Value| value.as_str().expect("a text").to_owned();
        let event = &value["event"];
        let message = (text(&event["id"]), text(&event["data"]["raw"]));
        let records = by_key.entry(text(&value["partition_key"])).or_default();
        records.entry(text(&value["sequence_number"])).or_default().push(message);
    }
    by_key.into_iter().map(|(key, records)| (key, records.into_values().collect())).collect()
}

/// Takes out what was put again. A producer that was killed leaves one record at most of a connection that
/// may come again: then the next record begins with the same messages.
fn without_repeats(records: &[Record]) -> Vec<String> {
    let mut once: Vec<&Record> = Vec::new();
    for record in records {
        match once.last_mut() {
            Some(last) if last[0] == record[0] => {
                assert!(record.starts_with(last), "a repeat has all of the record before it");
                *last = record;
            }
            _ => once.push(record),
        }
    }
    let messages: Vec<&(String, String)> = once.into_iter().flatten().collect();
    let ids: BTreeSet<&String> = messages.iter().map(|(id, _)| id).collect();
    assert_eq!(ids.len(), messages.len(), "a repeat that does not follow directly");
    messages.into_iter().map(|(_, line)| line.clone()).collect()
}

fn send(address: &str, lines: &[String]) -> TcpStream {
    let mut socket = TcpStream::connect(address).expect("a connection");
    for line in lines {
        socket.write_all(&[line.as_bytes(), &[4]].concat()).expect("a write");
    }
    socket
}

#[test]
fn p8_what_waits_when_the_producer_is_killed_is_put_first_by_the_next() {
    let servers = Servers::with_stream(STREAM, 2);
    let spool = tempfile::tempdir().expect("a directory");
    let mut first = command(&servers, spool.path(), &["--partition-key", "connection"]);
    away(&mut first);
    let (mut producer, address) = listening(first);
    let sockets: Vec<TcpStream> =
        (0..4).map(|n| send(&address, &lines(n * 1000, n * 1000 + 500))).collect();
    let keys: Vec<String> = sockets
        .iter()
        .map(|socket| format!("{{{address} -> {}}}", socket.local_addr().expect("an address")))
        .collect();
    // Each closes, and is received to its end.
    for socket in &sockets {
        socket.shutdown(Shutdown::Write).expect("a close");
    }
    wait_for("the connections to be received", || {
        (producer.stderr().matches("connection closed by the peer").count() == 4).then_some(())
    });
    // One that comes later is committed later.
    let _marker = send(&address, &lines(9000, 9001));
    thread::sleep(Duration::from_millis(200));
    producer.kill();

    let (producer, address) = listening(command(&servers, spool.path(), &[]));
    producer.wait_for_log("waiting=");
    let _after = send(&address, &lines(5000, 5010));
    producer.stop().succeeded();
    let stored = stored(&servers);
    for (n, key) in keys.iter().enumerate() {
        let found = stored.get(key).map(|records| without_repeats(records));
        assert_eq!(found, Some(lines(n * 1000, n * 1000 + 500)), "{key}");
    }
}

#[test]
fn p7_p8_a_producer_that_is_killed_again_and_again_loses_nothing_that_it_has_spooled() {
    let given = std::env::var("TRAMLINE_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = given.unwrap_or_else(rand::random);
    println!("TRAMLINE_SEED={seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let servers = Servers::with_stream(STREAM, 2);
    let spool = tempfile::tempdir().expect("a directory");
    let mut sent: BTreeMap<String, usize> = BTreeMap::new();
    for round in 0..8 {
        let more = ["--partition-key", "connection", "--batch-delay", "20ms"];
        let (mut producer, address) = listening(command(&servers, spool.path(), &more));
        let mut sockets: Vec<TcpStream> =
            (0..3).map(|_| TcpStream::connect(&address).expect("a connection")).collect();
        let counts: Vec<usize> = (0..3).map(|_| rng.random_range(50..3000)).collect();
        for (n, socket) in sockets.iter_mut().enumerate() {
            let from = (round * 3 + n) * 10_000;
            for line in lines(from, from + counts[n]) {
                socket.write_all(&[line.as_bytes(), &[4]].concat()).expect("a write");
            }
            let peer = socket.local_addr().expect("an address");
            sent.insert(format!("{{{address} -> {peer}}}"), from);
        }
        thread::sleep(Duration::from_millis(rng.random_range(0..150)));
        producer.kill();
    }
    let (producer, _) = listening(command(&servers, spool.path(), &[]));
    producer.stop().succeeded();

    let mut found = 0;
    for (key, records) in stored(&servers) {
        let from = sent[&key];
        let once = without_repeats(&records);
        // What was not in the spool is lost with the process, and nothing before it.
        assert_eq!(once, lines(from, from + once.len()), "{key}");
        found += once.len();
    }
    assert!(found > 1000, "{found} messages survived");
}

/// Lines so long that few of them fill a disk.
fn long_lines(count: usize) -> Vec<String> {
    (0..count).map(|n| format!("{n},TSCH,{}", "x".repeat(2000))).collect()
}

/// A producer none of whose files may become longer than 32 MiB: 65536 blocks of 512 bytes.
fn with_a_small_disk(url: &str, servers: &Servers, spool: &Path) -> Command {
    let mut limited = Command::new("sh");
    limited
        .args(["-c", "trap '' XFSZ; ulimit -f 65536; exec \"$0\" \"$@\""])
        .arg(env!("CARGO_BIN_EXE_tramline"))
        .args(["produce", "--listen", "127.0.0.1:0", "--stream", STREAM])
        .args(["--partition-key", "connection", "--shard-rate", "1GiB", "--spool"])
        .arg(spool)
        .env_clear()
        .envs(servers.local.environment())
        .env("AWS_ENDPOINT_URL_KINESIS", url);
    limited
}

#[test]
fn p8_a_full_disk_stops_the_reading_and_loses_nothing_that_was_spooled() {
    let servers = Servers::with_stream(STREAM, 1);
    let spool = tempfile::tempdir().expect("a directory");
    let limited = with_a_small_disk("http://127.0.0.1:1", &servers, spool.path());
    let (mut producer, address) = listening(limited);
    let mut socket = TcpStream::connect(&address).expect("a connection");
    let key = format!("{{{address} -> {}}}", socket.local_addr().expect("an address"));
    socket.set_write_timeout(Some(Duration::from_secs(1))).expect("an option");
    let sent = long_lines(40_000);
    let stuck =
        sent.iter().find_map(|line| socket.write_all(&[line.as_bytes(), &[4]].concat()).err());
    assert!(stuck.is_some(), "the producer stops reading");
    producer.wait_for_log("no connection is read until it works again");
    producer.kill();

    // The disk has room again.
    let (producer, _) = listening(command(&servers, spool.path(), &[]));
    producer.stop().succeeded();
    let found = without_repeats(&stored(&servers)[&key]);
    // All of it but what was in memory.
    assert!(found.len() > 1000, "{}", found.len());
    assert!(found == sent[..found.len()], "out of order");
}

#[test]
fn p9_a_damaged_spool_is_told_and_the_producer_goes_on_with_a_new_one() {
    let servers = Servers::with_stream(STREAM, 1);
    let spool = tempfile::tempdir().expect("a directory");
    std::fs::write(spool.path().join("spool.redb"), [0xAB; 50_000]).expect("a write");
    let (producer, address) = listening(command(&servers, spool.path(), &[]));
    producer.wait_for_log("is damaged");
    let _socket = send(&address, &lines(0, 10));
    producer.stop().succeeded();
    let stored: Vec<Vec<String>> =
        stored(&servers).values().map(|records| without_repeats(records)).collect();
    assert_eq!(stored, [lines(0, 10)]);
}

#[test]
fn a_stop_while_aws_is_away_leaves_the_rest_to_the_next_start() {
    let servers = Servers::with_stream(STREAM, 1);
    let spool = tempfile::tempdir().expect("a directory");
    let mut first = command(&servers, spool.path(), &["--shutdown-limit", "300ms"]);
    away(&mut first);
    let (producer, address) = listening(first);
    let mut socket = send(&address, &lines(0, 10));
    socket.shutdown(Shutdown::Write).expect("a close");
    producer.wait_for_log("the connection's messages wait");
    let finished = producer.stop().succeeded();
    assert!(finished.stderr.contains("goes first when the producer starts again"));
    socket.flush().expect("a flush");

    let (producer, _) = listening(command(&servers, spool.path(), &[]));
    producer.stop().succeeded();
    let stored: Vec<Vec<String>> =
        stored(&servers).values().map(|records| without_repeats(records)).collect();
    assert_eq!(stored, [lines(0, 10)]);
}

#[test]
fn p8_what_comes_while_the_credentials_are_expired_is_kept_and_put_when_they_are_renewed() {
    let servers = Servers::with_stream(STREAM, 1);
    let proxy = Proxy::start(&servers);
    let expired = proxy.add(Rule::on("*", Fault::Refuse("ExpiredTokenException")));
    let spool = tempfile::tempdir().expect("a directory");
    let mut producer = command(&servers, spool.path(), &[]);
    producer.env("AWS_ENDPOINT_URL_KINESIS", proxy.url());
    let (producer, address) = listening(producer);
    producer.wait_for_log("has no usable AWS credentials");
    let socket = send(&address, &lines(0, 10));
    socket.shutdown(Shutdown::Write).expect("a close");
    producer.wait_for_log("the connection's messages wait");
    expired.lift();
    producer.stop().succeeded();
    let stored: Vec<Vec<String>> =
        stored(&servers).values().map(|records| without_repeats(records)).collect();
    assert_eq!(stored, [lines(0, 10)]);
}

#[test]
fn a_spool_that_is_in_use_is_refused() {
    let servers = Servers::with_stream(STREAM, 1);
    let spool = tempfile::tempdir().expect("a directory");
    let (producer, _) = listening(command(&servers, spool.path(), &[]));
    let second = run(command(&servers, spool.path(), &[]));
    assert_eq!(second.status.code(), Some(1));
    assert!(second.stderr.contains("is in use by another process"), "{}", second.stderr);
    producer.stop().succeeded();
}

#[test]
fn the_schemas_are_printed() {
    let types = run(tramline(&["schema"])).succeeded().stdout;
    assert_eq!(types, ["com.mbta.ocs.raw_message", "com.mbta.ocs.raw_message_batch"]);
    for event_type in types {
        let schema = run(tramline(&["schema", &event_type])).succeeded().stdout.join("\n");
        let schema: serde_json::Value = serde_json::from_str(&schema).expect("JSON");
        assert_eq!(schema["$id"], format!("{event_type}.json"));
    }
    assert_eq!(run(tramline(&["schema", "other"])).status.code(), Some(2));
}
