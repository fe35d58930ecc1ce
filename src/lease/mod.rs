//! Who reads which shard.
//!
//! A lease is a row of a DynamoDB table, laid out as the Java KCL lays it out, so that a KCL fleet can
//! stop and a Tramline fleet go on from its table, or the reverse. Every write carries the counter
//! that it saw and raises it by one, so of two writers one is refused.
//!
//! For tools, and for tests that put a fleet into one process: a service has its [`Worker`](crate::Worker),
//! which does all of this by itself. What is decided is in [`plan`], which is pure; [`LeaseLoop`] asks it and
//! does what it says, on a [`LeaseStore`]: [`dynamodb`] or a [`MemoryTable`]. [`overview`] says how a fleet
//! is, [`reset`] moves checkpoints and frees leases. The reading of shards is not here.

#[cfg(test)]
mod deaf;
pub mod dynamodb;
mod held;
mod lease_loop;
mod memory;
mod missing;
pub mod overview;
pub mod plan;
pub mod reset;
pub mod stored;

use std::collections::BTreeSet;

use jiff::Timestamp;

pub use held::HeldLease;
pub use lease_loop::{FINISHED_KEPT_FOR, LeaseLoop, Looked, Settings, create_missing};
pub use memory::{MemoryTable, Requests};
pub use missing::{InitialPosition, missing_leases, outlived};

use crate::{
    aws::AwsError,
    checkpoint::Checkpoint,
    shard::{HashKeyRange, SequenceNumber, Shard, ShardId},
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
    /// During a graceful hand-over: the worker that still reads the shard. `owner` is then the one that
    /// waits for it.
    pub checkpoint_owner: Option<String>,
    /// The shards that must be finished before this one may start.
    pub parents: BTreeSet<ShardId>,
    /// The shards that follow it, once it has ended.
    pub children: BTreeSet<ShardId>,
    /// The keys that the shard takes.
    pub hash_key_range: Option<HashKeyRange>,
    /// The row is there but cannot be read as a lease. It is nobody's to take, and blocks what waits for
    /// its shard.
    pub unreadable: bool,
    /// Raised to make workers that only watch this row look at the whole table. Ours; the KCL leaves
    /// it alone.
    pub bell: u64,
    /// What a reader noted about itself; see [`current_note`](Self::current_note).
    pub note: Option<ReaderNote>,
}

/// What the reader of a shard notes beside its lease, for those who look at the table. Ours: nothing is
/// decided by it, and the KCL leaves it alone, so it may be that of an earlier reader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReaderNote {
    /// The worker that wrote it.
    pub reader: String,
    /// When it took the lease, by its own clock, in whole milliseconds.
    pub since: Timestamp,
    /// The lease's counter then.
    pub from_counter: u64,
    /// What last kept it from getting on.
    pub trouble: Option<Trouble>,
}

