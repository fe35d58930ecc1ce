use std::collections::BTreeSet;

use base64::{Engine as _, prelude::BASE64_STANDARD};

use crate::support::{Running, Servers, event, lines, raws, run, wait_for};

const STREAM: &str = "ctd-ocs-raw-messages";

fn consume<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&["consume", "--stream", STREAM, "--app", "rtr"], more].concat()
}

/// Consumes until nothing comes.
fn consume_all(servers: &Servers, more: &[&str]) -> Vec<String> {
    let idle = ["--exit-when-idle", "1s"];
    raws(&run(servers.tramline(&consume(&[&idle, more].concat()))).succeeded().stdout)
}

fn sorted(mut lines: Vec<String>) -> Vec<String> {
    lines.sort();
    lines
}

#[test]
fn p6_after_a_clean_stop_nothing_comes_twice_and_nothing_is_missing() {
    let servers = Servers::with_stream(STREAM, 2);
    for (n, line) in lines(0, 40).iter().enumerate() {
        servers.put_lines(STREAM, &format!("key-{n}"), std::slice::from_ref(line));
    }
    let first = Running::start(servers.tramline(&consume(&[])));
    first.wait_for_lines(40);
    let first = first.stop().succeeded();
    assert_eq!(sorted(raws(&first.stdout)), sorted(lines(0, 40)));

    for (n, line) in lines(40, 80).iter().enumerate() {
        servers.put_lines(STREAM, &format!("key-{n}"), std::slice::from_ref(line));
    }
    assert_eq!(sorted(consume_all(&servers, &[])), sorted(lines(40, 80)));
}

#[test]
fn p1_after_kill_9_nothing_is_missing() {
    let servers = Servers::with_stream(STREAM, 2);
    for n in 0..40 {
        servers.put_lines(STREAM, &format!("key-{n}"), &lines(n * 5, n * 5 + 5));
    }
    let mut first = Running::start(servers.tramline(&consume(&["--lease-duration", "2s"])));
    let mut seen: BTreeSet<String> = raws(&first.wait_for_lines(50)).into_iter().collect();
    first.kill();
    // Another worker, under another name: it waits until the leases of the dead one have run out.
    seen.extend(consume_all(&servers, &["--lease-duration", "2s"]));
    assert_eq!(seen, lines(0, 200).into_iter().collect());
}

#[test]
fn p2_a_worker_restarted_under_its_name_goes_on_at_once_in_order() {
    let servers = Servers::with_stream(STREAM, 1);
    servers.put_lines(STREAM, "k", &lines(0, 10));
    let named = ["--worker-id", "w1", "--lease-duration", "1h", "--checkpoint-interval", "100ms"];
    let mut first = Running::start(servers.tramline(&consume(&[&named[..], &["-v"]].concat())));
    first.wait_for_lines(10);
    first.kill();
    servers.put_lines(STREAM, "k", &lines(10, 20));
    // The lease is good for an hour: only its owner gets it back now.
    let rest = consume_all(&servers, &named);
    assert!(rest == lines(10, 20) || rest == lines(0, 20), "{rest:?}");
}

#[test]
fn p1_latest_is_pinned_when_the_shard_is_opened_so_a_crash_skips_nothing() {
    for retrieval in ["fan-out", "polling"] {
        let servers = Servers::with_stream(STREAM, 1);
        servers.put_lines(STREAM, "k", &lines(0, 5));
        let args = ["--start", "latest", "--retrieval", retrieval, "--worker-id", "w1", "-v"];
        let mut first = Running::start(servers.tramline(&consume(&args)));
        first.wait_for_log(if retrieval == "polling" {
            "shard iterator opened"
        } else {
            "subscribed"
        });
        first.kill();
        servers.put_lines(STREAM, "k", &lines(5, 10));
        // The pinned time is a few seconds early, in case our clock is ahead of the server's.
        let seen = consume_all(&servers, &args);
        assert!(seen.ends_with(&lines(5, 10)), "{retrieval}: {seen:?}");
    }
}

