//! The smallest service: counts the messages of each line of the subway.
//!
//! `cargo run --example embedded -- ctd-ocs-raw-messages line-counter`

use std::{collections::BTreeMap, convert::Infallible};

use tramline::{Batch, Handler, StartPosition, Worker, shutdown_signal};

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
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let stream = args.next().ok_or("name the stream")?;
    let application = args.next().ok_or("name the application")?;
    let aws = aws_config::load_defaults(aws_config::BehaviorVersion::latest()).await;

    let worker = Worker::builder(&aws, stream, application)
        .start(StartPosition::ServiceDay)
        .handler(|_shard| LineCounter::default()) // One for each shard.
        .build()
        .await?;
    worker.run(shutdown_signal()).await?;
    Ok(())
}
