//! Messages that cannot be handled.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use serde_json::Value;
use tramline::{
    Ack, Batch, DeadLetters, Handler, OnFailure, Report, Retries, Retrieval, RetryPer, ShardId,
    StopReason, Tolerance, Worker, WorkerBuilder, WorkerError,
};

use crate::support::{Servers, lines};

const STREAM: &str = "ctd-ocs-raw-messages";

/// How a message makes the handler fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fails {
    Error,
    Panic,
    Hangs,
}

/// Handles every line but those that it is to fail on.
#[derive(Clone, Default)]
struct Picky {
    on: BTreeMap<String, Fails>,
    seen: Arc<Mutex<Vec<String>>>,
    offered: Arc<Mutex<BTreeMap<String, u32>>>,
    stopped: Arc<Mutex<Vec<StopReason>>>,
}

impl Picky {
    fn on(line: &str, fails: Fails) -> Self {
        Self { on: [(line.to_owned(), fails)].into(), ..Self::default() }
    }

    fn seen(&self) -> Vec<String> {
        self.seen.lock().expect("a lock").clone()
    }

    fn offered(&self, line: &str) -> u32 {
        self.offered.lock().expect("a lock").get(line).copied().unwrap_or(0)
    }
}

impl Handler for Picky {
    type Error = String;

    async fn handle(&mut self, batch: &Batch) -> Result<(), String> {
        for message in batch {
            *self.offered.lock().expect("a lock").entry(message.raw().to_owned()).or_default() += 1;
        }
        for message in batch {
            match self.on.get(message.raw()) {
                Some(Fails::Error) => return Err(format!("no place for {}", message.raw())),
                Some(Fails::Panic) => panic!("as planned"),
                Some(Fails::Hangs) => std::future::pending().await,
                None => {}
            }
        }
        self.seen.lock().expect("a lock").extend(batch.iter().map(|m| m.raw().to_owned()));
        Ok(())
    }

    async fn stopping(&mut self, why: StopReason) {
        self.stopped.lock().expect("a lock").push(why);
    }
}

fn quick() -> Retries {
    Retries { attempts: 2, first_wait: Duration::from_millis(10), ..Retries::default() }
}

fn run_with<H: Handler + Clone>(
    servers: &Servers,
    handler: &H,
    set: impl FnOnce(WorkerBuilder<()>) -> WorkerBuilder<()>,
) -> Result<Report, WorkerError> {
    let handler = handler.clone();
    let builder = Worker::builder(&servers.local.sdk_config(), STREAM, "rtr")
        .retrieval(Retrieval::Polling)
        .retries(quick())
        .stop_when_idle(Duration::from_millis(500));
    servers.wait(async {
        let worker = set(builder).handler(move |_: &ShardId| handler.clone()).build().await?;
        worker.run(std::future::pending()).await
    })
}

fn with_lines(from: usize, to: usize) -> Servers {
    let servers = Servers::with_stream(STREAM, 1);
    servers.put_lines(STREAM, "k", &lines(from, to));
    servers
}

fn without(all: &[String], line: &str) -> Vec<String> {
    all.iter().filter(|other| *other != line).cloned().collect()
}

#[test]
fn p1_a_poison_message_stops_its_shard_before_it_and_is_read_again() {
    let all = lines(0, 9);
    let servers = with_lines(0, 5);
    servers.put_lines(STREAM, "k", &all[5..]);
    let picky = Picky::on(&all[7], Fails::Error);
    let error = run_with(&servers, &picky, |w| w).expect_err("it stops");
    assert!(matches!(error, WorkerError::Handler { attempts: 2, .. }), "{error}");
    assert!(error.to_string().contains("no place for"), "{error}");
    assert_eq!(*picky.stopped.lock().expect("a lock"), [StopReason::Failed]);
    assert_eq!(picky.seen()[..5], all[..5], "what is before it was handled, in order");
    assert!(!picky.seen().contains(&all[7]) && !picky.seen().contains(&all[8]));

    // What was handled wholly is not read again; the record of the poison message is.
    let repaired = Picky::default();
    run_with(&servers, &repaired, |w| w).expect("a clean stop");
    assert_eq!(repaired.seen(), all[5..], "the record with the poison message");
}

#[test]
fn p1_a_shard_that_stopped_does_not_hold_up_the_others() {
    let servers = Servers::with_stream(STREAM, 2);
    for (n, line) in lines(0, 40).into_iter().enumerate() {
        servers.put_lines(STREAM, &format!("key-{n}"), &[line]);
    }
    let poison = &lines(0, 1)[0];
    let picky = Picky::on(poison, Fails::Error);
    let error = run_with(&servers, &picky, |w| w).expect_err("one shard stopped");
    assert!(matches!(error, WorkerError::Handler { .. }), "{error}");
    // All of the other shard, and nothing of the one that the poison message begins.
    let seen = picky.seen().len();
    assert!((5..40).contains(&seen), "{seen}");
}

