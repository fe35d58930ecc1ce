//! What a worker does about leases, decided from a snapshot of the table and nothing else.
//!
//! Pure: time, identity and what was observed come in as arguments. Every worker plans for itself; two
//! that see the same table plan the same distribution, so they rarely want the same lease, and where
//! they do, the conditional write refuses one of them.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use tokio::time::Instant;

use super::Lease;
use crate::{checkpoint::Checkpoint, shard::ShardId};

/// A renewal is due when this part of the lease duration has passed: 4 s of 10 s.
const RENEW_AFTER: f64 = 0.4;
/// Workers whose lease durations differ, as in a rolling change of the setting, still see it move.
const RENEW_AT_LEAST_EVERY: Duration = Duration::from_secs(4);
/// When this part has passed without a renewal, one was missed: a worker that only watches the bell then
/// starts to watch the table too, in case both workers that watch it for all are dead.
const RENEWAL_MISSED_AFTER: f64 = 0.5;
/// A lease is used for this part of its duration; the rest is for clocks of different speed.
const USE_FOR: f64 = 0.9;
/// A free lease that the worker it falls to has not taken for this long is for anyone.
const LEFT_LYING_AFTER: Duration = Duration::from_secs(3);

/// How often a worker looks at the table when no other worker is in it.
const ALONE_INTERVAL: Duration = Duration::from_secs(10);
/// How often the two workers that watch the table for all look at it, and the others at its bell.
const WATCH_INTERVAL: Duration = Duration::from_millis(800);
/// How often a worker that waits for a hand-over looks.
const WAITING_INTERVAL: Duration = Duration::from_millis(400);

/// When each lease was last seen to move, by this worker's own clock.
///
/// The table holds no times: clocks of different machines do not compare. A lease whose counter has
/// not moved for the lease duration, while we looked, has no living reader.
#[derive(Debug, Default)]
pub struct Observations(BTreeMap<ShardId, Observed>);

#[derive(Debug)]
struct Observed {
    counter: u64,
    reader: Option<String>,
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
            self.see_one(lease, now);
        }
    }

    /// Takes note of one lease.
    pub fn see_one(&mut self, lease: &Lease, now: Instant) {
        let (counter, reader) = (lease.counter, lease.reader().map(str::to_owned));
        let last = self.0.get(&lease.shard);
        if last.is_some_and(|last| last.counter == counter && last.reader == reader) {
            return;
        }
        let moved = last.is_some();
        self.0.insert(lease.shard.clone(), Observed { counter, reader, since: now, moved });
    }

    /// How long a lease has not moved; zero if it was never seen.
    pub fn unmoved_for(&self, shard: &ShardId, now: Instant) -> Duration {
        self.0.get(shard).map_or(Duration::ZERO, |seen| now.saturating_duration_since(seen.since))
    }

    /// Whether somebody renews a lease, for one who only looks: renewals come within `limit` of each
    /// other. `None` if it was not watched for that long.
    pub fn is_renewed(&self, shard: &ShardId, limit: Duration, now: Instant) -> Option<bool> {
        let unmoved = self.unmoved_for(shard, now);
        match self.0.get(shard)?.moved {
            // A renewal is noticed only at the next look.
            true => Some(unmoved <= 2 * limit),
            false => (unmoved >= limit).then_some(false),
        }
    }
}

/// Who plans, and by which rules.
#[derive(Debug, Clone)]
pub struct Planner<'a> {
    /// This worker.
    pub worker: &'a str,
    /// The shards whose leases it holds.
    pub held: &'a BTreeSet<ShardId>,
    /// The leases it has asked their readers for, and since when: from before a restart, since its
    /// first look.
    pub asked: &'a BTreeMap<ShardId, Instant>,
    /// Whether rows that name this worker, but that it does not hold, are its own from before a
    /// restart. Only true for its first look at the table.
    pub adopt: bool,
    /// The most leases it may hold.
    pub max_leases: usize,
    /// How long a lease lasts without renewal.
    pub lease_duration: Duration,
    /// How long a reader that was asked may take to let go.
    pub hand_over_limit: Duration,
    /// How long a finished lease is kept although nobody needs it any more.
    pub finished_kept_for: Duration,
}

