# The stream, who reads it, and where the readers keep what they know.

data "aws_caller_identity" "current" {}
data "aws_region" "current" {}

locals {
  region  = data.aws_region.current.region
  account = data.aws_caller_identity.current.account_id

  fan_out = { for name, app in var.applications : name => app if app.retrieval == "fan-out" }
  # A worker without leases, or the only one of its application, needs no table.
  leased = { for name, app in var.applications : name => coalesce(app.lease_table, name) if contains(["dynamodb", "s3-by-shard"], app.checkpoint) }

  has_letters_stream = anytrue([for app in values(var.applications) : app.dead_letters == "kinesis"])
  has_letters_bucket = anytrue([for app in values(var.applications) : app.dead_letters == "s3"])
  has_state          = anytrue([for app in values(var.applications) : contains(["s3", "s3-by-shard"], app.checkpoint)])
  has_archive        = anytrue([for app in values(var.applications) : app.archive])
  has_bucket         = local.has_state || local.has_letters_bucket || local.has_archive || var.firehose.create

  bucket_name = coalesce(var.bucket.name, "${var.name_prefix}${local.account}-${local.region}")
}

resource "aws_kinesis_stream" "this" {
  name             = var.stream_name
  shard_count      = var.shard_count
  retention_period = var.retention_hours
  encryption_type  = "KMS"
  kms_key_id       = coalesce(var.kms_key_arn, "alias/aws/kinesis")
  tags             = var.tags

  stream_mode_details {
    stream_mode = var.shard_count == null ? "ON_DEMAND" : "PROVISIONED"
  }
}

resource "aws_kinesis_stream_consumer" "this" {
  for_each = local.fan_out

  # The worker looks for a consumer with the name of its application.
  name       = each.key
  stream_arn = aws_kinesis_stream.this.arn
  tags       = var.tags
}

# Dead letters are few: one shard is enough for any stream.
resource "aws_kinesis_stream" "dead_letters" {
  count = local.has_letters_stream ? 1 : 0

  name             = "${var.stream_name}-dead-letters"
  shard_count      = 1
  retention_period = var.dead_letter_retention_hours
  encryption_type  = "KMS"
  kms_key_id       = coalesce(var.kms_key_arn, "alias/aws/kinesis")
  tags             = var.tags

  stream_mode_details {
    stream_mode = "PROVISIONED"
  }
}

# The rows are those of the Java KCL: one string key, everything else as it comes. They hold positions and
# the names of workers, no messages, so the key of DynamoDB itself is enough.
resource "aws_dynamodb_table" "leases" {
  for_each = local.leased

  name                        = each.value
  billing_mode                = "PAY_PER_REQUEST"
  hash_key                    = "leaseKey"
  deletion_protection_enabled = var.lease_tables.deletion_protection
  tags                        = var.tags

  attribute {
    name = "leaseKey"
    type = "S"
  }

  point_in_time_recovery {
    enabled = var.lease_tables.point_in_time_recovery
  }

  # A KCL 3 fleet adds an index of its own to the table that it shares with Tramline.
  lifecycle {
    ignore_changes = [attribute, global_secondary_index]
  }
}
