//! How far a place in a shard is behind the shard's tip, asked by one who does not read the shard.

use std::time::Duration;

use aws_sdk_kinesis::operation::get_records::GetRecordsOutput;
use jiff::Timestamp;

use super::{Place, SourceError, Stream, polling};
use crate::{
    aws::{self, AwsError},
    shard::{SequenceNumber, ShardId},
};

/// What the stream tells about a place in a shard.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Lag {
    /// When the last finished record arrived.
    pub finished_arrived_at: Option<Timestamp>,
    /// How long reading from there is behind; `None` if the server does not tell.
    pub behind: Option<Duration>,
    /// How many records come after it. Kinesis tells no number, but whether there is one: this is zero or
    /// not known.
    pub records: Option<u64>,
}

/// What one read of at most one record gave.
#[derive(Debug, Clone, Default)]
struct Probe {
    number: Option<SequenceNumber>,
    arrived_at: Option<Timestamp>,
    behind: Option<Duration>,
}

impl Stream {
    /// Asks how far `place` is behind, by one GetShardIterator and one or two GetRecords of one record
    /// each, which count towards the five reads a second that a shard allows.
    pub(crate) async fn lag(
        &self,
        shard: &ShardId,
        place: &Place,
        now: Timestamp,
    ) -> Result<Lag, SourceError> {
        let failed = |error| self.shard_failed(shard, place, error);
        let iterator = polling::iterate(self, shard, place).await.map_err(failed)?;
        let Some(token) = iterator.token else { return Ok(Lag::default()) };
        let (first, next) = self.probe(token).await.map_err(failed)?;
        let second = match next {
            Some(token) if needs_second(place, &first) => {
                Some(self.probe(token).await.map_err(failed)?.0)
            }
            _ => None,
        };
        Ok(judge(place, &first, second.as_ref(), now))
    }

    /// Checks that the shard can be read from `place`.
    #[cfg(feature = "cli")]
    pub(crate) async fn check_place(
        &self,
        shard: &ShardId,
        place: &Place,
    ) -> Result<(), SourceError> {
        let opened = polling::iterate(self, shard, place).await;
        opened.map(|_| ()).map_err(|error| self.shard_failed(shard, place, error))
    }

    async fn probe(&self, token: String) -> Result<(Probe, Option<String>), AwsError> {
        let answer = self.client().get_records().shard_iterator(token).limit(1).send().await;
        let answer = answer.map_err(|error| self.failure("kinesis:GetRecords", error))?;
        Ok((probe(&answer), answer.next_shard_iterator))
    }

    fn shard_failed(&self, shard: &ShardId, place: &Place, source: AwsError) -> SourceError {
        SourceError::Shard {
            stream: self.name().to_owned(),
            shard: shard.clone(),
            place: place.to_string(),
            source,
        }
    }
}

fn probe(answer: &GetRecordsOutput) -> Probe {
    let record = answer.records.first();
    let arrived_at = record.and_then(|record| record.approximate_arrival_timestamp.as_ref());
    Probe {
        number: record.and_then(|record| SequenceNumber::parse(record.sequence_number.as_str())),
        arrived_at: arrived_at.and_then(aws::time_from_sdk),
        behind: answer
            .millis_behind_latest
            .and_then(|millis| u64::try_from(millis).ok())
            .map(Duration::from_millis),
    }
}

fn is_finished(place: &Place, probe: &Probe) -> bool {
    matches!((place, &probe.number), (Place::At(finished), Some(number)) if finished == number)
}

/// Test servers say "not behind" always: only the next record, or none, tells.
fn needs_second(place: &Place, first: &Probe) -> bool {
    is_finished(place, first) && first.behind.is_none_or(|behind| behind.is_zero())
}

fn judge(place: &Place, first: &Probe, second: Option<&Probe>, now: Timestamp) -> Lag {
    let finished = is_finished(place, first);
    let unread = if finished { second } else { Some(first) };
    let told = first.behind.filter(|behind| !behind.is_zero());
    let waited = unread.filter(|probe| probe.number.is_some()).map(|probe| {
        let waited = probe.arrived_at.map(|at| now.duration_since(at));
        waited.and_then(|waited| Duration::try_from(waited).ok()).unwrap_or_default()
    });
    Lag {
        finished_arrived_at: first.arrived_at.filter(|_| finished),
        behind: told.max(waited).or(second.and_then(|probe| probe.behind)).or(first.behind),
        records: unread.is_some_and(|probe| probe.number.is_none() && told.is_none()).then_some(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn number(text: &str) -> SequenceNumber {
        SequenceNumber::parse(text).expect("a number")
    }

    fn now() -> Timestamp {
        Timestamp::from_second(1000).expect("a time")
    }

    fn record(text: &str, age_secs: i64, behind: Option<Duration>) -> Probe {
        let arrived_at = Timestamp::from_second(1000 - age_secs).ok();
        Probe { number: Some(number(text)), arrived_at, behind }
    }

    fn nothing(behind: Option<Duration>) -> Probe {
        Probe { behind, ..Probe::default() }
    }

    #[test]
    fn the_finished_record_tells_its_age_and_kinesis_what_comes_after_it() {
        let place = Place::At(number("7"));
        let first = record("7", 60, Some(30 * SECOND));
        assert!(!needs_second(&place, &first));
        let lag = judge(&place, &first, None, now());
        assert_eq!(lag.finished_arrived_at, first.arrived_at);
        assert_eq!(lag.behind, Some(30 * SECOND));
    }

    #[test]
    fn where_the_server_says_not_behind_the_next_record_decides() {
        let place = Place::At(number("7"));
        let zero = Some(Duration::ZERO);
        let first = record("7", 60, zero);
        assert!(needs_second(&place, &first));
        let behind = |second: &Probe| judge(&place, &first, Some(second), now()).behind;
        assert_eq!(judge(&place, &first, Some(&nothing(zero)), now()).records, Some(0));
        assert_eq!(judge(&place, &first, Some(&record("8", 20, zero)), now()).records, None);
        assert_eq!(behind(&nothing(zero)), zero);
        assert_eq!(behind(&record("8", 20, zero)), Some(20 * SECOND));
        assert_eq!(behind(&record("8", -2, zero)), zero, "its clock is ahead of ours");
    }

    #[test]
    fn without_a_finished_record_the_first_one_to_read_tells() {
        let behind = |first: &Probe| judge(&Place::TrimHorizon, first, None, now()).behind;
        assert_eq!(behind(&record("1", 90, Some(Duration::ZERO))), Some(90 * SECOND));
        assert_eq!(behind(&nothing(Some(40 * SECOND))), Some(40 * SECOND));
        assert_eq!(behind(&nothing(None)), None);
        // The finished record has expired: the oldest one that is kept comes instead.
        let lag = judge(&Place::At(number("7")), &record("9", 90, None), None, now());
        assert_eq!((lag.finished_arrived_at, lag.behind), (None, Some(90 * SECOND)));
    }
}
