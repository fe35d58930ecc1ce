use aws_sdk_s3::{Client, primitives::ByteStream};
use aws_types::SdkConfig;
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};

use super::{Patience, RedriveError};
use crate::{
    aws::{self, AwsError, AwsErrorKind},
    handler::s3_client,
};

/// The largest object that is read. Amazon Data Firehose writes up to 128 MiB.
pub(super) const OBJECT_LIMIT_BYTES: u64 = 256 * 1024 * 1024;
/// How many objects are read at a time.
const AT_A_TIME: usize = 4;

/// A bucket, read and written with patience.
pub(super) struct Bucket {
    client: Client,
    name: String,
}

impl Bucket {
    pub(super) fn new(config: &SdkConfig, name: &str) -> Self {
        Self { client: s3_client(config), name: name.to_owned() }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The keys that begin so, in their order.
    pub(super) async fn keys(&self, prefix: &str) -> Result<Vec<String>, RedriveError> {
        let mut pages =
            self.client.list_objects_v2().bucket(&self.name).prefix(prefix).into_paginator().send();
        let mut keys = Vec::new();
        while let Some(page) = pages.next().await {
            let page =
                page.map_err(|error| self.failed(prefix, aws::failure("s3:ListBucket", error)))?;
            keys.extend(page.contents.unwrap_or_default().into_iter().filter_map(|o| o.key));
        }
        keys.sort();
        Ok(keys)
    }

    /// What these objects hold, in order; `None` for one that is larger than [`OBJECT_LIMIT_BYTES`].
    pub(super) fn objects<'a>(
        &'a self,
        keys: &'a [String],
    ) -> impl Stream<Item = Result<Option<Bytes>, RedriveError>> + 'a {
        let read = move |key: &'a String| async move {
            let mut patience = Patience::new();
            loop {
                match self.object(key).await {
                    Ok(content) => return Ok(content),
                    Err(error) if patience.wait(error.is_transient()).await => {}
                    Err(error) => return Err(self.failed(key, error)),
                }
            }
        };
        stream::iter(keys).map(read).buffered(AT_A_TIME)
    }

    async fn object(&self, key: &str) -> Result<Option<Bytes>, AwsError> {
        const OPERATION: &str = "s3:GetObject";
        let got = self.client.get_object().bucket(&self.name).key(key).send().await;
        let object = got.map_err(|error| aws::failure(OPERATION, error))?;
        if object.content_length().is_none_or(|length| length as u64 > OBJECT_LIMIT_BYTES) {
            return Ok(None);
        }
        let content = object.body.collect().await.map_err(|error| {
            AwsError::new(OPERATION, AwsErrorKind::Unreachable, error.to_string())
        })?;
        Ok(Some(content.into_bytes()))
    }

    /// Makes an object, unless there is one with this key already: then it gives `false`.
    pub(super) async fn create(&self, key: &str, content: Bytes) -> Result<bool, AwsError> {
        let mut patience = Patience::new();
        loop {
            let put = self
                .client
                .put_object()
                .bucket(&self.name)
                .key(key)
                .if_none_match("*")
                .body(ByteStream::from(content.clone()));
            let error = match put.send().await {
                Ok(_) => return Ok(true),
                Err(error) => aws::failure("s3:PutObject", error),
            };
            let error = match error.kind() {
                // It may be ours, of an attempt whose answer was lost.
                AwsErrorKind::Condition => match self.object(key).await {
                    Ok(there) => return Ok(there.as_ref() == Some(&content)),
                    Err(error) => error,
                },
                _ => error,
            };
            if !patience.wait(error.is_transient()).await {
                return Err(error);
            }
        }
    }

    fn failed(&self, key: &str, source: AwsError) -> RedriveError {
        RedriveError::Object { bucket: self.name.clone(), key: key.to_owned(), source }
    }
}
