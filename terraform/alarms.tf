# What wakes somebody. The metrics are those that AWS itself publishes:
# - AWS/Kinesis: https://docs.aws.amazon.com/streams/latest/dev/monitoring-with-cloudwatch.html
# - AWS/DynamoDB: https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/metrics-dimensions.html
# - AWS/S3: https://docs.aws.amazon.com/AmazonS3/latest/userguide/metrics-dimensions.html
# - AWS/Firehose: https://docs.aws.amazon.com/firehose/latest/dev/monitoring-with-cloudwatch-metrics.html
# What only the processes know (spool, stopped shards, OCS numbers that are missing) is in docs/metrics.md.

locals {
  lag_ms = var.alarms.lag_seconds * 1000
  # CloudWatch takes 1440 periods of a minute; 5 minutes make fewer of them.
  is_silence_in_fives = var.alarms.silence_minutes % 5 == 0

  stream_dimensions  = { StreamName = aws_kinesis_stream.this.name }
  letters_dimensions = { StreamName = join("", aws_kinesis_stream.dead_letters[*].name) }

  stream_alarms = {
    producer-silence = {
      when        = true
      description = "Nothing was put to the stream for ${var.alarms.silence_minutes} minutes: look at the producer and its OCS connections."
      namespace   = "AWS/Kinesis"
      metric      = "IncomingRecords"
      dimensions  = local.stream_dimensions
      statistic   = "Sum"
      below       = true
      threshold   = 1
      period      = local.is_silence_in_fives ? 300 : 60
      periods     = local.is_silence_in_fives ? var.alarms.silence_minutes / 5 : var.alarms.silence_minutes
      # A stream that nobody writes has no such metric.
      missing = "breaching"
    }
    write-throttled = {
      when        = true
      description = "Kinesis refused records for 15 minutes: the stream needs more shards. The producer keeps them in its spool."
      namespace   = "AWS/Kinesis"
      metric      = "WriteProvisionedThroughputExceeded"
      dimensions  = local.stream_dimensions
      statistic   = "Sum"
      below       = false
      threshold   = 0
      period      = 300
      periods     = 3
      missing     = "notBreaching"
    }
    # GetRecords is counted for all readers together: by polling they share 5 reads a second and shard.
    iterator-age = {
      when        = length(local.fan_out) < length(var.applications) || var.firehose.create
      description = "A reader by polling is more than ${var.alarms.lag_seconds} s behind, or none reads: tramline status --lag shows which."
      namespace   = "AWS/Kinesis"
      metric      = "GetRecords.IteratorAgeMilliseconds"
      dimensions  = local.stream_dimensions
      statistic   = "Maximum"
      below       = false
      threshold   = local.lag_ms
      period      = 60
      periods     = 5
      missing     = "breaching"
    }
    read-throttled = {
      when        = length(local.fan_out) < length(var.applications) || var.firehose.create
      description = "Reads by polling were refused for 15 minutes: too many readers share a shard's 5 reads a second; let some use fan-out."
      namespace   = "AWS/Kinesis"
      metric      = "ReadProvisionedThroughputExceeded"
      dimensions  = local.stream_dimensions
      statistic   = "Sum"
      below       = false
      threshold   = 0
      period      = 300
      periods     = 3
      missing     = "notBreaching"
    }
    dead-letters = {
      when        = local.has_letters_stream
      description = "Dead letters came: look at the reasons in stream ${var.stream_name}-dead-letters, then tramline redrive."
      namespace   = "AWS/Kinesis"
      metric      = "IncomingRecords"
      dimensions  = local.letters_dimensions
      statistic   = "Sum"
      below       = false
      threshold   = 0
      period      = 60
      periods     = 1
      missing     = "notBreaching"
    }
    dead-letters-bucket = {
      when        = local.has_letters_bucket
      description = "Dead letters came: look at the reasons in s3://${local.bucket_name}/${local.letters_prefix}/, then tramline redrive."
      namespace   = "AWS/S3"
      metric      = "PutRequests"
      dimensions  = { BucketName = local.bucket_name, FilterId = local.letters_prefix }
      statistic   = "Sum"
      below       = false
      threshold   = 0
      period      = 60
      periods     = 1
      missing     = "notBreaching"
    }
    firehose-age = {
      when        = var.firehose.create
      description = "The oldest record that Firehose has not delivered is older than 15 minutes and its buffer: look at firehose-errors/ and its role."
      namespace   = "AWS/Firehose"
      metric      = "DeliveryToS3.DataFreshness"
      dimensions  = { DeliveryStreamName = local.firehose_name }
      statistic   = "Maximum"
      below       = false
      threshold   = var.firehose.buffer_seconds + 900
      period      = 300
      periods     = 3
      missing     = "notBreaching"
    }
  }

  fan_out_alarms = merge([
    for name in keys(local.fan_out) : {
      "lag-${name}" = {
        when        = true
        description = "${name} is more than ${var.alarms.lag_seconds} s behind, or reads nothing: tramline status --app ${name} --lag shows where."
        namespace   = "AWS/Kinesis"
        metric      = "SubscribeToShardEvent.MillisBehindLatest"
        dimensions  = { StreamName = aws_kinesis_stream.this.name, ConsumerName = name }
        statistic   = "Maximum"
        below       = false
        threshold   = local.lag_ms
        period      = 60
        periods     = 5
        # Events come also while no records do: without any, nobody is subscribed.
        missing = "breaching"
      }
      "subscribe-throttled-${name}" = {
        when        = true
        description = "Subscriptions of ${name} were refused for 15 minutes: something else subscribes as the same consumer."
        namespace   = "AWS/Kinesis"
        metric      = "SubscribeToShard.RateExceeded"
        dimensions  = { StreamName = aws_kinesis_stream.this.name, ConsumerName = name }
        statistic   = "Sum"
        below       = false
        threshold   = 0
        period      = 300
        periods     = 3
        missing     = "notBreaching"
      }
    }
  ]...)

  alarms = { for name, alarm in merge(local.stream_alarms, local.fan_out_alarms) : name => alarm if alarm.when && var.alarms.create }

  # What a worker calls. SystemErrors is published for each operation, throttling for the table.
  table_operations = ["GetItem", "PutItem", "UpdateItem", "DeleteItem", "Scan"]
  table_metrics = concat(
    [{ metric = "ReadThrottleEvents", operation = null }, { metric = "WriteThrottleEvents", operation = null }],
    [for operation in local.table_operations : { metric = "SystemErrors", operation = operation }],
  )
}

