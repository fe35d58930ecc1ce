//! What an operator sees of an application, and mends.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::support::{Finished, Running, Servers, lines, raws, run, wait_for};

const STREAM: &str = "ctd-ocs-raw-messages";
const OF: [&str; 4] = ["--stream", STREAM, "--app", "rtr"];

fn worker(servers: &Servers, id: &str, more: &[&str]) -> Running {
    let args = [&["consume", "--worker-id", id], &OF[..], more].concat();
    Running::start(servers.tramline(&args))
}

/// Consumes until nothing comes.
fn consume_all(servers: &Servers, more: &[&str]) -> BTreeSet<String> {
    let args = [&["consume", "--exit-when-idle", "1s"], &OF[..], more].concat();
    raws(&run(servers.tramline(&args)).succeeded().stdout).into_iter().collect()
}

fn status(servers: &Servers, more: &[&str]) -> Finished {
    run(servers.tramline(&[&["status"], &OF[..], more].concat())).succeeded()
}

fn report(servers: &Servers, more: &[&str]) -> Value {
    let finished = status(servers, &[&["--json"], more].concat());
    assert_eq!(finished.stdout.len(), 1, "one line");
    serde_json::from_str(&finished.stdout[0]).expect("JSON")
}

fn lease(servers: &Servers, more: &[&str]) -> Finished {
    run(servers.tramline(&[&["lease"], &more[..1], &OF[..], &more[1..]].concat()))
}

/// Puts lines, each with a key of its own.
fn put_keys(servers: &Servers, from: usize, to: usize) {
    for (n, line) in (from..to).zip(lines(from, to)) {
        servers.put_lines(STREAM, &format!("key-{n}"), &[line]);
    }
}

fn all(from: usize, to: usize) -> BTreeSet<String> {
    lines(from, to).into_iter().collect()
}

#[test]
fn status_shows_who_reads_what_for_people_and_for_programs() {
    let servers = Servers::with_stream(STREAM, 2);
    put_keys(&servers, 0, 20);
    let running = worker(&servers, "w1", &["--checkpoint-interval", "100ms"]);
    running.wait_for_lines(20);
    let report = wait_for("both checkpoints", || {
        let report = report(&servers, &["--quick"]);
        let shards = report["shards"].as_array().expect("shards").clone();
        let has_checkpoint = |shard: &Value| {
            let checkpoint = shard["checkpoint"].as_str().unwrap_or_default();
            shard["owner"] == "w1" && checkpoint.bytes().all(|b| b.is_ascii_digit())
        };
        (shards.len() == 2 && shards.iter().all(has_checkpoint)).then_some(report)
    });
    assert_eq!((&report["stream"], &report["application"]), (&STREAM.into(), &"rtr".into()));
    assert_eq!(report["table"], "rtr");
    assert_eq!(report["shards"][0]["shard"], "shardId-000000000000");
    assert_eq!(report["shards"][0]["state"], "held", "one look does not tell whether it lives");
    assert_eq!(report["workers"][0]["worker"], "w1");
    assert_eq!(report["workers"][0]["shards"], 2);
    assert!(report["shards"][0].get("lag_ms").is_none(), "the stream was not asked");

    let seen = status(&servers, &["--lag", "--observe", "60s"]).stdout;
    assert!(seen.iter().all(|line| line.chars().count() <= 80), "{seen:#?}");
    for shard in ["shardId-000000000000", "shardId-000000000001"] {
        let line = seen.iter().find(|line| line.contains(shard)).expect("its line");
        assert!(line.contains("reading") && line.contains("w1"), "{line}");
        assert!(line.contains("0ms"), "it is read to its tip: {line}");
    }

    running.stop().succeeded();
    put_keys(&servers, 20, 40);
    let stopped = self::report(&servers, &["--lag"]);
    assert_eq!(stopped["workers"], serde_json::json!([]));
    for shard in stopped["shards"].as_array().expect("shards") {
        assert_eq!(shard["state"], "free");
        assert!(shard["lag_ms"].is_u64() && shard["checkpoint_age_ms"].is_u64(), "{shard}");
    }
}

