//! DynamoDB that is slow, away, overloaded, or heard of too late.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    thread,
};

use serde_json::Value;

use crate::{
    proxy::{Fault, Proxy, Rule},
    support::{
        Running, Servers, Traffic, event, lines, raws, run, shards_of, wait_for, wait_for_all,
    },
};

const STREAM: &str = "ctd-ocs-raw-messages";

fn worker(servers: &Servers, proxy: &Proxy, id: &str, more: &[&str]) -> Running {
    let args = ["consume", "--stream", STREAM, "--app", "rtr", "--worker-id", id];
    Running::start(proxy.tramline(servers, &[&args, more].concat()))
}

/// What an UpdateItem of a lease is for.
fn purpose(request: &Value) -> &'static str {
    let update = request["UpdateExpression"].as_str().unwrap_or_default();
    let sets = |attribute: &str| request["ExpressionAttributeValues"].get(attribute).is_some();
    let (_, removed) = update.split_once("REMOVE").unwrap_or_default();
    match () {
        () if update.contains("#bell") => "ring",
        () if sets(":checkpointOwner") => "ask",
        () if sets(":leaseOwner") => "take",
        () if request["ExpressionAttributeValues"][":checkpoint"]["S"] == "SHARD_END" => "end",
        () if removed.contains("#leaseOwner") || removed.contains("#checkpointOwner") => "release",
        () if sets(":startAtMillis") => "pin",
        () if sets(":checkpoint") => "checkpoint",
        () => "renewal",
    }
}

fn of(request: &Value, purposes: &[&str]) -> bool {
    purposes.contains(&purpose(request))
}

#[test]
fn p6_a_lease_is_handed_over_although_the_answer_to_the_ask_was_lost() {
    let servers = Servers::with_stream(STREAM, 2);
    let proxy = Proxy::start(&servers);
    let long = ["--lease-duration", "1h"];
    let first = worker(&servers, &proxy, "first", &long);
    wait_for("the first worker to have both", || {
        (first.stderr().matches("lease taken").count() == 2).then_some(())
    });
    // Long enough for the reader to renew, to see that it was asked and to let go.
    let lost = Rule::on("UpdateItem", Fault::HoldAnswer).when(|update| of(update, &["ask"]));
    let lost = proxy.add(lost.times(2));
    let second = worker(&servers, &proxy, "second", &long);
    first.wait_for_log("lease released");
    second.wait_for_log("lease taken");
    assert_eq!(lost.hits(), 2);
    for n in 0..20 {
        servers.put_lines(STREAM, &format!("key-{n}"), &lines(n, n + 1));
    }
    wait_for("both to read", || {
        (shards_of(&first).len() == 1 && shards_of(&second).len() == 1).then_some(())
    });
    first.stop().succeeded();
    second.stop().succeeded();
}

#[test]
fn p6_a_stop_is_clean_although_the_answer_to_the_release_was_lost_and_the_lease_is_taken_again() {
    let servers = Servers::with_stream(STREAM, 1);
    let proxy = Proxy::start(&servers);
    let rarely = ["--checkpoint-interval", "1h"];
    let first = worker(&servers, &proxy, "first", &rarely);
    servers.put_lines(STREAM, "k", &lines(0, 10));
    first.wait_for_lines(10);
    let second = worker(&servers, &proxy, "second", &rarely);
    wait_for("the second worker to look", || {
        let looks = proxy.calls("Scan").len();
        (looks > 3).then_some(())
    });
    let lost = Rule::on("UpdateItem", Fault::HoldAnswer).when(|update| of(update, &["release"]));
    let lost = proxy.add(lost.times(1));
    first.signal("TERM");
    second.wait_for_log("lease taken");
    first.finish().succeeded();
    assert_eq!(lost.hits(), 1);
    servers.put_lines(STREAM, "k", &lines(10, 20));
    second.wait_for_lines(10);
    assert_eq!(raws(&second.stop().succeeded().stdout), lines(10, 20), "none came twice");
}

/// The answers to how many writes of each kind were lost.
type Lost = Arc<Mutex<BTreeMap<&'static str, usize>>>;

