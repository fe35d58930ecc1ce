//! The lease table in DynamoDB: its rows, and the conditional writes to them.
//!
//! The attributes are the KCL's (`DynamoDBLeaseSerializer` of amazon-kinesis-client), and a few of ours that
//! it leaves alone. Rows of the KCL 3.x that are no leases are never written and never read as one.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex},
    time::Duration,
};

use aws_sdk_dynamodb::{
    Client,
    operation::update_item::UpdateItemError,
    types::{
        AttributeDefinition, AttributeValue, BillingMode, KeySchemaElement, KeyType, ReturnValue,
        ReturnValuesOnConditionCheckFailure, ScalarAttributeType, TableStatus,
    },
};
use aws_types::SdkConfig;
use jiff::Timestamp;
use tokio::time::Instant;

use super::{Change, Lease, LeaseError, LeaseStore, ReaderNote, Trouble, Verdict, verdict};
use crate::{
    aws::{self, AwsError, AwsErrorKind, Reconnecting},
    checkpoint::Checkpoint,
    shard::{HashKeyRange, Shard, ShardId, StreamIdentifier},
};

/// Attribute names of the KCL (facts: `DynamoDBLeaseSerializer` of amazon-kinesis-client), and
/// three of ours.
mod attribute {
    pub const KEY: &str = "leaseKey";
    pub const OWNER: &str = "leaseOwner";
    pub const COUNTER: &str = "leaseCounter";
    pub const OWNER_SWITCHES: &str = "ownerSwitchesSinceCheckpoint";
    pub const CHECKPOINT: &str = "checkpoint";
    pub const SUB_SEQUENCE_NUMBER: &str = "checkpointSubSequenceNumber";
    pub const PENDING: [&str; 3] =
        ["pendingCheckpoint", "pendingCheckpointSubSequenceNumber", "pendingCheckpointState"];
    pub const CHECKPOINT_OWNER: &str = "checkpointOwner";
    pub const PARENTS: &str = "parentShardId";
    pub const CHILDREN: &str = "childShardIds";
    pub const STARTING_HASH_KEY: &str = "startingHashKey";
    pub const ENDING_HASH_KEY: &str = "endingHashKey";
    pub const ENTITY_TYPE: &str = "entityType";
    /// Ours: epoch milliseconds where reading starts, for `LATEST` and `AT_TIMESTAMP`, for which the
    /// KCL stores no time.
    pub const START_AT: &str = "startAtMillis";
    /// Ours: see [`Lease::bell`](super::Lease::bell).
    pub const BELL: &str = "bell";
    /// Ours: see [`ReaderNote`](super::ReaderNote), a map.
    pub const NOTE: &str = "readerNote";
    /// The KCL's, where the table is that of several streams.
    pub const STREAM: &str = "streamName";
    pub const SHARD: &str = "shardId";
}

type Row = HashMap<String, AttributeValue>;

/// How long a new table may take to become active.
const CREATE_LIMIT: Duration = Duration::from_secs(60);

/// The lease table of one application.
#[derive(Debug, Clone)]
pub struct LeaseTable {
    client: Arc<Reconnecting<Client>>,
    name: String,
    /// The streams whose leases it is asked for, where they are several.
    streams: Arc<BTreeSet<StreamIdentifier>>,
    /// The rows that were told to be unreadable, or of an earlier stream.
    told: Arc<Mutex<BTreeSet<String>>>,
}

impl LeaseTable {
    /// The table `name`, whether or not it exists yet.
    pub fn new(config: &SdkConfig, name: impl Into<String>) -> Self {
        let config = aws_sdk_dynamodb::config::Builder::from(config)
            .timeout_config(aws::lease_timeouts())
            .build();
        let client = Reconnecting::new(move || Client::from_conf(config.clone()));
        Self {
            client: client.into(),
            name: name.into(),
            streams: Arc::default(),
            told: Arc::default(),
        }
    }

    /// The same table, of an application that reads several streams: of these.
    #[must_use]
    pub fn of_streams(self, streams: impl IntoIterator<Item = StreamIdentifier>) -> Self {
        Self { streams: Arc::new(streams.into_iter().collect()), ..self }
    }

