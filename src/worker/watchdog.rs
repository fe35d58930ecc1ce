//! Notices a shard that is leased and does not get on.
//!
//! Pure: what a shard's task does is noted by the task, with the time; when that is too long ago is
//! decided here.

use std::{
    fmt,
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use tokio::time::Instant;

/// How long a task that is to end may take to its next `await`.
const ABORT_LIMIT: Duration = Duration::from_secs(10);

/// What is done about a shard that does not get on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnStuck {
    /// Its task is dropped and started again, with a new handler, from the last checkpoint.
    #[default]
    Restart,
    /// The same, but by another worker if there is one: the lease is released.
    Release,
    /// It is told, counted and shown in the status, and nothing else.
    Report,
}

/// What a shard's task is doing: what it waits for if it does not get on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// The lease was taken from a reader that did not let go of it.
    WaitsForOldReader,
    Opens,
    Reads,
    WritesDeadLetter,
    Handles,
    Acks,
    Checkpoints,
    Ends,
    Stops,
    /// It stopped because of a failure, which is told by itself.
    Parked,
}

impl Step {
    /// Whether it has a limit of its own.
    pub(super) fn is_bounded(self) -> bool {
        matches!(self, Self::WaitsForOldReader | Self::Stops | Self::Parked)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::WaitsForOldReader => "the end of the old reader's time",
            Self::Opens => "the shard to be opened",
            Self::Reads => "a read to return",
            Self::WritesDeadLetter => "a dead letter to be stored",
            Self::Handles => "the handler to finish a batch",
            Self::Acks => "acknowledgements of what the handler has taken",
            Self::Checkpoints => "a checkpoint to be stored",
            Self::Ends => "the leases of the child shards and the end to be stored",
            Self::Stops => "the handler and the last checkpoint",
            Self::Parked => "the cause of its failure to be repaired",
        })
    }
}

/// What a task is doing, since when, and how often it got on before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Doing {
    pub step: Step,
    pub since: Instant,
    /// Reads that returned and batches that were finished.
    pub progress: u64,
}

/// What a task is doing, for those who watch it.
#[derive(Debug)]
pub(super) struct Activity(Mutex<Doing>);

impl Activity {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Doing { step: Step::Opens, since: Instant::now(), progress: 0 }))
    }

    /// Notes that a step begins.
    pub(super) fn enter(&self, step: Step) {
        let mut doing = self.lock();
        (doing.step, doing.since) = (step, Instant::now());
    }

    /// Notes that a read returned or a batch was finished.
    pub(super) fn got_on(&self) {
        self.lock().progress += 1;
    }

    pub(super) fn now(&self) -> Doing {
        *self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, Doing> {
        self.0.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

/// What was seen of one task before.
#[derive(Debug, Default)]
pub(super) struct Watched {
    /// As it was when it was told to be stuck.
    told: Option<Doing>,
    aborted_at: Option<Instant>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Finding {
    GetsOn,
    /// It is stuck, which is told for the first time.
    Stuck,
    /// It was to be dropped, and does not come to an `await`: it cannot be.
    CannotBeDropped,
    /// It gets on again.
    Recovered,
}

impl Watched {
    /// Takes note that the task is to be dropped.
    pub(super) fn aborted(&mut self, now: Instant) {
        self.aborted_at = Some(now);
    }

    /// Takes note that the task runs again.
    pub(super) fn started(&mut self) {
        self.aborted_at = None;
    }

    /// Judges what the task is doing. A task that is not in `limit` with one step does not get on.
    pub(super) fn judge(&mut self, doing: Doing, limit: Duration, now: Instant) -> Finding {
        if let Some(aborted_at) = self.aborted_at {
            if now.saturating_duration_since(aborted_at) < ABORT_LIMIT {
                return Finding::GetsOn;
            }
            // Said once; the next is when it gets there after all.
            self.aborted_at = Some(now + Duration::from_secs(3600));
            return Finding::CannotBeDropped;
        }
        let told_of_this = self.told.is_some_and(|told| told.since == doing.since);
        if !doing.step.is_bounded()
            && now.saturating_duration_since(doing.since) > limit
            && !told_of_this
        {
            self.told = Some(doing);
            return Finding::Stuck;
        }
        if self.told.is_some_and(|told| doing.progress > told.progress) {
            self.told = None;
            return Finding::Recovered;
        }
        Finding::GetsOn
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(120);
    const MOMENT: Duration = Duration::from_millis(1);

    fn doing(step: Step, since: Instant, progress: u64) -> Doing {
        Doing { step, since, progress }
    }

    #[test]
    fn a_step_that_takes_longer_than_the_limit_is_told_once_and_its_end_too() {
        let start = Instant::now();
        let mut watched = Watched::default();
        let handles = doing(Step::Handles, start, 7);
        assert_eq!(watched.judge(handles, LIMIT, start + LIMIT), Finding::GetsOn);
        assert_eq!(watched.judge(handles, LIMIT, start + LIMIT + MOMENT), Finding::Stuck);
        assert_eq!(watched.judge(handles, LIMIT, start + 2 * LIMIT), Finding::GetsOn);
        let reads = doing(Step::Reads, start + 2 * LIMIT, 8);
        assert_eq!(watched.judge(reads, LIMIT, start + 2 * LIMIT), Finding::Recovered);
        assert_eq!(watched.judge(reads, LIMIT, start + 4 * LIMIT), Finding::Stuck);
    }

    #[test]
    fn a_shard_that_is_started_again_and_gets_stuck_again_is_told_again() {
        let start = Instant::now();
        let mut watched = Watched::default();
        let later = start + LIMIT + MOMENT;
        assert_eq!(watched.judge(doing(Step::Reads, start, 0), LIMIT, later), Finding::Stuck);
        watched.aborted(later);
        watched.started();
        let again = doing(Step::Reads, later, 0);
        assert_eq!(watched.judge(again, LIMIT, later), Finding::GetsOn, "not yet recovered");
        assert_eq!(watched.judge(again, LIMIT, later + LIMIT + MOMENT), Finding::Stuck);
    }

    #[test]
    fn a_task_that_does_not_come_to_an_await_cannot_be_dropped() {
        let start = Instant::now();
        let mut watched = Watched::default();
        let handles = doing(Step::Handles, start, 0);
        watched.aborted(start);
        assert_eq!(watched.judge(handles, LIMIT, start + ABORT_LIMIT - MOMENT), Finding::GetsOn);
        assert_eq!(watched.judge(handles, LIMIT, start + ABORT_LIMIT), Finding::CannotBeDropped);
        assert_eq!(watched.judge(handles, LIMIT, start + 2 * ABORT_LIMIT), Finding::GetsOn);
    }

    #[test]
    fn what_has_a_limit_of_its_own_is_not_stuck() {
        let start = Instant::now();
        for step in [Step::WaitsForOldReader, Step::Stops, Step::Parked] {
            let finding = Watched::default().judge(doing(step, start, 0), LIMIT, start + 9 * LIMIT);
            assert_eq!(finding, Finding::GetsOn);
        }
    }
}
