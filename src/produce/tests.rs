//! The whole way behind the sockets against a stream that fails at random.

use std::collections::{BTreeMap, HashSet};

use futures_util::FutureExt as _;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

use super::{
    put::Entry,
    shards::{hash_key, tests::shards},
    spool::tests::Device,
    *,
};
use crate::aws::{AwsError, AwsErrorKind};

/// A stream that stores what it is told to, and fails as its seed says.
#[derive(Clone)]
struct Faulty(Arc<Mutex<State>>);

struct State {
    rng: ChaCha8Rng,
    /// Chance in a hundred that something happens to a call.
    faults: u32,
    /// No call reaches it.
    away: bool,
    /// The data of all records, by partition key.
    stored: BTreeMap<String, Vec<Vec<u8>>>,
    sequence: u64,
    /// When each shard stored how many bytes.
    taken: Vec<(Instant, usize, usize)>,
    shards: usize,
    calls: u64,
    largest_call: usize,
}

fn error(kind: AwsErrorKind) -> AwsError {
    AwsError::new("kinesis:PutRecords", kind, "as the test wants it")
}

impl Faulty {
    fn new(seed: u64, faults: u32) -> Self {
        Self(Arc::new(Mutex::new(State {
            rng: ChaCha8Rng::seed_from_u64(seed),
            faults,
            away: false,
            stored: BTreeMap::new(),
            sequence: 0,
            taken: Vec::new(),
            shards: 2,
            calls: 0,
            largest_call: 0,
        })))
    }

    /// The OCS lines of each key. What was put several times is one record only if its copies follow
    /// each other directly.
    fn lines(&self) -> BTreeMap<String, Vec<String>> {
        let state = lock(&self.0);
        let lines = |records: &Vec<Vec<u8>>| {
            let mut once = records.clone();
            once.dedup();
            once.iter().flat_map(|record| raws(record)).collect()
        };
        state.stored.iter().map(|(key, records)| (key.clone(), lines(records))).collect()
    }
}

fn raws(record: &[u8]) -> Vec<String> {
    let events: Vec<Value> = serde_json::from_slice(record).expect("a JSON array");
    events.iter().map(|event| event["data"]["raw"].as_str().expect("a text").to_owned()).collect()
}

impl State {
    fn happens(&mut self, percent: u32) -> bool {
        self.rng.random_range(0..100) < percent
    }

    fn store(&mut self, record: &Entry) -> StoredAt {
        self.sequence += 1;
        let shard = (hash_key(&record.partition_key) / (u128::MAX / self.shards as u128)) as usize;
        let shard = shard.min(self.shards - 1);
        let bytes = record.data.len() + record.partition_key.len();
        self.taken.push((Instant::now(), shard, bytes));
        self.stored.entry(record.partition_key.clone()).or_default().push(record.data.clone());
        StoredAt {
            shard: format!("shardId-{shard:012}"),
            sequence_number: self.sequence.to_string(),
        }
    }

    fn delay(&mut self) -> Duration {
        Duration::from_millis(self.rng.random_range(0..200))
    }
}

impl PutRecords for Faulty {
    async fn put_records(
        &self,
        records: Vec<Entry>,
    ) -> Result<Vec<Result<StoredAt, AwsError>>, AwsError> {
        use AwsErrorKind::*;

        let keys: HashSet<&str> = records.iter().map(|r| r.partition_key.as_str()).collect();
        assert_eq!(keys.len(), records.len(), "one record of a lane in a call");
        assert!(records.len() <= CALL_RECORDS);
        let bytes: usize = records.iter().map(|r| r.data.len() + r.partition_key.len()).sum();
        assert!(bytes <= 5 * 1024 * 1024);
        let (before, after, faulty, fault) = {
            let mut state = lock(&self.0);
            state.calls += 1;
            state.largest_call = state.largest_call.max(records.len());
            let faults = state.faults;
            (state.delay(), state.delay(), state.happens(faults), state.rng.random_range(0..7))
        };
        tokio::time::sleep(before).await;
        if lock(&self.0).away {
            return Err(error(Unreachable));
        }
        let whole = match fault {
            0 => Some(Throttled),
            1 => Some(Server),
            2 => Some(Credentials),
            3 => Some(Refused),
            _ => None,
        };
        if let (true, Some(kind)) = (faulty, whole) {
            return Err(error(kind));
        }
        let answers = {
            let mut state = lock(&self.0);
            let answer = |record: &Entry| match faulty && fault != 6 && state.happens(50) {
                false => Ok(state.store(record)),
                true if state.happens(50) => Err(error(Throttled)),
                true => {
                    if state.happens(50) {
                        state.store(record);
                    }
                    Err(error(Server))
                }
            };
            records.iter().map(answer).collect()
        };
        tokio::time::sleep(after).await;
        match faulty && fault == 6 {
            // The answer is lost.
            true => Err(error(Unreachable)),
            false => Ok(answers),
        }
    }
}

