//! How fast the producer is, with its spool on disk, beside an embedded Kinesis of 4 shards on the same
//! machine: `cargo bench --bench produce -- [MESSAGES]`.
//!
//! Throughput and the drain after an outage are those of the real program, with what it took of processor,
//! memory and disk; the stream is read back, and must hold every connection's messages in order. By default
//! the producer puts no more to a shard than AWS takes, 1 MiB a second. The embedded Kinesis takes any
//! amount, so `--shard-rate 1GiB` shows what the producer itself can do.
//!
//! The latency is that of a listener in this process, from the read of a message to the answer that Kinesis
//! has it.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use aws_sdk_kinesis::{Client, types::ShardIteratorType};
use tokio::io::AsyncWriteExt as _;
use tokio_util::sync::CancellationToken;
use tramline::{
    ListenerSettings, OcsListener, ProducerSettings, SequenceNumber, Spool,
    local::{Local, LocalSettings},
    ocs::generate::{Generator, Item, Profile},
    record::{Record, ShardName, unpack},
};

const STREAM: &str = "ctd-ocs-raw-messages";
const CONNECTIONS: u64 = 16;

fn main() {
    // Of what `cargo bench` and `cargo test` pass, only a number is for us.
    let messages = std::env::args().find_map(|arg| arg.parse().ok()).unwrap_or(1_000_000);
    let bench = Bench::start(messages);
    bench.runtime.block_on(latency(&bench.local));
    for more in [
        &["--shard-rate", "1GiB"][..],
        &["--gzip"],
        &["--encoding", "batch", "--gzip"],
        &["--encoding", "kpl", "--gzip"],
    ] {
        bench.throughput(more);
    }
    for more in [&["--shard-rate", "1GiB"][..], &["--gzip"]] {
        bench.drain(more);
    }
}

struct Bench {
    runtime: tokio::runtime::Runtime,
    local: Local,
    kinesis: Client,
    messages: u64,
    /// What each connection sends.
    lines: Vec<Vec<String>>,
    bytes: Vec<Vec<u8>>,
}

/// What each connection sends.
fn traffic(messages: u64) -> Vec<Vec<String>> {
    let connection = |n| {
        let lines = Generator::new(1, n as u32, Profile::Day).filter_map(|item| match item {
            Item::Message(line) => Some(line),
            Item::Heartbeat => None,
        });
        lines.take((messages / CONNECTIONS) as usize).collect()
    };
    (0..CONNECTIONS).map(connection).collect()
}

async fn latency(local: &Local) {
    let stream = "latency";
    let config = local.sdk_config();
    let kinesis = Client::new(&config);
    create_stream(&kinesis, stream).await;
    let spool = tempfile::tempdir().expect("a directory");
    let settings = ListenerSettings {
        producer: ProducerSettings {
            spool: Spool::Directory(spool.path().to_owned()),
            ..ProducerSettings::default()
        },
        ..ListenerSettings::default()
    };
    let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
    let listener = OcsListener::bind(&config, stream, any_port, settings).await;
    let listener = listener.expect("a listener");
    let address = listener.local_addr().expect("an address");
    let monitor = listener.monitor();
    let stop = CancellationToken::new();
    let running = tokio::spawn(listener.run(stop.clone().cancelled_owned()));
    let mut sockets = Vec::new();
    for _ in 0..CONNECTIONS {
        let socket = tokio::net::TcpStream::connect(address).await.expect("a connection");
        socket.set_nodelay(true).expect("an option");
        sockets.push(socket);
    }
    let mut ticks = tokio::time::interval(Duration::from_micros(2500));
    let began = Instant::now();
    for n in 0..8000_usize {
        ticks.tick().await;
        let line = format!("{n},TMOV,12:00:00,R,{}\x04", "x".repeat(100));
        let socket = &mut sockets[n % CONNECTIONS as usize];
        socket.write_all(line.as_bytes()).await.expect("a write");
    }
    let took = began.elapsed();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let stats = monitor.stats().await.expect("it runs");
    let age = |q| stats.puts.age_micros.value_at_quantile(q) as f64 / 1000.0;
    let latency = |q| stats.puts.latency_micros.value_at_quantile(q) as f64 / 1000.0;
    println!(
        "TMOV at {:.0}/s: read to answer p50 {:.1} ms, p99 {:.1} ms, p99.9 {:.1} ms, most {:.1} ms; of \
         that the call p50 {:.1} ms, p99 {:.1} ms; {:.0} commits/s; {} records of {} messages",
        8000.0 / took.as_secs_f64(),
        age(0.5),
        age(0.99),
        age(0.999),
        age(1.0),
        latency(0.5),
        latency(0.99),
        stats.report.commits as f64 / took.as_secs_f64(),
        stats.puts.records,
        stats.puts.messages,
    );
    stop.cancel();
    running.await.expect("no panic").expect("all is put");
    kinesis.delete_stream().stream_name(stream).send().await.expect("it is deleted");
}

