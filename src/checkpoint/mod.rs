//! How far a shard is finished, and where that is kept.
//!
//! [`Checkpoints`] names the place: the lease table, an object of S3 or a file. [`Checkpoint`] is what is kept
//! of a shard there, in the KCL's words; [`Tracker`] finds it when messages are finished in any order. The
//! rest is for a place that keeps state as well: a [`StateStore`] of one [`ShardState`] for each shard.
//!
//! A worker does all of it by [`WorkerBuilder::checkpoints`](crate::WorkerBuilder::checkpoints); this is for
//! tools that look at what is stored. The rows of the lease table are in [`lease`](crate::lease).

mod document;
mod file;
mod held;
mod place;
mod s3;
mod state;
mod tracker;

use std::{cmp::Ordering, fmt};

pub use document::Saved;
pub use place::Checkpoints;
pub use state::{Move, ShardState, StateDocument, StateError, StateStore, Writer};
pub use tracker::Tracker;

use crate::shard::SequenceNumber;

/// The point in a shard up to which everything has been handled, or, before anything was, where
/// reading starts. The words and their order are those of the KCL's lease table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Checkpoint {
    /// Start at a point in time. The table has no place for it in the KCL's own attributes; the lease
    /// carries it beside them.
    AtTimestamp,
    /// Start with the oldest record kept.
    TrimHorizon,
    /// Start with what arrives from now on.
    Latest,
    /// Everything up to and including this position is finished.
    At(Position),
    /// The shard is closed and finished.
    ShardEnd,
}

/// A finished position: the record, and within an aggregated record the last finished user record.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// The record.
    pub sequence_number: SequenceNumber,
    /// The last finished user record of a KPL aggregate; 0 for any other record.
    pub sub_sequence_number: u64,
}

impl Checkpoint {
    /// Reads the two attributes of the lease table. `None` for a text that is neither a sequence
    /// number nor one of the KCL's words.
    pub fn parse(text: &str, sub_sequence_number: u64) -> Option<Self> {
        Some(match text {
            "AT_TIMESTAMP" => Self::AtTimestamp,
            "TRIM_HORIZON" => Self::TrimHorizon,
            "LATEST" => Self::Latest,
            "SHARD_END" => Self::ShardEnd,
            number => Self::At(Position {
                sequence_number: SequenceNumber::parse(number)?,
                sub_sequence_number,
            }),
        })
    }

    /// The text of the table's `checkpoint` attribute.
    pub fn as_str(&self) -> &str {
        match self {
            Self::AtTimestamp => "AT_TIMESTAMP",
            Self::TrimHorizon => "TRIM_HORIZON",
            Self::Latest => "LATEST",
            Self::At(position) => position.sequence_number.as_str(),
            Self::ShardEnd => "SHARD_END",
        }
    }

    /// The number of the table's `checkpointSubSequenceNumber` attribute.
    pub fn sub_sequence_number(&self) -> u64 {
        match self {
            Self::At(position) => position.sub_sequence_number,
            _ => 0,
        }
    }

    fn rank(&self) -> u8 {
        match self {
            Self::AtTimestamp => 0,
            Self::TrimHorizon => 1,
            Self::Latest => 2,
            Self::At(_) => 3,
            Self::ShardEnd => 4,
        }
    }
}

impl Ord for Checkpoint {
    fn cmp(&self, other: &Self) -> Ordering {
        match (self, other) {
            (Self::At(a), Self::At(b)) => a.cmp(b),
            _ => self.rank().cmp(&other.rank()),
        }
    }
}

impl PartialOrd for Checkpoint {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())?;
        match self.sub_sequence_number() {
            0 => Ok(()),
            sub => write!(f, "/{sub}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p3_checkpoints_order_as_the_kcl_orders_them() {
        let ascending = [
            Checkpoint::parse("AT_TIMESTAMP", 0),
            Checkpoint::parse("TRIM_HORIZON", 0),
            Checkpoint::parse("LATEST", 0),
            Checkpoint::parse("9", 0),
            Checkpoint::parse("9", 3),
            Checkpoint::parse("10", 0),
            Checkpoint::parse("SHARD_END", 0),
        ]
        .map(|c| c.expect("a checkpoint"));
        assert!(ascending.is_sorted(), "{ascending:?}");
    }

    #[test]
    fn what_is_written_reads_back() {
        for (text, sub) in [("LATEST", 0), ("SHARD_END", 0), ("4959033827149025660", 7)] {
            let checkpoint = Checkpoint::parse(text, sub).expect("a checkpoint");
            assert_eq!((checkpoint.as_str(), checkpoint.sub_sequence_number()), (text, sub));
        }
        assert_eq!(Checkpoint::parse("NOWHERE", 0), None);
    }
}
