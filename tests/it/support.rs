//! What the tests share: servers, the binary, and waiting for conditions.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Display},
    io::{BufRead as _, BufReader, Read as _},
    process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use aws_sdk_dynamodb::types::AttributeValue;
use aws_sdk_kinesis::{Client, primitives::Blob, types::StreamStatus};
use tokio::task::JoinHandle;
use tramline::local::{Local, LocalSettings};

/// No condition takes this long unless something is wrong. Generous: machines differ.
pub const LIMIT: Duration = Duration::from_secs(90);

/// Waits until `done` gives something; says what for if it never does.
pub fn wait_for<T>(what: impl Display, mut done: impl FnMut() -> Option<T>) -> T {
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
        Self::start_with(LocalSettings::default())
    }

    pub fn start_with(settings: LocalSettings) -> Self {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let local = runtime.block_on(Local::start(settings)).expect("embedded servers");
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

    /// Runs `task` beside the servers, as long as they run.
    pub fn spawn<T: Send + 'static>(
        &self,
        task: impl Future<Output = T> + Send + 'static,
    ) -> JoinHandle<T> {
        self.runtime.spawn(task)
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

    pub fn dynamodb(&self) -> aws_sdk_dynamodb::Client {
        aws_sdk_dynamodb::Client::new(&self.local.sdk_config())
    }

    /// Deletes a row of a lease table, as an operator would.
    pub fn delete_lease(&self, table: &str, shard: &str) {
        let delete = self.dynamodb().delete_item().table_name(table);
        let delete = delete.key("leaseKey", AttributeValue::S(shard.to_owned()));
        self.wait(delete.send()).expect("a row to delete");
    }

    /// Sets the time that goes with the checkpoint `AT_TIMESTAMP`.
    pub fn set_start(&self, table: &str, shard: &str, at: jiff::Timestamp) {
        let update = self
            .dynamodb()
            .update_item()
            .table_name(table)
            .key("leaseKey", AttributeValue::S(shard.to_owned()))
            .update_expression("SET startAtMillis = :at")
            .expression_attribute_values(":at", AttributeValue::N(at.as_millisecond().to_string()));
        self.wait(update.send()).expect("a row to change");
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
    pub fn start(command: Command) -> Self {
        let (mut running, out, err) = Self::start_unread(command);
        running.read_stdout(out);
        running.read_stderr(err);
        running
    }

    /// The same, but nobody reads its output yet: what it writes gets stuck.
    pub fn start_unread(mut command: Command) -> (Self, ChildStdout, ChildStderr) {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let (out, err) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
        let (stdout, stderr) = (Arc::default(), Arc::default());
        (Self { child, stdout, stderr, readers: Vec::new() }, out, err)
    }

    pub fn read_stdout(&mut self, out: ChildStdout) {
        let stdout = self.stdout.clone();
        self.readers.push(thread::spawn(move || {
            for line in BufReader::new(out).split(b'\n') {
                let Ok(line) = line else { return };
                let line = String::from_utf8_lossy(&line).into_owned();
                stdout.lock().expect("a lock").push((Instant::now(), line));
            }
        }));
    }

    pub fn read_stderr(&mut self, mut err: ChildStderr) {
        let stderr = self.stderr.clone();
        self.readers.push(thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = err.read(&mut buffer) {
                let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
                stderr.lock().expect("a lock").push_str(&text);
            }
        }));
    }

    /// The number of its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a status")
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
        wait_for(self.told(format!("{count} lines on stdout")), || {
            let stdout = self.stdout();
            (stdout.len() >= count).then_some(stdout)
        })
    }

    /// What is waited for, with what stderr has by then.
    pub fn told(&self, what: String) -> impl Display + '_ {
        fmt::from_fn(move |f| write!(f, "{what}; stderr:\n{}", self.stderr()))
    }

    /// Waits until stderr contains `text`.
    pub fn wait_for_log(&self, text: &str) {
        let logged = || self.stderr().contains(text).then_some(());
        wait_for(self.told(format!("{text:?} on stderr")), logged);
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub fn signal(&self, name: &str) {
        let pid = self.id().to_string();
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
        let stderr = self.stderr.clone();
        let what =
            fmt::from_fn(|f| write!(f, "the exit; stderr:\n{}", stderr.lock().expect("a lock")));
        let status = wait_for(what, || self.child.try_wait().expect("a status"));
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

/// Starts a producer, and waits for the line that names its address.
pub fn listening(command: Command) -> (Running, String) {
    let producer = Running::start(command);
    let address = wait_for(producer.told("the producer to listen".to_owned()), || {
        let log = producer.stderr();
        let line = log.lines().find(|line| line.contains("listening for OCS connections"))?;
        Some(line.split("address=").nth(1)?.split(' ').next()?.to_owned())
    });
    (producer, address)
}

/// Whether an example can be run here; says so if not.
pub fn has(interpreter: &str) -> bool {
    let there = Command::new(interpreter).args(["-c", ""]).status().is_ok();
    if !there {
        eprintln!("left out: there is no {interpreter} here");
    }
    there
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

/// The shards whose messages a worker printed with `--format json`.
pub fn shards_of(running: &Running) -> BTreeSet<String> {
    let shard = |line: &String| {
        let value: serde_json::Value = serde_json::from_str(line).ok()?;
        Some(value["shard"].as_str()?.to_owned())
    };
    running.stdout().iter().filter_map(shard).collect()
}

/// How often each line came, over all workers.
fn counted(workers: &[&Running]) -> BTreeMap<String, usize> {
    let mut counted = BTreeMap::new();
    for raw in workers.iter().flat_map(|worker| raws(&worker.stdout())) {
        *counted.entry(raw).or_default() += 1;
    }
    counted
}

/// Waits until every line came, and tells how often each did.
pub fn wait_for_all(workers: &[&Running], sent: &[String]) -> BTreeMap<String, usize> {
    wait_for("every line", || {
        let counted = counted(workers);
        sent.iter().all(|line| counted.contains_key(line)).then_some(counted)
    })
}
