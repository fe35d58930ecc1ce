//! Every example runs to its end.

use std::{path::PathBuf, process::Command, time::Duration};

use crate::support::{Running, Servers, lines, run, wait_for};

const STREAM: &str = "ctd-ocs-raw-messages";

/// `cargo test` builds the examples, and puts them beside the tests.
fn example(name: &str) -> Command {
    let test = std::env::current_exe().expect("a path");
    let target: PathBuf = test.ancestors().nth(2).expect("a folder").join("examples").join(name);
    assert!(target.exists(), "{} is not built; run cargo build --examples", target.display());
    let mut command = Command::new(target);
    command.env_clear().env("HOME", "/nonexistent").env("AWS_EC2_METADATA_DISABLED", "true");
    command
}

#[test]
fn the_examples_of_embedded_services_run_until_they_are_stopped() {
    let servers = Servers::with_stream(STREAM, 1);
    let running = |name: &str| {
        let mut command = example(name);
        command.envs(servers.local.environment()).args([STREAM, name]);
        Running::start(command)
    };
    let monitor = running("sequence_monitor");
    let counter = running("embedded");
    // It starts at the latest: what comes once it reads has a gap.
    let mut next = 0;
    wait_for("both to tell of messages", || {
        servers.put_lines(STREAM, "k", &lines(next, next + 1));
        next += 2;
        std::thread::sleep(Duration::from_millis(100));
        let has_gap = monitor.stdout().iter().any(|line| line.contains("1 missing after"));
        let has_counts = counter.stdout().iter().any(|line| line.contains("line 0"));
        (has_gap && has_counts).then_some(())
    });
    monitor.stop().succeeded();
    counter.stop().succeeded();
}

#[test]
fn p1_the_example_that_counts_exactly_once_does() {
    let stdout = run(example("exactly_once")).succeeded().stdout;
    assert_eq!(stdout, ["100 messages, sum 4950"]);
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
