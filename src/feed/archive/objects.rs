//! The objects of an archive, in S3.

use aws_sdk_s3::{
    Client,
    error::{ProvideErrorMetadata as _, SdkError},
    primitives::ByteStream,
};
use aws_types::SdkConfig;
use jiff::civil::Date;

use super::{
    ArchiveError,
    day::{Object, Place},
};
use crate::{
    aws::{self, AwsError},
    handler::s3_client,
};

const LIST: &str = "s3:ListBucket";
const GET: &str = "s3:GetObject";
const PUT: &str = "s3:PutObject";
/// Where an object says which message its last one is.
const LAST: &str = "tramline-last";
const ENDING: &str = ".txt";

/// A bucket and a prefix.
#[derive(Debug)]
pub(super) struct Objects {
    client: Client,
    bucket: String,
    /// With a slash at its end, or empty.
    prefix: String,
}

/// A day of a shard.
#[derive(Debug, Clone, Copy)]
pub(super) struct Folder<'a> {
    pub date: Date,
    pub stream: &'a str,
    pub shard: &'a str,
}

impl Objects {
    pub(super) fn new(config: &SdkConfig, bucket: &str, prefix: &str) -> Self {
        let prefix = match prefix.trim_matches('/') {
            "" => String::new(),
            prefix => format!("{prefix}/"),
        };
        Self { client: s3_client(config), bucket: bucket.to_owned(), prefix }
    }

    /// Whether the bucket is there.
    pub(super) async fn check(&self) -> Result<(), ArchiveError> {
        let listed =
            self.client.list_objects_v2().bucket(&self.bucket).prefix(&self.prefix).max_keys(1);
        let listed = listed.send().await;
        listed.map(drop).map_err(|error| self.failed(&self.prefix, aws::failure(LIST, error)))
    }

    /// The first places of the day's objects.
    pub(super) async fn starts(&self, folder: Folder<'_>) -> Result<Vec<Place>, ArchiveError> {
        let folder = self.folder(folder);
        let list = self.client.list_objects_v2().bucket(&self.bucket).prefix(&folder);
        let mut pages = list.into_paginator().send();
        let mut starts = Vec::new();
        while let Some(page) = pages.next().await {
            let page = page.map_err(|error| self.failed(&folder, aws::failure(LIST, error)))?;
            starts.extend(page.contents().iter().filter_map(|object| {
                let name = object.key()?.strip_prefix(&folder)?.strip_suffix(ENDING)?;
                Place::parse(name)
            }));
        }
        Ok(starts)
    }

    /// Writes an object, unless there is one of its name: then `false`.
    pub(super) async fn write(
        &self,
        folder: Folder<'_>,
        object: Object<'_>,
    ) -> Result<bool, ArchiveError> {
        let key = self.key(folder, object.first);
        let put = self
            .client
            .put_object()
            .bucket(&self.bucket)
            .key(&key)
            .if_none_match("*")
            .content_type("text/plain; charset=utf-8")
            .metadata(LAST, object.last.to_string())
            .body(ByteStream::from(object.lines.to_vec()));
        match put.send().await {
            Ok(_) => Ok(true),
            Err(SdkError::ServiceError(error))
                if error.err().code() == Some("PreconditionFailed") =>
            {
                Ok(false)
            }
            Err(error) => Err(self.failed(&key, aws::failure(PUT, error))),
        }
    }

    /// The place of an object's last message; `None` if it is gone.
    pub(super) async fn end(
        &self,
        folder: Folder<'_>,
        first: &Place,
    ) -> Result<Option<Place>, ArchiveError> {
        let key = self.key(folder, first);
        let head = self.client.head_object().bucket(&self.bucket).key(&key).send().await;
        let head = match head {
            Ok(head) => head,
            Err(error) if error.as_service_error().is_some_and(|error| error.is_not_found()) => {
                return Ok(None);
            }
            Err(error) => return Err(self.failed(&key, aws::failure(GET, error))),
        };
        let last = head.metadata().and_then(|metadata| Place::parse(metadata.get(LAST)?));
        // It has its first message at least.
        last.map(|last| Some(last.max(first.clone())))
            .ok_or_else(|| ArchiveError::Foreign { object: self.name(&key) })
    }

    fn folder(&self, Folder { date, stream, shard }: Folder<'_>) -> String {
        format!("{}{date}/{stream}/{shard}/", self.prefix)
    }

    fn key(&self, folder: Folder<'_>, first: &Place) -> String {
        format!("{}{first}{ENDING}", self.folder(folder))
    }

    fn name(&self, key: &str) -> String {
        format!("s3://{}/{key}", self.bucket)
    }

    fn failed(&self, key: &str, source: AwsError) -> ArchiveError {
        ArchiveError::S3 { object: self.name(key), source }
    }
}
