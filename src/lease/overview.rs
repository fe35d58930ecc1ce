//! What can be said of an application's shards and workers by one who only looks at the lease table.
//!
//! Pure: the stream's shards, the table and what was observed go in.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use jiff::Timestamp;
use serde::Serialize;
use tokio::time::Instant;

use super::{Lease, missing::ancestors, plan::Observations};
use crate::shard::{Shard, ShardId};

/// What happens to a shard, as far as the table tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It has an owner that was seen to renew the lease.
    Reading,
    /// It has an owner; whether that one lives was not watched for long enough.
    Held,
    /// It has an owner that was not seen to renew the lease: others take it when it has run out.
    NotRenewed,
    /// Its reader was asked to let go of it for another worker.
    HandingOver,
    /// Nobody has it, because a parent is not finished.
    Waiting,
    /// Nobody has it; the next worker that looks takes it.
    Free,
    /// It is read to its end.
    Finished,
    /// The stream does not list it any more: its records have expired.
    Expired,
    /// No worker has made a lease for it yet.
    NoLease,
    /// Its row cannot be read as a lease.
    Unreadable,
}

/// One shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ShardOverview {
    /// Its name; with the stream's identifier before it where several are read.
    pub shard: ShardId,
    /// The shards that come before it.
    pub parents: Vec<ShardId>,
    /// Whether it takes no more records.
    pub closed: bool,
    /// What happens to it.
    pub state: State,
    /// The worker that reads it.
    pub owner: Option<String>,
    /// During a hand-over: the worker that gets it.
    pub next_owner: Option<String>,
    /// Whether its owner was seen to renew the lease.
    pub renewed: Option<bool>,
    /// The parents that have to be finished first.
    pub waiting_for: Vec<ShardId>,
    /// How far it is finished, or a word of the KCL's.
    pub checkpoint: Option<String>,
    /// The last finished user record of an aggregated record.
    pub sub_sequence_number: u64,
    /// The point in time for the checkpoints `LATEST` and `AT_TIMESTAMP`.
    pub start_at: Option<Timestamp>,
    /// When its reader took the lease, by the reader's clock. KCL workers do not tell.
    pub since: Option<Timestamp>,
    /// How often its reader has renewed the lease since, checkpoints included.
    pub renewals: Option<u64>,
    /// What last kept its reader from getting on.
    pub last_error: Option<String>,
    /// When that began, or, if it is over, ended.
    pub last_error_at: Option<Timestamp>,
    /// Whether the reader gets on again.
    pub last_error_is_over: Option<bool>,
    /// How often the lease was written.
    pub counter: Option<u64>,
    /// How often it moved to another worker since its last checkpoint.
    pub owner_switches_since_checkpoint: u64,
}

/// One worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WorkerOverview {
    /// Its name.
    pub worker: String,
    /// How many shards it reads.
    pub shards: usize,
    /// How many it has asked others for.
    pub asked_for: usize,
    /// Whether it was seen to renew one of its leases.
    pub renews: Option<bool>,
}

/// Every shard that the stream lists or the table has, in the order of their names. `limit` is within
/// what time a living owner renews its lease.
pub fn shards(
    listed: &[Shard],
    leases: &[Lease],
    observed: &Observations,
    limit: Duration,
    now: Instant,
) -> Vec<ShardOverview> {
    let by_id: BTreeMap<&ShardId, &Shard> = listed.iter().map(|s| (&s.id, s)).collect();
    let leased: BTreeMap<&ShardId, &Lease> = leases.iter().map(|l| (&l.shard, l)).collect();
    let forgotten = ancestors(leased.keys().copied(), &by_id);
    let ids: BTreeSet<&ShardId> = by_id.keys().chain(leased.keys()).copied().collect();
    ids.into_iter()
        .map(|id| {
            let (shard, lease) = (by_id.get(id), leased.get(id).copied());
            let parents: BTreeSet<&ShardId> = shard
                .into_iter()
                .flat_map(|shard| &shard.parents)
                .chain(lease.into_iter().flat_map(|lease| &lease.parents))
                .collect();
            let waiting_for: Vec<ShardId> = parents
                .iter()
                .filter(|parent| leased.get(*parent).is_some_and(|lease| !lease.is_finished()))
                .map(|parent| (*parent).clone())
                .collect();
            let readable = lease.filter(|lease| !lease.unreadable);
            let note = readable.and_then(Lease::current_note);
            let trouble = note.and_then(|note| note.trouble.as_ref());
            let owner = readable.and_then(Lease::reader).map(str::to_owned);
            let renewed = owner.as_ref().and_then(|_| observed.is_renewed(id, limit, now));
            let state = match lease {
                None if forgotten.contains(id) => State::Finished,
                None => State::NoLease,
                Some(lease) if lease.unreadable => State::Unreadable,
                Some(lease) if lease.is_finished() => State::Finished,
                Some(lease) if lease.checkpoint_owner.is_some() => State::HandingOver,
                Some(_) if owner.is_some() => match renewed {
                    Some(true) => State::Reading,
                    Some(false) => State::NotRenewed,
                    None => State::Held,
                },
                Some(_) if shard.is_none() => State::Expired,
                Some(_) if !waiting_for.is_empty() => State::Waiting,
                Some(_) => State::Free,
            };
            ShardOverview {
                shard: id.clone(),
                parents: parents.into_iter().cloned().collect(),
                closed: shard.is_none_or(|shard| shard.closed),
                waiting_for: if state == State::Waiting { waiting_for } else { Vec::new() },
                next_owner: readable
                    .filter(|lease| lease.checkpoint_owner.is_some())
                    .and_then(|lease| lease.owner.clone()),
                owner,
                renewed,
                state,
                checkpoint: readable.map(|lease| lease.checkpoint.as_str().to_owned()),
                sub_sequence_number: readable.map_or(0, |l| l.checkpoint.sub_sequence_number()),
                start_at: readable.and_then(|lease| lease.start_at),
                since: note.map(|note| note.since),
                renewals: readable
                    .zip(note)
                    .map(|(lease, note)| lease.counter.saturating_sub(note.from_counter)),
                last_error: trouble.map(|trouble| trouble.text.clone()),
                last_error_at: trouble.map(|trouble| trouble.at),
                last_error_is_over: trouble.map(|trouble| trouble.is_over),
                counter: readable.map(|lease| lease.counter),
                owner_switches_since_checkpoint: readable
                    .map_or(0, |lease| lease.owner_switches_since_checkpoint),
            }
        })
        .collect()
}