/// Loses the answers to `lose` writes of each kind to each lease, lets one pass, and so on.
fn lose_answers(proxy: &Proxy, lose: usize) -> Lost {
    let lost = Lost::default();
    let (counted, seen) = (lost.clone(), Mutex::new(BTreeMap::<_, usize>::new()));
    let loses = move |request: &Value| {
        let (kind, key) = match request {
            _ if request.get("ConditionExpression").is_none() => return false,
            _ if request.get("Item").is_some() => ("create", &request["Item"]["leaseKey"]),
            _ => (purpose(request), &request["Key"]["leaseKey"]),
        };
        // Leases are created one after the other: one lost answer each takes long enough.
        let lose = if kind == "create" { 1 } else { lose };
        let mut seen = seen.lock().expect("a lock");
        let nth = seen.entry((kind, key.to_string())).or_default();
        *nth += 1;
        let loses = (*nth - 1) % (lose + 1) < lose;
        *counted.lock().expect("a lock").entry(kind).or_default() += usize::from(loses);
        loses
    };
    proxy.add(Rule::on("*", Fault::LoseAnswer).when(loses));
    lost
}

#[test]
fn p1_p6_writes_whose_answers_are_lost_cost_no_message_no_lease_and_no_repeat() {
    thread::scope(|scope| {
        // The SDK tries three times: if one answer is lost, it hears of the write at its second attempt;
        // if three are, it is the worker that tries again.
        for lose in [1, 3] {
            scope.spawn(move || {
                let servers = Arc::new(Servers::with_stream(STREAM, 2));
                let proxy = Proxy::start(&servers);
                let often = ["--lease-duration", "30s", "--checkpoint-interval", "300ms"];
                let traffic = Traffic::start(&servers, STREAM);
                let lost = lose_answers(&proxy, lose);
                let first = worker(&servers, &proxy, "first", &often);
                wait_for("the first worker to read", || {
                    (shards_of(&first).len() == 2).then_some(())
                });
                let second = worker(&servers, &proxy, "second", &often);
                wait_for("the second worker to read", || {
                    (!shards_of(&second).is_empty()).then_some(())
                });
                let half = (u128::MAX / 4).to_string();
                let split = servers.kinesis.split_shard().stream_name(STREAM);
                let split = split.shard_to_split("shardId-000000000000");
                servers.wait(split.new_starting_hash_key(half).send()).expect("a split");
                wait_for("the children to be read", || {
                    let read = &shards_of(&first) | &shards_of(&second);
                    (read.len() == 4).then_some(())
                });
                second.signal("TERM");
                second.wait_for_log("worker stopped");
                let sent = traffic.finish();
                let counted = wait_for_all(&[&first, &second], &sent);
                let repeated: Vec<_> = counted.iter().filter(|(_, count)| **count > 1).collect();
                assert!(repeated.is_empty(), "{repeated:?}");
                second.finish().succeeded();
                let first = first.stop().succeeded();
                assert!(!first.stderr.contains("delivery of the shard stops"), "{}", first.stderr);
                let again =
                    ["consume", "--stream", STREAM, "--app", "rtr", "--exit-when-idle", "1s"];
                let again = run(servers.tramline(&again)).succeeded();
                assert!(again.stdout.is_empty(), "{:?}", again.stdout);
                let lost = lost.lock().expect("a lock");
                for kind in ["create", "take", "ask", "renewal", "checkpoint", "release", "end"] {
                    assert!(lost.get(kind).is_some_and(|lost| *lost > 0), "{kind}: {lost:?}");
                }
            });
        }
    });
}

