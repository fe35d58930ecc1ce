//! The actions of AWS that Tramline calls: which command needs which, on what.
//!
//! This table is the one place for them. `tramline check` tries its rows, docs/security.md shows it, and a test
//! compares it with the calls in the source, so that no call is added without a row.
//!
//! ```
//! use tramline::permissions::{Command, of};
//!
//! assert!(of(Command::Produce).any(|row| row.action == "kinesis:PutRecords"));
//! ```
//!
//! Left out are actions that AWS takes on a caller's behalf: a stream or a bucket that is encrypted with a
//! key of one's own also needs `kms:Decrypt` to read and `kms:GenerateDataKey` to write, on that key.

use std::fmt;

/// An action that a command needs on a resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Permission {
    /// The command. The crate's [`Worker`](crate::Worker) needs what `consume` does, its
    /// [`Producer`](crate::Producer) what `produce` does.
    pub command: Command,
    /// What IAM calls it, such as `kinesis:GetRecords`.
    pub action: &'static str,
    /// What it is granted on.
    pub on: Resource,
    /// When it is needed.
    pub when: When,
}

/// A command that calls AWS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Command {
    /// `tramline produce`.
    Produce,
    /// `tramline consume`.
    Consume,
    /// `tramline status`.
    Status,
    /// `tramline lease`.
    Lease,
    /// `tramline redrive`.
    Redrive,
    /// `tramline replay kinesis://…`.
    Replay,
}

/// What an action is granted on. The ARNs are those of the service authorization reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Resource {
    /// The stream that is read or written: `stream/NAME`.
    Stream,
    /// The fan-out consumer: `stream/NAME/consumer/APP:*`.
    Consumer,
    /// The lease table: `table/NAME`.
    LeaseTable,
    /// The bucket of the checkpoints, for `--checkpoint s3://…`.
    StateBucket,
    /// The objects in it: `BUCKET/KEY`.
    StateObjects,
    /// The bucket of the archive, for `--output s3-archive://…`.
    ArchiveBucket,
    /// The objects in it: `BUCKET/PREFIX/*`.
    ArchiveObjects,
    /// The stream of the dead letters.
    DeadLetterStream,
    /// The bucket of the dead letters.
    DeadLetterBucket,
    /// The objects in it: `BUCKET/PREFIX/*`.
    DeadLetterObjects,
}

/// When a command needs an action.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum When {
    /// Wherever it uses the resource.
    Always,
    /// With enhanced fan-out.
    FanOut,
    /// With polling.
    Polling,
    /// Where the resource does not exist yet, and the command is to create it.
    Missing,
    /// Where it is granted: without it, what is missing is told later.
    Granted,
    /// With several streams.
    Several,
    /// With `--lag`, or `--to` a sequence number.
    Asked,
    /// With `--yes`.
    Write,
}