#[test]
fn status_before_any_worker_and_on_a_pipe() {
    let servers = Servers::with_stream(STREAM, 1);
    let missing = run(servers.tramline(&[&["status"], &OF[..]].concat()));
    assert_eq!(missing.status.code(), Some(1));
    assert!(missing.stderr.contains("lease table rtr does not exist"), "{}", missing.stderr);
    consume_all(&servers, &[]);
    let watching = Running::start(servers.tramline(&[&["status", "--watch"], &OF[..]].concat()));
    wait_for("a second table", || {
        let tables = watching.stdout().iter().filter(|line| line.starts_with("SHARD")).count();
        (tables >= 2).then_some(())
    });
    let finished = watching.stop().succeeded();
    assert!(!finished.stdout.iter().any(|line| line.contains('\x1b')), "no terminal, no drawing");
}

#[test]
fn p1_a_reset_after_a_stop_delivers_again_and_a_dry_run_changes_nothing() {
    let servers = Servers::with_stream(STREAM, 2);
    put_keys(&servers, 0, 20);
    assert_eq!(consume_all(&servers, &[]), all(0, 20));
    let dry = lease(&servers, &["reset", "--to", "trim-horizon"]).succeeded().stdout;
    assert!(dry.iter().any(|line| line.contains("-> TRIM_HORIZON")), "{dry:?}");
    assert!(dry.last().is_some_and(|line| line.ends_with("--to trim-horizon --yes")), "{dry:?}");
    assert!(consume_all(&servers, &[]).is_empty(), "nothing was written");

    lease(&servers, &["reset", "--to", "trim-horizon", "--yes"]).succeeded();
    assert_eq!(consume_all(&servers, &[]), all(0, 20));

    // Of one shard, after one of its records.
    let number = servers.put(STREAM, "key-20", crate::support::event(&lines(20, 21)[0]));
    put_keys(&servers, 0, 40);
    let before = consume_all(&servers, &[]);
    assert_eq!(before, all(0, 40));
    let shards = report(&servers, &["--quick"])["shards"].clone();
    let reset =
        |shard: &str| lease(&servers, &["reset", "--to", &number, "--shard", shard, "--yes"]);
    let ids = ["shardId-000000000000", "shardId-000000000001"];
    let done = ids.iter().find(|shard| reset(shard).status.success());
    let done = done.expect("the number is in one of the shards, and refused in the other");
    let after = report(&servers, &["--quick"])["shards"].clone();
    for n in 0..2 {
        let moved = after[n]["checkpoint"] != shards[n]["checkpoint"];
        assert_eq!(moved, after[n]["shard"] == *done, "{after}");
    }
    assert!(consume_all(&servers, &[]).len() < 40);

    put_keys(&servers, 40, 50);
    lease(&servers, &["reset", "--to", "2020-01-01T00:00:00Z", "--yes"]).succeeded();
    assert_eq!(consume_all(&servers, &[]), all(0, 50));
}

#[test]
fn p1_a_reset_to_latest_is_pinned_to_its_moment() {
    let servers = Servers::with_stream(STREAM, 1);
    consume_all(&servers, &[]);
    lease(&servers, &["reset", "--to", "latest", "--yes"]).succeeded();
    let shard = report(&servers, &["--quick"])["shards"][0].clone();
    assert_eq!(shard["checkpoint"], "LATEST");
    assert!(shard["start_at"].is_string(), "{shard}");
    // What comes between the reset and the start of a worker is not skipped.
    put_keys(&servers, 0, 5);
    assert_eq!(consume_all(&servers, &[]), all(0, 5));
}

#[test]
fn p5_a_parent_that_is_read_again_is_read_before_its_children() {
    let servers = Servers::with_stream(STREAM, 1);
    let keys = ["a", "b", "c", "d", "e", "f"];
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
    assert_eq!(consume_all(&servers, &[]).len(), 12);
    let parent = ["reset", "--to", "trim-horizon", "--shard", "shardId-000000000000", "--yes"];
    let reset = lease(&servers, &parent).succeeded().stdout;
    assert_eq!(reset.len(), 3, "its children with it: {reset:?}");
    let waiting = report(&servers, &["--quick"])["shards"].clone();
    assert_eq!(
        (&waiting[1]["state"], &waiting[2]["state"]),
        (&"waiting".into(), &"waiting".into())
    );
    assert_eq!(waiting[1]["waiting_for"][0], "shardId-000000000000");

    let again = [&["consume", "--exit-when-idle", "1s"], &OF[..]].concat();
    let again = raws(&run(servers.tramline(&again)).succeeded().stdout);
    let generations: Vec<&str> = again.iter().filter_map(|raw| raw.split(',').next()).collect();
    assert_eq!(generations.len(), 12);
    assert!(generations.is_sorted(), "{generations:?}");
}

