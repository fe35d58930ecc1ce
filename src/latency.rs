//! How long something takes, as quantiles of the last minutes and as totals.

use std::time::Duration;

use hdrhistogram::Histogram;
use tokio::time::Instant;

/// Quantiles are those of this and the one before.
const WINDOW: Duration = Duration::from_secs(300);
/// Beyond this it is all the same.
const LONGEST_MICROS: u64 = 3_600_000_000;

/// What was noted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LatencySummary {
    /// How often, since the beginning.
    pub count: u64,
    /// How long in all, since the beginning.
    pub total: Duration,
    /// Half of the last 5 to 10 minutes' took no longer.
    pub p50: Duration,
    /// Nine of ten.
    pub p90: Duration,
    /// 99 of a hundred.
    pub p99: Duration,
    /// The longest of the last 5 to 10 minutes.
    pub max: Duration,
}

/// Takes note of durations. A few kilobytes, however many they are.
#[derive(Debug)]
pub(crate) struct Latency {
    count: u64,
    total: Duration,
    /// Of this window and of the one before.
    recent: [Histogram<u64>; 2],
    window_began: Instant,
}

impl Latency {
    pub(crate) fn new(now: Instant) -> Self {
        // Two digits: a hundredth is exact enough, and eight times smaller than three.
        let histogram = || {
            Histogram::new_with_bounds(1, LONGEST_MICROS, 2)
                .expect("one to an hour, in two digits, is a valid range")
        };
        Self {
            count: 0,
            total: Duration::ZERO,
            recent: [histogram(), histogram()],
            window_began: now,
        }
    }

    pub(crate) fn note(&mut self, took: Duration, now: Instant) {
        self.forget_old(now);
        self.count += 1;
        self.total = self.total.saturating_add(took);
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.recent[0].saturating_record(micros.max(1));
    }

    pub(crate) fn summary(&mut self, now: Instant) -> LatencySummary {
        self.forget_old(now);
        let mut recent = self.recent[0].clone();
        // Both have the same range, so that all of one fits into the other.
        let _ = recent.add(&self.recent[1]);
        let at = |quantile| Duration::from_micros(recent.value_at_quantile(quantile));
        LatencySummary {
            count: self.count,
            total: self.total,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            max: Duration::from_micros(recent.max()),
        }
    }

    fn forget_old(&mut self, now: Instant) {
        let age = now.saturating_duration_since(self.window_began);
        if age < WINDOW {
            return;
        }
        self.recent.swap(0, 1);
        self.recent[0].reset();
        if age >= 2 * WINDOW {
            self.recent[1].reset();
        }
        self.window_began = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLI: Duration = Duration::from_millis(1);

    fn is_about(measured: Duration, expected: Duration) -> bool {
        measured.abs_diff(expected) <= expected / 100
    }

    #[test]
    fn quantiles_are_those_of_what_was_noted() {
        let now = Instant::now();
        let mut latency = Latency::new(now);
        for millis in 1..=100 {
            latency.note(millis * MILLI, now);
        }
        let summary = latency.summary(now);
        assert_eq!((summary.count, summary.total), (100, 5050 * MILLI));
        assert!(is_about(summary.p50, 50 * MILLI), "{summary:?}");
        assert!(is_about(summary.p90, 90 * MILLI), "{summary:?}");
        assert!(is_about(summary.p99, 99 * MILLI), "{summary:?}");
        assert!(is_about(summary.max, 100 * MILLI), "{summary:?}");
    }

    #[test]
    fn what_is_long_ago_counts_only_in_the_totals() {
        let began = Instant::now();
        let mut latency = Latency::new(began);
        latency.note(Duration::from_secs(9), began);
        latency.note(MILLI, began + WINDOW);
        assert!(latency.summary(began + WINDOW).max > Duration::from_secs(8));
        let later = latency.summary(began + 2 * WINDOW);
        assert!(is_about(later.max, MILLI), "{later:?}");
        assert_eq!(later.count, 2);
        assert_eq!(latency.summary(began + 9 * WINDOW).max, Duration::ZERO);
    }

    #[test]
    fn nothing_noted_is_zero_and_an_age_is_an_hour() {
        let now = Instant::now();
        let mut latency = Latency::new(now);
        assert_eq!(latency.summary(now), LatencySummary::default());
        latency.note(Duration::MAX, now);
        assert!(is_about(latency.summary(now).max, Duration::from_secs(3600)));
    }
}
