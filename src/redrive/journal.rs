//! What was put, so that it is put once.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
    fs::{File, OpenOptions, TryLockError},
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use aws_types::SdkConfig;
use futures_util::{StreamExt as _, stream};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{RedriveError, bucket::Bucket, from::is_below};
use crate::{
    aws::AwsErrorKind,
    handler::{DeadLetters, Destination, LetterId, sync_name},
};

const VERSION: u32 = 1;
/// The folder of a journal that stands beside the letters of a bucket.
const FOLDER: &str = "redriven";

/// Where a journal is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum JournalPlace {
    File(PathBuf),
    /// Objects in a folder.
    S3 {
        bucket: String,
        folder: String,
    },
    /// In the folder `redriven` below the letters. Those of redrives with a longer or shorter prefix
    /// count too.
    Beside {
        bucket: String,
        prefix: String,
    },
}

impl JournalPlace {
    /// Where it is if nothing else is said; `None` if that must be said.
    pub(crate) fn of(from: &DeadLetters) -> Option<Self> {
        match &from.0 {
            Destination::File { path } => {
                let mut path = path.clone().into_os_string();
                path.push(".redriven");
                Some(Self::File(path.into()))
            }
            Destination::S3 { bucket, prefix } => {
                Some(Self::Beside { bucket: bucket.clone(), prefix: prefix.clone() })
            }
            Destination::Kinesis { .. } | Destination::Stderr => None,
        }
    }
}

impl FromStr for JournalPlace {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse::<DeadLetters>().map(|parsed| parsed.0) {
            Ok(Destination::File { path }) => Ok(Self::File(path)),
            Ok(Destination::S3 { bucket, prefix }) if !prefix.is_empty() => {
                Ok(Self::S3 { bucket, folder: prefix })
            }
            _ if !text.contains("://") && !text.is_empty() => Ok(Self::File(text.into())),
            _ => Err("write a path, file:///PATH or s3://BUCKET/FOLDER"),
        }
    }
}

impl fmt::Display for JournalPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::S3 { bucket, folder } => write!(f, "s3://{bucket}/{folder}"),
            Self::Beside { bucket, prefix } => {
                write!(f, "s3://{bucket}/{}", beneath(prefix, FOLDER))
            }
        }
    }
}

fn beneath(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_owned() } else { format!("{prefix}/{name}") }
}

/// Whether an object is an entry of a journal that stands beside letters.
pub(super) fn is_entry(key: &str) -> bool {
    let mut parts = key.rsplit('/');
    let name = parts.next().and_then(|name| name.strip_suffix(".json"));
    name.is_some_and(|name| !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit()))
        && parts.next() == Some(FOLDER)
}

/// One step. It settles the step before it: what that one was putting and this one does not list, Kinesis
/// does not have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    version: u32,
    /// The ARN of the target stream.
    to: String,
    /// When.
    at: Timestamp,
    /// Kinesis has these, ...
    put: Vec<LetterId>,
    /// ... and gets these from now on.
    putting: Vec<LetterId>,
}

impl Entry {
    pub(super) fn new(to: &str, put: Vec<LetterId>, putting: Vec<LetterId>, at: Timestamp) -> Self {
        Self { version: VERSION, to: to.to_owned(), at, put, putting }
    }

    fn line(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self).expect("texts and times have a JSON form");
        line.push(b'\n');
        line
    }

    fn parse(line: &[u8]) -> Result<Self, String> {
        let entry: Self =
            serde_json::from_slice(line).map_err(|error| format!("is damaged: {error}"))?;
        match entry.version {
            VERSION => Ok(entry),
            other => Err(format!("has version {other}, and this program reads version {VERSION}")),
        }
    }
}

/// What the entries of a journal say of one target.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct History {
    pub done: HashSet<LetterId>,
    /// Kinesis may have these, if they are not done, ...
    pub uncertain: HashSet<LetterId>,
    /// ... and got them at this time or later.
    pub since: Option<Timestamp>,
}