#[test]
fn p4_throttling_shorter_than_the_lease_costs_nothing_and_is_told_once() {
    let servers = Arc::new(Servers::with_stream(STREAM, 1));
    let proxy = Proxy::start(&servers);
    let args = ["--lease-duration", "30s", "--checkpoint-interval", "100ms"];
    let running = worker(&servers, &proxy, "w", &args);
    running.wait_for_log("lease taken");
    let traffic = Traffic::start(&servers, STREAM);
    let throttled = proxy.add(Rule::on("UpdateItem", Fault::Throttle));
    // The SDK tries three times, so this is four writes and more.
    wait_for("some writes to fail", || (throttled.hits() > 12).then_some(()));
    throttled.lift();
    running.wait_for_log("checkpoint stored again");
    let sent = traffic.finish();
    running.wait_for_lines(sent.len());
    let finished = running.stop().succeeded();
    assert_eq!(raws(&finished.stdout), sent);
    let told = |text: &str| finished.stderr.matches(text).count();
    assert_eq!(told("delivery of the shard stops"), 0, "{}", finished.stderr);
    assert_eq!(told("checkpoint not stored"), 1, "{}", finished.stderr);
    assert!(told("lease not renewed") <= 1, "{}", finished.stderr);
}

/// How many leases a worker has, by its log.
fn leases(worker: &Running) -> usize {
    let log = worker.stderr();
    let count = |text: &str| log.matches(text).count();
    count("lease taken") - count("lease released") - count("delivery of the shard stops")
}

#[test]
fn p4_throttling_longer_than_the_lease_stops_delivery_before_another_worker_starts() {
    let servers = Servers::with_stream(STREAM, 2);
    let proxy = Proxy::start(&servers);
    let short = ["--lease-duration", "3s"];
    let first = worker(&servers, &proxy, "first", &short);
    let second = worker(&servers, &Proxy::start(&servers), "second", &short);
    let one_each = || (leases(&first) == 1 && leases(&second) == 1).then_some(());
    wait_for("one shard each", one_each);
    let put = |from, to| {
        for n in from..to {
            servers.put_lines(STREAM, &format!("key-{n}"), &lines(n, n + 1));
        }
    };
    put(0, 20);
    wait_for_all(&[&first, &second], &lines(0, 20));

    let throttled =
        proxy.add(Rule::on("*", Fault::Throttle).when(|request| request["TableName"].is_string()));
    wait_for("the second worker to have both", || (leases(&second) == 2).then_some(()));
    let delivered = first.stdout();
    put(20, 40);
    wait_for("the second worker to read both", || {
        let seen: BTreeSet<String> = raws(&second.stdout()).into_iter().collect();
        lines(20, 40).iter().all(|line| seen.contains(line)).then_some(())
    });
    assert_eq!(first.stdout(), delivered, "nothing came from the worker that lost its lease");
    assert_eq!(leases(&first), 0);

    throttled.lift();
    wait_for("one shard each again", one_each);
    put(40, 60);
    wait_for_all(&[&first, &second], &lines(40, 60));
    let first = first.stop().succeeded();
    assert_eq!(first.stderr.matches("looking for leases failed").count(), 1, "{}", first.stderr);
    second.stop().succeeded();
}

#[test]
fn p4_calls_that_never_answer_cost_neither_the_lease_nor_the_process() {
    let servers = Servers::with_stream(STREAM, 1);
    let proxy = Proxy::start(&servers);
    let renewal = Rule::on("UpdateItem", Fault::Hold).when(|update| of(update, &["renewal"]));
    let renewal = proxy.add(renewal.times(1));
    let running = worker(&servers, &proxy, "w", &[]);
    wait_for("a renewal that hangs", || (renewal.hits() == 1).then_some(()));
    let look = proxy.add(Rule::on("Scan", Fault::Hold).times(1));
    servers.put_lines(STREAM, "k", &lines(0, 10));
    running.wait_for_lines(10);
    let renewals = || {
        let calls = proxy.calls("UpdateItem");
        calls.iter().filter(|call| of(&call.request, &["renewal"])).count()
    };
    wait_for("it to be tried again, and the next one", || (renewals() >= 3).then_some(()));
    wait_for("a look that hangs", || (look.hits() == 1).then_some(()));
    servers.put_lines(STREAM, "k", &lines(10, 20));
    running.wait_for_lines(20);
    let finished = running.stop().succeeded();
    assert!(!finished.stderr.contains("WARN"), "{}", finished.stderr);
}

