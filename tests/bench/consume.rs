//! What `tramline consume --output stdout --format raw` takes of processor and memory while it catches up,
//! against a bare SDK loop that only decodes. Prints Markdown. Linux only.
//!
//! `cargo bench --bench consume -- [RECORDS]`: embedded servers in another process, 4 shards, records of 326
//! bytes with one CloudEvent each. The program and the loop read the same records in turn, by polling and by
//! fan-out, three times each; a reader discards what the program writes. `FLOOR=/path` runs another loop
//! beside ours, called as `FLOOR STREAM RECORDS poll|efo raw`.
//!
//! `cargo bench --bench consume -- stalled MINUTES`: readers of a pipe and of sockets stop reading while the
//! stream grows, and the resident memory of the programs is taken once a minute.

#[path = "../it/support.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod support;

use std::{
    borrow::Cow,
    env, fs,
    io::{BufRead as _, BufReader, Read, Write as _},
    net::TcpStream,
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    thread::{self, sleep},
    time::{Duration, Instant},
};

use aws_sdk_kinesis::{
    Client,
    config::{BehaviorVersion, Credentials, Region},
    operation::get_records::GetRecordsOutput,
    primitives::Blob,
    types::{
        Record, ShardIteratorType, StartingPosition, SubscribeToShardEventStream,
        builders::PutRecordsRequestEntryBuilder,
    },
};
use serde::Deserialize;
use support::{LIMIT, Running, create_stream, tramline, wait_for};

const STREAM: &str = "ctd-ocs-raw-messages";
const SHARDS: i32 = 4;
const ROUNDS: usize = 3;
const RECORDS_PER_PUT: u64 = 500;
const KEYS: u64 = 1000;

fn main() {
    // Cargo adds `--bench`.
    let args: Vec<String> = env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["floor", retrieval, records] => {
            floor(retrieval == "fan-out", records.parse().expect("a number"))
        }
        ["stalled", minutes] => stalled(minutes.parse().expect("minutes")),
        [records] => catch_up(records.parse().expect("a number of records")),
        _ => catch_up(2_000_000),
    }
}

/// Embedded servers in a process of their own, and how to reach them.
struct Servers {
    _running: Running,
    environment: Vec<(String, String)>,
    runtime: tokio::runtime::Runtime,
    kinesis: Client,
}

impl Servers {
    fn start() -> Self {
        let running = Running::start(tramline(&["local"]));
        wait_for("the servers", || {
            running.stdout().iter().any(|line| line == "ready").then_some(())
        });
        let lines = running.stdout();
        let variables =
            lines.iter().filter_map(|line| line.strip_prefix("export ")?.split_once('='));
        let environment: Vec<(String, String)> =
            variables.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let kinesis = kinesis(|wanted| {
            let (_, value) =
                environment.iter().find(|(name, _)| name == wanted).expect("it is set");
            value.clone()
        });
        runtime.block_on(create_stream(&kinesis, STREAM, SHARDS));
        Self { _running: running, environment, runtime, kinesis }
    }

    /// Puts records, four calls at a time.
    fn load(&self, first: u64, count: u64) {
        self.runtime.block_on(async {
            let lanes: Vec<_> = (0..4)
                .map(|lane| {
                    let kinesis = self.kinesis.clone();
                    tokio::spawn(async move {
                        let mut from = first + lane * RECORDS_PER_PUT;
                        while from < first + count {
                            put(&kinesis, from, (from + RECORDS_PER_PUT).min(first + count)).await;
                            from += 4 * RECORDS_PER_PUT;
                        }
                    })
                })
                .collect();
            for lane in lanes {
                lane.await.expect("all of it is put");
            }
        });
    }

    fn consume(&self, app: &str, more: &[&str]) -> Command {
        let mut command = tramline(&["consume", "--stream", STREAM, "--app", app]);
        command.args(more).envs(self.environment.iter().cloned());
        command
    }
}

fn kinesis(variable: impl Fn(&str) -> String) -> Client {
    let config = aws_sdk_kinesis::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new("us-east-1"))
        .credentials_provider(Credentials::new("local", "local", None, None, "tramline local"))
        .endpoint_url(variable("AWS_ENDPOINT_URL_KINESIS"))
        .build();
    Client::from_conf(config)
}

