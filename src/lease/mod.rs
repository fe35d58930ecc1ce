//! Who reads which shard.
//!
//! A lease is a row of a DynamoDB table, laid out as the Java KCL lays it out, so that a KCL fleet can
//! stop and a Tramline fleet go on from its table, or the reverse. Every write carries the counter
//! that it saw and raises it by one, so of two writers one is refused.

pub mod dynamodb;
pub mod plan;

use std::collections::BTreeSet;

use jiff::Timestamp;

use crate::{
    aws::AwsError,
    checkpoint::Checkpoint,
    shard::{HashKeyRange, Shard, ShardId},
};

/// One row of the lease table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The shard that it is for; also the row's key.
    pub shard: ShardId,
    /// The worker that reads the shard; `None` if nobody does.
    pub owner: Option<String>,
    /// Raised by one with every write of an owner: the heartbeat, and the lock against a second
    /// writer.
    pub counter: u64,
    /// How often the lease moved to another worker since the last checkpoint.
    pub owner_switches_since_checkpoint: u64,
    /// How far the shard is finished, or where it starts.
    pub checkpoint: Checkpoint,
    /// Where reading started or is to start, for the checkpoints `LATEST` and `AT_TIMESTAMP`. The KCL
    /// has no attribute for it and leaves ours alone.
    pub start_at: Option<Timestamp>,
    /// During a graceful hand-over between KCL 3.x workers: the one that may still checkpoint.
    pub checkpoint_owner: Option<String>,
    /// The shards that must be finished before this one may start.
    pub parents: BTreeSet<ShardId>,
    /// The shards that follow it, once it has ended.
    pub children: BTreeSet<ShardId>,
    /// The keys that the shard takes.
    pub hash_key_range: Option<HashKeyRange>,
}

impl Lease {
    /// A lease for a shard that nobody has read yet.
    pub fn new(shard: &Shard, checkpoint: Checkpoint, start_at: Option<Timestamp>) -> Self {
        Self {
            shard: shard.id.clone(),
            owner: None,
            counter: 0,
            owner_switches_since_checkpoint: 0,
            checkpoint,
            start_at,
            checkpoint_owner: None,
            parents: shard.parents.iter().cloned().collect(),
            children: BTreeSet::new(),
            hash_key_range: shard.hash_key_range,
        }
    }

    /// The lease as `change` leaves it.
    pub fn after(&self, change: &Change) -> Self {
        let mut lease = Self { counter: self.counter + 1, ..self.clone() };
        match change {
            Change::Renew => {}
            Change::Take { worker } => {
                let moved = [&self.owner, &self.checkpoint_owner]
                    .into_iter()
                    .flatten()
                    .any(|other| other != worker);
                lease.owner_switches_since_checkpoint += u64::from(moved);
                lease.owner = Some(worker.clone());
                lease.checkpoint_owner = None;
            }
            Change::Pin { start_at } => lease.start_at = Some(*start_at),
            Change::Checkpoint { checkpoint } => lease.set_checkpoint(checkpoint),
            Change::End { children } => {
                lease.set_checkpoint(&Checkpoint::ShardEnd);
                lease.children.extend(children.iter().cloned());
                lease.owner = None;
            }
            Change::Release { checkpoint } => {
                if let Some(checkpoint) = checkpoint {
                    lease.set_checkpoint(checkpoint);
                }
                lease.owner = None;
            }
        }
        lease
    }

    fn set_checkpoint(&mut self, checkpoint: &Checkpoint) {
        self.checkpoint = checkpoint.clone();
        self.owner_switches_since_checkpoint = 0;
    }
}

/// What an owner, or a worker that becomes one, does to a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Show that the owner is alive.
    Renew,
    /// Become the owner.
    Take {
        /// The new owner.
        worker: String,
    },
    /// Note where reading starts, before the first record of a shard is read.
    Pin {
        /// The point in time.
        start_at: Timestamp,
    },
    /// Store how far the shard is finished.
    Checkpoint {
        /// The new checkpoint.
        checkpoint: Checkpoint,
    },
    /// The shard is finished: store that, and let go.
    End {
        /// The shards that follow it.
        children: BTreeSet<ShardId>,
    },
    /// Let go, with a last checkpoint if there is something new, in one write.
    Release {
        /// The last checkpoint.
        checkpoint: Option<Checkpoint>,
    },
}

/// Why a lease could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LeaseError {
    /// Another worker has written the lease since we read it.
    #[error(
        "the lease of shard {shard} was written by another worker{}",
        owner.as_ref().map_or(String::new(), |owner| format!(" and belongs to {owner}"))
    )]
    Lost {
        /// The shard.
        shard: ShardId,
        /// The owner now, where DynamoDB told.
        owner: Option<String>,
    },
    /// DynamoDB failed or refused.
    #[error("lease table {table}: {source}")]
    Table {
        /// The table.
        table: String,
        /// What DynamoDB said.
        source: AwsError,
    },
    /// A row of the table is a lease but cannot be read as one.
    #[error(
        "lease table {table}, row {row}: attribute {attribute} is missing or has the wrong type; \
         repair the row, or delete it to read the shard from its start position again"
    )]
    Row {
        /// The table.
        table: String,
        /// The row's key.
        row: String,
        /// The attribute.
        attribute: &'static str,
    },
    /// The table could not be used in time after it was created.
    #[error("lease table {table} was created but is not active after {waited_secs} s; try again")]
    NotActive {
        /// The table.
        table: String,
        /// How long we waited.
        waited_secs: u64,
    },
}
