//! Streams and fan-out consumers, looked at and not touched.

use std::collections::BTreeMap;

use aws_sdk_kinesis::{
    Client,
    error::SdkError,
    primitives::Blob,
    types::{
        PutRecordsRequestEntry, ShardIteratorType, StartingPosition, StreamDescriptionSummary,
        StreamMode, StreamStatus,
    },
};
use aws_types::SdkConfig;

use super::{Found, Report, Settings, Trouble, clock::Clock};
use crate::{
    Retrieval,
    aws::{self, AwsError, AwsErrorKind},
    permissions::{Command, Permission, Resource, When},
};

/// One above the highest: no shard takes it.
const NO_HASH_KEY: &str = "340282366920938463463374607431768211456";
/// The name of no shard that is likely to be.
const NO_SHARD: &str = "shardId-999999999999";
/// How many fan-out consumers a stream may have, unless AWS raised it: on demand and provisioned.
const CONSUMER_QUOTA: i32 = 20;
/// The same of a stream on demand, where the account has On-demand Advantage.
const ADVANTAGE_QUOTA: i32 = 50;

pub(super) struct Streams {
    client: Client,
    region: String,
}

/// What was found of a stream.
#[derive(Default)]
struct Seen {
    /// It does not exist.
    gone: bool,
    arn: Option<String>,
    consumers: i32,
    on_demand: bool,
    /// The ARN of the application's consumer.
    consumer: Option<String>,
    /// The server does not know fan-out.
    polls: bool,
    shard: Option<String>,
    iterator: Option<String>,
}

impl Streams {
    pub(super) fn new(config: &SdkConfig, clock: &Clock, region: String) -> Self {
        let config = aws_sdk_kinesis::config::Builder::from(config)
            .timeout_config(aws::call_timeouts())
            .interceptor(clock.clone())
            .build();
        Self { client: Client::from_conf(config), region }
    }

    /// Checks a stream that is read or written.
    pub(super) async fn check(&self, report: &mut Report, settings: &Settings, name: &str) {
        let check = format!("stream {name}");
        let named = settings.applications.iter().map(|application| &*application.name);
        let mut applications: Vec<&str> = named.collect();
        if applications.is_empty() {
            applications.push(if settings.command == Command::Replay { "replay" } else { "" });
        }
        let mut seen = Seen { polls: settings.retrieval == Retrieval::Polling, ..Seen::default() };
        let mut consumers = BTreeMap::new();
        for row in report.rows(&[Resource::Stream, Resource::Consumer]) {
            match row.when {
                When::Polling if !seen.polls => continue,
                When::FanOut | When::Missing if seen.polls => continue,
                When::Several if settings.streams.len() == 1 => continue,
                _ if seen.gone => {
                    report.not_tried(row, &check, "there is no stream");
                    continue;
                }
                _ => {}
            }
            let fan_out = settings.retrieval == Retrieval::FanOut;
            let of_each = matches!(row.when, When::FanOut | When::Missing);
            for application in &applications[..if of_each { applications.len() } else { 1 }] {
                if of_each {
                    seen.consumer = consumers.get(application).cloned();
                }
                let check = match row.on {
                    Resource::Consumer => format!("fan-out consumer {application} of {name}"),
                    _ => check.clone(),
                };
                let call = self.call(row, name, application, fan_out, &mut seen);
                report.tried(row, &check, call).await;
                if let Some(arn) = seen.consumer.clone().filter(|_| of_each) {
                    consumers.insert(application, arn);
                }
            }
        }
    }

    /// Checks a stream for dead letters.
    pub(super) async fn check_letters(&self, report: &mut Report, name: &str) {
        let check = format!("stream of dead letters {name}");
        let mut seen = Seen::default();
        for row in report.rows(&[Resource::DeadLetterStream]) {
            if seen.gone {
                report.not_tried(row, &check, "there is no stream");
                continue;
            }
            report.tried(row, &check, self.call(row, name, "", false, &mut seen)).await;
        }
    }

    async fn call(
        &self,
        row: &Permission,
        name: &str,
        application: &str,
        fan_out: bool,
        seen: &mut Seen,
    ) -> Found {
        match row.action {
            "kinesis:DescribeStreamSummary" => self.describe(name, seen).await,
            "kinesis:ListShards" => self.list(name, seen).await,
            "kinesis:DescribeStreamConsumer" => self.consumer(application, fan_out, seen).await,
            "kinesis:RegisterStreamConsumer" => room(seen),
            "kinesis:SubscribeToShard" => self.subscribe(application, seen).await,
            "kinesis:GetShardIterator" => self.iterate(name, seen).await,
            "kinesis:GetRecords" => self.read(seen).await,
            "kinesis:PutRecords" => self.put(name).await,
            _ => Err(Trouble::NotTried("there is no harmless call".to_owned())),
        }
    }

