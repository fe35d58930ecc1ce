//! The shards of an application for the status page, as the lease table tells them.

use std::sync::Arc;

use aws_config::SdkConfig;
use tokio::{
    sync::Mutex,
    time::{Duration, Instant},
};

use crate::{
    Retrieval,
    lease::{LeaseStore as _, dynamodb::LeaseTable, overview, plan::Observations},
    source::{Stream, Streams},
    telemetry::{Fleet, FleetShard, LookAtFleet},
};

/// Within what time a living owner renews its lease.
const RENEWED_WITHIN: Duration = Duration::from_secs(5);

struct Look {
    streams: Streams,
    table: LeaseTable,
    observed: Observations,
}

/// Looks at the lease table of those who read `streams`.
pub(super) fn looker(config: &SdkConfig, streams: &[String], table: &str) -> LookAtFleet {
    let streams = Streams::new(config, streams, Retrieval::Polling);
    let look =
        Look { table: LeaseTable::new(config, table), streams, observed: Observations::default() };
    let look = Arc::new(Mutex::new(look));
    Box::new(move || {
        let look = look.clone();
        Box::pin(async move { look.lock().await.once().await })
    })
}

impl Look {
    async fn once(&mut self) -> Fleet {
        let told = |error: &dyn std::error::Error| error.to_string();
        self.streams.identify().await.map_err(|error| told(&error))?;
        let listed = self.streams.shards().await.map_err(|error| told(&error))?;
        let table = self.table.clone().of_streams(self.streams.identifiers());
        let leases = table.scan().await.map_err(|error| told(&error))?;
        let now = Instant::now();
        self.observed.see(&leases, now);
        let shards = overview::shards(&listed, &leases, &self.observed, RENEWED_WITHIN, now);
        let with_stream = |shard: overview::ShardOverview| FleetShard {
            stream: self.streams.of(&shard.shard).map_or("", Stream::name).to_owned(),
            shard,
        };
        Ok(shards.into_iter().map(with_stream).collect())
    }
}
