//! An application seen from outside: its stream and its lease table.

use std::{
    collections::{BTreeMap, BTreeSet},
    error::Error,
    time::Duration,
};

use aws_config::SdkConfig;
use clap::Args;
use tokio::time::Instant;

use super::values;
use crate::{
    Checkpoints, Retrieval, ShardId, SourceError,
    checkpoint::{Saved, StateDocument, StateError, StateStore, Writer},
    lease::{Lease, LeaseError, LeaseStore as _, dynamodb::LeaseTable, plan::Observations, stored},
    shard::Shard,
    source::Streams,
};

/// How often the table is looked at while owners are watched.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Which application.
#[derive(Debug, Args)]
pub(super) struct Application {
    /// The stream that it reads; may be repeated, for an application that reads several
    #[arg(long, value_name = "NAME", required = true, value_delimiter = ',')]
    pub(super) stream: Vec<String>,

    /// The application
    #[arg(long, value_name = "NAME")]
    pub(super) app: String,

    /// The DynamoDB table of the leases [default: the application's name]
    #[arg(long, value_name = "NAME")]
    lease_table: Option<String>,

    /// How long to watch owners for a renewal; Tramline renews every 4 s, the KCL every third of its
    /// failover time
    #[arg(long, value_name = "DURATION", value_parser = values::duration, default_value = "5s")]
    pub(super) observe: Duration,
}

impl Application {
    pub(super) fn table_name(&self) -> &str {
        self.lease_table.as_deref().unwrap_or(&self.app)
    }

    pub(super) async fn streams(&self, config: &SdkConfig) -> Result<Streams, SourceError> {
        let streams = Streams::new(config, &self.stream, Retrieval::Polling);
        streams.identify().await?;
        Ok(streams)
    }

    pub(super) fn look(
        &self,
        config: &SdkConfig,
        streams: &Streams,
        checkpoints: &Checkpoints,
    ) -> Result<Look, StateError> {
        let writer = Writer {
            application: self.app.clone(),
            stream: streams.names(),
            worker: format!("tramline on {}", crate::host::name()),
        };
        let state = StateStore::new(config, checkpoints, writer)?;
        // The only worker of a document that holds every shard has no lease table.
        let has_table = state.is_none() || checkpoints.is_per_shard();
        let table = LeaseTable::new(config, self.table_name()).of_streams(streams.identifiers());
        Ok(Look {
            table: has_table.then_some(table),
            state: state.map(|state| (checkpoints.to_string(), state)),
            documents: Vec::new(),
            writes: 0,
            leases: Vec::new(),
            observed: Observations::default(),
        })
    }
}

/// The lease table and the documents with the checkpoints, and what was observed in them.
pub(super) struct Look {
    /// `None` where one document holds every shard.
    pub(super) table: Option<LeaseTable>,
    /// Where documents are kept, and its name.
    pub(super) state: Option<(String, StateStore)>,
    /// As they were at the last look.
    pub(super) documents: Vec<StateDocument>,
    /// How often the one document was seen to change.
    writes: u64,
    /// As they were at the last look, with the checkpoints of the documents.
    pub(super) leases: Vec<Lease>,
    pub(super) observed: Observations,
}

impl Look {
    /// Looks once. `limit` is within what time a living owner renews its lease.
    pub(super) async fn once(
        &mut self,
        listed: &[Shard],
        limit: Duration,
    ) -> Result<(), Box<dyn Error + Send + Sync>> {
        match self.table.is_some() {
            true => {
                self.scan().await?;
                self.look_at_documents(listed).await?;
                let leases = std::mem::take(&mut self.leases);
                self.leases = stored::with_checkpoints(leases, &self.saved());
            }
            false => self.look_at_one_document(listed, limit).await?,
        }
        Ok(())
    }

    async fn scan(&mut self) -> Result<(), Box<dyn Error + Send + Sync>> {
        let Some(table) = &self.table else { return Ok(()) };
        self.leases = match table.scan().await {
            Ok(leases) => leases,
            Err(LeaseError::NoTable { table }) => {
                return Err(format!(
                    "lease table {table} does not exist; check --app, --lease-table and the region, \
                     or start a worker, which creates it"
                )
                .into());
            }
            Err(error) => return Err(error.into()),
        };
        self.leases.sort_by(|a, b| a.shard.cmp(&b.shard));
        self.observed.see(&self.leases, Instant::now());
        Ok(())
    }

    async fn look_at_documents(&mut self, listed: &[Shard]) -> Result<(), StateError> {
        if let Some((_, state)) = &self.state {
            let leased = self.leases.iter().map(|lease| &lease.shard);
            let shards: BTreeSet<&ShardId> =
                listed.iter().map(|shard| &shard.id).chain(leased).collect();
            self.documents = state.look(shards).await?;
        }
        Ok(())
    }

