//! Embedded servers with a stream and a bucket, so that an example runs with nothing else.

use std::{error::Error, ops::Range, time::Duration};

use aws_sdk_kinesis::{Client, primitives::Blob, types::StreamStatus};
use tramline::local::{Local, LocalSettings};

pub const STREAM: &str = "ctd-ocs-raw-messages";
pub const BUCKET: &str = "rtr-state";

/// Starts embedded Kinesis, DynamoDB and S3, which stop when they are dropped.
pub async fn start() -> Result<Local, Box<dyn Error>> {
    let local = Local::start(LocalSettings::default()).await?;
    let s3 = aws_sdk_s3::Client::new(&local.sdk_config());
    s3.create_bucket().bucket(BUCKET).send().await?;
    let kinesis = Client::new(&local.sdk_config());
    kinesis.create_stream().stream_name(STREAM).shard_count(2).send().await?;
    loop {
        let told = kinesis.describe_stream_summary().stream_name(STREAM).send().await?;
        let status = told.stream_description_summary.map(|stream| stream.stream_status);
        if status == Some(StreamStatus::Active) {
            return Ok(local);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Puts messages with these numbers, over both shards.
pub async fn put(local: &Local, numbers: Range<u64>) -> Result<(), Box<dyn Error>> {
    let kinesis = Client::new(&local.sdk_config());
    for number in numbers {
        let event = format!(
            r#"{{"type":"com.mbta.ocs.raw_message","specversion":"1.0","id":"{number}","source":"example",
                "time":"2025-07-02T15:00:00Z","partitionkey":"key-{number}",
                "data":{{"raw":"{number},DIAG,11:00:00,BROADCAST"}}}}"#
        );
        let put = kinesis.put_record().stream_name(STREAM).data(Blob::new(event));
        put.partition_key(format!("key-{number}")).send().await?;
    }
    Ok(())
}
