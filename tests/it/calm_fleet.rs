//! A fleet without faults in simulated time, with a table a few milliseconds away: how fast it divides the
//! shards, and what it asks of the table. Used by the benchmark `fleet_costs`, and by the test below.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use rand::{Rng as _, SeedableRng as _, seq::IndexedRandom as _};
use rand_chacha::ChaCha8Rng;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tramline::{
    LeaseError, ShardId,
    lease::{Change, FINISHED_KEPT_FOR, HeldLease, LeaseLoop, MemoryTable, Requests, Settings},
    shard::Shard,
};

use crate::simulated_worker::{Reach, SimTable, checkpoint_at, lock, shard_id, work};

/// The defaults of the program.
const LEASE_DURATION: Duration = Duration::from_secs(10);
const HAND_OVER_LIMIT: Duration = Duration::from_secs(30);
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(5);
/// A fleet is settled when nothing has moved for this long: longer than a lease lasts.
const QUIET: Duration = Duration::from_secs(15);
const GIVE_UP: Duration = Duration::from_secs(300);

struct World {
    rng: Mutex<ChaCha8Rng>,
    table: MemoryTable,
    listed: Vec<Shard>,
    /// Whether records arrive, so that every reader has something to checkpoint.
    loaded: AtomicBool,
    reading: Mutex<Reading>,
}

/// Who reads what.
#[derive(Default)]
struct Reading {
    readers: BTreeMap<ShardId, String>,
    /// How often a worker began to read a shard.
    begun: usize,
    /// When one last did, and what the table was asked until then.
    last_begun: Option<(Instant, Requests)>,
    /// Since when every shard is read.
    complete_since: Option<Instant>,
}

/// The table, a few milliseconds away.
#[derive(Clone)]
struct Way(Arc<World>);

impl Reach for Way {
    fn table(&self) -> &MemoryTable {
        &self.0.table
    }

    async fn request<T: Send>(
        &self,
        effect: impl Future<Output = Result<T, LeaseError>> + Send,
    ) -> Result<T, LeaseError> {
        let latency = || Duration::from_micros(lock(&self.0.rng).random_range(1000..4000));
        sleep(latency()).await;
        let result = effect.await;
        sleep(latency()).await;
        result
    }
}

/// A shard that is read, until this is dropped: also when its worker is killed.
struct BeingRead {
    world: Arc<World>,
    shard: ShardId,
}

impl BeingRead {
    fn begin(world: &Arc<World>, shard: &ShardId, worker: &str) -> Self {
        let mut reading = lock(&world.reading);
        let now = Instant::now();
        let before = reading.readers.insert(shard.clone(), worker.to_owned());
        assert_eq!(before, None, "{shard} has two readers");
        reading.begun += 1;
        reading.last_begun = Some((now, world.table.requests()));
        if reading.readers.len() == world.listed.len() {
            reading.complete_since = Some(now);
        }
        Self { world: world.clone(), shard: shard.clone() }
    }
}

impl Drop for BeingRead {
    fn drop(&mut self) {
        let mut reading = lock(&self.world.reading);
        reading.readers.remove(&self.shard);
        reading.complete_since = None;
    }
}

/// Reads one shard: there is nothing in it but reasons for a checkpoint.
async fn read(
    world: Arc<World>,
    worker: String,
    held: Arc<HeldLease<SimTable<Way>>>,
    stop: CancellationToken,
) -> (ShardId, bool) {
    let shard = held.lease().await.shard;
    let _keeper = AbortOnDropHandle::new(tokio::spawn(held.clone().keep()));
    let being_read = BeingRead::begin(&world, &shard, &worker);
    let mut handled = 0;
    let mut next_checkpoint = Instant::now() + CHECKPOINT_INTERVAL;
    loop {
        tokio::select! {
            biased;
            () = held.lost() => return (shard, false),
            () = async { tokio::select! { () = stop.cancelled() => {} () = held.asked() => {} } } => {
                drop(being_read);
                let _ = held.write_surely(&Change::Release { checkpoint: None }).await;
                return (shard, false);
            }
            () = sleep_until(next_checkpoint) => {
                next_checkpoint = Instant::now() + CHECKPOINT_INTERVAL;
                if world.loaded.load(Ordering::Relaxed) {
                    handled += 1;
                    let checkpoint = checkpoint_at(handled);
                    let _ = held.write(&Change::Checkpoint { checkpoint }).await;
                }
            }
        }
    }
}

