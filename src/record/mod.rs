//! What is inside a Kinesis record: from its bytes to messages.
//!
//! [`unpack`] takes a record apart. It holds a CloudEvent or a JSON array of them, as they are, in gzip, or
//! in the user records of a KPL aggregate; each event holds one OCS message or a batch. What cannot be
//! decoded is never dropped: it comes out beside the messages with its place, its bytes and the reason.
//!
//! Pure: no stream is read here, and nothing is stored. What an OCS line says is in [`ocs`](crate::ocs); a
//! [`Message`] gives it when it is asked to.

mod aggregate;
mod gzip;
mod json;
mod message;
mod unpack;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;

pub use aggregate::write_aggregate;
pub use message::Message;
pub use unpack::unpack;

use crate::shard::{HashKeyRange, SequenceNumber, ShardId};

/// A record as a shard gave it.
#[derive(Debug, Clone)]
pub struct Record {
    /// Its place in the shard.
    pub sequence_number: SequenceNumber,
    /// The key that decided its shard.
    pub partition_key: String,
    /// When Kinesis received it, to the millisecond; some servers leave it out.
    pub arrived_at: Option<Timestamp>,
    /// What the producer put.
    pub data: Bytes,
}

/// The shard that records come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardName {
    /// The name of its stream.
    pub stream: Arc<str>,
    /// Its own name.
    pub shard: ShardId,
    /// The hash keys it takes: a KPL aggregate with any other is not for it. `None` if that is not known;
    /// then all are.
    pub hash_key_range: Option<HashKeyRange>,
}

/// Something in a record that is not a raw OCS message.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Undecodable {
    /// Its place in the record, counted as messages are; `None` if this is the record as a whole.
    pub sub_sequence_number: Option<u64>,
    /// The place of its user record in a KPL aggregate.
    pub user_record: Option<u64>,
    /// The partition key of its record or user record.
    pub partition_key: String,
    /// Why it is none, for people.
    pub reason: String,
    /// Its bytes as they came. For a message of a batch event, the event with that message alone: as a
    /// record of its own it is what it was. (If the event has more than 4 KiB beside its messages, the
    /// message's bytes.)
    pub data: Bytes,
}

/// What a record was, beside what came out of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Unpacked {
    /// The last user record of a KPL aggregate; `None` for any other record.
    pub last_user_record: Option<u64>,
    /// It is a KPL aggregate with a user record that belongs to another shard, and gave nothing. The KPL
    /// puts such user records again by itself; other aggregators lose them, with the KCL as well as here.
    pub misplaced: bool,
}

impl Unpacked {
    /// The checkpoint's sub-sequence number once all of the record is finished, as the KCL counts.
    pub fn sub_sequence_number(&self) -> u64 {
        self.last_user_record.unwrap_or(0)
    }
}
