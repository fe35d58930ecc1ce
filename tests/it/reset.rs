//! Starting over: `consume --reset`, the builder's `reset`, and `lease reset` and `status` where checkpoints
//! are kept in documents.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::Duration,
};

use serde_json::Value;
use tramline::{
    Batch, Checkpoints, Handler, Retrieval, ShardId, StartPosition, StopReason, Worker,
};

use crate::support::{Finished, Running, Servers, lines, raws, run, wait_for};

const STREAM: &str = "ctd-ocs-raw-messages";
const OF: [&str; 4] = ["--stream", STREAM, "--app", "rtr"];
const BUCKET: &str = "rtr-state";

/// Servers, and every kind of place for checkpoints.
struct Bed {
    servers: Servers,
    _folder: tempfile::TempDir,
    places: Vec<String>,
}

fn bed(shards: i32) -> Bed {
    let servers = Servers::with_stream(STREAM, shards);
    let s3 = aws_sdk_s3::Client::new(&servers.local.sdk_config());
    servers.wait(s3.create_bucket().bucket(BUCKET).send()).expect("a bucket");
    let folder = tempfile::tempdir().expect("a folder");
    let file = |name: &str| format!("file://{}", folder.path().join(name).display());
    let places = vec![
        "dynamodb".to_owned(),
        format!("s3://{BUCKET}/all.state"),
        format!("s3://{BUCKET}/{{shard}}.state"),
        file("all.state"),
        file("{shard}.state"),
    ];
    Bed { servers, _folder: folder, places }
}

impl Bed {
    fn command(&self, words: &[&str], place: &str, more: &[&str]) -> Finished {
        let args = [words, &OF[..], &["--checkpoint", place], more].concat();
        run(self.servers.tramline(&args))
    }

    fn consume(&self, place: &str, more: &[&str]) -> Finished {
        let args = [&["--exit-when-idle", "700ms", "--retrieval", "polling"], more].concat();
        self.command(&["consume"], place, &args)
    }

    fn consumed(&self, place: &str, more: &[&str]) -> BTreeSet<String> {
        raws(&self.consume(place, more).succeeded().stdout).into_iter().collect()
    }

    fn running(&self, place: &str, more: &[&str]) -> Running {
        let worker = ["consume", "--worker-id", "w1", "--checkpoint-interval", "50ms"];
        let args = [&worker[..], &OF, &["--checkpoint", place], more].concat();
        Running::start(self.servers.tramline(&args))
    }

    fn status(&self, place: &str, more: &[&str]) -> Value {
        let report =
            self.command(&["status"], place, &[&["--json"], more].concat()).succeeded().stdout;
        serde_json::from_str(&report[0]).expect("JSON")
    }

    /// Puts lines, each with a key of its own.
    fn put(&self, from: usize, to: usize) {
        for (n, line) in (from..to).zip(lines(from, to)) {
            self.servers.put_lines(STREAM, &format!("key-{n}"), &[line]);
        }
    }
}

fn all(from: usize, to: usize) -> BTreeSet<String> {
    lines(from, to).into_iter().collect()
}

#[test]
fn p1_consume_with_reset_starts_over_once_wherever_checkpoints_are_kept() {
    for n in 0..5 {
        let bed = bed(2);
        let place = &bed.places[n];
        bed.put(0, 10);
        assert_eq!(bed.consumed(place, &["--reset"]), all(0, 10), "{place}: nothing to reset yet");
        assert!(bed.consumed(place, &[]).is_empty(), "{place}");
        assert_eq!(bed.consumed(place, &["--reset"]), all(0, 10), "{place}");
        assert!(bed.consumed(place, &[]).is_empty(), "{place}: it is no setting that stays");
        // What is wrong is told before anything is moved.
        bed.put(10, 12);
        let future = bed.consume(place, &["--reset", "--start", "2999-01-01T00:00:00Z"]);
        assert_eq!(future.status.code(), Some(1), "{place}");
        assert_eq!(bed.consumed(place, &[]), all(10, 12), "{place}: a mistake moves nothing");
    }
}

#[test]
fn p4_consume_with_reset_is_refused_while_a_worker_reads_and_waits_for_a_dead_one() {
    for n in [0, 2, 4] {
        let bed = bed(2);
        let place = &bed.places[n];
        bed.put(0, 10);
        let mut running = bed.running(place, &["--lease-duration", "2s"]);
        running.wait_for_lines(10);
        let before = bed.status(place, &["--quick"]);
        let refused = bed.consume(place, &["--reset", "--lease-duration", "10s"]);
        assert_eq!((refused.status.code(), &refused.stdout[..]), (Some(1), &[][..]));
        assert!(refused.stderr.contains("is read by w1; stop every worker"), "{}", refused.stderr);
        let moved = |report: &Value| {
            let shards = report["shards"].as_array().expect("shards").iter();
            shards.map(|shard| shard["checkpoint"].clone()).collect::<Vec<_>>()
        };
        // What was read meanwhile was stored; nothing went back.
        let after = bed.status(place, &["--quick"]);
        assert!(!format!("{:?}", moved(&after)).contains("TRIM_HORIZON"), "{before} {after}");
        assert_eq!(running.stdout().len(), 10);
        running.kill();
        let again = bed.consume(place, &["--reset", "--lease-duration", "2s"]).succeeded();
        assert_eq!(raws(&again.stdout).into_iter().collect::<BTreeSet<_>>(), all(0, 10));
        assert!(again.stderr.contains("waiting for up to 2s"), "{}", again.stderr);
    }
}

/// How many messages it has counted, which is its state.
#[derive(Clone, Default)]
struct Count {
    count: u64,
    told: Arc<Mutex<u64>>,
}

impl Handler for Count {
    type Error = std::num::ParseIntError;

