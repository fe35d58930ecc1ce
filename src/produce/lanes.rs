//! Which lanes go into the next call: the decision, without I/O and clock.
//!
//! A lane is the messages of one partition key, in order. At most one record of a lane is on its way, and
//! so a call has at most one of each. Whatever subset of a call's records Kinesis stores, and whether we
//! learn of it or not, no message of a lane can overtake another (P7). The next record goes when the spool
//! knows that the last one is in Kinesis.

use std::{
    collections::{BTreeMap, HashSet},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    BatchPolicy,
    shards::{ShardRate, Shards},
    spool::LaneId,
};
use crate::{backoff::Backoff, shard::Shard};

/// A throttled lane tries again within this time: the limits are those of a second.
const THROTTLED_WAIT_LIMIT: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub record_bytes: usize,
    pub call_bytes: usize,
    pub call_records: usize,
    /// Calls under way at the same time.
    pub calls: usize,
    /// Bytes of all records under way.
    pub under_way_bytes: usize,
}

/// All lanes that have messages, or may get some.
pub(super) struct Lanes {
    limits: Limits,
    policy: BatchPolicy,
    lanes: BTreeMap<LaneId, Lane>,
    shards: Shards,
    calls: usize,
    under_way_bytes: usize,
    /// Bytes of a record for each byte of the spool, as seen of late.
    expansion: f64,
    seed: u64,
}

struct Lane {
    hash_key: u128,
    host: String,
    /// No more messages will come.
    closed: bool,
    /// Lanes that must be empty first.
    after: Vec<LaneId>,
    messages: u64,
    spooled_bytes: u64,
    /// When a record is to go; set while messages wait of which none is under way.
    due: Option<Instant>,
    under_way: Option<UnderWay>,
    /// Its last record is in Kinesis, and the spool does not know it yet. The next one waits for that: so a
    /// process that is killed leaves one record at most that may come again, the last.
    unsettled: bool,
    trouble: Option<Trouble>,
}

struct UnderWay {
    /// What was waiting when the record was formed.
    messages: u64,
    expected_bytes: usize,
}

/// The last record was not stored, as far as we know.
struct Trouble {
    backoff: Backoff,
    wait_until: Instant,
    /// Set if the record may have been stored: the next one is to have the same messages, and so to be
    /// its copy.
    repeat: Option<u64>,
    /// Set if the whole call was refused: it is tried alone, so that one bad record spoils no others.
    alone: bool,
}

/// A lane whose record goes into the next call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Turn {
    pub lane: LaneId,
    /// The record takes no more messages than this. As many fit in, if it is put again.
    pub messages: u64,
}

/// What became of a lane's turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Stored {
        messages: u64,
        spooled_bytes: u64,
        /// Data and partition key.
        record_bytes: usize,
    },
    /// There was no room for it in the call.
    NotPut,
    /// No record was formed, or it is certain that it was not stored.
    NotStored,
    /// The same, because the shard has had too much.
    Throttled,
    /// It may have been stored.
    Unknown { messages: u64 },
    /// The whole call was refused, perhaps because of it.
    Refused,
}

impl Lanes {
    /// `seed` determines the waits.
    pub(super) fn new(limits: Limits, policy: BatchPolicy, rate: ShardRate, seed: u64) -> Self {
        Self {
            limits,
            policy,
            lanes: BTreeMap::new(),
            shards: Shards::new(rate),
            calls: 0,
            under_way_bytes: 0,
            expansion: 3.0,
            seed,
        }
    }

    /// A new lane. It waits for the rest of lanes that were closed before and have the same host, or the
    /// same key: so a peer that has connected again does not overtake itself, and what an earlier process
    /// left goes first.
    pub(super) fn open(&mut self, id: LaneId, hash_key: u128, host: &str) {
        let before = |lane: &Lane| lane.hash_key == hash_key || (lane.closed && lane.host == host);
        let after = self.lanes.iter().filter(|(_, lane)| before(lane)).map(|(id, _)| *id).collect();
        let lane = Lane {
            hash_key,
            host: host.to_owned(),
            closed: false,
            after,
            messages: 0,
            spooled_bytes: 0,
            due: None,
            under_way: None,
            unsettled: false,
            trouble: None,
        };
        self.lanes.insert(id, lane);
    }

    /// Messages are in the spool, and the first of them is due then.
    pub(super) fn arrived(
        &mut self,
        id: LaneId,
        messages: u64,
        spooled_bytes: u64,
        due: Instant,
        now: Instant,
    ) {
        let Some(lane) = self.lanes.get_mut(&id) else { return };
        lane.messages += messages;
        lane.spooled_bytes += spooled_bytes;
        lane.due = Some(lane.due.map_or(due, |earlier| earlier.min(due)));
        self.hurry(id, now);
    }

