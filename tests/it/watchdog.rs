//! Shards that do not get on.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio_util::sync::CancellationToken;
use tramline::{Batch, Handler, OnStuck, Report, Retrieval, ShardId, Worker, WorkerError};

use crate::support::{Servers, lines, wait_for};

const STREAM: &str = "ctd-ocs-raw-messages";

#[derive(Clone, Copy)]
enum Hang {
    /// At an `await`, where a task can be dropped.
    Waits,
    /// Without one.
    BlocksThread,
}

/// Hangs in its first call, whichever shard or worker that is in.
#[derive(Clone)]
struct HangsOnce {
    how: Hang,
    calls: Arc<AtomicU32>,
    seen: Arc<Mutex<Vec<String>>>,
    released: CancellationToken,
}

impl HangsOnce {
    fn new(how: Hang) -> Self {
        let (calls, seen, released) = <_>::default();
        Self { how, calls, seen, released }
    }

    fn seen(&self) -> Vec<String> {
        self.seen.lock().expect("a lock").clone()
    }
}

impl Handler for HangsOnce {
    type Error = std::convert::Infallible;

    async fn handle(&mut self, batch: &Batch) -> Result<(), Self::Error> {
        if self.calls.fetch_add(1, Ordering::SeqCst) == 0 {
            match self.how {
                Hang::Waits => std::future::pending().await,
                Hang::BlocksThread => {
                    while !self.released.is_cancelled() {
                        std::thread::sleep(Duration::from_millis(20));
                    }
                }
            }
        } else {
            let raws = batch.iter().map(|message| message.raw().to_owned());
            self.seen.lock().expect("a lock").extend(raws);
        }
        Ok(())
    }
}

/// A worker in a runtime of its own: a thread that is blocked is one of the worker's.
struct Started {
    stop: CancellationToken,
    thread: std::thread::JoinHandle<Result<Report, WorkerError>>,
}

impl Started {
    fn new(servers: &Servers, id: &str, on_stuck: OnStuck, handler: &HangsOnce) -> Self {
        let handler = handler.clone();
        let worker = Worker::builder(&servers.local.sdk_config(), STREAM, "rtr")
            .worker_id(id)
            .retrieval(Retrieval::Polling)
            .lease_duration(Duration::from_secs(2))
            .watchdog(Duration::from_secs(1))
            .on_stuck(on_stuck)
            .handler(move |_: &ShardId| handler.clone())
            .build();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(4)
            .enable_all()
            .build()
            .expect("a runtime");
        let worker = runtime.block_on(worker).expect("a worker");
        let stop = CancellationToken::new();
        let stopped = stop.clone().cancelled_owned();
        let thread = std::thread::spawn(move || runtime.block_on(worker.run(stopped)));
        Self { stop, thread }
    }

    fn stop(self) -> Report {
        self.stop.cancel();
        self.thread.join().expect("no panic").expect("a clean stop")
    }
}

fn with_lines() -> Servers {
    let servers = Servers::with_stream(STREAM, 1);
    servers.put_lines(STREAM, "k", &lines(0, 3));
    servers
}

#[test]
fn p1_a_shard_that_does_not_get_on_is_started_again_told_and_shown() {
    let servers = with_lines();
    let handler = HangsOnce::new(Hang::Waits);
    let worker = Started::new(&servers, "one", OnStuck::Restart, &handler);
    wait_for("the messages", || (handler.seen() == lines(0, 3)).then_some(()));
    let status = ["status", "--stream", STREAM, "--app", "rtr", "--quick", "--json"];
    let shown = wait_for("the trouble in the status", || {
        let shown = crate::support::run(servers.tramline(&status)).succeeded().stdout.concat();
        let shown: serde_json::Value = serde_json::from_str(&shown).expect("JSON");
        (shown["shards"][0]["last_error_is_over"] == true).then_some(shown)
    });
    assert_eq!(shown["shards"][0]["owner"], "one");
    assert!(shown["shards"][0]["since"].is_string(), "{shown}");
    assert!(shown["shards"][0]["renewals"].is_u64(), "{shown}");
    assert_eq!(worker.stop().stuck, 1);
}

#[test]
fn p1_a_shard_that_does_not_get_on_is_released_to_another_worker() {
    let servers = with_lines();
    let handler = HangsOnce::new(Hang::Waits);
    let one = Started::new(&servers, "one", OnStuck::Release, &handler);
    wait_for("the first call", || (handler.calls.load(Ordering::SeqCst) == 1).then_some(()));
    let two = Started::new(&servers, "two", OnStuck::Release, &handler);
    wait_for("the messages", || (handler.seen() == lines(0, 3)).then_some(()));
    assert_eq!(one.stop().messages, 0, "the other one got on with it");
    assert_eq!(two.stop().messages, 3);
}

#[test]
fn p1_a_shard_whose_handler_blocks_its_thread_goes_to_another_worker() {
    let servers = with_lines();
    let handler = HangsOnce::new(Hang::BlocksThread);
    let one = Started::new(&servers, "one", OnStuck::Restart, &handler);
    wait_for("the first call", || (handler.calls.load(Ordering::SeqCst) == 1).then_some(()));
    let two = Started::new(&servers, "two", OnStuck::Restart, &handler);
    wait_for("the messages", || (handler.seen() == lines(0, 3)).then_some(()));
    handler.released.cancel();
    // It was done when it had lost the lease: what it says of its last batch is not stored.
    one.stop.cancel();
    match one.thread.join().expect("no panic") {
        Ok(_) | Err(WorkerError::NotStored { .. }) => {}
        Err(error) => panic!("{error}"),
    }
    assert_eq!(two.stop().messages, 3);
}