/// A lane's lines without what was put again. A record that may have come from a producer that crashed is
/// followed directly by one that begins with the same lines, and none comes again later.
fn once(records: &[Vec<u8>]) -> Vec<String> {
    let mut once: Vec<Vec<String>> = Vec::new();
    for lines in records.iter().map(|record| raws(record)) {
        match once.last_mut() {
            Some(last) if last[0] == lines[0] => {
                assert!(lines.starts_with(last), "a repeat has all of the record before it");
                *last = lines;
            }
            _ => once.push(lines),
        }
    }
    once.concat()
}

fn start(put: Faulty, settings: ProducerSettings, store: Store, left: Vec<Left>) -> Producer {
    let (listed, shard_lists) = mpsc::channel(1);
    listed.try_send(shards(2)).expect("room for one");
    let opened = Opened { store, left, salt: [0; 16] };
    Producer::with(put, "stream", settings, None, opened, shard_lists)
}

/// Runs on a clock that jumps to the next thing to do.
fn run<T>(work: impl Future<Output = T>) -> T {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_time().start_paused(true).build().expect("a runtime").block_on(work)
}

/// How many random schedules to run, and from which seed; `TRAMLINE_SEED` runs that one alone.
fn seeds(count: u64) -> impl Iterator<Item = u64> {
    let given = std::env::var("TRAMLINE_SEED").ok().and_then(|seed| seed.parse().ok());
    let first = given.unwrap_or_else(|| u64::from(rand::random::<u32>()));
    (first..).take(if given.is_some() { 1 } else { count as usize })
}

#[test]
fn p7_p8_whatever_happens_to_calls_the_stream_holds_every_message_of_every_lane_in_order() {
    for seed in seeds(1000) {
        println!("TRAMLINE_SEED={seed}");
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let faults = rng.random_range(0..90);
        let stream = Faulty::new(seed, faults);
        let settings = ProducerSettings {
            batch: BatchPolicy {
                delay: Duration::from_millis(rng.random_range(0..1500)),
                ..Default::default()
            },
            record_limit_bytes: rng.random_range(1500..20_000),
            shutdown_limit: Duration::from_secs(100_000),
            ..Default::default()
        };
        let lanes = rng.random_range(1..8_usize);
        let mut sent: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let report = run(async {
            let producer = start(stream.clone(), settings, Store::memory(), Vec::new());
            let mut open: Vec<Option<Lane>> = (0..lanes).map(|_| None).collect();
            for n in 0..rng.random_range(1..150) {
                let which = rng.random_range(0..lanes);
                let key = format!("key {which}");
                let kind = if rng.random_bool(0.3) { "TMOV" } else { "TSCH" };
                // Some are so long that few fit into a record.
                let long = if rng.random_bool(0.1) { rng.random_range(0..1000) } else { 0 };
                let line = format!("{n},{kind},{}", "x".repeat(long));
                let lane = open[which].get_or_insert_with(|| producer.lane(&key, None)).clone();
                let receipt = lane.send(&line).await.expect("it is open");
                sent.entry(key).or_default().push(line);
                match rng.random_range(0..20) {
                    0 => drop(receipt.await.expect("it is put")),
                    // The connection closes, and the next one has the same key.
                    1 => open[which] = None,
                    2..8 => {
                        tokio::time::sleep(Duration::from_millis(rng.random_range(0..700))).await
                    }
                    _ => {}
                }
            }
            drop(open);
            producer.close().await.expect("everything is put")
        });
        assert_eq!(stream.lines(), sent, "seed {seed}");
        assert_eq!(report.waiting(), 0);
    }
}