async fn create_stream(kinesis: &Client, stream: &str) {
    kinesis.create_stream().stream_name(stream).shard_count(4).send().await.expect("a stream");
    tokio::time::sleep(Duration::from_secs(1)).await;
}

/// The program, with what it logs.
struct Running {
    child: Child,
    log: Arc<Mutex<String>>,
}

impl Running {
    fn start(local: &Local, spool: &Path, away: bool, more: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tramline"));
        command
            .args(["produce", "--listen", "127.0.0.1:0", "--stream", STREAM, "--spool"])
            .arg(spool)
            .args(more)
            .envs(local.environment())
            .stderr(Stdio::piped());
        if away {
            command.env("AWS_ENDPOINT_URL_KINESIS", "http://127.0.0.1:1");
        }
        let mut child = command.spawn().expect("the program");
        let mut stderr = child.stderr.take().expect("its log");
        let log = Arc::new(Mutex::new(String::new()));
        thread::spawn({
            let log = log.clone();
            move || {
                let mut buffer = [0; 4096];
                while let Ok(length @ 1..) = stderr.read(&mut buffer) {
                    let text = String::from_utf8_lossy(&buffer[..length]);
                    log.lock().expect("a lock").push_str(&text);
                }
            }
        });
        Self { child, log }
    }

