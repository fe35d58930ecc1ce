//! Where dead letters go, and storing them there.

pub(super) mod file;
pub(super) mod kinesis;
pub(super) mod s3;

use std::{
    collections::VecDeque,
    error::Error,
    fmt, io,
    path::{Path, PathBuf},
    str::FromStr,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use aws_types::SdkConfig;
use tokio::time::Instant;

use super::dead_letter::{DeadLetter, Place, write_to_stderr};
use crate::{
    aws::{AwsError, AwsErrorKind},
    backoff::Backoff,
};

/// How often a lasting failure is told again.
const REMINDER_INTERVAL: Duration = Duration::from_secs(60);

/// Where dead letters go: what could not be decoded or handled, with its bytes, its place in the stream
/// and the reason, as one JSON object a line (P9).
///
/// ```
/// use tramline::DeadLetters;
///
/// let destination: DeadLetters = "s3://rtr-dead-letters/green".parse()?;
/// assert_eq!(destination, DeadLetters::s3("rtr-dead-letters", "green"));
/// # Ok::<(), tramline::DeadLetterError>(())
/// ```
///
/// A line is `{"dead_letter":{…}}` with these fields, of which there may be more later:
///
/// | field | meaning |
/// |---|---|
/// | `version` | 1 |
/// | `kind` | `undecodable`, `handler-failed`, `handler-timed-out`; of the producer: `oversized`, `unfinished` |
/// | `reason` | in words, at most 4 KiB: what the handler said, if it failed |
/// | `stream`, `shard`, `sequence_number`, `partition_key`, `arrived_at` | the record; sequence numbers are strings |
/// | `user_record` | the place in a KPL aggregate, if it was in one |
/// | `sub_sequence_number` | the place among the record's messages; none if the letter is the whole record |
/// | `connection`, `received_at`, `length_bytes` | instead of those: an OCS connection |
/// | `attempts` | how often the handler was offered it |
/// | `given_up_at` | when |
/// | `application`, `worker` | by whom |
/// | `data_base64` | its exact bytes; for a message those of its CloudEvent |
/// | `event` | the same as JSON, if it is an object and there is room: for people, and for `jq` |
/// | `part` | `number` (from 1), `of` and `data_sha256`, the digest of the whole data, if this line has only a part of the data |
///
/// A checkpoint passes a record only after its dead letters are stored, so a crash between the two
/// stores them again: a letter may be there twice, and `tramline redrive` puts it back once. While the
/// destination does not answer, the shard waits, and other shards go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetters(pub(crate) Destination);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Destination {
    Stderr,
    Kinesis { stream: String },
    S3 { bucket: String, prefix: String },
    File { path: PathBuf },
}

/// Why dead letters cannot be stored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeadLetterError {
    /// The text names no destination.
    #[error(
        "{given:?} names no place for dead letters; write kinesis://STREAM, s3://BUCKET/PREFIX or \
         file:///PATH"
    )]
    Address {
        /// The text.
        given: String,
    },
    /// The destination cannot be used.
    #[error("dead letters cannot be stored in {destination}: {source}{}", advice(source.as_ref()))]
    Open {
        /// The destination.
        destination: DeadLetters,
        /// What AWS or the system said.
        source: Box<dyn Error + Send + Sync>,
    },
    /// Letters are not stored, and trying again would not help.
    #[error(
        "{letters} dead letters, the first of {place}, cannot be stored in {destination}: \
         {source}{}; the checkpoint stays before them",
        advice(source.as_ref())
    )]
    Store {
        /// The destination.
        destination: DeadLetters,
        /// How many.
        letters: usize,
        /// Where the first one was found.
        place: String,
        /// What AWS or the system said.
        source: Box<dyn Error + Send + Sync>,
    },
}

