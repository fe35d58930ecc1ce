//! `tramline replay`: logs and streams into a TCP port.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread::{self, JoinHandle},
    time::Duration,
};

use flate2::{Compression, write::GzEncoder};

use crate::support::{Finished, Running, Servers, lines, run, tramline, wait_for};

const STREAM: &str = "ctd-ocs-raw-messages";

/// A receiver of OCS messages that reads one connection to its end.
struct Receiver {
    pub to: String,
    messages: JoinHandle<Vec<String>>,
}

impl Receiver {
    fn start() -> Self {
        let (listener, to) = listen();
        let messages = thread::spawn(move || {
            let (mut socket, _) = listener.accept().expect("a connection");
            let mut bytes = Vec::new();
            socket.read_to_end(&mut bytes).expect("everything");
            let bytes = bytes.strip_suffix(b"\x04").expect("a whole message at the end").to_vec();
            bytes
                .split(|byte| *byte == 4)
                .map(|frame| String::from_utf8_lossy(frame).into_owned())
                .collect()
        });
        Self { to, messages }
    }

    fn messages(self) -> Vec<String> {
        self.messages.join().expect("a receiver")
    }
}

fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let to = listener.local_addr().expect("an address").to_string();
    (listener, to)
}

fn event(raw: &str, time: &str) -> String {
    crate::support::event(raw).replace("2025-07-02T15:00:00.000000Z", time)
}

/// A file in a directory of its own.
fn file(dir: &Path, content: impl AsRef<[u8]>) -> PathBuf {
    let path = dir.join("log");
    std::fs::write(&path, content).expect("a file");
    path
}

fn replay(from: &Path, to: &str, more: &[&str]) -> Command {
    let from = from.to_str().expect("a name");
    tramline(&[&["replay", from, "--to", to], more].concat())
}

fn sent(from: &Path, more: &[&str]) -> (Vec<String>, Finished) {
    let receiver = Receiver::start();
    let finished = run(replay(from, &receiver.to, more));
    (receiver.messages(), finished)
}

#[test]
fn every_format_and_gzip_give_the_same_messages_in_the_same_order() {
    let dir = tempfile::tempdir().expect("a directory");
    let raws = lines(1, 2000);
    let text = |line: fn(&String) -> String| raws.iter().map(line).collect::<String>();
    let archive = text(|raw| format!("07/02/25,11:00:00,{raw}\n"));
    let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
    gzip.write_all(archive.as_bytes()).expect("compressed");
    for content in [
        text(|raw| format!("{raw}\n")).into_bytes(),
        text(|raw| format!("{}\n", event(raw, "2025-07-02T15:00:00Z"))).into_bytes(),
        text(|raw| {
            format!("{{\"shard\":\"s\",\"event\":{}}}\n", event(raw, "2025-07-02T15:00:00Z"))
        })
        .into_bytes(),
        archive.into_bytes(),
        gzip.finish().expect("compressed"),
    ] {
        let (messages, finished) = sent(&file(dir.path(), content), &["--speed", "max"]);
        finished.succeeded();
        assert_eq!(messages, raws);
    }
}

#[test]
fn standard_input_is_replayed_as_it_comes() {
    let (listener, to) = listen();
    let mut command = tramline(&["replay", "-", "--to", &to]);
    let mut child = command.stdin(Stdio::piped()).spawn().expect("the binary starts");
    let (mut socket, _) = listener.accept().expect("a connection");
    let mut stdin = child.stdin.take().expect("piped");
    for n in 0..3 {
        let raw = format!("{n},DIAG,12:00:00,x");
        writeln!(stdin, "{raw}").expect("a line");
        // Before there is another one.
        let mut frame = vec![0; raw.len() + 1];
        socket.read_exact(&mut frame).expect("a message");
        assert_eq!(frame, format!("{raw}\x04").into_bytes());
    }
    drop(stdin);
    assert!(child.wait().expect("an exit").success());
}

#[test]
fn the_pace_is_that_of_the_log_and_the_speed_divides_it() {
    let dir = tempfile::tempdir().expect("a directory");
    // The second message is due in an hour, or at this speed in 0.4 s.
    let log = file(dir.path(), "1,DIAG,12:00:00,x\n2,DIAG,13:00:00,x\n");
    let (listener, to) = listen();
    let running = Running::start(replay(&log, &to, &[]));
    let (mut socket, _) = listener.accept().expect("a connection");
    let mut first = [0; 18];
    socket.read_exact(&mut first).expect("the first message");
    running.wait_for_log("line 2 is due in 35");
    let finished = running.stop().succeeded();
    assert!(finished.stderr.contains("--from-line 2 goes on"), "{}", finished.stderr);
    let mut rest = Vec::new();
    socket.read_to_end(&mut rest).expect("the end");
    assert_eq!((first[17], rest.len()), (4, 0));

    let (messages, finished) = sent(&log, &["--speed", "9000"]);
    finished.succeeded();
    assert_eq!(messages, ["1,DIAG,12:00:00,x", "2,DIAG,13:00:00,x"]);
}

