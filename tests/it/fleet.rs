//! Several workers on one stream.

use std::{collections::BTreeSet, sync::Arc};

use crate::support::{Running, Servers, Traffic, lines, raws, shards_of, wait_for, wait_for_all};

const STREAM: &str = "ctd-ocs-raw-messages";

fn worker(servers: &Servers, id: &str, more: &[&str]) -> Running {
    let args = ["consume", "--stream", STREAM, "--app", "rtr", "--worker-id", id];
    Running::start(servers.tramline(&[&args, more].concat()))
}

#[test]
fn p1_p6_a_worker_that_joins_and_one_that_leaves_cost_no_message_and_no_repeat() {
    let servers = Arc::new(Servers::with_stream(STREAM, 4));
    let traffic = Traffic::start(&servers, STREAM);
    let first = worker(&servers, "first", &[]);
    wait_for("the first worker to read all shards", || {
        (shards_of(&first).len() == 4).then_some(())
    });

    let second = worker(&servers, "second", &[]);
    wait_for("the second worker to have its share", || {
        (shards_of(&second).len() == 2).then_some(())
    });
    assert_eq!(second.stderr().matches("lease taken").count(), 2, "two of four, and no more");
    assert_eq!(first.stderr().matches("lease released").count(), 2);

    second.signal("TERM");
    wait_for("the second worker to stop", || {
        second.stderr().contains("worker stopped").then_some(())
    });
    wait_for("the first worker to take them back", || {
        (first.stderr().matches("lease taken").count() == 6).then_some(())
    });
    let sent = traffic.finish();
    let counted = wait_for_all(&[&first, &second], &sent);
    let repeated: Vec<_> = counted.iter().filter(|(_, count)| **count > 1).collect();
    assert!(repeated.is_empty(), "{repeated:?}");
    first.stop().succeeded();
}

#[test]
fn p1_a_killed_worker_is_replaced_and_nothing_is_missing() {
    let servers = Arc::new(Servers::with_stream(STREAM, 4));
    let traffic = Traffic::start(&servers, STREAM);
    let fast = ["--lease-duration", "3s"];
    let first = worker(&servers, "first", &fast);
    let mut second = worker(&servers, "second", &fast);
    wait_for("both workers to read", || {
        (shards_of(&first).len() >= 2 && shards_of(&second).len() >= 2).then_some(())
    });
    second.kill();
    let sent = traffic.finish();
    wait_for_all(&[&first, &second], &sent);
    first.stop().succeeded();
}

#[test]
fn p1_a_worker_that_is_short_of_memory_takes_no_more_and_what_nobody_takes_is_told() {
    let servers = Servers::with_stream(STREAM, 2);
    servers.put_lines(STREAM, "k", &lines(0, 5));
    // Less than any process has.
    let first = worker(&servers, "first", &["--refuse-above-memory", "1KiB"]);
    first.wait_for_log("takes no more leases");
    first.wait_for_log("read by nobody");
    assert_eq!(first.stdout(), [""; 0]);
    let second = worker(&servers, "second", &[]);
    wait_for("the second worker to read", || (raws(&second.stdout()) == lines(0, 5)).then_some(()));
    first.stop().succeeded();
    second.stop().succeeded();
}

#[test]
fn p4_a_paused_worker_does_not_go_on_when_another_one_has_its_shard() {
    let servers = Servers::with_stream(STREAM, 1);
    let fast = ["--lease-duration", "2s"];
    let first = worker(&servers, "first", &fast);
    servers.put_lines(STREAM, "k", &lines(0, 10));
    first.wait_for_lines(10);
    first.signal("STOP");
    let second = worker(&servers, "second", &fast);
    second.wait_for_log("lease taken");
    servers.put_lines(STREAM, "k", &lines(10, 20));
    wait_for("the second worker to go on", || {
        raws(&second.stdout()).ends_with(&lines(10, 20)).then_some(())
    });
    first.signal("CONT");
    first.wait_for_log("delivery of the shard stops");
    servers.put_lines(STREAM, "k", &lines(20, 30));
    wait_for("the second worker to go on", || {
        raws(&second.stdout()).ends_with(&lines(20, 30)).then_some(())
    });
    assert_eq!(raws(&first.stdout()), lines(0, 10), "it delivered nothing after its pause");
    first.stop().succeeded();
    second.stop().succeeded();
}

#[test]
fn p5_two_workers_that_start_at_once_on_a_resharded_stream_read_parents_first() {
    let servers = Servers::with_stream(STREAM, 1);
    let keys = ["a", "b", "c", "d", "e", "f", "g", "h"];
    let put = |generation: u32| {
        for key in keys {
            servers.put_lines(STREAM, key, &[format!("{generation},DIAG,12:00:00,{key}")]);
        }
    };
    put(1);
    let half = (u128::MAX / 2 + 1).to_string();
    let split = servers.kinesis.split_shard().stream_name(STREAM);
    let split = split.shard_to_split("shardId-000000000000").new_starting_hash_key(half);
    servers.wait(split.send()).expect("a split");
    put(2);
    let merge = servers.kinesis.merge_shards().stream_name(STREAM);
    let merge = merge.shard_to_merge("shardId-000000000001");
    let merge = merge.adjacent_shard_to_merge("shardId-000000000002");
    servers.wait(merge.send()).expect("a merge");
    put(3);

    let workers = [worker(&servers, "one", &[]), worker(&servers, "two", &[])];
    let seen = wait_for("all generations", || {
        let seen: Vec<Vec<String>> = workers.iter().map(|worker| raws(&worker.stdout())).collect();
        (seen.iter().map(Vec::len).sum::<usize>() >= 24).then_some(seen)
    });
    // Each worker prints in its own order; a later generation may only begin when the one before it
    // is finished, so no worker has it out of order, and each line came once.
    let all: BTreeSet<&String> = seen.iter().flatten().collect();
    assert_eq!(all.len(), 24);
    for worker in &seen {
        let generations: Vec<&str> =
            worker.iter().filter_map(|raw| raw.split(',').next()).collect();
        assert!(generations.is_sorted(), "{generations:?}");
    }
    for worker in workers {
        worker.stop().succeeded();
    }
}
