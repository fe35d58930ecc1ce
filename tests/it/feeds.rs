//! `tramline consume --output …`: readers that stall, vanish, return and talk nonsense.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead as _, BufReader, ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;
use tramline::ocs::{Frame, Framer};

use crate::support::{LIMIT, Running, Servers, has, lines, raws, run, wait_for};

const STREAM: &str = "ctd-ocs-raw-messages";

fn consume(servers: &Servers, output: &[&str]) -> Command {
    let common = ["consume", "--stream", STREAM, "--app", "rtr"];
    servers.tramline(&[&common, output].concat())
}

/// A folder for a socket, and the socket's path and place.
fn socket() -> (TempDir, PathBuf, String) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("ocs.sock");
    let place = format!("unix://{}", path.display());
    (folder, path, place)
}

/// The address that a worker with `--output tcp://127.0.0.1:0` listens on.
fn address(worker: &Running) -> String {
    wait_for("the address", || {
        let log = worker.stderr();
        let line = log.lines().find(|line| line.contains("listening for readers"))?.to_owned();
        let address = line.split("address=").nth(1)?.split_whitespace().next()?;
        Some(address.trim_matches('"').to_owned())
    })
}

/// A reader of a feed, whose lines are read one by one.
struct Reader<S> {
    lines: BufReader<S>,
    output: S,
}

fn unix(path: &Path) -> Reader<UnixStream> {
    let stream = wait_for("the socket", || UnixStream::connect(path).ok());
    stream.set_read_timeout(Some(LIMIT)).expect("an option");
    Reader { output: stream.try_clone().expect("a copy"), lines: BufReader::new(stream) }
}

fn tcp(address: &str) -> Reader<TcpStream> {
    let stream = TcpStream::connect(address).expect("a connection");
    stream.set_read_timeout(Some(LIMIT)).expect("an option");
    Reader { output: stream.try_clone().expect("a copy"), lines: BufReader::new(stream) }
}