    /// No more messages will come. Tells whether none are left.
    pub(super) fn close(&mut self, id: LaneId, now: Instant) -> bool {
        if let Some(lane) = self.lanes.get_mut(&id) {
            lane.closed = true;
        }
        self.hurry(id, now);
        self.forget_if_finished(id)
    }

    /// Lets everything that waits go now.
    pub(super) fn hurry_all(&mut self, now: Instant) {
        for lane in self.lanes.values_mut().filter(|lane| lane.messages > 0) {
            lane.due = Some(lane.due.map_or(now, |due| due.min(now)));
        }
    }

    pub(super) fn set_shards(&mut self, shards: &[Shard], now: Instant) {
        self.shards.replace(shards, now);
    }

    /// The open shard of a hash key, as far as is known.
    pub(super) fn shard_of(&self, hash_key: u128) -> Option<&str> {
        self.shards.of(hash_key)
    }

    /// Messages that wait or are under way.
    pub(super) fn messages(&self) -> u64 {
        self.lanes.values().map(|lane| lane.messages).sum()
    }

    /// Whether any lane's last record was not stored.
    pub(super) fn in_trouble(&self) -> bool {
        self.lanes.values().any(|lane| lane.trouble.is_some())
    }

    /// Lanes that have messages.
    pub(super) fn waiting(&self) -> impl Iterator<Item = LaneId> {
        self.lanes.iter().filter(|(_, lane)| lane.messages > 0).map(|(id, _)| *id)
    }

    /// The next call: the lanes whose turn it is, those that wait longest first. They count as under way
    /// until [`returned`](Self::returned). Empty if there is nothing to put now.
    pub(super) fn next_call(&mut self, now: Instant) -> Vec<Turn> {
        let mut turns: Vec<Turn> = Vec::new();
        if self.calls >= self.limits.calls {
            return turns;
        }
        let mut ready: Vec<(Instant, LaneId)> = self
            .lanes
            .iter()
            .filter_map(|(id, lane)| Some((self.ready_at(lane)?, *id)))
            .filter(|(at, _)| *at <= now)
            .collect();
        ready.sort_unstable();
        let mut call_bytes = 0;
        // A lane that its shard has no room for is not overtaken by smaller ones.
        let mut held_back = HashSet::new();
        for (_, id) in ready {
            let lane = &self.lanes[&id];
            let bytes = self.expected_bytes(lane);
            let alone = lane.trouble.as_ref().is_some_and(|trouble| trouble.alone);
            let room = self.under_way_bytes + bytes <= self.limits.under_way_bytes
                || self.under_way_bytes == 0;
            if !room || turns.len() == self.limits.call_records {
                break;
            }
            if !turns.is_empty() && (alone || call_bytes + bytes > self.limits.call_bytes) {
                continue;
            }
            if let Some(shard) = self.shards.of(lane.hash_key) {
                let free = self.shards.free_at(lane.hash_key, bytes, now) <= now;
                if held_back.contains(shard) || !free {
                    held_back.insert(shard.to_owned());
                    continue;
                }
            }
            self.shards.take(lane.hash_key, bytes, now);
            call_bytes += bytes;
            self.under_way_bytes += bytes;
            turns.extend(self.lanes.get_mut(&id).map(|lane| lane.go(id, bytes)));
            if alone {
                break;
            }
        }
        self.calls += usize::from(!turns.is_empty());
        turns
    }

    /// When to ask for the next call again if nothing else happens.
    pub(super) fn wake_at(&self, now: Instant) -> Option<Instant> {
        if self.calls >= self.limits.calls {
            return None;
        }
        let at = self.lanes.values().filter_map(|lane| {
            let ready_at = self.ready_at(lane)?;
            let free_at = self.shards.free_at(lane.hash_key, self.expected_bytes(lane), now);
            Some(ready_at.max(free_at))
        });
        // What may go and did not waits for what is under way.
        at.filter(|at| *at > now).min()
    }

    /// A call has ended, so or so for each of its turns.
    pub(super) fn returned(
        &mut self,
        outcomes: impl IntoIterator<Item = (LaneId, Outcome)>,
        now: Instant,
    ) {
        self.calls -= 1;
        for (id, outcome) in outcomes {
            self.turn_returned(id, outcome, now);
        }
    }

