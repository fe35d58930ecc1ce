//! Moves checkpoints and frees leases by an operator's hand.
//!
//! What is to be written is decided by [`plan_reset`] and [`plan_release`], which are pure;
//! [`write_reset`] and [`write_release`] do it by conditional writes.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;

use super::{
    Change, Lease, LeaseError, LeaseStore, missing::ancestors, plan::bell_row, whole_millis,
};
use crate::{
    checkpoint::{Checkpoint, Move, Position, Saved},
    shard::{SequenceNumber, Shard, ShardId},
};

/// How often a forced write is tried when the reader writes in between, every few seconds.
const FORCED_ATTEMPTS: u32 = 5;

/// Where reading is to go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ResetTo {
    /// With what arrives from now on.
    Latest {
        /// The time that stands for now: written beside `LATEST`, so that nothing is skipped between
        /// the reset and the first read.
        from: Timestamp,
    },
    /// With the oldest record kept.
    TrimHorizon,
    /// With the first record that arrived at or after this time.
    Time(Timestamp),
    /// After the record that has this number, which counts as finished.
    SequenceNumber(SequenceNumber),
}

impl ResetTo {
    fn checkpoint(&self) -> (Checkpoint, Option<Timestamp>) {
        match self {
            Self::Latest { from } => (Checkpoint::Latest, Some(whole_millis(*from))),
            Self::TrimHorizon => (Checkpoint::TrimHorizon, None),
            Self::Time(at) => (Checkpoint::AtTimestamp, Some(whole_millis(*at))),
            Self::SequenceNumber(number) => {
                let sequence_number = number.clone();
                let position = Position { sequence_number, sub_sequence_number: 0 };
                (Checkpoint::At(position), None)
            }
        }
    }
}

/// One row that a reset writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rewrite {
    /// The row as it is; `None` if there is none.
    pub seen: Option<Lease>,
    /// The row as it will be.
    pub wanted: Lease,
    /// The shard was not named, but comes after one that was.
    pub follows: bool,
}

/// Why a reset or a release is not possible.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ResetError {
    /// A named shard does not exist.
    #[error("the stream has no shard {shard}; `tramline status` lists those that it has")]
    NoShard {
        /// The shard.
        shard: ShardId,
    },
    /// A named shard has no lease.
    #[error(
        "shard {shard} has no lease yet: a worker makes it at its start position; to make all leases \
         now, reset without --shard"
    )]
    NoLease {
        /// The shard.
        shard: ShardId,
    },
    /// The row of an affected lease cannot be read.
    #[error("the lease of shard {shard} cannot be read; repair or delete its row first")]
    Unreadable {
        /// The shard.
        shard: ShardId,
    },
    /// A sequence number is one of one shard.
    #[error("a sequence number belongs to one shard: name it with one --shard")]
    OneShard,
    /// The time has not come.
    #[error("{at} is in the future; choose a time that has passed, or latest")]
    Future {
        /// The time.
        at: Timestamp,
    },
}