/// Every row. Those of a command stand in the order in which `tramline check` tries them.
pub const PERMISSIONS: &[Permission] = {
    use Command::*;
    use Resource::*;
    use When::*;
    &[
        row(Produce, "kinesis:DescribeStreamSummary", Stream, Granted),
        row(Produce, "kinesis:ListShards", Stream, Granted),
        row(Produce, "kinesis:PutRecords", Stream, Always),
        row(Consume, "kinesis:DescribeStreamSummary", Stream, Always),
        row(Consume, "kinesis:ListShards", Stream, Always),
        row(Consume, "kinesis:DescribeStreamConsumer", Consumer, FanOut),
        row(Consume, "kinesis:RegisterStreamConsumer", Stream, Missing),
        row(Consume, "kinesis:SubscribeToShard", Consumer, FanOut),
        row(Consume, "kinesis:GetShardIterator", Stream, Polling),
        row(Consume, "kinesis:GetRecords", Stream, Polling),
        row(Consume, "dynamodb:DescribeTable", LeaseTable, Always),
        row(Consume, "dynamodb:CreateTable", LeaseTable, Missing),
        row(Consume, "dynamodb:Scan", LeaseTable, Always),
        row(Consume, "dynamodb:GetItem", LeaseTable, Always),
        row(Consume, "dynamodb:PutItem", LeaseTable, Always),
        row(Consume, "dynamodb:UpdateItem", LeaseTable, Always),
        row(Consume, "dynamodb:DeleteItem", LeaseTable, Always),
        row(Consume, "s3:ListBucket", StateBucket, Always),
        row(Consume, "s3:GetObject", StateObjects, Always),
        row(Consume, "s3:PutObject", StateObjects, Always),
        row(Consume, "s3:ListBucket", ArchiveBucket, Always),
        row(Consume, "s3:GetObject", ArchiveObjects, Always),
        row(Consume, "s3:PutObject", ArchiveObjects, Always),
        row(Consume, "kinesis:DescribeStreamSummary", DeadLetterStream, Granted),
        row(Consume, "kinesis:PutRecords", DeadLetterStream, Always),
        row(Consume, "s3:ListBucket", DeadLetterBucket, Granted),
        row(Consume, "s3:PutObject", DeadLetterObjects, Always),
        row(Status, "kinesis:ListShards", Stream, Always),
        row(Status, "kinesis:DescribeStreamSummary", Stream, Several),
        row(Status, "kinesis:GetShardIterator", Stream, Asked),
        row(Status, "kinesis:GetRecords", Stream, Asked),
        row(Status, "dynamodb:Scan", LeaseTable, Always),
        row(Status, "s3:ListBucket", StateBucket, Always),
        row(Status, "s3:GetObject", StateObjects, Always),
        row(Lease, "kinesis:ListShards", Stream, Always),
        row(Lease, "kinesis:DescribeStreamSummary", Stream, Several),
        row(Lease, "kinesis:GetShardIterator", Stream, Asked),
        row(Lease, "dynamodb:Scan", LeaseTable, Always),
        row(Lease, "dynamodb:GetItem", LeaseTable, Write),
        row(Lease, "dynamodb:PutItem", LeaseTable, Write),
        row(Lease, "dynamodb:UpdateItem", LeaseTable, Write),
        row(Lease, "s3:ListBucket", StateBucket, Always),
        row(Lease, "s3:GetObject", StateObjects, Always),
        row(Lease, "s3:PutObject", StateObjects, Write),
        row(Redrive, "kinesis:DescribeStreamSummary", Stream, Always),
        row(Redrive, "kinesis:PutRecords", Stream, Always),
        row(Redrive, "kinesis:ListShards", Stream, Always),
        row(Redrive, "kinesis:GetShardIterator", Stream, Always),
        row(Redrive, "kinesis:GetRecords", Stream, Always),
        row(Redrive, "kinesis:ListShards", DeadLetterStream, Always),
        row(Redrive, "kinesis:GetShardIterator", DeadLetterStream, Always),
        row(Redrive, "kinesis:GetRecords", DeadLetterStream, Always),
        row(Redrive, "s3:ListBucket", DeadLetterBucket, Always),
        row(Redrive, "s3:GetObject", DeadLetterObjects, Always),
        row(Redrive, "s3:PutObject", DeadLetterObjects, Always),
        row(Replay, "kinesis:DescribeStreamSummary", Stream, Always),
        row(Replay, "kinesis:ListShards", Stream, Always),
        row(Replay, "kinesis:DescribeStreamConsumer", Consumer, FanOut),
        row(Replay, "kinesis:RegisterStreamConsumer", Stream, Missing),
        row(Replay, "kinesis:SubscribeToShard", Consumer, FanOut),
        row(Replay, "kinesis:GetShardIterator", Stream, Polling),
        row(Replay, "kinesis:GetRecords", Stream, Polling),
    ]
};

const fn row(command: Command, action: &'static str, on: Resource, when: When) -> Permission {
    Permission { command, action, on, when }
}

/// The rows of a command.
pub fn of(command: Command) -> impl Iterator<Item = &'static Permission> {
    PERMISSIONS.iter().filter(move |permission| permission.command == command)
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Produce => "produce",
            Self::Consume => "consume",
            Self::Status => "status",
            Self::Lease => "lease",
            Self::Redrive => "redrive",
            Self::Replay => "replay",
        })
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stream => "the stream",
            Self::Consumer => "its fan-out consumer",
            Self::LeaseTable => "the lease table",
            Self::StateBucket => "the bucket of checkpoints",
            Self::StateObjects => "their objects",
            Self::ArchiveBucket => "the bucket of the archive",
            Self::ArchiveObjects => "its objects",
            Self::DeadLetterStream => "the stream of dead letters",
            Self::DeadLetterBucket => "the bucket of dead letters",
            Self::DeadLetterObjects => "the objects of dead letters",
        })
    }
}

impl When {
    /// In a few words; nothing for [`When::Always`].
    pub fn told(self) -> &'static str {
        match self {
            Self::Always => "",
            Self::FanOut => "for fan-out",
            Self::Polling => "for polling",
            Self::Missing => "unless it is there already",
            Self::Granted => "where granted",
            Self::Several => "for several streams",
            Self::Asked => "for `--lag`, or `--to` a sequence number",
            Self::Write => "with `--yes`",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fmt::Write as _, fs, path::Path};

    use super::*;