resource "aws_cloudwatch_metric_alarm" "this" {
  for_each = local.alarms

  alarm_name          = "${var.name_prefix}${var.stream_name}-${each.key}"
  alarm_description   = each.value.description
  namespace           = each.value.namespace
  metric_name         = each.value.metric
  dimensions          = each.value.dimensions
  statistic           = each.value.statistic
  comparison_operator = each.value.below ? "LessThanThreshold" : "GreaterThanThreshold"
  threshold           = each.value.threshold
  period              = each.value.period
  evaluation_periods  = each.value.periods
  treat_missing_data  = each.value.missing
  alarm_actions       = var.alarms.actions
  ok_actions          = var.alarms.actions
  tags                = var.tags
}

resource "aws_cloudwatch_metric_alarm" "lease_table" {
  for_each = { for name, table in local.leased : name => table if var.alarms.create }

  alarm_name          = "${var.name_prefix}${var.stream_name}-lease-table-${each.key}"
  alarm_description   = "DynamoDB refused or failed calls on lease table ${each.value} for 15 minutes: leases may run out, and messages come twice."
  comparison_operator = "GreaterThanThreshold"
  threshold           = 0
  evaluation_periods  = 3
  treat_missing_data  = "notBreaching"
  alarm_actions       = var.alarms.actions
  ok_actions          = var.alarms.actions
  tags                = var.tags

  metric_query {
    id          = "errors"
    label       = "Refused and failed calls"
    expression  = join(" + ", [for n in range(length(local.table_metrics)) : "FILL(m${n}, 0)"])
    return_data = true
  }

  dynamic "metric_query" {
    for_each = local.table_metrics

    content {
      id = "m${metric_query.key}"

      metric {
        namespace   = "AWS/DynamoDB"
        metric_name = metric_query.value.metric
        dimensions = merge(
          { TableName = aws_dynamodb_table.leases[each.key].name },
          metric_query.value.operation == null ? {} : { Operation = metric_query.value.operation },
        )
        stat   = "Sum"
        period = 300
      }
    }
  }
}

# S3 counts requests only where it is told to, at the price of custom metrics.
resource "aws_s3_bucket_metric" "dead_letters" {
  count = local.has_letters_bucket && var.alarms.create ? 1 : 0

  bucket = aws_s3_bucket.this[0].id
  name   = local.letters_prefix

  filter {
    prefix = "${local.letters_prefix}/"
  }
}
