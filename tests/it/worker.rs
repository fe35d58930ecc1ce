//! The crate as an embedding service uses it.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use aws_sdk_kinesis::{Client, primitives::Blob};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tramline::{
    Batch, Coalesce, Handler, Message, Retrieval, ShardId, StartPosition, Worker, WorkerError,
    local::{Local, LocalSettings},
};

use crate::{
    proxy::Proxy,
    support::{LIMIT, Servers, create_stream, event, lines, wait_for},
};

const STREAM: &str = "ctd-ocs-raw-messages";

/// Sends what it handles to the test.
struct Forward(mpsc::UnboundedSender<String>);

impl Handler for Forward {
    type Error = std::convert::Infallible;

    async fn handle(&mut self, batch: &Batch) -> Result<(), Self::Error> {
        for message in batch {
            self.0.send(message.raw().to_owned()).expect("the test listens");
        }
        Ok(())
    }
}

async fn put(kinesis: &Client, line: &str) {
    let data = Blob::new(event(line));
    kinesis
        .put_record()
        .stream_name(STREAM)
        .partition_key("k")
        .data(data)
        .send()
        .await
        .expect("a put");
}

async fn with_stream(local: &Local) -> Client {
    let kinesis = Client::new(&local.sdk_config());
    create_stream(&kinesis, STREAM, 1).await;
    kinesis
}

async fn receive(messages: &mut mpsc::UnboundedReceiver<String>, count: usize) -> Vec<String> {
    let mut seen = Vec::new();
    while seen.len() < count {
        let next = tokio::time::timeout(LIMIT, messages.recv()).await;
        seen.push(next.expect("a message in time").expect("the worker runs"));
    }
    seen
}

/// A worker on `local` whose messages come out of the receiver, until the token is cancelled.
async fn start_worker(
    local: &Local,
    retrieval: Retrieval,
    start: StartPosition,
) -> (
    mpsc::UnboundedReceiver<String>,
    CancellationToken,
    tokio::task::JoinHandle<Result<tramline::Report, WorkerError>>,
) {
    let (sender, messages) = mpsc::unbounded_channel();
    let worker = Worker::builder(&local.sdk_config(), STREAM, "rtr")
        .retrieval(retrieval)
        .start(start)
        .handler(move |_: &ShardId| Forward(sender.clone()))
        .build()
        .await
        .expect("a worker");
    let stop = CancellationToken::new();
    let running = tokio::spawn(worker.run(stop.clone().cancelled_owned()));
    (messages, stop, running)
}