/// One thing to do. Each is carried out by a conditional write, which may be refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Become the reader of a lease that has none, or whose reader is dead.
    Take(Lease),
    /// Take a lease from a living reader that was asked and does not let go. It may go on until it
    /// learns of it, so the new reader starts when that time is over.
    Force(Lease),
    /// Ask a living reader to hand the lease over.
    Ask(Lease),
    /// Take a lease from its dead reader for the worker that the plan gives it to.
    Free(Lease),
    /// Complete a hand-over that we were asked for before a restart: we do not read the shard.
    LetGo(Lease),
    /// Remove a finished lease that nobody needs any more.
    Delete(Lease),
}

/// What to do now.
pub fn plan(
    snapshot: &[Lease],
    observed: &Observations,
    planner: &Planner<'_>,
    now: Instant,
) -> Vec<Action> {
    let startable = startable(snapshot);
    let mut actions = Vec::new();
    let mut left_over = Vec::new();
    for lease in &startable {
        if planner.held.contains(&lease.shard) {
            continue;
        }
        match own_row(lease, observed, planner, now) {
            Own::Take => actions.push(Action::Take((*lease).clone())),
            Own::Force => actions.push(Action::Force((*lease).clone())),
            Own::LetGo => actions.push(Action::LetGo((*lease).clone())),
            Own::Wait => {}
            Own::NotOurs => left_over.push(*lease),
        }
    }
    actions.extend(share(&startable, &left_over, observed, planner, now));
    let unmoved = |lease: &Lease| observed.unmoved_for(&lease.shard, now);
    actions.extend(
        snapshot
            .iter()
            .filter(|lease| is_done_with(lease, snapshot))
            .filter(|lease| unmoved(lease) > planner.finished_kept_for)
            .cloned()
            .map(Action::Delete),
    );
    // What was ours before, and then what is: never more than allowed.
    let mut room = planner.max_leases.saturating_sub(planner.held.len() + planner.asked.len());
    actions.retain(|action| match action {
        Action::Take(lease) if planner.asked.contains_key(&lease.shard) => true,
        Action::Take(_) | Action::Ask(_) if room == 0 => false,
        Action::Take(_) | Action::Ask(_) => {
            room -= 1;
            true
        }
        _ => true,
    });
    actions
}

enum Own {
    Take,
    Force,
    LetGo,
    Wait,
    NotOurs,
}

/// What to do about a lease that names this worker although it does not hold it.
fn own_row(lease: &Lease, observed: &Observations, planner: &Planner<'_>, now: Instant) -> Own {
    let unmoved = observed.unmoved_for(&lease.shard, now);
    let owned = lease.owner.as_deref() == Some(planner.worker);
    match lease.checkpoint_owner.as_deref() {
        // Asked before a restart, and not reading any more.
        Some(reader) if reader == planner.worker => Own::LetGo,
        Some(_) if owned => {
            let too_long = planner.asked.get(&lease.shard).is_some_and(|since| {
                now.saturating_duration_since(*since) > planner.hand_over_limit
            });
            if unmoved > planner.lease_duration {
                Own::Take
            } else if too_long {
                Own::Force
            } else {
                Own::Wait
            }
        }
        // Handed over to us, or ours from before a restart.
        None if owned && (planner.adopt || planner.asked.contains_key(&lease.shard)) => Own::Take,
        _ => Own::NotOurs,
    }
}

