# The records as they are, in S3, without a program of one's own.

locals {
  firehose_name = "${var.name_prefix}${var.stream_name}"
}

resource "aws_iam_role" "firehose" {
  count = var.firehose.create ? 1 : 0

  name_prefix = "${var.name_prefix}firehose-"
  tags        = var.tags

  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Action    = "sts:AssumeRole"
      Principal = { Service = "firehose.amazonaws.com" }
      # Only for this account's own Firehose.
      Condition = { StringEquals = { "aws:SourceAccount" = local.account } }
    }]
  })
}

# What Firehose itself calls: https://docs.aws.amazon.com/firehose/latest/dev/controlling-access.html
resource "aws_iam_role_policy" "firehose" {
  count = var.firehose.create ? 1 : 0

  name = "archive"
  role = aws_iam_role.firehose[0].id

  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      for statement in [
        {
          when      = true
          actions   = ["kinesis:DescribeStream", "kinesis:GetShardIterator", "kinesis:GetRecords", "kinesis:ListShards"]
          resources = [local.stream_arn]
        },
        {
          when      = true
          actions   = ["s3:GetBucketLocation", "s3:ListBucket", "s3:ListBucketMultipartUploads"]
          resources = [local.bucket_arn]
        },
        {
          when      = true
          actions   = ["s3:AbortMultipartUpload", "s3:GetObject", "s3:PutObject"]
          resources = ["${local.bucket_arn}/firehose/*", "${local.bucket_arn}/firehose-errors/*"]
        },
        {
          when      = var.kms_key_arn != null
          actions   = ["kms:Decrypt", "kms:GenerateDataKey"]
          resources = [var.kms_key_arn]
        },
      ] : { Effect = "Allow", Action = statement.actions, Resource = statement.resources } if statement.when
    ]
  })
}

resource "aws_kinesis_firehose_delivery_stream" "this" {
  count = var.firehose.create ? 1 : 0

  name        = local.firehose_name
  destination = "extended_s3"
  tags        = var.tags
  # Firehose tries the role when it is created.
  depends_on = [aws_iam_role_policy.firehose]

  kinesis_source_configuration {
    kinesis_stream_arn = local.stream_arn
    role_arn           = aws_iam_role.firehose[0].arn
  }

  extended_s3_configuration {
    role_arn            = aws_iam_role.firehose[0].arn
    bucket_arn          = local.bucket_arn
    prefix              = "firehose/!{timestamp:yyyy/MM/dd}/"
    error_output_prefix = "firehose-errors/!{firehose:error-output-type}/!{timestamp:yyyy/MM/dd}/"
    buffering_interval  = var.firehose.buffer_seconds
    buffering_size      = var.firehose.buffer_mib
    compression_format  = "GZIP"
    kms_key_arn         = var.kms_key_arn

    # A record has no end of line of its own.
    processing_configuration {
      enabled = true

      processors {
        type = "AppendDelimiterToRecord"

        parameters {
          parameter_name  = "Delimiter"
          parameter_value = "\\n"
        }
      }
    }
  }
}
