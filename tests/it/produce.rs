use std::{
    collections::HashMap,
    io::Write as _,
    net::{Shutdown, TcpListener, TcpStream},
    process::Command,
    thread,
    time::Duration,
};

use crate::support::{Running, Servers, lines, listening, raws, run, tramline, wait_for};

const STREAM: &str = "ctd-ocs-raw-messages";

fn start(servers: &Servers, more: &[&str]) -> (Running, String) {
    let args = ["produce", "--listen", "127.0.0.1:0", "--stream", STREAM, "--spool", "none"];
    let args = [&args, more].concat();
    listening(servers.tramline(&args))
}

/// The binary with a Kinesis at a port where nothing may listen.
fn at_port(port: u16, args: &[&str]) -> Command {
    let mut command = tramline(&[&["produce", "--listen", "127.0.0.1:0"], args].concat());
    command
        .args(["--stream", STREAM])
        .env("AWS_ENDPOINT_URL_KINESIS", format!("http://127.0.0.1:{port}"))
        .env("AWS_ACCESS_KEY_ID", "x")
        .env("AWS_SECRET_ACCESS_KEY", "x")
        .env("AWS_REGION", "us-east-1");
    command
}

/// Everything in the stream, by partition key, in order.
fn stored(servers: &Servers) -> HashMap<String, Vec<String>> {
    let args = [
        "consume",
        "--stream",
        STREAM,
        "--app",
        "check",
        "--exit-when-idle",
        "1s",
        "--retrieval",
        "polling",
    ];
    let stdout = run(servers.tramline(&args)).succeeded().stdout;
    let mut by_key: HashMap<String, Vec<String>> = HashMap::new();
    for line in stdout {
        let value: serde_json::Value = serde_json::from_str(&line).expect("JSON");
        let key = value["partition_key"].as_str().expect("a key").to_owned();
        by_key.entry(key).or_default().extend(raws(&[line]));
    }
    by_key
}

#[test]
fn p7_messages_keep_their_order_however_the_network_cuts_them() {
    let servers = Servers::with_stream(STREAM, 2);
    let (producer, address) = start(&servers, &[]);
    let senders: Vec<_> = (0..8)
        .map(|n| {
            let address = address.clone();
            thread::spawn(move || {
                let mut socket = TcpStream::connect(address).expect("a connection");
                socket.set_nodelay(true).expect("an option");
                let mut bytes = Vec::new();
                for line in lines(n * 1000, n * 1000 + 200) {
                    bytes.extend(line.bytes().chain([4]));
                    bytes.extend(b"HEARTBEAT\x04\x04");
                }
                // Pieces of every length, that end in the middle of messages.
                let mut rest = bytes.as_slice();
                for length in (1..).map(|step| 1 + (step * 37 + n) % 113) {
                    let (piece, after) = rest.split_at(length.min(rest.len()));
                    socket.write_all(piece).expect("a write");
                    rest = after;
                    if rest.is_empty() {
                        break;
                    }
                }
                socket.shutdown(Shutdown::Write).expect("a close");
            })
        })
        .collect();
    for sender in senders {
        sender.join().expect("a sender");
    }
    wait_for("all connections to be done", || {
        (producer.stderr().matches("connection done").count() == 8).then_some(())
    });
    let finished = producer.stop().succeeded();
    assert!(finished.stdout.is_empty(), "stdout carries nothing");

    let mut stored: Vec<Vec<String>> = stored(&servers).into_values().collect();
    stored
        .sort_by_key(|messages| messages[0].split(',').next().and_then(|n| n.parse::<u32>().ok()));
    let sent: Vec<Vec<String>> = (0..8).map(|n| lines(n * 1000, n * 1000 + 200)).collect();
    assert_eq!(stored, sent);
}

#[test]
fn p9_oversized_unfinished_and_garbage_input_harm_nobody_and_are_told() {
    let servers = Servers::with_stream(STREAM, 1);
    let (producer, address) =
        start(&servers, &["--max-message-size", "1KiB", "--partition-key", "connection"]);
    let mut socket = TcpStream::connect(&address).expect("a connection");
    let key = format!("{{{address} -> {}}}", socket.local_addr().expect("an address"));
    socket.write_all(b"1,DIAG,12:00:00,before\x04").expect("a write");
    socket.write_all(&[b'x'; 3000]).expect("a write");
    socket
        .write_all(b"\x042,DIAG,12:00:00,\xff\xfe\x043,DIAG,12:00:00,after\x04no end")
        .expect("a write");
    socket.shutdown(Shutdown::Write).expect("a close");
    producer.wait_for_log("connection done");
    let finished = producer.stop().succeeded();

    let letters: Vec<serde_json::Value> = finished
        .stderr
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .map(|line| line["dead_letter"].clone())
        .collect();
    assert_eq!(letters.len(), 2, "{}", finished.stderr);
    assert_eq!(letters[0]["reason"], "longer than the message limit");
    assert_eq!(letters[0]["length_bytes"], 3000);
    assert_eq!(letters[0]["connection"], key);
    assert_eq!(letters[1]["reason"], "the connection closed in the middle of a message");
    assert_eq!(letters[1]["data_base64"], "bm8gZW5k");

    let stored = stored(&servers);
    assert_eq!(
        stored[&key],
        ["1,DIAG,12:00:00,before", "2,DIAG,12:00:00,\u{FFFD}\u{FFFD}", "3,DIAG,12:00:00,after"]
    );
}

