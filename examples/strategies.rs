//! The four ways to keep where a service was, or not to (docs/state.md): one setting each.
//!
//! `cargo run --example strategies` runs a service of each kind twice on embedded servers, and prints what
//! each run saw. Five messages come between the runs, and none during them.

use std::{
    convert::Infallible,
    error::Error,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tramline::{Batch, Checkpoints, Handler, Retrieval, StartPosition, Worker, WorkerBuilder};

mod site;
use site::Site;

/// Nothing is stored, and only what comes while it runs matters: a display.
fn latest_only(worker: WorkerBuilder<()>) -> WorkerBuilder<()> {
    worker.no_checkpoint().start(StartPosition::Latest)
}

/// Positions, and what `Handler::snapshot` returns, in one object that the service owns.
fn state_in_s3(worker: WorkerBuilder<()>) -> WorkerBuilder<()> {
    worker.checkpoints(Checkpoints::s3("rtr-state", "green.state"))
}

/// Positions in the lease table: the default. Any number of workers share the shards.
fn positions_in_dynamodb(worker: WorkerBuilder<()>) -> WorkerBuilder<()> {
    worker.checkpoints(Checkpoints::lease_table())
}

/// Nothing is stored; each run reads the whole service day again, from 02:00.
fn service_day_again(worker: WorkerBuilder<()>) -> WorkerBuilder<()> {
    worker.no_checkpoint().start(StartPosition::ServiceDay)
}

/// The way of keeping state that a service is set to.
type Strategy = fn(WorkerBuilder<()>) -> WorkerBuilder<()>;

const STRATEGIES: [(&str, Strategy); 4] = [
    ("latest-only", latest_only),
    ("state-in-s3", state_in_s3),
    ("positions-in-dynamodb", positions_in_dynamodb),
    ("service-day-again", service_day_again),
];

/// Counts what it sees.
struct Count(Arc<AtomicU64>);

impl Handler for Count {
    type Error = Infallible;

    async fn handle(&mut self, batch: &Batch) -> Result<(), Infallible> {
        self.0.fetch_add(batch.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}

/// Runs a service until nothing comes, and gives how many messages it saw.
async fn run(site: &Site, name: &str, strategy: Strategy) -> Result<u64, Box<dyn Error>> {
    let seen = Arc::new(AtomicU64::new(0));
    let count = seen.clone();
    let worker = Worker::builder(&site.aws, &site.stream, name)
        .retrieval(Retrieval::Polling)
        .stop_when_idle(Duration::from_secs(1));
    let worker = strategy(worker).handler(move |_shard| Count(count.clone())).build().await?;
    worker.run(std::future::pending()).await?;
    Ok(seen.load(Ordering::Relaxed))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let site = Site::embedded().await?;
    let mut first = Vec::new();
    site.put(0..10).await?;
    for (name, strategy) in STRATEGIES {
        first.push(run(&site, name, strategy).await?);
    }
    site.put(10..15).await?;
    for ((name, strategy), first) in STRATEGIES.into_iter().zip(first) {
        println!("{name}: {first}, then {}", run(&site, name, strategy).await?);
    }
    Ok(())
}
