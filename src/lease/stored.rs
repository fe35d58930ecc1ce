//! Leases of an application whose checkpoints are kept in documents instead of the table. Pure.

use std::collections::BTreeMap;

use super::Lease;
use crate::{
    checkpoint::Saved,
    shard::{Shard, ShardId},
};

/// Leases of the shards that one document holds, for its only worker, at the places that were reached.
/// What the stream does not list any more has expired.
pub fn of_document(listed: &[Shard], saved: &BTreeMap<ShardId, Saved>) -> Vec<Lease> {
    let lease = |shard: &Shard| {
        let saved = saved.get(&shard.id)?;
        let followers = listed.iter().filter(|other| other.parents.contains(&shard.id));
        Some(Lease {
            // A later owner has a higher one: the document knows its owners by it.
            counter: saved.lease_counter,
            children: followers.map(|child| child.id.clone()).collect(),
            ..Lease::new(shard, saved.checkpoint.clone()?, saved.start_at)
        })
    };
    listed.iter().filter_map(lease).collect()
}

/// Leases of the table, with the checkpoints that each shard's own document has: those count.
pub fn with_checkpoints(mut leases: Vec<Lease>, saved: &BTreeMap<ShardId, Saved>) -> Vec<Lease> {
    for lease in leases.iter_mut().filter(|lease| !lease.unreadable) {
        let saved = saved.get(&lease.shard);
        if let Some((checkpoint, start_at)) =
            saved.and_then(|saved| Some((saved.checkpoint.clone()?, saved.start_at)))
        {
            (lease.checkpoint, lease.start_at) = (checkpoint, start_at);
        }
    }
    leases
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;

    fn shard(id: &str, parents: &[&str]) -> Shard {
        Shard {
            id: id.into(),
            parents: parents.iter().map(|parent| ShardId::from(*parent)).collect(),
            hash_key_range: None,
            closed: false,
            begins: None,
        }
    }

    fn saved(checkpoint: Option<&str>) -> Saved {
        let checkpoint = checkpoint.and_then(|text| Checkpoint::parse(text, 0));
        Saved { checkpoint, lease_counter: 7, ..Saved::default() }
    }

    #[test]
    fn p1_what_a_document_has_of_listed_shards_becomes_leases() {
        let listed = [shard("0", &[]), shard("1", &["0"]), shard("2", &["0"])];
        let stored = BTreeMap::from([
            ("0".into(), saved(Some("SHARD_END"))),
            ("1".into(), saved(Some("17"))),
            ("2".into(), saved(None)),
            ("expired".into(), saved(Some("3"))),
        ]);
        let leases = of_document(&listed, &stored);
        let shown: Vec<_> =
            leases.iter().map(|lease| format!("{} {}", lease.shard, lease.checkpoint)).collect();
        assert_eq!(shown, ["0 SHARD_END", "1 17"]);
        assert_eq!((leases[0].children.len(), leases[0].counter), (2, 7));
    }

    #[test]
    fn p3_the_checkpoint_of_a_shards_own_document_counts_and_the_lease_is_the_tables() {
        let lease = |id: &str| Lease {
            counter: 40,
            ..Lease::new(&shard(id, &[]), Checkpoint::TrimHorizon, None)
        };
        let stored = BTreeMap::from([("0".into(), saved(Some("17"))), ("1".into(), saved(None))]);
        let leases = with_checkpoints(vec![lease("0"), lease("1"), lease("2")], &stored);
        let shown: Vec<_> = leases.iter().map(|lease| lease.checkpoint.to_string()).collect();
        assert_eq!(shown, ["17", "TRIM_HORIZON", "TRIM_HORIZON"]);
        assert!(leases.iter().all(|lease| lease.counter == 40));
    }
}
