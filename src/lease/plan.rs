//! What a worker does about leases, decided from a snapshot of the table and nothing else.
//!
//! Pure: time, identity and what was observed come in as arguments. Every worker plans for itself; two
//! that see the same table plan the same distribution, so they rarely want the same lease, and where
//! they do, the conditional write refuses one of them.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
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

/// A lease that is free for this long is taken by nobody.
const UNREAD_AFTER: Duration = Duration::from_secs(10);

/// How often a worker looks at the table when no other worker is in it.
pub(crate) const LONE_LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// How often the two workers that watch the table for all look at it, and the others at its bell.
const WATCH_INTERVAL: Duration = Duration::from_millis(800);
/// So many rows are read at the price of one or two, for DynamoDB charges by 4 KiB and a row has some 400
/// bytes: then every worker looks at the whole table.
const SMALL_TABLE: usize = 10;
/// A worker that watches the bell looks at the table this often all the same.
const LOOK_AT_LEAST_EVERY: Duration = Duration::from_secs(60);
/// In a large fleet that is more seldom: all workers together look this often.
const FLEET_LOOKS_EVERY: Duration = Duration::from_secs(1);
/// How often a worker looks that waits for leases.
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
    /// If it is free, and was seen with a reader before: the last one.
    left_by: Option<String>,
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
        // The note tells of readers that came and went while we did not look.
        let noted = || lease.note.as_ref().map(|note| note.reader.clone());
        let left_by = last.filter(|_| reader.is_none()).and_then(|last| {
            last.left_by.clone().or_else(|| last.reader.clone().map(|seen| noted().unwrap_or(seen)))
        });
        let seen = Observed { counter, reader, since: now, moved, left_by };
        self.0.insert(lease.shard.clone(), seen);
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
    /// Leases that it lost because its writes were not answered in time, and the counters that it took them
    /// with. A row that still notes that one was not taken by anybody since.
    pub ran_out: &'a BTreeMap<ShardId, u64>,
    /// The most leases it may hold.
    pub max_leases: usize,
    /// Whether it takes no more than it has, because it is behind or short of something.
    pub refuses: bool,
    /// Leases that it gave up because it did not get on with them, and until when it leaves them to
    /// others.
    pub given_up: &'a BTreeMap<ShardId, Instant>,
    /// Leases that it has done all with that it is to do.
    pub left: &'a BTreeSet<ShardId>,
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
    /// Tell the workers that only watch the bell of a free lease that falls to one of them.
    Ring,
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
        let given_up = planner.given_up.get(&lease.shard).is_some_and(|until| now < *until);
        let left = planner.left.contains(&lease.shard);
        if planner.held.contains(&lease.shard) || given_up || left {
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
    if !watchers(snapshot).contains(&planner.worker) {
        actions.retain(|action| *action != Action::Ring);
    }
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
    let mut room = room(planner);
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
        None if owned && ran_out(lease, planner) => Own::Take,
        _ => Own::NotOurs,
    }
}

/// Whether a lease is as this worker left it when it ran out, but for what it wrote without hearing of it.
fn ran_out(lease: &Lease, planner: &Planner<'_>) -> bool {
    let taken_from = planner.ran_out.get(&lease.shard);
    lease.current_note().is_some_and(|note| taken_from == Some(&note.from_counter))
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
    // Who lets go of a lease, or does not renew it, is about to go, although others of its leases may not
    // have expired yet: what is free is not for it.
    for lease in &free {
        let last_reader = match observed.0.get(&lease.shard) {
            _ if lease.owner.is_some() => lease.reader(),
            Some(seen) if now - seen.since <= LEFT_LYING_AFTER => seen.left_by.as_deref(),
            _ => None,
        };
        if let Some(reader) = last_reader.filter(|reader| *reader != planner.worker) {
            loads.remove(reader);
        }
    }

    let (mut actions, mut ours) = (Vec::new(), Vec::new());
    for (lease, worker) in divide(&free, &loads) {
        let dead = lease.owner.is_some() && expired(lease);
        let is_free = lease.owner.is_none() || dead || stray(lease);
        let lying_since = if dead { planner.lease_duration } else { Duration::ZERO };
        let left_lying =
            is_free && observed.unmoved_for(&lease.shard, now) > lying_since + LEFT_LYING_AFTER;
        if worker == planner.worker || left_lying {
            let lease = lease.clone();
            ours.push(if is_free { Action::Take(lease) } else { Action::Ask(lease) });
        } else if dead {
            actions.push(Action::Free(lease.clone()));
        } else if lease.owner.is_none() && !actions.contains(&Action::Ring) {
            actions.push(Action::Ring);
        }
    }
    // Nobody counts a worker that has nothing. So it takes one lease, each worker another one, and its
    // share when the others can see it: of several that start together, the first would take everything,
    // and hand it over again.
    if loads[planner.worker].is_empty() && !ours.is_empty() {
        let mut hasher = DefaultHasher::new();
        planner.worker.hash(&mut hasher);
        let n = hasher.finish() % ours.len() as u64;
        ours = vec![ours.swap_remove(n as usize)];
    }
    actions.extend(ours);
    actions
}

