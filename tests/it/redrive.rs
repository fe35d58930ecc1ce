use std::{
    collections::{BTreeMap, HashSet},
    io::{Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, MutexGuard},
    thread,
};

use aws_sdk_kinesis::types::ShardIteratorType;
use base64::{Engine as _, prelude::BASE64_STANDARD};
use rand::{Rng as _, SeedableRng as _, seq::SliceRandom as _};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use crate::support::{Finished, Running, Servers, event, raws, run, wait_for};

const STREAM: &str = "ctd-ocs-raw-messages";

/// A letter as a worker writes it.
fn letter(kind: &str, sequence_number: usize, key: &str, data: &[u8]) -> Value {
    json!({"dead_letter": {
        "version": 1, "kind": kind, "reason": "no such trip", "stream": STREAM,
        "shard": "shardId-000000000000", "sequence_number": sequence_number.to_string(),
        "sub_sequence_number": 0, "partition_key": key, "attempts": 5,
        "given_up_at": "2025-07-02T15:00:10Z", "application": "rtr", "worker": "w1",
        "data_base64": BASE64_STANDARD.encode(data),
    }})
}

/// The letters of messages 1 to `count`, over `keys` keys.
fn letters(count: usize, keys: usize) -> Vec<Value> {
    (1..=count)
        .map(|n| letter("handler-failed", n, &key(n, keys), event(&raw(n)).as_bytes()))
        .collect()
}

fn raw(n: usize) -> String {
    format!("{n},DIAG,12:00:00,line {n}")
}

fn key(n: usize, keys: usize) -> String {
    format!("key-{}", n % keys)
}

fn lines(letters: &[Value]) -> String {
    letters.iter().map(|letter| format!("{letter}\n")).collect()
}

fn file_with(dir: &Path, letters: &[Value]) -> PathBuf {
    let path = dir.join("letters.jsonl");
    std::fs::write(&path, lines(letters)).expect("a file");
    path
}

fn redrive(servers: &Servers, from: &str, more: &[&str]) -> Command {
    let args = ["redrive", "--from", from, "--to", STREAM, "--settle", "300ms"];
    servers.tramline(&[&args, more].concat())
}

fn url(path: &Path) -> String {
    format!("file://{}", path.display())
}

/// The data of the stream's records, by key, in order.
fn stored(servers: &Servers) -> BTreeMap<String, Vec<String>> {
    let kinesis = &servers.kinesis;
    let mut by_key: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let listed = servers.wait(kinesis.list_shards().stream_name(STREAM).send()).expect("shards");
    for shard in listed.shards() {
        let open = kinesis
            .get_shard_iterator()
            .stream_name(STREAM)
            .shard_id(shard.shard_id())
            .shard_iterator_type(ShardIteratorType::TrimHorizon);
        let mut iterator = servers.wait(open.send()).expect("an iterator").shard_iterator;
        loop {
            let read = servers.wait(kinesis.get_records().set_shard_iterator(iterator).send());
            let read = read.expect("records");
            if read.records.is_empty() {
                break;
            }
            for record in read.records {
                let data = String::from_utf8(record.data.into_inner()).expect("UTF-8");
                by_key.entry(record.partition_key.expect("a key")).or_default().push(data);
            }
            iterator = read.next_shard_iterator;
        }
    }
    by_key
}

/// Messages 1 to `count` over `keys` keys, as they ought to be in the stream.
fn messages(count: usize, keys: usize) -> BTreeMap<String, Vec<String>> {
    let mut by_key: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for n in 1..=count {
        by_key.entry(key(n, keys)).or_default().push(event(&raw(n)));
    }
    by_key
}

fn failed(finished: &Finished, texts: &[&str]) {
    assert_eq!(finished.status.code(), Some(1), "{}", finished.stderr);
    for text in texts {
        assert!(finished.stderr.contains(text), "{text:?} is missing in\n{}", finished.stderr);
    }
}

