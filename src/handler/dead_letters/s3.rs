use std::collections::VecDeque;

use aws_sdk_s3::{Client, primitives::ByteStream};
use aws_types::SdkConfig;
use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use crate::{
    aws::{self, AwsError},
    handler::{DeadLetter, Place, dead_letter::hexadecimal},
};

/// How much goes into one object, unless a single letter is larger.
const OBJECT_BYTES: usize = 4 * 1024 * 1024;

/// A client with limits for objects.
pub(crate) fn client(config: &SdkConfig) -> Client {
    Client::from_conf(aws::s3_config(config).timeout_config(aws::call_timeouts()).build())
}

/// A bucket for dead letters.
pub(super) struct Objects {
    client: Client,
    bucket: String,
    prefix: String,
}

/// An object to be written.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Object {
    key: String,
    lines: Bytes,
}

impl Objects {
    pub(super) fn new(config: &SdkConfig, bucket: &str, prefix: &str) -> Self {
        Self { client: client(config), bucket: bucket.to_owned(), prefix: prefix.to_owned() }
    }

    pub(super) async fn check(&self) -> Result<(), AwsError> {
        let listed =
            self.client.list_objects_v2().bucket(&self.bucket).prefix(&self.prefix).max_keys(1);
        listed.send().await.map(drop).map_err(|error| aws::failure("s3:ListBucket", error))
    }

    /// The objects for letters, in order.
    pub(super) fn objects(&self, letters: &[DeadLetter]) -> VecDeque<Object> {
        let mut objects = VecDeque::new();
        let mut letters = letters.iter().peekable();
        while let Some(first) = letters.peek() {
            let beginning = beginning(&self.prefix, first);
            let mut ids = Sha256::new();
            let mut lines = Vec::new();
            while let Some(letter) = letters.peek() {
                let line = letter.line();
                if !lines.is_empty() && lines.len() + line.len() > OBJECT_BYTES {
                    break;
                }
                ids.update(letter.id());
                lines.extend_from_slice(&line);
                letters.next();
            }
            let digest = hexadecimal(&ids.finalize()[..8]);
            let key = format!("{beginning}-{digest}.jsonl");
            objects.push_back(Object { key, lines: lines.into() });
        }
        objects
    }

    pub(super) async fn put(&self, object: &Object) -> Result<(), AwsError> {
        let put = self
            .client
            .put_object()
            .bucket(&self.bucket)
            .key(&object.key)
            .content_type("application/jsonl")
            .body(ByteStream::from(object.lines.clone()));
        put.send().await.map(drop).map_err(|error| aws::failure("s3:PutObject", error))
    }
}

/// The key of the object that begins with this letter, up to the digest.
fn beginning(prefix: &str, first: &DeadLetter) -> String {
    let mut parts: Vec<&str> = vec![prefix];
    parts.extend(first.application.as_deref());
    let name = match &first.place {
        Place::Record(place) => {
            parts.extend([place.stream.as_str(), place.shard.as_str()]);
            // As many digits as AWS writes, so that keys stand in the order of the shard.
            format!("{:0>56}", place.sequence_number.as_str())
        }
        Place::Connection { received_at, .. } => {
            parts.push("connections");
            received_at.clone()
        }
    };
    parts.push(&name);
    let parts: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handler::dead_letter::tests::letter;

    fn objects(letters: &[DeadLetter]) -> Vec<Object> {
        let config = SdkConfig::builder()
            .behavior_version(aws_sdk_s3::config::BehaviorVersion::latest())
            .build();
        Objects::new(&config, "bucket", "a/b").objects(letters).into()
    }

    #[test]
    fn the_same_letters_write_the_same_object_and_others_never_write_over_it() {
        let [a, b] = [letter(17, "k", "x"), letter(18, "k", "y")];
        let both = objects(&[a.clone(), b.clone()]);
        assert_eq!(both.len(), 1);
        let start = format!("a/b/rtr/s/shardId-0/{}17-", "0".repeat(54));
        assert!(both[0].key.starts_with(&start), "{}", both[0].key);
        assert!(both[0].key.ends_with(".jsonl"));
        assert_eq!(both[0].lines, [a.line(), b.line()].concat());
        // Another worker gave up the same letters later.
        let later = |letter: &DeadLetter| DeadLetter {
            worker: Some("w2".into()),
            attempts: 9,
            given_up_at: "2026-01-01T00:00:00Z".parse().expect("a time"),
            ..letter.clone()
        };
        assert_eq!(objects(&[later(&a), later(&b)])[0].key, both[0].key);
        // One that knows of fewer letters must not take the place of one that knows of more.
        assert_ne!(objects(std::slice::from_ref(&a))[0].key, both[0].key);
        let other = DeadLetter { application: Some("ctd".into()), ..a.clone() };
        assert_ne!(objects(&[other, b])[0].key, both[0].key);
    }

    #[test]
    fn objects_are_bounded_and_every_letter_is_in_one_in_order() {
        let letters: Vec<DeadLetter> =
            (0..20).map(|n| letter(n, "k", vec![b'x'; 500_000])).collect();
        let objects = objects(&letters);
        assert!(objects.iter().all(|object| object.lines.len() <= OBJECT_BYTES));
        let lines: Vec<u8> = objects.iter().flat_map(|object| object.lines.to_vec()).collect();
        assert_eq!(lines, letters.iter().flat_map(DeadLetter::line).collect::<Vec<u8>>());
        assert!(objects.is_sorted_by(|a, b| a.key < b.key));
    }
}

#[cfg(all(test, feature = "local"))]
mod server_tests {
    use crate::{
        handler::{
            DeadLetter, DeadLetters, dead_letter::tests::letter, dead_letter_line::ReadLine,
        },
        local::{Local, LocalSettings},
    };

    #[tokio::test]
    async fn p9_letters_are_in_the_bucket_when_store_returns_and_again_is_harmless() {
        let local = Local::start(LocalSettings::default()).await.expect("servers");
        let client = super::client(&local.sdk_config());
        let to = DeadLetters::s3("letters", "green/");
        let error = to.open(&local.sdk_config()).await.err().expect("no bucket").to_string();
        assert!(error.contains("s3://letters/green") && error.contains("create it"), "{error}");

        client.create_bucket().bucket("letters").send().await.expect("a bucket");
        let store = to.open(&local.sdk_config()).await.expect("a bucket");
        let letters: Vec<DeadLetter> = (1..4).map(|n| letter(n, "k", vec![n as u8])).collect();
        for _ in 0..2 {
            store.store(&letters).await.expect("stored");
        }
        let listed = client.list_objects_v2().bucket("letters").send().await.expect("a list");
        let keys: Vec<&str> = listed.contents().iter().filter_map(|object| object.key()).collect();
        assert_eq!(keys.len(), 1, "{keys:?}");
        let object = client.get_object().bucket("letters").key(keys[0]).send().await;
        let lines = object.expect("an object").body.collect().await.expect("bytes").into_bytes();
        let read: Vec<DeadLetter> = lines
            .strip_suffix(b"\n")
            .expect("whole lines")
            .split(|byte| *byte == b'\n')
            .map(|line| ReadLine::parse(line).expect("a letter").letter)
            .collect();
        assert_eq!(read, letters);
    }
}