/// The rows that a reset of the shards `only` writes, or of all if that is empty; parents first, so
/// that at no moment a child may start before its parent is read again (P5).
///
/// - What follows a shard that is read again is read again after it: a descendant is reset with it, to
///   the same time, or else to its first record. `latest` reads nothing again and moves no descendant.
/// - A shard that was finished and whose lease was deleted gets one again. A shard that no worker knows
///   yet gets one only in a reset of all: the lease of a shard says that its ancestors are finished,
///   unless they have leases too.
/// - From `latest`, what is finished stays so.
/// - Leases of shards that the stream does not list any more stay as they are.
///
/// `saved` is what documents have of shards, where each has its own: a lease that is made again goes on
/// with the counter there, or its document would refuse the new owner.
pub fn plan_reset(
    listed: &[Shard],
    leases: &[Lease],
    saved: &BTreeMap<ShardId, Saved>,
    only: &BTreeSet<ShardId>,
    to: &ResetTo,
    now: Timestamp,
) -> Result<Vec<Rewrite>, ResetError> {
    let by_id: BTreeMap<&ShardId, &Shard> = listed.iter().map(|s| (&s.id, s)).collect();
    let leased: BTreeMap<&ShardId, &Lease> = leases.iter().map(|l| (&l.shard, l)).collect();
    match to {
        ResetTo::Time(at) if *at > now => return Err(ResetError::Future { at: *at }),
        ResetTo::SequenceNumber(_) if only.len() != 1 => return Err(ResetError::OneShard),
        _ => {}
    }
    if let Some(shard) = only.iter().find(|shard| !by_id.contains_key(shard)) {
        return Err(ResetError::NoShard { shard: shard.clone() });
    }
    let forgotten = ancestors(leased.keys().copied(), &by_id);
    let is_latest = matches!(to, ResetTo::Latest { .. });

    let mut rewrites = Vec::new();
    for shard in listed {
        let before = ancestors([&shard.id], &by_id);
        let named = only.is_empty() || only.contains(&shard.id);
        let follows = !named && !is_latest && !before.is_disjoint(only);
        if !named && !follows {
            continue;
        }
        let (checkpoint, start_at) = match to {
            ResetTo::SequenceNumber(_) if follows => ResetTo::TrimHorizon.checkpoint(),
            to => to.checkpoint(),
        };
        let wanted = match leased.get(&shard.id) {
            Some(lease) if lease.unreadable => {
                return Err(ResetError::Unreadable { shard: shard.id.clone() });
            }
            Some(lease) if is_latest && lease.is_finished() => continue,
            Some(lease) => {
                let as_wanted = lease.checkpoint == checkpoint && lease.start_at == start_at;
                if as_wanted && lease.reader().is_none() {
                    continue;
                }
                lease.after(&Change::Reset { checkpoint, start_at })
            }
            None if is_latest && shard.closed => continue,
            None if only.is_empty() || forgotten.contains(&shard.id) => {
                let counter = saved.get(&shard.id).map_or(0, |saved| saved.lease_counter);
                Lease { counter, ..Lease::new(shard, checkpoint, start_at) }
            }
            None if named => return Err(ResetError::NoLease { shard: shard.id.clone() }),
            None => continue,
        };
        let seen = leased.get(&shard.id).map(|lease| (*lease).clone());
        rewrites.push((before.len(), Rewrite { seen, wanted, follows }));
    }
    rewrites.sort_by(|(a, one), (b, other)| {
        a.cmp(b).then_with(|| one.wanted.shard.cmp(&other.wanted.shard))
    });
    Ok(rewrites.into_iter().map(|(_, rewrite)| rewrite).collect())
}

/// The same for the documents that keep the checkpoints.
pub fn moves(rewrites: &[Rewrite]) -> Vec<Move> {
    let of_shard = |Rewrite { wanted, .. }: &Rewrite| Move {
        shard: wanted.shard.clone(),
        checkpoint: wanted.checkpoint.clone(),
        start_at: wanted.start_at,
    };
    rewrites.iter().map(of_shard).collect()
}

/// The leases that a release of the shards `only` frees, or of all if that is empty.
pub fn plan_release(leases: &[Lease], only: &BTreeSet<ShardId>) -> Result<Vec<Lease>, ResetError> {
    for shard in only {
        match leases.iter().find(|lease| lease.shard == *shard) {
            Some(lease) if lease.unreadable => {
                return Err(ResetError::Unreadable { shard: shard.clone() });
            }
            Some(_) => {}
            None => return Err(ResetError::NoLease { shard: shard.clone() }),
        }
    }
    let named = |lease: &&Lease| only.is_empty() || only.contains(&lease.shard);
    Ok(leases.iter().filter(named).filter(|lease| lease.reader().is_some()).cloned().collect())
}

/// Writes a reset, and makes the workers look. Refused with [`LeaseError::Lost`] where someone wrote
/// since, unless `force`. After an error the same reset can be planned and written again.
pub async fn write_reset<S: LeaseStore>(
    store: &S,
    leases: &[Lease],
    rewrites: &[Rewrite],
    force: bool,
) -> Result<(), LeaseError> {
    for Rewrite { seen, wanted, .. } in rewrites {
        let change =
            Change::Reset { checkpoint: wanted.checkpoint.clone(), start_at: wanted.start_at };
        match seen {
            Some(seen) => {
                write(store, seen, &change, force).await?;
            }
            None if store.create(wanted).await? => {}
            None if force => {
                let now = store.get(&wanted.shard).await?;
                let now = now.ok_or_else(|| LeaseError::Gone { shard: wanted.shard.clone() })?;
                write(store, &now, &change, force).await?;
            }
            None => return Err(LeaseError::Lost { shard: wanted.shard.clone(), owner: None }),
        }
    }
    ring(store, leases).await
}

/// Frees leases, and makes the workers look. Refused as [`write_reset`] is.
pub async fn write_release<S: LeaseStore>(
    store: &S,
    leases: &[Lease],
    held: &[Lease],
    force: bool,
) -> Result<(), LeaseError> {
    for lease in held {
        write(store, lease, &Change::Free, force).await?;
    }
    ring(store, leases).await
}