#[test]
fn p9_letters_of_a_file_come_back_in_order_with_their_bytes_once() {
    let servers = Servers::with_stream(STREAM, 2);
    let dir = tempfile::tempdir().expect("a directory");
    let mut scattered = letters(60, 3);
    scattered.extend(letters(20, 3));
    scattered.shuffle(&mut ChaCha8Rng::seed_from_u64(7));
    let path = file_with(dir.path(), &scattered);

    let finished = run(redrive(&servers, &url(&path), &[])).succeeded();
    assert!(finished.stdout.is_empty(), "{:?}", finished.stdout);
    assert!(finished.stderr.contains("letters=60 put_before=0 repeats=20"), "{}", finished.stderr);
    assert_eq!(stored(&servers), messages(60, 3));
    // What a consumer gets of them.
    let args = ["consume", "--stream", STREAM, "--app", "check", "--exit-when-idle", "1s"];
    let seen: HashSet<String> =
        raws(&run(servers.tramline(&args)).succeeded().stdout).into_iter().collect();
    assert_eq!(seen, (1..=60).map(raw).collect());

    // Later letters are put, those before are not.
    file_with(dir.path(), &letters(70, 3));
    let finished = run(redrive(&servers, &url(&path), &[])).succeeded();
    assert!(finished.stderr.contains("letters=10 put_before=60"), "{}", finished.stderr);
    assert_eq!(stored(&servers), messages(70, 3));

    // Another stream knows nothing of that.
    servers.create_stream("other", 1);
    let args = ["redrive", "--from", &url(&path), "--to", "other"];
    let finished = run(servers.tramline(&args)).succeeded();
    assert!(finished.stderr.contains("letters=70 put_before=0"), "{}", finished.stderr);
}

#[test]
fn a_dry_run_says_what_would_be_put_and_puts_nothing() {
    let servers = Servers::with_stream(STREAM, 1);
    let dir = tempfile::tempdir().expect("a directory");
    let path = file_with(dir.path(), &letters(3, 1));
    let finished = run(redrive(&servers, &url(&path), &["--dry-run"])).succeeded();
    let first = format!(
        "{STREAM} shardId-000000000000 1/0: key key-0, event {}, {} bytes, handler-failed",
        raw(1),
        event(&raw(1)).len()
    );
    assert_eq!(finished.stdout[0], first);
    assert_eq!(finished.stdout.len(), 3);
    assert!(finished.stderr.contains("dry run"), "{}", finished.stderr);
    assert!(stored(&servers).is_empty());
    assert_eq!(std::fs::read_dir(dir.path()).expect("a directory").count(), 1, "no journal");
}

