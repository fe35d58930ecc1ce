# What is created, and that nothing is that was not asked for.

mock_provider "aws" {
  source = "./tests/mocks"
}

variables {
  stream_name = "ocs"
}

run "only_the_stream_and_two_policies_without_an_application" {
  command = plan

  assert {
    condition     = aws_kinesis_stream.this.shard_count == 1 && one(aws_kinesis_stream.this.stream_mode_details).stream_mode == "PROVISIONED"
    error_message = "One provisioned shard is the default."
  }
  assert {
    condition     = aws_kinesis_stream.this.encryption_type == "KMS" && aws_kinesis_stream.this.kms_key_id == "alias/aws/kinesis"
    error_message = "The stream is encrypted also without a key of one's own."
  }
  assert {
    condition     = toset(keys(aws_iam_policy.this)) == toset(["operator", "producer"])
    error_message = "The policies are those of the producer and the operator."
  }
  assert {
    condition = alltrue([
      length(aws_kinesis_stream_consumer.this) == 0,
      length(aws_kinesis_stream.dead_letters) == 0,
      length(aws_dynamodb_table.leases) == 0,
      length(aws_s3_bucket.this) == 0,
      length(aws_s3_bucket_policy.this) == 0,
      length(aws_s3_bucket_metric.dead_letters) == 0,
      length(aws_kinesis_firehose_delivery_stream.this) == 0,
      length(aws_iam_role.firehose) == 0,
      length(aws_cloudwatch_metric_alarm.this) == 0,
      length(aws_cloudwatch_metric_alarm.lease_table) == 0,
      length(aws_cloudwatch_dashboard.this) == 0,
    ])
    error_message = "Nothing else is created."
  }
  assert {
    condition     = output.bucket == null && output.dead_letter_stream == null && output.firehose_arn == null && output.dashboard_name == null
    error_message = "What is not there has no output."
  }
}

run "on_demand" {
  command = plan

  variables {
    shard_count     = null
    retention_hours = 8760
  }

  assert {
    condition     = one(aws_kinesis_stream.this.stream_mode_details).stream_mode == "ON_DEMAND" && aws_kinesis_stream.this.retention_period == 8760
    error_message = "Without a number of shards the stream is on-demand; it can keep records for a year."
  }
}

run "a_lease_table_as_the_worker_and_the_kcl_make_it" {
  command = plan

  variables {
    applications = { rtr-green = {}, rtr-red = { lease_table = "leases-of-red" } }
    lease_tables = { point_in_time_recovery = true, deletion_protection = true }
  }

  assert {
    condition     = { for name, table in aws_dynamodb_table.leases : name => table.name } == { rtr-green = "rtr-green", rtr-red = "leases-of-red" }
    error_message = "A table has the application's name, or the one that is set."
  }
  assert {
    condition = alltrue([for table in aws_dynamodb_table.leases : alltrue([
      table.billing_mode == "PAY_PER_REQUEST",
      table.hash_key == "leaseKey",
      table.range_key == null,
      one(table.attribute).name == "leaseKey" && one(table.attribute).type == "S",
      one(table.point_in_time_recovery).enabled,
      table.deletion_protection_enabled,
    ])])
    error_message = "One string key, leaseKey, paid by request, with the protections that were asked for."
  }
}

run "checkpoints_elsewhere_need_no_table" {
  command = plan

  variables {
    applications = {
      one-object = { checkpoint = "s3" }
      by-shard   = { checkpoint = "s3-by-shard" }
      nothing    = { checkpoint = "none", retrieval = "fan-out" }
    }
  }

  assert {
    condition     = keys(aws_dynamodb_table.leases) == ["by-shard"] && keys(aws_kinesis_stream_consumer.this) == ["nothing"]
    error_message = "A table is for leases, a consumer for fan-out."
  }
  assert {
    condition     = aws_s3_bucket.this[0].bucket == "tramline-123456789012-us-east-1"
    error_message = "The bucket is named after account and region."
  }
  assert {
    condition = alltrue([
      one(aws_s3_bucket_versioning.this[0].versioning_configuration).status == "Enabled",
      one(one(aws_s3_bucket_server_side_encryption_configuration.this[0].rule).apply_server_side_encryption_by_default).sse_algorithm == "AES256",
      aws_s3_bucket_public_access_block.this[0].block_public_acls,
      aws_s3_bucket_public_access_block.this[0].block_public_policy,
      aws_s3_bucket_public_access_block.this[0].ignore_public_acls,
      aws_s3_bucket_public_access_block.this[0].restrict_public_buckets,
    ])
    error_message = "The bucket is versioned, encrypted and private."
  }
}

