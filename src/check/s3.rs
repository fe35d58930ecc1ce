//! Buckets, looked at and not touched.

use aws_sdk_s3::Client;
use aws_types::SdkConfig;

use super::{Found, Report, Trouble, clock::Clock};
use crate::{
    aws::{self, AwsError, AwsErrorKind},
    permissions::Resource,
};

/// The name of no object.
pub(super) const NOBODYS_KEY: &str = "tramline-check";
/// The ETag of no object: as long as one, and never the digest of what is there.
const NOBODYS_TAG: &str = "\"00000000000000000000000000000000\"";
/// The digest of other bytes than those that are sent, should a server not look at the tag.
const WRONG_DIGEST: &str = "AAAAAAAAAAAAAAAAAAAAAA==";

/// A key below a prefix.
pub(super) fn below(prefix: &str) -> String {
    match prefix.trim_matches('/') {
        "" => NOBODYS_KEY.to_owned(),
        prefix => format!("{prefix}/{NOBODYS_KEY}"),
    }
}

pub(super) struct Buckets {
    client: Client,
    region: String,
}

impl Buckets {
    pub(super) fn new(config: &SdkConfig, clock: &Clock, region: String) -> Self {
        let config = aws::s3_config(config)
            .timeout_config(aws::call_timeouts())
            .interceptor(clock.clone())
            .build();
        Self { client: Client::from_conf(config), region }
    }

    /// Checks a bucket and the access to an object in it.
    pub(super) async fn check(
        &self,
        report: &mut Report,
        (bucket_row, object_row): (Resource, Resource),
        bucket: &str,
        key: &str,
    ) {
        let mut gone = false;
        for row in report.rows(&[bucket_row, object_row]) {
            let check = match row.on == bucket_row {
                true => format!("bucket {bucket}"),
                false => format!("object s3://{bucket}/{key}"),
            };
            if gone {
                report.not_tried(row, &check, "there is no bucket");
                continue;
            }
            let call = async {
                let done = match row.action {
                    "s3:ListBucket" => self.list(bucket, key).await,
                    "s3:GetObject" => self.get(bucket, key).await,
                    "s3:PutObject" => self.put(bucket, key).await,
                    _ => return Err(Trouble::NotTried("there is no harmless call".to_owned())),
                };
                self.judge(bucket, done, &mut gone)
            };
            report.tried(row, &check, call).await;
        }
    }

    fn judge(&self, bucket: &str, done: Result<(), AwsError>, gone: &mut bool) -> Found {
        let error = match done {
            Ok(()) => return Ok("allowed".to_owned()),
            Err(error) => error,
        };
        let said = |code: &str| error.said().starts_with(code);
        if said("NoSuchBucket") {
            *gone = true;
            return Err(Trouble::Wrong {
                detail: "there is no such bucket".to_owned(),
                repair: format!(
                    "correct its name, or make it: aws s3 mb s3://{bucket} --region {}",
                    self.region
                ),
            });
        }
        if said("PermanentRedirect") || said("AuthorizationHeaderMalformed") {
            return Err(Trouble::Wrong {
                detail: format!("it is in another region than {}: {}", self.region, error.said()),
                repair: "use a bucket in the worker's region".to_owned(),
            });
        }
        Err(error.into())
    }

    async fn list(&self, bucket: &str, key: &str) -> Result<(), AwsError> {
        // As far as the last slash, as policies with conditions on the prefix have it.
        let prefix = key.rsplit_once('/').map_or("", |(folder, _)| folder);
        let list = self.client.list_objects_v2().bucket(bucket).prefix(prefix).max_keys(1);
        list.send().await.map(drop).map_err(|error| aws::failure("s3:ListBucket", error))
    }

    async fn get(&self, bucket: &str, key: &str) -> Result<(), AwsError> {
        // One byte: the object may be large.
        let get = self.client.get_object().bucket(bucket).key(key).range("bytes=0-0");
        let got = get.send().await.map(drop).map_err(|error| aws::failure("s3:GetObject", error));
        let is_empty = |error: &AwsError| error.said().starts_with("InvalidRange");
        match got {
            Err(error) if says_no_object(&error) || is_empty(&error) => Ok(()),
            got => got,
        }
    }

    /// Two things are wrong with it, so that no server takes it.
    async fn put(&self, bucket: &str, key: &str) -> Result<(), AwsError> {
        let put = self.client.put_object().bucket(bucket).key(key);
        let put = put.if_match(NOBODYS_TAG).content_md5(WRONG_DIGEST).body(b"x".to_vec().into());
        match put.send().await.map_err(|error| aws::failure("s3:PutObject", error)) {
            Ok(_) => Err(AwsError::new(
                "s3:PutObject",
                AwsErrorKind::Refused,
                "the server took an object that it had to refuse: it is not safe for checkpoints",
            )),
            Err(error)
                if error.kind() == AwsErrorKind::Condition
                    || error.said().starts_with("BadDigest")
                    || says_no_object(&error) =>
            {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

fn says_no_object(error: &AwsError) -> bool {
    error.kind() == AwsErrorKind::NotFound && error.said().starts_with("NoSuchKey")
}
