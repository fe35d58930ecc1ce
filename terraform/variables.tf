variable "stream_name" {
  description = "The name of the stream."
  type        = string

  validation {
    # 13 less than Kinesis allows: the dead letters' stream has the same name with an ending.
    condition     = can(regex("^[a-zA-Z0-9_.-]{1,115}$", var.stream_name))
    error_message = "A stream's name has 1 to 115 letters, digits, _ . and - here."
  }
}

variable "name_prefix" {
  description = "What the names of policies, alarms, the dashboard, the bucket and the Firehose archive begin with."
  type        = string
  default     = "tramline-"

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{0,19}$", var.name_prefix))
    error_message = "The prefix has 1 to 20 lower-case letters, digits and -, and begins with no -: a bucket's name begins with it."
  }
}

variable "tags" {
  description = "Tags of everything that can have them."
  type        = map(string)
  default     = {}
}

variable "shard_count" {
  description = "The shards of a provisioned stream; null for a stream in on-demand mode."
  type        = number
  default     = 1

  validation {
    condition     = var.shard_count == null || try(var.shard_count >= 1 && floor(var.shard_count) == var.shard_count, false)
    error_message = "A provisioned stream has at least 1 shard; write null for on-demand mode."
  }
}

variable "retention_hours" {
  description = "How long the stream keeps a record. Above 24 it costs extra; `--start service-day` needs more than 24."
  type        = number
  default     = 24

  validation {
    condition     = var.retention_hours >= 24 && var.retention_hours <= 8760 && floor(var.retention_hours) == var.retention_hours
    error_message = "A stream keeps records for 24 to 8760 hours (365 days)."
  }
}

variable "kms_key_arn" {
  description = "The key of one's own that encrypts streams and bucket; null for `alias/aws/kinesis` and SSE-S3, which need no grants."
  type        = string
  default     = null

  validation {
    # A policy on an alias grants nothing.
    condition     = var.kms_key_arn == null || can(regex("^arn:[a-z-]+:kms:[a-z0-9-]+:[0-9]{12}:key/.+$", var.kms_key_arn))
    error_message = "Write the ARN of a key, arn:aws:kms:REGION:ACCOUNT:key/ID, not that of an alias."
  }
}

variable "applications" {
  description = "Who reads the stream, by `--app`. See the table of its settings in README.md."
  type = map(object({
    retrieval      = optional(string, "polling")
    checkpoint     = optional(string, "dynamodb")
    lease_table    = optional(string)
    start          = optional(string)
    dead_letters   = optional(string, "none")
    archive        = optional(bool, false)
    create_missing = optional(bool, false)
  }))
  default = {}

  validation {
    condition     = alltrue([for name in keys(var.applications) : can(regex("^[a-zA-Z0-9_.-]{3,128}$", name))])
    error_message = "An application's name has 3 to 128 letters, digits, _ . and -: its lease table and its consumer have it."
  }
  validation {
    condition     = alltrue([for name in keys(var.applications) : length("${var.name_prefix}${var.stream_name}-consumer-${name}") <= 128])
    error_message = "The name of a policy, PREFIX STREAM -consumer- APPLICATION, has at most 128 characters."
  }
  validation {
    condition     = alltrue([for app in values(var.applications) : contains(["fan-out", "polling"], app.retrieval)])
    error_message = "An application's retrieval is fan-out or polling."
  }
  validation {
    condition     = alltrue([for app in values(var.applications) : contains(["dynamodb", "s3", "s3-by-shard", "none"], app.checkpoint)])
    error_message = "An application's checkpoint is dynamodb, s3 (one object, for one worker), s3-by-shard or none."
  }
  validation {
    condition     = alltrue([for app in values(var.applications) : contains(["none", "kinesis", "s3"], app.dead_letters)])
    error_message = "An application's dead_letters are none (standard error), kinesis or s3."
  }
  validation {
    condition     = alltrue([for app in values(var.applications) : app.lease_table == null || can(regex("^[a-zA-Z0-9_.-]{3,255}$", app.lease_table))])
    error_message = "A lease table's name has 3 to 255 letters, digits, _ . and -."
  }
  validation {
    condition     = alltrue([for app in values(var.applications) : app.lease_table == null || contains(["dynamodb", "s3-by-shard"], app.checkpoint)])
    error_message = "Only an application with checkpoint dynamodb or s3-by-shard has a lease table."
  }
  validation {
    condition     = alltrue([for app in values(var.applications) : app.start == null || can(regex("^(latest|trim-horizon|service-day|[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9:.]+([Zz]|[+-][0-9:]+))$", app.start))])
    error_message = "An application starts at latest, trim-horizon, service-day or an RFC 3339 time."
  }
  validation {
    # Two applications would take each other's leases.
    condition     = length(distinct([for name, app in var.applications : coalesce(app.lease_table, name)])) == length(var.applications)
    error_message = "Each application has a lease table of its own."
  }
}

