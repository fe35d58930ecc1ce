//! A database that takes fewer writes a second than the stream has messages: it gets each train's newest
//! position, and the further behind it is, the more of the older ones are left out.
//!
//! `cargo run --example coalesce`, until Ctrl-C; `-- STREAM APPLICATION` reads a stream of yours.

use std::{collections::BTreeMap, convert::Infallible, error::Error, sync::Arc, time::Duration};

use tokio::sync::Mutex;
use tramline::{
    Batch, Coalesce, Handler, Message, Worker,
    ocs::{Body, Movement, Position},
    shutdown_signal,
};

mod site;

/// Stands for yours: it takes ten writes a second, one after the other.
#[derive(Default)]
struct Database {
    trains: Mutex<BTreeMap<String, (Option<Position>, u64)>>,
}

impl Database {
    async fn write(&self, train: &str, position: Option<Position>) {
        let mut trains = self.trains.lock().await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        let (last, writes) = trains.entry(train.to_owned()).or_default();
        (*last, *writes) = (position, *writes + 1);
    }
}

/// Writes the position of every train in a batch.
struct Positions(Arc<Database>);

impl Handler for Positions {
    type Error = Infallible;

    async fn handle(&mut self, batch: &Batch) -> Result<(), Infallible> {
        for (train, position) in batch.iter().filter_map(moved) {
            self.0.write(train, position).await;
        }
        println!("{} positions written", batch.iter().filter_map(moved).count());
        Ok(())
    }
}

/// The train that a message tells of, and where it is, if it is anywhere.
fn moved(message: &Message) -> Option<(&str, Option<Position>)> {
    match message.ocs().ok()?.body {
        Body::Movement(Movement::HeavyRail(at)) => Some((at.train, at.position)),
        Body::Movement(Movement::LightRail(at)) => Some((at.train, at.position)),
        Body::Movement(Movement::Left { train }) => Some((train, None)),
        _ => None,
    }
}

/// Messages of one train replace each other; those of no train are all kept.
fn train(message: &Message) -> Option<String> {
    moved(message).map(|(train, _)| train.to_owned())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let site = site::Site::from_args().await?;
    site.start_traffic().await?;

    let database = Arc::new(Database::default());
    let positions = || Coalesce::new(Positions(database.clone()), train);
    let worker = Worker::builder(&site.aws, &site.stream, &site.application)
        .handler(move |_shard| positions())
        .build()
        .await?;
    let report = worker.run(shutdown_signal()).await?;
    let writes: u64 = database.trains.lock().await.values().map(|(_, n)| n).sum();
    println!("{} messages in {writes} writes", report.messages);
    Ok(())
}
