//! Several streams in one worker.

use std::collections::BTreeSet;

use aws_sdk_dynamodb::types::AttributeValue;
use serde_json::Value;

use crate::support::{Finished, Running, Servers, lines, raws, run, wait_for};

const BOTH: [&str; 4] = ["--stream", "red", "--stream", "green"];

fn command<'a>(words: &[&'a str], streams: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    [words, streams, &["--app", "rtr"], more].concat()
}

fn consume(servers: &Servers, streams: &[&str], more: &[&str]) -> Finished {
    let more = [&["--exit-when-idle", "500ms"], more].concat();
    run(servers.tramline(&command(&["consume"], streams, &more)))
}

fn put(servers: &Servers, from: usize, to: usize) {
    for (n, line) in (from..to).zip(lines(from, to)) {
        let stream = if n.is_multiple_of(2) { "red" } else { "green" };
        servers.put_lines(stream, &format!("key-{n}"), &[line]);
    }
}

fn two_streams() -> Servers {
    let servers = Servers::with_stream("red", 2);
    servers.create_stream("green", 2);
    servers
}

fn sorted(mut lines: Vec<String>) -> Vec<String> {
    lines.sort();
    lines
}

fn rows(servers: &Servers) -> Vec<std::collections::HashMap<String, AttributeValue>> {
    let client = aws_sdk_dynamodb::Client::new(&servers.local.sdk_config());
    let scan = servers.wait(client.scan().table_name("rtr").send()).expect("a table");
    scan.items.unwrap_or_default()
}

#[test]
fn p1_p6_several_streams_are_read_by_one_worker_and_resumed() {
    let servers = two_streams();
    put(&servers, 0, 20);
    let first = consume(&servers, &BOTH, &[]).succeeded();
    assert_eq!(sorted(raws(&first.stdout)), sorted(lines(0, 20)));
    for line in &first.stdout {
        let line: Value = serde_json::from_str(line).expect("JSON");
        let n: usize = line["event"]["data"]["raw"]
            .as_str()
            .and_then(|raw| raw.split(',').next()?.parse().ok())
            .expect("a number");
        assert_eq!(line["stream"], if n.is_multiple_of(2) { "red" } else { "green" });
        assert!(line["shard"].as_str().expect("a shard").starts_with("shardId-"), "{line}");
    }
    put(&servers, 20, 30);
    let second = consume(&servers, &BOTH, &[]).succeeded();
    assert_eq!(sorted(raws(&second.stdout)), sorted(lines(20, 30)), "nothing twice");

    // The keys of the KCL's multi-stream mode: account:stream:creation epoch:shard.
    for row in rows(&servers) {
        let text = |name: &str| row[name].as_s().expect("a text").clone();
        let (stream, shard) = (text("streamName"), text("shardId"));
        assert_eq!(text("leaseKey"), format!("{stream}:{shard}"));
        let parts: Vec<&str> = stream.split(':').collect();
        assert!(
            matches!(parts[..], ["000000000000", "red" | "green", epoch] if epoch.parse::<u64>().is_ok()),
            "{stream}"
        );
    }
}

#[test]
fn p5_a_stream_among_several_is_resharded_and_read_on_in_order() {
    let servers = two_streams();
    put(&servers, 0, 8);
    let worker = Running::start(servers.tramline(&command(&["consume"], &BOTH, &[])));
    worker.wait_for_lines(8);
    let split = servers.kinesis.split_shard().stream_name("red");
    let split = split.shard_to_split("shardId-000000000000");
    let quarter = (u128::MAX / 4 + 1).to_string();
    servers.wait(split.new_starting_hash_key(quarter).send()).expect("a split");
    put(&servers, 8, 24);
    let stdout = worker.wait_for_lines(24);
    assert_eq!(sorted(raws(&stdout)), sorted(lines(0, 24)));
    let shards: BTreeSet<(String, String)> = stdout
        .iter()
        .map(|line| {
            let line: Value = serde_json::from_str(line).expect("JSON");
            let text = |key: &str| line[key].as_str().expect("a text").to_owned();
            (text("stream"), text("shard"))
        })
        .collect();
    assert!(
        shards
            .iter()
            .any(|(stream, shard)| stream == "red" && shard > &"shardId-000000000001".to_owned()),
        "a child is read: {shards:?}"
    );
    worker.stop().succeeded();
}

#[test]
fn two_workers_share_the_shards_of_several_streams() {
    let servers = two_streams();
    let worker =
        |id| Running::start(servers.tramline(&command(&["consume"], &BOTH, &["--worker-id", id])));
    let (one, two) = (worker("one"), worker("two"));
    let args = command(&["status"], &BOTH, &["--quick", "--json"]);
    let owners = wait_for("two shards each", || {
        let status = run(servers.tramline(&args));
        if !status.status.success() {
            return None; // There is no table yet.
        }
        let status: Value = serde_json::from_str(&status.stdout.concat()).expect("JSON");
        let owners: Vec<String> = status["shards"]
            .as_array()?
            .iter()
            .filter(|s| s["next_owner"].is_null())
            .filter_map(|s| Some(s["owner"].as_str()?.to_owned()))
            .collect();
        let of = |id: &str| owners.iter().filter(|owner| *owner == id).count();
        (of("one") == 2 && of("two") == 2).then_some(owners)
    });
    assert_eq!(owners.len(), 4);
    let text = run(servers.tramline(&command(&["status"], &BOTH, &["--quick"])))
        .succeeded()
        .stdout
        .join("\n");
    assert!(text.contains("red shardId-000000000000") && text.contains("green shardId-"), "{text}");
    one.stop().succeeded();
    two.stop().succeeded();
}

#[test]
fn p1_an_application_does_not_start_over_because_it_reads_several_streams_instead_of_one() {
    let servers = two_streams();
    put(&servers, 0, 4);
    consume(&servers, &["--stream", "red"], &[]).succeeded();
    let several = consume(&servers, &BOTH, &[]);
    assert_eq!(several.status.code(), Some(1));
    assert!(
        several.stderr.contains("of an application that reads one stream"),
        "{}",
        several.stderr
    );
    assert!(several.stdout.is_empty());

    let other = ["--lease-table", "other"];
    consume(&servers, &BOTH, &other).succeeded();
    let one = consume(&servers, &["--stream", "red"], &other);
    assert_eq!(one.status.code(), Some(1));
    assert!(one.stderr.contains("of an application that reads several streams"), "{}", one.stderr);
}