/// What kept a reader from getting on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// In words, for the person who looks at the table.
    pub text: String,
    /// Since when, by the reader's clock, in whole milliseconds.
    pub at: Timestamp,
    /// Whether it gets on again.
    pub is_over: bool,
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
            unreadable: false,
            bell: 0,
            note: None,
        }
    }

    /// The worker that reads the shard: during a hand-over still the old one.
    pub fn reader(&self) -> Option<&str> {
        self.checkpoint_owner.as_deref().or(self.owner.as_deref())
    }

    /// What the present reader noted.
    pub fn current_note(&self) -> Option<&ReaderNote> {
        self.note.as_ref().filter(|note| self.reader() == Some(&note.reader))
    }

    /// Whether the shard is finished.
    pub fn is_finished(&self) -> bool {
        self.checkpoint == Checkpoint::ShardEnd
    }

    /// The lease as `change` leaves it.
    #[must_use]
    pub fn after(&self, change: &Change) -> Self {
        let mut lease = Self { counter: self.counter.saturating_add(1), ..self.clone() };
        match change {
            Change::Renew => {}
            Change::Note { trouble } => {
                if let Some(note) = &mut lease.note {
                    note.trouble = Some(trouble.clone());
                }
            }
            Change::Take { worker, at } => {
                let moved = self.reader().is_some_and(|reader| reader != worker);
                lease.owner_switches_since_checkpoint += u64::from(moved);
                lease.owner = Some(worker.clone());
                lease.checkpoint_owner = None;
                lease.note = Some(ReaderNote {
                    reader: worker.clone(),
                    since: whole_millis(*at),
                    from_counter: lease.counter,
                    trouble: None,
                });
            }
            Change::Ask { worker } => {
                // As the KCL's leader does it: the counter stays, so the reader's next renewal
                // succeeds, and shows it that it was asked.
                lease.counter = self.counter;
                lease.checkpoint_owner = self.owner.clone();
                lease.owner = Some(worker.clone());
            }
            Change::Free => {
                lease.owner = None;
                lease.checkpoint_owner = None;
            }
            Change::Pin { start_at } => lease.start_at = Some(*start_at),
            Change::Checkpoint { checkpoint } => lease.set_checkpoint(checkpoint),
            Change::Reset { checkpoint, start_at } => {
                lease.set_checkpoint(checkpoint);
                lease.start_at = *start_at;
                lease.owner = None;
                lease.checkpoint_owner = None;
            }
            Change::End { children } => {
                lease.set_checkpoint(&Checkpoint::ShardEnd);
                lease.children.extend(children.iter().cloned());
                lease.owner = None;
                lease.checkpoint_owner = None;
            }
            Change::Release { checkpoint } => {
                if let Some(checkpoint) = checkpoint {
                    lease.set_checkpoint(checkpoint);
                }
                if lease.checkpoint_owner.take().is_none() {
                    lease.owner = None;
                }
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
    /// The same, and note what keeps it from getting on, or that it does again.
    Note {
        /// The trouble.
        trouble: Trouble,
    },
    /// Become the owner.
    Take {
        /// The new owner.
        worker: String,
        /// The time now, which is noted for those who look at the table.
        at: Timestamp,
    },
    /// Ask the owner to hand the lease over: it finishes its batch, checkpoints and lets go.
    Ask {
        /// The worker that asks.
        worker: String,
    },
    /// Take it from a dead worker, for nobody yet.
    Free,
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
    /// Move the checkpoint by an operator's hand, also back, and take the lease from whoever has it.
    Reset {
        /// The new checkpoint.
        checkpoint: Checkpoint,
        /// The point in time that belongs to `LATEST` and `AT_TIMESTAMP`.
        start_at: Option<Timestamp>,
    },
    /// The shard is finished: store that, and let go.
    End {
        /// The shards that follow it.
        children: BTreeSet<ShardId>,
    },
    /// Let go, with a last checkpoint if there is something new, in one write. During a hand-over the
    /// lease goes to the worker that asked, else to nobody.
    Release {
        /// The last checkpoint.
        checkpoint: Option<Checkpoint>,
    },
}

/// A time as the table keeps it.
pub(crate) fn whole_millis(at: Timestamp) -> Timestamp {
    Timestamp::from_millisecond(at.as_millisecond()).unwrap_or(at)
}

/// Where leases are kept: DynamoDB, or memory for tests.
///
/// Reads are consistent; writes to one row happen one after the other.
pub trait LeaseStore: Clone + Send + Sync + 'static {
    /// Its name, for the log.
    fn name(&self) -> &str;

    /// Every lease.
    fn scan(&self) -> impl Future<Output = Result<Vec<Lease>, LeaseError>> + Send;

    /// One lease.
    fn get(
        &self,
        shard: &ShardId,
    ) -> impl Future<Output = Result<Option<Lease>, LeaseError>> + Send;

    /// Adds a lease. Tells `false` if the shard has one already, which is left as it is.
    fn create(&self, lease: &Lease) -> impl Future<Output = Result<bool, LeaseError>> + Send;

    /// Writes a change to a lease that was last seen as `seen`, and gives the lease as it is then.
    /// Refused with [`LeaseError::Lost`] if another worker wrote the lease since.
    ///
    /// `seen` moves on to what the row turns out to be while it is ours, also if the write then fails:
    /// of two writes whose answers get lost, the second stands on the first.
    fn update(
        &self,
        seen: &mut Lease,
        change: &Change,
    ) -> impl Future<Output = Result<Lease, LeaseError>> + Send;

    /// Removes a lease that nobody wrote since it was last seen as `seen`.
    fn delete(&self, seen: &Lease) -> impl Future<Output = Result<(), LeaseError>> + Send;

    /// Raises the bell of a lease, whatever its state is. No lease, no bell.
    fn ring(&self, shard: &ShardId) -> impl Future<Output = Result<(), LeaseError>> + Send;
}

/// What a refused write means, given the row as it is now.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is written: an earlier attempt got there.
    Landed(Lease),
    /// The lease is still ours, one write further than we saw: write again, on top of this.
    WriteOver(Lease),
    /// Another worker wrote it.
    Lost {
        /// The owner now.
        owner: Option<String>,
    },
    /// Its row was deleted.
    Gone,
}