impl History {
    /// Reads the entries of one journal, oldest first.
    fn of(entries: impl IntoIterator<Item = Entry>, to: &str) -> Self {
        let mut history = Self::default();
        for entry in entries.into_iter().filter(|entry| entry.to == to) {
            history.done.extend(entry.put);
            history.since = (!entry.putting.is_empty()).then_some(entry.at);
            history.uncertain = entry.putting.into_iter().collect();
        }
        history
    }

    /// What several journals know together.
    fn and(mut self, other: Self) -> Self {
        self.done.extend(other.done);
        self.uncertain.extend(other.uncertain);
        self.uncertain.retain(|id| !self.done.contains(id));
        self.since = [self.since, other.since].into_iter().flatten().min();
        self
    }
}

/// A journal that is open.
pub(super) struct Journal {
    place: JournalPlace,
    kept: Kept,
}

enum Kept {
    /// Locked; only looked at if there is none.
    File(Option<Arc<File>>),
    S3 {
        bucket: Bucket,
        folder: String,
        next: u64,
    },
}

impl Journal {
    /// Opens a journal and reads what it says of the target with the ARN `to`. With `exclusive` it can be
    /// written, and an error is returned if another process has it.
    pub(super) async fn open(
        config: &SdkConfig,
        place: JournalPlace,
        to: &str,
        exclusive: bool,
    ) -> Result<(Self, History), RedriveError> {
        let failed = |reason: String| RedriveError::Journal { journal: place.to_string(), reason };
        let (kept, history) = match &place {
            JournalPlace::File(path) => {
                let (file, entries) = open_file(path, exclusive).map_err(failed)?;
                (Kept::File(file.map(Arc::new)), History::of(entries, to))
            }
            JournalPlace::S3 { bucket, folder } => {
                let bucket = Bucket::new(config, bucket);
                let keys = bucket.keys(&format!("{folder}/")).await?;
                let (next, history) = read_folders(&bucket, folder, keys, to).await?;
                (Kept::S3 { bucket, folder: folder.clone(), next }, history)
            }
            JournalPlace::Beside { bucket, prefix } => {
                let bucket = Bucket::new(config, bucket);
                let folder = beneath(prefix, FOLDER);
                let mut keys = bucket.keys(prefix).await?;
                keys.retain(|key| is_below(prefix, key));
                keys.extend(above(&bucket, prefix).await?);
                keys.retain(|key| is_entry(key));
                let (next, history) = read_folders(&bucket, &folder, keys, to).await?;
                (Kept::S3 { bucket, folder, next }, history)
            }
        };
        Ok((Self { place, kept }, history))
    }

    /// Adds an entry, and returns when it is durable.
    pub(super) async fn append(&mut self, entry: &Entry) -> Result<(), RedriveError> {
        let line = entry.line();
        let appended = match &mut self.kept {
            Kept::File(None) => Err("it was not opened to be written".to_owned()),
            Kept::File(Some(file)) => append_to(file.clone(), line).await,
            Kept::S3 { bucket, folder, next } => {
                let key = format!("{folder}/{next:012}.json");
                *next += 1;
                match bucket.create(&key, line.into()).await {
                    Ok(true) => Ok(()),
                    Ok(false) => Err(format!("another redrive wrote {key}; wait for its end")),
                    Err(error) => Err(error.to_string()),
                }
            }
        };
        appended.map_err(|reason| RedriveError::Journal {
            journal: self.place.to_string(),
            reason: format!(
                "{reason}; what was put since the last entry is looked for in the stream by the next \
                 redrive"
            ),
        })
    }
}

/// Opens a journal and reads its entries. What a crash left of an entry at the end is taken away: nothing
/// was put after it.
fn open_file(path: &Path, exclusive: bool) -> Result<(Option<File>, Vec<Entry>), String> {
    let told = |error: io::Error| error.to_string();
    let opened = match exclusive {
        true => OpenOptions::new().read(true).append(true).create(true).open(path),
        false => File::open(path),
    };
    let mut file = match opened {
        Err(error) if !exclusive && error.kind() == io::ErrorKind::NotFound => {
            return Ok((None, Vec::new()));
        }
        opened => opened.map_err(told)?,
    };
    if exclusive {
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err("another redrive uses it; wait for its end".to_owned());
            }
            Err(TryLockError::Error(error)) => return Err(told(error)),
        }
    }
    let mut content = Vec::new();
    file.read_to_end(&mut content).map_err(told)?;
    let whole = content.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
    if exclusive {
        if whole < content.len() {
            file.set_len(whole as u64).map_err(told)?;
        }
        sync_name(path).map_err(told)?;
    }
    let lines = content[..whole].split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let entries: Result<Vec<Entry>, String> = (1..)
        .zip(lines)
        .map(|(n, line)| Entry::parse(line).map_err(|error| format!("line {n} {error}")))
        .collect();
    Ok((exclusive.then_some(file), entries?))
}