#[test]
fn p4_a_reset_is_refused_while_a_worker_reads_unless_forced() {
    let servers = Servers::with_stream(STREAM, 1);
    put_keys(&servers, 0, 5);
    let running = worker(&servers, "w1", &["--checkpoint-interval", "100ms"]);
    running.wait_for_lines(5);
    let reset = ["reset", "--to", "trim-horizon", "--observe", "60s"];
    let refused = lease(&servers, &[&reset[..], &["--yes"]].concat());
    assert_eq!(refused.status.code(), Some(1));
    for text in ["shardId-000000000000 is read by w1", "stop w1 first", "--force"] {
        assert!(refused.stderr.contains(text), "{}", refused.stderr);
    }
    let dry = lease(&servers, &reset).succeeded().stdout.join("\n");
    assert!(dry.contains("that is refused: shard shardId-000000000000 is read by w1"), "{dry}");
    let release = lease(&servers, &["release", "--observe", "60s", "--yes"]);
    assert_eq!(release.status.code(), Some(1));
    assert_eq!(running.stdout().len(), 5);

    lease(&servers, &[&reset[..], &["--yes", "--force"]].concat()).succeeded();
    running.wait_for_lines(10);
    assert_eq!(raws(&running.stdout())[5..], lines(0, 5));
    running.stop().succeeded();
}

#[test]
fn p1_a_release_lets_another_worker_take_over_from_a_dead_one() {
    let servers = Servers::with_stream(STREAM, 2);
    put_keys(&servers, 0, 20);
    let long = ["--lease-duration", "1h"];
    let mut dead = worker(&servers, "dead", &long);
    dead.wait_for_lines(20);
    dead.kill();
    let next = worker(&servers, "next", &long);
    wait_for("the dead worker's leases to be left alone", || {
        let report = report(&servers, &["--observe", "5s"]);
        let dead = &report["workers"][0];
        (dead["worker"] == "dead" && dead["renews"] == false).then_some(())
    });
    assert!(next.stdout().is_empty(), "the leases are good for an hour");
    let dry = lease(&servers, &["release"]).succeeded().stdout;
    assert!(dry[0].starts_with("shardId-000000000000: dead") && dry[0].ends_with("-> free"));
    lease(&servers, &["release", "--yes"]).succeeded();
    wait_for("the next worker to read", || {
        let seen: BTreeSet<String> = raws(&next.stdout()).into_iter().collect();
        let left = &report(&servers, &["--quick"])["workers"];
        (left.as_array()?.len() == 1 && left[0]["worker"] == "next" && left[0]["shards"] == 2)
            .then_some(seen)
    });
    put_keys(&servers, 20, 30);
    wait_for("what came later", || {
        let seen: BTreeSet<String> = raws(&next.stdout()).into_iter().collect();
        seen.is_superset(&all(20, 30)).then_some(())
    });
    next.stop().succeeded();
}

#[test]
fn what_cannot_be_reset_is_one_line() {
    let servers = Servers::with_stream(STREAM, 1);
    consume_all(&servers, &[]);
    for (args, text) in [
        (&["--to", "5"][..], "name it with one --shard"),
        (&["--to", "latest", "--shard", "shardId-9"], "has no shard shardId-9"),
        (&["--to", "2999-01-01T00:00:00Z"], "is in the future"),
    ] {
        let failed = lease(&servers, &[&["reset"], args].concat());
        assert_eq!(failed.status.code(), Some(1));
        assert!(failed.stderr.contains(text), "{}", failed.stderr);
        assert_eq!(failed.stderr.lines().count(), 1, "{}", failed.stderr);
    }
    let usage = lease(&servers, &["reset", "--to", "noon"]);
    assert_eq!(usage.status.code(), Some(2));
}