run "everything" {
  # Applied, for what is known only then.
  variables {
    shard_count = 2
    kms_key_arn = "arn:aws:kms:us-east-1:123456789012:key/k"
    firehose    = { create = true }
    alarms      = { create = true, actions = ["arn:aws:sns:us-east-1:123456789012:t"], silence_minutes = 7 }
    dashboard   = true
    applications = {
      green = { retrieval = "fan-out", dead_letters = "kinesis" }
      red   = { checkpoint = "s3-by-shard", dead_letters = "s3", archive = true }
    }
  }

  assert {
    condition = toset(keys(aws_cloudwatch_metric_alarm.this)) == toset([
      "dead-letters", "dead-letters-bucket", "firehose-age", "iterator-age", "lag-green", "producer-silence",
      "read-throttled", "subscribe-throttled-green", "write-throttled",
    ]) && toset(keys(aws_cloudwatch_metric_alarm.lease_table)) == toset(["green", "red"])
    error_message = "There is an alarm for each thing that can go wrong."
  }
  assert {
    condition = alltrue([
      for alarm in [aws_cloudwatch_metric_alarm.this["producer-silence"], aws_cloudwatch_metric_alarm.this["lag-green"], aws_cloudwatch_metric_alarm.this["iterator-age"]] :
      alarm.treat_missing_data == "breaching"
    ])
    error_message = "A metric that is missing means that nobody writes, or reads."
  }
  assert {
    condition     = aws_cloudwatch_metric_alarm.this["producer-silence"].period * aws_cloudwatch_metric_alarm.this["producer-silence"].evaluation_periods == 7 * 60
    error_message = "The producer may be silent for as long as was said."
  }
  assert {
    condition     = aws_cloudwatch_metric_alarm.this["lag-green"].dimensions == tomap({ StreamName = "ocs", ConsumerName = "green" })
    error_message = "Lag by fan-out is that of one consumer."
  }
  assert {
    condition     = alltrue([for alarm in aws_cloudwatch_metric_alarm.this : alarm.alarm_actions == toset(["arn:aws:sns:us-east-1:123456789012:t"])])
    error_message = "Each alarm tells somebody."
  }
  assert {
    condition     = jsondecode(aws_s3_bucket_policy.this[0].policy).Statement[0].Condition.Bool["aws:SecureTransport"] == "false"
    error_message = "Only TLS is let in."
  }
  assert {
    condition     = one(aws_s3_bucket_server_side_encryption_configuration.this[0].rule).bucket_key_enabled && aws_kinesis_stream.dead_letters[0].kms_key_id == var.kms_key_arn
    error_message = "The key of one's own encrypts all of it."
  }
  assert {
    condition     = { for statement in jsondecode(output.policy_documents["consumer-green"]).Statement : statement.Sid => statement.Resource[0] }["Consumer"] == "${aws_kinesis_stream.this.arn}/consumer/green:*"
    error_message = "A consumer's policy names the consumer."
  }
  assert {
    condition     = length(jsondecode(aws_cloudwatch_dashboard.this[0].dashboard_body).widgets) == 6
    error_message = "The dashboard shows all six."
  }
  assert {
    condition     = output.configuration["red"] == <<-EOT
      # tramline consume --config red.toml; check, status and lease read it too
      region = "us-east-1"
      stream = "ocs"
      app = "red"
      checkpoint = "s3://tramline-123456789012-us-east-1/state/red/{shard}.state"

      [consume]
      retrieval = "polling"
      dead-letters = "s3://tramline-123456789012-us-east-1/dead-letters"
      output = "s3-archive://tramline-123456789012-us-east-1/archive/red"
    EOT
    error_message = "The config file is that of the application."
  }
}