/// What to do about an error that does not say it.
fn advice(error: &(dyn Error + Send + Sync + 'static)) -> &'static str {
    let missing = match error.downcast_ref() {
        Some(error) => AwsError::kind(error) == AwsErrorKind::NotFound,
        None => false,
    };
    if missing { "; create it, or check the name, the region and the account" } else { "" }
}

impl DeadLetters {
    /// To the process's standard error, each line marked by `{"dead_letter":…}`: what is collected with
    /// the log is found there.
    pub fn stderr() -> Self {
        Self(Destination::Stderr)
    }

    /// To a Kinesis stream, under the partition keys that they had, in order for each key. A record has
    /// one letter or several, each with its line break. A letter that does not fit into a record of
    /// 1 MiB is cut into parts that say so, in records that follow each other.
    pub fn kinesis(stream: impl Into<String>) -> Self {
        Self(Destination::Kinesis { stream: stream.into() })
    }

    /// To an S3 bucket, as objects of up to 4 MiB of lines named
    /// `prefix/application/stream/shard/sequence number of the first letter-digest.jsonl`. The digest
    /// is that of the letters' places and bytes: storing the same letters again writes the same object,
    /// and other letters never write over it.
    pub fn s3(bucket: impl Into<String>, prefix: impl AsRef<str>) -> Self {
        let prefix = prefix.as_ref().trim_matches('/').to_owned();
        Self(Destination::S3 { bucket: bucket.into(), prefix })
    }

    /// To a local file, appended and synced to the disk. Several processes may share the file. What a
    /// crash cut off is left as a line of its own.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self(Destination::File { path: path.into() })
    }

    pub(crate) fn is_stderr(&self) -> bool {
        self.0 == Destination::Stderr
    }

    /// Gets ready to store letters. An error if it is clear now that this cannot work: the stream or
    /// the bucket does not exist, or the file cannot be written.
    pub(crate) async fn open(
        &self,
        config: &SdkConfig,
    ) -> Result<DeadLetterStore, DeadLetterError> {
        let failed = |source| DeadLetterError::Open { destination: self.clone(), source };
        let sink = match &self.0 {
            Destination::Stderr => Sink::Stderr,
            Destination::Kinesis { stream } => {
                let records = kinesis::Records::new(config, stream);
                check(records.check().await).map_err(|error| failed(error.into()))?;
                Sink::Kinesis(records)
            }
            Destination::S3 { bucket, prefix } => {
                let objects = s3::Objects::new(config, bucket, prefix);
                check(objects.check().await).map_err(|error| failed(error.into()))?;
                Sink::S3(objects)
            }
            Destination::File { path } => {
                file::append(path, Vec::new()).await.map_err(|error| failed(error.into()))?;
                Sink::File(path.clone())
            }
        };
        Ok(DeadLetterStore { to: self.clone(), sink, has_stored: AtomicBool::new(false) })
    }
}

/// Lets pass what says nothing about storing: that needs no permission to look, and an outage is waited
/// for when there is something to store.
fn check(looked: Result<(), AwsError>) -> Result<(), AwsError> {
    match looked {
        Err(error) if error.kind() == AwsErrorKind::Denied || error.is_transient() => {
            tracing::debug!("the destination of dead letters was not checked: {error}");
            Ok(())
        }
        looked => looked,
    }
}

impl FromStr for DeadLetters {
    type Err = DeadLetterError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let destination = match text.split_once("://") {
            Some(("kinesis", stream)) if is_stream_name(stream) => Some(Self::kinesis(stream)),
            Some(("s3", place)) => {
                let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
                (!bucket.is_empty()).then(|| Self::s3(bucket, prefix))
            }
            Some(("file", path)) if path.starts_with('/') && !path.ends_with('/') => {
                Some(Self::file(path))
            }
            None if text == "stderr" => Some(Self::stderr()),
            _ => None,
        };
        destination.ok_or_else(|| DeadLetterError::Address { given: text.to_owned() })
    }
}

/// Whether a text can be the name of a stream (AWS API reference).
pub(crate) fn is_stream_name(text: &str) -> bool {
    (1..=128).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
}

impl fmt::Display for DeadLetters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Destination::Stderr => f.write_str("stderr"),
            Destination::Kinesis { stream } => write!(f, "kinesis://{stream}"),
            Destination::S3 { bucket, prefix } if prefix.is_empty() => write!(f, "s3://{bucket}"),
            Destination::S3 { bucket, prefix } => write!(f, "s3://{bucket}/{prefix}"),
            Destination::File { path } => write!(f, "file://{}", path.display()),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Record(place) => write!(
                f,
                "stream {}, shard {}, sequence number {}",
                place.stream, place.shard, place.sequence_number
            ),
            Self::Connection { connection, .. } => write!(f, "connection {connection}"),
        }
    }
}

/// A destination that is ready. All shards of a worker share it.
pub(crate) struct DeadLetterStore {
    to: DeadLetters,
    sink: Sink,
    has_stored: AtomicBool,
}

enum Sink {
    Stderr,
    Kinesis(kinesis::Records),
    S3(s3::Objects),
    File(PathBuf),
}

/// Why one attempt to store did not succeed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Aws(#[from] AwsError),
    #[error(transparent)]
    File(#[from] io::Error),
}

