//! Moves the checkpoints of an application to the start position, before its first worker takes a lease.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use jiff::Timestamp;
use tokio::time::{Instant, sleep};

use super::WorkerError;
use crate::{
    checkpoint::{Saved, StateDocument, StateStore},
    lease::{
        InitialPosition, Lease, LeaseError, LeaseStore, MemoryTable,
        plan::Observations,
        reset::{ResetTo, Rewrite, moves, plan_reset, write_reset},
        stored,
    },
    shard::{Shard, ShardId},
    source::Place,
};

/// How often the table is looked at while it is found out whether a worker lives.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Resets every lease of a table, and the document that each shard may have of its own. Refused while a
/// worker renews one of the leases; a worker that died is waited for until its lease has run out.
pub(super) async fn reset_table<S: LeaseStore>(
    table: &S,
    state: Option<&StateStore>,
    listed: &[Shard],
    start: InitialPosition,
    lease_duration: Duration,
) -> Result<(), WorkerError> {
    let leases = without_readers(table, lease_duration).await?;
    let documents = match state {
        Some(state) => state.look(listed.iter().map(|shard| &shard.id)).await?,
        None => Vec::new(),
    };
    let saved = saved(&documents);
    let leases = stored::with_checkpoints(leases, &saved);
    let rewrites = planned(listed, &leases, &saved, start)?;
    // Before the leases: who opens a shard goes on where its document says.
    if let Some(state) = state {
        state.reset(&documents, &moves(&rewrites)).await?;
    }
    write_reset(table, &leases, &rewrites, false).await.map_err(|error| match error {
        LeaseError::Lost { shard, owner } => WorkerError::ResetRefused {
            shard,
            worker: owner.unwrap_or_else(|| "another worker".to_owned()),
        },
        error => error.into(),
    })?;
    tell(start, &rewrites);
    Ok(())
}

/// Resets every shard of a document that this worker has taken over, and the leases made by it.
pub(super) async fn reset_document(
    table: &MemoryTable,
    state: &StateStore,
    listed: &[Shard],
    start: InitialPosition,
) -> Result<(), WorkerError> {
    let rewrites = planned(listed, &table.rows(), &BTreeMap::new(), start)?;
    state.reset(&[], &moves(&rewrites)).await?;
    for Rewrite { wanted, .. } in &rewrites {
        table.set(&wanted.shard, Some(wanted.clone()));
    }
    tell(start, &rewrites);
    Ok(())
}

fn planned(
    listed: &[Shard],
    leases: &[Lease],
    saved: &BTreeMap<ShardId, Saved>,
    start: InitialPosition,
) -> Result<Vec<Rewrite>, WorkerError> {
    let now = Timestamp::now();
    let to = match start {
        InitialPosition::Latest => ResetTo::Latest { from: Place::pin_time(now) },
        InitialPosition::TrimHorizon => ResetTo::TrimHorizon,
        InitialPosition::At(at) => ResetTo::Time(at),
    };
    Ok(plan_reset(listed, leases, saved, &BTreeSet::new(), &to, now)?)
}

fn saved(documents: &[StateDocument]) -> BTreeMap<ShardId, Saved> {
    documents.iter().flat_map(|document| document.shards.clone()).collect()
}

fn tell(start: InitialPosition, rewrites: &[Rewrite]) {
    tracing::warn!(
        shards = rewrites.len(),
        "reset: every shard is read from {start}, whatever was finished before"
    );
}

/// The leases, when no worker renews any of them.
async fn without_readers<S: LeaseStore>(
    table: &S,
    lease_duration: Duration,
) -> Result<Vec<Lease>, WorkerError> {
    let mut observed = Observations::default();
    let mut told = false;
    loop {
        let leases = table.scan().await?;
        let now = Instant::now();
        observed.see(&leases, now);
        let mut unsettled = None;
        for lease in &leases {
            let Some(reader) = lease.reader() else { continue };
            match observed.is_renewed(&lease.shard, lease_duration, now) {
                Some(true) => {
                    let (shard, worker) = (lease.shard.clone(), reader.to_owned());
                    return Err(WorkerError::ResetRefused { shard, worker });
                }
                Some(false) => {}
                None => unsettled = Some(reader),
            }
        }
        let Some(worker) = unsettled else { return Ok(leases) };
        if !std::mem::replace(&mut told, true) {
            tracing::info!(
                worker,
                "reset: waiting for up to {lease_duration:?} to see whether the worker that has leases lives"
            );
        }
        sleep(LOOK_INTERVAL.min(lease_duration / 4)).await;
    }
}