    /// The SDK's methods that the code calls, and the actions that IAM checks for them.
    const METHODS: &[(&str, &str)] = &[
        ("create_table", "dynamodb:CreateTable"),
        ("delete_item", "dynamodb:DeleteItem"),
        ("describe_stream_consumer", "kinesis:DescribeStreamConsumer"),
        ("describe_stream_summary", "kinesis:DescribeStreamSummary"),
        ("describe_table", "dynamodb:DescribeTable"),
        ("get_item", "dynamodb:GetItem"),
        ("get_object", "s3:GetObject"),
        ("get_records", "kinesis:GetRecords"),
        ("get_shard_iterator", "kinesis:GetShardIterator"),
        ("head_object", "s3:GetObject"),
        ("list_objects_v2", "s3:ListBucket"),
        ("list_shards", "kinesis:ListShards"),
        ("put_item", "dynamodb:PutItem"),
        ("put_object", "s3:PutObject"),
        ("put_records", "kinesis:PutRecords"),
        ("register_stream_consumer", "kinesis:RegisterStreamConsumer"),
        ("scan", "dynamodb:Scan"),
        ("subscribe_to_shard", "kinesis:SubscribeToShard"),
        ("update_item", "dynamodb:UpdateItem"),
    ];

    fn sources(folder: &Path, found: &mut Vec<(String, String)>) {
        for entry in fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            let name = path.to_string_lossy().into_owned();
            // Those talk to embedded servers.
            if name.ends_with("src/local") || name.ends_with("cli/demo.rs") {
                continue;
            }
            if path.is_dir() {
                sources(&path, found);
            } else if name.ends_with(".rs") {
                let text = fs::read_to_string(&path).expect("a file");
                let tests = ["\nmod tests {", "\nmod server_tests {", "\npub(crate) mod tests {"];
                let end = tests.iter().filter_map(|start| text.find(start)).min();
                let code = &text[..end.unwrap_or(text.len())];
                let lines = code.lines().map(str::trim).filter(|line| !line.starts_with("//"));
                found.push((name, lines.collect::<String>().replace(' ', "")));
            }
        }
    }

    /// The methods without arguments that are called on something named `client`.
    fn calls(code: &str) -> Vec<&str> {
        let of_client = code.split("client").skip(1);
        let called = of_client.filter_map(|rest| {
            let rest = rest.strip_prefix("()").unwrap_or(rest);
            let rest = rest.strip_prefix(".get()").unwrap_or(rest);
            rest.strip_prefix('.')?.split_once("()").map(|(method, _)| method)
        });
        called
            .filter(|method| method.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'))
            .filter(|method| !matches!(*method, "clone" | "reconnect" | "get" | "into"))
            .collect()
    }

    #[test]
    fn every_call_in_the_source_has_a_row_and_every_row_a_call() {
        let mut files = Vec::new();
        sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut files);
        let mut called = BTreeSet::new();
        for (file, code) in &files {
            let methods = calls(code);
            for method in &methods {
                let known = METHODS.iter().find(|(name, _)| name == method);
                let (_, action) = known.unwrap_or_else(|| {
                    panic!("{file} calls {method}: add it to METHODS, and its action to the table")
                });
                called.insert(*action);
            }
            // Each call is sent once: a client by another name would go unseen.
            let sent = code.matches(".send()").count();
            assert_eq!(sent, methods.len(), "{file} sends other calls than {methods:?}");
        }
        assert!(files.len() > 50, "{} files", files.len());
        let rows: BTreeSet<&str> = PERMISSIONS.iter().map(|row| row.action).collect();
        assert_eq!(called, rows);
        let known: BTreeSet<&str> = METHODS.iter().map(|(_, action)| *action).collect();
        assert_eq!(known, rows, "a method that nothing calls");
    }

    #[test]
    fn no_row_is_there_twice() {
        for (n, row) in PERMISSIONS.iter().enumerate() {
            let same = |other: &&Permission| {
                (other.command, other.action, other.on) == (row.command, row.action, row.on)
            };
            assert_eq!(PERMISSIONS[n + 1..].iter().find(same), None);
        }
    }

    #[test]
    fn the_documentation_has_the_table() {
        let mut table = String::from("| command | on | IAM actions |\n|---|---|---|\n");
        let groups: Vec<_> = PERMISSIONS.iter().map(|row| (row.command, row.on)).collect();
        let mut done = BTreeSet::new();
        for (command, on) in groups.into_iter().filter(|group| done.insert(*group)) {
            let actions: Vec<String> = of(command)
                .filter(|row| row.on == on)
                .map(|row| match row.when.told() {
                    "" => format!("`{}`", row.action),
                    when => format!("`{}` ({when})", row.action),
                })
                .collect();
            writeln!(table, "| `{command}` | {on} | {} |", actions.join(", ")).expect("a string");
        }
        let page = include_str!("../docs/security.md");
        assert!(page.contains(&table), "write this table into docs/security.md:\n{table}");
    }
}
