//! Handler state that is stored with the position, and the ways to keep no position at all.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use tramline::{
    Batch, Checkpoints, Handler, Retrieval, ShardId, StartPosition, Worker, WorkerBuilder,
};

use crate::support::{Servers, Traffic, lines, raws, run};

const STREAM: &str = "ctd-ocs-raw-messages";
const KILLS: u32 = 100;

#[allow(dead_code)] // Its `main` brings its own servers.
#[path = "../../examples/exactly_once.rs"]
mod example;

use example::Totals;

fn builder(servers: &Servers, place: &Checkpoints) -> WorkerBuilder<()> {
    Worker::builder(&servers.local.sdk_config(), STREAM, "totals")
        .retrieval(Retrieval::Polling)
        .checkpoint_interval(Duration::from_millis(20))
        .checkpoints(place.clone())
        // A fleet's worker takes its own leases back at once when it is restarted under its name.
        .worker_id("only")
}

/// Runs until idle, or for as long as it lives: then it is gone at once, wherever it was.
fn run_for(servers: &Servers, place: &Checkpoints, life: Option<Duration>) -> Vec<(u64, u64)> {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let told = Arc::<Mutex<Vec<(u64, u64)>>>::default();
    let totals = Totals::new(told.clone());
    let builder = builder(servers, place).stop_when_idle(Duration::from_millis(1500));
    let running = async {
        let worker = builder.handler(move |_: &ShardId| totals.clone()).build().await?;
        worker.run(std::future::pending()).await
    };
    match life {
        Some(life) => {
            let running = runtime.spawn(running);
            std::thread::sleep(life);
            assert!(!running.is_finished(), "it ended by itself");
        }
        None => {
            runtime.block_on(running).expect("a clean stop");
        }
    }
    // Not a clean stop: every task is dropped where it is.
    runtime.shutdown_timeout(Duration::from_secs(30));
    told.lock().expect("a lock").clone()
}

