//! The stream that letters are put into.

use std::{
    collections::{HashMap, HashSet},
    sync::Mutex,
    time::Duration,
};

use aws_sdk_kinesis::{Client, config::retry::RetryConfig};
use aws_types::SdkConfig;
use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use jiff::Timestamp;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Patience, collect::Letter, from::read_surely};
use crate::{
    Retrieval,
    aws::{self, AwsError, AwsErrorKind},
    handler::{LetterId, Outgoing, put_records, round},
    record::Record,
    shard::{ChildShard, ShardId},
    source::{Place, ShardReader, SourceError, Stream},
};

/// How many shards are looked into at a time.
const AT_A_TIME: usize = 8;

pub(super) struct Target {
    stream: Stream,
    arn: String,
    client: Client,
}

/// Letters on their way.
pub(super) struct Batch<'a> {
    /// Not put yet, in order.
    left: Vec<&'a Letter>,
    /// Kinesis has these.
    pub put: Vec<LetterId>,
    /// It is not known of these whether Kinesis has them, ...
    pub uncertain: Vec<LetterId>,
    /// ... which got them at this time or later.
    pub since: Timestamp,
}

pub(super) enum PutError {
    /// Trying again would not help.
    Refused(AwsError),
    /// It cannot be found out whether Kinesis has what it was given.
    Look(SourceError),
}

impl<'a> Batch<'a> {
    pub(super) fn new(letters: &[&'a Letter], since: Timestamp) -> Self {
        Self { left: letters.to_vec(), put: Vec::new(), uncertain: Vec::new(), since }
    }

    pub(super) fn is_left(&self) -> bool {
        !self.left.is_empty()
    }

    /// Kinesis has these.
    fn settle(&mut self, ids: impl IntoIterator<Item = LetterId>) {
        let known = self.put.len();
        self.put.extend(ids);
        let new: HashSet<&LetterId> = self.put[known..].iter().collect();
        self.left.retain(|letter| !new.contains(&letter.id));
        self.uncertain.clear();
    }
}

impl Target {
    pub(super) async fn open(config: &SdkConfig, name: &str) -> Result<Self, SourceError> {
        let stream = Stream::new(config, name, Retrieval::Polling);
        let arn = stream.until_active_stream().await?.stream_arn;
        let config = aws_sdk_kinesis::config::Builder::from(config)
            .timeout_config(aws::call_timeouts())
            // A put that is tried again after a lost answer may arrive twice.
            .retry_config(RetryConfig::disabled())
            .build();
        Ok(Self { stream, arn, client: Client::from_conf(config) })
    }

    pub(super) fn name(&self) -> &str {
        self.stream.name()
    }

    /// Names the account and the region too.
    pub(super) fn arn(&self) -> &str {
        &self.arn
    }

    /// Puts a batch: one letter of a partition key at a time, so that their order stays. When Kinesis
    /// gives no usable answer, looks whether it has what it was given. Ends early when `stop` is
    /// cancelled. Whatever happens, the batch knows afterwards what is put.
    pub(super) async fn put(
        &self,
        batch: &mut Batch<'_>,
        settle: Duration,
        stop: &CancellationToken,
        progress: impl Fn(usize),
    ) -> Result<(), PutError> {
        let mut patience = Patience::new();
        while batch.is_left() && !stop.is_cancelled() {
            let chosen = round(batch.left.iter().map(|letter| &letter.record));
            let letters: Vec<&Letter> = chosen.iter().map(|n| batch.left[*n]).collect();
            let records: Vec<&Outgoing> = letters.iter().map(|letter| &letter.record).collect();
            let at = Timestamp::now();
            let results = put_records(&self.client, self.stream.name(), &records)
                .await
                .unwrap_or_else(|error| vec![Err(error); letters.len()]);

            let (mut put, mut uncertain, mut failed) = (Vec::new(), Vec::new(), None);
            for (letter, result) in letters.into_iter().zip(results) {
                match result {
                    Ok(()) => put.push(letter.id),
                    Err(error) => {
                        if may_be_put(&error) {
                            uncertain.push(letter);
                        }
                        failed = Some(error);
                    }
                }
            }
            if !put.is_empty() {
                patience = Patience::new();
            }
            batch.settle(put);
            if let (Some(error), false) = (&failed, uncertain.is_empty()) {
                tracing::warn!(
                    stream = self.name(),
                    letters = uncertain.len(),
                    "{error}; looking whether Kinesis has the letters, for up to {settle:?}"
                );
                batch.uncertain = uncertain.iter().map(|letter| letter.id).collect();
                batch.since = at;
                let found = tokio::select! {
                    found = self.look(&uncertain, at, settle) => found.map_err(PutError::Look)?,
                    () = stop.cancelled() => return Ok(()),
                };
                batch.settle(found);
            }
            progress(batch.put.len());
            if let Some(error) = failed {
                tracing::debug!(stream = self.name(), "{error}; putting what is left again");
                if !patience.wait(error.is_transient()).await {
                    return Err(PutError::Refused(error));
                }
            }
        }
        Ok(())
    }