async fn put(kinesis: &Client, from: u64, to: u64) {
    let entry = |n: u64| {
        let key = format!("k{}", n % KEYS);
        let event = format!(
            r#"[{{"data":{{"raw":"{n},TMOV,01:59:59,G,10023,42.336581141538126,-71.25367201212993,1,852,35,  3644,gpsci,3644-3862,0.00,26.69"}},"id":"prLSlfYXlQ8Nmsa8gyVi6PPZUmA=","partitionkey":"{key}","sourceip":"10.0.0.2","source":"host.mbta.com/trike","specversion":"1.0","time":"2023-01-29T13:51:54.990000Z","type":"com.mbta.ocs.raw_message"}}]"#
        );
        let entry = PutRecordsRequestEntryBuilder::default().data(Blob::new(event));
        entry.partition_key(key).build().expect("an entry")
    };
    let entries = (from..to).map(entry).collect();
    let put = kinesis.put_records().stream_name(STREAM).set_records(Some(entries)).send().await;
    assert_eq!(put.expect("a put").failed_record_count, Some(0));
}

/// What a process took.
#[derive(Clone, Copy)]
struct Used {
    processor_secs: f64,
    peak_mib: f64,
}

/// Runs a process that reads everything, until its stdout, of which `done` sees each piece, is what it should
/// be; then ends it.
fn measure(mut command: Command, mut done: impl FnMut(&[u8]) -> bool) -> Used {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("it runs");
    let mut out = child.stdout.take().expect("piped");
    let process = Process(child.id());
    let peak_kib = AtomicU64::new(0);
    let used = thread::scope(|scope| {
        scope.spawn(|| {
            // The last size that is seen: a process that has ended has none.
            while let Some(kib) = process.status("VmHWM:") {
                peak_kib.fetch_max(kib, Ordering::Relaxed);
                sleep(Duration::from_millis(50));
            }
        });
        let mut buffer = vec![0; 64 * 1024];
        loop {
            match out.read(&mut buffer).expect("its output") {
                0 => break,
                length if done(&buffer[..length]) => {
                    signal(&child, "TERM");
                    std::io::copy(&mut out, &mut std::io::sink()).expect("its output");
                    break;
                }
                _ => {}
            }
        }
        // What it took can be read until it is waited for, and its stdout may close before it has ended.
        wait_for("the exit", || process.status("VmHWM:").is_none().then_some(()));
        process.processor_secs()
    });
    assert!(child.wait().expect("a status").success(), "{command:?} failed");
    Used { processor_secs: used, peak_mib: peak_kib.into_inner() as f64 / 1024.0 }
}

struct Process(u32);

impl Process {
    fn read(&self, file: &str) -> String {
        fs::read_to_string(Path::new("/proc").join(self.0.to_string()).join(file))
            .unwrap_or_default()
    }

    /// A size in KiB; `None` if the process has ended.
    fn status(&self, name: &str) -> Option<u64> {
        let status = self.read("status");
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().trim_end_matches(" kB").parse().ok()
    }

    /// User and system time, in ticks of 10 ms.
    fn processor_secs(&self) -> f64 {
        let stat = self.read("stat");
        let (_, fields) = stat.rsplit_once(") ").expect("a process");
        let mut ticks =
            fields.split(' ').skip(11).map(|field| field.parse::<f64>().expect("ticks"));
        (ticks.next().expect("user time") + ticks.next().expect("system time")) / 100.0
    }
}

fn signal(child: &Child, name: &str) {
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-s", name, &pid]).status().expect("kill").success());
}

fn catch_up(records: u64) {
    let servers = Servers::start();
    servers.load(0, records);
    let ours = env::current_exe().expect("this program");
    let other = env::var_os("FLOOR");
    println!("{records} records; processor seconds per million messages, MiB resident at most\n");
    println!(
        "| | {} | median | MiB |",
        (1..=ROUNDS).map(|n| n.to_string()).collect::<Vec<_>>().join(" | ")
    );
    println!("|--|{}--:|--:|", "--:|".repeat(ROUNDS));
    for (retrieval, short) in [("polling", "poll"), ("fan-out", "efo")] {
        let (mut consume, mut floor, mut others) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            let app = format!("{retrieval}-{round}");
            let command = servers.consume(&app, &["--format", "raw", "--retrieval", retrieval]);
            let mut left = records;
            consume.push(measure(command, |piece| {
                let lines = piece.iter().filter(|byte| **byte == b'\n').count();
                left = left.checked_sub(lines as u64).expect("no message twice");
                left == 0
            }));
            let mut command = Command::new(&ours);
            command.args(["floor", retrieval, &records.to_string()]);
            floor.push(measure(with(&servers, command), |_| false));
            if let Some(other) = &other {
                let mut command = Command::new(other);
                command.args([STREAM, &records.to_string(), short, "raw"]);
                others.push(measure(with(&servers, command), |_| false));
            }
        }
        let bare = row(&format!("bare loop, {retrieval}"), records, &floor);
        if !others.is_empty() {
            row(&format!("FLOOR, {retrieval}"), records, &others);
        }
        let tramline = row(&format!("tramline, {retrieval}"), records, &consume);
        println!("| ratio, {retrieval} |{} {:.2} | |", " |".repeat(ROUNDS), tramline / bare);
    }
}