#[test]
fn p9_a_poison_message_goes_to_the_dead_letters_and_its_neighbours_are_handled() {
    for (fails, reason) in [
        (Fails::Error, "no place for 3,DIAG"),
        (Fails::Panic, "it panicked: as planned"),
        (Fails::Hangs, "it was not done within 200ms"),
    ] {
        let all = lines(0, 6);
        let servers = with_lines(0, 6);
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("letters.jsonl");
        let picky = Picky::on(&all[3], fails);
        let report = run_with(&servers, &picky, |worker| {
            worker
                .dead_letters(DeadLetters::file(&path))
                .retries(Retries { time_limit: Some(Duration::from_millis(200)), ..quick() })
        });
        let report = report.expect("a clean stop");
        assert_eq!((report.messages, report.dead_letters), (6, 1));
        assert_eq!(picky.seen(), without(&all, &all[3]), "{fails:?}: in order");
        assert_eq!(picky.offered(&all[3]), 4, "{fails:?}: twice in the batch, twice alone");

        let letters = std::fs::read_to_string(&path).expect("letters");
        let letters: Vec<Value> =
            letters.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        assert_eq!(letters.len(), 1);
        let letter = &letters[0]["dead_letter"];
        assert!(letter["reason"].as_str().expect("a text").contains(reason), "{letter}");
        assert_eq!(letter["event"]["data"]["raw"], all[3].as_str());
        assert_eq!((&letter["attempts"], &letter["application"]), (&2.into(), &"rtr".into()));
    }
}

#[test]
fn a_batch_that_is_dealt_with_as_a_whole_goes_to_the_dead_letters_as_a_whole() {
    let all = lines(0, 6);
    let servers = with_lines(0, 6);
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("letters.jsonl");
    let picky = Picky::on(&all[3], Fails::Error);
    let report = run_with(&servers, &picky, |worker| {
        worker
            .dead_letters(DeadLetters::file(&path))
            .retries(Retries { per: RetryPer::Batch, ..quick() })
    });
    assert_eq!(report.expect("a clean stop").dead_letters, 6);
    assert_eq!(picky.seen(), [""; 0]);
}

#[test]
fn a_message_that_is_skipped_is_counted_and_the_shard_goes_on() {
    let all = lines(0, 6);
    let servers = with_lines(0, 6);
    let picky = Picky::on(&all[0], Fails::Error);
    let report = run_with(&servers, &picky, |worker| worker.on_failure(OnFailure::Skip));
    assert_eq!(report.expect("a clean stop").skipped, 1);
    assert_eq!(picky.seen(), all[1..]);
}

#[test]
fn p1_more_failures_than_are_tolerated_stop_the_shard_although_they_could_be_skipped() {
    let all = lines(0, 10);
    let servers = with_lines(0, 10);
    let on = all[2..].iter().map(|line| (line.clone(), Fails::Error)).collect();
    let picky = Picky { on, ..Picky::default() };
    let tolerance = Tolerance { percent: 40.0, window: Duration::from_secs(60) };
    let error = run_with(&servers, &picky, |worker| {
        worker.on_failure(OnFailure::Skip).failure_tolerance(tolerance)
    });
    let error = error.expect_err("too many");
    assert!(matches!(error, WorkerError::TooManyFailures { .. }), "{error}");
    assert_eq!(picky.seen(), all[..2]);
}

/// Takes acknowledgements and gives them later, in reverse, from another task; fails some messages once.
#[derive(Clone, Default)]
struct Later {
    inner: Picky,
    held: Arc<Mutex<Vec<(String, Ack)>>>,
    refuses: Arc<Mutex<Vec<String>>>,
}

impl Handler for Later {
    type Error = String;

    async fn handle(&mut self, batch: &Batch) -> Result<(), String> {
        let acks = batch.ack_later();
        let mut held = self.held.lock().expect("a lock");
        held.extend(batch.iter().map(|message| message.raw().to_owned()).zip(acks));
        if held.len() < 3 && batch.len() > 1 {
            return Ok(());
        }
        let later = std::mem::take(&mut *held);
        let (refuses, seen) = (self.refuses.clone(), self.inner.seen.clone());
        tokio::spawn(async move {
            for (raw, ack) in later.into_iter().rev() {
                tokio::time::sleep(Duration::from_millis(5)).await;
                let mut refuses = refuses.lock().expect("a lock");
                match refuses.iter().position(|line| *line == raw) {
                    Some(n) => {
                        refuses.remove(n);
                        ack.nack("not now");
                    }
                    None => {
                        seen.lock().expect("a lock").push(raw);
                        ack.ack();
                    }
                }
            }
        });
        Ok(())
    }
}