#[test]
fn p7_p8_what_was_spooled_survives_crashes_and_full_disks_in_order() {
    for seed in seeds(200) {
        println!("TRAMLINE_SEED={seed}");
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let stream = Faulty::new(seed, rng.random_range(0..80));
        let settings = ProducerSettings {
            batch: BatchPolicy {
                delay: Duration::from_millis(rng.random_range(0..300)),
                ..Default::default()
            },
            record_limit_bytes: rng.random_range(1500..5000),
            shutdown_limit: Duration::from_secs(100_000),
            ..Default::default()
        };
        let mut device = Device::default();
        // By key and session: the lines, and how many of them were surely in the spool or the stream.
        let mut sent: BTreeMap<(String, usize), (Vec<String>, usize)> = BTreeMap::new();
        let sessions = rng.random_range(1..5);
        for session in 0..=sessions {
            let disk = device.open().expect("a spool");
            let left = disk.left().expect("what is left");
            // What is returned outlives the runtime: nothing ends cleanly but the last session.
            let crashed = run(async {
                let producer = start(stream.clone(), settings.clone(), Store::Disk(disk), left);
                let (mut full, mut was_full) = (false, false);
                let mut receipts = Vec::new();
                for n in 0..rng.random_range(0..40) {
                    let key = format!("key {}", rng.random_range(0..3));
                    let line = format!("{session}-{n},{key},TMOV");
                    let lane = producer.lane(&key, None);
                    receipts.push((key.clone(), lane.send(&line).await.expect("it is open")));
                    sent.entry((key, session)).or_default().0.push(line);
                    if rng.random_bool(0.1) {
                        (full, was_full) = (!full, true);
                        device.set_full(full);
                    }
                    if rng.random_bool(0.3) {
                        let pause = Duration::from_millis(rng.random_range(0..400));
                        tokio::time::sleep(pause).await;
                        if !was_full && pause > 2 * settings.spool_commit_delay {
                            let now = sent.iter_mut().filter(|((_, of), _)| *of == session);
                            now.for_each(|(_, (lines, known))| *known = lines.len());
                        }
                    }
                }
                let crashes = session < sessions;
                if !crashes {
                    device.set_full(false);
                    producer.flush().await.expect("everything is put");
                }
                let mut put: BTreeMap<String, usize> = BTreeMap::new();
                for (key, receipt) in receipts {
                    if receipt.now_or_never().is_some_and(|at| at.is_ok()) {
                        *put.entry(key).or_default() += 1;
                    }
                }
                for (key, put) in put {
                    let (_, known) = sent.entry((key, session)).or_default();
                    *known = put.max(*known);
                }
                producer
            });
            drop(crashed);
            device.set_full(false);
            device = device.after_power_loss(&mut rng);
        }
        for (key, records) in &lock(&stream.0).stored {
            let once = once(records);
            let mut rest = once.iter().peekable();
            for ((_, session), (lines, known)) in sent.iter().filter(|((k, _), _)| k == key) {
                let mut found = 0;
                while rest.next_if(|line| lines.get(found) == Some(*line)).is_some() {
                    found += 1;
                }
                assert!(found >= *known, "seed {seed}, {key}, session {session}: {found}");
            }
            assert_eq!(rest.next(), None, "seed {seed}, {key}: out of place");
        }
    }
}

