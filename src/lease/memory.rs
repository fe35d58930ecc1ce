//! Leases in memory, for tests: the same conditions as DynamoDB's.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
};

use super::{Change, Lease, LeaseError, LeaseStore, Verdict, may_write, verdict};
use crate::shard::ShardId;

/// A lease table in this process. Clones are the same table.
#[derive(Debug, Clone, Default)]
pub struct MemoryTable(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    rows: BTreeMap<ShardId, Lease>,
    requests: Requests,
}

/// How often a table was asked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Requests {
    /// Rows read, by scans and single reads.
    pub rows_read: u64,
    /// Requests that read.
    pub reads: u64,
    /// Requests that wrote, refused ones included.
    pub writes: u64,
}

impl MemoryTable {
    /// The requests so far.
    pub fn requests(&self) -> Requests {
        self.state().requests
    }

    /// The rows as they are.
    pub fn rows(&self) -> Vec<Lease> {
        self.state().rows.values().cloned().collect()
    }

    /// Puts a row as an operator would, without a condition, or removes it.
    pub fn set(&self, shard: &ShardId, row: Option<Lease>) {
        match row {
            Some(row) => self.state().rows.insert(shard.clone(), row),
            None => self.state().rows.remove(shard),
        };
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

impl LeaseStore for MemoryTable {
    fn name(&self) -> &str {
        "in memory"
    }

    async fn scan(&self) -> Result<Vec<Lease>, LeaseError> {
        let mut state = self.state();
        state.requests.reads += 1;
        state.requests.rows_read += state.rows.len() as u64;
        Ok(state.rows.values().cloned().collect())
    }

    async fn get(&self, shard: &ShardId) -> Result<Option<Lease>, LeaseError> {
        let mut state = self.state();
        state.requests.reads += 1;
        state.requests.rows_read += 1;
        Ok(state.rows.get(shard).cloned())
    }

    async fn create(&self, lease: &Lease) -> Result<bool, LeaseError> {
        let mut state = self.state();
        state.requests.writes += 1;
        if state.rows.contains_key(&lease.shard) {
            return Ok(false);
        }
        state.rows.insert(lease.shard.clone(), lease.clone());
        Ok(true)
    }

    async fn update(&self, seen: &mut Lease, change: &Change) -> Result<Lease, LeaseError> {
        let mut state = self.state();
        loop {
            state.requests.writes += 1;
            let now = state.rows.get(&seen.shard).cloned();
            if let Some(row) = now.as_ref().filter(|row| may_write(seen, change, row)) {
                let written = row.after(change);
                state.rows.insert(seen.shard.clone(), written.clone());
                return Ok(written);
            }
            match verdict(seen, change, now) {
                Verdict::Landed(lease) => return Ok(lease),
                Verdict::WriteOver(lease) => *seen = lease,
                Verdict::Gone => return Err(LeaseError::Gone { shard: seen.shard.clone() }),
                Verdict::Lost { owner } => {
                    return Err(LeaseError::Lost { shard: seen.shard.clone(), owner });
                }
            }
        }
    }

    async fn delete(&self, seen: &Lease) -> Result<(), LeaseError> {
        let mut state = self.state();
        state.requests.writes += 1;
        if state.rows.get(&seen.shard).is_some_and(|row| row.counter == seen.counter) {
            state.rows.remove(&seen.shard);
        }
        Ok(())
    }

    async fn ring(&self, shard: &ShardId) -> Result<(), LeaseError> {
        let mut state = self.state();
        state.requests.writes += 1;
        if let Some(row) = state.rows.get_mut(shard) {
            row.bell += 1;
        }
        Ok(())
    }
}