/// Decides what a refused write means.
///
/// Only a reader raises the counter and stays the reader. So if the row is what we wanted, or still
/// read by the same worker and one further than we saw, an earlier write of ours got there and its
/// answer did not. A worker that asks for the lease changes the owner but not the counter; only a
/// release, which has to know the new owner, is refused for that.
///
/// Others may have written on top of what we wrote without hearing of it: the reader that we asked renews
/// or lets go, and what we released is taken. Nobody but us makes us the owner of what another worker
/// reads, and a release has got where it was to get if the lease is another worker's and the checkpoint
/// not behind ours.
pub(crate) fn verdict(seen: &Lease, change: &Change, now: Option<Lease>) -> Verdict {
    let wanted = seen.after(change);
    // A newer checkpoint than ours comes from another process under our name: it must not go back (P3).
    let behind =
        |now: &Lease| wanted.checkpoint != seen.checkpoint && now.checkpoint > wanted.checkpoint;
    let writes_as_reader = !matches!(
        change,
        Change::Take { .. } | Change::Ask { .. } | Change::Free | Change::Reset { .. }
    );
    let asked = |now: &Lease| {
        matches!(change, Change::Ask { .. }) && now.owner == wanted.owner && now.owner != seen.owner
    };
    let released = |now: &Lease| {
        matches!(change, Change::Release { .. })
            && now.reader() != seen.reader()
            && now.checkpoint >= wanted.checkpoint
    };
    match now {
        Some(now)
            if Lease { bell: wanted.bell, ..now.clone() } == wanted
                || asked(&now)
                || released(&now) =>
        {
            Verdict::Landed(now)
        }
        Some(now)
            if writes_as_reader
                && now.reader().is_some()
                && now.reader() == seen.reader()
                && !behind(&now)
                && (now.counter == seen.counter.saturating_add(1)
                    || (now.counter == seen.counter && now.owner != seen.owner)) =>
        {
            Verdict::WriteOver(now)
        }
        Some(now) => Verdict::Lost { owner: now.owner },
        None => Verdict::Gone,
    }
}

