//! Messages that OCS sent and that did not arrive.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use jiff::Timestamp;
use serde::Deserialize;

use super::stats::SourceStats;
use crate::ocs::{self, SequenceMonitor, SequenceStep};

/// Of how many sources the numbers are known.
const SOURCES: usize = 1024;
/// How often it is told of one source that messages are missing.
const TELL_INTERVAL: Duration = Duration::from_secs(60);

/// Who counts OCS sequence numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SequencePer {
    /// A host, over all of its connections, one after the other too.
    #[default]
    Host,
    /// A connection: for senders behind a proxy, which all have its address.
    Connection,
}

/// Watches the numbers of each source.
#[derive(Debug)]
pub(super) struct Sequences(Mutex<Watched>);

#[derive(Debug)]
struct Watched {
    monitor: SequenceMonitor,
    sources: BTreeMap<String, Source>,
}

#[derive(Debug)]
struct Source {
    stats: SourceStats,
    /// From when on what is missing is told again, and what was not told meanwhile.
    tell_at: Timestamp,
    untold: u64,
}

impl Sequences {
    pub(super) fn new() -> Self {
        let (monitor, sources) = (SequenceMonitor::new(SOURCES), BTreeMap::new());
        Self(Mutex::new(Watched { monitor, sources }))
    }

    /// Takes messages of a source, in the order in which they came.
    /// Gives how many are missing among them.
    pub(super) fn observe(&self, source: &str, messages: &[Vec<u8>], now: Timestamp) -> u64 {
        let mut missing = 0;
        let mut watched = self.lock();
        let Watched { monitor, sources } = &mut *watched;
        for number in messages.iter().filter_map(|raw| ocs::counter(raw)) {
            let step = monitor.observe(source, number, now);
            let known = match sources.get_mut(source) {
                Some(known) => known,
                None => {
                    make_room(sources);
                    sources.entry(source.to_owned()).or_insert_with(|| Source::new(source, now))
                }
            };
            known.step(step, number, now);
            if let SequenceStep::Gap { missing: more, .. } = step {
                missing += more;
            }
        }
        missing
    }

    pub(super) fn stats(&self) -> Vec<SourceStats> {
        self.lock().sources.values().map(|source| source.stats.clone()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Watched> {
        self.0.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

/// Forgets the source that was quiet for longest.
fn make_room(sources: &mut BTreeMap<String, Source>) {
    if sources.len() >= SOURCES {
        let quiet = sources.iter().min_by_key(|(_, source)| source.stats.heard_at);
        if let Some(quiet) = quiet.map(|(name, _)| name.clone()) {
            sources.remove(&quiet);
        }
    }
}

impl Source {
    fn new(source: &str, now: Timestamp) -> Self {
        let stats = SourceStats {
            source: source.to_owned(),
            messages: 0,
            gaps: 0,
            missing: 0,
            repeats: 0,
            backwards: 0,
            resets: 0,
            last: 0,
            heard_at: now,
        };
        Self { stats, tell_at: now, untold: 0 }
    }

    fn step(&mut self, step: SequenceStep, number: u64, now: Timestamp) {
        let stats = &mut self.stats;
        stats.messages += 1;
        let last = std::mem::replace(&mut stats.last, number);
        stats.heard_at = now;
        match step {
            SequenceStep::First | SequenceStep::Next => {}
            SequenceStep::Repeat => stats.repeats += 1,
            SequenceStep::Reset { .. } => {
                stats.resets += 1;
                tracing::info!(source = stats.source, last, number, "the OCS numbers start again");
            }
            SequenceStep::Gap { missing, .. } => {
                stats.gaps += 1;
                stats.missing += missing;
                self.untold += missing;
            }
            SequenceStep::Backwards { .. } => {
                stats.backwards += 1;
                self.untold += 1;
            }
        }
        if self.untold > 0 && now >= self.tell_at {
            self.tell_at = now.saturating_add(TELL_INTERVAL).unwrap_or(now);
            let untold = std::mem::take(&mut self.untold);
            tracing::warn!(
                source = self.stats.source,
                last,
                number,
                gaps = self.stats.gaps,
                missing = self.stats.missing,
                "the OCS numbers do not follow each other: {untold} messages are missing or out of \
                 place. They were lost before they came here; if this source is a proxy with several \
                 senders behind it, have numbers counted per connection"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_counted_for_each_source() {
        let at = |text: &str| text.parse::<Timestamp>().expect("a time");
        let noon = at("2025-07-02T12:00:00-04:00");
        let sequences = Sequences::new();
        let see = |source: &str, numbers: &[u64], now| {
            let lines: Vec<Vec<u8>> =
                numbers.iter().map(|n| format!("{n},DIAG,12:00:00,x").into_bytes()).collect();
            sequences.observe(source, &lines, now);
        };
        see("a", &[5, 6, 9, 9, 10], noon);
        see("b", &[5, 6], noon);
        sequences.observe("b", &[b"garbage".to_vec()], noon);
        see("a", &[3, 4], noon);
        see("a", &[1], at("2025-07-03T12:00:00-04:00"));
        let stats = sequences.stats();
        let (a, b) = (&stats[0], &stats[1]);
        assert_eq!((a.messages, a.gaps, a.missing, a.repeats), (8, 1, 2, 1));
        assert_eq!((a.backwards, a.resets, a.last), (1, 1, 1));
        assert_eq!((b.messages, b.gaps, b.missing), (2, 0, 0));
    }

    #[test]
    fn as_many_sources_are_known_as_there_is_room_for() {
        let sequences = Sequences::new();
        for n in 0..2 * SOURCES as i64 {
            let now = Timestamp::from_second(n).expect("a time");
            sequences.observe(&format!("{n}"), &[b"1,DIAG,x".to_vec()], now);
        }
        let stats = sequences.stats();
        assert_eq!(stats.len(), SOURCES);
        assert!(stats.iter().any(|source| source.source == format!("{}", 2 * SOURCES - 1)));
    }
}
