//! `tramline check`: what is right passes, what is wrong is named, and nothing is changed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    process::Command,
};

use serde_json::Value;
use tramline::{
    lease::dynamodb::LeaseTable,
    permissions::{self, Resource, When},
};

use crate::{
    proxy::{Fault, Proxy, Rule},
    support::{Finished, Servers, run},
};

const STREAM: &str = "ctd-ocs-raw-messages";
const CONSUME: [&str; 6] = ["check", "--stream", STREAM, "--app", "rtr-green", "--json"];

struct Checked {
    finished: Finished,
    checks: Vec<Value>,
}

/// Runs it, and reads what it says.
fn check(command: Command) -> Checked {
    let finished = run(command);
    let [line] = finished.stdout.as_slice() else { panic!("one line: {finished:?}") };
    let report: Value = serde_json::from_str(line).expect("JSON");
    let checks = report["checks"].as_array().expect("a list").clone();
    let failed = checks.iter().filter(|check| check["outcome"] == "fail").count();
    assert_eq!(report["failed"], failed);
    assert_eq!(finished.status.code(), Some(i32::from(failed > 0)), "{finished:?}");
    Checked { finished, checks }
}

impl Checked {
    fn with(&self, outcome: &str) -> Vec<&Value> {
        self.checks.iter().filter(|check| check["outcome"] == outcome).collect()
    }

    fn only_failure(&self) -> &Value {
        let [failure] = self.with("fail")[..] else { panic!("one failure: {:#?}", self.checks) };
        failure
    }

    fn of(&self, check: &str) -> &Value {
        let found = self.checks.iter().find(|line| line["check"] == check);
        found.unwrap_or_else(|| panic!("{check} in {:#?}", self.checks))
    }
}

/// A stream, a lease table, buckets, and what a worker uses them for.
fn servers() -> Servers {
    let servers = Servers::with_stream(STREAM, 2);
    servers.create_stream("letters", 1);
    let config = servers.local.sdk_config();
    servers.wait(LeaseTable::new(&config, "rtr-green").ensure()).expect("a table");
    let s3 = s3(&servers);
    servers.wait(s3.create_bucket().bucket("state").send()).expect("a bucket");
    servers
}

fn s3(servers: &Servers) -> aws_sdk_s3::Client {
    let config = aws_sdk_s3::config::Builder::from(&servers.local.sdk_config());
    aws_sdk_s3::Client::from_conf(config.force_path_style(true).build())
}