impl<S: Read + Write> Reader<S> {
    /// Says the first line, and hears that of the feed.
    fn hello(mut self, name: &str) -> Self {
        self.say(&format!(r#"{{"tramline":1,"reader":"{name}"}}"#));
        let hello: Value = serde_json::from_str(&self.line().expect("a first line")).expect("JSON");
        assert_eq!(hello["tramline"], 1);
        self
    }

    fn say(&mut self, line: &str) {
        self.output.write_all(format!("{line}\n").as_bytes()).expect("taken");
    }

    fn acknowledge(&mut self, serial: usize) {
        self.say(&format!(r#"{{"ack":{serial}}}"#));
    }

    /// The next line; `None` at the end.
    fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        match self.lines.read_line(&mut line) {
            Ok(0) => None,
            Ok(_) => Some(line.trim_end().to_owned()),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => None,
            Err(error) => panic!("{error}"),
        }
    }

    /// The OCS lines of the next messages.
    fn take(&mut self, count: usize) -> Vec<String> {
        raws(&(0..count).map(|_| self.line().expect("a message")).collect::<Vec<_>>())
    }

    /// Reads to the end, and gives the error that the feed told last.
    fn told(mut self) -> String {
        let mut last = String::new();
        while let Some(line) = self.line() {
            last = line;
        }
        let told: Value = serde_json::from_str(&last).expect("JSON");
        told["error"].as_str().unwrap_or_else(|| panic!("no error: {last}")).to_owned()
    }
}

/// Puts records of ten lines each.
fn put(servers: &Servers, key: &str, from: usize, to: usize) {
    for n in (from..to).step_by(10) {
        servers.put_lines(STREAM, key, &lines(n, (n + 10).min(to)));
    }
}

/// What the application has not finished: what its next worker writes.
fn left(servers: &Servers, app: &str) -> Vec<String> {
    let args = ["consume", "--stream", STREAM, "--app", app, "--exit-when-idle", "1s"];
    raws(&run(servers.tramline(&args)).succeeded().stdout)
}

#[test]
fn p1_a_worker_that_is_killed_repeats_what_was_not_acknowledged_and_loses_nothing() {
    let (_folder, path, place) = socket();
    let servers = Servers::with_stream(STREAM, 1);
    put(&servers, "k", 0, 100);
    let output =
        ["--output", &place, "--acks", "--checkpoint-interval", "50ms", "--lease-duration", "2s"];
    let mut worker = Running::start(consume(&servers, &output));
    let mut reader = unix(&path).hello("green");
    let sent: Vec<String> = (0..100).map(|_| reader.line().expect("a message")).collect();
    assert_eq!(raws(&sent), lines(0, 100));
    reader.acknowledge(42);
    // Records of ten: of the fifth, not everything is finished.
    let fourth: Value = serde_json::from_str(&sent[39]).expect("JSON");
    let fourth = fourth["sequence_number"].as_str().expect("a number");
    wait_for("the checkpoint", || {
        let args = ["status", "--stream", STREAM, "--app", "rtr", "--json"];
        let status = run(servers.tramline(&args)).succeeded().stdout.concat();
        status.contains(fourth).then_some(())
    });
    worker.kill();
    assert!(path.exists(), "the socket is left over");
    let worker = Running::start(consume(&servers, &output));
    worker.wait_for_log("was left over");
    let mut reader = unix(&path).hello("green");
    assert_eq!(reader.take(60), lines(40, 100));
    reader.acknowledge(60);
    worker.stop().succeeded();
    assert!(!path.exists(), "the socket is removed");
    assert_eq!(left(&servers, "rtr"), [""; 0]);
}

#[test]
fn p1_a_reader_that_vanishes_and_returns_goes_on_after_its_last_acknowledgement() {
    let servers = Servers::with_stream(STREAM, 1);
    put(&servers, "k", 0, 100);
    let worker = Running::start(consume(&servers, &["--output", "tcp://127.0.0.1:0", "--acks"]));
    let address = address(&worker);
    let mut reader = tcp(&address).hello("green");
    // All of it: a connection that is closed before that is cut, and takes its last words with it.
    assert_eq!(reader.take(100), lines(0, 100));
    reader.acknowledge(30);
    drop(reader);
    let mut reader = tcp(&address).hello("green");
    assert_eq!(reader.take(70), lines(30, 100));
    // Another one of its name takes its place, and one of another name is refused.
    let mut second = tcp(&address).hello("green");
    assert_eq!(second.take(70), lines(30, 100));
    assert!(reader.told().contains("took its place"));
    assert!(tcp(&address).hello("red").told().contains("--readers"));
    second.acknowledge(70);
    worker.stop().succeeded();
    assert_eq!(left(&servers, "rtr"), [""; 0]);
}

#[test]
fn p1_a_reader_that_talks_nonsense_is_told_and_finishes_nothing() {
    let servers = Servers::with_stream(STREAM, 1);
    put(&servers, "k", 0, 20);
    let worker = Running::start(consume(&servers, &["--output", "tcp://127.0.0.1:0", "--acks"]));
    let address = address(&worker);
    for (nonsense, told) in [
        (r#"{"ack":21}"#, "beyond the last one sent, 20"),
        (r#"{"ack":-1}"#, "an answer must be"),
        ("\u{4}\u{0}GET / HTTP/1.1", "an answer must be"),
        (&"x".repeat(100_000), "longer than"),
    ] {
        let mut reader = tcp(&address).hello("green");
        assert_eq!(reader.take(20), lines(0, 20), "{nonsense:.20}");
        // It may be cut off while it still says it.
        let _ = reader.output.write_all(format!("{nonsense}\n").as_bytes());
        worker.wait_for_log(told);
    }
    for (hello, told) in [("hello", "the first line must be"), (r#"{"tramline":2}"#, "version 1")] {
        let mut reader = tcp(&address);
        reader.say(hello);
        assert!(reader.told().contains(told));
    }
    let mut reader = tcp(&address).hello("green");
    assert_eq!(reader.take(20), lines(0, 20));
    reader.acknowledge(20);
    reader.acknowledge(3);
    put(&servers, "k", 20, 30);
    assert_eq!(reader.take(10), lines(20, 30), "to say less again changes nothing");
    worker.stop().succeeded();
    assert_eq!(left(&servers, "rtr"), lines(20, 30));
}

#[test]
fn p1_each_reader_has_a_position_of_its_own_and_one_that_stalls_holds_up_no_other() {
    let (_folder, path, place) = socket();
    let servers = Servers::with_stream(STREAM, 1);
    let output = ["--output", &place, "--acks", "--readers", "green,red", "--shutdown-limit", "5s"];
    let worker = Running::start(consume(&servers, &output));
    let mut green = unix(&path).hello("green");
    let _red = unix(&path).hello("red");
    assert!(unix(&path).hello("blue").told().contains("green, red"));
    // More than what a feed holds ready for a reader, and its socket.
    for n in 0..30 {
        servers.put_lines(STREAM, "k", &lines(n * 200, n * 200 + 200));
    }
    for n in 1..=6000 {
        assert_eq!(green.take(1), lines(n - 1, n));
        green.acknowledge(n);
    }
    // It was sent up to a window, and has read nothing: the stop does not wait for it beyond the limit.
    worker.stop().succeeded();
    assert_eq!(left(&servers, "rtr-green"), [""; 0]);
    assert_eq!(left(&servers, "rtr-red"), lines(0, 6000));
}

#[test]
fn p1_without_acknowledgements_every_reader_gets_everything_and_none_is_waited_for() {
    let servers = Servers::with_stream(STREAM, 2);
    for n in 0..10 {
        servers.put_lines(STREAM, &format!("k{n}"), &lines(n * 10, n * 10 + 10));
    }
    let output = ["--output", "tcp://127.0.0.1:0", "--checkpoint-interval", "50ms"];
    let worker = Running::start(consume(&servers, &output));
    let address = address(&worker);
    let (mut a, mut b) = (tcp(&address), tcp(&address));
    wait_for("both readers", || {
        (worker.stderr().matches("reader connected").count() == 2).then_some(())
    });
    let seen: BTreeSet<String> = a.take(100).into_iter().collect();
    assert_eq!(seen, lines(0, 100).into_iter().collect());
    put(&servers, "k", 100, 200);
    assert_eq!(a.take(100), lines(100, 200));
    // What was finished before the second one came is not for it.
    let mut seen = Vec::new();
    while !seen.ends_with(&lines(199, 200)) {
        seen.extend(b.take(1));
    }
    assert!(seen.ends_with(&lines(100, 200)), "{seen:?}");
    drop(a);
    worker.wait_for_log("the reader has gone");
    put(&servers, "k", 200, 210);
    while b.take(1) != lines(209, 210) {}
    worker.stop().succeeded();
    assert_eq!(left(&servers, "rtr"), [""; 0]);
}

#[test]
fn p1_a_stop_while_nobody_reads_leaves_everything_to_the_next_worker() {
    let (_folder, path, place) = socket();
    let servers = Servers::with_stream(STREAM, 1);
    put(&servers, "k", 0, 50);
    for more in [&[][..], &["--acks"], &["--share"]] {
        let output = ["--output", &place];
        let worker = Running::start(consume(&servers, &[&output, more].concat()));
        wait_for("the socket", || path.exists().then_some(()));
        worker.wait_for_log("lease taken");
        worker.stop().succeeded();
    }
    assert_eq!(left(&servers, "rtr"), lines(0, 50));
}

#[test]
fn p1_a_stop_under_a_reader_that_stalls_ends_in_time_and_loses_nothing() {
    let servers = Servers::with_stream(STREAM, 1);
    // More than the buffers of a socket take, and a record each, so that a checkpoint may be anywhere.
    let padding = "x".repeat(10_000);
    let long = |n: usize| format!("{n},DIAG,12:00:00,{padding}");
    let sent: Vec<String> = (0..1200).map(long).collect();
    for some in sent.chunks(1) {
        servers.put_lines(STREAM, "k", some);
    }
    let output = ["--output", "tcp://127.0.0.1:0", "--shutdown-limit", "4s"];
    let worker = Running::start(consume(&servers, &output));
    let stalled = tcp(&address(&worker));
    worker.wait_for_log("the reader takes nothing");
    worker.stop().succeeded();
    // What was on the way arrives all the same; the last line may be cut.
    let mut text = String::new();
    { stalled.lines }.read_to_string(&mut text).expect("text");
    let (whole, _) = text.rsplit_once('\n').expect("lines");
    let whole: Vec<String> = whole.lines().map(str::to_owned).collect();
    let mut seen = raws(&whole);
    assert!(seen.len() < sent.len(), "it did not stall");
    assert_eq!(seen, sent[..seen.len()]);
    seen.extend(left(&servers, "rtr"));
    let seen: BTreeSet<String> = seen.into_iter().collect();
    assert_eq!(seen, sent.into_iter().collect());
}

#[test]
fn a_shard_that_waits_for_acknowledgements_is_told_and_left_alone() {
    let (_folder, path, place) = socket();
    let servers = Servers::with_stream(STREAM, 1);
    put(&servers, "k", 0, 10);
    let output = ["--output", &place, "--acks", "--watchdog", "2s"];
    let worker = Running::start(consume(&servers, &output));
    let mut reader = unix(&path).hello("green");
    assert_eq!(reader.take(10), lines(0, 10));
    // The shard ends, and there is nothing more to read.
    let split = servers.kinesis.split_shard().stream_name(STREAM);
    let split = split.shard_to_split("shardId-000000000000");
    let split = split.new_starting_hash_key((u128::MAX / 2 + 1).to_string());
    servers.wait(split.send()).expect("a split");
    let told = "waits_for=acknowledgements of what the handler has taken";
    worker.wait_for_log(told);
    let log = worker.stderr();
    let told = log.lines().find(|line| line.contains(told)).expect("the line");
    assert!(told.contains("it is left alone"), "{told}");
    reader.acknowledge(10);
    put(&servers, "k", 10, 20);
    while reader.take(1) != lines(19, 20) {}
    worker.stop().succeeded();
}

#[test]
fn p1_the_end_of_a_time_window_waits_for_the_reader() {
    let (_folder, path, place) = socket();
    let servers = Servers::with_stream(STREAM, 1);
    put(&servers, "k", 0, 50);
    let until = jiff::Timestamp::now() + Duration::from_secs(1);
    let output = ["--output", &place, "--acks", "--until", &until.to_string()];
    let worker = Running::start(consume(&servers, &output));
    let mut reader = unix(&path).hello("green");
    assert_eq!(reader.take(50), lines(0, 50));
    reader.acknowledge(20);
    // By now nothing is left to read.
    wait_for("the end of the window", || (jiff::Timestamp::now() > until).then_some(()));
    thread::sleep(Duration::from_secs(1));
    reader.acknowledge(50);
    worker.finish().succeeded();
    assert_eq!(left(&servers, "rtr"), [""; 0]);
}

#[test]
fn p2_shared_messages_of_a_key_are_with_one_reader_at_a_time() {
    let servers = Servers::with_stream(STREAM, 1);
    for n in 0..40 {
        servers.put_lines(STREAM, &format!("key-{}", n % 4), &lines(n * 10, n * 10 + 10));
    }
    let output = ["--output", "tcp://127.0.0.1:0", "--share", "--acks"];
    let worker = Running::start(consume(&servers, &output));
    let address = address(&worker);
    let seen: Arc<Mutex<Vec<(String, String)>>> = Arc::default();
    let done = Arc::new(AtomicBool::new(false));
    // Never answers, and goes: what it has goes to the others.
    let mut stalled = tcp(&address).hello("stalled");
    stalled.take(1);
    let readers: Vec<_> = ["a", "b"]
        .map(|name| {
            let (seen, done, address) = (seen.clone(), done.clone(), address.clone());
            thread::spawn(move || {
                let mut reader = tcp(&address).hello(name);
                let stream = reader.output.try_clone().expect("a copy");
                stream.set_read_timeout(Some(Duration::from_millis(100))).expect("an option");
                let mut serial = 0;
                let mut line = String::new();
                while !done.load(Ordering::SeqCst) {
                    match reader.lines.read_line(&mut line) {
                        Ok(0) => panic!("the feed has gone"),
                        Ok(_) => {
                            let message: Value = serde_json::from_str(&line).expect("JSON");
                            let text = |value: &Value| value.as_str().expect("text").to_owned();
                            let raw = text(&message["event"]["data"]["raw"]);
                            seen.lock()
                                .expect("a lock")
                                .push((text(&message["partition_key"]), raw));
                            serial += 1;
                            reader.acknowledge(serial);
                            line.clear();
                        }
                        // A part of a line stays.
                        Err(_) => {}
                    }
                }
            })
        })
        .into();
    drop(stalled);
    wait_for("all messages", || (seen.lock().expect("a lock").len() >= 400).then_some(()));
    done.store(true, Ordering::SeqCst);
    for reader in readers {
        reader.join().expect("a reader");
    }
    let seen = seen.lock().expect("a lock");
    assert_eq!(seen.len(), 400, "nothing twice: what the stalled one had was not acknowledged");
    for key in 0..4 {
        let of_key: Vec<&String> =
            seen.iter().filter(|(of, _)| *of == format!("key-{key}")).map(|(_, raw)| raw).collect();
        let number = |raw: &&String| raw.split(',').next().and_then(|n| n.parse::<usize>().ok());
        assert!(of_key.iter().map(number).is_sorted(), "{of_key:?}");
        assert_eq!(of_key.len(), 100);
    }
    worker.stop().succeeded();
    assert_eq!(left(&servers, "rtr"), [""; 0]);
}

/// A receiver of OCS messages. Gives what it got when it has so many.
fn receive(listener: &TcpListener, count: usize) -> Vec<String> {
    let (mut socket, _) = listener.accept().expect("a connection");
    socket.set_read_timeout(Some(LIMIT)).expect("an option");
    let (mut framer, mut received, mut buffer) = (Framer::new(65_536), Vec::new(), [0; 1024]);
    while received.len() < count {
        let length = socket.read(&mut buffer).expect("messages");
        assert!(length > 0, "closed");
        received.extend(framer.push(&buffer[..length]).into_iter().map(|frame| match frame {
            Frame::Message(raw) => String::from_utf8(raw).expect("text"),
            other => panic!("{other:?}"),
        }));
    }
    received
}

#[test]
fn p1_targets_get_raw_text_each_at_its_own_position_and_may_go_and_come_back() {
    let servers = Servers::with_stream(STREAM, 1);
    put(&servers, "k", 0, 50);
    let (green, blue) = (TcpListener::bind("127.0.0.1:0"), TcpListener::bind("127.0.0.1:0"));
    let (green, blue) = (green.expect("a port"), blue.expect("a port"));
    let to = |name, at: &TcpListener| {
        format!("{name}=tcp-connect://{}", at.local_addr().expect("an address"))
    };
    let (to_green, to_blue) = (to("green", &green), to("blue", &blue));
    let output = ["--output", &to_green, "--output", &to_blue, "--checkpoint-interval", "50ms"];
    let worker = Running::start(consume(&servers, &output));
    assert_eq!(receive(&green, 50), lines(0, 50));
    // The connection is closed now. Blue has not accepted one yet.
    worker.wait_for_log("the reader has gone");
    put(&servers, "k", 50, 100);
    let again = receive(&green, 50);
    assert!(again.ends_with(&lines(50, 100)[..]), "{again:?}");
    assert_eq!(receive(&blue, 100), lines(0, 100));
    worker.stop().succeeded();
    assert_eq!(left(&servers, "rtr-green"), [""; 0]);
}

#[test]
fn p1_the_shell_reader_is_a_child_that_is_started_again_when_it_is_killed() {
    if !has("sh") {
        return;
    }
    let servers = Servers::with_stream(STREAM, 1);
    put(&servers, "k", 0, 100);
    let folder = tempfile::tempdir().expect("a folder");
    let (log, pid) = (folder.path().join("log"), folder.path().join("pid"));
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/reader.sh");
    let command = format!("exec:echo $$ >{}; exec sh {example} {}", pid.display(), log.display());
    let worker = Running::start(consume(&servers, &["--output", &command, "--acks"]));
    let wait_for_lines = |count: usize| {
        wait_for(format!("{count} lines in {}", log.display()), || {
            let text = fs::read_to_string(&log).ok()?;
            let lines: Vec<String> = text.lines().map(str::to_owned).collect();
            (lines.len() >= count).then_some(lines)
        })
    };
    wait_for_lines(100);
    let child = fs::read_to_string(&pid).expect("a process");
    let killed = Command::new("sh").args(["-c", &format!("kill -9 {child}")]).status();
    assert!(killed.expect("kill").success());
    worker.wait_for_log("it is started again");
    put(&servers, "k", 100, 150);
    let log = wait_for_lines(150);
    let seen: BTreeSet<String> = raws(&log).into_iter().collect();
    assert_eq!(seen, lines(0, 150).into_iter().collect());
    worker.stop().succeeded();
    assert_eq!(left(&servers, "rtr"), [""; 0]);
}

#[test]
fn p1_the_python_reader_finishes_what_it_prints() {
    if !has("python3") {
        return;
    }
    let (_folder, path, place) = socket();
    let servers = Servers::with_stream(STREAM, 1);
    put(&servers, "k", 0, 50);
    let worker = Running::start(consume(&servers, &["--output", &place, "--acks"]));
    wait_for("the socket", || path.exists().then_some(()));
    let read = || {
        let mut python = Command::new("python3");
        python.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/reader.py"));
        python.arg(format!("unix:{}", path.display())).arg("green");
        Running::start(python)
    };
    let mut reader = read();
    assert_eq!(reader.wait_for_lines(50), lines(0, 50));
    reader.kill();
    put(&servers, "k", 50, 60);
    let reader = read();
    let again = wait_for("the new lines", || {
        let printed = reader.stdout();
        printed.ends_with(&lines(50, 60)[..]).then_some(printed)
    });
    // The last acknowledgements of the first one may have been lost with it.
    assert!(again.len() <= 60);
    worker.stop().succeeded();
    assert_eq!(left(&servers, "rtr"), [""; 0]);
}

#[test]
fn a_child_without_acknowledgements_writes_to_stdout_and_ends_with_its_stdin() {
    let servers = Servers::with_stream(STREAM, 1);
    put(&servers, "k", 0, 30);
    let output = ["--output", "exec:cat; echo the end", "--format", "raw"];
    let worker = Running::start(consume(&servers, &output));
    worker.wait_for_lines(30);
    let finished = worker.stop().succeeded();
    assert_eq!(finished.stdout, [lines(0, 30), vec!["the end".to_owned()]].concat());
}

#[test]
fn what_cannot_work_is_told_at_the_start() {
    let (folder, path, place) = socket();
    let servers = Servers::with_stream(STREAM, 1);
    let fails = |output: &[&str], told: &str| {
        let finished = run(consume(&servers, output));
        assert_eq!(finished.status.code(), Some(1), "{output:?}: {}", finished.stderr);
        assert!(finished.stderr.contains(told), "{output:?}: {}", finished.stderr);
    };
    fails(&["--output", "exec:no-such-reader"], "cannot be run");
    fails(&["--output", "tcp-connect://localhost:1", "--acks"], "--acks");
    fails(&["--acks"], "--acks");
    fails(&["--output", &place, "--acks", "--format", "raw"], "--format json");
    fails(&["--share"], "unix:// and tcp://");
    fails(&["--output", &place, "--output", "stdout"], "need a name each");
    let state = format!("file://{}", folder.path().join("state").display());
    let two = ["--output", &format!("a={place}"), "--output", "b=stdout", "--checkpoint", &state];
    fails(&two, "run a process for each output");
    let listening = UnixListener::bind(&path).expect("a socket");
    fails(&["--output", &place], "another process does");
    drop(listening);
    let file = folder.path().join("file");
    fs::write(&file, "precious").expect("a file");
    fails(&["--output", &format!("unix://{}", file.display())], "no socket");
    assert_eq!(fs::read_to_string(&file).expect("the file"), "precious");
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = format!("tcp://{}", taken.local_addr().expect("an address"));
    fails(&["--output", &taken], "cannot listen");
}
