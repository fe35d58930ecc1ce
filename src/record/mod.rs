//! What is inside a Kinesis record: from its bytes to messages.
//!
//! A record holds one CloudEvent or a JSON array of them. What cannot be decoded is never dropped: it
//! comes out beside the messages with its place, its bytes and the reason.

#[expect(dead_code, reason = "only its writer is in use")]
mod aggregate;
mod message;
mod unpack;

use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;

pub(crate) use aggregate::write_aggregate;
pub use message::Message;
pub(crate) use unpack::unpack;

use crate::shard::{SequenceNumber, ShardId};

/// A record as a shard gave it.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    pub sequence_number: SequenceNumber,
    pub partition_key: String,
    /// When Kinesis received it, to the millisecond; some servers leave it out.
    pub arrived_at: Option<Timestamp>,
    pub data: Bytes,
}

/// The stream and shard that records come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ShardName {
    pub stream: Arc<str>,
    pub shard: ShardId,
}

/// Something in a record that is not a raw OCS message.
#[derive(Debug, Clone)]
pub(crate) struct Undecodable {
    /// Its place in the record; `None` if the record as a whole cannot be read.
    pub sub_sequence_number: Option<u64>,
    pub reason: String,
    pub data: Bytes,
}