    /// Waits until the log has `text` so often, and gives it.
    fn wait_for(&self, text: &str, times: usize) -> String {
        loop {
            let log = self.log.lock().expect("a lock").clone();
            if log.matches(text).count() >= times {
                return log;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn address(&self) -> String {
        let log = self.wait_for("listening for OCS connections", 1);
        let after = log.split("address=").nth(1).expect("an address");
        after.split(' ').next().expect("an address").to_owned()
    }

    /// Processor seconds and the most resident bytes so far.
    fn used(&self) -> (f64, f64) {
        let read = |file| {
            std::fs::read_to_string(format!("/proc/{}/{file}", self.child.id())).unwrap_or_default()
        };
        let stat = read("stat");
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or("").split(' ').collect();
        let ticks = |n: usize| fields.get(n).and_then(|t| t.parse::<f64>().ok()).unwrap_or(0.0);
        let status = read("status");
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("0");
        let kib: f64 = peak.trim().trim_end_matches(" kB").parse().unwrap_or(0.0);
        ((ticks(11) + ticks(12)) / 100.0, kib / 1024.0)
    }

    /// Ends it, and gives its whole log.
    fn stop(mut self) -> String {
        let pid = self.child.id().to_string();
        let _ = Command::new("kill").args(["-s", "TERM", &pid]).status();
        let _ = self.child.wait();
        let log = self.wait_for("producer stopped", 1);
        assert!(log.contains(" dead_letters=0"), "{log}");
        log
    }
}

/// Sends all there is, and waits until it was received.
fn send(address: &str, bytes: &[Vec<u8>]) {
    thread::scope(|scope| {
        for bytes in bytes {
            scope.spawn(move || {
                let mut socket = TcpStream::connect(address).expect("a connection");
                socket.write_all(bytes).expect("a write");
                socket.shutdown(Shutdown::Write).expect("a close");
                let _ = socket.read(&mut [0]);
            });
        }
    });
}

impl Bench {
    fn start(messages: u64) -> Self {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let local = runtime.block_on(Local::start(LocalSettings::default())).expect("servers");
        let kinesis = Client::new(&local.sdk_config());
        let lines = traffic(messages);
        let bytes = |lines: &Vec<String>| {
            lines.iter().flat_map(|line| line.bytes().chain([4])).collect::<Vec<u8>>()
        };
        let bytes = lines.iter().map(bytes).collect();
        let messages = lines.iter().map(|lines| lines.len() as u64).sum();
        Self { runtime, local, kinesis, messages, lines, bytes }
    }

    fn throughput(&self, more: &[&str]) {
        self.runtime.block_on(create_stream(&self.kinesis, STREAM));
        let spool = tempfile::tempdir().expect("a directory");
        let running = Running::start(&self.local, spool.path(), false, more);
        let address = running.address();
        let began = Instant::now();
        send(&address, &self.bytes);
        running.wait_for("connection done", CONNECTIONS as usize);
        let took = began.elapsed();
        tell(&format!("through {more:?}"), self.messages, took, &running);
        let log = running.stop();
        let of = |field: &str| -> f64 {
            let value = log.rsplit(field).next().and_then(|rest| rest.split_whitespace().next());
            value.and_then(|value| value.parse().ok()).expect("a number")
        };
        println!(
            "  {:.0} fsyncs/s; {:.0} messages a record",
            of(" commits=") / took.as_secs_f64(),
            self.messages as f64 / of(" records="),
        );
        self.check(&[]);
    }

    fn drain(&self, more: &[&str]) {
        self.runtime.block_on(create_stream(&self.kinesis, STREAM));
        let spool = tempfile::tempdir().expect("a directory");
        let mut running = Running::start(&self.local, spool.path(), true, more);
        let address = running.address();
        let began = Instant::now();
        send(&address, &self.bytes);
        running.wait_for("connection closed by the peer", CONNECTIONS as usize);
        tell("received, AWS away", self.messages, began.elapsed(), &running);
        // The last of it may not be in the spool yet.
        thread::sleep(Duration::from_secs(2));
        let _ = running.child.kill();
        let _ = running.child.wait();

        let began = Instant::now();
        let running = Running::start(
            &self.local,
            spool.path(),
            false,
            &[more, &["--shutdown-limit", "10m"]].concat(),
        );
        let address = running.address();
        let log = running.wait_for("waiting=", 1);
        let waiting = log.split("waiting=").nth(1).and_then(|rest| rest.split(' ').next());
        let waiting: u64 = waiting.and_then(|n| n.trim().parse().ok()).expect("a number");
        println!(
            "the spool was open after {:.1} s, with {waiting} of {} messages",
            began.elapsed().as_secs_f64(),
            self.messages
        );
        // All that was left goes before a message of the same host.
        let last = "1,TMOV,last";
        send(&address, &[[last.as_bytes(), &[4]].concat()]);
        running.wait_for("connection done", 1);
        tell(&format!("drain {more:?}"), waiting, began.elapsed(), &running);
        running.stop();
        self.check(&[last.to_owned()]);
    }

    /// Expects the messages of every connection in the stream, in order, and deletes the stream.
    fn check(&self, more: &[String]) {
        let mut found = self.runtime.block_on(stored(&self.kinesis));
        let delete = self.kinesis.delete_stream().stream_name(STREAM);
        self.runtime.block_on(delete.send()).expect("it is deleted");
        thread::sleep(Duration::from_secs(1));
        let mut sent = self.lines.clone();
        sent.extend((!more.is_empty()).then(|| more.to_vec()));
        found.sort();
        sent.sort();
        assert!(found == sent, "not everything is in the stream, in order");
    }
}

/// The messages of each partition key.
async fn stored(kinesis: &Client) -> Vec<Vec<String>> {
    let mut by_key: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let shards = kinesis.list_shards().stream_name(STREAM).send().await.expect("shards");
    for shard in shards.shards() {
        let name = Arc::new(ShardName {
            stream: STREAM.into(),
            shard: shard.shard_id().to_owned().into(),
            hash_key_range: None,
        });
        let iterator = kinesis
            .get_shard_iterator()
            .stream_name(STREAM)
            .shard_id(shard.shard_id())
            .shard_iterator_type(ShardIteratorType::TrimHorizon);
        let mut next = iterator.send().await.expect("an iterator").shard_iterator;
        while let Some(iterator) = next {
            let read = kinesis.get_records().shard_iterator(iterator).send().await.expect("a read");
            if read.records().is_empty() {
                break;
            }
            for record in read.records() {
                let record = Record {
                    sequence_number: SequenceNumber::parse(record.sequence_number())
                        .expect("a number"),
                    partition_key: record.partition_key().expect("a key").to_owned(),
                    arrived_at: None,
                    data: record.data().as_ref().to_vec().into(),
                };
                let (mut messages, mut undecodable) = (Vec::new(), Vec::new());
                unpack(&name, record, None, &mut messages, &mut undecodable);
                assert!(undecodable.is_empty(), "{undecodable:?}");
                for message in messages {
                    let lines = by_key.entry(message.partition_key().to_owned()).or_default();
                    lines.push(message.raw().to_owned());
                }
            }
            next = read.next_shard_iterator;
        }
    }
    by_key.into_values().collect()
}

fn tell(what: &str, messages: u64, took: Duration, running: &Running) {
    let (processor, peak_mib) = running.used();
    println!(
        "{what}: {:.0} messages/s; {:.1} processor seconds per million; at most {peak_mib:.0} MiB",
        messages as f64 / took.as_secs_f64(),
        processor * 1e6 / messages as f64,
    );
}
