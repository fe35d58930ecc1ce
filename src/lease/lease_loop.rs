//! Carries out the plan: looks at the table, acts by conditional writes, and hands out what it got.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use jiff::Timestamp;
use tokio::time::Instant;

use super::{
    Change, HeldLease, InitialPosition, Lease, LeaseError, LeaseStore, missing_leases, outlived,
    plan::{self, Action, Observations, Planner, Watch},
};
use crate::shard::{Shard, ShardId};

/// Longer than the other workers leave a lease to the one that it falls to.
const LEFT_TO_OTHERS_FOR: Duration = Duration::from_secs(10);
/// How many writes are under way at once.
const CONCURRENT_WRITES: usize = 16;
/// How long a worker leaves the creation of leases to another one that does it at the same time.
const LEFT_TO_CREATOR_FOR: Duration = Duration::from_millis(300);

/// How leases are taken and kept.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The name of this worker.
    pub worker: String,
    /// The most leases that it may hold.
    pub max_leases: usize,
    /// How long a lease lasts without renewal.
    pub lease_duration: Duration,
    /// How long a reader that was asked may take to let go.
    pub hand_over_limit: Duration,
    /// How long a finished lease is kept although nobody needs it any more: longer than a request to
    /// create it can be on its way.
    pub finished_kept_for: Duration,
    /// Determines the jitter of retries.
    pub seed: u64,
    /// The wall clock, for notes; no decision is made by it.
    pub wall_clock: fn() -> Timestamp,
}

/// How long a finished lease is kept. AWS refuses a request that was signed more than five minutes ago
/// (SigV4), so none that would create the lease again arrives after this.
pub const FINISHED_KEPT_FOR: Duration = Duration::from_secs(360);
/// How old a snapshot may be when leases are created by it: a process may have been paused since.
const SNAPSHOT_GOOD_FOR: Duration = Duration::from_secs(20);

/// Creates the leases that `listed` shards ought to have, parents first, and gives the table as it is
/// when none is missing: other workers create them too, and a parent that was not seen would not block
/// its children (P5).
pub async fn create_missing<S: LeaseStore>(
    store: &S,
    listed: &[Shard],
    initial: InitialPosition,
) -> Result<Vec<Lease>, LeaseError> {
    loop {
        let looked_at = Instant::now();
        let snapshot = store.scan().await?;
        if let Some((lease, begins)) = outlived(listed, &snapshot) {
            return Err(LeaseError::Outlived {
                table: store.name().to_owned(),
                shard: lease.shard.clone(),
                begins: begins.clone(),
                checkpoint: lease.checkpoint.clone(),
            });
        }
        let missing = missing_leases(listed, &snapshot, initial);
        if missing.is_empty() {
            return Ok(snapshot);
        }
        for lease in &missing {
            if looked_at.elapsed() > SNAPSHOT_GOOD_FOR {
                break;
            }
            if !store.create(lease).await? {
                // Another worker is at it. If all who start at once went on, each would write each lease.
                tokio::time::sleep(LEFT_TO_CREATOR_FOR).await;
                break;
            }
            tracing::info!(shard = %lease.shard, start = %lease.checkpoint, "lease created");
        }
    }
}

/// What a look at the table led to.
#[derive(Debug)]
pub struct Looked<S> {
    /// Leases that this worker has now: start to read their shards.
    pub taken: Vec<Arc<HeldLease<S>>>,
    /// When to look again.
    pub again_at: Instant,
    /// The first thing that could not be carried out, if any; the next look plans it again.
    pub error: Option<LeaseError>,
}

/// The dealings of one worker with the lease table.
#[derive(Debug)]
pub struct LeaseLoop<S> {
    store: S,
    settings: Settings,
    held: BTreeMap<ShardId, Arc<HeldLease<S>>>,
    asked: BTreeMap<ShardId, Instant>,
    /// The leases whose readers it may have overruled without hearing of it.
    overruled: BTreeSet<ShardId>,
    /// Leases that were given up, and until when they are left to others.
    given_up: BTreeMap<ShardId, Instant>,
    /// Leases that ran out because the table could not be reached, and the counters that they were taken with.
    ran_out: BTreeMap<ShardId, u64>,
    /// Shards that are not taken again.
    left: BTreeSet<ShardId>,
    refuses: bool,
    /// At how many looks in a row there were shards that nobody reads.
    looks_unread: u32,
    observed: Observations,
    snapshot: Vec<Lease>,
    /// When the table was last looked at.
    looked_at: Option<Instant>,
    watch: Watch,
}

