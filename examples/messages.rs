//! The worker as a stream of messages, each acknowledged when it is finished: no handler, no trait.
//!
//! `cargo run --example messages`, until Ctrl-C; `-- STREAM APPLICATION` reads a stream of yours.

use std::{error::Error, pin::pin};

use tokio_stream::StreamExt as _;
use tramline::{Message, StartPosition, Worker, shutdown_signal};

mod site;

/// What your service does.
async fn look_at(message: &Message) -> Result<(), Box<dyn Error>> {
    println!("{} {}", message.shard(), message.raw());
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let site = site::Site::from_args().await?;
    site.start_traffic().await?;

    let mut messages = Worker::builder(&site.aws, &site.stream, &site.application)
        .start(StartPosition::ServiceDay)
        .messages()
        .await?;
    let mut stop = pin!(shutdown_signal());
    while let Some(message) = tokio::select! {
        message = messages.next() => message,
        () = &mut stop => None,
    } {
        // At once, later, from another task, in any order: the checkpoint of a shard stays before the
        // first message that is not acknowledged.
        match look_at(&message).await {
            Ok(()) => message.ack(),
            Err(error) => message.nack(error), // It comes again.
        }
    }
    let report = messages.finish().await?; // Or why the stream ended.
    println!("{} messages are finished", report.messages);
    Ok(())
}
