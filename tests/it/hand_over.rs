//! Hand-overs that do not go as they should.

use std::{collections::BTreeSet, process::ChildStdout};

use crate::{
    proxy::Proxy,
    support::{Running, Servers, lines, raws, wait_for},
};

const STREAM: &str = "ctd-ocs-raw-messages";

/// More than a pipe holds.
const MANY: usize = 4000;

fn args<'a>(id: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let args = ["consume", "--stream", STREAM, "--app", "rtr", "--worker-id", id];
    [&args, more].concat()
}

fn worker(servers: &Servers, id: &str, more: &[&str]) -> Running {
    Running::start(servers.tramline(&args(id, more)))
}

/// A worker that is stuck in its batches, of both shards, because nobody reads its stdout, and that is
/// asked for one of them by the other worker.
fn stuck_and_asked(servers: &Servers, more: &[&str]) -> (Running, ChildStdout, Running) {
    let command = servers.tramline(&args("first", more));
    let (mut first, stdout, stderr) = Running::start_unread(command);
    first.read_stderr(stderr);
    for key in 0..8 {
        let part = MANY / 8;
        servers.put_lines(STREAM, &format!("key-{key}"), &lines(key * part, (key + 1) * part));
    }
    wait_for("the first worker to have both leases", || {
        (first.stderr().matches("lease taken").count() == 2).then_some(())
    });
    let second = worker(servers, "second", more);
    second.wait_for_log("asked for a lease");
    (first, stdout, second)
}

fn seen(workers: &[&Running]) -> BTreeSet<String> {
    workers.iter().flat_map(|worker| raws(&worker.stdout())).collect()
}

fn wait_for_everything(workers: &[&Running]) {
    let all: BTreeSet<String> = lines(0, MANY).into_iter().collect();
    wait_for("every line", || (seen(workers) == all).then_some(()));
}

#[test]
fn p1_a_reader_that_does_not_let_go_is_overruled() {
    let servers = Servers::with_stream(STREAM, 2);
    let short = ["--lease-duration", "2s", "--hand-over-limit", "1s"];
    let (mut first, stdout, second) = stuck_and_asked(&servers, &short);
    second.wait_for_log("lease taken");
    wait_for("the second worker to read", || (!second.stdout().is_empty()).then_some(()));
    first.wait_for_log("lease lost: delivery of the shard stops here");
    first.read_stdout(stdout);
    wait_for_everything(&[&first, &second]);
    first.stop().succeeded();
    second.stop().succeeded();
}

#[test]
fn p1_a_shard_whose_asker_dies_is_read_on() {
    let servers = Servers::with_stream(STREAM, 2);
    let (mut first, stdout, mut second) = stuck_and_asked(&servers, &["--lease-duration", "2s"]);
    second.kill();
    first.read_stdout(stdout);
    first.wait_for_log("lease released");
    wait_for("the first worker to take it back", || {
        (first.stderr().matches("lease taken").count() == 3).then_some(())
    });
    wait_for_everything(&[&first]);
    first.stop().succeeded();
}

#[test]
fn p1_a_shard_whose_reader_dies_after_it_was_asked_is_read_by_the_asker() {
    let servers = Servers::with_stream(STREAM, 2);
    // So long that only the reader's death can end the wait for it.
    let patient = ["--lease-duration", "2s", "--hand-over-limit", "1h"];
    let (mut first, _, second) = stuck_and_asked(&servers, &patient);
    first.kill();
    wait_for_everything(&[&second]);
    second.stop().succeeded();
}

#[test]
fn p1_a_hand_over_in_which_both_restart_comes_to_an_end() {
    let servers = Servers::with_stream(STREAM, 2);
    // So long that only the workers themselves can get at their leases, and only the reader can say that
    // it does not read any more.
    let long = ["--lease-duration", "1h", "--hand-over-limit", "1h"];
    let (mut first, _, mut second) = stuck_and_asked(&servers, &long);
    first.kill();
    second.kill();
    let proxy = Proxy::start(&servers);
    let second = Running::start(proxy.tramline(&servers, &args("second", &long)));
    wait_for("it to look more than once", || (proxy.calls("Scan").len() > 2).then_some(()));
    let first = worker(&servers, "first", &long);
    wait_for_everything(&[&first, &second]);
    wait_for("one lease each", || {
        let one = |worker: &Running| worker.stderr().matches("lease taken").count() == 1;
        (one(&first) && one(&second)).then_some(())
    });
    first.stop().succeeded();
    second.stop().succeeded();
}