impl<S: LeaseStore> LeaseLoop<S> {
    /// The dealings of a worker that has no lease yet.
    pub fn new(store: S, settings: Settings) -> Self {
        Self {
            store,
            settings,
            held: BTreeMap::new(),
            asked: BTreeMap::new(),
            overruled: BTreeSet::new(),
            given_up: BTreeMap::new(),
            ran_out: BTreeMap::new(),
            left: BTreeSet::new(),
            refuses: false,
            looks_unread: 0,
            observed: Observations::default(),
            snapshot: Vec::new(),
            looked_at: None,
            watch: Watch::Table(Duration::ZERO),
        }
    }

    /// The leases that the worker has.
    pub fn held(&self) -> impl Iterator<Item = &Arc<HeldLease<S>>> {
        self.held.values()
    }

    /// Whether a look at the table has succeeded.
    pub fn has_looked(&self) -> bool {
        self.looked_at.is_some()
    }

    /// Whether some unfinished shard has, as far as this worker can tell, nobody who reads it.
    pub fn unattended(&self) -> bool {
        let held = self.held.keys().cloned().collect();
        plan::unattended(&self.snapshot, &self.observed, &held)
    }

    /// Takes note that a shard is not read here any more: it was lost, handed over, released or ended.
    pub fn done(&mut self, shard: &ShardId) {
        let held = self.held.remove(shard);
        if let Some(counter) = held.and_then(|held| held.ran_out_from()) {
            self.ran_out.insert(shard.clone(), counter);
        }
    }

    /// The same of a shard that this worker did not get on with: others are to take it.
    pub fn give_up(&mut self, shard: &ShardId) {
        self.done(shard);
        self.given_up.insert(shard.clone(), Instant::now() + LEFT_TO_OTHERS_FOR);
    }

    /// The same of a shard that this worker has done all with that it is to do, and does not take again.
    pub fn leave(&mut self, shard: &ShardId) {
        self.done(shard);
        self.left.insert(shard.clone());
    }

    /// Whether every lease that could be taken was left: there is nothing more to do.
    pub fn all_left(&self) -> bool {
        let mut unfinished = self.snapshot.iter().filter(|lease| !lease.is_finished());
        !self.left.is_empty() && unfinished.all(|lease| self.left.contains(&lease.shard))
    }

    /// Whether there is a free lease that this worker may take at one of its next looks.
    pub fn may_take_more(&self) -> bool {
        self.with_planner(|snapshot, _, planner| plan::may_take_more(snapshot, planner))
    }

    /// From now on takes no more leases than it has, or takes its share again.
    pub fn refuse(&mut self, refuses: bool) {
        if refuses != self.refuses {
            match refuses {
                true => tracing::warn!(
                    "this worker takes no more leases until it has caught up; it keeps those it has"
                ),
                false => tracing::info!("this worker takes its share of leases again"),
            }
        }
        self.refuses = refuses;
    }

    /// Whether the next look is only at the bell.
    pub fn watches_bell(&self) -> bool {
        matches!(self.watch, Watch::Bell(..))
    }