    /// Looks which of these letters are in the stream that were put at `since` or later. Ends when all
    /// are found, or when nothing more can arrive: `settle` after this began.
    pub(super) async fn look(
        &self,
        letters: &[&Letter],
        since: Timestamp,
        settle: Duration,
    ) -> Result<HashSet<LetterId>, SourceError> {
        let settled = Instant::now() + settle;
        let from = Place::pin_time(since);
        let wanted = Mutex::new(Wanted::new(self.name(), letters));
        let mut shards: Vec<ShardId> =
            self.stream.shards().await?.into_iter().map(|shard| shard.id).collect();
        let mut begun: HashSet<ShardId> = shards.iter().cloned().collect();
        // Those that follow a shard that ended meanwhile come after it.
        while !shards.is_empty() {
            let looks = shards.drain(..).map(|shard| self.look_into(shard, from, settled, &wanted));
            let ended: Vec<Vec<ChildShard>> =
                stream::iter(looks).buffer_unordered(AT_A_TIME).try_collect().await?;
            let children = ended.into_iter().flatten().map(|child| child.id);
            shards = children.filter(|child| begun.insert(child.clone())).collect();
        }
        Ok(wanted.into_inner().unwrap_or_else(|poison| poison.into_inner()).found)
    }

    async fn look_into(
        &self,
        shard: ShardId,
        from: Timestamp,
        settled: Instant,
        wanted: &Mutex<Wanted>,
    ) -> Result<Vec<ChildShard>, SourceError> {
        let place = Place::Time(from);
        let mut reader = ShardReader::new(self.stream.clone(), shard.clone(), place);
        loop {
            let began = Instant::now();
            let read = read_surely(&mut reader).await?;
            {
                let mut wanted = wanted.lock().unwrap_or_else(|poison| poison.into_inner());
                read.records.iter().for_each(|record| wanted.see(&shard, record));
                if wanted.is_complete() {
                    return Ok(Vec::new());
                }
            }
            if let Some(children) = read.end {
                return Ok(children);
            }
            if read.reached_tip() && began >= settled {
                return Ok(Vec::new());
            }
        }
    }
}

/// Whether Kinesis may have a record although it did not say so.
fn may_be_put(error: &AwsError) -> bool {
    matches!(error.kind(), AwsErrorKind::Unreachable | AwsErrorKind::Server)
}

/// Letters that are looked for.
struct Wanted {
    by_record: HashMap<(String, Bytes), Vec<LetterId>>,
    /// The records that the letters come from. They may be in the same stream and have the same bytes.
    originals: HashSet<(String, String)>,
    left: usize,
    found: HashSet<LetterId>,
}

impl Wanted {
    fn new(stream: &str, letters: &[&Letter]) -> Self {
        let mut by_record: HashMap<_, Vec<LetterId>> = HashMap::new();
        for letter in letters.iter().rev() {
            let record = (letter.record.partition_key.clone(), letter.record.data.clone());
            by_record.entry(record).or_default().push(letter.id);
        }
        let here = letters.iter().map(|letter| &letter.place).filter(|at| at.stream == stream);
        let originals = here.map(|at| (at.shard.clone(), at.sequence_number.to_string()));
        Self {
            by_record,
            originals: originals.collect(),
            left: letters.len(),
            found: HashSet::new(),
        }
    }

    /// A record is the put of one letter, the first of those that look the same.
    fn see(&mut self, shard: &ShardId, record: &Record) {
        let place = (shard.as_str().to_owned(), record.sequence_number.to_string());
        if self.originals.contains(&place) {
            return;
        }
        let record = (record.partition_key.clone(), record.data.clone());
        if let Some(id) = self.by_record.get_mut(&record).and_then(Vec::pop) {
            self.found.insert(id);
            self.left -= 1;
        }
    }

    fn is_complete(&self) -> bool {
        self.left == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        handler::{Kind, RecordPlace, dead_letter_tests::letter},
        shard::SequenceNumber,
    };

    fn wanted_letter(sequence_number: u64, data: &'static str) -> Letter {
        let letter = letter(sequence_number, "k", data);
        Letter {
            id: letter.id(),
            kind: Kind::HandlerFailed,
            place: RecordPlace {
                stream: "s".into(),
                shard: "shardId-0".into(),
                sequence_number: number(sequence_number),
                user_record: None,
                sub_sequence_number: Some(0),
                partition_key: "k".into(),
                arrived_at: None,
            },
            record: Outgoing { partition_key: "k".into(), data: data.into() },
            event_id: None,
        }
    }

    fn number(n: u64) -> SequenceNumber {
        SequenceNumber::parse(n.to_string()).expect("a number")
    }

    #[test]
    fn a_put_is_known_by_its_key_and_bytes_and_the_original_is_not_taken_for_it() {
        let letters = [wanted_letter(1, "a"), wanted_letter(2, "same"), wanted_letter(3, "same")];
        let letters: Vec<&Letter> = letters.iter().collect();
        let mut wanted = Wanted::new("s", &letters);
        let mut see = |shard: &str, n, key: &str, data: &'static str| {
            let record = Record {
                sequence_number: number(n),
                partition_key: key.into(),
                arrived_at: None,
                data: data.into(),
            };
            wanted.see(&shard.into(), &record);
            let mut found: Vec<usize> =
                (0..3).filter(|n| wanted.found.contains(&letters[*n].id)).collect();
            found.sort_unstable();
            (found, wanted.is_complete())
        };
        assert_eq!(see("shardId-0", 1, "k", "a"), (vec![], false), "the original");
        assert_eq!(see("shardId-0", 9, "other", "a"), (vec![], false));
        assert_eq!(see("shardId-0", 9, "k", "b"), (vec![], false));
        assert_eq!(see("shardId-1", 1, "k", "a"), (vec![0], false), "another shard");
        assert_eq!(see("shardId-0", 10, "k", "same"), (vec![0, 1], false), "one put, one letter");
        assert_eq!(see("shardId-0", 11, "k", "same"), (vec![0, 1, 2], true));
        assert_eq!(see("shardId-0", 12, "k", "same"), (vec![0, 1, 2], true));
    }
}