#[test]
fn p7_only_the_last_record_of_a_lane_may_come_again_after_a_crash() {
    let stream = Faulty::new(1, 0);
    let device = Device::default();
    let sent: Vec<String> = (0..40).map(|n| format!("{n},TMOV,x")).collect();
    let settings = ProducerSettings {
        record_limit_bytes: 1500,
        shutdown_limit: Duration::from_secs(100),
        ..Default::default()
    };
    let crashed = run(async {
        let disk = device.open().expect("a spool");
        let producer = start(stream.clone(), settings.clone(), Store::Disk(disk), vec![]);
        lock(&stream.0).away = true;
        let lane = producer.lane("key", None);
        for line in &sent {
            lane.send(line).await.expect("open");
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        // From here on the spool cannot learn what the stream has.
        device.set_full(true);
        lock(&stream.0).away = false;
        tokio::time::sleep(Duration::from_secs(60)).await;
        (producer, lane)
    });
    drop(crashed);
    assert_eq!(lock(&stream.0).stored["key"].len(), 1);
    device.set_full(false);
    run(async {
        let disk = device.open().expect("a spool");
        let left = disk.left().expect("what is left");
        let producer = start(stream.clone(), settings, Store::Disk(disk), left);
        producer.close().await.expect("everything is put");
    });
    let state = lock(&stream.0);
    assert!(state.stored["key"].len() > 5);
    assert_eq!(once(&state.stored["key"]), sent);
}

#[test]
fn p8_a_disk_that_an_outage_has_filled_empties_itself_when_kinesis_is_back() {
    let stream = Faulty::new(1, 0);
    let device = Device::default();
    device.set_capacity_bytes(10 * 1024 * 1024);
    let sent: Vec<String> = (0..10_000).map(|n| format!("{n},TSCH,{}", "x".repeat(2000))).collect();
    let settings = ProducerSettings {
        shard_rate: ShardRate::of_bytes(1 << 30),
        shutdown_limit: Duration::from_secs(100_000),
        ..Default::default()
    };
    run(async {
        let disk = device.open().expect("a spool");
        let producer = start(stream.clone(), settings, Store::Disk(disk), vec![]);
        let monitor = producer.monitor();
        lock(&stream.0).away = true;
        let lane = producer.lane("key", None);
        let sending = {
            let sent = sent.clone();
            tokio::spawn(async move {
                for line in &sent {
                    lane.send(line).await.expect("open");
                }
            })
        };
        while monitor.stats().await.expect("open").spool_failure.is_none() {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        assert!(!sending.is_finished(), "there is no room for all");
        tokio::time::sleep(Duration::from_secs(20)).await;
        lock(&stream.0).away = false;
        let sent = tokio::time::timeout(Duration::from_secs(1000), sending).await;
        sent.expect("the spool takes more").expect("all is sent");
        producer.close().await.expect("all is put");
    });
    assert_eq!(once(&lock(&stream.0).stored["key"]), sent);
}

#[test]
fn what_happens_is_counted_for_each_lane_and_in_total() {
    let stream = Faulty::new(1, 0);
    run(async {
        let producer = start(stream.clone(), ProducerSettings::default(), Store::memory(), vec![]);
        let monitor = producer.monitor();
        let (a, b) = (producer.lane("a", None), producer.lane("b", None));
        for line in ["1,TMOV,x", "2,TMOV,x"] {
            a.send(line).await.expect("open").await.expect("put");
        }
        lock(&stream.0).away = true;
        let waits = b.send("1,TMOV,x").await.expect("open");
        tokio::time::sleep(Duration::from_secs(5)).await;

        let stats = monitor.stats().await.expect("open");
        assert_eq!((stats.puts.messages, stats.puts.records), (2, 2));
        assert_eq!(stats.puts.bytes, stats.report.bytes);
        assert_eq!((stats.puts.record_messages.len(), stats.puts.record_bytes.len()), (2, 2));
        let failures = stats.put_failure.expect("it fails").failures;
        assert!(failures > 1);
        assert_eq!(stats.puts.retries, BTreeMap::from([(RetryReason::Unreachable, failures)]));
        assert_eq!(stats.waiting.messages, 1);
        assert_eq!(stats.waiting.spooled_bytes, 8 + 12);
        assert!(stats.waiting.oldest.is_some());
        let [of_a, of_b] = &stats.lanes[..] else { panic!("{:?}", stats.lanes) };
        assert_eq!((of_a.partition_key.as_str(), of_a.puts.messages), ("a", 2));
        assert_eq!((of_a.waiting.messages, of_a.waiting.oldest), (0, None));
        assert_eq!((of_b.puts.messages, of_b.puts.retries.len()), (0, 1));
        assert_eq!(of_b.waiting, stats.waiting);

        lock(&stream.0).away = false;
        waits.await.expect("put");
        let stats = monitor.stats().await.expect("open");
        assert_eq!((stats.put_failure, stats.waiting), (None, Waiting::default()));
        assert_eq!(stats.puts.latency_micros.len(), 3);
        drop(b);
        producer.flush().await.expect("put");
        let stats = monitor.stats().await.expect("open");
        assert_eq!((stats.lanes.len(), stats.puts.messages), (1, 3), "the total stays");
        producer.close().await.expect("all is put");
        assert_eq!(monitor.stats().await.err(), Some(SendError::Closed));
    });
}

#[test]
fn a_receipt_says_where_the_message_is() {
    let stream = Faulty::new(1, 0);
    run(async {
        let producer = start(stream.clone(), ProducerSettings::default(), Store::memory(), vec![]);
        let lane = producer.lane("key", None);
        let first = lane.send("1,TMOV,a").await.expect("open").await.expect("put");
        let second = lane.send("2,TMOV,b").await.expect("open").await.expect("put");
        assert_eq!((first.sequence_number.as_str(), second.sequence_number.as_str()), ("1", "2"));
        assert!(first.shard.starts_with("shardId-"));
        assert_eq!(lane.send("").await.err(), Some(SendError::Empty));
        let long = [b'x'; MESSAGE_LIMIT_BYTES + 1];
        assert!(matches!(lane.send(long).await, Err(SendError::TooLong { .. })));
        producer.close().await.expect("all is put");
        assert_eq!(lane.send("3,TMOV,c").await.err(), Some(SendError::Closed));
    });
}

#[test]
fn movements_go_at_once_others_wait_and_go_with_them() {
    let stream = Faulty::new(1, 0);
    run(async {
        let producer = start(stream.clone(), ProducerSettings::default(), Store::memory(), vec![]);
        let lane = producer.lane("key", None);
        let began = Instant::now();
        let waits = lane.send("1,TSCH,a").await.expect("open");
        waits.await.expect("put");
        assert!(began.elapsed() >= Duration::from_secs(1), "{:?}", began.elapsed());

        let began = Instant::now();
        let first = lane.send("2,TSCH,a").await.expect("open");
        let second = lane.send("3,TMOV,b").await.expect("open");
        assert_eq!(first.await.expect("put"), second.await.expect("put"), "the same record");
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());

        // So many that they do not wait any longer.
        let began = Instant::now();
        for n in 0..500 {
            lane.send(format!("{n},TSCH,a")).await.expect("open");
        }
        lane.flush().await.expect("put");
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());

        // A producer that is flushed waits for nothing more.
        let began = Instant::now();
        lane.send("4,TSCH,a").await.expect("open");
        producer.flush().await.expect("put");
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    });
}

