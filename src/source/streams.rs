//! The streams that one application reads: one, or several with their leases in one table.

use aws_types::SdkConfig;
use futures_util::future::try_join_all;

use super::{Retrieval, SourceError, Stream};
use crate::shard::{Shard, ShardId, StreamIdentifier};

/// One stream, or several that are told apart by their identifiers.
#[derive(Debug, Clone)]
pub(crate) struct Streams(Vec<Stream>);

impl Streams {
    pub(crate) fn new(config: &SdkConfig, names: &[String], retrieval: Retrieval) -> Self {
        Self(names.iter().map(|name| Stream::new(config, name, retrieval)).collect())
    }

    /// Asks Kinesis for what tells several streams apart. To be done before anything else.
    pub(crate) async fn identify(&self) -> Result<(), SourceError> {
        if self.0.len() > 1 {
            try_join_all(self.0.iter().map(Stream::be_one_of_several)).await?;
        }
        Ok(())
    }

    /// Waits until each can be read, and registers the fan-out consumer where it is to be used.
    pub(crate) async fn open(&self, consumer_name: &str) -> Result<(), SourceError> {
        self.identify().await?;
        try_join_all(self.0.iter().map(|stream| stream.open(consumer_name))).await?;
        Ok(())
    }

    /// What stands in the keys of the leases; nothing if there is one stream.
    pub(crate) fn identifiers(&self) -> impl Iterator<Item = StreamIdentifier> {
        self.0.iter().filter_map(|stream| stream.identifier().cloned())
    }

    /// Their names, for the log.
    pub(crate) fn names(&self) -> String {
        let names: Vec<&str> = self.0.iter().map(Stream::name).collect();
        names.join(", ")
    }

    /// The stream that a shard is of.
    pub(crate) fn of(&self, shard: &ShardId) -> Option<&Stream> {
        let identifier = shard.stream();
        self.0.iter().find(|stream| stream.identifier() == identifier.as_ref())
    }

    /// Every shard that they still list, closed ones included.
    pub(crate) async fn shards(&self) -> Result<Vec<Shard>, SourceError> {
        let listed = try_join_all(self.0.iter().map(Stream::shards)).await?;
        Ok(listed.into_iter().flatten().collect())
    }
}
