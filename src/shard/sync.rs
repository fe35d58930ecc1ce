//! Which leases ought to exist.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;

use super::{Shard, ShardId};
use crate::checkpoint::Checkpoint;

/// Where a shard starts that nobody has read before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InitialPosition {
    /// With what arrives from now on.
    Latest,
    /// With the oldest record kept.
    TrimHorizon,
    /// With the first record that arrived at or after this time.
    At(Timestamp),
}

impl InitialPosition {
    /// The point in time, if it is one.
    pub fn time(self) -> Option<Timestamp> {
        match self {
            Self::At(time) => Some(time),
            Self::Latest | Self::TrimHorizon => None,
        }
    }

    fn checkpoint(self) -> Checkpoint {
        match self {
            Self::Latest => Checkpoint::Latest,
            Self::TrimHorizon => Checkpoint::TrimHorizon,
            Self::At(_) => Checkpoint::AtTimestamp,
        }
    }
}

/// The leases to create for `shards`, given those in the table, each with the checkpoint it starts
/// from.
///
/// - A shard that comes from a leased one is read from its first record: what its parent did not
///   carry any more is there.
/// - A shard whose descendant is leased was finished and its lease deleted: it is left alone, or it
///   would be read a second time.
/// - Any other shard starts at `initial`; from `latest` a closed one has nothing to give.
///
/// Children get their leases at once and wait for their parents (P5), so a reader that was away while
/// the stream was resharded twice finds every generation.
pub fn missing_leases(
    shards: &[Shard],
    leased: &BTreeSet<ShardId>,
    initial: InitialPosition,
) -> Vec<(Shard, Checkpoint)> {
    let by_id: BTreeMap<&ShardId, &Shard> = shards.iter().map(|s| (&s.id, s)).collect();
    let superseded = ancestors(leased.iter(), &by_id);

    let mut missing: Vec<_> = shards
        .iter()
        .filter(|shard| !leased.contains(&shard.id) && !superseded.contains(&shard.id))
        .filter_map(|shard| {
            let continues = ancestors([&shard.id], &by_id).iter().any(|a| leased.contains(a));
            match (continues, initial) {
                (true, InitialPosition::At(_)) => Some((shard.clone(), Checkpoint::AtTimestamp)),
                (true, _) => Some((shard.clone(), Checkpoint::TrimHorizon)),
                (false, InitialPosition::Latest) if shard.closed => None,
                (false, _) => Some((shard.clone(), initial.checkpoint())),
            }
        })
        .collect();
    missing.sort_by(|(a, _), (b, _)| a.id.cmp(&b.id));
    missing
}

/// Every listed or named shard that one of `ids` descends from.
fn ancestors<'a>(
    ids: impl IntoIterator<Item = &'a ShardId>,
    by_id: &BTreeMap<&ShardId, &Shard>,
) -> BTreeSet<ShardId> {
    let mut found = BTreeSet::new();
    let mut open: Vec<ShardId> = ids.into_iter().cloned().collect();
    while let Some(id) = open.pop() {
        for parent in by_id.get(&id).into_iter().flat_map(|shard| &shard.parents) {
            if found.insert(parent.clone()) {
                open.push(parent.clone());
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard(id: &str, parents: &[&str], closed: bool) -> Shard {
        Shard {
            id: id.into(),
            parents: parents.iter().map(|p| ShardId::from(*p)).collect(),
            hash_key_range: None,
            closed,
        }
    }

    /// 0 was split into 1 and 2; 2 and 3 were merged into 4.
    fn resharded() -> Vec<Shard> {
        vec![
            shard("0", &[], true),
            shard("1", &["0"], false),
            shard("2", &["0"], true),
            shard("3", &[], true),
            shard("4", &["2", "3"], false),
        ]
    }

    fn missing(leased: &[&str], initial: InitialPosition) -> Vec<(String, Checkpoint)> {
        let leased = leased.iter().map(|id| ShardId::from(*id)).collect();
        missing_leases(&resharded(), &leased, initial)
            .into_iter()
            .map(|(shard, checkpoint)| (shard.id.to_string(), checkpoint))
            .collect()
    }

    fn at(ids: &[&str], checkpoint: Checkpoint) -> Vec<(String, Checkpoint)> {
        ids.iter().map(|id| (id.to_string(), checkpoint.clone())).collect()
    }

    #[test]
    fn an_empty_table_gets_every_shard_from_the_trim_horizon() {
        let all = ["0", "1", "2", "3", "4"];
        assert_eq!(missing(&[], InitialPosition::TrimHorizon), at(&all, Checkpoint::TrimHorizon));
        assert_eq!(
            missing(&[], InitialPosition::At(Timestamp::UNIX_EPOCH)),
            at(&all, Checkpoint::AtTimestamp)
        );
    }

    #[test]
    fn latest_takes_only_open_shards() {
        assert_eq!(missing(&[], InitialPosition::Latest), at(&["1", "4"], Checkpoint::Latest));
    }

    #[test]
    fn p1_children_of_a_leased_shard_start_at_their_first_record_even_from_latest() {
        assert_eq!(
            missing(&["0", "3"], InitialPosition::Latest),
            at(&["1", "2", "4"], Checkpoint::TrimHorizon)
        );
    }

    #[test]
    fn p1_a_finished_parent_whose_lease_was_deleted_is_not_read_again() {
        assert_eq!(missing(&["1", "4"], InitialPosition::TrimHorizon), vec![]);
        assert_eq!(missing(&["1", "2", "3", "4"], InitialPosition::TrimHorizon), vec![]);
    }
}