variable "lease_tables" {
  description = "Whether the lease tables can be restored to any second of the last 35 days, and cannot be deleted."
  type = object({
    point_in_time_recovery = optional(bool, false)
    deletion_protection    = optional(bool, false)
  })
  default = {}
}

variable "bucket" {
  description = "The bucket of state, dead letters and archive: its name (null: prefix, account and region), how many days an overwritten or deleted object is kept, and whether `destroy` may delete a bucket that is not empty. It is created where something is kept in it."
  type = object({
    name          = optional(string)
    versions_days = optional(number, 1)
    force_destroy = optional(bool, false)
  })
  default = {}

  validation {
    condition     = var.bucket.name == null || can(regex("^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$", var.bucket.name))
    error_message = "A bucket's name has 3 to 63 lower-case letters, digits, . and -."
  }
  validation {
    condition     = var.bucket.versions_days >= 1 && floor(var.bucket.versions_days) == var.bucket.versions_days
    error_message = "S3 keeps overwritten objects for at least 1 day."
  }
}

variable "dead_letter_retention_hours" {
  description = "How long the stream of dead letters keeps them: the time to look into them and to redrive."
  type        = number
  default     = 168

  validation {
    condition     = var.dead_letter_retention_hours >= 24 && var.dead_letter_retention_hours <= 8760 && floor(var.dead_letter_retention_hours) == var.dead_letter_retention_hours
    error_message = "A stream keeps records for 24 to 8760 hours (365 days)."
  }
}

variable "firehose" {
  description = "The archive of the stream's records, as they are, by Amazon Data Firehose: `firehose/YYYY/MM/DD/` in the bucket. An application with `archive = true` writes the day's log instead, each message once and in order."
  type = object({
    create         = optional(bool, false)
    buffer_seconds = optional(number, 300)
    buffer_mib     = optional(number, 64)
  })
  default = {}

  validation {
    condition     = var.firehose.buffer_seconds >= 60 && var.firehose.buffer_seconds <= 900
    error_message = "Firehose may hold records for 60 to 900 s."
  }
  validation {
    condition     = var.firehose.buffer_mib >= 1 && var.firehose.buffer_mib <= 128
    error_message = "Firehose may hold 1 to 128 MiB."
  }
}

variable "operator" {
  description = "What the operator's policy allows beyond `tramline status` and dry runs of `tramline lease`: the lag, `lease … --yes`, `redrive`."
  type = object({
    see_lag          = optional(bool, true)
    move_checkpoints = optional(bool, false)
    redrive          = optional(bool, false)
  })
  default = {}
}

variable "alarms" {
  description = "Whether there are alarms, whom they tell (ARNs of SNS topics), how far a reader may be behind, and how long the producer may be silent."
  type = object({
    create          = optional(bool, false)
    actions         = optional(list(string), [])
    lag_seconds     = optional(number, 60)
    silence_minutes = optional(number, 15)
  })
  default = {}

  validation {
    condition     = var.alarms.lag_seconds > 0
    error_message = "A reader is always a little behind: lag_seconds is above 0."
  }
  validation {
    # CloudWatch looks back over one day at most.
    condition     = var.alarms.silence_minutes >= 1 && var.alarms.silence_minutes <= 1440 && floor(var.alarms.silence_minutes) == var.alarms.silence_minutes
    error_message = "silence_minutes is a whole number from 1 to 1440."
  }
  validation {
    condition     = alltrue([for arn in var.alarms.actions : can(regex("^arn:", arn))])
    error_message = "The alarms' actions are ARNs."
  }
}

variable "dashboard" {
  description = "Whether there is a CloudWatch dashboard."
  type        = bool
  default     = false
}
