//! What a running process tells over HTTP.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
};

use serde_json::Value;

use crate::{
    proxy::{Fault, Proxy, Rule},
    support::{Running, Servers, lines, run, wait_for},
};

const STREAM: &str = "ctd-ocs-raw-messages";

fn consumer(mut command: std::process::Command, more: &[&str]) -> Running {
    command.args(["--stream", STREAM, "--app", "rtr", "--http", "127.0.0.1:0"]).args(more);
    Running::start(command)
}

/// Where it answers.
fn address(running: &Running) -> SocketAddr {
    wait_for("the address of the status page", || {
        let log = running.stderr();
        let (_, rest) = log.split_once("status page at http://")?;
        rest.split_once('/')?.0.parse().ok()
    })
}

/// The status code and the body.
fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).expect("connected");
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status code");
    (code, body.to_owned())
}

/// The words for why it is not ready.
fn reasons(address: SocketAddr) -> Vec<String> {
    let (code, body) = get(address, "/readyz");
    let answer: Value = serde_json::from_str(&body).expect("JSON");
    assert_eq!(code == 200, answer["ready"] == true, "{code} {body}");
    let reasons = answer["reasons"].as_array().expect("reasons").iter();
    reasons.map(|reason| reason["reason"].as_str().expect("a word").to_owned()).collect()
}

/// The value of a metric, added up over its labels.
fn metric(address: SocketAddr, name: &str) -> Option<f64> {
    metric_of(address, name, "")
}

/// The same of those samples whose labels have this text.
fn metric_of(address: SocketAddr, name: &str, label: &str) -> Option<f64> {
    let (code, text) = get(address, "/metrics");
    assert_eq!(code, 200);
    assert!(text.ends_with("# EOF\n"), "{text}");
    let of_name = |line: &&str| line.split(['{', ' ']).next() == Some(name) && line.contains(label);
    let values = text.lines().filter(of_name).map(|line| {
        let value = line.rsplit(' ').next().unwrap_or_default();
        value.parse::<f64>().expect("a number")
    });
    let values: Vec<f64> = values.collect();
    (!values.is_empty()).then(|| values.iter().sum())
}

#[test]
fn readiness_follows_the_leases_and_says_why_not() {
    let servers = Servers::with_stream(STREAM, 2);
    let proxy = Proxy::start(&servers);
    let scans_fail = proxy.add(Rule::on("Scan", Fault::Throttle));
    let running = consumer(proxy.tramline(&servers, &["consume"]), &["--lease-duration", "2s"]);
    let address = address(&running);
    assert_eq!(get(address, "/healthz").0, 200);
    assert_eq!(reasons(address), ["starting"], "nothing is known of the leases");
    scans_fail.lift();
    wait_for("ready", || reasons(address).is_empty().then_some(()));
    wait_for("both leases", || {
        (metric(address, "tramline_leases_held") == Some(2.0)).then_some(())
    });

    let away: Vec<_> = ["Scan", "GetItem", "UpdateItem"]
        .map(|operation| proxy.add(Rule::on(operation, Fault::Reset)))
        .into();
    wait_for("the leases to be unknown", || {
        reasons(address).contains(&"leases-unknown".to_owned()).then_some(())
    });
    assert_eq!(get(address, "/healthz").0, 200, "it lives all the same");
    assert_eq!(metric(address, "tramline_ready"), Some(0.0));
    for rule in away {
        rule.lift();
    }
    wait_for("ready again", || reasons(address).is_empty().then_some(()));
    running.stop().succeeded();
}

#[test]
fn what_was_read_and_handled_is_counted_and_shown() {
    let servers = Servers::with_stream(STREAM, 2);
    let running = consumer(servers.tramline(&["consume"]), &[]);
    let address = address(&running);
    for n in 0..20 {
        servers.put_lines(STREAM, &format!("key-{n}"), &lines(n, n + 1));
    }
    servers.put(STREAM, "key", "no event");
    running.wait_for_lines(20);
    wait_for("the counts", || {
        let messages = metric(address, "tramline_shard_messages_total") == Some(20.0);
        (messages && metric(address, "tramline_shard_dead_letters_total") == Some(1.0))
            .then_some(())
    });
    assert_eq!(metric(address, "tramline_shard_records_total"), Some(21.0));
    assert_eq!(metric(address, "tramline_lease_moves_total"), Some(2.0));
    assert!(metric(address, "tramline_handler_calls_total") >= Some(2.0));
    let page: Value = serde_json::from_str(&get(address, "/status.json").1).expect("JSON");
    assert_eq!(page["workers"][0]["messages"], 20);
    assert_eq!(page["shards"].as_array().map(Vec::len), Some(2));
    assert!(get(address, "/").1.contains("<main>"));
    running.stop().succeeded();
}

