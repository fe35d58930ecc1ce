//! How long a fleet of real processes takes to share shards, at default settings, against embedded servers.
//! Prints Markdown.
//!
//! `cargo bench --bench fleet`, or `cargo bench --bench fleet -- 5 fleet` for five rounds of one part:
//! `fleet`, `cold` or `idle`.

#[path = "../it/support.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread::{self, sleep},
    time::{Duration, Instant},
};

use aws_sdk_kinesis::types::ConsumerStatus;
use rand::Rng as _;

use support::{Running, Servers, Traffic, lines, wait_for};

const STREAM: &str = "ctd-ocs-raw-messages";
const SHARDS: usize = 4;
const ROUNDS: usize = 20;
/// How long the requests of a lone worker are counted.
const MEASURED: Duration = Duration::from_secs(120);

fn main() {
    // Cargo adds `--bench`.
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let rounds = args.iter().find_map(|arg| arg.parse().ok()).unwrap_or(ROUNDS);
    let parts: Vec<&String> = args.iter().filter(|arg| arg.parse::<usize>().is_err()).collect();
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|wanted| *wanted == part);
    let mut times = Times::default();
    for round in 1..=rounds {
        if wanted("cold") {
            cold_starts(&mut times);
        }
        if wanted("fleet") {
            fleet(&mut times);
        }
        eprintln!("round {round} of {rounds}");
    }
    println!("Seconds, of {rounds} rounds:\n\n| from | to | median | worst |\n|--|--|--:|--:|");
    for ((from, to), mut times) in times.0 {
        times.sort_by(f64::total_cmp);
        println!(
            "| {from} | {to} | {:.2} | {:.2} |",
            times[times.len() / 2],
            times[times.len() - 1]
        );
    }
    if wanted("idle") {
        requests_of_a_lone_worker();
    }
}

#[derive(Default)]
struct Times(BTreeMap<(&'static str, &'static str), Vec<f64>>);

impl Times {
    fn add(&mut self, from: &'static str, to: &'static str, began: Instant, ended: Instant) {
        // A record may come before the exit of the process that read its shard before.
        let seconds = match ended.checked_duration_since(began) {
            Some(time) => time.as_secs_f64(),
            None => -(began - ended).as_secs_f64(),
        };
        self.0.entry((from, to)).or_default().push(seconds);
    }
}

/// A worker of an application.
struct Worker {
    running: Running,
    started: Instant,
}

impl Worker {
    fn start(servers: &Servers, app: &str, id: &str, more: &[&str]) -> Self {
        let args = ["consume", "--stream", STREAM, "--app", app, "--worker-id", id];
        let command = servers.tramline(&[&args, more].concat());
        Self { started: Instant::now(), running: Running::start(command) }
    }

    /// When a message of each of `shards` first came after `after`.
    fn first_messages(&self, shards: &BTreeSet<String>, after: Instant) -> Vec<Instant> {
        let (mut skipped, mut missing, mut found) = (0, shards.clone(), Vec::new());
        wait_for("messages", || {
            let new = self.running.timed_stdout(skipped);
            skipped += new.len();
            let new = new.iter().filter(|(at, _)| *at > after);
            found.extend(new.filter(|(_, line)| missing.remove(field(line, "shard"))).map(|n| n.0));
            missing.is_empty().then(|| found.clone())
        })
    }

    /// Waits until it has read from so many shards. Gives them, and when it read from the last of them.
    fn wait_for_shards(&self, count: usize) -> (BTreeSet<String>, Instant) {
        let (mut skipped, mut shards, mut last) = (0, BTreeSet::new(), self.started);
        wait_for("the shards to be read", || {
            let new = self.running.timed_stdout(skipped);
            skipped += new.len();
            for (at, line) in new {
                if shards.insert(field(&line, "shard").to_owned()) {
                    last = at;
                }
            }
            (shards.len() >= count).then(|| (shards.clone(), last))
        })
    }

    fn sequence_numbers(&self) -> Vec<String> {
        let lines = self.running.stdout();
        lines.iter().map(|line| field(line, "sequence_number").to_owned()).collect()
    }
}

/// A text of a line of `--format json`, without parsing all of it: there are many.
fn field<'a>(line: &'a str, name: &str) -> &'a str {
    let after = line.split_once(&format!("\"{name}\":\"")).map_or("", |(_, after)| after);
    after.split_once('"').map_or("", |(text, _)| text)
}

/// A second worker joins, stops, joins again and is killed.
fn fleet(times: &mut Times) {
    let servers = Arc::new(Servers::with_stream(STREAM, SHARDS as i32));
    let traffic = Traffic::start(&servers, STREAM);
    let first = Worker::start(&servers, "rtr", "first", &[]);
    first.wait_for_shards(SHARDS);
    // At any moment between two renewals.
    let some_time = || sleep(Duration::from_millis(rand::rng().random_range(5000..10_000)));

    some_time();
    let second = Worker::start(&servers, "rtr", "second", &[]);
    let (shards, shared) = second.wait_for_shards(SHARDS / 2);
    times.add(
        "start of a second worker",
        "it has read from half of the shards",
        second.started,
        shared,
    );
    some_time();
    let mut numbers = [first.sequence_numbers(), second.sequence_numbers()].concat();
    let all = numbers.len();
    numbers.sort();
    numbers.dedup();
    if numbers.len() < all {
        eprintln!("{} messages came twice", all - numbers.len());
    }

    let signalled = Instant::now();
    second.running.stop().succeeded();
    let exited = Instant::now();
    let taken = first.first_messages(&shards, signalled)[0];
    times.add("SIGTERM", "first message of one of its shards elsewhere", signalled, taken);
    times.add("exit after SIGTERM", "first message of one of its shards elsewhere", exited, taken);

    let mut third = Worker::start(&servers, "rtr", "third", &[]);
    let (shards, _) = third.wait_for_shards(SHARDS / 2);
    some_time();
    let killed = Instant::now();
    third.running.kill();
    let taken = first.first_messages(&shards, killed);
    times.add("kill -9", "first message of one of its shards elsewhere", killed, taken[0]);
    times.add("kill -9", "messages of all its shards elsewhere", killed, taken[taken.len() - 1]);
    traffic.finish();
}

