//! The lease table, looked at and not touched.

use aws_sdk_dynamodb::{
    Client,
    types::{AttributeValue, KeyType, TableDescription, TableStatus},
};
use aws_types::SdkConfig;

use super::{Found, Report, Trouble, clock::Clock};
use crate::{
    aws::{self, AwsError, AwsErrorKind},
    permissions::Resource,
};

/// No row has it, and no row can satisfy it.
const NEVER: &str = "attribute_exists(leaseKey) AND attribute_not_exists(leaseKey)";
/// The key of no lease.
const NOBODYS_KEY: &str = "tramline check";

pub(super) async fn check(report: &mut Report, config: &SdkConfig, clock: &Clock, table: &str) {
    let config = aws_sdk_dynamodb::config::Builder::from(config)
        .timeout_config(aws::call_timeouts())
        .interceptor(clock.clone())
        .build();
    let client = Client::from_conf(config);
    let check = format!("lease table {table}");
    let mut exists = None;
    for row in report.rows(&[Resource::LeaseTable]) {
        match (row.action, exists) {
            ("dynamodb:DescribeTable", _) => {
                let described = describe(&client, table, &mut exists);
                report.tried(row, &check, described).await;
            }
            ("dynamodb:CreateTable", Some(true)) => {
                report.not_tried(row, &check, "not needed: the table is there");
            }
            ("dynamodb:CreateTable", _) => {
                let why = "it would make the table, as the first worker does if there is none";
                report.not_tried(row, &check, why);
            }
            (_, Some(false)) => report.not_tried(row, &check, "there is no table yet"),
            (action, _) => {
                report.tried(row, &check, access(&client, action, table)).await;
            }
        }
    }
}

async fn describe(client: &Client, table: &str, exists: &mut Option<bool>) -> Found {
    let described = client.describe_table().table_name(table).send().await;
    let described = described.map_err(|error| aws::failure("dynamodb:DescribeTable", error));
    let found = match described {
        Ok(answer) => answer.table,
        Err(error) if error.kind() == AwsErrorKind::NotFound => None,
        Err(error) => return Err(error.into()),
    };
    *exists = Some(found.is_some());
    match found {
        Some(found) => judge(table, &found),
        None => {
            Ok("is not there yet: the first worker makes it, with dynamodb:CreateTable".to_owned())
        }
    }
}

/// Whether a table can hold leases.
fn judge(name: &str, table: &TableDescription) -> Found {
    let keys: Vec<(&str, &KeyType)> =
        table.key_schema().iter().map(|key| (key.attribute_name(), key.key_type())).collect();
    if keys != [("leaseKey", &KeyType::Hash)] {
        let names: Vec<&str> = keys.iter().map(|(name, _)| *name).collect();
        return Err(Trouble::Wrong {
            detail: format!("it has the key {}, and is no lease table", names.join(", ")),
            repair: format!(
                "name another table with --lease-table; a lease table like {name} has the \
                             partition key leaseKey, a string, and no sort key"
            ),
        });
    }
    match table.table_status() {
        Some(TableStatus::Active | TableStatus::Updating) => {
            let rows = table.item_count().unwrap_or_default();
            Ok(format!("is there, with the key leaseKey and about {rows} rows"))
        }
        status => Err(Trouble::Wrong {
            detail: format!("it is {}", status.map_or("in no known state", TableStatus::as_str)),
            repair: format!("aws dynamodb wait table-exists --table-name {name}"),
        }),
    }
}

/// Reads, or writes what cannot be written.
async fn access(client: &Client, action: &'static str, table: &str) -> Found {
    let key = || AttributeValue::S(NOBODYS_KEY.to_owned());
    let done = match action {
        "dynamodb:Scan" => {
            let scan = client.scan().table_name(table).consistent_read(true).limit(1);
            scan.send().await.map(drop).map_err(|error| aws::failure("dynamodb:Scan", error))
        }
        "dynamodb:GetItem" => {
            let get = client.get_item().table_name(table).key("leaseKey", key());
            get.send().await.map(drop).map_err(|error| aws::failure("dynamodb:GetItem", error))
        }
        "dynamodb:PutItem" => {
            let put = client.put_item().table_name(table).item("leaseKey", key());
            let put = put.condition_expression(NEVER).send().await;
            refused(put.map(drop).map_err(|error| aws::failure("dynamodb:PutItem", error)))
        }
        "dynamodb:UpdateItem" => {
            let update = client.update_item().table_name(table).key("leaseKey", key());
            let update = update
                .update_expression("SET leaseOwner = :nobody")
                .expression_attribute_values(":nobody", key())
                .condition_expression(NEVER);
            let update = update.send().await;
            refused(update.map(drop).map_err(|error| aws::failure("dynamodb:UpdateItem", error)))
        }
        "dynamodb:DeleteItem" => {
            let delete = client.delete_item().table_name(table).key("leaseKey", key());
            let delete = delete.condition_expression(NEVER).send().await;
            refused(delete.map(drop).map_err(|error| aws::failure("dynamodb:DeleteItem", error)))
        }
        _ => return Err(Trouble::NotTried("there is no harmless call".to_owned())),
    };
    match done {
        Ok(()) => Ok("allowed".to_owned()),
        Err(error) if error.kind() == AwsErrorKind::NotFound => Err(Trouble::Wrong {
            detail: error.to_string(),
            repair: "check --app, --lease-table and the region, or let the first worker make it"
                .into(),
        }),
        Err(error) => Err(error.into()),
    }
}

/// A write whose condition never holds is allowed if only the condition was in its way.
fn refused(written: Result<(), AwsError>) -> Result<(), AwsError> {
    match written {
        Err(error) if error.kind() == AwsErrorKind::Condition => Ok(()),
        written => written,
    }
}