/// Divides leases among workers: the free ones first, then those that their owners have too many of, to
/// the workers that have too few, in one fixed order: every worker that sees the same table divides it in
/// the same way.
fn divide<'a>(
    free: &[&'a Lease],
    loads: &BTreeMap<&'a str, Vec<&'a Lease>>,
) -> Vec<(&'a Lease, &'a str)> {
    let targets = targets(loads, free.len() + loads.values().map(Vec::len).sum::<usize>());
    let surplus = loads.iter().flat_map(|(worker, leases)| {
        let movable: Vec<&Lease> =
            leases.iter().copied().filter(|lease| lease.checkpoint_owner.is_none()).collect();
        let too_many = leases.len().saturating_sub(targets[worker]);
        movable.into_iter().rev().take(too_many)
    });
    let wants = loads.iter().flat_map(|(worker, leases)| {
        std::iter::repeat_n(*worker, targets[worker].saturating_sub(leases.len()))
    });
    free.iter().copied().chain(surplus).zip(wants).collect()
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

/// Whether there is a free lease that could be read, and that the worker may take.
pub fn may_take_more(snapshot: &[Lease], planner: &Planner<'_>) -> bool {
    room(planner) > 0
        && startable(snapshot).iter().any(|lease| {
            lease.owner.is_none()
                && !planner.held.contains(&lease.shard)
                && !planner.left.contains(&lease.shard)
        })
}

/// How many leases more the worker may take.
fn room(planner: &Planner<'_>) -> usize {
    match planner.refuses {
        true => 0,
        false => planner.max_leases.saturating_sub(planner.held.len() + planner.asked.len()),
    }
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

/// The leases that could be read and have been free, or those of a dead worker, for longer than any living
/// worker leaves them: every worker has as many as it takes.
pub fn left_unread<'a>(
    snapshot: &'a [Lease],
    observed: &Observations,
    lease_duration: Duration,
    now: Instant,
) -> Vec<&'a Lease> {
    let is_left = |lease: &&Lease| {
        let runs = if lease.owner.is_some() { lease_duration } else { Duration::ZERO };
        observed.unmoved_for(&lease.shard, now) > runs + UNREAD_AFTER
    };
    startable(snapshot).into_iter().filter(is_left).collect()
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

/// How to watch, given the last snapshot and what this worker wrote since.
///
/// If every worker scanned, reads would grow with workers times shards. So only the readers of the
/// first two leases scan, by whoever holds them; the others read one row. But a worker that sees
/// something to do, or soon to be done, goes on to look itself: the two may not know that it is there,
/// nor for how long a lease was not renewed.
pub fn watch(
    snapshot: &[Lease],
    observed: &Observations,
    planner: &Planner<'_>,
    now: Instant,
) -> Watch {
    let waits = !planner.asked.is_empty()
        || room(planner) > 0 && !plan(snapshot, observed, planner, now).is_empty();
    // Until long after it would have been taken.
    let dying = |lease: &&Lease| {
        let unmoved = observed.unmoved_for(&lease.shard, now);
        lease.owner.is_some()
            && misses_renewal(unmoved, planner.lease_duration)
            && unmoved < planner.lease_duration + UNREAD_AFTER
    };
    let watchers = watchers(snapshot);
    match (bell_row(snapshot), watchers.as_slice()) {
        _ if waits => Watch::Table(WAITING_INTERVAL),
        (_, [only]) if *only == planner.worker => Watch::Table(LONE_LOOK_INTERVAL),
        (Some(row), [_, _])
            if snapshot.len() > SMALL_TABLE && !watchers.contains(&planner.worker) =>
        {
            match startable(snapshot).iter().any(dying) {
                true => Watch::Table(WATCH_INTERVAL),
                false => Watch::Bell(row.clone(), WATCH_INTERVAL),
            }
        }
        _ => Watch::Table(WATCH_INTERVAL),
    }
}

/// How often a worker that watches the bell looks at the table although the bell was not rung.
pub fn look_at_least_every(snapshot: &[Lease]) -> Duration {
    let readers: BTreeSet<&str> = snapshot.iter().filter_map(Lease::reader).collect();
    LOOK_AT_LEAST_EVERY.max(FLEET_LOOKS_EVERY * readers.len() as u32)
}

/// The two workers that look at the table for all: the readers of the first leases.
fn watchers(snapshot: &[Lease]) -> Vec<&str> {
    let mut watchers: Vec<&str> = Vec::new();
    let unfinished = snapshot.iter().filter(|lease| !lease.is_finished());
    for reader in unfinished.filter_map(Lease::reader) {
        if !watchers.contains(&reader) {
            watchers.push(reader);
        }
        if watchers.len() == 2 {
            break;
        }
    }
    watchers
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
            || misses_renewal(unmoved, lease_duration)
    })
}