/// Every worker that reads a shard or has asked for one, by name.
pub fn workers(shards: &[ShardOverview]) -> Vec<WorkerOverview> {
    let names: BTreeSet<&String> =
        shards.iter().flat_map(|shard| [&shard.owner, &shard.next_owner]).flatten().collect();
    names
        .into_iter()
        .map(|worker| {
            let read = || shards.iter().filter(|shard| shard.owner.as_ref() == Some(worker));
            let renewed: Vec<Option<bool>> = read().map(|shard| shard.renewed).collect();
            let asked = shards.iter().filter(|shard| shard.next_owner.as_ref() == Some(worker));
            WorkerOverview {
                worker: worker.clone(),
                shards: read().count(),
                asked_for: asked.count(),
                renews: if renewed.contains(&Some(true)) {
                    Some(true)
                } else if renewed.is_empty() || renewed.contains(&None) {
                    None
                } else {
                    Some(false)
                },
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{checkpoint::Checkpoint, lease::Change};

    const LIMIT: Duration = Duration::from_secs(5);

    fn shard(id: &str, parents: &[&str]) -> Shard {
        Shard {
            id: id.into(),
            parents: parents.iter().map(|p| ShardId::from(*p)).collect(),
            hash_key_range: None,
            closed: false,
            begins: None,
        }
    }

    fn lease(id: &str, parents: &[&str], owner: Option<&str>, checkpoint: &str) -> Lease {
        let checkpoint = Checkpoint::parse(checkpoint, 0).expect("a checkpoint");
        let lease = Lease::new(&shard(id, parents), checkpoint, None);
        Lease { owner: owner.map(str::to_owned), ..lease }
    }

    #[test]
    fn each_shard_has_its_state() {
        let listed = [
            shard("a", &[]),
            shard("b", &["a"]),
            shard("c", &[]),
            shard("d", &[]),
            shard("e", &[]),
            shard("f", &[]),
            shard("g", &["f"]),
            shard("h", &[]),
        ];
        let at = Timestamp::UNIX_EPOCH;
        let mut leases = vec![
            lease("a", &[], None, "17").after(&Change::Take { worker: "w1".into(), at }),
            lease("b", &["a"], None, "TRIM_HORIZON"),
            lease("c", &[], Some("w2"), "18"),
            lease("d", &[], Some("w1"), "19").after(&Change::Ask { worker: "w3".into() }),
            lease("e", &[], None, "LATEST"),
            lease("g", &["f"], None, "20"),
            lease("i", &[], None, "21"),
            lease("j", &[], None, "SHARD_END"),
            Lease { unreadable: true, ..lease("k", &[], None, "TRIM_HORIZON") },
        ];
        let mut observed = Observations::default();
        let began = Instant::now();
        observed.see(&leases, began);
        let states = |observed: &Observations, leases: &[Lease], now| -> Vec<(String, State)> {
            let shards = shards(&listed, leases, observed, LIMIT, now);
            shards.iter().map(|shard| (shard.shard.to_string(), shard.state)).collect()
        };
        let at_first = states(&observed, &leases, began);
        assert_eq!(at_first[0], ("a".into(), State::Held));

        leases[0] = leases[0].after(&Change::Renew);
        observed.see(&leases, began + LIMIT);
        let expected = [
            ("a", State::Reading),
            ("b", State::Waiting),
            ("c", State::NotRenewed),
            ("d", State::HandingOver),
            ("e", State::Free),
            ("f", State::Finished),
            ("g", State::Free),
            ("h", State::NoLease),
            ("i", State::Expired),
            ("j", State::Finished),
            ("k", State::Unreadable),
        ];
        let expected = expected.map(|(shard, state)| (shard.to_owned(), state));
        assert_eq!(states(&observed, &leases, began + LIMIT), expected);
        // It was seen to move, but that is long ago.
        let later = states(&observed, &leases, began + 4 * LIMIT);
        assert_eq!(later[0], ("a".into(), State::NotRenewed));

        let shards = shards(&listed, &leases, &observed, LIMIT, began + LIMIT);
        assert_eq!((shards[0].since, shards[0].renewals), (Some(at), Some(1)));
        assert_eq!((shards[2].since, shards[2].renewals), (None, None), "no note");
        assert_eq!(shards[1].waiting_for, [ShardId::from("a")]);
        let workers: Vec<_> = workers(&shards)
            .into_iter()
            .map(|w| (w.worker, w.shards, w.asked_for, w.renews))
            .collect();
        assert_eq!(
            workers,
            [
                ("w1".to_owned(), 2, 0, Some(true)),
                ("w2".to_owned(), 1, 0, Some(false)),
                ("w3".to_owned(), 0, 1, None),
            ]
        );
    }
}
