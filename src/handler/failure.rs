//! What happens when a message cannot be handled.

use std::{collections::VecDeque, fmt, time::Duration};

use tokio::time::Instant;

/// What is done with a message that the handler has not finished after all attempts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnFailure {
    /// Reading of its shard stops; the checkpoint stays before the message. Other shards go on; the
    /// worker ends with the error when none is left, or when it is stopped.
    #[default]
    Stop,
    /// It goes to the dead letters, and the shard goes on when it is stored there.
    DeadLetter,
    /// It is logged and counted, and the shard goes on.
    Skip,
}

/// What is offered again when a batch fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RetryPer {
    /// The batch. If it fails for good, its messages are offered one by one, so that the policy applies
    /// to those that fail and to no other.
    #[default]
    Message,
    /// The batch, and the policy applies to all of it.
    Batch,
}

/// How often a batch, and then each message of it, is offered to the handler.
///
/// ```
/// use std::time::Duration;
///
/// use tramline::Retries;
///
/// // A database that may be away for an hour, and whose answer may take five minutes.
/// let patient = Retries {
///     attempts: u32::MAX,
///     give_up_after: Some(Duration::from_secs(3600)),
///     time_limit: Some(Duration::from_secs(300)),
///     ..Retries::default()
/// };
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retries {
    /// Attempts in all, at least one. Default: 5.
    pub attempts: u32,
    /// The ceiling of the first wait; it doubles, and each wait is drawn evenly from zero to it (full
    /// jitter). Default: 100 ms.
    pub first_wait: Duration,
    /// The highest ceiling. Default: 10 s.
    pub longest_wait: Duration,
    /// No attempt begins later than this after the first one. Default: no limit.
    pub give_up_after: Option<Duration>,
    /// How long one attempt may take; then it is dropped at its `await` and has failed. `None` for a
    /// handler that may wait for ever, such as for a reader that does not read. Default: 60 s.
    pub time_limit: Option<Duration>,
    /// What is offered again. Default: the batch, and then its messages.
    pub per: RetryPer,
}

impl Default for Retries {
    fn default() -> Self {
        Self {
            attempts: 5,
            first_wait: Duration::from_millis(100),
            longest_wait: Duration::from_secs(10),
            give_up_after: None,
            time_limit: Some(Duration::from_secs(60)),
            per: RetryPer::default(),
        }
    }
}

impl Retries {
    /// Whether another attempt may begin after `attempts` of them, the first of which began at `since`.
    pub(crate) fn allow(&self, attempts: u32, since: Instant, now: Instant) -> bool {
        attempts < self.attempts.max(1)
            && self.give_up_after.is_none_or(|limit| now.saturating_duration_since(since) < limit)
    }
}

/// How many messages may fail before a shard stops although failures go to the dead letters or are
/// skipped: what fails so often is not bad input but a broken handler.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerance {
    /// The most messages of a hundred that may fail: 0.5 is one of two hundred.
    pub percent: f64,
    /// Within this time, which moves on with the clock.
    pub window: Duration,
}

/// The share of messages of one shard that failed lately. Pure.
#[derive(Debug)]
pub(crate) struct FailureRate {
    tolerance: Option<Tolerance>,
    /// Counts by slices of the window, the newest last: when each began, messages, failed ones.
    slices: VecDeque<(Instant, u64, u64)>,
}

/// Into how many slices a window is cut: it moves on by one at a time.
const SLICES: u32 = 20;

impl FailureRate {
    pub(crate) fn new(tolerance: Option<Tolerance>) -> Self {
        Self { tolerance, slices: VecDeque::new() }
    }

    /// Takes note of messages, some of which failed. Tells whether that is too many now.
    pub(crate) fn note(&mut self, messages: u64, failed: u64, now: Instant) -> bool {
        let Some(Tolerance { percent, window }) = self.tolerance else { return false };
        while self.slices.front().is_some_and(|(at, ..)| now.duration_since(*at) > window) {
            self.slices.pop_front();
        }
        match self.slices.back_mut() {
            Some((at, all, bad)) if now.duration_since(*at) < window / SLICES => {
                *all += messages;
                *bad += failed;
            }
            _ => self.slices.push_back((now, messages, failed)),
        }
        let (all, bad) =
            self.slices.iter().fold((0, 0), |(all, bad), (_, a, b)| (all + a, bad + b));
        failed > 0 && bad as f64 > all as f64 * percent / 100.0
    }
}

/// Why a handler has not finished what it was offered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub attempts: u32,
    pub cause: FailureCause,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum FailureCause {
    /// What it said.
    Error(String),
    /// The panic's text.
    Panic(String),
    TimeLimit(Duration),
}

impl fmt::Display for FailureCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Error(said) => f.write_str(said),
            Self::Panic(said) => write!(f, "it panicked: {said}"),
            Self::TimeLimit(limit) => write!(f, "it was not done within {limit:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_end_by_number_or_by_time() {
        let now = Instant::now();
        let retries = Retries { attempts: 3, ..Retries::default() };
        assert!(retries.allow(2, now, now + Duration::from_secs(3600)));
        assert!(!retries.allow(3, now, now));
        let limit = Duration::from_secs(10);
        let retries = Retries { give_up_after: Some(limit), ..retries };
        assert!(retries.allow(1, now, now + Duration::from_secs(9)));
        assert!(!retries.allow(1, now, now + limit));
    }

    #[test]
    fn more_failures_than_are_tolerated_within_the_window_are_noticed() {
        let window = Duration::from_secs(100);
        let mut rate = FailureRate::new(Some(Tolerance { percent: 10.0, window }));
        let start = Instant::now();
        assert!(!rate.note(100, 10, start), "exactly what is tolerated");
        assert!(rate.note(1, 1, start));
        assert!(!rate.note(100, 1, start + window / 2));
        // The first slice has left the window.
        let later = start + window + Duration::from_secs(1);
        assert!(!rate.note(0, 0, later));
        assert!(!rate.note(10, 9, later), "10 of 110");
        assert!(rate.note(10, 9, later), "19 of 120");
        assert!(!FailureRate::new(None).note(1, 1, start));
    }

    #[test]
    fn the_window_has_few_slices_however_often_it_is_noted() {
        let window = Duration::from_secs(100);
        let mut rate = FailureRate::new(Some(Tolerance { percent: 10.0, window }));
        let start = Instant::now();
        for n in 0..10_000 {
            rate.note(1, 0, start + Duration::from_millis(100 * n));
        }
        assert!(rate.slices.len() <= SLICES as usize + 1, "{}", rate.slices.len());
    }
}