fn with(servers: &Servers, mut command: Command) -> Command {
    command.envs(servers.environment.iter().cloned());
    command
}

/// Prints a row, and gives the median of the processor seconds per million messages.
fn row(what: &str, records: u64, used: &[Used]) -> f64 {
    let seconds: Vec<f64> =
        used.iter().map(|used| used.processor_secs * 1e6 / records as f64).collect();
    let mut sorted = seconds.clone();
    sorted.sort_by(f64::total_cmp);
    let median = sorted[sorted.len() / 2];
    let peak = used.iter().map(|used| used.peak_mib).fold(0.0, f64::max);
    let seconds: Vec<String> = seconds.iter().map(|seconds| format!("{seconds:.2}")).collect();
    println!("| {what} | {} | {median:.2} | {peak:.0} |", seconds.join(" | "));
    median
}

/// The bare loop: reads all shards until so many records were decoded. No leases, no checkpoints.
fn floor(by_fan_out: bool, records: u64) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let kinesis = kinesis(|name| env::var(name).expect("it is set"));
    runtime.block_on(async {
        let seen: &'static AtomicU64 = Box::leak(Box::default());
        let see = move |batch: &[Record]| {
            let bytes: usize = batch.iter().map(|record| decode(record.data.as_ref())).sum();
            assert!(bytes > 0 || batch.is_empty(), "no OCS text");
            let count = batch.len() as u64;
            if seen.fetch_add(count, Ordering::Relaxed) + count >= records {
                std::process::exit(0);
            }
        };
        let consumer = match by_fan_out {
            true => Some(register(&kinesis).await),
            false => None,
        };
        let listed = kinesis.list_shards().stream_name(STREAM).send().await.expect("shards");
        let reading: Vec<_> = listed
            .shards()
            .iter()
            .map(|shard| {
                let (kinesis, shard) = (kinesis.clone(), shard.shard_id().to_owned());
                let consumer = consumer.clone();
                tokio::spawn(async move {
                    match consumer {
                        Some(consumer) => subscribe(&kinesis, &consumer, &shard, see).await,
                        None => poll(&kinesis, &shard, see).await,
                    }
                })
            })
            .collect();
        for shard in reading {
            shard.await.expect("no shard ends");
        }
    });
}

/// The length of the OCS text of the events in a record.
fn decode(data: &[u8]) -> usize {
    #[derive(Deserialize)]
    struct Event<'a> {
        #[serde(borrow)]
        data: Data<'a>,
    }
    #[derive(Deserialize)]
    struct Data<'a> {
        #[serde(borrow)]
        raw: Cow<'a, str>,
    }
    let events: Vec<Event> = serde_json::from_slice(data).expect("events");
    events.iter().map(|event| event.data.raw.len()).sum()
}

