//! What a worker does about leases, decided from a snapshot of the table and nothing else.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use tokio::time::Instant;

use super::Lease;
use crate::{checkpoint::Checkpoint, shard::ShardId};

/// When each lease was last seen to move, by this worker's own clock.
///
/// The table holds no times: clocks of different machines do not compare. A lease whose counter has
/// not moved for the lease duration, while we looked, has no living owner.
#[derive(Debug, Default)]
pub struct Observations(BTreeMap<ShardId, Observed>);

#[derive(Debug)]
struct Observed {
    counter: u64,
    owner: Option<String>,
    since: Instant,
    /// Whether it moved since it was first seen.
    moved: bool,
}

impl Observations {
    /// Takes note of a snapshot made at `now`, and forgets leases that are gone.
    pub fn see(&mut self, snapshot: &[Lease], now: Instant) {
        let present: BTreeSet<&ShardId> = snapshot.iter().map(|lease| &lease.shard).collect();
        self.0.retain(|shard, _| present.contains(shard));
        for lease in snapshot {
            let last = self.0.get(&lease.shard);
            if last.is_some_and(|last| last.counter == lease.counter && last.owner == lease.owner) {
                continue;
            }
            let moved = last.is_some();
            let seen =
                Observed { counter: lease.counter, owner: lease.owner.clone(), since: now, moved };
            self.0.insert(lease.shard.clone(), seen);
        }
    }

    fn unmoved_for(&self, shard: &ShardId, now: Instant) -> Duration {
        self.0.get(shard).map_or(Duration::ZERO, |seen| now.saturating_duration_since(seen.since))
    }
}

/// Who plans, and by which rules.
#[derive(Debug, Clone)]
pub struct Planner<'a> {
    /// This worker.
    pub worker: &'a str,
    /// The shards whose leases it holds.
    pub held: &'a BTreeSet<ShardId>,
    /// Whether rows that name this worker, but that it does not hold, are its own from before a
    /// restart. Only true for its first look at the table.
    pub adopt: bool,
    /// How long a lease lasts without renewal.
    pub lease_duration: Duration,
}

/// The leases to take now: those without a living owner whose parents are finished (P5).
pub fn to_take<'a>(
    snapshot: &'a [Lease],
    observed: &Observations,
    planner: &Planner<'_>,
    now: Instant,
) -> Vec<&'a Lease> {
    let unfinished: BTreeSet<&ShardId> = snapshot
        .iter()
        .filter(|lease| lease.checkpoint != Checkpoint::ShardEnd)
        .map(|lease| &lease.shard)
        .collect();
    snapshot
        .iter()
        .filter(|lease| unfinished.contains(&lease.shard))
        .filter(|lease| !planner.held.contains(&lease.shard))
        // A parent without a lease is finished and forgotten, or expired: it blocks nobody.
        .filter(|lease| lease.parents.iter().all(|parent| !unfinished.contains(parent)))
        .filter(|lease| match &lease.owner {
            None => true,
            Some(owner) if owner == planner.worker && planner.adopt => true,
            Some(_) => observed.unmoved_for(&lease.shard, now) > planner.lease_duration,
        })
        .collect()
}

/// Whether some unfinished shard has, as far as this worker can tell, nobody who reads it: its lease is
/// free, or its owner was not seen to move it.
pub fn unattended(snapshot: &[Lease], observed: &Observations, held: &BTreeSet<ShardId>) -> bool {
    snapshot
        .iter()
        .filter(|lease| lease.checkpoint != Checkpoint::ShardEnd && !held.contains(&lease.shard))
        .any(|lease| {
            lease.owner.is_none() || observed.0.get(&lease.shard).is_none_or(|seen| !seen.moved)
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::Shard;

    const DURATION: Duration = Duration::from_secs(10);

    fn lease(shard: &str, parents: &[&str], owner: Option<&str>) -> Lease {
        let shard = Shard {
            id: shard.into(),
            parents: parents.iter().map(|p| ShardId::from(*p)).collect(),
            hash_key_range: None,
            closed: false,
        };
        Lease {
            owner: owner.map(str::to_owned),
            ..Lease::new(&shard, Checkpoint::TrimHorizon, None)
        }
    }

    fn taken(table: &[Lease], observed: &Observations, adopt: bool, now: Instant) -> Vec<String> {
        let held = BTreeSet::from([ShardId::from("held")]);
        let planner = Planner { worker: "me", held: &held, adopt, lease_duration: DURATION };
        to_take(table, observed, &planner, now).iter().map(|l| l.shard.to_string()).collect()
    }

    #[test]
    fn leases_without_an_owner_are_taken_and_held_ones_left() {
        let table = [lease("held", &[], Some("me")), lease("free", &[], None)];
        assert_eq!(taken(&table, &Observations::default(), false, Instant::now()), ["free"]);
    }

    #[test]
    fn p4_a_lease_is_taken_from_its_owner_only_when_it_has_not_moved_for_the_lease_duration() {
        let mut table = [lease("a", &[], Some("other"))];
        let mut observed = Observations::default();
        let start = Instant::now();

        observed.see(&table, start);
        assert!(taken(&table, &observed, false, start + DURATION).is_empty());
        let expired = start + DURATION + Duration::from_millis(1);
        assert_eq!(taken(&table, &observed, false, expired), ["a"]);

        table[0].counter += 1;
        observed.see(&table, expired);
        assert!(taken(&table, &observed, false, expired + DURATION).is_empty());
    }

    #[test]
    fn p4_a_lease_seen_for_the_first_time_counts_as_just_renewed() {
        let table = [lease("a", &[], Some("other"))];
        let mut observed = Observations::default();
        let late = Instant::now() + DURATION * 1000;
        observed.see(&table, late);
        assert!(taken(&table, &observed, false, late + DURATION).is_empty());
    }

    #[test]
    fn after_a_restart_a_worker_takes_its_own_leases_back_at_once() {
        let table = [lease("a", &[], Some("me")), lease("b", &[], Some("other"))];
        let now = Instant::now();
        assert_eq!(taken(&table, &Observations::default(), true, now), ["a"]);
        assert!(taken(&table, &Observations::default(), false, now).is_empty());
    }

    #[test]
    fn a_shard_is_attended_when_it_is_ours_or_its_owner_was_seen_to_move_it() {
        let mut table = [lease("held", &[], Some("me")), lease("a", &[], Some("other"))];
        let held = BTreeSet::from([ShardId::from("held")]);
        let mut observed = Observations::default();
        observed.see(&table, Instant::now());
        assert!(unattended(&table, &observed, &held), "the owner may be dead");
        table[1].counter += 1;
        observed.see(&table, Instant::now());
        assert!(!unattended(&table, &observed, &held));
        table[1].owner = None;
        assert!(unattended(&table, &observed, &held));
        table[1].checkpoint = Checkpoint::ShardEnd;
        assert!(!unattended(&table, &observed, &held));
    }

    #[test]
    fn p5_a_child_waits_for_every_parent_that_has_an_unfinished_lease() {
        let mut table = [
            lease("p1", &[], Some("other")),
            lease("p2", &[], None),
            lease("c", &["p1", "p2"], None),
        ];
        let now = Instant::now();
        let observed = Observations::default();
        assert_eq!(taken(&table, &observed, false, now), ["p2"]);
        table[1].checkpoint = Checkpoint::ShardEnd;
        assert!(taken(&table, &observed, false, now).is_empty());
        table[0].checkpoint = Checkpoint::ShardEnd;
        assert_eq!(taken(&table, &observed, false, now), ["c"]);
        assert_eq!(taken(&table[2..], &observed, false, now), ["c"]);
    }
}
