//! Every example runs, as a newcomer runs it, and does what it says.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use crate::support::{Finished, Running, Servers, has, lines, run, wait_for};

const STREAM: &str = "ctd-ocs-raw-messages";
const EXAMPLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples");

/// `cargo test` builds the examples, and puts them beside the tests.
fn example(name: &str) -> Command {
    let test = std::env::current_exe().expect("a path");
    let target: PathBuf = test.ancestors().nth(2).expect("a folder").join("examples").join(name);
    assert!(target.exists(), "{} is not built; run cargo build --examples", target.display());
    let mut command = Command::new(target);
    command.env_clear().env("HOME", "/nonexistent").env("AWS_EC2_METADATA_DISABLED", "true");
    command
}

/// The same for a stream of the test's own.
fn example_on(servers: &Servers, name: &str) -> Command {
    let mut command = example(name);
    command.envs(servers.local.environment()).args([STREAM, name]);
    command
}

/// Runs an example until it has printed what is wanted, and then as Ctrl-C ends it.
fn until(running: Running, wanted: impl Fn(&[String]) -> bool) -> Finished {
    wait_for(running.told("what is wanted on stdout".to_owned()), || {
        wanted(&running.stdout()).then_some(())
    });
    running.signal("INT");
    running.finish().succeeded()
}

#[test]
fn the_services_run_on_embedded_servers_until_they_are_stopped() {
    let [counter, messages, coalesce, monitor] =
        ["embedded", "messages", "coalesce", "sequence_monitor"]
            .map(|name| Running::start(example(name)));
    until(counter, |stdout| {
        // Two senders tell of all lines, in two shards.
        ["R", "O", "B", "G"].iter().all(|l| stdout.iter().any(|s| s.contains(&format!("{l:?}: "))))
    });
    let finished = until(messages, |stdout| {
        ["shardId-000000000000 ", "shardId-000000000001 "]
            .iter()
            .all(|shard| stdout.iter().any(|line| line.starts_with(shard)))
    });
    assert!(finished.stdout.last().expect("a line").ends_with(" messages are finished"));
    let finished = until(coalesce, |stdout| stdout.len() > 5);
    assert!(finished.stdout.last().expect("a line").contains(" messages in "));
    // What is lost on the way is made up, too.
    until(monitor, |stdout| stdout.iter().any(|line| line.contains("1 missing after")));
}

#[test]
fn the_services_read_the_stream_that_they_are_given() {
    let servers = Servers::with_stream(STREAM, 1);
    let running = |name: &str| Running::start(example_on(&servers, name));
    let monitor = running("sequence_monitor");
    let counter = running("embedded");
    // It starts at the latest: what comes once it reads has a gap.
    let mut next = 0;
    let has_gap = || monitor.stdout().iter().any(|line| line.contains("1 missing after"));
    wait_for("the gap to be told", || {
        servers.put_lines(STREAM, "k", &lines(next, next + 1));
        next += 2;
        thread::sleep(Duration::from_millis(100));
        has_gap().then_some(())
    });
    monitor.stop().succeeded();
    until(counter, |stdout| stdout.iter().any(|line| line.contains("line 0")));
}

#[test]
fn p1_what_the_stream_front_acknowledged_does_not_come_again() {
    let servers = Servers::with_stream(STREAM, 1);
    let printed = |finished: Finished| -> Vec<String> {
        let texts = finished.stdout.iter().filter_map(|line| line.strip_prefix("shardId-"));
        texts.filter_map(|line| Some(line.split_once(' ')?.1.to_owned())).collect()
    };
    servers.put_lines(STREAM, "k", &lines(0, 30));
    let first = Running::start(example_on(&servers, "messages"));
    let first = until(first, |stdout| stdout.len() == 30);
    assert_eq!(first.stdout.last().expect("a line"), "30 messages are finished");
    servers.put_lines(STREAM, "k", &lines(30, 40));
    let second = until(Running::start(example_on(&servers, "messages")), |o| o.len() >= 10);
    assert_eq!((printed(first), printed(second)), (lines(0, 30), lines(30, 40)));
}