async fn register(kinesis: &Client) -> String {
    let stream =
        kinesis.describe_stream_summary().stream_name(STREAM).send().await.expect("a stream");
    let arn = stream.stream_description_summary.expect("a stream").stream_arn;
    let name = format!("floor-{}", std::process::id());
    let register = kinesis.register_stream_consumer().stream_arn(arn).consumer_name(name);
    let consumer = register.send().await.expect("a consumer").consumer.expect("a consumer");
    let arn = consumer.consumer_arn;
    let give_up = Instant::now() + LIMIT;
    loop {
        let described = kinesis.describe_stream_consumer().consumer_arn(&arn).send().await;
        let described = described.expect("a consumer").consumer_description.expect("a consumer");
        if described.consumer_status.as_str() == "ACTIVE" {
            return arn;
        }
        assert!(Instant::now() < give_up, "the consumer does not become active");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn subscribe(kinesis: &Client, consumer: &str, shard: &str, see: impl Fn(&[Record])) {
    let mut from = StartingPosition::builder().r#type(ShardIteratorType::TrimHorizon);
    loop {
        let subscribe = kinesis.subscribe_to_shard().consumer_arn(consumer).shard_id(shard);
        let position = from.clone().build().expect("a position");
        let subscribed = subscribe.starting_position(position).send().await;
        let mut events = subscribed.expect("a subscription").event_stream;
        while let Ok(Some(event)) = events.recv().await {
            if let SubscribeToShardEventStream::SubscribeToShardEvent(event) = event {
                see(&event.records);
                let number = event.continuation_sequence_number;
                from = StartingPosition::builder().r#type(ShardIteratorType::AtSequenceNumber);
                from = from.sequence_number(number);
            }
        }
    }
}

async fn poll(kinesis: &Client, shard: &str, see: impl Fn(&[Record])) {
    let iterate = kinesis.get_shard_iterator().stream_name(STREAM).shard_id(shard);
    let iterate = iterate.shard_iterator_type(ShardIteratorType::TrimHorizon);
    let mut next = iterate.send().await.expect("an iterator").shard_iterator;
    while let Some(iterator) = next {
        let read = kinesis.get_records().shard_iterator(iterator).limit(10_000).send().await;
        let GetRecordsOutput { records, next_shard_iterator, .. } = read.expect("a read");
        see(&records);
        if records.is_empty() {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        next = next_shard_iterator;
    }
}

/// A program whose reader stops.
struct Stalled {
    what: &'static str,
    running: Child,
    /// Held open, and not read.
    _reader: Reader,
}

enum Reader {
    Pipe { _out: ChildStdout },
    Socket { _socket: TcpStream },
}

/// Records a second that are put meanwhile.
const STALLED_RATE: u64 = 500;

fn stalled(minutes: u64) {
    let servers = Servers::start();
    servers.load(0, 200_000);
    let mut programs = Vec::new();
    for (what, more) in [
        ("pipe", &["--retrieval", "polling"][..]),
        ("tcp", &["--output", "tcp://127.0.0.1:0"]),
        ("tcp, acks", &["--output", "tcp://127.0.0.1:0", "--acks"]),
        (
            "tcp, share, polling",
            &["--output", "tcp://127.0.0.1:0", "--share", "--retrieval", "polling"],
        ),
    ] {
        programs.push(stall(&servers, what, more));
    }
    let names: Vec<&str> = programs.iter().map(|program| program.what).collect();
    println!(
        "MiB resident, by minutes since the readers stopped; {STALLED_RATE} records/s are put\n"
    );
    println!("| minute | records in the stream | {} |", names.join(" | "));
    println!("|--:|--:|{}", "--:|".repeat(names.len()));
    let began = Instant::now();
    let mut records = 200_000;
    for minute in 0..=minutes {
        while began.elapsed() < Duration::from_secs(60 * minute) {
            servers.load(records, RECORDS_PER_PUT);
            records += RECORDS_PER_PUT;
            sleep(Duration::from_secs_f64(RECORDS_PER_PUT as f64 / STALLED_RATE as f64));
        }
        let sizes = programs.iter_mut().map(|program| {
            assert!(program.running.try_wait().expect("a status").is_none(), "it has ended");
            let kib = Process(program.running.id()).status("VmRSS:").expect("it runs");
            format!("{:.1}", kib as f64 / 1024.0)
        });
        println!("| {minute} | {records} | {} |", sizes.collect::<Vec<_>>().join(" | "));
        std::io::stdout().flush().expect("stdout");
    }
    for mut program in programs {
        signal(&program.running, "KILL");
        let _ = program.running.wait();
    }
}

/// Starts a program and reads some of what it writes, and then no more.
fn stall(servers: &Servers, what: &'static str, more: &[&str]) -> Stalled {
    let app = what.replace(", ", "-");
    let mut command = servers.consume(&app, &[more, &["--shutdown-limit", "1s"]].concat());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut running = command.spawn().expect("it runs");
    let mut log = BufReader::new(running.stderr.take().expect("piped"));
    let mut out = running.stdout.take().expect("piped");
    let reader = if more.contains(&"--output") {
        let mut line = String::new();
        let address = loop {
            line.clear();
            assert!(log.read_line(&mut line).expect("its log") > 0, "it has ended");
            if let Some((_, address)) = line.split_once("listening for readers") {
                let address = address.split("address=").nth(1).expect("an address");
                break address
                    .split_whitespace()
                    .next()
                    .expect("an address")
                    .trim_matches('"')
                    .to_owned();
            }
        };
        let mut socket = TcpStream::connect(address).expect("a connection");
        if more.contains(&"--acks") {
            socket.write_all(b"{\"tramline\":1,\"reader\":\"stalled\"}\n").expect("a write");
        }
        read_some(&mut socket);
        Reader::Socket { _socket: socket }
    } else {
        read_some(&mut out);
        Reader::Pipe { _out: out }
    };
    thread::spawn(move || {
        let mut line = String::new();
        while log.read_line(&mut line).is_ok_and(|length| length > 0) {
            eprint!("{what}: {line}");
            line.clear();
        }
    });
    Stalled { what, running, _reader: reader }
}

fn read_some(from: &mut impl Read) {
    let mut some = vec![0; 64 * 1024];
    from.read_exact(&mut some).expect("messages");
}
