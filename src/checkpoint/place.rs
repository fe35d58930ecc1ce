//! Where checkpoints are kept.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use super::StateError;
use crate::shard::ShardId;

/// Stands for the shard's id in a key or a file name.
const SHARD: &str = "{shard}";

/// Where a worker keeps its checkpoints, and the state of its handlers if they have any.
///
/// An S3 object or a file keeps positions and state together, in one write: after any crash the state is
/// exactly that of the position. Without `{shard}` in its key or name, one document holds every shard:
/// for a service of one worker. With it, each shard has a document of its own, which goes with the lease
/// from worker to worker.
///
/// ```
/// use tramline::checkpoint::Checkpoints;
///
/// let one = Checkpoints::parse("s3://rtr-state/green.state")?;
/// assert_eq!(one, Checkpoints::s3("rtr-state", "green.state"));
/// assert!(Checkpoints::file("/var/lib/rtr/{shard}.state").is_per_shard());
/// # Ok::<(), tramline::checkpoint::StateError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Checkpoints {
    /// In the lease table, which has no place for state.
    #[default]
    LeaseTable,
    /// In an object of S3.
    S3 {
        /// The bucket.
        bucket: String,
        /// The object's key.
        key: String,
    },
    /// In a file. Its folder must exist.
    File {
        /// The file's absolute path.
        path: PathBuf,
    },
}

impl Checkpoints {
    /// In the lease table: the default.
    pub fn lease_table() -> Self {
        Self::LeaseTable
    }

    /// In an object of S3.
    pub fn s3(bucket: impl Into<String>, key: impl Into<String>) -> Self {
        Self::S3 { bucket: bucket.into(), key: key.into() }
    }

    /// In a file, by its absolute path.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self::File { path: path.into() }
    }

    /// Reads `dynamodb` (the lease table), `s3://bucket/key` or `file:///path`. The text after the
    /// scheme is taken as it is: `%20` is no space.
    pub fn parse(text: &str) -> Result<Self, StateError> {
        let parsed = if text == "dynamodb" {
            Self::LeaseTable
        } else if let Some((bucket, key)) =
            text.strip_prefix("s3://").and_then(|s3| s3.split_once('/'))
        {
            Self::s3(bucket, key)
        } else if let Some(path) = text.strip_prefix("file://") {
            Self::file(path)
        } else {
            return Err(StateError::Place {
                place: text.to_owned(),
                advice: "write dynamodb, s3://bucket/key or file:///path",
            });
        };
        parsed.check()?;
        Ok(parsed)
    }

    /// Whether each shard has a document of its own.
    pub fn is_per_shard(&self) -> bool {
        match self {
            Self::LeaseTable => false,
            Self::S3 { key, .. } => key.contains(SHARD),
            Self::File { path } => path.to_string_lossy().contains(SHARD),
        }
    }

    /// Refuses what S3 or a file system would not take, and what is most likely a slip.
    pub(super) fn check(&self) -> Result<(), StateError> {
        let advice = match self {
            Self::LeaseTable => None,
            Self::S3 { bucket, key } => check_s3(bucket, key),
            Self::File { path } => check_file(path),
        };
        match advice {
            Some(advice) => Err(StateError::Place { place: self.to_string(), advice }),
            None => Ok(()),
        }
    }
}

/// A key or path with the shard's id in its place.
pub(super) fn with_shard(text: &str, shard: Option<&ShardId>) -> String {
    match shard {
        Some(shard) => text.replace(SHARD, shard.as_str()),
        None => text.to_owned(),
    }
}

impl fmt::Display for Checkpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LeaseTable => f.write_str("dynamodb"),
            Self::S3 { bucket, key } => write!(f, "s3://{bucket}/{key}"),
            Self::File { path } => write!(f, "file://{}", path.display()),
        }
    }
}

fn check_s3(bucket: &str, key: &str) -> Option<&'static str> {
    let of_bucket = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'.' || b == b'-';
    if !(3..=63).contains(&bucket.len()) || !bucket.bytes().all(of_bucket) {
        return Some("a bucket has 3 to 63 lower-case letters, digits, dots and hyphens");
    }
    if !(1..=1024).contains(&key.len()) || key.ends_with('/') {
        return Some(
            "write a key of at most 1024 bytes after the bucket, such as s3://bucket/green.state",
        );
    }
    check_braces(key)
}

fn check_file(path: &Path) -> Option<&'static str> {
    let Some(text) = path.to_str() else { return Some("write a path in UTF-8") };
    if !path.is_absolute() {
        return Some("write an absolute path, such as file:///var/lib/rtr/green.state");
    }
    let Some(name) = path.file_name().filter(|_| !text.ends_with('/')) else {
        return Some("write a file's path, such as file:///var/lib/rtr/green.state");
    };
    // The folder is not made by us: a path with a slip, or a disk that is not mounted, would go
    // unnoticed.
    if text.contains(SHARD) && !name.to_string_lossy().contains(SHARD) {
        return Some("write {shard} into the file's name, not into a folder's");
    }
    check_braces(text)
}

fn check_braces(text: &str) -> Option<&'static str> {
    let rest = text.replace(SHARD, "");
    rest.contains(['{', '}']).then_some("only {shard} may stand in braces")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        for text in ["dynamodb", "s3://rtr-state/a/b.state", "file:///var/lib/x/{shard}.state"] {
            assert_eq!(Checkpoints::parse(text).expect(text).to_string(), text);
        }
    }

    #[test]
    fn a_slip_is_refused_with_advice() {
        for (text, advice) in [
            ("green.state", "s3://bucket/key"),
            ("s3://rtr-state", "s3://bucket/key"),
            ("s3://rtr-state/", "write a key"),
            ("s3://rtr-state/green/", "write a key"),
            ("s3://RTR/green", "lower-case"),
            ("s3://rtr-state/{shrad}.state", "only {shard}"),
            ("file://green.state", "absolute"),
            ("file:///var/lib/", "a file's path"),
            ("file:///", "a file's path"),
            ("file:///var/lib/{shard}/state", "not into a folder's"),
        ] {
            let error = Checkpoints::parse(text).expect_err(text).to_string();
            assert!(error.contains(advice) && error.contains(text), "{error}");
        }
    }
}
