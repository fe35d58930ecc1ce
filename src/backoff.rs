//! Waiting longer after each failure.
//!
//! The only place that names the `backoff` crate, which is unmaintained (RUSTSEC-2025-0012), so that
//! it can be replaced here and nowhere else.

use std::time::Duration;

use backoff::{ExponentialBackoff, backoff::Backoff as _};

/// Doubling waits with full jitter: each wait is drawn evenly from zero to a ceiling, and the ceiling
/// doubles up to a limit. Full jitter spreads callers that failed together (AWS Architecture Blog,
/// "Exponential Backoff and Jitter").
pub(crate) struct Backoff(ExponentialBackoff);

impl Backoff {
    /// `first` is the ceiling of the first wait, `ceiling` that of the last.
    pub(crate) fn new(first: Duration, ceiling: Duration) -> Self {
        // The crate draws from interval ± factor × interval. Half the interval with a factor of one
        // is a draw from zero to the whole interval.
        let mut policy = ExponentialBackoff {
            current_interval: first / 2,
            initial_interval: first / 2,
            randomization_factor: 1.0,
            multiplier: 2.0,
            max_interval: ceiling / 2,
            max_elapsed_time: None,
            ..ExponentialBackoff::default()
        };
        policy.reset();
        Self(policy)
    }

    /// How long to wait before the next attempt.
    pub(crate) fn next_wait(&mut self) -> Duration {
        self.0.next_backoff().unwrap_or(self.0.max_interval)
    }

    /// Starts over after a success.
    pub(crate) fn reset(&mut self) {
        self.0.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_stay_under_a_doubling_ceiling_and_start_over_after_a_reset() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_millis(400));
        for ceiling in [100, 200, 400, 400, 400] {
            assert!(backoff.next_wait() <= Duration::from_millis(ceiling));
        }
        backoff.reset();
        assert!(backoff.next_wait() <= Duration::from_millis(100));
    }

    #[test]
    fn waits_are_jittered() {
        let mut backoff = Backoff::new(Duration::from_secs(10), Duration::from_secs(10));
        let first = backoff.next_wait();
        assert!((0..20).any(|_| backoff.next_wait() != first));
    }
}