#[test]
fn start_positions_apply_to_shards_without_a_checkpoint() {
    let servers = Servers::with_stream(STREAM, 1);
    servers.put_lines(STREAM, "k", &lines(0, 3));
    assert_eq!(consume_all(&servers, &["--start", "service-day"]), lines(0, 3));
    assert!(
        consume_all(&servers, &["--start", "trim-horizon"]).is_empty(),
        "there is a checkpoint"
    );

    let all = ["--start", "2020-01-01T00:00:00Z", "--lease-table", "from-a-time"];
    assert_eq!(consume_all(&servers, &all), lines(0, 3));
    let later = jiff::Timestamp::now().to_string();
    // The embedded server cuts arrival times to the second.
    servers.put_lines(STREAM, "k", &lines(3, 6));
    let seen = consume_all(&servers, &["--start", &later, "--lease-table", "later"]);
    assert!(seen.ends_with(&lines(3, 6)), "{seen:?}");
}

#[test]
fn formats_are_one_line_a_message() {
    let servers = Servers::with_stream(STREAM, 1);
    servers.put_lines(STREAM, "k", &lines(0, 2));
    let print = |format, table| {
        let args = ["--exit-when-idle", "1s", "--format", format, "--lease-table", table];
        run(servers.tramline(&consume(&args))).succeeded().stdout
    };
    assert_eq!(print("raw", "raw"), lines(0, 2));
    let events: Vec<String> = lines(0, 2).iter().map(|line| event(line)).collect();
    assert_eq!(print("event", "event"), events);
    let json = print("json", "json");
    let first: serde_json::Value = serde_json::from_str(&json[0]).expect("JSON");
    assert_eq!(first["stream"], STREAM);
    assert_eq!(first["shard"], "shardId-000000000000");
    assert!(first["sequence_number"].is_string());
    assert_eq!(first["sub_sequence_number"], 0);
    assert_eq!(first["partition_key"], "k");
    assert!(first["arrived_at"].is_string());
    assert_eq!(first["event"]["id"], lines(0, 1)[0]);
    let second: serde_json::Value = serde_json::from_str(&json[1]).expect("JSON");
    assert_eq!(second["sub_sequence_number"], 1);
}