/// Divides the startable leases: what is free, and what others have too much of.
fn share(
    startable: &[&Lease],
    candidates: &[&Lease],
    observed: &Observations,
    planner: &Planner<'_>,
    now: Instant,
) -> Vec<Action> {
    let expired = |lease: &Lease| {
        lease.reader().is_some_and(|reader| reader != planner.worker)
            && observed.unmoved_for(&lease.shard, now) > planner.lease_duration
    };
    // A row that names us but is not ours is another process under our name: left until it expires.
    let stray = |lease: &Lease| {
        lease.owner.as_deref() == Some(planner.worker)
            && observed.unmoved_for(&lease.shard, now) > planner.lease_duration
    };
    let free: Vec<&Lease> = candidates
        .iter()
        .copied()
        .filter(|lease| lease.owner.is_none() || expired(lease) || stray(lease))
        .collect();

    // What every living worker has; a lease that was asked for counts for the worker that asked.
    let mut loads: BTreeMap<&str, Vec<&Lease>> = BTreeMap::from([(planner.worker, Vec::new())]);
    for lease in startable {
        match lease.owner.as_deref() {
            Some(owner) if !expired(lease) && !stray(lease) => {
                loads.entry(owner).or_default().push(lease);
            }
            _ => {}
        }
    }
    let targets = targets(&loads, startable.len());

    // Free leases first, then those that their owners have too many of, to the workers that have too
    // few, in one fixed order: every worker that sees the same table divides it in the same way.
    let surplus = loads.iter().flat_map(|(worker, leases)| {
        let movable: Vec<&Lease> =
            leases.iter().copied().filter(|lease| lease.checkpoint_owner.is_none()).collect();
        let too_many = leases.len().saturating_sub(targets[worker]);
        movable.into_iter().rev().take(too_many)
    });
    let offers = free.iter().copied().chain(surplus);
    let wants = loads.iter().flat_map(|(worker, leases)| {
        std::iter::repeat_n(*worker, targets[worker].saturating_sub(leases.len()))
    });
    let mut actions = Vec::new();
    for (lease, worker) in offers.zip(wants) {
        let dead = lease.owner.is_some() && expired(lease);
        let is_free = lease.owner.is_none() || dead || stray(lease);
        let left_lying = is_free
            && observed.unmoved_for(&lease.shard, now)
                > if dead { planner.lease_duration + LEFT_LYING_AFTER } else { LEFT_LYING_AFTER };
        if worker == planner.worker || left_lying {
            let lease = lease.clone();
            actions.push(if is_free { Action::Take(lease) } else { Action::Ask(lease) });
        } else if dead {
            actions.push(Action::Free(lease.clone()));
        }
    }
    actions
}

/// How many leases each worker ought to have: counts differ by at most one, and those who have most
/// keep the odd ones, so that no lease moves that need not move.
fn targets<'a>(loads: &BTreeMap<&'a str, Vec<&Lease>>, leases: usize) -> BTreeMap<&'a str, usize> {
    let mut workers: Vec<(&str, usize)> =
        loads.iter().map(|(worker, leases)| (*worker, leases.len())).collect();
    workers.sort_by_key(|(worker, count)| (Reverse(*count), *worker));
    let (base, odd) = (leases / workers.len(), leases % workers.len());
    workers
        .iter()
        .enumerate()
        .map(|(n, (worker, _))| (*worker, base + usize::from(n < odd)))
        .collect()
}

/// The leases whose shards may be read.
fn startable(snapshot: &[Lease]) -> Vec<&Lease> {
    let unfinished: BTreeSet<&ShardId> =
        snapshot.iter().filter(|lease| !lease.is_finished()).map(|lease| &lease.shard).collect();
    snapshot
        .iter()
        .filter(|lease| !lease.is_finished() && !lease.unreadable)
        // A parent without a lease is finished and forgotten, or expired: it blocks nobody (P5).
        .filter(|lease| lease.parents.iter().all(|parent| !unfinished.contains(parent)))
        .collect()
}