impl Failure {
    /// Whether the same attempt may succeed later without anyone telling us to.
    fn is_transient(&self) -> bool {
        use io::ErrorKind::*;
        match self {
            Self::Aws(error) => error.is_transient(),
            Self::File(error) => {
                matches!(error.kind(), Interrupted | QuotaExceeded | StorageFull | TimedOut)
            }
        }
    }

    fn into_source(self) -> Box<dyn Error + Send + Sync> {
        match self {
            Self::Aws(error) => error.into(),
            Self::File(error) => error.into(),
        }
    }
}

impl DeadLetterStore {
    /// Stores letters of one shard, in their order, and returns when they are durable: the checkpoint
    /// may pass them then, and not before (P1, P9).
    ///
    /// Tries until it works. What never worked and will not by itself, such as a missing permission, is
    /// an error; what worked once is tried again. To give up, drop the call: some of the letters may be
    /// stored then.
    pub(crate) async fn store(&self, letters: &[DeadLetter]) -> Result<(), DeadLetterError> {
        let mut pending = match &self.sink {
            Sink::Stderr => {
                write_to_stderr(lines(letters)).await;
                return Ok(());
            }
            Sink::Kinesis(stream) => Pending::Kinesis(stream, kinesis::records(letters)),
            Sink::S3(bucket) => Pending::S3(bucket, bucket.objects(letters)),
            Sink::File(path) => Pending::File(path, lines(letters)),
        };
        let first = letters.first().map_or(String::new(), |letter| letter.place.to_string());
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
        let began = Instant::now();
        let mut failures = 0_u32;
        let mut remind_at = began;
        while let Err(failure) = pending.store().await {
            if !self.has_stored.load(Ordering::Relaxed) && !failure.is_transient() {
                return Err(DeadLetterError::Store {
                    destination: self.to.clone(),
                    letters: letters.len(),
                    place: first,
                    source: failure.into_source(),
                });
            }
            failures += 1;
            if Instant::now() >= remind_at {
                remind_at = Instant::now() + REMINDER_INTERVAL;
                tracing::warn!(
                    destination = %self.to,
                    letters = letters.len(),
                    failures,
                    "dead letters, the first of {first}, are not stored yet: {failure}; the shard \
                     waits, and they are stored again until it works"
                );
            }
            tokio::time::sleep(backoff.next_wait()).await;
        }
        self.has_stored.store(true, Ordering::Relaxed);
        if failures > 0 {
            tracing::info!(
                destination = %self.to,
                failures,
                "dead letters are stored again after {:.1} s",
                began.elapsed().as_secs_f64()
            );
        }
        Ok(())
    }
}

/// What is still to be stored, and where.
enum Pending<'a> {
    Kinesis(&'a kinesis::Records, VecDeque<kinesis::Outgoing>),
    S3(&'a s3::Objects, VecDeque<s3::Object>),
    File(&'a Path, Vec<u8>),
}

impl Pending<'_> {
    /// Stores what it can. After an error the rest is left.
    async fn store(&mut self) -> Result<(), Failure> {
        match self {
            Self::Kinesis(stream, records) => {
                while !records.is_empty() {
                    stream.put_round(records).await?;
                }
            }
            Self::S3(bucket, objects) => {
                while let Some(object) = objects.front() {
                    bucket.put(object).await?;
                    objects.pop_front();
                }
            }
            Self::File(path, lines) => file::append(path, lines.clone()).await?,
        }
        Ok(())
    }
}

fn lines(letters: &[DeadLetter]) -> Vec<u8> {
    letters.iter().flat_map(DeadLetter::line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_written_as_urls() {
        for (text, destination) in [
            ("kinesis://letters", DeadLetters::kinesis("letters")),
            ("s3://bucket", DeadLetters::s3("bucket", "")),
            ("s3://bucket/a/b", DeadLetters::s3("bucket", "a/b")),
            ("file:///var/lib/letters.jsonl", DeadLetters::file("/var/lib/letters.jsonl")),
            ("stderr", DeadLetters::stderr()),
        ] {
            assert_eq!(text.parse::<DeadLetters>().expect(text), destination);
            assert_eq!(destination.to_string(), text);
        }
        assert_eq!(
            "s3://bucket/a/".parse::<DeadLetters>().expect("an address"),
            DeadLetters::s3("bucket", "a")
        );
        for wrong in [
            "",
            "letters",
            "kinesis://",
            "kinesis://a/b",
            "s3://",
            "s3:///a",
            "file://a/b",
            "file:///",
            "file:///a/",
            "http://a",
            "stderr://",
        ] {
            let error = wrong.parse::<DeadLetters>().expect_err(wrong).to_string();
            assert!(error.contains("kinesis://STREAM"), "{error}");
        }
    }
}
