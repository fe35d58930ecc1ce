//! What the tests share: servers, the binary, and waiting for conditions.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use aws_sdk_kinesis::{Client, primitives::Blob, types::StreamStatus};
use tramline::local::{Local, LocalSettings};

/// No condition takes this long unless something is wrong. Generous: machines differ.
pub const LIMIT: Duration = Duration::from_secs(90);

/// Waits until `done` gives something; says what for if it never does.
pub fn wait_for<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let give_up = Instant::now() + LIMIT;
    loop {
        if let Some(found) = done() {
            return found;
        }
        assert!(Instant::now() < give_up, "waited {LIMIT:?} in vain for {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Embedded servers on a runtime of their own.
pub struct Servers {
    runtime: tokio::runtime::Runtime,
    pub local: Local,
    pub kinesis: Client,
}

impl Servers {
    pub fn start() -> Self {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let local =
            runtime.block_on(Local::start(LocalSettings::default())).expect("embedded servers");
        let kinesis = Client::new(&local.sdk_config());
        Self { runtime, local, kinesis }
    }

    pub fn with_stream(name: &str, shards: i32) -> Self {
        let servers = Self::start();
        servers.create_stream(name, shards);
        servers
    }

    pub fn create_stream(&self, name: &str, shards: i32) {
        self.wait(create_stream(&self.kinesis, name, shards));
    }

    pub fn wait<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    /// Puts one record and gives its sequence number.
    pub fn put(&self, stream: &str, key: &str, data: impl AsRef<[u8]>) -> String {
        let put = self
            .kinesis
            .put_record()
            .stream_name(stream)
            .partition_key(key)
            .data(Blob::new(data.as_ref()));
        self.wait(put.send()).expect("a put").sequence_number
    }

    /// Puts a record with one event for each OCS line.
    pub fn put_lines(&self, stream: &str, key: &str, lines: &[String]) {
        let events: Vec<String> = lines.iter().map(|line| event(line)).collect();
        self.put(stream, key, format!("[{}]", events.join(",")));
    }

    /// Deletes a row of a lease table, as an operator would.
    pub fn delete_lease(&self, table: &str, shard: &str) {
        let delete = aws_sdk_dynamodb::Client::new(&self.local.sdk_config())
            .delete_item()
            .table_name(table)
            .key("leaseKey", aws_sdk_dynamodb::types::AttributeValue::S(shard.to_owned()));
        self.wait(delete.send()).expect("a row to delete");
    }

    /// The binary, pointed at these servers.
    pub fn tramline(&self, args: &[&str]) -> Command {
        let mut command = tramline(args);
        command.envs(self.local.environment());
        command
    }
}

/// Creates a stream and waits until it can be used.
pub async fn create_stream(kinesis: &Client, name: &str, shards: i32) {
    kinesis.create_stream().stream_name(name).shard_count(shards).send().await.expect("a stream");
    let give_up = Instant::now() + LIMIT;
    loop {
        let described = kinesis.describe_stream_summary().stream_name(name).send().await;
        let status =
            described.expect("a stream").stream_description_summary.map(|s| s.stream_status);
        if status == Some(StreamStatus::Active) {
            return;
        }
        assert!(Instant::now() < give_up, "the stream does not become active");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A CloudEvent with an OCS line, as another producer would write it.
pub fn event(raw: &str) -> String {
    serde_json::json!({
        "data": {"raw": raw}, "id": raw, "partitionkey": "k", "source": "test", "specversion": "1.0",
        "time": "2025-07-02T15:00:00.000000Z", "type": "com.mbta.ocs.raw_message",
    })
    .to_string()
}

/// OCS lines numbered from `from` up to, and without, `to`.
pub fn lines(from: usize, to: usize) -> Vec<String> {
    (from..to).map(|n| format!("{n},DIAG,12:00:00,line {n}")).collect()
}

/// The binary with an environment of its own: no setting or credential of this machine gets in.
pub fn tramline(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tramline"));
    command
        .args(args)
        .env_clear()
        .env("HOME", "/nonexistent")
        .env("AWS_EC2_METADATA_DISABLED", "true");
    command
}

/// Puts one line after the other, with keys for all shards, until it is told to stop.
pub struct Traffic {
    stop: Arc<AtomicBool>,
    put: Arc<AtomicUsize>,
    thread: thread::JoinHandle<()>,
}

impl Traffic {
    pub fn start(servers: &Arc<Servers>, stream: &'static str) -> Self {
        let (stop, put) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let (servers, stopped, count) = (servers.clone(), stop.clone(), put.clone());
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                let n = count.load(Ordering::SeqCst);
                servers.put_lines(stream, &format!("key-{n}"), &lines(n, n + 1));
                count.store(n + 1, Ordering::SeqCst);
                thread::sleep(Duration::from_millis(10));
            }
        });
        Self { stop, put, thread }
    }

    /// Stops, and gives the lines that were put.
    pub fn finish(self) -> Vec<String> {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().expect("the traffic");
        lines(0, self.put.load(Ordering::SeqCst))
    }
}

/// A running binary whose output is collected. Killed when dropped.
pub struct Running {
    child: Child,
    stdout: Arc<Mutex<Vec<(Instant, String)>>>,
    stderr: Arc<Mutex<String>>,
    readers: Vec<thread::JoinHandle<()>>,
}

impl Running {
    pub fn start(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let (stdout, stderr) =
            (Arc::<Mutex<Vec<(Instant, String)>>>::default(), Arc::<Mutex<String>>::default());
        let (out, err) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
        let readers = vec![
            thread::spawn({
                let stdout = stdout.clone();
                move || {
                    for line in BufReader::new(out).split(b'\n') {
                        let Ok(line) = line else { return };
                        let line = String::from_utf8_lossy(&line).into_owned();
                        stdout.lock().expect("a lock").push((Instant::now(), line));
                    }
                }
            }),
            thread::spawn({
                let stderr = stderr.clone();
                let mut err = err;
                move || {
                    let mut buffer = [0; 4096];
                    while let Ok(length @ 1..) = err.read(&mut buffer) {
                        let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
                        stderr.lock().expect("a lock").push_str(&text);
                    }
                }
            }),
        ];
        Self { child, stdout, stderr, readers }
    }

    pub fn stdout(&self) -> Vec<String> {
        self.timed_stdout(0).into_iter().map(|(_, line)| line).collect()
    }

    /// The lines after the first `skipped` ones, and when each came.
    pub fn timed_stdout(&self, skipped: usize) -> Vec<(Instant, String)> {
        self.stdout.lock().expect("a lock")[skipped..].to_vec()
    }

    pub fn stderr(&self) -> String {
        self.stderr.lock().expect("a lock").clone()
    }

    /// Waits until stdout has `count` lines.
    pub fn wait_for_lines(&self, count: usize) -> Vec<String> {
        wait_for(&format!("{count} lines on stdout; stderr:\n{}", self.stderr()), || {
            let stdout = self.stdout();
            (stdout.len() >= count).then_some(stdout)
        })
    }

    /// Waits until stderr contains `text`.
    pub fn wait_for_log(&self, text: &str) {
        wait_for(&format!("{text:?} on stderr"), || self.stderr().contains(text).then_some(()));
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let sent = Command::new("kill").args(["-s", name, &pid]).status().expect("kill");
        assert!(sent.success());
    }

    /// SIGTERM, and then what [`finish`](Self::finish) gives.
    pub fn stop(self) -> Finished {
        self.signal("TERM");
        self.finish()
    }

    /// Waits for the exit.
    pub fn finish(mut self) -> Finished {
        let status = wait_for(&format!("the exit; stderr so far:\n{}", self.stderr()), || {
            self.child.try_wait().expect("a status")
        });
        for reader in self.readers.drain(..) {
            reader.join().expect("the output is read");
        }
        Finished { status, stdout: self.stdout(), stderr: self.stderr() }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What a run left behind.
#[derive(Debug)]
pub struct Finished {
    pub status: ExitStatus,
    pub stdout: Vec<String>,
    pub stderr: String,
}

impl Finished {
    pub fn succeeded(self) -> Self {
        assert!(self.status.success(), "{:?}, stderr:\n{}", self.status, self.stderr);
        self
    }
}

/// Runs the binary to its end.
pub fn run(command: Command) -> Finished {
    Running::start(command).finish()
}

/// The OCS lines of messages printed with `--format json`.
pub fn raws(stdout: &[String]) -> Vec<String> {
    stdout
        .iter()
        .map(|line| {
            let value: serde_json::Value =
                serde_json::from_str(line).unwrap_or_else(|error| panic!("{error} in {line:?}"));
            value["event"]["data"]["raw"].as_str().expect("an OCS line").to_owned()
        })
        .collect()
}