#[test]
fn p1_acknowledgements_come_in_any_order_and_a_message_that_failed_comes_again() {
    let all = lines(0, 9);
    let servers = Servers::with_stream(STREAM, 1);
    for chunk in all.chunks(3) {
        servers.put_lines(STREAM, "k", chunk);
    }
    let later = Later::default();
    later.refuses.lock().expect("a lock").push(all[4].clone());
    // It would not be idle while acknowledgements are outstanding: the stop waits for them.
    run_with(&servers, &later, |w| w).expect("a clean stop");
    let mut seen = later.inner.seen();
    seen.sort();
    assert_eq!(seen, all);
    let again = Picky::default();
    run_with(&servers, &again, |w| w).expect("a clean stop");
    assert_eq!(again.seen(), [""; 0], "all of it was checkpointed");
}

#[test]
fn p1_an_acknowledgement_from_an_attempt_that_failed_is_not_taken_for_one_of_a_later_message() {
    /// Takes acknowledgements of the first batch, fails, and gives them when later ones are under way.
    #[derive(Clone, Default)]
    struct Confuses {
        calls: Arc<Mutex<u32>>,
        stale: Arc<Mutex<Vec<Ack>>>,
        held: Arc<Mutex<Vec<Ack>>>,
    }
    impl Handler for Confuses {
        type Error = String;
        async fn handle(&mut self, batch: &Batch) -> Result<(), String> {
            let mut calls = self.calls.lock().expect("a lock");
            *calls += 1;
            match *calls {
                1 => {
                    self.stale.lock().expect("a lock").extend(batch.ack_later());
                    Err("at first".into())
                }
                2 => Ok(()), // The same batch, handled at once.
                _ => {
                    self.held.lock().expect("a lock").extend(batch.ack_later());
                    self.stale.lock().expect("a lock").drain(..).for_each(Ack::ack);
                    Ok(())
                }
            }
        }
    }
    let servers = Servers::with_stream(STREAM, 1);
    let all = lines(0, 4);
    servers.put_lines(STREAM, "k", &all[..2]);
    let handler = Confuses::default();
    let second = handler.clone();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            crate::support::wait_for("the first batch", || {
                (*second.calls.lock().expect("a lock") >= 2).then_some(())
            });
            servers.put_lines(STREAM, "k", &all[2..]);
        });
        let limit = Duration::from_millis(400);
        run_with(&servers, &handler, |w| {
            w.shutdown_limit(limit).stop_when_idle(Duration::from_secs(2))
        })
        .expect("a clean stop");
    });
    assert!(*handler.calls.lock().expect("a lock") >= 3, "the second batch was offered");
    let again = Picky::default();
    run_with(&servers, &again, |w| w).expect("a clean stop");
    assert_eq!(again.seen(), all[2..], "the second batch was never acknowledged");
}

#[test]
fn p1_what_was_never_acknowledged_is_read_again() {
    /// Keeps every acknowledgement but the first.
    #[derive(Clone, Default)]
    struct Hoards(Arc<Mutex<Vec<Ack>>>);
    impl Handler for Hoards {
        type Error = String;
        async fn handle(&mut self, batch: &Batch) -> Result<(), String> {
            let mut acks = batch.ack_later().into_iter();
            acks.next().into_iter().for_each(Ack::ack);
            self.0.lock().expect("a lock").extend(acks);
            Ok(())
        }
    }
    let servers = Servers::with_stream(STREAM, 1);
    let all = lines(0, 4);
    for line in &all {
        servers.put_lines(STREAM, "k", std::slice::from_ref(line));
    }
    let limit = Duration::from_millis(400);
    run_with(&servers, &Hoards::default(), |w| w.shutdown_limit(limit)).expect("a clean stop");
    let again = Picky::default();
    run_with(&servers, &again, |w| w).expect("a clean stop");
    assert_eq!(again.seen(), all[1..], "only the first was finished");
}

#[test]
fn a_closed_window_is_replayed_to_its_end_and_nothing_beyond() {
    let servers = Servers::with_stream(STREAM, 2);
    let put = |from, to| {
        for (n, line) in (from..to).zip(lines(from, to)) {
            servers.put_lines(STREAM, &format!("key-{n}"), &[line]);
        }
    };
    put(0, 20);
    // The embedded Kinesis cuts arrival times to the second.
    std::thread::sleep(Duration::from_millis(2100));
    let until = jiff::Timestamp::from_second(jiff::Timestamp::now().as_second()).expect("a time");
    put(20, 40);
    let args = ["consume", "--stream", STREAM, "--app", "replay", "--until", &until.to_string()];
    let finished = crate::support::run(servers.tramline(&args)).succeeded();
    let mut raws = crate::support::raws(&finished.stdout);
    raws.sort();
    let mut expected = lines(0, 20);
    expected.sort();
    assert_eq!(raws, expected);
}
