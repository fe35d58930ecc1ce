# What Tramline is told, and what the rest of an account needs.

locals {
  # Names are of letters, digits, _ . and -, so that quotes are all they need.
  configuration = {
    for name, app in var.applications : name => join("\n", concat(
      [
        "# tramline consume --config ${name}.toml; check, status and lease read it too",
        "region = \"${local.region}\"",
        "stream = \"${var.stream_name}\"",
        "app = \"${name}\"",
      ],
      app.lease_table == null ? [] : ["lease-table = \"${app.lease_table}\""],
      contains(["s3", "s3-by-shard"], app.checkpoint) ? ["checkpoint = \"s3://${local.bucket_name}/${local.state_keys[name]}\""] : [],
      ["", "[consume]", "retrieval = \"${app.retrieval}\""],
      app.checkpoint == "none" ? ["no-checkpoint = true"] : [],
      app.start == null ? [] : ["start = \"${app.start}\""],
      app.dead_letters == "kinesis" ? ["dead-letters = \"kinesis://${var.stream_name}-dead-letters\""] : [],
      app.dead_letters == "s3" ? ["dead-letters = \"s3://${local.bucket_name}/${local.letters_prefix}\""] : [],
      app.archive ? ["output = \"s3-archive://${local.bucket_name}/${local.archive_prefix}/${name}\""] : [],
      [""],
    ))
  }

  producer_configuration = join("\n", [
    "# tramline produce --config producer.toml",
    "region = \"${local.region}\"",
    "stream = \"${var.stream_name}\"",
    "",
    "[produce]",
    "listen = \"0.0.0.0:8001\"",
    "",
  ])
}

output "configuration" {
  description = "The config file of each application, TOML, by its name."
  value       = local.configuration
}

output "producer_configuration" {
  description = "The config file of the producer, TOML. The port is the one to change."
  value       = local.producer_configuration
}

output "stream_name" {
  description = "The stream's name."
  value       = aws_kinesis_stream.this.name
}

output "stream_arn" {
  description = "The stream's ARN."
  value       = aws_kinesis_stream.this.arn
}

output "consumer_arns" {
  description = "The fan-out consumers' ARNs, by application."
  value       = { for name, consumer in aws_kinesis_stream_consumer.this : name => consumer.arn }
}

output "lease_tables" {
  description = "The lease tables' names, by application."
  value       = { for name, table in aws_dynamodb_table.leases : name => table.name }
}

output "bucket" {
  description = "The bucket's name; null where nothing is kept in one."
  value       = one(aws_s3_bucket.this[*].bucket)
}

output "dead_letter_stream" {
  description = "The name of the stream of dead letters; null where no application has it."
  value       = one(aws_kinesis_stream.dead_letters[*].name)
}

output "firehose_arn" {
  description = "The ARN of the Firehose archive; null where there is none."
  value       = one(aws_kinesis_firehose_delivery_stream.this[*].arn)
}

output "policy_arns" {
  description = "The policies to attach: `producer`, `operator`, and `consumer-APPLICATION` for each application."
  value       = { for role, policy in aws_iam_policy.this : role => policy.arn }
}

output "policy_documents" {
  description = "The same as JSON, for a review or for roles that are made elsewhere."
  value       = local.policies
}

output "alarm_names" {
  description = "The alarms' names."
  value       = concat(values(aws_cloudwatch_metric_alarm.this)[*].alarm_name, values(aws_cloudwatch_metric_alarm.lease_table)[*].alarm_name)
}

output "dashboard_name" {
  description = "The dashboard's name; null where there is none."
  value       = one(aws_cloudwatch_dashboard.this[*].dashboard_name)
}
