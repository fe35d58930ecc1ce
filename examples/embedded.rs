//! The smallest service: counts the messages of each line of the subway.
//!
//! `cargo run --example embedded`, until Ctrl-C; `-- STREAM APPLICATION` reads a stream of yours.

use std::{collections::BTreeMap, convert::Infallible, error::Error};

use tramline::{Batch, Handler, StartPosition, Worker, shutdown_signal};

mod site;

#[derive(Default)]
struct LineCounter(BTreeMap<String, u64>);

impl Handler for LineCounter {
    type Error = Infallible;

    async fn handle(&mut self, batch: &Batch) -> Result<(), Infallible> {
        for message in batch {
            let line = message.raw().split(',').nth(3).unwrap_or("none");
            *self.0.entry(line.to_owned()).or_default() += 1;
        }
        println!("{:?}", self.0);
        Ok(()) // The batch is finished: the checkpoint may pass it.
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let site = site::Site::from_args().await?;
    site.start_traffic().await?;

    let worker = Worker::builder(&site.aws, &site.stream, &site.application)
        .start(StartPosition::ServiceDay)
        .handler(|_shard| LineCounter::default()) // One for each shard.
        .build()
        .await?;
    worker.run(shutdown_signal()).await?;
    Ok(())
}