/// The shards that could be read and that nobody reads, if this worker has as many as it may have: then it
/// waits for others, and there may be none.
pub fn unread<'a>(
    snapshot: &'a [Lease],
    observed: &Observations,
    planner: &Planner<'_>,
    now: Instant,
) -> Vec<&'a ShardId> {
    if planner.held.len() + planner.asked.len() < planner.max_leases {
        return Vec::new();
    }
    // Longer than it takes others to see that it is free, and to take it.
    let limit = 2 * planner.lease_duration.max(RENEW_AT_LEAST_EVERY);
    startable(snapshot)
        .into_iter()
        .map(|lease| &lease.shard)
        .filter(|shard| !planner.held.contains(shard))
        .filter(|shard| observed.unmoved_for(shard, now) > limit)
        .collect()
}

/// Whether a lease is finished and no longer needed: its children are known and under way, and none of
/// its parents has a lease any more.
fn is_done_with(lease: &Lease, snapshot: &[Lease]) -> bool {
    let mut children =
        snapshot.iter().filter(|other| other.parents.contains(&lease.shard)).peekable();
    lease.is_finished()
        && !lease.children.is_empty()
        && children.peek().is_some()
        && lease.children.iter().all(|id| snapshot.iter().any(|other| other.shard == *id))
        && children
            .all(|child| matches!(child.checkpoint, Checkpoint::At(_) | Checkpoint::ShardEnd))
        && !snapshot.iter().any(|other| lease.parents.contains(&other.shard))
}

/// Whether some unfinished shard has, as far as this worker can tell, nobody who reads it: its lease is
/// free, or its reader was not seen to move it.
pub fn unattended(snapshot: &[Lease], observed: &Observations, held: &BTreeSet<ShardId>) -> bool {
    snapshot.iter().filter(|lease| !lease.is_finished() && !held.contains(&lease.shard)).any(
        |lease| {
            lease.owner.is_none() || observed.0.get(&lease.shard).is_none_or(|seen| !seen.moved)
        },
    )
}

/// How a worker learns that something changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Watch {
    /// By looking at the whole table after this time.
    Table(Duration),
    /// By reading one row after this time, and the table only when its bell was rung, or its reader
    /// changed or died. Two workers of the fleet look at the table for all, and ring.
    Bell(ShardId, Duration),
}

/// How to watch, given the last snapshot.
///
/// If every worker scanned, reads would grow with workers times shards. So only the readers of the
/// first two leases scan, by whoever holds them; the others read one row.
pub fn watch(snapshot: &[Lease], planner: &Planner<'_>) -> Watch {
    if !planner.asked.is_empty() {
        return Watch::Table(WAITING_INTERVAL);
    }
    let readers = snapshot.iter().filter(|lease| !lease.is_finished()).filter_map(Lease::reader);
    let mut watchers: Vec<&str> = Vec::new();
    for reader in readers {
        if !watchers.contains(&reader) {
            watchers.push(reader);
        }
        if watchers.len() == 2 {
            break;
        }
    }
    match (bell_row(snapshot), watchers.as_slice()) {
        (_, []) => Watch::Table(WATCH_INTERVAL),
        (_, [only]) if *only == planner.worker => Watch::Table(ALONE_INTERVAL),
        (Some(row), [_, _]) if !watchers.contains(&planner.worker) => {
            Watch::Bell(row.clone(), WATCH_INTERVAL)
        }
        _ => Watch::Table(WATCH_INTERVAL),
    }
}

/// The row whose bell is rung: that of the first shard that is not finished.
pub fn bell_row(snapshot: &[Lease]) -> Option<&ShardId> {
    snapshot.iter().find(|lease| !lease.is_finished()).map(|lease| &lease.shard)
}

/// Whether the row that a worker watches tells it to look at the table.
pub fn bell_rings(
    last: &Lease,
    now: Option<&Lease>,
    unmoved: Duration,
    lease_duration: Duration,
) -> bool {
    now.is_none_or(|now| {
        now.bell != last.bell
            || now.owner != last.owner
            || now.checkpoint_owner != last.checkpoint_owner
            || now.is_finished()
            || unmoved > lease_duration.mul_f64(RENEWAL_MISSED_AFTER)
    })
}

