//! Waiting longer after each failure.
//!
//! The only place that names the `backoff` crate, which is unmaintained (RUSTSEC-2025-0012), so that
//! it can be replaced here and nowhere else.

use std::time::Duration;

use backoff::{ExponentialBackoff, backoff::Backoff as _};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

/// Doubling waits with full jitter: each wait is drawn evenly from zero to a ceiling, and the ceiling
/// doubles up to a limit. Full jitter spreads callers that failed together (AWS Architecture Blog,
/// "Exponential Backoff and Jitter").
pub(crate) struct Backoff {
    ceilings: ExponentialBackoff,
    rng: ChaCha8Rng,
}

impl Backoff {
    /// `first` is the ceiling of the first wait, `limit` that of the last.
    pub(crate) fn new(first: Duration, limit: Duration) -> Self {
        Self::seeded(first, limit, rand::random())
    }

    /// The same with draws that `seed` determines.
    pub(crate) fn seeded(first: Duration, limit: Duration, seed: u64) -> Self {
        let mut ceilings = ExponentialBackoff {
            current_interval: first,
            initial_interval: first,
            randomization_factor: 0.0,
            multiplier: 2.0,
            max_interval: limit,
            max_elapsed_time: None,
            ..ExponentialBackoff::default()
        };
        ceilings.reset();
        Self { ceilings, rng: ChaCha8Rng::seed_from_u64(seed) }
    }

    /// How long to wait before the next attempt.
    pub(crate) fn next_wait(&mut self) -> Duration {
        let ceiling = self.ceilings.next_backoff().unwrap_or(self.ceilings.max_interval);
        self.rng.random_range(Duration::ZERO..=ceiling)
    }

    /// Starts over after a success.
    pub(crate) fn reset(&mut self) {
        self.ceilings.reset();
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
    fn waits_are_jittered_and_a_seed_determines_them() {
        let waits = |seed| {
            let mut backoff =
                Backoff::seeded(Duration::from_secs(10), Duration::from_secs(10), seed);
            (0..5).map(|_| backoff.next_wait()).collect::<Vec<_>>()
        };
        assert_eq!(waits(1), waits(1));
        assert_ne!(waits(1), waits(2));
        assert!(waits(1).iter().any(|wait| *wait != waits(1)[0]));
    }
}