    /// Looks whether there is something to do, and does it. With the stream's shards, `listed`, it also
    /// creates the leases that they ought to have.
    pub async fn look(
        &mut self,
        listed: Option<(&[Shard], InitialPosition)>,
    ) -> Result<Looked<S>, LeaseError> {
        if let (Watch::Bell(row, interval), Some(looked_at)) = (self.watch.clone(), self.looked_at)
            && looked_at.elapsed() < plan::look_at_least_every(&self.snapshot)
            && !self.bell_rings(&row).await?
        {
            let again_at = Instant::now() + interval;
            return Ok(Looked { taken: Vec::new(), again_at, error: None });
        }
        self.snapshot = match listed {
            Some((listed, initial)) => create_missing(&self.store, listed, initial).await?,
            None => self.store.scan().await?,
        };
        self.snapshot.sort_by(|a, b| a.shard.cmp(&b.shard));
        let now = Instant::now();
        self.observed.see(&self.snapshot, now);
        self.given_up.retain(|_, until| now < *until);
        self.tell_unread(now);
        let me = &self.settings.worker;
        self.asked.retain(|shard, _| {
            let mut snapshot = self.snapshot.iter();
            snapshot.any(|lease| lease.shard == *shard && lease.owner.as_ref() == Some(me))
        });
        self.overruled.retain(|shard| self.asked.contains_key(shard));
        for lease in self.snapshot.iter().filter(|lease| lease.checkpoint_owner.is_some()) {
            if lease.owner.as_ref() == Some(me) {
                // Also what we asked for before a restart: the reader has the time that it always has.
                self.asked.entry(lease.shard.clone()).or_insert(now);
            } else if lease.checkpoint_owner.as_ref() == Some(me)
                && let Some(held) = self.held.get(&lease.shard)
            {
                held.ask();
            }
        }
        let actions = self.with_planner(|snapshot, observed, planner| {
            plan::plan(snapshot, observed, planner, now)
        });
        let mut ring =
            actions.iter().any(|action| matches!(action, Action::Free(_) | Action::Ring));

        let results: Vec<(Action, Instant, Result<Option<Lease>, LeaseError>)> =
            stream::iter(actions)
                .map(|action| async {
                    let began = Instant::now();
                    let result = self.carry_out(&action).await;
                    (action, began, result)
                })
                .buffer_unordered(CONCURRENT_WRITES)
                .collect()
                .await;
        self.looked_at = Some(now);
        let mut taken = Vec::new();
        let mut failed = None;
        let mut outrun = false;
        for (action, began, result) in results {
            match (action, result) {
                (action, Ok(Some(lease))) => {
                    let row = self.snapshot.iter_mut().find(|row| row.shard == lease.shard);
                    row.into_iter().for_each(|row| *row = lease.clone());
                    // It may be one too many, and there are workers without any that do not know of it.
                    let from_dead = |was: &Lease| {
                        was.owner.as_ref().is_some_and(|owner| *owner != self.settings.worker)
                    };
                    ring |= matches!(&action, Action::Take(was) if from_dead(was));
                    match action {
                        Action::Take(_) | Action::Force(_) => {
                            // The reader that was overruled may go on until its lease would have run out.
                            let overruled = matches!(action, Action::Force(_))
                                || self.overruled.remove(&lease.shard);
                            let wait = match overruled {
                                true => self.settings.lease_duration,
                                false => Duration::ZERO,
                            };
                            taken.push(self.hold(lease, began, Instant::now() + wait));
                        }
                        Action::Ask(_) => {
                            self.asked.insert(lease.shard, now);
                        }
                        _ => {}
                    }
                }
                (Action::Delete(lease), Ok(None)) => {
                    self.snapshot.retain(|row| row.shard != lease.shard);
                }
                (action, Ok(None) | Err(LeaseError::Lost { .. } | LeaseError::Gone { .. })) => {
                    outrun |= matches!(action, Action::Take(_));
                }
                (action, Err(error)) => {
                    if let Action::Force(lease) = &action {
                        self.overruled.insert(lease.shard.clone());
                    }
                    if let Action::Take(lease) | Action::Force(lease) | Action::Ask(lease) = action
                    {
                        // It may have been written all the same: then the row will name us.
                        self.asked.insert(lease.shard, now);
                    }
                    failed = failed.or(Some(error));
                }
            }
        }
        if ring {
            failed = failed.or(self.ring().await.err());
        }
        let now = Instant::now();
        self.observed.see(&self.snapshot, now);
        self.watch = match outrun && self.held.is_empty() {
            // Of several workers that start together, each is to be seen before any takes its share.
            true => Watch::Table(Duration::ZERO),
            false => self.with_planner(|snapshot, observed, planner| {
                plan::watch(snapshot, observed, planner, now)
            }),
        };
        let (Watch::Table(interval) | Watch::Bell(_, interval)) = &self.watch;
        Ok(Looked { taken, again_at: Instant::now() + *interval, error: failed })
    }

    /// A maximum that is too low for the fleet leaves shards unread: that must not go unseen. After an outage
    /// of the table they are unread at one look, and taken by it.
    fn tell_unread(&mut self, now: Instant) {
        let unread =
            plan::left_unread(&self.snapshot, &self.observed, self.settings.lease_duration, now);
        self.looks_unread = if unread.is_empty() { 0 } else { self.looks_unread.saturating_add(1) };
        match unread.first() {
            Some(first) if self.looks_unread == 2 => tracing::warn!(
                shards = unread.len(), first = %first.shard,
                "shards that are read by nobody: every worker has as many leases as it takes; start \
                 another worker, or raise the limits of these"
            ),
            _ => {}
        }
    }