#[tokio::test(flavor = "multi_thread")]
async fn p2_a_subscription_that_ends_is_renewed_with_nothing_lost_or_repeated() {
    let local = Local::start(LocalSettings {
        subscription_lifetime: Duration::from_millis(300),
        ..LocalSettings::default()
    })
    .await
    .expect("servers");
    let kinesis = with_stream(&local).await;
    let (mut messages, stop, running) =
        start_worker(&local, Retrieval::FanOut, StartPosition::TrimHorizon).await;
    let mut seen = Vec::new();
    for line in lines(0, 15) {
        put(&kinesis, &line).await;
        seen.extend(receive(&mut messages, 1).await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(seen, lines(0, 15));
    stop.cancel();
    let report = running.await.expect("no panic").expect("a clean stop");
    assert_eq!((report.messages, report.records), (15, 15), "nothing came twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn p1_a_fan_out_consumer_that_someone_removes_is_registered_again() {
    let local = Local::start(LocalSettings {
        subscription_lifetime: Duration::from_millis(500),
        ..LocalSettings::default()
    })
    .await
    .expect("servers");
    let kinesis = with_stream(&local).await;
    let (mut messages, stop, running) =
        start_worker(&local, Retrieval::FanOut, StartPosition::TrimHorizon).await;
    put(&kinesis, "1,DIAG,12:00:00,x").await;
    receive(&mut messages, 1).await;
    let stream_arn = "arn:aws:kinesis:us-east-1:000000000000:stream/ctd-ocs-raw-messages";
    let remove = kinesis.deregister_stream_consumer().stream_arn(stream_arn).consumer_name("rtr");
    remove.send().await.expect("the consumer exists");
    put(&kinesis, "2,DIAG,12:00:00,x").await;
    put(&kinesis, "3,DIAG,12:00:00,x").await;
    let seen = receive(&mut messages, 2).await;
    assert_eq!(seen, ["2,DIAG,12:00:00,x", "3,DIAG,12:00:00,x"]);
    stop.cancel();
    running.await.expect("no panic").expect("a clean stop");
}

#[tokio::test(flavor = "multi_thread")]
async fn p1_an_iterator_that_expires_before_the_first_record_after_latest_skips_nothing() {
    let local = Local::start(LocalSettings {
        // An iterator waits for a second between idle reads, so it is too old when it is used.
        iterator_lifetime: Duration::from_secs(1),
        ..LocalSettings::default()
    })
    .await
    .expect("servers");
    let kinesis = with_stream(&local).await;
    let (mut messages, stop, running) =
        start_worker(&local, Retrieval::Polling, StartPosition::Latest).await;
    tokio::time::sleep(Duration::from_millis(2500)).await;
    for line in lines(1, 4) {
        put(&kinesis, &line).await;
    }
    assert_eq!(receive(&mut messages, 3).await, lines(1, 4));
    stop.cancel();
    running.await.expect("no panic").expect("a clean stop");
}

/// Fails until it has been asked often enough.
struct Stubborn {
    failures: Arc<AtomicU32>,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Handler for Stubborn {
    type Error = &'static str;

    async fn handle(&mut self, batch: &Batch) -> Result<(), Self::Error> {
        if self.failures.load(Ordering::SeqCst) > 0 {
            self.failures.fetch_sub(1, Ordering::SeqCst);
            return Err("the database is away");
        }
        let raws = batch.iter().map(|message| message.raw().to_owned());
        self.seen.lock().expect("a lock").extend(raws);
        Ok(())
    }
}

async fn run_stubborn(
    local: &Local,
    failures: u32,
) -> (Vec<String>, Result<tramline::Report, WorkerError>) {
    let (failures, seen) =
        (Arc::new(AtomicU32::new(failures)), Arc::<Mutex<Vec<String>>>::default());
    let kept = seen.clone();
    let result = Worker::builder(&local.sdk_config(), STREAM, "rtr")
        .retrieval(Retrieval::Polling)
        .stop_when_idle(Duration::from_millis(500))
        .handler(move |_: &ShardId| Stubborn { failures: failures.clone(), seen: kept.clone() })
        .build()
        .await
        .expect("a worker")
        .run(std::future::pending())
        .await;
    let seen = seen.lock().expect("a lock").clone();
    (seen, result)
}

#[tokio::test(flavor = "multi_thread")]
async fn p1_a_batch_that_fails_is_offered_again_and_not_passed_by_the_checkpoint() {
    let local = Local::start(LocalSettings::default()).await.expect("servers");
    let kinesis = with_stream(&local).await;
    for line in lines(0, 3) {
        put(&kinesis, &line).await;
    }
    let (seen, result) = run_stubborn(&local, u32::MAX).await;
    assert!(seen.is_empty());
    let error = result.expect_err("the handler never finishes");
    assert!(matches!(error, WorkerError::Handler { attempts: 5, .. }), "{error}");
    assert!(error.to_string().contains("the database is away"), "{error}");

    let (seen, result) = run_stubborn(&local, 2).await;
    assert_eq!(seen, lines(0, 3), "read again from the start: nothing was checkpointed");
    assert_eq!(result.expect("a clean stop").messages, 3);
}

/// Panics at once.
struct Panics;

impl Handler for Panics {
    type Error = std::convert::Infallible;

    async fn handle(&mut self, _: &Batch) -> Result<(), Self::Error> {
        panic!("as planned");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_panics_ends_the_worker_with_its_text() {
    let local = Local::start(LocalSettings::default()).await.expect("servers");
    put(&with_stream(&local).await, "1,DIAG,12:00:00,x").await;
    let worker = Worker::builder(&local.sdk_config(), STREAM, "rtr")
        .handler(|_: &ShardId| Panics)
        .build()
        .await
        .expect("a worker");
    let error = worker.run(std::future::pending()).await.expect_err("it panics");
    assert!(error.to_string().contains("as planned"), "{error}");
}

/// Blocks its thread, which no async code should do.
struct Blocks(mpsc::UnboundedSender<String>);

impl Handler for Blocks {
    type Error = std::convert::Infallible;

    async fn handle(&mut self, batch: &Batch) -> Result<(), Self::Error> {
        std::thread::sleep(Duration::from_secs(3));
        for message in batch {
            self.0.send(message.raw().to_owned()).expect("the test listens");
        }
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn p4_a_handler_that_blocks_longer_than_the_lease_does_not_cost_it() {
    let local = Local::start(LocalSettings::default()).await.expect("servers");
    put(&with_stream(&local).await, "1,DIAG,12:00:00,x").await;
    let (sender, mut messages) = mpsc::unbounded_channel();
    let worker = Worker::builder(&local.sdk_config(), STREAM, "rtr")
        .lease_duration(Duration::from_secs(1))
        .handler(move |_: &ShardId| Blocks(sender.clone()))
        .build()
        .await
        .expect("a worker");
    let stop = CancellationToken::new();
    let running = tokio::spawn(worker.run(stop.clone().cancelled_owned()));
    assert_eq!(receive(&mut messages, 1).await, ["1,DIAG,12:00:00,x"]);
    stop.cancel();
    let report = running.await.expect("no panic").expect("a clean stop");
    assert_eq!(report.messages, 1, "the batch counts: the lease was held throughout");
}

/// Tells the test of a batch, and then is busy until it may go on.
struct Busy(mpsc::UnboundedSender<Vec<String>>, Arc<Semaphore>);

impl Handler for Busy {
    type Error = std::convert::Infallible;

    async fn handle(&mut self, batch: &Batch) -> Result<(), Self::Error> {
        let raws = batch.iter().map(|message| message.raw().to_owned()).collect();
        self.0.send(raws).expect("the test listens");
        self.1.acquire().await.expect("it is open").forget();
        Ok(())
    }
}

#[test]
fn a_coalescing_handler_that_was_busy_gets_the_newest_of_all_that_was_read_meanwhile() {
    let servers = Servers::with_stream(STREAM, 1);
    let proxy = Proxy::start(&servers);
    let (told, mut batches) = mpsc::unbounded_channel();
    let go_on = Arc::new(Semaphore::new(0));
    let busy = {
        let go_on = go_on.clone();
        let key = |message: &Message| Some(message.partition_key().to_owned());
        move |_: &ShardId| Coalesce::new(Busy(told.clone(), go_on.clone()), key)
    };
    let builder = Worker::builder(&proxy.sdk_config(), STREAM, "rtr").retrieval(Retrieval::Polling);
    let worker = servers.wait(builder.handler(busy).build()).expect("a worker");
    let stop = CancellationToken::new();
    let running = servers.spawn(worker.run(stop.clone().cancelled_owned()));
    let mut next_batch =
        || servers.wait(async { tokio::time::timeout(LIMIT, batches.recv()).await });

    let lines = lines(0, 3);
    servers.put_lines(STREAM, "k", &lines[..1]);
    assert_eq!(next_batch().expect("in time"), Some(lines[..1].to_vec()));
    for line in &lines[1..] {
        let reads = proxy.calls("GetRecords").len();
        servers.put_lines(STREAM, "k", std::slice::from_ref(line));
        // One that began before the put, one with the record, and one that shows that it was answered.
        let is_read = || (proxy.calls("GetRecords").len() >= reads + 3).then_some(());
        wait_for("the record to be read", is_read);
    }
    go_on.add_permits(10);
    assert_eq!(next_batch().expect("in time"), Some(lines[2..].to_vec()));
    stop.cancel();
    let report = servers.wait(running).expect("no panic").expect("a clean stop");
    assert_eq!(report.messages, 3, "what was left out counts as handled");
}

/// Tells the test about its tenures.
struct Tells(mpsc::UnboundedSender<tramline::Tenure>);

impl Handler for Tells {
    type Error = std::convert::Infallible;

    async fn handle(&mut self, _: &Batch) -> Result<(), Self::Error> {
        Ok(())
    }

    async fn started(&mut self, tenure: &tramline::Tenure) {
        self.0.send(tenure.clone()).expect("the test listens");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn p4_each_tenure_of_a_shard_has_a_higher_fencing_token() {
    let local = Local::start(LocalSettings::default()).await.expect("servers");
    with_stream(&local).await;
    let (sender, mut tenures) = mpsc::unbounded_channel();
    let mut last = 0;
    for id in ["one", "two", "three"] {
        let sender = sender.clone();
        let worker = Worker::builder(&local.sdk_config(), STREAM, "rtr")
            .worker_id(id)
            .retrieval(Retrieval::Polling)
            .handler(move |_: &ShardId| Tells(sender.clone()))
            .build()
            .await
            .expect("a worker");
        let stop = CancellationToken::new();
        let running = tokio::spawn(worker.run(stop.clone().cancelled_owned()));
        let tenure = tokio::time::timeout(LIMIT, tenures.recv()).await.expect("in time");
        let tenure = tenure.expect("the worker runs");
        assert!(tenure.lease_counter > last, "{tenure:?} after {last}");
        last = tenure.lease_counter;
        stop.cancel();
        running.await.expect("no panic").expect("a clean stop");
    }
}
