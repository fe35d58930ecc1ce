# One row of what comes in, one of how far the readers are, one of where they keep what they know.

locals {
  widgets = [
    {
      title = "Records and bytes put"
      metrics = [
        ["AWS/Kinesis", "IncomingRecords", "StreamName", var.stream_name, { stat = "Sum" }],
        ["AWS/Kinesis", "IncomingBytes", "StreamName", var.stream_name, { stat = "Sum", yAxis = "right" }],
      ]
    },
    {
      title = "Refused: too few shards, too many readers"
      metrics = [
        ["AWS/Kinesis", "WriteProvisionedThroughputExceeded", "StreamName", var.stream_name, { stat = "Sum" }],
        ["AWS/Kinesis", "ReadProvisionedThroughputExceeded", "StreamName", var.stream_name, { stat = "Sum" }],
      ]
    },
    {
      title = "How far readers are behind, ms"
      metrics = concat(
        [["AWS/Kinesis", "GetRecords.IteratorAgeMilliseconds", "StreamName", var.stream_name, { stat = "Maximum", label = "polling" }]],
        [for name in keys(local.fan_out) : ["AWS/Kinesis", "SubscribeToShardEvent.MillisBehindLatest", "StreamName", var.stream_name, "ConsumerName", name, { stat = "Maximum", label = name }]],
      )
    },
    {
      title = "Records read"
      metrics = concat(
        [["AWS/Kinesis", "GetRecords.Records", "StreamName", var.stream_name, { stat = "Sum", label = "polling" }]],
        [for name in keys(local.fan_out) : ["AWS/Kinesis", "SubscribeToShardEvent.Records", "StreamName", var.stream_name, "ConsumerName", name, { stat = "Sum", label = name }]],
      )
    },
    {
      title   = "Lease tables: units written"
      metrics = [for name, table in local.leased : ["AWS/DynamoDB", "ConsumedWriteCapacityUnits", "TableName", table, { stat = "Sum", label = name }]]
    },
    {
      title   = "Dead letters"
      metrics = local.has_letters_stream ? [["AWS/Kinesis", "IncomingRecords", "StreamName", "${var.stream_name}-dead-letters", { stat = "Sum" }]] : []
    },
  ]
  shown = [for widget in local.widgets : widget if length(widget.metrics) > 0]
}

resource "aws_cloudwatch_dashboard" "this" {
  count = var.dashboard ? 1 : 0

  dashboard_name = replace("${var.name_prefix}${var.stream_name}", ".", "-")
  dashboard_body = jsonencode({
    widgets = [
      for n, widget in local.shown : {
        type   = "metric"
        x      = n % 2 * 12
        y      = floor(n / 2) * 6
        width  = 12
        height = 6
        properties = {
          title   = widget.title
          region  = local.region
          period  = 60
          metrics = widget.metrics
        }
      }
    ]
  })
}
