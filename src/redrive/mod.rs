//! Puts dead letters back into a stream: in order, and once each.
//!
//! ```text
//! file, bucket, stream → lines → Collector → in order, without repeats → batches → target stream
//!                                   ↑                                      ↓
//!                                   └──────────── journal ←────────────────┘
//! ```
//! The journal says before a batch that it is being put, and after it that Kinesis has it. A redrive that
//! was killed leaves at most one batch of which that is not known; the next one looks for it in the
//! target stream before it goes on.

mod bucket;
mod collect;
mod from;
mod journal;
mod target;

use std::{collections::HashSet, io, path::PathBuf, time::Duration};

use aws_types::SdkConfig;
use jiff::Timestamp;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    aws::AwsError,
    backoff::Backoff,
    handler::{DeadLetters, LetterId},
    source::SourceError,
};
use collect::{Collected, Collector};
pub(crate) use collect::{Counts, Letter, Selection};
pub(crate) use journal::JournalPlace;
use journal::{Entry, History, Journal};
use target::{Batch, PutError, Target};

/// The most letters of a batch, and their bytes unless one alone has more.
const BATCH_LETTERS: usize = 500;
const BATCH_BYTES: usize = 4 * 1024 * 1024;
/// The most bytes of letters that are put in one go: all of them are held to be put in order.
const SELECTED_LIMIT_BYTES: usize = 1024 * 1024 * 1024;
/// How long a call is tried again without success before the redrive ends.
const PATIENCE: Duration = Duration::from_secs(120);

/// Waits between attempts, and for how long attempts make sense.
struct Patience {
    backoff: Backoff,
    until: Instant,
}

impl Patience {
    fn new() -> Self {
        let backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        Self { backoff, until: Instant::now() + PATIENCE }
    }

    /// Waits and gives `true` if another attempt makes sense after a failure that is `transient` or not.
    async fn wait(&mut self, transient: bool) -> bool {
        let again = transient && Instant::now() < self.until;
        if again {
            tokio::time::sleep(self.backoff.next_wait()).await;
        }
        again
    }
}

/// What to put back, and where.
#[derive(Debug)]
pub(crate) struct Settings {
    pub from: DeadLetters,
    pub to: String,
    pub journal: JournalPlace,
    pub selection: Selection,
    /// How long a put may still arrive after the process that sent it died, or after its answer was lost.
    pub settle: Duration,
}

/// Why letters are not, or not all, put back.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RedriveError {
    #[error(transparent)]
    Stream(#[from] SourceError),
    #[error("{} cannot be read: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("s3://{bucket}/{key} cannot be read: {source}")]
    Object { bucket: String, key: String, source: AwsError },
    #[error(
        "the letters to put take more than {} MiB, which is all that is put in one go; choose fewer \
         with --since, --until, --key or --reason",
        limit_bytes / (1024 * 1024)
    )]
    TooMuch { limit_bytes: usize },
    #[error("the journal {journal} cannot be used: {reason}")]
    Journal { journal: String, reason: String },
    #[error(
        "{put} of {letters} letters are put into {stream}, and then it was refused: {source}; run the \
         same command again to go on"
    )]
    Put { stream: String, put: usize, letters: usize, source: AwsError },
    #[error(
        "it cannot be found out whether {stream} has all the letters that it was given: {source}; run \
         the same command again, which looks for them and goes on"
    )]
    Look { stream: String, source: Box<SourceError> },
    #[error("stopped; {put} of {letters} letters are put; run the same command again to go on")]
    Stopped { put: usize, letters: usize },
    #[error("stopped before a letter was put")]
    StoppedEarly,
}

/// Everything that is to be put, found and in order.
pub(crate) struct Redrive {
    target: Target,
    settle: Duration,
    /// In the order in which they are to be put.
    pub letters: Vec<Letter>,
    pub counts: Counts,
    /// Those of an earlier redrive of which it is not known whether Kinesis has them, since when, and
    /// those of them that are in another source.
    uncertain: Vec<Letter>,
    since: Option<Timestamp>,
    elsewhere: Vec<LetterId>,
    journal: Journal,
}

impl Redrive {
    /// Reads the letters and what the journal says of them. Writes nothing: that is for
    /// [`put`](Self::put), for which `exclusive` must be set, so that no other redrive uses the journal.
    pub(crate) async fn plan(
        config: &SdkConfig,
        settings: Settings,
        exclusive: bool,
        stop: &CancellationToken,
    ) -> Result<Self, RedriveError> {
        let Settings { from, to, journal, selection, settle } = settings;
        let reading = async {
            let target = Target::open(config, &to).await?;
            let (journal, History { done, uncertain, since }) =
                Journal::open(config, journal, target.arn(), exclusive).await?;
            let collector = Collector::new(selection, done, uncertain, SELECTED_LIMIT_BYTES);
            let Collected { letters, counts, uncertain, elsewhere } =
                from::read(config, &from, collector).await?.finish()?;
            Ok(Self { target, settle, letters, counts, uncertain, since, elsewhere, journal })
        };
        tokio::select! {
            read = reading => read,
            () = stop.cancelled() => Err(RedriveError::StoppedEarly),
        }
    }

