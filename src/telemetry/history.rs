//! The last 15 minutes of each shard, for a small plot.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use serde::Serialize;

use super::WorkerLook;
use crate::shard::ShardId;

/// How often a sample is taken.
pub(super) const INTERVAL: Duration = Duration::from_secs(10);
/// 15 minutes.
const SAMPLES: usize = 90;

/// A shard at one time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Sample {
    /// How far it was behind, if that was known.
    pub lag_ms: Option<u64>,
    /// Messages that were finished since the sample before.
    pub messages: u64,
}

/// The samples of every shard that is read, for each application.
#[derive(Debug, Default)]
pub(super) struct History {
    shards: BTreeMap<(String, ShardId), Series>,
}

#[derive(Debug, Default)]
struct Series {
    samples: VecDeque<Sample>,
    /// The count at the last sample. It starts again when the shard is taken again.
    messages: u64,
}

impl History {
    /// Takes a sample of each shard, and forgets those that are not read any more.
    pub(super) fn sample(&mut self, workers: &[WorkerLook]) {
        let mut known = std::mem::take(&mut self.shards);
        let read =
            workers.iter().filter_map(|look| Some((&look.application, look.status.as_ref()?)));
        let read = read.flat_map(|(application, status)| {
            status.shards.iter().map(move |shard| (application, shard))
        });
        for (application, shard) in read {
            let key = (application.clone(), shard.shard.clone());
            let mut series = known.remove(&key).unwrap_or_default();
            let messages = shard.counts.messages;
            let before = if messages < series.messages { 0 } else { series.messages };
            series.messages = messages;
            if series.samples.len() == SAMPLES {
                series.samples.pop_front();
            }
            series.samples.push_back(Sample {
                lag_ms: shard.behind.map(super::page::millis),
                messages: messages - before,
            });
            self.shards.insert(key, series);
        }
    }

    /// The samples of a shard, the oldest first.
    pub(super) fn of(&self, application: &str, shard: &ShardId) -> Vec<Sample> {
        let series = self.shards.get(&(application.to_owned(), shard.clone()));
        series.map(|series| series.samples.iter().copied().collect()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::status_of;

    #[test]
    fn samples_are_what_came_in_between_and_cover_fifteen_minutes() {
        let mut history = History::default();
        let look = |application: &str| WorkerLook {
            application: application.to_owned(),
            status: Some(status_of(1)),
        };
        // Both read the same shard.
        let mut looks = [look("rtr-green"), look("rtr-blue")];
        let shard = status_of(1).shards[0].shard.clone();
        let set = |look: &mut WorkerLook, messages| {
            look.status.as_mut().expect("it runs").shards[0].counts.messages = messages;
        };
        for n in 1..=200 {
            set(&mut looks[0], n * 5);
            set(&mut looks[1], n);
            history.sample(&looks);
        }
        let samples = history.of("rtr-green", &shard);
        assert_eq!(samples.len(), SAMPLES);
        assert_eq!(Duration::from_secs(900), INTERVAL * 90);
        assert!(samples.iter().all(|sample| sample.messages == 5));
        // Taken again: it counts from zero.
        set(&mut looks[0], 3);
        history.sample(&looks);
        let last = |history: &History, application| {
            history.of(application, &shard).last().map(|sample| sample.messages)
        };
        assert_eq!(last(&history, "rtr-green"), Some(3));
        assert_eq!(history.of("rtr-blue", &shard)[0].messages, 1);
        history.sample(&looks[1..]);
        assert_eq!(last(&history, "rtr-green"), None);
        assert_eq!(last(&history, "rtr-blue"), Some(0));
    }
}