#[test]
fn one_address_tells_of_every_output_and_is_ready_when_all_are() {
    let servers = Servers::with_stream(STREAM, 1);
    let proxy = Proxy::start(&servers);
    let blue_is_away = proxy.add(
        Rule::on("Scan", Fault::Throttle).when(|request| request["TableName"] == "rtr-tables-blue"),
    );
    let outputs = ["--output", "green=stdout", "--output", "blue=exec:cat >/dev/null"];
    let more = [&outputs[..], &["--lease-table", "rtr-tables"]].concat();
    let running = consumer(proxy.tramline(&servers, &["consume"]), &more);
    let address = address(&running);
    servers.put_lines(STREAM, "key", &lines(0, 7));
    running.wait_for_lines(7);
    wait_for("green to be ready", || {
        let (code, body) = get(address, "/readyz");
        let answer: Value = serde_json::from_str(&body).expect("JSON");
        let reasons = answer["reasons"].as_array().expect("reasons");
        let blue = reasons.iter().all(|reason| reason["application"] == "rtr-blue");
        (code == 503 && !reasons.is_empty() && blue).then_some(())
    });
    blue_is_away.lift();
    wait_for("both to be ready", || reasons(address).is_empty().then_some(()));
    for application in ["rtr-green", "rtr-blue"] {
        let label = format!("application=\"{application}\"");
        wait_for(format!("the messages of {application}"), || {
            let messages = metric_of(address, "tramline_shard_messages_total", &label);
            (messages == Some(7.0)).then_some(())
        });
    }
    let page: Value = serde_json::from_str(&get(address, "/status.json").1).expect("JSON");
    let of = |list: &str| -> Vec<String> {
        let names = page[list].as_array().expect("a list").iter();
        names.map(|row| row["application"].as_str().expect("a name").to_owned()).collect()
    };
    assert_eq!(of("workers"), ["rtr-green", "rtr-blue"]);
    assert_eq!(of("shards"), ["rtr-green", "rtr-blue"]);
    assert!(page["title"].as_str().is_some_and(|title| title.contains("rtr-green, rtr-blue")));
    running.stop().succeeded();
}

#[test]
fn a_shard_that_stopped_because_of_a_failure_makes_the_process_not_ready() {
    let servers = Servers::with_stream(STREAM, 2);
    // A place for dead letters that takes none.
    let dir = tempfile::tempdir().expect("a directory");
    let letters = format!("file://{}/letters.jsonl", dir.path().display());
    let running = consumer(servers.tramline(&["consume"]), &["--dead-letters", &letters]);
    let address = address(&running);
    wait_for("ready", || reasons(address).is_empty().then_some(()));
    std::fs::remove_dir_all(dir.path()).expect("the directory is gone");
    servers.put(STREAM, "key", "no event");
    wait_for("the shard to be named", || {
        reasons(address).iter().any(|reason| reason.starts_with("shard-")).then_some(())
    });
    running.stop();
}

#[test]
fn who_connects_and_says_nothing_holds_up_nobody() {
    let servers = Servers::with_stream(STREAM, 1);
    let running = consumer(servers.tramline(&["consume"]), &[]);
    let address = address(&running);
    let silent: Vec<TcpStream> =
        (0..40).map(|_| TcpStream::connect(address).expect("connected")).collect();
    assert_eq!(get(address, "/healthz").0, 200);
    drop(silent);
    running.stop().succeeded();
}

#[test]
fn an_address_that_is_taken_ends_the_start_with_what_to_do() {
    let servers = Servers::with_stream(STREAM, 1);
    let taken = TcpListener::bind("127.0.0.1:0").expect("an address");
    let address = taken.local_addr().expect("its address").to_string();
    let args = ["consume", "--stream", STREAM, "--app", "rtr", "--http", &address];
    let finished = run(servers.tramline(&args));
    assert_eq!(finished.status.code(), Some(1), "{}", finished.stderr);
    assert!(finished.stderr.contains(&format!("cannot listen on {address} for --http")));
    assert!(finished.stderr.contains("choose another address"), "{}", finished.stderr);
}

#[test]
fn p8_a_producer_is_ready_while_aws_is_away_and_tells_what_waits() {
    let servers = Servers::with_stream(STREAM, 1);
    let proxy = Proxy::start(&servers);
    let away = proxy.add(Rule::on("PutRecords", Fault::Reset));
    let spool = tempfile::tempdir().expect("a directory");
    let spool = spool.path().display().to_string();
    let producer = Running::start(proxy.tramline(
        &servers,
        &[
            "produce",
            "--stream",
            STREAM,
            "--listen",
            "127.0.0.1:0",
            "--http",
            "127.0.0.1:0",
            "--spool",
            &spool,
        ],
    ));
    let address = address(&producer);
    let ocs = wait_for("the listener", || {
        let log = producer.stderr();
        let (_, rest) = log.split_once("listening for OCS connections address=")?;
        rest.split_once(' ')?.0.parse::<SocketAddr>().ok()
    });
    let mut connection = TcpStream::connect(ocs).expect("connected");
    connection.write_all(b"1,TMOV,12:00:00,a\x042,TMOV,12:00:01,b\x04").expect("sent");
    wait_for("messages in the spool", || {
        let failing = metric(address, "tramline_put_failing_seconds") > Some(0.0);
        (failing && metric(address, "tramline_spool_messages") == Some(2.0)).then_some(())
    });
    assert!(reasons(address).is_empty(), "it keeps what arrives");
    away.lift();
    wait_for("both in Kinesis", || {
        (metric(address, "tramline_produce_put_messages_total") == Some(2.0)).then_some(())
    });
    wait_for("nothing to wait", || {
        (metric(address, "tramline_spool_messages") == Some(0.0)).then_some(())
    });
    let page: Value = serde_json::from_str(&get(address, "/status.json").1).expect("JSON");
    assert_eq!(page["producer"]["put"], 2);
    assert_eq!(page["producer"]["lanes"][0]["messages"], 2);
    drop(connection);
    producer.stop().succeeded();
}