    /// How many letters an earlier redrive left of which it is not known whether Kinesis has them.
    pub(crate) fn uncertain(&self) -> usize {
        self.uncertain.len()
    }

    /// Puts the letters, and gives how many of them an earlier redrive had put already. `progress` is
    /// called with the number of those that Kinesis has.
    pub(crate) async fn put(
        self,
        stop: &CancellationToken,
        progress: impl Fn(usize),
    ) -> Result<usize, RedriveError> {
        let Self { target, settle, letters, uncertain, since, elsewhere, mut journal, .. } = self;
        let all = letters.len();
        let stream = target.name().to_owned();
        let failed =
            |source| RedriveError::Look { stream: stream.clone(), source: Box::new(source) };
        let mut found = HashSet::new();
        if let (Some(since), false) = (since, uncertain.is_empty()) {
            tracing::info!(
                stream = target.name(),
                letters = uncertain.len(),
                "looking for letters that an earlier redrive was putting at {since}, when it ended; for \
                 {settle:?} if they are not there"
            );
            let looked_for: Vec<&Letter> = uncertain.iter().collect();
            found = tokio::select! {
                found = target.look(&looked_for, since, settle) => found.map_err(failed)?,
                () = stop.cancelled() => return Err(RedriveError::StoppedEarly),
            };
        }
        // What is in another source stays uncertain until that is put.
        let entry = |put: Vec<LetterId>, putting: Vec<LetterId>, at: Timestamp| {
            let at = since.filter(|_| !elsewhere.is_empty()).map_or(at, |since| since.min(at));
            Entry::new(target.arn(), put, [&elsewhere[..], &putting].concat(), at)
        };
        let left: Vec<&Letter> = letters.iter().filter(|l| !found.contains(&l.id)).collect();
        let found_before = all - left.len();
        let mut known: Vec<LetterId> = found.into_iter().collect();
        let mut put = found_before;
        progress(put);
        for letters in batches(&left) {
            let at = Timestamp::now();
            let putting = letters.iter().map(|letter| letter.id).collect();
            journal.append(&entry(known, putting, at)).await?;
            let mut batch = Batch::new(letters, at);
            let outcome = target.put(&mut batch, settle, stop, |n| progress(put + n)).await;
            put += batch.put.len();
            if outcome.is_err() || batch.is_left() {
                journal.append(&entry(batch.put, batch.uncertain, batch.since)).await?;
                return Err(match outcome {
                    Err(PutError::Refused(source)) => {
                        RedriveError::Put { stream, put, letters: all, source }
                    }
                    Err(PutError::Look(source)) => failed(source),
                    Ok(()) => RedriveError::Stopped { put, letters: all },
                });
            }
            known = batch.put;
        }
        if !known.is_empty() {
            journal.append(&entry(known, Vec::new(), Timestamp::now())).await?;
        }
        Ok(found_before)
    }
}

/// Cuts letters into batches, in order.
fn batches<'a, 'l>(mut letters: &'a [&'l Letter]) -> impl Iterator<Item = &'a [&'l Letter]> {
    std::iter::from_fn(move || {
        let mut size_bytes = 0;
        let fits = letters.iter().take(BATCH_LETTERS).take_while(|letter| {
            size_bytes += letter.record.data.len();
            size_bytes <= BATCH_BYTES
        });
        let count = fits.count().max(1).min(letters.len());
        let (batch, rest) = letters.split_at(count);
        letters = rest;
        (!batch.is_empty()).then_some(batch)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handler::{Kind, Outgoing, Place, dead_letter_tests::letter};

    fn to_put(data: Vec<u8>) -> Letter {
        let letter = letter(1, "k", data);
        let Place::Record(place) = letter.place.clone() else { panic!("a record") };
        let record = Outgoing { partition_key: "k".into(), data: letter.data.clone() };
        Letter { id: letter.id(), kind: Kind::HandlerFailed, place, record, event_id: None }
    }

    #[test]
    fn batches_are_bounded_and_hold_every_letter_in_order() {
        let letters: Vec<Letter> =
            vec![vec![1; 900_000]; 6].into_iter().chain(vec![vec![2]; 1200]).map(to_put).collect();
        let letters: Vec<&Letter> = letters.iter().collect();
        let sizes: Vec<usize> = batches(&letters).map(<[_]>::len).collect();
        assert_eq!(sizes, [4, 500, 500, 202]);
        let all: Vec<&Letter> = batches(&letters).flatten().copied().collect();
        assert!(all.iter().zip(&letters).all(|(a, b)| std::ptr::eq(*a, *b)));
        assert_eq!(batches(&[]).count(), 0);
    }
}
