//! An application seen from outside: its stream and its lease table.

use std::{collections::BTreeSet, error::Error, time::Duration};

use aws_config::SdkConfig;
use clap::Args;
use tokio::time::Instant;

use super::values;
use crate::{
    Retrieval, SourceError,
    lease::{Lease, LeaseError, LeaseStore as _, dynamodb::LeaseTable, plan::Observations},
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

    pub(super) fn look(&self, config: &SdkConfig, streams: &Streams) -> Look {
        Look {
            table: LeaseTable::new(config, self.table_name()).of_streams(streams.identifiers()),
            leases: Vec::new(),
            observed: Observations::default(),
        }
    }
}

/// The lease table, and what was observed in it.
pub(super) struct Look {
    pub(super) table: LeaseTable,
    /// As they were at the last look.
    pub(super) leases: Vec<Lease>,
    pub(super) observed: Observations,
}

impl Look {
    /// Looks once.
    pub(super) async fn once(&mut self) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.leases = match self.table.scan().await {
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

    /// Looks until every owner was seen to renew, or for `limit`.
    pub(super) async fn watch(
        &mut self,
        limit: Duration,
    ) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.once().await?;
        let until = Instant::now() + limit;
        while Instant::now() < until && !self.all_renewed(limit) {
            let next = Instant::now() + LOOK_INTERVAL;
            tokio::time::sleep_until(next.min(until)).await;
            self.once().await?;
        }
        Ok(())
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
pub(super) fn refusal(live: &[&Lease], doing: &str) -> String {
    let workers: BTreeSet<&str> = live.iter().filter_map(|lease| lease.reader()).collect();
    let workers: Vec<&str> = workers.into_iter().collect();
    let (first, more) = match live {
        [] => return String::new(),
        [one] => (one, String::new()),
        [one, rest @ ..] => (one, format!(", and {} more of the shards are read too", rest.len())),
    };
    format!(
        "shard {} is read by {}, which renews its lease{more}; stop {} first, which frees the leases, \
         or {doing} under running workers with --force",
        first.shard,
        first.reader().unwrap_or_default(),
        workers.join(", ")
    )
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
            refusal(&[&a, &b], "reset"),
            "shard shard-a is read by w2, which renews its lease, and 1 more of the shards are read \
             too; stop w1, w2 first, which frees the leases, or reset under running workers with \
             --force"
        );
    }
}
