# Everything: a key of one's own, a week of records, five applications that keep what they know in each of the
# ways, dead letters, both archives, an operator who may repair, alarms by mail and a dashboard.

terraform {
  required_version = ">= 1.9"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 6.2, < 7.0"
    }
  }
}

variable "region" {
  description = "Where all of it is."
  type        = string
  default     = "us-east-1"
}

variable "mail" {
  description = "Whom the alarms tell. AWS asks this address to confirm."
  type        = string
  default     = null
}

provider "aws" {
  region = var.region
}

data "aws_caller_identity" "current" {}
data "aws_partition" "current" {}

resource "aws_kms_key" "tramline" {
  description         = "OCS messages: streams and bucket"
  enable_key_rotation = true

  # The account's own policies say who may use it.
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Principal = { AWS = "arn:${data.aws_partition.current.partition}:iam::${data.aws_caller_identity.current.account_id}:root" }
      Action    = "kms:*"
      Resource  = "*"
    }]
  })
}

resource "aws_sns_topic" "alarms" {
  name = "tramline-alarms"
}

resource "aws_sns_topic_subscription" "mail" {
  count = var.mail == null ? 0 : 1

  topic_arn = aws_sns_topic.alarms.arn
  protocol  = "email"
  endpoint  = var.mail
}

module "tramline" {
  source = "../.."

  stream_name     = "ctd-ocs-raw-messages"
  name_prefix     = "tramline-"
  tags            = { service = "ocs" }
  shard_count     = 2
  retention_hours = 168
  kms_key_arn     = aws_kms_key.tramline.arn

  applications = {
    # A fleet that goes on where it was, beside a Java KCL or without one.
    rtr-green = { retrieval = "fan-out", dead_letters = "kinesis" }
    # Positions and state in one write, in an object for each shard.
    rtr-red = { retrieval = "fan-out", checkpoint = "s3-by-shard", dead_letters = "s3" }
    # One worker that keeps positions and state of all shards in one object.
    predictions = { checkpoint = "s3", start = "service-day", dead_letters = "kinesis" }
    # A display: what comes from now on, nothing stored.
    display = { checkpoint = "none", start = "latest" }
    # The day's log in S3.
    archive = { lease_table = "ocs-archive-leases", archive = true }
  }

  lease_tables = { point_in_time_recovery = true, deletion_protection = true }
  bucket       = { versions_days = 2 }
  firehose     = { create = true }
  operator     = { move_checkpoints = true, redrive = true }
  alarms       = { create = true, actions = [aws_sns_topic.alarms.arn], lag_seconds = 60, silence_minutes = 15 }
  dashboard    = true
}

# terraform output -json configuration | jq -r '."rtr-green"' > rtr-green.toml
output "configuration" {
  value = module.tramline.configuration
}

output "producer" {
  value = module.tramline.producer_configuration
}

output "policy_arns" {
  value = module.tramline.policy_arns
}

output "alarm_names" {
  value = module.tramline.alarm_names
}