async fn write<S: LeaseStore>(
    store: &S,
    seen: &Lease,
    change: &Change,
    force: bool,
) -> Result<Lease, LeaseError> {
    let mut seen = seen.clone();
    let mut attempts = 1;
    loop {
        match store.update(&mut seen, change).await {
            Err(LeaseError::Lost { .. }) if force && attempts < FORCED_ATTEMPTS => {
                let now = store.get(&seen.shard).await?;
                seen = now.ok_or(LeaseError::Gone { shard: seen.shard })?;
                attempts += 1;
            }
            written => return written,
        }
    }
}

/// Rings the bell that workers watched before, and the one that they would choose now.
async fn ring<S: LeaseStore>(store: &S, before: &[Lease]) -> Result<(), LeaseError> {
    let sorted = |mut leases: Vec<Lease>| {
        leases.sort_by(|a, b| a.shard.cmp(&b.shard));
        leases
    };
    let (before, now) = (sorted(before.to_vec()), sorted(store.scan().await?));
    let rows: BTreeSet<&ShardId> =
        [bell_row(&before), bell_row(&now)].into_iter().flatten().collect();
    for row in rows {
        store.ring(row).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::MemoryTable;

    const NOW: &str = "2025-07-02T15:00:00Z";

    fn now() -> Timestamp {
        NOW.parse().expect("a time")
    }

    /// 0 was split into 1 and 2; 2 and 3 were merged into 4.
    fn resharded() -> Vec<Shard> {
        let shard = |id: &str, parents: &[&str], closed| Shard {
            id: id.into(),
            parents: parents.iter().map(|p| ShardId::from(*p)).collect(),
            hash_key_range: None,
            closed,
            begins: None,
        };
        vec![
            shard("4", &["2", "3"], false),
            shard("0", &[], true),
            shard("1", &["0"], false),
            shard("2", &["0"], true),
            shard("3", &[], true),
        ]
    }

    fn leases(checkpoints: &[(&str, &str)]) -> Vec<Lease> {
        let lease = |(id, checkpoint): &(&str, &str)| {
            let shard = resharded().into_iter().find(|shard| shard.id.as_str() == *id);
            let checkpoint = Checkpoint::parse(checkpoint, 0).expect("a checkpoint");
            Lease::new(&shard.expect("a shard"), checkpoint, None)
        };
        checkpoints.iter().map(lease).collect()
    }

    fn only(ids: &[&str]) -> BTreeSet<ShardId> {
        ids.iter().map(|id| ShardId::from(*id)).collect()
    }

    fn planned(leases: &[Lease], ids: &[&str], to: &ResetTo) -> Result<Vec<String>, ResetError> {
        let rewrites = plan_reset(&resharded(), leases, &BTreeMap::new(), &only(ids), to, now())?;
        Ok(rewrites
            .into_iter()
            .map(|rewrite| {
                let new = if rewrite.seen.is_none() { "+" } else { "" };
                format!("{new}{} {}", rewrite.wanted.shard, rewrite.wanted.checkpoint)
            })
            .collect())
    }

    fn finished_and_running() -> Vec<Lease> {
        leases(&[
            ("0", "SHARD_END"),
            ("1", "17"),
            ("2", "SHARD_END"),
            ("3", "SHARD_END"),
            ("4", "18"),
        ])
    }

    #[test]
    fn p5_a_shard_that_is_read_again_takes_its_descendants_with_it_parents_first() {
        let all = finished_and_running();
        let to = ResetTo::TrimHorizon;
        let (zero, one, two) = ("0 TRIM_HORIZON", "1 TRIM_HORIZON", "2 TRIM_HORIZON");
        let (three, four) = ("3 TRIM_HORIZON", "4 TRIM_HORIZON");
        assert_eq!(planned(&all, &["0"], &to).expect("a plan"), [zero, one, two, four]);
        assert_eq!(planned(&all, &["1"], &to).expect("a plan"), [one]);
        assert_eq!(planned(&all, &[], &to).expect("a plan"), [zero, three, one, two, four]);
        let number = ResetTo::SequenceNumber(SequenceNumber::parse("5").expect("a number"));
        assert_eq!(planned(&all, &["2"], &number).expect("a plan"), ["2 5", four]);
    }

    #[test]
    fn p1_finished_shards_whose_leases_were_deleted_are_read_again_too() {
        let left = leases(&[("1", "17"), ("4", "18")]);
        let to = ResetTo::Time(Timestamp::UNIX_EPOCH);
        assert_eq!(
            planned(&left, &[], &to).expect("a plan"),
            [
                "+0 AT_TIMESTAMP",
                "+3 AT_TIMESTAMP",
                "1 AT_TIMESTAMP",
                "+2 AT_TIMESTAMP",
                "4 AT_TIMESTAMP"
            ]
        );
        assert_eq!(
            planned(&left, &["3"], &to).expect("a plan"),
            ["+3 AT_TIMESTAMP", "4 AT_TIMESTAMP"]
        );
    }

    #[test]
    fn p1_a_lease_whose_ancestors_nobody_has_read_is_not_made_by_name() {
        let to = ResetTo::TrimHorizon;
        assert_eq!(planned(&[], &["1"], &to), Err(ResetError::NoLease { shard: "1".into() }));
        // 4 has no lease yet; making it would say that 3 is finished.
        let begun = leases(&[("0", "7"), ("2", "TRIM_HORIZON")]);
        assert_eq!(planned(&begun, &["0"], &to).expect("a plan"), ["0 TRIM_HORIZON"]);
    }

    #[test]
    fn latest_comes_with_its_time_and_reads_nothing_that_is_finished() {
        let to = ResetTo::Latest { from: now() };
        let all = finished_and_running();
        assert_eq!(planned(&all, &[], &to).expect("a plan"), ["1 LATEST", "4 LATEST"]);
        assert_eq!(planned(&[], &[], &to).expect("a plan"), ["+1 LATEST", "+4 LATEST"]);
        let unread = leases(&[("0", "3"), ("1", "TRIM_HORIZON")]);
        assert_eq!(planned(&unread, &["0"], &to).expect("a plan"), ["0 LATEST"]);
        let rewrites = plan_reset(&resharded(), &all, &BTreeMap::new(), &only(&["1"]), &to, now());
        assert_eq!(rewrites.expect("a plan")[0].wanted.start_at, Some(now()));
    }

    #[test]
    fn what_cannot_be_reset_is_said() {
        let all = finished_and_running();
        let plan = |ids: &[&str], to| planned(&all, ids, &to);
        let number = ResetTo::SequenceNumber(SequenceNumber::parse("5").expect("a number"));
        assert_eq!(plan(&[], number.clone()), Err(ResetError::OneShard));
        assert_eq!(plan(&["1", "2"], number), Err(ResetError::OneShard));
        let nowhere = plan(&["9"], ResetTo::TrimHorizon);
        assert_eq!(nowhere, Err(ResetError::NoShard { shard: "9".into() }));
        let at = now() + jiff::SignedDuration::from_secs(1);
        assert_eq!(plan(&[], ResetTo::Time(at)), Err(ResetError::Future { at }));
        let mut broken = all.clone();
        broken[1].unreadable = true;
        let unreadable = planned(&broken, &[], &ResetTo::TrimHorizon);
        assert_eq!(unreadable, Err(ResetError::Unreadable { shard: "1".into() }));
        assert!(planned(&broken, &["4"], &ResetTo::TrimHorizon).is_ok());
    }

    #[test]
    fn what_is_there_already_is_not_written_unless_somebody_reads_from_it() {
        let mut leases = leases(&[("1", "TRIM_HORIZON"), ("4", "TRIM_HORIZON")]);
        leases[0].owner = Some("w".into());
        let planned = planned(&leases, &["1", "4"], &ResetTo::TrimHorizon);
        assert_eq!(planned.expect("a plan"), ["1 TRIM_HORIZON"]);
    }

    #[test]
    fn a_release_frees_what_somebody_holds() {
        let mut leases = leases(&[("1", "17"), ("4", "18")]);
        leases[0].owner = Some("w".into());
        let released = |ids: &[&str]| plan_release(&leases, &only(ids));
        assert_eq!(released(&[]).expect("a plan"), leases[..1]);
        assert_eq!(released(&["4"]).expect("a plan"), []);
        assert_eq!(released(&["2"]), Err(ResetError::NoLease { shard: "2".into() }));
    }

    #[tokio::test]
    async fn p4_a_write_between_look_and_reset_refuses_it_unless_forced() {
        let store = MemoryTable::default();
        let lease = leases(&[("1", "17")]).remove(0);
        store.create(&lease).await.expect("a lease");
        let seen = vec![lease];
        let to = ResetTo::TrimHorizon;
        let rewrites = plan_reset(&resharded(), &seen, &BTreeMap::new(), &only(&["1"]), &to, now());
        let rewrites = rewrites.expect("a plan");
        let take = Change::Take { worker: "w".into(), at: Timestamp::UNIX_EPOCH };
        store.update(&mut seen[0].clone(), &take).await.expect("taken");
        let refused = write_reset(&store, &seen, &rewrites, false).await;
        assert!(matches!(refused, Err(LeaseError::Lost { .. })), "{refused:?}");
        write_reset(&store, &seen, &rewrites, true).await.expect("forced");
        let row = store.rows().remove(0);
        assert_eq!((row.reader(), &row.checkpoint), (None, &Checkpoint::TrimHorizon));
        assert_eq!((row.counter, row.bell), (2, 1));
    }
}