/// What the time says about the renewal of a lease.
#[derive(Debug, PartialEq, Eq)]
pub enum Renewal {
    /// Look again then.
    NotBefore(Instant),
    /// Renew now.
    Due,
    /// Another worker may have the lease: it must not be used any more.
    TooLate,
}

/// Until when a lease whose last successful write began at `written_at` may be used.
pub fn usable_until(written_at: Instant, lease_duration: Duration) -> Instant {
    written_at + lease_duration.mul_f64(USE_FOR)
}

/// Whether to renew a lease whose last successful write began at `written_at`.
pub fn renewal(written_at: Instant, lease_duration: Duration, now: Instant) -> Renewal {
    let due = written_at + lease_duration.mul_f64(RENEW_AFTER).min(RENEW_AT_LEAST_EVERY);
    if now >= usable_until(written_at, lease_duration) {
        Renewal::TooLate
    } else if now >= due {
        Renewal::Due
    } else {
        Renewal::NotBefore(due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::Shard;

    const DURATION: Duration = Duration::from_secs(10);
    const LIMIT: Duration = Duration::from_secs(30);
    const KEPT: Duration = Duration::from_secs(360);

    fn lease(shard: &str, parents: &[&str], owner: Option<&str>) -> Lease {
        let shard = Shard {
            id: shard.into(),
            parents: parents.iter().map(|p| ShardId::from(*p)).collect(),
            hash_key_range: None,
            closed: false,
            begins: None,
        };
        Lease {
            owner: owner.map(str::to_owned),
            ..Lease::new(&shard, Checkpoint::TrimHorizon, None)
        }
    }

    /// A worker named `me`, and what it knows.
    struct Me {
        held: BTreeSet<ShardId>,
        asked: BTreeMap<ShardId, Instant>,
        observed: Observations,
        adopt: bool,
        max_leases: usize,
        now: Instant,
    }

    impl Me {
        fn new() -> Self {
            Self {
                held: BTreeSet::new(),
                asked: BTreeMap::new(),
                observed: Observations::default(),
                adopt: false,
                max_leases: usize::MAX,
                now: Instant::now(),
            }
        }

        /// The plan for `table` as a worker that holds the leases of its name, unless it starts.
        fn plans(&mut self, table: &[Lease]) -> Vec<String> {
            if !self.adopt {
                let mine = table.iter().filter(|lease| lease.reader() == Some("me"));
                self.held = mine.map(|lease| lease.shard.clone()).collect();
            }
            self.observed.see(table, self.now);
            let planner = self.planner();
            let shown = |action: Action| match action {
                Action::Take(lease) => format!("take {}", lease.shard),
                Action::Force(lease) => format!("force {}", lease.shard),
                Action::Ask(lease) => format!("ask {}", lease.shard),
                Action::Free(lease) => format!("free {}", lease.shard),
                Action::LetGo(lease) => format!("let go {}", lease.shard),
                Action::Delete(lease) => format!("delete {}", lease.shard),
            };
            plan(table, &self.observed, &planner, self.now).into_iter().map(shown).collect()
        }
    }

    impl Me {
        fn planner(&self) -> Planner<'_> {
            Planner {
                worker: "me",
                held: &self.held,
                asked: &self.asked,
                adopt: self.adopt,
                max_leases: self.max_leases,
                lease_duration: DURATION,
                hand_over_limit: LIMIT,
                finished_kept_for: KEPT,
            }
        }
    }

    fn owned(owners: &[&str]) -> Vec<Lease> {
        owners
            .iter()
            .enumerate()
            .map(|(n, owner)| {
                lease(&format!("{n}"), &[], Some(owner).filter(|o| !o.is_empty()).copied())
            })
            .collect()
    }

    #[test]
    fn a_lone_worker_takes_everything_that_is_free() {
        assert_eq!(Me::new().plans(&owned(&["", "me", ""])), ["take 0", "take 2"]);
    }

    #[test]
    fn p4_a_lease_is_taken_from_its_reader_only_when_it_has_not_moved_for_the_lease_duration() {
        let mut table = owned(&["other"]);
        let mut me = Me::new();
        let start = me.now;
        assert!(me.plans(&table).is_empty());
        me.now = start + DURATION;
        assert!(me.plans(&table).is_empty());
        me.now = start + DURATION + Duration::from_millis(1);
        assert_eq!(me.plans(&table), ["take 0"]);
        table[0].counter += 1;
        assert!(me.plans(&table).is_empty());
        me.now += DURATION;
        assert!(me.plans(&table).is_empty());
    }

    #[test]
    fn after_a_restart_a_worker_takes_its_own_leases_back_at_once() {
        let mut me = Me::new();
        me.adopt = true;
        assert_eq!(me.plans(&owned(&["me", "me"])), ["take 0", "take 1"]);
        me.adopt = false;
        let table = owned(&["me"]);
        me.observed = Observations::default();
        me.held.clear();
        me.adopt = true;
        me.observed.see(&table, me.now);
        me.adopt = false;
        // Not its first look: another process runs under its name, and keeps what it has.
        let held = BTreeSet::new();
        let planner = Planner {
            worker: "me",
            held: &held,
            asked: &me.asked,
            adopt: false,
            max_leases: usize::MAX,
            lease_duration: DURATION,
            hand_over_limit: LIMIT,
            finished_kept_for: KEPT,
        };
        assert!(plan(&table, &me.observed, &planner, me.now).is_empty());
    }

    #[test]
    fn shards_that_nobody_reads_are_known_to_a_worker_that_may_not_read_more() {
        let mut table = owned(&["me", "", "dead", "other"]);
        table.push(lease("child", &["0"], None));
        let mut me = Me::new();
        me.max_leases = 1;
        me.plans(&table);
        let unread = |me: &Me, table: &[Lease]| {
            let unread = unread(table, &me.observed, &me.planner(), me.now);
            unread.into_iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert!(unread(&me, &table).is_empty(), "others have time to take them");
        me.now += 2 * DURATION + Duration::from_millis(1);
        table[0].counter += 1;
        table[3].counter += 1;
        me.plans(&table);
        assert_eq!(unread(&me, &table), ["1", "2"]);
        me.max_leases = 2;
        assert!(unread(&me, &table).is_empty(), "it takes them itself");
    }

    #[test]
    fn p5_a_child_waits_for_every_parent_that_has_an_unfinished_lease() {
        let mut table =
            [lease("c", &["p1", "p2"], None), lease("p1", &[], Some("me")), lease("p2", &[], None)];
        assert_eq!(Me::new().plans(&table), ["take p2"]);
        table[2].checkpoint = Checkpoint::ShardEnd;
        assert!(Me::new().plans(&table).is_empty());
        table[1].checkpoint = Checkpoint::ShardEnd;
        assert_eq!(Me::new().plans(&table), ["take c"]);
        assert_eq!(
            Me::new().plans(&table[..1]),
            ["take c"],
            "parents without a lease block nobody"
        );
    }

    #[test]
    fn a_worker_that_joins_asks_for_its_share_and_no_more() {
        assert_eq!(Me::new().plans(&owned(&["a", "a", "a", "a"])), ["ask 3", "ask 2"]);
        assert_eq!(Me::new().plans(&owned(&["a", "a", "b", "b", "b"])), ["ask 4"]);
        assert!(Me::new().plans(&owned(&["a", "b"])).is_empty(), "a stand-by moves nothing");
    }

    #[test]
    fn no_lease_moves_while_counts_differ_by_at_most_one() {
        assert!(Me::new().plans(&owned(&["me", "a", "a"])).is_empty());
        assert!(Me::new().plans(&owned(&["me", "me", "a"])).is_empty());
        assert!(Me::new().plans(&owned(&["me", "a", "a", "b", "b"])).is_empty());
    }

    #[test]
    fn every_worker_divides_the_free_leases_in_the_same_way() {
        // me has 1, other has 1, four are free: two each, and not the same ones.
        let table = owned(&["me", "other", "", "", "", ""]);
        assert_eq!(Me::new().plans(&table), ["take 2", "take 3"]);
        let seen_by_other = owned(&["me", "other", "", "", "", ""])
            .into_iter()
            .map(|mut lease| {
                lease.owner =
                    lease.owner.map(|o| if o == "me" { "aaa".into() } else { "me".into() });
                lease
            })
            .collect::<Vec<_>>();
        assert_eq!(Me::new().plans(&seen_by_other), ["take 4", "take 5"]);
    }

    #[test]
    fn a_free_lease_that_the_worker_it_falls_to_leaves_lying_is_for_anyone() {
        let table = owned(&["a", "me", "me", ""]);
        let mut me = Me::new();
        assert!(me.plans(&table).is_empty(), "it falls to a");
        me.now += LEFT_LYING_AFTER + Duration::from_millis(1);
        // a is alive, or its own lease would be expired; it may hold no more than it does.
        assert_eq!(me.plans(&table), ["take 3"]);
    }

    #[test]
    fn a_dead_workers_leases_are_freed_for_those_who_are_to_have_them() {
        let mut table = owned(&["a", "dead", "dead", "me"]);
        let mut me = Me::new();
        me.plans(&table);
        me.now += DURATION + Duration::from_millis(1);
        table[0].counter += 1;
        assert_eq!(me.plans(&table), ["free 1", "take 2"]);
    }

    #[test]
    fn a_worker_never_takes_or_asks_for_more_than_it_may_hold() {
        let mut me = Me::new();
        me.max_leases = 2;
        assert_eq!(me.plans(&owned(&["me", "", "", ""])), ["take 1"]);
        assert!(me.plans(&owned(&["me", "me", "a", "a", "a", "a", "a"])).is_empty());
    }

    #[test]
    fn p6_a_hand_over_is_waited_for_until_the_reader_lets_go_dies_or_takes_too_long() {
        let mut table = owned(&["a", "a"]);
        table[1] = table[1].after(&super::super::Change::Ask { worker: "me".into() });
        let mut me = Me::new();
        let start = me.now;
        me.asked.insert("1".into(), start);
        assert!(me.plans(&table).is_empty());

        let mut let_go = table.clone();
        let_go[1] = table[1].after(&super::super::Change::Release { checkpoint: None });
        assert_eq!(me.plans_as_new(&let_go), ["take 1"]);

        me.observed.see(&table, me.now);
        me.now = start + DURATION + Duration::from_millis(1);
        table[0].counter += 1;
        assert_eq!(me.plans(&table), ["take 1"], "the reader does not renew: it is dead");

        table[1].counter += 1;
        assert!(me.plans(&table).is_empty(), "the reader is alive");
        me.now = start + LIMIT + Duration::from_millis(1);
        table.iter_mut().for_each(|lease| lease.counter += 1);
        assert_eq!(me.plans(&table), ["force 1"], "and takes too long");
    }

    impl Me {
        /// The plan of a worker that does not hold what names it.
        fn plans_as_new(&mut self, table: &[Lease]) -> Vec<String> {
            let adopt = std::mem::replace(&mut self.adopt, true);
            self.held.clear();
            let plans = self.plans(table);
            self.adopt = adopt;
            plans
        }
    }

    #[test]
    fn a_hand_over_that_a_restart_interrupted_is_completed() {
        let mut table = owned(&["me"]);
        table[0] = table[0].after(&super::super::Change::Ask { worker: "b".into() });
        let mut me = Me::new();
        me.adopt = true;
        assert_eq!(me.plans(&table), ["let go 0"]);
    }

    #[test]
    fn a_finished_lease_is_deleted_when_its_children_are_under_way_and_its_parents_gone() {
        let mut parent = lease("p", &["grandparent"], None);
        parent.checkpoint = Checkpoint::ShardEnd;
        parent.children = BTreeSet::from(["c".into()]);
        let mut child = lease("c", &["p"], Some("me"));
        let plans = |table: &[Lease]| {
            let mut me = Me::new();
            assert!(me.plans(table).is_empty(), "not before its time");
            me.now += KEPT + Duration::from_millis(1);
            me.plans(table)
        };
        assert!(plans(&[child.clone(), parent.clone()]).is_empty(), "not read yet");
        child.checkpoint = Checkpoint::parse("17", 0).expect("a checkpoint");
        assert_eq!(plans(&[child.clone(), parent.clone()]), ["delete p"]);
        let mut grandparent = lease("grandparent", &[], None);
        grandparent.checkpoint = Checkpoint::ShardEnd;
        assert!(plans(&[child, grandparent, parent.clone()]).is_empty());
        assert!(plans(&[parent]).is_empty(), "no child has a lease");
    }

    #[test]
    fn a_shard_is_attended_when_it_is_ours_or_its_reader_was_seen_to_move_it() {
        let mut table = [lease("a", &[], Some("other")), lease("held", &[], Some("me"))];
        let held = BTreeSet::from([ShardId::from("held")]);
        let mut observed = Observations::default();
        observed.see(&table, Instant::now());
        assert!(unattended(&table, &observed, &held), "the reader may be dead");
        table[0].counter += 1;
        observed.see(&table, Instant::now());
        assert!(!unattended(&table, &observed, &held));
        table[0].owner = None;
        assert!(unattended(&table, &observed, &held));
        table[0].checkpoint = Checkpoint::ShardEnd;
        assert!(!unattended(&table, &observed, &held));
    }

    #[test]
    fn two_workers_watch_the_table_and_the_others_one_row() {
        let watch_as = |owners: &[&str]| {
            let asked = BTreeMap::new();
            let held = BTreeSet::new();
            let planner = Planner {
                worker: "me",
                held: &held,
                asked: &asked,
                adopt: false,
                max_leases: usize::MAX,
                lease_duration: DURATION,
                hand_over_limit: LIMIT,
                finished_kept_for: KEPT,
            };
            watch(&owned(owners), &planner)
        };
        let table = Watch::Table(WATCH_INTERVAL);
        assert_eq!(watch_as(&["me", "me"]), Watch::Table(ALONE_INTERVAL));
        assert_eq!(watch_as(&["me", "a"]), table);
        assert_eq!(watch_as(&["a", "a", "me", "b"]), table);
        assert_eq!(watch_as(&["a", "a", "b", "me"]), Watch::Bell("0".into(), WATCH_INTERVAL));
        assert_eq!(watch_as(&["a", "a"]), table, "a stand-by beside a lone worker");
        assert_eq!(watch_as(&["", ""]), table);
    }

    #[test]
    fn the_bell_rings_for_whatever_needs_a_look() {
        let last = lease("0", &[], Some("a"));
        let rings = |now: Option<Lease>, unmoved| {
            bell_rings(&last, now.as_ref(), Duration::from_secs(unmoved), DURATION)
        };
        assert!(!rings(Some(last.clone()), 3));
        assert!(!rings(Some(Lease { counter: 5, ..last.clone() }), 0));
        assert!(rings(Some(Lease { bell: 1, ..last.clone() }), 0));
        assert!(rings(Some(Lease { owner: None, ..last.clone() }), 0));
        assert!(rings(Some(Lease { checkpoint: Checkpoint::ShardEnd, ..last.clone() }), 0));
        assert!(rings(None, 0));
        assert!(!rings(Some(last.clone()), 5));
        assert!(rings(Some(last.clone()), 6), "its reader missed a renewal, and may be dead");
    }

    #[test]
    fn p4_a_lease_is_renewed_in_time_or_not_used_any_more() {
        let written = Instant::now();
        let at = |secs| renewal(written, DURATION, written + Duration::from_secs(secs));
        assert_eq!(at(0), Renewal::NotBefore(written + Duration::from_secs(4)));
        assert_eq!(at(4), Renewal::Due);
        assert_eq!(at(8), Renewal::Due);
        assert_eq!(at(9), Renewal::TooLate);
    }
}