    /// A stream that does not exist is told as such, by whatever call finds out.
    fn failed(&self, name: &str, seen: &mut Seen, error: AwsError) -> Trouble {
        if error.kind() != AwsErrorKind::NotFound {
            return error.into();
        }
        seen.gone = true;
        let region = &self.region;
        Trouble::Wrong {
            detail: format!("it does not exist in {region}, in this account"),
            repair: format!(
                "correct its name, the region or the account, or create it: aws kinesis create-stream \
                 --stream-name {name} --stream-mode-details StreamMode=ON_DEMAND --region {region}"
            ),
        }
    }

    async fn describe(&self, name: &str, seen: &mut Seen) -> Found {
        let described = self.client.describe_stream_summary().stream_name(name).send().await;
        let described =
            described.map_err(|error| aws::failure("kinesis:DescribeStreamSummary", error));
        let described = described.map_err(|error| self.failed(name, seen, error))?;
        let Some(summary) = described.stream_description_summary else {
            return Err(Trouble::NotTried("the answer says nothing of the stream".to_owned()));
        };
        seen.arn = Some(summary.stream_arn.clone());
        seen.consumers = summary.consumer_count.unwrap_or_default();
        let mode = summary.stream_mode_details.as_ref().map(|details| &details.stream_mode);
        seen.on_demand = mode == Some(&StreamMode::OnDemand);
        judge(name, &summary)
    }

    async fn list(&self, name: &str, seen: &mut Seen) -> Found {
        let listed = self.client.list_shards().stream_name(name).send().await;
        let listed = listed.map_err(|error| aws::failure("kinesis:ListShards", error));
        let listed = listed.map_err(|error| self.failed(name, seen, error))?;
        let shards = listed.shards.unwrap_or_default();
        let open = |shard: &&aws_sdk_kinesis::types::Shard| {
            let range = shard.sequence_number_range.as_ref();
            range.is_none_or(|range| range.ending_sequence_number.is_none())
        };
        let count = shards.iter().filter(open).count();
        seen.shard = shards.iter().find(open).map(|shard| shard.shard_id.clone());
        let more = if listed.next_token.is_some() { ", and more" } else { "" };
        Ok(format!("{count} open shards, {} closed{more}", shards.len() - count))
    }

