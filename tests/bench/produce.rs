//! How fast the producer is, with its spool on disk, beside an embedded Kinesis of 4 shards on the same
//! machine: `cargo bench --bench produce -- [MESSAGES]`.
//!
//! Throughput and the drain after an outage are those of the real program, with what it took of processor,
//! memory and disk. The latency is measured in this process, from a message in hand to its receipt.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use tramline::{
    Producer, ProducerSettings, Spool,
    local::{Local, LocalSettings},
    ocs::generate::{Generator, Item, Profile},
};

const STREAM: &str = "ctd-ocs-raw-messages";
const CONNECTIONS: u64 = 16;

fn main() {
    // Of what `cargo bench` and `cargo test` pass, only a number is for us.
    let messages = std::env::args().find_map(|arg| arg.parse().ok()).unwrap_or(1_000_000);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let local = runtime.block_on(Local::start(LocalSettings::default())).expect("servers");
    let kinesis = aws_sdk_kinesis::Client::new(&local.sdk_config());
    let create = kinesis.create_stream().stream_name(STREAM).shard_count(4);
    runtime.block_on(create.send()).expect("a stream");
    thread::sleep(Duration::from_secs(1));

    runtime.block_on(latency(&local));
    let bytes = traffic(messages);
    for more in [&[][..], &["--gzip"], &["--encoding", "batch", "--gzip"]] {
        throughput(&local, more, messages, &bytes);
    }
    drain(&local, &["--encoding", "batch", "--gzip"], messages, &bytes);
}

/// What each connection sends.
fn traffic(messages: u64) -> Vec<Vec<u8>> {
    let connection = |n| {
        let mut bytes = Vec::new();
        let lines = Generator::new(1, n as u32, Profile::Day).filter_map(|item| match item {
            Item::Message(line) => Some(line),
            Item::Heartbeat => None,
        });
        for line in lines.take((messages / CONNECTIONS) as usize) {
            bytes.extend_from_slice(line.as_bytes());
            bytes.push(4);
        }
        bytes
    };
    (0..CONNECTIONS).map(connection).collect()
}

async fn latency(local: &Local) {
    let spool = tempfile::tempdir().expect("a directory");
    let settings = ProducerSettings {
        spool: Spool::Directory(spool.path().to_owned()),
        ..ProducerSettings::default()
    };
    let config = local.sdk_config();
    let producer = Producer::start(&config, STREAM, settings).await.expect("a producer");
    let lanes: Vec<_> = (0..CONNECTIONS).map(|n| producer.lane(format!("{n}"), None)).collect();
    let micros = Arc::new(Mutex::new(Histogram::<u64>::new(3).expect("three digits")));
    let mut ticks = tokio::time::interval(Duration::from_micros(2500));
    let mut waiting = Vec::new();
    for n in 0..4000_usize {
        ticks.tick().await;
        let (lane, micros) = (lanes[n % lanes.len()].clone(), micros.clone());
        waiting.push(tokio::spawn(async move {
            let began = Instant::now();
            let line = format!("{n},TMOV,12:00:00,R,{}", "x".repeat(100));
            lane.send(line).await.expect("open").await.expect("put");
            let took = began.elapsed().as_micros() as u64;
            micros.lock().expect("a lock").record(took).expect("it grows");
        }));
    }
    for one in waiting {
        one.await.expect("put");
    }
    let report = producer.close().await.expect("all is put");
    let micros = micros.lock().expect("a lock");
    let millis = |q| micros.value_at_quantile(q) as f64 / 1000.0;
    println!(
        "TMOV at 400/s: p50 {:.1} ms, p99 {:.1} ms, p99.9 {:.1} ms; {} commits for {} messages",
        millis(0.5),
        millis(0.99),
        millis(0.999),
        report.commits,
        report.messages,
    );
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

    fn stop(mut self) {
        let pid = self.child.id().to_string();
        let _ = Command::new("kill").args(["-s", "TERM", &pid]).status();
        let _ = self.child.wait();
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

fn throughput(local: &Local, more: &[&str], messages: u64, bytes: &[Vec<u8>]) {
    let spool = tempfile::tempdir().expect("a directory");
    let running = Running::start(local, spool.path(), false, more);
    let address = running.address();
    let began = Instant::now();
    send(&address, bytes);
    running.wait_for("connection done", CONNECTIONS as usize);
    tell(&format!("through {more:?}"), messages, began.elapsed(), &running);
    running.stop();
}

fn drain(local: &Local, more: &[&str], messages: u64, bytes: &[Vec<u8>]) {
    let spool = tempfile::tempdir().expect("a directory");
    let running = Running::start(local, spool.path(), true, more);
    let address = running.address();
    let began = Instant::now();
    send(&address, bytes);
    running.wait_for("connection closed by the peer", CONNECTIONS as usize);
    tell("received, AWS away", messages, began.elapsed(), &running);
    thread::sleep(Duration::from_secs(2));
    let mut killed = running;
    let _ = killed.child.kill();
    let _ = killed.child.wait();

    let began = Instant::now();
    let running =
        Running::start(local, spool.path(), false, &[more, &["--shutdown-limit", "10m"]].concat());
    let address = running.address();
    let log = running.wait_for("waiting=", 1);
    let waiting = log.split("waiting=").nth(1).and_then(|rest| rest.split(' ').next());
    let waiting: u64 = waiting.and_then(|n| n.trim().parse().ok()).expect("a number");
    println!(
        "the spool was open after {:.1} s, with {waiting} of {messages} messages",
        began.elapsed().as_secs_f64()
    );
    // All that was left goes before a message of the same host.
    send(&address, &[b"1,TMOV,last\x04".to_vec()]);
    running.wait_for("connection done", 1);
    tell("drain", waiting, began.elapsed(), &running);
    running.stop();
}

fn tell(what: &str, messages: u64, took: Duration, running: &Running) {
    let (processor, peak_mib) = running.used();
    println!(
        "{what}: {:.0} messages/s; {:.1} processor seconds per million; at most {peak_mib:.0} MiB",
        messages as f64 / took.as_secs_f64(),
        processor * 1e6 / messages as f64,
    );
}