    /// Whether the row of this key is asked for. An error if it is that of another kind of application.
    fn is_asked_for(&self, key: &ShardId) -> Result<bool, LeaseError> {
        let stream = key.stream();
        if stream.is_some() == self.streams.is_empty() {
            return Err(LeaseError::OtherKeys {
                table: self.name.clone(),
                key: key.clone(),
                several: stream.is_some(),
            });
        }
        let Some(stream) = stream.filter(|stream| !self.streams.contains(stream)) else {
            return Ok(true);
        };
        if self.streams.iter().any(|ours| ours.is_made_again(&stream)) && self.tell(key.as_str()) {
            tracing::warn!(
                table = self.name, row = %key,
                "this lease is of an earlier stream named {}, which was deleted and made again: the new \
                 one is read from the start position; delete the old rows", stream.name()
            );
        }
        Ok(false)
    }

    /// Whether a row is told for the first time.
    fn tell(&self, row: &str) -> bool {
        let mut told = self.told.lock().unwrap_or_else(|poison| poison.into_inner());
        told.insert(row.to_owned())
    }

    /// Waits until the table can be used, and creates it, paid per request, if there is none.
    pub async fn ensure(&self) -> Result<(), LeaseError> {
        let give_up = Instant::now() + CREATE_LIMIT;
        loop {
            match self.status().await? {
                Some(TableStatus::Active | TableStatus::Updating) => return Ok(()),
                // Another worker creates it, or somebody deletes it.
                Some(_) => {}
                None => self.create_table().await?,
            }
            if Instant::now() >= give_up {
                return Err(LeaseError::NotActive {
                    table: self.name.clone(),
                    waited_secs: CREATE_LIMIT.as_secs(),
                });
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn status(&self) -> Result<Option<TableStatus>, LeaseError> {
        match self.client.get().describe_table().table_name(&self.name).send().await {
            Ok(answer) => Ok(answer.table.and_then(|table| table.table_status)),
            Err(error) => match self.client.failure("dynamodb:DescribeTable", error) {
                error if error.kind() == AwsErrorKind::NotFound => Ok(None),
                error => Err(self.failed(error)),
            },
        }
    }

    async fn create_table(&self) -> Result<(), LeaseError> {
        let key = AttributeDefinition::builder()
            .attribute_name(attribute::KEY)
            .attribute_type(ScalarAttributeType::S)
            .build();
        let schema = KeySchemaElement::builder()
            .attribute_name(attribute::KEY)
            .key_type(KeyType::Hash)
            .build();
        let created = self
            .client
            .get()
            .create_table()
            .table_name(&self.name)
            .set_attribute_definitions(key.ok().map(|key| vec![key]))
            .set_key_schema(schema.ok().map(|schema| vec![schema]))
            .billing_mode(BillingMode::PayPerRequest)
            .send()
            .await;
        match created {
            Ok(_) => {
                tracing::info!(table = self.name, "lease table created");
                Ok(())
            }
            Err(error) => match self.client.failure("dynamodb:CreateTable", error) {
                // Another worker was faster.
                error if error.kind() == AwsErrorKind::InUse => Ok(()),
                error => Err(self.failed(error)),
            },
        }
    }

    async fn write(&self, seen: &Lease, change: &Change) -> Result<Written, LeaseError> {
        let update = Update::new(seen, change);
        let answer = self
            .client
            .get()
            .update_item()
            .table_name(&self.name)
            .key(attribute::KEY, AttributeValue::S(seen.shard.to_string()))
            .update_expression(update.expression())
            .condition_expression(update.condition)
            .set_expression_attribute_names(Some(update.names))
            .set_expression_attribute_values(Some(update.values))
            .return_values(ReturnValue::AllNew)
            .return_values_on_condition_check_failure(ReturnValuesOnConditionCheckFailure::AllOld)
            .send()
            .await;
        let error = match answer {
            Ok(answer) => {
                // Read back: a taker sees the checkpoint as it is, not as an older scan showed it.
                let row = answer.attributes.unwrap_or_default();
                let lease = self.read_row(&row)?.unwrap_or_else(|| seen.after(change));
                return Ok(Written::As(lease.into()));
            }
            Err(error) => error,
        };
        let row = match error.as_service_error() {
            Some(UpdateItemError::ConditionalCheckFailedException(refused)) => {
                refused.item.clone().filter(|row| !row.is_empty())
            }
            _ => None,
        };
        match self.client.failure("dynamodb:UpdateItem", error) {
            error if error.kind() == AwsErrorKind::Condition => Ok(Written::Refused(row)),
            error => Err(self.failed(error)),
        }
    }

    /// What stands for a row that cannot be read, which is told once.
    fn unreadable(&self, row: &Row, error: &LeaseError) -> Lease {
        let key =
            row.get(attribute::KEY).and_then(|key| key.as_s().ok()).map_or("", String::as_str);
        if self.tell(key) {
            tracing::error!("{error}");
        }
        let shard = Shard {
            id: key.into(),
            parents: Vec::new(),
            hash_key_range: None,
            closed: false,
            begins: None,
        };
        Lease { unreadable: true, ..Lease::new(&shard, Checkpoint::TrimHorizon, None) }
    }

    fn failed(&self, source: AwsError) -> LeaseError {
        let table = self.name.clone();
        match source.kind() {
            AwsErrorKind::NotFound => LeaseError::NoTable { table },
            _ => LeaseError::Table { table, source },
        }
    }

    /// Reads a row; `None` if it is not a lease (KCL 3.5 keeps other records in the same table).
    fn read_row(&self, row: &Row) -> Result<Option<Lease>, LeaseError> {
        let text = |name: &str| row.get(name).and_then(|value| value.as_s().ok());
        let count = |name: &str| {
            row.get(name).and_then(|value| value.as_n().ok()).and_then(|n| n.parse::<u64>().ok())
        };
        let key = text(attribute::KEY).map_or("", String::as_str);
        let shard = ShardId::from(key);
        // By their names alone, also where the key has the stream before it.
        let shards = |name: &str| -> BTreeSet<ShardId> {
            let set = row.get(name).and_then(|value| value.as_ss().ok());
            set.into_iter().flatten().map(|name| shard.sibling(name)).collect()
        };
        let is_lease = match text(attribute::ENTITY_TYPE) {
            Some(entity) => entity == "LEASE",
            None => row.contains_key(attribute::COUNTER) || row.contains_key(attribute::CHECKPOINT),
        };
        if !is_lease {
            return Ok(None);
        }
        let unreadable = |attribute| LeaseError::Row {
            table: self.name.clone(),
            row: key.to_owned(),
            attribute,
        };
        let checkpoint = text(attribute::CHECKPOINT)
            .and_then(|checkpoint| {
                let sub = count(attribute::SUB_SEQUENCE_NUMBER).unwrap_or(0);
                Checkpoint::parse(checkpoint, sub)
            })
            .ok_or_else(|| unreadable(attribute::CHECKPOINT))?;
        let hash_key = |name: &str| text(name).and_then(|value| value.parse::<u128>().ok());
        let start_at = row
            .get(attribute::START_AT)
            .and_then(|value| value.as_n().ok())
            .and_then(|millis| millis.parse().ok())
            .and_then(|millis| Timestamp::from_millisecond(millis).ok());
        Ok(Some(Lease {
            owner: text(attribute::OWNER).cloned(),
            counter: count(attribute::COUNTER).ok_or_else(|| unreadable(attribute::COUNTER))?,
            owner_switches_since_checkpoint: count(attribute::OWNER_SWITCHES).unwrap_or(0),
            checkpoint,
            start_at,
            checkpoint_owner: text(attribute::CHECKPOINT_OWNER).cloned(),
            parents: shards(attribute::PARENTS),
            children: shards(attribute::CHILDREN),
            unreadable: false,
            bell: count(attribute::BELL).unwrap_or(0),
            note: row.get(attribute::NOTE).and_then(|value| read_note(value.as_m().ok()?)),
            hash_key_range: hash_key(attribute::STARTING_HASH_KEY)
                .zip(hash_key(attribute::ENDING_HASH_KEY))
                .map(|(start, end)| HashKeyRange { start, end }),
            shard,
        }))
    }
}

/// What a reader noted; `None` for what has another form.
fn read_note(note: &Row) -> Option<ReaderNote> {
    let text = |row: &Row, name: &str| Some(row.get(name)?.as_s().ok()?.clone());
    let time = |row: &Row, name: &str| {
        let millis = row.get(name)?.as_n().ok()?.parse().ok()?;
        Timestamp::from_millisecond(millis).ok()
    };
    let trouble = |row: &Row| {
        Some(Trouble {
            text: text(row, "text")?,
            at: time(row, "atMillis")?,
            is_over: *row.get("isOver")?.as_bool().ok()?,
        })
    };
    Some(ReaderNote {
        reader: text(note, "reader")?,
        since: time(note, "sinceMillis")?,
        from_counter: note.get("fromCounter")?.as_n().ok()?.parse().ok()?,
        trouble: note.get("trouble").and_then(|value| trouble(value.as_m().ok()?)),
    })
}

fn write_note(note: &ReaderNote) -> AttributeValue {
    let mut row = Row::from([
        ("reader".into(), AttributeValue::S(note.reader.clone())),
        ("sinceMillis".into(), millis(note.since)),
        ("fromCounter".into(), number(note.from_counter)),
    ]);
    if let Some(trouble) = &note.trouble {
        let trouble = Row::from([
            ("text".into(), AttributeValue::S(trouble.text.clone())),
            ("atMillis".into(), millis(trouble.at)),
            ("isOver".into(), AttributeValue::Bool(trouble.is_over)),
        ]);
        row.insert("trouble".into(), AttributeValue::M(trouble));
    }
    AttributeValue::M(row)
}

/// A row for a lease that does not exist yet. DynamoDB has no empty sets or strings: what is not there
/// is left out.
fn write_row(lease: &Lease) -> Row {
    let mut row = Row::from([
        (attribute::KEY.into(), AttributeValue::S(lease.shard.to_string())),
        (attribute::COUNTER.into(), number(lease.counter)),
        (attribute::OWNER_SWITCHES.into(), number(lease.owner_switches_since_checkpoint)),
        (attribute::CHECKPOINT.into(), AttributeValue::S(lease.checkpoint.as_str().to_owned())),
        (attribute::SUB_SEQUENCE_NUMBER.into(), number(lease.checkpoint.sub_sequence_number())),
    ]);
    if !lease.parents.is_empty() {
        row.insert(attribute::PARENTS.into(), shard_set(&lease.parents));
    }
    if let Some(range) = lease.hash_key_range {
        row.insert(attribute::STARTING_HASH_KEY.into(), AttributeValue::S(range.start.to_string()));
        row.insert(attribute::ENDING_HASH_KEY.into(), AttributeValue::S(range.end.to_string()));
    }
    if let Some(at) = lease.start_at {
        row.insert(attribute::START_AT.into(), millis(at));
    }
    if let Some(stream) = lease.shard.stream() {
        row.insert(attribute::STREAM.into(), AttributeValue::S(stream.to_string()));
        row.insert(attribute::SHARD.into(), AttributeValue::S(lease.shard.name().to_owned()));
    }
    row
}

impl LeaseStore for LeaseTable {
    fn name(&self) -> &str {
        &self.name
    }

    /// Rows that are not leases are passed over; a lease that cannot be read is told and left alone.
    async fn scan(&self) -> Result<Vec<Lease>, LeaseError> {
        let mut leases = Vec::new();
        let mut next = None;
        loop {
            let page = self
                .client
                .get()
                .scan()
                .table_name(&self.name)
                // A child whose parent's row is not seen yet would start too early (P5).
                .consistent_read(true)
                .set_exclusive_start_key(next)
                .send()
                .await
                .map_err(|error| self.failed(self.client.failure("dynamodb:Scan", error)))?;
            for row in page.items.unwrap_or_default() {
                let lease = match self.read_row(&row) {
                    Ok(None) => continue,
                    Ok(Some(lease)) => lease,
                    Err(error) => self.unreadable(&row, &error),
                };
                if self.is_asked_for(&lease.shard)? {
                    leases.push(lease);
                }
            }
            next = page.last_evaluated_key.filter(|key| !key.is_empty());
            if next.is_none() {
                return Ok(leases);
            }
        }
    }

    async fn get(&self, shard: &ShardId) -> Result<Option<Lease>, LeaseError> {
        let answer = self
            .client
            .get()
            .get_item()
            .table_name(&self.name)
            .key(attribute::KEY, AttributeValue::S(shard.to_string()))
            .consistent_read(true)
            .send()
            .await
            .map_err(|error| self.failed(self.client.failure("dynamodb:GetItem", error)))?;
        Ok(answer.item.map(|row| self.read_row(&row)).transpose()?.flatten())
    }

    async fn create(&self, lease: &Lease) -> Result<bool, LeaseError> {
        let put = self
            .client
            .get()
            .put_item()
            .table_name(&self.name)
            .set_item(Some(write_row(lease)))
            .condition_expression("attribute_not_exists(leaseKey)")
            .send()
            .await;
        match put {
            Ok(_) => Ok(true),
            Err(error) => match self.client.failure("dynamodb:PutItem", error) {
                error if error.kind() == AwsErrorKind::Condition => Ok(false),
                error => Err(self.failed(error)),
            },
        }
    }

    async fn update(&self, seen: &mut Lease, change: &Change) -> Result<Lease, LeaseError> {
        loop {
            let row = match self.write(seen, change).await? {
                Written::As(lease) => return Ok(*lease),
                Written::Refused(row) => row,
            };
            let now = match row {
                Some(row) => self.read_row(&row)?,
                None => self.get(&seen.shard).await?,
            };
            match verdict(seen, change, now) {
                Verdict::Landed(lease) => return Ok(lease),
                Verdict::WriteOver(lease) => *seen = lease,
                Verdict::Gone => return Err(LeaseError::Gone { shard: seen.shard.clone() }),
                Verdict::Lost { owner } => {
                    return Err(LeaseError::Lost { shard: seen.shard.clone(), owner });
                }
            }
        }
    }

    async fn delete(&self, seen: &Lease) -> Result<(), LeaseError> {
        let deleted = self
            .client
            .get()
            .delete_item()
            .table_name(&self.name)
            .key(attribute::KEY, AttributeValue::S(seen.shard.to_string()))
            .condition_expression("leaseCounter = :seen")
            .expression_attribute_values(":seen", number(seen.counter))
            .send()
            .await;
        match deleted.map_err(|error| self.client.failure("dynamodb:DeleteItem", error)) {
            Ok(_) => Ok(()),
            // Someone else was faster, or uses it after all.
            Err(error) if error.kind() == AwsErrorKind::Condition => Ok(()),
            Err(error) => Err(self.failed(error)),
        }
    }

    async fn ring(&self, shard: &ShardId) -> Result<(), LeaseError> {
        let rung = self
            .client
            .get()
            .update_item()
            .table_name(&self.name)
            .key(attribute::KEY, AttributeValue::S(shard.to_string()))
            .update_expression("ADD #bell :one")
            .condition_expression("attribute_exists(leaseKey)")
            .expression_attribute_names("#bell", attribute::BELL)
            .expression_attribute_values(":one", number(1))
            .send()
            .await;
        match rung.map_err(|error| self.client.failure("dynamodb:UpdateItem", error)) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == AwsErrorKind::Condition => Ok(()),
            Err(error) => Err(self.failed(error)),
        }
    }
}

enum Written {
    As(Box<Lease>),
    /// With the row as it is, where the server gave it.
    Refused(Option<Row>),
}

/// The attributes an UpdateItem sets and removes; those it does not name stay as they are.
#[derive(Default)]
struct Update {
    set: Vec<String>,
    remove: Vec<String>,
    condition: &'static str,
    names: HashMap<String, String>,
    values: Row,
}

impl Update {
    /// The write that leads from `seen` to `seen.after(change)`, on the condition of `may_write`.
    fn new(seen: &Lease, change: &Change) -> Self {
        let wanted = seen.after(change);
        let settles_owner = matches!(
            change,
            Change::Take { .. } | Change::End { .. } | Change::Free | Change::Reset { .. }
        );
        let mut update = Self { condition: "leaseCounter = :seen", ..Self::default() };
        update.values.insert(":seen".into(), number(seen.counter));
        update.set(attribute::COUNTER, number(wanted.counter));
        match change {
            Change::Ask { .. } => {
                update.condition = "leaseCounter = :seen AND leaseOwner = :owner AND \
                                    attribute_not_exists(checkpointOwner)";
                let owner = seen.owner.clone().unwrap_or_default();
                update.values.insert(":owner".into(), AttributeValue::S(owner));
            }
            Change::Release { .. } if seen.checkpoint_owner.is_none() => {
                update.condition = "leaseCounter = :seen AND attribute_not_exists(checkpointOwner)";
            }
            _ => {}
        }
        if wanted.owner != seen.owner || settles_owner {
            update.set_or_remove(attribute::OWNER, wanted.owner.clone().map(AttributeValue::S));
        }
        // Also where we saw none: KCL 2.x takers leave it behind.
        if wanted.checkpoint_owner != seen.checkpoint_owner || settles_owner {
            update.set_or_remove(
                attribute::CHECKPOINT_OWNER,
                wanted.checkpoint_owner.clone().map(AttributeValue::S),
            );
        }
        if wanted.owner_switches_since_checkpoint != seen.owner_switches_since_checkpoint {
            update.set(attribute::OWNER_SWITCHES, number(wanted.owner_switches_since_checkpoint));
        }
        // A reset also clears what a KCL worker left pending at the same checkpoint.
        if wanted.checkpoint != seen.checkpoint || matches!(change, Change::Reset { .. }) {
            update.set(
                attribute::CHECKPOINT,
                AttributeValue::S(wanted.checkpoint.as_str().to_owned()),
            );
            update.set(
                attribute::SUB_SEQUENCE_NUMBER,
                number(wanted.checkpoint.sub_sequence_number()),
            );
            for pending in attribute::PENDING {
                update.set_or_remove(pending, None);
            }
        }
        if let Some(note) = wanted.note.as_ref().filter(|note| Some(*note) != seen.note.as_ref()) {
            update.set(attribute::NOTE, write_note(note));
        }
        if wanted.children != seen.children {
            update.set(attribute::CHILDREN, shard_set(&wanted.children));
        }
        if wanted.start_at != seen.start_at {
            update.set_or_remove(attribute::START_AT, wanted.start_at.map(millis));
        }
        update
    }

    fn set(&mut self, name: &'static str, value: AttributeValue) {
        self.set_or_remove(name, Some(value));
    }

    fn set_or_remove(&mut self, name: &'static str, value: Option<AttributeValue>) {
        self.names.insert(format!("#{name}"), name.to_owned());
        match value {
            Some(value) => {
                self.set.push(format!("#{name} = :{name}"));
                self.values.insert(format!(":{name}"), value);
            }
            None => self.remove.push(format!("#{name}")),
        }
    }

    fn expression(&self) -> String {
        let set = format!("SET {}", self.set.join(", "));
        match self.remove.as_slice() {
            [] => set,
            remove => format!("{set} REMOVE {}", remove.join(", ")),
        }
    }
}

fn number(value: u64) -> AttributeValue {
    AttributeValue::N(value.to_string())
}

fn millis(at: Timestamp) -> AttributeValue {
    AttributeValue::N(at.as_millisecond().to_string())
}

fn shard_set(shards: &BTreeSet<ShardId>) -> AttributeValue {
    AttributeValue::Ss(shards.iter().map(|shard| shard.name().to_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(owner: Option<&str>, counter: u64) -> Lease {
        let shard = Shard {
            id: "a".into(),
            parents: vec![],
            hash_key_range: None,
            closed: false,
            begins: None,
        };
        Lease {
            owner: owner.map(str::to_owned),
            counter,
            ..Lease::new(&shard, Checkpoint::TrimHorizon, None)
        }
    }

    fn table() -> LeaseTable {
        let config = SdkConfig::builder()
            .behavior_version(aws_sdk_dynamodb::config::BehaviorVersion::latest())
            .build();
        LeaseTable::new(&config, "t")
    }

    #[test]
    fn the_rows_of_several_streams_are_those_of_the_kcl_and_give_the_whole_shards_back() {
        let stream = |text| StreamIdentifier::parse(text).expect("an identifier");
        let (ours, again) =
            (stream("123456789012:s:1625148000"), stream("123456789012:s:1625149000"));
        let mut lease = lease(None, 0);
        lease.shard = ours.shard("shardId-1");
        lease.parents = [ours.shard("shardId-0")].into();
        let row = write_row(&lease);
        let text = |name: &str| row[name].as_s().expect("a text").as_str();
        assert_eq!(text("leaseKey"), "123456789012:s:1625148000:shardId-1");
        assert_eq!(text("streamName"), "123456789012:s:1625148000");
        assert_eq!(text("shardId"), "shardId-1");
        assert_eq!(row["parentShardId"], AttributeValue::Ss(vec!["shardId-0".into()]));
        assert_eq!(table().read_row(&row).expect("readable"), Some(lease.clone()));

        let several = table().of_streams([ours]);
        assert!(several.is_asked_for(&lease.shard).expect("of its kind"));
        assert!(!several.is_asked_for(&again.shard("shardId-1")).expect("of its kind"));
        assert!(several.is_asked_for(&"shardId-1".into()).is_err(), "of one that reads one stream");
        let error = table().is_asked_for(&lease.shard).expect_err("of one that reads several");
        assert!(error.to_string().contains("of an application that reads several"), "{error}");
    }

    #[test]
    fn a_note_is_written_with_what_changes_it_and_read_back() {
        let at = Timestamp::from_millisecond(1_700_000_000_123).expect("a time");
        let taken = lease(None, 4).after(&Change::Take { worker: "me".into(), at });
        let trouble = Trouble { text: "the database is away".into(), at, is_over: true };
        let noted = Change::Note { trouble };
        let update = Update::new(&taken, &noted);
        let note = update.values[":readerNote"].as_m().expect("a map");
        assert_eq!(read_note(note), taken.after(&noted).note);
        assert!(!Update::new(&taken, &Change::Renew).values.contains_key(":readerNote"));
    }

    #[test]
    fn rows_read_back_as_they_were_written() {
        let table = table();
        let mut lease = lease(None, 0);
        lease.parents = ["p1", "p2"].map(ShardId::from).into();
        lease.hash_key_range = Some(HashKeyRange { start: 0, end: u128::MAX });
        lease.start_at = Some(Timestamp::from_millisecond(1_700_000_000_123).expect("a time"));
        let read = table.read_row(&write_row(&lease)).expect("readable");
        assert_eq!(read, Some(lease));
    }

    #[test]
    fn a_reset_writes_the_checkpoint_with_its_time_and_clears_owners_and_what_is_pending() {
        let start_at = Timestamp::from_millisecond(1_700_000_000_123).ok();
        let seen = lease(Some("me"), 4);
        let to = |checkpoint, start_at| Update::new(&seen, &Change::Reset { checkpoint, start_at });
        let latest = to(Checkpoint::Latest, start_at);
        assert_eq!(latest.condition, "leaseCounter = :seen");
        assert_eq!(latest.values[":checkpoint"], AttributeValue::S("LATEST".into()));
        assert_eq!(latest.values[":startAtMillis"], AttributeValue::N("1700000000123".into()));
        for removed in [attribute::OWNER, attribute::CHECKPOINT_OWNER, attribute::PENDING[0]] {
            assert!(latest.remove.contains(&format!("#{removed}")), "{removed}");
        }
        let again = to(Checkpoint::TrimHorizon, None);
        assert!(again.remove.contains(&format!("#{}", attribute::PENDING[0])));
    }

    #[test]
    fn p4_taking_a_lease_removes_a_checkpoint_owner_that_others_left_behind() {
        let take = Update::new(
            &lease(Some("other"), 4),
            &Change::Take { worker: "me".into(), at: Timestamp::UNIX_EPOCH },
        );
        assert!(take.remove.contains(&format!("#{}", attribute::CHECKPOINT_OWNER)));
    }

    #[test]
    fn rows_of_other_kinds_are_passed_over() {
        let table = table();
        let mut row = write_row(&lease(None, 0));
        row.insert("entityType".into(), AttributeValue::S("LEASE".into()));
        assert!(table.read_row(&row).expect("readable").is_some());
        row.insert("entityType".into(), AttributeValue::S("WORKER_METRIC_STATS".into()));
        assert_eq!(table.read_row(&row).expect("readable"), None);
        let migration = Row::from([
            ("leaseKey".to_owned(), AttributeValue::S("Migration3.0".into())),
            ("cv".to_owned(), AttributeValue::S("CLIENT_VERSION_3X".into())),
        ]);
        assert_eq!(table.read_row(&migration).expect("readable"), None);
    }
}