/// Everything a worker can be told to use.
fn everything(retrieval: &'static str) -> Vec<&'static str> {
    let more = [
        "--retrieval",
        retrieval,
        "--checkpoint",
        "s3://state/green/{shard}.state",
        "--output",
        "s3-archive://state/archive",
    ];
    [&CONSUME[..], &more].concat()
}

fn with_kinesis_letters(retrieval: &'static str) -> Vec<&'static str> {
    [&everything(retrieval)[..], &["--dead-letters", "kinesis://letters"]].concat()
}

fn with_s3_letters(retrieval: &'static str) -> Vec<&'static str> {
    [&everything(retrieval)[..], &["--dead-letters", "s3://state/letters"]].concat()
}

/// Another command than `consume`, with what it can be told to use.
fn of(command: &'static str) -> Vec<&'static str> {
    let more: &[&str] = match command {
        "status" | "lease" => {
            &["--app", "rtr-green", "--checkpoint", "s3://state/green/{shard}.state"]
        }
        "redrive" => &["--dead-letters", "s3://state/letters"],
        _ => &[],
    };
    [&["check", "--stream", STREAM, "--for", command, "--json"], more].concat()
}

/// How many rows, objects and records there are.
fn contents(servers: &Servers) -> (i32, usize, usize) {
    let rows = servers.wait(servers.dynamodb().scan().table_name("rtr-green").send());
    let objects = servers.wait(s3(servers).list_objects_v2().bucket("state").send());
    let summary = servers.kinesis.describe_stream_summary().stream_name(STREAM);
    let summary = servers.wait(summary.send()).expect("a stream").stream_description_summary;
    let mut records = 0;
    for stream in [STREAM, "letters"] {
        let shards = servers.wait(servers.kinesis.list_shards().stream_name(stream).send());
        for shard in shards.expect("shards").shards.unwrap_or_default() {
            let opened = servers.kinesis.get_shard_iterator().stream_name(stream);
            let opened = opened
                .shard_id(shard.shard_id)
                .shard_iterator_type(aws_sdk_kinesis::types::ShardIteratorType::TrimHorizon);
            let iterator = servers.wait(opened.send()).expect("a shard").shard_iterator;
            let read = servers.kinesis.get_records().set_shard_iterator(iterator);
            records += servers.wait(read.send()).expect("records").records.len();
        }
    }
    let consumers = summary.and_then(|summary| summary.consumer_count).unwrap_or_default();
    let rows = rows.expect("rows").count;
    (rows + consumers, objects.expect("objects").contents().len(), records)
}

#[test]
fn where_all_is_well_all_passes_every_permission_has_a_line_and_nothing_is_changed() {
    let servers = servers();
    let before = contents(&servers);
    let mut lines = BTreeSet::new();
    for args in [
        with_kinesis_letters("auto"),
        with_kinesis_letters("polling"),
        with_s3_letters("fan-out"),
        of("produce"),
        of("status"),
        of("lease"),
        of("redrive"),
        of("replay"),
        [&of("replay")[..], &["--retrieval", "polling"]].concat(),
    ] {
        let checked = check(servers.tramline(&args));
        assert!(checked.with("fail").is_empty(), "{args:?}: {:#?}", checked.checks);
        lines.extend(
            checked.checks.iter().filter_map(|check| check["action"].as_str().map(String::from)),
        );
        // What is not tried is what is there already, or what would make it.
        for line in checked.with("not-tried") {
            let action = line["action"].as_str().unwrap_or_default();
            let makes = ["dynamodb:CreateTable", "kinesis:RegisterStreamConsumer"];
            assert!(makes.contains(&action), "{line:#}");
        }
    }
    let wanted: BTreeSet<String> =
        permissions::PERMISSIONS.iter().map(|row| row.action.to_owned()).collect();
    assert_eq!(lines, wanted);
    assert_eq!(contents(&servers), before);
}

#[test]
fn each_permission_that_is_missing_is_named() {
    let servers = servers();
    let proxy = Proxy::start(&servers);
    let kinesis_letters = |row: &permissions::Permission| row.on == Resource::DeadLetterStream;
    let is_needed = |row: &&permissions::Permission| {
        !matches!(row.when, When::Missing | When::Granted | When::Asked | When::Several)
    };
    for row in permissions::PERMISSIONS.iter().filter(is_needed) {
        let operation = match row.action.split_once(':').expect("an action").1 {
            "ListBucket" => "ListObjectsV2",
            operation => operation,
        };
        let retrieval = if row.when == When::Polling { "polling" } else { "fan-out" };
        let args = match row.command {
            permissions::Command::Redrive if kinesis_letters(row) => {
                vec![
                    "check",
                    "--stream",
                    STREAM,
                    "--for",
                    "redrive",
                    "--dead-letters",
                    "kinesis://letters",
                    "--json",
                ]
            }
            permissions::Command::Consume if kinesis_letters(row) => {
                with_kinesis_letters(retrieval)
            }
            permissions::Command::Consume => with_s3_letters(retrieval),
            permissions::Command::Replay => {
                [&of("replay")[..], &["--retrieval", retrieval]].concat()
            }
            command => of(match command {
                permissions::Command::Status => "status",
                permissions::Command::Lease => "lease",
                permissions::Command::Redrive => "redrive",
                _ => "produce",
            }),
        };
        let code =
            if row.action.starts_with("s3:") { "AccessDenied" } else { "AccessDeniedException" };
        let rule = proxy.add(Rule::on(operation, Fault::Refuse(code)));
        let mut command = proxy.tramline(&servers, &args);
        command.env("AWS_ENDPOINT_URL_S3", proxy.url());
        let checked = check(command);
        rule.lift();
        assert!(rule.hits() > 0, "{operation} is not called");
        let failures = checked.with("fail");
        // The same action may be needed on several resources.
        assert!(!failures.is_empty(), "{row:?}: {:#?}", checked.checks);
        for failure in failures {
            assert_eq!(failure["missing_action"], row.action, "{failure:#}");
            let repair = failure["repair"].as_str().expect("a repair");
            assert!(repair.contains(row.action), "{repair}");
        }
    }
}

#[test]
fn each_output_with_a_position_of_its_own_has_its_table_and_consumer_looked_at() {
    let servers = servers();
    let config = servers.local.sdk_config();
    servers.wait(LeaseTable::new(&config, "t-green").ensure()).expect("a table");
    let outputs = ["--output", "green=stdout", "--output", "blue=exec:cat", "--lease-table", "t"];
    let args = ["check", "--stream", STREAM, "--app", "rtr", "--json"];
    let checked = check(servers.tramline(&[&args[..], &outputs].concat()));
    assert!(checked.with("fail").is_empty(), "{:#?}", checked.checks);
    let told = |check: &str| checked.of(check)["detail"].as_str().expect("a text").to_owned();
    assert!(told("lease table t-green").starts_with("is there"));
    assert!(told("lease table t-blue").contains("not there yet"));
    for application in ["rtr-green", "rtr-blue"] {
        checked.of(&format!("fan-out consumer {application} of {STREAM}"));
    }
    // Redrive has to be told where the letters are.
    let checked =
        check(servers.tramline(&["check", "--stream", STREAM, "--for", "redrive", "--json"]));
    let repair = &checked.only_failure()["repair"];
    assert!(repair.as_str().expect("a text").contains("--dead-letters"));
}

#[test]
fn what_only_a_flag_needs_fails_nothing() {
    let servers = servers();
    let proxy = Proxy::start(&servers);
    proxy.add(Rule::on("GetShardIterator", Fault::Refuse("AccessDeniedException")));
    let checked = check(proxy.tramline(&servers, &of("status")));
    let told = checked.with("not-tried");
    let told = told[0]["detail"].as_str().expect("a text");
    assert!(told.contains("only needed for `--lag`"), "{told}");
}

#[test]
fn a_permission_that_is_only_of_use_is_not_asked_for() {
    let servers = servers();
    let proxy = Proxy::start(&servers);
    let denied = Fault::Refuse("AccessDeniedException");
    proxy.add(Rule::on("DescribeStreamSummary", denied));
    let args = ["check", "--stream", STREAM, "--for", "produce", "--json"];
    let checked = check(proxy.tramline(&servers, &args));
    let [line] = checked.with("not-tried")[..] else { panic!("{:#?}", checked.checks) };
    assert!(line["detail"].as_str().expect("a text").starts_with("not allowed, and not needed"));
}

#[test]
fn what_is_missing_is_told_with_what_makes_it() {
    let servers = Servers::start();
    let args = [
        "check",
        "--stream",
        "nowhere",
        "--app",
        "rtr",
        "--checkpoint",
        "s3://no-bucket/{shard}.state",
        "--dead-letters",
        "file:///no-such-folder/letters",
        "--json",
    ];
    let checked = check(servers.tramline(&args));
    let repairs: BTreeMap<&str, &str> = checked
        .with("fail")
        .into_iter()
        .map(|line| {
            (line["check"].as_str().expect("a text"), line["repair"].as_str().unwrap_or(""))
        })
        .collect();
    assert_eq!(
        repairs.keys().copied().collect::<Vec<_>>(),
        ["bucket no-bucket", "file of dead letters /no-such-folder/letters", "stream nowhere"]
    );
    assert!(repairs["stream nowhere"].contains("aws kinesis create-stream --stream-name nowhere"));
    assert!(repairs["bucket no-bucket"].contains("aws s3 mb s3://no-bucket"));
    // The first worker makes the table.
    let table = checked.of("lease table rtr");
    assert_eq!(table["outcome"], "pass");
    assert!(table["detail"].as_str().expect("a text").contains("dynamodb:CreateTable"));
}

#[test]
fn a_table_of_another_kind_is_no_lease_table() {
    use aws_sdk_dynamodb::types::{
        AttributeDefinition, BillingMode, KeySchemaElement, KeyType, ScalarAttributeType,
    };
    let servers = servers();
    let key = AttributeDefinition::builder().attribute_name("id");
    let schema = KeySchemaElement::builder().attribute_name("id").key_type(KeyType::Hash);
    let created = servers
        .dynamodb()
        .create_table()
        .table_name("orders")
        .attribute_definitions(key.attribute_type(ScalarAttributeType::S).build().expect("a key"))
        .key_schema(schema.build().expect("a schema"))
        .billing_mode(BillingMode::PayPerRequest)
        .send();
    servers.wait(created).expect("a table");
    let args = [&CONSUME[..], &["--lease-table", "orders"]].concat();
    let checked = check(servers.tramline(&args));
    let failures = checked.with("fail");
    assert_eq!(failures[0]["check"], "lease table orders");
    assert!(failures[0]["repair"].as_str().expect("a text").contains("--lease-table"));
}

#[test]
fn a_clock_that_is_wrong_is_told() {
    let servers = servers();
    let proxy = Proxy::start(&servers);
    proxy.add(Rule::on("DescribeTable", Fault::At("Wed, 02 Jul 2025 15:00:00 GMT")));
    proxy.add(Rule::on("*", Fault::At("Wed, 02 Jul 2025 15:00:00 GMT")));
    let checked = check(proxy.tramline(&servers, &CONSUME));
    let failure = checked.only_failure();
    assert_eq!(failure["check"], "clock");
    assert!(failure["detail"].as_str().expect("a text").contains("ahead of that of AWS"));
}

#[test]
fn calls_refused_because_of_the_clock_fail_the_clock_and_not_the_credentials() {
    let servers = servers();
    let proxy = Proxy::start(&servers);
    proxy.add(Rule::on("*", Fault::Refuse("RequestExpired")));
    let checked = check(proxy.tramline(&servers, &CONSUME));
    assert_eq!(checked.only_failure()["check"], "clock");
}

#[test]
fn no_region_no_credentials_wrong_credentials_and_no_answer_are_told_once_each() {
    let servers = servers();
    let mut command = servers.tramline(&CONSUME);
    command.env_remove("AWS_REGION").env_remove("AWS_DEFAULT_REGION");
    let checked = check(command);
    assert_eq!(checked.only_failure()["check"], "region");

    let mut command = servers.tramline(&CONSUME);
    command.env_remove("AWS_ACCESS_KEY_ID").env_remove("AWS_SECRET_ACCESS_KEY");
    assert_eq!(check(command).only_failure()["check"], "credentials");

    let proxy = Proxy::start(&servers);
    let rule = proxy.add(Rule::on("*", Fault::Refuse("UnrecognizedClientException")));
    let checked = check(proxy.tramline(&servers, &CONSUME));
    let failures = checked.with("fail");
    assert!(!failures.is_empty());
    assert!(failures.iter().all(|line| line["check"] == "credentials"), "{failures:#?}");
    rule.lift();

    let mut command = servers.tramline(&CONSUME);
    command.env("AWS_ENDPOINT_URL_KINESIS", "http://127.0.0.1:1");
    let checked = check(command);
    let failure = checked.only_failure();
    assert_eq!(failure["check"], "endpoint of kinesis");
    assert!(failure["repair"].as_str().expect("a text").contains("AWS_ENDPOINT_URL_KINESIS"));
}

#[test]
fn for_people_there_is_one_line_each_and_the_settings_of_consume_count() {
    let servers = servers();
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("tramline.toml");
    let toml = format!(
        "stream = \"{STREAM}\"\n[consume]\napp = \"rtr-green\"\n[produce]\nlisten = \"127.0.0.1:0\"\n"
    );
    fs::write(&file, toml).expect("a file");
    let finished =
        run(servers.tramline(&["check", "--config", &file.to_string_lossy()])).succeeded();
    assert!(finished.stdout.len() > 10);
    for line in &finished.stdout {
        let known = ["pass  ", "fail  ", "not tried  "];
        assert!(known.iter().any(|start| line.starts_with(start)), "{line}");
    }
    // Without an application there is nothing to check, and the exit code says so.
    let checked = check(servers.tramline(&["check", "--stream", STREAM, "--json"]));
    let failure = checked.only_failure();
    assert_eq!(failure["check"], "configuration");
    assert!(checked.finished.stderr.contains("1 of "), "{}", checked.finished.stderr);
}