#[test]
fn letters_are_chosen_and_what_is_left_out_is_told() {
    let servers = Servers::with_stream(STREAM, 1);
    let dir = tempfile::tempdir().expect("a directory");
    let mut all = letters(4, 2);
    all[3]["dead_letter"]["given_up_at"] = "2025-07-02T16:00:00Z".into();
    all.push(letter("undecodable", 5, "key-0", b"\x01garbage"));
    let connection = json!({"dead_letter": {
        "version": 1, "kind": "unfinished", "reason": "closed", "connection": "{a -> b}",
        "received_at": "2025-07-02T15:00:00.000000Z", "length_bytes": 3, "attempts": 0,
        "given_up_at": "2025-07-02T15:00:00Z", "data_base64": "eHh4",
    }});
    all.push(connection);
    let path = file_with(dir.path(), &all);

    let dry = |more: &[&str]| {
        let finished = run(redrive(&servers, &url(&path), &[&["--dry-run"], more].concat()));
        let stdout = finished.succeeded().stdout;
        let numbers = stdout.iter().filter_map(|line| line.split(' ').nth(2)?.split('/').next());
        numbers.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(dry(&[]), ["1", "2", "3", "4"]);
    assert_eq!(dry(&["--key", "key-1"]), ["1", "3"]);
    assert_eq!(dry(&["--since", "2025-07-02T15:30:00Z"]), ["4"]);
    assert_eq!(dry(&["--until", "2025-07-02T11:30:00-04:00"]), ["1", "2", "3"]);
    assert_eq!(dry(&["--reason", "handler-failed"]), ["1", "2", "3", "4"]);
    assert_eq!(dry(&["--reason", "undecodable"]), ["5"]);

    let finished = run(redrive(&servers, &url(&path), &[])).succeeded();
    for text in ["1 letters are left out, for no consumer can read them", "over OCS connections"] {
        assert!(finished.stderr.contains(text), "{}", finished.stderr);
    }
    assert_eq!(stored(&servers), messages(4, 2));
    run(redrive(&servers, &url(&path), &["--reason", "undecodable"])).succeeded();
    assert_eq!(stored(&servers)["key-0"].last().map(String::as_str), Some("\x01garbage"));
}

#[test]
fn p9_corrupt_lines_are_told_by_their_number_and_the_rest_is_put() {
    let servers = Servers::with_stream(STREAM, 1);
    let dir = tempfile::tempdir().expect("a directory");
    let mut text: Vec<String> = letters(4, 1).iter().map(Value::to_string).collect();
    text[1].truncate(70);
    text.insert(2, r#"{"dead_letter":{"version":9}}"#.to_owned());
    text.push(String::new());
    text.push("\u{0}\u{1}".to_owned());
    let path = dir.path().join("letters.jsonl");
    std::fs::write(&path, text.join("\n")).expect("a file");

    let finished = run(redrive(&servers, &url(&path), &[]));
    failed(
        &finished,
        &[
            "line 2: not JSON from column 70 on: cut short or damaged",
            "line 3: a dead letter of version 9",
            "line 7: not JSON",
            "3 lines or letters could not be used (line 2; line 3; line 7)",
            "letters=3",
        ],
    );
    let mut expected = messages(4, 1);
    expected.get_mut("key-0").expect("a key").remove(1);
    assert_eq!(stored(&servers), expected);

    // Repaired, the line is put; the others are not put again.
    file_with(dir.path(), &letters(4, 1));
    run(redrive(&servers, &url(&path), &[])).succeeded();
    assert_eq!(stored(&servers)["key-0"].len(), 4);
}

#[test]
fn what_cannot_be_done_is_told_in_one_line() {
    let servers = Servers::with_stream(STREAM, 1);
    let dir = tempfile::tempdir().expect("a directory");
    let nowhere = url(&dir.path().join("none"));
    for (from, more, texts) in [
        (nowhere.as_str(), &[][..], &["none cannot be read: No such file"][..]),
        ("s3://nowhere/a", &[], &["s3://nowhere/a", "s3:ListBucket failed", "NoSuchBucket"]),
        ("kinesis://letters", &[], &["kinesis://letters has no place for the journal", "--state"]),
        (&format!("kinesis://{STREAM}"), &[], &["--from and --to are the same stream"]),
        ("kinesis://letters", &["--state", "/dev/null"], &["stream letters does not exist"]),
    ] {
        failed(&run(redrive(&servers, from, more)), texts);
    }
    let path = file_with(dir.path(), &letters(1, 1));
    let args = ["redrive", "--from", &url(&path), "--to", "nowhere"];
    failed(&run(servers.tramline(&args)), &["stream nowhere does not exist"]);
    for (args, text) in [
        (["--from", "letters.jsonl", "--to", STREAM], "kinesis://STREAM"),
        (["--from", "stderr", "--to", STREAM], "kinesis://STREAM"),
        (["--from", "file:///x", "--to", "127.0.0.1:8001"], "the name of a stream"),
        (["--since", "noon", "--to", STREAM], "such as 2025-07-02T06:00:00Z"),
    ] {
        let finished = run(servers.tramline(&[&["redrive"], &args[..]].concat()));
        assert_eq!(finished.status.code(), Some(2), "{}", finished.stderr);
        assert!(finished.stderr.contains(text), "{}", finished.stderr);
    }
}

#[test]
fn settings_come_from_the_environment_and_the_file_too() {
    let servers = Servers::with_stream(STREAM, 1);
    let dir = tempfile::tempdir().expect("a directory");
    let path = file_with(dir.path(), &letters(2, 2));
    let config = dir.path().join("tramline.toml");
    std::fs::write(&config, format!("[redrive]\nto = \"{STREAM}\"\ndry-run = true\n"))
        .expect("a file");
    let mut command = servers.tramline(&["redrive", "--config", config.to_str().expect("UTF-8")]);
    command.env("TRAMLINE_FROM", url(&path)).env("TRAMLINE_KEY", "key-1");
    assert_eq!(run(command).succeeded().stdout.len(), 1);
}

fn bucket(servers: &Servers) -> aws_sdk_s3::Client {
    let client = aws_sdk_s3::Client::new(&servers.local.sdk_config());
    servers.wait(client.create_bucket().bucket("letters").send()).expect("a bucket");
    client
}

fn put_object(servers: &Servers, client: &aws_sdk_s3::Client, key: &str, letters: &[Value]) {
    let put = client.put_object().bucket("letters").key(key);
    servers.wait(put.body(lines(letters).into_bytes().into()).send()).expect("an object");
}

#[test]
fn p9_letters_of_a_bucket_come_back_once_whatever_prefix_is_named() {
    let servers = Servers::with_stream(STREAM, 1);
    let client = bucket(&servers);
    let all = letters(30, 2);
    for (n, letters) in all.chunks(10).enumerate() {
        put_object(&servers, &client, &format!("green/rtr/s/{n}.jsonl"), letters);
    }
    put_object(&servers, &client, "red/rtr/s/0.jsonl", &letters(99, 9)[98..]);

    let put = |from: &str, texts: &[&str]| {
        let finished = run(redrive(&servers, from, &[])).succeeded();
        for text in texts {
            assert!(finished.stderr.contains(text), "{text}: {}", finished.stderr);
        }
    };
    put("s3://letters/green/rtr", &["letters=30 put_before=0"]);
    assert_eq!(stored(&servers), messages(30, 2));
    put("s3://letters/green/rtr/s", &["letters=0 put_before=30"]);
    put("s3://letters", &["letters=1 put_before=30"]);
    put("s3://letters/red", &["letters=0 put_before=1"]);
    put("s3://letters/green/rtr/s/0.jsonl", &["letters=0 put_before=10"]);
    put("s3://letters/gre", &["there is no object in s3://letters/gre"]);
    let listed = servers.wait(client.list_objects_v2().bucket("letters").send()).expect("a list");
    let mut journals: Vec<&str> = listed.contents().iter().filter_map(|o| o.key()).collect();
    journals.retain(|key| key.ends_with(".json"));
    assert_eq!(
        journals,
        [
            "green/rtr/redriven/000000000001.json",
            "green/rtr/redriven/000000000002.json",
            "redriven/000000000001.json",
            "redriven/000000000002.json",
        ]
    );
}

#[test]
fn p9_letters_of_a_stream_come_back_also_those_in_parts() {
    let servers = Servers::with_stream(STREAM, 1);
    servers.create_stream("letters", 3);
    let all = letters(30, 3);
    for of_key in 0..3 {
        let of_key = key(of_key, 3);
        let of_key: Vec<Value> = all
            .iter()
            .filter(|letter| letter["dead_letter"]["partition_key"] == of_key.as_str())
            .cloned()
            .collect();
        for some in of_key.chunks(4) {
            let key = some[0]["dead_letter"]["partition_key"].as_str().expect("a key");
            servers.put("letters", key, lines(some));
        }
    }
    let data = event(&"x".repeat(300_000));
    let (first, second) = data.as_bytes().split_at(400_000);
    for (n, piece) in [(1, first), (2, second)] {
        let mut part = letter("handler-failed", 31, "key-0", piece);
        part["dead_letter"]["part"] =
            json!({"number": n, "of": 2, "data_sha256": sha256(data.as_bytes())});
        servers.put("letters", "key-0", lines(&[part]));
    }
    let dir = tempfile::tempdir().expect("a directory");
    let state = dir.path().join("state");
    let state = ["--state", state.to_str().expect("UTF-8")];
    let mut expected = messages(30, 3);
    expected.get_mut("key-0").expect("a key").push(data);
    for text in ["letters=31 put_before=0", "letters=0 put_before=31"] {
        let finished = run(redrive(&servers, "kinesis://letters", &state)).succeeded();
        assert!(finished.stderr.contains(text), "{}", finished.stderr);
        assert!(stored(&servers) == expected);
    }
}

fn sha256(data: &[u8]) -> String {
    use sha2::Digest as _;
    sha2::Sha256::digest(data).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Between the binary and Kinesis.
struct Proxy {
    address: String,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    puts: usize,
    /// What happens to the put of this number.
    spoil: Option<(usize, Spoil)>,
    /// A put that arrives after the next read.
    late: Option<Vec<u8>>,
}

/// What happens to a put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spoil {
    /// It does not arrive, and the connection breaks.
    Request,
    /// It does not arrive, and there is never an answer.
    Hold,
    /// It arrives when the next redrive has looked for it once.
    Late,
    /// It arrives, and the connection breaks before the answer.
    Answer,
    /// It arrives, and there is never an answer.
    Wait,
}

impl Proxy {
    fn start(servers: &Servers) -> Self {
        let environment = servers.local.environment();
        let server = environment[0].1.trim_start_matches("http://").to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = format!("http://{}", listener.local_addr().expect("an address"));
        let state = Arc::<Mutex<State>>::default();
        let proxy = Self { address, state: state.clone() };
        thread::spawn(move || {
            for client in listener.incoming() {
                let Ok(client) = client else { return };
                let server = TcpStream::connect(&server).expect("the server");
                let state = state.clone();
                thread::spawn(move || carry(client, server, &state));
            }
        });
        proxy
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("a lock")
    }

    /// The put that comes after `more` others.
    fn spoil(&self, more: usize, spoil: Spoil) {
        let mut state = self.state();
        state.spoil = Some((state.puts + more, spoil));
    }

    fn wait_for_spoiled(&self) {
        wait_for("a spoiled put", || self.state().spoil.is_none().then_some(()));
    }

    fn redrive(&self, servers: &Servers, from: &str, more: &[&str]) -> Command {
        let mut command = redrive(servers, from, more);
        command.env("AWS_ENDPOINT_URL_KINESIS", &self.address);
        command
    }
}

/// Carries one request after the other.
fn carry(mut client: TcpStream, mut server: TcpStream, state: &Mutex<State>) {
    while let Some(request) = message(&mut client) {
        let is = |operation: &str| {
            let target = format!("Kinesis_20131202.{operation}");
            request.windows(target.len()).any(|bytes| bytes == target.as_bytes())
        };
        let mut spoil = None;
        if is("PutRecords") {
            let mut state = state.lock().expect("a lock");
            spoil = state.spoil.filter(|(number, _)| *number == state.puts).map(|(_, spoil)| spoil);
            state.puts += 1;
            state.late = (spoil == Some(Spoil::Late)).then(|| request.clone());
        }
        let answer = match spoil {
            Some(Spoil::Request | Spoil::Hold | Spoil::Late) => None,
            _ => server.write_all(&request).ok().and_then(|()| message(&mut server)),
        };
        if spoil.is_some() {
            state.lock().expect("a lock").spoil = None;
        }
        let carried = match (spoil, answer) {
            (None, Some(answer)) => client.write_all(&answer).is_ok(),
            (Some(Spoil::Wait | Spoil::Hold | Spoil::Late), _) => client.read(&mut [0]).is_err(),
            _ => false,
        };
        if !carried {
            break;
        }
        let late = if is("GetRecords") { state.lock().expect("a lock").late.take() } else { None };
        if let Some(late) = late {
            server.write_all(&late).expect("a late put");
            message(&mut server).expect("an answer to nobody");
        }
    }
    let _ = client.shutdown(Shutdown::Both);
}

/// An HTTP message with a length.
fn message(socket: &mut TcpStream) -> Option<Vec<u8>> {
    let mut message = Vec::new();
    let mut buffer = [0; 64 * 1024];
    loop {
        if let Some(end) = message.windows(4).position(|four| four == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&message[..end]).to_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
            let length: usize = length.map_or(0, |length| length.trim().parse().expect("a number"));
            if message.len() >= end + 4 + length {
                return Some(message);
            }
        }
        match socket.read(&mut buffer) {
            Ok(0) | Err(_) => return None,
            Ok(length) => message.extend_from_slice(&buffer[..length]),
        }
    }
}

#[test]
fn p9_killed_at_any_point_every_letter_is_put_once_and_in_order() {
    let seed = std::env::var("TRAMLINE_SEED").map_or_else(
        |_| rand::random(),
        |seed| seed.parse::<u64>().expect("TRAMLINE_SEED is a number"),
    );
    println!("TRAMLINE_SEED={seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let servers = Servers::with_stream(STREAM, 3);
    let proxy = Proxy::start(&servers);
    let dir = tempfile::tempdir().expect("a directory");
    let path = file_with(dir.path(), &letters(1200, 12));
    let mut at_the_kills = HashSet::new();
    for _ in 0..12 {
        // What becomes of the put that is on its way.
        let spoil = [Spoil::Request, Spoil::Hold, Spoil::Answer, Spoil::Wait];
        proxy.spoil(rng.random_range(0..8), spoil[rng.random_range(0..4)]);
        let mut running = Running::start(proxy.redrive(&servers, &url(&path), &[]));
        proxy.wait_for_spoiled();
        running.kill();
        at_the_kills.insert(stored(&servers).values().map(Vec::len).sum::<usize>());
    }
    println!("letters in the stream at the kills: {at_the_kills:?}");
    run(proxy.redrive(&servers, &url(&path), &[])).succeeded();
    assert_eq!(stored(&servers), messages(1200, 12));
}

#[test]
fn p9_killed_with_letters_of_a_bucket_every_letter_is_put_once_and_in_order() {
    let servers = Servers::with_stream(STREAM, 2);
    let client = bucket(&servers);
    put_object(&servers, &client, "green/0.jsonl", &letters(60, 6));
    let proxy = Proxy::start(&servers);
    for spoil in [Spoil::Wait, Spoil::Request] {
        proxy.spoil(3, spoil);
        let mut running = Running::start(proxy.redrive(&servers, "s3://letters/green", &[]));
        proxy.wait_for_spoiled();
        running.kill();
    }
    // Another machine: nothing but the bucket is left.
    let finished = run(redrive(&servers, "s3://letters/green", &[])).succeeded();
    assert!(finished.stderr.contains("that an earlier redrive was putting"), "{}", finished.stderr);
    assert_eq!(stored(&servers), messages(60, 6));
}

#[test]
fn p9_a_put_that_arrives_after_the_kill_and_a_first_look_is_not_repeated() {
    let servers = Servers::with_stream(STREAM, 1);
    let proxy = Proxy::start(&servers);
    let dir = tempfile::tempdir().expect("a directory");
    let path = file_with(dir.path(), &letters(4, 4));
    proxy.spoil(0, Spoil::Late);
    let mut running = Running::start(proxy.redrive(&servers, &url(&path), &[]));
    proxy.wait_for_spoiled();
    running.kill();
    // It is found, so nobody waits for this long.
    let settle = ["--settle", "1h"];
    let args = ["redrive", "--from", &url(&path), "--to", STREAM];
    let mut command = servers.tramline(&[&args[..], &settle].concat());
    command.env("AWS_ENDPOINT_URL_KINESIS", &proxy.address);
    let finished = run(command).succeeded();
    assert!(finished.stderr.contains("letters=0 put_before=4"), "{}", finished.stderr);
    assert_eq!(stored(&servers), messages(4, 4));
}

#[test]
fn p9_a_journal_of_two_sources_forgets_no_put_of_the_other() {
    let servers = Servers::with_stream(STREAM, 1);
    let proxy = Proxy::start(&servers);
    let dir = tempfile::tempdir().expect("a directory");
    let path = file_with(dir.path(), &letters(10, 1));
    let other = dir.path().join("other.jsonl");
    std::fs::write(&other, lines(&letters(20, 1)[10..])).expect("a file");
    let state = dir.path().join("state");
    let state = ["--state", state.to_str().expect("UTF-8")];
    proxy.spoil(3, Spoil::Wait);
    let mut running = Running::start(proxy.redrive(&servers, &url(&path), &state));
    proxy.wait_for_spoiled();
    running.kill();
    run(redrive(&servers, &url(&other), &state)).succeeded();
    let finished = run(redrive(&servers, &url(&path), &state)).succeeded();
    assert!(finished.stderr.contains("letters=6 put_before=4"), "{}", finished.stderr);
    let mut stored = stored(&servers).remove("key-0").expect("a key");
    stored.sort();
    let mut expected = messages(20, 1).remove("key-0").expect("a key");
    expected.sort();
    assert_eq!(stored, expected);
}

#[test]
fn p9_a_put_whose_answer_is_lost_is_looked_for_and_not_repeated() {
    for spoil in [Spoil::Answer, Spoil::Request] {
        let servers = Servers::with_stream(STREAM, 1);
        let proxy = Proxy::start(&servers);
        let dir = tempfile::tempdir().expect("a directory");
        let path = file_with(dir.path(), &letters(6, 2));
        proxy.spoil(1, spoil);
        let finished = run(proxy.redrive(&servers, &url(&path), &[])).succeeded();
        assert!(finished.stderr.contains("looking whether Kinesis has"), "{}", finished.stderr);
        assert_eq!(stored(&servers), messages(6, 2), "{spoil:?}");
    }
}

#[test]
fn p6_a_stop_ends_cleanly_and_the_next_run_goes_on_without_a_search() {
    let servers = Servers::with_stream(STREAM, 1);
    let proxy = Proxy::start(&servers);
    let dir = tempfile::tempdir().expect("a directory");
    let path = file_with(dir.path(), &letters(400, 1));
    let running = Running::start(proxy.redrive(&servers, &url(&path), &[]));
    wait_for("some puts", || (proxy.state().puts > 5).then_some(()));
    let finished = running.stop();
    failed(&finished, &["of 400 letters are put; run the same command again to go on"]);
    let count = stored(&servers).values().map(Vec::len).sum::<usize>();
    assert!((1..400).contains(&count), "{count}");
    let finished = run(redrive(&servers, &url(&path), &[])).succeeded();
    assert!(!finished.stderr.contains("looking for letters"), "{}", finished.stderr);
    assert_eq!(stored(&servers), messages(400, 1));
}

#[test]
fn a_letter_in_the_stream_it_came_from_is_not_taken_for_its_own_copy() {
    let servers = Servers::with_stream(STREAM, 1);
    let proxy = Proxy::start(&servers);
    // A record with the one event, which is also how it is put back.
    let sequence_number = servers.put(STREAM, "key-0", event(&raw(1)));
    let mut letters = letters(1, 1);
    letters[0]["dead_letter"]["sequence_number"] = sequence_number.into();
    let dir = tempfile::tempdir().expect("a directory");
    let path = file_with(dir.path(), &letters);
    proxy.spoil(0, Spoil::Request);
    run(proxy.redrive(&servers, &url(&path), &[])).succeeded();
    assert_eq!(stored(&servers)["key-0"].len(), 2);
}

#[test]
fn p9_a_bad_message_of_a_batch_comes_back_as_a_batch_of_its_own_with_its_id() {
    let servers = Servers::with_stream(STREAM, 1);
    let dir = tempfile::tempdir().expect("a directory");
    let letters = url(&dir.path().join("letters.jsonl"));
    let batch = |messages: &[Value]| {
        json!({
            "data": {"messages": messages}, "id": "b", "partitionkey": "k", "source": "test",
            "specversion": "1.0", "time": "2025-07-02T15:00:00.000000Z",
            "type": "com.mbta.ocs.raw_message_batch",
        })
    };
    let message = |n: usize, raw: Value| json!({"id": format!("id-{n}"), "raw": raw, "time": "t"});
    let good = |n| message(n, json!(raw(n)));
    let bad = |n| message(n, json!(n));
    let put = batch(&[good(1), bad(2), good(3), bad(4)]).to_string();
    servers.put(STREAM, "k", &put);

    let consume = ["consume", "--stream", STREAM, "--app", "rtr", "--exit-when-idle", "700ms"];
    let consume = [&consume[..], &["--dead-letters", &letters]].concat();
    let consumed = run(servers.tramline(&consume)).succeeded();
    assert_eq!(raws(&consumed.stdout), [raw(1), raw(3)]);

    for _ in 0..2 {
        run(redrive(&servers, &letters, &["--reason", "undecodable"])).succeeded();
        let stored = stored(&servers).remove("k").expect("records");
        assert_eq!(stored[0], put);
        let back: Vec<Value> =
            stored[1..].iter().map(|data| serde_json::from_str(data).expect("JSON")).collect();
        assert_eq!(back, [batch(&[bad(2)]), batch(&[bad(4)])], "in order, and once");
    }
}