/// Workers that share the shards of one stream.
pub struct CalmFleet {
    world: Arc<World>,
    workers: BTreeMap<String, (CancellationToken, AbortOnDropHandle<()>)>,
    started: usize,
}

impl CalmFleet {
    pub fn new(shards: usize, seed: u64) -> Self {
        let listed = (0..shards).map(|n| Shard {
            id: shard_id(n),
            parents: Vec::new(),
            hash_key_range: None,
            closed: false,
            begins: None,
        });
        let world = World {
            rng: ChaCha8Rng::seed_from_u64(seed).into(),
            table: MemoryTable::default(),
            listed: listed.collect(),
            loaded: false.into(),
            reading: Mutex::default(),
        };
        Self { world: Arc::new(world), workers: BTreeMap::new(), started: 0 }
    }

    pub fn start_worker(&mut self) {
        let name = format!("w{:04}", self.started);
        self.started += 1;
        let settings = Settings {
            worker: name.clone(),
            max_leases: usize::MAX,
            lease_duration: LEASE_DURATION,
            hand_over_limit: HAND_OVER_LIMIT,
            finished_kept_for: FINISHED_KEPT_FOR,
            seed: self.started as u64,
            wall_clock: || Timestamp::UNIX_EPOCH,
        };
        let leases = LeaseLoop::new(SimTable(Way(self.world.clone())), settings);
        let stop = CancellationToken::new();
        let (world, worker, stopped) = (self.world.clone(), name.clone(), stop.clone());
        let read = move |held| read(world.clone(), worker.clone(), held, stopped.clone());
        let world = self.world.clone();
        let task = tokio::spawn(work(leases, move || world.listed.clone(), read, stop.clone()));
        self.workers.insert(name, (stop, AbortOnDropHandle::new(task)));
    }

    /// Ends a worker without a word.
    pub fn kill(&mut self, worker: &str) {
        self.workers.remove(worker);
    }

    /// Ends a worker in the clean way.
    pub fn stop(&mut self, worker: &str) {
        if let Some((stop, task)) = self.workers.remove(worker) {
            stop.cancel();
            // It goes on until it has stopped.
            task.detach();
        }
    }

    /// Whether records arrive from now on.
    pub fn load(&self, loaded: bool) {
        self.world.loaded.store(loaded, Ordering::Relaxed);
    }

    pub fn requests(&self) -> Requests {
        self.world.table.requests()
    }

    /// The reader of the first shard, whose row the others watch, and how many shards it reads.
    pub fn first_reader(&self) -> (String, usize) {
        self.pick(|readers| readers.first().copied().cloned())
    }

    /// The reader of some shard, and how many it reads.
    pub fn some_reader(&self) -> (String, usize) {
        self.pick(|readers| readers.choose(&mut *lock(&self.world.rng)).copied().cloned())
    }

    fn pick(&self, pick: impl FnOnce(&[&String]) -> Option<String>) -> (String, usize) {
        let reading = lock(&self.world.reading);
        let readers: Vec<&String> = reading.readers.values().collect();
        let picked = pick(&readers).expect("a reader");
        let shards = readers.iter().filter(|reader| ***reader == picked).count();
        (picked, shards)
    }

    fn counts(&self) -> Vec<usize> {
        let mut counts: BTreeMap<&str, usize> =
            self.workers.keys().map(|worker| (worker.as_str(), 0)).collect();
        let reading = lock(&self.world.reading);
        for reader in reading.readers.values() {
            *counts.entry(reader).or_default() += 1;
        }
        counts.into_values().collect()
    }

    fn is_balanced(&self) -> bool {
        let counts = self.counts();
        counts.iter().sum::<usize>() == self.world.listed.len()
            && counts.iter().max() <= counts.iter().min().map(|least| least + 1).as_ref()
    }

    /// Something happens now.
    pub fn event(&self) -> Event {
        Event {
            at: Instant::now(),
            begun: lock(&self.world.reading).begun,
            requests: self.requests(),
        }
    }

