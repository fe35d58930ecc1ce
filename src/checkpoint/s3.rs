//! A state document as an object of S3.
//!
//! S3 writes an object only if it is still the one that was read (`If-Match` with its ETag), or if there
//! is none yet (`If-None-Match: *`), and reads what was last written. Needs `s3:GetObject` and
//! `s3:PutObject` on the object, and `s3:ListBucket` on the bucket to be told that there is none yet.

use aws_sdk_s3::{
    Client,
    error::{ProvideErrorMetadata, SdkError},
};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_types::SdkConfig;
use bytes::{Bytes, BytesMut};

use super::{
    StateError,
    document::LIMIT_BYTES,
    held::{Found, Tag},
};
use crate::aws::{self, AwsError, AwsErrorKind};

const GET: &str = "s3:GetObject";
const PUT: &str = "s3:PutObject";

#[derive(Debug)]
pub(super) struct S3Object {
    client: Client,
    bucket: String,
    key: String,
    name: String,
}

/// A client with limits for documents.
pub(super) fn client(config: &SdkConfig) -> Client {
    let config = aws::s3_config(config).timeout_config(aws::state_timeouts()).build();
    Client::from_conf(config)
}

impl S3Object {
    pub fn new(client: Client, bucket: String, key: String) -> Self {
        let name = format!("s3://{bucket}/{key}");
        Self { client, bucket, key, name }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub async fn read(&self) -> Result<Option<Found>, StateError> {
        let got = self.client.get_object().bucket(&self.bucket).key(&self.key).send().await;
        let mut object = match got {
            Ok(object) => object,
            Err(error) if code(&error) == Some("NoSuchKey") => return Ok(None),
            Err(error) => return Err(self.failed(GET, error)),
        };
        let length = object.content_length().and_then(|length| usize::try_from(length).ok());
        if length.is_some_and(|length| length > LIMIT_BYTES) {
            return Err(self.too_large(length.unwrap_or_default()));
        }
        let mut bytes = BytesMut::with_capacity(length.unwrap_or_default());
        loop {
            match tokio::time::timeout(aws::STATE_LIMIT, object.body.next()).await {
                Ok(Some(Ok(chunk))) => bytes.extend_from_slice(&chunk),
                Ok(Some(Err(error))) => return Err(self.cut_off(error.to_string())),
                Ok(None) => break,
                Err(_) => return Err(self.cut_off("no more bytes in time".to_owned())),
            }
            if bytes.len() > LIMIT_BYTES {
                return Err(self.too_large(bytes.len()));
            }
        }
        let tag = self.tag(GET, object.e_tag)?;
        Ok(Some(Found { bytes: bytes.freeze(), tag }))
    }

    /// Writes if the object is still `seen`. `None` if it is not, and nothing was written.
    pub async fn write(&self, bytes: Bytes, seen: Option<&Tag>) -> Result<Option<Tag>, StateError> {
        let put = self.client.put_object().bucket(&self.bucket).key(&self.key).body(bytes.into());
        let put = match seen {
            Some(tag) => put.if_match(&tag.0),
            None => put.if_none_match("*"),
        };
        match put.send().await {
            Ok(answer) => self.tag(PUT, answer.e_tag).map(Some),
            // It changed; another write is on its way; it was deleted.
            Err(error) => match code(&error) {
                Some("PreconditionFailed" | "ConditionalRequestConflict" | "NoSuchKey") => Ok(None),
                _ => Err(self.failed(PUT, error)),
            },
        }
    }

    fn tag(&self, operation: &'static str, e_tag: Option<String>) -> Result<Tag, StateError> {
        e_tag.map(Tag).ok_or_else(|| StateError::S3 {
            place: self.name.clone(),
            source: AwsError::new(operation, AwsErrorKind::Refused, "the answer has no ETag"),
        })
    }

    fn failed<E>(&self, operation: &'static str, error: SdkError<E, HttpResponse>) -> StateError
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        let problem = match code(&error) {
            Some("NoSuchBucket") => "does not exist; create it, or correct its name",
            Some("PermanentRedirect" | "AuthorizationHeaderMalformed") => {
                "is in another region than this worker; use a bucket in the worker's region"
            }
            _ => {
                let source = aws::failure(operation, error);
                return StateError::S3 { place: self.name.clone(), source };
            }
        };
        StateError::Bucket { place: self.name.clone(), bucket: self.bucket.clone(), problem }
    }

    fn cut_off(&self, said: String) -> StateError {
        let source = AwsError::new(GET, AwsErrorKind::Unreachable, said);
        StateError::S3 { place: self.name.clone(), source }
    }

    fn too_large(&self, bytes: usize) -> StateError {
        StateError::TooLarge { place: self.name.clone(), bytes }
    }
}

fn code<E: ProvideErrorMetadata>(error: &SdkError<E, HttpResponse>) -> Option<&str> {
    error.as_service_error().and_then(ProvideErrorMetadata::code)
}