#[test]
fn the_slow_database_gets_only_the_newest_position_of_each_train() {
    let servers = Servers::with_stream(STREAM, 1);
    // Trains that leave, over and over.
    let left: Vec<String> =
        (0..300).map(|n| format!("{n},TMOV,12:00:00,R,TRAIN{},0,0", n % 3)).collect();
    servers.put_lines(STREAM, "k", &left);
    let running = Running::start(example_on(&servers, "coalesce"));
    let finished = until(running, |stdout| !stdout.is_empty());
    assert_eq!(finished.stdout, ["3 positions written", "300 messages in 3 writes"]);
}

#[test]
fn p7_the_example_of_a_producer_puts_its_messages_in_order() {
    run(example("producer")).succeeded();
    let servers = Servers::with_stream(STREAM, 2);
    let finished = run(example_on(&servers, "producer")).succeeded();
    assert!(finished.stdout[0].starts_with("north: the last is in shardId-00000000000"));
    assert!(finished.stdout[2].starts_with("100 messages in "));
    let args = ["consume", "--stream", STREAM, "--app", "look", "--format", "raw"];
    let mut consume = servers.tramline(&args);
    consume.args(["--exit-when-idle", "1s"]);
    let mut senders = BTreeMap::<String, Vec<String>>::new();
    for line in run(consume).succeeded().stdout {
        let (sender, _) = line.rsplit(',').next().expect("a text").split_once(' ').expect("a name");
        senders.entry(sender.to_owned()).or_default().push(line);
    }
    for (sender, lines) in &senders {
        let sent: Vec<String> =
            (1..=50).map(|n| format!("{n},DIAG,12:00:00,{sender} {n}")).collect();
        assert_eq!(*lines, sent);
    }
    assert_eq!(senders.len(), 2);
}

#[test]
fn p1_the_example_that_counts_exactly_once_does() {
    let stdout = run(example("exactly_once")).succeeded().stdout;
    assert_eq!(stdout, ["100 messages, sum 4950"]);
}

#[test]
fn p1_it_goes_on_counting_in_the_bucket_that_it_is_given() {
    let servers = Servers::with_stream(STREAM, 1);
    let s3 = aws_sdk_s3::Client::new(&servers.local.sdk_config());
    servers.wait(s3.create_bucket().bucket("state").send()).expect("a bucket");
    for (from, to, told) in [(0, 10, "10 messages, sum 45"), (10, 20, "20 messages, sum 190")] {
        servers.put_lines(STREAM, "k", &lines(from, to));
        let mut command = example_on(&servers, "exactly_once");
        command.arg("state");
        assert_eq!(run(command).succeeded().stdout, [told]);
    }
}

#[test]
fn each_of_the_four_ways_to_keep_state_sees_what_its_page_says() {
    let stdout = run(example("strategies")).succeeded().stdout;
    let expected = [
        "latest-only: 0, then 0",
        "state-in-s3: 10, then 5",
        "positions-in-dynamodb: 10, then 5",
        "service-day-again: 10, then 15",
    ];
    assert_eq!(stdout, expected);
}

/// `tramline consume | python3 pipe.py`, with what Python prints in a file, as `>>` does it.
fn piped(servers: &Servers, places: &Path, printed: &Path) -> (Running, Command) {
    let args = ["consume", "--stream", STREAM, "--app", "look", "--output", "stdout"];
    let mut consume = servers.tramline(&args);
    // A crash repeats everything.
    consume.args(["--format", "json", "--checkpoint-interval", "1h"]);
    let (mut worker, out, err) = Running::start_unread(consume);
    worker.read_stderr(err);
    let mut python = Command::new("python3");
    python.arg(format!("{EXAMPLES}/pipe.py")).arg(places).stdin(out);
    python.stdout(File::options().create(true).append(true).open(printed).expect("a file"));
    (worker, python)
}

