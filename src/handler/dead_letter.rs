use std::io::{self, Write as _};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde::Serialize;

/// Something that could not be delivered, with all that is needed to look into it or to put it back
/// (P9).
#[derive(Debug, Serialize)]
pub(crate) struct DeadLetter<'a> {
    pub reason: &'a str,
    #[serde(flatten)]
    pub place: Place<'a>,
    /// Its bytes as they came, in Base64.
    pub data_base64: String,
}

/// Where it was found.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Place<'a> {
    /// In a record of a stream, by the worker.
    Record {
        stream: &'a str,
        shard: &'a str,
        sequence_number: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        sub_sequence_number: Option<u64>,
        partition_key: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        arrived_at: Option<String>,
    },
    /// On an OCS connection, by the producer.
    Connection {
        connection: &'a str,
        received_at: String,
        /// How long it was; more than `data_base64` holds if it was over the size limit.
        length_bytes: u64,
    },
}

impl<'a> DeadLetter<'a> {
    pub(crate) fn new(reason: &'a str, place: Place<'a>, data: &[u8]) -> Self {
        Self { reason, place, data_base64: BASE64_STANDARD.encode(data) }
    }

    /// Writes it to stderr as one line of JSON, and returns when that is done: a reader of stderr that
    /// does not read holds up this shard or connection, and nothing else.
    pub(crate) async fn write(&self) {
        let line = match serde_json::to_string(self) {
            Ok(line) => format!("{{\"dead_letter\":{line}}}\n"),
            Err(error) => {
                return tracing::error!(reason = self.reason, "dead letter not written: {error}");
            }
        };
        let write = move || io::stderr().lock().write_all(line.as_bytes());
        if let Ok(Err(error)) = tokio::task::spawn_blocking(write).await {
            tracing::error!(reason = self.reason, "dead letter not written to stderr: {error}");
        }
    }
}