#[test]
fn p9_what_cannot_be_decoded_goes_to_stderr_with_its_place_and_bytes_and_stops_nothing() {
    let servers = Servers::with_stream(STREAM, 1);
    servers.put_lines(STREAM, "k", &lines(0, 1));
    let bad = b"\xff\x00 no event";
    let sequence_number = servers.put(STREAM, "bad key", bad);
    servers.put(
        STREAM,
        "k",
        format!(r#"[{{"type":"other"}},{}]"#, event("1,DIAG,12:00:00,line 1")),
    );
    let args = consume(&["--exit-when-idle", "1s"]);
    let finished = run(servers.tramline(&args)).succeeded();
    assert_eq!(raws(&finished.stdout), lines(0, 2));

    let letters: Vec<serde_json::Value> = finished
        .stderr
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .map(|line| line["dead_letter"].clone())
        .collect();
    assert_eq!(letters.len(), 2, "{}", finished.stderr);
    assert_eq!(letters[0]["stream"], STREAM);
    assert_eq!(letters[0]["shard"], "shardId-000000000000");
    assert_eq!(letters[0]["sequence_number"], sequence_number.as_str());
    assert_eq!(letters[0]["partition_key"], "bad key");
    assert!(letters[0]["reason"].as_str().is_some_and(|reason| reason.contains("not UTF-8")));
    let bytes = letters[0]["data_base64"].as_str().expect("bytes");
    assert_eq!(BASE64_STANDARD.decode(bytes).expect("Base64"), bad);
    assert_eq!(letters[1]["sub_sequence_number"], 0);
    assert!(finished.stderr.contains("undecodable=2"), "{}", finished.stderr);
}

#[test]
fn a_reader_that_goes_away_stops_the_worker_and_its_lease_is_released() {
    use std::{io::Read as _, process::Stdio};

    let servers = Servers::with_stream(STREAM, 1);
    servers.put_lines(STREAM, "k", &lines(0, 5));
    let mut child = servers
        .tramline(&consume(&["--format", "raw"]))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    let mut byte = [0];
    child.stdout.take().expect("piped").read_exact(&mut byte).expect("a first byte");
    servers.put_lines(STREAM, "k", &lines(5, 10));
    let output = child.wait_with_output().expect("an exit");
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{log}");
    assert!(
        log.contains("the reader of stdout has gone") && log.contains("lease released"),
        "{log}"
    );
}

#[test]
fn two_applications_each_get_every_message() {
    let servers = Servers::with_stream(STREAM, 1);
    servers.put_lines(STREAM, "k", &lines(0, 3));
    for app in ["one", "two"] {
        let args = ["consume", "--stream", STREAM, "--app", app, "--exit-when-idle", "1s"];
        assert_eq!(raws(&run(servers.tramline(&args)).succeeded().stdout), lines(0, 3));
    }
}

#[test]
fn p5_after_a_split_the_parent_is_read_to_its_end_before_its_children() {
    for retrieval in ["fan-out", "polling"] {
        let servers = Servers::with_stream(STREAM, 1);
        let keys = ["a", "b", "c", "d", "e", "f"];
        for key in keys {
            servers.put_lines(STREAM, key, &[format!("1,DIAG,12:00:00,{key}")]);
        }
        let running = Running::start(servers.tramline(&consume(&["--retrieval", retrieval])));
        running.wait_for_lines(6);
        let half = (u128::MAX / 2 + 1).to_string();
        let split = servers
            .kinesis
            .split_shard()
            .stream_name(STREAM)
            .shard_to_split("shardId-000000000000")
            .new_starting_hash_key(half);
        servers.wait(split.send()).expect("a split");
        for key in keys {
            servers.put_lines(STREAM, key, &[format!("2,DIAG,12:00:00,{key}")]);
        }
        let stdout = running.wait_for_lines(12);
        let seen = raws(&stdout);
        for key in keys {
            let of_key: Vec<&String> =
                seen.iter().filter(|raw| raw.ends_with(&format!(",{key}"))).collect();
            assert_eq!(
                of_key,
                [&format!("1,DIAG,12:00:00,{key}"), &format!("2,DIAG,12:00:00,{key}")]
            );
        }
        let shards: BTreeSet<String> = stdout
            .iter()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .filter_map(|line| line["shard"].as_str().map(str::to_owned))
            .collect();
        assert!(shards.len() >= 2, "{shards:?}");
        running.stop().succeeded();
    }
}

#[test]
fn p1_a_lease_row_that_is_deleted_under_a_worker_costs_no_message() {
    let servers = Servers::with_stream(STREAM, 1);
    let args = ["--start", "latest", "--checkpoint-interval", "1h", "-v"];
    let running = Running::start(servers.tramline(&consume(&args)));
    running.wait_for_log("subscribed");
    servers.put_lines(STREAM, "k", &lines(0, 10));
    running.wait_for_lines(10);
    servers.delete_lease("rtr", "shardId-000000000000");
    running.wait_for_log("was deleted from the table");
    servers.put_lines(STREAM, "k", &lines(10, 20));
    assert_eq!(raws(&running.wait_for_lines(20)), lines(0, 20));
    running.stop().succeeded();
}

#[test]
fn a_stream_that_was_deleted_and_made_again_is_not_half_resumed() {
    let servers = Servers::with_stream(STREAM, 1);
    servers.put_lines(STREAM, "k", &lines(0, 3));
    assert_eq!(consume_all(&servers, &[]), lines(0, 3));
    servers.wait(servers.kinesis.delete_stream().stream_name(STREAM).send()).expect("a stream");
    wait_for("the stream to be gone", || {
        let describe = servers.kinesis.describe_stream_summary().stream_name(STREAM);
        servers.wait(describe.send()).is_err().then_some(())
    });
    // Sequence numbers begin with the second of the stream's creation.
    std::thread::sleep(std::time::Duration::from_millis(2100));
    servers.create_stream(STREAM, 1);
    servers.put_lines(STREAM, "k", &lines(3, 6));
    let finished = run(servers.tramline(&consume(&["--exit-when-idle", "1s"])));
    assert_eq!(finished.status.code(), Some(1));
    let told = "the stream was deleted and made again under its name";
    assert!(finished.stderr.contains(told), "{}", finished.stderr);
    let anew = ["--lease-table", "anew"];
    assert_eq!(consume_all(&servers, &anew), lines(3, 6));
}