fn totals_after_kills(place: &Checkpoints) {
    let servers = Arc::new(Servers::with_stream(STREAM, 2));
    let seed = std::env::var("TRAMLINE_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = seed.unwrap_or_else(rand::random);
    println!("TRAMLINE_SEED={seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    if let Checkpoints::S3 { bucket, .. } = place {
        let s3 = aws_sdk_s3::Client::new(&servers.local.sdk_config());
        servers.wait(s3.create_bucket().bucket(bucket).send()).expect("a bucket");
    }
    let traffic = Traffic::start(&servers, STREAM);
    for _ in 0..KILLS {
        run_for(&servers, place, Some(Duration::from_millis(rng.random_range(20..160))));
    }
    let sent = traffic.finish();

    let told = run_for(&servers, place, None);
    assert_eq!(told.len(), 2, "both shards");
    let (count, sum) = told.iter().fold((0, 0), |(c, s), (count, sum)| (c + count, s + sum));
    let n = sent.len() as u64;
    assert_eq!((count, sum), (n, n * (n - 1) / 2), "each message counts exactly once");
}

#[test]
fn p1_totals_in_a_file_are_exact_after_a_hundred_kills() {
    let folder = tempfile::tempdir().expect("a folder");
    totals_after_kills(&Checkpoints::file(folder.path().join("totals.state")));
}

#[test]
fn p1_totals_in_s3_are_exact_after_a_hundred_kills() {
    totals_after_kills(&Checkpoints::s3("rtr-state", "totals/{shard}.state"));
}

/// The same, but cannot handle messages with the numbers of `bad`.
#[derive(Clone)]
struct Picky {
    totals: Totals,
    bad: Option<u64>,
}

impl Handler for Picky {
    type Error = String;

    async fn handle(&mut self, batch: &Batch) -> Result<(), String> {
        let bad = self.bad.map(|number| format!("{number},"));
        if bad.is_some_and(|bad| batch.iter().any(|message| message.raw().starts_with(&bad))) {
            return Err("as planned".to_owned());
        }
        self.totals.handle(batch).await.map_err(|error| error.to_string())
    }

    async fn stopping(&mut self, why: tramline::StopReason) {
        self.totals.stopping(why).await;
    }

    fn snapshot(&mut self) -> Result<Option<Vec<u8>>, String> {
        self.totals.snapshot().map_err(|error| error.to_string())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), String> {
        self.totals.restore(state).map_err(|error| error.to_string())
    }
}

#[test]
fn p1_totals_are_exact_after_a_stop_in_the_middle_of_a_record() {
    let servers = Servers::with_stream(STREAM, 1);
    let folder = tempfile::tempdir().expect("a folder");
    let place = Checkpoints::file(folder.path().join("totals.state"));
    let run = |bad: Option<u64>| {
        let told = Arc::<Mutex<Vec<(u64, u64)>>>::default();
        let picky = Picky { totals: Totals::new(told.clone()), bad };
        let retries = tramline::Retries {
            attempts: 2,
            first_wait: Duration::from_millis(1),
            ..tramline::Retries::default()
        };
        let builder = builder(&servers, &place).retries(retries);
        let ended = servers.wait(async {
            let worker = builder.stop_when_idle(Duration::from_millis(500));
            let worker = worker.handler(move |_: &ShardId| picky.clone()).build().await?;
            worker.run(std::future::pending()).await
        });
        let told = told.lock().expect("a lock").clone();
        (ended.err().map(|error| error.to_string()), told)
    };
    // Three records: of the last, two messages are handled before the one that stops the shard.
    for (from, to) in [(0, 3), (3, 6), (6, 12)] {
        servers.put_lines(STREAM, "k", &lines(from, to));
    }
    let (error, told) = run(Some(8));
    assert!(error.is_some_and(|error| error.contains("as planned")), "it stops");
    assert_eq!(told, [(8, 28)]);
    assert_eq!(run(None), (None, vec![(12, 66)]), "each message counts exactly once");
}

#[test]
fn a_handler_with_state_is_told_that_the_lease_table_has_no_place_for_it() {
    let servers = Servers::with_stream(STREAM, 1);
    servers.put_lines(STREAM, "k", &lines(0, 3));
    let worker =
        builder(&servers, &Checkpoints::lease_table()).handler(|_: &ShardId| Totals::default());
    let error = servers.wait(async { worker.build().await?.run(std::future::pending()).await });
    let error = error.expect_err("no place");
    assert!(error.to_string().contains("keep checkpoints in S3 or in a file"), "{error}");
}

#[test]
fn p6_the_program_goes_on_where_its_state_file_says_and_needs_no_lease_table() {
    let servers = Servers::with_stream(STREAM, 2);
    let folder = tempfile::tempdir().expect("a folder");
    let place = format!("file://{}", folder.path().join("green.state").display());
    let args = ["consume", "--stream", STREAM, "--app", "rtr", "--exit-when-idle", "500ms"];
    let consume =
        |more: &[&str]| raws(&run(servers.tramline(&[&args, more].concat())).succeeded().stdout);
    let put = |from, to| {
        for (n, line) in (from..to).zip(lines(from, to)) {
            servers.put_lines(STREAM, &format!("key-{n}"), &[line]);
        }
    };
    let sorted = |mut lines: Vec<String>| {
        lines.sort();
        lines
    };
    put(0, 20);
    assert_eq!(sorted(consume(&["--checkpoint", &place])), sorted(lines(0, 20)));
    put(20, 25);
    assert_eq!(sorted(consume(&["--checkpoint", &place])), sorted(lines(20, 25)));
    let tables = aws_sdk_dynamodb::Client::new(&servers.local.sdk_config()).list_tables().send();
    assert_eq!(servers.wait(tables).expect("a list").table_names(), [""; 0]);

    // Nothing stored: each run begins at the start position.
    let none = ["--no-checkpoint", "--start", "service-day"];
    assert_eq!(sorted(consume(&none)), sorted(lines(0, 25)));
    assert_eq!(sorted(consume(&none)), sorted(lines(0, 25)));
}

#[test]
fn a_checkpoint_that_is_too_old_is_not_gone_on_from() {
    let servers = Servers::with_stream(STREAM, 1);
    let consume = |worker: WorkerBuilder<()>| {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let kept = seen.clone();
        servers.wait(async {
            let handler = move |_: &ShardId| Remember(kept.clone());
            let worker = worker.stop_when_idle(Duration::from_millis(500)).handler(handler);
            worker.build().await?.run(std::future::pending()).await
        })?;
        Ok::<_, tramline::WorkerError>(
            Arc::try_unwrap(seen).expect("the worker is gone").into_inner().expect("a lock"),
        )
    };
    struct Remember(Arc<Mutex<Vec<String>>>);
    impl Handler for Remember {
        type Error = std::convert::Infallible;
        async fn handle(&mut self, batch: &Batch) -> Result<(), Self::Error> {
            let raws = batch.iter().map(|message| message.raw().to_owned());
            self.0.lock().expect("a lock").extend(raws);
            Ok(())
        }
    }
    let worker = || {
        Worker::builder(&servers.local.sdk_config(), STREAM, "rtr")
            .retrieval(Retrieval::Polling)
            .start(StartPosition::TrimHorizon)
    };
    servers.put_lines(STREAM, "k", &lines(0, 2));
    assert_eq!(consume(worker()).expect("a clean stop"), lines(0, 2));
    servers.put_lines(STREAM, "k", &lines(2, 4));
    // Arrival times are cut to the second.
    std::thread::sleep(Duration::from_millis(3200));
    servers.put_lines(STREAM, "k", &lines(4, 6));
    let age = tramline::MaxCheckpointAge::Age(Duration::from_secs(2));
    assert_eq!(consume(worker().max_checkpoint_age(age)).expect("a clean stop"), lines(4, 6));
    // A checkpoint of today is gone on from.
    servers.put_lines(STREAM, "k", &lines(6, 8));
    let today = tramline::MaxCheckpointAge::Age(Duration::from_secs(3600));
    assert_eq!(consume(worker().max_checkpoint_age(today)).expect("a clean stop"), lines(6, 8));
}
