//! The lease table in DynamoDB: its rows, and the conditional writes to them.

use std::{
    collections::{BTreeSet, HashMap},
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

use super::{Change, Lease, LeaseError};
use crate::{
    aws::{self, AwsError, AwsErrorKind},
    checkpoint::Checkpoint,
    shard::{HashKeyRange, ShardId},
};

/// Attribute names of the KCL (facts: `DynamoDBLeaseSerializer` of amazon-kinesis-client), and one of
/// ours.
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
}

type Row = HashMap<String, AttributeValue>;

/// How long a new table may take to become active.
const CREATE_LIMIT: Duration = Duration::from_secs(60);

/// The lease table of one application.
#[derive(Debug, Clone)]
pub struct LeaseTable {
    client: Client,
    name: String,
}

impl LeaseTable {
    /// The table `name`, whether or not it exists yet.
    pub fn new(config: &SdkConfig, name: impl Into<String>) -> Self {
        let config = aws_sdk_dynamodb::config::Builder::from(config)
            .timeout_config(aws::call_timeouts())
            .build();
        Self { client: Client::from_conf(config), name: name.into() }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Creates the table, paid per request, if there is none, and waits until it can be used. Tells
    /// whether it was created.
    pub async fn ensure(&self) -> Result<bool, LeaseError> {
        match self.status().await? {
            Some(TableStatus::Active | TableStatus::Updating) => return Ok(false),
            Some(_) => {}
            None => self.create_table().await?,
        }
        let give_up = tokio::time::Instant::now() + CREATE_LIMIT;
        while tokio::time::Instant::now() < give_up {
            if self.status().await? == Some(TableStatus::Active) {
                return Ok(true);
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        Err(LeaseError::NotActive { table: self.name.clone(), waited_secs: CREATE_LIMIT.as_secs() })
    }

    async fn status(&self) -> Result<Option<TableStatus>, LeaseError> {
        match self.client.describe_table().table_name(&self.name).send().await {
            Ok(answer) => Ok(answer.table.and_then(|table| table.table_status)),
            Err(error) => match aws::failure("dynamodb:DescribeTable", error) {
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
            .create_table()
            .table_name(&self.name)
            .set_attribute_definitions(key.ok().map(|key| vec![key]))
            .set_key_schema(schema.ok().map(|schema| vec![schema]))
            .billing_mode(BillingMode::PayPerRequest)
            .send()
            .await;
        match created {
            Ok(_) => Ok(()),
            Err(error) => match aws::failure("dynamodb:CreateTable", error) {
                // Another worker was faster.
                error if error.kind() == AwsErrorKind::InUse => Ok(()),
                error => Err(self.failed(error)),
            },
        }
    }

    /// Every lease of the table, read consistently: a child whose parent's row is not seen yet would
    /// start too early (P5). Rows that are not leases are passed over.
    pub async fn scan(&self) -> Result<Vec<Lease>, LeaseError> {
        let mut leases = Vec::new();
        let mut next = None;
        loop {
            let page = self
                .client
                .scan()
                .table_name(&self.name)
                .consistent_read(true)
                .set_exclusive_start_key(next)
                .send()
                .await
                .map_err(|error| self.failed(aws::failure("dynamodb:Scan", error)))?;
            for row in page.items.unwrap_or_default() {
                leases.extend(self.read_row(&row)?);
            }
            next = page.last_evaluated_key.filter(|key| !key.is_empty());
            if next.is_none() {
                return Ok(leases);
            }
        }
    }

    /// Adds a lease. Tells `false` if the shard has one already, which is left as it is.
    pub async fn create(&self, lease: &Lease) -> Result<bool, LeaseError> {
        let put = self
            .client
            .put_item()
            .table_name(&self.name)
            .set_item(Some(write_row(lease)))
            .condition_expression("attribute_not_exists(leaseKey)")
            .send()
            .await;
        match put {
            Ok(_) => Ok(true),
            Err(error) => match aws::failure("dynamodb:PutItem", error) {
                error if error.kind() == AwsErrorKind::Condition => Ok(false),
                error => Err(self.failed(error)),
            },
        }
    }

    /// Writes a change to a lease that was last seen as `seen`, and gives the lease as it is then.
    ///
    /// Refused with [`LeaseError::Lost`] if another worker wrote the lease since. Our own earlier write
    /// whose answer got lost is recognised, and is no reason to lose the lease.
    pub async fn update(&self, seen: &Lease, change: &Change) -> Result<Lease, LeaseError> {
        let mut seen = seen.clone();
        loop {
            let wanted = seen.after(change);
            let refused_by = match self.write(&seen, &wanted, change).await? {
                Written::As(lease) => return Ok(lease),
                Written::Refused(row) => row,
            };
            let row = match refused_by {
                Some(row) => Some(row),
                None => self.get(&seen.shard).await?,
            };
            let now = row.map(|row| self.read_row(&row)).transpose()?.flatten();
            match verdict(&seen, &wanted, change, now) {
                Verdict::Landed(lease) => return Ok(lease),
                Verdict::WriteOver(lease) => seen = lease,
                Verdict::Lost { owner } => {
                    return Err(LeaseError::Lost { shard: seen.shard, owner });
                }
            }
        }
    }

    async fn write(
        &self,
        seen: &Lease,
        wanted: &Lease,
        change: &Change,
    ) -> Result<Written, LeaseError> {
        let update = Update::between(seen, wanted, change);
        let answer = self
            .client
            .update_item()
            .table_name(&self.name)
            .key(attribute::KEY, AttributeValue::S(seen.shard.to_string()))
            .update_expression(update.expression())
            .condition_expression("leaseCounter = :seen")
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
                return Ok(Written::As(self.read_row(&row)?.unwrap_or_else(|| wanted.clone())));
            }
            Err(error) => error,
        };
        let row = match error.as_service_error() {
            Some(UpdateItemError::ConditionalCheckFailedException(refused)) => {
                refused.item.clone().filter(|row| !row.is_empty())
            }
            _ => None,
        };
        match aws::failure("dynamodb:UpdateItem", error) {
            error if error.kind() == AwsErrorKind::Condition => Ok(Written::Refused(row)),
            error => Err(self.failed(error)),
        }
    }

    async fn get(&self, shard: &ShardId) -> Result<Option<Row>, LeaseError> {
        self.client
            .get_item()
            .table_name(&self.name)
            .key(attribute::KEY, AttributeValue::S(shard.to_string()))
            .consistent_read(true)
            .send()
            .await
            .map(|answer| answer.item)
            .map_err(|error| self.failed(aws::failure("dynamodb:GetItem", error)))
    }

    fn failed(&self, source: AwsError) -> LeaseError {
        LeaseError::Table { table: self.name.clone(), source }
    }

    /// Reads a row; `None` if it is not a lease (KCL 3.5 keeps other records in the same table).
    fn read_row(&self, row: &Row) -> Result<Option<Lease>, LeaseError> {
        let text = |name: &str| row.get(name).and_then(|value| value.as_s().ok());
        let count = |name: &str| {
            row.get(name).and_then(|value| value.as_n().ok()).and_then(|n| n.parse::<u64>().ok())
        };
        let shards = |name: &str| -> BTreeSet<ShardId> {
            let set = row.get(name).and_then(|value| value.as_ss().ok());
            set.into_iter().flatten().map(|id| ShardId::from(id.as_str())).collect()
        };
        let key = text(attribute::KEY).map_or("", String::as_str);
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
            shard: ShardId::from(key),
            owner: text(attribute::OWNER).cloned(),
            counter: count(attribute::COUNTER).ok_or_else(|| unreadable(attribute::COUNTER))?,
            owner_switches_since_checkpoint: count(attribute::OWNER_SWITCHES).unwrap_or(0),
            checkpoint,
            start_at,
            checkpoint_owner: text(attribute::CHECKPOINT_OWNER).cloned(),
            parents: shards(attribute::PARENTS),
            children: shards(attribute::CHILDREN),
            hash_key_range: hash_key(attribute::STARTING_HASH_KEY)
                .zip(hash_key(attribute::ENDING_HASH_KEY))
                .map(|(start, end)| HashKeyRange { start, end }),
        }))
    }
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
        row.insert(attribute::START_AT.into(), AttributeValue::N(at.as_millisecond().to_string()));
    }
    row
}