    /// The spool knows what of a lane is in Kinesis. Tells whether the lane is finished.
    pub(super) fn settled(&mut self, id: LaneId) -> bool {
        if let Some(lane) = self.lanes.get_mut(&id) {
            lane.unsettled = false;
        }
        self.forget_if_finished(id)
    }

    fn turn_returned(&mut self, id: LaneId, outcome: Outcome, now: Instant) {
        let seed = self.seed.wrapping_add(id);
        let Some(lane) = self.lanes.get_mut(&id) else { return };
        let Some(under_way) = lane.under_way.take() else { return };
        let (key, expected) = (lane.hash_key, under_way.expected_bytes);
        self.under_way_bytes -= expected;
        let again = |lane: &mut Lane, repeat, alone, limit| {
            let trouble = lane.trouble.get_or_insert_with(|| Trouble {
                backoff: Backoff::seeded(Duration::from_millis(100), Duration::from_secs(10), seed),
                wait_until: now,
                repeat: None,
                alone: false,
            });
            trouble.wait_until = now + trouble.backoff.next_wait().min(limit);
            // Once it may have been stored, it may have been.
            trouble.repeat = trouble.repeat.or(repeat);
            trouble.alone |= alone;
            lane.due = Some(now);
        };
        match outcome {
            Outcome::Stored { messages, spooled_bytes, record_bytes } => {
                lane.messages = lane.messages.saturating_sub(messages);
                lane.spooled_bytes = lane.spooled_bytes.saturating_sub(spooled_bytes);
                lane.unsettled = true;
                lane.trouble = None;
                if messages < under_way.messages {
                    // The record was full.
                    lane.due = Some(now);
                }
                self.shards.correct(key, expected, record_bytes, now);
                if spooled_bytes > 0 {
                    let seen = record_bytes as f64 / spooled_bytes as f64;
                    self.expansion += (seen - self.expansion) / 8.0;
                }
                self.hurry(id, now);
            }
            Outcome::NotPut => {
                lane.due = Some(now);
                self.shards.correct(key, expected, 0, now);
            }
            Outcome::NotStored => {
                again(lane, None, false, Duration::MAX);
                self.shards.correct(key, expected, 0, now);
            }
            Outcome::Throttled => {
                again(lane, None, false, THROTTLED_WAIT_LIMIT);
                self.shards.exhausted(key, now);
            }
            Outcome::Unknown { messages } => again(lane, Some(messages), false, Duration::MAX),
            Outcome::Refused => {
                again(lane, None, true, Duration::MAX);
                self.shards.correct(key, expected, 0, now);
            }
        }
    }

    /// Whether the lane had its last message; then it is gone.
    fn forget_if_finished(&mut self, id: LaneId) -> bool {
        let finished = self.lanes.get(&id).is_some_and(|lane| {
            lane.closed && lane.messages == 0 && lane.under_way.is_none() && !lane.unsettled
        });
        if finished {
            self.lanes.remove(&id);
            for lane in self.lanes.values_mut() {
                lane.after.retain(|before| *before != id);
            }
        }
        finished
    }

    /// What is enough for a record does not wait for more.
    fn hurry(&mut self, id: LaneId, now: Instant) {
        let Some(lane) = self.lanes.get(&id) else { return };
        let bytes = lane.spooled_bytes as f64 * self.expansion;
        let enough = lane.closed
            || lane.messages >= self.policy.messages
            || bytes >= self.policy.bytes as f64;
        if let Some(lane) = self.lanes.get_mut(&id)
            && let Some(due) = &mut lane.due
            && enough
        {
            *due = now.min(*due);
        }
    }

    /// When a lane's next record may go; `None` if it has none, or must wait for others.
    fn ready_at(&self, lane: &Lane) -> Option<Instant> {
        let busy = lane.under_way.is_some() || lane.unsettled;
        if lane.messages == 0 || busy || !lane.after.is_empty() {
            return None;
        }
        let due = lane.due?;
        Some(lane.trouble.as_ref().map_or(due, |trouble| due.max(trouble.wait_until)))
    }

    fn expected_bytes(&self, lane: &Lane) -> usize {
        let bytes = (lane.spooled_bytes as f64 * self.expansion) as usize;
        bytes.min(self.limits.record_bytes)
    }
}

impl Lane {
    fn go(&mut self, id: LaneId, expected_bytes: usize) -> Turn {
        let repeat = self.trouble.as_ref().and_then(|trouble| trouble.repeat);
        self.under_way = Some(UnderWay { messages: self.messages, expected_bytes });
        // What arrives from now on is due when its policy says.
        self.due = None;
        Turn { lane: id, messages: repeat.unwrap_or(self.messages) }
    }
}
