//! The last 15 minutes of each shard, for a small plot.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use serde::Serialize;

use crate::worker::WorkerStatus;

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

/// The samples of every shard that is read.
#[derive(Debug, Default)]
pub(super) struct History {
    shards: BTreeMap<String, Series>,
}

#[derive(Debug, Default)]
struct Series {
    samples: VecDeque<Sample>,
    /// The count at the last sample. It starts again when the shard is taken again.
    messages: u64,
}

impl History {
    /// Takes a sample of each shard, and forgets those that are not read any more.
    pub(super) fn sample(&mut self, status: &WorkerStatus) {
        let mut known = std::mem::take(&mut self.shards);
        for shard in &status.shards {
            let name = shard.shard.to_string();
            let mut series = known.remove(&name).unwrap_or_default();
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
            self.shards.insert(name, series);
        }
    }

    /// The samples of a shard, the oldest first.
    pub(super) fn of(&self, shard: &str) -> Vec<Sample> {
        let series = self.shards.get(shard);
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
        let mut status = status_of(1);
        let name = status.shards[0].shard.to_string();
        for n in 1..=200 {
            status.shards[0].counts.messages = n * 5;
            history.sample(&status);
        }
        let samples = history.of(&name);
        assert_eq!(samples.len(), SAMPLES);
        assert_eq!(Duration::from_secs(900), INTERVAL * 90);
        assert!(samples.iter().all(|sample| sample.messages == 5));
        // Taken again: it counts from zero.
        status.shards[0].counts.messages = 3;
        history.sample(&status);
        assert_eq!(history.of(&name).last().map(|sample| sample.messages), Some(3));
        status.shards.clear();
        history.sample(&status);
        assert_eq!(history.of(&name), []);
    }
}