fn misses_renewal(unmoved: Duration, lease_duration: Duration) -> bool {
    unmoved > lease_duration.mul_f64(RENEWAL_MISSED_AFTER)
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
        refuses: bool,
        given_up: BTreeMap<ShardId, Instant>,
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
                refuses: false,
                given_up: BTreeMap::new(),
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
            let shown = |action: Action| match action {
                Action::Take(lease) => format!("take {}", lease.shard),
                Action::Force(lease) => format!("force {}", lease.shard),
                Action::Ask(lease) => format!("ask {}", lease.shard),
                Action::Free(lease) => format!("free {}", lease.shard),
                Action::Ring => "ring".to_owned(),
                Action::LetGo(lease) => format!("let go {}", lease.shard),
                Action::Delete(lease) => format!("delete {}", lease.shard),
            };
            self.with_planner(|observed, planner, now| plan(table, observed, planner, now))
                .into_iter()
                .map(shown)
                .collect()
        }

        fn with_planner<T>(
            &self,
            ask: impl FnOnce(&Observations, &Planner<'_>, Instant) -> T,
        ) -> T {
            let planner = Planner {
                worker: "me",
                held: &self.held,
                asked: &self.asked,
                adopt: self.adopt,
                ran_out: &BTreeMap::new(),
                max_leases: self.max_leases,
                refuses: self.refuses,
                given_up: &self.given_up,
                left: &BTreeSet::new(),
                lease_duration: DURATION,
                hand_over_limit: LIMIT,
                finished_kept_for: KEPT,
            };
            ask(&self.observed, &planner, self.now)
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
        let plans = me.with_planner(|observed, planner, now| plan(&table, observed, planner, now));
        assert!(plans.is_empty());
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
        let mut me = Me::new();
        let mut table = owned(&["a", "a", "a", "a", "b", "b", "b", "b"]);
        let first = me.plans(&table);
        assert_eq!(first.len(), 1, "the others are to see it first: {first:?}");
        table[3] = table[3].after(&super::super::Change::Ask { worker: "me".into() });
        me.asked.insert("3".into(), me.now);
        assert_eq!(me.plans(&table), ["ask 7"]);
        assert!(Me::new().plans(&owned(&["a", "b"])).is_empty(), "a stand-by moves nothing");
    }

    #[test]
    fn of_workers_that_start_together_none_takes_everything() {
        let table = owned(&["", "", "", "", "", ""]);
        let taken = Me::new().plans(&table);
        assert_eq!(taken.len(), 1, "{taken:?}");
        assert_eq!(Me::new().plans(&owned(&["me", "a", "b", "", "", ""])), ["ring", "take 5"]);
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
        assert_eq!(Me::new().plans(&table), ["ring", "take 2", "take 3"]);
        let seen_by_other = owned(&["me", "other", "", "", "", ""])
            .into_iter()
            .map(|mut lease| {
                lease.owner =
                    lease.owner.map(|o| if o == "me" { "aaa".into() } else { "me".into() });
                lease
            })
            .collect::<Vec<_>>();
        assert_eq!(Me::new().plans(&seen_by_other), ["ring", "take 4", "take 5"]);
    }

    #[test]
    fn a_free_lease_that_the_worker_it_falls_to_leaves_lying_is_for_anyone() {
        let table = owned(&["a", "me", "me", ""]);
        let mut me = Me::new();
        assert_eq!(me.plans(&table), ["ring"], "it falls to a");
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
    fn what_a_dying_worker_leaves_is_not_for_it_although_its_other_leases_have_not_expired() {
        let mut me = Me::new();
        let mut table = owned(&["dead", "dead", "a", "a", "me"]);
        me.plans(&table);
        me.now += Duration::from_secs(60);
        // Meanwhile it renewed one for the last time; the other one is free already.
        table.iter_mut().for_each(|lease| lease.counter += 1);
        table[0] = table[0].after(&super::super::Change::Free);
        assert_eq!(me.plans(&table), ["take 0"]);
        assert_eq!(Me::new().plans(&table), [""; 0], "who did not see it go cannot know");
    }

    #[test]
    fn a_worker_never_takes_or_asks_for_more_than_it_may_hold() {
        let mut me = Me::new();
        me.max_leases = 2;
        assert_eq!(me.plans(&owned(&["me", "", "", ""])), ["take 1"]);
        assert!(me.plans(&owned(&["me", "me", "a", "a", "a", "a", "a"])).is_empty());
    }

    #[test]
    fn a_worker_that_refuses_more_keeps_what_it_has_and_completes_what_it_asked_for() {
        let mut me = Me::new();
        me.refuses = true;
        assert!(me.plans(&owned(&["me", "", "a", "a", "a"])).is_empty());
        me.asked.insert("1".into(), me.now);
        me.held.clear();
        let planner_sees = owned(&["a", "me", ""]);
        assert_eq!(me.plans_as_new(&planner_sees), ["take 1"], "it was handed over to it");
    }

    #[test]
    fn a_lease_that_was_given_up_is_left_to_others_for_a_while() {
        let mut me = Me::new();
        me.given_up.insert("1".into(), me.now + DURATION);
        let table = owned(&["me", "", ""]);
        assert_eq!(me.plans(&table), ["take 2"]);
        me.now += DURATION;
        assert_eq!(me.plans(&table), ["take 1", "take 2"]);
    }

    #[test]
    fn what_every_worker_refuses_is_noticed() {
        let mut me = Me::new();
        let table = owned(&["a", "", "me"]);
        me.plans(&table);
        let unread = |after: Duration| {
            let now = me.now + after + Duration::from_millis(1);
            let unread = left_unread(&table, &me.observed, DURATION, now);
            unread.iter().map(|lease| lease.shard.as_str()).collect::<Vec<_>>()
        };
        assert_eq!(unread(Duration::ZERO), [""; 0]);
        assert_eq!(unread(UNREAD_AFTER), ["1"]);
        assert_eq!(unread(DURATION + UNREAD_AFTER), ["0", "1", "2"], "those of the dead too");
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

    impl Me {
        /// How a worker watches `table` that holds the leases of its name.
        fn watches(&mut self, table: &[Lease]) -> Watch {
            self.plans(table);
            self.with_planner(|observed, planner, now| watch(table, observed, planner, now))
        }
    }

    #[test]
    fn two_workers_watch_the_table_and_the_others_one_row() {
        let watches = |owners: &[&str]| Me::new().watches(&owned(owners));
        let table = Watch::Table(WATCH_INTERVAL);
        let others = ["c", "d", "e", "f", "g", "h", "i", "j"];
        let with_others = |owners: &[&'static str]| [owners, &others].concat();
        assert_eq!(watches(&["me", "me"]), Watch::Table(LONE_LOOK_INTERVAL));
        assert_eq!(watches(&with_others(&["me", "a"])), table);
        assert_eq!(watches(&with_others(&["a", "a", "me", "b"])), table);
        let bell = Watch::Bell("0".into(), WATCH_INTERVAL);
        assert_eq!(watches(&with_others(&["a", "b", "me"])), bell);
        assert_eq!(watches(&["a", "b", "me"]), table, "a small table costs no more than one row");
        assert_eq!(watches(&["a"]), table, "a stand-by beside a lone worker");
    }

    #[test]
    fn a_worker_watches_the_table_until_it_has_its_share_and_nobody_is_dying() {
        let waiting = Watch::Table(WAITING_INTERVAL);
        let bell = Watch::Bell("00".into(), WATCH_INTERVAL);
        let mut table: Vec<Lease> = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "j", "me"]
            .iter()
            .enumerate()
            .map(|(n, owner)| lease(&format!("{n:02}"), &[], Some(owner)))
            .collect();
        assert_eq!(Me::new().watches(&table), bell);
        let mut without = table.clone();
        without[11].owner = Some("i".into());
        assert_eq!(Me::new().watches(&without), waiting, "another took what was its share");
        let mut me = Me { max_leases: 0, ..Me::new() };
        assert_eq!(me.watches(&without), bell, "it wants no share");

        let mut me = Me::new();
        me.watches(&table);
        me.now += Duration::from_secs(6);
        table[1..].iter_mut().for_each(|lease| lease.counter += 1);
        assert_eq!(me.watches(&table), Watch::Table(WATCH_INTERVAL), "a missed a renewal");
        table[0].counter += 1;
        assert_eq!(me.watches(&table), bell);
    }

    #[test]
    fn the_looks_that_each_worker_makes_now_and_then_do_not_grow_with_the_fleet() {
        let fleet_of = |workers: usize| {
            let names: Vec<String> = (0..workers).map(|n| format!("w{n}")).collect();
            owned(&names.iter().map(String::as_str).collect::<Vec<_>>())
        };
        assert_eq!(look_at_least_every(&fleet_of(4)), Duration::from_secs(60));
        assert_eq!(look_at_least_every(&fleet_of(200)), Duration::from_secs(200));
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