    async fn consumer(&self, name: &str, fan_out: bool, seen: &mut Seen) -> Found {
        let Some(arn) = seen.arn.clone() else {
            return Err(Trouble::NotTried("the ARN of the stream is not known".to_owned()));
        };
        let described = self.client.describe_stream_consumer().stream_arn(arn).consumer_name(name);
        let described = described.send().await;
        match described.map_err(|error| aws::failure("kinesis:DescribeStreamConsumer", error)) {
            Ok(answer) => {
                let consumer = answer.consumer_description;
                seen.consumer = consumer.as_ref().map(|consumer| consumer.consumer_arn.clone());
                let state = consumer.map_or_else(String::new, |c| c.consumer_status.to_string());
                Ok(format!("is registered, {}", state.to_lowercase()))
            }
            Err(error) if error.kind() == AwsErrorKind::NotFound => {
                Ok("is not registered yet".to_owned())
            }
            Err(error) if error.kind() == AwsErrorKind::UnknownOperation && !fan_out => {
                seen.polls = true;
                Ok("the server does not know fan-out: shards are polled".to_owned())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Subscribes to no shard. Kinesis looks for it after it has looked at the permission.
    async fn subscribe(&self, application: &str, seen: &mut Seen) -> Found {
        let consumer = match (&seen.consumer, &seen.arn) {
            (Some(arn), _) => arn.clone(),
            // Of this form are those of consumers by this name.
            (None, Some(stream)) => format!("{stream}/consumer/{application}:1"),
            (None, None) => {
                return Err(Trouble::NotTried("the ARN of the stream is not known".to_owned()));
            }
        };
        let latest = StartingPosition::builder().r#type(ShardIteratorType::Latest).build().ok();
        let subscribed = self
            .client
            .subscribe_to_shard()
            .consumer_arn(consumer)
            .shard_id(NO_SHARD)
            .set_starting_position(latest)
            .send()
            .await;
        let error = match subscribed {
            Ok(_) => return Ok("allowed".to_owned()),
            // A server that answers in the form of events names the error there.
            Err(SdkError::ResponseError(_)) => {
                let why = "the server does not say what it thinks of a subscription to no shard";
                return Err(Trouble::NotTried(why.to_owned()));
            }
            Err(error) => aws::failure("kinesis:SubscribeToShard", error),
        };
        allowed(error, AwsErrorKind::NotFound)
    }

    async fn iterate(&self, name: &str, seen: &mut Seen) -> Found {
        let Some(shard) = seen.shard.clone() else {
            return Err(Trouble::NotTried("no open shard is known".to_owned()));
        };
        let opened = self.client.get_shard_iterator().stream_name(name).shard_id(shard);
        let opened = opened.shard_iterator_type(ShardIteratorType::Latest).send().await;
        let opened = opened.map_err(|error| aws::failure("kinesis:GetShardIterator", error));
        seen.iterator = opened.map_err(|error| self.failed(name, seen, error))?.shard_iterator;
        Ok("allowed".to_owned())
    }

    async fn read(&self, seen: &mut Seen) -> Found {
        let Some(iterator) = seen.iterator.take() else {
            return Err(Trouble::NotTried("there is no shard iterator to read by".to_owned()));
        };
        let read = self.client.get_records().shard_iterator(iterator).limit(1).send().await;
        read.map_err(|error| aws::failure("kinesis:GetRecords", error))?;
        Ok("allowed".to_owned())
    }

    /// Puts what no shard takes.
    async fn put(&self, name: &str) -> Found {
        let record = PutRecordsRequestEntry::builder().partition_key("tramline check");
        let record = record.explicit_hash_key(NO_HASH_KEY).data(Blob::new(*b"x")).build();
        let put =
            self.client.put_records().stream_name(name).set_records(record.ok().map(|r| vec![r]));
        match put.send().await.map_err(|error| aws::failure("kinesis:PutRecords", error)) {
            Ok(answer) if answer.failed_record_count == Some(1) => Ok("allowed".to_owned()),
            Ok(_) => Err(took_it()),
            Err(error) => self.put_failed(name, error),
        }
    }

    fn put_failed(&self, name: &str, error: AwsError) -> Found {
        match error.kind() {
            AwsErrorKind::NotFound => Err(self.failed(name, &mut Seen::default(), error)),
            _ if error.said().starts_with("InvalidArgumentException") => Ok("allowed".to_owned()),
            _ => Err(error.into()),
        }
    }
}

fn took_it() -> Trouble {
    Trouble::Wrong {
        detail: "the server took a record with a hash key that no shard has".to_owned(),
        repair: "use Kinesis, or a server that is closer to it".to_owned(),
    }
}

/// An error that only comes after the permission was looked at.
fn allowed(error: AwsError, after: AwsErrorKind) -> Found {
    if error.kind() == after { Ok("allowed".to_owned()) } else { Err(error.into()) }
}

/// Whether a stream can be used.
fn judge(name: &str, summary: &StreamDescriptionSummary) -> Found {
    let status = &summary.stream_status;
    if !matches!(status, StreamStatus::Active | StreamStatus::Updating) {
        return Err(Trouble::Wrong {
            detail: format!("it is {status}"),
            repair: format!("aws kinesis wait stream-exists --stream-name {name}"),
        });
    }
    let key = match &summary.key_id {
        Some(key) => format!(", encrypted with {key}"),
        None => String::new(),
    };
    let (shards, hours) = (summary.open_shard_count, summary.retention_period_hours);
    Ok(format!("is there, with {shards} open shards, kept for {hours} h{key}"))
}

/// Whether a consumer can be registered, as far as the quota tells.
fn room(seen: &Seen) -> Found {
    let consumers = seen.consumers;
    if seen.consumer.is_some() {
        return Err(Trouble::NotTried("not needed: it is registered".to_owned()));
    }
    let Some(arn) = &seen.arn else {
        return Err(Trouble::NotTried("the stream was not described".to_owned()));
    };
    let quota = match seen.on_demand {
        true => format!("{CONSUMER_QUOTA}, or {ADVANTAGE_QUOTA} with On-demand Advantage"),
        false => CONSUMER_QUOTA.to_string(),
    };
    if consumers >= if seen.on_demand { ADVANTAGE_QUOTA } else { CONSUMER_QUOTA } {
        return Err(Trouble::Wrong {
            detail: format!(
                "{consumers} fan-out consumers are registered, and AWS allows {quota}, unless it raised the \
                 quota"
            ),
            repair: format!(
                "deregister one that nobody uses (aws kinesis list-stream-consumers --stream-arn {arn}), \
                 or pass --retrieval polling"
            ),
        });
    }
    Err(Trouble::NotTried(format!(
        "it would register the consumer, as the first worker does; {consumers} are registered, and AWS \
         allows {quota}"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_with_all_its_consumers_has_no_room_for_another() {
        let arn = Some("arn:aws:kinesis:us-east-1:123456789012:stream/s".to_owned());
        let full = Seen { arn: arn.clone(), consumers: 20, ..Seen::default() };
        assert!(matches!(room(&full), Err(Trouble::Wrong { .. })));
        let room_left = Seen { arn: arn.clone(), consumers: 19, ..Seen::default() };
        assert!(matches!(room(&room_left), Err(Trouble::NotTried(_))));
        // Whether the account has On-demand Advantage is not asked.
        let on_demand = |consumers| {
            room(&Seen { arn: arn.clone(), consumers, on_demand: true, ..Seen::default() })
        };
        let Err(Trouble::NotTried(told)) = on_demand(20) else { panic!("there may be room") };
        assert!(told.contains("20 are registered") && told.contains("50 with On-demand Advantage"));
        assert!(matches!(on_demand(50), Err(Trouble::Wrong { .. })));
        // Ours is one of them.
        let ours = Seen { arn, consumers: 20, consumer: Some("arn".to_owned()), ..Seen::default() };
        assert!(matches!(room(&ours), Err(Trouble::NotTried(_))));
    }
}