    async fn handle(&mut self, batch: &Batch) -> Result<(), Self::Error> {
        self.count += batch.len() as u64;
        Ok(())
    }

    async fn stopping(&mut self, _: StopReason) {
        *self.told.lock().expect("a lock") += self.count;
    }

    fn snapshot(&mut self) -> Result<Option<Vec<u8>>, Self::Error> {
        Ok(Some(self.count.to_string().into_bytes()))
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), Self::Error> {
        self.count = String::from_utf8_lossy(state).parse()?;
        Ok(())
    }
}

#[test]
fn p1_a_reset_drops_the_state_that_belonged_to_the_checkpoint() {
    let bed = bed(2);
    bed.put(0, 10);
    let worker = || {
        Worker::builder(&bed.servers.local.sdk_config(), STREAM, "rtr")
            .retrieval(Retrieval::Polling)
            .start(StartPosition::TrimHorizon)
            .stop_when_idle(Duration::from_millis(500))
    };
    for place in &bed.places[1..] {
        let place = Checkpoints::parse(place).expect("a place");
        let counted = |reset: bool| {
            let count = Count::default();
            let told = count.told.clone();
            let worker = worker().checkpoints(place.clone());
            let worker = if reset { worker.reset() } else { worker };
            bed.servers.wait(async {
                let worker = worker.handler(move |_: &ShardId| count.clone());
                worker.build().await?.run(std::future::pending()).await
            })?;
            Ok::<_, tramline::WorkerError>(*told.lock().expect("a lock"))
        };
        assert_eq!(counted(false).expect("a clean stop"), 10, "{place}");
        assert_eq!(counted(false).expect("a clean stop"), 10, "{place}: the state is taken up");
        assert_eq!(counted(true).expect("a clean stop"), 10, "{place}: not twenty");
    }
}

#[test]
fn status_and_lease_reset_work_where_checkpoints_are_kept_in_documents() {
    for n in 1..5 {
        let bed = bed(2);
        let place = &bed.places[n];
        let missing = bed.command(&["status"], place, &["--quick"]);
        assert_eq!(missing.status.code(), Some(1), "{place}");
        assert!(missing.stderr.contains("does not exist; check --"), "{}", missing.stderr);

        bed.put(0, 10);
        assert_eq!(bed.consumed(place, &[]), all(0, 10));
        bed.put(10, 20);
        let report = bed.status(place, &["--quick", "--lag"]);
        for shard in report["shards"].as_array().expect("shards") {
            let checkpoint = shard["checkpoint"].as_str().expect("a checkpoint");
            assert!(checkpoint.bytes().all(|b| b.is_ascii_digit()), "{place}: {shard}");
            assert_eq!(shard["state"], "free", "{place}: {shard}");
            assert!(shard["lag_ms"].is_u64() && shard["checkpoint_age_ms"].is_u64(), "{shard}");
        }
        let documents = report["documents"].as_array().expect("documents");
        assert_eq!(documents.len(), if place.contains("{shard}") { 2 } else { 1 }, "{place}");
        assert_eq!(report["table"].is_null(), !place.contains("{shard}"), "{place}");
        let shown = bed.command(&["status"], place, &["--quick"]).succeeded().stdout;
        assert!(shown.iter().all(|line| line.chars().count() <= 80 || line.contains("://")));

        let reset = ["--to", "trim-horizon", "--observe", "1s"];
        let dry = bed.command(&["lease", "reset"], place, &reset).succeeded().stdout;
        let moves = dry.iter().filter(|line| line.ends_with("-> TRIM_HORIZON")).count();
        assert_eq!(moves, 2, "{place}: {dry:?}");
        assert_eq!(bed.consumed(place, &[]), all(10, 20), "{place}: nothing was written");
        let yes = [&reset[..], &["--yes"]].concat();
        bed.command(&["lease", "reset"], place, &yes).succeeded();
        assert_eq!(bed.status(place, &["--quick"])["shards"][0]["checkpoint"], "TRIM_HORIZON");
        assert_eq!(bed.consumed(place, &[]), all(0, 20), "{place}");

        let other = [&OF[..2], &["--app", "other", "--lease-table", "rtr"]].concat();
        let foreign = [&["status", "--quick", "--checkpoint", place], &other[..]].concat();
        let foreign = run(bed.servers.tramline(&foreign));
        assert!(foreign.stderr.contains("belongs to application rtr"), "{}", foreign.stderr);
    }
}

#[test]
fn p4_a_document_is_not_reset_under_the_worker_that_writes_it() {
    for n in 1..5 {
        let bed = Arc::new(bed(1));
        let place = &bed.places[n];
        bed.put(0, 5);
        let running = bed.running(place, &[]);
        running.wait_for_lines(5);
        let told = Arc::<Mutex<Option<Finished>>>::default();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let reset = ["--to", "trim-horizon", "--observe", "6s", "--yes"];
                let refused = bed.command(&["lease", "reset"], place, &reset);
                *told.lock().expect("a lock") = Some(refused);
            });
            let mut next = 5;
            wait_for("the reset to be refused", || {
                bed.put(next, next + 1);
                next += 1;
                told.lock().expect("a lock").is_some().then_some(())
            });
        });
        let refused = told.lock().expect("a lock").take().expect("it is over");
        assert_eq!(refused.status.code(), Some(1), "{place}");
        assert!(refused.stderr.contains("w1"), "{place}: {}", refused.stderr);
        assert_eq!(refused.stderr.lines().count(), 1, "{place}: {}", refused.stderr);
        running.stop().succeeded();
        let forced = bed.command(&["lease", "reset"], place, &["--to", "latest", "--force"]);
        assert!(forced.stderr.contains("--force is for the lease table"), "{}", forced.stderr);
    }
}