    fn with_planner<T>(&self, plan: impl FnOnce(&[Lease], &Observations, &Planner<'_>) -> T) -> T {
        let held = self.held.keys().cloned().collect();
        let planner = Planner {
            worker: &self.settings.worker,
            held: &held,
            asked: &self.asked,
            adopt: self.looked_at.is_none(),
            ran_out: &self.ran_out,
            max_leases: self.settings.max_leases,
            refuses: self.refuses,
            given_up: &self.given_up,
            left: &self.left,
            lease_duration: self.settings.lease_duration,
            hand_over_limit: self.settings.hand_over_limit,
            finished_kept_for: self.settings.finished_kept_for,
        };
        plan(&self.snapshot, &self.observed, &planner)
    }

    fn hold(&mut self, lease: Lease, taken_at: Instant, usable_from: Instant) -> Arc<HeldLease<S>> {
        let shard = lease.shard.clone();
        self.asked.remove(&shard);
        self.ran_out.remove(&shard);
        let Settings { lease_duration, seed, .. } = self.settings;
        let store = self.store.clone();
        let held = HeldLease::new(store, lease, taken_at, usable_from, lease_duration, seed);
        let held = Arc::new(held);
        self.held.insert(shard, held.clone());
        held
    }

    async fn carry_out(&self, action: &Action) -> Result<Option<Lease>, LeaseError> {
        let worker = || self.settings.worker.clone();
        match action {
            Action::Take(lease) | Action::Force(lease) => {
                let take = Change::Take { worker: worker(), at: (self.settings.wall_clock)() };
                let taken = self.store.update(&mut lease.clone(), &take).await?;
                tracing::info!(
                    shard = %taken.shard, counter = taken.counter, checkpoint = %taken.checkpoint,
                    from = lease.reader().unwrap_or("nobody"), "lease taken"
                );
                Ok(Some(taken))
            }
            Action::Ask(lease) => {
                let asked = self
                    .store
                    .update(&mut lease.clone(), &Change::Ask { worker: worker() })
                    .await?;
                tracing::info!(
                    shard = %asked.shard, reader = asked.reader().unwrap_or("nobody"),
                    "asked for a lease, to balance the load"
                );
                Ok(Some(asked))
            }
            Action::Free(lease) => {
                tracing::info!(
                    shard = %lease.shard, reader = lease.reader().unwrap_or("nobody"),
                    "lease taken from a worker that does not renew it, for another one"
                );
                self.store.update(&mut lease.clone(), &Change::Free).await.map(Some)
            }
            Action::LetGo(lease) => self
                .store
                .update(&mut lease.clone(), &Change::Release { checkpoint: None })
                .await
                .map(Some),
            Action::Ring => Ok(None), // After the other writes.
            Action::Delete(lease) => {
                tracing::info!(shard = %lease.shard, "finished lease deleted");
                self.store.delete(lease).await.map(|()| None)
            }
        }
    }

    async fn bell_rings(&mut self, row: &ShardId) -> Result<bool, LeaseError> {
        let now = self.store.get(row).await?;
        let Some(last) = self.snapshot.iter().find(|lease| lease.shard == *row) else {
            return Ok(true);
        };
        let at = Instant::now();
        if let Some(now) = &now {
            self.observed.see_one(now, at);
        }
        let unmoved = self.observed.unmoved_for(row, at);
        Ok(plan::bell_rings(last, now.as_ref(), unmoved, self.settings.lease_duration))
    }

    /// Makes the workers that only watch the bell look at the table: there is something to take.
    pub async fn ring(&self) -> Result<(), LeaseError> {
        match plan::bell_row(&self.snapshot) {
            Some(row) => self.store.ring(row).await,
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        checkpoint::Checkpoint,
        lease::{MemoryTable, deaf::Deaf},
    };

    fn settings(worker: &str) -> Settings {
        Settings {
            worker: worker.to_owned(),
            max_leases: usize::MAX,
            lease_duration: Duration::from_secs(10),
            hand_over_limit: Duration::from_secs(30),
            finished_kept_for: FINISHED_KEPT_FOR,
            seed: 1,
            wall_clock: || Timestamp::UNIX_EPOCH,
        }
    }

    /// A table with one lease that `reader` has and `asker` asked for.
    async fn asked() -> (MemoryTable, Lease) {
        let shard = Shard {
            id: "1".into(),
            parents: Vec::new(),
            hash_key_range: None,
            closed: false,
            begins: None,
        };
        let table = MemoryTable::default();
        let mut lease = Lease::new(&shard, Checkpoint::TrimHorizon, None);
        table.create(&lease).await.expect("a lease");
        for change in [
            Change::Take { worker: "reader".into(), at: Timestamp::UNIX_EPOCH },
            Change::Ask { worker: "asker".into() },
        ] {
            lease = table.update(&mut lease, &change).await.expect("written");
        }
        (table, lease)
    }

    #[tokio::test(start_paused = true)]
    async fn after_an_outage_of_the_table_what_is_taken_at_once_is_not_told_as_unread() {
        let (table, lease) = asked().await;
        let mut worker = LeaseLoop::new(table.clone(), settings("reader"));
        worker.look(None).await.expect("a look");
        let shard = lease.shard.clone();
        worker.done(&shard);
        // Nobody renewed it meanwhile, for nobody could.
        tokio::time::sleep(Duration::from_secs(60)).await;
        worker.look(None).await.expect("a look");
        assert_eq!(worker.looks_unread, 1);
        assert!(worker.held.contains_key(&shard), "it is taken by the same look");
        worker.look(None).await.expect("a look");
        assert_eq!(worker.looks_unread, 0, "and so it is not told");
    }

    #[tokio::test(start_paused = true)]
    async fn p4_a_lease_that_ran_out_is_taken_again_at_once_unless_somebody_took_it() {
        let take = Change::Take { worker: "asker".into(), at: Timestamp::UNIX_EPOCH };
        // A renewal of ours may have landed unheard; another process may run under our name.
        for (written, again) in [(None, 1), (Some(Change::Renew), 1), (Some(take), 0)] {
            let (table, mut lease) = asked().await;
            let mut worker = LeaseLoop::new(table.clone(), settings("asker"));
            worker.look(None).await.expect("a look");
            let release = Change::Release { checkpoint: None };
            table.update(&mut lease, &release).await.expect("released");
            let taken = worker.look(None).await.expect("a look").taken;
            let [held] = &taken[..] else { panic!("it is taken") };
            // Too late for a renewal, and too early to take the lease from somebody else.
            tokio::time::sleep(Duration::from_millis(9_500)).await;
            held.clone().keep().await;
            let mut lease = held.lease().await;
            worker.done(&lease.shard);
            if let Some(written) = &written {
                table.update(&mut lease, written).await.expect("written");
            }
            let taken = worker.look(None).await.expect("a look").taken;
            assert_eq!(taken.len(), again, "{written:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn p1_what_was_asked_for_before_a_restart_is_taken_when_the_reader_lets_go() {
        let (table, mut lease) = asked().await;
        let mut asker = LeaseLoop::new(table.clone(), settings("asker"));
        assert!(asker.look(None).await.expect("a look").taken.is_empty());
        let release = Change::Release { checkpoint: None };
        table.update(&mut lease, &release).await.expect("released");
        assert_eq!(asker.look(None).await.expect("a look").taken.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn p1_what_was_asked_for_before_a_restart_is_taken_from_a_reader_that_lives_but_does_not_let_go()
     {
        let (table, mut lease) = asked().await;
        let mut asker = LeaseLoop::new(table.clone(), settings("asker"));
        for _ in 0..31 {
            assert!(asker.look(None).await.expect("a look").taken.is_empty());
            lease = table.update(&mut lease, &Change::Renew).await.expect("renewed");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        assert_eq!(asker.look(None).await.expect("a look").taken.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn p1_who_takes_the_lease_of_a_dead_worker_rings_for_those_that_have_none() {
        let table = MemoryTable::default();
        for (shard, worker) in [("1", "me"), ("2", "dead")] {
            let shard = Shard {
                id: shard.into(),
                parents: Vec::new(),
                hash_key_range: None,
                closed: false,
                begins: None,
            };
            let mut lease = Lease::new(&shard, Checkpoint::TrimHorizon, None);
            table.create(&lease).await.expect("a lease");
            let take = Change::Take { worker: worker.into(), at: Timestamp::UNIX_EPOCH };
            table.update(&mut lease, &take).await.expect("taken");
        }
        let mut me = LeaseLoop::new(table.clone(), settings("me"));
        assert_eq!(me.look(None).await.expect("a look").taken.len(), 1);
        assert_eq!(table.rows()[0].bell, 0);
        tokio::time::sleep(Duration::from_secs(11)).await;
        assert_eq!(me.look(None).await.expect("a look").taken.len(), 1);
        assert_eq!(table.rows()[0].bell, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn p4_a_reader_is_waited_for_although_the_answer_to_overruling_it_was_lost() {
        let (table, mut lease) = asked().await;
        let deaf = Deaf::new(table.clone());
        let mut asker = LeaseLoop::new(deaf.clone(), settings("asker"));
        for _ in 0..31 {
            asker.look(None).await.expect("a look");
            lease = table.update(&mut lease, &Change::Renew).await.expect("renewed");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        deaf.lose_next_answer();
        let unheard = asker.look(None).await.expect("a look");
        assert!(unheard.error.is_some() && unheard.taken.is_empty());
        let taken = asker.look(None).await.expect("a look").taken;
        let began = Instant::now();
        taken[0].usable().await;
        assert!(began.elapsed() >= settings("asker").lease_duration);
    }
}