/// A worker of a new application starts on shards with records in them.
fn cold_starts(times: &mut Times) {
    let servers = Servers::with_stream(STREAM, SHARDS as i32);
    for n in 0..100 {
        servers.put_lines(STREAM, &format!("key-{n}"), &lines(n, n + 1));
    }
    register_consumer(&servers, "registered");
    let retrievals = [
        ("start by polling", "polls", "polling"),
        ("start by fan-out, consumer registered", "registered", "fan-out"),
        ("start by fan-out, consumer not registered", "registers", "fan-out"),
    ];
    for (from, app, retrieval) in retrievals {
        let worker = Worker::start(&servers, app, "w", &["--retrieval", retrieval]);
        let (_, complete) = worker.wait_for_shards(SHARDS);
        let (first, _) = worker.running.timed_stdout(0)[0];
        times.add(from, "first message", worker.started, first);
        times.add(from, "messages of all shards", worker.started, complete);
    }
}

fn register_consumer(servers: &Servers, name: &str) {
    let kinesis = &servers.kinesis;
    servers.wait(async {
        let stream = kinesis.describe_stream_summary().stream_name(STREAM).send().await;
        let summary = stream.expect("a stream").stream_description_summary.expect("a summary");
        let register = kinesis.register_stream_consumer().stream_arn(summary.stream_arn);
        let registered = register.consumer_name(name).send().await.expect("a consumer");
        let consumer = registered.consumer.expect("a consumer");
        loop {
            let describe =
                kinesis.describe_stream_consumer().consumer_arn(consumer.consumer_arn.as_str());
            let described = describe.send().await.expect("a consumer").consumer_description;
            if described.is_some_and(|c| c.consumer_status == ConsumerStatus::Active) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
}

fn requests_of_a_lone_worker() {
    let servers = Arc::new(Servers::with_stream(STREAM, SHARDS as i32));
    let environment = servers.local.environment();
    let dynamodb = environment.iter().find(|(name, _)| name.ends_with("DYNAMODB"));
    let counted = Counted::start(dynamodb.expect("its address").1.trim_start_matches("http://"));
    let args = ["consume", "--stream", STREAM, "--app", "rtr"];
    let mut command = servers.tramline(&args);
    command.env("AWS_ENDPOINT_URL_DYNAMODB", &counted.url);
    let running = Running::start(command);
    wait_for("the leases", || {
        (running.stderr().matches("lease taken").count() == SHARDS).then_some(())
    });
    println!(
        "\nDynamoDB requests a minute of a lone worker with {SHARDS} shards, over {MEASURED:?}:\n\n\
         | | operation | a minute |\n|--|--|--:|"
    );
    let count = |what: &str| {
        sleep(Duration::from_secs(15));
        counted.operations.lock().expect("a lock").clear();
        sleep(MEASURED);
        let operations = counted.operations.lock().expect("a lock").clone();
        let minutes = MEASURED.as_secs_f64() / 60.0;
        for (operation, count) in &operations {
            println!("| {what} | {operation} | {:.1} |", *count as f64 / minutes);
        }
        let all: usize = operations.values().sum();
        println!("| {what} | all | {:.1} |", all as f64 / minutes);
    };
    count("idle");
    let traffic = Traffic::start(&servers, STREAM);
    count("with records in all shards");
    traffic.finish();
    running.stop().succeeded();
}

/// Passes bytes on to DynamoDB, and counts the requests in them by operation.
struct Counted {
    url: String,
    operations: Arc<Mutex<BTreeMap<String, usize>>>,
}

impl Counted {
    fn start(to: &str) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let operations = Arc::<Mutex<BTreeMap<String, usize>>>::default();
        let (to, counts) = (to.to_owned(), operations.clone());
        thread::spawn(move || {
            for client in listener.incoming() {
                let client = client.expect("a connection");
                let server = TcpStream::connect(&to).expect("DynamoDB");
                let (back_from, back_to) =
                    (server.try_clone().expect("a socket"), client.try_clone().expect("a socket"));
                thread::spawn(move || pass_on(back_from, back_to, |_| {}));
                let counts = counts.clone();
                let mut head = Vec::new();
                thread::spawn(move || {
                    pass_on(client, server, |bytes| {
                        head.extend_from_slice(bytes);
                        while let Some(operation) = next_operation(&mut head) {
                            *counts.lock().expect("a lock").entry(operation).or_default() += 1;
                        }
                    });
                });
            }
        });
        Self { url, operations }
    }
}

fn pass_on(mut from: TcpStream, mut to: TcpStream, mut see: impl FnMut(&[u8])) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        see(&buffer[..length]);
        if to.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Write);
}

/// Takes the next operation out of the bytes of requests, and all that is before it.
fn next_operation(bytes: &mut Vec<u8>) -> Option<String> {
    const BEFORE: &[u8] = b"x-amz-target: DynamoDB_20120810.";
    let is_before = |window: &[u8]| window.eq_ignore_ascii_case(BEFORE);
    let start = bytes.windows(BEFORE.len()).position(is_before)? + BEFORE.len();
    let length = bytes[start..].iter().position(|byte| *byte == b'\r')?;
    let operation = String::from_utf8_lossy(&bytes[start..start + length]).into_owned();
    bytes.drain(..start + length);
    Some(operation)
}
