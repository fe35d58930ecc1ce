//! Prints the OCS messages that are missing, by the number that each sender gives to its messages, and
//! those that came twice.
//!
//! `cargo run --example sequence_monitor`, until Ctrl-C; `-- STREAM APPLICATION` reads a stream of yours.

use std::{borrow::Cow, convert::Infallible, error::Error};

use tramline::{
    Batch, Handler, Message, Retrieval, StartPosition, Worker,
    ocs::{SequenceMonitor, SequenceStep, counter},
    shutdown_signal,
};

mod site;

/// Watches the senders of one shard and says what it sees.
pub struct Watch<F> {
    monitor: SequenceMonitor,
    say: F,
}

impl<F: FnMut(String)> Watch<F> {
    /// `say` gets a line of text for everything out of the ordinary.
    pub fn new(say: F) -> Self {
        Self { monitor: SequenceMonitor::new(1_000), say }
    }

    fn look_at(&mut self, message: &Message) {
        let sender = message.source_ip().unwrap_or(Cow::Borrowed(message.partition_key()));
        let counter = counter(message.raw().as_bytes());
        let (Some(counter), Some(at)) = (counter, message.time().or(message.arrived_at())) else {
            return (self.say)(format!("{sender}: a message without a counter: {message:?}"));
        };
        let what = match self.monitor.observe(&sender, counter, at) {
            SequenceStep::First | SequenceStep::Next => return,
            SequenceStep::Gap { last, missing } => format!("{missing} missing after {last}"),
            SequenceStep::Repeat => format!("{counter} came again"),
            SequenceStep::Backwards { last } => format!("back from {last} to {counter}"),
            SequenceStep::Reset { last } => format!("a new day: {last} was followed by {counter}"),
            other => format!("{other:?}"),
        };
        (self.say)(format!("{sender} at {at}: {what}"));
    }
}

impl<F: FnMut(String) + Send + 'static> Handler for Watch<F> {
    type Error = Infallible;

    async fn handle(&mut self, batch: &Batch) -> Result<(), Infallible> {
        batch.iter().for_each(|message| self.look_at(message));
        Ok(())
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let site = site::Site::from_args().await?;
    site.start_traffic().await?;

    let worker = Worker::builder(&site.aws, &site.stream, &site.application)
        .start(StartPosition::Latest)
        .retrieval(Retrieval::Polling) // Nobody waits for it: polling costs less than fan-out.
        .handler(|_shard| Watch::new(|line| println!("{line}")))
        .build()
        .await?;
    worker.run(shutdown_signal()).await?;
    Ok(())
}
