//! Kinesis that is slow, away, overloaded, or says what is not so.

use std::{
    io::Read as _,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use serde_json::{Value, json};
use tramline::local::LocalSettings;

use crate::{
    proxy::{Active, Call, Fault, Proxy, Rule},
    support::{Running, Servers, lines, raws, run, shards_of, wait_for},
};

/// Servers whose subscriptions last for a second, so that new ones are made all the time.
fn servers() -> Servers {
    Servers::start_with(LocalSettings {
        subscription_lifetime: Duration::from_secs(1),
        ..LocalSettings::default()
    })
}

fn worker(servers: &Servers, proxy: &Proxy, stream: &str, more: &[&str]) -> Running {
    let args = ["consume", "--stream", stream, "--app", stream];
    Running::start(proxy.tramline(servers, &[&args, more].concat()))
}

/// Reads a stream on which `rule` comes into force after the first lines, and expects every line once
/// and in order, and a clean stop.
fn reads_on(servers: &Servers, name: &str, retrieval: &str, rule: Rule) {
    servers.create_stream(name, 1);
    let proxy = Proxy::start(servers);
    let running = worker(servers, &proxy, name, &["--retrieval", retrieval]);
    servers.put_lines(name, "k", &lines(0, 10));
    running.wait_for_lines(10);
    let rule = proxy.add(rule);
    wait_for(format!("{name} to happen"), || (rule.hits() > 0).then_some(()));
    for n in 10..20 {
        servers.put_lines(name, "k", &lines(n, n + 1));
    }
    let stdout = running.wait_for_lines(20);
    assert_eq!(raws(&stdout), lines(0, 20), "{name}");
    let finished = running.stop();
    assert!(finished.status.success(), "{name}: {}", finished.stderr);
    assert_eq!(finished.stdout.len(), 20, "{name}");
    let warnings = finished.stderr.matches("WARN").count();
    assert!(warnings <= 2, "{name}: once is enough\n{}", finished.stderr);
}

#[test]
fn p1_p2_reads_that_fail_in_whatever_way_lose_and_repeat_nothing() {
    let servers = servers();
    let refused = Fault::Refuse;
    let cases = [
        ("throttled", "GetRecords", Fault::Throttle, 7),
        ("failed", "GetRecords", Fault::Fail, 7),
        ("reset", "GetRecords", Fault::Reset, 7),
        ("unheard", "GetRecords", Fault::LoseAnswer, 4),
        ("garbled", "GetRecords", Fault::Garble, 2),
        ("expired", "GetRecords", refused("ExpiredIteratorException"), 2),
        ("slow", "GetRecords", Fault::Delay(Duration::from_secs(1)), 2),
        ("busy-subscription", "SubscribeToShard", refused("ResourceInUseException"), 3),
        ("throttled-subscription", "SubscribeToShard", refused("LimitExceededException"), 4),
        ("failed-subscription", "SubscribeToShard", Fault::Fail, 4),
        ("garbled-subscription", "SubscribeToShard", Fault::Garble, 2),
        ("reset-subscription", "SubscribeToShard", Fault::Reset, 4),
        ("cut-subscription", "SubscribeToShard", Fault::CutAfter(1), 3),
    ];
    thread::scope(|scope| {
        for (name, operation, fault, times) in cases {
            let servers = &servers;
            let retrieval = if operation == "GetRecords" { "polling" } else { "fan-out" };
            let rule = Rule::on(operation, fault).times(times);
            scope.spawn(move || reads_on(servers, name, retrieval, rule));
        }
    });
}

#[test]
fn p1_calls_that_never_answer_are_given_up_and_made_again() {
    let servers = servers();
    thread::scope(|scope| {
        for (name, retrieval, rule) in [
            ("read", "polling", Rule::on("GetRecords", Fault::Hold).times(1)),
            ("subscription", "fan-out", Rule::on("SubscribeToShard", Fault::Hold).times(1)),
            ("events", "fan-out", Rule::on("SubscribeToShard", Fault::SilentAfter(1)).times(1)),
        ] {
            let servers = &servers;
            scope.spawn(move || reads_on(servers, name, retrieval, rule));
        }
        scope.spawn(|| {
            let name = "end";
            servers.create_stream(name, 1);
            let proxy = Proxy::start(&servers);
            let running = worker(&servers, &proxy, name, &["--retrieval", "polling"]);
            servers.put_lines(name, "k", &lines(0, 10));
            running.wait_for_lines(10);
            proxy.add(Rule::on("ListShards", Fault::Hold).times(1));
            split(&servers, name);
            servers.put_lines(name, "k", &lines(10, 20));
            assert_eq!(raws(&running.wait_for_lines(20)), lines(0, 20));
            running.stop().succeeded();
        });
    });
}

fn split(servers: &Servers, stream: &str) {
    let half = (u128::MAX / 2 + 1).to_string();
    let split = servers.kinesis.split_shard().stream_name(stream);
    let split = split.shard_to_split("shardId-000000000000").new_starting_hash_key(half);
    servers.wait(split.send()).expect("a split");
}

/// Reads an open shard whose end `rule` feigns, and expects that it is read on.
fn is_no_end(servers: &Servers, name: &str, retrieval: &str, rule: Rule) {
    servers.create_stream(name, 1);
    let proxy = Proxy::start(servers);
    let running = worker(servers, &proxy, name, &["--retrieval", retrieval]);
    servers.put_lines(name, "k", &lines(0, 10));
    running.wait_for_lines(10);
    let rule = proxy.add(rule);
    wait_for(format!("{name} to happen"), || (rule.hits() >= 2).then_some(()));
    for n in 10..15 {
        servers.put_lines(name, "k", &lines(n, n + 1));
    }
    running.wait_for_lines(15);
    let hits = rule.hits();
    wait_for(format!("{name} to happen again"), || (rule.hits() >= hits + 2).then_some(()));
    rule.lift();
    servers.put_lines(name, "k", &lines(15, 20));
    assert_eq!(raws(&running.wait_for_lines(20)), lines(0, 20), "{name}");
    let finished = running.stop().succeeded();
    assert!(!finished.stderr.contains("shard finished"), "{name}: {}", finished.stderr);
}

/// Takes a field out of the answers.
fn without(field: &'static str) -> Fault {
    Fault::EditAnswer(Box::new(move |answer: &mut Value| answer[field] = Value::Null))
}

#[test]
fn p1_what_looks_like_the_end_of_an_open_shard_is_not_believed() {
    let servers = servers();
    let with_children = Fault::EditAnswer(Box::new(|event: &mut Value| {
        event["ChildShards"] = json!([{
            "ShardId": "shardId-000000000001",
            "ParentShards": ["shardId-000000000000"],
            "HashKeyRange": {"StartingHashKey": "0", "EndingHashKey": u128::MAX.to_string()},
        }]);
    }));
    thread::scope(|scope| {
        for (name, retrieval, rule) in [
            ("no-iterator", "polling", Rule::on("GetRecords", without("NextShardIterator"))),
            (
                "no-continuation",
                "fan-out",
                Rule::on("SubscribeToShard", without("ContinuationSequenceNumber")),
            ),
            ("children", "fan-out", Rule::on("SubscribeToShard", with_children)),
        ] {
            let servers = &servers;
            scope.spawn(move || is_no_end(servers, name, retrieval, rule));
        }
    });
}

/// Expects no more calls than a budget of five a second, whatever time they took, and five at once.
fn no_storm(proxy: &Proxy, operation: &str) {
    let calls = proxy.calls(operation);
    let [first, .., last] = &calls[..] else { return };
    let allowed = 5.0 * (last.at - first.at).as_secs_f64() + 5.0;
    assert!(
        calls.len() as f64 <= allowed,
        "{operation}: {} calls, {allowed:.1} allowed",
        calls.len()
    );
}

#[test]
fn reads_that_never_worked_are_tried_again_without_a_storm() {
    let servers = servers();
    let refused = Fault::Refuse;
    let cases = [
        ("no-iterator", "GetRecords", without("NextShardIterator"), "GetShardIterator"),
        ("throttled", "GetRecords", Fault::Throttle, "GetRecords"),
        ("encrypted", "GetRecords", refused("KMSThrottlingException"), "GetRecords"),
        ("expired", "GetRecords", refused("ExpiredIteratorException"), "GetShardIterator"),
        ("iterator", "GetShardIterator", refused("KMSThrottlingException"), "GetShardIterator"),
        ("busy", "SubscribeToShard", refused("ResourceInUseException"), "SubscribeToShard"),
        ("short", "SubscribeToShard", Fault::EndAfter(0), "SubscribeToShard"),
    ];
    thread::scope(|scope| {
        for (name, operation, fault, counted) in cases {
            let servers = &servers;
            let retrieval = if operation == "SubscribeToShard" { "fan-out" } else { "polling" };
            scope.spawn(move || {
                servers.create_stream(name, 1);
                let proxy = Proxy::start(servers);
                let rule = proxy.add(Rule::on(operation, fault));
                let running = worker(servers, &proxy, name, &["--retrieval", retrieval]);
                servers.put_lines(name, "k", &lines(0, 10));
                wait_for("refused calls", || (rule.hits() >= 6).then_some(()));
                no_storm(&proxy, counted);
                rule.lift();
                assert_eq!(raws(&running.wait_for_lines(10)), lines(0, 10));
                running.stop().succeeded();
            });
        }
        scope.spawn(|| {
            let name = "registration";
            servers.create_stream(name, 1);
            let proxy = Proxy::start(&servers);
            let limit = "LimitExceededException";
            let rule = proxy.add(Rule::on("RegisterStreamConsumer", Fault::Refuse(limit)));
            let failed = worker(&servers, &proxy, name, &[]).finish();
            assert_eq!(failed.status.code(), Some(1));
            assert!(failed.stderr.contains("cannot be registered"), "{}", failed.stderr);
            assert!(rule.hits() <= 3, "{} attempts", rule.hits());
            rule.lift();

            let running = worker(&servers, &proxy, name, &[]);
            servers.put_lines(name, "k", &lines(0, 10));
            running.wait_for_lines(10);
            let rule = proxy.add(Rule::on("RegisterStreamConsumer", Fault::Refuse(limit)));
            let arn = format!("arn:aws:kinesis:us-east-1:000000000000:stream/{name}");
            let remove = servers.kinesis.deregister_stream_consumer().stream_arn(arn);
            servers.wait(remove.consumer_name(name).send()).expect("a consumer");
            wait_for("refused calls", || (rule.hits() >= 6).then_some(()));
            no_storm(&proxy, "RegisterStreamConsumer");
            rule.lift();
            servers.put_lines(name, "k", &lines(10, 20));
            assert_eq!(raws(&running.wait_for_lines(20)), lines(0, 20));
            running.stop().succeeded();
        });
    });
}

#[test]
fn p1_shards_that_are_listed_in_pages_are_all_read() {
    let servers = servers();
    servers.create_stream("pages", 3);
    let proxy = Proxy::start(&servers);
    // The embedded server gives out tokens for the next page, but does not take them.
    let one_by_one = Fault::EditRequest(Box::new(|request: &mut Value| {
        if request["NextToken"].is_string() {
            request["ExclusiveStartShardId"] = request["NextToken"].take();
            request["StreamName"] = json!("pages");
        }
        request["MaxResults"] = json!(1);
    }));
    proxy.add(Rule::on("ListShards", one_by_one));
    let running = worker(&servers, &proxy, "pages", &[]);
    for n in 0..30 {
        servers.put_lines("pages", &format!("key-{n}"), &lines(n, n + 1));
    }
    running.wait_for_lines(30);
    assert_eq!(shards_of(&running).len(), 3);
    let calls = proxy.calls("ListShards");
    let next = |call: &&Call| call.request["NextToken"].is_string();
    assert_eq!(calls.iter().filter(next).count(), 2);
    for call in calls.iter().filter(next) {
        assert!(call.request.get("StreamName").is_none(), "{}", call.request);
    }
    running.stop().succeeded();
}

/// ListShards answers so many times more.
fn list_only(proxy: &Proxy, times: usize, then: Fault) -> Active {
    let calls = AtomicUsize::new(0);
    let no_more = move |_: &Value| calls.fetch_add(1, Ordering::SeqCst) >= times;
    proxy.add(Rule::on("ListShards", then).when(no_more))
}

#[test]
fn p1_leases_are_taken_although_the_stream_cannot_be_listed() {
    let servers = servers();
    servers.create_stream("unlisted", 1);
    let proxy = Proxy::start(&servers);
    let running = worker(&servers, &proxy, "unlisted", &[]);
    running.wait_for_log("lease taken");
    // To believe the end, and to give the children their leases.
    let unlisted = list_only(&proxy, 2, Fault::Throttle);
    split(&servers, "unlisted");
    for n in 0..30 {
        servers.put_lines("unlisted", &format!("key-{n}"), &lines(n, n + 1));
    }
    running.wait_for_lines(30);
    assert!(unlisted.hits() > 0);
    running.stop().succeeded();
}

#[test]
fn p6_a_stop_at_the_end_of_a_shard_is_clean_although_the_stream_cannot_be_listed() {
    let servers = servers();
    servers.create_stream("end", 1);
    let proxy = Proxy::start(&servers);
    let running = worker(&servers, &proxy, "end", &["--checkpoint-interval", "1h"]);
    servers.put_lines("end", "k", &lines(0, 10));
    running.wait_for_lines(10);
    // To believe the end, but not to give the children their leases.
    let unlisted = list_only(&proxy, 1, Fault::Throttle);
    split(&servers, "end");
    // The SDK tries three times, so this is a second try of ours.
    wait_for("lists to fail", || (unlisted.hits() > 3).then_some(()));
    running.stop().succeeded();
    servers.put_lines("end", "k", &lines(10, 20));
    let args = ["consume", "--stream", "end", "--app", "end", "--exit-when-idle", "1s"];
    assert_eq!(raws(&run(servers.tramline(&args)).succeeded().stdout), lines(10, 20));
}

#[test]
fn p6_a_stop_does_not_wait_for_the_list_of_a_stream() {
    let servers = servers();
    servers.create_stream("held", 1);
    let proxy = Proxy::start(&servers);
    let running = worker(&servers, &proxy, "held", &[]);
    running.wait_for_log("lease taken");
    // To believe the end, and to give the children their leases; then comes the look.
    let held = list_only(&proxy, 2, Fault::Hold);
    split(&servers, "held");
    wait_for("a list that hangs", || (held.hits() == 1).then_some(()));
    running.stop().succeeded();
    assert_eq!(held.hits(), 1, "it was not tried again");
}

#[test]
fn p1_a_stderr_that_nobody_reads_stops_nothing() {
    let servers = servers();
    servers.create_stream("quiet", 1);
    let args = ["consume", "--stream", "quiet", "--app", "quiet", "-vv"];
    let (mut running, stdout, mut stderr) = Running::start_unread(servers.tramline(&args));
    running.read_stdout(stdout);
    for n in 0..10 {
        servers.put_lines("quiet", "k", &lines(n, n + 1));
        running.wait_for_lines(n + 1);
    }
    let finished = running.stop().succeeded();
    assert_eq!(raws(&finished.stdout), lines(0, 10));
    let mut log = Vec::new();
    stderr.read_to_end(&mut log).expect("a log");
    let log = String::from_utf8_lossy(&log);
    assert!(!log.contains("worker stopped"), "the pipe was not full: {} bytes", log.len());
}

#[test]
fn p1_a_clock_that_jumped_back_does_not_hold_up_a_shard_that_starts_at_a_time() {
    const HOUR_SECS: f64 = 3600.0;
    let servers = servers();
    servers.create_stream("clock", 1);
    let args =
        ["consume", "--stream", "clock", "--app", "clock", "--start", "2020-01-01T00:00:00Z"];
    run(servers.tramline(&[&args[..], &["--exit-when-idle", "1s"]].concat())).succeeded();
    // Written when the clock was right, which is an hour ahead of what it is now.
    let right = jiff::Timestamp::now() + jiff::SignedDuration::from_mins(59);
    servers.set_start("clock", "shardId-000000000000", right);
    servers.put_lines("clock", "k", &lines(0, 10));
    let proxy = Proxy::start(&servers);
    let shift = |value: &mut Value, secs: f64| {
        if let Some(at) = value.as_f64() {
            *value = json!(at + secs);
        }
    };
    let to_server = move |request: &mut Value| shift(&mut request["Timestamp"], -HOUR_SECS);
    let from_server = move |answer: &mut Value| {
        for record in answer["Records"].as_array_mut().into_iter().flatten() {
            shift(&mut record["ApproximateArrivalTimestamp"], HOUR_SECS);
        }
    };
    proxy.add(Rule::on("GetShardIterator", Fault::EditRequest(Box::new(to_server))));
    proxy.add(Rule::on("GetRecords", Fault::EditAnswer(Box::new(from_server))));
    let running = worker(&servers, &proxy, "clock", &["--retrieval", "polling"]);
    assert_eq!(raws(&running.wait_for_lines(10)), lines(0, 10));
    running.stop().succeeded();
}

#[test]
fn a_call_without_an_answer_is_followed_by_one_on_a_new_connection() {
    let servers = servers();
    servers.create_stream("connections", 8);
    let proxy = Proxy::start(&servers);
    let running = worker(&servers, &proxy, "connections", &["--retrieval", "polling"]);
    wait_for("all shards to be read", || (proxy.calls("GetRecords").len() > 16).then_some(()));
    // The reads of one shard: the others leave connections that could be used again.
    let of_one = Arc::new(Mutex::new(None));
    let first = of_one.clone();
    let same = move |request: &Value| {
        let mut first = first.lock().expect("a lock");
        let iterator = &request["ShardIterator"];
        first.get_or_insert_with(|| iterator.clone()) == iterator
    };
    // As often as the SDK tries.
    proxy.add(Rule::on("GetRecords", Fault::Reset).when(same).times(3));
    let reads = wait_for("the read to be tried again", || {
        let iterator = of_one.lock().expect("a lock").clone()?;
        let mut reads = proxy.calls("GetRecords");
        reads.retain(|call| call.request["ShardIterator"] == iterator);
        (reads.len() > 3).then_some(reads)
    });
    let before = ["DescribeStreamSummary", "ListShards", "GetShardIterator", "GetRecords"]
        .map(|operation| proxy.calls(operation))
        .concat();
    let newest = before.iter().filter(|call| call.at <= reads[2].at).map(|call| call.connection);
    assert!(newest.max() < Some(reads[3].connection), "{reads:#?}");
    running.stop().succeeded();
}

#[test]
fn a_stream_that_is_deleted_under_a_worker_ends_it_at_once_with_an_error_that_says_so() {
    let servers = servers();
    for retrieval in ["polling", "fan-out"] {
        servers.create_stream(retrieval, 1);
        let args = ["consume", "--stream", retrieval, "--app", retrieval];
        let args = [&args[..], &["--retrieval", retrieval]].concat();
        let running = Running::start(servers.tramline(&args));
        servers.put_lines(retrieval, "k", &lines(0, 5));
        running.wait_for_lines(5);
        let delete = servers.kinesis.delete_stream().stream_name(retrieval);
        servers.wait(delete.enforce_consumer_deletion(true).send()).expect("a deletion");
        let finished = running.finish();
        assert_eq!(finished.status.code(), Some(1), "{}", finished.stderr);
        let last = finished.stderr.lines().last().unwrap_or_default();
        assert!(last.contains(&format!("stream {retrieval} does not exist")), "{last}");
        // The discovery of shards would find out too, within a minute.
        assert!(!finished.stderr.contains("trying again until it works"), "{}", finished.stderr);
    }
}
