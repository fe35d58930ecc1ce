//! What a fleet asks of its lease table, and how fast it divides the shards: the real plan, the real lease
//! loop and the real renewals, in simulated time and without faults. Prints Markdown.
//!
//! `cargo bench --bench fleet_costs`, or `cargo bench --bench fleet_costs -- 100x4 1000x200` for some
//! numbers of shards and workers only.

#[path = "../it/calm_fleet.rs"]
mod calm_fleet;
#[path = "../it/simulated_worker.rs"]
mod simulated_worker;

use std::time::Duration;

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use tokio::time::sleep;
use tramline::lease::Requests;

use calm_fleet::{CalmFleet, Settled, in_simulated_time, since};

const SHARDS: [usize; 4] = [1, 10, 100, 1000];
const WORKERS: [usize; 4] = [1, 4, 32, 200];
/// How often each event is made to happen.
const ROUNDS: usize = 6;
/// How long the requests of a fleet in which nothing moves are counted.
const MEASURED: Duration = Duration::from_secs(120);

/// The same event, several times.
#[derive(Default)]
struct Events {
    settled: Vec<Settled>,
    needed_moves: usize,
}

impl Events {
    fn add(&mut self, settled: Settled, needed_moves: usize) {
        self.settled.push(settled);
        self.needed_moves += needed_moves;
    }

    /// Median and worst time, and the moves with those that were needed.
    fn cells(&self, time: impl Fn(&Settled) -> Duration) -> String {
        if self.needed_moves == 0 {
            return " | ".to_owned();
        }
        let mut times: Vec<f64> =
            self.settled.iter().map(|settled| time(settled).as_secs_f64()).collect();
        times.sort_by(f64::total_cmp);
        let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
        let moves: usize = self.settled.iter().map(|settled| settled.moves).sum();
        format!("{median:.1} / {worst:.1} | {moves} ({})", self.needed_moves)
    }

    fn most_rows_read(&self) -> String {
        let most = self.settled.iter().map(|settled| settled.requests.rows_read).max();
        most.map_or(String::new(), |most| most.to_string())
    }
}

struct Costs {
    shards: usize,
    workers: usize,
    start: Settled,
    joins: Events,
    stops: Events,
    crashes: Events,
    crashes_of_first: Events,
    idle: Requests,
    loaded: Requests,
}

async fn measure(shards: usize, workers: usize) -> Costs {
    let seed = (shards * 1000 + workers) as u64;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut fleet = CalmFleet::new(shards, seed);
    let event = fleet.event();
    (0..workers).for_each(|_| fleet.start_worker());
    let start = fleet.settle(event).await;

    let [idle, loaded] = {
        let mut asked = [Requests::default(); 2];
        for (asked, loaded) in asked.iter_mut().zip([false, true]) {
            fleet.load(loaded);
            sleep(Duration::from_secs(10)).await;
            let before = fleet.requests();
            sleep(MEASURED).await;
            *asked = since(before, fleet.requests());
        }
        asked
    };

    let [mut joins, mut stops, mut crashes, mut crashes_of_first] =
        std::array::from_fn(|_| Events::default());
    for round in 0..3 * ROUNDS {
        // At any moment between two renewals.
        sleep(Duration::from_millis(rng.random_range(0..5000))).await;
        if workers > 1 {
            let of_first = round % 3 == 2;
            let (worker, orphans) =
                if of_first { fleet.first_reader() } else { fleet.some_reader() };
            let event = fleet.event();
            let events = match round % 3 {
                0 => {
                    fleet.stop(&worker);
                    &mut stops
                }
                1 => {
                    fleet.kill(&worker);
                    &mut crashes
                }
                _ => {
                    fleet.kill(&worker);
                    &mut crashes_of_first
                }
            };
            events.add(fleet.settle(event).await, orphans);
        }
        let event = fleet.event();
        fleet.start_worker();
        joins.add(fleet.settle(event).await, shards / workers.max(2));
        if workers == 1 {
            let (worker, _) = fleet.first_reader();
            let event = fleet.event();
            fleet.stop(&worker);
            fleet.settle(event).await;
        }
    }
    Costs { shards, workers, start, joins, stops, crashes, crashes_of_first, idle, loaded }
}

fn main() {
    // Cargo adds `--bench`.
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let began = std::time::Instant::now();
    let mut costs = Vec::new();
    for shards in SHARDS {
        for workers in WORKERS {
            if wanted.is_empty() || wanted.contains(&format!("{shards}x{workers}")) {
                costs.push(in_simulated_time(measure(shards, workers)));
                eprintln!("{shards} shards, {workers} workers: {:.0?} so far", began.elapsed());
            }
        }
    }

    println!(
        "Seconds, median / worst of {ROUNDS}; moves in all, in brackets the least possible:\n"
    );
    println!(
        "| shards | workers | join | moves | clean stop | moves | crash | moves | crash of the \
         first shard's reader | moves |\n|{}",
        "--:|".repeat(10)
    );
    for Costs { shards, workers, joins, stops, crashes, crashes_of_first, .. } in &costs {
        println!(
            "| {shards} | {workers} | {} | {} | {} | {} |",
            joins.cells(|settled| settled.balanced),
            stops.cells(|settled| settled.complete),
            crashes.cells(|settled| settled.complete),
            crashes_of_first.cells(|settled| settled.complete),
        );
    }
    println!("\nAll workers start at once, and what that and a crash ask of the table:\n");
    println!(
        "| shards | workers | seconds | moves | reads | rows read | writes | rows read after a crash \
         | after a crash of the first shard's reader |\n|{}",
        "--:|".repeat(9)
    );
    for Costs { shards, workers, start, crashes, crashes_of_first, .. } in &costs {
        let asked = start.requests;
        println!(
            "| {shards} | {workers} | {:.1} | {} | {} | {} | {} | {} | {} |",
            start.balanced.as_secs_f64(),
            start.moves - shards,
            asked.reads,
            asked.rows_read,
            asked.writes,
            crashes.most_rows_read(),
            crashes_of_first.most_rows_read(),
        );
    }
    println!("\nRequests a minute while nothing moves, idle and with a checkpoint every 5 s:\n");
    println!(
        "| shards | workers | reads | rows read | writes | reads, load | rows read, load | \
         writes, load |\n|{}",
        "--:|".repeat(8)
    );
    let minutes = MEASURED.as_secs() / 60;
    for Costs { shards, workers, idle, loaded, .. } in &costs {
        let cells: String = [idle, loaded]
            .into_iter()
            .flat_map(|asked| [asked.reads, asked.rows_read, asked.writes])
            .map(|count| format!(" {} |", count.div_ceil(minutes)))
            .collect();
        println!("| {shards} | {workers} |{cells}");
    }
}
