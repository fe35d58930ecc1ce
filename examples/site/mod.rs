//! Where an example runs: on embedded servers, or on the AWS that its arguments mean.

#![allow(dead_code)] // Each example uses a part of it.

use std::{error::Error, ops::Range, time::Duration};

use aws_config::{BehaviorVersion, SdkConfig};
use aws_sdk_kinesis::types::StreamStatus;
use tramline::{
    Producer, ProducerSettings, Spool,
    local::{Local, LocalSettings},
    ocs::generate::{Generator, Item, Profile},
};

/// What an example reads or writes.
pub struct Site {
    /// What the clients of AWS are made from. Your service has the first line of `of_aws`.
    pub aws: SdkConfig,
    pub stream: String,
    pub application: String,
    /// For state.
    pub bucket: String,
    /// They stop when this is dropped.
    embedded: Option<Local>,
}

impl Site {
    /// What `STREAM [APPLICATION [BUCKET]]` on the command line mean, or else embedded servers.
    pub async fn from_args() -> Result<Self, Box<dyn Error>> {
        let mut args = std::env::args().skip(1);
        match args.next() {
            Some(stream) => Ok(Self::of_aws(stream, args.next(), args.next()).await),
            None => Self::embedded().await,
        }
    }

    /// AWS, with the endpoints, region and credentials of its usual variables and files.
    async fn of_aws(stream: String, application: Option<String>, bucket: Option<String>) -> Self {
        let aws = aws_config::load_defaults(BehaviorVersion::latest()).await;
        let application = application.unwrap_or_else(|| env!("CARGO_CRATE_NAME").to_owned());
        Self { aws, stream, application, bucket: bucket.unwrap_or_default(), embedded: None }
    }

    /// Embedded Kinesis, DynamoDB and S3, with a stream and a bucket.
    pub async fn embedded() -> Result<Self, Box<dyn Error>> {
        let local = Local::start(LocalSettings::default()).await?;
        let site = Self {
            aws: local.sdk_config(),
            stream: "ctd-ocs-raw-messages".to_owned(),
            application: env!("CARGO_CRATE_NAME").to_owned(),
            bucket: "rtr-state".to_owned(),
            embedded: Some(local),
        };
        let s3 = aws_sdk_s3::Client::new(&site.aws);
        s3.create_bucket().bucket(&site.bucket).send().await?;
        let kinesis = aws_sdk_kinesis::Client::new(&site.aws);
        kinesis.create_stream().stream_name(&site.stream).shard_count(2).send().await?;
        loop {
            let told = kinesis.describe_stream_summary().stream_name(&site.stream).send().await?;
            let status = told.stream_description_summary.map(|stream| stream.stream_status);
            if status == Some(StreamStatus::Active) {
                return Ok(site);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub fn is_embedded(&self) -> bool {
        self.embedded.is_some()
    }

    /// Puts messages with these numbers, over all shards.
    pub async fn put(&self, numbers: Range<u64>) -> Result<(), Box<dyn Error>> {
        let producer = self.producer().await?;
        for number in numbers {
            let lane = producer.lane(format!("sender-{number}"), None);
            lane.send(format!("{number},DIAG,11:00:00,BROADCAST")).await?;
        }
        producer.close().await?;
        Ok(())
    }

    /// Puts the messages of two OCS senders from now on, 50 a second, if the servers are embedded. One of
    /// a hundred is lost before it comes to the producer.
    pub async fn start_traffic(&self) -> Result<(), Box<dyn Error>> {
        if !self.is_embedded() {
            return Ok(());
        }
        let producer = self.producer().await?;
        let mut senders = [("north", 0), ("south", 1)].map(|(name, n)| {
            let lane = producer.lane(name, None);
            let lines = Generator::new(1, n, Profile::Day).filter_map(|item| match item {
                Item::Message(line) => Some(line),
                Item::Heartbeat => None,
            });
            (lane, lines.enumerate().filter(|(n, _)| n % 100 != 99))
        });
        tokio::spawn(async move {
            let _producer = producer; // It puts as long as it is there.
            loop {
                for (lane, lines) in &mut senders {
                    let Some((_, line)) = lines.next() else { return };
                    let Ok(_) = lane.send(line).await else { return };
                }
                tokio::time::sleep(Duration::from_millis(40)).await;
            }
        });
        Ok(())
    }

    async fn producer(&self) -> Result<Producer, Box<dyn Error>> {
        let settings = ProducerSettings { spool: Spool::Memory, ..ProducerSettings::default() };
        Ok(Producer::start(&self.aws, &self.stream, settings).await?)
    }
}