#[test]
fn p6_a_stop_comes_to_an_end_although_dynamodb_never_answers() {
    let servers = Servers::with_stream(STREAM, 1);
    let proxy = Proxy::start(&servers);
    let args = ["--lease-duration", "2s", "--checkpoint-interval", "1h"];
    let running = worker(&servers, &proxy, "w", &args);
    servers.put_lines(STREAM, "k", &lines(0, 10));
    running.wait_for_lines(10);
    proxy.add(Rule::on("*", Fault::Hold).when(|request| request["TableName"].is_string()));
    let finished = running.stop();
    assert_eq!(finished.status.code(), Some(1));
    let told = "its lease was lost during the stop, before the last checkpoint was stored";
    assert!(finished.stderr.contains(told), "{}", finished.stderr);
}

#[test]
fn p1_a_lease_table_that_is_deleted_ends_the_workers_with_an_error_that_says_so() {
    let servers = Servers::with_stream(STREAM, 2);
    let proxy = Proxy::start(&servers);
    let short = ["--lease-duration", "3s"];
    let workers = ["first", "second"].map(|id| worker(&servers, &proxy, id, &short));
    servers.put_lines(STREAM, "k", &lines(0, 10));
    wait_for_all(&workers.each_ref(), &lines(0, 10));
    servers.wait(servers.dynamodb().delete_table().table_name("rtr").send()).expect("a table");
    for worker in workers {
        let finished = worker.finish();
        assert_eq!(finished.status.code(), Some(1));
        let last = finished.stderr.lines().last().unwrap_or_default();
        assert!(last.contains("lease table rtr does not exist: it was deleted"), "{last}");
    }
}

/// The checkpoint of the only shard as its row has it.
fn checkpoint(servers: &Servers) -> String {
    let scanned =
        servers.wait(servers.dynamodb().scan().table_name("rtr").send()).expect("a table");
    scanned.items()[0]["checkpoint"].as_s().expect("a text").clone()
}

#[test]
fn p3_p4_a_checkpoint_of_a_paused_worker_that_arrives_after_another_one_took_over_is_refused() {
    let servers = Servers::with_stream(STREAM, 1);
    let proxy = Proxy::start(&servers);
    let fast = ["--lease-duration", "2s", "--checkpoint-interval", "100ms"];
    let first = worker(&servers, &proxy, "first", &fast);
    let late = Rule::on("UpdateItem", Fault::Hold)
        .when(|update| of(update, &["checkpoint"]) && !update.to_string().contains("TRIM_HORIZON"));
    let late = proxy.add(late.times(1));
    servers.put_lines(STREAM, "k", &lines(0, 10));
    wait_for("a checkpoint on its way", || (late.hits() == 1).then_some(()));
    first.signal("STOP");
    let second = worker(&servers, &proxy, "second", &fast);
    second.wait_for_log("lease taken");
    servers.put_lines(STREAM, "k", &lines(10, 20));
    wait_for("the second worker to go on", || {
        raws(&second.stdout()).ends_with(&lines(10, 20)).then_some(())
    });
    let last = servers.put(STREAM, "k", event(&lines(20, 21)[0]));
    wait_for("its checkpoint", || (checkpoint(&servers) == last).then_some(()));
    late.lift();
    first.signal("CONT");
    first.wait_for_log("delivery of the shard stops");
    assert_eq!(checkpoint(&servers), last, "it did not go back");
    assert_eq!(raws(&first.stdout()), lines(0, 10));
    first.stop().succeeded();
    second.stop().succeeded();
}

#[test]
fn p5_every_read_of_the_lease_table_is_consistent() {
    // Smaller tables are scanned by every worker.
    let servers = Servers::with_stream(STREAM, 12);
    let proxy = Proxy::start(&servers);
    let workers = ["1", "2", "3"].map(|id| worker(&servers, &proxy, id, &[]));
    // The third worker reads the row with the bell only.
    wait_for("a worker to look at the bell", || (!proxy.calls("GetItem").is_empty()).then_some(()));
    for call in [proxy.calls("Scan"), proxy.calls("GetItem")].concat() {
        assert_eq!(call.request["ConsistentRead"], true, "{call:?}");
    }
    for worker in workers {
        worker.stop().succeeded();
    }
}
