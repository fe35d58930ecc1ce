//! A producer in a program that has messages of its own: each lane in order, each message at least once,
//! kept on disk until Kinesis has it.
//!
//! `cargo run --example producer`; `-- STREAM` writes to a stream of yours.

use std::error::Error;

use tramline::{Producer, ProducerSettings, Spool};

mod site;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let site = site::Site::from_args().await?;

    // Yours stays where it is: what an outage of AWS left there goes first at the next start.
    let spool = std::env::temp_dir().join(format!("tramline-producer-{}", std::process::id()));
    let settings = ProducerSettings {
        source: "example.mbta.com/producer".to_owned(),
        spool: Spool::Directory(spool.clone()),
        ..ProducerSettings::default()
    };
    let producer = Producer::start(&site.aws, &site.stream, settings).await?;

    // What a lane sends stands in the stream in that order. Lanes wait for nothing of each other.
    for sender in ["north", "south"] {
        let lane = producer.lane(sender, None);
        let mut last = None;
        for n in 1..=50 {
            // Waits only if the spool is full.
            last = Some(lane.send(format!("{n},DIAG,12:00:00,{sender} {n}")).await?);
        }
        lane.flush().await?; // Or nothing: it goes by itself within a second.
        if let Some(receipt) = last {
            let at = receipt.await?;
            println!("{sender}: the last is in {} at {}", at.shard, at.sequence_number);
        }
    }

    // What is not in the stream within the shutdown limit, 30 s, stays in the spool.
    let report = producer.close().await?;
    println!("{} messages in {} records", report.put, report.records);
    std::fs::remove_dir_all(spool)?;
    Ok(())
}