enum Written {
    As(Lease),
    /// With the row as it is, where the server gave it.
    Refused(Option<Row>),
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Landed(Lease),
    WriteOver(Lease),
    Lost { owner: Option<String> },
}

/// What a refused write means, given the row as it is now.
///
/// Only an owner raises the counter without changing the owner. So if the row is what we wanted, or
/// still ours and one further than we saw, an earlier write of ours got there and its answer did not.
fn verdict(seen: &Lease, wanted: &Lease, change: &Change, now: Option<Lease>) -> Verdict {
    match now {
        Some(now) if now == *wanted => Verdict::Landed(now),
        Some(now)
            if !matches!(change, Change::Take { .. })
                && now.owner.is_some()
                && now.owner == seen.owner
                && now.counter == seen.counter + 1 =>
        {
            Verdict::WriteOver(now)
        }
        now => Verdict::Lost { owner: now.and_then(|lease| lease.owner) },
    }
}

/// The attributes an UpdateItem sets and removes; those it does not name stay as they are.
#[derive(Default)]
struct Update {
    set: Vec<String>,
    remove: Vec<String>,
    names: HashMap<String, String>,
    values: Row,
}

impl Update {
    fn between(seen: &Lease, wanted: &Lease, change: &Change) -> Self {
        let mut update = Self::default();
        update.values.insert(":seen".into(), number(seen.counter));
        update.set(attribute::COUNTER, number(wanted.counter));
        if wanted.owner != seen.owner {
            update.set_or_remove(attribute::OWNER, wanted.owner.clone().map(AttributeValue::S));
        }
        if wanted.owner_switches_since_checkpoint != seen.owner_switches_since_checkpoint {
            update.set(attribute::OWNER_SWITCHES, number(wanted.owner_switches_since_checkpoint));
        }
        if let Change::Take { .. } = change {
            // KCL 2.x takers leave it behind; it would stop the lease's checkpoints later.
            update.set_or_remove(attribute::CHECKPOINT_OWNER, None);
        }
        if wanted.checkpoint != seen.checkpoint {
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
        if wanted.children != seen.children {
            update.set(attribute::CHILDREN, shard_set(&wanted.children));
        }
        if wanted.start_at != seen.start_at {
            update.set_or_remove(
                attribute::START_AT,
                wanted.start_at.map(|at| AttributeValue::N(at.as_millisecond().to_string())),
            );
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

fn shard_set(shards: &BTreeSet<ShardId>) -> AttributeValue {
    AttributeValue::Ss(shards.iter().map(ToString::to_string).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::Shard;

    fn lease(owner: Option<&str>, counter: u64) -> Lease {
        let shard = Shard { id: "a".into(), parents: vec![], hash_key_range: None, closed: false };
        Lease {
            owner: owner.map(str::to_owned),
            counter,
            ..Lease::new(&shard, Checkpoint::TrimHorizon, None)
        }
    }

    fn judged(seen: &Lease, change: &Change, now: Option<Lease>) -> Verdict {
        verdict(seen, &seen.after(change), change, now)
    }

    #[test]
    fn p4_a_write_whose_answer_got_lost_does_not_cost_the_lease() {
        let seen = lease(Some("me"), 4);
        let renewed = lease(Some("me"), 5);
        assert_eq!(
            judged(&seen, &Change::Renew, Some(renewed.clone())),
            Verdict::Landed(renewed.clone())
        );
        let checkpoint = Change::Checkpoint { checkpoint: Checkpoint::ShardEnd };
        assert_eq!(
            judged(&seen, &checkpoint, Some(renewed.clone())),
            Verdict::WriteOver(renewed),
            "an earlier renewal landed: the checkpoint goes on top of it"
        );
    }

    #[test]
    fn p4_a_lease_that_another_worker_wrote_is_lost() {
        let seen = lease(Some("me"), 4);
        let taken = Some(lease(Some("other"), 5));
        let lost = Verdict::Lost { owner: Some("other".into()) };
        assert_eq!(judged(&seen, &Change::Renew, taken), lost);
        assert_eq!(judged(&seen, &Change::Renew, None), Verdict::Lost { owner: None });
        let taken_back = Some(lease(Some("me"), 6));
        let lost = Verdict::Lost { owner: Some("me".into()) };
        assert_eq!(judged(&seen, &Change::Renew, taken_back), lost, "lost in between");
    }

    #[test]
    fn p4_a_taker_does_not_take_from_an_owner_that_renewed_in_time() {
        let seen = lease(Some("other"), 4);
        let renewed = Some(lease(Some("other"), 5));
        let lost = Verdict::Lost { owner: Some("other".into()) };
        assert_eq!(judged(&seen, &Change::Take { worker: "me".into() }, renewed), lost);
    }

    #[test]
    fn rows_read_back_as_they_were_written() {
        let config = SdkConfig::builder()
            .behavior_version(aws_sdk_dynamodb::config::BehaviorVersion::latest())
            .build();
        let table = LeaseTable::new(&config, "t");
        let mut lease = lease(None, 0);
        lease.parents = ["p1", "p2"].map(ShardId::from).into();
        lease.hash_key_range = Some(HashKeyRange { start: 0, end: u128::MAX });
        lease.start_at = Some(Timestamp::from_millisecond(1_700_000_000_123).expect("a time"));
        let read = table.read_row(&write_row(&lease)).expect("readable");
        assert_eq!(read, Some(lease));
    }

    #[test]
    fn rows_of_other_kinds_are_passed_over() {
        let config = SdkConfig::builder()
            .behavior_version(aws_sdk_dynamodb::config::BehaviorVersion::latest())
            .build();
        let table = LeaseTable::new(&config, "t");
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