#[test]
fn p1_the_python_program_on_a_pipe_prints_each_message_once_over_crashes_of_the_worker() {
    if !has("python3") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (places, printed) = (folder.path().join("places.json"), folder.path().join("printed"));
    let servers = Servers::with_stream(STREAM, 1);
    let wait_for_printed = |count: usize| {
        wait_for(format_args!("{count} printed lines"), || {
            (fs::read_to_string(&printed).ok()?.lines().count() >= count).then_some(())
        });
    };
    servers.put_lines(STREAM, "k", &lines(0, 30));
    let (mut worker, mut python) = piped(&servers, &places, &printed);
    let mut reader = python.spawn().expect("python starts");
    wait_for_printed(30);
    worker.kill();
    assert!(reader.wait().expect("a status").success());

    servers.put_lines(STREAM, "k", &lines(30, 50));
    let (worker, mut python) = piped(&servers, &places, &printed);
    let mut reader = python.spawn().expect("python starts");
    wait_for_printed(50);
    // As Ctrl-C does it, to both: the reader goes on to the end of the pipe.
    let pid = reader.id().to_string();
    assert!(Command::new("kill").args(["-s", "INT", &pid]).status().expect("kill").success());
    servers.put_lines(STREAM, "k", &lines(50, 60));
    wait_for_printed(60);
    worker.signal("INT");
    worker.finish().succeeded();
    assert!(reader.wait().expect("a status").success());
    let printed = fs::read_to_string(&printed).expect("what was printed");
    assert_eq!(printed.lines().collect::<Vec<_>>(), lines(0, 60));
}

#[test]
fn a_python_program_whose_reader_has_gone_ends_without_a_traceback_and_so_does_the_worker() {
    if !has("python3") {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (places, printed) = (folder.path().join("places.json"), folder.path().join("printed"));
    let servers = Servers::with_stream(STREAM, 1);
    servers.put_lines(STREAM, "k", &lines(0, 30));
    let (worker, mut python) = piped(&servers, &places, &printed);
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let reader = python.stdout(writer).stderr(Stdio::piped()).spawn().expect("python starts");
    drop(python); // It still has the pipe from the worker.
    let ended = reader.wait_with_output().expect("its end");
    assert!(ended.status.success());
    assert_eq!(String::from_utf8_lossy(&ended.stderr), "");
    // It learns so with the next line.
    let mut next = 30;
    wait_for("the worker to see it", || {
        servers.put_lines(STREAM, "k", &lines(next, next + 1));
        next += 1;
        worker.stderr().contains("the reader of stdout has gone").then_some(())
    });
    worker.finish().succeeded();
}

#[test]
fn the_page_of_the_examples_has_each_with_its_command() {
    let page = fs::read_to_string(format!("{EXAMPLES}/README.md")).expect("the page");
    let entries = fs::read_dir(EXAMPLES).expect("a folder").map(|entry| entry.expect("an entry"));
    for entry in entries.filter(|entry| entry.path().is_file()) {
        let name = entry.file_name().into_string().expect("a name");
        match name.split_once('.') {
            Some(("README", _)) => {}
            Some((stem, "rs")) => {
                assert!(page.contains(&format!("[`{stem}`]({name})")), "{name} is missing");
                assert!(
                    page.contains(&format!("cargo run --example {stem}`")),
                    "{name} is not run"
                );
            }
            _ => assert!(page.contains(&format!("]({name})")), "{name} is missing"),
        }
    }
    for rest in page.split("cargo run --example ").skip(1) {
        let stem = rest.split(['`', ' ', '\n']).next().unwrap_or_default();
        let path = format!("{EXAMPLES}/{stem}.rs");
        assert!(stem == "NAME" || Path::new(&path).exists(), "{path} is named, and is not there");
    }
}
