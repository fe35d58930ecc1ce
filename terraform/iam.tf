# Who may do what: the producer, each application's workers, and the operator.
#
# The actions are those of src/permissions.rs, the table of the calls in the code; tests/it/terraform.rs compares
# them. A statement's `sid` is the resource as that table calls it, and `when` says whether it is wanted. The
# resources are named in full: `*` stands only for what AWS or a worker chooses, a consumer's time of
# registration and the keys below an application's own prefix.
#
# s3:ListBucket is on the whole bucket: without it, S3 answers 403 instead of 404 for an object that is not there
# yet, and with a condition on the prefix too, because GetObject has none.

locals {
  stream_arn  = aws_kinesis_stream.this.arn
  letters_arn = join("", aws_kinesis_stream.dead_letters[*].arn)
  bucket_arn  = join("", aws_s3_bucket.this[*].arn)
  table_arns  = { for name, table in aws_dynamodb_table.leases : name => table.arn }

  key_condition = { StringEquals = { "kms:ViaService" = ["kinesis.${local.region}.amazonaws.com", "s3.${local.region}.amazonaws.com"] } }

  producer_statements = [
    {
      sid       = "Stream"
      when      = true
      actions   = ["kinesis:DescribeStreamSummary", "kinesis:ListShards", "kinesis:PutRecords"]
      resources = [local.stream_arn]
    },
    {
      sid       = "Key"
      when      = var.kms_key_arn != null
      actions   = ["kms:GenerateDataKey"]
      resources = [var.kms_key_arn]
    },
  ]

  consumer_statements = {
    for name, app in var.applications : name => [
      {
        sid  = "Stream"
        when = true
        actions = concat(
          ["kinesis:DescribeStreamSummary", "kinesis:ListShards"],
          app.retrieval == "polling" ? ["kinesis:GetShardIterator", "kinesis:GetRecords"] : [],
          app.retrieval == "fan-out" && app.create_missing ? ["kinesis:RegisterStreamConsumer"] : [],
        )
        resources = [local.stream_arn]
      },
      {
        sid       = "Consumer"
        when      = app.retrieval == "fan-out"
        actions   = ["kinesis:DescribeStreamConsumer", "kinesis:SubscribeToShard"]
        resources = ["${local.stream_arn}/consumer/${name}:*"]
      },
      {
        sid  = "LeaseTable"
        when = contains(["dynamodb", "s3-by-shard"], app.checkpoint)
        actions = concat(
          ["dynamodb:DescribeTable", "dynamodb:Scan", "dynamodb:GetItem", "dynamodb:PutItem", "dynamodb:UpdateItem", "dynamodb:DeleteItem"],
          app.create_missing ? ["dynamodb:CreateTable"] : [],
        )
        resources = [lookup(local.table_arns, name, null)]
      },
      {
        sid       = "StateBucket"
        when      = contains(["s3", "s3-by-shard"], app.checkpoint)
        actions   = ["s3:ListBucket"]
        resources = [local.bucket_arn]
      },
      {
        sid       = "StateObjects"
        when      = contains(["s3", "s3-by-shard"], app.checkpoint)
        actions   = ["s3:GetObject", "s3:PutObject"]
        resources = [app.checkpoint == "s3" ? "${local.bucket_arn}/state/${name}.state" : "${local.bucket_arn}/state/${name}/*.state"]
      },
      {
        sid       = "ArchiveBucket"
        when      = app.archive
        actions   = ["s3:ListBucket"]
        resources = [local.bucket_arn]
      },
      {
        sid       = "ArchiveObjects"
        when      = app.archive
        actions   = ["s3:GetObject", "s3:PutObject"]
        resources = ["${local.bucket_arn}/${local.archive_prefix}/${name}/*"]
      },
      {
        sid       = "DeadLetterStream"
        when      = app.dead_letters == "kinesis"
        actions   = ["kinesis:DescribeStreamSummary", "kinesis:PutRecords"]
        resources = [local.letters_arn]
      },
      {
        sid       = "DeadLetterBucket"
        when      = app.dead_letters == "s3"
        actions   = ["s3:ListBucket"]
        resources = [local.bucket_arn]
      },
      {
        sid       = "DeadLetterObjects"
        when      = app.dead_letters == "s3"
        actions   = ["s3:PutObject"]
        resources = ["${local.bucket_arn}/${local.letters_prefix}/${name}/*"]
      },
      {
        sid  = "Key"
        when = var.kms_key_arn != null
        actions = concat(
          ["kms:Decrypt"],
          contains(["s3", "s3-by-shard"], app.checkpoint) || app.archive || app.dead_letters != "none" ? ["kms:GenerateDataKey"] : [],
        )
        resources = [var.kms_key_arn]
      },
    ]
  }

  operator_statements = [
    {
      sid  = "Stream"
      when = true
      actions = distinct(concat(
        ["kinesis:ListShards"],
        var.operator.see_lag || var.operator.redrive ? ["kinesis:GetShardIterator", "kinesis:GetRecords"] : [],
        var.operator.redrive ? ["kinesis:DescribeStreamSummary", "kinesis:PutRecords"] : [],
      ))
      resources = [local.stream_arn]
    },
    {
      sid  = "LeaseTable"
      when = length(local.table_arns) > 0
      actions = concat(
        ["dynamodb:Scan"],
        var.operator.move_checkpoints ? ["dynamodb:GetItem", "dynamodb:PutItem", "dynamodb:UpdateItem"] : [],
      )
      resources = values(local.table_arns)
    },
    {
      sid       = "StateBucket"
      when      = local.has_state
      actions   = ["s3:ListBucket"]
      resources = [local.bucket_arn]
    },
    {
      sid       = "StateObjects"
      when      = local.has_state
      actions   = concat(["s3:GetObject"], var.operator.move_checkpoints ? ["s3:PutObject"] : [])
      resources = ["${local.bucket_arn}/state/*"]
    },
    {
      sid       = "DeadLetterStream"
      when      = local.has_letters_stream && var.operator.redrive
      actions   = ["kinesis:ListShards", "kinesis:GetShardIterator", "kinesis:GetRecords"]
      resources = [local.letters_arn]
    },
    {
      sid       = "DeadLetterBucket"
      when      = local.has_letters_bucket && var.operator.redrive
      actions   = ["s3:ListBucket"]
      resources = [local.bucket_arn]
    },
    {
      # What was put back is noted beside the letters.
      sid       = "DeadLetterObjects"
      when      = local.has_letters_bucket && var.operator.redrive
      actions   = ["s3:GetObject", "s3:PutObject"]
      resources = ["${local.bucket_arn}/${local.letters_prefix}/*"]
    },
    {
      sid  = "Key"
      when = var.kms_key_arn != null && (var.operator.see_lag || var.operator.redrive || local.has_state)
      actions = concat(
        ["kms:Decrypt"],
        var.operator.redrive || var.operator.move_checkpoints && local.has_state ? ["kms:GenerateDataKey"] : [],
      )
      resources = [var.kms_key_arn]
    },
  ]

  statements = merge(
    { producer = local.producer_statements, operator = local.operator_statements },
    { for name, statements in local.consumer_statements : "consumer-${name}" => statements },
  )

  policies = {
    for role, statements in local.statements : role => jsonencode({
      Version = "2012-10-17"
      Statement = [
        for statement in statements : merge(
          {
            Sid      = statement.sid
            Effect   = "Allow"
            Action   = statement.actions
            Resource = statement.resources
          },
          statement.sid == "Key" ? { Condition = local.key_condition } : {},
        ) if statement.when
      ]
    })
  }
}

# Attach them to the roles of the processes.
resource "aws_iam_policy" "this" {
  for_each = local.policies

  name        = "${var.name_prefix}${var.stream_name}-${each.key}"
  description = "Tramline on stream ${var.stream_name}: ${each.key}"
  policy      = each.value
  tags        = var.tags
}