#[test]
fn the_environment_of_the_rfc_works() {
    let servers = Servers::with_stream(STREAM, 1);
    let mut command = servers.tramline(&["produce", "--spool", "none"]);
    command.env("LISTEN_PORT", "0").env("KINESIS_STREAM", STREAM);
    let (producer, address) = listening(command);
    assert!(address.starts_with("0.0.0.0:"), "{address}");
    producer.stop().succeeded();
}

#[test]
fn a_silent_connection_is_closed() {
    use std::io::Read as _;

    let servers = Servers::with_stream(STREAM, 1);
    let (producer, address) = start(&servers, &["--stale-after", "300ms"]);
    let mut socket = TcpStream::connect(&address).expect("a connection");
    socket.write_all(b"HEARTBEAT\x04").expect("a write");
    // With RST, so the read fails or ends.
    assert!(!matches!(socket.read(&mut [0]), Ok(1..)));
    producer.wait_for_log("the peer is taken for gone");
    producer.stop().succeeded();
}

#[test]
fn p7_what_arrives_while_aws_is_away_is_put_in_order_when_it_is_back() {
    // A port that is closed for now.
    let port =
        TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address").port();
    let command = at_port(port, &["--spool", "none"]);
    let (producer, address) = listening(command);
    let mut socket = TcpStream::connect(&address).expect("a connection");
    for line in lines(0, 500) {
        socket.write_all(&[line.as_bytes(), &[4]].concat()).expect("a write");
    }
    socket.shutdown(Shutdown::Write).expect("a close");
    producer.wait_for_log("the connection's messages wait");

    let servers = Servers::with_stream(STREAM, 1);
    let kinesis = servers.local.environment()[0].1.trim_start_matches("http://").to_owned();
    let proxy = TcpListener::bind(("127.0.0.1", port)).expect("the port is free again");
    thread::spawn(move || {
        while let Ok((inner, _)) = proxy.accept() {
            let outer = TcpStream::connect(&kinesis).expect("the embedded server");
            for (mut from, mut to) in [
                (inner.try_clone().expect("a socket"), outer.try_clone().expect("a socket")),
                (outer, inner),
            ] {
                thread::spawn(move || std::io::copy(&mut from, &mut to));
            }
        }
    });
    producer.wait_for_log("Kinesis takes records again");
    producer.wait_for_log("connection done");
    producer.stop().succeeded();
    let stored: Vec<Vec<String>> = stored(&servers).into_values().collect();
    assert_eq!(stored, [lines(0, 500)]);
}

#[test]
fn p8_what_has_arrived_when_the_producer_is_stopped_is_put() {
    let servers = Servers::with_stream(STREAM, 1);
    // It would wait for more, and does not when it stops.
    let (producer, address) =
        start(&servers, &["--batch-delay", "10m", "--batch-messages", "100000"]);
    let mut socket = TcpStream::connect(&address).expect("a connection");
    let bytes: Vec<u8> = lines(0, 3000)
        .iter()
        .flat_map(|line| line.bytes().chain([4]).collect::<Vec<u8>>())
        .collect();
    socket.write_all(&bytes).expect("a write");
    socket.shutdown(Shutdown::Write).expect("a close");
    producer.wait_for_log("connection accepted");
    producer.stop().succeeded();
    let stored: Vec<Vec<String>> = stored(&servers).into_values().collect();
    assert_eq!(stored, [lines(0, 3000)]);
}

#[test]
fn a_stop_while_aws_is_away_says_what_is_lost_and_fails() {
    let command = at_port(1, &["--spool", "none", "--shutdown-limit", "300ms"]);
    let (producer, address) = listening(command);
    let mut socket = TcpStream::connect(&address).expect("a connection");
    socket.write_all(b"1,DIAG,12:00:00,a\x042,DIAG,12:00:00,b\x04").expect("a write");
    producer.wait_for_log("the connection's messages wait");
    let finished = producer.stop();
    assert_eq!(finished.status.code(), Some(1));
    assert!(
        finished.stderr.contains(
            "2 messages, and whatever the sockets still held, were received but not stored"
        ),
        "{}",
        finished.stderr
    );
}

#[test]
fn p8_a_full_spool_pushes_back_to_the_sender() {
    let more = ["--spool", "none", "--spool-limit", "1MiB", "--shutdown-limit", "300ms"];
    let command = at_port(1, &more);
    let (_producer, address) = listening(command);
    let mut socket = TcpStream::connect(&address).expect("a connection");
    socket.set_write_timeout(Some(Duration::from_secs(2))).expect("an option");
    let line = [&[b'x'; 1000][..], &[4]].concat();
    // Far more than the buffers of both ends and the spool hold.
    let blocked = (0..64 * 1024).find_map(|_| socket.write_all(&line).err());
    let blocked = blocked.expect("the producer stops reading");
    assert!(
        matches!(blocked.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut),
        "{blocked}"
    );
}