async fn append_to(file: Arc<File>, line: Vec<u8>) -> Result<(), String> {
    let append = move || {
        let length = file.metadata()?.len();
        let written = (&*file).write_all(&line).and_then(|()| file.sync_data());
        if written.is_err() {
            // A piece of a line in the middle could not be read.
            file.set_len(length)?;
        }
        written
    };
    let appended = tokio::task::spawn_blocking(append).await.map_err(io::Error::other);
    appended.and_then(|appended| appended).map_err(|error| error.to_string())
}

/// The entries of the journals that stand beside shorter prefixes.
async fn above(bucket: &Bucket, prefix: &str) -> Result<Vec<String>, RedriveError> {
    let mut keys = Vec::new();
    let mut prefix = prefix;
    while !prefix.is_empty() {
        prefix = prefix.rsplit_once('/').map_or("", |(above, _)| above);
        let folder = beneath(prefix, FOLDER);
        match bucket.keys(&format!("{folder}/")).await {
            Ok(found) => keys.extend(found),
            Err(RedriveError::Object { source, .. }) if source.kind() == AwsErrorKind::Denied => {
                tracing::warn!(
                    "{source}; so there is no look for a journal in {folder}, and letters that a \
                     redrive with that prefix has put are put again"
                );
            }
            Err(error) => return Err(error),
        }
    }
    Ok(keys)
}

