//! A lease table whose answers get lost, for tests.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use super::{Change, Lease, LeaseError, LeaseStore, MemoryTable};
use crate::{AwsError, AwsErrorKind, shard::ShardId};

/// A table whose next answer to an update can get lost after the write.
#[derive(Debug, Clone, Default)]
pub(super) struct Deaf {
    pub table: MemoryTable,
    loses: Arc<AtomicBool>,
}

impl Deaf {
    pub fn new(table: MemoryTable) -> Self {
        Self { table, loses: Arc::default() }
    }

    pub fn lose_next_answer(&self) {
        self.loses.store(true, Ordering::SeqCst);
    }
}

impl LeaseStore for Deaf {
    fn name(&self) -> &str {
        "deaf"
    }

    async fn scan(&self) -> Result<Vec<Lease>, LeaseError> {
        self.table.scan().await
    }

    async fn get(&self, shard: &ShardId) -> Result<Option<Lease>, LeaseError> {
        self.table.get(shard).await
    }

    async fn create(&self, lease: &Lease) -> Result<bool, LeaseError> {
        self.table.create(lease).await
    }

    async fn update(&self, seen: &mut Lease, change: &Change) -> Result<Lease, LeaseError> {
        let written = self.table.update(seen, change).await;
        if self.loses.swap(false, Ordering::SeqCst) {
            let source = AwsError::new("dynamodb:UpdateItem", AwsErrorKind::Unreachable, "");
            return Err(LeaseError::Table { table: "deaf".into(), source });
        }
        written
    }

    async fn delete(&self, seen: &Lease) -> Result<(), LeaseError> {
        self.table.delete(seen).await
    }

    async fn ring(&self, shard: &ShardId) -> Result<(), LeaseError> {
        self.table.ring(shard).await
    }
}
