//! Counts messages and adds up their numbers, each exactly once, however often the service is killed: the
//! totals are stored in the same S3 object, and by the same write, as the position (docs/state.md).
//!
//! `cargo run --example exactly_once` kills it ten times on embedded servers, and looks at the totals;
//! `-- STREAM APPLICATION BUCKET` counts a stream of yours, until nothing comes.

use std::{
    error::Error,
    sync::{Arc, Mutex},
    time::Duration,
};

use tramline::{Batch, Checkpoints, Handler, StopReason, Worker, shutdown_signal};

mod site;

/// The totals of one shard.
#[derive(Clone, Default)]
pub struct Totals {
    count: u64,
    sum: u64,
    /// Where it tells them, when its shard stops.
    told: Arc<Mutex<Vec<(u64, u64)>>>,
}

impl Totals {
    /// Tells the count and the sum of each shard to `told`.
    pub fn new(told: Arc<Mutex<Vec<(u64, u64)>>>) -> Self {
        Self { told, ..Self::default() }
    }
}

impl Handler for Totals {
    type Error = std::num::ParseIntError;

    async fn handle(&mut self, batch: &Batch) -> Result<(), Self::Error> {
        // All of a batch or nothing of it: after an error it is offered again.
        let numbers =
            batch.iter().map(|message| message.raw().split(',').next().unwrap_or("").parse());
        let numbers: Vec<u64> = numbers.collect::<Result<_, _>>()?;
        self.count += numbers.len() as u64;
        self.sum += numbers.iter().sum::<u64>();
        Ok(())
    }

    fn snapshot(&mut self) -> Result<Option<Vec<u8>>, Self::Error> {
        Ok(Some(format!("{},{}", self.count, self.sum).into_bytes()))
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), Self::Error> {
        let text = String::from_utf8_lossy(state);
        let (count, sum) = text.split_once(',').unwrap_or_default();
        (self.count, self.sum) = (count.parse()?, sum.parse()?);
        Ok(())
    }

    async fn stopping(&mut self, _: StopReason) {
        self.told.lock().expect("a lock").push((self.count, self.sum));
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let site = site::Site::from_args().await?;
    let told = Arc::default();
    let service = || {
        let totals = Totals::new(Arc::clone(&told));
        Worker::builder(&site.aws, &site.stream, &site.application)
            .checkpoints(Checkpoints::s3(&site.bucket, "totals.state"))
            .checkpoint_interval(Duration::from_millis(20)) // For a short life; the default is 5 s.
            .stop_when_idle(Duration::from_secs(1)) // So that the example ends.
            .handler(move |_shard| totals.clone())
            .build()
    };
    for n in 0..if site.is_embedded() { 10 } else { 0 } {
        site.put(n * 10..n * 10 + 10).await?;
        let running = service().await?.run(std::future::pending());
        // Dropped wherever it is.
        let _ = tokio::time::timeout(Duration::from_millis(100 + 30 * n), running).await;
    }
    service().await?.run(shutdown_signal()).await?;

    let shards: Vec<(u64, u64)> = std::mem::take(&mut *told.lock().expect("a lock"));
    let (counts, sums): (Vec<u64>, Vec<u64>) = shards.into_iter().unzip();
    println!("{} messages, sum {}", counts.iter().sum::<u64>(), sums.iter().sum::<u64>());
    Ok(())
}
