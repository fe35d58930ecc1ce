//! Which leases ought to exist.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use jiff::Timestamp;

use super::Lease;
use crate::{
    checkpoint::Checkpoint,
    shard::{SequenceNumber, Shard, ShardId},
};

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

impl fmt::Display for InitialPosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latest => f.write_str("latest"),
            Self::TrimHorizon => f.write_str("trim-horizon"),
            Self::At(at) => write!(f, "{at}"),
        }
    }
}

/// The leases to create for `shards`, given those that exist.
///
/// - A shard that comes from a leased one is read from its first record: what its parent did not
///   carry any more is there. Only while the parent has not begun, and starts at a time, the child
///   starts at the same time.
/// - A shard whose descendant is leased was finished and its lease deleted: it is left alone, or it
///   would be read a second time.
/// - Any other shard starts at `initial`; from `latest` a closed one has nothing to give.
///
/// Children get their leases at once and wait for their parents (P5), so a reader that was away while
/// the stream was resharded twice finds every generation. They come after their parents: one without
/// the other, after a crash between the two, must be the parent, or it would count as finished.
pub fn missing_leases(shards: &[Shard], leases: &[Lease], initial: InitialPosition) -> Vec<Lease> {
    let listed: BTreeMap<&ShardId, &Shard> = shards.iter().map(|s| (&s.id, s)).collect();
    let leased: BTreeMap<&ShardId, &Lease> = leases.iter().map(|l| (&l.shard, l)).collect();
    let superseded = ancestors(leased.keys().copied(), &listed);

    let mut missing: Vec<(usize, Lease)> = shards
        .iter()
        .filter(|shard| !leased.contains_key(&shard.id) && !superseded.contains(&shard.id))
        .filter_map(|shard| {
            let ancestors = ancestors([&shard.id], &listed);
            let tracked: Vec<&Lease> =
                ancestors.iter().filter_map(|ancestor| leased.get(ancestor).copied()).collect();
            let (checkpoint, start_at) = if tracked.is_empty() {
                if shard.closed && initial == InitialPosition::Latest {
                    return None;
                }
                (initial.checkpoint(), initial.time())
            } else if tracked.iter().all(|lease| lease.checkpoint == Checkpoint::AtTimestamp) {
                let earliest = tracked.iter().map(|lease| lease.start_at).min().flatten();
                (Checkpoint::AtTimestamp, earliest)
            } else {
                (Checkpoint::TrimHorizon, None)
            };
            Some((ancestors.len(), Lease::new(shard, checkpoint, start_at)))
        })
        .collect();
    missing.sort_by(|(a, one), (b, other)| a.cmp(b).then_with(|| one.shard.cmp(&other.shard)));
    missing.into_iter().map(|(_, lease)| lease).collect()
}

/// A lease of an earlier stream of the same name, if there is one, and where its shard begins now: no
/// checkpoint can stand before the first number of its own shard.
pub fn outlived<'a>(
    shards: &'a [Shard],
    leases: &'a [Lease],
) -> Option<(&'a Lease, &'a SequenceNumber)> {
    leases.iter().find_map(|lease| {
        let shard = shards.iter().find(|shard| shard.id == lease.shard)?;
        let begins = shard.begins.as_ref()?;
        match &lease.checkpoint {
            Checkpoint::At(position) if position.sequence_number < *begins => Some((lease, begins)),
            _ => None,
        }
    })
}

/// Every listed or named shard that one of `ids` descends from.
pub(super) fn ancestors<'a>(
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
            begins: None,
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

    fn leased(ids: &[&str], checkpoint: &Checkpoint, start_at: Option<Timestamp>) -> Vec<Lease> {
        let shard = |id: &&str| resharded().into_iter().find(|shard| shard.id.as_str() == *id);
        let lease = |shard| Lease::new(&shard, checkpoint.clone(), start_at);
        ids.iter().filter_map(shard).map(lease).collect()
    }

    fn missing_from(leases: &[Lease], initial: InitialPosition) -> Vec<(String, Checkpoint)> {
        let mut missing: Vec<_> = missing_leases(&resharded(), leases, initial)
            .into_iter()
            .map(|lease| (lease.shard.to_string(), lease.checkpoint))
            .collect();
        missing.sort_by(|(a, _), (b, _)| a.cmp(b));
        missing
    }

    fn missing(ids: &[&str], initial: InitialPosition) -> Vec<(String, Checkpoint)> {
        missing_from(&leased(ids, &Checkpoint::TrimHorizon, None), initial)
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
    fn a_stream_that_was_made_again_is_known_by_shards_that_begin_after_their_checkpoint() {
        let mut shards = resharded();
        shards[0].begins = SequenceNumber::parse("100");
        let at = |number| Checkpoint::parse(number, 0).expect("a checkpoint");
        assert_eq!(outlived(&shards, &leased(&["0"], &at("100"), None)), None);
        assert_eq!(outlived(&shards, &leased(&["0"], &Checkpoint::TrimHorizon, None)), None);
        let old = leased(&["0"], &at("99"), None);
        assert_eq!(outlived(&shards, &old).map(|(lease, _)| lease.shard.as_str()), Some("0"));
    }

    #[test]
    fn p1_parents_get_their_leases_before_their_children() {
        let mut shards = resharded();
        shards.reverse();
        let order: Vec<String> = missing_leases(&shards, &[], InitialPosition::TrimHorizon)
            .into_iter()
            .map(|lease| lease.shard.to_string())
            .collect();
        assert_eq!(order, ["0", "3", "1", "2", "4"]);
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
    fn p1_a_later_start_time_does_not_cut_off_what_follows_a_shard_that_has_begun() {
        let begun = Checkpoint::parse("17", 0).expect("a checkpoint");
        let today = InitialPosition::At("2025-07-02T06:00:00Z".parse().expect("a time"));
        assert_eq!(
            missing_from(&leased(&["0", "3"], &begun, None), today),
            at(&["1", "2", "4"], Checkpoint::TrimHorizon)
        );
        // One that has not begun hands its own start on, not that of this run.
        let yesterday: Timestamp = "2025-07-01T06:00:00Z".parse().expect("a time");
        let waiting = leased(&["0", "3"], &Checkpoint::AtTimestamp, Some(yesterday));
        let created = missing_leases(&resharded(), &waiting, today);
        assert!(created.iter().all(|lease| lease.checkpoint == Checkpoint::AtTimestamp));
        assert!(created.iter().all(|lease| lease.start_at == Some(yesterday)));
    }

    #[test]
    fn p1_a_finished_parent_whose_lease_was_deleted_is_not_read_again() {
        assert_eq!(missing(&["1", "4"], InitialPosition::TrimHorizon), vec![]);
        assert_eq!(missing(&["1", "2", "3", "4"], InitialPosition::TrimHorizon), vec![]);
    }
}
