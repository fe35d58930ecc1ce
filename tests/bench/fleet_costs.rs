//! What a fleet asks of its lease table, and how fast it divides the shards: the real plan, the real lease
//! loop and the real renewals, in simulated time and without faults. Prints Markdown.
//!
//! `cargo bench --bench fleet_costs`, or `cargo bench --bench fleet_costs -- 100x4 1000x200` for some
//! numbers of shards and workers only.

#[path = "../it/simulated_worker.rs"]
mod simulated_worker;

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

use simulated_worker::{Reach, SimTable, checkpoint_at, lock, shard_id, work};

const SHARDS: [usize; 4] = [1, 10, 100, 1000];
const WORKERS: [usize; 4] = [1, 4, 32, 200];
/// How often each event is made to happen.
const ROUNDS: usize = 6;
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(5);
/// A fleet is settled when nothing has moved for this long: longer than a lease lasts.
const QUIET: Duration = Duration::from_secs(15);
const GIVE_UP: Duration = Duration::from_secs(300);
const MEASURED: Duration = Duration::from_secs(120);

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
    last_begun: Option<Instant>,
    /// When the last shard that nobody read got a reader again.
    complete_since: Option<Instant>,
}

impl World {
    fn latency(&self) -> Duration {
        Duration::from_micros(lock(&self.rng).random_range(1000..4000))
    }
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
        sleep(self.0.latency()).await;
        let result = effect.await;
        sleep(self.0.latency()).await;
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
        reading.last_begun = Some(now);
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
) -> ShardId {
    let shard = held.lease().await.shard;
    let _keeper = AbortOnDropHandle::new(tokio::spawn(held.clone().keep()));
    let being_read = BeingRead::begin(&world, &shard, &worker);
    let mut handled = 0;
    let mut next_checkpoint = Instant::now() + CHECKPOINT_INTERVAL;
    loop {
        tokio::select! {
            biased;
            () = held.lost() => return shard,
            () = async { tokio::select! { () = stop.cancelled() => {} () = held.asked() => {} } } => {
                drop(being_read);
                let _ = held.write_surely(&Change::Release { checkpoint: None }).await;
                return shard;
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

struct Fleet {
    world: Arc<World>,
    workers: BTreeMap<String, (CancellationToken, AbortOnDropHandle<()>)>,
    started: usize,
}

impl Fleet {
    fn start_worker(&mut self) {
        let name = format!("w{:04}", self.started);
        self.started += 1;
        let settings = Settings {
            worker: name.clone(),
            max_leases: usize::MAX,
            lease_duration: Duration::from_secs(10),
            hand_over_limit: Duration::from_secs(30),
            finished_kept_for: FINISHED_KEPT_FOR,
            seed: self.started as u64,
            wall_clock: || Timestamp::UNIX_EPOCH,
        };
        let leases = LeaseLoop::new(SimTable(Way(self.world.clone())), settings);
        let stop = CancellationToken::new();
        let task = {
            let (world, worker, stop) = (self.world.clone(), name.clone(), stop.clone());
            let read = {
                let stop = stop.clone();
                move |held| read(world.clone(), worker.clone(), held, stop.clone())
            };
            let world = self.world.clone();
            tokio::spawn(work(leases, move || world.listed.clone(), read, stop))
        };
        self.workers.insert(name, (stop, AbortOnDropHandle::new(task)));
    }

    /// A worker that has leases: the reader of the first shard, which watches the table for the others,
    /// or any.
    fn some_reader(&self, first: bool) -> String {
        let reading = lock(&self.world.reading);
        let readers: Vec<&String> = reading.readers.values().collect();
        match first {
            true => readers[0].clone(),
            false => (*readers.choose(&mut *lock(&self.world.rng)).expect("a reader")).clone(),
        }
    }

    fn counts(&self) -> Vec<usize> {
        let reading = lock(&self.world.reading);
        let mut counts: BTreeMap<&String, usize> =
            self.workers.keys().map(|worker| (worker, 0)).collect();
        for worker in reading.readers.values() {
            *counts.entry(worker).or_default() += 1;
        }
        counts.into_values().collect()
    }

    fn is_balanced(&self) -> bool {
        let counts = self.counts();
        counts.iter().sum::<usize>() == self.world.listed.len()
            && counts.iter().max() <= counts.iter().min().map(|least| least + 1).as_ref()
    }

    /// Lets time pass until all shards are read, evenly, and nothing moves any more.
    async fn settle(&self, began: Instant, before: usize) -> Settled {
        let give_up = Instant::now() + GIVE_UP;
        loop {
            sleep(Duration::from_millis(200)).await;
            let reading = lock(&self.world.reading);
            let (begun, last) = (reading.begun - before, reading.last_begun);
            let complete = reading.complete_since;
            drop(reading);
            let since = |at: Option<Instant>| at.unwrap_or(began).saturating_duration_since(began);
            if began.elapsed() >= since(last) + QUIET && self.is_balanced() {
                return Settled { moves: begun, balanced: since(last), complete: since(complete) };
            }
            assert!(Instant::now() < give_up, "not balanced: {:?}", self.counts());
        }
    }
}

/// What an event led to.
struct Settled {
    /// Shards that another worker began to read.
    moves: usize,
    /// How long until the last of them.
    balanced: Duration,
    /// How long until every shard was read.
    complete: Duration,
}

/// The same event, several times.
#[derive(Default)]
struct Events {
    settled: Vec<Settled>,
    needed_moves: usize,
}

impl Events {
    fn cells(&self, time: impl Fn(&Settled) -> Duration) -> String {
        if self.needed_moves == 0 {
            return " - | -".to_owned();
        }
        let mut times: Vec<Duration> = self.settled.iter().map(time).collect();
        times.sort();
        let moves: usize = self.settled.iter().map(|settled| settled.moves).sum();
        format!(
            "{:.1} / {:.1} | {moves} ({})",
            times[times.len() / 2].as_secs_f64(),
            times[times.len() - 1].as_secs_f64(),
            self.needed_moves
        )
    }
}

struct Costs {
    shards: usize,
    workers: usize,
    start: Settled,
    start_requests: Requests,
    crashes: Events,
    watcher_crashes: Events,
    stops: Events,
    joins: Events,
    idle: Requests,
    loaded: Requests,
}

fn since(before: Requests, now: Requests) -> Requests {
    Requests {
        rows_read: now.rows_read - before.rows_read,
        reads: now.reads - before.reads,
        writes: now.writes - before.writes,
    }
}

async fn measure(shards: usize, workers: usize) -> Costs {
    let listed = (0..shards).map(|n| Shard {
        id: shard_id(n),
        parents: Vec::new(),
        hash_key_range: None,
        closed: false,
        begins: None,
    });
    let world = Arc::new(World {
        rng: ChaCha8Rng::seed_from_u64((shards * 1000 + workers) as u64).into(),
        table: MemoryTable::default(),
        listed: listed.collect(),
        loaded: false.into(),
        reading: Mutex::default(),
    });
    let mut fleet = Fleet { world: world.clone(), workers: BTreeMap::new(), started: 0 };
    let requests = || world.table.requests();
    let began = Instant::now();
    for _ in 0..workers {
        fleet.start_worker();
    }
    let start = fleet.settle(began, 0).await;
    let start_requests = requests();

    let before = requests();
    sleep(MEASURED).await;
    let idle = since(before, requests());
    world.loaded.store(true, Ordering::Relaxed);
    sleep(2 * CHECKPOINT_INTERVAL).await;
    let before = requests();
    sleep(MEASURED).await;
    let loaded = since(before, requests());

    let [mut crashes, mut watcher_crashes, mut stops, mut joins] =
        std::array::from_fn(|_| Events::default());
    let begun = || lock(&world.reading).begun;
    for round in 0..3 * ROUNDS {
        // At any moment between two renewals.
        let pause = lock(&world.rng).random_range(0..5000);
        sleep(Duration::from_millis(pause)).await;
        if workers > 1 {
            let events = match round % 3 {
                0 => &mut crashes,
                1 => &mut watcher_crashes,
                _ => &mut stops,
            };
            let name = fleet.some_reader(round % 3 == 1);
            let orphans =
                lock(&world.reading).readers.values().filter(|reader| **reader == name).count();
            let (stop, task) = fleet.workers.remove(&name).expect("a worker");
            let (began, before) = (Instant::now(), begun());
            match round % 3 {
                2 => {
                    stop.cancel();
                    task.detach();
                }
                _ => drop(task),
            }
            events.needed_moves += orphans;
            events.settled.push(fleet.settle(began, before).await);
        }
        let (began, before) = (Instant::now(), begun());
        fleet.start_worker();
        joins.needed_moves += shards / fleet.workers.len();
        joins.settled.push(fleet.settle(began, before).await);
        if workers == 1 {
            // It goes again.
            let newest = fleet.workers.keys().next_back().cloned().expect("a worker");
            let (stop, task) = fleet.workers.remove(&newest).expect("a worker");
            let (began, before) = (Instant::now(), begun());
            stop.cancel();
            task.detach();
            fleet.settle(began, before).await;
        }
    }
    Costs {
        shards,
        workers,
        start,
        start_requests,
        crashes,
        watcher_crashes,
        stops,
        joins,
        idle,
        loaded,
    }
}

fn main() {
    // Cargo adds `--bench`.
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    for shards in SHARDS {
        for workers in WORKERS {
            if !wanted.is_empty() && !wanted.contains(&format!("{shards}x{workers}")) {
                continue;
            }
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_time()
                .start_paused(true)
                .build()
                .expect("a runtime");
            let wall = std::time::Instant::now();
            let costs = runtime.block_on(measure(shards, workers));
            println!(
                "| {} | {} | {:.1} | {} | {:?}",
                costs.shards,
                costs.workers,
                costs.start.balanced.as_secs_f64(),
                costs.start.moves - costs.shards,
                costs.start_requests
            );
            println!(
                "  crash {} watcher {} stop {} join {}",
                costs.crashes.cells(|s| s.complete),
                costs.watcher_crashes.cells(|s| s.complete),
                costs.stops.cells(|s| s.complete),
                costs.joins.cells(|s| s.balanced)
            );
            println!("  idle {:?} loaded {:?}   {:?}", costs.idle, costs.loaded, wall.elapsed());
        }
    }
}