    /// Makes leases of what one document has. Who reads is not in it; only that somebody writes can be
    /// seen.
    async fn look_at_one_document(
        &mut self,
        listed: &[Shard],
        limit: Duration,
    ) -> Result<(), Box<dyn Error + Send + Sync>> {
        let before = self.documents.pop();
        self.look_at_documents(listed).await?;
        let Some(document) = self.documents.first() else {
            let (place, _) = self.state.as_ref().ok_or("no place for checkpoints")?;
            return Err(format!(
                "state {place} does not exist; check --checkpoint, --app and the region, or start a \
                 worker, which creates it"
            )
            .into());
        };
        self.writes += u64::from(before.is_some_and(|before| before != *document));
        let writer = document.writer();
        let now = Instant::now();
        let leases = stored::of_document(listed, &document.shards);
        let written = leases.iter().map(|lease| Lease {
            counter: self.writes,
            owner: Some(writer.to_owned()),
            ..lease.clone()
        });
        self.observed.see(&written.collect::<Vec<_>>(), now);
        let is_written = |lease: &Lease| {
            !lease.is_finished() && self.observed.is_renewed(&lease.shard, limit, now) == Some(true)
        };
        let owned = leases
            .into_iter()
            .map(|lease| Lease { owner: is_written(&lease).then(|| writer.to_owned()), ..lease });
        self.leases = owned.collect();
        Ok(())
    }

    pub(super) fn keeps(&self) -> Keeps {
        match (&self.table, &self.state) {
            (Some(_), None) => Keeps::Table,
            (Some(_), Some(_)) => Keeps::TableAndState,
            (None, _) => Keeps::State,
        }
    }

    /// What the documents have of each shard.
    pub(super) fn saved(&self) -> BTreeMap<ShardId, Saved> {
        self.documents.iter().flat_map(|document| document.shards.clone()).collect()
    }

    /// Looks until every owner was seen to renew, or for `limit`.
    pub(super) async fn watch(
        &mut self,
        listed: &[Shard],
        limit: Duration,
    ) -> Result<(), Box<dyn Error + Send + Sync>> {
        let until = Instant::now() + limit;
        if self.table.is_none() {
            // It may be large: it is read twice, and not each second.
            self.once(listed, limit).await?;
            tokio::time::sleep_until(until).await;
            return self.once(listed, limit).await;
        }
        self.scan().await?;
        while Instant::now() < until && !self.all_renewed(limit) {
            let next = Instant::now() + LOOK_INTERVAL;
            tokio::time::sleep_until(next.min(until)).await;
            self.scan().await?;
        }
        self.once(listed, limit).await
    }

    /// Of `leases`, those whose owner was seen to renew.
    pub(super) fn live<'a>(
        &self,
        leases: impl IntoIterator<Item = &'a Lease>,
        limit: Duration,
    ) -> Vec<&'a Lease> {
        let now = Instant::now();
        leases
            .into_iter()
            .filter(|lease| lease.reader().is_some())
            .filter(|lease| self.observed.is_renewed(&lease.shard, limit, now) == Some(true))
            .collect()
    }

    fn all_renewed(&self, limit: Duration) -> bool {
        let held = self.leases.iter().filter(|lease| lease.reader().is_some()).count();
        self.live(&self.leases, limit).len() == held
    }
}

/// Who holds leases that are not to be touched, as one line that says what to do.
pub(super) fn refusal(live: &[&Lease], doing: &str, keeps: Keeps) -> String {
    let workers: BTreeSet<&str> = live.iter().filter_map(|lease| lease.reader()).collect();
    let workers: Vec<&str> = workers.into_iter().collect();
    let (first, more) = match live {
        [] => return String::new(),
        [one] => (one, String::new()),
        [one, rest @ ..] => (one, format!(", and {} more of the shards are read too", rest.len())),
    };
    let (sign, or) = match keeps {
        Keeps::Table => (
            "renews its lease",
            format!(", which frees the leases, or {doing} under running workers with --force"),
        ),
        Keeps::TableAndState => ("renews its lease", ", which frees the leases".to_owned()),
        Keeps::State => ("writes its state", String::new()),
    };
    format!(
        "shard {} is read by {}, which {sign}{more}; stop {} first{or}",
        first.shard,
        first.reader().unwrap_or_default(),
        workers.join(", ")
    )
}

/// What an application keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Keeps {
    /// Leases with checkpoints.
    Table,
    /// Leases, and a document for each shard.
    TableAndState,
    /// One document.
    State,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{checkpoint::Checkpoint, shard::Shard};

    #[test]
    fn a_refusal_names_shards_and_workers_and_says_what_to_do() {
        let lease = |id: &str, owner: &str| {
            let shard = Shard {
                id: id.into(),
                parents: vec![],
                hash_key_range: None,
                closed: false,
                begins: None,
            };
            let lease = Lease::new(&shard, Checkpoint::TrimHorizon, None);
            Lease { owner: Some(owner.to_owned()), ..lease }
        };
        let (a, b) = (lease("shard-a", "w2"), lease("shard-b", "w1"));
        assert_eq!(
            refusal(&[&a, &b], "reset", Keeps::Table),
            "shard shard-a is read by w2, which renews its lease, and 1 more of the shards are read \
             too; stop w1, w2 first, which frees the leases, or reset under running workers with \
             --force"
        );
        assert_eq!(
            refusal(&[&a], "reset", Keeps::State),
            "shard shard-a is read by w2, which writes its state; stop w2 first"
        );
    }
}