#[test]
fn lanes_share_calls_and_what_arrives_meanwhile_forms_the_next_record() {
    let stream = Faulty::new(1, 0);
    run(async {
        let producer = start(stream.clone(), ProducerSettings::default(), Store::memory(), vec![]);
        let lanes: Vec<Lane> = (0..700).map(|n| producer.lane(format!("{n}"), None)).collect();
        for round in 0..10 {
            for lane in &lanes {
                lane.send(format!("{round},TMOV,x")).await.expect("open");
            }
        }
        let report = producer.close().await.expect("all is put");
        assert_eq!(report.put, 7000);
        let state = lock(&stream.0);
        assert!(state.largest_call > 100, "{}", state.largest_call);
        assert!(state.calls < 50, "{}", state.calls);
    });
}

#[test]
fn p7_no_shard_is_given_more_than_it_takes_and_the_other_is_not_kept_waiting() {
    let stream = Faulty::new(1, 0);
    run(async {
        let producer = start(stream.clone(), ProducerSettings::default(), Store::memory(), vec![]);
        // A key of each shard.
        let key = |shard: u128| {
            let half = u128::MAX / 2;
            (0..).map(|n: u32| format!("{n}")).find(|key| hash_key(key) / half == shard)
        };
        let (busy, idle) = (key(0).expect("a key"), key(1).expect("a key"));
        let (busy, idle) = (producer.lane(busy, None), producer.lane(idle, None));
        let line = format!("1,TMOV,{}", "x".repeat(90_000));
        for _ in 0..100 {
            busy.send(&line).await.expect("open");
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
        let began = Instant::now();
        idle.send("1,TMOV,x").await.expect("open").await.expect("put");
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
        producer.close().await.expect("all is put");

        let state = lock(&stream.0);
        let taken: Vec<_> = state.taken.iter().filter(|(_, shard, _)| *shard == 0).collect();
        assert!(taken.len() > 5);
        for (n, (from, ..)) in taken.iter().enumerate() {
            // A burst of one second's worth, and one second's worth; delays move them by 0.2 s.
            let window = Duration::from_millis(1000);
            let bytes: usize = taken[n..]
                .iter()
                .take_while(|(at, ..)| *at <= *from + window)
                .map(|(.., bytes)| bytes)
                .sum();
            assert!(bytes <= 2_400_000, "{bytes}");
        }
        let (first, last) = (taken[0].0, taken[taken.len() - 1].0);
        assert!(last - first >= Duration::from_secs(6), "{:?}", last - first);
    });
}

#[test]
fn p7_a_host_that_connects_again_does_not_overtake_itself() {
    let stream = Faulty::new(1, 0);
    run(async {
        let producer = start(stream.clone(), ProducerSettings::default(), Store::memory(), vec![]);
        let host = "10.0.0.1".parse().ok();
        let before = producer.lane("before", host);
        let line = format!("1,TMOV,{}", "x".repeat(90_000));
        for _ in 0..50 {
            before.send(&line).await.expect("open");
        }
        let last = before.send("2,TMOV,last").await.expect("open");
        drop(before);
        let after = producer.lane("after", host);
        let first = after.send("1,TMOV,first").await.expect("open");
        let number = |at: StoredAt| at.sequence_number.parse::<u64>().expect("a number");
        let first = number(first.await.expect("put"));
        assert!(number(last.await.expect("put")) < first);
        producer.close().await.expect("all is put");
    });
}
