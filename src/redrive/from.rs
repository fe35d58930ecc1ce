//! Reading dead letters from where they were stored.

use std::{
    fs::File,
    io::{self, BufRead as _, BufReader, Read as _},
    path::Path,
    sync::Mutex,
};

use aws_types::SdkConfig;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use super::{
    Patience, RedriveError,
    bucket::{Bucket, OBJECT_LIMIT_BYTES},
    collect::Collector,
    journal,
};
use crate::{
    Retrieval,
    handler::{DeadLetters, Destination},
    shard::ShardId,
    source::{Place, Read, ShardReader, SourceError, Stream},
};

/// More than any line takes that is a letter.
const LINE_LIMIT_BYTES: u64 = 64 * 1024 * 1024;
/// How many shards are read at a time.
const AT_A_TIME: usize = 8;

/// Reads all letters of a destination into the collector.
pub(super) async fn read(
    config: &SdkConfig,
    from: &DeadLetters,
    collector: Collector,
) -> Result<Collector, RedriveError> {
    match &from.0 {
        Destination::File { path } => {
            let file = path.clone();
            let read = tokio::task::spawn_blocking(move || read_file(&file, collector));
            read.await.map_err(|error| failed(path, io::Error::other(error)))?
        }
        Destination::S3 { bucket, prefix } => {
            read_bucket(&Bucket::new(config, bucket), prefix, collector).await
        }
        Destination::Kinesis { stream } => {
            read_stream(&Stream::new(config, stream, Retrieval::Polling), collector).await
        }
        // What was written there is wherever stderr went.
        Destination::Stderr => Ok(collector),
    }
}

fn failed(path: &Path, source: io::Error) -> RedriveError {
    RedriveError::File { path: path.to_owned(), source }
}

fn read_file(path: &Path, mut collector: Collector) -> Result<Collector, RedriveError> {
    let mut file = BufReader::new(File::open(path).map_err(|error| failed(path, error))?);
    let mut line = Vec::new();
    for n in 1.. {
        line.clear();
        let read = file.by_ref().take(LINE_LIMIT_BYTES).read_until(b'\n', &mut line);
        if read.map_err(|error| failed(path, error))? == 0 {
            break;
        }
        collector.line(format_args!("line {n}"), &line)?;
    }
    Ok(collector)
}

async fn read_bucket(
    bucket: &Bucket,
    prefix: &str,
    mut collector: Collector,
) -> Result<Collector, RedriveError> {
    let mut keys = bucket.keys(prefix).await?;
    keys.retain(|key| is_below(prefix, key) && !journal::is_entry(key));
    if keys.is_empty() {
        tracing::warn!("there is no object in s3://{}/{prefix}", bucket.name());
    }
    let mut objects = std::pin::pin!(bucket.objects(&keys).zip(stream::iter(&keys)));
    while let Some((content, key)) = objects.next().await {
        match content? {
            Some(content) => {
                for (n, line) in (1..).zip(content.split(|byte| *byte == b'\n')) {
                    collector.line(format_args!("{key}, line {n}"), line)?;
                }
            }
            None => {
                let limit = OBJECT_LIMIT_BYTES / (1024 * 1024);
                collector.problem(key, format_args!("larger than {limit} MiB: not read"));
            }
        }
    }
    Ok(collector)
}

/// Whether a key is in the folder `prefix`, or is that itself.
pub(super) fn is_below(prefix: &str, key: &str) -> bool {
    match key.strip_prefix(prefix) {
        Some(rest) => prefix.is_empty() || rest.is_empty() || rest.starts_with('/'),
        None => false,
    }
}

async fn read_stream(stream: &Stream, collector: Collector) -> Result<Collector, RedriveError> {
    let collector = Mutex::new(collector);
    let shards = stream.shards().await?;
    let reads = shards.into_iter().map(|shard| read_shard(stream, shard.id, &collector));
    stream::iter(reads).buffer_unordered(AT_A_TIME).try_collect::<()>().await?;
    Ok(collector.into_inner().unwrap_or_else(|poison| poison.into_inner()))
}

/// Reads a shard to its end, or to its tip if it is open.
async fn read_shard(
    stream: &Stream,
    shard: ShardId,
    collector: &Mutex<Collector>,
) -> Result<(), RedriveError> {
    let mut reader = ShardReader::new(stream.clone(), shard.clone(), Place::TrimHorizon);
    loop {
        let read = read_surely(&mut reader).await?;
        let mut collector = collector.lock().unwrap_or_else(|poison| poison.into_inner());
        for record in &read.records {
            for (n, line) in (1..).zip(record.data.split(|byte| *byte == b'\n')) {
                let number = &record.sequence_number;
                let at = format_args!("{shard}, sequence number {number}, line {n}");
                collector.line(at, line)?;
            }
        }
        if read.reached_tip() || read.end.is_some() {
            return Ok(());
        }
    }
}

/// Reads with patience.
pub(super) async fn read_surely(reader: &mut ShardReader) -> Result<Read, SourceError> {
    let mut patience = Patience::new();
    loop {
        match reader.read().await {
            Ok(read) => return Ok(read),
            Err(error) if patience.wait(error.is_transient()).await => {}
            Err(error) => return Err(error),
        }
    }
}