/// What the journals with these entries say, and the number of the next entry of the one in `own`.
async fn read_folders(
    bucket: &Bucket,
    own: &str,
    mut keys: Vec<String>,
    to: &str,
) -> Result<(u64, History), RedriveError> {
    keys.sort();
    let mut folders: BTreeMap<String, Vec<Entry>> = BTreeMap::new();
    let mut next = 1;
    let mut contents = std::pin::pin!(bucket.objects(&keys).zip(stream::iter(&keys)));
    while let Some((content, key)) = contents.next().await {
        let (folder, name) = key.rsplit_once('/').unwrap_or(("", key));
        let content = content?.unwrap_or_default();
        let entry = Entry::parse(&content).map_err(|reason| RedriveError::Journal {
            journal: folder.to_owned(),
            reason: format!("{name} {reason}"),
        })?;
        if folder == own
            && let Some(number) = name.strip_suffix(".json").and_then(|n| n.parse::<u64>().ok())
        {
            next = number + 1;
        }
        folders.entry(folder.to_owned()).or_default().push(entry);
    }
    let histories = folders.into_values().map(|entries| History::of(entries, to));
    Ok((next, histories.fold(History::default(), History::and)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handler::dead_letter_tests::letter;

    fn id(n: u64) -> LetterId {
        letter(n, "k", "").id()
    }

    fn at(second: u32) -> Timestamp {
        format!("2025-07-02T15:00:{second:02}Z").parse().expect("a time")
    }

    fn entry(to: &str, put: &[u64], putting: &[u64], second: u32) -> Entry {
        let ids = |numbers: &[u64]| numbers.iter().map(|n| id(*n)).collect();
        Entry::new(to, ids(put), ids(putting), at(second))
    }

    #[test]
    fn each_entry_settles_the_one_before_and_other_targets_do_not_count() {
        let entries = [
            entry("s", &[], &[1, 2, 3], 1),
            entry("other", &[8], &[9], 2),
            entry("s", &[1, 2], &[3, 4], 3),
        ];
        let history = History::of(entries.clone(), "s");
        assert_eq!(history.done, HashSet::from([id(1), id(2)]));
        assert_eq!(history.uncertain, HashSet::from([id(3), id(4)]));
        assert_eq!(history.since, Some(at(3)));
        let ended = [entries[2].clone(), entry("s", &[3, 4], &[], 4)];
        let history = History::of(ended, "s");
        assert_eq!((history.uncertain.len(), history.since), (0, None));
    }

    #[test]
    fn journals_of_longer_and_shorter_prefixes_complete_each_other() {
        let wide = History::of([entry("s", &[1], &[2, 3], 5)], "s");
        let narrow = History::of([entry("s", &[2], &[], 9), entry("s", &[], &[4], 10)], "s");
        let both = History::default().and(wide).and(narrow);
        assert_eq!(both.done, HashSet::from([id(1), id(2)]));
        assert_eq!(both.uncertain, HashSet::from([id(3), id(4)]));
        assert_eq!(both.since, Some(at(5)));
    }

    #[tokio::test]
    async fn what_is_appended_is_read_back_and_what_a_crash_cut_off_is_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("letters.redriven");
        let config = SdkConfig::builder().build();
        let open = async |exclusive| {
            Journal::open(&config, JournalPlace::File(path.clone()), "s", exclusive).await
        };
        let (_, history) = open(false).await.expect("none yet");
        assert_eq!(history, History::default());
        assert!(!path.exists(), "a look makes no file");

        let (mut journal, _) = open(true).await.expect("a journal");
        journal.append(&entry("s", &[], &[1, 2], 1)).await.expect("appended");
        let error = open(true).await.err().expect("in use").to_string();
        assert!(error.contains("another redrive uses it"), "{error}");
        let (_, seen) = open(false).await.expect("may be looked at");
        assert_eq!(seen.uncertain.len(), 2);
        drop(journal);

        let torn = &entry("s", &[1, 2], &[3], 2).line()[..40];
        let mut file = OpenOptions::new().append(true).open(&path).expect("a file");
        file.write_all(torn).expect("a write");
        let (mut journal, history) = open(true).await.expect("a journal");
        assert_eq!(history.uncertain, HashSet::from([id(1), id(2)]));
        journal.append(&entry("s", &[1], &[3], 3)).await.expect("appended");
        drop(journal);
        let (_, history) = open(false).await.expect("a journal");
        assert_eq!(history.done, HashSet::from([id(1)]));
        assert_eq!(history.uncertain, HashSet::from([id(3)]));

        std::fs::write(&path, "{}\n").expect("a write");
        let error = open(true).await.err().expect("damaged").to_string();
        assert!(error.contains("letters.redriven cannot be used: line 1 is damaged"), "{error}");
    }

    #[test]
    fn a_journal_is_beside_the_letters_unless_it_is_named() {
        let of = |from: &str| {
            let from: DeadLetters = from.parse().expect("an address");
            JournalPlace::of(&from).map(|place| place.to_string())
        };
        assert_eq!(of("file:///a/b.jsonl").as_deref(), Some("/a/b.jsonl.redriven"));
        assert_eq!(of("s3://bucket/a/b").as_deref(), Some("s3://bucket/a/b/redriven"));
        assert_eq!(of("s3://bucket").as_deref(), Some("s3://bucket/redriven"));
        assert_eq!(of("kinesis://letters"), None);

        let named = |text: &str| text.parse::<JournalPlace>();
        assert_eq!(named("a/b"), Ok(JournalPlace::File("a/b".into())));
        assert_eq!(named("file:///a/b"), Ok(JournalPlace::File("/a/b".into())));
        let folder = JournalPlace::S3 { bucket: "bucket".into(), folder: "a".into() };
        assert_eq!(named("s3://bucket/a"), Ok(folder));
        for wrong in ["", "kinesis://s", "http://a", "s3://bucket"] {
            assert!(named(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn entries_are_told_from_letters_by_their_names() {
        for key in ["redriven/000000000001.json", "a/b/redriven/000000000012.json"] {
            assert!(is_entry(key), "{key}");
        }
        for key in [
            "redriven/s/shardId-0/1-2.jsonl",
            "a/redriven.json",
            "a/1.json",
            "redriven/x.json",
            "redriven/.json",
            "a/redriven/1.jsonl",
        ] {
            assert!(!is_entry(key), "{key}");
        }
    }
}
