use std::time::Duration;

use aws_sdk_kinesis::{Client, primitives::Blob};
use aws_types::SdkConfig;
use tokio::time::Instant;

use crate::{
    aws::{self, AwsError, AwsErrorKind},
    backoff::Backoff,
};

/// The most bytes of a record, partition key included (AWS API reference).
pub(super) const RECORD_LIMIT_BYTES: usize = 1024 * 1024;
/// How often a lasting failure is told again.
const REMINDER_INTERVAL: Duration = Duration::from_secs(60);

/// Writes records to the stream.
#[derive(Debug, Clone)]
pub(super) struct Put {
    client: Client,
    stream: String,
}

impl Put {
    pub(super) fn new(config: &SdkConfig, stream: &str) -> Self {
        let config = aws_sdk_kinesis::config::Builder::from(config)
            .timeout_config(aws::call_timeouts())
            .build();
        Self { client: Client::from_conf(config), stream: stream.to_owned() }
    }

    /// Returns when Kinesis has the record, however long that takes, and gives its sequence number.
    ///
    /// Nothing of the same lane may be put meanwhile, and `after` is the number of the lane's last
    /// record: together they keep the order (P7).
    pub(super) async fn put(
        &self,
        partition_key: &str,
        data: Vec<u8>,
        after: Option<String>,
    ) -> String {
        let data = Blob::new(data);
        let mut after = after;
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
        let began = Instant::now();
        let mut failures = 0_u32;
        let mut remind_at = began;
        let sequence_number = loop {
            let error = match self.try_put(partition_key, &data, after.as_deref()).await {
                Ok(sequence_number) => break sequence_number,
                Err(error) => error,
            };
            // After a reshard the lane's last number may be of another shard. It has been put already,
            // so a record that is put now is the later one without it too.
            if error.kind() == AwsErrorKind::Refused && after.take().is_some() {
                tracing::debug!("{error}; putting the record again without the number before it");
                continue;
            }
            failures += 1;
            if Instant::now() >= remind_at {
                remind_at = Instant::now() + REMINDER_INTERVAL;
                tracing::warn!(
                    stream = self.stream,
                    failures,
                    "{error}; the connection's messages wait, in \
                     order, and the record is put again until Kinesis has it"
                );
            }
            tokio::time::sleep(backoff.next_wait()).await;
        };
        if failures > 0 {
            tracing::info!(
                stream = self.stream,
                failures,
                "Kinesis takes records again after {:.1} s",
                began.elapsed().as_secs_f64()
            );
        }
        sequence_number
    }

    async fn try_put(
        &self,
        partition_key: &str,
        data: &Blob,
        after: Option<&str>,
    ) -> Result<String, AwsError> {
        let put = self
            .client
            .put_record()
            .stream_name(&self.stream)
            .partition_key(partition_key)
            .set_sequence_number_for_ordering(after.map(str::to_owned))
            .data(data.clone())
            .send()
            .await
            .map_err(|error| aws::failure("kinesis:PutRecord", error))?;
        tracing::debug!(
            stream = self.stream,
            shard = put.shard_id,
            sequence_number = put.sequence_number,
            "record put"
        );
        Ok(put.sequence_number)
    }
}