    /// Lets time pass until all shards are read, evenly, and nothing moves any more.
    pub async fn settle(&self, event: Event) -> Settled {
        loop {
            sleep(Duration::from_millis(200)).await;
            let (moves, last, complete) = {
                let reading = lock(&self.world.reading);
                (reading.begun - event.begun, reading.last_begun, reading.complete_since)
            };
            let (balanced, requests) = match last {
                Some((at, requests)) if moves > 0 => {
                    (at - event.at, since(event.requests, requests))
                }
                _ => (Duration::ZERO, Requests::default()),
            };
            if event.at.elapsed() >= balanced + QUIET && self.is_balanced() {
                let complete = complete.map_or(Duration::ZERO, |at| at - event.at);
                return Settled { moves, balanced, complete, requests };
            }
            assert!(event.at.elapsed() < GIVE_UP, "not balanced: {:?}", self.counts());
        }
    }
}

/// The moment at which something happens to a fleet.
pub struct Event {
    at: Instant,
    begun: usize,
    requests: Requests,
}

/// What it led to.
#[derive(Debug)]
pub struct Settled {
    /// Shards that a worker began to read.
    pub moves: usize,
    /// How long until the last of them.
    pub balanced: Duration,
    /// How long until every shard was read.
    pub complete: Duration,
    /// What the table was asked until it was balanced.
    pub requests: Requests,
}

/// What the table was asked between two moments.
pub fn since(before: Requests, now: Requests) -> Requests {
    Requests {
        rows_read: now.rows_read - before.rows_read,
        reads: now.reads - before.reads,
        writes: now.writes - before.writes,
    }
}

/// Runs in time that passes when nothing else is left to do.
pub fn in_simulated_time<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime")
        .block_on(future)
}

#[test]
fn a_calm_fleet_divides_the_shards_in_seconds_and_moves_none_without_need() {
    for (shards, workers) in [(4, 2), (10, 4), (100, 32)] {
        in_simulated_time(async {
            let within = |settled: &Settled, moves: usize, limit_secs: u64| {
                let time = settled.complete.max(settled.balanced);
                let in_time = time < Duration::from_secs(limit_secs);
                assert!(
                    in_time && settled.moves == moves,
                    "{shards} shards, {workers} workers: {settled:?}"
                );
            };
            let mut fleet = CalmFleet::new(shards, 1);
            let event = fleet.event();
            (0..workers).for_each(|_| fleet.start_worker());
            within(&fleet.settle(event).await, shards, 3);
            for round in 0..6 {
                // At any moment between two renewals.
                sleep(Duration::from_millis(round * 700)).await;
                let (worker, orphans) = match round % 2 {
                    0 => fleet.some_reader(),
                    _ => fleet.first_reader(),
                };
                let event = fleet.event();
                match round % 3 {
                    0 => fleet.stop(&worker),
                    _ => fleet.kill(&worker),
                }
                within(&fleet.settle(event).await, orphans, if round % 3 == 0 { 2 } else { 13 });
                let event = fleet.event();
                fleet.start_worker();
                within(&fleet.settle(event).await, shards / workers, 6);
            }
        });
    }
}

#[test]
fn what_a_calm_fleet_reads_does_not_grow_with_workers_times_shards() {
    let minute = |shards: usize, workers: usize| {
        in_simulated_time(async {
            let mut fleet = CalmFleet::new(shards, 1);
            let event = fleet.event();
            (0..workers).for_each(|_| fleet.start_worker());
            let started = fleet.settle(event).await.requests;
            assert!(started.writes < 5 * (shards + workers) as u64, "{started:?}");
            fleet.load(true);
            sleep(Duration::from_secs(10)).await;
            let before = fleet.requests();
            sleep(Duration::from_secs(60)).await;
            since(before, fleet.requests())
        })
    };
    // Two workers scan every 0.8 s and the others read one row; each scans once a minute besides.
    let (few, many) = (minute(50, 10), minute(50, 50));
    assert!(few.rows_read <= 50 * (2 * 75 + 10) + 10 * 75, "{few:?}");
    assert!(many.rows_read <= 50 * (2 * 75 + 50) + 50 * 75, "{many:?}");
    assert_eq!(few.writes, many.writes);
}