#[test]
fn p9_bad_lines_are_told_and_left_out_and_the_exit_code_says_so() {
    let dir = tempfile::tempdir().expect("a directory");
    let log = file(dir.path(), "1,DIAG,12:00:00,x\nnonsense\n\n3,DIAG,12:00:00,x\n{\n");
    let (messages, finished) = sent(&log, &["--speed", "max"]);
    assert_eq!(messages, ["1,DIAG,12:00:00,x", "3,DIAG,12:00:00,x"]);
    assert_eq!(finished.status.code(), Some(1));
    for told in ["line 2 is left out", "line 5 is left out", "2 lines could not be read (2, 5)"] {
        assert!(finished.stderr.contains(told), "{told}: {}", finished.stderr);
    }
}

/// Messages of a connection that is closed after `count` of them.
fn first_messages(listener: &TcpListener, count: usize) -> Vec<String> {
    let (mut socket, _): (TcpStream, _) = listener.accept().expect("a connection");
    let mut bytes = Vec::new();
    let mut buffer = [0; 64];
    while bytes.iter().filter(|byte| **byte == 4).count() < count {
        let length = socket.read(&mut buffer).expect("messages");
        bytes.extend_from_slice(&buffer[..length]);
    }
    String::from_utf8_lossy(&bytes).split_terminator('\x04').map(str::to_owned).collect()
}

#[test]
fn p1_a_replay_whose_receiver_goes_is_resumed_at_the_line_that_it_names() {
    let dir = tempfile::tempdir().expect("a directory");
    // Then nothing for an hour, in which the receiver goes.
    let log = "1,DIAG,12:00:00,x\n2,DIAG,12:00:00,x\n3,DIAG,13:00:00,x\n4,DIAG,13:00:00,x\n";
    let log = file(dir.path(), log);
    let (listener, to) = listen();
    let running = Running::start(replay(&log, &to, &[]));
    assert_eq!(first_messages(&listener, 2), ["1,DIAG,12:00:00,x", "2,DIAG,12:00:00,x"]);
    let finished = running.finish();
    assert_eq!(finished.status.code(), Some(1));
    assert!(
        finished.stderr.contains("ended after 2 messages")
            && finished.stderr.contains("--from-line 3 goes on"),
        "{}",
        finished.stderr
    );
    let (messages, finished) = sent(&log, &["--from-line", "3"]);
    finished.succeeded();
    assert_eq!(messages, ["3,DIAG,13:00:00,x", "4,DIAG,13:00:00,x"]);
}

#[test]
fn what_cannot_be_replayed_says_why() {
    let dir = tempfile::tempdir().expect("a directory");
    let (listener, to) = listen();
    let mut tar = vec![0; 1024];
    tar[257..262].copy_from_slice(b"ustar");
    for (log, told) in [
        (dir.path().join("none"), "cannot be opened"),
        (dir.path().to_owned(), "cannot be opened"),
        (file(dir.path(), tar), "tar file: unpack it first"),
    ] {
        let finished = run(replay(&log, &to, &[]));
        assert_eq!(finished.status.code(), Some(1));
        assert!(finished.stderr.contains(told), "{}", finished.stderr);
    }
    drop(listener);
    let log = file(dir.path(), "1,DIAG,12:00:00,x\n");
    let finished = run(replay(&log, &to, &[]));
    assert!(finished.stderr.contains("nothing was sent"), "{}", finished.stderr);
    assert_eq!(run(replay(&log, &to, &["--speed", "-1"])).status.code(), Some(2));
}

#[test]
fn p2_a_stream_is_replayed_in_the_order_of_each_shard_up_to_a_time() {
    let servers = Servers::with_stream(STREAM, 2);
    for n in 0..200 {
        servers.put_lines(STREAM, &format!("key-{}", n % 8), &lines(n, n + 1));
    }
    servers.put(STREAM, "key-0", "no event");
    // Arrival times are in whole seconds here.
    let until = (jiff::Timestamp::now() + Duration::from_secs(2)).to_string();
    let receiver = Receiver::start();
    let stream = format!("kinesis://{STREAM}");
    let args = ["replay", &stream, "--to", &receiver.to, "--speed", "max", "--until", &until];
    let finished = run(servers.tramline(&args));
    assert_eq!(finished.status.code(), Some(1), "{}", finished.stderr);
    assert!(
        finished.stderr.contains("1 parts of records could not be read"),
        "{}",
        finished.stderr
    );
    let messages = receiver.messages();
    for key in 0..8 {
        let of_key = |n: &usize| n % 8 == key;
        let sent: Vec<usize> = messages
            .iter()
            .map(|raw| raw.split(',').next().expect("a number").parse().expect("a number"))
            .filter(of_key)
            .collect();
        assert_eq!(sent, (0..200).filter(of_key).collect::<Vec<usize>>());
    }
    assert_eq!(messages.len(), 200);
}

#[test]
fn a_stream_whose_receiver_goes_says_where_to_go_on() {
    let servers = Servers::with_stream(STREAM, 1);
    servers.put_lines(STREAM, "key", &lines(0, 3));
    let (listener, to) = listen();
    let stream = format!("kinesis://{STREAM}");
    let running = Running::start(servers.tramline(&["replay", &stream, "--to", &to]));
    assert_eq!(first_messages(&listener, 3), lines(0, 3));
    wait_for("the end", || {
        servers.put_lines(STREAM, "key", &lines(3, 4));
        running.stderr().contains("ended after 3 messages").then_some(())
    });
    let finished = running.finish();
    assert_eq!(finished.status.code(), Some(1));
    assert!(finished.stderr.contains("--start 20"), "{}", finished.stderr);
}
