//! What each shard may still take: 1 MiB and 1000 records a second.

use std::{collections::HashMap, time::Duration};

use md5::{Digest as _, Md5};
use tokio::time::Instant;

use crate::shard::{HashKeyRange, Shard};

/// What one shard takes a second. Default: 1 MiB and 1000 records (AWS: Kinesis Data Streams quotas).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ShardRate {
    /// Bytes of data and partition keys, a second.
    pub bytes: u32,
    /// Records a second.
    pub records: u32,
}

impl ShardRate {
    /// So many bytes a second, with 1000 records for each MiB.
    pub fn of_bytes(bytes: u32) -> Self {
        let records = u64::from(bytes) * 1000 / (1024 * 1024);
        Self { bytes: bytes.max(1), records: u32::try_from(records).unwrap_or(u32::MAX).max(1) }
    }
}

impl Default for ShardRate {
    fn default() -> Self {
        Self::of_bytes(1024 * 1024)
    }
}

/// The number that decides a record's shard.
pub(super) fn hash_key(partition_key: &str) -> u128 {
    u128::from_be_bytes(Md5::digest(partition_key).into())
}

/// The open shards and their budgets. Of what it does not know it takes all to be allowed: the stream's
/// answer counts.
#[derive(Debug)]
pub(super) struct Shards {
    rate: ShardRate,
    budgets: HashMap<String, Budget>,
    /// By the last hash key of each.
    open: Vec<(HashKeyRange, String)>,
}

/// What may be put now. Negative when a record was larger than expected.
#[derive(Debug, Clone, Copy)]
struct Budget {
    bytes: f64,
    records: f64,
    at: Instant,
}

impl Shards {
    pub(super) fn new(rate: ShardRate) -> Self {
        Self { rate, budgets: HashMap::new(), open: Vec::new() }
    }

    /// Takes what ListShards said. A shard that stays keeps its budget.
    pub(super) fn replace(&mut self, shards: &[Shard], now: Instant) {
        self.open = shards
            .iter()
            .filter(|shard| !shard.closed)
            .filter_map(|shard| Some((shard.hash_key_range?, shard.id.name().to_owned())))
            .collect();
        let full = Budget {
            bytes: f64::from(self.rate.bytes),
            records: f64::from(self.rate.records),
            at: now,
        };
        let before = std::mem::take(&mut self.budgets);
        for (_, shard) in &self.open {
            let budget = before.get(shard).copied().unwrap_or(full);
            self.budgets.insert(shard.clone(), budget);
        }
    }

    /// The open shard that takes a hash key.
    pub(super) fn of(&self, hash_key: u128) -> Option<&str> {
        let takes = |range: &HashKeyRange| (range.start..=range.end).contains(&hash_key);
        self.open.iter().find(|(range, _)| takes(range)).map(|(_, shard)| shard.as_str())
    }

    /// When a record of so many bytes may be put, if nothing else is.
    pub(super) fn free_at(&self, hash_key: u128, bytes: usize, now: Instant) -> Instant {
        let Some(budget) = self.of(hash_key).and_then(|shard| self.budgets.get(shard)) else {
            return now;
        };
        let budget = budget.later(self.rate, now);
        // A record of more than a second's worth goes when a whole second is free.
        let wanted = (bytes as f64).min(f64::from(self.rate.bytes));
        let short = (wanted - budget.bytes) / f64::from(self.rate.bytes);
        let short = short.max((1.0 - budget.records) / f64::from(self.rate.records));
        if short <= 0.0 {
            return now;
        }
        // Rounded up, so that it is free then.
        now + Duration::from_secs_f64(short) + Duration::from_millis(1)
    }

    /// Takes a record's bytes from its shard's budget.
    pub(super) fn take(&mut self, hash_key: u128, bytes: usize, now: Instant) {
        self.change(hash_key, now, |budget| {
            budget.bytes -= bytes as f64;
            budget.records -= 1.0;
        });
    }

    /// Gives back what a record did not need, or takes what it needed more.
    pub(super) fn correct(&mut self, hash_key: u128, taken: usize, needed: usize, now: Instant) {
        self.change(hash_key, now, |budget| budget.bytes += taken as f64 - needed as f64);
    }

    /// The stream says that the shard takes nothing now: others put to it as well.
    pub(super) fn exhausted(&mut self, hash_key: u128, now: Instant) {
        self.change(hash_key, now, |budget| budget.bytes = budget.bytes.min(0.0));
    }

    fn change(&mut self, hash_key: u128, now: Instant, change: impl FnOnce(&mut Budget)) {
        let takes = |range: &HashKeyRange| (range.start..=range.end).contains(&hash_key);
        let shard = self.open.iter().find(|(range, _)| takes(range)).map(|(_, shard)| shard);
        if let Some(budget) = shard.and_then(|shard| self.budgets.get_mut(shard)) {
            *budget = budget.later(self.rate, now);
            change(budget);
        }
    }
}

impl Budget {
    fn later(self, rate: ShardRate, now: Instant) -> Self {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        let grown = |left: f64, rate: u32| (left + passed * f64::from(rate)).min(f64::from(rate));
        Self {
            bytes: grown(self.bytes, rate.bytes),
            records: grown(self.records, rate.records),
            at: now.max(self.at),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// So many open shards with equal parts of the hash keys.
    pub(in crate::produce) fn shards(count: u128) -> Vec<Shard> {
        let part = u128::MAX / count;
        let end = |n| if n + 1 == count { u128::MAX } else { part * (n + 1) - 1 };
        (0..count)
            .map(|n| Shard {
                id: format!("shardId-{n:012}").into(),
                parents: Vec::new(),
                hash_key_range: Some(HashKeyRange { start: part * n, end: end(n) }),
                closed: false,
                begins: None,
            })
            .collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_shard_takes_a_second_of_its_rate_at_once_and_then_as_much_as_comes_back() {
        let start = Instant::now();
        let mut two = Shards::new(ShardRate { bytes: 1000, records: 10 });
        assert_eq!(two.free_at(0, 5000, start), start, "what is not known is not limited");
        two.replace(&shards(2), start);

        two.take(0, 600, start);
        assert_eq!(two.free_at(0, 400, start), start);
        let wait = |shards: &Shards, key, bytes| shards.free_at(key, bytes, start) - start;
        assert_eq!(wait(&two, 0, 900), Duration::from_millis(501));
        assert_eq!(wait(&two, 0, 5000), Duration::from_millis(601), "a whole second's worth");
        assert_eq!(wait(&two, u128::MAX, 1000), Duration::ZERO, "the other shard");
        two.correct(0, 600, 100, start);
        assert_eq!(wait(&two, 0, 900), Duration::ZERO);

        for _ in 0..9 {
            two.take(0, 1, start);
        }
        assert_eq!(wait(&two, 0, 1), Duration::from_millis(101), "records count, too");
        two.exhausted(u128::MAX, start);
        assert_eq!(wait(&two, u128::MAX, 100), Duration::from_millis(101));
        two.replace(&shards(2), start);
        assert_eq!(wait(&two, u128::MAX, 100), Duration::from_millis(101), "it is the same shard");
    }

    #[test]
    fn keys_go_where_kinesis_sends_them() {
        // MD5("a")
        assert_eq!(hash_key("a"), 0x0cc1_75b9_c0f1_b6a8_31c3_99e2_6977_2661);
    }
}