/// Whether a row may be changed by a worker that last saw it as `seen`. DynamoDB decides the same by
/// the write's condition.
pub(crate) fn may_write(seen: &Lease, change: &Change, row: &Lease) -> bool {
    row.counter == seen.counter
        && match change {
            Change::Ask { .. } => row.owner == seen.owner && row.checkpoint_owner.is_none(),
            Change::Release { .. } => row.checkpoint_owner == seen.checkpoint_owner,
            _ => true,
        }
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
    /// The row of a lease that we hold is not there any more.
    #[error("the lease of shard {shard} was deleted from the table")]
    Gone {
        /// The shard.
        shard: ShardId,
    },
    /// DynamoDB failed or refused.
    #[error("lease table {table}: {source}")]
    Table {
        /// The table.
        table: String,
        /// What DynamoDB said.
        source: AwsError,
    },
    /// There is no such table.
    #[error(
        "lease table {table} does not exist: it was deleted, or never made; a worker that starts makes \
         it, and then every shard is read from the start position"
    )]
    NoTable {
        /// The table.
        table: String,
    },
    /// The leases are those of another stream.
    #[error(
        "shard {shard} begins at sequence number {begins}, after the checkpoint {checkpoint} of its \
         lease in table {table}: the stream was deleted and made again under its name; read it as \
         another application, or with another lease table, or delete the rows of this one"
    )]
    Outlived {
        /// The table.
        table: String,
        /// The shard.
        shard: ShardId,
        /// Where it begins now.
        begins: SequenceNumber,
        /// Where its lease stands.
        checkpoint: Checkpoint,
    },
    /// The table is that of an application that reads one stream where this one reads several, or the
    /// reverse: the keys differ, so the streams would be started over.
    #[error(
        "lease table {table} has the lease {key}, of an application that reads {}; this one reads {}, \
         names its leases in another way, and would start over: read as another application, or with \
         another lease table",
        if *.several { "several streams" } else { "one stream" },
        if *.several { "one" } else { "several" }
    )]
    OtherKeys {
        /// The table.
        table: String,
        /// The key of one such row.
        key: ShardId,
        /// Whether the row is that of one of several streams.
        several: bool,
    },
    /// A row of the table is a lease but cannot be read as one.
    #[error(
        "lease table {table}, row {row}: attribute {attribute} is missing or has the wrong type; \
         the shard and those that follow it are not read until the row is repaired"
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
    #[error(
        "lease table {table} is not active after {waited_secs} s; look at its state, and try again"
    )]
    NotActive {
        /// The table.
        table: String,
        /// How long we waited.
        waited_secs: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(owner: Option<&str>, counter: u64) -> Lease {
        let shard = Shard {
            id: "a".into(),
            parents: vec![],
            hash_key_range: None,
            closed: false,
            begins: None,
        };
        Lease {
            owner: owner.map(str::to_owned),
            counter,
            ..Lease::new(&shard, Checkpoint::TrimHorizon, None)
        }
    }

    fn judged(seen: &Lease, change: &Change, now: Option<Lease>) -> Verdict {
        verdict(seen, change, now)
    }

    #[test]
    fn p4_a_write_whose_answer_got_lost_does_not_cost_the_lease() {
        let seen = lease(Some("me"), 4);
        let renewed = lease(Some("me"), 5);
        assert_eq!(
            judged(&seen, &Change::Renew, Some(renewed.clone())),
            Verdict::Landed(renewed.clone())
        );
        let checkpoint = Change::Checkpoint { checkpoint: Checkpoint::ShardEnd };
        assert_eq!(
            judged(&seen, &checkpoint, Some(renewed.clone())),
            Verdict::WriteOver(renewed),
            "an earlier renewal landed: the checkpoint goes on top of it"
        );
    }

    #[test]
    fn p3_a_checkpoint_does_not_go_back_behind_that_of_another_process_of_the_same_name() {
        let at = |number| Checkpoint::parse(number, 0).expect("a checkpoint");
        let seen = lease(Some("me"), 4);
        let newer = seen.after(&Change::Checkpoint { checkpoint: at("9") });
        let older = Change::Checkpoint { checkpoint: at("8") };
        let lost = Verdict::Lost { owner: Some("me".into()) };
        assert_eq!(judged(&seen, &older, Some(newer.clone())), lost);
        let later = Change::Checkpoint { checkpoint: at("10") };
        assert_eq!(judged(&seen, &later, Some(newer.clone())), Verdict::WriteOver(newer));
    }

    #[test]
    fn p4_a_lease_that_another_worker_wrote_is_lost() {
        let seen = lease(Some("me"), 4);
        let taken = Some(lease(Some("other"), 5));
        let lost = Verdict::Lost { owner: Some("other".into()) };
        assert_eq!(judged(&seen, &Change::Renew, taken), lost);
        assert_eq!(judged(&seen, &Change::Renew, None), Verdict::Gone);
        let taken_back = Some(lease(Some("me"), 6));
        let lost = Verdict::Lost { owner: Some("me".into()) };
        assert_eq!(judged(&seen, &Change::Renew, taken_back), lost, "lost in between");
    }

    #[test]
    fn p6_an_ask_whose_answer_got_lost_is_known_again_whatever_the_reader_did_since() {
        let read_by_a = lease(Some("a"), 4);
        let ask = Change::Ask { worker: "b".into() };
        let renewed = read_by_a.after(&ask).after(&Change::Renew);
        assert_eq!(
            judged(&read_by_a, &ask, Some(renewed.clone())),
            Verdict::Landed(renewed.clone())
        );
        let let_go = renewed.after(&Change::Release { checkpoint: None });
        assert_eq!(judged(&read_by_a, &ask, Some(let_go.clone())), Verdict::Landed(let_go));
        let asked_by_another = read_by_a.after(&Change::Ask { worker: "c".into() });
        let lost = Verdict::Lost { owner: Some("c".into()) };
        assert_eq!(judged(&read_by_a, &ask, Some(asked_by_another)), lost);
    }

    #[test]
    fn p6_a_release_whose_answer_got_lost_is_known_again_after_another_worker_took_the_lease() {
        let at = |number| Checkpoint::parse(number, 0).expect("a checkpoint");
        let take = Change::Take { worker: "b".into(), at: Timestamp::UNIX_EPOCH };
        let seen = lease(Some("a"), 4);
        let release = Change::Release { checkpoint: Some(at("7")) };
        let taken = seen.after(&release).after(&take);
        assert_eq!(judged(&seen, &release, Some(taken.clone())), Verdict::Landed(taken));
        let lost = Verdict::Lost { owner: Some("b".into()) };
        assert_eq!(judged(&seen, &release, Some(seen.after(&take))), lost, "7 is not stored");
    }

    #[test]
    fn p4_a_taker_does_not_take_from_an_owner_that_renewed_in_time() {
        let seen = lease(Some("other"), 4);
        let renewed = Some(lease(Some("other"), 5));
        let lost = Verdict::Lost { owner: Some("other".into()) };
        assert_eq!(
            judged(
                &seen,
                &Change::Take { worker: "me".into(), at: Timestamp::UNIX_EPOCH },
                renewed
            ),
            lost
        );
    }

    #[test]
    fn p4_a_reset_takes_the_lease_from_its_reader_and_never_writes_over_it() {
        let seen = lease(Some("a"), 4).after(&Change::Ask { worker: "b".into() });
        let start_at = Some(Timestamp::UNIX_EPOCH);
        let reset = Change::Reset { checkpoint: Checkpoint::Latest, start_at };
        let after = seen.after(&reset);
        assert_eq!((after.reader(), after.counter), (None, 5));
        assert_eq!((&after.checkpoint, after.start_at), (&Checkpoint::Latest, start_at));
        let lost = Verdict::Lost { owner: Some("b".into()) };
        assert_eq!(judged(&seen, &reset, Some(seen.after(&Change::Renew))), lost);
        let lost = Verdict::Lost { owner: None };
        assert_eq!(judged(&seen, &Change::Renew, Some(after)), lost, "the reader learns of it");
    }

    #[test]
    fn a_note_is_of_use_only_while_it_names_the_reader() {
        let at = Timestamp::UNIX_EPOCH;
        let taken = lease(None, 4).after(&Change::Take { worker: "me".into(), at });
        let trouble = Trouble { text: "the database is away".into(), at, is_over: false };
        let troubled = taken.after(&Change::Note { trouble: trouble.clone() });
        let note = troubled.current_note().expect("my note");
        assert_eq!((note.from_counter, note.since), (5, at));
        assert_eq!(note.trouble, Some(trouble));
        let by_kcl = Lease { owner: Some("other".into()), ..troubled };
        assert_eq!(by_kcl.current_note(), None, "a worker that writes no notes took it");
    }

    #[test]
    fn p6_a_hand_over_goes_through_the_reader() {
        let read_by_a = lease(Some("a"), 4);
        let asked = read_by_a.after(&Change::Ask { worker: "b".into() });
        assert_eq!((asked.owner.as_deref(), asked.reader()), (Some("b"), Some("a")));
        assert_eq!(asked.counter, 4, "the reader's renewals go on to succeed");
        let let_go = asked.after(&Change::Release { checkpoint: None });
        assert_eq!((let_go.owner.as_deref(), let_go.reader()), (Some("b"), Some("b")));
    }

    #[test]
    fn p6_a_reader_that_does_not_know_yet_that_it_was_asked_releases_to_the_one_that_asked() {
        let read_by_a = lease(Some("a"), 4);
        let asked = read_by_a.after(&Change::Ask { worker: "b".into() });
        let release = Change::Release { checkpoint: None };
        assert!(!may_write(&read_by_a, &release, &asked));
        assert_eq!(judged(&read_by_a, &release, Some(asked.clone())), Verdict::WriteOver(asked));
    }
}
